"""The history store: every value of every run, in one SQLite file that many processes may write to.

One row a value of a run in `points`, in the order in which the runs were added: a machine's clock may step back, the
order of adding does not. Adding a run again adds only what the store lacks.
"""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal

import msgspec

from pytest_gpuperf.analysis.history_file import TIMEOUT_S, Place, open_file, transaction
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.priors import PriorName
from pytest_gpuperf.records import Measurement, Record, Results, RunInfo, Status, TestRecord
from pytest_gpuperf.units import Better

_SUMMARIES = """
SELECT s.id, s.slug, s.module, s.test, s.metric, s.unit, s.method, s.better, s.kind, runs, a.date, b.date,
    (SELECT value FROM points WHERE series = s.id ORDER BY run DESC, attempt DESC LIMIT 1)
FROM (SELECT series, COUNT(DISTINCT run) AS runs, MIN(run) AS first, MAX(run) AS last FROM points GROUP BY series)
JOIN series AS s ON s.id = series JOIN runs AS a ON a.sequence = first JOIN runs AS b ON b.sequence = last
ORDER BY s.module, s.test, s.metric, s.slug, s.id
"""
_ADD_SERIES = """
INSERT INTO series (slug, module, test, metric, unit, method, better, kind) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET kind = excluded.kind
"""
_SERIES_ID = """
SELECT id FROM series
WHERE slug = ? AND module = ? AND test = ? AND metric = ? AND unit = ? AND method = ? AND better = ?
"""


class Series(Record, frozen=True, kw_only=True):
    """What makes values comparable with each other.

    Attributes:
        id: Of the store.
        slug: Kind of device, as in the baselines' folders.
        method: In words, such as `sustained, cuda-events`.
        kind: Which prior the metric's noise has.
    """

    id: int
    slug: str
    module: str
    test: str
    metric: str
    unit: str
    method: str
    better: Better
    kind: PriorName

    @property
    def key(self) -> str:
        """The test's full id."""
        return f"{self.module}::{self.test}"


class Point(Record, frozen=True, kw_only=True):
    """One value of one run.

    Attributes:
        date: ISO 8601, UTC, of the run.
        devices: Hashed UUIDs, sorted.
        attempt: 0 for the run itself, then the fresh processes that measured again.
        status: The verdict then.
        change: How much worse than the baseline then, as a fraction.
    """

    run_id: str
    date: str
    visit: str
    commit: str | None
    attempt: int
    value: float
    spread: float | None
    devices: tuple[str, ...]
    status: Status | None
    change: float | None
    sm_clock_mhz: float | None


class Summary(Record, frozen=True, kw_only=True):
    """A series in short.

    Attributes:
        runs: How many runs have a value of it.
        last: Its newest value.
    """

    series: Series
    runs: int
    first_date: str
    last_date: str
    last: float


class Added(Record, frozen=True, kw_only=True):
    """What became of a run that was added.

    Attributes:
        points: Values that the store lacked.
        newer: Date of the run stored before, where it is later than this one's.
    """

    run: RunInfo
    points: int
    newer: str | None = None


@contextlib.contextmanager
def open_history(
    place: Place, *, mode: Literal["read", "write"] = "read", timeout_s: float = TIMEOUT_S
) -> Iterator["History"]:
    """Open a store, and close it at the end; see `open_file` for the arguments and errors."""
    with open_file(place, mode=mode, timeout_s=timeout_s) as connection:
        yield History(connection)


class History:
    """An open store; see `open_history`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, results: Results) -> Added:
        """Add a run, or what the store lacks of it: all of it or, on any error, nothing."""
        run = results.run
        with transaction(self._connection):
            self._connection.execute(
                'INSERT OR IGNORE INTO runs (run_id, date, visit, "commit") VALUES (?, ?, ?, ?)',
                (run.run_id, _utc(run.date), run.visit, run.commit),
            )
            (number,) = self._connection.execute("SELECT sequence FROM runs WHERE run_id = ?", (run.run_id,)).fetchone()
            rows = [row for record in results.tests for row in self._rows(record)]
            added = self._insert(rows, number)
            newer = self._newer({row[0] for row in rows}, number, _utc(run.date)) if added else None
        return Added(run=run, points=added, newer=newer)

    def summaries(self) -> tuple[Summary, ...]:
        """Every series in short, by test and metric."""
        found = self._connection.execute(_SUMMARIES)
        return tuple(
            Summary(series=_series(row[:9]), runs=row[9], first_date=row[10], last_date=row[11], last=row[12])
            for row in found
        )

    def points(self, series: Series) -> tuple[Point, ...]:
        """The values of a series, in the order in which their runs were added."""
        found = self._connection.execute(
            'SELECT run_id, date, visit, "commit", attempt, value, spread, devices, status, change, sm_clock_mhz '
            "FROM points JOIN runs ON sequence = run WHERE series = ? ORDER BY run, attempt",
            (series.id,),
        )
        names = Point.__struct_fields__
        return tuple(
            msgspec.convert({**dict(zip(names, row, strict=True)), "devices": tuple(row[7].split())}, Point)
            for row in found
        )

    def _rows(self, record: TestRecord) -> Iterator[tuple[object, ...]]:
        """Series, value and so on of every run of every metric."""
        verdicts = {verdict.metric: verdict for verdict in record.verdicts}
        for metric in dict.fromkeys(measurement.metric for measurement in record.measurements):
            verdict = verdicts.get(metric)
            judged = (verdict.status, verdict.change) if verdict else (None, None)
            for run in record.runs_of(metric):
                if run.value <= 0:
                    raise UsageError(
                        f"{metric} of {record.key} is {run.value:g} {run.unit}. A history keeps values above 0: "
                        "was the results file edited?"
                    )
                is_cpu = record.environment.hardware.is_cpu
                identity = (
                    record.slug,
                    record.key.module,
                    record.key.test,
                    metric,
                    run.unit,
                    _way(run),
                    run.better,
                )
                clock_mhz = run.telemetry.sm_clock_mhz if run.telemetry else None
                number = self._series_id(identity, "cpu" if is_cpu else run.kind)
                yield number, run.value, run.spread, " ".join(sorted(record.devices)), *judged, clock_mhz

    def _series_id(self, identity: tuple[str, ...], kind: PriorName) -> object:
        self._connection.execute(_ADD_SERIES, (*identity, kind))
        return self._connection.execute(_SERIES_ID, identity).fetchone()[0]

    def _insert(self, rows: list[tuple[object, ...]], run: int) -> int:
        """How many of the rows were not there yet."""
        attempts: Counter[object] = Counter()
        before = self._connection.total_changes
        for series, *values in rows:
            self._connection.execute(
                "INSERT OR IGNORE INTO points VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (series, run, attempts[series], *values),
            )
            attempts[series] += 1
        return self._connection.total_changes - before

    def _newer(self, series: set[object], run: int, date: str) -> str | None:
        """The date of the run before, where it is later."""
        before = [
            self._connection.execute(
                "SELECT date FROM runs WHERE sequence = (SELECT MAX(run) FROM points WHERE series = ? AND run < ?)",
                (one, run),
            ).fetchone()
            for one in series
        ]
        return max((found[0] for found in before if found and found[0] > date), default=None)


def _way(run: Measurement) -> str:
    """How it was measured; of a curve with its sizes: a mean over other sizes is another series."""
    return f"{run.method}, {run.curve.x} {'+'.join(run.curve.points)}" if run.curve else str(run.method)


def _series(row: tuple[object, ...]) -> Series:
    return msgspec.convert(dict(zip(Series.__struct_fields__, row, strict=True)), Series)


def _utc(date: str) -> str:
    """The date in UTC, so that dates are in order as texts."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).isoformat(timespec="seconds")
    except ValueError:
        raise UsageError(f"The run's date {date!r} is not an ISO 8601 date: is the results file edited?") from None
