"""results.jsonl: one line for the run, one for each test as it ends, one at the end; and what to record from it."""

import os
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from pytest_gpuperf.environment import git_commit, visit_id
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import (
    RESULTS_SCHEMA,
    KernelRecord,
    LeaseUse,
    Record,
    Results,
    RunEnd,
    RunInfo,
    TestRecord,
    decode_lines,
    encode,
)


class ResultsWriter:
    """Writes results.jsonl as results arrive, each line on disk before the next test: an interrupted run keeps them.

    Args:
        path: The file; an older one is replaced when the first result arrives, not before.
        root: Folder whose git revision is noted.
    """

    def __init__(self, path: Path, root: Path) -> None:
        now = datetime.now(UTC)
        self.path = path
        self.tests: list[TestRecord] = []
        self.profiles: list[KernelRecord] = []
        self._is_begun = False
        self._root = root
        self._now = now
        self._run: RunInfo | None = None

    @property
    def run(self) -> RunInfo:
        """This run; its git revision is looked up at the first result."""
        if self._run is None:
            self._run = RunInfo(
                schema=RESULTS_SCHEMA,
                run_id=uuid4().hex[:12],
                date=self._now.isoformat(timespec="seconds"),
                visit=visit_id(self._now),
                commit=git_commit(self._root),
            )
        return self._run

    def add(self, record: TestRecord) -> None:
        """Append one test's record and wait until it is on disk.

        Raises:
            OSError: The file cannot be written.
        """
        self.tests.append(record)
        self._put(record)

    def add_profile(self, record: KernelRecord) -> None:
        """Append what a profiler saw of one metric.

        Raises:
            OSError: The file cannot be written.
        """
        self.profiles.append(record)
        self._put(record)

    def add_use(self, record: LeaseUse) -> None:
        """Append what became of a GPU while a test held it; the next line takes it to the disk.

        Raises:
            OSError: The file cannot be written.
        """
        self._put(record, is_urgent=False)

    def _put(self, record: Record, *, is_urgent: bool = True) -> None:
        if not self._is_begun:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            if self.path.parent.name == ".gpuperf":
                (self.path.parent / ".gitignore").write_text("*\n")
            self._append(self.run)
            self._is_begun = True
        self._append(record, is_urgent=is_urgent)

    def end(self, tests: tuple[str, ...], *, is_whole: bool) -> None:
        """Append the last line, if anything was written at all."""
        if self._is_begun:
            self._append(RunEnd(tests=tests, is_whole=is_whole))

    def _append(self, record: Record, *, is_urgent: bool = True) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                file.write(encode(record) + b"\n")
                if is_urgent:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # half a line would spoil the next one
                raise


def read_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        UsageError: There is none, or it is not one of ours.
    """
    try:
        with path.open("rb") as file:
            return decode_lines(file)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"No results at {path}. Run pytest first, or name another file.") from None
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from None
