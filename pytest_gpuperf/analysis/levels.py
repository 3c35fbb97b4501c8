"""A stored series as levels: what counts as one observation, and the steps between levels in the metric's unit."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from statistics import fmean

from pytest_gpuperf.analysis.changes import MIN_SEGMENT, Step, steps, unlinked
from pytest_gpuperf.analysis.history import Point, Series
from pytest_gpuperf.priors import package_priors
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import Better, from_worse_log, worse_log


class Observation(Record, frozen=True, kw_only=True):
    """One value of a series: the geometric mean of the runs of one commit in one visit on the same devices.

    Attributes:
        date: Of the first of the runs.
    """

    date: str
    commit: str | None
    devices: tuple[str, ...]
    value: float


class LevelStep(Record, frozen=True, kw_only=True):
    """A step between two levels, in the metric's unit.

    Attributes:
        last: The last observation of the level before.
        first: The first one of the level after.
        value_before: Geometric mean of the level before.
        value_after: What the same devices have after it.
        change: How much worse, in terms of time, as a fraction: +0.03 is 3 % slower.
        change_low: Lower end of its 95 % interval.
        change_high: Upper end of it.
    """

    last: Observation
    first: Observation
    value_before: float
    value_after: float
    change: float
    change_low: float
    change_high: float


class Levels(Record, frozen=True, kw_only=True):
    """What a series did.

    Attributes:
        observations: How many there are.
        steps: In order.
        replaced: The first observation after all devices were replaced at once: what changed there cannot be told from
            what the devices differ by.
        invalid: Values left out, because the device was unwell.
        backwards: Runs dated before one that was added earlier.
    """

    series: Series
    observations: int
    steps: tuple[LevelStep, ...]
    replaced: tuple[Observation, ...]
    invalid: int
    backwards: int

    @property
    def is_too_short(self) -> bool:
        """Whether there are too few observations for two levels."""
        return self.observations < 2 * MIN_SEGMENT


def levels(series: Series, points: Sequence[Point], *, by_date: bool = False) -> Levels:
    """Find the steps of a series.

    Args:
        series: What it is.
        points: Its values, in the order in which their runs were added.
        by_date: Order the runs by date instead, for results that were added late.
    """
    valid = [point for point in points if point.status != "INVALID"]
    if by_date:
        valid.sort(key=lambda point: point.date)
    found = observations(valid)
    logs = [worse_log(one.value, series.better) for one in found]
    devices = [one.devices for one in found]
    return Levels(
        series=series,
        observations=len(found),
        steps=tuple(_in_units(step, found, series.better) for step in steps(logs, devices, floor=_floor(series))),
        replaced=tuple(found[i] for i in unlinked(devices)),
        invalid=len(points) - len(valid),
        backwards=_backwards([point.date for point in valid]),
    )


def observations(points: Iterable[Point]) -> tuple[Observation, ...]:
    """Join what is no independent evidence: the fresh processes of a run, and the runs of a commit in one visit.

    Of a run that was measured again, the first process is left out: it was measured again because it stood out.
    Without a commit, or with one that was changed since, each run stands for itself.
    """
    runs = [list(group) for _, group in groupby(points, key=lambda point: (point.run_id, point.devices))]
    fresh = [run[1:] or run for run in runs]
    return tuple(_joined([one for run in group for one in run]) for _, group in groupby(fresh, key=_evidence))


def _evidence(run: list[Point]) -> tuple[object, ...]:
    first = run[0]
    is_clean = first.commit is not None and not first.commit.endswith("-dirty")
    return (first.visit, first.commit, first.devices) if is_clean else (first.run_id, first.devices)


def _joined(points: Sequence[Point]) -> Observation:
    first = points[0]
    value = math.exp(fmean(math.log(point.value) for point in points))
    return Observation(date=first.date, commit=first.commit, devices=first.devices, value=value)


def _in_units(step: Step, found: Sequence[Observation], better: Better) -> LevelStep:
    return LevelStep(
        last=found[step.at - 1],
        first=found[step.at],
        value_before=from_worse_log(step.before, better),
        value_after=from_worse_log(step.before + step.change, better),
        change=math.expm1(step.change),
        change_low=math.expm1(step.low),
        change_high=math.expm1(step.high),
    )


def _floor(series: Series) -> float:
    return package_priors()[series.kind].floor


def _backwards(dates: Sequence[str]) -> int:
    return sum(date < newest for date, newest in zip(dates, accumulate(dates, max), strict=True))
