"""What can be measured on: the GPUs that this process sees, and the CPU."""

import hashlib
import os
import platform
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import GpuInfo, Nvml
from pytest_gpuperf.records import Record
from pytest_gpuperf.specs import Peaks, architecture_of, computed_peaks, published_peaks, sm_count_of, spec_of

#: GB/s of one lane in one direction after line coding, by PCIe generation (PCI-SIG).
_PCIE_LANE_GBS = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}

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


def _device(index: int, info: GpuInfo) -> Device:
    spec = spec_of(info)
    is_mig = bool(info.mig_enabled) or " MIG " in info.name
    # An instance has a part of the GPU, and which part NVML does not say of the whole.
    peaks = Peaks() if is_mig else published_peaks(spec) if spec else computed_peaks(info)
    return Device(
        kind="cuda",
        index=index,
        uuid=info.uuid,
        name=info.name,
        memory_bytes=info.memory_bytes,
        compute_capability=info.compute_capability,
        architecture=spec.architecture if spec else architecture_of(info.compute_capability),
        sm_count=None if is_mig else sm_count_of(info) or (spec.sm_count if spec else None),
        l2_bytes=int(spec.l2_mb * 2**20) if spec and spec.l2_mb and not is_mig else None,
        power_limit_w=info.power_limit_w,
        is_mig=is_mig,
        peak_flops_per_s=peaks.flops_per_s,
        peak_bandwidth_bytes_per_s=peaks.bandwidth_bytes_per_s,
        pcie_bandwidth_bytes_per_s=_pcie_bandwidth(info),
        is_peak_computed=peaks.is_computed,
    )


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
