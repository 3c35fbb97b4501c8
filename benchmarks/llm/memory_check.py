"""The memory calculator against real GPUs: what `gpuperf memory` says beside what NVML, torch and vLLM's log say.

    python benchmarks/llm/memory_check.py OUT.json [--limit-s 360] [--parts transformers,graphs,vllm] [--tokens 1024]
        [--batches 1,8,32] [--vllm-models llama-3-8b,gpt2]

Three parts, the quickest first, each row written as soon as it is known, so that a run that is cut short keeps them:
transformers: six models at three batch sizes, one process a model. graphs: one engine that sizes its cache itself, with
CUDA graphs, whose log tells activations and graphs apart. vllm: models at three sizes of the KV cache, eager.
No further process is started once the limit is over. The last lines say what data/memory_overheads.json should hold.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.analysis.memory import EngineName, Estimate, GpuMemory, Use, estimate
from pytest_gpuperf.analysis.memory_parts import kv_cache_memory_bytes
from pytest_gpuperf.errors import DeviceError, GpuperfError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.records import Record, encode
from pytest_gpuperf.units import format_percent, format_value
from pytest_gpuperf.workloads.models import config_of, shape_of
from pytest_gpuperf.workloads.requests import Load
from pytest_gpuperf.workloads.vllm import Engine, EngineConfig

MODELS = ("gpt2", "opt-1.3b", "tinyllama-1.1b", "llama-3.2-3b", "qwen2.5-7b", "llama-3-8b")
#: With fewer than 8 of 1,024 tokens, vLLM 0.26 might die in its warm-up of 8,192 tokens (see RESULTS.md).
VLLM_BATCHES = (16, 32, 64)
GRAPHS_MODEL = "llama-3-8b"
OUTPUT_TOKENS = 16
GOAL = 0.05

#: What vLLM 0.26 to 0.33 log, in GiB: figure -> pattern.
LOGGED = {
    "weights": re.compile(r"Model loading took ([\d.]+) ?GiB"),
    "activation_peak": re.compile(r"torch peak memory increase: ([\d.]+) ?GiB"),
    "all_but_kv": re.compile(r"Total non KV cache memory: ([\d.]+) ?GiB"),
    "consumed": re.compile(r"total consumed \(from mem_get_info\): ([\d.]+) ?GiB"),
    "graphs": re.compile(r"Graph capturing finished in .*? took (-?[\d.]+) ?GiB"),
    "kv": re.compile(r"Available KV cache memory: ([\d.]+) ?GiB"),
}


class Row(Record, frozen=True, kw_only=True):
    """One configuration: what the calculator says, and what was seen. Bytes.

    Attributes:
        said: The calculator's parts.
        said_blocks: Its KV blocks.
        used_bytes: By NVML: more than before the model came.
        allocated_bytes: Peak of torch's tensors (transformers).
        reserved_bytes: Peak of what torch's allocator held.
        parameter_bytes: Of the model's parameters (transformers).
        blocks: That vLLM made.
        logged_bytes: Figures of vLLM's log.
    """

    part: str
    model: str
    batch_size: int
    said: GpuMemory
    said_blocks: int | None = None
    used_bytes: int
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    parameter_bytes: int | None = None
    blocks: int | None = None
    logged_bytes: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def error(self) -> float:
        """Of the calculator's total against NVML, relative."""
        return self.said.total_bytes / self.used_bytes - 1

    @property
    def overhead_bytes(self) -> int:
        """What the overhead would have to be for the total to be right."""
        return self.used_bytes - self.said.total_bytes + self.said.overhead_bytes


def use_of(engine: EngineName, batch_size: int, *, tokens: int, is_eager: bool = True) -> Use:
    """How both the calculator and the engine are told to run."""
    return Use(sequence_tokens=tokens, batch_size=batch_size, engine=engine, is_eager=is_eager)


def used_bytes(machine: Machine) -> int:
    """Memory in use on the first GPU, by the driver."""
    assert machine.nvml is not None, machine.gpu_problem
    found = machine.nvml.state(machine.gpus[0].uuid).memory_used_bytes
    assert found is not None
    return found


# transformers, in a process of its own a model


def transformers_rows(machine: Machine, model: str, *, tokens: int, batches: Sequence[int]) -> Iterator[Row]:
    """Load a model once, and generate at each batch size with an empty allocator."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    before_bytes = used_bytes(machine)
    config = config_of(shape_of(model))
    kept = {name: value for name, value in config.items() if name not in ("architectures", "model_type", "torch_dtype")}
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**kept), dtype=torch.bfloat16)
    made.eval()
    parameter_bytes = sum(parameter.nbytes for parameter in made.parameters())
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    for batch_size in batches:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        prompts = torch.randint(10, 1000, (batch_size, tokens - OUTPUT_TOKENS), device="cuda")
        made.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=OUTPUT_TOKENS, do_sample=False)
        yield Row(
            part="transformers",
            model=model,
            batch_size=batch_size,
            said=estimate(shape_of(model), use_of("transformers", batch_size, tokens=tokens)).fullest,
            used_bytes=used_bytes(machine) - before_bytes,
            allocated_bytes=torch.cuda.max_memory_allocated(),
            reserved_bytes=torch.cuda.max_memory_reserved(),
            parameter_bytes=parameter_bytes,
        )


# vLLM


def vllm_row(machine: Machine, model: str, batch_size: int, *, part: str, tokens: int) -> Row:
    """Start an engine, generate a full batch, and read the driver before, and vLLM's log after."""
    is_sized_by_itself = part == "graphs"
    needed = estimate(shape_of(model), use_of("vllm", batch_size, tokens=tokens, is_eager=not is_sized_by_itself))
    load = Load(requests=batch_size, prompt_tokens=tokens - OUTPUT_TOKENS, output_tokens=OUTPUT_TOKENS)
    before_bytes = used_bytes(machine)
    config = engine_config(needed, is_sized_by_itself=is_sized_by_itself)
    with (
        tempfile.TemporaryDirectory() as name,
        Engine(config, devices=machine.devices[:1], nvml=machine.nvml, folder=Path(name), load_timeout_s=240) as engine,
    ):
        engine.generate(load, timeout_s=120)
        after_bytes, blocks = used_bytes(machine), engine.blocks
        log = "".join(path.read_text(errors="replace") for path in Path(name).rglob("*.log"))  # gone with the engine
    said = needed.fullest
    if is_sized_by_itself:  # the cache is as large as vLLM made it: the other parts are what is asked about
        said = replace(said, kv_bytes=blocks * said.kv_bytes // (needed.kv_blocks or 1))
    return Row(
        part=part,
        model=model,
        batch_size=batch_size,
        said=said,
        said_blocks=needed.kv_blocks,
        used_bytes=after_bytes - before_bytes,
        blocks=blocks,
        logged_bytes=logged(log),
    )


def engine_config(needed: Estimate, *, is_sized_by_itself: bool) -> EngineConfig:
    """Just what the calculator was asked about, and a log that says all."""
    use = needed.use
    kv_bytes = None if is_sized_by_itself else kv_cache_memory_bytes(needed.shape, use)
    return EngineConfig(
        model=needed.shape.name,
        max_model_len=use.sequence_tokens,
        max_num_seqs=use.batch_size,
        max_num_batched_tokens=use.max_num_batched_tokens,
        gpu_memory_utilization=0.6,
        kv_cache_memory_bytes=kv_bytes,
        enforce_eager=use.is_eager,
        environment={"VLLM_LOGGING_LEVEL": "DEBUG"},
    )


def logged(log: str) -> dict[str, int]:
    """Figures that vLLM logs, in bytes; the last where there are several."""
    found = {name: pattern.findall(log) for name, pattern in LOGGED.items()}
    return {name: round(float(values[-1]) * 2**30) for name, values in found.items() if values}


# What is run and what is shown


def all_rows(
    parts: Sequence[str], *, limit_s: float, tokens: int, batches: str, vllm_models: Sequence[str]
) -> Iterator[Row]:
    """Every row that time allows; a configuration that fails is told and left out."""
    until_s = time.monotonic() + limit_s
    machine = Machine("cuda")
    if not machine.gpus:
        raise DeviceError(f"This compares with a GPU, and there is none: {machine.gpu_problem}")
    if "transformers" in parts:
        for model in MODELS:
            yield from _in_child(model, until_s, "--tokens", str(tokens), "--batches", batches)
    engines = [("graphs", GRAPHS_MODEL, 64)] if "graphs" in parts else []
    if "vllm" in parts:
        engines += [("vllm", model, batch) for batch in VLLM_BATCHES for model in vllm_models]
    for part, model, batch_size in engines:
        if time.monotonic() > until_s:
            print(f"left out, the time is over: {part} {model} {batch_size}", flush=True)
            continue
        try:
            yield vllm_row(machine, model, batch_size, part=part, tokens=tokens)
        except GpuperfError as error:
            print(f"failed: {part} {model} {batch_size}: {error}", flush=True)


def _in_child(model: str, until_s: float, *options: str) -> Iterator[Row]:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        print(f"left out, the time is over: transformers {model}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        done = run_group(
            [sys.executable, __file__, str(rows), "--child", model, *options], timeout_s=min(left_s, 120.0)
        )
        if done.code != 0:
            print(f"failed: transformers {model} {done.in_words}:\n{done.tail}", flush=True)
        for line in rows.read_bytes().splitlines() if rows.exists() else []:
            yield msgspec.json.decode(line, type=Row)


def show(row: Row) -> None:
    """A line a row: NVML, the calculator, and the parts that something else says too."""
    checks = []
    if row.parameter_bytes is not None:
        checks.append(f"weights {'exact' if row.parameter_bytes == row.said.weights_bytes else 'DIFFER'}")
    if row.part == "vllm":
        checks.append(f"blocks {'exact' if row.blocks == row.said_blocks else f'{row.blocks} not {row.said_blocks}'}")
    if row.allocated_bytes is not None:
        said = row.said.weights_bytes + row.said.kv_bytes + row.said.activation_bytes
        checks.append(f"tensors {said / row.allocated_bytes - 1:+.1%}")
    pairs = {"weights": row.said.weights_bytes, "activation_peak": row.said.activation_bytes}
    pairs |= {"graphs": row.said.graph_bytes} if row.part == "graphs" else {}
    for name, said in pairs.items():
        if name in row.logged_bytes:
            checks.append(f"{name} {_gb(said)} (logged {_gb(row.logged_bytes[name])})")
    mark = "" if abs(row.error) <= GOAL else "  BEYOND THE GOAL"
    print(
        f"{row.part:<12} {row.model:<15} {row.batch_size:>3}  NVML {_gb(row.used_bytes):>9}"
        f"  said {_gb(row.said.total_bytes):>9} {row.error:+7.1%}{mark}  {', '.join(checks)}",
        flush=True,
    )


def show_overheads(rows: Sequence[Row]) -> None:
    """What the overheads would have to be, from each row, and the median."""
    for part in ("transformers", "vllm"):
        found = sorted(row.overhead_bytes for row in rows if row.part == part)
        if found:
            span = f"{_gb(found[0])} to {_gb(found[-1])}"
            print(f"{part}: context.bytes = {statistics.median_low(found)} (rows say {span})")
    for row in rows:
        graph_bytes = row.logged_bytes.get("graphs")
        said = row.said.graph_bytes
        if row.part == "graphs" and graph_bytes is not None and said:
            old = estimate(
                shape_of(row.model), use_of("vllm", row.batch_size, tokens=1024, is_eager=False)
            ).overheads.graph_layer
            print(f"vllm: graph_layer.bytes = {round(old.bytes * graph_bytes / said)}")
    within = sum(abs(row.error) <= GOAL for row in rows)
    print(f"{within} of {len(rows)} totals within {format_percent(GOAL)} of NVML")


def _gb(value_bytes: float) -> str:
    return format_value(value_bytes, "B", digits=4)


def main() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=360.0)
    parser.add_argument("--parts", default="transformers,graphs,vllm")
    parser.add_argument("--tokens", type=int, default=1024, help="of a request")
    parser.add_argument("--batches", default="1,8,32", help="of transformers")
    parser.add_argument("--vllm-models", default="llama-3-8b,gpt2", help="of vllm")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with options.out.open("wb") as lines:
            batches = [int(batch) for batch in options.batches.split(",")]
            for row in transformers_rows(Machine("cuda"), options.child, tokens=options.tokens, batches=batches):
                lines.write(encode(row) + b"\n")
                lines.flush()
        return
    rows: list[Row] = []
    parts = options.parts.split(",")
    for row in all_rows(
        parts,
        limit_s=options.limit_s,
        tokens=options.tokens,
        batches=options.batches,
        vllm_models=options.vllm_models.split(","),
    ):
        rows.append(row)
        show(row)
        options.out.write_text(json.dumps([json.loads(encode(each)) for each in rows], indent=1) + "\n")
    show_overheads(rows)


if __name__ == "__main__":
    try:
        main()
    except GpuperfError as error:
        sys.exit(str(error))
