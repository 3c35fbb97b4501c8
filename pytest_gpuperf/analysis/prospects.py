"""What the judge will be able to say of a metric, given its noise: what it sees, and which tolerance that supports.

The judge is asked about imagined baselines of five sessions, each of one run, and new runs against them:

    sees        smallest slowdown told from noise with 80 % power: by one run, and by three runs in fresh processes
    supported   the smallest of `TOLERANCES` with which an unchanged metric passes at its first run 95 times in 100,
                and one slower by twice the tolerance is REGRESSED by its third run 80 times in 100
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import variance
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.judge import CONFIRMED, ENOUGH_SESSIONS, ONCE, judge
from pytest_gpuperf.priors import Priors
from pytest_gpuperf.records import (
    BaselineRun,
    Environment,
    Measurement,
    MetricBaseline,
    Record,
    Session,
    Verdict,
)
from pytest_gpuperf.units import from_worse_log

#: What a tolerance is rounded up to.
TOLERANCES = (
    *(0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7),
)

_PASSES, _CAUGHT, _GAMES = 0.95, 0.8, 200
_HERE = "here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospects:
    """A metric with five sessions of one run each as its baseline, and what the judge says of more runs of it.

    Attributes:
        run: One that was measured.
        middle: Value of the baseline.
        within: Variance between runs, as measured.
        session: Variance between sessions, as usual.
        priors: What the judge knows of noise.
        environment: Where all was measured.
        alpha: Chance of a false REGRESSED.
    """

    run: Measurement
    middle: float
    within: float
    session: float
    priors: Priors
    environment: Environment
    alpha: float

    def supported(self) -> float | None:
        """The smallest tolerance with which unchanged metrics pass at once and slower ones are caught."""
        games = _games(self.within, self.session)
        return next((tolerance for tolerance in TOLERANCES if self._supports(tolerance, games)), None)

    def _supports(self, tolerance: float, games: "Sequence[_Game]") -> bool:
        def passes(game: _Game) -> bool:
            verdict = self._judged(game.baseline, game.runs[:1], look=1, tolerance=tolerance)
            return verdict.status == "PASS" and not verdict.is_low_power

        def is_caught(game: _Game) -> bool:
            slower = tuple(run + math.log1p(2 * tolerance) for run in game.runs)
            return self._judged(game.baseline, slower, look=2, tolerance=tolerance).status == "REGRESSED"

        return _is_mostly(map(passes, games), _PASSES) and _is_mostly(map(is_caught, games), _CAUGHT)

    def sees(self, runs: Literal[1, 3]) -> float | None:
        """Smallest slowdown told from noise: by one run that is judged for good, or by three at the second look."""
        places = [i - (ENOUGH_SESSIONS - 1) / 2 for i in range(ENOUGH_SESSIONS)]
        scale = math.sqrt((self.within + self.session) / variance(places))
        apart = math.sqrt(self.within)
        verdict = self._judged(
            [scale * place for place in places],
            (0.0,) if runs == 1 else (0.0, -apart, apart),
            look=1 if runs == 1 else 2,
            spending=ONCE if runs == 1 else CONFIRMED,
        )
        return verdict.minimum_detectable_effect

    def _judged(
        self,
        baseline: Sequence[float],
        runs: Sequence[float],
        *,
        look: int,
        tolerance: float = 0.5,
        spending: tuple[float, ...] = CONFIRMED,
    ) -> Verdict:
        """Judge runs against sessions of one run each; both are logarithms from the middle, + is worse."""
        return judge(
            [replace(self.run, value=self._value(log), tolerance=tolerance) for log in runs],
            self._baseline(baseline),
            environments={_HERE: self.environment},
            environment=self.environment,
            devices=(_HERE,),
            look=look,
            spending=spending,
            alpha=self.alpha,
            priors=self.priors,
        )

    def _baseline(self, logs: Sequence[float]) -> MetricBaseline:
        run = self.run
        values = [BaselineRun(value=self._value(log), spread=run.spread) for log in logs]
        sessions = tuple(
            Session(date="", visit=str(visit), devices=(_HERE,), environment=_HERE, runs=(value,))
            for visit, value in enumerate(values)
        )
        return MetricBaseline(unit=run.unit, better=run.better, kind=run.kind, method=run.method, sessions=sessions)

    def _value(self, log: float) -> float:
        return self.middle * from_worse_log(log, self.run.better)


class _Game(Record, frozen=True, kw_only=True):
    """A baseline and three runs of an unchanged metric, as chance has them: logarithms from the middle."""

    baseline: tuple[float, ...]
    runs: tuple[float, ...]


def _games(within: float, session: float) -> list[_Game]:
    chance = random.Random(0)  # noqa: S311 - noise, not a secret; the same for every tolerance and every time

    def visit(runs: int) -> tuple[float, ...]:
        level = chance.gauss(0.0, math.sqrt(session))
        return tuple(level + chance.gauss(0.0, math.sqrt(within)) for _ in range(runs))

    def baseline() -> tuple[float, ...]:
        return tuple(log for _ in range(ENOUGH_SESSIONS) for log in visit(1))

    return [_Game(baseline=baseline(), runs=visit(3)) for _ in range(_GAMES)]


def _is_mostly(outcomes: Iterator[bool], share: float) -> bool:
    """Whether that share of the games ends well; gives up as soon as it cannot."""
    failures = 0
    for is_good in outcomes:
        failures += not is_good
        if failures > _GAMES * (1 - share) + 1e-9:
            return False
    return True
