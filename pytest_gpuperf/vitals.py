"""The vital signs of each GPU's hardware, kept from its first test to the end of the process.

Errors that come between two measurements, or two tests, are heard at the next look.
"""

from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import GpuCondition, GpuInfo, Number, Nvml, grown
from pytest_gpuperf.records import Record
from pytest_gpuperf.sickness import sickness


class Signs(Record, frozen=True, kw_only=True):
    """What the hardware of one or more GPUs showed over some time; see the fields of `Telemetry`, which are these."""

    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    is_remap_pending: bool | None = None
    has_remap_failed: bool | None = None
    xids: tuple[int, ...] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_most_generation: int | None = None
    pcie_most_width: int | None = None


class Vitals:
    """What the driver says of the hardware's health, and has said since a GPU was first looked at.

    Args:
        nvml: The driver's library.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._infos: dict[str, GpuInfo] | None = None
        self._meters: dict[str, Callable[[], tuple[int, ...]] | None] = {}
        self._xids: dict[str, list[int]] = {}
        self._first: dict[str, GpuCondition] = {}
        self._last: dict[str, GpuCondition] = {}

    def look(self, uuid: str) -> GpuCondition:
        """Read the condition of a GPU, and hear the errors since the last look.

        Raises:
            DeviceError: It is lost.
        """
        self.info(uuid)  # while it is there
        if uuid not in self._meters:
            self._meters[uuid] = self._nvml.error_meter(uuid)
        if meter := self._meters[uuid]:
            self._xids.setdefault(uuid, []).extend(meter())
        self._last[uuid] = self._nvml.condition(uuid)
        self._first.setdefault(uuid, self._last[uuid])
        return self._last[uuid]

    def info(self, uuid: str) -> GpuInfo | None:
        """What does not change of a GPU; `None` for a MIG instance, or where the driver does not tell."""
        if self._infos is None:
            try:
                self._infos = {info.uuid: info for info in self._nvml.gpus()}
            except DeviceError:
                return None
        return self._infos.get(uuid)

    def xids(self, uuid: str) -> tuple[int, ...] | None:
        """All errors of a GPU that were heard so far; `None` where the driver does not tell."""
        return tuple(self._xids.get(uuid, ())) if self._meters.get(uuid) else None

    def is_remap_pending(self, uuid: str) -> bool:
        """Whether a row of memory waited to be replaced at the last look."""
        return bool(uuid in self._last and self._last[uuid].is_remap_pending)

    def sickness(self, uuid: str) -> str | None:
        """Look at a GPU, and say what makes it unfit for the rest of the run, with the mend; `None` if nothing does."""
        try:
            now = self.look(uuid)
        except DeviceError as error:
            return str(error)
        return sickness(
            xids=self.xids(uuid) or (),
            ecc_uncorrected=grown(self._first[uuid].ecc_uncorrected, now.ecc_uncorrected),
            has_remap_failed=now.has_remap_failed,
        )


class Window:
    """The vital signs of some GPUs from now on.

    Args:
        vitals: What looks at them.
        uuids: The GPUs.

    Raises:
        DeviceError: One of them is lost; so do `look` and `end`.
    """

    def __init__(self, vitals: Vitals, uuids: Sequence[str]) -> None:
        self._vitals = vitals
        self._uuids = tuple(uuids)
        self._heard = {uuid: len(vitals.xids(uuid) or ()) for uuid in uuids}
        self._before = {uuid: vitals.look(uuid) for uuid in uuids}
        self._between: dict[str, list[GpuCondition]] = {uuid: [] for uuid in uuids}

    def look(self) -> None:
        """Look at the GPUs in between, while they work: their links are awake."""
        for uuid in self._uuids:
            self._between[uuid].append(self._vitals.look(uuid))

    def xids(self, uuid: str) -> tuple[int, ...] | None:
        """Errors of one GPU that were heard so far, with those between the look before the window and its first."""
        heard = self._vitals.xids(uuid)
        return None if heard is None else heard[self._heard[uuid] :]

    def end(self) -> Signs:
        """Look once more, and sum up: errors are summed over the GPUs, flags any one's, the link is the worst one's."""
        pairs = [(self._before[uuid], self._vitals.look(uuid)) for uuid in self._uuids]
        heard = [self.xids(uuid) for uuid in self._uuids]
        known = [codes for codes in heard if codes is not None]
        signs = Signs(
            ecc_corrected=sum_of_all([grown(before.ecc_corrected, now.ecc_corrected) for before, now in pairs]),
            ecc_uncorrected=sum_of_all([grown(before.ecc_uncorrected, now.ecc_uncorrected) for before, now in pairs]),
            is_remap_pending=_any(now.is_remap_pending for _, now in pairs),
            has_remap_failed=_any(now.has_remap_failed for _, now in pairs),
            xids=tuple(code for codes in known for code in codes) if known else None,
        )
        return self._with_link(signs)

    def _with_link(self, signs: Signs) -> Signs:
        """Add the link that is furthest from what it can do, at the best that it was."""
        links = [link for uuid in self._uuids if (link := self._link(uuid))]
        if not links:
            return signs
        generation, width, most_generation, most_width = min(
            links, key=lambda one: 2.0 ** (one[0] - one[2]) * one[1] / one[3]
        )
        return replace(
            signs,
            pcie_generation=generation,
            pcie_width=width,
            pcie_most_generation=most_generation,
            pcie_most_width=most_width,
        )

    def _link(self, uuid: str) -> tuple[int, int, int, int] | None:
        info, seen = self._vitals.info(uuid), self._between[uuid]
        generation = max((one.pcie_generation for one in seen if one.pcie_generation), default=None)
        width = max((one.pcie_width for one in seen if one.pcie_width), default=None)
        if not (info and generation and width and info.pcie_generation and info.pcie_width):
            return None
        return generation, width, info.pcie_generation, info.pcie_width


def sum_of_all(values: Sequence[Number | None]) -> Number | None:
    """Add up values of several GPUs; `None` unless each of them is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _any(flags: Iterable[bool | None]) -> bool | None:
    known = [flag for flag in flags if flag is not None]
    return any(known) if known else None
