"""From facts of a host to findings, in a fixed order: what is well, what spoils measurements, and what mends it."""

import re
from collections.abc import Callable, Iterator

from pytest_gpuperf.analysis.doctor_assignment import assignment_findings
from pytest_gpuperf.analysis.doctor_gpus import gpu_findings, topology_findings
from pytest_gpuperf.analysis.finding import Finding, note, ok, problem, split_message, warning
from pytest_gpuperf.analysis.host import DeviceNode, Facts, HeldLock, KernelError, Package, Topic, Torch
from pytest_gpuperf.sickness import xid_of
from pytest_gpuperf.units import counted, format_value

_ON_CPU = "Measure on the CPU: `pytest --gpuperf-device=cpu`."
_AGAIN = "Run `gpuperf doctor` again; if it stays, "
_DRIVER_MEND = f"{_AGAIN}and `nvidia-smi` hangs, too: `sudo dmesg | grep -i nvrm` says which GPU; then reboot."

#: Filesystems of other machines, where flock is slow, emulated or not there; statfs(2) and mount(8) name them so.
_NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
)
#: Clock sources that a process reads without a system call (Linux, arch/*/vdso); others take about a microsecond.
_QUICK_CLOCKS = frozenset({"tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter"})

_RECENT_S = 24 * 3600.0
_LEAST_SHARED_MEMORY_BYTES = 2**30


def findings(facts: Facts) -> tuple[Finding, ...]:
    """Judge a host.

    Args:
        facts: What is known of it.

    Returns:
        Always in the same order; what could not be looked at stands where its answer would.
    """
    return tuple(finding for topic, look in _CHECKS.items() for finding in (*_troubles(facts, topic), *look(facts)))


def is_cpu_only(facts: Facts) -> bool:
    """Whether nothing at all points to a GPU: no files of the driver, none on the PCI bus, no NVML."""
    devices, driver = facts.devices, facts.driver
    has_traces = devices is not None and bool(devices.nodes or devices.pci_gpus or devices.is_wsl)
    return not facts.gpus and not has_traces and driver is not None and driver.problem is not None


def _troubles(facts: Facts, topic: Topic) -> Iterator[Finding]:
    for trouble in facts.troubles:
        if trouble.topic != topic:
            continue
        if trouble.is_device:
            yield problem(topic, *split_message(trouble.text))
        else:
            mend = _DRIVER_MEND if topic == "driver" else f"{_AGAIN}report it."
            yield warning(topic, f"not looked at: {trouble.text}", mend)


def _python(facts: Facts) -> Iterator[Finding]:
    packages = facts.packages or ()
    unmet = [one for one in packages if one.version is not None and not one.is_met]
    for one in unmet:
        yield problem(
            "Python",
            f"{one.name} {one.version} is installed, and pytest-gpuperf needs {one.needed}",
            f"pip install '{one.name}{one.needed}'",
        )
    yield from _nvml_package(packages)
    known = ", ".join(f"{one.name} {one.version}" for one in packages if one.version and one not in unmet)
    yield ok("Python", f"Python {facts.python}" + (f"; {known}" if known else ""))
    if len(facts.gpus or ()) > 1 and _is_missing(packages, "pytest-xdist"):
        yield note(
            "Python",
            f"pytest-xdist is not installed: tests use {len(facts.gpus or ())} GPUs one after the other",
            "pip install pytest-xdist, then `pytest -n auto`",
        )


def _nvml_package(packages: tuple[Package, ...]) -> Iterator[Finding]:
    if _is_missing(packages, "nvidia-ml-py"):
        yield problem("Python", "nvidia-ml-py is not installed: the driver cannot be asked", "pip install nvidia-ml-py")
    for one in packages:
        if one.name == "pynvml" and one.version is not None:
            mend = "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
            if _version(one.version) < (12, 0):  # it brought a module of its own; later ones ask for NVIDIA's
                text = f"the unofficial package pynvml {one.version} overwrites files of NVIDIA's nvidia-ml-py"
                yield warning("Python", text, mend)
            else:
                yield note("Python", f"pynvml {one.version} is only a shell around nvidia-ml-py", mend)


def _is_missing(packages: tuple[Package, ...], name: str) -> bool:
    return any(one.name == name and one.version is None for one in packages)


def _torch(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch is None:
        if not any(trouble.topic == "torch" for trouble in facts.troubles):
            what = "GPU work cannot be timed" if facts.gpus else "workloads that need it are skipped"
            level = warning if facts.gpus else note
            yield level("torch", f"torch is not installed: {what}", "pip install 'pytest-gpuperf[torch]'")
        return
    build = f"torch {torch.version}, built for {_build(torch)}"
    if not facts.gpus:
        yield ok("torch", build)
        return
    newest = facts.driver.cuda if facts.driver else None
    if torch.is_available:
        yield ok("torch", f"{build}, uses {counted(len(torch.uuids), 'GPU')}; the driver runs up to CUDA {newest}")
        yield from _newer_cuda(torch, newest)
        yield from _unlike(torch, facts)
        for text in torch.warnings:
            yield note("torch", f"torch warns: {text}", "Install a build of torch that knows these GPUs.")
    elif facts.assignment is None or facts.assignment.visible:
        yield _unusable(torch, build, newest)


def _build(torch: Torch) -> str:
    return f"CUDA {torch.cuda}" if torch.cuda else f"HIP {torch.hip}" if torch.hip else "the CPU"


def _unusable(torch: Torch, build: str, newest: str | None) -> Finding:
    mend = f"Install a build for CUDA {newest or '(see nvidia-smi)'} or older: https://pytorch.org/get-started/locally"
    if torch.cuda is None:
        return problem("torch", f"{build}, cannot use the GPUs", mend)
    why = f": {torch.warnings[0]}" if torch.warnings else ""
    if newest and _version(torch.cuda)[0] > _version(newest)[0]:
        return problem("torch", f"{build}, and the driver runs up to CUDA {newest}", f"{mend}; or update the driver")
    return problem("torch", f"{build}, cannot use the GPUs{why}", "Run `nvidia-smi`, and see the findings below.")


def _newer_cuda(torch: Torch, newest: str | None) -> Iterator[Finding]:
    if torch.cuda and newest and _version(torch.cuda) > _version(newest):
        yield note(
            "torch",
            f"torch was built with CUDA {torch.cuda}, the driver knows {newest}: kernels compiled at run time may fail",
            f"Update the driver, or install a build for CUDA {newest}.",
        )


def _unlike(torch: Torch, facts: Facts) -> Iterator[Finding]:
    visible = facts.assignment.visible if facts.assignment else ()
    if facts.assignment is None or any(uuid.startswith("MIG-") for uuid in visible) or _has_mig(facts):
        return
    order = "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    if len(torch.uuids) != len(visible):
        text = f"torch counts {counted(len(torch.uuids), 'GPU')}, NVML {len(visible)} under CUDA_VISIBLE_DEVICES"
        yield problem("torch", text, f"{order}; name GPUs by UUID (`nvidia-smi -L`)")
    elif torch.uuids != visible:
        first = next(index for index, pair in enumerate(zip(torch.uuids, visible, strict=True)) if pair[0] != pair[1])
        text = f"torch numbers the GPUs otherwise: its cuda:{first} is {torch.uuids[first]}, NVML's {visible[first]}"
        yield problem("torch", text, order)


def _has_mig(facts: Facts) -> bool:
    return any(gpu.info.mig_enabled for gpu in facts.gpus or ())


def _driver(facts: Facts) -> Iterator[Finding]:
    driver = facts.driver
    if driver is None:
        return
    if driver.problem is None:
        yield ok(
            "driver", f"NVIDIA driver {driver.version or '(no version told)'}, runs up to CUDA {driver.cuda or '-'}"
        )
    elif is_cpu_only(facts):
        text, mend = split_message(driver.problem)
        yield note("driver", f"CPU only: {text[:1].lower()}{text[1:]}", f"{_ON_CPU} For a GPU: {mend}")
    else:
        yield problem("driver", *split_message(driver.problem))


def _devices(facts: Facts) -> Iterator[Finding]:
    devices = facts.devices
    if devices is None or is_cpu_only(facts):
        return
    if not devices.nodes and devices.is_wsl:
        yield ok("devices", "/dev/dxg: the driver is that of Windows (WSL)")
    elif not devices.nodes:
        text = f"no /dev/nvidia*, and {counted(devices.pci_gpus or 0, 'NVIDIA GPU')} on the PCI bus"
        yield problem("devices", text, "sudo modprobe nvidia; in a container start it with `--gpus all`")
    else:
        yield from _nodes(devices.nodes, has_cuda=facts.torch is not None and facts.torch.is_available)
    seen = len(facts.gpus or ())
    if facts.gpus is not None and (devices.pci_gpus or 0) > seen:
        text = f"the PCI bus has {devices.pci_gpus} NVIDIA GPUs, and {seen} are open to this process"
        yield note("devices", text, "If it should have more: ask Slurm or the container for them; see `nvidia-smi -L`.")


def _nodes(nodes: tuple[DeviceNode, ...], *, has_cuda: bool) -> Iterator[Finding]:
    closed = [node for node in nodes if not node.is_usable]
    has_memory = any(node.name == "nvidia-uvm" for node in nodes)
    if closed:
        listed = ", ".join(f"/dev/{node.name} ({node.owner}, {node.mode})" for node in closed)
        mend = "Start the container with `--gpus all`, or ask who may: `ls -l /dev/nvidia*`"
        if closed[0].group not in ("root", ""):
            mend = f"sudo usermod -aG {closed[0].group} $USER, then log in again"
        yield problem("devices", f"this user may not use {listed}", mend)
    if not has_memory:
        level = note if has_cuda else problem
        text = "/dev/nvidia-uvm is missing, without which CUDA cannot start"
        yield level("devices", text, "sudo nvidia-modprobe -u -c=0; in a container start it with `--gpus all`")
    if has_memory and not closed:
        yield ok("devices", f"{counted(len(nodes), 'file')} /dev/nvidia* can be read and written, nvidia-uvm is there")


def _kernel_log(facts: Facts) -> Iterator[Finding]:
    log = facts.kernel_log
    if log is None or is_cpu_only(facts):
        return
    if log.problem is not None:
        text = f"errors of the driver (Xid) cannot be read: {log.problem}"
        yield note("kernel log", text, "sudo dmesg | grep Xid, on the host")
        return
    if not log.errors:
        yield ok("kernel log", "no errors of the NVIDIA driver (Xid) since the host was booted")
    kinds: dict[tuple[int, str], list[KernelError]] = {}
    for error in log.errors:
        kinds.setdefault((error.code, error.place), []).append(error)
    for (code, place), errors in kinds.items():
        last = min(errors, key=lambda error: error.age_s)
        xid = xid_of(code)
        level = warning if xid.kind == "hardware" and last.age_s <= _RECENT_S else note
        times = f", {len(errors)} times" if errors[1:] else ""
        text = f"Xid {code} on the GPU at {place}{times}, last {_ago(last.age_s)}: {last.text}"
        cause = "A program's own error, as a rule: " if xid.kind == "application" else ""
        mend = f"{cause}{xid.mend}"
        mend = f"{mend[:1].upper()}{mend[1:]}; what it means: https://docs.nvidia.com/deploy/xid-errors"
        yield level("kernel log", text, mend)


def _locks(facts: Facts) -> Iterator[Finding]:
    locks = facts.locks
    if locks is None:
        return
    if locks.problem is not None:
        mend = "export GPUPERF_LOCK_DIR=/run/lock/gpuperf, or another folder of yours on a local disk"
        yield problem("locks", *split_message(locks.problem, mend=mend))
        return
    filesystem = locks.filesystem or "a filesystem that is not known"
    if locks.filesystem in _NETWORK_FILESYSTEMS:
        text = f"the lock folder {locks.folder} is on {filesystem}, a disk of another machine: locks may not hold"
        yield warning("locks", text, "export GPUPERF_LOCK_DIR=/run/lock/gpuperf, or another folder on a local disk")
    else:
        yield ok("locks", f"lock folder {locks.folder} on {filesystem}, can be written to")
    if locks.is_private and facts.gpus:
        text = f"runs of other users have lock folders of their own, and are not kept from {_these(len(facts.gpus))}"
        yield note("locks", text, "If others use this host: sudo install -d -m 1777 /run/lock/gpuperf")
    for lock in locks.held:
        yield note(
            "locks", f"{_held(lock)} is held by {lock.holder or f'pid {lock.pid}'}", f"Wait, or: kill {lock.pid}"
        )


def _these(count: int) -> str:
    return "this GPU" if count == 1 else f"these {count} GPUs"


def _held(lock: HeldLock) -> str:
    return f"lock {lock.name}" if lock.gpu is None else f"GPU {lock.gpu}"


def _container(facts: Facts) -> Iterator[Finding]:
    container = facts.container
    if container is None:
        return
    if not container.hints and not container.has_own_pids:
        yield ok("container", "none: processes are numbered as the host numbers them")
        return
    where = f"a container ({', '.join(container.hints)})" if container.hints else "processes numbered apart"
    if not facts.gpus:
        yield ok("container", where)
        return
    if container.has_own_pids:
        text = f"{where}: NVML names processes by the host's numbers or not at all, so other users' are told by memory"
        yield note("container", text, "docker run --pid=host, or pod spec hostPID: true")
    if container.hints:
        text = "runs outside of this container do not see its lock folder"
        mend = "docker run -v /run/lock/gpuperf:/run/lock/gpuperf, where other runs use the same GPUs"
        yield note("container", text, mend)


def _cpu(facts: Facts) -> Iterator[Finding]:
    cpu = facts.cpu
    if cpu is None:
        return
    slow = [governor for governor in cpu.governors if governor != "performance"]
    if slow:
        text = f"governor {', '.join(slow)}: clocks follow the load, and host-bound times scatter"
        yield note("CPU", text, "sudo cpupower frequency-set -g performance")
    if cpu.load is not None and cpu.load > cpu.cores:  # the kernel counts the host's, whatever a container may use
        text = f"load {cpu.load:.1f} on {cpu.cores} cores: others are busy, and host-bound times suffer"
        yield warning("CPU", text, "See who: `top -o %CPU`; wait, or end it.")
    if cpu.clock_source is not None and cpu.clock_source not in _QUICK_CLOCKS:
        text = f"clock source {cpu.clock_source}: to read the time is a system call, a microsecond or so"
        mend = "See which the host has, tsc is best: cat /sys/devices/system/clocksource/clocksource0/avail*"
        yield note("CPU", text, mend)
    cores = f"{cpu.cores} cores" if cpu.usable_cores == cpu.cores else f"{cpu.usable_cores:g} of {cpu.cores} cores"
    more = [f"load {cpu.load:.1f}" if cpu.load is not None and cpu.load <= cpu.cores else ""]
    more += ["governor performance" if cpu.governors and not slow else ""]
    more += [f"clock source {cpu.clock_source}" if cpu.clock_source in _QUICK_CLOCKS else ""]
    yield ok("CPU", ", ".join([cores, *filter(None, more)]))


def _memory(facts: Facts) -> Iterator[Finding]:
    size = facts.shared_memory_bytes
    if size is None:
        return
    text = f"/dev/shm has {format_value(size, 'B')}"  # noqa: S108 - named, not written to
    if size < _LEAST_SHARED_MEMORY_BYTES:
        text += ", and NCCL, vLLM and data loaders want 1 GiB or more"
        yield warning(
            "memory", text, "sudo mount -o remount,size=16g /dev/shm; in a container: docker run --shm-size=16g"
        )
    else:
        yield ok("memory", text)


def _git(facts: Facts) -> Iterator[Finding]:
    git = facts.git
    if git is None:
        return
    if git.commit is not None:
        yield ok("git", f"GPUPERF_COMMIT={git.commit} stands for the repository")
    elif git.program is None:
        text = "git was not found: results do not say which commit they are of"
        yield note("git", text, "Install git, or export GPUPERF_COMMIT=<commit>.")
    elif git.repository is None:
        text = "this folder is in no repository: results do not say which commit they are of"
        yield note("git", text, "Run it in your repository, or export GPUPERF_COMMIT=<commit>.")
    else:
        yield ok("git", f"{git.program}, repository {git.repository}")


def _baselines(facts: Facts) -> Iterator[Finding]:
    baselines = facts.baselines
    if baselines is None or not baselines.wanted:
        return
    if baselines.found:
        yield ok("baselines", ", ".join(f"{baselines.root}/{name}" for name in baselines.found))
        return
    text = f"no {' or '.join(f'{baselines.root}/{name}' for name in baselines.wanted)}: nothing to compare with yet"
    yield note("baselines", text, "pytest --gpuperf-update, in the folder of your tests")


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = [*(int(part) for part in re.findall(r"\d+", text)), 0, 0]
    return major, minor


def _ago(age_s: float) -> str:
    for unit, seconds in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if age_s >= seconds:
            return f"{counted(int(age_s // seconds), unit)} ago"
    return "less than a minute ago"


#: What is looked at, in the order of the findings.
_CHECKS: dict[Topic, Callable[[Facts], Iterator[Finding]]] = {
    "Python": _python,
    "torch": _torch,
    "driver": _driver,
    "devices": _devices,
    "GPU": gpu_findings,
    "kernel log": _kernel_log,
    "topology": topology_findings,
    "assignment": assignment_findings,
    "locks": _locks,
    "container": _container,
    "CPU": _cpu,
    "memory": _memory,
    "git": _git,
    "baselines": _baselines,
}
