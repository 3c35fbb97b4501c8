"""Calibration: the noise of each metric from fresh processes, what it supports, and processes that go wrong."""

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import scipy.stats
from harness import FAKE_H100, gpuperf
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.analysis import prospects
from pytest_gpuperf.analysis.prospects import TOLERANCES
from pytest_gpuperf.judge import ALPHA, CONFIRMED, judge
from pytest_gpuperf.priors import package_priors
from pytest_gpuperf.records import (
    BaselineRun,
    Curve,
    Environment,
    Hardware,
    Kind,
    Measurement,
    Method,
    MetricBaseline,
    Session,
    TestKey,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.stats import SessionLogs, Variance, variance_components
from pytest_gpuperf.trials import calibrate as calibrate_module
from pytest_gpuperf.trials.calibrate import (
    Calibration,
    Process,
    calibrate,
    chi_square_quantile,
    deviation_interval,
    left_out,
    run_processes,
)

H100 = Environment(hardware=Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984))
CPU = Environment(hardware=Hardware(name="Xeon"))
KEY = TestKey(module="test_a.py", test="test_kernel")
METHOD = Method(clock="cuda-events", mode="cold")
VALUES = (1.000e-3, 1.003e-3, 0.998e-3, 1.001e-3, 1.004e-3)


def measured(value: float, *, kind: Kind = "compute", tolerance: float | None = 0.03, **more: object) -> Measurement:
    one = Measurement(
        metric="time", value=value, unit="s", better="lower", kind=kind, method=METHOD, tolerance=tolerance
    )
    return replace(one, **more)


def record(*measurements: Measurement, device: str = "a", status: str = "NEW", **more: object) -> TestRecord:
    verdicts = [
        Verdict(status="NEW", metric=one.metric, reason="thermal slowdown", tolerance=0.1) for one in measurements
    ]
    one = TestRecord(
        key=KEY,
        slug="h100",
        devices=(device,),
        environment=H100,
        measurements=measurements,
        verdicts=tuple(replace(verdict, status=status) for verdict in verdicts),
    )
    return replace(one, **more)


def processes(*records: TestRecord) -> list[Process]:
    return [Process(number=i, duration_s=1.0, tests=(each,)) for i, each in enumerate(records, 1)]


def calibrated(found: Sequence[Process]) -> Calibration:
    (calibration,) = calibrate(found, {"h100": package_priors()})
    return calibration


def of_values(*values: float, **more: object) -> Calibration:
    return calibrated(processes(*(record(measured(value, **more)) for value in values)))  # type: ignore[arg-type]


@pytest.fixture
def few_games(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at the supported tolerance, which takes time to find."""
    monkeypatch.setattr(prospects, "_GAMES", 1)


# Noise


@pytest.mark.usefixtures("few_games")
def test_value_is_the_geometric_mean() -> None:
    assert of_values(1e-3, 4e-3).value == pytest.approx(2e-3)


@pytest.mark.usefixtures("few_games")
def test_curve_that_ended_early_once_is_no_noise() -> None:
    method = Method(clock="wall", mode="curve")
    whole = Curve(x="batch size", points={"1": 1.0, "2": 4.0})
    early = Curve(x="batch size", points={"1": 1.0})
    curves = [measured(2.0, method=method, curve=whole)] * 3 + [measured(1.0, method=method, curve=early)]
    found = calibrated(processes(*(record(one) for one in curves)))
    assert found.value == pytest.approx(1.0)
    assert found.between == pytest.approx(0.0)


def test_noise_between_runs_is_the_standard_deviation_of_the_logarithms() -> None:
    expected = statistics.stdev(math.log(value) for value in VALUES)
    assert of_values(*VALUES).between == pytest.approx(expected)


@pytest.mark.usefixtures("few_games")
def test_interval_of_the_noise_is_that_of_the_chi_square_distribution() -> None:
    between = of_values(*VALUES).between
    assert between is not None
    low, high = (between * math.sqrt(4 / scipy.stats.chi2.ppf(p, 4)) for p in (0.975, 0.025))
    assert (of_values(*VALUES).between_low, of_values(*VALUES).between_high) == pytest.approx((low, high))


@given(probability=st.floats(0.001, 0.999), freedom=st.integers(1, 60))
def test_chi_square_quantile_is_scipys(probability: float, freedom: int) -> None:
    expected = scipy.stats.chi2.ppf(probability, freedom)
    assert chi_square_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9)


@given(variance=st.floats(1e-12, 1.0), freedom=st.integers(1, 50))
def test_interval_of_a_deviation_holds_the_deviation_and_shrinks_with_more_runs(variance: float, freedom: int) -> None:
    low, high = deviation_interval(Variance(value=variance, degrees_of_freedom=freedom))
    assert low < math.sqrt(variance) < high
    closer_low, closer_high = deviation_interval(Variance(value=variance, degrees_of_freedom=freedom + 10))
    assert closer_high / closer_low < high / low


@pytest.mark.usefixtures("few_games")
def test_noise_within_a_run_is_the_root_mean_square_of_the_spreads() -> None:
    runs = [record(measured(1e-3, spread=spread)) for spread in (0.03, 0.04)]
    assert calibrated(processes(*runs)).within == pytest.approx(math.sqrt((9e-4 + 16e-4) / 2))


@pytest.mark.usefixtures("few_games")
def test_recorded_values_have_no_noise_within_a_run() -> None:
    assert of_values(*VALUES).within is None


@pytest.mark.usefixtures("few_games")
def test_what_gpus_differ_by_is_not_noise_between_runs() -> None:
    alike = processes(*(record(measured(v), device=d) for d, v in zip("aabb", (1.0, 1.01, 2.0, 2.02), strict=True)))
    calibration = calibrated(alike)
    assert calibration.devices == 2
    assert calibration.between == pytest.approx(math.log(1.01) / math.sqrt(2))


def test_one_run_on_each_gpu_says_nothing_of_noise() -> None:
    calibration = calibrated(processes(*(record(measured(1e-3), device=device) for device in "ab")))
    assert (calibration.between, calibration.sees_once, calibration.supported, calibration.advice) == (None,) * 4


@pytest.mark.usefixtures("few_games")
def test_metric_that_one_run_measured_has_no_noise() -> None:
    first = record(measured(1e-3), measured(2e-3, metric="other"))
    _, other = calibrate(processes(first, record(measured(1e-3))), {"h100": package_priors()})
    assert (other.metric, other.runs, other.between) == ("other", 1, None)


@pytest.mark.usefixtures("few_games")
def test_metric_on_a_cpu_takes_the_noise_of_cpus() -> None:
    on_cpu = processes(*(record(measured(value), environment=CPU) for value in VALUES))
    sees = calibrated(on_cpu).sees_once
    assert sees is not None
    assert sees > 0.2 > (of_values(*VALUES).sees_once or 0)


# What does not count


@pytest.mark.usefixtures("few_games")
def test_failed_test_does_not_count_and_is_told() -> None:
    found = processes(record(measured(1e-3)), record(measured(1e-3)), record(measured(9e-3), passed=False))
    assert calibrated(found).runs == 2
    assert calibrated(found).value == pytest.approx(1e-3)
    assert left_out(found) == ("run 3, test_a.py::test_kernel: the test failed",)


@pytest.mark.usefixtures("few_games")
def test_value_of_an_unwell_gpu_does_not_count_and_is_told() -> None:
    found = processes(record(measured(1e-3)), record(measured(9e-3), status="INVALID"), record(measured(1e-3)))
    assert calibrated(found).value == pytest.approx(1e-3)
    assert left_out(found) == ("run 2, test_a.py::test_kernel: time is INVALID: thermal slowdown",)


@pytest.mark.usefixtures("few_games")
def test_value_measured_in_another_way_does_not_count_and_is_told() -> None:
    hot = Method(clock="cuda-events", mode="hot")
    found = processes(record(measured(1e-3)), record(measured(9e-3, method=hot)), record(measured(1e-3)))
    assert calibrated(found).runs == 2
    assert left_out(found) == (
        "test_a.py::test_kernel time: hot, cuda-events, most runs cold, cuda-events: set its mode",
    )


# What it supports


@pytest.mark.usefixtures("few_games")
def test_smallest_effect_is_that_of_the_judge_computed_by_hand() -> None:
    calibration, prior = of_values(*VALUES, kind="memory"), package_priors()["memory"]
    worth, measured_squares = prior.within.worth, 4 * statistics.variance(math.log(value) for value in VALUES)
    within = (measured_squares + worth * prior.within.deviation**2) / (4 + worth)
    session = prior.session.deviation**2
    # The judge sees five sessions of one run that vary by both; what runs differ by, it takes from its prior.
    known = prior.within.deviation**2
    excess = 4 * (within + session) - 4 * known
    seen = (excess + prior.session.worth * session) / (4 + prior.session.worth)
    parts = [1.2 * known, 1.2 * seen]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / worth + parts[1] ** 2 / (4 + prior.session.worth))
    quantiles = scipy.stats.t.ppf(1 - ALPHA, freedom) + scipy.stats.t.ppf(0.8, freedom)
    assert calibration.sees_once == pytest.approx(math.expm1(quantiles * math.sqrt(sum(parts))), rel=1e-6)


@pytest.mark.usefixtures("few_games")
def test_three_runs_see_more_than_one_where_runs_differ() -> None:
    calibration = of_values(0.1, 0.101, 0.099, kind="end-to-end")
    assert calibration.sees_once is not None
    assert calibration.sees_confirmed is not None
    assert calibration.sees_confirmed < calibration.sees_once


def plays(calibration: Calibration, kind: Kind, slower: float, runs: int, count: int = 200) -> list[Verdict]:
    """Verdicts on new runs against new baselines with the noise that the calibration found."""
    prior = package_priors()[kind]
    logs = tuple(math.log(value) for value in VALUES)
    sessions = [SessionLogs(device_group="a", logs=logs)]
    components = variance_components(sessions, prior=prior.variances, floor=prior.floor)
    within, session = math.sqrt(components.within.value), math.sqrt(components.session.value)
    chance = random.Random(7)

    def visit(number: int) -> list[float]:
        level = chance.gauss(0, session)
        return [math.exp(level + chance.gauss(0, within)) for _ in range(number)]

    def play() -> Verdict:
        past = [
            Session(date="", visit=str(i), devices=("a",), environment="e", runs=(BaselineRun(value=visit(1)[0]),))
            for i in range(5)
        ]
        return judge(
            [measured(v * (1 + slower), kind=kind, tolerance=calibration.tolerance) for v in visit(runs)],
            MetricBaseline(unit="s", better="lower", kind=kind, method=METHOD, sessions=tuple(past)),
            environments={"e": H100},
            environment=H100,
            devices=("a",),
            look=1 if runs == 1 else 2,
            spending=CONFIRMED,
        )

    return [play() for _ in range(count)]


@pytest.mark.parametrize("kind", ["compute", "end-to-end"])
def test_supported_tolerance_keeps_its_promise(kind: Kind) -> None:
    supported = of_values(*VALUES, kind=kind).supported
    assert supported is not None
    calibration = of_values(*VALUES, kind=kind, tolerance=supported)
    unchanged = plays(calibration, kind, slower=0.0, runs=1)
    slower = plays(calibration, kind, slower=2 * supported, runs=3)
    assert sum(v.status == "PASS" and not v.is_low_power for v in unchanged) > 0.92 * len(unchanged)
    assert sum(v.status == "REGRESSED" for v in slower) > 0.8 * len(slower)


def test_half_the_supported_tolerance_would_not_keep_it() -> None:
    supported = of_values(*VALUES).supported
    assert supported is not None
    unchanged = plays(of_values(*VALUES, tolerance=supported / 2), "compute", slower=0.0, runs=1)
    assert sum(v.status == "PASS" and not v.is_low_power for v in unchanged) < 0.92 * len(unchanged)


def test_noise_beyond_every_tolerance_supports_none_and_is_too_tight() -> None:
    calibration = of_values(0.1, 1.0, 0.01, kind="host", tolerance=0.9)
    assert calibration.supported is None
    assert calibration.advice == "too tight"


def test_supported_tolerance_is_one_of_the_round_ones_and_comes_out_alike_every_time() -> None:
    first, again = of_values(*VALUES), of_values(*VALUES)
    assert first == again
    assert first.supported in TOLERANCES


@pytest.mark.parametrize(
    ("tolerance", "advice"),
    [(0.019, "too tight"), (0.02, "fine"), (0.059, "fine"), (0.06, "could be tighter")],
)
def test_advice_compares_the_tolerance_with_the_supported_one(tolerance: float, advice: str) -> None:
    calibration = Calibration(
        key=KEY,
        metric="time",
        unit="s",
        value=1.0,
        runs=5,
        devices=1,
        tolerance=tolerance,
        between=0.01,
        supported=0.02,
    )
    assert calibration.advice == advice


@pytest.mark.usefixtures("few_games")
def test_tolerance_of_a_test_without_one_is_that_of_its_kind() -> None:
    assert of_values(*VALUES, tolerance=None).tolerance == package_priors()["compute"].tolerance


# Processes

SUITE = """
import os, pathlib, random, signal, time

def test_kernel(gpu_benchmark, request):
    number = int(pathlib.Path(request.config.option.gpuperf_json).parent.name)
    {what}
    seconds = 1e-3 * random.gauss(1, 1e-3)
    gpu_benchmark(lambda: seconds)
"""
QUICK = ("-p", "no:hypothesispytest", "-p", "no:benchmark", "-p", "no:xdist")


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(pytester.path / ".locks"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    pytester.makeconftest(FAKE_H100)
    return pytester


def run(suite: pytest.Pytester, what: str, *, count: int = 1, timeout_s: float = 60.0) -> list[Process]:
    suite.makepyfile(test_suite=SUITE.replace("{what}", what))
    folder = suite.mkdir("runs")
    return list(run_processes(QUICK, Path(folder), count=count, timeout_s=timeout_s))


@pytest.mark.parametrize(
    ("options", "modules"), [((), {"test_suite.py"}), (("--gpuperf-anchors=on",), {"anchors.py", "test_suite.py"})]
)
def test_anchors_are_no_metrics_of_the_suite_unless_they_are_asked_for(
    suite: pytest.Pytester, options: tuple[str, ...], modules: set[str]
) -> None:
    suite.makeconftest(FAKE_H100.replace("fake_machine()", "fake_machine(anchors={'gemm': lambda: 2e-4})"))
    suite.makepyfile(test_suite=SUITE.replace("{what}", "pass"))
    (process,) = run_processes((*QUICK, *options), Path(suite.mkdir("runs")), count=1, timeout_s=60.0)
    assert {record.key.module for record in process.tests} == modules


def test_process_that_measures_counts(suite: pytest.Pytester) -> None:
    (process,) = run(suite, "pass")
    assert process.problem is None
    assert [each.metric for record in process.tests for each in record.measurements] == ["time"]


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("os._exit(3)", "ended with exit code 3"),
        ("assert False", "measured nothing (ended with exit code 1)"),
        (
            "pathlib.Path(request.config.option.gpuperf_json).write_text('rubbish\\n'); os._exit(0)",
            "left results that cannot be read: Not a results file of pytest-gpuperf",
        ),
        (
            "pathlib.Path(request.config.option.gpuperf_json).mkdir(); os._exit(0)",
            "left results that cannot be read: [Errno 21] Is a directory",
        ),
        ("return", "measured nothing (ended with exit code 0)"),
    ],
    ids=["crash", "exit", "failure", "rubbish", "unreadable", "nothing"],
)
def test_process_that_goes_wrong_does_not_count_and_says_why(suite: pytest.Pytester, what: str, problem: str) -> None:
    (process,) = run(suite, what)
    assert process.problem is not None
    assert process.problem.startswith(problem)
    assert process.tests == ()


def test_process_that_hangs_is_killed_and_says_so(suite: pytest.Pytester) -> None:
    (process,) = run(suite, "print('before'); time.sleep(60)", timeout_s=2)
    assert process.problem == "did not end within 2 s and was killed (--timeout)"
    assert process.duration_s < 20


def test_results_that_an_exit_cut_short_do_not_count(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_zz_later="import os\ndef test_later():\n    os._exit(1)\n")
    (process,) = run(suite, "pass")
    assert process.problem == "left results without an end (ended with exit code 1)"


def test_baselines_of_the_user_are_neither_read_nor_written(suite: pytest.Pytester) -> None:
    (suite.mkdir("baselines") / "h100").write_text("not a folder")
    (process,) = run(suite, "pass")
    assert process.problem is None
    assert [path.name for path in (suite.path / "baselines").iterdir()] == ["h100"]


# The command


@pytest.mark.usefixtures("few_games")
def test_command_shows_the_table_of_what_the_good_processes_measured(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_suite=SUITE.replace("{what}", "assert number != 2"))
    done = gpuperf("calibrate", "-n", "3", "--", *QUICK)
    assert done.code == 0, done.errors
    lines = done.output.splitlines()
    assert lines[0].startswith("run 1 of 3: 1 metric, ")
    assert lines[1] == "run 2 of 3: measured nothing (ended with exit code 1); it does not count"
    table = lines.index("test_suite.py::test_kernel time")
    assert " 3.0 " in lines[table + 1]


def test_wrong_arguments_of_pytest_stop_after_one_process(suite: pytest.Pytester) -> None:
    done = gpuperf("calibrate", "-n", "4", "--", *QUICK, "not_there.py")
    assert done.code == 1
    assert "run 1 of 4: ended with exit code 4; it does not count" in done.output
    assert "file or directory not found: not_there.py" in done.output
    assert "run 2" not in done.output
    assert done.errors == "gpuperf: 2 good runs are needed to know any noise, and 0 of 1 were good.\n"


@pytest.mark.parametrize("arguments", [("-n", "1"), ("--timeout", "0"), ("--timeout", "nan")])
def test_too_few_runs_and_no_time_are_refused(suite: pytest.Pytester, arguments: tuple[str, ...]) -> None:
    done = gpuperf("calibrate", *arguments)
    assert done.code == 1
    assert "need two runs or more, of more than 0 seconds each" in done.errors


@pytest.mark.usefixtures("few_games")
def test_interrupted_calibration_shows_what_is_known(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> object:
        yield from processes(record(measured(1e-3)), record(measured(1.001e-3)))
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "run_processes", interrupted)
    done = gpuperf("calibrate", "-n", "9")
    assert done.code == 130
    assert "Interrupted: this is what 2 of 9 runs say." in done.output
    assert "test_a.py::test_kernel time" in done.output


def test_learned_noise_that_cannot_be_read_is_told_before_anything_is_measured(suite: pytest.Pytester) -> None:
    (suite.mkdir("baselines") / "h100").mkdir()
    (suite.path / "baselines/h100/.priors.json").write_text("rubbish")
    done = gpuperf("calibrate", "-n", "2", "--", *QUICK)
    assert (done.code, done.output) == (1, "")
    assert "does not hold priors" in done.errors
