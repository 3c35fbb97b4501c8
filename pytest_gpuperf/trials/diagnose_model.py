"""Runs a language model for `gpuperf diagnose`: reading and producing apart, first timed, then under the profiler."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from msgspec.structs import asdict, replace

from pytest_gpuperf.analysis.model_work import Phase
from pytest_gpuperf.analysis.roofline import minus, per_step
from pytest_gpuperf.monitor import Monitor
from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.records import KernelSummary, Record, Telemetry
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load

EngineName = Literal["transformers", "vllm"]
#: Most steps of a profiled pass: their traces are large.
_PROFILED_TOKENS = 17
#: Least time of a watched stretch: the counters need 100 ms, the clock a second.
LEAST_S = 1.0


class Running(Protocol):
    """A model that runs: `transformers.Generator` and `vllm.Engine`."""

    def generate(self, load: Load, /) -> Generation:
        """Generate a load and time it."""
        ...

    def profile(self, load: Load, /) -> GpuTime | None:
        """Generate it under the profiler."""
        ...


class Stretch(Record, frozen=True, kw_only=True):
    """What was seen of one phase.

    Attributes:
        times_s: Of each step.
        activity: Of the time that the steps took.
        cpu_share: Of one core, by this process, while it was watched; at most 1.
        busy_s: Of one step, from the profiled pass.
        kernels: Of one step.
    """

    phase: Phase
    times_s: tuple[float, ...]
    activity: GpuActivity | None = None
    telemetry: Telemetry
    cpu_share: float
    busy_s: float | None = None
    kernels: KernelSummary | None = None


class Watching(Record, frozen=True, kw_only=True):
    """How to watch.

    Attributes:
        monitor: Makes a monitor of the device.
        meter: Begins to average the hardware's counters.
        iterations: Steps to time at least.
        limit_s: After which no further load is begun.
    """

    monitor: Callable[[], Monitor]
    meter: Callable[[], Callable[[], GpuActivity | None]]
    iterations: int
    limit_s: float


def run_model(running: Running, load: Load, phases: Sequence[Phase], watching: Watching) -> tuple[Stretch, ...]:
    """Time the phases of a model, then profile them.

    Reading is timed alone, as loads of one token. Producing cannot be: what the counters saw of the reading before it
    is taken out, which is why reading is watched in any case.

    Args:
        running: The model.
        load: Of producing; reading is its prompts.
        phases: That are wanted.
        watching: How long.
    """
    reading_load = replace(load, output_tokens=1)
    running.generate(reading_load)  # compiles, captures, fills caches
    wants_decode = "decode" in phases
    brief = replace(watching, iterations=1) if phases == ("decode",) else watching
    stretches = [_reading(running, reading_load, brief)]
    if wants_decode:
        running.generate(load)
        stretches.append(_producing(running, load, watching, stretches[0]))
    profiled = _profiled(running, reading_load, load if wants_decode else None)
    found = [replace(one, busy_s=busy_s, kernels=kernels) for one, (busy_s, kernels) in zip(stretches, profiled)]  # noqa: B905
    return tuple(one for one in found if one.phase in phases)


class _Window(Record, frozen=True, kw_only=True):
    generations: tuple[Generation, ...]
    duration_s: float
    cpu_share: float
    activity: GpuActivity | None
    telemetry: Telemetry


def _watched(running: Running, load: Load, watching: Watching, steps_each: int) -> _Window:
    generations: list[Generation] = []
    with watching.monitor() as monitor:
        read, cpu_s, begin_s = watching.meter(), working_s(), time.perf_counter()
        elapsed_s = 0.0
        while not generations or (
            elapsed_s < watching.limit_s
            and (len(generations) * steps_each < watching.iterations or elapsed_s < min(LEAST_S, watching.limit_s))
        ):
            generations.append(running.generate(load))
            elapsed_s = time.perf_counter() - begin_s
        activity, cpu_s = read(), working_s() - cpu_s
    return _Window(
        generations=tuple(generations),
        duration_s=elapsed_s,
        cpu_share=min(cpu_s / elapsed_s, 1.0) if elapsed_s > 0 else 1.0,
        activity=activity,
        telemetry=monitor.telemetry,
    )


def _reading(running: Running, load: Load, watching: Watching) -> Stretch:
    window = _watched(running, load, watching, 1)
    times_s = tuple(one.ttft_s(100) for one in window.generations)
    return Stretch(
        phase="prefill",
        times_s=times_s,
        activity=_part(window.activity, None, whole_s=window.duration_s, other_s=0.0, own_s=sum(times_s)),
        telemetry=window.telemetry,
        cpu_share=window.cpu_share,
    )


def _producing(running: Running, load: Load, watching: Watching, reading: Stretch) -> Stretch:
    window = _watched(running, load, watching, load.output_tokens - 1)
    # of several requests the one that began last: all others are producing, and nothing is read any more
    last = [max(one.requests, key=lambda request: request.ttft_s) for one in window.generations]
    times_s = tuple(gap for request in last for gap in request.gaps_s)
    return Stretch(
        phase="decode",
        times_s=times_s,
        activity=_part(
            window.activity,
            reading.activity,
            whole_s=window.duration_s,
            other_s=sum(request.ttft_s for request in last),
            own_s=sum(times_s),
        ),
        telemetry=window.telemetry,
        cpu_share=window.cpu_share,
    )


def _part(
    whole: GpuActivity | None, other: GpuActivity | None, *, whole_s: float, other_s: float, own_s: float
) -> GpuActivity | None:
    """Means over a part of a window, of those over all of it and over another part; between the two nothing ran."""
    if whole is None or own_s <= 0 or (other is None and other_s > 0.1 * whole_s):
        return None
    known = asdict(other) if other else {}

    def own(name: str, value: float | None) -> float | None:
        return None if value is None else max(value * whole_s - (known.get(name) or 0.0) * other_s, 0.0) / own_s

    means = {name: own(name, value) for name, value in asdict(whole).items() if name != "duration_s"}
    return GpuActivity(duration_s=own_s, **means)


def _profiled(
    running: Running, reading: Load, producing: Load | None
) -> list[tuple[float | None, KernelSummary | None]]:
    """Busy time and kernels of a step of each phase."""
    first = running.profile(reading)
    if first is None:
        return [(None, None)] * (1 if producing is None else 2)
    found: list[tuple[float | None, KernelSummary | None]] = [(first.busy_s, _whole(first))]
    if producing is not None:
        tokens = min(producing.output_tokens, _PROFILED_TOKENS)
        second = running.profile(replace(producing, output_tokens=tokens))
        found.append(_difference(first, second))
    return found


def _difference(first: GpuTime, second: GpuTime | None) -> tuple[float | None, KernelSummary | None]:
    """Of one step that the second made and the first did not."""
    steps = second.steps - first.steps if second else 0
    if second is None or steps < 1 or second.busy_s <= first.busy_s:
        return None, None
    before, after = _whole(first), _whole(second)
    left = minus(after, before) if before and after else None
    return (second.busy_s - first.busy_s) / steps, None if left is None else per_step(left, steps)


def _whole(gpu: GpuTime) -> KernelSummary | None:
    """Of all steps together, as if they were one call."""
    return None if gpu.summary is None else replace(per_step(gpu.summary, 1 / gpu.steps), calls=1)


def working_s(schedstat: Path = Path("/proc/self/schedstat")) -> float:
    """Seconds that this process worked, or would have if it had had a core: other work on the host is no idleness.

    Args:
        schedstat: Where Linux says how long the main thread ran and how long it waited for a core, in nanoseconds.
    """
    waited_s = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited_s = int(schedstat.read_text().split()[1]) * 1e-9
    return time.process_time() + waited_s


def estimated_tokens(prompt: str) -> int:
    """Estimate the tokens of a text from its words: four for three, as in English; at least one."""
    return max(math.ceil(len(prompt.split()) * 4 / 3), 1)
