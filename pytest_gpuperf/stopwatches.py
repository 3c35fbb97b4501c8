"""The clocks themselves: the host's for a CPU, CUDA events and graphs for a GPU."""

import time
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.records import ClockName
from pytest_gpuperf.timing import CPU_PLANS, GPU_PLANS, Call, Estimate, Stopwatch
from pytest_gpuperf.units import format_value

if TYPE_CHECKING:
    import torch


class WallStopwatch:
    """The host's monotonic clock, for work that is done when the call returns."""

    clock: ClockName = "wall"
    plans = CPU_PLANS

    #: Larger than the last-level cache of most CPUs; written over before each cold call.
    flush_bytes = 256 * 2**20

    def now(self) -> float:
        """Seconds of `time.perf_counter`."""
        return time.perf_counter()

    def estimate(self, call: Call) -> Estimate:
        """Time single calls for up to 50 ms; the quickest is closest to the work alone."""
        call()
        best_s, end_s = float("inf"), time.perf_counter() + 0.05
        for _ in range(10_000):
            start_s = time.perf_counter()
            call()
            best_s = min(best_s, time.perf_counter() - start_s)
            if time.perf_counter() > end_s:
                break
        return Estimate(device_s=best_s, host_s=best_s)

    def blocks(self, call: Call, calls: int) -> Generator[float, None, None]:
        """Seconds of block after block."""
        while True:
            start_s = time.perf_counter()
            for _ in range(calls):
                call()
            yield time.perf_counter() - start_s

    def singles(self, call: Call, batch: int) -> Generator[float, None, None]:  # noqa: ARG002 - nothing is queued
        """Seconds of one call after another, the caches overwritten in between."""
        import numpy as np

        buffer = np.zeros(self.flush_bytes // 8)
        while True:
            buffer.fill(1.0)
            start_s = time.perf_counter()
            call()
            yield time.perf_counter() - start_s

    def graph(self, call: Call, calls: int) -> Call | None:  # noqa: ARG002 - the protocol's
        """There are no graphs on a CPU."""
        return None


class CudaStopwatch:
    """CUDA events on the device's current stream, which is kept full so that the host's speed is not measured.

    Args:
        index: Index of the device among those visible to torch.
    """

    clock: ClockName = "cuda-events"
    plans = GPU_PLANS

    #: Blocks in flight: while one is read, the next two are queued.
    depth = 3

    def __init__(self, index: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        cache_bytes: int = torch.cuda.get_device_properties(self._device).L2_cache_size
        self._host_s = 0.0
        self._flush_bytes = 2 * max(cache_bytes, 32 * 2**20)

    def now(self) -> float:
        """Seconds of `time.perf_counter`."""
        return time.perf_counter()

    def estimate(self, call: Call) -> Estimate:
        """Run for 0.2 s to leave the idle clocks behind, then time calls that wait behind a busy stream.

        Raises:
            MeasurementError: Most of the work went to another stream than the current one.
        """
        call()
        self._synchronize()
        single_s = self._host_seconds(call, self._synchronize)
        for _ in range(max(int(0.2 / max(single_s, 1e-5)), 1)):
            call()
        self._synchronize()
        calls = min(max(int(0.1 / max(single_s, 1e-6)), 2), 20)
        self._occupy(0.02)
        start = self._mark()
        host_s = self._host_seconds(*[call] * calls)
        end = self._mark()
        end.synchronize()
        rest_s = self._host_seconds(self._synchronize)
        device_s: float = start.elapsed_time(end) / 1e3
        if rest_s > 0.5 * device_s + 1e-3:
            raise MeasurementError(
                f"The callable went on working for {format_value(rest_s, 's')} after its stream was done: "
                "it uses another stream than the current one. Let it wait for that stream before it returns."
            )
        self._host_s = host_s / calls
        return Estimate(device_s=device_s / calls, host_s=self._host_s)

    def blocks(self, call: Call, calls: int) -> Generator[float, None, None]:
        """Seconds between events that lie `calls` calls apart on a stream that is never empty."""
        marks = deque([self._mark()])
        try:
            while True:
                for _ in range(calls):
                    call()
                marks.append(self._mark())
                if len(marks) > self.depth:
                    start = marks.popleft()
                    marks[0].synchronize()
                    yield start.elapsed_time(marks[0]) / 1e3
        finally:
            self._synchronize()

    def singles(self, call: Call, batch: int) -> Generator[float, None, None]:
        """Seconds of single calls, each after a write over twice the last-level cache; batches are queued ahead."""
        flush = self._torch.empty(self._flush_bytes // 4, dtype=self._torch.int32, device=self._device)
        queued: deque[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = deque()
        try:
            while True:
                self._occupy(max(2e-3, 1.2 * batch * self._host_s))  # until all of the batch is launched
                queued.append([self._cold_call(call, flush) for _ in range(batch)])
                if len(queued) > 1:
                    done = queued.popleft()
                    done[-1][1].synchronize()
                    yield from (start.elapsed_time(end) / 1e3 for start, end in done)
        finally:
            self._synchronize()

    def graph(self, call: Call, calls: int) -> Call | None:
        """Capture `calls` calls as one CUDA graph."""
        torch = self._torch
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # lazily built state must exist before the capture
            call()
        torch.cuda.current_stream(self._device).wait_stream(side)
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                for _ in range(calls):
                    call()
        except self._torch.cuda.OutOfMemoryError:
            self._recover_from_capture()
            raise
        except RuntimeError:  # the call synchronises, or reads the host: what a graph cannot hold
            self._recover_from_capture()
            return None
        replay: Call = graph.replay
        return replay

    def _recover_from_capture(self) -> None:
        """Make the device usable again: a broken capture leaves torch's random generator in its capturing state."""
        self._synchronize()
        generator = self._torch.cuda.default_generators[self._device.index]
        generator.graphsafe_set_state(generator.clone_state())

    def _cold_call(self, call: Call, flush: "torch.Tensor") -> "tuple[torch.cuda.Event, torch.cuda.Event]":
        flush.zero_()
        start = self._mark()
        call()
        return start, self._mark()

    def _occupy(self, seconds: float) -> None:
        """Keep the stream busy, so that what is launched next queues up behind."""
        with self._torch.cuda.device(self._device):  # it spins on the current device, which may be another
            self._torch.cuda._sleep(int(seconds * 2e9))  # type: ignore[no-untyped-call]  # noqa: SLF001 - clock cycles

    def _mark(self) -> "torch.cuda.Event":
        event = self._torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def _synchronize(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def _host_seconds(self, *actions: Call) -> float:
        start_s = time.perf_counter()
        for action in actions:
            action()
        return time.perf_counter() - start_s


def stopwatch_of(kind: str, index: int) -> Stopwatch:
    """The stopwatch of a device: `"cuda"` with its index, or `"cpu"`."""
    return CudaStopwatch(index) if kind == "cuda" else WallStopwatch()
