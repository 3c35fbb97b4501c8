"""Leases between real processes: never two on one device, nobody starved, nothing held by the dead; a safe folder."""

import errno
import fcntl
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_gpuperf import lease as lease_module
from pytest_gpuperf.devices import Device, find_devices
from pytest_gpuperf.errors import DeviceError, LeaseTimeout
from pytest_gpuperf.lease import lease, lock_folder
from pytest_gpuperf.testing import FakeNvml, fake_gpu

A, B = find_devices(FakeNvml(fake_gpu(0), fake_gpu(1)), cuda_visible_devices=None)

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
        log.write(f"holds {held[0].index}\\n")
        time.sleep(hold_s)
        end_s = time.monotonic()
        log.write("".join(f"held {device.index} {begin_s} {end_s}\\n" for device in held))
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
        assert held == (A,)


def test_a_lease_of_two_devices_is_not_starved_by_many_of_one(tmp_path: Path, start: Start) -> None:
    others = [start("0,1", hold_s=0.05, times=10_000) for _ in range(3)]
    wait_for_lines(tmp_path, 4)
    with lease([(A, B)], folder=tmp_path, timeout_s=15) as held:
        assert held == (A, B)
        assert all(other.poll() is None for other in others)  # they had not given up
    (tmp_path / "stop").touch()
    assert [other.wait(timeout=20) for other in others] == [0, 0, 0]


def test_a_timeout_names_the_devices_and_their_holder(tmp_path: Path, start: Start) -> None:
    holder = start("0", hold_s=60)
    wait_for_lines(tmp_path, 1)
    with pytest.raises(LeaseTimeout) as error, lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass
    test = "test_lease.py::test_a_timeout_names_the_devices_and_their_holder (call)"
    assert str(error.value).startswith(
        f"No device became free in time (NVIDIA H100 80GB HBM3). Last holder: pid {holder.pid}, "
    )
    assert str(error.value).endswith(f"{test}. Wait for it or end it.")


def test_a_timeout_for_two_devices_names_the_holder_of_the_one_that_is_held(tmp_path: Path, start: Start) -> None:
    holder = start("1", hold_s=60)
    wait_for_lines(tmp_path, 1)
    with pytest.raises(LeaseTimeout) as error, lease([(A, B)], folder=tmp_path, timeout_s=0.1):
        pass
    assert f"pid {holder.pid}," in str(error.value)
    assert f"pid {os.getpid()}," not in str(error.value)


# In one process


def test_a_device_that_is_held_is_not_leased_again_in_the_same_process(tmp_path: Path) -> None:
    with (
        lease([(A,)], folder=tmp_path),
        pytest.raises(LeaseTimeout, match=f"pid {os.getpid()}, "),
        lease([(A,)], folder=tmp_path, timeout_s=0.1),
    ):
        pass


def test_the_first_set_that_is_free_is_taken(tmp_path: Path) -> None:
    sets: list[tuple[Device, ...]] = [(A,), (B,)]
    with lease(sets, folder=tmp_path) as first, lease(sets, folder=tmp_path) as second:
        assert (first, second) == ((A,), (B,))


def test_a_set_of_which_one_device_is_held_is_not_taken_in_part(tmp_path: Path) -> None:
    with lease([(B,)], folder=tmp_path):
        with pytest.raises(LeaseTimeout), lease([(A, B)], folder=tmp_path, timeout_s=0.1):
            pass
        with lease([(A,)], folder=tmp_path, timeout_s=0.1) as held:
            assert held == (A,)


def test_a_device_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lease([(A,)], folder=tmp_path):
        raise ZeroDivisionError
    with lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass


def test_the_queue_is_not_held_while_the_device_is(tmp_path: Path) -> None:
    with lease([(A,)], folder=tmp_path), lease([(B,)], folder=tmp_path, timeout_s=0.1) as held:
        assert held == (B,)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_flock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DeviceError), lease([(A,)], folder=tmp_path, timeout_s=0.1):
        pass


# The folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that all users share, instead of /tmp."""
    monkeypatch.delenv("GPUPERF_LOCK_DIR", raising=False)
    monkeypatch.setattr(lease_module, "_SHARED_FOLDER", tmp_path)
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
    assert str(error.value) == f"GPUPERF_LOCK_DIR={named} is not a folder to lock in: {reason}."


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
