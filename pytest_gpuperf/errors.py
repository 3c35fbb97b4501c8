"""Everything that can go wrong, as one tree.

GpuperfError
├── UsageError         the user's mistake: a marker, an option, an argument, a unit
├── BaselineError      a baseline file that cannot be trusted or written
├── MeasurementError   a measurement that cannot be right: over the peak, no work, no samples
│   └── EngineError    an inference engine that died, hung, refused its configuration or answered less than asked
│       └── EngineOutOfMemory   it ran out of the device's memory: in a sweep a point like others
└── DeviceError        no GPU where one is needed, NVML missing, a GPU that is lost
    ├── LeaseTimeout   every suitable GPU was held by somebody else for too long
    └── NotSupported   work that this device cannot do, or that does not fit: the test is skipped

Each message says what happened with its numbers, against what, the likely cause, and the command that mends it.
"""


class GpuperfError(Exception):
    """Base of every error that pytest-gpuperf raises on purpose."""


class UsageError(GpuperfError):
    """A wrong marker, option, argument or unit."""


class BaselineError(GpuperfError):
    """A baseline file that cannot be read, trusted or written."""


class MeasurementError(GpuperfError):
    """A measurement that cannot be right."""


class EngineError(MeasurementError):
    """An inference engine that died, hung, refused its configuration, or answered less than it was asked."""


class EngineOutOfMemory(EngineError):
    """An inference engine that ran out of the device's memory."""


class DeviceError(GpuperfError):
    """A device that is missing, lost, or cannot be asked."""


class LeaseTimeout(DeviceError):
    """No suitable device became free in time."""


class NotSupported(DeviceError):
    """Work that this device cannot do, or that does not fit into its memory. Raised in a test, it skips the test."""
