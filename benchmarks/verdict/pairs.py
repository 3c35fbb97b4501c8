"""`gpuperf ab` on simulated pairs: runs of both sides in turn in one visit, decided by the package's own rule."""

import math
import zlib

import numpy as np

from benchmarks.verdict import rules
from benchmarks.verdict.noise import draw, run_logs
from benchmarks.verdict.simulate import Scenario, Task, learned_priors
from benchmarks.verdict.tally import Tally
from pytest_gpuperf.priors import Level, package_priors
from pytest_gpuperf.trials.paired import Paired, alpha_of_look, compare_pairs, looks

PAIRS = 7
OURS = ("ab, learned priors", "ab, package priors")
THEIRS = ("asv continuous, factor 1.1", "asv continuous, factor 1.05")


def simulate_pairs(task: Task) -> list[Tally]:
    """Draw one part of a scenario's pairs and decide them."""
    scenario = task.scenario
    random = np.random.default_rng([task.seed, zlib.crc32(f"ab {scenario.name}".encode()), task.part])
    shape = (max(task.nulls, task.powered), 1, 2 * PAIRS)
    iterations = draw(scenario.noise, shape, random, devices=np.array([0]))[:, 0]
    learned = learned_priors(scenario, random)[scenario.kind].within
    priors = dict(zip(OURS, (learned, package_priors()[scenario.kind].within), strict=True))
    tallies = []
    for effect, count in ((0.0, task.nulls), *((effect, task.powered) for effect in scenario.effects)):
        base, head = sides(iterations[:count])
        head = head + math.log1p(effect)
        logs = run_logs(base), run_logs(head)
        followed = count if effect else task.judged
        tallies += [_our_tally(scenario, effect, rule, logs, prior, followed) for rule, prior in priors.items()]
        tallies += _their_tallies(scenario.name, effect, base, head)
    return tallies


def sides(iterations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deal runs in order of time to the two sides: A B, B A, A B, ... [repetitions, pairs, iterations] each."""
    first, second = iterations[:, 0::2], iterations[:, 1::2]
    is_turned = (np.arange(PAIRS) % 2 == 1)[:, None]
    return np.where(is_turned, second, first), np.where(is_turned, first, second)


def decide(base: list[float], head: list[float], *, tolerance: float, prior: Level) -> Paired:
    """Look as `gpuperf ab` does, until it is decided."""
    for look in looks(PAIRS):
        found = compare_pairs(
            base[:look],
            head[:look],
            margin=math.log1p(tolerance),
            alpha=alpha_of_look(look, PAIRS),
            prior_sd=prior.deviation,
            prior_dof=prior.worth,
        )
        if found.is_decided:
            break
    return found


def can_be_slower(base: np.ndarray, head: np.ndarray, margin: float) -> np.ndarray:
    """Say which repetitions can end SLOWER at all: at a look the mean difference must be above the margin."""
    difference = head - base
    return np.asarray(np.max([difference[:, :look].mean(axis=1) for look in looks(PAIRS)], axis=0) > margin - 1e-9)


def _our_tally(
    scenario: Scenario,
    effect: float,
    rule: str,
    logs: tuple[np.ndarray, np.ndarray],
    prior: Level,
    followed: int,
) -> Tally:
    """Decide the first so many repetitions, and of the others those that can end SLOWER."""
    base, head = logs
    chosen = can_be_slower(base, head, math.log1p(scenario.tolerance))
    chosen[:followed] = True
    pairs = zip(base[chosen].tolist(), head[chosen].tolist(), strict=True)
    found = [decide(before, after, tolerance=scenario.tolerance, prior=prior) for before, after in pairs]
    return Tally(
        scenario=scenario.name,
        rule=rule,
        effect=effect,
        trials=len(base),
        red=sum(one.decision == "SLOWER" for one in found),
        judged=followed,
        inconclusive=sum(one.decision == "UNDECIDED" for one in found[:followed]),
        runs=sum(2 * one.pairs for one in found[:followed]),
    )


def _their_tallies(scenario: str, effect: float, base: np.ndarray, head: np.ndarray) -> list[Tally]:
    before, after = (np.exp(side).reshape(len(side), -1) for side in (base, head))
    alarms = (rules.asv(before, after), rules.asv(before, after, factor=1.05))
    return [
        Tally(
            scenario=scenario,
            rule=rule,
            effect=effect,
            trials=len(alarm),
            red=int(alarm.sum()),
            judged=len(alarm),
            runs=2 * PAIRS * len(alarm),
        )
        for rule, alarm in zip(THEIRS, alarms, strict=True)
    ]
