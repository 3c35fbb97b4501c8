"""A transformers model with its weights in place: drawn on the device, or read from a checkpoint."""

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpuperf.errors import NotSupported, UsageError
from pytest_gpuperf.workloads.models import (
    ModelShape,
    config_of,
    has_weights,
    preset_of,
    shape_from_config,
    shape_of,
)
from pytest_gpuperf.workloads.placement import Part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def load_config(model: str) -> "PreTrainedConfig":
    """Make the configuration of a model that gets random weights, or read a checkpoint's.

    Raises:
        UsageError: An unknown model, or a checkpoint that cannot be read.
        NotSupported: Quantized weights, which are other work and other bytes than those of the shape.
    """
    from transformers import AutoConfig

    if not has_weights(model):
        return AutoConfig.for_model(**config_of(shape_of(model)))
    if Path(model).is_dir():
        shape_of(model)  # whose messages name the field
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:  # ValueError: a model_type that transformers does not know
        raise _unloadable(model, error) from None
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise NotSupported(
            f"The weights of {model!r} are quantized ({method}), which Generator does not run: measure them with vLLM."
        )
    return config


def shape_of_config(model: str, config: "PreTrainedConfig") -> ModelShape:
    """Find the shape of what `load_config` gave.

    Raises:
        UsageError: An architecture that is not known here.
    """
    if Path(model).is_dir() or preset_of(model) is not None:
        return shape_of(model)
    return shape_from_config(config.to_dict(), name=model.rpartition("/")[2], place=f"config.json of {model}")


def skeleton_of(config: "PreTrainedConfig", dtype: str) -> "PreTrainedModel":
    """Make a model without memory behind its weights. Its buffers are real: an emptied inv_freq would stay garbage."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.tie_weights()
    return model


def draw_weights(model: "PreTrainedModel", parts: Sequence[Part]) -> "PreTrainedModel":
    """Give every weight of a skeleton its memory and its values, on its device.

    A head that shares the embedding of the other device gets a copy of it.
    """
    import torch
    from accelerate import dispatch_model

    empty = dict(model.named_parameters(remove_duplicate=False))
    first_names: dict[int, str] = {}  # of tensors that modules share
    for part in parts:
        made: dict[str, torch.nn.Parameter] = {}
        prefixes = tuple(f"{module}." for module in part.modules)
        for name in (name for name in empty if name.startswith(prefixes)):
            first = first_names.setdefault(id(empty[name]), name)
            if first not in made:
                made[first] = _drawn(empty[name], first, part.device)
            module, _, key = name.rpartition(".")
            model.get_submodule(module).register_parameter(key, made[first])
    if len(parts) == 1:
        return model.to(parts[0].device)  # the buffers: the weights are there
    dispatched: PreTrainedModel = dispatch_model(
        model,
        {name: part.device for part in parts for name in part.modules},
        main_device=parts[0].device,
        skip_keys=model._skip_keys_device_placement,  # noqa: SLF001 - or the KV cache is moved with every layer
        force_hooks=True,
    )
    return dispatched


def _drawn(empty: "torch.nn.Parameter", name: str, device: str) -> "torch.nn.Parameter":
    """Values around 0, or around 1 for the scale of a norm; seeded by the name, so that a split changes nothing."""
    import torch

    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(empty.shape, dtype=empty.dtype, device=device)
    is_scale = empty.ndim == 1 and name.endswith(".weight")
    values.normal_(mean=1.0 if is_scale else 0.0, std=0.02, generator=generator)
    return torch.nn.Parameter(values, requires_grad=False)


def read_weights(model: str, parts: Sequence[Part], dtype: str) -> "PreTrainedModel":
    """Load a checkpoint, each weight onto its device.

    Raises:
        UsageError: It cannot be loaded, or lacks weights, which would be drawn.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            device_map={name: part.device for part in parts for name in part.modules},
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise _unloadable(model, error) from None
    if missing := sorted(found["missing_keys"]):
        raise UsageError(f"The model {model!r} lacks {len(missing)} of its weights, such as {missing[0]}.")
    complete: PreTrainedModel = loaded
    copy_shared(complete, parts)
    return complete


def copy_shared(model: "PreTrainedModel", parts: Sequence[Part]) -> None:
    """Give each part its own copy of a tensor that it shares with another, as `split` has counted.

    accelerate ties them again, all on one device (`retie_parameters` in its `dispatch_model`).
    """
    import torch

    held = [_parameters_of(model, part) for part in parts]
    owners = Counter(key for ids in ({id(one) for one in parameters.values()} for parameters in held) for key in ids)
    kept: set[int] = set()
    for part, parameters in zip(parts, held, strict=True):
        shared = {name: one for name, one in parameters.items() if owners[id(one)] > 1}
        made = {id(one): one for one in shared.values() if str(one.device) == part.device and id(one) not in kept}
        kept |= made.keys()
        for name, one in shared.items():
            if id(one) not in made:
                made[id(one)] = torch.nn.Parameter(one.detach().to(part.device, copy=True), requires_grad=False)
            module, _, key = name.rpartition(".")
            model.get_submodule(module).register_parameter(key, made[id(one)])


def _parameters_of(model: "PreTrainedModel", part: Part) -> "dict[str, torch.nn.Parameter]":
    """Name -> parameter of all modules of a part; a shared one under each of its names."""
    return {
        name: parameter
        for module in part.modules
        for name, parameter in model.get_submodule(module).named_parameters(module, remove_duplicate=False)
    }


def _unloadable(model: str, error: Exception) -> UsageError:
    return UsageError(f"The model {model!r} cannot be loaded: {str(error).strip().splitlines()[0]}")
