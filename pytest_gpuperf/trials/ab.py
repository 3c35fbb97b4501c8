"""Run two sides alternately, A B B A A B B A, in fresh processes on one GPU, until every metric is decided."""

import contextlib
import math
import os
import shlex
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError, GpuperfError, UsageError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.processes import Finished, run_group
from pytest_gpuperf.records import Environment, Record, Results, decode_lines
from pytest_gpuperf.trials.paired import ALPHA, Label, Metric, Pair, alpha_of_look, compare, looks
from pytest_gpuperf.trials.sides import Side
from pytest_gpuperf.units import parse_tolerance

Ending = Literal["decided", "pairs", "budget", "interrupted", "failed"]
Outcome = Literal["good", "slower", "undecided", "error", "interrupted"]

#: Options that `ab` sets itself, or that would write where nothing is to be written.
_TAKEN = ("update", "accept", "patch", "json", "baselines", "budget", "missing", "invalid", "disable")
_LOST_IN_A_ROW = 2
#: What pytest's exit codes mean where no results were written.
_WITHOUT_RESULTS = {
    0: "no test measured anything",
    1: "the tests failed before they measured anything",
    2: "pytest was interrupted, or the tests could not be imported",
    4: "pytest refused its arguments",
    5: "no tests were collected",
}


class Plan(Record, frozen=True, kw_only=True):
    """What to run.

    Attributes:
        pytest_arguments: Of every run.
        pairs: Most pairs.
        warmup: Runs of each side that do not count, at the beginning.
        budget_s: No pair is begun that would not end within; `None`: no limit.
        run_limit_s: A run that takes longer is killed.
        tolerance: As a fraction, instead of the tests' own.
        keep: Where the results and outputs of all runs are kept.
    """

    pytest_arguments: tuple[str, ...] = ()
    pairs: int = 7
    warmup: int = 1
    budget_s: float | None = None
    run_limit_s: float = 1800.0
    tolerance: float | None = None
    keep: Path | None = None


class Comparison(Record, frozen=True, kw_only=True):
    """What is known at the end.

    Attributes:
        metrics: In the order of the runs.
        pairs: Pairs that were run, lost ones included.
        lost: Why runs were lost, one text each.
        ending: Why it ended.
        problem: Why it failed.
        duration_s: Of everything.
        base: Environment of BASE's first result.
        head: The same of HEAD.
    """

    metrics: tuple[Metric, ...]
    pairs: int
    lost: tuple[str, ...] = ()
    ending: Ending
    problem: str | None = None
    duration_s: float
    base: Environment | None = None
    head: Environment | None = None

    @property
    def outcome(self) -> Outcome:
        """`slower` if anything is; else `error`, `undecided`, or `good`: the same or faster."""
        if self.ending == "interrupted":
            return "interrupted"
        common = [metric for metric in self.metrics if metric.only_in is None]
        decisions = {metric.paired.decision if metric.paired else "UNDECIDED" for metric in common}
        if "SLOWER" in decisions:
            return "slower"
        if self.ending == "failed" or not common:
            return "error"
        return "undecided" if "UNDECIDED" in decisions else "good"


class _Failed(GpuperfError):
    """A side lost too many runs in a row."""


def tolerance_of(text: str | None) -> float | None:
    """Read `0.03` or `3%` from the command line.

    Raises:
        UsageError: Neither.
    """
    if text is None:
        return None
    try:
        number: object = float(text)
    except ValueError:
        number = text
    return parse_tolerance(number)


def visible_gpus() -> tuple[Device, ...]:
    """The GPUs of this machine; none where they cannot be looked up: the runs will say why, if they need one."""
    try:
        return Machine("auto").gpus
    except DeviceError:
        return ()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that no worktree and no running process is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_plan(plan: Plan) -> None:
    """Find mistakes before anything is made or run.

    Raises:
        UsageError: A number that makes no sense, an option that `ab` sets itself, a folder that holds older results.
    """
    if plan.pairs < 2 or plan.warmup < 0:
        raise UsageError(f"--pairs {plan.pairs} --warmup {plan.warmup}: need 2 pairs or more, 0 warm-up runs or more.")
    for name, seconds in (("budget", plan.budget_s), ("timeout", plan.run_limit_s)):
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise UsageError(f"--{name} {seconds:g} is not a number of seconds above zero.")
    for argument in plan.pytest_arguments:
        option = argument.partition("=")[0]
        if option in [f"--gpuperf-{name}" for name in _TAKEN]:
            raise UsageError(f"{option} has no place here: ab compares two sides, without baselines. Leave it out.")
    if plan.keep and plan.keep.exists() and (not plan.keep.is_dir() or any(plan.keep.iterdir())):
        raise UsageError(f"--keep {plan.keep} is not an empty folder. Name a new one, so that no older run is lost.")


def run_ab(
    base: Side,
    head: Side,
    plan: Plan,
    *,
    gpus: Sequence[Device] = (),
    say: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Comparison:
    """Run pairs until every metric is decided at a look, or pairs, time or patience end.

    Args:
        base: The one side.
        head: The other.
        plan: What to run.
        gpus: Of this machine; of several, all runs are confined to the one that the first run used.
        say: Is told of every run.
        clock: Seconds from any start.
    """
    start_s = clock()
    problem = None
    with _folder(plan.keep) as folder:
        runs = _Runs(plan, folder, gpus, say)
        try:
            ending: Ending = runs.all(base, head, clock)
        except KeyboardInterrupt:
            ending = "interrupted"
        except _Failed as error:
            ending, problem = "failed", str(error)
    return Comparison(
        metrics=_compare(runs.pairs, plan, runs.number, is_last=ending != "decided"),
        pairs=runs.number,
        lost=tuple(runs.lost),
        ending=ending,
        problem=problem,
        duration_s=clock() - start_s,
        base=next((record.environment for pair in runs.pairs for record in pair.base.tests), None),
        head=next((record.environment for pair in runs.pairs for record in pair.head.tests), None),
    )


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="gpuperf-ab-") as name:
            yield Path(name)
    else:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()


def _compare(pairs: Sequence[Pair], plan: Plan, number: int, *, is_last: bool) -> tuple[Metric, ...]:
    alpha = alpha_of_look(number, plan.pairs, is_last=is_last) if number else ALPHA
    return compare(pairs, alpha=alpha, tolerance=plan.tolerance)


def _is_decided(metrics: Sequence[Metric]) -> bool:
    common = [metric for metric in metrics if metric.only_in is None]
    return bool(common) and all(metric.paired and metric.paired.is_decided for metric in common)


class _Runs:
    """Runs a side's tests in fresh processes, and gives up when a side fails again and again."""

    def __init__(self, plan: Plan, folder: Path, gpus: Sequence[Device], say: Callable[[str], None]) -> None:
        self.pairs: list[Pair] = []
        self.lost: list[str] = []
        self.number = 0  # of the last pair that was run
        self._plan = plan
        self._folder = folder
        self._gpus = gpus
        self._say = say
        self._lost_in_a_row: Counter[Label] = Counter()
        self._variables: dict[str, str] | None = None

    def all(self, base: Side, head: Side, clock: Callable[[], float]) -> Ending:
        """Warm-up and pairs, until a look decides everything or there is nothing left to run.

        Raises:
            _Failed: Two runs of a side in a row were lost.
        """
        start_s = clock()
        for side in (base, head) * self._plan.warmup:
            self.one(side, "warm-up", 0)
        while self.number < self._plan.pairs:
            begin_s = clock()
            pair = self.pair(base, head, self.number + 1)
            self.number += 1
            self.pairs += [pair] if pair else []
            is_look = self.number in looks(self._plan.pairs)
            if is_look and _is_decided(_compare(self.pairs, self._plan, self.number, is_last=False)):
                return "decided"
            now_s = clock()
            if self._plan.budget_s is not None and now_s - start_s + now_s - begin_s > self._plan.budget_s:
                return "budget" if self.number < self._plan.pairs else "pairs"
        return "pairs"

    def pair(self, base: Side, head: Side, number: int) -> Pair | None:
        """Both sides, BASE first in odd pairs; `None` if a run was lost, and then the other one is not begun."""
        name = f"pair {number} of at most {self._plan.pairs}"
        found: dict[Label, Results] = {}
        for side in (base, head) if number % 2 else (head, base):
            results = self.one(side, name, number)
            if results is None:
                return None
            found[side.label] = results
        return Pair(number=number, base=found["BASE"], head=found["HEAD"])

    def one(self, side: Side, name: str, number: int) -> Results | None:
        """A run; `None` if it was lost.

        Raises:
            _Failed: Two of this side in a row.
        """
        path = self._folder / f"{number}-{side.label.lower()}.jsonl"
        path.unlink(missing_ok=True)  # of another warm-up
        start_s = time.monotonic()
        finished = self._finish(side, path)
        took = f"{name}, {side.label}: {time.monotonic() - start_s:.3g} s"
        path.with_suffix(".log").write_text(finished.tail, encoding="utf-8")
        results, problem = _read(path, finished)
        if results is None:
            self._say(f"{took}, lost: {problem}")
            self._lose(side, f"{name}, {side.label}: {problem}", finished.tail)
            return None
        self._say(took)
        self._lost_in_a_row[side.label] = 0
        if self._variables is None:
            self._variables = pinned(results, self._gpus)
        return results

    def _finish(self, side: Side, path: Path) -> Finished:
        variables = {**os.environ, **(self._variables or {})}
        if side.path:
            variables["PYTHONPATH"] = os.pathsep.join(side.path)
        try:
            return run_group(
                command(side, self._plan, path),
                timeout_s=self._plan.run_limit_s,
                folder=side.folder,
                environment=variables,
            )
        except OSError as error:
            return Finished(code=127, tail=f"{side.python} cannot be started: {error.strerror}")

    def _lose(self, side: Side, text: str, tail: str) -> None:
        self.lost.append(text)
        self._lost_in_a_row[side.label] += 1
        if self._lost_in_a_row[side.label] >= _LOST_IN_A_ROW:
            last = "\n".join(f"  {line}" for line in tail.rstrip().splitlines()[-15:])
            raise _Failed(
                f"{side.label} lost {_LOST_IN_A_ROW} runs in a row. The last that it printed:\n{last}\n"
                f"Run it by hand: {side.by_hand} -m pytest {shlex.join(self._plan.pytest_arguments)}"
            )


def command(side: Side, plan: Plan, results: Path) -> list[str]:
    """The command of one run. -P: the current folder is not imported in place of what is installed, as with `pytest`.

    Nothing is compared within a run: the folder of the baselines does not exist.
    """
    return [
        *(str(side.python), "-P", "-m", "pytest"),
        # Anchors tell the machine from the code; pairs do that by themselves, and would wait for noisy ones.
        *("-p", "no:cacheprovider", "--gpuperf-anchors=off"),
        *plan.pytest_arguments,
        f"--gpuperf-json={results}",
        f"--gpuperf-baselines={results.with_suffix('.baselines')}",
        *("--gpuperf-missing=pass", "--gpuperf-invalid=pass", "--gpuperf-budget=0"),
    ]


def _read(path: Path, finished: Finished) -> tuple[Results | None, str]:
    """The results, or why there are none that can be used."""
    if finished.code is None or finished.code < 0:
        return None, f"it {finished.in_words}"
    try:
        with path.open("rb") as file:
            results = decode_lines(file)
    except FileNotFoundError:
        return None, f"{_WITHOUT_RESULTS.get(finished.code, 'it measured nothing')} (exit code {finished.code})"
    except (UsageError, OSError) as error:
        return None, f"its results cannot be read: {error}"
    if results.end is None or finished.code not in (0, 1):
        return None, f"it ended before all tests had their turn (exit code {finished.code})"
    return results, ""


def pinned(results: Results, gpus: Sequence[Device]) -> dict[str, str]:
    """Environment variables that confine the next runs to the GPU that these results were taken on.

    Empty where there is nothing to choose: one GPU, none, or tests that used several.
    """
    used = {device for record in results.tests for device in record.devices}
    uuids = [gpu.uuid for gpu in gpus if gpu.uuid_hash in used]
    return {"CUDA_VISIBLE_DEVICES": uuids[0]} if len(gpus) > 1 and len(used) == 1 and uuids else {}
