"""The benchmark of the verdict: other tools' rules as they publish them, and a simulation that leaves nothing out."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from pytest_benchmark.utils import PercentageRegressionCheck

from benchmarks.verdict import rules
from benchmarks.verdict.noise import QUIET, SERVING, Noise, draw, run_logs
from benchmarks.verdict.pairs import OURS, THEIRS, can_be_slower, sides
from benchmarks.verdict.replay import EFFECTS, Visit, other_visits, same_visit
from benchmarks.verdict.report import Findings, markdown
from benchmarks.verdict.run import JUDGED, check_unchanged, fingerprint
from benchmarks.verdict.scenarios import all_scenarios, base_scenarios, pair_scenarios
from benchmarks.verdict.simulate import (
    LEARNED,
    THEIR_RULES,
    Scenario,
    all_verdicts,
    can_be_red,
    learned_priors,
    simulate,
    tasks,
    verdict_of,
)
from benchmarks.verdict.tally import Tally, of_a_run, percent, summed
from pytest_gpuperf.records import Status, Verdict
from pytest_gpuperf.stats import Variance

DEVICE = np.zeros(6, int)


@pytest.mark.parametrize(("now", "is_alarm"), [(105.0, False), (105.1, True), (90.0, False)])
def test_pytest_benchmark_alarms_above_its_percentage_as_its_own_code_does(now: float, is_alarm: bool) -> None:
    assert rules.pytest_benchmark(np.array(100.0), np.array(now), percent=5) == is_alarm
    own = PercentageRegressionCheck("min", 5)  # type: ignore[no-untyped-call]
    assert bool(own.fails({"min": now}, {"min": 100.0})) == is_alarm  # type: ignore[no-untyped-call]


def test_github_action_benchmark_alarms_above_twice_the_previous_time() -> None:
    alarms = rules.github_action_benchmark(np.array([1.0, 1.0]), np.array([2.0, 2.01]))
    assert alarms.tolist() == [False, True]


def test_asv_alarms_where_at_most_one_of_49_pairs_is_the_other_way_round() -> None:
    # Of 3432 ways to deal 14 samples, 1, 1 and 2 have U = 0, 1 and 2: p = 2 * 2 / 3432 = 0.00117 and 8 / 3432 = 0.00233
    before = np.arange(1.0, 8.0)
    one, two = np.array([6.5, *range(8, 14)]), np.array([5.5, *range(8, 14)])
    assert [bool(rules.asv(before, now)) for now in (one, two)] == [True, False]


def test_asv_takes_the_normal_approximation_for_more_than_twenty_samples() -> None:
    # U has mean 242 and standard deviation 42.6: p is below 0.002 up to U = 110.35
    before, high = 100 + np.arange(22.0), 200 + np.arange(16.0)
    now = [np.array([*range(1, 6), sixth, *high]) for sixth in (199.0, 120.5)]  # U = 5 * 22 = 110, and one more
    assert [bool(rules.asv(before, samples)) for samples in now] == [True, False]


def test_asv_leaves_alone_what_is_certain_but_within_its_factor() -> None:
    before = 100 + np.arange(7.0)
    now = 108 + np.arange(7.0)
    assert (bool(rules.asv(before, now)), bool(rules.asv(before, now, factor=1.05))) == (False, True)


def test_asv_says_so_where_no_p_value_could_be_small_enough() -> None:
    with pytest.raises(ValueError, match=r"3 and 6 samples: p can never be below 0\.002"):
        rules.asv(np.arange(3.0), np.arange(6.0))


def test_bencher_alarms_above_a_quantile_of_the_history() -> None:
    # mean 3, standard deviation sqrt(2), t(0.99, 4) = 3.747: the limit is 8.299
    history = np.tile(np.arange(1.0, 6.0), (2, 1))
    assert rules.bencher_t(history, np.array([8.29, 8.31])).tolist() == [False, True]


def test_nvbench_alarms_where_the_smallest_is_half_a_percent_above_the_third_quartile() -> None:
    before = np.arange(11.0, 0.0, -1.0)  # the third quartile is 9
    assert [bool(rules.nvbench_robust(before, np.array([20.0, low]))) for low in (9.04, 9.05)] == [False, True]


def test_a_fixed_limit_compares_geometric_means() -> None:
    before = np.array([1.0, 4.0])  # geometric mean 2
    assert [bool(rules.fixed_limit(before, np.array([now]), percent=5)) for now in (2.09, 2.11)] == [False, True]


def test_the_oracle_of_quiet_noise_catches_three_percent_three_times_in_four() -> None:
    # se = sqrt(0.49 * 1.2 + 0.09 * (1/6 + 1/15)) = 0.780 %; ln 1.03 / se - 3.09 = 0.70; the normal distribution: 0.758
    quiet = Noise(session=0.007, process=0.003, iteration=0.0)
    power = rules.oracle_power(quiet, 0.03, sessions=5, runs=3, current=6, alpha=0.001)
    assert power == pytest.approx(0.758, abs=0.001)


@given(alpha=st.floats(1e-5, 0.1), effect=st.floats(0.0, 0.2), more=st.floats(1e-4, 0.1))
def test_the_oracle_alarms_at_alpha_without_a_change_and_ever_more_with_one(
    alpha: float, effect: float, more: float
) -> None:
    def power(slowdown: float) -> float:
        return rules.oracle_power(SERVING, slowdown, sessions=5, runs=3, current=6, alpha=alpha)

    assert power(0.0) == pytest.approx(alpha)
    assert power(effect) <= power(effect + more)


@pytest.mark.parametrize(
    "noise", [SERVING, Noise(session=0.02, process=0.015, iteration=0.03, drift=0.9)], ids=["plain", "drift"]
)
def test_drawn_runs_vary_as_the_noise_says(noise: Noise) -> None:
    logs = run_logs(draw(noise, (4000, 1, 2), np.random.default_rng(1), devices=DEVICE[:1]))[:, 0, 0]
    assert logs.std() == pytest.approx(math.sqrt(noise.session**2 + noise.run_variance), rel=0.05)


def test_drift_makes_runs_of_a_visit_alike() -> None:
    noise = Noise(session=0.0, process=0.01, iteration=0.0, drift=0.9)
    logs = draw(noise, (4000, 1, 2), np.random.default_rng(1), devices=DEVICE[:1])[:, 0, :, 0]
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(0.9, abs=0.02)


def test_sessions_on_one_device_share_its_offset() -> None:
    noise = Noise(session=0.0, process=0.0, iteration=0.0, device=0.01)
    logs = draw(noise, (1, 3, 1), np.random.default_rng(1), devices=np.array([0, 1, 0]))[0, :, 0, 0]
    assert logs[0] == logs[2] != logs[1]


def looked_at(statuses: list[Status], most_runs: int) -> tuple[list[tuple[int, int]], Status]:
    asked: list[tuple[int, int]] = []

    def judge_at(runs: int, look: int) -> Verdict:
        asked.append((runs, look))
        return Verdict(status=statuses[look - 1], metric="time", reason="", tolerance=0.02, runs=runs)

    return asked, verdict_of(judge_at, most_runs)[0].status


def test_a_first_regressed_is_looked_at_again_and_a_second_is_final() -> None:
    assert looked_at(["REGRESSED", "REGRESSED"], 6) == ([(1, 1), (3, 2)], "REGRESSED")


def test_the_last_look_judges_what_the_budget_paid_for() -> None:
    assert looked_at(["INCONCLUSIVE"] * 3, 4) == ([(1, 1), (3, 2), (4, 3)], "INCONCLUSIVE")


def test_a_repetition_is_followed_whose_first_run_alone_was_fast() -> None:
    past, now = np.zeros((1, 5, 3)), np.array([[-0.5, 0.05, 0.05, 0.05, 0.05, 0.05]])
    session = Variance(value=0.007**2, degrees_of_freedom=10.0)
    assert can_be_red(past, now, margin=math.log1p(0.02), session=session).tolist() == [True]


@pytest.mark.parametrize("sessions", [5, 7])
def test_repetitions_that_are_left_out_would_not_have_been_red(sessions: int) -> None:
    scenario = Scenario(
        name="3 % slower",
        noise=QUIET,
        kind="compute",
        devices=(0,) * sessions,
        nulls=0,
        judged=0,
        powered=0,
        variants=LEARNED[:1],
    )
    random = np.random.default_rng(7)
    logs = run_logs(draw(QUIET, (150, sessions + 1, 6), random, devices=np.zeros(sessions + 1, int)))
    past, now = logs[:, :-1, :3], logs[:, -1] + 0.03
    priors = {"learned": learned_priors(scenario, random)}
    session = priors["learned"]["compute"].session.variance
    is_followed = can_be_red(past, now, margin=math.log1p(0.02), session=session)
    is_red = np.array(
        [
            all_verdicts(scenario, before, after, priors)[LEARNED[0]][0].status == "REGRESSED"
            for before, after in zip(past, now, strict=True)
        ]
    )
    assert 0 < is_red.sum() <= is_followed.sum() < 150
    assert not (is_red & ~is_followed).any()


def test_the_same_seed_gives_the_same_counts() -> None:
    scenario = Scenario(name="twice", noise=QUIET, kind="compute", nulls=20, judged=5, powered=5, effects=(0.05,))
    (task,) = tasks(scenario, 3)
    assert simulate(task) == simulate(task)


def test_parts_of_a_scenario_have_all_of_its_repetitions() -> None:
    scenario = Scenario(name="parts", noise=QUIET, kind="compute", nulls=2500, judged=7, powered=11, suite_every=1000)
    parts = tasks(scenario, 3)
    assert [sum(getattr(part, name) for part in parts) for name in ("nulls", "judged", "powered")] == [2500, 7, 11]


def test_no_two_scenarios_share_a_name() -> None:
    names = [scenario.name for scenario in all_scenarios()]
    assert len(names) == len(set(names))


def test_no_scenario_hangs_on_a_few_learned_suites() -> None:
    suites = {one.name: one.nulls / one.suite_every for one in (*all_scenarios(), *pair_scenarios())}
    assert min(suites.values()) >= 20


def test_a_rule_that_is_ahead_in_both_is_called_so() -> None:
    found = findings(0.5)
    better = [
        replace(one, red={0.0: 400}.get(one.effect, 600)) if one.rule == "Bencher t 0.99" else one
        for one in found.stored
    ]
    caught = "; ".join(f"{slowdown}: 60 %, 50 %" for slowdown in ("+3 %", "+5 %", "+10 %"))
    line = f"| alone | quiet | Bencher t 0.99 | {caught} | 40 %, 50 % | **both** |"
    assert line in markdown(replace(found, stored=tuple(better)))


def test_false_reds_are_counted_in_a_hundred_thousand_repetitions_or_more() -> None:
    assert {scenario.name: scenario.nulls >= 100_000 for scenario in base_scenarios()} == dict.fromkeys(
        ("quiet", "serving", "pool"), True
    )


def test_a_rule_that_was_edited_meanwhile_is_not_published(tmp_path: Path) -> None:
    source = tmp_path / "judge.py"
    source.write_text("ALPHA = 0.001")
    before = fingerprint([source])
    check_unchanged(before, fingerprint([source]))
    source.write_text("ALPHA = 0.002")
    with pytest.raises(SystemExit, match=r"edited while it was measured .* Run again"):
        check_unchanged(before, fingerprint([source]))


def test_what_decides_is_all_there() -> None:
    assert [path.name for path in JUDGED if not path.is_file()] == []


def test_pairs_are_dealt_in_turn() -> None:
    runs = np.arange(14.0).reshape(1, 14, 1)
    base, head = sides(runs)
    assert base[0, :, 0].tolist() == [0, 3, 4, 7, 8, 11, 12]
    assert head[0, :, 0].tolist() == [1, 2, 5, 6, 9, 10, 13]


def test_pairs_can_be_slower_if_any_look_is_above_the_margin() -> None:
    head = np.array([[0.1, 0.1, 0.1, -0.2, -0.2, 0.0, 0.0], [0.01] * 7])
    assert can_be_slower(np.zeros((2, 7)), head, 0.02).tolist() == [True, False]


def visit(name: str, device: str, count: int) -> Visit:
    return Visit(name=name, test="test_a", device=device, times=tuple(float(i) for i in range(1, count + 1)))


@given(count=st.integers(6, 20))
@settings(deadline=None)
def test_a_replayed_group_is_never_part_of_its_own_baseline(count: int) -> None:
    cases = list(same_visit(visit("v", "gpu", count)))
    assert len(cases) == count
    assert not any({*case.now} & {*case.baseline[0].times} for case in cases)


def test_a_replay_on_an_unseen_gpu_leaves_out_other_visits_to_it() -> None:
    others = [visit("again", "gpu", 6), visit("elsewhere", "other", 6)]
    cases = list(other_visits(visit("v", "gpu", 6), others))
    assert {each.name for case in cases for each in case.baseline} == {"elsewhere"}


def test_counts_of_one_rule_are_added_up() -> None:
    one = Tally(scenario="s", rule="r", effect=0.0, trials=10, red=1, judged=5, runs=9)
    (total,) = summed([one, one])
    assert (total.trials, total.red, total.mean_runs) == (20, 2, 1.8)


def test_the_interval_of_no_alarms_ends_where_chance_would_have_shown_one() -> None:
    interval = Tally(scenario="s", rule="r", effect=0.0, trials=1000, red=0).interval
    assert interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 1000)))


def test_fifty_metrics_are_red_together_as_independent_ones() -> None:
    assert of_a_run(0.001) == pytest.approx(0.0488, abs=1e-4)


@pytest.mark.parametrize(("share", "text"), [(0.0, "0"), (0.00042, "0.042 %"), (0.0512, "5.1 %"), (0.756, "76 %")])
def test_rates_are_told_in_per_cent(share: float, text: str) -> None:
    assert percent(share) == text


def findings(rate: float) -> Findings:
    """Every rule in every scenario says red that often, at any slowdown."""

    def tallies(scenarios: list[Scenario], rules: Sequence[str]) -> tuple[Tally, ...]:
        return tuple(
            Tally(scenario=scenario.name, rule=rule, effect=effect, trials=1000, red=round(1000 * rate))
            for scenario in scenarios
            for rule in rules or [variant.name for variant in scenario.variants] + list(THEIR_RULES)
            for effect in (0.0, *scenario.effects)
        )

    replayed = [
        Tally(scenario=f"{where}: {test}, visit-1", rule="gpuperf", effect=effect, trials=10, red=red)
        for where, test, red in (("same visit", "test_a", 0), ("unseen GPU", "test_a", 0), ("unseen GPU", "test_b", 4))
        for effect in EFFECTS
    ]
    return Findings(
        stored=tallies(all_scenarios(), ()),
        paired=tallies(pair_scenarios(), (*OURS, *THEIRS)),
        replayed=tuple(replayed),
        seed=1,
        share=1.0,
        duration_s=1.0,
        judged="0123456789ab",
    )


def test_the_report_says_which_goals_are_not_reached() -> None:
    text = markdown(findings(0.5))
    assert "| quiet: false red of a metric | at most 0.1 % | 50 % (47 % to 53 %) | **no** |" in text
    assert "| quiet, 5 sessions: +5 % caught, alone | at least 95 % | 50 % (47 % to 53 %) | **no** |" in text


def test_the_report_says_where_the_repetitions_are_too_few_to_be_sure() -> None:
    goal = (
        "| quiet: false red of a metric | at most 0.1 % | 0 (0 to 0.37 %) | yes, though the interval reaches beyond |"
    )
    assert goal in markdown(findings(0.0))


def test_the_false_reds_on_recordings_are_those_of_all_tests() -> None:
    text = markdown(findings(0.0))
    assert "same visit: 0 of 10, unseen GPU: 4 of 20 (4 of 10 in test_b, visit-1)" in text
    assert "| unseen GPU | **gpuperf** | 20 | 4 |" in text
