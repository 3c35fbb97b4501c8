"""What is done with a workload: `gpuperf memory`, `diagnose`, `profile` and `tune`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pytest_gpuperf.commands.arguments import GOOD, INTERRUPTED, NOT_SETTLED, PytestArguments, echo, width
from pytest_gpuperf.errors import UsageError

if TYPE_CHECKING:
    from pytest_gpuperf.analysis.memory import Use
    from pytest_gpuperf.machine import Machine
    from pytest_gpuperf.trials.diagnose import Wanted as WantedDiagnosis
    from pytest_gpuperf.trials.tune_bench import Wanted

FactorOption = Annotated[
    list[str] | None,
    typer.Option(
        help="What to vary, more than once: precision, max-num-seqs, max-num-batched-tokens, gpu-memory-utilization "
        "(not on a CPU); default: all."
    ),
]


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
    _refuse_crowded_step(use)
    needed = estimate(shape, use)
    fits = fits_on(needed, chosen or common_gpus())
    echo([*memory_lines(needed), *stored_lines(model, use), *fit_lines(fits, use, is_chosen=bool(chosen))])
    if plot is not None:
        save_plot(needed, plot, chosen)
        typer.echo(f"Plot: {plot}")


def _refuse_crowded_step(use: "Use") -> None:
    tokens = use.max_num_batched_tokens
    if use.engine == "vllm" and use.batch_size > tokens:
        raise UsageError(
            f"vLLM takes no batch of {use.batch_size} with {tokens} tokens a step: each request has one in it. "
            f"Give --max-num-batched-tokens {use.batch_size} or more."
        )


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
        echo(diagnosis_lines(found))
    if plot is not None:
        save_plot(found, plot)
        typer.echo(f"Plot: {plot}", err=is_json)


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
    echo(profile_lines(run_profile(wanted, machine), top=top, asked=calls, width=width()))


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


def _tune(wanted: "Wanted", folder: Path, machine: "Machine", *, is_plotting: bool) -> int:
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
        echo(plan_lines(journal.plan))
        with progress() as show:
            bench = bench_on(lent, machine.nvml, wanted, show)
            tuning = run_tune(journal, bench, pairs=wanted.pairs, budget_s=wanted.budget_s)
    echo(tuning_lines(tuning, width=width()))
    echo(write_results(tuning, folder, is_plotting=is_plotting))
    if tuning.ending == "interrupted":
        return INTERRUPTED
    return GOOD if tuning.is_settled else NOT_SETTLED
