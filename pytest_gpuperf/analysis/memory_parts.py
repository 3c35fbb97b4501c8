"""Formulas of the parts of a model's memory: weights, KV cache, activations, CUDA graphs. Pure.

Sources: vLLM 0.26 to 0.33 (`vocab_parallel_embedding.py`, `linear.py`, `kv_cache_interface.py`, `VllmConfig`,
`GPUModelRunner.profile_run`), transformers 5 (`DynamicCache`, the forward passes of the models).
"""

import math
from typing import Literal, get_args

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.model_shape import FAMILIES, ModelShape, refuse_uneven_heads

EngineName = Literal["vllm", "transformers"]
Quantization = Literal["fp16", "bf16", "fp8", "int8", "int4"]
KvDtype = Literal["auto", "fp8"]

#: Tokens of a KV block: vLLM's default on GPUs.
BLOCK_TOKENS = 16
#: Rows that vLLM pads the vocabulary to before it is split (DEFAULT_VOCAB_PADDING_SIZE).
_VOCAB_PADDING = 64
#: Weights that share a scale and a zero point in AWQ's and GPTQ's int4.
_GROUP = 128
#: Of requests, tokens and GPUs: more is a slip, and no number for a picture.
_MOST = 2**30
#: Bytes of an activation, a bias, a norm, an embedding: these stay 16 bit.
WIDE = 2


class Use(Record, frozen=True, kw_only=True):
    """How a model is to run.

    Attributes:
        engine: vLLM divides each layer over the GPUs (tensor parallel), transformers places whole layers.
        quantization: Of the matrices of the layers; embedding, head, norms and biases are always 16 bit.
        kv_dtype: `auto` is 16 bit.
        sequence_tokens: Of one request, prompt and output together.
        batch_size: Requests at a time; vLLM's max_num_seqs.
        gpus: That the model is divided over.
        max_num_batched_tokens: Most tokens of one of vLLM's steps.
        is_eager: Without CUDA graphs.

    Raises:
        UsageError: A word that is not known, or a number below 1 or above 2^30.
    """

    sequence_tokens: int
    batch_size: int = 1
    gpus: int = 1
    engine: EngineName = "vllm"
    quantization: Quantization = "bf16"
    kv_dtype: KvDtype = "auto"
    max_num_batched_tokens: int = 8192
    is_eager: bool = False

    def __post_init__(self) -> None:
        _refuse_unknown_words(self)
        _refuse_impossible_numbers(self)


def refuse_impossible(shape: ModelShape, use: Use) -> None:
    """Refuse a use that this model cannot have, whatever the memory.

    Raises:
        UsageError: With the number and the limit.
    """
    if use.sequence_tokens > shape.max_positions:
        raise UsageError(
            f"{shape.name} takes {shape.max_positions} tokens at most, prompt and output together, "
            f"and {use.sequence_tokens} were asked for."
        )
    if use.engine == "vllm":
        _refuse_uneven_split(shape, use.gpus)
    elif use.kv_dtype != "auto":
        raise UsageError(f"The KV cache of transformers is 16 bit: {use.kv_dtype} needs the engine vllm.")
    elif use.gpus > shape.layers:
        raise UsageError(f"{shape.name} has {shape.layers} layers, too few for {use.gpus} GPUs.")


def _refuse_unknown_words(use: Use) -> None:
    for name, value, kind in (
        ("quantization", use.quantization, Quantization),
        ("KV dtype", use.kv_dtype, KvDtype),
        ("engine", use.engine, EngineName),
    ):
        if value not in get_args(kind):
            raise UsageError(f"The {name} {value!r} is not known here. Valid: {', '.join(get_args(kind))}.")


def _refuse_impossible_numbers(use: Use) -> None:
    for name, number in (
        ("batch size", use.batch_size),
        ("sequence length", use.sequence_tokens),
        ("number of GPUs", use.gpus),
        ("max_num_batched_tokens", use.max_num_batched_tokens),
    ):
        if not 1 <= number <= _MOST:
            raise UsageError(f"A {name} of {number} is not possible: 1 to {_MOST}.")


def _refuse_uneven_split(shape: ModelShape, gpus: int) -> None:
    refuse_uneven_heads(shape, gpus)
    for name, width in (("MLP's width", shape.intermediate), ("padded vocabulary", padded_vocab(shape))):
        if width % gpus:
            raise UsageError(f"The {name} of {shape.name}, {width}, does not divide over {gpus} GPUs.")


# Weights


def padded_vocab(shape: ModelShape) -> int:
    """Rows of the embedding under vLLM, which pads to a multiple of 64, on whatever number of GPUs."""
    return -(-shape.vocab // _VOCAB_PADDING) * _VOCAB_PADDING


def matrix_bytes(rows: int, columns: int, quantization: Quantization) -> int:
    """Bytes of one matrix of a layer, with its scales.

    fp8 has one fp32 scale a matrix (vLLM's online fp8), int8 one fp32 scale a row (compressed-tensors, per channel),
    int4 one fp16 scale and one 4-bit zero point for each 128 weights of a row (AWQ): 4.15625 bits a weight.

    Args:
        rows: Outputs.
        columns: Inputs.
        quantization: Of the weights.
    """
    if quantization in ("fp16", "bf16"):
        return rows * columns * 2
    if quantization == "fp8":
        return rows * columns + 4
    if quantization == "int8":
        return rows * columns + 4 * rows
    return math.ceil(rows * columns / 2 + rows * math.ceil(columns / _GROUP) * 2.5)


def layer_bytes(shape: ModelShape, quantization: Quantization, tensor_parallel: int = 1) -> int:
    """Bytes of one layer on one GPU: what is wide is divided, what is as wide as the residual stream is on each GPU.

    Keys and values of heads that several GPUs share are on each of them (vLLM's QKVParallelLinear).
    """
    hidden, width = shape.hidden, shape.intermediate // tensor_parallel
    query = shape.heads // tensor_parallel * shape.head_dim
    qkv = query + 2 * max(1, shape.kv_heads // tensor_parallel) * shape.head_dim
    up = width * (2 if shape.is_gated else 1)
    matrices = ((qkv, hidden), (hidden, query), (up, hidden), (hidden, width))
    family = FAMILIES[shape.architecture]
    biases = family.has_qkv_bias * qkv + family.has_output_bias * (width + 2 * hidden)
    wide = biases + 2 * shape.final_norm_parameters
    return wide * WIDE + sum(matrix_bytes(rows, columns, quantization) for rows, columns in matrices)


def vllm_weight_bytes(shape: ModelShape, use: Use) -> int:
    """Bytes on one GPU: vocabulary padded and divided; positions, norms and the rotary table on each GPU."""
    vocabulary = padded_vocab(shape) // use.gpus * shape.hidden
    positions = shape.embedding_parameters - shape.vocab * shape.hidden
    rotary = shape.max_positions * shape.head_dim if FAMILIES[shape.architecture].has_rope else 0
    wide = vocabulary * (1 if shape.is_tied else 2) + positions + shape.final_norm_parameters + rotary
    return wide * WIDE + shape.layers * layer_bytes(shape, use.quantization, use.gpus)


# KV cache


def kv_element_bytes(use: Use) -> int:
    """Bytes of one number of a key or value."""
    return 1 if use.kv_dtype == "fp8" else WIDE


def kv_tokens(shape: ModelShape, use: Use) -> int:
    """Tokens of a request that the cache has room for: whole blocks in vLLM; what a sliding window looks back at."""
    window = shape.sliding_window or use.sequence_tokens
    if use.engine == "transformers":
        return min(use.sequence_tokens, window)
    kept = min(use.sequence_tokens, window - 1 + use.max_num_batched_tokens)  # SlidingWindowSpec
    return math.ceil(kept / BLOCK_TOKENS) * BLOCK_TOKENS


def kv_blocks(shape: ModelShape, use: Use) -> int:
    """Blocks that vLLM needs for the whole batch: full ones for each request, and the null block that holds nothing."""
    return use.batch_size * kv_tokens(shape, use) // BLOCK_TOKENS + 1


def kv_cache_memory_bytes(shape: ModelShape, use: Use) -> int:
    """vLLM's `kv_cache_memory_bytes`, which is each GPU's, by which it makes exactly `kv_blocks`.

    A block has 2 x layers x KV heads of the GPU x head width x 16 tokens x element (vLLM's AttentionSpec).
    """
    per_token = shape.kv_bytes_per_token(kv_element_bytes(use), tensor_parallel=use.gpus)
    return kv_blocks(shape, use) * BLOCK_TOKENS * per_token


# Activations and CUDA graphs


def vllm_activation_bytes(shape: ModelShape, use: Use) -> int:
    """Peak of vLLM's profile run: one forward pass of max_num_batched_tokens, then the sampler over max_num_seqs.

    Forward, at the activation of the MLP: the outputs of gate and up (or of the one matrix) and of the activation,
    divided over the GPUs, and seven tensors as wide as the residual stream. The seven are counted from a log: vLLM 0.26
    says 1.181 GB of Llama-3-8B with 8192 tokens, this formula 1.174 GB.
    Sampler: the stream, and the logits of each request over the whole vocabulary, 16 bit and a copy in fp32.
    """
    tokens = use.max_num_batched_tokens
    wide = (3 if shape.is_gated else 2) * shape.intermediate // use.gpus
    forward = tokens * (wide + 7 * shape.hidden) * WIDE
    logits = min(use.batch_size, tokens) * padded_vocab(shape) * (WIDE + 4)
    return max(forward, tokens * shape.hidden * WIDE + logits)


def transformers_activation_bytes(shape: ModelShape, use: Use) -> int:
    """Peak of generate(): the MLP of the last layer when the whole batch's prompts are read at once.

    Counted on transformers 5: three tensors of the MLP's width (gated), two (OPT's relu), four (GPT-2's gelu in single
    operations), and four as wide as the residual stream, five in GPT-2. Then the logits of the last token, 16 bit and
    a copy in fp32.
    """
    tokens = use.batch_size * use.sequence_tokens
    is_gpt2 = shape.architecture == "GPT2LMHeadModel"
    wide = 3 if shape.is_gated else 4 if is_gpt2 else 2
    forward = tokens * (wide * shape.intermediate + (5 if is_gpt2 else 4) * shape.hidden) * WIDE
    return max(forward, tokens * shape.hidden * WIDE + use.batch_size * shape.vocab * (WIDE + 4))


def captured_graphs(use: Use) -> int:
    """Graphs that vLLM captures: each size once in pieces, and once more whole where it can be a decode step.

    Sizes are 1, 2, 4, each 8 up to 256, each 16 up to twice max_num_seqs, 512 at most (VllmConfig).
    """
    if use.is_eager or use.engine != "vllm":
        return 0
    largest = min(2 * use.batch_size, 512, use.max_num_batched_tokens)
    sizes = [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if size <= largest]
    decode_sizes = [size for size in sizes if size <= use.batch_size]
    return len(sizes) + len(decode_sizes)
