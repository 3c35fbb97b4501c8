"""pytest-benchmark 5: our measurements in its JSON, its fixture's measurements judged against our baselines."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from pytest_gpuperf.errors import DeviceError
from pytest_gpuperf.machine import Machine
from pytest_gpuperf.records import Measurement, Method, TestRecord
from pytest_gpuperf.stats import median_interval, relative_half_width

#: Metric under which a test's `benchmark` fixture is judged.
METRIC = "benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What pytest-benchmark's `Metadata` wants to know about the fixture that measured."""

    name: str
    fullname: str
    param: str | None
    group: str | None = None
    params: dict[str, object] | None = None
    extra_info: dict[str, object] = field(default_factory=dict)
    cprofile_stats: None = None
    has_error: bool = False


class MachineInfo:
    """Hook that names GPU, driver and CUDA in pytest-benchmark's `machine_info`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def pytest_benchmark_update_machine_info(self, machine_info: dict[str, Any]) -> None:
        """Add `gpus`, `driver` and `cuda`; without a GPU they say so."""
        try:
            gpus = self._machine.gpus
        except DeviceError:
            gpus = ()
        nvml = self._machine.nvml
        machine_info["gpus"] = [gpu.name for gpu in gpus]
        machine_info["driver"] = nvml.driver_version() if nvml else None
        machine_info["cuda"] = nvml.cuda_version() if nvml else None


def measurement_of(item: pytest.Function) -> Measurement | None:
    """What the `benchmark` fixture measured in a test: the median of its rounds, in seconds per call.

    `None` if the test did not use it, or it is switched off, as it is under pytest-xdist. It times on the host: a
    callable that starts GPU work has to wait for it.
    """
    fixture = item.funcargs.get("benchmark")
    if fixture is None or not type(fixture).__module__.startswith("pytest_benchmark"):
        return None
    metadata = getattr(fixture, "stats", None)  # set by the fixture when it has run
    if not metadata:
        return None
    rounds_s = tuple(float(duration_s) for duration_s in metadata.stats.data)
    return Measurement(
        metric=METRIC,
        value=statistics.median(rounds_s),
        unit="s",
        better="lower",
        kind="end-to-end",
        method=Method(clock="wall", mode="recorded"),
        samples_s=rounds_s,
        calls_per_sample=int(metadata.iterations),
        spread=relative_half_width(median_interval(rounds_s)) if len(rounds_s) > 1 else None,
    )


def with_tolerance(measurement: Measurement, tolerance: float | None) -> Measurement:
    """The measurement with the tolerance of the test's `perf` marker."""
    return msgspec.structs.replace(measurement, tolerance=tolerance)


def export(config: pytest.Config, record: TestRecord) -> None:
    """Hand a test's measurements to pytest-benchmark's session, if that will write or compare them.

    Works under pytest-xdist too, where pytest-benchmark's own fixture is switched off.
    """
    session = config.__dict__.get("_benchmarksession")  # absent with -p no:benchmark
    if session is None or not (session.json or session.save or session.autosave or session.compare):
        return
    from pytest_benchmark.stats import Metadata

    for measurement in record.measurements:
        seconds = measurement.samples_s or ((measurement.time_s,) if measurement.time_s else ())
        if measurement.metric == METRIC or not seconds:
            continue
        method = {"clock": measurement.method.clock, "mode": measurement.method.mode}
        metadata: Any = Metadata(  # type: ignore[no-untyped-call]
            _source(record, measurement), measurement.calls_per_sample, method
        )
        for call_s in seconds:
            metadata.stats.update(call_s)
        session.benchmarks.append(metadata)


def _source(record: TestRecord, measurement: Measurement) -> _Source:
    suffix = f"::{measurement.metric}" if len(record.measurements) > 1 else ""
    hardware = record.environment.hardware
    return _Source(
        name=record.key.test + suffix,
        fullname=str(record.key) + suffix,
        param=record.key.test.partition("[")[2].removesuffix("]") or None,
        extra_info={
            "metric": measurement.metric,
            "value": measurement.value,
            "unit": measurement.unit,
            "device": hardware.name,
            **{f"{name}_version": version for name, version in record.environment.versions.items()},
        },
    )
