"""What the one process that writes does with the results as they arrive, and with the baselines at the end."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import msgspec

from pytest_gpuperf import baseline_store, baselines
from pytest_gpuperf.anchors import IDS
from pytest_gpuperf.baseline_patch import git_patch
from pytest_gpuperf.baselines import Change, Entry
from pytest_gpuperf.environment import git_top
from pytest_gpuperf.errors import GpuperfError
from pytest_gpuperf.kernel_store import with_kernels
from pytest_gpuperf.records import KernelRecord, LeaseUse, Results, Status, TestRecord
from pytest_gpuperf.report.expectations import expectation_lines
from pytest_gpuperf.report.results import ResultsWriter
from pytest_gpuperf.report.terminal import Line, baseline_command, notes, table


class Orders(Protocol):
    """What the options say about the files: see `options.Settings`."""

    @property
    def json(self) -> Path: ...
    @property
    def baselines(self) -> Path: ...
    @property
    def update(self) -> bool: ...
    @property
    def accept(self) -> str | None: ...
    @property
    def patch(self) -> Path | None: ...
    @property
    def history(self) -> str | None: ...
    @property
    def expectations(self) -> str: ...


class Controller:
    """Collects the records of all tests, whichever worker ran them.

    Args:
        root: pytest's root folder.
        orders: Where results, baselines and patch go, and what to do with the baselines at the end.
        silent: Verdicts that the report does not explain.
    """

    def __init__(self, root: Path, orders: Orders, *, silent: Collection[Status] = ()) -> None:
        self.writer = ResultsWriter(orders.json, root)
        self.problems: list[str] = []
        self._root = root
        self._baselines_root = orders.baselines
        self._update = orders.update
        self._accept = orders.accept
        self._patch = orders.patch
        self._history = orders.history
        self._expectations = orders.expectations
        self._history_lines: list[Line] = []
        self._silent = silent
        self._seen: frozenset[str] = frozenset()
        self._changes: tuple[Change, ...] = ()
        self._unused: tuple[Entry, ...] = ()

    @property
    def records(self) -> list[TestRecord]:
        """Everything that arrived, in order of arrival."""
        return self.writer.tests

    def add(self, text: str) -> TestRecord:
        """Take a test's record as a worker sent it, and put it on disk."""
        record = msgspec.json.decode(text, type=TestRecord)
        try:
            self.writer.add(record)
        except OSError as error:
            self._complain(error)
        return record

    def add_profile(self, text: str) -> None:
        """Take what a profiler saw as a worker sent it, and put it on disk."""
        try:
            self.writer.add_profile(msgspec.json.decode(text, type=KernelRecord))
        except OSError as error:
            self._complain(error)

    def add_use(self, use: LeaseUse) -> None:
        """Put on disk what became of a GPU while a test held it."""
        try:
            self.writer.add_use(use)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        problem = f"The results could not be written to {self.writer.path}: {error.strerror}."
        self.problems += [] if problem in self.problems else [problem]

    def end(self, seen: Collection[str], *, is_whole: bool, is_interrupted: bool) -> None:
        """Close the results, and bring the baselines up to date if that was asked for.

        Args:
            seen: Node ids of all tests that had their turn, whether they measured anything or not.
            is_whole: Whole modules ran to their end, so what was not seen is gone.
            is_interrupted: The run ended early: the baselines are left alone.
        """
        self._seen = frozenset(seen)
        try:
            self.writer.end(tuple(sorted(self._seen)), is_whole=is_whole)
            if is_whole:
                self._unused = self._find_unused()
            if not is_interrupted:
                self._bring_up_to_date()
        except OSError as error:
            self.problems.append(f"{error.filename or self.writer.path} could not be written: {error.strerror}.")
        except GpuperfError as error:
            self.problems.append(str(error))
        if self._history is not None:
            self._add_to_history(self._history)

    def lines(self, width: int, gpu_problem: str | None) -> list[Line]:
        """The report: why there was no GPU, table, notes, what happened to the baselines, problems."""
        is_recording = self._update or self._accept is not None or self._patch is not None
        record_command = None if is_recording else self._command("record")
        lines = [Line(text=f"Measured on the CPU: {gpu_problem}", colour="yellow")] if gpu_problem else []
        lines += [
            *table(self.records, width=width),
            *notes(self.records, record_command=record_command, silent=self._silent),
        ]
        lines += expectation_lines(self.records, width=width) if self._expectations != "off" else []
        lines += [*self._change_lines(), *self._history_lines]
        if self._unused:
            names = ", ".join(f"{key.test} {metric}" for key, metric in self._unused[:3])
            more = f" and {len(self._unused) - 3} more" if len(self._unused) > 3 else ""
            lines.append(
                Line(text=f"Unused baselines: {names}{more}. Delete with:  {self._command('prune')}", colour="yellow")
            )
        return lines + [Line(text=problem, colour="red") for problem in self.problems]

    def _command(self, action: str) -> str:
        return baseline_command(action, self._baselines_root, self.writer.path)

    def _find_unused(self) -> tuple[Entry, ...]:
        entries: list[Entry] = []
        for folder in sorted({record.slug for record in self.records}):
            entries += unused_entries(self._baselines_root, folder, self.records, self._seen)
        return tuple(entries)

    def _bring_up_to_date(self) -> None:
        run, records = self.writer.run, self.records
        if self._patch is not None:
            reason = self._accept or f"accepted by applying the patch of {run.commit or run.run_id}"
            plan = baselines.plan(self._baselines_root, run, records, accept_reason=reason)
            plan = with_kernels(plan, self._baselines_root, run, records, self.writer.profiles)
            self._patch.parent.mkdir(parents=True, exist_ok=True)
            top = git_top(self._baselines_root) or self._root
            self._patch.write_text(git_patch(self._baselines_root, plan, top=top), encoding="utf-8")
            self._changes = plan.changes
        elif self._update or self._accept is not None:
            self._changes = baseline_store.write(
                self._baselines_root, run, records, accept_reason=self._accept, profiles=self.writer.profiles
            )

    def _add_to_history(self, place: str) -> None:
        from pytest_gpuperf.analysis.history_file import place_of
        from pytest_gpuperf.report.history import add_run

        results = Results(run=self.writer.run, tests=tuple(self.records))
        try:
            self._history_lines = add_run(place_of(place, root=self._root), results)
        except GpuperfError as error:
            self.problems.append(str(error))

    def _change_lines(self) -> list[Line]:
        if not self._changes:
            return []
        where = f"Patch for git apply: {self._patch}" if self._patch else f"Baselines in {self._baselines_root}"
        return [
            Line(text=f"{where}: {tally(self._changes)}.", colour="cyan"),
            *refusals(self._changes, self._command("accept")),
        ]


def unused_entries(root: Path, folder: str, records: list[TestRecord], seen: Collection[str]) -> tuple[Entry, ...]:
    """Baselines of the modules that ran whose test is gone, or whose test ran and no longer measures the metric."""
    mine = [record for record in records if record.slug == folder]
    measured = [(record.key, m.metric) for record in mine for m in record.measurements]
    entries = baselines.unused(root, folder, measured, {record.key.module for record in mine})
    had_their_turn = IDS.union(seen)  # an anchor that was left out, for want of torch or memory, is not gone
    complete = {str(record.key) for record in mine if record.passed}
    return tuple((key, metric) for key, metric in entries if str(key) not in had_their_turn or str(key) in complete)


def tally(changes: tuple[Change, ...]) -> str:
    """`24 recorded, 1 accepted, 2 refused`."""
    actions = [change.action for change in changes]
    return ", ".join(f"{actions.count(a)} {a}" for a in ("recorded", "accepted", "refused") if a in actions)


def refusals(changes: tuple[Change, ...], accept: str) -> list[Line]:
    """Why metrics were not recorded, one line each, five at most.

    Args:
        changes: What became of all metrics.
        accept: Command that accepts values, up to the reason.
    """
    refused = [change for change in changes if change.action == "refused"]
    lines = []
    for change in refused[:5]:
        hint = (
            f": accept it with: {accept} --reason WHY {shlex.quote(str(change.key))}" if change.can_be_accepted else ""
        )
        lines.append(Line(text=f"Refused {change.key.test} {change.metric}: {change.reason}{hint}", colour="yellow"))
    if len(refused) > 5:
        lines.append(Line(text=f"Refused {len(refused) - 5} more.", colour="yellow"))
    return lines
