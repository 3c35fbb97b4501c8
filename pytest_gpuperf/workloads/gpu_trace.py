"""Traces of torch's profiler: how long the GPU was busy."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.workloads.requests import GpuTime, busy_time_s

#: Categories of what occupies a GPU (Kineto's activity types).
_ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


class _Event(msgspec.Struct):
    """One event of a Chrome trace, times in microseconds; other fields are passed over."""

    cat: str | None = None
    ts: float = 0.0
    dur: float = 0.0


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815 - the file's own word


def intervals_of(trace: Path) -> list[tuple[float, float]]:
    """Read begin and end, in seconds, of every kernel, copy and fill in a trace file, compressed or not.

    Raises:
        MeasurementError: The file is no trace.
    """
    data = trace.read_bytes()
    try:
        text = gzip.decompress(data) if trace.suffix == ".gz" else data
        events = msgspec.json.decode(text, type=_Trace).traceEvents
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise MeasurementError(f"{trace} is not a trace of torch's profiler: {error}.") from None
    return [(event.ts * 1e-6, (event.ts + event.dur) * 1e-6) for event in events if event.cat in _ON_GPU]


def gpu_time(traces: Sequence[Path], *, steps: int) -> GpuTime:
    """Mean over the ranks of the time in which anything ran on their GPU.

    Args:
        traces: One a rank.
        steps: Of the engine, while they were taken.

    Raises:
        MeasurementError: No traces, one that cannot be read, or one without a kernel.
    """
    ranks = [intervals_of(trace) for trace in traces]
    if not ranks or not all(ranks) or steps < 1:
        names = ", ".join(trace.name for trace in traces) or "no file"
        raise MeasurementError(
            f"The profiler saw no kernel in {steps} steps ({names}). Likely another profiler held CUPTI: end nsys, ncu "
            "or DCGM's profiling."
        )
    busy_s = sum(busy_time_s(rank) for rank in ranks) / len(ranks)
    return GpuTime(busy_s=busy_s, steps=steps, kernels=round(sum(map(len, ranks)) / len(ranks)))
