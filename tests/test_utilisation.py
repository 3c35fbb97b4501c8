"""How busy leased GPUs were: read while they are held, added up, told with what it cost."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.analysis import utilisation
from pytest_gpuperf.analysis.utilisation import LeaseMeter, added_up, utilisation_lines
from pytest_gpuperf.devices import Device, cpu_device, find_devices
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import GpuUsage
from pytest_gpuperf.records import LeaseUse, RunInfo, decode_lines, encode
from pytest_gpuperf.testing import FakeNvml, fake_gpu

RUN = RunInfo(schema=1, run_id="r", date="2026-11-21T00:00:00+00:00", visit="v")


def use(duration_s: float, busy_share: float | None, device: str = "3f2a1b4c5d6e") -> LeaseUse:
    return LeaseUse(
        device=device,
        name="NVIDIA H200",
        begin="2026-11-21T10:00:00.000+00:00",
        end="2026-11-21T10:10:00.000+00:00",
        duration_s=duration_s,
        busy_share=busy_share,
    )


def usages(*shares: float | None) -> list[GpuUsage]:
    """One a reading."""
    return [GpuUsage(busy_share=share) for share in shares]


class Clock:
    """Goes on by a step at every look."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self._step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self._step_s
        return self.now_s


def devices_of(nvml: FakeNvml) -> tuple[Device, ...]:
    return find_devices(nvml, cuda_visible_devices=None)


def test_the_sentence_of_the_summary_says_time_share_and_cost() -> None:
    # 12.4 min = 0.206667 h; at 2.50: 0.516667, of which 39 %: 0.2015
    assert utilisation_lines([use(744.0, 0.61)], per_gpu_hour=2.50) == [
        "GPUs leased 12.4 min in all, busy 61 % of it, idle 39 %; at 2.50 an hour 0.52, of which 0.20 for idle time"
    ]


def test_without_a_price_there_is_no_cost() -> None:
    assert utilisation_lines([use(30.0, 0.5)]) == ["GPUs leased 30.0 s in all, busy 50 % of it, idle 50 %"]


def test_several_gpus_are_told_one_by_one_as_well() -> None:
    lines = utilisation_lines([use(60.0, 1.0, "aa"), use(60.0, 0.0, "bb"), use(60.0, 1.0, "bb")])
    assert lines == [
        "GPUs leased 3.0 min in all, busy 67 % of it, idle 33 %",
        "  NVIDIA H200 aa: leased 1.0 min, busy 100 % of it, idle 0.00 %",
        "  NVIDIA H200 bb: leased 2.0 min, busy 50 % of it, idle 50 %",
    ]


def test_nothing_leased_is_nothing_to_say() -> None:
    assert utilisation_lines([], per_gpu_hour=2.5) == []


def test_a_share_that_the_driver_does_not_tell_is_not_zero() -> None:
    [line] = utilisation_lines([use(3600.0, None)], per_gpu_hour=2.5)
    assert line == "GPUs leased 60.0 min in all, the driver does not tell how busy; at 2.50 an hour 2.50"


def test_a_share_that_is_known_of_a_part_says_of_which() -> None:
    [line] = utilisation_lines([use(30.0, 1.0), use(10.0, None)])
    assert line.endswith("busy 100 % of it, idle 0.00 % (known of 75 %)")


def test_small_amounts_keep_two_digits_and_long_times_are_hours() -> None:
    assert "at 2.50 an hour 0.0069" in utilisation_lines([use(10.0, 0.5)], per_gpu_hour=2.5)[0]
    assert "leased 2.5 h in all" in utilisation_lines([use(9000.0, 0.5)])[0]


@given(st.lists(st.tuples(st.floats(0.01, 1e5), st.floats(0.0, 1.0)), min_size=1), st.floats(0.01, 1e3))
def test_idle_time_never_costs_more_than_all_of_it(leases: list[tuple[float, float]], price: float) -> None:
    whole = added_up([use(duration_s, share) for duration_s, share in leases])
    assert whole.busy_share is not None
    assert min(share for _, share in leases) - 1e-9 <= whole.busy_share <= max(share for _, share in leases) + 1e-9
    idle = whole.idle_cost(price)
    assert idle is not None
    assert -1e-6 <= idle <= whole.cost(price) * (1 + 1e-9)
    assert math.isclose(idle, sum(t / 3600 * price * (1 - s) for t, s in leases), rel_tol=1e-6, abs_tol=1e-9)


def test_a_short_lease_has_the_share_at_its_end_and_the_energy_between() -> None:
    nvml = FakeNvml(usages=usages(0.8), energies_j=(1000.0, 4000.0))
    meter = LeaseMeter(nvml, worker="gw1", clock=Clock(6.0))
    with meter.holding(devices_of(nvml)):
        pass
    [found] = meter.take()

    assert found.device == devices_of(nvml)[0].uuid_hash
    assert (found.name, found.worker) == ("NVIDIA H100 80GB HBM3", "gw1")
    assert found.duration_s == 6.0
    assert found.busy_share == pytest.approx(0.8)
    assert found.energy_j == 3000.0
    assert found.begin <= found.end
    assert meter.take() == []


def test_energy_of_less_than_five_seconds_is_not_known_nor_asked_for_at_the_end() -> None:
    nvml = FakeNvml(usages=usages(0.8), energies_j=(1000.0, 4000.0))
    meter = LeaseMeter(nvml, clock=Clock(1.0))
    with meter.holding(devices_of(nvml)):
        pass
    assert meter.take()[0].energy_j is None
    assert nvml.calls.count("energy_j") == 1


def test_a_counter_that_was_reset_gives_no_energy() -> None:
    nvml = FakeNvml(usages=usages(0.8), energies_j=(4000.0, 1000.0))
    meter = LeaseMeter(nvml, clock=Clock(6.0))
    with meter.holding(devices_of(nvml)):
        pass
    assert meter.take()[0].energy_j is None


def test_a_long_lease_is_read_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "SAMPLE_EVERY_S", 0.01)
    nvml = FakeNvml(usages=usages(1.0, 1.0, 1.0, 0.0))
    meter = LeaseMeter(nvml)
    with meter.holding(devices_of(nvml)):
        time.sleep(0.2)
    [found] = meter.take()

    assert nvml.calls.count("usage") > 5
    assert nvml.calls.count("energy_j") == 1
    assert found.busy_share is not None
    assert 0.0 < found.busy_share < 1.0


def test_a_lease_ends_though_its_test_fails() -> None:
    nvml = FakeNvml()
    meter = LeaseMeter(nvml)
    with pytest.raises(ZeroDivisionError), meter.holding(devices_of(nvml)):
        raise ZeroDivisionError
    assert len(meter.take()) == 1


def test_a_gpu_that_is_lost_meanwhile_keeps_what_is_known_and_the_others_go_on() -> None:
    gone: dict[int | tuple[str, int], Exception] = {
        ("usage", 1): DeviceError("GPU 0 is lost"),
        ("energy_j", 3): DeviceError("GPU 0 is lost"),
    }
    nvml = FakeNvml(fake_gpu(0), fake_gpu(1), usages=usages(0.5), errors=gone)
    meter = LeaseMeter(nvml, clock=Clock(6.0))
    with meter.holding(devices_of(nvml)):
        pass
    assert [(found.busy_share, found.energy_j) for found in meter.take()] == [(None, None), (0.5, 0.0)]


def test_a_gpu_that_is_lost_before_is_no_error_of_the_lease() -> None:
    nvml = FakeNvml(errors={("energy_j", 1): DeviceError("lost"), ("usage", 1): DeviceError("lost")})
    meter = LeaseMeter(nvml, clock=Clock(6.0))
    with meter.holding(devices_of(nvml)):
        pass
    [found] = meter.take()
    assert (found.busy_share, found.energy_j) == (None, None)


def test_a_cpu_is_not_read() -> None:
    nvml = FakeNvml()
    meter = LeaseMeter(nvml)
    with meter.holding([cpu_device()]):
        pass
    assert (meter.take(), nvml.calls) == ([], [])


def test_a_lease_is_a_line_of_the_results_that_is_read_again() -> None:
    line = encode(use(12.0, 0.5))
    results = decode_lines([encode(RUN) + b"\n", line + b"\n"])
    assert results.uses == (use(12.0, 0.5),)
    assert b'"record":"lease"' in line
