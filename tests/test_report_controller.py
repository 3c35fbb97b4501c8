"""The one process that writes: what arrives is on disk, baselines are written or patched, problems are told."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Measurement,
    Method,
    RunEnd,
    Status,
    TestKey,
    TestRecord,
    Verdict,
    encode,
)
from pytest_gpuperf.report.controller import Controller
from pytest_gpuperf.report.results import read_results

MODULE = "perf_tests/test_bandwidth.py"
SLUG = "nvidia-h100"
GIT = shutil.which("git") or "git"


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the options would say."""

    json: Path
    baselines: Path
    update: bool = False
    accept: str | None = None
    patch: Path | None = None
    history: str | None = None
    expectations: str = "show"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Be in the root, and let the command be called by its name, wherever this environment has it."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)


def controller(tmp_path: Path, *, silent: tuple[Status, ...] = (), **orders: Any) -> Controller:
    places = {"json": tmp_path / ".gpuperf" / "results.jsonl", "baselines": tmp_path / "baselines"}
    return Controller(tmp_path, Orders(**{**places, **orders}), silent=silent)


def record(
    test: str = "test_copy",
    *metrics: str,
    status: Status = "NEW",
    slug: str = SLUG,
    module: str = MODULE,
    passed: bool = True,
) -> TestRecord:
    metrics = metrics or ("bandwidth",)
    return TestRecord(
        key=TestKey(module=module, test=test),
        slug=slug,
        devices=("0123456789ab",),
        environment=Environment(hardware=Hardware(name="NVIDIA H100")),
        measurements=tuple(
            Measurement(
                metric=metric,
                value=3e12,
                unit="B/s",
                better="higher",
                kind="memory",
                method=Method(clock="cuda-events", mode="cold"),
            )
            for metric in metrics
        ),
        verdicts=tuple(
            Verdict(status=status, metric=metric, reason="the reason", tolerance=0.03) for metric in metrics
        ),
        passed=passed,
    )


def run(mine: Controller, *records: TestRecord, seen: tuple[str, ...] = (), is_whole: bool = True) -> list[str]:
    """Add the records, end the run, and read the report."""
    for one in records:
        mine.add(encode(one).decode())
    mine.end({*(str(one.key) for one in records), *seen}, is_whole=is_whole, is_interrupted=False)
    return [line.text for line in mine.lines(100, None)]


def recorded(tmp_path: Path, *records: TestRecord) -> None:
    """Make these the baselines."""
    run(controller(tmp_path, update=True, json=tmp_path / "earlier.jsonl"), *records)


def unused_line(lines: list[str]) -> str | None:
    return next((line for line in lines if line.startswith("Unused baselines")), None)


# Results


def test_a_record_that_arrives_is_on_disk_at_once(tmp_path: Path) -> None:
    mine = controller(tmp_path)
    for count, test in enumerate(("test_copy", "test_read"), start=1):
        assert mine.add(encode(record(test)).decode()) == record(test)
        assert len(read_results(tmp_path / ".gpuperf" / "results.jsonl").tests) == count
    assert mine.records == [record("test_copy"), record("test_read")]


def test_the_end_lists_every_test_that_had_its_turn(tmp_path: Path) -> None:
    run(controller(tmp_path), record(), seen=("perf_tests/test_a.py::test_skipped",))
    assert read_results(tmp_path / ".gpuperf" / "results.jsonl").end == RunEnd(
        tests=("perf_tests/test_a.py::test_skipped", f"{MODULE}::test_copy"), is_whole=True
    )


def test_results_that_cannot_be_written_are_a_problem_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / ".gpuperf").touch()
    mine = controller(tmp_path)
    lines = run(mine, record())
    path = tmp_path / ".gpuperf" / "results.jsonl"
    assert mine.problems == [f"The results could not be written to {path}: File exists."]
    assert lines[-1] == mine.problems[0]
    assert mine.lines(100, None)[-1].colour == "red"


def test_results_that_cannot_be_written_are_reported_all_the_same(tmp_path: Path) -> None:
    (tmp_path / ".gpuperf").touch()
    mine = controller(tmp_path, update=True)
    lines = run(mine, record())
    assert mine.records == [record()]
    assert any("3.000 TB/s" in line for line in lines)
    assert (tmp_path / "baselines" / SLUG).is_dir()


def test_one_problem_is_told_once(tmp_path: Path) -> None:
    (tmp_path / ".gpuperf").touch()
    mine = controller(tmp_path)
    run(mine, record("test_copy"), record("test_read"), record("test_write"))
    assert len(mine.problems) == 1


def test_a_missing_gpu_is_told_first(tmp_path: Path) -> None:
    mine = controller(tmp_path)
    mine.add(encode(record()).decode())
    first = mine.lines(100, "No NVIDIA driver was found.")[0]
    assert (first.text, first.colour) == ("Measured on the CPU: No NVIDIA driver was found.", "yellow")


# Baselines


def test_without_an_order_no_baseline_is_written(tmp_path: Path) -> None:
    lines = run(controller(tmp_path), record())
    assert not (tmp_path / "baselines").exists()
    assert "Record the new ones as baselines:  gpuperf baseline record" in lines


def test_the_commands_of_the_report_work_from_the_folder_where_pytest_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path, record("test_copy"), record("test_gone"))
    (tmp_path / "perf_tests").mkdir()
    monkeypatch.chdir(tmp_path / "perf_tests")
    lines = run(controller(tmp_path), record("test_copy"))
    options = "--baselines ../baselines --results ../.gpuperf/results.jsonl"
    assert f"Record the new ones as baselines:  gpuperf baseline record {options}" in lines
    assert (unused_line(lines) or "").endswith(f"Delete with:  gpuperf baseline prune {options}")


@pytest.mark.parametrize(("silent", "told"), [((), True), (("INVALID",), False)])
def test_a_verdict_that_is_to_pass_in_silence_is_not_explained(
    tmp_path: Path, silent: tuple[Status, ...], told: bool
) -> None:
    lines = run(controller(tmp_path, silent=silent), record(status="INVALID"))
    assert ("INVALID test_copy bandwidth: the reason" in lines) == told


def test_an_update_writes_the_baselines_and_counts_them(tmp_path: Path) -> None:
    lines = run(controller(tmp_path, update=True), record("test_copy"), record("test_read"))
    assert f"Baselines in {tmp_path / 'baselines'}: 2 recorded." in lines
    assert [path.name for path in (tmp_path / "baselines" / SLUG).iterdir()] == ["perf_tests.test_bandwidth.json"]
    assert not any("gpuperf baseline record" in line for line in lines)


def test_a_refused_update_says_why(tmp_path: Path) -> None:
    slow = [record(f"test_{i}", status="REGRESSED", passed=False) for i in range(7)]
    lines = run(controller(tmp_path, update=True), *slow)
    assert f"Baselines in {tmp_path / 'baselines'}: 7 refused." in lines
    assert [line for line in lines if line.startswith("Refused")] == [
        *(f"Refused test_{i} bandwidth: the test failed: mend it, then update" for i in range(5)),
        "Refused 2 more.",
    ]


def test_an_accepted_regression_becomes_the_baseline(tmp_path: Path) -> None:
    lines = run(controller(tmp_path, accept="new kernel"), record(status="REGRESSED"), record("test_new"))
    assert f"Baselines in {tmp_path / 'baselines'}: 1 recorded, 1 accepted." in lines


def test_a_regression_of_a_test_that_failed_by_itself_is_not_accepted(tmp_path: Path) -> None:
    lines = run(controller(tmp_path, accept="new kernel"), record(status="REGRESSED", passed=False))
    assert f"Baselines in {tmp_path / 'baselines'}: 1 refused." in lines
    assert "Refused test_copy bandwidth: the test failed: mend it, then update" in lines


def test_an_interrupted_run_leaves_the_baselines_alone(tmp_path: Path) -> None:
    mine = controller(tmp_path, update=True)
    mine.add(encode(record()).decode())
    mine.end({f"{MODULE}::test_copy"}, is_whole=False, is_interrupted=True)
    assert not (tmp_path / "baselines").exists()
    assert read_results(tmp_path / ".gpuperf" / "results.jsonl").end is not None


def test_baselines_that_cannot_be_written_are_a_problem_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "baselines").touch()
    mine = controller(tmp_path, update=True)
    lines = run(mine, record(), is_whole=False)
    assert len(mine.problems) == 1
    assert str(tmp_path / "baselines") in mine.problems[0]
    assert mine.problems[0] in lines
    assert len(read_results(tmp_path / ".gpuperf" / "results.jsonl").tests) == 1


def test_a_baseline_that_cannot_be_trusted_is_a_problem_and_stays_as_it_is(tmp_path: Path) -> None:
    recorded(tmp_path, record())
    path = tmp_path / "baselines" / SLUG / "perf_tests.test_bandwidth.json"
    path.write_text("<<<<<<< ours\n")
    mine = controller(tmp_path, update=True)
    run(mine, record())
    assert len(mine.problems) == 1
    assert "merge markers" in mine.problems[0]
    assert path.read_text() == "<<<<<<< ours\n"


# Patches


def test_a_patch_is_written_instead_of_the_baselines_and_git_applies_it(tmp_path: Path) -> None:
    subprocess.run([GIT, "init", "-q"], cwd=tmp_path, check=True)
    patch = tmp_path / "out" / "baselines.patch"
    lines = run(controller(tmp_path, patch=patch), record())
    assert f"Patch for git apply: {patch}: 1 recorded." in lines
    assert not (tmp_path / "baselines").exists()
    subprocess.run([GIT, "apply", str(patch)], cwd=tmp_path, check=True)
    assert (tmp_path / "baselines" / SLUG / "perf_tests.test_bandwidth.json").is_file()


def test_a_patch_holds_what_an_update_would_have_written(tmp_path: Path) -> None:
    subprocess.run([GIT, "init", "-q"], cwd=tmp_path, check=True)
    recorded(tmp_path, record())
    path = tmp_path / "baselines" / SLUG / "perf_tests.test_bandwidth.json"
    before, patch = path.read_bytes(), tmp_path / "baselines.patch"
    run(controller(tmp_path, patch=patch), record("test_read"))
    assert path.read_bytes() == before
    subprocess.run([GIT, "apply", str(patch)], cwd=tmp_path, check=True)
    assert set(msgspec.json.decode(path.read_bytes())["tests"]) == {"test_copy", "test_read"}


def test_a_patch_that_cannot_be_written_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    mine = controller(tmp_path, patch=tmp_path / "out" / "baselines.patch")
    run(mine, record())
    assert len(mine.problems) == 1
    assert str(tmp_path / "out") in mine.problems[0]
    assert mine.problems[0].endswith("could not be written: File exists.")


# Unused baselines


def test_a_baseline_whose_test_is_gone_is_unused(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy"), record("test_gone"))
    lines = run(controller(tmp_path), record("test_copy"))
    assert unused_line(lines) == "Unused baselines: test_gone bandwidth. Delete with:  gpuperf baseline prune"


def test_only_a_whole_run_knows_what_is_unused(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy"), record("test_gone"))
    assert unused_line(run(controller(tmp_path), record("test_copy"), is_whole=False)) is None


def test_a_metric_that_its_test_measures_no_more_is_unused(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy", "bandwidth", "latency"))
    lines = run(controller(tmp_path), record("test_copy", "bandwidth"))
    assert unused_line(lines) == "Unused baselines: test_copy latency. Delete with:  gpuperf baseline prune"


def test_a_metric_that_its_test_did_not_reach_is_not_unused(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy", "bandwidth", "latency"))
    assert unused_line(run(controller(tmp_path), record("test_copy", "bandwidth", passed=False))) is None


def test_a_test_that_was_skipped_is_not_gone(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy"), record("test_skipped"))
    assert unused_line(run(controller(tmp_path), record("test_copy"), seen=(f"{MODULE}::test_skipped",))) is None


def test_modules_and_devices_that_did_not_run_are_not_looked_at(tmp_path: Path) -> None:
    recorded(
        tmp_path, record(), record("test_far", module="perf_tests/test_far.py"), record("test_other", slug="nvidia-l4")
    )
    assert unused_line(run(controller(tmp_path), record())) is None


def test_three_unused_baselines_are_named_and_the_others_counted(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy"), *(record(f"test_gone_{i}") for i in range(5)))
    line = unused_line(run(controller(tmp_path), record("test_copy")))
    assert line is not None
    assert "test_gone_0 bandwidth, test_gone_1 bandwidth, test_gone_2 bandwidth and 2 more." in line


def test_nothing_is_deleted_without_being_told_to(tmp_path: Path) -> None:
    recorded(tmp_path, record("test_copy"), record("test_gone"))
    path = tmp_path / "baselines" / SLUG / "perf_tests.test_bandwidth.json"
    run(controller(tmp_path, update=True), record("test_copy"))
    assert "test_gone" in msgspec.json.decode(path.read_bytes())["tests"]
