"""Fixtures that the whole suite shares."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def pytest_configure() -> None:
    """Take back the signals that a shell makes `make test &` and all that it starts ignore: tests send them."""
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)


@pytest.fixture(autouse=True)
def what_cuda_shows_stays() -> Iterator[None]:
    """Where a GPU does not answer, the plugin narrows what CUDA shows for the rest of the process."""
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process of another family: its parent, a shell in a session of its own, has ended."""
    shell = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid = int(shell.communicate(timeout=10)[0])
    if _parent(pid) in (os.getpid(), os.getppid()):
        os.kill(pid, signal.SIGKILL)
        pytest.skip("orphans are given to this process or its parent here, so nobody is a stranger")
    yield pid
    os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("PPid:"))
