"""What the commands share: arguments, exit codes, which tests are meant, and printing."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Results, TestRecord
from pytest_gpuperf.report.terminal import Line

GOOD, ERROR, REGRESSION, NOT_SETTLED, INTERRUPTED = 0, 1, 2, 3, 130

BaselinesOption = Annotated[Path, typer.Option("--baselines", help="Folder of the baselines.")]
ResultsOption = Annotated[Path, typer.Option("--results", help="Results of a run of pytest.")]
TestsArgument = Annotated[
    list[str] | None, typer.Argument(help="Full ids, modules, functions, or parts of a test's own name; default: all.")
]
PytestArguments = Annotated[list[str] | None, typer.Argument(metavar="-- PYTEST_ARGS", help="Arguments of pytest.")]
DEFAULT_BASELINES = Path("baselines")
DEFAULT_RESULTS = Path(".gpuperf/results.jsonl")


def chosen(found: Results, tests: list[str] | None) -> list[TestRecord]:
    """The tests of a results file that are meant.

    Raises:
        UsageError: There are none.
    """
    records = [record for record in found.tests if is_chosen(str(record.key), tests)]
    if not records:
        like = f" like {' or '.join(tests)}" if tests else ""
        raise UsageError(f"The results hold no test{like}.")
    return records


def is_chosen(test: str, names: list[str] | None) -> bool:
    """Whether a test's id is one of the names, or one names its module, its function, or a part of its own name."""
    module, _, own = test.partition("::")
    return not names or any(
        name in (test, module) or test.startswith(f"{name}[") or ("::" not in name and name in own) for name in names
    )


def width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns


def echo(lines: Sequence[Line]) -> None:
    """Print lines, each in its colour."""
    for line in lines:
        typer.secho(line.text, fg=line.colour)
