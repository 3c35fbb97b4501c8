"""Drift: what has become of a metric since its epoch began, though every step was small enough to be accepted.

The epoch's first five sessions are compared with its last five. Both means, and with them their difference, are
estimated by generalised least squares with the judge's three variances (Searle, Casella & McCulloch, Variance
Components, 1992, chapter 7): what a device adds to all of its sessions drops out of the difference where the device is
on both sides, so sessions on the same devices weigh more.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from pytest_gpuperf.baseline_file import list_files, read
from pytest_gpuperf.curves import baseline_at_shared_sizes
from pytest_gpuperf.judge import ENOUGH_SESSIONS
from pytest_gpuperf.priors import prior_of, read_priors
from pytest_gpuperf.records import BaselineFile, MetricBaseline, Record, Session, TestKey
from pytest_gpuperf.stats import (
    Interval,
    SessionLogs,
    VarianceComponents,
    shared_levels,
    t_quantile,
    variance_components,
)
from pytest_gpuperf.units import from_worse_log

_CONFIDENCE = 0.95


class Drift(Record, frozen=True, kw_only=True):
    """How one metric changed within its epoch.

    Attributes:
        slug: Folder of its baselines.
        sessions: How many the file has of the epoch.
        recent: How many of them, the last, are compared with the first five.
        change: How much slower the last sessions are than the first, as a fraction.
        change_low: Lower end of its 95 % interval.
        change_high: Upper end of it.
        first_date: Of the first session, ISO 8601.
        last_date: Of the last one.
        first_value: Geometric mean of the first sessions, in `unit`.
        last_value: The same, changed by `change`.
        tolerance: The usual one of such metrics: a baseline does not know its test's.
    """

    key: TestKey
    metric: str
    slug: str
    unit: str
    sessions: int
    recent: int
    change: float
    change_low: float
    change_high: float
    first_date: str
    last_date: str
    first_value: float
    last_value: float
    tolerance: float


def drifts(root: Path) -> tuple[Drift, ...]:
    """Compare the end of every epoch of more than five sessions with its beginning; the largest slowdown first.

    Args:
        root: Folder of all baselines.

    Raises:
        BaselineError: A file of baselines or of priors cannot be trusted.
    """
    found = [
        drift_of(TestKey(module=file.module, test=test), metric, baseline, file=file, root=root, slug=path.parent.name)
        for path in list_files(root)
        if (file := read(path))
        for test, metrics in file.tests.items()
        for metric, baseline in metrics.items()
        if len(baseline.sessions) > ENOUGH_SESSIONS
    ]
    return tuple(sorted(found, key=lambda drift: -drift.change))


def drift_of(
    key: TestKey, metric: str, baseline: MetricBaseline, *, file: BaselineFile, root: Path, slug: str
) -> Drift:
    """Compare the last sessions of one metric with its first five.

    Args:
        key: Its test.
        metric: Its name.
        baseline: More than five sessions.
        file: Where the baseline is from.
        root: Folder of all baselines, for what is known of noise.
        slug: Folder of this one.
    """
    baseline = baseline_at_shared_sizes(baseline)
    first = baseline.sessions[:ENOUGH_SESSIONS]
    recent = baseline.sessions[ENOUGH_SESSIONS:][-ENOUGH_SESSIONS:]
    is_cpu = file.environments[recent[-1].environment].hardware.is_cpu
    prior = prior_of(baseline.kind, is_cpu=is_cpu, priors=read_priors(root, slug))
    before, after = _logs(first, baseline), _logs(recent, baseline)
    # The noise of the first sessions, as the judge sees it: in that of all, the drift would hide itself.
    components = variance_components(before, prior=prior.variances, floor=prior.floor)
    change = change_between(before, after, components)
    middle = sum(session.mean for session in before) / len(before)
    return Drift(
        key=key,
        metric=metric,
        slug=slug,
        unit=baseline.unit,
        sessions=len(baseline.sessions),
        recent=len(recent),
        change=math.expm1(change.centre),
        change_low=math.expm1(change.low),
        change_high=math.expm1(change.high),
        first_date=first[0].date,
        last_date=recent[-1].date,
        first_value=from_worse_log(middle, baseline.better),
        last_value=from_worse_log(middle + change.centre, baseline.better),
        tolerance=prior.tolerance,
    )


def _logs(sessions: Sequence[Session], baseline: MetricBaseline) -> list[SessionLogs]:
    return [SessionLogs.of(session, baseline.better) for session in sessions]


def change_between(
    before: Sequence[SessionLogs], after: Sequence[SessionLogs], components: VarianceComponents
) -> Interval:
    """Return the difference of two groups' means, after less before, and its 95 % interval.

    The degrees of freedom are those of a sum of variances (Satterthwaite 1946, doi 10.2307/3002019).

    Args:
        before: At least one.
        after: At least one.
        components: Variances of the three levels.
    """
    import numpy as np

    everything = [*before, *after]
    levels = shared_levels(everything, components)
    total = np.sum([level.value * shared for level, shared in levels], axis=0)

    # design: [sessions, 2], the mean of all and what the later ones add to it
    design = np.column_stack([np.ones(len(everything)), [0.0] * len(before) + [1.0] * len(after)])
    weighted = np.linalg.solve(total, design)
    weights = np.linalg.solve(design.T @ weighted, weighted.T)[1]
    parts = [float(level.value * (weights @ shared @ weights)) for level, shared in levels]
    certainty = sum(part**2 / level.degrees_of_freedom for part, (level, _) in zip(parts, levels, strict=True))
    freedom = max(sum(parts) ** 2 / certainty, 1.0)
    centre = float(weights @ np.array([session.mean for session in everything]))
    half = t_quantile((1 + _CONFIDENCE) / 2, freedom) * math.sqrt(sum(parts))
    return Interval(low=centre - half, centre=centre, high=centre + half)
