"""Activity by the hardware's counters and critical errors by events, through a hand-written pynvml."""

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpuperf.nvml_meters import GpuActivity, activity_meter, error_meter


class FakeNvmlError(Exception):
    """As pynvml's: the code is in `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeGpm:
    """GPM as nvidia-ml-py has it: a metric's value is its number, unless `values` or `failed` says otherwise."""

    NVMLError = FakeNvmlError
    NVML_GPM_METRICS_GET_VERSION = 1

    def __init__(self, *, is_supported: bool = True) -> None:
        self.is_supported = is_supported
        self.values: dict[int, float] = {}
        self.failed: set[int] = set()
        self.failures: dict[str, int] = {}
        self.freed: list[str] = []
        self.compared: list[tuple[str, str]] = []
        self._made = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answer = self.__class__.__dict__.get(f"_{name}")
        if answer is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            if name in self.failures:
                raise FakeNvmlError(self.failures[name])
            return answer(self, *arguments)

        return call

    def _nvmlGpmQueryDeviceSupport(self, handle: str) -> Any:  # noqa: N802 - pynvml's own name
        return SimpleNamespace(isSupportedDevice=int(self.is_supported))

    def _nvmlGpmSampleAlloc(self) -> str:  # noqa: N802 - pynvml's own name
        self._made += 1
        return f"sample {self._made}"

    def _nvmlGpmSampleFree(self, sample: str) -> None:  # noqa: N802 - pynvml's own name
        self.freed.append(sample)

    def _nvmlGpmSampleGet(self, handle: str, sample: str) -> None:  # noqa: N802 - pynvml's own name
        assert handle == "handle"
        assert sample.startswith("sample")

    def _c_nvmlGpmMetricsGet_t(self) -> Any:  # noqa: N802 - pynvml's own name
        metrics = [SimpleNamespace(metricId=0, value=0.0, nvmlReturn=0) for _ in range(16)]
        return SimpleNamespace(version=0, numMetrics=0, sample1=None, sample2=None, metrics=metrics)

    def _nvmlGpmMetricsGet(self, asked: Any) -> None:  # noqa: N802 - pynvml's own name
        assert asked.version == 1
        self.compared.append((asked.sample1, asked.sample2))
        for metric in asked.metrics[: asked.numMetrics]:
            metric.value = self.values.get(metric.metricId, float(metric.metricId))
            metric.nvmlReturn = 3 if metric.metricId in self.failed else 0


class Clock:
    """Moves when told."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def meter_of(gpm: FakeGpm) -> tuple[Callable[[], GpuActivity | None], Clock]:
    clock = Clock()
    return activity_meter(gpm, "handle", clock=clock), clock


def test_activity_has_shares_and_bytes_and_the_time_since_the_last_reading() -> None:
    read, clock = meter_of(FakeGpm())
    clock.now_s += 0.5
    found = read()
    assert found is not None
    assert found == GpuActivity(
        duration_s=0.5,
        sm_share=0.02,
        occupancy=0.03,
        tensor_share=0.05,
        dram_share=0.1,
        pcie_tx_bytes_per_s=20 * 2**20,
        pcie_rx_bytes_per_s=21 * 2**20,
        nvlink_rx_bytes_per_s=60 * 2**20,
        nvlink_tx_bytes_per_s=61 * 2**20,
    )


def test_each_reading_is_of_the_time_since_the_one_before() -> None:
    gpm = FakeGpm()
    read, clock = meter_of(gpm)
    durations = []
    for seconds in (0.2, 0.3):
        clock.now_s += seconds
        found = read()
        assert found is not None
        durations.append(found.duration_s)
    assert durations == pytest.approx([0.2, 0.3])
    assert gpm.compared == [("sample 1", "sample 2"), ("sample 2", "sample 1")]


def test_a_reading_too_soon_is_none_and_the_next_covers_its_time() -> None:
    read, clock = meter_of(FakeGpm())
    clock.now_s += 0.05
    assert read() is None
    clock.now_s += 0.07
    found = read()
    assert found is not None
    assert found.duration_s == pytest.approx(0.12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_none_and_the_rest_is_there(value: float) -> None:
    gpm = FakeGpm()
    gpm.values[10] = value
    read, clock = meter_of(gpm)
    clock.now_s += 1
    found = read()
    assert found is not None
    assert (found.dram_share, found.sm_share) == (None, 0.02)


def test_a_value_that_the_gpu_lacks_is_none_and_one_that_is_zero_is_zero() -> None:
    gpm = FakeGpm()
    gpm.failed, gpm.values = {60, 61}, {20: 0.0}
    read, clock = meter_of(gpm)
    clock.now_s += 1
    found = read()
    assert found is not None
    assert (found.nvlink_rx_bytes_per_s, found.nvlink_tx_bytes_per_s, found.pcie_tx_bytes_per_s) == (None, None, 0.0)


def test_a_gpu_before_hopper_has_no_activity() -> None:
    read, clock = meter_of(FakeGpm(is_supported=False))
    clock.now_s += 1
    assert read() is None


@pytest.mark.parametrize("function", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet"])
def test_a_meter_that_cannot_begin_gives_nothing(function: str) -> None:
    gpm = FakeGpm()
    gpm.failures[function] = 4
    read, clock = meter_of(gpm)
    clock.now_s += 1
    assert read() is None


def test_an_nvidia_ml_py_without_gpm_gives_nothing() -> None:
    assert activity_meter(SimpleNamespace(NVMLError=FakeNvmlError), "handle")() is None


@pytest.mark.parametrize("function", ["nvmlGpmSampleGet", "nvmlGpmMetricsGet"])
def test_a_reading_that_fails_is_none_and_the_next_one_is_there(function: str) -> None:
    gpm = FakeGpm()
    read, clock = meter_of(gpm)
    gpm.failures[function] = 15
    clock.now_s += 1
    assert read() is None
    gpm.failures.clear()
    clock.now_s += 1
    found = read()
    assert found is not None
    assert found.duration_s == pytest.approx(2.0)


def test_the_samples_are_given_back() -> None:
    gpm = FakeGpm()
    read, _ = meter_of(gpm)
    del read
    gc.collect()
    assert sorted(gpm.freed) == ["sample 1", "sample 2"]


class FakeEvents:
    """Events as nvidia-ml-py has them; a wait that finds none is the error of a timeout."""

    NVMLError = FakeNvmlError
    nvmlEventTypeXidCriticalError = 8  # noqa: N815 - pynvml's own name

    def __init__(self, *, supported: int = 0xFF) -> None:
        self.supported = supported
        self.pending: list[int] = []
        self.ending = 10
        self.registered: list[tuple[object, ...]] = []
        self.failures: dict[str, int] = {}

    def _fail(self, name: str) -> None:
        if name in self.failures:
            raise FakeNvmlError(self.failures[name])

    def nvmlDeviceGetSupportedEventTypes(self, handle: str) -> int:  # noqa: N802 - pynvml's own name
        self._fail("nvmlDeviceGetSupportedEventTypes")
        return self.supported

    def nvmlEventSetCreate(self) -> str:  # noqa: N802 - pynvml's own name
        self._fail("nvmlEventSetCreate")
        return "events"

    def nvmlDeviceRegisterEvents(self, *arguments: object) -> None:  # noqa: N802 - pynvml's own name
        self._fail("nvmlDeviceRegisterEvents")
        self.registered.append(arguments)

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:  # noqa: N802 - pynvml's own name
        assert (events, timeout_ms) == ("events", 0)
        if not self.pending:
            raise FakeNvmlError(self.ending)
        return SimpleNamespace(eventData=self.pending.pop(0))


def test_errors_are_read_until_there_is_none_left_and_only_once() -> None:
    pynvml = FakeEvents()
    read = error_meter(pynvml, "handle")
    assert read is not None
    assert read() == ()
    pynvml.pending = [48, 63, 45]
    assert [read(), read()] == [(48, 63, 45), ()]


def test_critical_errors_alone_are_listened_for() -> None:
    pynvml = FakeEvents()
    error_meter(pynvml, "handle")
    assert pynvml.registered == [("handle", 8, "events")]


@pytest.mark.parametrize("ending", [10, 15, 999])
def test_a_wait_that_fails_otherwise_gives_what_came_before(ending: int) -> None:
    pynvml = FakeEvents()
    read = error_meter(pynvml, "handle")
    assert read is not None
    pynvml.pending, pynvml.ending = [79], ending
    assert read() == (79,)


@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetSupportedEventTypes", "nvmlEventSetCreate", "nvmlDeviceRegisterEvents"]
)
@pytest.mark.parametrize("code", [3, 4])
def test_a_driver_that_does_not_tell_this_user_has_no_meter(function: str, code: int) -> None:
    pynvml = FakeEvents()
    pynvml.failures[function] = code
    assert error_meter(pynvml, "handle") is None


def test_a_gpu_without_such_events_has_no_meter() -> None:
    assert error_meter(FakeEvents(supported=0x7), "handle") is None


def test_an_nvidia_ml_py_without_events_has_no_meter() -> None:
    assert error_meter(SimpleNamespace(NVMLError=FakeNvmlError), "handle") is None
