"""GPUs that turned out to be sick: who they are, why, and what is left to measure on."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.sickness import describe
from pytest_gpuperf.vitals import Window


class Quarantine:
    """The GPUs of one process that are out of use for the rest of its run.

    Args:
        machine: Whose GPUs they are.
        notes: Gets a line for each GPU that is taken out of use.
    """

    def __init__(self, machine: Machine, notes: list[str]) -> None:
        self._machine = machine
        self._notes = notes
        self._reasons: dict[str, str] = {}
        self._window: Window | None = None
        self._is_listening = False

    def examine(self, devices: Sequence[Device], when: str) -> str | None:
        """Look whether GPUs are fit, and take those that are not out of use.

        Args:
            devices: The CPU is always fit.
            when: For the note, such as `in test_matmul`.

        Returns:
            Why one of them is out of use, now or since earlier; `None` if all are fit.
        """
        self._listen()
        for device in devices:
            if device.kind == "cuda" and device.uuid_hash not in self._reasons:
                self._examine(device, when)
        return self.reason([device.uuid_hash for device in devices])

    def _listen(self) -> None:
        """Hear the errors of all GPUs from the first test on: on those that are not its own, others may cause some."""
        vitals = self._machine.vitals
        if self._is_listening or vitals is None:
            return
        self._is_listening = True
        for device in self._machine.devices:
            if device.kind == "cuda":
                with suppress(DeviceError):  # lost: whoever gets it is told
                    vitals.look(_whole(device))

    def _examine(self, device: Device, when: str) -> None:
        vitals = self._machine.vitals
        if vitals is None:
            return
        found, name = vitals.sickness(_whole(device)), self._name(device)
        in_full = f"{name.removesuffix(')')}, {device.uuid})"
        if found:
            info = vitals.info(_whole(device))
            prefix = f"GPU {info.index} ({info.name}, {info.uuid}) " if info else None
            reason = f"it {found.removeprefix(prefix)}" if prefix and found.startswith(prefix) else found
            self._reasons[device.uuid_hash] = f"{name} was taken out of use: {reason}"
            self._notes.append(f"{in_full} was taken out of use {when}: {reason}")
        elif vitals.is_remap_pending(_whole(device)):
            note = f"{in_full}: a row of memory waits to be replaced. Reset the GPU when it is free: "
            note += "`sudo nvidia-smi --gpu-reset`"
            self._notes += [note] if note not in self._notes else []

    def _name(self, device: Device) -> str:
        """What the GPU is called where everybody may read it: by the driver's number, as in `nvidia-smi`."""
        info = self._machine.vitals.info(_whole(device)) if self._machine.vitals else None
        return f"GPU {info.index} ({device.name})" if info else f"{device.device} ({device.name})"

    def reason(self, hashes: Iterable[str]) -> str | None:
        """Why one of some devices is out of use, in words that hold no UUID; `None` if none is.

        Args:
            hashes: Hashed UUIDs.
        """
        return next((self._reasons[each] for each in hashes if each in self._reasons), None)

    def fit(self, devices: Sequence[Device]) -> tuple[Device, ...]:
        """Those devices that are not out of use."""
        return tuple(device for device in devices if device.uuid_hash not in self._reasons)

    @contextmanager
    def watch(self, devices: Sequence[Device], test: str) -> Iterator[None]:
        """Hear the errors of the devices that a test holds, from before its fixtures until after them.

        Raises:
            DeviceError: One of them is lost already.
        """
        uuids = [_whole(device) for device in devices if device.kind == "cuda"]
        try:
            self._window = Window(self._machine.vitals, uuids) if uuids and self._machine.vitals else None
            yield
        finally:
            self._window = None
            self.examine(devices, f"in {test}")

    def errors(self, devices: Sequence[Device]) -> str:
        """What the driver reported of the devices since the test began, one line an error; nothing: empty.

        Another process's kernel, or the test's own, may be the cause: a failing test's message may name it.
        """
        if self._window is None:
            return ""
        rows = [(self._name(device), self._window.xids(_whole(device))) for device in devices]
        return "\n".join(f"{name}: {describe(code)}" for name, codes in rows for code in dict.fromkeys(codes or ()))


def _whole(device: Device) -> str:
    """The GPU that a MIG instance is a part of: the driver reports errors of whole GPUs."""
    return device.parent_uuid or device.uuid
