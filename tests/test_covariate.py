"""What an anchor explains of a metric: the line, which sessions it is drawn through, and what it costs in certainty."""

import math
import random
from collections.abc import Sequence
from statistics import fmean, variance

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as oracle

from pytest_gpuperf.covariate import Adjusted, covariate
from pytest_gpuperf.judge import judge
from pytest_gpuperf.records import (
    BaselineRun,
    Environment,
    Hardware,
    Measurement,
    Method,
    MetricBaseline,
    Session,
    Verdict,
)
from pytest_gpuperf.units import Better

METHOD = Method(clock="cuda-events", mode="sustained")
ENVIRONMENT = Environment(hardware=Hardware(name="H100", memory_bytes=80_000_000_000))
#: Eight sessions whose anchor and metric go along with each other by 0.97.
XS = (0.00, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07)
YS = (0.001, 0.008, 0.022, 0.027, 0.046, 0.045, 0.066, 0.064)


def session(number: int, *logs: float, better: Better = "lower", run_id: str | None = None, **changes: str) -> Session:
    sign = 1 if better == "lower" else -1
    runs = tuple(BaselineRun(value=math.exp(sign * log), run_id=run_id or f"run-{number}") for log in logs)
    visit = changes.get("visit", f"visit-{number}")
    return Session(
        date="2026-11-21", visit=visit, devices=(changes.get("device", "gpu"),), environment="here", runs=runs
    )


def baseline(logs: Sequence[float], *, better: Better = "lower") -> MetricBaseline:
    return of_sessions(*(session(i, log, better=better) for i, log in enumerate(logs)), better=better)


def of_sessions(*sessions: Session, better: Better = "lower") -> MetricBaseline:
    unit = "s" if better == "lower" else "B/s"
    return MetricBaseline(unit=unit, better=better, kind="compute", method=METHOD, sessions=sessions)


def adjusted(
    ys: Sequence[float] = YS, xs: Sequence[float] = XS, *, y: float = 0.05, x: float = 0.05
) -> Adjusted | None:
    return covariate(baseline(ys), baseline(xs), math.exp(y), math.exp(x))


def means(found: Adjusted) -> list[float]:
    return [fmean(math.log(run.value) for run in one.runs) for one in found.baseline.sessions]


# The line


def test_slope_and_correlation_are_those_of_scipy() -> None:
    found = adjusted()
    line = oracle.linregress(XS, YS)
    assert found is not None
    assert found.slope == pytest.approx(line.slope)
    assert found.correlation == pytest.approx(line.rvalue)
    assert found.sessions == 8


def test_the_current_value_loses_what_the_anchor_explains() -> None:
    found = adjusted(y=0.05, x=0.05)
    line = oracle.linregress(XS, YS)
    assert found is not None
    assert math.log(found.value) == pytest.approx(0.05 - line.slope * (0.05 - fmean(XS)))
    assert found.value == pytest.approx(math.exp(0.05) * found.factor)


def test_the_sessions_keep_their_residuals_stretched_and_their_mean() -> None:
    found = adjusted(x=0.05)
    line = oracle.linregress(XS, YS)
    residuals = np.array(YS) - line.intercept - line.slope * np.array(XS)
    leverage = (0.05 - fmean(XS)) ** 2 / sum((x - fmean(XS)) ** 2 for x in XS)
    stretch = math.sqrt(7 / 6 * (1 + 1 / 8 + leverage) / (1 + 1 / 8))
    assert found is not None
    assert means(found) == pytest.approx(list(fmean(YS) + stretch * residuals))
    assert fmean(means(found)) == pytest.approx(fmean(YS))


@settings(max_examples=50, deadline=None)
@given(
    xs=st.lists(st.floats(-0.1, 0.1), min_size=8, max_size=20),
    slope=st.floats(0.2, 3.0),
    seed=st.integers(0, 1000),
    at=st.floats(-0.2, 0.2),
)
def test_the_prediction_error_of_the_sessions_is_that_of_the_regression(
    xs: list[float], slope: float, seed: int, at: float
) -> None:
    noise = random.Random(seed)
    ys = [slope * x + noise.gauss(0.0, 0.005) for x in xs]
    found = adjusted(ys, xs, x=at)
    if found is None:
        return
    n, line = len(xs), oracle.linregress(xs, ys)
    squares = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = sum((x - fmean(xs)) ** 2 for x in xs)
    wanted = squares / (n - 2) * (1 + 1 / n + (at - fmean(xs)) ** 2 / spread)
    assert variance(means(found)) * (1 + 1 / n) == pytest.approx(wanted, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(slope=st.floats(0.1, 3.0), x=st.floats(-0.1, 0.1), change=st.floats(-0.2, 0.2))
def test_a_change_of_the_metric_alone_is_kept_in_full(slope: float, x: float, change: float) -> None:
    found = adjusted([slope * each for each in XS], y=slope * x + change, x=x)
    assert found is not None
    assert math.log(found.value) - fmean(means(found)) == pytest.approx(change, abs=1e-9)


def test_runs_of_a_session_keep_their_distances() -> None:
    pairs = [session(i, log - 0.001, log + 0.002) for i, log in enumerate(YS)]
    found = covariate(of_sessions(*pairs), baseline(XS), 1.0, 1.0)
    assert found is not None
    for one in found.baseline.sessions:
        low, high = (math.log(run.value) for run in one.runs)
        assert high - low == pytest.approx(0.003)


def test_a_rate_and_a_time_that_are_slow_together_are_correlated_positively() -> None:
    rates = covariate(baseline(YS, better="higher"), baseline(XS), math.exp(-0.05), math.exp(0.05))
    times = adjusted(y=0.05, x=0.05)
    assert rates is not None
    assert times is not None
    assert rates.correlation == pytest.approx(times.correlation)
    assert rates.value == pytest.approx(1 / times.value)
    assert rates.baseline.better == "higher"


# When there is none


def test_seven_sessions_are_too_few() -> None:
    assert adjusted(YS[:7], XS[:7]) is None


def test_sessions_of_one_visit_are_one() -> None:
    again = session(8, 0.02, visit="visit-2")
    assert covariate(of_sessions(*baseline(YS[:7]).sessions, again), baseline(XS[:7]), 1.0, 1.0) is None


def test_sessions_without_the_anchor_are_left_out() -> None:
    found = covariate(baseline([*YS, 0.5, 0.6]), baseline(XS), 1.0, 1.0)
    assert found is not None
    assert (found.sessions, len(found.baseline.sessions)) == (8, 8)
    assert found.correlation == pytest.approx(oracle.pearsonr(XS, YS).statistic)


@pytest.mark.parametrize(("noise", "is_used"), [(0.017, True), (0.0175, False)])
def test_a_correlation_of_four_fifths_is_needed(noise: float, is_used: bool) -> None:
    ys = [x + noise * sign for x, sign in zip(XS, (1, -1, 1, -1, -1, 1, -1, 1), strict=True)]
    correlation = oracle.pearsonr(XS, ys).statistic
    assert (correlation >= 0.8) == is_used
    assert (adjusted(ys) is not None) == is_used


def test_a_metric_that_is_slow_when_the_anchor_is_fast_is_not_corrected() -> None:
    assert adjusted([-y for y in YS]) is None


@pytest.mark.parametrize(("ys", "xs"), [(YS, (0.01,) * 8), ((0.01,) * 8, XS), ((0.01,) * 8, (0.01,) * 8)])
def test_what_never_varied_explains_nothing(ys: Sequence[float], xs: Sequence[float]) -> None:
    assert adjusted(ys, xs) is None


# Which session belongs to which


def test_sessions_are_matched_by_run_before_visit() -> None:
    anchors = of_sessions(*(session(i, x, run_id=f"run-{7 - i}") for i, x in enumerate(XS)))
    assert covariate(baseline(YS), anchors, 1.0, 1.0) is None  # slow with fast, once the runs are put together


def test_sessions_of_another_device_do_not_match() -> None:
    anchors = of_sessions(*(session(i, x, device="other") for i, x in enumerate(XS)))
    assert covariate(baseline(YS), anchors, 1.0, 1.0) is None


def test_sessions_without_run_ids_are_matched_by_visit() -> None:
    bare = [
        msgspec.structs.replace(one, runs=tuple(BaselineRun(value=r.value) for r in one.runs))
        for one in baseline(XS).sessions
    ]
    found = covariate(baseline(YS), of_sessions(*bare), 1.0, 1.0)
    assert found is not None
    assert found.sessions == 8


# Judged


def judged(metric: MetricBaseline, value: float) -> Verdict:
    run = Measurement(metric="time", value=value, unit="s", better="lower", kind="compute", method=METHOD)
    return judge(
        [run],
        metric,
        environments={"here": ENVIRONMENT},
        environment=ENVIRONMENT,
        devices=("gpu",),
        visit="new",
    )


def test_the_judge_takes_what_is_corrected_as_it_is() -> None:
    xs = [0.02 * number for number in range(8)]
    slow_machine = 0.20
    metric = baseline([x + 0.0005 * sign for x, sign in zip(xs, (1, -1, 1, -1, -1, 1, -1, 1), strict=True)])
    plain = judged(metric, math.exp(slow_machine))
    found = covariate(metric, baseline(xs), math.exp(slow_machine), math.exp(slow_machine))
    assert found is not None
    assert plain.change is not None
    assert plain.change > 0.1
    corrected = judged(found.baseline, found.value)
    assert corrected.change == pytest.approx(0.0, abs=1e-3)
    assert judged(found.baseline, math.exp(0.1 + slow_machine) * found.factor).status == "REGRESSED"


def test_the_correction_is_told_in_words() -> None:
    found = adjusted()
    assert found is not None
    assert msgspec.structs.replace(found, anchor="gemm").words == (
        "corrected by the anchor gemm (correlation 0.98 over 8 sessions, slope 0.97, which costs one degree of freedom)"
    )


def test_independent_noise_passes_for_a_covariate_once_in_a_hundred() -> None:
    noise = random.Random(0)
    trials = 3000
    adopted = sum(
        adjusted([noise.gauss(0, 0.01) for _ in XS], [noise.gauss(0, 0.01) for _ in XS]) is not None
        for _ in range(trials)
    )
    exact = oracle.t.sf(0.8 * math.sqrt(6 / (1 - 0.64)), 6)
    assert exact == pytest.approx(0.0086, abs=1e-4)
    assert adopted / trials == pytest.approx(exact, abs=4 * math.sqrt(exact / trials))
