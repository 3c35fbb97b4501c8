"""Running two sides alternately: order, faults, the end, and what a user reads of it. The pythons are shell scripts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import FAKE_H100
from msgspec.structs import replace
from test_paired import measurement, record, results, timed

from pytest_gpuperf.devices import Device, find_devices
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Environment, Hardware, Results, TestKey, encode
from pytest_gpuperf.report.ab import header, report
from pytest_gpuperf.testing import FakeNvml, fake_gpu
from pytest_gpuperf.trials.ab import (
    Comparison,
    Plan,
    check_plan,
    command,
    interrupted_by_sigterm,
    pinned,
    run_ab,
    tolerance_of,
)
from pytest_gpuperf.trials.paired import Label
from pytest_gpuperf.trials.sides import Side

#: Stands for a side's python: notes its turn, then does what the file named by its turn says, or `default`.
SCRIPT = """#!/bin/sh
for argument in "$@"; do case "$argument" in --gpuperf-json=*) out="${{argument#*=}}" ;; esac; done
cd "{folder}"
echo {label} >> ../turns
echo "$CUDA_VISIBLE_DEVICES" >> visible
turn=$(grep -c {label} ../turns)
if [ -e "$turn.sh" ]; then . "./$turn.sh"; else . ./default.sh; fi
"""


def text_of(found: Results) -> str:
    lines = [found.run, *found.tests, *([found.end] if found.end else [])]
    return "".join(encode(line).decode() + "\n" for line in lines)


def writes(found: Results) -> str:
    """A run that ends well."""
    return f"cat > \"$out\" <<'END'\n{text_of(found)}END\n"


def side(folder: Path, label: Label, default: str, **turns: str) -> Side:
    """A side whose runs do `default`, or at a turn such as `_2` what is given for it."""
    own = folder / label
    own.mkdir()
    for name, text in {"default": default, **{turn.strip("_"): text for turn, text in turns.items()}}.items():
        (own / f"{name}.sh").write_text(text)
    python = own / "python"
    python.write_text(SCRIPT.format(folder=own, label=label))
    python.chmod(0o755)
    return Side(
        label=label, python=python, folder=own, description=f"{label} side", identity=label, by_hand=f"{label}-python"
    )


class Sides:
    """Two sides in a folder.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    def run(self, base: Side, head: Side, **changes: Any) -> Comparison:
        """Compare, without warm-up unless asked for."""
        run_changes = {name: changes.pop(name) for name in ("gpus", "clock") if name in changes}
        return run_ab(base, head, Plan(**{"warmup": 0, **changes}), say=self.said.append, **run_changes)

    def same(self, **changes: Any) -> Comparison:
        """Compare what does not differ."""
        return self.run(self.good("BASE"), self.good("HEAD"), **changes)

    def good(self, label: Label, value_s: float = 1e-3, **turns: str) -> Side:
        """A side that measures the same value in each run, but at the turns given."""
        return side(self.folder, label, writes(timed(value_s)), **turns)

    @property
    def turns(self) -> str:
        """Initials of the sides, in the order of their runs."""
        return "".join(line[0] for line in (self.folder / "turns").read_text().split())


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    return Sides(tmp_path)


def lines_of(comparison: Comparison, width: int = 80) -> list[str]:
    return [line.text for line in report(comparison, width=width)]


# Order and end


def test_sides_take_turns_so_that_a_drift_cancels(sides: Sides) -> None:
    sides.run(sides.good("BASE"), side(sides.folder, "HEAD", writes(timed(1.03e-3))), tolerance=0.029, pairs=4)
    assert sides.turns == "BHHBBHHB"


def test_it_ends_when_every_metric_is_decided(sides: Sides) -> None:
    comparison = sides.same()
    assert (comparison.ending, comparison.pairs, comparison.outcome) == ("decided", 3, "good")
    assert sides.turns == "BHHBBH"


def test_a_slower_head_is_slower(sides: Sides) -> None:
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", 1.2e-3))
    assert comparison.outcome == "slower"
    assert "   1.000 ms      1.200 ms  +20.0 ±" in lines_of(comparison)[4]
    assert lines_of(comparison)[4].endswith("  SLOWER")


def test_a_faster_head_is_good(sides: Sides) -> None:
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", 0.8e-3))
    assert comparison.outcome == "good"
    assert lines_of(comparison)[4].endswith("  FASTER")


def test_what_noise_leaves_open_is_undecided_and_says_what_may_settle_it(sides: Sides) -> None:
    noisy = {f"_{turn}": writes(timed(1e-3 * (1.5 if turn % 2 else 1))) for turn in range(1, 4)}
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", 1e-3, **noisy), pairs=3)
    assert (comparison.ending, comparison.outcome) == ("pairs", "undecided")
    remedy = next(line for line in lines_of(comparison) if line.startswith("UNDECIDED at"))
    assert remedy.startswith("UNDECIDED at a tolerance of 3.0 % (these pairs see ")
    assert remedy.endswith(" at best): more pairs (--pairs) may settle it, or a wider --tolerance.")


def test_warm_up_runs_do_not_count(sides: Sides) -> None:
    slow_first = {"_1": writes(timed(9e-3))}
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", 1e-3, **slow_first), warmup=1)
    assert comparison.outcome == "good"
    assert sides.turns == "BHBHHBBH"
    assert sides.said[0].startswith("warm-up, BASE: ")


def test_no_pair_is_begun_that_would_not_end_within_the_budget(sides: Sides) -> None:
    seconds = iter(range(0, 1000, 10))  # begun at 10 s, pair 1 lasts from 20 s to 30 s: another would not end by 35 s
    comparison = sides.same(budget_s=25.0, clock=lambda: float(next(seconds)))
    assert comparison.ending == "budget"
    assert comparison.pairs == 1
    assert "the budget is spent" in " ".join(lines_of(comparison))


def test_ctrl_c_prints_what_is_known(sides: Sides) -> None:
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", 1.2e-3, _3="kill -INT $PPID; sleep 60"))
    assert (comparison.ending, comparison.outcome, comparison.pairs) == ("interrupted", "interrupted", 2)
    assert comparison.metrics[0].paired is not None
    assert comparison.metrics[0].paired.pairs == 2
    assert "interrupted." in " ".join(lines_of(comparison))


def test_an_interrupt_before_the_first_pair_says_that_nothing_was_compared(sides: Sides) -> None:
    comparison = sides.run(sides.good("BASE", 1e-3, _1="kill -INT $PPID; sleep 60"), sides.good("HEAD"))
    assert lines_of(comparison) == ["Nothing was compared: 0 pairs in 0 s, interrupted."]


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


def test_sigterm_is_treated_as_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        kill_me()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Faults: a pair is lost, two of one side in a row end it


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("sleep 60", "it did not end in time and was killed"),
        ("kill -9 $$", "it was ended by SIGKILL"),
        ("echo rubbish > $out", "its results cannot be read: Not a results file of pytest-gpuperf: "),
        ("exit 0", "no test measured anything (exit code 0)"),
        ("echo CUDA out of memory; exit 1", "the tests failed before they measured anything (exit code 1)"),
        ("exit 2", "pytest was interrupted, or the tests could not be imported (exit code 2)"),
        ("exit 4", "pytest refused its arguments (exit code 4)"),
        ("exit 5", "no tests were collected (exit code 5)"),
        ("exit 77", "it measured nothing (exit code 77)"),
        (writes(replace(timed(1e-3), end=None)), "it ended before all tests had their turn (exit code 0)"),
        (writes(timed(1e-3)) + "exit 3", "it ended before all tests had their turn (exit code 3)"),
    ],
)
def test_a_run_that_fails_loses_its_pair_and_nothing_else(sides: Sides, fault: str, problem: str) -> None:
    comparison = sides.run(
        sides.good("BASE"), sides.good("HEAD", 1.2e-3, _2=fault), run_limit_s=0.5 if "sleep" in fault else 60.0, pairs=4
    )
    assert comparison.outcome == "slower"
    assert comparison.metrics[0].paired is not None
    assert comparison.metrics[0].paired.pairs == 2
    assert sides.turns == "BHHBH"  # the other run of the lost pair is not begun
    (lost,) = comparison.lost
    assert lost.startswith(f"pair 2 of at most 4, HEAD: {problem}")
    assert f"lost: {lost}" in lines_of(comparison)


def test_two_lost_runs_of_a_side_in_a_row_end_it_with_its_output(sides: Sides) -> None:
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", _2="exit 1", _3="echo CUDA out of memory; exit 1"))
    assert (comparison.ending, comparison.outcome) == ("failed", "error")
    assert comparison.problem is not None
    assert comparison.problem.splitlines() == [
        "HEAD lost 2 runs in a row. The last that it printed:",
        "  CUDA out of memory",
        "Run it by hand: HEAD-python -m pytest ",
    ]
    assert lines_of(comparison)[-1] == comparison.problem
    assert comparison.metrics[0].paired is not None  # of the first pair: it is not lost


def test_a_side_that_fails_now_and_then_does_not_end_it(sides: Sides) -> None:
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", _2="exit 1", _4="exit 1"), pairs=5)
    assert comparison.ending != "failed"
    assert len(comparison.lost) == 2


def test_a_python_that_cannot_be_started_is_a_lost_run(sides: Sides) -> None:
    gone = replace(sides.good("BASE"), python=sides.folder / "gone")
    comparison = sides.run(gone, sides.good("HEAD"))
    assert comparison.outcome == "error"
    assert f"{sides.folder}/gone cannot be started: No such file or directory" in (comparison.problem or "")


# Sides that measure different things


def test_metrics_of_one_side_are_named_and_do_not_decide(sides: Sides) -> None:
    other = replace(record(measurement()), key=TestKey(module="test_a.py", test="test_new"))
    head = side(sides.folder, "HEAD", writes(results(record(measurement()), other)))
    comparison = sides.run(sides.good("BASE"), head)
    assert comparison.outcome == "good"
    assert "only in HEAD: test_a.py::test_new time (there is no such test)" in lines_of(comparison)


def test_sides_without_a_common_metric_are_an_error(sides: Sides) -> None:
    other = replace(record(measurement()), key=TestKey(module="test_a.py", test="test_new"))
    comparison = sides.run(sides.good("BASE"), side(sides.folder, "HEAD", writes(results(other))), pairs=2)
    assert comparison.outcome == "error"
    assert any(line.startswith("Nothing was compared: 2 pairs") for line in lines_of(comparison))


def test_dropped_pairs_are_counted_and_explained(sides: Sides) -> None:
    elsewhere = writes(results(record(measurement(), devices=("bbbb",))))
    comparison = sides.run(sides.good("BASE"), sides.good("HEAD", _1=elsewhere), pairs=4)
    assert "dropped 1 pair of test_a.py::test_kernel time: pair 1: BASE ran on device aaaa, HEAD on bbbb" in lines_of(
        comparison
    )


def test_a_metric_of_which_all_pairs_are_dropped_is_undecided(sides: Sides) -> None:
    elsewhere = side(sides.folder, "HEAD", writes(results(record(measurement(), devices=("bbbb",)))))
    comparison = sides.run(sides.good("BASE"), elsewhere, pairs=2)
    assert comparison.outcome == "undecided"
    assert lines_of(comparison)[4].split() == ["time", "-", "-", "-", "0", "UNDECIDED"]
    assert "UNDECIDED at a tolerance of 3.0 %: more pairs" in " ".join(lines_of(comparison))


# One GPU for all runs


def gpus(count: int) -> tuple[Device, ...]:
    return find_devices(FakeNvml(*(fake_gpu(index) for index in range(count))), cuda_visible_devices=None)


def on(*devices: Device) -> Results:
    return results(record(measurement(), devices=tuple(device.uuid_hash for device in devices)))


def test_of_several_gpus_all_runs_use_the_one_of_the_first(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = gpus(2)
    runs = [side(sides.folder, label, writes(on(two[1]))) for label in ("BASE", "HEAD")]
    sides.run(*runs, gpus=two)
    assert (sides.folder / "BASE/visible").read_text().split("\n")[:2] == ["", two[1].uuid]
    assert (sides.folder / "HEAD/visible").read_text().split("\n")[0] == two[1].uuid


def test_nothing_is_confined_where_there_is_no_choice_or_a_test_needs_several() -> None:
    one, two = gpus(1), gpus(2)
    assert pinned(on(*one), one) == {}
    assert pinned(on(*two), two) == {}
    assert pinned(timed(1.0), two) == {}  # on a CPU
    assert pinned(timed(1.0), ()) == {}


# The plan


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pairs": 1}, "--pairs 1 --warmup 1: need 2 pairs or more, 0 warm-up runs or more."),
        ({"warmup": -1}, "--pairs 7 --warmup -1: need"),
        ({"budget_s": 0.0}, "--budget 0 is not a number of seconds above zero."),
        ({"run_limit_s": float("nan")}, "--timeout nan is not a number of seconds above zero."),
        ({"pytest_arguments": ("--gpuperf-json=x",)}, "--gpuperf-json has no place here: ab compares two sides"),
        ({"pytest_arguments": ("--gpuperf-update",)}, "--gpuperf-update has no place here"),
    ],
)
def test_a_wrong_plan_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_plan(Plan(**changes))
    assert str(caught.value).startswith(text)


def test_a_folder_with_older_results_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "1-base.jsonl").touch()
    with pytest.raises(UsageError, match=r"--keep .* is not an empty folder\. Name a new one"):
        check_plan(Plan(keep=tmp_path))


def test_results_and_outputs_of_all_runs_are_kept(sides: Sides) -> None:
    keep = sides.folder / "new/kept"
    sides.run(sides.good("BASE", _2="echo broken; exit 1"), sides.good("HEAD"), keep=keep, pairs=2)
    assert sorted(path.name for path in keep.iterdir()) == [
        *("1-base.jsonl", "1-base.log", "1-head.jsonl", "1-head.log"),
        *("2-base.log", "2-head.jsonl", "2-head.log"),
    ]
    assert (keep / "2-base.log").read_text() == "broken\n"


@pytest.mark.parametrize(("text", "value"), [(None, None), ("0.03", 0.03), ("3%", 0.03)])
def test_a_tolerance_is_a_fraction_or_has_a_sign(text: str | None, value: float | None) -> None:
    assert tolerance_of(text) == value


@pytest.mark.parametrize("text", ["5", "three"])
def test_other_tolerances_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="tolerance="):
        tolerance_of(text)


def test_the_current_folder_is_not_imported_in_place_of_what_is_installed(sides: Sides) -> None:
    started = command(sides.good("BASE"), Plan(pytest_arguments=("perf_tests",)), sides.folder / "1-base.jsonl")
    assert started[1:4] == ["-P", "-m", "pytest"]
    assert "perf_tests" in started


def test_anchors_are_left_out_unless_they_are_asked_for(sides: Sides) -> None:
    plan = Plan(pytest_arguments=("perf_tests", "--gpuperf-anchors=on"))
    started = command(sides.good("BASE"), plan, sides.folder / "1-base.jsonl")
    assert started.index("--gpuperf-anchors=off") < started.index("--gpuperf-anchors=on")  # the last one counts


def test_a_real_pytest_compares_nothing_and_writes_nothing_else(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(FAKE_H100)
    pytester.makepyfile(test_suite="def test_kernel(gpu_benchmark):\n    gpu_benchmark(lambda: 1e-3)\n")
    here = Side(
        label="BASE", python=Path(sys.executable), folder=pytester.path, description="", identity="", by_hand=""
    )
    path = pytester.path / "out/1-base.jsonl"
    path.parent.mkdir()
    done = subprocess.run(command(here, Plan(), path), cwd=pytester.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert not (pytester.path / ".gpuperf").exists()
    assert not (pytester.path / "baselines").exists()


# What a user reads


def test_the_table_fits_80_columns(sides: Sides) -> None:
    kinds: list[Callable[[str], Results]] = [
        lambda test: results(
            record(measurement(123.456e12, unit="FLOP/s", better="higher"), key=TestKey(module="test_a.py", test=test))
        )
    ]
    (make,) = kinds
    found = results(*make("test_short[8192]").tests, *make(f"test_long[{'x' * 60}]").tests)
    comparison = sides.run(*(side(sides.folder, label, writes(found)) for label in ("BASE", "HEAD")))
    lines = lines_of(comparison)
    assert max(map(len, lines)) <= 80
    assert f" {'x' * 60} time" in lines  # not cut: two names could look the same
    assert any("123.5 TFLOP/s 123.5 TFLOP/s" in line for line in lines)


def test_the_versions_that_differ_are_named(sides: Sides) -> None:
    newer = Environment(hardware=Hardware(name="H100", memory_bytes=80 * 10**9), versions={"torch": "2.11"})
    head = side(sides.folder, "HEAD", writes(results(record(measurement(), environment=newer))))
    lines = lines_of(sides.run(sides.good("BASE"), head))
    assert lines[:2] == ["on H100", "versions that differ: torch 2.10 -> 2.11"]


def test_without_differing_versions_it_says_so(sides: Sides) -> None:
    assert lines_of(sides.same())[1] == "versions that differ: none that is recorded"


def test_many_notes_are_counted(sides: Sides) -> None:
    others = [replace(record(measurement()), key=TestKey(module="test_a.py", test=f"test_{i}")) for i in range(12)]
    head = side(sides.folder, "HEAD", writes(results(record(measurement()), *others)))
    lines = lines_of(sides.run(sides.good("BASE"), head))
    assert sum(line.startswith("only in HEAD") for line in lines) == 8
    assert lines[-1] == "and 4 more notes"


def test_the_header_says_what_the_sides_are_in_80_columns(sides: Sides) -> None:
    base = replace(sides.good("BASE"), description="a revision " + "with a long subject " * 5)
    first, second = (line.text for line in header(base, sides.good("HEAD")))
    assert first.startswith("BASE  a revision with")
    assert max(map(len, first.splitlines())) <= 80
    assert second == "HEAD  HEAD side"
