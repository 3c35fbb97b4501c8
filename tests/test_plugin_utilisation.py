"""What a run says of the GPUs that it leased: in the summary, with its cost, in results.jsonl, from every worker."""

import pytest
from harness import CONFIRMING, KERNEL, Suite, assert_readable, results_of

#: GPUs that are busy for 80 % of the time.
BUSY = """
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import GpuUsage
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu

def pytest_configure(config):
    nvml = FakeNvml(*(fake_gpu(index) for index in range(COUNT)), usages=[GpuUsage(busy_share=0.8)])
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""

FOUR = """
import time

@pytest.mark.parametrize("number", range(4))
def test_kernel(gpu_benchmark, number):
    time.sleep(0.05)
    gpu_benchmark(lambda: TIME_S)
"""


def suite(source: str = KERNEL, *, gpus: int = 1) -> Suite:
    return Suite(files={"test_suite.py": source}, conftest=BUSY.replace("COUNT", str(gpus)))


def lines_about_leases(result: pytest.RunResult) -> list[str]:
    return [line for line in result.stdout.lines if line.startswith("GPUs leased ") or ": leased " in line]


def test_the_summary_says_how_busy_leased_gpus_were(pytester: pytest.Pytester) -> None:
    result = suite().run(pytester)

    result.assert_outcomes(passed=1)
    [line] = lines_about_leases(result)
    assert line.startswith("GPUs leased ")
    assert line.endswith(" s in all, busy 80 % of it, idle 20 %")
    assert_readable(result)


def test_a_price_adds_what_the_run_cost(pytester: pytest.Pytester) -> None:
    result = suite().run(pytester, "--gpuperf-price", "2.50")
    [line] = lines_about_leases(result)
    assert "; at 2.50 an hour " in line
    assert line.endswith(" for idle time")


@pytest.mark.parametrize("price", ["free", "0", "-1", "nan", "inf", ""])
def test_a_price_that_is_none_is_refused(pytester: pytest.Pytester, price: str) -> None:
    result = suite().run(pytester, f"--gpuperf-price={price}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--gpuperf-price {price} is not a price. Give that of an hour of one GPU*"])


def test_each_lease_is_a_line_of_the_results(pytester: pytest.Pytester) -> None:
    suite(FOUR).run(pytester)
    results = results_of(pytester)

    assert len(results.uses) == 4
    assert {use.device for use in results.uses} == set(results.tests[0].devices)
    assert all(use.busy_share == pytest.approx(0.8) and use.energy_j is None for use in results.uses)
    assert all(use.duration_s >= 0.05 for use in results.uses)
    assert results.end is not None
    assert (pytester.path / ".gpuperf/results.jsonl").read_text().splitlines()[-1].startswith('{"is_whole"')


def test_tests_that_hold_a_gpu_and_measure_nothing_are_told_and_leave_the_results_alone(
    pytester: pytest.Pytester,
) -> None:
    suite().run(pytester)
    before = (pytester.path / ".gpuperf/results.jsonl").read_bytes()
    result = suite("def test_holds(gpu):\n    pass\n").run(pytester)

    result.assert_outcomes(passed=1)
    assert len(lines_about_leases(result)) == 1
    assert (pytester.path / ".gpuperf/results.jsonl").read_bytes() == before


def test_leases_before_the_first_measurement_are_kept_with_it(pytester: pytest.Pytester) -> None:
    suite("def test_a_holds(gpu):\n    pass\n" + KERNEL).run(pytester)
    assert len(results_of(pytester).uses) == 2


def test_a_test_that_fails_has_leased_as_well(pytester: pytest.Pytester) -> None:
    result = suite("def test_fails(gpu):\n    assert False\n").run(pytester)
    result.assert_outcomes(failed=1)
    assert len(lines_about_leases(result)) == 1


#: The fresh processes of a test that is slow take a while.
SLOW = """
import time

def test_kernel(gpu_benchmark):
    time.sleep(0.2)
    gpu_benchmark(lambda: TIME_S)
"""


@pytest.mark.parametrize("arguments", [(), ("-n1",)], ids=["alone", "worker"])
def test_what_is_measured_again_in_fresh_processes_is_leased_as_well(
    pytester: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    if arguments:
        pytest.importorskip("xdist")
    confirming = Suite(files={"test_suite.py": SLOW}, conftest=BUSY.replace("COUNT", "1"), options=CONFIRMING)
    for _ in range(3):
        confirming.record(pytester)
    result = confirming.slower().in_subprocess().run(pytester, *arguments)

    result.assert_outcomes(failed=1)
    first, again = sorted(results_of(pytester).uses, key=lambda use: use.begin)
    assert 0.2 <= first.duration_s < again.duration_s
    assert again.duration_s >= 0.4  # two processes
    assert again.busy_share == pytest.approx(0.8)
    assert again.worker == ("gw0" if arguments else None)
    assert again.begin >= first.end


def test_profiles_of_what_is_recorded_are_leased_as_well(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    profiled = BUSY.replace("COUNT", "1").replace("FakeStopwatch,", "FakeProfiler, FakeStopwatch,")
    profiled = profiled.replace("_: FakeStopwatch()", "_: FakeStopwatch(), profiler=FakeProfiler()")
    Suite(conftest=profiled, options=CONFIRMING).in_subprocess().run(pytester, "-n1", "--gpuperf-update")
    assert [use.worker for use in results_of(pytester).uses] == ["gw0", "gw0"]


def test_nothing_is_said_where_nothing_was_leased(pytester: pytest.Pytester) -> None:
    result = suite("def test_plain():\n    pass\n").run(pytester, "--gpuperf-price", "2")
    result.assert_outcomes(passed=1)
    assert lines_about_leases(result) == []


def test_nothing_is_said_of_a_cpu(pytester: pytest.Pytester) -> None:
    held = Suite(files={"test_suite.py": "def test_holds(gpu):\n    pass\n"}, conftest="")
    result = held.run(pytester, "--gpuperf-device", "cpu")
    result.assert_outcomes(passed=1)
    assert lines_about_leases(result) == []


def test_a_driver_that_does_not_tell_is_said_beside_a_price_and_else_there_is_nothing_to_say(
    pytester: pytest.Pytester,
) -> None:
    suite = Suite(conftest=BUSY.replace("COUNT", "1").replace("busy_share=0.8", ""))
    assert lines_about_leases(suite.run(pytester)) == []
    assert "the driver does not tell how busy" in lines_about_leases(suite.run(pytester, "--gpuperf-price", "2.5"))[0]


def test_several_gpus_of_one_test_are_told_one_by_one(pytester: pytest.Pytester) -> None:
    source = "@pytest.mark.gpu(count=2)\ndef test_both(gpus, gpu_benchmark):\n    gpu_benchmark(lambda: TIME_S)\n"
    result = suite(source, gpus=2).run(pytester)
    assert len(lines_about_leases(result)) == 3
    assert len(results_of(pytester).uses) == 2


def test_workers_send_their_leases_to_the_controller(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    result = suite(FOUR, gpus=2).in_subprocess().run(pytester, "-n2")
    uses = results_of(pytester).uses

    result.assert_outcomes(passed=4)
    assert len(uses) == 4
    assert {use.worker for use in uses} == {"gw0", "gw1"}
    assert sum(line.startswith("GPUs leased") for line in result.stdout.lines) == 1
    assert_readable(result)
