"""What a user reads of learning noise from baselines: a table of kinds and levels, and what stayed as it was."""

import textwrap
from pathlib import Path

from pytest_gpuperf.analysis.learning import LearnedLevel, Lesson
from pytest_gpuperf.report.terminal import Line
from pytest_gpuperf.units import format_percent


def lesson_lines(lesson: Lesson, path: Path | None) -> list[Line]:
    """One row a kind and level, in 80 columns.

    Args:
        lesson: What one folder teaches.
        path: Where it was written; `None` if nothing was learned.
    """
    lines = [
        Line(text=f"{lesson.slug}: {lesson.metrics} metrics"),
        Line(text=_row("kind", "level", "before", "now", "worth", "metrics")),
        *(_level_line(level) for level in lesson.levels),
    ]
    kept = [level for level in lesson.levels if not level.is_learned]
    if kept:
        names = ", ".join(f"{level.kind} {level.level}" for level in kept)
        text = f"Fewer than three metrics show these, so they stay as they were: {names}."
        lines += [Line(text=part) for part in textwrap.wrap(text, 80)]
    if path is None:
        lines.append(Line(text="Nothing was learned, and nothing written.", colour="yellow"))
    else:
        lines.append(Line(text=f"Written to {path}."))
        lines.append(Line(text="Commit it: from now on verdicts are given with these figures."))
    return lines


def _level_line(level: LearnedLevel) -> Line:
    now = format_percent(level.now.deviation) if level.is_learned else "="
    row = _row(
        level.kind,
        level.level,
        format_percent(level.before.deviation),
        now,
        f"{level.now.worth:g}",
        str(level.metrics),
    )
    return Line(text=row, colour="cyan" if level.is_learned else None)


def _row(*cells: str) -> str:
    kind, level, before, now, worth, metrics = cells
    return f"  {kind:<12} {level:<8} {before:>8} {now:>8} {worth:>6} {metrics:>8}"
