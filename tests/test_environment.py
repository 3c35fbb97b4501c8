"""What is written beside a result, and what differs between two."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from pytest_gpuperf.devices import Device, find_devices
from pytest_gpuperf.environment import collect, git_commit, version_differences, visit_id
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.records import Hardware
from pytest_gpuperf.testing import FakeNvml, fake_gpu

H100 = Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984, power_limit_w=700.0)
CPU = Device(kind="cpu", index=0, uuid="cpu-0", name="Intel(R) Xeon(R) Processor", memory_bytes=64 * 10**9)


def test_two_gpus_are_one_kind_of_hardware() -> None:
    devices = find_devices(FakeNvml(fake_gpu(), fake_gpu(1)), cuda_visible_devices=None)
    environment = collect(devices, driver="580.159.04", cuda="13.0")
    assert environment.hardware == msgspec.structs.replace(H100, count=2)
    assert environment.versions["driver"] == "580.159.04"
    assert {"python", "numpy", "cpu", "kernel"} <= environment.versions.keys()


def test_unlike_gpus_are_both_named_and_the_lesser_counts() -> None:
    gpus = (fake_gpu(), fake_gpu(1, "NVIDIA H200", pci_device_id="2335", memory_bytes=150 * 10**9, power_limit_w=600.0))
    hardware = collect(find_devices(FakeNvml(*gpus), cuda_visible_devices=None), driver=None, cuda=None).hardware
    assert hardware.name == "NVIDIA H100 80GB HBM3 and NVIDIA H200"
    assert (hardware.memory_bytes, hardware.power_limit_w) == (85_520_809_984, 600.0)


def test_a_power_limit_that_one_gpu_does_not_tell_is_not_known() -> None:
    gpus = (fake_gpu(), fake_gpu(1, power_limit_w=None))
    devices = find_devices(FakeNvml(*gpus), cuda_visible_devices=None)
    assert collect(devices, driver=None, cuda=None).hardware.power_limit_w is None


def test_a_cpu_has_neither_memory_nor_driver() -> None:
    environment = collect([CPU], driver=None, cuda=None)
    assert environment.hardware == Hardware(name="Intel(R) Xeon(R) Processor")
    assert not {"driver", "cuda", "cpu"} & environment.versions.keys()


def test_no_devices_have_no_environment() -> None:
    with pytest.raises(DeviceError, match="Without a device"):
        collect([], driver=None, cuda=None)


def test_versions_are_read_without_importing_torch() -> None:
    code = (
        "import sys; from pytest_gpuperf.devices import cpu_device; from pytest_gpuperf.environment import collect;"
        "collect([cpu_device()], driver=None, cuda=None); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_versions_that_changed_are_named_the_likeliest_cause_first() -> None:
    then = {"python": "3.11.7", "torch": "2.10.0", "driver": "570.1", "aotriton": "1", "numpy": "2.4.6"}
    now = {"python": "3.11.9", "torch": "2.11.0", "driver": "580.2", "vllm": "0.26.0", "numpy": "2.4.6"}
    assert version_differences(now, then) == (
        "driver 570.1 -> 580.2",
        "torch 2.10.0 -> 2.11.0",
        "vllm none -> 0.26.0",
        "python 3.11.7 -> 3.11.9",
        "aotriton 1 -> none",
    )


def test_a_visit_is_one_boot_on_one_utc_day(tmp_path: Path) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("9f0c\n")
    late = datetime(2026, 11, 20, 23, 30, tzinfo=UTC)
    elsewhere = late.astimezone(timezone(timedelta(hours=5)))
    first = visit_id(late, boot_id_file=boot)
    assert len(first) == 12
    assert visit_id(elsewhere, boot_id_file=boot) == first
    assert visit_id(late + timedelta(hours=1), boot_id_file=boot) != first
    boot.write_text("aaaa\n")
    assert visit_id(late, boot_id_file=boot) != first


def test_without_a_boot_id_the_host_stands_in(tmp_path: Path) -> None:
    now = datetime(2026, 11, 20, tzinfo=UTC)
    assert visit_id(now, boot_id_file=tmp_path / "missing") == visit_id(now, boot_id_file=tmp_path / "missing")


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)  # noqa: S607 - any git


def test_the_commit_says_whether_tracked_files_were_changed(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert git_commit(tmp_path) is None
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    clean = git_commit(tmp_path)
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert git_commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2\n")
    assert git_commit(tmp_path) == f"{clean}-dirty"


def test_outside_git_or_without_it_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    assert git_commit(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_a_git_that_hangs_gives_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert git_commit(tmp_path) is None
