"""What can be measured on: the GPUs that this process sees, and the CPU."""

import hashlib
import os
import platform
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import AbsentGpu, GpuInfo, Nvml
from pytest_gpuperf.records import Record
from pytest_gpuperf.specs import Peaks, architecture_of, computed_peaks, published_peaks, sm_count_of, spec_of

#: GB/s of one lane in one direction after line coding, by PCIe generation (PCI-SIG).
_PCIE_LANE_GBS = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}

_LONGEST_SLUG = 100
_PREFIXES = ("GPU-", "MIG-")


class Device(Record, frozen=True, kw_only=True):
    """One GPU, or the CPU.

    Attributes:
        index: torch's, the position in CUDA_VISIBLE_DEVICES; 0 for the CPU.
        memory_bytes: Of the GPU; RAM for the CPU.
        compute_capability: Such as `9.0`.
        architecture: Such as `Hopper`.
        power_limit_w: Enforced now.
        parent_uuid: Of the GPU that a MIG instance is a part of.
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
    parent_uuid: str | None = None
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
        return hash_of(self.uuid)

    @property
    def vram_gb(self) -> float:
        """Memory in GB of 10^9 bytes: an 80 GB card has 85.5."""
        return self.memory_bytes / 1e9


def hash_of(uuid: str) -> str:
    """Publish the identity of a device: twelve hex digits of the hashed UUID."""
    return _hash(uuid, 12)


def visible(
    gpus: Sequence[GpuInfo],
    cuda_visible_devices: str | None,
    instances: Mapping[str, Sequence[GpuInfo]] = MappingProxyType({}),
    absent: Sequence[AbsentGpu] = (),
) -> tuple[GpuInfo, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does (CUDA programming guide, 5.2.1; torch.cuda._parse_visible_devices).

    A GPU in MIG mode stands for its first instance, the only one of it that CUDA shows then; without one, for nothing.

    Args:
        gpus: In PCI bus order. CUDA counts so only under CUDA_DEVICE_ORDER=PCI_BUS_ID, if the GPUs differ.
        cuda_visible_devices: `None` is all, `""` none. Indices, or UUIDs that may be cut to a unique prefix; the first
            that is not valid ends the list, and one named twice empties it.
        instances: UUID of a GPU in MIG mode -> its MIG instances.
        absent: GPUs that do not answer. Whether CUDA counts them is not documented.

    Raises:
        DeviceError: It names a MIG instance in the old way, or what may be an absent GPU: first a UUID that is not
            here, or a number at or after the absent one's.
    """
    chosen = _read_list(gpus, cuda_visible_devices, instances, absent).chosen
    shown = (one for gpu in chosen for one in ([gpu] if not gpu.mig_enabled else instances.get(gpu.uuid, ())[:1]))
    return tuple(dict.fromkeys(shown))


def find_devices(nvml: Nvml | None, *, cuda_visible_devices: str | None) -> tuple[Device, ...]:
    """List the GPUs and MIG instances to measure on, in torch's order, with their peaks.

    Args:
        nvml: `None` where there is no driver: no GPUs.
        cuda_visible_devices: The environment variable, `None` if it is not set.

    Raises:
        DeviceError: A GPU is lost meanwhile, or CUDA_VISIBLE_DEVICES names something that is not certain.
    """
    if nvml is None:
        return ()
    gpus = nvml.gpus()
    instances = instances_of(nvml, gpus)
    parents = {instance.uuid: gpu for gpu in gpus for instance in instances.get(gpu.uuid, ())}
    found = visible(gpus, cuda_visible_devices, instances, nvml.absent())
    return tuple(_device(index, info, parents.get(info.uuid)) for index, info in enumerate(found))


def instances_of(nvml: Nvml, gpus: Sequence[GpuInfo]) -> dict[str, tuple[GpuInfo, ...]]:
    """Look up the MIG instances of those GPUs that are in MIG mode, by the GPU's UUID.

    Raises:
        DeviceError: A GPU is lost.
    """
    # NVML repeats MIG mode and all else of the GPU for an instance: it shall not be taken for a divided GPU.
    return {
        gpu.uuid: tuple(replace(one, mig_enabled=False) for one in nvml.mig_instances(gpu.uuid))
        for gpu in gpus
        if gpu.mig_enabled
    }


def hidden(nvml: Nvml, *, cuda_visible_devices: str | None) -> str | None:
    """Say which entry ends CUDA_VISIBLE_DEVICES, or which GPU is in MIG mode without an instance; `None`: neither.

    Args:
        nvml: The driver's library.
        cuda_visible_devices: The environment variable, `None` if it is not set.

    Raises:
        DeviceError: A GPU is lost meanwhile, or CUDA_VISIBLE_DEVICES names something that is not certain.
    """
    gpus = nvml.gpus()
    instances = instances_of(nvml, gpus)
    read = _read_list(gpus, cuda_visible_devices, instances, nvml.absent())
    empty = [gpu for gpu in read.chosen if gpu.mig_enabled and not instances.get(gpu.uuid)]
    if read.problem:
        return f"In CUDA_VISIBLE_DEVICES, {read.problem}"
    if empty:
        return (
            f"GPU {empty[0].index} ({empty[0].name}) is in MIG mode and has no instance: make one with "
            f"`sudo nvidia-smi mig -i {empty[0].index} -cgi 0 -C`, or turn MIG off: `sudo nvidia-smi -mig 0`."
        )
    return None


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


def _device(index: int, info: GpuInfo, parent: GpuInfo | None) -> Device:
    spec = spec_of(parent or info)
    is_mig = parent is not None or " MIG " in info.name
    capability = info.compute_capability or (parent.compute_capability if parent else None)
    # An instance has a part of the GPU, and which part NVML does not say of the whole.
    peaks = Peaks() if is_mig else published_peaks(spec) if spec else computed_peaks(info)
    return Device(
        kind="cuda",
        index=index,
        uuid=info.uuid,
        name=info.name,
        memory_bytes=info.memory_bytes,
        compute_capability=capability,
        architecture=spec.architecture if spec else architecture_of(capability),
        sm_count=None if is_mig else sm_count_of(info) or (spec.sm_count if spec else None),
        l2_bytes=int(spec.l2_mb * 2**20) if spec and spec.l2_mb and not is_mig else None,
        power_limit_w=info.power_limit_w,
        is_mig=is_mig,
        parent_uuid=parent.uuid if parent else None,
        peak_flops_per_s=peaks.flops_per_s,
        peak_bandwidth_bytes_per_s=peaks.bandwidth_bytes_per_s,
        pcie_bandwidth_bytes_per_s=_pcie_bandwidth(info),
        is_peak_computed=peaks.is_computed,
    )


def _pcie_bandwidth(info: GpuInfo) -> float | None:
    lane_gbs = _PCIE_LANE_GBS.get(info.pcie_generation or 0)
    return lane_gbs * info.pcie_width * 1e9 if lane_gbs and info.pcie_width else None


class _List(Record, frozen=True, kw_only=True):
    """What CUDA_VISIBLE_DEVICES names, and why that is not all of its entries."""

    chosen: tuple[GpuInfo, ...] = ()
    problem: str | None = None


def _read_list(
    gpus: Sequence[GpuInfo],
    cuda_visible_devices: str | None,
    instances: Mapping[str, Sequence[GpuInfo]],
    absent: Sequence[AbsentGpu],
) -> _List:
    if cuda_visible_devices is None:
        return _List(chosen=tuple(gpus))
    entries = [entry.strip() for entry in cuda_visible_devices.split(",")]
    known = [*gpus, *(one for gpu in gpus for one in instances.get(gpu.uuid, ()))]
    chosen: list[GpuInfo] = []
    is_uuid = entries[0].startswith(_PREFIXES)
    for entry in entries:
        if absent and not is_uuid:
            _refuse_doubtful(gpus, absent[0], entry)
        gpu = _named(gpus, known, entry, is_uuid=is_uuid)
        if gpu is None:
            if absent and is_uuid and not chosen:
                _refuse_absent(known, absent[0], entry)
            return _List(chosen=tuple(chosen), problem=_ending(gpus, known, entry, entries))
        if gpu in chosen:
            return _List(problem=f"{entry!r} names a GPU a second time, and then CUDA shows none. Name each once.")
        chosen.append(gpu)
    return _List(chosen=tuple(chosen))


def _named(gpus: Sequence[GpuInfo], known: Sequence[GpuInfo], entry: str, *, is_uuid: bool) -> GpuInfo | None:
    if entry.startswith("MIG-GPU-"):
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES names the MIG instance {entry!r} in the way of drivers before 470. "
            "Name it as `nvidia-smi -L` does: MIG- and a UUID of its own."
        )
    if is_uuid:
        matches = [gpu for gpu in known if entry.startswith(_PREFIXES) and gpu.uuid.startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    number = _number(entry)
    return gpus[number] if number is not None and number < len(gpus) else None


def _number(entry: str) -> int | None:
    digits = re.match(r"\+?([0-9]+)", entry)  # CUDA reads them as strtoul does: "1gpu" is 1
    return int(digits[1]) if digits else None


def _refuse_doubtful(gpus: Sequence[GpuInfo], absent: AbsentGpu, entry: str) -> None:
    """Refuse a number that means one GPU if CUDA counts the absent one, and another if it does not."""
    certain = [gpu for gpu in gpus if gpu.index < absent.index]
    number = _number(entry)
    if number is not None and number >= len(certain):
        raise DeviceError(
            f"{absent.reason} Until then, which GPU {entry!r} in CUDA_VISIBLE_DEVICES stands for is not certain. "
            "Name GPUs by UUID (`nvidia-smi -L`)."
        )


def _refuse_absent(known: Sequence[GpuInfo], absent: AbsentGpu, entry: str) -> None:
    """Refuse a list that begins with what may be the absent GPU: nothing is left of it, and no CPU takes its place."""
    if not any(gpu.uuid.startswith(entry) for gpu in known):
        raise DeviceError(
            f"{absent.reason} CUDA_VISIBLE_DEVICES begins with {entry!r}, which is no GPU that answers. "
            "CUDA ends the list there: name others (`nvidia-smi -L`)."
        )


def _ending(gpus: Sequence[GpuInfo], known: Sequence[GpuInfo], entry: str, entries: Sequence[str]) -> str:
    """Say why an entry ends the list."""
    ends = f"entry {entries.index(entry) + 1}, {entry!r}, ends the list"
    matches = sum(entry.startswith(_PREFIXES) and gpu.uuid.startswith(entry) for gpu in known)
    if matches > 1:
        return f"{ends}: {matches} UUIDs begin so. Write more of it (`nvidia-smi -L`)."
    if matches == 1:
        return f"{ends}: the list began with an index. Write indices only, or UUIDs only."
    here = f"GPU{'s 0 to ' if gpus[1:] else ' '}{len(gpus) - 1}" if gpus else "no GPU"
    return f"{ends}: there is no such GPU here, only {here} (`nvidia-smi -L`)."


def _words(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or _hash(text, 8)


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]
