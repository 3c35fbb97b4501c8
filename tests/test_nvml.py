"""NVML through a hand-written pynvml, the errors that a user reads, the fake, and recordings."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.nvml import GpuInfo, GpuSample, Nvml, open_nvml
from pytest_gpuperf.testing import FakeNvml, ReplayNvml, fake_gpu, fake_state, record

UUID = "GPU-5f1b3c1e-8a53-4d2b-9c1e-0123456789ab"
OTHER = "GPU-6f1b3c1e-8a53-4d2b-9c1e-0123456789ab"


class FakeNvmlError(Exception):
    """As pynvml's: the code is in `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakePynvml:
    """One H100 as nvidia-ml-py answers; a function in `failures` raises that code."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    nvmlMemory_v2 = 33554472  # noqa: N815 - pynvml's own name
    _nvmlGetFunctionPointer = None  # noqa: N815 - and the one by which it is known

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.has_memory_v2 = True
        self.failures: dict[str, int] = {}
        self.fields = {74: (0, 97_000_000_000), 76: (0, 0), 269: (0, 5), 270: (3, 0), 271: (0, 0)}
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlSystemGetDriverVersion": b"580.159.04",
            "nvmlSystemGetCudaDriverVersion_v2": 13000,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetUUID": UUID,
            "nvmlDeviceGetName": b"NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetPciInfo": SimpleNamespace(pciDeviceId=0x233010DE),
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetNumGpuCores": 16896,
            "nvmlDeviceGetMemoryBusWidth": 5120,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetClockInfo": 345,
            "nvmlDeviceGetEnforcedPowerLimit": 650_000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetPowerUsage": 72_500,
            "nvmlDeviceGetTotalEnergyConsumption": 123_456,
            "nvmlDeviceGetTemperature": 31,
            "nvmlDeviceGetMigMode": [0, 1],
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetPersistenceMode": 1,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85_520_809_984, used=1024),
            "nvmlDeviceGetComputeRunningProcesses_v3": [SimpleNamespace(pid=9), SimpleNamespace(pid=7)],
            "nvmlDeviceGetP2PStatus": 0,
        }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name != "nvmlDeviceGetFieldValues" and name not in self.answers:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "nvmlDeviceGetMemoryInfo" and len(arguments) > 1 and not self.has_memory_v2:
                raise FakeNvmlError(25)
            if name in self.failures:
                raise FakeNvmlError(self.failures[name])
            return self.answers[name] if name in self.answers else self._field_values(arguments[1])

        return call

    def _field_values(self, ids: list[int]) -> list[Any]:
        codes = [self.fields[field] for field in ids]
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(ullVal=value)) for code, value in codes]


@pytest.fixture
def pynvml(monkeypatch: pytest.MonkeyPatch) -> FakePynvml:
    fake = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_importing_the_module_imports_neither_pynvml_nor_torch() -> None:
    code = "import sys, pytest_gpuperf.nvml as _; assert not {'pynvml', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_is_described_in_si_units(pynvml: FakePynvml) -> None:
    assert open_nvml().gpus() == (
        GpuInfo(
            index=0,
            uuid=UUID,
            name="NVIDIA H100 80GB HBM3",
            memory_bytes=85_520_809_984,
            pci_device_id="2330",
            compute_capability="9.0",
            core_count=16896,
            memory_bus_bits=5120,
            max_sm_clock_mhz=1980.0,
            max_memory_clock_mhz=1980.0,
            power_limit_w=650.0,
            default_power_limit_w=700.0,
            mig_enabled=False,
            ecc_enabled=True,
            pcie_generation=5,
            pcie_width=16,
            persistence=True,
        ),
    )


def test_versions_are_text_even_from_an_old_nvidia_ml_py(pynvml: FakePynvml) -> None:
    nvml = open_nvml()
    assert (nvml.driver_version(), nvml.cuda_version()) == ("580.159.04", "13.0")


def test_a_sample_makes_three_calls(pynvml: FakePynvml) -> None:
    nvml = open_nvml()
    nvml.gpus()
    pynvml.calls.clear()
    assert nvml.sample(UUID) == GpuSample(sm_clock_mhz=345.0, power_w=72.5, temperature_c=31.0)
    assert len(pynvml.calls) == 3


def test_a_gpu_is_looked_up_by_its_uuid_once(pynvml: FakePynvml) -> None:
    nvml = open_nvml()
    nvml.sample(UUID)
    nvml.state(UUID)
    assert pynvml.calls.count("nvmlDeviceGetHandleByUUID") == 1


def test_a_state_has_seconds_joules_and_sorted_processes(pynvml: FakePynvml) -> None:
    state = open_nvml().state(UUID)
    assert state.energy_j == pytest.approx(123.456)
    assert state.power_cap_s == pytest.approx(97.0)
    assert state.sw_thermal_s == pytest.approx(5e-9)
    assert state.memory_used_bytes == 1024
    assert state.process_pids == (7, 9)


def test_a_counter_that_the_gpu_lacks_is_none_and_one_that_is_zero_is_zero(pynvml: FakePynvml) -> None:
    state = open_nvml().state(UUID)
    assert state.hw_thermal_s is None
    assert state.sync_boost_s == 0


@pytest.mark.parametrize("code", [2, 3, 4, 13, 999])
def test_what_cannot_be_read_is_none_and_the_rest_is_there(pynvml: FakePynvml, code: int) -> None:
    pynvml.failures = dict.fromkeys(
        (
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetFieldValues",
            "nvmlDeviceGetMigMode",
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetPciInfo",
            "nvmlDeviceGetP2PStatus",
            "nvmlSystemGetDriverVersion",
        ),
        code,
    )
    nvml = open_nvml()
    (info,), state = nvml.gpus(), nvml.state(UUID)
    assert (info.mig_enabled, info.pci_device_id, info.core_count) == (None, None, 16896)
    assert (state.power_w, state.power_cap_s, state.process_pids, state.temperature_c) == (None, None, None, 31.0)
    assert nvml.has_nvlink(UUID, OTHER) is None
    assert nvml.driver_version() is None


def test_the_total_memory_of_a_driver_without_version_2_is_read_the_old_way(pynvml: FakePynvml) -> None:
    pynvml.has_memory_v2 = False
    nvml = open_nvml()
    assert nvml.gpus()[0].memory_bytes == 85_520_809_984
    assert nvml.state(UUID).memory_used_bytes is None  # version 1 would count what the driver reserves


def test_a_gpu_without_memory_figures_is_an_error_that_names_it(pynvml: FakePynvml) -> None:
    pynvml.failures["nvmlDeviceGetMemoryInfo"] = 3
    with pytest.raises(DeviceError, match=r"GPU 0 \(NVIDIA H100 80GB HBM3, GPU-5f1b.* nvmlDeviceGetMemoryInfo"):
        open_nvml().gpus()


@pytest.mark.parametrize(("status", "expected"), [(0, True), (5, False)])
def test_nvlink_is_the_peer_to_peer_status(pynvml: FakePynvml, status: int, expected: bool) -> None:
    pynvml.answers["nvmlDeviceGetP2PStatus"] = status
    assert open_nvml().has_nvlink(UUID, OTHER) is expected


def test_a_gpu_that_this_user_may_not_open_is_left_out(pynvml: FakePynvml) -> None:
    pynvml.failures["nvmlDeviceGetHandleByIndex"] = 4
    assert open_nvml().gpus() == ()


@pytest.mark.parametrize(
    ("code", "said"), [(15, "is lost: it has fallen off the bus"), (16, "needs a reset"), (28, "is not there any more")]
)
def test_a_lost_gpu_is_named_with_what_to_do(pynvml: FakePynvml, code: int, said: str) -> None:
    nvml = open_nvml()
    nvml.gpus()
    pynvml.failures["nvmlDeviceGetPowerUsage"] = code
    with pytest.raises(DeviceError) as raised:
        nvml.sample(UUID)
    assert str(raised.value).startswith(f"GPU 0 (NVIDIA H100 80GB HBM3, {UUID}) {said}.")
    assert "sudo dmesg | grep Xid" in str(raised.value)


def test_a_gpu_lost_within_a_field_or_while_opened_is_named_too(pynvml: FakePynvml) -> None:
    nvml = open_nvml()
    pynvml.fields[271] = (15, 0)
    with pytest.raises(DeviceError, match=f"GPU {UUID} is lost"):
        nvml.state(UUID)
    pynvml.failures["nvmlDeviceGetHandleByIndex"] = 16
    with pytest.raises(DeviceError, match="GPU 0 needs a reset"):
        nvml.gpus()


def test_another_failure_says_which_call_and_code(pynvml: FakePynvml) -> None:
    pynvml.failures["nvmlDeviceGetClockInfo"] = 10
    with pytest.raises(DeviceError, match=r"nvmlDeviceGetClockInfo failed: .* \(code 10\)\. Run `nvidia-smi`"):
        open_nvml().sample(UUID)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (12, "No NVIDIA driver was found"),
        (9, "sudo modprobe nvidia"),
        (18, "the driver was updated and the machine not rebooted"),
        (4, "ls -l /dev/nvidia"),
        (11, "NVML IRQ issue"),
        (999, "NVML cannot be opened"),
    ],
)
def test_a_driver_that_cannot_be_opened_says_why_and_what_to_do(pynvml: FakePynvml, code: int, said: str) -> None:
    pynvml.failures["nvmlInit"] = code
    with pytest.raises(DeviceError) as raised:
        open_nvml()
    assert said in str(raised.value)
    assert str(raised.value).endswith("--gpuperf-device=cpu.")


def test_a_missing_nvidia_ml_py_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DeviceError, match="pip install nvidia-ml-py"):
        open_nvml()


def test_the_unofficial_pynvml_package_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=None))
    with pytest.raises(DeviceError, match="pip uninstall -y pynvml"):
        open_nvml()


def test_the_fake_follows_its_script_and_repeats_the_last_state() -> None:
    first, second = fake_gpu(0), fake_gpu(1)
    fake = FakeNvml(first, second, states=[fake_state(power_w=70.0), fake_state(power_w=690.0)])
    assert [fake.state(first.uuid).power_w for _ in range(3)] == [70.0, 690.0, 690.0]
    assert fake.state(second.uuid).power_w == 70.0
    assert fake.sample(first.uuid).power_w == 690.0


def test_the_fake_takes_samples_of_their_own() -> None:
    fake = FakeNvml(samples=[GpuSample(power_w=1.0), GpuSample(power_w=2.0)])
    assert [fake.sample(fake_gpu().uuid).power_w for _ in range(3)] == [1.0, 2.0, 2.0]


def test_the_fake_fails_at_the_call_it_is_told() -> None:
    lost = DeviceError("GPU 0 is lost")
    by_number, by_method = FakeNvml(errors={2: lost}), FakeNvml(errors={("sample", 1): lost})
    by_number.gpus()
    with pytest.raises(DeviceError):
        by_number.driver_version()
    by_method.gpus()
    with pytest.raises(DeviceError):
        by_method.sample(fake_gpu().uuid)
    assert by_method.sample(fake_gpu().uuid).power_w == 72.0


def test_the_fake_refuses_a_gpu_that_it_does_not_have() -> None:
    with pytest.raises(DeviceError, match="GPU-nowhere"):
        FakeNvml().state("GPU-nowhere")


def test_a_recording_plays_back_in_order_of_time(tmp_path: Path) -> None:
    gpus = (fake_gpu(0), fake_gpu(1))
    states = [fake_state(energy_j=float(k)) for k in range(4)]
    seconds = iter([0.0, 0.0, 0.1, 0.2, 0.3])
    source: Nvml = FakeNvml(*gpus, states=states, nvlinks=[(gpus[0].uuid, gpus[1].uuid)])
    path = tmp_path / "h100.jsonl"
    record(source, path, duration_s=0.25, clock=lambda: next(seconds), sleep=lambda _: None)
    replay: Nvml = ReplayNvml.from_file(path)
    assert (replay.gpus(), replay.driver_version(), replay.cuda_version()) == (gpus, "580.159.04", "13.0")
    assert replay.has_nvlink(gpus[1].uuid, gpus[0].uuid) is True
    assert replay.state(gpus[0].uuid).energy_j == 0.0
    assert replay.sample(gpus[0].uuid).power_w == 72.0
    assert [replay.state(gpus[0].uuid).energy_j for _ in range(2)] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a recording"),
        ("{}\n", "not a recording"),
        ('{"record":"reading","time_s":0,"uuid":"x","state":{}}\n', "first line"),
        ('{"record":"recording","schema":9,"driver":null,"cuda":null,"gpus":[]}\n', "Upgrade"),
    ],
)
def test_a_file_that_is_not_a_recording_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=said):
        ReplayNvml.from_file(path)


def test_a_gpu_without_readings_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"record":"recording","schema":1,"driver":null,"cuda":null,"gpus":[]}\n')
    with pytest.raises(DeviceError, match="no readings of GPU GPU-x"):
        ReplayNvml.from_file(path).state("GPU-x")
