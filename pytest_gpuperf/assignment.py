"""Which GPUs the outer world has given to this process where CUDA_VISIBLE_DEVICES does not say so.

A privileged container, or a cluster that does not fence its jobs in, shows every GPU and names those that are ours in
a variable of its own. What is found here narrows what CUDA shows; nothing is ever widened.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
#: Stands for the UUID of a GPU that cannot be asked for it.
ABSENT = "GPU-absent"
#: Holds the place of a GPU that this process may not open, where the driver counts it.
_CLOSED = "GPU-closed"
_CONTAINER = "NVIDIA_VISIBLE_DEVICES"
#: The step's GPUs are some of the job's (Slurm, srun(1), output environment variables).
_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


def may_narrow(environment: Mapping[str, str]) -> bool:
    """Whether it is worth asking the driver which GPUs there are: seldom."""
    if VISIBLE in environment:
        return False
    return bool(_named_uuids(environment) or any(environment.get(name) for name in _SLURM))


def assigned(environment: Mapping[str, str], uuids: Sequence[str]) -> tuple[str, ...] | None:
    """Choose the UUIDs that this process was given; `None`: all that there are, or CUDA_VISIBLE_DEVICES decides.

    Args:
        environment: Of this process.
        uuids: GPUs that the driver shows, see `in_place`; MIG instances may follow them.

    Returns:
        `ABSENT` among them: what we were given does not answer.
    """
    if not may_narrow(environment):
        return None
    gpus = [uuid for uuid in uuids if uuid.startswith("GPU-")]
    by_container = _of_container(environment, uuids)
    by_slurm = _of_slurm(environment, gpus)
    if by_container and by_slurm:
        both = [uuid for uuid in by_container if uuid in by_slurm]
        chosen = both or by_container
    else:
        chosen = by_container or by_slurm
    found = tuple(dict.fromkeys(chosen))
    return found if found and set(found) != {*gpus} - {_CLOSED} else None  # all of them, in any order, narrow nothing


def in_place(uuids: Mapping[int, str], absent: Iterable[int]) -> tuple[str, ...]:
    """List GPUs in PCI bus order; one that does not answer, or may not be opened, keeps its place, as for Slurm.

    Args:
        uuids: By the driver's number.
        absent: Numbers of those that do not answer.

    >>> in_place({0: "GPU-a", 2: "GPU-c"}, [1])
    ('GPU-a', 'GPU-absent', 'GPU-c')
    """
    places = {**uuids, **dict.fromkeys(absent, ABSENT)}
    return tuple(places.get(number, _CLOSED) for number in range(max(places, default=-1) + 1))


def there(uuids: Iterable[str]) -> tuple[str, ...]:
    """Leave out the places of GPUs that do not answer or may not be opened."""
    return tuple(uuid for uuid in uuids if uuid not in (ABSENT, _CLOSED))


def _named_uuids(environment: Mapping[str, str]) -> list[str]:
    """Those that a container was given by UUID. Indices are the host's, and say nothing in here; nor does `all`."""
    entries = [entry.strip() for entry in environment.get(_CONTAINER, "").split(",")]
    return [entry for entry in entries if entry.startswith(("GPU-", "MIG-"))]


def _of_container(environment: Mapping[str, str], uuids: Sequence[str]) -> list[str]:
    """Those that a container was given; where a GPU does not answer, a name that is not here may be its own."""
    named = _named_uuids(environment)
    return [uuid if uuid in uuids else ABSENT for uuid in named if uuid in uuids or ABSENT in uuids]


def _of_slurm(environment: Mapping[str, str], gpus: Sequence[str]) -> list[str]:
    """Those that a job or step was given by index. Where Slurm fences it in, the driver shows no more than these."""
    text = next((environment[name] for name in _SLURM if environment.get(name)), "")
    indices = list(_indices(text))
    if len(set(indices)) >= len(gpus) or any(index >= len(gpus) for index in indices):
        return []
    chosen = [gpus[index] for index in indices]
    return [] if _CLOSED in chosen else chosen  # it counts in another way than the driver


def _indices(text: str) -> Iterable[int]:
    """Read `0,2-3`; what is no such list names nothing."""
    parts = [re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part) for part in text.split(",")]
    for part in parts if all(parts) else ():
        assert part is not None
        yield from range(int(part[1]), int(part[2] or part[1]) + 1)
