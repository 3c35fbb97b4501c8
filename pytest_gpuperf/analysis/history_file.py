"""The file of a history: where it is, how it is opened, and what is wrong with it in words that help."""

import contextlib
import os
import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pytest_gpuperf.errors import GpuperfError, UsageError
from pytest_gpuperf.records import Record

#: Version of the tables, kept as SQLite's user_version. 1: the first.
STORE_SCHEMA = 1
#: How long to wait for another process that writes. One run takes milliseconds.
TIMEOUT_S = 10.0

#: SQLite's application_id of a store: "gpuf" in ASCII.
_APPLICATION_ID = 0x67707566
#: File systems of this machine alone. A write-ahead log needs memory that all writers share, so elsewhere SQLite's
#: rollback journal is used, which needs file locks only (https://www.sqlite.org/wal.html, "Overview").
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "ramfs", "apfs"})

_TABLES = """
CREATE TABLE runs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id TEXT NOT NULL UNIQUE, date TEXT NOT NULL, visit TEXT NOT NULL, "commit" TEXT
);
CREATE TABLE series (
    id INTEGER PRIMARY KEY,
    slug TEXT NOT NULL, module TEXT NOT NULL, test TEXT NOT NULL, metric TEXT NOT NULL, unit TEXT NOT NULL,
    method TEXT NOT NULL, better TEXT NOT NULL, kind TEXT NOT NULL,
    UNIQUE (module, test, metric, slug, unit, method, better)
);
CREATE TABLE points (
    series INTEGER NOT NULL REFERENCES series, run INTEGER NOT NULL REFERENCES runs, attempt INTEGER NOT NULL,
    value REAL NOT NULL, spread REAL, devices TEXT NOT NULL, status TEXT, change REAL, sm_clock_mhz REAL,
    PRIMARY KEY (series, run, attempt)
) WITHOUT ROWID;
"""


class HistoryError(GpuperfError):
    """A history store that cannot be opened, trusted or written."""


class Place(Record, frozen=True, kw_only=True):
    """Where a store is.

    Attributes:
        name: As the user wrote it, for messages; a URI where there is no path.
        path: The file; `None` for a URI, which is SQLite's to read.
    """

    name: str
    path: Path | None = None


def place_of(text: str, *, root: Path | None = None) -> Place:
    """Read where a store is: a path, `sqlite:///PATH`, or SQLite's own `file:PATH?mode=ro`.

    Args:
        text: From the user. As everywhere, `sqlite:///a` is relative and `sqlite:////a` is not.
        root: Folder that a relative path starts from; default: the current one. A `file:` URI is SQLite's to read.

    Raises:
        UsageError: It is empty, or names another kind of database.
    """
    if not text.strip():
        raise UsageError("The path of the history is empty: is the variable that it comes from set?")
    if text.startswith("file:"):
        return Place(name=text)
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        if match[1] != "sqlite" or not text.startswith("sqlite:///") or text == "sqlite:///":
            raise UsageError(
                f"{text}: a history cannot be kept there. Valid: a path, sqlite:///PATH, file:PATH?mode=ro."
            )
        text = text.removeprefix("sqlite:///")
    path = (root or Path()) / text
    return Place(name=str(path), path=path)


@contextlib.contextmanager
def open_file(
    place: Place, *, mode: Literal["read", "write"], timeout_s: float = TIMEOUT_S
) -> Iterator[sqlite3.Connection]:
    """Open a store, and close it at the end.

    Args:
        place: Where it is.
        mode: `write` makes the store, and the folder that it lies in, if they are not there.
        timeout_s: How long to wait for another process that writes.

    Raises:
        HistoryError: It is not there, locked, damaged, of a newer version, not ours, or cannot be written; here or
            while it is open.
    """
    try:
        with contextlib.closing(_connect(place, mode, timeout_s)) as connection:
            if not _is_ready(connection, place):
                if mode == "read":
                    raise HistoryError(f"{place.name} is empty. Add runs to it:  {_add(place)}")
                _create(connection)
                _allow_readers(connection, place)
            yield connection
    except sqlite3.Error as error:
        raise HistoryError(_explanation(error, place, timeout_s)) from None


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: Literal["DEFERRED", "IMMEDIATE"] = "IMMEDIATE") -> Iterator[None]:
    """All of what is done inside, or, on any error, nothing. An immediate one waits here for its turn to write."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _connect(place: Place, mode: Literal["read", "write"], timeout_s: float) -> sqlite3.Connection:
    uri, path = place.name, place.path
    if path is not None:
        _prepare(place, path, mode)
        uri = f"{path.absolute().as_uri()}?{_access(path, mode)}"
    return sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None)


def _allow_readers(connection: sqlite3.Connection, place: Place) -> None:
    """Keep a write-ahead log, with which nobody who reads waits for one who writes, where the file system allows it."""
    mounts = Path("/proc/mounts")
    if place.path and mounts.exists() and is_local(place.path.resolve(), mounts.read_text()):
        with contextlib.suppress(sqlite3.OperationalError):  # two made the store at once: it works without, too
            connection.execute("PRAGMA journal_mode = WAL")


def _prepare(place: Place, path: Path, mode: Literal["read", "write"]) -> None:
    if mode == "read" and not path.exists():
        raise HistoryError(
            f"There is no history at {path}. Add runs to it:  {_add(place)}, or let pytest do it:  "
            f"--gpuperf-history {shlex.quote(place.name)}"
        )
    if mode == "read":
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == ".gpuperf" and not (path.parent / ".gitignore").exists():
            (path.parent / ".gitignore").write_text("*\n")
    except OSError as error:
        raise HistoryError(
            f"The folder of {path} cannot be made: {error.strerror}. The results file is "
            "kept; add it to another place:  gpuperf history add RESULTS --store PATH"
        ) from None


def _access(path: Path, mode: Literal["read", "write"]) -> str:
    """How SQLite is to open a file."""
    if mode == "write":
        return "mode=rwc"
    if os.access(path.parent, os.W_OK):
        return "mode=rw"  # who reads a file with a log writes beside it, and tidies up
    return "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"


def is_local(path: Path, mounts: str) -> bool:
    """Whether a path lies on a file system that no other machine writes to.

    Args:
        path: Absolute.
        mounts: Content of /proc/mounts.
    """
    kinds = {fields[1]: fields[2] for line in mounts.splitlines() if len(fields := line.split()) > 2}
    return next((kinds[str(parent)] for parent in path.parents if str(parent) in kinds), None) in _LOCAL


def _is_ready(connection: sqlite3.Connection, place: Place) -> bool:
    """Whether the tables are there, and ours."""
    with transaction(connection, "DEFERRED"):  # one moment, while others may be making the tables
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and (application or tables):
        raise HistoryError(f"{place.name} is a database of another program, not a history. Name another file.")
    if version > STORE_SCHEMA:
        raise HistoryError(
            f"{place.name} has schema {version}, this version reads {STORE_SCHEMA}. "
            "Upgrade:  pip install --upgrade pytest-gpuperf"
        )
    return bool(tables)


def _create(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        if connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return  # another process was quicker
        for statement in _TABLES.split(";")[:-1]:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {STORE_SCHEMA}")


def _add(place: Place) -> str:
    return f"gpuperf history add RESULTS --store {shlex.quote(place.name)}"


def _explanation(error: sqlite3.Error, place: Place, timeout_s: float) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    again = f"The results file is kept; add it later:  {_add(place)}"
    match "_".join(name.split("_")[:2]):
        case "SQLITE_BUSY" | "SQLITE_LOCKED":
            return (
                f"{place.name} was locked for {timeout_s:g} s. Another run that adds to it, or a program that has it "
                f"open (fuser -v {place.name}), may hold it. {again}"
            )
        case "SQLITE_NOTADB" | "SQLITE_CORRUPT":
            return (
                f"{place.name} is damaged or no SQLite file: {error}. It was left as it is. Move it away, then save "
                f"what can be read (sqlite3 OLD .recover | sqlite3 {place.name}) or add the results files again."
            )
        case "SQLITE_READONLY":
            return f"{place.name} cannot be written: {error}. The results file is kept: add it to another with --store."
        case "SQLITE_FULL":
            return f"{place.name} cannot grow: {error}. Make room. {again}"
        case "SQLITE_CANTOPEN":
            return f"{place.name} cannot be opened: {error}. Does its folder exist, and may you read and write there?"
        case _:
            return f"{place.name}: {error}{f' ({name})' if name else ''}. {again}"
