"""What a model needs of a GPU's memory: against vLLM's own layers, transformers' own tensors, and by hand."""

import importlib.util
import json
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.analysis.memory import (
    Estimate,
    Overhead,
    Overheads,
    Quantization,
    Slack,
    Use,
    estimate,
    package_overheads,
)
from pytest_gpuperf.analysis.memory_fit import common_gpus, fits_on, largest_batch, memory_of
from pytest_gpuperf.analysis.memory_parts import (
    captured_graphs,
    kv_blocks,
    kv_cache_memory_bytes,
    matrix_bytes,
    padded_vocab,
    transformers_activation_bytes,
    vllm_activation_bytes,
    vllm_weight_bytes,
)
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.specs import find_spec
from pytest_gpuperf.workloads.models import ModelShape, config_of, presets

if TYPE_CHECKING:
    import torch

SHAPES = presets()
LLAMA = SHAPES["llama-3-8b"]
NO_OVERHEAD = Overhead(bytes=0, is_measured=True, origin="none")
NOTHING_BESIDES = Overheads(context=NO_OVERHEAD, nccl=NO_OVERHEAD, graph_layer=NO_OVERHEAD)


def needed(model: str = "llama-3-8b", **use: Any) -> Estimate:
    return estimate(SHAPES[model], Use(**{"sequence_tokens": 1024, **use}), overheads=NOTHING_BESIDES)


# Weights


#: Model, GPUs -> bytes of all parameters and of the rotary table of one rank, summed over the layers that vLLM 0.32
#: builds for that rank (`initialize_model` on the meta device).
VLLM_WEIGHTS = {
    ("tiny", 1): 3_672_576,
    ("tiny", 2): 1_968_640,
    ("gpt2", 1): 248_951_808,
    ("gpt2", 2): 125_319_168,
    ("opt-1.3b", 1): 2_631_647_232,
    ("opt-1.3b", 8): 336_826_368,
    ("tinyllama-1.1b", 1): 2_200_358_912,
    ("tinyllama-1.1b", 8): 281_202_688,
    ("llama-3.2-1b", 1): 2_488_406_016,
    ("llama-3.2-3b", 1): 6_459_054_080,
    ("llama-3.2-3b", 2): 3_246_479_360,
    ("llama-2-7b", 1): 13_477_879_808,
    ("llama-2-7b", 8): 1_686_118_400,
    ("mistral-7b", 1): 14_491_852_800,
    ("qwen2.5-7b", 1): 15_264_787_456,
    ("qwen2.5-7b", 2): 7_649_375_232,
    ("llama-3-8b", 1): 16_062_619_648,
    ("llama-3-8b", 2): 8_032_624_640,
    ("llama-2-70b", 1): 137_954_344_960,
    ("llama-3-70b", 1): 141_109_510_144,
    ("llama-3-70b", 2): 70_557_122_560,
    ("llama-3-70b", 8): 17_642_831_872,
}


@pytest.mark.parametrize(("model", "gpus"), VLLM_WEIGHTS)
def test_weights_are_those_of_vllms_own_layers_to_the_byte(model: str, gpus: int) -> None:
    assert vllm_weight_bytes(SHAPES[model], Use(sequence_tokens=16, gpus=gpus)) == VLLM_WEIGHTS[model, gpus]


@pytest.mark.parametrize(("vocab", "rows"), [(32000, 32000), (32001, 32064), (50257, 50304)])
def test_vocabulary_is_padded_to_64_rows(vocab: int, rows: int) -> None:
    assert padded_vocab(replace(LLAMA, vocab=vocab)) == rows


@pytest.mark.parametrize("model", SHAPES)
def test_weights_of_transformers_are_two_bytes_a_parameter(model: str) -> None:
    assert needed(model, engine="transformers").fullest.weights_bytes == 2 * SHAPES[model].parameters


def test_a_tied_head_is_a_copy_where_the_layers_are_split_over_gpus() -> None:
    shape = SHAPES["gpt2"]
    first, last = needed("gpt2", engine="transformers", gpus=2).gpus
    copy = shape.vocab * shape.hidden
    assert first.weights_bytes + last.weights_bytes == 2 * (shape.parameters + copy)
    assert first.kv_bytes == last.kv_bytes


def test_layers_that_do_not_divide_evenly_are_all_placed() -> None:
    gpus = needed("llama-3-8b", engine="transformers", gpus=3).gpus
    assert sum(gpu.weights_bytes for gpu in gpus) == 2 * LLAMA.parameters
    assert sum(gpu.kv_bytes for gpu in gpus) == 1024 * LLAMA.kv_bytes_per_token(2)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ("fp16", 2 * 4096 * 4096),
        ("bf16", 2 * 4096 * 4096),
        ("fp8", 4096 * 4096 + 4),
        ("int8", 4096 * 4096 + 4 * 4096),
        ("int4", 4096 * 4096 * 4.15625 / 8),
    ],
)
def test_matrix_has_its_weights_and_scales(quantization: Quantization, expected: float) -> None:
    assert matrix_bytes(4096, 4096, quantization) == expected


def test_quantization_leaves_embedding_head_norms_and_biases_16_bit() -> None:
    use = Use(sequence_tokens=16)
    shape = SHAPES["qwen2.5-7b"]
    matrices = shape.layers * (shape.hidden * (2 * 3584 + 2 * 512) + 3 * shape.hidden * shape.intermediate)
    saved = vllm_weight_bytes(shape, use) - vllm_weight_bytes(shape, replace(use, quantization="fp8"))
    assert saved == matrices - shape.layers * 4 * 4  # a byte a weight, less four matrices' scales a layer


# KV cache


def test_kv_block_is_vllms_block() -> None:
    """2 layers, 2 KV heads of 64, bf16: vLLM's block of 128 tokens has 131072 B, and half of it on each of two GPUs."""
    shape = replace(SHAPES["tiny"], layers=2, heads=4, kv_heads=2, head_dim=64)
    use = Use(sequence_tokens=128)
    assert kv_cache_memory_bytes(shape, use) == 131072 + 131072 // 8  # with the null block of 16 tokens
    assert kv_cache_memory_bytes(shape, replace(use, gpus=2)) == (131072 + 131072 // 8) // 2


def test_70b_at_131072_tokens_counts_the_grouped_heads() -> None:
    """Calculators that forget grouped queries say 343.6 GB."""
    shape = replace(SHAPES["llama-3-70b"], max_positions=131072)
    use = Use(sequence_tokens=131072, quantization="fp16", gpus=8)
    found = estimate(shape, use)
    assert found.kv_bytes_per_request == 42_949_672_960
    assert 131072 * 2 * 2 * shape.layers * shape.heads * shape.head_dim == 343_597_383_680
    assert found.fullest.kv_bytes == (131072 // 16 + 1) * 16 * found.kv_bytes_per_token


def test_cache_has_whole_blocks_and_one_that_vllm_keeps() -> None:
    assert kv_blocks(LLAMA, Use(sequence_tokens=17, batch_size=3)) == 3 * 2 + 1


def test_fp8_cache_is_half() -> None:
    use = Use(sequence_tokens=1024, batch_size=4)
    assert 2 * kv_cache_memory_bytes(LLAMA, replace(use, kv_dtype="fp8")) == kv_cache_memory_bytes(LLAMA, use)


def test_gpus_that_share_a_head_each_have_it() -> None:
    use = Use(sequence_tokens=1024)
    of_8, of_16 = (kv_cache_memory_bytes(LLAMA, replace(use, gpus=gpus)) for gpus in (8, 16))
    assert of_8 == of_16


def test_sliding_window_bounds_what_a_request_keeps() -> None:
    shape = SHAPES["mistral-7b"]
    use = Use(sequence_tokens=32768, max_num_batched_tokens=2049)
    assert kv_blocks(shape, use) == 384 + 1  # (4096 - 1 + 2049) / 16
    found = estimate(shape, replace(use, engine="transformers"))
    assert found.fullest.kv_bytes == 4096 * shape.kv_bytes_per_token(2)


# Activations and CUDA graphs


def test_activations_of_vllm_are_the_mlp_of_a_full_step() -> None:
    """llama-3-8b: 8192 tokens x (3 x 14336 + 7 x 4096) x 2 B, which vLLM 0.26 logs as 1181116006 B."""
    use = Use(sequence_tokens=1024)
    assert vllm_activation_bytes(LLAMA, use) == 8192 * (3 * 14336 + 7 * 4096) * 2
    assert vllm_activation_bytes(LLAMA, use) == pytest.approx(1_181_116_006, rel=0.01)
    assert vllm_activation_bytes(LLAMA, replace(use, gpus=2)) == 8192 * (3 * 7168 + 7 * 4096) * 2


def test_logits_of_many_requests_are_the_peak_of_a_small_model() -> None:
    use = Use(sequence_tokens=1024, batch_size=256, max_num_batched_tokens=512)
    assert vllm_activation_bytes(SHAPES["gpt2"], use) == 512 * 768 * 2 + 256 * 50304 * 6


@pytest.mark.parametrize(
    ("batch_size", "graphs"),
    [(1, 2 + 1), (4, 4 + 3), (8, 5 + 4), (256, 51 + 35), (1024, 51 + 51)],
)
def test_graphs_are_counted_as_vllm_captures_them(batch_size: int, graphs: int) -> None:
    """Sizes up to twice the requests and 512: 1, 2, then 4 and 8, ...; and those up to the requests once more."""
    assert captured_graphs(Use(sequence_tokens=16, batch_size=batch_size)) == graphs


@pytest.mark.parametrize("use", [{"is_eager": True}, {"engine": "transformers"}], ids=["eager", "transformers"])
def test_no_graphs_without_capture(use: dict[str, Any]) -> None:
    assert captured_graphs(Use(sequence_tokens=16, **use)) == 0


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("model", ["gpt2", "opt-1.3b", "tinyllama-1.1b", "llama-3.2-3b", "qwen2.5-7b", "llama-3-8b"])
def test_activations_are_what_the_forward_pass_of_transformers_holds_at_its_peak(model: str) -> None:
    peak_bytes, kv_bytes = forward_peak(SHAPES[model], batch_size=4, tokens=512)
    use = Use(sequence_tokens=512, batch_size=4, engine="transformers")
    assert kv_bytes == needed(model, sequence_tokens=512, batch_size=4, engine="transformers").fullest.kv_bytes
    assert transformers_activation_bytes(SHAPES[model], use) == pytest.approx(peak_bytes - kv_bytes, rel=0.02)


def forward_peak(shape: ModelShape, *, batch_size: int, tokens: int) -> tuple[int, int]:
    """Most bytes that the true model's tensors have at a time, weights aside, and those of its cache: none is real."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = config_of(shape)
    kept = {name: value for name, value in config.items() if name not in ("architectures", "model_type", "torch_dtype")}
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[config["model_type"]](**kept), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        prompts = torch.zeros(batch_size, tokens, dtype=torch.long)
        with live_bytes((*model.parameters(), *model.buffers(), prompts)) as live:
            layers = model(prompts, use_cache=True, logits_to_keep=1).past_key_values.layers
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return live.peak_bytes, kv_bytes


def live_bytes(known: "tuple[torch.Tensor, ...]") -> Any:
    """Counts the bytes of tensors that are made while it is entered, `known` ones aside, as long as they live."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has no types for it
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.bytes = self.peak_bytes = 0
            self.known = [tensor.untyped_storage() for tensor in known]
            self.seen = {storage._cdata for storage in self.known}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else None
                if storage is not None and storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    self.peak_bytes = max(self.peak_bytes, self.bytes)
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
            return result

        def forget(self, key: int, size_bytes: int) -> None:
            self.seen.discard(key)
            self.bytes -= size_bytes

    return Live()


# In all


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_overheads_are_data_with_an_origin(engine: Any) -> None:
    overheads = package_overheads(engine)
    assert all(len(each.origin) > 20 for each in (overheads.context, overheads.nccl, overheads.graph_layer))


RECORDED = Path(__file__).parents[1] / "benchmarks/results/2026-11-21-h100-memory-1.json"


@pytest.mark.parametrize(
    "seen", json.loads(RECORDED.read_text()), ids=lambda row: f"{row['part']}-{row['model']}-{row['batch_size']}"
)
def test_totals_are_those_that_an_h100_showed(seen: dict[str, Any]) -> None:
    """What NVML said of 18 runs of transformers and two engines, which the overheads were read from."""
    is_graphs = seen["part"] == "graphs"
    engine: Any = "transformers" if seen["part"] == "transformers" else "vllm"
    use = Use(sequence_tokens=1024, batch_size=seen["batch_size"], engine=engine, is_eager=not is_graphs)
    found = estimate(SHAPES[seen["model"]], use).fullest
    kv_bytes = seen["said"]["kv_bytes"]  # vLLM's own choice in the run with graphs
    assert found.total_bytes - found.kv_bytes + kv_bytes == pytest.approx(seen["used_bytes"], rel=0.05)
    if engine == "transformers":
        assert found.weights_bytes == seen["parameter_bytes"]
    elif not is_graphs:
        assert (found.kv_bytes, use.batch_size * 64 + 1) == (kv_bytes, seen["blocks"])


def test_freed_memory_that_the_allocator_keeps_grows_with_what_comes_and_goes() -> None:
    use = Use(sequence_tokens=1024, batch_size=8, engine="transformers")
    found = estimate(
        LLAMA, use, overheads=replace(NOTHING_BESIDES, slack=Slack(share=0.25, is_measured=True, origin=""))
    )
    assert found.fullest.slack_bytes == round(0.25 * (found.fullest.kv_bytes + found.fullest.activation_bytes))
    assert estimate(LLAMA, replace(use, engine="vllm")).fullest.slack_bytes == 0


def test_overheads_are_counted_once_a_gpu_and_communication_from_two_on() -> None:
    overheads = Overheads(
        context=Overhead(bytes=10**9, is_measured=True, origin="here"),
        nccl=Overhead(bytes=10**8, is_measured=True, origin="here"),
        graph_layer=Overhead(bytes=1000, is_measured=True, origin="here"),
    )
    use = Use(sequence_tokens=16)
    assert estimate(LLAMA, use, overheads=overheads).fullest.overhead_bytes == 10**9
    assert estimate(LLAMA, use, overheads=overheads).fullest.graph_bytes == 3 * 32 * 1000
    two = estimate(LLAMA, replace(use, gpus=2), overheads=overheads)
    assert [gpu.overhead_bytes for gpu in two.gpus] == [11 * 10**8] * 2


@given(
    batch_size=st.integers(1, 512),
    sequence_tokens=st.integers(1, 8000),
    quantization=st.sampled_from(["fp16", "fp8", "int8", "int4"]),
    engine=st.sampled_from(["vllm", "transformers"]),
)
def test_more_needs_more(batch_size: int, sequence_tokens: int, quantization: Any, engine: Any) -> None:
    use = Use(batch_size=batch_size, sequence_tokens=sequence_tokens, quantization=quantization, engine=engine)
    base = estimate(LLAMA, use).fullest
    assert estimate(LLAMA, replace(use, batch_size=batch_size + 1)).fullest.total_bytes > base.total_bytes
    assert estimate(LLAMA, replace(use, sequence_tokens=sequence_tokens + 16)).fullest.total_bytes > base.total_bytes
    assert estimate(LLAMA, replace(use, quantization="bf16")).fullest.weights_bytes >= base.weights_bytes
    assert estimate(LLAMA, replace(use, gpus=2)).fullest.total_bytes - 10**9 < base.total_bytes


def test_parts_add_up_to_the_total_over_all_gpus() -> None:
    found = needed(gpus=4, batch_size=8)
    assert found.together.total_bytes == 4 * found.fullest.total_bytes
    gpu = found.fullest
    assert gpu.total_bytes == gpu.weights_bytes + gpu.kv_bytes + gpu.activation_bytes


# Bad input


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"batch_size": 0}, "A batch size of 0 is not possible: 1 to 1073741824."),
        ({"batch_size": 10**20}, "A batch size of 100000000000000000000 is not possible: 1 to 1073741824."),
        ({"sequence_tokens": 0}, "A sequence length of 0 is not possible"),
        ({"gpus": 0}, "A number of GPUs of 0 is not possible"),
        ({"max_num_batched_tokens": -1}, "A max_num_batched_tokens of -1 is not possible"),
        ({"quantization": "fp4"}, "The quantization 'fp4' is not known here. Valid: fp16, bf16, fp8, int8, int4."),
        ({"kv_dtype": "int8"}, "The KV dtype 'int8' is not known here. Valid: auto, fp8."),
        ({"engine": "tgi"}, "The engine 'tgi' is not known here. Valid: vllm, transformers."),
        ({"sequence_tokens": 8193}, "llama-3-8b takes 8192 tokens at most, prompt and output together, and 8193 were"),
        ({"gpus": 3}, "llama-3-8b has 32 heads and 8 of keys and values, which do not divide over 3 GPUs."),
        ({"engine": "transformers", "kv_dtype": "fp8"}, "The KV cache of transformers is 16 bit: fp8 needs the"),
        ({"engine": "transformers", "gpus": 33}, "llama-3-8b has 32 layers, too few for 33 GPUs."),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(use: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        needed(**use)
    assert message in str(error.value)


def test_mlp_that_does_not_divide_over_the_gpus_is_refused() -> None:
    shape = replace(LLAMA, intermediate=14337)
    with pytest.raises(UsageError, match=r"The MLP's width of llama-3-8b, 14337, does not divide over 2 GPUs\."):
        estimate(shape, Use(sequence_tokens=16, gpus=2))


# Where it fits


def test_memory_of_a_gpu_is_what_was_observed_or_the_label_less_a_share() -> None:
    assert memory_of(find_spec("h100-sxm-80")) == 81089 * 2**20
    assert memory_of(find_spec("l4")) == int(24 * 2**30 * 0.92)
    assert memory_of(find_spec("a100-sxm-80")) == int(80 * 2**30 * 0.985)


def test_no_observed_gpu_has_less_than_its_label_would_say() -> None:
    observed = [spec for spec in common_gpus() if spec.observed_total_memory_mb is not None]
    assert len(observed) > 5
    for spec in observed:
        assert memory_of(replace(spec, observed_total_memory_mb=None)) <= memory_of(spec) * 1.003, spec.key


def test_gpu_without_a_known_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="The spec table has no memory size for GB300"):
        fits_on(needed(), [find_spec("gb300")])


def test_it_fits_up_to_the_largest_batch_and_not_beyond() -> None:
    found = needed(batch_size=4)
    memory_bytes = memory_of(find_spec("l4"))
    most = largest_batch(found, memory_bytes)
    assert needed(batch_size=most).fullest.total_bytes <= memory_bytes < needed(batch_size=most + 1).fullest.total_bytes


def test_fits_are_in_order_of_memory() -> None:
    l4, h100 = fits_on(needed(batch_size=128), [find_spec("h100-sxm-80"), find_spec("l4")])
    assert (l4.gpu, l4.is_fitting, h100.gpu, h100.is_fitting) == ("L4", False, "H100-SXM-80", True)
    assert 0 < l4.largest_batch < 128 <= h100.largest_batch


def test_model_that_does_not_fit_at_all_has_a_largest_batch_of_0() -> None:
    (fit,) = fits_on(needed("llama-3-70b"), [find_spec("l4")])
    assert (fit.largest_batch, fit.is_fitting) == (0, False)


@pytest.mark.parametrize(
    ("gpu", "quantization", "refusal"),
    [
        ("t4", "bf16", "no bf16 before compute capability 8.0"),
        ("t4", "fp8", None),
        ("t4", "fp16", None),
        ("v100-sxm2-32gb", "int4", "no int4 before compute capability 7.5"),
    ],
)
def test_gpu_that_lacks_the_type_is_no_fit(gpu: str, quantization: Quantization, refusal: str | None) -> None:
    (fit,) = fits_on(needed("gpt2", quantization=quantization), [find_spec(gpu)])
    assert fit.refusal == refusal
    assert fit.is_fitting == (refusal is None)
