"""NVML through a hand-written pynvml, the errors that a user reads, the fake, and recordings."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpuperf.errors import DeviceError, UsageError
from pytest_gpuperf.nvml import GpuCondition, GpuInfo, GpuSample, GpuUsage, Nvml, open_nvml
from pytest_gpuperf.testing import FakeNvml, ReplayNvml, fake_condition, fake_gpu, fake_state, record

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
    NVML_VOLATILE_ECC = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
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
            "nvmlDeviceGetGraphicsRunningProcesses_v3": [],
            "nvmlDeviceGetP2PStatus": 0,
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=41),
            "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x20,
            "nvmlDeviceGetTotalEccErrors": 3,
            "nvmlDeviceGetRemappedRows": (2, 1, 1, 0),
            "nvmlDeviceGetCurrPcieLinkGeneration": 1,
            "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetComputeMode": 3,
            "nvmlDeviceGetTopologyCommonAncestor": 20,
            "nvmlDeviceGetMaxMigDeviceCount": 3,
            "nvmlDeviceGetMigDeviceHandleByIndex": "instance",
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
    (absent,) = open_nvml().absent()
    assert re.match(r"GPU 0 \(NVIDIA H100 80GB HBM3, GPU-5f1b.* nvmlDeviceGetMemoryInfo", absent.reason)


@pytest.mark.parametrize(("each", "total"), [([], 0), ([300, 70], 370), ([300, None], None)])
def test_a_desktops_memory_is_that_of_all_that_draw(
    pynvml: FakePynvml, each: list[int | None], total: int | None
) -> None:
    drawing = [SimpleNamespace(pid=1, usedGpuMemory=one) for one in each]
    pynvml.answers["nvmlDeviceGetGraphicsRunningProcesses_v3"] = drawing
    assert open_nvml().desktop_memory_bytes(UUID) == total


def test_usage_has_shares_and_words_for_what_holds_the_clock(pynvml: FakePynvml) -> None:
    assert open_nvml().usage(UUID) == GpuUsage(
        sm_clock_mhz=345.0,
        memory_clock_mhz=345.0,
        power_w=72.5,
        temperature_c=31.0,
        busy_share=0.97,
        memory_busy_share=0.41,
        memory_used_bytes=1024,
        holds=("power cap", "heat (driver)"),
    )


def test_usage_does_not_ask_for_the_energy_which_takes_longer_than_all_the_rest(pynvml: FakePynvml) -> None:
    open_nvml().usage(UUID)
    assert "nvmlDeviceGetTotalEnergyConsumption" not in pynvml.calls


def test_energy_and_processes_can_be_asked_for_alone(pynvml: FakePynvml) -> None:
    nvml = open_nvml()
    nvml.gpus()
    pynvml.calls.clear()
    assert nvml.energy_j(UUID) == pytest.approx(123.456)
    assert nvml.process_pids(UUID) == (7, 9)
    assert pynvml.calls == ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetComputeRunningProcesses_v3"]


def test_a_clock_that_nothing_holds_is_told_from_one_of_which_nothing_is_known(pynvml: FakePynvml) -> None:
    pynvml.answers["nvmlDeviceGetCurrentClocksEventReasons"] = 0
    assert open_nvml().usage(UUID).holds == ()
    pynvml.failures["nvmlDeviceGetCurrentClocksEventReasons"] = 3
    assert open_nvml().usage(UUID).holds is None


def test_an_older_nvidia_ml_py_gives_what_holds_the_clock_by_its_older_name(pynvml: FakePynvml) -> None:
    del pynvml.answers["nvmlDeviceGetCurrentClocksEventReasons"]
    pynvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x1
    assert open_nvml().usage(UUID).holds == ("idle",)


def test_a_condition_has_the_counters_the_rows_and_the_link(pynvml: FakePynvml) -> None:
    assert open_nvml().condition(UUID) == GpuCondition(
        ecc_corrected=3,
        ecc_uncorrected=3,
        remapped_rows=3,
        is_remap_pending=True,
        has_remap_failed=False,
        pcie_generation=1,
        pcie_width=16,
        compute_mode="exclusive process",
    )


def test_corrected_and_uncorrected_errors_are_asked_for_by_their_kind(pynvml: FakePynvml) -> None:
    def errors(_handle: str, kind: int, _counter: int) -> int:
        return {0: 70, 1: 0}[kind]

    vars(pynvml)["nvmlDeviceGetTotalEccErrors"] = errors
    condition = open_nvml().condition(UUID)
    assert (condition.ecc_corrected, condition.ecc_uncorrected) == (70, 0)


@pytest.mark.parametrize("code", [2, 3, 4, 13, 25, 999])
def test_a_gpu_that_tells_nothing_of_its_health_and_use_is_none_everywhere(pynvml: FakePynvml, code: int) -> None:
    nvml = open_nvml()
    nvml.gpus()
    pynvml.failures = dict.fromkeys(pynvml.answers, code) | {"nvmlDeviceGetFieldValues": code}
    assert nvml.condition(UUID) == GpuCondition()
    assert nvml.usage(UUID) == GpuUsage()
    assert nvml.energy_j(UUID) is None
    assert nvml.process_pids(UUID) is None
    assert nvml.desktop_memory_bytes(UUID) is None
    assert nvml.common_ancestor(UUID, UUID) is None
    assert nvml.mig_instances(UUID) == ()
    assert nvml.error_meter(UUID) is None
    assert nvml.activity_meter(UUID)() is None


@pytest.mark.parametrize("code", [15, 16, 28])
@pytest.mark.parametrize(
    ("ask", "function"),
    [
        (lambda nvml: nvml.usage(UUID), "nvmlDeviceGetUtilizationRates"),
        (lambda nvml: nvml.energy_j(UUID), "nvmlDeviceGetTotalEnergyConsumption"),
        (lambda nvml: nvml.process_pids(UUID), "nvmlDeviceGetComputeRunningProcesses_v3"),
        (lambda nvml: nvml.condition(UUID), "nvmlDeviceGetRemappedRows"),
        (lambda nvml: nvml.common_ancestor(UUID, UUID), "nvmlDeviceGetTopologyCommonAncestor"),
        (lambda nvml: nvml.mig_instances(UUID), "nvmlDeviceGetMigMode"),
    ],
    ids=["usage", "energy", "processes", "condition", "ancestor", "mig"],
)
def test_a_lost_gpu_is_an_error_whatever_is_asked(
    pynvml: FakePynvml, code: int, ask: Callable[[Nvml], object], function: str
) -> None:
    nvml = open_nvml()
    nvml.gpus()
    pynvml.failures[function] = code
    with pytest.raises(DeviceError, match=r"GPU 0 \(NVIDIA H100"):
        ask(nvml)


@pytest.mark.parametrize(
    ("level", "place"),
    [
        (0, "board"),
        (10, "switch"),
        (20, "switches"),
        (30, "host-bridge"),
        (40, "numa-node"),
        (50, "system"),
        (99, None),
    ],
)
def test_where_two_gpus_meet_has_a_word(pynvml: FakePynvml, level: int, place: str | None) -> None:
    pynvml.answers["nvmlDeviceGetTopologyCommonAncestor"] = level
    assert open_nvml().common_ancestor(UUID, OTHER) == place


def test_a_gpu_without_mig_has_no_instances(pynvml: FakePynvml) -> None:
    assert open_nvml().mig_instances(UUID) == ()
    assert "nvmlDeviceGetMaxMigDeviceCount" not in pynvml.calls


def mig_handle(_handle: str, number: int) -> str:
    """Instances 0 and 2 of at most three."""
    if number == 1:
        raise FakeNvmlError(6)
    return f"instance {number}"


def test_mig_instances_are_listed_over_gaps(pynvml: FakePynvml) -> None:
    pynvml.answers["nvmlDeviceGetMigMode"] = [1, 1]
    vars(pynvml)["nvmlDeviceGetMigDeviceHandleByIndex"] = mig_handle
    vars(pynvml)["nvmlDeviceGetUUID"] = lambda handle: f"MIG-{handle[-1]}"
    assert [one.uuid for one in open_nvml().mig_instances(UUID)] == ["MIG-0", "MIG-2"]


def test_an_instance_that_was_listed_can_be_asked_by_its_uuid(pynvml: FakePynvml) -> None:
    pynvml.answers["nvmlDeviceGetMigMode"] = [1, 1]
    vars(pynvml)["nvmlDeviceGetMigDeviceHandleByIndex"] = mig_handle
    vars(pynvml)["nvmlDeviceGetUUID"] = lambda handle: f"MIG-{handle[-1]}"
    nvml = open_nvml()
    nvml.mig_instances(UUID)
    pynvml.calls.clear()
    assert nvml.sample("MIG-2").temperature_c == 31.0
    assert "nvmlDeviceGetHandleByUUID" not in pynvml.calls


def test_another_failure_while_instances_are_listed_is_an_error(pynvml: FakePynvml) -> None:
    pynvml.answers["nvmlDeviceGetMigMode"] = [1, 1]
    pynvml.failures["nvmlDeviceGetMigDeviceHandleByIndex"] = 15
    with pytest.raises(DeviceError, match="is lost"):
        open_nvml().mig_instances(UUID)


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
    (absent,) = nvml.absent()
    assert absent.reason.startswith("GPU 0 needs a reset")


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("nvmlDeviceGetHandleByIndex", 15, "GPU 1 is lost: it has fallen off the bus."),
        ("nvmlDeviceGetHandleByIndex", 16, "GPU 1 needs a reset."),
        ("nvmlDeviceGetHandleByIndex", 999, "GPU 1: nvmlDeviceGetHandleByIndex failed: "),
        ("nvmlDeviceGetUUID", 15, "GPU 1 is lost: it has fallen off the bus."),
    ],
)
def test_one_gpu_that_does_not_answer_hides_no_other(pynvml: FakePynvml, function: str, code: int, words: str) -> None:
    def answer(what: Any) -> Any:
        if what in (1, "handle 1"):
            raise FakeNvmlError(code)
        return f"handle {what}" if function == "nvmlDeviceGetHandleByIndex" or isinstance(what, int) else UUID

    pynvml.answers["nvmlDeviceGetCount"] = 3
    monkey = {"nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}", "nvmlDeviceGetUUID": lambda _: UUID}
    vars(pynvml).update(monkey | {function: answer})
    nvml = open_nvml()
    assert [gpu.index for gpu in nvml.gpus()] == [0, 2]
    assert [(gpu.index, gpu.reason.startswith(words)) for gpu in nvml.absent()] == [(1, True)]


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
    assert "--gpuperf-device" not in str(raised.value)  # for those alone who insist on a GPU


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


def test_the_fake_has_the_energy_of_its_script_or_of_the_state_last_given() -> None:
    uuid = fake_gpu().uuid
    scripted = FakeNvml(energies_j=[1.0, None, 3.0])
    assert [scripted.energy_j(uuid) for _ in range(4)] == [1.0, None, 3.0, 3.0]

    fake = FakeNvml(states=[fake_state(energy_j=5.0), fake_state(energy_j=6.0)])
    assert [fake.energy_j(uuid), fake.energy_j(uuid)] == [5.0, 5.0]
    fake.state(uuid)
    fake.state(uuid)
    assert fake.energy_j(uuid) == 6.0


def test_the_fake_has_the_processes_of_its_next_state() -> None:
    uuid = fake_gpu().uuid
    fake = FakeNvml(states=[fake_state(process_pids=(1,)), fake_state(process_pids=(2,)), fake_state(process_pids=())])
    assert [fake.state(uuid).process_pids, fake.process_pids(uuid), fake.state(uuid).process_pids] == [(1,), (2,), ()]


def test_the_fake_refuses_a_gpu_that_it_does_not_have() -> None:
    with pytest.raises(DeviceError, match="GPU-nowhere"):
        FakeNvml().state("GPU-nowhere")


def test_the_fake_loses_a_gpu_for_good_after_so_many_questions() -> None:
    fake = FakeNvml(fake_gpu(), fake_gpu(1), lost={fake_gpu().uuid: 2})
    fake.state(fake_gpu().uuid)
    fake.condition(fake_gpu().uuid)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"GPU 0 \(NVIDIA H100 80GB HBM3, GPU-0.* is lost"):
            fake.sample(fake_gpu().uuid)
    assert fake.sample(fake_gpu(1).uuid).power_w == 72.0


def test_the_fake_loses_a_gpu_when_told() -> None:
    fake = FakeNvml()
    fake.usage(fake_gpu().uuid)
    fake.lose(fake_gpu().uuid)
    with pytest.raises(DeviceError, match="is lost"):
        fake.usage(fake_gpu().uuid)


def test_the_fake_reports_errors_to_whoever_listens_once() -> None:
    fake = FakeNvml(xids={fake_gpu().uuid: [(), (13,)]})
    fake.strike(fake_gpu().uuid, 31)  # before anybody listened
    read = fake.error_meter(fake_gpu().uuid)
    assert read is not None
    assert read() == ()
    fake.strike(fake_gpu().uuid, 79)
    assert [read(), read()] == [(13, 79), ()]


def test_the_fake_wears_one_gpu() -> None:
    fake = FakeNvml(fake_gpu(), fake_gpu(1))
    fake.wear(fake_gpu().uuid, ecc_uncorrected=2)
    assert fake.condition(fake_gpu().uuid) == fake_condition(ecc_uncorrected=2)
    assert fake.condition(fake_gpu(1).uuid) == fake_condition()


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
    assert replay.energy_j(gpus[0].uuid) == 0.0
    assert replay.state(gpus[0].uuid).energy_j == 0.0
    assert (replay.energy_j(gpus[0].uuid), replay.process_pids(gpus[0].uuid)) == (0.0, ())
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
