"""Seven workloads, each with a cause of slowness that `PLANTED=1` puts in; the eighth, a process beside, is started."""

import os
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest

from pytest_gpuperf import Device, GpuBenchmark

IS_PLANTED = os.environ.get("PLANTED") == "1"
torch = pytest.importorskip("torch")


def normal(*shape: int, device: str, dtype: str = "bfloat16") -> Any:
    generator = torch.Generator(device=device).manual_seed(0)
    return torch.randn(*shape, device=device, dtype=getattr(torch, dtype), generator=generator)


@pytest.fixture
def size(gpu: Device) -> int:
    """Sides of the large matrices."""
    return 4096 if gpu.kind == "cuda" else 256


def test_algorithm(gpu: Device, gpu_benchmark: GpuBenchmark, size: int) -> None:
    """A K that is not a multiple of 8 leaves the fast kernels."""
    k = size - IS_PLANTED
    a, b = normal(size, k, device=gpu.device), normal(k, size, device=gpu.device)
    gpu_benchmark(lambda: a @ b, mode="hot")


def test_pass(gpu: Device, gpu_benchmark: GpuBenchmark, size: int) -> None:
    """One more element-wise pass over the result."""
    a, b = normal(size, size, device=gpu.device), normal(size, size, device=gpu.device)

    def call() -> object:
        product = torch.relu(a @ b)
        return product.mul(1.5) if IS_PLANTED else product

    gpu_benchmark(call, mode="hot")


def test_host(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """The host waits 30 us between two launches."""
    a, b = normal(1024, 1024, device=gpu.device), normal(1024, 1024, device=gpu.device)

    def call() -> None:
        for _ in range(50):
            a @ b
            end_s = time.perf_counter() + 30e-6 * IS_PLANTED
            while time.perf_counter() < end_s:
                pass

    gpu_benchmark(call, mode="hot")


def test_graph(gpu: Device, gpu_benchmark: GpuBenchmark) -> None:
    """Eager instead of a CUDA graph."""
    weights = [normal(512, 512, device=gpu.device) * 0.04 for _ in range(20)]
    x = normal(32, 512, device=gpu.device)

    def network() -> object:
        y = x
        for weight in weights:
            y = torch.relu(y @ weight) + y
        return y

    gpu_benchmark(network if IS_PLANTED or gpu.kind == "cpu" else captured(network), mode="hot", clock=events(gpu))


def test_precision(gpu: Device, gpu_benchmark: GpuBenchmark, size: int) -> None:
    """Single precision instead of tf32."""
    a, b = (normal(size, size, device=gpu.device, dtype="float32") for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = not IS_PLANTED
    try:
        gpu_benchmark(lambda: a @ b, mode="hot")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_batch(gpu: Device, gpu_benchmark: GpuBenchmark, size: int) -> None:
    """The same rows in batches of an eighth."""
    up, down = normal(size, 11008, device=gpu.device) * 0.01, normal(11008, size, device=gpu.device) * 0.01
    rows = normal(1024, size, device=gpu.device)

    def call() -> None:
        for batch in rows.split(32 if IS_PLANTED else 256):
            torch.relu(batch @ up) @ down

    gpu_benchmark(call, mode="hot")


def test_neighbour(gpu: Device, gpu_benchmark: GpuBenchmark, size: int) -> None:
    """Nothing is planted here: another process works on the GPU meanwhile."""
    a, b = normal(size, size, device=gpu.device), normal(size, size, device=gpu.device)
    gpu_benchmark(lambda: a @ b, mode="hot")


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: object = call) -> None:  # noqa: ARG001 - what the graph reads must not be freed
        graph.replay()

    return replay


def events(gpu: Device) -> Literal["cuda-events"] | None:
    """The clock that does not capture a graph of its own."""
    return "cuda-events" if gpu.kind == "cuda" else None
