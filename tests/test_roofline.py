"""What limits a workload, what to do, and what a model's step costs: recorded cases of an H200, and by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.analysis import advice, roofline
from pytest_gpuperf.analysis.advice import Recommendation, Setting, amdahl, format_gain, recommendations
from pytest_gpuperf.analysis.model_work import ModelStep, largest_batch, ridge_batch
from pytest_gpuperf.analysis.roofline import (
    Ceilings,
    Diagnosis,
    Evidence,
    Limit,
    Shares,
    communication_share,
    diagnose,
    from_data_sheet,
    limit_of,
    minus,
    nearest,
    per_step,
)
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.records import KernelSummary, KernelUse, Telemetry
from pytest_gpuperf.workloads.models import presets

#: What the same H200 reached in the same sitting: a bfloat16 product of 8192, a copy of 1 GiB.
H200 = Ceilings(
    dtype="bfloat16",
    flops_per_s=664.6e12,
    bandwidth_bytes_per_s=4.2595e12,
    tensor_share=0.813,
    dram_share=0.809,
    peak_flops_per_s=989e12,
    peak_bandwidth_bytes_per_s=4.8e12,
)
LLAMA = presets()["llama-3-8b"]
SETTING = Setting(
    dtype="bfloat16",
    peak_flops_per_s={"bfloat16": 989e12, "float8": 1979e12, "float32": 67e12, "tf32": 494.5e12},
    sm_count=132,
    compute_capability="9.0",
    memory_bytes=150_754_820_096,
    max_sm_clock_mhz=1980.0,
    power_limit_w=700.0,
    default_power_limit_w=700.0,
)


def kernel(name: str = "k", time_s: float = 1e-3, **more: object) -> KernelUse:
    return KernelUse(name=name, time_s=time_s, **{"count": 1.0, **more})  # type: ignore[arg-type]


def summary(*kernels: KernelUse, **changes: object) -> KernelSummary:
    busy_s = sum(one.time_s for one in kernels)
    values: dict[str, object] = {
        "calls": 10,
        "wall_s": busy_s,
        "span_s": busy_s,
        "busy_s": busy_s,
        "longest_gap_s": 0.0,
        "kernels": kernels,
        "launches": sum(one.count for one in kernels),
    }
    return KernelSummary(**{**values, **changes})  # type: ignore[arg-type]


def case(  # one row of numbers, as they were recorded
    time_s: float,
    busy_s: float,
    *,
    span: float,
    calls: int,
    launches: float,
    flop: float | None = None,
    moved: float | None = None,
    tensor: float | None = None,
    dram: float | None = None,
    name: str = "kernel",
) -> Evidence:
    return Evidence(
        time_s=time_s,
        busy_s=busy_s,
        flop=flop,
        bytes_moved=moved,
        activity=None if dram is None else GpuActivity(duration_s=1.2, tensor_share=tensor, dram_share=dram),
        kernels=summary(kernel(name, busy_s), calls=calls, span_s=span, launches=launches),
    )


#: Visit 15, an H200 (benchmarks/diagnose/visit-15-h200.json.gz): time by the clock without a profiler, busy time and
#: span of a profiled pass, GPM counters over 1.2 s. The all-reduces are of two of them, by NCCL, without counters.
RECORDED: dict[str, tuple[Limit, Evidence]] = {
    "matmul of 8192": (
        "compute-bound",
        case(1.654e-3, 1.395e-3, span=1.4e-3, calls=20, launches=2, flop=2 * 8192**3, tensor=0.813, dram=0.158),
    ),
    "copy of 1 GiB": (
        "memory-bound",
        case(504.2e-6, 503.5e-6, span=504.9e-6, calls=20, launches=1, moved=2**31, tensor=0.035, dram=0.809),
    ),
    "1,000 tiny kernels": (
        "overhead-bound",
        case(6.143e-3, 840.8e-6, span=7.6e-3, calls=3, launches=1000, flop=1.024e6, moved=8.192e6),
    ),
    "sleep": (
        "idle",
        case(10.18e-3, 873.8e-9, span=9.224e-3, calls=10, launches=1, flop=1024, moved=8192, tensor=0.0, dram=0.0),
    ),
    "products with 64 rows": (
        "memory-bound",
        case(
            53.31e-6, 45.31e-6, span=54.86e-6, calls=50, launches=4, flop=8.59e9, moved=138.4e6, tensor=0.14, dram=0.462
        ),
    ),
    "softmax of rows": (
        "memory-bound",
        case(211.4e-6, 215.8e-6, span=217.2e-6, calls=20, launches=1, moved=536.9e6, tensor=0.03, dram=0.516),
    ),
    "random gather": (
        "memory-bound",
        case(441.9e-6, 439.6e-6, span=441e-6, calls=20, launches=1, moved=268.4e6, tensor=0.006, dram=0.545),
    ),
    "product of 4096": (
        "compute-bound",
        case(207.7e-6, 206.1e-6, span=210e-6, calls=30, launches=2, flop=2 * 4096**3, tensor=0.715, dram=0.152),
    ),
    "product with K of 4095": (
        "latency-bound",
        case(945.5e-6, 938.1e-6, span=939.7e-6, calls=30, launches=1, flop=137.4e9, tensor=0.339, dram=0.051),
    ),
    "50 small products": (
        "overhead-bound",
        case(545.9e-6, 265e-6, span=693.5e-6, calls=10, launches=50, tensor=0.238, dram=0.027),
    ),
    "50 small products, the host spins between": (
        "overhead-bound",
        case(2.107e-3, 264.9e-6, span=2.229e-3, calls=10, launches=50, tensor=0.054, dram=0.0),
    ),
    "a small network, eager": (
        "overhead-bound",
        case(511.5e-6, 94.33e-6, span=672e-6, calls=30, launches=60, tensor=0.006, dram=0.0),
    ),
    "the same as a CUDA graph": (
        "latency-bound",
        case(111.9e-6, 100.1e-6, span=112.3e-6, calls=30, launches=1, tensor=0.003, dram=0.0),
    ),
    "a network, batch 256": (
        "compute-bound",
        case(
            375.7e-6,
            357.9e-6,
            span=379.9e-6,
            calls=20,
            launches=16,
            flop=184.7e9,
            moved=721e6,
            tensor=0.595,
            dram=0.422,
        ),
    ),
    "a network, batch 32": (
        "memory-bound",
        case(
            1.872e-3,
            1.733e-3,
            span=1.883e-3,
            calls=20,
            launches=128,
            flop=184.7e9,
            moved=5.77e9,
            tensor=0.142,
            dram=0.619,
        ),
    ),
    "Llama-3-8B, 2,048 tokens of prompt, transformers": (
        "compute-bound",
        case(
            62.08e-3,
            59.15e-3,
            span=61.71e-3,
            calls=2,
            launches=1398,
            flop=29.69e12,
            moved=15.5e9,
            tensor=0.582,
            dram=0.249,
        ),
    ),
    "Llama-3-8B, decode of 1, transformers": (
        "overhead-bound",
        case(
            41.26e-3,
            6.304e-3,
            span=48.04e-3,
            calls=4,
            launches=1462,
            flop=15.1e9,
            moved=15.03e9,
            tensor=0.003,
            dram=0.073,
        ),
    ),
    "Llama-3-8B, decode of 128, transformers": (
        "overhead-bound",
        case(
            42.94e-3,
            10.52e-3,
            span=48.55e-3,
            calls=4,
            launches=1398,
            flop=1.933e12,
            moved=18.0e9,
            tensor=0.046,
            dram=0.118,
        ),
    ),
    "all-reduce of 256 MiB": (
        "communication-bound",
        case(887e-6, 884.8e-6, span=886.8e-6, calls=10, launches=1, name="ncclDevKernel_AllReduce_Sum_bf16_RING_LL("),
    ),
    "all-reduce of 1 MiB": (
        "overhead-bound",
        case(19.9e-6, 12.37e-6, span=56.4e-6, calls=10, launches=1, name="ncclDevKernel_AllReduce_Sum_bf16_RING_LL("),
    ),
}


@pytest.mark.parametrize(("limit", "evidence"), RECORDED.values(), ids=RECORDED)
def test_recorded_workloads_are_what_they_are_known_to_be(limit: Limit, evidence: Evidence) -> None:
    assert diagnose(evidence, H200).limit == limit


@pytest.mark.parametrize(("dtype", "peak", "time_s"), [("tf32", 494.5e12, 406.4e-6), ("float32", 67e12, 2.684e-3)])
def test_a_product_is_held_against_the_ceiling_of_its_own_type(dtype: str, peak: float, time_s: float) -> None:
    ceilings = from_data_sheet(dtype, flops_per_s=peak, bandwidth_bytes_per_s=4.8e12)
    found = diagnose(Evidence(time_s=time_s, busy_s=0.99 * time_s, flop=2 * 4096**3, bytes_moved=201e6), ceilings)
    assert found.limit == "compute-bound"
    assert found.mfu == pytest.approx(0.86, abs=0.1)


def test_a_short_profile_at_a_higher_clock_leaves_no_gaps() -> None:
    evidence = RECORDED["matmul of 8192"][1]
    assert evidence.busy_s is not None
    assert evidence.busy_s / evidence.time_s < 0.85
    assert diagnose(evidence, H200).shares.busy == pytest.approx(0.997, abs=0.002)


def test_a_profile_of_few_calls_is_not_asked_for_its_own_gaps() -> None:
    one = Evidence(time_s=10e-3, busy_s=1e-3, kernels=summary(kernel(), calls=1))
    assert diagnose(one, H200).shares.busy == pytest.approx(0.1)


def test_memory_is_what_the_hardware_moved_not_what_the_work_needs() -> None:
    found = diagnose(RECORDED["random gather"][1], H200)
    assert found.shares.memory == pytest.approx(0.545 / 0.809, rel=0.01)
    assert found.mbu == pytest.approx(0.143, abs=0.002)
    assert found.traffic_bytes == pytest.approx(4.72 * 268.4e6, rel=0.01)


def test_tensor_cores_are_not_held_against_a_product_that_uses_none() -> None:
    wide = replace(H200, dtype="float32", flops_per_s=51e12, tensor_share=0.05)
    evidence = replace(RECORDED["product of 4096"][1], flop=None)
    assert diagnose(evidence, wide).shares.compute is None
    assert diagnose(evidence, replace(wide, tensor_share=None)).shares.compute == pytest.approx(0.89, abs=0.01)


def test_a_gpu_that_never_worked_has_no_bound_to_print() -> None:
    assert recommendations(diagnose(Evidence(time_s=1.0, busy_s=0.0), H200), SETTING) == ()


def test_shares_are_of_the_busy_time() -> None:
    found = diagnose(Evidence(time_s=2.0, busy_s=1.6, bytes_moved=0.5 * 2.0 * 4.2595e12, flop=1.0), H200)
    assert found.shares.memory == pytest.approx(0.5 / 0.8)
    assert found.mbu == pytest.approx(0.5)
    assert found.limit == "memory-bound"


@pytest.mark.parametrize(
    ("shares", "limit"),
    [
        (Shares(busy=0.05, memory=1.0, compute=0.0), "idle"),
        (Shares(busy=0.05, pause_s=1e-2, memory=1.0, compute=0.0), "idle"),
        (Shares(busy=0.05, pause_s=10e-6, memory=1.0, compute=0.0), "overhead-bound"),
        (Shares(busy=0.11, pause_s=1e-2, memory=1.0, compute=0.0), "overhead-bound"),
        (Shares(busy=0.69, memory=1.0, compute=0.0), "overhead-bound"),
        (Shares(busy=0.70, memory=1.0, compute=0.0), "memory-bound"),
        (Shares(busy=0.9, communication=0.3, memory=1.0, compute=0.0), "communication-bound"),
        (Shares(busy=0.9, communication=0.29, memory=0.3, compute=0.61), "compute-bound"),
        (Shares(busy=0.9, memory=0.59, compute=0.59), "latency-bound"),
        (Shares(busy=0.9, memory=0.8, compute=0.7), "balanced"),
        (Shares(busy=0.9, memory=0.88, compute=0.7), "memory-bound"),
        (Shares(memory=0.88), "memory-bound"),
        (Shares(memory=0.3), None),
        (Shares(memory=0.3, compute=0.3), None),  # of a GPU that idled, or of kernels that wait
        (Shares(busy=0.9), None),
        (Shares(memory=0.1, compute=0.1), None),  # it may be idle
    ],
)
def test_each_threshold_parts_two_classes(shares: Shares, limit: Limit | None) -> None:
    assert limit_of(shares) == limit


def test_what_is_missing_is_named() -> None:
    found = diagnose(Evidence(time_s=1.0), H200)
    assert found.limit is None
    assert found.next is None
    assert found.missing == ("how long the GPU was busy", "bytes moved", "FLOP")


def test_the_nearest_class_is_named_with_its_distance() -> None:
    near = nearest(Shares(busy=0.99, communication=0.0, memory=0.64, compute=0.03))
    assert near is not None
    assert (near.limit, near.axis, near.value) == ("latency-bound", "memory", 0.6)
    assert near.distance == pytest.approx(0.04)


SHARE = st.floats(0.0, 1.2)


@given(busy=st.floats(0.0, 1.0), communication=st.floats(0.0, 1.0), memory=SHARE, compute=SHARE)
def test_beyond_the_nearest_edge_lies_the_class_that_is_named(
    busy: float, communication: float, memory: float, compute: float
) -> None:
    shares = Shares(busy=busy, communication=communication, memory=memory, compute=compute)
    near = nearest(shares)
    assert near is not None
    value = getattr(shares, near.axis)
    beyond = near.value + (1e-6 if near.value > value else -1e-6)
    assert limit_of(replace(shares, **{near.axis: beyond})) == near.limit != limit_of(shares)
    assert near.axis != "communication" or communication > 0
    halfway = (value + near.value) / 2
    assert abs(near.value - value) < 1e-5 or limit_of(replace(shares, **{near.axis: halfway})) == limit_of(shares)


@given(factor=st.floats(1e-3, 1e3), busy=st.floats(0.01, 1.0), flop=st.floats(1e9, 1e15), moved=st.floats(1e6, 1e13))
def test_the_class_does_not_depend_on_how_long_an_iteration_is(
    factor: float, busy: float, flop: float, moved: float
) -> None:
    one = Evidence(time_s=1.0, busy_s=busy, flop=flop, bytes_moved=moved)
    other = Evidence(time_s=factor, busy_s=busy * factor, flop=flop * factor, bytes_moved=moved * factor)
    assert diagnose(one, H200).shares.compute == pytest.approx(diagnose(other, H200).shares.compute)
    assert diagnose(one, H200).shares.memory == pytest.approx(diagnose(other, H200).shares.memory)


def test_the_data_sheet_stands_for_what_large_kernels_reach_of_it() -> None:
    sheet = from_data_sheet("bfloat16", flops_per_s=989e12, bandwidth_bytes_per_s=4.8e12)
    assert sheet.flops_per_s == pytest.approx(791.2e12)
    assert sheet.bandwidth_bytes_per_s == pytest.approx(4.32e12)
    assert sheet.ridge == pytest.approx(183.1, abs=0.1)
    assert from_data_sheet("int8", flops_per_s=None, bandwidth_bytes_per_s=1.0).ridge is None


@pytest.mark.parametrize(
    "name",
    [
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(...)",
        "multimem_all_reduce_kernel<c10::BFloat16, 16>",
        "void two_shot_all_reduce_kernel",
    ],
)
def test_kernels_that_talk_to_other_gpus_are_known_by_name(name: str) -> None:
    assert communication_share(summary(kernel(name, 3.0), kernel("gemm", 1.0))) == pytest.approx(0.75)


def test_copies_that_leave_the_gpu_are_communication_and_those_within_are_not() -> None:
    leaving = kernel("Memcpy HtoD (Pinned -> Device)", 1.0, kind="copy")
    within = kernel("Memcpy DtoD (Device -> Device)", 3.0, kind="copy")
    assert communication_share(summary(leaving, within)) == pytest.approx(0.25)


def test_steps_of_decoding_are_what_a_longer_run_has_more() -> None:
    reading = summary(kernel("gemm", 4.0, count=2), kernel("gemv", 1.0), calls=1, launches=3)
    both = summary(kernel("gemm", 4.0, count=2), kernel("gemv", 9.0, count=5), calls=1, launches=7)
    left = minus(both, reading)
    assert left is not None
    step = per_step(left, 4)
    assert [(one.name, one.count, one.time_s) for one in step.kernels] == [("gemv", 1.0, 2.0)]
    assert (step.busy_s, step.launches) == (2.0, 1.0)
    assert minus(reading, reading) is None


# A model's step, by hand: Llama-3-8B has 32 layers of 4096 and 14336, 32 heads and 8 of keys and values of 128 each.

LAYERS = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
HEAD = 128256 * 4096
KV_TOKEN = 2 * 32 * 8 * 128 * 2


def step(**changes: object) -> ModelStep:
    values: dict[str, object] = {"shape": LLAMA, "phase": "decode", "batch_size": 1, "tokens": 160}
    return ModelStep(**{**values, **changes})  # type: ignore[arg-type]


def test_a_step_of_decode_multiplies_every_weight_once_for_each_request() -> None:
    four = step(batch_size=4)
    assert four.flop == 4 * (2 * LAYERS + 2 * HEAD + 4 * 32 * 4096 * 160)
    norms = (2 * 32 + 1) * 4096
    assert four.weights_bytes == 2 * (LAYERS + HEAD + norms)
    assert four.kv_bytes == 4 * 161 * KV_TOKEN


def test_reading_a_prompt_needs_the_head_for_its_last_token_alone() -> None:
    reading = step(phase="prefill", tokens=2048)
    assert reading.flop == 2 * LAYERS * 2048 + 2 * HEAD + 4 * 32 * 4096 * (2048 * 2049 / 2)
    assert reading.kv_bytes == 2 * 2048 * KV_TOKEN
    assert reading.new_tokens == 2048


def test_a_window_bounds_attention() -> None:
    shape = replace(LLAMA, sliding_window=10)
    narrow, wide = step(shape=shape, phase="prefill", tokens=100), step(phase="prefill", tokens=100)
    pairs = sum(min(i, 10) for i in range(1, 101))
    assert wide.flop - narrow.flop == 4 * 32 * 4096 * (100 * 101 / 2 - pairs)
    assert step(shape=shape).kv_bytes == 11 * KV_TOKEN


def test_each_pass_of_a_long_prompt_reads_the_weights() -> None:
    assert step(passes=3).weights_bytes == 3 * step().weights_bytes


def test_at_the_ridge_computation_takes_as_long_as_memory() -> None:
    batch = ridge_batch(step(), H200)
    assert batch is not None

    def is_computing(size: int) -> bool:
        one = step(batch_size=size)
        return one.flop / 664.6e12 >= one.bytes_moved / 4.2595e12

    assert is_computing(batch)
    assert not is_computing(batch - 2)


def test_long_sequences_never_reach_the_ridge() -> None:
    assert ridge_batch(step(tokens=8000), H200) is None
    assert ridge_batch(step(), Ceilings(dtype="bfloat16")) is None


def test_the_largest_batch_is_what_memory_holds() -> None:
    free = 0.9 * 80e9 - 2 * LLAMA.parameters
    assert largest_batch(step(), 80_000_000_000) == int(free / (160 * KV_TOKEN))
    assert largest_batch(step(batch_size=7), 10_000_000_000) == 7


# Advice


def advised(evidence: Evidence, setting: Setting = SETTING, ceilings: Ceilings = H200) -> dict[str, Recommendation]:
    return {one.topic: one for one in recommendations(diagnose(evidence, ceilings), setting)}


def decoding(time_s: float, busy_s: float, batch: int = 1, **more: object) -> tuple[Evidence, Setting]:
    one = step(batch_size=batch, **more)
    kernels = summary(kernel("gemv", busy_s, count=300), calls=1)
    evidence = Evidence(time_s=time_s, busy_s=busy_s, flop=one.flop, bytes_moved=one.bytes_moved, kernels=kernels)
    return evidence, replace(SETTING, step=one, engine="vllm")


@given(share=st.floats(0.0, 1.0), factor=st.floats(1.0, 1e6))
def test_amdahls_bound_is_between_nothing_and_the_factor(share: float, factor: float) -> None:
    assert 1.0 <= amdahl(share, factor) <= factor * (1 + 1e-9)


def test_amdahls_bound_by_hand() -> None:
    assert amdahl(0.5, 2) == pytest.approx(4 / 3)
    assert amdahl(0.62) == pytest.approx(2.63, abs=0.01)
    assert amdahl(1.0) == math.inf


@pytest.mark.parametrize(("gain", "text"), [(1.018, "1.02x"), (2.63, "2.6x"), (11.6, "12x"), (3194.0, "3,194x")])
def test_a_gain_is_printed_with_the_digits_that_it_is_worth(gain: float, text: str) -> None:
    assert format_gain(gain) == text


@pytest.mark.parametrize(("limit", "evidence"), RECORDED.values(), ids=RECORDED)
def test_every_recorded_workload_gets_advice_with_numbers_the_largest_gain_first(
    limit: Limit, evidence: Evidence
) -> None:
    found = recommendations(diagnose(evidence, H200), SETTING)
    assert 1 <= len(found) <= 5
    gains = [one.gain for one in found if one.topic != "roof"]
    assert gains == sorted(gains, reverse=True)
    assert all(any(letter.isdigit() for letter in one.because) for one in found)
    assert all(one.topic == "roof" or one.gain >= advice.LEAST_GAIN for one in found)


def test_gaps_ask_for_graphs_and_bound_the_gain_by_the_idle_share() -> None:
    found = advised(RECORDED["a small network, eager"][1])["gaps"]
    assert str(found) == (
        'Idle 82 % of the time, 60 launches an iteration: CUDA graphs or torch.compile(mode="reduce-overhead"); '
        "at most 5.4x."
    )


def test_a_host_that_works_between_launches_is_told_so() -> None:
    _, evidence = RECORDED["50 small products, the host spins between"]
    assert evidence.kernels is not None
    seen = replace(evidence, kernels=replace(evidence.kernels, launch_s=50 * 4.3e-6))
    found = advised(seen)["gaps"]
    assert found.because == "Idle 87 % of the time, 50 launches an iteration that take 4.3 us of a pause of 37 us"
    assert found.action == "take the host's own work from between them"


def test_gaps_of_a_cpu_have_nothing_to_do_with_launches() -> None:
    found = advised(Evidence(time_s=1.0, busy_s=0.5, flop=1.0, bytes_moved=1.0), Setting())["gaps"]
    assert str(found) == "Idle 50 % of the time: see what the process waits for; at most 2.0x."


def test_gaps_of_a_model_name_the_engine() -> None:
    evidence, setting = decoding(41e-3, 6.3e-3)
    assert "--engine vllm" in advised(evidence, replace(setting, engine="transformers"))["gaps"].action
    assert "larger batch" in advised(evidence, setting)["gaps"].action


def test_gaps_between_graphs_ask_for_larger_graphs() -> None:
    one = RECORDED["the same as a CUDA graph"][1]
    assert one.kernels is not None
    graphs = replace(one, kernels=replace(one.kernels, graph_launches=1.0))
    assert advised(graphs)["gaps"].action.startswith("give the graphs more work")


def test_launches_that_bring_little_are_to_bring_more() -> None:
    found = advised(RECORDED["50 small products"][1])["larger work"]
    assert found.because == "Each launch brings 5.3 us of work and a pause of 5.6 us"
    assert found.gain == pytest.approx(545.9 / 265, rel=0.01)


def test_tiny_kernels_are_to_be_fused() -> None:
    _, evidence = RECORDED["1,000 tiny kernels"]
    kernels = summary(kernel("add", 841.2e-6, count=1000), span_s=7.6e-3)
    found = advised(replace(evidence, kernels=kernels))["fusion"]
    assert found.because == "1,000 kernels of 841 ns an iteration, for work of 1.9 us"
    assert found.gain == pytest.approx(6.143e-3 / (8.192e6 / 4.2595e12))


def test_an_idle_gpu_can_be_shared_and_its_host_has_work_to_move() -> None:
    found = advised(RECORDED["sleep"][1])
    assert set(found) == {"host", "sharing"}
    assert found["sharing"].gain == pytest.approx(10.18e-3 / 873.8e-9)


def test_decode_at_batch_one_is_to_be_batched_until_the_ridge() -> None:
    evidence, setting = decoding(4.6e-3, 4.4e-3)
    found = advised(evidence, setting)["batch"]
    assert found.because == "Weights of 15.0 GB are read once a step, for 1 request"
    assert found.action.startswith("batch 8 raises tokens/s (the ridge is at batch 199)")
    assert 7.5 < found.gain < 8


def test_a_batch_that_memory_does_not_hold_is_not_proposed() -> None:
    evidence, setting = decoding(4.6e-3, 4.4e-3, tokens=1000)
    small = replace(setting, memory_bytes=int(2 * LLAMA.parameters / 0.9 + 4 * 1000 * KV_TOKEN))
    found = advised(evidence, small)["batch"]
    assert found.action.startswith("batch 3 ")
    assert "memory is full at 3" in found.action


def test_a_batch_is_not_proposed_where_neither_roof_nor_memory_is_known() -> None:
    evidence, setting = decoding(7e-3, 6e-3)
    unknown = replace(setting, memory_bytes=None)
    assert "batch" not in advised(evidence, unknown, Ceilings(dtype="bfloat16"))


def test_fp8_weights_halve_the_bytes_of_the_weights() -> None:
    evidence, setting = decoding(4.6e-3, 4.5e-3)
    found = advised(evidence, setting)["fp8 weights"]
    assert found.because == "Weights are 100 % of the bytes that a step needs"
    shares = diagnose(evidence, H200).shares
    assert found.gain == pytest.approx(amdahl((shares.memory or 0) * (shares.busy or 0) * 0.9986, 2), rel=1e-3)
    assert "fp8 weights" not in advised(evidence, replace(setting, step=step(weight_bytes=1.0)))
    assert "fp8 weights" not in advised(evidence, replace(setting, peak_flops_per_s={"bfloat16": 312e12}))


def test_an_fp8_cache_is_proposed_where_keys_and_values_are_many() -> None:
    evidence, setting = decoding(12e-3, 11.5e-3, batch=64, tokens=3000)
    found = advised(evidence, setting)["fp8 KV cache"]
    assert found.because == "Keys and values are 63 % of the bytes that a step needs"
    assert "fp8 KV cache" not in advised(*decoding(4.6e-3, 4.4e-3))


def test_a_product_at_its_limit_is_offered_a_smaller_type_and_told_of_the_power_limit() -> None:
    telemetry = Telemetry(duration_s=1.2, sm_clock_mhz=1552.0, power_cap_share=0.96)
    found = advised(RECORDED["matmul of 8192"][1], replace(SETTING, telemetry=telemetry))
    assert found["fp8"].gain == pytest.approx(1979 / 989, rel=0.01)
    assert found["power"].because == "Power-capped 96 % of the time, at 1552 of 1980 MHz"
    assert found["power"].gain == pytest.approx(1980 / 1552, rel=0.01)
    assert "leave the kernels" in found["roof"].action


def test_a_lowered_power_limit_is_to_be_raised() -> None:
    telemetry = Telemetry(duration_s=1.2, sm_clock_mhz=1200.0, power_cap_share=0.96)
    setting = replace(SETTING, telemetry=telemetry, power_limit_w=400.0)
    found = advised(RECORDED["matmul of 8192"][1], setting)["power"]
    assert found.action == "raise the limit of 400 W to 700 W (sudo nvidia-smi -pl 700)"


def test_heat_is_named_with_its_share_and_temperature() -> None:
    telemetry = Telemetry(duration_s=1.2, sm_clock_mhz=1200.0, sw_thermal_share=0.12, temperature_c=88.0)
    found = advised(RECORDED["matmul of 8192"][1], replace(SETTING, telemetry=telemetry))["heat"]
    assert found.because == "Slowed down by heat or a power brake 12 % of the time at 88 °C"
    assert found.gain == pytest.approx(1.65)


def test_products_in_float32_are_offered_tf32() -> None:
    sheet = from_data_sheet("float32", flops_per_s=67e12, bandwidth_bytes_per_s=4.8e12)
    evidence = case(
        2.684e-3,
        2.673e-3,
        span=2.674e-3,
        calls=10,
        launches=1,
        flop=2 * 4096**3,
        name="sm80_xmma_gemm_f32f32_f32f32_f32_nn",
    )
    found = advised(evidence, replace(SETTING, dtype="float32"), sheet)
    assert found["tf32"].gain == pytest.approx(494.5 / 67, rel=0.02)
    assert "alignment" not in found
    with_tf32 = case(406e-6, 400e-6, span=4e-4, calls=10, launches=1, name="sm90_xmma_gemm_f32f32_tf32f32_f32_nn")
    assert "tf32" not in advised(with_tf32, SETTING, sheet)


def test_operators_between_products_are_to_be_fused() -> None:
    kernels = summary(
        kernel("nvjet_sm90_tst_256x128", 45e-3, count=225),
        kernel("void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor>", 10e-3, count=600),
        kernel("void at::native::reduce_kernel<512, 1>", 5e-3, count=65),
    )
    evidence = Evidence(time_s=62e-3, busy_s=60e-3, flop=29.69e12, bytes_moved=15.5e9, kernels=kernels)
    found = advised(evidence)["fusion"]
    assert found.because == "665 kernels that torch runs operator by operator take 25 % of the time"
    assert found.gain == pytest.approx(4 / 3)


def test_a_kernel_of_an_older_architecture_asks_for_aligned_sizes() -> None:
    evidence = replace(
        RECORDED["product with K of 4095"][1],
        kernels=summary(kernel("void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm", 938.1e-6, blocks=512.0)),
    )
    found = advised(evidence)["alignment"]
    assert found.because == "100 % of the time is in a kernel for compute capability 7.5, at 42 % of a product's rate"
    assert found.gain == pytest.approx(1 / 0.42, rel=0.02)
    assert "alignment" not in advised(evidence, replace(SETTING, compute_capability="7.5"))
    aligned = kernel("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x4_nn_align8", 938.1e-6, blocks=512.0)
    assert "alignment" not in advised(replace(evidence, kernels=summary(aligned)))


def test_kernels_with_few_blocks_leave_multiprocessors_without_work() -> None:
    evidence = RECORDED["the same as a CUDA graph"][1]
    small = replace(evidence, kernels=summary(kernel("gemm", 1e-4, blocks=32.0), span_s=112e-6))
    found = advised(small)["blocks"]
    assert found.because.startswith("Kernels with 32 blocks and the like, on 132 SMs, take 89 %")
    assert found.gain > 2.5


def test_scattered_access_is_told_from_the_traffic() -> None:
    found = advised(RECORDED["random gather"][1])["traffic"]
    assert found.because == "Memory moves 4.7 times the 268 MB that are needed"


def test_a_copy_is_told_that_only_fewer_bytes_help() -> None:
    found = advised(RECORDED["copy of 1 GiB"][1])
    assert found["bytes"].gain == pytest.approx(2.0, rel=0.01)
    assert found["roof"].gain == pytest.approx(1.0)
    wide = advised(RECORDED["copy of 1 GiB"][1], replace(SETTING, dtype="float32"))
    assert wide["bytes"].action == "a 16-bit type halves them"


def test_communication_is_to_be_less_and_beside_the_rest() -> None:
    kernels = summary(kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(x)", 0.4), kernel("gemm", 0.6))
    evidence = Evidence(time_s=1.0, busy_s=1.0, flop=1.0, bytes_moved=1.0, kernels=kernels)
    found = advised(evidence, replace(SETTING, gpus=2))
    assert found["overlap"].gain == pytest.approx(1 / 0.6)
    assert found["overlap"].action.endswith("or fewer than 2 GPUs")
    assert found["communication"].gain == pytest.approx(1.25)
    assert found["communication"].because.endswith("most of it ncclDevKernel_AllReduce_Sum_bf16_RING_LL")


def test_a_link_that_could_carry_more_is_named() -> None:
    activity = GpuActivity(duration_s=1.0, nvlink_tx_bytes_per_s=300e9)
    evidence = replace(RECORDED["all-reduce of 256 MiB"][1], activity=activity)
    found = advised(evidence, replace(SETTING, nvlink_bytes_per_s=450e9))["link"]
    assert found.because == "NVLink carries 300 GB/s one way, of 450 GB/s"
    assert found.gain == pytest.approx(1.5, rel=0.01)


def test_a_rule_without_its_numbers_says_nothing() -> None:
    empty: Diagnosis = diagnose(Evidence(time_s=1.0), Ceilings(dtype="bfloat16"))
    assert recommendations(empty, Setting()) == ()
    assert roofline.busy_share(Evidence(time_s=1.0)) is None
