"""The same callables on the same buffers in one process: our stopwatch and NVBench's Python binding (`cuda-bench`).

    python benchmarks/nvbench_compare.py OUT.json

Cold figures are compared with NVBench's cold mean, sustained ones with its batch mean.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda.bench as bench
import torch

from pytest_gpuperf.records import Mode
from pytest_gpuperf.stopwatches import CudaStopwatch
from pytest_gpuperf.timing import measure
from pytest_gpuperf.workloads.bandwidth import MemoryBandwidth
from pytest_gpuperf.workloads.matmul import Matmul

CASES: dict[str, Mode] = {"copy": "cold", "softmax": "cold", "matmul_4096": "sustained", "matmul_8192": "sustained"}


def workloads() -> dict[str, Callable[[], object]]:
    """Name -> callable; made once, so that both tools see the same memory."""
    x = torch.randn(16384, 4096, device="cuda")
    return {
        "copy": MemoryBandwidth("copy", size_bytes=2**30, device="cuda:0"),
        "softmax": lambda: torch.softmax(x, dim=-1),
        "matmul_4096": Matmul(4096, dtype="bfloat16", device="cuda:0"),
        "matmul_8192": Matmul(8192, dtype="bfloat16", device="cuda:0"),
    }


def registered(name: str, call: Callable[[], object]) -> None:
    """Register a callable with NVBench: its launches go to NVBench's stream."""

    def launch(launch: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(launch.get_stream().addressof())):  # type: ignore[no-untyped-call]
            call()

    def body(state: Any) -> None:
        state.set_throttle_threshold(0.25)
        state.exec(launch)

    body.__name__ = name
    entry = bench.register(body)
    entry.set_batch_target_time(4.0 if CASES[name] == "sustained" else 1.0)
    entry.set_timeout(12)


def nvbench_s(path: Path) -> dict[str, float]:
    """Run all that is registered; seconds by name, cold mean or batch mean."""
    bench.run_all_benchmarks(["nvbench_compare", "--json", str(path)])
    figures: dict[str, float] = {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        tag = "nv/cold/time/gpu/mean" if CASES[entry["name"]] == "cold" else "nv/batch/time/gpu/mean"
        for summary in entry["states"][0]["summaries"]:
            if summary["tag"] == tag:
                figures[entry["name"]] = float(next(d["value"] for d in summary["data"] if d["name"] == "value"))
    return figures


def main() -> None:
    """Measure with ours, with NVBench, and with ours again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    calls = workloads()
    stopwatch = CudaStopwatch(0)

    def ours() -> dict[str, float]:
        return {name: measure(call, stopwatch=stopwatch, mode=CASES[name]).value_s for name, call in calls.items()}

    before = ours()
    for name, call in calls.items():
        registered(name, call)
    theirs = nvbench_s(out.with_suffix(".nvbench.json"))
    after = ours()
    print(f"{'':<12} {'ours':>12} {'ours again':>12} {'NVBench':>12} {'difference':>11}")
    for name, their_s in theirs.items():
        our_s = (before[name] + after[name]) / 2
        print(
            f"{name:<12} {before[name] * 1e6:9.3f} us {after[name] * 1e6:9.3f} us {their_s * 1e6:9.3f} us "
            f"{our_s / their_s - 1:+11.2%}"
        )
    out.write_text(json.dumps({"before_s": before, "after_s": after, "nvbench_s": theirs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
