"""What makes a GPU unfit for the rest of a run, with the mend; and what the driver's Xid codes mean. Pure."""

import functools
import importlib.resources
from collections.abc import Sequence
from typing import Literal

import msgspec

from pytest_gpuperf.records import Record
from pytest_gpuperf.units import counted

_RESET = (
    "end what uses the GPU and run `sudo nvidia-smi --gpu-reset`, or reboot; `sudo dmesg | grep Xid` has the details"
)
_REPLACE = "drain the node and have the GPU replaced (`nvidia-smi -q -d ROW_REMAPPER`)"


class Xid(Record, frozen=True, kw_only=True):
    """What one code of the driver's critical errors means.

    Attributes:
        name: What happened, for the middle of a sentence.
        kind: `application`: a kernel or process did it. `hardware`: the GPU, its memory, firmware or links need a
            reset or a repair. `driver`: it does not have to. `information`: nothing has to be done now.
        mend: What to do, for the middle of a sentence.
    """

    name: str
    kind: Literal["application", "hardware", "driver", "information"]
    mend: str


class _Table(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    mends: dict[str, str]
    xids: dict[int, Xid]


_UNKNOWN = Xid(
    name="not in the table", kind="information", mend="look it up in NVIDIA's Xid catalogue; `sudo dmesg | grep Xid`"
)


@functools.cache
def load_xids() -> dict[int, Xid]:
    """Read data/xid.json: code -> what it means."""
    text = importlib.resources.files("pytest_gpuperf").joinpath("data/xid.json").read_bytes()
    table = msgspec.json.decode(text, type=_Table)
    return {code: msgspec.structs.replace(xid, mend=table.mends[xid.mend]) for code, xid in table.xids.items()}


def xid_of(code: int) -> Xid:
    """What a code means; of one that the table lacks, where to look it up."""
    return load_xids().get(code, _UNKNOWN)


def describe(code: int) -> str:
    """Say what a code means and what to do.

    >>> describe(79).partition(":")[0]
    'Xid 79 (the GPU fell off the bus)'
    """
    xid = xid_of(code)
    return f"Xid {code} ({xid.name}): {xid.mend}"


def is_hardware(code: int) -> bool:
    """Whether the GPU needs a reset or a repair after an error of this code."""
    return xid_of(code).kind == "hardware"


def sickness(
    *, xids: Sequence[int] = (), ecc_uncorrected: int | None = None, has_remap_failed: bool | None = None
) -> str | None:
    """Say what makes a GPU unfit until it is mended, and how to mend it; `None` if nothing does.

    Args:
        xids: Codes that the driver gave.
        ecc_uncorrected: Memory errors, not corrected, that were added.
        has_remap_failed: No spare row was left for a bad one.
    """
    code = next((code for code in xids if is_hardware(code)), None)
    if code is not None:
        return describe(code)
    if ecc_uncorrected:
        return f"{counted(ecc_uncorrected, 'memory error')} that ECC cannot correct: {_RESET}"
    if has_remap_failed:
        return f"a bad row of memory, and no spare one is left: {_REPLACE}"
    return None
