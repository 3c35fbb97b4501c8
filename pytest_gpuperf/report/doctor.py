"""What `gpuperf doctor` prints: a line for each finding with its mend, the matrix of links, a summary; or JSON."""

import textwrap
from collections import Counter
from collections.abc import Sequence

import msgspec

from pytest_gpuperf.analysis.finding import Finding, Level
from pytest_gpuperf.analysis.host import Pair
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.units import counted

#: Version of the JSON. 1: the first.
_SCHEMA = 1
_COLOURS: dict[Level, Colour | None] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
_TOPIC_COLUMNS = 10
_INDENT = " " * 20
_LEAST_WIDTH, _MOST_WIDTH = 50, 120


def doctor_lines(findings: Sequence[Finding], pairs: Sequence[Pair], *, width: int, time_s: float) -> list[Line]:
    """Print the findings in their order.

    Args:
        findings: What was found.
        pairs: Of GPUs, for the matrix after the finding about topology.
        width: Columns of the terminal.
        time_s: What the examination took.
    """
    columns = min(max(width, _LEAST_WIDTH), _MOST_WIDTH)
    lines: list[Line] = []
    for index, finding in enumerate(findings):
        lines += _lines_of(finding, columns)
        if finding.topic == "topology" and (index + 1 == len(findings) or findings[index + 1].topic != "topology"):
            lines += [Line(text=f"{_INDENT}{row}") for row in matrix(pairs)]
    return [*lines, _summary(findings, time_s)]


def doctor_json(findings: Sequence[Finding], pairs: Sequence[Pair]) -> str:
    """Write the findings, the links between GPUs, and how many findings of each level there are."""
    levels = Counter(finding.level for finding in findings)
    report = {
        "schema": _SCHEMA,
        "counts": {level: levels[level] for level in _COLOURS},
        "findings": list(findings),
        "pairs": list(pairs),
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def matrix(pairs: Sequence[Pair]) -> list[str]:
    """Lay out how each two GPUs are connected, one row a GPU."""
    gpus = sorted({index for pair in pairs for index in (pair.a, pair.b)})
    links = {frozenset((pair.a, pair.b)): pair.link or "?" for pair in pairs}
    wide = max((len(link) for link in links.values()), default=0)
    if len(gpus) * (wide + 2) > 60:  # eight GPUs side by side: initials, with their meaning below
        return _short_matrix(gpus, links)
    rows = [[""] + [str(b) for b in gpus]]
    rows += [[str(a)] + ["-" if a == b else links.get(frozenset((a, b)), "?") for b in gpus] for a in gpus]
    return ["  ".join(cell.ljust(wide) if i else cell.rjust(2) for i, cell in enumerate(row)).rstrip() for row in rows]


def _short_matrix(gpus: Sequence[int], links: dict[frozenset[int], str]) -> list[str]:
    kinds = sorted(set(links.values()), key=lambda kind: (kind != "nvlink", kind))
    letters = {kind: chr(ord("A") + number) for number, kind in enumerate(kinds)}
    rows = ["    " + " ".join(f"{b:>2}" for b in gpus)]
    for a in gpus:
        cells = ["-" if a == b else letters.get(links.get(frozenset((a, b)), "?"), "?") for b in gpus]
        rows.append(f"{a:>2}  " + " ".join(f"{cell:>2}" for cell in cells))
    return [*rows, "    " + ", ".join(f"{letter}: {kind}" for kind, letter in letters.items())]


def _lines_of(finding: Finding, columns: int) -> list[Line]:
    head = f"{finding.level:<8}{finding.topic:<{_TOPIC_COLUMNS}}  "
    lines = [Line(text=text, colour=_COLOURS[finding.level]) for text in _wrapped(finding.text, head, columns)]
    if finding.mend is not None:
        lines += [Line(text=text) for text in _wrapped(finding.mend, f"{_INDENT}-> ", columns)]
    return lines


def _wrapped(text: str, head: str, columns: int) -> list[str]:
    # Options and paths stay whole, to be copied.
    indent = " " * len(head)
    return textwrap.wrap(
        text, columns, initial_indent=head, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _summary(findings: Sequence[Finding], time_s: float) -> Line:
    levels = Counter(finding.level for finding in findings)
    named = [counted(levels[level], level) for level in ("problem", "warning", "note") if levels[level]]
    worst: Level = next((level for level in ("problem", "warning") if levels[level]), "ok")
    text = f"{', '.join(named) or 'All is well'}; {levels['ok']} ok. Looked at in {time_s:.1f} s."
    return Line(text=text, colour=_COLOURS[worst])
