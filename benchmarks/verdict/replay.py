"""Recordings of unchanged code on real GPUs, judged against each other.

Each recording is one visit to one GPU. Its runs are judged in groups in order of time, the first run after the last one
following the end; the groups overlap, so that the counts say what happens, not how often to the last digit.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.verdict import rules
from benchmarks.verdict.simulate import BASELINE_RUNS, CURRENT_RUNS, verdict_of
from benchmarks.verdict.tally import Tally
from pytest_gpuperf.judge import CONFIRMED, judge
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

EFFECTS = (0.0, 0.03, 0.05, 0.1)
#: Runs of a visit below which no group and baseline can be made of it.
LEAST_RUNS = BASELINE_RUNS + 3
_METHOD = Method(clock="wall", mode="recorded")
_ENVIRONMENT = Environment(hardware=Hardware(name="recorded", memory_bytes=80_000_000_000))


class Visit(Record, frozen=True, kw_only=True):
    """The runs of one test in one recording.

    Attributes:
        times: One a run, in order, in any unit; a rate is its inverse.
    """

    name: str
    test: str
    device: str
    times: tuple[float, ...]


class Case(Record, frozen=True, kw_only=True):
    """A group of runs, and the visits that it is judged against."""

    now: tuple[float, ...]
    device: str
    visit: str
    baseline: tuple[Visit, ...]


def read_visits(paths: Iterable[Path]) -> list[Visit]:
    """Read every run of unchanged code, as benchmarks/goals.py writes them."""
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for path in sorted(paths):
        recording = json.loads(path.read_text())
        for run in (*recording["baseline"], *recording["same"]):
            for test, result in run["tests"].items():
                found.setdefault((path.stem, test), []).append(("+".join(result["device"]), _time(result)))
    return [
        Visit(name=name, test=test, device=runs[0][0], times=tuple(time for _, time in runs))
        for (name, test), runs in found.items()
    ]


def _time(result: dict[str, float | None]) -> float:
    """A time, or the inverse of a rate."""
    return result.get("time_s") or 1 / result["value"]  # type: ignore[operator]


def same_visit(visit: Visit) -> Iterator[Case]:
    """Judge up to six runs in a row against the three runs before them."""
    count = len(visit.times)
    for start in range(count):
        runs = tuple(visit.times[(start + i) % count] for i in range(min(CURRENT_RUNS, count - BASELINE_RUNS)))
        before = tuple(visit.times[start - i] for i in range(BASELINE_RUNS, 0, -1))
        yield Case(
            now=runs,
            device=visit.device,
            visit=visit.name,
            baseline=(Visit(name=visit.name, test=visit.test, device=visit.device, times=before),),
        )


def other_visits(visit: Visit, others: Sequence[Visit]) -> Iterator[Case]:
    """Judge up to six runs in a row against the first three of each other visit: a GPU never seen."""
    count = len(visit.times)
    baseline = tuple(
        Visit(name=other.name, test=other.test, device=other.device, times=other.times[:BASELINE_RUNS])
        for other in others
        if other.device != visit.device
    )
    for start in range(count if baseline else 0):
        runs = tuple(visit.times[(start + i) % count] for i in range(min(CURRENT_RUNS, count)))
        yield Case(now=runs, device=visit.device, visit=visit.name, baseline=baseline)


def replay(visits: Sequence[Visit]) -> list[Tally]:
    """Judge every visit against itself and against the others, unchanged and slowed down."""
    tallies: list[Tally] = []
    for visit in visits:
        if len(visit.times) < LEAST_RUNS:
            continue
        others = [other for other in visits if other.test == visit.test and other.name != visit.name]
        for where, cases in (("same visit", same_visit(visit)), ("unseen GPU", other_visits(visit, others))):
            told = list(cases)
            if told:
                name = f"{where}: {visit.test}, {visit.name}"
                tallies += [tally for effect in EFFECTS for tally in _tallies(name, visit.test, told, effect)]
    return tallies


def kind_and_tolerance(test: str) -> tuple[Kind, float]:
    """What benchmarks/suite says of its tests; of others, the kind that no library knows more of."""
    known: dict[str, tuple[Kind, float]] = {
        "test_matmul_8192": ("compute", 0.02),
        "test_matmul_4096": ("compute", 0.02),
        "test_matmul_2048": ("compute", 0.02),
        "test_copy": ("memory", 0.01),
        "test_softmax": ("compute", 0.01),
        "test_add_1024": ("compute", 0.03),
    }
    return known.get(test, ("end-to-end", 0.05))


def _tallies(name: str, test: str, cases: Sequence[Case], effect: float) -> Iterator[Tally]:
    ends = [_our_verdict(case, test, effect) for case in cases]
    yield Tally(
        scenario=name,
        rule="gpuperf",
        effect=effect,
        trials=len(ends),
        red=sum(verdict.status == "REGRESSED" for verdict, _ in ends),
        judged=len(ends),
        inconclusive=sum(verdict.status == "INCONCLUSIVE" for verdict, _ in ends),
        low_power=sum(verdict.is_low_power for verdict, _ in ends),
        runs=sum(runs for _, runs in ends),
    )
    alarms = [_their_alarms(case, effect) for case in cases]
    for rule in alarms[0]:
        red = sum(alarm[rule] for alarm in alarms)
        yield Tally(scenario=name, rule=rule, effect=effect, trials=len(alarms), red=red)


def _our_verdict(case: Case, test: str, effect: float) -> tuple[Verdict, int]:
    baseline, runs = _baseline(case, test), _measurements(case, test, effect)
    return verdict_of(
        lambda count, look: judge(
            runs[:count],
            baseline,
            environments={"there": _ENVIRONMENT},
            environment=_ENVIRONMENT,
            devices=(case.device,),
            visit=case.visit,
            look=look,
            spending=CONFIRMED,
        ),
        len(runs),
    )


def _baseline(case: Case, test: str) -> MetricBaseline:
    sessions = tuple(
        Session(
            date="2026-11-21",
            visit=visit.name,
            devices=(visit.device,),
            environment="there",
            runs=tuple(BaselineRun(value=time) for time in visit.times),
        )
        for visit in case.baseline
    )
    kind, _ = kind_and_tolerance(test)
    return MetricBaseline(unit="s", better="lower", kind=kind, method=_METHOD, sessions=sessions)


def _measurements(case: Case, test: str, effect: float) -> list[Measurement]:
    kind, tolerance = kind_and_tolerance(test)
    return [
        Measurement(
            metric="time",
            value=time * (1 + effect),
            unit="s",
            better="lower",
            kind=kind,
            method=_METHOD,
            tolerance=tolerance,
        )
        for time in case.now
    ]


def _their_alarms(case: Case, effect: float) -> dict[str, bool]:
    """The rules on values of runs, as a tool would see them that reads one figure a run.

    NVBench compares two processes; three values a side stand in for its samples. asv can say nothing of so few.
    """
    now = np.array(case.now) * (1 + effect)
    past = np.concatenate([visit.times for visit in case.baseline])
    last = np.array(case.baseline[-1].times)
    alarms = {
        "pytest-benchmark 5%": rules.pytest_benchmark(last[-1], now[0], percent=5),
        "pytest-benchmark 10%": rules.pytest_benchmark(last[-1], now[0], percent=10),
        "github-action-benchmark 200%": rules.github_action_benchmark(last[-1], now[0]),
        "Bencher t 0.99": rules.bencher_t(past, now[0]),
        "NVBench robust": rules.nvbench_robust(last, now[:BASELINE_RUNS]),
        "fixed 5% on all runs": rules.fixed_limit(past, now, percent=5),
    }
    return {rule: bool(alarm) for rule, alarm in alarms.items()}
