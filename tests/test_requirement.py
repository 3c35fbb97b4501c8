"""What a test may ask of its GPUs, and what satisfies it."""

from typing import Any

import pytest

from pytest_gpuperf.devices import Device, find_devices
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.nvml import Ancestor, GpuInfo
from pytest_gpuperf.requirement import GpuRequirement, eligible, groups, shortfall
from pytest_gpuperf.testing import FakeNvml, fake_gpu

FOUR = tuple(fake_gpu(index) for index in range(4))
CPU = Device(kind="cpu", index=0, uuid="cpu-0", name="Intel(R) Xeon(R) Processor", memory_bytes=64 * 10**9)


def found(*gpus: GpuInfo) -> tuple[Device, ...]:
    return find_devices(FakeNvml(*gpus), cuda_visible_devices=None)


def h200(index: int = 0, **changes: Any) -> GpuInfo:
    values: dict[str, Any] = {"name": "NVIDIA H200", "pci_device_id": "2335", "memory_bytes": 150_754_820_096}
    return fake_gpu(index, **{**values, "memory_bus_bits": 6144, "max_memory_clock_mhz": 3201.0, **changes})


def test_marker_arguments_become_a_requirement() -> None:
    asked = GpuRequirement.from_arguments(
        "test_a", (), {"count": 2, "min_vram_gb": 40, "arch": "Hopper", "nvlink": True, "exclusive": "host"}
    )
    assert asked == GpuRequirement(count=2, min_vram_gb=40.0, arch="Hopper", nvlink=True, exclusive="host")
    assert str(asked) == "gpu(count=2, min_vram_gb=40, arch='Hopper', nvlink=True, exclusive='host')"
    assert str(GpuRequirement()) == "gpu()"


def test_an_unknown_argument_is_named_with_the_valid_ones() -> None:
    with pytest.raises(UsageError) as raised:
        GpuRequirement.from_arguments("test_a", (), {"vram": 80})
    assert (
        str(raised.value)
        == "Unknown argument 'vram' in @gpu of test_a. Valid: arch, count, exclusive, min_vram_gb, nvlink."
    )


def test_a_positional_argument_is_refused() -> None:
    with pytest.raises(UsageError, match=r"@gpu of test_a has arguments without a name: 2\. Write @gpu\(count=2\)"):
        GpuRequirement.from_arguments("test_a", (2,), {})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", True, "a whole number of GPUs, 1 or more"),
        ("count", 0, "a whole number of GPUs, 1 or more"),
        ("count", 2.0, "a whole number of GPUs, 1 or more"),
        ("min_vram_gb", "80GB", "a number of GB"),
        ("min_vram_gb", float("nan"), "a number of GB"),
        ("min_vram_gb", -1, "a number of GB"),
        ("min_vram_gb", True, "a number of GB"),
        ("arch", "hoper", "ada, ada lovelace, ampere, blackwell, blackwell ultra, hopper, turing, volta"),
        ("arch", 9.0, "or a compute capability"),
        ("arch", ">9.0", "or a compute capability"),
        ("nvlink", 1, "True or False"),
        ("exclusive", "node", "'gpu' (its GPUs alone, the default) or 'host' (the whole machine)"),
        ("exclusive", True, "or 'host'"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(name: str, value: object, wanted: str) -> None:
    with pytest.raises(UsageError) as raised:
        GpuRequirement.from_arguments("test_a", (), {name: value})
    assert str(raised.value).startswith(f"{name}={value!r} in @gpu of test_a is not ")
    assert wanted in str(raised.value)


def test_nvlink_needs_more_than_one_gpu() -> None:
    with pytest.raises(UsageError, match="Add count=2 or more"):
        GpuRequirement.from_arguments("test_a", (), {"nvlink": True})


@pytest.mark.parametrize(
    ("arch", "fits"),
    [
        (None, True),
        ("hopper", True),
        ("Hopper", True),
        ("9.0", True),
        (">=8.0", True),
        (">= 9.0", True),
        (">=10.0", False),
        ("8.0", False),
        ("ampere", False),
    ],
)
def test_an_architecture_is_a_name_or_a_capability(arch: str | None, fits: bool) -> None:
    assert bool(eligible(GpuRequirement(arch=arch), found(fake_gpu()))) is fits


def test_the_first_word_of_an_architecture_is_enough() -> None:
    (l4,) = found(fake_gpu(name="NVIDIA L4", pci_device_id="ffff", compute_capability="8.9", core_count=7424))
    assert eligible(GpuRequirement(arch="ada"), [l4])
    (b300,) = found(fake_gpu(name="unknown", pci_device_id="ffff", compute_capability="10.3"))
    assert eligible(GpuRequirement(arch="blackwell"), [b300])
    assert not eligible(GpuRequirement(arch="ada"), [b300])


def test_what_can_be_satisfied_has_no_shortfall() -> None:
    assert shortfall(GpuRequirement(count=2, min_vram_gb=80), found(*FOUR)) is None


@pytest.mark.parametrize(
    ("asked", "gpus", "reason"),
    [
        (
            GpuRequirement(min_vram_gb=90),
            FOUR,
            "test asks gpu(min_vram_gb=90), but the largest GPU here has 85.52 GB (NVIDIA H100 80GB HBM3).",
        ),
        (
            GpuRequirement(min_vram_gb=99, arch="9.0"),
            FOUR,
            (
                "test asks gpu(min_vram_gb=99, arch='9.0'), "
                "but the largest GPU here of that kind has 85.52 GB (NVIDIA H100 80GB HBM3)."
            ),
        ),
        (GpuRequirement(count=2), FOUR[:1], "test asks gpu(count=2), but there is 1 GPU here."),
        (
            GpuRequirement(count=2, min_vram_gb=90),
            (fake_gpu(), h200(1)),
            "test asks gpu(count=2, min_vram_gb=90), but 1 of the 2 GPUs here would do.",
        ),
        (
            GpuRequirement(arch="ampere"),
            FOUR,
            "test asks gpu(arch='ampere'), but no GPU here is of that kind (NVIDIA H100 80GB HBM3: Hopper 9.0).",
        ),
    ],
)
def test_a_shortfall_has_its_numbers(asked: GpuRequirement, gpus: tuple[GpuInfo, ...], reason: str) -> None:
    assert shortfall(asked, found(*gpus)) == reason


def test_without_any_gpu_everything_falls_short() -> None:
    assert shortfall(GpuRequirement(), ()) == "test asks gpu(), but there is no GPU here."


@pytest.mark.parametrize(
    "asked", [GpuRequirement(count=2), GpuRequirement(arch="hopper"), GpuRequirement(count=2, nvlink=True)]
)
def test_the_cpu_cannot_stand_in_for_a_particular_gpu(asked: GpuRequirement) -> None:
    assert shortfall(asked, [CPU]) == (
        f"test asks {asked}, which needs a GPU, and this run measures on the CPU (Intel(R) Xeon(R) Processor)."
    )


def test_on_the_cpu_memory_is_compared_with_ram() -> None:
    assert shortfall(GpuRequirement(min_vram_gb=64), [CPU]) is None
    assert shortfall(GpuRequirement(min_vram_gb=65), [CPU]) == (
        "test asks gpu(min_vram_gb=65), but this machine has 64.00 GB of RAM, "
        "and this run measures on the CPU (Intel(R) Xeon(R) Processor)."
    )


def test_nvlink_must_connect_every_two_of_the_gpus() -> None:
    a, b, c, _ = (gpu.uuid for gpu in FOUR)
    chain = FakeNvml(*FOUR, nvlinks=[(a, b), (b, c)])
    devices = find_devices(chain, cuda_visible_devices=None)
    pair, three = GpuRequirement(count=2, nvlink=True), GpuRequirement(count=3, nvlink=True)
    assert [[one.index for one in group] for group in groups(pair, devices, chain)] == [[0, 1], [1, 2]]
    assert shortfall(pair, devices, chain) is None
    assert shortfall(three, devices, chain) == (
        "test asks gpu(count=3, nvlink=True), "
        "but no 3 GPUs here are known to be connected by NVLink (`nvidia-smi topo -m`)."
    )


@pytest.mark.parametrize("nvml", [None, FakeNvml(*FOUR, nvlinks=None)])
def test_nvlink_that_cannot_be_read_is_a_shortfall(nvml: FakeNvml | None) -> None:
    assert "known to be connected" in (shortfall(GpuRequirement(count=2, nvlink=True), found(*FOUR), nvml) or "")


def test_only_the_best_connected_sets_are_offered_in_the_order_of_the_devices() -> None:
    a, b, c, d = (gpu.uuid for gpu in FOUR)
    places: dict[tuple[str, str], Ancestor] = dict.fromkeys([(a, c), (a, d), (b, c), (b, d)], "system")
    nvml = FakeNvml(*FOUR, ancestors={**places, (a, b): "switch", (c, d): "switch"})
    devices = find_devices(nvml, cuda_visible_devices=None)
    found = groups(GpuRequirement(count=2), devices, nvml)
    assert [[one.index for one in group] for group in found] == [[0, 1], [2, 3]]


def test_the_driver_is_asked_once_a_pair_and_not_at_all_for_one_gpu() -> None:
    nvml = FakeNvml(*FOUR)
    devices = find_devices(nvml, cuda_visible_devices=None)
    assert len(groups(GpuRequirement(count=3), devices, nvml)) == 4
    assert nvml.calls.count("has_nvlink") == 6
    groups(GpuRequirement(), devices, nvml)
    assert nvml.calls.count("has_nvlink") == 6


def mig(count: int, visible: str | None = None) -> tuple[Device, ...]:
    parent = fake_gpu(0, mig_enabled=True)
    parts = [fake_gpu(i, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid=f"MIG-{i}") for i in range(count)]
    return find_devices(FakeNvml(parent, instances={parent.uuid: parts}), cuda_visible_devices=visible)


def test_a_test_gets_the_first_mig_instance_alone() -> None:
    two = mig(2, "MIG-1,MIG-0")
    assert [[one.uuid for one in group] for group in groups(GpuRequirement(), two, None)] == [["MIG-1"]]
    assert groups(GpuRequirement(), two[1:], None) == ()


def test_two_mig_instances_are_more_than_a_test_can_have() -> None:
    assert shortfall(GpuRequirement(count=2), mig(2, "MIG-0,MIG-1")) == (
        "test asks gpu(count=2), but CUDA shows a process one MIG instance, the first "
        "(NVIDIA H100 80GB HBM3 MIG 1g.10gb). Ask for one GPU, or turn MIG off with `sudo nvidia-smi -mig 0`."
    )


def test_a_gpu_behind_a_mig_instance_is_not_offered_where_the_instance_is_too_small() -> None:
    parent, whole = fake_gpu(0, mig_enabled=True), fake_gpu(1)
    part = fake_gpu(0, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid="MIG-0", memory_bytes=10 * 10**9)
    nvml = FakeNvml(parent, whole, instances={parent.uuid: [part]})
    both = find_devices(nvml, cuda_visible_devices=f"MIG-0,{whole.uuid}")
    assert [one.uuid for one in both] == ["MIG-0", whole.uuid]
    assert groups(GpuRequirement(min_vram_gb=40), both, nvml) == ()
    assert shortfall(GpuRequirement(min_vram_gb=40), both, nvml) == (
        "test asks gpu(min_vram_gb=40), but CUDA shows a process one MIG instance, the first "
        "(NVIDIA H100 80GB HBM3 MIG 1g.10gb). Ask for one GPU, or turn MIG off with `sudo nvidia-smi -mig 0`."
    )
