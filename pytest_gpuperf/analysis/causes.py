"""The causes of a test's regressions: what is known of both sides, put together for `explain`."""

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from pytest_gpuperf.analysis.explain import Condition, explain
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.records import (
    BaselineFile,
    KernelSummary,
    Measurement,
    MetricBaseline,
    TestKey,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.stats import mean_of_known
from pytest_gpuperf.units import is_of_time

#: Profiles by test and metric.
Profiles = Mapping[tuple[TestKey, str], KernelSummary]
#: Modes of numbers that a test took itself, perhaps of a region where the GPU idled.
_OF_TESTS = ("recorded", "curve")
#: What was stored with a metric's baseline.
Stored = Callable[[str], KernelSummary | None]


def explained(record: TestRecord, file: BaselineFile | None, profiles: Profiles, stored: Stored) -> TestRecord:
    """Return the record with the causes of what is REGRESSED.

    Args:
        record: Judged.
        file: Baselines of its module.
        profiles: What ran now.
        stored: Gives what ran when a metric's baseline was recorded.
    """
    baselines = file.tests.get(record.key.test, {}) if file else {}
    verdicts = tuple(
        replace(verdict, causes=_causes(record, verdict, baselines[verdict.metric], profiles, stored))
        if verdict.status == "REGRESSED" and verdict.metric in baselines
        else verdict
        for verdict in record.verdicts
    )
    return replace(record, verdicts=verdicts)


def _causes(
    record: TestRecord, verdict: Verdict, baseline: MetricBaseline, profiles: Profiles, stored: Stored
) -> tuple[str, ...]:
    if not is_of_time(baseline.unit):  # what kernels and clocks do says nothing of bytes and shares
        return ()
    now, then = _sides(record, verdict.metric, profiles, stored)
    runs = record.runs_of(verdict.metric)
    found = explain(
        now,
        then,
        slower=verdict.change or 0.0,
        condition=Condition(sm_clock_mhz=_clock_mhz(runs[1:] or runs)),
        usual=Condition(sm_clock_mhz=_usual_clock_mhz(baseline)),
    )
    return tuple(map(str, found))


def _sides(
    record: TestRecord, metric: str, profiles: Profiles, stored: Stored
) -> tuple[KernelSummary | None, KernelSummary | None]:
    """Both profiles of a metric; of a test's own number those of any other, too: of an engine, one stands for all.

    Of an engine of another configuration it does not.
    """
    own = next(measurement for measurement in record.measurements if measurement.metric == metric)
    alike = [one.metric for one in record.measurements if _configuration(one) == _configuration(own)]
    others = alike if own.method.mode in _OF_TESTS else []
    for name in (metric, *others):
        try:
            now, then = profiles.get((record.key, name)), stored(name)
        except BaselineError:  # what cannot be read explains nothing, and is no reason for silence on the regression
            return None, None
        if now and then:
            return now, then
    return None, None


def _configuration(measurement: Measurement) -> dict[str, str]:
    """What was configured, whether one number was measured or a curve."""
    configuration = measurement.configuration or {}
    return {name: value for name, value in configuration.items() if name != "curve over"}


def _clock_mhz(runs: Sequence[Measurement]) -> float | None:
    """Mean SM clock of what was measured by us; a test's own number may be of a region where the GPU idled."""
    return mean_of_known(
        run.telemetry.sm_clock_mhz or None for run in runs if run.telemetry and run.method.mode not in _OF_TESTS
    )


def _usual_clock_mhz(baseline: MetricBaseline) -> float | None:
    if baseline.method.mode in _OF_TESTS:
        return None
    return mean_of_known(run.sm_clock_mhz or None for run in baseline.runs)
