"""Which GPUs a short name such as `A100` means, by the table of GPUs."""

from pytest_gpuperf.specs import load_specs


def is_kind(name: str, kind: str) -> bool:
    """Say whether a GPU is of a kind.

    Args:
        name: As NVML gives it, such as `NVIDIA A100-SXM4-40GB`, or as the table of GPUs has it: `A100-SXM-40`.
        kind: The same, or the first words of the table's name: `A100` is every A100, `L4` is no `L40`.

    >>> is_kind("NVIDIA A100-SXM4-40GB", "A100"), is_kind("NVIDIA L40S", "L4")
    (True, False)
    """
    have, wanted = _key(name), _key(kind)
    return have == wanted or have.startswith(f"{wanted}-")


def _key(name: str) -> str:
    """The table's own name where the GPU is in it, in small letters."""
    text = name.strip().casefold()
    keys = (
        spec.key for spec in load_specs().gpus if text in (spec.key.casefold(), *(one.casefold() for one in spec.names))
    )
    return next(keys, text).casefold()
