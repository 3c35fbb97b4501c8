"""What a step of a language model has to compute and to move: FLOP and bytes, from the model's shape. Pure.

2 FLOP for each weight and token, as in Kaplan et al., "Scaling Laws for Neural Language Models" (2020), section 2.1,
and attention beside. Bytes are weights, keys and values; activations stay in caches, for the most part.
"""

import math
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.analysis.roofline import Ceilings
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.model_shape import ModelShape

Phase = Literal["prefill", "decode"]


class ModelStep(Record, frozen=True, kw_only=True):
    """One step of a model: all prompts are read, or one token of each request is produced.

    Attributes:
        shape: Of the model.
        phase: Reading or producing.
        batch_size: Requests.
        tokens: Of a request: of its prompt when reading, so far when producing.
        weight_bytes: Of one weight.
        kv_element_bytes: Of one number of a key or a value.
        passes: In which the prompts are read: each reads all weights.
    """

    shape: ModelShape
    phase: Phase
    batch_size: int
    tokens: int
    weight_bytes: float = 2.0
    kv_element_bytes: float = 2.0
    passes: int = 1

    @property
    def new_tokens(self) -> int:
        """That go through the layers, of all requests."""
        return self.batch_size * (self.tokens if self.phase == "prefill" else 1)

    @property
    def flop(self) -> float:
        """Of all layers for the new tokens, of attention to those before, and of the head for one token a request."""
        shape = self.shape
        layers = 2.0 * shape.layers * (shape.attention_parameters + shape.mlp_parameters) * self.new_tokens
        head = 2.0 * shape.vocab * shape.hidden * self.batch_size
        attention = 4.0 * shape.layers * shape.heads * shape.head_dim * self.batch_size * self._pairs
        return layers + head + attention

    @property
    def weights_bytes(self) -> float:
        """All layers and the head, once a pass; of the embedding only a few rows are read, which is left out."""
        shape = self.shape
        read = shape.layers * shape.layer_parameters + shape.final_norm_parameters + shape.vocab * shape.hidden
        return read * self.weight_bytes * self.passes

    @property
    def kv_bytes(self) -> float:
        """Keys and values: those of the tokens before are read, new ones are written (and read, of a prompt)."""
        read = min(self.tokens, self.shape.sliding_window or self.tokens)
        moved = 2 * self.tokens if self.phase == "prefill" else read + 1
        return float(self.batch_size * moved * self.shape.kv_bytes_per_token(self.kv_element_bytes))

    @property
    def bytes_moved(self) -> float:
        """Weights, keys and values."""
        return self.weights_bytes + self.kv_bytes

    @property
    def _pairs(self) -> float:
        """Pairs of a token and one that it looks at, of one request."""
        window = self.shape.sliding_window or self.tokens
        if self.phase == "decode":
            return min(self.tokens, window)
        late = max(self.tokens - window, 0)
        early = self.tokens - late
        return early * (early + 1) / 2 + late * window

    def least_s(self, ceilings: Ceilings) -> float | None:
        """Time of a step that reaches the roof; `None` without one."""
        if not (ceilings.flops_per_s and ceilings.bandwidth_bytes_per_s):
            return None
        return max(self.flop / ceilings.flops_per_s, self.bytes_moved / ceilings.bandwidth_bytes_per_s)

    def at(self, batch_size: int) -> "ModelStep":
        """The same step of another number of requests."""
        return replace(self, batch_size=batch_size)


def ridge_batch(step: ModelStep, ceilings: Ceilings) -> int | None:
    """Find the smallest batch whose step computes for as long as it moves bytes.

    Returns:
        `None` if there is none: keys and values of each request may alone take longer than its computation.
    """
    if not (ceilings.flops_per_s and ceilings.bandwidth_bytes_per_s):
        return None
    one, two = step.at(1), step.at(2)
    flop, moved = one.flop, two.kv_bytes - one.kv_bytes
    gained_s = flop / ceilings.flops_per_s - moved / ceilings.bandwidth_bytes_per_s
    if gained_s <= 0:
        return None
    return max(math.ceil(step.weights_bytes / ceilings.bandwidth_bytes_per_s / gained_s), 1)


def largest_batch(step: ModelStep, memory_bytes: int, *, share: float = 0.9) -> int:
    """Count the requests whose keys and values fit beside the weights; those of now at least.

    Args:
        step: Its tokens are what each request keeps.
        memory_bytes: Of the device.
        share: Of it that may be used.
    """
    weights_bytes = step.shape.parameters * step.weight_bytes
    request_bytes = step.tokens * step.shape.kv_bytes_per_token(step.kv_element_bytes)
    return max(int((share * memory_bytes - weights_bytes) / request_bytes), step.batch_size)
