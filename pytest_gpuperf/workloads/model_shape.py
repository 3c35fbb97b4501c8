"""The true shape of a decoder-only transformer, and its exact number of parameters."""

import math

import msgspec

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record


class Family(Record, frozen=True, kw_only=True):
    """What all models of an architecture share.

    Attributes:
        model_type: In config.json.
        is_tied: Whether the head shares the embedding where config.json does not say.
        is_gated: An MLP of three matrices (gate, up, down), not two.
        has_rope: Rotary positions, not a learned table.
        position_rows: Rows of the learned table beyond `max_positions`.
        norm_vectors: 1 for RMSNorm (weight), 2 for LayerNorm (weight and bias).
        has_qkv_bias: Of the three projections into attention.
        has_output_bias: Of attention's output projection and of the MLP.
        keys: Our field -> key of config.json.
        fixed: Keys of config.json whose other values are another shape, which is not counted here.
        constants: Keys of config.json with no influence on size or speed.
    """

    model_type: str
    is_tied: bool
    is_gated: bool
    has_rope: bool
    position_rows: int = 0
    norm_vectors: int
    has_qkv_bias: bool
    has_output_bias: bool
    keys: dict[str, str]
    fixed: dict[str, object] = msgspec.field(default_factory=dict)
    constants: dict[str, object] = msgspec.field(default_factory=dict)


_LLAMA_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
#: The whole numbers of a shape.
SIZES = tuple(_LLAMA_KEYS)
_OPT_KEYS = {name: key for name, key in _LLAMA_KEYS.items() if name not in ("kv_heads", "head_dim")}
_GPT2_KEYS = {
    "layers": "n_layer",
    "hidden": "n_embd",
    "heads": "n_head",
    "intermediate": "n_inner",
    "vocab": "vocab_size",
    "max_positions": "n_positions",
}
_LLAMA = Family(
    model_type="llama",
    is_tied=False,
    is_gated=True,
    has_rope=True,
    norm_vectors=1,
    has_qkv_bias=False,
    has_output_bias=False,
    keys=_LLAMA_KEYS,
    fixed={"attention_bias": False, "mlp_bias": False},
    constants={"hidden_act": "silu", "rms_norm_eps": 1e-5},
)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": msgspec.structs.replace(_LLAMA, model_type="mistral", fixed={}),
    "Qwen2ForCausalLM": msgspec.structs.replace(
        _LLAMA,
        model_type="qwen2",
        has_qkv_bias=True,
        fixed={"use_sliding_window": False},
        constants={"hidden_act": "silu", "rms_norm_eps": 1e-6},
    ),
    "GPT2LMHeadModel": Family(
        model_type="gpt2",
        is_tied=True,
        is_gated=False,
        has_rope=False,
        norm_vectors=2,
        has_qkv_bias=True,
        has_output_bias=True,
        keys=_GPT2_KEYS,
        fixed={"add_cross_attention": False},
        constants={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    ),
    "OPTForCausalLM": Family(
        model_type="opt",
        is_tied=True,
        is_gated=False,
        has_rope=False,
        position_rows=2,  # OPTLearnedPositionalEmbedding: positions start at 2
        norm_vectors=2,
        has_qkv_bias=True,
        has_output_bias=True,
        keys={**_OPT_KEYS, "intermediate": "ffn_dim"},
        fixed={"enable_bias": True, "layer_norm_elementwise_affine": True, "do_layer_norm_before": True},
        constants={"activation_function": "relu"},
    ),
}


class ModelShape(Record, frozen=True, kw_only=True):
    """A decoder-only transformer, as far as its size and speed depend on it.

    Attributes:
        name: Of the preset, such as `llama-3-8b`, or of the folder.
        architecture: As config.json names it: `LlamaForCausalLM`, `GPT2LMHeadModel`, ...
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Of the queries.
        kv_heads: Of keys and values; fewer than `heads` under grouped-query attention.
        head_dim: Width of one head.
        intermediate: Width of the MLP.
        vocab: Rows of the embedding.
        max_positions: Tokens that a sequence may have, prompt and output together.
        is_tied: The head shares the embedding.
        sliding_window: Tokens that a layer looks back at most, or `None`.
        rope_theta: Base of the rotary frequencies, or `None` for learned positions.
        rope_scaling: As in config.json, or `None`.
    """

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    is_tied: bool
    sliding_window: int | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, int | float | str] | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, exactly; a tied head is counted once."""
        return (
            self.embedding_parameters
            + self.layers * self.layer_parameters
            + self.final_norm_parameters
            + self.head_parameters
        )

    @property
    def embedding_parameters(self) -> int:
        """Tokens, and learned positions where the architecture has them."""
        family = FAMILIES[self.architecture]
        position_rows = 0 if family.has_rope else self.max_positions + family.position_rows
        return (self.vocab + position_rows) * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer: its attention, its MLP and its two norms."""
        return self.attention_parameters + self.mlp_parameters + 2 * self.final_norm_parameters

    @property
    def attention_parameters(self) -> int:
        """Of one layer: the projections to queries, keys, values and back."""
        family = FAMILIES[self.architecture]
        query_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (2 * query_width + 2 * kv_width)
        biases = family.has_qkv_bias * (query_width + 2 * kv_width) + family.has_output_bias * self.hidden
        return weights + biases

    @property
    def mlp_parameters(self) -> int:
        """Of one layer: two matrices, or three where the MLP is gated."""
        family = FAMILIES[self.architecture]
        weights = (3 if family.is_gated else 2) * self.hidden * self.intermediate
        return weights + family.has_output_bias * (self.intermediate + self.hidden)

    @property
    def final_norm_parameters(self) -> int:
        """Of one norm: the last, and each of a layer's two."""
        return FAMILIES[self.architecture].norm_vectors * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the output projection; 0 where it is the embedding itself."""
        return 0 if self.is_tied else self.vocab * self.hidden

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has three matrices (gate, up, down), not two."""
        return FAMILIES[self.architecture].is_gated

    def kv_bytes_per_token(self, element_bytes: float, *, tensor_parallel: int = 1) -> int:
        """Bytes of keys and values of one token in all layers, on one GPU.

        2 x layers x KV heads of the rank x head width x element; a rank holds at least one head, which ranks then share
        (vLLM's ModelConfig.get_num_kv_heads).

        Args:
            element_bytes: 2 for bfloat16, 1 for fp8.
            tensor_parallel: GPUs that share the heads.

        Raises:
            UsageError: The heads cannot be divided so.
        """
        refuse_uneven_heads(self, tensor_parallel)
        heads_of_rank = max(1, self.kv_heads // tensor_parallel)
        return math.ceil(2 * self.layers * heads_of_rank * self.head_dim * element_bytes)


def refuse_uneven_heads(shape: ModelShape, tensor_parallel: int) -> None:
    """Refuse a number of GPUs that the heads cannot be divided over (vLLM's ModelConfig.verify_with_parallel_config).

    Raises:
        UsageError: With both numbers.
    """
    if tensor_parallel < 1:
        raise UsageError(f"A tensor-parallel size of {tensor_parallel} is not a number of GPUs, 1 or more.")
    if shape.heads % tensor_parallel or (shape.kv_heads % tensor_parallel and tensor_parallel % shape.kv_heads):
        raise UsageError(
            f"{shape.name} has {shape.heads} heads and {shape.kv_heads} of keys and values, "
            f"which do not divide over {tensor_parallel} GPUs."
        )
