"""The benchmark of leases on GPUs: what it takes for a shared GPU, and that it ends."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.leases import eight_gpus
from benchmarks.leases.eight_gpus import (
    Bench,
    Phase,
    Sample,
    crowded,
    holds_in,
    is_good,
    overlaps_of,
    span_s_in,
    waits_by_size,
    waits_in,
)
from pytest_gpuperf.processes import is_running
from pytest_gpuperf.testing import FakeNvml, fake_gpu

TEST = eight_gpus.Test(name="test_one[0]", device=("a",), worker="gw0", time_s=0.1, duration_s=1.0)
GOOD = Phase(
    name="together",
    wall_s=9.0,
    tests_s=1.0,
    ending="ended with exit code 0",
    tail="",
    tests=(TEST,),
    overlaps=0,
    shared_samples=0,
    samples=(),
)


def looks(*memory_mb: int | None) -> list[Sample]:
    return [
        Sample(time_s=0, uuid="a", processes=1, memory_bytes=None if mb is None else mb * 10**6, busy_share=None)
        for mb in memory_mb
    ]


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def test_holds_of_one_gpu_at_the_same_time_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "1", "begin 1 a one\nready 2\nend 5 a one\n")
    write(tmp_path, "2", "begin 5 a,b two\nready 6\nend 7 a,b two\n")
    assert overlaps_of(holds_in(tmp_path)) == 0
    assert span_s_in(tmp_path) == 5
    write(tmp_path, "3", "begin 6.5 b three\nready 6.6\nend 8 b three\n")
    assert overlaps_of(holds_in(tmp_path)) == 1


def test_a_hold_that_never_ended_overlaps_all_that_come_after(tmp_path: Path) -> None:
    write(tmp_path, "1", "begin 1 a one\n")
    write(tmp_path, "2", "begin 9 a two\nready 9\nend 10 a two\n")
    assert overlaps_of(holds_in(tmp_path)) == 1


def test_waits_are_told_by_the_number_of_gpus(tmp_path: Path) -> None:
    write(tmp_path, "1", "begin 1 a one 0.5\nready 2\nend 5 a one\nbegin 6 b two 1.5\n")
    write(tmp_path, "2", "begin 5 a,b three 7.5\nready 6\nend 7 a,b three\nbegin 9 a fo")
    assert waits_by_size(waits_in(tmp_path)) == {1: [0.5, 1.5], 2: [7.5]}


def test_a_benchmark_that_is_ended_from_outside_ends_its_tests_and_leaves_what_it_saw(tmp_path: Path) -> None:
    output = tmp_path / "seen.json"
    arguments = ("--dry", "--tests=4", "--alone=1", "--seconds=1", f"--output={output}")
    bench = subprocess.Popen([sys.executable, eight_gpus.__file__, *arguments], stdout=subprocess.DEVNULL)
    while not output.exists():
        assert bench.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
    while not children.read_text():
        time.sleep(0.01)
    child = int(children.read_text().split()[0])
    time.sleep(0.3)  # Python can be interrupted while it starts a process, and then knows nothing of it
    bench.terminate()
    bench.wait(timeout=30)
    assert not is_running(child)
    assert [phase["name"] for phase in json.loads(output.read_text())["phases"]] == ["alone on GPU 0"]


def test_a_second_process_is_seen_by_its_memory() -> None:
    alone = looks(100, 900, 880, 100)
    assert crowded(alone, looks(100, 900, 930)) == 0
    assert crowded(alone, looks(100, 900, 1450, 1700)) == 2


@pytest.mark.parametrize("alone", [[], looks(None, None), looks(100, 100)])
def test_memory_that_was_never_seen_tells_nothing(alone: list[Sample]) -> None:
    assert crowded(alone, looks(100, 5000)) is None


@pytest.mark.parametrize(
    ("phase", "is_well"),
    [
        (GOOD, True),
        (replace(GOOD, tests=()), False),
        (replace(GOOD, tail="It printed nothing."), False),
        (replace(GOOD, overlaps=1), False),
        (replace(GOOD, shared_samples=1), False),
        (replace(GOOD, shared_samples=1, name="mixed"), True),
    ],
)
def test_what_a_phase_must_have_been(phase: Phase, is_well: bool) -> None:
    assert is_good(phase, 1) is is_well


def test_a_phase_that_runs_out_of_time_is_ended_and_no_success(tmp_path: Path) -> None:
    bench = Bench(tmp_path, FakeNvml(fake_gpu(0)), limit_s=0.0, is_dry=True)
    phase = bench.run("alone", "test_many.py", 50, seconds=5.0, visible=None)
    assert phase.ending == "did not end in time and was killed"
    assert phase.wall_s < 8
    assert phase.tail
    assert not is_good(phase, len(phase.tests))
