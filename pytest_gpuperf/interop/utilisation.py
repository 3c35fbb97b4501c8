"""How busy leased GPUs were: read where they are leased, sent with the reports of tests, kept by the controller."""

import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:  # imported where a test leases: a run without such tests does not pay for them
    from pytest_gpuperf.analysis.utilisation import LeaseMeter  # noqa: F401 - in the type of meter_key
    from pytest_gpuperf.devices import Device
    from pytest_gpuperf.machine import Machine
    from pytest_gpuperf.records import LeaseUse

meter_key = pytest.StashKey["LeaseMeter"]()


def while_held(config: pytest.Config, machine: "Machine", devices: "Sequence[Device]") -> AbstractContextManager[None]:
    """Read how busy devices are while this process holds them."""
    if machine.nvml is None or all(device.kind == "cpu" for device in devices):
        return nullcontext()
    if meter_key not in config.stash:
        from pytest_gpuperf.analysis.utilisation import LeaseMeter

        config.stash[meter_key] = LeaseMeter(machine.nvml, worker=os.environ.get("PYTEST_XDIST_WORKER"))
    return config.stash[meter_key].holding(devices)


def ended(config: pytest.Config) -> list[str]:
    """Leases of this process that have ended and were not sent yet, as lines of results.jsonl."""
    meter = config.stash.get(meter_key, None)
    if meter is None or not meter.uses:
        return []
    from pytest_gpuperf.records import encode

    return [encode(use).decode() for use in meter.take()]


class SendingHooks:
    """Of every process that runs tests: a report carries the leases that ended before it was made."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Hand the leases over."""
        report = yield
        if lines := ended(item.config):
            report.__dict__["gpuperf_uses"] = lines
        return report


class Keeper(Protocol):
    """Where leases are kept: see `report.controller.Controller`."""

    def add_use(self, use: "LeaseUse") -> None:
        """Put a lease on disk."""


class UseLog:
    """What the controller hears of leases. Alone they are no results: a run that measured nothing leaves the file."""

    def __init__(self) -> None:
        self._uses: list[LeaseUse] = []
        self._kept = 0

    def take(self, lines: Sequence[str], controller: Keeper | None) -> None:
        """Take leases as they were sent, and put all on disk once there are results."""
        if lines:
            import msgspec

            from pytest_gpuperf.records import LeaseUse

            self._uses += [msgspec.json.decode(line, type=LeaseUse) for line in lines]
        if controller is not None:
            for use in self._uses[self._kept :]:
                controller.add_use(use)
            self._kept = len(self._uses)

    def lines(self, per_gpu_hour: float | None) -> list[str]:
        """What the summary says."""
        if not self._uses:
            return []
        from pytest_gpuperf.analysis.utilisation import utilisation_lines

        return utilisation_lines(self._uses, per_gpu_hour=per_gpu_hour)
