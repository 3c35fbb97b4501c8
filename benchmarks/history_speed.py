"""How long a history of a million values takes: to add a run, to list it, to find the steps of a long series.

    python benchmarks/history_speed.py [--folder DIR] [--runs 20000] [--metrics 50]

Fills a store in the folder (default: a temporary one) with runs x metrics values, then prints the median and the worst
of: adding one more run, the steps of 1,000 observations (with steps, on a pool of 8 devices), a summary of all series.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pytest_gpuperf.analysis.changes import steps
from pytest_gpuperf.analysis.history import open_history
from pytest_gpuperf.analysis.history_file import open_file, place_of, transaction
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Measurement,
    Method,
    Results,
    RunInfo,
    TestKey,
    TestRecord,
    Verdict,
)

METHOD = Method(clock="cuda-events", mode="sustained")
HERE = Environment(hardware=Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984))


def run_of(number: int, metrics: int) -> Results:
    """One run with a test a metric."""
    value = 1e-3 * (1 + 1e-6 * (number % 997))
    tests = tuple(
        TestRecord(
            key=TestKey(module="perf_tests/test_speed.py", test=f"test_kernel[{i}]"),
            slug="nvidia-h100-80gb-hbm3",
            devices=(f"device{number % 8}",),
            environment=HERE,
            measurements=(
                Measurement(metric="time", value=value, unit="s", better="lower", kind="compute", method=METHOD),
            ),
            verdicts=(Verdict(status="PASS", metric="time", reason="", tolerance=0.03, change=0.001),),
        )
        for i in range(metrics)
    )
    date = f"2026-{1 + number // 28 % 12:02}-{1 + number % 28:02}T10:00:00+00:00"
    run = RunInfo(schema=1, run_id=f"run{number}", date=date, visit=f"visit{number}", commit=f"{number:012x}")
    return Results(run=run, tests=tests)


def fill(path: Path, runs: int, metrics: int) -> None:
    """Write as `History.add` does, in one transaction: a million of them would take an hour."""
    place = place_of(str(path))
    with open_history(place, mode="write") as history:
        history.add(run_of(0, metrics))
    with open_file(place, mode="write") as connection, transaction(connection):
        connection.executemany(
            'INSERT INTO runs (sequence, run_id, date, visit, "commit") SELECT ?, ?, date, ?, ? FROM runs LIMIT 1',
            ((i + 1, f"run{i}", f"visit{i}", f"{i:012x}") for i in range(1, runs)),
        )
        for i in range(1, runs):
            connection.executemany(
                "INSERT INTO points VALUES (?, ?, 0, ?, NULL, ?, 'PASS', 0.001, NULL)",
                ((series, i + 1, 1e-3, f"device{i % 8}") for series in range(1, metrics + 1)),
            )


def timed(action: Callable[[int], object], times: int) -> str:
    """Median and worst of so many calls, in ms."""
    durations_s = []
    for i in range(times):
        start_s = time.perf_counter()
        action(i)
        durations_s.append(time.perf_counter() - start_s)
    return f"median {statistics.median(durations_s) * 1e3:.1f} ms, worst {max(durations_s) * 1e3:.1f} ms of {times}"


def find_steps(seed: int) -> int:
    """Search 1,000 observations with nine steps."""
    rng = np.random.default_rng(seed)
    devices = rng.integers(0, 8, 1000)
    logs = rng.normal(0, 0.005, 1000) + 0.02 * rng.normal(size=8)[devices] + 0.03 * (np.arange(1000) // 100)
    return len(steps(logs.tolist(), devices.tolist(), floor=0.0005))


def main() -> None:
    """Print all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=20000)
    parser.add_argument("--metrics", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = (given.folder or Path(scratch)) / "history.sqlite"
        fill(path, given.runs, given.metrics)
        print(f"{given.runs * given.metrics} values, {path.stat().st_size / 1e6:.0f} MB")
        place = place_of(str(path))

        def add(i: int) -> None:
            with open_history(place, mode="write") as history:
                history.add(run_of(given.runs + i, given.metrics))

        def summarise(_: int) -> None:
            with open_history(place) as history:
                history.summaries()

        print(f"add a run of {given.metrics} metrics: {timed(add, 100)}")
        print(f"list all series: {timed(summarise, 5)}")
        print(f"steps of 1,000 observations: {timed(find_steps, 50)}")


if __name__ == "__main__":
    main()
