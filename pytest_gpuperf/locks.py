"""Locks of files by `flock`: the kernel frees one when the last process that has it open is gone, however it went.

A descriptor that a command inherits holds the lock as its parent's does. A fork lets go of its own: it would hold the
lock for as long as it lives. Lock files are never removed: whoever waits for one may have it open already.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from pytest_gpuperf.errors import DeviceError

#: A link is refused, because it may lead to a file of somebody else; and no child inherits a lock unasked.
_SAFELY = os.O_NOFOLLOW | os.O_CLOEXEC
#: Descriptors of locks that this process has open: a fork copies them all, and hooks of `os` take no arguments.
_ours: set[int] = set()


def try_lock(path: Path, stack: contextlib.ExitStack, *, is_shared: bool = False) -> int | None:
    """Lock a file, made if it is not there, until the stack closes.

    Args:
        path: In a folder that is there.
        stack: Closes what was opened, after a failure, too.
        is_shared: Hold it together with others that share it.

    Returns:
        The descriptor, or `None` where somebody else holds it.

    Raises:
        DeviceError: It is no file, or not ours to open, or its disk knows no locks.
    """
    while True:
        descriptor = _opened(path)
        stack.callback(os.close, descriptor)
        stack.callback(_ours.discard, descriptor)
        _ours.add(descriptor)
        if not _flock(path, descriptor, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX):
            return None
        if _is_at(path, descriptor):  # else something that tidies up has removed it meanwhile
            with contextlib.suppress(OSError):  # such goes by age, and shared locks are never written to
                os.utime(descriptor)
            return descriptor


def adopt(descriptor: int) -> None:
    """Treat a lock that this process inherited as its own: no command inherits it unasked, and a fork lets go of it."""
    os.set_inheritable(descriptor, False)
    _ours.add(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock alone, found out by sharing it for a moment.

    Raises:
        DeviceError: It is no file, or not ours to open.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | _SAFELY)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _refusal(path, error) from None
        stack.callback(os.close, descriptor)
        return not _flock(path, descriptor, fcntl.LOCK_SH)


def _let_go() -> None:
    """Point a fork's copies elsewhere: their numbers stay taken, for whoever in the fork closes them yet."""
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    while _ours:  # none is ours any more: whatever has such a number later is something else
        os.dup2(nothing, _ours.pop(), inheritable=False)
    os.close(nothing)


os.register_at_fork(after_in_child=_let_go)


def _opened(path: Path) -> int:
    # O_CREAT by itself is refused for a file of another user in a folder like /tmp (fs.protected_regular).
    try:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | _SAFELY)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY, 0o666)
            os.fchmod(descriptor, 0o666)  # whatever the umask: who shares the folder shares its locks
            return descriptor
        return os.open(path, os.O_RDWR | _SAFELY)
    except OSError as error:
        raise _refusal(path, error) from None


def _flock(path: Path, descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _refusal(path, error) from None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refusal(path: Path, error: OSError) -> DeviceError:
    if error.errno == errno.ELOOP:
        return DeviceError(f"{path} is a link, and a lock must be a file: somebody put it there. Remove it.")
    return DeviceError(
        f"{path} cannot be locked: {error.strerror}. Set GPUPERF_LOCK_DIR to a folder on a local disk that you may "
        "write to."
    )
