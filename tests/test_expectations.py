"""Published figures: those that were promised, where they are found, and what they do below a table and as a gate."""

from typing import Any

import pytest
from harness import Suite, recorded_tests
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_analysis_history import measurement, record

from pytest_gpuperf.analysis.expectations import (
    Expectation,
    find,
    in_words,
    load_expectations,
    place,
    shortfall,
    worse_than_all,
)
from pytest_gpuperf.analysis.gpu_kinds import is_kind
from pytest_gpuperf.records import Curve, Environment, Hardware, Measurement, Status, TestRecord
from pytest_gpuperf.report.expectations import expectation_lines
from pytest_gpuperf.specs import load_specs
from pytest_gpuperf.workloads.models import preset_of, presets

A100 = Hardware(name="NVIDIA A100-SXM4-40GB", memory_bytes=40 * 2**30)
T4 = Hardware(name="Tesla T4", memory_bytes=16 * 2**30)

#: A machine with one A100, and a suite that measures Qwen2.5-7B on it.
ON_AN_A100 = """
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import fake_gpu, fake_machine

def pytest_configure(config):
    config.stash[machine_key] = fake_machine(fake_gpu(name="NVIDIA A100-SXM4-40GB"))
"""
LLM = """
def test_llm(perf):
    perf.configure({"model": "qwen2.5-7b"})
    perf.record("throughput", RATE, unit="tok/s")
"""


def suite(rate: float) -> Suite:
    return Suite(files={"test_llm.py": LLM.replace("RATE", str(rate))}, conftest=ON_AN_A100)


def tokens(value: float, model: str | None = "qwen2.5-7b", **changes: Any) -> Measurement:
    configuration = None if model is None else {"model": model}
    whole = measurement(value, "throughput", unit="tok/s", better="higher", kind="end-to-end")
    return replace(whole, **{"configuration": configuration, **changes})


def measured(*measurements: Measurement, status: Status = "NEW", hardware: Hardware = A100) -> TestRecord:
    return record(*measurements, test="test_llm", status=status, environment=Environment(hardware=hardware))


# The data


@pytest.mark.parametrize(
    ("gpu", "count", "model", "metric", "figures"),
    [
        ("T4", 1, "gpt2", "throughput", ["~200 tok/s"]),
        ("T4", 1, "gpt2", "model memory", ["~2 GB"]),
        ("T4", 1, "llama-2-7b", "throughput", ["~50 tok/s"]),
        ("T4", 1, "llama-2-7b", "model memory", ["~14 GB"]),
        ("L4", 1, "llama-2-7b", "throughput", ["~120 tok/s"]),
        ("L4", 1, "llama-2-7b", "model memory", ["~14 GB"]),
        ("L4", 4, "llama-2-70b", "throughput", ["~15 tok/s"]),
        ("L4", 4, "llama-2-70b", "model memory", ["~150 GB"]),
        ("A100-SXM-80", 2, "llama-2-70b", "throughput", ["~60 tok/s"]),
        ("A100-SXM-80", 2, "llama-2-70b", "model memory", ["~140 GB"]),
        (
            "A100-SXM-40",
            1,
            "qwen2.5-7b",
            "throughput",
            [
                "~42 tok/s, single request, default",
                "~45 tok/s, single request, tuned",
                "~450 tok/s, batch 16, default",
                "~680 tok/s, batch 16, tuned",
                "~500 tok/s, batch 32, default",
                "~850 tok/s, batch 32, tuned",
            ],
        ),
        ("A100-SXM-40", 1, "qwen2.5-7b", "GPU busy", ["~65 %, default", "~88 %, tuned"]),
    ],
)
def test_published_figures_are_found(gpu: str, count: int, model: str, metric: str, figures: list[str]) -> None:
    assert [str(one) for one in find(model, gpu, metric, count=count)] == figures


def test_figures_of_the_small_server_are_ranges() -> None:
    conditions = "one-at-a-time server, 5 clients"
    found = {
        one.metric: str(one).removesuffix(f", {conditions}")
        for one in load_expectations()
        if one.conditions == conditions
    }
    assert found == {
        "load time": "30 to 60 s",
        "model memory": "6 to 8 GB",
        "latency p50": "700 to 1000 ms",
        "latency p95": "1000 to 1500 ms",
        "requests per minute": "60 to 90 req/min",
        "GPU busy": "15 to 25 %",
        "GPU idle": "75 to 85 %",
    }


@pytest.mark.parametrize("row", load_expectations(), ids=lambda row: f"{row.gpu}-{row.model}-{row.metric}")
def test_every_row_is_of_a_known_gpu_and_preset(row: Expectation) -> None:
    assert any(is_kind(spec.key, row.gpu) for spec in load_specs().gpus)
    assert row.model in presets()
    assert 0 < row.low <= row.high
    assert row.source


@pytest.mark.parametrize(
    ("model", "gpu", "metric", "count"),
    [
        ("llama-3-8b", "NVIDIA A100-SXM4-40GB", "throughput", 1),
        ("qwen2.5-7b", "NVIDIA H100 80GB HBM3", "throughput", 1),
        ("qwen2.5-7b", "NVIDIA A100-SXM4-40GB", "prefill", 1),
        ("qwen2.5-7b", "NVIDIA A100-SXM4-40GB", "throughput", 2),
        ("llama-2-70b", "NVIDIA L4", "throughput", 1),
        ("my-model", "NVIDIA A100-SXM4-40GB", "throughput", 1),
        ("llama-3.2-3b", "NVIDIA A100-SXM4-80GB", "load time", 1),
    ],
)
def test_nothing_is_found_for_another_model_gpu_metric_or_count(model: str, gpu: str, metric: str, count: int) -> None:
    assert find(model, gpu, metric, count=count) == ()


def test_model_may_be_a_hub_id_or_a_folder_and_metric_be_spelled_otherwise() -> None:
    assert preset_of("openai-community/gpt2")
    for model in ("GPT2", "openai-community/gpt2", "/models/gpt2"):
        assert len(find(model, "Tesla T4", "Throughput")) == 1
    assert len(find("gpt2", "Tesla T4", "model_memory")) == 1


# Placing a value


def test_value_is_so_many_times_the_published_one() -> None:
    (placed,) = place(tokens(580.0, "gpt2"), T4)
    assert placed.ratio == pytest.approx(2.9)
    assert not placed.is_worse


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (400.0, "(2 x)"),
        (219.0, "(as published)"),
        (181.0, "(as published)"),
        (179.0, "(0.9 x)"),
        (100.0, "(0.5 x)"),
    ],
)
def test_about_the_published_figure_is_as_published(rate: float, words: str) -> None:
    found = tokens(rate, "gpt2")
    (placed,) = place(found, T4)
    assert placed.is_worse is (rate < 180)
    assert in_words([placed], found)[0].endswith(words)


def test_time_is_better_where_it_is_shorter() -> None:
    def ratio(time_s: float) -> float:
        found = measurement(time_s, "load time", configuration={"model": "llama-3.2-3b"})
        (placed,) = place(found, A100)
        assert placed.is_worse is (time_s > 60)
        return placed.ratio

    assert [ratio(15.0), ratio(45.0), ratio(120.0)] == pytest.approx([2.0, 1.0, 0.5])


@given(rate=st.floats(1.0, 1e5))
def test_worse_is_never_as_published_and_better_is_never_worse(rate: float) -> None:
    for placed in place(tokens(rate), A100):
        assert not (placed.is_worse and placed.is_as_published)
        assert placed.is_worse is (rate < placed.expectation.low * 0.9)


@pytest.mark.parametrize(
    "found", [tokens(10.0, None), tokens(10.0, configuration={"dtype": "float16"}), tokens(10.0, unit="req/s")]
)
def test_without_a_model_or_in_another_unit_nothing_is_placed(found: Measurement) -> None:
    assert place(found, A100) == ()


def curve(**points: float) -> Measurement:
    sizes = {name.removeprefix("at_"): value for name, value in points.items()}
    return tokens(100.0, curve=Curve(x="batch size", points=sizes))


def test_curve_is_placed_at_the_sizes_that_were_published() -> None:
    found = curve(at_1=42.0, at_8=300.0, at_16=450.0)
    single, batch = in_words(place(found, A100), found)
    assert single == (
        "throughput at batch size 1 42.00 tok/s; published for A100: ~42 tok/s, single request, default "
        "(as published); ~45 tok/s, single request, tuned (as published)"
    )
    assert batch == (
        "throughput at batch size 16 450.0 tok/s; published for A100: ~450 tok/s, batch 16, default "
        "(as published); ~680 tok/s, batch 16, tuned (0.66 x)"
    )


def test_only_what_is_worse_than_everything_published_is_worse() -> None:
    assert worse_than_all(place(tokens(100.0), A100)) == ()  # better than a single request
    assert len(worse_than_all(place(tokens(10.0), A100))) == 6
    worse = worse_than_all(place(curve(at_1=42.0, at_16=100.0), A100))
    assert {one.expectation.size for one in worse} == {16}


def test_count_of_gpus_is_said_and_so_is_that_it_was_not_published() -> None:
    four = replace(T4, name="NVIDIA L4", count=4)
    two = replace(A100, count=2)
    found = tokens(15.0, "llama-2-70b")
    assert in_words(place(found, four), found) == [
        "throughput 15.00 tok/s; published for 4 x L4: ~15 tok/s (as published)"
    ]
    assert in_words(place(found, two), found) == ["throughput 15.00 tok/s; published for some A100: ~60 tok/s (0.25 x)"]


def test_metric_with_a_baseline_falls_short_of_nothing() -> None:
    assert shortfall(measured(tokens(10.0), status="PASS")) is None
    assert shortfall(measured(tokens(10.0), status="NEW")) is not None


def test_lines_are_few_and_fit_the_terminal() -> None:
    lines = [line.text for line in expectation_lines([measured(tokens(580.0))] * 8, width=80)]
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("No baseline: test_llm throughput 580.0 tok/s; published") for line in lines) == 6
    assert lines[-1] == "Figures were published for 2 more without a baseline: see docs/cost.md."


def test_metrics_that_were_compared_get_no_line() -> None:
    assert expectation_lines([measured(tokens(580.0), status="PASS"), measured(tokens(580.0, None))]) == []


# In a run


def test_published_figures_are_shown_below_the_table_and_are_no_gate(pytester: pytest.Pytester) -> None:
    result = suite(10.0).run(pytester)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        ["Record the new ones*", "No baseline: test_llm throughput 10.00 tok/s; published for A100: ~42 tok/s, single*"]
    )


def test_off_says_nothing(pytester: pytest.Pytester) -> None:
    result = suite(10.0).run(pytester, "--gpuperf-expectations", "off")
    result.stdout.no_fnmatch_line("*published for*")


def test_asked_for_worse_than_published_fails(pytester: pytest.Pytester) -> None:
    result = suite(10.0).run(pytester, "--gpuperf-expectations", "fail")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "test_llm on NVIDIA A100-SXM4-40GB is worse than published:",
            "  throughput 10.00 tok/s; published for A100: ~42 tok/s, single request, default (0.24 x); *",
            "  There is no baseline yet, and --gpuperf-expectations fail asks for what was published.",
        ]
    )


def test_asked_for_better_than_published_passes(pytester: pytest.Pytester) -> None:
    assert suite(50.0).run(pytester, "--gpuperf-expectations", "fail").ret == pytest.ExitCode.OK


def test_with_a_baseline_published_figures_are_no_gate_and_not_shown(pytester: pytest.Pytester) -> None:
    slow = suite(10.0).record(pytester)
    assert recorded_tests(pytester) == ["test_llm.py::test_llm"]
    result = slow.run(pytester, "--gpuperf-expectations", "fail")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*published for*")


def test_wrong_choice_is_refused(pytester: pytest.Pytester) -> None:
    result = suite(10.0).run(pytester, "--gpuperf-expectations", "gate")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gpuperf-expectations: invalid choice: 'gate'*"])
