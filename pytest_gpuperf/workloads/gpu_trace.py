"""Traces of torch's profiler: how long the GPU was busy, and with what."""

from collections.abc import Sequence
from pathlib import Path

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.kernels import on_gpu, read_trace, summary_of
from pytest_gpuperf.records import KernelSummary
from pytest_gpuperf.workloads.requests import GpuTime

#: Of an engine's trace: 256 steps of an 8B model through transformers leave 500 MB.
_LARGEST_BYTES = 2**31


def gpu_time(traces: Sequence[Path], *, steps: int, duration_s: float = 0.0) -> GpuTime:
    """Mean over the ranks of the time in which anything ran on their GPU, with the summary of the busiest rank.

    Args:
        traces: One a rank.
        steps: Of the engine, while they were taken.
        duration_s: All of them took, by the host's clock.

    Raises:
        MeasurementError: No traces, one that cannot be read, or one without a kernel.
    """
    kernels: list[int] = []
    summaries: list[KernelSummary] = []
    for trace in traces:  # one at a time: each may take gigabytes
        events = read_trace(trace, most_bytes=_LARGEST_BYTES)
        kernels.append(len(on_gpu(events)))
        summaries += [summary_of(events, calls=steps, wall_s=duration_s)] if kernels[-1] and steps > 0 else []
    if not summaries or len(summaries) < len(traces):
        names = ", ".join(trace.name for trace in traces) or "no file"
        raise MeasurementError(
            f"The profiler saw no kernel in {steps} steps ({names}). Likely another profiler held CUPTI: end nsys, ncu "
            "or DCGM's profiling."
        )
    busy_s = sum(summary.busy_s for summary in summaries) * steps / len(traces)
    busiest = max(summaries, key=lambda summary: summary.busy_s)
    return GpuTime(busy_s=busy_s, steps=steps, kernels=round(sum(kernels) / len(traces)), summary=busiest)
