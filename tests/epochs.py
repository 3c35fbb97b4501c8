"""Baselines made step by step, as an update makes them metric by metric."""

from collections.abc import Collection

from pytest_gpuperf.baselines import _appended, _checked_reason, _empty, _epoch, _with_epochs
from pytest_gpuperf.records import BaselineFile, RunInfo, TestRecord


def append(file: BaselineFile | None, run: RunInfo, record: TestRecord, metrics: Collection[str]) -> BaselineFile:
    """Add a record's values of some metrics to their epochs; `None` begins a file."""
    file = file or _empty(record)
    chosen = [one for one in record.measurements if one.metric in metrics]
    return _with_epochs(file, record, {one.metric: _appended(file, run, record, one) for one in chosen})


def accept(
    file: BaselineFile | None, run: RunInfo, record: TestRecord, metrics: Collection[str], reason: str
) -> BaselineFile:
    """Begin a new epoch of some metrics, which holds this run alone."""
    chosen = [one for one in record.measurements if one.metric in metrics]
    epochs = {one.metric: _epoch(run, record, one, reason=_checked_reason(reason)) for one in chosen}
    return _with_epochs(file or _empty(record), record, epochs)
