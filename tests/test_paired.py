"""Statistics of pairs against scipy and by hand, and what of two runs may be compared."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy import stats

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.priors import prior_of
from pytest_gpuperf.records import (
    SCHEMA,
    Curve,
    Environment,
    Hardware,
    Measurement,
    Method,
    Results,
    RunEnd,
    RunInfo,
    Telemetry,
    TestKey,
    TestRecord,
)
from pytest_gpuperf.trials.paired import ALPHA, Metric, Pair, Paired, alpha_of_look, compare, compare_pairs, looks

MARGIN = math.log1p(0.03)
LOGS = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=12)


def paired(base: Sequence[float], head: Sequence[float], **changes: Any) -> Paired:
    values: dict[str, Any] = {"margin": MARGIN, "alpha": ALPHA, "prior_sd": 0.01, "prior_dof": 2.0, **changes}
    return compare_pairs(base, head, **values)


def measurement(value: float = 1e-3, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "metric": "time",
        "value": value,
        "unit": "s",
        "better": "lower",
        "kind": "end-to-end",
        "method": Method(clock="wall", mode="recorded"),
        "tolerance": 0.03,
    }
    return Measurement(**{**values, **changes})


def record(*measurements: Measurement, **changes: Any) -> TestRecord:
    values: dict[str, Any] = {
        "key": TestKey(module="test_a.py", test="test_kernel"),
        "slug": "h100",
        "devices": ("aaaa",),
        "environment": Environment(hardware=Hardware(name="H100", memory_bytes=80 * 10**9), versions={"torch": "2.10"}),
        "measurements": measurements,
        "verdicts": (),
    }
    return TestRecord(**{**values, **changes})


def results(*records: TestRecord, seen: tuple[str, ...] = ()) -> Results:
    return Results(
        run=RunInfo(schema=SCHEMA, run_id="r", date="2026-11-21", visit="v"),
        tests=records,
        end=RunEnd(tests=(*seen, *(str(one.key) for one in records)), is_whole=True),
    )


def timed(value: float) -> Results:
    return results(record(measurement(value)))


def pairs_of(base: Sequence[Results], head: Sequence[Results]) -> list[Pair]:
    return [Pair(number=i, base=b, head=h) for i, (b, h) in enumerate(zip(base, head, strict=True), start=1)]


def the_metric(base: Sequence[Results], head: Sequence[Results], **changes: Any) -> Metric:
    (metric,) = compare(pairs_of(base, head), alpha=ALPHA, **changes)
    return metric


# When to look, and what a look may spend


def test_every_second_pair_from_the_third_is_looked_at_and_the_last() -> None:
    assert (looks(7), looks(8), looks(3), looks(2)) == ((3, 5, 7), (3, 5, 7, 8), (3,), (2,))


@given(st.integers(2, 60))
def test_all_looks_together_spend_the_whole_chance_of_a_false_slower(pairs: int) -> None:
    spent = [alpha_of_look(look, pairs) for look in looks(pairs)]
    assert sum(spent) == pytest.approx(ALPHA)
    assert min(spent) > 0


@given(st.integers(2, 20), st.data())
def test_an_early_end_spends_what_the_looks_before_it_left(pairs: int, data: st.DataObject) -> None:
    end = data.draw(st.integers(1, pairs))
    before = [alpha_of_look(look, pairs) for look in looks(pairs) if look < end]
    assert sum(before) + alpha_of_look(end, pairs, is_last=True) == pytest.approx(ALPHA)


# The interval


def test_the_interval_is_the_narrower_one_of_two_by_scipy() -> None:
    rng = np.random.default_rng(4)
    base, head = rng.normal(0, 0.02, 7), rng.normal(0.05, 0.02, 7)

    found = paired(base.tolist(), head.tolist(), prior_dof=0.0)

    differences = head - base
    alone = stats.t.ppf(1 - 0.025 * 0.2, 6) * stats.sem(differences)
    # all 14 runs on side, place and a constant: what is left has 14 - 3 degrees of freedom
    place = np.tile(np.arange(7), 2)
    side = np.repeat([0.0, 1.0], 7)
    design = np.column_stack([np.ones(14), place, side])
    _, residual, _, _ = np.linalg.lstsq(design, np.concatenate([base, head]), rcond=None)
    together = stats.t.ppf(1 - 0.025 * 0.8, 11) * math.sqrt(2 * residual[0] / 11 / 7)
    half = min(alone, together)
    assert math.log1p(found.change) == pytest.approx(differences.mean())
    assert math.log1p(found.change_low) == pytest.approx(differences.mean() - half)
    assert math.log1p(found.change_high) == pytest.approx(differences.mean() + half)


def test_the_prior_is_averaged_in_by_its_degrees_of_freedom() -> None:
    # three equal differences and sums on a line: own variance 0 with 2 and 3 degrees of freedom; prior 0.02 worth 4
    found = paired([0.0, 0.1, 0.2], [0.01, 0.11, 0.21], prior_sd=0.02, prior_dof=4.0)

    alone = stats.t.ppf(1 - 0.005, 6) * math.sqrt(2 * 4 * 0.02**2 / 6 / 3)
    together = stats.t.ppf(1 - 0.02, 7) * math.sqrt(2 * 4 * 0.02**2 / 7 / 3)
    assert math.log1p(found.change_high) == pytest.approx(0.01 + min(alone, together))


def test_a_single_pair_is_judged_by_the_prior_alone() -> None:
    found = paired([0.0], [0.01], prior_sd=0.02, prior_dof=4.0)
    half = min(stats.t.ppf(1 - 0.005, 4), stats.t.ppf(1 - 0.02, 4)) * math.sqrt(2) * 0.02
    assert math.log1p(found.change_high) == pytest.approx(0.01 + half)


def test_the_spread_within_runs_widens_an_interval_that_is_narrower() -> None:
    narrow, wide = (paired([0.0] * 5, [0.0] * 5, prior_sd=1e-4, least_sd=sd) for sd in (0.0, 0.02))
    assert wide.change_high > 10 * narrow.change_high


def test_without_pairs_there_is_no_difference() -> None:
    with pytest.raises(MeasurementError, match="No pairs"):
        paired([], [])


@given(LOGS)
def test_swapping_the_sides_mirrors_everything(rows: list[tuple[float, float]]) -> None:
    base, head = [row[0] for row in rows], [row[1] for row in rows]
    one, other = paired(base, head), paired(head, base)
    assert math.log1p(one.change) == pytest.approx(-math.log1p(other.change), abs=1e-12)
    assert math.log1p(one.change_low) == pytest.approx(-math.log1p(other.change_high), abs=1e-12)
    assert (one.decision == "SLOWER") == (other.decision == "FASTER")
    assert (one.decision == "SAME") == (other.decision == "SAME")


@given(LOGS, st.lists(st.floats(-1, 1), min_size=12, max_size=12))
def test_what_pairs_share_cannot_widen_the_interval_beyond_what_the_differences_say(
    rows: list[tuple[float, float]], shared: list[float]
) -> None:
    base, head = [row[0] for row in rows], [row[1] for row in rows]
    found = paired(
        [a + b for a, b in zip(base, shared, strict=False)], [a + b for a, b in zip(head, shared, strict=False)]
    )
    differences = np.array(head) - np.array(base)
    freedom = len(rows) - 1 + 2
    variance = (((differences - differences.mean()) ** 2).sum() / 2 + 2 * 0.01**2) / freedom
    most = stats.t.ppf(1 - 0.005, freedom) * math.sqrt(2 * variance / len(rows))
    assert math.log1p(found.change_high) - math.log1p(found.change) <= most * (1 + 1e-9)


# The decision


@pytest.mark.parametrize(
    ("change", "noise", "decision"),
    [
        (0.10, 0.001, "SLOWER"),
        (0.02, 0.001, "SAME"),  # slower for certain, and less than the tolerance of 3 %
        (0.0, 0.001, "SAME"),
        (-0.10, 0.001, "FASTER"),
        (-0.025, 0.02, "NOT SLOWER"),
        (0.10, 0.3, "UNDECIDED"),
        (0.0, 0.1, "UNDECIDED"),
    ],
)
def test_decisions(change: float, noise: float, decision: str) -> None:
    base = [0.0] * 7
    head = [math.log1p(change) + noise * step for step in (-1, 1, -1, 1, -1, 1, 0)]
    found = paired(base, head, prior_sd=noise)
    assert found.decision == decision
    assert found.is_decided == (decision in ("SLOWER", "FASTER", "SAME"))


def decisions_in_serving_noise(slowdown: float, repetitions: int) -> Counter[str]:
    """What seven pairs end with: processes differ by 1.5 %, means of 30 iterations by 3 % / sqrt(30)."""
    rng = random.Random(7)
    deviation = math.hypot(0.015, 0.03 / math.sqrt(30))
    ends: Counter[str] = Counter()
    for _ in range(repetitions):
        base = [rng.gauss(0, deviation) for _ in range(7)]
        head = [rng.gauss(math.log1p(slowdown), deviation) for _ in range(7)]
        for look in looks(7):
            found = paired(base[:look], head[:look], alpha=alpha_of_look(look, 7), prior_sd=0.015)
            if found.is_decided:
                break
        ends[found.decision] += 1
    return ends


def test_unchanged_code_in_serving_noise_is_not_called_slower() -> None:
    assert decisions_in_serving_noise(0.0, 4000)["SLOWER"] <= 4  # 0.013 % of 4000 is 0.5


def test_five_percent_in_serving_noise_is_caught_nine_times_in_ten() -> None:
    assert decisions_in_serving_noise(0.05, 2000)["SLOWER"] / 2000 > 0.88  # 90.4 %, standard error 0.7 %


# What of two runs may be compared


def test_values_are_means_over_the_pairs_and_more_time_is_worse() -> None:
    metric = the_metric([timed(1e-3), timed(1.01e-3)], [timed(1.1e-3), timed(1.111e-3)])
    assert metric.paired is not None
    assert metric.paired.change == pytest.approx(0.1)
    assert metric.base_value == pytest.approx(math.sqrt(1e-3 * 1.01e-3))
    assert metric.head_value == pytest.approx(math.sqrt(1.1e-3 * 1.111e-3))


def curve(*values: float) -> Results:
    points = {str(2**i): value for i, value in enumerate(values)}
    return results(
        record(
            measurement(
                math.prod(values) ** (1 / len(values)),
                curve=Curve(x="batch size", points=points),
                method=Method(clock="wall", mode="curve"),
            )
        )
    )


def test_curves_are_compared_at_the_sizes_that_all_runs_have() -> None:
    metric = the_metric([curve(1.0, 2.0, 8.0)] * 3, [curve(1.0, 2.0)] * 3)
    assert metric.paired is not None
    assert metric.paired.change == pytest.approx(0.0)
    assert (metric.base_value, metric.head_value) == pytest.approx((math.sqrt(2.0), math.sqrt(2.0)))


def test_less_of_a_rate_is_worse() -> None:
    base, head = ([results(record(measurement(value, unit="tok/s", better="higher")))] * 3 for value in (1000.0, 800.0))
    metric = the_metric(base, head)
    assert metric.paired is not None
    assert metric.paired.change == pytest.approx(0.25)
    assert metric.head_value == pytest.approx(800.0)
    assert metric.paired.decision == "SLOWER"


def test_the_prior_is_that_of_the_kind() -> None:
    prior = prior_of("compute", is_cpu=False)
    runs = [results(record(measurement(1e-3, kind="compute")))] * 3
    expected = paired([0.0] * 3, [0.0] * 3, prior_sd=prior.within.deviation, prior_dof=prior.within.worth)
    found = the_metric(runs, runs).paired
    assert found is not None
    assert found.change_high == pytest.approx(expected.change_high)


def test_on_a_cpu_the_prior_is_the_cpus() -> None:
    cpu = Environment(hardware=Hardware(name="Xeon"))
    on_cpu = [results(record(measurement(), environment=cpu))] * 3
    on_gpu = [results(record(measurement()))] * 3
    one, other = the_metric(on_cpu, on_cpu).paired, the_metric(on_gpu, on_gpu).paired
    assert one is not None
    assert other is not None
    assert one.change_high > other.change_high


@pytest.mark.parametrize(
    ("own", "given_tolerance", "expected"), [(0.03, None, 0.03), (None, None, 0.05), (0.03, 0.01, 0.01)]
)
def test_the_tolerance_is_the_given_one_or_the_tests_own_or_that_of_the_kind(
    own: float | None, given_tolerance: float | None, expected: float
) -> None:
    runs = [results(record(measurement(1e-3, tolerance=own)))] * 3
    assert the_metric(runs, runs, tolerance=given_tolerance).tolerance == expected


def test_the_spread_within_runs_counts() -> None:
    sure, unsure = ([results(record(measurement(1e-3, spread=spread)))] * 3 for spread in (0.001, 0.2))
    one, other = the_metric(sure, sure).paired, the_metric(unsure, unsure).paired
    assert one is not None
    assert other is not None
    assert other.change_high > 3 * one.change_high


RECORDED = "s, lower is better, recorded, wall"
HOT = Telemetry(duration_s=1.0, hw_thermal_share=0.5)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(measurement(telemetry=HOT)), "pair 2: HEAD: thermal slowdown by the hardware for 50 % of the time"),
        (record(measurement(), devices=("bbbb",)), "pair 2: BASE ran on device aaaa, HEAD on bbbb"),
        (record(measurement(0.0)), "pair 2: HEAD: measured 0 s, and only values above 0 can be compared"),
        (
            record(measurement(method=Method(clock="cuda-graph", mode="hot"))),
            f"pair 2: measured differently, BASE {RECORDED}; HEAD s, lower is better, hot, cuda-graph",
        ),
        (record(measurement(), passed=False), "pair 2: not measured by HEAD, the test failed there"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_dropped_with_its_reason(bad: TestRecord, reason: str) -> None:
    metric = the_metric([timed(1e-3)] * 3, [timed(1e-3), results(bad), timed(1e-3)])
    assert metric.dropped == (reason,)
    assert metric.paired is not None
    assert metric.paired.pairs == 2


def test_a_run_at_a_far_lower_clock_than_the_others_is_dropped() -> None:
    def at(clock_mhz: float) -> Results:
        return results(record(measurement(telemetry=Telemetry(duration_s=1.0, sm_clock_mhz=clock_mhz))))

    metric = the_metric([at(1900), at(900), at(1900)], [at(1900)] * 3)
    assert metric.dropped == ("pair 2: BASE: the SM clock was 900 MHz, 1733 MHz on average",)


def test_a_metric_without_a_pair_that_counts_has_no_decision() -> None:
    metric = the_metric([results(record(measurement(), devices=("bbbb",)))] * 3, [timed(1e-3)] * 3)
    assert metric.paired is None
    assert len(metric.dropped) == 3


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (results(), "there is no such test"),
        (results(seen=("test_a.py::test_kernel",)), "the test was skipped or failed there"),
        (results(record(measurement(), passed=False)), "the test failed there"),
        (results(record(measurement(metric="throughput"))), "the test does not record it there"),
    ],
)
def test_a_metric_of_one_side_says_which_and_what_is_known_of_the_other(other: Results, why: str) -> None:
    for only_in, base, head in (("BASE", timed(1e-3), other), ("HEAD", other, timed(1e-3))):
        found = {metric.metric: metric for metric in compare(pairs_of([base], [head]), alpha=ALPHA)}
        assert (found["time"].only_in, found["time"].why_only, found["time"].paired) == (only_in, why, None)


def test_metrics_are_told_apart_by_test_and_name() -> None:
    other = replace(record(measurement()), key=TestKey(module="test_a.py", test="test_other"))
    run = results(record(measurement(), measurement(2.0, metric="latency")), other)
    names = [(metric.key.test, metric.metric) for metric in compare(pairs_of([run], [run]), alpha=ALPHA)]
    assert names == [("test_kernel", "time"), ("test_kernel", "latency"), ("test_other", "time")]


def test_without_pairs_there_are_no_metrics() -> None:
    assert compare([], alpha=ALPHA) == ()
