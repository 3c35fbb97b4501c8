"""How fast does transformers generate, on one device?"""

import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.workloads.energy import record_energy
from pytest_gpuperf.workloads.requests import Load, gpu_busy_share
from pytest_gpuperf.workloads.transformers import Generator, half_precision

LOADS = {
    "cuda": Load(requests=32, prompt_tokens=128, output_tokens=256),
    "cpu": Load(requests=4, prompt_tokens=32, output_tokens=32),
}


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.1)
def test_transformers_generate(perf: Recorder, gpu: Device, model: str) -> None:
    """A token comes no sooner than its first."""
    load = LOADS[gpu.kind]
    with Generator(model, devices=[gpu.device], dtype=half_precision(gpu)) as generator:
        print(generator.describe())  # noqa: T201 - for the user, with -s or -rP
        perf.configure(generator.configuration)
        generator.generate(load)  # the first pass warms up
        with perf.region("generate") as region:
            generation = generator.generate(load)
        profiled = generator.profile(load)
    share = gpu_busy_share(profiled, generation) if profiled else None
    perf.record("throughput", generation.output_tokens_per_s, unit="tok/s", gpu_busy_share=share)
    perf.record("ttft", generation.ttft_s(), unit="s", gpu_busy_share=share)
    perf.record("itl", generation.itl_s(), unit="s", gpu_busy_share=share)
    if profiled:
        perf.record(
            "gpu_step_time", profiled.step_s, unit="s", tolerance=0.03, kind="compute", kernels=profiled.summary
        )
    record_energy(perf, generation.output_tokens, region, gpu_busy_share=share)
    assert generation.ttft_s() < generation.latency_s()
