"""Work that knows what it costs: callables with their flop, bytes, data type and the way they should be measured."""

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from pytest_gpuperf.errors import NotSupported
from pytest_gpuperf.records import Kind, Mode
from pytest_gpuperf.units import format_value


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


def require_free_memory(needed_bytes: float, *, device: str, what: str) -> None:
    """Refuse work that does not fit, before it is allocated.

    Args:
        needed_bytes: Operands, results and workspace.
        device: `"cuda:0"`, `"cpu"`, ...
        what: The work, for the message.

    Raises:
        NotSupported: With both numbers; the test is skipped.
    """
    free_bytes = _free_bytes(device)
    if needed_bytes > free_bytes:
        raise NotSupported(
            f"{what} needs {format_value(needed_bytes, 'B', digits=3)}, "
            f"and {format_value(free_bytes, 'B', digits=3)} are free on {device}."
        )


def _free_bytes(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused_bytes)
    meminfo = Path("/proc/meminfo")  # MemAvailable counts the page cache, which gives way
    rows = meminfo.read_text().splitlines() if meminfo.exists() else []
    available = next((row for row in rows if row.startswith("MemAvailable:")), None)
    if available is not None:
        return float(available.split()[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
