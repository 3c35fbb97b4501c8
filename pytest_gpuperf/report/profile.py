"""What `gpuperf profile` prints: where a call's time went, on the GPU and on the host."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pytest_gpuperf.analysis.kernel_names import short_name
from pytest_gpuperf.records import KernelSummary, KernelUse
from pytest_gpuperf.report.terminal import Line
from pytest_gpuperf.trials.profile import Profiled, Result
from pytest_gpuperf.units import counted, format_percent, format_value

VIEWER = "https://ui.perfetto.dev"
#: Below this a GPU waits for its host.
_BUSY = 0.9
#: Python and torch need 5 to 50 us for a launch; what takes longer is other work.
_OF_LAUNCHING_S = 1e-4


def profile_lines(result: Result, *, top: int, asked: int | None, width: int = 80) -> list[Line]:
    """Say what was seen, and where the traces are.

    Args:
        result: What was seen.
        top: Most kernels to show.
        asked: Calls that were to be profiled; `None`: as many as is usual.
        width: Of the terminal.
    """
    lines = [line for one in result.seen for line in _lines_of(one, top, asked, width)]
    if not result.seen:
        lines.append(Line(text="nsys recorded it: torch's profiler was left out."))
    lines += [Line(text=f"Trace: {_relative(path)}", colour="cyan") for path in result.traces]
    if result.traces:
        lines.append(Line(text=f"Open it at {VIEWER}: it is read there, and goes nowhere."))
    return lines


def _relative(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _lines_of(one: Profiled, top: int, asked: int | None, width: int) -> list[Line]:
    kernels, unit = one.kernels, one.calls
    counted = f"{kernels.calls} {unit if kernels.calls != 1 else unit[:-1]}"
    rows = [_fitted(one.title, width), f"  {counted} profiled{_cut(one, asked)}; of one {unit[:-1]}:"]
    is_cpu = not kernels.launches
    rows += _cpu_rows(kernels) if is_cpu else _gpu_rows(kernels)
    rows += _table(kernels, top, "operator" if is_cpu else "kernel", width)
    rows += [f"  {row}" for row in map(_copy_row, _copies(kernels))]
    lines = [Line(text=row) for row in rows]
    if not is_cpu and _share(kernels.busy_s, kernels.span_s) < _BUSY:
        text = textwrap.fill(f"The GPU waits: {_why(kernels)}", width - 2, initial_indent="  ", subsequent_indent="  ")
        lines += [Line(text=row, colour="yellow") for row in text.splitlines()]
    return lines


def _cut(one: Profiled, asked: int | None) -> str:
    """That it were fewer calls than asked for, and why."""
    if asked is None or one.kernels.calls >= asked or one.calls == "steps":
        return ""
    return f" of {asked:,} asked for (the trace stays small)"


def _cpu_rows(kernels: KernelSummary) -> list[str]:
    return [f"  no GPU: torch's operators take {_time(kernels.busy_s)}, wall {_time(kernels.wall_s)}"]


def _gpu_rows(kernels: KernelSummary) -> list[str]:
    busy = _share(kernels.busy_s, kernels.span_s)
    graphs = f", {kernels.graph_launches:.3g} of them CUDA graphs" if kernels.graph_launches else ""
    idle = f"idle {format_percent(1 - busy)} ({_time(kernels.gap_s)})"
    return [
        f"  GPU    {_time(kernels.span_s)} from first to last, busy {format_percent(busy)}, {idle}",
        f"         longest gap {_time(kernels.longest_gap_s)}, {counted(kernels.streams, 'stream')}",
        f"  host   {kernels.launches:.3g} launches{graphs}, {_time(kernels.launch_s)} in them",
        f"         waits for the GPU {_time(kernels.sync_s)}, wall {_time(kernels.wall_s)} with the profiler's cost",
    ]


def _table(kernels: KernelSummary, top: int, word: str, width: int) -> list[str]:
    total_s = sum(use.time_s for use in _all(kernels))
    rows = [f"  {'share':>7} {'time':>9} {'count':>7} {'blocks':>7}  {word}"]
    shown = kernels.kernels[:top]
    rows += [_row(use, total_s, width) for use in shown]
    others = _all(kernels)[len(shown) :]
    if others:
        count, time_s = sum(use.count for use in others), sum(use.time_s for use in others)
        rows.append(_row(KernelUse(name="all others", count=count, time_s=time_s), total_s, width))
    return rows


def _all(kernels: KernelSummary) -> Sequence[KernelUse]:
    return (*kernels.kernels, *((kernels.rest,) if kernels.rest else ()))


def _row(use: KernelUse, total_s: float, width: int) -> str:
    blocks = "-" if use.blocks is None else f"{use.blocks:.0f}"
    share = f"{_share(use.time_s, total_s) * 100:.1f} %"
    text = f"  {share:>7} {_time(use.time_s):>9} {use.count:>7.4g} {blocks:>7}  "
    return text + _fitted(short_name(use.name), max(width - len(text), 12))


def _copies(kernels: KernelSummary) -> list[KernelUse]:
    return [use for use in kernels.kernels if use.kind == "copy" and use.bytes_moved]


def _copy_row(use: KernelUse) -> str:
    moved = use.bytes_moved or 0.0
    rate = f", {format_value(moved / use.time_s, 'B/s', digits=3)}" if use.time_s else ""
    return f"{use.name}: {format_value(moved, 'B', digits=3)} in {_time(use.time_s)}{rate}"


def _why(kernels: KernelSummary) -> str:
    """What the gaps come from, as far as the numbers tell."""
    if kernels.graph_launches > 0.5 * kernels.launches:
        return "between the kernels of a CUDA graph, which are small. Fewer and larger ones, by fusion, wait less."
    if kernels.sync_s > 0.5 * kernels.gap_s and kernels.launches > 1:
        return "the host stops for it between launches (.item(), .cpu(), synchronize())."
    each_s, kernel_s = kernels.span_s / kernels.launches, kernels.busy_s / kernels.launches
    words = f"the host takes {_time(each_s)} from one launch to the next, and the GPU is done in {_time(kernel_s)}."
    if each_s < _OF_LAUNCHING_S:
        return f"{words} A CUDA graph, torch.compile or larger batches launch less."
    return f"{words} Look for what it does in between."


def _share(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if whole else 0.0


def _time(seconds: float) -> str:
    return format_value(seconds, "s", digits=3)


def _fitted(text: str, width: int) -> str:
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"
