"""One worker a GPU against one after the other: speed-up, whether two tests ever share a GPU, and the same results.

    python benchmarks/leases/eight_gpus.py --tests 64 --seconds 5 --output eight_gpus.json
    python benchmarks/leases/eight_gpus.py --dry

It runs a few of the tests on each GPU alone, then all with `-n auto`, then tests of one, two and all GPUs mixed, with
NVML watched from outside at 10 Hz: more than one process on a GPU, or, as a container may not see processes, more
memory in use than one test takes. Of the mixed tests it says how long those of each size waited. Any number of GPUs
will do; with 4 GPUs and 32 tests of 5 s it takes about 4 min, and never longer than `--limit`. `--dry` pretends four
GPUs and sleeps. Exit code 1 if a GPU was shared, a test failed, a worker was missing, or a run did not end.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
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
from pytest_gpuperf.trials.ab import interrupted_by_sigterm

HERE = Path(__file__).parent
SUITE = HERE / "suite"
ROOT = HERE.parents[1]
sys.path.insert(0, str(SUITE))

import work  # noqa: E402 - of the suite, which pytest finds in the same way

SAMPLE_EVERY_S = 0.1
#: Time for a process to start, import torch and make its contexts.
START_S = 120.0
#: What a test of a single GPU may differ from the serial runs on the same GPU.
NOISE = 0.02
#: A second process takes more memory than this share of what one test takes: its context alone has some 500 MB.
MORE_MEMORY = 0.5


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one GPU; `processes` that were there before the benchmark do not count."""

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


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """How long one test waited for its GPUs."""

    gpus: int
    wait_s: float


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One start of pytest, as it was seen from outside.

    Attributes:
        wall_s: From its start to its end.
        tests_s: From when the first test's devices were ready to the end of the last test.
        overlaps: Pairs of tests that held one GPU at the same time, by what they wrote down themselves.
        shared_samples: Looks that found more than one process on a GPU; `None` where the driver shows no processes.
    """

    name: str
    wall_s: float
    tests_s: float
    ending: str
    tail: str
    tests: tuple[Test, ...]
    overlaps: int
    shared_samples: int | None
    samples: tuple[Sample, ...]
    waits: tuple[Wait, ...] = ()


class Bench:
    """What all phases share: the GPUs, the folder for files, how much work a test is, and the time that is left."""

    def __init__(self, folder: Path, nvml: Nvml, *, limit_s: float, is_dry: bool) -> None:
        self.folder = folder
        self.nvml = nvml
        self.is_dry = is_dry
        self._end_s = time.monotonic() + limit_s
        self.gpus = find_devices(nvml, cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"))
        if not self.gpus:
            raise SystemExit("There is no GPU here. Try --dry.")
        self._before = {gpu.uuid: frozenset(nvml.process_pids(gpu.uuid) or ()) for gpu in self.gpus}
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
        limit_s = max(min(START_S + 2 * tests * seconds, self._end_s - time.monotonic()), 1.0)
        with self._watched() as samples:
            begin_s = time.monotonic()
            done = run_group(command, timeout_s=limit_s, environment=self._environment(variables))
            wall_s = time.monotonic() - begin_s
        return Phase(
            name=name,
            wall_s=wall_s,
            tests_s=span_s_in(notes),
            ending=done.in_words,
            tail="" if done.code == 0 else done.tail[-1500:] or "It printed nothing.",
            tests=_tests_in(results),
            overlaps=overlaps_of(holds_in(notes)),
            shared_samples=_shared(samples),
            samples=tuple(samples),
            waits=waits_in(notes),
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
                        samples.append(_look(self.nvml, gpu.uuid, self._before[gpu.uuid]))

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


def _look(nvml: Nvml, uuid: str, before: frozenset[int]) -> Sample:
    pids, usage = nvml.process_pids(uuid), nvml.usage(uuid)
    return Sample(
        time_s=time.monotonic(),
        uuid=uuid,
        processes=None if pids is None else len(set(pids) - before),
        memory_bytes=usage.memory_used_bytes,
        busy_share=usage.busy_share,
    )


def _shared(samples: Sequence[Sample]) -> int | None:
    seen = [one.processes for one in samples if one.processes is not None]
    return sum(count > 1 for count in seen) if any(seen) else None


def crowded(alone: Sequence[Sample], together: Sequence[Sample]) -> int | None:
    """Count looks that found more memory in use on a GPU than one test can have taken; `None`: it was never seen."""
    limits: dict[str, float] = {}
    for uuid in {one.uuid for one in alone}:
        used = [one.memory_bytes for one in alone if one.uuid == uuid and one.memory_bytes is not None]
        if used and max(used) > min(used):
            limits[uuid] = max(used) + MORE_MEMORY * (max(used) - min(used))
    seen = [one for one in together if one.uuid in limits and one.memory_bytes is not None]
    return sum((one.memory_bytes or 0) > limits[one.uuid] for one in seen) if seen else None


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
        lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("ready")]
        for line, after in itertools.zip_longest(lines, lines[1:]):
            if line[0] == "begin":
                end_s = float(after[1]) if after and after[0] == "end" else float("inf")
                found += [(uuid, float(line[1]), end_s) for uuid in line[2].split(",")]
    return sorted(found)


def waits_in(notes: Path) -> tuple[Wait, ...]:
    """How long each test waited, from when its setup began until it held its GPUs."""
    lines = [line.split() for path in sorted(notes.iterdir()) for line in path.read_text().splitlines()]
    begun = [line for line in lines if line[0] == "begin" and len(line) == 5]
    return tuple(Wait(gpus=len(line[2].split(",")), wait_s=float(line[4])) for line in begun)


def span_s_in(notes: Path) -> float:
    """Seconds from the first test that was ready to the end of the last; 0 without one."""
    lines = [line.split() for path in notes.iterdir() for line in path.read_text().splitlines()]
    ready = [float(line[1]) for line in lines if line[0] == "ready"]
    ended = [float(line[1]) for line in lines if line[0] == "end"]
    return max(ended) - min(ready) if ready and ended else 0.0


def overlaps_of(holds: Sequence[tuple[str, float, float]]) -> int:
    """Count successive uses of one GPU of which the second begins before the first ends."""
    return sum(a[0] == b[0] and b[1] < a[2] for a, b in itertools.pairwise(holds))


def ratios_of(alone: Sequence[Test], together: Sequence[Test]) -> dict[str, float]:
    """Test -> its median over that of the serial tests on the same GPU."""
    usual: dict[tuple[str, ...], list[float]] = {}
    for test in alone:
        usual.setdefault(test.device, []).append(test.time_s)
    return {one.name: one.time_s / statistics.median(usual[one.device]) for one in together if one.device in usual}


def summary_of(bench: Bench, alone: Sequence[Phase], together: Phase, mixed: Phase) -> dict[str, Any]:
    """The figures that the benchmark is for."""
    serial = [test for phase in alone for test in phase.tests]
    test_s = statistics.mean(test.duration_s for test in serial)
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
        "speedup_of_tests": test_s * len(together.tests) / together.tests_s if together.tests_s else None,
        "workers": len({test.worker for test in together.tests}),
        "ratios": ratios,
        "beyond_noise": sorted(name for name, ratio in ratios.items() if abs(ratio - 1) > NOISE),
        "overlaps": {phase.name: phase.overlaps for phase in (*alone, together, mixed)},
        "shared_samples": {phase.name: phase.shared_samples for phase in (*alone, together, mixed)},
        "crowded_samples": crowded([one for phase in alone for one in phase.samples], together.samples),
        "mixed_tests": len(mixed.tests),
        "mixed_s": mixed.wall_s,
        "waits_s": waits_by_size(mixed.waits),
    }


def waits_by_size(waits: Sequence[Wait]) -> dict[int, list[float]]:
    """Number of GPUs -> how long the tests waited that asked for so many."""
    return {size: [one.wait_s for one in waits if one.gpus == size] for size in sorted({one.gpus for one in waits})}


def lines_of(summary: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    names = summary["gpus"]
    tests = f"{summary['tests']} tests of {summary['test_s']:.2f} s"
    yield f"{len(names)} x {names[0]}: {tests}, {summary['workers']} workers"
    yield (
        f"one after the other {summary['serial_s']:.1f} s (start {summary['start_s']:.1f} s, from a few on each GPU), "
        f"-n auto {summary['parallel_s']:.1f} s: {summary['speedup']:.2f} times the speed"
    )
    if summary["speedup_of_tests"]:
        yield f"without the start: {summary['speedup_of_tests']:.2f} times the speed"
    ratios = sorted(summary["ratios"].values())
    if ratios:
        yield (
            f"median time against the same GPU alone: {ratios[0]:.4f} to {ratios[-1]:.4f}, median "
            f"{statistics.median(ratios):.4f}; {len(summary['beyond_noise'])} of {len(ratios)} more than "
            f"{NOISE:.0%} off"
        )
        yield from (f"  {name}: {summary['ratios'][name]:.4f}" for name in summary["beyond_noise"])
    yield f"mixed: {summary['mixed_tests']} tests in {summary['mixed_s']:.1f} s"
    for size, waits in summary["waits_s"].items():
        median_s, longest_s = statistics.median(waits), max(waits)
        asking = f"{len(waits)} for {size} GPU{'s' * (size > 1)}"
        yield f"  {asking} waited {median_s:.2f} s in the median, {longest_s:.2f} s at most"
    crowds = summary["crowded_samples"]
    yield f"together, looks with more memory in use than one test takes: {'not known' if crowds is None else crowds}"


def lines_on(phases: Sequence[Phase]) -> Iterator[str]:
    """What became of each start of pytest."""
    for phase in phases:
        seen = "processes not shown by the driver" if phase.shared_samples is None else f"{phase.shared_samples} shared"
        yield (
            f"  {phase.name}: {phase.ending}, {len(phase.tests)} tests, {phase.wall_s:.1f} s, {phase.overlaps} "
            f"overlapping holds, {len(phase.samples)} looks by NVML ({seen})"
        )
        yield from (f"    {line}" for line in phase.tail.splitlines()[-15:])


def is_good(phase: Phase, tests: int) -> bool:
    """Whether everything ran, and no GPU was shared; contexts that tests of several GPUs leave behind are none."""
    is_shared = phase.overlaps or (phase.name != "mixed" and phase.shared_samples)
    return len(phase.tests) == tests and not phase.tail and not is_shared


def _driver(*, is_dry: bool) -> Nvml:
    if is_dry:
        return FakeNvml(*map(fake_gpu, range(4)))
    try:
        return open_nvml()
    except GpuperfError as error:
        raise SystemExit(str(error)) from None


def check_packages(*, is_dry: bool) -> None:
    """Say at once what would otherwise be missed when the first phases are over."""
    wanted = ["xdist", "pynvml", *([] if is_dry else ["torch"])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} lacks {', '.join(missing)}: pip install pytest-xdist nvidia-ml-py torch")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=32, help="tests of one GPU (default: 32)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each (default: 5)")
    parser.add_argument("--alone", type=int, default=2, help="tests to run alone on each GPU (default: 2)")
    parser.add_argument("--mixed", type=int, default=24, help="mixed tests, of 1 s (default: 24)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all of it (default: 540)")
    parser.add_argument("--output", type=Path, help="JSON file for all that was seen")
    parser.add_argument("--dry", action="store_true", help="four pretended GPUs, sleep for work")
    return parser.parse_args()


def phases_of(bench: Bench, given: argparse.Namespace) -> Iterator[tuple[Phase, bool]]:
    """Run one phase after the other, with whether it went well; without good serial runs nothing is compared."""
    one, are_good = "test_many.py", True
    for number, gpu in enumerate(bench.gpus):
        name = f"alone on GPU {number}"
        phase = bench.run(name, one, given.alone, seconds=given.seconds, visible=gpu.uuid)
        are_good = is_good(phase, given.alone)
        yield phase, are_good
        if not are_good:
            return
    spread = ("-n", "auto", "--maxschedchunk=1")
    visible = ",".join(gpu.uuid for gpu in bench.gpus)
    together = bench.run("together", one, given.tests, *spread, seconds=given.seconds, visible=visible)
    yield together, is_good(together, given.tests)
    mixed = bench.run("mixed", "test_mixed.py", given.mixed, *spread, seconds=1.0, visible=visible)
    yield mixed, is_good(mixed, given.mixed)


def write(path: Path | None, phases: Sequence[Phase], summary: dict[str, Any] | None) -> None:
    """Write all that was seen so far: what ends the benchmark from outside leaves that."""
    if path is not None:
        found = {"summary": summary, "phases": msgspec.to_builtins(phases)}
        path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Run all phases, print, write, and say by the exit code whether all is well."""
    given = arguments()
    check_packages(is_dry=given.dry)
    phases, are_good = [], True
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="gpuperf-leases-") as folder:
        bench = Bench(Path(folder), _driver(is_dry=given.dry), limit_s=given.limit, is_dry=given.dry)
        for phase, went_well in phases_of(bench, given):
            phases.append(phase)
            are_good &= went_well
            write(given.output, phases, None)
            print(*lines_on([phase]), sep="\n", flush=True)
    if len(phases) == len(bench.gpus) + 2:
        *alone, together, mixed = phases
        summary = summary_of(bench, alone, together, mixed)
        are_good &= summary["workers"] == min(len(bench.gpus), given.tests) and not summary["crowded_samples"]
        print(*lines_of(summary), sep="\n")
        write(given.output, phases, summary)
    return 0 if are_good else 1


if __name__ == "__main__":
    sys.exit(main())
