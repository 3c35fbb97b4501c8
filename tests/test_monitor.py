"""Telemetry of a region, what several devices make together, and which causes spoil a result."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from pytest_gpuperf import monitor as monitor_module
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.monitor import (
    ENERGY_FROM_S,
    FAMILY_VARIABLE,
    Monitor,
    cool_down,
    foreign_memory_bytes,
    health,
    summarize,
)
from pytest_gpuperf.nvml import GpuCondition, GpuSample, GpuState
from pytest_gpuperf.records import Kind, Telemetry
from pytest_gpuperf.testing import FakeNvml, fake_condition, fake_gpu, fake_state
from pytest_gpuperf.vitals import Vitals

UUID = fake_gpu().uuid
OTHER_UUID = fake_gpu(1).uuid
LOST = DeviceError("GPU 0 is lost: it has fallen off the bus.")

COUNTERS = {
    "power_cap_s": "power_cap_share",
    "sync_boost_s": "sync_boost_share",
    "sw_thermal_s": "sw_thermal_share",
    "hw_thermal_s": "hw_thermal_share",
    "power_brake_s": "power_brake_share",
}


def summary(
    before: GpuState, after: GpuState, *, samples: Sequence[GpuSample] = (), duration_s: float = 10.0
) -> Telemetry:
    return summarize([before], [after], samples, duration_s)


def seen_with(*pids: int) -> tuple[int, ...] | None:
    """What is found to be another's if the driver names these processes."""
    return summary(fake_state(), fake_state(process_pids=pids)).other_process_pids


def well(**changes: Any) -> Telemetry:
    return msgspec.structs.replace(Telemetry(duration_s=1.0, sm_clock_mhz=1755.0), **changes)


# The region


def test_a_region_without_nvml_knows_its_duration_alone() -> None:
    with Monitor(None, [UUID]) as monitor:
        time.sleep(0.01)
    assert monitor.telemetry.duration_s >= 0.01
    assert monitor.telemetry == Telemetry(duration_s=monitor.telemetry.duration_s)


def test_the_telemetry_is_not_known_before_the_end() -> None:
    with Monitor(None, ()) as monitor, pytest.raises(RuntimeError, match="is known when the region has ended"):
        _ = monitor.telemetry


def test_a_region_that_failed_has_no_telemetry() -> None:
    monitor = Monitor(FakeNvml(), [UUID])
    with pytest.raises(ZeroDivisionError), monitor:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="has ended"):
        _ = monitor.telemetry


def test_a_region_reads_the_state_before_and_after() -> None:
    states = [fake_state(power_cap_s=5.0), fake_state(power_cap_s=5.0 + 1e6)]
    with Monitor(FakeNvml(states=states), [UUID]) as monitor:
        pass
    assert monitor.telemetry.power_cap_share == 1.0


def test_clocks_are_sampled_while_the_region_lasts() -> None:
    nvml = FakeNvml(samples=[GpuSample(sm_clock_mhz=1000.0), GpuSample(sm_clock_mhz=1500.0)])
    with Monitor(nvml, [UUID]) as monitor:
        time.sleep(0.25)
    assert nvml.calls.count("sample") >= 1
    clock_mhz = monitor.telemetry.sm_clock_mhz
    assert clock_mhz is not None
    assert 1000.0 <= clock_mhz <= 1500.0


def test_nobody_samples_after_the_region() -> None:
    nvml = FakeNvml()
    with Monitor(nvml, [UUID]):
        time.sleep(0.15)
    count = len(nvml.calls)
    time.sleep(0.15)
    assert len(nvml.calls) == count


def test_a_short_region_takes_its_clock_from_the_state_after() -> None:
    nvml = FakeNvml(states=[fake_state(), fake_state(sm_clock_mhz=1755.0, power_w=650.0, temperature_c=60.0)])
    with Monitor(nvml, [UUID]) as monitor:
        pass
    telemetry = monitor.telemetry
    assert (telemetry.sm_clock_mhz, telemetry.power_w, telemetry.temperature_c) == (1755.0, 650.0, 60.0)


def test_a_gpu_that_is_lost_before_the_region_is_an_error_from_entering() -> None:
    ran = []
    with (
        pytest.raises(DeviceError, match="fallen off the bus"),
        Monitor(FakeNvml(errors={("state", 1): LOST}), [UUID]),
    ):
        ran.append(True)
    assert not ran


def test_a_gpu_that_is_lost_in_the_region_is_an_error_from_leaving() -> None:
    monitor = Monitor(FakeNvml(errors={("state", 2): LOST}), [UUID])
    with pytest.raises(DeviceError, match="fallen off the bus"), monitor:
        pass


def test_a_gpu_that_is_lost_while_it_is_sampled_is_an_error_from_leaving() -> None:
    monitor = Monitor(FakeNvml(errors={("sample", 1): LOST}), [UUID])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnhandledThreadExceptionWarning)
        with pytest.raises(DeviceError, match="fallen off the bus"), monitor:
            time.sleep(0.2)


# One device


@pytest.mark.parametrize(("counter", "share"), COUNTERS.items())
def test_a_share_is_the_counter_over_the_time(counter: str, share: str) -> None:
    telemetry = summary(fake_state(**{counter: 100.0}), fake_state(**{counter: 102.5}))
    assert getattr(telemetry, share) == pytest.approx(0.25)
    assert {getattr(telemetry, other) for other in COUNTERS.values() if other != share} == {0.0}


@pytest.mark.parametrize(("counter", "share"), COUNTERS.items())
@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_a_counter_that_is_not_known_makes_no_share_and_no_zero(counter: str, share: str, where: str) -> None:
    before = fake_state(**({counter: None} if where != "after" else {}))
    after = fake_state(**({counter: None} if where != "before" else {}))
    assert getattr(summary(before, after), share) is None


def test_a_share_is_never_more_than_the_whole_time() -> None:
    assert summary(fake_state(power_cap_s=0.0), fake_state(power_cap_s=10.2)).power_cap_share == 1.0


def test_energy_is_known_from_five_seconds_on() -> None:
    before, after = fake_state(energy_j=1e6), fake_state(energy_j=1e6 + 3500.0)
    assert summary(before, after, duration_s=ENERGY_FROM_S).energy_j == pytest.approx(3500.0)
    assert summary(before, after, duration_s=ENERGY_FROM_S - 0.001).energy_j is None


def test_a_counter_that_went_back_was_reset_and_says_nothing() -> None:
    before = {"energy_j": 9e6, **dict.fromkeys(COUNTERS, 100.0)}
    after = {"energy_j": 50.0, **dict.fromkeys(COUNTERS, 2.0)}
    telemetry = summary(fake_state(**before), fake_state(**after))
    assert [telemetry.energy_j, *(getattr(telemetry, share) for share in COUNTERS.values())] == [None] * 6


def test_a_state_that_tells_nothing_makes_telemetry_that_tells_nothing() -> None:
    assert summary(GpuState(), GpuState()) == Telemetry(duration_s=10.0)


def test_what_is_zero_stays_zero() -> None:
    telemetry = summary(fake_state(), fake_state(memory_used_bytes=0, power_w=0.0))
    assert (telemetry.memory_used_bytes, telemetry.power_w, telemetry.energy_j) == (0, 0.0, 0.0)
    assert telemetry.other_process_pids == ()


def test_samples_are_averaged_and_the_temperature_is_the_highest() -> None:
    samples = [
        GpuSample(sm_clock_mhz=1700.0, power_w=600.0, temperature_c=50.0),
        GpuSample(sm_clock_mhz=1800.0, power_w=700.0, temperature_c=65.0),
        GpuSample(sm_clock_mhz=None, power_w=None, temperature_c=60.0),
    ]
    telemetry = summary(fake_state(), fake_state(), samples=samples)
    assert (telemetry.sm_clock_mhz, telemetry.power_w, telemetry.temperature_c) == (1750.0, 650.0, 65.0)


# Several devices


def test_power_and_energy_of_two_devices_are_summed_and_clocks_averaged() -> None:
    before = [fake_state(energy_j=0.0), fake_state(energy_j=500.0)]
    after = [
        fake_state(energy_j=3000.0, power_w=300.0, sm_clock_mhz=1500.0, temperature_c=50.0, memory_used_bytes=10),
        fake_state(energy_j=4500.0, power_w=400.0, sm_clock_mhz=1700.0, temperature_c=70.0, memory_used_bytes=30),
    ]
    telemetry = summarize(before, after, [], 10.0)
    assert telemetry.energy_j == 7000.0
    assert telemetry.power_w == 700.0
    assert telemetry.sm_clock_mhz == 1600.0
    assert (telemetry.temperature_c, telemetry.memory_used_bytes) == (70.0, 30)


def test_the_share_of_two_devices_is_that_of_the_worse() -> None:
    before = [fake_state(), fake_state()]
    after = [fake_state(hw_thermal_s=1.0), fake_state(hw_thermal_s=4.0)]
    assert summarize(before, after, [], 10.0).hw_thermal_share == pytest.approx(0.4)


def test_every_device_of_a_region_is_watched() -> None:
    nvml = FakeNvml(fake_gpu(), fake_gpu(1), samples=[GpuSample(power_w=100.0)])
    with Monitor(nvml, [UUID, OTHER_UUID]) as monitor:
        time.sleep(0.15)
    assert nvml.calls.count("state") == 4
    assert monitor.telemetry.power_w == 200.0


def test_the_energy_of_two_devices_is_not_known_if_that_of_one_is_not() -> None:
    before = [fake_state(energy_j=0.0), fake_state(energy_j=None)]
    after = [fake_state(energy_j=3000.0), fake_state(energy_j=None)]
    assert summarize(before, after, [], 10.0).energy_j is None


def test_the_power_of_two_devices_is_not_known_if_that_of_one_is_not() -> None:
    states = [fake_state(power_w=300.0), fake_state(power_w=None)]
    assert summarize(states, states, [], 10.0).power_w is None


# Health


def test_a_device_that_was_well_has_no_cause() -> None:
    assert health(well()) is None
    assert health(well(), usual_clock_mhz=1755.0) is None


def test_a_device_of_which_nothing_is_known_has_no_cause() -> None:
    assert health(Telemetry(duration_s=1.0), usual_clock_mhz=1755.0) is None


@pytest.mark.parametrize(
    ("share", "cause"),
    [
        ("hw_thermal_share", "thermal slowdown by the hardware"),
        ("sw_thermal_share", "thermal slowdown by the driver"),
        ("power_brake_share", "an external power brake"),
    ],
)
def test_heat_and_brakes_spoil_a_result_from_one_percent_of_the_time_on(share: str, cause: str) -> None:
    assert health(well(**{share: 0.12})) == f"{cause} for 12 % of the time"
    assert health(well(**{share: 0.0101})) == f"{cause} for 1.0 % of the time"
    assert health(well(**{share: 0.01})) is None


@pytest.mark.parametrize("share", ["power_cap_share", "sync_boost_share"])
def test_a_power_cap_is_how_a_gpu_works_and_no_illness(share: str) -> None:
    assert health(well(**{share: 1.0})) is None


def test_another_process_spoils_a_result() -> None:
    assert health(well(other_process_pids=(41, 42))) == "another process used the GPU (pid 41, 42)"
    assert health(well(other_process_pids=())) is None


def test_a_clock_under_three_quarters_of_the_usual_one_spoils_a_result() -> None:
    message = "the SM clock was 1312 MHz, 1750 MHz in the baseline"
    assert health(well(sm_clock_mhz=1312.0), usual_clock_mhz=1750.0) == message
    assert health(well(sm_clock_mhz=1312.5), usual_clock_mhz=1750.0) is None
    assert health(well(sm_clock_mhz=1312.0)) is None


def test_the_first_cause_is_the_one_that_is_named() -> None:
    ill = well(hw_thermal_share=0.5, other_process_pids=(41,), sm_clock_mhz=10.0)
    assert health(ill, usual_clock_mhz=1755.0) == "thermal slowdown by the hardware for 50 % of the time"


# The hardware's own errors


def test_a_region_has_the_errors_of_the_hardware() -> None:
    conditions = [fake_condition(ecc_corrected=5), fake_condition(ecc_corrected=7, is_remap_pending=True)]
    nvml = FakeNvml(conditions=conditions, xids={UUID: [(), (31,)]})
    with Monitor(nvml, [UUID]) as monitor:
        pass
    telemetry = monitor.telemetry
    assert (telemetry.ecc_corrected, telemetry.ecc_uncorrected, telemetry.xids) == (2, 0, (31,))
    assert (telemetry.is_remap_pending, telemetry.has_remap_failed) == (True, False)


def test_a_driver_that_tells_nothing_of_the_hardware_leaves_it_unknown() -> None:
    with Monitor(FakeNvml(conditions=[GpuCondition()], xids=None), [UUID]) as monitor:
        pass
    assert (monitor.telemetry.ecc_corrected, monitor.telemetry.xids) == (None, None)


def test_an_error_between_two_regions_is_heard_by_the_second() -> None:
    nvml = FakeNvml()
    vitals = Vitals(nvml)
    for code, heard in ((79, ()), (13, (79,))):
        with Monitor(nvml, [UUID], vitals=vitals) as monitor:
            pass
        assert monitor.telemetry.xids == heard
        nvml.strike(UUID, code)


@pytest.mark.usefixtures("looks_often")
def test_the_link_is_looked_at_while_the_region_lasts() -> None:
    awake = fake_condition(pcie_generation=4)
    nvml = FakeNvml(conditions=[fake_condition(pcie_generation=1), *[awake] * 99])
    with Monitor(nvml, [UUID]) as monitor:
        time.sleep(0.25)
    assert (monitor.telemetry.pcie_generation, monitor.telemetry.pcie_most_generation) == (4, 5)


def test_the_hardware_is_not_looked_at_with_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LOOK_EVERY_S", 0.3)
    nvml = FakeNvml()
    with Monitor(nvml, [UUID]):
        time.sleep(0.85)
    assert nvml.calls.count("sample") >= 5
    assert 3 <= nvml.calls.count("condition") <= 4  # before, after, and one or two in between


@pytest.mark.parametrize("answered", range(6))
def test_a_gpu_that_is_lost_at_any_call_is_an_error_of_the_region(answered: int) -> None:
    monitor = Monitor(FakeNvml(lost={UUID: answered}), [UUID])
    with pytest.raises(DeviceError, match="fallen off the bus"), monitor:
        time.sleep(0.25)


@pytest.mark.parametrize("code", [48, 79, 95])
def test_an_error_of_the_hardware_spoils_a_result_and_the_mend_is_named(code: int) -> None:
    message = health(well(xids=(31, code)))
    assert message is not None
    assert message.startswith(f"Xid {code} (")
    assert "sudo" in message or "drain the node" in message


def test_an_error_of_a_kernel_spoils_nothing() -> None:
    assert health(well(xids=(13, 31, 43, 45))) is None


def test_memory_errors_spoil_a_result_unless_they_were_corrected() -> None:
    assert str(health(well(ecc_uncorrected=1))).startswith("1 memory error that ECC cannot correct: ")
    assert health(well(ecc_corrected=1000, ecc_uncorrected=0, is_remap_pending=True)) is None
    assert str(health(well(has_remap_failed=True))).startswith("a bad row of memory")


def test_why_a_gpu_was_taken_out_of_use_is_the_first_cause() -> None:
    assert health(well(sickness="GPU 0 is lost", hw_thermal_share=0.5)) == "GPU 0 is lost"


# The link to the host


def slot(generation: int | None, width: int | None) -> Telemetry:
    return well(pcie_generation=generation, pcie_width=width, pcie_most_generation=5, pcie_most_width=16)


@pytest.mark.parametrize("kind", ["transfer", "host"])
@pytest.mark.parametrize(("generation", "width"), [(4, 16), (5, 8), (1, 1)])
def test_a_link_that_is_narrower_than_it_can_be_spoils_what_goes_over_it(
    kind: Kind, generation: int, width: int
) -> None:
    assert health(slot(generation, width), kind=kind) == (
        f"the PCIe link ran as Gen {generation} x{width}, and GPU and slot can do Gen 5 x16 "
        "(look at `nvidia-smi -q -d PCIE` and `sudo dmesg | grep -i pcie`; reseat the GPU)"
    )


@pytest.mark.parametrize("kind", ["compute", "memory", "end-to-end", None])
def test_a_narrow_link_spoils_nothing_else(kind: Kind | None) -> None:
    assert health(slot(1, 1), kind=kind) is None


@pytest.mark.parametrize(("generation", "width"), [(5, 16), (None, 16), (5, None)])
def test_a_link_that_is_as_good_as_it_can_be_or_not_known_spoils_nothing(
    generation: int | None, width: int | None
) -> None:
    assert health(slot(generation, width), kind="transfer") is None


# Memory of others


def test_memory_of_others_spoils_a_result_and_is_named_with_its_amount() -> None:
    assert health(well(foreign_memory_bytes=12_300_000_000)) == (
        "other memory in use: 12.30 GB of the GPU when the test began "
        "(`nvidia-smi` may name the process; end it, or use another GPU)"
    )


@pytest.mark.parametrize("memory_bytes", [None, 0, 200 * 2**20])
def test_no_more_memory_than_a_driver_takes_spoils_nothing(memory_bytes: int | None) -> None:
    assert health(well(foreign_memory_bytes=memory_bytes)) is None


def test_memory_in_use_before_this_process_used_any_is_of_others() -> None:
    nvml = FakeNvml(states=[fake_state(memory_used_bytes=5_000)])
    assert foreign_memory_bytes(nvml, [UUID]) == 5_000


def test_of_two_devices_the_fuller_one_counts() -> None:
    assert foreign_memory_bytes(FakeNvml(fake_gpu(), fake_gpu(1)), [UUID, OTHER_UUID]) == 0


@pytest.mark.parametrize(("desktop_bytes", "foreign_bytes"), [(0, 900), (850, 50), (1000, 0), (None, 900)])
def test_a_desktops_memory_is_nobodys(desktop_bytes: int | None, foreign_bytes: int) -> None:
    nvml = FakeNvml(states=[fake_state(memory_used_bytes=900)], desktop_memory_bytes=desktop_bytes)
    assert foreign_memory_bytes(nvml, [UUID]) == foreign_bytes


def test_memory_is_not_known_without_nvml_or_a_gpu_or_where_the_driver_does_not_tell() -> None:
    assert foreign_memory_bytes(None, [UUID]) is None
    assert foreign_memory_bytes(FakeNvml(), []) is None
    assert foreign_memory_bytes(FakeNvml(states=[fake_state(memory_used_bytes=None)]), [UUID]) is None


@pytest.mark.parametrize(("is_initialized", "expected"), [(False, 0), (True, None)])
def test_a_process_that_uses_cuda_through_torch_cannot_tell(
    monkeypatch: pytest.MonkeyPatch, is_initialized: bool, expected: int | None
) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: is_initialized))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert foreign_memory_bytes(FakeNvml(), [UUID]) == expected


@pytest.mark.parametrize("library", ["cupy", "jax", "tensorflow"])
def test_a_process_with_another_library_of_cuda_cannot_tell(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, SimpleNamespace())
    assert foreign_memory_bytes(FakeNvml(), [UUID]) is None


@pytest.fixture
def cuda_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the one that every process with CUDA holds open."""
    path = tmp_path / "nvidia-uvm"
    path.touch()
    monkeypatch.setattr(monitor_module, "_CUDA_FILE", str(path))
    monkeypatch.setattr(monitor_module, "_CUDA_LIBRARIES", ())
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return path


def test_a_process_that_has_cuda_open_without_torch_cannot_tell(cuda_file: Path) -> None:
    with cuda_file.open():
        assert foreign_memory_bytes(FakeNvml(), [UUID]) is None
    assert foreign_memory_bytes(FakeNvml(), [UUID]) == 0


def holding(path: Path, *, is_grandchild: bool) -> subprocess.Popen[str]:
    """A child, or a child's child, that has a file open; it has said so."""
    command = ["/bin/sh", "-c", 'exec 3<"$0"; echo open; exec sleep 60', str(path)]
    if is_grandchild:
        command = ["/bin/sh", "-c", '"$@" & wait', "sh", *command]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.parametrize("is_grandchild", [False, True])
def test_a_child_or_its_child_that_has_cuda_open_may_hold_the_memory(cuda_file: Path, is_grandchild: bool) -> None:
    with holding(cuda_file, is_grandchild=is_grandchild) as child:
        try:
            assert foreign_memory_bytes(FakeNvml(), [UUID]) is None
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    assert foreign_memory_bytes(FakeNvml(), [UUID]) == 0


def test_whoever_started_the_fresh_process_may_hold_the_memory(
    cuda_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAMILY_VARIABLE, str(os.getpid()))
    code = (
        "import sys; from pytest_gpuperf import monitor; from pytest_gpuperf.testing import FakeNvml, fake_gpu;"
        "monitor._CUDA_FILE = sys.argv[1];"
        "print(monitor.foreign_memory_bytes(FakeNvml(), [fake_gpu().uuid]))"
    )
    command = [sys.executable, "-c", code, str(cuda_file)]
    with cuda_file.open():
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "None\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0\n"


def test_a_region_has_the_memory_of_others_that_it_is_told() -> None:
    with Monitor(FakeNvml(), [UUID], foreign_memory_bytes=7) as monitor:
        pass
    assert monitor.telemetry.foreign_memory_bytes == 7


# Other processes


def _parent(pid: int) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("PPid:"))


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def dead_pid() -> int:
    """A process id that was somebody's and is nobody's now."""
    process = subprocess.Popen(["/bin/true"])
    process.wait(timeout=10)
    return process.pid


def test_a_driver_that_names_no_processes_says_nothing_of_them() -> None:
    silent = fake_state(process_pids=None)
    assert summary(silent, silent).other_process_pids is None


def test_an_empty_gpu_has_no_other_process() -> None:
    assert seen_with() == ()


def test_this_process_its_parent_and_its_children_are_family(child: int) -> None:
    assert seen_with(os.getpid(), os.getppid(), child) == ()


def test_the_first_process_of_a_container_and_its_children_are_family(
    child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _first_above(child)
    monkeypatch.setattr(os, "getpid", lambda: first)
    assert seen_with(first, child) == ()


def _first_above(pid: int) -> int:
    while parent := _parent(pid):
        pid = parent
    return pid


@pytest.mark.parametrize(("worker", "is_family"), [("gw0", True), (None, False)], ids=["worker", "no-worker"])
def test_a_process_with_the_same_parent_is_family_of_a_worker_alone(worker: str | None, is_family: bool) -> None:
    code = (
        "import os, sys; from pytest_gpuperf.monitor import summarize; from pytest_gpuperf.testing import fake_state;"
        "after = fake_state(process_pids=(int(sys.argv[1]),));"
        "print(summarize([fake_state()], [after], [], 1.0).other_process_pids)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment |= {"PYTEST_XDIST_WORKER": worker} if worker else {}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as sibling:
        told = subprocess.run(
            [sys.executable, "-c", code, str(sibling.pid)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        sibling.kill()
    assert told.stdout == ("()\n" if is_family else f"({sibling.pid},)\n")


def test_a_process_of_another_family_is_another_process(stranger: int) -> None:
    assert seen_with(os.getpid(), stranger) == (stranger,)


def test_a_process_that_was_there_only_before_is_another_process_too(stranger: int) -> None:
    telemetry = summary(fake_state(process_pids=(stranger,)), fake_state())
    assert telemetry.other_process_pids == (stranger,)
    assert health(telemetry) == f"another process used the GPU (pid {stranger})"


def test_a_process_id_that_does_not_exist_here_is_the_hosts_and_says_nothing(dead_pid: int) -> None:
    assert seen_with(dead_pid) == ()


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LOOK_EVERY_S", 0.0)


@pytest.mark.usefixtures("looks_often")
def test_a_process_that_lives_only_inside_the_region_is_seen(stranger: int) -> None:
    nvml = FakeNvml(states=[fake_state(), fake_state(process_pids=(stranger,)), fake_state()])
    with Monitor(nvml, [UUID]) as monitor:
        time.sleep(0.25)
    assert nvml.calls.count("process_pids") >= 1
    assert monitor.telemetry.other_process_pids == (stranger,)
    assert health(monitor.telemetry) == f"another process used the GPU (pid {stranger})"


def test_a_process_that_has_ended_meanwhile_was_there_all_the_same(monkeypatch: pytest.MonkeyPatch, child: int) -> None:
    monkeypatch.setattr(monitor_module, "_is_family", lambda _: False)  # a stranger's end cannot be waited for here
    with Monitor(FakeNvml(states=[fake_state(process_pids=(child,)), fake_state()]), [UUID]) as monitor:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not Path(f"/proc/{child}").exists()
    assert monitor.telemetry.other_process_pids == (child,)


def test_others_are_looked_for_now_and_then_and_not_with_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LOOK_EVERY_S", 0.3)
    nvml = FakeNvml()
    with Monitor(nvml, [UUID]):
        time.sleep(0.85)
    assert nvml.calls.count("sample") >= 5
    assert 1 <= nvml.calls.count("process_pids") <= 2
    assert nvml.calls.count("state") == 2  # before and after: it reads the energy, which costs 4 ms
    assert 3 <= nvml.calls.count("condition") <= 4


@pytest.mark.usefixtures("looks_often")
def test_a_gpu_that_is_lost_while_others_are_looked_for_is_an_error_from_leaving() -> None:
    monitor = Monitor(FakeNvml(errors={("process_pids", 1): LOST}), [UUID])
    with pytest.raises(DeviceError, match="fallen off the bus"), monitor:
        time.sleep(0.2)


def test_others_that_were_seen_meanwhile_count_where_the_driver_names_none_at_the_end() -> None:
    silent = fake_state(process_pids=None)
    assert summarize([silent], [silent], [], 1.0, others={7, 5}).other_process_pids == (5, 7)


# Waiting for what passes


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def cooled(*states: GpuState, limit_s: float = 60.0, cool_c: float = 60.0) -> str:
    time_ = Time()
    nvml = FakeNvml(states=states)
    return cool_down(nvml, [UUID], limit_s=limit_s, cool_c=cool_c, clock=time_.clock, sleep=time_.sleep)


def hot(temperature_c: float | None, **changes: Any) -> GpuState:
    return fake_state(temperature_c=temperature_c, **changes)


def test_a_device_is_waited_for_until_it_is_ten_degrees_cooler() -> None:
    assert cooled(hot(80.0), hot(78.0), hot(75.0), hot(70.0)) == "well again after 3 s, 80 °C then, 70 °C now"


def test_a_device_is_waited_for_until_it_is_cool_however_hot_it_was() -> None:
    assert cooled(hot(64.0), hot(61.0), hot(60.0)) == "well again after 2 s, 64 °C then, 60 °C now"


@pytest.mark.parametrize("counter", ["sw_thermal_s", "hw_thermal_s", "power_brake_s"])
def test_a_device_is_waited_for_while_its_slowdown_goes_on(counter: str) -> None:
    states = [hot(50.0, **{counter: seconds}) for seconds in (1.0, 1.5, 2.0, 2.0)]
    assert cooled(*states) == "well again after 3 s, 50 °C then, 50 °C now"


def test_a_power_cap_is_not_waited_for() -> None:
    assert cooled(hot(50.0, power_cap_s=1.0), hot(50.0, power_cap_s=2.0)).startswith("well again after 1 s")


def test_a_device_that_stays_hot_is_waited_for_no_longer_than_allowed() -> None:
    assert cooled(hot(80.0), hot(75.0), limit_s=5.0) == (
        "still unwell after 5 s, 80 °C then, 75 °C now: it is neither 10 K cooler nor at 60 °C. "
        "Improve the cooling, or use another GPU"
    )


def test_a_slowdown_that_goes_on_is_named() -> None:
    states = [hot(50.0, power_brake_s=float(second)) for second in range(9)]
    assert cooled(*states, limit_s=3.0) == (
        "still unwell after 3 s, 50 °C then, 50 °C now: the driver still slows the clock down. "
        "Improve the cooling or the power supply, or use another GPU"
    )


def test_another_process_is_waited_for_and_named(stranger: int) -> None:
    there = hot(50.0, process_pids=(stranger,))
    assert cooled(there, there, hot(50.0)).startswith("well again after 2 s")
    assert cooled(there, limit_s=2.0) == (
        f"still unwell after 2 s, 50 °C then, 50 °C now: another process uses the GPU (pid {stranger}). "
        "End it, or use another GPU"
    )


def test_a_device_that_tells_nothing_is_not_waited_for() -> None:
    blank = GpuState()
    assert cooled(blank) == "well again after 1 s"


def test_the_hottest_of_several_devices_is_waited_for() -> None:
    class Two(FakeNvml):
        def state(self, uuid: str) -> GpuState:
            self.calls.append(uuid)
            return hot(50.0 if uuid == UUID else 84.0 - 4 * self.calls.count(uuid))

    time_ = Time()
    told = cool_down(Two(fake_gpu(), fake_gpu(1)), [UUID, OTHER_UUID], clock=time_.clock, sleep=time_.sleep)
    assert told == "well again after 3 s, 80 °C then, 68 °C now"


def test_without_a_gpu_there_is_nothing_to_wait_for() -> None:
    assert cool_down(None, [UUID]) == "there is no GPU to wait for"
    assert cool_down(FakeNvml(), []) == "there is no GPU to wait for"


def test_a_gpu_that_is_lost_while_it_cools_is_an_error() -> None:
    time_ = Time()
    nvml = FakeNvml(states=[hot(80.0)], errors={("state", 3): LOST})
    with pytest.raises(DeviceError, match="fallen off the bus"):
        cool_down(nvml, [UUID], clock=time_.clock, sleep=time_.sleep)


def test_a_file_that_is_closed_while_it_is_looked_at_is_nobodys_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda _: iter([tmp_path / "closed"]))
    assert not monitor_module._has_cuda_open(os.getpid())
