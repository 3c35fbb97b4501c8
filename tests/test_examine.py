"""How `gpuperf doctor` collects its facts: from files, a fake driver and processes, each of which may fail or hang."""

import fcntl
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from harness import gpuperf

from pytest_gpuperf.analysis.doctor import findings
from pytest_gpuperf.analysis.host import Facts, Torch, Trouble
from pytest_gpuperf.devices import cpu_device, slug
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.lease import lock_path
from pytest_gpuperf.nvml import GpuUsage, Nvml
from pytest_gpuperf.processes import Finished
from pytest_gpuperf.testing import FakeNvml, fake_gpu, fake_state
from pytest_gpuperf.trials import examine as examine_module
from pytest_gpuperf.trials.examine import baselines_of, examine, packages_of, torch_of
from pytest_gpuperf.trials.examine_files import (
    Places,
    container_of,
    cpu_of,
    devices_of,
    filesystem_of,
    kernel_log_of,
    locks_of,
    parent_of,
    process_name,
    shared_memory_bytes_of,
)
from pytest_gpuperf.trials.probe import Probe

U0, U1 = fake_gpu(0).uuid, fake_gpu(1).uuid


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(root=tmp_path, proc=tmp_path / "proc", sys=tmp_path / "sys", dev=tmp_path / "dev")
    for folder in (found.proc, found.sys, found.dev):
        folder.mkdir()
    return found


@pytest.fixture(autouse=True)
def lock_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "locks"
    monkeypatch.setenv("GPUPERF_LOCK_DIR", str(folder))
    return folder


def no_torch() -> Torch | None:
    return None


def examined(
    places: Places,
    nvml: Nvml | Exception,
    *,
    environment: Mapping[str, str] | None = None,
    ask_torch: Callable[[], Torch | None] = no_torch,
) -> Facts:
    def open_driver() -> Nvml:
        if isinstance(nvml, Exception):
            raise nvml
        return nvml

    return examine(
        baselines_root=places.root / "baselines",
        places=places,
        environment=environment or {},
        open_driver=open_driver,
        ask_torch=ask_torch,
    )


# Files


def test_the_drivers_files_are_listed_with_who_may_use_them(places: Places) -> None:
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"):
        write(places.dev / name)
    write(places.dev / "nvidia1").chmod(0o000)
    nodes = {node.name: node for node in devices_of(places).nodes}
    assert sorted(nodes) == ["nvidia-uvm", "nvidia0", "nvidia1", "nvidiactl"]
    assert nodes["nvidia0"].is_usable
    assert nodes["nvidia0"].mode == "-rw-r--r--"
    assert nodes["nvidia0"].owner == f"{(places.dev / 'nvidia0').owner()}:{(places.dev / 'nvidia0').group()}"
    assert nodes["nvidia1"].is_usable == (os.getuid() == 0)


def test_an_owner_that_has_no_name_here_is_its_number(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(self: Path) -> str:
        raise KeyError("gid")

    write(places.dev / "nvidia0")
    monkeypatch.setattr(Path, "group", unknown)
    assert devices_of(places).nodes[0].group == str(os.getgid())


def test_nvidias_gpus_are_counted_on_the_pci_bus(places: Places) -> None:
    bus = places.sys / "bus/pci/devices"
    for name, vendor, kind in (("0", "0x10de", "0x030200"), ("1", "0x10de", "0x040300"), ("2", "0x8086", "0x030000")):
        write(bus / name / "vendor", f"{vendor}\n")
        write(bus / name / "class", f"{kind}\n")
    assert devices_of(places).pci_gpus == 1


def test_a_host_without_a_pci_bus_and_with_windows_below(places: Places) -> None:
    write(places.dev / "dxg")
    found = devices_of(places)
    assert found.pci_gpus is None
    assert found.is_wsl


def test_xid_lines_are_read_from_the_kernels_log(places: Places) -> None:
    stamp = int((time.monotonic() - 100) * 1e6)
    text = f"6,1,{stamp},-;usb 1-1: new device\n"
    text += f"4,2,{stamp},-;NVRM: Xid (PCI:0000:3b:00): 79, pid=12, GPU has fallen off the bus.\n SUBSYSTEM=pci\n"
    text += "4,3,oops,-;NVRM: Xid (PCI:0000:3b:00): 31, x\n"
    write(places.dev / "kmsg", text)
    (error,) = kernel_log_of(places).errors
    assert (error.code, error.place, error.text) == (79, "0000:3b:00", "pid=12, GPU has fallen off the bus.")
    assert error.age_s == pytest.approx(100, abs=5)


def test_a_kernel_log_that_cannot_be_read_says_why(places: Places) -> None:
    assert kernel_log_of(places).problem == f"{places.dev}/kmsg: No such file or directory"


def test_the_kernel_log_is_left_when_it_has_no_more_to_say(places: Places) -> None:
    os.mkfifo(places.dev / "kmsg")
    writer = os.open(places.dev / "kmsg", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(writer, b"4,2,5,-;NVRM: Xid (PCI:0000:3b:00): 48, x\n")
        assert [error.code for error in kernel_log_of(places).errors] == [48]
    finally:
        os.close(writer)


def test_a_container_is_known_by_what_it_leaves_behind(places: Places) -> None:
    write(places.root / ".dockerenv")
    write(places.proc / "1/cgroup", "0::/\n")
    write(places.proc / "self/cgroup", "0::/kubepods/pod1/abc\n")
    (places.proc / "self/ns").mkdir()
    (places.proc / "self/ns/pid").symlink_to("pid:[4026532219]")
    found = container_of(places)
    assert found.hints == ("/.dockerenv", "cgroup kubepods")
    assert found.has_own_pids is True


def test_a_plain_host_is_no_container(places: Places) -> None:
    write(places.proc / "1/cgroup", "0::/init.scope\n")
    (places.proc / "self/ns").mkdir(parents=True)
    (places.proc / "self/ns/pid").symlink_to("pid:[4026531836]")
    found = container_of(places)
    assert (found.hints, found.has_own_pids) == ((), False)


def test_without_proc_nothing_is_known_of_pids(places: Places) -> None:
    assert container_of(places).has_own_pids is None


def test_the_processor_is_described(places: Places) -> None:
    for index, governor in enumerate(("powersave", "performance", "powersave")):
        write(places.sys / f"devices/system/cpu/cpu{index}/cpufreq/scaling_governor", f"{governor}\n")
    write(places.proc / "loadavg", "3.50 2.00 1.00 1/100 99\n")
    write(places.sys / "devices/system/clocksource/clocksource0/current_clocksource", "hpet\n")
    write(places.sys / "fs/cgroup/cpu.max", "50000 100000\n")
    found = cpu_of(places)
    assert (found.governors, found.load, found.clock_source) == (("performance", "powersave"), 3.5, "hpet")
    assert (found.cores, found.usable_cores) == (os.cpu_count(), 0.5)


@pytest.mark.parametrize(("quota", "cores"), [("50000", 0.5), ("-1", None)])
def test_the_quota_of_the_older_control_groups_counts_too(places: Places, quota: str, cores: float | None) -> None:
    write(places.sys / "fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(places.sys / "fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cpu_of(places).usable_cores == (cores or len(os.sched_getaffinity(0)))


def test_a_host_that_tells_nothing_of_its_processor(places: Places) -> None:
    found = cpu_of(places)
    assert (found.governors, found.load, found.clock_source) == ((), None, None)


def test_shared_memory_is_measured_and_may_be_missing(places: Places) -> None:
    assert shared_memory_bytes_of(places) == 0
    (places.dev / "shm").mkdir()
    found = os.statvfs(places.dev)
    assert shared_memory_bytes_of(places) == found.f_blocks * found.f_frsize


MOUNTS = (
    "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /a\\040b tmpfs rw 0 0\n"
    "broken\n/dev/x /home/fast ext4 rw 0 0\noverlay /home/fast overlay rw 0 0\n"
)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/x", "ext4"), ("/home/ann", "nfs4"), ("/homes", "ext4"), ("/a b/c", "tmpfs"), ("/home/fast/x", "overlay")],
)
def test_the_filesystem_of_a_folder_is_that_of_the_last_and_longest_mount(folder: str, kind: str) -> None:
    assert filesystem_of(Path(folder), MOUNTS) == kind


def test_without_mounts_the_filesystem_is_not_known() -> None:
    assert filesystem_of(Path("/x"), "") is None


def test_a_lock_that_is_held_is_found_without_taking_it(places: Places, lock_place: Path) -> None:
    path = write(lock_path(lock_place, U1), '{"pid": 71, "user": "ann", "since": "today", "test": "test_a"}')
    write(lock_path(lock_place, U0))
    found = path.stat()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    place = f"{device}:{found.st_ino} 0 EOF"
    kinds = ("FLOCK  ADVISORY  WRITE 71", "POSIX  ADVISORY  WRITE 9", "-> FLOCK  ADVISORY  WRITE 72")
    write(places.proc / "locks", "".join(f"1: {kind} {place}\n" for kind in kinds))
    facts = examined(places, FakeNvml(fake_gpu(0), fake_gpu(1)))
    assert facts.locks is not None
    (held,) = facts.locks.held
    assert (held.gpu, held.pid) == (1, 71)
    assert held.holder.startswith("pid 71 (test_a, ann")


def test_a_stacked_filesystem_numbers_its_devices_otherwise(places: Places, lock_place: Path) -> None:
    path = write(lock_path(lock_place, U0))
    write(places.proc / "locks", f"1: FLOCK  ADVISORY  WRITE 71 ff:ff:{path.stat().st_ino} 0 EOF\n")
    assert locks_of(places).held == ()
    write(places.proc / "mounts", "overlay / overlay rw 0 0\n")
    assert [lock.pid for lock in locks_of(places).held] == [71]


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="Linux tells of locks")
def test_a_real_lock_of_this_process_is_found(lock_place: Path) -> None:
    path = write(lock_path(lock_place, U0))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not Path("/proc/locks").read_text():
            pytest.skip("this kernel lists no locks")
        assert [(lock.name, lock.pid) for lock in locks_of(Places()).held] == [(path.name, os.getpid())]
    assert locks_of(Places()).held == ()


def test_a_lock_folder_that_cannot_be_is_a_problem(places: Places, lock_place: Path) -> None:
    write(lock_place, "a file")
    assert "not a folder" in (locks_of(places).problem or "")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_lock_folder_that_is_not_writable_is_a_problem(places: Places, lock_place: Path) -> None:
    lock_place.mkdir(mode=0o500)
    assert "not writable" in (locks_of(places).problem or "")


def test_a_lock_folder_for_everybody_is_not_private(places: Places, lock_place: Path) -> None:
    lock_place.mkdir(mode=0o700)
    assert locks_of(places).is_private
    lock_place.chmod(0o1777)
    assert not locks_of(places).is_private


def test_processes_have_names_and_parents_where_they_can_be_seen(places: Places) -> None:
    write(places.proc / "71/comm", "python\n")
    write(places.proc / "71/status", "Name:\tpython\nPPid:\t70\n")
    assert (process_name(places, 71), parent_of(places, 71)) == ("python", 70)
    assert (process_name(places, 72), parent_of(places, 72)) == (None, None)


# The driver


def test_a_fake_host_is_told_whole(places: Places) -> None:
    gpus = (fake_gpu(0), fake_gpu(1, name="NVIDIA H900", pci_device_id="ffff"), fake_gpu(2))
    u2 = gpus[2].uuid
    nvml = FakeNvml(*gpus, nvlinks=[(U0, U1)], ancestors={(U0, u2): "system"})
    facts = examined(places, nvml, environment={"CUDA_VISIBLE_DEVICES": "1,7", "HOME": "/x"})
    assert facts.driver is not None
    assert (facts.driver.version, facts.driver.cuda) == ("580.159.04", "13.0")
    assert [gpu.is_in_table for gpu in facts.gpus or ()] == [True, False, True]
    assert [(pair.a, pair.b, pair.link) for pair in facts.pairs] == [
        (0, 1, "nvlink"),
        (0, 2, "system"),
        (1, 2, None),
    ]
    assert facts.assignment is not None
    assert facts.assignment.variables == {"CUDA_VISIBLE_DEVICES": "1,7"}
    assert facts.assignment.visible == (U1,)
    assert (facts.assignment.wrong or "").startswith("entry 2, '7'")
    assert facts.baselines is not None
    assert facts.baselines.wanted == ("nvidia-h900",)
    assert facts.troubles == ()


def test_slurms_gpus_are_told_where_slurm_does_not_fence(places: Places) -> None:
    nvml = FakeNvml(fake_gpu(0), fake_gpu(1))
    facts = examined(places, nvml, environment={"SLURM_JOB_ID": "12", "SLURM_JOB_GPUS": "1"})
    assert facts.assignment is not None
    assert facts.assignment.assigned == (U1,)


def test_this_process_and_its_children_are_no_others(places: Places) -> None:
    write(places.proc / "71/comm", "python\n")
    write(places.proc / "72/status", f"PPid:\t{os.getpid()}\n")
    facts = examined(places, FakeNvml(states=[fake_state(process_pids=(os.getpid(), 71, 72, 73))]))
    (gpu,) = facts.gpus or ()
    assert [(other.pid, other.command) for other in gpu.others or ()] == [(71, "python"), (73, None)]


def test_a_list_of_processes_that_is_not_told_is_none(places: Places) -> None:
    (gpu,) = examined(places, FakeNvml(states=[fake_state(process_pids=None)])).gpus or ()
    assert gpu.others is None


@pytest.mark.parametrize(
    "message",
    [
        "This user may not talk to the NVIDIA driver. See who may with `ls -l /dev/nvidia*`.",
        "The NVIDIA driver is installed but not loaded. Run `sudo modprobe nvidia`, or reboot.",
        "The kernel has trouble with a GPU's interrupts (NVML IRQ issue). Look at `sudo dmesg`.",
        "The NVIDIA library and the loaded driver have different versions: not rebooted. Reboot.",
        "The package nvidia-ml-py is missing. Run `pip install nvidia-ml-py`.",
        "The unofficial package pynvml hides NVIDIA's own nvidia-ml-py. Run `pip uninstall -y pynvml`.",
    ],
)
def test_why_the_driver_cannot_be_asked_is_a_finding_with_its_mend(places: Places, message: str) -> None:
    write(places.dev / "nvidiactl")
    facts = examined(places, DeviceError(message))
    (found,) = [one for one in findings(facts) if one.topic == "driver"]
    assert found.level == "problem"
    assert f"{found.text}. {found.mend}" == message


def test_without_a_driver_the_baselines_are_those_of_the_cpu(places: Places) -> None:
    facts = examined(places, DeviceError("No NVIDIA driver was found. Install it."))
    assert facts.baselines is not None
    assert facts.baselines.wanted == (slug([cpu_device(cpuinfo=places.proc / "cpuinfo")]),)
    assert facts.gpus is None


LOST = DeviceError("GPU 1 is lost: it has fallen off the bus. Reboot.")


def test_a_gpu_lost_while_it_is_read_leaves_the_others(places: Places) -> None:
    facts = examined(places, FakeNvml(fake_gpu(0), fake_gpu(1), errors={("condition", 2): LOST}))
    assert [gpu.problem for gpu in facts.gpus or ()] == [None, str(LOST)]


def test_a_gpu_lost_before_is_a_problem_and_the_others_are_looked_at(places: Places) -> None:
    gpus = tuple(fake_gpu(index) for index in range(3))
    facts = examined(places, FakeNvml(*gpus, lost={gpus[1].uuid: 0}))
    assert [gpu.info.index for gpu in facts.gpus or ()] == [0, 2]
    (found,) = [one for one in findings(facts) if one.level == "problem" and one.topic == "GPU"]
    assert found.text == "GPU 1 is lost: it has fallen off the bus"
    assert "sudo nvidia-smi --gpu-reset" in (found.mend or "")


def test_where_all_gpus_are_lost_that_is_the_one_problem_with_them(places: Places) -> None:
    facts = examined(places, FakeNvml(fake_gpu(), lost={fake_gpu().uuid: 0}))
    texts = [one.text for one in findings(facts) if one.topic == "GPU"]
    assert texts == ["GPU 0 is lost: it has fallen off the bus"]
    assert not facts.baselines or not facts.baselines.wanted  # the CPU is not measured instead


def test_a_job_whose_gpu_is_lost_is_not_told_to_show_none(places: Places) -> None:
    gpus = tuple(fake_gpu(index) for index in range(3))
    nvml = FakeNvml(*gpus, lost={gpus[1].uuid: 0})
    facts = examined(places, nvml, environment={"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1"})
    (found,) = [one for one in findings(facts) if one.topic == "assignment" and "SLURM_JOB_GPUS" in one.text]
    assert found.level == "problem"
    assert found.text == "Slurm job 7: SLURM_JOB_GPUS=1: what it names does not answer"
    assert found.mend == "Ask for another GPU, or host."


@pytest.mark.parametrize("call", range(1, 16))
def test_whatever_call_fails_is_a_finding(places: Places, call: int) -> None:
    facts = examined(places, FakeNvml(fake_gpu(0), fake_gpu(1), errors={call: LOST}))
    assert any("GPU 1 is lost" in one.text and one.level == "problem" for one in findings(facts))


def test_a_driver_that_fails_in_an_unforeseen_way_is_a_finding(places: Places) -> None:
    facts = examined(places, FakeNvml(errors={1: ValueError("what is this")}))
    assert Trouble(topic="driver", text="ValueError: what is this") in facts.troubles
    assert any("not looked at: ValueError: what is this" in one.text for one in findings(facts))


# Limits


@pytest.fixture
def blocker() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_question_without_an_answer_in_time_is_a_trouble(blocker: threading.Event) -> None:
    probe = Probe("git", blocker.wait, limit_s=0.05)
    begin_s = time.monotonic()
    assert probe.answer() == Trouble(topic="git", text="no answer within 0.05 s")
    assert time.monotonic() - begin_s < 1


def test_what_hangs_does_not_hold_up_the_rest(
    places: Places, blocker: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine_module, "_DRIVER_LIMIT_S", 0.2)
    monkeypatch.setattr(examine_module, "_TORCH_LIMIT_S", -0.3)

    def hanging() -> Torch | None:
        blocker.wait()
        return None

    class Hanging(FakeNvml):
        def driver_version(self) -> str | None:
            blocker.wait()
            return None

    begin_s = time.monotonic()
    facts = examined(places, Hanging(), ask_torch=hanging)
    assert time.monotonic() - begin_s < 2
    assert [trouble.topic for trouble in facts.troubles] == ["driver", "torch"]
    assert facts.cpu is not None
    topics = [one.topic for one in findings(facts) if "not looked at" in one.text]
    assert topics == ["torch", "driver"]


def test_a_gpu_that_hangs_costs_none_of_the_other_findings(
    places: Places, blocker: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine_module, "_LIMIT_S", 0.3)

    class Hanging(FakeNvml):
        def usage(self, uuid: str) -> GpuUsage:
            if uuid == fake_gpu(1).uuid:
                blocker.wait()
            return super().usage(uuid)

    begin_s = time.monotonic()
    facts = examined(places, Hanging(fake_gpu(0), fake_gpu(1), fake_gpu(2)))
    assert time.monotonic() - begin_s < 2
    assert facts.gpus is not None
    assert [gpu.problem is None for gpu in facts.gpus] == [True, False, True]
    assert facts.troubles == ()
    said = [f"{one.text} -> {one.mend}" for one in findings(facts) if one.topic == "GPU" and one.level == "problem"]
    (hangs,) = said
    assert hangs.startswith(f"GPU 1 (NVIDIA H100 80GB HBM3, {fake_gpu(1).uuid}): no answer within 0.3 s -> ")
    assert "nvidia-smi -i 1" in hangs


def test_no_limit_is_longer_than_ten_seconds() -> None:
    assert examine_module._DRIVER_LIMIT_S + 1 < 10
    assert examine_module._TORCH_LIMIT_S + 0.5 + 1 < 10


# Packages, torch, baselines


def test_packages_are_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["pytest>=8.4", "torch<=2.13.0,>=2.6; extra == 'torch'", "nvidia-ml-py>=999"]
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    versions = {"pytest": "9.0.0", "torch": "2.13.0+cpu", "nvidia-ml-py": "13.0.1"}
    monkeypatch.setattr(examine_module, "package_version", versions.get)
    found = {one.name: one for one in packages_of()}
    assert found["pytest"].is_met
    assert found["torch"].is_met
    assert not found["nvidia-ml-py"].is_met
    assert found["nvidia-ml-py"].needed == ">=999"
    assert found["pynvml"].version is None
    assert found["pynvml"].is_met


def test_of_several_extras_the_one_that_fits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch<=2.13.0,>=2.6; extra == 'torch'", "torch==2.13.0; extra == 'vllm-cpu'"]
    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    monkeypatch.setattr(examine_module, "package_version", {"torch": "2.11.0+cu130"}.get)
    assert next(one for one in packages_of() if one.name == "torch").is_met
    monkeypatch.setattr(examine_module, "package_version", {"torch": "2.5.0"}.get)
    torch = next(one for one in packages_of() if one.name == "torch")
    assert not torch.is_met
    assert torch.needed == "<=2.13.0,>=2.6 or ==2.13.0"


def finished(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    monkeypatch.setattr(examine_module, "package_version", lambda _: "2.11.0")
    monkeypatch.setattr(examine_module, "run_group", lambda *_, **__: Finished(**fields))


def test_torch_answers_on_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"version": "2.11.0", "cuda": "13.0", "hip": None, "is_available": True, "uuids": [U0], "warnings": []}
    finished(monkeypatch, code=0, tail=f"noise\n{json.dumps(told)}\n")
    assert torch_of() == Torch(version="2.11.0", cuda="13.0", is_available=True, uuids=(U0,))


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "`import torch` and its first look at the GPUs took longer than 8 s"),
        (1, "`import torch` ended with exit code 1: ImportError: no libcudart"),
        (-11, "`import torch` was ended by SIGSEGV: ImportError: no libcudart"),
    ],
)
def test_torch_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch, code: int | None, text: str) -> None:
    finished(monkeypatch, code=code, tail="Traceback\nImportError: no libcudart\n")
    with pytest.raises(RuntimeError) as raised:
        torch_of()
    assert str(raised.value) == text


def test_torch_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_module, "package_version", lambda _: None)
    assert torch_of() is None


def test_the_question_to_torch_is_one_that_torch_understands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
__version__ = "9.9"
class version: cuda = "13.0"; hip = None
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    @staticmethod
    def get_device_properties(index):
        import warnings
        warnings.warn("sm_120 is not compatible with this build\\n   of CUDA")
        class properties: uuid = f"0000000{index}"
        return properties
"""
    write(tmp_path / "site/torch.py", source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr(examine_module, "package_version", lambda _: "9.9")
    found = torch_of()
    assert found is not None
    assert found.uuids == ("GPU-00000000", "GPU-00000001")
    assert set(found.warnings) == {"sm_120 is not compatible with this build of CUDA"}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_real_torch_answers() -> None:
    found = torch_of(timeout_s=60)
    assert found is not None
    assert found.version == metadata.version("torch")


def test_baselines_of_a_pool_of_runners_count(tmp_path: Path) -> None:
    for name in ("nvidia-h100", "nvidia-h100+pool-a", "nvidia-h100-pcie", "2x-nvidia-h100"):
        (tmp_path / name).mkdir()
    found = baselines_of(tmp_path, ["nvidia-h100"]).found
    assert found == ("nvidia-h100", "nvidia-h100+pool-a")
    assert baselines_of(tmp_path / "none", ["nvidia-h100"]).found == ()


# The command


def using(monkeypatch: pytest.MonkeyPatch, facts: Facts) -> None:
    monkeypatch.setattr(examine_module, "examine", lambda **_: facts)


def test_the_command_exits_with_1_for_a_problem_only(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    write(places.dev / "nvidiactl")
    using(monkeypatch, examined(places, DeviceError("The driver is not loaded. Run `sudo modprobe nvidia`.")))
    done = gpuperf("doctor")
    assert done.code == 1
    assert "problem driver      The driver is not loaded" in done.output
    assert "-> Run `sudo modprobe nvidia`." in done.output
    assert done.errors == ""


def test_the_command_exits_with_0_for_warnings(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, examined(places, DeviceError("No NVIDIA driver was found. Install it.")))
    done = gpuperf("doctor")
    assert "warning memory" in done.output  # there is no dev/shm
    assert "CPU only: no NVIDIA driver was found" in done.output
    assert done.code == 0


def test_the_command_writes_json(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, examined(places, FakeNvml(fake_gpu(0), fake_gpu(1))))
    told = json.loads(gpuperf("doctor", "--json").output)
    assert told["schema"] == 1
    assert told["pairs"] == [{"a": 0, "b": 1, "link": None}]
    assert told["counts"]["problem"] == sum(one["level"] == "problem" for one in told["findings"])


def test_a_wrong_option_of_the_command_is_one_line() -> None:
    done = gpuperf("doctor", "--bogus")
    assert done.code == 1
    assert done.errors.count("\n") == 1


def test_the_command_works_on_this_very_host() -> None:
    done = gpuperf("doctor", "--json")
    assert done.code in (0, 1)
    assert {"Python", "CPU", "locks"} <= {one["topic"] for one in json.loads(done.output)["findings"]}
