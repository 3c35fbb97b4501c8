"""Tests whose verdict waits for more runs: their reports are held back, and made at the end of the run.

By then every fixture is torn down and every other test has had its say, so that the devices are free for a fresh
process, and nobody is accused before it is known whether the whole machine moved.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
from _pytest.runner import runtestprotocol
from msgspec.structs import replace

from pytest_gpuperf import confirm
from pytest_gpuperf.confirm import Invocation, unconfirmed
from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError, GpuperfError
from pytest_gpuperf.judge import is_settled
from pytest_gpuperf.kernel_store import without_kernels
from pytest_gpuperf.lease import lease
from pytest_gpuperf.locks import adopt
from pytest_gpuperf.machine import release_memory
from pytest_gpuperf.monitor import cool_down
from pytest_gpuperf.options import requirement_of
from pytest_gpuperf.records import TestKey, TestRecord
from pytest_gpuperf.run import Run
from pytest_gpuperf.runwide import moved_together

#: Set while a test runs whose verdict may wait.
can_wait_key = pytest.StashKey[bool]()
#: The last record of a test: what its report says.
record_key = pytest.StashKey[TestRecord]()
#: Options that choose tests, spread them over processes or write files: not for a fresh process.
_NOT_FOR_A_FRESH_PROCESS: dict[str, object] = {
    "keyword": "",
    "markexpr": "",
    "deselect": None,
    "lf": False,
    "failedfirst": False,
    "newfirst": False,
    "stepwise": False,
    "stepwise_skip": False,
    "maxfail": 0,
    "collectonly": False,
    "usepdb": False,
    "trace": False,
    "numprocesses": None,
    "dist": "no",
    "tx": [],
    "basetemp": None,
    "xmlpath": None,
    "log_file": os.devnull,
    "report_log": None,
    "json_report_file": None,
    "allure_report_dir": None,
    "splits": None,
    "group": None,
    "testmon": None,
    "htmlpath": None,
    "no_cov": True,
    "reruns": 0,
    "benchmark_json": None,
    "benchmark_autosave": False,
    "benchmark_save": None,
    "benchmark_compare": None,
    "benchmark_compare_fail": None,
    "benchmark_histogram": None,
    "gpuperf_update": False,
    "gpuperf_accept": None,
    "gpuperf_patch": None,
    "gpuperf_history": None,
    "gpuperf_anchors": "off",
    "gpuperf_budget": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A test that has run and not been reported: what it measured, its call's report, and the reports after that."""

    item: pytest.Item
    record: TestRecord
    call: pytest.TestReport
    after: tuple[pytest.TestReport, ...]


class Deferred:
    """The tests of one process whose verdicts wait.

    Args:
        run: What judges them.
        invocation: How this pytest was started.
        tell: Prints a line at once, when devices have to be waited for.
        metered: Reads how busy devices are while a `with` statement holds them.
    """

    def __init__(
        self,
        run: Run,
        invocation: Invocation,
        *,
        tell: Callable[[str], None],
        metered: Callable[[Sequence[Device]], AbstractContextManager[None]],
    ) -> None:
        self._tell = tell
        self._metered = metered
        self._descriptors: tuple[int, ...] = ()
        self._alone: set[TestKey] = set()
        self.held: list[Held] = []
        self._run = run
        self._invocation = invocation
        self._setup_s = 0.0
        self._seen: set[str] = set()
        self._final: dict[TestKey, TestRecord] = {}

    def run_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Run a test as pytest does, and keep its report if more runs may change the verdict."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        item.stash[can_wait_key] = item.nodeid not in self._seen  # --keep-duplicates: one of them is enough
        self._seen.add(item.nodeid)
        setup, *reports = runtestprotocol(item, log=False, nextitem=nextitem)
        self._setup_s += setup.duration
        record = item.stash.get(record_key, None)
        can_wait = item.stash[can_wait_key]
        if record is not None and requirement_of(item).exclusive == "host":
            self._alone.add(record.key)
        waits = (
            can_wait
            and record is not None
            and record.passed
            and _has_passed(reports[0])
            and self._run.is_open(record, 1)
        )
        setup.__dict__["gpuperf_waits"] = waits
        item.ihook.pytest_runtest_logreport(report=setup)
        if record is not None and waits:
            self.held.append(Held(item=item, record=record, call=reports[0], after=tuple(reports[1:])))
        else:
            for report in reports:
                item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def settle(self) -> None:
        """Measure what waits again, and report it; an interrupt leaves the rest as it is, and is passed on."""
        waiting, self.held = self._without_those_that_moved_together(), []
        try:
            while waiting:
                devices = waiting[0].record.devices
                group = [held for held in waiting if held.record.devices == devices]
                records = self._settled(devices, [held.record for held in group])
                for held, record in zip(group, records, strict=True):
                    waiting.remove(held)
                    self._report(held, record)
        finally:
            for held in waiting:
                self._report(held, unconfirmed(held.record, "the run was interrupted"))

    def _without_those_that_moved_together(self) -> list[Held]:
        """Report tests that the machine made slower, if it did; the others wait on."""
        run = self._run
        together = moved_together(run.records)
        if together is None:
            return self.held
        anchors = [run.anchors.get(held.record.devices) for held in self.held]
        if all(anchor is not None and anchor.records and not anchor.note for anchor in anchors):
            run.notes.append(f"{together.words}, while the anchors held still: it is the software, not the machine.")
            return self.held
        run.notes.append(
            f"INVALID run: {together.words}. Likely causes: heat, a power or clock limit, another job on this host. "
            "Look at `gpuperf specs`, then run again. If the software did it, anchors (docs/anchors.md) can tell, "
            "and --gpuperf-budget 0 judges each test by itself."
        )
        waiting = []
        for held in self.held:
            if str(held.record.key) in together.tests:
                self._report(held, _invalid(held.record, together.words))
            else:
                waiting.append(held)
        return waiting

    def release(self, why: str) -> None:
        """Report what waits as it is."""
        waiting, self.held = self.held, []
        for held in waiting:
            self._report(held, unconfirmed(held.record, why))

    def _settled(self, hashes: tuple[str, ...], records: Sequence[TestRecord]) -> Sequence[TestRecord]:
        run = self._run
        devices = tuple(device for device in run.machine.devices if device.uuid_hash in hashes)
        if reason := run.quarantine.examine(devices, "before more runs"):
            return [unconfirmed(record, reason) for record in records]
        release_memory()

        def measure(due: Sequence[TestRecord]) -> list[TestRecord]:
            if any(verdict.status == "INVALID" for record in due for verdict in record.verdicts):
                cool_down(run.machine.nvml, [device.uuid for device in devices if device.kind == "cuda"])
            if reason := run.quarantine.examine(devices, "while tests were measured again"):
                raise DeviceError(reason)
            again = confirm.run_again(
                due, self._invocation, leased=hashes, setup_s=self._setup_s, descriptors=self._descriptors
            )
            return [self._healthy(before, after) for before, after in zip(due, again, strict=True)]

        try:
            with self._holding(devices, records):
                settled = confirm.settle(
                    records,
                    is_open=run.is_open,
                    judge=run.judge_again,
                    measure=measure,
                    budget_s=run.settings.budget_s,
                )
                slower = [one for one in settled if any(verdict.status == "REGRESSED" for verdict in one.verdicts)]
                self._profile(slower)
                return [run.explained(one) for one in settled]
        except (GpuperfError, OSError) as error:
            return [unconfirmed(record, str(error)) for record in records]

    @contextmanager
    def _holding(self, devices: tuple[Device, ...], records: Sequence[TestRecord]) -> Iterator[None]:
        """Hold devices for fresh processes that inherit the locks, as the tests themselves held them."""
        is_alone = any(record.key in self._alone for record in records)
        held = lease(
            [devices],
            exclusive="host" if is_alone else "gpu",
            on_wait=lambda words: self._tell(f"gpuperf: measuring {records[0].key.test} again {words}"),
        )
        with held as lent, self._metered(devices):
            self._descriptors = lent.descriptors
            yield

    def without_kernels(self) -> list[TestRecord]:
        """The tests whose values become baselines that have no kernels beside them, and that can be profiled."""
        run, settings = self._run, self._run.settings
        records = list(({record.key: record for record in run.records} | self._final).values())
        reason = settings.accept or ("accepted by a patch" if settings.patch else None)
        try:
            lacking = without_kernels(settings.baselines, records, accept_reason=reason)
        except GpuperfError:  # the update fails for the same reason, and says so
            return []
        metrics = {record.key: [metric for key, metric in lacking if key == record.key] for record in records}
        return [record for record in records if run.can_profile(record, metrics[record.key])]

    def profile(self, records: Sequence[TestRecord]) -> list[str]:
        """Profile tests, all of a set of devices in one fresh process; what was seen, as lines of results.jsonl."""
        run = self._run
        sent = set(run.profiles)
        for hashes in dict.fromkeys(record.devices for record in records):
            group = [record for record in records if record.devices == hashes]
            devices = tuple(device for device in run.machine.devices if device.uuid_hash in hashes)
            release_memory()
            try:
                with self._holding(devices, group):
                    self._profile(group)
            except GpuperfError as error:
                run.notes.append(f"No kernels were recorded: {error}")
        return run.profile_lines(run.profiles.keys() - sent)

    def _profile(self, records: Sequence[TestRecord]) -> None:
        """Keep what ran in some tests of the same devices, which are held, or a note where that fails."""
        able = [record for record in records if self._run.can_profile(record)]
        if not able:
            return
        try:
            found, problem = confirm.profile(
                able,
                self._invocation,
                leased=able[0].devices,
                setup_s=self._setup_s,
                descriptors=self._descriptors,
            )
        except OSError as error:
            found, problem = (), str(error)
        if problem:
            self._run.notes.append(f"No kernels were recorded: {problem}")
        for one in found:
            self._run.profiles.setdefault((one.key, one.metric), one.kernels)

    def _healthy(self, before: TestRecord, after: TestRecord) -> TestRecord:
        """Drop the last run of a test if the device was unwell in it."""
        if len(after.more) == len(before.more) or not (illness := self._run.illness(after)):
            return after
        return replace(before, problems=(*before.problems, f"in a fresh process, too: {illness}"))

    def _report(self, held: Held, record: TestRecord) -> None:
        """Make the report of a test's call anew, as if it had ended with this verdict, and log all that was kept."""
        item = held.item
        self._final[record.key] = record
        item.stash[record_key] = record
        item.user_properties[:] = [pair for pair in item.user_properties if not str(pair[0]).startswith("gpuperf.")]
        message = self._run.failure(record)

        def call() -> None:
            if message:
                raise pytest.fail.Exception(message, pytrace=False) from None

        info = pytest.CallInfo.from_call(call, when="call")
        info.start, info.stop, info.duration = held.call.start, held.call.stop, held.call.duration
        with _funcargs_of(item):
            report = item.ihook.pytest_runtest_makereport(item=item, call=info)
        _tell_xdist(item)
        for each in (report, *held.after):
            each.user_properties = list(item.user_properties)
            item.ihook.pytest_runtest_logreport(report=each)


def _invalid(record: TestRecord, reason: str) -> TestRecord:
    verdicts = tuple(
        replace(verdict, status="INVALID", reason=f"{reason}.") if not is_settled(verdict, 1) else verdict
        for verdict in record.verdicts
    )
    return replace(record, verdicts=verdicts)


def _has_passed(call: pytest.TestReport) -> bool:
    """Whether nothing but the strictness of an expected failure held against a test that passed."""
    return not call.failed or str(call.longrepr).startswith("[XPASS(strict)]")


def _tell_xdist(item: pytest.Item) -> None:
    """In a worker of pytest-xdist, say which item the next reports are of: it takes them for the last one's."""
    for plugin in item.config.pluginmanager.get_plugins():
        if hasattr(plugin, "item_index") and hasattr(plugin, "channel"):
            plugin.item_index = item.session.items.index(item)


@contextmanager
def _funcargs_of(item: pytest.Item) -> Iterator[None]:
    """Other plugins look into an item's funcargs while its report is made, which pytest takes away after a test."""
    has_none = item.__dict__.get("funcargs", {}) is None
    if has_none:
        item.__dict__["funcargs"] = {}
    try:
        yield
    finally:
        if has_none:
            item.__dict__["funcargs"] = None


def confine(config: pytest.Config, order: confirm.Order) -> None:
    """Make this pytest, started with the options of another, run some tests of it alone and write nothing else."""
    config.args = list(order.tests)
    for name, value in _NOT_FOR_A_FRESH_PROCESS.items():
        if hasattr(config.option, name):
            setattr(config.option, name, value)
    config.option.gpuperf_json = order.results
    for descriptor in order.descriptors:
        adopt(descriptor)
    if order.is_of_worker and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = True  # as pytest-benchmark is in every worker of pytest-xdist
    threading.Thread(target=_end_with, args=(order.parent_pid,), name="gpuperf-parent", daemon=True).start()


def _end_with(parent_pid: int) -> None:
    """End this process and all that it started when the one that waits for it is gone, and its lease with it."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
