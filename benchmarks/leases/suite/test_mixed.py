"""Tests of one, two and all GPUs, mixed, so that the large ones meet devices that small ones hold."""

import os

import pytest
import work

from pytest_gpuperf.devices import Device
from pytest_gpuperf.recorder import Recorder

GPUS = int(os.environ[work.GPUS])
BLOCKS = int(os.environ[work.BLOCKS])


def measure(devices: tuple[Device, ...], perf: Recorder) -> None:
    perf.record("time", work.median_s([device.device for device in devices], BLOCKS), unit="s")


def sizes() -> list[int]:
    """Two thirds of the tests for one GPU, every sixth for two, and every twelfth for all."""
    tests = int(os.environ[work.TESTS])
    wanted = [GPUS if number % 12 == 5 else 2 if number % 6 == 2 else 1 for number in range(tests)]
    return [min(size, GPUS) for size in wanted]


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=pytest.mark.gpu(count=size), id=f"{i}-{size}") for i, size in enumerate(sizes())]
)
def test_mixed(noted: tuple[Device, ...], perf: Recorder, size: int) -> None:
    assert len(noted) == size
    measure(noted, perf)
