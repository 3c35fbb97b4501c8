"""Baselines: the sessions accepted as good, one JSON file a (kind of device, test module).

Reading trusts nothing: a file that is not sound is a `BaselineError`, never a pass. Deciding (`append`, `accept`,
`plan`) is pure but for the reading. Writing goes by lock, temporary file in the same folder, fsync and rename, so
that a reader sees the old file or the new one, whatever dies meanwhile.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.errors import BaselineError, UsageError
from pytest_gpuperf.records import (
    SCHEMA,
    BaselineFile,
    BaselineRun,
    Environment,
    Measurement,
    MetricBaseline,
    Record,
    RunInfo,
    Session,
    TestKey,
    TestRecord,
    Verdict,
)

#: A larger file is refused unread. 20 sessions take about 8 kB, so this is room for 2,000 metrics in one module.
LARGEST_FILE_BYTES = 16_000_000
#: No number in a baseline is larger: it could not be rounded, squared or summed.
LARGEST_NUMBER = 1e300
#: Sessions of an epoch that are kept: the first ones hold the epoch where it began, so that drift shows.
FIRST_SESSIONS, LAST_SESSIONS = 5, 15
LOCK_TIMEOUT_S = 60.0
STALE_TEMPORARY_S = 3600.0

_PLAIN_SLUG = r"[a-z0-9_](\.?[a-z0-9_+-])*"
_PLAIN_MODULE = r"[a-z0-9_][a-z0-9_-]*(/[a-z0-9_][a-z0-9_-]*)*\.py"
_HASHED = r"-[0-9a-f]{12}(\.py)?\Z"

#: A test and one of its metrics.
Entry = tuple[TestKey, str]
_T = TypeVar("_T")


class Change(Record, frozen=True, kw_only=True):
    """What an update does, or refuses to do, with one metric, and why."""

    key: TestKey
    metric: str
    action: Literal["recorded", "accepted", "refused"]
    reason: str


class FileChange(Record, frozen=True, kw_only=True):
    """One file as it is (`None`: not there yet) and as it will be."""

    path: Path
    old: bytes | None
    new: bytes


class Plan(Record, frozen=True, kw_only=True):
    """What an update would do: the files that change, and the fate of every metric measured."""

    files: tuple[FileChange, ...]
    changes: tuple[Change, ...]


class _Outline(Record, frozen=True, kw_only=True):
    """A file whose parts are not typed yet: converting them one by one is what lets an error name its place."""

    schema: int
    module: str
    environments: dict[str, Any]
    tests: dict[str, dict[str, Any]]


def baseline_path(root: Path, slug: str, module: str) -> Path:
    """Say where the baselines of a test module on one kind of device live.

    Two modules never share a file, on case-insensitive file systems neither, and none lies outside `root/slug`: a
    name that is not plain (lower-case letters, digits, `_`, `-`, of 80 characters at most; a slug may hold `.` and
    `+`) is cleaned and ends in 12 hex digits of the SHA-256 of what it was.

    Args:
        root: Folder of all baselines.
        slug: Kind of device, such as `h100-80gb-hbm3`.
        module: Path of the test module from the root, with `/`.

    >>> baseline_path(Path("baselines"), "h100", "perf_tests/test_matmul.py").as_posix()
    'baselines/h100/perf_tests.test_matmul.json'
    """
    name = _safe_name(module, _PLAIN_MODULE).removesuffix(".py").replace("/", ".")
    return root / _safe_name(slug, _PLAIN_SLUG) / f"{name}.json"


def _safe_name(text: str, plain: str) -> str:
    # A plain name that looks as if it ended in a hash is hashed too, or somebody could aim it at another's file.
    if len(text) <= 80 and re.fullmatch(plain, text) and not re.search(_HASHED, text):
        return text
    readable = re.sub(r"[^A-Za-z0-9_+-]+", ".", text.removesuffix(".py")).strip(".-")[:60]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{readable or 'unnamed'}-{digest}"


def list_files(root: Path) -> tuple[Path, ...]:
    """List the baseline files below `root`, sorted; none where the folder does not exist."""
    return tuple(sorted(path for path in root.glob("[!.]*/[!.]*.json") if path.is_file()))


# Reading


def read(path: Path, *, module: str | None = None) -> BaselineFile | None:
    """Read a baseline file, or nothing where there is none.

    Args:
        path: The file.
        module: The test module that it must belong to, if given.

    Raises:
        BaselineError: There is something, but not a sound baseline. Says where and what to do.
    """
    raw = _read_bytes(path)
    return None if raw is None else _parse(raw, path, module)


def _read_bytes(path: Path) -> bytes | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BaselineError(f"{path} is not a file. Move it away: a baseline belongs there.")
        if status.st_size > LARGEST_FILE_BYTES:
            raise BaselineError(
                f"{path} has {status.st_size / 1e6:.0f} MB, more than the {LARGEST_FILE_BYTES / 1e6:.0f} MB that a "
                f"baseline may have. {_restore(path)}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BaselineError(f"{path} cannot be read: {_text(error)}. Check its permissions and its disk.") from error


def _parse(raw: bytes, path: Path, module: str | None) -> BaselineFile:
    if marker := re.search(rb"^(<{7} |>{7} |={7}$)[^\n]{0,40}", raw, re.MULTILINE):
        line = raw.count(b"\n", 0, marker.start()) + 1
        raise BaselineError(
            f"{path} holds merge markers: {marker[0].decode(errors='replace')!r} in line {line}. Resolve the merge: "
            f"`git checkout --ours -- {shlex.quote(str(path))}` (or --theirs), then run with --gpuperf-update."
        )
    try:
        file = _decode(raw)
    except BaselineError as error:
        raise BaselineError(f"{path} {error}") from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BaselineError(f"{path} is not a sound baseline: {what}. {_restore(path)}") from None
    if module is not None and file.module != module:
        raise BaselineError(f"{path} is the baseline of {file.module!r}, not of {module!r}. {_restore(path)}")
    return file


def _restore(path: Path) -> str:
    return (
        f"Restore it with `git checkout -- {shlex.quote(str(path))}`, "
        "or remove it and record it again with --gpuperf-update."
    )


def _decode(raw: bytes) -> BaselineFile:
    tree = json.loads(raw.decode(), object_pairs_hook=tuple)  # objects as tuples of pairs: a dict hides duplicates
    pairs = tree if isinstance(tree, tuple) else ()
    schema = next((value for key, value in pairs if key == "schema"), None)
    # Before everything else, because whatever a newer file holds that is unknown here is no fault of it.
    if type(schema) is int and schema > SCHEMA:
        raise BaselineError(
            f"was written by a newer pytest-gpuperf (schema {schema}, this version reads {SCHEMA}). "
            "Upgrade with `pip install -U pytest-gpuperf`."
        )
    if type(schema) is not int or schema != SCHEMA:
        raise ValueError(f"$.schema is {schema!r}, not {SCHEMA}")
    return _typed(_plain(tree, "$"))


def _plain(node: object, place: str) -> object:
    if isinstance(node, tuple):
        keys = [key for key, _ in node]
        if repeated := {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else None:
            raise ValueError(f"{place} has the key {min(repeated)!r} twice")
        return {key: _plain(value, _step(place, key)) for key, value in node}
    if isinstance(node, list):
        return [_plain(value, f"{place}[{i}]") for i, value in enumerate(node)]
    if isinstance(node, (int, float)) and not 0 <= node <= LARGEST_NUMBER:  # false for NaN too
        raise ValueError(f"{place} is {node!r}, but no number in a baseline is negative, infinite or NaN")
    return node


def _step(place: str, key: str) -> str:
    return f"{place}.{key}" if key.isidentifier() else f"{place}[{key!r}]"


def _typed(tree: object) -> BaselineFile:
    outline = _converted(tree, _Outline, "$")
    environments = {
        key: _converted(node, Environment, _step("$.environments", key)) for key, node in outline.environments.items()
    }
    tests = {
        test: {
            metric: _metric(node, _step(_step("$.tests", test), metric), environments) for metric, node in nodes.items()
        }
        for test, nodes in outline.tests.items()
    }
    return BaselineFile(schema=SCHEMA, module=outline.module, environments=environments, tests=tests)


def _converted(node: object, kind: type[_T], place: str) -> _T:
    try:
        return msgspec.convert(node, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise ValueError(f"{place}{where.rstrip('`')}: {what}") from None


def _metric(node: object, place: str, environments: Collection[str]) -> MetricBaseline:
    baseline = _converted(node, MetricBaseline, place)
    if not baseline.sessions:
        raise ValueError(f"{place}.sessions is empty")
    for i, session in enumerate(baseline.sessions):
        if session.environment not in environments:
            raise ValueError(f"{place}.sessions[{i}].environment {session.environment!r} is not in $.environments")
        if not session.runs:
            raise ValueError(f"{place}.sessions[{i}].runs is empty")
        if zero := [j for j, run in enumerate(session.runs) if run.value == 0]:
            raise ValueError(f"{place}.sessions[{i}].runs[{zero[0]}].value is 0, and a measured value never is")
    return baseline


# Deciding


def dumps(file: BaselineFile) -> bytes:
    """Write a baseline file as JSON that makes small diffs: sorted, indented, five significant digits, ASCII.

    Raises:
        BaselineError: It could not be read again: a number that is not finite, a value of 0, too many tests.
    """
    try:
        # There and back: what cannot be read is never written, and an int in a float's place becomes a float.
        data = _encode(_decode(_encode(file)))
    except ValueError as error:
        raise BaselineError(f"{file.module} cannot be written as a baseline: {error}.") from None
    if len(data) > LARGEST_FILE_BYTES:
        raise BaselineError(
            f"The baseline of {file.module} would have {len(data) / 1e6:.1f} MB, "
            f"more than {LARGEST_FILE_BYTES / 1e6:.0f} MB. Split the module."
        )
    return data


def _encode(record: Record) -> bytes:
    # ASCII, so that a diff shows what is there: no look-alike letters, no characters that turn the text around.
    return f"{json.dumps(_rounded(msgspec.to_builtins(record)), indent=2, sort_keys=True)}\n".encode()


def _rounded(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _rounded(value) for key, value in node.items() if value is not None}
    if isinstance(node, (list, tuple)):
        return [_rounded(value) for value in node]
    return float(f"{node:.5g}") if isinstance(node, float) else node


def append(file: BaselineFile | None, run: RunInfo, record: TestRecord, metrics: Collection[str]) -> BaselineFile:
    """Add a record's values of some metrics to their epochs.

    A run of the same visit, devices and environment as the metric's last session joins that session. Runs carry no
    id here: the caller answers for not appending the same run twice.

    Args:
        file: The baseline so far; `None` begins one.
        run: The process that measured.
        record: What it measured.
        metrics: Names of the metrics to add.

    Raises:
        UsageError: A metric was not measured, its value is not finite and above zero, or its unit, direction or
            method is not the baseline's.
    """
    file = file or _empty(record)
    chosen = _chosen(record, metrics)
    return _with_epochs(file, record, {each.metric: _appended(file, run, record, each) for each in chosen})


def accept(
    file: BaselineFile | None, run: RunInfo, record: TestRecord, metrics: Collection[str], reason: str
) -> BaselineFile:
    """Begin a new epoch of some metrics, which holds this run alone. The arguments are those of `append`.

    Args:
        file: See `append`.
        run: See `append`.
        record: See `append`.
        metrics: See `append`.
        reason: Why the new value is right; kept with the epoch.

    Raises:
        UsageError: There is no reason, or a metric has no value that can be a baseline.
    """
    reason = _checked_reason(reason)
    chosen = _chosen(record, metrics)
    epochs = {each.metric: _epoch(run, record, each, reason=reason) for each in chosen}
    return _with_epochs(file or _empty(record), record, epochs)


def _empty(record: TestRecord) -> BaselineFile:
    return BaselineFile(schema=SCHEMA, module=record.key.module, environments={}, tests={})


def _checked_reason(reason: str) -> str:
    if not reason.strip():
        raise UsageError("Accepting needs a reason, such as --gpuperf-accept 'slower on purpose: exact softmax'.")
    return reason.strip()


def _chosen(record: TestRecord, metrics: Collection[str]) -> tuple[Measurement, ...]:
    if missing := set(metrics) - {measurement.metric for measurement in record.measurements}:
        raise UsageError(f"{record.key} did not measure {', '.join(sorted(missing))}.")
    return tuple(measurement for measurement in record.measurements if measurement.metric in metrics)


def _epoch(run: RunInfo, record: TestRecord, measurement: Measurement, *, reason: str | None = None) -> MetricBaseline:
    session = Session(
        date=run.date,
        visit=run.visit,
        devices=record.devices,
        environment=_environment_key(record.environment),
        commit=run.commit,
        runs=(_baseline_run(record, measurement),),
    )
    return MetricBaseline(
        unit=measurement.unit,
        better=measurement.better,
        kind=measurement.kind,
        method=measurement.method,
        sessions=(session,),
        reason=reason,
    )


def _baseline_run(record: TestRecord, measurement: Measurement) -> BaselineRun:
    if not 0 < measurement.value <= LARGEST_NUMBER:
        raise UsageError(
            f"{measurement.metric} of {record.key} is {measurement.value:g} {measurement.unit}: "
            "only a finite number above zero can be a baseline."
        )
    telemetry = measurement.telemetry
    return BaselineRun(
        value=measurement.value,
        spread=measurement.spread,
        sm_clock_mhz=telemetry.sm_clock_mhz if telemetry else None,
        power_w=telemetry.power_w if telemetry else None,
    )


def _appended(file: BaselineFile, run: RunInfo, record: TestRecord, measurement: Measurement) -> MetricBaseline:
    new = _epoch(run, record, measurement)
    old = file.tests.get(record.key.test, {}).get(measurement.metric)
    if old is None:
        return new
    if (old.unit, old.better, old.method) != (new.unit, new.better, new.method):
        raise UsageError(
            f"{measurement.metric} of {record.key} is now in {new.unit!r} ({new.better} is better; {new.method}), its "
            f"baseline in {old.unit!r} ({old.better} is better; {old.method}). {_how_to_accept(record)}"
        )
    *before, last = old.sessions
    joined = replace(last, runs=last.runs + new.sessions[0].runs)
    sessions = (*before, joined) if _is_same_visit(last, new.sessions[0]) else (*before, last, *new.sessions)
    return replace(new, sessions=_thinned(sessions), reason=old.reason)


def _is_same_visit(one: Session, other: Session) -> bool:
    same_place = (one.visit, one.environment) == (other.visit, other.environment)
    return same_place and sorted(one.devices) == sorted(other.devices)


def _thinned(sessions: tuple[Session, ...]) -> tuple[Session, ...]:
    if len(sessions) <= FIRST_SESSIONS + LAST_SESSIONS:
        return sessions
    return sessions[:FIRST_SESSIONS] + sessions[-LAST_SESSIONS:]


def _environment_key(environment: Environment) -> str:
    # Converted first, so that 700 W and 700.0 W are one environment.
    same = msgspec.convert(msgspec.to_builtins(environment), Environment)
    return hashlib.sha256(_encode(same)).hexdigest()[:8]


def _with_epochs(file: BaselineFile, record: TestRecord, epochs: dict[str, MetricBaseline]) -> BaselineFile:
    environments = {_environment_key(record.environment): record.environment, **file.environments}
    tests = {**file.tests, record.key.test: {**file.tests.get(record.key.test, {}), **epochs}}
    return _tidied(replace(file, environments=environments, tests=tests))


def _tidied(file: BaselineFile) -> BaselineFile:
    epochs = [epoch for metrics in file.tests.values() for epoch in metrics.values()]
    used = {session.environment for epoch in epochs for session in epoch.sessions}
    return replace(file, environments={key: file.environments[key] for key in sorted(used)})


def plan(root: Path, run: RunInfo, records: Sequence[TestRecord], *, accept_reason: str | None) -> Plan:
    """Work out what an update would do, without doing it.

    NEW, PASS and INCONCLUSIVE metrics are recorded. REGRESSED, IMPROVED and INCOMPARABLE ones need a reason, which
    begins a new epoch. INVALID ones, ones without a verdict and those of a failed test are refused.

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
        old = _read_bytes(path)
        before = file = None if old is None else _parse(old, path, group[0].key.module)
        for record in group:
            file, made = _applied(file, run, record, reason)
            changes += made
        if file is not None and file is not before:
            files.append(FileChange(path=path, old=old, new=dumps(file)))
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
        return Change(key=record.key, metric=metric, action="refused", reason=refusal)
    if reason and _needs_reason(verdict):
        return Change(key=record.key, metric=metric, action="accepted", reason=reason)
    return Change(key=record.key, metric=metric, action="recorded", reason=verdict.reason)


def _refusal(record: TestRecord, verdict: Verdict, reason: str | None) -> str | None:
    has_regressed = any(each.status == "REGRESSED" for each in record.verdicts)
    if not record.passed and not (reason and has_regressed):
        return "the test failed: mend it, then update"
    if verdict.status == "INVALID":
        return f"invalid: {verdict.reason}"
    if _needs_reason(verdict) and not reason:
        return f"{verdict.status.lower()}: {_how_to_accept(record)}"
    return None


def _needs_reason(verdict: Verdict) -> bool:
    return verdict.status in ("REGRESSED", "IMPROVED", "INCOMPARABLE")


def _how_to_accept(record: TestRecord) -> str:
    return f"accept it with: gpuperf baseline accept --reason WHY {shlex.quote(str(record.key))}"


# Writing


def write(root: Path, run: RunInfo, records: Sequence[TestRecord], *, accept_reason: str | None) -> tuple[Change, ...]:
    """Do what `plan` says, with the files as they are once the lock is held. The arguments are those of `plan`.

    What was not measured is never touched. Files are replaced one by one: if one fails, those before it (by path)
    are updated and it is not.

    Raises:
        BaselineError: A file cannot be read, locked or written. The old one is intact unless the message says not.
        UsageError: The reason is empty.
    """
    made = plan(root, run, records, accept_reason=accept_reason)
    if not made.files:  # a read-only checkout is fine where there is nothing to write
        return made.changes
    with _locked(root):
        made = plan(root, run, records, accept_reason=accept_reason)
        for change in made.files:
            _replace(change.path, change.new)
    return made.changes


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
    return tuple(entry for module, file in files if file for entry in _entries(file) if entry not in measured)


def _entries(file: BaselineFile) -> tuple[Entry, ...]:
    return tuple(
        (TestKey(module=file.module, test=test), metric)
        for test in sorted(file.tests)
        for metric in sorted(file.tests[test])
    )


def prune(root: Path, slug: str, entries: Collection[Entry]) -> int:
    """Delete exactly these baselines of one kind of device; a file left without any is removed.

    Returns:
        How many there were to delete.

    Raises:
        BaselineError: A file cannot be read, locked or written. The old one is intact unless the message says not.
    """
    if not entries:
        return 0
    doomed = set(entries)
    modules = sorted({key.module for key, _ in doomed})
    with _locked(root):
        return sum(_prune_file(baseline_path(root, slug, module), module, doomed) for module in modules)


def _prune_file(path: Path, module: str, doomed: set[Entry]) -> int:
    file = read(path, module=module)
    kept = [entry for entry in _entries(file) if entry not in doomed] if file else []
    removed = len(_entries(file)) - len(kept) if file else 0
    if not file or not removed:
        return 0
    tests: dict[str, dict[str, MetricBaseline]] = {}
    for key, metric in kept:
        tests.setdefault(key.test, {})[metric] = file.tests[key.test][metric]
    if tests:
        _replace(path, dumps(_tidied(replace(file, tests=tests))))
    else:
        _remove(path)
    return removed


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    from filelock import FileLock

    path = root / ".gpuperf.lock"
    # filelock 4.2 falls back to a lock file that outlives its owner where there is no flock, 3.x does not.
    is_optional = "fallback_to_soft" in signature(FileLock.__init__).parameters
    options: dict[str, Any] = {"fallback_to_soft": False} if is_optional else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=LOCK_TIMEOUT_S, **options)
        lock.acquire()
    except TimeoutError:
        raise BaselineError(
            f"Waited {LOCK_TIMEOUT_S:g} s for {path}: another pytest or gpuperf updates baselines there. "
            f"`fuser -v {shlex.quote(str(path))}` names the process; wait for it or end it. No file was changed."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise BaselineError(
            f"{path} could not be locked: {_text(error)}. No file was changed. "
            "Updating needs a folder that can be written to, on a file system with flock."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    with _intact(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent)
            _write_synced(temporary, data)
            temporary.replace(path)
        finally:
            _discard(temporary)
    _sync_folders(path)


def _remove(path: Path) -> None:
    with _intact(path):
        path.unlink()
    _sync_folders(path)


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BaselineError(
            f"{path} could not be written: {_text(error)}. The old file is intact. "
            f"Check space and permissions of {path.parent}, then run again."
        ) from error


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folders(path: Path) -> None:
    try:
        for folder in (path.parent, path.parent.parent):
            _sync_folder(folder)
    except OSError as error:
        raise BaselineError(
            f"{path} is written, but its folder could not be synchronised: {_text(error)}. It is lost if the machine "
            "loses power now. Check the disk; running the update again would add the same values twice."
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # network and FUSE file systems that cannot do it for a folder say so
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    # What a killed writer left. Failing to tidy is no reason not to write.
    for leftover in folder.glob(".tmp-*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_TEMPORARY_S:
                leftover.unlink()


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})"
    return str(error)
