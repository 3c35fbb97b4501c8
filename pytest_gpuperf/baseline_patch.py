"""A plan as a patch for `git apply`: how a runner that may not push hands its baselines over."""

import os
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

from pytest_gpuperf.baselines import FileChange, Plan
from pytest_gpuperf.errors import UsageError

_NO_NEWLINE = "\n\\ No newline at end of file\n"


def git_patch(root: Path, plan: Plan, *, top: Path) -> str:
    """Write what a plan would do as a patch that `git apply` takes from the folder `top`.

    Save it as UTF-8 with `newline=""`, because a file with carriage returns keeps them.

    Args:
        root: Folder of all baselines, as it was given to `plan`.
        plan: The plan.
        top: Top folder of the git work tree.

    Raises:
        UsageError: `root` lies outside `top`.
    """
    try:
        folder = root.resolve().relative_to(top.resolve())
    except ValueError:
        raise UsageError(
            f"The baselines are in {root.resolve()}, outside the git work tree {top.resolve()}: "
            "no patch can reach them. Choose a folder inside with --gpuperf-baselines."
        ) from None
    return "".join(
        line
        for change in plan.files
        for line in _file_patch((folder / change.path.relative_to(root)).as_posix(), change)
    )


def _file_patch(name: str, change: FileChange) -> Iterator[str]:
    old, new = _quoted(f"a/{name}"), _quoted(f"b/{name}")
    tab = "\t" if " " in name else ""  # as git does, or the name would end at the blank
    yield f"diff --git {old} {new}\n"
    if change.old is None:
        yield "new file mode 100644\n"
    yield "--- /dev/null\n" if change.old is None else f"--- {old}{tab}\n"
    yield f"+++ {new}{tab}\n"
    hunks = unified_diff(_lines(change.old or b""), _lines(change.new))
    next(hunks, None)  # its own headers do not quote names
    next(hunks, None)
    for line in hunks:
        yield line if line.endswith("\n") else line + _NO_NEWLINE


def _lines(data: bytes) -> list[str]:
    # Not splitlines(): it also splits at form feeds and U+2028, where git does not.
    lines = data.decode().split("\n")
    return [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _quoted(name: str) -> str:
    """Quote a name as git does (core.quotePath): C-style, with octal escapes."""
    raw = os.fsencode(name)
    escaped = "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in raw)
    return name if escaped == name else f'"{escaped}"'
