"""pytest-benchmark 5: our measurements in its JSON, its fixture's measurements judged against our baselines."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest

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


def add_gpus(machine_info: dict[str, Any], machine: Machine) -> None:
    """Add `gpus`, `driver` and `cuda` to pytest-benchmark's `machine_info`: none, null and why without a GPU."""
    nvml = machine.nvml
    problem = machine.problem
    if problem:
        machine_info["gpu_problem"] = problem
    machine_info["gpus"] = [] if problem else [gpu.name for gpu in machine.gpus]
    machine_info["driver"] = nvml.driver_version() if nvml else None
    machine_info["cuda"] = nvml.cuda_version() if nvml else None


def measurement_of(fixture: object, *, tolerance: float | None) -> Measurement | None:
    """What the `benchmark` fixture measured in a test: the median of its rounds, in seconds per call.

    `None` if the fixture is another plugin's, was not called, or is switched off, as it is under pytest-xdist. It times
    on the host: a callable that starts GPU work has to wait for it.
    """
    if not type(fixture).__module__.startswith("pytest_benchmark"):
        return None
    metadata = vars(fixture).get("stats")  # set by the fixture when it has run
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
        tolerance=tolerance,
        samples_s=rounds_s,
        calls_per_sample=int(metadata.iterations),
        spread=relative_half_width(median_interval(rounds_s)) if len(rounds_s) > 1 else None,
    )


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
