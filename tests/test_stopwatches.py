"""What the CUDA stopwatch asks of torch, with a torch that only writes down what it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from pytest_gpuperf.stopwatches import CudaStopwatch


class FakeCuda:
    """Stands for `torch.cuda`: remembers on which device it was told to spin."""

    def __init__(self) -> None:
        self.current = "cuda:0"
        self.spins: list[tuple[str, int]] = []

    @contextmanager
    def device(self, device: str) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def _sleep(self, cycles: int) -> None:
        self.spins.append((self.current, cycles))


def stopwatch_on(device: str, cuda: FakeCuda) -> CudaStopwatch:
    stopwatch = object.__new__(CudaStopwatch)
    stopwatch._torch = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    stopwatch._device = device  # type: ignore[assignment]
    return stopwatch


def test_the_device_that_is_measured_is_kept_busy_and_no_other() -> None:
    cuda = FakeCuda()
    stopwatch_on("cuda:1", cuda)._occupy(0.01)
    assert cuda.spins == [("cuda:1", 20_000_000)]
    assert cuda.current == "cuda:0"
