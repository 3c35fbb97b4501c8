"""What was published for a model on a GPU: places a result that has no baseline."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec

from pytest_gpuperf.analysis.gpu_kinds import is_kind
from pytest_gpuperf.records import Hardware, Measurement, Record, TestRecord
from pytest_gpuperf.units import format_value, to_base
from pytest_gpuperf.workloads.models import preset_of

#: A single published figure is an "about": this much beyond it is still as published. The choice is ours.
ABOUT = 0.10


class Expectation(Record, frozen=True, kw_only=True):
    """One published figure.

    Attributes:
        gpu: Kind of GPU: see `gpu_kinds.is_kind`.
        count: How many; `None`: it was not published.
        model: Name of a preset.
        metric: Name of the metric that it is to be compared with.
        unit: Of `low` and `high`, as it was published.
        low: Lower end.
        high: Upper end; the same for a single figure.
        source: Where it is from.
        conditions: How it was measured, such as `batch 16, tuned`.
        size: Requests at once; the point of a curve that it belongs to.
        note: What to know about it.
    """

    gpu: str
    count: int | None
    model: str
    metric: str
    unit: str
    low: float
    high: float
    source: str
    conditions: str = ""
    size: int | None = None
    note: str = ""

    @property
    def base_unit(self) -> str:
        """The unit that measurements are kept in."""
        return to_base(1.0, self.unit)[1]

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end in the base unit."""
        return to_base(self.low, self.unit)[0], to_base(self.high, self.unit)[0]

    def __str__(self) -> str:
        figure = f"~{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        figure = f"{figure} {self.unit}"
        return f"{figure}, {self.conditions}" if self.conditions else figure


class _Table(Record, frozen=True, kw_only=True):
    schema: int
    expectations: tuple[Expectation, ...]


class Placed(Record, frozen=True, kw_only=True):
    """A value beside what was published.

    Attributes:
        expectation: What was published.
        value: What was measured, in the base unit; of a curve, at the expectation's size.
        ratio: How much better the value is than the nearer end; 1 within the range. 2 is twice as good, 0.5 half.
    """

    expectation: Expectation
    value: float
    ratio: float

    @property
    def is_as_published(self) -> bool:
        """Whether the value is within the range, or about the single figure."""
        row = self.expectation
        slack = ABOUT if row.low == row.high else 0.0
        return row.ends[0] * (1 - slack) <= self.value <= row.ends[1] * (1 + slack)

    @property
    def is_worse(self) -> bool:
        """Whether the value is worse than what was published."""
        return self.ratio < 1 and not self.is_as_published


@cache
def load_expectations() -> tuple[Expectation, ...]:
    """Read the packaged figures, once."""
    text = files("pytest_gpuperf").joinpath("data", "expectations.json").read_bytes()
    return msgspec.json.decode(text, type=_Table).expectations


def find(model: str, gpu: str, metric: str, *, count: int = 1) -> tuple[Expectation, ...]:
    """Look up what was published.

    Args:
        model: A preset's name, a hub id of its shape, or a folder named like one.
        gpu: Name of the device, as NVML gives it.
        metric: Name of the metric; capitals, `_` and `-` do not matter.
        count: How many GPUs.
    """
    return tuple(
        one
        for one in load_expectations()
        if one.model == _preset(model)
        and _plain(one.metric) == _plain(metric)
        and one.count in (None, count)
        and is_kind(gpu, one.gpu)
    )


def place(measurement: Measurement, hardware: Hardware) -> tuple[Placed, ...]:
    """Put a measurement beside what was published for its model, as `configuration` names it, on this kind of GPU.

    A curve is compared at the sizes that something was published for.
    """
    model = (measurement.configuration or {}).get("model")
    if model is None:
        return ()
    rows = find(model, hardware.name, measurement.metric, count=hardware.count)
    values = [(one, _value(measurement, one)) for one in rows if one.base_unit == measurement.unit]
    return tuple(
        Placed(expectation=one, value=value, ratio=_ratio(value, one, measurement))
        for one, value in values
        if value is not None
    )


def worse_than_all(placed: Sequence[Placed]) -> tuple[Placed, ...]:
    """Those whose value is worse than everything published that it was put beside."""
    hopeful = {one.value for one in placed if not one.is_worse}
    return tuple(one for one in placed if one.value not in hopeful)


def shortfall(record: TestRecord) -> str | None:
    """Say which metrics without a baseline are worse than everything that was published; `None` if there are none."""
    rows = []
    for verdict in record.verdicts:
        if verdict.status == "NEW":
            measurement = next(m for m in record.measurements if m.metric == verdict.metric)
            worse = worse_than_all(place(measurement, record.environment.hardware))
            rows += [f"  {text}" for text in in_words(worse, measurement)]
    if not rows:
        return None
    end = "  There is no baseline yet, and --gpuperf-expectations fail asks for what was published."
    return "\n".join([f"{record.key.test} on {record.environment.hardware.name} is worse than published:", *rows, end])


def in_words(placed: Sequence[Placed], measurement: Measurement) -> list[str]:
    """One text for each value, such as one point of a curve, with all that was published beside it.

    Like `throughput 580.0 tok/s; published for A100: ~42 tok/s, single request, default (14 x)`.
    """
    groups: dict[tuple[float, int | None], list[Placed]] = {}
    for one in placed:
        groups.setdefault((one.value, one.expectation.size if measurement.curve else None), []).append(one)
    return [_in_words(group, measurement) for group in groups.values()]


def _in_words(placed: Sequence[Placed], measurement: Measurement) -> str:
    row = placed[0].expectation
    count = "" if row.count == 1 else f"{row.count} x " if row.count else "some "
    size = f" at {measurement.curve.x} {row.size}" if measurement.curve else ""
    value = format_value(placed[0].value, measurement.unit)
    published = "; ".join(f"{one.expectation} ({_where(one)})" for one in placed)
    return f"{measurement.metric}{size} {value}; published for {count}{row.gpu}: {published}"


def _where(placed: Placed) -> str:
    return "as published" if placed.is_as_published else f"{placed.ratio:.2g} x"


def _value(measurement: Measurement, row: Expectation) -> float | None:
    """The measurement's value that a row is about."""
    if measurement.curve is None:
        return measurement.value
    return measurement.curve.points.get(str(row.size))


def _ratio(value: float, row: Expectation, measurement: Measurement) -> float:
    low, high = row.ends
    if low <= value <= high:
        return 1.0
    end = low if value < low else high
    return end / value if measurement.better == "lower" else value / end


def _preset(model: str) -> str | None:
    found = preset_of(model) or preset_of(Path(model).name)
    return found.name if found else None


def _plain(metric: str) -> str:
    return metric.casefold().replace("_", " ").replace("-", " ").strip()
