"""Collect the facts of a host for `gpuperf doctor`, in ten seconds at most, without using a GPU."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from pytest_gpuperf.analysis.host import (
    Assignment,
    Baselines,
    Driver,
    Facts,
    Git,
    Gpu,
    Locks,
    OtherProcess,
    Package,
    Pair,
    Torch,
    Trouble,
)
from pytest_gpuperf.assignment import VISIBLE, assigned, in_place, there
from pytest_gpuperf.devices import Device, cpu_device, find_devices, hidden, slug
from pytest_gpuperf.environment import git_top, package_version
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.lease import lock_path
from pytest_gpuperf.nvml import GpuInfo, Nvml, open_nvml
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.records import Record
from pytest_gpuperf.specs import spec_of
from pytest_gpuperf.trials.examine_files import (
    Places,
    container_of,
    cpu_of,
    devices_of,
    kernel_log_of,
    locks_of,
    parent_of,
    process_name,
    shared_memory_bytes_of,
)
from pytest_gpuperf.trials.probe import Probe, answer_of

T = TypeVar("T")

#: Each probe's own limit; they run side by side, so the longest is what `gpuperf doctor` takes at most.
_TORCH_LIMIT_S = 8.0
_DRIVER_LIMIT_S = 8.0
_LIMIT_S = 4.0

_PACKAGES = ("pytest", "pytest-xdist", "pytest-benchmark", "nvidia-ml-py", "pynvml", "torch")
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")

#: torch counts the devices without making a context on any; what it warns of is part of the answer.
_ASK_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    is_available = torch.cuda.is_available()
    count = torch.cuda.device_count() if is_available else 0
    uuids = [str(getattr(torch.cuda.get_device_properties(i), "uuid", "")) for i in range(count)]
told = {"version": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip}
told |= {"is_available": is_available, "uuids": [f"GPU-{uuid}" for uuid in uuids]}
told |= {"warnings": [" ".join(str(one.message).split())[:200] for one in caught if "CUDA" in str(one.message)][:3]}
print()
print(json.dumps(told))
"""


_LINUX = Places()


class FromDriver(Record, frozen=True, kw_only=True):
    """All that NVML says, and the names of the baselines of what it shows."""

    driver: Driver | None = None
    gpus: tuple[Gpu, ...] | None = None
    pairs: tuple[Pair, ...] = ()
    assignment: Assignment | None = None
    slugs: tuple[str, ...] = ()
    troubles: tuple[Trouble, ...] = ()


def examine(
    *,
    baselines_root: Path,
    places: Places = _LINUX,
    environment: Mapping[str, str] = os.environ,
    open_driver: Callable[[], Nvml] = open_nvml,
    ask_torch: Callable[[], Torch | None] | None = None,
) -> Facts:
    """Look at everything at once. What fails or hangs is a trouble among the facts, never an error.

    Args:
        baselines_root: Where the baselines are looked for.
        places: Where Linux tells of itself.
        environment: Variables of this process.
        open_driver: Opens NVML.
        ask_torch: Asks torch, in a process of its own; for tests something quicker.
    """
    torch = Probe("torch", ask_torch or torch_of, limit_s=_TORCH_LIMIT_S + 0.5)
    nvml = Probe("driver", lambda: from_driver(open_driver, places, environment), limit_s=_DRIVER_LIMIT_S)
    packages = Probe("Python", packages_of, limit_s=_LIMIT_S)
    devices = Probe("devices", lambda: devices_of(places), limit_s=_LIMIT_S)
    kernel_log = Probe("kernel log", lambda: kernel_log_of(places), limit_s=_LIMIT_S)
    locks = Probe("locks", lambda: locks_of(places), limit_s=_LIMIT_S)
    container = Probe("container", lambda: container_of(places), limit_s=_LIMIT_S)
    cpu = Probe("CPU", lambda: cpu_of(places), limit_s=_LIMIT_S)
    memory = Probe("memory", lambda: shared_memory_bytes_of(places), limit_s=_LIMIT_S)
    git = Probe("git", lambda: _git(environment), limit_s=_LIMIT_S)
    troubles: list[Trouble] = []
    told = _taken(nvml, troubles) or FromDriver()
    slugs = told.slugs
    baselines = Probe("baselines", lambda: baselines_of(baselines_root, slugs), limit_s=1.0)
    return Facts(
        python=platform.python_version(),
        packages=_taken(packages, troubles),
        torch=_taken(torch, troubles),
        driver=told.driver,
        devices=_taken(devices, troubles),
        gpus=told.gpus,
        pairs=told.pairs,
        kernel_log=_taken(kernel_log, troubles),
        assignment=told.assignment,
        locks=_with_gpus(_taken(locks, troubles), told.gpus or ()),
        container=_taken(container, troubles),
        cpu=_taken(cpu, troubles),
        shared_memory_bytes=_taken(memory, troubles),
        git=_taken(git, troubles),
        baselines=_taken(baselines, troubles),
        troubles=(*troubles, *told.troubles),
    )


def _taken(probe: Probe[T], troubles: list[Trouble]) -> T | None:
    answer = probe.answer()
    if isinstance(answer, Trouble):
        troubles.append(answer)
        return None
    return answer


def packages_of() -> tuple[Package, ...]:
    """Compare the packages that matter with what this one asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    needed: dict[str, list[SpecifierSet]] = {}
    for text in metadata.requires("pytest-gpuperf") or ():
        asked = Requirement(text)  # of extras too: who has one, needs one that fits, whichever extra it came with
        needed.setdefault(asked.name.lower(), []).append(asked.specifier)
    found = []
    for name in _PACKAGES:
        version, specifiers = package_version(name), needed.get(name, [])
        is_met = version is None or not specifiers or any(one.contains(version, prereleases=True) for one in specifiers)
        words = " or ".join(dict.fromkeys(map(str, specifiers)))
        found.append(Package(name=name, version=version, needed=words, is_met=is_met))
    return tuple(found)


def torch_of(*, timeout_s: float = _TORCH_LIMIT_S) -> Torch | None:
    """Import torch in a process of its own, and ask what it sees; `None`: it is not installed.

    Raises:
        RuntimeError: It could not be imported, or took too long.
    """
    if package_version("torch") is None:
        return None
    finished = run_group([sys.executable, "-P", "-c", _ASK_TORCH], timeout_s=timeout_s)
    lines = finished.tail.strip().splitlines() or [""]
    if finished.code is None:
        raise RuntimeError(f"`import torch` and its first look at the GPUs took longer than {timeout_s:g} s")
    if finished.code != 0:
        raise RuntimeError(f"`import torch` {finished.in_words}: {lines[-1][:200]}")
    return msgspec.json.decode(lines[-1], type=Torch)


def from_driver(open_driver: Callable[[], Nvml], places: Places, environment: Mapping[str, str]) -> FromDriver:
    """Ask NVML everything; a GPU that is lost or hangs is a trouble, and the rest is still told.

    Args:
        open_driver: Opens NVML.
        places: Where processes have their names.
        environment: Variables of this process.
    """
    variables = {name: environment[name] for name in (*_VARIABLES, *_SLURM) if name in environment}
    on_cpu = slug([cpu_device(cpuinfo=places.proc / "cpuinfo")])
    try:
        nvml = open_driver()
    except DeviceError as error:
        driver = Driver(problem=str(error))
        return FromDriver(driver=driver, assignment=Assignment(variables=variables), slugs=(on_cpu,))
    driver = Driver(version=nvml.driver_version(), cuda=nvml.cuda_version())
    infos = answer_of("GPU", nvml.gpus)
    if isinstance(infos, Trouble):
        return FromDriver(driver=driver, assignment=Assignment(variables=variables), troubles=(infos,))
    absent = answer_of("GPU", nvml.absent)
    gone = () if isinstance(absent, Trouble) else absent
    lost = tuple(Trouble(topic="GPU", text=one.reason, is_device=True) for one in gone)
    if lost and not infos:
        return FromDriver(driver=driver, assignment=Assignment(variables=variables), troubles=lost)
    # Side by side: a GPU that hangs is one finding, and costs none of the others.
    readings = [Probe("GPU", partial(_read, nvml, info, places), limit_s=_LIMIT_S) for info in infos]
    topology = Probe("topology", lambda: _pairs(nvml, infos), limit_s=_LIMIT_S)
    seen = Probe("assignment", lambda: _devices(nvml, environment), limit_s=_LIMIT_S)
    given = Probe("assignment", lambda: _assignment(nvml, infos, environment, variables), limit_s=_LIMIT_S)
    pairs, devices, assignment = topology.answer(), seen.answer(), given.answer()
    answers = (absent, pairs, devices, assignment)
    return FromDriver(
        driver=driver,
        gpus=tuple(_gpu(info, reading.answer()) for info, reading in zip(infos, readings, strict=True)),
        pairs=() if isinstance(pairs, Trouble) else pairs,
        assignment=None if isinstance(assignment, Trouble) else assignment,
        slugs=() if isinstance(devices, Trouble) else tuple(dict.fromkeys(slug([one]) for one in devices)) or (on_cpu,),
        troubles=(*lost, *dict.fromkeys(one for one in answers if isinstance(one, Trouble))),
    )


def _devices(nvml: Nvml, environment: Mapping[str, str]) -> tuple[Device, ...]:
    return find_devices(nvml, cuda_visible_devices=environment.get(VISIBLE))


def _assignment(
    nvml: Nvml, infos: Sequence[GpuInfo], environment: Mapping[str, str], variables: dict[str, str]
) -> Assignment:
    places = in_place({info.index: info.uuid for info in infos}, [one.index for one in nvml.absent()])
    ours = assigned(environment, places)
    wrong = hidden(nvml, cuda_visible_devices=environment.get(VISIBLE))
    return Assignment(
        variables=variables,
        visible=tuple(device.uuid for device in _devices(nvml, environment)),
        wrong=wrong.removeprefix(f"In {VISIBLE}, ") if wrong else None,
        assigned=None if ours is None else there(ours),
    )


def _gpu(info: GpuInfo, answer: Gpu | Trouble) -> Gpu:
    if not isinstance(answer, Trouble):
        return answer
    if answer.is_device:  # which says who it is, and what to do
        return Gpu(info=info, problem=answer.text)
    mend = f"Run `nvidia-smi -i {info.index}`; if that does not answer either, reset the GPU or reboot."
    return Gpu(info=info, problem=f"GPU {info.index} ({info.name}, {info.uuid}): {answer.text}. {mend}")


def _read(nvml: Nvml, info: GpuInfo, places: Places) -> Gpu:
    state = nvml.state(info.uuid)
    others = None
    if state.process_pids is not None:
        foreign = [pid for pid in state.process_pids if not _is_ours(places, pid)]
        others = tuple(OtherProcess(pid=pid, command=process_name(places, pid)) for pid in foreign)
    return Gpu(
        info=info,
        is_in_table=spec_of(info) is not None,
        state=state,
        usage=nvml.usage(info.uuid),
        condition=nvml.condition(info.uuid),
        instances=nvml.mig_instances(info.uuid),
        others=others,
    )


def _is_ours(places: Places, pid: int) -> bool:
    return os.getpid() in (pid, parent_of(places, pid))


def _pairs(nvml: Nvml, infos: Sequence[GpuInfo]) -> tuple[Pair, ...]:
    found = []
    for a, b in combinations(infos, 2):
        link = "nvlink" if nvml.has_nvlink(a.uuid, b.uuid) else nvml.common_ancestor(a.uuid, b.uuid)
        found.append(Pair(a=a.index, b=b.index, link=link))
    return tuple(found)


def _with_gpus(locks: Locks | None, gpus: Sequence[Gpu]) -> Locks | None:
    """Say of each lock which GPU it is of."""
    if locks is None:
        return None
    uuids = {lock_path(Path(), uuid).name: gpu.info.index for gpu in gpus for uuid in _uuids(gpu)}
    return replace(locks, held=tuple(replace(lock, gpu=uuids.get(lock.name)) for lock in locks.held))


def _uuids(gpu: Gpu) -> tuple[str, ...]:
    return (gpu.info.uuid, *(instance.uuid for instance in gpu.instances))


def _git(environment: Mapping[str, str]) -> Git:
    top = git_top(Path.cwd())
    commit = environment.get("GPUPERF_COMMIT") or None
    return Git(program=shutil.which("git"), repository=str(top) if top else None, commit=commit)


def baselines_of(root: Path, slugs: Sequence[str]) -> Baselines:
    """Look for the folders of baselines of these devices, those of runner pools included."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [name for name in names if name in slugs or name.startswith(tuple(f"{one}+" for one in slugs))]
    return Baselines(root=str(root), wanted=tuple(slugs), found=tuple(found))
