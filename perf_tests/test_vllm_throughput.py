"""How fast does vLLM answer: many requests at once, and one at a time?"""

import msgspec
import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.workloads.energy import record_energy
from pytest_gpuperf.workloads.requests import Load, busy_share, gpu_busy_share, in_sequence, request_gpu_time
from pytest_gpuperf.workloads.transformers import half_precision
from pytest_gpuperf.workloads.vllm import EngineConfig, StartEngine

MODELS = {"cuda": ("tinyllama-1.1b", "llama-3-8b"), "cpu": ("tiny",)}
#: Whole batches of 256, which take 5 s and more on an H100: the energy counter needs them.
MANY = {
    "cuda": Load(requests=768, prompt_tokens=128, output_tokens=256),
    "cpu": Load(requests=16, prompt_tokens=32, output_tokens=32),
}
#: A small model is faster.
REQUESTS = {"tinyllama-1.1b": 2048}
#: One load, and how often.
SINGLE = {
    "cuda": (Load(requests=1, prompt_tokens=128, output_tokens=64), 100),
    "cpu": (Load(requests=1, prompt_tokens=32, output_tokens=16), 10),
}
#: The GPU waits while vLLM reads, compiles and captures: 12 s where all of that is cached, 123 s on a fresh machine.
LOADING = 0.0


def _config(model: str, gpu: Device) -> EngineConfig:
    return EngineConfig(model=model, dtype=half_precision(gpu), max_model_len=512, enforce_eager=gpu.kind == "cpu")


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.05)
def test_throughput(perf: Recorder, gpu: Device, vllm_engine: StartEngine, model: str) -> None:
    """Every request gets all of its tokens, and what our own loop adds to vLLM's is 1 % or less."""
    engine, load = vllm_engine(_config(model, gpu)), MANY[gpu.kind]
    load = msgspec.structs.replace(load, requests=REQUESTS.get(model, load.requests))
    engine.generate(load)  # the first pass is 20 to 25 % slower
    with perf.region("generate") as region:
        generation = engine.generate(load)
    profiled = engine.profile(msgspec.structs.replace(load, requests=min(load.requests, 256)))
    share = gpu_busy_share(profiled, generation) if profiled else None
    perf.record("throughput", generation.output_tokens_per_s, unit="tok/s", gpu_busy_share=share)
    perf.record("requests", generation.requests_per_s, unit="req/s", gpu_busy_share=share)
    perf.record("latency_p50", generation.latency_s(50), unit="s", gpu_busy_share=share)
    perf.record("load_time", engine.load_time_s, unit="s", tolerance=0.9, gpu_busy_share=LOADING)
    record_energy(perf, generation.output_tokens, region, gpu_busy_share=share)
    if profiled:
        perf.record(
            "gpu_step_time", profiled.step_s, unit="s", tolerance=0.03, kind="compute", kernels=profiled.summary
        )
    memory_bytes = region.telemetry.memory_used_bytes
    if memory_bytes:
        perf.record("memory", memory_bytes, unit="B", tolerance=0.02)
        perf.record("memory_share", 100 * memory_bytes / gpu.memory_bytes, unit="%", better="lower", tolerance=0.02)
    # a tenth of a second of the tiny model, on cores that others use too, would measure those
    assert gpu.kind == "cpu" or generation.driver_share < 0.01


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.1)
def test_single_request(perf: Recorder, gpu: Device, vllm_engine: StartEngine, model: str) -> None:
    """A token comes no sooner than its first."""
    engine = vllm_engine(_config(model, gpu))
    load, repeats = SINGLE[gpu.kind]
    loads = [msgspec.structs.replace(load, seed=seed) for seed in range(repeats)]
    engine.generate(load)
    with perf.region("one at a time"):
        generation = in_sequence([engine.generate(one) for one in loads])
    whole = engine.profile(load)
    times = {"ttft": generation.ttft_s, "itl": generation.itl_s, "latency": generation.latency_s}
    gpu_s: dict[str, float] = {}
    if whole:
        first = [one for _ in range(3) if (one := engine.profile(msgspec.structs.replace(load, output_tokens=1)))]
        part = request_gpu_time(whole, first, output_tokens=load.output_tokens)
        gpu_s = {"ttft": part.first_token_s, "itl": part.token_s, "latency": part.whole_s}
        perf.record("gpu_ttft", part.first_token_s, unit="s", tolerance=0.05, kind="compute")
        perf.record("gpu_itl", part.token_s, unit="s", tolerance=0.03, kind="compute", kernels=whole.summary)
    for percent, tolerance in ((50, 0.1), (95, 0.3), (99, 0.5)):  # a tail of 100 requests is one of them
        for name, time_s in times.items():
            share = busy_share(gpu_s[name], time_s(percent)) if gpu_s else None
            perf.record(f"{name}_p{percent}", time_s(percent), unit="s", tolerance=tolerance, gpu_busy_share=share)
    perf.record("load_time", engine.load_time_s, unit="s", tolerance=0.9, gpu_busy_share=LOADING)
    assert generation.ttft_s(50) < generation.latency_s(50)
