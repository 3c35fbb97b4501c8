"""Definitions of the latencies, by hand, by numpy, and by vLLM's own benchmark where it is installed."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.workloads.gpu_trace import gpu_time
from pytest_gpuperf.workloads.kv_cache import cause_of_low_use, filled_share_of, kv_use
from pytest_gpuperf.workloads.requests import (
    Generation,
    GpuTime,
    Load,
    RequestTiming,
    Step,
    busy_share,
    gpu_busy_share,
    in_sequence,
    percentile,
    prompts_of,
    request_gpu_time,
    sampled_gpu_time,
)
from pytest_gpuperf.workloads.vllm_driver import timings

_TIMES = st.floats(min_value=1e-6, max_value=1e3)


def _request(ttft_s: float, gaps_s: tuple[float, ...] = ()) -> RequestTiming:
    return RequestTiming(
        prompt_tokens=10,
        output_tokens=1 + len(gaps_s),
        ttft_s=ttft_s,
        latency_s=ttft_s + sum(gaps_s),
        gaps_s=gaps_s,
    )


def _generation(*requests: RequestTiming, duration_s: float = 2.0, steps: tuple[Step, ...] = ()) -> Generation:
    return Generation(duration_s=duration_s, requests=requests, steps=steps, step_count=max(len(steps), 1))


def _step(running: int, kv_share: float = 0.5, **more: Any) -> Step:
    return Step(time_s=0.0, running=running, kv_share=kv_share, **{"waiting": 0, **more})


# Two requests: tokens at 1.0, 1.1, 1.4 s and at 0.5, 0.7 s after handing over.
_PAIR = _generation(_request(1.0, (0.1, 0.3)), _request(0.5, (0.2,)))


def test_throughput_is_tokens_over_the_whole_duration() -> None:
    """Five output and twenty prompt tokens in two seconds."""
    assert _PAIR.output_tokens_per_s == 2.5
    assert _PAIR.total_tokens_per_s == 12.5
    assert _PAIR.requests_per_s == 1.0


def test_ttft_includes_the_queue() -> None:
    """From handing over to the first token: the median of 0.5 and 1.0."""
    assert _PAIR.ttft_s() == pytest.approx(0.75)


def test_itl_pools_the_gaps_of_all_requests() -> None:
    """The median of 0.1, 0.2 and 0.3, not of the requests' means."""
    assert _PAIR.itl_s() == pytest.approx(0.2)


def test_tpot_is_one_value_a_request() -> None:
    """(1.4 - 1.0) / 2 and (0.7 - 0.5) / 1."""
    assert [one.tpot_s for one in _PAIR.requests] == pytest.approx([0.2, 0.2])
    assert _PAIR.tpot_s(99) == pytest.approx(0.2)


def test_latency_ends_with_the_last_token() -> None:
    """1.4 and 0.7."""
    assert _PAIR.latency_s(100) == pytest.approx(1.4)
    assert _PAIR.latency_s(0) == pytest.approx(0.7)


def test_a_single_token_has_no_time_between_tokens() -> None:
    """And the message says what to ask for."""
    alone = _generation(_request(1.0))
    for ask in (alone.itl_s, alone.tpot_s):
        with pytest.raises(MeasurementError, match=r"none of the 1 requests produced two\. Ask for output_tokens of 2"):
            ask(50)


def test_goodput_counts_requests_that_meet_all_limits() -> None:
    """The second alone starts within 0.6 s; both end within 2 s."""
    assert _PAIR.goodput_requests_per_s(ttft_s=0.6) == 0.5
    assert _PAIR.goodput_requests_per_s(ttft_s=0.6, tpot_s=0.1) == 0.0
    assert _PAIR.goodput_requests_per_s(latency_s=2.0) == 1.0


@given(st.lists(_TIMES, min_size=1, max_size=50), st.floats(min_value=0, max_value=100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    """To the last bits."""
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-12)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_a_percentile_of_nothing_is_a_mistake(values: list[float], percent: float) -> None:
    """As is one outside of 0 to 100."""
    with pytest.raises(UsageError, match=rf"percentile\({percent}\) of {len(values)} values"):
        percentile(values, percent)


@given(st.lists(st.tuples(_TIMES, st.lists(_TIMES, max_size=20)), min_size=1, max_size=20))
def test_the_gaps_lead_from_the_first_token_to_the_last(given_requests: list[tuple[float, list[float]]]) -> None:
    """TPOT is the mean of a request's gaps."""
    for ttft_s, gaps_s in given_requests:
        request = _request(ttft_s, tuple(gaps_s))
        if gaps_s:
            # the gaps are a difference of two sums, whose rounding is that of the larger
            assert request.tpot_s == pytest.approx(float(np.mean(gaps_s)), abs=1e-12 * request.latency_s + 1e-9)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"requests": 0}, r"Load\(requests=0\): at least 1"),
        ({"prompt_tokens": 0}, r"Load\(prompt_tokens=0\)"),
        ({"output_tokens": -1}, r"Load\(output_tokens=-1\)"),
        ({"requests": 128 / 2}, r"Load\(requests=64\.0\): a whole number is needed"),
        ({"requests": True}, r"Load\(requests=True\): a whole number is needed"),
        ({"output_tokens": "8"}, r"Load\(output_tokens='8'\): a whole number is needed"),
        ({"seed": 0.5}, r"Load\(seed=0\.5\): a whole number is needed"),
        ({"seed": -1}, r"Load\(seed=-1\): at least 0"),
        ({"shared_prefix_tokens": 9}, "shared_prefix_tokens=9.* is not between 0 and the 8 tokens"),
    ],
)
def test_an_impossible_load_is_a_mistake(asked: dict[str, Any], message: str) -> None:
    """With the number."""
    with pytest.raises(UsageError, match=message):
        Load(**{"requests": 1, "prompt_tokens": 8, "output_tokens": 8, **asked})


def test_the_same_load_gives_the_same_prompts() -> None:
    """And another seed others."""
    load = Load(requests=4, prompt_tokens=16, output_tokens=1)
    assert prompts_of(load, 100) == prompts_of(load, 100)
    assert prompts_of(load, 100) != prompts_of(msgspec.structs.replace(load, seed=1), 100)


def test_prompts_share_as_much_as_was_asked() -> None:
    """And go on differently."""
    prompts = prompts_of(Load(requests=5, prompt_tokens=40, output_tokens=1, shared_prefix_tokens=30), 1000)
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 5
    assert {len(prompt) for prompt in prompts} == {40}
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)


def test_generations_in_sequence_are_pooled() -> None:
    """Durations add up, and the steps of the second begin where the first ended."""
    one = _generation(_request(1.0), steps=(_step(1),))
    both = in_sequence([one, one])
    assert (both.duration_s, both.step_count, len(both.requests)) == (4.0, 2, 2)
    assert [step.time_s for step in both.steps] == [0.0, 2.0]


def test_no_generations_are_a_mistake() -> None:
    """Not a division by zero later."""
    with pytest.raises(UsageError, match="at least one"):
        in_sequence([])


def test_arrivals_become_timings_in_the_order_of_the_load() -> None:
    """Requests are handed over at 0 and 1 s; the second ends first, with two tokens at once."""
    handed = [("a", 0.0), ("b", 1.0)]
    arrivals = [(2.0, ["a", "b"], [1, 2]), (3.0, ["a", "b"], [0, 1]), (5.0, ["a"], [1])]
    first, second = timings(handed, arrivals, prompt_tokens=7)
    assert (first.ttft_s, first.latency_s, first.gaps_s, first.output_tokens) == (2.0, 5.0, (3.0,), 2)
    assert (second.ttft_s, second.latency_s, second.gaps_s, second.output_tokens) == (1.0, 2.0, (1.0,), 3)


def test_a_request_without_a_token_is_counted_as_such() -> None:
    """The engine then refuses the whole generation."""
    assert timings([("a", 0.0)], [], prompt_tokens=7)[0].output_tokens == 0


def test_the_busy_share_takes_time_from_one_pass_and_duration_from_the_other() -> None:
    """2 ms a step, 500 steps, in 2 s."""
    gpu = GpuTime(busy_s=0.2, steps=100, kernels=1)
    generation = msgspec.structs.replace(_PAIR, step_count=500)
    assert gpu_busy_share(gpu, generation) == pytest.approx(0.5)


def test_the_busy_share_is_at_most_all() -> None:
    """The two passes differ a little."""
    assert gpu_busy_share(GpuTime(busy_s=3.0, steps=1, kernels=1), _PAIR) == 1.0


def _trace(path: Path, *spans: tuple[str, float, float]) -> Path:
    events = [{"ph": "X", "cat": cat, "ts": ts, "dur": dur, "name": "n", "args": {"a": [1]}} for cat, ts, dur in spans]
    text = json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events], "deviceProperties": []}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_kernels_copies_and_fills_occupy_the_gpu(tmp_path: Path) -> None:
    """Operators of the host do not, and times are microseconds."""
    spans = [("kernel", 0, 10), ("gpu_memcpy", 20, 5), ("gpu_memset", 30, 1), ("cpu_op", 0, 100)]
    assert gpu_time([_trace(tmp_path / "a.json", *spans)], steps=1).busy_s == pytest.approx(16e-6)


def test_ranks_are_averaged(tmp_path: Path) -> None:
    """10 and 30 us."""
    traces = [
        _trace(tmp_path / "0.json.gz", ("kernel", 0, 10)),
        _trace(tmp_path / "1.json", ("kernel", 0, 20), ("kernel", 50, 10)),
    ]
    found = gpu_time(traces, steps=4)
    assert [found.busy_s, found.step_s] == pytest.approx([20e-6, 5e-6])


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    """Cut short, for example."""
    path = tmp_path / "rank0.json"
    path.write_text('{"traceEvents": [')
    with pytest.raises(MeasurementError, match=r"rank0\.json is not a trace of torch's profiler"):
        gpu_time([path], steps=1)


def test_no_trace_is_no_idle_gpu() -> None:
    """But a profiler that did not work."""
    with pytest.raises(MeasurementError, match=r"saw no kernel in 3 steps \(no file\)"):
        gpu_time([], steps=3)


_LOAD = Load(requests=2, prompt_tokens=20, output_tokens=8)


def test_slots_of_the_last_blocks_are_wasted() -> None:
    """Two requests of 20 + 3 tokens, the newest of each not written yet: 44 of 4 blocks of 16."""
    steps = (_step(2, 0.4, prompt_tokens=40, output_tokens=2), *2 * [_step(2, 0.4, output_tokens=2)])
    generation = _generation(_request(1.0), steps=steps)
    assert filled_share_of(generation, _LOAD, blocks=11, block_size=16) == pytest.approx(44 / 64)


def test_steps_with_prompts_under_way_do_not_count() -> None:
    """The second request's blocks are taken, and its tokens not counted: 21 tokens of the first are in 2 blocks."""
    steps = (
        _step(1, 0.2, prompt_tokens=20, output_tokens=1),
        _step(1, 0.2, output_tokens=1),
        _step(2, 0.4, output_tokens=1),
    )
    generation = _generation(_request(1.0), steps=steps)
    assert filled_share_of(generation, _LOAD, blocks=11, block_size=16) == pytest.approx(21 / 32)
    assert filled_share_of(_generation(_request(1.0), steps=steps[2:]), _LOAD, blocks=11, block_size=16) is None


def test_steps_after_a_preemption_do_not_count() -> None:
    """What runs has become less: tokens that were there are gone."""
    steps = (_step(2, 0.4, prompt_tokens=40, output_tokens=2), _step(1, 0.4, output_tokens=1))
    assert filled_share_of(_generation(_request(1.0), steps=steps), _LOAD, blocks=11, block_size=16) == pytest.approx(
        40 / 64
    )


def test_steps_after_the_first_end_do_not_count() -> None:
    """A request of two tokens may have ended with the second step."""
    steps = (_step(2, 0.4, prompt_tokens=40, output_tokens=2), _step(2, 0.1, output_tokens=2))
    load = msgspec.structs.replace(_LOAD, output_tokens=2)
    assert filled_share_of(_generation(_request(1.0), steps=steps), load, blocks=11, block_size=16) == pytest.approx(
        40 / 64
    )


def test_with_shared_blocks_no_share_is_filled() -> None:
    """A token stands in them for several requests."""
    steps = (_step(2, 0.4, prompt_tokens=40, output_tokens=2, prefix_hits=16, prefix_queries=40),)
    assert filled_share_of(_generation(_request(1.0), steps=steps), _LOAD, blocks=11, block_size=16) is None


def test_the_use_of_the_cache_is_read_from_the_steps() -> None:
    """The null block is not there for requests."""
    steps = (
        _step(2, 0.4, prefix_queries=40, prefix_hits=10),
        _step(2, 0.9, waiting=3),
        _step(2, 0.1, preemptions=2),
    )
    use = kv_use(_generation(_request(1.0), steps=steps), _LOAD, blocks=11, block_size=16)
    assert use is not None
    assert (use.blocks, use.peak_blocks, use.peak.waiting) == (10, 9, 3)
    assert (use.hit_rate, use.preemptions) == (0.25, 2)


def test_without_steps_nothing_is_said_of_the_cache() -> None:
    """Rather than zero."""
    assert kv_use(_PAIR, _LOAD, blocks=11, block_size=16) is None


@pytest.mark.parametrize(
    ("peak", "max_num_seqs", "message"),
    [
        (_step(2, 0.4), 256, r"4 of 10 blocks \(40.* %\) .*too few requests, all 2 ran.*5 of 2 blocks each"),
        (_step(2, 0.4, waiting=7), 2, r"max_num_seqs=2 was reached, with 7 requests waiting\. From about 5"),
        (_step(2, 0.8, waiting=7), 256, r"7 requests waited while 2 ran: .*max_num_batched_tokens"),
    ],
)
def test_low_use_has_a_cause(peak: Step, max_num_seqs: int, message: str) -> None:
    """And what mends it, with the numbers."""
    use = kv_use(_generation(_request(1.0), steps=(peak,)), _LOAD, blocks=11, block_size=16)
    assert use is not None
    cause = cause_of_low_use(use, _LOAD, max_num_seqs=max_num_seqs)
    assert cause is not None
    assert re.search(message, cause)


def test_use_over_the_goal_needs_no_cause() -> None:
    """More than nine tenths."""
    use = kv_use(_generation(_request(1.0), steps=(_step(2, 0.95),)), _LOAD, blocks=11, block_size=16)
    assert use is not None
    assert cause_of_low_use(use, _LOAD, max_num_seqs=2) is None


def test_what_the_gpu_computes_for_a_request_is_told_apart() -> None:
    """The first token's part is the median of three; the others share the rest."""
    first = [GpuTime(busy_s=busy_s, steps=1, kernels=9) for busy_s in (0.007, 0.030, 0.006)]
    gpu = request_gpu_time(GpuTime(busy_s=0.070, steps=64, kernels=9), first, output_tokens=64)
    assert (gpu.first_token_s, gpu.whole_s) == (0.007, 0.070)
    assert gpu.token_s == pytest.approx(0.001)


def test_a_profile_of_one_token_that_was_slower_than_all_leaves_nothing_for_the_others() -> None:
    first = [GpuTime(busy_s=0.080, steps=1, kernels=9)]
    gpu = request_gpu_time(GpuTime(busy_s=0.070, steps=64, kernels=9), first, output_tokens=64)
    assert gpu.token_s == 0.0


def test_a_sample_from_the_middle_stands_for_all_tokens_after_the_first() -> None:
    """An engine whose tokens take longer the more there are before them."""
    seen: list[tuple[int, int]] = []

    def profile(load: Load) -> GpuTime:
        seen.append((load.prompt_tokens, load.output_tokens))
        contexts = range(load.prompt_tokens + 1, load.prompt_tokens + load.output_tokens)
        busy_s = load.prompt_tokens * 1e-4 + sum(6e-3 + 1e-5 * context for context in contexts)
        return GpuTime(busy_s=busy_s, steps=load.output_tokens, kernels=10 * load.output_tokens)

    load = Load(requests=4, prompt_tokens=128, output_tokens=128)
    found = sampled_gpu_time(profile, load, sample_tokens=16)
    assert seen == [(128, 1), (184, 1), (184, 16)]
    whole = profile(load)
    assert found.busy_s == pytest.approx(whole.busy_s, rel=1e-3)
    assert (found.steps, found.kernels) == (whole.steps, whole.kernels)


@pytest.mark.parametrize(("profiles", "output_tokens"), [(0, 64), (1, 1)])
def test_without_a_profile_of_a_first_token_or_others_after_it_nothing_is_told_apart(
    profiles: int, output_tokens: int
) -> None:
    one = GpuTime(busy_s=0.070, steps=64, kernels=9)
    with pytest.raises(UsageError, match=f"of {output_tokens} output tokens and {profiles} profiles of a first token"):
        request_gpu_time(one, [one] * profiles, output_tokens=output_tokens)


@pytest.mark.parametrize(("time_s", "share"), [(0.01, 0.64), (0.02, 0.32), (0.005, 1.0)])
def test_what_a_request_takes_longer_than_the_gpu_is_the_hosts(time_s: float, share: float) -> None:
    assert busy_share(0.0064, time_s) == pytest.approx(share)
