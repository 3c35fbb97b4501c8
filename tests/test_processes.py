"""The end of a process group: whatever hangs, whoever waits for it goes on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_gpuperf import processes
from pytest_gpuperf.processes import is_running, run_group
from pytest_gpuperf.workloads import vllm_process
from pytest_gpuperf.workloads.vllm_process import HostProcess

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


class Stuck(subprocess.Popen[bytes]):
    """A process that the kernel cannot end, as one that waits for a GPU that fell off the bus."""

    made: "list[Stuck]"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[call-overload]
        self.made.append(self)

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "this would wait for ever"
        raise subprocess.TimeoutExpired(str(self.args), timeout)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Stuck, "made", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Stuck)
    monkeypatch.setattr(processes, "_GRACE_S", 0.1)
    yield
    for one in Stuck.made:
        one.kill()
        super(Stuck, one).wait(10)


@pytest.mark.usefixtures("stuck")
def test_a_command_that_cannot_be_killed_is_not_waited_for() -> None:
    assert run_group(SLEEP, timeout_s=0.1).in_words == "did not end in time and was killed"


@pytest.mark.usefixtures("stuck")
def test_an_engine_that_cannot_be_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "_GROUP_S", 0.1)
    process = HostProcess(SLEEP, environment=dict(os.environ), log=tmp_path / "log", name="an engine")
    begin_s = time.monotonic()
    process.kill()
    assert not process.is_open
    assert time.monotonic() - begin_s < 5


def test_a_process_runs_until_it_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_running(process.pid)
    process.communicate(b"\n")
    assert not is_running(process.pid)


@pytest.mark.parametrize("pid", [0, -1, 2**70])
def test_what_can_be_no_process_does_not_run(pid: int) -> None:
    """As a damaged lock file may say; to the system 0 and below are groups."""
    assert not is_running(pid)


def test_a_process_that_may_not_be_signalled_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, which /proc may hide."""

    def kill(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert is_running(12)
