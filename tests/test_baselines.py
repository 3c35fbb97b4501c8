"""How values are added to baselines, what an update does with each verdict, and what nothing measures any more."""

from pathlib import Path
from typing import Any, get_args

import pytest
from epochs import accept, append
from msgspec.structs import replace

from pytest_gpuperf.baseline_file import baseline_path, list_files, read
from pytest_gpuperf.baseline_store import prune, write
from pytest_gpuperf.baselines import Change, plan, unused
from pytest_gpuperf.errors import BaselineError, UsageError
from pytest_gpuperf.records import (
    BaselineFile,
    BaselineRun,
    Environment,
    Hardware,
    Measurement,
    Method,
    MetricBaseline,
    RunInfo,
    Status,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
)

MODULE = "perf_tests/test_matmul.py"
RUN = RunInfo(schema=1, run_id="r", date="2026-01-01T00:00:00Z", visit="v0", commit="abc123")
ENVIRONMENT = Environment(hardware=Hardware(name="NVIDIA H100", power_limit_w=700.0), versions={"torch": "2.9"})
EVENTS = Method(clock="cuda-events", mode="sustained")


def later(run_id: str, visit: str = "v0") -> RunInfo:
    """Another run; the same visit unless it says otherwise."""
    return replace(RUN, run_id=run_id, visit=visit)


def measured(metric: str = "flops", value: float = 6.9e14, **changes: Any) -> Measurement:
    made = Measurement(metric=metric, value=value, unit="FLOP/s", better="higher", kind="compute", method=EVENTS)
    return replace(made, **changes)


def judged(*statuses: Status, test: str = "test_a", module: str = MODULE, value: float = 6.9e14) -> TestRecord:
    """A test whose metrics `m0`, `m1`, ... got these verdicts."""
    names = [f"m{i}" for i in range(len(statuses))]
    verdicts = [
        Verdict(status=status, metric=name, reason="as judged", tolerance=0.03)
        for name, status in zip(names, statuses, strict=True)
    ]
    return TestRecord(
        key=TestKey(module=module, test=test),
        slug="h100",
        devices=("gpu-1",),
        environment=ENVIRONMENT,
        measurements=tuple(measured(name, value) for name in names),
        verdicts=tuple(verdicts),
    )


def with_value(value: float, **changes: Any) -> TestRecord:
    return replace(judged("PASS"), measurements=(measured("m0", value, **changes),))


def epoch(file: BaselineFile | None, test: str = "test_a", metric: str = "m0") -> MetricBaseline:
    assert file is not None
    return file.tests[test][metric]


def values(file: BaselineFile | None, test: str = "test_a", metric: str = "m0") -> list[list[float]]:
    return [[run.value for run in session.runs] for session in epoch(file, test, metric).sessions]


def actions(changes: tuple[Change, ...]) -> list[str]:
    return [change.action for change in changes]


def saved(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "baselines"


# Appending and accepting


def test_the_first_value_begins_the_file() -> None:
    file = append(None, RUN, with_value(5.0, spread=0.001, telemetry=TELEMETRY), ["m0"])
    (session,) = epoch(file).sessions
    assert (file.module, session.date, session.visit, session.commit) == (MODULE, RUN.date, "v0", "abc123")
    assert session.devices == ("gpu-1",)
    assert session.runs == (BaselineRun(value=5.0, spread=0.001, sm_clock_mhz=1700.0, power_w=690.0, run_id="r"),)
    assert file.environments == {session.environment: ENVIRONMENT}
    assert epoch(file).reason is None


TELEMETRY = Telemetry(duration_s=2.0, sm_clock_mhz=1700.0, power_w=690.0)


def test_runs_of_one_visit_are_one_session() -> None:
    file = append(None, RUN, with_value(1.0), ["m0"])
    assert values(append(file, later("s"), with_value(2.0), ["m0"])) == [[1.0, 2.0]]


def test_a_run_is_added_once() -> None:
    file = append(None, RUN, judged("NEW", "NEW"), ["m0", "m1"])
    assert append(file, RUN, judged("NEW", "NEW"), ["m0", "m1"]) == file
    after = append(append(file, later("s", "v1"), judged("PASS"), ["m0"]), RUN, judged("PASS"), ["m0"])
    assert [[run.run_id for run in session.runs] for session in epoch(after).sessions] == [["r"], ["s"]]


def test_a_metric_that_a_known_run_did_not_add_is_added() -> None:
    file = append(append(None, RUN, judged("NEW", "NEW"), ["m0"]), RUN, judged("NEW", "NEW"), ["m0", "m1"])
    assert values(file) == values(file, metric="m1") == [[6.9e14]]


def test_a_run_is_added_to_runs_of_an_older_file_that_have_no_id() -> None:
    file = append(None, RUN, with_value(1.0), ["m0"])
    (session,) = epoch(file).sessions
    older = replace(session, runs=tuple(replace(run, run_id=None) for run in session.runs))
    file = replace(file, tests={"test_a": {"m0": replace(epoch(file), sessions=(older,))}})
    after = append(file, RUN, with_value(2.0), ["m0"])
    assert [run.run_id for run in epoch(after).sessions[0].runs] == [None, "r"]
    assert append(after, RUN, with_value(2.0), ["m0"]) == after


@pytest.mark.parametrize(
    ("visit", "changes"),
    [
        ("v1", {}),
        ("v0", {"devices": ("gpu-2",)}),
        ("v0", {"environment": replace(ENVIRONMENT, versions={"torch": "2.10"})}),
    ],
)
def test_another_visit_device_or_environment_is_another_session(visit: str, changes: dict[str, Any]) -> None:
    file = append(None, RUN, with_value(1.0), ["m0"])
    after = append(file, later("s", visit), replace(with_value(2.0), **changes), ["m0"])
    assert values(after) == [[1.0], [2.0]]


def test_the_same_devices_in_another_order_are_the_same_session() -> None:
    file = append(None, RUN, replace(with_value(1.0), devices=("a", "b")), ["m0"])
    assert values(append(file, later("s"), replace(with_value(2.0), devices=("b", "a")), ["m0"])) == [[1.0, 2.0]]


def test_a_power_limit_given_as_an_int_is_the_same_environment() -> None:
    other = Environment(hardware=Hardware(name="NVIDIA H100", power_limit_w=700), versions={"torch": "2.9"})
    file = append(None, RUN, with_value(1.0), ["m0"])
    assert values(append(file, later("s"), replace(with_value(2.0), environment=other), ["m0"])) == [[1.0, 2.0]]


def grown(count: int) -> BaselineFile:
    file = append(None, RUN, with_value(1.0), ["m0"])
    for i in range(1, count):
        file = append(file, later(f"r{i}", f"v{i}"), with_value(float(i + 1)), ["m0"])
    return file


def test_twenty_sessions_are_all_kept() -> None:
    assert values(grown(20)) == [[float(i)] for i in range(1, 21)]


def test_of_more_sessions_the_first_five_and_the_last_fifteen_are_kept() -> None:
    assert values(grown(40)) == [[float(i)] for i in [1, 2, 3, 4, 5, *range(26, 41)]]


def test_an_environment_that_nothing_refers_to_any_more_is_dropped() -> None:
    file = append(None, RUN, with_value(1.0), ["m0"])
    other = Environment(hardware=Hardware(name="NVIDIA H100"), versions={"torch": "3"})
    after = accept(file, RUN, replace(with_value(2.0), environment=other), ["m0"], "new torch")
    assert list(after.environments.values()) == [other]
    assert list(file.environments.values()) == [ENVIRONMENT]


def test_only_the_metrics_asked_for_are_added() -> None:
    file = append(None, RUN, judged("NEW", "NEW"), ["m1"])
    assert list(file.tests["test_a"]) == ["m1"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e301])
def test_a_value_that_is_not_finite_and_positive_cannot_be_added(value: float) -> None:
    with pytest.raises(UsageError, match="only a finite number above zero"):
        append(None, RUN, with_value(value), ["m0"])
    with pytest.raises(UsageError, match="only a finite number above zero"):
        accept(None, RUN, with_value(value), ["m0"], "why not")


@pytest.mark.parametrize(
    "changes", [{"unit": "B/s"}, {"better": "lower"}, {"method": Method(clock="wall", mode="hot")}]
)
def test_another_unit_direction_or_method_must_be_accepted(changes: dict[str, Any]) -> None:
    file = append(None, RUN, with_value(1.0), ["m0"])
    with pytest.raises(UsageError, match=r"m0 of .*test_a is now in .* gpuperf baseline accept --reason"):
        append(file, later("s"), with_value(2.0, **changes), ["m0"])
    assert values(accept(file, RUN, with_value(2.0, **changes), ["m0"], "changed")) == [[2.0]]


def test_accepting_begins_an_epoch_of_this_run_alone_with_its_reason() -> None:
    file = accept(grown(3), RUN, with_value(9.0), ["m0"], " exact softmax ")
    assert values(file) == [[9.0]]
    assert epoch(file).reason == "exact softmax"


def test_a_setting_that_a_later_run_does_not_name_stays() -> None:
    first = with_value(1.0, configuration={"model": "gpt2", "dtype": "bfloat16"})
    file = append(None, RUN, first, ["m0"])
    file = append(file, later("s"), with_value(1.0, configuration={"dtype": "bfloat16", "seqs": "256"}), ["m0"])
    file = append(file, later("t"), with_value(1.0), ["m0"])
    assert epoch(file).configuration == {"model": "gpt2", "dtype": "bfloat16", "seqs": "256"}
    with pytest.raises(UsageError, match="another configuration than its baseline: model tiny, baseline gpt2"):
        append(file, later("u"), with_value(1.0, configuration={"model": "tiny"}), ["m0"])


@pytest.mark.parametrize(
    ("status", "action"), [("IMPROVED", "recorded"), ("INCONCLUSIVE", "recorded"), ("INVALID", "refused")]
)
def test_what_the_host_does_to_a_metric_that_it_limits_is_recorded(root: Path, status: Status, action: str) -> None:
    record = judged(status)
    verdicts = tuple(replace(one, change=0.5, is_host_limited=True) for one in record.verdicts)
    assert actions(plan(root, RUN, [replace(record, verdicts=verdicts)], accept_reason=None).changes) == [action]


def test_the_reason_stays_while_the_epoch_grows() -> None:
    file = accept(None, RUN, with_value(9.0), ["m0"], "exact softmax")
    after = append(file, later("s", "v1"), with_value(8.0), ["m0"])
    assert values(after) == [[9.0], [8.0]]
    assert epoch(after).reason == "exact softmax"


def test_accepting_needs_a_reason(root: Path) -> None:
    with pytest.raises(UsageError, match="Accepting needs a reason"):
        accept(None, RUN, with_value(1.0), ["m0"], "  ")
    with pytest.raises(UsageError, match="Accepting needs a reason"):
        plan(root, RUN, [], accept_reason="")


# What an update does


@pytest.mark.parametrize(
    ("status", "without_reason", "with_reason"),
    [
        ("NEW", "recorded", "recorded"),
        ("PASS", "recorded", "recorded"),
        ("INCONCLUSIVE", "recorded", "recorded"),
        ("REGRESSED", "refused", "accepted"),
        ("IMPROVED", "refused", "accepted"),
        ("INCOMPARABLE", "refused", "accepted"),
        ("INVALID", "refused", "refused"),
    ],
)
def test_the_verdict_decides(root: Path, status: Status, without_reason: str, with_reason: str) -> None:
    assert actions(plan(root, RUN, [judged(status)], accept_reason=None).changes) == [without_reason]
    assert actions(plan(root, RUN, [judged(status)], accept_reason="on purpose").changes) == [with_reason]


def test_every_status_is_decided_above() -> None:
    assert len(get_args(Status)) == 7


def test_a_refused_regression_says_how_to_accept_it(root: Path) -> None:
    (change,) = plan(root, RUN, [judged("REGRESSED", test="test_a[1]")], accept_reason=None).changes
    assert change.reason == ("regressed")


@pytest.mark.parametrize("status", get_args(Status))
def test_a_test_whose_own_body_failed_is_refused(root: Path, status: Status) -> None:
    record = replace(judged(status, "PASS"), passed=False)
    made = plan(root, RUN, [record], accept_reason="on purpose")
    assert actions(made.changes) == ["refused", "refused"]
    assert made.files == ()
    assert {change.reason for change in made.changes} == {"the test failed: mend it, then update"}


def test_a_test_that_failed_by_a_regression_can_be_accepted(root: Path) -> None:
    record = replace(judged("REGRESSED", "PASS"), passed=True)  # `passed` is the body alone
    assert actions(plan(root, RUN, [record], accept_reason="on purpose").changes) == ["accepted", "recorded"]
    assert actions(plan(root, RUN, [record], accept_reason=None).changes) == ["refused", "recorded"]


def test_a_metric_without_a_verdict_is_refused(root: Path) -> None:
    (change,) = plan(root, RUN, [replace(judged("PASS"), verdicts=())], accept_reason="on purpose").changes
    assert (change.action, change.reason) == ("refused", "it has no verdict")


def test_an_unstable_measurement_is_recorded_with_its_spread(root: Path) -> None:
    write(root, RUN, [with_value(1.0, unstable="clock still falling", spread=0.2)], accept_reason=None)
    assert epoch(read(list_files(root)[0])).sessions[0].runs[0].spread == 0.2


def test_one_value_that_cannot_be_kept_does_not_cost_the_others(root: Path) -> None:
    record = replace(judged("NEW", "NEW"), measurements=(measured("m0", float("nan")), measured("m1", 2.0)))
    changes = write(root, RUN, [record], accept_reason=None)
    assert actions(changes) == ["refused", "recorded"]
    assert "m0 of perf_tests/test_matmul.py::test_a is nan FLOP/s" in changes[0].reason
    assert values(read(list_files(root)[0]), metric="m1") == [[2.0]]


def test_a_plan_shows_old_and_new_and_writes_nothing(root: Path) -> None:
    made = plan(root, RUN, [judged("NEW")], accept_reason=None)
    assert [(change.path, change.old) for change in made.files] == [(baseline_path(root, "h100", MODULE), None)]
    assert not root.exists()
    write(root, RUN, [judged("NEW")], accept_reason=None)
    again = plan(root, later("s", "v1"), [judged("PASS")], accept_reason=None)
    assert again.files[0].old == made.files[0].new


def test_an_accepted_regression_replaces_the_epoch_and_leaves_its_neighbours(root: Path) -> None:
    write(root, RUN, [judged("NEW", "NEW"), judged("NEW", test="test_b")], accept_reason=None)
    before = read(list_files(root)[0])
    write(root, RUN, [judged("REGRESSED", value=5e14)], accept_reason="exact softmax")
    after = read(list_files(root)[0])
    assert values(after) == [[5e14]]
    assert epoch(after).reason == "exact softmax"
    assert epoch(after, metric="m1") == epoch(before, metric="m1")
    assert epoch(after, "test_b") == epoch(before, "test_b")


def test_an_update_that_refuses_everything_touches_nothing(root: Path) -> None:
    assert actions(write(root, RUN, [judged("INVALID")], accept_reason=None)) == ["refused"]
    assert not root.exists()


def test_two_modules_and_two_devices_go_to_their_own_files(root: Path) -> None:
    records = [judged("NEW"), judged("NEW", module="b.py"), replace(judged("NEW"), slug="a100")]
    write(root, RUN, records, accept_reason=None)
    names = [path.relative_to(root).as_posix() for path in list_files(root)]
    assert names == ["a100/perf_tests.test_matmul.json", "h100/b.json", "h100/perf_tests.test_matmul.json"]


def test_two_runs_of_a_test_in_two_updates_are_both_recorded(root: Path) -> None:
    write(root, RUN, [judged("NEW", value=1.0)], accept_reason=None)
    write(root, later("s"), [judged("PASS", value=2.0)], accept_reason=None)
    assert values(read(list_files(root)[0])) == [[1.0, 2.0]]


def test_of_two_values_of_a_test_in_one_run_the_first_is_recorded(root: Path) -> None:
    write(root, RUN, [judged("NEW", value=1.0), judged("NEW", value=2.0)], accept_reason=None)
    assert values(read(list_files(root)[0])) == [[1.0]]


def test_a_run_that_was_recorded_changes_nothing_when_it_is_recorded_again(root: Path) -> None:
    write(root, RUN, [judged("NEW", "NEW")], accept_reason=None)
    before = list_files(root)[0].read_bytes()
    write(root, RUN, [judged("PASS", "PASS")], accept_reason=None)
    assert list_files(root)[0].read_bytes() == before


def test_a_run_that_was_recorded_is_nothing_to_plan(root: Path) -> None:
    write(root, RUN, [judged("NEW")], accept_reason=None)
    assert plan(root, RUN, [judged("PASS")], accept_reason=None).files == ()


def test_what_must_not_be_committed_is_ignored_and_is_no_baseline(root: Path) -> None:
    write(root, RUN, [judged("NEW")], accept_reason=None)
    assert (root / ".gitignore").read_text().split() == [".gitignore", ".gpuperf.lock", ".tmp-*"]
    assert list_files(root) == (baseline_path(root, "h100", MODULE),)


def test_a_gitignore_of_the_users_is_kept(root: Path) -> None:
    saved(root / ".gitignore", "mine\n")
    write(root, RUN, [judged("NEW")], accept_reason=None)
    assert (root / ".gitignore").read_text() == "mine\n"


def test_a_baseline_that_cannot_be_read_is_not_overwritten(root: Path) -> None:
    path = saved(baseline_path(root, "h100", MODULE), "<<<<<<< HEAD\n")
    with pytest.raises(BaselineError, match="merge markers"):
        write(root, RUN, [judged("NEW")], accept_reason="on purpose")
    assert path.read_text() == "<<<<<<< HEAD\n"


# What nothing measures any more


def test_unused_lists_what_the_modules_run_in_full_did_not_measure(root: Path) -> None:
    records = [judged("NEW", "NEW"), judged("NEW", test="test_b"), judged("NEW", module="other.py")]
    write(root, RUN, records, accept_reason=None)
    a, b = TestKey(module=MODULE, test="test_a"), TestKey(module=MODULE, test="test_b")
    assert unused(root, "h100", {(a, "m0")}, {MODULE, "never_run.py"}) == ((a, "m1"), (b, "m0"))
    assert unused(root, "a100", (), {MODULE}) == ()


def test_prune_deletes_exactly_what_it_is_given(root: Path) -> None:
    write(root, RUN, [judged("NEW", "NEW"), judged("NEW", test="test_b")], accept_reason=None)
    a = TestKey(module=MODULE, test="test_a")
    assert prune(root, "h100", [(a, "m1"), (a, "no such metric")]) == 1
    file = read(list_files(root)[0])
    assert file is not None
    assert {test: list(metrics) for test, metrics in file.tests.items()} == {"test_a": ["m0"], "test_b": ["m0"]}


def test_prune_removes_a_file_left_empty_and_an_environment_left_over(root: Path) -> None:
    other = Environment(hardware=Hardware(name="NVIDIA H100"))
    records = [judged("NEW"), replace(judged("NEW", test="test_b"), environment=other)]
    write(root, RUN, records, accept_reason=None)
    assert prune(root, "h100", [(TestKey(module=MODULE, test="test_a"), "m0")]) == 1
    file = read(list_files(root)[0])
    assert file is not None
    assert list(file.environments.values()) == [other]
    assert prune(root, "h100", [(TestKey(module=MODULE, test="test_b"), "m0")]) == 1
    assert list_files(root) == ()


def test_pruning_nothing_touches_nothing(root: Path) -> None:
    assert prune(root, "h100", []) == 0
    assert not root.exists()
