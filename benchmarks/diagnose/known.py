"""Diagnoses workloads whose limit is known, each in a fresh process: expected, found, by which numbers.

    python benchmarks/diagnose/known.py OUT.json                                  # matmul, copy, tiny kernels, sleep
    python benchmarks/diagnose/known.py OUT.json --all-reduce                     # and two GPUs
    python benchmarks/diagnose/known.py OUT.json --llama transformers --llama vllm   # and Llama-3-8B, 16 GB of memory

Whether the host limits the decode of transformers depends on the host: either word is right there. `--only TEXT` runs
the cases with that in their names. Exit code 0: all that is expected was found.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pytest_gpuperf.analysis.advice import format_gain

#: No case ends in less, with its imports and the ceilings.
LEAST_S = 20.0
#: Expected classes of a phase; empty: whatever the numbers say.
COMPUTE, MEMORY, OVERHEAD, IDLE = "compute-bound", "memory-bound", "overhead-bound", "idle"


class Case(NamedTuple):
    """One run of the command."""

    name: str
    arguments: tuple[str, ...]
    expected: dict[str, tuple[str, ...]]


KERNELS = (
    Case("matmul 8192", ("matmul",), {"matmul": (COMPUTE,)}),
    Case("copy 1 GiB", ("copy",), {"copy": (MEMORY,)}),
    Case("1,000 tiny kernels", ("tiny-kernels",), {"tiny-kernels": (OVERHEAD,)}),
    Case("sleep", ("sleep",), {"sleep": (IDLE,)}),
)
ALL_REDUCE = Case("all-reduce, 2 GPUs", ("all-reduce",), {"all-reduce": ("communication-bound",)})
#: Decode of one request reads the weights for one token: memory, unless the host cannot keep up. vLLM's CUDA graphs
#: let it; transformers launches each kernel. 128 requests are 128 FLOP a byte of bfloat16 weights; an H100 does 295
#: while it reads one.
LLAMA: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers": {"prefill": (COMPUTE,), "decode 1": (MEMORY, OVERHEAD), "decode 128": (MEMORY, OVERHEAD)},
    "vllm": {"prefill": (COMPUTE,), "decode 1": (MEMORY,), "decode 128": (MEMORY,)},
}


def llama(engine: str) -> Iterator[Case]:
    """Reading of 2,048 tokens, decode of one request and of 128."""
    expected = LLAMA[engine]
    model = ("--model", "llama-3-8b", "--engine", engine)
    reading = (*model, "--phase", "prefill", "--prompt-tokens", "2048", "--iterations", "30")
    yield Case(f"{engine} prefill 2048", reading, {"prefill": expected["prefill"]})
    for batch in (1, 128):
        decoding = (*model, "--phase", "decode", "--prompt-tokens", "128", "--output-tokens", "64")
        arguments = (*decoding, "--batch-size", str(batch))
        yield Case(f"{engine} decode {batch}", arguments, {"decode": expected[f"decode {batch}"]})


def diagnosed(case: Case, *, device: str, ceilings: str, timeout_s: float) -> dict[str, Any]:
    """The command's JSON, or what went wrong."""
    command = [sys.executable, "-c", "from pytest_gpuperf.cli import main; main()", "diagnose", *case.arguments]
    options = ["--json", "--device", device, "--ceilings", ceilings, "--limit", "20"]
    begin_s = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, complaint = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        ended(process)
        return {"error": f"did not end in {timeout_s:.0f} s"}
    if process.returncode != 0:
        return {"error": (complaint.strip() or out.strip())[-600:]}
    try:  # a library may have printed something before
        found: dict[str, Any] = json.loads(out[max(out.find("{"), 0) :])
    except ValueError:
        return {"error": f"no JSON: {out.strip()[-600:]}"}
    return {**found, "took_s": time.perf_counter() - begin_s}


def ended(process: "subprocess.Popen[str]") -> None:
    """End a command so that it ends what it started, such as an engine, which would be in the way of the next case."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def rows_of(case: Case, found: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """A line a part, whether it is what was expected, and its numbers."""
    if "error" in found:
        yield case.name, False, found["error"]
        return
    for part in found["parts"]:
        wanted = case.expected.get(part["name"], ())
        shares = part["shares"]
        numbers = "  ".join(
            f"{name} {percent(shares[name])}" for name in ("busy", "memory", "compute", "communication")
        )
        near = part["next"]
        beside = f"; next {near['limit']} ({near['axis']}, {100 * near['distance']:.0f} points)" if near else ""
        verdict = f"{' or '.join(wanted) or '-':<31} {part['limit'] or 'not known':<20} {numbers}{beside}"
        yield case.name, not wanted or part["limit"] in wanted, verdict


def percent(share: float | None) -> str:
    """A share in whole percent."""
    return "   - " if share is None else f"{100 * share:3.0f} %"


def main() -> int:
    """Run all, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--all-reduce", action="store_true", help="over two GPUs")
    parser.add_argument("--llama", action="append", default=[], choices=sorted(LLAMA), help="engine; more than once")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their names")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--ceilings", default="measured", choices=("measured", "data-sheet"))
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one case")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all; what is left over is named")
    options = parser.parse_args()
    on_cpu = [case for case in KERNELS if case.name != "1,000 tiny kernels"]  # not told from latency there
    cases = [*(on_cpu if options.device == "cpu" else KERNELS), *([ALL_REDUCE] if options.all_reduce else [])]
    cases += [case for engine in options.llama for case in llama(engine)]
    cases = [case for case in cases if options.only in case.name]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    begin_s, kept, wrong, left_out = time.perf_counter(), {}, 0, 0
    print(f"{'':2} {'workload':<26} {'expected':<31} {'found':<20} numbers")
    for case in cases:
        left_s = options.budget - (time.perf_counter() - begin_s)
        if left_s < min(LEAST_S, options.timeout):
            left_out += 1
            print(f"-- {case.name:<26} left out: {options.budget:.0f} s are over", flush=True)
            continue
        timeout_s = min(options.timeout, left_s)
        found = diagnosed(case, device=options.device, ceilings=options.ceilings, timeout_s=timeout_s)
        kept[case.name] = found
        for name, is_right, text in rows_of(case, found):
            wrong += not is_right
            print(f"{'ok' if is_right else '!!'} {name:<26} {text}", flush=True)
        for part in found.get("parts", ()):
            for number, advice in enumerate(part["recommendations"], 1):
                gain = format_gain(advice["gain"])
                print(f"     {number}. {advice['because']}: {advice['action']}; at most {gain}", flush=True)
        options.out.write_text(json.dumps(kept, indent=1))
    print(f"{wrong} wrong, {left_out} left out, {time.perf_counter() - begin_s:.0f} s")
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
