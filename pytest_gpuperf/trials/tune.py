"""Find a faster configuration of vLLM: a fresh engine a point, then the best against the default in pairs.

One factor at a time from vLLM's own defaults, then the best level of each together. The fastest of many points is
flattered by its own noise, so the gain is not read from the points: default and best are started again in turns,
A B B A, and the gain is that of the pairs, with its interval (`trials.paired`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Literal, Protocol

from msgspec.structs import replace

from pytest_gpuperf.errors import EngineError, EngineOutOfMemory, MeasurementError, NotSupported, UsageError
from pytest_gpuperf.monitor import Monitor, health
from pytest_gpuperf.priors import prior_of
from pytest_gpuperf.records import Record
from pytest_gpuperf.trials.paired import ALPHA, compare_pairs
from pytest_gpuperf.trials.tune_file import Journal, plan_in
from pytest_gpuperf.trials.tune_plan import (
    Cause,
    Pair,
    Plan,
    Point,
    Setting,
    Settings,
    best_of,
    combinations,
    first_candidates,
    is_default,
    is_known,
    left_out,
    name_of,
)
from pytest_gpuperf.workloads.models import is_model_folder
from pytest_gpuperf.workloads.requests import Generation, Load
from pytest_gpuperf.workloads.vllm import EngineConfig

Ending = Literal["done", "budget", "interrupted"]
#: Pairs that `tune` runs unless told otherwise: A B B A A B B A.
PAIRS = 4


class RunningEngine(Protocol):
    """What is asked of an engine; `workloads.vllm.Engine` is one."""

    load_time_s: float
    configuration: dict[str, str]
    blocks: int

    def generate(self, load: Load, *, timeout_s: float = ...) -> Generation:
        """Answer all requests."""
        ...


class Now(Record, frozen=True, kw_only=True):
    """Where a tuning is.

    Attributes:
        engines: That have been started and ended.
        most: That there will be at most.
        text: What comes next, or what came out.
    """

    engines: int
    most: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The world that a tuning touches.

    Attributes:
        start: Starts an engine whose configuration differs from the default so; it ends with the `with` statement.
        watch: Watches the devices during a `with` statement.
        clock: Seconds from any start.
        show: Is told where the tuning is.
        timeout_s: Of one repeat.
        device: Hashed UUID of the device.
    """

    start: Callable[[Settings], AbstractContextManager[RunningEngine]]
    watch: Callable[[], Monitor]
    clock: Callable[[], float]
    show: Callable[[Now], None] = lambda _: None
    timeout_s: float = 600.0
    device: str | None = None


class Gain(Record, frozen=True, kw_only=True):
    """Throughput of the best configuration over that of the default: 1.2 is 20 % more.

    Attributes:
        ratio: Geometric mean over the pairs.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        pairs: How many counted.
    """

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low > 1 or self.high < 1


class Tuning(Record, frozen=True, kw_only=True):
    """What is known at the end.

    Attributes:
        plan: What was measured.
        points: The default first; none where it was interrupted before that.
        skipped: Settings that the default has anyway.
        pairs: Of default and best.
        ending: Why it ended.
        left: Points that there was no time for.
        is_budget_short: Not even one of them and the pairs fit into the budget: the same command would leave them out
            for ever.
    """

    plan: Plan
    points: tuple[Point, ...]
    skipped: tuple[Settings, ...]
    pairs: tuple[Pair, ...]
    ending: Ending
    left: int = 0
    is_budget_short: bool = False

    @property
    def best(self) -> Point | None:
        """The fastest point; the default, if nothing is faster by what is worthwhile; `None` without points."""
        return best_of(self.points) if self.points else None

    @property
    def gpus(self) -> int:
        """How many GPUs the points were measured on."""
        return len({point.device for point in self.points if point.device})

    @property
    def is_settled(self) -> bool:
        """Whether the sweep came to its end and the gain is known, or there is none to know."""
        return self.ending == "done" and self.best is not None and (not self.best.settings or self.gain is not None)

    @property
    def gain(self) -> Gain | None:
        """Of the best over the default, by their pairs."""
        return gain_of(self.pairs, is_cpu=self.plan.kind == "cpu")


def engine_config(model: str, settings: Mapping[str, Setting]) -> EngineConfig:
    """Return vLLM's own defaults, apart from these settings.

    The prefix cache is off: all repeats have the same prompts, and it would answer for the engine. Weights are read
    from folders alone: a hub id stands for the preset of its shape.

    Raises:
        UsageError: A field that EngineConfig does not have.
    """
    default = EngineConfig(
        model=model,
        dtype="auto",
        gpu_memory_utilization=None,
        max_num_seqs=None,
        max_num_batched_tokens=None,
        enable_prefix_caching=False,
        load_format=None if is_model_folder(model) else "dummy",
    )
    try:
        return replace(default, **settings)
    except TypeError as error:
        raise UsageError(f"{name_of(settings)} is no configuration of an engine: {error}.") from None


def tune(journal: Journal, bench: Bench, *, pairs: int = PAIRS, budget_s: float | None = None) -> Tuning:
    """Measure what the journal's plan asks for and the journal does not hold yet.

    Args:
        journal: Holds the plan, what was measured before, and gets every point as it is measured.
        bench: What starts the engines.
        pairs: Of default and best; 0: only the points.
        budget_s: No engine is begun that would leave too little for the pairs; `None`: no limit.

    Raises:
        GpuperfError: The default configuration does not run.
    """
    tuner = _Tuner(journal, bench, pairs, budget_s)
    try:
        ending: Ending = tuner.all()
    except KeyboardInterrupt:
        ending = "interrupted"
    return Tuning(
        plan=journal.plan,
        points=journal.points,
        skipped=tuple(tuner.skipped),
        pairs=_pairs_of_best(journal),
        ending=ending,
        left=tuner.left,
        is_budget_short=tuner.is_budget_short,
    )


def read_tuning(folder: Path) -> Tuning:
    """Return what a folder holds, without measuring anything.

    Raises:
        UsageError: It holds no tuning.
    """
    plan = plan_in(folder)
    if plan is None:
        raise UsageError(f"{folder} holds no tuning. Make one with: gpuperf tune MODEL --output {folder}")
    journal = Journal(folder, plan)
    return Tuning(
        plan=plan,
        points=journal.points,
        skipped=(),
        pairs=_pairs_of_best(journal),
        ending="done",
        left=left_out(plan, journal.points),
    )


def _pairs_of_best(journal: Journal) -> tuple[Pair, ...]:
    """Pairs of the default and what is now the best; the last of each number, as lost ones were run again."""
    settings = best_of(journal.points).settings if journal.points else {}
    return tuple({pair.number: pair for pair in journal.pairs if pair.settings == settings}.values())


class _Tuner:
    """Goes through the plan, and keeps count of engines and time."""

    def __init__(self, journal: Journal, bench: Bench, pairs: int, budget_s: float | None) -> None:
        self.skipped: list[Settings] = []
        self.left = 0
        self.is_budget_short = False
        self._journal = journal
        self._plan = journal.plan
        self._bench = bench
        self._pairs = pairs
        self._budget_s = budget_s
        self._start_s = bench.clock()
        self._engines = 0
        self._most = 0

    def all(self) -> Ending:
        """The default, the candidates, their combination, the pairs."""
        candidates = first_candidates(self._plan)
        self._most = 1 + len(candidates) + 2 * self._pairs
        default = self._default()
        self.skipped = [settings for settings in candidates if is_default(settings, default)]
        self._most -= len(self.skipped)
        self._sweep([settings for settings in candidates if settings not in self.skipped], more=min(self._pairs, 1))
        if not self._plan.is_full:
            combined = combinations(self._journal.points, self._plan.factors, self._plan.kind)
            self._most += len(combined)
            self._sweep(combined, more=0)
        is_whole = self._compare(best_of(self._journal.points))
        return "done" if is_whole and not self.left else "budget"

    def _default(self) -> Point:
        for point in self._journal.points[:1]:
            self._engines += 1
            return point
        self._show("default")
        point = measured({}, self._plan, self._bench)  # what it raises ends the tuning: nothing could be compared
        self._add(point)
        return point

    def _sweep(self, candidates: Sequence[Settings], *, more: int) -> None:
        """Measure what is not known yet, while there is time for it and then for `more` points and the pairs.

        Engines that died come last: one that hangs until the command is cut would take the time of all others.
        """
        died = [point.settings for point in self._journal.points if not point.is_final]
        candidates = sorted(candidates, key=lambda settings: settings in died)
        for place, settings in enumerate(candidates):
            if is_known(settings, self._journal.points):
                self._engines += 1
            elif not self._has_time(1 + more + 2 * self._pairs):
                self.left += sum(not is_known(one, self._journal.points) for one in candidates[place:])
                self.is_budget_short = not self._has_time(1 + more + 2 * self._pairs, spent_s=0.0)
                return
            else:
                self._show(name_of(settings))
                self._add(tried(settings, self._plan, self._bench))

    def _compare(self, best: Point) -> bool:
        """Run the pairs that are missing; `False` where time was up before."""
        if not best.settings:
            return True
        for number in range(1, self._pairs + 1):
            if not any(pair.number == number and not pair.problem for pair in _pairs_of_best(self._journal)):
                if not self._has_time(2):
                    return False
                self._show(f"pair {number} of {self._pairs}: default and best")
                self._journal.add(measured_pair(number, best.settings, self._plan, self._bench))
            self._engines += 2
        return True

    def _has_time(self, engines: int, *, spent_s: float | None = None) -> bool:
        """The first start fills caches and takes longer than all others: hence the median."""
        if self._budget_s is None:
            return True
        usual_s = median(point.duration_s for point in self._journal.points if point.value is not None)
        spent_s = self._bench.clock() - self._start_s if spent_s is None else spent_s
        return spent_s + engines * usual_s <= self._budget_s

    def _add(self, point: Point) -> None:
        before = sum(one.tries for one in self._journal.points if one.settings == point.settings)
        self._journal.add(replace(point, tries=before + 1))
        self._engines += 1
        came = f"{point.value:,.0f} tok/s" if point.value else f"{point.problem}".splitlines()[0]
        self._show(f"{point.name}: {came}")

    def _show(self, text: str) -> None:
        self._bench.show(Now(engines=self._engines, most=self._most, text=text))


def measured(settings: Settings, plan: Plan, bench: Bench) -> Point:
    """Measure one configuration with an engine of its own; the first repeat, 20 to 25 % slower, does not count.

    Raises:
        GpuperfError: It does not run.
    """
    start_s = bench.clock()
    with bench.start(settings) as engine:
        engine.generate(plan.load, timeout_s=bench.timeout_s)
        with bench.watch() as monitor:
            repeats = [engine.generate(plan.load, timeout_s=bench.timeout_s) for _ in range(plan.repeats)]
        point = Point(
            settings=settings,
            values=tuple(repeat.output_tokens_per_s for repeat in repeats),
            latency_s=repeats[-1].latency_s(),
            load_time_s=engine.load_time_s,
            configuration=engine.configuration,
            blocks=engine.blocks,
            unwell=health(monitor.telemetry),
            device=bench.device,
        )
    return replace(point, duration_s=bench.clock() - start_s)


def tried(settings: Settings, plan: Plan, bench: Bench) -> Point:
    """Measure one configuration; where it does not run, the point says why."""
    start_s = bench.clock()
    try:
        return measured(settings, plan, bench)
    except (EngineError, NotSupported, UsageError) as error:
        cause: Cause = (
            "out of memory"
            if isinstance(error, EngineOutOfMemory)
            else "died"
            if isinstance(error, EngineError)
            else "not supported"
        )
        return Point(settings=settings, problem=str(error), cause=cause, duration_s=bench.clock() - start_s)


def measured_pair(number: int, settings: Settings, plan: Plan, bench: Bench) -> Pair:
    """Measure default and these settings one right after the other, in an order that changes from pair to pair."""
    pair = Pair(number=number, settings=settings, device=bench.device)
    points = []
    for each in ({}, settings) if number % 2 else (settings, {}):
        point = tried(each, plan, bench)
        if point.value is None:
            return replace(pair, problem=f"{point.name}: {point.problem}")
        pair = replace(pair, best=point.value) if each else replace(pair, default=point.value)
        points.append(point)
    return replace(pair, repeat_sd=_repeat_sd([point.values for point in points]))


def _repeat_sd(engines: Sequence[Sequence[float]]) -> float | None:
    """Relative standard deviation of the mean of an engine's repeats, over engines; `None` of single repeats."""
    squares = [variance(map(math.log, values)) / len(values) for values in engines if len(values) > 1]
    return math.sqrt(fmean(squares)) if squares else None


def run_pairs(settings: Settings, plan: Plan, bench: Bench, *, pairs: int) -> tuple[Pair, ...]:
    """Measure default and these settings in pairs, A B B A, each with an engine of its own.

    Args:
        settings: What differs from the default.
        plan: Load and repeats.
        bench: What starts the engines.
        pairs: How many; a test needs all of them.

    Raises:
        MeasurementError: An engine did not run.
    """
    found = []
    for number in range(1, pairs + 1):
        pair = measured_pair(number, settings, plan, bench)
        if pair.problem:
            raise MeasurementError(f"Pair {number} of {pairs} was lost. {pair.problem}")
        found.append(pair)
    return tuple(found)


def gain_of(pairs: Sequence[Pair], *, is_cpu: bool) -> Gain | None:
    """Return best over default with its interval, by the statistics of `gpuperf ab`; `None` without a whole pair.

    Args:
        pairs: In order of time; those that lost an engine do not count.
        is_cpu: A CPU is noisier.

    >>> pairs = [Pair(number=n, settings={}, default=100.0, best=120.0) for n in range(1, 5)]
    >>> round(gain_of(pairs, is_cpu=False).ratio, 6)
    1.2
    """
    whole = [(pair.default, pair.best) for pair in pairs if pair.default and pair.best]
    if not whole:
        return None
    prior = prior_of("end-to-end", is_cpu=is_cpu)
    found = compare_pairs(
        [-math.log(default) for default, _ in whole],  # + is worse
        [-math.log(best) for _, best in whole],
        margin=math.log1p(prior.tolerance),
        alpha=ALPHA,
        prior_sd=prior.within.deviation,
        prior_dof=prior.within.worth,
        least_sd=math.sqrt(fmean([pair.repeat_sd**2 for pair in pairs if pair.repeat_sd is not None] or [0.0])),
    )
    return Gain(
        ratio=1 / (1 + found.change),
        low=1 / (1 + found.change_high),
        high=1 / (1 + found.change_low),
        pairs=found.pairs,
    )
