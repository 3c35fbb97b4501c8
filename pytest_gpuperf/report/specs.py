"""What `gpuperf specs` prints: what these GPUs are and do now, and how kinds of GPU compare. 80 columns."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.nvml import GpuInfo, GpuState
from pytest_gpuperf.specs import GpuSpec, load_specs
from pytest_gpuperf.units import format_value

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_MISSING = "-"
_DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16", "float8", "int8")
_COLUMNS = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4")

#: GPUs side by side that 80 columns hold.
_ABREAST = 3


def specs_table(
    devices: Sequence[Device],
    infos: Mapping[str, GpuInfo],
    states: Mapping[str, GpuState],
    all_rows: bool = False,
    *,
    driver: str | None = None,
    cuda: str | None = None,
) -> "Group":
    """Show what these devices are, GPUs of one kind together, and what each GPU does now.

    Args:
        devices: As found.
        infos: What NVML says of them, by UUID; empty for the CPU.
        states: Their state now, by UUID.
        all_rows: Add the rows that few need: cores, bus width, ECC, MIG, persistence, default power limit.
        driver: Version of the driver.
        cuda: Newest CUDA version that it runs.

    Returns:
        Something for rich to print.
    """
    from rich.console import Group

    kinds: dict[tuple[tuple[str, str], ...], list[Device]] = {}
    for device in devices:
        cells = _cells(device, infos.get(device.uuid), all_rows=all_rows)
        kinds.setdefault(tuple(cells.items()), []).append(device)
    shared = {"Driver": driver or _MISSING, "CUDA up to": cuda or _MISSING}
    titles = [f"{len(alike)}x {alike[0].name}" if alike[1:] else alike[0].name for alike in kinds.values()]
    columns = [{**dict(cells), **shared} for cells in kinds]
    tables = _side_by_side(titles, columns)
    now = [device for device in devices if device.uuid in states]
    return Group(*tables, *([_now(now, infos, states)] if now else []))


def compare_table(compare: Sequence[str]) -> "Group":
    """Show kinds of GPU side by side, from the published figures.

    Args:
        compare: Keys, names, or parts of them that only one kind of GPU has, in any case: `h200`, `a100-sxm-80`.

    Raises:
        UsageError: A name fits none, or several; the message lists them.
    """
    from rich.console import Group

    specs = [find_spec(name) for name in compare]
    return Group(*_side_by_side([spec.key for spec in specs], [_spec_cells(spec) for spec in specs]))


def find_spec(name: str) -> GpuSpec:
    """Find the one kind of GPU with this key or name, or with this part of one, in any case.

    Raises:
        UsageError: None, or several.
    """
    wanted, specs = name.strip().lower(), load_specs().gpus
    exact = [spec for spec in specs if wanted in _lower_names(spec)]
    partly = [spec for spec in specs if wanted and any(wanted in one for one in _lower_names(spec))]
    found = exact or partly
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{name!r} is several GPUs: {', '.join(spec.key for spec in found)}. Name one of them.")
    keys = {spec.key.lower(): spec.key for spec in specs}
    close = [keys[key] for key in difflib.get_close_matches(wanted, keys, n=5, cutoff=0.4)]
    hint = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(keys.values())}."
    raise UsageError(f"No GPU {name!r} in the table. {hint}")


def _cells(device: Device, info: GpuInfo | None, *, all_rows: bool) -> dict[str, str]:
    peaks = device.peak_flops_per_s
    cells = {
        "Architecture": device.architecture or _MISSING,
        "Compute capability": device.compute_capability or _MISSING,
        "SMs": _count(device.sm_count),
        "Memory": _quantity(device.memory_bytes, "B"),
        "L2 cache": _mebibytes(device.l2_bytes),
        "Power limit": _plain(device.power_limit_w, "W"),
        "Max SM clock": _plain(info.max_sm_clock_mhz if info else None, "MHz"),
        "Max memory clock": _plain(info.max_memory_clock_mhz if info else None, "MHz"),
        "PCIe": _pcie(device, info),
        "Bandwidth": _quantity(device.peak_bandwidth_bytes_per_s, "B/s"),
        **{f"Peak {dtype}": _rate(peaks.get(dtype), dtype) for dtype in _DTYPES},
        "Peaks are": _origin(device),
    }
    return {**cells, **_more_cells(info)} if all_rows else cells


def _more_cells(info: GpuInfo | None) -> dict[str, str]:
    return {
        "Cores": _count(info.core_count if info else None),
        "Memory bus": _plain(info.memory_bus_bits if info else None, "bit"),
        "Default power limit": _plain(info.default_power_limit_w if info else None, "W"),
        "PCI device id": (info.pci_device_id if info else None) or _MISSING,
        "MIG": _on(info.mig_enabled if info else None),
        "ECC": _on(info.ecc_enabled if info else None),
        "Persistence mode": _on(info.persistence if info else None),
    }


def _spec_cells(spec: GpuSpec) -> dict[str, str]:
    peaks = spec.peak_tflops_dense
    return {
        "Architecture": spec.architecture,
        "Compute capability": spec.compute_capability,
        "SMs (AMD: CUs)": _count(spec.sm_count),
        "Memory": f"{_count(spec.vram_gb)} GB" if spec.vram_gb else _MISSING,
        "Bandwidth": _quantity(_times(spec.memory_bandwidth_gbs, 1e9), "B/s"),
        **{f"Peak {column}": _rate(_times(peaks.get(column), 1e12), column) for column in _COLUMNS},
        "NVLink, both ways": "none" if spec.nvlink_gbs_bidirectional == 0 else _link(spec.nvlink_gbs_bidirectional),
        "L2 cache": _mebibytes(_times(spec.l2_mb, 2**20)),
        "PCIe generation": _count(spec.pcie_gen),
        "Board power": _plain(spec.tdp_w, "W"),
    }


def _side_by_side(titles: Sequence[str], columns: Sequence[Mapping[str, str]]) -> "list[Table]":
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    tables = []
    for start in range(0, len(columns), _ABREAST):
        part = columns[start : start + _ABREAST]
        heads = [escape(title) for title in titles[start : start + _ABREAST]]
        table = Table("", *heads, box=SIMPLE_HEAD, pad_edge=False)
        for label in dict.fromkeys(label for column in part for label in column):
            table.add_row(label, *(column.get(label, _MISSING) for column in part))
        tables.append(table)
    return tables


def _now(devices: Sequence[Device], infos: Mapping[str, GpuInfo], states: Mapping[str, GpuState]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("Now", "SM clock", "Memory clock", "Power", "Temp.", "Memory used", box=SIMPLE_HEAD, pad_edge=False)
    for device in devices:
        info, state = infos.get(device.uuid), states[device.uuid]
        table.add_row(
            device.device,
            _of(state.sm_clock_mhz, info.max_sm_clock_mhz if info else None, "MHz"),
            _of(state.memory_clock_mhz, info.max_memory_clock_mhz if info else None, "MHz"),
            _of(state.power_w, device.power_limit_w, "W"),
            _plain(state.temperature_c, "°C"),
            _quantity(state.memory_used_bytes, "B"),
        )
    return table


def _lower_names(spec: GpuSpec) -> list[str]:
    return [spec.key.lower(), *(name.lower() for name in spec.names)]


def _origin(device: Device) -> str:
    if not device.peak_flops_per_s and device.peak_bandwidth_bytes_per_s is None:
        return _MISSING
    return "computed upper bound" if device.is_peak_computed else "published, dense"


def _pcie(device: Device, info: GpuInfo | None) -> str:
    if info is None or info.pcie_generation is None or info.pcie_width is None:
        return _MISSING
    return f"gen {info.pcie_generation} x{info.pcie_width}, {_quantity(device.pcie_bandwidth_bytes_per_s, 'B/s')}"


def _rate(flops_per_s: float | None, dtype: str) -> str:
    text = _quantity(flops_per_s, "FLOP/s")
    return text.replace("FLOP", "OP") if dtype == "int8" else text


def _link(gigabytes_per_s: float | None) -> str:
    return _quantity(_times(gigabytes_per_s, 1e9), "B/s")


def _quantity(value: float | None, unit: str) -> str:
    return _MISSING if value is None else format_value(value, unit)


def _plain(value: float | None, unit: str) -> str:
    return _MISSING if value is None else f"{value:.0f} {unit}"


def _of(value: float | None, limit: float | None, unit: str) -> str:
    return _MISSING if value is None and limit is None else f"{_count(value)} / {_count(limit)} {unit}"


def _count(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.0f}"


def _mebibytes(size_bytes: float | None) -> str:
    return _MISSING if size_bytes is None else f"{size_bytes / 2**20:.0f} MiB"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _on(value: bool | None) -> str:
    return _MISSING if value is None else "on" if value else "off"
