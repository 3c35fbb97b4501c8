"""How noisy is each metric on this machine, and which tolerance does it support? Fresh processes of pytest tell.

The spread of a metric between the processes, averaged with what such metrics usually show, is its noise between runs.
What the judge can make of such noise is in `analysis/prospects.py`.

A calibration is one visit to one machine. Noise between visits and between GPUs is the prior's, not measured.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.analysis.prospects import Prospects
from pytest_gpuperf.curves import at_shared_sizes
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.judge import alpha_of
from pytest_gpuperf.priors import Priors, prior_of
from pytest_gpuperf.processes import Finished, run_group
from pytest_gpuperf.records import (
    Environment,
    Measurement,
    Record,
    TestKey,
    TestRecord,
    decode_lines,
)
from pytest_gpuperf.stats import SessionLogs, Variance, level_squares, variance_components

#: A tolerance that is this many times what the noise supports could be tighter.
ROOMY = 3.0
#: Processes without which no noise is known.
FEWEST_RUNS = 2

#: Exit codes of pytest after which a results file is whole, and after which every other process would end alike.
_GOOD_CODES, _WRONG_ARGUMENTS = (0, 1), (4, 5)

Advice = Literal["fine", "too tight", "could be tighter"]


class Process(Record, frozen=True, kw_only=True):
    """One run of the suite.

    Attributes:
        number: From 1.
        duration_s: Of the whole process.
        problem: Why it does not count; `None` if it does.
        tail: The last of what a process with a problem printed.
        tests: What it measured.
        is_last: No other is worth starting.
    """

    number: int
    duration_s: float
    problem: str | None = None
    tail: str = ""
    tests: tuple[TestRecord, ...] = ()
    is_last: bool = False


class Calibration(Record, frozen=True, kw_only=True):
    """What is known of one metric.

    Attributes:
        value: Geometric mean of the runs, in `unit`.
        runs: Processes that measured it.
        devices: Sets of devices that they measured it on; what these differ by is not part of `between`.
        within: Half the 95 % interval within a run, as a fraction: root mean square of the runs.
        between: Relative standard deviation between runs; `None` if no device was measured twice.
        between_low: Lower end of its 95 % interval.
        between_high: Upper end of it.
        sees_once: Smallest slowdown that one run tells from noise, as a fraction; `None` where `between` is.
        sees_confirmed: The same of three runs, the second look of three.
        tolerance: Of the test now.
        supported: Smallest tolerance that the noise supports; `None` if that is above the largest of `TOLERANCES`.
    """

    key: TestKey
    metric: str
    unit: str
    value: float
    runs: int
    devices: int
    tolerance: float
    within: float | None = None
    between: float | None = None
    between_low: float = 0.0
    between_high: float = math.inf
    sees_once: float | None = None
    sees_confirmed: float | None = None
    supported: float | None = None

    @property
    def advice(self) -> Advice | None:
        """How the tolerance compares with what the noise supports; `None` where that is not known."""
        if self.between is None:
            return None
        if self.supported is None or self.tolerance < self.supported:
            return "too tight"
        return "could be tighter" if self.tolerance >= ROOMY * self.supported else "fine"


def run_processes(arguments: Sequence[str], folder: Path, *, count: int, timeout_s: float) -> Iterator[Process]:
    """Run pytest again and again, each time in a fresh process without any baselines.

    Args:
        arguments: Of pytest.
        folder: An empty folder, thrown away afterwards.
        count: How many processes; fewer if the arguments turn out to be wrong.
        timeout_s: Most seconds for one.
    """
    for number in range(1, count + 1):
        process = _run(arguments, folder / str(number), number, timeout_s)
        yield process
        if process.is_last:
            return


def _run(arguments: Sequence[str], folder: Path, number: int, timeout_s: float) -> Process:
    folder.mkdir()
    results = folder / "results.jsonl"
    # After the user's, because the last one counts. No re-measuring: a run is one process.
    options = [f"--gpuperf-json={results}", f"--gpuperf-baselines={folder / 'baselines'}", "--gpuperf-budget=0"]
    options += ["--gpuperf-missing=pass", "-p", "no:cacheprovider"]
    begin_s = time.monotonic()
    # Before the user's: the anchors are no metrics of the suite, but may be asked for.
    command = [sys.executable, "-m", "pytest", "--gpuperf-anchors=off", *arguments, *options]
    done = run_group(command, timeout_s=timeout_s)
    duration_s = time.monotonic() - begin_s
    problem, tests = _outcome(done, results, timeout_s)
    return Process(
        number=number,
        duration_s=duration_s,
        problem=problem,
        tail=done.tail if problem else "",
        tests=tests,
        is_last=done.code in _WRONG_ARGUMENTS,
    )


def _outcome(done: Finished, results: Path, timeout_s: float) -> tuple[str | None, tuple[TestRecord, ...]]:
    """Why a process does not count, or what it measured."""
    if done.code is None:
        return f"did not end within {timeout_s:g} s and was killed (--timeout)", ()
    if done.code not in _GOOD_CODES:
        return done.in_words, ()
    try:
        with results.open("rb") as file:
            found = decode_lines(file)
    except FileNotFoundError:
        return f"measured nothing ({done.in_words})", ()
    except (UsageError, OSError) as error:
        return f"left results that cannot be read: {error}", ()
    if found.end is None:
        return f"left results without an end ({done.in_words})", ()
    return None, found.tests


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """The values of one metric, and on which devices each was measured."""

    key: TestKey
    slug: str
    environment: Environment
    measurements: list[Measurement] = field(default_factory=list)
    devices: list[tuple[str, ...]] = field(default_factory=list)


def left_out(processes: Sequence[Process]) -> tuple[str, ...]:
    """Say which values do not count: of tests that failed, of a device that was unwell, measured in another way."""
    reasons: list[str] = []
    for process in processes:
        for record in process.tests:
            reasons += [f"run {process.number}, {record.key}: {reason}" for reason in _refusals(record)]
    for runs in _metrics(processes):
        usual, others = _of_one_method(runs.measurements)
        reasons += [
            f"{runs.key} {other.metric}: {other.method}, most runs {usual[0].method}: set its mode" for other in others
        ]
    return tuple(reasons)


def _refusals(record: TestRecord) -> list[str]:
    if not record.passed:
        return ["the test failed"]
    return [f"{v.metric} is INVALID: {v.reason}" for v in record.verdicts if v.status == "INVALID"]


def calibrate(processes: Sequence[Process], priors: Mapping[str, Priors]) -> tuple[Calibration, ...]:
    """Work out the noise of each metric and what it supports.

    Args:
        processes: Those with a problem do not count.
        priors: What is known of noise, for each folder of baselines.
    """
    found = _metrics(processes)
    alpha = alpha_of(len(found))
    return tuple(_calibration(runs, priors[runs.slug], alpha) for runs in found)


def _metrics(processes: Sequence[Process]) -> list[_Runs]:
    found: dict[tuple[str, TestKey, str], _Runs] = {}
    for record in (record for process in processes for record in process.tests if record.passed):
        unwell = {verdict.metric for verdict in record.verdicts if verdict.status == "INVALID"}
        for measurement in record.measurements:
            if measurement.metric not in unwell:
                new = _Runs(key=record.key, slug=record.slug, environment=record.environment)
                runs = found.setdefault((record.slug, record.key, measurement.metric), new)
                runs.measurements.append(measurement)
                runs.devices.append(tuple(sorted(record.devices)))
    return list(found.values())


def _of_one_method(measurements: Sequence[Measurement]) -> tuple[list[Measurement], list[Measurement]]:
    """Those measured in the way that most were, and the others."""
    ways = [(one.unit, one.better, one.method) for one in measurements]
    usual = max(ways, key=ways.count)
    same = [one for one, way in zip(measurements, ways, strict=True) if way == usual]
    return same, [one for one in measurements if one not in same]


def _calibration(runs: _Runs, priors: Priors, alpha: float) -> Calibration:
    runs = dataclasses.replace(runs, measurements=at_shared_sizes(runs.measurements))
    usual, _ = _of_one_method(runs.measurements)
    first = usual[0]
    prior = prior_of(first.kind, is_cpu=runs.environment.hardware.is_cpu, priors=priors)
    sessions = _by_device(runs, usual)
    spreads = [one.spread for one in usual if one.spread is not None]
    known = Calibration(
        key=runs.key,
        metric=first.metric,
        unit=first.unit,
        value=math.exp(fmean(math.log(one.value) for one in usual)),
        runs=len(usual),
        devices=len(sessions),
        tolerance=prior.tolerance if first.tolerance is None else first.tolerance,
        within=math.sqrt(fmean(spread**2 for spread in spreads)) if spreads else None,
    )
    if len(usual) == len(sessions):  # one run on each device says nothing of runs
        return known
    components = variance_components(sessions, prior=prior.variances, floor=prior.floor)
    prospects = Prospects(
        run=replace(first, spread=known.within, telemetry=None, samples_s=()),
        middle=known.value,
        # A run cannot be known better than its own interval says, as in the judge.
        within=max(components.within.value, ((known.within or 0.0) / 2) ** 2),
        session=components.session.value,
        priors=priors,
        environment=runs.environment,
        alpha=alpha,
    )
    return _with_noise(known, level_squares(sessions).within, prospects)


def _by_device(runs: _Runs, usual: Sequence[Measurement]) -> list[SessionLogs]:
    groups: dict[tuple[str, ...], list[float]] = {}
    for measurement, devices in zip(runs.measurements, runs.devices, strict=True):
        if measurement in usual:
            groups.setdefault(devices, []).append(math.log(measurement.value))
    return [SessionLogs(device_group=devices, logs=tuple(logs)) for devices, logs in groups.items()]


def _with_noise(known: Calibration, between: Variance, prospects: Prospects) -> Calibration:
    low, high = deviation_interval(between)
    return replace(
        known,
        between=math.sqrt(between.value),
        between_low=low,
        between_high=high,
        sees_once=prospects.sees(1),
        sees_confirmed=prospects.sees(3),
        supported=prospects.supported(),
    )


def deviation_interval(squared: Variance, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the ends of the interval of a standard deviation, from the chi-square distribution of its square.

    >>> low, high = deviation_interval(Variance(value=1.0, degrees_of_freedom=4))
    >>> round(low, 3), round(high, 3)
    (0.599, 2.874)
    """
    freedom, tail = squared.degrees_of_freedom, (1 - confidence) / 2
    squares = freedom * squared.value
    return (
        math.sqrt(squares / chi_square_quantile(1 - tail, freedom)),
        math.sqrt(squares / chi_square_quantile(tail, freedom)),
    )


def chi_square_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the quantile of the chi-square distribution, by halving an interval around it.

    Args:
        probability: Between 0 and 1, without the ends.
        degrees_of_freedom: Above 0.

    >>> round(chi_square_quantile(0.95, 1), 3)
    3.841
    """
    low, high = 0.0, 1.0
    while _chi_square_probability(high, degrees_of_freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _chi_square_probability(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return high


def _chi_square_probability(x: float, degrees_of_freedom: float) -> float:
    # The lower incomplete gamma function by its series (Abramowitz & Stegun, 6.5.29): all terms are positive.
    half, y = degrees_of_freedom / 2, x / 2
    if y == 0:
        return 0.0
    term = total = 1 / half
    count = half
    while term > total * 1e-17:
        count += 1
        term *= y / count
        total += term
    return min(total * math.exp(half * math.log(y) - y - math.lgamma(half)), 1.0)
