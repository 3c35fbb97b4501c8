"""Anchors as a user meets them: once a run, in the report and the baselines, and what they do to the other tests."""

import pytest
from harness import KERNEL, Suite, assert_readable, gpuperf, recorded_tests, results_of, statuses_of, verdicts_of

from pytest_gpuperf.baseline_file import dumps, list_files, read
from pytest_gpuperf.records import BaselineFile

#: One H100 with two anchors; the product takes as long as GEMM_S says. It tells how often anchors are measured.
CONFTEST = """
import os
import pytest
from pytest_gpuperf import anchors
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import fake_machine

measure = anchors.measure_anchors

def counting(machine, devices, **options):
    print("measured anchors:", *options.get("names", ["all"]))
    return measure(machine, devices, **options)

def pytest_configure(config):
    anchors.measure_anchors = counting
    gemm_s = float(os.environ.get("GEMM_S", "2e-4"))
    config.stash[machine_key] = fake_machine(anchors={"gemm": lambda: gemm_s, "host": lambda: 5e-4})

def pytest_unconfigure(config):
    anchors.measure_anchors = measure
"""

TWO_TESTS = KERNEL + "\ndef test_another(gpu_benchmark):\n    gpu_benchmark(lambda: TIME_S)\n"
SUITE = Suite(files={"test_suite.py": TWO_TESTS}, conftest=CONFTEST, options=("-s",))
SLOW_MACHINE = {"GEMM_S": "2.4e-4"}


def slow_machine(suite: Suite) -> Suite:
    return Suite(files=suite.files, conftest=suite.conftest, options=suite.options, environment=SLOW_MACHINE)


def record_sessions(pytester: pytest.Pytester, count: int) -> None:
    """Record once, and pretend that it was done on as many days."""
    SUITE.record(pytester)
    for path in list_files(pytester.path / "baselines"):
        file = read(path)
        assert file is not None
        path.write_bytes(dumps(_on_days(file, count)))


def _on_days(file: BaselineFile, count: int) -> BaselineFile:
    from msgspec.structs import replace

    def days(test: str, metric: str) -> BaselineFile:
        baseline = file.tests[test][metric]
        (session,) = baseline.sessions
        run = session.runs[0]
        sessions = tuple(
            replace(session, visit=f"day-{day}", runs=(replace(run, run_id=f"day-{day}", value=run.value),))
            for day in range(count)
        )
        tests = {**file.tests, test: {**file.tests[test], metric: replace(baseline, sessions=sessions)}}
        return replace(file, tests=tests)

    for test, metrics in file.tests.items():
        for metric in metrics:
            file = days(test, metric)
    return file


def test_anchors_are_measured_once_a_run_and_reported(pytester: pytest.Pytester) -> None:
    result = SUITE.run(pytester)

    assert result.stdout.str().count("measured anchors: all") == 1
    assert [str(record.key) for record in results_of(pytester).tests] == [
        "anchors.py::gemm",
        "anchors.py::host",
        "test_suite.py::test_kernel",
        "test_suite.py::test_another",
    ]
    result.stdout.fnmatch_lines(["anchors.py::gemm", "Anchors: 0 of 5 sessions on this hardware and software;*"])
    assert_readable(result)


def test_anchors_are_switched_off(pytester: pytest.Pytester) -> None:
    result = SUITE.run(pytester, "--gpuperf-anchors=off")

    result.stdout.no_fnmatch_line("*measured anchors*")
    result.stdout.no_fnmatch_line("Anchors:*")
    assert [record.key.test for record in results_of(pytester).tests] == ["test_kernel", "test_another"]


def test_a_wrong_choice_is_refused(pytester: pytest.Pytester) -> None:
    result = SUITE.run(pytester, "--gpuperf-anchors=maybe")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gpuperf-anchors: invalid choice: 'maybe' (choose from*auto*on*off*"])


def test_anchors_have_baselines_beside_those_of_the_tests(pytester: pytest.Pytester) -> None:
    SUITE.record(pytester)

    assert recorded_tests(pytester) == [
        "anchors.py::gemm",
        "anchors.py::host",
        "test_suite.py::test_another",
        "test_suite.py::test_kernel",
    ]
    assert "nvidia-h100-80gb-hbm3/anchors.json: 2 tests, 2 metrics" in gpuperf("baseline", "list").output
    assert "anchors.py::gemm time" in gpuperf("baseline", "show", "anchors.py").output


def test_anchors_as_usual_leave_the_verdicts_alone(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 5)
    SUITE.run(pytester)

    assert statuses_of(pytester) == {
        "gemm time": "PASS",
        "host time": "PASS",
        "test_kernel time": "PASS",
        "test_another time": "PASS",
    }


def test_an_anchor_that_is_off_makes_the_whole_run_invalid(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 5)
    result = slow_machine(SUITE).run(pytester)

    assert "measured anchors: gemm" in result.stdout.str()
    found = verdicts_of(pytester)
    assert {name: verdict.status for name, verdict in found.items()} == {
        "gemm time": "INCOMPARABLE",
        "host time": "PASS",
        "test_kernel time": "INVALID",
        "test_another time": "INVALID",
    }
    assert found["test_kernel time"].reason.startswith("the anchor gemm is 20 % slower than usual, ")
    result.stdout.fnmatch_lines(["*Likely causes: a lower clock or power limit, heat, another process on the GPU.*"])


def test_a_slow_kernel_on_a_slow_machine_is_no_regression(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 5)
    suite = slow_machine(SUITE).slower()
    result = suite.run(pytester)

    assert result.ret == pytest.ExitCode.OK
    assert statuses_of(pytester)["test_kernel time"] == "INVALID"


def test_a_slow_kernel_on_a_usual_machine_is_a_regression(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 5)
    result = SUITE.slower().run(pytester)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert statuses_of(pytester)["test_kernel time"] == "REGRESSED"


def test_four_sessions_never_make_a_run_invalid(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 4)
    result = slow_machine(SUITE).run(pytester)

    assert statuses_of(pytester)["test_kernel time"] == "PASS"
    result.stdout.fnmatch_lines(["Anchors: 4 of 5 sessions on this hardware and software;*"])


def test_an_anchor_that_was_left_out_is_not_called_unused(pytester: pytest.Pytester) -> None:
    SUITE.record(pytester)
    fewer = Suite(files=SUITE.files, conftest=CONFTEST.replace('"gemm": lambda: gemm_s, ', ""))
    result = fewer.run(pytester)

    result.stdout.no_fnmatch_line("*Unused baselines*")
    assert "0 unused baselines" in gpuperf("baseline", "prune", "--dry-run").output


def test_an_anchor_that_stays_off_is_accepted_with_a_reason(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 5)
    slow_machine(SUITE).run(pytester)
    done = gpuperf("baseline", "accept", "--reason", "a new power supply", "anchors.py::gemm")

    assert done.output.startswith("Baselines in baselines: 1 accepted.")
    slow_machine(SUITE).run(pytester)
    assert statuses_of(pytester)["test_kernel time"] == "PASS"


def test_results_of_an_invalid_run_are_not_recorded_later_either(pytester: pytest.Pytester) -> None:
    record_sessions(pytester, 5)
    slow_machine(SUITE).run(pytester)
    done = gpuperf("baseline", "record", "test_kernel")

    assert "1 refused" in done.output


def test_the_table_with_anchors_fits_eighty_columns(pytester: pytest.Pytester) -> None:
    suite = Suite(files=SUITE.files, conftest=CONFTEST, environment={"COLUMNS": "80"})
    result = suite.run(pytester)

    rows = [line for line in result.outlines if line.startswith((" ", "anchors", "test_suite.py::"))]
    assert rows
    assert max(len(row) for row in rows) <= 80
