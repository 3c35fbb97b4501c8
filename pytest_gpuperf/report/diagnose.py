"""What `gpuperf diagnose` prints: the class, the numbers it follows from, what to do. 80 columns. A roofline plot."""

import importlib.util
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from pytest_gpuperf.analysis.advice import Recommendation
from pytest_gpuperf.analysis.roofline import (
    BOUND_FROM,
    BUSY_FROM,
    COMMUNICATION_FROM,
    IDLE_BELOW,
    Ceilings,
    Diagnosis,
    Neighbour,
)
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.trials.diagnose import Part, Report
from pytest_gpuperf.units import format_percent, format_value
from pytest_gpuperf.workloads.requests import percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 80
_MARKERS = "osD^vP"


def diagnosis_lines(report: Report) -> list[Line]:
    """Say what limits each part, with its numbers and what to do."""
    lines = [line for part in report.parts for line in _part_lines(part, is_alone=len(report.parts) == 1)]
    lines.append(Line(text=""))
    lines += _wrapped(f"{report.title}; {report.device}")
    lines += _wrapped(_ceilings_text(report.ceilings))
    for note in report.notes:
        lines += _wrapped(note, colour="yellow")
    return lines


def to_json(report: Report) -> str:
    """Everything as one JSON object, for other programs, with what is derived."""
    rows = [
        {
            "name": part.name,
            "limit": part.diagnosis.limit,
            "shares": part.diagnosis.shares,
            "next": part.diagnosis.next,
            "missing": part.diagnosis.missing,
            "tokens_per_s": part.tokens_per_s,
            "iterations": len(part.times_s),
            **{f"p{percent}_s": percentile(part.times_s, percent) for percent in (50, 95, 99)},
            "mean_s": fmean(part.times_s),
            "flops_per_s": part.diagnosis.flops_per_s,
            "bandwidth_bytes_per_s": part.diagnosis.bandwidth_bytes_per_s,
            "mfu": part.diagnosis.mfu,
            "mbu": part.diagnosis.mbu,
            "recommendations": part.advice,
            "evidence": part.diagnosis.evidence,
            "telemetry": part.telemetry,
            "notes": part.notes,
        }
        for part in report.parts
    ]
    whole = {
        "title": report.title,
        "device": report.device,
        "ceilings": report.ceilings,
        "parts": rows,
        "notes": report.notes,
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode()


def _part_lines(part: Part, *, is_alone: bool) -> list[Line]:
    found = part.diagnosis
    lines = [] if is_alone else [Line(text="")]
    lines += _wrapped(f"{part.name}: {headline(found)}", colour="cyan")
    if found.next is not None:
        lines += _wrapped(_next_text(found.next, found), first="  ")
    lines += [Line(text=f"  {name:<15} {text}") for name, text in _rows(part)]
    for note in part.notes:
        lines += _wrapped(note, colour="yellow", first="  ")
    if part.advice:
        lines.append(Line(text="  What follows:"))
    for number, advice in enumerate(part.advice, 1):
        lines += _advice_lines(number, advice)
    return lines


def headline(found: Diagnosis) -> str:
    """The class with the two numbers that decided it."""
    shares = found.shares
    memory = "memory -" if shares.memory is None else f"memory {format_percent(shares.memory)} of a copy"
    compute = "compute -" if shares.compute is None else f"compute {format_percent(shares.compute)} of a product"
    if found.limit is None:
        return f"not known: {' and '.join(found.missing) or 'nothing that decides'} missing ({memory}, {compute})"
    if found.limit in ("idle", "overhead-bound"):
        pause = "" if shares.pause_s is None else f", {format_value(shares.pause_s, 's', digits=2)} pause a launch"
        edge = IDLE_BELOW if found.limit == "idle" and shares.busy and shares.busy < IDLE_BELOW else BUSY_FROM
        busy = format_percent(shares.busy or 0.0)
        return f"{found.limit}, busy {busy} of the time (under {format_percent(edge)}){pause}"
    if found.limit == "communication-bound":
        talking = format_percent(shares.communication or 0.0)
        busy = "busy -" if shares.busy is None else f"busy {format_percent(shares.busy)} of all"
        return f"{found.limit}, {talking} of the busy time (from {format_percent(COMMUNICATION_FROM)} on); {busy}"
    first, second = (compute, memory) if found.limit == "compute-bound" else (memory, compute)
    bound = f" (both under {format_percent(BOUND_FROM)})" if found.limit == "latency-bound" else ""
    return f"{found.limit}, {first}, {second}{bound}"


def _next_text(near: Neighbour, found: Diagnosis) -> str:
    value = getattr(found.shares, near.axis)
    return (
        f"nearest: {near.limit}, {100 * near.distance:.0f} points away ({near.axis} {format_percent(value)}, "
        f"there {format_percent(near.value)})"
    )


def _rows(part: Part) -> Iterator[tuple[str, str]]:
    found, evidence = part.diagnosis, part.diagnosis.evidence
    if part.tokens_per_s is not None:
        yield "throughput", format_value(part.tokens_per_s, "tok/s")
    times = [f"p{percent} {format_value(percentile(part.times_s, percent), 's')}" for percent in (50, 95, 99)]
    yield "per iteration", f"{', '.join(times)} ({len(part.times_s):,})"
    if found.shares.busy is not None:
        yield "busy", _busy_text(found)
    if part.telemetry.memory_used_bytes is not None:
        yield "memory", f"{format_value(part.telemetry.memory_used_bytes, 'B')} in use"
    if found.bandwidth_bytes_per_s:
        moved = format_value(evidence.bytes_moved or 0.0, "B", digits=3)
        mbu = "" if found.mbu is None else f"MBU {format_percent(found.mbu)}, "
        yield "bandwidth", f"{format_value(found.bandwidth_bytes_per_s, 'B/s')} ({mbu}{moved} needed)"
    if found.flops_per_s:
        mfu = "" if found.mfu is None else f"MFU {format_percent(found.mfu)}, "
        work = format_value(evidence.flop or 0.0, "FLOP/s", digits=3).removesuffix("/s")
        yield "computation", f"{format_value(found.flops_per_s, 'FLOP/s')} ({mfu}{work} needed)"
    yield from _hardware_rows(part)


def _busy_text(found: Diagnosis) -> str:
    kernels = found.evidence.kernels
    text = f"{format_percent(found.shares.busy or 0.0)} of the time"
    if kernels is None:
        return text
    count = sum(one.count for one in (*kernels.kernels, *([kernels.rest] if kernels.rest else [])))
    graphs = f", {kernels.graph_launches:,.0f} graphs" if kernels.graph_launches else ""
    launches = f", {kernels.launches:,.0f} launches" if kernels.launches else ""  # a CPU has none
    return f"{text}, {count:,.0f} kernels{launches}{graphs}"


def _hardware_rows(part: Part) -> Iterator[tuple[str, str]]:
    activity, seen = part.diagnosis.evidence.activity, part.telemetry
    if activity is not None:
        names = {"SMs": "sm_share", "occupancy": "occupancy", "tensor": "tensor_share", "DRAM": "dram_share"}
        known = [(name, getattr(activity, field)) for name, field in names.items()]
        yield "counters", ", ".join(f"{name} {format_percent(value)}" for name, value in known if value is not None)
    if seen.sm_clock_mhz is not None:
        capped = "" if seen.power_cap_share is None else f", power-capped {format_percent(seen.power_cap_share)}"
        power = "" if seen.power_w is None else f", {seen.power_w:.0f} W"
        yield "clock", f"{seen.sm_clock_mhz:.0f} MHz{power}{capped}"
    if seen.other_process_pids:
        yield "others", f"pid {', '.join(map(str, seen.other_process_pids))} used the GPU: all numbers are of both"


def _advice_lines(number: int, advice: Recommendation) -> list[Line]:
    parts = textwrap.wrap(
        f"{number}. {advice}", _WIDTH, initial_indent="  ", subsequent_indent="     ", break_on_hyphens=False
    )
    return [Line(text=part, colour="green") for part in parts]


def _ceilings_text(ceilings: Ceilings) -> str:
    product = "-" if ceilings.flops_per_s is None else format_value(ceilings.flops_per_s, "FLOP/s")
    copy = "-" if ceilings.bandwidth_bytes_per_s is None else format_value(ceilings.bandwidth_bytes_per_s, "B/s")
    ridge = "" if ceilings.ridge is None else f", ridge at {ceilings.ridge:.0f} FLOP/B"
    origin = "measured just now" if ceilings.origin == "measured" else "data sheet x 0.8 and x 0.9"
    return f"Ceilings ({origin}): {ceilings.dtype} product {product}, copy {copy}{ridge}."


def _wrapped(text: str, *, colour: Colour | None = None, first: str = "") -> list[Line]:
    parts = textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=f"{first}  ", break_on_hyphens=False)
    return [Line(text=part, colour=colour) for part in parts]


# The plot


def check_plot(path: Path) -> None:
    """Make sure that a plot can be drawn, before any time is spent.

    Raises:
        UsageError: matplotlib is not installed, cannot draw such a file, or there is no such folder.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'pytest-gpuperf[report]'. Or leave --plot out.")
    if not path.parent.is_dir():
        raise UsageError(f"The plot cannot be written to {path}: there is no folder {path.parent}.")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UsageError(f"The plot cannot be written to {path}. It ends in one of: {', '.join(sorted(known))}.")


def save_plot(report: Report, path: Path) -> None:
    """Draw the roofline: measured and published roofs, the ridge, a point for each part, and its way to the roof.

    Args:
        report: Of which every part whose FLOP and bytes are known is a point.
        path: PNG, SVG or PDF to write, by its suffix.

    Raises:
        UsageError: matplotlib is not installed, there is no roof, or the file cannot be written.
    """
    check_plot(path)
    roof = report.ceilings
    if roof.ridge is None:
        raise UsageError("There is no roof to draw: FLOP/s or bandwidth of this device are not known.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    points = [(part, part.diagnosis.intensity) for part in report.parts]
    known = [(part, place) for part, place in points if place]
    low = min([roof.ridge / 300, *(place / 3 for _, place in known)])
    high = max([roof.ridge * 30, *(place * 3 for _, place in known)])
    _draw_roofs(axes, roof, low, high)
    for number, (part, place) in enumerate(known):
        _draw_point(axes, part, place, roof, _MARKERS[number % len(_MARKERS)], number)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("FLOP for each byte that the work needs")
    axes.set_ylabel("TFLOP/s")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    axes.set_title(f"{report.title}\n{report.device}", fontsize=10)
    try:
        figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")  # else a name without a suffix gets one
    except (OSError, ValueError) as error:
        raise UsageError(f"The plot cannot be written to {path}: {error}.") from None


def _draw_roofs(axes: "Axes", roof: Ceilings, low: float, high: float) -> None:
    drawn: list[tuple[float | None, float | None, str, str, str]] = [
        (roof.flops_per_s, roof.bandwidth_bytes_per_s, "-", "black", roof.origin)
    ]
    if roof.peak_flops_per_s and roof.peak_bandwidth_bytes_per_s:
        label = "data sheet" if roof.origin == "measured" else "data sheet, all of it"
        drawn.append((roof.peak_flops_per_s, roof.peak_bandwidth_bytes_per_s, "--", "grey", label))
    for flops, bandwidth, style, colour, label in drawn:
        if flops is None or bandwidth is None:
            continue
        ridge = flops / bandwidth
        places = [low, ridge, high]
        heights = [min(place * bandwidth, flops) / 1e12 for place in places]
        text = f"{label}: {format_value(flops, 'FLOP/s', digits=3)}, {format_value(bandwidth, 'B/s', digits=3)}"
        axes.plot(places, heights, linestyle=style, color=colour, label=text)
    if roof.ridge and roof.flops_per_s:
        axes.axvline(roof.ridge, color="black", linestyle=":", linewidth=0.8)
        axes.annotate(
            f"ridge {roof.ridge:.0f}",
            (roof.ridge, 0.5),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            rotation=90,
            ha="right",
        )


def _draw_point(axes: "Axes", part: Part, place: float, roof: Ceilings, marker: str, number: int) -> None:
    height = (part.diagnosis.flops_per_s or 0.0) / 1e12
    top = min(place * (roof.bandwidth_bytes_per_s or 0.0), roof.flops_per_s or 0.0) / 1e12
    colour = f"C{number}"
    share = height / top if top else 0.0
    label = f"{part.name}: {part.diagnosis.limit or 'not known'}, {format_percent(share)} of the roof"
    axes.plot([place, place], [height, top], color=colour, linewidth=1, linestyle=":")
    axes.plot([place], [height], marker=marker, markersize=9, linestyle="none", color=colour, label=label)
    axes.annotate(part.name, (place, height), xytext=(8, -3), textcoords="offset points", fontsize=9)
