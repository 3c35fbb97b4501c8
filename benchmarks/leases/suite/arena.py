"""Fake GPUs for a dry run, as early as real ones are there; and notes of who held which GPU when, after what wait."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import work

from pytest_gpuperf.devices import Device

asked_key = pytest.StashKey[float]()


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Put the fake GPUs where the plugin looks for them."""
    if os.environ.get(work.DRY):
        from pytest_gpuperf.plugin import machine_key
        from pytest_gpuperf.testing import fake_gpu, fake_machine

        early_config.stash[machine_key] = fake_machine(*map(fake_gpu, range(int(os.environ[work.GPUS]))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note when a test begins to ask for its devices."""
    item.stash[asked_key] = time.monotonic()


@pytest.fixture
def noted(gpus: tuple[Device, ...], request: pytest.FixtureRequest) -> Iterator[tuple[Device, ...]]:
    """The devices, ready for work, with a line at the begin and the end of their use, and when they were ready."""
    path = Path(os.environ[work.NOTES]) / f"{os.getpid()}.txt"
    uuids = ",".join(device.uuid for device in gpus)
    with path.open("a", buffering=1) as file:
        begin_s = time.monotonic()
        file.write(f"begin {begin_s} {uuids} {request.node.name} {begin_s - request.node.stash[asked_key]}\n")
        work.warm_up([device.device for device in gpus])
        file.write(f"ready {time.monotonic()}\n")
        yield gpus
        file.write(f"end {time.monotonic()} {uuids} {request.node.name}\n")
