"""Anchors: four fixed workloads that tell a machine that is not its usual self from code that got slower.

A matrix product, a copy, kernel launches and a loop of Python are measured once a run on the devices of the first test
that measures. They are built-in tests of a module of their own: reported, recorded and accepted like any other. An
anchor that is off makes the run INVALID; one that a metric has gone along with takes the machine's part out of it.

How a run calls this, under the lease of its first measuring test, once for each set of devices:

    file = ...                                          # baselines of `MODULE` in the devices' folder
    verdict = check_anchors(machine, devices, file, visit=visit)
    verdict.records                                     # report them, judged, as if they were tests
    verdict.reason                                      # `judge(health=...)` of every metric on these devices
    verdict.advice, verdict.note                        # said once, in the summary
    best_covariate(baseline, value, verdict.records, file)  # before a metric is judged; nothing if an anchor is off

Results that are judged again later (`gpuperf baseline`) give the records of `MODULE` to `judge_anchors`.
"""

import contextlib
import copy
import dataclasses
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.covariate import Adjusted, covariate
from pytest_gpuperf.devices import Device, cpu_device, slug
from pytest_gpuperf.errors import DeviceError, MeasurementError, NotSupported
from pytest_gpuperf.judge import ENOUGH_SESSIONS, hardware_differences, identity_differences
from pytest_gpuperf.machine import Machine, check_torch
from pytest_gpuperf.monitor import health
from pytest_gpuperf.priors import Priors, prior_of
from pytest_gpuperf.recorder import Recorder, Work
from pytest_gpuperf.records import (
    BaselineFile,
    Environment,
    Kind,
    Measurement,
    MetricBaseline,
    Mode,
    Record,
    Session,
    Status,
    TestKey,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.stats import Prediction, SessionLogs, predict, t_quantile, variance_components
from pytest_gpuperf.timing import Call, Plan, Stopwatch
from pytest_gpuperf.units import format_percent, from_worse_log, worse_log

#: Module of the anchors in keys and baselines: `baselines/<device>/anchors.json`.
MODULE = "anchors.py"
#: Deviations by which an anchor may be off.
DEVIATIONS = 3.0
#: Versions that an anchor is compared within. It has to tell the machine from the software: a slower torch is what the
#: tests are there to show, and must neither make a run INVALID nor be subtracted as the machine's part.
SOFTWARE = ("driver", "cuda", "torch", "python")


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """One fixed workload.

    Attributes:
        make: Builds the call for a device; `None` needs nothing to be built.
        needs_torch: Left out where torch is not installed or cannot use the device.
        is_of_host: Timed by the host's clock, once for all devices.
        plan: On a GPU.
        cause: What most likely throws it off.
        look: What shows the cause.
    """

    make: Callable[[Device], Call]
    kind: Kind
    mode: Mode
    needs_torch: bool = True
    is_of_host: bool = False
    plan: Plan
    cause: str
    look: str


def _gemm(device: Device) -> Call:
    """A product that the power limit of a large GPU holds down within a second.

    One that the power limit does not touch repeats better, and tells less of the others: over six H100s, 23 other
    products went along with float32 at 2048 by 0.74 at most (median 0.62), with float16 at 4096 by 0.97 (median; 21 of
    them by 0.8 or more). float16 depends on no setting of torch's, as float32 would, and every tensor core has it.
    """
    from pytest_gpuperf.workloads.matmul import Matmul

    is_cpu = device.kind == "cpu"
    return Matmul(512 if is_cpu else 4096, dtype="float32" if is_cpu else "float16", device=device.device)


def _copy(device: Device) -> Call:
    from pytest_gpuperf.workloads.bandwidth import MemoryBandwidth

    return MemoryBandwidth("copy", size_bytes=(32 if device.kind == "cpu" else 256) * 2**20, device=device.device)


def _launch(device: Device) -> Call:
    """One addition to one element: the host's time to launch a kernel, or on a CPU to reach one."""
    import torch

    return partial(torch.zeros(1, dtype=torch.float32, device=device.device).add_, 1.0)


def _loop(device: Device) -> Call:  # noqa: ARG001 - there is one host
    def loop() -> None:
        total = 0
        for i in range(10_000):
            total = (total * 31 + i) % 65_521

    return loop


#: A whole swing of the power controller, which takes a second.
_SECONDS = Plan(warmup_s=0.6, warmup_limit_s=0.9, measure_s=1.0, measure_limit_s=1.2, precision=0.1, period_s=0.2)
_TENTHS = Plan(warmup_s=0.2, warmup_limit_s=0.3, measure_s=0.3, measure_limit_s=0.5, precision=0.001, period_s=0.05)
_OF_HOST = Plan(warmup_s=0.1, warmup_limit_s=0.2, measure_s=0.2, measure_limit_s=0.3, precision=0.01, period_s=0.05)
_ON_CPU = Plan(
    warmup_s=0.02, warmup_limit_s=0.05, measure_s=0.05, measure_limit_s=0.1, precision=0.1, block_s=0.01, period_s=0.02
)
_HOST_CAUSE = "other work on the CPUs, a CPU limit of the container, a debugger or profiler"
_GPU_LOOK = "nvidia-smi -q -d PERFORMANCE,CLOCK,POWER,PIDS"
ANCHORS = {
    "gemm": Anchor(
        make=_gemm,
        kind="compute",
        mode="sustained",
        plan=_SECONDS,
        cause="a lower clock or power limit, heat, another process on the GPU",
        look=_GPU_LOOK,
    ),
    "copy": Anchor(
        make=_copy,
        kind="memory",
        mode="cold",
        plan=_TENTHS,
        cause="a lower memory clock, another process on the GPU",
        look=_GPU_LOOK,
    ),
    "launch": Anchor(
        make=_launch, kind="host", mode="hot", is_of_host=True, plan=_OF_HOST, cause=_HOST_CAUSE, look="top"
    ),
    "host": Anchor(
        make=_loop,
        kind="host",
        mode="hot",
        needs_torch=False,
        is_of_host=True,
        plan=_OF_HOST,
        cause=_HOST_CAUSE,
        look="top",
    ),
}
#: As pytest would name them. Whoever asks which tests had their turn counts these in: an anchor that was left out, for
#: want of torch or memory, is not gone.
IDS = frozenset(f"{MODULE}::{name}" for name in ANCHORS)


def is_wanted(choice: Literal["auto", "on", "off"], devices: Sequence[Device]) -> bool:
    """Whether `--gpuperf-anchors` asks for anchors on these devices: `auto` does on GPUs."""
    return choice == "on" or (choice == "auto" and all(device.kind == "cuda" for device in devices))


def measure_anchors(
    machine: Machine,
    devices: tuple[Device, ...],
    *,
    label: str | None = None,
    names: Collection[str] = tuple(ANCHORS),
) -> tuple[TestRecord, ...]:
    """Measure the anchors on devices that the caller holds, about four seconds on one H100.

    CUDA is initialised in this process, if it was not: do not call it before a test that forks and uses CUDA in the
    child. The memory is given back to the driver. What torch or the devices cannot do is left out.

    Args:
        machine: See `Machine.anchors` for fakes.
        devices: Of several, the slowest one's value is kept: the one that a test on all of them waits for.
        label: See `devices.slug`.
        names: Those to measure.

    Returns:
        One record an anchor, not judged yet.

    Raises:
        DeviceError: A device was lost.
        MeasurementError: An anchor gave no value that can be true.
    """
    environment = machine.environment(devices)
    records = []
    for name in (name for name in ANCHORS if name in names):
        start_s = time.perf_counter()
        found = _slowest(machine, devices, name)
        if found is None:
            continue
        records.append(
            TestRecord(
                key=TestKey(module=MODULE, test=name),
                slug=slug(devices, label),
                devices=tuple(device.uuid_hash for device in devices),
                environment=environment,
                measurements=(found,),
                verdicts=(),
                duration_s=time.perf_counter() - start_s,
                worker=os.environ.get("PYTEST_XDIST_WORKER"),
            )
        )
    return tuple(records)


def _slowest(machine: Machine, devices: tuple[Device, ...], name: str) -> Measurement | None:
    chosen = devices[:1] if ANCHORS[name].is_of_host else devices
    found = [_measured(machine, device, name) for device in chosen]
    known = [one for one in found if one is not None]
    return max(known, key=lambda one: worse_log(one.value, one.better)) if len(known) == len(found) else None


def _measured(machine: Machine, device: Device, name: str) -> Measurement | None:
    anchor = ANCHORS[name]
    recorder = Recorder(
        (device,),
        nvml=machine.nvml,
        vitals=machine.vitals,
        stopwatch=lambda: _stopwatch(machine, device, anchor),
        synchronize=lambda: machine.synchronize((device,)),
        preferred={},
    )
    is_event_timed = device.kind == "cuda" and not anchor.is_of_host
    mode = "hot" if device.kind == "cpu" else anchor.mode  # flushing a CPU's caches takes longer than the copy
    with machine.current(device), _no_memory_kept(machine, device):
        call = _call(machine, device, name)
        if call is None:
            return None
        try:
            return recorder.benchmark(
                call, work=Work(kind=anchor.kind, mode=mode), clock="cuda-events" if is_event_timed else None
            )
        except MeasurementError as error:
            raise MeasurementError(
                f"The anchor {name} could not be measured: {error} To measure without: --gpuperf-anchors=off"
            ) from None


def _stopwatch(machine: Machine, device: Device, anchor: Anchor) -> Stopwatch:
    """The clock with the anchor's own plan: a few seconds for all four, under a second on a CPU."""
    stopwatch = copy.copy(machine.stopwatch(cpu_device() if anchor.is_of_host else device))
    stopwatch.plans = dict.fromkeys(stopwatch.plans, _ON_CPU if device.kind == "cpu" else anchor.plan)
    return stopwatch


def _call(machine: Machine, device: Device, name: str) -> Call | None:
    """The anchor's call, or `None` where it cannot be made."""
    if machine.anchors is not None:
        return machine.anchors.get(name)
    if ANCHORS[name].needs_torch and not _has_torch(device):
        return None
    try:
        return ANCHORS[name].make(device)
    except NotSupported:  # the memory is full, or the device lacks the type
        return None


def _has_torch(device: Device) -> bool:
    try:
        import torch  # noqa: F401 - whether it is there

        if device.kind == "cuda":
            check_torch(device)
    except (ImportError, DeviceError):
        return False
    return True


@contextlib.contextmanager
def _no_memory_kept(machine: Machine, device: Device) -> Iterator[None]:
    """Give what torch has cached back to the driver: the test that follows may need all of it, in another process."""
    yield
    if machine.anchors is None and device.kind == "cuda" and _has_torch(device):
        import torch

        torch.cuda.empty_cache()


class AnchorVerdict(Record, frozen=True, kw_only=True):
    """What the anchors of one set of devices say.

    Attributes:
        records: The anchors, judged. One that is off is INCOMPARABLE: it is recorded only with a reason, which begins a
            new epoch. One that would be off if it had sessions enough to tell is INCONCLUSIVE, and is recorded. One
            measured on an unwell device is INVALID, off or not, and is never recorded.
        off: Names of those that are off.
        reason: Why no result on these devices is the code's; `None` if no anchor is off.
        advice: Likely causes, and commands, of the first that is off.
        note: That anchors cannot say anything yet, and what is missing; `None` if all can.
    """

    records: tuple[TestRecord, ...]
    off: tuple[str, ...] = ()
    reason: str | None = None
    advice: str | None = None
    note: str | None = None


def check_anchors(
    machine: Machine,
    devices: tuple[Device, ...],
    file: BaselineFile | None,
    *,
    visit: str,
    label: str | None = None,
    priors: Priors | None = None,
) -> AnchorVerdict:
    """Measure and judge the anchors; one that is off is measured once more before that is believed.

    Args:
        machine: See `measure_anchors`, as for `devices`, `label` and the errors.
        devices: See there.
        file: Baselines of `MODULE`.
        visit: See `judge_anchors`.
        label: See `measure_anchors`.
        priors: See `judge_anchors`.
    """
    verdict = judge_anchors(measure_anchors(machine, devices, label=label), file, visit=visit, priors=priors)
    if not verdict.off:
        return verdict
    again = {record.key.test: record for record in measure_anchors(machine, devices, label=label, names=verdict.off)}
    records = [again.get(record.key.test, record) for record in verdict.records]
    return judge_anchors(records, file, visit=visit, priors=priors)


def judge_anchors(
    records: Sequence[TestRecord], file: BaselineFile | None, *, visit: str | None = None, priors: Priors | None = None
) -> AnchorVerdict:
    """Compare anchors with their sessions on the same hardware and software.

    An anchor is off if it is slower or faster than predicted by more than three standard errors of the prediction. One
    with fewer than five such sessions is never off.

    Args:
        records: Of `measure_anchors`, or of a results file.
        file: Baselines of `MODULE` on these devices.
        visit: The visit that the records belong to.
        priors: What is known of noise; `None`: the package's.
    """
    found = [_judged(record, file, visit, priors) for record in records]
    off = [one for one in found if one.is_off]
    short = [one for one in found if one.verdict.status == "NEW" or one.verdict.is_provisional]
    names = tuple(dict.fromkeys(one.record.key.test for one in off))
    return AnchorVerdict(
        records=tuple(replace(one.record, verdicts=(one.verdict,)) for one in found),
        off=names,
        reason="; ".join(one.words for one in off) or None,
        advice=_advice(names[0]) if names else None,
        note=_note([one.verdict for one in short]) if short else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    record: TestRecord
    verdict: Verdict
    words: str = ""
    is_off: bool = False


def _judged(record: TestRecord, file: BaselineFile | None, visit: str | None, priors: Priors | None) -> _Judged:
    found = _compared(record, file, visit, priors)
    telemetry = record.measurements[0].telemetry
    ill = health(telemetry) if telemetry else None
    if ill is None:
        return found
    words = f"{found.words}; {ill}" if found.is_off else ill  # one that is as usual explains nothing
    return dataclasses.replace(found, verdict=replace(found.verdict, status="INVALID", reason=words), words=words)


def _compared(record: TestRecord, file: BaselineFile | None, visit: str | None, priors: Priors | None) -> _Judged:
    measurement = record.measurements[0]
    blank = Verdict(status="NEW", metric=measurement.metric, reason="No baseline on this device.", tolerance=0.0)
    baseline = file.tests.get(record.key.test, {}).get(measurement.metric) if file else None
    if file is None or baseline is None:
        return _Judged(record=record, verdict=blank)
    if differences := identity_differences([measurement], baseline):
        verdict = replace(blank, status="INCOMPARABLE", reason=f"Not comparable: {'; '.join(differences)}.")
        return _Judged(record=record, verdict=verdict)
    sessions = _comparable(record, baseline, file)
    if not sessions:
        return _Judged(record=record, verdict=replace(blank, reason="No session on this hardware and software."))
    prediction = _prediction(record, replace(baseline, sessions=sessions), visit, priors)
    return _decided(record, replace(blank, sessions=len(sessions)), prediction)


def _comparable(record: TestRecord, baseline: MetricBaseline, file: BaselineFile) -> tuple[Session, ...]:
    """Sessions on the same hardware, with the same versions of what an anchor stands on."""
    return tuple(
        session
        for session in baseline.sessions
        if _is_comparable(record.environment, file.environments[session.environment])
    )


def _is_comparable(now: Environment, then: Environment) -> bool:
    is_same_software = all(now.versions.get(name) == then.versions.get(name) for name in SOFTWARE)
    return is_same_software and not hardware_differences(now.hardware, then.hardware)


def _prediction(record: TestRecord, baseline: MetricBaseline, visit: str | None, priors: Priors | None) -> Prediction:
    measurement = record.measurements[0]
    prior = prior_of(measurement.kind, is_cpu=record.environment.hardware.is_cpu, priors=priors)
    logs = [SessionLogs.of(session, baseline.better) for session in baseline.sessions]
    components = variance_components(logs, prior=prior.variances, floor=prior.floor)
    unsettled = max(components.within.value, ((measurement.spread or 0.0) / 2) ** 2)
    components = dataclasses.replace(components, within=dataclasses.replace(components.within, value=unsettled))
    group = tuple(sorted(record.devices))
    return predict(logs, components, device_group=group, current_runs=1, visit=visit)


def _decided(record: TestRecord, verdict: Verdict, prediction: Prediction) -> _Judged:
    measurement, error = record.measurements[0], prediction.standard_error
    difference = worse_log(measurement.value, measurement.better) - prediction.expected_log
    is_far, is_early = abs(difference) > DEVIATIONS * error, verdict.sessions < ENOUGH_SESSIONS
    half = t_quantile(0.975, prediction.degrees_of_freedom) * error
    words = f"the anchor {record.key.test} is {_in_words(difference, error)}"
    early = f", which {verdict.sessions} of {ENOUGH_SESSIONS} sessions cannot tell from chance" if is_early else ""
    status: Status = "PASS" if not is_far else "INCONCLUSIVE" if is_early else "INCOMPARABLE"
    verdict = replace(
        verdict,
        status=status,
        reason=f"{words[0].upper()}{words[1:]}{early}.",
        tolerance=math.expm1(DEVIATIONS * error),
        change=math.expm1(difference),
        change_low=math.expm1(difference - half),
        change_high=math.expm1(difference + half),
        baseline_value=from_worse_log(prediction.expected_log, measurement.better),
        is_provisional=is_early,
    )
    return _Judged(record=record, verdict=verdict, words=words, is_off=status == "INCOMPARABLE")


def _in_words(difference: float, error: float) -> str:
    change = format_percent(abs(math.expm1(difference)))
    direction = "slower" if difference > 0 else "faster"
    deviations = f"{abs(difference) / error:.1f} times its deviation of {format_percent(math.expm1(error))}"
    return f"{change} {direction} than usual, {deviations} ({DEVIATIONS:g} are allowed)"


def _advice(name: str) -> str:
    anchor = ANCHORS[name]
    return (
        f"Likely causes: {anchor.cause}. See: {anchor.look}. If the machine is to stay so: "
        f"gpuperf baseline accept --reason WHY {MODULE}::{name}"
    )


def _note(verdicts: Sequence[Verdict]) -> str:
    least = min(verdict.sessions for verdict in verdicts)
    return (
        f"Anchors: {least} of {ENOUGH_SESSIONS} sessions on this hardware and software; until then they say nothing of "
        "the machine."
    )


def best_covariate(
    baseline: MetricBaseline, value: float, anchors: Sequence[TestRecord], file: BaselineFile | None
) -> Adjusted | None:
    """Correct a metric by the anchor that it has gone along with most, if there is one.

    The best of four is chosen, which flatters: of metrics that no anchor has to do with, the one in a hundred that
    passes for one anchor at eight sessions becomes three (see docs/anchors.md for what follows).

    Args:
        baseline: Of the metric.
        value: Of the metric, now.
        anchors: The records of this run on the same devices.
        file: Baselines of `MODULE` on these devices.
    """
    found: list[Adjusted] = []
    for record in anchors:
        measurement = record.measurements[0]
        known = file.tests.get(record.key.test, {}).get(measurement.metric) if file else None
        if file is None or known is None or identity_differences([measurement], known):
            continue
        comparable = replace(known, sessions=_comparable(record, known, file))
        adjusted = covariate(baseline, comparable, value, measurement.value)
        found += [replace(adjusted, anchor=record.key.test)] if adjusted else []
    return max(found, key=lambda one: one.correlation, default=None)
