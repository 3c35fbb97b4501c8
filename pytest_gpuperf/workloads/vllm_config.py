"""What an engine is asked for: its configuration, checked before anything starts, and as arguments of vLLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads import require_free_memory
from pytest_gpuperf.workloads.model_config import read_config
from pytest_gpuperf.workloads.models import (
    ModelShape,
    has_weights,
    is_model_folder,
    preset_of,
    refuse_uneven_heads,
    shape_of,
)
from pytest_gpuperf.workloads.vllm_environment import (
    DTYPE_BYTES,
    require_cache_fits,
    require_devices,
    require_weights_fit,
)

#: The CPU build would take most of the host's memory for its KV cache.
_CPU_KV_BYTES = 256 * 2**20
#: Fields that are numbers of something.
_COUNTS = (
    "tensor_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
)


class EngineConfig(Record, frozen=True, kw_only=True):
    """What an engine is asked for. Everything is explicit: vLLM's own defaults differ by version and by GPU.

    Attributes:
        model: A preset such as `llama-3-8b`, a folder with a config.json, or a hub id, which stands for real weights.
        dtype: Of weights and activations.
        quantization: Such as `fp8`; `None` for none.
        kv_cache_dtype: `auto` is that of the model.
        max_model_len: Most tokens of a sequence; `None`: the model's own limit.
        max_num_seqs: Most requests in a batch; `None`: vLLM's own default, here and in the next two.
        max_num_batched_tokens: Most tokens in a step; never more than `max_num_seqs` sequences of `max_model_len` hold.
        gpu_memory_utilization: Share of each GPU's memory that vLLM may use.
        kv_cache_memory_bytes: Size of the KV cache on each GPU, instead of what is left.
        num_gpu_blocks_override: The same in blocks.
        enable_prefix_caching: Prompts with the same beginning share its blocks.
        enforce_eager: Without CUDA graphs and compilation.
        load_format: `dummy`: random weights; `None`: `dummy` for presets, and folders that hold no weights, else
            `auto`.
        seed: Of vLLM.
        options: Further arguments of vLLM's EngineArgs.
        environment: Variables that vLLM is started with, where the user has not set them.
    """

    model: str
    dtype: str = "bfloat16"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = 256
    max_num_batched_tokens: int | None = 8192
    gpu_memory_utilization: float | None = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = False
    enforce_eager: bool = False
    load_format: str | None = None
    seed: int = 0
    options: dict[str, object] = msgspec.field(default_factory=dict)
    environment: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The model's short name."""
        preset = preset_of(self.model)
        return Path(self.model).name if preset is None or is_model_folder(self.model) else preset.name

    @property
    def is_remote(self) -> bool:
        """Whether vLLM is to find the model on the hub."""
        is_real = has_weights(self.model) if self.load_format is None else self.load_format != "dummy"
        return is_real and not Path(self.model).exists()


def check_config(config: EngineConfig, devices: Sequence[Device]) -> None:
    """Find what cannot work before anything is started.

    Raises:
        UsageError: An unknown model, a number below 1, a sequence over the model's limit, a doubled argument, a secret.
        NotSupported: Not enough GPUs, or not enough memory for the weights.
    """
    for name in _COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"EngineConfig({name}={value}): at least 1 is needed.")
    if config.gpu_memory_utilization is not None and not 0 < config.gpu_memory_utilization <= 1:
        raise UsageError(f"EngineConfig(gpu_memory_utilization={config.gpu_memory_utilization}) is no share: 0 to 1.")
    if doubled := sorted(set(config.options) & set(EngineConfig.__struct_fields__)):
        raise UsageError(f"EngineConfig(options=...) repeats {doubled[0]!r}, which is a field of its own.")
    _refuse_secrets(config.options)
    shape = _shape(config)
    if shape is not None:
        refuse_uneven_heads(shape, config.tensor_parallel_size)
        if (config.max_model_len or 0) > shape.max_positions:
            raise UsageError(
                f"max_model_len={config.max_model_len} is more than the {shape.max_positions} positions that "
                f"{shape.name} has."
            )
    require_devices(devices, config.tensor_parallel_size)
    if shape is not None:
        _require_room(config, shape, devices[0])


def _require_room(config: EngineConfig, shape: ModelShape, device: Device) -> None:
    """Refuse weights, and a cache of a given size, that do not fit; of quantized ones vLLM alone knows the bytes."""
    if config.quantization is not None or config.dtype not in DTYPE_BYTES or _is_quantized(config.model):
        return
    weights_bytes = shape.parameters * DTYPE_BYTES[config.dtype] / config.tensor_parallel_size
    what = f"{shape.name} in {config.dtype}"
    if device.kind == "cpu":
        require_free_memory(weights_bytes, device=device.device, what=what)
    else:
        require_weights_fit(weights_bytes, device, utilization=config.gpu_memory_utilization or 1.0, what=what)
        require_cache_fits(config.kv_cache_memory_bytes or 0, device, weights_bytes=weights_bytes, what=what)


def _is_quantized(model: str) -> bool:
    """Whether a folder's config.json says so."""
    return is_model_folder(model) and bool(read_config(Path(model) / "config.json").get("quantization_config"))


def _shape(config: EngineConfig) -> ModelShape | None:
    """The model's shape; `None` where only vLLM knows it."""
    if config.is_remote:
        return preset_of(config.model)
    try:
        return shape_of(config.model)
    except UsageError:
        if is_model_folder(config.model):  # of an architecture that vLLM may well know
            return None
        raise


def arguments_of(config: EngineConfig, *, model: str, is_on_gpu: bool) -> dict[str, object]:
    """Arguments of `vllm.LLM` for a configuration.

    Args:
        config: What is asked for.
        model: The folder, or the hub id.
        is_on_gpu: Whether vLLM can size the KV cache by a GPU's memory.
    """
    fields = {name: getattr(config, name) for name in EngineConfig.__struct_fields__}
    own = {
        name: value for name, value in fields.items() if name not in ("options", "environment") and value is not None
    }
    if not is_on_gpu:
        own.setdefault("kv_cache_memory_bytes", _CPU_KV_BYTES)
        own.pop("gpu_memory_utilization", None)
    own.setdefault("load_format", "auto" if has_weights(config.model) else "dummy")
    if (tokens := _step_tokens(config)) is not None:
        own["max_num_batched_tokens"] = tokens
    # prompts are token ids; what the scheduler does is read from the log stats
    return {**own, "model": model, "skip_tokenizer_init": True, "disable_log_stats": False, **config.options}


def _step_tokens(config: EngineConfig) -> int | None:
    """Most tokens of a step that all sequences together can have; `None`: vLLM's own default.

    No step has more, but the warm-up of vLLM 0.26 takes it at its word: it asks attention for longer sequences
    than the block table has room for, and may die of an illegal memory access (benchmarks/llm/RESULTS.md).
    """
    if config.max_num_batched_tokens is None or config.max_num_seqs is None:
        return config.max_num_batched_tokens
    shape = _shape(config) if config.max_model_len is None else None
    longest = config.max_model_len or (shape.max_positions if shape else config.max_num_batched_tokens)
    return min(config.max_num_batched_tokens, config.max_num_seqs * longest)


def with_options(config: EngineConfig, options: Mapping[str, object]) -> EngineConfig:
    """Add further arguments of vLLM, over those that the configuration has."""
    return msgspec.structs.replace(config, options={**config.options, **options})


def _refuse_secrets(options: Mapping[str, object]) -> None:
    """Refuse what would end up in the identity of results, and so in files that are published."""
    if "hf_token" in options:
        raise UsageError("'hf_token' is a secret, and arguments are written into results and baselines. Set HF_TOKEN.")


def check_options(options: Mapping[str, object]) -> None:
    """Refuse further arguments that are fields of EngineConfig, which are each test's own to say, and secrets.

    Raises:
        UsageError: With the first of them.
    """
    _refuse_secrets(options)
    if fields := sorted(set(options) & set(EngineConfig.__struct_fields__)):
        raise UsageError(
            f"{fields[0]!r} is a field of EngineConfig, which each test states itself. "
            "Give further arguments of vLLM, such as disable_custom_all_reduce."
        )


def configuration_of(
    model: str, settings: Mapping[str, object], *, given: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Settings that make two results incomparable where they differ.

    vLLM's version is not among them, nor what it decides by itself: a slower new version is to be caught.

    Args:
        model: Its short name: folders differ between machines.
        settings: Arguments, as vLLM has resolved them, and variables of the environment.
        given: Names of settings that need not be there, by kind: a setting that one of two results lacks is seen by it.
    """
    left_out = {"model", "seed", "skip_tokenizer_init", "disable_log_stats"}
    if "kv_cache_memory_bytes" in settings or "num_gpu_blocks_override" in settings:
        left_out.add("gpu_memory_utilization")  # without effect on the KV cache, which is what it is for
    kept = {name: str(value) or "''" for name, value in settings.items() if name not in left_out}
    names = {kind: ", ".join(names) or "none" for kind, names in given.items()}
    return {"engine": "vllm", "model": model, **kept, **names}
