"""What ran, launch by launch: torch's profiler over a test, a kernel by name, or a model; or nsys over the same."""

import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pytest_gpuperf.confirm import Invocation, Order, obey
from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import MeasurementError, NotSupported, UsageError
from pytest_gpuperf.lease import Lease, lease
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.processes import Finished, run_group
from pytest_gpuperf.profiling import MOST_CALLS, NSYS_VARIABLE, TorchProfiler, is_under_nsys, profile_as_measured
from pytest_gpuperf.records import KernelSummary, Record
from pytest_gpuperf.requirement import GpuRequirement, groups
from pytest_gpuperf.trials.ab import interrupted_by_sigterm
from pytest_gpuperf.units import to_base
from pytest_gpuperf.workloads import Workload
from pytest_gpuperf.workloads.bandwidth import MemoryBandwidth
from pytest_gpuperf.workloads.matmul import Matmul
from pytest_gpuperf.workloads.models import presets, shape_of
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.transformers import Generator, dtype_on, half_precision

_BANDWIDTH = ("copy", "read", "write")
_USUAL = {"matmul": {"cuda": "8192", "cpu": "512"}, "bandwidth": {"cuda": "1GiB", "cpu": "64MiB"}}
#: What a model generates: enough steps to see what one is made of.
LOADS = {
    "cuda": Load(requests=8, prompt_tokens=128, output_tokens=16),
    "cpu": Load(requests=2, prompt_tokens=16, output_tokens=8),
}


class Wanted(Record, frozen=True, kw_only=True):
    """What to profile; the fields are the options of the command."""

    target: str
    output: Path
    calls: int | None = None
    engine: str = "transformers"
    timeout_s: float = 600.0
    pytest_arguments: tuple[str, ...] = ()


class Profiled(Record, frozen=True, kw_only=True):
    """What the profiler saw of one metric or workload.

    Attributes:
        title: For people.
        kernels: Of one call, or of one step of a model.
        calls: What was counted.
    """

    title: str
    kernels: KernelSummary
    calls: Literal["calls", "steps"] = "calls"


class Result(Record, frozen=True, kw_only=True):
    """All that was seen, and the traces that were written. Without anything seen, nsys recorded it."""

    seen: tuple[Profiled, ...]
    traces: tuple[Path, ...] = ()


def is_test(target: str) -> bool:
    """Whether a target is a test's node id, or a file or folder of tests."""
    name = target.partition("::")[0]
    return "::" in target or name.endswith(".py") or (Path(name).is_dir() and not (Path(name) / "config.json").exists())


def check(wanted: Wanted) -> None:
    """Find mistakes before anything is started.

    Raises:
        UsageError: A number that makes no sense, an engine that does not exist, a workload that is not known.
    """
    if wanted.calls is not None and wanted.calls < 1:
        raise UsageError(f"--calls {wanted.calls}: at least 1 is needed.")
    if not (math.isfinite(wanted.timeout_s) and wanted.timeout_s > 0):
        raise UsageError(f"--timeout {wanted.timeout_s:g} is not a number of seconds above zero.")
    if wanted.engine not in ("transformers", "vllm"):
        raise UsageError(f"--engine {wanted.engine} does not exist. Valid: transformers, vllm.")
    if wanted.output.exists() and not wanted.output.is_dir():
        raise UsageError(f"--output {wanted.output} is a file. Name a folder for the traces.")
    if not is_test(wanted.target):
        if wanted.pytest_arguments:
            raise UsageError(
                f"{wanted.target} is no test, so pytest's arguments {wanted.pytest_arguments} have no use."
            )
        if not _is_kernel(wanted.target):
            _check_model(wanted.target)
    _check_folder(wanted.output)


def _check_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UsageError(
            f"--output {output} cannot be written to: {error.strerror}. Name another folder for the traces."
        ) from None


def _check_model(target: str) -> None:
    try:
        shape_of(target)
    except UsageError:
        raise UsageError(
            f"{target!r} is neither a test (test_a.py::test_b) nor a workload. Workloads: matmul:N:DTYPE, copy:SIZE, "
            f"read:SIZE, write:SIZE, and the models {', '.join(sorted(presets()))}."
        ) from None


def _is_kernel(target: str) -> bool:
    return target.partition(":")[0] in ("matmul", *_BANDWIDTH)


@interrupted_by_sigterm()
def profile(wanted: Wanted, machine: Machine) -> Result:
    """Profile a test in a process of its own, or a workload in this one, on a device that is leased.

    Args:
        wanted: Checked by `check`.
        machine: What there is.

    Raises:
        UsageError: pytest does not know the test, or a part of a workload's name makes no sense.
        NotSupported: What the device cannot do.
        MeasurementError: The profiler saw nothing.
    """
    if is_test(wanted.target):
        return profile_test(wanted)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its notes are not for the terminal
    with lease(groups(GpuRequirement(), machine.devices, machine.nvml)) as lent:
        device = lent.devices[0]
        if _is_kernel(wanted.target):
            return _profile_kernel(wanted, machine, device)
        if wanted.engine == "vllm":
            return _profile_vllm(wanted, machine, lent)
        return _profile_model(wanted, machine, device)


def profile_test(wanted: Wanted) -> Result:
    """Run a test in a process of its own that profiles what it measures, and leaves the traces.

    Raises:
        UsageError: Nothing was profiled. Has the last that pytest said.
    """
    output = wanted.output.absolute()
    before = _stamps(output)
    order = Order(
        tests=(wanted.target,),
        results="",
        leased=(),
        parent_pid=os.getpid(),
        is_of_worker=False,
        purpose="profile",
        traces=str(output),
        most_calls=wanted.calls,
    )
    here = Path.cwd()
    invocation = Invocation(arguments=wanted.pytest_arguments, folder=here, root=here, environment=os.environ)
    finished, found, complaint = obey(order, invocation, limit_s=wanted.timeout_s)
    profiles = found.profiles if found else ()
    if not profiles and not (is_under_nsys() and finished.code == 0):
        raise UsageError(
            f"Nothing was profiled in {wanted.target}: pytest {complaint or finished.in_words}. A test has to measure "
            f"with gpu_benchmark or within perf.region(), in its own process.{_said(finished)}"
        )
    seen = tuple(Profiled(title=f"{one.key} {one.metric}", kernels=one.kernels) for one in profiles)
    written = [path for path, stamp in _stamps(output).items() if before.get(path) != stamp]
    return Result(seen=seen, traces=tuple(written))


def _stamps(folder: Path) -> dict[Path, int]:
    """Trace -> when it was written, in order: a folder may hold those of other targets."""
    found = {path: path.stat().st_mtime_ns for path in folder.glob("*.trace.json.gz")}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _said(finished: Finished) -> str:
    """The last lines that a process printed, below a message."""
    lines = [line.strip() for line in finished.tail.splitlines() if line.strip(" =-_\t")]
    return "".join(f"\n  {line[:160]}" for line in lines[-4:])


def _profiler(wanted: Wanted, machine: Machine, device: Device) -> TorchProfiler:
    return TorchProfiler(
        device.kind,
        synchronize=lambda: machine.synchronize((device,)),
        keep=wanted.output,
        most_calls=wanted.calls,
    )


def _profile_kernel(wanted: Wanted, machine: Machine, device: Device) -> Result:
    workload = workload_of(wanted.target, device)
    profiler = _profiler(wanted, machine, device)
    stopwatch = machine.stopwatch(device)
    _, kernels = profile_as_measured(
        workload, profiler=profiler, stopwatch=stopwatch, mode=workload.mode, name=wanted.target
    )
    return _result(wanted.target, kernels, profiler)


def _result(
    title: str, kernels: KernelSummary | None, profiler: TorchProfiler, *, calls: Literal["calls", "steps"] = "calls"
) -> Result:
    seen = (Profiled(title=title, kernels=kernels, calls=calls),) if kernels else ()
    return Result(seen=seen, traces=tuple(profiler.traces))


def workload_of(target: str, device: Device) -> Workload:
    """Make the workload of a name such as `matmul:8192:bfloat16` or `copy:1GiB`.

    Raises:
        UsageError: A part of the name makes no sense.
        NotSupported: What the device cannot do.
    """
    name, *rest = target.split(":")
    if name != "matmul":
        size = rest[0] if rest else _USUAL["bandwidth"][device.kind]
        if len(rest) > 1:
            raise UsageError(f"{target!r} has too many parts. Write {name}:SIZE, such as {name}:1GiB.")
        return MemoryBandwidth(name, size_bytes=_bytes(target, size), device=device.device)  # type: ignore[arg-type, return-value]
    count = rest[0] if rest else _USUAL["matmul"][device.kind]
    if len(rest) > 2 or not re.fullmatch(r"[1-9][0-9]{0,5}", count):
        raise UsageError(f"{target!r} is not matmul:N:DTYPE, such as matmul:8192:bfloat16.")
    dtype = rest[1] if len(rest) > 1 else dtype_on(device)
    return Matmul(int(count), dtype=dtype, device=device.device)  # type: ignore[return-value]


def _bytes(target: str, size: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]i?B|B)", size)
    number, unit = to_base(float(match[1]), match[2]) if match else (0.0, "")
    if unit != "B" or number < 4:
        raise UsageError(f"{target!r}: {size!r} is not a size of 4 bytes or more, such as 1GiB or 256MB.")
    return int(number)


def _load(wanted: Wanted, device: Device) -> Load:
    usual = LOADS[device.kind]
    return Load(
        requests=usual.requests,
        prompt_tokens=usual.prompt_tokens,
        output_tokens=min(wanted.calls or usual.output_tokens, MOST_CALLS),  # a step of a model leaves 3,000 events
    )


def _profile_model(wanted: Wanted, machine: Machine, device: Device) -> Result:
    load, profiler = _load(wanted, device), _profiler(wanted, machine, device)
    with Generator(wanted.target, devices=[device.device], dtype=dtype_on(device)) as generator:
        generator.generate(load)
        with profiler.region(wanted.target, calls=load.output_tokens) as found:
            generator.generate(load)
    return _result(_described(wanted, load), found.summary, profiler, calls="steps")


def _described(wanted: Wanted, load: Load) -> str:
    return f"{wanted.target}, {load.requests} requests of {load.prompt_tokens} + {load.output_tokens} tokens"


def _profile_vllm(wanted: Wanted, machine: Machine, lent: Lease) -> Result:
    """Profile an engine's process by its own profiler."""
    from pytest_gpuperf.workloads.vllm import Engine, EngineConfig

    [device] = lent.devices
    if device.kind == "cpu":
        raise NotSupported("vLLM's profiler is of use on a GPU alone. Profile without --engine vllm here.")
    load = _load(wanted, device)
    config = EngineConfig(model=wanted.target, dtype=half_precision(device), max_model_len=2048)
    wanted.output.mkdir(parents=True, exist_ok=True)
    trace = wanted.output / "vllm.trace.json.gz"
    with Engine(config, devices=[device], nvml=machine.nvml, descriptors=lent.descriptors) as engine:
        engine.generate(load, timeout_s=wanted.timeout_s)
        gpu = engine.profile(load, timeout_s=wanted.timeout_s, keep=trace)
    if gpu is None or gpu.summary is None:
        raise MeasurementError("vLLM's profiler saw nothing.")
    return Result(seen=(Profiled(title=_described(wanted, load), kernels=gpu.summary, calls="steps"),), traces=(trace,))


@interrupted_by_sigterm()
def run_under_nsys(wanted: Wanted, command: Sequence[str], *, is_gpu: bool) -> Path:
    """Run `gpuperf profile` again, watched by nsys in place of torch's profiler.

    Args:
        wanted: Says where the report goes, and how long it may take.
        command: Arguments of `gpuperf` without --nsys.
        is_gpu: What is profiled is bracketed by cudaProfilerStart; without a GPU all of it is recorded.

    Returns:
        The report.

    Raises:
        UsageError: There is no nsys, or it failed.
    """
    program = shutil.which("nsys")
    if program is None:
        raise UsageError(
            "nsys is not on the PATH. Install NVIDIA Nsight Systems, or leave --nsys out: torch's profiler writes a "
            "trace as well."
        )
    wanted.output.mkdir(parents=True, exist_ok=True)
    report = wanted.output / "report"
    bracket = ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"] if is_gpu else []
    options = ["--trace=cuda,nvtx,osrt", "--force-overwrite=true", f"--output={report}", *bracket]
    again = [sys.executable, "-c", "from pytest_gpuperf.cli import main; main()", *command]
    environment = {**os.environ, NSYS_VARIABLE: "1"}
    finished = run_group([program, "profile", *options, *again], timeout_s=wanted.timeout_s, environment=environment)
    written = report.with_suffix(".nsys-rep")
    if finished.code != 0 or not written.exists():
        state = "there" if written.exists() else "missing"
        raise UsageError(f"nsys {finished.in_words}, and {written} is {state}.{_said(finished)}")
    return written
