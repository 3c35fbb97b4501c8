"""What several GPUs are worth together: the throughput of all against that of each alone."""

from collections.abc import Sequence
from contextlib import closing

import msgspec

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import EngineOutOfMemory, NotSupported, UsageError
from pytest_gpuperf.records import Record
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import EngineConfig, StartEngine


class Scaling(Record, frozen=True, kw_only=True):
    """The throughput of several GPUs together and of each alone, at the same load.

    Attributes:
        together_tokens_per_s: Output tokens of all GPUs, working on the same requests.
        alone_tokens_per_s: Output tokens of each GPU by itself; empty where the model does not fit on one.
        why_not_alone: Why it is empty.
    """

    together_tokens_per_s: float
    alone_tokens_per_s: tuple[float, ...] = ()
    why_not_alone: str | None = None

    @property
    def efficiency(self) -> float | None:
        """Throughput together over the sum of those alone: 1 if nothing is lost; `None` without those."""
        return self.together_tokens_per_s / sum(self.alone_tokens_per_s) if self.alone_tokens_per_s else None

    @property
    def speedup(self) -> float | None:
        """Throughput together over the mean of those alone; `None` without those."""
        return None if self.efficiency is None else self.efficiency * len(self.alone_tokens_per_s)

    def figures(self) -> dict[str, float]:
        """Name the figures that there are: `scaling efficiency` and `speedup`, or none."""
        named = {"scaling efficiency": self.efficiency, "speedup": self.speedup}
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        together = f"together {self.together_tokens_per_s:,.0f} tok/s"
        if self.efficiency is None:
            return f"{together}; alone: {self.why_not_alone or 'not measured'}"
        alone = ", ".join(f"{one:,.0f}" for one in self.alone_tokens_per_s)
        return f"{together}; alone {alone} tok/s; efficiency {self.efficiency:.1%}, {self.speedup:.2f} x one GPU"


class Alone(Record, frozen=True, kw_only=True):
    """Output tokens a second of each GPU by itself, or why there are none."""

    tokens_per_s: tuple[float, ...] = ()
    why_not: str | None = None

    def with_together(self, tokens_per_s: float) -> Scaling:
        """Compare with the throughput of all GPUs together."""
        return Scaling(
            together_tokens_per_s=tokens_per_s, alone_tokens_per_s=self.tokens_per_s, why_not_alone=self.why_not
        )


def measure_alone(start: StartEngine, config: EngineConfig, load: Load, *, devices: Sequence[Device]) -> Alone:
    """Generate a load on each GPU by itself, one after the other, the second of two times timed.

    Args:
        start: The fixture `vllm_engine`.
        config: Of all GPUs together; each alone gets the same, but for `tensor_parallel_size`.
        load: What to generate; the same as together.
        devices: Each of these.

    Returns:
        The throughputs; none of them where the model does not fit on one GPU.

    Raises:
        UsageError: No devices.
    """
    if not devices:
        raise UsageError("measure_alone needs the devices to measure on.")
    single = msgspec.structs.replace(config, tensor_parallel_size=1)
    measured: list[float] = []
    for device in devices:
        try:
            with closing(start(single, devices=[device])) as engine:
                engine.generate(load)  # the first is slower
                measured.append(engine.generate(load).output_tokens_per_s)
        except (NotSupported, EngineOutOfMemory) as error:
            return Alone(why_not=str(error))
    return Alone(tokens_per_s=tuple(measured))
