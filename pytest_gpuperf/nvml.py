"""What the driver says of the GPUs: the one importer of pynvml, behind a Protocol.

A fake and a replay of it are in `pytest_gpuperf.testing`. Constants and units are those of nvml.h. What a GPU, a
driver or a user cannot have is `None`, never 0; a GPU that is lost is a DeviceError.
"""

from typing import Any, Protocol

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.records import Record

#: Fields of nvmlDeviceGetFieldValues: nanoseconds since the driver was loaded in which the clock was held down by the
#: power cap, sync boost, software thermal, hardware thermal slowdown and the power brake (nvml.h).
_SLOWDOWN_FIELDS = (74, 76, 269, 270, 271)

#: INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH (an older driver asked
#: for a newer structure), DEPRECATED, UNKNOWN: this one value cannot be had, and the rest can.
_UNAVAILABLE = frozenset({2, 3, 4, 13, 25, 26, 999})

_NO_PERMISSION = 4
#: GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND.
_LOST = {15: "is lost: it has fallen off the bus", 16: "needs a reset", 28: "is not there any more"}

_ON_CPU = "To measure on the CPU instead: --gpuperf-device=cpu."

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


class Nvml(Protocol):
    """What this package asks of the driver. Each call raises DeviceError when the GPU is lost."""

    def driver_version(self) -> str | None:
        """Version of the NVIDIA driver, such as `580.159.04`."""

    def cuda_version(self) -> str | None:
        """Newest CUDA that the driver can run, such as `13.0`."""

    def gpus(self) -> tuple[GpuInfo, ...]:
        """All GPUs that this user may open, in PCI bus order."""

    def sample(self, uuid: str) -> GpuSample:
        """Read clock, power and temperature: three calls."""

    def state(self, uuid: str) -> GpuState:
        """Read everything that changes."""

    def has_nvlink(self, uuid_a: str, uuid_b: str) -> bool | None:
        """Say whether two GPUs reach each other's memory over NVLink; `None` if the driver does not tell."""


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
        raise DeviceError(f"{cause} {_ON_CPU}") from None
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
        count = self._must("the driver", "nvmlDeviceGetCount")
        infos = (self._info(index) for index in range(count))
        return tuple(info for info in infos if info is not None)

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
        processes = self._read(uuid, "nvmlDeviceGetComputeRunningProcesses_v3")
        return GpuState(
            sm_clock_mhz=now.sm_clock_mhz,
            memory_clock_mhz=_scaled(self._read(uuid, "nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM), 1),
            power_w=now.power_w,
            energy_j=_scaled(self._read(uuid, "nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
            temperature_c=now.temperature_c,
            memory_used_bytes=None if memory is None else int(memory.used),
            power_cap_s=power_cap,
            sync_boost_s=sync_boost,
            sw_thermal_s=sw_thermal,
            hw_thermal_s=hw_thermal,
            power_brake_s=power_brake,
            process_pids=None if processes is None else tuple(sorted(process.pid for process in processes)),
        )

    def has_nvlink(self, uuid_a: str, uuid_b: str) -> bool | None:
        nvml = self._pynvml
        other = self._handle(uuid_b)
        status = self._read(uuid_a, "nvmlDeviceGetP2PStatus", other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        return None if status is None else status == nvml.NVML_P2P_STATUS_OK

    def _info(self, index: int) -> GpuInfo | None:
        handle = self._open(index)
        if handle is None:
            return None
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
                raise _lost(self._labels.get(uuid, f"GPU {uuid}"), field.nvmlReturn)
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
        return _lost(who, error.value)
    return DeviceError(f"{who}: {function} failed: {error} (code {error.value}). Run `nvidia-smi` to see its state.")


def _lost(who: str, code: int) -> DeviceError:
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


def _text(value: str | bytes) -> str:
    # nvidia-ml-py before 11.510 gives bytes.
    return value.decode() if isinstance(value, bytes) else value
