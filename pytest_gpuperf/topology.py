"""How the GPUs of one test reach each other: the class of a set, which results must share to be comparable."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from pytest_gpuperf.devices import Device
from pytest_gpuperf.nvml import Ancestor, Nvml

Link = Literal["nvlink"] | Ancestor

#: Where NVLink is missing, PCIe paths that meet later are slower (nvml.h, nvmlGpuTopologyLevel_t).
_BEST_FIRST: tuple[Link, ...] = (
    "nvlink",
    "board",
    "switch",
    "switches",
    "host-bridge",
    "numa-node",
    "system",
)

#: Pair of UUIDs, in the order of the devices -> how the two are connected; `None`: the driver does not tell.
Links = Mapping[tuple[str, str], Link | None]


def links_between(devices: Sequence[Device], nvml: Nvml | None) -> Links:
    """Ask the driver how every two devices are connected, once a pair.

    Args:
        devices: In any order.
        nvml: `None`: nothing is known.

    Raises:
        DeviceError: A GPU is lost.
    """
    return {(a.uuid, b.uuid): _link(a, b, nvml) for a, b in itertools.combinations(devices, 2)}


def class_of(devices: Sequence[Device], links: Links) -> Link | None:
    """Name the worst connection within a set; `None` for one device, or where one connection is not known.

    Args:
        devices: In the order of those that `links` was made of.
        links: What `links_between` says of them, or of more.

    >>> class_of((a, b, c), links)  # doctest: +SKIP
    'host-bridge'
    """
    found = [links[a.uuid, b.uuid] for a, b in itertools.combinations(devices, 2)]
    known = [_BEST_FIRST.index(link) for link in found if link is not None]
    return _BEST_FIRST[max(known)] if known and len(known) == len(found) else None


def best_connected(sets: Sequence[tuple[Device, ...]], links: Links) -> tuple[tuple[Device, ...], ...]:
    """Keep the sets of the best class that there is, in their order; all of them where none is known."""
    classes = [class_of(devices, links) for devices in sets]
    best = min((link for link in classes if link is not None), key=_BEST_FIRST.index, default=None)
    return tuple(devices for devices, link in zip(sets, classes, strict=True) if link == best)


def _link(a: Device, b: Device, nvml: Nvml | None) -> Link | None:
    if nvml is None or a.kind == "cpu" or b.kind == "cpu":
        return None
    return "nvlink" if nvml.has_nvlink(a.uuid, b.uuid) else nvml.common_ancestor(a.uuid, b.uuid)
