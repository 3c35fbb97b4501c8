"""What is said of results: `gpuperf compare` and `gpuperf cost`."""

from pathlib import Path
from typing import Annotated

import typer

from pytest_gpuperf.commands.arguments import (
    DEFAULT_RESULTS,
    GOOD,
    NOT_SETTLED,
    REGRESSION,
    ResultsOption,
    TestsArgument,
    chosen,
    echo,
    width,
)
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.results import read_results


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
    echo(compare_lines(found, (str(a), str(b)), width=width()))
    return REGRESSION if found.has_worse else GOOD if found.is_settled else NOT_SETTLED


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
        echo(cost_lines(costs([found], source), width=width()))
        return
    if busy is not None or gpus != 1:
        raise UsageError("--busy and --gpus go with --throughput. A results file says both by itself.")
    measured = throughputs(chosen(read_results(results), tests))
    echo(cost_lines(costs(measured, source, only=gpu), width=width()))
