"""What `gpuperf doctor` makes of a host's facts: every finding, its absence on a sound host, and how it is printed."""

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from pytest_gpuperf.analysis.doctor import findings
from pytest_gpuperf.analysis.finding import Finding, gpu_names, split_message
from pytest_gpuperf.analysis.host import (
    Assignment,
    Baselines,
    Container,
    Cpu,
    DeviceNode,
    Devices,
    Driver,
    Facts,
    Git,
    Gpu,
    HeldLock,
    KernelError,
    KernelLog,
    Locks,
    OtherProcess,
    Package,
    Pair,
    Torch,
    Trouble,
)
from pytest_gpuperf.nvml import GpuCondition, GpuInfo, GpuUsage
from pytest_gpuperf.report.doctor import doctor_json, doctor_lines, matrix
from pytest_gpuperf.testing import fake_condition, fake_gpu, fake_state

U0, U1 = fake_gpu(0).uuid, fake_gpu(1).uuid
IDLE = GpuUsage(sm_clock_mhz=345.0, busy_share=0.0, holds=("idle",))
BUSY = GpuUsage(sm_clock_mhz=1410.0, busy_share=0.99, holds=("power cap",))
NO_DRIVER = "No NVIDIA driver was found (libnvidia-ml.so.1 is missing). Install it."


def node(name: str, **changes: Any) -> DeviceNode:
    return DeviceNode(**{"name": name, "owner": "root:root", "mode": "crw-rw-rw-", "is_usable": True, **changes})


NODES = (node("nvidia-uvm"), node("nvidia0"), node("nvidiactl"))


def sound_gpu(index: int = 0, *, usage: GpuUsage = IDLE, others: tuple[OtherProcess, ...] = (), **info: Any) -> Gpu:
    return Gpu(info=fake_gpu(index, **info), state=fake_state(), usage=usage, condition=fake_condition(), others=others)


def with_state(**changes: Any) -> tuple[Gpu, ...]:
    return (replace(sound_gpu(), state=fake_state(**changes)),)


def with_condition(**changes: Any) -> tuple[Gpu, ...]:
    return (replace(sound_gpu(), condition=fake_condition(**changes)),)


def with_holds(*holds: str) -> tuple[Gpu, ...]:
    return (sound_gpu(usage=replace(IDLE, holds=holds)),)


def package(name: str, version: str | None, **changes: Any) -> Package:
    return Package(name=name, version=version, **changes)


PACKAGES = (package("pytest", "9.2.0", needed=">=8.4"), package("nvidia-ml-py", "13.615.71"))
TORCH = Torch(version="2.11.0+cu130", cuda="13.0", is_available=True, uuids=(U0,))
XID = KernelError(code=79, place="0000:3b:00", text="GPU has fallen off the bus.", age_s=7300.0)

SOUND = Facts(
    python="3.12.1",
    packages=PACKAGES,
    torch=TORCH,
    driver=Driver(version="580.159.04", cuda="13.0"),
    devices=Devices(nodes=NODES, pci_gpus=1),
    gpus=(sound_gpu(),),
    kernel_log=KernelLog(),
    assignment=Assignment(visible=(U0,)),
    locks=Locks(folder="/run/lock/gpuperf", filesystem="tmpfs"),
    container=Container(has_own_pids=False),
    cpu=Cpu(cores=32, usable_cores=32, load=0.5, governors=("performance",), clock_source="tsc"),
    shared_memory_bytes=64 * 10**9,
    git=Git(program="/usr/bin/git", repository="/home/a/project"),
    baselines=Baselines(root="baselines", wanted=("nvidia-h100",), found=("nvidia-h100",)),
)
TWO = replace(
    SOUND,
    gpus=(sound_gpu(0), sound_gpu(1)),
    torch=replace(TORCH, uuids=(U0, U1)),
    devices=Devices(nodes=NODES, pci_gpus=2),
    assignment=Assignment(visible=(U0, U1)),
    pairs=(Pair(a=0, b=1, link="nvlink"),),
)
CPU_ONLY = replace(
    SOUND,
    gpus=None,
    torch=Torch(version="2.11.0+cpu"),
    driver=Driver(problem=NO_DRIVER),
    devices=Devices(pci_gpus=0),
    kernel_log=KernelLog(problem="/dev/kmsg: No such file or directory"),
    assignment=Assignment(),
)


def bad(facts: Facts) -> list[Finding]:
    return [finding for finding in findings(facts) if finding.level != "ok"]


def given(**changes: Any) -> Facts:
    return replace(SOUND, **changes)


def visible(text: str, *left: str, wrong: str | None = None, **variables: str) -> Assignment:
    return Assignment(variables={"CUDA_VISIBLE_DEVICES": text, **variables}, visible=left, wrong=wrong)


def of_slurm(*, assigned: tuple[str, ...] | None = None, **variables: str) -> Assignment:
    return Assignment(variables={"SLURM_JOB_ID": "12", **variables}, visible=(U0, U1), assigned=assigned)


def locks(**changes: Any) -> Locks:
    return Locks(**{"folder": "/x/locks", "filesystem": "ext4", **changes})


def driver(code_message: str) -> dict[str, Any]:
    return {"driver": Driver(problem=code_message), "gpus": None, "torch": replace(TORCH, is_available=False)}


#: name -> (facts, level, topic, what the text says, what the mend says)
FOUND: dict[str, tuple[Facts, str, str, str, str]] = {
    "old package": (
        given(packages=(package("pytest", "7.4.0", needed=">=8.4", is_met=False),)),
        "problem",
        "Python",
        "pytest 7.4.0 is installed, and pytest-gpuperf needs >=8.4",
        "pip install 'pytest>=8.4'",
    ),
    "no nvidia-ml-py": (
        given(packages=(package("nvidia-ml-py", None),)),
        "problem",
        "Python",
        "nvidia-ml-py is not installed",
        "pip install nvidia-ml-py",
    ),
    "unofficial pynvml": (
        given(packages=(*PACKAGES, package("pynvml", "11.5.3"))),
        "warning",
        "Python",
        "the unofficial package pynvml 11.5.3 overwrites",
        "pip uninstall -y pynvml",
    ),
    "pynvml as a shell": (
        given(packages=(*PACKAGES, package("pynvml", "13.0.1"))),
        "note",
        "Python",
        "pynvml 13.0.1 is only a shell",
        "pip uninstall -y pynvml",
    ),
    "no xdist for two": (
        replace(TWO, packages=(*PACKAGES, package("pytest-xdist", None))),
        "note",
        "Python",
        "tests use 2 GPUs one after the other",
        "pip install pytest-xdist",
    ),
    "no torch": (
        given(torch=None),
        "warning",
        "torch",
        "torch is not installed: GPU work cannot be timed",
        "pip install 'pytest-gpuperf[torch]'",
    ),
    "no torch on the CPU": (
        replace(CPU_ONLY, torch=None),
        "note",
        "torch",
        "workloads that need it are skipped",
        "pip install",
    ),
    "torch for the CPU": (
        given(torch=Torch(version="2.11.0+cpu")),
        "problem",
        "torch",
        "torch 2.11.0+cpu, built for the CPU, cannot use the GPUs",
        "Install a build for CUDA 13.0 or older",
    ),
    "torch too new": (
        given(torch=replace(TORCH, is_available=False, uuids=()), driver=Driver(version="550.54", cuda="12.4")),
        "problem",
        "torch",
        "built for CUDA 13.0, and the driver runs up to CUDA 12.4",
        "or update the driver",
    ),
    "torch cannot": (
        given(torch=replace(TORCH, is_available=False, uuids=(), warnings=("CUDA unknown error",))),
        "problem",
        "torch",
        "cannot use the GPUs: CUDA unknown error",
        "nvidia-smi",
    ),
    "torch a little newer": (
        given(driver=Driver(version="570.1", cuda="12.8"), torch=replace(TORCH, cuda="12.10")),
        "note",
        "torch",
        "torch was built with CUDA 12.10, the driver knows 12.8",
        "Update the driver",
    ),
    "torch warns": (
        given(torch=replace(TORCH, warnings=("sm_120 is not compatible",))),
        "note",
        "torch",
        "sm_120 is not compatible",
        "Install a build",
    ),
    "torch counts otherwise": (
        replace(TWO, torch=TORCH),
        "problem",
        "torch",
        "torch counts 1 GPU, NVML 2 under CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID",
    ),
    "torch orders otherwise": (
        replace(TWO, torch=replace(TORCH, uuids=(U1, U0))),
        "problem",
        "torch",
        f"its cuda:0 is {U1}, NVML's {U0}",
        "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    ),
    "driver not loaded": (
        given(**driver("The NVIDIA driver is installed but not loaded. Run `sudo modprobe nvidia`, or reboot.")),
        "problem",
        "driver",
        "installed but not loaded",
        "sudo modprobe nvidia",
    ),
    "CPU only": (
        CPU_ONLY,
        "note",
        "driver",
        "CPU only: no NVIDIA driver was found",
        "pytest --gpuperf-device=cpu",
    ),
    "no driver for a GPU on the bus": (
        replace(CPU_ONLY, devices=Devices(pci_gpus=2)),
        "problem",
        "driver",
        "No NVIDIA driver was found",
        "Install it.",
    ),
    "no files": (
        replace(CPU_ONLY, devices=Devices(pci_gpus=2)),
        "problem",
        "devices",
        "no /dev/nvidia*, and 2 NVIDIA GPUs on the PCI bus",
        "sudo modprobe nvidia",
    ),
    "closed files": (
        given(devices=Devices(nodes=(*NODES, node("nvidia1", owner="root:video", mode="crw-rw----", is_usable=False)))),
        "problem",
        "devices",
        "this user may not use /dev/nvidia1 (root:video, crw-rw----)",
        "sudo usermod -aG video $USER",
    ),
    "files for root only": (
        given(devices=Devices(nodes=(*NODES, node("nvidia1", mode="crw-------", is_usable=False)))),
        "problem",
        "devices",
        "this user may not use /dev/nvidia1",
        "`ls -l /dev/nvidia*`",
    ),
    "no nvidia-uvm": (
        given(devices=Devices(nodes=NODES[1:]), torch=replace(TORCH, is_available=False)),
        "problem",
        "devices",
        "/dev/nvidia-uvm is missing",
        "sudo nvidia-modprobe -u -c=0",
    ),
    "no nvidia-uvm, and CUDA all the same": (
        given(devices=Devices(nodes=NODES[1:])),
        "note",
        "devices",
        "/dev/nvidia-uvm is missing",
        "sudo nvidia-modprobe -u -c=0",
    ),
    "more on the bus": (
        given(devices=Devices(nodes=NODES, pci_gpus=8)),
        "note",
        "devices",
        "the PCI bus has 8 NVIDIA GPUs, and 1 are open",
        "nvidia-smi -L",
    ),
    "no GPU shown": (given(gpus=()), "problem", "GPU", "the driver shows no GPU", "nvidia-smi -L"),
    "lost": (
        replace(TWO, gpus=(sound_gpu(0), replace(sound_gpu(1), problem="GPU 1 is lost. Reboot."))),
        "problem",
        "GPU",
        "GPU 1 is lost",
        "Reboot.",
    ),
    "not in the table": (
        given(gpus=(replace(sound_gpu(name="NVIDIA H900"), is_in_table=False),)),
        "note",
        "GPU",
        "NVIDIA H900, 85.52 GB, not in the table",
        "gpuperf specs --all",
    ),
    "unlike clocks": (
        replace(TWO, gpus=(sound_gpu(0), sound_gpu(1, max_sm_clock_mhz=1755.0))),
        "warning",
        "GPU",
        "the 2 NVIDIA H100 80GB HBM3 differ: highest SM clock 1755, 1980 MHz",
        "nvidia-smi -q -d CLOCK",
    ),
    "MIG without instances": (
        given(gpus=(sound_gpu(mig_enabled=True),)),
        "problem",
        "GPU",
        "MIG is on and has no instance",
        "sudo nvidia-smi mig -cgi 0 -C",
    ),
    "MIG": (
        given(gpus=(replace(sound_gpu(mig_enabled=True), instances=(fake_gpu(5), fake_gpu(6))),)),
        "note",
        "GPU",
        "MIG is on, 2 instances",
        "sudo nvidia-smi -mig 0",
    ),
    "persistence": (
        replace(TWO, gpus=(sound_gpu(0), sound_gpu(1, persistence=False))),
        "note",
        "GPU",
        "GPU 1: persistence mode is off",
        "sudo nvidia-smi -i 1 -pm 1",
    ),
    "prohibited": (
        given(gpus=with_condition(compute_mode="prohibited")),
        "problem",
        "GPU",
        "compute mode prohibited",
        "sudo nvidia-smi -c 0",
    ),
    "exclusive": (
        given(gpus=with_condition(compute_mode="exclusive process")),
        "warning",
        "GPU",
        "compute mode exclusive",
        "sudo nvidia-smi -c 0",
    ),
    "ECC off": (given(gpus=(sound_gpu(ecc_enabled=False),)), "note", "GPU", "ECC is off", "sudo nvidia-smi -e 1"),
    "power limit": (
        given(gpus=(sound_gpu(power_limit_w=500.0),)),
        "warning",
        "GPU",
        "power limit 500 W, below the default of 700 W",
        "sudo nvidia-smi -pl 700",
    ),
    "uncorrected": (
        given(gpus=with_condition(ecc_uncorrected=2)),
        "problem",
        "GPU",
        "2 uncorrected ECC errors",
        "sudo nvidia-smi --gpu-reset",
    ),
    "corrected": (
        given(gpus=with_condition(ecc_corrected=7)),
        "note",
        "GPU",
        "7 corrected ECC errors",
        "nvidia-smi -q -d ECC",
    ),
    "remap pending": (
        given(gpus=with_condition(is_remap_pending=True)),
        "warning",
        "GPU",
        "a broken row of memory waits to be replaced",
        "sudo nvidia-smi --gpu-reset",
    ),
    "remap failed": (
        given(gpus=with_condition(has_remap_failed=True)),
        "problem",
        "GPU",
        "could not be replaced",
        "Have the GPU replaced",
    ),
    "locked clocks": (
        given(gpus=with_holds("clock setting")),
        "warning",
        "GPU",
        "held down by a setting (locked or application clocks): 345 MHz of 1980",
        "sudo nvidia-smi -rgc",
    ),
    "power brake": (
        given(gpus=with_holds("power brake", "heat (driver)")),
        "warning",
        "GPU",
        "the SM clock is held down while idle by heat (driver), power brake: 345 MHz of 1980",
        "nvidia-smi -q -d PERFORMANCE",
    ),
    "power cap while idle": (
        given(gpus=with_holds("power cap")),
        "warning",
        "GPU",
        "held down while idle by power cap",
        "power cables",
    ),
    "hot": (given(gpus=with_state(temperature_c=61.0)), "warning", "GPU", "61 °C while idle", "Look at fans"),
    "others": (
        given(gpus=(replace(sound_gpu(others=(OtherProcess(pid=71, command="python"), OtherProcess(pid=9)))),)),
        "warning",
        "GPU",
        "0 B in use by other processes: 71 (python), 9 (not to be seen from here)",
        "End them",
    ),
    "many others": (
        given(gpus=(sound_gpu(others=tuple(OtherProcess(pid=pid, command="a") for pid in range(1, 6))),)),
        "warning",
        "GPU",
        "1 (a), 2 (a), 3 (a) and 2 more",
        "End them",
    ),
    "memory of nobody": (
        given(gpus=with_state(memory_used_bytes=3 * 10**9)),
        "warning",
        "GPU",
        "3.000 GB in use by processes that are not to be seen",
        "CUDA_VISIBLE_DEVICES",
    ),
    "a run of ours": (
        given(gpus=with_state(memory_used_bytes=3 * 10**9), locks=locks(held=(HeldLock(name="d", pid=7, gpu=0),))),
        "note",
        "GPU",
        "3.000 GB in use, by a run of pytest-gpuperf",
        "Wait",
    ),
    "PCIe while idle": (
        given(gpus=with_condition(pcie_generation=1)),
        "note",
        "GPU",
        "PCIe link gen 1 x16 of gen 5 x16 while idle, which says little",
        "Look again under load",
    ),
    "PCIe under load": (
        given(gpus=(replace(sound_gpu(usage=BUSY), condition=fake_condition(pcie_width=8)),)),
        "warning",
        "GPU",
        "PCIe link gen 5 x8 of gen 5 x16 under load",
        "look at slot",
    ),
    "Xid": (
        given(kernel_log=KernelLog(errors=(replace(XID, age_s=9e4), XID))),
        "warning",
        "kernel log",
        "Xid 79 on the GPU at 0000:3b:00, 2 times, last 2 hours ago: GPU has fallen off the bus.",
        "https://docs.nvidia.com/deploy/xid-errors",
    ),
    "old Xid": (
        given(kernel_log=KernelLog(errors=(replace(XID, age_s=9e4),))),
        "note",
        "kernel log",
        "last 1 day ago",
        "xid-errors",
    ),
    "Xid of a program": (
        given(kernel_log=KernelLog(errors=(replace(XID, code=31, age_s=5.0),))),
        "note",
        "kernel log",
        "Xid 31 on the GPU at 0000:3b:00, last less than a minute ago",
        "A program's own error",
    ),
    "Xid of the hardware": (
        given(kernel_log=KernelLog(errors=(replace(XID, code=48, age_s=5.0),))),
        "warning",
        "kernel log",
        "Xid 48 on the GPU at 0000:3b:00",
        "End what uses the GPU and run `sudo nvidia-smi --gpu-reset`, or reboot;",
    ),
    "another Xid of a program": (
        given(kernel_log=KernelLog(errors=(replace(XID, code=69, age_s=5.0),))),
        "note",
        "kernel log",
        "Xid 69 on the GPU at 0000:3b:00",
        "A program's own error, as a rule: run the test alone under `compute-sanitizer`",
    ),
    "Xid that is for information": (
        given(kernel_log=KernelLog(errors=(replace(XID, code=63, age_s=5.0),))),
        "note",
        "kernel log",
        "Xid 63 on the GPU at 0000:3b:00",
        "Reset the GPU when it is free: `sudo nvidia-smi --gpu-reset`",
    ),
    "no kernel log": (
        given(kernel_log=KernelLog(problem="/dev/kmsg: Operation not permitted")),
        "note",
        "kernel log",
        "cannot be read: /dev/kmsg: Operation not permitted",
        "sudo dmesg | grep Xid",
    ),
    "no NVLink": (
        replace(TWO, pairs=(Pair(a=0, b=1, link="system"),)),
        "note",
        "topology",
        "no NVLink in the one pair of GPUs, which meet at: system",
        "nvidia-smi topo -m",
    ),
    "some NVLink": (
        replace(TWO, pairs=(*TWO.pairs, Pair(a=0, b=2, link="host-bridge"), Pair(a=1, b=2, link=None))),
        "note",
        "topology",
        "NVLink in 1 of 3 pairs of GPUs, not in 0-2, 1-2, which meet at: host-bridge, not known",
        "nvidia-smi topo -m",
    ),
    "hidden": (
        given(assignment=visible("")),
        "warning",
        "assignment",
        "CUDA_VISIBLE_DEVICES= hides every GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "rubbish": (
        given(assignment=visible("abc", wrong="entry 1, 'abc', ends the list")),
        "problem",
        "assignment",
        "CUDA_VISIBLE_DEVICES=abc, and 0 of 1 GPUs can be used: entry 1, 'abc', ends the list",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "partly rubbish": (
        replace(TWO, torch=TORCH, assignment=visible("0,9", U0, wrong="entry 2, '9', ends the list")),
        "warning",
        "assignment",
        "CUDA_VISIBLE_DEVICES=0,9, and 1 of 2 GPUs can be used: entry 2, '9', ends the list",
        "nvidia-smi -L",
    ),
    "nothing left": (
        given(assignment=Assignment(wrong="GPU 0 is in MIG mode and has no instance.")),
        "problem",
        "assignment",
        "CUDA_VISIBLE_DEVICES is not set, and 0 of 1 GPUs can be used: GPU 0 is in MIG mode and has no instance",
        "nvidia-smi -L",
    ),
    "set without a GPU": (
        replace(CPU_ONLY, assignment=visible("0")),
        "note",
        "assignment",
        "CUDA_VISIBLE_DEVICES=0, and there is no GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "order": (
        replace(TWO, gpus=(sound_gpu(0), sound_gpu(1, name="NVIDIA L4"))),
        "note",
        "assignment",
        "CUDA_DEVICE_ORDER is not set and the GPUs differ",
        "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    ),
    "Slurm without a GPU": (
        replace(TWO, assignment=of_slurm()),
        "warning",
        "assignment",
        "Slurm job 12 was given no GPU, and 2 can be opened",
        "srun --gres=gpu:1",
    ),
    "Slurm does not fence": (
        replace(TWO, assignment=of_slurm(SLURM_JOB_GPUS="1", assigned=(U1,))),
        "note",
        "assignment",
        "Slurm job 12: SLURM_JOB_GPUS=1: pytest-gpuperf keeps to 1 of 2 GPUs",
        f"export CUDA_VISIBLE_DEVICES={U1}",
    ),
    "container does not fence": (
        replace(
            TWO,
            assignment=Assignment(variables={"NVIDIA_VISIBLE_DEVICES": U1}, visible=(U0, U1), assigned=(U1,)),
        ),
        "note",
        "assignment",
        f"NVIDIA_VISIBLE_DEVICES={U1}: pytest-gpuperf keeps to 1 of 2 GPUs",
        f"export CUDA_VISIBLE_DEVICES={U1}",
    ),
    "container without GPUs": (
        replace(CPU_ONLY, assignment=Assignment(variables={"NVIDIA_VISIBLE_DEVICES": "void"})),
        "note",
        "assignment",
        "NVIDIA_VISIBLE_DEVICES=void: the container was started without GPUs",
        "docker run --gpus all",
    ),
    "pod without GPUs": (
        replace(CPU_ONLY, assignment=Assignment(variables={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})),
        "note",
        "assignment",
        "a Kubernetes pod without a GPU",
        "nvidia.com/gpu: 1",
    ),
    "no lock folder": (
        given(locks=Locks(problem="The lock folder /x is a link to /y. Name another one.")),
        "problem",
        "locks",
        "The lock folder /x is a link to /y",
        "Name another one.",
    ),
    "locks on NFS": (
        given(locks=locks(filesystem="nfs4")),
        "warning",
        "locks",
        "the lock folder /x/locks is on nfs4, a disk of another machine",
        "export GPUPERF_LOCK_DIR=/run/lock/gpuperf",
    ),
    "private locks": (
        given(locks=locks(is_private=True)),
        "note",
        "locks",
        "runs of other users have lock folders of their own, and are not kept from this GPU",
        "sudo install -d -m 1777 /run/lock/gpuperf",
    ),
    "held": (
        given(locks=locks(held=(HeldLock(name="device-1.lock", pid=7, gpu=0, holder="pid 7 (test_a, ann)"),))),
        "note",
        "locks",
        "GPU 0 is held by pid 7 (test_a, ann)",
        "kill 7",
    ),
    "held, not of a GPU": (
        given(locks=locks(held=(HeldLock(name="device-1.lock", pid=7),))),
        "note",
        "locks",
        "lock device-1.lock is held by pid 7",
        "kill 7",
    ),
    "container": (
        given(container=Container(hints=("/.dockerenv",), has_own_pids=False)),
        "note",
        "container",
        "runs outside of this container do not see its lock folder",
        "docker run -v /run/lock/gpuperf:/run/lock/gpuperf",
    ),
    "pids of its own": (
        given(container=Container(has_own_pids=True)),
        "note",
        "container",
        "NVML names processes by the host's numbers or not at all",
        "docker run --pid=host",
    ),
    "governor": (
        given(cpu=Cpu(cores=8, usable_cores=8, governors=("performance", "powersave"))),
        "note",
        "CPU",
        "governor powersave",
        "sudo cpupower frequency-set -g performance",
    ),
    "load": (
        given(cpu=Cpu(cores=8, usable_cores=2, load=8.1)),
        "warning",
        "CPU",
        "load 8.1 on 8 cores",
        "top -o %CPU",
    ),
    "clock source": (
        given(cpu=Cpu(cores=8, usable_cores=8, clock_source="hpet")),
        "note",
        "CPU",
        "clock source hpet: to read the time is a system call",
        "cat /sys/devices/system/clocksource/clocksource0/avail*",
    ),
    "shared memory": (
        given(shared_memory_bytes=64 * 2**20),
        "warning",
        "memory",
        "shm has 67.11 MB, and NCCL, vLLM",
        "docker run --shm-size=16g",
    ),
    "no git": (given(git=Git()), "note", "git", "git was not found", "GPUPERF_COMMIT"),
    "no repository": (
        given(git=Git(program="/usr/bin/git")),
        "note",
        "git",
        "this folder is in no repository",
        "Run it in your repository",
    ),
    "no baselines": (
        given(baselines=Baselines(root="baselines", wanted=("nvidia-h100",))),
        "note",
        "baselines",
        "no baselines/nvidia-h100: nothing to compare with yet",
        "pytest --gpuperf-update",
    ),
    "no answer": (
        given(driver=None, gpus=None, assignment=None, troubles=(Trouble(topic="driver", text="no answer in 8 s"),)),
        "warning",
        "driver",
        "not looked at: no answer in 8 s",
        "Run `gpuperf doctor` again; if it stays, and `nvidia-smi` hangs, too: `sudo dmesg | grep -i nvrm`",
    ),
    "all GPUs lost": (
        given(gpus=None, troubles=(Trouble(topic="GPU", text="GPU 0 is lost. Reboot.", is_device=True),)),
        "problem",
        "GPU",
        "GPU 0 is lost",
        "Reboot.",
    ),
}


@pytest.mark.parametrize(("facts", "level", "topic", "text", "mend"), FOUND.values(), ids=FOUND)
def test_a_finding_says_what_and_how_to_mend_it(facts: Facts, level: str, topic: str, text: str, mend: str) -> None:
    (found,) = [one for one in bad(facts) if text in one.text]
    assert (found.level, found.topic) == (level, topic)
    assert found.mend is not None
    assert mend in found.mend
    assert "{" not in found.mend


@pytest.mark.parametrize(("facts", "level", "topic", "text", "mend"), FOUND.values(), ids=FOUND)
def test_it_is_the_only_one_of_its_topic_and_level(facts: Facts, level: str, topic: str, text: str, mend: str) -> None:
    assert len([one for one in bad(facts) if (one.level, one.topic) == (level, topic)]) == 1


@pytest.mark.parametrize("facts", [SOUND, TWO, replace(SOUND, gpus=(sound_gpu(usage=BUSY),))], ids=["1", "2", "busy"])
def test_a_sound_host_has_nothing_to_mend(facts: Facts) -> None:
    assert bad(facts) == []
    assert all(one.mend is None for one in findings(facts))


@pytest.mark.parametrize(
    "facts",
    [
        given(gpus=with_state(temperature_c=60.0)),
        given(gpus=(replace(sound_gpu(usage=BUSY), state=fake_state(temperature_c=80.0)),)),
        given(gpus=with_state(memory_used_bytes=200 * 2**20)),
        given(gpus=(sound_gpu(power_limit_w=699.8),)),
        given(gpus=(sound_gpu(power_limit_w=None, ecc_enabled=None, persistence=None, mig_enabled=None),)),
        given(shared_memory_bytes=2**30),
        given(cpu=Cpu(cores=8, usable_cores=2, load=8.0, clock_source="kvm-clock")),
        given(torch=replace(TORCH, cuda="12.6")),
        given(git=Git(commit="abc123")),
        given(devices=Devices(is_wsl=True)),
        replace(TWO, torch=TORCH, assignment=visible("1", U0)),
        replace(TWO, assignment=of_slurm(SLURM_JOB_GPUS="0,1")),
        replace(TWO, assignment=Assignment(variables={"NVIDIA_VISIBLE_DEVICES": "all"}, visible=(U0, U1))),
        replace(
            TWO,
            gpus=(sound_gpu(0), sound_gpu(1, name="NVIDIA L4")),
            assignment=Assignment(variables={"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, visible=(U0, U1)),
        ),
    ],
    ids=str,
)
def test_what_is_just_right_is_not_found(facts: Facts) -> None:
    assert bad(facts) == []


def test_torch_is_not_blamed_for_gpus_that_are_hidden_from_it() -> None:
    facts = given(torch=replace(TORCH, is_available=False, uuids=()), assignment=visible("-1"))
    assert [one.text for one in bad(facts)] == ["CUDA_VISIBLE_DEVICES=-1 hides every GPU"]


def test_other_gpus_than_the_lost_one_are_still_looked_at() -> None:
    gpus = (replace(sound_gpu(0), problem="GPU 0 is lost. Reboot."), sound_gpu(1, persistence=False))
    texts = [one.text for one in bad(replace(TWO, gpus=gpus))]
    assert texts[0] == "GPU 0 is lost"
    assert texts[1].startswith("GPU 1: persistence mode is off")


def test_without_a_gpu_only_the_way_to_measure_on_the_cpu_is_said() -> None:
    (found,) = bad(CPU_ONLY)
    assert found.mend == "Measure on the CPU: `pytest --gpuperf-device=cpu`. For a GPU: Install it."


def test_the_order_of_the_findings_is_that_of_the_topics() -> None:
    everything = replace(TWO, locks=locks(is_private=True), container=Container(has_own_pids=True))
    topics = list(dict.fromkeys(one.topic for one in findings(everything)))
    expected = "Python torch driver devices GPU log topology assignment locks container CPU memory git baselines"
    assert [topic.removeprefix("kernel ") for topic in topics] == expected.split()


def test_gpus_with_the_same_finding_share_it() -> None:
    gpus = tuple(sound_gpu(index, persistence=index == 2) for index in range(4))
    (found,) = [one for one in bad(replace(TWO, gpus=gpus)) if "persistence" in one.text]
    assert found.text.startswith("GPUs 0-1, 3: ")
    assert found.mend == "sudo nvidia-smi -i 0,1,3 -pm 1"


def test_what_the_driver_does_not_tell_is_said() -> None:
    mute = Gpu(info=fake_gpu(pcie_generation=None, pcie_width=None))
    texts = " | ".join(one.text for one in findings(given(gpus=(mute,))) if one.topic == "GPU")
    assert "the driver tells nothing of memory errors" in texts
    assert "the driver lists no processes" in texts
    assert "the driver tells nothing of the PCIe link" in texts
    assert "the driver tells no temperature" in texts
    assert "memory in use not known" in texts


def test_a_driver_that_tells_almost_nothing_leaves_no_finding_empty_and_no_zero() -> None:
    info = GpuInfo(index=0, uuid=U0, name="NVIDIA GeForce RTX 4090", memory_bytes=25_757_220_864)
    mute = Gpu(info=info, condition=GpuCondition(pcie_width=16))
    texts = [one.text for one in findings(given(gpus=(mute,))) if one.topic == "GPU"]
    assert "the driver tells no settings" in texts
    assert "the driver tells nothing of the PCIe link" in texts
    assert not any(text == "" or " 0 " in text for text in texts)


@pytest.mark.parametrize(
    ("indices", "text"), [([3], "GPU 3"), ([0, 1, 2, 6], "GPUs 0-2, 6"), ([7, 5], "GPUs 5, 7")], ids=str
)
def test_gpus_are_named_by_ranges(indices: list[int], text: str) -> None:
    assert gpu_names(indices) == text


def test_a_message_without_a_mend_gets_one() -> None:
    assert split_message("It broke.", mend="Mend it.") == ("It broke", "Mend it.")
    assert split_message("It broke. Mend it.") == ("It broke", "Mend it.")


def shown(facts: Facts, *, width: int = 80) -> str:
    return "\n".join(line.text for line in doctor_lines(findings(facts), facts.pairs, width=width, time_s=1.25))


@pytest.mark.parametrize("facts", [SOUND, TWO, CPU_ONLY, *(case[0] for case in FOUND.values())], ids=lambda _: "")
def test_eighty_columns_hold_everything_but_a_uuid(facts: Facts) -> None:
    assert [line for line in shown(facts).splitlines() if len(line) > 80 and "GPU-0" not in line] == []


def test_a_long_finding_is_wrapped_with_its_mend_below() -> None:
    lines = shown(given(gpus=(sound_gpu(power_limit_w=500.0),))).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("warning GPU         GPU 0: power"))
    assert lines[start + 1] == " " * 20 + "are lower under load"
    assert lines[start + 2] == " " * 20 + "-> sudo nvidia-smi -pl 700"


@pytest.mark.parametrize("width", range(50, 81))
def test_options_stay_whole_to_be_copied(width: int) -> None:
    text = shown(CPU_ONLY, width=width)
    assert "--gpuperf-device=cpu" in text


def test_the_summary_counts_the_levels() -> None:
    assert shown(SOUND).splitlines()[-1] == f"All is well; {len(findings(SOUND))} ok. Looked at in 1.2 s."
    assert shown(given(git=Git(), locks=locks(filesystem="nfs4"))).splitlines()[-1].startswith("1 warning, 1 note; ")
    assert shown(given(gpus=with_condition(compute_mode="prohibited"))).splitlines()[-1].startswith("1 problem; ")


def test_the_summary_has_the_colour_of_the_worst() -> None:
    for facts, colour in ((SOUND, "green"), (given(locks=locks(filesystem="nfs")), "yellow"), (given(gpus=()), "red")):
        assert doctor_lines(findings(facts), (), width=80, time_s=0.0)[-1].colour == colour


def test_the_matrix_follows_the_finding_about_topology() -> None:
    lines = shown(TWO).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("ok      topology"))
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["0", "1"],
        ["0", "-", "nvlink"],
        ["1", "nvlink", "-"],
    ]


def test_eight_gpus_get_letters_with_their_meaning() -> None:
    pairs = [Pair(a=a, b=b, link="nvlink" if a // 2 == b // 2 else "system") for a in range(8) for b in range(a + 1, 8)]
    rows = matrix(pairs)
    assert rows[1].split() == ["0", "-", "A", "B", "B", "B", "B", "B", "B"]
    assert rows[-1].strip() == "A: nvlink, B: system"
    assert len(rows) == 10


def test_json_has_the_counts_the_findings_and_the_links() -> None:
    facts = replace(TWO, git=Git())
    told = msgspec.json.decode(doctor_json(findings(facts), facts.pairs))
    assert told["counts"] == {"ok": len(findings(facts)) - 1, "note": 1, "warning": 0, "problem": 0}
    assert {"level", "topic", "text", "mend"} == set(told["findings"][0])
    assert told["pairs"] == [{"a": 0, "b": 1, "link": "nvlink"}]
