"""What the files of Linux tell `gpuperf doctor`: /dev, /proc, /sys, and the lock folder."""

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pytest_gpuperf.analysis.host import Container, Cpu, DeviceNode, Devices, HeldLock, KernelError, KernelLog, Locks
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.lease import holder_of, lock_folder
from pytest_gpuperf.records import Record

#: Inode of the first namespace of processes (Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO).
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"
_CONTAINERS = ("docker", "kubepods", "containerd", "libpod", "lxc", "crio")
_NODE = re.compile(r"nvidia(ctl|-uvm|\d+)")
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+),? ?(.*)")
_LOG_BYTES = 8 * 2**20
_TEXT_LENGTH = 120
#: Filesystems that answer stat and /proc/locks with different device numbers.
_STACKED = frozenset({"overlay", "btrfs"})


class Places(Record, frozen=True, kw_only=True):
    """Where Linux tells of itself."""

    root: Path = Path("/")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


def devices_of(places: Places) -> Devices:
    """Look for the driver's files in /dev, and for NVIDIA's GPUs on the PCI bus."""
    names = sorted(path.name for path in places.dev.iterdir() if _NODE.fullmatch(path.name))
    bus = places.sys / "bus/pci/devices"
    pci_gpus = sum(_is_nvidia_gpu(path) for path in bus.iterdir()) if bus.is_dir() else None
    return Devices(
        nodes=tuple(_node(places.dev / name) for name in names),
        is_wsl=(places.dev / "dxg").exists(),
        pci_gpus=pci_gpus,
    )


def _is_nvidia_gpu(device: Path) -> bool:
    return _line(device / "vendor") == _NVIDIA and (_line(device / "class") or "").startswith(_DISPLAY_CLASS)


def _node(path: Path) -> DeviceNode:
    found = path.stat()
    return DeviceNode(
        name=path.name,
        owner=f"{_name_of(path.owner, found.st_uid)}:{_name_of(path.group, found.st_gid)}",
        mode=stat.filemode(found.st_mode),
        is_usable=os.access(path, os.R_OK | os.W_OK),
    )


def _name_of(ask: Callable[[], str], number: int) -> str:
    try:
        return ask()
    except KeyError:  # a container often does not know the host's groups
        return str(number)


def kernel_log_of(places: Places) -> KernelLog:
    """Look for Xid lines in the kernel's log, which only some users may read."""
    try:
        text = _kernel_text(places.dev / "kmsg")
    except OSError as error:
        return KernelLog(problem=f"{places.dev / 'kmsg'}: {error.strerror}")
    now_s = time.monotonic()
    return KernelLog(errors=tuple(_kernel_errors(text, now_s)))


def _kernel_text(path: Path) -> str:
    # One read is one record (Linux, Documentation/ABI/testing/dev-kmsg); at the end of the log it would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    text = bytearray()
    try:
        while len(text) < _LOG_BYTES:
            try:
                record = os.read(descriptor, 8192)
            except BrokenPipeError:  # the oldest records were written over while we read
                continue
            if not record:
                break
            text += record
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
    return text.decode(errors="replace")


def _kernel_errors(text: str, now_s: float) -> Iterator[KernelError]:
    for line in text.splitlines():
        head, _, message = line.partition(";")
        found = _XID.search(message)
        numbers = head.split(",")
        if found and len(numbers) > 2 and numbers[2].isdigit():
            yield KernelError(
                code=int(found[2]),
                place=found[1],
                text=found[3][:_TEXT_LENGTH],
                age_s=max(now_s - int(numbers[2]) * 1e-6, 0.0),
            )


def container_of(places: Places) -> Container:
    """Look for what containers leave behind, and whether processes are numbered apart."""
    hints = [f"/{name}" for name in (".dockerenv", "run/.containerenv") if (places.root / name).exists()]
    groups = "".join(_text(places.proc / number / "cgroup") or "" for number in ("1", "self"))
    hints += [f"cgroup {word}" for word in _CONTAINERS if re.search(rf"[/:-]{word}", groups)]
    try:
        namespace = str((places.proc / "self/ns/pid").readlink())
    except OSError:
        return Container(hints=tuple(hints))
    return Container(hints=tuple(hints), has_own_pids=namespace != _FIRST_PID_NAMESPACE)


def cpu_of(places: Places) -> Cpu:
    """Read the number of cores, the load, the governors and the clock source."""
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    governors = (places.sys / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    load = (_line(places.proc / "loadavg") or "").split()
    return Cpu(
        cores=cores,
        usable_cores=min(affinity, _quota(places) or affinity),
        load=float(load[0]) if load else None,
        governors=tuple(sorted({governor for path in governors if (governor := _line(path))})),
        clock_source=_line(places.sys / "devices/system/clocksource/clocksource0/current_clocksource"),
    )


def _quota(places: Places) -> float | None:
    """Cores that the control group allows (Linux, cgroup-v2: cpu.max; version 1: cpu.cfs_quota_us)."""
    words = (_line(places.sys / "fs/cgroup/cpu.max") or "").split()
    if not words:
        words = [_line(places.sys / f"fs/cgroup/cpu/cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None


def shared_memory_bytes_of(places: Places) -> int:
    """Measure /dev/shm; a host without it has 0."""
    folder = places.dev / "shm"
    if not folder.is_dir():
        return 0
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize


def locks_of(places: Places) -> Locks:
    """Look at the lock folder, and at who holds a lock in it, without taking one."""
    try:
        folder = lock_folder()
    except DeviceError as error:
        return Locks(problem=str(error))
    found = folder.stat()
    filesystem = filesystem_of(folder, _text(places.proc / "mounts") or "")
    return Locks(
        folder=str(folder),
        is_private=found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH,
        filesystem=filesystem,
        held=tuple(_held(folder, _text(places.proc / "locks") or "", is_stacked=filesystem in _STACKED)),
    )


def filesystem_of(folder: Path, mounts: str) -> str | None:
    """Name the filesystem that a folder is on, by the longest mount point above it; the last one mounted counts."""
    best, kind = -1, None
    resolved = folder.resolve()
    for words in (line.split() for line in mounts.splitlines()):
        if len(words) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[1]))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), words[2]
    return kind


def _held(folder: Path, locks: str, *, is_stacked: bool) -> Iterator[HeldLock]:
    # "1: FLOCK  ADVISORY  WRITE 708 08:01:131074 0 EOF" (proc_locks(5)); one that waits has "->".
    holders: dict[tuple[str, str], int] = {}
    for line in locks.splitlines():
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and words[4].isdigit():
            device, _, inode = words[5].rpartition(":")
            holders[device, inode] = int(words[4])
    for path in sorted(folder.glob("device-*.lock")):
        found = path.lstat()
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        own = [
            pid for (on, inode), pid in holders.items() if inode == str(found.st_ino) and (is_stacked or on == device)
        ]
        if own:
            yield HeldLock(name=path.name, pid=own[0], holder=str(holder_of(path) or ""))


def process_name(places: Places, pid: int) -> str | None:
    """Name a process; `None`: it is not to be seen from here."""
    return _line(places.proc / str(pid) / "comm")


def parent_of(places: Places, pid: int) -> int | None:
    """Number of a process's parent; `None`: it is not to be seen from here."""
    found = re.search(r"^PPid:\s*(\d+)", _text(places.proc / str(pid) / "status") or "", re.MULTILINE)
    return int(found[1]) if found else None


def _line(path: Path) -> str | None:
    text = _text(path)
    return text.strip() if text else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
