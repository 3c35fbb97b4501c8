"""What `gpuperf ab` prints: what the two sides are, a table of 80 columns, and what the table cannot say."""

import textwrap
from collections.abc import Sequence

from pytest_gpuperf.environment import version_differences
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.trials.ab import Comparison
from pytest_gpuperf.trials.paired import Decision, Metric, Paired
from pytest_gpuperf.trials.sides import Side
from pytest_gpuperf.units import counted, format_percent, format_value

_COLOURS: dict[Decision, Colour] = {
    "SLOWER": "red",
    "FASTER": "cyan",
    "SAME": "green",
    "NOT SLOWER": "green",
    "UNDECIDED": "yellow",
}
_ENDINGS = {
    "decided": "everything is decided",
    "pairs": "all pairs were run",
    "budget": "the budget is spent",
    "interrupted": "interrupted",
    "failed": "given up",
}
#: Names of a kind, such as dropped pairs, that are listed one by one.
_MOST_NAMED = 8


def header(base: Side, head: Side, *, width: int = 80) -> list[Line]:
    """What the two sides are."""
    return [
        Line(text=textwrap.fill(f"{side.label}  {side.description}", width, subsequent_indent="      "))
        for side in (base, head)
    ]


def report(comparison: Comparison, *, width: int = 80) -> list[Line]:
    """The result: differing versions, table, tally, and what was lost, dropped or measured on one side only."""
    return [
        *_environment_lines(comparison),
        *_table(comparison.metrics, width),
        *_tally(comparison),
        *_notes(comparison),
        *([Line(text=comparison.problem, colour="red")] if comparison.problem else []),
    ]


def _environment_lines(comparison: Comparison) -> list[Line]:
    base, head = comparison.base, comparison.head
    if base is None or head is None:
        return []
    differences = version_differences(head.versions, base.versions)
    return [
        Line(text=f"on {head.hardware.name}"),
        Line(text=f"versions that differ: {'; '.join(differences) or 'none that is recorded'}"),
    ]


def _table(metrics: Sequence[Metric], width: int) -> list[Line]:
    """One row a metric, grouped by test function; change: + is worse, with half its 95 % interval."""
    shown = [metric for metric in metrics if metric.only_in is None]
    if not shown:
        return []
    name_width = min(max(12, *(len(_label(metric)) for metric in shown)), max(width - 61, 11))  # 61: the other columns
    lines = [Line(text=_row(name_width, "", "BASE", "HEAD", "change", "pairs", "decision"))]
    function = ""
    for metric in shown:
        if function != (function := f"{metric.key.module}::{metric.key.test.partition('[')[0]}"):
            lines.append(Line(text=function))
        label = _label(metric)
        if len(label) > name_width:  # cut, two names could look the same
            lines.append(Line(text=f" {label}"))
            label = ""
        lines.append(_metric_row(label, name_width, metric))
    return lines


def _metric_row(label: str, name_width: int, metric: Metric) -> Line:
    if metric.paired is None or metric.base_value is None or metric.head_value is None:
        text = _row(name_width, label, "-", "-", "-", "0", "UNDECIDED")
        return Line(text=text, colour=_COLOURS["UNDECIDED"])
    values = [format_value(value, metric.unit) for value in (metric.base_value, metric.head_value)]
    text = _row(name_width, label, *values, _change(metric.paired), str(metric.paired.pairs), metric.paired.decision)
    return Line(text=text, colour=_COLOURS[metric.paired.decision])


def _row(name_width: int, *cells: str) -> str:
    name, base, head, change, pairs, decision = cells
    return f" {name:<{name_width}} {base:>13} {head:>13} {change:>13} {pairs:>5}  {decision}".rstrip()


def _label(metric: Metric) -> str:
    parameters = metric.key.test.partition("[")[2].removesuffix("]")
    return f"{parameters} {metric.metric}".strip()


def _change(paired: Paired) -> str:
    half = (paired.change_high - paired.change_low) / 2
    decimals = 2 if half < 0.001 else 1 if half < 0.1 else 0
    return f"{paired.change * 100:+z.{decimals}f} ±{half * 100:.{decimals}f} %"


def _tally(comparison: Comparison) -> list[Line]:
    shown = [metric for metric in comparison.metrics if metric.only_in is None]
    decisions = [metric.paired.decision if metric.paired else "UNDECIDED" for metric in shown]
    counts = ", ".join(f"{decisions.count(each)} {each}" for each in _COLOURS if each in decisions)
    run = f"{counted(comparison.pairs, 'pair')} in {comparison.duration_s:.0f} s"
    ending = _ENDINGS[comparison.ending]
    if not decisions:
        return [Line(text=f"Nothing was compared: {run}, {ending}.", colour="yellow")]
    lines = [Line(text=f"{counts} after {run}: {ending}.")]
    open_metrics = [metric for metric in shown if metric.paired is None or metric.paired.decision == "UNDECIDED"]
    if open_metrics:
        lines.append(Line(text=_remedy(open_metrics), colour="yellow"))
    return lines


def _remedy(undecided: Sequence[Metric]) -> str:
    """What would settle what is open."""
    seen = [metric.paired.minimum_detectable_effect for metric in undecided if metric.paired]
    sees = f" (these pairs see {format_percent(max(seen))} at best)" if seen else ""
    allowed = " and ".join(format_percent(one) for one in sorted({metric.tolerance for metric in undecided}))
    return f"UNDECIDED at a tolerance of {allowed}{sees}: more pairs (--pairs) may settle it, or a wider --tolerance."


def _notes(comparison: Comparison) -> list[Line]:
    texts = [f"lost: {text}" for text in comparison.lost]
    for metric in comparison.metrics:
        name = f"{metric.key} {metric.metric}"
        if metric.only_in:
            texts.append(f"only in {metric.only_in}: {name} ({metric.why_only})")
        elif metric.dropped:
            texts.append(f"dropped {counted(len(metric.dropped), 'pair')} of {name}: {metric.dropped[0]}")
    more = [f"and {len(texts) - _MOST_NAMED} more notes"] if len(texts) > _MOST_NAMED else []
    return [Line(text=text, colour="yellow") for text in [*texts[:_MOST_NAMED], *more]]
