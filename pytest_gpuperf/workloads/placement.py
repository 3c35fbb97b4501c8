"""Which device holds which part of a model: all of it, or halves of equal bytes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_value

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Part(Record, frozen=True, kw_only=True):
    """What one device holds of a model.

    Attributes:
        device: `"cuda:0"`, `"cpu"`, ...
        modules: Their names in the model, in order; every parameter is in exactly one.
        layers: Decoder layers among them.
        parameters: Of the modules. A head that shares the embedding of another part counts: it is a copy.
        weight_bytes: Their size.
    """

    device: str
    modules: tuple[str, ...]
    layers: int
    parameters: int
    weight_bytes: int


def split(model: "PreTrainedModel", devices: Sequence[str]) -> tuple[Part, ...]:
    """Plan which device holds what, so that two devices differ least in bytes.

    Args:
        model: May be on the meta device.
        devices: One or two.
    """
    path, layers = _layers(model)
    parent, root = path.rpartition(".")[0], path.partition(".")[0]
    beside = {
        **{f"{parent}.{name}": child for name, child in model.get_submodule(parent).named_children()},
        **{name: child for name, child in model.named_children() if name != root},
    }
    del beside[path]
    front = tuple(name for name, child in beside.items() if _is_front(child))
    back = tuple(name for name in beside if name not in front)
    names = tuple(f"{path}.{index}" for index in range(len(layers)))
    if len(devices) == 1:
        return (_part(model, devices[0], front=front, layers=names, back=back),)
    plans = [
        (
            _part(model, devices[0], front=front, layers=names[:count]),
            _part(model, devices[1], layers=names[count:], back=back),
        )
        for count in range(len(names) + 1)
    ]
    return min(plans, key=lambda parts: abs(parts[0].weight_bytes - parts[1].weight_bytes))


def _layers(model: "PreTrainedModel") -> "tuple[str, torch.nn.ModuleList]":
    """The decoder layers and their name: the longest list of modules."""
    import torch

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda pair: len(pair[1]))


def _is_front(module: "torch.nn.Module") -> bool:
    """Whether it comes before the layers: embeddings, and what has no weights (rotary frequencies, dropout)."""
    import torch

    return isinstance(module, torch.nn.Embedding) or next(module.parameters(), None) is None


def refuse_misplaced(model: "PreTrainedModel", parts: Sequence[Part]) -> None:
    """Refuse a model whose weights are not where they were planned, so that the bytes reported are the true ones.

    Raises:
        MeasurementError: With the first weight that is elsewhere.
    """
    for part in parts:
        for name in part.modules:
            for key, parameter in model.get_submodule(name).named_parameters(prefix=name):
                if str(parameter.device) != part.device:
                    raise MeasurementError(f"{key} is on {parameter.device}, and was planned for {part.device}.")


def _part(
    model: "PreTrainedModel",
    device: str,
    *,
    layers: tuple[str, ...],
    front: tuple[str, ...] = (),
    back: tuple[str, ...] = (),
) -> Part:
    """Count what a device holds. A tensor that two of its modules share counts once."""
    modules = (*front, *layers, *back)
    held = {
        id(parameter): (parameter.numel(), parameter.element_size())
        for name in modules
        for parameter in model.get_submodule(name).parameters()
    }
    return Part(
        device=device,
        modules=modules,
        layers=len(layers),
        parameters=sum(count for count, _ in held.values()),
        weight_bytes=sum(count * size for count, size in held.values()),
    )


def describe(part: Part) -> str:
    """Say what a device holds: its name and id, parameters, bytes and modules, in one line."""
    layers = [name for name in part.modules if name.rpartition(".")[2].isdigit()]
    held = [name.rpartition(".")[2] for name in part.modules if name not in layers[1:]]
    if layers:
        first, last = layers[0].rpartition(".")[2], layers[-1].rpartition(".")[2]
        held[held.index(first)] = f"layers {first} to {last}"
    return (
        f"  {part.device}{_identity(part.device)}: {part.parameters:,} parameters, "
        f"{format_value(part.weight_bytes, 'B', digits=3)}: {', '.join(held)}"
    )


def _identity(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f" ({properties.name}, GPU-{properties.uuid})"
