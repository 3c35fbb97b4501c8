"""What `gpuperf doctor` knows of a host: facts without a judgement. `None` is not known, `()` is none."""

from typing import Literal

import msgspec

from pytest_gpuperf.nvml import GpuCondition, GpuInfo, GpuState, GpuUsage
from pytest_gpuperf.records import Record

#: What a fact, or a question without an answer, belongs to.
Topic = Literal[
    "Python",
    "torch",
    "driver",
    "devices",
    "GPU",
    "kernel log",
    "topology",
    "assignment",
    "locks",
    "container",
    "CPU",
    "memory",
    "git",
    "baselines",
]


class Trouble(Record, frozen=True, kw_only=True):
    """A question that got no answer.

    Attributes:
        text: Why, in words.
        is_device: The driver itself says that something is wrong; else the question failed or took too long.
    """

    topic: Topic
    text: str
    is_device: bool = False


class Package(Record, frozen=True, kw_only=True):
    """A Python package that matters here.

    Attributes:
        version: `None`: not installed.
        needed: What pytest-gpuperf asks for, such as `>=8.4`; empty: anything.
    """

    name: str
    version: str | None
    needed: str = ""
    is_met: bool = True


class Torch(Record, frozen=True, kw_only=True):
    """What torch says of itself, in a process of its own.

    Attributes:
        cuda: CUDA version that it was built with; `None`: a build for the CPU, or for AMD.
        uuids: Of its GPUs, in its order.
        warnings: What it warned of when it was asked.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    is_available: bool = False
    uuids: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Driver(Record, frozen=True, kw_only=True):
    """The NVIDIA driver.

    Attributes:
        cuda: Newest CUDA version that it runs.
        problem: Why NVML cannot be opened, with the mend.
    """

    version: str | None = None
    cuda: str | None = None
    problem: str | None = None


class DeviceNode(Record, frozen=True, kw_only=True):
    """A file under /dev by which processes reach the driver.

    Attributes:
        owner: `root:video`.
        mode: `crw-rw----`.
        is_usable: This user may read and write it.
    """

    name: str
    owner: str
    mode: str
    is_usable: bool

    @property
    def group(self) -> str:
        """The group that it belongs to."""
        return self.owner.partition(":")[2]


class Devices(Record, frozen=True, kw_only=True):
    """What the host shows of GPUs without the driver's library.

    Attributes:
        nodes: nvidiactl, nvidia-uvm, nvidia0, ...
        is_wsl: /dev/dxg is there: Windows has the driver.
        pci_gpus: NVIDIA's GPUs on the PCI bus.
    """

    nodes: tuple[DeviceNode, ...] = ()
    is_wsl: bool = False
    pci_gpus: int | None = None


class OtherProcess(Record, frozen=True, kw_only=True):
    """A process of somebody else's on a GPU.

    Attributes:
        command: Its name; `None`: this process cannot see it, as in a container.
    """

    pid: int
    command: str | None = None


class Gpu(Record, frozen=True, kw_only=True):
    """One GPU now.

    Attributes:
        is_in_table: The table of published figures has this kind.
        others: Processes with a compute context, without doctor's own; `None`: the driver does not tell.
        problem: Why it could not be read, with the mend.
    """

    info: GpuInfo
    is_in_table: bool = True
    state: GpuState = GpuState()
    usage: GpuUsage = GpuUsage()
    condition: GpuCondition = GpuCondition()
    instances: tuple[GpuInfo, ...] = ()
    others: tuple[OtherProcess, ...] | None = None
    problem: str | None = None

    @property
    def is_busy(self) -> bool:
        """Kernels ran in a twentieth of the driver's last sampling period, or more."""
        return self.usage.busy_share is not None and self.usage.busy_share >= 0.05


class Pair(Record, frozen=True, kw_only=True):
    """Two GPUs by NVML's index.

    Attributes:
        link: `nvlink`, else where their PCIe paths meet, from `board` to `system`.
    """

    a: int
    b: int
    link: str | None


class KernelError(Record, frozen=True, kw_only=True):
    """An Xid line of the kernel's log.

    Attributes:
        code: NVIDIA's number of the error.
        place: PCI address of the GPU.
        age_s: Time since.
    """

    code: int
    place: str
    text: str
    age_s: float


class KernelLog(Record, frozen=True, kw_only=True):
    """The NVIDIA driver's errors since the host was booted, as far as the log goes back.

    Attributes:
        problem: Why the log cannot be read.
    """

    errors: tuple[KernelError, ...] = ()
    problem: str | None = None


class Assignment(Record, frozen=True, kw_only=True):
    """Which GPUs the world around gave to this process.

    Attributes:
        variables: CUDA_VISIBLE_DEVICES, NVIDIA_VISIBLE_DEVICES, those of Slurm and Kubernetes; only those that are set.
        visible: UUIDs of the GPUs or MIG instances that CUDA_VISIBLE_DEVICES leaves, in torch's order.
        wrong: Which entry of it ends the list, or which GPU has no MIG instance.
        assigned: UUIDs that Slurm or a container gave, where CUDA would show more.
    """

    variables: dict[str, str] = msgspec.field(default_factory=dict)
    visible: tuple[str, ...] = ()
    wrong: str | None = None
    assigned: tuple[str, ...] | None = None


class HeldLock(Record, frozen=True, kw_only=True):
    """A lock that is held now.

    Attributes:
        gpu: NVML's index; `None`: it is of no GPU that is here.
        holder: What the lock file says of who holds it.
    """

    name: str
    pid: int
    gpu: int | None = None
    holder: str = ""


class Locks(Record, frozen=True, kw_only=True):
    """The folder of the lock files.

    Attributes:
        is_private: One per user, so that runs of other users are not excluded.
        filesystem: `ext4`, `tmpfs`, `nfs4`.
        problem: Why there is none, with the mend.
    """

    folder: str | None = None
    is_private: bool = False
    filesystem: str | None = None
    held: tuple[HeldLock, ...] = ()
    problem: str | None = None


class Container(Record, frozen=True, kw_only=True):
    """Whether this is a container.

    Attributes:
        hints: What says so: `/.dockerenv`, `cgroup kubepods`.
        has_own_pids: Processes are numbered apart from the host's.
    """

    hints: tuple[str, ...] = ()
    has_own_pids: bool | None = None


class Cpu(Record, frozen=True, kw_only=True):
    """The processor and the kernel's clock.

    Attributes:
        cores: Of the host.
        usable_cores: That this process may use: its affinity, and the quota of its control group.
        load: Mean number of processes that ran or wanted to in the last minute.
        governors: Of all cores, each kind once; `()`: the host has none to choose.
        clock_source: `tsc`, `kvm-clock`, `hpet`.
    """

    cores: int
    usable_cores: float
    load: float | None = None
    governors: tuple[str, ...] = ()
    clock_source: str | None = None


class Git(Record, frozen=True, kw_only=True):
    """Where git is, and the repository of the current folder.

    Attributes:
        commit: What GPUPERF_COMMIT says instead.
    """

    program: str | None = None
    repository: str | None = None
    commit: str | None = None


class Baselines(Record, frozen=True, kw_only=True):
    """Which baselines there are for one of the devices here.

    Attributes:
        wanted: Names of the folders, one a kind of device.
        found: Those that are there, those of runner pools included.
    """

    root: str
    wanted: tuple[str, ...] = ()
    found: tuple[str, ...] = ()


class Facts(Record, frozen=True, kw_only=True):
    """A host, as far as it could be looked at; of what is `None`, `troubles` says why.

    Attributes:
        torch: `None` without a trouble: it is not installed.
        shared_memory_bytes: Size of /dev/shm.
    """

    python: str
    packages: tuple[Package, ...] | None = None
    torch: Torch | None = None
    driver: Driver | None = None
    devices: Devices | None = None
    gpus: tuple[Gpu, ...] | None = None
    pairs: tuple[Pair, ...] = ()
    kernel_log: KernelLog | None = None
    assignment: Assignment | None = None
    locks: Locks | None = None
    container: Container | None = None
    cpu: Cpu | None = None
    shared_memory_bytes: int | None = None
    git: Git | None = None
    baselines: Baselines | None = None
    troubles: tuple[Trouble, ...] = ()
