"""The `gpuperf` command: one function a command. Exit codes: 0 good, 1 error, 2 regression, 3 not settled."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pytest_gpuperf import baseline_file, baseline_store
from pytest_gpuperf.curves import means
from pytest_gpuperf.errors import GpuperfError, UsageError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.priors import read_priors
from pytest_gpuperf.records import BaselineFile, MetricBaseline, Results, TestRecord, Verdict
from pytest_gpuperf.report.controller import refusals, tally, unused_entries
from pytest_gpuperf.report.results import read_results
from pytest_gpuperf.report.terminal import Line, baseline_command, notes, table
from pytest_gpuperf.run import judge_results
from pytest_gpuperf.units import format_percent, format_value

if TYPE_CHECKING:
    from pytest_gpuperf.trials.calibrate import Process
    from pytest_gpuperf.trials.diagnose import Wanted as WantedDiagnosis
    from pytest_gpuperf.trials.tune_bench import Wanted

GOOD, ERROR, REGRESSION, NOT_SETTLED = 0, 1, 2, 3

#: What click raises for a wrong command line; typer carries a copy of click, so the class is found through its own.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GPU performance tests one can trust.",
)
baseline_app = typer.Typer(no_args_is_help=True, help="Look at the baselines, and change them.")
app.add_typer(baseline_app, name="baseline")
history_app = typer.Typer(no_args_is_help=True, help="Keep every run, and find when a metric changed.")
app.add_typer(history_app, name="history")

BaselinesOption = Annotated[Path, typer.Option("--baselines", help="Folder of the baselines.")]
ResultsOption = Annotated[Path, typer.Option("--results", help="Results of a run of pytest.")]
TestsArgument = Annotated[
    list[str] | None, typer.Argument(help="Full ids, modules, functions, or parts of a test's own name; default: all.")
]
PytestArguments = Annotated[list[str] | None, typer.Argument(metavar="-- PYTEST_ARGS", help="Arguments of pytest.")]
StoreOption = Annotated[str, typer.Option("--store", envvar="GPUPERF_HISTORY", help="Path or URL of the history.")]
FactorOption = Annotated[
    list[str] | None,
    typer.Option(
        help="What to vary, more than once: precision, max-num-seqs, max-num-batched-tokens, gpu-memory-utilization "
        "(not on a CPU); default: all."
    ),
]
DEFAULT_BASELINES = Path("baselines")
DEFAULT_RESULTS = Path(".gpuperf/results.jsonl")
DEFAULT_STORE = ".gpuperf/history.sqlite"


def main() -> None:
    """Run the command; a mistake is one message and exit code 1."""
    try:
        code = app(standalone_mode=False)
    except _CommandLineError as error:
        message = _message_of(error)
        typer.echo(f"gpuperf: {message.rstrip('.')}. Try: gpuperf --help", err=True)
        code = ERROR
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except GpuperfError as error:
        typer.echo(f"gpuperf: {error}", err=True)
        code = ERROR
    sys.exit(code or GOOD)


def _message_of(error: Exception) -> str:
    """What was wrong with the command line, and in which option."""
    if not str(error):
        return "No command was given."
    return str(error.format_message()) if isinstance(error, typer.BadParameter) else str(error)


@baseline_app.command("list")
def list_baselines(baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """List the baseline files: how many tests and metrics each holds, and from when."""
    paths = baseline_file.list_files(baselines_root)
    if not paths:
        typer.echo(f"No baselines in {baselines_root}. Run pytest, then: gpuperf baseline record")
    for path in paths:
        file = _read(path)
        metrics = [metric for test in file.tests.values() for metric in test.values()]
        dates = [session.date[:10] for metric in metrics for session in metric.sessions]
        gpus = {session.devices for metric in metrics for session in metric.sessions}
        most = max((len(metric.sessions) for metric in metrics), default=0)
        typer.echo(
            f"{path.relative_to(baselines_root)}: {len(file.tests)} tests, {len(metrics)} metrics, "
            f"up to {most} sessions on {len(gpus)} device(s), {min(dates, default='-')} to {max(dates, default='-')}"
        )


@baseline_app.command()
def show(tests: TestsArgument = None, baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """Show what is accepted for each metric: its value, its noise, its sessions."""
    shown = 0
    for path in baseline_file.list_files(baselines_root):
        file = _read(path)
        for test, metrics in file.tests.items():
            if not _is_chosen(f"{file.module}::{test}", tests):
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
        clocks = [run.sm_clock_mhz for run in session.runs if run.sm_clock_mhz is not None]
        clock = f", SM clock {sum(clocks) / len(clocks):.0f} MHz" if clocks else ""
        lines.append(f"  {session.date[:10]} {session.commit or '-'} on {'+'.join(session.devices)}: {values}{clock}")
    points = means([run for session in baseline.sessions for run in session.runs])
    if points:
        lines.append(
            "  by size: " + ", ".join(f"{size}: {format_value(points[size], baseline.unit)}" for size in points)
        )
    return lines


@baseline_app.command()
def diff(
    tests: TestsArgument = None,
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    results: ResultsOption = DEFAULT_RESULTS,
) -> int:
    """Compare the last run with the baselines as they are now. Exit code 2: a regression, 3: not settled."""
    found = read_results(results)
    records = _judged(found, tests, baselines_root)
    _echo(
        [
            *table(records, width=_width()),
            *notes(records, record_command=baseline_command("record", baselines_root.absolute(), results.absolute())),
        ]
    )
    verdicts = [verdict for record in records for verdict in record.verdicts]
    statuses = {v.status for v in verdicts if not (v.is_host_limited and v.status == "INCONCLUSIVE")}
    if "REGRESSED" in statuses:
        return REGRESSION
    return GOOD if statuses <= {"PASS", "IMPROVED"} else NOT_SETTLED


@baseline_app.command()
def record(
    tests: TestsArgument = None,
    baselines_root: BaselinesOption = DEFAULT_BASELINES,
    results: ResultsOption = DEFAULT_RESULTS,
) -> int:
    """Add the last run's values to the baselines. Values that changed are refused: accept them instead."""
    return _write(results, tests, baselines_root, None)


@baseline_app.command()
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


@baseline_app.command()
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


@history_app.command("add")
def history_add(
    results: Annotated[list[Path], typer.Argument(help="Results of runs of pytest.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Add runs to the history, the oldest first. A run that is there already is not added again."""
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.report.history import add_run

    place = place_of(store)
    for run in sorted((read_results(path) for path in results), key=lambda found: found.run.date):
        _echo(add_run(place, run))


@history_app.command("list")
def history_list(tests: TestsArgument = None, store: StoreOption = DEFAULT_STORE) -> None:
    """List the metrics of the history: how many runs, from when to when, the last value."""
    from pytest_gpuperf.analysis.history import open_history
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.report.history import chosen, list_lines

    place = place_of(store)
    with open_history(place) as history:
        _echo(list_lines(chosen(history.summaries(), lambda test: _is_chosen(test, tests), place)))


@history_app.command("show")
def history_show(
    test: Annotated[str, typer.Argument(help="Full id, module, function, or a part of the test's own name.")],
    metric: Annotated[str | None, typer.Argument(help="Default: all of the test.")] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Show every value of a metric: date, commit, value, verdict."""
    from pytest_gpuperf.analysis.history import open_history
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.report.history import chosen, show_lines

    place = place_of(store)
    with open_history(place) as history:
        summaries = [one for one in history.summaries() if metric in (None, one.series.metric)]
        for summary in chosen(summaries, lambda name: _is_chosen(name, [test]), place):
            _echo(show_lines(summary.series, history.points(summary.series)))


@history_app.command("changes")
def history_changes(
    tests: TestsArgument = None,
    store: StoreOption = DEFAULT_STORE,
    by_date: Annotated[bool, typer.Option("--by-date", help="Order runs by date, not as they were added.")] = False,
) -> None:
    """Say when metrics stepped from one level to another: date, commits, by how much, with an interval."""
    from pytest_gpuperf.analysis.history import open_history
    from pytest_gpuperf.analysis.history_file import place_of
    from pytest_gpuperf.analysis.levels import levels
    from pytest_gpuperf.report.history import change_lines, chosen

    place = place_of(store)
    with open_history(place) as history:
        found = chosen(history.summaries(), lambda test: _is_chosen(test, tests), place)
        _echo(change_lines([levels(one.series, history.points(one.series), by_date=by_date) for one in found]))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Results of a run of pytest, to compare with.")],
    b: Annotated[Path, typer.Argument(help="Results of another run.")],
    across: Annotated[bool, typer.Option("--across", help="Only how much better B is, whatever each ran on.")] = False,
    pair: Annotated[
        list[str] | None, typer.Option(help="A's tests with one parameter, B's with another: llama-3-8b=qwen2.5-7b.")
    ] = None,
) -> int:
    """Compare two results files, with intervals. Exit code 2: something got slower, 3: not settled."""
    from pytest_gpuperf.report.compare import Pair, compare_lines
    from pytest_gpuperf.report.compare import compare as compare_results

    pairs = [Pair.from_text(text) for text in pair or ()]
    found = compare_results(read_results(a), read_results(b), across=across, pairs=pairs)
    _echo(compare_lines(found, (str(a), str(b)), width=_width()))
    return REGRESSION if found.has_worse else GOOD if found.is_settled else NOT_SETTLED


@app.command()
def cost(  # noqa: PLR0913 - each is an option of the command line
    tests: TestsArgument = None,
    *,
    results: ResultsOption = DEFAULT_RESULTS,
    throughput: Annotated[float | None, typer.Option(help="Tokens a second, instead of a results file.")] = None,
    gpu: Annotated[str | None, typer.Option(help="GPU of the throughput, such as T4 or A100.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that the throughput took.")] = 1,
    busy: Annotated[float | None, typer.Option(help="Part of the time in which the GPU computed, 0 to 1.")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars for an hour of one GPU.")] = None,
    prices: Annotated[Path | None, typer.Option(help="Table of prices, laid out as the one that comes along.")] = None,
    instance: Annotated[str | None, typer.Option(help="The machine of the table to take the price of.")] = None,
) -> None:
    """Say what tokens cost: per million, tokens for a dollar, and what a GPU that waits takes of it."""
    from pytest_gpuperf.analysis.cost import PriceSource, costs, given_throughput, throughputs
    from pytest_gpuperf.report.cost import cost_lines

    source = PriceSource(per_gpu_hour=price, table=prices, instance=instance)
    if throughput is not None:
        if tests:
            raise UsageError("--throughput is a number by hand, so there are no tests to choose. Drop one of the two.")
        found = given_throughput(throughput, gpu=gpu, gpus=gpus, busy=busy, has_price=price is not None)
        _echo(cost_lines(costs([found], source), width=_width()))
        return
    if busy is not None or gpus != 1:
        raise UsageError("--busy and --gpus go with --throughput. A results file says both by itself.")
    measured = throughputs(_chosen(read_results(results), tests))
    _echo(cost_lines(costs(measured, source, only=gpu), width=_width()))


@baseline_app.command()
def learn(baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """Learn from the baselines how noisy each kind of metric is on each kind of device, for the judge to use."""
    from pytest_gpuperf.analysis.learning import keep, lessons
    from pytest_gpuperf.report.learning import lesson_lines

    found = lessons(baselines_root)
    if not found:
        raise UsageError(f"No baselines in {baselines_root}. Run pytest, then: gpuperf baseline record")
    for lesson in found:
        _echo(lesson_lines(lesson, keep(baselines_root, lesson)))


@baseline_app.command()
def drift(tests: TestsArgument = None, baselines_root: BaselinesOption = DEFAULT_BASELINES) -> None:
    """Compare the last sessions of every epoch with its first five: what many small steps add up to."""
    from pytest_gpuperf.analysis.drift import drifts
    from pytest_gpuperf.report.drift import drift_lines

    if not baseline_file.list_files(baselines_root):
        raise UsageError(f"No baselines in {baselines_root}. Run pytest, then: gpuperf baseline record")
    found = [each for each in drifts(baselines_root) if _is_chosen(str(each.key), tests)]
    if tests and not found:
        raise UsageError(f"No baseline of {' or '.join(tests)} in {baselines_root} has more than 5 sessions.")
    _echo(drift_lines(found))


@app.command()
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


@app.command()
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


@app.command()
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
        _echo(doctor_lines(found, facts.pairs, width=_width(), time_s=time.monotonic() - begin_s))
    return ERROR if any(one.level == "problem" for one in found) else GOOD


@app.command()
def memory(  # noqa: PLR0913 - each is an option of the command line
    *,
    model: Annotated[str, typer.Option("--model", help="A preset, or a folder with a config.json.")],
    quantization: Annotated[str, typer.Option(help="Of the weights: fp16, bf16, fp8, int8, int4.")] = "bf16",
    kv_dtype: Annotated[str, typer.Option(help="Of the KV cache: auto (16 bit) or fp8.")] = "auto",
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a request, prompt and output; default: 2048, or the model's limit.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    gpu_count: Annotated[int, typer.Option("--gpus", help="GPUs to divide the model over.")] = 1,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens of a step of vLLM.")] = 8192,
    is_eager: Annotated[bool, typer.Option("--enforce-eager", help="vLLM without CUDA graphs.")] = False,
    gpu_names: Annotated[list[str] | None, typer.Option("--gpu", help="Kinds of GPU to check; default: all.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: memory over batch size and length.")] = None,
) -> None:
    """Say what memory a model needs, part by part, and on which GPUs it fits."""
    from pytest_gpuperf.analysis.memory import EngineName, KvDtype, Quantization, Use, estimate
    from pytest_gpuperf.analysis.memory_fit import common_gpus, fits_on
    from pytest_gpuperf.report.memory import fit_lines, memory_lines, save_plot, stored_lines
    from pytest_gpuperf.report.specs import find_spec
    from pytest_gpuperf.workloads.models import shape_of

    shape = shape_of(model)
    use = Use(
        sequence_tokens=min(2048, shape.max_positions) if sequence_length is None else sequence_length,
        batch_size=batch_size,
        gpus=gpu_count,
        engine=cast("EngineName", engine),  # Use refuses other words
        quantization=cast("Quantization", quantization),
        kv_dtype=cast("KvDtype", kv_dtype),
        max_num_batched_tokens=max_num_batched_tokens,
        is_eager=is_eager,
    )
    chosen = [find_spec(name) for name in gpu_names or []]
    needed = estimate(shape, use)
    fits = fits_on(needed, chosen or common_gpus())
    _echo([*memory_lines(needed), *stored_lines(model, use), *fit_lines(fits, use, is_chosen=bool(chosen))])
    if plot is not None:
        save_plot(needed, plot, chosen)
        typer.echo(f"Plot: {plot}")


@app.command()
def diagnose(  # noqa: PLR0913 - each is an option of the command line
    what: Annotated[
        str | None,
        typer.Argument(metavar="WORKLOAD_OR_TEST", help="matmul, copy, tiny-kernels, sleep, all-reduce, or a test."),
    ] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", help="A preset, or a folder with a config.json.")] = None,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    prompt: Annotated[str | None, typer.Option(help="A text; its tokens are estimated from its words.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    output_tokens: Annotated[int, typer.Option(help="Of each request.")] = 64,
    iterations: Annotated[int, typer.Option(help="Calls, or steps of a phase, to time at least.")] = 100,
    phase: Annotated[str, typer.Option(help="prefill, decode or both.")] = "both",
    ceilings: Annotated[str, typer.Option(help="measured or data-sheet.")] = "measured",
    limit: Annotated[float, typer.Option(help="Most seconds of timing a phase, or of running a test.")] = 60.0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the text.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of the roofline to write.")] = None,
) -> None:
    """Run a workload, a model or a test, and say what limits it, by which numbers, and what to do."""
    from pytest_gpuperf.trials.diagnose import Wanted as WantedDiagnosis

    wanted = WantedDiagnosis(
        workload=what,
        model=model,
        engine=engine,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        output_tokens=output_tokens,
        iterations=iterations,
        phase=phase,
        ceilings=ceilings,
        limit_s=limit,
    )
    _diagnose(wanted, device, is_json=is_json, plot=plot)


def _diagnose(wanted: "WantedDiagnosis", device: str, *, is_json: bool, plot: Path | None) -> None:
    from pytest_gpuperf.report.diagnose import check_plot, diagnosis_lines, save_plot, to_json
    from pytest_gpuperf.trials.diagnose import bench_on, run_diagnosis
    from pytest_gpuperf.trials.diagnose_pytest import diagnose_test, is_test
    from pytest_gpuperf.trials.tune_bench import machine_of

    if plot is not None:
        check_plot(plot)
    bench = bench_on(machine_of(device))
    is_of_test = wanted.workload is not None and is_test(wanted.workload)
    found = diagnose_test(wanted, bench, device=device) if is_of_test else run_diagnosis(wanted, bench)
    if is_json:
        typer.echo(to_json(found))
    else:
        _echo(diagnosis_lines(found))
    if plot is not None:
        save_plot(found, plot)
        typer.echo(f"Plot: {plot}", err=is_json)


@app.command()
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


@app.command()
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
        _echo(header(before, after, width=_width()))
        for warning in warnings_of(before, after):
            typer.secho(warning, fg="yellow")
        comparison = run_ab(before, after, plan, gpus=visible_gpus(), say=lambda text: typer.echo(text, err=True))
    _echo(report(comparison, width=_width()))
    codes = {"good": GOOD, "slower": REGRESSION, "undecided": NOT_SETTLED, "error": ERROR, "interrupted": 130}
    return codes[comparison.outcome]


@app.command()
def tune(  # noqa: PLR0913 - each is an option of the command line
    model: Annotated[str, typer.Argument(help="A preset, a hub id of one, or a folder with config.json.")],
    *,
    output: Annotated[
        Path | None, typer.Option(help="Folder to begin or go on in; default: .gpuperf/tune-MODEL.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Of a measurement; default: 2048, on a CPU 16.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of a request; default: 128, on a CPU 32.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Of a request; default: 128, on a CPU 32.")] = None,
    repeats: Annotated[int, typer.Option(help="Of a point, after one that does not count.")] = 3,
    pairs: Annotated[int, typer.Option(help="Runs of the best configuration against the default.")] = 4,
    factor: FactorOption = None,
    is_full: Annotated[bool, typer.Option("--full", help="All combinations, not one factor at a time.")] = False,
    budget: Annotated[float | None, typer.Option(help="Seconds; enough is kept back for the pairs.")] = None,
    timeout: Annotated[float, typer.Option(help="Most seconds for one repeat.")] = 600.0,
    is_plotting: Annotated[bool, typer.Option("--plot", help="Draw plot.png.")] = False,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> int:
    """Find a faster configuration of vLLM for a model, and say what it gains over the default, with an interval."""
    from pytest_gpuperf.report.tune import check_plot
    from pytest_gpuperf.trials.tune_bench import Wanted, default_folder, machine_of

    if is_plotting:
        check_plot()
    wanted = Wanted(
        model=model,
        requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        pairs=pairs,
        factors=tuple(factor or ()),
        is_full=is_full,
        budget_s=budget,
        timeout_s=timeout,
    )
    return _tune(wanted, output or default_folder(model), machine_of(device), is_plotting=is_plotting)


@app.command()
def profile(  # noqa: PLR0913 - each is an option of the command line
    target: Annotated[str, typer.Argument(help="A test (test_a.py::test_b), matmul:N:DTYPE, copy:SIZE, or a model.")],
    pytest_arguments: PytestArguments = None,
    *,
    output: Annotated[Path, typer.Option(help="Folder for the traces.")] = Path(".gpuperf/profile"),
    calls: Annotated[int | None, typer.Option(help="Most calls to profile, or steps of a model.")] = None,
    top: Annotated[int, typer.Option(help="Kernels to show.")] = 15,
    engine: Annotated[str, typer.Option(help="Of a model: transformers or vllm.")] = "transformers",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu; of a test: -- --gpuperf-device.")] = "auto",
    timeout: Annotated[float, typer.Option(help="Most seconds.")] = 600.0,
    is_nsys: Annotated[bool, typer.Option("--nsys", help="Let NVIDIA Nsight Systems record it instead.")] = False,
) -> None:
    """Show what ran, kernel by kernel, and write a trace to look at: of a test, a kernel by name, or a model."""
    from pytest_gpuperf.report.profile import profile_lines
    from pytest_gpuperf.trials.profile import Wanted, check, run_under_nsys
    from pytest_gpuperf.trials.profile import profile as run_profile
    from pytest_gpuperf.trials.tune_bench import machine_of

    wanted = Wanted(
        target=target,
        output=output,
        calls=calls,
        engine=engine,
        timeout_s=timeout,
        pytest_arguments=tuple(pytest_arguments or ()),
    )
    if top < 1:
        raise UsageError(f"--top {top}: at least 1 is needed.")
    check(wanted)
    machine = machine_of(device)
    if is_nsys:
        report = run_under_nsys(wanted, [one for one in sys.argv[1:] if one != "--nsys"], is_gpu=bool(machine.gpus))
        typer.echo(f"Report of nsys: {report}\nSums: nsys stats {report}. Or open it in Nsight Systems.")
        return
    _echo(profile_lines(run_profile(wanted, machine), top=top, asked=calls, width=_width()))


def _tune(wanted: "Wanted", folder: Path, machine: Machine, *, is_plotting: bool) -> int:
    from pytest_gpuperf.lease import lease
    from pytest_gpuperf.report.tune import plan_lines, progress, tuning_lines, write_results
    from pytest_gpuperf.trials.ab import interrupted_by_sigterm
    from pytest_gpuperf.trials.tune import tune as run_tune
    from pytest_gpuperf.trials.tune_bench import bench_on, check_wanted, device_sets, plan_on
    from pytest_gpuperf.trials.tune_file import Journal

    load = check_wanted(wanted, machine.devices[0].kind)
    plan_on(machine.devices[0], wanted, load)  # without a vLLM nobody waits for a GPU
    with interrupted_by_sigterm(), lease(device_sets(machine.devices, folder)) as lent:
        [held] = lent.devices
        journal = Journal(folder, plan_on(held, wanted, load))
        _echo(plan_lines(journal.plan))
        with progress() as show:
            bench = bench_on(lent, machine.nvml, wanted, show)
            tuning = run_tune(journal, bench, pairs=wanted.pairs, budget_s=wanted.budget_s)
    _echo(tuning_lines(tuning, width=_width()))
    _echo(write_results(tuning, folder, is_plotting=is_plotting))
    if tuning.ending == "interrupted":
        return 130
    return GOOD if tuning.is_settled else NOT_SETTLED


@app.command()
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
                _echo(process_lines(process, runs, width=_width()))
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
    _echo([*calibration_lines(found, calibration.left_out(good)), *legend_lines(found)])
    return GOOD


def _outcome(verdict: Verdict, planted: float) -> str:
    caught = "" if not planted else "caught: " if verdict.status == "REGRESSED" else "not caught: "
    change = "nothing compared" if verdict.change is None else f"measured {format_percent(verdict.change, signed=True)}"
    sees = verdict.minimum_detectable_effect
    return f"{caught}{verdict.status}, {change}" + (f", sees {format_percent(sees)}" if sees is not None else "")


def _write(results: Path, tests: list[str] | None, root: Path, reason: str | None) -> int:
    """Record or accept, judged against the baselines as they are now."""
    found = read_results(results)
    records = _judged(found, tests, root)
    changes = baseline_store.write(root, found.run, records, accept_reason=reason, profiles=found.profiles)
    typer.echo(f"Baselines in {root}: {tally(changes)}.")
    _echo(refusals(changes, baseline_command("accept", root.absolute(), results.absolute())))
    return GOOD if all(change.action != "refused" for change in changes) else NOT_SETTLED


def _judged(found: Results, tests: list[str] | None, root: Path) -> list[TestRecord]:
    """The chosen tests with verdicts against the baselines as they are now."""
    return judge_results(found, _chosen(found, tests), root, lambda folder: read_priors(root, folder))


def _chosen(found: Results, tests: list[str] | None) -> list[TestRecord]:
    records = [record for record in found.tests if _is_chosen(str(record.key), tests)]
    if not records:
        like = f" like {' or '.join(tests)}" if tests else ""
        raise UsageError(f"The results hold no test{like}.")
    return records


def _is_chosen(test: str, names: list[str] | None) -> bool:
    """Whether a test's id is one of the names, or one names its module, its function, or a part of its own name."""
    module, _, own = test.partition("::")
    return not names or any(
        name in (test, module) or test.startswith(f"{name}[") or ("::" not in name and name in own) for name in names
    )


def _read(path: Path) -> BaselineFile:
    file = baseline_file.read(path)
    if file is None:
        raise UsageError(f"{path} is gone.")
    return file


def _width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def _echo(lines: list[Line]) -> None:
    for line in lines:
        typer.secho(line.text, fg=line.colour)
