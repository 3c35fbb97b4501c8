"""What `gpuperf memory` prints: the parts of what a model needs, and the GPUs that it fits on. 80 columns. A plot."""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from pytest_gpuperf.analysis.memory import Estimate, GpuMemory, Use, estimate
from pytest_gpuperf.analysis.memory_fit import Fit, memory_of
from pytest_gpuperf.analysis.memory_parts import BLOCK_TOKENS, captured_graphs
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.specs import find_spec
from pytest_gpuperf.report.terminal import Line
from pytest_gpuperf.specs import GpuSpec
from pytest_gpuperf.units import counted, format_percent, format_value
from pytest_gpuperf.workloads.models import stored_quantization

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 80
#: GPUs that are shown where the user names none: the smallest that fit.
_MOST_SHOWN = 8
#: vLLM's default gpu_memory_utilization.
_USUAL_SHARE = 0.92
#: Whose memory the plot shows where the user names none.
_LINES = ("L4", "L40S", "H100-SXM-80", "H200-SXM")
_PARTS = {
    "weights": "weights_bytes",
    "KV cache": "kv_bytes",
    "activations": "activation_bytes",
    "allocator": "slack_bytes",
    "CUDA graphs": "graph_bytes",
    "CUDA and kernels": "overhead_bytes",
}


def memory_lines(needed: Estimate) -> list[Line]:
    """Say what a model needs, part by part: on one GPU, and on all where there are several."""
    use = needed.use
    billions = f"{needed.shape.parameters / 1e9:.4g} B parameters"
    kv = "16-bit" if use.kv_dtype == "auto" else use.kv_dtype
    load = f"{counted(use.batch_size, 'request')} of {counted(use.sequence_tokens, 'token')} at a time"
    texts = [
        f"{needed.shape.name}: {billions}, {use.quantization} weights, {kv} KV cache, {use.engine}",
        f"{load} on {counted(len(needed.gpus), 'GPU')}{_step(needed)}",
        "",
    ]
    if len(needed.gpus) > 1:
        texts.append(f"{'':<17} {'fullest':>9} {f'{len(needed.gpus)} GPUs':>9}")
    notes = {name: note for name, note in _notes(needed).items() if note}
    for name, field in _PARTS.items():
        if name == "allocator" and not needed.overheads.slack:
            continue
        texts.append(f"{_row(name, needed, field)}  {notes.get(name, '')}".rstrip())
    texts.append(_row("total", needed, "total_bytes"))
    return [Line(text=text) for text in texts]


def stored_lines(model: str, use: Use) -> list[Line]:
    """Say how the weights of a folder are quantized already, beside what is counted; nothing where they are not."""
    stored = stored_quantization(model)
    if stored is None:
        return []
    text = f"config.json says {stored}; counted are {use.quantization} weights, as --quantization says."
    return [Line(text=part, colour="yellow") for part in textwrap.wrap(text, _WIDTH, break_on_hyphens=False)]


def fit_lines(fits: Sequence[Fit], use: Use, *, is_chosen: bool) -> list[Line]:
    """Say where it fits: each chosen GPU, or the smallest that it fits on and the names of the others.

    Args:
        fits: By memory, the smallest first.
        use: How the model is to run.
        is_chosen: The user named them.
    """
    shown = fits if is_chosen else [fit for fit in fits if fit.is_fitting][:_MOST_SHOWN]
    lines = [Line(text="")]
    if shown:
        lines.append(Line(text=f"{'GPU':<20} {'memory':>9} {'needed':>8} {'requests at most':>17}"))
    lines += [_fit_line(fit) for fit in shown]
    rest = [fit for fit in fits if fit not in shown]
    for title, names in (
        ("Fits on larger ones too:", [fit.gpu for fit in rest if fit.is_fitting]),
        ("Too small:", [fit.gpu for fit in rest if not fit.is_fitting and fit.refusal is None]),
        *((f"{refusal}:", [fit.gpu for fit in rest if fit.refusal == refusal]) for refusal in _refusals(rest)),
    ):
        lines += _wrapped(f"{title} {', '.join(names)}") if names else []
    if not any(fit.is_fitting for fit in fits):
        lines.append(Line(text=f"Does not fit. Try {_remedies(fits, use)}.", colour="yellow"))
    if use.engine == "vllm" and any(
        fit.is_fitting and fit.needed_bytes > _USUAL_SHARE * fit.memory_bytes for fit in shown
    ):
        lines.append(Line(text="Above 92 % tell vLLM: --gpu-memory-utilization or --kv-cache-memory-bytes."))
    if any(not fit.is_observed for fit in shown):
        lines.append(Line(text="~ from the vendor's label, less 8 % (GDDR) or 1.5 % (HBM): not observed yet."))
    return lines


def _remedies(fits: Sequence[Fit], use: Use) -> str:
    """What there is left to change."""
    if all(fit.refusal for fit in fits):
        return "--quantization fp16"
    smaller = {"fp16": "fp8", "bf16": "fp8", "fp8": "int4", "int8": "int4"}.get(use.quantization)
    quantization = [f"--quantization {smaller}"] if smaller else []
    batch = ["a smaller --batch-size"] if use.batch_size > 1 else []
    return ", ".join(["more --gpus", *quantization, *batch])


def _step(needed: Estimate) -> str:
    is_vllm = needed.use.engine == "vllm"
    return f", {needed.use.max_num_batched_tokens} tokens a step at most" if is_vllm else ""


def _row(name: str, needed: Estimate, field: str) -> str:
    row = f"{name:<17} {format_value(getattr(needed.fullest, field), 'B'):>9}"
    together = f" {format_value(getattr(needed.together, field), 'B'):>9}" if len(needed.gpus) > 1 else ""
    return row + together


def _notes(needed: Estimate) -> dict[str, str]:
    """Part -> what it is made of, in 40 columns."""
    graphs, overheads = captured_graphs(needed.use), needed.overheads
    is_measured = overheads.context.is_measured and (len(needed.gpus) == 1 or overheads.nccl.is_measured)
    request = f"{format_value(needed.kv_bytes_per_request, 'B')} a request"
    blocks = f"{needed.kv_blocks} blocks of {BLOCK_TOKENS}, " if needed.kv_blocks else ""
    peak = "peak of a step" if needed.use.engine == "vllm" else "peak while all prompts are read"
    return {
        "KV cache": blocks + request,
        "activations": peak,
        "allocator": "freed, and kept by torch's allocator" if overheads.slack else "",
        "CUDA graphs": f"{graphs} graphs{_estimated(overheads.graph_layer.is_measured)}" if graphs else "",
        "CUDA and kernels": f"context, workspaces{_estimated(is_measured)}",
    }


def _estimated(is_measured: bool) -> str:
    return "" if is_measured else ", a rough estimate"


def _fit_line(fit: Fit) -> Line:
    mark = "" if fit.is_observed else "~"
    row = f"{fit.gpu:<20} {mark + format_value(fit.memory_bytes, 'B', digits=3):>9}"
    if fit.refusal is not None:
        return Line(text=f"{row}  {fit.refusal}", colour="yellow")
    row += f" {format_percent(fit.needed_bytes / fit.memory_bytes):>8} {fit.largest_batch:>17}"
    if fit.is_fitting:
        return Line(text=row, colour="green")
    lacking = format_value(fit.needed_bytes - fit.memory_bytes, "B", digits=3)
    return Line(text=f"{row}  lacks {lacking}", colour="yellow")


def _refusals(fits: Sequence[Fit]) -> list[str]:
    return sorted({fit.refusal for fit in fits if fit.refusal is not None})


def _wrapped(text: str) -> list[Line]:
    parts = textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return [Line(text=part) for part in parts]


# The plot


def save_plot(needed: Estimate, path: Path, gpus: Sequence[GpuSpec] = ()) -> None:
    """Draw what a GPU needs over the batch size: for several sequence lengths, and part by part for this one.

    Args:
        needed: The estimate to draw around.
        path: PNG, SVG or PDF to write, by its suffix.
        gpus: Whose memory is drawn as a line; default: four of common sizes.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'pytest-gpuperf[report]'. Or leave --plot out.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    specs = gpus or [find_spec(name) for name in _LINES]
    batches = _batches(needed)
    _draw_lengths(left, needed, batches)
    _draw_parts(right, needed, batches)
    for axes in (left, right):
        _draw_gpus(axes, specs)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("requests at a time")
        axes.set_ylabel("GB on the fullest GPU")
        axes.set_xlim(batches[0], batches[-1])
    figure.suptitle(memory_lines(needed)[0].text + f", {counted(len(needed.gpus), 'GPU')}")
    try:
        figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")  # else a name without a suffix gets one
    except (OSError, ValueError) as error:
        raise UsageError(f"The plot cannot be written to {path}: {error}.") from None


def _batches(needed: Estimate) -> list[int]:
    largest = max(256, needed.use.batch_size)
    return [2**i for i in range(largest.bit_length() + (largest.bit_count() > 1))]


def _gpu_at(needed: Estimate, batch_size: int, sequence_tokens: int) -> GpuMemory:
    use = replace(needed.use, batch_size=batch_size, sequence_tokens=sequence_tokens)
    return estimate(needed.shape, use, overheads=needed.overheads).fullest


def _draw_lengths(axes: "Axes", needed: Estimate, batches: Sequence[int]) -> None:
    tokens, limit = needed.use.sequence_tokens, needed.shape.max_positions
    lengths = sorted({max(tokens // 4, 1), tokens, min(tokens * 4, limit), min(tokens * 16, limit)})
    for length in lengths:
        totals = [_gpu_at(needed, batch, length).total_bytes / 1e9 for batch in batches]
        axes.plot(batches, totals, marker="o", markersize=3, label=f"{length} tokens")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("total, by length of a request")
    axes.legend(loc="upper left", fontsize="small")


def _draw_parts(axes: "Axes", needed: Estimate, batches: Sequence[int]) -> None:
    gpus = [_gpu_at(needed, batch, needed.use.sequence_tokens) for batch in batches]
    parts = {name: [getattr(gpu, field) / 1e9 for gpu in gpus] for name, field in _PARTS.items()}
    parts = {name: sizes for name, sizes in parts.items() if any(sizes)}
    axes.stackplot(batches, list(parts.values()), labels=list(parts))
    axes.set_title(f"parts, at {counted(needed.use.sequence_tokens, 'token')} a request")
    axes.legend(loc="upper left", fontsize="small")


def _draw_gpus(axes: "Axes", specs: Sequence[GpuSpec]) -> None:
    """Lines at the memory of the GPUs, as far as the drawing reaches, and one beyond."""
    top = axes.get_ylim()[1]
    for memory_gb, name in sorted((memory_of(spec) / 1e9, spec.key) for spec in specs):
        if memory_gb > 2 * top:
            break
        axes.axhline(memory_gb, color="grey", linestyle="--", linewidth=0.8)
        axes.annotate(name, (1.01, memory_gb), xycoords=("axes fraction", "data"), va="center", fontsize=8)
