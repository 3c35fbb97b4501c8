"""Clocks, warm-up and the rule when to stop: how the time of one call becomes one value.

Two statistics, never compared with each other. *sustained* and *hot* time blocks of back-to-back calls and report total
time over total calls: the power controller makes single calls bimodal and their median jumps between the modes, the
mean does not. *cold* times single calls, each after the caches were flushed, and reports their median. By wall clock
both report a median: what the operating system does in between only ever adds time.
"""

import contextlib
import gc
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import msgspec

from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.records import ClockName, Method, Mode, Record
from pytest_gpuperf.stats import Interval, mean_interval, median_interval, relative_half_width
from pytest_gpuperf.units import format_percent, format_value

Call = Callable[[], object]

#: Shorter calls are replayed as a CUDA graph: below this the host's launch rate is what events would measure.
GRAPH_BELOW_S = 50e-6
#: Calls in a graph, whatever their time: an H100 takes 1.00 µs for an add in a graph of 200 and 1.17 µs in one of 400
#: to 2000 (benchmarks/RESULTS.md), so a length that followed the host's launch rate would be measured with it.
GRAPH_CALLS = 200
#: A baseline's clock is kept as long as the call is within this factor of the limit, so that a kernel of 49 to 51 µs
#: does not change its method, and with it its identity, from run to run.
KEEP_CLOCK_FACTOR = 4.0
#: An empty kernel takes about a microsecond; what is quicker than this did no work.
NO_WORK_BELOW_S = 2e-7


class Plan(Record, frozen=True, kw_only=True):
    """When to stop warming up and when to stop measuring.

    Attributes:
        warmup_s: Least warm-up.
        warmup_limit_s: Most, if the time per call is still falling or rising.
        measure_s: Least time of measuring.
        measure_limit_s: Most; reached without `precision`, the result is marked unstable.
        precision: Half-width of the value's 95 % interval to reach, as a fraction of it.
        block_s: Length of one timed block.
        period_s: Length of the batches that the interval is built from, and that tell whether the time still drifts.
    """

    warmup_s: float
    warmup_limit_s: float
    measure_s: float
    measure_limit_s: float
    precision: float
    block_s: float = 0.05
    period_s: float = 0.1


_SUSTAINED = Plan(warmup_s=2.0, warmup_limit_s=3.0, measure_s=3.0, measure_limit_s=4.0, precision=0.005, period_s=1.0)
_COLD = Plan(warmup_s=0.3, warmup_limit_s=0.6, measure_s=0.7, measure_limit_s=2.0, precision=0.001)
_HOT = Plan(warmup_s=0.4, warmup_limit_s=1.0, measure_s=0.8, measure_limit_s=2.0, precision=0.002, block_s=0.01)
#: Under a large GEMM the power controller of an H100 swings the clock by ±6 %, once a second, damped slowly.
#: Whole seconds average it out: means of 3 s repeat within 0.4 %, where the median of the calls moves by 4 %.
GPU_PLANS: dict[Mode, Plan] = {"sustained": _SUSTAINED, "cold": _COLD, "hot": _HOT}
_CPU_PLAN = Plan(warmup_s=0.2, warmup_limit_s=0.5, measure_s=0.5, measure_limit_s=1.5, precision=0.02, block_s=0.02)
CPU_PLANS: dict[Mode, Plan] = dict.fromkeys(("sustained", "cold", "hot"), _CPU_PLAN)


class Estimate(Record, frozen=True, kw_only=True):
    """First look at a call: seconds on the device, and seconds that the host needs to launch it."""

    device_s: float
    host_s: float


class Timing(Record, frozen=True, kw_only=True):
    """Result of `measure`.

    Attributes:
        value_s: Seconds per call: mean over the blocks, or median of the single calls.
        samples_s: Seconds per call of each block, in order.
        calls_per_sample: Calls in a block.
        method: Clock and mode.
        spread: Half the 95 % interval of the value, as a fraction of it.
        unstable: Why the value had not settled; `None` if it had.
    """

    value_s: float
    samples_s: tuple[float, ...]
    calls_per_sample: int
    method: Method
    spread: float
    unstable: str | None = None


class Stopwatch(Protocol):
    """The clock of one device."""

    clock: ClockName
    plans: dict[Mode, Plan]

    def now(self) -> float:
        """Seconds on the host, for warm-up and limits."""
        ...

    def estimate(self, call: Call) -> Estimate:
        """Compile, allocate, leave the idle clocks behind, and time a few calls."""
        ...

    def blocks(self, call: Call, calls: int) -> Generator[float, None, None]:
        """Seconds of one block of `calls` back-to-back calls after another, for ever, the device never idle."""
        ...

    def singles(self, call: Call, batch: int) -> Generator[float, None, None]:
        """Seconds of one cold call after another, for ever; `batch` calls may be queued at a time."""
        ...

    def graph(self, call: Call, calls: int) -> Call | None:
        """Many calls as one replayable call, or `None` where the device or the callable cannot."""
        ...


def measure(
    call: Call,
    *,
    stopwatch: Stopwatch,
    mode: Mode | None = None,
    clock: ClockName | None = None,
    prefer: Method | None = None,
) -> Timing:
    """Measure the time of one call.

    Args:
        call: Takes no arguments; its work goes to the current stream of the device.
        stopwatch: The device's clock.
        mode: `None`: cold for calls of 50 µs and more, hot for shorter ones.
        clock: `None`: a CUDA graph for calls under 50 µs that are not measured cold, else events.
        prefer: The baseline's method, kept as long as the call's time is within a factor 4 of the limit.

    Raises:
        MeasurementError: The call did no work that this clock can see.
        UsageError: The mode or clock does not exist here.
    """
    estimate = stopwatch.estimate(call)
    if estimate.device_s < NO_WORK_BELOW_S:
        raise MeasurementError(
            f"The callable did no work that the clock can see: {format_value(estimate.device_s, 's')} a call. "
            "Does it return a cached result, work on another device, or only define a function?"
        )
    method = choose_method(estimate, stopwatch, mode=mode, clock=clock, prefer=prefer)
    plan = stopwatch.plans[method.mode]
    if method.mode == "cold":
        batch = min(max(int(0.05 / estimate.device_s), 1), 10)
        return _follow(stopwatch.singles(call, batch), calls=1, method=method, plan=plan, stopwatch=stopwatch)
    call_s, calls_per_replay, replay = estimate.device_s, 1, call
    if method.clock == "cuda-graph":
        calls_per_replay = GRAPH_CALLS
        captured = stopwatch.graph(call, calls_per_replay)
        if captured is None and clock == "cuda-graph":
            raise MeasurementError("The callable cannot be captured in a CUDA graph: it synchronises or uses the host.")
        if captured is None:
            method, calls_per_replay = Method(clock=stopwatch.clock, mode=method.mode), 1
        replay = captured or call
    replays = max(int(plan.block_s / (call_s * calls_per_replay)), 1)
    timing = _follow(
        stopwatch.blocks(replay, replays),
        calls=replays * calls_per_replay,
        method=method,
        plan=plan,
        stopwatch=stopwatch,
    )
    return _with_host_bound(timing, estimate) if method.clock == "cuda-events" else timing


def _with_host_bound(timing: Timing, estimate: Estimate) -> Timing:
    if estimate.host_s <= 0.9 * timing.value_s:
        return timing
    note = (
        f"host-bound: the CPU needs {format_value(estimate.host_s, 's')} to launch "
        f"what the GPU does in {format_value(estimate.device_s, 's')}"
    )
    return msgspec.structs.replace(timing, unstable="; ".join(filter(None, (note, timing.unstable))))


def choose_method(
    estimate: Estimate,
    stopwatch: Stopwatch,
    *,
    mode: Mode | None,
    clock: ClockName | None,
    prefer: Method | None,
) -> Method:
    """Choose clock and mode for a call; what the user named wins, then the baseline's method, then the call's time.

    Raises:
        UsageError: A mode that cannot be measured, or a clock that this device does not have.
    """
    has_graphs = stopwatch.clock == "cuda-events"
    available = ("cuda-events", "cuda-graph") if has_graphs else (stopwatch.clock,)
    if mode is not None and mode not in stopwatch.plans:
        raise UsageError(f"mode={mode!r} cannot be measured. Valid: {', '.join(sorted(stopwatch.plans))}.")
    if clock is not None and clock not in available:
        raise UsageError(f"clock={clock!r} does not exist on this device. Valid: {', '.join(available)}.")
    if clock == "cuda-graph" and mode == "cold":
        raise UsageError("mode='cold' times single calls and cannot use clock='cuda-graph'. Drop one of them.")
    if clock == "cuda-graph" and mode is None:
        mode = prefer.mode if prefer and prefer.clock == "cuda-graph" else "hot"
    near = GRAPH_BELOW_S / KEEP_CLOCK_FACTOR <= estimate.device_s <= GRAPH_BELOW_S * KEEP_CLOCK_FACTOR
    if prefer and near and prefer.clock in available and prefer.mode in stopwatch.plans:
        mode, clock = mode or prefer.mode, clock or prefer.clock
    is_short = has_graphs and estimate.device_s < GRAPH_BELOW_S
    mode = mode or ("hot" if is_short else "cold")
    if clock is None or mode == "cold":
        clock = "cuda-graph" if is_short and mode != "cold" else stopwatch.clock
    return Method(clock=clock, mode=mode)


def _follow(
    stream: Generator[float, None, None], *, calls: int, method: Method, plan: Plan, stopwatch: Stopwatch
) -> Timing:
    """Warm up on the stream of blocks until it settles, then measure on the same stream until it is precise enough."""
    with contextlib.closing(stream), _no_garbage_collection():
        drift = _warm_up(stream, plan, stopwatch)
        samples_s, interval = _sample(stream, calls, method, plan, stopwatch)
    spread = relative_half_width(interval)
    note = None
    if spread > plan.precision:
        note = f"still uncertain by {format_percent(spread)}, wanted {format_percent(plan.precision)}"
    elif drift is not None:
        note = f"still drifting by {format_percent(drift)} after {plan.warmup_limit_s:.1f} s of warm-up"
    return Timing(
        value_s=interval.centre,
        samples_s=tuple(samples_s),
        calls_per_sample=calls,
        method=method,
        spread=spread,
        unstable=note,
    )


def _warm_up(stream: Generator[float, None, None], plan: Plan, stopwatch: Stopwatch) -> float | None:
    """Run on until two periods in a row agree within 1 %; return what still separates them if they never do."""
    start_s = stopwatch.now()
    seen: list[tuple[float, float]] = []
    drift = None
    while (elapsed_s := stopwatch.now() - start_s) < plan.warmup_limit_s:
        seen.append((elapsed_s, next(stream)))
        if elapsed_s >= plan.warmup_s:
            drift = _drift(seen, elapsed_s, plan.period_s)
            if drift is not None and drift < 0.01:
                return None
    return drift


def _drift(seen: list[tuple[float, float]], elapsed_s: float, period_s: float) -> float | None:
    """Difference between the last period's mean and the one before, as a fraction."""
    last = [block_s for at_s, block_s in seen if at_s > elapsed_s - period_s]
    before = [block_s for at_s, block_s in seen if elapsed_s - 2 * period_s < at_s <= elapsed_s - period_s]
    if not last or not before:
        return None
    return abs(sum(last) / len(last) / (sum(before) / len(before)) - 1)


def _sample(
    stream: Generator[float, None, None], calls: int, method: Method, plan: Plan, stopwatch: Stopwatch
) -> tuple[list[float], Interval]:
    """Collect samples until the value's interval is narrow enough or the time is up."""
    samples_s: list[float] = []
    start_s = stopwatch.now()
    check_s = plan.measure_s
    while True:
        samples_s.append(next(stream) / calls)
        elapsed_s = stopwatch.now() - start_s
        if elapsed_s < check_s or len(samples_s) < 3:
            continue
        interval = _interval(samples_s, method, periods=elapsed_s / plan.period_s)
        if elapsed_s >= plan.measure_limit_s or relative_half_width(interval) <= plan.precision:
            return samples_s, interval
        check_s = min(elapsed_s + plan.period_s, plan.measure_limit_s)


def _interval(samples_s: list[float], method: Method, periods: float) -> Interval:
    if method.mode == "cold" or method.clock == "wall":
        return median_interval(samples_s)
    return mean_interval(samples_s, batches=min(max(round(periods), 2), 10))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
