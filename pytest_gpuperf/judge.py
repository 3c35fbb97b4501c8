"""Is it slower than the baseline? One pure function from measurements and accepted sessions to a verdict.

The logarithms of the current runs are averaged and compared with what the baseline predicts for this physical device.
The difference d has a standard error se that counts the noise between runs, between sessions and between GPUs, and a
Student t distribution. With the margin m = log(1 + tolerance):

    REGRESSED   d > m and d - t se > 0      more than the tolerance, and not by chance
    IMPROVED    d < -m and d + t se < 0
    PASS        d + t(95 %) se < m          surely less than the tolerance
                d < m, if t(95 %) se >= m   the noise leaves no room for more: `is_low_power`
    INCONCLUSIVE otherwise

One false REGRESSED in a thousand is allowed, over all looks together, so each look has a third of that.

How confirm.py plugs in: on INCONCLUSIVE it measures in fresh processes until LOOKS says, and calls `judge` again with
all the runs so far, of the same session, and the next `look`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Kind,
    Measurement,
    MetricBaseline,
    Record,
    Session,
    Status,
    Verdict,
)
from pytest_gpuperf.stats import SessionLogs, VarianceComponents, predict, t_quantile, variance_components
from pytest_gpuperf.units import Better, format_percent, format_value

#: Runs judged at the first, second and third look.
LOOKS = (1, 3, 6)
#: Chance of a false REGRESSED over all looks.
ALPHA = 0.001
#: Sessions below which a baseline is provisional.
ENOUGH_SESSIONS = 5
#: What a prior is worth. With it, 5 sessions of a quiet kernel show a slowdown of 5 % with probability 0.99, without it
#: 0.44 (simulated at an alpha of 0.001, noise 0.7 % between sessions and 0.3 % between runs).
PRIOR_DEGREES_OF_FREEDOM = 10.0

_ALPHA_OF_A_LOOK = ALPHA / len(LOOKS)
_CONFIDENCE = 0.95
_POWER = 0.8
_TIME_UNITS = ("s", "s/tok", "s/req")


class Prior(Record, frozen=True, kw_only=True):
    """Noise to expect of a kind of metric, as relative standard deviations, and its default tolerance.

    Attributes:
        within: Between runs of one session.
        session: Between sessions on one physical device.
        device: Between physical devices of one model.
        floor: Least deviation between sessions that is believed.
        tolerance: Largest slowdown accepted where the test says nothing.
        source: Where the figures come from.
    """

    within: float
    session: float
    device: float
    floor: float
    tolerance: float
    source: str

    @property
    def variances(self) -> VarianceComponents:
        """The same as variances of the logarithm."""
        return VarianceComponents(
            within=self.within**2,
            session=self.session**2,
            device=self.device**2,
            degrees_of_freedom=PRIOR_DEGREES_OF_FREEDOM,
        )


_H100S = "six H100s of different machines, 2026-11; ten processes each on four of them"
_PINNED = "pinned copies on six H100s of different machines, 2026-11"
_PAGEABLE = "pageable copies on six machines with an H100, 2026-11"
_ASSUMED = "assumed, not yet measured"
_SHARED_CPU = "a shared virtual machine with two cores, 2026-11"

PRIORS: Mapping[Kind | Literal["cpu"], Prior] = {
    "memory": Prior(within=0.0005, session=0.0005, device=0.0005, floor=0.0005, tolerance=0.03, source=_H100S),
    "compute": Prior(within=0.0035, session=0.003, device=0.01, floor=0.0005, tolerance=0.03, source=_H100S),
    "transfer": Prior(within=0.003, session=0.005, device=0.005, floor=0.0005, tolerance=0.05, source=_PINNED),
    "host": Prior(within=0.05, session=0.05, device=0.05, floor=0.005, tolerance=0.20, source=_PAGEABLE),
    "end-to-end": Prior(within=0.015, session=0.02, device=0.02, floor=0.005, tolerance=0.05, source=_ASSUMED),
    "cpu": Prior(within=0.03, session=0.05, device=0.05, floor=0.005, tolerance=0.10, source=_SHARED_CPU),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    difference: float  # of logarithms; + is worse
    expected_log: float
    standard_error: float
    degrees_of_freedom: float

    def margin_of_error(self, probability: float) -> float:
        return t_quantile(probability, self.degrees_of_freedom) * self.standard_error

    def change_at(self, probability: float) -> float:
        return math.expm1(self.difference + self.margin_of_error(probability))

    def is_too_noisy(self, margin: float) -> bool:
        return self.margin_of_error(_CONFIDENCE) >= margin

    @property
    def minimum_detectable_effect(self) -> float:
        return math.expm1(self.margin_of_error(1 - _ALPHA_OF_A_LOOK) + self.margin_of_error(_POWER))

    def in_words(self, unit: str) -> str:
        low, change, high = (self.change_at(probability) for probability in (0.025, 0.5, 0.975))
        worse, better = ("slower", "faster") if unit in _TIME_UNITS or unit.endswith("/s") else ("worse", "better")
        if change < 0:
            low, change, high, worse = -high, -change, -low, better
        return f"{format_percent(change)} {worse} ({format_percent(low)} to {format_percent(high)})"


def prior_of(kind: Kind, *, is_cpu: bool) -> Prior:
    """Return the noise to expect of a kind of metric, on a GPU or by wall clock on a CPU."""
    return PRIORS["cpu" if is_cpu else kind]


def judge(  # noqa: PLR0913 - all that a verdict depends on is an argument, so that old results can be judged again
    measurements: Sequence[Measurement],
    baseline: MetricBaseline | None,
    *,
    environments: Mapping[str, Environment],
    environment: Environment,
    devices: tuple[str, ...],
    visit: str | None = None,
    is_cpu: bool,
    health: str | None = None,
    look: int = 1,
) -> Verdict:
    """Compare the current runs of one metric with the sessions accepted as good.

    Changes are in terms of time: +0.03 is 3 % slower, and for a rate it is the baseline's over the current value less
    one, so that a tolerance means the same for a time and for its inverse. A rate that halves is 100 % slower.

    Args:
        measurements: The runs, one process each; at least one, all of one metric and one session.
        baseline: What was accepted; `None` if nothing was.
        environments: Those that the sessions name.
        environment: Where the runs were taken.
        devices: Hashed UUIDs that the runs were taken on, in any order. Sessions on the same set weigh more, and on
            a set that the baseline has never seen the spread between devices counts.
        visit: The visit to the machine that the runs belong to; sessions of the same visit share what it does to them.
        is_cpu: The runs were timed by wall clock on a CPU.
        health: Why the device cannot be trusted, such as `hardware thermal slowdown for 12 % of the time`.
        look: 1, 2 or 3: how often these runs have been judged, this time included.

    Returns:
        The verdict. Its change, limits and smallest detectable effect (at 80 % power, independent of the tolerance)
        are there if something was compared; its interval has 95 %.

    Raises:
        MeasurementError: A value is not a finite number above 0.
    """
    first = measurements[0]
    prior = prior_of(first.kind, is_cpu=is_cpu)
    tolerance = prior.tolerance if first.tolerance is None else first.tolerance
    blank = Verdict(status="NEW", metric=first.metric, reason="", tolerance=tolerance, runs=len(measurements))
    logs = [_log(run.value, run.better, run.metric, run.unit) for run in measurements]

    if health:  # with or without a baseline: such a value is not to be recorded either
        return replace(blank, status="INVALID", reason=health)
    if baseline is None or not baseline.sessions:
        return replace(blank, reason="No baseline on this device.")
    sessions, differences = _same_hardware(baseline.sessions, environments, environment.hardware)
    if differences := _other_identity(measurements, baseline) or differences:
        return replace(blank, status="INCOMPARABLE", reason=f"Not comparable: {'; '.join(differences)}.")
    session_logs = [_session_logs(session, baseline, first.metric) for session in sessions]
    components = variance_components(session_logs, prior=prior.variances, floor=prior.floor)
    components = dataclasses.replace(components, within=max(components.within, _unsettled(measurements, sessions)))
    comparison = _compare(logs, session_logs, components, devices, visit)
    verdict = replace(blank, sessions=len(sessions), is_provisional=len(sessions) < ENOUGH_SESSIONS)
    is_known_device = _group(devices) in [session.device_group for session in session_logs]
    return _decide(verdict, comparison, baseline, remedy=_remedy(len(logs), look, is_known_device=is_known_device))


def hardware_differences(now: Hardware, then: Hardware) -> tuple[str, ...]:
    """Say what makes two results incomparable. What is not known on one side does not; memory and power may be 1 % off.

    >>> hardware_differences(Hardware(name="H100", power_limit_w=500.0), Hardware(name="H100", power_limit_w=700.0))
    ('power limit 500.0 W, baseline 700.0 W',)
    """
    differences = []
    if now.name != then.name:
        differences.append(f"device {now.name}, baseline {then.name}")
    if now.count != then.count:
        differences.append(f"{now.count} devices, baseline {then.count}")
    if now.is_mig != then.is_mig:
        differences.append(f"{_partition(now)}, baseline {_partition(then)}")
    for what, unit, ours, theirs in (
        ("memory", "B", now.memory_bytes, then.memory_bytes),
        ("power limit", "W", now.power_limit_w, then.power_limit_w),
    ):
        if ours is not None and theirs is not None and not math.isclose(ours, theirs, rel_tol=0.01):
            differences.append(f"{what} {format_value(ours, unit)}, baseline {format_value(theirs, unit)}")
    return tuple(differences)


def tolerance_warning(verdict: Verdict) -> str | None:
    """Say in one sentence that a tolerance is far below or far above what can be told from noise."""
    detectable = verdict.minimum_detectable_effect
    if detectable is None:
        return None
    tolerance, least = format_percent(verdict.tolerance), format_percent(detectable)
    if verdict.tolerance < detectable:
        return (
            f"{verdict.metric}: the tolerance of {tolerance} is below the {least} that can be told from noise: "
            "widen it, or record more sessions."
        )
    if verdict.tolerance > 20 * detectable:
        return (
            f"{verdict.metric}: the tolerance of {tolerance} is more than 20 times the {least} "
            "that can be told from noise: tighten it."
        )
    return None


def _log(value: float, better: Better, metric: str, unit: str) -> float:
    if not math.isfinite(value) or value <= 0:
        raise MeasurementError(
            f"{metric} is {value:g} {unit}. Only finite values above 0 can be compared: correct what the test records."
        )
    return math.log(value) if better == "lower" else -math.log(value)


def _session_logs(session: Session, baseline: MetricBaseline, metric: str) -> SessionLogs:
    logs = tuple(_log(run.value, baseline.better, f"The baseline of {metric}", baseline.unit) for run in session.runs)
    return SessionLogs(device_group=_group(session.devices), logs=logs, visit=session.visit)


def _group(devices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(devices))


def _other_identity(measurements: Sequence[Measurement], baseline: MetricBaseline) -> tuple[str, ...]:
    differences = []
    for run in measurements:
        if run.unit != baseline.unit:
            differences.append(f"unit {run.unit}, baseline {baseline.unit}")
        if run.better != baseline.better:
            differences.append(f"{run.better} is better, baseline {baseline.better}")
        if run.method != baseline.method:
            differences.append(f"method {run.method}, baseline {baseline.method}")
    return tuple(dict.fromkeys(differences))


def _same_hardware(
    sessions: Sequence[Session], environments: Mapping[str, Environment], hardware: Hardware
) -> tuple[list[Session], tuple[str, ...]]:
    found = [hardware_differences(hardware, environments[session.environment].hardware) for session in sessions]
    same = [session for session, differences in zip(sessions, found, strict=True) if not differences]
    return same, () if same else found[-1]


def _partition(hardware: Hardware) -> str:
    return "MIG instance" if hardware.is_mig else "whole GPU"


def _compare(
    logs: Sequence[float],
    sessions: Sequence[SessionLogs],
    components: VarianceComponents,
    devices: tuple[str, ...],
    visit: str | None,
) -> _Comparison:
    prediction = predict(
        sessions, components, device_group=_group(devices), current_runs=len(logs), visit=visit or object()
    )
    return _Comparison(
        difference=fmean(logs) - prediction.expected_log,
        expected_log=prediction.expected_log,
        standard_error=prediction.standard_error,
        degrees_of_freedom=components.degrees_of_freedom,
    )


def _unsettled(measurements: Sequence[Measurement], sessions: Sequence[Session]) -> float:
    """Variance that the runs' own intervals show: runs cannot agree better with each other than each is known."""
    spreads = [run.spread for session in sessions for run in session.runs] + [run.spread for run in measurements]
    return fmean([(spread / 2) ** 2 for spread in spreads if spread is not None] or [0.0])


def _decide(verdict: Verdict, comparison: _Comparison, baseline: MetricBaseline, *, remedy: str) -> Verdict:
    margin = math.log1p(verdict.tolerance)
    status = _status(comparison, margin)
    is_low_power = status == "PASS" and comparison.is_too_noisy(margin)
    parts = [f"{comparison.in_words(baseline.unit)}, tolerance {format_percent(verdict.tolerance)}"]
    if is_low_power:
        parts.append(f"low power: sees {format_percent(comparison.minimum_detectable_effect)} at best")
    if status == "INCONCLUSIVE":
        parts.append(remedy)
    return replace(
        verdict,
        status=status,
        reason="; ".join(parts) + ".",
        change=math.expm1(comparison.difference),
        change_low=comparison.change_at(0.025),
        change_high=comparison.change_at(0.975),
        minimum_detectable_effect=comparison.minimum_detectable_effect,
        baseline_value=math.exp(comparison.expected_log if baseline.better == "lower" else -comparison.expected_log),
        is_low_power=is_low_power,
    )


def _status(comparison: _Comparison, margin: float) -> Status:
    difference, certain = comparison.difference, comparison.margin_of_error(1 - _ALPHA_OF_A_LOOK)
    if difference > margin and difference > certain:
        return "REGRESSED"
    if difference < -margin and difference < -certain:
        return "IMPROVED"
    if difference + comparison.margin_of_error(_CONFIDENCE) < margin:
        return "PASS"
    return "PASS" if comparison.is_too_noisy(margin) and difference < margin else "INCONCLUSIVE"


def _remedy(runs: int, look: int, *, is_known_device: bool) -> str:
    if not is_known_device:  # runs on it cannot tell its own offset from a change
        return "the baseline has no session on this very device, and devices differ: record one on it"
    more = "more runs or more sessions in the baseline" if look < len(LOOKS) else "more sessions in the baseline"
    return f"not settled by {runs} run{'s' if runs > 1 else ''}: {more} may settle it"
