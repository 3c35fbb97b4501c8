"""What must match for two results to be comparable, and what is only noted beside them."""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.records import Environment, Hardware

_PACKAGES = ("torch", "triton", "vllm", "transformers", "numpy", "pytest-gpuperf")

#: What explains a changed number most often, first.
_BY_IMPORTANCE = ("driver", "cuda", *_PACKAGES[:-1], "python", "cpu", "kernel", "pytest-gpuperf")


def collect(devices: Sequence[Device], *, driver: str | None, cuda: str | None, link: str | None = None) -> Environment:
    """Describe what a test is measured on.

    Nothing heavy is imported: versions come from package metadata.

    Args:
        devices: What the test holds; of unlike GPUs, the smallest memory and the lowest power limit count.
        driver: Version of the NVIDIA driver.
        cuda: Newest CUDA version that the driver runs.
        link: How several devices are connected, see `topology.class_of`.

    Raises:
        DeviceError: There are no devices.
    """
    if not devices:
        raise DeviceError("Without a device there is no environment. Measure on a GPU or on the CPU.")
    is_cpu = devices[0].kind == "cpu"
    limits_w = [device.power_limit_w for device in devices if device.power_limit_w is not None]
    hardware = Hardware(
        name=" and ".join(sorted({device.name for device in devices})),
        count=len(devices),
        memory_bytes=None if is_cpu else min(device.memory_bytes for device in devices),
        power_limit_w=min(limits_w) if len(limits_w) == len(devices) else None,
        is_mig=any(device.is_mig for device in devices),
        link=link,
    )
    versions = {
        "driver": driver,
        "cuda": cuda,
        "python": platform.python_version(),
        **{package: package_version(package) for package in _PACKAGES},
        "cpu": None if is_cpu else cpu_device().name,
        "kernel": platform.release(),
    }
    return Environment(hardware=hardware, versions={name: text for name, text in versions.items() if text})


def version_differences(now: Mapping[str, str], then: Mapping[str, str]) -> tuple[str, ...]:
    """Name the versions that changed, such as `torch 2.10.0 -> 2.11.0`, the likeliest cause first."""
    changed = {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
    ordered = sorted(changed, key=lambda name: (_rank(name), name))
    return tuple(f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}" for name in ordered)


def visit_id(now: datetime, *, boot_id_file: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Name one visit to a machine: one boot of it on one day (UTC), as twelve hex digits.

    Args:
        now: With its time zone; without, it is local time.
        boot_id_file: Where Linux keeps the boot's id; without it, the host's name stands in.
    """
    boot = boot_id_file.read_text().strip() if boot_id_file.exists() else platform.node()
    return hashlib.sha256(f"{boot} {now.astimezone(UTC).date()}".encode()).hexdigest()[:12]


def git_commit(folder: Path) -> str | None:
    """Read the revision of the code under test: twelve digits, and `-dirty` if tracked files were changed.

    Returns:
        What `GPUPERF_COMMIT` says, for a container without the repository; else `None` outside a repository, without
        git or a commit, and if git takes longer than 5 s.
    """
    named = os.environ.get("GPUPERF_COMMIT")
    if named:
        return named
    # Excluding every tag leaves the bare revision. No optional locks: tests may run beside a commit.
    return _git(folder, "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def git_top(folder: Path) -> Path | None:
    """Find the top folder of the repository that a folder lies in, or will lie in; `None` outside one."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    top = _git(existing, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def _git(folder: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run([git, *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip() or None


def package_version(package: str) -> str | None:
    """Look up which version of a package is installed, without importing it; `None`: it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rank(name: str) -> int:
    return _BY_IMPORTANCE.index(name) if name in _BY_IMPORTANCE else len(_BY_IMPORTANCE)
