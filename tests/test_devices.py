"""Which devices there are and what they can do."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.devices import Device, cpu_device, find_devices, hidden, slug, visible
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import GpuInfo
from pytest_gpuperf.specs import load_specs, spec_of
from pytest_gpuperf.testing import FakeNvml, fake_gpu

FOUR = tuple(fake_gpu(index) for index in range(4))
CPU = Device(kind="cpu", index=0, uuid="cpu-0", name="Intel(R) Xeon(R) Processor", memory_bytes=64 * 10**9)


def found(*gpus: GpuInfo) -> tuple[Device, ...]:
    return find_devices(FakeNvml(*gpus), cuda_visible_devices=None)


def h200(index: int = 0, **changes: Any) -> GpuInfo:
    values: dict[str, Any] = {"name": "NVIDIA H200", "pci_device_id": "2335", "memory_bytes": 150_754_820_096}
    return fake_gpu(index, **{**values, "memory_bus_bits": 6144, "max_memory_clock_mhz": 3201.0, **changes})


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        (" 3 , 1", [3, 1]),
        ("0,2,-1,1", [0, 2]),
        ("-1", []),
        ("1,4,0", [1]),
        ("1,,0", [1]),
        ("NoDevFiles", []),
        ("0,1,0", []),
        ("1gpu,2", [1, 2]),
        ("GPU-00000002", [2]),
        (f"{FOUR[3].uuid},GPU-00000001-", [3, 1]),
        ("GPU-0", []),
        ("GPU-00000001,GPU-ffffffff,GPU-00000002", [1]),
        ("GPU-00000001,GPU-00000001-0000", []),
        ("GPU-00000001,2", [1]),
        ("2,GPU-00000001", [2]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(variable: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible(FOUR, variable)] == indices


DIVIDED = fake_gpu(1, mig_enabled=True)
PARTS = tuple(
    fake_gpu(
        i, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid=f"MIG-{i}abc", memory_bytes=10 * 2**30, compute_capability=None
    )
    for i in range(2)
)
MIXED = FakeNvml(FOUR[0], DIVIDED, instances={DIVIDED.uuid: PARTS})


@pytest.mark.parametrize(
    ("variable", "uuids"),
    [
        (None, [FOUR[0].uuid, "MIG-0abc"]),
        ("MIG-1abc", ["MIG-1abc"]),
        ("MIG-1", ["MIG-1abc"]),
        ("MIG-", []),
        ("MIG-7", []),
        ("MIG-1abc,MIG-0abc", ["MIG-1abc", "MIG-0abc"]),
        ("MIG-1,MIG-1abc", []),
        ("1", ["MIG-0abc"]),
        ("GPU-00000001", ["MIG-0abc"]),
        ("GPU-00000001,MIG-0", ["MIG-0abc"]),
        ("0", [FOUR[0].uuid]),
        ("0,MIG-0abc", [FOUR[0].uuid]),
    ],
)
def test_mig_instances_are_named_by_uuid_and_a_divided_gpu_is_its_first(variable: str, uuids: list[str]) -> None:
    assert [one.uuid for one in find_devices(MIXED, cuda_visible_devices=variable)] == uuids


def test_a_mig_instance_is_a_part_of_its_gpu_without_peaks() -> None:
    [part] = find_devices(MIXED, cuda_visible_devices="MIG-1")
    assert (part.is_mig, part.parent_uuid, part.memory_bytes) == (True, DIVIDED.uuid, 10 * 2**30)
    assert (part.peak_flops_per_s, part.peak_bandwidth_bytes_per_s, part.sm_count) == ({}, None, None)
    assert (part.architecture, part.compute_capability) == ("Hopper", "9.0")  # its GPU's


def test_the_old_name_of_a_mig_instance_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DeviceError) as error:
        visible(FOUR, "MIG-GPU-1234/1/0")
    assert str(error.value) == (
        "CUDA_VISIBLE_DEVICES names the MIG instance 'MIG-GPU-1234/1/0' in the way of drivers before 470. "
        "Name it as `nvidia-smi -L` does: MIG- and a UUID of its own."
    )


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("0,7", "entry 2, '7', ends the list: there is no such GPU here, only GPUs 0 to 3 (`nvidia-smi -L`)."),
        ("abc", "entry 1, 'abc', ends the list: there is no such GPU here, only GPUs 0 to 3 (`nvidia-smi -L`)."),
        ("", "entry 1, '', ends the list: there is no such GPU here, only GPUs 0 to 3 (`nvidia-smi -L`)."),
        ("0, -1 ,2", "entry 2, '-1', ends the list: there is no such GPU here, only GPUs 0 to 3 (`nvidia-smi -L`)."),
        ("0,1,0", "'0' names a GPU a second time, and then CUDA shows none. Name each once."),
        ("GPU-0", "entry 1, 'GPU-0', ends the list: 4 UUIDs begin so. Write more of it (`nvidia-smi -L`)."),
        (
            "0,GPU-00000001",
            "entry 2, 'GPU-00000001', ends the list: the list began with an index. Write indices only, or UUIDs only.",
        ),
    ],
)
def test_the_entry_that_ends_the_list_is_named(variable: str, words: str) -> None:
    assert hidden(FakeNvml(*FOUR), cuda_visible_devices=variable) == f"In CUDA_VISIBLE_DEVICES, {words}"


@pytest.mark.parametrize(
    ("variable", "places"),
    [
        (None, [0, 1, 3]),
        ("", []),
        ("1,0", [1, 0]),
        ("GPU-00000003,GPU-00000000", [3, 0]),
        ("0,GPU-00000002", [0]),
        ("1,-1", [1]),
    ],
)
def test_a_lost_gpu_is_left_out_where_it_is_certain_which_the_others_are(
    variable: str | None, places: list[int]
) -> None:
    nvml = FakeNvml(*FOUR, lost={FOUR[2].uuid: 0})
    found = find_devices(nvml, cuda_visible_devices=variable)
    assert [device.uuid for device in found] == [FOUR[place].uuid for place in places]


@pytest.mark.parametrize(("variable", "entry"), [("2", "2"), ("0,3", "3"), ("1, 2,0", "2"), ("+2x", "+2x"), ("9", "9")])
def test_a_number_that_may_be_another_gpu_since_one_is_lost_is_refused(variable: str, entry: str) -> None:
    nvml = FakeNvml(*FOUR, lost={FOUR[2].uuid: 0})
    with pytest.raises(DeviceError) as error:
        find_devices(nvml, cuda_visible_devices=variable)
    assert str(error.value).startswith("GPU 2 is lost: it has fallen off the bus.")
    assert str(error.value).endswith(
        f"Until then, which GPU {entry!r} in CUDA_VISIBLE_DEVICES stands for is not certain. "
        "Name GPUs by UUID (`nvidia-smi -L`)."
    )
    with pytest.raises(DeviceError, match="is not certain"):
        hidden(nvml, cuda_visible_devices=variable)


@pytest.mark.parametrize("variable", [None, "0,1", "GPU-00000001"])
def test_a_list_whose_entries_all_count_hides_nothing(variable: str | None) -> None:
    assert hidden(FakeNvml(*FOUR), cuda_visible_devices=variable) is None


def test_a_divided_gpu_without_an_instance_is_not_there_and_the_remedy_is_named() -> None:
    nvml = FakeNvml(DIVIDED)
    assert find_devices(nvml, cuda_visible_devices=None) == ()
    assert hidden(nvml, cuda_visible_devices=None) == (
        "GPU 1 (NVIDIA H100 80GB HBM3) is in MIG mode and has no instance: make one with "
        "`sudo nvidia-smi mig -i 1 -cgi 0 -C`, or turn MIG off: `sudo nvidia-smi -mig 0`."
    )


@given(st.text(alphabet="0123-,GPU x", max_size=30))
def test_visible_gpus_are_each_there_once(variable: str) -> None:
    chosen = visible(FOUR, variable)
    assert set(chosen) <= set(FOUR)
    assert len(chosen) == len(set(chosen))


def test_devices_are_numbered_as_torch_numbers_them() -> None:
    devices = find_devices(FakeNvml(*FOUR), cuda_visible_devices="3,1")
    assert [(one.device, one.uuid) for one in devices] == [("cuda:0", FOUR[3].uuid), ("cuda:1", FOUR[1].uuid)]


def test_without_a_driver_there_are_no_gpus() -> None:
    assert find_devices(None, cuda_visible_devices=None) == ()


def test_an_h100_has_its_published_peaks() -> None:
    (device,) = found(fake_gpu())
    assert device.peak_flops_per_s["bfloat16"] == 989e12
    assert device.peak_flops_per_s["float64"] == 67e12  # the tensor cores', which cuBLAS uses
    assert device.peak_flops_per_s["float8"] == 1979e12
    assert device.peak_bandwidth_bytes_per_s == 3350e9
    assert device.pcie_bandwidth_bytes_per_s == pytest.approx(63.008e9)
    assert (device.architecture, device.sm_count, device.l2_bytes) == ("Hopper", 132, 50 * 2**20)
    assert not device.is_peak_computed


def test_a_dtype_without_a_published_peak_has_none() -> None:
    memory_bytes = 15360 * 2**20
    t4 = fake_gpu(name="Tesla T4", pci_device_id="1eb8", compute_capability="7.5", core_count=2560)
    (device,) = found(msgspec.structs.replace(t4, memory_bytes=memory_bytes))
    assert device.peak_flops_per_s["float16"] == 65e12
    assert "bfloat16" not in device.peak_flops_per_s


def test_the_pci_id_decides_before_the_name() -> None:
    spec = spec_of(fake_gpu(name="NVIDIA H100 PCIe"))
    assert spec is not None
    assert spec.key == "H100-SXM-80"


def test_an_exact_name_decides_where_the_pci_id_is_unknown() -> None:
    spec = spec_of(fake_gpu(pci_device_id=None))
    assert spec is not None
    assert spec.key == "H100-SXM-80"


@pytest.mark.parametrize("name", ["NVIDIA H100", "H100 80GB HBM3", "NVIDIA H100 80GB HBM3e", "nvidia h100 80gb hbm3"])
def test_a_part_of_a_name_is_never_enough(name: str) -> None:
    assert spec_of(fake_gpu(name=name, pci_device_id="ffff")) is None


def test_every_name_and_pci_id_of_the_table_finds_its_own_row() -> None:
    for spec in load_specs().gpus:
        size = {"memory_bytes": int((spec.observed_total_memory_mb or (spec.vram_gb or 80) * 1024) * 2**20)}
        unknown: dict[str, Any] = {**size, "core_count": None}
        for name in spec.names:
            assert spec_of(fake_gpu(name=name, pci_device_id=None, **unknown)) == spec
        for device_id in spec.pci_device_ids:
            assert spec_of(fake_gpu(name="renamed", pci_device_id=device_id.lower(), **unknown)) == spec


@pytest.mark.parametrize("changes", [{"core_count": 114 * 128}, {"memory_bytes": 64 * 2**30}])
def test_a_gpu_that_contradicts_its_row_has_computed_peaks(changes: Mapping[str, Any]) -> None:
    (device,) = found(fake_gpu(**changes))
    assert device.is_peak_computed
    assert device.architecture == "Hopper"


def test_an_unknown_gpu_has_upper_bounds_from_clock_and_sm_count() -> None:
    (device,) = found(fake_gpu(name="NVIDIA H900", pci_device_id="ffff"))
    assert device.is_peak_computed
    assert device.peak_flops_per_s["bfloat16"] == pytest.approx(132 * 1980e6 * 4096)
    assert device.peak_flops_per_s["float32"] == pytest.approx(16896 * 1980e6 * 2)
    assert "float64" not in device.peak_flops_per_s
    assert device.peak_bandwidth_bytes_per_s == pytest.approx(2619e6 * 2 * 640)


def test_a_gpu_of_which_nothing_is_known_has_no_peaks() -> None:
    (device,) = found(GpuInfo(index=0, uuid="GPU-0", name="Mystery", memory_bytes=10**9))
    assert device.peak_flops_per_s == {}
    assert device.peak_bandwidth_bytes_per_s is None
    assert device.pcie_bandwidth_bytes_per_s is None
    assert not device.is_peak_computed


def test_a_gpu_that_is_named_as_a_mig_instance_has_no_peaks() -> None:
    (device,) = found(fake_gpu(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb"))
    assert device.is_mig
    assert (device.peak_flops_per_s, device.peak_bandwidth_bytes_per_s, device.sm_count) == ({}, None, None)
    assert not device.is_peak_computed


@pytest.mark.parametrize(
    ("generation", "width", "expected"), [(3, 16, 15.76e9), (6, 8, 60.504e9), (2, 16, None), (5, None, None)]
)
def test_pcie_bandwidth_is_lanes_times_their_rate(generation: int, width: int | None, expected: float | None) -> None:
    (device,) = found(fake_gpu(pcie_generation=generation, pcie_width=width))
    assert device.pcie_bandwidth_bytes_per_s == pytest.approx(expected)


def test_a_uuid_is_published_hashed_and_memory_in_gb() -> None:
    (device,) = found(fake_gpu())
    assert re.fullmatch("[0-9a-f]{12}", device.uuid_hash)
    assert device.vram_gb == pytest.approx(85.52, abs=0.01)


def test_the_cpu_is_a_device_with_its_model_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654 96-Core Processor\nmodel name\t: other\n")
    cpu = cpu_device(cpuinfo=cpuinfo)
    assert (cpu.kind, cpu.device, cpu.name) == ("cpu", "cpu", "AMD EPYC 9654 96-Core Processor")
    assert cpu.uuid.startswith("cpu-")
    assert cpu.memory_bytes > 10**8
    assert cpu.peak_flops_per_s == {}


def test_the_cpu_has_a_name_where_linux_gives_none(tmp_path: Path) -> None:
    assert cpu_device(cpuinfo=tmp_path / "missing").name


def test_baselines_live_in_a_folder_named_for_the_gpu() -> None:
    one, two = found(fake_gpu()), found(h200(), h200(1))
    assert slug(one) == "nvidia-h100-80gb-hbm3"
    assert slug(two) == "2x-nvidia-h200"
    assert slug((one[0], two[0])) == "1x-nvidia-h100-80gb-hbm3-and-1x-nvidia-h200"
    assert slug([CPU]) == "cpu-intel-r-xeon-r-processor"
    assert slug(one, "Pool A") == "nvidia-h100-80gb-hbm3+pool-a"
    assert slug(one, "") == "nvidia-h100-80gb-hbm3"


@given(st.text(), st.none() | st.text())
def test_a_slug_is_one_safe_path_component(name: str, label: str | None) -> None:
    text = slug([Device(kind="cuda", index=0, uuid="x", name=name, memory_bytes=1)], label)
    assert re.fullmatch(r"[a-z0-9][a-z0-9+-]{0,99}", text)


def test_long_names_that_differ_at_the_end_only_have_different_slugs() -> None:
    slugs = {slug([CPU], "x" * 200 + end) for end in "ab"}
    assert len(slugs) == 2
    assert {len(text) for text in slugs} == {100}


def test_no_devices_have_no_slug() -> None:
    with pytest.raises(DeviceError, match="Without a device"):
        slug([])
