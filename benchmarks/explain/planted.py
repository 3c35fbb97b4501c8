"""Does the first line name the cause? Seven planted slowdowns through the whole gate, on one GPU.

    python benchmarks/explain/planted.py OUT [--device auto]

Records a baseline of the suite beside this file in two fresh processes, judges the same code once, then each test with
PLANTED=1 in a run of its own (together they would be one message about the machine), the last with another process
multiplying on the GPU. Prints each test's verdict and first line, and whether the line names what was planted. Writes
OUT/planted.json, and the results of every run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

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
import torch
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
print("up", flush=True)
while True:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""


def run_suite(out: Path, name: str, device: str, *options: str, planted: bool = False) -> list[TestRecord]:
    """Run the suite once in a fresh process and read what it found."""
    results = out / f"{name}.jsonl"
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider", "--rootdir", str(SUITE)]
    command += ["--gpuperf-baselines", str(out / "baselines"), "--gpuperf-json", str(results)]
    command += ["--gpuperf-device", device, "--gpuperf-anchors", "off", *options]
    environment = {**os.environ, "PLANTED": str(int(planted)), "COLUMNS": "120"}
    start_s = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    (out / f"{name}.txt").write_text(done.stdout + done.stderr)
    print(f"{name}: exit {done.returncode}, {time.perf_counter() - start_s:.0f} s", flush=True)
    return list(read_results(results).tests) if results.exists() else []


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


def row_of(record: TestRecord) -> dict[str, object]:
    """Whether the first line names what was planted."""
    verdict = record.verdicts[0]
    first = verdict.causes[0] if verdict.causes else verdict.reason
    named = any(word in first for word in WORDS[record.key.test])
    row = {"test": record.key.test, "status": verdict.status, "change": verdict.change, "first": first, "named": named}
    return {**row, "causes": verdict.causes, "duration_s": record.duration_s}


def main() -> int:
    """Record, judge, plant, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    for number in (1, 2):
        run_suite(
            out, f"record-{number}", given.device, "--gpuperf-update", "--gpuperf-budget", "0" if number == 1 else "60"
        )
    unchanged = run_suite(out, "unchanged", given.device)
    rows = []
    for test in WORDS:
        with neighbour(given.device) if test == "test_neighbour" else nullcontext():
            records = run_suite(out, test, given.device, "--gpuperf-budget", "20", "-k", test, planted=True)
        rows += [row_of(record) for record in records]
    statuses = [verdict.status for record in unchanged for verdict in record.verdicts]
    found = {"rows": rows, "unchanged": statuses}
    (out / "planted.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(f"{row['test']:15} {row['status']:12} {'named ' if row['named'] else 'MISSED'} {row['first']}")
    print(f"unchanged code: {', '.join(statuses)}")
    print(f"named: {sum(bool(row['named']) for row in rows)} of {len(WORDS)}, 6 wanted")
    return 0 if sum(bool(row["named"]) for row in rows) >= 6 else 1


if __name__ == "__main__":
    sys.exit(main())
