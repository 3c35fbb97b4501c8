"""Between a model's shape and its config.json, as transformers and vLLM read it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.workloads.model_shape import FAMILIES, SIZES, Family, ModelShape


def read_config(file: Path) -> Mapping[str, object]:
    """Read the fields of a config.json.

    Raises:
        UsageError: It cannot be read, or is no object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{file} holds {type(config).__name__}, not an object of fields.")
    return config


def shape_from_config(config: Mapping[str, object], *, name: str, place: str) -> ModelShape:
    """Read a shape from the fields of a config.json.

    Args:
        config: Its fields.
        name: Of the model.
        place: The file, for messages.

    Raises:
        UsageError: A field is missing or has no sense; an architecture or a variant that is not known here.
    """
    architecture = _architecture(config, place)
    family = FAMILIES[architecture]
    for key, value in family.fixed.items():
        if config.get(key, value) != value:
            raise UsageError(f"{place}: {key}={config[key]!r} of {architecture} is not known here, only {value!r}.")
    theta, scaling = _rope(config, place) if family.has_rope else (None, None)
    return ModelShape(
        name=name,
        architecture=architecture,
        **_sizes(config, family, place),
        is_tied=_is_tied(config, family, place),
        sliding_window=_whole(config, "sliding_window", place) if family.model_type == "mistral" else None,
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _sizes(config: Mapping[str, object], family: Family, place: str) -> dict[str, int]:
    """The whole numbers, with what the architecture takes for those that may be left out."""
    given = {size: _whole(config, key, place) for size, key in family.keys.items()}
    hidden, heads = given["hidden"], given["heads"]
    if hidden is not None and heads is not None:
        if given.get("head_dim") is None and hidden % heads:
            raise UsageError(f"{place}: {family.keys['hidden']}={hidden} does not divide into {heads} heads.")
        given["kv_heads"] = kv_heads = given.get("kv_heads") or heads
        given["head_dim"] = given.get("head_dim") or hidden // heads
        if heads % kv_heads:
            raise UsageError(f"{place}: {heads} heads do not share {kv_heads} of keys and values evenly.")
    if family.model_type == "gpt2" and hidden is not None:
        given["intermediate"] = given["intermediate"] or 4 * hidden  # GPT2Config: n_inner=None
    if family.model_type == "opt" and config.get("word_embed_proj_dim", hidden) != hidden:
        raise UsageError(f"{place}: a word_embed_proj_dim other than hidden_size (opt-350m) is not known here.")
    missing = [family.keys.get(size, size) for size in SIZES if given.get(size) is None]
    if missing:
        raise UsageError(f"{place} lacks {', '.join(missing)}: the size of the model depends on it.")
    return {size: given[size] or 0 for size in SIZES}


def _architecture(config: Mapping[str, object], place: str) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        raise UsageError(f"{place} lacks 'architectures'. Known: {', '.join(FAMILIES)}.")
    if not isinstance(named[0], str) or named[0] not in FAMILIES:
        raise UsageError(
            f"{place}: the architecture {named[0]!r} is not known here, and its size is not guessed. "
            f"Known: {', '.join(FAMILIES)}."
        )
    return named[0]


def _whole(config: Mapping[str, object], key: str, place: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{place}: {key}={value!r} is not a whole number, 1 or more.")
    return value


def _is_tied(config: Mapping[str, object], family: Family, place: str) -> bool:
    tied = config.get("tie_word_embeddings", family.is_tied)
    if not isinstance(tied, bool | None):
        raise UsageError(f"{place}: tie_word_embeddings={tied!r} is neither true nor false.")
    return bool(tied)


def _rope(config: Mapping[str, object], place: str) -> tuple[float, dict[str, int | float | str] | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` before it."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    parameters = config.get(key) or {}
    if not isinstance(parameters, dict):
        raise UsageError(f"{place}: {key}={parameters!r} is not an object of fields.")
    scaling = dict(parameters)
    theta = scaling.pop("rope_theta", None)
    theta = config.get("rope_theta") if theta is None else theta
    theta = 10000.0 if theta is None else theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise UsageError(f"{place}: rope_theta={theta!r} is not a number above zero.")
    is_plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    return float(theta), None if is_plain else scaling


def config_of(shape: ModelShape) -> dict[str, object]:
    """Make the config.json by which transformers and vLLM build exactly this model."""
    family = FAMILIES[shape.architecture]
    config: dict[str, object] = {
        "architectures": [shape.architecture],
        "model_type": family.model_type,
        "torch_dtype": "bfloat16",
        **{key: getattr(shape, field) for field, key in family.keys.items()},
        **family.fixed,
        **family.constants,
        "tie_word_embeddings": shape.is_tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.has_rope:
        scaling = None if shape.rope_scaling is None else dict(shape.rope_scaling)  # transformers adds to it
        config |= {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
    if family.model_type == "opt":
        config["word_embed_proj_dim"] = shape.hidden
    if family.model_type == "mistral":
        config["sliding_window"] = shape.sliding_window
    return config
