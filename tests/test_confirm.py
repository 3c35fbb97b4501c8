"""More runs: when they are made and when not, and what becomes of a fresh process that goes wrong."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from pytest_gpuperf.confirm import Invocation, grown, run_again, settle
from pytest_gpuperf.judge import LOOKS
from pytest_gpuperf.processes import Finished
from pytest_gpuperf.records import (
    SCHEMA,
    Environment,
    Hardware,
    Measurement,
    Method,
    Rerun,
    RunInfo,
    Status,
    TestKey,
    TestRecord,
    Verdict,
    encode,
)

FINE = Finished(code=0, tail="1 passed")


def record_of(name: str = "test_a", *metrics: str, duration_s: float = 1.0, status: Status = "REGRESSED") -> TestRecord:
    names = metrics or ("time",)
    return TestRecord(
        key=TestKey(module="test_m.py", test=name),
        slug="h100",
        devices=("d",),
        environment=Environment(hardware=Hardware(name="H100")),
        measurements=tuple(
            Measurement(
                metric=metric,
                value=1.0,
                unit="s",
                better="lower",
                kind="compute",
                method=Method(clock="wall", mode="recorded"),
            )
            for metric in names
        ),
        verdicts=tuple(Verdict(status=status, metric=metric, reason="Slow.", tolerance=0.03) for metric in names),
        duration_s=duration_s,
    )


def measured(records: Sequence[TestRecord]) -> list[TestRecord]:
    """Every test once more, as long as the first time."""
    return [
        replace(one, more=(*one.more, Rerun(measurements=one.measurements, duration_s=one.duration_s)))
        for one in records
    ]


def settled(
    *records: TestRecord,
    until: int,
    budget_s: float | None = None,
    measure: Callable[[Sequence[TestRecord]], Sequence[TestRecord]] = measured,
) -> tuple[tuple[TestRecord, ...], list[int]]:
    """What `settle` makes of tests that stay open until they have so many runs; and the number of tests a process."""
    processes: list[int] = []
    looks: list[tuple[str, int, int]] = []

    def counted(due: Sequence[TestRecord]) -> Sequence[TestRecord]:
        processes.append(len(due))
        return measure(due)

    def judge(record: TestRecord, look: int) -> TestRecord:
        looks.append((record.key.test, look, 1 + len(record.more)))
        return record

    found = settle(
        records,
        is_open=lambda record, _: 1 + len(record.more) < until,
        judge=judge,
        measure=counted,
        budget_s=budget_s,
    )
    return found, processes


def test_a_test_is_measured_until_the_look_that_settles_it() -> None:
    [record], processes = settled(record_of(), until=3, budget_s=100.0)

    assert (len(record.more), processes) == (2, [1, 1])


def test_six_runs_are_the_most() -> None:
    [record], processes = settled(record_of(), until=99, budget_s=100.0)

    assert 1 + len(record.more) == LOOKS[-1] == 6
    assert len(processes) == 5


def test_what_is_open_is_measured_in_one_process_together() -> None:
    records, processes = settled(record_of("a"), record_of("b"), record_of("c"), until=3, budget_s=100.0)

    assert processes == [3, 3]
    assert [len(record.more) for record in records] == [2, 2, 2]


def test_the_default_budget_is_three_times_the_first_run() -> None:
    [record], _ = settled(record_of(duration_s=2.0, status="INCONCLUSIVE"), until=99)

    assert len(record.more) == 3
    assert record.verdicts[0].reason == "Slow; the budget of 6 s for confirming is spent (--gpuperf-budget)."


@pytest.mark.parametrize(("budget_s", "runs"), [(0.5, 1), (1.0, 1), (1.5, 2), (4.9, 5)])
def test_a_budget_is_in_seconds_of_the_test_itself(budget_s: float, runs: int) -> None:
    [record], _ = settled(record_of(duration_s=1.0), until=99, budget_s=budget_s)

    assert len(record.more) == runs


def test_a_look_comes_early_when_the_budget_is_spent() -> None:
    """One more run is judged too, though a second was wanted."""
    seen: list[int] = []

    def judge(record: TestRecord, look: int) -> TestRecord:
        seen.append(look)
        return record

    settle([record_of()], is_open=lambda *_: True, judge=judge, measure=measured, budget_s=0.5)

    assert seen == [2]


def test_a_problem_ends_the_measuring_of_its_test_alone() -> None:
    def measure(records: Sequence[TestRecord]) -> list[TestRecord]:
        return [
            replace(one, problems=("it crashed",)) if one.key.test == "bad" else measured([one])[0] for one in records
        ]

    records, processes = settled(record_of("bad"), record_of("good"), until=3, budget_s=100.0, measure=measure)

    assert processes == [2, 1]
    assert [len(record.more) for record in records] == [0, 2]
    assert records[0].verdicts[0].reason == "Slow; not confirmed: it crashed."
    assert records[0].verdicts[0].status == "INCONCLUSIVE"


def test_a_verdict_that_passed_is_not_talked_about() -> None:
    [record], _ = settled(record_of(status="PASS"), until=99)

    assert record.verdicts[0].reason == "Slow."


def found_of(*records: TestRecord) -> dict[str, TestRecord]:
    return {str(record.key): record for record in records}


def test_a_good_process_adds_a_run() -> None:
    again = record_of(duration_s=3.0)

    [record] = grown([record_of()], found_of(again), FINE, None)

    assert record.more == (Rerun(measurements=again.measurements, duration_s=3.0),)
    assert record.problems == ()


def test_a_test_that_fails_in_a_fresh_process_says_so() -> None:
    [record] = grown([record_of()], found_of(replace(record_of(), passed=False)), FINE, None)

    assert record.problems == ("the test passed here and failed in a fresh process",)
    assert record.more == ()


def test_other_metrics_are_named() -> None:
    [record] = grown([record_of("t", "a", "b")], found_of(record_of("t", "b", "c")), FINE, None)

    assert record.problems == ("a fresh process measured b, c, this one a, b: the metrics must not vary",)


def test_another_device_is_no_confirmation() -> None:
    [record] = grown([record_of()], found_of(replace(record_of(), devices=("e",))), FINE, None)

    assert record.problems == ("a fresh process measured on another device",)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "ended with exit code 1"),
        (4, "ended with exit code 4"),
        (-9, "was ended by SIGKILL"),
        (None, "did not end in time and was killed"),
    ],
)
def test_a_process_without_a_measurement_says_how_it_ended_and_its_last_words(code: int | None, words: str) -> None:
    [record] = grown([record_of()], {}, Finished(code=code, tail="one\ntwo\n\nout of memory\n=====\n"), None)

    assert record.problems == (
        f"a fresh process was started, but it {words} without a measurement; its last words: two | out of memory",
    )


def test_results_that_cannot_be_read_are_said_to_be() -> None:
    [record] = grown([record_of()], {}, FINE, "its results cannot be read (line 1)")

    assert record.problems == ("a fresh process was started, but its results cannot be read (line 1)",)


def test_a_killed_process_answers_for_the_test_it_was_at_alone() -> None:
    before = [record_of("a"), record_of("b"), record_of("c")]

    after = grown(before, found_of(record_of("a")), Finished(code=-9, tail=""), None)

    assert [len(record.more) for record in after] == [1, 0, 0]
    assert [len(record.problems) for record in after] == [0, 1, 0]


def test_a_process_that_ended_answers_for_all_that_it_did_not_measure() -> None:
    after = grown([record_of("a"), record_of("b")], {}, Finished(code=0, tail="2 skipped"), None)

    assert [len(record.problems) for record in after] == [1, 1]


def test_a_process_that_could_not_begin_answers_for_all() -> None:
    after = grown([record_of("a"), record_of("b")], {}, Finished(code=4, tail="usage"), None)

    assert [len(record.problems) for record in after] == [1, 1]


def test_a_fresh_process_is_given_the_tests_and_its_results_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for pytest: a program that writes down its order and answers with results."""
    answer = tmp_path / "answer.jsonl"
    info = RunInfo(schema=SCHEMA, run_id="r", date="2026-11-21T00:00:00+00:00", visit="v")
    answer.write_bytes(b"".join(encode(one) + b"\n" for one in (info, record_of(duration_s=7.0))))
    program = (
        "import json, os, shutil, sys\n"
        "path = os.environ['GPUPERF_ORDER']\n"
        f"shutil.copy(path, {str(tmp_path / 'order.json')!r})\n"
        f"shutil.copy({str(answer)!r}, json.load(open(path))['results'])\n"
        "assert 'PYTEST_CURRENT_TEST' not in os.environ and 'PYTEST_XDIST_WORKER' not in os.environ\n"
    )
    monkeypatch.setattr("pytest_gpuperf.confirm._command", lambda _: ["python3", "-c", program])
    environment = {**os.environ, "PYTEST_XDIST_WORKER": "gw0", "PYTEST_CURRENT_TEST": "this one"}
    invocation = Invocation(arguments=("-q",), folder=tmp_path, root=tmp_path, environment=environment)

    [record] = run_again([record_of()], invocation, leased=("d",), setup_s=0.0)

    assert record.problems == ()
    assert record.more[0].duration_s == 7.0
    order = (tmp_path / "order.json").read_text()
    assert f'"tests":["{tmp_path}/test_m.py::test_a"]' in order
    assert '"leased":["d"]' in order
