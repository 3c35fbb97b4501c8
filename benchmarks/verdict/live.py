"""The gate at work on this GPU: unchanged code and planted slowdowns, each run a fresh pytest that confirms by itself.

    python benchmarks/verdict/live.py OUT_DIR [--baseline 3] [--same 14] [--planted 4]

Planted: 3 % in copy and softmax, 5 % in the large matrix product, 10 % in an end-to-end decode. Writes
OUT_DIR/live.json: for each run every test's values, one a process, with clock and temperature, its verdict, and the
seconds to it; prints one line a test.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_gpuperf.records import TestRecord
from pytest_gpuperf.report.results import read_results

SUITE = Path(__file__).parents[1] / "suite"
CHOSEN = "8192 or copy or softmax or add or decode_graph"
PLANTED = {"copy": 0.03, "softmax": 0.03, "matmul": 0.05, "decode": 0.10}
Run = dict[str, Any]


def run(scratch: Path, name: str, fractions: dict[str, float], chosen: str, *options: str) -> Run:
    """One pytest with everything that it starts: verdict, values and seconds of each test."""
    results = scratch / f"{name}.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", str(SUITE), "--rootdir", str(SUITE), "-c", os.devnull]
    command += ["-p", "no:cacheprovider", f"--gpuperf-baselines={scratch / 'baselines'}", f"--gpuperf-json={results}"]
    start_s = time.perf_counter()
    done = subprocess.run(
        [*command, "-k", chosen, *options],
        env={**os.environ, "GPUPERF_PLANTED": json.dumps(fractions)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    wall_s = time.perf_counter() - start_s
    if not results.exists():
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    found = read_results(results)
    tests = {record.key.test: of_test(record) for record in found.tests}
    return {"planted": fractions, "date": found.run.date, "wall_s": wall_s, "exit": done.returncode, "tests": tests}


def of_test(record: TestRecord) -> Run:
    """What is kept of one test; `value` is the first process's, `values` has all of them."""
    first, verdict = record.measurements[0], record.verdicts[0]
    runs = record.runs_of(first.metric)
    telemetry = first.telemetry
    return {
        "value": first.value,
        "values": [one.value for one in runs],
        "unit": first.unit,
        "time_s": first.time_s,
        "method": str(first.method),
        "spread": first.spread,
        "sm_clock_mhz": telemetry and telemetry.sm_clock_mhz,
        "temperature_c": telemetry and telemetry.temperature_c,
        "duration_s": record.duration_s,
        "seconds": record.duration_s + sum(rerun.duration_s for rerun in record.more),
        "verdict": verdict.status,
        "reason": verdict.reason,
        "change": verdict.change,
        "sees": verdict.minimum_detectable_effect,
        "device": record.devices,
    }


def summarize(runs: Sequence[Run], title: str) -> None:
    """One line a test."""
    print(title, f"({len(runs)} runs, {statistics.mean(r['wall_s'] for r in runs):.0f} s each)" if runs else "(none)")
    for name in sorted({name for one in runs for name in one["tests"]}):
        rows = [one["tests"][name] for one in runs if name in one["tests"]]
        values = [row["value"] for row in rows]
        cv = statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else float("nan")
        verdicts = [row["verdict"] for row in rows]
        tally = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
        changes = [row["change"] for row in rows if row["change"] is not None]
        span = f"{min(changes):+.2%} to {max(changes):+.2%}" if changes else "-"
        processes = statistics.mean(len(row["values"]) for row in rows)
        seconds = statistics.mean(row["seconds"] for row in rows)
        print(f"  {name:<18} CV {cv:7.3%}  {span:<20} {processes:.1f} processes {seconds:5.1f} s  {tally}")


def main() -> None:
    """Run everything; what is done is written after each run, so that an interrupted visit is not lost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline", type=int, default=3)
    parser.add_argument("--same", type=int, default=14)
    parser.add_argument("--planted", type=int, default=4)
    parser.add_argument("--anchors", default="off")
    parser.add_argument("-k", dest="chosen", default=CHOSEN)
    arguments = parser.parse_args()
    scratch = arguments.out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    out = arguments.out / "live.json"
    found: dict[str, list[Run]] = json.loads(out.read_text()) if out.exists() else {}
    plan: list[tuple[str, dict[str, float], tuple[str, ...], int]] = [
        ("baseline", {}, ("--gpuperf-update",), arguments.baseline),
        ("same", {}, (), arguments.same),
        ("planted", PLANTED, (), arguments.planted),
    ]
    for title, fractions, options, count in plan:
        runs = found.setdefault(title, [])
        for _ in range(count):
            name = f"{title}-{len(runs)}"
            runs.append(
                run(scratch, name, fractions, arguments.chosen, f"--gpuperf-anchors={arguments.anchors}", *options)
            )
            out.write_text(json.dumps(found))
        summarize(runs, title)


if __name__ == "__main__":
    main()
