"""Fixed work for a GPU, in blocks that are timed one by one; without a GPU it is slept through."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

N = 8192
CALLS = 50
DRY_BLOCK_S = 0.05
#: Names what the driver of the benchmark asks of the suite.
TESTS, BLOCKS, NOTES, DRY, GPUS = (f"LEASES_{name}" for name in ("TESTS", "BLOCKS", "NOTES", "DRY", "GPUS"))


def block_on(devices: Sequence[str]) -> Callable[[], float]:
    """Give what runs a block of matmuls on each device at once, and answers with the seconds of the slowest."""
    if os.environ.get(DRY):
        return _sleep
    import torch

    operands = [torch.randn(N, N, dtype=torch.float16, device=device) for device in devices]
    results = [torch.empty_like(one) for one in operands]
    events = [(event(torch), event(torch)) for _ in devices]

    def block() -> float:
        for device, a, out, (begin, end) in zip(devices, operands, results, events, strict=True):
            with torch.cuda.device(device):
                begin.record()
                for _ in range(CALLS):
                    torch.mm(a, a, out=out)
                end.record()
        for _, end in events:
            end.synchronize()
        return float(max(begin.elapsed_time(end) for begin, end in events)) * 1e-3

    return block


def event(torch: Any) -> Any:
    """A CUDA event that keeps the time."""
    return torch.cuda.Event(enable_timing=True)


def warm_up(devices: Sequence[str]) -> None:
    """Import torch and make contexts, which are no part of a test's own time."""
    block_on(devices)()


def median_s(devices: Sequence[str], blocks: int) -> float:
    """Median time of a block, after three to warm up."""
    block = block_on(devices)
    for _ in range(3):
        block()
    return statistics.median(block() for _ in range(max(blocks, 1)))


def _sleep() -> float:
    begin_s = time.perf_counter()
    time.sleep(DRY_BLOCK_S)
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the median seconds of a block on a device.")
    parser.add_argument("device", nargs="?", default="cuda:0")
    print(median_s([parser.parse_args().device], 12))
