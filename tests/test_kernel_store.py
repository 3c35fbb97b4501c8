"""What ran, beside the baselines: what an update does with it, and files that cannot be trusted."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf import kernel_store
from pytest_gpuperf.baseline_file import baseline_path, encode, list_files
from pytest_gpuperf.baseline_patch import git_patch
from pytest_gpuperf.baseline_store import prune, write
from pytest_gpuperf.baselines import plan
from pytest_gpuperf.errors import BaselineError
from pytest_gpuperf.kernel_store import (
    KernelsFile,
    StoredKernels,
    kernels_of,
    kernels_path,
    read_kernels,
    with_kernels,
    without_kernels,
)
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    KernelRecord,
    KernelSummary,
    KernelUse,
    Measurement,
    Method,
    RunInfo,
    Status,
    TestKey,
    TestRecord,
    Verdict,
)

MODULE = "perf_tests/test_matmul.py"
RUN = RunInfo(schema=1, run_id="r", date="2026-01-01T00:00:00Z", visit="v0", commit="abc123")
ENVIRONMENT = Environment(hardware=Hardware(name="NVIDIA H100", power_limit_w=700.0), versions={"torch": "2.9"})


def summary(kernel: str = "gemm", count: int = 1, seconds: float = 1.23456789e-3) -> KernelSummary:
    uses = tuple(KernelUse(name=f"{kernel}{i or ''}", count=1.0, time_s=seconds / (i + 1)) for i in range(count))
    return KernelSummary(
        calls=200, wall_s=seconds, span_s=seconds, busy_s=seconds, longest_gap_s=0.0, kernels=uses, launches=1.0
    )


def judged(status: Status = "NEW", *, test: str = "test_a", metric: str = "time", module: str = MODULE) -> TestRecord:
    method = Method(clock="cuda-events", mode="cold")
    measured = Measurement(metric=metric, value=1e-3, unit="s", better="lower", kind="compute", method=method)
    return TestRecord(
        key=TestKey(module=module, test=test),
        slug="h100",
        devices=("gpu-1",),
        environment=ENVIRONMENT,
        measurements=(measured,),
        verdicts=(Verdict(status=status, metric=metric, reason="as judged", tolerance=0.03),),
    )


def seen(record: TestRecord, kernel: str = "gemm", **changes: Any) -> KernelRecord:
    return KernelRecord(key=record.key, metric=record.measurements[0].metric, kernels=summary(kernel, **changes))


def update(
    root: Path, record: TestRecord, *profiles: KernelRecord, reason: str | None = None, run: RunInfo = RUN
) -> None:
    write(root, run, [record], accept_reason=reason, profiles=profiles)


def path_in(root: Path) -> Path:
    return kernels_path(root, "h100", MODULE)


def stored(root: Path, record: TestRecord) -> list[str] | None:
    found = kernels_of(root, record, record.measurements[0].metric)
    return [use.name for use in found.kernels.kernels] if found else None


def test_kernels_are_kept_beside_their_baseline(tmp_path: Path) -> None:
    record = judged()
    update(tmp_path, record, seen(record))
    assert path_in(tmp_path).parent == baseline_path(tmp_path, "h100", MODULE).parent
    found = kernels_of(tmp_path, record, "time")
    assert found is not None
    assert (found.date, found.commit) == ("2026-01-01T00:00:00Z", "abc123")
    assert stored(tmp_path, record) == ["gemm"]
    file = read_kernels(path_in(tmp_path))
    assert file is not None
    assert file.environments[found.environment] == ENVIRONMENT


def test_the_file_makes_small_diffs(tmp_path: Path) -> None:
    """Sorted, indented, five significant digits, nothing that is not known."""
    record = judged()
    update(tmp_path, record, seen(record))
    text = path_in(tmp_path).read_text()
    tree = json.loads(text)
    assert text == json.dumps(tree, indent=2, sort_keys=True) + "\n"
    assert tree["tests"]["test_a"]["time"]["kernels"]["kernels"] == [
        {"count": 1.0, "kind": "kernel", "name": "gemm", "time_s": 0.0012346}
    ]


def test_it_is_no_baseline(tmp_path: Path) -> None:
    record = judged()
    update(tmp_path, record, seen(record))
    assert list_files(tmp_path) == (baseline_path(tmp_path, "h100", MODULE),)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    record = judged()
    with pytest.raises(BaselineError, match=r"What ran in perf_tests/test_matmul\.py cannot be kept: .*negative"):
        update(tmp_path, record, seen(record, seconds=-1.0))
    assert not path_in(tmp_path).exists()


def test_without_kernels_there_is_no_file(tmp_path: Path) -> None:
    record = judged()
    update(tmp_path, record)
    assert not path_in(tmp_path).exists()
    assert kernels_of(tmp_path, record, "time") is None


def test_a_module_called_kernels_has_a_baseline_of_another_name(tmp_path: Path) -> None:
    """`a/kernels.py` beside `a.py`."""
    assert kernels_path(tmp_path, "h100", "a.py") != baseline_path(tmp_path, "h100", "a/kernels.py")
    record = judged(module="perf_tests/test_matmul/kernels.py")
    update(tmp_path, record)
    assert len(list_files(tmp_path)) == 1


def test_a_further_session_leaves_the_kernels_as_they_are(tmp_path: Path) -> None:
    """They are of the baseline, and of none of its later sessions: no diff at each update."""
    record = judged()
    update(tmp_path, record, seen(record))
    before = path_in(tmp_path).read_bytes()
    again = judged("PASS")
    update(tmp_path, again, seen(again, "other"), run=replace(RUN, run_id="r2"))
    assert path_in(tmp_path).read_bytes() == before


def test_a_new_epoch_has_the_kernels_of_its_own(tmp_path: Path) -> None:
    record = judged()
    update(tmp_path, record, seen(record))
    slower = judged("REGRESSED")
    update(tmp_path, slower, seen(slower, "slow_gemm"), reason="meant", run=replace(RUN, run_id="r2"))
    assert stored(tmp_path, slower) == ["slow_gemm"]


def test_a_new_epoch_of_which_nothing_was_seen_has_none(tmp_path: Path) -> None:
    """Those of the last one would explain another value."""
    record, other = judged(), judged(test="test_b")
    update(tmp_path, record, seen(record))
    update(tmp_path, other, seen(other))
    update(tmp_path, judged("REGRESSED"), reason="meant", run=replace(RUN, run_id="r2"))
    assert stored(tmp_path, record) is None
    assert stored(tmp_path, other) == ["gemm"]


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    record = judged()
    update(tmp_path, record, seen(record))
    slower = judged("REGRESSED")
    update(tmp_path, slower, seen(slower, "slow_gemm"), run=replace(RUN, run_id="r2"))
    assert stored(tmp_path, record) == ["gemm"]


def test_a_baseline_without_kernels_gets_them_when_they_are_seen(tmp_path: Path) -> None:
    update(tmp_path, judged())
    record = judged("PASS")
    update(tmp_path, record, seen(record), run=replace(RUN, run_id="r2"))
    assert stored(tmp_path, record) == ["gemm"]


@pytest.mark.parametrize(
    ("status", "reason", "has_kernels", "lacks"),
    [
        ("NEW", None, False, True),
        ("NEW", None, True, True),
        ("PASS", None, False, True),
        ("PASS", None, True, False),
        ("REGRESSED", None, False, False),
        ("REGRESSED", "meant", True, True),
        ("INVALID", "meant", False, False),
    ],
)
def test_what_is_to_be_profiled_is_what_becomes_a_baseline_without_kernels(
    tmp_path: Path, status: Status, reason: str | None, has_kernels: bool, lacks: bool
) -> None:
    first = judged()
    update(tmp_path, first, *([seen(first)] if has_kernels else []))
    record = judged(status)
    assert bool(without_kernels(tmp_path, [record], accept_reason=reason)) == lacks


def test_a_file_is_read_once_however_many_tests_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [judged("PASS", test=f"test_{n}") for n in range(5)]
    paths: list[Path] = []
    monkeypatch.setattr(kernel_store, "read_bytes", paths.append)
    assert len(without_kernels(tmp_path, records, accept_reason=None)) == 5
    assert paths == [path_in(tmp_path)]


def test_pruning_takes_the_kernels_along(tmp_path: Path) -> None:
    for name in ("test_a", "test_b"):
        record = judged(test=name)
        update(tmp_path, record, seen(record))
    assert prune(tmp_path, "h100", [(TestKey(module=MODULE, test="test_a"), "time")]) == 1
    assert stored(tmp_path, judged()) is None
    assert stored(tmp_path, judged(test="test_b")) == ["gemm"]
    prune(tmp_path, "h100", [(TestKey(module=MODULE, test="test_b"), "time")])
    assert not path_in(tmp_path).exists()


def test_a_patch_contains_them(tmp_path: Path) -> None:
    root, record = tmp_path / "baselines", judged()
    made = with_kernels(plan(root, RUN, [record], accept_reason=None), root, RUN, [record], [seen(record)])
    text = git_patch(root, made, top=tmp_path)
    assert "+++ b/baselines/h100/perf_tests.test_matmul.kernels.json" in text
    assert '+              "name": "gemm"' in text


def test_twenty_metrics_of_forty_kernels_are_a_small_file(tmp_path: Path) -> None:
    """Names as long as they may be: 300 kB, as much as a picture."""
    for i in range(20):
        record = judged(test=f"test_{i}")
        update(tmp_path, record, seen(record, "x" * 238, count=40))
    assert path_in(tmp_path).stat().st_size < 350_000


GOOD = KernelsFile(
    schema=1,
    module=MODULE,
    environments={"e": ENVIRONMENT},
    tests={"test_a": {"time": StoredKernels(date="2026-01-01", environment="e", kernels=summary())}},
)


def put(root: Path, **changes: Any) -> Path:
    path = path_in(root)
    path.parent.mkdir(parents=True)
    tree = json.loads(encode(GOOD))
    path.write_text(json.dumps({**tree, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, r"newer pytest-gpuperf \(schema 2, this version reads 1\)"),
        ({"schema": None}, r"\$\.schema is None, not 1"),
        ({"module": "other.py"}, r"is the baseline of 'other\.py', not of 'perf_tests/test_matmul\.py'"),
        ({"extra": 1}, r"unknown field `extra`"),
        ({"environments": {}}, r"\$\.tests\['test_a'\]\['time'\]\.environment 'e' is not in \$\.environments"),
        ({"tests": {"test_a": {"time": {"date": "x"}}}}, r"\$\.tests.*missing required field"),
        ({"tests": {"test_a": -1}}, r"\$\.tests\.test_a is -1, but no number"),
    ],
)
def test_a_file_that_is_not_sound_names_itself_and_the_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = put(tmp_path, **changes)
    with pytest.raises(BaselineError, match=message) as error:
        read_kernels(path, module=MODULE)
    assert str(error.value).startswith(str(path))


def test_merge_markers_are_named_with_their_line(tmp_path: Path) -> None:
    path = put(tmp_path)
    path.write_text("{\n<<<<<<< ours\n}")
    with pytest.raises(BaselineError, match=r"merge markers: '<<<<<<< ours' in line 2"):
        read_kernels(path)


def test_an_update_leaves_a_file_that_is_not_sound_alone(tmp_path: Path) -> None:
    path = put(tmp_path, schema=2)
    before = path.read_bytes()
    record = judged()
    with pytest.raises(BaselineError, match="newer"):
        update(tmp_path, record, seen(record))
    assert path.read_bytes() == before
    assert not baseline_path(tmp_path, "h100", MODULE).exists()


_NUMBERS = st.floats(0, 1e12)
_USES = st.builds(
    KernelUse,
    name=st.text(max_size=20),
    kind=st.sampled_from(["kernel", "copy", "fill"]),
    count=_NUMBERS,
    time_s=_NUMBERS,
    blocks=st.none() | _NUMBERS,
)


@given(st.lists(_USES, max_size=3))
def test_what_is_written_is_read_to_five_digits(uses: list[KernelUse]) -> None:
    kernels = replace(summary(), kernels=tuple(uses))
    stored_ones = {"test_a": {"time": StoredKernels(date="d", environment="e", kernels=kernels)}}
    data = encode(replace(GOOD, tests=stored_ones))
    back = kernel_store._decode(data)
    [read_back] = back.tests["test_a"].values()
    assert [(use.name, use.kind) for use in read_back.kernels.kernels] == [(use.name, use.kind) for use in uses]
    for ours, theirs in zip(read_back.kernels.kernels, uses, strict=True):
        assert ours.time_s == pytest.approx(theirs.time_s, rel=5e-5)
    assert encode(back) == data
