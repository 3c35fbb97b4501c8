"""The documentation against the code: its complete tests run, and it names every option and none that is not there."""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import msgspec
import pytest
import typer
from harness import FAKE_H100

from pytest_gpuperf import cli, options
from pytest_gpuperf.priors import package_priors
from pytest_gpuperf.records import BaselineFile
from pytest_gpuperf.requirement import GpuRequirement
from pytest_gpuperf.timing import CPU_PLANS, GPU_PLANS, Plan

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
OPTIONS = (ROOT / "docs/options.md").read_text()

#: A block of Python whose info string says what it is: `test`, `test cpu`, `test skipped` or `conftest`.
_BLOCK = re.compile(r"(?ms)^```python (?P<what>test|test cpu|test skipped|conftest)\n(?P<source>.*?)^```$")

#: An option of pytest, wherever it stands.
_PYTEST_OPTION = re.compile(r"--gpuperf-[a-z-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A complete file in the documentation.

    Attributes:
        place: Page and line.
        what: Its info string, after `python`.
        source: The file.
    """

    place: str
    what: str
    source: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(place=f"{page.name}:{line}", what=match["what"], source=match["source"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
TESTS = [block for block in BLOCKS if block.what != "conftest"]


def commands() -> dict[str, set[str]]:
    """Every command of `gpuperf`, such as `baseline list`, with its options."""
    found: dict[str, set[str]] = {}

    def visit(node: object, name: str) -> None:
        children = getattr(node, "commands", None)
        if children is None:
            found[name] = {text for each in node.params for text in each.opts if text.startswith("--")}  # type: ignore[attr-defined]
            return
        for child, command in children.items():
            visit(command, f"{name} {child}".strip())

    visit(typer.main.get_command(cli.app), "")
    return found


def declared_options() -> set[str]:
    """Every option that the plugin adds to pytest."""
    parser = pytest.Parser(_ispytest=True)
    options.add_options(parser)
    return {name for group in parser._groups for option in group.options for name in option.names()}


@pytest.mark.parametrize("block", TESTS, ids=lambda block: block.place)
def test_a_complete_test_of_the_documentation_runs(
    block: Block, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(pytester.path / ".locks"))
    is_cpu = block.what == "test cpu"
    if is_cpu and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    pytester.makeconftest("" if is_cpu else FAKE_H100)
    pytester.makepyfile(test_docs_example=block.source)

    if is_cpu:  # on its own: pytester forgets what an inner run imported, and torch dies of a second import
        result = pytester.runpytest_subprocess("--gpuperf-device=cpu")
    else:
        result = pytester.runpytest_inprocess("-p", "no:hypothesispytest")

    outcomes = result.parseoutcomes()
    expected = "skipped" if block.what == "test skipped" else "passed"
    assert set(outcomes) - {"warnings", "warning"} == {expected}, result.stdout.str()


def test_there_are_complete_tests_of_every_fixture() -> None:
    sources = "".join(block.source for block in TESTS)
    for fixture in ("gpu, ", "gpus", "gpu_benchmark", "perf.record", "perf.region", "gpu_monitor"):
        assert fixture in sources


def test_the_conftest_of_the_documentation_is_the_one_that_its_tests_run_with() -> None:
    (conftest,) = [block.source for block in BLOCKS if block.what == "conftest"]
    assert conftest.split() == FAKE_H100.split()


def test_every_option_of_pytest_is_in_the_reference() -> None:
    missing = [option for option in declared_options() if f"`{option}" not in OPTIONS]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_an_option_of_pytest_that_does_not_exist(page: Path) -> None:
    assert set(_PYTEST_OPTION.findall(page.read_text())) <= declared_options()


@pytest.mark.parametrize(("command", "names"), commands().items())
def test_every_command_and_its_options_are_in_the_reference(command: str, names: set[str]) -> None:
    assert f"`gpuperf {command}" in OPTIONS
    missing = [name for name in names if not re.search(rf"^\| `{name}\b", OPTIONS, re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_command_or_an_option_of_it_that_does_not_exist(page: Path) -> None:
    known = commands()
    wrong = []
    for line in re.findall(r"(?:^|`|: {1,2})gpuperf ([a-z][^`\n]*)", page.read_text(), re.MULTILINE):
        words = line.partition(" -- ")[0].split()  # what follows is pytest's
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        if not (used <= known[name] if name else words == ["baseline"]):
            wrong.append(line)
    assert not wrong


def test_every_argument_of_the_markers_is_in_the_reference() -> None:
    names = [name for kind in (GpuRequirement, options.PerfCriterion) for name in signature(kind).parameters]
    assert not [name for name in names if f"| `{name}` |" not in OPTIONS]


def percent(fraction: float) -> str:
    return f"{fraction * 100:g} %"


def test_the_priors_are_those_of_the_code() -> None:
    text = (ROOT / "docs/verdicts.md").read_text()
    for kind, prior in package_priors().items():
        levels = [
            f"{percent(level.deviation)} ({level.worth:g})" for level in (prior.within, prior.session, prior.device)
        ]
        cells = [*levels, percent(prior.floor), percent(prior.tolerance)]
        assert f"| {'on a CPU' if kind == 'cpu' else kind} | {' | '.join(cells)} |" in text


def test_the_baseline_file_shown_can_be_read() -> None:
    (shown,) = re.findall(r"(?ms)^```json\n(.*?)^```$", (ROOT / "docs/baselines.md").read_text())
    assert list(msgspec.json.decode(shown, type=BaselineFile).tests) == ["test_kernel"]


@pytest.mark.parametrize(("name", "plan"), [*GPU_PLANS.items(), ("on a CPU", CPU_PLANS["cold"])])
def test_the_plans_of_measuring_are_those_of_the_code(name: str, plan: Plan) -> None:
    row = (
        f"| {name} | {plan.warmup_s:g} to {plan.warmup_limit_s:g} s | {plan.measure_s:g} to {plan.measure_limit_s:g} s "
        f"| {percent(plan.precision)} | {plan.block_s * 1e3:g} ms | {plan.period_s:g} s |"
    )
    assert row in (ROOT / "docs/measuring.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            text = file.read_text()
            headings = [re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in text.splitlines()]
            assert f'id="{anchor}"' in text or anchor in headings, anchor
