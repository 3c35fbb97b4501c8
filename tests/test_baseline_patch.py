"""The patch of a plan, applied by the real git."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pytest_gpuperf.baseline_file import baseline_path
from pytest_gpuperf.baseline_patch import git_patch
from pytest_gpuperf.baseline_store import write
from pytest_gpuperf.baselines import FileChange, Plan, plan
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Measurement,
    Method,
    RunInfo,
    TestKey,
    TestRecord,
    Verdict,
)

GIT = shutil.which("git")
pytestmark = pytest.mark.skipif(GIT is None, reason="git is not installed")

RUN = RunInfo(schema=1, run_id="r", date="2026-01-01T00:00:00Z", visit="v0")


def measured(module: str = "a.py", value: float = 1.0) -> TestRecord:
    method = Method(clock="wall", mode="recorded")
    measurement = Measurement(metric="time", value=value, unit="s", better="lower", kind="end-to-end", method=method)
    return TestRecord(
        key=TestKey(module=module, test="test_a[é]"),
        slug="h100",
        devices=(),
        environment=Environment(hardware=Hardware(name="NVIDIA H100")),
        measurements=(measurement,),
        verdicts=(Verdict(status="PASS", metric="time", reason="within 3 %", tolerance=0.03),),
    )


def git(top: Path, *arguments: str) -> str:
    isolated = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    command = [str(GIT), "-C", str(top), *arguments]
    done = subprocess.run(command, env={**os.environ, **isolated}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def top(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "work")
    return tmp_path / "work"


def commit(top: Path) -> None:
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--allow-empty", "--message", "baselines")


def assert_applies(top: Path, root: Path, made: Plan) -> str:
    """git turns the work tree into exactly what the plan says, and changes nothing else."""
    patch = git_patch(root, made, top=top)
    (top.parent / "update.patch").write_text(patch, encoding="utf-8", newline="")
    git(top, "apply", "--check", "../update.patch")
    git(top, "apply", "../update.patch")
    assert made.files
    assert [change.path.read_bytes() for change in made.files] == [change.new for change in made.files]
    assert len(git(top, "status", "--porcelain", "--untracked-files=all").splitlines()) == len(made.files)
    return patch


def planned(root: Path, *records: TestRecord) -> Plan:
    return plan(root, replace(RUN, run_id="s", visit="v1"), records, accept_reason=None)


def test_a_new_file_is_created(top: Path) -> None:
    commit(top)
    root = top / "baselines"
    patch = assert_applies(top, root, planned(root, measured()))
    assert patch.startswith(
        "diff --git a/baselines/h100/a.json b/baselines/h100/a.json\n"
        "new file mode 100644\n"
        "--- /dev/null\n"
        "+++ b/baselines/h100/a.json\n"
        "@@ -0,0 +1,"
    )


def test_a_changed_file_is_changed(top: Path) -> None:
    root = top / "baselines"
    write(root, RUN, [measured()], accept_reason=None)
    commit(top)
    assert git(top, "ls-files").splitlines() == ["baselines/h100/a.json"]  # no lock, no .gitignore
    patch = assert_applies(top, root, planned(root, measured(value=2.0)))
    assert "--- a/baselines/h100/a.json\n+++ b/baselines/h100/a.json\n@@ " in patch


def test_a_new_and_a_changed_file_go_together(top: Path) -> None:
    root = top / "baselines"
    write(root, RUN, [measured(), measured("c.py")], accept_reason=None)
    commit(top)
    records = (measured(value=2.0), measured("b.py"), measured("c.py", value=3.0))
    made = planned(root, *records)
    assert [change.old is None for change in made.files] == [False, True, False]
    assert_applies(top, root, made)


@pytest.mark.parametrize("folder", ["gpu/perf", "my gpus", "mes données", 'quo"te\\d', "a b\tc"])
def test_the_baselines_may_lie_in_any_folder_of_the_repository(top: Path, folder: str) -> None:
    root = top / folder / "baselines"
    write(root, RUN, [measured()], accept_reason=None)
    commit(top)
    assert_applies(top, root, planned(root, measured(value=2.0), measured("b.py")))


def test_a_relative_root_is_found(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "sub").mkdir()
    commit(top)
    monkeypatch.chdir(top / "sub")
    assert_applies(top, Path("baselines"), planned(Path("baselines"), measured()))
    assert (top / "sub" / "baselines" / "h100" / "a.json").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.rstrip(b"\n"),
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"NVIDIA", "NVIDIA\u2028\u0085é".encode()),
    ],
    ids=["no last newline", "carriage returns", "separators that are no newlines"],
)
def test_a_file_edited_by_hand_is_changed_too(top: Path, spoil: object) -> None:
    assert callable(spoil)
    root = top / "baselines"
    write(root, RUN, [measured()], accept_reason=None)
    path = baseline_path(root, "h100", "a.py")
    path.write_bytes(spoil(path.read_bytes()))
    commit(top)
    assert_applies(top, root, planned(root, measured(value=2.0)))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"{}", b"{}\n"), (b"{}\n", b"{}"), (b"a\nb", b"a\nc"), (None, b"{}"), (b"1\n2\n3\n", b"1\n3\n"), (b"", b"x\n")],
)
def test_the_last_newline_is_kept_or_lost_as_the_plan_says(top: Path, old: bytes | None, new: bytes) -> None:
    path = top / "baselines" / "h100" / "a.json"
    path.parent.mkdir(parents=True)
    if old is not None:
        path.write_bytes(old)
    commit(top)
    change = FileChange(path=path, old=old, new=new)
    assert_applies(top, top / "baselines", Plan(files=(change,), changes=()))


def numbered(count: int) -> str:
    return "".join(f"{i}\n" for i in range(count))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(old=st.text(alphabet='ab {}"\n', max_size=60), new=st.text(alphabet='ab {}"\n', max_size=60))
@example(old=numbered(30), new=numbered(30).replace("\n7\n", "\n8\n7\n").replace("25\n", ""))
@example(old=numbered(30), new=numbered(30).replace("9\n", "x\n"))
@example(old=numbered(9), new=numbered(9)[2:] + "0\n")
def test_any_change_of_any_text_applies(top: Path, old: str, new: str) -> None:
    assume(old != new)
    path = top / "baselines" / "a.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(old)
    commit(top)
    change = FileChange(path=path, old=old.encode(), new=new.encode())
    assert_applies(top, top / "baselines", Plan(files=(change,), changes=()))


def test_changes_far_apart_are_hunks_of_their_own_with_three_lines_of_context(top: Path) -> None:
    old = numbered(40).encode()
    new = old.replace(b"\n10\n", b"\nten\n").replace(b"\n30\n", b"\n")
    path = top / "baselines" / "a.json"
    change = FileChange(path=path, old=old, new=new)
    assert git_patch(top / "baselines", Plan(files=(change,), changes=()), top=top) == (
        "diff --git a/baselines/a.json b/baselines/a.json\n"
        "--- a/baselines/a.json\n"
        "+++ b/baselines/a.json\n"
        "@@ -8,7 +8,7 @@\n 7\n 8\n 9\n-10\n+ten\n 11\n 12\n 13\n"
        "@@ -28,7 +28,6 @@\n 27\n 28\n 29\n-30\n 31\n 32\n 33\n"
    )


@pytest.mark.parametrize(("unchanged", "hunks"), [(5, 1), (6, 1), (7, 2), (8, 2)])
def test_hunks_are_joined_where_their_context_would_touch(top: Path, unchanged: int, hunks: int) -> None:
    between = numbered(unchanged)
    path = top / "baselines" / "a.json"
    path.parent.mkdir()
    path.write_text(f"a\n{between}b\n")
    commit(top)
    change = FileChange(path=path, old=path.read_bytes(), new=f"A\n{between}B\n".encode())
    patch = assert_applies(top, top / "baselines", Plan(files=(change,), changes=()))
    assert patch.count("\n@@ -") == hunks


def test_a_large_baseline_takes_seconds_and_a_run_added_to_it_few_lines(top: Path) -> None:
    root = top / "baselines"
    records = [replace(measured(), key=TestKey(module="a.py", test=f"test_{i}")) for i in range(100)]
    for visit in range(10):
        write(root, replace(RUN, run_id=f"r{visit}", visit=f"v{visit}"), records, accept_reason=None)
    commit(top)
    made = plan(root, replace(RUN, run_id="new", visit="new"), records, accept_reason=None)
    begun = time.perf_counter()
    patch = git_patch(root, made, top=top)
    assert time.perf_counter() - begun < 5
    assert_applies(top, root, made)
    assert not [line for line in patch.splitlines()[4:] if line.startswith("-")]


def test_a_plan_without_changes_is_an_empty_patch(top: Path) -> None:
    assert git_patch(top / "baselines", Plan(files=(), changes=()), top=top) == ""


def test_baselines_outside_the_work_tree_are_an_error(top: Path, tmp_path: Path) -> None:
    made = planned(tmp_path / "elsewhere", measured())
    with pytest.raises(UsageError, match=r"outside the git work tree .*--gpuperf-baselines"):
        git_patch(tmp_path / "elsewhere", made, top=top)
