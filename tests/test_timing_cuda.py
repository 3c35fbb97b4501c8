"""The CUDA stopwatch on a real GPU. Skipped without one."""

import pytest

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.records import Method
from pytest_gpuperf.stopwatches import CudaStopwatch
from pytest_gpuperf.timing import measure

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)


@pytest.fixture(scope="module")
def stopwatch() -> CudaStopwatch:
    return CudaStopwatch(0)


def test_a_large_copy_is_measured_cold_by_events(stopwatch: CudaStopwatch) -> None:
    x = torch.randn(2**26, device="cuda")
    y = torch.empty_like(x)
    timing = measure(lambda: y.copy_(x), stopwatch=stopwatch)
    assert timing.method == Method(clock="cuda-events", mode="cold")
    assert timing.spread < 0.005


def test_a_small_sum_is_measured_hot_in_a_graph(stopwatch: CudaStopwatch) -> None:
    x = torch.randn(1024, device="cuda")
    timing = measure(lambda: torch.add(x, x, out=x), stopwatch=stopwatch)
    assert timing.method == Method(clock="cuda-graph", mode="hot")
    assert timing.value_s < 5e-6


def test_a_small_call_that_synchronises_falls_back_to_events(stopwatch: CudaStopwatch) -> None:
    x = torch.randn(1024, device="cuda")
    timing = measure(lambda: x.sum().item(), stopwatch=stopwatch, mode="hot")
    assert timing.method.clock == "cuda-events"


def test_the_gpu_is_usable_after_a_capture_failed(stopwatch: CudaStopwatch) -> None:
    x = torch.randn(1024, device="cuda")
    assert stopwatch.graph(lambda: x.sum().item(), 10) is None
    assert float(torch.ones(10, device="cuda").sum()) == 10
    assert stopwatch.graph(lambda: torch.add(x, x, out=x), 10) is not None


def test_a_call_without_gpu_work_is_refused(stopwatch: CudaStopwatch) -> None:
    with pytest.raises(MeasurementError, match="did no work"):
        measure(lambda: None, stopwatch=stopwatch)


def test_work_on_another_stream_is_refused(stopwatch: CudaStopwatch) -> None:
    side = torch.cuda.Stream()
    a = torch.randn(8192, 8192, device="cuda")

    def call() -> None:
        with torch.cuda.stream(side):
            a @ a

    with pytest.raises(MeasurementError, match="another stream"):
        measure(call, stopwatch=stopwatch)


def test_running_out_of_memory_reaches_the_caller(stopwatch: CudaStopwatch) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measure(lambda: torch.empty(2**44, device="cuda"), stopwatch=stopwatch)
    assert float(torch.ones(10, device="cuda").sum()) == 10
