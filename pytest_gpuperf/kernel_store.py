"""What ran when a baseline was recorded: `MODULE.kernels.json` beside the baseline file, by the same rules.

It is there to say why something got slower, and is no part of any verdict. Pure but for reading.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from pytest_gpuperf.baseline_file import (
    KERNELS_SUFFIX,
    baseline_path,
    converted,
    encode,
    environment_key,
    parse_as,
    read_bytes,
    tree_of,
)
from pytest_gpuperf.baselines import Change, Entry, FileChange, Plan, plan
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.records import (
    SCHEMA,
    Environment,
    KernelRecord,
    KernelSummary,
    Record,
    RunInfo,
    TestKey,
    TestRecord,
)


class StoredKernels(Record, frozen=True, kw_only=True):
    """What ran in one call of one metric.

    Attributes:
        date: ISO 8601, UTC, of the run that it was profiled in.
        environment: Key into the file's `environments`.
        commit: Git revision of that run.
    """

    date: str
    environment: str
    kernels: KernelSummary
    commit: str | None = None


class KernelsFile(Record, frozen=True, kw_only=True):
    """All that is known of what ran in the metrics of one test module on one kind of device.

    Attributes:
        schema: Version of this layout.
        module: See `BaselineFile`.
        environments: See `BaselineFile`.
        tests: Test name -> metric name -> what ran.
    """

    schema: int
    module: str
    environments: dict[str, Environment]
    tests: dict[str, dict[str, StoredKernels]]


def kernels_path(root: Path, slug: str, module: str) -> Path:
    """Say where the kernels of a test module on one kind of device live; see `baseline_path`.

    >>> kernels_path(Path("baselines"), "h100", "perf_tests/test_matmul.py").as_posix()
    'baselines/h100/perf_tests.test_matmul.kernels.json'
    """
    return baseline_path(root, slug, module).with_suffix(KERNELS_SUFFIX)


def read_kernels(path: Path, *, module: str | None = None) -> KernelsFile | None:
    """Read a file of kernels, or nothing where there is none.

    Args:
        path: The file.
        module: The test module that it must belong to, if given.

    Raises:
        BaselineError: There is something, but it is not sound. Says where and what to do.
    """
    raw = read_bytes(path)
    return None if raw is None else parse_as(_decode, raw, path, module)


def kernels_of(root: Path, record: TestRecord, metric: str) -> StoredKernels | None:
    """What ran in a metric when its baseline was recorded; `None` where that is not known.

    Raises:
        BaselineError: The file is there and cannot be trusted.
    """
    return _found(read_kernels(_path(root, record), module=record.key.module), record, metric)


def _found(file: KernelsFile | None, record: TestRecord, metric: str) -> StoredKernels | None:
    return file.tests.get(record.key.test, {}).get(metric) if file else None


def _dumps(file: KernelsFile) -> bytes:
    """Write the file as baselines are written; what could not be read again never is."""
    try:
        return encode(_decode(encode(file)))
    except ValueError as error:
        raise BaselineError(f"What ran in {file.module} cannot be kept: {error}.") from None


def _decode(raw: bytes) -> KernelsFile:
    file = converted(tree_of(raw), KernelsFile, "$")
    for test, metrics in file.tests.items():
        for metric, stored in metrics.items():
            if stored.environment not in file.environments:
                place = f"$.tests[{test!r}][{metric!r}].environment"
                raise ValueError(f"{place} {stored.environment!r} is not in $.environments")
    return file


def with_kernels(
    made: Plan, root: Path, run: RunInfo, records: Sequence[TestRecord], profiles: Sequence[KernelRecord]
) -> Plan:
    """Add to the plan of an update what it does with the kernels.

    A metric that becomes a baseline gets the kernels that were seen of it, if it has none. A new epoch gets those that
    were seen now, or loses what it had: they are of another value.

    Args:
        made: The plan.
        root: Folder of all baselines.
        run: The process that measured.
        records: What it measured.
        profiles: What was seen of it.

    Raises:
        BaselineError: A file that would change cannot be read.
    """
    seen = {(one.key, one.metric): one.kernels for one in profiles}
    by_key = {record.key: record for record in records}
    changes = [one for one in made.changes if one.action != "refused" and one.key in by_key]
    files = list(made.files)
    for path in sorted({_path(root, by_key[one.key]) for one in changes}):
        old = read_bytes(path)
        mine = [one for one in changes if _path(root, by_key[one.key]) == path]
        before = parse_as(_decode, old, path, mine[0].key.module) if old is not None else None
        after = _updated(before, run, mine, by_key, seen)
        new = _dumps(after)
        if (after.tests or before) and new != old:
            files.append(FileChange(path=path, old=old, new=new))
    return replace(made, files=tuple(files))


def _path(root: Path, record: TestRecord) -> Path:
    return kernels_path(root, record.slug, record.key.module)


def _updated(
    file: KernelsFile | None,
    run: RunInfo,
    changes: Sequence[Change],
    records: Mapping[TestKey, TestRecord],
    seen: Mapping[Entry, KernelSummary],
) -> KernelsFile:
    """The file after these changes of one module."""
    tests = {test: dict(metrics) for test, metrics in (file.tests if file else {}).items()}
    environments = dict(file.environments) if file else {}
    for change in changes:
        record, metrics = records[change.key], tests.setdefault(change.key.test, {})
        if _is_new_epoch(change, record):
            metrics.pop(change.metric, None)
        kernels = seen.get((change.key, change.metric))
        if kernels is not None and change.metric not in metrics:
            key = environment_key(record.environment)
            environments[key] = record.environment
            metrics[change.metric] = StoredKernels(date=run.date, environment=key, kernels=kernels, commit=run.commit)
    return _tidied(KernelsFile(schema=SCHEMA, module=changes[0].key.module, environments=environments, tests=tests))


def _is_new_epoch(change: Change, record: TestRecord) -> bool:
    is_new = any(verdict.metric == change.metric and verdict.status == "NEW" for verdict in record.verdicts)
    return change.action == "accepted" or is_new


def _tidied(file: KernelsFile) -> KernelsFile:
    """Without tests that have no metric and environments that nothing refers to."""
    tests = {test: metrics for test, metrics in file.tests.items() if metrics}
    used = {stored.environment for metrics in tests.values() for stored in metrics.values()}
    return replace(file, tests=tests, environments={key: file.environments[key] for key in used})


def without_kernels(root: Path, records: Sequence[TestRecord], *, accept_reason: str | None) -> tuple[Entry, ...]:
    """List what an update would record whose kernels are not known, or are those of an epoch that it ends.

    Args:
        root: Folder of all baselines.
        records: What was measured, judged.
        accept_reason: See `baselines.plan`.

    Raises:
        BaselineError: A file that would change cannot be read.
        UsageError: The reason is empty.
    """
    nobody = RunInfo(schema=SCHEMA, run_id="", date="", visit="")  # the plan is looked at, not carried out
    by_key = {record.key: record for record in records}
    made = plan(root, nobody, records, accept_reason=accept_reason)
    changes = [(one, by_key[one.key]) for one in made.changes if one.action != "refused"]
    modules = {_path(root, record): record.key.module for _, record in changes}
    files = {path: read_kernels(path, module=module) for path, module in modules.items()}
    return tuple(
        (change.key, change.metric)
        for change, record in changes
        if _is_new_epoch(change, record) or _found(files[_path(root, record)], record, change.metric) is None
    )


def prune_kernels(path: Path, module: str, doomed: Collection[Entry]) -> bytes | None:
    """What is to stay of a file: nothing as empty bytes, `None` where it is to be left alone.

    Raises:
        BaselineError: It cannot be read.
    """
    file = read_kernels(path, module=module)
    if file is None:
        return None
    kept = {
        test: {
            metric: one for metric, one in metrics.items() if (TestKey(module=module, test=test), metric) not in doomed
        }
        for test, metrics in file.tests.items()
    }
    if kept == file.tests:
        return None
    tidied = _tidied(replace(file, tests=kept))
    return encode(tidied) if tidied.tests else b""
