"""Measure how often the verdict is wrong and what it catches, beside the rules of other tools.

    python benchmarks/verdict/run.py [--quick] [--seed 1] [--jobs 2] [--out FOLDER]

Writes tallies.json, two figures and RESULTS.md; `--quick` writes them to a folder that is thrown away, and prints the
report. Needs the extras `dev` and `report`, and no GPU.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # it is run as a file, from anywhere

from benchmarks.verdict import plots, report, scenarios  # noqa: E402 - the path comes first
from benchmarks.verdict.pairs import simulate_pairs  # noqa: E402
from benchmarks.verdict.replay import read_visits, replay  # noqa: E402
from benchmarks.verdict.simulate import Scenario, Task, simulate, tasks  # noqa: E402
from benchmarks.verdict.tally import Tally, summed  # noqa: E402
from pytest_gpuperf.priors import package_priors  # noqa: E402

#: What a verdict depends on.
JUDGED = tuple(
    HERE.parents[1] / "pytest_gpuperf" / name
    for name in ("judge.py", "stats.py", "priors.py", "data/priors.json", "trials/paired.py")
)
#: Of the repetitions, with --quick.
_QUICK = 0.02


def main() -> None:
    """Simulate, replay, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the repetitions, written nowhere")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: the folder of this file")
    chosen = parser.parse_args()
    with _folder(chosen.out, is_quick=chosen.quick) as folder:
        write(folder, seed=chosen.seed, jobs=chosen.jobs, share=_QUICK if chosen.quick else 1.0)
        if chosen.quick:
            print((folder / "RESULTS.md").read_text())


def write(folder: Path, *, seed: int, jobs: int, share: float) -> None:
    """Do everything and write it to a folder.

    Args:
        folder: Exists.
        seed: Of all chance.
        jobs: Processes.
        share: Of the repetitions.
    """
    start_s, judged = time.perf_counter(), fingerprint(JUDGED)
    package_priors()  # once, for all processes and for the recordings
    stored = [_fewer(scenario, share) for scenario in scenarios.all_scenarios()]
    paired = [_fewer(scenario, share) for scenario in scenarios.pair_scenarios()]
    with multiprocessing.get_context("fork").Pool(jobs, initializer=os.nice, initargs=(10,)) as pool:
        found = report.Findings(
            stored=tuple(summed(_told(pool.imap_unordered(simulate, _parts(stored, seed)), "stored", start_s))),
            paired=tuple(summed(_told(pool.imap_unordered(simulate_pairs, _parts(paired, seed)), "pairs", start_s))),
            replayed=tuple(replay(read_visits(HERE.parent.joinpath("results").glob("*visit-*.json")))),
            seed=seed,
            share=share,
            duration_s=time.perf_counter() - start_s,
            judged=judged,
        )
    check_unchanged(judged, fingerprint(JUDGED))
    (folder / "tallies.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    plots.power_curves(found.stored, folder / "power.png")
    plots.false_red_bars(found.stored, folder / "false_red.png")
    (folder / "RESULTS.md").write_text(report.markdown(found))


def fingerprint(paths: Iterable[Path]) -> str:
    """Return a short hash of what decides: two results with the same one are of the same rule."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths))
    return digest.hexdigest()[:12]


def check_unchanged(before: str, after: str) -> None:
    """Refuse results that are of no single rule.

    Raises:
        SystemExit: What decides was edited meanwhile.
    """
    if before != after:
        raise SystemExit(
            f"The rule was edited while it was measured ({before} at the start, {after} now), so the counts are of no "
            "single rule and nothing was written. Run again: python benchmarks/verdict/run.py"
        )


def _fewer(scenario: Scenario, share: float) -> Scenario:
    counts = {name: max(round(getattr(scenario, name) * share), 2) for name in ("nulls", "judged", "powered")}
    return msgspec.structs.replace(scenario, **{**counts, "judged": min(counts["judged"], counts["nulls"])})


def _parts(chosen: list[Scenario], seed: int) -> list[Task]:
    return [task for scenario in chosen for task in tasks(scenario, seed)]


def _told(parts: Iterator[list[Tally]], what: str, start_s: float) -> Iterator[Tally]:
    """Pass on the counts and say now and then how far it is."""
    for number, part in enumerate(parts, start=1):
        if number % 100 == 0:
            print(f"{what}: {number} parts, {time.perf_counter() - start_s:.0f} s", file=sys.stderr, flush=True)
        yield from part


@contextmanager
def _folder(chosen: Path | None, *, is_quick: bool) -> Iterator[Path]:
    if chosen is None and is_quick:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = chosen or HERE
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


if __name__ == "__main__":
    main()
