"""Statistics against scipy, against cases computed by hand, and against properties that must always hold."""

import math
import random
from itertools import accumulate
from statistics import NormalDist, fmean, median

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpuperf.errors import MeasurementError
from pytest_gpuperf.stats import (
    Interval,
    LevelSquares,
    SessionLogs,
    Variance,
    VarianceComponents,
    level_squares,
    mean_interval,
    mean_of_known,
    median_interval,
    normal_quantile,
    predict,
    relative_half_width,
    t_probability,
    t_quantile,
    variance_components,
)

positive = st.floats(min_value=1e-6, max_value=1e6)
session_logs = st.builds(
    SessionLogs,
    device_group=st.sampled_from("abc"),
    logs=st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=4).map(tuple),
)
baselines = st.lists(session_logs, min_size=1, max_size=8)


def components(
    *,
    within: float = 0.01,
    session: float = 0.02,
    device: float = 0.05,
    worth: tuple[float, float, float] = (10.0, 10.0, 10.0),
) -> VarianceComponents:
    """Three variances, and the degrees of freedom that they are worth in the same order."""
    levels = [
        Variance(value=value, degrees_of_freedom=freedom)
        for value, freedom in zip((within, session, device), worth, strict=True)
    ]
    return VarianceComponents(within=levels[0], session=levels[1], device=levels[2])


def sessions_on(*groups: str, logs: tuple[float, ...] = (0.0,)) -> list[SessionLogs]:
    return [SessionLogs(device_group=group, logs=logs) for group in groups]


# Student t and normal


@pytest.mark.parametrize("degrees_of_freedom", [1, 1.5, 2, 3, 4, 5, 9, 10, 14, 29.5, 60, 120, 200])
@pytest.mark.parametrize("probability", [0.501, 0.6, 0.8, 0.95, 0.975, 0.999, 1 - 0.001 / 3, 0.99999])
def test_t_quantile_agrees_with_scipy(probability: float, degrees_of_freedom: float) -> None:
    expected = scipy.stats.t.ppf(probability, degrees_of_freedom)

    assert t_quantile(probability, degrees_of_freedom) == pytest.approx(expected, rel=1e-9)


@given(probability=st.floats(0.5, 0.99999), degrees_of_freedom=st.floats(1, 200))
@settings(deadline=None)
def test_t_quantile_is_inverted_by_the_distribution_function(probability: float, degrees_of_freedom: float) -> None:
    quantile = t_quantile(probability, degrees_of_freedom)

    assert scipy.stats.t.sf(quantile, degrees_of_freedom) == pytest.approx(1 - probability, rel=1e-6)


def test_t_quantile_of_one_degree_of_freedom_is_a_tangent() -> None:
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)


def test_t_quantile_is_symmetric_about_zero() -> None:
    assert t_quantile(0.5, 7) == 0
    assert t_quantile(0.025, 7) == pytest.approx(-t_quantile(0.975, 7), rel=1e-12)


@pytest.mark.parametrize(("probability", "degrees_of_freedom"), [(0.0, 5), (1.0, 5), (math.nan, 5), (0.9, 0.5)])
def test_t_quantile_refuses_what_it_cannot_answer(probability: float, degrees_of_freedom: float) -> None:
    with pytest.raises(ValueError, match=r"need 0 < probability < 1, degrees_of_freedom >= 1\.$"):
        t_quantile(probability, degrees_of_freedom)


def test_normal_quantile_agrees_with_scipy() -> None:
    assert normal_quantile(0.975) == pytest.approx(scipy.stats.norm.ppf(0.975), rel=1e-9)


@pytest.mark.parametrize("degrees_of_freedom", [1, 1.3, 2, 5, 13.7, 30, 120, 300])
@pytest.mark.parametrize("t", [0.0, 1e-12, 0.01, 0.5, 1.0, 3.0, 30.0, 1e4])
def test_t_probability_agrees_with_scipy_on_both_sides(t: float, degrees_of_freedom: float) -> None:
    for signed in (t, -t):
        expected = float(scipy.stats.t.cdf(signed, degrees_of_freedom))
        assert t_probability(signed, degrees_of_freedom) == pytest.approx(expected, rel=1e-9)


@given(probability=st.floats(1e-6, 1 - 1e-6), degrees_of_freedom=st.floats(1, 200))
@settings(deadline=None)
def test_t_probability_inverts_t_quantile(probability: float, degrees_of_freedom: float) -> None:
    quantile = t_quantile(probability, degrees_of_freedom)

    assert t_probability(quantile, degrees_of_freedom) == pytest.approx(probability, rel=1e-8)


def test_t_probability_of_a_far_tail_keeps_its_digits() -> None:
    assert t_probability(-50, 20) == pytest.approx(float(scipy.stats.t.cdf(-50, 20)), rel=1e-9, abs=0)
    assert 0 < t_probability(-50, 20) < 1e-20


# intervals


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [
        (1, 1, 1),
        (5, 1, 5),  # 2 * 2**-5 = 6.3 %: even the extremes do not reach 95 %
        (6, 1, 6),  # 2 * 2**-6 = 3.1 %
        (10, 2, 9),  # 2 * (1 + 10) * 2**-10 = 2.1 %; the next pair would be 10.9 %
        (100, 40, 61),
    ],
)
def test_median_interval_takes_the_ranks_worked_out_by_hand(count: int, low: int, high: int) -> None:
    shuffled = random.Random(1).sample(range(1, count + 1), count)

    assert median_interval(shuffled) == Interval(low=low, centre=(count + 1) / 2, high=high)


@given(count=st.integers(6, 2000))
@settings(deadline=None)
def test_median_interval_is_no_narrower_than_the_binomial_distribution_asks(count: int) -> None:
    exact = int(scipy.stats.binom.ppf(0.025, count, 0.5))  # fewest samples below that are not too rare

    rank = median_interval(range(1, count + 1)).low

    assert exact - (count > 100) <= rank <= exact


@given(samples=st.lists(positive, min_size=1), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_median_interval_holds_the_median_and_scales_with_the_samples(samples: list[float], factor: float) -> None:
    interval = median_interval(samples)

    assert interval.low <= median(samples) == interval.centre <= interval.high
    scaled = median_interval([sample * factor for sample in samples])
    assert scaled == Interval(low=interval.low * factor, centre=interval.centre * factor, high=interval.high * factor)


def test_median_interval_is_narrower_at_a_lower_confidence() -> None:
    samples = range(1, 51)

    assert median_interval(samples, confidence=0.5).low > median_interval(samples).low


def test_median_interval_without_samples_says_that_nothing_was_measured() -> None:
    with pytest.raises(MeasurementError, match=r"^No samples: nothing was measured, so there is no median\.$"):
        median_interval([])


def test_mean_interval_of_two_batches_is_the_one_worked_out_by_hand() -> None:
    # batch means 1.5 and 3.5: standard deviation sqrt(2), over sqrt(2) batches: half the width is t itself
    half = math.tan(math.pi * 0.475)  # 12.7, Student t with one degree of freedom

    interval = mean_interval([1.0, 2.0, 3.0, 4.0], batches=2)

    assert interval.centre == 2.5
    assert (interval.low, interval.high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-12)


@given(samples=st.lists(positive, min_size=2, max_size=10))
@settings(deadline=None)
def test_mean_interval_of_few_samples_is_the_usual_one(samples: list[float]) -> None:
    error = scipy.stats.sem(samples)
    half = scipy.stats.t.ppf(0.975, len(samples) - 1) * error

    interval = mean_interval(samples)

    assert interval.high - interval.centre == pytest.approx(half, rel=1e-6, abs=1e-9 * fmean(samples))


@given(samples=st.lists(positive, min_size=11, max_size=40))
def test_mean_interval_leaves_no_sample_out(samples: list[float]) -> None:
    assert mean_interval(samples).centre == pytest.approx(fmean(samples))
    moved = mean_interval([*samples[:-1], samples[-1] * 2])
    assert moved.centre > mean_interval(samples).centre


def test_mean_interval_covers_the_mean_of_samples_that_resemble_their_neighbours() -> None:
    rng = random.Random(3)

    def series() -> list[float]:  # autoregressive, 0.9 from one sample to the next, mean 100
        shocks = [rng.gauss(0, 1) for _ in range(600)]
        return [100 + x for x in accumulate(shocks, lambda x, shock: 0.9 * x + shock)][100:]

    batched = [mean_interval(series()) for _ in range(400)]
    naive = [mean_interval(series(), batches=500) for _ in range(400)]

    assert fmean(one.low < 100 < one.high for one in batched) > 0.9
    assert fmean(one.low < 100 < one.high for one in naive) < 0.5


@pytest.mark.parametrize("samples", [[], [1.0]])
def test_mean_interval_of_fewer_than_two_samples_says_what_it_needs(samples: list[float]) -> None:
    expected = rf"^{len(samples)} samples: an interval of the mean needs two or more\. Measure for longer\.$"
    with pytest.raises(MeasurementError, match=expected):
        mean_interval(samples)


def test_relative_half_width_is_a_fraction_of_the_centre() -> None:
    assert relative_half_width(Interval(low=9.0, centre=10.0, high=11.0)) == pytest.approx(0.1)


# variance components


def test_variance_components_are_those_worked_out_by_hand() -> None:
    prior = components(within=1.0, session=2.0, device=3.0, worth=(10, 4, 6))

    found = variance_components(BY_HAND, prior=prior, floor=0.0)

    # within: three sums of squares of 2 with 1 degree of freedom each, and 10 times the prior of 1
    within = (6 + 10 * 1) / 13
    # session: means 1 and 5 of GPU a have 8 squares, less within / 2 runs; 1 degree of freedom, 4 times the prior 2
    session = (8 - within / 2 + 4 * 2) / 5
    # device: means 3 and 12 have variance 40.5, less what sessions add: half a session mean's variance, and a whole one
    of_a_session = session + within / 2
    device = (40.5 - (of_a_session / 2 + of_a_session) / 2 + 6 * 3) / 7
    assert levels_of(found) == pytest.approx([within, 13, session, 5, device, 7])


BY_HAND = [
    SessionLogs(device_group="a", logs=(0.0, 2.0)),
    SessionLogs(device_group="a", logs=(4.0, 6.0)),
    SessionLogs(device_group="b", logs=(11.0, 13.0)),
]


def levels_of(found: VarianceComponents) -> list[float]:
    """Value and degrees of freedom of within, session and device."""
    levels = (found.within, found.session, found.device)
    return [number for level in levels for number in (level.value, level.degrees_of_freedom)]


def test_the_runs_that_are_judged_say_how_runs_differ_too() -> None:
    prior = components(within=1.0, session=2.0, device=3.0, worth=(10, 4, 6))

    found = variance_components(sessions_on("a"), prior=prior, floor=0.0, current=(7.0, 9.0, 11.0))

    assert found.within == Variance(value=(8 + 10 * 1) / 12, degrees_of_freedom=12)  # squares 4 + 0 + 4
    assert (found.session, found.device) == (prior.session, prior.device)


@pytest.mark.parametrize("current", [(), (3.0,)])
def test_a_single_run_that_is_judged_says_nothing_of_noise(current: tuple[float, ...]) -> None:
    assert variance_components(BY_HAND, prior=components(), floor=0.0, current=current) == variance_components(
        BY_HAND, prior=components(), floor=0.0
    )


def test_a_single_session_says_nothing_so_the_prior_stands() -> None:
    prior = components(worth=(3, 4, 5))

    assert variance_components(sessions_on("a"), prior=prior, floor=0.0) == prior


def test_sessions_that_agree_to_the_last_digit_are_not_believed_below_the_floor() -> None:
    found = variance_components(sessions_on(*"aaaaa"), prior=components(session=1e-12), floor=0.0005)

    assert found.session == Variance(value=0.0005**2, degrees_of_freedom=14)


def test_sessions_that_agree_better_than_their_runs_leave_the_prior_its_share() -> None:
    """A raw variance is never below zero: squares of 0.02 between sessions, where runs alone would make 0.5."""
    sessions = [SessionLogs(device_group="a", logs=(mean - 1, mean + 1)) for mean in (0.0, 0.2)]

    found = variance_components(sessions, prior=components(session=2.0, worth=(1, 4, 1)), floor=0.0)

    assert found.session == Variance(value=4 * 2 / 5, degrees_of_freedom=5)


def test_sessions_of_one_visit_are_one_session_that_says_nothing_of_visits() -> None:
    visits = [SessionLogs(device_group="a", logs=(log,), visit="v") for log in (0.0, 2.0)]
    prior = components(within=1.0, worth=(10, 4, 6))

    found = variance_components(visits, prior=prior, floor=0.0)

    assert found.within == Variance(value=(2 + 10 * 1) / 11, degrees_of_freedom=11)
    assert found.session == prior.session


def test_level_squares_are_those_worked_out_by_hand() -> None:
    assert level_squares(BY_HAND) == LevelSquares(
        within=Variance(value=2.0, degrees_of_freedom=3),
        session=Variance(value=8.0, degrees_of_freedom=1),
        device=Variance(value=40.5, degrees_of_freedom=1),
        runs_a_session=2.0,
        sessions_a_device=4 / 3,  # harmonic mean of 2 and 1
    )


def test_level_squares_of_one_run_show_no_level() -> None:
    nothing = Variance(value=0.0, degrees_of_freedom=0)

    found = level_squares(sessions_on("a"))

    assert (found.within, found.session, found.device) == (nothing, nothing, nothing)


@given(sessions=baselines)
def test_every_degree_of_freedom_of_the_values_is_counted_once(sessions: list[SessionLogs]) -> None:
    found = level_squares(sessions)

    freedom = sum(level.degrees_of_freedom for level in (found.within, found.session, found.device))
    assert freedom == sum(len(session.logs) for session in sessions) - 1


def test_many_sessions_outweigh_a_wrong_prior() -> None:
    rng = random.Random(5)
    sessions = []
    for device in range(60):
        of_device = rng.gauss(0, 0.05)
        for _ in range(10):
            of_session = of_device + rng.gauss(0, 0.02)
            logs = tuple(of_session + rng.gauss(0, 0.01) for _ in range(4))
            sessions.append(SessionLogs(device_group=device, logs=logs))

    found = variance_components(sessions, prior=components(within=0.0, session=0.0, device=0.05**2), floor=0.0)

    assert math.sqrt(found.within.value) == pytest.approx(0.01, rel=0.05)
    assert math.sqrt(found.session.value) == pytest.approx(0.02, rel=0.05)
    assert math.sqrt(found.device.value) == pytest.approx(0.05, rel=0.15)


@given(sessions=baselines, shift=st.floats(-5, 5))
def test_a_common_factor_leaves_every_variance_as_it_was(sessions: list[SessionLogs], shift: float) -> None:
    moved = [
        SessionLogs(device_group=one.device_group, logs=tuple(log + shift for log in one.logs)) for one in sessions
    ]

    before = variance_components(sessions, prior=components(), floor=0.0)
    after = variance_components(moved, prior=components(), floor=0.0)

    assert levels_of(after) == pytest.approx(levels_of(before))


# prediction


@pytest.mark.parametrize(("count", "runs", "current_runs"), [(1, 1, 1), (5, 1, 3), (5, 4, 1), (20, 3, 6)])
def test_balanced_sessions_on_the_same_gpu_give_the_textbook_error(count: int, runs: int, current_runs: int) -> None:
    sessions = [SessionLogs(device_group="a", logs=(float(i),) * runs) for i in range(count)]

    found = predict(sessions, components(), device_group="a", current_runs=current_runs)

    expected = 0.02 * (1 + 1 / count) + 0.01 * (1 / current_runs + 1 / (count * runs))
    assert found.standard_error**2 == pytest.approx(expected)
    assert found.expected_log == pytest.approx((count - 1) / 2)


def test_an_unseen_gpu_adds_the_spread_between_gpus_twice() -> None:
    sessions = sessions_on(*"aaaaa")

    same = predict(sessions, components(), device_group="a", current_runs=1)
    unseen = predict(sessions, components(), device_group="b", current_runs=1)

    # once for the new GPU and once for the only GPU known
    assert unseen.standard_error**2 == pytest.approx(same.standard_error**2 + 2 * 0.05)


@pytest.mark.parametrize(("runs", "current_runs"), [(1, 1), (3, 1), (2, 6)])
def test_against_its_own_visit_alone_only_what_differs_between_runs_counts(runs: int, current_runs: int) -> None:
    sessions = [SessionLogs(device_group="a", logs=(1.0,) * runs, visit="v")]

    found = predict(sessions, components(), device_group="a", current_runs=current_runs, visit="v")

    assert found.standard_error**2 == pytest.approx(0.01 * (1 / current_runs + 1 / runs))
    assert found.expected_log == pytest.approx(1.0)


@pytest.mark.parametrize("visit", ["w", None])
def test_another_visit_shares_no_session(visit: str | None) -> None:
    sessions = [SessionLogs(device_group="a", logs=(1.0,), visit="v"), SessionLogs(device_group="a", logs=(0.0,))]
    named = [SessionLogs(device_group="a", logs=one.logs, visit=str(i)) for i, one in enumerate(sessions)]

    other = predict(named, components(), device_group="a", current_runs=1, visit=visit)

    assert other == predict(sessions, components(), device_group="a", current_runs=1)


def test_the_same_visit_on_another_gpu_shares_no_session() -> None:
    sessions = [SessionLogs(device_group="a", logs=(1.0,), visit="v")]

    there = predict(sessions, components(), device_group="b", current_runs=1, visit="v")

    assert there == predict(sessions, components(), device_group="b", current_runs=1)


def test_the_session_of_the_same_visit_weighs_more_by_what_it_shares() -> None:
    sessions = [
        SessionLogs(device_group="a", logs=(1.0,), visit="v"),
        SessionLogs(device_group="a", logs=(0.0,), visit="w"),
    ]

    found = predict(sessions, components(), device_group="a", current_runs=1, visit="v")

    shared = 0.02 / (0.02 + 0.01)  # of a session's own variance; the rest is split between the two
    assert found.expected_log == pytest.approx(shared + (1 - shared) / 2)


@pytest.mark.parametrize("count", [2, 5])
def test_sessions_of_one_visit_share_its_deviation_with_each_other_too(count: int) -> None:
    sessions = [SessionLogs(device_group="a", logs=(float(i),), visit="v") for i in range(count)]

    found = predict(sessions, components(), device_group="a", current_runs=1, visit="v")

    assert found.standard_error**2 == pytest.approx(0.01 * (1 + 1 / count))


def test_what_is_not_known_counts_for_no_mean_and_zero_does() -> None:
    assert mean_of_known([None, 1.0, 0.0, 2.0]) == 1.0
    assert mean_of_known([None]) is None
    assert mean_of_known([]) is None


def test_a_session_of_the_same_gpu_weighs_more_by_what_it_shares() -> None:
    sessions = [SessionLogs(device_group="a", logs=(1.0,)), SessionLogs(device_group="b", logs=(0.0,))]

    found = predict(sessions, components(), device_group="a", current_runs=1)

    shared = 0.05 / (0.05 + 0.02 + 0.01)  # of a session mean's variance; the rest is split between the two
    assert found.expected_log == pytest.approx(shared + (1 - shared) / 2)


def test_without_a_difference_between_gpus_every_session_weighs_the_same() -> None:
    sessions = [SessionLogs(device_group=group, logs=(float(i),)) for i, group in enumerate("abc")]

    assert predict(sessions, components(device=0.0), device_group="a", current_runs=1).expected_log == pytest.approx(1)


def test_a_session_of_more_runs_weighs_more() -> None:
    sessions = [SessionLogs(device_group="a", logs=(1.0,) * 9), SessionLogs(device_group="a", logs=(0.0,))]

    assert predict(sessions, components(), device_group="a", current_runs=1).expected_log > 0.5


@given(sessions=baselines, runs=st.integers(1, 6), nudge=st.lists(st.floats(-0.5, 0.5), min_size=8, max_size=8))
@settings(deadline=None)
def test_no_other_unbiased_weights_have_a_smaller_error(
    sessions: list[SessionLogs], runs: int, nudge: list[float]
) -> None:
    count = len(sessions)
    unit = [
        [SessionLogs(device_group=s.device_group, logs=(float(i == j),) * len(s.logs)) for j, s in enumerate(sessions)]
        for i in range(count)
    ]
    found = [predict(one, components(), device_group="a", current_runs=runs) for one in unit]
    weights = [one.expected_log for one in found]
    others = [weight + by - fmean(nudge[:count]) for weight, by in zip(weights, nudge[:count], strict=True)]

    assert sum(weights) == pytest.approx(1)
    assert found[0].standard_error ** 2 == pytest.approx(squared_error(weights, sessions, runs))
    assert squared_error(others, sessions, runs) >= found[0].standard_error ** 2 * (1 - 1e-9)


def squared_error(weights: list[float], sessions: list[SessionLogs], runs: int) -> float:
    """Variance of the current mean on GPU a less the weighted sessions, written out from the three levels."""
    on = {group: sum(w for w, s in zip(weights, sessions, strict=True) if s.device_group == group) for group in "abc"}
    of_devices = 0.05 * ((1 - on["a"]) ** 2 + on["b"] ** 2 + on["c"] ** 2)
    of_sessions = sum(w**2 * (0.02 + 0.01 / len(s.logs)) for w, s in zip(weights, sessions, strict=True))
    return of_devices + of_sessions + 0.02 + 0.01 / runs


# degrees of freedom of a prediction


@pytest.mark.parametrize(("count", "runs", "current_runs"), [(1, 1, 1), (5, 1, 3), (20, 3, 6)])
def test_degrees_of_freedom_are_satterthwaites_worked_out_by_hand(count: int, runs: int, current_runs: int) -> None:
    sessions = sessions_on(*"a" * count, logs=(0.0,) * runs)

    found = predict(sessions, components(worth=(12, 5, 3)), device_group="a", current_runs=current_runs)

    of_sessions, of_runs = 0.02 * (1 + 1 / count), 0.01 * (1 / current_runs + 1 / (count * runs))
    expected = (of_sessions + of_runs) ** 2 / (of_sessions**2 / 5 + of_runs**2 / 12)
    assert found.degrees_of_freedom == pytest.approx(expected)


def test_on_an_unseen_gpu_what_is_known_of_gpus_counts() -> None:
    found = predict(sessions_on("a"), components(worth=(12, 5, 3)), device_group="b", current_runs=1)

    parts = {12: 0.01 * 2, 5: 0.02 * 2, 3: 0.05 * 2}
    expected = sum(parts.values()) ** 2 / sum(part**2 / freedom for freedom, part in parts.items())
    assert found.degrees_of_freedom == pytest.approx(expected)


def test_against_its_own_visit_alone_only_what_is_known_of_runs_counts() -> None:
    sessions = [SessionLogs(device_group="a", logs=(0.0, 0.0), visit="v")]

    found = predict(sessions, components(worth=(12, 5, 3)), device_group="a", current_runs=3, visit="v")

    assert found.degrees_of_freedom == pytest.approx(12)


def test_degrees_of_freedom_are_one_at_least() -> None:
    found = predict(sessions_on("a"), components(worth=(0.5, 0.5, 0.5), within=1e-9), device_group="a", current_runs=1)

    assert found.degrees_of_freedom == 1


@given(
    sessions=baselines,
    runs=st.integers(1, 6),
    worth=st.tuples(st.floats(1, 30), st.floats(1, 30), st.floats(1, 30)),
    device=st.sampled_from("abz"),
)
@settings(deadline=None)
def test_degrees_of_freedom_lie_between_the_least_and_the_sum_of_the_levels(
    sessions: list[SessionLogs], runs: int, worth: tuple[float, float, float], device: str
) -> None:
    found = predict(sessions, components(worth=worth), device_group=device, current_runs=runs)

    assert min(worth) * (1 - 1e-9) <= found.degrees_of_freedom <= sum(worth) * (1 + 1e-9)


@given(sessions=baselines, runs=st.integers(1, 5), more=session_logs)
@settings(deadline=None)
def test_more_runs_and_more_sessions_never_make_a_prediction_worse(
    sessions: list[SessionLogs], runs: int, more: SessionLogs
) -> None:
    def error(sessions: list[SessionLogs], runs: int) -> float:
        return predict(sessions, components(), device_group="a", current_runs=runs).standard_error

    assert error(sessions, runs + 1) < error(sessions, runs)
    assert error([*sessions, more], runs) <= error(sessions, runs) * (1 + 1e-9)


def test_the_error_of_a_prediction_is_the_one_that_simulated_sessions_have() -> None:
    """GPU a three times, GPU b once; one session of a is of the visit that is judged, another shares a visit."""
    rng = random.Random(4)
    within, session, device = (math.sqrt(variance) for variance in (0.01, 0.02, 0.05))
    plan = [("a", "now", 2), ("a", "u", 1), ("a", "u", 3), ("b", "w", 4)]
    current_runs = 3

    def missed_by() -> float:
        of_device = {name: rng.gauss(0, device) for name in "ab"}
        of_visit = {name: rng.gauss(0, session) for name in ("now", "u", "w")}

        def drawn(group: str, visit: str, count: int) -> tuple[float, ...]:
            return tuple(of_device[group] + of_visit[visit] + rng.gauss(0, within) for _ in range(count))

        sessions = [SessionLogs(device_group=one[0], visit=one[1], logs=drawn(*one)) for one in plan]
        expected = predict(sessions, components(), device_group="a", current_runs=current_runs, visit="now")
        errors.append(expected.standard_error)
        return fmean(drawn("a", "now", current_runs)) - expected.expected_log

    errors: list[float] = []
    misses = [missed_by() for _ in range(4000)]

    assert fmean(misses) == pytest.approx(0, abs=4 * errors[0] / math.sqrt(4000))
    assert fmean(miss**2 for miss in misses) == pytest.approx(errors[0] ** 2, rel=0.09)  # four standard errors


@pytest.mark.parametrize("probability", [0.95, 0.999])
def test_an_interval_from_estimated_variances_misses_as_often_as_it_says(probability: float) -> None:
    """Variances that are known by 8 and by 5 degrees of freedom alone, as of a metric with few sessions."""
    rng = random.Random(6)
    sessions = sessions_on(*"aaaaa")

    true = NormalDist(sigma=math.sqrt((0.02 + 0.01) * 1.2))

    def chance_of_a_miss() -> float:
        estimated = components(
            within=0.01 * rng.gammavariate(4, 2) / 8, session=0.02 * rng.gammavariate(2.5, 2) / 5, worth=(8, 5, 10)
        )
        found = predict(sessions, estimated, device_group="a", current_runs=1)
        return true.cdf(-t_quantile(probability, found.degrees_of_freedom) * found.standard_error)

    # Satterthwaite's t is an approximation: far out it may err by a fifth
    assert fmean(chance_of_a_miss() for _ in range(4000)) == pytest.approx(1 - probability, rel=0.2)
