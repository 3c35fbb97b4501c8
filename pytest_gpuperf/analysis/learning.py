"""What the baselines of one kind of device teach about noise, and keeping it beside them for the judge."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from pytest_gpuperf import baseline_store
from pytest_gpuperf.baseline_file import list_files, read
from pytest_gpuperf.curves import baseline_at_shared_sizes
from pytest_gpuperf.priors import Level, Prior, PriorName, learn, package_priors, priors_path
from pytest_gpuperf.records import BaselineFile, MetricBaseline, Record
from pytest_gpuperf.stats import SessionLogs, level_squares

LevelName = Literal["within", "session", "device"]
LEVELS: tuple[LevelName, ...] = ("within", "session", "device")


class LearnedLevel(Record, frozen=True, kw_only=True):
    """One level of one kind of metric.

    Attributes:
        before: What the package says.
        now: What the baselines say; `before` where too few metrics show the level.
        metrics: How many metrics show it.
    """

    kind: PriorName
    level: LevelName
    before: Level
    now: Level
    metrics: int

    @property
    def is_learned(self) -> bool:
        """Whether enough metrics show it."""
        return self.now.origin != self.before.origin


class Lesson(Record, frozen=True, kw_only=True):
    """What one folder of baselines teaches.

    Attributes:
        slug: Name of the folder.
        metrics: How many it has.
        levels: Of every kind that the folder has metrics of.
        priors: What to keep: the kinds of which anything was learned.
    """

    slug: str
    metrics: int
    levels: tuple[LearnedLevel, ...]
    priors: dict[PriorName, Prior]


def lessons(root: Path) -> tuple[Lesson, ...]:
    """Learn from all baselines of each kind of device. The same baselines always teach the same.

    Args:
        root: Folder of all baselines.

    Raises:
        BaselineError: A file cannot be trusted.
    """
    files: dict[str, list[BaselineFile]] = {}
    for path in list_files(root):
        if file := read(path):
            files.setdefault(path.parent.name, []).append(file)
    return tuple(_lesson(root, slug, group) for slug, group in files.items() if any(file.tests for file in group))


def keep(root: Path, lesson: Lesson) -> Path | None:
    """Write what was learned where the judge looks for it; `None` if nothing was.

    Raises:
        BaselineError: The file cannot be locked or written.
    """
    if not lesson.priors:
        return None
    path = priors_path(root, lesson.slug)
    text = json.dumps(msgspec.to_builtins(lesson.priors), indent=2, sort_keys=True)
    baseline_store.write_file(root, path, f"{text}\n".encode())
    return path


def _lesson(root: Path, slug: str, files: Sequence[BaselineFile]) -> Lesson:
    baselines = [
        baseline_at_shared_sizes(metric)
        for file in files
        for metrics in file.tests.values()
        for metric in metrics.values()
    ]
    is_cpu = all(each.hardware.is_cpu for file in files for each in file.environments.values())
    groups: dict[PriorName, list[MetricBaseline]] = {}
    for baseline in baselines:
        groups.setdefault("cpu" if is_cpu else baseline.kind, []).append(baseline)
    levels: list[LearnedLevel] = []
    priors: dict[PriorName, Prior] = {}
    before = package_priors()
    for kind, group in sorted(groups.items()):
        origin = f"{len(group)} metrics of {root.resolve().name}/{slug}, {_newest(group)[:10]}"
        priors |= learn(group, before=before, is_cpu=is_cpu, origin=origin)
        levels += [_learned(kind, level, before[kind], priors[kind], group) for level in LEVELS]
    learned = {each.kind for each in levels if each.is_learned}
    kept = {kind: prior for kind, prior in priors.items() if kind in learned}
    return Lesson(slug=slug, metrics=len(baselines), levels=tuple(levels), priors=kept)


def _newest(baselines: Sequence[MetricBaseline]) -> str:
    return max(session.date for baseline in baselines for session in baseline.sessions)


def _learned(
    kind: PriorName, level: LevelName, before: Prior, now: Prior, baselines: Sequence[MetricBaseline]
) -> LearnedLevel:
    return LearnedLevel(
        kind=kind,
        level=level,
        before=getattr(before, level),
        now=getattr(now, level),
        metrics=sum(_shows(baseline, level) for baseline in baselines),
    )


def _shows(baseline: MetricBaseline, level: LevelName) -> bool:
    """Whether two runs of a visit, two visits to a device, or two devices show a difference."""
    squares = level_squares([SessionLogs.of(session, baseline.better) for session in baseline.sessions])
    variance = {"within": squares.within, "session": squares.session, "device": squares.device}[level]
    return variance.degrees_of_freedom > 0 and variance.value > 0
