"""Read what GPUs do at an even pace, and sum it up."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.monitor import ENERGY_FROM_S
from pytest_gpuperf.nvml import GpuState, GpuUsage, Nvml, grown
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.records import Record
from pytest_gpuperf.trials.watch_status import Status, Word, status_of

#: The clock counts as that of work where at least half of the driver's sampling period was busy.
_WORKING_FROM = 0.5
#: What costs the driver most, 1.7 ms and 4 ms of a CPU on an H200 (all else of a sample: 0.2 ms at most), is read of
#: one GPU at a time: however many there are, the hardware's counters of one this often, and the energy of one.
ACTIVITY_TURN_S, ENERGY_TURN_S = 1.0, 5.0
#: Whose processes they are is asked of /proc, one by one.
_LOOK_EVERY_S = 2.0
#: Asking for critical errors takes as long as all the clocks together.
_ERRORS_EVERY_S = 1.0
#: A GPU that does not answer may take seconds to say so: the others are not to wait for it at every turn.
_RETRY_EVERY_S = 5.0
#: How long a critical error stays the status.
_XID_SHOWN_S = 60.0
_SHARES = ("power_cap", "sync_boost", "sw_thermal", "hw_thermal", "power_brake")


class Sample(Record, frozen=True, kw_only=True, tag="sample", tag_field="record"):
    """One GPU at one time: a line of `--json`, a row of `--output`. `None`: the driver does not tell.

    Attributes:
        date: ISO 8601, UTC, when this GPU was read.
        time_s: The same, since the watch began.
        gpu: CUDA's number of it here, the position in CUDA_VISIBLE_DEVICES.
        busy_share: See `nvml.GpuUsage`, as most others.
        holds: What holds the clock down.
        energy_j: Since the driver was loaded: differences over 5 s and more count. `None` between its turns.
        activity_s: What the next eight are the means of: the time since they were last given. Each mean is given once.
        xids: Critical errors since the sample before.
        error: Why this GPU could not be read.
    """

    date: str
    time_s: float
    gpu: int
    uuid: str
    name: str
    status: Word
    reason: str
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    busy_share: float | None = None
    memory_busy_share: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    energy_j: float | None = None
    holds: tuple[str, ...] | None = None
    activity_s: float | None = None
    sm_share: float | None = None
    occupancy: float | None = None
    tensor_share: float | None = None
    dram_share: float | None = None
    pcie_tx_bytes_per_s: float | None = None
    pcie_rx_bytes_per_s: float | None = None
    nvlink_tx_bytes_per_s: float | None = None
    nvlink_rx_bytes_per_s: float | None = None
    xids: tuple[int, ...] = ()
    error: str | None = None


class Summary(Record, frozen=True, kw_only=True, tag="summary", tag_field="record"):
    """One GPU over the whole watch. Means are over time, peaks over the samples.

    Attributes:
        duration_s: Of the watch.
        samples: That could be read.
        energy_j: Difference of the driver's counter; `None` under 5 s, which are too few of its updates.
        busy_share: Part of the time in which a kernel ran.
        mean_sm_clock_mhz: While the GPU worked (busy share of half and more), as the lowest.
        power_cap_share: Part of the time in which the clock was held down by the power limit; the next four by others.
        other_process_pids: Processes on the GPU that were not of the watched command; `None`: none was watched.
        errors: Critical errors, and why the GPU could not be read, each once.
    """

    gpu: int
    uuid: str
    name: str
    duration_s: float
    samples: int
    energy_j: float | None = None
    mean_power_w: float | None = None
    peak_power_w: float | None = None
    power_limit_w: float | None = None
    busy_share: float | None = None
    sm_share: float | None = None
    tensor_share: float | None = None
    dram_share: float | None = None
    peak_memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    peak_temperature_c: float | None = None
    mean_sm_clock_mhz: float | None = None
    lowest_sm_clock_mhz: float | None = None
    power_cap_share: float | None = None
    sync_boost_share: float | None = None
    sw_thermal_share: float | None = None
    hw_thermal_share: float | None = None
    power_brake_share: float | None = None
    other_process_pids: tuple[int, ...] | None = None
    errors: tuple[str, ...] = ()

    @property
    def idle_share(self) -> float | None:
        """Part of the time in which no kernel ran."""
        return None if self.busy_share is None else 1 - self.busy_share


class GpuWatch:
    """One GPU that is read again and again.

    Args:
        nvml: The driver's library.
        device: The GPU.
        is_stranger: Says of a process on it whether it does not belong there; `None`: nobody is looked for.
        activity_every_s: How often the hardware's counters are read, at most.
        energy_every_s: How often the energy is read, at most.
        turn: Part of these times after which they are read first, so that several GPUs take turns.
        clock: Seconds from any start.
        wall_clock: Seconds since 1970.
    """

    def __init__(  # noqa: PLR0913 - how it is read, each by its name
        self,
        nvml: Nvml,
        device: Device,
        *,
        is_stranger: Callable[[int], bool] | None = None,
        activity_every_s: float = ACTIVITY_TURN_S,
        energy_every_s: float = ENERGY_TURN_S,
        turn: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.device = device
        self._nvml, self._clock, self._wall_clock = nvml, clock, wall_clock
        self._is_stranger = is_stranger
        self._others: set[int] = set()
        self._all_others: set[int] = set()
        self._errors: list[str] = []
        self._failure: str | None = None
        self._xids: list[tuple[float, int]] = []
        self._activity: GpuActivity | None = None
        self._read_activity: Callable[[], GpuActivity | None] = lambda: None
        self._read_errors: Callable[[], tuple[int, ...]] | None = None
        self._begin_s = self._look_at_s = self._retry_at_s = clock()
        self._activity_due = _Due(self._begin_s, activity_every_s, turn)
        self._energy_due = _Due(self._begin_s, energy_every_s, turn)
        self._errors_due = _Due(self._begin_s, _ERRORS_EVERY_S, 0.0)
        self._before: GpuState | None = None
        self._totals = _Totals()
        try:
            self._before = nvml.state(device.uuid)
            self._read_activity = nvml.activity_meter(device.uuid)
            self._read_errors = nvml.error_meter(device.parent_uuid or device.uuid)  # told of whole GPUs alone
        except DeviceError as error:
            self._fail(error)

    def read(self, *, is_last: bool = False) -> Sample:
        """Read the GPU now. One that does not answer is an error in the sample, and asked again after a while.

        Args:
            is_last: Critical errors are asked for, whether their turn has come or not: one may have ended it all.
        """
        now_s = self._clock()
        xids = self._fresh_xids(now_s, is_last=is_last)  # first: of a GPU that falls off, it is all that is left
        if self._failure and now_s < self._retry_at_s:
            return self._lost(now_s, self._failure, xids)
        try:
            usage = self._nvml.usage(self.device.uuid)
            activity = self._fresh_activity(now_s)
            energy_j = self._nvml.energy_j(self.device.uuid) if self._energy_due.has_come(now_s) else None
            self._look(now_s)
        except DeviceError as error:
            return self._lost(now_s, self._fail(error), xids)
        self._failure = None
        self._totals.add(now_s - self._begin_s, usage, activity)
        status = status_of(
            self.device, usage, self._activity, xids=[code for _, code in self._xids], others=self._others
        )
        return self._sample(now_s, status, usage, activity, energy_j=energy_j, xids=xids)

    def summary(self) -> Summary:
        """Sum up what was read, with the driver's counters of the whole time."""
        after: GpuState | None = None
        duration_s = self._clock() - self._begin_s
        self._totals.add_activity(self._read_activity())  # since their last turn
        try:
            after = self._nvml.state(self.device.uuid)
        except DeviceError as error:
            self._fail(error)
        device, before = self.device, self._before
        energy_j = _difference("energy_j", before, after)
        return Summary(
            gpu=device.index,
            uuid=device.uuid,
            name=device.name,
            duration_s=duration_s,
            energy_j=energy_j if duration_s >= ENERGY_FROM_S else None,
            power_limit_w=device.power_limit_w,
            memory_bytes=device.memory_bytes,
            other_process_pids=None if self._is_stranger is None else tuple(sorted(self._all_others)),
            errors=tuple(dict.fromkeys(self._errors)),
            **self._totals.values(),
            **_held_shares(before, after, duration_s),
        )

    def _fail(self, error: DeviceError) -> str:
        self._retry_at_s = self._clock() + _RETRY_EVERY_S
        self._failure = str(error)
        self._errors.append(self._failure)
        return self._failure

    def _fresh_activity(self, now_s: float) -> GpuActivity | None:
        if not self._activity_due.has_come(now_s):
            return None
        found = self._read_activity()
        self._activity = found or self._activity
        return found

    def _fresh_xids(self, now_s: float, *, is_last: bool) -> tuple[int, ...]:
        is_due = self._errors_due.has_come(now_s) or is_last
        found = self._read_errors() if self._read_errors and is_due else ()
        self._errors += [f"Xid {code}" for code in found]
        recent = [(at_s, code) for at_s, code in self._xids if now_s - at_s < _XID_SHOWN_S]
        self._xids = recent + [(now_s, code) for code in found]
        return found

    def _look(self, now_s: float) -> None:
        if self._is_stranger is None or now_s < self._look_at_s:
            return
        self._look_at_s = now_s + _LOOK_EVERY_S
        pids = self._nvml.process_pids(self.device.uuid) or ()
        self._others = {pid for pid in pids if self._is_stranger(pid)}
        self._all_others |= self._others

    def _lost(self, now_s: float, error: str, xids: tuple[int, ...]) -> Sample:
        reason = error.partition(f"{self.device.uuid}) ")[2] or error  # a narrow line has no room to say who it is
        status = Status(word="lost", reason=reason)
        return self._sample(now_s, status, GpuUsage(), xids=xids, error=error)

    def _sample(  # noqa: PLR0913 - what was read, each by its name
        self,
        now_s: float,
        status: Status,
        usage: GpuUsage,
        activity: GpuActivity | None = None,
        *,
        energy_j: float | None = None,
        xids: tuple[int, ...] = (),
        error: str | None = None,
    ) -> Sample:
        return Sample(
            date=datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds"),
            time_s=now_s - self._begin_s,
            gpu=self.device.index,
            uuid=self.device.uuid,
            name=self.device.name,
            status=status.word,
            reason=status.reason,
            memory_used_bytes=usage.memory_used_bytes,
            memory_bytes=self.device.memory_bytes,
            busy_share=usage.busy_share,
            memory_busy_share=usage.memory_busy_share,
            power_w=usage.power_w,
            power_limit_w=self.device.power_limit_w,
            temperature_c=usage.temperature_c,
            sm_clock_mhz=usage.sm_clock_mhz,
            memory_clock_mhz=usage.memory_clock_mhz,
            energy_j=energy_j,
            holds=usage.holds,
            xids=xids,
            error=error,
            **_activity_values(activity),
        )


class _Due:
    """A time that comes again and again, on a grid: a late look does not shift those to come."""

    def __init__(self, begin_s: float, every_s: float, turn: float) -> None:
        self._every_s = every_s
        self._next_s = begin_s + turn * every_s

    def has_come(self, now_s: float) -> bool:
        if now_s < self._next_s:
            return False
        self._next_s += self._every_s * (1 + (now_s - self._next_s) // self._every_s)
        return True


class _Mean:
    """A mean over time: each value counts for the time since the one before."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0
        self._last: float | None = None

    def add(self, value: float | None, duration_s: float) -> None:
        if value is not None:
            self._sum += value * duration_s
            self._weight += duration_s
            self._last = value

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight > 0 else self._last


class _Totals:
    """What a summary needs of all samples, without keeping them: a watch may last for days."""

    def __init__(self) -> None:
        self._samples = 0
        self._at_s = 0.0
        names = ("mean_power_w", "busy_share", "mean_sm_clock_mhz", "sm_share", "tensor_share", "dram_share")
        self._means = {name: _Mean() for name in names}
        self._peaks: dict[str, float | int | None] = dict.fromkeys(
            ("peak_power_w", "peak_memory_used_bytes", "peak_temperature_c")
        )
        self._lowest_mhz: float | None = None

    def add(self, at_s: float, usage: GpuUsage, activity: GpuActivity | None) -> None:
        duration_s, self._at_s = at_s - self._at_s, at_s
        self._samples += 1
        self._means["mean_power_w"].add(usage.power_w, duration_s)
        self._means["busy_share"].add(usage.busy_share, duration_s)
        if usage.busy_share is None or usage.busy_share >= _WORKING_FROM:
            self._means["mean_sm_clock_mhz"].add(usage.sm_clock_mhz, duration_s)
            self._lowest_mhz = _first_of(min, self._lowest_mhz, usage.sm_clock_mhz)
        peaks = self._peaks
        peaks["peak_power_w"] = _first_of(max, peaks["peak_power_w"], usage.power_w)
        peaks["peak_memory_used_bytes"] = _first_of(max, peaks["peak_memory_used_bytes"], usage.memory_used_bytes)
        peaks["peak_temperature_c"] = _first_of(max, peaks["peak_temperature_c"], usage.temperature_c)
        self.add_activity(activity)

    def add_activity(self, activity: GpuActivity | None) -> None:
        if activity:
            for name in ("sm_share", "tensor_share", "dram_share"):
                self._means[name].add(getattr(activity, name), activity.duration_s)

    def values(self) -> dict[str, Any]:
        means = {name: mean.value for name, mean in self._means.items()}
        return {"samples": self._samples, "lowest_sm_clock_mhz": self._lowest_mhz, **means, **self._peaks}


def watches(
    nvml: Nvml,
    devices: Sequence[Device],
    *,
    is_stranger: Callable[[int], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[GpuWatch]:
    """Make ready to watch GPUs, which take turns at what is dear; see `GpuWatch` for the arguments."""
    count = len(devices)
    return [
        GpuWatch(
            nvml,
            device,
            is_stranger=is_stranger,
            activity_every_s=ACTIVITY_TURN_S * count,
            energy_every_s=ENERGY_TURN_S * count,
            turn=(place + 1) / count,
            clock=clock,
        )
        for place, device in enumerate(devices)
    ]


def watch(
    gpus: Sequence[GpuWatch],
    *,
    interval_s: float,
    show: Callable[[Sequence[Sample]], None],
    wait: Callable[[float], bool],
    duration_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Summary, ...]:
    """Read GPUs at the beginning, whenever the interval has passed, and at the end.

    The pace is kept by deadlines. One that has passed meanwhile is not made up for.

    Args:
        show: Takes the samples of one reading, one a GPU.
        wait: Sleeps for some seconds; `True`: the watch ends now.
        duration_s: Most seconds; `None`: until `wait` says so.
        clock: Seconds from any start.
    """
    begin_s, turn, is_over = clock(), 0, False
    while not is_over:
        show([gpu.read() for gpu in gpus])
        turn = max(turn + 1, int((clock() - begin_s) / interval_s) + 1)
        deadline_s = begin_s + turn * interval_s
        if duration_s is not None and begin_s + duration_s <= deadline_s:
            deadline_s, is_over = begin_s + duration_s, True
        is_over = wait(max(deadline_s - clock(), 0.0)) or is_over
    show([gpu.read(is_last=True) for gpu in gpus])
    return tuple(gpu.summary() for gpu in gpus)


def chosen(devices: Sequence[Device], names: str | None) -> tuple[Device, ...]:
    """Find the GPUs that `--gpus` names, in its order.

    Args:
        devices: Those that this process sees.
        names: CUDA's numbers or UUIDs, which may be cut to a unique beginning, with commas between; `None`: all.

    Raises:
        UsageError: One names none, several, or one again.
    """
    if names is None:
        return tuple(devices)
    found: list[Device] = []
    for name in (text.strip() for text in names.split(",")):
        device = _named(devices, name)
        if device in found:
            raise UsageError(f"--gpus {names} names GPU {device.index} twice. Name each once.")
        found.append(device)
    return tuple(found)


def _named(devices: Sequence[Device], name: str) -> Device:
    by_number = [device for device in devices if name == str(device.index)]
    by_uuid = [device for device in devices if len(name) > 4 and device.uuid.startswith(name)]
    matches = by_number or by_uuid
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(f"{device.index} ({device.uuid})" for device in devices)
    what = "is several GPUs" if matches else "is no GPU here"
    raise UsageError(f"--gpus: {name!r} {what}. Here are: {known}. Numbers are CUDA's: see CUDA_VISIBLE_DEVICES.")


def _activity_values(activity: GpuActivity | None) -> dict[str, float | None]:
    if activity is None:
        return {}
    names = (name for name in GpuActivity.__struct_fields__ if name != "duration_s")
    return {"activity_s": activity.duration_s, **{name: getattr(activity, name) for name in names}}


def _first_of(order: Callable[[float, float], float], one: float | None, other: float | None) -> float | None:
    """The least or the most of two values, of which either may not be known."""
    if one is None or other is None:
        return other if one is None else one
    return order(one, other)


def _difference(name: str, before: GpuState | None, after: GpuState | None) -> float | None:
    return grown(getattr(before, name, None), getattr(after, name, None))


def _held_shares(before: GpuState | None, after: GpuState | None, duration_s: float) -> dict[str, Any]:
    return {f"{name}_share": _part(_difference(f"{name}_s", before, after), duration_s) for name in _SHARES}


def _part(seconds: float | None, of_s: float) -> float | None:
    return None if seconds is None or of_s <= 0 else min(seconds / of_s, 1.0)
