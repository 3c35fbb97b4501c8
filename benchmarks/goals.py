"""Repeatability and detection on this GPU, in fresh processes, against a throw-away baseline.

    python benchmarks/goals.py OUT_DIR [--same 10] [--planted 10] [--baseline 4] [-k EXPRESSION]

Writes OUT_DIR/goals.json (every value and verdict) and prints one line a test: mean, CV over the processes, verdicts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pytest_gpuperf.report.results import read_results

SUITE = Path(__file__).parent / "suite"


def run(scratch: Path, number: int, planted: float, chosen: str, *options: str) -> dict[str, object]:
    """One fresh process: value, verdict, change, clock and seconds of each test."""
    results = scratch / f"{number}.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", str(SUITE), "--rootdir", str(SUITE), "-c", os.devnull]
    command += [
        "-p",
        "no:cacheprovider",
        "--gpuperf-budget=0",
        "--gpuperf-anchors=off",
        f"--gpuperf-baselines={scratch / 'baselines'}",
        f"--gpuperf-json={results}",
    ]
    fractions = {"copy": planted, "softmax": planted, "matmul": 1.5 * planted}
    environment = {**os.environ, "GPUPERF_PLANTED": json.dumps(fractions)}
    start_s = time.perf_counter()
    done = subprocess.run(
        [*command, "-k", chosen, *options], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    if not results.exists():
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    found = read_results(results)
    tests = {
        record.key.test: {
            "value": record.measurements[0].value,
            "unit": record.measurements[0].unit,
            "time_s": record.measurements[0].time_s,
            "method": str(record.measurements[0].method),
            "spread": record.measurements[0].spread,
            "unstable": record.measurements[0].unstable,
            "sm_clock_mhz": record.measurements[0].telemetry and record.measurements[0].telemetry.sm_clock_mhz,
            "temperature_c": record.measurements[0].telemetry and record.measurements[0].telemetry.temperature_c,
            "duration_s": record.duration_s,
            "verdict": record.verdicts[0].status,
            "change": record.verdicts[0].change,
            "sees": record.verdicts[0].minimum_detectable_effect,
            "device": record.devices,
        }
        for record in found.tests
    }
    return {"planted": planted, "wall_s": time.perf_counter() - start_s, "tests": tests}


def summarize(runs: list[dict[str, object]], title: str) -> None:
    """One line a test."""
    print(title)
    names = list(runs[0]["tests"]) if runs else []  # type: ignore[call-overload]
    for name in names:
        rows = [run["tests"][name] for run in runs]  # type: ignore[index]
        times = [row["time_s"] or 1 / row["value"] for row in rows]  # a rate as seconds per token
        cv = statistics.stdev(times) / statistics.mean(times) if len(times) > 1 else float("nan")
        verdicts = [row["verdict"] for row in rows]
        tally = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts)))
        changes = [row["change"] for row in rows if row["change"] is not None]
        span = f"{min(changes):+.2%} to {max(changes):+.2%}" if changes else "-"
        print(
            f"  {name:<18} {statistics.mean(times) * 1e6:10.3f} us  CV {cv:7.3%}  {span:<20} "
            f"sees {rows[0]['sees'] or 0:.2%}  {max(row['duration_s'] for row in rows):.1f} s  {tally}"
        )


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline", type=int, default=4)
    parser.add_argument("--same", type=int, default=10)
    parser.add_argument("--planted", type=int, default=0)
    parser.add_argument("-k", dest="chosen", default="")
    arguments = parser.parse_args()
    scratch = arguments.out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    base = [run(scratch, n, 0.0, arguments.chosen, "--gpuperf-update") for n in range(arguments.baseline)]
    same = [run(scratch, 100 + n, 0.0, arguments.chosen) for n in range(arguments.same)]
    slow = "test_matmul_8192 or test_copy or test_softmax"
    planted = [run(scratch, 200 + n, 0.02, slow) for n in range(arguments.planted)]
    for runs, title in ((base, "baseline"), (same, "same code"), (planted, "planted: 2 %, 8192^3 3 %")):
        summarize(runs, title)
    (arguments.out / "goals.json").write_text(json.dumps({"baseline": base, "same": same, "planted": planted}))


if __name__ == "__main__":
    main()
