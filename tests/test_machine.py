"""What a machine is measured with: the choice between GPU and CPU, and why there is no GPU, in words."""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from pytest_gpuperf import machine as machine_module
from pytest_gpuperf.devices import Device, cpu_device, find_devices
from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.machine import Machine, check_torch
from pytest_gpuperf.nvml import GpuInfo, Nvml
from pytest_gpuperf.stopwatches import WallStopwatch
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_machine

GPU = find_devices(FakeNvml(), cuda_visible_devices=None)[0]


class EmptyNvml(FakeNvml):
    """A driver without a GPU."""

    def gpus(self) -> tuple[GpuInfo, ...]:
        return ()


@pytest.fixture(autouse=True)
def everything_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_nvml() -> Nvml:
        raise DeviceError("No NVIDIA driver was found.")

    monkeypatch.setattr(machine_module, "open_nvml", open_nvml)


# Choice


def test_auto_takes_the_gpus_where_there_are_any() -> None:
    machine = Machine("auto", nvml=FakeNvml(fake_gpu(), fake_gpu(1)))
    assert [device.device for device in machine.devices] == ["cuda:0", "cuda:1"]
    assert (machine.is_cpu, machine.is_unusable, machine.gpu_problem) == (False, False, None)


@pytest.mark.usefixtures("without_driver")
def test_auto_takes_the_cpu_where_there_is_no_gpu_and_knows_why() -> None:
    machine = Machine("auto")
    assert machine.devices == (cpu_device(),)
    assert (machine.is_cpu, machine.is_unusable) == (True, False)
    assert machine.gpu_problem == "No NVIDIA driver was found."


def test_cuda_takes_the_gpus() -> None:
    machine = Machine("cuda", nvml=FakeNvml())
    assert [device.kind for device in machine.devices] == ["cuda"]
    assert not machine.is_unusable


@pytest.mark.usefixtures("without_driver")
def test_cuda_without_a_gpu_is_an_error_that_says_why() -> None:
    machine = Machine("cuda")
    assert machine.is_unusable
    with pytest.raises(DeviceError) as error:
        _ = machine.devices
    assert str(error.value) == (
        "--gpuperf-device cuda, but there is no GPU. No NVIDIA driver was found. "
        "To measure on the CPU instead: --gpuperf-device cpu."
    )


def test_cpu_ignores_the_gpus_and_never_asks_the_driver() -> None:
    nvml = FakeNvml()
    machine = Machine("cpu", nvml=nvml)
    assert machine.devices == (cpu_device(),)
    assert (machine.nvml, machine.gpus, machine.gpu_problem, nvml.calls) == (None, (), None, [])


def test_a_driver_without_gpus_is_a_problem() -> None:
    machine = Machine("auto", nvml=EmptyNvml())
    assert machine.is_cpu
    assert machine.gpu_problem == "The driver shows no GPU."


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-ffffffff"])
def test_gpus_that_are_hidden_are_not_there_and_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = Machine("cuda", nvml=FakeNvml())
    with pytest.raises(DeviceError) as error:
        _ = machine.devices
    assert str(error.value) == (
        f"--gpuperf-device cuda, but there is no GPU. The driver shows no GPU (CUDA_VISIBLE_DEVICES={visible}). "
        f"In CUDA_VISIBLE_DEVICES, entry 1, {visible!r}, ends the list: there is no such GPU here, only GPU 0 "
        "(`nvidia-smi -L`). To measure on the CPU instead: --gpuperf-device cpu."
    )


def test_visible_gpus_are_in_torchs_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    machine = Machine("auto", nvml=FakeNvml(fake_gpu(), fake_gpu(1)))
    assert [device.uuid for device in machine.devices] == [fake_gpu(1).uuid, fake_gpu().uuid]
    assert [device.index for device in machine.devices] == [0, 1]


def test_a_gpu_that_is_lost_is_no_reason_to_measure_the_cpu() -> None:
    machine = Machine("auto", nvml=FakeNvml(errors={("gpus", 1): DeviceError("GPU 0 is lost.")}))
    with pytest.raises(DeviceError, match="is lost"):
        _ = machine.devices


THREE = tuple(fake_gpu(index) for index in range(3))


def test_beside_a_lost_gpu_the_others_are_used_and_cuda_shows_only_these() -> None:
    machine = Machine("auto", nvml=FakeNvml(*THREE, lost={THREE[1].uuid: 0}))
    assert [(device.uuid, device.index) for device in machine.gpus] == [(THREE[0].uuid, 0), (THREE[2].uuid, 1)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == f"{THREE[0].uuid},{THREE[2].uuid}"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert [gpu.index for gpu in machine.absent] == [1]


def test_what_the_user_set_is_left_alone_beside_a_lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", THREE[2].uuid)
    machine = Machine("auto", nvml=FakeNvml(*THREE, lost={THREE[1].uuid: 0}))
    assert [device.uuid for device in machine.gpus] == [THREE[2].uuid]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == THREE[2].uuid


def test_where_all_gpus_are_lost_the_cpu_is_not_measured_instead() -> None:
    machine = Machine("auto", nvml=FakeNvml(fake_gpu(), lost={fake_gpu().uuid: 0}))
    with pytest.raises(DeviceError, match="GPU 0 is lost: it has fallen off the bus"):
        _ = machine.devices


@pytest.mark.parametrize(("job", "uuids"), [("2", [THREE[2].uuid]), ("0-1", [THREE[0].uuid]), ("1", None)])
def test_slurm_counts_a_lost_gpu(monkeypatch: pytest.MonkeyPatch, job: str, uuids: list[str] | None) -> None:
    monkeypatch.setenv("SLURM_JOB_GPUS", job)
    machine = Machine("auto", nvml=FakeNvml(*THREE, lost={THREE[1].uuid: 0}))
    if uuids is None:
        with pytest.raises(DeviceError, match="GPU 1 is lost"):
            _ = machine.gpus
    else:
        assert [device.uuid for device in machine.gpus] == uuids


@pytest.mark.parametrize("others", ["", f",{THREE[2].uuid}"])
def test_where_cuda_is_shown_a_lost_gpu_first_the_cpu_is_not_measured_instead(
    monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    """By its UUID: CUDA ends the list there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", THREE[1].uuid + others)
    machine = Machine("auto", nvml=FakeNvml(*THREE, lost={THREE[1].uuid: 0}))
    with pytest.raises(DeviceError) as error:
        _ = machine.devices
    assert str(error.value).startswith("GPU 1 is lost: it has fallen off the bus.")
    assert str(error.value).endswith(
        f"CUDA_VISIBLE_DEVICES begins with '{THREE[1].uuid}', which is no GPU that answers. "
        "CUDA ends the list there: name others (`nvidia-smi -L`)."
    )


@pytest.mark.parametrize("visible", ["1,2", f"{THREE[1].uuid},{THREE[2].uuid}"])
def test_a_gpu_lost_in_the_middle_of_a_run_puts_in_doubt_nothing_that_was_found(
    monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    """A test that needs both is skipped with the reason of the quarantine: the variable was read before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml(*THREE)
    machine = Machine("auto", nvml=nvml)
    assert len(machine.devices) == 2
    nvml.lose(THREE[1].uuid)
    assert machine.hidden is None
    assert len(machine.devices) == 2


@pytest.mark.parametrize("has_instance", [True, False])
def test_beside_a_lost_gpu_one_in_mig_mode_is_named_by_its_instance(has_instance: bool) -> None:
    """Or not at all: CUDA may end the list at a UUID that it shows nothing of."""
    divided = replace(THREE[0], mig_enabled=True)
    instances = {divided.uuid: [replace(THREE[0], uuid="MIG-a")]} if has_instance else {}
    nvml = FakeNvml(divided, *THREE[1:], lost={THREE[1].uuid: 0}, instances=instances)
    uuids = [*(["MIG-a"] if has_instance else []), THREE[2].uuid]
    assert [device.uuid for device in Machine("auto", nvml=nvml).gpus] == uuids
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(uuids)


def test_commands_keep_to_what_a_job_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no conftest before which the plugin could see to it."""
    monkeypatch.setenv("SLURM_STEP_GPUS", "1")
    assert [device.uuid for device in Machine("auto", nvml=FakeNvml(*THREE)).gpus] == [THREE[1].uuid]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == THREE[1].uuid


def test_without_a_lost_gpu_nothing_is_narrowed() -> None:
    assert len(Machine("auto", nvml=FakeNvml(*THREE)).gpus) == 3
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_the_driver_is_asked_for_its_gpus_once() -> None:
    nvml = FakeNvml()
    machine = Machine("auto", nvml=nvml)
    assert machine.devices == machine.devices
    assert nvml.calls.count("gpus") == 1


# What it is measured with


def test_the_environment_of_a_gpu_names_driver_and_cuda() -> None:
    machine = fake_machine()
    versions = machine.environment(machine.devices).versions
    assert (versions["driver"], versions["cuda"]) == ("580.159.04", "13.0")


def test_the_environment_of_a_cpu_names_neither() -> None:
    machine = Machine("cpu")
    assert not {"driver", "cuda"} & machine.environment(machine.devices).versions.keys()


def test_a_cpu_is_timed_by_the_wall_clock() -> None:
    machine = Machine("cpu")
    assert isinstance(machine.stopwatch(machine.devices[0]), WallStopwatch)
    machine.synchronize(machine.devices)


def test_a_fake_machine_has_a_fake_clock_and_nothing_to_wait_for() -> None:
    machine = fake_machine()
    assert isinstance(machine.stopwatch(machine.devices[0]), FakeStopwatch)
    machine.synchronize(machine.devices)


@pytest.mark.parametrize(("is_initialized", "waited"), [(True, [0]), (False, [])])
def test_only_a_process_that_has_used_cuda_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, is_initialized: bool, waited: list[int]
) -> None:
    torch = pytest.importorskip("torch")
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    machine = Machine("auto", nvml=FakeNvml(fake_gpu()))
    machine.synchronize(machine.devices)
    assert asked == waited


def test_waiting_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    machine = Machine("auto", nvml=FakeNvml(fake_gpu()))
    machine.synchronize(machine.devices)


# torch


def cuda_of_torch(monkeypatch: pytest.MonkeyPatch, *, uuid: str) -> None:
    """Let torch see one GPU with this UUID, which it prints without its prefix."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))


def test_a_torch_that_cannot_use_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError) as error:
        check_torch(GPU)
    assert str(error.value) == (
        f"NVIDIA H100 80GB HBM3 is here, but torch {torch.__version__} cannot use it. "
        "Install a CUDA build of torch that fits the driver, or measure the CPU with --gpuperf-device cpu."
    )


def test_a_cpu_build_of_torch_is_refused_before_anything_is_measured() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    with pytest.raises(DeviceError, match=r"cannot use it\. Install a CUDA build of torch"):
        Machine("auto", nvml=FakeNvml()).stopwatch(GPU)


def test_a_missing_torch_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError) as error:
        check_torch(GPU)
    assert str(error.value) == "Measuring needs torch: pip install 'pytest-gpuperf[torch]'."


def test_a_torch_that_counts_the_gpus_in_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_of_torch(monkeypatch, uuid="5f1b3c1e-8a53-4d2b-9c1e-0123456789ab")
    with pytest.raises(DeviceError) as error:
        check_torch(GPU)
    assert str(error.value) == (
        f"torch's cuda:0 is GPU-5f1b3c1e-8a53-4d2b-9c1e-0123456789ab, the driver's is {GPU.uuid}. "
        "Set CUDA_DEVICE_ORDER=PCI_BUS_ID so that both count alike."
    )


def test_a_torch_that_sees_the_same_gpu_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_of_torch(monkeypatch, uuid=GPU.uuid.removeprefix("GPU-"))
    check_torch(GPU)


@pytest.mark.parametrize("has_used_cuda", [True, False])
def test_what_a_test_did_with_torch_it_did_on_the_gpu_that_was_leased(
    monkeypatch: pytest.MonkeyPatch, *, has_used_cuda: bool
) -> None:
    cuda_of_torch(monkeypatch, uuid="5f1b3c1e-8a53-4d2b-9c1e-0123456789ab")
    monkeypatch.setattr(sys.modules["torch"].cuda, "is_initialized", lambda: has_used_cuda)
    machine = Machine("auto", nvml=FakeNvml(fake_gpu()))
    refusal = pytest.raises(DeviceError, match=r"torch's cuda:0 is .* Set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    with refusal if has_used_cuda else nullcontext():
        machine.check_used(machine.devices)
    Machine("cpu").check_used((cpu_device(),))


def test_a_mig_instance_is_not_compared_with_the_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_of_torch(monkeypatch, uuid="5f1b3c1e-8a53-4d2b-9c1e-0123456789ab")
    check_torch(Device(kind="cuda", index=0, uuid="MIG-1", name="NVIDIA H100 MIG 1g.10gb", memory_bytes=10**10))


def test_a_machine_whose_torch_has_no_cuda_leaves_the_current_device_alone() -> None:
    second = find_devices(FakeNvml(fake_gpu(0), fake_gpu(1)), cuda_visible_devices=None)[1]
    with Machine("auto").current(second) as entered:
        assert entered is None
