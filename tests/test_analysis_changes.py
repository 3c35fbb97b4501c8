"""Change points: steps are found and spikes are not, devices are not steps, the rate of false alarms, by hand."""

import math
import time
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpuperf.analysis.changes import FALSE_ALARM, MIN_SEGMENT, steps, unlinked

FLOOR = 0.0005
NOISE = 0.005


def noise(count: int, seed: int = 1) -> list[float]:
    return [float(value) for value in np.random.default_rng(seed).normal(0, NOISE, count)]


def stepped(before: int, after: int, size: float, seed: int = 1) -> list[float]:
    values = noise(before + after, seed)
    return values[:before] + [value + size for value in values[before:]]


def places(logs: list[float], devices: list[object] | None = None) -> list[int]:
    return [step.at for step in steps(logs, devices or [0] * len(logs), floor=FLOOR)]


def test_step_is_found_where_it_is() -> None:
    assert places(stepped(40, 60, 0.03)) == [40]


def test_step_is_measured_as_by_a_t_test() -> None:
    # each value on the other side of the mean than its neighbour: no outliers, and no likeness to correct for
    logs = [abs(value) * (-1) ** i + (0.04 if i >= 40 else 0.0) for i, value in enumerate(noise(100))]
    found = scipy.stats.ttest_ind(logs[40:], logs[:40])
    interval = found.confidence_interval(0.95)

    (step,) = steps(logs, [0] * 100, floor=FLOOR)

    assert step.change == pytest.approx(np.mean(logs[40:]) - np.mean(logs[:40]))
    assert step.before == pytest.approx(np.mean(logs[:40]))
    assert (step.low, step.high) == pytest.approx((interval.low, interval.high))


def test_step_of_six_values_by_hand() -> None:
    (step,) = steps([0.0, 0.01, -0.01, 1.0, 1.01, 0.99], [0] * 6, floor=FLOOR)

    # 4 x 0.0001 / 4 degrees of freedom; t(0.975, 4) = 2.776; standard error 0.01 sqrt(1/3 + 1/3)
    assert step.at == 3
    assert step.change == pytest.approx(1.0)
    assert step.sd == pytest.approx(0.01)
    assert step.high - step.change == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3), rel=1e-3)


def test_two_steps_there_and_back_are_both_found() -> None:
    logs = [value + (0.04 if 500 <= i < 515 else 0.0) for i, value in enumerate(noise(1000))]
    assert places(logs) == [500, 515]


def test_staircase_is_found_step_by_step() -> None:
    logs = [value + 0.03 * (i // 25) for i, value in enumerate(noise(100))]
    assert places(logs) == [25, 50, 75]


@pytest.mark.parametrize(("every", "size"), [(20, 0.05), (50, 0.03)])
def test_level_that_comes_and_goes_is_found_each_time(every: int, size: float) -> None:
    logs = [value + size * (i // every % 2) for i, value in enumerate(noise(1000))]
    assert places(logs) == list(range(every, 1000, every))


@pytest.mark.parametrize("length", [1, 2])
def test_spike_is_no_step(length: int) -> None:
    logs = [value + (1.0 if 50 <= i < 50 + length else 0.0) for i, value in enumerate(noise(100))]
    assert places(logs) == []


@pytest.mark.parametrize("length", [1, 2])
def test_spike_at_the_end_is_no_step(length: int) -> None:
    assert places(stepped(100 - length, length, 1.0)) == []


def test_third_value_of_a_new_level_makes_the_step() -> None:
    assert places(stepped(97, 3, 0.05)) == [97]


def test_spike_does_not_hide_a_step() -> None:
    logs = stepped(50, 50, 0.03)
    logs[20], logs[70] = 1.0, -1.0
    assert places(logs) == [50]


def test_step_below_twice_the_noise_is_not_reported() -> None:
    assert places(stepped(500, 500, 1.5 * NOISE)) == []


def test_step_of_values_without_noise_is_held_against_the_floor() -> None:
    assert places([0.0] * 20 + [FLOOR] * 20) == []
    assert places([0.0] * 20 + [10 * FLOOR] * 20) == [20]


def test_series_shorter_than_two_segments_has_no_steps() -> None:
    assert places([0.0, 0.0, 0.0, 1.0, 1.0]) == []
    assert places([]) == []


def test_change_between_known_devices_is_no_step() -> None:
    devices: list[object] = ["b" if 20 <= i < 25 or 50 <= i < 90 else "a" for i in range(100)]
    logs = [value + (0.05 if device == "b" else 0.0) for value, device in zip(noise(100), devices, strict=True)]
    assert places(logs, devices) == []
    assert places(logs) != []  # it is the devices that explain it


def test_step_on_a_pool_is_found_beneath_larger_differences_of_devices() -> None:
    devices: list[object] = [i * 7 % 4 for i in range(100)]
    logs = [value + 0.05 * (i * 7 % 4) for i, value in enumerate(stepped(60, 40, 0.03))]
    (step,) = steps(logs, devices, floor=FLOOR)
    assert step.at == 60
    assert step.low < 0.03 < step.high


def test_devices_seen_fewer_than_three_times_share_an_offset() -> None:
    devices: list[object] = list(range(100))  # another one each time, as in a cloud
    assert places(stepped(60, 40, 0.05), devices) == [60]


def test_devices_replaced_all_at_once_are_no_step_and_named() -> None:
    devices: list[object] = [*["a"] * 20, *["b"] * 20]
    assert places(stepped(20, 20, 0.05), devices) == []
    assert unlinked(devices) == (20,)


def test_devices_that_overlap_are_linked() -> None:
    assert unlinked(["a"] * 20 + ["b"] * 20 + ["a"]) == ()
    assert unlinked(["a"] * 20) == ()
    assert unlinked([]) == ()


@pytest.mark.parametrize("seed", range(20))
def test_levels_too_short_for_their_many_devices_do_no_harm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices: list[object] = list(rng.integers(0, 8, 60))
    found = steps([float(value) + 10 * (i // 6 % 2) for i, value in enumerate(noise(60, seed))], devices, floor=FLOOR)
    assert all(abs(step.change) > abs(step.high - step.change) for step in found)


def false_alarms(series: int, count: int) -> int:
    rng = np.random.default_rng(7)
    return sum(bool(places([float(value) for value in rng.normal(0, NOISE, count)])) for _ in range(series))


@pytest.mark.parametrize("count", [10, 100])
def test_unchanged_series_seldom_shows_a_step(count: int) -> None:
    series = 600
    # more than this would be a surprise of 1 in 1,000 at the rate that is promised
    assert false_alarms(series, count) <= scipy.stats.binom.ppf(0.999, series, FALSE_ALARM)


@given(
    logs=st.lists(st.floats(-1, 1), min_size=0, max_size=40),
    shift=st.floats(-5, 5),
    groups=st.lists(st.sampled_from("abcdefgh"), min_size=40, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_segments_are_long_enough_and_steps_large_enough(logs: list[float], shift: float, groups: list[str]) -> None:
    found = steps(logs, groups[: len(logs)], floor=FLOOR)
    bounds = [0, *(step.at for step in found), len(logs)]
    assert all(right - left >= MIN_SEGMENT for left, right in pairwise(bounds) if found)
    assert all(step.low < step.change < step.high for step in found)


@given(seed=st.integers(0, 1000), at=st.integers(10, 50))
@settings(max_examples=30, deadline=None)
def test_mirrored_series_has_the_same_steps_the_other_way(seed: int, at: int) -> None:
    logs = stepped(at, 60 - at, 0.05, seed)
    found, mirrored = (steps([sign * log for log in logs], [0] * 60, floor=FLOOR) for sign in (1, -1))
    assert [step.at for step in found] == [step.at for step in mirrored]
    assert [step.change for step in found] == pytest.approx([-step.change for step in mirrored])


def test_thousand_values_take_a_tenth_of_a_second_at_most() -> None:
    logs = [value + 0.03 * (i // 100) for i, value in enumerate(noise(1000))]
    devices: list[object] = [i % 8 for i in range(1000)]
    durations_s = []
    for _ in range(5):
        start_s = time.process_time()
        assert len(places(logs, devices)) == 9
        durations_s.append(time.process_time() - start_s)
    assert min(durations_s) < 0.1
