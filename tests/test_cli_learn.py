"""`gpuperf baseline learn` and `drift`, and the drift that is told after a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from harness import Suite, bytes_of_baselines, gpuperf
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf import priors
from pytest_gpuperf.analysis.drift import change_between
from pytest_gpuperf.baseline_file import baseline_path, dumps
from pytest_gpuperf.priors import package_priors, read_priors
from pytest_gpuperf.records import (
    SCHEMA,
    BaselineFile,
    BaselineRun,
    Environment,
    Hardware,
    Kind,
    Measurement,
    Method,
    MetricBaseline,
    Session,
    TestKey,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.report.terminal import notes
from pytest_gpuperf.stats import SessionLogs, Variance, VarianceComponents
from pytest_gpuperf.units import Better

H100 = Hardware(name="NVIDIA H100 80GB HBM3", memory_bytes=85_520_809_984)
SLUG = "nvidia-h100-80gb-hbm3"
METHOD = Method(clock="cuda-events", mode="cold")


def epoch(
    *sessions: Sequence[float], devices: str = "", kind: Kind = "compute", better: Better = "lower", day: int = 1
) -> MetricBaseline:
    """Weekly sessions with these values, on the GPUs named by a letter each."""
    return MetricBaseline(
        unit="s" if better == "lower" else "FLOP/s",
        better=better,
        kind=kind,
        method=METHOD,
        sessions=tuple(
            Session(
                date=f"2026-09-{day + i:02}T08:00:00+00:00",
                visit=f"visit {i}",
                devices=(devices[i] if devices else "a",),
                environment="e",
                runs=tuple(BaselineRun(value=value) for value in values),
            )
            for i, values in enumerate(sessions)
        ),
    )


def write(
    folder: Path,
    tests: dict[str, MetricBaseline],
    *,
    slug: str = SLUG,
    hardware: Hardware = H100,
    root: str = "baselines",
) -> Path:
    file = BaselineFile(
        schema=SCHEMA,
        module="test_a.py",
        environments={"e": Environment(hardware=hardware)},
        tests={name: {"time": baseline} for name, baseline in tests.items()},
    )
    path = baseline_path(folder / root, slug, "test_a.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dumps(file))
    return path


#: Three metrics with three visits of two runs to each of two GPUs.
RICH = {
    f"test_{i}": epoch(
        *(
            [level * (1 + scale * offset), level * (1 - scale * offset / 2)]
            for level, offset in zip((1, 1, 1, 1.01, 1.01, 1.01), (1, 2, -1.5, 3, 0.5, 2.5), strict=True)
        ),
        devices="aaabbb",
    )
    for i, scale in enumerate((0.001, 0.002, 0.0015))
}
#: Three metrics that show only what GPUs differ by.
POOR = {f"test_{i}": epoch([1.0], [1.0 + scale], devices="ab") for i, scale in enumerate((0.01, 0.02, 0.015))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Learning


def test_learning_writes_what_the_judge_reads(folder: Path) -> None:
    write(folder, POOR)
    assert gpuperf("baseline", "learn").code == 0
    level = read_priors(folder / "baselines", SLUG)["compute"].device
    assert level.origin == f"3 metrics of baselines/{SLUG}, 2026-09-02"
    assert level != package_priors()["compute"].device


def test_learned_file_is_sorted_and_indented_by_two_spaces(folder: Path) -> None:
    write(folder, POOR)
    gpuperf("baseline", "learn")
    text = (folder / "baselines" / SLUG / ".priors.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_table_says_what_was_known_before_and_how_many_metrics_showed_it(folder: Path) -> None:
    write(folder, POOR)
    lines = gpuperf("baseline", "learn").output.splitlines()
    assert lines[0] == f"{SLUG}: 3 metrics"
    assert lines[1].split() == ["kind", "level", "before", "now", "worth", "metrics"]
    assert lines[2].split() == ["compute", "within", "0.18", "%", "=", "7.9", "0"]
    assert lines[4].split()[:4] == ["compute", "device", "1.1", "%"]
    assert lines[4].split()[-1] == "3"


def test_levels_that_too_few_metrics_show_stay_and_are_named(folder: Path) -> None:
    write(folder, POOR)
    done = gpuperf("baseline", "learn")
    assert priors._ENOUGH_METRICS == 3
    assert "Fewer than three metrics show these, so they stay as they were: compute within," in done.output
    learned = read_priors(folder / "baselines", SLUG)["compute"]
    assert learned.within == package_priors()["compute"].within


def test_all_levels_are_learned_where_enough_metrics_show_them(folder: Path) -> None:
    write(folder, RICH)
    done = gpuperf("baseline", "learn")
    assert "Fewer than three" not in done.output
    learned = read_priors(folder / "baselines", SLUG)["compute"]
    assert {level.origin for level in (learned.within, learned.session, learned.device)} == {
        f"3 metrics of baselines/{SLUG}, 2026-09-06"
    }


def test_nothing_learned_is_said_and_not_written(folder: Path) -> None:
    write(folder, {"test_a": epoch([1.0])})
    done = gpuperf("baseline", "learn")
    assert done.code == 0
    assert "Nothing was learned, and nothing written." in done.output
    assert not (folder / "baselines" / SLUG / ".priors.json").exists()


def test_learning_twice_changes_nothing(folder: Path) -> None:
    write(folder, RICH)
    gpuperf("baseline", "learn")
    path = folder / "baselines" / SLUG / ".priors.json"
    first = path.read_bytes()
    gpuperf("baseline", "learn")
    assert path.read_bytes() == first


def test_learning_mends_a_file_that_cannot_be_read(folder: Path) -> None:
    write(folder, RICH)
    path = folder / "baselines" / SLUG / ".priors.json"
    path.write_text("rubbish")
    assert gpuperf("baseline", "learn").code == 0
    assert read_priors(folder / "baselines", SLUG)["compute"].within != package_priors()["compute"].within


def test_baselines_of_a_cpu_teach_about_cpus(folder: Path) -> None:
    write(folder, POOR, slug="cpu-xeon", hardware=Hardware(name="Xeon"))
    gpuperf("baseline", "learn")
    learned = read_priors(folder / "baselines", "cpu-xeon")
    assert learned["cpu"].device.origin.startswith("3 metrics of ")
    assert learned["compute"] == package_priors()["compute"]


def test_each_kind_of_device_learns_by_itself(folder: Path) -> None:
    write(folder, POOR)
    write(folder, {"test_a": epoch([1.0])}, slug="nvidia-l4")
    done = gpuperf("baseline", "learn", "--baselines", "baselines")
    assert f"{SLUG}: 3 metrics" in done.output
    assert "nvidia-l4: 1 metrics" in done.output
    assert not (folder / "baselines" / "nvidia-l4" / ".priors.json").exists()


def test_table_of_learning_fits_into_80_columns(folder: Path) -> None:
    write(folder, POOR)
    assert max(map(len, gpuperf("baseline", "learn").output.splitlines())) <= 80


@pytest.mark.parametrize("command", ["learn", "drift"])
def test_missing_baselines_are_told(folder: Path, command: str) -> None:
    done = gpuperf("baseline", command, "--baselines", "nowhere")
    assert done.code == 1
    assert done.errors.startswith("gpuperf: No baselines in nowhere. Run pytest, then: gpuperf baseline record")


def test_what_was_learned_is_no_baseline_to_the_other_commands(pytester: pytest.Pytester) -> None:
    tests = "".join(f"def test_{i}(gpu_benchmark):\n    gpu_benchmark(lambda: TIME_S)\n" for i in "abc")
    suite = Suite(files={"test_suite.py": tests}).record(pytester)
    before = bytes_of_baselines(pytester)
    (folder,) = (path for path in (pytester.path / "baselines").iterdir() if path.is_dir())
    write(pytester.path, POOR, root="other")
    gpuperf("baseline", "learn", "--baselines", "other")
    (folder / ".priors.json").write_bytes((pytester.path / "other" / SLUG / ".priors.json").read_bytes())

    assert suite.run(pytester, "--gpuperf-update").ret == 0
    assert "3 tests" in gpuperf("baseline", "list").output
    assert gpuperf("baseline", "show").code == 0
    assert "0 unused baselines deleted" in gpuperf("baseline", "prune").output
    assert suite.run(pytester, "--gpuperf-patch", "new.patch").ret == 0
    assert ".priors.json" not in (pytester.path / "new.patch").read_text()
    assert bytes_of_baselines(pytester).keys() == before.keys()
    assert (folder / ".priors.json").exists()


# Drift


def drifting(step: float, count: int = 10, *, better: Better = "lower", devices: str = "") -> MetricBaseline:
    sign = 1 if better == "lower" else -1
    return epoch(*([(1 + step) ** (sign * i)] for i in range(count)), better=better, devices=devices)


def test_drift_is_sorted_by_size_and_marks_what_is_beyond_the_tolerance(folder: Path) -> None:
    write(folder, {"test_still": drifting(0.0), "test_worst": drifting(0.02), "test_little": drifting(0.005)})
    lines = gpuperf("baseline", "drift").output.splitlines()
    assert [line for line in lines if line.startswith("test_a.py")] == [
        "test_a.py::test_worst time",
        "test_a.py::test_little time",
        "test_a.py::test_still time",
    ]
    assert lines[1].startswith("  10 % slower (")
    assert lines[1].endswith("2026-09-01 to 2026-09-10, BEYOND 3.0 %")
    assert lines[-1] == "1 of 3 metrics are slower by more than the usual tolerance of their kind."


def test_drift_of_a_rate_is_slower_where_it_falls(folder: Path) -> None:
    write(folder, {"test_rate": drifting(0.02, better="higher")})
    assert "  10 % slower (" in gpuperf("baseline", "drift").output


def test_drift_to_the_better_is_faster(folder: Path) -> None:
    write(folder, {"test_a": drifting(-0.02)})
    assert "  9.6 % faster (" in gpuperf("baseline", "drift").output


def test_drift_that_noise_explains_says_so(folder: Path) -> None:
    write(folder, {"test_a": drifting(0.0001)})
    done = gpuperf("baseline", "drift")
    assert ", may be noise" in done.output
    assert "0 of 1 metrics" in done.output


def test_epoch_of_five_sessions_cannot_drift_yet(folder: Path) -> None:
    write(folder, {"test_a": drifting(0.02, count=5)})
    assert gpuperf("baseline", "drift").output == "No metric has more than 5 sessions, so no drift can show yet.\n"


def test_drift_is_of_the_tests_that_are_named(folder: Path) -> None:
    write(folder, {"test_one": drifting(0.02), "test_two": drifting(0.02)})
    output = gpuperf("baseline", "drift", "two").output
    assert "test_two" in output
    assert "test_one" not in output


def test_drift_of_a_test_that_is_not_there_is_a_mistake(folder: Path) -> None:
    write(folder, {"test_a": drifting(0.02)})
    done = gpuperf("baseline", "drift", "test_b")
    assert done.code == 1
    assert done.errors == "gpuperf: No baseline of test_b in baselines has more than 5 sessions.\n"


def test_other_gpus_are_not_taken_for_drift(folder: Path) -> None:
    # 2 % slower GPUs came in; the two that were there all along did not change.
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.02, 1.02, 1.02, 1.0]
    write(folder, {"test_a": epoch(*([value] for value in values), devices="abababcdea")})
    line = gpuperf("baseline", "drift").output.splitlines()[1]
    assert line.endswith("may be noise")
    assert float(line.split()[0]) < 0.6  # a mean of the values alone would say 1.2 %


COMPONENTS = VarianceComponents(
    within=Variance(value=1e-6, degrees_of_freedom=8),
    session=Variance(value=4e-6, degrees_of_freedom=6),
    device=Variance(value=1e-4, degrees_of_freedom=5),
)


def sessions(*logs: float, devices: str) -> list[SessionLogs]:
    return [
        SessionLogs(device_group=device, logs=(log,), visit=object()) for log, device in zip(logs, devices, strict=True)
    ]


def test_change_on_one_device_is_the_difference_of_the_means_with_the_error_of_both() -> None:
    before, after = sessions(0.0, 0.002, devices="aa"), sessions(0.01, 0.012, 0.014, devices="aaa")
    change = change_between(before, after, COMPONENTS)
    assert change.centre == pytest.approx(0.011)
    parts = [1e-6 * (1 / 2 + 1 / 3), 4e-6 * (1 / 2 + 1 / 3)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 8 + parts[1] ** 2 / 6)
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert (change.high - change.low) / 2 == pytest.approx(half)


@given(offsets=st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3), shift=st.floats(-0.1, 0.1))
def test_what_devices_add_on_both_sides_drops_out_of_the_change(offsets: list[float], shift: float) -> None:
    before = sessions(*offsets, devices="abc")
    after = sessions(*(offset + shift for offset in offsets), devices="abc")
    assert change_between(before, after, COMPONENTS).centre == pytest.approx(shift, abs=1e-12)


def test_interval_of_the_change_holds_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(3)
    known = replace_freedom(COMPONENTS, 1e6)
    held = 0
    for _ in range(400):
        devices = dict(zip("abcd", chance.normal(0, 1e-2, 4), strict=True))
        logs = [devices[d] + chance.normal(0, 2e-3) + chance.normal(0, 1e-3) for d in "aabbcacddb"]
        change = change_between(sessions(*logs[:5], devices="aabbc"), sessions(*logs[5:], devices="acddb"), known)
        held += change.low <= 0 <= change.high
    assert 0.92 <= held / 400 <= 0.98


def replace_freedom(components: VarianceComponents, freedom: float) -> VarianceComponents:
    from dataclasses import replace as changed

    return VarianceComponents(
        within=changed(components.within, degrees_of_freedom=freedom),
        session=changed(components.session, degrees_of_freedom=freedom),
        device=changed(components.device, degrees_of_freedom=freedom),
    )


# Drift, told after a run

PASSED = Verdict(
    status="PASS",
    metric="time",
    reason="",
    tolerance=0.03,
    change=0.005,
    change_low=-0.005,
    change_high=0.015,
    minimum_detectable_effect=0.02,
    drift=0.021,
    sessions=12,
)


def drift_notes(*verdicts: Verdict) -> list[str]:
    records = [
        TestRecord(
            key=TestKey(module="test_a.py", test=f"test_{i}"),
            slug=SLUG,
            devices=("a",),
            environment=Environment(hardware=H100),
            measurements=(
                Measurement(metric="time", value=1.0, unit="s", better="lower", kind="compute", method=METHOD),
            ),
            verdicts=(verdict,),
        )
        for i, verdict in enumerate(verdicts)
    ]
    texts = [line.text for line in notes(records, record_command=None)]
    return [text for text in texts if "rift" in text]


def test_drift_of_more_than_half_the_tolerance_is_told_with_the_command_that_shows_it() -> None:
    told, command = drift_notes(PASSED)
    assert told == "Drift test_0 time: +2.1 % since this epoch's first 5 sessions, tolerance 3.0 %."
    assert command.endswith("baseline drift")


@pytest.mark.parametrize(
    "changes",
    [
        {"drift": 0.014},
        {"drift": -0.021},
        {"drift": None},
        {"change_high": 0.05},
        {"status": "REGRESSED"},
    ],
    ids=["below half the tolerance", "faster", "no more than five sessions", "within noise", "red already"],
)
def test_other_drift_is_not_told(changes: dict[str, object]) -> None:
    assert drift_notes(replace(PASSED, **changes)) == []


def test_three_drifts_are_told_the_worst_first_and_the_others_counted() -> None:
    lines = drift_notes(*(replace(PASSED, drift=0.02 + 0.001 * i) for i in range(5)))
    assert [line.split()[1] for line in lines[:3]] == ["test_4", "test_3", "test_2"]
    assert lines[3].startswith("2 more metrics drifted. See how far, and since when:  ")
