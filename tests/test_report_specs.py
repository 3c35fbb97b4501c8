"""The tables of `gpuperf specs`, as a user reads them in 80 columns."""

import io
import re
from typing import TYPE_CHECKING

import pytest

from pytest_gpuperf.devices import cpu_device, find_devices
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.nvml import GpuInfo, GpuState
from pytest_gpuperf.report.specs import compare_table, find_spec, specs_table
from pytest_gpuperf.testing import FakeNvml, fake_gpu, fake_state

if TYPE_CHECKING:
    from rich.console import RenderableType


def printed(table: "RenderableType") -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=80, color_system=None).print(table)
    assert all(len(line) <= 80 for line in file.getvalue().splitlines())
    return file.getvalue()


def row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return re.split(r"\s{2,}", line.strip())[1:]


def shown(*gpus: GpuInfo, state: GpuState | None = None, all_rows: bool = False) -> str:
    nvml = FakeNvml(*gpus, states=[state or fake_state()])
    devices = find_devices(nvml, cuda_visible_devices=None)
    infos = {gpu.uuid: gpu for gpu in gpus}
    states = {gpu.uuid: nvml.state(gpu.uuid) for gpu in gpus}
    return printed(specs_table(devices, infos, states, all_rows, driver="580.159.04", cuda="13.0"))


def test_a_gpu_is_shown_with_its_figures() -> None:
    text = shown(fake_gpu())
    assert row(text, "Architecture") == ["Hopper"]
    assert row(text, "SMs") == ["132"]
    assert row(text, "Memory") == ["85.52 GB"]
    assert row(text, "Bandwidth") == ["3.350 TB/s"]
    assert row(text, "Peak bfloat16") == ["989.0 TFLOP/s"]
    assert row(text, "Peak int8") == ["1.979 POP/s"]
    assert row(text, "Peaks are") == ["published, dense"]
    assert row(text, "PCIe") == ["gen 5 x16, 63.01 GB/s"]
    assert row(text, "Driver") == ["580.159.04"]


def test_gpus_of_one_kind_share_a_column_and_have_a_line_each() -> None:
    text = shown(fake_gpu(0), fake_gpu(1), state=fake_state(power_w=651.2, sm_clock_mhz=1410.0))
    assert "2x NVIDIA H100 80GB HBM3" in text
    for device in ("cuda:0", "cuda:1"):
        assert row(text, device) == ["1410 / 1980 MHz", "2619 / 2619 MHz", "651 / 700 W", "31 °C", "0 B"]


def test_eight_kinds_of_gpu_still_fit() -> None:
    text = shown(*(fake_gpu(index, power_limit_w=300.0 + index) for index in range(8)))
    assert text.count("Architecture") == 3


def test_computed_peaks_are_called_an_upper_bound() -> None:
    text = shown(fake_gpu(name="NVIDIA H900", pci_device_id="ffff"))
    assert row(text, "Peaks are") == ["computed upper bound"]
    assert row(text, "Peak float64") == ["-"]


def test_what_is_not_known_is_a_dash_and_never_zero() -> None:
    text = shown(
        GpuInfo(index=0, uuid="GPU-0", name="[bold]Mystery", memory_bytes=10**9), state=GpuState(), all_rows=True
    )
    labels = ("SMs", "Bandwidth", "Peak float16", "Peaks are", "PCIe", "Power limit", "ECC", "Memory bus")
    assert [row(text, label) for label in labels] == [["-"]] * len(labels)
    assert row(text, "cuda:0") == ["-"] * 5
    assert "[bold]Mystery" in text
    assert not re.search(r"\s0\s", text)


def test_more_rows_are_shown_on_request() -> None:
    assert "Persistence mode" not in shown(fake_gpu())
    text = shown(fake_gpu(), all_rows=True)
    assert row(text, "Persistence mode") == ["on"]
    assert row(text, "Cores") == ["16896"]


def test_the_cpu_is_shown_without_a_state() -> None:
    text = printed(specs_table([cpu_device()], {}, {}))
    assert "Now" not in text
    assert row(text, "Driver") == ["-"]


def test_kinds_of_gpu_are_compared() -> None:
    text = printed(compare_table(["h200-sxm", "l4", "RTX-PRO-6000-Server", "mi300x"]))
    assert row(text, "Peak bf16")[:3] == ["989.0 TFLOP/s", "121.0 TFLOP/s", "-"]
    assert row(text, "NVLink, both ways")[:3] == ["900.0 GB/s", "none", "-"]
    assert text.count("Architecture") == 2


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("L4", "L4"),
        ("a10", "A10"),
        ("a100-sxm-80", "A100-SXM-80"),
        ("NVIDIA H200", "H200-SXM"),
        ("h100 pcie", "H100-PCIe"),
        (" T4 ", "T4"),
    ],
)
def test_a_gpu_is_found_by_key_name_or_a_part_of_its_own(name: str, key: str) -> None:
    assert find_spec(name).key == key


def test_a_part_that_several_gpus_have_lists_them() -> None:
    with pytest.raises(UsageError) as raised:
        find_spec("h100")
    assert str(raised.value) == "'h100' is several GPUs: H100-PCIe, H100-SXM-80, H100-NVL. Name one of them."


def test_an_unknown_name_lists_what_is_close() -> None:
    with pytest.raises(UsageError, match=r"No GPU 'h100-smx' in the table\. Did you mean .*H100-SXM-80.*\?"):
        find_spec("h100-smx")


@pytest.mark.parametrize("name", ["", "zzzzzzzz"])
def test_a_name_like_no_other_lists_them_all(name: str) -> None:
    with pytest.raises(UsageError, match=r"Known: T4, .*MI355X\."):
        find_spec(name)
