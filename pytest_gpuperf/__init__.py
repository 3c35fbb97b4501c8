"""GPU performance as a test one can trust: measured on the GPU's clock, judged against baselines kept in git.

The names are imported when they are first used: pytest loads this package at every start, whatever it then runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpuperf.devices import Device
    from pytest_gpuperf.errors import (
        BaselineError,
        DeviceError,
        EngineError,
        EngineOutOfMemory,
        GpuperfError,
        LeaseTimeout,
        MeasurementError,
        NotSupported,
        UsageError,
    )
    from pytest_gpuperf.plugin import GpuBenchmark
    from pytest_gpuperf.recorder import Recorder, Region
    from pytest_gpuperf.records import Measurement, Method, Telemetry, Verdict

_MODULES = {
    "BaselineError": "errors",
    "Device": "devices",
    "DeviceError": "errors",
    "EngineError": "errors",
    "EngineOutOfMemory": "errors",
    "GpuBenchmark": "plugin",
    "GpuperfError": "errors",
    "LeaseTimeout": "errors",
    "Measurement": "records",
    "MeasurementError": "errors",
    "Method": "records",
    "NotSupported": "errors",
    "Recorder": "recorder",
    "Region": "recorder",
    "Telemetry": "records",
    "UsageError": "errors",
    "Verdict": "records",
}

__all__ = [
    "BaselineError",
    "Device",
    "DeviceError",
    "EngineError",
    "EngineOutOfMemory",
    "GpuBenchmark",
    "GpuperfError",
    "LeaseTimeout",
    "Measurement",
    "MeasurementError",
    "Method",
    "NotSupported",
    "Recorder",
    "Region",
    "Telemetry",
    "UsageError",
    "Verdict",
]


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = vars(import_module(f"{__name__}.{_MODULES[name]}"))[name]
    return value
