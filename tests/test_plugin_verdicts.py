"""What a user sees of a verdict: the table, the message of a test that got slower, JUnit, and the accept command."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from harness import KERNEL, Suite, assert_readable, gpuperf, recorded_tests, results_of, statuses_of, verdicts_of

TWO_TESTS = """
def test_slowed(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_steady(gpu_benchmark):
    gpu_benchmark(lambda: 2e-3)
"""

TWO_METRICS = """
def test_kernel(gpu_benchmark, perf):
    gpu_benchmark(lambda: TIME_S)
    perf.record("latency", 40, unit="ms")
"""


def message_of(result: pytest.RunResult) -> list[str]:
    """The lines of the first failure's message, without pytest's own."""
    lines = result.stdout.lines
    start = next(i for i, line in enumerate(lines) if " got slower on " in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("  accept it:"))
    return lines[start : end + 1]


def junit_of(path: Path) -> dict[str, ET.Element]:
    """Test -> its element."""
    root = ET.parse(path).getroot()  # noqa: S314 - pytest wrote it a moment ago
    return {str(case.get("name")): case for case in root.iter("testcase")}


def properties_of(case: ET.Element) -> dict[str, str]:
    return {str(each.get("name")): str(each.get("value")) for each in case.iter("property")}


# The first run and the second


def test_first_run_says_that_everything_is_new_and_how_to_record_it(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": TWO_METRICS}).run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "*GPU performance: NVIDIA H100 80GB HBM3*",
            "*value*peak*baseline*change*sees*verdict",
            "test_suite.py::test_kernel",
            " time*1.000 ms*NEW",
            " latency*40.00 ms*NEW",
            "Nothing was compared: 2 NEW.",
            "Record the new ones as baselines:*gpuperf baseline record",
        ]
    )
    assert statuses_of(pytester) == {"test_kernel time": "NEW", "test_kernel latency": "NEW"}


def test_second_run_compares_with_what_was_recorded_and_passes(pytester: pytest.Pytester) -> None:
    suite = Suite()
    suite.run(pytester)
    recorded = gpuperf("baseline", "record")
    result = suite.run(pytester)

    assert (recorded.code, recorded.output) == (0, "Baselines in baselines: 1 recorded.\n")
    assert result.ret == 0
    result.stdout.fnmatch_lines([" time*1.000 ms*1.000*+0.0 ±*PASS", "1 of 1 metrics compared: 1 PASS."])
    result.stdout.no_fnmatch_line("*Nothing was compared*")
    result.stdout.no_fnmatch_line("*Record the new ones*")
    result.stdout.fnmatch_lines(["Provisional baselines (under 5 sessions)*"])


@pytest.mark.parametrize("options", [(), ("-q",), ("-qq",), ("--no-header", "--no-summary")], ids=" ".join)
def test_green_run_that_compared_nothing_says_so_however_quiet(
    pytester: pytest.Pytester, options: tuple[str, ...]
) -> None:
    result = Suite().run(pytester, *options)

    assert result.ret == 0
    result.stdout.fnmatch_lines(["Nothing was compared: 1 NEW."])


def test_suite_that_measures_nothing_prints_no_table_and_writes_nothing(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": "def test_plain(): pass"}).run(pytester)

    assert result.ret == 0
    result.stdout.no_fnmatch_line("*GPU performance*")
    assert not (pytester.path / ".gpuperf").exists()


def test_test_that_uses_the_fixture_and_measures_nothing_is_no_pass_of_anything(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": "def test_lazy(gpu_benchmark): pass"}).run(pytester)

    assert result.ret == 0
    result.stdout.no_fnmatch_line("*PASS*")
    assert not (pytester.path / ".gpuperf").exists()


def test_table_shows_the_share_of_the_peak(pytester: pytest.Pytester) -> None:
    source = """
def test_matmul(gpu_benchmark):
    result = gpu_benchmark(lambda: 1e-3, flops=500e9, dtype="bfloat16")
    result.assert_at_least(0.4, of="peak")

def test_copy(gpu_benchmark):
    result = gpu_benchmark(lambda: 1e-3, bytes=3e9)
    result.assert_at_least(3, unit="TB/s")
"""
    result = Suite(files={"test_suite.py": source}).run(pytester)

    assert result.ret == 0
    result.stdout.fnmatch_lines([" throughput*500.0 TFLOP/s*51 %*NEW", " bandwidth*3.000 TB/s*90 %*NEW"])


def test_floor_that_is_missed_fails_the_test_with_both_numbers(pytester: pytest.Pytester) -> None:
    source = """
def test_matmul(gpu_benchmark):
    gpu_benchmark(lambda: 1e-3, flops=500e9, dtype="bfloat16").assert_at_least(0.6, of="peak")
"""
    result = Suite(files={"test_suite.py": source}).run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*throughput is 500.0 TFLOP/s, below the floor of 593.* TFLOP/s (60 % of the peak)*"])


# A slowdown


def test_slowdown_fails_the_test_that_measured_it_and_no_other(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO_TESTS}).record(pytester)
    result = suite.slower().run(pytester, "-rA")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["PASSED test_suite.py::test_steady", "FAILED test_suite.py::test_slowed*"])
    assert statuses_of(pytester) == {"test_slowed time": "REGRESSED", "test_steady time": "PASS"}
    assert_readable(result)


def test_slowdown_fails_in_the_call_phase(pytester: pytest.Pytester) -> None:
    conftest = """
def pytest_runtest_logreport(report):
    if report.failed:
        print(f"failed in {report.when}")
"""
    suite = Suite().record(pytester)
    result = Suite(conftest=suite.conftest + conftest).slower().run(pytester, "-s")

    result.stdout.fnmatch_lines(["*failed in call"])
    result.stdout.no_fnmatch_line("*failed in teardown*")


def test_message_of_a_slowdown_has_ten_lines_at_most_and_all_that_is_needed(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO_TESTS}).record(pytester)
    result = suite.slower().run(pytester)
    message = message_of(result)

    assert len(message) <= 10
    assert message[0] == "test_slowed got slower on NVIDIA H100 80GB HBM3"
    result.stdout.fnmatch_lines(
        [
            "  time: 1.200 ms, baseline 1.000 ms",
            "  slower by 20 %, 95 % interval 19 % to 21 %, tolerance 3.0 %",
            "  SM clock 345 MHz, baseline 345 MHz; power 72 W, baseline 72 W",
            "  differs from the baseline: nothing that is recorded",
            "  accept it: *gpuperf baseline accept --reason WHY test_suite.py::test_slowed",
        ]
    )


def test_message_names_clocks_power_and_versions_then_and_now(pytester: pytest.Pytester) -> None:
    before = """
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_state

class Driver(FakeNvml):
    def driver_version(self):
        return "{driver}"

def pytest_configure(config):
    nvml = Driver(fake_gpu(), states=[fake_state(sm_clock_mhz={clock}, power_w={power})])
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""
    Suite(conftest=before.format(driver="580.1", clock=1980.0, power=400.0)).record(pytester)
    now = Suite(conftest=before.format(driver="590.2", clock=1755.0, power=350.0))
    message = "\n".join(message_of(now.slower().run(pytester)))

    assert "SM clock 1755 MHz, baseline 1980 MHz; power 350 W, baseline 400 W" in message
    assert "differs from the baseline: driver 580.1 -> 590.2" in message


def test_message_names_the_other_metrics_that_got_slower(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark, perf):
    gpu_benchmark(lambda: TIME_S)
    gpu_benchmark(lambda: TIME_S, metric="latency")
    perf.record("power", 100, unit="W")
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)
    message = message_of(suite.slower().run(pytester))

    assert "  also slower: latency by 20 %" in message
    assert len(message) <= 10


def test_long_message_with_many_metrics_keeps_to_ten_lines(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    for number in range(30):
        gpu_benchmark(lambda: TIME_S, metric=f"time_{number}")
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)

    assert len(message_of(suite.slower().run(pytester))) <= 10


def test_accept_command_of_the_message_really_works(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO_TESTS}).record(pytester)
    result = suite.slower().run(pytester)
    line = next(line for line in result.stdout.lines if line.startswith("  accept it: "))
    command = shlex.split(line.removeprefix("  accept it: ").replace("WHY", "'exact softmax'"))
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Baselines in baselines: 1 accepted.\n"
    assert suite.slower().run(pytester).ret == 0
    assert statuses_of(pytester)["test_slowed time"] == "PASS"


def test_accept_command_names_the_results_and_quotes_the_test(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.parametrize("text", ["a b; c"])
def test_kernel(gpu_benchmark, text):
    gpu_benchmark(lambda: TIME_S)
"""
    suite = Suite(files={"test_suite.py": source}, options=("--gpuperf-json", "some where/out.jsonl")).record(pytester)
    result = suite.slower().run(pytester)
    line = next(line for line in result.stdout.lines if line.startswith("  accept it: "))
    _, *arguments = shlex.split(line.removeprefix("  accept it: "))

    assert gpuperf(*arguments).code == 0
    assert suite.slower().run(pytester).ret == 0


def test_accept_command_works_for_baselines_in_another_folder(pytester: pytest.Pytester) -> None:
    suite = Suite(options=("--gpuperf-baselines", "elsewhere")).record(pytester)
    result = suite.slower().run(pytester)
    line = next(line for line in result.stdout.lines if line.startswith("  accept it: "))
    _, *arguments = shlex.split(line.removeprefix("  accept it: "))
    gpuperf(*arguments)

    assert suite.slower().run(pytester).ret == 0


def test_accept_command_works_from_a_folder_below_the_root(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]")
    suite = Suite(files={"below/test_suite.py": KERNEL}).record(pytester)
    monkeypatch.chdir(pytester.path / "below")
    result = suite.slower().run(pytester)
    line = next(line for line in result.stdout.lines if line.startswith("  accept it: "))
    _, *arguments = shlex.split(line.removeprefix("  accept it: "))

    assert gpuperf(*arguments).code == 0
    assert suite.slower().run(pytester).ret == 0


def test_command_of_a_refusal_works_for_baselines_in_another_folder(pytester: pytest.Pytester) -> None:
    suite = Suite(options=("--gpuperf-baselines", "elsewhere")).record(pytester)
    result = suite.slower().run(pytester, "--gpuperf-update")
    line = next(line for line in result.stdout.lines if line.startswith("Refused "))
    _, *arguments = shlex.split(line.partition("accept it with: ")[2])
    gpuperf(*arguments)

    assert suite.slower().run(pytester).ret == 0


def test_commands_to_record_and_to_prune_name_the_folder_too(pytester: pytest.Pytester) -> None:
    options = ("--gpuperf-baselines", "else where", "--gpuperf-json", "out.jsonl")
    result = Suite(files={"test_suite.py": TWO_TESTS}, options=options).run(pytester)
    line = next(line for line in result.stdout.lines if line.startswith("Record the new ones as baselines:  "))
    _, *arguments = shlex.split(line.partition(":  ")[2])

    assert gpuperf(*arguments).code == 0
    assert len(recorded_tests(pytester, "else where")) == 2
    result = Suite(options=options).run(pytester)  # has another test, so those two are gone
    line = next(line for line in result.stdout.lines if line.startswith("Unused baselines: "))
    _, *arguments = shlex.split(line.partition("Delete with:  ")[2])
    assert gpuperf(*arguments).code == 0
    assert recorded_tests(pytester, "else where") == []


def test_regression_of_one_metric_keeps_the_others_in_the_results(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO_METRICS}).record(pytester)
    suite.slower().run(pytester)

    assert statuses_of(pytester) == {"test_kernel time": "REGRESSED", "test_kernel latency": "PASS"}


def test_improvement_does_not_fail_and_is_told(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)
    result = Suite(environment={"TIME_S": "0.8e-3"}).run(pytester, "--gpuperf-strict")

    assert result.ret == 0
    result.stdout.fnmatch_lines([" time*-20.0 ±*IMPROVED"])
    assert suite.run(pytester).ret == 0


def test_rate_that_drops_is_slower_and_one_that_rises_is_not(pytester: pytest.Pytester) -> None:
    source = """
def test_rate(perf):
    perf.record("throughput", 1 / TIME_S, unit="tok/s")
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)

    assert Suite(files=suite.files, environment={"TIME_S": "2e-3"}).run(pytester).ret == 1
    assert Suite(files=suite.files, environment={"TIME_S": "0.5e-3"}).run(pytester).ret == 0


@pytest.mark.parametrize(("tolerance", "code"), [("0.3", 0), ("'30%'", 0), ("0.1", 1), ("'10%'", 1)])
def test_tolerance_of_the_marker_decides(pytester: pytest.Pytester, tolerance: str, code: int) -> None:
    suite = Suite(files={"test_suite.py": f"@pytest.mark.perf(tolerance={tolerance}){KERNEL}"}).record(pytester)

    assert suite.slower().run(pytester).ret == code


def test_tolerance_of_the_call_wins_over_the_marker(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.perf(tolerance=0.01)
def test_kernel(gpu_benchmark, perf):
    gpu_benchmark(lambda: TIME_S, tolerance="30%")
    perf.record("latency", TIME_S, unit="s", tolerance=0.3)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)

    assert suite.slower().run(pytester).ret == 0


def test_failing_test_keeps_its_own_message_and_its_measurements(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
    assert 1 + 1 == 3, "my own assertion"
"""
    Suite().record(pytester)
    result = Suite(files={"test_suite.py": source}).slower().run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*my own assertion*"])
    result.stdout.no_fnmatch_line("*got slower*")
    assert [test.passed for test in results_of(pytester).tests] == [False]
    assert_readable(result)


# JUnit


def test_junit_holds_the_failure_in_the_testcase_and_the_figures_as_properties(pytester: pytest.Pytester) -> None:
    suite = Suite(files={"test_suite.py": TWO_TESTS}).record(pytester)
    suite.slower().run(pytester, "--junitxml", "junit.xml")
    cases = junit_of(pytester.path / "junit.xml")
    slowed, steady = properties_of(cases["test_slowed"]), properties_of(cases["test_steady"])

    failure = cases["test_slowed"].find("failure")
    assert failure is not None
    assert "slower by 20 %" in str(failure.get("message")) + str(failure.text)
    assert cases["test_steady"].find("failure") is None
    assert float(slowed["gpuperf.time.value"]) == pytest.approx(1.2e-3)
    assert slowed["gpuperf.time.unit"] == "s"
    assert slowed["gpuperf.time.verdict"] == "REGRESSED"
    assert float(slowed["gpuperf.time.change"]) == pytest.approx(0.2, rel=0.01)
    assert float(slowed["gpuperf.time.change_low"]) < 0.2 < float(slowed["gpuperf.time.change_high"])
    assert steady["gpuperf.time.verdict"] == "PASS"


def test_junit_of_a_first_run_has_no_change(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--junitxml", "junit.xml")
    properties = properties_of(junit_of(pytester.path / "junit.xml")["test_kernel"])
    assert "gpuperf.time.limited_by" not in properties

    assert properties["gpuperf.time.verdict"] == "NEW"
    assert "gpuperf.time.change" not in properties


# xfail


@pytest.mark.parametrize("is_strict", [False, True])
def test_slowdown_of_an_expected_failure_is_an_xfail(pytester: pytest.Pytester, is_strict: bool) -> None:
    source = f"@pytest.mark.xfail(strict={is_strict}, reason='slow for now'){KERNEL}"
    Suite().record(pytester)
    result = Suite(files={"test_suite.py": source}).slower().run(pytester)

    assert result.ret == 0
    result.assert_outcomes(xfailed=1)


def test_expected_slowdown_that_did_not_happen_fails_a_strict_xfail_alone(pytester: pytest.Pytester) -> None:
    source = "@pytest.mark.xfail(strict={}, reason='slow for now')" + KERNEL
    Suite().record(pytester)

    Suite(files={"test_suite.py": source.format("True")}).run(pytester).assert_outcomes(failed=1)
    Suite(files={"test_suite.py": source.format("False")}).run(pytester).assert_outcomes(xpassed=1)


# Names


def test_each_parameter_has_a_baseline_of_its_own(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [1, 2])
def test_kernel(gpu_benchmark, n, dtype):
    gpu_benchmark(lambda: TIME_S if (n, dtype) == (2, "float16") else 1e-3)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)
    result = suite.slower().run(pytester)

    result.assert_outcomes(passed=3, failed=1)
    assert statuses_of(pytester)["test_kernel[2-float16] time"] == "REGRESSED"
    result.stdout.fnmatch_lines(["test_suite.py::test_kernel", " 1-float16 *PASS", " 2-float16 *REGRESSED"])


def test_tests_in_classes_are_kept_apart(pytester: pytest.Pytester) -> None:
    source = """
class TestA:
    def test_kernel(self, gpu_benchmark):
        gpu_benchmark(lambda: TIME_S)

class TestB:
    class TestInner:
        def test_kernel(self, gpu_benchmark):
            gpu_benchmark(lambda: 3e-3)
"""
    suite = Suite(files={"test_suite.py": source}).record(pytester)
    suite.slower().run(pytester)

    assert recorded_tests(pytester) == [
        "test_suite.py::TestA::test_kernel",
        "test_suite.py::TestB::TestInner::test_kernel",
    ]
    assert statuses_of(pytester) == {
        "TestA::test_kernel time": "REGRESSED",
        "TestB::TestInner::test_kernel time": "PASS",
    }


def test_same_names_in_two_modules_are_kept_apart(pytester: pytest.Pytester) -> None:
    files = {
        "a/test_same.py": KERNEL,
        "b/test_same.py": KERNEL.replace("TIME_S", "5e-3"),
        "b/test_other.py": KERNEL.replace("TIME_S", "7e-3"),
    }
    suite = Suite(files=files, options=("--import-mode=importlib",)).record(pytester)
    result = suite.slower().run(pytester)

    result.assert_outcomes(passed=2, failed=1)
    assert sorted(recorded_tests(pytester)) == [
        "a/test_same.py::test_kernel",
        "b/test_other.py::test_kernel",
        "b/test_same.py::test_kernel",
    ]


def test_baselines_are_found_from_a_folder_below_the_root(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]")
    suite = Suite(files={"below/test_suite.py": KERNEL}).record(pytester)
    monkeypatch.chdir(pytester.path / "below")
    result = suite.slower().run(pytester)

    result.assert_outcomes(failed=1)
    assert not Path(os.curdir, "baselines").exists()
    assert verdicts_of(pytester)["test_kernel time"].status == "REGRESSED"


def test_unittest_style_and_plain_tests_beside_are_left_alone(pytester: pytest.Pytester) -> None:
    source = """
import unittest

class TestOld(unittest.TestCase):
    def test_old(self):
        self.assertTrue(True)

def test_plain():
    pass
"""
    result = Suite(files={"test_suite.py": source + KERNEL}).run(pytester)

    result.assert_outcomes(passed=3)
    assert list(statuses_of(pytester)) == ["test_kernel time"]


def test_command_is_installed_beside_python(pytester: pytest.Pytester) -> None:
    command = Path(sys.executable).with_name("gpuperf")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert "baseline" in done.stdout
