"""How often `gpuperf ab` is wrong, and what it catches, by simulation: no GPU, a minute or two.

    python benchmarks/ab_simulation.py [--repetitions 100000] [--pairs 7] [--tolerance 0.03] [--jobs 2]

A run's value is what the visit does (the same for both sides, so it cancels), the process's own deviation, and the mean
of 30 iterations. It prints for each kind of noise the share of repetitions that end SLOWER if nothing changed, at a
slowdown of 3 % and of 5 %, and how many pairs that took; then what the prior and the tolerance are worth.
"""

import argparse
import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from pytest_gpuperf.trials.paired import alpha_of_look, compare_pairs, looks

ITERATIONS = 30
#: Of `end-to-end`, as data/priors.json has it.
PRIOR_SD, PRIOR_DOF = 0.015, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of noise, as relative standard deviations, and how it is judged."""

    name: str
    session: float
    process: float
    iteration: float
    pair: float = 0.0  # shared by the two runs of a pair: neighbours on the host that come and go
    drift_a_pair: float = 0.0
    is_heavy_tailed: bool = False
    slowdown: float = 0.0
    tolerance: float = 0.03
    prior_sd: float = PRIOR_SD
    prior_dof: float = PRIOR_DOF
    pairs: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What came out: counts of decisions, and pairs run in all."""

    decisions: Counter[str]
    pairs: int

    @property
    def repetitions(self) -> int:
        """How many."""
        return self.decisions.total()

    def share(self, decision: str) -> str:
        """A share in per cent with its Monte-Carlo standard error; of no cases, the 95 % upper limit (rule of 3)."""
        count, total = self.decisions[decision], self.repetitions
        if not count:
            return f"< {300 / total:.4f} %"
        share = count / total
        return f"{share:.3%} ±{math.sqrt(share * (1 - share) / total):.3%}"


SERVING = Case(name="serving", session=0.02, process=0.015, iteration=0.03)
CASES = (
    SERVING,
    Case(name="quiet", session=0.007, process=0.003, iteration=0.004),
    Case(name="pool", session=0.05, process=0.015, iteration=0.02),
    replace(SERVING, name="serving, heavy tails (t, 3 dof)", is_heavy_tailed=True),
    replace(SERVING, name="serving, drift 1 % a pair", drift_a_pair=0.01),
    replace(SERVING, name="serving, pairs share 2 %", pair=0.02),
)


def run_logs(case: Case, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the runs of both sides, each [count, pairs]."""

    def noise(deviation: float, *shape: int) -> np.ndarray:
        if case.is_heavy_tailed:
            return deviation / math.sqrt(3) * generator.standard_t(3, size=shape)  # of variance 1 before
        return deviation * generator.normal(size=shape)

    shape = (count, case.pairs)
    shared = noise(case.session, count, 1) + noise(case.pair, *shape)
    base, head = (
        shared + noise(case.process, *shape) + noise(case.iteration / math.sqrt(ITERATIONS), *shape) for _ in range(2)
    )
    place = np.arange(case.pairs)
    late = place % 2  # A B, B A, ...: where A comes second
    base = base + case.drift_a_pair * (place + late / 2)
    head = head + case.drift_a_pair * (place + (1 - late) / 2) + math.log1p(case.slowdown)
    return base, head


def decide(base: list[float], head: list[float], case: Case) -> tuple[str, int]:
    """Look as `gpuperf ab` does, until it is decided."""
    for look in looks(case.pairs):
        found = compare_pairs(
            base[:look],
            head[:look],
            margin=math.log1p(case.tolerance),
            alpha=alpha_of_look(look, case.pairs),
            prior_sd=case.prior_sd,
            prior_dof=case.prior_dof,
        )
        if found.is_decided:
            break
    return found.decision, found.pairs


def simulate(case: Case, repetitions: int, seed: int) -> Tally:
    """Many comparisons of one case."""
    base, head = run_logs(case, repetitions, np.random.default_rng(seed))
    ends = [decide(before, after, case) for before, after in zip(base.tolist(), head.tolist(), strict=True)]
    return Tally(decisions=Counter(decision for decision, _ in ends), pairs=sum(pairs for _, pairs in ends))


def line(case: Case, tally: Tally) -> str:
    """One line of the output."""
    return (
        f"{case.name:<34} {case.slowdown:>4.0%}  SLOWER {tally.share('SLOWER'):<18} SAME {tally.share('SAME'):<18} "
        f"UNDECIDED {tally.share('UNDECIDED'):<18} {tally.pairs / tally.repetitions:.1f} pairs"
    )


def questions(pairs: int, tolerance: float) -> list[tuple[Case, bool]]:
    """All cases, and whether each needs all repetitions, because what it counts is rare."""
    cases = [replace(case, pairs=pairs, tolerance=tolerance) for case in CASES]
    asked = [(replace(case, slowdown=slowdown), not slowdown) for case in cases for slowdown in (0.0, 0.03, 0.05)]
    serving = cases[0]
    for worth in (1.0, 4.0, 8.0):
        named = replace(serving, name=f"serving, prior worth {worth:g}", prior_dof=worth)
        asked += [(named, True), (replace(named, slowdown=0.05), False)]
    wrong = replace(serving, name="serving, prior of a tenth", prior_sd=PRIOR_SD / 10)
    asked += [(wrong, True), (replace(wrong, slowdown=0.05), False)]
    narrow = replace(serving, name="serving, no tolerance to speak of", tolerance=1e-4)
    asked += [(narrow, True)]
    wide = replace(serving, name="serving, tolerance 5 %", tolerance=0.05)
    asked += [(wide, True), (replace(wide, slowdown=0.05), False), (replace(wide, slowdown=0.08), False)]
    return asked


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    asked = questions(chosen.pairs, chosen.tolerance)
    counts = [chosen.repetitions if is_rare else max(chosen.repetitions // 5, 1) for _, is_rare in asked]
    cases = [case for case, _ in asked]
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for case, tally in zip(cases, pool.map(simulate, cases, counts, range(len(cases))), strict=True):
            print(line(case, tally), flush=True)


if __name__ == "__main__":
    main()
