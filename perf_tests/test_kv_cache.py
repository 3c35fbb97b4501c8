"""Does vLLM fill its KV cache, and with what?"""

from collections.abc import Callable

import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.workloads.kv_cache import USE_GOAL, KvUse, cause_of_low_use, kv_use
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig

#: A cache of a known size, and twice as many requests as fit into it.
CONFIG = {
    "cuda": EngineConfig(
        model="llama-3-8b", max_model_len=1024, kv_cache_memory_bytes=8 * 2**30, enable_prefix_caching=True
    ),
    "cpu": EngineConfig(
        model="tiny", max_model_len=512, num_gpu_blocks_override=32, enable_prefix_caching=True, enforce_eager=True
    ),
}
CROWD = {
    "cuda": Load(requests=256, prompt_tokens=250, output_tokens=256),
    "cpu": Load(requests=32, prompt_tokens=120, output_tokens=64),
}
#: Nine tenths of each prompt are the same.
SHARED = {
    "cuda": Load(requests=64, prompt_tokens=640, output_tokens=16, shared_prefix_tokens=576),
    "cpu": Load(requests=8, prompt_tokens=320, output_tokens=8, shared_prefix_tokens=288),
}


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.02)
def test_kv_cache(perf: Recorder, gpu: Device, vllm_engine: Callable[[EngineConfig], Engine]) -> None:
    """Over 90 % of the blocks are in use under load; a prefix that prompts share is found for all but the first."""
    config, crowd, shared = CONFIG[gpu.kind], CROWD[gpu.kind], SHARED[gpu.kind]
    engine = vllm_engine(config)
    crowded = _use(engine, crowd)
    sharing = _use(engine, shared)
    perf.record("blocks", engine.blocks, unit="blocks", better="higher", tolerance=0.01)
    perf.record("peak_use", 100 * crowded.peak.kv_share, unit="%", better="higher")
    if crowded.filled_share:
        perf.record("filled_slots", 100 * crowded.filled_share, unit="%", better="higher")
    if sharing.hit_rate:
        perf.record("prefix_hits", 100 * sharing.hit_rate, unit="%", better="higher")
    if crowded.preemptions:
        perf.record("preemptions", crowded.preemptions, unit="preemptions", better="lower", tolerance=0.25)
    assert crowded.peak.kv_share > USE_GOAL, cause_of_low_use(crowded, crowd, max_num_seqs=config.max_num_seqs)


def _use(engine: Engine, load: Load) -> KvUse:
    use = kv_use(engine.generate(load), load, blocks=engine.blocks, block_size=engine.block_size)
    return use or pytest.skip(f"vLLM {engine.version} does not tell what its scheduler does.")
