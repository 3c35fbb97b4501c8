"""The suite in `perf_tests/` as it runs on a GPU, on an engine that only pretends: what it gates, and what it does not.

A request's first token takes the GPU 7 ms, and the host 3 ms that nothing hides; each further token takes the GPU 6.4
ms, behind which the host's work of 1.5 ms is hidden. These are about the times of Llama-3-8B on an H100.
"""

from pathlib import Path

import pytest
from harness import FAKE_H100, Suite, assert_readable, results_of, statuses_of, verdicts_of

PERF_TESTS = Path(__file__).parents[1] / "perf_tests"
ENGINE = """
import os
from types import SimpleNamespace
import pytest
from pytest_gpuperf.errors import EngineError, EngineOutOfMemory
from pytest_gpuperf.records import KernelSummary, KernelUse
from pytest_gpuperf.workloads.requests import Generation, GpuTime, RequestTiming

GPU = float(os.environ.get("GPU", "1"))
HOST = float(os.environ.get("HOST", "1"))
FULL_FROM = int(os.environ.get("FULL_FROM", "1000000"))
FIRST_S, NEXT_S = 7e-3 * GPU, 6.4e-3 * GPU

class Engine:
    load_time_s, blocks, block_size, version = 30.0 * HOST, 4096, 16, "0.26.0"
    is_running = True

    def generate(self, load, timeout_s=300):
        if load.requests >= FULL_FROM:
            self.is_running = False
            raise EngineOutOfMemory("CUDA out of memory.")
        gap_s = max(NEXT_S * (1 + load.requests / 256), 1.5e-3 * HOST)
        ttft_s = FIRST_S + 3e-3 * HOST
        gaps_s = (gap_s,) * (load.output_tokens - 1) if load.requests == 1 else ()
        latency_s = ttft_s + gap_s * (load.output_tokens - 1)
        one = RequestTiming(
            prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens, ttft_s=ttft_s, latency_s=latency_s,
            gaps_s=gaps_s,
        )
        rounds = -(-load.requests // 256)
        requests = (one,) * load.requests
        return Generation(duration_s=latency_s * rounds, requests=requests, step_count=load.output_tokens * rounds)

    def profile(self, load, timeout_s=300, keep=None):
        if not self.is_running:
            raise EngineError("The engine is not running.")
        next_s = NEXT_S * (1 + load.requests / 256) * (load.output_tokens - 1)
        kernel = KernelUse(name="gemm", count=1.0, time_s=NEXT_S, blocks=132.0)
        summary = KernelSummary(
            calls=load.output_tokens, wall_s=NEXT_S, span_s=NEXT_S, busy_s=NEXT_S, longest_gap_s=0.0, kernels=(kernel,),
            launches=1.0, launch_s=1e-5,
        )
        return GpuTime(busy_s=FIRST_S + next_s, steps=load.output_tokens, kernels=9, summary=summary)

@pytest.fixture
def vllm_engine(perf, gpus):
    def start(config):
        perf.configure({"engine": "vllm", "model": config.model, "max_model_len": config.max_model_len or "its own"})
        return Engine()
    return start
"""


def suite(module: str, *options: str, **environment: str) -> Suite:
    names = ("conftest.py", module)
    return Suite(
        files={f"perf_tests/{name}": (PERF_TESTS / name).read_text() for name in names},
        conftest=FAKE_H100 + ENGINE,
        options=("perf_tests", *options),
        environment=environment,
    )


def test_throughput_and_single_requests_are_recorded_with_the_gpus_own_times(pytester: pytest.Pytester) -> None:
    result = suite("test_vllm_throughput.py").run(pytester)
    result.assert_outcomes(passed=4)
    assert_readable(result)
    found = statuses_of(pytester)
    single = {name.split()[1] for name in found if name.startswith("test_single_request[llama-3-8b]")}
    assert single == {
        *(f"{name}_p{percent}" for name in ("ttft", "itl", "latency") for percent in (50, 95, 99)),
        *("gpu_ttft", "gpu_itl", "load_time"),
    }
    assert {"test_throughput[llama-3-8b] gpu_step_time", "test_throughput[tinyllama-1.1b] throughput"} <= set(found)
    assert set(found.values()) == {"NEW"}


def test_a_slower_host_is_said_and_accuses_no_first_token(pytester: pytest.Pytester) -> None:
    """As two hosts with the same GPU differed: 10 and 18 ms to the first token, 6.4 ms for each of the others."""
    chosen = ("-k", "single_request and not tinyllama")
    suite("test_vllm_throughput.py", *chosen).record(pytester)
    suite("test_vllm_throughput.py", *chosen, HOST="3.6").run(pytester).assert_outcomes(passed=1)
    found = {name.split()[1]: verdict for name, verdict in verdicts_of(pytester).items()}
    assert found["ttft_p50"].is_host_limited
    assert "limited by the host: GPU busy 39 % of the time" in (found["ttft_p50"].remark or "")
    assert {name: found[name].status for name in ("itl_p50", "latency_p50", "gpu_ttft", "gpu_itl")} == dict.fromkeys(
        ("itl_p50", "latency_p50", "gpu_ttft", "gpu_itl"), "PASS"
    )
    assert not found["itl_p50"].is_host_limited


def test_a_slower_gpu_is_accused_in_its_own_times(pytester: pytest.Pytester) -> None:
    chosen = ("-k", "single_request and not tinyllama")
    suite("test_vllm_throughput.py", *chosen).record(pytester)
    suite("test_vllm_throughput.py", *chosen, GPU="2").run(pytester).assert_outcomes(failed=1)
    found = {name.split()[1]: verdict.status for name, verdict in verdicts_of(pytester).items()}
    assert (found["gpu_ttft"], found["gpu_itl"], found["itl_p50"]) == ("REGRESSED", "REGRESSED", "REGRESSED")


def test_a_curve_over_batch_sizes_is_one_metric(pytester: pytest.Pytester) -> None:
    result = suite("test_batch_size.py", "-k", "vllm").run(pytester)
    result.assert_outcomes(passed=1)
    assert {name.split()[1] for name in statuses_of(pytester)} == {"throughput", "latency", "gpu_step_time"}


def test_an_engine_that_ran_out_of_memory_ends_its_curve_and_not_its_test(pytester: pytest.Pytester) -> None:
    """It is dead then: what it had answered counts, and there is nobody to profile."""
    result = suite("test_batch_size.py", "-k", "vllm", FULL_FROM="64").run(pytester)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*best at batch size 32: *; ends: out of memory at 64: CUDA out of memory."])
    assert {name.split()[1] for name in statuses_of(pytester)} == {"throughput", "latency"}


@pytest.mark.parametrize(("given", "length"), [((), "its own"), (("--gpuperf-model", "qwen2.5-7b"), "512")])
def test_a_model_of_the_users_needs_no_cache_for_its_longest_sequence(
    pytester: pytest.Pytester, given: tuple[str, ...], length: str
) -> None:
    """Of 131,072 tokens keys and values alone are 7.5 GB, and the test asks for 256."""
    suite("test_batch_size.py", "-k", "vllm", *given).run(pytester).assert_outcomes(passed=1)
    (record,) = results_of(pytester).tests
    assert {(one.configuration or {})["max_model_len"] for one in record.measurements} == {length}
