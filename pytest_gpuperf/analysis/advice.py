"""What to do: recommendations that follow from a diagnosis, each with its number and a bound of its gain. Pure.

A bound is Amdahl's: the part of the time that an action can touch, and how much faster that part can become at most.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import msgspec

from pytest_gpuperf.analysis.kernel_names import is_product
from pytest_gpuperf.analysis.model_work import ModelStep, largest_batch, ridge_batch
from pytest_gpuperf.analysis.roofline import BOUND_FROM, Diagnosis, is_communication
from pytest_gpuperf.records import KernelSummary, KernelUse, Record, Telemetry
from pytest_gpuperf.units import counted, format_percent, format_value

#: What promises less is not worth a line.
LEAST_GAIN = 1.03
MOST = 5
#: So many times the batch is proposed at once: more changes latency too much to be one step.
BATCH_STEP = 8
#: A kernel of a microsecond is an empty one; below five times that, launching is most of it.
_TINY_S = 5e-6
#: A pause so many times as long as the launch in it is the host's own work: torch's operators take up to 2 (the
#: pauses of an eager network of 20 layers on an H200), a loop that spins for 30 µs takes 9.
_HOST_WORK = 4.0
#: Names of kernels that torch runs one by one for each operator.
_EAGER = re.compile(r"at::native::|Memcpy DtoD|elementwise_kernel|reduce_kernel")
#: A product's kernel names the architecture that it was written for: cutlass_75, sm80_xmma, sm90.
_ARCHITECTURE = re.compile(r"(?:cutlass_|sm_?)(\d\d\d?)(?=_|\D)")
#: What CUTLASS calls operands whose rows begin every 16 bytes, of 16 and of 8 bits.
_ALIGNED = re.compile(r"align(8|16)\b")
_FP32_GEMM = re.compile(r"sgemm|f32f32_f32f32|simt", re.IGNORECASE)
_HALF_TYPES = ("bfloat16", "float16")


class Recommendation(Record, frozen=True, kw_only=True):
    """One thing to do.

    Attributes:
        topic: A word for it.
        because: The number that it follows from.
        action: What to do.
        gain: Times faster at most; of tokens or calls a second.
    """

    topic: str
    because: str
    action: str
    gain: float

    def __str__(self) -> str:
        return f"{self.because}: {self.action}; at most {format_gain(self.gain)}."


class Setting(Record, frozen=True, kw_only=True):
    """Where a workload ran, as far as advice depends on it; `None` is not known.

    Attributes:
        dtype: Of the work.
        peak_flops_per_s: Of the data sheet, by type.
        telemetry: Of the time without the profiler.
        max_sm_clock_mhz: The highest that the GPU has.
        nvlink_bytes_per_s: Of the data sheet, one way, all links.
        step: Of a language model.
        engine: What ran it.
        gpus: That worked on it.
    """

    dtype: str | None = None
    peak_flops_per_s: dict[str, float] = msgspec.field(default_factory=dict)
    sm_count: int | None = None
    compute_capability: str | None = None
    memory_bytes: int | None = None
    telemetry: Telemetry | None = None
    max_sm_clock_mhz: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    nvlink_bytes_per_s: float | None = None
    step: ModelStep | None = None
    engine: str | None = None
    gpus: int = 1


Rule = Callable[[Diagnosis, Setting], Recommendation | None]


def recommendations(found: Diagnosis, setting: Setting) -> tuple[Recommendation, ...]:
    """Say what to do: the largest gain first, five at most, and last how far the work is from the roof."""
    known = [advice for rule in RULES if (advice := rule(found, setting)) is not None]
    worth = sorted((one for one in known if LEAST_GAIN <= one.gain < math.inf), key=lambda one: -one.gain)
    roof = to_the_roof(found, setting)
    chosen = worth[: MOST - 1 if roof else MOST]
    return (*chosen, roof) if roof else tuple(chosen)


def amdahl(share: float, factor: float = math.inf) -> float:
    """Times faster at most, if a share of the time becomes faster by a factor (Amdahl 1967).

    >>> amdahl(0.5, 2)
    1.3333333333333333
    """
    left = 1 - min(share, 1.0) * (1 - 1 / factor)
    return 1 / left if left > 0 else math.inf


def format_gain(gain: float) -> str:
    """Print a factor: `1.02x`, `2.6x`, `12x`, `3,400x`."""
    decimals = 2 if gain < 1.995 else 1 if gain < 9.95 else 0
    return f"{gain:,.{decimals}f}x"


# Gaps


def gaps(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Many launches with pauses between them."""
    kernels, busy = found.evidence.kernels, found.shares.busy
    if busy is None or found.limit == "idle":
        return None
    idle = f"Idle {format_percent(1 - busy)} of the time"
    launches = f", {kernels.launches:,.0f} launches an iteration" if kernels and kernels.launches else ""
    pause_s, launch_s = (
        found.shares.pause_s or 0.0,
        kernels.launch_s / kernels.launches if launches and kernels else 0.0,
    )
    if setting.step is None and launch_s and pause_s > _HOST_WORK * launch_s:
        launches += (
            f" that take {format_value(launch_s, 's', digits=2)} of a pause of {format_value(pause_s, 's', digits=2)}"
        )
        action = "take the host's own work from between them"
    elif setting.compute_capability is None:
        action = "see what the process waits for"  # a CPU has no launches
    elif kernels and kernels.graph_launches:
        action = "give the graphs more work each, or let the host prepare the next step while one runs"
    elif setting.engine == "transformers":
        action = 'vLLM (--engine vllm), or a static cache and torch.compile(mode="reduce-overhead")'
    elif setting.engine == "vllm":
        action = "a larger batch for each step of the engine, or less host work beside it"
    else:
        action = 'CUDA graphs or torch.compile(mode="reduce-overhead")'
    return Recommendation(topic="gaps", because=idle + launches, action=action, gain=amdahl(1 - busy))


def host_work(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """Few launches with long pauses: the host does something else."""
    kernels, busy = found.evidence.kernels, found.shares.busy
    if busy is None or found.limit != "idle":
        return None
    longest = f", once for {format_value(kernels.longest_gap_s, 's', digits=3)}" if kernels else ""
    return Recommendation(
        topic="host",
        because=f"Idle {format_percent(1 - busy)} of the time{longest}",
        action="move what the host does there (waiting, loading, preparing) beside the GPU's work",
        gain=amdahl(1 - busy),
    )


def sharing(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """A GPU that has nothing to do can do it for several."""
    busy = found.shares.busy
    if found.limit != "idle" or not busy:
        return None
    return Recommendation(
        topic="sharing",
        because=f"One process keeps the GPU busy for {format_percent(busy)} of the time",
        action="let several share it (more requests at a time, several processes under MPS)",
        gain=1 / busy,
    )


def larger_work(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """A launch that brings more hides the pause before the next."""
    kernels, busy, pause_s = found.evidence.kernels, found.shares.busy, found.shares.pause_s
    if found.limit != "overhead-bound" or setting.step or not (kernels and busy and pause_s and kernels.launches):
        return None
    work_s = kernels.busy_s / kernels.launches
    return Recommendation(
        topic="larger work",
        because=f"Each launch brings {format_value(work_s, 's', digits=2)} of work and a pause of "
        f"{format_value(pause_s, 's', digits=2)}",
        action=f"{math.ceil((work_s + pause_s) / work_s)} times the work a launch (batch, sizes) hides the pauses",
        gain=1 / busy,
    )


def tiny_kernels(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """Kernels that are over before they have begun."""
    kernels, least_s = found.evidence.kernels, found.least_s
    count = sum(one.count for one in _kernels(kernels))
    if kernels is None or least_s is None or count < 20 or kernels.busy_s / count > _TINY_S:
        return None
    return Recommendation(
        topic="fusion",
        because=f"{count:,.0f} kernels of {format_value(kernels.busy_s / count, 's', digits=2)} an iteration, "
        f"for work of {format_value(least_s, 's', digits=2)}",
        action="fuse them (torch.compile, one kernel for a loop)",
        gain=found.evidence.time_s / least_s,
    )


# Models


def batch(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Decoding reads the weights once a step, for however many requests."""
    step = setting.step
    if step is None or step.phase != "decode" or found.limit in ("compute-bound", "communication-bound"):
        return None
    ridge = ridge_batch(step, found.ceilings)
    fits = largest_batch(step, setting.memory_bytes) if setting.memory_bytes else None
    target = min([step.batch_size * BATCH_STEP, *(one for one in (ridge, fits) if one is not None)])
    now_s, then_s = step.least_s(found.ceilings), step.at(target).least_s(found.ceilings)
    if target <= step.batch_size or now_s is None or then_s is None:
        return None
    until = f"the ridge is at batch {ridge:,}" if ridge else "keys and values keep it below the ridge"
    full = f", memory is full at {fits:,}" if fits is not None and fits < (ridge or math.inf) else ""
    return Recommendation(
        topic="batch",
        because=f"Weights of {format_value(step.weights_bytes, 'B', digits=3)} are read once a step, for "
        f"{counted(step.batch_size, 'request')}",
        action=f"batch {target} raises tokens/s ({until}{full})",
        gain=target / step.batch_size * now_s / then_s,
    )


def fp8_weights(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Half the bytes of the weights, where reading them is the time."""
    step = setting.step
    if step is None or step.weight_bytes < 2 or not setting.peak_flops_per_s.get("float8"):
        return None
    share = step.weights_bytes / step.bytes_moved
    time_share = share * _memory_of_time(found)
    if found.limit not in ("memory-bound", "balanced", "latency-bound") or time_share < 0.1:
        return None
    return Recommendation(
        topic="fp8 weights",
        because=f"Weights are {format_percent(share)} of the bytes that a step needs",
        action="fp8 weights halve them (vLLM: --quantization fp8)",
        gain=amdahl(time_share, 2),
    )


def fp8_kv(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Half the bytes of keys and values, where they are many."""
    step = setting.step
    if step is None or step.kv_element_bytes < 2 or setting.engine != "vllm" or step.phase != "decode":
        return None
    share = step.kv_bytes / step.bytes_moved
    if share < 0.2:
        return None
    return Recommendation(
        topic="fp8 KV cache",
        because=f"Keys and values are {format_percent(share)} of the bytes that a step needs",
        action="an fp8 KV cache halves them (vLLM: --kv-cache-dtype fp8)",
        gain=amdahl(share * _memory_of_time(found), 2),
    )


# Computation


def fp8_products(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Tensor cores are faster in a smaller type."""
    peaks, dtype = setting.peak_flops_per_s, setting.dtype
    if found.limit not in ("compute-bound", "balanced") or dtype not in _HALF_TYPES or not peaks.get("float8"):
        return None
    factor = peaks["float8"] / peaks[dtype] if peaks.get(dtype) else 1.0
    share = min(found.shares.compute or 0.0, 1.0) * (found.shares.busy or 1.0)
    return Recommendation(
        topic="fp8",
        because=f"Products in {dtype} take {format_percent(share)} of the time",
        action=f"fp8 has {format_gain(factor)} the peak here",
        gain=amdahl(share, factor),
    )


def tf32(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Products in float32 leave the tensor cores idle."""
    peaks = setting.peak_flops_per_s
    share = _share_of_time(found, [one for one in _kernels(found.evidence.kernels) if _is_float32_product(one)])
    if share < 0.1 or not (peaks.get("tf32") and peaks.get("float32")):
        return None
    factor = peaks["tf32"] / peaks["float32"]
    return Recommendation(
        topic="tf32",
        because=f"Products in float32 take {format_percent(share)} of the time, without tensor cores",
        action=f'torch.set_float32_matmul_precision("high") allows TF32, {format_gain(factor)} the peak here',
        gain=amdahl(share, factor),
    )


def power(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """A clock that the power limit holds down."""
    seen, highest = setting.telemetry, setting.max_sm_clock_mhz
    if seen is None or not seen.sm_clock_mhz or not highest or (seen.power_cap_share or 0.0) < 0.3:
        return None
    limit, usual = setting.power_limit_w, setting.default_power_limit_w
    action = "what takes less power runs at a higher clock (fp8, fewer bytes)"
    if limit is not None and usual is not None and limit < 0.99 * usual:
        action = f"raise the limit of {limit:.0f} W to {usual:.0f} W (sudo nvidia-smi -pl {usual:.0f})"
    return Recommendation(
        topic="power",
        because=f"Power-capped {format_percent(seen.power_cap_share or 0.0)} of the time, "
        f"at {seen.sm_clock_mhz:.0f} of {highest:.0f} MHz",
        action=action,
        gain=amdahl(min(found.shares.compute or 0.0, 1.0), highest / seen.sm_clock_mhz),
    )


def heat(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """A clock that heat or the power supply holds down."""
    seen, highest = setting.telemetry, setting.max_sm_clock_mhz
    if seen is None or not seen.sm_clock_mhz or not highest:
        return None
    share = max(seen.sw_thermal_share or 0.0, seen.hw_thermal_share or 0.0, seen.power_brake_share or 0.0)
    if share < 0.01:
        return None
    temperature = "" if seen.temperature_c is None else f" at {seen.temperature_c:.0f} °C"
    return Recommendation(
        topic="heat",
        because=f"Slowed down by heat or a power brake {format_percent(share)} of the time{temperature}",
        action=f"mend the cooling or the supply; the clock was {seen.sm_clock_mhz:.0f} of {highest:.0f} MHz",
        gain=highest / seen.sm_clock_mhz,
    )


def fusion(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """Time in torch's own kernels, one an operator, between the products."""
    kernels = list(_kernels(found.evidence.kernels))
    eager = [one for one in kernels if _EAGER.search(one.name) and not is_product(one.name)]
    count, share = sum(one.count for one in eager), _share_of_time(found, eager)
    if len(kernels) < 3 or count < 4 or share < 0.05 or found.limit in ("idle", "overhead-bound"):
        return None
    return Recommendation(
        topic="fusion",
        because=f"{count:,.0f} kernels that torch runs operator by operator take {format_percent(share)} of the time",
        action="torch.compile fuses them",
        gain=amdahl(share),
    )


def old_kernel(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """A product that runs a kernel of an older architecture, most often because its rows are not aligned."""
    if (found.shares.compute or 1.0) >= BOUND_FROM or not setting.compute_capability or not found.evidence.flop:
        return None
    own = int(setting.compute_capability.replace(".", ""))
    for kernel in _kernels(found.evidence.kernels):
        if _ALIGNED.search(kernel.name):  # it runs for another reason
            continue
        match = _ARCHITECTURE.search(kernel.name)
        share = _share_of_time(found, [kernel])
        if match and int(match[1]) < own and share >= 0.3 and not _FP32_GEMM.search(kernel.name):
            return Recommendation(
                topic="alignment",
                because=f"{format_percent(share)} of the time is in a kernel for compute capability "
                f"{match[1][:-1]}.{match[1][-1]}, at {format_percent(found.shares.compute or 0.0)} of a product's rate",
                action="make all sizes multiples of 8 (16 bytes), so that newer kernels apply",
                gain=amdahl(share, 1 / (found.shares.compute or 1.0)),
            )
    return None


def few_blocks(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """A kernel with fewer blocks than there are multiprocessors leaves some without work."""
    if found.limit != "latency-bound" or not setting.sm_count:
        return None
    count = setting.sm_count
    small = [one for one in _kernels(found.evidence.kernels) if one.blocks and one.blocks < 0.8 * count]
    share = _share_of_time(found, small)
    if not small or share < 0.1:
        return None
    largest = max(small, key=lambda one: one.time_s)
    blocks = largest.blocks or 1.0
    return Recommendation(
        topic="blocks",
        because=f"Kernels with {blocks:.0f} blocks and the like, on {count} SMs, take {format_percent(share)} of "
        "the time",
        action="more independent work for each launch (a larger batch, streams side by side)",
        gain=amdahl(share, count / blocks),
    )


# Memory


def extra_traffic(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Memory that moves more than the work needs."""
    moved, needed = found.traffic_bytes, found.evidence.bytes_moved
    if found.limit != "memory-bound" or setting.step is not None or not moved or not needed or moved < 1.3 * needed:
        return None
    return Recommendation(
        topic="traffic",
        because=f"Memory moves {moved / needed:.1f} times the {format_value(needed, 'B', digits=3)} that are needed",
        action="read neighbouring elements together, and each of them once",
        gain=amdahl(_memory_of_time(found), moved / needed),
    )


def fewer_bytes(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """At the bandwidth, only fewer bytes are faster."""
    needed = found.evidence.bytes_moved
    if found.limit not in ("memory-bound", "balanced") or setting.step is not None or not needed:
        return None
    is_wide = setting.dtype in ("float32", "tf32")
    action = "a 16-bit type halves them" if is_wide else "half of them, by fusing it with what comes before or after"
    return Recommendation(
        topic="bytes",
        because=f"{format_value(needed, 'B', digits=3)} an iteration take {format_percent(_memory_of_time(found))} of "
        "the time",
        action=action,
        gain=amdahl(_memory_of_time(found), 2),
    )


# Communication


def less_communication(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """Bytes between GPUs."""
    share = (found.shares.communication or 0.0) * (found.shares.busy or 1.0)
    if share < 0.1:
        return None
    name = _longest(one for one in _kernels(found.evidence.kernels) if is_communication(one))
    return Recommendation(
        topic="communication",
        because=f"Communication takes {format_percent(share)} of the time, most of it {name}",
        action="half the bytes (a smaller type, or a less often exchange)",
        gain=amdahl(share, 2),
    )


def overlap(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """Communication beside computation."""
    share = found.shares.communication or 0.0
    hidden = min(share, 1 - share) * (found.shares.busy or 1.0)
    if share < 0.1 or hidden < 0.02:
        return None
    fewer = f", or fewer than {setting.gpus} GPUs" if setting.gpus > 1 else ""
    return Recommendation(
        topic="overlap",
        because=f"{format_percent(share)} of the busy time is communication, {format_percent(1 - share)} is not",
        action=f"let them run side by side (another stream){fewer}",
        gain=amdahl(hidden),
    )


def slow_link(found: Diagnosis, setting: Setting) -> Recommendation | None:
    """A link that could carry more."""
    activity, peak = found.evidence.activity, setting.nvlink_bytes_per_s
    rate = None if activity is None else activity.nvlink_tx_bytes_per_s
    if found.limit != "communication-bound" or not rate or not peak:
        return None
    share = (found.shares.communication or 0.0) * (found.shares.busy or 1.0)
    return Recommendation(
        topic="link",
        because=f"NVLink carries {format_value(rate, 'B/s', digits=3)} one way, "
        f"of {format_value(peak, 'B/s', digits=3)}",
        action="larger messages, fewer of them",
        gain=amdahl(share, max(peak / rate, 1.0)),
    )


def to_the_roof(found: Diagnosis, setting: Setting) -> Recommendation | None:  # noqa: ARG001 - as all rules
    """How much a better kernel could give at all."""
    pipes = {"memory": found.shares.memory, "compute": found.shares.compute}
    known = {name: share for name, share in pipes.items() if share is not None}
    if not known or found.limit not in ("memory-bound", "compute-bound", "balanced", "latency-bound"):
        return None
    name, share = max(known.items(), key=lambda item: item[1])
    what = "a large copy's traffic" if name == "memory" else "a large product's rate"
    gain = 1 / min(max(share, 1e-3), 1.0)
    if share >= 0.9:
        action = "leave the kernels, only less work is faster"
    elif found.limit == "latency-bound":
        occupancy = found.evidence.activity.occupancy if found.evidence.activity else None
        seen = "" if occupancy is None else f" (occupancy {format_percent(occupancy)})"
        action = f"its kernels wait: more of them at a time, or better ones{seen}"
    else:
        action = "better kernels for these sizes"
    return Recommendation(
        topic="roof", because=f"The busy time has {format_percent(share)} of {what}", action=action, gain=gain
    )


RULES: Sequence[Rule] = (
    gaps,
    host_work,
    sharing,
    larger_work,
    tiny_kernels,
    batch,
    fp8_weights,
    fp8_kv,
    fp8_products,
    tf32,
    power,
    heat,
    fusion,
    old_kernel,
    few_blocks,
    extra_traffic,
    fewer_bytes,
    less_communication,
    overlap,
    slow_link,
)


def _kernels(summary: KernelSummary | None) -> Iterator[KernelUse]:
    """The kernels by name, the longest first; copies and fills too."""
    return iter(summary.kernels if summary else ())


def _share_of_time(found: Diagnosis, kernels: Sequence[KernelUse]) -> float:
    """Part of an iteration's time in some kernels."""
    summary = found.evidence.kernels
    if summary is None or summary.busy_s <= 0:
        return 0.0
    return min(sum(one.time_s for one in kernels) / summary.busy_s, 1.0) * (found.shares.busy or 1.0)


def _memory_of_time(found: Diagnosis) -> float:
    """Part of an iteration's time that moving its bytes at the copy's speed takes."""
    return min(found.shares.memory or 0.0, 1.0) * (found.shares.busy or 1.0)


def _is_float32_product(kernel: KernelUse) -> bool:
    return _FP32_GEMM.search(kernel.name) is not None and "tf32" not in kernel.name.lower()


def _longest(kernels: Iterator[KernelUse]) -> str:
    name = next((one.name for one in kernels), "unknown")
    return "".join(takewhile(lambda letter: letter not in "(<", name))[:40]
