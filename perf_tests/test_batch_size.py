"""Which batch size is best? Throughput and latency at each, in one engine, judged as one curve each."""

from functools import partial

import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.workloads.requests import Generation, GpuTime
from pytest_gpuperf.workloads.sweep import Sweep, batch_size_line, profile_batches, sweep_batches, sweep_busy_share
from pytest_gpuperf.workloads.transformers import Generator, half_precision
from pytest_gpuperf.workloads.vllm import EngineConfig, StartEngine

MODELS = {"cuda": ("llama-3-8b",), "cpu": ("tiny",)}
#: Of a model of the user's: of 131,072 tokens keys and values may take more than there is. Ours keep their own limit.
LONGEST = 512


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.05)
def test_vllm_batch_size(
    gpu: Device, perf: Recorder, vllm_engine: StartEngine, model: str, batch_sizes: tuple[int, ...], tokens: int
) -> None:
    """vLLM sets its memory aside when it starts: that a batch size runs out of it is rare, and ends the engine."""
    longest = None if model in MODELS[gpu.kind] else LONGEST
    config = EngineConfig(model=model, dtype=half_precision(gpu), max_num_seqs=batch_sizes[-1], max_model_len=longest)
    engine = vllm_engine(config)
    found = sweep_batches(engine.generate, batch_sizes, prompt_tokens=tokens, output_tokens=tokens)
    profiled = (
        {} if found.end else profile_batches(engine.profile, found.points, prompt_tokens=tokens, output_tokens=tokens)
    )
    record(perf, found, profiled)


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.05)
def test_transformers_batch_size(
    gpu: Device, perf: Recorder, model: str, batch_sizes: tuple[int, ...], tokens: int
) -> None:
    """Here memory grows with the batch: where it gives out, the curve ends."""
    with Generator(model, devices=[gpu.device], dtype=half_precision(gpu)) as generator:
        perf.configure(generator.configuration)
        found = sweep_batches(generator.generate, batch_sizes, prompt_tokens=tokens, output_tokens=tokens)
        profile = partial(generator.profile, sample_tokens=16)
        record(perf, found, profile_batches(profile, found.points, prompt_tokens=tokens, output_tokens=tokens))


def record(perf: Recorder, found: Sweep[Generation], profiled: dict[int, GpuTime]) -> None:
    """Record the curves, and print the best size."""
    throughput = found.curve(lambda batch: batch.output_tokens_per_s)
    latency_s = found.curve(lambda batch: batch.latency_s())
    share = sweep_busy_share(found.points, profiled)
    print(batch_size_line(throughput, latency_s, end=found.end))  # noqa: T201 - for the user, with -s or -rP
    for metric, unit, curve in (("throughput", "tok/s", throughput), ("latency", "s/req", latency_s)):
        perf.record_curve(metric, curve, unit=unit, x="batch size", end=found.end, gpu_busy_share=share)
    if profiled:
        steps_s = {size: gpu.step_s for size, gpu in profiled.items()}
        perf.record_curve(
            "gpu_step_time", steps_s, unit="s", x="batch size", end=found.end, tolerance=0.03, kind="compute"
        )
