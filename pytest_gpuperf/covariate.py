"""What a metric does not owe to its machine: its values less what an anchor explains of them. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from msgspec.structs import replace

from pytest_gpuperf.records import MetricBaseline, Record, Session
from pytest_gpuperf.units import Better, from_worse_log, worse_log

#: Visits and correlation from which an anchor may serve.
LEAST_VISITS, LEAST_CORRELATION = 8, 0.8


class Adjusted(Record, frozen=True, kw_only=True):
    """A metric without what an anchor explains of it, to be judged in place of the metric.

    Attributes:
        baseline: The sessions that have the anchor too, each corrected.
        value: The current value, corrected.
        factor: What corrected it; of further runs of this visit too.
        anchor: Its name.
        correlation: Of the sessions' logarithms.
        slope: Relative change of the metric for a relative change of the anchor.
        sessions: How many there were to find both from.
    """

    baseline: MetricBaseline
    value: float
    factor: float
    anchor: str = ""
    correlation: float
    slope: float
    sessions: int

    @property
    def words(self) -> str:
        """For the verdict's reason."""
        return (
            f"corrected by the anchor {self.anchor} (correlation {self.correlation:.2f} over {self.sessions} sessions, "
            f"slope {self.slope:.2f}, which costs one degree of freedom)"
        )


def covariate(baseline: MetricBaseline, anchor: MetricBaseline, value: float, anchor_value: float) -> Adjusted | None:
    """Take out of a metric what goes along with an anchor: y - slope (x - mean x), in logarithms.

    Sessions of both are matched by a run that they share, else by visit and devices. With x and y their means, signed
    so that more is worse, the slope is that of least squares. A correlation below -0.8 is not used: there is no cause
    that would make a metric faster by what slows an anchor.

    The sessions' residuals are stretched, so that whoever takes their variance with n - 1 degrees of freedom and
    predicts a new session by it gets the error of a regression's prediction (Draper & Smith, Applied Regression
    Analysis, section 3.1): by sqrt((n - 1) / (n - 2)) for the slope's degree of freedom, and for the slope's own error
    by sqrt((1 + 1/n + (x - mean x)^2 / Sxx) / (1 + 1/n)).

    Args:
        baseline: Of the metric.
        anchor: Of the anchor, its sessions on the same hardware and software alone.
        value: Of the metric, now.
        anchor_value: Of the anchor, now.

    Returns:
        `None` with fewer than 8 visits that have both, or a correlation below 0.8.
    """
    pairs = [(session, x) for session in baseline.sessions if (x := _anchor_of(session, anchor)) is not None]
    if len({(session.visit, tuple(sorted(session.devices))) for session, _ in pairs}) < LEAST_VISITS:
        return None
    ys = [_mean(session, baseline.better) for session, _ in pairs]
    line = _fitted([x for _, x in pairs], ys)
    if line is None or line.correlation < LEAST_CORRELATION:
        return None
    x = worse_log(anchor_value, anchor.better)
    stretch, factor = line.stretch(x), from_worse_log(line.shift(x), baseline.better)
    shifts = [line.shift(own) + (stretch - 1) * line.residual(own, y) for (_, own), y in zip(pairs, ys, strict=True)]
    sessions = tuple(_shifted(pair[0], by, baseline.better) for pair, by in zip(pairs, shifts, strict=True))
    return Adjusted(
        baseline=replace(baseline, sessions=sessions),
        value=value * factor,
        factor=factor,
        correlation=line.correlation,
        slope=line.slope,
        sessions=len(pairs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A least-squares line through n points."""

    points: int
    mean_x: float
    mean_y: float
    squares_x: float
    slope: float
    correlation: float

    def shift(self, x: float) -> float:
        return -self.slope * (x - self.mean_x)

    def residual(self, x: float, y: float) -> float:
        return y - self.mean_y + self.shift(x)

    def stretch(self, x: float) -> float:
        n = self.points
        leverage = (x - self.mean_x) ** 2 / self.squares_x
        return math.sqrt((n - 1) / (n - 2) * (1 + 1 / n + leverage) / (1 + 1 / n))


def _fitted(xs: Sequence[float], ys: Sequence[float]) -> _Line | None:
    """The line, or nothing where one of the two never varied."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    squares_x = sum((x - mean_x) ** 2 for x in xs)
    squares_y = sum((y - mean_y) ** 2 for y in ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    if min(squares_x, squares_y) < 1e-18 * len(xs):  # a relative deviation of 1e-9 is rounding
        return None
    return _Line(
        points=len(xs),
        mean_x=mean_x,
        mean_y=mean_y,
        squares_x=squares_x,
        slope=products / squares_x,
        correlation=products / math.sqrt(squares_x * squares_y),
    )


def _anchor_of(session: Session, anchor: MetricBaseline) -> float | None:
    """Mean of the anchor's session that belongs to a session of a metric."""
    devices = sorted(session.devices)
    here = [other for other in anchor.sessions if sorted(other.devices) == devices]
    ids = {run.run_id for run in session.runs} - {None}
    shared = [other for other in here if ids & {run.run_id for run in other.runs}]
    of_visit = [other for other in here if other.visit == session.visit]
    return next((_mean(other, anchor.better) for other in (*shared, *of_visit)), None)


def _shifted(session: Session, by: float, better: Better) -> Session:
    factor = from_worse_log(by, better)
    return replace(session, runs=tuple(replace(run, value=run.value * factor) for run in session.runs))


def _mean(session: Session, better: Better) -> float:
    return fmean(worse_log(run.value, better) for run in session.runs)
