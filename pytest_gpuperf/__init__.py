"""GPU performance as a test one can trust: measured on the GPU's clock, judged against baselines kept in git."""

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import (
    BaselineError,
    DeviceError,
    GpuperfError,
    LeaseTimeout,
    MeasurementError,
    NotSupported,
    UsageError,
)
from pytest_gpuperf.recorder import Recorder, Region
from pytest_gpuperf.records import Measurement, Method, Telemetry, Verdict

__all__ = [
    "BaselineError",
    "Device",
    "DeviceError",
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
