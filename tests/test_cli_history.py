"""`gpuperf history`, `gpuperf compare` and `--gpuperf-history`: from a run of pytest to what a user reads."""

import sqlite3
from pathlib import Path

import pytest
from harness import FAKE_H100, KERNEL, Suite, assert_readable, gpuperf, results_of
from msgspec.structs import replace
from test_analysis_history import WOBBLE, measurement, record, results

from pytest_gpuperf.records import Results, encode

TWO = KERNEL + KERNEL.replace("test_kernel", "test_other")


def write(path: Path, run: Results) -> str:
    """Make it a results file."""
    path.write_bytes(b"".join(encode(line) + b"\n" for line in (run.run, *run.tests)))
    return str(path)


def ten_runs(folder: Path) -> list[str]:
    """Results files of ten runs, the last first, with a step of 10 % in the middle."""
    values = [wobble * (1e-3 if i < 5 else 1.1e-3) for i, wobble in enumerate(WOBBLE)]
    return [write(folder / f"{i}.jsonl", results(i, record(measurement(value)))) for i, value in enumerate(values)][
        ::-1
    ]


def add(*files: str) -> None:
    done = gpuperf("history", "add", *files)
    assert (done.code, done.errors) == (0, "")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder of one's own, without a store in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPUPERF_HISTORY", raising=False)


# The option of pytest


def test_run_is_added_to_the_history_at_its_end(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": TWO}).run(pytester, "--gpuperf-history", ".gpuperf/history.sqlite")
    run_id = results_of(pytester).run.run_id
    result.stdout.fnmatch_lines([f"History in *history.sqlite: 2 values of run {run_id} added."])
    assert result.ret == 0
    assert "test_suite.py::test_kernel on nvidia-h100" in gpuperf("history", "list").output


def test_history_that_cannot_be_written_is_a_problem_and_the_results_are_kept(pytester: pytest.Pytester) -> None:
    (pytester.path / "notes.txt").write_text("not a database, but long enough to be looked at" * 30)
    result = Suite().run(pytester, "--gpuperf-history", "notes.txt")
    result.stdout.fnmatch_lines(["*notes.txt is damaged or no SQLite file: file is not a database.*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len(results_of(pytester).tests) == 1
    assert_readable(result)


def test_locked_history_does_not_keep_the_baselines_from_being_written(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    Suite().run(pytester, "--gpuperf-history", "h.sqlite")
    impatient = {"mode": "read", "timeout_s": 0.05}
    monkeypatch.setattr("pytest_gpuperf.analysis.history.open_history.__wrapped__.__kwdefaults__", impatient)
    holder = sqlite3.connect(pytester.path / "h.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    result = Suite().run(pytester, "--gpuperf-history", "h.sqlite", "--gpuperf-update")
    holder.close()
    result.stdout.fnmatch_lines(
        ["Baselines in *: 1 recorded.", "*h.sqlite was locked for 0.05 s.*gpuperf history add*"]
    )


@pytest.mark.parametrize(
    ("place", "text"),
    [("postgresql://a/b", "a history cannot be kept there. Valid: a path,"), ("", "is empty: is the variable")],
)
def test_wrong_place_is_refused_before_anything_runs(pytester: pytest.Pytester, place: str, text: str) -> None:
    result = Suite().run(pytester, f"--gpuperf-history={place}")
    result.stderr.fnmatch_lines([f"ERROR: --gpuperf-history: *{text}*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_run_that_measures_nothing_makes_no_history(pytester: pytest.Pytester) -> None:
    Suite(files={"test_suite.py": "def test_empty(): pass"}, conftest=FAKE_H100).run(
        pytester, "--gpuperf-history", "h.sqlite"
    )
    assert not (pytester.path / "h.sqlite").exists()


# gpuperf history


def test_runs_are_added_by_date_and_their_step_is_found(tmp_path: Path) -> None:
    add(*ten_runs(tmp_path))
    done = gpuperf("history", "changes")
    assert done.code == 0
    assert "between commit4 (2026-11-05) and commit5\n    1.000 ms -> 1.100 ms: 10 % slower, 95 %" in done.output
    assert "dated before" not in done.output


def test_runs_added_late_are_noted_and_ordered_on_request(tmp_path: Path) -> None:
    files = ten_runs(tmp_path)
    add(*files[:5])
    add(*files[5:])
    assert "5 runs dated before one that was added earlier" in gpuperf("history", "changes").output
    assert "and commit5\n" in gpuperf("history", "changes", "--by-date").output


def test_list_and_show_say_what_is_there(tmp_path: Path) -> None:
    add(*ten_runs(tmp_path))
    assert "time               10 runs  2026-11-01 to 2026-11-10" in gpuperf("history", "list").output
    assert gpuperf("history", "show", "test_copy", "time").output.count("\n") == 11


@pytest.mark.parametrize("arguments", [("list", "nothing"), ("show", "test_copy", "nothing"), ("changes", "nothing")])
def test_what_the_history_lacks_is_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    add(*ten_runs(tmp_path)[:1])
    done = gpuperf("history", *arguments)
    assert (done.code, done.output) == (1, "")
    assert done.errors.startswith("gpuperf: The history in .gpuperf/history.sqlite holds no such test or metric.")


def test_store_comes_from_the_option_else_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file, *_) = ten_runs(tmp_path)
    monkeypatch.setenv("GPUPERF_HISTORY", "sqlite:///theirs.sqlite")
    add(file)
    add(file, "--store", "ours.sqlite")
    assert {path.name for path in tmp_path.glob("*.sqlite")} == {"theirs.sqlite", "ours.sqlite"}


def test_one_wrong_file_among_several_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes\n")
    done = gpuperf("history", "add", *ten_runs(tmp_path), "notes.txt")
    assert done.code == 1
    assert "notes.txt: Not a results file" in done.errors
    assert not (tmp_path / ".gpuperf").exists()


# gpuperf compare


@pytest.mark.parametrize(("value", "code"), [(1e-3, 0), (1.2e-3, 2), (1.025e-3, 3)])
def test_exit_code_says_whether_something_got_slower(tmp_path: Path, value: float, code: int) -> None:
    a = write(tmp_path / "a.jsonl", results(0, record(measurement(1e-3, kind="compute"))))
    b = write(tmp_path / "b.jsonl", results(1, record(measurement(value, kind="compute"))))
    done = gpuperf("compare", a, b)
    assert done.code == code
    assert done.output.startswith(f"A: {a}\nB: {b}\nperf_tests/test_bandwidth.py::test_copy time")


def test_across_shows_ratios(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", results(0))
    b = write(tmp_path / "b.jsonl", results(1, record(measurement(2e-3))))
    done = gpuperf("compare", "--across", a, b)
    assert (done.code, done.output.split()[-2:]) == (0, ["0.500", "x"])


def test_file_of_several_runs_is_refused(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{i}.jsonl", results(i)) for i in range(2))
    both = tmp_path / "both.jsonl"
    both.write_bytes(Path(a).read_bytes() + Path(b).read_bytes())
    done = gpuperf("compare", a, str(both))
    assert done.code == 1
    assert "results of more than one run. Give the file of each run by itself" in done.errors


def test_missing_file_is_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", replace(results(0), tests=()))
    done = gpuperf("compare", a, "gone.jsonl")
    assert done.code == 1
    assert "No results at gone.jsonl" in done.errors
