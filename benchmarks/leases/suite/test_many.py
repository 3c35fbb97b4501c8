"""Many tests of one GPU, each of the same work."""

import os

import pytest
import work

from pytest_gpuperf.devices import Device
from pytest_gpuperf.recorder import Recorder


@pytest.mark.parametrize("_number", range(int(os.environ[work.TESTS])))
def test_one(noted: tuple[Device, ...], perf: Recorder, _number: int) -> None:
    perf.record("time", work.median_s([device.device for device in noted], int(os.environ[work.BLOCKS])), unit="s")
