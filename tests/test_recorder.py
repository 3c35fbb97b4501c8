"""What a test measures and records: names and units, peaks, tolerances, regions, and every value that is refused."""

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import pytest

from pytest_gpuperf import monitor as monitor_module
from pytest_gpuperf.devices import Device, cpu_device
from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.recorder import Recorder, Work, without_frames_of
from pytest_gpuperf.records import Kind, Measurement, Method, Mode, encode
from pytest_gpuperf.testing import FakeNvml, FakeStopwatch, fake_gpu, fake_state
from pytest_gpuperf.workloads.requests import GpuTime

GPU = Device(
    kind="cuda",
    index=0,
    uuid=fake_gpu().uuid,
    name="NVIDIA H100 80GB HBM3",
    memory_bytes=85_520_809_984,
    peak_flops_per_s={"bfloat16": 1000e12, "float32": 67e12},
    peak_bandwidth_bytes_per_s=3.35e12,
    pcie_bandwidth_bytes_per_s=64e9,
)
#: A time that binary numbers hold exactly, so that ratios are exact too.
EXACT_S = 2.0**-10


class Kernel:
    """A workload that takes a millisecond."""

    def __init__(
        self,
        *,
        kind: Kind = "compute",
        mode: Mode | None = "sustained",
        flop: float | None = None,
        bytes_moved: float | None = None,
        dtype: str | None = None,
    ) -> None:
        self.kind = kind
        self.mode = mode
        self.flop = flop
        self.bytes_moved = bytes_moved
        self.dtype = dtype

    def __call__(self) -> float:
        return 1e-3


def recorder(
    *devices: Device,
    nvml: Nvml | None = None,
    synchronize: Callable[[], None] = lambda: None,
    preferred: Mapping[str, Method] | None = None,
    tolerance: float | None = None,
    mode: Mode | None = None,
) -> Recorder:
    return Recorder(
        devices or (GPU,),
        nvml=nvml,
        stopwatch=FakeStopwatch,
        synchronize=synchronize,
        preferred=preferred or {},
        tolerance=tolerance,
        mode=mode,
    )


def cold(work: Work, *, device: Device = GPU, seconds: float = EXACT_S) -> Measurement:
    """Measure a call of exactly this time."""
    return recorder(device).benchmark(lambda: seconds, work=msgspec.structs.replace(work, mode="cold"))


# Names, units, peaks


def test_flop_make_a_throughput() -> None:
    measurement = cold(Work(flop=1e12))
    assert (measurement.metric, measurement.unit, measurement.better) == ("throughput", "FLOP/s", "higher")
    assert measurement.value == 1e12 / EXACT_S
    assert (measurement.kind, measurement.flop) == ("compute", 1e12)


def test_bytes_make_a_bandwidth() -> None:
    measurement = cold(Work(bytes_moved=1e9))
    assert (measurement.metric, measurement.unit, measurement.better) == ("bandwidth", "B/s", "higher")
    assert measurement.value == 1e9 / EXACT_S
    assert (measurement.kind, measurement.bytes_moved) == ("memory", 1e9)


def test_what_is_not_counted_makes_a_time() -> None:
    measurement = cold(Work())
    assert (measurement.metric, measurement.unit, measurement.better) == ("time", "s", "lower")
    assert measurement.value == EXACT_S
    assert measurement.fraction_of_peak is None


def test_flop_win_over_bytes() -> None:
    assert cold(Work(flop=1e12, bytes_moved=1e9)).unit == "FLOP/s"


def test_a_metric_may_have_a_name_of_its_own() -> None:
    assert recorder().benchmark(lambda: 1e-3, metric="prefill", work=Work(flop=1e9)).metric == "prefill"


@pytest.mark.parametrize(("dtype", "peak"), [("bfloat16", 1000e12), ("float32", 67e12), ("float8", None), (None, None)])
def test_the_peak_is_that_of_the_data_type(dtype: str | None, peak: float | None) -> None:
    assert cold(Work(flop=1e9, dtype=dtype)).peak == peak


def test_the_peak_of_a_transfer_is_that_of_the_bus() -> None:
    assert cold(Work(bytes_moved=1e6)).peak == 3.35e12
    assert cold(Work(bytes_moved=1e6, kind="transfer")).peak == 64e9


def test_the_peak_of_a_pageable_transfer_is_that_of_the_bus_too() -> None:
    assert cold(Work(bytes_moved=1e6, kind="host")).peak == 64e9


def test_a_computed_peak_is_said_to_be_one() -> None:
    computed = msgspec.structs.replace(GPU, is_peak_computed=True)
    assert cold(Work(flop=1e9, dtype="bfloat16"), device=computed).is_peak_computed
    assert not cold(Work(flop=1e9), device=computed).is_peak_computed
    assert not cold(Work(flop=1e9, dtype="bfloat16")).is_peak_computed


def test_more_than_the_peak_is_an_error_of_the_measurement() -> None:
    with pytest.raises(MeasurementError) as error:
        cold(Work(flop=1100e12 * EXACT_S, dtype="bfloat16"))
    assert str(error.value) == (
        "throughput is 1.100 PFLOP/s, 110 % of the peak of NVIDIA H100 80GB HBM3 (1.000 PFLOP/s): "
        "more than the hardware can do. Likely causes: the work is counted wrong, the result is cached or never used, "
        "or the data fit in the cache."
    )


def test_exactly_102_percent_of_the_peak_is_still_believed() -> None:
    measurement = cold(Work(flop=1020e12 * EXACT_S, dtype="bfloat16"))
    assert measurement.fraction_of_peak == 1.02
    with pytest.raises(MeasurementError):
        cold(Work(flop=1020.001e12 * EXACT_S, dtype="bfloat16"))


def test_what_is_over_the_peak_is_not_kept() -> None:
    mine = recorder()
    with pytest.raises(MeasurementError):
        mine.benchmark(lambda: 1e-3, work=Work(bytes_moved=1e12))
    assert mine.measurements == []


# How it is measured


def test_the_samples_and_the_telemetry_are_kept() -> None:
    measurement = recorder(nvml=FakeNvml()).benchmark(lambda: 1e-3, work=Work())
    assert set(measurement.samples_s) == {1e-3}
    assert measurement.telemetry is not None
    assert measurement.telemetry.power_w == 72.0
    assert measurement.spread == 0.0


def test_a_cpu_is_not_watched_by_nvml() -> None:
    nvml = FakeNvml()
    measurement = recorder(cpu_device(), nvml=nvml).benchmark(lambda: 1e-3, work=Work())
    assert nvml.calls == []
    assert measurement.telemetry is not None
    assert measurement.telemetry.power_w is None


def test_the_method_of_the_metrics_baseline_is_kept() -> None:
    graph = Method(clock="cuda-graph", mode="hot")
    mine = recorder(preferred={"time": graph})
    assert mine.benchmark(lambda: 60e-6, work=Work()).method == graph
    assert mine.benchmark(lambda: 60e-6, metric="other", work=Work()).method == Method(clock="cuda-events", mode="cold")


def test_a_workload_brings_its_work_and_mode() -> None:
    measurement = recorder().benchmark(Kernel(flop=1e9, dtype="bfloat16"), work=Work())
    assert (measurement.flop, measurement.peak, measurement.method.mode) == (1e9, 1000e12, "sustained")
    assert measurement.metric == "throughput"


def test_arguments_win_over_the_workload() -> None:
    kernel = Kernel(flop=1e9, dtype="bfloat16")
    measurement = recorder().benchmark(kernel, work=Work(flop=2e9, dtype="float32", mode="hot", kind="end-to-end"))
    assert (measurement.flop, measurement.peak, measurement.method.mode) == (2e9, 67e12, "hot")
    assert measurement.kind == "end-to-end"


def test_the_markers_mode_wins_over_the_workloads_and_the_argument_over_both() -> None:
    kernel = Kernel(mode="sustained")
    assert recorder(mode="cold").benchmark(kernel, work=Work()).method.mode == "cold"
    assert recorder(mode="cold").benchmark(kernel, work=Work(mode="hot")).method.mode == "hot"


def test_the_markers_tolerance_counts_unless_the_call_has_one() -> None:
    mine = recorder(tolerance=0.02)
    assert mine.benchmark(lambda: 1e-3, metric="a", work=Work()).tolerance == 0.02
    assert mine.benchmark(lambda: 1e-3, metric="b", work=Work(), tolerance="5%").tolerance == 0.05
    assert mine.record("c", 1.0, unit="s").tolerance == 0.02
    assert mine.record("d", 1.0, unit="s", tolerance=0.1).tolerance == 0.1
    assert recorder().benchmark(lambda: 1e-3, work=Work()).tolerance is None


def test_a_tolerance_that_is_none_fails_before_anything_runs() -> None:
    ran = []
    with pytest.raises(UsageError, match="tolerance=5 is outside"):
        recorder().benchmark(lambda: ran.append(1), work=Work(), tolerance=5)
    assert not ran


def test_an_error_of_the_call_reaches_the_caller_and_nothing_is_kept() -> None:
    def call() -> None:
        raise ZeroDivisionError

    mine = recorder()
    with pytest.raises(ZeroDivisionError):
        mine.benchmark(call, work=Work())
    assert mine.measurements == []


# What is refused


def test_what_is_not_callable_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        recorder().benchmark(3.5, work=Work())  # type: ignore[arg-type]
    assert str(error.value) == "gpu_benchmark needs a callable without arguments, not float."


@pytest.mark.parametrize("amount", [0, -1.0, math.nan, math.inf, "1e9"])
def test_work_that_is_no_amount_is_refused(amount: Any) -> None:
    for name, work in (("flops", Work(flop=amount)), ("bytes", Work(bytes_moved=amount))):
        with pytest.raises(UsageError) as error:
            recorder().benchmark(lambda: 1e-3, work=work)
        assert str(error.value) == f"{name}={amount!r} is not a finite number above zero."


def test_flops_that_are_a_truth_are_refused() -> None:
    with pytest.raises(UsageError, match="flops=True"):
        recorder().benchmark(lambda: 1e-3, work=Work(flop=True))


@pytest.mark.parametrize("amount", [np.float64(1e9), np.float64(2.5), np.int64(10**9), np.float32(1e9)])
def test_flops_that_numpy_counted_can_be_written(amount: float) -> None:
    measurement = recorder().benchmark(lambda: 1e-3, work=Work(flop=amount))
    assert msgspec.json.decode(encode(measurement), type=Measurement) == measurement


@pytest.mark.parametrize("amount", [0.0, -1.0, math.nan])
def test_a_workload_that_miscounts_its_work_is_refused(amount: float) -> None:
    with pytest.raises(UsageError, match="is not a finite number above zero"):
        recorder().benchmark(Kernel(flop=amount), work=Work())


def test_a_metric_is_measured_once() -> None:
    mine = recorder()
    mine.benchmark(lambda: 1e-3, work=Work())
    with pytest.raises(UsageError) as error:
        mine.benchmark(lambda: 1e-3, work=Work())
    assert str(error.value) == (
        "The metric 'time' was recorded twice in this test. Give the second one a name of its own: "
        "gpu_benchmark(..., metric=NAME) or perf.record(NAME, ...)."
    )
    with pytest.raises(UsageError, match="recorded twice"):
        mine.record("time", 1.0, unit="s")
    with pytest.raises(UsageError, match="recorded twice"):
        mine.add_foreign(mine.measurements[0])
    assert len(mine.measurements) == 1


# Recording


def test_a_recorded_value_is_kept_in_its_base_unit() -> None:
    measurement = recorder().record("ttft", 12.5, unit="ms")
    assert (measurement.value, measurement.unit, measurement.better) == (0.0125, "s", "lower")
    assert measurement.method == Method(clock="wall", mode="recorded")
    assert (measurement.kind, measurement.samples_s, measurement.telemetry) == ("end-to-end", (), None)


@pytest.mark.parametrize("value", [5, np.float64(5.0), np.float32(5.0), np.int64(5), np.uint8(5)])
def test_whole_numbers_and_those_of_numpy_are_recorded_as_numbers(value: Any) -> None:
    measurement = recorder().record("rate", value, unit="tok/s")
    assert (type(measurement.value), measurement.value) == (float, 5.0)
    assert msgspec.json.decode(encode(measurement), type=Measurement) == measurement


def test_a_direction_can_be_given() -> None:
    mine = recorder()
    assert mine.record("hits", 97.0, unit="%", better="higher").better == "higher"
    assert mine.record("uptime", 97.0, unit="s", better="higher", contradicts_unit=True).better == "higher"


def test_a_unit_without_direction_is_refused_and_nothing_is_kept() -> None:
    mine = recorder()
    with pytest.raises(UsageError, match="does not say whether more or less is better"):
        mine.record("hits", 97.0, unit="%")
    assert mine.measurements == []


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, "5", None, [1.0], 1 + 0j])
def test_a_value_that_cannot_be_judged_is_refused(value: Any) -> None:
    mine = recorder()
    with pytest.raises(UsageError) as error:
        mine.record("ttft", value, unit="s")
    assert str(error.value) == f"ttft = {value!r} is not a finite number above zero, so it cannot be judged."
    assert mine.measurements == []


def test_a_whole_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(UsageError, match="is not a finite number above zero"):
        recorder().record("size", 10**400, unit="B")


@pytest.mark.parametrize(("value", "unit"), [(1e300, "PB"), (1e-320, "ns")])
def test_a_value_that_its_base_unit_cannot_hold_is_refused(value: float, unit: str) -> None:
    with pytest.raises(UsageError, match="is not a finite number above zero"):
        recorder().record("size", value, unit=unit)


@pytest.mark.parametrize("metric", ["", "  ", None, 5])
def test_a_metric_has_a_name(metric: Any) -> None:
    with pytest.raises(UsageError) as error:
        recorder().record(metric, 1.0, unit="s")
    assert str(error.value) == f"The name of a metric is text, not {metric!r}."


@pytest.mark.parametrize("metric", ["", "  ", 5])
def test_a_metric_that_is_measured_has_a_name_too(metric: Any) -> None:
    with pytest.raises(UsageError) as error:
        recorder().benchmark(lambda: 1e-3, metric=metric, work=Work())
    assert str(error.value) == f"The name of a metric is text, not {metric!r}."


@pytest.mark.parametrize("unit", ["", "  ", None, 5])
def test_a_recorded_value_has_a_unit(unit: Any) -> None:
    mine = recorder()
    with pytest.raises(UsageError) as error:
        mine.record("hits", 1.0, unit=unit, better="higher")
    assert str(error.value) == f"unit={unit!r} of hits is not a unit. Write 'tok/s', 'ms', '%', ..."
    assert mine.measurements == []


def test_a_data_type_is_a_name_and_not_the_type() -> None:
    with pytest.raises(UsageError, match="is not known"):
        recorder().benchmark(lambda: 1e-3, work=Work(flop=1e9, dtype=np.float16))  # type: ignore[arg-type]


def test_a_data_type_that_nobody_knows_is_refused_instead_of_having_no_peak() -> None:
    with pytest.raises(UsageError, match="'bf16' is not known"):
        recorder().benchmark(lambda: 1e-3, work=Work(flop=1e9, dtype="bf16"))


def test_a_floor_of_the_peak_needs_the_data_type_where_peaks_are_known() -> None:
    measured = recorder().benchmark(lambda: 1e-3, work=Work(flop=1e9))
    with pytest.raises(UsageError, match="Add dtype='bfloat16'"):
        measured.assert_at_least(0.5, of="peak")


def test_a_plain_time_is_judged_with_the_larger_noise_of_matrix_products() -> None:
    assert recorder().benchmark(lambda: 1e-3, work=Work()).kind == "compute"
    assert recorder().benchmark(lambda: 1e-3, work=Work(bytes_moved=1e6)).kind == "memory"


# Regions


def test_a_region_begins_and_ends_with_all_work_done() -> None:
    events: list[str] = []
    mine = recorder(synchronize=lambda: events.append("synchronize"))
    with mine.region("generate") as region:
        events.append("work")
    assert events == ["synchronize", "work", "synchronize"]
    assert region.name == "generate"
    assert region.time_s == region.telemetry.duration_s > 0


def test_waiting_for_the_work_is_part_of_the_region() -> None:
    nvml = FakeNvml()
    asked: list[int] = []
    with recorder(nvml=nvml, synchronize=lambda: asked.append(nvml.calls.count("state"))).region():
        pass
    assert asked == [0, 1]  # before the first reading of the state, and before the second
    assert nvml.calls.count("state") == 2


def test_the_energy_of_a_short_region_is_not_known() -> None:
    states = [fake_state(energy_j=0.0), fake_state(energy_j=300.0)]
    with recorder(nvml=FakeNvml(states=states)).region() as region:
        pass
    assert region.energy_j is None


def test_the_energy_of_a_long_region_is_the_counters_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "ENERGY_FROM_S", 0.0)  # so that the test need not take 5 s
    states = [fake_state(energy_j=100.0), fake_state(energy_j=400.0)]
    with recorder(nvml=FakeNvml(states=states)).region() as region:
        pass
    assert region.energy_j == 300.0


def test_an_error_in_a_region_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError), recorder(nvml=FakeNvml()).region():
        raise ZeroDivisionError


def test_a_region_in_progress_has_no_time_yet() -> None:
    with recorder().region() as region, pytest.raises(RuntimeError, match="has ended"):
        _ = region.time_s


def test_a_recorded_value_carries_the_telemetry_of_the_last_region_that_ended() -> None:
    states = [fake_state(), fake_state(), fake_state(), fake_state(hw_thermal_s=1e6)]
    mine = recorder(nvml=FakeNvml(states=states))
    with mine.region("load"):
        pass
    with mine.region("generate") as region:
        early = mine.record("early", 1.0, unit="s")
    late = mine.record("late", 1.0, unit="s")
    assert early.telemetry is not None
    assert early.telemetry.hw_thermal_share == 0.0
    assert late.telemetry == region.telemetry
    assert region.telemetry.hw_thermal_share == 1.0


def test_a_region_that_failed_leaves_the_telemetry_of_the_one_before() -> None:
    mine = recorder(nvml=FakeNvml())
    with mine.region() as region:
        pass
    with pytest.raises(ZeroDivisionError), mine.region():
        raise ZeroDivisionError
    assert mine.record("latency", 1.0, unit="s").telemetry == region.telemetry


def test_what_is_measured_on_the_device_has_telemetry_of_its_own_and_not_the_regions() -> None:
    mine = recorder(nvml=FakeNvml(states=[fake_state(hw_thermal_s=0.0), fake_state(hw_thermal_s=1e6)]))
    with mine.region():
        pass
    measured = mine.benchmark(lambda: 1e-3, work=Work())
    assert measured.telemetry is not None
    assert measured.telemetry.hw_thermal_share == 0.0


# Tracebacks


def function_in(path: Path) -> Callable[[Callable[[], None]], None]:
    """A function that calls its argument, and whose code lies in this file."""
    namespace: dict[str, Any] = {}
    exec(compile("def call(other):\n    other()\n", str(path), "exec"), namespace)  # noqa: S102 - a frame with that name
    call: Callable[[Callable[[], None]], None] = namespace["call"]
    return call


def raise_by_zero() -> None:
    raise ZeroDivisionError


def files_of(traceback: TracebackType | None) -> list[str]:
    return [frame.filename for frame in inspect.getinnerframes(traceback)] if traceback else []


def test_frames_of_the_package_are_left_out_of_a_traceback(tmp_path: Path) -> None:
    package, neighbour = tmp_path / "package", tmp_path / "package_two"
    ours, theirs = function_in(package / "plugin.py"), function_in(neighbour / "kernel.py")
    with pytest.raises(ZeroDivisionError) as error:
        ours(lambda: theirs(lambda: ours(raise_by_zero)))
    kept = files_of(without_frames_of(error.value, f"{package}/"))
    assert str(package / "plugin.py") in files_of(error.value.__traceback__)
    assert kept == [__file__, __file__, str(neighbour / "kernel.py"), __file__, __file__]


def test_a_traceback_of_the_package_alone_is_left_out_as_a_whole(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    source = "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    caught = error\n"
    exec(compile(source, str(tmp_path / "plugin.py"), "exec"), namespace)  # noqa: S102 - as above
    assert without_frames_of(namespace["caught"], str(tmp_path)) is None


# Configuration, busy share, curves


def test_configuration_is_part_of_what_is_recorded_from_then_on() -> None:
    found = recorder()
    found.record("before", 1.0, unit="s")
    found.configure({"model": "gpt2", "max_num_seqs": 256})
    found.record("after", 1.0, unit="s")
    found.benchmark(lambda: 1e-3, work=Work(mode="cold"))
    found.configure(None)
    found.record("last", 1.0, unit="s")
    known = {"model": "gpt2", "max_num_seqs": "256"}
    assert [m.configuration for m in found.measurements] == [None, known, known, None]


def test_kind_of_a_recorded_value_may_be_named() -> None:
    found = recorder()
    assert found.record("step", 1.0, unit="s", kind="compute", gpu_busy_share=0.5).kind == "compute"
    assert found.record("all", 1.0, unit="s").kind == "end-to-end"
    with pytest.raises(UsageError, match=r"kind='gpu' of x does not exist. Valid: compute, memory, transfer, host"):
        found.record("x", 1.0, unit="s", kind="gpu")  # type: ignore[arg-type]
    assert found.record_curve("curve", {1: 1.0}, unit="s", x="batch size", kind="compute").kind == "compute"


def test_configuration_without_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match=r"The configuration has no value for 'model'. Leave the name out"):
        recorder().configure({"model": " "})


def test_share_below_nine_tenths_makes_a_metric_the_hosts() -> None:
    found = recorder()
    assert found.record("a", 1.0, unit="s", gpu_busy_share=0.5).kind == "host"
    assert found.record("b", 1.0, unit="s", gpu_busy_share=0.95).kind == "end-to-end"
    assert found.record("c", 1.0, unit="s").gpu_busy_share is None
    assert found.record("d", 1.0, unit="s", gpu_busy_share=0.0).gpu_busy_share == 0.0
    curve = found.record_curve("e", {1: 1.0}, unit="s", x="batch size", gpu_busy_share=0.5)
    assert (curve.kind, curve.gpu_busy_share) == ("host", 0.5)


@pytest.mark.parametrize("share", [1.2, -0.1, math.nan, "half", True])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(UsageError, match="is not a share from 0 to 1"):
        recorder().record("a", 1.0, unit="s", gpu_busy_share=share)


def test_curve_keeps_its_points_in_the_base_unit_and_their_geometric_mean() -> None:
    measurement = recorder().record_curve(
        "latency", {4: 40.0, 1: 10.0}, unit="ms", x="batch size", end="out of memory at 8"
    )
    assert measurement.curve is not None
    assert measurement.curve.points == {"1": pytest.approx(0.01), "4": pytest.approx(0.04)}
    assert measurement.value == pytest.approx(0.02)
    assert (measurement.unit, measurement.better) == ("s", "lower")
    assert measurement.curve.end == "out of memory at 8"
    assert measurement.method == Method(clock="wall", mode="curve")
    assert measurement.configuration == {"curve over": "batch size"}


def test_sizes_of_numpy_are_sizes() -> None:
    sizes: Any = {np.int64(8): np.float32(2.0)}
    curve = recorder().record_curve("rate", sizes, unit="tok/s", x="batch size").curve
    assert curve is not None
    assert curve.points == {"8": 2.0}


@pytest.mark.parametrize("x", ["", " ", None])
def test_curve_has_to_say_what_its_sizes_are_of(x: Any) -> None:
    with pytest.raises(UsageError, match=r"of rate does not say what the sizes are of\. Write 'batch size'"):
        recorder().record_curve("rate", {1: 1.0}, unit="tok/s", x=x)


def test_curve_may_go_against_its_unit_as_any_metric() -> None:
    found = recorder()
    with pytest.raises(UsageError, match="add contradicts_unit=True"):
        found.record_curve("uptime", {1: 1.0}, unit="s", x="clients", better="higher")
    assert (
        found.record_curve("uptime", {1: 1.0}, unit="s", x="clients", better="higher", contradicts_unit=True).better
        == "higher"
    )


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "The curve 'rate' has no point: out of memory at 1."),
        ({0: 1.0}, "batch size 0 of rate is not a whole number above zero."),
        ({1.5: 1.0}, "batch size 1.5 of rate is not a whole number above zero."),
        ({4: 0.0}, "rate at batch size 4 = 0.0 is not a finite number above zero, so it cannot be judged."),
    ],
)
def test_curve_that_is_none_is_refused(points: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        recorder().record_curve("rate", points, unit="tok/s", x="batch size", end="out of memory at 1")
    assert str(error.value) == message


@pytest.mark.parametrize("given", ["gemm", GpuTime(busy_s=1.0, steps=1, kernels=1)])
def test_kernels_that_are_no_summary_are_refused_before_anybody_writes_them(given: Any) -> None:
    found = recorder()
    with pytest.raises(UsageError, match=r"of step is no KernelSummary\. Write engine\.profile\(load\)\.summary\."):
        found.record("step", 1.0, unit="s", kernels=given)
    assert found.kernels == {}
