"""How fast are square matrix products, in every precision that the device has?"""

import pytest

from pytest_gpuperf import Device, GpuBenchmark
from pytest_gpuperf.workloads.matmul import Matmul


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.03)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32", "float32", "float8", "int8"])
def test_matmul(gpu: Device, gpu_benchmark: GpuBenchmark, n: int, dtype: str) -> None:
    """At least a tenth of the peak, even at the smallest size; well over half at the large ones."""
    result = gpu_benchmark(Matmul(n, dtype=dtype, device=gpu.device))
    result.assert_at_least(0.1, of="peak")
