"""Start a command as a shell does, in a process group of its own, and wait with an ear for signals."""

import contextlib
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping

from pytest_gpuperf.errors import GpuperfError
from pytest_gpuperf.processes import is_running, parent_of

#: What a shell answers for a command that it cannot find, or not run.
NOT_FOUND, NOT_STARTED = 127, 126
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: These are a command's too; what they mean to it is not known here. Slurm warns with SIGUSR1 that time is nearly up.
_COMMANDS = (*_ENDING, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_WAKING = (signal.SIGCHLD, signal.SIGCONT)


class CannotStart(GpuperfError):
    """A command that does not exist or may not be run.

    Attributes:
        code: Exit code that a shell gives.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def caught_signals(*, has_command: bool = False) -> Iterator[Callable[[float], list[int]]]:
    """Catch what ends a process or says that a child has ended, and with a command all that may be meant for it.

    Yields a function that sleeps for some seconds or until a signal comes, and says which came. A signal that this
    process was started to ignore, as under nohup, is left alone.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    caught = (*(_COMMANDS if has_command else _ENDING), *_WAKING)
    wanted = [number for number in caught if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in wanted}
    # A byte a signal, written as it comes: none is lost between looking and sleeping.
    before_writing = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def sleep(seconds: float) -> list[int]:
        # Ten times a second: what is not there is not asked for.
        ready, _, _ = select.select([reading], [], [], max(seconds, 0.0))
        return list(os.read(reading, 4096)) if ready else []

    try:
        yield sleep
    finally:
        signal.set_wakeup_fd(before_writing)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def is_ending(number: int) -> bool:
    """Whether a signal asks a process to end."""
    return number in _ENDING


def is_for_command(number: int) -> bool:
    """Whether a signal is to be sent on to the command."""
    return number in _COMMANDS


class Command:
    """A command that runs, with the terminal if we had it: Ctrl-C is then the command's, and so is Ctrl-Z.

    Args:
        words: Program and arguments.
        environment: Its variables.

    Attributes:
        pid: Of the process, and of its group.
        code: Exit code as a shell gives it, once it has ended: 128 and the signal's number if one ended it.

    Raises:
        CannotStart: There is no such program, or it may not be run.
    """

    def __init__(self, words: tuple[str, ...], environment: Mapping[str, str] = os.environ) -> None:
        self.code: int | None = None
        self._terminal = _terminal()
        sys.stdout.flush()
        try:
            self.pid = os.posix_spawnp(
                words[0], words, environment, setpgroup=0, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
            )
        except (FileNotFoundError, ValueError):  # the latter: an empty name
            message = f"{shlex.quote(words[0])}: there is no such command. Is it installed, and on the PATH?"
            raise CannotStart(message, NOT_FOUND) from None
        except OSError as error:
            raise CannotStart(f"{words[0]} cannot be started: {error.strerror}.", NOT_STARTED) from None
        self._give_terminal(self.pid)

    def forward(self, number: int) -> None:
        """Send a signal to the command and all of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def has_ended(self) -> bool:
        """Look whether it has ended. One that Ctrl-Z stopped stops us as well, and goes on with us."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if pid and os.WIFSTOPPED(status):
                self._stop_with_it()
            elif pid:
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code
                self._give_terminal(os.getpgrp())
        return self.code is not None

    def includes(self, pid: int) -> bool:
        """Whether a process is the command, of its group, or started by it."""
        with contextlib.suppress(OSError):
            if os.getpgid(pid) == self.pid:
                return True
        while pid > 1:
            if pid == self.pid:
                return True
            pid = parent_of(pid)
        return False

    def _stop_with_it(self) -> None:
        if self._terminal is None:
            return  # somebody else stopped it, and will let it go on
        self._give_terminal(os.getpgrp())
        os.kill(0, signal.SIGTSTP)  # here we stand until the shell says fg
        self._give_terminal(self.pid)
        self.forward(signal.SIGCONT)

    def _give_terminal(self, group: int) -> None:
        if self._terminal is None:
            return
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # what a process in the background gets for this
        with contextlib.suppress(OSError):
            os.tcsetpgrp(self._terminal, group)
        signal.signal(signal.SIGTTOU, before)
        if group == self.pid:
            self.forward(signal.SIGCONT)  # it may have asked for input too early, and been stopped for it


def is_stranger(pid: int, command: Command) -> bool:
    """Whether a process is not the command's. A container sees the host's numbers: those of nobody here count not."""
    return is_running(pid) and not command.includes(pid)


def _terminal() -> int | None:
    """Our standard input, if it is a terminal and we are in its foreground."""
    try:
        return 0 if os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp() else None
    except OSError:
        return None
