"""What are two GPUs worth: as room for a larger model, and working on it together?"""

from collections.abc import Sequence

import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.workloads.energy import record_energy
from pytest_gpuperf.workloads.requests import Load, gpu_busy_share
from pytest_gpuperf.workloads.scaling import measure_alone
from pytest_gpuperf.workloads.transformers import Generator, half_precision
from pytest_gpuperf.workloads.vllm import EngineConfig, StartEngine

MODELS = {"cuda": ("llama-3-8b", "llama-2-70b"), "cpu": ("tiny",)}
HALVES = Load(requests=32, prompt_tokens=128, output_tokens=256)
TENSOR_PARALLEL = Load(requests=512, prompt_tokens=128, output_tokens=256)  # two batches of vLLM's
ONE_BATCH = Load(requests=256, prompt_tokens=128, output_tokens=256)


@pytest.mark.gpu(count=2)
@pytest.mark.perf(tolerance=0.1)
def test_transformers_in_halves(perf: Recorder, gpus: Sequence[Device], model: str) -> None:
    """The halves work in turn; they differ by less than a layer in bytes."""
    devices = [gpu.device for gpu in gpus]
    with Generator(model, devices=devices, dtype=half_precision(gpus[0])) as generator:
        print(generator.describe())  # noqa: T201 - for the user, with -s or -rP
        perf.configure(generator.configuration)
        generator.generate(HALVES)  # the first pass warms up
        with perf.region("generate") as region:
            generation = generator.generate(HALVES)
        peak_bytes = generator.peak_memory_bytes
        profiled = generator.profile(HALVES)
    share = gpu_busy_share(profiled, generation) if profiled else None
    perf.record("throughput", generation.output_tokens_per_s, unit="tok/s", gpu_busy_share=share)
    if profiled:
        perf.record(
            "gpu_step_time", profiled.step_s, unit="s", tolerance=0.03, kind="compute", kernels=profiled.summary
        )
    for number, peak in enumerate(peak_bytes):
        if peak is not None:
            perf.record(f"peak_memory_{number}", peak, unit="B", tolerance=0.02)
    record_energy(perf, generation.output_tokens, region, gpu_busy_share=share)
    first, second = (part.weight_bytes for part in generator.parts)
    assert abs(first - second) < (first + second) / generator.shape.layers


@pytest.mark.gpu(count=2)
@pytest.mark.perf(tolerance=0.05)
def test_vllm_tensor_parallel(perf: Recorder, gpus: Sequence[Device], vllm_engine: StartEngine, model: str) -> None:
    """Against each GPU alone, where the model fits on one; what our own loop adds is 1 % or less."""
    config = EngineConfig(model=model, dtype=half_precision(gpus[0]), tensor_parallel_size=2, max_model_len=512)
    alone = measure_alone(vllm_engine, config, TENSOR_PARALLEL, devices=gpus)
    engine = vllm_engine(config)
    engine.generate(TENSOR_PARALLEL)  # the first pass is slower
    with perf.region("generate") as region:
        generation = engine.generate(TENSOR_PARALLEL)
    profiled = engine.profile(ONE_BATCH)
    share = gpu_busy_share(profiled, generation) if profiled else None
    scaling = alone.with_together(generation.output_tokens_per_s)
    print(scaling)  # noqa: T201 - for the user, with -s or -rP
    perf.record("throughput", generation.output_tokens_per_s, unit="tok/s", gpu_busy_share=share)
    if profiled:
        perf.record(
            "gpu_step_time", profiled.step_s, unit="s", tolerance=0.03, kind="compute", kernels=profiled.summary
        )
    for number, used in enumerate(engine.memory_used_bytes()):
        perf.record(f"memory_{number}", used, unit="B", tolerance=0.02)
    for name, value in scaling.figures().items():
        perf.record(name, value, unit="x", better="higher", tolerance=0.1, gpu_busy_share=share)
    record_energy(perf, generation.output_tokens, region, gpu_busy_share=share)
    assert generation.driver_share < 0.01
