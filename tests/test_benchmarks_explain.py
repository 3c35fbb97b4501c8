"""The benchmark of planted causes: what it keeps when it is cut off, and what it makes of a run that failed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.explain import planted
from pytest_gpuperf.processes import Finished


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are begun, each of which takes 10 s by the clock and ends with nothing measured."""
    names: list[str] = []
    clock = SimpleNamespace(perf_counter=lambda: 10.0 * len(names))

    def run_group(command: list[str], **_: object) -> Finished:
        names.append(Path(command[command.index("--gpuperf-json") + 1]).stem)
        return Finished(code=1, tail="1 failed")

    monkeypatch.setattr(planted, "run_group", run_group)
    monkeypatch.setattr(planted, "time", clock)
    return names


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["planted.py", *arguments, "--device", "cpu"])
    return planted.main()


def test_planted_causes_go_on_where_the_time_was_over_and_a_test_without_a_result_is_a_miss(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(4):
        main(monkeypatch, str(tmp_path), "--budget", "5")
    assert begun == ["record-1", "record-2", "unchanged", "test_algorithm"]
    assert main(monkeypatch, str(tmp_path)) == 1
    assert begun[4:] == [*planted.WORDS][1:]
    rows = json.loads((tmp_path / "planted.json").read_text())["rows"]
    assert [(row["test"], row["status"], row["named"]) for row in rows] == [
        (test, "no result", False) for test in planted.WORDS
    ]
    assert capsys.readouterr().out.splitlines()[-1] == "named: 0 of 7, 7 planted, 6 wanted"


def test_a_planted_cause_whose_run_hung_is_planted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[str]
) -> None:
    main(monkeypatch, str(tmp_path))
    (tmp_path / "test_pass.txt").rename(tmp_path / "test_pass.failed.txt")
    begun.clear()
    main(monkeypatch, str(tmp_path))
    assert begun == ["test_pass"]
