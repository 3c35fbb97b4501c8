"""Where the samples of a watch go as they come: CSV, lines of JSON, or Parquet."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.trials.watch import Sample

SUFFIXES = (".csv", ".jsonl", ".parquet")
FIELDS = Sample.__struct_fields__
#: Rows of a row group of Parquet: a minute and a half of eight GPUs at 10 Hz.
_ROWS = 8192
_TEXTS = ("date", "uuid", "name", "status", "reason", "holds", "xids", "error")
_WHOLE = ("gpu", "memory_used_bytes", "memory_bytes")


class SampleFile(Protocol):
    """A file that takes samples."""

    def add(self, samples: Sequence[Sample]) -> None:
        """Write the samples of one reading."""

    def close(self) -> None:
        """Write what is left."""


def open_file(path: Path) -> SampleFile:
    """Make a new file for samples, of the kind that its name's end says.

    Raises:
        UsageError: Another end, a file that is there already, a folder that is not, or pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--output {path} ends in none of {', '.join(SUFFIXES)}: the end says which kind to write.")
    if path.suffix == ".parquet":
        check_parquet()
    try:
        path.open("xb").close()
    except FileExistsError:
        raise UsageError(f"--output {path} is there already. Name another file, or remove it.") from None
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}.") from None
    kinds: dict[str, type[_Csv | _Jsonl | _Parquet]] = {".csv": _Csv, ".jsonl": _Jsonl, ".parquet": _Parquet}
    return kinds[path.suffix](path)


def check_parquet() -> None:
    """Make sure that Parquet can be written.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401 - whether it is there
    except ImportError:
        raise UsageError(
            "Parquet needs pyarrow: pip install 'pytest-gpuperf[monitor]'. Or write --output with .csv or .jsonl."
        ) from None


def row_of(sample: Sample) -> dict[str, Any]:
    """A sample as a row of flat values, by name; of several words or numbers one text, with semicolons between."""
    row: dict[str, Any] = {name: getattr(sample, name) for name in FIELDS}
    row["holds"] = None if sample.holds is None else "; ".join(sample.holds)
    row["xids"] = "; ".join(map(str, sample.xids))
    return row


class _Csv:
    """One write a reading, and nothing kept back: whatever kills us leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._write([FIELDS])

    def add(self, samples: Sequence[Sample]) -> None:
        self._write([list(row_of(sample).values()) for sample in samples])

    def close(self) -> None:
        self._file.close()

    def _write(self, rows: Sequence[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue().encode())


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def add(self, samples: Sequence[Sample]) -> None:
        self._file.write(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """A file that can be read only once it is closed, which is what Parquet is."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        kinds = {"text": pa.string(), "whole": pa.int64(), "real": pa.float64()}
        self._schema = pa.schema([(name, kinds[_kind(name)]) for name in FIELDS])
        self._writer = ParquetWriter(path, self._schema)
        self._table = pa.Table
        self._rows: list[dict[str, Any]] = []

    def add(self, samples: Sequence[Sample]) -> None:
        self._rows += [row_of(sample) for sample in samples]
        if len(self._rows) >= _ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _kind(name: str) -> str:
    return "text" if name in _TEXTS else "whole" if name in _WHOLE else "real"
