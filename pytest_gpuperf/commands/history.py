"""`gpuperf history`: keep every run, and find when a metric changed."""

from pathlib import Path
from typing import Annotated

import typer

from pytest_gpuperf.commands.arguments import TestsArgument, echo, is_chosen
from pytest_gpuperf.report.results import read_results

StoreOption = Annotated[str, typer.Option("--store", envvar="GPUPERF_HISTORY", help="Path or URL of the history.")]
DEFAULT_STORE = ".gpuperf/history.sqlite"


def add(
    results: Annotated[list[Path], typer.Argument(help="Results of runs of pytest.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Add runs to the history, the oldest first. A run that is there already is not added again."""
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.report.history import add_run

    place = place_of(store)
    for run in sorted((read_results(path) for path in results), key=lambda found: found.run.date):
        echo(add_run(place, run))


def list_series(tests: TestsArgument = None, store: StoreOption = DEFAULT_STORE) -> None:
    """List the metrics of the history: how many runs, from when to when, the last value."""
    from pytest_gpuperf.analysis.history import open_history
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.report.history import chosen, list_lines

    place = place_of(store)
    with open_history(place) as history:
        echo(list_lines(chosen(history.summaries(), lambda test: is_chosen(test, tests), place)))


def show(
    test: Annotated[str, typer.Argument(help="Full id, module, function, or a part of the test's own name.")],
    metric: Annotated[str | None, typer.Argument(help="Default: all of the test.")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show every value of a metric: date, commit, value, verdict."""
    from pytest_gpuperf.analysis.history import open_history
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.report.history import chosen, show_lines

    place = place_of(store)
    with open_history(place) as history:
        summaries = [one for one in history.summaries() if metric in (None, one.series.metric)]
        for summary in chosen(summaries, lambda name: is_chosen(name, [test]), place):
            echo(show_lines(summary.series, history.points(summary.series)))


def changes(
    tests: TestsArgument = None,
    store: StoreOption = DEFAULT_STORE,
    by_date: Annotated[bool, typer.Option("--by-date", help="Order runs by date, not as they were added.")] = False,
) -> None:
    """Say when metrics stepped from one level to another: date, commits, by how much, with an interval."""
    from pytest_gpuperf.analysis.history import open_history
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.analysis.levels import levels
    from pytest_gpuperf.report.history import change_lines, chosen

    place = place_of(store)
    with open_history(place) as history:
        found = chosen(history.summaries(), lambda test: is_chosen(test, tests), place)
        echo(change_lines([levels(one.series, history.points(one.series), by_date=by_date) for one in found]))
