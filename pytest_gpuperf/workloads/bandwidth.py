"""Moving bytes: within the device's memory, and between it and the host."""

from collections.abc import Callable
from typing import Literal, get_args

from pytest_gpuperf.errors import NotSupported, UsageError
from pytest_gpuperf.records import Kind, Mode
from pytest_gpuperf.workloads import require_free_memory

Direction = Literal["copy", "read", "write"]


class MemoryBandwidth:
    """Copy, read or write a buffer in the device's memory.

    Args:
        direction: `copy` (reads and writes each byte once), `read` (a sum over the buffer), `write` (a fill).
        size_bytes: Size of the buffer; several times the last-level cache, or the cache is what is measured.
        device: `"cuda:0"`, `"cpu"`, ...
        slowdown: Extra bytes as a fraction, for planting a slowdown of known size.

    Raises:
        UsageError: An unknown direction.
    """

    kind: Kind = "memory"
    mode: Mode | None = "cold"
    flop = None
    dtype = None

    def __init__(self, direction: Direction, *, size_bytes: int, device: str, slowdown: float = 0.0) -> None:
        import torch

        if direction not in get_args(Direction):
            raise UsageError(f"MemoryBandwidth knows no direction {direction!r}. Valid: copy, read, write.")
        buffers = 2.2 if direction == "copy" else 1.1
        require_free_memory(buffers * size_bytes, device=device, what=f"{direction} of {size_bytes / 1e9:.1f} GB")
        elements = size_bytes // 4
        generator = torch.Generator(device).manual_seed(0)
        source = torch.randn(round(elements * (1 + slowdown)), dtype=torch.float32, device=device, generator=generator)
        target = torch.empty_like(source) if direction == "copy" else source
        calls: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(source),
            "read": source.sum,
            "write": lambda: source.fill_(1.0),
        }
        self._call = calls[direction]
        self.bytes_moved: float | None = 4.0 * elements * (2 if direction == "copy" else 1)

    def __call__(self) -> object:
        """Move the bytes once."""
        return self._call()


class HostTransfer:
    """Copy a buffer from the host to the device or back; over PCIe on most machines.

    Args:
        direction: `host_to_device` or `device_to_host`.
        size_bytes: Size of the buffer.
        device: `"cuda:0"`, ...
        pinned: Page-locked host memory, which the device reads by itself; pageable memory goes through the driver's
            staging buffer and depends on the host.

    Raises:
        UsageError: An unknown direction.
        NotSupported: The device is the CPU, or the buffers do not fit.
    """

    mode: Mode | None = "cold"
    flop = None
    dtype = None

    def __init__(
        self,
        direction: Literal["host_to_device", "device_to_host"],
        *,
        size_bytes: int,
        device: str,
        pinned: bool,
    ) -> None:
        import torch

        if direction not in ("host_to_device", "device_to_host"):
            raise UsageError(f"HostTransfer knows no direction {direction!r}. Valid: device_to_host, host_to_device.")
        if device == "cpu":
            raise NotSupported(f"{direction} needs a GPU: on a CPU there is nothing to cross.")
        require_free_memory(1.1 * size_bytes, device=device, what=f"{direction} of {size_bytes / 1e9:.1f} GB")
        require_free_memory(1.1 * size_bytes, device="cpu", what=f"{direction} of {size_bytes / 1e9:.1f} GB")
        #: The driver's staging copies make pageable transfers a matter of the host's processor and memory.
        self.kind: Kind = "transfer" if pinned else "host"
        host = torch.randn(size_bytes // 4, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        host = host.pin_memory() if pinned else host
        near = torch.empty_like(host, device=device)
        source, self._target = (host, near) if direction == "host_to_device" else (near, host)
        self._source = source
        self.bytes_moved: float | None = 4.0 * host.numel()

    def __call__(self) -> object:
        """Copy once."""
        return self._target.copy_(self._source, non_blocking=True)
