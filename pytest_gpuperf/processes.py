"""Run a command in a process group of its own, with a time limit, so that nothing it started is left behind."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_gpuperf.records import Record

#: How long a group may take to end after SIGTERM before it is killed.
_GRACE_S = 5.0
#: How long a killed one may take to be gone: one that waits for a GPU that fell off the bus never is.
_KILLED_S = 10.0
_TAIL_BYTES = 4000


class Finished(Record, frozen=True, kw_only=True):
    """How a command ended.

    Attributes:
        code: Exit code; negative: the signal that ended it; `None`: it ran into the time limit.
        tail: The last of what it printed, both streams together.
    """

    code: int | None
    tail: str

    @property
    def in_words(self) -> str:
        """`ended with exit code 3`, `was ended by SIGKILL`, `did not end in time`."""
        if self.code is None:
            return "did not end in time and was killed"
        if self.code < 0:
            known = {one.value: one.name for one in signal.Signals}
            return f"was ended by {known.get(-self.code, f'signal {-self.code}')}"
        return f"ended with exit code {self.code}"


def is_running(pid: int) -> bool:
    """Whether there is such a process, of any user: /proc may hide those of others (hidepid), signal 0 does not."""
    if pid <= 0:  # to the system these are groups
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def parent_of(pid: int) -> int:
    """Look up the parent of a process; 0: it has none that is seen here, or has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in status.splitlines() if row.startswith("PPid:")), 0)


def run_group(
    command: Sequence[str],
    *,
    timeout_s: float,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (),
) -> Finished:
    """Run a command to its end. Its whole process group is ended when it ends, when time is up, and on Ctrl-C.

    Args:
        command: Program and arguments.
        timeout_s: Most seconds to wait.
        folder: Working directory.
        environment: Its whole environment; default: this process's.
        descriptors: It inherits these: what a lease holds, so that it stays held while the command lives.

    Raises:
        OSError: The program cannot be started.
    """
    with tempfile.TemporaryFile() as output:  # a pipe would fill up, or stay open in a grandchild
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=tuple(descriptors),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(size - _TAIL_BYTES, 0))
        return Finished(code=code, tail=output.read().decode(errors="replace"))


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of the group: politely, then for certain."""
    for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _KILLED_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
