"""Why a test got slower, from two summaries of what the GPU did."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.analysis.causes import explained
from pytest_gpuperf.analysis.explain import Cause, Condition, explain
from pytest_gpuperf.analysis.kernel_names import family, short_name
from pytest_gpuperf.records import (
    BaselineFile,
    BaselineRun,
    Environment,
    Hardware,
    KernelSummary,
    KernelUse,
    Measurement,
    Method,
    MetricBaseline,
    Mode,
    Rerun,
    Session,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
)

GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
OTHER = "cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x4_nn_align1"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, a>(int)"
US = 1e-6
RECORDED = json.loads((Path(__file__).parent / "data/explain/h200.json").read_text())


def use(name: str, microseconds: float, *, count: float = 1.0, blocks: float | None = 132.0) -> KernelUse:
    return KernelUse(name=name, count=count, time_s=microseconds * US, blocks=blocks)


def summary(*kernels: KernelUse, gap_us: float = 0.0, **changes: Any) -> KernelSummary:
    busy_s = sum(kernel.time_s for kernel in kernels)
    listed = tuple(kernel for kernel in kernels if not kernel.name.endswith(" others"))
    values: dict[str, Any] = {
        "calls": 100,
        "wall_s": busy_s + gap_us * US,
        "span_s": busy_s + gap_us * US,
        "busy_s": busy_s,
        "longest_gap_s": gap_us * US,
        "kernels": listed,
        "rest": next((kernel for kernel in kernels if kernel not in listed), None),
        "launches": sum(kernel.count for kernel in kernels),
    }
    return KernelSummary(**{**values, **changes})


def use_rest(kernels: int, microseconds: float) -> KernelUse:
    """What `summary` takes for the kernels that are not listed."""
    return use(f"{kernels} others", microseconds, count=kernels, blocks=None)


NUMBERS = st.floats(0, 1e-2)
USES = st.builds(KernelUse, name=st.sampled_from("abcdef"), count=st.floats(0, 100), time_s=NUMBERS, median_s=NUMBERS)
SUMMARIES = st.builds(
    KernelSummary,
    calls=st.integers(1, 200),
    wall_s=NUMBERS,
    span_s=NUMBERS,
    busy_s=NUMBERS,
    longest_gap_s=NUMBERS,
    kernels=st.lists(USES, max_size=6, unique_by=lambda use: use.name).map(tuple),
    rest=st.none() | USES,
    launches=st.floats(0, 1000),
    graph_launches=st.floats(0, 1),
    sync_s=NUMBERS,
)


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


def test_more_launches_are_told_from_a_host_that_does_something_else() -> None:
    then, now = summary(use(GEMM, 200), gap_us=1, launches=4.0), summary(use(GEMM, 200), gap_us=101, launches=9.0)
    (cause,) = causes(now, then)
    assert "(9 launches instead of 4)" in str(cause)


def test_an_added_kernel_says_how_often_it_runs() -> None:
    (cause,) = causes(summary(use(GEMM, 200), use(ADD, 60, count=12)), summary(use(GEMM, 200)))
    assert "(CUDAFunctor_add), 12 times of 5.00 us" in str(cause)


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


def test_a_kernel_that_was_among_those_not_listed_is_no_added_one() -> None:
    listed = [use(f"k{n}", 100) for n in range(39)]
    then = summary(*listed, use("last", 10), use_rest(60, 300), gap_us=5)
    now = summary(*listed, use("from the rest", 10), use_rest(60, 300), gap_us=505)
    (cause,) = causes(now, then)
    assert cause.kind == "gaps"


def test_many_kernels_that_are_each_too_short_to_be_listed_are_one_cause() -> None:
    listed = [use(f"k{n}", 100) for n in range(40)]
    then, now = summary(*listed, use_rest(60, 300)), summary(*listed, use_rest(60, 1300))
    (cause,) = causes(now, then)
    assert str(cause) == "kernels too short to be listed take 1.30 ms a call instead of 300 us, 100 % of the loss"


def test_a_long_kernel_that_is_new_beside_a_rest_is_added() -> None:
    listed = [use(f"k{n}", 100) for n in range(40)]
    now = summary(use("new", 500), *listed[:39], use_rest(61, 400))
    (cause,) = causes(now, summary(*listed, use_rest(60, 300)))
    assert cause.share == pytest.approx(1.0)
    assert str(cause) == "kernel new of 500 us, none of the 40 longest then, 100 % of the loss"


def test_kernels_that_no_longer_run_side_by_side_are_a_cause() -> None:
    kernels = use(GEMM, 200), use(ADD, 190)
    then = summary(*kernels, busy_s=210 * US, span_s=210 * US, streams=2)
    (cause,) = causes(summary(*kernels), then)
    assert str(cause) == (
        "kernels run side by side for 0 s a call, 180 us then (1 stream instead of 2), 100 % of the loss"
    )


def test_a_product_is_replaced_by_a_product_and_an_elementwise_kernel_by_its_like() -> None:
    slow_add = ADD.replace("vectorized", "unrolled")
    then = summary(use(GEMM, 200), use(ADD, 20))
    (cause,) = causes(summary(use(slow_add, 400), use(OTHER, 195)), then)
    assert str(cause) == (
        "kernel vectorized_elementwise_kernel (CUDAFunctor_add) replaced by unrolled_elementwise_kernel "
        "(CUDAFunctor_add), 101 % of the loss"
    )


def test_operators_without_blocks_that_run_more_often_are_not_taken_for_pieces() -> None:
    then = summary(use("aten::mm", 200, count=2, blocks=None), use("aten::add", 20, count=2, blocks=None))
    now = summary(use("aten::mm", 400, count=4, blocks=None), use("aten::add", 40, count=4, blocks=None))
    assert [cause.kind for cause in causes(now, then)] == ["often"]


def test_two_causes_are_both_named_with_shares_of_the_same_loss() -> None:
    then = summary(use(GEMM, 200), use(ADD, 30), gap_us=5)
    now = summary(use(OTHER, 500), use(ADD, 30), use("softmax", 40), gap_us=105)
    found = causes(now, then)
    assert [cause.kind for cause in found] == ["replaced", "gaps"]
    assert [cause.share for cause in found] == pytest.approx([300 / 440, 100 / 440])


@pytest.mark.parametrize("counts", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_kernel_that_never_ran_stops_nobody(counts: tuple[float, float]) -> None:
    then = summary(use(GEMM, 200, count=counts[0]), use("gone", 1, count=0))
    now = summary(use(GEMM, 400, count=counts[1]), use("new", 100, count=0), use(ADD, 50, count=0))
    assert len(causes(now, then)) == (counts[1] > 0)


@pytest.mark.parametrize(
    ("name", "short", "kin"),
    [
        (
            "void at::native::(anonymous namespace)::cunn_SoftMaxForwardReg<float, float, long, 4>(float*, long)",
            "cunn_SoftMaxForwardReg",
            "cunn_SoftMaxForwardReg",
        ),
        (
            "void (anonymous namespace)::elementwise_kernel_with_index<int, at::native::arange(at::Tensor&)>(int)",
            "elementwise_kernel_with_index",
            "elementwise_kernel_with_index",
        ),
        (ADD, "vectorized_elementwise_kernel (CUDAFunctor_add)", "CUDAFunctor_add"),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH (Device -> Pinned)"),
        (GEMM, GEMM, "product"),
    ],
)
def test_a_kernel_has_a_short_name_and_a_family(name: str, short: str, kin: str) -> None:
    assert (short_name(name), family(name)) == (short, kin)


def test_kernels_that_differ_beyond_their_short_names_are_variants_of_one() -> None:
    (cause,) = causes(summary(use(ADD.replace("<4", "<1"), 80)), summary(use(ADD, 20)))
    assert str(cause) == (
        "another variant of kernel vectorized_elementwise_kernel (CUDAFunctor_add) takes 80.0 us instead of 20.0 us, "
        "100 % of the loss"
    )


def test_a_product_does_not_take_the_place_of_anything_else() -> None:
    found = causes(summary(use(OTHER, 900)), summary(use(ADD, 200)))
    assert str(found[0]) == (
        "an added kernel, cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x4_nn_... of 900 us "
        "(operands aligned to 1 element), 129 % of the loss"
    )


def test_a_kernel_that_runs_more_often_at_other_sizes_is_not_interrupted() -> None:
    then = KernelUse(name=GEMM, count=64, time_s=128 * US, median_s=2 * US, blocks=8)
    now = replace(then, count=96, time_s=1280 * US)
    assert [cause.kind for cause in causes(summary(now), summary(then))] == ["slower"]


def test_a_kernel_of_two_sizes_of_which_one_grew_is_not_interrupted() -> None:
    then = KernelUse(name=GEMM, count=64, time_s=300 * US, median_s=2 * US)
    (cause,) = causes(summary(replace(then, time_s=600 * US)), summary(then))
    assert cause.kind == "slower"


@given(st.data())
def test_whatever_two_profiles_hold_the_causes_are_few_and_of_this_loss(data: st.DataObject) -> None:
    then, now = data.draw(SUMMARIES), data.draw(SUMMARIES)
    found = explain(now, then, slower=data.draw(st.floats(0, 10)), condition=Condition(), usual=Condition())
    assert len(found) <= 3
    assert all(cause.text and (cause.share is None or cause.share >= 0) for cause in found)


def test_without_a_stored_profile_the_state_of_the_gpu_is_all_there_is() -> None:
    condition, usual = Condition(sm_clock_mhz=1410.0), Condition(sm_clock_mhz=1755.0)
    (cause,) = causes(summary(use(GEMM, 250)), None, slower=0.25, condition=condition, usual=usual)
    assert str(cause) == "SM clock 1410 against 1755 MHz, 98 % of the loss"
    assert causes(None, None) == ()
    (all_of_it,) = causes(None, None, slower=0.1, condition=condition, usual=usual)
    assert all_of_it.share == 1.0


def test_a_profile_that_shows_no_loss_says_so() -> None:
    (cause,) = causes(summary(use(GEMM, 201)), summary(use(GEMM, 200)), slower=0.2)
    assert cause.kind == "unseen"
    assert str(cause).startswith("a profile taken afterwards shows +0.50 % a call where +20 % was measured")


def test_at_most_three_causes_and_none_that_is_noise() -> None:
    then = summary(*(use(f"k{n}", 100) for n in range(6)))
    now = summary(*(use(f"k{n}", 100 + 10 * n) for n in range(5)), use("k5", 101))
    found = causes(now, then)
    assert [cause.text.split()[1] for cause in found] == ["k4", "k3", "k2"]


def test_many_small_causes_are_one_where_none_matters_by_itself() -> None:
    then = summary(*(use(f"k{n}", 100) for n in range(10)))
    (cause,) = causes(summary(*(use(f"k{n}", 110 + n / 10) for n in range(10))), then)
    assert str(cause) == (
        "10 causes of less than 15 % each, the largest: kernel k9 takes 111 us instead of 100 us, 100 % of the loss"
    )


def recorded(name: str) -> KernelSummary:
    return msgspec.convert(RECORDED[name]["kernels"], KernelSummary)


def renamed(side: KernelSummary) -> KernelSummary:
    """The same work in kernels of a compiler's names, which say nothing."""
    kernels = (replace(use, name=f"triton_poi_fused_{n}") for n, use in enumerate(side.kernels))
    return replace(side, kernels=tuple(kernels))


@pytest.mark.parametrize("name", ["mlp", "loop", "graph", "batch_256"])
def test_kernels_with_other_names_that_take_as_long_are_no_cause(name: str) -> None:
    then = recorded(name)
    now = replace(renamed(then), span_s=1.2 * then.span_s)
    assert [cause.kind for cause in causes(now, then)] == ["gaps"]


@pytest.mark.parametrize("name", ["mlp", "loop", "graph", "batch_256"])
def test_kernels_with_other_names_that_take_longer_are_replaced(name: str) -> None:
    then = recorded(name)
    slower = replace(renamed(then), busy_s=2 * then.busy_s, span_s=then.span_s + then.busy_s)
    now = replace(slower, kernels=tuple(replace(use, time_s=2 * use.time_s) for use in slower.kernels))
    found = causes(now, then)
    assert {cause.kind for cause in found} == {"replaced"}
    assert sum(cause.share or 0.0 for cause in found) < 1.001


def test_one_kernel_in_the_place_of_many_is_no_cause_where_it_is_as_fast_as_they() -> None:
    then = summary(use(GEMM, 200), *(use(f"void at::native::k{n}(int)", 6) for n in range(20)), gap_us=5)
    now = summary(use(GEMM, 200), use("triton_per_fused_layer_norm_0", 100), gap_us=65)
    (cause,) = causes(now, then)
    assert cause.kind == "gaps"
    assert cause.share == pytest.approx(1.5)


def test_of_products_that_are_gone_each_is_replaced_by_the_one_that_runs_as_often() -> None:
    then = summary(use("nvjet_a", 200, count=4), use("nvjet_b", 100))
    now = summary(use("nvjet_c", 350), use("nvjet_d", 205, count=4))
    (cause,) = causes(now, then)
    assert str(cause) == "kernel nvjet_b replaced by nvjet_c, 98 % of the loss"


def test_a_product_that_is_gone_is_replaced_by_whatever_is_new() -> None:
    found = causes(summary(use("triton_red_fused_0", 500), use(ADD, 20)), summary(use(GEMM, 200), use(ADD, 20)))
    assert str(found[0]) == f"kernel {GEMM} replaced by triton_red_fused_0, 100 % of the loss"


def test_a_kernel_of_little_time_that_is_uneven_does_not_give_away_another_process() -> None:
    then = summary(use(GEMM, 800), KernelUse(name="softmax", count=10, time_s=22 * US, median_s=2 * US))
    now = summary(use(GEMM, 800), KernelUse(name="softmax", count=10, time_s=220 * US, median_s=2 * US))
    assert [cause.kind for cause in causes(now, then)] == ["slower"]


@pytest.mark.parametrize("side", ["then", "now"])
def test_a_profile_that_lost_its_list_of_kernels_explains_nothing(side: str) -> None:
    whole, slower = summary(use(GEMM, 200), gap_us=5), summary(use(GEMM, 300), gap_us=5)
    cut = {"then": whole, "now": slower}
    cut[side] = replace(cut[side], kernels=())
    assert causes(cut["now"], cut["then"]) == ()


def test_a_clock_that_explains_next_to_nothing_is_not_named() -> None:
    condition, usual = Condition(sm_clock_mhz=1700.0), Condition(sm_clock_mhz=1755.0)
    assert causes(None, None, slower=0.5, condition=condition, usual=usual) == ()
    (cause,) = causes(summary(use(GEMM, 201)), summary(use(GEMM, 200)), slower=0.5, condition=condition, usual=usual)
    assert cause.kind == "unseen"


# Profiles of seven planted causes on an NVIDIA H200 (torch 2.11.0, CUDA 13.0, driver 580.159.04, 2026-11-21)


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


# The clocks of both sides


def clocked(mode: Mode, *clocks_mhz: float) -> tuple[str, ...]:
    """Causes of a regression whose runs had these clocks, and its baseline 1755 MHz."""
    key, method = TestKey(module="test_a.py", test="test_a"), Method(clock="cuda-events", mode=mode)
    runs = [
        Measurement(
            metric="time",
            value=1.25e-3,
            unit="s",
            better="lower",
            kind="compute",
            method=method,
            telemetry=Telemetry(duration_s=1.0, sm_clock_mhz=clock_mhz),
        )
        for clock_mhz in clocks_mhz
    ]
    record = TestRecord(
        key=key,
        slug="h100",
        devices=("d",),
        environment=Environment(hardware=Hardware(name="NVIDIA H100")),
        measurements=(runs[0],),
        verdicts=(Verdict(status="REGRESSED", metric="time", reason="", tolerance=0.03, change=0.25),),
        duration_s=1.0,
        passed=True,
        more=tuple(Rerun(measurements=(run,), duration_s=1.0) for run in runs[1:]),
    )
    session = Session(
        date="2026-01-01",
        visit="v",
        devices=("d",),
        environment="e",
        runs=(BaselineRun(value=1e-3, sm_clock_mhz=1755.0),),
    )
    baseline = MetricBaseline(unit="s", better="lower", kind="compute", method=method, sessions=(session,))
    file = BaselineFile(
        schema=1, module=key.module, environments={"e": record.environment}, tests={"test_a": {"time": baseline}}
    )
    return explained(record, file, {}, lambda _: None).verdicts[0].causes


def test_the_clock_is_that_of_the_runs_that_confirmed_it_and_of_the_only_run_where_none_did() -> None:
    assert clocked("sustained", 1000.0, 1410.0) == ("SM clock 1410 against 1755 MHz, 98 % of the loss",)
    assert clocked("sustained", 1410.0) == ("SM clock 1410 against 1755 MHz, 98 % of the loss",)


@pytest.mark.parametrize("unit", ["B", "%", "blocks"])
def test_kernels_explain_no_memory_and_no_share(unit: str) -> None:
    """A larger peak of memory beside an unchanged step was said to come and go."""
    key, method = TestKey(module="test_a.py", test="test_a"), Method(clock="wall", mode="recorded")
    run = Measurement(metric="memory", value=2e9, unit=unit, better="lower", kind="end-to-end", method=method)
    record = TestRecord(
        key=key,
        slug="h100",
        devices=("d",),
        environment=Environment(hardware=Hardware(name="NVIDIA H100")),
        measurements=(run,),
        verdicts=(Verdict(status="REGRESSED", metric="memory", reason="", tolerance=0.02, change=1.0),),
        duration_s=1.0,
        passed=True,
    )
    baseline = MetricBaseline(unit=unit, better="lower", kind="end-to-end", method=method, sessions=())
    file = BaselineFile(schema=1, module=key.module, environments={}, tests={"test_a": {"memory": baseline}})
    seen = summary(use(GEMM, 200))
    assert explained(record, file, {(key, "memory"): seen}, lambda _: seen).verdicts[0].causes == ()


def test_the_clock_of_a_region_explains_nothing() -> None:
    """The GPU may have idled in it."""
    assert clocked("recorded", 1410.0) == ()


def test_a_clock_that_explains_little_of_what_no_profile_shows_is_not_the_first_cause() -> None:
    condition, usual = Condition(sm_clock_mhz=1700.0), Condition(sm_clock_mhz=1755.0)
    same = summary(use(GEMM, 200))
    unseen, clock = causes(same, same, slower=0.15, condition=condition, usual=usual)
    assert (unseen.kind, clock.kind) == ("unseen", "clock")
    assert clock.share == pytest.approx(0.2157, abs=1e-3)
    assert [one.kind for one in causes(same, same, slower=0.5, condition=condition, usual=usual)] == ["unseen"]
    assert causes(None, None, slower=0.5, condition=condition, usual=usual) == ()


def test_many_small_causes_go_before_one_that_is_smaller_than_they_are_together() -> None:
    then = summary(use("k0", 250), *(use(f"k{n}", 50) for n in range(1, 16)))
    now = summary(use("k0", 275), *(use(f"k{n}", 55) for n in range(1, 16)))
    together, largest = causes(now, then)
    assert str(together) == (
        "15 causes of less than 15 % each, the largest: kernel k1 takes 55.0 us instead of 50.0 us, 75 % of the loss"
    )
    assert str(largest) == "kernel k0 takes 275 us instead of 250 us, 25 % of the loss"


@pytest.mark.parametrize("listed", [0, 1])
def test_a_stored_profile_that_lacks_kernels_accuses_no_kernel_of_being_new(listed: int) -> None:
    whole = summary(use(GEMM, 200), use(ADD, 15))
    cut = replace(whole, kernels=whole.kernels[:listed])
    assert causes(summary(use(GEMM, 200), use(ADD, 35)), cut) == ()
    assert causes(replace(whole, kernels=whole.kernels[:listed], span_s=250 * US, busy_s=250 * US), whole) == ()


def test_kernels_of_another_version_are_paired_by_how_often_they_run_and_on_how_many_blocks() -> None:
    then = summary(use("cutlass_a", 100, count=2, blocks=132), use("cutlass_b", 80, count=4, blocks=64))
    now = summary(use("nvjet_b", 160, count=4, blocks=64), use("nvjet_a", 100, count=2, blocks=132))
    (cause,) = causes(now, then)
    assert str(cause) == "kernel cutlass_b replaced by nvjet_b, 100 % of the loss"


def test_kernels_that_triton_numbers_anew_are_paired_by_what_they_fuse() -> None:
    then = summary(use("triton_poi_fused_add_relu_0", 100), use("triton_red_fused_softmax_1", 80))
    now = summary(use("triton_red_fused_softmax_0", 160), use("triton_poi_fused_add_relu_3", 100))
    (cause,) = causes(now, then)
    assert str(cause) == ("kernel triton_red_fused_softmax_1 replaced by triton_red_fused_softmax_0, 100 % of the loss")


def test_a_kernel_of_which_one_launch_grew_is_not_interrupted_where_others_as_long_are_not() -> None:
    even = KernelUse(name=OTHER, count=10, time_s=1000 * US, median_s=100 * US)
    then = KernelUse(name=GEMM, count=10, time_s=1000 * US, median_s=100 * US)
    (cause,) = causes(summary(replace(then, time_s=1900 * US), even), summary(then, even))
    assert cause.kind == "slower"
    both = (replace(then, time_s=1900 * US), replace(even, time_s=1900 * US))
    assert [one.kind for one in causes(summary(*both), summary(then, even))] == ["interrupted"]


def test_smaller_pieces_are_seen_where_a_product_is_split_over_as_many_blocks() -> None:
    then = summary(use(GEMM, 170, count=4, blocks=120), use(OTHER, 300, count=4, blocks=128))
    now = summary(use(GEMM, 600, count=32, blocks=88), use(OTHER, 1500, count=32, blocks=128))
    assert [cause.kind for cause in causes(now, then)] == ["pieces"]
