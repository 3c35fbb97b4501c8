"""What BASE and HEAD may be, in repositories and venvs made for the test; pip has no index, so no network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.trials.sides import Side, SideFailed, kind_of, made_sides, warnings_of

#: A build backend without dependencies, so that pip needs no network: a wheel of what lies in `src`.
BACKEND = """
import os, pathlib, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "mylib-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        for path in pathlib.Path("src").rglob("*.py"):
            wheel.write(path, path.relative_to("src"))
        wheel.writestr("mylib-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: mylib\\nVersion: 1.0\\n")
        wheel.writestr("mylib-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("mylib-1.0.dist-info/RECORD", "")
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        [shutil.which("git") or "git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit(folder: Path, subject: str = "a subject", **files: str) -> str:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py").replace("_toml", ".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", subject)
    return git(folder, "rev-parse", "HEAD")


def value_of(side: Side) -> str:
    """What a test of this side imports."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(side.path)}
    return subprocess.run(
        [side.python, "-P", "-c", "import mylib; print(mylib.VALUE)"],
        cwd=side.folder,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a flat `mylib` of value 1, then 2; no build system."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    folder = tmp_path.resolve() / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit(folder, "one", mylib_py="VALUE = 1\n")
    commit(folder, "two", mylib_py="VALUE = 2\n")
    return folder


@pytest.fixture
def package(repository: Path) -> Path:
    """The same with a build system and a `src` folder; value 3, then 4."""
    pytest.importorskip("pip")
    (repository / "mylib.py").unlink()
    commit(repository, "three", src__mylib_py="VALUE = 3\n", backend_py=BACKEND, pyproject_toml=PYPROJECT)
    commit(repository, "four", src__mylib_py="VALUE = 4\n")
    return repository


def only_the_repository_is_left(folder: Path) -> bool:
    return len(git(folder, "worktree", "list").splitlines()) == 1


# What the user means


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (".", "tree"),
        (sys.executable, "python"),
        (str(Path(sys.executable).parent.parent), "python"),
        ("mylib==2.10", "requirement"),
        ("mylib >= 2", "requirement"),
        ("mylib[fast]~=2.0", "requirement"),
        ("mylib @ https://example.org/mylib.whl", "requirement"),
        ("HEAD", "revision"),
        ("HEAD~1", "revision"),
        ("main", "revision"),
        ("HEAD@{0}", "revision"),
    ],
)
def test_what_the_user_means(repository: Path, text: str, kind: str) -> None:
    assert kind_of("BASE", text, repository) == kind


def test_a_venv_that_exists_wins_over_a_branch_of_its_name(repository: Path) -> None:
    git(repository, "branch", "old")
    assert kind_of("BASE", "old", repository) == "revision"
    (repository / "old/bin").mkdir(parents=True)
    (repository / "old/bin/python").symlink_to(sys.executable)
    assert kind_of("BASE", "old", repository) == "python"


def test_a_lone_word_is_a_python_only_if_it_is_called_so(repository: Path) -> None:
    git(repository, "branch", "tool")
    for name in ("tool", "python-wrapper"):
        (repository / name).symlink_to(sys.executable)
    assert kind_of("BASE", "tool", repository) == "revision"
    assert kind_of("BASE", "./tool", repository) == "python"
    assert kind_of("BASE", "python-wrapper", repository) == "python"


@pytest.mark.parametrize(
    ("text", "place"), [("mian", "does not exist here"), ("mylib.py", "exists, but is no python and no venv"), ("", "")]
)
def test_what_is_nothing_known_is_an_error_that_lists_the_three(repository: Path, text: str, place: str) -> None:
    with pytest.raises(UsageError) as caught:
        kind_of("HEAD", text, repository)
    message = str(caught.value)
    assert message.startswith(f"HEAD {text!r} is none of these: a python executable or a venv's folder (it {place}")
    assert "a requirement such as mylib==2.10, or a git revision of " in message
    assert message.endswith("See: git branch --all. The working tree as it is: .")


def test_without_git_a_revision_is_nothing_known(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="is none of these"):
        kind_of("HEAD", "HEAD", repository)


# Revisions


def test_a_revision_without_a_build_system_is_imported_from_its_folder(repository: Path) -> None:
    with made_sides("HEAD~1", "HEAD", folder=repository) as (base, head):
        assert (value_of(base), value_of(head)) == ("1", "2")
        assert base.description.startswith(
            f'HEAD~1: {git(repository, "rev-parse", "HEAD~1")[:12]} "one", imported from'
        )
        assert base.folder != repository
    assert only_the_repository_is_left(repository)
    assert not base.folder.exists()


def test_a_revision_with_a_build_system_is_installed_and_sees_what_is_installed_here(package: Path) -> None:
    with made_sides("HEAD~1", "HEAD", folder=package) as (base, head):
        assert (value_of(base), value_of(head)) == ("3", "4")
        assert base.path == ()
        assert base.python != head.python
        assert "installed into a venv of its own, Python 3." in base.description  # which has found pytest_gpuperf
    assert only_the_repository_is_left(package)


def test_a_revision_that_does_not_install_says_what_pip_said(package: Path) -> None:
    commit(package, backend_py="raise SystemExit('nvcc is missing')")
    with pytest.raises(SideFailed) as caught, made_sides(".", "HEAD", folder=package):
        pass
    message = str(caught.value)
    head = git(package, "rev-parse", "HEAD")[:12]
    assert message.startswith(f"HEAD HEAD ({head}) does not install.\npip --no-deps --no-build-isolation ended with ")
    assert "nvcc is missing" in message
    assert "\nTry it by hand: git worktree add --detach /tmp/try " in message
    assert only_the_repository_is_left(package)


def test_a_pyproject_that_only_configures_tools_is_no_build_system(repository: Path) -> None:
    commit(repository, pyproject_toml="[tool.pytest.ini_options]\n")
    with made_sides("HEAD", "HEAD~1", folder=repository) as (base, _):
        assert "imported from its folder" in base.description


def test_a_pyproject_that_cannot_be_read_is_left_to_pip(repository: Path) -> None:
    pytest.importorskip("pip")
    commit(repository, pyproject_toml="[build-system\n")
    with (
        pytest.raises(SideFailed, match=r"(?s)does not install.*(TOML|toml)"),
        made_sides("HEAD", ".", folder=repository),
    ):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_worktrees_are_removed_whatever_happens(repository: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), made_sides("HEAD", "HEAD~1", folder=repository):
        raise error
    assert only_the_repository_is_left(repository)


def test_a_worktree_that_git_refuses_is_an_error_with_its_words(repository: Path) -> None:
    (repository / ".git/worktrees").write_text("in the way")
    with pytest.raises(SideFailed) as caught, made_sides("HEAD", ".", folder=repository):
        pass
    assert str(caught.value).startswith("BASE HEAD: git worktree add ended with exit code 128:\n")
    assert "Try it by hand: git worktree add --detach /tmp/try " in str(caught.value)


def test_hooks_of_the_repository_do_not_run(repository: Path) -> None:
    hook = repository / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
    hook.chmod(0o755)
    with made_sides("HEAD", ".", folder=repository):
        assert not (repository / "ran").exists()


def test_in_a_subfolder_tests_run_in_the_same_subfolder_of_the_revision(repository: Path) -> None:
    commit(repository, perf__test_it_py="")
    with made_sides("HEAD", ".", folder=repository / "perf") as (base, _):
        assert base.folder.name == "perf"
        assert (base.folder / "test_it.py").exists()
        assert value_of(base) == "2"  # the folder above is importable too


def test_a_subfolder_that_a_revision_lacks_is_an_error(repository: Path) -> None:
    commit(repository, perf__test_it_py="")
    with (
        pytest.raises(SideFailed, match="has no folder perf, where gpuperf was started"),
        made_sides("HEAD~1", ".", folder=repository / "perf"),
    ):
        pass
    assert only_the_repository_is_left(repository)


def test_an_absolute_path_into_the_working_tree_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    path = f"{repository}/mylib.py::test_a"
    with (
        pytest.raises(UsageError, match=r"leads into the working tree, .*current folder: mylib\.py::test_a"),
        made_sides("HEAD", ".", folder=repository, pytest_arguments=["-k", "a", path]),
    ):
        pass


def test_pythonpath_into_the_working_tree_is_moved_into_the_revision(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{repository}/lib:/elsewhere")
    with made_sides("HEAD", ".", folder=repository) as (base, head):
        assert base.path == (str(base.folder), f"{base.folder}/lib", "/elsewhere")
        assert head.path == (str(repository), f"{repository}/lib", "/elsewhere")


# The working tree


def test_the_working_tree_is_imported_as_it_is(repository: Path) -> None:
    (repository / "mylib.py").write_text("VALUE = 5\n")
    with made_sides("HEAD", ".", folder=repository) as (base, head):
        assert (value_of(base), value_of(head)) == ("2", "5")
        assert head.folder == repository
        assert head.description.startswith(
            f"the working tree at {git(repository, 'rev-parse', 'HEAD')[:12]} with 1 file"
        )


def test_outside_a_repository_the_working_tree_is_the_folder(tmp_path: Path) -> None:
    with made_sides(".", ".", folder=tmp_path) as (base, _):
        assert base.description.startswith("the working tree, Python 3.")


# Pythons


def test_a_python_runs_in_the_current_folder(repository: Path) -> None:
    with made_sides(sys.executable, ".", folder=repository) as (base, _):
        assert (str(base.python), base.folder, base.path) == (sys.executable, repository, ())


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (
            "echo No module named pytest; exit 1",
            "cannot run the tests, it ended with exit code 1: No module named pytest. ",
        ),
        ("exit 0", "is no python: asked for its version, it said ''."),
    ],
)
def test_a_python_that_cannot_run_tests_is_an_error(repository: Path, script: str, text: str) -> None:
    python = repository / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(SideFailed) as caught, made_sides("./python", ".", folder=repository):
        pass
    assert str(caught.value).startswith(f"BASE {python} {text}")


def test_a_python_of_another_kind_of_machine_is_an_error(repository: Path) -> None:
    python = repository / "python"
    python.write_bytes(b"\x7fELF rubbish")
    python.chmod(0o755)
    with (
        pytest.raises(SideFailed, match="cannot be started: Exec format error"),
        made_sides("./python", ".", folder=repository),
    ):
        pass


# Requirements


def wheel_of(folder: Path) -> str:
    """`mylib @ file://...`, version 2.0 and value 6."""
    path = folder / "mylib-2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mylib.py", "VALUE = 6\n")
        wheel.writestr("mylib-2.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mylib\nVersion: 2.0\n")
        wheel.writestr("mylib-2.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("mylib-2.0.dist-info/RECORD", "mylib.py,,\n")
    return f"mylib @ {path.as_uri()}"


def test_a_requirement_is_installed_into_a_venv_of_its_own(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    requirement = wheel_of(tmp_path)
    with made_sides(requirement, ".", folder=repository) as (base, _):
        assert value_of(base) == "6"
        assert base.description.startswith(f"{requirement} (2.0) in a venv of its own, Python 3.")
        assert base.identity == "mylib==2.0"
        (warning,) = base.warnings
        assert warning.startswith(f"mylib.py in the current folder may be imported in place of {requirement}")


def test_a_requirement_that_does_not_install_says_what_pip_said(repository: Path) -> None:
    pytest.importorskip("pip")
    with pytest.raises(SideFailed) as caught, made_sides("nosuchlib==1.0", ".", folder=repository):
        pass
    message = str(caught.value)
    assert message.startswith("BASE nosuchlib==1.0 does not install.\npip ended with exit code 1:\n")
    assert "No matching distribution found for nosuchlib==1.0" in message
    assert message.endswith(" -m pip install nosuchlib==1.0")


# Warnings


def test_uncommitted_changes_are_not_in_a_revision(repository: Path) -> None:
    (repository / "mylib.py").write_text("VALUE = 5\n")
    (repository / "untracked.py").touch()
    with made_sides("HEAD~1", "HEAD", folder=repository) as (base, head):
        assert warnings_of(base, head) == (
            "HEAD HEAD is the last commit: it does not contain the 1 file changed since. The working tree as it is: .",
        )


def test_a_clean_working_tree_gives_no_warning(repository: Path) -> None:
    with made_sides("HEAD~1", "HEAD", folder=repository) as (base, head):
        assert warnings_of(base, head) == ()


@pytest.mark.parametrize(("base_text", "head_text"), [("HEAD", "main"), (".", "."), ("HEAD", ".")])
def test_sides_that_cannot_differ_are_said_to_be_the_same(repository: Path, base_text: str, head_text: str) -> None:
    with made_sides(base_text, head_text, folder=repository) as (base, head):
        (warning,) = warnings_of(base, head)
    assert warning.startswith("BASE and HEAD are the same: nothing can differ")


def test_a_warning_of_both_sides_is_said_once(repository: Path) -> None:
    with made_sides(".", "HEAD~1", folder=repository) as (base, head):
        twice = [replace(side, warnings=("beware",)) for side in (base, head)]
    assert warnings_of(*twice) == ("beware",)
