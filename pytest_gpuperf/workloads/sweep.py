"""A measurement at one size after another: what came out at each, and why there is no larger one."""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from pytest_gpuperf.curves import KNEE_GAIN, knee, optimum
from pytest_gpuperf.errors import EngineOutOfMemory, NotSupported, UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_percent, format_value
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load, gpu_busy_share

Measured = TypeVar("Measured")


class Sweep(Record, Generic[Measured], frozen=True, kw_only=True):
    """What was measured at each size.

    Attributes:
        points: Size -> what the call returned, in the order of the sizes.
        end: Why the larger sizes are missing; `None` if none is.
    """

    points: dict[int, Measured]
    end: str | None = None

    def curve(self, value: Callable[[Measured], float]) -> dict[int, float]:
        """Take one number from each point."""
        return {size: value(point) for size, point in self.points.items()}


def sweep(measure: Callable[[int], Measured], sizes: Sequence[int]) -> Sweep[Measured]:
    """Measure at each size until one does not fit into memory: that is the end of the curve, and no error.

    Args:
        measure: Called with a size.
        sizes: Whole numbers above zero, rising.

    Raises:
        UsageError: No sizes, one below 1, or not rising.
        Exception: What `measure` raised at the first size, or anywhere if it is not for lack of memory.
    """
    _check_sizes(sizes)
    points: dict[int, Measured] = {}
    for size in sizes:
        try:
            points[size] = measure(size)
        except (EngineOutOfMemory, NotSupported, RuntimeError) as error:
            if not points or not _is_out_of_memory(error):
                raise
            return Sweep(points=points, end=f"out of memory at {size}: {_first_line(error)}")
    return Sweep(points=points)


def sweep_batches(
    generate: Callable[[Load], Generation], sizes: Sequence[int], *, prompt_tokens: int, output_tokens: int
) -> Sweep[Generation]:
    """Generate batches of each size, all requests at once; the first of a size is a warm-up and does not count.

    Args:
        generate: Of an engine that holds the largest batch at once, such as one with `max_num_seqs` of it.
        sizes: Requests in a batch, rising.
        prompt_tokens: Of each request.
        output_tokens: Of each request.

    Raises:
        UsageError: The sizes are not rising whole numbers above zero.
    """

    def measure(size: int) -> Generation:
        load = Load(requests=size, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        generate(load)
        return generate(load)

    return sweep(measure, sizes)


def profile_batches(
    profile: Callable[[Load], GpuTime | None], sizes: Iterable[int], *, prompt_tokens: int, output_tokens: int
) -> dict[int, GpuTime]:
    """Profile each batch once more: GPU time of each size; nothing without a GPU.

    Args:
        profile: Of the engine; to be called after all that is timed.
        sizes: Those that were measured.
        prompt_tokens: As in `sweep_batches`.
        output_tokens: As in `sweep_batches`.
    """
    found: dict[int, GpuTime] = {}
    for size in sizes:
        gpu = profile(Load(requests=size, prompt_tokens=prompt_tokens, output_tokens=output_tokens))
        if gpu is None:
            return {}
        found[size] = gpu
    return found


def sweep_busy_share(points: Mapping[int, Generation], profiled: Mapping[int, GpuTime]) -> float | None:
    """Share of the time of all batches together in which the GPU computed; `None` where they were not profiled."""
    if not profiled:
        return None
    busy_s = sum(gpu_busy_share(profiled[size], batch) * batch.duration_s for size, batch in points.items())
    return busy_s / sum(batch.duration_s for batch in points.values())


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or sizes[0] < 1 or any(after <= before for before, after in itertools.pairwise(sizes)):
        raise UsageError(f"The sizes {', '.join(map(str, sizes)) or '()'} are not rising whole numbers above zero.")


def _is_out_of_memory(error: Exception) -> bool:
    """What says so: vLLM's engine, a workload that counted before it allocated, or torch itself."""
    torch = sys.modules.get("torch")  # without it nothing of torch's was raised
    return isinstance(error, (EngineOutOfMemory, NotSupported)) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def batch_size_line(throughput: Mapping[int, float], latency_s: Mapping[int, float], *, end: str | None) -> str:
    """Say in one line which batch size is best, where the knee is, what each costs in latency, why the curve ends.

    Args:
        throughput: Batch size -> tok/s; at least one.
        latency_s: Batch size -> seconds a request.
        end: See `Sweep.end`.
    """
    best, bend = optimum(throughput, "higher"), knee(throughput)
    texts = [f"best batch size {best}: {_at(best, throughput, latency_s)}"]
    if bend == max(throughput) and len(throughput) > 1:
        texts.append(f"no knee: the last doubling still adds {format_percent(KNEE_GAIN)} or more")
    elif bend != best:
        texts.append(f"knee at {bend}: {_at(bend, throughput, latency_s)}")
    return "; ".join([*texts, *([f"ends: {end}"] if end else [])])


def _at(size: int, throughput: Mapping[int, float], latency_s: Mapping[int, float]) -> str:
    return f"{format_value(throughput[size], 'tok/s')}, {format_value(latency_s[size], 's')} a request"
