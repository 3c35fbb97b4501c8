"""One worker a GPU against one after the other: speed-up, whether two tests ever share a GPU, and the same results.

    python benchmarks/leases/eight_gpus.py --tests 64 --seconds 5 --output eight_gpus.json
    python benchmarks/leases/eight_gpus.py --dry

It runs a few of the tests on each GPU alone, then all with `-n auto`, then tests of one, two and all GPUs mixed, with
NVML watched from outside at 10 Hz. Any number of GPUs will do; with 4 GPUs and 32 tests of 5 s it takes about 4 min.
`--dry` pretends four GPUs and sleeps. Exit code 1 if a GPU was shared, a test failed, or a run did not end.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pytest_gpuperf.devices import find_devices
from pytest_gpuperf.errors import GpuperfError
from pytest_gpuperf.nvml import Nvml, open_nvml
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.report.results import read_results
from pytest_gpuperf.testing import FakeNvml, fake_gpu

HERE = Path(__file__).parent
SUITE = HERE / "suite"
ROOT = HERE.parents[1]
sys.path.insert(0, str(SUITE))

import work  # noqa: E402 - of the suite, which pytest finds in the same way

SAMPLE_EVERY_S = 0.1
#: Time for a process to start, import torch and make its contexts.
START_S = 90.0
#: What a test of a single GPU may differ from the serial runs on the same GPU.
NOISE = 0.02


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one GPU."""

    time_s: float
    uuid: str
    processes: int | None
    memory_bytes: int | None
    busy_share: float | None


class Test(msgspec.Struct, frozen=True, kw_only=True):
    """One test of a run."""

    name: str
    device: tuple[str, ...]
    worker: str | None
    time_s: float
    duration_s: float


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One start of pytest, as it was seen from outside.

    Attributes:
        wall_s: From its start to its end.
        overlaps: Pairs of tests that held one GPU at the same time, by what they wrote down themselves.
        shared_samples: Looks that found more than one process on a GPU; `None` where the driver shows no processes.
    """

    name: str
    wall_s: float
    ending: str
    tail: str
    tests: tuple[Test, ...]
    overlaps: int
    longest_hold_gap_s: float
    shared_samples: int | None
    samples: tuple[Sample, ...]


class Bench:
    """What all phases share: the GPUs, the folder for files, and how much work a test is."""

    def __init__(self, folder: Path, nvml: Nvml, *, seconds: float, is_dry: bool) -> None:
        self.folder = folder
        self.nvml = nvml
        self.is_dry = is_dry
        self.seconds = seconds
        self.gpus = find_devices(nvml, cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.block_s = work.DRY_BLOCK_S if is_dry else self._calibrated()
        self._numbers = itertools.count()

    def _calibrated(self) -> float:
        done = run_group([sys.executable, str(SUITE / "work.py")], timeout_s=START_S, environment=self._environment({}))
        try:
            return float(done.tail.split()[-1])
        except (ValueError, IndexError):
            raise SystemExit(f"The work {done.in_words}:\n{done.tail}") from None

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), str(SUITE), os.environ.get("PYTHONPATH"))))
        dry = {work.DRY: "1"} if self.is_dry else {}
        locks = {"GPUPERF_LOCK_DIR": str(self.folder / "locks"), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return {**os.environ, "PYTHONPATH": path, **dry, **locks, **more}

    def run(self, name: str, module: str, tests: int, *options: str, seconds: float, visible: str | None) -> Phase:
        """Start pytest once and watch it."""
        number = next(self._numbers)
        results, notes = self.folder / f"{number}.jsonl", self.folder / f"notes-{number}"
        notes.mkdir()
        blocks = max(round(seconds / self.block_s) - 3, 1)
        asked = {work.TESTS: tests, work.BLOCKS: blocks, work.GPUS: len(self.gpus), work.NOTES: notes}
        variables = {key: str(value) for key, value in asked.items()}
        variables |= {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
        command = [sys.executable, "-m", "pytest", str(SUITE / module), "--rootdir", str(SUITE), "-c", os.devnull]
        command += [
            *_plugin(),
            "-p",
            "arena",
            "-q",
            "-p",
            "no:cacheprovider",
            "--gpuperf-budget=0",
            "--gpuperf-anchors=off",
        ]
        command += [f"--gpuperf-baselines={self.folder}/baselines", f"--gpuperf-json={results}", *options]
        limit_s = START_S + 2 * tests * seconds
        with self._watched() as samples:
            begin_s = time.monotonic()
            done = run_group(command, timeout_s=limit_s, environment=self._environment(variables))
            wall_s = time.monotonic() - begin_s
        holds = holds_in(notes)
        return Phase(
            name=name,
            wall_s=wall_s,
            ending=done.in_words,
            tail=done.tail[-1500:] if done.code else "",
            tests=_tests_in(results),
            overlaps=overlaps_of(holds),
            longest_hold_gap_s=_longest_gap_s(holds),
            shared_samples=_shared(samples),
            samples=tuple(samples),
        )

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Sample]]:
        """Look at all GPUs ten times a second."""
        samples: list[Sample] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_EVERY_S):
                for gpu in self.gpus:
                    with contextlib.suppress(GpuperfError):
                        samples.append(_look(self.nvml, gpu.uuid))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            over.set()
            thread.join(timeout=5)


def _plugin() -> list[str]:
    installed = importlib.metadata.entry_points(group="pytest11", name="gpuperf")
    return [] if installed else ["-p", "pytest_gpuperf.plugin"]


def _look(nvml: Nvml, uuid: str) -> Sample:
    state, usage = nvml.state(uuid), nvml.usage(uuid)
    return Sample(
        time_s=time.monotonic(),
        uuid=uuid,
        processes=None if state.process_pids is None else len(state.process_pids),
        memory_bytes=state.memory_used_bytes,
        busy_share=usage.busy_share,
    )


def _shared(samples: Sequence[Sample]) -> int | None:
    seen = [one.processes for one in samples if one.processes is not None]
    return sum(count > 1 for count in seen) if any(seen) else None


def _tests_in(path: Path) -> tuple[Test, ...]:
    try:
        records = read_results(path).tests
    except GpuperfError:
        return ()
    return tuple(
        Test(
            name=one.key.test,
            device=one.devices,
            worker=one.worker,
            time_s=one.measurements[0].value,
            duration_s=one.duration_s,
        )
        for one in records
    )


def holds_in(notes: Path) -> list[tuple[str, float, float]]:
    """UUID, begin and end of each use of a GPU; one that never ended lasts for ever."""
    found = []
    for path in notes.iterdir():
        lines = [line.split() for line in path.read_text().splitlines()]
        for line, after in itertools.zip_longest(lines, lines[1:]):
            if line[0] == "begin":
                end_s = float(after[1]) if after and after[0] == "end" else float("inf")
                found += [(uuid, float(line[1]), end_s) for uuid in line[2].split(",")]
    return sorted(found)


def overlaps_of(holds: Sequence[tuple[str, float, float]]) -> int:
    """Count successive uses of one GPU of which the second begins before the first ends."""
    return sum(a[0] == b[0] and b[1] < a[2] for a, b in itertools.pairwise(holds))


def _longest_gap_s(holds: Sequence[tuple[str, float, float]]) -> float:
    return max((b[1] - a[2] for a, b in itertools.pairwise(holds) if a[0] == b[0]), default=0.0)


def ratios_of(alone: Sequence[Test], together: Sequence[Test]) -> dict[str, float]:
    """Test -> its median over that of the serial tests on the same GPU."""
    usual: dict[tuple[str, ...], list[float]] = {}
    for test in alone:
        usual.setdefault(test.device, []).append(test.time_s)
    return {one.name: one.time_s / statistics.median(usual[one.device]) for one in together if one.device in usual}


def summary_of(bench: Bench, alone: Sequence[Phase], together: Phase, mixed: Phase) -> dict[str, Any]:
    """The figures that the benchmark is for."""
    serial = [test for phase in alone for test in phase.tests]
    test_s = statistics.mean(test.duration_s for test in serial) if serial else float("nan")
    start_s = statistics.median(phase.wall_s - sum(test.duration_s for test in phase.tests) for phase in alone)
    ratios = ratios_of(serial, together.tests)
    serial_s = start_s + test_s * len(together.tests)
    return {
        "gpus": [gpu.name for gpu in bench.gpus],
        "tests": len(together.tests),
        "test_s": test_s,
        "start_s": start_s,
        "serial_s": serial_s,
        "parallel_s": together.wall_s,
        "speedup": serial_s / together.wall_s,
        "workers": len({test.worker for test in together.tests}),
        "ratios": ratios,
        "beyond_noise": sorted(name for name, ratio in ratios.items() if abs(ratio - 1) > NOISE),
        "overlaps": {phase.name: phase.overlaps for phase in (*alone, together, mixed)},
        "shared_samples": {phase.name: phase.shared_samples for phase in (*alone, together, mixed)},
        "mixed_tests": len(mixed.tests),
        "mixed_s": mixed.wall_s,
    }


def lines_of(summary: dict[str, Any], phases: Sequence[Phase]) -> Iterator[str]:
    """The figures in words."""
    names = summary["gpus"]
    tests = f"{summary['tests']} tests of {summary['test_s']:.2f} s"
    yield f"{len(names)} x {names[0]}: {tests}, {summary['workers']} workers"
    yield (
        f"one after the other {summary['serial_s']:.1f} s (start {summary['start_s']:.1f} s, from a few on each GPU), "
        f"-n auto {summary['parallel_s']:.1f} s: {summary['speedup']:.2f} times the speed"
    )
    ratios = sorted(summary["ratios"].values())
    if ratios:
        yield (
            f"median time against the same GPU alone: {ratios[0]:.4f} to {ratios[-1]:.4f}, median "
            f"{statistics.median(ratios):.4f}; {len(summary['beyond_noise'])} of {len(ratios)} more than "
            f"{NOISE:.0%} off"
        )
    yield f"mixed: {summary['mixed_tests']} tests in {summary['mixed_s']:.1f} s"
    for phase in phases:
        seen = "processes not shown by the driver" if phase.shared_samples is None else f"{phase.shared_samples} shared"
        yield (
            f"  {phase.name}: {phase.ending}, {len(phase.tests)} tests, {phase.wall_s:.1f} s, {phase.overlaps} "
            f"overlapping holds, {len(phase.samples)} looks by NVML ({seen})"
        )
        yield from (f"    {line}" for line in phase.tail.splitlines()[-15:])


def is_good(phases: Sequence[Phase], wanted: Sequence[int]) -> bool:
    """Whether everything ran, and no GPU was shared; contexts that tests of several GPUs leave behind are none."""
    single = [phase for phase in phases if phase.name != "mixed"]
    return (
        all(len(phase.tests) == tests and not phase.tail for phase, tests in zip(phases, wanted, strict=True))
        and not any(phase.overlaps for phase in phases)
        and not any(phase.shared_samples for phase in single)
    )


def _driver(*, is_dry: bool) -> Nvml:
    if is_dry:
        return FakeNvml(*map(fake_gpu, range(4)))
    try:
        return open_nvml()
    except GpuperfError as error:
        raise SystemExit(str(error)) from None


def main() -> int:
    """Run all phases, print, write, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=32, help="tests of one GPU (default: 32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each (default: 5)")
    parser.add_argument("--alone", type=int, default=2, help="tests to run alone on each GPU (default: 2)")
    parser.add_argument("--mixed", type=int, default=24, help="mixed tests, of 1 s (default: 24)")
    parser.add_argument("--output", type=Path, help="JSON file for all that was seen")
    parser.add_argument("--dry", action="store_true", help="four pretended GPUs, sleep for work")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuperf-leases-") as name:
        bench = Bench(Path(name), _driver(is_dry=given.dry), seconds=given.seconds, is_dry=given.dry)
        if not bench.gpus:
            raise SystemExit("There is no GPU here. Try --dry.")
        one = "test_many.py"
        alone = [
            bench.run(f"alone on GPU {i}", one, given.alone, seconds=given.seconds, visible=gpu.uuid)
            for i, gpu in enumerate(bench.gpus)
        ]
        spread = ("-n", "auto", "--maxschedchunk=1")
        visible = ",".join(gpu.uuid for gpu in bench.gpus)
        together = bench.run("together", one, given.tests, *spread, seconds=given.seconds, visible=visible)
        mixed = bench.run("mixed", "test_mixed.py", given.mixed, *spread, seconds=1.0, visible=visible)
    phases = (*alone, together, mixed)
    summary = summary_of(bench, alone, together, mixed)
    for line in lines_of(summary, phases):
        print(line)
    if given.output:
        given.output.write_text(
            json.dumps({"summary": summary, "phases": msgspec.to_builtins(phases)}, indent=1) + "\n"
        )
    return 0 if is_good(phases, [*[given.alone] * len(alone), given.tests, given.mixed]) else 1


if __name__ == "__main__":
    sys.exit(main())
