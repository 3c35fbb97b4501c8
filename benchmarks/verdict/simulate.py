"""Our rule, which is the package's own `judge`, and the others on the same simulated runs.

A baseline is some sessions of three runs; what is judged is one further session of up to six. Looks are taken as
`confirm` takes them. Priors are either the package's, or learned as `gpuperf baseline learn` does from a suite of 50
metrics of the same noise.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal

import numpy as np
from msgspec.structs import replace

from benchmarks.verdict import rules
from benchmarks.verdict.noise import Noise, draw, run_logs
from benchmarks.verdict.tally import METRICS_OF_A_RUN, Tally
from pytest_gpuperf.judge import ALPHA, CONFIRMED, ENOUGH_SESSIONS, LOOKS, alpha_of, is_settled, judge
from pytest_gpuperf.priors import Priors, learn, package_priors
from pytest_gpuperf.records import (
    BaselineRun,
    Environment,
    Hardware,
    Kind,
    Measurement,
    Method,
    MetricBaseline,
    Record,
    Session,
    Verdict,
)
from pytest_gpuperf.stats import Variance, normal_quantile

#: Runs of each session of a baseline, and most runs of the one that is judged.
BASELINE_RUNS, CURRENT_RUNS = 3, LOOKS[-1]
#: Runs in all that the default budget pays for, three times the first one's duration.
BUDGET_RUNS = 4
_METHOD = Method(clock="cuda-events", mode="sustained")
_ENVIRONMENT = Environment(hardware=Hardware(name="simulated", memory_bytes=80_000_000_000))

Judge = Callable[[int, int], Verdict]


class Variant(Record, frozen=True, kw_only=True):
    """How our rule is applied.

    Attributes:
        priors: Learned from a suite of this noise, or the package's.
        metrics: Of the run; they share the chance of a false alarm.
        runs: At the last look.
    """

    priors: Literal["learned", "package"] = "learned"
    metrics: int = 1
    runs: int = LOOKS[-1]

    @property
    def name(self) -> str:
        """As it stands in the tallies."""
        return f"gpuperf {self.priors} {self.metrics} {self.runs}"


LEARNED = tuple(
    Variant(metrics=metrics, runs=runs) for runs in (CURRENT_RUNS, BUDGET_RUNS) for metrics in (1, METRICS_OF_A_RUN)
)
PACKAGE = tuple(replace(variant, priors="package") for variant in LEARNED)


class Scenario(Record, frozen=True, kw_only=True):
    """Runs that are drawn, and how many.

    Attributes:
        kind: Of the metric; selects the package's prior.
        devices: Device of each session of the baseline, numbered from 0.
        device: Of the judged session.
        nulls: Repetitions without a change; of these, `judged` are followed to their end whatever they show.
        powered: Repetitions with each of the `effects`.
        suite_every: Repetitions without a change that share one learned suite; too many, and one suite decides.
    """

    name: str
    noise: Noise
    kind: Kind
    devices: tuple[int, ...] = (0,) * ENOUGH_SESSIONS
    device: int = 0
    tolerance: float = 0.02
    nulls: int
    judged: int
    powered: int
    effects: tuple[float, ...] = (0.03, 0.05, 0.1)
    variants: tuple[Variant, ...] = LEARNED
    suite_every: int = 1000

    @property
    def sessions(self) -> int:
        """Of the baseline."""
        return len(self.devices)


class Task(Record, frozen=True, kw_only=True):
    """A part of a scenario's repetitions with a seed of its own, so that the result depends on no order."""

    scenario: Scenario
    part: int
    seed: int
    nulls: int
    judged: int
    powered: int


def tasks(scenario: Scenario, seed: int) -> list[Task]:
    """Cut a scenario into parts, each with a suite of its own; what is judged to the end is spread over all of them."""
    parts = max(round(scenario.nulls / scenario.suite_every), 1)

    def share(total: int, part: int) -> int:
        return total * (part + 1) // parts - total * part // parts

    return [
        Task(
            scenario=scenario,
            part=part,
            seed=seed,
            nulls=share(scenario.nulls, part),
            judged=share(scenario.judged, part),
            powered=share(scenario.powered, part),
        )
        for part in range(parts)
    ]


def simulate(task: Task) -> list[Tally]:
    """Draw and judge one part."""
    scenario = task.scenario
    random = np.random.default_rng([task.seed, zlib.crc32(scenario.name.encode()), task.part])
    everywhere = np.array([*scenario.devices, scenario.device])
    shape = (max(task.nulls, task.powered), scenario.sessions + 1, CURRENT_RUNS)
    iterations = draw(scenario.noise, shape, random, devices=everywhere)
    logs = run_logs(iterations)
    past, now = logs[:, :-1, :BASELINE_RUNS], logs[:, -1]
    priors = {"learned": learned_priors(scenario, random), "package": package_priors()}
    tallies = list(_null_tallies(task, past[: task.nulls], now[: task.nulls], priors))
    for effect in scenario.effects:
        tallies += _power_tallies(task, effect, past[: task.powered], now[: task.powered], priors)
    for effect, count in ((0.0, task.nulls), *((effect, task.powered) for effect in scenario.effects)):
        tallies += _their_tallies(scenario.name, effect, iterations[:count])
    return tallies


def learned_priors(scenario: Scenario, random: np.random.Generator) -> Priors:
    """Learn as a user would, from the committed baselines of a suite of this noise."""
    shape = (METRICS_OF_A_RUN, scenario.sessions, BASELINE_RUNS)
    logs = run_logs(draw(scenario.noise, shape, random, devices=np.array(scenario.devices)))
    suite = [_baseline(scenario, metric) for metric in logs]
    return learn(suite, before=package_priors(), is_cpu=False, origin="simulated")


def verdict_of(judge_at: Judge, most_runs: int) -> tuple[Verdict, int]:
    """Look as `confirm` does: more runs while a verdict is open, and a REGRESSED must be seen twice.

    Args:
        judge_at: Judges the first so many runs at a look: `judge_at(runs, look)`.
        most_runs: At the last look; no fewer than at the one before.

    Returns:
        The verdict and the runs that it took.
    """
    for look, runs in enumerate((*LOOKS[:-1], most_runs), start=1):
        verdict = judge_at(runs, look)
        if is_settled(verdict, look):
            break
    return verdict, verdict.runs


def can_be_red(past: np.ndarray, now: np.ndarray, *, margin: float, session: Variance) -> np.ndarray:
    """Say which repetitions can end REGRESSED at all: most need not be judged to know that they do not.

    A later look must see more than the tolerance, and more than the normal quantile times a standard error that is
    never smaller than what the prior alone leaves of the variance between sessions. Holds for sessions on one device
    with as many runs each: then the baseline's estimate is their mean.

    Args:
        past: Logarithms of the baseline: [repetitions, sessions, runs].
        now: Of what is judged: [repetitions, runs].
        margin: Logarithm of one plus the tolerance.
        session: The prior's variance between sessions.
    """
    # a later look judges the runs after the first; all runs are bounded, too, so that this holds if it judged those
    means = [now[:, first:runs].mean(axis=1) for first in (0, 1) for runs in (LOOKS[1], BUDGET_RUNS, CURRENT_RUNS)]
    seen = np.max(means, axis=0)
    quantile = normal_quantile(1 - max(CONFIRMED[1:]) * ALPHA)
    possible = np.zeros(len(past), bool)
    for sessions in {past.shape[1], min(past.shape[1], ENOUGH_SESSIONS)}:
        least = session.value * session.degrees_of_freedom / (session.degrees_of_freedom + sessions - 1)
        limit = max(margin, quantile * np.sqrt(least * (1 + 1 / sessions)))
        possible |= seen - past[:, :sessions].mean(axis=(1, 2)) > limit - 1e-9
    return possible


def _null_tallies(task: Task, past: np.ndarray, now: np.ndarray, priors: dict[str, Priors]) -> Iterator[Tally]:
    scenario = task.scenario
    suspects = _suspects(scenario, past, now, priors)
    ends: dict[Variant, list[tuple[Verdict, int]]] = {variant: [] for variant in scenario.variants}
    red = dict.fromkeys(scenario.variants, 0)
    for i in range(len(past)):
        if i < task.judged:
            found = all_verdicts(scenario, past[i], now[i], priors)
            for variant, end in found.items():
                ends[variant].append(end)
            assert suspects[i] or not any(verdict.status == "REGRESSED" for verdict, _ in found.values())
        elif suspects[i]:
            found = all_verdicts(scenario, past[i], now[i], priors, is_only_red=True)
        else:
            continue
        for variant, (verdict, _) in found.items():
            red[variant] += verdict.status == "REGRESSED"
    for variant in scenario.variants:
        yield _tally(scenario, variant, 0.0, ends[variant], red=red[variant], trials=len(past))


def _suspects(scenario: Scenario, past: np.ndarray, now: np.ndarray, priors: dict[str, Priors]) -> np.ndarray:
    if len({*scenario.devices, scenario.device}) > 1:
        return np.ones(len(past), bool)
    sessions = [priors[name][scenario.kind].session.variance for name in {each.priors for each in scenario.variants}]
    margin = float(np.log1p(scenario.tolerance))
    masks = [can_be_red(past, now, margin=margin, session=session) for session in sessions]
    return np.asarray(np.any(masks, axis=0))


def _power_tallies(
    task: Task, effect: float, past: np.ndarray, now: np.ndarray, priors: dict[str, Priors]
) -> Iterator[Tally]:
    scenario = task.scenario
    slower = now + np.log1p(effect)
    found = [all_verdicts(scenario, before, after, priors) for before, after in zip(past, slower, strict=True)]
    for variant in scenario.variants:
        ends = [verdicts[variant] for verdicts in found]
        red = sum(verdict.status == "REGRESSED" for verdict, _ in ends)
        yield _tally(scenario, variant, effect, ends, red=red, trials=len(ends))


def _tally(
    scenario: Scenario,
    variant: Variant,
    effect: float,
    ends: Sequence[tuple[Verdict, int]],
    *,
    red: int,
    trials: int,
) -> Tally:
    return Tally(
        scenario=scenario.name,
        rule=variant.name,
        effect=effect,
        trials=trials,
        red=red,
        judged=len(ends),
        inconclusive=sum(verdict.status == "INCONCLUSIVE" for verdict, _ in ends),
        low_power=sum(verdict.is_low_power for verdict, _ in ends),
        runs=sum(runs for _, runs in ends),
    )


def all_verdicts(
    scenario: Scenario, past: np.ndarray, now: np.ndarray, priors: dict[str, Priors], *, is_only_red: bool = False
) -> dict[Variant, tuple[Verdict, int]]:
    """Judge one repetition in every way.

    Args:
        is_only_red: Leave out a variant with more metrics where the one with a single metric settled on something
            else: at a smaller chance of error no look can be REGRESSED that is not so at the larger one. IMPROVED,
            which a smaller chance may leave open, is followed on.
    """
    baseline = _baseline(scenario, past)
    measurements = [_measurement(scenario, log) for log in now]

    @cache
    def at(prior: str, metrics: int, runs: int, look: int) -> Verdict:
        return judge(
            measurements[:runs],
            baseline,
            environments={"here": _ENVIRONMENT},
            environment=_ENVIRONMENT,
            devices=(str(scenario.device),),
            visit="now",
            look=look,
            spending=CONFIRMED,
            alpha=alpha_of(metrics),
            priors=priors[prior],
        )

    found: dict[Variant, tuple[Verdict, int]] = {}
    for variant in sorted(scenario.variants, key=lambda variant: variant.metrics):
        single = Variant(priors=variant.priors, runs=variant.runs)
        is_decided = is_only_red and single in found and found[single][0].status not in ("REGRESSED", "IMPROVED")
        if not is_decided:
            found[variant] = verdict_of(
                lambda runs, look, variant=variant: at(variant.priors, variant.metrics, runs, look),  # type: ignore[misc]
                variant.runs,
            )
    return found


def _baseline(scenario: Scenario, past: np.ndarray) -> MetricBaseline:
    sessions = tuple(
        Session(
            date="2026-11-21",
            visit=str(number),
            devices=(str(device),),
            environment="here",
            runs=tuple(BaselineRun(value=value) for value in values),
        )
        for number, (device, values) in enumerate(zip(scenario.devices, np.exp(past).tolist(), strict=True))
    )
    return MetricBaseline(unit="s", better="lower", kind=scenario.kind, method=_METHOD, sessions=sessions)


def _measurement(scenario: Scenario, log: float) -> Measurement:
    return Measurement(
        metric="time",
        value=float(np.exp(log)),
        unit="s",
        better="lower",
        kind=scenario.kind,
        method=_METHOD,
        tolerance=scenario.tolerance,
    )


def _their_tallies(scenario: str, effect: float, iterations: np.ndarray) -> Iterator[Tally]:
    times = np.exp(iterations[:, :-1, :BASELINE_RUNS])
    current = np.exp(iterations[:, -1]) * (1 + effect)
    for rule, (alarms, runs) in _their_alarms(times, current).items():
        count = len(alarms)
        yield Tally(
            scenario=scenario,
            rule=rule,
            effect=effect,
            trials=count,
            red=int(alarms.sum()),
            judged=count,
            runs=runs * count,
        )


def _their_alarms(past: np.ndarray, now: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Alarms of each rule, and the runs that it looks at.

    Args:
        past: Times of the baseline: [repetitions, sessions, runs, iterations].
        now: Of what is judged: [repetitions, runs, iterations].
    """
    last, first = past[:, -1, -1], now[:, 0]
    last_session, this_session = (part.reshape(len(part), -1) for part in (past[:, -1], now[:, :BASELINE_RUNS]))
    history = past.mean(axis=-1).reshape(len(past), -1)
    all_past, all_now = np.median(past, axis=-1).reshape(len(past), -1), np.median(now, axis=-1)
    means = last.mean(axis=-1), first.mean(axis=-1)
    return {
        "pytest-benchmark min:5%": (rules.pytest_benchmark(last.min(axis=-1), first.min(axis=-1), percent=5), 1),
        "pytest-benchmark mean:10%": (rules.pytest_benchmark(*means, percent=10), 1),
        "github-action-benchmark 200%": (rules.github_action_benchmark(*means), 1),
        "asv, factor 1.1": (rules.asv(last_session, this_session), BASELINE_RUNS),
        "asv, factor 1.05": (rules.asv(last_session, this_session, factor=1.05), BASELINE_RUNS),
        "Bencher t 0.99": (rules.bencher_t(history, means[1]), 1),
        "NVBench robust": (rules.nvbench_robust(last, first), 1),
        "fixed 3% on all runs": (rules.fixed_limit(all_past, all_now, percent=3), CURRENT_RUNS),
        "fixed 5% on all runs": (rules.fixed_limit(all_past, all_now, percent=5), CURRENT_RUNS),
    }


THEIR_RULES = (
    "pytest-benchmark min:5%",
    "pytest-benchmark mean:10%",
    "github-action-benchmark 200%",
    "asv, factor 1.1",
    "asv, factor 1.05",
    "Bencher t 0.99",
    "NVBench robust",
    "fixed 3% on all runs",
    "fixed 5% on all runs",
)


def round_robin(devices: int, sessions: int) -> tuple[int, ...]:
    """Sessions that visit devices in turn."""
    return tuple(itertools.islice(itertools.cycle(range(devices)), sessions))
