"""Baselines, the sessions accepted as good: what an update does with each verdict, and what nothing measures any more.

Pure but for the reading in `plan` and `unused`.
"""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.baseline_file import (
    LARGEST_NUMBER,
    baseline_path,
    dumps,
    environment_key,
    parse,
    read,
    read_bytes,
)
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import (
    SCHEMA,
    BaselineFile,
    BaselineRun,
    Measurement,
    MetricBaseline,
    Record,
    RunInfo,
    Session,
    TestKey,
    TestRecord,
    Verdict,
    configuration_differences,
)

#: Sessions of an epoch that are kept: the first ones hold the epoch where it began, so that drift shows.
FIRST_SESSIONS, LAST_SESSIONS = 5, 15

#: A test and one of its metrics.
Entry = tuple[TestKey, str]


class Change(Record, frozen=True, kw_only=True):
    """What an update does, or refuses to do, with one metric, and why."""

    key: TestKey
    metric: str
    action: Literal["recorded", "accepted", "refused"]
    reason: str
    can_be_accepted: bool = False


class FileChange(Record, frozen=True, kw_only=True):
    """One file as it is (`None`: not there yet) and as it will be."""

    path: Path
    old: bytes | None
    new: bytes


class Plan(Record, frozen=True, kw_only=True):
    """What an update would do: the files that change, and the fate of every metric measured."""

    files: tuple[FileChange, ...]
    changes: tuple[Change, ...]


def _empty(record: TestRecord) -> BaselineFile:
    return BaselineFile(schema=SCHEMA, module=record.key.module, environments={}, tests={})


def _checked_reason(reason: str) -> str:
    if not reason.strip():
        raise UsageError("Accepting needs a reason, such as --gpuperf-accept 'slower on purpose: exact softmax'.")
    return reason.strip()


def _epoch(run: RunInfo, record: TestRecord, measurement: Measurement, *, reason: str | None = None) -> MetricBaseline:
    session = Session(
        date=run.date,
        visit=run.visit,
        devices=record.devices,
        environment=environment_key(record.environment),
        commit=run.commit,
        runs=_baseline_runs(run, record, measurement.metric),
    )
    return MetricBaseline(
        unit=measurement.unit,
        better=measurement.better,
        kind=measurement.kind,
        method=measurement.method,
        configuration=measurement.configuration,
        sessions=(session,),
        reason=reason,
    )


def _baseline_runs(run: RunInfo, record: TestRecord, metric: str) -> tuple[BaselineRun, ...]:
    """All runs of a metric; those in further processes are numbered from 2."""
    return tuple(
        replace(_sound_run(record, measurement), run_id=run.run_id if number == 1 else f"{run.run_id}-{number}")
        for number, measurement in enumerate(record.runs_of(metric), start=1)
    )


def _sound_run(record: TestRecord, measurement: Measurement) -> BaselineRun:
    if not 0 < measurement.value <= LARGEST_NUMBER:
        raise UsageError(
            f"{measurement.metric} of {record.key} is {measurement.value:g} {measurement.unit}: "
            "only a finite number above zero can be a baseline."
        )
    return baseline_run(measurement)


def baseline_run(measurement: Measurement) -> BaselineRun:
    """Keep of a measurement what later ones are compared with."""
    telemetry = measurement.telemetry
    return BaselineRun(
        value=measurement.value,
        spread=measurement.spread,
        sm_clock_mhz=telemetry.sm_clock_mhz if telemetry else None,
        power_w=telemetry.power_w if telemetry else None,
        gpu_busy_share=measurement.gpu_busy_share,
        points=measurement.curve.points if measurement.curve else None,
    )


def _appended(file: BaselineFile, run: RunInfo, record: TestRecord, measurement: Measurement) -> MetricBaseline:
    """Add a value to its epoch; runs of the last session's visit, devices and environment join that session."""
    new = _epoch(run, record, measurement)
    old = file.tests.get(record.key.test, {}).get(measurement.metric)
    if old is None:
        return new
    if (old.unit, old.better, old.method) != (new.unit, new.better, new.method):
        raise UsageError(
            f"{measurement.metric} of {record.key} is now in {new.unit!r} ({new.better} is better; {new.method}), its "
            f"baseline in {old.unit!r} ({old.better} is better; {old.method}). {_how_to_accept(record)}"
        )
    if differences := configuration_differences(new.configuration, old.configuration):
        raise UsageError(
            f"{measurement.metric} of {record.key} was measured with another configuration than its baseline: "
            f"{'; '.join(differences)}. {_how_to_accept(record)}"
        )
    here = [session for session in old.sessions if sorted(session.devices) == sorted(record.devices)]
    if any(known.run_id == run.run_id for session in here for known in session.runs):
        return old  # recording a run again must not make it look like two that agree
    *before, last = old.sessions
    joined = replace(last, runs=last.runs + new.sessions[0].runs)
    sessions = (*before, joined) if _is_same_visit(last, new.sessions[0]) else (*before, last, *new.sessions)
    # A setting that one run does not name is still that of the others.
    configuration = {**(old.configuration or {}), **(new.configuration or {})} or None
    return replace(new, sessions=_thinned(sessions), configuration=configuration, reason=old.reason)


def _is_same_visit(one: Session, other: Session) -> bool:
    same_place = (one.visit, one.environment) == (other.visit, other.environment)
    return same_place and sorted(one.devices) == sorted(other.devices)


def _thinned(sessions: tuple[Session, ...]) -> tuple[Session, ...]:
    if len(sessions) <= FIRST_SESSIONS + LAST_SESSIONS:
        return sessions
    return sessions[:FIRST_SESSIONS] + sessions[-LAST_SESSIONS:]


def _with_epochs(file: BaselineFile, record: TestRecord, epochs: dict[str, MetricBaseline]) -> BaselineFile:
    environments = {environment_key(record.environment): record.environment, **file.environments}
    tests = {**file.tests, record.key.test: {**file.tests.get(record.key.test, {}), **epochs}}
    return _tidied(replace(file, environments=environments, tests=tests))


def _tidied(file: BaselineFile) -> BaselineFile:
    epochs = [epoch for metrics in file.tests.values() for epoch in metrics.values()]
    used = {session.environment for epoch in epochs for session in epoch.sessions}
    return replace(file, environments={key: file.environments[key] for key in sorted(used)})


def plan(root: Path, run: RunInfo, records: Sequence[TestRecord], *, accept_reason: str | None) -> Plan:
    """Work out what an update would do, without doing it.

    NEW, PASS and INCONCLUSIVE metrics are recorded. REGRESSED, IMPROVED and INCOMPARABLE ones, and INCONCLUSIVE ones
    beyond their tolerance, need a reason, which begins a new epoch. INVALID ones, ones without a verdict and those of
    a failed test are refused.

    Args:
        root: Folder of all baselines.
        run: The process that measured.
        records: What it measured, judged.
        accept_reason: Why values that are not the baseline's are right; `None` accepts none.

    Raises:
        BaselineError: A file that would change cannot be read.
        UsageError: The reason is empty.
    """
    reason = None if accept_reason is None else _checked_reason(accept_reason)
    files: list[FileChange] = []
    changes: list[Change] = []
    for path, group in sorted(_by_path(root, records).items()):
        old = read_bytes(path)
        before = file = None if old is None else parse(old, path, group[0].key.module)
        for record in group:
            file, made = _applied(file, run, record, reason)
            changes += made
        if file is not None and file is not before and (new := dumps(file)) != old:
            files.append(FileChange(path=path, old=old, new=new))
    return Plan(files=tuple(files), changes=tuple(changes))


def _by_path(root: Path, records: Sequence[TestRecord]) -> dict[Path, list[TestRecord]]:
    groups: dict[Path, list[TestRecord]] = {}
    for record in records:
        groups.setdefault(baseline_path(root, record.slug, record.key.module), []).append(record)
    return groups


def _applied(
    file: BaselineFile | None, run: RunInfo, record: TestRecord, reason: str | None
) -> tuple[BaselineFile | None, list[Change]]:
    after = file or _empty(record)
    epochs: dict[str, MetricBaseline] = {}
    changes: list[Change] = []
    for measurement in record.measurements:
        change = _decided(record, measurement.metric, reason)
        try:
            if change.action == "recorded":
                epochs[change.metric] = _appended(after, run, record, measurement)
            elif change.action == "accepted":
                epochs[change.metric] = _epoch(run, record, measurement, reason=reason)
        except UsageError as error:  # one metric that cannot be kept must not cost the others of a long run
            change = replace(change, action="refused", reason=str(error))
        changes.append(change)
    return (_with_epochs(after, record, epochs) if epochs else file), changes


def _decided(record: TestRecord, metric: str, reason: str | None) -> Change:
    verdict = next((verdict for verdict in record.verdicts if verdict.metric == metric), None)
    if verdict is None:
        return Change(key=record.key, metric=metric, action="refused", reason="it has no verdict")
    if refusal := _refusal(record, verdict, reason):
        can = record.passed and _needs_reason(verdict)
        return Change(key=record.key, metric=metric, action="refused", reason=refusal, can_be_accepted=can)
    if reason and _needs_reason(verdict):
        return Change(key=record.key, metric=metric, action="accepted", reason=reason)
    return Change(key=record.key, metric=metric, action="recorded", reason=verdict.reason)


def _refusal(record: TestRecord, verdict: Verdict, reason: str | None) -> str | None:
    if not record.passed:
        return "the test failed: mend it, then update"
    if verdict.status == "INVALID":
        return f"invalid: {verdict.reason}"
    if _needs_reason(verdict) and not reason:
        return verdict.status.lower() + (" and beyond its tolerance" if verdict.status == "INCONCLUSIVE" else "")
    return None


def _needs_reason(verdict: Verdict) -> bool:
    if verdict.is_host_limited and verdict.status != "INCOMPARABLE":
        return False  # what the host does to such a metric is its usual noise, for better or worse
    if verdict.status == "INCONCLUSIVE":  # recorded, slowdowns too small to be sure of would become the usual noise
        return verdict.is_beyond_tolerance
    return verdict.status in ("REGRESSED", "IMPROVED", "INCOMPARABLE")


def _how_to_accept(record: TestRecord) -> str:
    return f"accept it with: gpuperf baseline accept --reason WHY {shlex.quote(str(record.key))}"


def unused(root: Path, slug: str, seen: Collection[Entry], modules: Collection[str]) -> tuple[Entry, ...]:
    """List the baselines that nothing measured any more.

    Args:
        root: Folder of all baselines.
        slug: Kind of device.
        seen: What was measured.
        modules: Test modules that were run in full; the others are not looked at.

    Raises:
        BaselineError: A file of these modules cannot be read.
    """
    measured = set(seen)
    files = ((module, read(baseline_path(root, slug, module), module=module)) for module in sorted(modules))
    return tuple(entry for module, file in files if file for entry in entries_of(file) if entry not in measured)


def entries_of(file: BaselineFile) -> tuple[Entry, ...]:
    """List what a file has baselines of, sorted."""
    return tuple(
        (TestKey(module=file.module, test=test), metric)
        for test in sorted(file.tests)
        for metric in sorted(file.tests[test])
    )


def without(file: BaselineFile, doomed: Collection[Entry]) -> BaselineFile:
    """Take some baselines, and the environments that only they refer to, out of a file."""
    tests: dict[str, dict[str, MetricBaseline]] = {}
    for key, metric in entries_of(file):
        if (key, metric) not in doomed:
            tests.setdefault(key.test, {})[metric] = file.tests[key.test][metric]
    return _tidied(replace(file, tests=tests))
