"""Unsettled tests are measured again in fresh processes before anybody is accused; what can go wrong with that."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import (
    CONFIRMING,
    FAKE_H100,
    KERNEL,
    Suite,
    assert_readable,
    baselines_of,
    gpuperf,
    results_of,
    verdicts_of,
)

from pytest_gpuperf import confirm

#: A kernel that notes every process that measures it, and asks the test's own code what to do in the first, the
#: second, ... of them. `SICK` stands for the environment variable that makes trouble, so that recording has none.
COUNTED = """
import signal, sys, time
from pathlib import Path

def note(name, text):
    with open(name, "a") as file:
        file.write(text)

def process():
    note("processes", f"{os.getpid()}\\n")
    return len(Path("processes").read_text().split())

def is_fresh():
    return process() > 1 and "SICK" in os.environ
"""
SICK = {"TIME_S": "1.2e-3", "SICK": "1"}


def suite_of(source: str, **changes: object) -> Suite:
    return Suite(files={"test_suite.py": COUNTED + source}, options=CONFIRMING, **changes)  # type: ignore[arg-type]


def recorded(pytester: pytest.Pytester, suite: Suite) -> Suite:
    """The suite with three sessions' worth of runs, and no process counted."""
    for _ in range(3):
        suite.record(pytester)
    (pytester.path / "processes").unlink(missing_ok=True)
    return suite


def sick(suite: Suite) -> Suite:
    return Suite(files=suite.files, options=suite.options, conftest=suite.conftest, environment=SICK)


def processes(pytester: pytest.Pytester) -> list[str]:
    return (pytester.path / "processes").read_text().split()


KERNEL_COUNTED = """
def test_kernel(gpu_benchmark):
    process()
    gpu_benchmark(lambda: TIME_S)
"""


def test_slowdown_is_confirmed_in_two_fresh_processes_and_fails_its_test(pytester: pytest.Pytester) -> None:
    suite = recorded(pytester, suite_of(KERNEL_COUNTED)).slower()
    result = suite.run(pytester, "--junitxml=junit.xml")

    result.assert_outcomes(failed=1)
    assert len(set(processes(pytester))) == len(processes(pytester)) == 3
    result.stdout.fnmatch_lines(
        [
            "gpuperf: measuring 1 unsettled test again, in fresh processes",
            "F",
            "  slower by 20 %*tolerance 3.0 %, mean of 2 fresh processes",
            "FAILED test_suite.py::test_kernel - Failed: test_kernel got slower*",
        ]
    )
    junit = (pytester.path / "junit.xml").read_text()
    assert junit.count("<failure") == 1
    assert junit.count('name="gpuperf.time.verdict" value="REGRESSED"') == 1
    assert_readable(result)


def test_one_process_that_was_out_of_luck_accuses_nobody(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    is_first = process() == 1 and "SICK" in os.environ
    gpu_benchmark(lambda: 1.3e-3 if is_first else 1e-3)
"""
    result = sick(recorded(pytester, suite_of(source))).run(pytester)

    result.assert_outcomes(passed=1)
    [record] = results_of(pytester).tests
    assert [round(run.value, 6) for run in record.runs_of("time")] == [1.3e-3, 1e-3, 1e-3]
    assert [verdict.status for verdict in record.verdicts] == ["PASS"]
    result.stdout.fnmatch_lines([" time *1.000 ms * +0.0 * PASS"])


def test_clean_pass_starts_no_process(pytester: pytest.Pytester) -> None:
    result = recorded(pytester, suite_of(KERNEL_COUNTED)).run(pytester)

    result.assert_outcomes(passed=1)
    assert len(processes(pytester)) == 1
    result.stdout.no_fnmatch_line("*fresh process*")


def test_everything_the_test_held_is_torn_down_before_a_fresh_process_begins(pytester: pytest.Pytester) -> None:
    source = """
@pytest.fixture(scope="session")
def engine():
    note("log", f"up {os.getpid()}\\n")
    yield
    note("log", f"down {os.getpid()}\\n")

def test_kernel(gpu_benchmark, engine):
    gpu_benchmark(lambda: TIME_S)

def test_other(engine): pass
"""
    suite = recorded(pytester, suite_of(source)).slower()
    (pytester.path / "log").unlink()
    suite.run(pytester).assert_outcomes(failed=1, passed=1)

    lines = [line.split() for line in (pytester.path / "log").read_text().splitlines()]
    assert [word for word, _ in lines] == ["up", "down"] * 3
    assert [pid for _, pid in lines[::2]] == [pid for _, pid in lines[1::2]]


def test_lease_passes_to_the_fresh_process(pytester: pytest.Pytester) -> None:
    """While it measures, nobody else gets the device, and it does not wait for the parent."""
    source = """
def test_kernel(gpu, gpu_benchmark):
    import fcntl
    path = Path(os.environ["GPUPERF_LOCK_DIR"]) / f"device-{gpu.uuid_hash}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = "free"
        except OSError:
            held = "held"
    note("locks", f"{held} {os.getpid()}\\n")
    gpu_benchmark(lambda: TIME_S)
"""
    suite = recorded(pytester, suite_of(source)).slower()
    (pytester.path / "locks").unlink()
    suite.run(pytester).assert_outcomes(failed=1)

    assert [line.split()[0] for line in (pytester.path / "locks").read_text().splitlines()] == ["held"] * 3


@pytest.mark.parametrize(("mark", "outcomes"), [("", {"xfailed": 1}), (", strict=True", {"xfailed": 1})])
def test_confirmed_slowdown_of_an_expected_failure_is_an_xfail(
    pytester: pytest.Pytester, mark: str, outcomes: dict[str, int]
) -> None:
    source = f'@pytest.mark.xfail(reason="known"{mark})' + KERNEL_COUNTED
    suite = suite_of(source)
    for _ in range(3):
        suite.run(pytester, "--gpuperf-update")

    suite.slower().run(pytester).assert_outcomes(**outcomes)


def test_parameters_classes_and_other_tests_are_kept_apart(pytester: pytest.Pytester) -> None:
    source = """
class TestGroup:
    @pytest.mark.parametrize("name", ["a::b", "c[d]", "e f"])
    def test_kernel(self, gpu_benchmark, name):
        gpu_benchmark(lambda: TIME_S if name == "c[d]" else 1e-3)
"""
    suite = recorded(pytester, suite_of(source)).slower()
    result = suite.run(pytester)

    result.assert_outcomes(failed=1, passed=2)
    assert [str(record.key) for record in results_of(pytester).tests if record.more] == [
        "test_suite.py::TestGroup::test_kernel[c[d]]"
    ]


def test_unsettled_tests_of_workers_are_confirmed_too(pytester: pytest.Pytester) -> None:
    source = """
@pytest.mark.parametrize("n", range(4))
def test_kernel(gpu_benchmark, n):
    gpu_benchmark(lambda: TIME_S if n % 2 else 1e-3)
"""
    suite = recorded(pytester, suite_of(source)).slower().in_subprocess()
    result = suite.run(pytester, "-n2", "--junitxml=junit.xml")

    result.assert_outcomes(failed=2, passed=2)
    assert {len(record.more) for record in results_of(pytester).tests} == {0, 2}
    assert (pytester.path / "junit.xml").read_text().count("<failure") == 2
    assert_readable(result)


def test_fresh_process_has_the_same_options_but_writes_nothing_else(pytester: pytest.Pytester) -> None:
    conftest = FAKE_H100 + "\ndef pytest_addoption(parser):\n    parser.addoption('--model')\n"
    source = """
def test_kernel(gpu_benchmark, request):
    process()
    note("models", request.config.option.model + " ")
    gpu_benchmark(lambda: TIME_S)

def test_other(gpu_benchmark):
    gpu_benchmark(lambda: 1e-3)
"""
    suite = Suite(files={"test_suite.py": COUNTED + source}, conftest=conftest, options=(*CONFIRMING, "--model=big"))
    suite = recorded(pytester, suite).slower()
    (pytester.path / "models").unlink()
    options = ("--junitxml=junit.xml", "--benchmark-json=bench.json", "--gpuperf-update", "-k", "kernel or other", "-v")
    result = suite.run(pytester, *options)

    result.assert_outcomes(failed=1, passed=1)
    assert (pytester.path / "models").read_text() == "big big big "
    assert (pytester.path / "junit.xml").read_text().count("<testcase") == 2
    assert (pytester.path / "bench.json").read_text().count("test_kernel") > 0
    result.stdout.fnmatch_lines(["Refused test_kernel time: regressed: accept it with*"])


def test_recording_keeps_every_run(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    is_first = process() == 1 and "SICK" in os.environ
    gpu_benchmark(lambda: 1.3e-3 if is_first else 1e-3)
"""
    suite = recorded(pytester, suite_of(source))
    sick(suite).run(pytester, "--gpuperf-update").assert_outcomes(passed=1)

    [file] = baselines_of(pytester)
    [session] = file.tests["test_kernel"]["time"].sessions
    ids = [run.run_id for run in session.runs]
    assert [run.value for run in session.runs] == [1e-3] * 3 + [1.3e-3, 1e-3, 1e-3]
    assert ids[4:] == [f"{ids[3]}-2", f"{ids[3]}-3"]


def test_commands_judge_all_runs(pytester: pytest.Pytester) -> None:
    recorded(pytester, suite_of(KERNEL_COUNTED)).slower().run(pytester)
    result = gpuperf("baseline", "diff")

    assert result.code == 2
    assert "REGRESSED" in result.output


def test_budget_is_spent_on_the_tests_time(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    process()
    time.sleep(0.1)
    gpu_benchmark(lambda: TIME_S)
"""
    suite = recorded(pytester, suite_of(source)).slower()
    suite.run(pytester, "--gpuperf-budget=0.05").assert_outcomes(failed=1)

    assert len(processes(pytester)) == 2


def test_without_a_budget_one_process_decides(pytester: pytest.Pytester) -> None:
    suite = recorded(pytester, suite_of(KERNEL_COUNTED)).slower()
    suite.run(pytester, "--gpuperf-budget=0").assert_outcomes(failed=1)

    assert len(processes(pytester)) == 1


# what goes wrong in a fresh process: the suspicion stays, and says that it was not confirmed


def reason_of(pytester: pytest.Pytester, result: pytest.RunResult) -> str:
    assert_readable(result)
    [verdict] = verdicts_of(pytester).values()
    return verdict.reason


TROUBLES = {
    "crash": ("os._exit(7)", "it ended with exit code 7 without a measurement"),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", "it was ended by SIGKILL without a measurement"),
    "failure": ("raise ValueError('no')", "without a measurement; its last words: "),
    "memory": ("raise MemoryError('no room for 70 GiB')", "no room for 70 GiB"),
    "skip": ("pytest.skip('later')", "it ended with exit code 0 without a measurement"),
    "rubbish": (
        "Path(request.config.option.gpuperf_json).write_text('{rubbish}\\n'); os._exit(0)",
        "its results cannot be read",
    ),
    "late failure": ("gpu_benchmark(lambda: 1e-3); assert False", "the test passed here and failed in a fresh process"),
    "other metrics": (
        "gpu_benchmark(lambda: 1e-3, metric='b')",
        "a fresh process measured b, time, this one time: the metrics must not vary",
    ),
}


@pytest.mark.parametrize(("trouble", "words"), TROUBLES.values(), ids=TROUBLES)
def test_trouble_in_a_fresh_process_is_said_and_loses_nothing(
    pytester: pytest.Pytester, trouble: str, words: str
) -> None:
    source = f"""
def test_kernel(gpu_benchmark, request):
    if is_fresh():
        {trouble}
    gpu_benchmark(lambda: TIME_S)
"""
    result = sick(recorded(pytester, suite_of(source))).run(pytester, "--gpuperf-strict")

    result.assert_outcomes(failed=1)
    reason = reason_of(pytester, result)
    assert "; not confirmed: " in reason
    assert words in reason
    assert f"  time is INCONCLUSIVE: {reason}" in result.stdout.lines
    assert len(processes(pytester)) == 2


def test_suspicion_that_cannot_be_confirmed_accuses_nobody(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    if is_fresh():
        os._exit(7)
    gpu_benchmark(lambda: TIME_S)
"""
    result = sick(recorded(pytester, suite_of(source))).run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["INCONCLUSIVE test_kernel time: 20 % slower*; not confirmed: a fresh process*"])


def test_fresh_process_that_hangs_is_killed_with_all_it_started(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
def test_kernel(gpu_benchmark):
    if is_fresh():
        import subprocess
        Path("grandchild").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        time.sleep(600)
    gpu_benchmark(lambda: TIME_S)
"""
    monkeypatch.setattr(confirm, "START_LIMIT_S", 4.0)
    result = sick(recorded(pytester, suite_of(source))).run(pytester)

    assert "it did not end in time and was killed" in reason_of(pytester, result)
    assert has_ended(int((pytester.path / "grandchild").read_text()))


def has_ended(pid: int) -> bool:
    end_s = time.monotonic() + 5.0
    while time.monotonic() < end_s:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_crash_of_one_test_does_not_cost_the_others_their_runs(pytester: pytest.Pytester) -> None:
    source = """
def test_a(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_b(gpu_benchmark):
    if is_fresh():
        os._exit(7)
    gpu_benchmark(lambda: TIME_S)

def test_c(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)
"""
    sick(recorded(pytester, suite_of(source))).run(pytester)

    more = {record.key.test: (len(record.more), len(record.problems)) for record in results_of(pytester).tests}
    assert more == {"test_a": (2, 0), "test_b": (0, 1), "test_c": (2, 0)}


ENDINGS = {
    "interrupt": ("raise KeyboardInterrupt", "the run ended early", pytest.ExitCode.INTERRUPTED),
    "exit": ("pytest.exit('enough')", "the run ended early", pytest.ExitCode.INTERRUPTED),
    "first failure": ("assert False", "the run ended early", pytest.ExitCode.TESTS_FAILED),
}


@pytest.mark.parametrize(("ending", "words", "code"), ENDINGS.values(), ids=ENDINGS)
def test_run_that_ends_early_reports_what_waits(
    pytester: pytest.Pytester, ending: str, words: str, code: pytest.ExitCode
) -> None:
    source = f"""
def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_end():
    if "SICK" in os.environ:
        {ending}
"""
    suite = sick(recorded(pytester, suite_of(source))).in_subprocess()
    result = suite.run(pytester, "-x")

    assert result.ret == code
    [verdict] = verdicts_of(pytester).values()
    assert verdict.reason.endswith(f"; not confirmed: {words}.")


def test_worker_that_dies_while_tests_wait_is_said_to_have_taken_them_along(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_end():
    if "SICK" in os.environ:
        os._exit(1)
"""
    suite = sick(recorded(pytester, suite_of(source))).in_subprocess()
    result = suite.run(pytester, "-n1", "--max-worker-restart=0")

    assert result.ret != 0
    words = "Their worker died while these tests waited for more runs; they have no verdict: test_suite.py::test_kernel"
    assert f"ERROR: {words}" in result.stdout.lines


def test_test_that_another_plugin_runs_again_is_judged_at_once(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = flaky: of another plugin")
    suite = recorded(pytester, suite_of("@pytest.mark.flaky" + KERNEL_COUNTED)).slower()
    suite.run(pytester).assert_outcomes(failed=1)

    assert len(processes(pytester)) == 1


# what others do to a test


def test_failure_that_another_plugin_reports_is_not_lost(pytester: pytest.Pytester) -> None:
    """Such as a soft assertion, whose plugin fails the report and forgets."""
    conftest = (
        FAKE_H100
        + """
import pytest
complaints = ["soft"]

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and complaints and "SICK" in __import__("os").environ:
        report.outcome, report.longrepr = "failed", complaints.pop()
    return report
"""
    )
    suite = recorded(pytester, suite_of(KERNEL_COUNTED, conftest=conftest))

    sick(suite).run(pytester).assert_outcomes(failed=1)


def test_variables_that_tests_leave_behind_do_not_reach_a_fresh_process(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: TIME_S)

def test_end():
    os.environ["TIME_S"] = "1e-3"
"""
    suite = recorded(pytester, suite_of(source).in_subprocess()).slower()

    suite.run(pytester).assert_outcomes(failed=1, passed=1)


def test_temporary_folder_and_log_of_the_run_are_left_alone(pytester: pytest.Pytester) -> None:
    source = """
import logging

def test_kernel(gpu_benchmark, tmp_path):
    (tmp_path / f"mine-{os.getpid()}").touch()
    logging.warning("a line of %s", "mine")
    gpu_benchmark(lambda: TIME_S)
"""
    suite = recorded(pytester, suite_of(source)).slower().in_subprocess()
    suite.run(pytester, f"--basetemp={pytester.path / 'base'}", "--log-file=log.txt").assert_outcomes(failed=1)

    assert len(list((pytester.path / "base").rglob("mine-*"))) == 1
    assert (pytester.path / "log.txt").read_text().count("a line of mine") == 1


def test_same_test_twice_is_measured_again_once(pytester: pytest.Pytester) -> None:
    suite = recorded(pytester, suite_of(KERNEL_COUNTED)).slower()
    result = suite.run(pytester, "--keep-duplicates", "test_suite.py", "test_suite.py")

    assert_readable(result)
    result.assert_outcomes(failed=2)


def test_every_metric_is_judged_from_all_runs(pytester: pytest.Pytester) -> None:
    """One that its first run settled, too: its further runs are recorded."""
    source = """
def test_kernel(gpu_benchmark):
    is_later = is_fresh()
    gpu_benchmark(lambda: TIME_S, metric="a")
    gpu_benchmark(lambda: 1.5e-3 if is_later else 1e-3, metric="b")
"""
    sick(recorded(pytester, suite_of(source))).run(pytester)

    assert {name: verdict.status for name, verdict in verdicts_of(pytester).items()} == {
        "test_kernel a": "REGRESSED",
        "test_kernel b": "REGRESSED",
    }


def test_metric_that_is_recorded_too_late_is_an_error(pytester: pytest.Pytester) -> None:
    source = """
@pytest.fixture
def late(perf):
    yield
    perf.record("late", 1.0, unit="s")

def test_kernel(late): pass
"""
    result = suite_of(source).run(pytester)

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*late was recorded after the test's body had ended, so it cannot be judged.*"])


def test_method_of_a_unittest_case_is_refused_by_name(pytester: pytest.Pytester) -> None:
    source = """
import unittest

class TestOld(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def keep(self, gpu_benchmark):
        self.gpu_benchmark = gpu_benchmark

    def test_kernel(self):
        self.gpu_benchmark(lambda: TIME_S)
"""
    result = suite_of(source).run(pytester)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "test_suite.py::TestOld::test_kernel is a method of a unittest.TestCase" in result.stderr.str()


def test_fresh_process_ends_with_the_one_that_waits_for_it(pytester: pytest.Pytester) -> None:
    source = """
def test_kernel(gpu_benchmark):
    if is_fresh():
        Path("child").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    gpu_benchmark(lambda: TIME_S)
"""
    suite = sick(recorded(pytester, suite_of(source))).in_subprocess()
    assert suite.run(pytester).ret != 0

    assert has_ended(int((pytester.path / "child").read_text()))


# a sick GPU, and a sick machine

HOT_ONCE = """
from pathlib import Path
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_state

def pytest_configure(config):
    is_hot = Path("hot").exists()
    if is_hot and "{once}":
        Path("hot").unlink()
    states = [fake_state(hw_thermal_s=100.0 * count * is_hot) for count in range(40)]
    nvml = FakeNvml(states=states)
    config.stash[machine_key] = Machine("auto", nvml=nvml, make_stopwatch=lambda _: FakeStopwatch())
"""


@pytest.mark.parametrize("once", ["yes", ""], ids=["well again", "hot for good"])
def test_hot_gpu_cools_down_and_is_measured_again(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, once: str
) -> None:
    monkeypatch.setattr("pytest_gpuperf.deferred.cool_down", lambda *_: "well again")
    suite = recorded(pytester, Suite(conftest=HOT_ONCE.format(once=once), options=CONFIRMING))
    (pytester.path / "hot").touch()
    suite.run(pytester).assert_outcomes(passed=1)

    [verdict] = verdicts_of(pytester).values()
    cause = "thermal slowdown by the hardware for 100 % of the time"
    if once:
        assert verdict.status == "PASS"
        assert verdict.reason.endswith(f"; a run was set aside: {cause}.")
    else:
        assert verdict.status == "INVALID"
        assert verdict.reason == f"{cause}; not confirmed: in a fresh process, too: {cause}."


MANY = """
@pytest.mark.parametrize("n", range(3))
def test_one(gpu_benchmark, n):
    process()
    gpu_benchmark(lambda: TIME_S)

@pytest.mark.parametrize("n", range(3))
def test_two(gpu_benchmark, n):
    gpu_benchmark(lambda: TIME_S)
"""


@pytest.mark.parametrize(("option", "code"), [("--gpuperf-invalid=warn", 0), ("--gpuperf-strict", 1)])
def test_tests_that_moved_together_are_one_message(pytester: pytest.Pytester, option: str, code: int) -> None:
    suite = recorded(pytester, suite_of(MANY)).slower()
    result = suite.run(pytester, option)

    assert result.ret == code
    assert {verdict.status for verdict in verdicts_of(pytester).values()} == {"INVALID"}
    result.stdout.fnmatch_lines(
        [
            "INVALID 6 metrics: 6 of 6 compared tests, of different functions, got slower together, by 20 %*",
            "INVALID run: 6 of 6 compared tests, of different functions, got slower together, by 20 % in the median.*",
        ]
    )
    assert len(processes(pytester)) == 3  # nothing was measured again


def test_tests_that_moved_together_while_the_anchors_held_still_are_the_softwares(pytester: pytest.Pytester) -> None:
    conftest = FAKE_H100.replace("fake_machine()", 'fake_machine(anchors={"gemm": lambda: 1e-3})')
    suite = suite_of(MANY, conftest=conftest)
    for _ in range(3):
        suite.record(pytester, "--gpuperf-anchors=on")
    add_sessions(pytester, ["anchors.json"])
    (pytester.path / "processes").unlink()
    result = suite.slower().run(pytester, "--gpuperf-anchors=on")

    result.assert_outcomes(failed=6)
    result.stdout.fnmatch_lines(["*got slower together*while the anchors held still: it is the software*"])


def add_sessions(pytester: pytest.Pytester, names: Sequence[str]) -> None:
    """Make five sessions of one, as if they had been recorded on five days."""
    from msgspec.structs import replace

    from pytest_gpuperf.baseline_file import dumps, list_files, read

    for path in list_files(pytester.path / "baselines"):
        if path.name not in names:
            continue
        file = read(path)
        assert file is not None
        tests = {
            test: {
                metric: replace(
                    found, sessions=tuple(replace(found.sessions[0], visit=f"day {day}") for day in range(5))
                )
                for metric, found in metrics.items()
            }
            for test, metrics in file.tests.items()
        }
        path.write_bytes(dumps(replace(file, tests=tests)))


def test_anchor_that_is_off_makes_the_run_invalid_with_one_message(pytester: pytest.Pytester) -> None:
    conftest = FAKE_H100.replace(
        "fake_machine()", 'fake_machine(anchors={"gemm": lambda: float(os.environ.get("TIME_S", "1e-3"))})'
    ).replace("\ndef", "\nimport os\ndef", 1)
    suite = suite_of(MANY, conftest=conftest)
    suite.record(pytester, "--gpuperf-anchors=on")
    add_sessions(pytester, ["anchors.json"])
    (pytester.path / "processes").unlink()
    result = suite.slower().run(pytester, "--gpuperf-anchors=on")

    assert result.ret == 0
    statuses = [verdict.status for verdict in verdicts_of(pytester).values()]
    assert statuses.count("INVALID") == 6
    result.stdout.fnmatch_lines(["INVALID run: the anchor gemm is 20 % slower than usual*"])
    assert len(processes(pytester)) == 3
    assert os.environ.get("TIME_S") is None


def test_single_kernel_of_the_harness_is_not_measured_again_by_default(pytester: pytest.Pytester) -> None:
    """The other tests of the plugin rely on it."""
    suite = Suite(files={"test_suite.py": KERNEL}).record(pytester)

    suite.slower().run(pytester).stdout.no_fnmatch_line("*fresh process*")
