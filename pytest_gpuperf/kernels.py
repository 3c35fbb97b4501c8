"""Traces of torch's profiler, and what of them is worth keeping: a summary of one call.

Kineto writes Chrome's trace format, times in microseconds: on the GPU the categories `kernel`, `gpu_memcpy` and
`gpu_memset`, on the host the calls of CUDA as `cuda_runtime` and `cuda_driver`, and operators as `cpu_op`.
"""

import gzip
import re
import shutil
import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.records import KernelSummary, KernelUse

#: A larger trace is refused unread.
LARGEST_TRACE_BYTES = 256 * 2**20
MOST_KERNELS = 40
MOST_LETTERS = 240
KINDS: Mapping[str | None, Literal["kernel", "copy", "fill"]] = {
    "kernel": "kernel",
    "gpu_memcpy": "copy",
    "gpu_memset": "fill",
}
_OF_HOST = frozenset({"cuda_runtime", "cuda_driver"})
#: Of the runtime and of the driver, with their suffixes, such as cudaLaunchKernelExC_v11060 and cuLaunchKernelEx.
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|Mem(cpy|set)\w*Async)")
_GRAPH = re.compile(r"cu(da)?GraphLaunch")
_WAIT = re.compile(r"cu(da)?(Device|Stream|Event|Ctx)Synchronize")


class Detail(msgspec.Struct, frozen=True):
    """What an event says of itself; anything may be missing, or of another kind in events that are not read."""

    device: Any = None
    stream: Any = None
    grid: Any = None
    bytes: Any = None


class Event(msgspec.Struct, frozen=True):
    """One event of a trace, times in microseconds; other fields are passed over."""

    name: str = ""
    cat: str | None = None
    ts: float = 0.0
    dur: float = 0.0
    tid: Any = None
    args: Detail | None = None


class _Trace(msgspec.Struct):
    traceEvents: list[Event]  # noqa: N815 - the file's own word


def read_trace(path: Path, *, most_bytes: int | None = None) -> list[Event]:
    """Read the events of a trace file, compressed or not.

    Args:
        path: The file.
        most_bytes: It may have, uncompressed; `None`: 256 MiB.

    Raises:
        MeasurementError: The file is no trace, or too large.
    """
    most_bytes = LARGEST_TRACE_BYTES if most_bytes is None else most_bytes
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise MeasurementError(
                f"{path} has more than {most_bytes / 2**20:.0f} MiB, the most that is read of a trace. "
                "Profile fewer calls, or a shorter region."
            )
        return msgspec.json.decode(data, type=_Trace).traceEvents
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError) as error:
        raise MeasurementError(f"{path} is not a trace of torch's profiler: {error}.") from None


def keep_trace(path: Path, target: Path) -> None:
    """Write a compressed copy of a trace file, compressed or not."""
    if path.suffix == ".gz":
        shutil.copyfile(path, target)
        return
    with path.open("rb") as source, gzip.open(target, "wb", compresslevel=5) as compressed:
        shutil.copyfileobj(source, compressed)


def on_gpu(events: Iterable[Event]) -> list[Event]:
    """The kernels, copies and fills, by their begin."""
    return sorted((event for event in events if event.cat in KINDS), key=lambda event: event.ts)


def summary_of(events: Iterable[Event], *, calls: int, wall_s: float) -> KernelSummary:
    """Summarise what a GPU and its host did.

    Args:
        events: Of the trace, the profiled calls alone.
        calls: So many.
        wall_s: All of them took, by the host's clock.

    Raises:
        MeasurementError: Nothing ran on a GPU.
    """
    known = [event for event in events if event.cat in KINDS or event.cat in _OF_HOST]
    done = on_gpu(known)
    if not done:
        raise MeasurementError(
            f"The profiler saw no kernel in {calls} calls. Likely another profiler held CUPTI: end nsys, ncu or "
            "DCGM's profiling. Or the work ran in another process."
        )
    kernels, rest = _uses(done, calls)
    busy_us, longest_gap_us = _coverage(done)
    host = [event for event in known if event.cat in _OF_HOST]
    launches = [event for event in host if _LAUNCH.match(event.name)]
    return KernelSummary(
        calls=calls,
        wall_s=wall_s / calls,
        span_s=(max(event.ts + event.dur for event in done) - done[0].ts) * 1e-6 / calls,
        busy_s=busy_us * 1e-6 / calls,
        longest_gap_s=longest_gap_us * 1e-6,
        kernels=kernels,
        rest=rest,
        launches=len(launches) / calls,
        graph_launches=sum(bool(_GRAPH.match(event.name)) for event in launches) / calls,
        launch_s=sum(event.dur for event in launches) * 1e-6 / calls,
        sync_s=sum(event.dur for event in host if _WAIT.match(event.name)) * 1e-6 / calls,
        streams=len({(event.args.device, event.args.stream) for event in done if event.args}) or 1,
    )


def summary_of_cpu(events: Iterable[Event], *, calls: int, wall_s: float) -> KernelSummary:
    """Summarise torch's operators on a CPU, which stand for kernels: each with the time that is its own.

    Args:
        events: See `summary_of`.
        calls: See `summary_of`.
        wall_s: See `summary_of`.

    Raises:
        MeasurementError: There is no operator.
    """
    own = _self_times(event for event in events if event.cat == "cpu_op")
    if not own:
        raise MeasurementError(f"The profiler saw no operator of torch in {calls} calls: the work is not torch's.")
    kernels, rest = _uses(own, calls)
    busy_s = sum(event.dur for event in own) * 1e-6 / calls
    return KernelSummary(
        calls=calls,
        wall_s=wall_s / calls,
        span_s=busy_s,
        busy_s=busy_s,
        longest_gap_s=0.0,
        kernels=kernels,
        rest=rest,
        streams=len({event.tid for event in own}),
    )


def _self_times(events: Iterable[Event]) -> list[Event]:
    """Events of a stack each without the time of those that it called."""
    ordered = sorted(events, key=lambda event: (event.ts, -event.dur))
    own_us = [event.dur for event in ordered]
    stacks: dict[Any, list[int]] = defaultdict(list)
    for i, event in enumerate(ordered):
        stack = stacks[event.tid]
        while stack and ordered[stack[-1]].ts + ordered[stack[-1]].dur <= event.ts:
            stack.pop()
        if stack:
            own_us[stack[-1]] -= event.dur
        stack.append(i)
    return [msgspec.structs.replace(event, dur=max(us, 0.0)) for event, us in zip(ordered, own_us, strict=True)]


def _uses(events: Sequence[Event], calls: int) -> tuple[tuple[KernelUse, ...], KernelUse | None]:
    """The uses of the longest time, and all others together."""
    groups: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        groups[event.cat or "", event.name[:MOST_LETTERS]].append(event)
    uses = [_use(name, group, calls) for (_, name), group in groups.items()]
    uses.sort(key=lambda use: (-use.time_s, use.name))
    top, others = uses[:MOST_KERNELS], uses[MOST_KERNELS:]
    if not others:
        return tuple(top), None
    rest = KernelUse(
        name=f"{len(others)} others",
        count=sum(use.count for use in others),
        time_s=sum(use.time_s for use in others),
    )
    return tuple(top), rest


def _use(name: str, group: Sequence[Event], calls: int) -> KernelUse:
    kind = KINDS.get(group[0].cat, "kernel")
    details = [event.args for event in group if event.args]
    blocks = [detail.grid[0] * detail.grid[1] * detail.grid[2] for detail in details if _is_grid(detail.grid)]
    sizes = [detail.bytes for detail in details if isinstance(detail.bytes, int)]
    return KernelUse(
        name=name,
        kind=kind,
        count=len(group) / calls,
        time_s=sum(event.dur for event in group) * 1e-6 / calls,
        median_s=statistics.median(event.dur for event in group) * 1e-6,
        blocks=float(statistics.median(blocks)) if kind == "kernel" and blocks else None,
        bytes_moved=sum(sizes) / calls if kind != "kernel" and sizes else None,
    )


def _is_grid(grid: object) -> bool:
    return isinstance(grid, list) and len(grid) == 3 and all(isinstance(number, int) for number in grid)


def _coverage(done: Sequence[Event]) -> tuple[float, float]:
    """Time in which anything ran, and the longest in which nothing did; `done` by its begin."""
    busy_us = longest_gap_us = 0.0
    reached_us = done[0].ts
    for event in done:
        end_us = event.ts + event.dur
        longest_gap_us = max(longest_gap_us, event.ts - reached_us)
        busy_us += max(end_us - max(event.ts, reached_us), 0.0)
        reached_us = max(reached_us, end_us)
    return busy_us, longest_gap_us
