"""Is it slower than the baseline? One pure function from measurements and accepted sessions to a verdict.

The logarithms of the current runs are averaged and compared with what the baseline predicts for this physical device.
The difference d has a standard error se that counts the noise between runs, between sessions and between GPUs, and a
Student t distribution. With the margin m = log(1 + tolerance):

    REGRESSED   d > m and d - t se > 0      more than the tolerance, and not by chance
    IMPROVED    d < -m and d + t se < 0
    PASS        d + t(95 %) se < m          surely less than the tolerance
                d < m                       where noise hides the tolerance from an unchanged metric: `is_low_power`
    INCONCLUSIVE otherwise

A metric may be looked at more than once: after the first run, after the third and after the sixth (confirm.py makes
them, in fresh processes). From the second look on the first run, which raised the suspicion, is left out: what was
picked because it stands out is no evidence, and one process that was out of luck accuses nobody. One false REGRESSED
in a thousand is allowed over all looks together, fewer in a run of many metrics (`alpha_of`); `CONFIRMED` says which
share each look may spend. A metric that is judged once spends all at once.

From the sixth session of an epoch on, the runs are also compared with its first five sessions alone, so that a slow
drift cannot carry the baseline along; both comparisons share the false-alarm rate.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from msgspec.structs import replace

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.priors import Prior, Priors, prior_of
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Measurement,
    MetricBaseline,
    Session,
    Status,
    Verdict,
    configuration_differences,
)
from pytest_gpuperf.stats import (
    Prediction,
    SessionLogs,
    mean_of_known,
    predict,
    t_probability,
    t_quantile,
    variance_components,
)
from pytest_gpuperf.units import counted, format_percent, format_value, from_worse_log, is_of_time, worse_log

#: Runs made by the first, second and third look.
LOOKS = (1, 3, 6)
#: Share of the false-alarm rate that each of these looks may spend. The first only raises a suspicion.
CONFIRMED = (0.02, 0.96, 0.02)
#: The same where there is one look alone.
ONCE = (1.0,)
#: Chance of a false REGRESSED of one metric over all looks, and of any in a run.
ALPHA, ALPHA_OF_A_RUN = 0.001, 0.02
#: Sessions below which a baseline is provisional, and those that hold an epoch where it began.
ENOUGH_SESSIONS = 5

_CONFIDENCE = 0.95
_POWER = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """Of logarithms; + is worse.

    Attributes:
        least: Standard error at the last look.
        minimum_detectable_effect: At the look that decides.
    """

    difference: float
    expected_log: float
    standard_error: float
    degrees_of_freedom: float
    alpha: float
    least: float
    minimum_detectable_effect: float

    def margin_of_error(self, probability: float) -> float:
        return t_quantile(probability, self.degrees_of_freedom) * self.standard_error

    def change_at(self, probability: float) -> float:
        return math.expm1(self.difference + self.margin_of_error(probability))

    def is_too_noisy(self, margin: float) -> bool:
        """Whether not even the last look would pass nearly every unchanged metric."""
        return 2 * t_quantile(_CONFIDENCE, self.degrees_of_freedom) * self.least >= margin

    def is_worse(self, margin: float) -> bool:
        return self.difference > max(margin, self.margin_of_error(1 - self.alpha))

    @property
    def p_value(self) -> float:
        """Chance of a difference as large as this if nothing changed."""
        return t_probability(-self.difference / self.standard_error, self.degrees_of_freedom)

    def in_words(self, unit: str) -> str:
        low, change, high = (self.change_at(probability) for probability in (0.025, 0.5, 0.975))
        worse, better = worse_and_better(unit)
        if change < 0:
            low, change, high, worse = -high, -change, -low, better
        return f"{format_percent(change)} {worse} ({format_percent(low)} to {format_percent(high)})"


def worse_and_better(unit: str) -> tuple[str, str]:
    """What a metric became: slower or faster where its unit speaks of time."""
    return ("slower", "faster") if is_of_time(unit) else ("worse", "better")


def alpha_of(metrics: int, rejected: int = 0) -> float:
    """Return the chance of a false REGRESSED that the next metric of a run may spend.

    Holm's bound (1979), taken in the order of the run: with m metrics, of which r are REGRESSED already, the next may
    be rejected at ALPHA_OF_A_RUN / (m - r). Up to the first false rejection only metrics that did change have been
    rejected, so every unchanged one is held against ALPHA_OF_A_RUN divided by their number at most.

    Args:
        metrics: Those of the run that have a baseline.
        rejected: How many of them are REGRESSED already.
    """
    return min(ALPHA, ALPHA_OF_A_RUN / max(metrics - rejected, 1))


def judge(  # noqa: PLR0913 - all that a verdict depends on is an argument, so that old results can be judged again
    measurements: Sequence[Measurement],
    baseline: MetricBaseline | None,
    *,
    environments: Mapping[str, Environment],
    environment: Environment,
    devices: tuple[str, ...],
    visit: str | None = None,
    health: str | None = None,
    look: int = 1,
    spending: tuple[float, ...] = ONCE,
    alpha: float = ALPHA,
    priors: Priors | None = None,
) -> Verdict:
    """Compare the current runs of one metric with the sessions accepted as good.

    Changes are in terms of time: +0.03 is 3 % slower, and for a rate it is the baseline's over the current value less
    one, so that a tolerance means the same for a time and for its inverse. A rate that halves is 100 % slower.

    Args:
        measurements: The runs, one process each, in order; at least one, all of one metric and one session. The first
            one counts at the first look alone.
        baseline: What was accepted; `None` if nothing was.
        environments: Those that the sessions name.
        environment: Where the runs were taken.
        devices: Hashed UUIDs that the runs were taken on, in any order. Sessions on the same set weigh more, and on
            a set that the baseline has never seen the spread between devices counts.
        visit: The visit to the machine that the runs belong to; sessions of the same visit share what it does to them.
        health: Why the device cannot be trusted, such as `hardware thermal slowdown for 12 % of the time`.
        look: How often these runs have been judged, this time included.
        spending: `CONFIRMED` where up to three looks are planned, `ONCE` for one.
        alpha: Chance of a false REGRESSED over all looks; see `alpha_of`.
        priors: What is known of noise; `None`: the package's.

    Returns:
        The verdict. Its change, limits and smallest detectable effect (at 80 % power, independent of the tolerance)
        are there if something was compared; its interval has 95 %.

    Raises:
        MeasurementError: A value is not a finite number above 0.
    """
    first, made = measurements[0], len(measurements)
    prior = prior_of(first.kind, is_cpu=environment.hardware.is_cpu, priors=priors)
    tolerance = prior.tolerance if first.tolerance is None else first.tolerance
    blank = Verdict(status="NEW", metric=first.metric, reason="", tolerance=tolerance, runs=made)
    for run in measurements:
        _check(run.value, run.metric, run.unit)

    if health:  # with or without a baseline: such a value is not to be recorded either
        return replace(blank, status="INVALID", reason=health)
    if baseline is None or not baseline.sessions:
        return replace(blank, reason="No baseline on this device.")
    sessions, differences = _same_hardware(baseline.sessions, environments, environment.hardware)
    if differences := identity_differences(measurements, baseline) or differences:
        return replace(blank, status="INCOMPARABLE", reason=f"Not comparable: {'; '.join(differences)}.")

    skipped = 1 if look > 1 and made > 1 else 0
    question = _Question(
        logs=[worse_log(run.value, run.better) for run in measurements[skipped:]],
        unsettled=_unsettled(measurements[skipped:], sessions),
        prior=prior,
        devices=_group(devices),
        visit=visit,
        alphas=tuple(share * alpha / (2 if len(sessions) > ENOUGH_SESSIONS else 1) for share in spending),
        look=min(look, len(spending)),
    )
    return _answer(question, blank, replace(baseline, sessions=tuple(sessions)), measurements[skipped:])


def _answer(
    question: "_Question", blank: Verdict, baseline: MetricBaseline, measurements: Sequence[Measurement]
) -> Verdict:
    """Compare with all sessions, and with those that the epoch began with where there are more."""
    sessions = baseline.sessions
    past = [_session_logs(session, baseline, blank.metric) for session in sessions]
    now = _compare(question, past)
    since_start = _compare(question, past[:ENOUGH_SESSIONS]) if len(past) > ENOUGH_SESSIONS else None
    is_known = question.devices in [session.device_group for session in past]
    is_last = question.look == len(question.alphas)
    verdict = _decide(
        replace(blank, sessions=len(sessions), is_provisional=len(sessions) < ENOUGH_SESSIONS),
        now,
        since_start,
        baseline,
        remedy=_remedy(blank.runs, is_last=is_last, is_known_device=is_known),
    )
    if since_start and not now.is_worse(math.log1p(blank.tolerance)):  # what is REGRESSED is so since the epoch began
        now, sessions = since_start, sessions[:ENOUGH_SESSIONS]
    return _in_cycles(verdict, now, measurements, baseline, sessions=_nearest(sessions, question.devices))


def is_settled(verdict: Verdict, look: int) -> bool:
    """Whether more runs would not change a verdict: a REGRESSED from the first run alone is a suspicion."""
    if verdict.is_host_limited:
        return True
    if verdict.status == "REGRESSED":
        return look > 1
    return verdict.status != "INCONCLUSIVE"


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
    if now.link is not None and then.link is not None and now.link != then.link:
        differences.append(f"connected by {now.link}, baseline {then.link}")
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


def _check(value: float, metric: str, unit: str) -> None:
    if not math.isfinite(value) or value <= 0:
        raise MeasurementError(
            f"{metric} is {value:g} {unit}. Only finite values above 0 can be compared: correct what the test records."
        )


def _session_logs(session: Session, baseline: MetricBaseline, metric: str) -> SessionLogs:
    for run in session.runs:
        _check(run.value, f"The baseline of {metric}", baseline.unit)
    return SessionLogs.of(session, baseline.better)


def _group(devices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(devices))


def identity_differences(measurements: Sequence[Measurement], baseline: MetricBaseline) -> tuple[str, ...]:
    """Say what makes runs another metric than the baseline's: unit, direction, method, configuration."""
    differences = []
    for run in measurements:
        if run.unit != baseline.unit:
            differences.append(f"unit {run.unit}, baseline {baseline.unit}")
        if run.better != baseline.better:
            differences.append(f"{run.better} is better, baseline {baseline.better}")
        if run.method != baseline.method:
            differences.append(f"method {run.method}, baseline {baseline.method}")
        differences += configuration_differences(run.configuration, baseline.configuration)
    return tuple(dict.fromkeys(differences))


def _same_hardware(
    sessions: Sequence[Session], environments: Mapping[str, Environment], hardware: Hardware
) -> tuple[list[Session], tuple[str, ...]]:
    found = [hardware_differences(hardware, environments[session.environment].hardware) for session in sessions]
    same = [session for session, differences in zip(sessions, found, strict=True) if not differences]
    return same, () if same else found[-1]


def _partition(hardware: Hardware) -> str:
    return "MIG instance" if hardware.is_mig else "whole GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What is asked of any set of sessions.

    Attributes:
        logs: Of the current runs.
        unsettled: Variance between runs that their own intervals show.
        alphas: What each look may spend.
        look: The present one.
    """

    logs: Sequence[float]
    unsettled: float
    prior: Prior
    devices: tuple[str, ...]
    visit: str | None
    alphas: tuple[float, ...]
    look: int

    def runs_at(self, look: int) -> int:
        """Runs that a look judges: all that were made but the first, except at the first look."""
        return len(self.logs) if look == self.look else max(LOOKS[look - 1] - 1, 1)


def _compare(question: _Question, sessions: Sequence[SessionLogs]) -> _Comparison:
    prior, logs = question.prior, question.logs
    components = variance_components(sessions, prior=prior.variances, floor=prior.floor, current=logs)
    within = dataclasses.replace(components.within, value=max(components.within.value, question.unsettled))
    components = dataclasses.replace(components, within=within)

    def prediction(look: int) -> Prediction:
        runs = question.runs_at(look)
        return predict(sessions, components, device_group=question.devices, current_runs=runs, visit=question.visit)

    now, looks = prediction(question.look), len(question.alphas)
    decisive = max(question.look, min(2, looks))  # the first look alone accuses nobody, where there are more
    return _Comparison(
        difference=fmean(logs) - now.expected_log,
        expected_log=now.expected_log,
        standard_error=now.standard_error,
        degrees_of_freedom=now.degrees_of_freedom,
        alpha=question.alphas[question.look - 1],
        least=prediction(looks).standard_error,
        minimum_detectable_effect=_detectable(prediction(decisive), question.alphas[decisive - 1]),
    )


def _detectable(prediction: Prediction, alpha: float) -> float:
    quantiles = (t_quantile(probability, prediction.degrees_of_freedom) for probability in (1 - alpha, _POWER))
    return math.expm1(sum(quantiles) * prediction.standard_error)


def _unsettled(measurements: Sequence[Measurement], sessions: Sequence[Session]) -> float:
    """Variance that the runs' own intervals show: runs cannot agree better with each other than each is known."""
    spreads = [run.spread for session in sessions for run in session.runs] + [run.spread for run in measurements]
    return fmean([(spread / 2) ** 2 for spread in spreads if spread is not None] or [0.0])


def _decide(
    verdict: Verdict, now: _Comparison, since_start: _Comparison | None, baseline: MetricBaseline, *, remedy: str
) -> Verdict:
    margin = math.log1p(verdict.tolerance)
    status = _status(now, margin)
    has_drifted = status != "REGRESSED" and since_start is not None and since_start.is_worse(margin)
    if has_drifted:
        status = "REGRESSED"
    is_low_power = status == "PASS" and now.is_too_noisy(margin)
    parts = [f"{now.in_words(baseline.unit)}, tolerance {format_percent(verdict.tolerance)}"]
    if is_low_power:
        parts.append(f"low power: sees {format_percent(now.minimum_detectable_effect)} at best")
    if has_drifted and since_start is not None:
        parts.append(
            f"drifted: {since_start.in_words(baseline.unit)} since this epoch's first {ENOUGH_SESSIONS} sessions"
        )
    if status == "INCONCLUSIVE":
        parts.append(remedy)
    return replace(
        verdict,
        status=status,
        reason="; ".join(parts) + ".",
        change=math.expm1(now.difference),
        change_low=now.change_at(0.025),
        change_high=now.change_at(0.975),
        minimum_detectable_effect=now.minimum_detectable_effect,
        baseline_value=from_worse_log(now.expected_log, baseline.better),
        value=from_worse_log(now.expected_log + now.difference, baseline.better),
        p_value=now.p_value,
        drift=math.expm1(since_start.difference) if since_start else None,
        is_low_power=is_low_power,
    )


def _status(comparison: _Comparison, margin: float) -> Status:
    difference, certain = comparison.difference, comparison.margin_of_error(1 - comparison.alpha)
    if comparison.is_worse(margin):
        return "REGRESSED"
    if difference < -margin and difference < -certain:
        return "IMPROVED"
    if difference + comparison.margin_of_error(_CONFIDENCE) < margin:
        return "PASS"
    return "PASS" if comparison.is_too_noisy(margin) and difference < margin else "INCONCLUSIVE"


def _remedy(runs: int, *, is_last: bool, is_known_device: bool) -> str:
    if not is_known_device:  # runs on it cannot tell its own offset from a change
        return "the baseline has no session on this very device, and devices differ: record one on it"
    more = "more sessions in the baseline" if is_last else "more runs or more sessions in the baseline"
    return f"not settled by {counted(runs, 'run')}: {more} may settle it"


def _nearest(sessions: Sequence[Session], devices: tuple[str, ...]) -> list[Session]:
    """Sessions on these very devices, where there are any: each device has a clock of its own under its power cap."""
    return [session for session in sessions if _group(session.devices) == devices] or list(sessions)


def _in_cycles(
    verdict: Verdict,
    comparison: _Comparison,
    measurements: Sequence[Measurement],
    baseline: MetricBaseline,
    *,
    sessions: Sequence[Session],
) -> Verdict:
    """Lay a compute-bound slowdown that is none in clock cycles at the clock's door."""
    is_measured = baseline.method.mode not in ("recorded", "curve")  # whose clock is that of the measured calls
    if verdict.status != "REGRESSED" or baseline.kind != "compute" or not is_measured:
        return verdict
    now = mean_of_known(run.telemetry.sm_clock_mhz or None for run in measurements if run.telemetry)
    then = mean_of_known(run.sm_clock_mhz or None for session in sessions for run in session.runs)
    if now is None or then is None:
        return verdict
    cycles = comparison.difference + math.log(now / then)
    is_worse = cycles > math.log1p(verdict.tolerance) or cycles > comparison.margin_of_error(1 - comparison.alpha)
    if is_worse:
        return verdict
    return replace(
        verdict,
        status="INVALID",
        reason=f"{comparison.in_words(baseline.unit)} in time, but {format_percent(math.expm1(cycles), signed=True)} "
        f"in clock cycles: the SM clock was {now:.0f} MHz, {then:.0f} MHz in the baseline. It is the clock that "
        "changed: look at heat and power, and whether the code draws more power now.",
    )
