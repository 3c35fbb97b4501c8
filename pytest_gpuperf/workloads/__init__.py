"""Work that knows what it costs: callables with their flop, bytes, data type and the way they should be measured."""

from typing import Protocol, runtime_checkable

from pytest_gpuperf.records import Kind, Mode


@runtime_checkable
class Workload(Protocol):
    """A callable that `gpu_benchmark` needs no further arguments for.

    Attributes:
        kind: What its time depends on.
        mode: How to measure it; `None` leaves the choice to its duration.
        flop: Floating-point operations of one call, or `None`.
        bytes_moved: Bytes read plus written by one call, or `None`.
        dtype: Name of the data type whose peak applies (`"bfloat16"`, `"tf32"`, ...), or `None`.
    """

    kind: Kind
    mode: Mode | None
    flop: float | None
    bytes_moved: float | None
    dtype: str | None

    def __call__(self) -> object:
        """Do the work once, on the current stream."""
        ...
