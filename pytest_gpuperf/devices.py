"""What can be measured on: GPUs and the CPU, what they can do at most, and which of them a test asks for."""

import functools
import hashlib
import importlib.resources
import itertools
import math
import os
import platform
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.nvml import GpuInfo, Nvml
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_value

#: GB/s of one lane in one direction after line coding, by PCIe generation (PCI-SIG).
_PCIE_LANE_GBS = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}

#: 32-bit lanes of one SM by compute capability; 128 from 8.6 on (CUDA programming guide, arithmetic throughput).
_CORES_PER_SM = {"7.0": 64, "7.2": 64, "7.5": 64, "8.0": 64}

#: Name of a torch dtype -> columns of the spec table, the first that is published. cuBLAS multiplies float64 matrices
#: on tensor cores where there are any.
_PEAK_COLUMNS = {
    "float16": ("fp16",),
    "bfloat16": ("bf16",),
    "float32": ("fp32",),
    "tf32": ("tf32",),
    "float64": ("fp64_tensor", "fp64"),
    "float8": ("fp8",),
    "int8": ("int8",),
}

_LONGEST_SLUG = 100


class Device(Record, frozen=True, kw_only=True):
    """One GPU, or the CPU.

    Attributes:
        index: torch's, the position in CUDA_VISIBLE_DEVICES; 0 for the CPU.
        memory_bytes: Of the GPU; RAM for the CPU.
        compute_capability: Such as `9.0`.
        architecture: Such as `Hopper`.
        power_limit_w: Enforced now.
        peak_flops_per_s: Dense peak by torch dtype name and `tf32`; operations for int8. Without a key: not known.
        peak_bandwidth_bytes_per_s: Of the GPU's own memory.
        pcie_bandwidth_bytes_per_s: In one direction, in theory.
        is_peak_computed: The peaks are upper bounds from clock and SM count, not published figures.
    """

    kind: Literal["cuda", "cpu"]
    index: int
    uuid: str
    name: str
    memory_bytes: int
    compute_capability: str | None = None
    architecture: str | None = None
    sm_count: int | None = None
    l2_bytes: int | None = None
    power_limit_w: float | None = None
    is_mig: bool = False
    peak_flops_per_s: dict[str, float] = msgspec.field(default_factory=dict)
    peak_bandwidth_bytes_per_s: float | None = None
    pcie_bandwidth_bytes_per_s: float | None = None
    is_peak_computed: bool = False

    @property
    def device(self) -> str:
        """What torch calls it: `cuda:0` or `cpu`."""
        return f"cuda:{self.index}" if self.kind == "cuda" else "cpu"

    @property
    def uuid_hash(self) -> str:
        """Identity to be published: twelve hex digits of the hashed UUID."""
        return _hash(self.uuid, 12)

    @property
    def vram_gb(self) -> float:
        """Memory in GB of 10^9 bytes: an 80 GB card has 85.5."""
        return self.memory_bytes / 1e9


class GpuSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One row of data/gpu_specs.json: published figures, dense, with their sources. `None` is not sourced.

    Attributes:
        vram_gb: The vendor's label, which counts GiB.
        observed_total_memory_mb: MiB, as a device of this kind reported.
        memory_clock_mhz: As NVML gives it; bandwidth is this x 2 x bus / 8.
        tensor_peak_clock_mhz: The clock that the published tensor peaks imply.
        peak_tflops_dense: 10^12 per second by `fp16`, `bf16`, `fp8`, ...; fp32 accumulate unless the key says acc16.
        nvlink_gbs_bidirectional: 10^9 B/s, both directions; 0 is sourced as none.
    """

    key: str
    vendor: str
    names: tuple[str, ...]
    pci_device_ids: tuple[str, ...]
    architecture: str
    compute_capability: str
    sm_count: int | None
    cuda_cores: int | None
    tensor_cores: int | None
    vram_gb: float | None
    observed_total_memory_mb: int | None
    memory_type: str | None
    memory_bandwidth_gbs: float | None
    memory_clock_mhz: float | None
    memory_bus_bits: int | None
    tdp_w: float | None
    tensor_peak_clock_mhz: float | None
    peak_tflops_dense: dict[str, float | None]
    nvlink_gbs_bidirectional: float | None
    l2_mb: float | None
    pcie_gen: int | None
    sources: tuple[str, ...]


class SpecTable(msgspec.Struct, frozen=True, kw_only=True):
    """data/gpu_specs.json.

    Attributes:
        sources: What was read, by the short names that rows use.
        flop_per_clock_per_sm: Dense tensor FLOP by compute capability and column; notes and half-rate parts beside.
    """

    sources: dict[str, str]
    flop_per_clock_per_sm: dict[str, str | dict[str, int | str | dict[str, int | str]]]
    gpus: tuple[GpuSpec, ...]


class _Peaks(Record, frozen=True, kw_only=True):
    flops_per_s: dict[str, float] = msgspec.field(default_factory=dict)
    bandwidth_bytes_per_s: float | None = None
    is_computed: bool = False


@functools.cache
def load_specs() -> SpecTable:
    """Read the packaged spec table, once."""
    data = importlib.resources.files("pytest_gpuperf").joinpath("data", "gpu_specs.json").read_bytes()
    return msgspec.json.decode(data, type=SpecTable)


def spec_of(info: GpuInfo) -> GpuSpec | None:
    """Find the published figures of a GPU.

    By PCI device id, then by exact name: "L4" is in "L40S", and the H100 SXM does not say SXM. A row whose SM count or
    memory (10 %) contradicts the GPU is not its row: modified and cut-down parts carry known names.

    Returns:
        The row; `None` for an unknown GPU, and for one that contradicts its row.
    """
    gpus = load_specs().gpus
    by_id = (spec for spec in gpus if info.pci_device_id and info.pci_device_id.upper() in spec.pci_device_ids)
    by_name = (spec for spec in gpus if info.name in spec.names)
    spec = next(itertools.chain(by_id, by_name), None)
    return None if spec is None or _contradicts(spec, info) else spec


def visible(gpus: Sequence[GpuInfo], cuda_visible_devices: str | None) -> tuple[GpuInfo, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does (CUDA programming guide, 5.2.1; torch.cuda._parse_visible_devices).

    Args:
        gpus: In PCI bus order. CUDA counts so only under CUDA_DEVICE_ORDER=PCI_BUS_ID, if the GPUs differ.
        cuda_visible_devices: `None` is all, `""` none. Indices, or UUIDs that may be cut to a unique prefix; the first
            that is not valid ends the list, and one named twice empties it.

    Raises:
        DeviceError: It names a MIG instance.
    """
    if cuda_visible_devices is None:
        return tuple(gpus)
    entries = [entry.strip() for entry in cuda_visible_devices.split(",")]
    chosen: list[GpuInfo] = []
    for entry in entries:
        gpu = _named(gpus, entry, is_uuid=entries[0].startswith("GPU-"))
        if gpu is None:
            break
        if gpu in chosen:
            return ()
        chosen.append(gpu)
    return tuple(chosen)


def find_devices(nvml: Nvml | None, *, cuda_visible_devices: str | None) -> tuple[Device, ...]:
    """List the GPUs to measure on, in torch's order, with their peaks.

    Args:
        nvml: `None` where there is no driver: no GPUs.
        cuda_visible_devices: The environment variable, `None` if it is not set.

    Raises:
        DeviceError: A GPU is lost, or CUDA_VISIBLE_DEVICES names a MIG instance.
    """
    if nvml is None:
        return ()
    return tuple(_device(index, info) for index, info in enumerate(visible(nvml.gpus(), cuda_visible_devices)))


def cpu_device(*, cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """Describe this machine's CPU, which has no known peaks.

    Args:
        cpuinfo: Where Linux names the model; elsewhere, and on ARM, Python's own name for the processor is used.
    """
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", text, flags=re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    return Device(
        kind="cpu",
        index=0,
        uuid=f"cpu-{_hash(f'{platform.node()} {name}', 32)}",
        name=name,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def slug(devices: Sequence[Device], label: str | None = None) -> str:
    """Name the folder of the baselines of these devices, one path component in [a-z0-9+-] of at most 100 characters.

    Args:
        devices: What one test holds.
        label: A pool of runners to be kept apart from others with the same GPU.

    Raises:
        DeviceError: There are no devices.

    >>> slug(two_h200s)              # doctest: +SKIP
    '2x-nvidia-h200'
    >>> slug(one_h100, "Pool A")     # doctest: +SKIP
    'nvidia-h100-80gb-hbm3+pool-a'
    """
    if not devices:
        raise DeviceError("Without a device there is no folder of baselines. Measure on a GPU or on the CPU.")
    names = Counter(f"cpu {device.name}" if device.kind == "cpu" else device.name for device in devices)
    parts = [_words(name) if len(devices) == 1 else f"{count}x-{_words(name)}" for name, count in sorted(names.items())]
    text = "-and-".join(parts) + (f"+{_words(label)}" if label else "")
    if len(text) <= _LONGEST_SLUG:
        return text
    return f"{text[: _LONGEST_SLUG - 9]}-{_hash(text, 8)}"


class GpuRequirement(Record, frozen=True, kw_only=True):
    """What a test asks of its GPUs with `@pytest.mark.gpu(...)`.

    Attributes:
        count: GPUs, all at once.
        min_vram_gb: Memory of each in GB of 10^9 bytes; RAM when measuring on the CPU.
        arch: `hopper`, or a compute capability, `9.0` or `>=8.0`.
        nvlink: Every two of them are connected by NVLink.
    """

    count: int = 1
    min_vram_gb: float = 0.0
    arch: str | None = None
    nvlink: bool = False

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
    """List every set of devices that satisfies the requirement, in the order of the devices.

    Args:
        nvml: Is asked which are connected; without it none are known to be.
    """
    fitting = eligible(requirement, devices)
    sets = tuple(itertools.combinations(fitting, requirement.count))
    if not requirement.nvlink:
        return sets
    linked = {
        (a.uuid, b.uuid)
        for a, b in itertools.combinations(fitting, 2)
        if nvml is not None and nvml.has_nvlink(a.uuid, b.uuid)
    }
    return tuple(one for one in sets if all((a.uuid, b.uuid) in linked for a, b in itertools.combinations(one, 2)))


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
    if len(fitting) < requirement.count:
        return (
            f"but {len(fitting)} of the {len(devices)} GPUs here would do" if devices[1:] else "but there is 1 GPU here"
        )
    if not groups(requirement, devices, nvml):
        return f"but no {requirement.count} GPUs here are known to be connected by NVLink (`nvidia-smi topo -m`)"
    return None


def _device(index: int, info: GpuInfo) -> Device:
    spec = spec_of(info)
    is_mig = bool(info.mig_enabled) or " MIG " in info.name
    # An instance has a part of the GPU, and which part NVML does not say of the whole.
    peaks = _Peaks() if is_mig else _published_peaks(spec) if spec else _computed_peaks(info)
    return Device(
        kind="cuda",
        index=index,
        uuid=info.uuid,
        name=info.name,
        memory_bytes=info.memory_bytes,
        compute_capability=info.compute_capability,
        architecture=spec.architecture if spec else _architecture(info.compute_capability),
        sm_count=None if is_mig else _sm_count(info) or (spec.sm_count if spec else None),
        l2_bytes=int(spec.l2_mb * 2**20) if spec and spec.l2_mb and not is_mig else None,
        power_limit_w=info.power_limit_w,
        is_mig=is_mig,
        peak_flops_per_s=peaks.flops_per_s,
        peak_bandwidth_bytes_per_s=peaks.bandwidth_bytes_per_s,
        pcie_bandwidth_bytes_per_s=_pcie_bandwidth(info),
        is_peak_computed=peaks.is_computed,
    )


def _published_peaks(spec: GpuSpec) -> _Peaks:
    known = {
        dtype: next((tflops for column in columns if (tflops := spec.peak_tflops_dense.get(column))), None)
        for dtype, columns in _PEAK_COLUMNS.items()
    }
    return _Peaks(
        flops_per_s={dtype: tflops * 1e12 for dtype, tflops in known.items() if tflops is not None},
        bandwidth_bytes_per_s=None if spec.memory_bandwidth_gbs is None else spec.memory_bandwidth_gbs * 1e9,
    )


def _computed_peaks(info: GpuInfo) -> _Peaks:
    # Upper bounds: the tensor rate is that of the architecture's fastest part, and the clock the highest there is.
    rates = load_specs().flop_per_clock_per_sm.get(info.compute_capability or "", "")
    sm_count, clock_hz = _sm_count(info), (info.max_sm_clock_mhz or 0) * 1e6
    flops: dict[str, float] = {}
    if sm_count and clock_hz and isinstance(rates, dict):
        for dtype, columns in _PEAK_COLUMNS.items():
            rate = rates.get(columns[-1])
            if isinstance(rate, int):
                flops[dtype] = sm_count * clock_hz * rate
    if info.core_count and clock_hz:
        flops["float32"] = info.core_count * clock_hz * 2  # a fused multiply-add a lane and clock
    bandwidth = None
    if info.max_memory_clock_mhz and info.memory_bus_bits:
        bandwidth = info.max_memory_clock_mhz * 1e6 * 2 * info.memory_bus_bits / 8
    return _Peaks(flops_per_s=flops, bandwidth_bytes_per_s=bandwidth, is_computed=bool(flops) or bandwidth is not None)


def _contradicts(spec: GpuSpec, info: GpuInfo) -> bool:
    sm_count = _sm_count(info)
    if sm_count and spec.sm_count and sm_count != spec.sm_count:
        return True
    expected_mib = spec.observed_total_memory_mb or (spec.vram_gb * 1024 if spec.vram_gb else None)
    return expected_mib is not None and abs(info.memory_bytes / 2**20 / expected_mib - 1) > 0.10


def _sm_count(info: GpuInfo) -> int | None:
    if not info.core_count or not info.compute_capability:
        return None
    sm_count, rest = divmod(info.core_count, _CORES_PER_SM.get(info.compute_capability, 128))
    return sm_count if rest == 0 else None


def _architecture(compute_capability: str | None) -> str | None:
    rows = load_specs().gpus
    return next((row.architecture for row in rows if row.compute_capability == compute_capability), None)


def _pcie_bandwidth(info: GpuInfo) -> float | None:
    lane_gbs = _PCIE_LANE_GBS.get(info.pcie_generation or 0)
    return lane_gbs * info.pcie_width * 1e9 if lane_gbs and info.pcie_width else None


def _named(gpus: Sequence[GpuInfo], entry: str, *, is_uuid: bool) -> GpuInfo | None:
    if entry.startswith("MIG-"):
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES names the MIG instance {entry!r}, and only whole GPUs can be measured. "
            "Name a GPU by its index or UUID (`nvidia-smi -L`), or turn MIG off (`sudo nvidia-smi -mig 0`)."
        )
    if is_uuid:
        matches = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    # CUDA reads digits as strtoul does: "1gpu" is 1.
    digits = re.match(r"\+?([0-9]+)", entry)
    return gpus[int(digits[1])] if digits and int(digits[1]) < len(gpus) else None


def _words(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or _hash(text, 8)


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]


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


_CAPABILITY = re.compile(r"(?P<least>>=)?\s*(?P<version>\d+\.\d+)")


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


#: Argument of @gpu -> what it should have been, or None.
_PROBLEMS: dict[str, Callable[[Any], str | None]] = {
    "arch": _problem_of_arch,
    "count": _problem_of_count,
    "min_vram_gb": _problem_of_memory,
    "nvlink": _problem_of_nvlink,
}
