"""What a user reads of a tuning: a table of the points in 80 columns, the gain with its interval, a plot."""

import contextlib
import importlib.util
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.trials.tune import Gain, Now, Tuning
from pytest_gpuperf.trials.tune_file import write_best
from pytest_gpuperf.trials.tune_plan import LEVELS, PRECISION, WORTHWHILE, Plan, Point, name_of
from pytest_gpuperf.units import counted, format_percent, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME_WIDTH = 34
_MOST_UNWELL = 3
_MOST_PROBLEM_LINES = 3
#: Of a full grid the fastest are plotted.
_MOST_COMBINED = 12


def plan_lines(plan: Plan) -> list[Line]:
    """Say what is measured: before the first engine, so that a mistake is seen in time."""
    load = plan.load
    return [
        Line(text=f"{plan.model} on {plan.device}, vLLM {plan.vllm}"),
        Line(
            text=f"{load.requests:,} requests of {load.prompt_tokens} prompt and {load.output_tokens} output tokens, "
            f"{counted(plan.repeats, 'repeat')} a point"
        ),
    ]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Now], None]]:
    """Show a bar on stderr while a tuning runs; where that is no terminal, a line for each engine."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda now: console.print(
            f"{now.engines} of at most {now.most} engines; {now.text}", markup=False, highlight=False, soft_wrap=True
        )
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda now: bar.update(task, completed=now.engines, total=now.most, description=now.text)


def tuning_lines(tuning: Tuning, *, width: int = 80) -> list[Line]:
    """The result: every point against the default, what did not run and why, and what the pairs say of the best."""
    if not tuning.points:
        return [Line(text="Nothing was measured.", colour="yellow")]
    lines = [_header(), *_point_lines(tuning, width)]
    lines += [Line(text=text) for text in _remarks(tuning, width)]
    lines += [Line(text=part, colour="yellow") for text in _troubles(tuning) for part in _wrapped(text, width)]
    return lines if tuning.ending == "interrupted" else [*lines, *gain_lines(tuning, width=width)]


def _header() -> Line:
    return Line(text=_row("output tokens", "tok/s", "repeats", "gain", "latency", "load"))


def _row(*cells: str) -> str:
    name, value, spread, gain, latency, load = cells
    return f"{name:<{_NAME_WIDTH}} {value:>8} {spread:>7} {gain:>8} {latency:>9} {load:>7}".rstrip()


def _point_lines(tuning: Tuning, width: int) -> list[Line]:
    """The default, then factor by factor the fastest first, then combinations."""
    default, *others = tuning.points
    places = {
        name_of(level): place for place, levels in enumerate(LEVELS[tuning.plan.kind].values()) for level in levels
    }
    others.sort(key=lambda point: (places.get(point.name, len(places)), -(point.value or 0.0)))
    return [line for point in (default, *others) for line in _lines_of(point, tuning, width)]


def _lines_of(point: Point, tuning: Tuning, width: int) -> list[Line]:
    name = point.name
    before = []
    if len(name) > _NAME_WIDTH:
        before, name = [Line(text=text) for text in _wrapped(name, width)], ""
    if point.value is None:
        texts = [f"{name:<{_NAME_WIDTH}} {point.cause}", *_problem(point, width)]
        return [*before, *(Line(text=text, colour="yellow") for text in texts)]
    default = tuning.points[0].value
    gain = "-" if not point.settings or not default else format_percent(point.value / default - 1, signed=True)
    row = _row(
        name,
        f"{point.value:,.0f}".replace(",", " "),
        _spread(point.values, point.value),
        gain,
        "-" if point.latency_s is None else format_value(point.latency_s, "s", digits=3),
        "-" if point.load_time_s is None else f"{point.load_time_s:.0f} s",
    )
    return [*before, Line(text=row, colour="green" if point == tuning.best and point.settings else None)]


def _spread(values: Sequence[float], value: float) -> str:
    """Half the range of the repeats; of a single one nothing is known."""
    return f"±{format_percent((max(values) - min(values)) / 2 / value)}" if len(values) > 1 else "-"


def _problem(point: Point, width: int) -> list[str]:
    """The first line of it, which is a sentence; the log's last lines follow in points.jsonl."""
    first = next(iter((point.problem or "").splitlines()), "")
    return textwrap.wrap(
        first, width, initial_indent="    ", subsequent_indent="    ", max_lines=_MOST_PROBLEM_LINES, placeholder=" …"
    )


def _remarks(tuning: Tuning, width: int) -> list[str]:
    texts = []
    if tuning.skipped:
        texts.append(f"The default has these already: {'; '.join(name_of(one) for one in tuning.skipped)}.")
    if tuning.gpus > 1:
        texts.append(
            f"The points were measured on {tuning.gpus} GPUs of this kind, which may differ by about 1 %; "
            "a pair is of one GPU."
        )
    return [line for text in texts for line in _wrapped(text, width)]


def _troubles(tuning: Tuning) -> list[str]:
    unwell = [f"{point.name} was measured during {point.unwell}" for point in tuning.points if point.unwell]
    texts = unwell[:_MOST_UNWELL]
    if len(unwell) > _MOST_UNWELL:
        texts.append(f"and {len(unwell) - _MOST_UNWELL} more points on an unwell GPU")
    texts += [f"lost pair {pair.number}: {pair.problem}".splitlines()[0] for pair in tuning.pairs if pair.problem]
    if tuning.left:
        texts.append(f"{counted(tuning.left, 'point')} left out: the budget is spent.")
    return texts


def gain_lines(tuning: Tuning, *, width: int = 80) -> list[Line]:
    """Name the best configuration and what it gains over the default, whatever that is."""
    best = tuning.best
    if best is None:
        return []
    if not best.settings:
        measured = sum(point.value is not None for point in tuning.points) - 1
        least = format_percent(WORTHWHILE)
        text = (
            f"No gain: of {measured} other configurations none was {least} faster than the default."
            if measured
            else "No gain is known: nothing ran besides the default."
        )
        return [Line(text=line) for line in _wrapped(text, width)]
    texts = [f"best: {best.name}", gain_text(tuning.gain)]
    if changed := [field for field in best.settings if field in PRECISION]:
        values = ", ".join(str(best.settings[field]) for field in changed)
        texts.append(f"{values} changes what the model computes, not only how fast: check its answers before use.")
    colour: Colour = "green" if tuning.gain and tuning.gain.low > 1 else "yellow"
    return [Line(text=line, colour=colour) for text in texts for line in _wrapped(text, width)]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of this width; an option stays in one piece."""
    return textwrap.wrap(text, width, break_on_hyphens=False)


def gain_text(gain: Gain | None) -> str:
    """Such as `tuned / default: 1.230 (95 % interval 1.210 to 1.251, 4 pairs of fresh engines)`."""
    if gain is None:
        return "tuned / default: not measured, no pair of the two was run to its end."
    pairs = f"{counted(gain.pairs, 'pair')} of fresh engines"
    text = f"tuned / default: {gain.ratio:.3f} (95 % interval {gain.low:.3f} to {gain.high:.3f}, {pairs})"
    return text if gain.is_certain else f"{text}: not told from noise"


def write_results(tuning: Tuning, folder: Path, *, is_plotting: bool) -> list[Line]:
    """Write best.yaml and the plot, and say what is where and what to do next.

    Args:
        tuning: What is known; of one that was interrupted nothing is written but its points, which are there already.
        folder: Of its points.
        is_plotting: Whether plot.png is wanted.
    """
    if tuning.ending == "interrupted" or tuning.best is None:
        kept = "1 point is" if len(tuning.points) == 1 else f"{len(tuning.points)} points are"
        text = f"Interrupted: {kept} kept in {folder}. The same command goes on from there."
        return [Line(text=text, colour="yellow")]
    lines = []
    if is_plotting:
        draw(tuning, folder / "plot.png")
        lines.append(Line(text=f"plot: {folder / 'plot.png'}"))
    path = write_best(folder, tuning.plan, tuning.best, _comments(tuning))
    lines.append(Line(text=f"serve it: vllm serve --config {path}"))
    if tuning.best.settings:
        lines.append(Line(text=f"test it:  pytest perf_tests/test_tuning.py --gpuperf-tuned {path}"))
    if tuning.left:
        lines.append(Line(text=_how_to_go_on(tuning), colour="yellow"))
    return lines


def _how_to_go_on(tuning: Tuning) -> str:
    if tuning.is_budget_short:
        return "The budget holds no point beside the pairs: measure the points first, with --pairs 0."
    return "The same command measures the points that were left out."


def _comments(tuning: Tuning) -> list[str]:
    """What best.yaml says about itself."""
    best = tuning.best
    texts = [line.text for line in plan_lines(tuning.plan)]
    if best is not None and best.value is not None:
        gain = gain_text(tuning.gain) if best.settings else "nothing was faster"
        texts += [f"{best.name}: {best.value:,.0f} tok/s", gain]
    return texts


def check_plot() -> None:
    """Make sure that a plot can be drawn, before any time is spent.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'pytest-gpuperf[report]'. Or leave --plot out.")


def draw(tuning: Tuning, path: Path) -> None:
    """Plot tok/s over the levels of each factor, the default as a line, what did not run as a cross at zero.

    Raises:
        UsageError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    panels = _panels(tuning)
    shares = [max(len(points), 4) for points in panels.values()]
    figure = Figure(figsize=(max(0.8 * sum(shares), 8.0), 5.0), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=shares)[0]
    for axes, (title, points) in zip(row, panels.items(), strict=True):
        _draw_points(axes, points)
        axes.axhline(tuning.points[0].value or 0.0, linestyle="--", color="gray")
        axes.set_title(title)
        axes.grid(visible=True, axis="y", alpha=0.3)
    row[0].set_ylim(0, 1.05 * row[0].get_ylim()[1])  # shared, so not before the last point is drawn
    row[0].set_ylabel("output tok/s (dashed: default)")
    figure.suptitle(f"{tuning.plan.model} on {tuning.plan.device}, vLLM {tuning.plan.vllm}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"The plot cannot be written to {path}: {error.strerror}.") from None


def _draw_points(axes: "Axes", points: Sequence[Point]) -> None:
    ran = [(place, point) for place, point in enumerate(points) if point.value is not None]
    values = [point.value or 0.0 for _, point in ran]
    below = [(point.value or 0.0) - min(point.values) for _, point in ran]
    above = [max(point.values) - (point.value or 0.0) for _, point in ran]
    axes.errorbar([place for place, _ in ran], values, yerr=[below, above], fmt="o", capsize=3)
    if lost := [place for place, point in enumerate(points) if point.value is None]:
        axes.plot(lost, [0.0] * len(lost), "rx", markersize=10, clip_on=False)
    names = ["\n".join(f"{value}" for value in point.settings.values()) for point in points]
    axes.set_xticks(range(len(points)), names, rotation=90, fontsize="small")
    axes.set_xlim(-0.5, len(points) - 0.5)


def _panels(tuning: Tuning) -> dict[str, list[Point]]:
    """Title -> points, in the order of their values; what belongs to no factor is a combination."""
    others = tuning.points[1:]
    panels = {
        factor: sorted((point for point in others if point.settings in levels), key=_order)
        for factor, levels in LEVELS[tuning.plan.kind].items()
    }
    known: Sequence[Point] = [point for points in panels.values() for point in points]
    combined = [point for point in others if point not in known]
    panels["combined"] = sorted(combined, key=lambda point: -(point.value or 0.0))[:_MOST_COMBINED]
    return {title: points for title, points in panels.items() if points} or {"default": [tuning.points[0]]}


def _order(point: Point) -> tuple[float, str]:
    value = next(iter(point.settings.values()))
    return (value, "") if isinstance(value, (int, float)) else (0.0, str(value))
