"""Fresh processes: more runs for the metrics that the first run does not settle, and profiles of kernels.

A fresh process is this very invocation of pytest again, confined by an order to the tests in question: same options,
same conftests, one more value of each metric. It holds no lease of its own: this process holds the devices for it.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.judge import LOOKS
from pytest_gpuperf.monitor import FAMILY_VARIABLE
from pytest_gpuperf.processes import Finished, run_group
from pytest_gpuperf.records import KernelRecord, Record, Rerun, Results, TestRecord, decode_lines

#: Names the file with the order to the fresh process.
ORDER_VARIABLE = "GPUPERF_ORDER"
#: Default budget of a test, in durations of its own.
BUDGET_DURATIONS = 3.0
#: Time for a fresh process to start, import and collect; its tests come on top.
START_LIMIT_S = 120.0
#: A fresh process is killed when its tests take this many times as long as they took here.
_PATIENCE = 5.0
#: The same of one that profiles, which does not measure.
_PROFILE_PATIENCE = 2.0
_WORKER = "PYTEST_XDIST_WORKER"
_OF_THIS_PROCESS = ("PYTEST_CURRENT_TEST", "PYTEST_VERSION")
#: Of a process that profiles: Kineto's own notes are not for its last words, and what fails is said in full.
_OF_PROFILES = {"KINETO_LOG_LEVEL": "99", "COLUMNS": "240"}


class Order(Record, frozen=True, kw_only=True):
    """What a fresh process is to do.

    Attributes:
        tests: As arguments of pytest, in order.
        results: Where its results.jsonl goes.
        leased: Hashed UUIDs of the devices that are held for it.
        descriptors: Of their locks, which it inherits.
        parent_pid: The process that waits for it.
        is_of_worker: That process is a worker of pytest-xdist.
        purpose: Measure the tests again, or profile what they measure.
        traces: Folder in which the profiler's traces are left; `None`: nowhere.
        most_calls: To profile of each callable; `None`: as many as is usual.
    """

    tests: tuple[str, ...]
    results: str
    leased: tuple[str, ...]
    parent_pid: int
    is_of_worker: bool
    purpose: Literal["confirm", "profile"] = "confirm"
    traces: str | None = None
    most_calls: int | None = None
    descriptors: tuple[int, ...] = ()


class Invocation(Record, frozen=True, kw_only=True):
    """How this pytest was started.

    Attributes:
        arguments: Without the program.
        folder: Where.
        root: pytest's root folder.
        environment: With which variables.
    """

    arguments: tuple[str, ...]
    folder: Path
    root: Path
    environment: Mapping[str, str]


def settle(
    suspects: Sequence[TestRecord],
    *,
    is_open: Callable[[TestRecord, int], bool],
    judge: Callable[[TestRecord, int], TestRecord],
    measure: Callable[[Sequence[TestRecord]], Sequence[TestRecord]],
    budget_s: float | None,
) -> tuple[TestRecord, ...]:
    """Measure tests again until each is settled or its budget is spent, all that are open in one process a time.

    Args:
        suspects: Tests of one set of devices after their first run.
        is_open: Whether more runs of a test may settle it after a look.
        judge: Gives a test's verdicts at a look, from all its runs.
        measure: Runs a fresh process: gives each test one more run, or a problem, or (when the process did not get
            to it) leaves it as it is; the first one never.
        budget_s: Most seconds of a test's own to spend on runs of it; `None`: three times its first run.
    """
    records = {str(record.key): record for record in suspects}
    looks = dict.fromkeys(records, 1)

    def may_run(name: str, wanted: int) -> bool:
        record = records[name]
        is_waiting = 1 + len(record.more) < wanted and not record.problems and is_open(record, looks[name])
        return is_waiting and _spent_s(record) < _budget_s(record, budget_s)

    for look, wanted in enumerate(LOOKS[1:], start=2):
        before = {name: len(record.more) for name, record in records.items()}
        while due := [record for name, record in records.items() if may_run(name, wanted)]:
            records |= {str(record.key): record for record in measure(due)}
        for name, record in records.items():
            if len(record.more) > before[name]:
                records[name], looks[name] = judge(record, look), look
    return tuple(
        _explained(record, budget_s) if is_open(record, looks[name]) else record for name, record in records.items()
    )


def _budget_s(record: TestRecord, budget_s: float | None) -> float:
    return BUDGET_DURATIONS * record.duration_s if budget_s is None else budget_s


def _spent_s(record: TestRecord) -> float:
    return sum(run.duration_s for run in record.more)


def _explained(record: TestRecord, budget_s: float | None) -> TestRecord:
    """Say in what is still open why it was not measured again."""
    if record.problems:
        return unconfirmed(record, record.problems[-1])
    if 1 + len(record.more) < LOOKS[-1]:
        return _noted(
            record, f"the budget of {_budget_s(record, budget_s):.3g} s for confirming is spent (--gpuperf-budget)"
        )
    return record


def unconfirmed(record: TestRecord, problem: str) -> TestRecord:
    """The test without further runs: a suspicion that nothing confirmed accuses nobody.

    Args:
        record: After its first look, or later.
        problem: What went wrong.
    """
    problems = record.problems if problem in record.problems else (*record.problems, problem)
    verdicts = tuple(
        replace(verdict, status="INCONCLUSIVE") if verdict.status == "REGRESSED" and not record.more else verdict
        for verdict in record.verdicts
    )
    return _noted(replace(record, verdicts=verdicts, problems=problems), f"not confirmed: {problem.rstrip('.')}")


def _noted(record: TestRecord, words: str) -> TestRecord:
    verdicts = tuple(
        verdict.saying(words) if verdict.status in ("INCONCLUSIVE", "INVALID") else verdict
        for verdict in record.verdicts
    )
    return replace(record, verdicts=verdicts)


def run_again(
    records: Sequence[TestRecord],
    invocation: Invocation,
    *,
    leased: tuple[str, ...],
    setup_s: float,
    descriptors: tuple[int, ...] = (),
) -> list[TestRecord]:
    """Run some tests in one fresh process; each comes back with one more run, a problem, or as it was.

    Args:
        records: What they measured so far; at least one.
        invocation: How this process was started.
        leased: Hashed UUIDs of the devices that this process holds for it.
        setup_s: What setting up fixtures took in this process.
        descriptors: Of the locks of these devices; the fresh process inherits them.

    Raises:
        OSError: The process cannot be started.
    """
    limit_s = START_LIMIT_S + _PATIENCE * (setup_s + sum(record.duration_s for record in records))
    order = _order(records, invocation, leased, descriptors)
    finished, found, complaint = obey(order, invocation, limit_s=limit_s)
    return grown(records, {str(record.key): record for record in found.tests} if found else {}, finished, complaint)


def profile(
    records: Sequence[TestRecord],
    invocation: Invocation,
    *,
    leased: tuple[str, ...],
    setup_s: float,
    descriptors: tuple[int, ...] = (),
) -> tuple[tuple[KernelRecord, ...], str | None]:
    """Profile what some tests measure, in one fresh process.

    Args:
        records: See `run_again`.
        invocation: See `run_again`.
        leased: See `run_again`.
        setup_s: See `run_again`.
        descriptors: See `run_again`.

    Returns:
        What was seen; and what went wrong with those of which nothing was.

    Raises:
        OSError: The process cannot be started.
    """
    order = replace(_order(records, invocation, leased, descriptors), purpose="profile")
    limit_s = START_LIMIT_S + _PROFILE_PATIENCE * (setup_s + sum(record.duration_s for record in records))
    finished, found, complaint = obey(order, invocation, limit_s=limit_s)
    profiles = found.profiles if found else ()
    missing = {str(record.key) for record in records} - {str(one.key) for one in profiles}
    if not missing or (finished.code == 0 and not complaint):  # a test may hold nothing that can be profiled
        return profiles, None
    what = complaint or f"it {finished.in_words}{_last_words(finished.tail)}"
    return profiles, f"a fresh process was started to profile {', '.join(sorted(missing)[:3])}, but {what}"


def _order(
    records: Sequence[TestRecord], invocation: Invocation, leased: tuple[str, ...], descriptors: tuple[int, ...]
) -> Order:
    return Order(
        tests=tuple(f"{invocation.root / record.key.module}::{record.key.test}" for record in records),
        results="",
        leased=leased,
        parent_pid=os.getpid(),
        is_of_worker=_WORKER in os.environ,
        descriptors=descriptors,
    )


def obey(order: Order, invocation: Invocation, *, limit_s: float) -> tuple[Finished, Results | None, str | None]:
    """Start a fresh process with an order and wait for its end.

    Args:
        order: Its results go to a file that is made here.
        invocation: How this process was started.
        limit_s: After which it is killed.

    Returns:
        How it ended, what it wrote, and what is wrong with that.

    Raises:
        OSError: The process cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="gpuperf-") as name:
        folder = Path(name)
        order = replace(order, results=str(folder / "results.jsonl"))
        (folder / "order.json").write_bytes(msgspec.json.encode(order))
        finished = run_group(
            _command(invocation),
            timeout_s=limit_s,
            folder=invocation.folder,
            environment={
                **_environment(invocation, folder / "order.json"),
                **(_OF_PROFILES if order.purpose == "profile" else {}),
            },
            descriptors=order.descriptors,
        )
        found, complaint = _read(folder / "results.jsonl")
    return finished, found, complaint


def _command(invocation: Invocation) -> list[str]:
    """The same interpreter and arguments; the working folder is on the path only if it is here."""
    is_here = bool({"", str(invocation.folder)} & set(sys.path))
    return [sys.executable, *([] if is_here else ["-P"]), "-m", "pytest", *invocation.arguments]


def _environment(invocation: Invocation, order: Path) -> dict[str, str]:
    """That which this process began with: what tests have left behind since is not for another."""
    kept = {
        name: value
        for name, value in invocation.environment.items()
        if name not in _OF_THIS_PROCESS and not name.startswith("PYTEST_XDIST_")
    }
    family = os.getppid() if _WORKER in os.environ else os.getpid()
    return {**kept, ORDER_VARIABLE: str(order), FAMILY_VARIABLE: str(family)}


def _read(path: Path) -> tuple[Results | None, str | None]:
    """What a fresh process wrote; and what is wrong with the file."""
    try:
        with path.open("rb") as file:
            return decode_lines(file), None
    except FileNotFoundError:
        return None, None
    except (UsageError, OSError) as error:
        return None, f"its results cannot be read ({error})"


def grown(
    records: Sequence[TestRecord], found: Mapping[str, TestRecord], finished: Finished, complaint: str | None
) -> list[TestRecord]:
    """Add what a fresh process measured to each test, or what went wrong.

    A process that ended by itself answers for every test that it did not measure. One that was killed, or crashed,
    answers for the first of them alone: it did not get to the others.
    """
    missing = [record for record in records if str(record.key) not in found]
    is_complete = finished.code in (0, 1) or not (found or finished.code is None or finished.code < 0)
    blamed = missing if is_complete else missing[:1]
    grown_records = []
    for record in records:
        again = found.get(str(record.key))
        if again is not None:
            grown_records.append(_with_run(record, again))
        elif record in blamed:
            what = complaint or f"it {finished.in_words} without a measurement{_last_words(finished.tail)}"
            grown_records.append(_with_problem(record, f"a fresh process was started, but {what}"))
        else:
            grown_records.append(record)
    return grown_records


def _with_run(record: TestRecord, again: TestRecord) -> TestRecord:
    here, there = (sorted(m.metric for m in one.measurements) for one in (record, again))
    if not again.passed:
        return _with_problem(record, "the test passed here and failed in a fresh process")
    if here != there:
        return _with_problem(
            record,
            f"a fresh process measured {', '.join(there)}, this one {', '.join(here)}: the metrics must not vary",
        )
    if sorted(again.devices) != sorted(record.devices):
        return _with_problem(record, "a fresh process measured on another device")
    return replace(record, more=(*record.more, Rerun(measurements=again.measurements, duration_s=again.duration_s)))


def _with_problem(record: TestRecord, problem: str) -> TestRecord:
    return replace(record, problems=(*record.problems, problem))


def _last_words(tail: str) -> str:
    """The last lines that a process printed, short enough for a message."""
    lines = [line.strip() for line in tail.splitlines() if line.strip(" =-_\t")]
    return f"; its last words: {' | '.join(line[:120] for line in lines[-2:])}" if lines else ""
