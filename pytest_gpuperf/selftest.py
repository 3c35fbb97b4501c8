"""Proof that the gate works on this machine: the same code passes, planted slowdowns of known size are caught."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from pytest_gpuperf.errors import GpuperfError
from pytest_gpuperf.records import Record, TestRecord, Verdict
from pytest_gpuperf.report.results import read_results

#: Runs of unchanged code that make the throw-away baseline.
BASELINE_RUNS = 3
#: Work made larger by these fractions.
PLANTED = (0.02, 0.05, 0.10)
#: Environment variable by which the suite in `data/` is told what to plant.
SLOWDOWN_VARIABLE = "GPUPERF_SELFTEST_SLOWDOWN"
_ONE_RUN = "--gpuperf-budget=0"
_PROCESS_LIMIT_S = 180


class Outcome(Record, frozen=True, kw_only=True):
    """What one fresh process said: the planted slowdown as a fraction, and a verdict for each test."""

    planted: float
    verdicts: dict[str, Verdict]


class SelftestFailed(GpuperfError):
    """A process of the selftest did not measure anything."""


def selftest(folder: Path, *, device: str = "auto", report: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """Record a baseline in `folder`, judge the same code, then planted slowdowns, each in a fresh process.

    Args:
        folder: An empty folder, thrown away afterwards.
        device: As the option `--gpuperf-device`.
        report: Is told what is being done.

    Returns:
        The outcome of the same code (planted 0), then one for each slowdown of `PLANTED`.

    Raises:
        SelftestFailed: Nothing was measured; the message is the process's last output.
    """
    suite = folder / "test_selftest.py"
    suite.write_bytes(files("pytest_gpuperf").joinpath("data/selftest_suite.py").read_bytes())
    for count in range(1, BASELINE_RUNS + 1):
        report(f"baseline {count} of {BASELINE_RUNS}")
        _run(suite, device, 0.0, "--gpuperf-update", _ONE_RUN)
    outcomes = []
    for planted in (0.0, *PLANTED):
        report(f"{planted:.0%} planted" if planted else "the same code")
        # The same code is measured again before it is accused, as in any run; of what is planted one run must do.
        outcomes.append(_run(suite, device, planted, *([_ONE_RUN] if planted else [])))
    return outcomes


def _run(suite: Path, device: str, planted: float, *options: str) -> Outcome:
    """One fresh process of pytest."""
    folder = suite.parent
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "pytest", "-q", str(suite), "--rootdir", str(folder), "-c", os.devnull]
    arguments += ["-p", "no:cacheprovider", f"--gpuperf-device={device}", f"--gpuperf-json={results}", *options]
    arguments.append("--gpuperf-anchors=off")
    environment = {**os.environ, SLOWDOWN_VARIABLE: str(planted), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=_PROCESS_LIMIT_S, check=False
    )
    if not results.exists():
        raise SelftestFailed(f"The selftest measured nothing:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    return Outcome(
        planted=planted,
        verdicts={record.key.test: v for record in _by_name(read_results(results).tests) for v in record.verdicts},
    )


def _by_name(records: Sequence[TestRecord]) -> list[TestRecord]:
    """In an order that does not depend on which test was measured again."""
    return sorted(records, key=lambda record: record.key.test)


def is_proven(outcomes: list[Outcome]) -> bool:
    """Whether the same code was not red, and the largest slowdown was caught in every test."""
    same = {verdict.status for verdict in outcomes[0].verdicts.values()}
    largest = {verdict.status for verdict in outcomes[-1].verdicts.values()}
    is_complete = all(outcome.verdicts.keys() == outcomes[0].verdicts.keys() for outcome in outcomes)
    return is_complete and same <= {"PASS", "IMPROVED", "INCONCLUSIVE"} and largest == {"REGRESSED"}
