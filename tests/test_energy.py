"""Energy per token: the two figures, and where there is none."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_recorder import recorder

from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.workloads.energy import record_energy, token_energy


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A region that has ended."""

    energy_j: float | None


def test_two_thousand_tokens_of_a_kilojoule_take_half_a_joule_each() -> None:
    found = token_energy(2000, 1000.0)
    assert found is not None
    assert (found.joules_per_token, found.tokens_per_joule) == (0.5, 2.0)


@given(tokens=st.integers(1, 10**9), seconds=st.floats(5.0, 1e5), power_w=st.floats(1.0, 1e5))
def test_tokens_a_joule_are_tokens_a_second_per_watt(tokens: int, seconds: float, power_w: float) -> None:
    found = token_energy(tokens, power_w * seconds)
    assert found is not None
    assert found.tokens_per_joule == pytest.approx(tokens / seconds / power_w)


@pytest.mark.parametrize("energy_j", [None, 0.0])
def test_unknown_energy_is_absent_and_not_zero(energy_j: float | None) -> None:
    perf = recorder()
    assert record_energy(perf, 100, Region(energy_j=energy_j)) is None
    assert perf.measurements == []


def test_both_figures_are_recorded_in_one_line() -> None:
    perf = recorder()
    found = record_energy(perf, 2000, Region(energy_j=1000.0))
    assert found == token_energy(2000, 1000.0)
    assert [(m.metric, m.value, m.unit, m.better) for m in perf.measurements] == [
        ("energy", 0.5, "J/tok", "lower"),
        ("efficiency", 2.0, "tok/s/W", "higher"),
    ]


def test_energy_of_a_gpu_that_waits_is_limited_by_the_host() -> None:
    perf = recorder()
    record_energy(perf, 2000, Region(energy_j=1000.0), gpu_busy_share=0.5)
    assert [(m.gpu_busy_share, m.kind) for m in perf.measurements] == [(0.5, "host")] * 2


def test_a_region_under_five_seconds_records_nothing() -> None:
    perf = recorder()
    with perf.region() as region:
        pass
    assert record_energy(perf, 100, region) is None


@pytest.mark.parametrize("tokens", [0, -1, True, 1.5])
def test_tokens_are_a_whole_number_above_zero(tokens: int) -> None:
    with pytest.raises(UsageError, match=r"tokens=\S+ is not a whole number above 0, so there is no energy of a token"):
        token_energy(tokens, None)


@pytest.mark.parametrize("energy_j", [-1.0, math.nan, math.inf])
def test_counter_that_went_back_is_an_error_of_the_measurement(energy_j: float) -> None:
    with pytest.raises(MeasurementError, match=r"100 tokens took \S+ J: the GPU's energy counter went back\."):
        token_energy(100, energy_j)
