"""Exclusive use of devices across the workers of a run and across separate runs on one host.

One process at a time holds the queue lock while it takes all the devices it needs, so nobody ever holds one and waits
for another, and a test that needs eight GPUs is not overtaken for ever by tests that need one. The locks are `flock`s:
the kernel frees them when a process dies.
"""

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError, LeaseTimeout

#: How long a test waits for devices that others hold.
TIMEOUT_S = 3600.0
#: Fixed, because runs by ssh, cron and CI have other temporary folders and must exclude each other all the same.
_SHARED_FOLDER = Path("/tmp")  # noqa: S108 - the folder in it is checked to be the user's own
_POLL_S = 0.05


def lock_folder() -> Path:
    """Folder of the lock files: `$GPUPERF_LOCK_DIR`, else one per user in /tmp.

    Runs of different users exclude each other only where an administrator gives them one folder by `GPUPERF_LOCK_DIR`.

    Raises:
        DeviceError: The folder belongs to somebody else or is a link, so its locks could be tampered with.
    """
    named = os.environ.get("GPUPERF_LOCK_DIR")
    if named:
        try:
            Path(named).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError(f"GPUPERF_LOCK_DIR={named} is not a folder to lock in: {error.strerror}.") from None
        return Path(named)
    folder = _SHARED_FOLDER / f"gpuperf-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise DeviceError(f"The lock folder {folder} is not a folder of yours. Remove it or set GPUPERF_LOCK_DIR.")
    return folder


@contextlib.contextmanager
def lease(
    sets: Sequence[tuple[Device, ...]], *, folder: Path | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[tuple[Device, ...]]:
    """Hold one set of devices exclusively: all of it or nothing.

    Args:
        sets: Those that would do, in order of preference; at least one.
        folder: Where the lock files are; `None`: `lock_folder()`.
        timeout_s: How long to wait for others.

    Raises:
        LeaseTimeout: None became free in time; the message names who held them last.
    """
    folder = folder or lock_folder()
    end_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as held:
        with contextlib.ExitStack() as queue:
            while not _try_lock(folder / "queue.lock", queue):
                _wait_until(end_s, folder / "queue.lock", sets)
            _sign(folder / "queue.lock")
            while (taken := _take_any(sets, folder, held)) is None:
                _wait_until(end_s, _first_held(sets[0], folder), sets)
            for device in taken:
                _sign(_lock_path(folder, device))
        yield taken


def _take_any(
    sets: Sequence[tuple[Device, ...]], folder: Path, held: contextlib.ExitStack
) -> tuple[Device, ...] | None:
    """Lock the first set that is free as a whole."""
    for devices in sets:
        with contextlib.ExitStack() as attempt:
            if all(_try_lock(_lock_path(folder, device), attempt) for device in devices):
                held.push(attempt.pop_all())
                return devices
    return None


def _try_lock(path: Path, stack: contextlib.ExitStack) -> bool:
    from filelock import FileLock, Timeout

    options: dict[str, Any] = (
        {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock).parameters else {}
    )
    lock = FileLock(path, thread_local=False, mode=0o666, **options)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:  # the latter is filelock's word for no flock here
        raise DeviceError(
            f"{path} cannot be locked: {error}. Set GPUPERF_LOCK_DIR to a folder on a local disk."
        ) from error
    stack.callback(lock.release)
    return True


def _sign(path: Path) -> None:
    """Write down who holds a lock, for whoever waits for it; renamed, because the last one may be another user's."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(f"pid {os.getpid()}, {os.environ.get('PYTEST_CURRENT_TEST', 'no test')}\n")
    temporary.replace(path.with_suffix(".holder"))


def _first_held(devices: tuple[Device, ...], folder: Path) -> Path:
    paths = [_lock_path(folder, device) for device in devices]
    with contextlib.ExitStack() as stack:
        return next((path for path in paths if not _try_lock(path, stack)), paths[0])


def _wait_until(end_s: float, path: Path, sets: Sequence[tuple[Device, ...]]) -> None:
    if time.monotonic() >= end_s:
        holder = path.with_suffix(".holder")
        who = holder.read_text().strip() if holder.exists() else "nobody known"
        names = ", ".join(sorted({device.name for devices in sets for device in devices}))
        raise LeaseTimeout(f"No device became free in time ({names}). Last holder: {who}. Wait for it or end it.")
    time.sleep(_POLL_S)


def _lock_path(folder: Path, device: Device) -> Path:
    return folder / f"device-{device.uuid_hash}.lock"
