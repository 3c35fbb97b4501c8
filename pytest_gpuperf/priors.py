"""How noisy each kind of metric usually is: known before a metric has sessions of its own, learned from baselines.

Five sessions say little of a variance. The metrics of one kind vary alike, so the others of its kind say more. What
they say is kept as a `Prior` with its origin: those of `data/priors.json` come with the package, and `gpuperf baseline
learn` writes one beside the baselines of a GPU.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean, variance
from typing import Annotated, Literal

import msgspec

from pytest_gpuperf.baseline_file import baseline_path
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.records import Kind, MetricBaseline, Record
from pytest_gpuperf.stats import SessionLogs, Variance, VarianceComponents, level_squares

PriorName = Kind | Literal["cpu"]
#: More is not believed: the metrics of a suite share their machines, so that their variances are no independent facts.
MOST_DEGREES_OF_FREEDOM = 10.0
LEAST_DEGREES_OF_FREEDOM = 1.0
#: A file may have been edited by hand: a zero would be divided by.
_Positive = Annotated[float, msgspec.Meta(gt=0)]
#: With fewer metrics that show a level, the prior of the package stays.
_ENOUGH_METRICS = 3
#: Relative deviation below which values are equal: a file holds five digits, and less is the rounding of logarithms.
_EQUAL = 1e-6
_FILE_NAME = ".priors.json"


class Level(Record, frozen=True, kw_only=True):
    """What is known of the noise at one level.

    Attributes:
        deviation: Relative standard deviation.
        worth: Degrees of freedom: how alike the metrics of the kind are, and how many showed it.
        origin: Where the figure comes from.
    """

    deviation: _Positive
    worth: Annotated[float, msgspec.Meta(ge=LEAST_DEGREES_OF_FREEDOM)]
    origin: str

    @property
    def variance(self) -> Variance:
        """The same for computing."""
        return Variance(value=self.deviation**2, degrees_of_freedom=self.worth)


class Prior(Record, frozen=True, kw_only=True):
    """Noise to expect of a kind of metric, and its default tolerance.

    Attributes:
        within: Between runs of one session.
        session: Between sessions on one physical device.
        device: Between physical devices of one model.
        floor: Least relative standard deviation between sessions that is believed.
        tolerance: Largest slowdown accepted where the test says nothing.
    """

    within: Level
    session: Level
    device: Level
    floor: _Positive
    tolerance: _Positive

    @property
    def variances(self) -> VarianceComponents:
        """The three levels for computing."""
        return VarianceComponents(
            within=self.within.variance, session=self.session.variance, device=self.device.variance
        )


Priors = Mapping[PriorName, Prior]


@cache
def package_priors() -> Priors:
    """Those that come with the package."""
    text = files("pytest_gpuperf").joinpath("data/priors.json").read_bytes()
    return msgspec.json.decode(text, type=dict[PriorName, Prior])


def prior_of(kind: Kind, *, is_cpu: bool, priors: Priors | None = None) -> Prior:
    """Return the noise to expect of a kind of metric, on a GPU or by wall clock on a CPU."""
    return (priors or package_priors())["cpu" if is_cpu else kind]


def priors_path(root: Path, slug: str) -> Path:
    """Say where the priors of one kind of device live: beside its baselines."""
    return baseline_path(root, slug, "any.py").with_name(_FILE_NAME)


def read_priors(root: Path, slug: str) -> Priors:
    """Read what was learned from the baselines of one kind of device, or take the package's where nothing was.

    Raises:
        BaselineError: The file is there and cannot be trusted.
    """
    path = priors_path(root, slug)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return package_priors()
    except OSError as error:
        raise BaselineError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return {**package_priors(), **msgspec.json.decode(text, type=dict[PriorName, Prior])}
    except (msgspec.MsgspecError, ValueError) as error:
        raise BaselineError(
            f"{path} does not hold priors: {error}. Delete it, or learn them anew: gpuperf baseline learn"
        ) from None


def learn(baselines: Iterable[MetricBaseline], *, before: Priors, is_cpu: bool, origin: str) -> dict[PriorName, Prior]:
    """Learn how noisy each kind of metric is from the metrics of it.

    Each metric gives a variance a level, with the degrees of freedom that its sessions leave it. The kind's variance
    and what it is worth are the scaled F distribution's that these variances look like (Smyth 2004, section 6.2, doi
    10.2202/1544-6115.1027), never worth more than `MOST_DEGREES_OF_FREEDOM`. A level that fewer than three metrics
    show keeps what was known before.

    Args:
        baselines: Of one kind of device.
        before: What was known before.
        is_cpu: They were measured on a CPU.
        origin: Where they come from, such as `24 metrics of baselines/h100, 2026-11-21`.
    """
    groups: dict[PriorName, list[MetricBaseline]] = {}
    for baseline in baselines:
        groups.setdefault("cpu" if is_cpu else baseline.kind, []).append(baseline)
    return {name: _learned(group, before[name], origin) for name, group in groups.items()}


def _learned(baselines: Sequence[MetricBaseline], before: Prior, origin: str) -> Prior:
    found = [
        level_squares([SessionLogs.of(session, baseline.better) for session in baseline.sessions])
        for baseline in baselines
    ]
    within = _level([metric.within for metric in found], before.within, origin)
    runs = fmean(metric.runs_a_session for metric in found)
    below = within.deviation**2 / runs
    session = _level([metric.session for metric in found], before.session, origin, below=below, floor=before.floor)
    visits = fmean(metric.sessions_a_device for metric in found)
    below = (session.deviation**2 + below) / visits
    device = _level([metric.device for metric in found], before.device, origin, below=below, floor=before.floor)
    return msgspec.structs.replace(before, within=within, session=session, device=device)


def _level(
    variances: Sequence[Variance], before: Level, origin: str, *, below: float = 0.0, floor: float = 0.0
) -> Level:
    """What the metrics' variances at a level say together.

    Args:
        variances: One a metric; those with no degrees of freedom, or of equal values, say nothing.
        before: Stays where too few metrics show the level.
        below: Part of each variance that is of the levels below.
        floor: Least relative standard deviation that is believed.
    """
    shown = [one for one in variances if one.degrees_of_freedom > 0 and one.value > _EQUAL**2]
    if len(shown) < _ENOUGH_METRICS:
        return before
    common = common_variance(shown)
    deviation = math.sqrt(max(common.value - below, floor**2))
    worth = min(max(common.degrees_of_freedom, LEAST_DEGREES_OF_FREEDOM), MOST_DEGREES_OF_FREEDOM)
    return Level(deviation=float(f"{deviation:.3g}"), worth=float(f"{worth:.3g}"), origin=origin)


def common_variance(variances: Sequence[Variance]) -> Variance:
    """Fit the distribution that variances of a kind come from, by the moments of their logarithms.

    s² = s0² F(d, d0): s0² is the kind's variance, d0 what it is worth (Smyth 2004, section 6.2). Variances that differ
    no more than chance makes them give an infinite worth.

    Args:
        variances: Two or more, each above zero.
    """
    halves = [one.degrees_of_freedom / 2 for one in variances]
    logs = [math.log(one.value) - digamma(half) + math.log(half) for one, half in zip(variances, halves, strict=True)]
    excess = variance(logs) - fmean(trigamma(half) for half in halves)
    if excess <= 0:
        return Variance(value=math.exp(fmean(logs)), degrees_of_freedom=math.inf)
    half = inverse_trigamma(excess)
    return Variance(value=math.exp(fmean(logs) + digamma(half) - math.log(half)), degrees_of_freedom=2 * half)


def digamma(x: float) -> float:
    """Return the logarithmic derivative of the gamma function at x > 0 (Abramowitz & Stegun, 6.3.5 and 6.3.18).

    >>> round(digamma(1.0), 6)
    -0.577216
    """
    shift = 0.0
    while x < 10:
        shift -= 1 / x
        x += 1
    square = x**-2
    return shift + math.log(x) - 1 / (2 * x) - square * (1 / 12 - square * (1 / 120 - square * (1 / 252)))


def trigamma(x: float) -> float:
    """Return the derivative of digamma at x > 0 (Abramowitz & Stegun, 6.4.6 and 6.4.12).

    >>> round(trigamma(1.0), 6)
    1.644934
    """
    shift = 0.0
    while x < 10:
        shift += x**-2
        x += 1
    square = x**-2
    return shift + 1 / x + square / 2 + square / x * (1 / 6 - square * (1 / 30 - square * (1 / 42)))


def inverse_trigamma(y: float) -> float:
    """Return the x > 0 at which trigamma is y > 0, by Newton's steps on 1/trigamma (Smyth 2004, appendix)."""
    x = 0.5 + 1 / y
    for _ in range(50):
        tri = trigamma(x)
        # the derivative of trigamma, by a difference: good for the step, whose end does not depend on it
        slope = (trigamma(x * (1 + 1e-5)) - tri) / (x * 1e-5)
        step = tri * (1 - tri / y) / slope
        x += step
        if abs(step) < 1e-9 * x:
            break
    return x
