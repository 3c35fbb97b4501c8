"""What a user reads of a calibration, in 80 columns."""

import pytest
from msgspec.structs import replace

from pytest_gpuperf.records import TestKey
from pytest_gpuperf.report.calibrate import calibration_lines, legend_lines, process_lines
from pytest_gpuperf.trials.calibrate import Calibration, Process

KNOWN = Calibration(
    key=TestKey(module="perf_tests/test_matmul.py", test="test_matmul[2048-float16]"),
    metric="throughput",
    unit="FLOP/s",
    value=594.4e12,
    runs=5,
    devices=1,
    tolerance=0.03,
    within=0.0011,
    between=0.0018,
    between_low=0.0011,
    between_high=0.0052,
    sees_once=0.017,
    sees_confirmed=0.016,
    supported=0.02,
)
UNKNOWN = Calibration(key=KNOWN.key, metric="latency", unit="s", value=0.1, runs=1, devices=1, tolerance=0.05)


def texts(*calibrations: Calibration, left_out: tuple[str, ...] = ()) -> list[str]:
    return [line.text for line in calibration_lines(calibrations, left_out)]


def test_row_of_a_metric_has_its_value_noise_effects_tolerances_and_advice() -> None:
    assert texts(KNOWN)[1:] == [
        "perf_tests/test_matmul.py::test_matmul[2048-float16] throughput",
        " 594.4 TFLOP/s   0.11 0.18 (0.11-0.52)   1.7   1.6      2.0  3.0 fine",
    ]


def test_header_stands_above_its_columns() -> None:
    header, _, row = texts(KNOWN)
    assert header == "         value within   between (95 %)  sees  of 3 supports  tolerance"
    for name, end in (("within", "0.11"), ("supports", " 2.0"), ("of 3", "1.6")):
        assert header.index(name) + len(name) == row.index(end) + len(end)


def test_advice_has_its_colour() -> None:
    tight, roomy = replace(KNOWN, tolerance=0.01), replace(KNOWN, tolerance=0.3)
    assert [line.colour for line in calibration_lines([KNOWN, tight, roomy], ())[2::2]] == ["green", "red", "cyan"]


def test_metric_without_noise_has_dashes_and_says_in_how_many_runs_it_was() -> None:
    lines = texts(KNOWN, UNKNOWN)
    assert lines[3] == "perf_tests/test_matmul.py::test_matmul[2048-float16] latency (in 1 run of 5)"
    assert lines[4] == "      100.0 ms      -                -     -     -        -  5.0"


def test_noise_beyond_the_largest_tolerance_says_so() -> None:
    assert texts(replace(KNOWN, supported=None))[-1].endswith(" >70  3.0 too tight")


def test_what_was_left_out_is_told_five_times_at_most() -> None:
    reasons = tuple(f"run {i}, test_a.py::test_a: the test failed" for i in range(8))
    assert texts(KNOWN, left_out=reasons)[-6:] == [
        *(f"left out: {reason}" for reason in reasons[:5]),
        "left out: 3 more",
    ]


@pytest.mark.parametrize("calibration", [KNOWN, replace(KNOWN, supported=None, between=0.5, between_high=9.99)])
def test_everything_fits_into_80_columns(calibration: Calibration) -> None:
    wide = replace(calibration, tolerance=0.65, devices=2, sees_once=1.5, within=0.25)
    lines = [*texts(wide, UNKNOWN), *(line.text for line in legend_lines([wide, UNKNOWN]))]
    assert max(map(len, lines)) <= 80


def test_legend_says_what_one_visit_to_one_machine_cannot_tell() -> None:
    legend = " ".join(line.text for line in legend_lines([KNOWN]))
    assert "Not known from here: how much visits to the machine and GPUs differ." in legend
    assert "gpuperf baseline learn" in legend


def test_legend_explains_dashes_and_several_gpus_only_where_there_are_any() -> None:
    plain = [line.text for line in legend_lines([KNOWN])]
    more = [line.text for line in legend_lines([replace(KNOWN, devices=2), UNKNOWN])][len(plain) :]
    assert more == [
        "The runs were on different GPUs: what these differ by is not part of the noise.",
        "-: no 2 runs on the same device measured it, so its noise is not known.",
    ]


def test_good_process_is_one_line() -> None:
    (line,) = process_lines(Process(number=2, duration_s=34.2), 5, width=80)
    assert line.text == "run 2 of 5: 0 metrics, 34 s"


def test_process_with_a_problem_shows_its_last_lines_cut_to_the_terminal() -> None:
    tail = "one\n\ntwo\nthree\nfour\nfive\n" + "x" * 100 + "\n"
    process = Process(number=3, duration_s=1.0, problem="was ended by SIGSEGV", tail=tail)
    said, *last = [line.text for line in process_lines(process, 5, width=80)]
    assert said == "run 3 of 5: was ended by SIGSEGV; it does not count"
    assert last == ["  | two", "  | three", "  | four", "  | five", f"  | {'x' * 75}…"]
