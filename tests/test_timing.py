"""Timing: which method a call gets, when measuring stops, what is said then, and that nothing stays behind."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.records import ClockName, Method, Mode
from pytest_gpuperf.stopwatches import WallStopwatch, stopwatch_of
from pytest_gpuperf.testing import FakeStopwatch
from pytest_gpuperf.timing import (
    CPU_PLANS,
    Call,
    Estimate,
    Plan,
    choose_method,
    measure,
)
from pytest_gpuperf.units import format_percent

COLD = Method(clock="cuda-events", mode="cold")
HOT_GRAPH = Method(clock="cuda-graph", mode="hot")
HOT_EVENTS = Method(clock="cuda-events", mode="hot")
SUSTAINED = Method(clock="cuda-events", mode="sustained")


#: Those of a GPU when this was written: the tests are about the rules, not about the numbers.
PLANS: dict[Mode, Plan] = {
    "sustained": Plan(
        warmup_s=2.0, warmup_limit_s=3.0, measure_s=3.0, measure_limit_s=5.0, precision=0.005, period_s=1.0
    ),
    "cold": Plan(warmup_s=0.3, warmup_limit_s=0.6, measure_s=0.7, measure_limit_s=2.0, precision=0.001),
    "hot": Plan(warmup_s=0.4, warmup_limit_s=1.0, measure_s=0.8, measure_limit_s=2.0, precision=0.002, block_s=0.01),
}


class FixedStopwatch(FakeStopwatch):
    """Believes what it is told, and follows the plans above."""

    plans = PLANS


class WatchfulStopwatch(FixedStopwatch):
    """Notes when a stream of blocks or calls is closed, and how many calls may be queued."""

    def __init__(self, *, noise: float = 0.0) -> None:
        super().__init__(noise=noise)
        self.closed: list[str] = []
        self.batches: list[int] = []

    def blocks(self, call: Call, calls: int) -> Generator[float, None, None]:
        try:
            yield from super().blocks(call, calls)
        finally:
            self.closed.append("blocks")

    def singles(self, call: Call, batch: int) -> Generator[float, None, None]:
        self.batches.append(batch)
        try:
            yield from super().singles(call, batch)
        finally:
            self.closed.append("singles")


class GraphlessStopwatch(FixedStopwatch):
    """Has events, but this callable cannot be captured."""

    def graph(self, call: Call, calls: int) -> Call | None:
        return None


class SlowHostStopwatch(FixedStopwatch):
    """The host needs `host_s` for each launch."""

    def __init__(self, host_s: float, *, noise: float = 0.0) -> None:
        super().__init__(noise=noise)
        self._host_s = host_s

    def estimate(self, call: Call) -> Estimate:
        return Estimate(device_s=super().estimate(call).device_s, host_s=self._host_s)


def chosen(
    device_s: float,
    *,
    mode: Mode | None = None,
    clock: ClockName | None = None,
    prefer: Method | None = None,
) -> Method:
    estimate = Estimate(device_s=device_s, host_s=0.0)
    return choose_method(estimate, FixedStopwatch(), mode=mode, clock=clock, prefer=prefer)


def fails_at(number: int, seconds: float = 1e-3) -> Callable[[], float]:
    """A call that works until its `number`th time."""
    count = itertools.count(1)

    def call() -> float:
        if next(count) >= number:
            raise ZeroDivisionError("the kernel's own error")
        return seconds

    return call


def repeating(*seconds: float) -> Callable[[], float]:
    return itertools.cycle(seconds).__next__


@pytest.fixture
def garbage_collection() -> Iterator[None]:
    """Leave it on, whatever the test does."""
    gc.enable()
    yield
    gc.enable()


# Choice of the method


def test_a_short_call_is_replayed_as_a_graph() -> None:
    assert chosen(20e-6) == HOT_GRAPH


def test_a_long_call_is_measured_cold_by_events() -> None:
    assert chosen(2e-3) == COLD


def test_fifty_microseconds_are_long() -> None:
    assert chosen(50e-6) == COLD
    assert chosen(49.9e-6) == HOT_GRAPH


@pytest.mark.parametrize("device_s", [5e-6, 2e-3])
@pytest.mark.parametrize("mode", ["sustained", "cold", "hot"])
def test_the_mode_that_was_named_wins(device_s: float, mode: Mode) -> None:
    assert chosen(device_s, mode=mode).mode == mode


@pytest.mark.parametrize("mode", ["sustained", "hot"])
def test_short_calls_in_a_row_are_replayed_as_a_graph_and_long_ones_are_not(mode: Mode) -> None:
    assert chosen(20e-6, mode=mode).clock == "cuda-graph"
    assert chosen(2e-3, mode=mode).clock == "cuda-events"


def test_cold_calls_are_never_in_a_graph_however_short() -> None:
    assert chosen(5e-6, mode="cold") == COLD


def test_events_that_were_named_win_for_a_short_call() -> None:
    assert chosen(5e-6, clock="cuda-events") == HOT_EVENTS


@pytest.mark.parametrize("mode", ["sustained", "hot"])
def test_a_graph_that_was_named_wins_for_a_long_call(mode: Mode) -> None:
    assert chosen(2e-3, mode=mode, clock="cuda-graph") == Method(clock="cuda-graph", mode=mode)


def test_a_graph_that_was_named_wins_for_a_long_call_without_a_mode() -> None:
    assert chosen(2e-3, clock="cuda-graph").clock == "cuda-graph"


def test_a_graph_that_was_named_wins_over_a_cold_baseline() -> None:
    assert chosen(30e-6, clock="cuda-graph", prefer=COLD).clock == "cuda-graph"


def test_a_cold_graph_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        chosen(5e-6, mode="cold", clock="cuda-graph")
    assert str(error.value) == "mode='cold' times single calls and cannot use clock='cuda-graph'. Drop one of them."


@pytest.mark.parametrize(
    ("device_s", "prefer"), [(52e-6, HOT_GRAPH), (199e-6, HOT_GRAPH), (48e-6, COLD), (13e-6, COLD)]
)
def test_the_method_of_the_baseline_is_kept_near_the_limit(device_s: float, prefer: Method) -> None:
    assert chosen(device_s, prefer=prefer) == prefer


@pytest.mark.parametrize(("device_s", "prefer", "own"), [(201e-6, HOT_GRAPH, COLD), (12e-6, COLD, HOT_GRAPH)])
def test_the_method_of_the_baseline_is_given_up_beyond_a_factor_of_four(
    device_s: float, prefer: Method, own: Method
) -> None:
    assert chosen(device_s, prefer=prefer) == own


def test_what_was_named_wins_over_the_baseline() -> None:
    assert chosen(52e-6, mode="sustained", prefer=HOT_GRAPH).mode == "sustained"
    assert chosen(52e-6, mode="cold", prefer=HOT_GRAPH) == COLD
    assert chosen(48e-6, clock="cuda-events", prefer=HOT_GRAPH) == HOT_EVENTS


def test_the_method_of_a_recorded_baseline_is_not_one_to_measure_by() -> None:
    assert chosen(52e-6, prefer=Method(clock="wall", mode="recorded")) == COLD


@pytest.mark.parametrize("mode", ["burst", "recorded", ""])
def test_a_mode_that_does_not_exist_is_refused(mode: Mode) -> None:
    with pytest.raises(UsageError) as error:
        chosen(1e-3, mode=mode)
    assert str(error.value) == f"mode={mode!r} cannot be measured. Valid: cold, hot, sustained."


def test_a_graph_that_was_named_keeps_the_mode_of_a_baseline_in_a_graph() -> None:
    sustained = Method(clock="cuda-graph", mode="sustained")
    assert chosen(2e-3, clock="cuda-graph", prefer=sustained) == sustained
    assert chosen(2e-3, clock="cuda-graph", prefer=COLD) == HOT_GRAPH


def test_a_clock_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        chosen(1e-3, clock="wall")
    assert str(error.value) == "clock='wall' does not exist on this device. Valid: cuda-events, cuda-graph."


def test_a_cpu_has_its_wall_clock_alone() -> None:
    estimate = Estimate(device_s=5e-6, host_s=5e-6)
    with pytest.raises(UsageError, match=r"^clock='cuda-graph' does not exist on this device\. Valid: wall\.$"):
        choose_method(estimate, WallStopwatch(), mode=None, clock="cuda-graph", prefer=None)
    assert choose_method(estimate, WallStopwatch(), mode=None, clock=None, prefer=HOT_GRAPH).clock == "wall"


def test_the_stopwatch_of_a_cpu_is_the_wall_clock() -> None:
    assert stopwatch_of("cpu", 0).clock == "wall"
    assert stopwatch_of("cpu", 0).plans is CPU_PLANS


# The value


@settings(max_examples=30, deadline=None)
@given(seconds=st.floats(1e-3, 2.0), mode=st.sampled_from(["sustained", "cold", "hot"]))
def test_a_steady_call_takes_what_it_takes(seconds: float, mode: Mode) -> None:
    timing = measure(lambda: seconds, stopwatch=FixedStopwatch(), mode=mode)
    assert timing.value_s == pytest.approx(seconds, rel=1e-9)
    assert timing.unstable is None


def test_the_time_of_a_call_in_a_graph_is_that_of_one_call() -> None:
    timing = measure(lambda: 5e-6, stopwatch=FixedStopwatch())
    assert timing.method == HOT_GRAPH
    assert timing.value_s == pytest.approx(5e-6)
    assert timing.calls_per_sample == 2000  # blocks of 10 ms, in replays of 200 calls


@pytest.mark.parametrize("seconds", [1e-6, 1.3e-6, 5e-6, 40e-6])
def test_a_graph_has_the_same_length_whatever_a_call_takes(seconds: float) -> None:
    lengths: list[int] = []

    class Recording(FixedStopwatch):
        def graph(self, call: Call, calls: int) -> Call | None:
            lengths.append(calls)
            return super().graph(call, calls)

    measure(lambda: seconds, stopwatch=Recording())
    assert lengths == [200]


def test_samples_are_seconds_per_call() -> None:
    timing = measure(lambda: 2e-3, stopwatch=FixedStopwatch(), mode="sustained")
    assert timing.calls_per_sample == 25  # blocks of 50 ms
    assert timing.samples_s == pytest.approx([2e-3] * len(timing.samples_s))


def test_bimodal_calls_have_a_mean_when_sustained_and_a_median_when_cold() -> None:
    bimodal = [repeating(1e-3, 1e-3, 1e-3, 2e-3, 2e-3) for _ in range(2)]
    sustained = measure(bimodal[0], stopwatch=FixedStopwatch(), mode="sustained")
    cold = measure(bimodal[1], stopwatch=FixedStopwatch(), mode="cold")
    assert sustained.value_s == pytest.approx(1.4e-3, rel=0.03)
    assert cold.value_s == 1e-3


@pytest.mark.parametrize("phase", [0.0, 0.25, 0.5, 0.75])
def test_a_swing_of_one_period_is_averaged_out_wherever_it_begins(phase: float) -> None:
    stopwatch = FixedStopwatch()
    timing = measure(
        lambda: 1e-3 * (1 + 0.06 * math.sin(2 * math.pi * (stopwatch.now() + phase))),
        stopwatch=stopwatch,
        mode="sustained",
    )
    assert timing.value_s == pytest.approx(1e-3 * math.sqrt(1 - 0.06**2), rel=0.004)
    assert timing.unstable is None


def test_the_spread_of_noise_is_about_its_size() -> None:
    timing = measure(lambda: 1e-3, stopwatch=FixedStopwatch(noise=0.01), mode="cold")
    count = len(timing.samples_s)
    assert timing.spread == pytest.approx(1.96 * 1.2533 * 0.01 / count**0.5, rel=0.5)  # of a median of normal samples


# When to stop


@pytest.mark.parametrize("mode", ["sustained", "cold", "hot"])
def test_a_precise_value_stops_at_the_least_time(mode: Mode) -> None:
    stopwatch, plan = FixedStopwatch(), PLANS[mode]
    timing = measure(lambda: 1e-3, stopwatch=stopwatch, mode=mode)
    assert stopwatch.now() == pytest.approx(plan.warmup_s + plan.measure_s, abs=3 * plan.block_s)
    assert sum(timing.samples_s) * timing.calls_per_sample >= plan.measure_s
    assert timing.spread <= plan.precision


@pytest.mark.parametrize("mode", ["sustained", "cold", "hot"])
def test_a_noisy_value_goes_on_to_the_limit_and_says_that_it_is_unstable(mode: Mode) -> None:
    stopwatch, plan = FixedStopwatch(noise=0.3), PLANS[mode]
    timing = measure(lambda: 1e-3, stopwatch=stopwatch, mode=mode)
    measured_s = stopwatch.now() - plan.warmup_limit_s
    assert plan.measure_limit_s - (plan.warmup_limit_s - plan.warmup_s) <= measured_s
    assert measured_s <= plan.measure_limit_s + plan.period_s
    assert timing.unstable is not None
    assert timing.unstable.startswith("still uncertain by ")
    assert timing.unstable.endswith(f"wanted {format_percent(plan.precision)}")


def test_a_value_that_becomes_precise_in_time_stops_before_the_limit() -> None:
    plan = PLANS["hot"]
    stopwatch = FixedStopwatch(noise=0.01)
    timing = measure(lambda: 1e-3, stopwatch=stopwatch, mode="hot")
    assert timing.unstable is None
    assert timing.spread <= plan.precision
    assert plan.warmup_s + plan.measure_s + plan.period_s / 2 < stopwatch.now()
    assert stopwatch.now() < plan.warmup_limit_s + plan.measure_limit_s - plan.period_s


def test_a_very_long_call_is_measured_three_times_at_least() -> None:
    assert len(measure(lambda: 10.0, stopwatch=FixedStopwatch(), mode="cold").samples_s) == 3


def test_warming_up_ends_when_two_periods_agree() -> None:
    stopwatch, plan = FixedStopwatch(), PLANS["sustained"]
    slow_s = 0.6  # so that the seconds from 0.6 s and from 1.6 s are the first two that agree
    timing = measure(lambda: 1e-3 if stopwatch.now() > slow_s else 1.3e-3, stopwatch=stopwatch, mode="sustained")
    assert timing.unstable is None
    assert timing.value_s == pytest.approx(1e-3)
    assert stopwatch.now() - plan.measure_s == pytest.approx(slow_s + 2 * plan.period_s, abs=0.15)


def test_warming_up_that_never_settles_is_reported() -> None:
    stopwatch = FixedStopwatch()
    timing = measure(
        lambda: 1e-3 * (1 + 0.05 * min(stopwatch.now(), 3.0)), stopwatch=stopwatch, mode="sustained"
    )  # 5 % a second, until the warm-up is over
    assert timing.unstable == "still drifting by 4.7 % after 3.0 s of warm-up"


def test_a_drift_under_one_percent_is_none() -> None:
    stopwatch = FixedStopwatch()
    timing = measure(lambda: 1e-3 * (1 + 0.005 * min(stopwatch.now(), 2.0)), stopwatch=stopwatch, mode="sustained")
    assert timing.unstable is None


# What goes wrong


@pytest.mark.parametrize("seconds", [0.0, 1e-7])
def test_a_call_that_returns_at_once_is_refused(seconds: float) -> None:
    with pytest.raises(
        MeasurementError, match=r"^The callable did no work that the clock can see: .*s a call\. Does it"
    ):
        measure(lambda: seconds, stopwatch=FixedStopwatch())


def test_a_call_that_raises_at_once_lets_its_error_through() -> None:
    with pytest.raises(ZeroDivisionError, match="the kernel's own error"):
        measure(fails_at(1), stopwatch=FixedStopwatch())


@pytest.mark.parametrize(("mode", "stream"), [("sustained", "blocks"), ("cold", "singles"), ("hot", "blocks")])
@pytest.mark.parametrize("number", [2, 5, 70])
def test_a_call_that_raises_later_lets_its_error_through_and_the_stream_is_closed(
    mode: Mode, stream: str, number: int
) -> None:
    stopwatch = WatchfulStopwatch()
    with pytest.raises(ZeroDivisionError, match="the kernel's own error"):
        measure(fails_at(number), stopwatch=stopwatch, mode=mode)
    assert stopwatch.closed == [stream]


@pytest.mark.parametrize(("mode", "stream"), [("sustained", "blocks"), ("cold", "singles")])
def test_the_stream_is_closed_after_measuring(mode: Mode, stream: str) -> None:
    stopwatch = WatchfulStopwatch()
    measure(lambda: 1e-3, stopwatch=stopwatch, mode=mode)
    assert stopwatch.closed == [stream]


def test_a_call_that_cannot_be_captured_is_measured_by_events() -> None:
    timing = measure(lambda: 20e-6, stopwatch=GraphlessStopwatch())
    assert timing.method == HOT_EVENTS
    assert timing.value_s == pytest.approx(20e-6)


def test_a_call_that_cannot_be_captured_is_an_error_if_a_graph_was_asked_for() -> None:
    with pytest.raises(MeasurementError) as error:
        measure(lambda: 20e-6, stopwatch=GraphlessStopwatch(), clock="cuda-graph")
    assert str(error.value) == ("The callable cannot be captured in a CUDA graph: it synchronises or uses the host.")


@pytest.mark.usefixtures("garbage_collection")
@pytest.mark.parametrize("mode", ["sustained", "cold"])
def test_garbage_is_not_collected_while_measuring_and_is_again_afterwards(mode: Mode) -> None:
    seen: list[bool] = []

    def call() -> float:
        seen.append(gc.isenabled())
        return 1e-3

    measure(call, stopwatch=FixedStopwatch(), mode=mode)
    assert seen == [True, *[False] * (len(seen) - 1)]  # the estimate comes first
    assert gc.isenabled()


@pytest.mark.usefixtures("garbage_collection")
def test_garbage_is_collected_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        measure(fails_at(5), stopwatch=FixedStopwatch(), mode="cold")
    assert gc.isenabled()


@pytest.mark.usefixtures("garbage_collection")
def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    measure(lambda: 1e-3, stopwatch=FixedStopwatch())
    assert not gc.isenabled()


def test_a_call_that_waits_for_the_host_is_said_to_be_host_bound() -> None:
    timing = measure(lambda: 1e-3, stopwatch=SlowHostStopwatch(0.95e-3), mode="sustained")
    assert timing.unstable == "host-bound: the CPU needs 950.0 us to launch what the GPU does in 1.000 ms"


def test_a_host_that_is_quick_enough_is_not_mentioned() -> None:
    assert measure(lambda: 1e-3, stopwatch=SlowHostStopwatch(0.85e-3), mode="sustained").unstable is None


def test_a_graph_is_not_host_bound() -> None:
    assert measure(lambda: 20e-6, stopwatch=SlowHostStopwatch(1e-3)).unstable is None


def test_a_host_bound_call_that_is_uncertain_says_both() -> None:
    timing = measure(lambda: 1e-3, stopwatch=SlowHostStopwatch(0.99e-3, noise=0.3), mode="sustained")
    assert timing.unstable is not None
    assert "host-bound" in timing.unstable
    assert "still uncertain" in timing.unstable


# The wall clock


def test_the_wall_clock_measures_a_sleep() -> None:
    timing = measure(lambda: time.sleep(0.002), stopwatch=WallStopwatch(), mode="hot")
    assert timing.method == Method(clock="wall", mode="hot")
    assert timing.value_s == pytest.approx(0.0025, rel=0.5)


def test_the_wall_clock_measures_single_cold_calls() -> None:
    stopwatch = WallStopwatch()
    stopwatch.flush_bytes = 2**20
    timing = measure(lambda: time.sleep(0.002), stopwatch=stopwatch)
    assert timing.method == Method(clock="wall", mode="cold")
    assert timing.calls_per_sample == 1
    assert timing.value_s == pytest.approx(0.0025, rel=0.5)


@pytest.mark.parametrize("mode", ["sustained", "cold", "hot"])
def test_the_wall_clock_reports_a_median_that_interruptions_do_not_move(mode: Mode) -> None:
    waits = repeating(*[0.001] * 59, 0.1)  # less than one in two blocks of 20 calls
    stopwatch = WallStopwatch()
    stopwatch.flush_bytes = 2**20
    timing = measure(lambda: time.sleep(waits()), stopwatch=stopwatch, mode=mode)
    assert timing.value_s < 0.002


@pytest.mark.parametrize(("seconds", "batch"), [(20e-3, 2), (1e-3, 10), (1.0, 1)])
def test_cold_calls_are_queued_in_batches_of_fifty_milliseconds_and_ten_calls_at_most(
    seconds: float, batch: int
) -> None:
    stopwatch = WatchfulStopwatch()
    measure(lambda: seconds, stopwatch=stopwatch, mode="cold")
    assert stopwatch.batches == [batch]


def test_a_cpu_has_no_graphs() -> None:
    assert WallStopwatch().graph(lambda: None, 10) is None
