"""What a model needs of the memory of each GPU: its parts, and overheads that are data with their origin. Pure."""

import functools
import importlib.resources

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.analysis.memory_parts import (
    WIDE,
    EngineName,
    KvDtype,
    Quantization,
    Use,
    captured_graphs,
    kv_blocks,
    kv_cache_memory_bytes,
    kv_element_bytes,
    kv_tokens,
    layer_bytes,
    refuse_impossible,
    transformers_activation_bytes,
    vllm_activation_bytes,
    vllm_weight_bytes,
)
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.model_shape import ModelShape

__all__ = [
    "EngineName",
    "Estimate",
    "GpuMemory",
    "KvDtype",
    "Overhead",
    "Overheads",
    "Quantization",
    "Slack",
    "Use",
    "estimate",
    "package_overheads",
]


class Overhead(Record, frozen=True, kw_only=True):
    """A number of bytes that no formula gives.

    Attributes:
        origin: Where it was measured, with which version and GPU; or that it is an estimate, and of what.
    """

    bytes: int
    is_measured: bool
    origin: str


class Slack(Record, frozen=True, kw_only=True):
    """What torch's allocator keeps of memory that was freed, because the next request for it is larger.

    Attributes:
        share: Of what comes and goes: KV cache that grows token by token, and activations.
        origin: See `Overhead`.
    """

    share: float
    is_measured: bool
    origin: str


class Overheads(Record, frozen=True, kw_only=True):
    """What an engine takes besides weights, KV cache and activations.

    Attributes:
        context: CUDA context, loaded kernels and workspaces, each GPU.
        nccl: For communication, each GPU, from two GPUs on.
        graph_layer: One captured CUDA graph of one layer.
        slack: None where the cache is set aside at the beginning.
    """

    context: Overhead
    nccl: Overhead
    graph_layer: Overhead
    slack: Slack | None = None


class GpuMemory(Record, frozen=True, kw_only=True):
    """Bytes on one GPU, by what they are for."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    slack_bytes: int = 0
    graph_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return int(sum(getattr(self, name) for name in self.__struct_fields__))


class Estimate(Record, frozen=True, kw_only=True):
    """What a model needs when it is used so.

    Attributes:
        gpus: Each GPU's memory.
        kv_bytes_per_token: On one GPU under vLLM; on all together under transformers.
        kv_bytes_per_request: Of one request, on all GPUs together.
        kv_blocks: Of vLLM's cache on each GPU, with the one that it keeps for itself; `None` under transformers.
        overheads: That were counted in.
    """

    shape: ModelShape
    use: Use
    gpus: tuple[GpuMemory, ...]
    kv_bytes_per_token: int
    kv_bytes_per_request: int
    kv_blocks: int | None
    overheads: Overheads

    @property
    def fullest(self) -> GpuMemory:
        """The GPU that needs the most."""
        return max(self.gpus, key=lambda gpu: gpu.total_bytes)

    @property
    def together(self) -> GpuMemory:
        """All GPUs together."""
        return GpuMemory(**{name: sum(getattr(gpu, name) for gpu in self.gpus) for name in GpuMemory.__struct_fields__})


@functools.cache
def package_overheads(engine: EngineName) -> Overheads:
    """Read what the package knows of an engine's overhead, once."""
    data = importlib.resources.files("pytest_gpuperf").joinpath("data", "memory_overheads.json").read_bytes()
    return msgspec.convert(msgspec.json.decode(data)[engine], Overheads)


def estimate(shape: ModelShape, use: Use, *, overheads: Overheads | None = None) -> Estimate:
    """Work out what a model needs on each GPU.

    Args:
        shape: Of the model.
        use: How it is to run.
        overheads: Of the engine; default: the package's.

    Raises:
        UsageError: A sequence over the model's limit, or a model that does not divide over the GPUs.
    """
    refuse_impossible(shape, use)
    overheads = overheads or package_overheads(use.engine)
    split = _vllm_gpus if use.engine == "vllm" else _transformers_gpus
    gpus = split(shape, use, overheads)
    tensor_parallel = use.gpus if use.engine == "vllm" else 1
    per_token = shape.kv_bytes_per_token(kv_element_bytes(use), tensor_parallel=tensor_parallel)
    return Estimate(
        shape=shape,
        use=use,
        gpus=gpus,
        kv_bytes_per_token=per_token,
        kv_bytes_per_request=per_token * tensor_parallel * kv_tokens(shape, use),
        kv_blocks=kv_blocks(shape, use) if use.engine == "vllm" else None,
        overheads=overheads,
    )


def _vllm_gpus(shape: ModelShape, use: Use, overheads: Overheads) -> tuple[GpuMemory, ...]:
    rank = GpuMemory(
        weights_bytes=vllm_weight_bytes(shape, use),
        kv_bytes=kv_cache_memory_bytes(shape, use),
        activation_bytes=vllm_activation_bytes(shape, use),
        graph_bytes=captured_graphs(use) * shape.layers * overheads.graph_layer.bytes,
        overhead_bytes=overheads.context.bytes + (use.gpus > 1) * overheads.nccl.bytes,
    )
    return (rank,) * use.gpus


def _transformers_gpus(shape: ModelShape, use: Use, overheads: Overheads) -> tuple[GpuMemory, ...]:
    """Whole layers on each GPU, the embedding on the first, the head on the last: a tied one once more."""
    last = use.gpus - 1
    head = shape.vocab * shape.hidden
    gpus: list[GpuMemory] = []
    for i in range(use.gpus):
        layers = shape.layers * (i + 1) // use.gpus - shape.layers * i // use.gpus
        wide = shape.embedding_parameters if i == 0 else 0
        wide += shape.final_norm_parameters if i == last else 0
        wide += head if i == last and (last or not shape.is_tied) else 0
        kv = replace(shape, layers=layers).kv_bytes_per_token(WIDE) * use.batch_size * kv_tokens(shape, use)
        activations = transformers_activation_bytes(shape, use)
        gpus.append(
            GpuMemory(
                weights_bytes=wide * WIDE + layers * layer_bytes(shape, use.quantization),
                kv_bytes=kv,
                activation_bytes=activations,
                slack_bytes=round((kv + activations) * overheads.slack.share) if overheads.slack else 0,
                graph_bytes=0,
                overhead_bytes=overheads.context.bytes,
            )
        )
    return tuple(gpus)
