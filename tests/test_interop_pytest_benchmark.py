"""pytest-benchmark: our measurements in its files and tools, its fixture's measurements under our verdicts."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import FAKE_H100, KERNEL, Suite, assert_readable, baselines_of, results_of, statuses_of

from pytest_gpuperf.units import format_value

pytest.importorskip("pytest_benchmark")

#: On this machine a kernel's time wobbles by 1 %, so that the statistics have something to say.
NOISY_H100 = FAKE_H100.replace("fake_machine()", "fake_machine(noise=0.01)")

SLEEPER = """
import time

{marker}
def test_sleep(benchmark):
    benchmark.pedantic(time.sleep, args=(float(os.environ.get("SLEEP_S", "0.01")),), rounds=5)
"""
JUDGED = SLEEPER.format(marker="@pytest.mark.perf(tolerance=0.5)")
SLEEPS_LONGER = {"SLEEP_S": "0.03"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def saved(pytester: pytest.Pytester, name: str) -> Any:
    [path] = pytester.path.glob(f".benchmarks/*/*_{name}.json")
    return read(path)


# Ours in its files


def test_json_holds_our_measurement_with_statistics_of_its_data(pytester: pytest.Pytester) -> None:
    Suite(conftest=NOISY_H100).run(pytester, "--benchmark-json=out.json").assert_outcomes(passed=1)
    [entry] = read(pytester.path / "out.json")["benchmarks"]
    stats, data = entry["stats"], entry["stats"]["data"]
    [record] = results_of(pytester).tests

    assert entry["name"] == "test_kernel"
    assert entry["fullname"] == "test_suite.py::test_kernel"
    assert data == pytest.approx(record.measurements[0].samples_s)
    assert stats["rounds"] == len(data) > 100
    assert stats["min"] == pytest.approx(min(data))
    assert stats["max"] == pytest.approx(max(data))
    assert stats["mean"] == pytest.approx(statistics.fmean(data))
    assert stats["median"] == pytest.approx(statistics.median(data))
    assert stats["stddev"] == pytest.approx(statistics.stdev(data))
    assert stats["median"] == pytest.approx(1e-3, rel=0.01)


def test_json_says_what_was_measured_and_with_which_versions(pytester: pytest.Pytester) -> None:
    source = "def test_copy(gpu_benchmark):\n    gpu_benchmark(lambda: 1e-3, bytes=3e9)\n"
    Suite(files={"test_suite.py": source}).run(pytester, "--benchmark-json=out.json")
    [entry] = read(pytester.path / "out.json")["benchmarks"]

    assert entry["extra_info"]["metric"] == "bandwidth"
    assert entry["extra_info"]["unit"] == "B/s"
    assert entry["extra_info"]["value"] == pytest.approx(3e12)
    assert entry["extra_info"]["device"] == "NVIDIA H100 80GB HBM3"
    assert entry["extra_info"]["driver_version"] == "580.159.04"
    assert entry["stats"]["median"] == pytest.approx(1e-3)
    assert entry["options"] == {"clock": "cuda-events", "mode": "cold"}


def test_machine_info_names_gpus_driver_and_cuda(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--benchmark-json=out.json")
    info = read(pytester.path / "out.json")["machine_info"]

    assert info["gpus"] == ["NVIDIA H100 80GB HBM3"]
    assert (info["driver"], info["cuda"]) == ("580.159.04", "13.0")
    assert "cpu" in info


def test_machine_info_of_a_machine_without_gpu_says_so(pytester: pytest.Pytester) -> None:
    source = "def test_latency(perf):\n    perf.record('latency', 1, unit='ms')\n"
    suite = Suite(files={"test_suite.py": source}, conftest="", options=("--gpuperf-device=cpu",))
    suite.run(pytester, "--benchmark-json=out.json").assert_outcomes(passed=1)
    info = read(pytester.path / "out.json")["machine_info"]

    assert (info["gpus"], info["driver"], info["cuda"]) == ([], None, None)


def test_save_holds_each_metric_and_parameter_by_its_name(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.parametrize("n", [1, 2])
def test_kernel(gpu_benchmark, perf, n):
    gpu_benchmark(lambda: TIME_S * n)
    perf.record("latency", 5 * n, unit="ms")
    perf.record("throughput", 5 * n, unit="tok/s")
"""
    Suite(files={"test_suite.py": source}).run(pytester, "--benchmark-save=mine").assert_outcomes(passed=2)
    entries = {entry["name"]: entry for entry in saved(pytester, "mine")["benchmarks"]}

    assert sorted(entries) == [
        "test_kernel[1]::latency",
        "test_kernel[1]::time",
        "test_kernel[2]::latency",
        "test_kernel[2]::time",
    ]
    assert entries["test_kernel[2]::time"]["stats"]["median"] == pytest.approx(2e-3)
    assert entries["test_kernel[2]::latency"]["stats"]["median"] == pytest.approx(10e-3)
    assert entries["test_kernel[2]::latency"]["param"] == "2"


def test_its_compare_command_reads_two_runs(pytester: pytest.Pytester) -> None:
    suite = Suite(options=("--benchmark-autosave",))
    suite.run(pytester, "--benchmark-save=before")
    suite.slower().run(pytester, "--benchmark-save=after")
    command = [
        str(Path(sys.executable).with_name("pytest-benchmark")),
        "compare",
        "--columns=min,median",
        "--sort=name",
    ]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "test_kernel" in done.stdout
    assert "1.0000" in done.stdout
    assert "1.2000" in done.stdout


def test_its_own_comparison_sees_our_slowdown(pytester: pytest.Pytester) -> None:
    Suite().run(pytester, "--benchmark-save=before")
    slow = Suite().slower().run(pytester, "--benchmark-compare", "--benchmark-compare-fail=median:10%")
    same = Suite().run(pytester, "--benchmark-compare", "--benchmark-compare-fail=median:10%")

    assert slow.ret != 0
    assert same.ret == 0
    assert_readable(slow)


def test_histogram_is_drawn(pytester: pytest.Pytester) -> None:
    suite = Suite().in_subprocess()  # pygal, once imported, hides installed packages from later runs in this process
    suite.run(pytester, "--benchmark-json=out.json", "--benchmark-histogram=drawn").assert_outcomes(passed=1)

    (drawing,) = pytester.path.glob("drawn*.svg")
    assert "test_kernel" in drawing.read_text()


def test_without_its_options_nothing_of_ours_is_in_its_table(pytester: pytest.Pytester) -> None:
    result = Suite().run(pytester)

    result.stdout.no_fnmatch_line("*benchmark: 1 tests*")
    assert not list((pytester.path / ".benchmarks").rglob("*.json"))


# Its fixture under our verdicts

#: A clock for its fixture on which sleeping takes no time but what it says: a busy machine would add its own.
CLOCK = """
now_s = 0.0

def now():
    return now_s

def sleep(seconds):
    global now_s
    now_s += seconds
"""


def test_its_fixture_with_our_marker_is_new_then_passes_then_regresses(pytester: pytest.Pytester) -> None:
    pytester.syspathinsert()
    (pytester.path / "fake_clock.py").write_text(CLOCK)
    source = JUDGED.replace("import time", "import fake_clock as time")
    suite = Suite(files={"test_suite.py": source}, options=("--benchmark-timer=fake_clock.now",))

    first = suite.run(pytester, "--gpuperf-update")
    assert statuses_of(pytester) == {"test_sleep benchmark": "NEW"}
    first.assert_outcomes(passed=1)
    [recorded] = baselines_of(pytester)

    second = suite.run(pytester)
    assert statuses_of(pytester) == {"test_sleep benchmark": "PASS"}
    second.assert_outcomes(passed=1)

    third = replace(suite, environment=SLEEPS_LONGER).run(pytester)
    assert statuses_of(pytester) == {"test_sleep benchmark": "REGRESSED"}
    third.assert_outcomes(failed=1)
    [test] = results_of(pytester).tests
    value, before = test.measurements[0].value, test.verdicts[0].baseline_value or 0.0
    assert before == pytest.approx(recorded.tests["test_sleep"]["benchmark"].sessions[0].runs[0].value)
    assert value == pytest.approx(0.03)
    figures = f"{format_value(value, 's')}, baseline {format_value(before, 's')}"
    third.stdout.fnmatch_lines(["test_sleep got slower on *", f"  benchmark: {figures}"])
    assert_readable(third)


def test_its_fixture_without_our_marker_is_left_alone(pytester: pytest.Pytester) -> None:
    result = Suite(files={"test_suite.py": SLEEPER.format(marker="")}).run(pytester, "--gpuperf-strict")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*GPU performance*")
    assert not (pytester.path / ".gpuperf").exists()


def test_its_measurement_is_once_in_its_json(pytester: pytest.Pytester) -> None:
    Suite(files={"test_suite.py": JUDGED}).run(pytester, "--benchmark-json=out.json").assert_outcomes(passed=1)

    assert [entry["name"] for entry in read(pytester.path / "out.json")["benchmarks"]] == ["test_sleep"]


def test_both_fixtures_in_one_test_are_both_judged(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.perf(tolerance=0.5)
def test_both(benchmark, gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
    benchmark.pedantic(lambda: None, rounds=3)
"""
    Suite(files={"test_suite.py": source}).run(pytester).assert_outcomes(passed=1)

    assert statuses_of(pytester) == {"test_both time": "NEW", "test_both benchmark": "NEW"}


def test_metric_of_the_users_named_like_its_fixture_is_refused_readably(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.perf
def test_both(benchmark, perf):
    perf.record("benchmark", 1, unit="ms")
    benchmark.pedantic(lambda: None, rounds=3)
"""
    result = Suite(files={"test_suite.py": source}).run(pytester)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*The metric 'benchmark' was recorded twice in this test.*"])
    assert_readable(result)


def test_its_fixture_that_measured_nothing_is_left_alone(pytester: pytest.Pytester) -> None:
    source = "@pytest.mark.perf\ndef test_idle(benchmark):\n    benchmark.disabled\n"
    result = Suite(files={"test_suite.py": source}).run(pytester, "-W", "ignore")

    result.assert_outcomes(passed=1)
    assert_readable(result)


@pytest.mark.parametrize("option", ["--benchmark-disable", "--benchmark-skip"])
def test_switched_off_fixture_is_not_judged(pytester: pytest.Pytester, option: str) -> None:
    suite = Suite(files={"test_suite.py": JUDGED}).record(pytester)
    result = Suite(files=suite.files, environment=SLEEPS_LONGER).run(pytester, option)

    assert result.ret == 0
    assert_readable(result)


def test_our_fixture_measures_with_theirs_switched_off(pytester: pytest.Pytester) -> None:
    suite = Suite().record(pytester)

    suite.slower().run(pytester, "--benchmark-disable").assert_outcomes(failed=1)


# Without it, and under xdist


def test_without_pytest_benchmark_everything_works(pytester: pytest.Pytester) -> None:
    suite = Suite(options=("-p", "no:benchmark")).record(pytester)
    result = suite.slower().run(pytester)

    result.assert_outcomes(failed=1)
    assert len(baselines_of(pytester)) == 1


def test_under_xdist_ours_are_still_in_its_json(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    files = {"test_suite.py": KERNEL + KERNEL.replace("test_kernel", "test_other")}
    suite = Suite(files=files, options=("-n2",), is_subprocess=True)
    suite.run(pytester, "--benchmark-json=out.json").assert_outcomes(passed=2)
    entries = read(pytester.path / "out.json")["benchmarks"]

    assert sorted(entry["name"] for entry in entries) == ["test_kernel", "test_other"]


def test_gpu_that_cannot_be_used_does_not_disturb_those_who_measure_without_one(pytester: pytest.Pytester) -> None:
    files = {"test_suite.py": "def test_a(benchmark):\n    benchmark(sum, range(100))\n"}
    suite = Suite(files=files, environment={"CUDA_VISIBLE_DEVICES": "MIG-0"})
    suite.run(pytester, "--benchmark-json=out.json").assert_outcomes(passed=1)

    info = json.loads((pytester.path / "out.json").read_text())["machine_info"]
    assert info["gpus"] == []
    assert "MIG" in info["gpu_problem"]
