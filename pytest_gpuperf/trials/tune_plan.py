"""What `gpuperf tune` tries: the levels of each factor, and the settings that follow from what was found. Pure."""

import itertools
from collections.abc import Mapping, Sequence
from statistics import harmonic_mean
from typing import Literal

import msgspec

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.requests import Load

Setting = int | float | str | None
#: Fields of EngineConfig that differ from the default, with their values.
Settings = dict[str, Setting]
Cause = Literal["out of memory", "not supported", "died"]
Kind = Literal["cuda", "cpu"]

#: A level that is faster than the default by less than this is not worth a line in somebody's configuration.
WORTHWHILE = 0.01
#: Fields that change what the model computes, not only how fast.
PRECISION = ("dtype", "quantization")

#: Factor -> its levels, the most promising first: a budget that is spent early has then bought the most.
LEVELS: dict[Kind, dict[str, tuple[Settings, ...]]] = {
    "cuda": {
        "precision": (
            {"quantization": "fp8"},
            {"dtype": "float16"},
            {"dtype": "bfloat16"},
            {"quantization": "int8_per_channel_weight_only"},
        ),
        "max-num-seqs": tuple({"max_num_seqs": count} for count in (512, 256, 1024, 128, 64)),
        "max-num-batched-tokens": tuple(
            {"max_num_batched_tokens": count} for count in (8192, 32768, 16384, 4096, 2048)
        ),
        "gpu-memory-utilization": tuple({"gpu_memory_utilization": share} for share in (0.95, 0.9, 0.8, 0.7)),
    },
    "cpu": {  # whose memory is not shared out by utilisation
        "precision": ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        "max-num-seqs": tuple({"max_num_seqs": count} for count in (16, 4)),
        "max-num-batched-tokens": tuple({"max_num_batched_tokens": count} for count in (1024, 4096)),
    },
}


class Plan(Record, frozen=True, kw_only=True, tag="plan", tag_field="record"):
    """What is measured, and on what. A folder holds the points of one plan.

    Attributes:
        schema: Version of the folder's layout.
        model: A preset or a folder.
        kind: Which levels apply.
        device: Name of the device.
        devices: Hashed UUIDs of those that it began on. It may go on on others of the same name: GPUs of a kind differ
            by about 1 %, and a pair is of one GPU.
        vllm: Version.
        load: Of every measurement.
        repeats: That count, after one that does not.
        factors: Names of those that are varied.
        is_full: All combinations, not one factor at a time.
    """

    schema: int = 1
    model: str
    kind: Kind
    device: str
    devices: tuple[str, ...]
    vllm: str
    load: Load
    repeats: int = 3
    factors: tuple[str, ...]
    is_full: bool = False


class Point(Record, frozen=True, kw_only=True, tag="point", tag_field="record"):
    """One configuration, measured with an engine of its own.

    Attributes:
        settings: What differs from the default; empty: the default itself.
        values: Output tok/s of each repeat that counts; empty where there is a problem.
        latency_s: Median over the requests of the last repeat.
        load_time_s: From starting the engine until it was ready.
        configuration: As vLLM resolved it.
        blocks: Of the KV cache.
        duration_s: Start, repeats and end of the engine.
        problem: Why there are no values.
        cause: What kind of problem it is.
        unwell: Why the values are not the configuration's alone: heat, another process.
        device: Hashed UUID of the GPU.
        tries: Engines that it took, this one included: one that died is tried once more.
    """

    settings: Settings
    values: tuple[float, ...] = ()
    latency_s: float | None = None
    load_time_s: float | None = None
    configuration: dict[str, str] = msgspec.field(default_factory=dict)
    blocks: int | None = None
    duration_s: float = 0.0
    problem: str | None = None
    cause: Cause | None = None
    unwell: str | None = None
    device: str | None = None
    tries: int = 1

    @property
    def is_final(self) -> bool:
        """Whether it would come out the same again."""
        return self.cause != "died" or self.tries > 1

    @property
    def name(self) -> str:
        """Such as `max-num-seqs 512, quantization fp8`."""
        return name_of(self.settings)

    @property
    def value(self) -> float | None:
        """Output tok/s: tokens over time of all repeats that count, which is their harmonic mean."""
        return harmonic_mean(self.values) if self.values else None


class Pair(Record, frozen=True, kw_only=True, tag="pair", tag_field="record"):
    """Default and best configuration, one right after the other, each with an engine of its own.

    Attributes:
        number: From 1; the default comes first in odd ones.
        settings: Of the best.
        default: Output tok/s, `None` where it was lost.
        best: The same of the best.
        repeat_sd: How well one engine's repeats know its value: the standard deviation of their mean, relative;
            `None` of single repeats.
        problem: Why one was lost.
        device: Hashed UUID of the GPU that both ran on.
    """

    number: int
    settings: Settings
    default: float | None = None
    best: float | None = None
    repeat_sd: float | None = None
    problem: str | None = None
    device: str | None = None


def name_of(settings: Mapping[str, Setting]) -> str:
    """Settings in words, as `vllm serve` spells them.

    >>> name_of({"max_num_seqs": 512, "quantization": "fp8"})
    'max-num-seqs 512, quantization fp8'
    """
    return ", ".join(f"{field.replace('_', '-')} {value}" for field, value in settings.items()) or "default"


def check_factors(factors: Sequence[str], kind: Kind) -> tuple[str, ...]:
    """Return the factors to vary: those named, or all.

    Raises:
        UsageError: One that does not exist on this kind of device.
    """
    known = LEVELS[kind]
    for factor in factors:
        if factor not in known:
            raise UsageError(f"--factor {factor} does not exist on a {_DEVICE[kind]}. Valid: {', '.join(known)}.")
    return tuple(factor for factor in known if factor in factors or not factors)


_DEVICE: dict[Kind, str] = {"cuda": "GPU", "cpu": "CPU"}


def first_candidates(plan: Plan) -> list[Settings]:
    """What to try besides the default: one factor at a time, in turns; or all combinations of all levels."""
    levels = [LEVELS[plan.kind][factor] for factor in plan.factors]
    if plan.is_full:
        return [_merged(chosen) for chosen in itertools.product(*levels)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*levels))
    return [settings for settings in turns if settings is not None]


def left_out(plan: Plan, points: Sequence[Point]) -> int:
    """Count the levels that are neither measured nor what the default is; when there are none, the combinations."""
    if not points:
        return len(first_candidates(plan))
    levels = [settings for settings in first_candidates(plan) if not is_default(settings, points[0])]
    combined = [] if plan.is_full else combinations(points, plan.factors, plan.kind)
    left = [sum(not is_known(settings, points) for settings in some) for some in (levels, combined)]
    return left[0] or left[1]


def is_known(settings: Mapping[str, Setting], points: Sequence[Point]) -> bool:
    """Whether settings were tried, and whatever came of it would come of it again."""
    return any(point.settings == settings and point.is_final for point in points)


def is_default(settings: Mapping[str, Setting], default: Point) -> bool:
    """Whether the default was resolved to these very settings, so that they need no engine of their own."""
    found = default.configuration
    return bool(settings) and all(field in found and _same(found[field], value) for field, value in settings.items())


def combinations(points: Sequence[Point], factors: Sequence[str], kind: Kind) -> list[Settings]:
    """Combine the best level of each factor that is worth it; once more without precision, if it is among them.

    Args:
        points: The default first.
        factors: Those that were varied.
        kind: Of the device.
    """
    winners = {factor: _winner(points, LEVELS[kind][factor]) for factor in factors}
    chosen = {factor: settings for factor, settings in winners.items() if settings}
    exact = {factor: settings for factor, settings in chosen.items() if factor != "precision"}
    found = [_merged(list(some.values())) for some in (chosen, exact) if len(some) > 1]
    return [settings for place, settings in enumerate(found) if settings not in found[:place]]


def best_of(points: Sequence[Point]) -> Point:
    """Return the fastest point; the default, which is the first, unless another one is faster by what is worthwhile."""
    default = points[0]
    fastest = max(points, key=lambda point: point.value or 0.0)
    return fastest if _gain(fastest, default) >= WORTHWHILE else default


def _winner(points: Sequence[Point], levels: Sequence[Settings]) -> Settings | None:
    tried = [point for point in points if point.settings in levels and point.value is not None]
    best = max(tried, key=lambda point: point.value or 0.0, default=None)
    return best.settings if best is not None and _gain(best, points[0]) >= WORTHWHILE else None


def _gain(point: Point, default: Point) -> float:
    return point.value / default.value - 1 if point.value and default.value else 0.0


def _merged(parts: Sequence[Settings]) -> Settings:
    return {field: value for part in parts for field, value in part.items()}


def _same(found: str, value: Setting) -> bool:
    text = found.removeprefix("torch.")
    try:
        return float(text) == float(str(value))
    except ValueError:
        return text == str(value)
