"""What a user reads of a history, line by line."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from test_analysis_history import RATE, TIME, add, place, point, record, results, stepped

from pytest_gpuperf.analysis.history import Added, Summary
from pytest_gpuperf.analysis.levels import levels
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.history import add_run, added_lines, change_lines, chosen, list_lines, show_lines
from pytest_gpuperf.report.terminal import Line


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def summary(runs: int = 3) -> Summary:
    return Summary(
        series=TIME, runs=runs, first_date="2026-11-01T10:00:00", last_date="2026-11-20T10:00:00", last=1.5e-3
    )


def test_added_run_says_how_many_values(tmp_path: Path) -> None:
    lines = add_run(place(tmp_path), results(0, record(), record(test="test_read")))
    assert texts(lines) == [f"History in {tmp_path}/history.sqlite: 2 values of run run0 added."]


def test_run_that_is_there_already_is_said(tmp_path: Path) -> None:
    add(place(tmp_path), results(0))
    lines = add_run(place(tmp_path), results(0))
    assert texts(lines) == [f"History in {tmp_path}/history.sqlite: run run0 of 2026-11-01 is there already."]


def test_clock_that_stepped_back_is_said() -> None:
    lines = added_lines(Added(run=results(0).run, points=1, newer="2026-11-20T10:00:00+00:00"), "h.sqlite")
    assert texts(lines) == [
        "History in h.sqlite: 1 value of run run0 added.",
        (
            "Run run0 is dated 2026-11-01 10:00, before the run of 2026-11-20 10:00 that was added earlier: a clock "
            "stepped back, or results were added late. It comes after that run all the same; gpuperf history changes "
            "--by-date orders by date."
        ),
    ]


def test_list_has_one_row_a_series_under_its_test() -> None:
    other = replace(summary(1), series=RATE)
    assert texts(list_lines([summary(), other])) == [
        "test_a.py::test_copy on nvidia-h100",
        "  time                3 runs  2026-11-01 to 2026-11-20        1.500 ms",
        "  bandwidth            1 run  2026-11-01 to 2026-11-20    0.001500 B/s",
    ]


def test_list_fits_eighty_columns() -> None:
    assert all(len(text) <= 80 for text in texts(list_lines([summary(10**6)])))


def test_list_tells_two_methods_of_a_metric_apart() -> None:
    hot = replace(summary(), series=replace(TIME, method="hot, cuda-events"))
    rows = texts(list_lines([summary(), hot]))
    assert rows[1].endswith("  cold, cuda-events")
    assert rows[2].endswith("  hot, cuda-events")


def test_show_has_date_commit_value_and_verdict() -> None:
    points = [point(0, 1e-3, status="NEW"), point(1, 1.1e-3, commit=None, status="REGRESSED", change=0.1, attempt=1)]
    assert texts(show_lines(TIME, points)) == [
        "test_a.py::test_copy time on nvidia-h100 (cold, cuda-events)",
        "  2026-11-01 10:00  commit0                  1.000 ms  NEW",
        "  2026-11-02 10:00  -                        1.100 ms  REGRESSED +10 % (measured again, 1)",
    ]


def test_step_says_when_between_what_by_how_much_and_which_way() -> None:
    lines = change_lines([levels(TIME, stepped(1e-3, 1.1e-3))])
    assert texts(lines) == [
        "test_a.py::test_copy time on nvidia-h100 (cold, cuda-events), 10 observations",
        "  2026-11-06 10:00  between commit4 (2026-11-05) and commit5",
        "    1.000 ms -> 1.100 ms: 10 % slower, 95 % interval 9.9 % to 10 %",
        "1 step in 1 series.",
    ]
    assert [line.colour for line in lines] == [None, None, "red", None]


def test_step_for_the_better_reads_as_one() -> None:
    lines = change_lines([levels(RATE, stepped(1e12, 2e12))])
    assert lines[2].text == "    1.000 TB/s -> 2.000 TB/s: 50 % faster, 95 % interval 50 % to 50 %"
    assert lines[2].colour == "cyan"


def test_step_without_commits_says_so() -> None:
    points = [replace(one, commit=None) for one in stepped(1e-3, 2e-3)]
    assert "between (no commit) (2026-11-05) and (no commit)" in texts(change_lines([levels(TIME, points)]))[1]


def test_no_step_is_said_with_how_many_were_too_short() -> None:
    found = [levels(TIME, stepped(1e-3, 1e-3)), levels(RATE, [point(0)])]
    assert texts(change_lines(found)) == [
        "No step in 2 series; 1 of them too short, with fewer than 6 observations.",
    ]


def test_replaced_devices_are_said_with_the_remedy() -> None:
    points = [replace(one, devices=("b",)) if i >= 5 else one for i, one in enumerate(stepped(1e-3, 2e-3))]
    (_, note) = texts(change_lines([levels(TIME, points)]))
    assert note == (
        "test_a.py::test_copy time on nvidia-h100 (cold, cuda-events): all devices were replaced on 2026-11-06. A step "
        "there cannot be told from what the devices differ by: measure once more on one of the old ones."
    )


def test_runs_dated_back_and_invalid_values_are_said() -> None:
    points = [*stepped(1e-3, 1e-3), point(0, status="INVALID"), point(0, date="2020-01-01T00:00:00+00:00")]
    (_, dates, invalid) = texts(change_lines([levels(TIME, points)]))
    assert dates == (
        "1 run dated before one that was added earlier: a clock stepped back, or results were added late. The order is "
        "that of adding; --by-date orders by date."
    )
    assert invalid == "1 value left out: INVALID, measured while the device was unwell."


def test_test_that_the_history_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"history\.sqlite holds no such test or metric\. See what there is:  gpuperf"):
        chosen([summary()], lambda _: False, place(tmp_path))
