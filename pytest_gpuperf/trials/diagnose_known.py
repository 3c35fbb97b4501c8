"""Workloads whose limit is known beforehand, one for each class: for the proof, and to learn the classes from."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import NotSupported
from pytest_gpuperf.workloads.bandwidth import MemoryBandwidth
from pytest_gpuperf.workloads.matmul import Matmul, memory_bytes
from pytest_gpuperf.workloads.transformers import dtype_on


class Case(Protocol):
    """A call that knows its work; a `Workload` is one."""

    @property
    def flop(self) -> float | None:
        """Floating-point operations of a call."""

    @property
    def bytes_moved(self) -> float | None:
        """Bytes read plus written by a call."""

    @property
    def dtype(self) -> str | None:
        """Name of the data type whose peak applies."""

    def __call__(self) -> object:
        """Do the work once."""


class Product:
    """A square product of matrices, with the bytes of its operands and its result."""

    def __init__(self, n: int, *, dtype: str, device: str) -> None:
        self._product = Matmul(n, dtype=dtype, device=device)
        self.dtype = dtype
        self.flop = self._product.flop
        self.bytes_moved = float(memory_bytes(n, dtype))

    def __call__(self) -> object:
        """Multiply once."""
        return self._product()


class TinyKernels:
    """1,000 additions to 1,024 elements, a kernel each.

    Args:
        device: `"cuda:0"`, `"cpu"`, ...
    """

    count = 1000
    elements = 1024

    def __init__(self, device: str) -> None:
        import torch

        self.dtype = "float32"
        self.flop: float = float(self.count * self.elements)
        self.bytes_moved: float = self.count * self.elements * 8.0
        self._target = torch.zeros(self.elements, device=device)

    def __call__(self) -> object:
        """Add 1,000 times."""
        for _ in range(self.count):
            self._target.add_(1.0)
        return self._target


class Sleep:
    """A host that waits for 10 ms, then launches one small kernel.

    Args:
        device: `"cuda:0"`, `"cpu"`, ...
    """

    dtype = None
    flop: float = 1024.0
    bytes_moved: float = 8192.0

    def __init__(self, device: str) -> None:
        import torch

        self._target = torch.zeros(1024, device=device)

    def __call__(self) -> object:
        """Wait, then add once."""
        time.sleep(0.01)
        return self._target.add_(1.0)


class AllReduce:
    """A sum of 256 MiB over several GPUs, each of which has it afterwards; by NCCL, from this one process.

    Args:
        devices: Two or more of `"cuda:0"`, `"cuda:1"`, ...
    """

    dtype = "bfloat16"
    flop = None
    bytes_moved = None
    size_bytes = 256 * 2**20

    def __init__(self, devices: Sequence[str]) -> None:
        import torch

        self._tensors = [torch.ones(self.size_bytes // 2, dtype=torch.bfloat16, device=device) for device in devices]

    def __call__(self) -> object:
        """Sum once, in place."""
        import torch.cuda.nccl

        return torch.cuda.nccl.all_reduce(self._tensors, self._tensors)  # type: ignore[no-untyped-call]


def _matmul(devices: Sequence[Device]) -> Case:
    return product(devices[0], dtype_on(devices[0]))


def _copy(devices: Sequence[Device]) -> Case:
    return copy(devices[0])


def _all_reduce(devices: Sequence[Device]) -> Case:
    if len(devices) < 2:
        raise NotSupported("all-reduce needs two GPUs, and fewer are here. See what there is with: gpuperf specs")
    return AllReduce([device.device for device in devices])


def product(device: Device, dtype: str) -> Case:
    """Make the product of matrices that stands for what a device computes at most."""
    return Product(512 if device.kind == "cpu" else 8192, dtype=dtype, device=device.device)


def copy(device: Device) -> Case:
    """Make the copy that stands for what a device's memory moves at most."""
    return MemoryBandwidth("copy", size_bytes=2**26 if device.kind == "cpu" else 2**30, device=device.device)


Make = Callable[[Sequence[Device]], Case]
KNOWN: Mapping[str, Make] = {
    "matmul": _matmul,
    "copy": _copy,
    "tiny-kernels": lambda devices: TinyKernels(devices[0].device),
    "sleep": lambda devices: Sleep(devices[0].device),
    "all-reduce": _all_reduce,
}
#: Devices that a workload needs; others need one.
GPUS = {"all-reduce": 2}
