"""What a user reads of `gpuperf baseline drift`: two or three lines a metric, the largest slowdown first."""

from collections.abc import Sequence

from pytest_gpuperf.analysis.drift import Drift
from pytest_gpuperf.judge import ENOUGH_SESSIONS, worse_and_better
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.units import format_percent, format_value


def drift_lines(drifts: Sequence[Drift]) -> list[Line]:
    """Say of each metric by how much it changed from when to when, and whether that is beyond the tolerance."""
    if not drifts:
        return [Line(text=f"No metric has more than {ENOUGH_SESSIONS} sessions, so no drift can show yet.")]
    lines = [line for drift in drifts for line in _lines(drift)]
    beyond = [drift for drift in drifts if _is_beyond(drift)]
    lines.append(
        Line(
            text=f"{len(beyond)} of {len(drifts)} metrics are slower by more than the usual tolerance of their kind.",
            colour="red" if beyond else None,
        )
    )
    return lines


def _lines(drift: Drift) -> list[Line]:
    name = Line(text=f"{drift.key} {drift.metric}")
    change = f"  {_change(drift)}, {drift.first_date[:10]} to {drift.last_date[:10]}"
    if _is_noise(drift):
        return [name, Line(text=f"{change}, may be noise")]
    colour: Colour = "red" if _is_beyond(drift) else "yellow" if drift.change > 0 else "cyan"
    mark = f", BEYOND {format_percent(drift.tolerance)}" if _is_beyond(drift) else ""
    values = f"{format_value(drift.first_value, drift.unit)} to {format_value(drift.last_value, drift.unit)}"
    where = Line(text=f"  {values} on {drift.slug}")
    return [name, Line(text=f"{change}{mark}", colour=colour), where]


def _is_noise(drift: Drift) -> bool:
    return drift.change_low <= 0 <= drift.change_high


def _is_beyond(drift: Drift) -> bool:
    return drift.change > drift.tolerance and not _is_noise(drift)


def _change(drift: Drift) -> str:
    low, change, high = drift.change_low, drift.change, drift.change_high
    word, better = worse_and_better(drift.unit)
    if change < 0:
        low, change, high, word = -high, -change, -low, better
    return f"{format_percent(change)} {word} ({format_percent(low)} to {format_percent(high)})"
