"""Tuning: what is tried, what a point is, where it goes on after an interruption, and what the gain is worth."""

import dataclasses
import errno
import math
import os
import random
import re
from pathlib import Path
from statistics import fmean, variance

import pytest
from fake_engines import DEFAULTS, FakeVllm, additive, plan
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy import stats as scipy_stats

from pytest_gpuperf import monitor as monitor_module
from pytest_gpuperf.errors import EngineError, EngineOutOfMemory, MeasurementError, NotSupported, UsageError
from pytest_gpuperf.monitor import Monitor
from pytest_gpuperf.priors import prior_of
from pytest_gpuperf.report.tune import draw, gain_text, plan_lines, tuning_lines, write_results
from pytest_gpuperf.testing import FakeNvml, fake_gpu, fake_state
from pytest_gpuperf.trials.tune import (
    Gain,
    Tuning,
    _repeat_sd,
    engine_config,
    gain_of,
    measured,
    read_tuning,
    run_pairs,
    tune,
)
from pytest_gpuperf.trials.tune_file import Journal, plan_in, read_best, write_best
from pytest_gpuperf.trials.tune_plan import (
    LEVELS,
    Pair,
    Plan,
    Point,
    best_of,
    combinations,
    first_candidates,
    is_default,
    left_out,
    name_of,
)


def tuned(folder: Path, vllm: FakeVllm, of: Plan | None = None, **options: float | None) -> Tuning:
    return tune(Journal(folder, of or plan()), vllm.bench, **options)  # type: ignore[arg-type]


def text_of(tuning: Tuning) -> str:
    return "\n".join(line.text for line in tuning_lines(tuning))


# What is tried


def test_one_factor_at_a_time_is_tried_in_turns() -> None:
    names = [name_of(settings) for settings in first_candidates(plan())]
    assert names[:5] == [
        "quantization fp8",
        "max-num-seqs 512",
        "max-num-batched-tokens 8192",
        "gpu-memory-utilization 0.95",
        "dtype float16",
    ]
    assert len(names) == sum(map(len, LEVELS["cuda"].values()))


def test_the_levels_are_those_of_the_documentation() -> None:
    rows = (Path(__file__).parents[1] / "docs/tune.md").read_text().splitlines()
    for column, found in ((2, LEVELS["cuda"]), (3, LEVELS["cpu"])):
        for factor, levels in found.items():
            (row,) = [row for row in rows if row.startswith(f"| `{factor}` |")]
            told = set(
                re.findall(r"[\w.]+", row.split("|")[column].replace("`dtype`", "").replace("`quantization`", ""))
            )
            assert {str(value) for level in levels for value in level.values()} <= told


def test_the_sweeps_span_what_was_asked_for() -> None:
    levels = LEVELS["cuda"]
    shares = [next(iter(level.values())) for level in levels["gpu-memory-utilization"]]
    counts = [next(iter(level.values())) for level in levels["max-num-seqs"]]
    assert (min(map(float, map(str, shares))), max(map(float, map(str, shares)))) == (0.7, 0.95)
    assert (min(map(int, map(str, counts))), max(map(int, map(str, counts)))) == (64, 1024)


def test_a_full_plan_tries_every_combination_once() -> None:
    found = first_candidates(plan(is_full=True))
    assert len(found) == math.prod(map(len, LEVELS["cuda"].values()))
    assert len({name_of(settings) for settings in found}) == len(found)


def test_what_the_default_was_resolved_to_is_not_tried_again(tmp_path: Path) -> None:
    vllm = FakeVllm()
    tuning = tuned(tmp_path, vllm)
    skipped = ["dtype bfloat16", "max-num-seqs 1024", "max-num-batched-tokens 16384"]
    assert sorted(map(name_of, tuning.skipped)) == sorted(skipped)
    assert not set(skipped) & set(vllm.started)


def test_numbers_are_the_same_however_they_are_written() -> None:
    default = Point(settings={}, configuration={**DEFAULTS, "gpu_memory_utilization": "0.90", "dtype": "torch.float16"})
    assert is_default({"gpu_memory_utilization": 0.9}, default)
    assert is_default({"dtype": "float16"}, default)
    assert not is_default({"dtype": "float16", "quantization": "fp8"}, default)
    assert not is_default({"enforce_eager": 1}, default)  # not known, so not the same


def test_the_best_levels_are_combined_and_once_more_at_the_same_precision() -> None:
    points = [Point(settings={}, values=(1000.0,))]
    points += [Point(settings=settings, values=(additive(settings),)) for settings in first_candidates(plan())]
    points = [
        p if "max_num_batched_tokens" not in p.settings else Point(settings=p.settings, values=(1050.0,))
        for p in points
    ]
    both = combinations(points, plan().factors, "cuda")
    assert both == [
        {"quantization": "fp8", "max_num_seqs": 512, "max_num_batched_tokens": 8192},
        {"max_num_seqs": 512, "max_num_batched_tokens": 8192},
    ]


def test_a_level_that_gains_less_than_one_percent_is_left_at_the_default() -> None:
    points = [Point(settings={}, values=(1000.0,)), Point(settings={"max_num_seqs": 512}, values=(1009.0,))]
    assert combinations(points, plan().factors, "cuda") == []
    assert best_of(points) is points[0]
    points.append(Point(settings={"max_num_seqs": 256}, values=(1010.0,)))
    assert best_of(points) is points[2]


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=20))
def test_the_best_is_never_slower_than_the_default(values: list[float]) -> None:
    points = [Point(settings={"max_num_seqs": n} if n else {}, values=(value,)) for n, value in enumerate(values)]
    best = best_of(points)
    assert best is points[0] or (best.value or 0) >= 1.00999 * values[0]
    assert (best.value or 0) * 1.0100001 >= max(values)


def test_everything_but_what_is_tuned_is_left_to_vllm() -> None:
    config = engine_config("llama-3-8b", {"max_num_seqs": 512})
    assert config.max_num_seqs == 512
    assert (config.gpu_memory_utilization, config.max_num_batched_tokens, config.dtype) == (None, None, "auto")
    assert config.enable_prefix_caching is False  # all repeats have the same prompts
    with pytest.raises(UsageError, match="swap-space 4 is no configuration of an engine"):
        engine_config("llama-3-8b", {"swap_space": 4})


def test_a_hub_id_stands_for_the_preset_of_its_shape(tmp_path: Path) -> None:
    assert engine_config("meta-llama/Meta-Llama-3-8B", {}).load_format == "dummy"
    (tmp_path / "config.json").touch()
    assert engine_config(str(tmp_path), {}).load_format is None  # what the folder holds


# Points


def test_a_point_with_a_stranger_on_the_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_is_family", lambda _: False)  # the first process of all is an ancestor
    nvml = FakeNvml(fake_gpu(), states=[fake_state(process_pids=(1,))])
    bench = dataclasses.replace(FakeVllm().bench, watch=lambda: Monitor(nvml, [fake_gpu().uuid]))
    assert measured({}, plan(), bench).unwell == "another process used the GPU (pid 1)"


def test_a_point_is_tokens_over_time_of_the_repeats_without_the_first(tmp_path: Path) -> None:
    default = tuned(tmp_path, FakeVllm(), plan(factors=("max-num-seqs",))).points[0]
    assert default.values == pytest.approx((1000.0, 1000.0))  # the first was at 800
    assert Point(settings={}, values=(500.0, 1000.0)).value == pytest.approx(2 / (1 / 500 + 1 / 1000))
    assert (default.load_time_s, default.latency_s, default.duration_s) == (40.0, 0.5, 70.0)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (EngineOutOfMemory("CUDA out of memory: 9 GB wanted\nlog"), "out of memory"),
        (EngineError("ended with exit code 1 while loading"), "died"),
        (NotSupported("int8 needs another GPU"), "not supported"),
        (UsageError("quantization 'x' is not known to vLLM 0.20"), "not supported"),
    ],
)
def test_an_engine_that_does_not_run_is_a_point_with_its_reason(tmp_path: Path, error: Exception, cause: str) -> None:
    vllm = FakeVllm(faults={"max-num-seqs 512": error})
    tuning = tuned(tmp_path, vllm, plan(factors=("max-num-seqs",)))
    (lost,) = [point for point in tuning.points if point.problem]
    assert (lost.name, lost.cause, lost.value) == ("max-num-seqs 512", cause, None)
    assert f"max-num-seqs 512                   {cause}\n    {str(error).splitlines()[0]}\n" in text_of(tuning)
    assert tuning.ending == "done"
    assert vllm.running == 0


def test_a_default_that_does_not_run_is_an_error_and_leaves_no_point(tmp_path: Path) -> None:
    vllm = FakeVllm(faults={"default": EngineOutOfMemory("does not fit")})
    with pytest.raises(EngineOutOfMemory, match="does not fit"):
        tuned(tmp_path, vllm)
    assert Journal(tmp_path, plan()).points == ()


# The pairs


def test_default_and_best_are_started_in_turns_that_change(tmp_path: Path) -> None:
    vllm = FakeVllm()
    tuning = tuned(tmp_path, vllm, pairs=4)
    best = "quantization fp8, max-num-seqs 512"
    assert tuning.best is not None
    assert tuning.best.name == best
    assert vllm.started[-8:] == ["default", best, best, "default"] * 2
    assert tuning.gain is not None
    assert tuning.gain.ratio == pytest.approx(1.32)


def test_the_gain_is_that_of_the_pairs_not_of_the_flattered_point(tmp_path: Path) -> None:
    """Every engine has noise of its own and nothing helps: the fastest of many is above 1, its pairs are not."""
    noise = random.Random(1)
    tuning = tuned(tmp_path, FakeVllm(speed=lambda _: 1000.0 * math.exp(noise.gauss(0, 0.03))), pairs=6)
    assert tuning.best is not None
    assert tuning.best.settings
    assert tuning.gain is not None
    assert not tuning.gain.is_certain
    assert tuning.gain.low < 1 < tuning.gain.high
    assert "not told from noise" in " ".join(text_of(tuning).split())


def test_the_interval_is_students_around_the_mean_of_the_logarithms() -> None:
    """With the usual noise averaged in; both estimates of `trials.paired` by hand, the narrower counts."""
    default, best = [1000.0, 1010.0, 990.0, 1003.0], [1200.0, 1230.0, 1150.0, 1210.0]
    pairs = [Pair(number=n, settings={}, default=a, best=b) for n, (a, b) in enumerate(zip(default, best, strict=True))]
    prior = prior_of("end-to-end", is_cpu=False).within
    differences = [math.log(b / a) for a, b in zip(default, best, strict=True)]
    sums = [math.log(b * a) for a, b in zip(default, best, strict=True)]
    fit = scipy_stats.linregress(range(4), sums)
    about_line = sum((value - fit.intercept - fit.slope * n) ** 2 for n, value in enumerate(sums))
    own = sum((one - fmean(differences)) ** 2 for one in differences) / 2 + prior.worth * prior.deviation**2
    halves = []
    for squares, freedom, share in ((own, 3 + prior.worth, 0.2), (own + about_line / 2, 5 + prior.worth, 0.8)):
        halves.append(scipy_stats.t.ppf(1 - 0.025 * share, freedom) * math.sqrt(2 * squares / freedom / 4))
    gain = gain_of(pairs, is_cpu=False)
    assert gain is not None
    assert gain.ratio == pytest.approx(math.exp(fmean(differences)))
    assert gain.low == pytest.approx(math.exp(fmean(differences) - min(halves)), rel=1e-6)
    assert gain.high == pytest.approx(math.exp(fmean(differences) + min(halves)), rel=1e-6)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1, 1e6)), min_size=1, max_size=8))
def test_the_ratio_lies_within_its_interval_and_turns_over_with_the_sides(values: list[tuple[float, float]]) -> None:
    there = gain_of([Pair(number=1, settings={}, default=a, best=b) for a, b in values], is_cpu=False)
    back = gain_of([Pair(number=1, settings={}, default=b, best=a) for a, b in values], is_cpu=False)
    assert there is not None
    assert back is not None
    assert there.low <= there.ratio <= there.high
    assert back.ratio == pytest.approx(1 / there.ratio)


def test_pairs_cannot_agree_better_than_their_engines_repeats_do() -> None:
    steady = [Pair(number=n, settings={}, default=100.0, best=120.0, repeat_sd=0.001) for n in range(1, 5)]
    shaky = [replace(pair, repeat_sd=0.2) for pair in steady]
    narrow, wide = gain_of(steady, is_cpu=False), gain_of(shaky, is_cpu=False)
    assert narrow is not None
    assert wide is not None
    assert math.log(wide.high / wide.low) > 5 * math.log(narrow.high / narrow.low)


def test_a_pair_knows_how_well_its_repeats_agree() -> None:
    values = ([100.0, 110.0, 95.0], [200.0, 200.0, 200.0])
    logs = [math.log(value) for value in values[0]]
    by_hand = math.sqrt((variance(logs) / 3 + 0.0) / 2)
    assert _repeat_sd(values) == pytest.approx(by_hand)
    assert _repeat_sd([[100.0], [200.0]]) is None


def test_pairs_that_lost_an_engine_do_not_count() -> None:
    whole = Pair(number=1, settings={}, default=100.0, best=120.0)
    lost = Pair(number=2, settings={}, default=100.0, problem="died")
    assert gain_of([lost], is_cpu=False) is None
    gain = gain_of([whole, lost], is_cpu=False)
    assert gain is not None
    assert gain.pairs == 1


def test_a_lost_pair_does_not_narrow_the_interval_of_the_others() -> None:
    whole = [Pair(number=n, settings={}, default=100.0, best=120.0, repeat_sd=0.2) for n in (1, 2)]
    lost = [Pair(number=n, settings={}, default=100.0, problem="died") for n in (3, 4)]
    assert gain_of([*whole, *lost], is_cpu=False) == gain_of(whole, is_cpu=False)


def test_a_test_of_a_tuned_configuration_needs_all_of_its_pairs() -> None:
    pairs = run_pairs({"max_num_seqs": 512}, plan(), FakeVllm().bench, pairs=2)
    assert [pair.best for pair in pairs] == pytest.approx([1100.0, 1100.0])
    vllm = FakeVllm(faults={"max-num-seqs 512": EngineError("ended by SIGKILL")})
    with pytest.raises(MeasurementError, match=r"Pair 1 of 2 was lost\. max-num-seqs 512: ended by SIGKILL"):
        run_pairs({"max_num_seqs": 512}, plan(), vllm.bench, pairs=2)


def test_where_nothing_is_faster_there_is_nothing_to_pair(tmp_path: Path) -> None:
    vllm = FakeVllm(speed=lambda _: 1000.0)
    tuning = tuned(tmp_path, vllm)
    assert vllm.started.count("default") == 1
    assert tuning.is_settled
    assert "No gain: of 15 other configurations none was 1.0 % faster than the default." in text_of(tuning)


# Interrupted, resumed, out of time


def test_an_interrupted_tuning_keeps_its_points_and_goes_on_from_there(tmp_path: Path) -> None:
    first = FakeVllm(interrupt_after=5)
    tuning = tuned(tmp_path, first)
    assert tuning.ending == "interrupted"
    assert len(tuning.points) == 5
    assert "best:" not in text_of(tuning)
    assert not tuning.is_settled
    second = FakeVllm()
    whole = tuned(tmp_path, second)
    assert whole.ending == "done"
    assert not set(first.started) & set(second.started[: -2 * 4])
    assert second.shown[-1].engines <= second.shown[-1].most


def test_an_interrupted_pair_is_run_again_as_a_whole(tmp_path: Path) -> None:
    count = len(FakeVllm().started) + 18  # default, 15 points, 1 combination, half of the first pair
    tuned(tmp_path, FakeVllm(interrupt_after=count))
    vllm = FakeVllm()
    tuning = tuned(tmp_path, vllm, pairs=2)
    assert len(vllm.started) == 4
    assert [pair.number for pair in tuning.pairs] == [1, 2]


def test_a_finished_tuning_starts_nothing(tmp_path: Path) -> None:
    before = tuned(tmp_path, FakeVllm())
    vllm = FakeVllm()
    assert tuned(tmp_path, vllm) == before
    assert vllm.started == []


def test_an_engine_that_died_is_tried_again_and_out_of_memory_is_not(tmp_path: Path) -> None:
    faults = {"max-num-seqs 512": EngineError("died"), "max-num-seqs 256": EngineOutOfMemory("full")}
    tuned(tmp_path, FakeVllm(faults=faults), plan(factors=("max-num-seqs",)))
    vllm = FakeVllm()
    tuning = tuned(tmp_path, vllm, plan(factors=("max-num-seqs",)))
    assert vllm.started[0] == "max-num-seqs 512"
    assert "max-num-seqs 256" not in vllm.started
    assert [point.name for point in tuning.points if point.problem] == ["max-num-seqs 256"]


def test_an_engine_that_died_twice_is_left_alone_and_not_called_left_out(tmp_path: Path) -> None:
    faults = {"max-num-seqs 512": EngineError("died")}
    for tries in (1, 2):
        tuned(tmp_path, FakeVllm(faults=faults), plan(factors=("max-num-seqs",)))
        assert [point.tries for point in read_tuning(tmp_path).points if point.problem] == [tries]
    vllm = FakeVllm(faults=faults)
    tuned(tmp_path, vllm, plan(factors=("max-num-seqs",)))
    assert vllm.started == []
    assert read_tuning(tmp_path).left == 0


def test_an_engine_that_died_waits_until_all_others_were_tried(tmp_path: Path) -> None:
    faults = {"quantization fp8": EngineError("did not answer within 300 s")}
    tuned(tmp_path, FakeVllm(faults=faults), pairs=0, budget_s=200.0)
    vllm = FakeVllm()
    tuned(tmp_path, vllm, pairs=0)
    assert vllm.started[-2:] == ["quantization fp8", "quantization fp8, max-num-seqs 512"]


def test_the_budget_keeps_time_for_the_pairs(tmp_path: Path) -> None:
    vllm = FakeVllm()
    tuning = tuned(
        tmp_path, vllm, pairs=4, budget_s=70.0 * 14
    )  # an engine takes 70 s: default, 4 points, combination, pairs
    assert vllm.now_s <= 70 * 14
    assert tuning.ending == "budget"
    assert tuning.left == 11
    assert tuning.gain is not None
    assert tuning.gain.pairs == 4
    assert "11 points left out: the budget is spent." in text_of(tuning)


def test_a_budget_without_time_for_a_pair_says_that_the_gain_was_not_measured(tmp_path: Path) -> None:
    tuned(tmp_path, FakeVllm(interrupt_after=4))
    tuning = tuned(tmp_path, FakeVllm(), budget_s=60.0)
    assert tuning.gain is None
    assert not tuning.is_settled
    assert "tuned / default: not measured" in text_of(tuning)


def test_a_budget_that_holds_no_point_beside_the_pairs_says_what_to_do(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, FakeVllm(), budget_s=70.0 * 9)  # default; then a point, a combination and eight of pairs
    assert [point.name for point in tuning.points] == ["default"]
    assert not tuning.is_settled
    assert "No gain is known: nothing ran besides the default." in text_of(tuning)
    last = write_results(tuning, tmp_path, is_plotting=False)[-1].text
    assert last == "The budget holds no point beside the pairs: measure the points first, with --pairs 0."
    assert tuned(tmp_path, FakeVllm(), budget_s=70.0 * 9).left == 15  # the same command would for ever


def test_a_sweep_that_was_cut_by_its_budget_is_not_settled_though_the_gain_is_known(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, FakeVllm(), budget_s=70.0 * 14)
    assert tuning.gain is not None
    assert not tuning.is_settled
    last = write_results(tuning, tmp_path, is_plotting=False)[-1].text
    assert last == "The same command measures the points that were left out."


def test_points_and_pairs_can_be_measured_in_visits_of_their_own(tmp_path: Path) -> None:
    """Where a command may take ten minutes, no budget could hold the points and the pairs together."""
    visits = 0
    while tuned(tmp_path, FakeVllm(), pairs=0, budget_s=250.0).left:
        visits += 1
        assert read_tuning(tmp_path).left == 15 + 1 - 3 * visits  # 15 levels and the default; no combinations yet
    assert visits == 5  # three engines in each, 17 in all
    while (tuning := tuned(tmp_path, FakeVllm(), pairs=4, budget_s=250.0)).ending == "budget":
        visits += 1
    assert visits == 8
    assert tuning.gain is not None
    assert tuning.gain.pairs == 4
    assert tuning == replace(read_tuning(tmp_path), skipped=tuning.skipped)


def test_a_folder_without_a_tuning_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tuning\. Make one with: gpuperf tune MODEL --output"):
        read_tuning(tmp_path)


def test_combinations_that_were_left_out_count_once_all_levels_are_known() -> None:
    """One of them may be the fastest of all."""
    of = plan()
    points = [Point(settings={}, values=(1000.0,))]
    points += [Point(settings=settings, values=(additive(settings),)) for settings in first_candidates(of)]
    assert left_out(of, points[:-3]) == 3
    combined = combinations(points, of.factors, of.kind)
    assert left_out(of, points) == len(combined) == 1
    assert left_out(of, [*points, Point(settings=combined[0], values=(1700.0,))]) == 0
    full = replace(of, is_full=True)
    points = [points[0], *(Point(settings=settings, values=(1100.0,)) for settings in first_candidates(full))]
    assert left_out(full, points[:-1]) == 1
    assert left_out(full, points) == 0  # these are combinations themselves


# The folder


def test_a_line_that_a_kill_cut_short_is_measured_again(tmp_path: Path) -> None:
    tuned(tmp_path, FakeVllm(interrupt_after=3))
    path = tmp_path / "points.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    vllm = FakeVllm()
    tuned(tmp_path, vllm)
    assert vllm.started[0] == "max-num-seqs 512"
    assert path.read_bytes().endswith(b"}\n")
    assert len(Journal(tmp_path, plan()).points) == 17


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "qwen2.5-7b"}, "model llama-3-8b, now qwen2.5-7b"),
        ({"device": "NVIDIA H200", "devices": ("ff",)}, "device NVIDIA H100 80GB HBM3, now NVIDIA H200"),
        ({"vllm": "0.33.0"}, "vllm 0.26.0, now 0.33.0"),
        ({"repeats": 5}, "repeats 2, now 5"),
    ],
)
def test_a_folder_of_another_plan_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    Journal(tmp_path, plan())
    with pytest.raises(UsageError, match="holds points of another plan") as error:
        Journal(tmp_path, plan(**changes))
    assert words in str(error.value)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds thesis\.tex and no points\.jsonl\. Name a new folder"):
        Journal(tmp_path, plan())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        Journal(tmp_path / "file", plan())


def test_a_disk_that_is_full_is_one_message_and_the_points_before_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = Journal(tmp_path, plan())
    journal.add(Point(settings={}, values=(1000.0,)))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UsageError, match=r"points\.jsonl cannot be written: No space left on device\. The same command"
    ):
        journal.add(Point(settings={"max_num_seqs": 512}, values=(1000.0,)))
    assert Journal(tmp_path, plan()).points[0].settings == {}


def test_a_best_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "best.yaml").mkdir()
    with pytest.raises(UsageError, match=r"best\.yaml cannot be written: Is a directory\. The points are kept"):
        write_best(tmp_path, plan(), Point(settings={}), ())


@pytest.mark.parametrize("line", ['{"record":"point"}', "nonsense", '{"record":"point","settings":{},"speed":1}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    Journal(tmp_path, plan())
    with (tmp_path / "points.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UsageError, match=r"points\.jsonl:2 is no record of a tuning"):
        Journal(tmp_path, plan())


def test_points_without_a_plan_are_out_of_place(tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_text('{"record":"point","settings":{}}\n')
    with pytest.raises(UsageError, match=r"points\.jsonl:1 is out of place"):
        plan_in(tmp_path)


# best.yaml


def test_best_yaml_states_what_vllm_resolved_and_is_read_back(tmp_path: Path) -> None:
    settings = {"quantization": "fp8", "max_num_seqs": 512}
    best = Point(settings=settings, configuration={**DEFAULTS, "max_num_seqs": "512"})  # type: ignore[arg-type]
    path = write_best(tmp_path, plan(), best, ["a remark"])
    assert path.read_text() == (
        '# a remark\nmodel: "meta-llama/Meta-Llama-3-8B"\ndtype: "bfloat16"\nquantization: "fp8"\n'
        "gpu-memory-utilization: 0.92\nmax-num-seqs: 512\nmax-num-batched-tokens: 16384\n"
    )
    model, found = read_best(path)
    assert model == "meta-llama/Meta-Llama-3-8B"
    assert found == {
        "dtype": "bfloat16",
        "quantization": "fp8",
        "gpu_memory_utilization": 0.92,
        "max_num_seqs": 512,
        "max_num_batched_tokens": 16384,
    }


def test_a_quantization_that_is_not_there_is_not_stated(tmp_path: Path) -> None:
    path = write_best(tmp_path, plan(), Point(settings={}, configuration=DEFAULTS), [])
    assert "quantization" not in path.read_text()


def test_a_file_edited_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\n\nmodel: tiny  # the small one\nmax_num_seqs:   8\ndtype: 'float16'\n")
    assert read_best(path) == ("tiny", {"max_num_seqs": 8, "dtype": "float16"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-num-seqs: 8\n", "names no model"),
        ("model: tiny\n", "sets nothing that differs from the default. It needs one of: dtype, quantization"),
        ("model: tiny\nport: 8000\n", "sets port, and only these are tuned: dtype"),
        ("model: tiny\nnested:\n  a: 1\n", "mine.yaml:2 is not one 'option: value': nested:"),
        (
            "model: tiny\nmax-num-seqs: many\n",
            "sets what cannot be: Expected `int | null`, got `str` - at `max_num_seqs`.",
        ),
        ("model: tiny\nmax-num-seqs: 0\n", "Expected `int` >= 1 - at `max_num_seqs`."),
        ("model: tiny\nmax-num-seqs: true\n", "got `bool` - at `max_num_seqs`."),
        ("model: tiny\ngpu-memory-utilization: 95\n", "Expected `float` <= 1.0 - at `gpu_memory_utilization`."),
        ("model: tiny\ndtype: 16\n", "Expected `str | null`, got `int` - at `dtype`."),
        ("model: tiny\n- a\n", "mine.yaml:2 is not one 'option: value': - a"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_best(path)
    assert words in str(error.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file or directory\. Make one with: gpuperf tune MODEL"):
        read_best(tmp_path / "none.yaml")


# What is printed


def test_the_table_fits_into_80_columns_and_groups_the_factors(tmp_path: Path) -> None:
    error = EngineOutOfMemory("CUDA out of memory. " + "x" * 100)
    tuning = tuned(tmp_path, FakeVllm(faults={"max-num-seqs 128": error}))
    lines = text_of(tuning).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["default", "1", "000", "±0.00", "%", "-", "500", "ms", "40", "s"]
    assert lines[2].split()[:6] == ["quantization", "fp8", "1", "200", "±0.00", "%"]
    assert "+20 %" in lines[2]
    names = [line[:34].strip() for line in lines]
    assert names.index("max-num-seqs 512") < names.index("max-num-seqs 64") < names.index("max-num-seqs 128")
    assert "best: quantization fp8, max-num-seqs 512" in lines
    assert "tuned / default: 1.320 (95 % interval" in text_of(tuning)
    assert "fp8 changes what the model computes, not only how fast" in text_of(tuning)


def test_of_a_single_repeat_no_spread_is_known(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, FakeVllm(), plan(repeats=1))
    assert text_of(tuning).splitlines()[1].split() == ["default", "1", "000", "-", "-", "500", "ms", "40", "s"]
    assert plan_lines(tuning.plan)[1].text.endswith(", 1 repeat a point")


def test_an_option_is_not_cut_at_its_hyphen_where_a_line_ends(tmp_path: Path) -> None:
    lines = text_of(tuned(tmp_path, FakeVllm())).splitlines()
    assert lines[lines.index("max-num-batched-tokens 16384.") - 1].endswith("dtype bfloat16; max-num-seqs 1024;")


def test_a_gain_of_one_pair_is_said_as_such() -> None:
    text = gain_text(Gain(ratio=1.2, low=1.1, high=1.3, pairs=1))
    assert text == "tuned / default: 1.200 (95 % interval 1.100 to 1.300, 1 pair of fresh engines)"


def test_points_of_an_unwell_gpu_are_named(tmp_path: Path) -> None:
    points = tuple(Point(settings={"max_num_seqs": n} if n else {}, values=(1.0,), unwell="heat") for n in range(5))
    tuning = Tuning(plan=plan(), points=points, skipped=(), pairs=(), ending="done")
    assert "max-num-seqs 2 was measured during heat" in text_of(tuning)
    assert "and 2 more points on an unwell GPU" in text_of(tuning)


def test_a_lost_pair_is_named() -> None:
    points = (Point(settings={}, values=(1.0,)), Point(settings={"max_num_seqs": 8}, values=(2.0,)))
    lost = Pair(number=2, settings={"max_num_seqs": 8}, problem="default: ended by SIGKILL\nlog")
    tuning = Tuning(plan=plan(), points=points, skipped=(), pairs=(lost,), ending="done")
    assert "lost pair 2: default: ended by SIGKILL" in text_of(tuning).splitlines()


def test_troubles_fit_into_80_columns() -> None:
    points = (Point(settings={}, values=(1.0,), unwell="another process " * 6), Point(settings={"x": 8}, values=(2.0,)))
    lost = Pair(number=2, settings={"x": 8}, problem="default: ended by SIGKILL, " + "and more " * 9)
    text = text_of(Tuning(plan=plan(), points=points, skipped=(), pairs=(lost,), ending="done"))
    assert max(map(len, text.splitlines())) <= 80


def test_results_say_how_to_serve_and_how_to_test(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, FakeVllm())
    lines = [line.text for line in write_results(tuning, tmp_path, is_plotting=False)]
    assert f"serve it: vllm serve --config {tmp_path}/best.yaml" in lines
    assert f"test it:  pytest perf_tests/test_tuning.py --gpuperf-tuned {tmp_path}/best.yaml" in lines
    assert "# tuned / default: 1.320 (95 % interval" in (tmp_path / "best.yaml").read_text()


def test_an_interrupted_tuning_writes_no_best_and_says_how_to_go_on(tmp_path: Path) -> None:
    tuning = tuned(tmp_path, FakeVllm(interrupt_after=2))
    (line,) = write_results(tuning, tmp_path, is_plotting=True)
    assert line.text == f"Interrupted: 2 points are kept in {tmp_path}. The same command goes on from there."
    assert [path.name for path in tmp_path.iterdir()] == ["points.jsonl"]


@pytest.mark.parametrize("is_full", [False, True])
def test_a_plot_is_drawn(tmp_path: Path, is_full: bool) -> None:
    pytest.importorskip("matplotlib")
    fault = {"max-num-seqs 512": EngineOutOfMemory("full")}
    factors = ("precision", "max-num-seqs") if is_full else plan().factors
    tuning = tuned(tmp_path, FakeVllm(faults=fault), plan(is_full=is_full, factors=factors))
    draw(tuning, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_point_is_within_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    module = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(module.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw(tuned(tmp_path, FakeVllm()), tmp_path / "plot.png")
    (figure,) = figures
    combined = figure.axes[-1]
    assert combined.get_title() == "combined"
    assert max(combined.lines[0].get_ydata()) == pytest.approx(1320.0)
    assert combined.get_ylim()[1] > 1320.0


def test_a_plot_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tuning = tuned(tmp_path, FakeVllm())
    with pytest.raises(UsageError, match=r"The plot cannot be written to .*: No such file or directory\."):
        draw(tuning, tmp_path / "none" / "plot.png")


def test_a_tuning_goes_on_on_another_gpu_of_the_same_name_and_says_so(tmp_path: Path) -> None:
    one, other = FakeVllm(), FakeVllm()
    tune(Journal(tmp_path, plan()), dataclasses.replace(one.bench, device="aa"), pairs=0)
    tuning = tune(Journal(tmp_path, plan(devices=("bb",))), dataclasses.replace(other.bench, device="bb"), pairs=2)
    assert len(other.started) == 4  # the pairs alone
    assert {pair.device for pair in tuning.pairs} == {"bb"}
    assert tuning.gpus == 1
    moved = replace(tuning, points=(*tuning.points, Point(settings={"x": 1}, device="bb")))
    assert "measured on 2 GPUs of this kind, which may differ by about 1 %" in text_of(moved).replace("\n", " ")
