"""The child process that vLLM runs in, seen from outside: time limits, its log, and its end."""

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from pytest_gpuperf.errors import EngineError, EngineOutOfMemory, UsageError
from pytest_gpuperf.processes import Finished
from pytest_gpuperf.workloads.vllm_messages import Command, Refused, Reply, reply_of, to_line

#: How often a wait looks whether the process is still there: its children may hold the pipe open when it is dead.
_LOOK_EVERY_S = 0.2
#: How long killed processes may take to be gone.
_GROUP_S = 5.0
_LINES = 15
_LOG_BYTES = 2_000_000
#: What torch, CUDA and vLLM say when memory does not suffice.
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|No available memory for the cache blocks|DefaultCPUAllocator: can't allocate"
    r"|larger than the available KV cache memory|Free memory on device .* less than desired"
    r"|less than requested memory for kv",
    re.IGNORECASE,
)
#: `(EngineCore pid=1) ERROR 11-21 07:00:00 [core.py:10] ` and terminal colours, which say nothing about the cause.
_PREFIX = re.compile(r"\x1b\[[0-9;]*m|^\s*\([\w ]+pid=\d+\)\s?|(?:ERROR|WARNING|INFO) \d\d-\d\d [\d:]+ \[[^\]]*\]\s?")
_PROCESS = re.compile(r"\([\w ]+pid=\d+\)")
_FRAME = re.compile(r"^\s*File \"([^\"]+)\", line (\d+), in (\S+)")
_CAUSE = re.compile(r"^\s*(?:[\w.]+(?:Error|Exception|Interrupt|Failed)\b|Fatal |Segmentation fault|Killed|CUDA error)")


class HostProcess:
    """A process that answers commands, in a session of its own, with everything it prints in a log.

    Args:
        command: Program and arguments; the number of the pipe that it replies to is appended.
        environment: Its whole environment.
        log: File for both of its streams.
        name: For messages, such as `vLLM 0.26.0 (llama-3-8b)`.
        descriptors: It inherits these: what a lease holds, so that it stays held while the engine lives.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        name: str,
        descriptors: Sequence[int] = (),
    ) -> None:
        self.log = log
        self.name = name
        self.has_failed = False
        self._pending = bytearray()
        self._stage_offset = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        self._reply_fd, child_fd = os.pipe()
        self._command_fd = -1
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [*command, str(child_fd)],
                    env=dict(environment),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(child_fd, *descriptors),
                    start_new_session=True,
                )
        finally:
            os.close(child_fd)
        assert self._process.stdin is not None
        self._command_fd = os.dup(self._process.stdin.fileno())
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        """Of the process, which leads a group of this number."""
        return self._process.pid

    @property
    def is_open(self) -> bool:
        """Whether it may still be asked: a process that died unnoticed may, and says so then."""
        return self._command_fd >= 0

    @property
    def _is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, command: Command, *, stage: str, timeout_s: float) -> Reply:
        """Send a command and wait for the reply. Whatever goes wrong, the process and its group are ended.

        Args:
            command: What to do.
            stage: What it is doing then, for messages: `loading the model`.
            timeout_s: Most seconds to wait.

        Raises:
            UsageError: An argument that it does not know.
            EngineOutOfMemory: The device's memory did not suffice.
            EngineError: It died, hung, or refused, with the lines of its log that say why.
        """
        self._stage_offset = self.log.stat().st_size
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead, which the wait will find
                os.write(self._command_fd, to_line(command))
            reply = self._wait(stage, timeout_s)
        except BaseException:
            self.has_failed = True
            self.kill()
            raise
        if isinstance(reply, Refused):
            self.has_failed = True
            self.kill()
            raise self._refusal(reply, stage)
        return reply

    def _wait(self, stage: str, timeout_s: float) -> Reply:
        begin_s = time.monotonic()
        while not self._pending.endswith(b"\n"):  # one reply a command: a search of all of it each time would be slow
            if time.monotonic() - begin_s > timeout_s:
                raise self._error(
                    f"did not answer within {timeout_s:g} s while {stage}, and was ended with all its processes"
                )
            was_alive = self._is_alive
            if select.select([self._reply_fd], [], [], _LOOK_EVERY_S if was_alive else 0)[0]:
                chunk = os.read(self._reply_fd, 1 << 20)
                self._pending += chunk
                if chunk:
                    continue
                self._await_end()
            if not was_alive or not self._is_alive:
                raise self._error(f"{self._ending} while {stage}, after {time.monotonic() - begin_s:.1f} s")
        line, self._pending = bytes(self._pending[:-1]), bytearray()
        try:
            return reply_of(line)
        except msgspec.DecodeError as error:
            raise self._error(f"answered {line[:80]!r} while {stage}, which is no reply ({error})") from None

    def _await_end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LOOK_EVERY_S)

    @property
    def _ending(self) -> str:
        ending = Finished(code=self._process.returncode, tail="").in_words
        is_killed = self._process.returncode == -signal.SIGKILL
        return f"{ending} (likely by the kernel, for want of memory of the host)" if is_killed else ending

    def _refusal(self, reply: Refused, stage: str) -> UsageError | EngineError:
        if reply.kind == "argument":
            return UsageError(reply.message)
        what = "refused its configuration" if reply.kind == "configuration" else f"failed while {stage}"
        return self._error(f"{what}: {_shortened(reply.message)}", said=reply.message)

    def _error(self, what: str, *, said: str = "") -> EngineError:
        log = self._log_of_stage()
        kind = EngineOutOfMemory if _OUT_OF_MEMORY.search(said) or _OUT_OF_MEMORY.search(log) else EngineError
        lines = [f"  {line}" for line in telling_lines(log)]
        memory = ["It ran out of memory: a smaller batch, model, max_model_len or gpu_memory_utilization needs less."]
        parts = [f"{self.name} {what}.", *(memory if kind is EngineOutOfMemory else [])]
        said_most = ["What its log says:", *lines] if lines else ["Its log says nothing."]
        return kind("\n".join([*parts, *said_most, f"The whole log: {self.log}"]))

    def _log_of_stage(self) -> str:
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._stage_offset, size - _LOG_BYTES))
            return file.read().decode(errors="replace")

    def stop(self, command: Command, *, timeout_s: float) -> str | None:
        """Ask it to end, wait, and end what is left of its group; says what went wrong, or `None`."""
        problem: str | None = None
        if self.is_open:
            try:
                self.ask(command, stage="shutting down", timeout_s=timeout_s)
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                problem = f"{self.name} had shut down, but did not end within {timeout_s:g} s, and was killed."
            except EngineError as error:
                problem = str(error)
        self.kill()
        return problem

    def kill(self) -> None:
        """End the process and everything that it started, for certain."""
        if not self.is_open:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a GPU that fell off the bus
            self._process.wait(_GROUP_S)
        limit_s = time.monotonic() + _GROUP_S
        while has_group(self._process.pid) and time.monotonic() < limit_s:  # a GPU's memory is theirs until then
            time.sleep(0.01)
        os.close(self._command_fd)
        os.close(self._reply_fd)
        self._command_fd = self._reply_fd = -1


def has_group(group: int) -> bool:
    """Whether a process of a group is there that has not ended; zombies do not count."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended between the two looks
            state, _, member_of = status.read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                return True
    return False


def _shortened(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines[:4])[:500].rstrip(".")


def telling_lines(log: str, *, limit: int = _LINES) -> list[str]:
    """Choose the lines of a log that say what went wrong: those of exceptions, or where there are none, the last ones.

    An exception is followed by where it was raised.

    Args:
        log: vLLM's: many processes, each line with a prefix of its own.
        limit: Most lines.
    """
    told = [(_process_of(line), _PREFIX.sub("", _PREFIX.sub("", line)).rstrip()) for line in log.splitlines()]
    told = [(process, line) for process, line in told if line.strip()]
    places: dict[str, str] = {}
    innermost: dict[str, str] = {}  # of the traceback that each process is printing
    for process, line in told:
        if frame := _FRAME.match(line):
            innermost[process] = f"  ({frame[1].rpartition('site-packages/')[2]}:{frame[2]}, in {frame[3]})"
        elif _CAUSE.match(line):
            places.setdefault(line.strip()[:300], innermost.pop(process, ""))
        elif not line.startswith(" "):  # a traceback's own lines are indented
            innermost.pop(process, None)
    causes = [cause + place for cause, place in places.items()]
    return causes[-limit:] or [line[:300] for _, line in told[-limit:]]


def _process_of(line: str) -> str:
    named = _PROCESS.search(line)
    return named[0] if named else ""
