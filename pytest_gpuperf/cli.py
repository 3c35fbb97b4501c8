"""The `gpuperf` command. Exit codes: 0 good, 1 error, 2 regression, 3 not settled, 130 interrupted."""

import sys

import typer

from pytest_gpuperf.commands import baseline, history, host, models, results, trials
from pytest_gpuperf.commands.arguments import ERROR, GOOD, INTERRUPTED
from pytest_gpuperf.errors import GpuperfError

#: What click raises for a wrong command line; typer carries a copy of click, so the class is found through its own.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GPU performance tests one can trust.",
)
for _command in (
    results.compare,
    results.cost,
    host.specs,
    host.monitor,
    host.doctor,
    models.memory,
    models.diagnose,
    models.profile,
    models.tune,
    trials.selftest,
    trials.ab,
    trials.calibrate,
):
    app.command()(_command)

_baseline_app = typer.Typer(no_args_is_help=True, help="Look at the baselines, and change them.")
app.add_typer(_baseline_app, name="baseline")
_baseline_app.command("list")(baseline.list_baselines)
for _of_baseline in (
    baseline.show,
    baseline.diff,
    baseline.record,
    baseline.accept,
    baseline.prune,
    baseline.learn,
    baseline.drift,
):
    _baseline_app.command()(_of_baseline)

_history_app = typer.Typer(no_args_is_help=True, help="Keep every run, and find when a metric changed.")
app.add_typer(_history_app, name="history")
_history_app.command("add")(history.add)
_history_app.command("list")(history.list_series)
_history_app.command("show")(history.show)
_history_app.command("changes")(history.changes)


def main() -> None:
    """Run the command; a mistake is one message and exit code 1."""
    try:
        code = app(prog_name="gpuperf", standalone_mode=False)
    except _CommandLineError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "gpuperf"
        typer.echo(f"gpuperf: {_message_of(error).rstrip('.')}. Try: {command} --help", err=True)
        code = ERROR
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except GpuperfError as error:
        typer.echo(f"gpuperf: {error}", err=True)
        code = ERROR
    sys.exit(code or GOOD)


def _message_of(error: Exception) -> str:
    """What was wrong with the command line, and in which option."""
    if not str(error):
        return "No command was given."
    return str(error.format_message()) if isinstance(error, typer.BadParameter) else str(error)
