"""The benchmark of tuning: visits of ten minutes, of which each goes on from the files of the one before."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engines import FakeVllm, plan

from benchmarks.llm import tuned
from pytest_gpuperf.trials.tune import tune
from pytest_gpuperf.trials.tune_file import Journal


class Commands:
    """Stands where `gpuperf tune` is started: notes its arguments, and lets time pass."""

    def __init__(self, *, takes_s: float, codes: tuple[int, ...]) -> None:
        self.seen: list[list[str]] = []
        self.now_s = 0.0
        self._takes_s = takes_s
        self._codes = codes

    def run(self, command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        assert not check
        self.seen.append(command)
        self.now_s += self._takes_s
        return subprocess.CompletedProcess(command, self._codes[len(self.seen) - 1])

    def budgets(self, option: str = "--budget") -> list[str]:
        return [command[command.index(option) + 1] for command in self.seen]


def run_main(monkeypatch: pytest.MonkeyPatch, commands: Commands, *arguments: str) -> int:
    monkeypatch.setattr(tuned, "subprocess", SimpleNamespace(run=commands.run))
    monkeypatch.setattr(tuned, "time", SimpleNamespace(monotonic=lambda: commands.now_s))
    monkeypatch.setattr(sys, "argv", ["tuned.py", *arguments])
    return tuned.main()


def test_the_budget_is_that_of_all_models_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands(takes_s=300.0, codes=(0, 0))
    arguments = ("--output", str(tmp_path), "--budget", "480", "--pairs", "0")
    assert run_main(monkeypatch, commands, *arguments) == 0
    assert commands.budgets() == ["480", "180"]
    assert commands.budgets("--timeout") == ["240", "90"]  # one that hangs is ended within it
    late = Commands(takes_s=450.0, codes=(0,))
    assert run_main(monkeypatch, late, *arguments) == 3
    assert late.budgets() == ["480"]
    assert "== qwen2.5-7b: no time left" in capsys.readouterr().out


def test_a_tuning_that_was_killed_is_not_called_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, Commands(takes_s=1.0, codes=(-9, 0)), "--output", str(tmp_path)) == 1


def test_what_was_measured_before_is_in_the_table_whatever_became_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(Journal(tmp_path / "llama-3-8b", plan()), FakeVllm(interrupt_after=3).bench)
    run_main(monkeypatch, Commands(takes_s=1.0, codes=(-15,)), "--output", str(tmp_path), "--model", "llama-3-8b")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| llama-3-8b")]
    assert row.startswith(
        "| llama-3-8b | 1,000 | quantization fp8, of 3 points measured (18 levels) | tuned / default:"
    )
    assert row.endswith("at most 1.100, unpaired | open: no pairs |")
