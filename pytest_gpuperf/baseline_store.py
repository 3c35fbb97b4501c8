"""The baselines on disk: the lock, and the old file or the new one, whatever dies meanwhile.

Writing goes by lock, temporary file in the same folder, fsync and rename.
"""

import errno
import os
import secrets
import shlex
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any

from pytest_gpuperf.baseline_file import baseline_path, dumps, error_text, read
from pytest_gpuperf.baselines import Change, Entry, entries_of, plan, without
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.kernel_store import kernels_path, prune_kernels, with_kernels
from pytest_gpuperf.records import KernelRecord, RunInfo, TestRecord

LOCK_TIMEOUT_S = 60.0
STALE_TEMPORARY_S = 3600.0


def write(
    root: Path,
    run: RunInfo,
    records: Sequence[TestRecord],
    *,
    accept_reason: str | None,
    profiles: Sequence[KernelRecord] = (),
) -> tuple[Change, ...]:
    """Do what `plan` says, with the files as they are once the lock is held. The arguments are those of `plan`.

    The kernels beside the baselines are kept in step: see `kernel_store.with_kernels`. What was not measured is never
    touched. Files are replaced one by one: if one fails, those before it (by path) are updated and it is not.

    Args:
        root: See `plan`.
        run: See `plan`.
        records: See `plan`.
        accept_reason: See `plan`.
        profiles: What was seen of the metrics.

    Raises:
        BaselineError: A file cannot be read, locked or written. The old one is intact unless the message says not.
        UsageError: The reason is empty.
    """
    made = with_kernels(plan(root, run, records, accept_reason=accept_reason), root, run, records, profiles)
    if not made.files:  # a read-only checkout is fine where there is nothing to write
        return made.changes
    with _locked(root):
        made = with_kernels(plan(root, run, records, accept_reason=accept_reason), root, run, records, profiles)
        for change in made.files:
            _replace(change.path, change.new)
    return made.changes


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
        for module in modules:
            _prune_kernels(root, slug, module, doomed)
        return sum(_prune_file(baseline_path(root, slug, module), module, doomed) for module in modules)


def _prune_kernels(root: Path, slug: str, module: str, doomed: set[Entry]) -> None:
    path = kernels_path(root, slug, module)
    kept = prune_kernels(path, module, doomed)
    if kept:
        _replace(path, kept)
    elif kept is not None:
        _remove(path)


def _prune_file(path: Path, module: str, doomed: set[Entry]) -> int:
    file = read(path, module=module)
    removed = doomed.intersection(entries_of(file)) if file else set()
    if not file or not removed:
        return 0
    kept = without(file, removed)
    if kept.tests:
        _replace(path, dumps(kept))
    else:
        _remove(path)
    return len(removed)


def write_file(root: Path, path: Path, data: bytes) -> None:
    """Write a file that belongs to the baselines, such as what was learned from them, under their lock.

    Args:
        root: Folder of all baselines.
        path: The file.
        data: All of it.

    Raises:
        BaselineError: It cannot be locked or written. An old one is intact unless the message says not.
    """
    with _locked(root):
        _replace(path, data)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    from filelock import FileLock

    path = root / ".gpuperf.lock"
    # filelock 4.2 falls back to a lock file that outlives its owner where there is no flock, 3.x does not.
    is_optional = "fallback_to_soft" in signature(FileLock.__init__).parameters
    options: dict[str, Any] = {"fallback_to_soft": False} if is_optional else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        ignored = root / ".gitignore"
        if not ignored.exists():
            ignored.write_text(".gitignore\n.gpuperf.lock\n.tmp-*\n")
        lock = FileLock(path, timeout=LOCK_TIMEOUT_S, **options)
        lock.acquire()
    except TimeoutError:
        raise BaselineError(
            f"Waited {LOCK_TIMEOUT_S:g} s for {path}: another pytest or gpuperf updates baselines there. "
            f"`fuser -v {shlex.quote(str(path))}` names the process; wait for it or end it. No file was changed."
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter is filelock's word for no flock here
        raise BaselineError(
            f"{path} could not be locked: {error_text(error)}. No file was changed. "
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
            f"{path} could not be written: {error_text(error)}. The old file is intact. "
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
            f"{path} is written, but its folder could not be synchronised: {error_text(error)}. It is lost if "
            "the machine loses power now. Check the disk."
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
