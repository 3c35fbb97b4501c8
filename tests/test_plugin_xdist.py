"""Under pytest-xdist: the same verdicts, one results file, one writer, readable mistakes."""

from dataclasses import replace

import pytest
from harness import (
    FAKE_H100,
    KERNEL,
    Suite,
    assert_readable,
    baselines_of,
    gpuperf,
    recorded_tests,
    results_of,
    statuses_of,
)

pytest.importorskip("xdist")

EIGHT = """
@pytest.mark.parametrize("number", range(8))
def test_kernel(gpu_benchmark, number):
    gpu_benchmark(lambda: TIME_S if number == 3 else 1e-3)
"""

GROUPED = """
@pytest.mark.xdist_group("one")
def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

@pytest.mark.xdist_group("two")
@pytest.mark.parametrize("n", [1])
def test_other(gpu_benchmark, n):
    gpu_benchmark(lambda: 2e-3)
"""


def suite_of(source: str, *options: str) -> Suite:
    return Suite(files={"test_suite.py": source}, options=options, is_subprocess=True)


def serial(source: str) -> Suite:
    return Suite(files={"test_suite.py": source})


def test_four_workers_leave_one_results_file_with_every_test(pytester: pytest.Pytester) -> None:
    result = suite_of(EIGHT).run(pytester, "-n4", "--gpuperf-update")
    results = results_of(pytester)

    result.assert_outcomes(passed=8)
    assert sorted(test.key.test for test in results.tests) == [f"test_kernel[{number}]" for number in range(8)]
    assert len({test.worker for test in results.tests}) > 1
    assert results.end is not None
    assert results.end.is_whole
    assert len(results.end.tests) == 8
    assert [path.name for path in pytester.path.rglob("*.jsonl")] == ["results.jsonl"]


def test_update_is_written_once_by_the_controller(pytester: pytest.Pytester) -> None:
    result = suite_of(EIGHT).run(pytester, "-n4", "--gpuperf-update")
    [file] = baselines_of(pytester)

    assert sum(line.startswith("Baselines in ") for line in result.stdout.lines) == 1
    result.stdout.fnmatch_lines(["Baselines in *: 8 recorded."])
    assert {len(metrics["time"].sessions[0].runs) for metrics in file.tests.values()} == {1}


def test_slowdown_is_found_by_a_worker_and_shown_once(pytester: pytest.Pytester) -> None:
    serial(EIGHT).record(pytester)
    result = suite_of(EIGHT).slower().run(pytester, "-n2", "--junitxml=junit.xml")

    result.assert_outcomes(passed=7, failed=1)
    assert statuses_of(pytester)["test_kernel[3] time"] == "REGRESSED"
    assert sum(" got slower on " in line and "FAILED" not in line for line in result.stdout.lines) == 1
    assert sum("GPU performance" in line for line in result.stdout.lines) == 1
    assert "gpuperf.time.verdict" in (pytester.path / "junit.xml").read_text()
    assert_readable(result)


def test_groups_never_reach_the_keys_of_baselines(pytester: pytest.Pytester) -> None:
    suite_of(GROUPED).record(pytester, "-n2", "--dist=loadgroup")

    assert recorded_tests(pytester) == ["test_suite.py::test_kernel", "test_suite.py::test_other[1]"]
    assert serial(GROUPED).run(pytester, "--gpuperf-strict").ret == 0
    assert serial(GROUPED).slower().run(pytester).ret == 1


SKIPPED = GROUPED.replace('@pytest.mark.xdist_group("two")', '@pytest.mark.xdist_group("two")\n@pytest.mark.skip')


def test_skipped_test_of_a_group_keeps_its_baseline(pytester: pytest.Pytester) -> None:
    serial(GROUPED).record(pytester)
    suite_of(SKIPPED).run(pytester, "-n2", "--dist=loadgroup").assert_outcomes(passed=1, skipped=1)
    gpuperf("baseline", "prune")

    assert recorded_tests(pytester) == ["test_suite.py::test_kernel", "test_suite.py::test_other[1]"]


CRASHING = GROUPED.replace("    gpu_benchmark(lambda: 2e-3)", "    os._exit(1)")


def test_test_whose_worker_died_keeps_its_baseline(pytester: pytest.Pytester) -> None:
    serial(GROUPED).record(pytester)
    result = suite_of(CRASHING).run(pytester, "-n1")
    gpuperf("baseline", "prune")

    assert result.ret == 1
    assert recorded_tests(pytester) == ["test_suite.py::test_kernel", "test_suite.py::test_other[1]"]


def test_worker_that_dies_is_no_pass_and_the_others_are_kept(pytester: pytest.Pytester) -> None:
    result = suite_of(CRASHING).run(pytester, "-n1")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert list(statuses_of(pytester)) == ["test_kernel time"]


def assert_usage_error(result: pytest.RunResult, text: str) -> None:
    """Told once, by the controller, however many workers found it."""
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [error] = [line for line in result.stdout.lines + result.stderr.lines if line.startswith("ERROR: ")]
    assert text in error
    assert_readable(result)


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("gpu(vram=40)", "Unknown argument 'vram' in @gpu of test_kernel. Valid: arch, count, exclusive, min_vram_gb"),
        ("perf(tolerance=5)", "In @perf of test_kernel: tolerance=5 is outside 0 to 1"),
    ],
)
def test_mistake_in_a_marker_is_readable(pytester: pytest.Pytester, marker: str, text: str) -> None:
    beside = "def test_beside(): open('something-ran', 'w').close()\n"
    result = suite_of(f"@pytest.mark.{marker}{KERNEL}{beside}").run(pytester, "-n2")

    assert_usage_error(result, text)
    assert not (pytester.path / "something-ran").exists()


def test_gpu_that_is_lost_at_collection_is_readable(pytester: pytest.Pytester) -> None:
    conftest = """
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch

def pytest_configure(config):
    nvml = FakeNvml(errors={("gpus", count): DeviceError("GPU 0 is lost") for count in range(99)})
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""
    suite = Suite(files={"test_suite.py": KERNEL}, conftest=conftest, is_subprocess=True)

    assert_usage_error(suite.run(pytester, "-n2"), "GPU 0 is lost")


def test_mistake_in_an_option_is_readable(pytester: pytest.Pytester) -> None:
    result = suite_of(KERNEL).run(pytester, "-n2", "--gpuperf-budget=abc")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gpuperf-budget abc is not a number of seconds, zero or more." in result.stderr.str()
    assert_readable(result)


def test_damaged_baseline_is_readable(pytester: pytest.Pytester) -> None:
    serial(KERNEL).record(pytester)
    path = pytester.path / "baselines/nvidia-h100-80gb-hbm3/test_suite.json"
    path.write_text("damaged")
    result = suite_of(KERNEL).run(pytester, "-n2")

    assert_usage_error(result, f"{path} is not a sound baseline")


def test_run_of_which_a_conftest_deselected_a_part_deletes_nothing(pytester: pytest.Pytester) -> None:
    serial(GROUPED).record(pytester)
    deselecting = """
def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=items[1:])
    del items[1:]
"""
    suite = Suite(files={"test_suite.py": GROUPED}, conftest=FAKE_H100 + deselecting, is_subprocess=True)
    suite.run(pytester, "-n2").assert_outcomes(passed=1)

    assert gpuperf("baseline", "prune").code == 1
    assert recorded_tests(pytester) == ["test_suite.py::test_kernel", "test_suite.py::test_other[1]"]


def test_one_gpu_is_never_held_by_two_workers(pytester: pytest.Pytester) -> None:
    source = """
import time

@pytest.mark.parametrize("number", range(4))
def test_alone(gpu, number):
    mine = os.open("held", os.O_CREAT | os.O_EXCL)
    time.sleep(0.05)
    os.close(mine)
    os.unlink("held")
"""
    suite_of(source).run(pytester, "-n4").assert_outcomes(passed=4)


def test_without_xdist_everything_works(pytester: pytest.Pytester) -> None:
    suite = suite_of(KERNEL, "-p", "no:xdist").record(pytester)

    suite.slower().run(pytester).assert_outcomes(failed=1)


def test_test_whose_worker_died_in_a_fixture_is_not_taken_for_gone(pytester: pytest.Pytester) -> None:
    source = """
import os
import pytest

@pytest.fixture
def engine():
    if os.environ.get("DIES"):
        os._exit(1)

def test_dying(gpu_benchmark, engine):
    gpu_benchmark(lambda: 1e-3)

def test_living(gpu_benchmark):
    gpu_benchmark(lambda: 1e-3)
"""
    suite = Suite(files={"test_suite.py": source}).in_subprocess().record(pytester)
    result = replace(suite, environment={"DIES": "1"}).run(pytester, "-n2")

    result.stdout.fnmatch_lines(["*1 of 1 metrics compared: 1 PASS.*"])
    result.stdout.no_fnmatch_line("*Unused baselines*")


def test_reason_for_measuring_on_the_cpu_is_given_by_the_controller_too(pytester: pytest.Pytester) -> None:
    files = {"test_suite.py": "def test_a(gpu_benchmark):\n    gpu_benchmark(lambda: sum(range(1000)))\n"}
    result = Suite(files=files, conftest="").in_subprocess().run(pytester, "-n2")

    result.stdout.fnmatch_lines(["Measured on the CPU: *"])
