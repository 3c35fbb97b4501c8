"""Runs of pytest in fresh processes: `gpuperf selftest`, `ab` and `calibrate`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pytest_gpuperf.commands.arguments import (
    DEFAULT_BASELINES,
    ERROR,
    GOOD,
    INTERRUPTED,
    NOT_SETTLED,
    REGRESSION,
    BaselinesOption,
    PytestArguments,
    echo,
    width,
)
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.priors import read_priors
from pytest_gpuperf.records import Verdict
from pytest_gpuperf.units import format_percent

if TYPE_CHECKING:
    from pytest_gpuperf.trials.calibrate import Process


def selftest(device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto") -> int:
    """Prove that the gate works here: the same code passes, planted slowdowns of 2, 5 and 10 % are caught or not."""
    from pytest_gpuperf.selftest import Outcome, is_proven
    from pytest_gpuperf.selftest import selftest as run_selftest

    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device {device} does not exist. Valid: auto, cuda, cpu.")
    with tempfile.TemporaryDirectory(prefix="gpuperf-selftest-") as folder:
        outcomes: list[Outcome] = run_selftest(Path(folder), device=device, report=lambda text: typer.echo(f"  {text}"))
    for test in outcomes[0].verdicts:
        typer.echo(test)
        for outcome in outcomes:
            name = f"{outcome.planted:.0%} more work" if outcome.planted else "the same code"
            verdict = outcome.verdicts.get(test)
            typer.echo(f"  {name:<15} {_outcome(verdict, outcome.planted) if verdict else 'was not measured'}")
    if is_proven(outcomes):
        typer.echo("Proven: the same code is not red, and 10 % more work is caught in every test.")
        return GOOD
    typer.echo("Not proven here: see the lines above. A noisy machine sees only what is larger than 'sees'.")
    return REGRESSION if any(v.status == "REGRESSED" for v in outcomes[0].verdicts.values()) else NOT_SETTLED


def _outcome(verdict: Verdict, planted: float) -> str:
    caught = "" if not planted else "caught: " if verdict.status == "REGRESSED" else "not caught: "
    change = "nothing compared" if verdict.change is None else f"measured {format_percent(verdict.change, signed=True)}"
    sees = verdict.minimum_detectable_effect
    return f"{caught}{verdict.status}, {change}" + (f", sees {format_percent(sees)}" if sees is not None else "")


def ab(  # noqa: PLR0913 - each is an option of the command line
    base: Annotated[str, typer.Argument(help="A python or venv, a git revision, a requirement, or . as it is.")],
    head: Annotated[str, typer.Argument(help="The same, for the other side.")],
    pytest_arguments: Annotated[list[str] | None, typer.Argument(help="After --: what pytest is to run.")] = None,
    *,
    pairs: Annotated[int, typer.Option(help="Most pairs of runs.")] = 7,
    warmup: Annotated[int, typer.Option(help="Runs of each side that do not count, at the beginning.")] = 1,
    budget: Annotated[float | None, typer.Option(help="Seconds: no pair is begun that would not end within.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a run is killed.")] = 1800.0,
    tolerance: Annotated[str | None, typer.Option(help="0.03 or 3%, instead of the tests' own.")] = None,
    keep: Annotated[Path | None, typer.Option(help="New folder for the results and outputs of all runs.")] = None,
) -> int:
    """Compare two sides in pairs of fresh processes on one GPU, where no baseline can be quiet enough."""
    from pytest_gpuperf.report.ab import header, report
    from pytest_gpuperf.trials.ab import Plan, check_plan, interrupted_by_sigterm, run_ab, tolerance_of, visible_gpus
    from pytest_gpuperf.trials.sides import made_sides, warnings_of

    plan = Plan(
        pytest_arguments=tuple(pytest_arguments or ()),
        pairs=pairs,
        warmup=warmup,
        budget_s=budget,
        run_limit_s=timeout,
        tolerance=tolerance_of(tolerance),
        keep=keep,
    )
    check_plan(plan)
    with (
        interrupted_by_sigterm(),
        made_sides(base, head, folder=Path.cwd(), pytest_arguments=plan.pytest_arguments) as (before, after),
    ):
        echo(header(before, after, width=width()))
        for warning in warnings_of(before, after):
            typer.secho(warning, fg="yellow")
        comparison = run_ab(before, after, plan, gpus=visible_gpus(), say=lambda text: typer.echo(text, err=True))
    echo(report(comparison, width=width()))
    codes = {"good": GOOD, "slower": REGRESSION, "undecided": NOT_SETTLED, "error": ERROR, "interrupted": INTERRUPTED}
    return codes[comparison.outcome]


def calibrate(
    arguments: PytestArguments = None,
    runs: Annotated[int, typer.Option("--runs", "-n", help="Processes to run.")] = 5,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Most seconds for one process.")] = 3600.0,
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
) -> int:
    """Run the suite in fresh processes: how noisy each metric is, what can be seen, which tolerance that supports."""
    from pytest_gpuperf.report.calibrate import process_lines
    from pytest_gpuperf.trials import calibrate as calibration

    if runs < calibration.FEWEST_RUNS or not timeout_s > 0:
        raise UsageError(f"-n {runs} --timeout {timeout_s:g}: need two runs or more, of more than 0 seconds each.")
    for path in baselines_root.glob("*/.priors.json"):  # before the GPU's time is spent
        read_priors(baselines_root, path.parent.name)
    processes: list[calibration.Process] = []
    with tempfile.TemporaryDirectory(prefix="gpuperf-calibrate-") as folder:
        try:
            for process in calibration.run_processes(arguments or [], Path(folder), count=runs, timeout_s=timeout_s):
                processes.append(process)
                echo(process_lines(process, runs, width=width()))
        except KeyboardInterrupt:
            typer.echo(f"Interrupted: this is what {len(processes)} of {runs} runs say.")
            _show_calibration(processes, baselines_root)
            raise
    return _show_calibration(processes, baselines_root)


def _show_calibration(processes: "list[Process]", root: Path) -> int:
    from pytest_gpuperf.report.calibrate import calibration_lines, legend_lines
    from pytest_gpuperf.trials import calibrate as calibration

    good = [process for process in processes if process.problem is None]
    if len(good) < calibration.FEWEST_RUNS:
        need = f"{calibration.FEWEST_RUNS} good runs are needed to know any noise"
        typer.echo(f"gpuperf: {need}, and {len(good)} of {len(processes)} were good.", err=True)
        return ERROR
    priors = {record.slug: read_priors(root, record.slug) for process in good for record in process.tests}
    found = calibration.calibrate(good, priors)
    echo([*calibration_lines(found, calibration.left_out(good)), *legend_lines(found)])
    return GOOD
