"""A vLLM that needs no GPU and no model: run as a script it is the engine's process, with faults to order.

The variable FAKE_VLLM names what goes wrong. Everything but vLLM itself is the real thing.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from pytest_gpuperf.workloads import vllm_host

VERSION = "0.32.0"
FAULT = os.environ.get("FAKE_VLLM", "")
#: What a worker of vLLM logs, as it looks.
OUT_OF_MEMORY = (
    "(EngineCore pid=7) ERROR 11-21 07:00:00 [core.py:10] torch.OutOfMemoryError: CUDA out of memory. "
    "Tried to allocate 20.00 GiB."
)


@dataclass
class EngineArgs:
    """Some of vLLM's arguments."""

    model: str = ""
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = False
    enforce_eager: bool = False
    load_format: str = "auto"
    seed: int = 0
    skip_tokenizer_init: bool = False
    disable_log_stats: bool = True
    async_scheduling: bool = True
    profiler_config: dict[str, Any] | None = None


@dataclass
class ProfilerConfig:
    """Some of the profiler's settings: no torch_profiler_activities, as in 0.26."""

    profiler: str | None = None
    torch_profiler_dir: str = ""


@dataclass
class SamplingParams:
    """How long to go on."""

    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool


@dataclass
class FakeEngine:
    """One step a token; everything that was handed over is in the batch."""

    waiting: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if folder := os.environ.get("VLLM_RPC_BASE_PATH"):  # as vLLM's processes do, which remove none
            (Path(folder) / f"socket-{os.getpid()}").touch()
        self.logger_manager: Any = SimpleNamespace(stat_loggers=[])
        self.engine_core = FakeCore(self)
        self.vllm_config: Any = None

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        """Answer the id that vLLM uses inside."""
        inside = f"{request_id}-ab12"
        self.waiting.append(inside)
        self.left[inside] = params.max_tokens - (FAULT == "short" and request_id == "1")
        self.prompt_tokens = len(prompt["prompt_token_ids"])
        return inside

    def step(self) -> None:
        """Receive tokens and tell the stat loggers."""
        outputs = self.engine_core.get_output()
        read = self.prompt_tokens * len(self.waiting)
        self.waiting.clear()
        scheduler = SimpleNamespace(num_running_reqs=len(self.left), num_waiting_reqs=0, kv_cache_usage=0.5)
        stats = SimpleNamespace(
            prompt_token_stats=SimpleNamespace(computed=read),
            num_generation_tokens=len(outputs.outputs),
            num_preempted_reqs=0,
        )
        for logger in self.logger_manager.stat_loggers:
            logger.record(scheduler, stats, mm_cache_stats=None, engine_idx=0)


class FakeCore:
    """The other side of vLLM's own pipe."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.resources = SimpleNamespace(engine_dead=False)

    def get_output(self) -> Any:
        """One token for each request."""
        if FAULT == "lose-core":
            self.resources.engine_dead = True
            time.sleep(1000)
        time.sleep(1e-3)
        arrived = [SimpleNamespace(request_id=name, new_token_ids=[1]) for name in self._engine.left]
        left = {name: count - 1 for name, count in self._engine.left.items()}
        self._engine.left = {name: count for name, count in left.items() if count > 0}
        return SimpleNamespace(outputs=arrived)

    def shutdown(self) -> None:
        """Free the memory."""
        if FAULT == "hang-at-stop":
            time.sleep(1000)
        if FAULT == "die-at-stop":
            os._exit(5)


class LLM:
    """`vllm.LLM`, as far as the host uses it."""

    def __init__(self, model: str, **arguments: Any) -> None:
        _fail("load")
        if FAULT.startswith("exit"):
            _log(f"retrying with less after: {OUT_OF_MEMORY}")
        if not Path(model, "config.json").is_file():
            raise ValueError(f"{model} has no config.json")
        self._folder = (arguments.get("profiler_config") or {}).get("torch_profiler_dir")
        self.llm_engine: Any = FakeEngine()
        self.llm_engine.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16, gpu_memory_utilization=0.9),
            scheduler_config=SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=8192),
            model_config=SimpleNamespace(
                get_vocab_size=lambda: 1000, max_model_len=64, dtype="torch.bfloat16", quantization=None
            ),
        )

    def reset_prefix_cache(self) -> None:
        """Nothing is cached."""

    def generate(self, prompts: Sequence[dict[str, Any]], params: SamplingParams, *, use_tqdm: bool) -> None:
        """Run to the end, as vLLM's own loop does."""
        _fail("generate")
        for number, prompt in enumerate(prompts):
            self.llm_engine.add_request(str(number), prompt, params)
        while self.llm_engine.left:
            self.llm_engine.step()

    def start_profile(self) -> None:
        """Nothing yet."""

    def stop_profile(self) -> None:
        """Write a trace of two kernels that overlap, of 10 and 10 us, in 15 us."""
        assert self._folder is not None
        kernels: list[dict[str, Any]] = [{"cat": "kernel", "name": "k", "ts": ts, "dur": 10} for ts in (100, 105)]
        events = [] if FAULT == "no-kernels" else [*kernels, {"cat": "cpu_op", "ts": 0, "dur": 500}]
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        path = Path(self._folder) / "rank0.1.pt.trace.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"schemaVersion": 1, "traceEvents": events}).encode()))


def _log(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(stage: str) -> None:
    """Do what FAULT orders at this stage."""
    if not FAULT.endswith(f"-at-{stage}"):
        return
    match FAULT.split("-")[0]:
        case "die":
            _log("INFO loading")
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            _log("Traceback (most recent call last):\n  File x\nRuntimeError: no kernel image is available")
            os._exit(3)
        case "hang":
            child = subprocess.Popen(["/bin/sleep", "1000"])
            Path(os.environ["FAKE_PID_FILE"]).write_text(str(child.pid))
            time.sleep(1000)
        case "oom":
            _log(OUT_OF_MEMORY)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        case "refuse":
            raise ValueError("1 validation error for ModelConfig\n  Value error, no such thing")
        case "garbage":
            os.write(int(sys.argv[1]), b"hello\n")
            time.sleep(1000)


def load_general_plugins() -> None:
    """Add what a plugin adds, to the lists that this version has."""
    if FAULT.startswith("plugin"):
        sys.modules["vllm.model_executor.layers.quantization"].QUANTIZATION_METHODS.append("int7")
    if FAULT == "plugin-0.33":
        sys.modules["vllm.config.cache"].__dict__["KV_CACHE_DTYPES"] = ["auto", "fp8", "int7"]


def install() -> None:
    """Put the fake where `import vllm` finds it."""
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": dict, "__version__": VERSION},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.config": {"ProfilerConfig": ProfilerConfig},
        "vllm.config.cache": {"CacheDType": Literal["auto", "fp8"]},
        "vllm.plugins": {"load_general_plugins": load_general_plugins},
        "vllm.config.model": {"ModelDType": Literal["auto", "bfloat16", "float16"]},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": ["fp8", "awq"]},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


if __name__ == "__main__":
    install()
    vllm_host._LOOK_EVERY_S = vllm_host._NOTICE_S = 0.05
    vllm_host.main()
