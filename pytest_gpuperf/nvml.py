"""What the driver says of the GPUs: the one importer of pynvml, behind a Protocol.

A fake and a replay of it are in `pytest_gpuperf.testing`. Constants and units are those of nvml.h. What a GPU, a
driver or a user cannot have is `None`, never 0; a GPU that is lost is a DeviceError.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, TypeVar

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml_meters import GpuActivity, activity_meter, error_meter
from pytest_gpuperf.records import Record

#: Fields of nvmlDeviceGetFieldValues: nanoseconds since the driver was loaded in which the clock was held down by the
#: power cap, sync boost, software thermal, hardware thermal slowdown and the power brake (nvml.h).
_SLOWDOWN_FIELDS = (74, 76, 269, 270, 271)

#: INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH (an older driver asked
#: for a newer structure), DEPRECATED, UNKNOWN: this one value cannot be had, and the rest can.
_UNAVAILABLE = frozenset({2, 3, 4, 13, 25, 26, 999})

_NO_PERMISSION, _NOT_FOUND = 4, 6
#: nvmlGpuTopologyLevel_t -> where the paths of two GPUs meet.
_MEETING_PLACES: dict[int, "Ancestor"] = {
    0: "board",
    10: "switch",
    20: "switches",
    30: "host-bridge",
    40: "numa-node",
    50: "system",
}
#: Bits of nvmlDeviceGetCurrentClocksEventReasons -> what holds the clock down (nvml.h).
_HOLDS = {
    0x1: "idle",
    0x2: "clock setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clock",
    0x200: "board limit",
    0x400: "reliability",
}
#: Compute modes (nvmlComputeMode_t).
_COMPUTE_MODES: dict[int, "ComputeMode"] = {0: "default", 2: "prohibited", 3: "exclusive process"}

Number = TypeVar("Number", int, float)
#: Where the paths from two GPUs meet, the closest first: one board, one PCIe switch, several, the host bridge, the
#: NUMA node, or only the link between processors.
Ancestor = Literal["board", "switch", "switches", "host-bridge", "numa-node", "system"]
ComputeMode = Literal["default", "prohibited", "exclusive process"]
#: GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND.
_LOST = {15: "is lost: it has fallen off the bus", 16: "needs a reset", 28: "is not there any more"}


#: nvmlReturn_t of nvmlInit -> what is wrong and what mends it.
_CANNOT_OPEN = {
    4: "This user may not talk to the NVIDIA driver. See who may with `ls -l /dev/nvidia*`; often it is the group "
    "video: `sudo usermod -aG video $USER`, then log in again.",
    9: "The NVIDIA driver is installed but not loaded. Run `sudo modprobe nvidia`, or reboot; "
    "`sudo dmesg | grep -i nvidia` says why it did not load.",
    11: "The kernel has trouble with a GPU's interrupts (NVML IRQ issue). Look at `sudo dmesg | grep -i nvrm`, "
    "check the GPU's power cables and seat, and reboot.",
    12: "No NVIDIA driver was found (libnvidia-ml.so.1 is missing). Install the driver, or start the container with "
    "`--gpus all` and the NVIDIA container toolkit.",
    18: "The NVIDIA library and the loaded driver have different versions: the driver was updated and the machine "
    "not rebooted. Reboot, or unload and load the nvidia kernel modules; restart a container.",
}


class GpuInfo(Record, frozen=True, kw_only=True):
    """What does not change while a run lasts.

    Attributes:
        index: NVML's, in PCI bus order, as nvidia-smi prints it.
        uuid: `GPU-` and 36 characters.
        pci_device_id: Four lower-case hex digits, such as `2330`.
        memory_bytes: All of it, what the driver reserves included.
        compute_capability: Such as `9.0`.
        core_count: CUDA cores (32-bit floating-point lanes).
        max_memory_clock_mhz: Bandwidth is this x 2 x bus width.
        power_limit_w: The limit that is enforced now.
        mig_enabled: The GPU is divided into MIG instances.
        pcie_generation: The most that GPU and slot can do together; an idle link trains down, so not the current one.
        persistence: Whether the driver stays loaded when no process uses the GPU.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    pci_device_id: str | None = None
    compute_capability: str | None = None
    core_count: int | None = None
    memory_bus_bits: int | None = None
    max_sm_clock_mhz: float | None = None
    max_memory_clock_mhz: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    mig_enabled: bool | None = None
    ecc_enabled: bool | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    persistence: bool | None = None


class GpuSample(Record, frozen=True, kw_only=True):
    """The three cheap readings that are polled every 100 ms.

    Attributes:
        power_w: Mean of the last second on Ampere (not GA100) and later, of the instant before (nvml.h).
    """

    sm_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


class GpuState(Record, frozen=True, kw_only=True):
    """Everything that changes, read before and after a measurement.

    Attributes:
        energy_j: Since the driver was loaded. Refreshed about every 100 ms: differences need 5 s and more.
        memory_used_bytes: By all processes, without what the driver reserves (NVML memory v2).
        power_cap_s: Seconds since the driver was loaded in which the clock was held down by the power limit; the next
            four are the same for other causes.
        process_pids: Processes with a compute context; containers see the host's numbers, or none.
    """

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: float | None = None
    memory_used_bytes: int | None = None
    power_cap_s: float | None = None
    sync_boost_s: float | None = None
    sw_thermal_s: float | None = None
    hw_thermal_s: float | None = None
    power_brake_s: float | None = None
    process_pids: tuple[int, ...] | None = None


def grown(before: Number | None, now: Number | None) -> Number | None:
    """Say how far a counter of the driver has come; one that went back was set to zero meanwhile, and says nothing."""
    return None if before is None or now is None or now < before else now - before


class GpuUsage(Record, frozen=True, kw_only=True):
    """What a live view shows, in few and cheap calls.

    Attributes:
        busy_share: Share of the driver's last sampling period, 1/6 s to 1 s, in which a kernel ran; one warp counts.
        memory_busy_share: Share of it in which memory was read or written; no measure of bandwidth.
        holds: What holds the clock down now, in words; nothing: `()`.
    """

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    busy_share: float | None = None
    memory_busy_share: float | None = None
    memory_used_bytes: int | None = None
    holds: tuple[str, ...] | None = None


class GpuCondition(Record, frozen=True, kw_only=True):
    """How healthy the hardware is: what seldom changes, and then matters.

    Attributes:
        ecc_corrected: Errors of memory since the driver was loaded that were corrected; a driver of many years, or a
            GPU without ECC, does not tell.
        ecc_uncorrected: Those that were not.
        remapped_rows: Rows of memory replaced by spare ones, in the GPU's life.
        is_remap_pending: A row waits to be replaced, which a reset of the GPU does.
        has_remap_failed: No spare row was left: the GPU is to be replaced.
        pcie_generation: The link's now; an idle link trains down.
        pcie_width: Lanes of the link now.
    """

    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    remapped_rows: int | None = None
    is_remap_pending: bool | None = None
    has_remap_failed: bool | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    compute_mode: ComputeMode | None = None


class AbsentGpu(Record, frozen=True, kw_only=True):
    """A GPU that the driver counts and that does not answer.

    Attributes:
        index: The driver's number.
        reason: Why, and what to do.
    """

    index: int
    reason: str


class Nvml(Protocol):
    """What this package asks of the driver. Each call raises DeviceError when the GPU is lost."""

    def driver_version(self) -> str | None:
        """Version of the NVIDIA driver, such as `580.159.04`."""

    def cuda_version(self) -> str | None:
        """Newest CUDA that the driver can run, such as `13.0`."""

    def gpus(self) -> tuple[GpuInfo, ...]:
        """All GPUs that this user may open and that answer, in PCI bus order."""

    def absent(self) -> tuple[AbsentGpu, ...]:
        """Those that do not answer: lost, in need of a reset, or gone."""

    def sample(self, uuid: str) -> GpuSample:
        """Read clock, power and temperature: three calls."""

    def state(self, uuid: str) -> GpuState:
        """Read everything that changes: 5 ms of a CPU on an H200, nearly all of them for the energy."""

    def usage(self, uuid: str) -> GpuUsage:
        """Read what a live view shows: seven cheap calls."""

    def energy_j(self, uuid: str) -> float | None:
        """Read the energy counter, see `GpuState`: 4 ms of a CPU on an H200, so to be asked seldom."""

    def process_pids(self, uuid: str) -> tuple[int, ...] | None:
        """List the processes with a compute context, see `GpuState`: one cheap call."""

    def desktop_memory_bytes(self, uuid: str) -> int | None:
        """Sum the memory of processes that draw, a desktop's: none of a server's; `None` if the driver keeps it."""

    def condition(self, uuid: str) -> GpuCondition:
        """Read how healthy the hardware is."""

    def activity_meter(self, uuid: str) -> Callable[[], GpuActivity | None]:
        """Begin to average the hardware's counters; each call gives the means since the one before.

        `None`: this GPU has no such counters (before Hopper), or the last call was less than 100 ms ago.
        """

    def error_meter(self, uuid: str) -> Callable[[], tuple[int, ...]] | None:
        """Begin to listen for critical errors; each call gives the Xid codes since the one before.

        `None`: the driver does not tell this user.
        """

    def has_nvlink(self, uuid_a: str, uuid_b: str) -> bool | None:
        """Say whether two GPUs reach each other's memory over NVLink; `None` if the driver does not tell."""

    def common_ancestor(self, uuid_a: str, uuid_b: str) -> Ancestor | None:
        """Say where the PCIe paths of two GPUs meet; `None` if the driver does not tell."""

    def mig_instances(self, uuid: str) -> tuple[GpuInfo, ...]:
        """List the MIG instances of a GPU, whose `uuid` begins with `MIG-`; none where MIG is off."""


def open_nvml() -> Nvml:
    """Load NVML and connect to the driver.

    Raises:
        DeviceError: nvidia-ml-py is missing or shadowed, or the driver is missing, not loaded, of another version
            than its library, or closed to this user. The message says what to do.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        raise DeviceError("The package nvidia-ml-py is missing. Run `pip install nvidia-ml-py`.") from None
    # The unofficial package re-exports public names only; zeus tells them apart in the same way.
    if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
        raise DeviceError(
            "The unofficial package pynvml hides NVIDIA's own nvidia-ml-py. "
            "Run `pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py`."
        )
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        cause = _CANNOT_OPEN.get(error.value) or f"NVML cannot be opened: {error}. Run `nvidia-smi` to see why."
        raise DeviceError(cause) from None
    return _DriverNvml(pynvml)


class _DriverNvml:
    """The real one. Handles are looked up once and kept: a look-up costs more than most readings."""

    def __init__(self, pynvml: Any) -> None:
        self._pynvml = pynvml
        self._handles: dict[str, Any] = {}
        self._labels: dict[str, str] = {}

    def driver_version(self) -> str | None:
        version = self._ask("the driver", "nvmlSystemGetDriverVersion")
        return None if version is None else _text(version)

    def cuda_version(self) -> str | None:
        version = self._ask("the driver", "nvmlSystemGetCudaDriverVersion_v2")
        return None if version is None else f"{version // 1000}.{version % 1000 // 10}"

    def gpus(self) -> tuple[GpuInfo, ...]:
        return tuple(one for one in self._counted() if isinstance(one, GpuInfo))

    def absent(self) -> tuple[AbsentGpu, ...]:
        return tuple(one for one in self._counted() if isinstance(one, AbsentGpu))

    def _counted(self) -> Iterator[GpuInfo | AbsentGpu]:
        for index in range(self._must("the driver", "nvmlDeviceGetCount")):
            try:
                info = self._info(index)
            except DeviceError as error:
                yield AbsentGpu(index=index, reason=str(error))
                continue
            if info is not None:
                yield info

    def sample(self, uuid: str) -> GpuSample:
        nvml = self._pynvml
        return GpuSample(
            sm_clock_mhz=_scaled(self._read(uuid, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM), 1),
            power_w=_scaled(self._read(uuid, "nvmlDeviceGetPowerUsage"), 1e-3),
            temperature_c=_scaled(self._read(uuid, "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU), 1),
        )

    def state(self, uuid: str) -> GpuState:
        now, nvml = self.sample(uuid), self._pynvml
        power_cap, sync_boost, sw_thermal, hw_thermal, power_brake = self._slowdowns_s(uuid)
        memory = self._read(uuid, "nvmlDeviceGetMemoryInfo", nvml.nvmlMemory_v2)
        return GpuState(
            sm_clock_mhz=now.sm_clock_mhz,
            memory_clock_mhz=_scaled(self._read(uuid, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM), 1),
            power_w=now.power_w,
            energy_j=self.energy_j(uuid),
            temperature_c=now.temperature_c,
            memory_used_bytes=None if memory is None else int(memory.used),
            power_cap_s=power_cap,
            sync_boost_s=sync_boost,
            sw_thermal_s=sw_thermal,
            hw_thermal_s=hw_thermal,
            power_brake_s=power_brake,
            process_pids=self.process_pids(uuid),
        )

    def energy_j(self, uuid: str) -> float | None:
        return _scaled(self._read(uuid, "nvmlDeviceGetTotalEnergyConsumption"), 1e-3)

    def process_pids(self, uuid: str) -> tuple[int, ...] | None:
        processes = self._read(uuid, "nvmlDeviceGetComputeRunningProcesses_v3")
        return None if processes is None else tuple(sorted(process.pid for process in processes))

    def desktop_memory_bytes(self, uuid: str) -> int | None:
        processes = self._read(uuid, "nvmlDeviceGetGraphicsRunningProcesses_v3")
        each = None if processes is None else [process.usedGpuMemory for process in processes]
        return None if each is None or None in each else sum(each)

    def has_nvlink(self, uuid_a: str, uuid_b: str) -> bool | None:
        nvml = self._pynvml
        other = self._handle(uuid_b)
        status = self._read(uuid_a, "nvmlDeviceGetP2PStatus", other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        return None if status is None else status == nvml.NVML_P2P_STATUS_OK

    def usage(self, uuid: str) -> GpuUsage:
        now, nvml = self.sample(uuid), self._pynvml
        rates = self._read(uuid, "nvmlDeviceGetUtilizationRates")
        memory = self._read(uuid, "nvmlDeviceGetMemoryInfo", nvml.nvmlMemory_v2)
        return GpuUsage(
            sm_clock_mhz=now.sm_clock_mhz,
            memory_clock_mhz=_scaled(self._read(uuid, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM), 1),
            power_w=now.power_w,
            temperature_c=now.temperature_c,
            busy_share=None if rates is None else rates.gpu / 100,
            memory_busy_share=None if rates is None else rates.memory / 100,
            memory_used_bytes=None if memory is None else int(memory.used),
            holds=_holds(self._read(uuid, self._name_of_reasons())),
        )

    def condition(self, uuid: str) -> GpuCondition:
        nvml = self._pynvml
        rows = self._read(uuid, "nvmlDeviceGetRemappedRows")
        volatile = nvml.NVML_VOLATILE_ECC
        return GpuCondition(
            ecc_corrected=self._read(
                uuid, "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, volatile
            ),
            ecc_uncorrected=self._read(
                uuid, "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, volatile
            ),
            remapped_rows=None if rows is None else rows[0] + rows[1],
            is_remap_pending=None if rows is None else bool(rows[2]),
            has_remap_failed=None if rows is None else bool(rows[3]),
            pcie_generation=self._read(uuid, "nvmlDeviceGetCurrPcieLinkGeneration"),
            pcie_width=self._read(uuid, "nvmlDeviceGetCurrPcieLinkWidth"),
            compute_mode=_COMPUTE_MODES.get(self._read(uuid, "nvmlDeviceGetComputeMode")),
        )

    def activity_meter(self, uuid: str) -> Callable[[], GpuActivity | None]:
        return activity_meter(self._pynvml, self._handle(uuid))

    def error_meter(self, uuid: str) -> Callable[[], tuple[int, ...]] | None:
        return error_meter(self._pynvml, self._handle(uuid))

    def common_ancestor(self, uuid_a: str, uuid_b: str) -> Ancestor | None:
        level = self._read(uuid_a, "nvmlDeviceGetTopologyCommonAncestor", self._handle(uuid_b))
        return None if level is None else _MEETING_PLACES.get(level)

    def mig_instances(self, uuid: str) -> tuple[GpuInfo, ...]:
        if not _is_on(self._read(uuid, "nvmlDeviceGetMigMode")):
            return ()
        most = self._read(uuid, "nvmlDeviceGetMaxMigDeviceCount") or 0
        handles = (self._mig_handle(uuid, number) for number in range(most))
        return tuple(self._info_of(handle, index) for index, handle in enumerate(filter(None, handles)))

    def _mig_handle(self, uuid: str, number: int) -> Any:
        try:
            return self._pynvml.nvmlDeviceGetMigDeviceHandleByIndex(self._handle(uuid), number)
        except self._pynvml.NVMLError as error:
            if error.value in _UNAVAILABLE or error.value == _NOT_FOUND:  # the instances need not be in a row
                return None
            raise _device_error(f"GPU {uuid}", "nvmlDeviceGetMigDeviceHandleByIndex", error) from None

    def _name_of_reasons(self) -> str:
        # The older name goes with CUDA 14, the newer one came with 12.
        name = "nvmlDeviceGetCurrentClocksEventReasons"
        return name if hasattr(self._pynvml, name) else "nvmlDeviceGetCurrentClocksThrottleReasons"

    def _info(self, index: int) -> GpuInfo | None:
        handle = self._open(index)
        return None if handle is None else self._info_of(handle, index)

    def _info_of(self, handle: Any, index: int) -> GpuInfo:
        uuid = _text(self._must(f"GPU {index}", "nvmlDeviceGetUUID", handle))
        name = _text(self._must(f"GPU {index}", "nvmlDeviceGetName", handle))
        self._handles[uuid] = handle
        self._labels[uuid] = f"GPU {index} ({name}, {uuid})"
        pci = self._read(uuid, "nvmlDeviceGetPciInfo")
        capability = self._read(uuid, "nvmlDeviceGetCudaComputeCapability")
        nvml = self._pynvml
        return GpuInfo(
            index=index,
            uuid=uuid,
            name=name,
            memory_bytes=self._memory_bytes(uuid),
            pci_device_id=None if pci is None else f"{pci.pciDeviceId >> 16:04x}",
            compute_capability=None if capability is None else "{}.{}".format(*capability),
            core_count=self._read(uuid, "nvmlDeviceGetNumGpuCores"),
            memory_bus_bits=self._read(uuid, "nvmlDeviceGetMemoryBusWidth"),
            max_sm_clock_mhz=_scaled(self._read(uuid, "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM), 1),
            max_memory_clock_mhz=_scaled(self._read(uuid, "nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM), 1),
            power_limit_w=_scaled(self._read(uuid, "nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            default_power_limit_w=_scaled(self._read(uuid, "nvmlDeviceGetPowerManagementDefaultLimit"), 1e-3),
            mig_enabled=_is_on(self._read(uuid, "nvmlDeviceGetMigMode")),
            ecc_enabled=_is_on(self._read(uuid, "nvmlDeviceGetEccMode")),
            pcie_generation=self._read(uuid, "nvmlDeviceGetMaxPcieLinkGeneration"),
            pcie_width=self._read(uuid, "nvmlDeviceGetMaxPcieLinkWidth"),
            persistence=_is_on(self._read(uuid, "nvmlDeviceGetPersistenceMode")),
        )

    def _open(self, index: int) -> Any:
        # nvmlDeviceGetCount counts GPUs that a cgroup keeps from this user; CUDA does not see them either (nvml.h).
        try:
            return self._pynvml.nvmlDeviceGetHandleByIndex(index)
        except self._pynvml.NVMLError as error:
            if error.value == _NO_PERMISSION:
                return None
            raise _device_error(f"GPU {index}", "nvmlDeviceGetHandleByIndex", error) from None

    def _memory_bytes(self, uuid: str) -> int:
        memory = self._read(uuid, "nvmlDeviceGetMemoryInfo", self._pynvml.nvmlMemory_v2)
        if memory is None:  # drivers before 510 know version 1 only; the total is the same
            memory = self._must(self._labels[uuid], "nvmlDeviceGetMemoryInfo", self._handles[uuid])
        return int(memory.total)

    def _slowdowns_s(self, uuid: str) -> tuple[float | None, ...]:
        fields = self._read(uuid, "nvmlDeviceGetFieldValues", list(_SLOWDOWN_FIELDS))
        if fields is None:
            return (None,) * len(_SLOWDOWN_FIELDS)
        for field in fields:
            if field.nvmlReturn in _LOST:
                raise loss(self._labels.get(uuid, f"GPU {uuid}"), field.nvmlReturn)
        return tuple(field.value.ullVal * 1e-9 if field.nvmlReturn == 0 else None for field in fields)

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            self._handles[uuid] = self._must(f"GPU {uuid}", "nvmlDeviceGetHandleByUUID", uuid)
        return self._handles[uuid]

    def _read(self, uuid: str, function: str, *arguments: object) -> Any:
        return self._ask(self._labels.get(uuid, f"GPU {uuid}"), function, self._handle(uuid), *arguments)

    def _ask(self, who: str, function: str, *arguments: object) -> Any:
        try:
            return getattr(self._pynvml, function)(*arguments)
        except self._pynvml.NVMLError as error:
            if error.value in _UNAVAILABLE:
                return None
            raise _device_error(who, function, error) from None

    def _must(self, who: str, function: str, *arguments: object) -> Any:
        value = self._ask(who, function, *arguments)
        if value is None:
            raise DeviceError(f"{who} does not answer {function}. Run `nvidia-smi` to see whether it is healthy.")
        return value


def _device_error(who: str, function: str, error: Any) -> DeviceError:
    if error.value in _LOST:
        return loss(who, error.value)
    return DeviceError(f"{who}: {function} failed: {error} (code {error.value}). Run `nvidia-smi` to see its state.")


def loss(who: str, code: int = 15) -> DeviceError:
    """Make the error of a GPU that cannot be used any more.

    Args:
        who: The GPU, as `GPU 0 (NVIDIA H100 80GB HBM3, GPU-...)`.
        code: NVML's: 15 fell off the bus, 16 needs a reset, 28 is gone.
    """
    return DeviceError(
        f"{who} {_LOST[code]}. What was measured on it is not valid. Look for Xid lines with `sudo dmesg | grep Xid`, "
        "take the GPU out of use, then `sudo nvidia-smi --gpu-reset` or reboot."
    )


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value * factor)


def _is_on(mode: Any) -> bool | None:
    """Read a mode; MIG and ECC come as [current, pending]."""
    if mode is None:
        return None
    return bool(mode[0] if isinstance(mode, (list, tuple)) else mode)


def _holds(reasons: int | None) -> tuple[str, ...] | None:
    return None if reasons is None else tuple(word for bit, word in _HOLDS.items() if reasons & bit)


def _text(value: str | bytes) -> str:
    # nvidia-ml-py before 11.510 gives bytes.
    return value.decode() if isinstance(value, bytes) else value
