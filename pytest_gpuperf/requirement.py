"""What a test asks of its GPUs with `@pytest.mark.gpu(...)`, and which devices satisfy it."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.records import Record
from pytest_gpuperf.specs import load_specs
from pytest_gpuperf.topology import best_connected, class_of, links_between
from pytest_gpuperf.units import format_value

#: What a test holds alone: its GPUs, or the whole host.
Exclusivity = Literal["gpu", "host"]
_CAPABILITY = re.compile(r"(?P<least>>=)?\s*(?P<version>\d+\.\d+)")


class GpuRequirement(Record, frozen=True, kw_only=True):
    """What a test asks of its GPUs with `@pytest.mark.gpu(...)`.

    Attributes:
        count: GPUs, all at once.
        min_vram_gb: Memory of each in GB of 10^9 bytes; RAM when measuring on the CPU.
        arch: `hopper`, or a compute capability, `9.0` or `>=8.0`.
        nvlink: Every two of them are connected by NVLink.
        exclusive: `host`: no other test holds any device of this host meanwhile.
    """

    count: int = 1
    min_vram_gb: float = 0.0
    arch: str | None = None
    nvlink: bool = False
    exclusive: Exclusivity = "gpu"

    @classmethod
    def from_arguments(cls, test_name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> "GpuRequirement":
        """Read the arguments of the marker.

        Raises:
            UsageError: An argument is positional, unknown, of the wrong type or out of range; it names the test.
        """
        where, valid = f"@gpu of {test_name}", ", ".join(sorted(_PROBLEMS))
        if args:
            given = ", ".join(map(repr, args))
            raise UsageError(f"{where} has arguments without a name: {given}. Write @gpu(count=2). Valid: {valid}.")
        for name, value in kwargs.items():
            if name not in _PROBLEMS:
                raise UsageError(f"Unknown argument {name!r} in {where}. Valid: {valid}.")
            if problem := _PROBLEMS[name](value):
                raise UsageError(f"{name}={value!r} in {where} is not {problem}.")
        requirement = msgspec.convert(dict(kwargs), cls)
        if requirement.nvlink and requirement.count == 1:
            raise UsageError(f"nvlink=True in {where} connects GPUs with each other. Add count=2 or more.")
        return requirement

    def __str__(self) -> str:
        """As it is written in a test, `gpu(count=2, min_vram_gb=40)`."""
        given = {
            "count": None if self.count == 1 else str(self.count),
            "min_vram_gb": f"{self.min_vram_gb:g}" if self.min_vram_gb else None,
            "arch": repr(self.arch) if self.arch else None,
            "nvlink": "True" if self.nvlink else None,
            "exclusive": repr(self.exclusive) if self.exclusive != "gpu" else None,
        }
        return f"gpu({', '.join(f'{name}={text}' for name, text in given.items() if text)})"


def eligible(requirement: GpuRequirement, devices: Sequence[Device]) -> tuple[Device, ...]:
    """Keep the devices that fit singly, by architecture and memory."""
    return tuple(
        device
        for device in devices
        if _has_arch(device, requirement.arch) and device.vram_gb >= requirement.min_vram_gb
    )


def groups(requirement: GpuRequirement, devices: Sequence[Device], nvml: Nvml | None) -> tuple[tuple[Device, ...], ...]:
    """List the sets of devices that satisfy the requirement, in the order of the devices.

    Of several devices only the best-connected sets are listed, so that results of different runs stay comparable.

    Args:
        nvml: Is asked how they are connected, once a pair; without it that is not known.

    Raises:
        DeviceError: A GPU is lost.
    """
    fitting = eligible(requirement, _shown(devices))
    sets = tuple(itertools.combinations(fitting, requirement.count))
    if requirement.count == 1:
        return sets
    links = links_between(fitting, nvml)
    if requirement.nvlink:
        return tuple(one for one in sets if class_of(one, links) == "nvlink")
    return best_connected(sets, links)


def _shown(devices: Sequence[Device]) -> tuple[Device, ...]:
    """Keep what CUDA shows one process: whole GPUs, or one MIG instance, the first (NVIDIA's MIG user guide)."""
    if any(device.is_mig and device.index == 0 for device in devices):
        return tuple(device for device in devices if device.index == 0)
    return tuple(device for device in devices if not device.is_mig)


def shortfall(requirement: GpuRequirement, devices: Sequence[Device], nvml: Nvml | None = None) -> str | None:
    """Say why no devices here can ever satisfy a test, as a sentence; `None` if some can.

    Args:
        devices: All GPUs of this run, or the CPU alone.
        nvml: Is asked for NVLink; without it, a test that needs NVLink is not satisfied.
    """
    if not devices:
        reason: str | None = "but there is no GPU here"
    elif devices[0].kind == "cpu":
        reason = _shortfall_of_cpu(requirement, devices[0])
    else:
        reason = _shortfall_of_gpus(requirement, devices, nvml)
    return None if reason is None else f"test asks {requirement}, {reason}."


def _shortfall_of_cpu(requirement: GpuRequirement, cpu: Device) -> str | None:
    if requirement.count > 1 or requirement.arch or requirement.nvlink:
        return f"which needs a GPU, and this run measures on the CPU ({cpu.name})"
    if cpu.vram_gb < requirement.min_vram_gb:
        return f"but this machine has {_gb(cpu)} of RAM, and this run measures on the CPU ({cpu.name})"
    return None


def _shortfall_of_gpus(requirement: GpuRequirement, devices: Sequence[Device], nvml: Nvml | None) -> str | None:
    right = [device for device in devices if _has_arch(device, requirement.arch)]
    if not right:
        here = sorted(
            {f"{d.name}: {d.architecture or 'unknown'} {d.compute_capability or ''}".strip() for d in devices}
        )
        return f"but no GPU here is of that kind ({', '.join(here)})"
    largest = max(right, key=lambda device: device.memory_bytes)
    if largest.vram_gb < requirement.min_vram_gb:
        return (
            f"but the largest GPU here{' of that kind' if requirement.arch else ''} has {_gb(largest)} ({largest.name})"
        )
    fitting = eligible(requirement, devices)
    shown = eligible(requirement, _shown(devices))
    if any(device.is_mig for device in (devices[0], *fitting)) and len(shown) < requirement.count:
        return (
            f"but CUDA shows a process one MIG instance, the first ({devices[0].name}). Ask for one GPU, or turn MIG "
            "off with `sudo nvidia-smi -mig 0`"
        )
    if len(fitting) < requirement.count:
        return (
            f"but {len(fitting)} of the {len(devices)} GPUs here would do" if devices[1:] else "but there is 1 GPU here"
        )
    if not groups(requirement, devices, nvml):
        return f"but no {requirement.count} GPUs here are known to be connected by NVLink (`nvidia-smi topo -m`)"
    return None


def _gb(device: Device) -> str:
    return format_value(device.memory_bytes, "B")


def _has_arch(device: Device, arch: str | None) -> bool:
    if arch is None:
        return True
    name, wanted = (device.architecture or "").lower(), arch.strip().lower()
    if capability := _CAPABILITY.fullmatch(wanted):
        have, least = _version(device.compute_capability), _version(capability["version"])
        return have is not None and least is not None and (have >= least if capability["least"] else have == least)
    # "ada" is Ada Lovelace, and "blackwell" includes Blackwell Ultra.
    return name == wanted or name.startswith(f"{wanted} ")


def _version(capability: str | None) -> tuple[int, ...] | None:
    return tuple(int(part) for part in capability.split(".")) if capability else None


def _problem_of_count(value: Any) -> str | None:
    is_good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if is_good else "a whole number of GPUs, 1 or more"


def _problem_of_memory(value: Any) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if is_number and math.isfinite(value) and value >= 0 else "a number of GB, 0 or more, such as 40"


def _problem_of_arch(value: Any) -> str | None:
    full = {row.architecture.lower() for row in load_specs().gpus if row.vendor == "NVIDIA"}
    known = sorted(full | {name.split()[0] for name in full})
    if value is None or (isinstance(value, str) and _is_arch(value, known)):
        return None
    return f"an architecture ({', '.join(known)}) or a compute capability ('9.0', '>=8.0')"


def _is_arch(text: str, known: Sequence[str]) -> bool:
    return text.strip().lower() in known or _CAPABILITY.fullmatch(text.strip()) is not None


def _problem_of_nvlink(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _problem_of_exclusive(value: Any) -> str | None:
    return None if value in ("gpu", "host") else "'gpu' (its GPUs alone, the default) or 'host' (the whole machine)"


#: Argument of @gpu -> what it should have been, or None.
_PROBLEMS: dict[str, Callable[[Any], str | None]] = {
    "arch": _problem_of_arch,
    "count": _problem_of_count,
    "exclusive": _problem_of_exclusive,
    "min_vram_gb": _problem_of_memory,
    "nvlink": _problem_of_nvlink,
}
