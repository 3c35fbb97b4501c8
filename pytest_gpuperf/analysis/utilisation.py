"""How busy GPUs were while a run held them, and what their idle time cost."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.monitor import ENERGY_FROM_S
from pytest_gpuperf.nvml import Nvml, grown
from pytest_gpuperf.records import LeaseUse, Record
from pytest_gpuperf.units import format_percent

#: The driver's own sampling period is a sixth of a second to a second.
SAMPLE_EVERY_S = 0.5


class Use(Record, frozen=True, kw_only=True):
    """Leases of one or more GPUs, added up.

    Attributes:
        leased_s: Of all of them.
        known_s: Of those whose busy share is known.
        busy_s: Part of it in which a kernel ran.
    """

    leased_s: float
    known_s: float
    busy_s: float

    @property
    def busy_share(self) -> float | None:
        """Part of the leased time in which a kernel ran, as far as it is known."""
        return self.busy_s / self.known_s if self.known_s > 0 else None

    def cost(self, per_gpu_hour: float) -> float:
        """What the leased time cost, in the currency of the price of a GPU's hour."""
        return self.leased_s / 3600 * per_gpu_hour

    def idle_cost(self, per_gpu_hour: float) -> float | None:
        """Part of `cost` for time in which no kernel ran; leases of which this is not known count as the others."""
        return None if self.busy_share is None else self.cost(per_gpu_hour) * (1 - self.busy_share)


def added_up(uses: Sequence[LeaseUse]) -> Use:
    """Add leases up."""
    known = [(use.duration_s, use.busy_share) for use in uses if use.busy_share is not None]
    return Use(
        leased_s=sum(use.duration_s for use in uses),
        known_s=sum(duration_s for duration_s, _ in known),
        busy_s=sum(duration_s * share for duration_s, share in known),
    )


def utilisation_lines(uses: Sequence[LeaseUse], *, per_gpu_hour: float | None = None) -> list[str]:
    """Say how busy leased GPUs were, in all and, if there are several, one by one.

    Nothing where nothing was leased, or where neither a busy share nor a price is known.

    Args:
        uses: Of a whole run, all workers together.
        per_gpu_hour: Price of a GPU's hour, in any currency; `None`: no costs.
    """
    whole = added_up(uses)
    if not uses or (whole.busy_share is None and per_gpu_hour is None):
        return []
    gpus = {use.device: use.name for use in uses}
    lines = [f"GPUs leased {_duration(whole.leased_s)} in all, {_busy_words(whole)}{_cost_words(whole, per_gpu_hour)}"]
    if len(gpus) > 1:
        for device, name in sorted(gpus.items(), key=lambda item: (item[1], item[0])):
            one = added_up([use for use in uses if use.device == device])
            lines.append(f"  {name} {device}: leased {_duration(one.leased_s)}, {_busy_words(one)}")
    return lines


class LeaseMeter:
    """Reads GPUs twice a second while this process holds them, in one thread.

    The share of a lease that is shorter than the driver's sampling period is that of the period.

    Args:
        nvml: The driver's library.
        worker: Name of the worker of pytest-xdist that this is.
        clock: Seconds from any start.

    Attributes:
        uses: Leases that have ended, and that nobody has taken yet.
    """

    def __init__(self, nvml: Nvml, *, worker: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.uses: list[LeaseUse] = []
        self._nvml, self._worker, self._clock = nvml, worker, clock

    @contextlib.contextmanager
    def holding(self, devices: Sequence[Device]) -> Iterator[None]:
        """Read GPUs while the body of a `with` statement runs; other devices are none of ours."""
        held = [_Held(self._nvml, device, self._clock) for device in devices if device.kind == "cuda"]
        begin, over = datetime.now(UTC), threading.Event()
        sampler = threading.Thread(target=_read_until, args=(over, held), name="gpuperf-utilisation", daemon=True)
        if held:
            sampler.start()
        try:
            yield
        finally:
            over.set()
            if held:
                sampler.join()
            end = datetime.now(UTC)
            self.uses += [one.use(begin, end, self._worker) for one in held]

    def take(self) -> list[LeaseUse]:
        """Hand over the leases that have ended."""
        taken, self.uses = self.uses, []
        return taken


def _read_until(over: threading.Event, held: "Sequence[_Held]") -> None:
    while not over.wait(SAMPLE_EVERY_S):
        for one in held:
            one.read()


class _Held:
    """One GPU of a lease. One that is lost is the test's trouble, which fails for it: here it is only not read."""

    def __init__(self, nvml: Nvml, device: Device, clock: Callable[[], float]) -> None:
        self._nvml, self._device, self._clock = nvml, device, clock
        self._begin_s = self._read_s = clock()
        self._known_s = self._busy_s = 0.0
        self._begin_j = self._energy_j()

    def read(self) -> None:
        now_s = self._clock()
        with contextlib.suppress(DeviceError):
            share = self._nvml.usage(self._device.uuid).busy_share
            if share is not None:
                self._known_s += now_s - self._read_s
                self._busy_s += share * (now_s - self._read_s)
        self._read_s = now_s

    def use(self, begin: datetime, end: datetime, worker: str | None) -> LeaseUse:
        self.read()
        duration_s = self._read_s - self._begin_s
        return LeaseUse(
            device=self._device.uuid_hash,
            name=self._device.name,
            begin=begin.isoformat(timespec="milliseconds"),
            end=end.isoformat(timespec="milliseconds"),
            duration_s=duration_s,
            busy_share=self._busy_s / self._known_s if self._known_s > 0 else None,
            energy_j=grown(self._begin_j, self._energy_j()) if duration_s >= ENERGY_FROM_S else None,
            worker=worker,
        )

    def _energy_j(self) -> float | None:
        with contextlib.suppress(DeviceError):
            return self._nvml.energy_j(self._device.uuid)
        return None


def _busy_words(use: Use) -> str:
    share = use.busy_share
    if share is None:
        return "the driver does not tell how busy"
    known = "" if use.known_s > 0.99 * use.leased_s else f" (known of {format_percent(use.known_s / use.leased_s)})"
    return f"busy {format_percent(share)} of it, idle {format_percent(1 - share)}{known}"


def _cost_words(use: Use, per_gpu_hour: float | None) -> str:
    if per_gpu_hour is None:
        return ""
    idle = use.idle_cost(per_gpu_hour)
    of_which = "" if idle is None else f", of which {_amount(idle)} for idle time"
    return f"; at {_amount(per_gpu_hour)} an hour {_amount(use.cost(per_gpu_hour))}{of_which}"


def _amount(amount: float) -> str:
    """Two decimals, or two digits of what is less than a tenth.

    >>> _amount(2.5), _amount(0.00123)
    ('2.50', '0.0012')
    """
    return f"{amount:,.2f}" if amount >= 0.1 or amount <= 0 else f"{amount:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
