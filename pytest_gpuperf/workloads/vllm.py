"""vLLM as a workload: an engine in a process of its own, from its start to the proof that it has left the memory."""

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Protocol, Self, TypeVar

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import EngineError, UsageError
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.records import Record
from pytest_gpuperf.units import format_value
from pytest_gpuperf.workloads.models import model_folder
from pytest_gpuperf.workloads.requests import Generation, GpuTime, Load
from pytest_gpuperf.workloads.vllm_config import EngineConfig, arguments_of, check_config, configuration_of
from pytest_gpuperf.workloads.vllm_environment import child_environment, installed_version, speed_variables
from pytest_gpuperf.workloads.vllm_messages import Generate, Generated, Profile, Profiled, Ready, Reply, Start, Stop
from pytest_gpuperf.workloads.vllm_process import HostProcess

__all__ = ["LEFT_BYTES", "Engine", "EngineConfig", "StartEngine", "Teardown", "arguments_of", "configuration_of"]

#: Memory that may stay in use after an engine: the driver's accounting moves by some MiB.
LEFT_BYTES = 100 * 2**20
_numbers = itertools.count(1)
Expected = TypeVar("Expected", Ready, Generated, Profiled)


class Teardown(Record, frozen=True, kw_only=True):
    """What an engine left behind.

    Attributes:
        before_bytes: Memory in use on each device before the engine, by all processes; empty without NVML.
        after_bytes: The same after it.
        duration_s: From asking it to stop until its memory was free.
        problem: What went wrong, if something did.
    """

    before_bytes: tuple[int, ...] = ()
    after_bytes: tuple[int, ...] = ()
    duration_s: float
    problem: str | None = None

    @property
    def left_bytes(self) -> int:
        """Most memory that one device has not got back; negative if it has got more."""
        pairs = zip(self.before_bytes, self.after_bytes, strict=True)
        return max((after - before for before, after in pairs), default=0)

    @property
    def note(self) -> str | None:
        """What the user should know, or `None`."""
        if self.left_bytes <= LEFT_BYTES:
            return self.problem
        return (
            f"{format_value(self.left_bytes, 'B', digits=3)} were still in use {self.duration_s:.0f} s after an engine "
            f"ended, {format_value(max(self.after_bytes), 'B', digits=3)} in all: another process took it, or one of "
            "the engine's is left. See `nvidia-smi`; what is measured next may not fit."
        )


class Engine:
    """A vLLM engine in a process of its own, which starts more; used as a context manager.

    The calling process imports neither vllm nor torch. A dead or hung engine raises and takes its processes with it.

    Args:
        config: What to start.
        devices: Those that the test holds; the first `tensor_parallel_size` of them are used.
        nvml: The driver's library, or `None`.
        folder: For configurations, logs and traces.
        load_timeout_s: Most seconds until the model is loaded, imports included.
        descriptors: Of the locks of the devices; the engine's process inherits them.

    Attributes:
        load_time_s: What building vLLM's `LLM` took.
        start_time_s: The same with the start of the process and its imports.
        configuration: Settings as vLLM has resolved them: a result's identity.
        blocks: Of the KV cache, on each GPU.
        block_size: Tokens of a block.
        max_model_len: Most tokens of a sequence.
        version: Of vLLM.
        has_steps: Whether `Generation.steps` is filled.

    >>> with Engine(EngineConfig(model="tiny"), devices=gpus) as engine:  # doctest: +SKIP
    ...     engine.generate(Load(requests=8, prompt_tokens=16, output_tokens=16)).output_tokens
    128
    """

    #: What is started; the number of the reply pipe is appended.
    command: ClassVar[tuple[str, ...]] = (sys.executable, "-m", "pytest_gpuperf.workloads.vllm_host")
    #: How long an engine may take to shut down, and a GPU to get its memory back.
    stop_timeout_s: ClassVar[float] = 60.0
    free_timeout_s: ClassVar[float] = 30.0

    def __init__(
        self,
        config: EngineConfig,
        *,
        devices: Sequence[Device],
        nvml: Nvml | None = None,
        folder: Path | None = None,
        load_timeout_s: float = 900.0,
        descriptors: Sequence[int] = (),
    ) -> None:
        self.config = config
        self._devices = tuple(devices[: config.tensor_parallel_size])
        self._nvml = nvml
        self._folder = (folder or Path(".gpuperf")).resolve()
        self._load_timeout_s = load_timeout_s
        self._descriptors = tuple(descriptors)
        self._process: HostProcess | None = None
        self._teardown: Teardown | None = None
        check_config(config, devices)
        self.version = self._installed(devices[0])

    def _installed(self, device: Device) -> str:
        return installed_version(device)

    def __enter__(self) -> Self:
        """Start the engine and wait until the model is loaded.

        Raises:
            UsageError: An argument, or a value of one, that this vLLM does not know.
            EngineOutOfMemory: It does not fit.
            EngineError: It died, hung, or refused the configuration.
        """
        begin_s = time.perf_counter()
        self._before_bytes = self.memory_used_bytes()
        environment = child_environment(
            self._devices, nvml=self._nvml, own=self.config.environment, is_offline=not self.config.is_remote
        )
        self._sockets = Path(tempfile.mkdtemp(prefix="gpuperf-"))  # vLLM leaves its own behind; a long path has no room
        environment.setdefault("VLLM_RPC_BASE_PATH", str(self._sockets))
        number = f"{os.getpid()}-{next(_numbers)}"
        self._traces = self._folder / "vllm" / f"traces-{number}"
        profile_folder = str(self._traces) if self._is_on_gpu else None
        self._process = HostProcess(
            self.command,
            environment=environment,
            log=self._folder / "vllm" / f"{self.config.label}-{number}.log",
            name=f"vLLM {self.version} ({self.config.label})",
            descriptors=self._descriptors,
        )
        try:
            arguments = self._arguments()
            start = Start(arguments=arguments, profile_folder=profile_folder)
            reply = self._process.ask(start, stage="loading the model", timeout_s=self._load_timeout_s)
            ready = self._expect(reply, Ready)
        except BaseException:  # Ctrl-C too: nothing of it may be left
            self.close()
            raise
        self.start_time_s = time.perf_counter() - begin_s
        self._keep(ready, arguments, speed_variables(environment))
        return self

    def _keep(self, ready: Ready, arguments: dict[str, object], variables: dict[str, str]) -> None:
        """Keep what vLLM says of itself, and what of it makes results comparable."""
        self.load_time_s = ready.load_time_s
        self.version = ready.version
        self.blocks, self.block_size = ready.blocks, ready.block_size
        self.max_model_len, self.has_steps = ready.max_model_len, ready.has_steps
        settings = {**arguments, **ready.resolved, **variables}
        given = {"options": sorted(self.config.options), "variables": sorted(variables)}
        self.configuration = configuration_of(self.config.label, settings, given=given)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _is_on_gpu(self) -> bool:
        return self._devices[0].kind == "cuda"

    def _arguments(self) -> dict[str, object]:
        model = self.config.model
        if not self.config.is_remote:
            model = str(model_folder(model, self._folder / "models").resolve())
        return arguments_of(self.config, model=model, is_on_gpu=self._is_on_gpu)

    def generate(self, load: Load, *, timeout_s: float = 300) -> Generation:
        """Generate a load, all requests handed over at once, and time it.

        Args:
            load: What to generate.
            timeout_s: Most seconds to wait.

        Raises:
            UsageError: A request longer than `max_model_len`.
            EngineOutOfMemory: The device's memory did not suffice.
            EngineError: It died or hung, or a request got fewer tokens than asked for.
        """
        reply = self._ask(Generate(load=load), f"generating {_described(load)}", timeout_s)
        generation = self._expect(reply, Generated).generation
        check_lengths(generation, load)
        return generation

    def profile(self, load: Load, *, timeout_s: float = 300, keep: Path | None = None) -> GpuTime | None:
        """Generate a load under the profiler: how long the GPUs computed. `None` where there is no GPU.

        Do so after what is timed: vLLM's profiler, once started, keeps costing the host a little.

        Args:
            load: That of the timed pass, or a short one of the same kind.
            timeout_s: Most seconds to wait.
            keep: File for the first GPU's trace, `.json.gz`; its folder is there.

        Raises:
            UsageError: A request longer than `max_model_len`.
            EngineError: It died or hung, or the profiler saw nothing.
        """
        if not self._is_on_gpu:
            return None
        command = Profile(load=load, keep=str(keep.resolve()) if keep else None)
        reply = self._ask(command, f"profiling {_described(load)}", timeout_s)
        return self._expect(reply, Profiled).gpu

    def close(self) -> Teardown:
        """End the engine, and wait until the GPUs have their memory back; a second call answers the same."""
        if self._teardown is not None:
            return self._teardown
        if self._process is None:
            return Teardown(duration_s=0.0)
        begin_s = time.perf_counter()
        problem = self._process.stop(Stop(), timeout_s=self.stop_timeout_s)
        after_bytes = self._freed_bytes()
        if problem is None and not self._process.has_failed:
            self._process.log.unlink(missing_ok=True)
        for folder in (self._traces, self._sockets):
            shutil.rmtree(folder, ignore_errors=True)
        self._teardown = Teardown(
            before_bytes=self._before_bytes,
            after_bytes=after_bytes,
            duration_s=time.perf_counter() - begin_s,
            problem=problem,
        )
        return self._teardown

    def memory_used_bytes(self) -> tuple[int, ...]:
        """Read the memory in use on each device, by all processes; empty without NVML, or where it does not tell."""
        if self._nvml is None or not self._is_on_gpu:
            return ()
        used = [self._nvml.state(device.uuid).memory_used_bytes for device in self._devices]
        return tuple(one for one in used if one is not None) if None not in used else ()

    def _freed_bytes(self) -> tuple[int, ...]:
        """Memory in use once it is back where it was, or after a while."""
        limit_s = time.monotonic() + self.free_timeout_s
        while True:
            used = self.memory_used_bytes()
            pairs = zip(used, self._before_bytes, strict=False)
            if all(now <= before + LEFT_BYTES for now, before in pairs) or time.monotonic() > limit_s:
                return used
            time.sleep(0.1)

    def _ask(self, command: Generate | Profile, stage: str, timeout_s: float) -> Reply:
        if self._process is None or not self._process.is_open:
            raise EngineError(f"The engine of {self.config.label} is not running: it was not started, or has ended.")
        load = command.load
        if load.prompt_tokens + load.output_tokens > self.max_model_len:
            raise UsageError(
                f"{load.prompt_tokens} prompt and {load.output_tokens} output tokens are more than "
                f"max_model_len={self.max_model_len} of this engine."
            )
        return self._process.ask(command, stage=stage, timeout_s=timeout_s)

    def _expect(self, reply: Reply, kind: type[Expected]) -> Expected:
        assert self._process is not None
        if isinstance(reply, kind):
            return reply
        raise EngineError(f"{self._process.name} answered {type(reply).__name__} where {kind.__name__} was expected.")


class StartEngine(Protocol):
    """The `vllm_engine` fixture: start vLLM for a test."""

    def __call__(self, config: EngineConfig, *, devices: Sequence[Device] | None = None) -> Engine:
        """Return a running engine, which ends with the test, or before it with `engine.close()`.

        Args:
            config: What to start.
            devices: Some of those that the test holds; `None`: all of them.

        Raises:
            UsageError: What this vLLM does not know, or a device that the test does not hold.
            NotSupported: vLLM is not installed, or the model does not fit.
            EngineError: It died, hung, or refused the configuration.
        """
        ...


def check_lengths(generation: Generation, load: Load) -> None:
    """Make sure that every request got the tokens that were asked for.

    Raises:
        EngineError: With the numbers.
    """
    produced = [request.output_tokens for request in generation.requests]
    wrong = [number for number, tokens in enumerate(produced) if tokens != load.output_tokens]
    if len(produced) != load.requests:
        raise EngineError(f"{load.requests} requests were handed over and {len(produced)} answered.")
    if wrong:
        raise EngineError(
            f"{len(wrong)} of {load.requests} requests did not get the {load.output_tokens} tokens asked for: request "
            f"{wrong[0]} got {produced[wrong[0]]}. No throughput is computed from tokens that were not produced. "
            "Likely a stop condition or a limit in EngineConfig(options=...)."
        )


def _described(load: Load) -> str:
    return f"{load.requests} requests of {load.prompt_tokens} + {load.output_tokens} tokens"
