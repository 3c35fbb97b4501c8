"""What limits a workload: idle, overhead, latency, memory, compute, communication, or a balance of two. Pure.

After Williams, Waterman, Patterson, "Roofline" (CACM 2009), with two questions before it: did the GPU have anything to
do, and was it work of its own. All thresholds are here, each with its reason.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.nvml_meters import GpuActivity
from pytest_gpuperf.records import KernelSummary, KernelUse, Record

Limit = Literal[
    "idle", "overhead-bound", "latency-bound", "memory-bound", "compute-bound", "communication-bound", "balanced"
]
Axis = Literal["busy", "pause", "communication", "memory", "compute"]
Origin = Literal["measured", "data sheet"]

#: Below it the GPU has nothing to do: whatever it could do better matters for less than a tenth of the time.
IDLE_BELOW = 0.10
#: A mean pause before each launch from which the host does something else than launching: 5 µs (torch) to 37 µs (a
#: model of transformers on a slow core) are what launching took on an H200's host; 1,000 tiny kernels then keep the GPU
#: busy for 14 % of the time, and would for 7 % on a core half as fast, which is overhead all the same.
IDLE_PAUSE_S = 200e-6
#: Below it the gaps between kernels are the larger mistake: without them it could be 1.4 times faster.
BUSY_FROM = 0.70
#: From here on communication is what to look at: hidden behind computation, it could be 1.4 times faster.
COMMUNICATION_FROM = 0.30
#: Share of what the reference kernel reaches from which a pipe is the limit; less of both is latency, as in Nsight
#: Compute's rule "speed of light", which puts it at 60 % of the peak. On an H200 a softmax of rows reads 64 % of the
#: copy's traffic, a random gather 68 %, a product whose rows are not aligned 42 % of a product's operations.
BOUND_FROM = 0.60
#: Memory and computation are in balance where their times differ by less than this factor: none of both is to be
#: improved without the other becoming the limit at once.
BALANCE = 1.25
#: What a large product and a large copy reach of the data sheet, where they are not measured: 73 to 87 % in bfloat16 on
#: A100, H100, H200, B200 and B300, 90 % of the bandwidth on H100 and H200.
REACHED_FLOPS, REACHED_BANDWIDTH = 0.80, 0.90
#: What the hardware's counters show meanwhile, where that is not measured: those of an H200 at its power limit.
REACHED_TENSOR, REACHED_DRAM = 0.81, 0.81
#: A product below it does not use tensor cores (float32: 5 %), and nothing is held against its counter.
ON_TENSOR_CORES = 0.30
#: Calls of a profiled pass from which its own pauses are counted.
ENOUGH_CALLS = 5
#: Parts of names of kernels that talk to other GPUs (NCCL, PyTorch's symmetric memory, vLLM, TensorRT-LLM, MSCCL++).
_COMMUNICATION = (
    *("nccl", "allreduce", "all_reduce", "allgather", "all_gather", "reducescatter", "reduce_scatter"),
    *("cross_device_reduce", "multimem", "one_shot", "two_shot", "alltoall", "all_to_all"),
)
#: Copies that leave the GPU, as the profiler names their directions.
_LEAVING = ("HtoD", "DtoH", "PtoP")


class Ceilings(Record, frozen=True, kw_only=True):
    """What the device reaches at most: the roof of the roofline.

    Attributes:
        dtype: Of the product.
        flops_per_s: Of a large product of matrices; `None` if it is not known.
        bandwidth_bytes_per_s: Of a large copy, reads and writes.
        origin: Measured on this device in the same sitting, or what large kernels reach of the data sheet.
        tensor_share: What the hardware's counter of the tensor cores shows during the product, 0 to 1.
        dram_share: What that of the memory shows during the copy.
        peak_flops_per_s: Of the data sheet.
        peak_bandwidth_bytes_per_s: Of the data sheet.
        problem: Why something that was to be measured was not.
    """

    dtype: str
    flops_per_s: float | None = None
    bandwidth_bytes_per_s: float | None = None
    origin: Origin = "measured"
    tensor_share: float | None = None
    dram_share: float | None = None
    peak_flops_per_s: float | None = None
    peak_bandwidth_bytes_per_s: float | None = None
    problem: str | None = None

    @property
    def ridge(self) -> float | None:
        """FLOP for each byte from which computation takes longer than memory."""
        both = self.flops_per_s and self.bandwidth_bytes_per_s
        return self.flops_per_s / self.bandwidth_bytes_per_s if both else None  # type: ignore[operator]


def from_data_sheet(dtype: str, *, flops_per_s: float | None, bandwidth_bytes_per_s: float | None) -> Ceilings:
    """Estimate what the device reaches from its data sheet.

    Args:
        dtype: Of the work.
        flops_per_s: Published, dense, of this type.
        bandwidth_bytes_per_s: Published.
    """
    return Ceilings(
        dtype=dtype,
        flops_per_s=flops_per_s and REACHED_FLOPS * flops_per_s,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s and REACHED_BANDWIDTH * bandwidth_bytes_per_s,
        origin="data sheet",
        peak_flops_per_s=flops_per_s,
        peak_bandwidth_bytes_per_s=bandwidth_bytes_per_s,
    )


class Evidence(Record, frozen=True, kw_only=True):
    """What is known of one iteration of a workload.

    Attributes:
        time_s: By the clock, without a profiler.
        busy_s: Time in which anything ran on the GPU, from a profiled pass; `None` if it is not known.
        flop: Floating-point operations that the work needs.
        bytes_moved: Bytes that it has to read and write.
        activity: The hardware's counters, as means over the time; shares of the whole of it.
        kernels: Of the profiled pass.
    """

    time_s: float
    busy_s: float | None = None
    flop: float | None = None
    bytes_moved: float | None = None
    activity: GpuActivity | None = None
    kernels: KernelSummary | None = None


class Shares(Record, frozen=True, kw_only=True):
    """The numbers that decide; `None` is not known.

    Attributes:
        busy: Part of the time in which anything ran on the GPU.
        pause_s: Mean time between two launches in which nothing ran.
        communication: Part of the busy time in kernels and copies that talk to other GPUs or the host.
        memory: Memory traffic of the busy time as a share of the copy's.
        compute: Computation of the busy time as a share of the product's.
    """

    busy: float | None = None
    pause_s: float | None = None
    communication: float | None = None
    memory: float | None = None
    compute: float | None = None


class Neighbour(Record, frozen=True, kw_only=True):
    """What the nearest other class is, and how far away.

    Attributes:
        limit: The class there.
        axis: The number that would have to change, all others staying.
        value: What it would have to be.
        distance: From what it is, as a share.
    """

    limit: Limit
    axis: Axis
    value: float
    distance: float


class Diagnosis(Record, frozen=True, kw_only=True):
    """What limits a workload, with all that it was concluded from.

    Attributes:
        limit: The class; `None` where too little is known.
        missing: What is not known, in words.
        next: The nearest other class.
    """

    limit: Limit | None
    shares: Shares
    evidence: Evidence
    ceilings: Ceilings
    missing: tuple[str, ...] = ()
    next: Neighbour | None = None

    @property
    def flops_per_s(self) -> float | None:
        """Useful operations a second, pauses included."""
        return self.evidence.flop and self.evidence.flop / self.evidence.time_s

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        """Useful bytes a second, pauses included."""
        return self.evidence.bytes_moved and self.evidence.bytes_moved / self.evidence.time_s

    @property
    def mfu(self) -> float | None:
        """Useful operations a second over the ceiling's."""
        return _over(self.flops_per_s, self.ceilings.flops_per_s)

    @property
    def mbu(self) -> float | None:
        """Useful bytes a second over the ceiling's."""
        return _over(self.bandwidth_bytes_per_s, self.ceilings.bandwidth_bytes_per_s)

    @property
    def intensity(self) -> float | None:
        """Useful operations for each useful byte."""
        return _over(self.evidence.flop, self.evidence.bytes_moved)

    @property
    def traffic_bytes(self) -> float | None:
        """Bytes that the memory moved in an iteration, by the hardware's counter against the copy's."""
        activity, roof = self.evidence.activity, self.ceilings
        share = _over(activity.dram_share if activity else None, roof.dram_share or REACHED_DRAM)
        known = share is not None and roof.bandwidth_bytes_per_s is not None
        return share * roof.bandwidth_bytes_per_s * self.evidence.time_s if known else None  # type: ignore[operator]

    @property
    def least_s(self) -> float | None:
        """Time of an iteration that reaches the roof: no way of doing this very work is faster."""
        times = [
            _over(self.evidence.flop, self.ceilings.flops_per_s),
            _over(self.evidence.bytes_moved, self.ceilings.bandwidth_bytes_per_s),
        ]
        return max((one for one in times if one), default=None)


def diagnose(evidence: Evidence, ceilings: Ceilings) -> Diagnosis:
    """Say what limits a workload.

    Args:
        evidence: Of one iteration.
        ceilings: Of the device, for the workload's data type.
    """
    shares = shares_of(evidence, ceilings)
    limit = limit_of(shares)
    return Diagnosis(
        limit=limit,
        shares=shares,
        evidence=evidence,
        ceilings=ceilings,
        missing=_missing(shares),
        next=None if limit is None else nearest(shares),
    )


def shares_of(evidence: Evidence, ceilings: Ceilings) -> Shares:
    """Turn what is known into the numbers that decide.

    Of memory the hardware's counter wins over the bytes that the work needs: caches make the traffic less, scattered
    access makes it more. Of computation the larger counts: the counter sees tensor cores alone.
    """
    busy = busy_share(evidence)
    part = busy or 1.0
    working_s = evidence.time_s * part
    activity = evidence.activity or GpuActivity(duration_s=evidence.time_s)
    dram = _over(activity.dram_share, (ceilings.dram_share or REACHED_DRAM) * part)
    reached = REACHED_TENSOR if ceilings.tensor_share is None else ceilings.tensor_share
    tensor = _over(activity.tensor_share, reached * part) if reached >= ON_TENSOR_CORES else None
    useful_bytes = _over(evidence.bytes_moved, ceilings.bandwidth_bytes_per_s)
    useful_flop = _over(evidence.flop, ceilings.flops_per_s)
    computes = [one for one in (tensor, _over(useful_flop, working_s)) if one is not None]
    return Shares(
        busy=busy,
        pause_s=_pause_s(evidence, busy),
        communication=None if evidence.kernels is None else communication_share(evidence.kernels),
        memory=_over(useful_bytes, working_s) if dram is None else dram,
        compute=max(computes, default=None),
    )


def busy_share(evidence: Evidence) -> float | None:
    """Part of the time in which anything ran on the GPU: profiled time of the kernels / time without the profiler.

    The profiler slows the host down, not the kernels, so both are taken from where they are right. But a short
    profiled pass runs at a higher clock than a long one at its power limit, where kernels are slower (1.40 and 1.65 ms,
    for a product on an H200): they would seem to leave gaps. The gaps of the profiled pass itself are an upper bound of
    those, so the larger share is taken.
    """
    if evidence.busy_s is None:
        return None
    share, kernels = evidence.busy_s / evidence.time_s, evidence.kernels
    if kernels is not None and kernels.calls >= ENOUGH_CALLS:
        period_s = (kernels.span_s * kernels.calls - kernels.busy_s) / (kernels.calls - 1)
        share = max(share, kernels.busy_s / period_s if period_s > 0 else 0.0)
    return min(share, 1.0)


def _pause_s(evidence: Evidence, busy: float | None) -> float | None:
    launches = evidence.kernels.launches if evidence.kernels else 0
    return None if busy is None or launches <= 0 else evidence.time_s * (1 - busy) / launches


def limit_of(shares: Shares) -> Limit | None:
    """Name what limits a workload; `None` where what is known does not tell.

    >>> limit_of(Shares(busy=0.98, memory=0.91, compute=0.04))
    'memory-bound'
    """
    if shares.busy is not None and shares.busy < BUSY_FROM:
        is_launching = shares.pause_s is not None and shares.pause_s < IDLE_PAUSE_S
        return "idle" if shares.busy < IDLE_BELOW and not is_launching else "overhead-bound"
    if shares.communication is not None and shares.communication >= COMMUNICATION_FROM:
        return "communication-bound"
    memory, compute = shares.memory or 0.0, shares.compute or 0.0
    if max(memory, compute) < BOUND_FROM:
        is_known = None not in (shares.busy, shares.memory, shares.compute)  # not busy, it may be idle
        return "latency-bound" if is_known else None
    if max(memory, compute) < BALANCE * min(memory, compute):
        return "balanced"
    return "memory-bound" if memory > compute else "compute-bound"


def nearest(shares: Shares) -> Neighbour | None:
    """Find the least change of one of the numbers that would change the class."""
    limit = limit_of(shares)
    found = []
    for axis, value, edge in _edges(shares):
        beyond = edge * (1 + 1e-9) if edge > value else edge * (1 - 1e-9)
        other = limit_of(replace(shares, **{axis: beyond}))
        if other is not None and other != limit:
            found.append(Neighbour(limit=other, axis=axis, value=edge, distance=abs(edge - value)))
    return min(found, key=lambda one: one.distance, default=None)


def _edges(shares: Shares) -> Iterator[tuple[Axis, float, float]]:
    """Each number with each of the values at which the class may change."""
    memory, compute = shares.memory or 0.0, shares.compute or 0.0
    edges: dict[Axis, tuple[float, ...]] = {
        "busy": (IDLE_BELOW, BUSY_FROM),
        "communication": (COMMUNICATION_FROM,) if shares.communication else (),  # without any it does not come near
        "memory": (BOUND_FROM, compute * BALANCE, compute / BALANCE),
        "compute": (BOUND_FROM, memory * BALANCE, memory / BALANCE),
    }
    for axis, values in edges.items():
        known = getattr(shares, axis)
        yield from ((axis, known, edge) for edge in values if known is not None and 0 < edge <= 1)


def is_communication(kernel: KernelUse) -> bool:
    """Whether it moves data to or from another GPU or the host, by its name."""
    name = kernel.name.lower()
    if kernel.kind == "copy":
        return any(direction in kernel.name for direction in _LEAVING)
    return kernel.kind == "kernel" and any(part in name for part in _COMMUNICATION)


def communication_share(kernels: KernelSummary) -> float:
    """Part of the busy time in kernels and copies that talk to other GPUs or the host, at most 1.

    Several streams may work at a time, so a sum of kernels may be more than the busy time.
    """
    talking_s = sum(kernel.time_s for kernel in kernels.kernels if is_communication(kernel))
    return min(talking_s / kernels.busy_s, 1.0) if kernels.busy_s > 0 else 0.0


def _missing(shares: Shares) -> tuple[str, ...]:
    words = {
        "busy": "how long the GPU was busy",
        "memory": "bytes moved",
        "compute": "FLOP",
    }
    return tuple(word for axis, word in words.items() if getattr(shares, axis) is None)


def _over(number: float | None, by: float | None) -> float | None:
    return number / by if number is not None and by else None


def minus(longer: KernelSummary, shorter: KernelSummary) -> KernelSummary | None:
    """Take the kernels of a shorter run out of those of a longer one that begins the same; `None` if nothing is left.

    So the steps of decoding are told from the reading of the prompt. Both have to be of one call.
    """
    known = {kernel.name: kernel for kernel in shorter.kernels}
    left = [_without(kernel, known.get(kernel.name)) for kernel in longer.kernels]
    kernels = tuple(kernel for kernel in left if kernel.time_s > 0 and kernel.count > 0)
    busy_s = longer.busy_s - shorter.busy_s
    if busy_s <= 0 or not kernels:
        return None
    return replace(
        longer,
        wall_s=max(longer.wall_s - shorter.wall_s, 0.0),
        span_s=max(longer.span_s - shorter.span_s, busy_s),
        busy_s=busy_s,
        kernels=kernels,
        rest=None,
        launches=max(longer.launches - shorter.launches, 0.0),
        graph_launches=max(longer.graph_launches - shorter.graph_launches, 0.0),
        launch_s=max(longer.launch_s - shorter.launch_s, 0.0),
        sync_s=max(longer.sync_s - shorter.sync_s, 0.0),
    )


def _without(kernel: KernelUse, other: KernelUse | None) -> KernelUse:
    if other is None:
        return kernel
    return replace(kernel, count=kernel.count - other.count, time_s=kernel.time_s - other.time_s)


def per_step(kernels: KernelSummary, steps: float) -> KernelSummary:
    """Divide a summary of one call by the steps that the call made."""
    parts = [kernels.rest] if kernels.rest else []
    divided = [
        replace(one, count=one.count / steps, time_s=one.time_s / steps) for one in chain(kernels.kernels, parts)
    ]
    names = ("wall_s", "span_s", "busy_s", "launches", "graph_launches", "launch_s", "sync_s")
    return replace(
        kernels,
        kernels=tuple(divided[: len(kernels.kernels)]),
        rest=divided[-1] if parts else None,
        **{name: getattr(kernels, name) / steps for name in names},
    )
