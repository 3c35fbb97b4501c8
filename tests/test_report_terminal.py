"""What a user reads: the table at two widths, the message of a regression line by line, and the notes below."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.records import (
    BaselineRun,
    Environment,
    Hardware,
    Measurement,
    Method,
    MetricBaseline,
    Session,
    Status,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.report.terminal import Line, baseline_command, command, notes, regression_message, table

METHOD = Method(clock="cuda-events", mode="sustained")
HERE = Environment(
    hardware=Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984, power_limit_w=700.0),
    versions={"driver": "580.159.04", "torch": "2.13.0", "python": "3.11.7"},
)
THEN = msgspec.structs.replace(HERE, versions={"driver": "570.86.10", "torch": "2.12.1", "python": "3.11.7"})
TELEMETRY = Telemetry(duration_s=5.0, sm_clock_mhz=1402.0, power_w=701.0, power_cap_share=0.97)
THROUGHPUT = Measurement(
    metric="throughput",
    value=640.2e12,
    unit="FLOP/s",
    better="higher",
    kind="compute",
    method=METHOD,
    flop=1e12,
    peak=989.4e12,
    telemetry=TELEMETRY,
)
REGRESSED = Verdict(
    status="REGRESSED",
    metric="throughput",
    reason="7.8 % slower (7.1 % to 8.5 %), tolerance 3.0 %.",
    tolerance=0.03,
    change=0.078,
    change_low=0.071,
    change_high=0.085,
    minimum_detectable_effect=0.021,
    baseline_value=690.2e12,
    sessions=6,
)
NEW = Verdict(status="NEW", metric="throughput", reason="No baseline on this device.", tolerance=0.03)
RECORD = "gpuperf baseline record"
COMPARED: tuple[Status, ...] = ("PASS", "REGRESSED", "IMPROVED", "INCONCLUSIVE")
COLOURS = {
    "PASS": "green",
    "REGRESSED": "red",
    "IMPROVED": "cyan",
    "INCONCLUSIVE": "yellow",
    "INVALID": "yellow",
    "INCOMPARABLE": "yellow",
    "NEW": "cyan",
}


def verdict(status: Status, **changes: Any) -> Verdict:
    """A verdict as the judge gives it: numbers only where something was compared."""
    base = REGRESSED if status in COMPARED else NEW
    return msgspec.structs.replace(base, status=status, **changes)


def measured(metric: str = "throughput", **changes: Any) -> Measurement:
    return msgspec.structs.replace(THROUGHPUT, metric=metric, **changes)


def record(
    *pairs: tuple[Measurement, Verdict],
    test: str = "test_matmul[8192-bfloat16]",
    module: str = "perf_tests/test_matmul.py",
) -> TestRecord:
    """One test with its metrics; by default one that got slower."""
    pairs = pairs or ((THROUGHPUT, REGRESSED),)
    return TestRecord(
        key=TestKey(module=module, test=test),
        slug="nvidia-h100-80gb-hbm3",
        devices=("0123456789ab",),
        environment=HERE,
        measurements=tuple(measurement for measurement, _ in pairs),
        verdicts=tuple(msgspec.structs.replace(verdict) for _, verdict in pairs),  # each its own, as from JSON
    )


def baseline(**run: Any) -> MetricBaseline:
    session = Session(
        date="2026-11-20T00:00:00+00:00",
        visit="v",
        devices=("0123456789ab",),
        environment="e",
        runs=(BaselineRun(value=690.2e12, **run),),
    )
    return MetricBaseline(unit="FLOP/s", better="higher", kind="compute", method=METHOD, sessions=(session, session))


def message(
    *pairs: tuple[Measurement, Verdict], then: Environment | None = THEN, accept: str = "gpuperf baseline accept"
) -> str:
    one = record(*pairs)
    usual = baseline(sm_clock_mhz=1502.0, power_w=698.0)
    return regression_message(one, one.verdicts[0], usual, then, accept=accept)


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def noted(*records: TestRecord, record_command: str | None = RECORD, silent: tuple[Status, ...] = ()) -> list[str]:
    return texts(notes(records, record_command=record_command, silent=silent))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the command be called by its name, wherever this environment has it."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


# The table


def test_the_table_has_a_head_a_line_for_the_test_and_one_for_the_metric() -> None:
    assert texts(table([record()])) == [
        "                        value  peak baseline       change   sees  verdict",
        "perf_tests/test_matmul.py::test_matmul",
        " 8192-bfloat16  640.2 TFLOP/s  65 %    690.2  +7.8 ±0.7 %  2.1 %  REGRESSED",
    ]


@pytest.mark.parametrize("status", get_args(Status))
def test_every_verdict_has_a_row_in_its_colour(status: Status) -> None:
    row = table([record((THROUGHPUT, verdict(status)))])[-1]
    assert row.text.endswith(f"  {status}")
    assert row.colour == COLOURS[status]
    assert ("+7.8 ±0.7 %" in row.text) == (status in COMPARED)


def test_what_was_not_compared_has_dashes() -> None:
    row = table([record((measured(peak=None), NEW))])[-1].text
    assert row.split()[1:] == ["640.2", "TFLOP/s", "-", "-", "-", "-", "NEW"]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("status", ["PASS", "REGRESSED", "IMPROVED", "INVALID", "NEW"])
@pytest.mark.parametrize("test", ["test_copy", "test_matmul[16384-bfloat16]", f"test_llm[{'long-name-' * 15}]"])
def test_no_row_is_wider_than_the_terminal(width: int, status: Status, test: str) -> None:
    one = record((measured(unstable="still drifting"), verdict(status)), test=test)
    assert max(map(len, texts(table([one], width=width)))) <= width


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "longest",
    [verdict("INCONCLUSIVE"), verdict("INCOMPARABLE"), verdict("PASS", is_low_power=True)],
    ids=["inconclusive", "incomparable", "low-power"],
)
def test_no_row_with_a_long_verdict_is_wider_than_the_terminal(width: int, longest: Verdict) -> None:
    one = record((THROUGHPUT, longest), test=f"test_llm[{'long-name-' * 15}]")
    assert max(map(len, texts(table([one], width=width)))) <= width


def test_a_long_name_has_a_line_of_its_own_so_that_two_never_look_the_same() -> None:
    one = record(test="test_generate[llama-3.1-8b-instruct-batch-64-bfloat16]")
    *_, name, figures = texts(table([one], width=80))
    assert name == " llama-3.1-8b-instruct-batch-64-bfloat16"
    assert figures.split()[0] == "640.2"
    assert "llama-3.1-8b-instruct-batch-64-bfloat16" in table([one], width=120)[-1].text


def test_a_name_longer_than_the_terminal_is_cut_in_the_middle() -> None:
    one = record(test=f"test_generate[first-{'long-' * 30}last]")
    *_, name, _ = texts(table([one], width=80))
    assert "…" in name
    assert name.startswith(" first-")
    assert name.endswith("-last")


def test_tests_of_one_function_stand_together_in_whatever_order_they_came() -> None:
    tests = ["test_a[1]", "test_b[1]", "test_a[2]"]
    rows = texts(table([record(test=test) for test in tests]))
    assert [row.split()[0] for row in rows[1:]] == [
        "perf_tests/test_matmul.py::test_a",
        "1",
        "2",
        "perf_tests/test_matmul.py::test_b",
        "1",
    ]


def test_functions_of_one_name_in_two_modules_stand_apart() -> None:
    rows = texts(table([record(module="a/test_x.py"), record(module="b/test_x.py")]))
    assert [row for row in rows if "::" in row] == ["a/test_x.py::test_matmul", "b/test_x.py::test_matmul"]


def test_several_metrics_of_one_test_are_told_apart_by_name() -> None:
    pairs = [(measured(name), verdict("PASS", metric=name)) for name in ("ttft", "tpot")]
    rows = texts(table([record(*pairs), record(*pairs, test="test_plain")], width=120))
    assert [" ".join(row.split()[:2]) for row in rows if "PASS" in row][:2] == [
        "8192-bfloat16 ttft",
        "8192-bfloat16 tpot",
    ]
    assert [row.split()[0] for row in rows if "PASS" in row][2:] == ["ttft", "tpot"]


def test_tests_that_share_a_verdict_keep_their_own_names() -> None:
    shared = [msgspec.structs.replace(record(test=f"test_a[{name}]"), verdicts=(NEW,)) for name in ("one", "two")]
    assert [row.split()[0] for row in texts(table(shared))[2:]] == ["one", "two"]


def test_a_test_without_parameters_is_named_by_its_metric() -> None:
    assert table([record(test="test_copy")])[-1].text.split()[0] == "throughput"


def test_an_unstable_value_is_marked() -> None:
    assert "~640.2 TFLOP/s" in table([record((measured(unstable="still drifting"), REGRESSED))])[-1].text


def test_a_pass_of_low_power_says_so() -> None:
    row = table([record((THROUGHPUT, verdict("PASS", is_low_power=True)))])[-1]
    assert row.text.endswith("PASS low power")


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.0775, 0.0785, "+7.80 ±0.05 %"), (0.071, 0.085, "+7.8 ±0.7 %"), (-0.10, 0.26, "+8 ±18 %")],
)
def test_a_change_has_the_digits_that_its_interval_allows(low: float, high: float, shown: str) -> None:
    assert shown in table([record((THROUGHPUT, verdict("PASS", change_low=low, change_high=high)))])[-1].text


def test_the_baseline_is_shown_in_the_unit_of_the_value() -> None:
    slower = measured(value=900e12)
    row = table([record((slower, verdict("REGRESSED", baseline_value=1.1e15)))])[-1].text
    assert "900.0 TFLOP/s" in row
    assert "1100" in row.split()


# A regression


def test_a_regression_says_how_much_what_the_gpu_did_what_differs_and_how_to_accept_it() -> None:
    assert message().splitlines() == [
        "test_matmul[8192-bfloat16] got slower on NVIDIA H100 80GB HBM3",
        "  throughput: 640.2 TFLOP/s, baseline 690.2 TFLOP/s",
        "  slower by 7.8 %, 95 % interval 7.1 % to 8.5 %, tolerance 3.0 %",
        "  SM clock 1402 MHz, baseline 1502 MHz; power 701 W, baseline 698 W; power-capped 97 % of the time",
        "  differs from the baseline: driver 570.86.10 -> 580.159.04; torch 2.12.1 -> 2.13.0",
        "  accept it: gpuperf baseline accept --reason WHY 'perf_tests/test_matmul.py::test_matmul[8192-bfloat16]'",
    ]


def test_a_regression_has_ten_lines_at_most() -> None:
    slow = [
        (measured(f"metric_{i}"), verdict("REGRESSED", metric=f"metric_{i}", change=0.1 + i / 100)) for i in range(9)
    ]
    first = msgspec.structs.replace(slow[0][0], unstable="still uncertain by 1.2 %, wanted 0.50 %")
    accept = "venv/bin/gpuperf baseline accept --results 'a results.jsonl'"
    lines = message((first, slow[0][1]), *slow[1:], accept=accept).splitlines()
    assert len(lines) <= 10
    assert lines[5].startswith("  also slower: metric_1 by 11 %; metric_2 by 12 %; ")
    assert lines[6] == "  unstable: still uncertain by 1.2 %, wanted 0.50 %"
    assert lines[7].startswith(f"  accept it: {accept} --reason WHY ")


def test_metrics_that_did_not_regress_are_not_called_slower() -> None:
    assert "also slower" not in message((THROUGHPUT, REGRESSED), (measured("ttft"), verdict("PASS", metric="ttft")))


@pytest.mark.parametrize("then", [HERE, None])
def test_where_nothing_differs_the_message_says_so(then: Environment | None) -> None:
    assert "  differs from the baseline: nothing that is recorded" in message(then=then).splitlines()


def test_without_telemetry_the_message_says_so() -> None:
    lines = message((measured(telemetry=None), REGRESSED)).splitlines()
    assert lines[3] == "  clocks and power: not measured on this device"


def test_a_baseline_without_clocks_leaves_them_out() -> None:
    one = record()
    text = regression_message(one, REGRESSED, baseline(), THEN, accept="gpuperf baseline accept")
    assert text.splitlines()[3] == "  SM clock 1402 MHz; power 701 W; power-capped 97 % of the time"


def test_the_first_line_names_the_most_likely_cause_and_its_share_and_the_next_ones_the_others() -> None:
    causes = ("kernel a replaced by b, 410 % of the loss", "SM clock 1410 against 1755 MHz, 20 % of the loss")
    one = record((THROUGHPUT, replace(REGRESSED, causes=causes)))
    lines = regression_message(one, one.verdicts[0], baseline(), THEN, accept="a").splitlines()
    assert lines[0] == (
        "test_matmul[8192-bfloat16] got slower on NVIDIA H100 80GB HBM3: kernel a replaced by b, 410 % of the loss"
    )
    assert lines[1] == "  and: SM clock 1410 against 1755 MHz, 20 % of the loss"


def test_a_metric_that_is_no_time_gets_worse_and_not_slower() -> None:
    text = message(
        (measured("peak_memory", value=2e9, unit="B", better="lower"), verdict("REGRESSED", metric="peak_memory"))
    )
    assert "slower" not in text
    assert text.startswith("test_matmul[8192-bfloat16] got worse on ")
    assert "  worse by 7.8 %, " in text


@pytest.mark.parametrize("unit", ["s", "s/tok", "s/req", "FLOP/s", "B/s", "tok/s"])
def test_a_time_or_a_rate_gets_slower(unit: str) -> None:
    assert message((measured(unit=unit), REGRESSED)).startswith("test_matmul[8192-bfloat16] got slower on ")


def test_a_clock_is_told_where_the_power_is_not_known() -> None:
    telemetry = msgspec.structs.replace(TELEMETRY, power_w=None)
    assert "SM clock 1402 MHz, baseline 1502 MHz" in message((measured(telemetry=telemetry), REGRESSED))


def test_the_power_is_told_where_the_clock_is_not_known() -> None:
    telemetry = msgspec.structs.replace(TELEMETRY, sm_clock_mhz=None)
    assert "power 701 W, baseline 698 W" in message((measured(telemetry=telemetry), REGRESSED))


# Notes


def test_where_nothing_was_compared_the_notes_say_so_and_name_the_command() -> None:
    lines = notes([record((THROUGHPUT, NEW)), record((THROUGHPUT, verdict("INVALID")))], record_command=RECORD)
    assert lines[0] == Line(text="Nothing was compared: 1 INVALID, 1 NEW.", colour="yellow")
    assert lines[1] == Line(text="Record the new ones as baselines:  gpuperf baseline record", colour="cyan")


def test_what_is_being_recorded_needs_no_command() -> None:
    assert not any("baseline record" in text for text in noted(record((THROUGHPUT, NEW)), record_command=None))


def test_the_notes_count_what_was_compared() -> None:
    assert noted(record(), record((THROUGHPUT, verdict("PASS"))), record((THROUGHPUT, NEW)))[0] == (
        "2 of 3 metrics compared: 1 PASS, 1 REGRESSED, 1 NEW."
    )


def test_provisional_baselines_are_mentioned_once() -> None:
    young = record((THROUGHPUT, verdict("PASS", is_provisional=True)))
    text = "Provisional baselines (under 5 sessions): the usual noise of such metrics decides, not their own."
    assert noted(young, young).count(text) == 1
    assert text not in noted(record())


@pytest.mark.parametrize("status", ["INCONCLUSIVE", "INVALID", "INCOMPARABLE"])
def test_a_verdict_that_settles_nothing_gives_its_reason(status: Status) -> None:
    one = record((THROUGHPUT, verdict(status, reason="thermal slowdown by the hardware for 12 % of the time")))
    assert f"{status} test_matmul[8192-bfloat16] throughput: thermal slowdown by the hardware for 12 % of the time" in (
        noted(one)
    )


@pytest.mark.parametrize("status", ["INCONCLUSIVE", "INVALID", "INCOMPARABLE"])
def test_a_verdict_that_is_to_pass_in_silence_is_counted_and_not_explained(status: Status) -> None:
    one = record((THROUGHPUT, verdict(status, reason="the reason")))
    assert any(f"1 {status}" in text for text in noted(one, silent=(status,)))
    assert not any("the reason" in text for text in noted(one, silent=(status,)))
    assert any("the reason" in text for text in noted(one, silent=("NEW",)))


@pytest.mark.parametrize("status", ["PASS", "REGRESSED", "IMPROVED", "NEW"])
def test_other_verdicts_do_not_repeat_their_reason(status: Status) -> None:
    assert not any("the reason" in text for text in noted(record((THROUGHPUT, verdict(status, reason="the reason")))))


def test_five_unstable_values_are_named_and_the_others_counted() -> None:
    note = "still uncertain by 1.2 %, wanted 0.50 %"
    seven = [record((measured(unstable=note), REGRESSED), test=f"test_{i}") for i in range(7)]
    told = [text for text in noted(*seven) if text.startswith("~")]
    assert told == [
        *(f"~ unstable test_{i} throughput: {note}" for i in range(5)),
        "~ unstable: 2 more, in the results file",
    ]


def test_a_peak_that_is_not_known_is_mentioned() -> None:
    text = "No peak is known for some of these: floors given as a share of the peak were not checked."
    assert text in noted(record((measured(peak=None), REGRESSED)))
    assert text not in noted(record())
    assert text not in noted(record((measured(peak=None, flop=None), REGRESSED)))  # a time has no peak


def test_a_computed_peak_is_mentioned() -> None:
    text = "Peaks are computed upper bounds (clock and SM count): this GPU is not in the table."
    assert text in noted(record((measured(is_peak_computed=True), REGRESSED)))
    assert text not in noted(record())


def test_a_tolerance_that_noise_swallows_is_mentioned_once() -> None:
    noisy = record((THROUGHPUT, verdict("PASS", minimum_detectable_effect=0.08)))
    told = [text for text in noted(noisy, noisy) if "tolerance" in text]
    detail = "the tolerance of 3.0 % is below the 8.0 % that can be told from noise: widen it, or record more sessions."
    assert told == [f"{noisy.key.test} throughput: {detail}"]


def test_tolerance_of_what_gates_nothing_is_no_matter() -> None:
    host = verdict("PASS", minimum_detectable_effect=0.08, is_host_limited=True)
    assert not [text for text in noted(record((THROUGHPUT, host))) if "tolerance" in text]


def test_more_warnings_than_are_shown_are_counted() -> None:
    noisy = [
        record((measured(name), verdict("PASS", metric=name, minimum_detectable_effect=0.08)))
        for name in ("a", "b", "c", "d", "e")
    ]
    assert any("2 more" in text for text in noted(*noisy))


@settings(deadline=None)
@given(st.lists(st.sampled_from(get_args(Status)), min_size=1, max_size=20))
def test_every_verdict_is_counted(statuses: list[Status]) -> None:
    first = noted(*[record((THROUGHPUT, verdict(status))) for status in statuses])[0]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) ([A-Z]+)\b", first)}
    assert counts == {status: statuses.count(status) for status in set(statuses)}


def test_a_remark_that_rows_share_stands_once_below_the_last() -> None:
    host = {"remark": "limited by the host: GPU busy 64 % of the time", "is_host_limited": True}
    pairs = [(measured(name), verdict("PASS", metric=name, **host)) for name in ("a", "b")]
    pairs.append((measured("c"), verdict("PASS", metric="c")))
    texts = [line.text for line in table([record(*pairs)])]
    assert [text.split()[1] for text in texts[2:4]] == ["a", "b"]
    assert texts[4] == "  limited by the host: GPU busy 64 % of the time"
    assert texts[5].split()[1] == "c"
    assert len(texts) == 6


# The command


def installed(folder: Path, name: str = "gpuperf") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.touch(mode=0o755)
    return path


def test_the_command_is_called_by_name_where_it_is_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path / "bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert command() == "gpuperf"


@pytest.mark.parametrize("other", [False, True])
def test_the_command_is_called_by_its_path_where_the_name_finds_nothing_or_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    installed(tmp_path / "venv" / "bin")
    if other:
        installed(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    assert command() == "venv/bin/gpuperf"


def test_a_command_that_is_not_installed_beside_python_is_called_by_name() -> None:
    assert shutil.which("python", path=str(Path(sys.executable).parent)) is None
    assert command() == "gpuperf"


@pytest.mark.parametrize("action", ["record", "accept", "prune"])
def test_where_everything_is_as_usual_the_command_has_no_options(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = tmp_path / ".gpuperf" / "results.jsonl"
    assert baseline_command(action, tmp_path / "baselines", results) == f"gpuperf baseline {action}"


def test_the_command_names_the_folders_that_it_would_not_find_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perf_tests").mkdir()
    monkeypatch.chdir(tmp_path / "perf_tests")
    told = baseline_command("record", tmp_path / "base lines", tmp_path / ".gpuperf" / "results.jsonl")
    assert told == "gpuperf baseline record --baselines '../base lines' --results ../.gpuperf/results.jsonl"
