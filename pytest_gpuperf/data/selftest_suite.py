"""The suite of `gpuperf selftest`, run in fresh processes with work made larger by an environment variable."""

import os

import pytest

from pytest_gpuperf import Device, GpuBenchmark
from pytest_gpuperf.workloads.bandwidth import MemoryBandwidth
from pytest_gpuperf.workloads.matmul import Matmul

SLOWDOWN = float(os.environ["GPUPERF_SELFTEST_SLOWDOWN"])


@pytest.mark.perf(tolerance=0.01)
def test_copy(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """A copy of 1 GiB on a GPU, of 64 MiB on a CPU."""
    size_bytes = 2**30 if gpu.kind == "cuda" else 2**26
    gpu_benchmark(MemoryBandwidth("copy", size_bytes=size_bytes, device=gpu.device, slowdown=SLOWDOWN))


@pytest.mark.perf(tolerance=0.01)
def test_matmul(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """A product of 8192 x 8192 in bfloat16 on a GPU, of 1024 x 1024 in float32 on a CPU."""
    n, dtype = (8192, "bfloat16") if gpu.kind == "cuda" else (1024, "float32")
    gpu_benchmark(Matmul(n, dtype=dtype, device=gpu.device, slowdown=SLOWDOWN))
