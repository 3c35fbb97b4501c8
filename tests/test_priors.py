"""What is known of noise: the figures of the package, what baselines teach, and files that cannot be trusted."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import get_args

import msgspec
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.priors import (
    LEAST_DEGREES_OF_FREEDOM,
    MOST_DEGREES_OF_FREEDOM,
    Level,
    Prior,
    Priors,
    common_variance,
    digamma,
    inverse_trigamma,
    learn,
    package_priors,
    prior_of,
    priors_path,
    read_priors,
    trigamma,
)
from pytest_gpuperf.records import BaselineRun, Kind, Method, MetricBaseline, Session
from pytest_gpuperf.stats import Variance
from pytest_gpuperf.units import Better

ORIGIN = "24 metrics of baselines/h100, 2026-11-21"
positive = st.floats(1e-3, 1e6)


def baseline(
    *sessions: Sequence[float], devices: str = "", kind: Kind = "compute", better: Better = "lower"
) -> MetricBaseline:
    """One metric with sessions of run values, each its own visit, on the GPUs named by one letter each."""
    return MetricBaseline(
        unit="s",
        better=better,
        kind=kind,
        method=Method(clock="cuda-events", mode="sustained"),
        sessions=tuple(
            Session(
                date="2026-11-20T00:00:00Z",
                visit=str(i),
                devices=(devices[i] if devices else "a",),
                environment="h100",
                runs=tuple(BaselineRun(value=value) for value in values),
            )
            for i, values in enumerate(sessions)
        ),
    )


def learned(*baselines: MetricBaseline, is_cpu: bool = False, before: Priors | None = None) -> Prior:
    """What metrics of one kind teach."""
    (prior,) = learn(baselines, before=before or package_priors(), is_cpu=is_cpu, origin=ORIGIN).values()
    return prior


def pair(deviation: float) -> tuple[float, float]:
    """Two values whose logarithms have this standard deviation."""
    return math.exp(deviation / math.sqrt(2)), math.exp(-deviation / math.sqrt(2))


# special functions, with scipy as the oracle


@given(x=positive)
@settings(deadline=None)
def test_digamma_agrees_with_scipy(x: float) -> None:
    assert digamma(x) == pytest.approx(float(scipy.special.digamma(x)), rel=1e-9, abs=1e-9)


@given(x=positive)
@settings(deadline=None)
def test_trigamma_agrees_with_scipy(x: float) -> None:
    assert trigamma(x) == pytest.approx(float(scipy.special.polygamma(1, x)), rel=1e-9)


@given(y=st.floats(1e-7, 1e7))
@settings(deadline=None)
def test_inverse_trigamma_is_where_scipys_trigamma_is_the_number(y: float) -> None:
    assert float(scipy.special.polygamma(1, inverse_trigamma(y))) == pytest.approx(y, rel=1e-8)


# the variance of a kind


def test_a_common_variance_is_the_one_worked_out_by_hand() -> None:
    """Moments of the logarithms, 2 degrees of freedom each: digamma(1) = -0.5772, trigamma(1) = 1.6449."""
    logs = [math.log(value) + 0.5772156649 for value in (0.01, 1.0, 100.0)]
    excess = variance(logs) - math.pi**2 / 6
    half = scipy.optimize.brentq(lambda x: scipy.special.polygamma(1, x) - excess, 1e-3, 1e3)

    found = common_variance([Variance(value=value, degrees_of_freedom=2) for value in (0.01, 1.0, 100.0)])

    assert found.degrees_of_freedom == pytest.approx(2 * half)
    assert found.value == pytest.approx(math.exp(fmean(logs) + scipy.special.digamma(half) - math.log(half)))


def test_variances_that_differ_by_chance_alone_are_of_one_variance_known_for_sure() -> None:
    found = common_variance([Variance(value=4.0, degrees_of_freedom=6)] * 3)

    assert found.degrees_of_freedom == math.inf
    # the logarithm of a variance is too low on average, by log(3) - digamma(3)
    assert found.value == pytest.approx(4 * 3 / math.exp(scipy.special.digamma(3)))


@pytest.mark.parametrize(("deviation", "worth"), [(0.002, 4.0), (0.05, 12.0), (1.0, 2.0)])
def test_the_distribution_that_variances_were_drawn_from_is_found_again(deviation: float, worth: float) -> None:
    """Scaled F: each metric has a true variance of its own, worth * deviation² / chi², and estimates it."""
    rng = random.Random(7)

    def drawn(freedom: int) -> Variance:
        true = worth * deviation**2 / rng.gammavariate(worth / 2, 2)
        return Variance(value=true * rng.gammavariate(freedom / 2, 2) / freedom, degrees_of_freedom=freedom)

    found = common_variance([drawn(rng.choice((2, 4, 9))) for _ in range(8000)])

    assert math.sqrt(found.value) == pytest.approx(deviation, rel=0.05)
    assert found.degrees_of_freedom == pytest.approx(worth, rel=0.15)


@given(
    values=st.lists(st.tuples(st.floats(1e-8, 1e2), st.integers(1, 20)), min_size=2, max_size=8),
    factor=st.sampled_from([1e-6, 0.3, 1e6]),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_a_common_variance_scales_and_has_no_order(
    values: list[tuple[float, int]], factor: float, order: random.Random
) -> None:
    variances = [Variance(value=value, degrees_of_freedom=freedom) for value, freedom in values]
    scaled = [Variance(value=one.value * factor, degrees_of_freedom=one.degrees_of_freedom) for one in variances]

    before, after = common_variance(variances), common_variance(order.sample(scaled, len(scaled)))

    assert after.value == pytest.approx(before.value * factor, rel=1e-5)
    assert 1 / after.degrees_of_freedom == pytest.approx(1 / before.degrees_of_freedom, rel=1e-5, abs=1e-9)


# learning


def test_three_metrics_that_agree_teach_the_noise_between_their_runs_as_worked_out_by_hand() -> None:
    prior = learned(*[baseline(pair(0.01)) for _ in range(3)])

    # 1 degree of freedom each: the logarithm is too low by log(1/2) - digamma(1/2) = 1.27
    expected = math.sqrt(0.01**2 / 2 / math.exp(scipy.special.digamma(0.5)))
    assert prior.within == Level(deviation=float(f"{expected:.3g}"), worth=MOST_DEGREES_OF_FREEDOM, origin=ORIGIN)


def test_the_noise_between_sessions_is_learned_without_that_between_runs() -> None:
    """Sessions of two runs, whose means differ by 2 % and whose runs by 1 %."""
    low, high = (math.exp(sign * 0.02 / math.sqrt(2)) for sign in (-1, 1))
    metric = baseline([low * value for value in pair(0.01)], [high * value for value in pair(0.01)])

    prior = learned(metric, metric, metric)

    lift = {freedom: freedom / 2 / math.exp(scipy.special.digamma(freedom / 2)) for freedom in (1, 2)}
    within = 0.01**2 * lift[2]
    session = 0.02**2 * lift[1] - within / 2
    assert prior.within.deviation == pytest.approx(math.sqrt(within), rel=5e-3)
    assert prior.session.deviation == pytest.approx(math.sqrt(session), rel=5e-3)


def test_the_noise_between_devices_is_learned_without_that_between_sessions() -> None:
    """Two GPUs whose means differ by 3 %, two sessions on each, 2 % apart, of two runs, 2 % apart."""
    means = [math.exp(sign * 0.03 / math.sqrt(2)) * value for sign in (-1, 1) for value in pair(0.02)]
    metric = baseline(*[[mean * value for value in pair(0.02)] for mean in means], devices="aabb")

    prior = learned(metric, metric, metric)

    lift = {freedom: freedom / 2 / math.exp(scipy.special.digamma(freedom / 2)) for freedom in (1, 2, 4)}
    within = 0.02**2 * lift[4]
    session = 0.02**2 * lift[2] - within / 2
    device = 0.03**2 * lift[1] - (session + within / 2) / 2
    assert prior.within.deviation == pytest.approx(math.sqrt(within), rel=5e-3)
    assert prior.session.deviation == pytest.approx(math.sqrt(session), rel=5e-3)
    assert prior.device.deviation == pytest.approx(math.sqrt(device), rel=5e-3)


def test_simulated_noise_is_learned_at_every_level() -> None:
    rng = random.Random(11)

    def metric() -> MetricBaseline:
        sessions = []
        for _ in "abc":
            of_device = rng.gauss(0, 0.02)
            for _ in range(4):
                of_session = of_device + rng.gauss(0, 0.006)
                sessions.append([math.exp(of_session + rng.gauss(0, 0.002)) for _ in range(3)])
        return baseline(*sessions, devices="aaaabbbbcccc")

    prior = learned(*[metric() for _ in range(200)])

    assert prior.within.deviation == pytest.approx(0.002, rel=0.05)
    assert prior.session.deviation == pytest.approx(0.006, rel=0.05)
    assert prior.device.deviation == pytest.approx(0.02, rel=0.1)


def test_metrics_that_differ_widely_are_worth_little_and_never_less_than_one_degree_of_freedom() -> None:
    prior = learned(*[baseline(pair(deviation)) for deviation in (1e-5, 1e-3, 1.0)])

    assert prior.within.worth == LEAST_DEGREES_OF_FREEDOM


@given(
    count=st.integers(1, 2),
    metric=st.lists(st.lists(st.floats(0.9, 1.1), min_size=1, max_size=3), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_fewer_than_three_metrics_teach_nothing(count: int, metric: list[list[float]]) -> None:
    assert learned(*[baseline(*metric)] * count) == package_priors()["compute"]


def test_a_level_that_fewer_than_three_metrics_show_keeps_what_was_known() -> None:
    """Two metrics of three have two runs in a session; all have two sessions, and one GPU."""
    twice, once = baseline(pair(0.01), [1.02]), baseline([1.0], [1.02])

    prior = learned(twice, twice, once)

    before = package_priors()["compute"]
    assert (prior.within, prior.device) == (before.within, before.device)
    assert prior.session.origin == ORIGIN


@pytest.mark.parametrize("value", [1.0, 0.003])
def test_runs_that_agree_to_the_last_digit_say_nothing(value: float) -> None:
    """Three times log(0.003) have a mean that rounding puts beside it, which is no noise of 1e-15 either."""
    alike = [baseline([value] * 3, [value] * 3)] * 5

    assert learned(*alike) == package_priors()["compute"]
    assert learned(*alike, *[baseline(pair(0.01))] * 3) == learned(*[baseline(pair(0.01))] * 3)


def test_noise_between_sessions_that_is_all_of_their_runs_is_put_at_the_floor() -> None:
    metric = baseline([*pair(0.1)], [value * 1.0001 for value in pair(0.1)])

    prior = learned(metric, metric, metric)

    assert prior.session.deviation == package_priors()["compute"].floor


def test_floor_and_tolerance_of_a_kind_stay() -> None:
    prior, before = learned(*[baseline(pair(0.2))] * 3), package_priors()["compute"]

    assert (prior.floor, prior.tolerance) == (before.floor, before.tolerance)


def test_each_kind_is_learned_from_its_own_metrics() -> None:
    kinds: tuple[Kind, ...] = ("memory", "memory", "memory", "host")

    found = learn(
        [baseline(pair(0.01), kind=kind) for kind in kinds], before=package_priors(), is_cpu=False, origin=ORIGIN
    )

    assert set(found) == {"memory", "host"}
    assert found["memory"].within.origin == ORIGIN
    assert found["host"] == package_priors()["host"]


def test_on_a_cpu_all_kinds_teach_one_prior() -> None:
    kinds: tuple[Kind, ...] = ("memory", "compute", "end-to-end")

    found = learn(
        [baseline(pair(0.01), kind=kind) for kind in kinds], before=package_priors(), is_cpu=True, origin=ORIGIN
    )

    assert set(found) == {"cpu"}
    assert found["cpu"].within.origin == ORIGIN


hundredths = st.integers(90, 110).map(lambda hundredths: hundredths / 100)
metric_values = st.lists(st.lists(hundredths, min_size=1, max_size=3), min_size=1, max_size=4)


@given(metrics=st.lists(metric_values, min_size=3, max_size=5), factor=st.sampled_from([1e-9, 0.3, 1e12]))
@settings(deadline=None)
def test_what_is_learned_has_no_scale_and_is_the_same_of_a_rate(
    metrics: list[list[list[float]]], factor: float
) -> None:
    def levels(prior: Prior) -> list[float]:
        return [figure for one in (prior.within, prior.session, prior.device) for figure in (one.deviation, one.worth)]

    times = [baseline(*metric) for metric in metrics]
    rates = [baseline(*[[factor / value for value in runs] for runs in one], better="higher") for one in metrics]

    assert levels(learned(*rates)) == pytest.approx(levels(learned(*times)), rel=0.011)  # three digits are kept


def test_nothing_teaches_nothing() -> None:
    assert learn([], before=package_priors(), is_cpu=False, origin=ORIGIN) == {}


# the package's, and those of a file


def test_every_kind_has_a_prior_and_a_cpu_has_its_own() -> None:
    for kind in get_args(Kind):
        assert prior_of(kind, is_cpu=False) is package_priors()[kind]
        assert prior_of(kind, is_cpu=True) is package_priors()["cpu"]


def test_priors_given_are_used_instead_of_the_packages() -> None:
    own = {**package_priors(), "memory": package_priors()["host"]}

    assert prior_of("memory", is_cpu=False, priors=own) is package_priors()["host"]


@pytest.mark.parametrize(("name", "prior"), package_priors().items())
def test_every_figure_of_the_package_is_believable_and_has_an_origin(name: str, prior: Prior) -> None:
    for level in (prior.within, prior.session, prior.device):
        assert 0 < level.deviation < 0.2
        assert LEAST_DEGREES_OF_FREEDOM <= level.worth <= MOST_DEGREES_OF_FREEDOM
        assert level.origin
    assert 0 < prior.floor <= prior.session.deviation
    assert prior.session.deviation < prior.tolerance


def test_the_variance_of_a_level_is_the_square_of_its_deviation() -> None:
    level = Level(deviation=0.5, worth=8.0, origin="assumed")

    assert level.variance == Variance(value=0.25, degrees_of_freedom=8.0)


def test_without_a_file_the_packages_priors_are_read(tmp_path: Path) -> None:
    assert read_priors(tmp_path, "h100") == package_priors()


def written(root: Path, text: bytes) -> Path:
    path = priors_path(root, "h100")
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    return path


def test_what_was_learned_is_read_again_and_the_other_kinds_are_the_packages(tmp_path: Path) -> None:
    metrics = [baseline(pair(deviation), kind="memory") for deviation in (0.01, 0.02, 0.03)]
    found = learn(metrics, before=package_priors(), is_cpu=False, origin=ORIGIN)
    written(tmp_path, msgspec.json.encode(found))

    read = read_priors(tmp_path, "h100")

    assert read["memory"] == found["memory"] != package_priors()["memory"]
    assert {kind: read[kind] for kind in read if kind != "memory"} == {
        kind: prior for kind, prior in package_priors().items() if kind != "memory"
    }
    assert read_priors(tmp_path, "h200") == package_priors()


def compute(**figures: object) -> bytes:
    """The package's priors of `compute`, with some figures of `within` replaced."""
    prior = msgspec.to_builtins(package_priors()["compute"])
    return msgspec.json.encode({"compute": {**prior, "within": {**prior["within"], **figures}}})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "Input data was truncated"),
        (b'{"compute": {', "Input data was truncated"),
        (b"<<<<<<< HEAD\n{}", r"JSON is malformed: invalid character \(byte 0\)"),
        (b"\xff\xfe{}", r"JSON is malformed: invalid character \(byte 0\)"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"gpu": {}}', "Invalid enum value 'gpu'"),
        (b'{"compute": 0.3}', "Expected `object`, got `float`"),
        (b'{"compute": {}}', r"Object missing required field `within` - at `\$\[\.\.\.\]`"),
        (compute(deviation="0.3 %"), r"Expected `float`, got `str` - at `\$\[\.\.\.\]\.within\.deviation`"),
        (compute(deviation=0.0), r"Expected `float` > 0\.0 - at `\$\[\.\.\.\]\.within\.deviation`"),
        (compute(worth=0.0), r"Expected `float` >= 1\.0 - at `\$\[\.\.\.\]\.within\.worth`"),
        (compute(spread=1.0), r"Object contains unknown field `spread` - at `\$\[\.\.\.\]\.within`"),
    ],
)
def test_a_file_that_holds_no_priors_says_what_is_wrong_and_how_to_mend_it(
    tmp_path: Path, text: bytes, what: str
) -> None:
    path = written(tmp_path, text)
    remedy = r"Delete it, or learn them anew: gpuperf baseline learn"

    with pytest.raises(BaselineError, match=rf"^{path} does not hold priors: {what}.*\. {remedy}$"):
        read_priors(tmp_path, "h100")


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = priors_path(tmp_path, "h100")
    path.mkdir(parents=True)

    with pytest.raises(BaselineError, match=rf"^{path} cannot be read: Is a directory\.$"):
        read_priors(tmp_path, "h100")
