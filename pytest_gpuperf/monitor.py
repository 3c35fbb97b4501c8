"""Telemetry of a region: counters before and after, a reading every 100 ms between, and what it says of the health.

Whoever else is on the device, and the hardware's own errors, are looked at before, about once a second, and after;
processes that come and go between two looks are not seen.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import GpuSample, GpuState, Number, Nvml, grown
from pytest_gpuperf.processes import is_running, parent_of
from pytest_gpuperf.records import Kind, Telemetry
from pytest_gpuperf.sickness import sickness
from pytest_gpuperf.stats import mean_of_known
from pytest_gpuperf.units import format_percent, format_value
from pytest_gpuperf.vitals import Signs, Vitals, Window, sum_of_all

#: NVML refreshes power and energy about every 100 ms.
SAMPLE_EVERY_S = 0.1
#: Other processes and the hardware's errors are looked for less often: with what is asked of /proc, they take longer.
LOOK_EVERY_S = 1.0
#: A shorter window holds too few updates of the energy counter to divide by (zeus: 100 ms; 50 of them are ±2 %).
ENERGY_FROM_S = 5.0
#: Share of the time under a thermal slowdown or a power brake from which a result is not the code's.
UNHEALTHY_SHARE = 0.01
#: NVBench discards samples below this fraction of the usual clock; so do we.
CLOCK_FLOOR = 0.75
#: More memory in use than this before a test began is somebody's, and not the driver's own.
FOREIGN_FROM_BYTES = 200 * 2**20
#: What measures the link to the host.
_OVER_PCIE = ("transfer", "host")
#: Opened by whoever uses CUDA, and not by NVML.
_CUDA_FILE = "/dev/nvidia-uvm"
#: Libraries that hold memory of a GPU without torch's knowledge.
_CUDA_LIBRARIES = ("cupy", "jax", "numba.cuda", "pycuda", "tensorflow")
#: A device that has come down by this much, or to this temperature, has cooled.
FALL_C, COOL_C = 10.0, 60.0
_COUNTERS = ("sw_thermal_s", "hw_thermal_s", "power_brake_s")

#: Tells a fresh process that confirms whose family it is of: the workers of pytest-xdist are no strangers to it.
FAMILY_VARIABLE = "GPUPERF_FAMILY"


class Monitor:
    """Watch devices while the body of a `with` statement runs; `telemetry` holds the result afterwards.

    Args:
        nvml: The driver's library, or `None` where there is none: then only the duration is known.
        uuids: Devices to watch.
        vitals: What hears the errors of the hardware between measurements, too; `None`: those during this one alone.
        foreign_memory_bytes: See `foreign_memory_bytes`.

    Raises:
        DeviceError: A device was lost; from entering or leaving the region.

    >>> with Monitor(None, ()) as monitor:
    ...     pass
    >>> monitor.telemetry.power_w is None
    True
    """

    def __init__(
        self,
        nvml: Nvml | None,
        uuids: Sequence[str],
        *,
        vitals: Vitals | None = None,
        foreign_memory_bytes: int | None = None,
    ) -> None:
        self._nvml = nvml
        self._uuids = tuple(uuids) if nvml else ()
        self._vitals = vitals or (Vitals(nvml) if nvml else None)
        self._window: Window | None = None
        self._foreign_memory_bytes = foreign_memory_bytes
        self._stop = threading.Event()
        self._samples: list[GpuSample] = []
        self._others: set[int] = set()
        self._error: DeviceError | None = None
        self._telemetry: Telemetry | None = None

    def __enter__(self) -> Self:
        self._before = self._states()
        self._note(state.process_pids for state in self._before)
        self._window = Window(self._vitals, self._uuids) if self._vitals else None
        self._sampler = threading.Thread(target=self._sample_until_stopped, name="gpuperf-monitor", daemon=True)
        if self._uuids:
            self._sampler.start()
        self._start_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        duration_s = time.perf_counter() - self._start_s
        self._stop.set()
        if self._uuids:
            self._sampler.join()
        if error is None and self._error is not None:
            raise self._error
        if error is None:
            self._telemetry = summarize(
                self._before,
                self._states(),
                self._samples,
                duration_s,
                others=self._others,
                signs=self._window.end() if self._window else None,
                foreign_memory_bytes=self._foreign_memory_bytes,
            )

    @property
    def telemetry(self) -> Telemetry:
        """What the devices did between entering and leaving.

        Raises:
            RuntimeError: The region has not been left yet.
        """
        if self._telemetry is None:
            raise RuntimeError("The telemetry of a region is known when the region has ended.")
        return self._telemetry

    def _states(self) -> tuple[GpuState, ...]:
        return tuple(self._nvml.state(uuid) for uuid in self._uuids) if self._nvml else ()

    def _note(self, pids: Iterable[tuple[int, ...] | None]) -> None:
        """Note who else is there while they can still be told from the host's process ids, which do not exist here."""
        self._others.update(_others_among(pids) or ())

    def _sample_until_stopped(self) -> None:
        look_s = time.perf_counter() + LOOK_EVERY_S
        try:
            while self._nvml and not self._stop.wait(SAMPLE_EVERY_S):
                self._samples.extend(self._nvml.sample(uuid) for uuid in self._uuids)
                if time.perf_counter() >= look_s:
                    look_s += LOOK_EVERY_S
                    self._note(self._nvml.process_pids(uuid) for uuid in self._uuids)
                    if self._window:
                        self._window.look()
        except DeviceError as error:  # raised on leaving the region: in a thread of its own nobody would see it
            self._error = error


def summarize(  # noqa: PLR0913 - what was read, each by its name
    before: Sequence[GpuState],
    after: Sequence[GpuState],
    samples: Sequence[GpuSample],
    duration_s: float,
    *,
    others: Collection[int] = (),
    signs: Signs | None = None,
    foreign_memory_bytes: int | None = None,
) -> Telemetry:
    """Condense counters and samples of one or more devices.

    Power and energy are summed over the devices, clocks averaged; temperature, memory and shares are the worst's.

    Args:
        before: One a device.
        after: Likewise.
        samples: Of all devices, taken in between.
        duration_s: Time between before and after.
        others: Other processes that were seen meanwhile.
        signs: Of the hardware.
        foreign_memory_bytes: See the function of that name.
    """
    devices = max(len(after), 1)
    readings = samples or [
        GpuSample(sm_clock_mhz=s.sm_clock_mhz, power_w=s.power_w, temperature_c=s.temperature_c) for s in after
    ]
    energy_j = sum_of_all(_differences("energy_j", before, after))
    power_w = mean_of_known(sample.power_w for sample in readings)
    return Telemetry(
        duration_s=duration_s,
        sm_clock_mhz=mean_of_known(sample.sm_clock_mhz for sample in readings),
        power_w=None if power_w is None or any(state.power_w is None for state in after) else power_w * devices,
        energy_j=energy_j if duration_s >= ENERGY_FROM_S else None,
        temperature_c=_largest(sample.temperature_c for sample in readings),
        memory_used_bytes=_largest(state.memory_used_bytes for state in after),
        power_cap_share=_share("power_cap_s", before, after, duration_s),
        sync_boost_share=_share("sync_boost_s", before, after, duration_s),
        sw_thermal_share=_share("sw_thermal_s", before, after, duration_s),
        hw_thermal_share=_share("hw_thermal_s", before, after, duration_s),
        power_brake_share=_share("power_brake_s", before, after, duration_s),
        other_process_pids=_united(others, _other_processes([*before, *after])),
        foreign_memory_bytes=foreign_memory_bytes,
        **msgspec.structs.asdict(signs or Signs()),
    )


def foreign_memory_bytes(nvml: Nvml | None, uuids: Sequence[str]) -> int | None:
    """Memory in use on the fullest device, if it can be nobody's of this process or its family; else `None`.

    A desktop's is not counted: it belongs to the machine, and is there in every run. To be asked before a test's body
    runs. A process that has used CUDA holds memory itself, and how much of it NVML does not tell apart; such a process,
    child, or other worker of this run makes the answer `None`.

    Raises:
        DeviceError: A device is lost.
    """
    if nvml is None or not uuids or _uses_cuda() or any(_has_cuda_open(pid) for pid in _relatives()):
        return None
    return _largest(_without_desktop(nvml, uuid) for uuid in uuids)


def _without_desktop(nvml: Nvml, uuid: str) -> int | None:
    used_bytes, desktop_bytes = nvml.usage(uuid).memory_used_bytes, nvml.desktop_memory_bytes(uuid)
    return None if used_bytes is None else max(used_bytes - (desktop_bytes or 0), 0)


def health(telemetry: Telemetry, *, usual_clock_mhz: float | None = None, kind: Kind | None = None) -> str | None:
    """Say why a result taken under this telemetry is not the code's, or `None` if the device was well.

    Args:
        telemetry: Of the measurement.
        usual_clock_mhz: Mean SM clock of the baseline's runs.
        kind: What the result depends on: the link to the host matters to `transfer` and `host` alone.
    """
    return _illness(telemetry) or _disturbance(telemetry) or _narrowness(telemetry, usual_clock_mhz, kind)


def _illness(telemetry: Telemetry) -> str | None:
    """What makes the GPU unfit for the rest of a run, too."""
    return telemetry.sickness or sickness(
        xids=telemetry.xids or (),
        ecc_uncorrected=telemetry.ecc_uncorrected,
        has_remap_failed=telemetry.has_remap_failed,
    )


def _disturbance(telemetry: Telemetry) -> str | None:
    """What passes by itself: heat, the power supply, somebody else."""
    causes = (
        ("thermal slowdown by the hardware", telemetry.hw_thermal_share),
        ("thermal slowdown by the driver", telemetry.sw_thermal_share),
        ("an external power brake", telemetry.power_brake_share),
    )
    for cause, share in causes:
        if share is not None and share > UNHEALTHY_SHARE:
            return f"{cause} for {format_percent(share)} of the time"
    if telemetry.other_process_pids:
        pids = ", ".join(map(str, telemetry.other_process_pids))
        return f"another process used the GPU (pid {pids})"
    foreign_bytes = telemetry.foreign_memory_bytes
    if foreign_bytes is not None and foreign_bytes > FOREIGN_FROM_BYTES:
        return (
            f"other memory in use: {format_value(foreign_bytes, 'B')} of the GPU when the test began "
            "(`nvidia-smi` may name the process; end it, or use another GPU)"
        )
    return None


def _narrowness(telemetry: Telemetry, usual_clock_mhz: float | None, kind: Kind | None) -> str | None:
    """What stays until somebody changes it: a clock, a link."""
    clock_mhz = telemetry.sm_clock_mhz
    if clock_mhz and usual_clock_mhz and clock_mhz < CLOCK_FLOOR * usual_clock_mhz:
        return f"the SM clock was {clock_mhz:.0f} MHz, {usual_clock_mhz:.0f} MHz in the baseline"
    return _narrow_link(telemetry) if kind in _OVER_PCIE else None


def _narrow_link(telemetry: Telemetry) -> str | None:
    generation, width = telemetry.pcie_generation, telemetry.pcie_width
    most_generation, most_width = telemetry.pcie_most_generation, telemetry.pcie_most_width
    if not (generation and width and most_generation and most_width):
        return None
    if generation >= most_generation and width >= most_width:
        return None
    return (
        f"the PCIe link ran as Gen {generation} x{width}, and GPU and slot can do Gen {most_generation} x{most_width} "
        "(look at `nvidia-smi -q -d PCIE` and `sudo dmesg | grep -i pcie`; reseat the GPU)"
    )


def cool_down(
    nvml: Nvml | None,
    uuids: Sequence[str],
    *,
    limit_s: float = 60.0,
    cool_c: float = COOL_C,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Wait until devices are well: no slowdown by heat or power brake goes on, nobody else is there, and it is cooler.

    Cooler is 10 K below the beginning, or `cool_c`. Looks once a second.

    Args:
        nvml: The driver's library, or `None` where there is none: then there is nothing to wait for.
        uuids: Devices that the caller holds.
        limit_s: Longest wait.
        cool_c: Temperature in °C at which a device is cool, however it began.
        clock: Seconds from any start.
        sleep: Waits for some seconds.

    Returns:
        What happened, in words for a message.

    Raises:
        DeviceError: A device was lost.
    """
    if nvml is None or not uuids:
        return "there is no GPU to wait for"
    begin_s = clock()
    first = before = [nvml.state(uuid) for uuid in uuids]
    while True:
        sleep(LOOK_EVERY_S)
        now = [nvml.state(uuid) for uuid in uuids]
        waited_s = clock() - begin_s
        obstacle = _obstacle(first, before, now, cool_c)
        if obstacle is None:
            return f"well again after {waited_s:.0f} s{_fall(first, now)}"
        if waited_s >= limit_s:
            return f"still unwell after {waited_s:.0f} s{_fall(first, now)}: {obstacle}"
        before = now


def _obstacle(
    first: Sequence[GpuState], before: Sequence[GpuState], now: Sequence[GpuState], cool_c: float
) -> str | None:
    """What still keeps devices from being well, with what mends it."""
    if any((grown or 0.0) > 0 for name in _COUNTERS for grown in _differences(name, before, now)):
        return "the driver still slows the clock down. Improve the cooling or the power supply, or use another GPU"
    if others := _other_processes(now):
        pids = ", ".join(map(str, others))
        return f"another process uses the GPU (pid {pids}). End it, or use another GPU"
    pairs = [(a.temperature_c, b.temperature_c) for a, b in zip(first, now, strict=True)]
    if any(_is_hot(start, end, cool_c) for start, end in pairs):
        return f"it is neither {FALL_C:.0f} K cooler nor at {cool_c:.0f} °C. Improve the cooling, or use another GPU"
    return None


def _is_hot(start_c: float | None, now_c: float | None, cool_c: float) -> bool:
    """Whether a device is not cool, nor cooler; one that does not tell its temperature is not waited for."""
    return start_c is not None and now_c is not None and now_c > cool_c and now_c > start_c - FALL_C


def _fall(first: Sequence[GpuState], now: Sequence[GpuState]) -> str:
    start_c = _largest(state.temperature_c for state in first)
    end_c = _largest(state.temperature_c for state in now)
    return "" if start_c is None or end_c is None else f", {start_c:.0f} °C then, {end_c:.0f} °C now"


def _united(others: Collection[int], found: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return tuple(sorted({*others, *(found or ())})) if others or found is not None else None


def _other_processes(states: Iterable[GpuState]) -> tuple[int, ...] | None:
    return _others_among(state.process_pids for state in states)


def _others_among(pids: Iterable[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Processes on the device that are neither we nor of our family; `None` where the driver does not tell.

    A container sees the host's process ids, which say nothing about who is who: such a pid does not exist here.
    """
    told = [one for one in pids if one is not None]
    if not told:
        return None
    known = [pid for one in told for pid in one]
    return tuple(sorted({pid for pid in known if is_running(pid) and not _is_family(pid)}))


def _is_family(pid: int) -> bool:
    """Whether the process is this one, its ancestor or child, or in a worker of pytest-xdist another worker."""
    own = _ancestors(os.getpid())
    roots = own[:2] if "PYTEST_XDIST_WORKER" in os.environ else own[:1]
    if FAMILY_VARIABLE in os.environ:
        roots.append(int(os.environ[FAMILY_VARIABLE]))
    return pid in own or bool(set(_ancestors(pid)) & set(roots))


def _uses_cuda() -> bool:
    """Whether this process may hold memory of a GPU; torch alone can say that it does not."""
    if any(name in sys.modules for name in _CUDA_LIBRARIES):
        return True
    torch = sys.modules.get("torch")
    return bool(torch.cuda.is_initialized()) if torch else _has_cuda_open(os.getpid())


def _relatives() -> set[int]:
    """The living children of this process, and theirs; in a run of several processes all that belong to it."""
    own = os.getpid()
    roots = {os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else own}
    roots |= {int(os.environ[FAMILY_VARIABLE])} if FAMILY_VARIABLE in os.environ else set()
    found, due = set(roots), list(roots)
    while due:
        children = _children(due.pop()) - found
        found |= children
        due += children
    return found - {own}


def _children(pid: int) -> set[int]:
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended
        return set()
    return {int(child) for text in lists for child in text.split()}


def _has_cuda_open(pid: int) -> bool:
    try:
        files = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it has ended
        return False
    return any(_target(path) == _CUDA_FILE for path in files)


def _target(link: Path) -> str | None:
    try:
        return str(link.readlink())
    except OSError:  # it was closed meanwhile
        return None


def _ancestors(pid: int) -> list[int]:
    """The process and its parents; the first one may be ours, as in a container that runs nothing but pytest."""
    line: list[int] = []
    while pid > 0:
        line.append(pid)
        pid = parent_of(pid)
    return line


def _differences(name: str, before: Sequence[GpuState], after: Sequence[GpuState]) -> list[float | None]:
    """How far a counter of each device has come."""
    return [grown(getattr(b, name), getattr(a, name)) for b, a in zip(before, after, strict=True)]


def _share(name: str, before: Sequence[GpuState], after: Sequence[GpuState], duration_s: float) -> float | None:
    worst_s = _largest(_differences(name, before, after))
    return None if worst_s is None or duration_s <= 0 else min(worst_s / duration_s, 1.0)


def _largest(values: Iterable[Number | None]) -> Number | None:
    return max((value for value in values if value is not None), default=None)
