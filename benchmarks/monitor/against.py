"""`gpuperf monitor` against nvidia-smi and nvitop over the same time: what they say, and what saying it costs.

    python benchmarks/monitor/against.py [--seconds 60] [--interval 0.1] [--gpus 0] [--apart] [--json FILE] [--dry]

A load of known phases runs on each GPU meanwhile (idle, copy, product, five seconds each, torch if it is there). All
three read at the same rate, at once, so that they see the same; `--apart` gives each a time of its own, so that none
waits for another in the driver. Cost is that of the process in the window, after it has started. `--dry` tries all
this on fake GPUs.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pytest_gpuperf.machine import Machine
from pytest_gpuperf.testing import FakeNvml, fake_gpu
from pytest_gpuperf.trials.watch import chosen

#: Until all have started, and the load has its context.
START_S = 8.0
PHASE_S = 5.0
QUERY = "timestamp,uuid,utilization.gpu,memory.used,power.draw,temperature.gpu,clocks.sm,clocks.mem"

OURS = "from pytest_gpuperf.cli import main; main()"
OURS_DRY = """
from pytest_gpuperf import cli
from pytest_gpuperf.commands import host
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.nvml import GpuUsage
from pytest_gpuperf.testing import FakeNvml, fake_gpu
usages = [GpuUsage(busy_share=0.5, power_w=300.0, memory_used_bytes=2**30)]
energies_j = [1e6 + 1500 * n for n in range(9999)]  # 300 W, read every 5 s
host.Machine = lambda choice: Machine(choice, nvml=FakeNvml(fake_gpu(0), usages=usages, energies_j=energies_j))
cli.main()
"""

#: The third: nvitop's Python API at the same pace, by deadlines as ours.
NVITOP = """
import json, sys, time
from nvitop import Device
interval_s, devices = float(sys.argv[1]), [Device(uuid=uuid) for uuid in sys.argv[2:]]
begin_s, turn = time.monotonic(), 0
while True:
    for device in devices:
        with device.oneshot():
            row = {"at_s": time.time(), "uuid": device.uuid(), "busy_share": device.gpu_utilization() / 100,
                   "memory_used_bytes": device.memory_used(), "power_w": device.power_usage() / 1e3,
                   "temperature_c": device.temperature(), "sm_clock_mhz": device.sm_clock(),
                   "memory_clock_mhz": device.memory_clock()}
        print(json.dumps(row), flush=True)
    turn = max(turn + 1, int((time.monotonic() - begin_s) / interval_s) + 1)
    time.sleep(max(begin_s + turn * interval_s - time.monotonic(), 0))
"""

LOAD = """
import sys, time
import torch
device, phase_s = torch.device("cuda", int(sys.argv[1])), float(sys.argv[2])
a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
source = torch.randn(2**28, device=device)
target = torch.empty_like(source)
works = [lambda: time.sleep(0.01), lambda: target.copy_(source), lambda: torch.mm(a, a)]
while True:
    for work in works:
        end_s = time.monotonic() + phase_s
        while time.monotonic() < end_s:
            for _ in range(5):
                work()
            torch.cuda.synchronize(device)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One GPU at one time, whoever said so."""

    at_s: float
    uuid: str
    memory_used_bytes: float | None
    power_w: float | None
    energy_j: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What reads the GPUs, and how its output is understood."""

    name: str
    command: list[str]
    read: Callable[[str], Row | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one program said in the window, and what it cost. Energy and power are those of all GPUs together.

    Attributes:
        cpu_s: In the window.
        whole_cpu_s: With its start.
        energy_j: By the driver's counter where there is one, else by power over time.
    """

    name: str
    samples: int
    window_s: float
    cpu_s: float
    whole_cpu_s: float
    mean_memory_bytes: float | None
    energy_j: float | None
    problem: str | None = None

    @property
    def cost_s(self) -> float | None:
        return self.cpu_s / self.samples if self.samples else None


def programs(uuids: Sequence[str], interval_s: float, *, is_dry: bool) -> tuple[list[Program], list[str]]:
    """Those that are here, and why others are not."""
    interval = ["--interval", str(interval_s)]
    ours = [sys.executable, "-c", OURS_DRY if is_dry else OURS, "monitor", "--json", *interval, "--gpus"]
    found, missing = [Program(name="gpuperf monitor", command=[*ours, ",".join(uuids)], read=our_row)], []
    if smi := shutil.which("nvidia-smi"):
        # Its lines are to be in the file when it is ended.
        unbuffered = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []
        options = [f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", f"-lms={round(interval_s * 1e3)}"]
        found.append(
            Program(name="nvidia-smi", command=[*unbuffered, smi, *options, f"--id={','.join(uuids)}"], read=smi_row)
        )
    else:
        missing.append("nvidia-smi is not here: left out.")
    if importlib.util.find_spec("nvitop"):
        command = [sys.executable, "-c", NVITOP, str(interval_s), *uuids]
        found.append(Program(name="nvitop", command=command, read=nvitop_row))
    else:
        missing.append("nvitop is not installed: left out (pip install nvitop).")
    return found, missing


def our_row(line: str) -> Row | None:
    """A line of `gpuperf monitor --json`."""
    found = json.loads(line)
    if found["record"] != "sample":
        return None
    at_s = datetime.fromisoformat(found["date"]).timestamp()
    return Row(
        at_s=at_s,
        uuid=found["uuid"],
        memory_used_bytes=found["memory_used_bytes"],
        power_w=found["power_w"],
        energy_j=found["energy_j"],
    )


def smi_row(line: str) -> Row | None:
    """A line of nvidia-smi: local time, MiB, W."""
    cells = [cell.strip() for cell in line.split(",")]
    moment = datetime.strptime(cells[0], "%Y/%m/%d %H:%M:%S.%f").astimezone()
    memory_mib, power_w = _number(cells[3]), _number(cells[4])
    return Row(
        at_s=moment.timestamp(),
        uuid=cells[1],
        memory_used_bytes=None if memory_mib is None else memory_mib * 2**20,
        power_w=power_w,
    )


def nvitop_row(line: str) -> Row | None:
    """A line of the program above."""
    found = json.loads(line)
    memory, power_w = (value if isinstance(value, (int, float)) else None for value in _two(found))
    return Row(at_s=found["at_s"], uuid=found["uuid"], memory_used_bytes=memory, power_w=power_w)


def _two(found: dict[str, object]) -> tuple[object, object]:
    return found["memory_used_bytes"], found["power_w"]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def cpu_s(pid: int) -> float:
    """Time that all threads of a process have computed for."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total_ns += int(task.read_text().split()[0])
    return total_ns / 1e9


def watched(wanted: Sequence[Program], seconds: float, folder: Path) -> list[Found]:
    """Run programs at once, and read what they said in a window that begins when all have started."""
    running = []
    for program in wanted:
        output, errors = folder / f"{program.name}.out", folder / f"{program.name}.err"
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            running.append((program, subprocess.Popen(program.command, stdout=stdout, stderr=stderr), output, errors))
    try:
        time.sleep(START_S)
        before = [cpu_s(process.pid) for _, process, _, _ in running]
        begin_s = time.time()
        time.sleep(seconds)
        after = [cpu_s(process.pid) for _, process, _, _ in running]
        window = (begin_s, time.time())
    finally:
        whole = [_ended(process) for _, process, _, _ in running]
    found = []
    for place, (program, _, output, errors) in enumerate(running):
        used = (after[place] - before[place], whole[place])
        found.append(summed_up(program, output.read_text(), window, used, problem=errors.read_text()[-300:].strip()))
    return found


def _ended(process: "subprocess.Popen[bytes]") -> float:
    """End a process as Ctrl-C does; what it and its children have computed."""
    end_s = time.monotonic() + 10
    number = signal.SIGINT
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        time.sleep(0.3)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        number = signal.SIGKILL if time.monotonic() > end_s else signal.SIGINT


def summed_up(
    program: Program, text: str, window: tuple[float, float], used_s: tuple[float, float], *, problem: str
) -> Found:
    """What a program said in the window."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, IndexError):  # the last may be cut
            row = program.read(line)
            if row and window[0] <= row.at_s <= window[1]:
                rows.append(row)
    by_gpu = [[row for row in rows if row.uuid == uuid] for uuid in dict.fromkeys(row.uuid for row in rows)]
    window_s = window[1] - window[0]
    memories = [row.memory_used_bytes for row in rows if row.memory_used_bytes is not None]
    energies = [energy_of(one, window_s) for one in by_gpu]
    return Found(
        name=program.name,
        samples=len(rows),
        window_s=window_s,
        cpu_s=used_s[0],
        whole_cpu_s=used_s[1],
        mean_memory_bytes=sum(memories) / len(memories) if memories else None,
        energy_j=sum(known) if (known := [e for e in energies if e is not None]) and None not in energies else None,
        problem=(problem or "it said nothing") if not rows else None,
    )


def energy_of(rows: Sequence[Row], window_s: float) -> float | None:
    """Energy of one GPU in the window: between the first and the last reading of the counter, which ours has now and
    then; before, after, and without one, power over time, by trapezoids. The load comes in phases of 5 s, as the
    readings of the counter do: power between them may be far from that of the window.
    """
    span_s = rows[-1].at_s - rows[0].at_s
    if span_s <= 0:
        return None
    counted = [row for row in rows if row.energy_j is not None]
    if len(counted) < 2:
        joules = power_over_time(rows)
    else:
        first, last = counted[0], counted[-1]
        edges = [rows[: rows.index(first) + 1], rows[rows.index(last) :]]
        joules = sum((power_over_time(edge) or 0.0) for edge in edges) + (last.energy_j or 0) - (first.energy_j or 0)
    return None if joules is None else joules / span_s * window_s


def power_over_time(rows: Sequence[Row]) -> float | None:
    """Energy by trapezoids; `None`: no two readings of power in a row."""
    pairs = [(a, b) for a, b in itertools.pairwise(rows) if a.power_w is not None and b.power_w is not None]
    return sum(((a.power_w or 0) + (b.power_w or 0)) / 2 * (b.at_s - a.at_s) for a, b in pairs) if pairs else None


@contextlib.contextmanager
def load(indices: Sequence[int]) -> Iterator[str]:
    """Work of known phases on each GPU; in words, what there is."""
    if not indices or not importlib.util.find_spec("torch"):
        yield "no load: torch is not installed" if indices else "no load on fake GPUs"
        return
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(index), str(PHASE_S)],
            stderr=subprocess.DEVNULL,
            env={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ},  # as NVML counts
        )
        for index in indices
    ]
    try:
        time.sleep(3.0)
        alive = sum(worker.poll() is None for worker in workers)
        yield f"load on {alive} of {len(workers)} GPUs: idle, copy, product, {PHASE_S:g} s each"
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def report(found: Sequence[Found]) -> list[str]:
    """A line a program, and how the others differ from ours."""
    lines = [f"{'':<16} {'samples':>8} {'CPU':>9} {'of a core':>9} {'a sample':>9} {'memory':>11} {'energy':>10}"]
    for one in found:
        if one.problem:
            lines.append(f"{one.name:<16} {one.problem.splitlines()[-1]}")
            continue
        memory = "-" if one.mean_memory_bytes is None else f"{one.mean_memory_bytes / 2**20:.1f} MiB"
        energy = "-" if one.energy_j is None else f"{one.energy_j:.0f} J"
        cost = "-" if one.cost_s is None else f"{one.cost_s * 1e6:.0f} us"
        lines.append(
            f"{one.name:<16} {one.samples:>8} {one.cpu_s:>7.2f} s {one.cpu_s / one.window_s:>9.2%} {cost:>9} "
            f"{memory:>11} {energy:>10}"
        )
    ours, *others = found
    both = [one for one in others if not one.problem and not ours.problem]
    return lines + [f"{one.name} against ours: {'; '.join(differences(ours, one))}" for one in both]


def differences(ours: Found, other: Found) -> Iterator[str]:
    """How another program differs: its values relative to ours."""
    if ours.mean_memory_bytes is not None and other.mean_memory_bytes is not None:
        yield f"memory {(other.mean_memory_bytes - ours.mean_memory_bytes) / 2**20:+.2f} MiB"
    if ours.energy_j and other.energy_j:
        yield f"energy {other.energy_j / ours.energy_j - 1:+.2%}"
    if ours.cost_s and other.cost_s:
        yield f"a sample costs {other.cost_s / ours.cost_s:.2f} times as much"


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--interval", type=float, default=0.1)
    parser.add_argument("--gpus", help="CUDA's numbers or UUIDs; default: all")
    parser.add_argument("--apart", action="store_true", help="one after the other")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--dry", action="store_true", help="fake GPUs, no load")
    options = parser.parse_args()

    machine = Machine("auto", nvml=FakeNvml(fake_gpu(0))) if options.dry else Machine("auto")
    if not machine.gpus:
        sys.exit(f"There is no GPU: {machine.gpu_problem} Try --dry.")
    devices = chosen(machine.gpus, options.gpus)
    wanted, missing = programs([device.uuid for device in devices], options.interval, is_dry=options.dry)
    print(f"{len(devices)} x {devices[0].name}, every {options.interval:g} s for {options.seconds:g} s")
    print(*missing, sep="\n")
    groups = [[one] for one in wanted] if options.apart else [wanted]
    indices = [] if options.dry else [device.index for device in devices]
    with tempfile.TemporaryDirectory(prefix="gpuperf-against-") as folder, load(indices) as words:
        print(words, flush=True)
        found = [one for group in groups for one in watched(group, options.seconds, Path(folder))]
    print(*report(found), sep="\n")
    if options.json:
        figures = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "gpus": [device.name for device in devices],
            "interval_s": options.interval,
            "load": words,
            "programs": [{**asdict(one), "cost_s": one.cost_s} for one in found],
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
