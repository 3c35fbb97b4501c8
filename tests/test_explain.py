"""Why a test got slower, from two summaries of what the GPU did."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from pytest_gpuperf.analysis.explain import Cause, Condition, explain
from pytest_gpuperf.records import KernelSummary, KernelUse

GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
OTHER = "cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x4_nn_align1"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, a>(int)"
US = 1e-6


def use(name: str, microseconds: float, *, count: float = 1.0, blocks: float | None = 132.0) -> KernelUse:
    return KernelUse(name=name, count=count, time_s=microseconds * US, blocks=blocks)


def summary(*kernels: KernelUse, gap_us: float = 0.0, **changes: Any) -> KernelSummary:
    busy_s = sum(kernel.time_s for kernel in kernels)
    values: dict[str, Any] = {
        "calls": 100,
        "wall_s": busy_s + gap_us * US,
        "span_s": busy_s + gap_us * US,
        "busy_s": busy_s,
        "longest_gap_s": gap_us * US,
        "kernels": kernels,
        "launches": sum(kernel.count for kernel in kernels),
    }
    return KernelSummary(**{**values, **changes})


def causes(
    now: KernelSummary | None,
    then: KernelSummary | None,
    *,
    slower: float | None = None,
    condition: Condition | None = None,
    usual: Condition | None = None,
) -> tuple[Cause, ...]:
    measured = now.span_s / then.span_s - 1 if now and then else 0.1
    return explain(
        now,
        then,
        slower=measured if slower is None else slower,
        condition=condition or Condition(),
        usual=usual or Condition(),
    )


def test_a_replaced_kernel_is_named_with_its_share() -> None:
    (cause,) = causes(summary(use(OTHER, 900)), summary(use(GEMM, 200)))
    assert str(cause) == (
        "kernel nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT replaced by "
        "cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x4_nn_... (operands aligned to 1 element), "
        "100 % of the loss"
    )


def test_a_part_may_be_more_than_the_whole_where_another_one_became_faster() -> None:
    (cause,) = causes(summary(use(OTHER, 700), use(ADD, 10)), summary(use(GEMM, 200), use(ADD, 388)))
    assert cause.kind == "replaced"
    assert cause.share == pytest.approx(500 / 122)


def test_an_added_kernel_is_named_by_its_operation() -> None:
    (cause,) = causes(summary(use(GEMM, 200), use(ADD, 15)), summary(use(GEMM, 200)))
    assert str(cause) == (
        "an added kernel, vectorized_elementwise_kernel (CUDAFunctor_add) of 15.0 us, 100 % of the loss"
    )


def test_a_kernel_that_runs_more_often_is_told_from_one_that_is_slower() -> None:
    then = summary(use(GEMM, 200), use(ADD, 30, count=3))
    (often,) = causes(summary(use(GEMM, 200), use(ADD, 60, count=6)), then)
    assert str(often).startswith("kernel vectorized_elementwise_kernel (CUDAFunctor_add) runs 6 times a call instead")
    (slower,) = causes(summary(use(GEMM, 260), use(ADD, 30, count=3)), then)
    assert str(slower) == f"kernel {GEMM} takes 260 us instead of 200 us, 100 % of the loss"


def test_gaps_between_launches_are_the_hosts() -> None:
    then = summary(use(GEMM, 200, count=50), gap_us=20)
    (cause,) = causes(summary(use(GEMM, 200, count=50), gap_us=1520), then)
    assert cause.kind == "gaps"
    assert str(cause) == (
        "the GPU waits 1.52 ms a call for the host, 20.0 us then (host time between launches), 100 % of the loss"
    )


def test_a_lost_cuda_graph_is_told_from_a_slow_host() -> None:
    then = summary(use(GEMM, 200, count=60), gap_us=10, launches=1.0, graph_launches=1.0)
    (cause,) = causes(summary(use(GEMM, 200, count=60), gap_us=310, launches=60.0), then)
    assert str(cause).startswith("a CUDA graph is no longer used: 60 launches a call instead of 1; the GPU waits")


def test_synchronising_is_told_from_other_host_time() -> None:
    then = summary(use(GEMM, 200), gap_us=1)
    (cause,) = causes(summary(use(GEMM, 200), gap_us=101, sync_s=90 * US), then)
    assert "the host synchronises with it in between" in str(cause)


def test_a_lower_clock_explains_what_depends_on_it() -> None:
    condition, usual = Condition(sm_clock_mhz=1410.0), Condition(sm_clock_mhz=1755.0)
    now = summary(use(GEMM, 200 * 1755 / 1410))
    (cause,) = causes(now, summary(use(GEMM, 200)), condition=condition, usual=usual)
    assert str(cause) == "SM clock 1410 against 1755 MHz, 100 % of the loss"


def test_a_lower_clock_does_not_explain_an_added_kernel() -> None:
    condition, usual = Condition(sm_clock_mhz=1600.0), Condition(sm_clock_mhz=1755.0)
    now = summary(use(GEMM, 200), use(ADD, 50))
    assert causes(now, summary(use(GEMM, 200)), condition=condition, usual=usual)[0].kind == "added"


def test_smaller_pieces_are_one_cause_though_every_kernel_has_another_name() -> None:
    then = summary(use(GEMM, 400, count=4, blocks=172), use(ADD, 40, count=4, blocks=500))
    now = summary(use(OTHER, 900, count=32, blocks=86), use(ADD, 100, count=32, blocks=63))
    (cause,) = causes(now, then)
    assert cause.kind == "pieces"
    assert str(cause).startswith("the work comes in 8 times as many, smaller launches: a smaller batch?")
    assert cause.share == pytest.approx(1.0)


def test_another_process_takes_what_the_same_kernels_lose() -> None:
    condition = Condition(others="pid 4711")
    now = summary(use(GEMM, 390), gap_us=60)
    (cause,) = causes(now, summary(use(GEMM, 200)), condition=condition)
    assert str(cause) == "another process works on the GPU (pid 4711), 100 % of the loss"


def test_kernels_that_are_interrupted_give_away_a_process_that_nobody_sees() -> None:
    alone = KernelUse(name=GEMM, count=1.0, time_s=204 * US, median_s=203 * US)
    shared = KernelUse(name=GEMM, count=1.0, time_s=357 * US, median_s=192 * US)
    (cause,) = causes(summary(shared), summary(alone))
    assert str(cause) == (
        f"kernels are interrupted: {GEMM} takes 357 us on average and 192 us in the median: "
        "another process shares the GPU, 100 % of the loss"
    )


def test_a_kernel_that_was_always_uneven_is_slower_and_not_interrupted() -> None:
    then = KernelUse(name=GEMM, count=2.0, time_s=400 * US, median_s=100 * US)
    (cause,) = causes(summary(replace(then, time_s=800 * US, median_s=200 * US)), summary(then))
    assert cause.kind == "slower"


def test_without_a_stored_profile_the_state_of_the_gpu_is_all_there_is() -> None:
    condition, usual = Condition(sm_clock_mhz=1410.0), Condition(sm_clock_mhz=1755.0)
    (cause,) = causes(summary(use(GEMM, 250)), None, slower=0.25, condition=condition, usual=usual)
    assert str(cause) == "SM clock 1410 against 1755 MHz, 98 % of the loss"
    assert causes(None, None) == ()


def test_a_profile_that_shows_no_loss_says_so() -> None:
    (cause,) = causes(summary(use(GEMM, 201)), summary(use(GEMM, 200)), slower=0.2)
    assert cause.kind == "unseen"
    assert str(cause).startswith("a profile taken afterwards shows +0.50 % a call where +20 % was measured")


def test_at_most_three_causes_and_none_that_is_noise() -> None:
    then = summary(*(use(f"k{n}", 100) for n in range(6)))
    now = summary(*(use(f"k{n}", 100 + 10 * n) for n in range(5)), use("k5", 101))
    found = causes(now, then)
    assert [cause.text.split()[1] for cause in found] == ["k4", "k3", "k2"]


# Profiles of seven planted causes on an NVIDIA H200 (torch 2.11.0, CUDA 13.0, driver 580.159.04, 2026-11-21)

RECORDED = json.loads((Path(__file__).parent / "data/explain/h200.json").read_text())


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ("gemm_k4096", "gemm_k4095", "replaced by cutlass_75_tensorop_bf16_s1688gemm_bf16_256x128_nn_align1 (operands"),
        ("mlp", "mlp_extra_pass", "an added kernel, vectorized_elementwise_kernel (MulFunctor) of 16.6 us"),
        ("loop", "loop_host_sleep", "the GPU waits 1.96 ms a call for the host, 429 us then (host time between"),
        ("graph", "eager", "a CUDA graph is no longer used: 60 launches a call instead of 1"),
        ("tf32", "fp32", "(tf32 tensor cores, now fp32 without tensor cores)"),
        ("alone", "with_hog", "another process shares the GPU"),
        ("batch_256", "batch_32", "the work comes in 8 times as many, smaller launches: a smaller batch?"),
    ],
)
def test_the_first_cause_of_a_recorded_slowdown_is_the_planted_one(then: str, now: str, words: str) -> None:
    sides = [RECORDED[then], RECORDED[now]]
    before, after = (msgspec.convert(side["kernels"], KernelSummary) for side in sides)
    usual, condition = (Condition(sm_clock_mhz=side["sm_clock_mhz"]) for side in sides)
    first = causes(after, before, slower=sides[1]["time_s"] / sides[0]["time_s"] - 1, condition=condition, usual=usual)[
        0
    ]
    assert words in str(first)
    assert first.share is not None
    assert first.share > 0.9
