"""A metric at several sizes: where it is best and bends, and one verdict for all of it."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence

import pytest
from harness import CONFIRMING, Suite, gpuperf, results_of, verdicts_of
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.curves import (
    KNEE_GAIN,
    at_shared_sizes,
    baseline_at_shared_sizes,
    judge_curve,
    knee,
    optimum,
)
from pytest_gpuperf.records import (
    BaselineRun,
    Curve,
    Measurement,
    Method,
    MetricBaseline,
    Session,
    Status,
    Verdict,
)

CURVE = Method(clock="wall", mode="curve")
RATES = {1: 590.0, 8: 4193.0, 32: 14_982.0}


def run(points: Mapping[int, float], *, end: str | None = None) -> Measurement:
    return Measurement(
        metric="throughput",
        value=1.0,
        unit="tok/s",
        better="higher",
        kind="end-to-end",
        method=CURVE,
        tolerance=0.05,
        curve=Curve(x="batch size", points={str(size): value for size, value in points.items()}, end=end),
    )


def accepted(*runs: Mapping[int, float] | None) -> MetricBaseline:
    return MetricBaseline(
        unit="tok/s",
        better="higher",
        kind="end-to-end",
        method=CURVE,
        sessions=tuple(
            Session(
                date="2026-11-21T00:00:00Z",
                visit=str(number),
                devices=("a",),
                environment="e",
                runs=(BaselineRun(value=1.0, points={str(x): y for x, y in points.items()} if points else None),),
            )
            for number, points in enumerate(runs)
        ),
    )


class Ruler:
    """A judge without noise: worse by more than the tolerance is REGRESSED. Remembers what it was asked."""

    def __init__(self, status: Status | None = None) -> None:
        self.status = status
        self.shares: list[float] = []

    def __call__(self, runs: Sequence[Measurement], baseline: MetricBaseline | None, share: float) -> Verdict:
        self.shares.append(share)
        if baseline is None:
            return Verdict(status="NEW", metric="throughput", reason="No baseline.", tolerance=0.05)
        then = baseline.sessions[0].runs[0].value
        change = then / runs[-1].value - 1
        return Verdict(
            status=self.status or ("REGRESSED" if change > 0.05 else "PASS"),
            metric="throughput",
            reason=f"{change:.3f}.",
            tolerance=0.05,
            change=change,
            baseline_value=then,
            value=runs[-1].value,
        )


def test_optimum_is_the_best_size_and_the_smallest_of_equals() -> None:
    assert optimum({8: 5.0, 1: 5.0, 4: 4.0}, "higher") == 1
    assert optimum({8: 5.0, 1: 5.0, 4: 4.0}, "lower") == 4


def test_knee_is_where_doubling_stops_to_pay() -> None:
    assert knee({1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0, 16: 321.0}) == 4
    # 32 to 128 gains 15 %, which is 7 % a doubling
    assert knee({16: 100.0, 32: 150.0, 128: 172.0}) == 32
    assert knee({1: 1.0, 2: 2.0, 4: 4.0}) == 4
    assert knee({1: 1.0}) == 1


@given(st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(min_value=1, max_value=1e6), min_size=1))
def test_beyond_the_knee_no_step_gains_a_tenth_a_doubling(points: dict[int, float]) -> None:
    found = knee(points)
    for small, large in itertools.pairwise(sorted(size for size in points if size >= found)):
        assert points[large] / points[small] < (1 + KNEE_GAIN) ** math.log2(large / small)


def test_geometric_mean_over_the_shared_sizes_is_what_is_judged() -> None:
    verdict = judge_curve([run({1: 100.0, 2: 200.0})], accepted({1: 100.0, 2: 200.0, 4: 400.0}), Ruler())
    assert verdict.status == "PASS"
    assert verdict.value == pytest.approx((100.0 * 200.0) ** 0.5)
    assert verdict.baseline_value == pytest.approx((100.0 * 200.0) ** 0.5)


def test_half_of_the_false_alarms_go_to_the_mean_and_half_to_the_sizes() -> None:
    ruler = Ruler()
    judge_curve([run(RATES)], accepted(RATES), ruler)
    assert ruler.shares == [0.5, *[pytest.approx(0.5 / 3)] * 3]


def test_one_size_that_collapses_is_red_though_the_mean_is_not() -> None:
    now = {**RATES, 32: RATES[32] / 1.12}  # 12 % slower there, 3.9 % in the mean
    verdict = judge_curve([run(now)], accepted(RATES), Ruler())
    assert verdict.status == "REGRESSED"
    assert verdict.reason == "batch size 32: 0.120. The curve as a whole: 0.038."
    assert verdict.remark is not None
    assert verdict.remark.endswith("the shape changed: batch size 32 +12 %, all together +3.8 %")


def test_size_beyond_its_tolerance_that_noise_leaves_open_is_no_pass() -> None:
    def noisy(runs: Sequence[Measurement], baseline: MetricBaseline | None, share: float) -> Verdict:
        found = Ruler()(runs, baseline, share)
        return (
            replace(found, status="INCONCLUSIVE") if found.status == "REGRESSED" else replace(found, is_low_power=True)
        )

    now = {**RATES, 32: RATES[32] / 1.12}
    verdict = judge_curve([run(now)], accepted(RATES), noisy)
    assert (verdict.status, verdict.is_low_power) == ("INCONCLUSIVE", False)
    assert verdict.reason == "batch size 32: 0.120. The curve as a whole: 0.038."
    assert judge_curve([run({**RATES, 32: RATES[32] / 1.04})], accepted(RATES), noisy).status == "PASS"
    fresh = [run(now)] * 3  # of many sizes one is often beyond: fresh runs that are sure of none decide by the mean
    assert judge_curve(fresh, accepted(RATES), noisy).status == "PASS"


def test_remark_names_best_size_and_knee_with_that_of_the_baseline() -> None:
    flat = {1: 100.0, 8: 700.0, 32: 720.0, 64: 725.0}
    steep = {1: 100.0, 8: 700.0, 32: 1720.0, 64: 1721.0}
    verdict = judge_curve([run(flat)], accepted(steep), Ruler("PASS"))
    assert verdict.remark is not None
    assert verdict.remark.startswith("best at batch size 64: 725.0 tok/s; knee at 8, 32 in the baseline")


def test_curve_that_still_rises_at_its_last_size_has_no_knee() -> None:
    bent, rising = {1: 100.0, 8: 700.0, 32: 720.0}, {1: 100.0, 8: 700.0, 32: 2000.0}
    now, then = (judge_curve([run(a)], accepted(b), Ruler("PASS")).remark for a, b in ((rising, bent), (bent, rising)))
    assert now is not None
    assert then is not None
    assert now.startswith("best at batch size 32: 2000 tok/s; no knee, 8 in the baseline")
    assert then.startswith("best at batch size 32: 720.0 tok/s; knee at 8, none in the baseline")


def test_new_curve_names_its_best_size_and_its_end() -> None:
    verdict = judge_curve([run(RATES, end="out of memory at 64")], None, Ruler())
    assert verdict.status == "NEW"
    assert verdict.remark == "best at batch size 32: 14982 tok/s; no knee; ends: out of memory at 64"


def test_curve_that_gives_out_earlier_than_ever_is_red() -> None:
    now = {1: 590.0, 8: 4193.0}
    verdict = judge_curve([run(now, end="out of memory at 32")], accepted(RATES, RATES), Ruler())
    assert verdict.status == "REGRESSED"
    assert "the curve ends at batch size 8 (out of memory at 32), at 32 in the baseline" in verdict.reason


def test_curve_that_was_asked_for_fewer_sizes_is_not_red() -> None:
    assert judge_curve([run({1: 590.0, 8: 4193.0})], accepted(RATES), Ruler()).status == "PASS"


def test_one_run_that_gave_out_accuses_nobody_when_fresh_ones_did_not() -> None:
    early = run({1: 590.0, 8: 4193.0}, end="out of memory at 32")
    assert judge_curve([early, run(RATES), run(RATES)], accepted(RATES), Ruler()).status == "PASS"


def test_baseline_that_once_gave_out_there_too_is_no_loss() -> None:
    early = {1: 590.0, 8: 4193.0}
    verdict = judge_curve([run(early, end="out of memory at 32")], accepted(RATES, early), Ruler())
    assert verdict.status == "PASS"


def test_no_shared_size_cannot_be_compared() -> None:
    verdict = judge_curve([run({2: 1.0})], accepted({1: 1.0, 4: 2.0}), Ruler())
    assert verdict.status == "INCOMPARABLE"
    assert verdict.reason == "Not comparable: no batch size of the baseline was measured (1, 4)."


@pytest.mark.parametrize("status", ["INVALID", "INCOMPARABLE"])
def test_unwell_gpu_is_no_question_of_sizes(status: Status) -> None:
    ruler = Ruler(status)
    assert judge_curve([run(RATES)], accepted(RATES), ruler).status == status
    assert ruler.shares == [0.5]


def test_values_of_curves_of_unlike_lengths_are_those_of_the_sizes_that_all_have() -> None:
    assert [one.value for one in at_shared_sizes([run({1: 2.0, 2: 8.0, 4: 9.0}), run({1: 2.0, 2: 8.0})])] == [
        pytest.approx(4.0)
    ] * 2
    sessions = baseline_at_shared_sizes(accepted({1: 2.0, 2: 8.0, 4: 9.0}, {1: 2.0, 2: 8.0})).sessions
    assert [one.runs[0].value for one in sessions] == [pytest.approx(4.0)] * 2


def test_values_that_have_no_size_in_common_stay() -> None:
    assert [one.value for one in at_shared_sizes([run({1: 2.0}), run({2: 8.0})])] == [1.0, 1.0]
    single = MetricBaseline(unit="s", better="lower", kind="end-to-end", method=CURVE, sessions=accepted(None).sessions)
    assert baseline_at_shared_sizes(single) == single


# As a user sees it

SWEEP = """
import json
RATES = {int(size): rate for size, rate in json.loads(os.environ["RATES"]).items()}

@pytest.mark.perf(tolerance=0.05)
def test_batch(perf):
    perf.record_curve("throughput", RATES, unit="tok/s", x="batch size", end=os.environ.get("END"))
"""


def sweep(rates: Mapping[int, float], **environment: str) -> Suite:
    variables = {"RATES": json.dumps(rates), **environment}
    return Suite(files={"test_suite.py": SWEEP}, environment=variables)


def test_curve_is_recorded_and_judged_as_one_metric(pytester: pytest.Pytester) -> None:
    for _ in range(3):
        sweep(RATES).record(pytester)
    result = sweep(RATES).run(pytester)
    result.stdout.fnmatch_lines(
        ["*throughput *3334 tok/s*PASS low power", "  best at batch size 32: 14982 tok/s; no knee"]
    )
    points = results_of(pytester).tests[0].measurements[0].curve
    assert points is not None
    assert points.points == {"1": 590.0, "8": 4193.0, "32": 14982.0}


def test_collapse_at_one_size_is_confirmed_and_fails_with_its_name(pytester: pytest.Pytester) -> None:
    for _ in range(3):
        sweep(RATES).record(pytester)
    slow = {**RATES, 32: 9000.0}
    result = sweep(slow).run(pytester, *CONFIRMING)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the shape changed: batch size 32*"])
    assert verdicts_of(pytester)["test_batch throughput"].runs == 3


def test_collapse_that_one_run_cannot_tell_from_noise_is_measured_again_and_named(pytester: pytest.Pytester) -> None:
    sizes = {2**i: 100.0 * 1.8**i for i in range(9)}
    for _ in range(5):
        sweep(sizes).record(pytester)
    result = sweep({**sizes, 32: sizes[32] / 1.15}).run(pytester, *CONFIRMING)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*  batch size 32: 15 % slower (*), tolerance 5.0 %. The curve as a whole: *"])
    assert verdicts_of(pytester)["test_batch throughput"].status == "REGRESSED"


def test_end_that_came_early_is_what_the_failure_says(pytester: pytest.Pytester) -> None:
    for _ in range(3):
        sweep(RATES).record(pytester)
    result = sweep({1: 590.0, 8: 4193.0}, END="out of memory at 32").run(pytester, *CONFIRMING)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*  the curve ends at batch size 8 (out of memory at 32), at 32 in the baseline. *"])


def test_baseline_of_a_curve_is_shown_by_size(pytester: pytest.Pytester) -> None:
    sweep(RATES).record(pytester)
    shown = gpuperf("baseline", "show").output.splitlines()
    assert "  by size: 1: 590.0 tok/s, 8: 4193 tok/s, 32: 14982 tok/s" in shown


def test_accepting_a_curve_keeps_its_points(pytester: pytest.Pytester) -> None:
    sweep(RATES).record(pytester)
    twice = {size: rate / 2 for size, rate in RATES.items()}
    sweep(twice).run(pytester)
    assert gpuperf("baseline", "accept", "--reason", "a slower model").code == 0
    assert sweep(twice).run(pytester).ret == 0
    assert verdicts_of(pytester)["test_batch throughput"].status == "PASS"


def test_junit_has_the_value_that_the_change_is_of(pytester: pytest.Pytester) -> None:
    sweep(RATES).record(pytester)
    sweep({**RATES, 64: 20_000.0}).run(pytester, "--junitxml=junit.xml")
    value = verdicts_of(pytester)["test_batch throughput"].value
    assert value == pytest.approx((590.0 * 4193.0 * 14982.0) ** (1 / 3), rel=1e-4)
    assert f'name="gpuperf.throughput.value" value="{value}"' in (pytester.path / "junit.xml").read_text()


def test_curve_over_something_else_is_not_compared(pytester: pytest.Pytester) -> None:
    sweep(RATES).record(pytester)
    clients = Suite(
        files={"test_suite.py": SWEEP.replace("batch size", "clients")}, environment=sweep(RATES).environment
    )
    result = clients.run(pytester)
    result.stdout.fnmatch_lines(["INCOMPARABLE *: Not comparable: curve over clients, baseline batch size."])
