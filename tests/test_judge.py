"""Verdicts: the rule by hand, its reasons word by word, properties that must always hold, and its error rates."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import get_args

import pytest
import scipy.stats
from epochs import append
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.judge import (
    ALPHA,
    ALPHA_OF_A_RUN,
    CONFIRMED,
    LOOKS,
    ONCE,
    alpha_of,
    hardware_differences,
    is_settled,
    judge,
    tolerance_warning,
)
from pytest_gpuperf.priors import Priors, package_priors
from pytest_gpuperf.records import (
    BaselineFile,
    BaselineRun,
    Environment,
    Hardware,
    Kind,
    Measurement,
    Method,
    MetricBaseline,
    RunInfo,
    Session,
    Status,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.units import Better

SUSTAINED = Method(clock="cuda-events", mode="sustained")
H100 = Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984, power_limit_w=700.0)
HERE = Environment(hardware=H100)
#: Told by the lack of memory; all else is as in the baseline.
CPU = replace(H100, memory_bytes=None)


def current(
    *values: float,
    unit: str = "s",
    better: Better = "lower",
    kind: Kind = "compute",
    tolerance: float | None = None,
    method: Method = SUSTAINED,
    spread: float | None = None,
    clock_mhz: float | None = None,
) -> list[Measurement]:
    """One measurement a run."""
    return [
        Measurement(
            metric="time",
            value=value,
            unit=unit,
            better=better,
            kind=kind,
            tolerance=tolerance,
            method=method,
            spread=spread,
            telemetry=Telemetry(duration_s=1.0, sm_clock_mhz=clock_mhz),
        )
        for value in values
    ]


def accepted(
    *sessions: Sequence[float],
    devices: str = "",
    unit: str = "s",
    better: Better = "lower",
    environments: Sequence[str] = (),
    visits: str = "",
    spread: float | None = None,
    clocks_mhz: Sequence[float] = (),
    kind: Kind = "compute",
) -> MetricBaseline:
    """A baseline of sessions of run values.

    Args:
        devices: GPUs of the sessions by one letter each: `aab`; all on `a` if not given.
        visits: The same for their visits; each its own, 0, 1, 2, ..., if not given.
        clocks_mhz: One a session; none if not given.
    """
    return MetricBaseline(
        unit=unit,
        better=better,
        kind=kind,
        method=SUSTAINED,
        sessions=tuple(
            Session(
                date="2026-11-20T00:00:00Z",
                visit=visits[i] if visits else str(i),
                devices=(devices[i] if devices else "a",),
                environment=environments[i] if environments else "h100",
                runs=tuple(
                    BaselineRun(value=value, spread=spread, sm_clock_mhz=clocks_mhz[i] if clocks_mhz else None)
                    for value in values
                ),
            )
            for i, values in enumerate(sessions)
        ),
    )


FIVE = accepted(*[[1.0]] * 5)

#: The package's, with fixed figures for compute: what is worked out by hand below must not change with what is learned.
COMPUTE = package_priors()["compute"]
PRIORS: Priors = {
    **package_priors(),
    "compute": replace(
        COMPUTE,
        within=replace(COMPUTE.within, deviation=0.0018, worth=7.9),
        session=replace(COMPUTE.session, deviation=0.003, worth=8.0),
        device=replace(COMPUTE.device, deviation=0.0105, worth=10.0),
        floor=0.0005,
    ),
}


def judged(
    measurements: Sequence[Measurement],
    baseline: MetricBaseline | None = FIVE,
    *,
    device: str = "a",
    visit: str | None = None,
    health: str | None = None,
    look: int = 1,
    spending: tuple[float, ...] = ONCE,
    alpha: float = ALPHA,
    priors: Priors | None = None,
    hardware: Hardware = H100,
    others: dict[str, Hardware] | None = None,
) -> Verdict:
    return judge(
        measurements,
        baseline,
        environments={"h100": HERE} | {name: Environment(hardware=other) for name, other in (others or {}).items()},
        environment=Environment(hardware=hardware),
        devices=(device,),
        visit=visit,
        health=health,
        look=look,
        spending=spending,
        alpha=alpha,
        priors=priors or PRIORS,
    )


# the rule by hand: five sessions of one run, all 1 s, of a kernel limited by compute


def error(*parts: tuple[float, float]) -> tuple[float, float]:
    """Standard error and Satterthwaite's degrees of freedom of a sum of variances with theirs."""
    total = sum(variance for variance, _ in parts)
    return math.sqrt(total), total**2 / sum(variance**2 / freedom for variance, freedom in parts)


def t(probability: float, freedom: float) -> float:
    return float(scipy.stats.t.ppf(probability, freedom))


WITHIN, WITHIN_FREEDOM = 0.0018**2, 7.9  # runs that stand alone in their sessions say nothing: the prior
SESSION, SESSION_FREEDOM = 8 * 0.003**2 / 12, 12  # 4 degrees of freedom that saw nothing, 8 of the prior
STANDARD_ERROR, FREEDOM = error((SESSION * 1.2, SESSION_FREEDOM), (WITHIN * 1.2, WITHIN_FREEDOM))  # 0.33 %, 20
CERTAIN = t(1 - ALPHA, FREEDOM) * STANDARD_ERROR  # 1.2 %
SURE = t(0.95, FREEDOM) * STANDARD_ERROR  # 0.57 %
MARGIN = math.log1p(0.03)


def test_the_figures_that_the_cases_by_hand_are_worked_out_from() -> None:
    prior = PRIORS["compute"]

    assert (prior.within.deviation, prior.within.worth) == (0.0018, 7.9)
    assert (prior.session.deviation, prior.session.worth) == (0.003, 8)
    assert (prior.device.deviation, prior.device.worth) == (0.0105, 10)


def test_change_interval_and_detectable_effect_are_those_worked_out_by_hand() -> None:
    verdict = judged(current(1.05))

    half = t(0.975, FREEDOM) * STANDARD_ERROR
    assert verdict.change == pytest.approx(0.05)
    assert verdict.change_low == pytest.approx(1.05 * math.exp(-half) - 1)
    assert verdict.change_high == pytest.approx(1.05 * math.exp(half) - 1)
    assert verdict.minimum_detectable_effect == pytest.approx(math.expm1(CERTAIN + t(0.8, FREEDOM) * STANDARD_ERROR))
    assert (verdict.baseline_value, verdict.value) == pytest.approx((1.0, 1.05))
    assert (verdict.metric, verdict.sessions, verdict.runs, verdict.tolerance) == ("time", 5, 1, 0.03)
    assert verdict.drift is None


@pytest.mark.parametrize("value", [0.98, 1.0, 1.004, 1.05, 1.5])
def test_the_chance_of_such_a_change_is_students(value: float) -> None:
    """Of 1.5, 1e-30: what is left of a probability just under one would have no digits."""
    expected = scipy.stats.t.sf(math.log(value) / STANDARD_ERROR, FREEDOM)

    assert judged(current(value)).p_value == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("difference", "tolerance", "status"),
    [
        (CERTAIN * 1.001, 0.01, "REGRESSED"),
        (CERTAIN * 0.999, 0.01, "INCONCLUSIVE"),
        (MARGIN * 1.001, 0.03, "REGRESSED"),
        (MARGIN * 0.999, 0.03, "INCONCLUSIVE"),
        (MARGIN - SURE * 0.999, 0.03, "INCONCLUSIVE"),
        (MARGIN - SURE * 1.001, 0.03, "PASS"),
        (0.0, 0.03, "PASS"),
        (-MARGIN * 0.999, 0.03, "PASS"),
        (-MARGIN * 1.001, 0.03, "IMPROVED"),
        (-CERTAIN * 0.999, 0.01, "PASS"),
        (-CERTAIN * 1.001, 0.01, "IMPROVED"),
    ],
)
def test_the_limits_are_where_the_rule_puts_them(difference: float, tolerance: float, status: str) -> None:
    assert judged(current(math.exp(difference), tolerance=tolerance)).status == status


@pytest.mark.parametrize(
    ("factor", "outcome"), [(0.999, ("PASS", True)), (1.001, ("INCONCLUSIVE", False))], ids=["below", "above"]
)
def test_noise_hides_a_tolerance_that_is_less_than_twice_what_a_pass_takes(
    factor: float, outcome: tuple[Status, bool]
) -> None:
    tolerance = math.expm1(2 * SURE * factor)

    verdict = judged(current(math.exp(2 * SURE * 0.9), tolerance=tolerance))

    assert (verdict.status, verdict.is_low_power) == outcome


@pytest.mark.parametrize(
    ("factor", "outcome"), [(0.999, ("PASS", True)), (1.001, ("INCONCLUSIVE", False))], ids=["below", "above"]
)
def test_where_more_runs_are_to_come_it_is_the_noise_of_the_last_look_that_counts(
    factor: float, outcome: tuple[Status, bool]
) -> None:
    """Six runs, of which the first is left out, on five sessions of one."""
    least = t(0.95, FREEDOM) * math.sqrt(SESSION * 1.2 + WITHIN * (1 / 5 + 1 / 5))
    tolerance = math.expm1(2 * least * factor)

    verdict = judged(current(math.exp(2 * least * 0.9), tolerance=tolerance), spending=CONFIRMED)

    assert (verdict.status, verdict.is_low_power) == outcome
    assert judged(current(math.exp(2 * least * 0.9), tolerance=tolerance)).is_low_power


def test_more_runs_narrow_the_interval_by_what_differs_between_runs() -> None:
    six = judged(current(*[1.0] * 6))

    within = WITHIN * 7.9 / 12.9  # 5 degrees of freedom that saw nothing
    standard_error, freedom = error((SESSION * 1.2, SESSION_FREEDOM), (within * (1 / 6 + 1 / 5), 12.9))
    assert six.runs == 6
    assert half_width(six) == pytest.approx(t(0.975, freedom) * standard_error)


def test_runs_under_judgement_that_differ_widen_the_interval() -> None:
    """Logarithms 0, 0.01 and 0.02: squares of 0.0002 with 2 degrees of freedom."""
    verdict = judged(current(*[math.exp(log) for log in (0.0, 0.01, 0.02)]))

    within = (0.0002 + 7.9 * WITHIN) / 9.9
    standard_error, freedom = error((SESSION * 1.2, SESSION_FREEDOM), (within * (1 / 3 + 1 / 5), 9.9))
    assert verdict.change == pytest.approx(math.expm1(0.01))
    assert half_width(verdict) == pytest.approx(t(0.975, freedom) * standard_error)


def half_width(verdict: Verdict) -> float:
    """Half the 95 % interval of the logarithm of the change."""
    assert verdict.change_high is not None
    assert verdict.change_low is not None
    return (math.log1p(verdict.change_high) - math.log1p(verdict.change_low)) / 2


def test_against_a_session_of_the_same_visit_what_differs_between_sessions_does_not_count() -> None:
    """One session of two runs decides nothing: the variance between sessions is the prior's."""
    baseline = accepted([1.0, 1.0], visits="v")
    freedom = 7.9 + 1 + 2  # of two runs accepted, and of three judged
    of_runs = WITHIN * 7.9 / freedom * (1 / 3 + 1 / 2)

    here = judged(current(*[1.0] * 3), baseline, visit="v")
    later = judged(current(*[1.0] * 3), baseline, visit="w")

    assert half_width(here) == pytest.approx(t(0.975, freedom) * math.sqrt(of_runs))
    standard_error, both = error((2 * 0.003**2, 8), (of_runs, freedom))
    assert half_width(later) == pytest.approx(t(0.975, both) * standard_error)


def test_runs_that_belong_to_no_visit_are_of_another_one() -> None:
    assert judged(current(1.0)) == judged(current(1.0), visit="another")


def test_the_same_visit_on_another_gpu_shares_nothing() -> None:
    baseline = accepted([1.0], visits="v")

    assert judged(current(1.0), baseline, device="z", visit="v") == judged(current(1.0), baseline, device="z")


def test_of_sessions_on_one_gpu_that_of_the_same_visit_is_nearest() -> None:
    baseline = accepted([1.0], [1.0], [1.01], visits="uvw")

    expected = [judged(current(1.0), baseline, visit=visit).baseline_value or 0.0 for visit in ("w", "x")]

    # sessions of one run on one GPU weigh the same; of the own visit's deviation, its session's share is seen
    logs = [0.0, 0.0, math.log(1.01)]
    between = fmean(logs)
    squares = sum((log - between) ** 2 for log in logs)
    session = (squares - 2 * WITHIN + 8 * 0.003**2) / 10
    share = session / (session + WITHIN)
    assert expected[1] == pytest.approx(math.exp(between))
    assert expected[0] == pytest.approx(math.exp(share * logs[2] + (1 - share) * between))


def test_several_sessions_of_one_visit_can_be_compared_with() -> None:
    """A session has one environment, so whoever upgrades torch and records again has two of one visit."""
    baseline = accepted([1.0], [1.0], [1.0], visits="vvv")

    assert judged(current(1.0), baseline, visit="v", hardware=CPU).status == "PASS"


@pytest.mark.parametrize("where", ["current", "baseline"])
def test_runs_are_not_believed_to_agree_better_than_each_is_known(where: str) -> None:
    """Half the spread is a standard deviation, and its square the least variance between runs."""
    spread = 0.04 if where == "current" else None
    baseline = accepted(*[[1.0]] * 5, spread=None if where == "current" else 0.04)

    verdict = judged(current(1.0, spread=spread), baseline)

    standard_error, freedom = error((SESSION * 1.2, SESSION_FREEDOM), (0.02**2 * 1.2, WITHIN_FREEDOM))
    assert half_width(verdict) == pytest.approx(t(0.975, freedom) * standard_error)


def test_the_spreads_of_all_runs_count_by_their_mean_square() -> None:
    verdict = judged(current(1.0, spread=0.04), accepted(*[[1.0]] * 5, spread=0.02))

    within = (5 * 0.01**2 + 0.02**2) / 6
    standard_error, freedom = error((SESSION * 1.2, SESSION_FREEDOM), (within * 1.2, WITHIN_FREEDOM))
    assert half_width(verdict) == pytest.approx(t(0.975, freedom) * standard_error)


def test_runs_that_are_known_well_are_not_believed_to_agree_better_than_they_do() -> None:
    assert judged(current(1.0, spread=0.0), accepted(*[[1.0]] * 5, spread=0.0)) == judged(current(1.0))


def test_a_rate_that_falls_is_slower_in_terms_of_time() -> None:
    baseline = accepted(*[[500e12]] * 5, unit="FLOP/s", better="higher")

    verdict = judged(current(400e12, unit="FLOP/s", better="higher"), baseline)

    assert verdict.status == "REGRESSED"
    assert verdict.change == pytest.approx(0.25)  # 500 / 400: each call takes a quarter longer
    assert verdict.baseline_value == pytest.approx(500e12)
    assert verdict.value == pytest.approx(400e12)


def test_the_value_of_several_runs_is_their_geometric_mean() -> None:
    assert judged(current(1.0, 1.0, 1.331)).value == pytest.approx(1.1)


def test_fewer_than_five_sessions_are_provisional() -> None:
    assert judged(current(1.0), accepted(*[[1.0]] * 4)).is_provisional
    assert not judged(current(1.0)).is_provisional


def test_on_a_gpu_never_seen_the_interval_is_wider() -> None:
    here, elsewhere = judged(current(1.0)), judged(current(1.0), device="z")

    assert here.change_high is not None
    assert elsewhere.change_high is not None
    assert elsewhere.change_high > 2 * here.change_high


def test_the_baseline_of_a_gpu_is_nearer_to_its_own_sessions() -> None:
    baseline = accepted([1.0], [1.0], [1.02], [1.02], devices="aabb")

    slow = judged(current(1.02), baseline, device="b").baseline_value
    fast = judged(current(1.02), baseline, device="a").baseline_value

    assert slow is not None
    assert fast is not None
    assert 1.0 < fast < 1.005
    assert 1.015 < slow < 1.02


def test_the_order_of_the_devices_does_not_matter() -> None:
    pair = replace(FIVE, sessions=tuple(replace(session, devices=("a", "b")) for session in FIVE.sessions))

    def verdict(*devices: str) -> Verdict:
        environments = {"h100": HERE}
        runs = current(1.0)
        return judge(runs, pair, environments=environments, environment=HERE, devices=devices)

    assert verdict("b", "a") == verdict("a", "b")
    assert verdict("b", "c") != verdict("a", "b")


# what each verdict says


def test_a_regression_says_by_how_much_with_its_interval_and_the_tolerance() -> None:
    assert judged(current(1.05)).reason == "5.0 % slower (4.3 % to 5.7 %), tolerance 3.0 %."


def test_a_pass_says_the_change_too() -> None:
    assert judged(current(1.004)).reason == "0.40 % slower (-0.30 % to 1.1 %), tolerance 3.0 %."


def test_an_improvement_says_faster_with_the_interval_turned_round() -> None:
    assert judged(current(0.95)).reason == "5.0 % faster (4.3 % to 5.7 %), tolerance 3.0 %."


@pytest.mark.parametrize(("value", "words"), [(1.05, "5.0 % worse ("), (0.95, "5.0 % better (")])
def test_a_metric_that_is_neither_time_nor_rate_is_worse_or_better(value: float, words: str) -> None:
    verdict = judged(current(value, unit="B"), accepted(*[[1.0]] * 5, unit="B"))

    assert verdict.reason.startswith(words)


def test_a_pass_that_noise_leaves_no_room_for_says_what_it_can_see() -> None:
    verdict = judged(current(1.01), accepted([1.0]), hardware=CPU)

    assert (verdict.status, verdict.is_low_power) == ("PASS", True)
    assert verdict.reason == "1.0 % slower (-17 % to 23 %), tolerance 10 %; low power: sees 62 % at best."


def test_noise_does_not_pass_what_is_beyond_the_tolerance() -> None:
    verdict = judged(current(1.11), accepted([1.0]), hardware=CPU)

    assert (verdict.status, verdict.is_low_power) == ("INCONCLUSIVE", False)


@pytest.mark.parametrize(
    ("runs", "look", "spending", "remedy"),
    [
        (1, 1, ONCE, "not settled by 1 run: more sessions in the baseline may settle it."),
        (1, 1, CONFIRMED, "not settled by 1 run: more runs or more sessions in the baseline may settle it."),
        (3, 2, CONFIRMED, "not settled by 3 runs: more runs or more sessions in the baseline may settle it."),
        (6, 3, CONFIRMED, "not settled by 6 runs: more sessions in the baseline may settle it."),
    ],
)
def test_what_is_not_settled_says_what_may_settle_it(
    runs: int, look: int, spending: tuple[float, ...], remedy: str
) -> None:
    verdict = judged(current(*[1.029] * runs), look=look, spending=spending)

    assert verdict.status == "INCONCLUSIVE"
    assert verdict.reason.startswith("2.9 % slower (")
    assert verdict.reason.endswith(f"), tolerance 3.0 %; {remedy}")


def test_what_is_not_settled_on_a_gpu_never_seen_asks_for_a_session_on_it() -> None:
    verdict = judged(current(1.05), device="z")

    assert verdict.status == "INCONCLUSIVE"
    remedy = "the baseline has no session on this very device, and devices differ: record one on it"
    assert verdict.reason.endswith(f"), tolerance 3.0 %; {remedy}.")


def test_without_a_baseline_a_metric_is_new() -> None:
    verdict = judged(current(1.0), None)

    assert (verdict.status, verdict.reason) == ("NEW", "No baseline on this device.")
    assert (verdict.change, verdict.sessions, verdict.is_provisional) == (None, 0, False)


def test_a_new_metric_of_an_unhealthy_gpu_is_invalid_too() -> None:
    verdict = judged(current(1.0), None, health="power brake for 3.0 % of the time")

    assert (verdict.status, verdict.reason) == ("INVALID", "power brake for 3.0 % of the time")
    assert (verdict.change, verdict.sessions) == (None, 0)


def test_an_unhealthy_gpu_makes_any_comparison_invalid() -> None:
    health = "hardware thermal slowdown for 12 % of the time"

    for measurements in (current(1.5), current(1.0), current(1.0, unit="B/s")):
        verdict = judged(measurements, health=health)
        assert (verdict.status, verdict.reason, verdict.change) == ("INVALID", health, None)


@pytest.mark.parametrize(
    ("measurements", "reason"),
    [
        (current(1.0, unit="B"), "Not comparable: unit B, baseline s."),
        (current(1.0, better="higher"), "Not comparable: higher is better, baseline lower."),
        (
            current(1.0, 1.0, method=Method(clock="cuda-graph", mode="hot")),
            "Not comparable: method hot, cuda-graph, baseline sustained, cuda-events.",
        ),
        (
            current(1.0, unit="B/s", better="higher"),
            "Not comparable: unit B/s, baseline s; higher is better, baseline lower.",
        ),
    ],
)
def test_another_metric_is_not_compared(measurements: list[Measurement], reason: str) -> None:
    verdict = judged(measurements)

    assert (verdict.status, verdict.reason, verdict.change) == ("INCOMPARABLE", reason, None)


@pytest.mark.parametrize(
    ("hardware", "difference"),
    [
        (replace(H100, name="NVIDIA H200"), "device NVIDIA H200, baseline NVIDIA H100 80GB HBM3"),
        (replace(H100, count=2), "2 devices, baseline 1"),
        (replace(H100, is_mig=True), "MIG instance, baseline whole GPU"),
        (replace(H100, memory_bytes=42_000_000_000), "memory 42.00 GB, baseline 85.52 GB"),
        (replace(H100, power_limit_w=500.0), "power limit 500.0 W, baseline 700.0 W"),
        (replace(H100, count=2, power_limit_w=500.0), "2 devices, baseline 1; power limit 500.0 W, baseline 700.0 W"),
    ],
)
def test_other_hardware_is_not_compared(hardware: Hardware, difference: str) -> None:
    verdict = judged(current(1.0), hardware=hardware)

    assert (verdict.status, verdict.reason) == ("INCOMPARABLE", f"Not comparable: {difference}.")


@pytest.mark.parametrize(
    "hardware",
    [
        replace(H100, memory_bytes=85_000_000_000),
        replace(H100, power_limit_w=699.9),
        replace(H100, power_limit_w=None, memory_bytes=None),
    ],
)
def test_a_percent_of_memory_or_power_and_what_cannot_be_read_are_no_difference(hardware: Hardware) -> None:
    assert hardware_differences(hardware, H100) == hardware_differences(H100, hardware) == ()


def test_only_sessions_on_the_same_hardware_count() -> None:
    baseline = accepted([2.0], [1.0], [2.0], [1.0], environments=["capped", "h100", "capped", "h100"])

    verdict = judged(current(1.0), baseline, others={"capped": replace(H100, power_limit_w=350.0)})

    assert (verdict.status, verdict.sessions) == ("PASS", 2)
    assert verdict.baseline_value == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("baseline", [None, FIVE])
def test_a_value_that_has_no_logarithm_is_an_error_of_the_measurement(
    value: float, baseline: MetricBaseline | None
) -> None:
    expected = rf"^time is {value:g} s\. Only finite values above 0 can be compared: correct what the test records\.$"
    with pytest.raises(MeasurementError, match=expected):
        judged(current(1.0, value), baseline)


def test_a_baseline_value_that_has_no_logarithm_is_named_as_such() -> None:
    with pytest.raises(MeasurementError, match=r"^The baseline of time is 0 s\. "):
        judged(current(1.0), accepted([1.0], [0.0]))


# tolerance and priors


def verdict_with(tolerance: float, detectable: float | None) -> Verdict:
    return Verdict(status="PASS", metric="time", reason="", tolerance=tolerance, minimum_detectable_effect=detectable)


def test_a_tolerance_that_noise_hides_is_warned_of() -> None:
    assert tolerance_warning(verdict_with(0.02, 0.034)) == (
        "time: the tolerance of 2.0 % is below the 3.4 % that can be told from noise: "
        "widen it, or record more sessions."
    )


def test_a_tolerance_far_above_the_noise_is_warned_of() -> None:
    assert tolerance_warning(verdict_with(0.1, 0.004)) == (
        "time: the tolerance of 10 % is more than 20 times the 0.40 % that can be told from noise: tighten it."
    )


@pytest.mark.parametrize(("tolerance", "detectable"), [(0.03, 0.02), (0.03, 0.03), (0.03, None)])
def test_a_tolerance_that_fits_the_noise_is_not_warned_of(tolerance: float, detectable: float | None) -> None:
    assert tolerance_warning(verdict_with(tolerance, detectable)) is None


def test_the_tolerance_of_the_test_replaces_that_of_the_kind() -> None:
    assert judged(current(1.0, kind="transfer")).tolerance == 0.05
    assert judged(current(1.0, kind="transfer", tolerance=0.02)).tolerance == 0.02


def test_noise_that_was_learned_replaces_the_packages() -> None:
    learned = {**package_priors(), "compute": package_priors()["host"]}

    verdict = judged(current(1.0), priors=learned)

    assert verdict.tolerance == 0.2
    assert half_width(verdict) > 10 * half_width(judged(current(1.0)))
    assert judged(current(1.0), hardware=CPU, priors=learned) == judged(current(1.0), hardware=CPU)


# looks: after 1, 3 and 6 runs, of which the first counts at the first look alone


def test_all_looks_together_spend_the_false_alarm_rate_and_no_more() -> None:
    assert len(CONFIRMED) == len(LOOKS)
    assert sum(CONFIRMED) == pytest.approx(1)
    assert sum(ONCE) == 1


@pytest.mark.parametrize(("look", "made", "counted"), [(1, 1, 1), (2, 3, 2), (3, 6, 5)])
@pytest.mark.parametrize(("factor", "status"), [(1.001, "REGRESSED"), (0.999, "INCONCLUSIVE")])
def test_each_look_spends_its_share(look: int, made: int, counted: int, factor: float, status: str) -> None:
    freedom = WITHIN_FREEDOM + counted - 1
    within = WITHIN * WITHIN_FREEDOM / freedom  # the runs agree
    standard_error, both = error((SESSION * 1.2, SESSION_FREEDOM), (within * (1 / counted + 1 / 5), freedom))
    limit = t(1 - CONFIRMED[look - 1] * ALPHA, both) * standard_error

    runs = current(*[math.exp(limit * factor)] * made, tolerance=0.008)
    verdict = judged(runs, look=look, spending=CONFIRMED)

    assert (verdict.status, verdict.runs) == (status, made)


def test_a_metric_that_is_judged_once_spends_all_at_once() -> None:
    value = math.exp(CERTAIN * 1.001)

    assert judged(current(value, tolerance=0.01), spending=ONCE).status == "REGRESSED"
    assert judged(current(value, tolerance=0.01), spending=CONFIRMED).status == "INCONCLUSIVE"


def test_a_first_run_that_was_out_of_luck_accuses_nobody() -> None:
    suspicion = judged(current(1.5), spending=CONFIRMED)
    verdict = judged(current(1.5, 1.0, 1.0), look=2, spending=CONFIRMED)

    assert (suspicion.status, is_settled(suspicion, 1)) == ("REGRESSED", False)
    assert (verdict.status, verdict.runs, verdict.value) == ("PASS", 3, 1.0)


def test_what_a_metric_sees_is_what_the_look_that_decides_sees() -> None:
    """The first look spends little and accuses nobody, so two more runs and their share say what would be caught."""
    first = judged(current(1.0), spending=CONFIRMED)
    second = judged(current(1.0, 1.0, 1.0), look=2, spending=CONFIRMED)
    within = WITHIN  # the second look's runs are not there yet
    standard_error, both = error((SESSION * 1.2, SESSION_FREEDOM), (within * (1 / 2 + 1 / 5), WITHIN_FREEDOM))

    certain = t(1 - CONFIRMED[1] * ALPHA, both) + t(0.8, both)
    assert first.minimum_detectable_effect == pytest.approx(math.expm1(certain * standard_error))
    assert second.minimum_detectable_effect == pytest.approx(first.minimum_detectable_effect, rel=0.05)


def test_a_first_run_that_was_lucky_clears_nobody() -> None:
    assert judged(current(0.9, 1.05, 1.05), look=2, spending=CONFIRMED).value == pytest.approx(1.05)


def test_a_slowdown_that_two_more_runs_confirm_is_settled() -> None:
    verdict = judged(current(1.05, 1.05, 1.05), look=2, spending=CONFIRMED)

    assert (verdict.status, is_settled(verdict, 2)) == ("REGRESSED", True)


def test_a_single_run_counts_at_any_look() -> None:
    assert judged(current(1.05), look=2, spending=CONFIRMED).value == pytest.approx(1.05)


@pytest.mark.parametrize("status", get_args(Status))
@pytest.mark.parametrize("look", [1, 2, 3])
def test_only_doubt_and_a_first_suspicion_are_worth_more_runs(status: Status, look: int) -> None:
    is_open = status == "INCONCLUSIVE" or (status == "REGRESSED" and look == 1)

    assert is_settled(replace(verdict_with(0.03, None), status=status), look) is not is_open


# many metrics


@pytest.mark.parametrize(
    ("metrics", "rejected", "alpha"),
    [
        (0, 0, 0.001),
        (1, 0, 0.001),
        (20, 0, 0.001),  # 0.02 / 20
        (40, 0, 0.0005),
        (200, 0, 0.0001),
        (200, 100, 0.0002),
        (200, 199, 0.001),
        (200, 200, 0.001),
    ],
)
def test_what_the_next_metric_of_a_run_may_spend_is_holms_share(metrics: int, rejected: int, alpha: float) -> None:
    assert alpha_of(metrics, rejected) == pytest.approx(alpha)


@given(metrics=st.integers(0, 10_000), rejected=st.integers(0, 10_000), more=st.integers(0, 10))
def test_the_share_grows_as_metrics_are_rejected_and_is_never_above_that_of_one(
    metrics: int, rejected: int, more: int
) -> None:
    assert 0 < alpha_of(metrics, rejected) <= alpha_of(metrics, rejected + more) <= ALPHA
    assert alpha_of(metrics + more, rejected) <= alpha_of(metrics, rejected)


@given(metrics=st.integers(1, 10_000), changed=st.integers(0, 10_000))
def test_the_unchanged_metrics_of_a_run_are_all_let_go_but_once_in_fifty_runs(metrics: int, changed: int) -> None:
    """At worst all that did change have been rejected already, and the unchanged are independent."""
    assume(changed < metrics)
    unchanged = metrics - changed

    assert 1 - (1 - alpha_of(metrics, changed)) ** unchanged <= ALPHA_OF_A_RUN


def test_a_smaller_share_asks_for_a_larger_difference() -> None:
    slow = current(math.exp(CERTAIN * 1.001), tolerance=0.01)

    assert judged(slow).status == "REGRESSED"
    assert judged(slow, alpha=alpha_of(40)).status == "INCONCLUSIVE"


# drift: from the sixth session on, the first five are compared with, too

LEVELS = accepted(*[[1.0]] * 5, *[[1.02]] * 15)


def test_what_crept_in_is_named_with_the_change_since_the_epoch_began() -> None:
    verdict = judged(current(1.035), LEVELS)

    assert verdict.status == "REGRESSED"
    assert verdict.drift == pytest.approx(0.035)
    assert verdict.change == pytest.approx(1.035 / 1.02**0.75 - 1)
    assert verdict.reason == (
        "2.0 % slower (0.36 % to 3.6 %), tolerance 3.0 %; "
        "drifted: 3.5 % slower (2.8 % to 4.2 %) since this epoch's first 5 sessions."
    )


@pytest.mark.parametrize(
    ("difference", "tolerance", "has_drifted"),
    [
        (MARGIN * 1.001, 0.03, True),
        (MARGIN * 0.999, 0.03, False),
        (t(1 - ALPHA / 2, FREEDOM) * STANDARD_ERROR * 1.001, 0.01, True),
        (t(1 - ALPHA / 2, FREEDOM) * STANDARD_ERROR * 0.999, 0.01, False),
    ],
)
def test_drift_is_what_is_beyond_the_tolerance_of_the_first_five_sessions_alone_and_not_by_chance(
    difference: float, tolerance: float, *, has_drifted: bool
) -> None:
    baseline = accepted(*[[1.0]] * 5, *[[math.exp(difference)]] * 15)

    verdict = judged(current(math.exp(difference), tolerance=tolerance), baseline)

    assert (verdict.status == "REGRESSED") is has_drifted
    assert ("drifted" in verdict.reason) is has_drifted


def test_both_comparisons_share_the_false_alarm_rate() -> None:
    """Six sessions: 5 degrees of freedom that saw nothing, and 8 of the prior."""
    baseline = accepted(*[[1.0]] * 6)
    session = 8 * 0.003**2 / 13
    standard_error, freedom = error((session * 7 / 6, 13), (WITHIN * 7 / 6, WITHIN_FREEDOM))
    limit = t(1 - ALPHA / 2, freedom) * standard_error

    assert judged(current(math.exp(limit * 1.001), tolerance=0.01), baseline).status == "REGRESSED"
    assert judged(current(math.exp(limit * 0.999), tolerance=0.01), baseline).status == "INCONCLUSIVE"


def test_a_regression_beyond_both_is_no_drift() -> None:
    verdict = judged(current(1.1), LEVELS)

    assert verdict.status == "REGRESSED"
    assert verdict.drift == pytest.approx(0.1)
    assert "drifted" not in verdict.reason


def test_five_sessions_know_no_drift() -> None:
    assert judged(current(1.0)).drift is None
    assert judged(current(1.0), accepted(*[[1.0]] * 6)).drift == pytest.approx(0.0)


MODULE, TEST = "test_suite.py", "test_kernel"


def recorded(file: BaselineFile | None, week: int, runs: Sequence[Measurement]) -> BaselineFile:
    """The baselines with one more week's session."""
    for i, run in enumerate(runs):
        process = RunInfo(schema=1, run_id=f"{week}-{i}", date="2026-11-20T00:00:00Z", visit=str(week))
        record = TestRecord(
            key=TestKey(module=MODULE, test=TEST),
            slug="h100",
            devices=("a",),
            environment=HERE,
            measurements=(run,),
            verdicts=(),
        )
        file = append(file, process, record, ["time"])
    assert file is not None
    return file


def alarm(weekly: float, *, weeks: int, stable: int, noise: float = 0.002) -> tuple[int, Verdict]:
    """The first week whose verdict is REGRESSED, of a kernel that gets slower every week after some stable ones.

    Every week is a session of one run, or of all that were made to settle it, and is added to the baseline.
    """
    rng = random.Random(3)
    file = None
    for week in range(-stable, 0):
        file = recorded(file, week, current(math.exp(rng.gauss(0, noise))))
    for week in range(weeks + 1):
        values = [(1 + weekly) ** week * math.exp(rng.gauss(0, noise)) for _ in range(LOOKS[-1])]
        baseline = file.tests[TEST]["time"] if file else None
        for look, made in enumerate(LOOKS, start=1):
            runs = current(*values[:made])
            environments = file.environments if file else {}
            verdict = judge(
                runs,
                baseline,
                environments=environments,
                environment=HERE,
                devices=("a",),
                look=look,
                spending=CONFIRMED,
            )
            if is_settled(verdict, look):
                break
        if verdict.status == "REGRESSED":
            return week, verdict
        file = recorded(file, week, runs)
    pytest.fail(f"not seen in {weeks} weeks, {(1 + weekly) ** weeks - 1:.1%} in all")


def test_two_percent_a_week_are_seen_in_the_second_week_though_no_step_is_beyond_the_tolerance() -> None:
    week, verdict = alarm(0.02, weeks=10, stable=5)

    assert week == 2
    assert verdict.tolerance == 0.03


def test_half_a_percent_a_week_is_seen_when_it_adds_up_to_more_than_the_tolerance() -> None:
    """Without the first five sessions it never would be: fifteen weeks of it are in the baseline."""
    week, verdict = alarm(0.005, weeks=40, stable=5)

    assert week == 7  # 3.6 %
    assert "drifted" in verdict.reason


# the clock


def test_a_slowdown_that_is_none_in_clock_cycles_is_the_clocks() -> None:
    verdict = judged(current(1.05, clock_mhz=1890.0), accepted(*[[1.0]] * 5, clocks_mhz=[1980.0] * 5))

    assert verdict.status == "INVALID"
    assert verdict.change == pytest.approx(0.05)
    assert verdict.reason == (
        "5.0 % slower (4.3 % to 5.7 %) in time, but +0.23 % in clock cycles: the SM clock was 1890 MHz, 1980 MHz in "
        "the baseline. It is the clock that changed: look at heat and power, and whether the code draws more power now."
    )


def test_the_clock_of_a_region_does_not_explain_a_number_that_the_test_recorded() -> None:
    recorded = Method(clock="wall", mode="recorded")
    baseline = replace(accepted(*[[1.0]] * 5, clocks_mhz=[1980.0] * 5), method=recorded)

    assert judged(current(1.05, clock_mhz=1890.0, method=recorded), baseline).status == "REGRESSED"


def test_the_clock_explains_a_rate_as_well_as_a_time() -> None:
    baseline = accepted(*[[500e12]] * 5, unit="FLOP/s", better="higher", clocks_mhz=[1980.0] * 5)

    verdict = judged(current(475e12, unit="FLOP/s", better="higher", clock_mhz=1881.0), baseline)

    assert verdict.status == "INVALID"
    assert verdict.change == pytest.approx(1 / 0.95 - 1)
    assert "but +0.00 % in clock cycles" in verdict.reason


@pytest.mark.parametrize(
    ("value", "clock_mhz"),
    [
        pytest.param(1.05, 1980.0, id="the same clock"),
        pytest.param(1.05, 1976.0, id="a clock that is lower by noise"),
        pytest.param(math.exp(MARGIN * 1.02), 1976.0, id="just beyond the tolerance, and within it in cycles"),
        pytest.param(1.10, 1881.0, id="a clock that explains half of it"),
        pytest.param(1.05, 2079.0, id="a higher clock"),
        pytest.param(1.05, None, id="a clock that is not known"),
    ],
)
def test_a_slowdown_in_clock_cycles_is_a_regression(value: float, clock_mhz: float | None) -> None:
    baseline = accepted(*[[1.0]] * 5, clocks_mhz=[1980.0] * 5)

    assert judged(current(value, clock_mhz=clock_mhz), baseline).status == "REGRESSED"


def test_a_baseline_without_clocks_explains_nothing() -> None:
    assert judged(current(1.05, clock_mhz=1890.0)).status == "REGRESSED"


def test_what_is_not_bound_by_compute_is_not_excused_by_the_clock() -> None:
    baseline = accepted(*[[1.0]] * 5, clocks_mhz=[1980.0] * 5, kind="memory")

    assert judged(current(1.05, clock_mhz=1980.0 / 1.05, kind="memory"), baseline).status == "REGRESSED"


def test_an_improvement_by_a_higher_clock_is_one() -> None:
    baseline = accepted(*[[1.0]] * 5, clocks_mhz=[1890.0] * 5)

    assert judged(current(0.95, clock_mhz=1990.0), baseline).status == "IMPROVED"


def test_the_clock_is_compared_with_that_of_this_gpus_own_sessions() -> None:
    """Of all three, the mean is 1887 MHz: the clock would be the same."""
    baseline = accepted([1.0], [1.0], [1.0], devices="aab", clocks_mhz=[1980.0, 1980.0, 1700.0])

    assert judged(current(1.05, clock_mhz=1887.0), baseline, device="a").status == "INVALID"


def test_drift_at_the_same_clock_is_no_matter_of_the_clock() -> None:
    """Against all sessions the change is within the tolerance, in time and in cycles."""
    verdict = judged(current(1.035, clock_mhz=1980.0), clocked(LEVELS, [1980.0] * 20))

    assert (verdict.status, "drifted" in verdict.reason) == ("REGRESSED", True)


def test_drift_of_the_clock_is_the_clocks() -> None:
    verdict = judged(current(1.035, clock_mhz=1913.0), clocked(LEVELS, [1980.0] * 5 + [1941.0] * 15))

    assert verdict.status == "INVALID"
    assert verdict.reason.startswith("3.5 % slower (2.8 % to 4.2 %) in time, but +0.00 % in clock cycles: the SM clock")
    assert "was 1913 MHz, 1980 MHz in the baseline." in verdict.reason


def clocked(baseline: MetricBaseline, clocks_mhz: Sequence[float]) -> MetricBaseline:
    """The same baseline with one clock a session."""
    sessions = [
        replace(session, runs=tuple(replace(run, sm_clock_mhz=clock) for run in session.runs))
        for session, clock in zip(baseline.sessions, clocks_mhz, strict=True)
    ]
    return replace(baseline, sessions=tuple(sessions))


# faults: baselines that say too little, or too much


@pytest.mark.parametrize(
    ("value", "status", "reason"),
    [
        (1.0, "PASS", "0.00 % slower (-1.1 % to 1.1 %), tolerance 3.0 %."),
        (1.05, "REGRESSED", "5.0 % slower (3.9 % to 6.1 %), tolerance 3.0 %."),
    ],
)
def test_one_session_of_one_run_is_judged_by_the_usual_noise_of_its_kind(
    value: float, status: str, reason: str
) -> None:
    verdict = judged(current(value), accepted([1.0]))

    standard_error, freedom = error((2 * 0.003**2, 8), (2 * WITHIN, WITHIN_FREEDOM))
    assert half_width(verdict) == pytest.approx(t(0.975, freedom) * standard_error)
    assert (verdict.status, verdict.reason, verdict.is_provisional) == (status, reason, True)


def test_values_that_are_all_the_same_are_not_believed_to_be_without_noise() -> None:
    """Twenty sessions of three runs of a memory-bound kernel, and one run: the floor is left between sessions."""
    baseline = accepted(*[[0.003] * 3] * 20)

    verdict = judged(current(0.003, kind="memory"), baseline)

    within = 4.1 * 0.0003**2 / 44.1
    standard_error, freedom = error((0.0003**2 * 21 / 20, 23), (within * (1 + 1 / 60), 44.1))
    assert half_width(verdict) == pytest.approx(t(0.975, freedom) * standard_error)
    assert verdict.status == "PASS"
    assert (verdict.change, verdict.p_value) == pytest.approx((0.0, 0.5))


@pytest.mark.parametrize(
    ("value", "status", "reason"),
    [
        (1.0, "PASS", "29 % faster (-11 % to 55 %), tolerance 3.0 %; low power: sees 182 % at best."),
        (1.5, "INCONCLUSIVE", "not settled by 1 run: more sessions in the baseline may settle it."),
        (4.0, "REGRESSED", "183 % slower (80 % to 345 %), tolerance 3.0 %."),
    ],
)
def test_two_sessions_that_disagree_wildly_decide_nothing_but_what_is_wilder(
    value: float, status: str, reason: str
) -> None:
    verdict = judged(current(value), accepted([1.0], [2.0]))

    assert verdict.baseline_value == pytest.approx(math.sqrt(2))
    assert verdict.status == status
    assert verdict.reason.endswith(reason)


# properties

values = st.floats(0.9, 1.1)
baselines = st.lists(st.tuples(st.sampled_from("ab"), st.lists(values, min_size=1, max_size=3)), min_size=1, max_size=6)
runs = st.lists(values, min_size=1, max_size=6)
kinds = st.sampled_from(get_args(Kind))
Sessions = list[tuple[str, list[float]]]


def outcome(sessions: Sessions, values: Sequence[float], kind: Kind, *, factor: float = 1.0) -> Verdict:
    baseline = accepted(
        *[[value * factor for value in values] for _, values in sessions],
        devices="".join(device for device, _ in sessions),
    )
    return judged(current(*[value * factor for value in values], kind=kind), baseline)


def numbers(verdict: Verdict) -> tuple[float, ...]:
    found = (
        verdict.change,
        verdict.change_low,
        verdict.change_high,
        verdict.minimum_detectable_effect,
        verdict.p_value,
        verdict.drift,
    )
    return tuple(number for number in found if number is not None)


@given(sessions=baselines, values=runs, kind=kinds, factor=st.sampled_from([1e-9, 0.3, 1e12]))
@settings(deadline=None)
def test_the_scale_of_the_values_changes_nothing(
    sessions: Sessions, values: list[float], kind: Kind, factor: float
) -> None:
    before, after = outcome(sessions, values, kind), outcome(sessions, values, kind, factor=factor)

    assert after.status == before.status
    assert numbers(after) == pytest.approx(numbers(before), abs=1e-9)
    assert (after.value, after.baseline_value) == pytest.approx(
        ((before.value or 0.0) * factor, (before.baseline_value or 0.0) * factor)
    )


@given(sessions=baselines, values=runs, kind=kinds)
@settings(deadline=None)
def test_a_rate_is_judged_like_the_time_that_it_is_the_inverse_of(
    sessions: Sessions, values: list[float], kind: Kind
) -> None:
    devices = "".join(device for device, _ in sessions)
    inverse = accepted(
        *[[1 / value for value in one] for _, one in sessions], devices=devices, unit="it/s", better="higher"
    )

    time = outcome(sessions, values, kind)
    rate = judged(current(*[1 / value for value in values], unit="it/s", better="higher", kind=kind), inverse)

    assert rate.status == time.status
    assert numbers(rate) == pytest.approx(numbers(time), abs=1e-9)


@given(sessions=baselines, values=runs, kind=kinds, slowdown=st.floats(1, 2))
@settings(deadline=None)
def test_more_slowdown_never_mends_a_regression(
    sessions: Sessions, values: list[float], kind: Kind, slowdown: float
) -> None:
    slow = [value * 1.2 for value in values]
    assume(outcome(sessions, slow, kind).status == "REGRESSED")

    assert outcome(sessions, [value * slowdown for value in slow], kind).status == "REGRESSED"


@given(sessions=baselines, values=runs, kind=kinds, order=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_the_sessions_does_not_matter(
    sessions: Sessions, values: list[float], kind: Kind, order: random.Random
) -> None:
    """But for the drift: which sessions were first is what it is about."""
    shuffled = order.sample(sessions, len(sessions))

    before, after = (replace(outcome(one, values, kind), drift=None) for one in (sessions, shuffled))

    assert numbers(after) == pytest.approx(numbers(before), abs=1e-9)


@given(sessions=baselines, values=runs, kind=kinds)
@settings(deadline=None)
def test_the_interval_holds_the_change_and_agrees_with_the_verdict(
    sessions: Sessions, values: list[float], kind: Kind
) -> None:
    verdict = outcome(sessions, values, kind)
    change, low, high, detectable, p_value = numbers(verdict)[:5]

    assert low < change < high
    assert detectable > 0
    assert (p_value < 0.5) is (change > 0) or change == pytest.approx(0, abs=1e-9)
    assert (p_value < 0.025) is (low > 0) or low == pytest.approx(0, abs=1e-9)
    if verdict.status == "REGRESSED" and "drifted" in verdict.reason:
        assert (verdict.drift or 0.0) > verdict.tolerance
    elif verdict.status == "REGRESSED":
        assert p_value < ALPHA
        assert change > verdict.tolerance
    if verdict.status == "IMPROVED":
        assert high < 0
    if verdict.status == "PASS":
        assert change < verdict.tolerance


@given(sessions=baselines, values=runs, kind=kinds)
@settings(deadline=None)
def test_one_more_run_that_agrees_with_the_rest_hardly_ever_widens_the_interval(
    sessions: Sessions, values: list[float], kind: Kind
) -> None:
    """The error is less, but it may rest more on sessions, of which less is known: up to 7 %, of one session."""
    mean = math.exp(fmean(math.log(value) for value in values))

    before, after = outcome(sessions, values, kind), outcome(sessions, [*values, mean], kind)

    assert half_width(after) <= half_width(before) * 1.07


# error rates, simulated


def noise_of(kind: Kind) -> tuple[float, float]:
    """What the package expects between sessions and between runs, as relative standard deviations."""
    prior = PRIORS[kind]
    return prior.session.deviation, prior.within.deviation


def drawn(kind: Kind, rng: random.Random) -> tuple[float, float]:
    """The noise of one metric of a kind whose metrics differ as much as the package expects."""
    prior = PRIORS[kind]
    spread = [level.worth / rng.gammavariate(level.worth / 2, 2) for level in (prior.session, prior.within)]
    return prior.session.deviation * math.sqrt(spread[0]), prior.within.deviation * math.sqrt(spread[1])


def session_of(count: int, noise: tuple[float, float], rng: random.Random) -> list[float]:
    """Values of the runs of one session."""
    session, within = noise
    of_session = rng.gauss(0, session)
    return [math.exp(of_session + rng.gauss(0, within)) for _ in range(count)]


def simulated(
    noise: Callable[[random.Random], tuple[float, float]],
    kind: Kind,
    *,
    slowdown: float,
    tolerance: float,
    spending: tuple[float, ...] = CONFIRMED,
    repeats: int,
) -> list[Verdict]:
    """Verdicts on five sessions of one run and a current session that is measured again until it is settled."""
    rng = random.Random(2026)

    def last_verdict() -> Verdict:
        here = noise(rng)
        baseline = accepted(*[session_of(1, here, rng) for _ in range(5)])
        values = [(1 + slowdown) * value for value in session_of(LOOKS[-1], here, rng)]
        now = current(*values, kind=kind, tolerance=tolerance)
        for look, made in enumerate(LOOKS[: len(spending)], start=1):
            verdict = judged(now[:made], baseline, look=look, spending=spending)
            if is_settled(verdict, look):
                break
        return verdict

    return [last_verdict() for _ in range(repeats)]


def share(verdicts: Sequence[Verdict], status: Status) -> float:
    return fmean(verdict.status == status for verdict in verdicts)


def coverage(verdicts: Sequence[Verdict], change: float) -> float:
    return fmean((one.change_low or 0.0) < change < (one.change_high or 0.0) for one in verdicts)


@pytest.mark.parametrize("within", [0.0018, 0.0025], ids=["as expected", "a third more between runs"])
def test_an_unchanged_kernel_is_red_less_than_once_in_a_thousand_with_hardly_any_tolerance(within: float) -> None:
    verdicts = simulated(lambda _: (0.003, within), "compute", slowdown=0.0, tolerance=0.0005, repeats=1000)

    assert share(verdicts, "REGRESSED") <= ALPHA


def test_an_unchanged_kernel_is_hardly_more_often_red_where_each_metric_has_noise_of_its_own() -> None:
    verdicts = simulated(lambda rng: drawn("compute", rng), "compute", slowdown=0.0, tolerance=0.0005, repeats=1000)

    assert share(verdicts, "REGRESSED") <= 2 * ALPHA


@pytest.mark.parametrize("kind", ["compute", "memory"])
def test_an_unchanged_kernel_passes_with_the_usual_tolerance(kind: Kind) -> None:
    verdicts = simulated(lambda _: noise_of(kind), kind, slowdown=0.0, tolerance=0.03, repeats=500)

    assert Counter((verdict.status, verdict.is_low_power) for verdict in verdicts) == {("PASS", False): 500}


def test_the_interval_holds_the_true_change_as_often_as_it_says() -> None:
    verdicts = simulated(
        lambda _: noise_of("compute"), "compute", slowdown=0.02, tolerance=0.03, spending=ONCE, repeats=1000
    )

    assert coverage(verdicts, 0.02) >= 0.95


def test_the_interval_holds_nearly_as_often_where_each_metric_has_noise_of_its_own() -> None:
    verdicts = simulated(
        lambda rng: drawn("compute", rng), "compute", slowdown=0.02, tolerance=0.03, spending=ONCE, repeats=1000
    )

    assert coverage(verdicts, 0.02) >= 0.93


def test_three_percent_of_a_compute_kernel_are_seen_with_a_tolerance_of_two() -> None:
    verdicts = simulated(lambda _: noise_of("compute"), "compute", slowdown=0.03, tolerance=0.02, repeats=300)

    assert share(verdicts, "REGRESSED") >= 0.98
    assert share(verdicts, "PASS") == 0


def test_two_percent_of_a_memory_kernel_are_always_seen() -> None:
    verdicts = simulated(lambda _: noise_of("memory"), "memory", slowdown=0.02, tolerance=0.01, repeats=300)

    assert share(verdicts, "REGRESSED") == 1


def test_a_slowdown_of_the_tolerance_passes_once_in_twenty_at_most() -> None:
    verdicts = simulated(
        lambda _: noise_of("compute"), "compute", slowdown=0.03, tolerance=0.03, spending=ONCE, repeats=1000
    )

    assert share(verdicts, "PASS") <= 0.05


def test_the_detectable_effect_is_detected_with_the_power_that_it_promises() -> None:
    rng, noise = random.Random(2026), noise_of("compute")

    def is_seen() -> bool:
        baseline, (value,) = accepted(*[session_of(1, noise, rng) for _ in range(5)]), session_of(1, noise, rng)
        effect = judged(current(value), baseline).minimum_detectable_effect or 0.0
        return judged(current(value * (1 + effect), tolerance=0.0005), baseline).status == "REGRESSED"

    assert fmean(is_seen() for _ in range(1000)) == pytest.approx(0.8, abs=0.04)
