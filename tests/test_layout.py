"""The shape of the package: its size, the length of its functions, what loading it costs; no traces of a machine."""

import ast
import io
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pytest_gpuperf"
HEAVY = ("torch", "pynvml", "numpy", "rich", "typer", "filelock", "matplotlib", "vllm")

#: Lines of code of the flat modules together: 7,800 when this was written, with the queue of leases, MIG, health and
#: quarantine, and kernels. The commands of `gpuperf` are a room of their own.
CORE_CEILING = 7800
LONGEST_FUNCTION = 40

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, Function)) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: neither blank, nor comment alone, nor docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            held.update(range(token.start[0], token.end[0] + 1))
    return held - docstring_lines(ast.parse(source))


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def own_lines(function: Function, held: set[int]) -> int:
    """Lines of code of a function, its signature included."""
    return len(held & set(range(function.lineno, (function.end_lineno or 0) + 1)))


def repository_files() -> list[Path]:
    try:
        told = subprocess.run(
            [shutil.which("git") or "git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git work tree")
    return [ROOT / name for name in told.stdout.split("\0") if name]


def test_lines_of_code_are_counted_as_a_reader_would() -> None:
    source = '"""Doc."""\n\n# a comment\nx = 1  # and one beside code\n\n\ndef f():\n    """Two\n    lines."""\n'
    source += "    return (\n        x\n    )\n"
    assert code_lines(source) == {4, 7, 10, 11, 12}


def test_the_core_can_be_read_in_one_sitting(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {path.name: len(code_lines(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.glob("*.py"))}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:5} {name}")  # noqa: T201 - seen when the test fails, or with -s
    print(f"{sum(sizes.values()):5} together, {CORE_CEILING} allowed")  # noqa: T201 - as above
    assert sum(sizes.values()) <= CORE_CEILING


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    held = code_lines(source)
    lengths = [(own_lines(function, held), function.name, function.lineno) for function in functions(ast.parse(source))]
    assert [one for one in lengths if one[0] > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_says_what_it_is_for(path: Path) -> None:
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    assert first
    assert first[0].strip()


def test_loading_the_plugin_loads_nothing_heavy() -> None:
    code = f"import sys, pytest_gpuperf.plugin; print(*sorted({{*{HEAVY!r}}} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.split() == []


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = [f"/{folder}/".encode() for folder in ("work", "root")]
    found = {
        (path.relative_to(ROOT).as_posix(), place.decode())
        for path in repository_files()
        if path.is_file()
        for place in places
        if place in path.read_bytes()
    }
    assert found == set()
