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
from pytest_gpuperf.records import Curve, Environment, Hardware, Method, Rerun, Results, Telemetry, TestRecord
from pytest_gpuperf.report.compare import Comparison, Pair, compare, compare_lines
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


# Configurations, curves, and pairs


def tokens(value: float, parameters: str = "llama-3-8b", **configuration: str) -> TestRecord:
    rate = measurement(value, "throughput", unit="tok/s", better="higher", kind="compute")
    return record(replace(rate, configuration=configuration or None), test=f"test_llm[{parameters}]")


def test_tuned_against_default_has_an_interval_and_what_was_set_differently() -> None:
    default = results(0, tokens(1000.0, model="llama-3-8b", max_num_seqs="256"))
    tuned = results(1, tokens(1500.0, model="llama-3-8b", max_num_seqs="1024", chunked="yes"))
    found = compare(default, tuned)
    assert found.configuration == ("chunked - -> yes", "max_num_seqs 256 -> 1024")
    assert lines_of(found)[2] == "Configuration: chunked - -> yes; max_num_seqs 256 -> 1024"
    (row,) = found.rows
    assert row.outcome == "better"
    assert row.verdict is not None
    assert row.verdict.change == pytest.approx(-1 / 3)
    assert row.verdict.change_low is not None


@pytest.mark.parametrize("other", [{}, {"max_num_seqs": "256"}])
def test_configuration_that_is_unknown_or_the_same_is_not_listed(other: dict[str, str]) -> None:
    found = compare(results(0, tokens(1000.0, max_num_seqs="256")), results(1, tokens(1000.0, **other)))
    assert found.configuration == ()
    assert not any(line.startswith("Configuration") for line in lines_of(found))


def test_other_gpu_points_to_the_option_that_gives_ratios() -> None:
    l4 = Environment(hardware=Hardware(name="NVIDIA L4"))
    hint = "How many times as good B is, whatever each ran on:  gpuperf compare --across A B"
    assert lines_of(compare(one(0), one(1, environment=l4)))[-1] == hint
    assert hint not in lines_of(compare(one(0), one(1, environment=l4), across=True))
    assert hint not in lines_of(compare(one(0), one(1, unit="B")))


def batches(value: float, **points: float) -> TestRecord:
    curve = Curve(x="batch size", points={name.removeprefix("at_"): rate for name, rate in points.items()})
    method = Method(clock="wall", mode="curve")
    rate = measurement(value, "throughput", unit="tok/s", better="higher", kind="compute", method=method)
    return record(replace(rate, curve=curve), test="test_batch")


@pytest.mark.parametrize("across", [False, True])
def test_curves_are_compared_at_the_sizes_of_both(*, across: bool) -> None:
    a = results(0, batches(500.0, at_1=100.0, at_8=500.0, at_64=2500.0))
    b = results(1, batches(300.0, at_1=110.0, at_8=1000.0))
    found = compare(a, b, across=across)
    (row,) = found.rows
    assert (row.a, row.b) == pytest.approx((math.sqrt(100 * 500), math.sqrt(110 * 1000)))
    assert row.ratio == pytest.approx(math.sqrt(1.1 * 2))
    assert "    by batch size: 1: 1.100 x, 8: 2.000 x" in lines_of(found)


def test_verdict_on_two_curves_is_on_the_sizes_of_both() -> None:
    a = results(0, batches(500.0, at_1=100.0, at_8=500.0, at_64=2500.0))
    b = results(1, batches(223.6, at_1=100.0, at_8=500.0))
    (row,) = compare(a, b).rows
    assert row.verdict is not None
    assert row.outcome == "same"
    assert row.verdict.change == pytest.approx(0.0)
    assert "    best at batch size 8: 500.0 tok/s" in lines_of(compare(a, b))


@pytest.mark.parametrize("across", [False, True])
def test_curves_without_a_common_size_are_not_comparable(*, across: bool) -> None:
    found = compare(results(0, batches(100.0, at_1=100.0)), results(1, batches(500.0, at_8=500.0)), across=across)
    assert [row.outcome for row in found.rows] == ["not comparable"]


@pytest.mark.parametrize(("then", "outcome"), [(0.5, "host"), (0.97, "worse")])
def test_metric_that_the_host_limits_in_both_is_not_called_worse(then: float, outcome: str) -> None:
    found = compare(one(0, kind="end-to-end", gpu_busy_share=then), one(1, 3e-3, kind="end-to-end", gpu_busy_share=0.5))
    assert [row.outcome for row in found.rows] == [outcome]
    assert found.has_worse == (outcome == "worse")
    assert found.is_settled
    text = "\n".join(lines_of(found))
    assert "limited by the host: GPU busy 50 % of the time" in text


def models(number: int) -> Results:
    return results(
        number,
        tokens(1000.0, "llama-3-8b-bf16", model="llama-3-8b"),
        tokens(1200.0, "qwen2.5-7b-bf16", model="qwen2.5-7b"),
        tokens(10.0, "tiny-bf16", model="tiny"),
    )


@pytest.mark.parametrize("other", [0, 1])
def test_models_of_one_run_or_of_two_stand_side_by_side(other: int) -> None:
    found = compare(models(0), models(other), pairs=[Pair(a="llama-3-8b", b="qwen2.5-7b")])
    (row,) = found.rows
    assert row.name == "perf_tests/test_bandwidth.py::test_llm[qwen2.5-7b-bf16] throughput"
    assert (row.a, row.b) == pytest.approx((1000.0, 1200.0))
    assert found.configuration == ("model llama-3-8b -> qwen2.5-7b",)
    assert (found.only_a, found.only_b) == ((), ())


def test_several_pairs_are_compared_at_once() -> None:
    pairs = [Pair(a="llama-3-8b", b="qwen2.5-7b"), Pair(a="qwen2.5-7b", b="tiny")]
    rows = compare(models(0), models(0), pairs=pairs).rows
    assert [row.a for row in rows] == pytest.approx([1000.0, 1200.0])
    assert [row.b for row in rows] == pytest.approx([1200.0, 10.0])


def test_counterpart_that_is_missing_is_listed() -> None:
    a = results(0, tokens(1000.0, "llama-3-8b-bf16"), tokens(1000.0, "llama-3-8b-fp8"))
    b = results(1, tokens(1200.0, "gpt2-bf16"), tokens(1200.0, "gpt2-int8"))
    found = compare(a, b, pairs=[Pair(a="llama-3-8b", b="gpt2")])
    assert found.only_a == ("perf_tests/test_bandwidth.py::test_llm[llama-3-8b-fp8] throughput",)
    assert found.only_b == ("perf_tests/test_bandwidth.py::test_llm[gpt2-int8] throughput",)


@pytest.mark.parametrize("test", ["test_llm", "test_llama[gpt2]", "test_llm[llama-3-8b.1]", "test_llm[xllama-3-8b]"])
def test_parameter_is_found_as_a_whole_and_among_the_parameters_alone(test: str) -> None:
    a = results(0, record(test=test))
    with pytest.raises(UsageError) as caught:
        compare(a, models(1), pairs=[Pair(a="llama-3-8b", b="gpt2")])
    assert str(caught.value) == (
        f"--pair llama-3-8b=gpt2: no test of A has 'llama-3-8b' as a parameter. Its tests: {test}."
    )


@pytest.mark.parametrize("text", ["", "llama", "=b", "a=", "a=a", " = "])
def test_pair_is_two_different_texts(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a pair\. Write what A has, =, and what B has in its place\."):
        Pair.from_text(text)


def test_pair_is_read_with_its_blanks_left_out() -> None:
    assert Pair.from_text("llama-3-8b = qwen2.5-7b") == Pair(a="llama-3-8b", b="qwen2.5-7b")


def test_undecided_configurations_are_not_sent_to_a_command_that_compares_code() -> None:
    lines = lines_of(compare(results(0, tokens(1000.0, seqs="1")), results(1, tokens(975.0, seqs="2"))))
    assert "undecided" in lines[-1]
