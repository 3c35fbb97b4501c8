"""Runs torch's profiler over calls or a region. Never in a process that measures: CUPTI, once loaded, costs the host.

What is profiled is what is measured: the same CUDA graph where the clock is one, back-to-back calls elsewhere.
"""

import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.kernels import keep_trace, read_trace, summary_of, summary_of_cpu
from pytest_gpuperf.records import ClockName, KernelSummary, Method, Mode
from pytest_gpuperf.timing import GRAPH_CALLS, Call, Stopwatch, Timing, choose_method

if TYPE_CHECKING:
    import torch

#: Work to profile, and to warm up with before: in seconds, in calls, and in events of the trace.
WORK_S = 0.3
MOST_CALLS = 200
MOST_EVENTS = 200_000
#: A region with more is refused before its trace is written: at 0.5 kB an event that would be 250 MB.
MOST_REGION_EVENTS = 500_000
#: Set by `gpuperf profile --nsys` in the process that nsys watches: no other profiler fits beside it.
NSYS_VARIABLE = "GPUPERF_UNDER_NSYS"


class Found:
    """What a profiled region was found to be; known when it has ended, `None` where another tool records it."""

    summary: KernelSummary | None = None


class Profiler(Protocol):
    """What `TorchProfiler` does, for a fake."""

    def calls(
        self, call: Call, *, device_s: float, calls_each: int = 1, name: str = "calls"
    ) -> KernelSummary | None: ...

    def region(self, name: str = "region", *, calls: int = 1) -> AbstractContextManager[Found]: ...


class TorchProfiler:
    """Kineto, with the GPU's activities alone; on a CPU torch's operators stand for kernels.

    Args:
        kind: Of the device.
        synchronize: Waits for the devices.
        keep: Folder in which each trace is left as `LABEL-NAME.trace.json.gz`.
        label: Of the test.
        most_calls: To profile at a time; `None`: 0.3 s of work, 200 at most.
    """

    def __init__(
        self,
        kind: Literal["cuda", "cpu"],
        *,
        synchronize: Callable[[], None] = lambda: None,
        keep: Path | None = None,
        label: str = "",
        most_calls: int | None = None,
    ) -> None:
        #: Traces that were kept, in order.
        self.traces: list[Path] = []
        self._kind = kind
        self._synchronize = synchronize
        self._keep = keep
        self._label = label
        self._most_calls = most_calls
        self._is_loaded = False

    def calls(self, call: Call, *, device_s: float, calls_each: int = 1, name: str = "calls") -> KernelSummary | None:
        """Profile back-to-back calls, after as many that warm up; fewer than wanted where each leaves many events.

        Args:
            call: What to call.
            device_s: Seconds that it takes.
            calls_each: Calls of the workload that one of these is.
            name: Of a trace that is kept.

        Raises:
            MeasurementError: The profiler failed or saw nothing.
        """
        if is_under_nsys():
            self._bracketed(call, self._count(device_s, calls_each, 1))
            return None
        with self._traced(None) as (first, _):  # loads CUPTI, which takes a second, and shows how much a call leaves
            call()
        count = self._count(device_s, calls_each, max(len(first), 1))
        for _ in range(count):
            call()
        with self.region(name, calls=count * calls_each) as found:
            for _ in range(count):
                call()
        return found.summary

    def _count(self, device_s: float, calls_each: int, events: int) -> int:
        usual = min(int(WORK_S / max(device_s, 1e-9)), MOST_CALLS)
        wanted = usual if self._most_calls is None else self._most_calls // calls_each
        return max(min(wanted, MOST_EVENTS // events), 1)

    @contextmanager
    def region(self, name: str = "region", *, calls: int = 1) -> Iterator[Found]:
        """Profile a `with` block.

        Args:
            name: Of a trace that is kept.
            calls: That the block makes.

        Raises:
            MeasurementError: The profiler failed or saw nothing, or too much.
        """
        found = Found()
        if is_under_nsys():
            with self._captured():
                yield found
            return
        if not self._is_loaded:
            with self._traced(None):
                pass
        with self._traced(name) as (events, wall_s):
            yield found
        summarise = summary_of_cpu if self._kind == "cpu" else summary_of
        found.summary = summarise(events, calls=calls, wall_s=wall_s[0])

    @contextmanager
    def _traced(self, name: str | None) -> Iterator[tuple[list[Any], list[float]]]:
        """The events of a block and its seconds, both there when it has ended; with a name the trace may be kept."""
        events: list[Any] = []
        wall_s: list[float] = []
        self._synchronize()
        profiler = _started(self._kind)
        was_running = _is_running()
        begin_s = time.perf_counter()
        try:
            yield events, wall_s
            self._synchronize()
        finally:
            wall_s.append(time.perf_counter() - begin_s)
            _stop(profiler, was_running=was_running)
        self._is_loaded = True
        with tempfile.TemporaryDirectory(prefix="gpuperf-") as folder:
            path = _exported(profiler, Path(folder))
            events += read_trace(path)
            if name is not None and self._keep is not None:
                self.traces.append(_kept(path, self._keep, f"{self._label} {name}"))

    def _bracketed(self, call: Call, count: int) -> None:
        for _ in range(count):
            call()
        with self._captured():
            for _ in range(count):
                call()

    @contextmanager
    def _captured(self) -> Iterator[None]:
        """Let nsys, started with --capture-range=cudaProfilerApi, record a block."""
        import torch

        is_gpu = self._kind == "cuda"
        self._synchronize()
        if is_gpu:
            torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
        try:
            yield
            self._synchronize()
        finally:
            if is_gpu:
                torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]


def profile_as_measured(  # noqa: PLR0913 - those of `timing.measure`, and a name
    call: Call,
    *,
    profiler: Profiler,
    stopwatch: Stopwatch,
    mode: Mode | None = None,
    clock: ClockName | None = None,
    prefer: Method | None = None,
    name: str = "calls",
) -> tuple[Timing, KernelSummary | None]:
    """Profile a call the way that `timing.measure` would time it.

    Returns:
        A first look at its time, which is no measurement; and what the profiler saw.

    Raises:
        MeasurementError: The profiler failed or saw nothing.
        UsageError: See `timing.measure`.
    """
    estimate = stopwatch.estimate(call)
    method = choose_method(estimate, stopwatch, mode=mode, clock=clock, prefer=prefer)
    graph = stopwatch.graph(call, GRAPH_CALLS) if method.clock == "cuda-graph" else None
    each = GRAPH_CALLS if graph else 1
    summary = profiler.calls(graph or call, device_s=estimate.device_s * each, calls_each=each, name=name)
    value_s = estimate.device_s
    timing = Timing(value_s=value_s, samples_s=(value_s,), calls_per_sample=1, method=method, spread=0.0)
    return timing, summary


def is_under_nsys() -> bool:
    """Whether nsys watches this process for `gpuperf profile --nsys`."""
    return bool(os.environ.get(NSYS_VARIABLE))


def _started(kind: Literal["cuda", "cpu"]) -> "torch.profiler.profile":
    import torch

    activity = torch.profiler.ProfilerActivity
    try:
        with warnings.catch_warnings(action="ignore"):  # of a cycle's events, which nobody asked for
            profiler = torch.profiler.profile(activities=[activity.CPU if kind == "cpu" else activity.CUDA])
            profiler.start()
    except (RuntimeError, AssertionError) as error:  # the latter where this build of torch has no CUDA
        raise MeasurementError(f"torch's profiler does not start here: {error}.") from None
    return profiler


def _is_running() -> bool:
    import torch

    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]  # noqa: SLF001 - no public way


def _stop(profiler: "torch.profiler.profile", *, was_running: bool) -> None:
    if was_running and not _is_running():  # stopping what is stopped crashes torch 2.13
        raise MeasurementError("Another use of torch's profiler ended this one: it cannot be used within itself.")
    with warnings.catch_warnings(action="ignore"):
        profiler.stop()


def _exported(profiler: "torch.profiler.profile", folder: Path) -> Path:
    """Write the trace, unless it would be a very large one."""
    results = getattr(profiler.profiler, "kineto_results", None)
    count = len(results.events()) if results is not None else 0
    if count > MOST_REGION_EVENTS:
        raise MeasurementError(
            f"The profiler saw {count} events, more than the {MOST_REGION_EVENTS} that are kept. Profile a shorter "
            "region."
        )
    path = folder / "trace.json"
    try:
        profiler.export_chrome_trace(str(path))
    except RuntimeError as error:
        raise MeasurementError(f"torch's profiler could not write its trace: {error}.") from None
    return path


def _kept(path: Path, folder: Path, name: str) -> Path:
    """A compressed copy of a trace, named so that it is a plain file everywhere."""
    target = folder / f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '-', name).strip('-.')[:100] or 'trace'}.trace.json.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keep_trace(path, target)
    except OSError as error:
        raise MeasurementError(
            f"A trace cannot be left in {folder}: {error.strerror}. Make room there, or name another folder."
        ) from None
    return target
