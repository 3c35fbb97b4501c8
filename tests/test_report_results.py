"""results.jsonl: on disk after every test, an older file kept until there is something newer, and plain errors."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import (
    RESULTS_SCHEMA,
    Curve,
    Environment,
    Hardware,
    Measurement,
    Method,
    RunEnd,
    TestKey,
    TestRecord,
    Verdict,
    encode,
)
from pytest_gpuperf.report.results import ResultsWriter, read_results

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]


def record(test: str = "test_copy") -> TestRecord:
    return TestRecord(
        key=TestKey(module="perf_tests/test_bandwidth.py", test=test),
        slug="nvidia-h100",
        devices=("0123456789ab",),
        environment=Environment(hardware=Hardware(name="NVIDIA H100")),
        measurements=(
            Measurement(
                metric="bandwidth",
                value=3e12,
                unit="B/s",
                better="higher",
                kind="memory",
                method=Method(clock="cuda-events", mode="cold"),
            ),
        ),
        verdicts=(Verdict(status="NEW", metric="bandwidth", reason="No baseline on this device.", tolerance=0.03),),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".gpuperf" / "results.jsonl"


@pytest.fixture
def writer(path: Path, tmp_path: Path) -> ResultsWriter:
    return ResultsWriter(path, tmp_path)


def test_every_test_is_on_disk_before_the_next_one(writer: ResultsWriter, path: Path) -> None:
    for count in (1, 2, 3):
        writer.add(record(f"test_{count}"))
        results = read_results(path)
        assert [one.key.test for one in results.tests] == [f"test_{i}" for i in range(1, count + 1)]
        assert results.end is None
    writer.end(("perf_tests/test_bandwidth.py::test_1",), is_whole=True)
    assert read_results(path).end == RunEnd(tests=("perf_tests/test_bandwidth.py::test_1",), is_whole=True)


def test_every_line_is_synchronised(writer: ResultsWriter, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[int] = []

    def fsync(descriptor: int) -> None:
        lines.append(path.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", fsync)
    writer.add(record())
    writer.add(record("test_read"))
    writer.end((), is_whole=False)
    assert lines == [1, 2, 3, 4]


def test_the_first_line_is_the_run(writer: ResultsWriter, path: Path) -> None:
    writer.add(record())
    run = read_results(path).run
    assert run == writer.run
    assert run.schema == RESULTS_SCHEMA
    assert run.date.endswith("+00:00")
    assert len(run.run_id) == 12
    assert path.read_bytes().splitlines()[0] == encode(run)


def test_two_runs_have_two_names(tmp_path: Path) -> None:
    runs = [ResultsWriter(tmp_path / name, tmp_path).run for name in "ab"]
    assert runs[0].run_id != runs[1].run_id
    assert runs[0].visit == runs[1].visit


def test_the_run_notes_the_revision_of_the_code(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*GIT, *command], cwd=root, check=True)
    told = subprocess.run([*GIT, "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True)
    assert ResultsWriter(tmp_path / "results.jsonl", root).run.commit == told.stdout[:12]


def test_an_older_file_stays_until_a_result_arrives(writer: ResultsWriter, path: Path) -> None:
    path.parent.mkdir()
    path.write_text("older\n")
    writer.end((), is_whole=True)
    assert path.read_text() == "older\n"
    writer.add(record())
    assert b"older" not in path.read_bytes()
    assert len(read_results(path).tests) == 1


def test_a_run_without_results_writes_nothing(writer: ResultsWriter, path: Path) -> None:
    writer.end((), is_whole=True)
    assert not path.parent.exists()


def test_our_own_folder_is_hidden_from_git_and_another_is_not(tmp_path: Path, writer: ResultsWriter) -> None:
    writer.add(record())
    ResultsWriter(tmp_path / "out" / "results.jsonl", tmp_path).add(record())
    assert (tmp_path / ".gpuperf" / ".gitignore").read_text() == "*\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("obstacle", ["folder in place of the file", "file in place of the folder"])
def test_a_place_that_cannot_be_written_is_an_os_error(path: Path, writer: ResultsWriter, obstacle: str) -> None:
    if obstacle == "folder in place of the file":
        path.mkdir(parents=True)
    else:
        path.parent.touch()
    with pytest.raises(OSError, match=r"results\.jsonl|gpuperf"):
        writer.add(record())


def test_a_killed_run_leaves_results_that_can_be_read(writer: ResultsWriter, path: Path) -> None:
    writer.add(record())
    with path.open("ab") as file:
        file.write(encode(record("test_cut"))[:50])
    results = read_results(path)
    assert [one.key.test for one in results.tests] == ["test_copy"]
    assert results.end is None


def test_a_disk_that_was_full_for_a_while_costs_one_record_and_not_all(
    writer: ResultsWriter, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.add(record("test_1"))

    def fsync(descriptor: int) -> None:
        os.ftruncate(descriptor, path.stat().st_size - 20)  # what did not fit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            writer.add(record("test_2"))
    writer.add(record("test_3"))
    assert [one.key.test for one in read_results(path).tests] == ["test_1", "test_3"]


# Reading


def test_missing_results_name_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_results(tmp_path / "results.jsonl")
    assert str(error.value) == (f"No results at {tmp_path / 'results.jsonl'}. Run pytest first, or name another file.")


def test_results_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_results(tmp_path)
    assert str(error.value) == f"Cannot read {tmp_path}: Is a directory."


@pytest.mark.parametrize("content", ["", "not json\n", '{"record": "end", "tests": [], "is_whole": true}\n'])
def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"Not a results file of pytest-gpuperf: "):
        read_results(path)


def test_a_file_that_is_not_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.touch()
    with pytest.raises(UsageError, match=r"results\.jsonl"):
        read_results(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": 0.0}, r"Expected `float` > 0\.0 - at `\$\.measurements\[0\]\.value`"),
        ({"value": -5.0}, r"Expected `float` > 0\.0"),
        ({"curve": Curve(x="batch size", points={"1": 0.0})}, r"Expected `float` > 0\.0 - at `.*curve\.points"),
        ({"curve": Curve(x="batch size", points={"one": 1.0})}, r"at `key` in `.*curve\.points`"),
    ],
)
def test_values_that_no_test_can_have_recorded_are_refused(
    path: Path, writer: ResultsWriter, changes: dict[str, Any], said: str
) -> None:
    """What sums and compares them takes logarithms."""
    one = record("test_1")
    writer.add(replace(one, measurements=(replace(one.measurements[0], **changes),)))
    with pytest.raises(UsageError, match=said):
        read_results(path)
