"""A plan as a patch for `git apply`: how a runner that may not push hands its baselines over."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from pytest_gpuperf.baselines import FileChange, Plan
from pytest_gpuperf.errors import UsageError

CONTEXT_LINES = 3  # as git's own

#: Old lines from and to, and the new lines from and to that replace them.
Span = tuple[int, int, int, int]


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
    yield f"diff --git {old} {new}\n"
    if change.old is None:
        yield "new file mode 100644\n"
    yield f"--- {'/dev/null' if change.old is None else old}\n"
    yield f"+++ {new}\n"
    yield from _hunks(_lines(change.old or b""), _lines(change.new))


def _quoted(name: str) -> str:
    """Quote a name as git does (core.quotePath): C-style, with octal escapes."""
    raw = os.fsencode(name)
    escaped = "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in raw)
    return name if escaped == name else f'"{escaped}"'


def _lines(data: bytes) -> list[str]:
    # Not splitlines(): it also splits at form feeds and U+2028, where git does not.
    lines = data.decode().split("\n")
    return [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _hunks(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    for group in _groups(_changes(old, new)):
        (begin, _, j, _), (_, end, _, j_end) = group[0], group[-1]
        i, i_end = max(begin - CONTEXT_LINES, 0), min(end + CONTEXT_LINES, len(old))
        yield f"@@ -{_span(i, i_end)} +{_span(j - (begin - i), j_end + (i_end - end))} @@\n"
        for removed, removed_end, added, added_end in group:
            yield from (_line(" ", line) for line in old[i:removed])
            yield from (_line("-", line) for line in old[removed:removed_end])
            yield from (_line("+", line) for line in new[added:added_end])
            i = removed_end
        yield from (_line(" ", line) for line in old[i:i_end])


def _groups(changes: Iterator[Span]) -> Iterator[list[Span]]:
    group: list[Span] = []
    for change in changes:
        if group and change[0] - group[-1][1] > 2 * CONTEXT_LINES:
            yield group
            group = []
        group.append(change)
    if group:
        yield group


def _span(begin: int, end: int) -> str:
    # An empty range is said to lie behind the line before it.
    return f"{begin + 1 if end > begin else begin},{end - begin}"


def _line(mark: str, line: str) -> str:
    return f"{mark}{line}" if line.endswith("\n") else f"{mark}{line}\n\\ No newline at end of file\n"


def _changes(old: Sequence[str], new: Sequence[str]) -> Iterator[Span]:
    # Piece by piece: the lines of a baseline are so alike that difflib takes minutes for a file of some megabytes.
    i = j = 0
    for i_end, j_end in [*_anchors(old, new), (len(old), len(new))]:
        matcher = SequenceMatcher(None, old[i:i_end], new[j:j_end], autojunk=False)
        for tag, a, a_end, b, b_end in matcher.get_opcodes():
            if tag != "equal":
                yield i + a, i + a_end, j + b, j + b_end
        i, j = i_end, j_end


def _anchors(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of places, in order, of a line that both have once within its test: such as each metric's first."""
    old_places, new_places = _unique_places(old), _unique_places(new)
    last = -1
    for line, i in old_places.items():
        j = new_places.get(line, -1)
        if j > last:
            yield i, j
            last = j


def _unique_places(lines: Sequence[str]) -> dict[tuple[str, str], int]:
    headed: list[tuple[str, str]] = []
    test = ""
    for line in lines:
        test = line if line.startswith('    "') else test  # four blanks: a test's name
        headed.append((test, line))
    counts = Counter(headed)
    return {line: i for i, line in enumerate(headed) if counts[line] == 1}
