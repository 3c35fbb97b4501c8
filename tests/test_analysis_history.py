"""The history store: nothing is lost, nothing is added twice, and every fault is a message; levels of what it holds."""

import os
import sqlite3
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.analysis.history import Added, History, Point, Series, open_history
from pytest_gpuperf.analysis.history_file import STORE_SCHEMA, HistoryError, Place, is_local, place_of
from pytest_gpuperf.analysis.levels import Levels, levels, observations
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.processes import run_group
from pytest_gpuperf.records import (
    Curve,
    Environment,
    Hardware,
    Measurement,
    Method,
    Rerun,
    Results,
    RunInfo,
    Status,
    Telemetry,
    TestKey,
    TestRecord,
    Verdict,
)

COLD = Method(clock="cuda-events", mode="cold")
H100 = Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984)


def measurement(value: float = 1e-3, metric: str = "time", **changes: Any) -> Measurement:
    return replace(
        Measurement(metric=metric, value=value, unit="s", better="lower", kind="memory", method=COLD), **changes
    )


def record(*measurements: Measurement, test: str = "test_copy", status: Status = "PASS", **changes: Any) -> TestRecord:
    measurements = measurements or (measurement(),)
    return replace(
        TestRecord(
            key=TestKey(module="perf_tests/test_bandwidth.py", test=test),
            slug="nvidia-h100",
            devices=("b", "a"),
            environment=Environment(hardware=H100),
            measurements=measurements,
            verdicts=tuple(
                Verdict(status=status, metric=m.metric, reason="", tolerance=0.03, change=0.01) for m in measurements
            ),
        ),
        **changes,
    )


def results(number: int, *records: TestRecord, date: str | None = None, **changes: Any) -> Results:
    run = RunInfo(
        schema=1,
        run_id=f"run{number}",
        date=date or f"2026-11-{number + 1:02}T10:00:00+00:00",
        visit=f"visit{number}",
        commit=f"commit{number}",
    )
    return Results(run=replace(run, **changes), tests=records or (record(),))


def place(tmp_path: Path) -> Place:
    return place_of(str(tmp_path / "history.sqlite"))


def add(where: Place, *runs: Results) -> list[Added]:
    with open_history(where, mode="write") as history:
        return [history.add(run) for run in runs]


def only_series(history: History) -> tuple[Series, tuple[Point, ...]]:
    (summary,) = history.summaries()
    return summary.series, history.points(summary.series)


def points_of(where: Place) -> tuple[Point, ...]:
    with open_history(where) as history:
        return only_series(history)[1]


# What is kept


def test_everything_of_a_value_is_kept(tmp_path: Path) -> None:
    telemetry = Telemetry(duration_s=1.0, sm_clock_mhz=1755.0)
    add(place(tmp_path), results(0, record(measurement(2e-3, spread=0.001, telemetry=telemetry))))

    with open_history(place(tmp_path)) as history:
        series, points = only_series(history)
    assert series == Series(
        id=series.id,
        slug="nvidia-h100",
        module="perf_tests/test_bandwidth.py",
        test="test_copy",
        metric="time",
        unit="s",
        method="cold, cuda-events",
        better="lower",
        kind="memory",
    )
    assert points == (
        Point(
            run_id="run0",
            date="2026-11-01T10:00:00+00:00",
            visit="visit0",
            commit="commit0",
            attempt=0,
            value=2e-3,
            spread=0.001,
            devices=("a", "b"),
            status="PASS",
            change=0.01,
            sm_clock_mhz=1755.0,
        ),
    )


def test_run_added_twice_is_there_once(tmp_path: Path) -> None:
    assert [added.points for added in add(place(tmp_path), results(0), results(0))] == [1, 0]
    assert len(points_of(place(tmp_path))) == 1


def test_run_that_was_added_before_its_end_is_completed(tmp_path: Path) -> None:
    whole = results(0, record(), record(test="test_read"))
    assert [added.points for added in add(place(tmp_path), replace(whole, tests=whole.tests[:1]), whole)] == [1, 1]


def test_fresh_processes_of_a_test_are_kept_each(tmp_path: Path) -> None:
    more = tuple(Rerun(measurements=(measurement(value),), duration_s=1.0) for value in (2e-3, 3e-3))
    add(place(tmp_path), results(0, record(more=more)))
    assert [(point.attempt, point.value) for point in points_of(place(tmp_path))] == [(0, 1e-3), (1, 2e-3), (2, 3e-3)]


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "B"},
        {"method": replace(COLD, mode="hot")},
        {"better": "higher"},
        {"curve": Curve(x="batch size", points={"1": 1e-3})},
    ],
)
def test_another_identity_is_another_series(tmp_path: Path, changes: dict[str, Any]) -> None:
    add(place(tmp_path), results(0), results(1, record(measurement(**changes))))
    with open_history(place(tmp_path)) as history:
        assert [summary.runs for summary in history.summaries()] == [1, 1]


def test_noise_on_a_cpu_is_of_a_kind_of_its_own(tmp_path: Path) -> None:
    add(place(tmp_path), results(0, record(environment=Environment(hardware=Hardware(name="a CPU")))))
    with open_history(place(tmp_path)) as history:
        assert only_series(history)[0].kind == "cpu"


def test_summary_has_first_and_last_run_in_the_order_of_adding(tmp_path: Path) -> None:
    add(place(tmp_path), *(results(i, record(measurement(1e-3 * (i + 1)))) for i in range(3)))
    with open_history(place(tmp_path)) as history:
        (summary,) = history.summaries()
    assert (summary.runs, summary.first_date[:10], summary.last_date[:10], summary.last) == (
        3,
        "2026-11-01",
        "2026-11-03",
        3e-3,
    )


def test_dates_are_kept_in_utc(tmp_path: Path) -> None:
    add(place(tmp_path), results(0, date="2026-11-01T01:00:00+02:00"))
    assert points_of(place(tmp_path))[0].date == "2026-10-31T23:00:00+00:00"


def test_run_with_a_value_that_has_no_logarithm_is_refused_whole(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^time of .*::test_read is 0 s\. A history keeps values above 0: was the"):
        add(place(tmp_path), results(0, record(), record(measurement(0.0), test="test_read")))
    with open_history(place(tmp_path)) as history:
        assert history.summaries() == ()


def test_run_with_a_date_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'yesterday' is not an ISO 8601 date: is the results file edited"):
        add(place(tmp_path), results(0, date="yesterday"))


@given(values=st.lists(st.floats(1e-9, 1e15), min_size=1, max_size=8))
@settings(max_examples=15, deadline=None)
def test_values_come_back_in_order_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    where = place(tmp_path_factory.mktemp("history"))
    add(where, *(results(i, record(measurement(value))) for i, value in enumerate(values)))
    assert [point.value for point in points_of(where)] == values


# Clocks that step back


def test_clock_that_steps_back_is_said_and_the_order_of_adding_stays(tmp_path: Path) -> None:
    runs = [results(0), results(1), results(2, date="2020-01-01T00:00:00+00:00")]
    assert [added.newer for added in add(place(tmp_path), *runs)] == [None, None, "2026-11-02T10:00:00+00:00"]
    assert [point.run_id for point in points_of(place(tmp_path))] == ["run0", "run1", "run2"]


def test_clock_of_another_kind_of_device_does_not_matter(tmp_path: Path) -> None:
    runs = [results(5), results(0, record(slug="nvidia-l4"))]
    assert [added.newer for added in add(place(tmp_path), *runs)] == [None, None]


# Where a store is


@pytest.mark.parametrize(
    ("text", "path"),
    [("a/b.sqlite", "/r/a/b.sqlite"), ("/a/b", "/a/b"), ("sqlite:///a/b", "/r/a/b"), ("sqlite:////a/b", "/a/b")],
)
def test_path_or_url_names_a_file(text: str, path: str) -> None:
    assert place_of(text, root=Path("/r")).path == Path(path)


@pytest.mark.parametrize("text", ["postgresql://host/db", "sqlite://host/db", "sqlite:///", "http://a"])
def test_other_databases_are_refused_with_what_is_supported(text: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be kept there\. Valid: a path, sqlite:///PATH, file:PATH\?mode=ro"):
        place_of(text)


def test_empty_path_is_refused() -> None:
    with pytest.raises(UsageError, match=r"is empty: is the variable that it comes from set"):
        place_of(" ")


def test_uri_of_sqlite_opens_the_store_read_only(tmp_path: Path) -> None:
    add(place(tmp_path), results(0))
    uri = place_of(f"file:{tmp_path}/history.sqlite?mode=ro")
    assert len(points_of(uri)) == 1
    with pytest.raises(
        HistoryError, match=r"cannot be written: attempt to write a readonly database\. The results file"
    ):
        add(uri, results(1))


def test_folder_is_made_and_kept_out_of_git(tmp_path: Path) -> None:
    add(place_of(str(tmp_path / "a/.gpuperf/h.sqlite")), results(0))
    assert (tmp_path / "a/.gpuperf/.gitignore").read_text() == "*\n"


def test_store_in_a_folder_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(place(tmp_path), results(0))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(points_of(place(tmp_path))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["history.sqlite"]


@pytest.mark.parametrize(
    ("kind", "is_here"), [("ext4", True), ("nfs4", False), ("lustre", False), ("something-new", False)]
)
def test_write_ahead_log_is_for_file_systems_of_this_machine(kind: str, is_here: bool) -> None:
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/home /home {kind} rw 0 0\n"
    assert is_local(Path("/home/me/history.sqlite"), mounts) is is_here
    assert is_local(Path("/var/history.sqlite"), mounts)


@pytest.mark.parametrize(("is_here", "journal"), [(True, "wal"), (False, "delete")])
def test_journal_is_the_one_that_the_file_system_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_here: bool, journal: str
) -> None:
    monkeypatch.setattr("pytest_gpuperf.analysis.history_file.is_local", lambda *_: is_here)
    with open_history(place(tmp_path), mode="write") as history:
        assert history._connection.execute("PRAGMA journal_mode").fetchone() == (journal,)


# Faults


def test_missing_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"There is no history at .*gpuperf history add RESULTS --store"):
        points_of(place(tmp_path))
    assert not list(tmp_path.iterdir())


def test_empty_file_is_no_history_yet_but_may_become_one(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite").touch()
    with pytest.raises(HistoryError, match=r"is empty\. Add runs to it:  gpuperf history add"):
        points_of(place(tmp_path))
    add(place(tmp_path), results(0))
    assert len(points_of(place(tmp_path))) == 1


@pytest.mark.parametrize("mode", ["read", "write"])
def test_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path, mode: Any) -> None:
    path = tmp_path / "history.sqlite"
    path.write_text("these are notes, not a database\n" * 100)
    with (
        pytest.raises(HistoryError, match=r"is damaged or no SQLite file: file is not a database\. It was left as it"),
        open_history(place(tmp_path), mode=mode),
    ):
        pass
    assert path.read_text().startswith("these are notes")


def test_damaged_store_is_named_and_left_alone(tmp_path: Path) -> None:
    add(place(tmp_path), *(results(i, *(record(test=f"test_{j}") for j in range(30))) for i in range(20)))
    path = tmp_path / "history.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)

    with pytest.raises(HistoryError, match=r"is damaged or no SQLite file: .*malformed.*sqlite3 OLD \.recover"):
        add(place(tmp_path), results(20))
    with pytest.raises(HistoryError, match=r"is damaged"), open_history(place(tmp_path)) as history:
        history.summaries()
    assert path.read_bytes() == bytes(content)


def test_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(HistoryError, match=r"is a database of another program, not a history\. Name another file"):
        add(place(tmp_path), results(0))
    assert path.read_bytes() == content


def test_store_of_a_newer_version_says_upgrade(tmp_path: Path) -> None:
    add(place(tmp_path), results(0))
    connection = sqlite3.connect(tmp_path / "history.sqlite")
    connection.execute(f"PRAGMA user_version = {STORE_SCHEMA + 1}")
    connection.close()
    with pytest.raises(HistoryError, match=r"has schema 2, this version reads 1\. Upgrade:  pip install --upgrade"):
        add(place(tmp_path), results(1))


def test_locked_store_says_who_may_hold_it_and_how_to_add_later(tmp_path: Path) -> None:
    add(place(tmp_path), results(0))
    holder = sqlite3.connect(tmp_path / "history.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    message = r"was locked for 0\.05 s\. Another run .*fuser -v .*The results file is kept; add it later:  gpuperf hist"
    with (
        pytest.raises(HistoryError, match=message),
        open_history(place(tmp_path), mode="write", timeout_s=0.05) as history,
    ):
        history.add(results(1))
    assert len(points_of(place(tmp_path))) == 1  # whoever reads does not wait
    holder.execute("ROLLBACK")
    holder.close()
    add(place(tmp_path), results(1))
    assert len(points_of(place(tmp_path))) == 2


def test_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HistoryError, match=r"The folder of .* cannot be made: File exists\. The results file is"):
        add(place_of(str(tmp_path / "file/h.sqlite")), results(0))


def test_folder_as_a_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"cannot be opened: unable to open database file\. Does its folder exist"):
        add(place_of(str(tmp_path)), results(0))


def _fill_up_and_add(history: History, run: Results) -> None:
    history._connection.execute("PRAGMA max_page_count = 1")  # as many as there are
    history.add(run)


def test_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    add(place(tmp_path), results(0))
    large = results(1, *(record(test=f"test_{'x' * 500}{i}") for i in range(100)))
    message = r"cannot grow: database or disk is full\. Make room\. The results file"
    with pytest.raises(HistoryError, match=message), open_history(place(tmp_path), mode="write") as history:
        _fill_up_and_add(history, large)
    assert [point.run_id for point in points_of(place(tmp_path))] == ["run0"]


WRITER = """
import sys
from test_analysis_history import add, place_of, results
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    add(place_of(sys.argv[1]), results(number, date="2026-11-01T10:00:00+00:00"))
"""


def test_many_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    starts = [f"{sys.executable} -c '{WRITER}' {tmp_path}/history.sqlite {i * 5} {i * 5 + 5} &" for i in range(4)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = run_group(["sh", "-c", " ".join([*starts, "wait"])], timeout_s=60, environment=environment)
    assert (done.code, done.tail) == (0, "")
    assert sorted(point.run_id for point in points_of(place(tmp_path))) == sorted(f"run{i}" for i in range(20))


def test_process_killed_while_it_writes_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    add(place(tmp_path), results(0))
    script = """
import os, signal, sys
from pytest_gpuperf.analysis.history_file import open_file, place_of, transaction
with open_file(place_of(sys.argv[1]), mode="write") as connection, transaction(connection):
    connection.execute("DELETE FROM points")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "history.sqlite")]
    assert run_group(command, timeout_s=60, environment=environment).code == -9
    assert [point.run_id for point in points_of(place(tmp_path))] == ["run0"]


# Levels


def point(number: int, value: float = 1e-3, **changes: Any) -> Point:
    return replace(
        Point(
            run_id=f"run{number}",
            date=f"2026-11-{number + 1:02}T10:00:00+00:00",
            visit=f"visit{number}",
            commit=f"commit{number}",
            attempt=0,
            value=value,
            spread=None,
            devices=("a",),
            status="PASS",
            change=None,
            sm_clock_mhz=None,
        ),
        **changes,
    )


TIME = Series(
    id=1,
    slug="nvidia-h100",
    module="test_a.py",
    test="test_copy",
    metric="time",
    unit="s",
    method="cold, cuda-events",
    better="lower",
    kind="memory",
)
RATE = replace(TIME, metric="bandwidth", unit="B/s", better="higher")
WOBBLE = (1.0, 1.001, 0.999, 1.0005, 0.9995, 1.001, 0.999, 1.0, 1.0005, 0.9995)


def stepped(before: float, after: float) -> list[Point]:
    return [point(i, wobble * (before if i < 5 else after)) for i, wobble in enumerate(WOBBLE)]


def test_step_names_the_observations_on_both_sides_and_the_values() -> None:
    (step,) = levels(TIME, stepped(1e-3, 1.1e-3)).steps
    assert (step.last.commit, step.first.commit) == ("commit4", "commit5")
    assert step.first.date == "2026-11-06T10:00:00+00:00"
    assert (step.value_before, step.value_after) == pytest.approx((1e-3, 1.1e-3), rel=1e-3)
    assert step.change_low < 0.1 < step.change_high
    assert step.change == pytest.approx(0.1, abs=0.002)


def test_rate_that_halves_is_a_hundred_percent_slower() -> None:
    (step,) = levels(RATE, stepped(2e12, 1e12)).steps
    assert step.change == pytest.approx(1.0, abs=0.01)
    assert (step.value_before, step.value_after) == pytest.approx((2e12, 1e12), rel=1e-3)


def test_invalid_values_are_left_out_and_counted() -> None:
    points = [replace(one, status="INVALID") if i >= 5 else one for i, one in enumerate(stepped(1e-3, 2e-3))]
    found = levels(TIME, points)
    assert (found.steps, found.invalid, found.observations) == ((), 5, 5)
    assert found.is_too_short


def test_runs_dated_back_are_counted_and_stay_where_they_were_added() -> None:
    points = stepped(1e-3, 1.1e-3)
    points[5:] = [replace(one, date=f"2020-01-{i + 1:02}T00:00:00+00:00") for i, one in enumerate(points[5:])]
    found = levels(TIME, points)
    assert found.backwards == 5
    assert found.steps[0].first.commit == "commit5"


def test_by_date_puts_late_results_where_they_belong() -> None:
    points = stepped(1e-3, 1.1e-3)
    found = levels(TIME, [*points[5:], *points[:5]], by_date=True)
    assert found.backwards == 0
    assert found.steps[0].first.commit == "commit5"


def test_devices_that_were_replaced_are_named() -> None:
    points = [replace(one, devices=("b",)) if i >= 5 else one for i, one in enumerate(stepped(1e-3, 1.1e-3))]
    found = levels(TIME, points)
    assert found.steps == ()
    assert [one.commit for one in found.replaced] == ["commit5"]


def values(points: Sequence[Point]) -> list[float]:
    return [one.value for one in observations(points)]


def test_runs_of_one_commit_in_one_visit_are_one_observation() -> None:
    same = {"visit": "v", "commit": "c"}
    assert values([point(0, 1.0, **same), point(1, 4.0, **same), point(2, 8.0)]) == pytest.approx([2.0, 8.0])


@pytest.mark.parametrize("commit", [None, "abc-dirty"])
def test_runs_whose_code_is_not_known_stand_each_for_itself(commit: str | None) -> None:
    same = {"visit": "v", "commit": commit}
    assert values([point(0, 1.0, **same), point(1, 4.0, **same)]) == pytest.approx([1.0, 4.0])


def test_first_process_of_a_run_that_was_measured_again_is_left_out() -> None:
    points = [point(0, value, attempt=i) for i, value in enumerate((9.0, 1.0, 4.0))]
    assert values(points) == pytest.approx([2.0])


@given(numbers=st.lists(st.floats(1e-4, 1e-2), max_size=28))
@settings(max_examples=30, deadline=None)
def test_steps_are_in_order_and_within_the_series(numbers: list[float]) -> None:
    found: Levels = levels(TIME, [point(i, value) for i, value in enumerate(numbers)])
    assert found.observations == len(numbers)
    assert all(one.first.date < two.first.date for one, two in pairwise(found.steps))
    assert all(step.change_low < step.change < step.change_high for step in found.steps)
