"""Fakes and replays of hardware, for this package's tests and for yours: no GPU needed, no mock library."""

import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import (
    AbsentGpu,
    Ancestor,
    GpuCondition,
    GpuInfo,
    GpuSample,
    GpuState,
    GpuUsage,
    Nvml,
    loss,
)
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.profiling import Found, Profiler
from pytest_gpuperf.records import ClockName, KernelSummary, KernelUse, Record
from pytest_gpuperf.timing import GPU_PLANS, Call, Estimate

#: Version of the recordings. 1: the first.
_RECORDING_SCHEMA = 1


def fake_gpu(index: int = 0, name: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> GpuInfo:
    """Build a GPU with the numbers of a real H100 SXM and a UUID of its own.

    >>> fake_gpu(1, power_limit_w=500.0).power_limit_w
    500.0
    """
    values: dict[str, Any] = {
        "index": index,
        "name": name,
        "uuid": f"GPU-{index:08x}-0000-4000-8000-{index:012x}",
        "memory_bytes": 85_520_809_984,
        "pci_device_id": "2330",
        "compute_capability": "9.0",
        "core_count": 16_896,
        "memory_bus_bits": 5120,
        "max_sm_clock_mhz": 1980.0,
        "max_memory_clock_mhz": 2619.0,
        "power_limit_w": 700.0,
        "default_power_limit_w": 700.0,
        "mig_enabled": False,
        "ecc_enabled": True,
        "pcie_generation": 5,
        "pcie_width": 16,
        "persistence": True,
    }
    return GpuInfo(**{**values, **changes})


def fake_state(**changes: Any) -> GpuState:
    """Build the state of an idle H100: 345 MHz, 72 W, 31 °C, nothing held back, nobody else there."""
    values: dict[str, Any] = {
        "sm_clock_mhz": 345.0,
        "memory_clock_mhz": 2619.0,
        "power_w": 72.0,
        "energy_j": 1e6,
        "temperature_c": 31.0,
        "memory_used_bytes": 0,
        "power_cap_s": 0.0,
        "sync_boost_s": 0.0,
        "sw_thermal_s": 0.0,
        "hw_thermal_s": 0.0,
        "power_brake_s": 0.0,
        "process_pids": (),
    }
    return GpuState(**{**values, **changes})


def fake_condition(**changes: Any) -> GpuCondition:
    """Build the condition of a sound H100 whose PCIe link is awake."""
    values: dict[str, Any] = {
        "ecc_corrected": 0,
        "ecc_uncorrected": 0,
        "remapped_rows": 0,
        "is_remap_pending": False,
        "has_remap_failed": False,
        "pcie_generation": 5,
        "pcie_width": 16,
        "compute_mode": "default",
    }
    return GpuCondition(**{**values, **changes})


class FakeNvml:
    """A driver that follows a script.

    Args:
        gpus: Default: one H100.
        states: What `state` answers, call by call and for each GPU anew; the last one repeats.
        samples: The same for `sample`; without them it reads the state last given, or the first one.
        nvlinks: Pairs of UUIDs that are connected; `None`: the driver does not tell.
        conditions: What `condition` answers, as `states`; default: nothing is wrong.
        usages: What `usage` answers, as `states`; without them it reads the state last given, or the first one.
        energies_j: What `energy_j` answers, likewise.
        activities: What a meter of activity answers, call by call; default: the GPU has no such counters.
        xids: UUID -> codes that a meter of errors answers, call by call; `None`: the driver does not tell.
        ancestors: Pair of UUIDs -> where their paths meet; of others the driver does not tell.
        instances: UUID -> its MIG instances.
        desktop_memory_bytes: Of each GPU.
        errors: Raised instead of an answer, by the number of the call from 1, counted over all methods, or over one
            of them with `("sample", 3)`.
        lost: UUID -> how many questions about the GPU are answered before it falls off the bus.

    Attributes:
        calls: Names of the methods called, in order.

    >>> FakeNvml(fake_gpu(), errors={("sample", 2): DeviceError("GPU 0 is lost")}).sample(fake_gpu().uuid).power_w
    72.0
    """

    def __init__(  # noqa: PLR0913 - a script, of which a test writes a line or two
        self,
        *gpus: GpuInfo,
        states: Sequence[GpuState] = (),
        samples: Sequence[GpuSample] = (),
        nvlinks: Sequence[tuple[str, str]] | None = (),
        conditions: Sequence[GpuCondition] = (),
        usages: Sequence[GpuUsage] = (),
        energies_j: Sequence[float | None] = (),
        activities: Sequence[GpuActivity] = (),
        xids: Mapping[str, Sequence[tuple[int, ...]]] | None = MappingProxyType({}),
        ancestors: Mapping[tuple[str, str], Ancestor] = MappingProxyType({}),
        instances: Mapping[str, Sequence[GpuInfo]] = MappingProxyType({}),
        desktop_memory_bytes: int | None = 0,
        errors: Mapping[int | tuple[str, int], Exception] | None = None,
        lost: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.calls: list[str] = []
        self._called: Counter[str] = Counter()
        self._lost = dict(lost)
        self._asked: Counter[str] = Counter()
        self._struck: dict[str, list[int]] = {}
        self._worn: dict[str, dict[str, Any]] = {}
        self._conditions = tuple(conditions) or (fake_condition(),)
        self._usages = tuple(usages)
        self._energies_j = tuple(energies_j)
        self._activities = tuple(activities)
        self._xids = xids
        self._ancestors = {frozenset(pair): place for pair, place in ancestors.items()}
        self._instances = instances
        self._desktop_memory_bytes = desktop_memory_bytes
        self._gpus = gpus or (fake_gpu(),)
        self._states = tuple(states) or (fake_state(),)
        self._samples = tuple(samples)
        self._nvlinks = None if nvlinks is None else {frozenset(pair) for pair in nvlinks}
        self._errors = dict(errors or {})
        self._given: Counter[tuple[str, str]] = Counter()

    def driver_version(self) -> str | None:
        """Answer the driver of the machines that this package was measured on."""
        self._count("driver_version")
        return "580.159.04"

    def cuda_version(self) -> str | None:
        """Answer what that driver supports."""
        self._count("cuda_version")
        return "13.0"

    def gpus(self) -> tuple[GpuInfo, ...]:
        """Answer the GPUs given that are not lost by now."""
        self._count("gpus")
        return tuple(gpu for gpu in self._gpus if not self._is_lost(gpu.uuid))

    def absent(self) -> tuple[AbsentGpu, ...]:
        """Answer those that are."""
        self._count("absent")
        lost = [gpu for gpu in self._gpus if self._is_lost(gpu.uuid)]
        return tuple(AbsentGpu(index=gpu.index, reason=str(loss(f"GPU {gpu.index}"))) for gpu in lost)

    def sample(self, uuid: str) -> GpuSample:
        """Answer the script's next sample."""
        self._count("sample")
        self._check(uuid)
        if self._samples:
            return self._samples[self._next("sample", uuid, len(self._samples))]
        return _sample_of(self._last_state(uuid))

    def state(self, uuid: str) -> GpuState:
        """Answer the script's next state."""
        self._count("state")
        self._check(uuid)
        return self._states[self._next("state", uuid, len(self._states))]

    def has_nvlink(self, uuid_a: str, uuid_b: str) -> bool | None:
        """Answer whether the pair is among `nvlinks`."""
        self._count("has_nvlink")
        return None if self._nvlinks is None else frozenset((uuid_a, uuid_b)) in self._nvlinks

    def usage(self, uuid: str) -> GpuUsage:
        """Answer the script's next usage."""
        self._count("usage")
        self._check(uuid)
        if self._usages:
            return self._usages[self._next("usage", uuid, len(self._usages))]
        return _usage_of(self._last_state(uuid))

    def energy_j(self, uuid: str) -> float | None:
        """Answer the script's next energy."""
        self._count("energy_j")
        self._check(uuid)
        if self._energies_j:
            return self._energies_j[self._next("energy_j", uuid, len(self._energies_j))]
        return self._last_state(uuid).energy_j

    def process_pids(self, uuid: str) -> tuple[int, ...] | None:
        """Answer the processes of the script's next state: who looks for them is a step further."""
        self._count("process_pids")
        self._check(uuid)
        return self._states[self._next("state", uuid, len(self._states))].process_pids

    def desktop_memory_bytes(self, uuid: str) -> int | None:
        """Answer what was given."""
        self._count("desktop_memory_bytes")
        self._check(uuid)
        return self._desktop_memory_bytes

    def condition(self, uuid: str) -> GpuCondition:
        """Answer the script's next condition."""
        self._count("condition")
        self._check(uuid)
        scripted = self._conditions[self._next("condition", uuid, len(self._conditions))]
        return replace(scripted, **self._worn.get(uuid, {}))

    def activity_meter(self, uuid: str) -> Callable[[], GpuActivity | None]:  # noqa: ARG002 - one script for all
        """Answer a meter that follows the script."""
        self._count("activity_meter")
        answers = iter(self._activities)
        return lambda: next(answers, self._activities[-1] if self._activities else None)

    def error_meter(self, uuid: str) -> Callable[[], tuple[int, ...]] | None:
        """Answer a meter that follows the script, and hears of each `strike` from now on."""
        self._count("error_meter")
        if self._xids is None:
            return None
        answers, struck = iter(self._xids.get(uuid, ())), self._struck.setdefault(uuid, [])
        heard = len(struck)

        def read() -> tuple[int, ...]:
            nonlocal heard
            new, heard = tuple(struck[heard:]), len(struck)
            return (*next(answers, ()), *new)

        return read

    def lose(self, uuid: str) -> None:
        """Let a GPU fall off the bus."""
        self._lost[uuid] = 0

    def strike(self, uuid: str, xid: int) -> None:
        """Let the driver report a critical error of a GPU."""
        self._struck.setdefault(uuid, []).append(xid)

    def wear(self, uuid: str, **changes: Any) -> None:
        """Change the condition of a GPU from now on, such as `ecc_uncorrected=1`."""
        self._worn[uuid] = {**self._worn.get(uuid, {}), **changes}

    def common_ancestor(self, uuid_a: str, uuid_b: str) -> Ancestor | None:
        """Answer what `ancestors` says of the pair."""
        self._count("common_ancestor")
        return self._ancestors.get(frozenset((uuid_a, uuid_b)))

    def mig_instances(self, uuid: str) -> tuple[GpuInfo, ...]:
        """Answer what `instances` says of the GPU."""
        self._count("mig_instances")
        return tuple(self._instances.get(uuid, ()))

    def _count(self, name: str) -> None:
        self.calls.append(name)
        self._called[name] += 1
        error = self._errors.get(len(self.calls)) or self._errors.get((name, self._called[name]))
        if error is not None:
            raise error

    def _check(self, uuid: str) -> None:
        known = [*self._gpus, *(one for instances in self._instances.values() for one in instances)]
        if all(gpu.uuid != uuid for gpu in known):
            raise DeviceError(f"GPU {uuid} is not one of the fake's.")
        self._asked[uuid] += 1
        if self._asked[uuid] > self._lost.get(uuid, self._asked[uuid]):
            gpu = next(gpu for gpu in known if gpu.uuid == uuid)
            raise loss(f"GPU {gpu.index} ({gpu.name}, {uuid})")

    def _is_lost(self, uuid: str) -> bool:
        return self._asked[uuid] >= self._lost.get(uuid, self._asked[uuid] + 1)

    def _last_state(self, uuid: str) -> GpuState:
        given = self._given["state", uuid]
        return self._states[min(max(given, 1), len(self._states)) - 1]

    def _next(self, name: str, uuid: str, length: int) -> int:
        position = self._given[name, uuid]
        self._given[name, uuid] += 1
        return min(position, length - 1)


class RecordingHeader(Record, frozen=True, kw_only=True, tag="recording", tag_field="record"):
    """First line of a recording: the driver and its GPUs."""

    schema: int
    driver: str | None
    cuda: str | None
    gpus: tuple[GpuInfo, ...]
    nvlinks: tuple[tuple[str, str], ...] = ()


class Reading(Record, frozen=True, kw_only=True, tag="reading", tag_field="record"):
    """Another line: the state of one GPU.

    Attributes:
        time_s: Since the recording began.
    """

    time_s: float
    uuid: str
    state: GpuState


class ReplayNvml:
    """A driver that plays a recording back.

    A recording is JSON lines: a `RecordingHeader`, then `Reading`s in order of time. Each call of `state`, `sample` or
    `usage` answers that GPU's next reading, so a state, samples, and a state again come in the order of time; the last
    reading repeats. Energy and processes are those of the reading last given, or of the first one.
    """

    def __init__(self, header: RecordingHeader, readings: Sequence[Reading]) -> None:
        self._header = header
        self._nvlinks = {frozenset(pair) for pair in header.nvlinks}
        self._states = {gpu.uuid: [one.state for one in readings if one.uuid == gpu.uuid] for gpu in header.gpus}
        self._given: Counter[str] = Counter()

    @classmethod
    def from_file(cls, path: Path) -> "ReplayNvml":
        """Read what `record` wrote.

        Raises:
            UsageError: The file is not a recording, or one of a newer schema.
        """
        decoder = msgspec.json.Decoder(RecordingHeader | Reading)
        try:
            header, *readings = decoder.decode_lines(path.read_bytes())
        except (msgspec.MsgspecError, ValueError) as error:
            raise UsageError(f"{path} is not a recording of NVML: {error}. Write one with testing.record().") from None
        if not isinstance(header, RecordingHeader):
            raise UsageError(f"{path} is not a recording of NVML: its first line is not the header.")
        if header.schema > _RECORDING_SCHEMA:
            raise UsageError(f"{path} has schema {header.schema}, this version reads {_RECORDING_SCHEMA}. Upgrade.")
        return cls(header, [line for line in readings if isinstance(line, Reading)])

    def driver_version(self) -> str | None:
        """Answer the recorded driver's version."""
        return self._header.driver

    def cuda_version(self) -> str | None:
        """Answer the recorded driver's CUDA version."""
        return self._header.cuda

    def gpus(self) -> tuple[GpuInfo, ...]:
        """Answer the recorded GPUs."""
        return self._header.gpus

    def absent(self) -> tuple[AbsentGpu, ...]:
        """Answer that all others were not there."""
        return ()

    def sample(self, uuid: str) -> GpuSample:
        """Answer clock, power and temperature of the next reading."""
        return _sample_of(self.state(uuid))

    def state(self, uuid: str) -> GpuState:
        """Answer the next reading."""
        self._given[uuid] += 1
        return self._last_state(uuid)

    def usage(self, uuid: str) -> GpuUsage:
        """Answer what the next reading holds of it."""
        return _usage_of(self.state(uuid))

    def energy_j(self, uuid: str) -> float | None:
        """Answer the energy of the reading last given."""
        return self._last_state(uuid).energy_j

    def process_pids(self, uuid: str) -> tuple[int, ...] | None:
        """Answer the processes of the reading last given."""
        return self._last_state(uuid).process_pids

    def desktop_memory_bytes(self, uuid: str) -> int | None:  # noqa: ARG002 - the protocol's
        """Answer that nothing is known: recordings hold none."""
        return None

    def condition(self, uuid: str) -> GpuCondition:  # noqa: ARG002 - the protocol's
        """Answer that nothing is known: recordings hold none."""
        return GpuCondition()

    def activity_meter(self, uuid: str) -> Callable[[], GpuActivity | None]:  # noqa: ARG002 - the protocol's
        """Answer a meter without counters: recordings hold none."""
        return lambda: None

    def error_meter(self, uuid: str) -> Callable[[], tuple[int, ...]] | None:  # noqa: ARG002 - the protocol's
        """Answer that the driver does not tell."""
        return None

    def has_nvlink(self, uuid_a: str, uuid_b: str) -> bool | None:
        """Answer whether the pair was connected."""
        return frozenset((uuid_a, uuid_b)) in self._nvlinks

    def common_ancestor(self, uuid_a: str, uuid_b: str) -> Ancestor | None:  # noqa: ARG002 - the protocol's
        """Answer that the driver does not tell."""
        return None

    def mig_instances(self, uuid: str) -> tuple[GpuInfo, ...]:  # noqa: ARG002 - the protocol's
        """Answer that there are none."""
        return ()

    def _last_state(self, uuid: str) -> GpuState:
        states = self._states.get(uuid)
        if not states:
            raise DeviceError(f"The recording has no readings of GPU {uuid}.")
        return states[min(max(self._given[uuid], 1), len(states)) - 1]


def record(
    nvml: Nvml,
    path: Path,
    *,
    duration_s: float,
    interval_s: float = 0.1,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write what a driver says over some time, for `ReplayNvml`; UUIDs are written as they are.

    Args:
        duration_s: Readings are taken at 0 s and until this time.
        interval_s: Time between two readings of a GPU.
        clock: Seconds from any start.
        sleep: Waits for some seconds.
    """
    gpus = nvml.gpus()
    pairs = [(a.uuid, b.uuid) for a in gpus for b in gpus if a.index < b.index]
    header = RecordingHeader(
        schema=_RECORDING_SCHEMA,
        driver=nvml.driver_version(),
        cuda=nvml.cuda_version(),
        gpus=gpus,
        nvlinks=tuple(pair for pair in pairs if nvml.has_nvlink(*pair)),
    )
    begin = clock()
    with path.open("wb") as file:
        file.write(msgspec.json.encode(header) + b"\n")
        while (time_s := clock() - begin) <= duration_s:
            for gpu in gpus:
                reading = Reading(time_s=time_s, uuid=gpu.uuid, state=nvml.state(gpu.uuid))
                file.write(msgspec.json.encode(reading) + b"\n")
            sleep(interval_s)


def _sample_of(state: GpuState) -> GpuSample:
    return GpuSample(sm_clock_mhz=state.sm_clock_mhz, power_w=state.power_w, temperature_c=state.temperature_c)


def _usage_of(state: GpuState) -> GpuUsage:
    return GpuUsage(
        sm_clock_mhz=state.sm_clock_mhz,
        memory_clock_mhz=state.memory_clock_mhz,
        power_w=state.power_w,
        temperature_c=state.temperature_c,
        memory_used_bytes=state.memory_used_bytes,
    )


class FakeProfiler:
    """A profiler that sees one kernel, which takes all of a call's time.

    Args:
        kernel: Its name.
        error: Raised instead, as by a profiler that finds CUPTI taken.

    >>> FakeProfiler().calls(lambda: 2e-3, device_s=2e-3).kernels[0].time_s
    0.002
    """

    def __init__(self, *, kernel: str = "gemm", error: Exception | None = None) -> None:
        self._kernel = kernel
        self._error = error

    def calls(self, call: Call, *, device_s: float, calls_each: int = 1, name: str = "calls") -> KernelSummary:  # noqa: ARG002 - the protocol's
        """Call once, and see a kernel of the time that was told."""
        call()
        return self._seen(device_s / calls_each)

    @contextmanager
    def region(self, name: str = "region", *, calls: int = 1) -> Iterator[Found]:  # noqa: ARG002 - the protocol's
        """See a kernel of a millisecond in a block."""
        found = Found()
        yield found
        found.summary = self._seen(1e-3)

    def _seen(self, seconds: float) -> KernelSummary:
        if self._error is not None:
            raise self._error
        use = KernelUse(name=self._kernel, count=1.0, time_s=seconds, blocks=132.0)
        return KernelSummary(
            calls=1, wall_s=seconds, span_s=seconds, busy_s=seconds, longest_gap_s=0.0, kernels=(use,), launches=1.0
        )


class FakeStopwatch:
    """A stopwatch that believes what it is told: a call's return value, in seconds, is the time it took.

    Nothing waits: `now` runs on with the pretended time. A call that returns no number takes a millisecond.

    Args:
        noise: Relative standard deviation of the blocks.
        seed: Of the noise.

    >>> from pytest_gpuperf.timing import measure
    >>> measure(lambda: 2e-3, stopwatch=FakeStopwatch()).value_s
    0.002
    """

    clock: ClockName = "cuda-events"
    plans = GPU_PLANS

    def __init__(self, *, noise: float = 0.0, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - noise, not a secret
        self._noise = noise
        self._now_s = 0.0

    def now(self) -> float:
        """The pretended time."""
        return self._now_s

    def estimate(self, call: Call) -> Estimate:
        """What the call says; the host launches at no cost."""
        return Estimate(device_s=self._seconds(call), host_s=0.0)

    def blocks(self, call: Call, calls: int) -> Generator[float, None, None]:
        """Blocks of `calls` calls."""
        while True:
            yield self._advance(self._seconds(call) * calls)

    def singles(self, call: Call, batch: int) -> Generator[float, None, None]:  # noqa: ARG002 - nothing is queued
        """Single calls."""
        while True:
            yield self._advance(self._seconds(call))

    def graph(self, call: Call, calls: int) -> Call | None:
        """A call that takes as long as `calls` calls."""
        return lambda: self._seconds(call) * calls

    def _seconds(self, call: Call) -> float:
        told = call()
        return float(told) if isinstance(told, (int, float)) else 1e-3

    def _advance(self, seconds: float) -> float:
        self._now_s += seconds
        return seconds * (1 + self._random.gauss(0.0, self._noise))


def fake_machine(
    *gpus: GpuInfo, noise: float = 0.0, anchors: Mapping[str, Call] | None = None, profiler: Profiler | None = None
) -> Machine:
    """A machine with fake GPUs, by default one H100, on which a call's return value is the time it took in seconds.

    Its anchors, by name, are such calls too: `{"gemm": lambda: 2e-4}`. By default there are none.

    With a profiler, such as `FakeProfiler()`, tests are profiled where real ones are.

    Put it into a conftest to test a performance suite without a GPU:

    >>> def pytest_configure(config):
    ...     config.stash[machine_key] = fake_machine()
    """
    found = gpus or (fake_gpu(),)
    return Machine(
        "auto",
        nvml=FakeNvml(*found),
        make_stopwatch=lambda _: FakeStopwatch(noise=noise),
        anchors=anchors,
        profiler=profiler,
    )
