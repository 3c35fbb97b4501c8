"""What is said of this machine: `gpuperf specs`, `monitor` and `doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from pytest_gpuperf.commands.arguments import DEFAULT_BASELINES, ERROR, GOOD, BaselinesOption, echo, width
from pytest_gpuperf.machine import Machine


def specs(
    compare: Annotated[list[str] | None, typer.Option("--compare", help="GPUs of the table to compare.")] = None,
    is_full: Annotated[bool, typer.Option("--all", help="Every detail.")] = False,
) -> None:
    """Say what the GPUs of this machine are and can do, or compare GPUs of the table."""
    from rich.console import Console

    from pytest_gpuperf.report.specs import compare_table, specs_table

    if compare:
        Console().print(compare_table(compare))
        return
    machine = Machine("auto")
    nvml, gpus = machine.nvml, machine.gpus
    if nvml is None or not gpus:
        typer.echo(f"No GPU here: {machine.gpu_problem}")
        typer.echo("Compare GPUs with:  gpuperf specs --compare h100-sxm --compare l4")
        return
    infos = {info.uuid: info for info in nvml.gpus()}
    states = {gpu.uuid: nvml.state(gpu.uuid) for gpu in gpus}
    driver, cuda = nvml.driver_version(), nvml.cuda_version()
    Console().print(specs_table(gpus, infos, states, is_full, driver=driver, cuda=cuda))


def monitor(  # noqa: PLR0913 - each is an option of the command line
    command: Annotated[list[str] | None, typer.Argument(metavar="-- CMD", help="What to watch to its end.")] = None,
    *,
    interval: Annotated[float, typer.Option(help="Seconds from one reading to the next.")] = 1.0,
    gpus: Annotated[str | None, typer.Option(help="CUDA's numbers or UUIDs, such as 0,1; default: all.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds; default: until Ctrl-C.")] = None,
    output: Annotated[Path | None, typer.Option(help="New file for all samples: .csv, .jsonl or .parquet.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    is_live: Annotated[bool, typer.Option("--live", help="The view while a command runs, too.")] = False,
) -> int:
    """Show what the GPUs do, live, as lines or in a file; or watch a command, and sum up its whole life."""
    from pytest_gpuperf.report.watch_run import Plan
    from pytest_gpuperf.report.watch_run import monitor as run_monitor

    plan = Plan(
        interval_s=interval,
        gpus=gpus,
        duration_s=duration,
        output=output,
        is_json=is_json,
        is_live=is_live,
        command=tuple(command or ()),
    )
    return run_monitor(plan, Machine("auto"))


def doctor(
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the text.")] = False,
) -> int:
    """Check in ten seconds what here would spoil measurements, and say how to mend it. Exit code 1: a problem."""
    import time

    from pytest_gpuperf.analysis.doctor import findings
    from pytest_gpuperf.report.doctor import doctor_json, doctor_lines
    from pytest_gpuperf.trials.examine import examine

    begin_s = time.monotonic()
    facts = examine(baselines_root=baselines_root)
    found = findings(facts)
    if is_json:
        typer.echo(doctor_json(found, facts.pairs))
    else:
        echo(doctor_lines(found, facts.pairs, width=width(), time_s=time.monotonic() - begin_s))
    return ERROR if any(one.level == "problem" for one in found) else GOOD
