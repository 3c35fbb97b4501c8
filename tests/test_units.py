"""Units: what is read, what is refused and with which words, and that what is printed is what was meant."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.units import Better, counted, direction, format_percent, format_value, parse_tolerance, to_base

BASE_UNITS = ("s", "s/tok", "s/req", "B", "B/s", "FLOP/s", "W", "J", "J/tok", "tok/s", "req/s", "tok/J")


@pytest.mark.parametrize(
    ("value", "unit", "base"),
    [
        (2.0, "s", (2.0, "s")),
        (12.5, "ms", (0.0125, "s")),
        (3.0, "us", (3e-6, "s")),
        (3.0, "µs", (3e-6, "s")),
        (3.0, "ns", (3e-9, "s")),
        (12.0, "ms/tok", (0.012, "s/tok")),
        (12.0, "ms/req", (0.012, "s/req")),
        (5.0, "B", (5.0, "B")),
        (5.0, "kB", (5e3, "B")),
        (5.0, "GB", (5e9, "B")),
        (5.0, "GiB", (5 * 2.0**30, "B")),
        (5.0, "KiB", (5120.0, "B")),
        (5.0, "MiB/s", (5 * 2.0**20, "B/s")),
        (3.35, "TB/s", (3.35e12, "B/s")),
        (7.0, "MFLOP/s", (7e6, "FLOP/s")),
        (989.0, "TFLOP/s", (989e12, "FLOP/s")),
        (989.0, "TFLOPS", (989e12, "FLOP/s")),
        (1.0, "PFLOPS", (1e15, "FLOP/s")),
        (0.7, "kW", (700.0, "W")),
        (4.0, "mW", (0.004, "W")),
        (2.0, "kJ", (2000.0, "J")),
        (2.0, "mJ/tok", (0.002, "J/tok")),
        (5.0, "%", (0.05, "")),
    ],
)
def test_a_unit_becomes_its_base_unit(value: float, unit: str, base: tuple[float, str]) -> None:
    converted, base_unit = to_base(value, unit)
    assert converted == pytest.approx(base[0], rel=1e-12)
    assert base_unit == base[1]


def test_an_unknown_unit_is_kept_with_its_value() -> None:
    assert to_base(7.0, "frames/s") == (7.0, "frames/s")


@pytest.mark.parametrize("unit", ["s", "ms", "ms/tok", "GiB", "W", "kJ", "mJ/tok", "us/req"])
def test_less_of_a_cost_is_better(unit: str) -> None:
    assert direction(unit) == "lower"


@pytest.mark.parametrize("unit", ["TFLOP/s", "GB/s", "GiB/s", "tok/s", "req/s", "it/s", "img/s", "tok/J", "tok/s/W"])
def test_more_of_a_rate_is_better(unit: str) -> None:
    assert direction(unit) == "higher"


@pytest.mark.parametrize("unit", ["%", "hits", ""])
def test_a_unit_without_direction_asks_for_one(unit: str) -> None:
    with pytest.raises(UsageError) as error:
        direction(unit)
    assert str(error.value) == (
        f"The unit {unit!r} does not say whether more or less is better. Add better='lower' or better='higher'."
    )
    assert direction(unit, better="higher") == "higher"


@pytest.mark.parametrize(("unit", "better", "known"), [("ms", "higher", "lower"), ("tok/s", "lower", "higher")])
def test_a_direction_against_the_unit_is_refused_unless_it_is_meant(unit: str, better: Better, known: str) -> None:
    with pytest.raises(UsageError) as error:
        direction(unit, better=better)
    assert str(error.value) == (
        f"better={better!r} contradicts the unit {unit!r}, where {known} is better. "
        "Correct one of them, or add contradicts_unit=True if it is meant."
    )
    assert direction(unit, better=better, contradicts_unit=True) == better


def test_a_direction_that_agrees_with_the_unit_is_fine() -> None:
    assert direction("ms", better="lower") == "lower"


def test_a_word_that_is_no_direction_is_refused() -> None:
    with pytest.raises(UsageError, match=r"better='up' is not a direction\. Valid: 'lower', 'higher'\."):
        direction("ms", better="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["5%", "5 %", " 5% ", "5.0%", "5.%", 0.05])
def test_five_percent_can_be_written_in_several_ways(value: object) -> None:
    assert parse_tolerance(value) == pytest.approx(0.05, rel=1e-12)


def test_a_percentage_may_begin_with_its_point() -> None:
    assert parse_tolerance(".5%") == pytest.approx(0.005)


def test_a_bare_five_is_no_tolerance() -> None:
    with pytest.raises(UsageError) as error:
        parse_tolerance(5)
    assert str(error.value) == (
        "tolerance=5 is outside 0 to 1 (0 % to 100 %). A tolerance of 5 % is written 0.05 or '5%'."
    )


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.1, math.nan, math.inf, -math.inf, "0%", "100%", "250 %"])
def test_a_tolerance_lies_between_nothing_and_everything(value: object) -> None:
    with pytest.raises(UsageError, match="is outside 0 to 1") as error:
        parse_tolerance(value)
    assert f"tolerance={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "value", ["5", "0.05", "abc", "", "%", "-5%", "1e-2%", "nan%", None, True, False, [0.05], b"5%"]
)
def test_what_is_neither_fraction_nor_percentage_is_refused(value: object) -> None:
    with pytest.raises(UsageError) as error:
        parse_tolerance(value)
    assert str(error.value) == f"tolerance={value!r} is not a number. Write 0.05 or '5%'."


@settings(deadline=None)
@given(st.floats(0.0001, 99.9))
def test_a_percentage_and_its_fraction_are_one_tolerance(percent: float) -> None:
    assert parse_tolerance(f"{percent:.6f}%") == pytest.approx(parse_tolerance(round(percent, 6) / 100))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (690.2e12, "FLOP/s", "690.2 TFLOP/s"),
        (3.002e12, "B/s", "3.002 TB/s"),
        (1.616e-3, "s", "1.616 ms"),
        (85_520_809_984, "B", "85.52 GB"),
        (700.0, "W", "700.0 W"),
        (12_345.6, "tok/s", "12346 tok/s"),
        (0.0234, "tok/s", "0.02340 tok/s"),
        (0.0123, "s/tok", "12.30 ms/tok"),
        (0.05, "", "5.000 %"),
        (-1.5e-3, "s", "-1.500 ms"),
        (0.0, "s", "0 s"),
        (-0.0, "s", "0 s"),
        (math.nan, "s", "nan s"),
        (math.inf, "B/s", "inf B/s"),
    ],
)
def test_a_value_is_printed_with_a_readable_prefix(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999.94e-6, "999.9 us"), (999.96e-6, "1.000 ms"), (0.99996, "1.000 s"), (9.9996e-3, "10.00 ms")],
)
def test_rounding_up_takes_the_next_prefix_with_it(value: float, text: str) -> None:
    assert format_value(value, "s") == text


def test_three_digits_are_three_digits() -> None:
    assert format_value(123.456e9, "B", digits=3) == "123 GB"


@example(value=0.00012, unit="tok/s")
@example(value=999.95e9, unit="B/s")
@example(value=1e-12, unit="s")
@example(value=5e3, unit="J")
@example(value=1.2e6, unit="FLOP/s")
@settings(deadline=None)
@given(value=st.floats(1e-15, 1e18), unit=st.sampled_from(BASE_UNITS))
def test_what_was_printed_reads_back_as_the_same_value(value: float, unit: str) -> None:
    number, printed_unit = format_value(value, unit).split(" ")
    read, read_unit = to_base(float(number), printed_unit)
    assert read == pytest.approx(value, rel=1e-3)
    assert read_unit == unit


@settings(deadline=None)
@given(value=st.floats(1e-6, 1e15), unit=st.sampled_from(BASE_UNITS))
def test_a_printed_value_fits_a_column(value: float, unit: str) -> None:
    assert len(format_value(value, unit).split(" ")[0]) <= 16


@example(fraction=-0.0)
@example(fraction=-0.00004)
@example(fraction=0.00995)
@example(fraction=0.0995)
@example(fraction=0.9995)
@settings(deadline=None)
@given(fraction=st.floats(-10, 10))
def test_a_printed_percentage_is_the_fraction(fraction: float) -> None:
    printed = float(format_percent(fraction).removesuffix(" %"))
    assert printed == pytest.approx(fraction * 100, rel=0.051, abs=0.0051)
    assert not format_percent(fraction).startswith("-0.00 ")


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0005, "0.05 %"), (0.031, "3.1 %"), (0.12, "12 %"), (-0.031, "-3.1 %"), (-0.00001, "0.00 %"), (1.5, "150 %")],
)
def test_a_percentage_has_about_two_digits(fraction: float, text: str) -> None:
    assert format_percent(fraction) == text


@pytest.mark.parametrize(("fraction", "text"), [(0.031, "+3.1 %"), (-0.031, "-3.1 %"), (-0.00001, "+0.00 %")])
def test_a_change_shows_its_sign(fraction: float, text: str) -> None:
    assert format_percent(fraction, signed=True) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_things_are_counted_in_words(count: int, text: str) -> None:
    assert counted(count, "file") == text
