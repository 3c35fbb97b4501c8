"""Fixtures that the whole suite shares."""

import os
import signal
from collections.abc import Iterator

import pytest

pytest_plugins = ["pytester"]


def pytest_configure() -> None:
    """Take back Ctrl-C, which a shell makes `make test &` and all that it starts ignore: tests send it to both."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
