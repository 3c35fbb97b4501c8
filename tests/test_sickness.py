"""What makes a GPU unfit, the table of Xid codes, and the vital signs over a window."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import GpuCondition, GpuInfo
from pytest_gpuperf.sickness import describe, is_hardware, load_xids, sickness
from pytest_gpuperf.testing import FakeNvml, RecordingHeader, ReplayNvml, fake_condition, fake_gpu
from pytest_gpuperf.vitals import Signs, Vitals, Window

UUID, OTHER = fake_gpu().uuid, fake_gpu(1).uuid

#: Those that the documentation promises.
PROMISED = {
    *(8, 13, 31, 32, 38, 43, 44, 45, 48, 61, 62, 63, 64, 68, 69, 74, 79, 92, 94, 95),
    *(109, 110, 119, 120, 121, 123, 137, 140, 143, 145, 149, 154),
}


def window_of(*conditions: GpuCondition, nvml: FakeNvml | None = None, looks: int = 1) -> Signs:
    """The signs of one GPU whose condition follows a script."""
    window = Window(Vitals(nvml or FakeNvml(conditions=conditions)), [UUID])
    for _ in range(looks):
        window.look()
    return window.end()


# The table


def test_the_table_has_every_code_that_is_promised_with_words() -> None:
    table = load_xids()
    assert set(table) >= PROMISED
    assert all(xid.name and xid.mend for xid in table.values())


def test_the_table_names_its_source_and_uses_each_of_its_mends() -> None:
    table = json.loads(files("pytest_gpuperf").joinpath("data/xid.json").read_text())
    assert "docs.nvidia.com/deploy/xid-errors" in table["source"]
    assert {row["mend"] for row in table["xids"].values()} == set(table["mends"])


@pytest.mark.parametrize("kinds", [("hardware",), ("application",), ("driver", "information")], ids=" ".join)
def test_the_documentation_lists_the_codes_of_each_kind(kinds: tuple[str, ...]) -> None:
    page = (Path(__file__).parent.parent / "docs/health.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"- `{kinds[0]}`"))
    listed = re.findall(r"(\d+)(?: to (\d+))?", row.partition("(")[2])
    codes = {code for first, last in listed for code in range(int(first), int(last or first) + 1)}
    assert codes == {code for code, xid in load_xids().items() if xid.kind in kinds}


@pytest.mark.parametrize("code", [8, 13, 31, 43, 45, 68, 69, 137])
def test_what_the_users_kernel_did_is_no_sickness(code: int) -> None:
    assert load_xids()[code].kind == "application"
    assert sickness(xids=[code]) is None


@pytest.mark.parametrize("code", [32, 38, 44, 63, 92, 121, 123, 154])
def test_what_needs_no_reset_is_no_sickness(code: int) -> None:
    assert load_xids()[code].kind in ("driver", "information")
    assert sickness(xids=[code]) is None


@pytest.mark.parametrize("code", [48, 61, 62, 64, 74, 79, 94, 95, 109, 110, 119, 120, 140, 143, 145, 149])
def test_what_needs_a_reset_or_a_repair_is_a_sickness(code: int) -> None:
    assert is_hardware(code)
    assert sickness(xids=[code]) == describe(code)


def test_a_code_is_described_with_what_happened_and_what_to_do() -> None:
    assert describe(79) == (
        "Xid 79 (the GPU fell off the bus): drain the node and power it off and on; "
        "if it comes back, have the GPU, its power and its slot checked"
    )
    assert "compute-sanitizer" in describe(31)
    assert "sudo nvidia-smi --gpu-reset" in describe(48)


def test_a_code_that_the_table_lacks_is_said_so_and_is_no_sickness() -> None:
    assert describe(777).startswith("Xid 777 (not in the table): look it up in NVIDIA's Xid catalogue")
    assert sickness(xids=[777]) is None


# Sickness


def test_a_well_gpu_has_none() -> None:
    assert sickness(xids=(), ecc_uncorrected=0, has_remap_failed=False) is None
    assert sickness() is None


def test_the_first_code_of_the_hardware_is_the_one_that_is_named() -> None:
    assert sickness(xids=[31, 48, 79], ecc_uncorrected=1) == describe(48)


@pytest.mark.parametrize(("count", "words"), [(1, "1 memory error that"), (2, "2 memory errors that")])
def test_an_error_that_ecc_cannot_correct_is_a_sickness_with_its_mend(count: int, words: str) -> None:
    assert str(sickness(ecc_uncorrected=count)).startswith(f"{words} ECC cannot correct: end what uses the GPU")
    assert "sudo nvidia-smi --gpu-reset" in str(sickness(ecc_uncorrected=count))


def test_a_row_that_cannot_be_replaced_is_a_sickness_with_its_mend() -> None:
    assert sickness(has_remap_failed=True) == (
        "a bad row of memory, and no spare one is left: "
        "drain the node and have the GPU replaced (`nvidia-smi -q -d ROW_REMAPPER`)"
    )


# Vitals


def test_errors_that_were_there_before_the_first_look_are_not_this_runs() -> None:
    vitals = Vitals(FakeNvml(conditions=[fake_condition(ecc_uncorrected=7)]))
    assert vitals.sickness(UUID) is None
    assert vitals.sickness(UUID) is None


def test_an_error_after_the_first_look_makes_a_gpu_sick_and_it_stays_so() -> None:
    nvml = FakeNvml()
    vitals = Vitals(nvml)
    assert vitals.sickness(UUID) is None
    nvml.wear(UUID, ecc_uncorrected=2)
    assert str(vitals.sickness(UUID)).startswith("2 memory errors")
    assert str(vitals.sickness(UUID)).startswith("2 memory errors")


def test_an_xid_makes_a_gpu_sick_and_its_neighbour_not() -> None:
    nvml = FakeNvml(fake_gpu(), fake_gpu(1))
    vitals = Vitals(nvml)
    assert [vitals.sickness(uuid) for uuid in (UUID, OTHER)] == [None, None]
    nvml.strike(OTHER, 79)
    assert vitals.sickness(UUID) is None
    assert vitals.sickness(OTHER) == describe(79)


def test_a_row_that_could_not_be_replaced_earlier_makes_a_gpu_sick_at_once() -> None:
    assert Vitals(FakeNvml(conditions=[fake_condition(has_remap_failed=True)])).sickness(UUID) is not None


def test_a_row_that_waits_to_be_replaced_is_no_sickness() -> None:
    vitals = Vitals(FakeNvml(conditions=[fake_condition(is_remap_pending=True)]))
    assert vitals.is_remap_pending(UUID) is False  # nobody has looked
    assert vitals.sickness(UUID) is None
    assert vitals.is_remap_pending(UUID) is True


def test_a_gpu_that_is_lost_is_sick_and_says_how() -> None:
    vitals = Vitals(FakeNvml(lost={UUID: 1}))
    assert vitals.sickness(UUID) is None
    assert "is lost: it has fallen off the bus" in str(vitals.sickness(UUID))


def test_one_meter_listens_as_long_as_the_process_lasts() -> None:
    nvml = FakeNvml()
    vitals = Vitals(nvml)
    for _ in range(3):
        Window(vitals, [UUID]).end()
    assert nvml.calls.count("error_meter") == 1
    assert nvml.calls.count("gpus") == 1


def test_a_driver_that_tells_nothing_makes_nobody_sick() -> None:
    nvml = FakeNvml(conditions=[GpuCondition()], xids=None)
    vitals = Vitals(nvml)
    assert vitals.sickness(UUID) is None
    assert vitals.xids(UUID) is None
    assert window_of(nvml=nvml) == Signs()


def test_a_driver_that_does_not_list_its_gpus_any_more_is_asked_all_the_same() -> None:
    vitals = Vitals(FakeNvml(errors={("gpus", 1): DeviceError("GPU 1 is lost")}))
    assert vitals.sickness(UUID) is None


# A window


def test_errors_of_a_window_are_differences() -> None:
    signs = window_of(
        fake_condition(ecc_corrected=10, ecc_uncorrected=3),
        fake_condition(ecc_corrected=12, ecc_uncorrected=3),
        fake_condition(ecc_corrected=15, ecc_uncorrected=4),
    )
    assert (signs.ecc_corrected, signs.ecc_uncorrected) == (5, 1)


def test_a_counter_that_went_back_says_nothing() -> None:
    assert window_of(fake_condition(ecc_corrected=10), fake_condition(ecc_corrected=1)).ecc_corrected is None


@pytest.mark.parametrize("field", ["ecc_corrected", "ecc_uncorrected", "is_remap_pending", "has_remap_failed"])
def test_what_the_driver_does_not_tell_is_none_and_the_rest_is_there(field: str) -> None:
    signs = window_of(fake_condition(**{field: None}))
    fields = ("ecc_corrected", "ecc_uncorrected", "is_remap_pending", "has_remap_failed")
    assert {name for name in fields if getattr(signs, name) is None} == {field}


def test_a_window_hears_what_came_since_the_last_one() -> None:
    nvml = FakeNvml()
    vitals = Vitals(nvml)
    assert Window(vitals, [UUID]).end().xids == ()
    nvml.strike(UUID, 79)
    assert Window(vitals, [UUID]).end().xids == (79,)
    assert Window(vitals, [UUID]).end().xids == ()


def test_a_window_within_another_takes_nothing_from_it() -> None:
    nvml = FakeNvml()
    vitals = Vitals(nvml)
    outer = Window(vitals, [UUID])
    nvml.strike(UUID, 31)
    inner = Window(vitals, [UUID])
    nvml.strike(UUID, 43)
    assert inner.end().xids == (31, 43)
    assert outer.end().xids == (31, 43)


def pcie(generation: int | None, width: int | None) -> GpuCondition:
    return fake_condition(pcie_generation=generation, pcie_width=width)


def link(signs: Signs) -> tuple[int | None, ...]:
    return (signs.pcie_generation, signs.pcie_width, signs.pcie_most_generation, signs.pcie_most_width)


def test_a_link_is_what_it_was_at_best_while_the_gpu_worked() -> None:
    idle = pcie(1, 16)
    assert link(window_of(idle, pcie(3, 8), pcie(4, 8), idle, looks=2)) == (4, 8, 5, 16)


def test_a_link_that_was_seen_idle_alone_is_not_known() -> None:
    assert link(window_of(pcie(1, 16), looks=0)) == (None, None, None, None)


def test_a_link_that_the_driver_does_not_tell_is_not_known() -> None:
    assert link(window_of(pcie(None, 16))) == (None, None, None, None)
    bare = FakeNvml(fake_gpu(pcie_generation=None))
    assert link(window_of(nvml=bare)) == (None, None, None, None)


def test_a_mig_instance_has_no_link_of_its_own() -> None:
    instance = fake_gpu(0, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid="MIG-1")
    vitals = Vitals(FakeNvml(instances={UUID: [instance]}))
    window = Window(vitals, ["MIG-1"])
    window.look()
    assert link(window.end()) == (None, None, None, None)
    assert vitals.info("MIG-1") is None


class Two(FakeNvml):
    """Two GPUs of different condition."""

    def __init__(self, conditions: dict[str, GpuCondition], *gpus: GpuInfo) -> None:
        super().__init__(*(gpus or (fake_gpu(), fake_gpu(1))))
        self._by_uuid = conditions

    def condition(self, uuid: str) -> GpuCondition:
        return self._by_uuid[uuid]


def both(**changes: Any) -> Signs:
    """The signs of two GPUs of which the second is different."""
    window = Window(Vitals(Two({UUID: fake_condition(), OTHER: fake_condition(**changes)})), [UUID, OTHER])
    window.look()
    return window.end()


def test_of_two_gpus_the_worse_one_counts() -> None:
    assert both(is_remap_pending=True).is_remap_pending is True
    assert both(has_remap_failed=True).has_remap_failed is True
    assert link(both(pcie_generation=3, pcie_width=16)) == (3, 16, 5, 16)
    assert link(both(pcie_generation=5, pcie_width=4)) == (5, 4, 5, 16)


def test_of_two_gpus_errors_are_summed_and_those_of_one_alone_are_no_sum() -> None:
    nvml = FakeNvml(fake_gpu(), fake_gpu(1))
    window = Window(Vitals(nvml), [UUID, OTHER])
    nvml.wear(UUID, ecc_corrected=2)
    nvml.wear(OTHER, ecc_corrected=3)
    nvml.strike(OTHER, 13)
    nvml.strike(UUID, 31)
    signs = window.end()
    assert (signs.ecc_corrected, signs.xids) == (5, (31, 13))
    assert both(ecc_corrected=None).ecc_corrected is None


def test_a_gpu_that_is_lost_in_a_window_is_an_error() -> None:
    window = Window(Vitals(FakeNvml(lost={UUID: 1})), [UUID])
    with pytest.raises(DeviceError, match="is lost"):
        window.end()


def test_a_replay_says_nothing_of_the_hardware() -> None:
    replay = ReplayNvml(RecordingHeader(schema=1, driver=None, cuda=None, gpus=(fake_gpu(),)), [])
    assert Window(Vitals(replay), [UUID]).end() == Signs()
