"""`gpuperf ab` as its user runs it: revisions of a small repository, real processes, a fake GPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import FAKE_H100, CommandResult, gpuperf
from test_sides import commit, git, only_the_repository_is_left

SUITE = """
import mylib

def test_kernel(gpu_benchmark):
    gpu_benchmark(lambda: mylib.TIME_S)
"""
#: Quick: two pairs, and without plugins that take long to import.
FEW = ("--warmup", "0", "--pairs", "2")
QUICK = ("--", "-p", "no:hypothesispytest", "-p", "no:unraisableexception")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel of 1 ms in `fast`, and of 1.1 ms in `main`; the current folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit(folder, "fast", mylib_py="TIME_S = 1e-3\n", conftest_py=FAKE_H100, test_suite_py=SUITE)
    git(folder, "branch", "fast")
    commit(folder, "ten percent", mylib_py="TIME_S = 1.1e-3\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path / "locks"))
    for name in ("PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def row_of(done: CommandResult) -> list[str]:
    (row,) = [line for line in done.output.splitlines() if line.startswith(" time")]
    return row.split()


def test_ten_percent_planted_in_a_revision_is_slower(repository: Path) -> None:
    done = gpuperf("ab", "fast", "HEAD", *FEW, *QUICK)
    assert done.code == 2, done
    assert row_of(done)[:5] == ["time", "1.000", "ms", "1.100", "ms"]
    assert row_of(done)[5] == "+10.0"
    assert row_of(done)[-2:] == ["2", "SLOWER"]
    lines = done.output.splitlines()
    assert lines[0].startswith("BASE  fast: ")
    assert '"ten percent", imported from its folder' in lines[1]
    assert "on NVIDIA H100 80GB HBM3" in lines
    assert done.errors.count("\n") == 4
    assert done.errors.startswith("pair 1 of at most 2, BASE: ")
    assert only_the_repository_is_left(repository)
    assert git(repository, "status", "--porcelain") == ""


def test_a_working_tree_without_changes_is_the_same_as_its_commit(repository: Path) -> None:
    done = gpuperf("ab", "HEAD", ".", *FEW, *QUICK)
    assert done.code == 0, done
    assert row_of(done)[-1] == "SAME"
    assert "BASE and HEAD are the same: nothing can differ" in done.output


def test_what_noise_leaves_open_is_exit_code_3(repository: Path) -> None:
    done = gpuperf("ab", "HEAD", "HEAD", *FEW, "--tolerance", "0.0001", *QUICK)
    assert done.code == 3, done
    assert row_of(done)[-1] == "UNDECIDED"


def test_a_side_that_fails_is_exit_code_1_with_its_last_words(repository: Path) -> None:
    commit(repository, "broken", mylib_py="raise RuntimeError('no kernel image')\n")
    done = gpuperf("ab", "fast", "HEAD", *FEW, *QUICK)
    assert done.code == 1
    assert "HEAD lost 2 runs in a row. The last that it printed:" in done.output
    assert "RuntimeError: no kernel image" in done.output
    assert "Run it by hand: git worktree add --detach /tmp/try " in done.output
    assert only_the_repository_is_left(repository)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "Missing"),
        (("HEAD",), "Missing"),
        (("mian", "HEAD"), "BASE 'mian' is none of these"),
        (("fast", "HEAD", "--pairs", "1"), "--pairs 1 --warmup 1: need 2 pairs or more"),
        (("fast", "HEAD", "--tolerance", "5"), "tolerance=5.0 is outside 0 to 1"),
        (("fast", "HEAD", "--", "--gpuperf-update"), "--gpuperf-update has no place here"),
        (("fast", "HEAD", "--keep", "."), "--keep . is not an empty folder"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_run(
    repository: Path, arguments: tuple[str, ...], text: str
) -> None:
    done = gpuperf("ab", *arguments)
    assert (done.code, done.output) == (1, "")
    assert done.errors.startswith(f"gpuperf: {text}")
    assert done.errors.count("\n") == 1


def wait_for(path: Path) -> None:
    end_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end_s, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_from_outside_it_leaves_no_worktree_and_no_process(repository: Path, number: signal.Signals) -> None:
    marker = repository.parent / "pid"
    source = f"import os, pathlib, time\npathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    commit(repository, "hangs", mylib_py=source)
    command = [sys.executable, "-c", "from pytest_gpuperf.cli import main; main()", "ab", "HEAD", "fast", *FEW, *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(marker)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Nothing was compared: 0 pairs" in output
    assert "interrupted." in output
    assert only_the_repository_is_left(repository)
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)
