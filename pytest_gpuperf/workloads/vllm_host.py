"""The process that vLLM runs in: `python -m pytest_gpuperf.workloads.vllm_host REPLY_FD`, commands on its input.

It ends with its whole process group when its input ends: whoever started it may have been killed.
"""

import dataclasses
import difflib
import inspect
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.workloads.requests import GpuTime
from pytest_gpuperf.workloads.vllm_driver import generate, profile, stat_loggers
from pytest_gpuperf.workloads.vllm_messages import (
    Command,
    Generate,
    Generated,
    Profile,
    Profiled,
    Ready,
    Refused,
    Reply,
    Start,
    Stop,
    Stopped,
    command_of,
    to_line,
)

#: Arguments that vLLM once had, and what took their place.
_REMOVED = {
    "swap_space": "V1 computes preempted requests again and swaps none out",
    "num_scheduler_steps": "V1 overlaps scheduling and computing by itself (async_scheduling)",
    "use_v2_block_manager": "V1 has one block manager",
    "preemption_mode": "V1 computes preempted requests again",
}

#: How often the host looks whether vLLM's core is alive, and how long vLLM may take to notice that it is not.
_LOOK_EVERY_S, _NOTICE_S = 0.5, 2.0


class Host:
    """Holds the engine between two commands."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._is_stopping = False
        self._profile_folder: str | None = None

    def answer(self, command: Command) -> Reply:
        """Do what is asked, and say what went wrong if it does not work."""
        try:
            return self._do(command)
        except UsageError as error:
            return Refused(kind="argument", message=str(error))
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is told to the process that waits for it
            traceback.print_exc()
            is_refusal = self._llm is None and isinstance(error, ValueError | TypeError)
            message = f"{type(error).__name__}: {error}"
            return Refused(kind="configuration" if is_refusal else "failure", message=message)

    def _do(self, command: Command) -> Reply:
        match command:
            case Start():
                self._profile_folder = command.profile_folder
                self._llm, ready = load(command)
                threading.Thread(target=self._watch_core, name="gpuperf-core", daemon=True).start()
                return ready
            case Generate():
                return Generated(generation=generate(self._llm, command.load, vocab=self._vocab))
            case Profile():
                return Profiled(gpu=self._profile(command))
            case Stop():
                self._is_stopping = True
                if self._llm is not None:
                    self._llm.llm_engine.engine_core.shutdown()
                return Stopped()

    def _profile(self, command: Profile) -> GpuTime | None:
        if self._profile_folder is None:
            return None
        keep = Path(command.keep) if command.keep else None
        return profile(self._llm, command.load, vocab=self._vocab, folder=Path(self._profile_folder), keep=keep)

    def _watch_core(self) -> None:
        """End this process when vLLM's core has died: `LLM.generate` may wait for it for ever (seen in 0.32)."""
        resources = getattr(self._llm.llm_engine.engine_core, "resources", None)
        while not getattr(resources, "engine_dead", False):
            time.sleep(_LOOK_EVERY_S)
        time.sleep(_NOTICE_S)
        if not self._is_stopping:
            sys.stderr.write("EngineDeadError: vLLM's engine core has died, and LLM.generate has not noticed.\n")
            sys.stderr.flush()
            os._exit(1)

    @property
    def _vocab(self) -> int:
        size: int = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        return size


def main() -> None:
    """Serve commands until told to stop."""
    reply_fd = int(sys.argv[1])
    os.set_inheritable(reply_fd, False)
    commands, host = _listen(), Host()
    reply: Reply | None = None
    while not isinstance(reply, Stopped):
        reply = host.answer(commands.get())
        _send(reply_fd, reply)


def _listen() -> "queue.Queue[Command]":
    """Read commands in a thread, from a descriptor that vLLM's processes do not inherit."""
    command_fd = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    commands: queue.Queue[Command] = queue.Queue()
    threading.Thread(target=_read, args=(command_fd, commands), name="gpuperf-commands", daemon=True).start()
    return commands


def _read(fd: int, commands: "queue.Queue[Command]") -> None:
    # os.read, not a buffered file: its lock would be held for ever in a process that vLLM forks
    pending = b""
    while chunk := os.read(fd, 65536):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            commands.put(command_of(line))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _send(fd: int, reply: Reply) -> None:
    line = memoryview(to_line(reply))
    while line:
        line = line[os.write(fd, line) :]


def load(start: Start) -> tuple[Any, Ready]:
    """Build the engine.

    Raises:
        UsageError: An argument or a value that this version does not know.
        Exception: Whatever vLLM raises.
    """
    import vllm

    arguments = dict(start.arguments)
    check_arguments(arguments, _known_arguments(), version=vllm.__version__)
    for name, valid in _valid_values().items():
        check_value(name, arguments.get(name), valid, version=vllm.__version__)
    if start.profile_folder is not None:
        arguments["profiler_config"] = _profiler_config(start.profile_folder)
    begin_s = time.perf_counter()
    llm = vllm.LLM(**arguments)
    load_time_s = time.perf_counter() - begin_s
    config = llm.llm_engine.vllm_config
    return llm, Ready(
        load_time_s=load_time_s,
        version=vllm.__version__,
        blocks=config.cache_config.num_gpu_blocks,
        block_size=config.cache_config.block_size,
        vocab=config.model_config.get_vocab_size(),
        max_model_len=config.model_config.max_model_len,
        has_steps=stat_loggers(llm.llm_engine) is not None,
        resolved={
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": str(config.model_config.max_model_len),
            "block_size": str(config.cache_config.block_size),
            "quantization": str(config.model_config.quantization).lower(),
            "max_num_seqs": str(config.scheduler_config.max_num_seqs),
            "max_num_batched_tokens": str(config.scheduler_config.max_num_batched_tokens),
            "gpu_memory_utilization": str(config.cache_config.gpu_memory_utilization),
        },
    )


def _known_arguments() -> frozenset[str]:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    named = set(inspect.signature(LLM.__init__).parameters) - {"self", "kwargs"}
    return frozenset({field.name for field in dataclasses.fields(EngineArgs)} | named)


def _valid_values() -> dict[str, tuple[str, ...]]:
    """What vLLM accepts for the arguments that it may be asked about; none where this version has no such list."""
    from vllm.config import cache, model
    from vllm.model_executor.layers import quantization
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # which may add to the lists; EngineArgs would do so next, and it happens once
    kv_dtypes = get_args(getattr(cache, "CacheDType", None))
    return {
        "dtype": get_args(getattr(model, "ModelDType", None)),
        "kv_cache_dtype": tuple(getattr(cache, "KV_CACHE_DTYPES", kv_dtypes)),  # the list: from 0.33
        "quantization": tuple(getattr(quantization, "QUANTIZATION_METHODS", ())),
    }


def check_arguments(arguments: Mapping[str, object], known: frozenset[str], *, version: str) -> None:
    """Refuse arguments that the installed vLLM does not have.

    Raises:
        UsageError: With the argument's name, the version, and what comes closest.
    """
    for name in arguments:
        if name in known:
            continue
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" It was removed: {_REMOVED[name]}." if name in _REMOVED else ""
        hint += f" Did you mean {close[0]!r}?" if close and not hint else ""
        raise UsageError(f"vLLM {version} has no argument {name!r}.{hint} `vllm serve --help=all` lists what it has.")


def check_value(name: str, value: object, valid: tuple[str, ...], *, version: str) -> None:
    """Refuse a value that is not in vLLM's list.

    Raises:
        UsageError: With the list.
    """
    if valid and isinstance(value, str) and value not in valid:
        raise UsageError(f"vLLM {version} knows no {name}={value!r}. Valid: {', '.join(map(str, valid))}.")


def _profiler_config(folder: str) -> dict[str, object]:
    """Settings of a profiler that sleeps until it is started, and then costs the host as little as it can."""
    from vllm.config import ProfilerConfig

    wanted: dict[str, object] = {
        "profiler": "torch",
        "torch_profiler_dir": folder,
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,  # a table of all kernels, which takes minutes
        "torch_profiler_activities": ["CUDA"],
    }
    known = {field.name for field in dataclasses.fields(ProfilerConfig)}
    return {name: value for name, value in wanted.items() if name in known}


if __name__ == "__main__":
    main()
