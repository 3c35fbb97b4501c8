"""Which batch size is best? Throughput and latency at each, in one engine, judged as one curve each."""

from collections.abc import Callable

import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.workloads.requests import Generation
from pytest_gpuperf.workloads.sweep import Sweep, batch_size_line, sweep_batches
from pytest_gpuperf.workloads.transformers import Generator
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.05)
def test_vllm_batch_size(
    perf: Recorder, vllm_engine: Callable[[EngineConfig], Engine], model: str, batch_sizes: tuple[int, ...], tokens: int
) -> None:
    """vLLM's memory is set aside when it starts: no batch size runs out of it."""
    engine = vllm_engine(EngineConfig(model=model, max_num_seqs=batch_sizes[-1]))
    record(perf, sweep_batches(engine.generate, batch_sizes, prompt_tokens=tokens, output_tokens=tokens))


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.05)
def test_transformers_batch_size(
    gpu: Device, perf: Recorder, model: str, batch_sizes: tuple[int, ...], tokens: int
) -> None:
    """Here memory grows with the batch: where it gives out, the curve ends."""
    with Generator(model, devices=[gpu.device]) as generator:
        perf.configure(generator.configuration)
        record(perf, sweep_batches(generator.generate, batch_sizes, prompt_tokens=tokens, output_tokens=tokens))


def record(perf: Recorder, found: Sweep[Generation]) -> None:
    """Record both curves, and print the best size."""
    throughput = found.curve(lambda batch: batch.output_tokens_per_s)
    latency_s = found.curve(lambda batch: batch.latency_s())
    print(batch_size_line(throughput, latency_s, end=found.end))  # noqa: T201 - for the user, with -s or -rP
    perf.record_curve("throughput", throughput, unit="tok/s", x="batch size", end=found.end)
    perf.record_curve("latency", latency_s, unit="s/req", x="batch size", end=found.end)
