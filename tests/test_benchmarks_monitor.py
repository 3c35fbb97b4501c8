"""The comparison of `gpuperf monitor` with other tools: what the readings of each add up to."""

import pytest

from benchmarks.monitor.against import Row, energy_of


def power_at(at_s: float) -> float:
    """A load of phases, as that of the comparison: 100, 400 and 700 W for 5 s each."""
    return (100.0, 400.0, 700.0)[int(at_s // 5) % 3]


def rows(*, counted_at_s: tuple[float, ...] = (), length_s: float = 40.0) -> list[Row]:
    """Ten readings a second of such a GPU, some with its energy counter."""
    found, energy_j = [], 1e6
    for turn in range(round(length_s * 10) + 1):
        at_s = turn / 10
        counted = energy_j if at_s in counted_at_s else None
        found.append(Row(at_s=at_s, uuid="GPU-0", memory_used_bytes=None, power_w=power_at(at_s), energy_j=counted))
        energy_j += power_at(at_s) / 10
    return found


@pytest.mark.parametrize("counted_at_s", [(), (12.0,), (3.0, 33.0), tuple(3.0 + 5 * turn for turn in range(8))])
def test_energy_is_that_of_the_whole_window_however_often_the_counter_was_read(counted_at_s: tuple[float, ...]) -> None:
    whole_j = sum(power_at(turn / 10) / 10 for turn in range(400))
    assert energy_of(rows(counted_at_s=counted_at_s), 40.0) == pytest.approx(whole_j, rel=0.01)


def test_energy_of_one_reading_or_without_power_is_not_known() -> None:
    alone = Row(at_s=1.0, uuid="GPU-0", memory_used_bytes=None, power_w=100.0)
    mute = [Row(at_s=at_s, uuid="GPU-0", memory_used_bytes=None, power_w=None) for at_s in (1.0, 2.0)]
    assert energy_of([alone], 40.0) is None
    assert energy_of(mute, 40.0) is None
