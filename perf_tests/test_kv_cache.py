"""Does vLLM fill its KV cache, and with what?"""

import pytest
from msgspec.structs import replace

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.plugin import settings_key
from pytest_gpuperf.workloads.kv_cache import USE_GOAL, KvUse, cause_of_low_use, kv_use
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.transformers import half_precision
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig, StartEngine

#: A cache of a known size, and nearly twice as many requests as fit into it once their answers have grown.
CONFIG = {
    "cuda": EngineConfig(
        model="llama-3-8b", max_model_len=1024, kv_cache_memory_bytes=8 * 2**30, enable_prefix_caching=True
    ),
    "cpu": EngineConfig(
        model="tiny", max_model_len=512, num_gpu_blocks_override=32, enable_prefix_caching=True, enforce_eager=True
    ),
}
#: The same cache, whatever the model.
BLOCKS = {"cuda": 4096, "cpu": 32}
CROWD = {
    "cuda": Load(requests=256, prompt_tokens=200, output_tokens=256),
    "cpu": Load(requests=32, prompt_tokens=120, output_tokens=64),
}
#: Nine tenths of each prompt are the same.
SHARED = {
    "cuda": Load(requests=64, prompt_tokens=640, output_tokens=16, shared_prefix_tokens=576),
    "cpu": Load(requests=8, prompt_tokens=320, output_tokens=8, shared_prefix_tokens=288),
}


@pytest.mark.gpu
@pytest.mark.perf(tolerance=0.02)
def test_kv_cache(perf: Recorder, gpu: Device, vllm_engine: StartEngine, pytestconfig: pytest.Config) -> None:
    """Over 90 % of the blocks are in use under load; a prefix that prompts share is found for all but the first."""
    config, crowd, shared = _config(gpu, pytestconfig.stash[settings_key].model), CROWD[gpu.kind], SHARED[gpu.kind]
    engine = vllm_engine(config)
    crowded = _use(engine, crowd)
    sharing = _use(engine, shared)
    perf.record("blocks", engine.blocks, unit="blocks", better="higher", tolerance=0.01)
    perf.record("peak_use", 100 * crowded.peak.kv_share, unit="%", better="higher")
    if crowded.filled_share:
        perf.record("filled_slots", 100 * crowded.filled_share, unit="%", better="higher")
    if sharing.hit_rate:  # asserted below
        perf.record("prefix_hits", 100 * sharing.hit_rate, unit="%", better="higher")
    if crowded.preemptions:
        perf.record("preemptions", crowded.preemptions, unit="preemptions", better="lower", tolerance=0.25)
    assert crowded.peak.kv_share > USE_GOAL, cause_of_low_use(crowded, crowd, max_num_seqs=config.max_num_seqs)
    whole_blocks = shared.shared_prefix_tokens // engine.block_size * engine.block_size
    sharable = (shared.requests - 1) * whole_blocks / shared.prompt_tokens / shared.requests
    assert sharing.hit_rate == pytest.approx(sharable, rel=0.01)


def _config(gpu: Device, model: str | None) -> EngineConfig:
    config = replace(CONFIG[gpu.kind], dtype=half_precision(gpu))
    if model is None:
        return config
    return replace(config, model=model, kv_cache_memory_bytes=None, num_gpu_blocks_override=BLOCKS[gpu.kind])


def _use(engine: Engine, load: Load) -> KvUse:
    use = kv_use(engine.generate(load), load, blocks=engine.blocks, block_size=engine.block_size)
    return use or pytest.skip(f"vLLM {engine.version} does not tell what its scheduler does.")
