"""What BASE and HEAD of `gpuperf ab` may be, and making them: a python, a git revision, a package's version, or `.`.

A revision is checked out into a worktree of its own. If it has a build system it is installed into a venv of its own,
so that it is what the tests import; otherwise its folders come first on PYTHONPATH. A version of a package is installed
into such a venv too. These venvs see everything else that is installed beside the current interpreter: the same torch.
"""

import contextlib
import os
import re
import shlex
import shutil
import site
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pytest_gpuperf.errors import GpuperfError, UsageError
from pytest_gpuperf.processes import Finished, run_group
from pytest_gpuperf.records import Record
from pytest_gpuperf.trials.paired import Label
from pytest_gpuperf.units import counted

SideKind = Literal["tree", "python", "requirement", "revision"]

_GIT_LIMIT_S = 300.0
_PIP_LIMIT_S = 3600.0  # an extension in CUDA may take that long to compile
_START_LIMIT_S = 120.0
#: `name[extra]` and a version, or `@` and a place; `@{` is git's.
_REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*(\[[^\]]*\])?\s*([=~!<>]=|<|>|@(?!\{)\s*\S)")
_PACKAGE_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?")


class SideFailed(GpuperfError):
    """A side that cannot be made, or cannot run tests."""


class Side(Record, frozen=True, kw_only=True):
    """One of the two that are compared, ready to run tests.

    Attributes:
        label: Which.
        python: Executable that runs the tests.
        folder: Where they are run.
        path: What comes first on PYTHONPATH.
        description: What it is, for people.
        identity: Equal for two sides that cannot differ.
        by_hand: How to get there without `ab`, up to pytest.
        warnings: What may surprise the user.
    """

    label: Label
    python: Path
    folder: Path
    path: tuple[str, ...] = ()
    description: str
    identity: str
    by_hand: str
    warnings: tuple[str, ...] = ()


def kind_of(label: Label, text: str, folder: Path) -> SideKind:
    """Say what the user means: `.`, else an existing python or venv, else a requirement, else a git revision.

    Raises:
        UsageError: None of them.
    """
    if text == ".":
        return "tree"
    if _python_at(text, folder):
        return "python"
    if _REQUIREMENT.match(text):
        return "requirement"
    if _commit_of(text, folder):
        return "revision"
    place = "exists, but is no python and no venv" if text and (folder / text).exists() else "does not exist here"
    raise UsageError(
        f"{label} {text!r} is none of these: a python executable or a venv's folder (it {place}), a requirement such "
        f"as mylib==2.10, or a git revision of {folder} (git knows none of this name). See: git branch --all. "
        "The working tree as it is: ."
    )


@contextlib.contextmanager
def made_sides(
    base: str, head: str, *, folder: Path, pytest_arguments: Sequence[str] = ()
) -> Iterator[tuple[Side, Side]]:
    """Make both sides; what was made for them is removed at the end, whatever happened.

    Args:
        base: As the user gave it.
        head: As the user gave it.
        folder: The current folder.
        pytest_arguments: Checked: a revision brings its own tests, so paths must be relative.

    Raises:
        UsageError: A side is nothing that is known, or a path leads into the working tree.
        SideFailed: A revision that does not install, a python that cannot run tests, a worktree that git refuses.
    """
    kinds: dict[Label, SideKind] = {"BASE": kind_of("BASE", base, folder), "HEAD": kind_of("HEAD", head, folder)}
    if "revision" in kinds.values():
        _refuse_paths_into(_top(folder), pytest_arguments)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpuperf-ab-")))
        sides = [
            stack.enter_context(_made(label, kind, text, folder, scratch / label.lower()))
            for (label, kind), text in zip(kinds.items(), (base, head), strict=True)
        ]
        yield sides[0], sides[1]


def warnings_of(base: Side, head: Side) -> tuple[str, ...]:
    """What to tell the user about the two sides before anything is run."""
    said = tuple(dict.fromkeys([*base.warnings, *head.warnings]))
    if base.identity != head.identity:
        return said
    return (*said, "BASE and HEAD are the same: nothing can differ, and what the comparison shows is the noise.")


def _made(
    label: Label, kind: SideKind, text: str, folder: Path, scratch: Path
) -> contextlib.AbstractContextManager[Side]:
    match kind:
        case "tree":
            return contextlib.nullcontext(_tree(label, folder))
        case "python":
            return contextlib.nullcontext(_python(label, text, folder))
        case "requirement":
            return contextlib.nullcontext(_requirement(label, text, folder, scratch))
        case "revision":
            return _revision(label, text, folder, scratch)


def _tree(label: Label, folder: Path) -> Side:
    commit, changed = _commit_of("HEAD", folder), _changed_files(folder)
    state = f" at {commit[:12]}" if commit else ""
    state += f" with {counted(changed, 'file')} changed" if changed else ""
    return Side(
        label=label,
        python=Path(sys.executable),
        folder=folder,
        path=_with_inherited(_source_folders(folder, _top(folder))),  # an installed copy may be older
        description=f"the working tree{state}, {_python_version(label, Path(sys.executable))}",
        identity=commit if commit and not changed else "the working tree",
        by_hand=shlex.quote(sys.executable),
    )


def _python(label: Label, text: str, folder: Path) -> Side:
    python = _python_at(text, folder)
    assert python, "kind_of has found it"
    description = f"{text}, {_python_version(label, python)}"
    return Side(
        label=label,
        python=python,
        folder=folder,
        path=_with_inherited(()),
        description=description,
        identity=str(python),
        by_hand=shlex.quote(str(python)),
    )


def _requirement(label: Label, text: str, folder: Path, scratch: Path) -> Side:
    python = _make_venv(scratch / "venv")
    command = [sys.executable, "-m", "pip", "install", text]
    _install(label, text, python, [[text]], by_hand=shlex.join(command))
    name = _PACKAGE_NAME.match(text)
    assert name, "a requirement begins with a name"
    version, *packages = _ask(label, python, _VERSION_AND_PACKAGES, name[0]).split()
    shadows = [package for package in packages if (folder / package).exists()]
    warning = (
        f"{', '.join(shadows)} in the current folder may be imported in place of {text}, where a conftest.py puts the "
        "folder on the path. If so, compare from a folder without it."
    )
    return Side(
        label=label,
        python=python,
        folder=folder,
        path=_with_inherited(()),
        description=f"{text} ({version}) in a venv of its own, {_python_version(label, python)}",
        identity=f"{name[0]}=={version}",
        by_hand=f"{shlex.join(command)} && {shlex.quote(sys.executable)}",
        warnings=(warning,) if shadows else (),
    )


@contextlib.contextmanager
def _revision(label: Label, text: str, folder: Path, scratch: Path) -> Iterator[Side]:
    top, commit = _top(folder), _commit_of(text, folder)
    assert top, "a revision is of a repository"
    assert commit, "kind_of has found it"
    with _worktree(label, text, top, commit, scratch / "worktree") as worktree:
        inner = worktree / folder.resolve().relative_to(top)
        if not inner.is_dir():
            raise SideFailed(
                f"{label} {text}: {commit[:12]} has no folder {folder.resolve().relative_to(top)}, where gpuperf was "
                "started. Start it in a folder that both revisions have."
            )
        build = _build_folder(inner, worktree)
        python = Path(sys.executable) if build is None else _install_revision(label, text, commit, build, scratch)
        path = _source_folders(inner, worktree) if build is None else ()
        how = "imported from its folder" if build is None else "installed into a venv of its own"
        yield Side(
            label=label,
            python=python,
            folder=inner,
            path=(*path, *_moved(os.environ.get("PYTHONPATH", ""), top, worktree)),
            description=f"{text}: {commit[:12]} {_subject(commit, top)}, {how}, {_python_version(label, python)}",
            identity=commit,
            by_hand=f"git worktree add --detach /tmp/try {commit[:12]} && cd /tmp/try && {shlex.quote(sys.executable)}",
            warnings=_dirty_warning(label, text, commit, folder),
        )


@contextlib.contextmanager
def _worktree(label: Label, text: str, top: Path, commit: str, path: Path) -> Iterator[Path]:
    """A checkout of its own, without the repository's hooks; git forgets it at the end."""
    try:
        options = ("-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach")
        done = _git(top, *options, str(path), commit)
        if done.code != 0:
            raise SideFailed(
                f"{label} {text}: git worktree add {done.in_words}:\n{_last_lines(done, 6)}\n"
                f"Try it by hand: git worktree add --detach /tmp/try {commit[:12]}"
            )
        yield path.resolve()
    finally:
        _git(top, "worktree", "remove", "--force", "--force", str(path))  # twice: also one that is half made
        shutil.rmtree(path, ignore_errors=True)
        _git(top, "worktree", "prune")


def _install_revision(label: Label, text: str, commit: str, build: Path, scratch: Path) -> Path:
    """Install a worktree as it is, with what is installed already: neither its dependencies nor its build's change."""
    python = _make_venv(scratch / "venv")
    without_isolation = ["--no-deps", "--no-build-isolation", str(build)]
    by_hand = (
        f"git worktree add --detach /tmp/try {commit[:12]} && "
        f"{shlex.quote(sys.executable)} -m pip install --no-deps --no-build-isolation --target /tmp/try-it /tmp/try"
    )
    # With isolation only then: it needs the network, and an extension that needs torch to build does not find it.
    attempts = [without_isolation, ["--no-deps", str(build)]]
    _install(label, f"{text} ({commit[:12]})", python, attempts, by_hand=by_hand)
    return python


def _install(label: Label, what: str, python: Path, attempts: Sequence[Sequence[str]], *, by_hand: str) -> None:
    """Let pip try one set of arguments after the other."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    failures = []
    for arguments in attempts:
        done = run_group([*pip, *arguments], timeout_s=_PIP_LIMIT_S)
        if done.code == 0:
            return
        failures.append(f"pip {' '.join(arguments[:-1])} {done.in_words}:".replace("  ", " "))
        failures.append(_last_lines(done, 12))
    raise SideFailed(f"{label} {what} does not install.\n" + "\n".join(failures) + f"\nTry it by hand: {by_hand}")


def _make_venv(path: Path) -> Path:
    """A venv that sees the current interpreter's packages, after its own; returns its python.

    `--system-site-packages` would show those of the interpreter that the current venv was made from.
    """
    venv.create(path, symlinks=True)
    (own,) = path.glob("lib/python*/site-packages")
    folders = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    folders += [folder for folder in site.getsitepackages() if folder not in folders]
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (own / "gpuperf_ab.pth").write_text("".join(lines), encoding="utf-8")
    return path / "bin" / "python"


_VERSION_AND_PACKAGES = """
import importlib.metadata, sys
found = importlib.metadata.distribution(sys.argv[1])
tops = {file.parts[0] for file in found.files or () if file.suffix == ".py" and ".." not in file.parts}
print(found.version, *sorted(tops))
"""


def _python_version(label: Label, python: Path) -> str:
    """`Python 3.11.7`, after making sure that it can run the tests."""
    version = _ask(label, python, "import platform, pytest, pytest_gpuperf; print(platform.python_version())")
    if not re.match(r"\d+\.\d+", version):
        raise SideFailed(f"{label} {python} is no python: asked for its version, it said {version!r}.")
    return f"Python {version}"


def _ask(label: Label, python: Path, code: str, *arguments: str) -> str:
    """Run a line of code in a side's python; the last line that it prints."""
    try:
        done = run_group([str(python), "-P", "-c", code, *arguments], timeout_s=_START_LIMIT_S)
    except OSError as error:
        raise SideFailed(f"{label} {python} cannot be started: {error.strerror}.") from None
    if done.code != 0:
        raise SideFailed(
            f"{label} {python} cannot run the tests, it {done.in_words}: {_last_lines(done, 1).strip()}. "
            f"Install what is missing there: {python} -m pip install pytest-gpuperf"
        )
    return done.tail.strip().rpartition("\n")[2]


def _python_at(text: str, folder: Path) -> Path | None:
    """The executable that a path means: itself, or that of a venv; a lone word must be called `python...`."""
    path = folder / Path(text).expanduser()  # not resolved: the link is what makes it a venv's
    if (path / "bin" / "python").exists():
        return path / "bin" / "python"
    is_meant = os.sep in text or text.startswith("python")
    return path if is_meant and path.is_file() and os.access(path, os.X_OK) else None


def _build_folder(folder: Path, top: Path | None) -> Path | None:
    """The closest folder, up to the repository's top, that pip can install; `None` without one."""
    for candidate in _upwards(folder, top):
        pyproject = candidate / "pyproject.toml"
        if (candidate / "setup.py").exists() or (pyproject.exists() and _has_build_system(pyproject)):
            return candidate
    return None


def _has_build_system(pyproject: Path) -> bool:
    try:
        return "build-system" in tomllib.loads(pyproject.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError:
        return True  # pip will say what is wrong with it


def _source_folders(folder: Path, top: Path | None) -> tuple[str, ...]:
    """What to import from where nothing is installed: each folder up to the top, its `src` before it."""
    candidates = [each for parent in _upwards(folder, top) for each in (parent / "src", parent)]
    return tuple(str(each) for each in candidates if each.is_dir())


def _upwards(folder: Path, top: Path | None) -> list[Path]:
    found = []
    for each in (folder.resolve(), *folder.resolve().parents):
        found.append(each)
        if top is None or each == top:
            break
    return found


def _with_inherited(folders: tuple[str, ...]) -> tuple[str, ...]:
    return (*folders, *(text for text in os.environ.get("PYTHONPATH", "").split(os.pathsep) if text))


def _moved(python_path: str, top: Path, worktree: Path) -> tuple[str, ...]:
    """PYTHONPATH with what lies in the working tree replaced by the same folder of the worktree."""
    folders = [Path(text).resolve() for text in python_path.split(os.pathsep) if text]
    return tuple(str(worktree / f.relative_to(top) if f.is_relative_to(top) else f) for f in folders)


def _refuse_paths_into(top: Path | None, pytest_arguments: Sequence[str]) -> None:
    for argument in pytest_arguments:
        path = Path(argument.partition("::")[0])
        if top and path.is_absolute() and path.resolve().is_relative_to(top):
            raise UsageError(
                f"{argument} leads into the working tree, but each revision brings its own tests. "
                f"Give it relative to the current folder: {os.path.relpath(argument)}"
            )


def _dirty_warning(label: Label, text: str, commit: str, folder: Path) -> tuple[str, ...]:
    changed = _changed_files(folder)
    if not changed or commit != _commit_of("HEAD", folder):
        return ()
    warning = (
        f"{label} {text} is the last commit: it does not contain the {counted(changed, 'file')} changed since. "
        "The working tree as it is: ."
    )
    return (warning,)


def _changed_files(folder: Path) -> int:
    """Tracked files that differ from the last commit, staged or not."""
    done = _git(folder, "--no-optional-locks", "diff", "--shortstat", "HEAD")
    count = re.search(r"(\d+) files? changed", done.tail)
    return int(count[1]) if done.code == 0 and count else 0


def _commit_of(text: str, folder: Path) -> str | None:
    done = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    found = re.search(r"^[0-9a-f]{40,64}$", done.tail, re.MULTILINE)
    return found[0] if text and done.code == 0 and found else None


def _subject(commit: str, folder: Path) -> str:
    subject = _git(folder, "log", "-1", "--no-show-signature", "--format=%s", commit).tail.strip()
    return f'"{subject if len(subject) <= 50 else subject[:49] + "…"}"'


def _top(folder: Path) -> Path | None:
    done = _git(folder, "rev-parse", "--show-toplevel")
    return Path(done.tail.strip().rpartition("\n")[2]).resolve() if done.code == 0 else None


def _git(folder: Path, *arguments: str) -> Finished:
    """Run git; without git, as if there were no repository."""
    try:
        return run_group(
            ["git", *arguments],
            timeout_s=_GIT_LIMIT_S,
            folder=folder,
            environment={**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return Finished(code=127, tail="git is not installed")


def _last_lines(done: Finished, count: int) -> str:
    lines = [line.rstrip() for line in done.tail.splitlines() if line.strip()]
    lines = [line for line in lines if not line.lstrip().startswith(("note: ", "hint: "))]  # pip's, of no help
    return "\n".join(f"  {line}" for line in lines[-count:]) or "  (it printed nothing)"
