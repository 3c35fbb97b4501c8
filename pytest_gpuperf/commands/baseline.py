"""`gpuperf baseline`: look at the baselines, and change them."""

from pathlib import Path
from typing import Annotated

import typer

from pytest_gpuperf import baseline_file, baseline_store
from pytest_gpuperf.commands.arguments import (
    DEFAULT_BASELINES,
    DEFAULT_RESULTS,
    GOOD,
    NOT_SETTLED,
    REGRESSION,
    BaselinesOption,
    ResultsOption,
    TestsArgument,
    chosen,
    echo,
    is_chosen,
    width,
)
from pytest_gpuperf.curves import means
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.priors import read_priors
from pytest_gpuperf.records import BaselineFile, MetricBaseline, Results, TestRecord
from pytest_gpuperf.report.controller import refusals, tally, unused_entries
from pytest_gpuperf.report.results import read_results
from pytest_gpuperf.report.terminal import baseline_command, notes, table
from pytest_gpuperf.run import judge_results
from pytest_gpuperf.stats import mean_of_known
from pytest_gpuperf.units import counted, format_value


def list_baselines(baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """List the baseline files: how many tests and metrics each holds, and from when."""
    paths = baseline_file.list_files(baselines_root)
    if not paths:
        typer.echo(f"No baselines in {baselines_root}. Run pytest, then: gpuperf baseline record")
    for path in paths:
        file = _read(path)
        metrics = [metric for test in file.tests.values() for metric in test.values()]
        dates = [session.date[:10] for metric in metrics for session in metric.sessions]
        gpus = {device for metric in metrics for session in metric.sessions for device in session.devices}
        most = max((len(metric.sessions) for metric in metrics), default=0)
        typer.echo(
            f"{path.relative_to(baselines_root)}: {counted(len(file.tests), 'test')}, "
            f"{counted(len(metrics), 'metric')}, up to {counted(most, 'session')} on {counted(len(gpus), 'device')}, "
            f"{min(dates, default='-')} to {max(dates, default='-')}"
        )


def show(tests: TestsArgument = None, baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """Show what is accepted for each metric: its value, its noise, its sessions."""
    shown = 0
    for path in baseline_file.list_files(baselines_root):
        file = _read(path)
        for test, metrics in file.tests.items():
            if not is_chosen(f"{file.module}::{test}", tests):
                continue
            said: dict[str, str] | None = None
            for metric, baseline in metrics.items():
                lines = _baseline_lines(path.parent.name, file, test, metric, baseline, said=said)
                typer.echo("\n".join(lines))
                said = baseline.configuration
                shown += 1
    if not shown:
        raise UsageError(f"No baseline of {' or '.join(tests) if tests else 'anything'} in {baselines_root}.")


def _baseline_lines(
    folder: str,
    file: BaselineFile,
    test: str,
    metric: str,
    baseline: MetricBaseline,
    *,
    said: dict[str, str] | None,
) -> list[str]:
    """A baseline in words; its configuration only where it is not that of the metric before."""
    lines = [f"{file.module}::{test} {metric} ({folder}; {baseline.method}; {baseline.better} is better)"]
    if baseline.reason:
        lines.append(f"  accepted: {baseline.reason}")
    if baseline.configuration and baseline.configuration != said:
        lines.append(f"  configuration: {', '.join(f'{name} {text}' for name, text in baseline.configuration.items())}")
    for session in baseline.sessions:
        values = ", ".join(format_value(run.value, baseline.unit) for run in session.runs)
        clock_mhz = mean_of_known(run.sm_clock_mhz for run in session.runs)
        clock = "" if clock_mhz is None else f", SM clock {clock_mhz:.0f} MHz"
        lines.append(f"  {session.date[:10]} {session.commit or '-'} on {'+'.join(session.devices)}: {values}{clock}")
    points = means(baseline.runs)
    if points:
        lines.append(
            "  by size: " + ", ".join(f"{size}: {format_value(points[size], baseline.unit)}" for size in points)
        )
    return lines


def diff(
    tests: TestsArgument = None,
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    results: ResultsOption = DEFAULT_RESULTS,
) -> int:
    """Compare the last run with the baselines as they are now. Exit code 2: a regression, 3: not settled."""
    found = read_results(results)
    records = _judged(found, tests, baselines_root)
    echo(
        [
            *table(records, width=width()),
            *notes(records, record_command=baseline_command("record", baselines_root.absolute(), results.absolute())),
        ]
    )
    verdicts = [verdict for record in records for verdict in record.verdicts]
    statuses = {v.status for v in verdicts if not (v.is_host_limited and v.status == "INCONCLUSIVE")}
    if "REGRESSED" in statuses:
        return REGRESSION
    return GOOD if statuses <= {"PASS", "IMPROVED"} else NOT_SETTLED


def record(
    tests: TestsArgument = None,
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    results: ResultsOption = DEFAULT_RESULTS,
) -> int:
    """Add the last run's values to the baselines. Values that changed are refused: accept them instead."""
    return _write(results, tests, baselines_root, None)


def accept(
    reason: Annotated[str, typer.Option("--reason", help="Why the values changed; kept with the baseline.")],
    tests: TestsArgument = None,
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    results: ResultsOption = DEFAULT_RESULTS,
) -> int:
    """Make the last run's changed values the new baselines: each starts a new epoch, with the reason."""
    if not reason.strip():
        raise UsageError("--reason is empty. Say why the values changed; the next reader will want to know.")
    return _write(results, tests, baselines_root, reason)


def prune(
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    results: ResultsOption = DEFAULT_RESULTS,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete baselines whose test or metric is gone, judged by a run of whole modules."""
    found = read_results(results)
    if found.end is None or not found.end.is_whole:
        raise UsageError(
            "The last run did not run whole modules to their end, so nothing is known to be gone. Run them."
        )
    deleted = 0
    for folder in sorted({record.slug for record in found.tests}):
        entries = unused_entries(baselines_root, folder, list(found.tests), set(found.end.tests))
        for key, metric in entries:
            typer.echo(f"{'would delete' if is_dry else 'deleted'} {key} {metric}")
        deleted += len(entries) if is_dry else baseline_store.prune(baselines_root, folder, entries)
    typer.echo(f"{deleted} unused baselines{' found' if is_dry else ' deleted'}.")


def learn(baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """Learn from the baselines how noisy each kind of metric is on each kind of device, for the judge to use."""
    from pytest_gpuperf.analysis.learning import keep, lessons
    from pytest_gpuperf.report.learning import lesson_lines

    found = lessons(baselines_root)
    if not found:
        raise UsageError(f"No baselines in {baselines_root}. Run pytest, then: gpuperf baseline record")
    for lesson in found:
        echo(lesson_lines(lesson, keep(baselines_root, lesson)))


def drift(tests: TestsArgument = None, baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """Compare the last sessions of every epoch with its first five: what many small steps add up to."""
    from pytest_gpuperf.analysis.drift import drifts
    from pytest_gpuperf.report.drift import drift_lines

    if not baseline_file.list_files(baselines_root):
        raise UsageError(f"No baselines in {baselines_root}. Run pytest, then: gpuperf baseline record")
    found = [each for each in drifts(baselines_root) if is_chosen(str(each.key), tests)]
    if tests and not found:
        raise UsageError(f"No baseline of {' or '.join(tests)} in {baselines_root} has more than 5 sessions.")
    echo(drift_lines(found))


def _write(results: Path, tests: list[str] | None, root: Path, reason: str | None) -> int:
    """Record or accept, judged against the baselines as they are now."""
    found = read_results(results)
    records = _judged(found, tests, root)
    changes = baseline_store.write(root, found.run, records, accept_reason=reason, profiles=found.profiles)
    typer.echo(f"Baselines in {root}: {tally(changes)}.")
    echo(refusals(changes, baseline_command("accept", root.absolute(), results.absolute())))
    return GOOD if all(change.action != "refused" for change in changes) else NOT_SETTLED


def _judged(found: Results, tests: list[str] | None, root: Path) -> list[TestRecord]:
    """The chosen tests with verdicts against the baselines as they are now."""
    return judge_results(found, chosen(found, tests), root, lambda folder: read_priors(root, folder))


def _read(path: Path) -> BaselineFile:
    file = baseline_file.read(path)
    if file is None:
        raise UsageError(f"{path} is gone.")
    return file
