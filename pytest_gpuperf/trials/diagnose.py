"""What limits a workload here: runs it, measures what the device reaches, and puts the two together."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

from msgspec.structs import replace

from pytest_gpuperf.analysis.advice import Recommendation, Setting, recommendations
from pytest_gpuperf.analysis.model_work import ModelStep, Phase
from pytest_gpuperf.analysis.roofline import Ceilings, Diagnosis, Evidence, diagnose, from_data_sheet
from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import DeviceError, GpuperfError, MeasurementError, UsageError
from pytest_gpuperf.lease import Lease, lease
from pytest_gpuperf.machine import Machine, release_memory
from pytest_gpuperf.monitor import Monitor
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.profiling import Profiler, TorchProfiler
from pytest_gpuperf.records import KernelSummary, Measurement, Mode, Record, Telemetry
from pytest_gpuperf.requirement import GpuRequirement, groups
from pytest_gpuperf.specs import spec_of
from pytest_gpuperf.timing import Call, Plan, Stopwatch, measure
from pytest_gpuperf.trials.ab import interrupted_by_sigterm
from pytest_gpuperf.trials.diagnose_known import GPUS, KNOWN, Case, Make, copy, product
from pytest_gpuperf.trials.diagnose_model import (
    EngineName,
    Running,
    Stretch,
    Watching,
    estimated_tokens,
    run_model,
    working_s,
)
from pytest_gpuperf.units import format_percent
from pytest_gpuperf.workloads.model_shape import ModelShape
from pytest_gpuperf.workloads.models import shape_of
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.transformers import Generator, dtype_on, require_transformers
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig
from pytest_gpuperf.workloads.vllm_environment import installed_version

CeilingsFrom = Literal["measured", "data-sheet"]
PhaseChoice = Literal["prefill", "decode", "both"]
_PHASES: Mapping[str, tuple[Phase, ...]] = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "both": ("prefill", "decode"),
}
#: The counters of the hardware lag: without a second of the same work before, they still show what ran earlier.
_WARMUP_S = {"cuda": 1.0, "cpu": 0.1}
_LEAST_S = {"cuda": 1.0, "cpu": 0.2}
#: A product's clock settles in a second or two; a copy's at once.
_PRODUCT = Plan(warmup_s=1.0, warmup_limit_s=1.2, measure_s=1.0, measure_limit_s=1.5, precision=0.1, period_s=0.25)
_COPY = Plan(warmup_s=0.3, warmup_limit_s=0.4, measure_s=0.4, measure_limit_s=0.6, precision=0.01, period_s=0.1)
_ON_CPU = Plan(
    warmup_s=0.05, warmup_limit_s=0.1, measure_s=0.1, measure_limit_s=0.2, precision=0.1, block_s=0.01, period_s=0.05
)
#: Ceilings are reached by other kernels, within some percent of each other; what is above is not true.
BELIEVED = 1.15
#: Tokens of a step of vLLM; a prompt of more is read in several.
_VLLM_STEP_TOKENS = 8192
#: Engines for fewer have died in the warm-up of vLLM 0.26 (benchmarks/llm/RESULTS.md); a batch is no slower for it.
_FEWEST_REQUESTS = 16


class Wanted(Record, frozen=True, kw_only=True):
    """What the command line asks for.

    Attributes:
        workload: Name of a known workload; `None`: a model.
        model: A preset or a folder; `None`: `tiny` on a CPU, `llama-3-8b` on a GPU.
        engine: Of the model.
        prompt: A text, whose tokens are estimated; `None`: `prompt_tokens`.
        prompt_tokens: Of each request.
        batch_size: Requests at a time.
        output_tokens: Of each request.
        iterations: Steps, or calls, to time at least.
        phase: Of the model.
        ceilings: From where.
        limit_s: Most seconds of timing a phase.
    """

    workload: str | None = None
    model: str | None = None
    engine: str = "transformers"
    prompt: str | None = None
    prompt_tokens: int = 128
    batch_size: int = 1
    output_tokens: int = 64
    iterations: int = 100
    phase: str = "both"
    ceilings: str = "measured"
    limit_s: float = 60.0

    @property
    def load(self) -> Load:
        """Of the model."""
        tokens = self.prompt_tokens if self.prompt is None else estimated_tokens(self.prompt)
        return Load(requests=self.batch_size, prompt_tokens=tokens, output_tokens=self.output_tokens)


class Part(Record, frozen=True, kw_only=True):
    """A diagnosis of a workload, or of a phase of a model.

    Attributes:
        name: Of the phase or the workload.
        times_s: Of each iteration: a call, the reading of all prompts, a token of each request.
        tokens: Of an iteration, of all requests; `None`: it makes none.
        advice: What to do, the largest gain first.
        telemetry: Of the time without the profiler.
        notes: What to know beside.
    """

    name: str
    times_s: tuple[float, ...]
    tokens: int | None = None
    diagnosis: Diagnosis
    advice: tuple[Recommendation, ...]
    telemetry: Telemetry
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float | None:
        """Of all requests."""
        return None if self.tokens is None else self.tokens / fmean(self.times_s)


class Report(Record, frozen=True, kw_only=True):
    """All that `gpuperf diagnose` found.

    Attributes:
        title: What ran, and how.
        device: Its name.
        ceilings: What the device reaches.
        parts: One, or the phases of a model.
        notes: What to know beside.
    """

    title: str
    device: str
    ceilings: Ceilings
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What runs here; tests put their own in its place.

    Attributes:
        machine: Devices and their clocks.
        engine: Starts a model.
        product: See `diagnose_known.product`.
        copy: See `diagnose_known.copy`.
        known: Name -> workload.
    """

    machine: Machine
    engine: Callable[[Wanted, Lease, Machine], AbstractContextManager[Running]]
    product: Callable[[Device, str], Case] = product
    copy: Callable[[Device], Case] = copy
    known: Mapping[str, Make]


def bench_on(machine: Machine) -> Bench:
    """Return what runs on a machine."""
    return Bench(machine=machine, engine=start_engine, known=KNOWN)


def check_wanted(wanted: Wanted, devices: Sequence[Device]) -> None:
    """Find mistakes before the device's time is spent.

    Raises:
        UsageError: An unknown workload, model, engine or phase; a number below 1; a sequence over the model's limit.
        NotSupported: The engine is not installed.
        DeviceError: Two GPUs are needed, and fewer are here.
    """
    check_choices(wanted)
    if wanted.workload is not None:
        _check_workload(wanted.workload, wanted.model, devices)
    else:
        _check_model(wanted, devices)


def check_choices(wanted: Wanted) -> None:
    """Find words that mean nothing and numbers that make no sense.

    Raises:
        UsageError: With what is valid.
    """
    choices = {"engine": EngineName, "phase": PhaseChoice, "ceilings": CeilingsFrom}
    for name, choice in choices.items():
        if getattr(wanted, name) not in get_args(choice):
            raise UsageError(f"--{name} {getattr(wanted, name)} does not exist. Valid: {', '.join(get_args(choice))}.")
    for name in ("prompt_tokens", "batch_size", "output_tokens", "iterations"):
        if getattr(wanted, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(wanted, name)}: at least 1 is needed.")
    if not 0 < wanted.limit_s < float("inf"):
        raise UsageError(f"--limit {wanted.limit_s:g} is not a number of seconds above zero.")


def _check_workload(name: str, model: str | None, devices: Sequence[Device]) -> None:
    if model is not None:
        raise UsageError(f"{name} and --model {model} are two workloads. Drop one of them.")
    if name not in KNOWN:
        raise UsageError(
            f"There is no workload {name!r}. Known: {', '.join(KNOWN)}; or a test, as in tests/test_x.py::test_y; "
            "or --model."
        )
    needed, gpus = GPUS.get(name, 1), sum(device.kind == "cuda" for device in devices)
    if needed > 1 and gpus < needed:
        raise DeviceError(
            f"{name} needs {needed} GPUs, and {gpus} {'is' if gpus == 1 else 'are'} here. `gpuperf specs` lists them."
        )


def _check_model(wanted: Wanted, devices: Sequence[Device]) -> None:
    model, load = model_of(wanted, devices[0]), wanted.load
    shape, tokens = shape_of(model), load.prompt_tokens + load.output_tokens
    if tokens > shape.max_positions:
        raise UsageError(
            f"{load.prompt_tokens} prompt and {load.output_tokens} output tokens are {tokens:,}, and {shape.name} "
            f"holds {shape.max_positions:,}. Shorten the prompt, or lower --output-tokens."
        )
    if wanted.phase != "prefill" and wanted.output_tokens < 2:
        raise UsageError("--output-tokens 1 leaves no step of decode: ask for 2 or more, or --phase prefill.")
    if wanted.engine == "vllm":
        installed_version(devices[0])
    else:
        require_transformers()


def model_of(wanted: Wanted, device: Device) -> str:
    """Name the model: that of the command line, or the one that suits the device."""
    return wanted.model or ("tiny" if device.kind == "cpu" else "llama-3-8b")


@interrupted_by_sigterm()
def run_diagnosis(wanted: Wanted, bench: Bench) -> Report:
    """Diagnose a workload or a model, on devices that nobody else measures on meanwhile.

    Raises:
        UsageError: See `check_wanted`.
        GpuperfError: It does not fit, the engine died, a device was lost.
    """
    machine = bench.machine
    check_wanted(wanted, machine.devices)
    requirement = GpuRequirement(count=GPUS.get(wanted.workload or "", 1))
    sets = groups(requirement, machine.devices, machine.nvml)
    if not sets:
        raise DeviceError(
            f"{wanted.workload} needs {requirement.count} GPUs, and CUDA shows a process one MIG instance."
        )
    with lease(sets) as held, machine.current(held.devices[0]):
        if wanted.workload is not None:
            return _of_workload(wanted, bench, held.devices)
        return _of_model(wanted, bench, held)


# A known workload


def _of_workload(wanted: Wanted, bench: Bench, devices: tuple[Device, ...]) -> Report:
    name = wanted.workload or ""
    dtype = dtype_on(devices[0])
    ceilings = ceilings_of(wanted.ceilings, bench, devices[0], dtype)
    workload = bench.known[name](devices)
    part = diagnose_call(name, workload, bench, devices, wanted, ceilings)
    title = f"{name} on {len(devices)} GPUs" if len(devices) > 1 else name
    return Report(
        title=title, device=devices[0].name, ceilings=ceilings, parts=(part,), notes=notes_on(devices, ceilings)
    )


def diagnose_call(
    name: str,
    call: Case,
    bench: Bench,
    devices: tuple[Device, ...],
    wanted: Wanted,
    ceilings: Ceilings,
) -> Part:
    """Time a call, profile it, and say what limits it.

    Args:
        name: Of the workload.
        call: Knows its FLOP and bytes.
        bench: What runs here.
        devices: That it runs on.
        wanted: How long.
        ceilings: Of the first device.
    """
    machine = bench.machine
    seen = watch(call, machine, devices, iterations=wanted.iterations, limit_s=wanted.limit_s)
    time_s = fmean(seen.times_s)
    kernels, problem = _profiled(call, machine, devices, time_s)
    busy_s = kernels.busy_s if kernels else seen.cpu_share * time_s if devices[0].kind == "cpu" else None
    evidence = Evidence(
        time_s=time_s,
        busy_s=busy_s,
        flop=call.flop,
        bytes_moved=call.bytes_moved,
        activity=seen.activity,
        kernels=kernels,
    )
    found = diagnose(evidence, ceilings)
    setting = setting_of(machine, devices, telemetry=seen.telemetry, dtype=call.dtype)
    return Part(
        name=name,
        times_s=seen.times_s,
        diagnosis=found,
        advice=recommendations(found, setting),
        telemetry=seen.telemetry,
        notes=(*((problem,) if problem else ()), *doubts(found)),
    )


class Watched(Record, frozen=True, kw_only=True):
    """Iterations without a profiler.

    Attributes:
        times_s: Of each, in order.
        activity: The hardware's counters meanwhile.
        cpu_share: Of one core, by this process; at most 1.
    """

    times_s: tuple[float, ...]
    activity: GpuActivity | None
    telemetry: Telemetry
    cpu_share: float


def watch(
    call: Call,
    machine: Machine,
    devices: Sequence[Device],
    *,
    iterations: int,
    limit_s: float,
    least_s: float | None = None,
) -> Watched:
    """Time back-to-back calls by the device's clock, with its counters, after a second of the same.

    Args:
        call: What to call.
        machine: Of the devices.
        devices: That it runs on; the first one's clock and counters are read.
        iterations: To time at least.
        limit_s: After which no more are begun.
        least_s: Time to watch; `None`: what suits the device.
    """
    device = devices[0]
    stopwatch = machine.stopwatch(device)
    least_s = min(_LEAST_S[device.kind] if least_s is None else least_s, limit_s)
    times_s: list[float] = []
    with contextlib.closing(stopwatch.blocks(call, 1)) as stream:
        _warm_up(stopwatch, stream, _WARMUP_S[device.kind])
        with Monitor(machine.nvml, _uuids(devices)) as monitor:
            read, cpu_s, wall_s = _meter(machine, device)(), working_s(), time.perf_counter()
            begin_s = stopwatch.now()
            while (elapsed_s := stopwatch.now() - begin_s) < limit_s or not times_s:
                if len(times_s) >= iterations and elapsed_s >= least_s:
                    break
                times_s.append(next(stream))
            activity, cpu_s, wall_s = read(), working_s() - cpu_s, time.perf_counter() - wall_s
    share = min(cpu_s / wall_s, 1.0) if wall_s > 0 else 1.0
    return Watched(times_s=tuple(times_s), activity=activity, telemetry=monitor.telemetry, cpu_share=share)


def _warm_up(stopwatch: Stopwatch, stream: Iterator[float], seconds: float) -> None:
    begin_s = stopwatch.now()
    while True:
        next(stream)
        if stopwatch.now() - begin_s >= seconds:
            return


def _meter(machine: Machine, device: Device) -> Callable[[], Callable[[], GpuActivity | None]]:
    """Begins to average the hardware's counters, where there are any."""
    nvml = machine.nvml
    if nvml is None or device.kind == "cpu":
        return lambda: lambda: None
    return lambda: nvml.activity_meter(device.uuid)


def _uuids(devices: Sequence[Device]) -> list[str]:
    return [device.uuid for device in devices if device.kind == "cuda"]


def _profiled(
    call: Call, machine: Machine, devices: tuple[Device, ...], time_s: float
) -> tuple[KernelSummary | None, str | None]:
    """What the profiler saw, or why it saw nothing."""
    profiler: Profiler | None = machine.given_profiler
    if profiler is None and devices[0].kind == "cuda" and machine.can_profile:
        profiler = TorchProfiler("cuda", synchronize=lambda: machine.synchronize(devices))
    if profiler is None or devices[0].kind == "cpu":
        return None, None
    try:
        return profiler.calls(call, device_s=time_s), None
    except MeasurementError as error:
        return None, f"No kernels are known: {error}"


# A model


def _of_model(wanted: Wanted, bench: Bench, lent: Lease) -> Report:
    devices, machine, load = lent.devices, bench.machine, wanted.load
    device = devices[0]
    shape, dtype = shape_of(model_of(wanted, device)), dtype_on(device)
    ceilings = ceilings_of(wanted.ceilings, bench, device, dtype)
    release_memory()
    watching = Watching(
        monitor=lambda: Monitor(machine.nvml, _uuids(devices)),
        meter=_meter(machine, device),
        iterations=wanted.iterations,
        limit_s=wanted.limit_s,
    )
    with bench.engine(wanted, lent, machine) as running:
        stretches = run_model(running, load, _PHASES[wanted.phase], watching)
    parts = tuple(_of_stretch(one, shape, wanted, bench, devices, ceilings) for one in stretches)
    title = (
        f"{shape.name} in {dtype} through {wanted.engine}, batch {load.requests}, "
        f"{load.prompt_tokens} + {load.output_tokens} tokens"
    )
    notes = notes_on(devices, ceilings)
    if wanted.prompt is not None:
        words = (
            f"The prompt of {len(wanted.prompt.split())} words is taken as {load.prompt_tokens} tokens of random ids"
        )
        notes += (f"{words}: there is no tokenizer.",)
    return Report(title=title, device=device.name, ceilings=ceilings, parts=parts, notes=notes)


def _of_stretch(
    seen: Stretch,
    shape: ModelShape,
    wanted: Wanted,
    bench: Bench,
    devices: tuple[Device, ...],
    ceilings: Ceilings,
) -> Part:
    step = step_of(seen.phase, shape, wanted, devices[0])
    time_s = fmean(seen.times_s)
    is_own_cpu = devices[0].kind == "cpu" and wanted.engine == "transformers"
    evidence = Evidence(
        time_s=time_s,
        busy_s=seen.cpu_share * time_s if is_own_cpu else seen.busy_s,
        flop=step.flop,
        bytes_moved=step.bytes_moved,
        activity=seen.activity,
        kernels=seen.kernels,
    )
    found = diagnose(evidence, ceilings)
    setting = setting_of(bench.machine, devices, telemetry=seen.telemetry, dtype=dtype_on(devices[0]))
    return Part(
        name=seen.phase,
        times_s=seen.times_s,
        tokens=step.new_tokens,
        diagnosis=found,
        advice=recommendations(found, replace(setting, step=step, engine=wanted.engine)),
        telemetry=seen.telemetry,
        notes=doubts(found),
    )


def step_of(phase: Phase, shape: ModelShape, wanted: Wanted, device: Device) -> ModelStep:
    """Describe a step of the model: the mean one, of producing."""
    load = wanted.load
    element_bytes = 4.0 if device.kind == "cpu" else 2.0
    prompts = load.requests * load.prompt_tokens
    tokens = load.prompt_tokens if phase == "prefill" else load.prompt_tokens + load.output_tokens // 2
    return ModelStep(
        shape=shape,
        phase=phase,
        batch_size=load.requests,
        tokens=tokens,
        weight_bytes=element_bytes,
        kv_element_bytes=element_bytes,
        passes=-(-prompts // _VLLM_STEP_TOKENS) if wanted.engine == "vllm" and phase == "prefill" else 1,
    )


def start_engine(wanted: Wanted, lent: Lease, machine: Machine) -> AbstractContextManager[Running]:
    """Start a model, which holds what is lent as long as it lives; used as a context manager.

    Raises:
        UsageError: An unknown model.
        NotSupported: The engine is not installed, or the model does not fit.
    """
    device, load = lent.devices[0], wanted.load
    model, dtype = model_of(wanted, device), dtype_on(device)
    if wanted.engine == "transformers":
        return Generator(model, devices=[device.device], dtype=dtype)
    config = EngineConfig(
        model=model,
        dtype=dtype,
        max_model_len=load.prompt_tokens + load.output_tokens,
        max_num_seqs=max(load.requests, _FEWEST_REQUESTS),
        max_num_batched_tokens=_VLLM_STEP_TOKENS,
    )
    return Engine(config, devices=lent.devices, nvml=machine.nvml, descriptors=lent.descriptors)


# A test


def from_measurement(
    measurement: Measurement,
    kernels: KernelSummary | None,
    *,
    machine: Machine,
    devices: tuple[Device, ...],
    ceilings: Ceilings,
) -> Part:
    """Diagnose what a test measured, from the profile of another process.

    Args:
        measurement: A time, or a rate with the work of a call.
        kernels: Of one call, or of one step where the metric is the time of a step.
        machine: Of the devices.
        devices: That the test held.
        ceilings: Of the first device.

    Raises:
        UsageError: The metric has no time.
    """
    time_s = measurement.time_s
    if time_s is None:
        raise UsageError(
            f"{measurement.metric} is in {measurement.unit or '%'}, and no time of a call is known. Diagnose a test "
            "that uses gpu_benchmark, or one that records a time."
        )
    evidence = Evidence(
        time_s=time_s,
        busy_s=kernels.busy_s if kernels else _busy_s(measurement, time_s),
        # whoever counts bytes alone says that they are what it takes
        flop=0.0 if measurement.flop is None and measurement.unit == "B/s" else measurement.flop,
        bytes_moved=measurement.bytes_moved,
        kernels=kernels,
    )
    found = diagnose(evidence, ceilings)
    telemetry = measurement.telemetry or Telemetry(duration_s=time_s)
    setting = setting_of(machine, devices, telemetry=telemetry, dtype=ceilings.dtype)
    return Part(
        name=measurement.metric,
        times_s=measurement.samples_s or (time_s,),
        diagnosis=found,
        advice=recommendations(found, setting),
        telemetry=telemetry,
        notes=doubts(found),
    )


def _busy_s(measurement: Measurement, time_s: float) -> float | None:
    share = measurement.gpu_busy_share
    return None if share is None else share * time_s


def dtype_of(measurement: Measurement, device: Device) -> str:
    """Find the type whose peak a measurement was compared with; the usual one if it was with none."""
    peaks = device.peak_flops_per_s
    is_rate = measurement.unit == "FLOP/s"
    return next((name for name, peak in peaks.items() if is_rate and peak == measurement.peak), dtype_on(device))


# Ceilings


def ceilings_of(choice: str, bench: Bench, device: Device, dtype: str) -> Ceilings:
    """Measure what a device reaches, in six seconds, or take it from the data sheet.

    Where measuring fails the data sheet stands in, and the ceilings say so.

    Raises:
        DeviceError: The device was lost.
    """
    peaks = (device.peak_flops_per_s.get(dtype), device.peak_bandwidth_bytes_per_s)
    sheet = from_data_sheet(dtype, flops_per_s=peaks[0], bandwidth_bytes_per_s=peaks[1])
    if choice == "data-sheet":
        if peaks == (None, None):
            raise UsageError(f"No data sheet of {device.name} is known. Measure: --ceilings measured")
        return sheet
    try:
        flops_per_s, tensor = _reached(bench.product(device, dtype), bench, device, "sustained", _PRODUCT)
        release_memory()
        bandwidth, dram = _reached(bench.copy(device), bench, device, "hot", _COPY)
    except GpuperfError as error:
        return replace(sheet, problem=f"The ceilings could not be measured: {error}")
    finally:
        release_memory()
    return Ceilings(
        dtype=dtype,
        flops_per_s=flops_per_s,
        bandwidth_bytes_per_s=bandwidth,
        tensor_share=None if tensor is None else tensor.tensor_share,
        dram_share=None if dram is None else dram.dram_share,
        peak_flops_per_s=peaks[0],
        peak_bandwidth_bytes_per_s=peaks[1],
    )


def _reached(workload: Case, bench: Bench, device: Device, mode: Mode, plan: Plan) -> tuple[float, GpuActivity | None]:
    """Work a second, and what the counters show meanwhile."""
    machine = bench.machine
    stopwatch = machine.stopwatch(device)
    stopwatch.plans = {mode: _ON_CPU if device.kind == "cpu" else plan}
    timing = measure(workload, stopwatch=stopwatch, mode=mode)
    work = workload.flop or workload.bytes_moved or 0.0
    if device.kind == "cpu":
        return work / timing.value_s, None
    seen = watch(workload, machine, (device,), iterations=1, limit_s=2.0, least_s=0.4)
    return work / timing.value_s, seen.activity


def setting_of(machine: Machine, devices: Sequence[Device], *, telemetry: Telemetry, dtype: str | None) -> Setting:
    """Say where something ran, as far as advice depends on it."""
    device = devices[0]
    infos = {info.uuid: info for info in machine.nvml.gpus()} if machine.nvml else {}
    info = infos.get(device.uuid)
    spec = spec_of(info) if info else None
    links_gbs = spec.nvlink_gbs_bidirectional if spec else None
    return Setting(
        dtype=dtype,
        peak_flops_per_s=device.peak_flops_per_s,
        sm_count=device.sm_count,
        compute_capability=device.compute_capability,
        memory_bytes=device.memory_bytes,
        telemetry=telemetry,
        max_sm_clock_mhz=info.max_sm_clock_mhz if info else None,
        power_limit_w=info.power_limit_w if info else None,
        default_power_limit_w=info.default_power_limit_w if info else None,
        nvlink_bytes_per_s=links_gbs / 2 * 1e9 if links_gbs else None,
        gpus=len(devices),
    )


def doubts(found: Diagnosis) -> tuple[str, ...]:
    """Say what cannot be: more than the ceilings."""
    evidence, notes = found.evidence, []
    if found.mfu is not None and found.mfu > BELIEVED:
        notes.append(
            f"{format_percent(found.mfu)} of the product's rate cannot be: something else ran while the ceilings were "
            "measured, or the FLOP are not those of this type. Run it again, or take --ceilings data-sheet."
        )
    if found.mbu is not None and found.mbu > BELIEVED:
        is_cached = evidence.activity is None or found.shares.memory is None or found.shares.memory < 1
        why = "caches served it" if is_cached else "something else ran while the ceilings were measured"
        notes.append(f"{format_percent(found.mbu)} of the copy's bandwidth: {why}.")
    return tuple(notes)


def notes_on(devices: Sequence[Device], ceilings: Ceilings) -> tuple[str, ...]:
    """Say what to know of the device and its ceilings."""
    notes = [ceilings.problem] if ceilings.problem else []
    if devices[0].kind == "cpu":
        notes.append(
            "On the CPU: busy is this process's share of a core, so overhead is not told from latency; kernels, "
            "hardware counters and clocks are not known."
        )
    return tuple(notes)
