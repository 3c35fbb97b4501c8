"""What a GPU does, in a word with its reason: decided from one reading, so that the same numbers give the same word."""

from collections.abc import Collection, Sequence
from typing import Literal

from pytest_gpuperf.devices import Device
from pytest_gpuperf.nvml import GpuUsage
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_percent

Word = Literal[
    "lost", "error", "braked", "hot", "throttled", "other process", "unknown", "idle", "power-capped", "memory-bound?",
    "busy",
]  # fmt: skip

#: Below this busy share a GPU is idle: a display or a keep-alive kernel now and then is no work.
IDLE_BELOW = 0.01
#: From this share of the memory's interface on, memory is the likely limit (a copy shows about 0.9).
MEMORY_BOUND_FROM = 0.6
#: A kernel is always there, and it is on few of the multiprocessors.
_FEW_SMS_BELOW = 0.1
#: Holds of the clock that are settings, not trouble.
_SETTINGS = ("clock setting", "sync boost", "display clock", "board limit", "reliability")


class Status(Record, frozen=True, kw_only=True):
    """What a GPU does, in a word, and why this word."""

    word: Word
    reason: str


def status_of(
    device: Device,
    usage: GpuUsage,
    activity: GpuActivity | None = None,
    *,
    xids: Collection[int] = (),
    others: Collection[int] = (),
) -> Status:
    """Say what a GPU does: trouble first, then strangers, then its work.

    Args:
        usage: Just read.
        activity: The last that is known.
        xids: Critical errors of the last minute.
        others: Processes on it that do not belong there.
    """
    if xids:
        codes = ", ".join(str(code) for code in sorted(set(xids)))
        return Status(word="error", reason=f"Xid {codes}: see sudo dmesg | grep Xid")
    if trouble := _trouble(usage):
        return trouble
    if others:
        return Status(word="other process", reason=f"pid {', '.join(map(str, sorted(others)))}")
    return _work(device, usage, activity)


def _trouble(usage: GpuUsage) -> Status | None:
    holds = usage.holds
    if not holds:
        return None
    at = "" if usage.temperature_c is None else f" at {usage.temperature_c:.0f} C"
    clock = "" if usage.sm_clock_mhz is None else f", {usage.sm_clock_mhz:.0f} MHz"
    if "power brake" in holds:
        return Status(word="braked", reason=f"by the power supply{clock}")
    if heat := [hold for hold in holds if hold.startswith("heat")]:
        return Status(word="hot", reason=f"{heat[-1]}{at}{clock}")
    if "hardware slowdown" in holds:
        return Status(word="throttled", reason=f"hardware slowdown{at}{clock}")
    return None


def _work(device: Device, usage: GpuUsage, activity: GpuActivity | None) -> Status:
    holds = usage.holds or ()
    busy = usage.busy_share
    if busy is None and activity is not None:
        busy = activity.sm_share
    if busy is None and "idle" not in holds:
        return Status(word="unknown", reason="the driver does not tell how busy it is")
    if busy is None or busy < IDLE_BELOW:
        return Status(word="idle", reason="no kernel runs")
    if "power cap" in holds:
        return Status(word="power-capped", reason=_cap_words(device, usage))
    dram = activity.dram_share if activity else None
    if dram is not None and dram >= MEMORY_BOUND_FROM:
        return Status(word="memory-bound?", reason=f"DRAM works {format_percent(dram)} of the time")
    return Status(word="busy", reason=_busy_words(busy, holds, activity))


def _cap_words(device: Device, usage: GpuUsage) -> str:
    clock = "clock" if usage.sm_clock_mhz is None else f"{usage.sm_clock_mhz:.0f} MHz"
    limit = "the power limit" if device.power_limit_w is None else f"the limit of {device.power_limit_w:.0f} W"
    return f"{clock} at {limit}"


def _busy_words(busy: float, holds: Sequence[str], activity: GpuActivity | None) -> str:
    if held := [hold for hold in holds if hold in _SETTINGS]:
        return f"clock held by {held[0]}"
    sm_share = activity.sm_share if activity else None
    if sm_share is not None and sm_share < _FEW_SMS_BELOW <= busy:
        return f"kernels fill {format_percent(sm_share)} of the SMs"
    return f"kernels run {format_percent(busy)} of the time"
