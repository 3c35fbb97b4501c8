"""What `gpuperf monitor` shows: a live view of 80 columns, a line a sample, JSON, and the summary of it all."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import msgspec

from pytest_gpuperf.trials.watch import Sample, Summary
from pytest_gpuperf.units import format_percent, format_value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: The view is drawn anew at most this often, however often GPUs are read.
REDRAW_EVERY_S = 0.25
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_STYLES = {
    **dict.fromkeys(("lost", "error"), "bold red"),
    **dict.fromkeys(("braked", "hot", "throttled", "other process"), "bold yellow"),
    **dict.fromkeys(("idle", "unknown"), "dim"),
}
#: Title and width of the columns; `_cells` fills them.
_COLUMNS = (
    ("GPU", 3), ("busy", 5), ("SM", 5), ("tensor", 7), ("DRAM", 5), ("memory GB", 12), ("power W", 10), ("C", 4),
    ("MHz", 5), ("NVLink", 8), ("PCIe", 8),
)  # fmt: skip
#: Of a view that has no room for two lines a GPU: the links give way to the status.
_COMPACT = 9


class View:
    """The live view of a terminal, while the body of a `with` statement runs.

    Args:
        console: Where it is drawn.
        interval_s: For the heading.
        clock: Seconds from any start.
    """

    def __init__(self, console: "Console", *, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self._console, self._interval_s, self._clock = console, interval_s, clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_s = -math.inf
        self._shown: dict[str, Sample] = {}
        self._history: dict[str, deque[Sample]] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, samples: Sequence[Sample]) -> None:
        """Take new samples, and draw if the last time is long enough ago."""
        self._shown = {sample.uuid: _with_activity(sample, self._shown.get(sample.uuid)) for sample in samples}
        if self._clock() - self._drawn_s < REDRAW_EVERY_S:
            return
        self._drawn_s = self._clock()
        for sample in samples:
            self._history.setdefault(sample.uuid, deque(maxlen=60)).append(sample)
        options = self._console.options
        text = view_text(
            list(self._shown.values()),
            self._history,
            interval_s=self._interval_s,
            width=options.max_width,
            height=options.size.height,
            is_ascii=options.ascii_only,
        )
        self._live.update(text, refresh=True)


def _with_activity(sample: Sample, before: Sample | None) -> Sample:
    """Each mean is given once; the view shows the last one until the next."""
    if before is None or sample.activity_s is not None or sample.error:
        return sample
    names = Sample.__struct_fields__
    kept = names[names.index("activity_s") : names.index("xids")]
    return msgspec.structs.replace(sample, **{name: getattr(before, name) for name in kept})


def view_text(
    samples: Sequence[Sample],
    history: Mapping[str, Sequence[Sample]],
    *,
    interval_s: float,
    width: int = 80,
    height: int = 24,
    is_ascii: bool = False,
) -> "Text":
    """Draw the view: a heading, and two lines a GPU; one, where the terminal is too low for two.

    Args:
        samples: One a GPU.
        history: Earlier samples by UUID, the oldest first.
        is_ascii: The terminal knows no other characters.
    """
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    text.append(_cut(_heading(samples, interval_s), width, is_ascii=is_ascii) + "\n", style="bold")
    is_compact = 2 * len(samples) + 3 > height
    columns = _COLUMNS[:_COMPACT] if is_compact else _COLUMNS
    titles = _row([title for title, _ in columns]) + ("  status" if is_compact else " GB/s")
    text.append(titles[:width] + "\n", style="dim")
    for sample in samples:
        style = _STYLES.get(sample.status, "")
        line = _row(_cells(sample)[: len(columns)])
        status = f"{sample.status}: {sample.reason}"
        if is_compact:
            text.append(line)
            text.append(_cut(f"  {status}", width - len(line), is_ascii=is_ascii) + "\n", style=style)
            continue
        text.append(line + "\n")
        lines = _sparks(history.get(sample.uuid, ()), width=(width - 56) // 2, is_ascii=is_ascii)
        text.append(lines)
        text.append(_cut(status, width - len(lines), is_ascii=is_ascii) + "\n", style=style)
    return text


def _heading(samples: Sequence[Sample], interval_s: float) -> str:
    names = [sample.name for sample in samples]
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    seconds = int(max((sample.time_s for sample in samples), default=0.0))
    passed = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{kinds}  every {interval_s:g} s  {passed}  Ctrl-C ends"


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=False))


def _cells(sample: Sample) -> list[str]:
    return [
        str(sample.gpu),
        *(_share(share) for share in (sample.busy_share, sample.sm_share, sample.tensor_share, sample.dram_share)),
        _of(_scaled(sample.memory_used_bytes, 1e-9), _scaled(sample.memory_bytes, 1e-9), decimals=1),
        _of(sample.power_w, sample.power_limit_w),
        _number(sample.temperature_c),
        _number(sample.sm_clock_mhz),
        _flow(sample.nvlink_rx_bytes_per_s, sample.nvlink_tx_bytes_per_s),
        _flow(sample.pcie_rx_bytes_per_s, sample.pcie_tx_bytes_per_s),
    ]


def _sparks(history: Sequence[Sample], *, width: int, is_ascii: bool) -> str:
    width = min(max(width, 6), 40)
    powers = [sample.power_w for sample in history]
    limit_w = history[-1].power_limit_w if history else None
    most_w = limit_w or max((power for power in powers if power is not None), default=0.0)
    busy = sparkline([sample.busy_share for sample in history], most=1.0, width=width, is_ascii=is_ascii)
    return f" busy {busy} W {sparkline(powers, most=most_w, width=width, is_ascii=is_ascii)}  "


def sparkline(values: Sequence[float | None], *, most: float, width: int, is_ascii: bool = False) -> str:
    """Draw the last values as blocks of eight heights, the newest at the right; what is not known is a gap.

    >>> sparkline([0.0, 0.5, None, 1.0], most=1.0, width=6)
    '  ▁▅ █'
    """
    blocks = _ASCII_BLOCKS if is_ascii else _BLOCKS
    last = values[-width:]

    def block(value: float | None) -> str:
        if value is None or most <= 0:
            return " "
        return blocks[min(max(round(value / most * 8 - 0.01), 0), 7)]

    return "".join(block(value) for value in last).rjust(width)


def sample_line(sample: Sample) -> str:
    """One sample in a line, for a pipe: what is not known is left out."""
    _, busy, sm_share, tensor, dram, memory, power, temperature, clock, nvlink, pcie = _cells(sample)
    parts = (
        ("busy", busy, ""), ("SM", sm_share, ""), ("tensor", tensor, ""), ("DRAM", dram, ""), ("memory", memory, " GB"),
        ("power", power, " W"), ("at", temperature, " C"), ("clock", clock, " MHz"), ("NVLink", nvlink, " GB/s"),
        ("PCIe", pcie, " GB/s"),
    )  # fmt: skip
    known = [f"{name} {text}{unit}" for name, text, unit in parts if not text.startswith("-")]
    return f"{sample.date} GPU {sample.gpu}: {', '.join([*known, f'{sample.status} ({sample.reason})'])}"


def summary_lines(summary: Summary) -> list[str]:
    """Say what a GPU did over the whole time, 80 columns."""
    duration = format_value(summary.duration_s, "s", digits=3)
    watts = [_number(value) for value in (summary.mean_power_w, summary.peak_power_w, summary.power_limit_w)]
    clocks = [_number(value) for value in (summary.mean_sm_clock_mhz, summary.lowest_sm_clock_mhz)]
    memory = f"{_bytes(summary.peak_memory_used_bytes)} peak of {_bytes(summary.memory_bytes)}"
    lines = [
        f"GPU {summary.gpu} {summary.name}: {duration}, {summary.samples} samples",
        f"  busy {_percent(summary.busy_share)}, idle {_percent(summary.idle_share)}{_activity_words(summary)}",
        f"  energy {_energy(summary)}, power {watts[0]} W mean, {watts[1]} W peak, {watts[2]} W limit",
        f"  memory {memory}, {_number(summary.peak_temperature_c)} C at most",
        f"  SM clock at work {clocks[0]} MHz mean, {clocks[1]} MHz lowest",
        f"  clock held down: {_holds_words(summary)}",
    ]
    if summary.other_process_pids:
        lines.append(f"  other processes: pid {', '.join(map(str, summary.other_process_pids))}")
    return lines + [f"  error: {error}" for error in summary.errors]


def _activity_words(summary: Summary) -> str:
    shares = (("SM", summary.sm_share), ("tensor", summary.tensor_share), ("DRAM", summary.dram_share))
    known = [f"{name} {format_percent(share)}" for name, share in shares if share is not None]
    return f"; {', '.join(known)}" if known else ""


def _energy(summary: Summary) -> str:
    if summary.energy_j is not None:
        return format_value(summary.energy_j, "J")
    return "not known" if summary.duration_s >= 5 else "not known (under 5 s)"


def _holds_words(summary: Summary) -> str:
    shares = {
        "power cap": summary.power_cap_share,
        "sync boost": summary.sync_boost_share,
        "heat (driver)": summary.sw_thermal_share,
        "heat (hardware)": summary.hw_thermal_share,
        "power brake": summary.power_brake_share,
    }
    if all(share is None for share in shares.values()):
        return "not known"
    return ", ".join(f"{name} {format_percent(share)}" for name, share in shares.items() if share) or "never"


def _cut(text: str, width: int, *, is_ascii: bool) -> str:
    end = "..." if is_ascii else "…"
    return text if len(text) <= width else text[: max(width - len(end), 0)] + end


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f}%"


def _percent(share: float | None) -> str:
    return "-" if share is None else format_percent(share)


def _number(value: float | None, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _of(value: float | None, most: float | None, *, decimals: int = 0) -> str:
    return "-" if value is None else f"{value:.{decimals}f}/{_number(most, decimals)}"


def _flow(into: float | None, out_of: float | None) -> str:
    """GB/s into the GPU and out of it."""
    parts = [_scaled(one, 1e-9) for one in (into, out_of)]
    return "-" if None in parts else "/".join(_number(one, 0 if one and one >= 9.95 else 1) for one in parts)


def _bytes(value: int | None) -> str:
    return "-" if value is None else format_value(value, "B")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
