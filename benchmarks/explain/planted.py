"""Does the first line name the cause? Seven planted slowdowns through the whole gate, on one GPU.

    python benchmarks/explain/planted.py OUT [--device auto]

Records a baseline of the suite beside this file in two fresh processes, judges the same code once, then each test with
PLANTED=1 in a run of its own (together they would be one message about the machine), the last with another process
multiplying on the GPU. Prints each test's verdict and first line, and whether the line names what was planted. Writes
OUT/planted.json after each, and the results of every run. What OUT holds is not run again: the same command goes on
where `--budget` or something else ended it, on the same GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.records import TestRecord
from pytest_gpuperf.report.results import read_results

SUITE = Path(__file__).parent / "suite"
#: Test -> words of which one names the cause that was planted.
WORDS = {
    "test_algorithm": ("replaced by",),
    "test_pass": ("an added kernel", "added"),
    "test_host": ("waits", "for the host"),
    "test_graph": ("CUDA graph is no longer used",),
    "test_precision": ("without tensor cores",),
    "test_batch": ("smaller launches",),
    "test_neighbour": ("another process", "other memory"),
}
HOG = """
import os, torch
parent = os.getppid()
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
print("up", flush=True)
while os.getppid() == parent:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""
#: Longest time for one run of the suite.
TIMEOUT_S = 180.0


def run_suite(out: Path, name: str, device: str, *options: str, planted: bool = False) -> list[TestRecord]:
    """Run the suite once in a fresh process and read what it found; what has ended before is not run again."""
    if not is_done(out, name):
        command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "--rootdir", str(SUITE)]
        command += ["--gpuperf-baselines", str(out / "baselines"), "--gpuperf-json", str(out / f"{name}.jsonl")]
        command += ["--gpuperf-device", device, "--gpuperf-anchors", "off", *options]
        environment = {**os.environ, "PLANTED": str(int(planted)), "COLUMNS": "120"}
        start_s = time.perf_counter()
        done = run_group(command, timeout_s=TIMEOUT_S, environment=environment)
        (out / f"{name}{'' if done.code in (0, 1) else '.failed'}.txt").write_text(done.tail)
        print(f"{name}: {done.in_words}, {time.perf_counter() - start_s:.0f} s", flush=True)
    return found_in(out, name)


def is_done(out: Path, name: str) -> bool:
    """Whether a run has ended, with its tests passed or failed."""
    return (out / f"{name}.txt").exists()


def found_in(out: Path, name: str) -> list[TestRecord]:
    """The tests of a run that has begun; none if it measured nothing."""
    try:
        return list(read_results(out / f"{name}.jsonl").tests)
    except UsageError:
        return []


@contextmanager
def neighbour(device: str) -> Iterator[None]:
    """Another process that multiplies on the GPU all the time."""
    if device == "cpu":
        yield
        return
    hog = subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE)
    try:
        assert hog.stdout
        hog.stdout.readline()
        yield
    finally:
        hog.kill()
        hog.wait()


def row_of(test: str, records: Sequence[TestRecord]) -> dict[str, object]:
    """Whether the first line names what was planted in a test."""
    record = next((one for one in records if one.key.test == test and one.verdicts), None)
    if record is None:
        return {"test": test, "status": "no result", "first": f"see {test}.txt or {test}.failed.txt", "named": False}
    verdict = record.verdicts[0]
    first = verdict.causes[0] if verdict.causes else verdict.reason
    named = any(word in first for word in WORDS[test])
    row = {"test": test, "status": verdict.status, "change": verdict.change, "first": first, "named": named}
    return {**row, "causes": verdict.causes, "duration_s": record.duration_s}


def steps(out: Path, device: str) -> Iterator[dict[str, object]]:
    """Record twice, judge the same code, plant one at a time; a row of each that was planted, an empty one before."""
    run_suite(out, "record-1", device, "--gpuperf-update")  # with profiles: nothing that is new is refused
    if not is_done(out, "record-1"):
        sys.exit("The recording failed: see record-1.failed.txt.")
    yield {}
    run_suite(out, "record-2", device, "--gpuperf-update", "--gpuperf-budget", "0")
    yield {}
    run_suite(out, "unchanged", device)
    for test in WORDS:
        yield {}
        is_beside = test == "test_neighbour" and not is_done(out, test)
        with neighbour(device) if is_beside else nullcontext():
            records = run_suite(out, test, device, "--gpuperf-budget", "20", "-k", test, planted=True)
        row = row_of(test, records)
        print(
            f"{row['test']:15} {row['status']:12} {'named ' if row['named'] else 'MISSED'} {row['first']}", flush=True
        )
        yield row


def main() -> int:
    """Record, judge, plant, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no further run is begun")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    out, begin_s, rows = given.out.resolve(), time.perf_counter(), []
    for row in steps(out, given.device):
        unchanged = [verdict.status for one in found_in(out, "unchanged") for verdict in one.verdicts]
        rows += [row] if row else []
        (out / "planted.json").write_text(json.dumps({"rows": rows, "unchanged": unchanged}, indent=1) + "\n")
        if len(rows) < len(WORDS) and time.perf_counter() - begin_s > given.budget:
            print(f"{given.budget:.0f} s are over: the same command goes on from here")
            break
    named = sum(bool(row["named"]) for row in rows)
    print(f"unchanged code: {', '.join(unchanged)}")
    print(f"named: {named} of {len(WORDS)}, {len(rows)} planted, 6 wanted")
    return 0 if named >= 6 else 1


if __name__ == "__main__":
    sys.exit(main())
