"""`gpuperf selftest`: what counts as proof, and one real run on the CPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from pytest_gpuperf import selftest
from pytest_gpuperf.records import Status, Verdict
from pytest_gpuperf.selftest import PLANTED, Outcome, SelftestFailed, is_proven


def outcome(planted: float, *statuses: Status) -> Outcome:
    verdicts = {
        f"test_{number}": Verdict(status=status, metric="time", reason="", tolerance=0.01)
        for number, status in enumerate(statuses)
    }
    return Outcome(planted=planted, verdicts=verdicts)


def test_same_code_that_passes_and_the_largest_slowdown_caught_everywhere_is_proof() -> None:
    outcomes = [
        outcome(0.0, "PASS", "PASS"),
        outcome(0.02, "INCONCLUSIVE", "PASS"),
        outcome(0.05, "REGRESSED", "INCONCLUSIVE"),
        outcome(0.10, "REGRESSED", "REGRESSED"),
    ]

    assert is_proven(outcomes)


@pytest.mark.parametrize("same", ["PASS", "IMPROVED", "INCONCLUSIVE"])
def test_same_code_need_only_not_be_red(same: Status) -> None:
    assert is_proven([outcome(0.0, "PASS", same), outcome(0.1, "REGRESSED", "REGRESSED")])


def test_same_code_that_is_red_in_one_test_is_no_proof() -> None:
    assert not is_proven([outcome(0.0, "PASS", "REGRESSED"), outcome(0.1, "REGRESSED", "REGRESSED")])


@pytest.mark.parametrize("largest", ["PASS", "INCONCLUSIVE", "NEW", "INVALID", "INCOMPARABLE", "IMPROVED"])
def test_largest_slowdown_that_one_test_misses_is_no_proof(largest: Status) -> None:
    assert not is_proven([outcome(0.0, "PASS", "PASS"), outcome(0.1, "REGRESSED", largest)])


@pytest.mark.parametrize("same", ["NEW", "INVALID", "INCOMPARABLE"])
def test_same_code_that_was_not_compared_is_no_proof(same: Status) -> None:
    assert not is_proven([outcome(0.0, "PASS", same), outcome(0.1, "REGRESSED", "REGRESSED")])


def test_no_verdicts_are_no_proof() -> None:
    assert not is_proven([outcome(0.0), outcome(0.1)])


def test_test_that_is_missing_from_the_last_process_is_no_proof() -> None:
    assert not is_proven([outcome(0.0, "PASS", "PASS"), outcome(0.1, "REGRESSED")])


def test_test_that_is_missing_from_the_first_process_is_no_proof() -> None:
    assert not is_proven([outcome(0.0, "PASS"), outcome(0.1, "REGRESSED", "REGRESSED")])


def test_test_that_is_missing_from_a_process_between_is_no_proof() -> None:
    outcomes = [outcome(0.0, "PASS", "PASS"), outcome(0.05, "PASS"), outcome(0.1, "REGRESSED", "REGRESSED")]

    assert not is_proven(outcomes)


def test_baseline_is_of_three_processes() -> None:
    assert selftest.BASELINE_RUNS == 3


def test_slowdowns_are_planted_in_rising_order() -> None:
    assert list(PLANTED) == sorted(PLANTED)


def test_process_that_measures_nothing_is_reported_with_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "BASELINE_RUNS", 1)
    with pytest.raises(SelftestFailed, match=r"The selftest measured nothing:\n(.|\n)*there is no GPU"):
        selftest.selftest(tmp_path, device="cuda")


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_selftest_judges_the_same_code_and_a_planted_slowdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "BASELINE_RUNS", 1)
    monkeypatch.setattr(selftest, "PLANTED", (9.0,))
    told: list[str] = []
    outcomes = selftest.selftest(tmp_path, device="cpu", report=told.append)

    assert told == ["baseline 1 of 1", "the same code", "900% planted"]
    assert [each.planted for each in outcomes] == [0.0, 9.0]
    assert all(list(each.verdicts) == ["test_copy", "test_matmul"] for each in outcomes)
    assert all(verdict.sessions == 1 for each in outcomes for verdict in each.verdicts.values())
    assert {verdict.status for verdict in outcomes[-1].verdicts.values()} == {"REGRESSED"}
