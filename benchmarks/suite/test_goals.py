"""The workloads whose repeatability is published in RESULTS.md; two of them with a slowdown planted on demand."""

import pytest
import torch
from planted import planted

from pytest_gpuperf import Device, GpuBenchmark
from pytest_gpuperf.workloads.bandwidth import MemoryBandwidth
from pytest_gpuperf.workloads.matmul import Matmul


@pytest.mark.perf(tolerance=0.02)
def test_matmul_8192(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """8192^3 bfloat16, sustained."""
    gpu_benchmark(Matmul(8192, dtype="bfloat16", device=gpu.device, slowdown=planted("matmul")))


@pytest.mark.perf(tolerance=0.01)
def test_copy(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """A copy of 1 GiB, cold."""
    gpu_benchmark(MemoryBandwidth("copy", size_bytes=2**30, device=gpu.device, slowdown=planted("copy")))


@pytest.mark.perf(tolerance=0.01)
def test_softmax(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """Softmax over the rows of a 16384 x 4096 float32 matrix, cold."""
    x = torch.randn(round(16384 * (1 + planted("softmax"))), 4096, device=gpu.device)
    gpu_benchmark(lambda: torch.softmax(x, dim=-1), mode="cold")


@pytest.mark.perf(tolerance=0.02)
def test_matmul_4096(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """4096^3 bfloat16, sustained."""
    gpu_benchmark(Matmul(4096, dtype="bfloat16", device=gpu.device))


@pytest.mark.perf(tolerance=0.02)
def test_matmul_2048(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """2048^3 bfloat16 in a CUDA graph."""
    gpu_benchmark(Matmul(2048, dtype="bfloat16", device=gpu.device), clock="cuda-graph")


@pytest.mark.perf(tolerance=0.03)
def test_add_1024(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """An element-wise sum of 1024 values in a CUDA graph."""
    x, y = torch.randn(2, 1024, device=gpu.device)
    out = torch.empty_like(x)
    gpu_benchmark(lambda: torch.add(x, y, out=out), clock="cuda-graph")
