"""What a user reads of a calibration: a line for each process, a table of the metrics, and what it cannot know."""

from collections.abc import Sequence

from pytest_gpuperf.analysis.prospects import TOLERANCES
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.trials.calibrate import FEWEST_RUNS, ROOMY, Calibration, Process
from pytest_gpuperf.units import counted, format_percent, format_value

_COLOURS: dict[str | None, Colour] = {"fine": "green", "too tight": "red", "could be tighter": "cyan"}
_MOST_LEFT_OUT, _MOST_TAIL_LINES = 5, 5


def process_lines(process: Process, count: int, *, width: int) -> list[Line]:
    """Say how a process ended: what it measured, or why it does not count and the last of what it printed.

    Args:
        process: The one that ended.
        count: How many were asked for.
        width: Columns of the terminal.
    """
    begin = f"run {process.number} of {count}: "
    if process.problem is None:
        metrics = sum(len(record.measurements) for record in process.tests)
        return [Line(text=f"{begin}{counted(metrics, 'metric')}, {process.duration_s:.0f} s")]
    said = [text for text in process.tail.splitlines() if text.strip()][-_MOST_TAIL_LINES:]
    return [
        Line(text=f"{begin}{process.problem}; it does not count", colour="yellow"),
        *(Line(text=_fitted(f"  | {text}", width)) for text in said),
    ]


def calibration_lines(calibrations: Sequence[Calibration], left_out: Sequence[str]) -> list[Line]:
    """The table: two lines a metric, which fit into 80 columns.

    Args:
        calibrations: In the order of the run.
        left_out: Values that do not count, and why.
    """
    most = max((each.runs for each in calibrations), default=0)
    lines = [Line(text=_row("value", "within", "between (95 %)", "sees", "of 3", "supports", "tolerance"))]
    for calibration in calibrations:
        few = f" (in {counted(calibration.runs, 'run')} of {most})" if calibration.runs < most else ""
        lines.append(Line(text=f"{calibration.key} {calibration.metric}{few}"))
        lines.append(_metric_line(calibration))
    lines += [Line(text=f"left out: {reason}", colour="yellow") for reason in left_out[:_MOST_LEFT_OUT]]
    if len(left_out) > _MOST_LEFT_OUT:
        lines.append(Line(text=f"left out: {len(left_out) - _MOST_LEFT_OUT} more", colour="yellow"))
    return lines


def legend_lines(calibrations: Sequence[Calibration]) -> list[Line]:
    """Say what the columns are, and what one visit to one machine cannot tell."""
    texts = [
        "",
        "All but the value in %. within: half the 95 % interval of one run. between:",
        "standard deviation from run to run. sees, of 3: smallest slowdown that one run",
        "and three runs tell from noise. supports: smallest tolerance with which",
        "unchanged code passes at its first run 95 times in 100, and code that is slower",
        f"by twice as much is caught. could be tighter: {ROOMY:g} times that, or more.",
        "Not known from here: how much visits to the machine and GPUs differ. For visits",
        "the usual figures are counted in; a GPU without a session of its own sees less.",
        "Record sessions on several days and GPUs, then: gpuperf baseline learn",
    ]
    if any(each.devices > 1 for each in calibrations):
        texts.append("The runs were on different GPUs: what these differ by is not part of the noise.")
    if any(each.between is None for each in calibrations):
        texts.append(f"-: no {FEWEST_RUNS} runs on the same device measured it, so its noise is not known.")
    return [Line(text=text) for text in texts]


def _row(*cells: str) -> str:
    value, within, between, sees, confirmed, supports, tolerance = cells
    row = f"{value:>14} {within:>6} {between:>16} {sees:>5} {confirmed:>5} {supports:>8}  {tolerance}"
    return row.rstrip()


def _metric_line(calibration: Calibration) -> Line:
    between = "-"
    if calibration.between is not None:
        low, high = _percent(calibration.between_low), _percent(calibration.between_high)
        between = f"{_percent(calibration.between)} ({low}-{high})"
    largest = f">{_percent(TOLERANCES[-1])}"
    supports = largest if calibration.supported is None else _percent(calibration.supported)
    row = _row(
        format_value(calibration.value, calibration.unit),
        _percent(calibration.within),
        between,
        _percent(calibration.sees_once),
        _percent(calibration.sees_confirmed),
        "-" if calibration.between is None else supports,
        f"{_percent(calibration.tolerance)} {calibration.advice or ''}",
    )
    return Line(text=row, colour=_COLOURS.get(calibration.advice))


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else format_percent(fraction).removesuffix(" %")


def _fitted(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
