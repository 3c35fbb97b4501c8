"""Which model: a preset, a folder with a config.json, or a hub id of one of the presets."""

import functools
import importlib.resources
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.model_config import config_of, read_config, shape_from_config
from pytest_gpuperf.workloads.model_shape import ModelShape, refuse_uneven_heads

__all__ = [
    "ModelShape",
    "Preset",
    "config_of",
    "has_weights",
    "is_hub_id",
    "is_model_folder",
    "model_folder",
    "preset_of",
    "preset_table",
    "presets",
    "refuse_uneven_heads",
    "shape_from_config",
    "shape_of",
    "stored_quantization",
]


class Preset(Record, frozen=True, kw_only=True):
    """A row of data/models.json.

    Attributes:
        shape: Its name is the preset's.
        hub_ids: Names of checkpoints of this very shape on the hub; the first is where the shape was read.
        published_parameters: Count that the shape must reproduce.
        source: Where the count was read.
    """

    shape: ModelShape
    hub_ids: tuple[str, ...]
    published_parameters: int
    source: str


class _Table(Record, frozen=True, kw_only=True):
    models: tuple[Preset, ...]


@functools.cache
def preset_table() -> tuple[Preset, ...]:
    """Read data/models.json, once."""
    data = importlib.resources.files("pytest_gpuperf").joinpath("data", "models.json").read_bytes()
    return msgspec.json.decode(data, type=_Table).models


def presets() -> Mapping[str, ModelShape]:
    """Name of every preset -> its shape."""
    return {preset.shape.name: preset.shape for preset in preset_table()}


def preset_of(model: str) -> ModelShape | None:
    """Find a preset by its name or by a hub id of its shape, whatever the case; `None` where there is none."""
    wanted = model.casefold()
    for preset in preset_table():
        if wanted in (preset.shape.name.casefold(), *(hub_id.casefold() for hub_id in preset.hub_ids)):
            return preset.shape
    return None


def shape_of(model: str) -> ModelShape:
    """Find the shape of a model.

    Args:
        model: A preset's name, a hub id of its shape, or a folder with a config.json.

    Raises:
        UsageError: None of these; a field is missing; an architecture whose parameters are not known here.
    """
    preset = preset_of(model)
    if preset is not None and not is_model_folder(model):
        return preset
    file = Path(model) / "config.json"
    if not file.is_file():
        found = "is a folder without a config.json" if Path(model).is_dir() else "is no preset and no folder"
        raise UsageError(f"The model {model!r} {found}. Presets: {', '.join(presets())}; or a folder with config.json.")
    return shape_from_config(read_config(file), name=Path(model).resolve().name, place=str(file))


def stored_quantization(model: str) -> str | None:
    """Say how the config.json of a folder quantizes its weights, such as `awq, 4 bits`; `None` where it does not."""
    found = read_config(Path(model) / "config.json").get("quantization_config") if is_model_folder(model) else None
    if not isinstance(found, dict):
        return None
    bits = f", {found['bits']} bits" if "bits" in found else ""
    return f"{found.get('quant_method', 'quantization_config')}{bits}"


def is_model_folder(model: str) -> bool:
    """Whether this names a folder with a config.json."""
    return (Path(model) / "config.json").is_file()


def has_weights(model: str) -> bool:
    """Whether this names real weights: a folder that holds some, or a hub id; a preset's name does not.

    Args:
        model: A preset's name, a folder, or a hub id such as `org/name`.
    """
    if Path(model).is_dir():
        return any(any(Path(model).glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt"))
    return is_hub_id(model)


def is_hub_id(model: str) -> bool:
    """Whether this has the form of a hub id, `org/name`, and is no folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) is not None and not Path(model).exists()


def model_folder(model: str, root: Path) -> Path:
    """Find or make the folder that transformers and vLLM load a model from.

    Args:
        model: A local folder, which is returned as it is, or a preset, whose config.json is written under `root`.
        root: Where folders of presets go; several processes may share it.

    Raises:
        UsageError: Neither a preset nor a folder with a config.json.
    """
    shape = shape_of(model)
    if is_model_folder(model):
        return Path(model)
    folder = root / shape.name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_of(shape), indent=2) + "\n"
    file = folder / "config.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as temporary:
            temporary.write(text)
        Path(temporary.name).replace(file)
    return folder
