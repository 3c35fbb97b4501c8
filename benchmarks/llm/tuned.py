"""What tuning vLLM is worth: `gpuperf tune` for two models on one GPU, tuned over default with its interval.

    python benchmarks/llm/tuned.py --output DIR [--budget 6000] [--pairs 4] [--model NAME]...

An engine takes 100 s or so on an H100 (45 s to load, 20 s to import, four repeats of 10 s): all points of a model one
factor at a time are 17 of them, the pairs 8 more. Started again, it goes on where it was, from the files in DIR, on
another machine too. Where a command may take no longer than ten minutes, measure the points with `--pairs 0 --budget
480` as often as it takes, then the pairs with `--pairs 4 --budget 480`: the budget is that of all models together. It
ends with a table, which says whether the 1.5x to 3x of published guides were reached; of a command that was killed the
next one prints it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.report.tune import gain_text
from pytest_gpuperf.trials.tune import Gain, read_tuning
from pytest_gpuperf.trials.tune_plan import LEVELS, PRECISION

MODELS = ("llama-3-8b", "qwen2.5-7b")
#: What guides to tuning vLLM promise over its defaults.
CLAIM = (1.5, 3.0)
#: Less is no time for an engine.
_LEAST_S = 60.0
_COMMAND = (sys.executable, "-c", "from pytest_gpuperf.cli import main; main()", "tune")


def word(gain: Gain, left: int) -> str:
    """Whether the claim holds: its lower end against the interval. A level that was left out could still confirm it."""
    if gain.low >= CLAIM[0]:
        return f"confirmed: {CLAIM[0]:g}x or more"
    if gain.high >= CLAIM[0]:
        return f"open: {CLAIM[0]:g}x lies in the interval"
    return f"open: below {CLAIM[0]:g}x, {left} levels left out" if left else f"refuted: below {CLAIM[0]:g}x"


def row(folder: Path) -> str:
    """One line of the table."""
    tuning = read_tuning(folder)
    best, gain = tuning.best, tuning.gain
    if best is None or tuning.points[0].value is None:
        return f"| {tuning.plan.model} | - | - | - | nothing measured |"
    exact = [point for point in tuning.points if not set(point.settings) & set(PRECISION)]
    same = max(point.value or 0.0 for point in exact) / tuning.points[0].value
    none = f"open: {tuning.left} levels left out" if tuning.left else "refuted: no point was 1 % faster"
    verdict = word(gain, tuning.left) if gain else "open: no pairs" if best.settings else none
    levels = sum(map(len, LEVELS[tuning.plan.kind].values()))
    return (
        f"| {tuning.plan.model} | {tuning.points[0].value:,.0f} | {best.name}, of {len(tuning.points)} points "
        f"measured ({levels} levels) | {gain_text(gain)}; "
        f"without a change of precision at most {same:.3f}, unpaired | {verdict} |"
    )


def tune(model: str, folder: Path, options: list[str], left_s: float | None) -> int:
    """Tune one model in a process of its own; return its exit code, 3 where there is no time, 1 where it was killed."""
    if left_s is not None and left_s < _LEAST_S:
        print(f"== {model}: no time left", flush=True)
        return 3
    print(f"== {model}", flush=True)
    budget = []
    if left_s is not None:  # an engine that hangs is ended before the command is cut off, and kept as one that died
        budget = ["--budget", f"{left_s:.0f}", "--timeout", f"{min(600.0, left_s / 2):.0f}"]
    code = subprocess.run([*_COMMAND, model, *options, *budget, "--output", str(folder)], check=False).returncode
    return code if code >= 0 else 1


def main() -> int:
    """Tune each model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder, one below it a model")
    parser.add_argument("--budget", type=float, help="seconds for all models together")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", action="append", help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    options = ["--pairs", str(chosen.pairs), "--repeats", str(chosen.repeats), "--device", chosen.device]
    end_s = time.monotonic() + chosen.budget if chosen.budget else None
    codes, rows = [], []
    for model in chosen.model or MODELS:
        folder = chosen.output / model
        codes.append(tune(model, folder, options, None if end_s is None else end_s - time.monotonic()))
        try:
            rows.append(row(folder))
        except UsageError as error:
            print(error)
    print("\n| model | default, tok/s | best | gain | 1.5x to 3x |\n|---|---|---|---|---|", *rows, sep="\n")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
