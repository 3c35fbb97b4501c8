"""What a user reads of a history: what is in it, one series, and where the levels step."""

from collections.abc import Callable, Sequence
from itertools import groupby

from pytest_gpuperf.analysis.changes import MIN_SEGMENT
from pytest_gpuperf.analysis.history import Added, Point, Series, Summary, open_history
from pytest_gpuperf.analysis.history_file import Place
from pytest_gpuperf.analysis.levels import Levels, LevelStep
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.judge import worse_and_better
from pytest_gpuperf.records import Results
from pytest_gpuperf.report.terminal import Line
from pytest_gpuperf.units import counted, format_percent, format_value


def added_lines(added: Added, name: str) -> list[Line]:
    """Say what became of a run that was added.

    Args:
        added: By the store.
        name: Of the store.
    """
    run = added.run
    if not added.points:
        return [Line(text=f"History in {name}: run {run.run_id} of {_day(run.date)} is there already.")]
    lines = [
        Line(text=f"History in {name}: {counted(added.points, 'value')} of run {run.run_id} added.", colour="cyan")
    ]
    if added.newer:
        text = (
            f"Run {run.run_id} is dated {_minute(run.date)}, before the run of {_minute(added.newer)} that was added "
            "earlier: a clock stepped back, or results were added late. It comes after that run all the same; "
            "gpuperf history changes --by-date orders by date."
        )
        lines.append(Line(text=text, colour="yellow"))
    return lines


def list_lines(summaries: Sequence[Summary]) -> list[Line]:
    """One row a series, under its test: runs, first and last date, last value."""
    lines: list[Line] = []
    for (key, slug), group in groupby(summaries, key=lambda summary: (summary.series.key, summary.series.slug)):
        rows = list(group)
        lines.append(Line(text=f"{key} on {slug}"))
        metrics = [row.series.metric for row in rows]
        for row in rows:
            method = f"  {row.series.method}" if metrics.count(row.series.metric) > 1 else ""
            lines.append(
                Line(
                    text=f"  {row.series.metric:<16} {counted(row.runs, 'run'):>9}  {_day(row.first_date)} to "
                    f"{_day(row.last_date)}  {format_value(row.last, row.series.unit):>14}{method}"
                )
            )
    return lines


def show_lines(series: Series, points: Sequence[Point]) -> list[Line]:
    """Every value of a series: date, commit, value, verdict."""
    lines = [Line(text=_title(series))]
    for point in points:
        change = "" if point.change is None else f" {format_percent(point.change, signed=True)}"
        again = f" (measured again, {point.attempt})" if point.attempt else ""
        value, verdict = format_value(point.value, series.unit), point.status or "-"
        text = f"  {_minute(point.date)}  {point.commit or '-':<18} {value:>14}  {verdict}{change}{again}"
        lines.append(Line(text=text))
    return lines


def change_lines(found: Sequence[Levels]) -> list[Line]:
    """The steps of every series that has some, then how many there are, then what to know of them."""
    lines: list[Line] = []
    for levels in found:
        if levels.steps:
            lines.append(Line(text=f"{_title(levels.series)}, {counted(levels.observations, 'observation')}"))
        for step in levels.steps:
            lines += _step_lines(step, levels.series)
    return [*lines, _tally(found), *_change_notes(found)]


def _step_lines(step: LevelStep, series: Series) -> list[Line]:
    worse, better = worse_and_better(series.unit)
    low, change, high, word = step.change_low, step.change, step.change_high, worse
    if change < 0:
        low, change, high, word = -high, -change, -low, better
    values = f"{format_value(step.value_before, series.unit)} -> {format_value(step.value_after, series.unit)}"
    interval = f"95 % interval {format_percent(low)} to {format_percent(high)}"
    return [
        Line(
            text=f"  {_minute(step.first.date)}  between {step.last.commit or '(no commit)'} "
            f"({_day(step.last.date)}) and {step.first.commit or '(no commit)'}"
        ),
        Line(
            text=f"    {values}: {format_percent(change)} {word}, {interval}",
            colour="red" if step.change > 0 else "cyan",
        ),
    ]


def _tally(found: Sequence[Levels]) -> Line:
    count = sum(len(levels.steps) for levels in found)
    short = sum(levels.is_too_short for levels in found)
    too_short = f"; {short} of them too short, with fewer than {2 * MIN_SEGMENT} observations" if short else ""
    return Line(text=f"{counted(count, 'step') if count else 'No step'} in {len(found)} series{too_short}.")


def _change_notes(found: Sequence[Levels]) -> list[Line]:
    notes = [
        f"{_title(levels.series)}: all devices were replaced on {_day(first.date)}. A step there cannot be told from "
        "what the devices differ by: measure once more on one of the old ones."
        for levels in found
        for first in levels.replaced
    ]
    backwards = max((levels.backwards for levels in found), default=0)
    if backwards:
        notes.append(
            f"{counted(backwards, 'run')} dated before one that was added earlier: a clock stepped back, or results "
            "were added late. The order is that of adding; --by-date orders by date."
        )
    if invalid := sum(levels.invalid for levels in found):
        notes.append(f"{counted(invalid, 'value')} left out: INVALID, measured while the device was unwell.")
    return [Line(text=note, colour="yellow") for note in notes]


def _title(series: Series) -> str:
    return f"{series.key} {series.metric} on {series.slug} ({series.method})"


def _day(date: str) -> str:
    return date[:10]


def _minute(date: str) -> str:
    return date[:16].replace("T", " ")


def add_run(place: Place, results: Results) -> list[Line]:
    """Add a run to a store, and say what became of it.

    Raises:
        HistoryError: The store cannot take it.
    """
    with open_history(place, mode="write") as history:
        return added_lines(history.add(results), place.name)


def chosen(summaries: Sequence[Summary], is_chosen: Callable[[str], bool], place: Place) -> list[Summary]:
    """The series of some tests.

    Args:
        summaries: Of all series.
        is_chosen: Of a test's full id.
        place: Of the store.

    Raises:
        UsageError: There is none.
    """
    found = [summary for summary in summaries if is_chosen(summary.series.key)]
    if not found:
        raise UsageError(
            f"The history in {place.name} holds no such test or metric. See what there is:  gpuperf history list"
        )
    return found
