"""Counts of what rules said, added up over many tasks, with intervals."""

from collections.abc import Iterable
from functools import reduce

from msgspec.structs import replace
from scipy.stats import beta

from pytest_gpuperf.records import Record

METRICS_OF_A_RUN = 50


class Tally(Record, frozen=True, kw_only=True):
    """What one rule said in one scenario at one slowdown.

    Attributes:
        trials: Repetitions.
        red: Alarms.
        judged: Repetitions whose other outcomes were counted, too.
        inconclusive: INCONCLUSIVE among those.
        low_power: Passed with the mark "low power".
        runs: Runs needed, added up.
    """

    scenario: str
    rule: str
    effect: float
    trials: int
    red: int
    judged: int = 0
    inconclusive: int = 0
    low_power: int = 0
    runs: int = 0

    @property
    def rate(self) -> float:
        """Share of alarms."""
        return self.red / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's exact 95 % interval of the rate (Biometrika 1934, doi 10.1093/biomet/26.4.404)."""
        low = float(beta.ppf(0.025, self.red, self.trials - self.red + 1)) if self.red else 0.0
        missed = self.trials - self.red
        high = float(beta.ppf(0.975, self.red + 1, missed)) if missed else 1.0
        return low, high

    @property
    def mean_runs(self) -> float | None:
        """Runs needed."""
        return self.runs / self.judged if self.judged else None


def of_a_run(rate: float) -> float:
    """Return the chance of any alarm in a run of 50 independent metrics."""
    return float(1 - (1 - rate) ** METRICS_OF_A_RUN)


def percent(fraction: float) -> str:
    """Say a share in per cent with two significant digits."""
    value = 100 * fraction
    return "0" if not value else f"{value:.2g} %" if value < 10 else f"{value:.0f} %"


def summed(tallies: Iterable[Tally]) -> list[Tally]:
    """Add up those of one scenario, rule and slowdown."""
    groups: dict[tuple[str, str, float], list[Tally]] = {}
    for tally in tallies:
        groups.setdefault((tally.scenario, tally.rule, tally.effect), []).append(tally)
    return [reduce(_plus, group) for group in groups.values()]


def _plus(one: Tally, other: Tally) -> Tally:
    return replace(
        one,
        trials=one.trials + other.trials,
        red=one.red + other.red,
        judged=one.judged + other.judged,
        inconclusive=one.inconclusive + other.inconclusive,
        low_power=one.low_power + other.low_power,
        runs=one.runs + other.runs,
    )
