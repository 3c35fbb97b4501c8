"""The profiler over calls and regions: how many, how large, what is kept, what fails; of torch's operators here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_gpuperf import profiling
from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.kernels import read_trace
from pytest_gpuperf.profiling import NSYS_VARIABLE, TorchProfiler, profile_as_measured
from pytest_gpuperf.records import KernelSummary
from pytest_gpuperf.stopwatches import WallStopwatch
from pytest_gpuperf.testing import FakeProfiler, FakeStopwatch
from pytest_gpuperf.timing import GRAPH_CALLS

torch = pytest.importorskip("torch")


class Work:
    """One operator, and how often it was called."""

    def __init__(self) -> None:
        self.count = 0
        self._one = torch.ones(8)

    def __call__(self) -> object:
        """Add."""
        self.count += 1
        return torch.add(self._one, self._one)


def test_a_call_is_profiled_as_often_as_it_says() -> None:
    work = Work()
    summary = TorchProfiler("cpu", most_calls=7).calls(work, device_s=1e-6)
    assert summary is not None
    assert [(use.name, use.count) for use in summary.kernels] == [("aten::add", 1)]
    assert summary.calls == 7
    assert work.count == 1 + 7 + 7, "one to load the profiler, and as many to warm up"


def test_long_calls_are_profiled_less_often() -> None:
    """0.3 s of work."""
    summary = TorchProfiler("cpu").calls(Work(), device_s=0.1)
    assert summary is not None
    assert summary.calls == 2


def test_calls_that_leave_many_events_are_profiled_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "MOST_EVENTS", 100)
    work = Work()
    summary = TorchProfiler("cpu").calls(lambda: [work() for _ in range(20)], device_s=1e-6)
    assert summary is not None
    assert 1 <= summary.calls <= 5
    assert summary.kernels[0].count == 20


def test_a_number_of_calls_that_is_asked_for_is_made() -> None:
    """However long they take; of a graph as many as come next below."""
    summary = TorchProfiler("cpu", most_calls=9).calls(Work(), device_s=10.0, calls_each=4)
    assert summary is not None
    assert summary.calls == 8


def test_a_region_is_one_call() -> None:
    with TorchProfiler("cpu").region() as found:
        for _ in range(5):
            torch.relu(torch.ones(3))
    assert found.summary is not None
    assert found.summary.calls == 1
    assert {use.name: use.count for use in found.summary.kernels}["aten::relu"] == 5
    assert found.summary.wall_s > found.summary.busy_s > 0


def test_a_region_without_an_operator_says_so() -> None:
    with pytest.raises(MeasurementError, match="saw no operator of torch in 1 calls"), TorchProfiler("cpu").region():
        pass


def test_an_error_of_the_users_goes_through_and_the_profiler_stops() -> None:
    profiler = TorchProfiler("cpu")
    with pytest.raises(ZeroDivisionError), profiler.region():
        _ = 1 / 0
    assert profiler.calls(Work(), device_s=0.1) is not None


class Broken:
    """A profiler on a machine whose driver refuses it."""

    def __init__(self, **_: object) -> None: ...

    def start(self) -> None:
        """Fail as torch does."""
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")


def test_a_profiler_that_does_not_start_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Broken)
    with pytest.raises(MeasurementError, match=r"profiler does not start here: CUPTI_ERROR_NOT_INITIALIZED\."):
        TorchProfiler("cpu").calls(Work(), device_s=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_is_an_error_of_ours() -> None:
    with pytest.raises(MeasurementError, match="profiler does not start here"), TorchProfiler("cuda").region():
        pass


def test_a_profiler_within_a_profiler_is_an_error_and_no_crash() -> None:
    """As where a test profiles by itself, within a region."""
    with pytest.raises(MeasurementError, match="cannot be used within itself"), TorchProfiler("cpu").region():
        torch.profiler.profile().__enter__().__exit__(None, None, None)


def test_a_region_that_leaves_too_much_is_refused_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "MOST_REGION_EVENTS", 10)
    work = Work()
    refused = pytest.raises(
        MeasurementError, match=r"saw \d+ events, more than the 10 that are kept\. Profile a shorter"
    )
    with refused, TorchProfiler("cpu").region():
        _ = [work() for _ in range(50)]


def test_traces_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    """Under a name that is a plain file everywhere; the one that warms up is not."""
    profiler = TorchProfiler("cpu", keep=tmp_path / "traces", label="test_a[x/../y]", most_calls=3)
    profiler.calls(Work(), device_s=1e-6, name="time")
    [trace] = profiler.traces
    assert trace == tmp_path / "traces" / "test_a-x-..-y-time.trace.json.gz"
    assert list((tmp_path / "traces").iterdir()) == [trace]
    assert sum(event.name == "aten::add" for event in read_trace(trace)) == 3


def test_a_trace_that_cannot_be_kept_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MeasurementError, match=r"A trace cannot be left in .*file: .* Make room"):
        TorchProfiler("cpu", keep=tmp_path / "file").calls(Work(), device_s=0.1)


def test_what_is_left_elsewhere_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    TorchProfiler("cpu").calls(Work(), device_s=0.1)
    assert list(tmp_path.iterdir()) == []


def test_the_devices_are_waited_for_before_and_after() -> None:
    waits: list[int] = []
    work = Work()
    with TorchProfiler("cpu", synchronize=lambda: waits.append(work.count)).region():
        work()
    assert waits[0] == 0
    assert waits[-1] == 1


def test_beside_nsys_no_other_profiler_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(NSYS_VARIABLE, "1")
    work = Work()
    profiler = TorchProfiler("cpu", keep=tmp_path, most_calls=4)
    assert profiler.calls(work, device_s=1e-6) is None
    with profiler.region() as found:
        work()
    assert found.summary is None
    assert work.count == 4 + 4 + 1
    assert list(tmp_path.iterdir()) == []


class Watched(FakeProfiler):
    """Notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.each: list[int] = []

    def calls(
        self, call: Callable[[], object], *, device_s: float, calls_each: int = 1, name: str = "calls"
    ) -> KernelSummary:
        """Note, and see a kernel."""
        self.each.append(calls_each)
        return super().calls(call, device_s=device_s, calls_each=calls_each, name=name)


@pytest.mark.parametrize(("device_s", "each"), [(1e-5, GRAPH_CALLS), (1e-3, 1)])
def test_what_is_profiled_is_what_is_measured(device_s: float, each: int) -> None:
    """A short call as a graph of many, as `measure` times it."""
    profiler = Watched()
    timing, summary = profile_as_measured(lambda: device_s, profiler=profiler, stopwatch=FakeStopwatch())
    assert profiler.each == [each]
    assert timing.method.clock == ("cuda-graph" if each > 1 else "cuda-events")
    assert summary is not None
    assert summary.span_s == pytest.approx(device_s)
    assert timing.value_s == pytest.approx(device_s)


def test_the_whole_way_on_a_cpu() -> None:
    timing, summary = profile_as_measured(
        Work(), profiler=TorchProfiler("cpu", most_calls=5), stopwatch=WallStopwatch()
    )
    assert timing.method.clock == "wall"
    assert summary is not None
    assert summary.kernels[0].name == "aten::add"
