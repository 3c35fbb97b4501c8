"""Is a tuned configuration of vLLM faster than the default one, and by how much?"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pytest_gpuperf import Device, Recorder
from pytest_gpuperf.monitor import Monitor
from pytest_gpuperf.plugin import settings_key
from pytest_gpuperf.trials.tune import Bench, engine_config, gain_of, run_pairs, tune
from pytest_gpuperf.trials.tune_bench import Wanted, check_wanted, plan_on
from pytest_gpuperf.trials.tune_file import Journal, read_best
from pytest_gpuperf.workloads.vllm import StartEngine

Watch = Callable[[], Monitor]


@pytest.mark.gpu
def test_tuned_against_default(
    gpu: Device, perf: Recorder, vllm_engine: StartEngine, gpu_monitor: Watch, pytestconfig: pytest.Config
) -> None:
    """The file that `gpuperf tune` wrote, against vLLM's own defaults: engines in turns, A B B A."""
    path = pytestconfig.stash[settings_key].tuned
    if path is None:
        pytest.skip("no tuned configuration: gpuperf tune MODEL, then pytest --gpuperf-tuned FILE")
    model, settings = read_best(path)
    wanted = Wanted(model=model, repeats=1)
    plan = plan_on(gpu, wanted, check_wanted(wanted, gpu.kind))
    pairs = run_pairs(settings, plan, bench(model, vllm_engine, gpu_monitor), pairs=2)
    perf.configure(
        {"model": model, "engine": "vllm", **settings, "options": pytestconfig.stash[settings_key].vllm_args or "none"}
    )
    gain = gain_of(pairs, is_cpu=gpu.kind == "cpu")
    assert gain is not None
    perf.record("tuned / default", gain.ratio, unit="x", better="higher", tolerance=0.05)


@pytest.mark.gpu
def test_sweep(gpu: Device, perf: Recorder, vllm_engine: StartEngine, gpu_monitor: Watch, tmp_path: Path) -> None:
    """The tuner itself, over the number of sequences: every engine ends and the next one starts."""
    if gpu.kind == "cuda":
        pytest.skip("a sweep on a GPU takes too long for a test: gpuperf tune MODEL, then --gpuperf-tuned FILE")
    model = "tiny"
    wanted = Wanted(model=model, factors=("max-num-seqs",), repeats=1)
    plan = plan_on(gpu, wanted, check_wanted(wanted, gpu.kind))
    tuning = tune(Journal(tmp_path / "tune", plan), bench(model, vllm_engine, gpu_monitor), pairs=1)
    assert [point.problem for point in tuning.points if point.problem] == []
    perf.configure({"model": model, "engine": "vllm"})
    perf.record("best throughput", max(point.value or 0.0 for point in tuning.points), unit="tok/s", tolerance=0.1)


def bench(model: str, start: StartEngine, watch: Watch) -> Bench:
    """Engines of the test's own device, each closed before the next is started."""
    return Bench(
        start=lambda settings: closing(start(engine_config(model, settings))), watch=watch, clock=time.monotonic
    )
