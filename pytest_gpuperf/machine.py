"""What this process can measure on: driver, devices and their clocks, each looked up once, when first needed."""

import gc
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Literal

from pytest_gpuperf.assignment import ORDER, VISIBLE, assigned, in_place, may_narrow, there
from pytest_gpuperf.devices import Device, cpu_device, find_devices, hidden, instances_of, visible
from pytest_gpuperf.environment import collect
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.nvml import AbsentGpu, Nvml, open_nvml
from pytest_gpuperf.profiling import Profiler
from pytest_gpuperf.records import Environment
from pytest_gpuperf.stopwatches import stopwatch_of
from pytest_gpuperf.timing import Call, Stopwatch
from pytest_gpuperf.topology import class_of, links_between
from pytest_gpuperf.vitals import Vitals


class Machine:
    """The machine as the options see it.

    Args:
        choice: `auto` takes the GPUs where there are any, else the CPU; `cuda` insists; `cpu` ignores GPUs.
        nvml: A driver to use instead of the real one, for tests.
        make_stopwatch: A clock to use instead of the real ones, for tests.
        anchors: Calls to measure instead of the real anchors, by name, for tests; with a clock given, none by default.
        profiler: Instead of torch's, for tests; with a clock given, none by default.
    """

    def __init__(
        self,
        choice: Literal["auto", "cuda", "cpu"],
        *,
        nvml: Nvml | None = None,
        make_stopwatch: Callable[[Device], Stopwatch] | None = None,
        anchors: Mapping[str, Call] | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        self.given_profiler = profiler
        self._choice = choice
        self._given_nvml = nvml
        self._make_stopwatch = make_stopwatch
        #: What stands for the real anchors, by name; `None`: they themselves.
        self.anchors: Mapping[str, Call] | None = {} if anchors is None and make_stopwatch else anchors
        #: Why there is no GPU, in words; `None` where there is one or none was wanted.
        self.gpu_problem: str | None = None

    @cached_property
    def nvml(self) -> Nvml | None:
        """The driver's library, or `None` with `gpu_problem` saying why."""
        if self._choice == "cpu":
            return None
        try:
            return self._given_nvml or open_nvml()
        except DeviceError as error:
            self.gpu_problem = str(error)
            return None

    @cached_property
    def vitals(self) -> Vitals | None:
        """What hears the errors of the GPUs' hardware, from a GPU's first test on; `None` without a driver."""
        return Vitals(self.nvml) if self.nvml else None

    @cached_property
    def absent(self) -> tuple[AbsentGpu, ...]:
        """GPUs of this host that do not answer the driver."""
        return self.nvml.absent() if self.nvml else ()

    @cached_property
    def gpus(self) -> tuple[Device, ...]:
        """GPUs that this process may see, in torch's order.

        Raises:
            DeviceError: None of this host's GPUs answers, or which of them are meant is not certain.
        """
        if self.nvml is None:
            return ()
        self.adopt_assignment(os.environ)
        visible = os.environ.get(VISIBLE)
        found = find_devices(self.nvml, cuda_visible_devices=visible)
        if not found:
            set_to = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
            self.gpu_problem = " ".join(filter(None, (f"The driver shows no GPU{set_to}.", self.hidden)))
        return found

    @cached_property
    def hidden(self) -> str | None:
        """Which entry ends CUDA_VISIBLE_DEVICES, or which GPU has no MIG instance; `None`: neither is known."""
        try:
            return hidden(self.nvml, cuda_visible_devices=os.environ.get(VISIBLE)) if self.nvml else None
        except DeviceError:  # a GPU was lost since the others were found, which its quarantine says
            return None

    def adopt_assignment(self, environment: MutableMapping[str, str]) -> None:
        """Let CUDA show only the GPUs that the outer world gave to this process; before anything looks for GPUs.

        Args:
            environment: Of this process; CUDA_VISIBLE_DEVICES is set if it is not, and other variables narrow it.

        Raises:
            DeviceError: None that it was given answers.
        """
        if self.nvml is None or VISIBLE in environment or not (self.absent or may_narrow(environment)):
            return
        gpus = self.nvml.gpus()
        instances = instances_of(self.nvml, gpus)
        parts = [one.uuid for some in instances.values() for one in some]
        places = in_place({gpu.index: gpu.uuid for gpu in gpus}, [one.index for one in self.absent])
        ours = assigned(environment, [*places, *parts])
        if ours is None and self.absent:  # CUDA may fail at the sight of one that is lost
            ours = tuple(gpu.uuid for gpu in visible(gpus, None, instances))
        if ours is not None:
            answering = there(ours)
            if self.absent and not answering:
                raise DeviceError(self.absent[0].reason)
            environment[VISIBLE] = ",".join(answering)
            environment.setdefault(ORDER, "PCI_BUS_ID")

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """What tests are measured on: the GPUs, or the CPU alone.

        Raises:
            DeviceError: `cuda` was asked for and there is no GPU.
        """
        if self.gpus:
            return self.gpus
        if self._choice == "cuda":
            raise DeviceError(
                f"--gpuperf-device cuda, but there is no GPU. {self.gpu_problem} "
                "To measure on the CPU instead: --gpuperf-device cpu."
            )
        return (cpu_device(),)

    @property
    def is_unusable(self) -> bool:
        """Whether nothing can be measured, because a GPU was insisted on and there is none."""
        return self._choice == "cuda" and not self.gpus

    @property
    def is_cpu(self) -> bool:
        """Whether measurements are taken on the CPU."""
        return self.devices[0].kind == "cpu"

    def environment(self, devices: tuple[Device, ...]) -> Environment:
        """Hardware and versions that a result on these devices is taken with."""
        driver = self.nvml.driver_version() if self.nvml else None
        cuda = self.nvml.cuda_version() if self.nvml else None
        return collect(devices, driver=driver, cuda=cuda, link=class_of(devices, links_between(devices, self.nvml)))

    def stopwatch(self, device: Device) -> Stopwatch:
        """The clock of a device.

        Raises:
            DeviceError: torch is missing, or cannot use the GPU.
        """
        if self._make_stopwatch:
            return self._make_stopwatch(device)
        if device.kind == "cuda":
            check_torch(device)
        return stopwatch_of(device.kind, device.index)

    @property
    def can_profile(self) -> bool:
        """Whether what this process measured may have kernels: torch was there, and the clock is no fake."""
        return self.given_profiler is not None or (self._make_stopwatch is None and "torch" in sys.modules)

    def current(self, device: Device) -> AbstractContextManager[object]:
        """Make a device torch's current one, so that work sent to plain `"cuda"` goes to the device that was leased."""
        if self._make_stopwatch or device.kind == "cpu" or device.index == 0:
            return nullcontext()
        try:
            import torch
        except ImportError:  # a test may record its own numbers without torch
            return nullcontext()
        return torch.cuda.device(device.index) if torch.cuda.is_available() else nullcontext()

    @property
    def problem(self) -> str | None:
        """Why there is no GPU, looked up now if nothing did yet; `None` where there is one or none was wanted."""
        try:
            return self.gpu_problem if not self.gpus else None
        except DeviceError as error:
            return str(error)

    def synchronize(self, devices: tuple[Device, ...]) -> None:
        """Wait until the devices have done everything that this process gave them.

        A process that has not used CUDA gave them nothing, and shall not take memory for a context by asking.
        """
        if self._has_used_cuda(devices):
            torch = sys.modules["torch"]
            for device in devices:
                torch.cuda.synchronize(device.index)

    def check_used(self, devices: tuple[Device, ...]) -> None:
        """Make sure that what this process did with torch it did on these devices, if it did anything.

        Raises:
            DeviceError: torch numbers the GPUs in another order.
        """
        for device in devices if self._has_used_cuda(devices) else ():
            check_torch(device)

    def _has_used_cuda(self, devices: tuple[Device, ...]) -> bool:
        torch = sys.modules.get("torch")
        is_fake = self._make_stopwatch is not None or all(device.kind == "cpu" for device in devices)
        return not is_fake and torch is not None and torch.cuda.is_initialized()


def release_memory() -> None:
    """Give back the GPU memory that nothing in this process uses any more, so that another process finds it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_torch(device: Device) -> None:
    """Make sure that torch sees the very GPU that was leased.

    Raises:
        DeviceError: torch is not installed, has no CUDA, or numbers the GPUs in another order.
    """
    try:
        import torch
    except ImportError:
        raise DeviceError("Measuring needs torch: pip install 'pytest-gpuperf[torch]'.") from None
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{device.name} is here, but torch {torch.__version__} cannot use it. "
            "Install a CUDA build of torch that fits the driver, or measure the CPU with --gpuperf-device cpu."
        )
    seen = f"GPU-{torch.cuda.get_device_properties(device.index).uuid}"
    if device.uuid.startswith("GPU-") and seen != device.uuid:
        raise DeviceError(
            f"torch's cuda:{device.index} is {seen}, the driver's is {device.uuid}. "
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID so that both count alike."
        )
