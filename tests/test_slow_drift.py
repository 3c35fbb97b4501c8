"""2 % slower a week, each step inside the tolerance: our gate turns red, pytest-benchmark's comparison with the last
saved run stays green for ten weeks, though the code is 22 % slower in the end."""

import math
import random
import textwrap
from collections.abc import Iterator
from datetime import date, timedelta

import pytest
from epochs import append
from msgspec.structs import replace

from pytest_gpuperf.judge import CONFIRMED, LOOKS, is_settled, judge
from pytest_gpuperf.records import (
    SCHEMA,
    BaselineFile,
    Environment,
    Hardware,
    Measurement,
    Method,
    RunInfo,
    Status,
    TestKey,
    TestRecord,
    Verdict,
)

STEP, WEEKS, TOLERANCE = 0.02, 10, 0.03
ENVIRONMENT = Environment(hardware=Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984))
KEY = TestKey(module="test_kernel.py", test="test_kernel")
#: A millisecond, copied from memory to memory.
KERNEL = Measurement(
    metric="time",
    value=1e-3,
    unit="s",
    better="lower",
    kind="memory",
    method=Method(clock="cuda-events", mode="cold"),
    tolerance=TOLERANCE,
)


def judged(runs: list[Measurement], file: BaselineFile | None, visit: str, look: int) -> Verdict:
    return judge(
        runs,
        file.tests[KEY.test]["time"] if file else None,
        environments=file.environments if file else {},
        environment=ENVIRONMENT,
        devices=("gpu",),
        visit=visit,
        look=look,
        spending=CONFIRMED,
    )


def confirmed(value: float, noise: random.Random, file: BaselineFile | None, visit: str) -> Verdict:
    """The verdict on as many runs of one visit as it takes, each with the noise of such a kernel."""
    runs: list[Measurement] = []
    for look, count in enumerate(LOOKS, 1):
        runs += [replace(KERNEL, value=value * math.exp(noise.gauss(0, 3e-4))) for _ in range(count - len(runs))]
        verdict = judged(runs, file, visit, look)
        if verdict.status == "NEW" or is_settled(verdict, look):
            break
    return verdict


def weeks(
    *, step: float, steady: int, recorded: tuple[Status, ...], seed: int = 0, last: int = WEEKS
) -> Iterator[tuple[int, Verdict]]:
    """Measure once a week, and record what may be recorded.

    Args:
        step: How much slower every week is, from week 1 on.
        steady: Weeks up to 0, which are all alike.
        recorded: Verdicts after which the week's run is added to the baseline.
        seed: Of the noise.
        last: The last week.
    """
    noise, file = random.Random(seed), None
    for week in range(1 - steady, last + 1):
        value = KERNEL.value * (1 + step) ** max(week, 0) * math.exp(noise.gauss(0, 3e-4))
        verdict = confirmed(value, noise, file, visit=f"week {week}")
        yield week, verdict
        if verdict.status in recorded:
            day = date(2026, 3, 2) + timedelta(weeks=week)
            run = RunInfo(schema=SCHEMA, run_id=f"week {week}", date=day.isoformat(), visit=f"week {week}")
            record = TestRecord(
                key=KEY,
                slug="h100",
                devices=("gpu",),
                environment=ENVIRONMENT,
                measurements=(replace(KERNEL, value=value),),
                verdicts=(verdict,),
            )
            file = append(file, run, record, ["time"])


def first_red(weekly: Iterator[tuple[int, Verdict]]) -> int | None:
    return next((week for week, verdict in weekly if verdict.status == "REGRESSED"), None)


PASSED: tuple[Status, ...] = ("NEW", "PASS")
#: What --gpuperf-update adds.
UPDATED: tuple[Status, ...] = ("NEW", "PASS", "INCONCLUSIVE")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("recorded", [PASSED, UPDATED], ids=["passes", "update"])
def test_slow_drift_away_from_five_sessions_is_red_in_its_second_week(seed: int, recorded: tuple[Status, ...]) -> None:
    assert first_red(weeks(step=STEP, steady=5, recorded=recorded, seed=seed)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_slow_drift_from_the_first_session_on_is_red_by_the_fifth_week(seed: int) -> None:
    red = first_red(weeks(step=STEP, steady=1, recorded=PASSED, seed=seed))
    assert red is not None
    assert red <= 5


@pytest.mark.parametrize("seed", range(5))
def test_slow_drift_is_red_within_ten_weeks_even_if_undecided_runs_are_recorded(seed: int) -> None:
    red = first_red(weeks(step=STEP, steady=1, recorded=UPDATED, seed=seed))
    assert red is not None
    assert red < WEEKS


@pytest.mark.parametrize("seed", range(5))
def test_kernel_that_does_not_drift_is_never_red(seed: int) -> None:
    assert first_red(weeks(step=0.0, steady=1, recorded=UPDATED, seed=seed, last=30)) is None


def test_drift_that_carries_the_last_sessions_along_is_told_by_the_first_five() -> None:
    red = next(
        verdict for _, verdict in weeks(step=0.005, steady=5, recorded=PASSED, last=40) if verdict.status == "REGRESSED"
    )
    assert "since this epoch's first 5 sessions" in red.reason
    assert red.drift is not None
    assert red.change is not None
    assert red.drift > TOLERANCE > red.change


# pytest-benchmark itself, on a clock that says what the kernel takes

CLOCK = """
now_s = 0.0

def timer():
    return now_s
"""
BENCHMARK = """
import os
import slow_clock

def kernel():
    slow_clock.now_s += float(os.environ["KERNEL_S"])

def test_kernel(benchmark):
    benchmark.pedantic(kernel, rounds=5)
"""
#: Asking what CPU this is takes pytest-benchmark half a second.
CONFTEST = """
def pytest_benchmark_generate_machine_info():
    return {"cpu": {}}
"""
ROLLING = ("--benchmark-compare", "--benchmark-compare-fail=mean:5%")


@pytest.fixture
def benchmark_suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    pytester.syspathinsert()
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(slow_clock=textwrap.dedent(CLOCK), test_kernel=textwrap.dedent(BENCHMARK))
    return pytester


def benchmark_week(pytester: pytest.Pytester, kernel_s: float, *options: str) -> pytest.RunResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNEL_S", repr(kernel_s))
        quick = ("-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-p", "no:gpuperf")
        return pytester.runpytest_inprocess(
            *quick, "--benchmark-timer=slow_clock.timer", "--benchmark-autosave", *options
        )


def test_pytest_benchmark_compared_with_the_last_saved_run_misses_the_slow_drift(
    benchmark_suite: pytest.Pytester,
) -> None:
    saved = benchmark_week(benchmark_suite, 1e-3)
    assert saved.ret == pytest.ExitCode.OK
    for week in range(1, WEEKS + 1):
        result = benchmark_week(benchmark_suite, 1e-3 * (1 + STEP) ** week, *ROLLING)
        assert result.ret == pytest.ExitCode.OK, result.stdout.str()
        result.stdout.fnmatch_lines([f"test_kernel (*{week:04}_*) *", "test_kernel (*NOW*) *"])

    against_week_0 = benchmark_week(
        benchmark_suite, 1e-3 * (1 + STEP) ** WEEKS, "--benchmark-compare=0001", "--benchmark-compare-fail=mean:20%"
    )
    assert against_week_0.ret != pytest.ExitCode.OK
    against_week_0.stderr.fnmatch_lines(["*Performance has regressed:*", "*test_kernel*mean*21.899*"])


def test_pytest_benchmark_compared_with_the_last_saved_run_sees_a_step_beyond_its_limit(
    benchmark_suite: pytest.Pytester,
) -> None:
    benchmark_week(benchmark_suite, 1e-3)
    result = benchmark_week(benchmark_suite, 1.06e-3, *ROLLING)
    assert result.ret != pytest.ExitCode.OK
