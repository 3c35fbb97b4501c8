"""Baselines under failing disks, kills, rivals and rot: the old file or the new one, and never anything else.

As SQLite tests itself: the k-th call to the system fails, or kills the process, for every k until a run passes clean.
"""

import errno
import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from epochs import append
from msgspec.structs import replace

import pytest_gpuperf
from pytest_gpuperf import baseline_store
from pytest_gpuperf.baseline_file import baseline_path, dumps, read
from pytest_gpuperf.baseline_store import prune, write
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Measurement,
    Method,
    RunInfo,
    TestKey,
    TestRecord,
    Verdict,
    encode,
)

MODULE = "perf_tests/test_matmul.py"
RUN = RunInfo(schema=1, run_id="r", date="2026-01-01T00:00:00Z", visit="v0")
CALLS = ("open", "write", "fsync", "replace")


def measured(test: str = "test_a", module: str = MODULE) -> TestRecord:
    return TestRecord(
        key=TestKey(module=module, test=test),
        slug="h100",
        devices=("gpu-1",),
        environment=Environment(hardware=Hardware(name="NVIDIA H100")),
        measurements=(
            Measurement(
                metric="time",
                value=0.001616,
                unit="s",
                better="lower",
                kind="compute",
                method=Method(clock="cuda-events", mode="cold"),
            ),
        ),
        verdicts=(Verdict(status="NEW", metric="time", reason="no baseline", tolerance=0.03),),
    )


def update(root: Path, *tests: str) -> None:
    write(root, RUN, [measured(test) for test in tests], accept_reason=None)


def names_in(path: Path) -> set[str]:
    file = read(path, module=MODULE)
    return set(file.tests) if file else set()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "baselines"


@pytest.fixture
def path(root: Path) -> Path:
    return baseline_path(root, "h100", MODULE)


def leftovers(root: Path) -> list[Path]:
    return list(root.rglob(".tmp-*"))


# The k-th call fails


def fail_at(patch: pytest.MonkeyPatch, k: int, number: int) -> list[str]:
    """Let the k-th of the calls raise `OSError(number)`; returns the names of the calls made, as they are made."""
    made: list[str] = []

    def failing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == k:
                raise OSError(number, os.strerror(number))
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        patch.setattr(os, name, failing(name, getattr(os, name)))
    return made


def failures(attempt: Callable[[], None], number: int) -> Iterator[tuple[int, str]]:
    """Attempt with the first, second, ... call failing, until none does; yields each error's text."""
    for k in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            made = fail_at(patch, k, number)
            try:
                attempt()
            except BaselineError as error:
                text = str(error)
            else:
                assert len(made) == k - 1, "a failure was swallowed"
                assert set(made) == set(CALLS)
                return
        yield k, text


NUMBERS = pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])


@NUMBERS
def test_whichever_call_fails_the_old_file_is_intact_and_the_next_update_works(
    root: Path, path: Path, number: int
) -> None:
    update(root, "before")
    old = path.read_bytes()
    for k, text in failures(lambda: update(root, "during"), number):
        assert str(path) in text or str(root / ".gpuperf.lock") in text
        assert errno.errorcode[number] in text
        is_written = "is written, but" in text
        assert is_written or "The old file is intact" in text or "No file was changed" in text
        assert names_in(path) == ({"before", "during"} if is_written else {"before"})
        assert is_written or path.read_bytes() == old
        assert leftovers(root) == []
        update(root, f"after-{k}")
        assert f"after-{k}" in names_in(path)
        path.write_bytes(old)
    assert names_in(path) == {"before", "during"}


@NUMBERS
def test_whichever_call_fails_a_first_update_leaves_all_or_nothing(tmp_path: Path, number: int) -> None:
    roots = (tmp_path / f"baselines-{i}" for i in itertools.count())
    used: list[Path] = []

    def first_update() -> None:
        used.append(next(roots))
        update(used[-1], "test_a")

    for _, text in failures(first_update, number):
        file = baseline_path(used[-1], "h100", MODULE)
        assert names_in(file) == ({"test_a"} if "is written, but" in text else set())
        assert leftovers(used[-1]) == []
        update(used[-1], "test_b")
        assert "test_b" in names_in(file)


@NUMBERS
def test_whichever_call_fails_pruning_leaves_the_old_file_or_the_new(root: Path, path: Path, number: int) -> None:
    entries = [(TestKey(module=MODULE, test="gone"), "time")]
    update(root, "kept", "gone")
    old = path.read_bytes()
    for _, text in failures(lambda: assert_pruned(root, entries), number):
        assert names_in(path) == ({"kept"} if "is written, but" in text else {"kept", "gone"})
        path.write_bytes(old)
    assert names_in(path) == {"kept"}


def assert_pruned(root: Path, entries: list[tuple[TestKey, str]]) -> None:
    assert prune(root, "h100", entries) == 1


def test_a_file_that_cannot_be_removed_is_an_error(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update(root, "gone")

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(BaselineError, match=r"Read-only file system \(EROFS\)\. The old file is intact"):
        prune(root, "h100", [(TestKey(module=MODULE, test="gone"), "time")])
    assert names_in(path) == {"gone"}


def test_of_two_files_the_second_may_fail_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, replaced = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        replaced.append(target)
        if len(replaced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(BaselineError, match=r"b\.json could not be written: No space left on device \(ENOSPC\)"):
        write(root, RUN, [measured(module="a.py"), measured(module="b.py")], accept_reason=None)
    assert read(baseline_path(root, "h100", "a.py")) is not None
    assert read(baseline_path(root, "h100", "b.py")) is None


def test_the_file_is_on_disk_before_it_replaces_the_old_and_its_folders_after(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronise, rename, order = os.fsync, os.replace, []

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        order.append(f"fsync {name.split('-')[0]}")
        synchronise(descriptor)

    def renamed(source: Path, target: Path) -> None:
        order.append(f"replace {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    update(root, "test_a")
    assert order == ["fsync .tmp", "replace perf_tests.test_matmul.json", "fsync h100", "fsync baselines"]


def test_short_writes_are_continued(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: original(descriptor, data[:7]))
    update(root, "test_a")
    assert names_in(path) == {"test_a"}


def test_a_file_system_that_cannot_synchronise_folders_is_fine(
    root: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync

    def files_only(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    update(root, "test_a")
    assert names_in(path) == {"test_a"}


def test_a_read_only_file_system_is_named(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update(root, "test_a")
    original = os.open

    def read_only(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and ".tmp-" in str(name):
            raise OSError(errno.EROFS, "Read-only file system")
        return original(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(BaselineError) as caught:
        update(root, "test_b")
    assert str(caught.value) == (
        f"{path} could not be written: Read-only file system (EROFS). The old file is intact. "
        f"Check space and permissions of {path.parent}, then run again."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="a folder's mode does not bind root")
def test_a_read_only_folder_is_an_error(root: Path, path: Path) -> None:
    update(root, "test_a")
    path.parent.chmod(0o500)
    try:
        with pytest.raises(BaselineError, match=r"Permission denied \(EACCES\)\. The old file is intact"):
            update(root, "test_b")
    finally:
        path.parent.chmod(0o700)
    assert names_in(path) == {"test_a"}


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaselineError, match=r"cannot be read: Not a directory \(ENOTDIR\)"):
        update(tmp_path / "file" / "baselines", "test_a")


def test_a_file_where_the_slugs_folder_belongs_is_an_error(root: Path) -> None:
    root.mkdir()
    (root / "h100").write_text("")
    with pytest.raises(BaselineError, match="Not a directory"):
        update(root, "test_a")
    assert (root / "h100").read_text() == ""


def test_what_a_killed_writer_left_is_swept_after_an_hour(root: Path, path: Path) -> None:
    update(root, "test_a")
    old, young = path.parent / ".tmp-1-old", path.parent / ".tmp-2-young"
    old.write_text("half")
    young.write_text("half")
    os.utime(old, (time.time() - 3700, time.time() - 3700))
    update(root, "test_b")
    assert leftovers(root) == [young]


# The lock


def test_a_lock_held_by_another_names_how_to_find_it(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update(root, "test_a")
    monkeypatch.setattr(baseline_store, "LOCK_TIMEOUT_S", 0.1)
    with (root / ".gpuperf.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BaselineError, match=r"Waited 0\.1 s for .*`fuser -v .*/\.gpuperf\.lock` names the process"):
            update(root, "test_b")
    assert names_in(path) == {"test_a"}


class FakeLock:
    """filelock 3.x: no `fallback_to_soft`; `on_acquire` is what happens while this process waits."""

    on_acquire: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, lock_file: Path, timeout: float = -1) -> None:
        self.lock_file = lock_file
        self.timeout = timeout

    def acquire(self) -> None:
        type(self).on_acquire()

    def release(self) -> None:
        pass


def test_an_older_filelock_is_used_without_the_option(root: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filelock.FileLock", FakeLock)
    update(root, "test_a")
    assert names_in(path) == {"test_a"}


def test_a_newer_filelock_must_not_fall_back_to_a_soft_lock(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []

    class NewLock(FakeLock):
        def __init__(self, lock_file: Path, timeout: float = -1, *, fallback_to_soft: bool = True) -> None:
            super().__init__(lock_file, timeout)
            given.append(fallback_to_soft)

    monkeypatch.setattr("filelock.FileLock", NewLock)
    update(root, "test_a")
    assert given == [False]


def test_a_file_system_without_flock_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoFlock(FakeLock):
        def acquire(self) -> None:
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock", NoFlock)
    with pytest.raises(BaselineError, match=r"does not appear to support flock.*No file was changed"):
        update(root, "test_a")


def test_what_changed_while_waiting_for_the_lock_is_kept(
    root: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rival_writes() -> None:
        monkeypatch.setattr(FakeLock, "on_acquire", staticmethod(lambda: None))
        update(root, "rival")

    monkeypatch.setattr("filelock.FileLock", FakeLock)
    monkeypatch.setattr(FakeLock, "on_acquire", staticmethod(rival_writes))
    update(root, "mine")
    assert names_in(path) == {"rival", "mine"}


# Killed


WRITER = """
import os, signal, sys
from pathlib import Path

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.baseline_store import write
from pytest_gpuperf.records import RunInfo, TestRecord

root, name, updates, deadly_call, moment = sys.argv[1:]
record = msgspec.json.decode(sys.stdin.buffer.read(), type=TestRecord)
run = RunInfo(schema=1, run_id="r", date="2026-01-01T00:00:00Z", visit="v0")
made = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(call):
    def counted(*args, **kwargs):
        global made
        made += 1
        is_deadly = made == int(deadly_call)
        print(call.__name__, file=sys.stderr)
        if is_deadly and moment == "before":
            die()
        if is_deadly and moment == "half" and call.__name__ == "write":
            call(args[0], args[1][: len(args[1]) // 2])
            die()
        result = call(*args, **kwargs)
        if is_deadly and moment == "after":
            die()
        return result
    return counted

for each in ("open", "write", "fsync", "replace"):
    setattr(os, each, deadly(getattr(os, each)))
for i in range(int(updates)):
    test = f"{name}-{i}"
    write(Path(root), run, [replace(record, key=replace(record.key, test=test))], accept_reason=None)
    print(test, flush=True)
"""


def writer(root: Path, name: str, *, updates: int = 1, deadly_call: int = 0, moment: str = "never") -> list[str]:
    arguments = [str(root), name, str(updates), str(deadly_call), moment]
    return [sys.executable, "-c", WRITER, *arguments]


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(pytest_gpuperf.__file__).parents[1])}


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_whichever_call_kills_the_file_is_readable_and_the_next_update_works(
    root: Path, path: Path, moment: str
) -> None:
    update(root, "before")
    old = path.read_bytes()
    made = run_writer(root).stderr.decode().split()
    assert set(made) == set(CALLS)
    for k, name in enumerate(made, start=1):
        path.write_bytes(old)
        status = run_writer(root, deadly_call=k, moment=moment).returncode
        # A call that raises has no end to die at (the lock file exists already), and only a write has a middle.
        assert status == -signal.SIGKILL or k == 1 or (moment, name) in HALVES
        assert names_in(path) in ({"before"}, {"before", "during-0"})
        update(root, "after")
        assert "after" in names_in(path)


HALVES = {("half", name) for name in CALLS if name != "write"}


def run_writer(root: Path, *, deadly_call: int = 0, moment: str = "never") -> subprocess.CompletedProcess[bytes]:
    command = writer(root, "during", deadly_call=deadly_call, moment=moment)
    return subprocess.run(command, input=encode(measured()), env=environ(), check=False, capture_output=True)


def test_eight_writers_some_of_them_killed_lose_nothing_that_was_acknowledged(
    root: Path, path: Path, tmp_path: Path
) -> None:
    update(root, "before")
    rng = random.Random(7)
    deaths = {number: rng.randint(1, 15) for number in range(0, 8, 2)}
    logs = [tmp_path / f"acknowledged-{number}" for number in range(8)]
    processes = [started(writer(root, f"w{number}", updates=20), log) for number, log in enumerate(logs)]
    while any(process.poll() is None for process in processes):
        assert "before" in names_in(path)
        for number, least in deaths.items():
            if len(acknowledged(logs[number])) >= least:
                time.sleep(rng.random() * 0.01)
                processes[number].kill()
    assert [process.wait() for process in processes] == [-signal.SIGKILL, 0] * 4
    promised = {test for log in logs for test in acknowledged(log)}
    assert len(promised) >= 4 * 20 + sum(deaths.values())
    assert promised <= names_in(path)


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, env=environ()
        )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(encode(measured()))
    return process


def acknowledged(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


# Rot


def small_file() -> bytes:
    file = append(None, RUN, measured(), ["time"])
    return dumps(replace(file, module="m.py"))


def assert_error_or_sound(path: Path, data: bytes) -> bool:
    """Whether a file of these bytes is read; what is read can be written again."""
    path.write_bytes(data)
    try:
        file = read(path)
    except BaselineError as error:
        assert str(path) in str(error)  # noqa: PT017 (either outcome is right; only other exceptions are not)
        return False
    assert file is not None
    assert dumps(file)
    return True


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x10, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_is_an_error_or_a_sound_file(tmp_path: Path, mask: int) -> None:
    data = small_file()
    outcomes = {
        assert_error_or_sound(tmp_path / "a.json", data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :])
        for i in range(len(data))
    }
    assert False in outcomes


def test_a_truncated_file_is_an_error_at_every_length(tmp_path: Path) -> None:
    data = small_file()
    sound = [length for length in range(len(data) + 1) if assert_error_or_sound(tmp_path / "a.json", data[:length])]
    assert sound == [len(data) - 1, len(data)]  # without its last newline it is still whole


def test_a_lost_or_doubled_line_is_an_error_or_a_sound_file(tmp_path: Path) -> None:
    lines = small_file().splitlines(keepends=True)
    for i in range(len(lines)):
        assert_error_or_sound(tmp_path / "a.json", b"".join(lines[:i] + lines[i + 1 :]))
        assert_error_or_sound(tmp_path / "a.json", b"".join(lines[: i + 1] + lines[i:]))
