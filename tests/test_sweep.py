"""A sweep over sizes ends where memory does; the best size is said with what it costs."""

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.errors import EngineError, EngineOutOfMemory, NotSupported, UsageError
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load, RequestTiming
from pytest_gpuperf.workloads.sweep import (
    Sweep,
    batch_size_line,
    profile_batches,
    sweep,
    sweep_batches,
    sweep_busy_share,
)


def measure_until(limit: int, error: Exception) -> Sweep[float]:
    def measure(size: int) -> float:
        if size >= limit:
            raise error
        return float(size)

    return sweep(measure, (1, 4, 8, 16))


@given(st.lists(st.integers(1, 10_000), min_size=1, unique=True))
def test_every_size_is_measured_once_and_in_order(sizes: list[int]) -> None:
    found = sweep(lambda size: size * 2, sorted(sizes))
    assert list(found.points.items()) == [(size, size * 2) for size in sorted(sizes)]
    assert found.end is None


@pytest.mark.parametrize("error", [EngineOutOfMemory("CUDA out of memory\nmore"), NotSupported("needs 9 GB, 8 free")])
def test_running_out_of_memory_ends_the_curve_and_is_no_error(error: Exception) -> None:
    found = measure_until(8, error)
    assert found.points == {1: 1.0, 4: 4.0}
    assert found.end == f"out of memory at 8: {str(error).splitlines()[0]}"


def test_torch_running_out_of_memory_ends_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    torch = types.ModuleType("torch")
    monkeypatch.setattr(torch, "OutOfMemoryError", OutOfMemoryError, raising=False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert measure_until(16, OutOfMemoryError("tried to allocate")).end == "out of memory at 16: tried to allocate"


@pytest.mark.parametrize("error", [EngineOutOfMemory("full"), NotSupported("vLLM is not installed")])
def test_a_first_size_that_does_not_fit_is_the_error_itself(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        measure_until(1, error)


@pytest.mark.parametrize("error", [EngineError("died"), RuntimeError("a bug"), ValueError("another")])
def test_any_other_error_is_not_taken_for_the_end_of_the_curve(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        measure_until(8, error)


@pytest.mark.parametrize("sizes", [(), (0, 1), (-1,), (4, 4), (8, 1)])
def test_sizes_that_do_not_rise_from_one_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="not rising whole numbers above zero"):
        sweep(lambda size: size, sizes)


def test_a_batch_is_all_requests_at_once_and_its_first_run_does_not_count() -> None:
    loads: list[Load] = []

    def generate(load: Load) -> Generation:
        loads.append(load)
        timing = RequestTiming(prompt_tokens=16, output_tokens=8, ttft_s=0.1, latency_s=float(len(loads)))
        return Generation(duration_s=1.0, requests=(timing,) * load.requests, step_count=8)

    found = sweep_batches(generate, (1, 4), prompt_tokens=16, output_tokens=8)
    assert [load.requests for load in loads] == [1, 1, 4, 4]
    assert {(load.prompt_tokens, load.output_tokens) for load in loads} == {(16, 8)}
    assert found.curve(lambda batch: batch.latency_s()) == {1: 2.0, 4: 4.0}
    assert found.curve(lambda batch: batch.output_tokens_per_s) == {1: 8.0, 4: 32.0}


def test_the_busy_share_of_a_sweep_is_that_of_all_its_time() -> None:
    """By hand: 8 steps of 0.1 s in 1 s, and 8 of 0.2 s in 4 s: (0.8 + 1.6) / 5."""
    points = {size: Generation(duration_s=size, requests=(), step_count=8) for size in (1, 4)}
    steps_s = {1: 0.1, 4: 0.2}
    profiled = profile_batches(
        lambda load: GpuTime(busy_s=2 * steps_s[load.requests], steps=2, kernels=1),
        points,
        prompt_tokens=16,
        output_tokens=8,
    )
    assert {size: gpu.step_s for size, gpu in profiled.items()} == steps_s
    assert sweep_busy_share(points, profiled) == pytest.approx(0.48)


def test_without_a_gpu_a_sweep_has_no_busy_share() -> None:
    profiled = profile_batches(lambda _: None, (1, 4), prompt_tokens=16, output_tokens=8)
    assert profiled == {}
    assert sweep_busy_share({1: Generation(duration_s=1.0, requests=(), step_count=8)}, profiled) is None


def test_the_best_size_and_the_knee_are_said_with_their_latency() -> None:
    line = batch_size_line({1: 100.0, 2: 199.0, 4: 210.0, 8: 215.0}, {1: 1.0, 2: 1.0, 4: 2.0, 8: 4.0}, end=None)
    assert line == "best batch size 8: 215.0 tok/s, 4.000 s a request; knee at 2: 199.0 tok/s, 1.000 s a request"


def test_a_curve_that_still_rises_has_no_knee() -> None:
    line = batch_size_line({1: 100.0, 2: 200.0}, {1: 1.0, 2: 1.0}, end="out of memory at 4: full")
    assert line == (
        "best batch size 2: 200.0 tok/s, 1.000 s a request; no knee: the last doubling still adds 10 % or more; "
        "ends: out of memory at 4: full"
    )


def test_a_curve_of_one_size_has_no_doubling_to_speak_of() -> None:
    line = batch_size_line({1: 100.0}, {1: 1.0}, end="out of memory at 4: full")
    assert line == "best batch size 1: 100.0 tok/s, 1.000 s a request; ends: out of memory at 4: full"
