"""Baselines over several runs: strange names, what is unused, who may delete, and files that cannot be trusted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    KERNEL,
    Suite,
    assert_readable,
    baselines_of,
    bytes_of_baselines,
    gpuperf,
    recorded_tests,
    results_of,
    statuses_of,
)

from pytest_gpuperf.baseline_file import list_files

TWO = KERNEL + KERNEL.replace("test_kernel", "test_other")


def the_file(pytester: pytest.Pytester) -> Path:
    [path] = list_files(pytester.path / "baselines")
    return path


# Strange names


NAMES = {
    "slashes": "../../../../tmp/evil",
    "absolute": "/etc/passwd",
    "dots": "....",
    "backslashes": r"..\..\evil",
    "unicode": "größe-日本-🙂",
    "right-to-left": "\u202eabc",
    "long": "x" * 300,
    "nul": "a\0b",
    "newline": "a\nb",
    "surrogate": "\udc80",
    "quotes": 'it\'s "quoted" $(id) `id`',
    "brackets": "a]b[c",
    "separator": "a::b",
    "empty": "",
    "at": "a@b",
    "percent": "%s {}",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_strange_test_id_stays_inside_the_folder_and_compares(pytester: pytest.Pytester, name: str) -> None:
    source = f"""
@pytest.mark.parametrize("value", [1], ids=[{name!a}])
def test_kernel(gpu_benchmark, value):
    gpu_benchmark(lambda: TIME_S)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)
    outside = [path for path in pytester.path.rglob("*.json") if "baselines" not in path.parts]

    assert outside == []
    assert len(recorded_tests(pytester)) == 1
    assert suite.run(pytester, "--gpuperf-strict").ret == 0
    assert suite.slower().run(pytester).ret == 1
    assert list(statuses_of(pytester).values()) == ["REGRESSED"]


@pytest.mark.parametrize(
    "name", ["größe-日本", "\u202eabc", "a\nb", "a\tb"], ids=["unicode", "turned", "newline", "tab"]
)
def test_id_that_pytest_does_not_escape_compares_too(pytester: pytest.Pytester, name: str) -> None:
    pytester.makeini("[pytest]\ndisable_test_id_escaping_and_forfeit_all_rights_to_community_support = true")
    source = f"""
@pytest.mark.parametrize("value", [1], ids=[{name!a}])
def test_kernel(gpu_benchmark, value):
    gpu_benchmark(lambda: TIME_S)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)

    assert suite.run(pytester, "--gpuperf-strict").ret == 0
    assert suite.slower().run(pytester).ret == 1


@pytest.mark.parametrize("module", ["größe/test_ü.py", "a.b/test_c.d.py", "UPPER/test_X.py", "with space/test_a b.py"])
def test_strange_module_name_compares(pytester: pytest.Pytester, module: str) -> None:
    suite = Suite(files={module: KERNEL}, options=("--import-mode=importlib",))
    suite.record(pytester)

    assert recorded_tests(pytester) == [f"{module}::test_kernel"]
    assert suite.slower().run(pytester).ret == 1


@pytest.mark.parametrize("metric", ["a/b", "..", "größe", "x" * 300, "with space", "a::b", "a,b;c", "\\u0000"])
def test_strange_metric_name_compares(pytester: pytest.Pytester, metric: str) -> None:
    source = f"""
def test_latency(perf):
    perf.record("{metric}", TIME_S, unit="s", tolerance=0.5)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)

    assert suite.run(pytester, "--gpuperf-strict").ret == 0
    assert Suite(files=suite.files, environment={"TIME_S": "1"}).run(pytester).ret == 1


# Unused


def test_metric_that_was_renamed_is_reported_and_kept(pytester: pytest.Pytester) -> None:
    Suite(files={"test_suite.py": TWO}).record(pytester)
    before = bytes_of_baselines(pytester)
    renamed = KERNEL.replace("TIME_S", "TIME_S, metric='new_name'") + KERNEL.replace("test_kernel", "test_other")
    result = Suite(files={"test_suite.py": renamed}).run(pytester)

    result.stdout.fnmatch_lines(["Unused baselines: test_kernel time. Delete with: *gpuperf baseline prune"])
    assert bytes_of_baselines(pytester) == before


def test_test_that_was_removed_is_reported_and_only_prune_deletes_it(pytester: pytest.Pytester) -> None:
    Suite(files={"test_suite.py": TWO}).record(pytester)
    suite = Suite()
    result = suite.run(pytester, "--gpuperf-update")

    result.stdout.fnmatch_lines(["Unused baselines: test_other time. Delete with: *"])
    assert len(recorded_tests(pytester)) == 2
    done = gpuperf("baseline", "prune")
    assert (done.code, done.errors) == (0, "")
    assert "deleted test_suite.py::test_other time\n1 unused baselines deleted." in done.output
    assert recorded_tests(pytester) == ["test_suite.py::test_kernel"]
    suite.run(pytester).stdout.no_fnmatch_line("*Unused*")


def test_dry_prune_deletes_nothing(pytester: pytest.Pytester) -> None:
    Suite(files={"test_suite.py": TWO}).record(pytester)
    Suite().run(pytester)
    before = bytes_of_baselines(pytester)
    done = gpuperf("baseline", "prune", "--dry-run")

    assert done.code == 0
    assert done.output == "would delete test_suite.py::test_other time\n1 unused baselines found.\n"
    assert bytes_of_baselines(pytester) == before


@pytest.mark.parametrize(
    "options",
    [
        ("-k", "kernel"),
        ("-m", "not slow"),
        ("--deselect", "test_suite.py::test_other"),
        ("test_suite.py::test_kernel",),
        ("--maxfail=1", "-x", "--deselect=test_suite.py::test_other"),
    ],
    ids=" ".join,
)
def test_run_of_a_part_deletes_nothing(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    pytester.makeini("[pytest]\nmarkers = slow")
    suite = Suite(files={"test_suite.py": TWO.replace("def test_other", "@pytest.mark.slow\ndef test_other")})
    suite.record(pytester)
    before = bytes_of_baselines(pytester)
    result = suite.run(pytester, *options)
    done = gpuperf("baseline", "prune")

    result.assert_outcomes(passed=1, deselected=0 if "::" in options[0] else 1)
    result.stdout.no_fnmatch_line("*Unused*")
    assert done.code == 1
    assert done.errors == (
        "gpuperf: The last run did not run whole modules to their end, so nothing is known to be gone. Run them.\n"
    )
    assert bytes_of_baselines(pytester) == before


def test_run_of_which_a_conftest_deselected_a_part_deletes_nothing(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO}).record(pytester)
    deselecting = """
def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=items[1:])
    del items[1:]
"""
    result = Suite(files=suite.files, conftest=suite.conftest + deselecting).run(pytester)
    gpuperf("baseline", "prune")

    result.assert_outcomes(passed=1, deselected=1)
    assert len(recorded_tests(pytester)) == 2


def test_stepwise_run_deletes_nothing(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO}).record(pytester)
    files = {"test_suite.py": f"{TWO}    assert os.environ.get('MENDED')\n"}
    Suite(files=files, has_cache=True).run(pytester, "--stepwise").assert_outcomes(passed=1, failed=1)
    mended = Suite(files=files, has_cache=True, environment={"MENDED": "1"})
    mended.run(pytester, "--stepwise").assert_outcomes(passed=1, deselected=1)
    gpuperf("baseline", "prune")

    assert len(recorded_tests(pytester)) == 2
    assert suite.run(pytester, "--gpuperf-strict").ret == 0


def test_last_failed_run_of_nothing_that_failed_deletes_nothing(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO}, has_cache=True).record(pytester)
    suite.run(pytester, "--last-failed", "--gpuperf-update")

    assert gpuperf("baseline", "prune").code == 1


def test_run_that_stopped_at_the_first_failure_deletes_nothing(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO}).record(pytester)
    suite.slower().run(pytester, "-x").assert_outcomes(failed=1)

    assert gpuperf("baseline", "prune").code == 1
    assert len(recorded_tests(pytester)) == 2


@pytest.mark.parametrize("how", ["@pytest.mark.skip", "@pytest.mark.gpu(min_vram_gb=200)"])
def test_skipped_test_keeps_its_baseline(pytester: pytest.Pytester, how: str) -> None:
    suite = Suite(files={"test_suite.py": TWO}).record(pytester)
    skipping = Suite(files={"test_suite.py": TWO.replace("def test_other", f"{how}\ndef test_other")})
    result = skipping.run(pytester)

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.no_fnmatch_line("*Unused*")
    gpuperf("baseline", "prune")
    assert suite.run(pytester, "--gpuperf-strict").ret == 0


def test_test_that_fails_before_it_measures_keeps_its_baseline(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO}).record(pytester)
    broken = KERNEL + "def test_other(gpu_benchmark):\n    assert False\n"
    Suite(files={"test_suite.py": broken}).run(pytester).assert_outcomes(passed=1, failed=1)
    gpuperf("baseline", "prune")

    assert suite.run(pytester, "--gpuperf-strict").ret == 0


def test_module_that_did_not_run_keeps_its_baselines(pytester: pytest.Pytester) -> None:
    files = {"test_one.py": KERNEL, "test_two.py": KERNEL}
    suite = Suite(files=files).record(pytester)
    result = suite.run(pytester, "test_one.py")

    result.stdout.no_fnmatch_line("*Unused*")
    assert gpuperf("baseline", "prune").output == "0 unused baselines deleted.\n"
    assert len(recorded_tests(pytester)) == 2


def test_baselines_of_another_gpu_are_kept(pytester: pytest.Pytester) -> None:
    Suite(files={"test_suite.py": TWO}).record(pytester, "--gpuperf-key", "other-pool")
    Suite(files={"test_suite.py": TWO}).record(pytester)
    Suite().run(pytester)
    gpuperf("baseline", "prune")

    assert sorted(len(file.tests) for file in baselines_of(pytester)) == [1, 2]


# Files that cannot be trusted


def edited(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    """Damage that leaves the file JSON."""

    def damage(path: Path) -> None:
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree, indent=2))

    return damage


def text_replaced(old: str, new: str) -> Callable[[Path], None]:
    """Damage to the text itself."""

    def damage(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return damage


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100_000_000)


def _replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]), "is not a sound baseline"),
    "empty": (lambda path: path.write_bytes(b""), "is not a sound baseline"),
    "not JSON": (lambda path: path.write_text("<html>"), "is not a sound baseline"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "is not a sound baseline"),
    "a list": (lambda path: path.write_text("[]"), "is not a sound baseline"),
    "newer": (edited(lambda tree: tree.update(schema=99)), "was written by a newer pytest-gpuperf (schema 99"),
    "no schema": (edited(lambda tree: tree.pop("schema")), "$.schema is None"),
    "schema as text": (edited(lambda tree: tree.update(schema="1")), "$.schema is '1'"),
    "NaN": (text_replaced('"value": 0.001', '"value": NaN'), "is nan"),
    "infinity": (text_replaced('"value": 0.001', '"value": Infinity'), "is inf"),
    "negative": (text_replaced('"value": 0.001', '"value": -0.001'), "negative"),
    "zero": (text_replaced('"value": 0.001', '"value": 0'), "is 0"),
    "text for a number": (text_replaced('"value": 0.001', '"value": "fast"'), "Expected `float`"),
    "wrong direction": (text_replaced('"better": "lower"', '"better": "sideways"'), "sideways"),
    "duplicate key": (text_replaced('"schema": 1', '"schema": 1, "schema": 1'), "has the key 'schema' twice"),
    "merge markers": (text_replaced("{\n", "<<<<<<< HEAD\n{\n"), "holds merge markers: '<<<<<<< HEAD' in line 1"),
    "unknown key": (edited(lambda tree: tree.update(extra=1)), "extra"),
    "tests as a list": (edited(lambda tree: tree.update(tests=[])), "$.tests"),
    "no sessions": (text_replaced('"sessions": [', '"sessions": [], "other": ['), "is not a sound baseline"),
    "another module": (text_replaced('"module": "test_suite.py"', '"module": "test_b.py"'), "of 'test_b.py', not of"),
    "100 MB": (_huge, "has 100 MB, more than the 16 MB"),
    "a folder": (_replaced_by_a_folder, "is not a file"),
    "nested": (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_named_and_nothing_runs(
    pytester: pytest.Pytester, damage: Callable[[Path], object], text: str
) -> None:
    suite = Suite(files={"test_suite.py": f"{KERNEL}\ndef test_beside(): open('something-ran', 'w').close()"})
    suite.record(pytester)
    path = the_file(pytester)
    (pytester.path / "something-ran").unlink()
    damage(path)
    result = suite.run(pytester)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [error] = [line for line in result.stderr.lines if line.startswith("ERROR: ")]
    assert str(path) in error
    assert text in error
    assert not (pytester.path / "something-ran").exists()
    assert_readable(result)


def test_damaged_file_of_a_module_that_does_not_run_does_not_matter(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_one.py": KERNEL, "test_two.py": KERNEL}).record(pytester)
    (pytester.path / "baselines/nvidia-h100-80gb-hbm3/test_two.json").write_text("damaged")

    assert suite.run(pytester, "test_one.py", "--gpuperf-update").ret == 0


def test_damaged_file_can_still_be_collected(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)
    the_file(pytester).write_text("damaged")

    assert suite.run(pytester, "--collect-only").ret == 0


def test_file_that_is_damaged_while_tests_run_is_no_pass(pytester: pytest.Pytester) -> None:
    source = f"""{KERNEL}
def test_vandal():
    from pathlib import Path
    [path] = Path("baselines").glob("*/*.json")
    path.write_text("damaged")
"""
    Suite().record(pytester)
    result = Suite(files={"test_suite.py": source}).run(pytester, "--gpuperf-update")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*test_suite.json is not a sound baseline: *"])
    assert the_file(pytester).read_text() == "damaged"
    assert_readable(result)


# The same run twice


def test_run_that_was_recorded_is_not_recorded_again(pytester: pytest.Pytester) -> None:
    Suite().run(pytester)
    gpuperf("baseline", "record")
    gpuperf("baseline", "record")
    [file] = baselines_of(pytester)

    assert sum(len(session.runs) for session in file.tests["test_kernel"]["time"].sessions) == 1


def test_run_that_updated_is_not_recorded_again_by_the_command(pytester: pytest.Pytester) -> None:
    Suite().record(pytester)
    gpuperf("baseline", "record")
    [file] = baselines_of(pytester)

    assert sum(len(session.runs) for session in file.tests["test_kernel"]["time"].sessions) == 1


def test_results_name_every_test_that_had_its_turn(pytester: pytest.Pytester) -> None:
    source = f"{KERNEL}\ndef test_plain(): pass\n@pytest.mark.skip\ndef test_skipped(): pass\n"
    Suite(files={"test_suite.py": source}).run(pytester)
    end = results_of(pytester).end

    assert end is not None
    assert end.tests == ("test_suite.py::test_kernel", "test_suite.py::test_plain", "test_suite.py::test_skipped")


CONFIGURED = """
def test_serve(perf):
    perf.configure({"model": os.environ["MODEL"], "dtype": "bfloat16"})
    perf.record("throughput", 1000.0, unit="tok/s")
"""


def test_another_configuration_is_not_compared_and_named(pytester: pytest.Pytester) -> None:
    def of(model: str) -> Suite:
        return Suite(files={"test_suite.py": CONFIGURED}, environment={"MODEL": model})

    of("gpt2").record(pytester)
    assert of("gpt2").run(pytester).ret == pytest.ExitCode.OK
    result = of("tiny").run(pytester)
    result.stdout.fnmatch_lines(["INCOMPARABLE test_serve throughput: Not comparable: model tiny, baseline gpt2."])
