"""Is one side slower than the other? Pure statistics of pairs: two runs each, one right after the other.

What the machine does to both runs of a pair cancels in their difference: the visit, heat, other tenants. The order is
A B, B A, A B, ... so that a steady drift cancels between neighbouring pairs. What is left is the noise from process to
process. With the mean difference d of the logarithms (+ is worse), its margin of error e and the margin
m = log(1 + tolerance):

    SLOWER      d > m and d - e > 0   more than the tolerance, and not by chance
    FASTER      d < -m and d + e < 0
    SAME        the 95 % interval lies within -m to m
    NOT SLOWER  the 95 % interval lies below m: better, but by how much is open
    UNDECIDED   otherwise

One false SLOWER in a thousand is allowed over all looks together; `alpha_of_look` says how it is spent.

There are two estimates of the noise, and the one that gives the smaller margin of error is used. The differences alone
hold whatever the pairs share, but seven of them leave six degrees of freedom. The sums of the pairs, less a straight
drift, vary as much as the differences if pairs share nothing, and more if they do; both together have eleven degrees
of freedom, and err towards caution. The chance of error is split between the two, so that the choice costs none.
"""

import math
from collections.abc import Sequence
from statistics import fmean, geometric_mean
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.curves import at_shared_sizes
from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.monitor import health
from pytest_gpuperf.priors import Prior, prior_of
from pytest_gpuperf.records import Measurement, Record, Results, TestKey, TestRecord
from pytest_gpuperf.stats import Variance, mean_of_known, t_quantile
from pytest_gpuperf.units import worse_log

Label = Literal["BASE", "HEAD"]
Decision = Literal["SLOWER", "FASTER", "SAME", "NOT SLOWER", "UNDECIDED"]

#: Chance of a false SLOWER, and of a false FASTER, over all looks.
ALPHA = 0.001
_FIRST_LOOK = 3
_LOOK_EVERY = 2
_POWER = 0.8
#: Part of the chance of error that the differences alone get. Of a slowdown of 5 % in serving noise, 0.1 catches 0.8 %
#: more and 0.2 catches up to 13 % more where pairs share noise of their own (benchmarks/ab_simulation.py).
_SHARE_OF_DIFFERENCES = 0.2


class Paired(Record, frozen=True, kw_only=True):
    """What pairs of runs say of one metric. Changes are fractions; +0.03 is 3 % worse.

    Attributes:
        decision: See the module.
        pairs: How many counted.
        change: The estimate.
        change_low: Lower end of its 95 % interval.
        change_high: Upper end of it.
        minimum_detectable_effect: Smallest slowdown that would be told from noise with 80 % power.
    """

    decision: Decision
    pairs: int
    change: float
    change_low: float
    change_high: float
    minimum_detectable_effect: float

    @property
    def is_decided(self) -> bool:
        """Whether more pairs are not needed."""
        return self.decision in ("SLOWER", "FASTER", "SAME")


class Pair(Record, frozen=True, kw_only=True):
    """Two runs, one right after the other.

    Attributes:
        number: From 1.
        base: Results of the one.
        head: Results of the other.
    """

    number: int
    base: Results
    head: Results


class Metric(Record, frozen=True, kw_only=True):
    """One metric of one test on both sides.

    Attributes:
        key: The test.
        metric: Name.
        unit: Of the values.
        tolerance: That applied.
        base_value: Geometric mean over the pairs that count.
        head_value: The same.
        paired: `None` where no pair counts.
        dropped: Why pairs do not count, one sentence each.
        only_in: The side that alone measured it.
        why_only: What is known of the other side.
    """

    key: TestKey
    metric: str
    unit: str
    tolerance: float
    base_value: float | None = None
    head_value: float | None = None
    paired: Paired | None = None
    dropped: tuple[str, ...] = ()
    only_in: Label | None = None
    why_only: str = ""


def looks(pairs: int) -> tuple[int, ...]:
    """Say after which pairs to decide: every second one from the third, and the last.

    Args:
        pairs: Most pairs to run.

    >>> looks(7)
    (3, 5, 7)
    """
    return (*range(_FIRST_LOOK, pairs, _LOOK_EVERY), pairs)


def alpha_of_look(pair: int, pairs: int, *, is_last: bool = False) -> float:
    """Say how much of `ALPHA` to spend at a look.

    Up to pair n of N, ALPHA (n/N)^3 is spent (Kim & DeMets 1987, doi 10.1093/biomet/74.1.149): little at first, where
    few pairs decide little anyway. Each look gets what is new, so that the sum holds whatever the looks have in common.

    Args:
        pair: Pairs that have been run, lost ones included.
        pairs: Most pairs to run.
        is_last: Nothing follows, as when time is up: what is left is spent.

    >>> [round(alpha_of_look(n, 7), 6) for n in looks(7)]
    [7.9e-05, 0.000286, 0.000636]
    """
    before = max((look for look in looks(pairs) if look < pair), default=0)
    spent_after = 1.0 if is_last else (pair / pairs) ** 3
    return ALPHA * (spent_after - (before / pairs) ** 3)


def compare_pairs(  # noqa: PLR0913 - what a decision depends on, each a number of its own
    base: Sequence[float],
    head: Sequence[float],
    *,
    margin: float,
    alpha: float,
    prior_sd: float,
    prior_dof: float,
    least_sd: float = 0.0,
) -> Paired:
    """Decide from pairs of runs.

    The variance of a run is averaged with the prior's, weighted by the degrees of freedom of both (Smyth 2004, doi
    10.2202/1544-6115.1027): seven pairs alone say little of a variance. Then Student t.

    Args:
        base: Logarithms, one a pair in order of time, + is worse; at least one.
        head: The other run of each pair.
        margin: Logarithm of one plus the tolerance.
        alpha: Chance of a false SLOWER at this look.
        prior_sd: Standard deviation to expect between runs of the same code.
        prior_dof: Degrees of freedom that it is worth; with a single pair 1 or more.
        least_sd: Least standard deviation to believe, as the spread within the runs shows it.

    Raises:
        MeasurementError: There are no pairs.
    """
    count = len(base)
    if not count:
        raise MeasurementError("No pairs: nothing was measured on both sides, so there is no difference.")
    prior = Variance(value=prior_sd**2, degrees_of_freedom=prior_dof)
    noises = _noises(base, head, prior)
    mean = fmean(after - before for before, after in zip(base, head, strict=True))

    def error(probability: float) -> float:
        """Margin of error that is exceeded with this probability on either side."""
        return min(
            t_quantile(1 - probability * share, noise.degrees_of_freedom)
            * math.sqrt(2 * max(noise.value, least_sd**2) / count)
            for share, noise in zip((_SHARE_OF_DIFFERENCES, 1 - _SHARE_OF_DIFFERENCES), noises, strict=True)
        )

    half, certain = error(0.025), error(alpha)
    return Paired(
        decision=_decide(mean, half, certain, margin),
        pairs=count,
        change=math.expm1(mean),
        change_low=math.expm1(mean - half),
        change_high=math.expm1(mean + half),
        minimum_detectable_effect=math.expm1(certain + error(1 - _POWER)),
    )


def _noises(base: Sequence[float], head: Sequence[float], prior: Variance) -> tuple[Variance, Variance]:
    """Variance of a run as the differences of the pairs show it, and as differences and sums do."""
    differences = [after - before for before, after in zip(base, head, strict=True)]
    sums = [after + before for before, after in zip(base, head, strict=True)]
    own = _about_mean(differences) / 2 + prior.degrees_of_freedom * prior.value
    freedom = len(base) - 1 + prior.degrees_of_freedom
    more = max(len(base) - 2, 0)
    return (
        Variance(value=own / freedom, degrees_of_freedom=freedom),
        Variance(value=(own + _about_line(sums) / 2) / (freedom + more), degrees_of_freedom=freedom + more),
    )


def _about_mean(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)


def _about_line(values: Sequence[float]) -> float:
    """Sum of squares about a straight line through values that follow each other."""
    centre, mean = (len(values) - 1) / 2, fmean(values)
    places = [place - centre for place in range(len(values))]
    length = sum(place**2 for place in places)
    slope = sum(place * value for place, value in zip(places, values, strict=True)) / length if length else 0.0
    return sum((value - mean - slope * place) ** 2 for place, value in zip(places, values, strict=True))


def _decide(mean: float, half: float, certain: float, margin: float) -> Decision:
    if mean > margin and mean > certain:
        return "SLOWER"
    if mean < -margin and mean < -certain:
        return "FASTER"
    if mean + half < margin:
        return "SAME" if mean - half > -margin else "NOT SLOWER"
    return "UNDECIDED"


class _Found(Record, frozen=True, kw_only=True):
    """A measurement and the record that holds it."""

    record: TestRecord
    measurement: Measurement

    @property
    def log(self) -> float:
        """Logarithm of the value; + is worse."""
        return worse_log(self.measurement.value, self.measurement.better)

    @property
    def identity(self) -> str:
        """What two values must have in common to be compared."""
        return f"{self.measurement.unit}, {self.measurement.better} is better, {self.measurement.method}"


class _Both(Record, frozen=True, kw_only=True):
    """What a pair measured of one metric."""

    pair: Pair
    base: _Found | None
    head: _Found | None


def compare(pairs: Sequence[Pair], *, alpha: float, tolerance: float | None = None) -> tuple[Metric, ...]:
    """Compare what pairs of runs measured, metric by metric.

    Args:
        pairs: In order of time; those of which a run was lost are not among them.
        alpha: Chance of a false SLOWER at this look.
        tolerance: As a fraction, instead of the tests' own.
    """
    found = [(pair, _found(pair.base), _found(pair.head)) for pair in pairs]
    names = dict.fromkeys(name for _, base, head in found for name in [*base, *head])
    return tuple(
        _compare_one(
            [_Both(pair=pair, base=base.get(name), head=head.get(name)) for pair, base, head in found], alpha, tolerance
        )
        for name in names
    )


def _found(results: Results) -> dict[tuple[str, str], _Found]:
    """Test and metric -> what a passing test measured."""
    return {
        (str(record.key), measurement.metric): _Found(record=record, measurement=measurement)
        for record in results.tests
        if record.passed
        for measurement in record.measurements
    }


def _compare_one(rows: Sequence[_Both], alpha: float, tolerance: float | None) -> Metric:
    found = [one for row in rows for one in (row.base, row.head) if one is not None]
    record, measurement = found[-1].record, found[-1].measurement
    prior = _prior_of(found[-1])
    metric = Metric(
        key=record.key,
        metric=measurement.metric,
        unit=measurement.unit,
        tolerance=tolerance or measurement.tolerance or prior.tolerance,
    )
    if all(row.head is None for row in rows):
        return replace(metric, only_in="BASE", why_only=_absence(record.key, [row.pair.head for row in rows]))
    if all(row.base is None for row in rows):
        return replace(metric, only_in="HEAD", why_only=_absence(record.key, [row.pair.base for row in rows]))
    usual_clock_mhz = _usual_clock_mhz(found)
    reasons = [_reason_to_drop(row, usual_clock_mhz) for row in rows]
    metric = replace(metric, dropped=tuple(reason for reason in reasons if reason))
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    return _judged(metric, kept, prior, alpha) if kept else metric


def _judged(metric: Metric, kept: Sequence[_Both], prior: Prior, alpha: float) -> Metric:
    found = [one for row in kept for one in (row.base, row.head) if one]
    shared = at_shared_sizes([one.measurement for one in found])
    sides = [replace(one, measurement=measurement) for one, measurement in zip(found, shared, strict=True)]
    base, head = sides[::2], sides[1::2]  # a pair that lacks one of the two has been dropped
    paired = compare_pairs(
        [one.log for one in base],
        [one.log for one in head],
        margin=math.log1p(metric.tolerance),
        alpha=alpha,
        prior_sd=prior.within.deviation,
        prior_dof=prior.within.worth,
        least_sd=_least_sd([one.measurement for one in (*base, *head)]),
    )
    return replace(
        metric,
        base_value=geometric_mean(one.measurement.value for one in base),
        head_value=geometric_mean(one.measurement.value for one in head),
        paired=paired,
    )


def _prior_of(found: _Found) -> Prior:
    return prior_of(found.measurement.kind, is_cpu=found.record.environment.hardware.is_cpu)


def _least_sd(measurements: Sequence[Measurement]) -> float:
    """What the runs' own intervals show: runs cannot agree better with each other than each is known."""
    return math.sqrt(fmean([(one.spread / 2) ** 2 for one in measurements if one.spread is not None] or [0.0]))


def _usual_clock_mhz(found: Sequence[_Found]) -> float | None:
    return mean_of_known(one.measurement.telemetry.sm_clock_mhz for one in found if one.measurement.telemetry)


def _absence(key: TestKey, runs: Sequence[Results]) -> str:
    """What is known of a side that did not measure a metric."""
    records = [record for run in runs for record in run.tests if record.key == key]
    if any(not record.passed for record in records):
        return "the test failed there"
    if records:
        return "the test does not record it there"
    is_seen = any(run.end and str(key) in run.end.tests for run in runs)
    return "the test was skipped or failed there" if is_seen else "there is no such test"


def _reason_to_drop(row: _Both, usual_clock_mhz: float | None) -> str | None:
    """Why a pair does not count for a metric."""
    number, base, head = row.pair.number, row.base, row.head
    if base is None:
        return f"pair {number}: not measured by BASE" + (
            f", {_absence(head.record.key, [row.pair.base])}" if head else ""
        )
    if head is None:
        return f"pair {number}: not measured by HEAD, {_absence(base.record.key, [row.pair.head])}"
    for label, one in (("BASE", base), ("HEAD", head)):
        if problem := _problem(one.measurement, usual_clock_mhz):
            return f"pair {number}: {label}: {problem}"
    devices = ["+".join(sorted(one.record.devices)) for one in (base, head)]
    if devices[0] != devices[1]:
        return f"pair {number}: BASE ran on device {devices[0]}, HEAD on {devices[1]}"
    if base.identity != head.identity:
        return f"pair {number}: measured differently, BASE {base.identity}; HEAD {head.identity}"
    return None


def _problem(measurement: Measurement, usual_clock_mhz: float | None) -> str | None:
    """Why a value cannot be trusted, or compared at all."""
    if not (math.isfinite(measurement.value) and measurement.value > 0):
        return f"measured {measurement.value:g} {measurement.unit}, and only values above 0 can be compared"
    telemetry = measurement.telemetry
    reason = health(telemetry, usual_clock_mhz=usual_clock_mhz) if telemetry else None
    return reason.replace("in the baseline", "on average") if reason else None
