"""What is read of GPUs at an even pace, the word that says what each does, and what it adds up to."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.devices import Device, find_devices
from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.nvml import GpuUsage
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.testing import FakeNvml, fake_gpu, fake_state
from pytest_gpuperf.trials.watch import GpuWatch, Sample, Summary, chosen, watch, watches
from pytest_gpuperf.trials.watch_command import CannotStart, Command, caught_signals, is_ending, is_stranger
from pytest_gpuperf.trials.watch_status import status_of

LOST = DeviceError("GPU 0 (NVIDIA H100 80GB HBM3) is lost: it has fallen off the bus.")
BUSY = GpuUsage(
    sm_clock_mhz=1410.0,
    power_w=698.0,
    temperature_c=64.0,
    busy_share=1.0,
    memory_used_bytes=10**10,
    holds=(),
)
WORK = GpuActivity(duration_s=0.2, sm_share=0.9, tensor_share=0.7, dram_share=0.3)


class Time:
    """A clock that stands still but for those who sleep, and for `reading_s` of each look at it."""

    def __init__(self, *, reading_s: float = 0.0) -> None:
        self.now_s, self.reading_s = 100.0, reading_s

    def __call__(self) -> float:
        self.now_s += self.reading_s
        return self.now_s

    def sleep(self, seconds: float) -> bool:
        self.now_s += seconds
        return False


def device(**changes: object) -> Device:
    [found] = find_devices(FakeNvml(fake_gpu(**changes)), cuda_visible_devices=None)  # type: ignore[arg-type]
    return found


def devices_of(nvml: FakeNvml) -> tuple[Device, ...]:
    return find_devices(nvml, cuda_visible_devices=None)


def usage(**changes: object) -> GpuUsage:
    values = {name: getattr(BUSY, name) for name in GpuUsage.__struct_fields__}
    return GpuUsage(**{**values, **changes})


def activity(**changes: object) -> GpuActivity:
    values = {name: getattr(WORK, name) for name in GpuActivity.__struct_fields__}
    return GpuActivity(**{**values, **changes})


def watched(
    nvml: FakeNvml,
    *,
    duration_s: float = 10.0,
    interval_s: float = 1.0,
    clock: Time | None = None,
    is_stranger: Callable[[int], bool] | None = None,
) -> tuple[list[Sample], tuple[Summary, ...]]:
    """All samples of a watch of all GPUs, and its summaries, in no time at all."""
    clock = clock or Time()
    seen: list[Sample] = []
    gpus = watches(nvml, devices_of(nvml), clock=clock, is_stranger=is_stranger)
    found = watch(gpus, interval_s=interval_s, duration_s=duration_s, wait=clock.sleep, clock=clock, show=seen.extend)
    return seen, found


@pytest.mark.parametrize(
    ("reading", "meanwhile", "word", "reason"),
    [
        (usage(busy_share=0.0), None, "idle", "no kernel runs"),
        (usage(busy_share=0.009), None, "idle", "no kernel runs"),
        (usage(busy_share=0.5), None, "busy", "kernels run 50 % of the time"),
        (usage(), WORK, "busy", "kernels run 100 % of the time"),
        (usage(), activity(sm_share=0.04), "busy", "kernels fill 4.0 % of the SMs"),
        (usage(), activity(dram_share=0.83), "memory-bound?", "DRAM works 83 % of the time"),
        (usage(holds=("clock setting",)), None, "busy", "clock held by clock setting"),
        (usage(holds=("power cap",)), WORK, "power-capped", "1410 MHz at the limit of 700 W"),
        (usage(holds=("power cap",), busy_share=0.0), None, "idle", "no kernel runs"),
        (usage(holds=("heat (hardware)", "power cap")), None, "hot", "heat (hardware) at 64 C, 1410 MHz"),
        (usage(holds=("heat (driver)",), busy_share=0.0), None, "hot", "heat (driver) at 64 C, 1410 MHz"),
        (usage(holds=("hardware slowdown", "power brake")), None, "braked", "by the power supply, 1410 MHz"),
        (usage(holds=("hardware slowdown",)), None, "throttled", "hardware slowdown at 64 C, 1410 MHz"),
        (usage(busy_share=None), None, "unknown", "the driver does not tell how busy it is"),
        (usage(busy_share=None, holds=("idle",)), None, "idle", "no kernel runs"),
        (usage(busy_share=None), WORK, "busy", "kernels run 90 % of the time"),
        (GpuUsage(holds=("heat (driver)",)), None, "hot", "heat (driver)"),
        (GpuUsage(holds=("power cap",), busy_share=1.0), None, "power-capped", "clock at the limit of 700 W"),
    ],
)
def test_the_word_follows_from_the_reading(
    reading: GpuUsage, meanwhile: GpuActivity | None, word: str, reason: str
) -> None:
    found = status_of(device(), reading, meanwhile)
    assert (found.word, found.reason) == (word, reason)


def test_a_critical_error_goes_before_all_and_a_stranger_before_the_work() -> None:
    hot = usage(holds=("heat (hardware)",))
    assert status_of(device(), hot, xids=[79, 79, 13]).reason == "Xid 13, 79: see sudo dmesg | grep Xid"
    assert status_of(device(), hot, others=[7]).word == "hot"
    found = status_of(device(), usage(), others=[23, 7])
    assert (found.word, found.reason) == ("other process", "pid 7, 23")


def test_a_gpu_without_a_known_power_limit_is_capped_all_the_same() -> None:
    found = status_of(device(power_limit_w=None), usage(holds=("power cap",)))
    assert found.reason == "1410 MHz at the power limit"


SHARES = st.none() | st.floats(0, 1)
HOLDS = st.none() | st.lists(st.sampled_from(["idle", "power cap", "heat (driver)", "power brake", "sync boost"])).map(
    tuple
)


@given(SHARES, SHARES, SHARES, HOLDS)
def test_every_reading_has_a_word_and_the_same_one_again(
    busy: float | None, sm: float | None, dram: float | None, holds: tuple[str, ...] | None
) -> None:
    reading, meanwhile = GpuUsage(busy_share=busy, holds=holds), GpuActivity(duration_s=1, sm_share=sm, dram_share=dram)
    found = status_of(device(), reading, meanwhile)
    assert found == status_of(device(), reading, meanwhile)
    assert found.reason
    assert len(f"{found.word}: {found.reason}") <= 50


def test_gpus_are_read_at_the_begin_at_every_interval_and_at_the_end() -> None:
    samples, [summary] = watched(FakeNvml(usages=[BUSY]), duration_s=10.0)
    assert [sample.time_s for sample in samples] == [float(second) for second in range(11)]
    assert (summary.samples, summary.duration_s) == (11, 10.0)


def test_a_late_sample_is_not_made_up_for_and_says_its_real_time() -> None:
    class Stalls(Time):
        def sleep(self, seconds: float) -> bool:
            stall_s = 2.3 if self.now_s == 102.0 else 0.0  # once, after two seconds
            return super().sleep(seconds + stall_s)

    samples, _ = watched(FakeNvml(usages=[BUSY]), duration_s=8.0, clock=Stalls())
    assert [sample.time_s for sample in samples] == pytest.approx([0, 1, 2, 5.3, 6, 7, 8])


def test_the_pace_does_not_drift_with_what_a_reading_takes() -> None:
    samples, _ = watched(FakeNvml(usages=[BUSY]), duration_s=10.0, clock=Time(reading_s=0.01))
    assert len(samples) == 11
    assert samples[-2].time_s == pytest.approx(9.0, abs=0.1)


@given(st.floats(0.01, 5.0), st.lists(st.floats(0.0, 12.0), max_size=20))
def test_two_samples_are_never_closer_than_the_sleep_between_deadlines(interval_s: float, stalls: list[float]) -> None:
    left, clock = list(stalls), Time()

    def wait(seconds: float) -> bool:
        assert 0 <= seconds <= interval_s * (1 + 1e-9)
        clock.now_s += seconds + (left.pop() if left else 0.0)
        return not left

    times: list[float] = []
    gpus = [GpuWatch(FakeNvml(), device(), clock=clock)]
    watch(gpus, interval_s=interval_s, wait=wait, clock=clock, show=lambda samples: times.append(samples[0].time_s))
    assert times == sorted(times)
    assert len(times) <= len(stalls) + 3


def test_the_watch_ends_when_it_is_told_to() -> None:
    clock, looks = Time(), iter([False, False, True])
    seen: list[float] = []
    gpus = [GpuWatch(FakeNvml(), device(), clock=clock)]
    watch(
        gpus,
        interval_s=1.0,
        clock=clock,
        wait=lambda seconds: clock.sleep(seconds) or next(looks),
        show=lambda samples: seen.append(samples[0].time_s),
    )
    assert seen == [0.0, 1.0, 2.0, 3.0]


def test_counters_are_read_as_seldom_as_they_can_be_and_each_mean_is_given_once() -> None:
    nvml = FakeNvml(usages=[BUSY], activities=[WORK, activity(sm_share=0.1)])
    samples, _ = watched(nvml, duration_s=2.5, interval_s=0.5)
    assert [sample.sm_share for sample in samples] == [None, None, 0.9, None, 0.1, None]
    assert [sample.activity_s for sample in samples] == [None, None, 0.2, None, 0.2, None]
    assert samples[3].reason == "kernels run 100 % of the time"


def test_the_energy_is_read_every_five_seconds() -> None:
    nvml = FakeNvml(usages=[BUSY], energies_j=[1e6, 2e6, None])
    samples, _ = watched(nvml, duration_s=15.0, interval_s=0.5)
    assert {sample.time_s: sample.energy_j for sample in samples if sample.energy_j} == {5.0: 1e6, 10.0: 2e6}
    assert nvml.calls.count("energy_j") == 3


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("interval_s", [0.1, 0.25, 1.0])
def test_gpus_take_turns_at_what_is_dear_so_that_more_of_them_do_not_cost_more(count: int, interval_s: float) -> None:
    nvml = FakeNvml(*map(fake_gpu, range(count)), usages=[BUSY], activities=[WORK])
    samples, _ = watched(nvml, duration_s=64.0, interval_s=interval_s)

    for every_s, times in (
        (5.0, [sample.time_s for sample in samples if sample.energy_j is not None]),
        (1.0, [sample.time_s for sample in samples if sample.activity_s is not None]),
    ):
        at_once = max(times.count(at_s) for at_s in times)
        assert at_once <= max(1, interval_s / every_s)
        assert 0.9 * 64 / every_s / max(1, interval_s / every_s / count) <= len(times) <= 64 / every_s
    for number in range(count):
        assert any(sample.gpu == number and sample.energy_j is not None for sample in samples)


def test_a_late_reading_does_not_shift_the_turns_to_come() -> None:
    late_s = random.Random(0)

    class Late(Time):
        def sleep(self, seconds: float) -> bool:
            return super().sleep(seconds + late_s.uniform(0.0, 0.09))

    samples, _ = watched(FakeNvml(usages=[BUSY]), duration_s=100.0, interval_s=0.1, clock=Late())
    times = [sample.time_s for sample in samples if sample.energy_j is not None]
    assert times == pytest.approx([5.0 * turn for turn in range(1, 21)], abs=0.15)


def test_a_sample_is_few_calls() -> None:
    nvml = FakeNvml(usages=[BUSY])
    watched(nvml, duration_s=1.0, interval_s=0.1)
    begin_and_end = {"state": 2, "activity_meter": 1, "error_meter": 1, "gpus": 1, "absent": 1}
    assert {name: nvml.calls.count(name) for name in set(nvml.calls)} == {"usage": 11, **begin_and_end}


def test_strangers_are_looked_for_without_the_energy() -> None:
    nvml = FakeNvml(usages=[BUSY])
    watched(nvml, duration_s=1.0, interval_s=0.1, is_stranger=lambda _: False)
    assert (nvml.calls.count("process_pids"), nvml.calls.count("state")) == (1, 2)


def test_a_sample_holds_what_was_read_with_the_limits_beside_it() -> None:
    samples, _ = watched(FakeNvml(usages=[BUSY]), duration_s=1.0)
    first = samples[0]
    assert (first.gpu, first.name, first.busy_share, first.power_w) == (0, "NVIDIA H100 80GB HBM3", 1.0, 698.0)
    assert (first.power_limit_w, first.memory_bytes, first.holds) == (700.0, 85_520_809_984, ())
    assert first.date.endswith("+00:00")
    assert (first.sm_share, first.error, first.xids) == (None, None, ())


def test_a_gpu_that_is_lost_is_an_error_in_its_samples_and_the_others_go_on() -> None:
    nvml = FakeNvml(fake_gpu(0), fake_gpu(1), usages=[BUSY], errors={("usage", 5): LOST})
    samples, summaries = watched(nvml, duration_s=10.0)

    assert [sample.status for sample in samples if sample.gpu == 1] == ["busy"] * 11
    words = [sample.status for sample in samples if sample.gpu == 0]
    assert words == ["busy", "busy", *["lost"] * 5, *["busy"] * 4]
    lost = next(sample for sample in samples if sample.error)
    assert (lost.error, lost.reason, lost.power_w) == (str(LOST), str(LOST), None)
    assert summaries[0].errors == (str(LOST),)
    assert summaries[1].errors == ()


def test_the_reason_of_a_lost_gpu_begins_with_what_happened() -> None:
    samples, [summary] = watched(FakeNvml(usages=[BUSY], lost={fake_gpu().uuid: 2}), duration_s=2.0)
    assert samples[-1].reason.startswith("is lost: it has fallen off the bus.")
    assert samples[-1].error == summary.errors[0]
    assert summary.errors[0].startswith("GPU 0 (NVIDIA H100 80GB HBM3, GPU-00000000-")


def test_a_gpu_that_stays_lost_is_asked_seldom_and_its_error_told_once() -> None:
    gone: dict[int | tuple[str, int], Exception] = {("usage", call): LOST for call in range(2, 99)}
    gone["state", 2] = LOST
    nvml = FakeNvml(usages=[BUSY], errors=gone)
    _, [summary] = watched(nvml, duration_s=20.0)
    assert nvml.calls.count("usage") == 5
    assert summary.errors == (str(LOST),)
    assert (summary.samples, summary.power_cap_share, summary.energy_j) == (1, None, None)


def test_a_gpu_that_is_lost_at_the_begin_is_told_as_well() -> None:
    samples, [summary] = watched(FakeNvml(usages=[BUSY], errors={("state", 1): LOST}), duration_s=1.0)
    assert samples[0].status == "lost"
    assert summary.errors == (str(LOST),)


def test_critical_errors_are_told_when_they_come_and_stay_the_status_for_a_minute() -> None:
    uuid = fake_gpu().uuid
    nvml = FakeNvml(usages=[BUSY], xids={uuid: [(), (13, 31)]})
    samples, [summary] = watched(nvml, duration_s=80.0, interval_s=10.0)
    assert [sample.xids for sample in samples] == [(), (13, 31), *[()] * 7]
    assert [sample.status for sample in samples] == ["busy", *["error"] * 6, "busy", "busy"]
    assert summary.errors == ("Xid 13", "Xid 31")


def test_a_critical_error_that_ends_it_all_is_heard_though_its_turn_has_not_come() -> None:
    nvml = FakeNvml(usages=[BUSY])
    clock = Time()
    looks = iter([False, True])
    seen: list[Sample] = []

    def wait(seconds: float) -> bool:
        if is_over := next(looks):  # the command ends, long before the next turn
            nvml.strike(fake_gpu().uuid, 31)
            seconds = 0.1
        return clock.sleep(seconds) or is_over

    gpus = watches(nvml, devices_of(nvml), clock=clock)
    [summary] = watch(gpus, interval_s=1.0, wait=wait, clock=clock, show=seen.extend)
    assert [(sample.time_s, sample.xids) for sample in seen[1:]] == [(1.0, ()), (pytest.approx(1.1), (31,))]
    assert summary.errors == ("Xid 31",)


def test_the_error_with_which_a_gpu_falls_off_is_told_beside_the_loss() -> None:
    nvml = FakeNvml(usages=[BUSY], xids={fake_gpu().uuid: [(), (), (79,)]}, errors={("usage", 3): LOST})
    samples, [summary] = watched(nvml, duration_s=3.0)
    assert [(sample.status, sample.xids) for sample in samples[1:3]] == [("busy", ()), ("lost", (79,))]
    assert summary.errors == ("Xid 79", str(LOST))


def test_a_mig_instance_is_told_of_the_errors_of_its_gpu() -> None:
    whole, part = fake_gpu(mig_enabled=True), fake_gpu(7, uuid="MIG-00000000-0000-4000-8000-000000000007")
    nvml = FakeNvml(whole, instances={whole.uuid: [part]}, usages=[BUSY], xids={whole.uuid: [(), (95,)]})
    samples, [summary] = watched(nvml, duration_s=2.0)
    assert (samples[0].uuid, summary.errors) == (part.uuid, ("Xid 95",))


def test_the_counters_of_a_watch_that_ends_before_their_turn_are_in_its_summary() -> None:
    _, [summary] = watched(FakeNvml(usages=[BUSY], activities=[WORK]), duration_s=0.5, interval_s=0.1)
    assert (summary.sm_share, summary.tensor_share, summary.dram_share) == pytest.approx((0.9, 0.7, 0.3))


def test_processes_that_do_not_belong_there_are_seen_and_remembered() -> None:
    states = [fake_state(process_pids=pids) for pids in ((), (), (7, 8), ())]
    samples, [summary] = watched(
        FakeNvml(usages=[BUSY], states=states), duration_s=6.0, is_stranger=lambda pid: pid == 8
    )
    assert [sample.status for sample in samples] == ["busy"] * 2 + ["other process"] * 2 + ["busy"] * 3
    assert summary.other_process_pids == (8,)


def test_without_a_command_nobody_is_looked_for() -> None:
    nvml = FakeNvml(usages=[BUSY], states=[fake_state(process_pids=(7,))])
    samples, [summary] = watched(nvml)
    assert {sample.status for sample in samples} == {"busy"}
    assert summary.other_process_pids is None


def test_a_summary_by_hand() -> None:
    # Four readings at 0, 2, 4 and 6 s; each counts for the time since the one before, so the first for nothing.
    readings = [
        usage(power_w=100.0, busy_share=0.0, sm_clock_mhz=345.0, memory_used_bytes=0),
        usage(power_w=600.0, busy_share=1.0, sm_clock_mhz=1500.0, memory_used_bytes=5),
        usage(power_w=690.0, busy_share=1.0, sm_clock_mhz=1400.0, memory_used_bytes=9, temperature_c=70.0),
        usage(power_w=300.0, busy_share=0.4, sm_clock_mhz=1900.0, memory_used_bytes=2),
    ]
    states = [
        fake_state(energy_j=1000.0, power_cap_s=50.0),
        fake_state(energy_j=4180.0, power_cap_s=53.0, sw_thermal_s=0.6, hw_thermal_s=None),
    ]
    nvml = FakeNvml(usages=readings, states=states, activities=[WORK, activity(sm_share=0.6, duration_s=0.6)])
    _, [found] = watched(nvml, duration_s=6.0, interval_s=2.0)

    assert found.energy_j == 3180.0
    assert found.mean_power_w == pytest.approx((600 + 690 + 300) / 3)
    assert (found.peak_power_w, found.power_limit_w) == (690.0, 700.0)
    assert found.busy_share == pytest.approx(0.8)
    assert found.idle_share == pytest.approx(0.2)
    assert (found.peak_memory_used_bytes, found.memory_bytes, found.peak_temperature_c) == (9, 85_520_809_984, 70.0)
    assert found.mean_sm_clock_mhz == pytest.approx(1450.0)  # while it worked
    assert found.lowest_sm_clock_mhz == 1400.0
    assert found.power_cap_share == pytest.approx(0.5)
    assert found.sw_thermal_share == pytest.approx(0.1)
    assert (found.hw_thermal_share, found.power_brake_share) == (None, 0.0)
    assert found.sm_share == pytest.approx(
        (0.9 * 0.2 + 0.6 * 0.6 * 3) / 2.0
    )  # three means at their turns, one at the end
    assert found.errors == ()


def test_energy_of_less_than_five_seconds_and_of_a_counter_that_was_reset_is_not_known() -> None:
    grown = [fake_state(energy_j=1.0), fake_state(energy_j=9.0)]
    assert watched(FakeNvml(states=grown), duration_s=4.9)[1][0].energy_j is None
    assert watched(FakeNvml(states=grown), duration_s=5.0)[1][0].energy_j == 8.0
    assert watched(FakeNvml(states=grown[::-1]), duration_s=5.0)[1][0].energy_j is None


def test_a_driver_that_tells_nothing_gives_a_summary_of_nothing() -> None:
    _, [found] = watched(FakeNvml(usages=[GpuUsage()], xids=None))
    assert (found.samples, found.mean_power_w, found.peak_power_w, found.busy_share) == (11, None, None, None)
    assert (found.idle_share, found.mean_sm_clock_mhz, found.lowest_sm_clock_mhz) == (None, None, None)


THREE = devices_of(FakeNvml(fake_gpu(0), fake_gpu(1), fake_gpu(2)))


@pytest.mark.parametrize(
    ("names", "numbers"),
    [(None, [0, 1, 2]), ("1", [1]), ("2, 0", [2, 0]), (THREE[1].uuid, [1]), ("GPU-00000002,0", [2, 0])],
)
def test_gpus_are_named_by_number_or_by_the_begin_of_their_uuid(names: str | None, numbers: list[int]) -> None:
    assert [found.index for found in chosen(THREE, names)] == numbers


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("3", "--gpus: '3' is no GPU here. Here are: 0 (GPU-00000000-"),
        ("", "--gpus: '' is no GPU here."),
        ("0,", "--gpus: '' is no GPU here."),
        ("-1", "--gpus: '-1' is no GPU here."),
        ("GPU-", "--gpus: 'GPU-' is no GPU here."),
        ("GPU-0000000", "--gpus: 'GPU-0000000' is several GPUs."),
        ("0,0", "--gpus 0,0 names GPU 0 twice. Name each once."),
    ],
)
def test_a_name_of_no_gpu_or_of_several_is_refused(names: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        chosen(THREE, names)
    assert str(error.value).startswith(message)


def run(*words: str, limit_s: float = 10.0) -> Command:
    command = Command(words)
    end_s = time.monotonic() + limit_s
    while not command.has_ended():
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return command


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_a_command_ends_with_the_code_that_a_shell_gives(script: str, code: int) -> None:
    assert run("sh", "-c", script).code == code


def test_a_command_has_a_group_of_its_own_and_gets_what_is_forwarded() -> None:
    command = Command(("sh", "-c", "sleep 30"))
    assert os.getpgid(command.pid) == command.pid != os.getpgrp()
    assert not command.has_ended()
    command.forward(signal.SIGTERM)
    while not command.has_ended():
        time.sleep(0.01)
    assert command.code == 143
    command.forward(signal.SIGTERM)  # to nobody any more


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("no-such-command",), 127, "no-such-command: there is no such command. Is it installed, and on the PATH?"),
        (("/etc",), 126, "/etc cannot be started: Permission denied."),
        (("",), 127, "'': there is no such command."),
    ],
)
def test_a_command_that_cannot_be_started_says_why_with_the_code_of_a_shell(
    words: tuple[str, ...], code: int, message: str
) -> None:
    with pytest.raises(CannotStart) as error:
        Command(words)
    assert error.value.code == code
    assert str(error.value).startswith(message)


def test_processes_of_a_command_are_known_and_others_are_strangers() -> None:
    command = Command((sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '30'], start_new_session=1)"))
    try:
        child = _child_of(command.pid)
        assert os.getpgid(child) != command.pid
        assert command.includes(command.pid)
        assert command.includes(child)
        assert not is_stranger(child, command)
        assert is_stranger(os.getpid(), command)
        assert not is_stranger(2**22 + 1, command)  # nobody here
        os.kill(child, signal.SIGKILL)
    finally:
        command.forward(signal.SIGKILL)
        while not command.has_ended():
            time.sleep(0.01)


def _child_of(pid: int) -> int:
    for _ in range(500):
        with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123 - of /proc
            if children := file.read().split():
                with open(f"/proc/{children[0]}/comm") as name:  # noqa: PTH123 - of /proc
                    if name.read().strip() == "sleep":
                        return int(children[0])
        time.sleep(0.01)
    raise AssertionError


def test_a_sleep_ends_with_a_signal_and_says_which() -> None:
    with caught_signals() as sleep:
        os.kill(os.getpid(), signal.SIGTERM)
        begin_s = time.monotonic()
        assert sleep(5.0) == [signal.SIGTERM]
        assert time.monotonic() - begin_s < 1.0
        assert sleep(0.0) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_sleep_without_a_signal_takes_its_time() -> None:
    with caught_signals() as sleep:
        begin_s = time.monotonic()
        assert sleep(0.05) == []
        assert time.monotonic() - begin_s >= 0.049


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught_signals() as sleep:
            os.kill(os.getpid(), signal.SIGHUP)
            assert sleep(0.01) == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_command_wakes_the_sleeper() -> None:
    with caught_signals() as sleep:
        command = Command(("sh", "-c", "sleep 0.05"))
        begin_s = time.monotonic()
        numbers: Sequence[int] = []
        while not command.has_ended() and time.monotonic() - begin_s < 5:
            numbers = sleep(5.0)
        assert time.monotonic() - begin_s < 2.0
    assert not any(is_ending(number) for number in numbers)
