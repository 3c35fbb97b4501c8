"""Published figures of GPUs from data/gpu_specs.json, and upper bounds for GPUs that are not in it."""

import functools
import importlib.resources
import itertools

import msgspec

from pytest_gpuperf.nvml import GpuInfo
from pytest_gpuperf.records import Record

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


class Peaks(Record, frozen=True, kw_only=True):
    """What a GPU can do at most: FLOP/s by torch dtype name, and B/s of its memory. Empty is not known."""

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


def published_peaks(spec: GpuSpec) -> Peaks:
    """Read the peaks of a row of the table."""
    known = {
        dtype: next((tflops for column in columns if (tflops := spec.peak_tflops_dense.get(column))), None)
        for dtype, columns in _PEAK_COLUMNS.items()
    }
    return Peaks(
        flops_per_s={dtype: tflops * 1e12 for dtype, tflops in known.items() if tflops is not None},
        bandwidth_bytes_per_s=None if spec.memory_bandwidth_gbs is None else spec.memory_bandwidth_gbs * 1e9,
    )


def computed_peaks(info: GpuInfo) -> Peaks:
    """Work out upper bounds for a GPU that the table does not have.

    The tensor rate is that of the architecture's fastest part, and the clock the highest there is.
    """
    rates = load_specs().flop_per_clock_per_sm.get(info.compute_capability or "", "")
    sm_count, clock_hz = sm_count_of(info), (info.max_sm_clock_mhz or 0) * 1e6
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
    return Peaks(flops_per_s=flops, bandwidth_bytes_per_s=bandwidth, is_computed=bool(flops) or bandwidth is not None)


def sm_count_of(info: GpuInfo) -> int | None:
    """Count the SMs from the lanes that NVML reports; `None` where they do not divide."""
    if not info.core_count or not info.compute_capability:
        return None
    sm_count, rest = divmod(info.core_count, _CORES_PER_SM.get(info.compute_capability, 128))
    return sm_count if rest == 0 else None


def architecture_of(compute_capability: str | None) -> str | None:
    """Name the architecture of a compute capability, such as `Hopper` for `9.0`."""
    rows = load_specs().gpus
    return next((row.architecture for row in rows if row.compute_capability == compute_capability), None)


def _contradicts(spec: GpuSpec, info: GpuInfo) -> bool:
    sm_count = sm_count_of(info)
    if sm_count and spec.sm_count and sm_count != spec.sm_count:
        return True
    expected_mib = spec.observed_total_memory_mb or (spec.vram_gb * 1024 if spec.vram_gb else None)
    return expected_mib is not None and abs(info.memory_bytes / 2**20 / expected_mib - 1) > 0.10
