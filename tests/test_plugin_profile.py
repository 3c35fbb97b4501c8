"""When tests are profiled, by whom, and what becomes of it: never by the process that measures, never a failed test."""

import os
import re
from collections.abc import Sequence

import pytest
from harness import CONFIRMING, Suite, assert_readable, gpuperf, results_of, statuses_of

from pytest_gpuperf.kernel_store import KernelsFile, read_kernels
from pytest_gpuperf.records import KernelRecord

#: A machine with a profiler that sees one kernel, of the time of a call, and is told by variables what to be like.
CONFTEST = """
import os
from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeProfiler, fake_machine

def pytest_configure(config):
    error = MeasurementError("the profiler saw nothing") if "BROKEN" in os.environ else None
    profiler = FakeProfiler(kernel=os.environ.get("KERNEL", "gemm"), error=error)
    config.stash[machine_key] = fake_machine(profiler=profiler)
"""

KERNEL = """
def test_kernel(gpu_benchmark):
    with open("processes", "a") as file:
        file.write(f"{os.getpid()}\\n")
    result = gpu_benchmark(lambda: TIME_S)
    result.assert_at_most(1, unit="s")
"""

OTHER = """
def test_other(perf):
    with perf.region():
        pass
    perf.record("latency", TIME_S, unit="s")
"""


def suite_of(*sources: str, **environment: str) -> Suite:
    return Suite(
        files={"test_suite.py": "".join(sources) or KERNEL},
        conftest=CONFTEST,
        options=CONFIRMING,
        environment=environment,
    )


def profiles(pytester: pytest.Pytester) -> dict[str, KernelRecord]:
    return {f"{one.key.test} {one.metric}": one for one in results_of(pytester).profiles}


def processes(pytester: pytest.Pytester) -> Sequence[str]:
    return (pytester.path / "processes").read_text().split()


def kernels_files(pytester: pytest.Pytester) -> list[KernelsFile]:
    found = [read_kernels(path) for path in sorted((pytester.path / "baselines").glob("*/*.kernels.json"))]
    return [file for file in found if file is not None]


def names_of(pytester: pytest.Pytester) -> dict[str, str]:
    """Test and metric -> its stored kernel."""
    return {
        f"{test} {metric}": stored.kernels.kernels[0].name
        for file in kernels_files(pytester)
        for test, metrics in file.tests.items()
        for metric, stored in metrics.items()
    }


def test_what_is_recorded_is_profiled_in_a_process_of_its_own(pytester: pytest.Pytester) -> None:
    result = suite_of(KERNEL, OTHER).run(pytester, "--gpuperf-update")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["gpuperf: profiling 2 tests in a fresh process"])
    first, second = processes(pytester)
    assert first == str(os.getpid())
    assert second != first
    assert {name: one.kernels.kernels[0].time_s for name, one in profiles(pytester).items()} == {
        "test_kernel time": pytest.approx(1e-3),
        "test_other latency": pytest.approx(1e-3),
    }
    assert names_of(pytester) == {"test_kernel time": "gemm", "test_other latency": "gemm"}
    assert [len(record.measurements) for record in results_of(pytester).tests] == [1, 1]
    assert_readable(result)


def test_the_line_stands_by_itself(pytester: pytest.Pytester) -> None:
    result = suite_of().run(pytester, "--gpuperf-update", "-q")
    assert "gpuperf: profiling 1 test in a fresh process" in result.outlines


def test_what_has_kernels_is_not_profiled_again(pytester: pytest.Pytester) -> None:
    suite = suite_of().record(pytester)
    result = suite.run(pytester, "--gpuperf-update")

    result.stdout.no_fnmatch_line("*profiling*")
    assert len(processes(pytester)) == 3
    assert names_of(pytester) == {"test_kernel time": "gemm"}


def test_nothing_is_profiled_where_nothing_is_recorded(pytester: pytest.Pytester) -> None:
    suite = suite_of().record(pytester)
    (pytester.path / "processes").unlink()
    suite.run(pytester).assert_outcomes(passed=1)
    assert len(processes(pytester)) == 1


def test_no_budget_no_profile(pytester: pytest.Pytester) -> None:
    suite_of().run(pytester, "--gpuperf-update", "--gpuperf-budget", "0")
    assert len(processes(pytester)) == 1
    assert kernels_files(pytester) == []


def test_without_a_profiler_no_process_is_started(pytester: pytest.Pytester) -> None:
    """As on a machine whose clock is fake, or where torch was never imported."""
    conftest = CONFTEST.replace("profiler=profiler", "")
    suite = suite_of()
    Suite(files=suite.files, conftest=conftest, options=CONFIRMING).run(pytester, "--gpuperf-update")
    assert len(processes(pytester)) == 1


def test_a_regression_is_profiled_before_it_is_reported(pytester: pytest.Pytester) -> None:
    suite_of().record(pytester)
    result = suite_of(TIME_S="1.2e-3", KERNEL="slow_gemm").run(pytester)

    result.assert_outcomes(failed=1)
    assert statuses_of(pytester) == {"test_kernel time": "REGRESSED"}
    [one] = profiles(pytester).values()
    assert one.kernels.kernels[0].name == "slow_gemm"
    assert one.kernels.span_s == pytest.approx(1.2e-3)
    assert names_of(pytester) == {"test_kernel time": "gemm"}, "the baseline's stays"


def test_a_suspicion_that_was_not_confirmed_is_not_profiled(pytester: pytest.Pytester) -> None:
    source = KERNEL.replace("with open", "is_first = os.path.exists('again') and not os.remove('again')\n    with open")
    source = source.replace("lambda: TIME_S", "lambda: TIME_S * (1.2 if is_first else 1)")
    suite_of(source).record(pytester)
    (pytester.path / "again").touch()
    recorded = len(processes(pytester))
    suite_of(source).run(pytester).assert_outcomes(passed=1)
    assert len(processes(pytester)) > recorded + 1, "it was suspected"
    assert profiles(pytester) == {}


def test_accepting_a_regression_later_stores_what_was_seen_of_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pytester.path)
    suite_of().record(pytester)
    suite_of(TIME_S="1.2e-3", KERNEL="slow_gemm").run(pytester)
    assert gpuperf("baseline", "accept", "--reason", "meant").code == 0
    assert names_of(pytester) == {"test_kernel time": "slow_gemm"}


def test_accepting_at_once_profiles_the_new_epoch(pytester: pytest.Pytester) -> None:
    suite_of().record(pytester)
    result = suite_of(TIME_S="1.5e-3", KERNEL="slow_gemm").run(pytester, "--gpuperf-accept", "meant")
    result.assert_outcomes(passed=1)
    assert names_of(pytester) == {"test_kernel time": "slow_gemm"}


def test_a_patch_holds_the_kernels_too(pytester: pytest.Pytester) -> None:
    result = suite_of().run(pytester, "--gpuperf-patch", "new.patch")
    result.assert_outcomes(passed=1)
    text = (pytester.path / "new.patch").read_text()
    assert "test_suite.kernels.json" in text
    assert '"name": "gemm"' in text


def test_a_profiler_that_fails_is_a_note_and_no_failed_test(pytester: pytest.Pytester) -> None:
    result = suite_of(BROKEN="1").run(pytester, "--gpuperf-update")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["No kernels were recorded: *test_kernel*exit code 1*the profiler saw nothing*"])
    assert kernels_files(pytester) == []
    assert_readable(result)


def test_a_process_that_dies_is_a_note_and_what_it_had_seen_is_kept(pytester: pytest.Pytester) -> None:
    dies = """
from pathlib import Path

def test_dies(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
    if int(Path("first").read_text()) != os.getpid():
        os.kill(os.getpid(), 9)
"""
    (pytester.path / "first").write_text(str(os.getpid()))
    result = suite_of(KERNEL, dies).run(pytester, "--gpuperf-update")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["No kernels were recorded: *test_dies, but it was ended by SIGKILL*"])
    assert names_of(pytester) == {"test_kernel time": "gemm"}


def test_a_test_that_knows_its_own_kernels_is_not_profiled(pytester: pytest.Pytester) -> None:
    """As one whose engine runs, and is profiled, elsewhere."""
    source = """
from pytest_gpuperf.testing import FakeProfiler

def test_engine(perf):
    with open("processes", "a") as file:
        file.write(f"{os.getpid()}\\n")
    with perf.region():
        pass
    perf.record("throughput", 1 / TIME_S, unit="tok/s")
    kernels = FakeProfiler(kernel="attention").calls(lambda: None, device_s=1e-3)
    perf.record("gpu_step_time", TIME_S, unit="s", kernels=kernels)
"""
    suite_of(source).run(pytester, "--gpuperf-update")
    assert len(processes(pytester)) == 1
    assert names_of(pytester) == {"test_engine gpu_step_time": "attention"}


def test_work_that_is_done_elsewhere_is_not_profiled_here(pytester: pytest.Pytester) -> None:
    source = """
def test_engine(perf):
    with open("processes", "a") as file:
        file.write(f"{os.getpid()}\\n")
    perf.is_elsewhere = True
    perf.record("throughput", 1 / TIME_S, unit="tok/s")
"""
    suite_of(source).run(pytester, "--gpuperf-update")
    assert len(processes(pytester)) == 1


def test_a_number_of_the_tests_own_has_no_kernels_to_look_for(pytester: pytest.Pytester) -> None:
    """Beside one that has: it would be looked for at every update."""
    suite = suite_of(
        KERNEL,
        """
def test_number(perf):
    perf.record("memory", 1e9, unit="B")
""",
    )
    suite.record(pytester)
    assert list(names_of(pytester)) == ["test_kernel time"]
    suite.run(pytester, "--gpuperf-update").stdout.no_fnmatch_line("*profiling*")


def test_floors_of_the_peak_do_not_fail_a_profile(pytester: pytest.Pytester) -> None:
    """A first look at the time is no measurement."""
    source = """
from pathlib import Path

def test_matmul(gpu_benchmark):
    is_fresh = Path("first").exists()
    Path("first").touch()
    result = gpu_benchmark(lambda: 1 if is_fresh else TIME_S, flops=6e11, dtype="bfloat16")
    result.assert_at_least(0.5, of="peak")
"""
    result = suite_of(source).run(pytester, "--gpuperf-update")
    result.stdout.no_fnmatch_line("No kernels were recorded*")
    assert list(names_of(pytester)) == ["test_matmul throughput"]


def test_pruning_keeps_the_two_files_in_step(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pytester.path)
    suite_of(KERNEL, OTHER).record(pytester)
    suite_of(KERNEL).run(pytester)
    assert "1 unused baselines deleted" in gpuperf("baseline", "prune").output
    assert list(names_of(pytester)) == ["test_kernel time"]


def test_a_file_of_kernels_that_is_not_sound_fails_the_update(pytester: pytest.Pytester) -> None:
    suite_of().record(pytester)
    [path] = (pytester.path / "baselines").glob("*/*.kernels.json")
    path.write_text("{}")
    result = suite_of(KERNEL, OTHER).run(pytester, "--gpuperf-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"test_suite\.kernels\.json is not a sound baseline", result.stdout.str())


def test_workers_of_xdist_hand_over_what_they_saw(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    suite = suite_of(KERNEL, OTHER).in_subprocess()
    result = suite.run(pytester, "--gpuperf-update", "-n", "2")
    result.assert_outcomes(passed=2)
    assert names_of(pytester) == {"test_kernel time": "gemm", "test_other latency": "gemm"}


def test_the_whole_way_on_a_cpu(pytester: pytest.Pytester) -> None:
    """With torch's own profiler."""
    pytest.importorskip("torch")
    source = """
import torch
one = torch.ones(64)

def test_add(gpu_benchmark):
    gpu_benchmark(lambda: torch.add(one, one), mode="hot")
"""
    suite = Suite(
        files={"test_suite.py": source},
        conftest="",
        options=("--gpuperf-device", "cpu", *CONFIRMING),
        is_subprocess=True,
    )
    suite.record(pytester)
    assert names_of(pytester) == {"test_add time": "aten::add"}
