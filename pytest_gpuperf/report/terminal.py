"""What a user reads: the table after a run, the message of a test that got slower, and the notes below."""

import itertools
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.environment import version_differences
from pytest_gpuperf.judge import ENOUGH_SESSIONS, tolerance_warning
from pytest_gpuperf.records import (
    Environment,
    Measurement,
    MetricBaseline,
    Record,
    Status,
    Telemetry,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.stats import mean_of_known
from pytest_gpuperf.units import format_percent, format_value, is_of_time

Colour = Literal["red", "green", "yellow", "cyan"]
_COLOURS: dict[str, Colour] = {
    "PASS": "green",
    "REGRESSED": "red",
    "IMPROVED": "cyan",
    "INCONCLUSIVE": "yellow",
    "INVALID": "yellow",
    "INCOMPARABLE": "yellow",
    "NEW": "cyan",
}


class Line(Record, frozen=True, kw_only=True):
    """One line of output, with its colour."""

    text: str
    colour: Colour | None = None


def command(name: str = "gpuperf") -> str:
    """The command as the user can type it here: by name if it is on the PATH, else by its path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.exists() or (found and Path(found).samefile(beside)):
        return name
    return os.path.relpath(beside)


def baseline_command(action: str, baselines_root: Path, results: Path) -> str:
    """`gpuperf baseline ACTION` as it works from the current folder, with the options that differ from the defaults."""
    options = ""
    for name, path, default in (
        ("baselines", baselines_root, Path("baselines")),
        ("results", results, Path(".gpuperf/results.jsonl")),
    ):
        if path != default.absolute():
            options += f" --{name} {shlex.quote(os.path.relpath(path))}"
    return f"{command()} baseline {action}{options}"


def table(records: Sequence[TestRecord], *, width: int = 80) -> list[Line]:
    """One row a metric, grouped by test function; reads well from 80 columns on.

    Columns: value, share of the hardware's peak, baseline, change (+ is slower) with half its 95 % interval, smallest
    slowdown that this test can see, verdict.
    """
    longest = max((len(_label(record, v.metric)) for record in records for v in record.verdicts), default=0)
    verdict_width = max([7, *(len(_status(v)) for record in records for v in record.verdicts)])
    name_width = min(max(longest, 12), max(width - 53 - verdict_width, 11))  # 53: the columns in between
    lines = [Line(text=_row(name_width, "", "value", "peak", "baseline", "change", "sees", "verdict"))]
    functions: dict[str, list[TestRecord]] = {}  # workers finish in any order
    for record in records:
        functions.setdefault(f"{record.key.module}::{record.key.test.split('[')[0]}", []).append(record)
    for function, group in functions.items():
        lines.append(Line(text=function))
        for record in group:
            lines += _rows_of(record, name_width, width)
    return lines


def _rows_of(record: TestRecord, name_width: int, width: int) -> list[Line]:
    """A row a metric, with its remark below; one that several rows in turn share stands below the last."""
    by_metric = {measurement.metric: measurement for measurement in record.measurements}
    lines: list[Line] = []
    for verdict, following in itertools.zip_longest(record.verdicts, record.verdicts[1:]):
        label = _label(record, verdict.metric)
        if len(label) > name_width:  # cut, two names could look the same
            lines.append(Line(text=f" {_fitted(label, width - 1)}"))
            label = ""
        lines.append(_verdict_row(label, name_width, _shown(by_metric[verdict.metric], verdict, record), verdict))
        if verdict.remark and (following is None or following.remark != verdict.remark):
            lines += [Line(text=f"  {text}") for text in textwrap.wrap(verdict.remark, width - 2)]
    return lines


def _shown(measurement: Measurement, verdict: Verdict, record: TestRecord) -> Measurement:
    """The measurement with the value that the verdict is about: the mean of the fresh processes, if there are any."""
    is_other = record.more or measurement.curve  # a curve is compared at the sizes that the baseline has too
    return replace(measurement, value=verdict.value) if verdict.value is not None and is_other else measurement


def _label(record: TestRecord, metric: str) -> str:
    parameters = record.key.test.partition("[")[2].removesuffix("]")
    if len(record.measurements) == 1 and parameters:
        return parameters
    return f"{parameters} {metric}".strip()


def _fitted(text: str, width: int) -> str:
    """The text, cut in the middle if it is wider than the terminal."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"


def _verdict_row(label: str, name_width: int, measurement: Measurement, verdict: Verdict) -> Line:
    unstable = "~" if measurement.unstable else ""
    fraction = measurement.fraction_of_peak
    text = _row(
        name_width,
        label,
        unstable + format_value(measurement.value, measurement.unit),
        "-" if fraction is None else f"{fraction * 100:.0f} %",
        _baseline_number(measurement, verdict),
        _change(verdict),
        "-" if verdict.minimum_detectable_effect is None else format_percent(verdict.minimum_detectable_effect),
        _status(verdict),
    )
    return Line(text=text, colour=_COLOURS[verdict.status])


def _status(verdict: Verdict) -> str:
    if verdict.is_host_limited:
        return f"{verdict.status} host"
    return verdict.status + (" low power" if verdict.is_low_power else "")


def _row(name_width: int, *cells: str) -> str:
    name, value, peak, baseline, change, sees, verdict = cells
    return f" {name:<{name_width}} {value:>14} {peak:>5} {baseline:>8} {change:>12} {sees:>6}  {verdict}".rstrip()


def _baseline_number(measurement: Measurement, verdict: Verdict) -> str:
    """The baseline in the unit of the value beside it, so that the two can be read against each other."""
    if verdict.baseline_value is None:
        return "-"
    shown_value, shown_unit = format_value(measurement.value, measurement.unit).rsplit(" ", 1)
    shown, unit = format_value(verdict.baseline_value, measurement.unit).rsplit(" ", 1)
    if unit == shown_unit:
        return shown
    scale = measurement.value / float(shown_value)
    return f"{verdict.baseline_value / scale:.4g}"


def _change(verdict: Verdict) -> str:
    if verdict.change is None or verdict.change_high is None or verdict.change_low is None:
        return "-"
    half = (verdict.change_high - verdict.change_low) / 2
    decimals = 2 if half < 0.001 else 1 if half < 0.1 else 0
    percent = round(verdict.change * 100, decimals) + 0.0  # no negative zero
    return f"{percent:+.{decimals}f} ±{half * 100:.{decimals}f} %"


def regression_message(
    record: TestRecord, verdict: Verdict, baseline: MetricBaseline, then: Environment | None, *, accept: str
) -> str:
    """Say in at most a dozen lines what got slower and why, by how much, what the GPU did, and how to accept it.

    Args:
        record: The test.
        verdict: A REGRESSED one of it.
        baseline: What it was compared with.
        then: Environment of the baseline's last session.
        accept: Command that accepts the value, up to the test.
    """
    measurement = next(m for m in record.measurements if m.metric == verdict.metric)
    measurement = _shown(measurement, verdict, record)
    confirmed = f", mean of {len(record.more)} fresh processes" if len(record.more) > 1 else ""
    differences = version_differences(record.environment.versions, then.versions) if then else ()
    unit = measurement.unit
    slower = "slower" if is_of_time(unit) else "worse"
    how = f"{slower} by {_interval(verdict)}, tolerance {format_percent(verdict.tolerance)}"
    if measurement.curve:  # one size, or an end that came early, may be what is slower
        how = verdict.reason.rstrip(".")
    rows = [
        ": ".join((f"{record.key.test} got {slower} on {record.environment.hardware.name}", *verdict.causes[:1])),
        *(f"  and: {cause}" for cause in verdict.causes[1:]),
        f"  {measurement.metric}: {format_value(measurement.value, unit)}, baseline {_of_baseline(verdict, unit)}",
        f"  {how}{confirmed}",
        f"  {_then_and_now(measurement.telemetry, baseline)}",
        f"  differs from the baseline: {'; '.join(differences) or 'nothing that is recorded'}",
    ]
    others = [v for v in record.verdicts if v.status == "REGRESSED" and v.metric != verdict.metric]
    if others:
        rows.append(
            f"  also {slower}: " + "; ".join(f"{v.metric} by {format_percent(v.change or 0.0)}" for v in others)
        )
    if verdict.remark:
        rows.append(f"  {verdict.remark}")
    if measurement.unstable:
        rows.append(f"  unstable: {measurement.unstable}")
    rows.append(f"  accept it: {accept} --reason WHY {shlex.quote(str(record.key))}")
    return "\n".join(rows)


def _of_baseline(verdict: Verdict, unit: str) -> str:
    return format_value(verdict.baseline_value or 0.0, unit)


def _interval(verdict: Verdict) -> str:
    """`5.0 %, 95 % interval 3.8 % to 6.2 %`."""
    change, low, high = verdict.change or 0.0, verdict.change_low or 0.0, verdict.change_high or 0.0
    return f"{format_percent(change)}, 95 % interval {format_percent(low)} to {format_percent(high)}"


def _then_and_now(telemetry: Telemetry | None, baseline: MetricBaseline) -> str:
    """Clock and power of this run and of the baseline's runs."""
    clock_mhz = mean_of_known(run.sm_clock_mhz for run in baseline.runs)
    power_w = mean_of_known(run.power_w for run in baseline.runs)
    if telemetry is None or (telemetry.sm_clock_mhz is None and telemetry.power_w is None):
        return "clocks and power: not measured on this device"
    then_clock = "" if clock_mhz is None else f", baseline {clock_mhz:.0f} MHz"
    then_power = "" if power_w is None else f", baseline {power_w:.0f} W"
    cap = telemetry.power_cap_share
    capped = f"; power-capped {format_percent(cap)} of the time" if cap else ""
    clock = "SM clock not known" if telemetry.sm_clock_mhz is None else f"SM clock {telemetry.sm_clock_mhz:.0f} MHz"
    power = "power not known" if telemetry.power_w is None else f"power {telemetry.power_w:.0f} W"
    return f"{clock}{then_clock}; {power}{then_power}{capped}"


def notes(records: Sequence[TestRecord], *, record_command: str | None, silent: Collection[Status] = ()) -> list[Line]:
    """What the table cannot say: how many were compared, what to do next, which numbers to doubt.

    Args:
        records: Of a run.
        record_command: What records new metrics as baselines; `None` where that is being done.
        silent: Verdicts that are not explained, because the options say to let them pass.
    """
    pairs = [(record, verdict) for record in records for verdict in record.verdicts]
    compared = [v for _, v in pairs if v.status in ("PASS", "REGRESSED", "IMPROVED", "INCONCLUSIVE")]
    new = [v for _, v in pairs if v.status == "NEW"]
    lines: list[Line] = []
    if not compared:
        lines.append(Line(text=f"Nothing was compared: {_tally(pairs)}.", colour="yellow"))
    else:
        lines.append(Line(text=f"{len(compared)} of {len(pairs)} metrics compared: {_tally(pairs)}."))
    if new and record_command:
        lines.append(Line(text=f"Record the new ones as baselines:  {record_command}", colour="cyan"))
    if any(v.is_provisional for v in compared):
        lines.append(
            Line(
                text="Provisional baselines (under 5 sessions): the usual noise of such metrics decides, not their own."
            )
        )
    explained = {"INCONCLUSIVE", "INVALID", "INCOMPARABLE"} - set(silent)
    lines += _details([(record, v) for record, v in pairs if v.status in explained])
    lines += _doubts(records)
    lines += _drifts(pairs)
    return lines


def _drifts(pairs: Sequence[tuple[TestRecord, Verdict]]) -> list[Line]:
    """Metrics that went slower in small steps, each of which passed: half the tolerance is gone, and not by chance."""
    drifted = sorted(
        ((v.drift, record, v) for record, v in pairs if v.drift is not None and _is_drifting(v)),
        key=lambda found: -found[0] / found[2].tolerance,
    )
    lines = [
        Line(
            text=f"Drift {record.key.test} {v.metric}: {format_percent(drift, signed=True)} since this epoch's first "
            f"{ENOUGH_SESSIONS} sessions, tolerance {format_percent(v.tolerance)}.",
            colour="yellow",
        )
        for drift, record, v in drifted[:3]
    ]
    if drifted:
        more = f"{len(drifted) - 3} more metrics drifted. " if len(drifted) > 3 else ""
        lines.append(Line(text=f"{more}See how far, and since when:  {command()} baseline drift", colour="yellow"))
    return lines


def _is_drifting(verdict: Verdict) -> bool:
    if verdict.drift is None or verdict.change is None or verdict.change_high is None:
        return False
    is_told = verdict.status == "REGRESSED"  # in red already
    # The start of the epoch is known less well than the whole of it, but not by much: 5 sessions against 6 to 20.
    noise = verdict.change_high - verdict.change
    return not is_told and verdict.drift > max(verdict.tolerance / 2, noise)


def _tally(pairs: Sequence[tuple[TestRecord, Verdict]]) -> str:
    statuses = [verdict.status for _, verdict in pairs]
    return ", ".join(f"{statuses.count(status)} {status}" for status in _COLOURS if status in statuses)


def _details(pairs: Sequence[tuple[TestRecord, Verdict]]) -> list[Line]:
    """A line for each, but one for many of the same reason."""
    groups: dict[tuple[Status, str], list[Line]] = {}
    for record, verdict in pairs:
        groups.setdefault((verdict.status, verdict.reason), []).append(_detail(record, verdict))
    lines: list[Line] = []
    for (status, reason), group in groups.items():
        many = Line(text=f"{status} {len(group)} metrics: {reason}", colour="yellow")
        lines += [many] if len(group) > 3 else group
    return lines


def _detail(record: TestRecord, verdict: Verdict) -> Line:
    return Line(text=f"{verdict.status} {record.key.test} {verdict.metric}: {verdict.reason}", colour="yellow")


def _doubts(records: Sequence[TestRecord]) -> list[Line]:
    lines: list[Line] = []
    measurements = [(record, m) for record in records for m in record.measurements]
    unstable = [(record, m) for record, m in measurements if m.unstable]
    lines += [
        Line(text=f"~ unstable {record.key.test} {m.metric}: {m.unstable}", colour="yellow")
        for record, m in unstable[:5]
    ]
    if len(unstable) > 5:
        lines.append(Line(text=f"~ unstable: {len(unstable) - 5} more, in the results file", colour="yellow"))
    if any((m.flop or m.bytes_moved) and m.peak is None for _, m in measurements):
        lines.append(
            Line(text="No peak is known for some of these: floors given as a share of the peak were not checked.")
        )
    if any(m.is_peak_computed for _, m in measurements):
        lines.append(Line(text="Peaks are computed upper bounds (clock and SM count): this GPU is not in the table."))
    warnings = sorted(
        {
            f"{record.key.test} {text}"
            for record in records
            for v in record.verdicts
            if not v.is_host_limited and (text := tolerance_warning(v))
        }
    )
    lines += [Line(text=warning, colour="yellow") for warning in warnings[:3]]
    if len(warnings) > 3:
        lines.append(Line(text=f"{len(warnings) - 3} more tolerances are far from what noise allows.", colour="yellow"))
    return lines
