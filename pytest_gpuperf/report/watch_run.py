"""Run `gpuperf monitor`: what is watched, until when, who is shown it, and where it is kept."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.records import Record
from pytest_gpuperf.report.watch import View, sample_line, summary_lines
from pytest_gpuperf.report.watch_files import SampleFile, open_file
from pytest_gpuperf.trials.watch import Sample, Summary, chosen, watch, watches
from pytest_gpuperf.trials.watch_command import (
    CannotStart,
    Command,
    caught_signals,
    is_ending,
    is_for_command,
    is_stranger,
)

#: Closer readings say nothing new: the driver refreshes most values every 100 ms.
LEAST_INTERVAL_S = 0.01
_BROKEN_PIPE = 128 + signal.SIGPIPE


class Plan(Record, frozen=True, kw_only=True):
    """What the command line asks for.

    Attributes:
        gpus: See `trials.watch.chosen`.
        duration_s: Most seconds; `None`: until Ctrl-C, or until the command ends.
        output: File for all samples.
        command: To be started and watched; empty: none.
    """

    interval_s: float = 1.0
    gpus: str | None = None
    duration_s: float | None = None
    output: Path | None = None
    is_json: bool = False
    is_live: bool = False
    command: tuple[str, ...] = ()


def check_plan(plan: Plan) -> None:
    """Find mistakes before anything is started.

    Raises:
        UsageError: A number that makes no sense, or options that contradict each other.
    """
    if not (math.isfinite(plan.interval_s) and plan.interval_s >= LEAST_INTERVAL_S):
        raise UsageError(f"--interval {plan.interval_s:g} is not a number of seconds of {LEAST_INTERVAL_S} and more.")
    if plan.duration_s is not None and not (math.isfinite(plan.duration_s) and plan.duration_s > 0):
        raise UsageError(f"--duration {plan.duration_s:g} is not a number of seconds above 0.")
    if plan.command and plan.duration_s is not None:
        raise UsageError("A command is watched until it ends. Drop --duration, or end it with timeout(1).")
    if plan.is_live and plan.is_json:
        raise UsageError("--live and --json both want the output. Drop one; --output keeps all samples beside --live.")
    if plan.is_live and not _stream(plan).isatty():
        raise UsageError("--live needs a terminal. Without one there are lines, --json and --output.")


def monitor(plan: Plan, machine: Machine) -> int:
    """Watch GPUs until the end that the plan says, show them, and sum up.

    Returns:
        The exit code: the command's, 127 or 126 if it cannot be started; without one 0, or 128 + n after signal n
        that is not Ctrl-C's; 1 if the samples could not be written.

    Raises:
        UsageError: See `check_plan`, `trials.watch.chosen` and `watch_files.open_file`.
        DeviceError: There is no driver, or no GPU.
    """
    check_plan(plan)
    try:
        return _monitor(plan, machine)
    except CannotStart as error:
        sys.stderr.write(f"gpuperf: {error}\n")
        return error.code


def _monitor(plan: Plan, machine: Machine) -> int:
    environment = dict(os.environ)  # the command's: beside a lost GPU, the machine narrows what this process sees
    nvml, gpus = machine.nvml, machine.gpus
    if nvml is None or not gpus:
        raise DeviceError(machine.gpu_problem or "The driver shows no GPU.")
    for absent in machine.absent:
        sys.stderr.write(f"gpuperf: {absent.reason}\n")
    devices = chosen(gpus, plan.gpus)
    watched: list[Command] = []

    def stranger(pid: int) -> bool:
        return any(is_stranger(pid, command) for command in watched)

    with (
        _recording(plan.output) as recording,
        caught_signals(has_command=bool(plan.command)) as sleep,
        _screen(plan) as screen,
    ):
        gpus_watched = watches(nvml, devices, is_stranger=stranger if plan.command else None)
        if plan.command:
            watched.append(_started(plan, environment))
        course = _Course(sleep, watched[0] if watched else None, _stream(plan))
        sinks = [screen, *([recording.add] if recording else [])]
        summaries = watch(
            gpus_watched,
            interval_s=plan.interval_s,
            duration_s=plan.duration_s,
            wait=course.wait,
            show=lambda samples: course.give(samples, sinks),
        )
    if course.is_unheard:
        return course.unheard_code
    with _heard(_stream(plan)) as lost:
        _print_summaries(plan, summaries)
    return course.code or (recording.code if recording else 0) or sum(_unwritten(error) for error in lost)


class _Course:
    """How a watch goes on, and ends: by a signal, with its command, or when nobody listens any more."""

    def __init__(self, sleep: Callable[[float], list[int]], command: Command | None, stream: TextIO) -> None:
        self._sleep, self._command, self._stream = sleep, command, stream
        self._signal: int | None = None
        self.is_unheard = False
        self.unheard_code = 0

    def wait(self, seconds: float) -> bool:
        """Sleep; `True`: the watch is over."""
        end_s = time.monotonic() + seconds
        while not self.is_unheard:
            for number in self._sleep(end_s - time.monotonic()):
                if self._command is None and is_ending(number):
                    self._signal = number
                    return True
                if self._command is not None and is_for_command(number):
                    self._command.forward(number)
            if self._command is not None and self._command.has_ended():
                return True
            if time.monotonic() >= end_s:
                return False
        return True

    def give(self, samples: Sequence[Sample], sinks: Sequence[Callable[[Sequence[Sample]], None]]) -> None:
        """Hand samples on; a reader that has gone, such as head, or a full disk ends the watch, and no command."""
        with _heard(self._stream) as lost:
            for sink in sinks:
                sink(samples)
        for error in lost:
            self.is_unheard = self._command is None
            self.unheard_code = _unwritten(error) or _BROKEN_PIPE

    @property
    def code(self) -> int:
        """Exit code. Ctrl-C is how a view is left, so it is no failure."""
        if self._command is not None:
            return self._command.code or 0
        return 0 if self._signal in (None, signal.SIGINT) else 128 + self._signal


def _started(plan: Plan, environment: Mapping[str, str]) -> Command:
    try:
        return Command(plan.command, environment)
    except CannotStart:
        if plan.output is not None:  # nothing was seen: the next try is to find the name free
            plan.output.unlink(missing_ok=True)
        raise


class _Recording:
    """The file of `--output`; that it cannot be written any more does not end what is watched."""

    def __init__(self, path: Path) -> None:
        self.code = 0
        self._path = path
        self._file: SampleFile = open_file(path)

    def add(self, samples: Sequence[Sample]) -> None:
        if not self.code:
            self._try(lambda: self._file.add(samples))

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            self.code = 1
            sys.stderr.write(f"gpuperf: {self._path} could not be written: {error.strerror or error}.\n")


@contextlib.contextmanager
def _recording(path: Path | None) -> Iterator[_Recording | None]:
    recording = _Recording(path) if path else None
    try:
        yield recording
    finally:
        if recording:
            recording.close()


@contextlib.contextmanager
def _screen(plan: Plan) -> Iterator[Callable[[Sequence[Sample]], None]]:
    """What takes the samples that are to be seen."""
    stream = _stream(plan)
    if plan.command and not plan.is_live:
        yield lambda _: None
    elif plan.is_json:
        yield lambda samples: _write(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples).decode())
    elif stream.isatty():
        from rich.console import Console

        console = Console(file=stream)
        with View(console, interval_s=plan.interval_s) as view:
            yield view.show
    else:
        yield lambda samples: _write("".join(f"{sample_line(sample)}\n" for sample in samples))


def _stream(plan: Plan) -> TextIO:
    """Where we show things. A command has the output, which may go to a pipe, so ours is beside it."""
    return sys.stderr if plan.command else sys.stdout


@contextlib.contextmanager
def _heard(stream: TextIO) -> Iterator[list[OSError]]:
    """Write to a stream that may be gone, a closed pipe or terminal, or full; what went wrong is in the list then."""
    lost: list[OSError] = []
    try:
        yield lost
    except OSError as error:
        lost.append(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python complains at its end


def _unwritten(error: OSError) -> int:
    """Say what could not be written, and the exit code for it; a reader that has gone knows."""
    if isinstance(error, BrokenPipeError):
        return 0
    sys.stderr.write(f"gpuperf: what was seen could not be written: {error.strerror}.\n")
    return 1


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_summaries(plan: Plan, summaries: Sequence[Summary]) -> None:
    stream = _stream(plan)
    if plan.is_json:
        lines = [msgspec.json.encode(summary).decode() for summary in summaries]
    else:
        lines = [line for summary in summaries for line in summary_lines(summary)]
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()
