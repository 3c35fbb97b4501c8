"""Lease cycles over eight fake devices by clients of one, two and eight, some of which are killed at any time.

    python benchmarks/leases/cycles.py --cycles 1000 --seed 1

It prints the leases by size, how long clients of each size waited, how many devices were held by two at once (found
from what the holders write down with the system's clock, not from the locks), and what was left at the end. Exit code
1 if there was a double lease or a leak.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_gpuperf.devices import Device, find_devices
from pytest_gpuperf.errors import LeaseTimeout
from pytest_gpuperf.lease import lease
from pytest_gpuperf.locks import is_held
from pytest_gpuperf.testing import FakeNvml, fake_gpu

#: Clients by the number of devices that each asks for.
CLIENTS = {1: 12, 2: 3, 8: 1}
#: A hold lasts up to this long, and there is nothing between two of them.
HOLD_S = 0.03
#: Mean time between two kills.
KILL_EVERY_S = 0.05
LIMIT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Hold:
    """One lease of one device: `end_s` of a holder that was killed is when the signal was sent."""

    device: int
    size: int
    wait_s: float
    begin_s: float
    end_s: float


@dataclass(kw_only=True)
class Client:
    """A process that leases over and over."""

    pid: int
    size: int
    log: Path
    killed_s: float | None = None


@dataclass(kw_only=True)
class Arena:
    """The clients, and where they lock and write."""

    folder: Path
    devices: tuple[Device, ...]
    chance: random.Random
    clients: list[Client] = field(default_factory=list)
    dead: list[Client] = field(default_factory=list)

    def start(self, size: int) -> None:
        """Fork a client: it has everything imported, so that it can be killed early in its first lease, too."""
        number = len(self.clients) + len(self.dead)
        log = self.folder / f"client-{number}.log"
        seed = self.chance.random()
        pid = os.fork()
        if pid == 0:
            _work(self.folder / "locks", self.devices, size, log, seed)
        self.clients.append(Client(pid=pid, size=size, log=log))

    def kill_one(self) -> None:
        """Kill a client wherever it is, and start another like it."""
        client = self.chance.choice(self.clients)
        client.killed_s = time.monotonic()
        os.kill(client.pid, signal.SIGKILL)
        os.waitpid(client.pid, 0)
        self.clients.remove(client)
        self.dead.append(client)
        self.start(client.size)

    def stop(self) -> None:
        """Ask all to end after the lease that they have or wait for, and wait."""
        (self.folder / "stop").touch()
        for client in self.clients:
            os.waitpid(client.pid, 0)


def _work(locks: Path, devices: tuple[Device, ...], size: int, log: Path, seed: float) -> None:
    chance = random.Random(seed)  # noqa: S311 - chance, not a secret
    sets = list(itertools.combinations(devices, size))
    code = 1
    try:
        with log.open("a", buffering=1) as file:
            while not (locks.parent / "stop").exists():
                asked_s = time.monotonic()
                with lease(sets, folder=locks, timeout_s=LIMIT_S) as lent:
                    begin_s = time.monotonic()
                    numbers = ",".join(str(device.index) for device in lent.devices)
                    file.write(f"begin {numbers} {begin_s - asked_s} {begin_s}\n")
                    time.sleep(chance.uniform(0, HOLD_S))
                    file.write(f"end {time.monotonic()}\n")
        code = 0
    finally:
        os._exit(code)


def holds_of(client: Client, *, until_s: float) -> Iterator[Hold]:
    """Read what a client wrote; a line that a kill cut off is left out."""
    text = client.log.read_text() if client.log.exists() else ""
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    for line, after in itertools.zip_longest(lines, lines[1:]):
        if line[0] == "begin":
            end_s = float(after[1]) if after else (client.killed_s or until_s)
            for device in line[1].split(","):
                wait_s, begin_s = float(line[2]), float(line[3])
                yield Hold(device=int(device), size=client.size, wait_s=wait_s, begin_s=begin_s, end_s=end_s)


def double_leases(holds: Sequence[Hold]) -> int:
    """Count the pairs of successive holds of one device that overlap."""
    ordered = sorted(holds, key=lambda hold: (hold.device, hold.begin_s))
    return sum(a.device == b.device and b.begin_s < a.end_s for a, b in itertools.pairwise(ordered))


def leaks(locks: Path, devices: tuple[Device, ...]) -> list[str]:
    """What is still held when everybody is gone, and what is left after one more lease of everything."""
    held = [path.name for path in locks.iterdir() if is_held(path)]
    try:
        with lease([devices], folder=locks, exclusive="host", timeout_s=5):
            pass
    except LeaseTimeout as error:
        held.append(str(error))
    return held + [path.name for path in locks.glob("ticket-*")]


def run(folder: Path, cycles: int, seed: int) -> tuple[Arena, float]:
    """Let clients lease until there were so many leases; gives the arena and the seconds that it took."""
    devices = find_devices(FakeNvml(*map(fake_gpu, range(8))), cuda_visible_devices=None)
    chance = random.Random(seed)  # noqa: S311 - chance, not a secret
    arena = Arena(folder=folder, devices=devices, chance=chance)
    (folder / "locks").mkdir()
    begin_s = time.monotonic()
    try:
        for size, count in CLIENTS.items():
            for _ in range(count):
                arena.start(size)
        while _leases(folder) < cycles and time.monotonic() - begin_s < LIMIT_S:
            time.sleep(arena.chance.expovariate(1 / KILL_EVERY_S))
            arena.kill_one()
    finally:
        arena.stop()
    return arena, time.monotonic() - begin_s


def _leases(folder: Path) -> int:
    return sum(path.read_text().count("begin") for path in folder.glob("client-*.log"))


def main() -> int:
    """Run, print, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000, help="leases of all sizes together (default: 1000)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpuperf-cycles-") as name, contextlib.suppress(KeyboardInterrupt):
        arena, duration_s = run(Path(name), given.cycles, given.seed)
        until_s = time.monotonic()
        holds = [hold for client in (*arena.dead, *arena.clients) for hold in holds_of(client, until_s=until_s)]
        left = leaks(Path(name) / "locks", arena.devices)
        print(f"{sum(1 / hold.size for hold in holds):.0f} leases in {duration_s:.1f} s, {len(arena.dead)} kills")
        print("devices  clients  leases  median wait  longest wait")
        for size, count in CLIENTS.items():
            waits = [hold.wait_s for hold in holds if hold.size == size] or [float("nan")]
            print(
                f"{size:7}  {count:7}  {len(waits) // size:6}  {statistics.median(waits):9.3f} s  {max(waits):10.3f} s"
            )
        print(f"double leases: {double_leases(holds)} (looked for in {len(holds)} holds of a device)")
        print(f"left at the end: {', '.join(left) or 'nothing'}")
        return 1 if double_leases(holds) or left else 0
    return 130


if __name__ == "__main__":
    sys.exit(main())
