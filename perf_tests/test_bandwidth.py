"""How fast do bytes move: within the device's memory, and between it and the host?"""

from typing import Literal

import pytest

from pytest_gpuperf import Device, GpuBenchmark
from pytest_gpuperf.workloads.bandwidth import HostTransfer, MemoryBandwidth


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.02)
@pytest.mark.parametrize("direction", ["copy", "read", "write"])
def test_memory(
    gpu: Device, gpu_benchmark: GpuBenchmark, direction: Literal["copy", "read", "write"], size_bytes: int
) -> None:
    """Published copies reach 75 to 95 % of the peak."""
    result = gpu_benchmark(MemoryBandwidth(direction, size_bytes=size_bytes, device=gpu.device))
    result.assert_at_least(0.6, of="peak")


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.05)
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("direction", ["host_to_device", "device_to_host"])
def test_host_transfer(
    gpu: Device,
    gpu_benchmark: GpuBenchmark,
    direction: Literal["host_to_device", "device_to_host"],
    size_bytes: int,
    pinned: bool,
) -> None:
    """Pinned memory moves at the speed of the bus; pageable memory goes through the host's staging buffer."""
    result = gpu_benchmark(HostTransfer(direction, size_bytes=size_bytes, device=gpu.device, pinned=pinned))
    result.assert_at_least(1, unit="GB/s")
