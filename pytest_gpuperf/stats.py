"""Intervals, Student t, and how runs, sessions and GPUs differ: pure functions of numbers."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist, fmean, harmonic_mean, median, stdev, variance
from typing import TYPE_CHECKING, Any, Self

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.records import Session
from pytest_gpuperf.units import Better, worse_log

if TYPE_CHECKING:
    import numpy as np

#: Above this the normal approximation gives the same ranks as the binomial distribution, or wider by one.
_EXACT_RANKS_UP_TO = 100
#: Terms of the continued fraction: converges in about sqrt(degrees of freedom) of them.
_FRACTION_TERMS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    low: float
    centre: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLogs:
    """The runs of one session as logarithms of their values.

    Attributes:
        device_group: The physical devices that the session ran on; equal groups are the same devices.
        logs: One a run; at least one.
        visit: The visit to the machine that the runs belong to; `None`: one of their own.
    """

    device_group: Hashable
    logs: tuple[float, ...]
    visit: Hashable = None

    @classmethod
    def of(cls, session: Session, better: Better) -> Self:
        """The runs of an accepted session, signed so that more is worse."""
        logs = tuple(worse_log(run.value, better) for run in session.runs)
        return cls(device_group=tuple(sorted(session.devices)), logs=logs, visit=session.visit)

    @property
    def mean(self) -> float:
        """Mean of the runs."""
        return fmean(self.logs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variance:
    """A variance of the logarithm of a value; its square root is a relative standard deviation.

    Attributes:
        value: The estimate.
        degrees_of_freedom: How well it is known; of a prior, what it is worth.
    """

    value: float
    degrees_of_freedom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceComponents:
    """How values vary at each level.

    Attributes:
        within: Between runs of one session.
        session: Between sessions on one physical GPU, without `within`.
        device: Between physical GPUs of one model, without the other two.
    """

    within: Variance
    session: Variance
    device: Variance


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the mean of the current runs should be if nothing changed, and how far off it may be.

    Attributes:
        degrees_of_freedom: Of the standard error, for Student t.
    """

    expected_log: float
    standard_error: float
    degrees_of_freedom: float


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


@lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the quantile of Student's t distribution.

    With t = sqrt(n) tan(angle) the density becomes C cos(angle)**(n - 1), and the probability between 0 and t half the
    incomplete beta function of sin(angle)**2 (Abramowitz & Stegun, 26.5.27). That is concave in the angle, so Newton's
    steps from the normal quantile, which is never too large, rise to the root and cannot pass it.

    Args:
        probability: Between 0 and 1, without the ends.
        degrees_of_freedom: At least 1.

    Raises:
        ValueError: An argument is outside its range.

    >>> round(t_quantile(0.975, 10), 3)
    2.228
    """
    if not 0 < probability < 1 or not degrees_of_freedom >= 1:
        raise ValueError(
            f"t_quantile({probability}, {degrees_of_freedom}): need 0 < probability < 1, degrees_of_freedom >= 1."
        )
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees_of_freedom)
    half = degrees_of_freedom / 2
    density = math.exp(math.lgamma(half + 0.5) - math.lgamma(half)) / math.sqrt(math.pi)
    angle, step = math.atan(normal_quantile(probability) / math.sqrt(degrees_of_freedom)), 1.0
    while step > 1e-14:
        missing = probability - 0.5 - _incomplete_beta(math.sin(angle) ** 2, math.cos(angle) ** 2, 0.5, half) / 2
        step = missing / (density * math.cos(angle) ** (degrees_of_freedom - 1))
        angle += step
    return math.sqrt(degrees_of_freedom) * math.tan(angle)


def t_probability(t: float, degrees_of_freedom: float) -> float:
    """Return the chance that Student's t is at most `t` (Abramowitz & Stegun, 26.7.1).

    >>> round(t_probability(2.228, 10), 3)
    0.975
    """
    square = t * t
    if square == 0:
        return 0.5
    tail = (
        _incomplete_beta(
            degrees_of_freedom / (degrees_of_freedom + square),
            square / (degrees_of_freedom + square),
            degrees_of_freedom / 2,
            0.5,
        )
        / 2
    )
    return tail if t < 0 else 1 - tail


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the median and an interval for it that holds for any distribution of independent samples.

    The ends are order statistics: the number of samples below the median is binomial with p = 1/2 (Conover, Practical
    Nonparametric Statistics, section 3.2). With fewer samples than the confidence needs (6 for 95 %), they are the
    smallest and the largest; a single sample has no width.

    Raises:
        MeasurementError: There are no samples.
    """
    if not samples:
        raise MeasurementError("No samples: nothing was measured, so there is no median.")
    ordered = sorted(samples)
    rank = max(_lower_rank(len(ordered), confidence), 1)
    return Interval(low=ordered[rank - 1], centre=median(ordered), high=ordered[-rank])


def mean_interval(samples: Sequence[float], *, batches: int = 10, confidence: float = 0.95) -> Interval:
    """Return the mean and an interval for it that allows for neighbouring samples being alike.

    Batch means: the samples, in order, are cut into batches whose lengths differ by one at most, and the means of the
    batches are taken as independent, which holds if a batch is longer than what makes neighbours alike (Law & Kelton,
    Simulation Modeling and Analysis, chapter 9, "batch means").

    Args:
        samples: In the order in which they were taken; at least two.
        batches: How many, two or more; where there are fewer samples, each is a batch.
        confidence: Probability that the interval holds the mean.

    Raises:
        MeasurementError: There are fewer than two samples.
    """
    count = len(samples)
    if count < 2:
        raise MeasurementError(f"{count} samples: an interval of the mean needs two or more. Measure for longer.")
    batches = min(count, batches)
    means = [fmean(samples[count * i // batches : count * (i + 1) // batches]) for i in range(batches)]
    half = t_quantile((1 + confidence) / 2, batches - 1) * stdev(means) / math.sqrt(batches)
    centre = fmean(samples)
    return Interval(low=centre - half, centre=centre, high=centre + half)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is known of them; `None` where nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def relative_half_width(interval: Interval) -> float:
    """Return half the width of an interval as a fraction of its centre."""
    return (interval.high - interval.low) / 2 / interval.centre


def variance_components(
    sessions: Sequence[SessionLogs],
    *,
    prior: VarianceComponents,
    floor: float,
    current: Sequence[float] = (),
) -> VarianceComponents:
    """Split the spread of a baseline into runs, sessions and GPUs, each shrunk towards the prior.

    Each raw variance is the analysis of variance's, less what the level below adds to it, never below zero (Searle,
    Casella & McCulloch, Variance Components, 1992, chapter 3). It is then averaged with the prior's, weighted by the
    degrees of freedom of both (Smyth 2004, doi 10.2202/1544-6115.1027): five sessions alone say little of a variance.

    Args:
        sessions: At least one.
        prior: Variances expected before any session, and the degrees of freedom that each is worth.
        floor: Least relative standard deviation between sessions.
        current: Logarithms of the runs that are judged: they say how runs differ too.
    """
    sessions = _by_visit(sessions)
    groups = _by_device(sessions)
    runs = [len(session.logs) for session in sessions]

    freedom = sum(runs) - len(sessions) + max(len(current) - 1, 0)
    squares = sum(_squares(session.logs) for session in sessions) + (_squares(current) if current else 0.0)
    within = _shrunk(squares, freedom, prior.within)

    freedom = len(sessions) - len(groups)
    squares = sum(_squares([session.mean for session in group]) for group in groups)
    excess = max(squares - freedom * within.value / harmonic_mean(runs), 0.0)
    between = _shrunk(excess, freedom, prior.session)
    between = replace(between, value=max(between.value, floor**2))

    freedom = len(groups) - 1
    sampling = fmean(_variance_of_mean(group, between.value, within.value) for group in groups)
    spread = variance(_mean(group) for group in groups) if freedom else 0.0
    devices = _shrunk(freedom * max(spread - sampling, 0.0), freedom, prior.device)
    return VarianceComponents(within=within, session=between, device=devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelSquares:
    """What one metric's sessions show at each level, nothing shrunk and nothing subtracted.

    Attributes:
        within: Of the runs of a session.
        session: Of the means of the visits to one device.
        device: Of the means of the devices.
        runs_a_session: Harmonic mean.
        sessions_a_device: Harmonic mean.
    """

    within: Variance
    session: Variance
    device: Variance
    runs_a_session: float
    sessions_a_device: float


def level_squares(sessions: Sequence[SessionLogs]) -> LevelSquares:
    """Work out the variances that `priors.learn` puts together; a level without degrees of freedom has none.

    Args:
        sessions: At least one.
    """
    sessions = _by_visit(sessions)
    groups = _by_device(sessions)
    return LevelSquares(
        within=_pooled([session.logs for session in sessions]),
        session=_pooled([[session.mean for session in group] for group in groups]),
        device=_pooled([[_mean(group) for group in groups]]),
        runs_a_session=harmonic_mean([len(session.logs) for session in sessions]),
        sessions_a_device=harmonic_mean([len(group) for group in groups]),
    )


def _pooled(groups: Sequence[Sequence[float]]) -> Variance:
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(_squares(group) for group in groups)
    return Variance(value=squares / freedom if freedom else 0.0, degrees_of_freedom=freedom)


def _shrunk(squares: float, freedom: int, prior: Variance) -> Variance:
    """Average a sum of squares with what the prior is worth of them."""
    total = freedom + prior.degrees_of_freedom
    return Variance(value=(squares + prior.degrees_of_freedom * prior.value) / total, degrees_of_freedom=total)


def predict(
    sessions: Sequence[SessionLogs],
    components: VarianceComponents,
    *,
    device_group: Hashable,
    current_runs: int,
    visit: Hashable = None,
) -> Prediction:
    """Predict the mean of new runs on a given device from the sessions so far.

    The best linear unbiased prediction with an unknown common mean, estimated by generalised least squares (Henderson
    1975, doi 10.2307/2529430; Searle, Casella & McCulloch, Variance Components, 1992, chapter 7; in geostatistics,
    ordinary kriging). Sessions on the same device share its deviation, so they weigh more. With B balanced sessions on
    that one device the squared error is session (1 + 1/B) + within (1/current_runs + 1/all runs). Runs of the same
    visit share its deviation too: against its own visit alone, the error is within (1/current_runs + 1/all runs).

    The squared error is a sum of the three variances, each times a number; its degrees of freedom are those of such a
    sum (Satterthwaite 1946, doi 10.2307/3002019).

    Args:
        sessions: At least one.
        components: Variances of the three levels.
        device_group: The physical devices of the new runs.
        current_runs: How many new runs are averaged.
        visit: The visit of the new runs; `None`: a new one.
    """
    import numpy as np

    everything = [*sessions, SessionLogs(device_group=device_group, logs=(0.0,) * current_runs, visit=visit)]
    levels = shared_levels(everything, components)
    total = np.sum([level.value * shared for level, shared in levels], axis=0)
    among, to_current = total[:-1, :-1], total[:-1, -1]
    ones = np.ones(len(sessions))
    by_mean, by_current = np.linalg.solve(among, np.column_stack([ones, to_current])).T
    weights = by_current + (1 - ones @ by_current) * by_mean / (ones @ by_mean)

    contrast = np.append(-weights, 1.0)
    parts = [float(level.value * (contrast @ shared @ contrast)) for level, shared in levels]
    certainty = sum(part**2 / level.degrees_of_freedom for part, (level, _) in zip(parts, levels, strict=True))
    means = np.array([session.mean for session in sessions])
    return Prediction(
        expected_log=float(weights @ means),
        standard_error=math.sqrt(sum(parts)),
        degrees_of_freedom=max(sum(parts) ** 2 / certainty, 1.0),
    )


def shared_levels(
    sessions: Sequence[SessionLogs], components: VarianceComponents
) -> list[tuple[Variance, "np.ndarray[Any, np.dtype[np.float64]]"]]:
    """Pair the variance of each level with what the sessions' means share of it: [sessions, sessions]."""
    import numpy as np

    devices = np.array([[one.device_group == other.device_group for other in sessions] for one in sessions], float)
    visits = np.array([[one is other or _is_one_visit(one, other) for other in sessions] for one in sessions], float)
    runs = np.diag([1 / len(one.logs) for one in sessions])
    return [(components.within, runs), (components.session, visits), (components.device, devices)]


def _is_one_visit(one: SessionLogs, other: SessionLogs) -> bool:
    """Whether two sessions are of one visit, as when the software was changed in between."""
    return one.visit is not None and (one.device_group, one.visit) == (other.device_group, other.visit)


def _by_visit(sessions: Sequence[SessionLogs]) -> list[SessionLogs]:
    """Join the sessions of one visit: they say nothing of the spread between visits."""
    joined: list[SessionLogs] = []
    for session in sessions:
        known = next((i for i, other in enumerate(joined) if _is_one_visit(session, other)), None)
        if known is None:
            joined.append(session)
        else:
            joined[known] = replace(session, logs=joined[known].logs + session.logs)
    return joined


def _incomplete_beta(x: float, one_minus_x: float, a: float, b: float) -> float:
    # Regularised, by the continued fraction 26.5.8 of Abramowitz & Stegun, evaluated from its far end. Both x and its
    # complement are given, since either may be too small to be found by subtraction.
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(one_minus_x, x, b, a)
    fraction = 1.0
    for m in range(_FRACTION_TERMS, 0, -1):
        fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
        n = m - 1
        fraction = 1 - (a + n) * (a + b + n) * x / ((a + 2 * n) * (a + 2 * n + 1)) / fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log(one_minus_x) - log_beta) / (a * fraction)


def _lower_rank(count: int, confidence: float) -> int:
    tail = (1 - confidence) / 2
    if count > _EXACT_RANKS_UP_TO:
        return math.floor((count - normal_quantile(1 - tail) * math.sqrt(count)) / 2)
    rank, below = 0, 2.0**-count
    while below <= tail:
        rank += 1
        below += math.comb(count, rank) * 2.0**-count
    return rank


def _by_device(sessions: Sequence[SessionLogs]) -> list[list[SessionLogs]]:
    groups: dict[Hashable, list[SessionLogs]] = {}
    for session in sessions:
        groups.setdefault(session.device_group, []).append(session)
    return list(groups.values())


def _squares(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)


def _mean(group: Sequence[SessionLogs]) -> float:
    return fmean(session.mean for session in group)


def _variance_of_mean(group: Sequence[SessionLogs], session: float, within: float) -> float:
    return sum(session + within / len(one.logs) for one in group) / len(group) ** 2
