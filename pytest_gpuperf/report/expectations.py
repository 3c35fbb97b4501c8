"""What was published for the models of a run, below its table, where there is no baseline to compare with."""

import textwrap
from collections.abc import Sequence

from pytest_gpuperf.records import TestRecord
from pytest_gpuperf.report.terminal import Line

#: Metrics, or points of a curve, that are shown; more would push the verdicts out of sight.
_MOST = 6


def expectation_lines(records: Sequence[TestRecord], *, width: int = 80) -> list[Line]:
    """Place each metric without a baseline by what was published for its model on this kind of GPU.

    Args:
        records: Of a run.
        width: Of the terminal.
    """
    pairs = [(record, v.metric) for record in records for v in record.verdicts if v.status == "NEW"]
    measured = [(record, m) for record, metric in pairs for m in record.measurements if m.metric == metric]
    if not any(m.configuration and "model" in m.configuration for _, m in measured):
        return []  # and the figures are not read
    from pytest_gpuperf.analysis.expectations import in_words, place

    texts = [
        f"No baseline: {record.key.test} {text}"
        for record, m in measured
        for text in in_words(place(m, record.environment.hardware), m)
    ]
    shown = [part for text in texts[:_MOST] for part in textwrap.wrap(text, width, subsequent_indent="  ")]
    if len(texts) > _MOST:
        shown.append(f"Figures were published for {len(texts) - _MOST} more without a baseline: see docs/cost.md.")
    return [Line(text=text, colour="cyan") for text in shown]
