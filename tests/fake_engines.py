"""Engines without vLLM for the tests of `gpuperf tune`: throughput is a function of the settings, time is counted."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pytest_gpuperf.monitor import Monitor
from pytest_gpuperf.trials.tune import Bench, Now, RunningEngine
from pytest_gpuperf.trials.tune_plan import Plan, Settings, name_of
from pytest_gpuperf.workloads.requests import Generation, Load, RequestTiming

LOAD = Load(requests=100, prompt_tokens=16, output_tokens=10)
START_S, REPEAT_S = 40.0, 10.0
#: What vLLM makes of a configuration that says nothing.
DEFAULTS = {
    "dtype": "bfloat16",
    "quantization": "none",
    "max_num_seqs": "1024",
    "max_num_batched_tokens": "16384",
    "gpu_memory_utilization": "0.92",
}


def plan(**changes: object) -> Plan:
    """A plan for an H100 that varies everything."""
    values: dict[str, object] = {
        "model": "llama-3-8b",
        "kind": "cuda",
        "device": "NVIDIA H100 80GB HBM3",
        "devices": ("0123456789ab",),
        "vllm": "0.26.0",
        "load": LOAD,
        "repeats": 2,
        "factors": ("precision", "max-num-seqs", "max-num-batched-tokens", "gpu-memory-utilization"),
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def additive(settings: Mapping[str, object]) -> float:
    """Tokens a second: fp8 gives 20 % and 512 sequences 10 %; the smallest batches cost half."""
    speed = 1000.0
    speed *= 1.2 if settings.get("quantization") == "fp8" else 1.0
    speed *= 1.1 if settings.get("max_num_seqs") == 512 else 1.0
    return speed * (0.5 if settings.get("max_num_seqs") == 64 else 1.0)


@dataclass
class FakeVllm:
    """Starts engines, one at a time.

    Attributes:
        speed: Tokens a second of a configuration.
        faults: Name of a configuration -> what starting it raises, again and again.
        interrupt_after: Engines after which Ctrl-C is pressed, while the next one loads.
        started: Names of the configurations, in order.
        running: Engines that were not ended.
        now_s: The clock.
    """

    speed: Callable[[Mapping[str, object]], float] = additive
    faults: Mapping[str, BaseException] = field(default_factory=dict)
    interrupt_after: int | None = None
    started: list[str] = field(default_factory=list)
    shown: list[Now] = field(default_factory=list)
    running: int = 0
    now_s: float = 0.0

    @property
    def bench(self) -> Bench:
        """What `tune` is given."""
        return Bench(
            start=self.start, watch=lambda: Monitor(None, ()), clock=lambda: self.now_s, show=self.shown.append
        )

    def start(self, settings: Settings) -> AbstractContextManager[RunningEngine]:
        """Start one; several at once would disturb each other."""
        assert self.running == 0
        if self.interrupt_after is not None and len(self.started) >= self.interrupt_after:
            raise KeyboardInterrupt
        name = name_of(settings)
        self.started.append(name)
        self.now_s += START_S
        if name in self.faults:
            raise self.faults[name]
        return FakeEngine(self, settings)


class FakeEngine:
    """One engine; the first repeat is a fifth slower, as real ones are."""

    def __init__(self, vllm: FakeVllm, settings: Settings) -> None:
        self.load_time_s = START_S
        self.blocks = 1000
        self.configuration = {**DEFAULTS, **{name: str(value) for name, value in settings.items()}}
        self._vllm = vllm
        self._settings = settings
        self._repeats = 0

    def __enter__(self) -> Self:
        self._vllm.running += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._vllm.running -= 1

    def generate(self, load: Load, *, timeout_s: float = 300) -> Generation:
        """Answer at the configuration's speed."""
        self._vllm.now_s += REPEAT_S
        self._repeats += 1
        speed = self._vllm.speed(self._settings) * (0.8 if self._repeats == 1 else 1.0)
        timing = RequestTiming(
            prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens, ttft_s=0.1, latency_s=0.5
        )
        duration_s = load.requests * load.output_tokens / speed
        return Generation(duration_s=duration_s, requests=(timing,) * load.requests, step_count=load.output_tokens)
