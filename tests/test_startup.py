"""What the plugin costs a run that measures nothing: no heavy import, no output."""

import pytest
from harness import KERNEL, Suite

REPORTS_IMPORTS = """
import sys

def pytest_unconfigure():
    heavy = {"torch", "pynvml", "numpy", "rich", "typer", "filelock"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""

#: pytest itself, and pytest-benchmark, may not be what imports them either.
ALONE = ("-p", "no:benchmark", "-p", "no:xdist", "-s")


def empty(*options: str) -> Suite:
    files = {"test_suite.py": "def test_empty(): pass"}
    return Suite(files=files, conftest=REPORTS_IMPORTS, options=(*ALONE, *options), is_subprocess=True)


@pytest.mark.parametrize("options", [("--collect-only",), ()], ids=["collecting", "running"])
def test_run_that_measures_nothing_imports_nothing_heavy(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    result = empty().run(pytester, *options)

    assert result.ret == 0
    result.stdout.fnmatch_lines(["imported: []"])
    result.stdout.no_fnmatch_line("*GPU*")


def test_measuring_imports_no_torch_where_the_clock_needs_none(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": KERNEL}, is_subprocess=True, options=ALONE)
    result = Suite(files=suite.files, conftest=suite.conftest + REPORTS_IMPORTS, options=ALONE, is_subprocess=True).run(
        pytester
    )

    assert result.ret == 0
    result.stdout.fnmatch_lines(["imported: [[]*"])
    result.stdout.no_fnmatch_line("imported: *torch*")


def test_help_imports_nothing_heavy(pytester: pytest.Pytester) -> None:
    empty().run(pytester, "--help").stdout.fnmatch_lines(["imported: []"])


def test_switched_off_plugin_is_gone(pytester: pytest.Pytester) -> None:
    result = empty().run(pytester, "-p", "no:gpuperf", "--help")

    result.stdout.no_fnmatch_line("*--gpuperf*")
