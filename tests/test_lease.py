"""Leases between real processes: never two on one device, nobody starved, nothing held by the dead; a safe folder."""

import errno
import fcntl
import itertools
import json
import linecache
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import pytest

from pytest_gpuperf import lease as lease_module
from pytest_gpuperf.devices import Device, cpu_device, find_devices
from pytest_gpuperf.errors import DeviceError, LeaseTimeout
from pytest_gpuperf.lease import Lease, claim_of, holder_of, is_free, lease, lease_patiently, lock_folder, lock_path
from pytest_gpuperf.locks import is_held, try_lock
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.testing import FakeNvml, fake_gpu

A, B, C = find_devices(FakeNvml(*map(fake_gpu, range(3))), cuda_visible_devices=None)
_DIVIDED = fake_gpu(7, mig_enabled=True)
_PARTS = [fake_gpu(index, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid=f"MIG-{index}") for index in range(2)]
PART, OTHER_PART = find_devices(
    FakeNvml(_DIVIDED, instances={_DIVIDED.uuid: _PARTS}), cuda_visible_devices="MIG-0,MIG-1"
)
[WHOLE] = find_devices(FakeNvml(fake_gpu(7)), cuda_visible_devices=None)

#: Leases over and over, until there is a file `stop`, and writes down when it held what.
WORKER = """
import sys, time
from pathlib import Path
from pytest_gpuperf.devices import find_devices
from pytest_gpuperf.lease import lease
from pytest_gpuperf.testing import FakeNvml, fake_gpu

folder, wanted, hold_s, times = Path(sys.argv[1]), sys.argv[2].split(","), float(sys.argv[3]), int(sys.argv[4])
devices = find_devices(FakeNvml(fake_gpu(0), fake_gpu(1)), cuda_visible_devices=None)
sets = [tuple(devices[int(index)] for index in one) for one in wanted]
for _ in range(times):
    if (folder / "stop").exists():
        break
    with lease(sets, folder=folder, timeout_s=30) as held, (folder / "log").open("a", buffering=1) as log:
        begin_s = time.monotonic()
        log.write(f"holds {held.devices[0].index}\\n")
        time.sleep(hold_s)
        end_s = time.monotonic()
        log.write("".join(f"held {device.index} {begin_s} {end_s}\\n" for device in held.devices))
"""

#: Leases the device once as a user without rights.
AS_NOBODY = """
import os
from pytest_gpuperf.devices import find_devices
from pytest_gpuperf.lease import lease, lock_folder
from pytest_gpuperf.testing import FakeNvml, fake_gpu

a, b = find_devices(FakeNvml(fake_gpu(0), fake_gpu(1)), cuda_visible_devices=None)
with lease([(b,)], timeout_s=5):  # imports what is imported late
    pass
os.setuid(65534)
with lease([(a,)], timeout_s=5):
    print("leased")
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start workers, and end them when the test ends."""
    workers: list[subprocess.Popen[bytes]] = []

    def start_one(wanted: str, *, hold_s: float, times: int = 1) -> "subprocess.Popen[bytes]":
        arguments = [str(tmp_path), wanted, str(hold_s), str(times)]
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER, *arguments]))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.kill()
        worker.wait(timeout=10)


def log(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_lines(folder: Path, count: int) -> None:
    end_s = time.monotonic() + 20
    while len(log(folder)) < count:
        assert time.monotonic() < end_s, "the workers did not start"
        time.sleep(0.01)


# Between processes


def test_no_two_processes_ever_hold_one_device(tmp_path: Path, start: Start) -> None:
    workers = [start(wanted, hold_s=0.01, times=6) for wanted in ("0,1", "1,0", "0,1", "01")]
    assert [worker.wait(timeout=30) for worker in workers] == [0, 0, 0, 0]
    held = [(row[1], float(row[2]), float(row[3])) for row in log(tmp_path) if row[0] == "held"]
    assert len(held) == 3 * 6 + 2 * 6
    for device in ("0", "1"):
        times = sorted((begin, end) for name, begin, end in held if name == device)
        assert len(times) > 6
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))


def test_a_holder_that_was_killed_frees_its_device(tmp_path: Path, start: Start) -> None:
    holder = start("0", hold_s=60)
    wait_for_lines(tmp_path, 1)
    with pytest.raises(LeaseTimeout), lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass
    holder.kill()
    holder.wait(timeout=10)
    with lease([(A,)], folder=tmp_path, timeout_s=5) as held:
        assert held.devices == (A,)


def test_a_lease_of_two_devices_is_not_starved_by_many_of_one(tmp_path: Path, start: Start) -> None:
    others = [start("0,1", hold_s=0.05, times=10_000) for _ in range(3)]
    wait_for_lines(tmp_path, 4)
    with lease([(A, B)], folder=tmp_path, timeout_s=15) as held:
        assert held.devices == (A, B)
        assert all(other.poll() is None for other in others)  # they had not given up
    (tmp_path / "stop").touch()
    assert [other.wait(timeout=20) for other in others] == [0, 0, 0]


def test_a_timeout_names_the_devices_and_their_holder(tmp_path: Path, start: Start) -> None:
    holder = start("0", hold_s=60)
    wait_for_lines(tmp_path, 1)
    with pytest.raises(LeaseTimeout) as error, lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass
    test = "tests/test_lease.py::test_a_timeout_names_the_devices_and_their_holder"
    message = str(error.value)
    assert message.startswith("No device became free in 0.1")
    assert f" s. Wanted NVIDIA H100 80GB HBM3: held by pid {holder.pid} ({test}, " in message
    assert message.endswith(" UTC). Wait for it or end it.")


def test_a_timeout_for_two_devices_names_the_holder_of_the_one_that_is_held(tmp_path: Path, start: Start) -> None:
    holder = start("1", hold_s=60)
    wait_for_lines(tmp_path, 1)
    with pytest.raises(LeaseTimeout) as error, lease([(A, B)], folder=tmp_path, timeout_s=0.1):
        pass
    assert f"pid {holder.pid} (" in str(error.value)
    assert f"pid {os.getpid()} (" not in str(error.value)


# In one process


def test_a_device_that_is_held_is_not_leased_again_in_the_same_process(tmp_path: Path) -> None:
    with (
        lease([(A,)], folder=tmp_path),
        pytest.raises(LeaseTimeout, match=f"pid {os.getpid()} "),
        lease([(A,)], folder=tmp_path, timeout_s=0.1),
    ):
        pass


def test_the_first_set_that_is_free_is_taken(tmp_path: Path) -> None:
    sets: list[tuple[Device, ...]] = [(A,), (B,)]
    with lease(sets, folder=tmp_path) as first, lease(sets, folder=tmp_path) as second:
        assert (first.devices, second.devices) == ((A,), (B,))


def test_a_set_of_which_one_device_is_held_is_not_taken_in_part(tmp_path: Path) -> None:
    with lease([(B,)], folder=tmp_path):
        with pytest.raises(LeaseTimeout), lease([(A, B)], folder=tmp_path, timeout_s=0.1):
            pass
        with lease([(A,)], folder=tmp_path, timeout_s=0.1) as held:
            assert held.devices == (A,)


def test_a_device_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lease([(A,)], folder=tmp_path):
        raise ZeroDivisionError
    with lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass


def test_the_queue_is_not_held_while_the_device_is(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path), lease([(B,)], folder=tmp_path, timeout_s=0.1) as held:
        assert held.devices == (B,)


def test_a_file_system_without_flock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DeviceError) as error, lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass
    assert str(error.value) == (
        f"{tmp_path / 'queue.lock'} cannot be locked: Function not implemented. "
        "Set GPUPERF_LOCK_DIR to a folder on a local disk that you may write to."
    )


# Who comes first


class Clock:
    """Time that passes only by sleeping, and tells who asks that it does."""

    def __init__(self, *events: tuple[float, Callable[[], object]]) -> None:
        self.now_s = 0.0
        self._events = list(events)

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        while self._events and self.now_s >= self._events[0][0]:
            self._events.pop(0)[1]()


def enter(stack: ExitStack, devices: tuple[Device, ...], folder: Path, **options: object) -> Lease:
    return stack.enter_context(lease([devices], folder=folder, timeout_s=5, **options))  # type: ignore[arg-type]


def waiting(folder: Path, *devices: Device, number: int, stack: ExitStack) -> None:
    """Put a live ticket into the queue, as a process that waits for these devices has."""
    path = folder / f"ticket-{number:012}"
    assert try_lock(path, stack) is not None
    holder = {"pid": 71, "user": "alice", "since": "now", "test": "test_a.py::test_eight"}
    path.write_text(json.dumps({"claim": claim_of(devices, "gpu"), "holder": holder}))


def test_a_device_that_somebody_waits_for_who_came_earlier_is_not_taken(tmp_path: Path) -> None:
    with ExitStack() as other:
        waiting(tmp_path, A, B, number=1, stack=other)
        words = r"held by nobody any more; pid 71 \(test_a\.py::test_eight, alice, since now\) waits before it\."
        with pytest.raises(LeaseTimeout, match=words):
            enter(ExitStack(), (A,), tmp_path, clock=(clock := Clock()).now, sleep=clock.sleep)
    with lease([(A,)], folder=tmp_path, timeout_s=0.1) as held:
        assert held.devices == (A,)


def test_a_process_that_was_stopped_while_it_waits_is_named_to_those_behind_it(tmp_path: Path, start: Start) -> None:
    with lease([(A,)], folder=tmp_path):
        first = start("0", hold_s=0.0)
        while not any(path.stat().st_size for path in tmp_path.glob("ticket-*")) or is_held(tmp_path / "queue.lock"):
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # Ctrl-Z
    words = rf"held by nobody any more; pid {first.pid} \(.*\) waits before it\."
    with pytest.raises(LeaseTimeout, match=words), lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass


def test_who_waits_for_other_devices_holds_nobody_up(tmp_path: Path) -> None:
    with ExitStack() as other:
        waiting(tmp_path, A, B, number=1, stack=other)
        with lease([(A,), (C,)], folder=tmp_path, timeout_s=0.1) as held:
            assert held.devices == (C,)


def test_who_waits_behind_many_looks_at_the_first_of_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def note(path: Path) -> bool:
        looks.append(path.name)
        return is_held(path)

    with ExitStack() as others:
        for number in range(1, 65):
            waiting(tmp_path, A, number=number, stack=others)
        clock = Clock((1.0, lambda: monkeypatch.setattr(lease_module, "is_held", note)))
        wanted = lease([(A,)], folder=tmp_path, timeout_s=2, clock=clock.now, sleep=clock.sleep)
        with pytest.raises(LeaseTimeout, match="and 60 more wait before it"), wanted:
            pass
    assert 15 < looks.count("ticket-000000000001") < 25
    assert looks.count("ticket-000000000002") == 1  # for the message


def test_a_lock_folder_that_is_removed_under_who_waits_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    folder.mkdir()
    with ExitStack() as other:
        enter(other, (A,), folder)
        clock = Clock((1.0, lambda: shutil.rmtree(folder)))
        wanted = lease([(A,)], folder=folder, timeout_s=2, clock=clock.now, sleep=clock.sleep)
        with pytest.raises(DeviceError, match=f"The lock folder {folder} cannot be listed: No such file"), wanted:
            pass


def test_who_comes_later_does_not_get_ahead(tmp_path: Path) -> None:
    with ExitStack() as first, ExitStack() as later:
        holder = first.enter_context(ExitStack())
        enter(holder, (A,), tmp_path)
        clock = Clock(
            (1.0, lambda: waiting(tmp_path, A, number=2, stack=later)),
            (2.0, holder.close),
        )
        with lease([(A,)], folder=tmp_path, timeout_s=5, clock=clock.now, sleep=clock.sleep) as held:
            assert held.devices == (A,)
            assert (tmp_path / "ticket-000000000002").exists()


def test_a_ticket_of_the_dead_is_passed_over_and_removed(tmp_path: Path) -> None:
    dead = tmp_path / "ticket-000000000001"
    dead.write_text(json.dumps({"claim": claim_of((A,), "gpu")}))
    with lease([(A,)], folder=tmp_path, timeout_s=0.1) as held:
        assert held.devices == (A,)
    assert list(tmp_path.glob("ticket-*")) == []


def test_a_ticket_is_dropped_as_soon_as_the_devices_are_held(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path):
        assert list(tmp_path.glob("ticket-*")) == []
        assert not is_held(tmp_path / "queue.lock")


def test_a_ticket_that_nobody_can_read_wants_everything(tmp_path: Path) -> None:
    with ExitStack() as other:
        assert try_lock(tmp_path / "ticket-000000000001", other) is not None
        with pytest.raises(LeaseTimeout), lease([(A,)], folder=tmp_path, timeout_s=0.1):
            pass


def test_the_queue_is_not_held_while_a_users_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    def name() -> str:
        held.append(is_held(tmp_path / "queue.lock"))
        return "alice"

    monkeypatch.setattr(lease_module, "_user", name)
    with lease([(A,)], folder=tmp_path):
        pass
    assert held == [False, False]


def test_a_ticket_that_cannot_be_written_still_holds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(descriptor: int, text: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with lease([(A,)], folder=tmp_path, timeout_s=0.5) as held:
        assert held.devices == (A,)
        assert is_held(lock_path(tmp_path, A.uuid))


# The host, and parts of a GPU


@pytest.mark.parametrize("device", [B, cpu_device()], ids=["gpu", "cpu"])
def test_who_has_the_host_to_itself_excludes_all_others(tmp_path: Path, device: Device) -> None:
    with ExitStack() as stack:
        enter(stack, (A,), tmp_path, exclusive="host")
        with pytest.raises(LeaseTimeout, match=f"held by pid {os.getpid()} "):
            stack.enter_context(lease([(device,)], folder=tmp_path, timeout_s=0.1))


def test_the_host_is_not_given_to_one_while_another_holds_a_device(tmp_path: Path) -> None:
    with ExitStack() as stack:
        enter(stack, (B,), tmp_path)
        with pytest.raises(LeaseTimeout) as error:
            stack.enter_context(lease([(A,)], exclusive="host", folder=tmp_path, timeout_s=0.1))
        assert "NVIDIA H100 80GB HBM3 and the host to itself: held by pid" in str(error.value)


def test_who_waits_for_the_host_is_not_overtaken(tmp_path: Path) -> None:
    with ExitStack() as other:
        path = tmp_path / "ticket-000000000001"
        assert try_lock(path, other) is not None
        path.write_text(json.dumps(dict(claim_of((A,), "host"))))
        with pytest.raises(LeaseTimeout), lease([(B,)], folder=tmp_path, timeout_s=0.1):
            pass


def test_parts_of_a_gpu_are_held_at_the_same_time(tmp_path: Path) -> None:
    with ExitStack() as stack:
        enter(stack, (PART,), tmp_path)
        assert not is_free(PART, tmp_path)
        assert is_free(OTHER_PART, tmp_path)
        enter(stack, (OTHER_PART,), tmp_path)
        with pytest.raises(LeaseTimeout):
            stack.enter_context(lease([(PART,)], folder=tmp_path, timeout_s=0.1))


def test_a_gpu_as_a_whole_and_a_part_of_it_exclude_each_other(tmp_path: Path) -> None:
    assert PART.parent_uuid == WHOLE.uuid
    for first, second in ((PART, WHOLE), (WHOLE, PART)):
        with ExitStack() as stack:
            enter(stack, (first,), tmp_path)
            with pytest.raises(LeaseTimeout, match=f"held by pid {os.getpid()} "):
                stack.enter_context(lease([(second,)], folder=tmp_path, timeout_s=0.1))


# Waiting


def test_a_long_wait_is_told_after_half_a_minute_and_then_every_five(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    clock = Clock()
    wanted = lease(
        [(A, B)],
        folder=tmp_path,
        timeout_s=700,
        on_wait=lambda words: told.append((clock.now_s, words)),
        clock=clock.now,
        sleep=clock.sleep,
    )
    with lease([(A,)], folder=tmp_path), pytest.raises(LeaseTimeout) as error, wanted:
        pass
    assert [time_s for time_s, _ in told] == pytest.approx([30, 330, 630], abs=0.2)
    assert told[0][1].startswith(f"has waited 30 s for 2 x NVIDIA H100 80GB HBM3: held by pid {os.getpid()} (")
    assert str(error.value).startswith("No device became free in 700 s. Wanted 2 x NVIDIA H100 80GB HBM3: held by pid ")


def test_a_command_that_waits_long_names_the_holder_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    wanted = lease([(A,)], folder=tmp_path, timeout_s=100, clock=clock.now, sleep=clock.sleep)
    with lease([(A,)], folder=tmp_path), pytest.raises(LeaseTimeout), wanted:
        pass
    said = capsys.readouterr().err
    assert said.startswith(f"gpuperf: has waited 30 s for NVIDIA H100 80GB HBM3: held by pid {os.getpid()} (")
    assert said.count("\n") == 1


def test_an_hour_is_told_in_plain_digits(tmp_path: Path) -> None:
    clock = Clock()
    with (
        lease([(A,)], folder=tmp_path),
        pytest.raises(LeaseTimeout, match=r"No device became free in 3600 s\. "),
        lease([(A,)], folder=tmp_path, clock=clock.now, sleep=lambda seconds: clock.sleep(100 * seconds)),
    ):
        pass


def test_a_holder_is_known_by_process_test_user_and_time(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path):
        holder = holder_of(lock_path(tmp_path, A.uuid))
    assert holder is not None
    assert holder.pid == os.getpid()
    assert holder.test == "tests/test_lease.py::test_a_holder_is_known_by_process_test_user_and_time"
    assert holder.user
    assert time.strptime(holder.since, "%Y-%m-%d %H:%M:%S UTC")


def test_many_holders_are_counted(tmp_path: Path) -> None:
    devices = find_devices(FakeNvml(*map(fake_gpu, range(6))), cuda_visible_devices=None)
    with ExitStack() as stack:
        for number, device in enumerate(devices):
            path = lock_path(tmp_path, device.uuid)
            assert try_lock(path, stack) is not None
            path.write_text(json.dumps({"pid": os.getpid(), "user": f"user{number}", "since": "now"}))
        with pytest.raises(LeaseTimeout, match=r"user0.*user3, since now\) and 2 more\."):
            stack.enter_context(lease([devices], folder=tmp_path, timeout_s=0))


def test_a_holder_that_left_no_word_is_looked_up_with_fuser(tmp_path: Path) -> None:
    path = lock_path(tmp_path, A.uuid)
    with ExitStack() as stack:
        assert try_lock(path, stack) is not None
        with pytest.raises(LeaseTimeout) as error:
            stack.enter_context(lease([(A,)], folder=tmp_path, timeout_s=0))
    assert f"held by somebody unknown (`fuser -v {path}`)." in str(error.value)


def test_a_queue_that_stands_still_is_explained(tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert try_lock(tmp_path / "queue.lock", stack) is not None
        with pytest.raises(LeaseTimeout, match=r"Wanted a ticket: .*queue\.lock is held, which `fuser -v` explains"):
            stack.enter_context(lease([(A,)], folder=tmp_path, timeout_s=0.05))


# Death and interruption

#: Leases the device, starts a child that inherits the lease or does not, and waits to be killed.
PARENT = """
import subprocess, sys, time
from pathlib import Path
from pytest_gpuperf.devices import find_devices
from pytest_gpuperf.lease import lease
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.testing import FakeNvml, fake_gpu

[device] = find_devices(FakeNvml(fake_gpu(0)), cuda_visible_devices=None)
with lease([(device,)], folder=Path(sys.argv[1]), timeout_s=5) as lent:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    inherited = lent.descriptors if sys.argv[2] == "inherits" else ()
    subprocess.Popen([sys.executable, "-c", code], pass_fds=inherited, close_fds=sys.argv[2] != "all")
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["inherits", "does not", "all"])
def test_the_lease_outlives_a_killed_parent_where_its_child_inherited_it(tmp_path: Path, how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), how], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    try:
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait(timeout=10)
        assert is_free(A, tmp_path) is (how != "inherits")
        if how == "inherits":
            with pytest.raises(LeaseTimeout) as error, lease([(A,)], folder=tmp_path, timeout_s=0.1):
                pass
            assert "which has ended or runs in another container; what it left is shown by `fuser" in str(error.value)
        os.kill(child, signal.SIGKILL)
        with lease([(A,)], folder=tmp_path, timeout_s=5) as held:
            assert held.devices == (A,)
    finally:
        os.killpg(parent.pid, signal.SIGKILL) if is_held(lock_path(tmp_path, A.uuid)) else None
        parent.stdout.close()


def test_a_fork_that_outlives_the_lease_holds_nothing(tmp_path: Path) -> None:
    child, release = None, os.pipe()
    try:
        with lease([(A,)], folder=tmp_path) as lent:
            child = os.fork()  # as the workers of a torch DataLoader are
            if child == 0:
                os.read(release[0], 1)
                null = Path(os.devnull).stat().st_rdev
                os._exit(any(os.fstat(one).st_rdev != null for one in lent.descriptors))
            assert is_held(lock_path(tmp_path, A.uuid))  # what the fork lets go of is its own
        with lease([(A,)], folder=tmp_path, timeout_s=0.5) as held:
            assert held.devices == (A,)
    finally:
        os.write(release[1], b".")
        for one in release:
            os.close(one)
        assert child is None or os.waitpid(child, 0)[1] == 0


def test_a_file_of_a_fork_that_has_the_number_of_a_lock_is_left_alone_by_its_own_forks(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path) as lent:
        child = os.fork()
        if child == 0:  # becomes a daemon: closes everything, opens its log, and forks
            for one in lent.descriptors:
                os.close(one)
            os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), lent.descriptors[0])
            if os.fork() == 0:
                os._exit(os.write(lent.descriptors[0], b"alive") - 5)
            os._exit(os.wait()[1] != 0)
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "log").read_text() == "alive"


def test_a_command_that_measures_inherits_what_the_lease_holds(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path) as lent:
        code = f"import os; [os.fstat(one) for one in {lent.descriptors}]"
        assert run_group([sys.executable, "-c", code], timeout_s=20, descriptors=lent.descriptors).code == 0
        assert run_group([sys.executable, "-c", code], timeout_s=20).code == 1


def test_random_kills_leave_no_lease_and_no_double_one(tmp_path: Path, start: Start) -> None:
    chance = random.Random(5)
    kinds = ("0,1", "1,0", "01")
    workers = [start(kinds[number % 3], hold_s=0.02, times=10_000) for number in range(5)]
    wait_for_lines(tmp_path, 5)
    for _ in range(6):
        time.sleep(chance.uniform(0.0, 0.15))
        victim = chance.randrange(len(workers))
        workers[victim].kill()
        workers[victim].wait(timeout=10)
        workers[victim] = start(kinds[victim % 3], hold_s=0.02, times=10_000)
    (tmp_path / "stop").touch()
    assert [worker.wait(timeout=30) for worker in workers] == [0] * 5
    held = [(row[1], float(row[2]), float(row[3])) for row in log(tmp_path) if row[0] == "held" and len(row) == 4]
    for device in ("0", "1"):
        times = sorted((begin, end) for name, begin, end in held if name == device)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    with lease([(A, B)], folder=tmp_path, timeout_s=0.5):
        pass
    assert list(tmp_path.glob("ticket-*")) == []


def is_interrupted_at(line: int, folder: Path) -> bool:
    """Lease and be interrupted at the n-th line of our code; whether there were so many.

    Not at the end of a `with`, where Python looks for signals only when `__exit__` has begun.
    """
    sources = {lease_module.__file__, lease_module.__file__.replace("lease.py", "locks.py")}
    seen = 0
    entered: set[tuple[FrameType, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal seen
        if frame.f_code.co_filename not in sources:
            return None
        if event != "line" or (frame, frame.f_lineno) in entered:
            return trace
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with "):
            entered.add((frame, frame.f_lineno))
        seen += 1
        if seen == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        with lease([(C,), (A, B)], folder=folder, timeout_s=1):
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_leaves_nothing_held(tmp_path: Path) -> None:
    with ExitStack() as other:
        assert try_lock(lock_path(tmp_path, C.uuid), other) is not None  # so that a set is tried in vain, too
        line = 0
        while is_interrupted_at(line := line + 1, tmp_path):
            held = [path.name for path in tmp_path.iterdir() if is_held(path)]
            assert held == [lock_path(tmp_path, C.uuid).name], line
    assert line > 100
    with lease([(A, B, C)], folder=tmp_path, exclusive="host", timeout_s=0.1):
        pass
    assert list(tmp_path.glob("ticket-*")) == []


# The files


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = lock_path(tmp_path, A.uuid)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeviceError) as error, lease([(A,)], folder=tmp_path):
        pass
    assert str(error.value) == f"{path} is a link, and a lock must be a file: somebody put it there. Remove it."
    with pytest.raises(DeviceError, match="is a link"):
        is_held(path)


def test_a_lock_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    lock_path(tmp_path, A.uuid).mkdir()
    with pytest.raises(DeviceError, match=r"cannot be locked: Is a directory\. Set GPUPERF_LOCK_DIR"):
        enter(ExitStack(), (A,), tmp_path)


def test_lock_files_are_for_everybody_who_may_enter_the_folder(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with lease([(A,)], folder=tmp_path):
            modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {0o666}


def test_a_lock_file_that_was_tidied_away_excludes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, was_removed = tmp_path / "a.lock", fcntl.flock, False

    def flock(descriptor: int, operation: int) -> None:
        nonlocal was_removed
        real(descriptor, operation)
        if not was_removed:
            was_removed = True
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with ExitStack() as stack:
        assert try_lock(path, stack) is not None
        assert is_held(path)


def test_files_of_locks_that_are_held_are_young_so_that_nothing_tidies_them_away(tmp_path: Path) -> None:
    with lease([(PART,)], folder=tmp_path):
        pass
    names = claim_of((PART,), "gpu")
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    with lease([(PART,)], folder=tmp_path):
        assert all(time.time() - (tmp_path / name).stat().st_mtime < 60 for name in names)
        assert all(time.time() - (tmp_path / name).stat().st_atime < 60 for name in names)


def test_a_device_file_is_never_removed(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path):
        first = lock_path(tmp_path, A.uuid).stat().st_ino
    with lease([(A,)], folder=tmp_path):
        assert lock_path(tmp_path, A.uuid).stat().st_ino == first


# The folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that all users share, instead of /tmp."""
    monkeypatch.delenv("GPUPERF_LOCK_DIR", raising=False)
    monkeypatch.setattr(lease_module, "_SHARED_FOLDER", tmp_path)
    monkeypatch.setattr(lease_module, "_SYSTEM_FOLDER", tmp_path / "run" / "gpuperf")
    return tmp_path


def own(base: Path) -> Path:
    return base / f"gpuperf-{os.getuid()}"


def test_the_folder_that_was_named_is_made_and_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(base / "a" / "b"))
    assert lock_folder() == base / "a" / "b"
    with lease([(A,)]):
        assert (base / "a" / "b" / f"device-{A.uuid_hash}.lock").exists()


@pytest.mark.parametrize("what", ["file", "folder in a file"])
def test_a_folder_that_was_named_and_cannot_be_made_is_refused(
    base: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "a").touch()
    named = base / "a" if what == "file" else base / "a" / "b"
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(named))
    with pytest.raises(DeviceError) as error:
        lock_folder()
    reason = "File exists" if what == "file" else "Not a directory"
    assert str(error.value) == f"GPUPERF_LOCK_DIR={named} is not a folder to lock in: {reason}. Name another one."


def test_a_user_has_a_private_folder_in_the_shared_one(base: Path) -> None:
    assert lock_folder() == own(base)
    assert stat.S_IMODE(own(base).stat().st_mode) == 0o700
    assert lock_folder() == own(base)


def test_the_shared_folder_is_one_for_every_login() -> None:
    assert lease_module._SHARED_FOLDER.as_posix() == "/tmp"  # noqa: S108 - the place of the locks, not a file


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_a_login_with_folders_of_its_own_locks_where_the_others_do(
    base: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(base / "of this login"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert lock_folder() == own(base)


def test_a_link_in_place_of_the_folder_is_refused(base: Path) -> None:
    (base / "elsewhere").mkdir()
    own(base).symlink_to(base / "elsewhere")
    with pytest.raises(DeviceError) as error:
        lock_folder()
    assert str(error.value) == (
        f"The lock folder {own(base)} is not a folder of yours. Remove it or set GPUPERF_LOCK_DIR."
    )


def test_a_shared_folder_that_cannot_be_written_to_is_explained(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SHARED_FOLDER", base / "nowhere")  # a container without a /tmp, or read-only
    with pytest.raises(DeviceError) as error:
        lock_folder()
    folder = base / "nowhere" / f"gpuperf-{os.getuid()}"
    assert str(error.value) == (
        f"The lock folder {folder} cannot be made: No such file or directory. Set GPUPERF_LOCK_DIR to a folder on a "
        "local disk that you may write to."
    )


def test_a_folder_of_somebody_else_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    own(base).mkdir()  # by me, so it is not of the user that is asked for
    with pytest.raises(DeviceError, match="is not a folder of yours"):
        lock_folder()


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_something_else_in_place_of_the_folder_is_refused(base: Path, what: str) -> None:
    if what == "file":
        own(base).touch()
    else:
        own(base).symlink_to(base / "nowhere")
    with pytest.raises(DeviceError, match="is not a folder of yours"):
        lock_folder()


def system(base: Path) -> Path:
    folder = base / "run" / "gpuperf"
    folder.mkdir(parents=True)
    return folder


def test_a_folder_that_an_administrator_made_is_used_by_all_users(base: Path) -> None:
    assert lock_folder() == own(base)
    assert lock_folder() != system(base)
    assert lock_folder() == base / "run" / "gpuperf"


def test_the_folder_of_an_administrator_is_where_locks_belong() -> None:
    assert lease_module._SYSTEM_FOLDER.as_posix() == "/run/lock/gpuperf"


@pytest.mark.skipif(os.getuid() != 0, reason="needs two users")
def test_a_folder_that_any_user_made_in_the_administrators_place_is_ignored(base: Path) -> None:
    os.chown(system(base), 65534, -1)
    assert lock_folder() == own(base)


def test_a_folder_of_an_administrator_that_is_a_link_is_refused(base: Path) -> None:
    (base / "elsewhere").mkdir()
    (base / "run").mkdir()
    (base / "run" / "gpuperf").symlink_to(base / "elsewhere")
    with pytest.raises(DeviceError) as error:
        lock_folder()
    folder = base / "run" / "gpuperf"
    assert str(error.value) == (
        f"The lock folder {folder} is a link to {base / 'elsewhere'}. "
        f"Ask for `sudo install -d -m 1777 {folder}`, or set GPUPERF_LOCK_DIR."
    )


def test_a_folder_of_an_administrator_that_is_a_file_is_refused(base: Path) -> None:
    (base / "run").mkdir()
    (base / "run" / "gpuperf").touch()
    with pytest.raises(DeviceError, match=r"run/gpuperf is not a folder\. Ask for `sudo install -d -m 1777 "):
        lock_folder()


def test_a_named_folder_that_is_a_link_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "elsewhere").mkdir()
    (base / "named").symlink_to(base / "elsewhere")
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(base / "named"))
    with pytest.raises(DeviceError) as error:
        lock_folder()
    assert str(error.value) == (
        f"GPUPERF_LOCK_DIR={base / 'named'} is a link to {base / 'elsewhere'}. Name another one."
    )


@pytest.mark.parametrize("named", ["locks", "~/locks"])
def test_a_folder_that_is_named_from_the_working_folder_is_refused(
    base: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    monkeypatch.setenv("GPUPERF_LOCK_DIR", named)
    with pytest.raises(DeviceError) as error:
        lock_folder()
    assert str(error.value) == (f"GPUPERF_LOCK_DIR={named} is no whole path: others would not find it. Begin with /.")
    assert list(base.iterdir()) == []


def test_a_folder_that_cannot_be_listed_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(base / "named"))
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.R_OK)
    with pytest.raises(DeviceError) as error:
        lock_folder()
    assert str(error.value) == (
        f"GPUPERF_LOCK_DIR={base / 'named'} is not readable and writable for you. "
        f"Name another one, or have its owner run `chmod 1777 {base / 'named'}`."
    )


@pytest.mark.parametrize("which", ["named", "own", "administrator's"])
def test_a_folder_that_is_not_writable_is_refused(base: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if which == "named":
        monkeypatch.setenv("GPUPERF_LOCK_DIR", str(base / "named"))
    elif which == "administrator's":
        system(base)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        DeviceError, match=r"is not readable and writable for you\. .*(Name another|chmod u\+rwx|sudo install)"
    ):
        lock_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="needs two users")
def test_two_users_exclude_each_other_in_the_folder_that_was_named() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        with lease([(A,)], folder=folder):
            pass
        told = subprocess.run(
            [sys.executable, "-c", AS_NOBODY],
            env={**os.environ, "GPUPERF_LOCK_DIR": str(folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        shutil.rmtree(folder)
    assert told.stderr == ""
    assert told.stdout == "leased\n"


def test_whose_preferred_device_is_held_for_long_takes_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path))
    home, other = find_devices(FakeNvml(fake_gpu(0), fake_gpu(1)), cuda_visible_devices=None)
    with lease([(home,)]), lease_patiently([(home,)], [(other,)], patience_s=0.1) as lent:
        assert lent.devices == (other,)
    with lease_patiently([(home,)], [(other,)], patience_s=0.1) as lent:
        assert lent.devices == (home,)


def test_who_waits_for_any_device_at_last_says_how_long_it_has_waited_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(tmp_path))
    monkeypatch.setattr(lease_module, "FIRST_WORD_S", 0.2)
    told: list[str] = []
    with ExitStack() as other:
        other.enter_context(lease([(A, B)]))

        def hear(words: str) -> None:
            told.append(words)
            if len(told) == 2:
                other.close()

        with lease_patiently([(A,)], [(B,)], patience_s=0.9, on_wait=hear) as lent:
            assert lent.devices == (A,)
    assert told[1].startswith("has waited 1 s for ")


def test_a_wait_that_began_before_counts(tmp_path: Path) -> None:
    told: list[str] = []
    clock = Clock()
    wanted = lease(
        [(A,)],
        folder=tmp_path,
        timeout_s=100,
        waited_s=60,
        on_wait=told.append,
        clock=clock.now,
        sleep=clock.sleep,
    )
    with lease([(A,)], folder=tmp_path), pytest.raises(LeaseTimeout, match="became free in 100 s"), wanted:
        pass
    assert clock.now_s == pytest.approx(40, abs=0.2)
    assert [words.partition(" for ")[0] for words in told] == ["has waited 60 s"]
