"""What one test measures: the object behind `gpu_benchmark` and `perf`."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real
from statistics import geometric_mean
from types import TracebackType
from typing import get_args

from msgspec.structs import replace

from pytest_gpuperf.devices import Device
from pytest_gpuperf.errors import MeasurementError, UsageError
from pytest_gpuperf.hostlimit import is_host_limited
from pytest_gpuperf.monitor import Monitor, foreign_memory_bytes
from pytest_gpuperf.nvml import Nvml
from pytest_gpuperf.profiling import Found, Profiler, profile_as_measured
from pytest_gpuperf.records import (
    ClockName,
    Curve,
    KernelSummary,
    Kind,
    Measurement,
    Method,
    Mode,
    Record,
    Telemetry,
)
from pytest_gpuperf.timing import Stopwatch, Timing, measure
from pytest_gpuperf.units import Better, direction, format_percent, format_value, parse_tolerance, to_base
from pytest_gpuperf.vitals import Vitals
from pytest_gpuperf.workloads import Workload

#: A value this far above the hardware's peak is an error of the measurement.
OVER_PEAK = 1.02
#: Types that a peak may be known of.
DTYPES = ("float16", "bfloat16", "float32", "tf32", "float64", "float8", "int8")


class Work(Record, frozen=True, kw_only=True):
    """What a call costs and how to measure it; from the workload, or from the arguments of `gpu_benchmark`."""

    kind: Kind | None = None
    mode: Mode | None = None
    flop: float | None = None
    bytes_moved: float | None = None
    dtype: str | None = None


class Region:
    """A stretch of a test under watch: its time, and what the GPU did meanwhile. From `perf.region()`.

    The device has finished all earlier work when the region begins, and all of the region's when it ends.
    """

    def __init__(self, name: str, monitor: Monitor) -> None:
        self.name = name
        self._monitor = monitor

    @property
    def telemetry(self) -> Telemetry:
        """Clocks, power, temperature and slowdowns during the region; known when it has ended."""
        return self._monitor.telemetry

    @property
    def time_s(self) -> float:
        """Wall-clock seconds of the region."""
        return self.telemetry.duration_s

    @property
    def energy_j(self) -> float | None:
        """Energy of the devices in joules; `None` under 5 s, where the counter is too coarse, or without NVML."""
        return self.telemetry.energy_j


class Recorder:
    """Measures and records the metrics of one test.

    Args:
        devices: Those that the test holds.
        nvml: The driver's library, or `None`.
        stopwatch: Makes the stopwatch of the first device; called only when something is measured.
        synchronize: Waits for all devices to finish.
        preferred: Method of each metric's baseline.
        tolerance: Of the test's `perf` marker.
        mode: The same.
        profiler: In a process that profiles instead of measuring.
        vitals: See `Monitor`.

    Raises:
        DeviceError: A device is lost.

    Attributes:
        kernels: Metric -> what the profiler saw of it.
        profilable: Metrics that a profiler in this process would see something of: calls; and what follows a region,
            in a test that has not profiled itself.
        is_elsewhere: The work is done in other processes, such as an engine's: no profiler here would see it.
    """

    def __init__(  # noqa: PLR0913 - all but the first are keywords, given in one place
        self,
        devices: tuple[Device, ...],
        *,
        nvml: Nvml | None,
        stopwatch: Callable[[], Stopwatch],
        synchronize: Callable[[], None],
        preferred: Mapping[str, Method],
        tolerance: float | None = None,
        mode: Mode | None = None,
        profiler: Profiler | None = None,
        vitals: Vitals | None = None,
    ) -> None:
        self.devices = devices
        self.measurements: list[Measurement] = []
        self.kernels: dict[str, KernelSummary] = {}
        self._calls: set[str] = set()
        self._of_regions: set[str] = set()
        self._profiles_itself = False
        self.is_elsewhere = False
        self._profiler = profiler
        self._kernels_of_region: KernelSummary | None = None
        self._of_last_region: Telemetry | None = None
        self._nvml = nvml
        self._vitals = vitals
        self._uuids = [device.uuid for device in devices if device.kind == "cuda"]
        self._foreign_memory_bytes = foreign_memory_bytes(nvml, self._uuids)  # before the test takes any itself
        self._stopwatch = stopwatch
        self._synchronize = synchronize
        self._preferred = preferred
        self._tolerance = tolerance
        self._mode = mode
        self._configuration: dict[str, str] | None = None
        self._is_closed = False

    @property
    def profilable(self) -> set[str]:
        """See the class."""
        return self._calls if self._profiles_itself else self._calls | self._of_regions

    def configure(self, configuration: Mapping[str, object] | None) -> None:
        """Say what is measured from now on: settings that make two results incomparable where they differ.

        Args:
            configuration: Name -> value, such as `{"model": "llama-3-8b", "max_num_seqs": 256}`; kept as text. `None`
                ends it.

        Raises:
            UsageError: A name or a value is empty.
        """
        given = {str(name): str(value) for name, value in (configuration or {}).items()}
        if empty := [name for name, value in given.items() if not (name.strip() and value.strip())]:
            raise UsageError(f"The configuration has no value for {empty[0]!r}. Leave the name out, or say 'none'.")
        self._configuration = given or None

    def benchmark(
        self,
        call: Callable[[], object],
        *,
        metric: str | None = None,
        work: Work,
        clock: ClockName | None = None,
        tolerance: object = None,
    ) -> Measurement:
        """Measure a call on the device's clock.

        Raises:
            UsageError: A wrong argument, or the metric was recorded before.
            MeasurementError: No work was seen, or more than 102 % of the hardware's peak.
        """
        if not callable(call):
            raise UsageError(f"gpu_benchmark needs a callable without arguments, not {type(call).__name__}.")
        work = _complete(call, work, self._mode)
        if metric is not None:
            _check_name(metric)
        if work.dtype is not None and work.dtype not in DTYPES:
            raise UsageError(f"dtype={work.dtype!r} is not known. Valid: {', '.join(sorted(DTYPES))}.")
        metric = metric or ("throughput" if work.flop else "bandwidth" if work.bytes_moved else "time")
        self._refuse_second(metric)
        allowed = self._tolerance if tolerance is None else parse_tolerance(tolerance)
        self._calls.add(metric)
        if self._profiler is not None:
            return self._profile(self._profiler, call, metric, work=work, clock=clock)
        with self._monitor() as monitor:
            timing = measure(
                call,
                stopwatch=self._stopwatch(),
                mode=work.mode,
                clock=clock,
                prefer=self._preferred.get(metric),
            )
        found = _measurement(metric, timing, work, self.devices[0], allowed, monitor.telemetry)
        return self._add(replace(found, configuration=self._configuration))

    def _profile(
        self, profiler: Profiler, call: Callable[[], object], metric: str, *, work: Work, clock: ClockName | None
    ) -> Measurement:
        """Profile in place of measuring: a look at the time stands for the value, and no peak is held against it."""
        timing, kernels = profile_as_measured(
            call,
            profiler=profiler,
            stopwatch=self._stopwatch(),
            mode=work.mode,
            clock=clock,
            prefer=self._preferred.get(metric),
            name=metric,
        )
        if kernels is not None:
            self.kernels[metric] = kernels
        return self._add(_measurement(metric, timing, work, None, None, Telemetry(duration_s=timing.value_s)))

    def record(  # noqa: PLR0913 - all but the first two are keywords
        self,
        metric: str,
        value: float,
        *,
        unit: str,
        better: Better | None = None,
        contradicts_unit: bool = False,
        tolerance: object = None,
        gpu_busy_share: float | None = None,
        kind: Kind | None = None,
        kernels: KernelSummary | None = None,
    ) -> Measurement:
        """Record an end-to-end metric that the test measured itself, with the telemetry of the last region that ended.

        Args:
            metric: Its name, unique within the test.
            value: A finite number above zero, in `unit`.
            unit: `tok/s`, `ms`, `GB/s`, `J/tok`, ...; kept in its base unit.
            better: Needed where the unit does not say whether more or less is better.
            contradicts_unit: Needed for a direction against the unit's own.
            tolerance: Largest slowdown accepted: `0.05` or `"5%"`.
            gpu_busy_share: Part of the time in which a kernel ran, 0 to 1. Below 0.9 the host was the limit: the
                verdict says so, and gates nothing that was so in the baseline too.
            kind: What the value depends on, if not on everything: selects the usual noise, such as that of `compute`
                for a time that the GPU took. Default: `end-to-end`, or `host` where the host was the limit.
            kernels: What ran in it, where the test has it profiled: `engine.profile(load).summary`. Kept beside the
                baseline, to say why the metric got slower if it does.

        Raises:
            UsageError: A wrong argument, or the metric was recorded before.
        """
        self._check_new(metric, unit)
        if kernels is not None and not isinstance(kernels, KernelSummary):
            raise UsageError(
                f"kernels={type(kernels).__name__} of {metric} is no KernelSummary. Write engine.profile(load).summary."
            )
        if (seen := kernels or self._kernels_of_region) is not None:
            self.kernels[metric] = seen
        self._profiles_itself |= kernels is not None
        if self._of_last_region is not None and not self.is_elsewhere:
            self._of_regions.add(metric)
        share = None if gpu_busy_share is None else _share(metric, gpu_busy_share)
        value_base, unit_base = _in_base(metric, value, unit)
        return self._add(
            Measurement(
                metric=metric,
                value=value_base,
                unit=unit_base,
                better=direction(unit, better=better, contradicts_unit=contradicts_unit),
                kind=_kind(metric, kind, share),
                method=Method(clock="wall", mode="recorded"),
                tolerance=self._tolerance if tolerance is None else parse_tolerance(tolerance),
                telemetry=self._of_last_region,
                configuration=self._configuration,
                gpu_busy_share=share,
            )
        )

    def record_curve(  # noqa: PLR0913 - all but the first two are keywords
        self,
        metric: str,
        points: Mapping[int, float],
        *,
        unit: str,
        x: str,
        end: str | None = None,
        better: Better | None = None,
        contradicts_unit: bool = False,
        tolerance: object = None,
        gpu_busy_share: float | None = None,
        kind: Kind | None = None,
    ) -> Measurement:
        """Record a metric at several sizes: one curve, one verdict.

        Args:
            metric: Its name, unique within the test.
            points: Size, a whole number above zero -> a finite number above zero, in `unit`.
            unit: See `record`.
            x: What the sizes are of, such as `batch size`.
            end: Why there is no larger size, such as `out of memory at 256`; `None` where all ran.
            better: See `record`.
            contradicts_unit: See `record`.
            tolerance: See `record`.
            gpu_busy_share: See `record`; of all sizes together.
            kind: See `record`.

        Raises:
            UsageError: A wrong argument, no point, or the metric was recorded before.

        >>> perf.record_curve("throughput", {1: 590, 8: 4193}, unit="tok/s", x="batch size")  # doctest: +SKIP
        """
        self._check_new(metric, unit)
        if not points:
            raise UsageError(f"The curve {metric!r} has no point{f': {end}' if end else ''}.")
        values = _values_by_size(metric, points, x, unit)
        share = None if gpu_busy_share is None else _share(metric, gpu_busy_share)
        return self._add(
            Measurement(
                metric=metric,
                value=geometric_mean(values.values()),
                unit=to_base(1.0, unit)[1],
                better=direction(unit, better=better, contradicts_unit=contradicts_unit),
                kind=_kind(metric, kind, share),
                method=Method(clock="wall", mode="curve"),
                tolerance=self._tolerance if tolerance is None else parse_tolerance(tolerance),
                telemetry=self._of_last_region,
                configuration={**(self._configuration or {}), "curve over": x},
                gpu_busy_share=share,
                curve=Curve(x=x, points=values, end=end),
            )
        )

    def _check_new(self, metric: str, unit: object) -> None:
        _check_name(metric)
        self._refuse_second(metric)
        if not isinstance(unit, str) or not unit.strip():
            raise UsageError(f"unit={unit!r} of {metric} is not a unit. Write 'tok/s', 'ms', '%', ...")

    @contextmanager
    def region(self, name: str = "region") -> Iterator[Region]:
        """Watch the devices during a `with` block, which begins and ends with all of their work done."""
        self._synchronize()
        monitor = self._monitor()
        with monitor, self._profiled(name) as found:
            yield Region(name, monitor)
            self._synchronize()
        self._of_last_region = monitor.telemetry
        self._kernels_of_region = found.summary

    def _profiled(self, name: str) -> AbstractContextManager[Found]:
        if self._profiler is None or self.is_elsewhere:
            return nullcontext(Found())
        return self._profiler.region(name)

    def add_foreign(self, measurement: Measurement) -> None:
        """Add what another tool measured in this test, such as pytest-benchmark's fixture."""
        self._refuse_second(measurement.metric)
        self._add(measurement)

    def _monitor(self) -> Monitor:
        return Monitor(self._nvml, self._uuids, vitals=self._vitals, foreign_memory_bytes=self._foreign_memory_bytes)

    def _refuse_second(self, metric: str) -> None:
        if any(known.metric == metric for known in self.measurements):
            raise UsageError(
                f"The metric {metric!r} was recorded twice in this test. Give the second one a name of its own: "
                "gpu_benchmark(..., metric=NAME) or perf.record(NAME, ...)."
            )

    def close(self) -> None:
        """Refuse what comes after the test's body: its verdict has been given."""
        self._is_closed = True

    def _add(self, measurement: Measurement) -> Measurement:
        if self._is_closed:
            raise UsageError(
                f"{measurement.metric} was recorded after the test's body had ended, so it cannot be judged. "
                "Record it in the test, not in a fixture after its yield."
            )
        self.measurements.append(measurement)
        return measurement


def _in_base(metric: str, value: object, unit: str) -> tuple[float, str]:
    """The value in its base unit, and that unit."""
    number = _number(value)
    if number is None:
        raise UsageError(f"{metric} = {value!r} is not a finite number above zero, so it cannot be judged.")
    base_value, base_unit = to_base(number, unit)
    if not (math.isfinite(base_value) and base_value > 0):
        raise UsageError(f"{metric} = {value!r} {unit} is not a finite number above zero in {base_unit}.")
    return base_value, base_unit


def _values_by_size(metric: str, points: Mapping[int, float], x: object, unit: str) -> dict[str, float]:
    """The values in their base unit, the smallest size first."""
    if not isinstance(x, str) or not x.strip():
        raise UsageError(f"x={x!r} of {metric} does not say what the sizes are of. Write 'batch size', 'tokens', ...")
    if wrong := [size for size in points if not _is_size(size)]:
        raise UsageError(f"{x} {wrong[0]!r} of {metric} is not a whole number above zero.")
    return {str(int(size)): _in_base(f"{metric} at {x} {size}", points[size], unit)[0] for size in sorted(points)}


def _kind(metric: str, given: Kind | None, gpu_busy_share: float | None) -> Kind:
    if given is not None and given not in get_args(Kind):
        raise UsageError(f"kind={given!r} of {metric} does not exist. Valid: {', '.join(get_args(Kind))}.")
    return given or ("host" if is_host_limited(gpu_busy_share) else "end-to-end")


def _share(metric: str, gpu_busy_share: object) -> float:
    number = 0.0 if gpu_busy_share == 0 else _number(gpu_busy_share)
    if number is None or number > 1:
        raise UsageError(f"gpu_busy_share={gpu_busy_share!r} of {metric} is not a share from 0 to 1.")
    return number


def _is_size(size: object) -> bool:
    """Whether this is a whole number above zero, numpy's too."""
    return not isinstance(size, bool) and isinstance(size, Integral) and int(size) > 0


def _check_name(metric: object) -> None:
    if not isinstance(metric, str) or not metric.strip():
        raise UsageError(f"The name of a metric is text, not {metric!r}.")


def _complete(call: object, work: Work, mode: Mode | None) -> Work:
    """Fill in what a workload knows about itself; arguments and the marker win."""
    own = call if isinstance(call, Workload) else None
    return Work(
        kind=work.kind or (own.kind if own else None),
        mode=work.mode or mode or (own.mode if own else None),
        flop=_amount("flops", own.flop if own and work.flop is None else work.flop),
        bytes_moved=_amount("bytes", own.bytes_moved if own and work.bytes_moved is None else work.bytes_moved),
        dtype=work.dtype or (own.dtype if own else None),
    )


def _amount(name: str, amount: object) -> float | None:
    number = _number(amount)
    if amount is not None and number is None:
        raise UsageError(f"{name}={amount!r} is not a finite number above zero.")
    return number


def _number(value: object) -> float | None:
    """A finite number above zero as a float, numpy's numbers too, which are no JSON; `None` for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float holds
        return None
    return number if math.isfinite(number) and number > 0 else None


def _measurement(
    metric: str, timing: Timing, work: Work, device: Device | None, tolerance: float | None, telemetry: Telemetry
) -> Measurement:
    """Turn a time into the metric that people speak of: FLOP/s, B/s, or the time itself; no device, no peak."""
    amount = work.flop or work.bytes_moved
    unit = "FLOP/s" if work.flop else "B/s" if work.bytes_moved else "s"
    # a plain time may be a matrix product's, whose noise between GPUs is the larger
    kind: Kind = work.kind or ("memory" if work.bytes_moved and not work.flop else "compute")
    peak = _peak(unit, kind, work.dtype, device) if device else None
    measurement = Measurement(
        metric=metric,
        value=amount / timing.value_s if amount else timing.value_s,
        unit=unit,
        better="higher" if amount else "lower",
        kind=kind,
        method=timing.method,
        tolerance=tolerance,
        samples_s=timing.samples_s,
        calls_per_sample=timing.calls_per_sample,
        flop=work.flop,
        bytes_moved=work.bytes_moved,
        peak=peak,
        is_peak_computed=bool(peak is not None and device and device.is_peak_computed),
        lacks_dtype=bool(work.flop and not work.dtype and device and device.peak_flops_per_s),
        spread=timing.spread,
        unstable=timing.unstable,
        telemetry=telemetry,
    )
    if device is not None:
        _refuse_over_peak(measurement, device)
    return measurement


def _peak(unit: str, kind: Kind, dtype: str | None, device: Device) -> float | None:
    if unit == "FLOP/s":
        return device.peak_flops_per_s.get(dtype) if dtype else None
    if unit == "B/s":
        return device.pcie_bandwidth_bytes_per_s if kind in ("transfer", "host") else device.peak_bandwidth_bytes_per_s
    return None


def _refuse_over_peak(measurement: Measurement, device: Device) -> None:
    fraction = measurement.fraction_of_peak
    if fraction is None or fraction <= OVER_PEAK:
        return
    raise MeasurementError(
        f"{measurement.metric} is {format_value(measurement.value, measurement.unit)}, "
        f"{format_percent(fraction)} of the peak of {device.name} "
        f"({format_value(measurement.peak or 0.0, measurement.unit)}): more than the hardware can do. "
        "Likely causes: the work is counted wrong, the result is cached or never used, or the data fit in the cache."
    )


def without_frames_of(error: BaseException, package_folder: str) -> TracebackType | None:
    """The error's traceback without the frames of this package, so that a user sees their own code alone."""
    kept: list[TracebackType] = []
    traceback = error.__traceback__
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(package_folder):
            kept.append(traceback)
        traceback = traceback.tb_next
    chain: TracebackType | None = None
    for item in reversed(kept):
        chain = TracebackType(chain, item.tb_frame, item.tb_lasti, item.tb_lineno)
    return chain
