"""What tokens cost: the published figures to the cent, the table of prices, and every mistake as one message."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_analysis_history import measurement, record

from pytest_gpuperf.analysis.cost import (
    Cost,
    Price,
    PriceSource,
    Throughput,
    costs,
    given_throughput,
    own_price,
    price_of,
    read_prices,
    throughputs,
)
from pytest_gpuperf.analysis.gpu_kinds import is_kind
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Curve, Environment, Hardware, Measurement, Rerun, TestRecord
from pytest_gpuperf.report.cost import cost_lines, money

A100 = Hardware(name="NVIDIA A100-SXM4-40GB", memory_bytes=40 * 2**30)


def throughput(tokens_per_s: float = 1000.0, **changes: Any) -> Throughput:
    return replace(
        Throughput(test="test_llm.py::test_it", metric="throughput", tokens_per_s=tokens_per_s, gpu="L4", gpus=1),
        **changes,
    )


def price(per_hour: float = 3.6, **changes: Any) -> Price:
    return replace(Price(instance="x1", gpu="L4", count=1, per_hour=per_hour), **changes)


def cost(tokens_per_s: float = 1000.0, per_hour: float = 3.6, **changes: Any) -> Cost:
    return Cost(throughput=throughput(tokens_per_s, **changes), price=price(per_hour))


def tokens(value: float = 1000.0, metric: str = "throughput", **changes: Any) -> Measurement:
    return measurement(value, metric, unit="tok/s", better="higher", kind="end-to-end", **changes)


def measured(*measurements: Measurement, hardware: Hardware = A100, **changes: Any) -> TestRecord:
    return record(*measurements, test="test_llm", environment=Environment(hardware=hardware), **changes)


# The arithmetic


@pytest.mark.parametrize(
    ("gpu", "tokens_per_s", "per_hour", "cents"),
    [("T4", 200.0, 0.526, 73), ("T4", 50.0, 0.526, 292), ("L4", 120.0, 1.10, 254)],
)
def test_published_costs_come_out_to_the_cent(gpu: str, tokens_per_s: float, per_hour: float, cents: int) -> None:
    (found,) = costs([throughput(tokens_per_s, gpu=gpu)], PriceSource())
    assert found.per_hour == per_hour
    assert found.per_million_tokens == pytest.approx(per_hour / (tokens_per_s * 3600) * 1e6)
    assert math.floor(found.per_million_tokens * 100) == cents  # $2.546 was published as $2.54


def test_thousand_tokens_a_second_at_three_dollars_sixty_are_a_million_a_dollar() -> None:
    assert cost().per_million_tokens == pytest.approx(1.0)
    assert cost().tokens_per_unit == pytest.approx(1e6)


def test_waiting_gpu_is_in_the_cost_once() -> None:
    found = cost(gpu_busy_share=0.8)
    assert found.per_million_tokens == pytest.approx(1.0)
    assert found.waiting_per_million_tokens == pytest.approx(0.2)
    assert found.per_busy_hour == pytest.approx(4.5)


def test_without_a_busy_share_nothing_effective_is_claimed() -> None:
    assert (cost().per_busy_hour, cost().waiting_per_million_tokens) == (None, None)


@given(rate=st.floats(0.1, 1e6), per_hour=st.floats(0.01, 1000.0), busy=st.floats(0.01, 1.0), gpus=st.integers(1, 64))
def test_the_figures_agree_with_each_other(rate: float, per_hour: float, busy: float, gpus: int) -> None:
    found = cost(rate, per_hour, gpu_busy_share=busy, gpus=gpus)
    assert found.per_million_tokens * found.tokens_per_unit == pytest.approx(1e6)
    hours = 1e6 / rate / 3600
    assert found.per_hour * hours == pytest.approx(found.per_million_tokens)
    assert found.per_busy_hour is not None
    assert found.waiting_per_million_tokens is not None
    assert found.per_busy_hour * busy == pytest.approx(found.per_hour)
    computing = found.per_million_tokens * busy
    assert computing + found.waiting_per_million_tokens == pytest.approx(found.per_million_tokens)


@pytest.mark.parametrize(("gpus", "factor"), [(1, 8.0), (2, 4.0), (8, None), (12, 16 / 12), (16, None)])
def test_idle_rest_of_a_machine_multiplies_the_cost(gpus: int, factor: float | None) -> None:
    found = Cost(throughput=throughput(gpus=gpus), price=price(32.77, count=8))
    assert found.per_hour == pytest.approx(32.77 / 8 * gpus)
    expected = None if factor is None else pytest.approx(found.per_million_tokens * factor)
    assert found.alone_per_million_tokens == expected


# Names of GPUs


@pytest.mark.parametrize(
    ("name", "kind", "is_one"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100", True),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40", True),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", True),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-40", False),
        ("Tesla T4", "T4", True),
        ("NVIDIA L40S", "L4", False),
        ("NVIDIA L40S", "L40", False),
        ("NVIDIA A10G", "A10", False),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("my own GPU", "My own GPU", True),
        ("my own GPU", "my", False),
    ],
)
def test_short_name_means_its_gpus_and_no_others(name: str, kind: str, *, is_one: bool) -> None:
    assert is_kind(name, kind) is is_one


# Prices


def test_the_table_has_the_prices_that_were_published() -> None:
    table = {one.instance: (one.gpu, one.count, one.per_hour, one.currency) for one in read_prices()}
    assert table == {
        "g4dn.xlarge": ("T4", 1, 0.526, "USD"),
        "g6.2xlarge": ("L4", 1, 1.10, "USD"),
        "g5.xlarge": ("A10G", 1, 1.006, "USD"),
        "p3.2xlarge": ("V100-SXM2-16GB", 1, 3.06, "USD"),
        "p4d.24xlarge": ("A100-SXM-40", 8, 32.77, "USD"),
    }
    assert all((one.date or one.retrieved) and one.source for one in read_prices())


@pytest.mark.parametrize("gpu", ["T4", "Tesla T4", "NVIDIA L4", "A10G", "V100", "A100", "NVIDIA A100-SXM4-40GB"])
def test_price_is_found_by_every_name_of_a_gpu(gpu: str) -> None:
    assert price_of(gpu, read_prices()).per_hour > 0


def test_of_two_machines_the_cheaper_gpu_hour_counts_unless_one_is_named() -> None:
    dear, cheap = price(2.0, instance="dear"), price(8.0, instance="cheap", count=8)
    assert price_of("L4", [dear, cheap]) == cheap
    assert price_of("L4", [dear, cheap], instance="DEAR") == dear


def test_prices_in_two_currencies_are_not_compared() -> None:
    both = [price(2.0, instance="here"), replace(price(1.9, instance="there"), currency="EUR")]
    with pytest.raises(UsageError, match=r"L4 has prices in EUR and USD, which cannot be compared\. Name the machine:"):
        price_of("L4", both)
    assert price_of("L4", both, instance="there").currency == "EUR"


@pytest.mark.parametrize(
    ("gpu", "instance", "text"),
    [
        ("H100", None, "No price for H100. Known: L4 (x1). Give one with --price DOLLARS_PER_GPU_HOUR, or a table"),
        ("L4", "x2", "No price for an instance 'x2'. Known: L4 (x1)."),
        ("NVIDIA H100 80GB HBM3", "x1", "x1 has L4, but the throughput is of NVIDIA H100 80GB HBM3. Measure on that"),
        ("NVIDIA A100-SXM4-80GB", None, "No price for NVIDIA A100-SXM4-80GB."),
    ],
)
def test_price_that_is_not_known_says_which_are(gpu: str, instance: str | None, text: str) -> None:
    prices = [price()] if gpu != "NVIDIA A100-SXM4-80GB" else read_prices()
    with pytest.raises(UsageError) as caught:
        price_of(gpu, prices, instance=instance)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("number", [0.0, -3.0, math.nan, math.inf])
def test_price_by_hand_is_above_zero(number: float) -> None:
    with pytest.raises(UsageError, match=r"--price \S+ is not a price\. Give the dollars for an hour of one GPU"):
        own_price(number, "L4")


def written(tmp_path: Path, *rows: dict[str, object], schema: int = 1) -> Path:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"schema": schema, "prices": rows}))
    return path


ROW: dict[str, object] = {"instance": "box", "gpu": "H100", "count": 4, "per_hour": 10.0, "currency": "EUR"}


def test_table_of_ones_own_replaces_the_one_that_comes_along(tmp_path: Path) -> None:
    (found,) = read_prices(written(tmp_path, ROW))
    assert (found.instance, found.per_gpu_hour) == ("box", 2.5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"per_hour": 0}, "box costs 0 per hour. A price is a number above 0."),
        ({"per_hour": -1}, "box costs -1 per hour. A price is a number above 0."),
        ({"count": 0}, "box has 0 GPUs. A machine with a price has 1 or more."),
        ({"per_hour": "10"}, "is not a table of prices: Expected `float`, got `str` - at `$.prices[0].per_hour`."),
        ({"cost": 1}, "is not a table of prices: Object contains unknown field `cost`"),
    ],
)
def test_impossible_row_is_named(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    path = written(tmp_path, {**ROW, **changes})
    with pytest.raises(UsageError) as caught:
        read_prices(path)
    assert str(caught.value).startswith(str(path))
    assert text in str(caught.value)


def test_table_that_is_not_there_or_newer_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read the prices in .*none\.json: No such file or directory\."):
        read_prices(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"has schema 2, this version reads 1\. Upgrade\."):
        read_prices(written(tmp_path, schema=2))


def test_price_by_hand_and_table_contradict(tmp_path: Path) -> None:
    for source in (
        PriceSource(per_gpu_hour=1.0, instance="x1"),
        PriceSource(per_gpu_hour=1.0, table=tmp_path / "prices.json"),
    ):
        with pytest.raises(
            UsageError, match=r"--price is a price by itself\. Drop it, or drop --prices and --instance"
        ):
            costs([throughput()], source)


def test_results_of_another_gpu_have_no_cost_on_this_one() -> None:
    with pytest.raises(
        UsageError, match=r"The results are of L4, not of T4\. What tokens cost on T4 has to be measured"
    ):
        costs([throughput()], PriceSource(), only="T4")
    assert costs([throughput(gpu="NVIDIA A100-SXM4-40GB")], PriceSource(), only="A100")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.0, "T4", 1, None), "--throughput 0 is not a number of tokens a second above 0."),
        ((math.nan, "T4", 1, None), "--throughput nan is not a number of tokens a second above 0."),
        ((5.0, "T4", 0, None), "--gpus 0: a throughput takes 1 GPU or more."),
        ((5.0, "T4", 1, 65.0), "--busy 65 is no part of the time. Write 0.65 for 65 %."),
        ((5.0, "T4", 1, 0.0), "--busy 0 is no part of the time. Write 0.65 for 65 %."),
        ((5.0, None, 1, None), "Whose price? Add --gpu, such as --gpu T4, or --price DOLLARS_PER_GPU_HOUR."),
    ],
)
def test_number_by_hand_that_cannot_be_is_refused(
    arguments: tuple[float, str | None, int, float | None], text: str
) -> None:
    rate, gpu, gpus, busy = arguments
    with pytest.raises(UsageError) as caught:
        given_throughput(rate, gpu=gpu, gpus=gpus, busy=busy, has_price=False)
    assert str(caught.value) == text


# What was measured


def test_only_tokens_a_second_count() -> None:
    found = throughputs([measured(tokens(), tokens(metric="prefill", gpu_busy_share=0.5), measurement())])
    assert [(one.metric, one.gpu_busy_share) for one in found] == [("throughput", None), ("prefill", 0.5)]
    assert {(one.test, one.gpu, one.gpus) for one in found} == {
        ("perf_tests/test_bandwidth.py::test_llm", A100.name, 1)
    }


def test_fresh_processes_replace_the_run_that_was_repeated() -> None:
    more = tuple(
        Rerun(measurements=(tokens(value, gpu_busy_share=share),), duration_s=1.0)
        for value, share in ((90.0, 0.5), (40.0, 0.7))
    )
    (found,) = throughputs([measured(tokens(1000.0, gpu_busy_share=0.1), more=more)])
    assert found.tokens_per_s == pytest.approx(60.0)
    assert found.gpu_busy_share == pytest.approx(0.6)


def test_curve_costs_something_at_each_size() -> None:
    curve = Curve(x="batch size", points={"1": 40.0, "16": 300.0, "4": 120.0})  # as JSON sorts them
    found = throughputs([measured(tokens(110.0, curve=curve, gpu_busy_share=0.9))])
    assert [one.metric for one in found] == [f"throughput, batch size {size}" for size in (1, 4, 16)]
    assert [one.tokens_per_s for one in found] == pytest.approx([40.0, 120.0, 300.0])
    assert [one.gpu_busy_share for one in found] == [None] * 3


def test_several_gpus_cost_several_times_as_much() -> None:
    (found,) = throughputs([measured(tokens(), hardware=replace(A100, count=2))])
    assert found.gpus == 2
    (paid,) = costs([found], PriceSource())
    assert paid.per_hour == pytest.approx(32.77 / 4)


def test_results_without_a_throughput_say_what_there_is() -> None:
    with pytest.raises(
        UsageError, match=r"hold nothing in tok/s, which costs are computed from, but B, s\. Run a test"
    ):
        throughputs([measured(measurement(), measurement(1.0, "memory", unit="B"))])


# What a user reads


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        (0.73056, "USD", "$0.7306"),
        (32.77, "USD", "$32.77"),
        (1234.5, "EUR", "€1,234.50"),
        (0.00005, "USD", "$0.00005000"),
        (2.0, "CHF", "2.000 CHF"),
    ],
)
def test_money_is_read_without_exponents(amount: float, currency: str, text: str) -> None:
    assert money(amount, currency) == text


def test_block_of_costs_fits_80_columns() -> None:
    found = costs([throughput(580.0, gpu=A100.name, gpu_busy_share=0.65)], PriceSource())
    lines = [line.text for line in cost_lines(found)]
    assert lines == [
        "NVIDIA A100-SXM4-40GB at $4.096 per GPU-hour",
        "  a GPU's share of p4d.24xlarge with 8, price as retrieved 2026-11",
        "  While the machine's other GPUs stand idle, it costs 8 times as much.",
        "                                          tok/s   per 1M tok     tok per $  busy",
        "test_llm.py::test_it",
        " throughput                               580.0       $1.962       509,735  65 %",
        "   65 % busy: $6.302 per hour of computing; $0.6866 per 1M tok is for waiting",
    ]
    assert max(map(len, lines)) <= 80


def test_gpus_of_one_price_stand_together_and_others_apart() -> None:
    both = [throughput(gpu="L4"), throughput(gpu="T4"), throughput(gpu="L4", gpus=2, metric="prefill")]
    lines = [line.text for line in cost_lines(costs(both, PriceSource(per_gpu_hour=2.0)))]
    assert [line for line in lines if "GPU-hour" in line] == [
        "L4 at $2.000 per GPU-hour",
        "T4 at $2.000 per GPU-hour",
        "2 x L4 at $2.000 per GPU-hour, $4.000 together",
    ]
    assert lines[1] == "  as given by --price"


def test_long_metric_has_a_line_of_its_own() -> None:
    lines = [line.text for line in cost_lines([cost(metric="m" * 60)])]
    assert lines[-2] == f" {'m' * 60}"
    assert lines[-1].split()[0] == "1,000"


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ({"date": "2026-06", "retrieved": "2026-11"}, "  box, price of 2026-06"),
        ({"retrieved": "2026-11"}, "  box, price as retrieved 2026-11"),
        ({}, "  box"),
    ],
)
def test_price_says_when_it_was_one_as_far_as_that_is_known(when: dict[str, str], words: str) -> None:
    here = Price(instance="box", gpu="H100", count=1, per_hour=2.0, **when)
    assert cost_lines([Cost(throughput=throughput(), price=here)])[1].text == words


def test_other_currency_is_named() -> None:
    euros = Cost(throughput=throughput(), price=price(currency="EUR"))
    francs = Cost(throughput=throughput(), price=price(currency="CHF"))
    assert "tok per €" in cost_lines([euros])[2].text
    assert "tok per 1 CHF" in cost_lines([francs])[2].text
