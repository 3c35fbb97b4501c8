"""Two results files: the judge's verdicts in words, what cannot be compared, and what only one of them has."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from test_analysis_history import COLD, H100, measurement, record, results

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.priors import package_priors
from pytest_gpuperf.records import Environment, Hardware, Rerun, Results, Telemetry
from pytest_gpuperf.report.compare import Comparison, compare, compare_lines
from pytest_gpuperf.stats import t_quantile

NAME = "perf_tests/test_bandwidth.py::test_copy time"


def one(number: int, value: float = 1e-3, *, environment: Environment | None = None, **changes: Any) -> Results:
    here = environment or Environment(hardware=H100)
    return results(number, record(measurement(value, **{"kind": "compute", **changes}), environment=here))


def lines_of(found: Comparison, *, width: int = 100) -> list[str]:
    return [line.text for line in compare_lines(found, ("a.jsonl", "b.jsonl"), width=width)]


@pytest.mark.parametrize(
    ("value", "outcome", "words"),
    [
        (1.1e-3, "worse", "slower"),
        (0.9e-3, "better", "faster"),
        (1.001e-3, "same", "same within 3.0 %"),
        (0.98e-3, "not worse", "not slower"),
        (1.025e-3, "undecided", "undecided, sees "),
    ],
)
def test_change_is_one_word_and_an_interval(value: float, outcome: str, words: str) -> None:
    found = compare(one(0), one(1, value))
    assert [row.outcome for row in found.rows] == [outcome]
    row = lines_of(found, width=140)[2]
    assert row.startswith(f"{NAME} ")
    assert f"  {words}" in row
    assert len(row) == 140


def test_noise_that_hides_the_tolerance_settles_nothing() -> None:
    (row,) = compare(one(0, kind="host"), one(1, kind="host", tolerance=0.03)).rows
    assert row.verdict is not None
    assert (row.verdict.status, row.verdict.is_low_power) == ("PASS", True)
    assert row.outcome == "undecided"


def test_interval_is_that_of_one_session_against_another() -> None:
    (row,) = compare(one(0), one(1, 1.1e-3)).rows
    assert row.verdict is not None
    prior = package_priors()["compute"]
    error = math.sqrt(2 * (prior.session.deviation**2 + prior.within.deviation**2))
    assert row.verdict.change == pytest.approx(0.1)
    half = math.log1p(row.verdict.change_high or 0.0) - math.log(1.1)
    assert half == pytest.approx(t_quantile(0.975, 10) * error, rel=0.35)  # the degrees of freedom are the judge's


def test_runs_of_one_visit_share_what_it_does_to_them() -> None:
    def width(b: Results) -> float:
        (row,) = compare(one(0), b).rows
        assert row.verdict is not None
        return (row.verdict.change_high or 0.0) - (row.verdict.change_low or 0.0)

    b = one(1)
    assert width(replace(b, run=replace(b.run, visit="visit0"))) < width(b)


@pytest.mark.parametrize(
    ("values", "is_worse", "is_settled"),
    [((1.0, 1.1), True, True), ((1.0, 1.0), False, True), ((1.0, 1.025), False, False), ((1.1, 1.025), True, False)],
)
def test_outcome_of_the_whole_is_the_worst(values: tuple[float, ...], is_worse: bool, is_settled: bool) -> None:
    b = results(1, *(record(measurement(value, kind="compute"), test=f"test_{i}") for i, value in enumerate(values)))
    a = results(0, *(record(measurement(1.0), test=f"test_{i}") for i in range(2)))
    found = compare(a, b)
    assert (found.has_worse, found.is_settled) == (is_worse, is_settled)


def test_metrics_in_one_file_alone_are_listed() -> None:
    found = compare(results(0, record(), record(test="test_old")), results(1, record(), record(test="test_new")))
    assert lines_of(found)[-2:] == [
        "only in A: perf_tests/test_bandwidth.py::test_old time",
        "only in B: perf_tests/test_bandwidth.py::test_new time",
    ]
    assert found.is_settled


def test_files_without_a_common_metric_settle_nothing() -> None:
    found = compare(results(0), results(1, record(test="test_new")))
    assert lines_of(found)[-1] == "No metric is in both files."
    assert not found.is_settled


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unit": "B"}, "unit B, baseline s"),
        ({"method": replace(COLD, mode="hot")}, "method hot, cuda-events, baseline cold, cuda-events"),
        ({"better": "higher"}, "higher is better, baseline lower"),
    ],
)
def test_another_identity_is_not_comparable(changes: dict[str, Any], reason: str) -> None:
    found = compare(one(0), one(1, **changes))
    assert f"Not comparable: {reason}." in lines_of(found, width=200)[2]
    assert not found.is_settled


def test_another_gpu_is_not_comparable_and_named_once() -> None:
    l4 = Environment(hardware=Hardware(name="NVIDIA L4", memory_bytes=24 * 10**9, power_limit_w=72.0))
    lines = lines_of(compare(one(0), one(1, 3e-3, environment=l4)))
    assert lines[2] == "Hardware: NVIDIA H100 80GB HBM3, 85.52 GB -> NVIDIA L4, 24.00 GB, 72 W"
    assert "Not comparable: device NVIDIA L4, baseline NVIDIA H100 80GB HBM3" in lines[4]


def test_across_gpus_there_are_ratios_and_no_verdict() -> None:
    l4 = Environment(hardware=Hardware(name="NVIDIA L4", count=2, is_mig=True))
    found = compare(one(0), one(1, 4e-3, environment=l4), across=True)
    assert lines_of(found)[2] == "Hardware: NVIDIA H100 80GB HBM3, 85.52 GB -> 2 x NVIDIA L4 (MIG)"
    assert lines_of(found)[3].endswith("0.250 x")
    assert (found.has_worse, found.is_settled) == (False, True)


def test_ratio_of_a_rate_is_above_one_where_it_is_larger() -> None:
    rate: dict[str, Any] = {"unit": "B/s", "better": "higher"}
    (row,) = compare(one(0, 1e12, **rate), one(1, 2e12, **rate), across=True).rows
    assert row.ratio == pytest.approx(2.0)


def test_ratio_of_different_units_is_refused() -> None:
    found = compare(one(0), one(1, unit="B"), across=True)
    assert "Not comparable: unit B (lower is better), baseline s (lower is better)." in lines_of(found, width=200)[2]


def test_versions_that_differ_are_named_once() -> None:
    a, b = (Environment(hardware=H100, versions={"torch": version}) for version in ("2.10.0", "2.11.0"))
    tests = [record(test=f"test_{i}") for i in range(2)]
    found = compare(
        results(0, *(replace(test, environment=a) for test in tests)),
        results(1, *(replace(test, environment=b) for test in tests)),
    )
    assert lines_of(found)[2:3] == ["Versions: torch 2.10.0 -> 2.11.0"]


@pytest.mark.parametrize(("side", "name"), [(0, "A"), (1, "B")])
def test_unwell_device_on_either_side_is_invalid(side: int, name: str) -> None:
    hot = Telemetry(duration_s=1.0, hw_thermal_share=0.5)
    a, b = (one(i, telemetry=hot if i == side else None) for i in range(2))
    found = compare(a, b)
    assert f"invalid: {name}: thermal slowdown by the hardware for 50 % of the time" in lines_of(found, width=200)[2]
    assert not found.is_settled


def test_fresh_processes_replace_the_run_that_was_repeated() -> None:
    more = tuple(Rerun(measurements=(measurement(1e-3),), duration_s=1.0) for _ in range(2))
    repeated = results(2, record(measurement(2e-3, kind="compute"), more=more))
    for a, b in ((one(0), repeated), (repeated, one(0))):
        (row,) = compare(a, b).rows
        assert row.outcome == "same"
        assert (row.a, row.b) == pytest.approx((1e-3, 1e-3))


def test_test_that_ran_twice_counts_with_its_last_run() -> None:
    twice = results(1, record(measurement(2e-3)), record(measurement(1e-3)))
    assert [row.b for row in compare(one(0), twice).rows] == pytest.approx([1e-3])


def test_run_against_itself_is_refused() -> None:
    with pytest.raises(UsageError, match=r"A and B are the same run, run0\. Keep the results of each run with --gpu"):
        compare(one(0), one(0))


def test_long_name_stands_on_a_line_of_its_own() -> None:
    lines = lines_of(compare(one(0), one(1)), width=80)
    assert lines[2] == NAME
    assert len(lines[3]) <= 80


def test_undecided_metrics_point_to_the_command_that_can_tell() -> None:
    lines = lines_of(compare(one(0), one(1, 1.025e-3)))
    assert lines[-1] == "Undecided: one run each says little. In pairs on one GPU:  gpuperf ab BASE HEAD"


@given(a=st.floats(1e-6, 1.0), b=st.floats(1e-6, 1.0))
@settings(max_examples=40, deadline=None)
def test_ratios_of_both_directions_are_inverse(a: float, b: float) -> None:
    (there,), (back,) = (
        compare(one(0, a), one(1, b), across=True).rows,
        compare(one(0, b), one(1, a), across=True).rows,
    )
    assert there.ratio * back.ratio == pytest.approx(1.0)
