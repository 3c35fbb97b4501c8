"""Our offline throughput against `vllm bench throughput`: same prompts, same settings, alternately in one sitting.

    python benchmarks/llm/throughput_check.py OUT_DIR [--model llama-3-8b] [--pairs 2] [--repeats 3]

Each side loads an engine of its own in a process of its own, in the order A B B A ... . The other side is vLLM's own
code: `LLM.from_engine_args`, then its `_run_vllm_requests`, which holds the timer, on the very token ids that we draw.
The first repeat of each engine is a warm-up and is not counted. Writes OUT_DIR/throughput_check.json and prints the
ratio with its 95 % interval over the pairs, and the host time that our own loop adds.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gpuperf.machine import Machine
from pytest_gpuperf.stats import t_quantile
from pytest_gpuperf.workloads.models import model_folder
from pytest_gpuperf.workloads.requests import Load, prompts_of
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig, arguments_of
from pytest_gpuperf.workloads.vllm_environment import child_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What both sides do."""

    config: EngineConfig
    load: Load
    repeats: int


def ours(job: Job, machine: Machine, out: Path) -> dict[str, Any]:
    """Output tokens a second of each counted repeat, and the share of the time that our loop added."""
    with Engine(job.config, devices=machine.devices, nvml=machine.nvml, folder=out / "engines") as engine:
        found = [engine.generate(job.load) for _ in range(job.repeats + 1)][1:]
        load_time_s = engine.load_time_s
    left = engine.close()
    return {
        "side": "pytest-gpuperf",
        "rates": [one.output_tokens_per_s for one in found],
        "driver_shares": [one.driver_share for one in found],
        "driver_s_per_request": [one.driver_s / len(one.requests) for one in found],
        "load_time_s": load_time_s,
        "memory_before_bytes": left.before_bytes,
        "memory_after_bytes": left.after_bytes,
    }


def theirs(job: Job, machine: Machine, out: Path) -> dict[str, Any]:
    """The same from vLLM's benchmark, in a process of its own."""
    folder = str(model_folder(job.config.model, out / "models").resolve())
    arguments = arguments_of(job.config, model=folder, is_on_gpu=not machine.is_cpu)
    order = {"arguments": arguments, "load": [job.load.requests, job.load.prompt_tokens, job.load.output_tokens]}
    path = out / "bench.json"
    path.write_text(json.dumps({**order, "repeats": job.repeats}))
    environment = child_environment(machine.devices[:1], nvml=machine.nvml, own=job.config.environment, is_offline=True)
    log = out / "bench.log"
    with log.open("wb") as file:
        subprocess.run(
            [sys.executable, __file__, str(out), "--bench", str(path)],
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=400,
            check=True,
        )
    return {"side": "vllm bench throughput", **json.loads(path.read_text())}


def bench(path: Path) -> None:
    """Run vLLM's benchmark code on an order, and put what it found in its place."""
    from vllm import LLM
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.throughput import _run_vllm_requests
    from vllm.engine.arg_utils import EngineArgs

    order = json.loads(path.read_text())
    llm = LLM.from_engine_args(EngineArgs(**order["arguments"]))
    count, prompt_tokens, output_tokens = order["load"]
    load = Load(requests=count, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    vocab = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    requests = [
        SampleRequest(prompt={"prompt_token_ids": tokens}, prompt_len=prompt_tokens, expected_output_len=output_tokens)
        for tokens in prompts_of(load, vocab)
    ]
    rates = []
    for _ in range(order["repeats"] + 1):
        elapsed_s, outputs = _run_vllm_requests(
            llm, requests, 1, disable_detokenize=True, do_profile=False, prequeue_requests=False, enable_lora=False
        )
        rates.append(sum(len(one.outputs[0].token_ids) for one in outputs) / elapsed_s)
    path.write_text(json.dumps({"rates": rates[1:]}))
    llm.llm_engine.engine_core.shutdown()


def ratio_of(found: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Ours over theirs by pairs, with its 95 % interval."""
    means = {
        side: [statistics.fmean(map(math.log, one["rates"])) for one in found if one["side"] == side]
        for side in ("pytest-gpuperf", "vllm bench throughput")
    }
    logs = [a - b for a, b in zip(*means.values(), strict=True)]
    half = (
        t_quantile(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    )
    middle = statistics.fmean(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def main() -> None:
    """Run the pairs, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bench", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bench:
        bench(given.bench)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    load = Load(requests=given.requests, prompt_tokens=given.prompt_tokens, output_tokens=given.output_tokens)
    config = EngineConfig(model=given.model, max_model_len=given.prompt_tokens + given.output_tokens)
    job, machine = Job(config=config, load=load, repeats=given.repeats), Machine("auto")
    found: list[dict[str, Any]] = []
    for pair in range(given.pairs):
        for run in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            found.append(run(job, machine, given.out))
            rates = " ".join(f"{rate:.0f}" for rate in found[-1]["rates"])
            print(f"{found[-1]['side']:22} {rates} tok/s", flush=True)
            (given.out / "throughput_check.json").write_text(json.dumps(found, indent=1))
    ratio, low, high = ratio_of(found)
    shares = [share for one in found for share in one.get("driver_shares", ())]
    print(f"ratio {ratio:.4f} (95 % interval {low:.4f} to {high:.4f}); our loop adds {max(shares):.3%} at most")


if __name__ == "__main__":
    main()
