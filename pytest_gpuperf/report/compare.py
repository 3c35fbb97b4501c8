"""Two results files against each other: A is taken as a baseline of one session, and B is judged against it."""

import re
import textwrap
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.baselines import baseline_run
from pytest_gpuperf.curves import judge_curve
from pytest_gpuperf.environment import version_differences
from pytest_gpuperf.errors import UsageError
from pytest_gpuperf.hostlimit import limited
from pytest_gpuperf.judge import ALPHA, hardware_differences, judge, worse_and_better
from pytest_gpuperf.monitor import health
from pytest_gpuperf.records import (
    Environment,
    Hardware,
    Measurement,
    MetricBaseline,
    Record,
    Results,
    Session,
    TestRecord,
    Verdict,
)
from pytest_gpuperf.report.terminal import Colour, Line
from pytest_gpuperf.units import format_percent, format_value

Outcome = Literal["worse", "better", "same", "not worse", "undecided", "host", "invalid", "not comparable", "ratio"]
_COLOURS: dict[Outcome, Colour] = {
    "worse": "red",
    "better": "cyan",
    "same": "green",
    "not worse": "green",
    "undecided": "yellow",
    "host": "yellow",
    "invalid": "yellow",
    "not comparable": "yellow",
}


class Compared(Record, frozen=True, kw_only=True):
    """One metric of both files.

    Attributes:
        name: Test and metric.
        unit: Of both values.
        a: Value in the first file.
        b: Value in the second one.
        outcome: In a word.
        verdict: Of the judge, with the interval; `None` for a ratio.
        ratio: How much better B is, in terms of time: 2 is twice as fast.
        sizes: Of a curve: what its sizes are of, such as `batch size`; `None` for a single value.
        ratios: Of a curve: size -> `ratio` there, for the sizes of both.
    """

    name: str
    unit: str
    a: float
    b: float
    outcome: Outcome
    verdict: Verdict | None
    ratio: float
    sizes: str | None
    ratios: dict[str, float]


class Comparison(Record, frozen=True, kw_only=True):
    """Two results files.

    Attributes:
        rows: Metrics in both, in B's order.
        only_a: Tests and metrics in A alone.
        only_b: Tests and metrics in B alone.
        hardware: A's and B's, where they differ.
        versions: What else differs, such as `torch 2.10.0 -> 2.11.0`.
        configuration: What was set differently, such as `max_num_seqs 256 -> 1024`; the values are compared all the
            same.
    """

    rows: tuple[Compared, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    hardware: tuple[str, ...]
    versions: tuple[str, ...]
    configuration: tuple[str, ...] = ()

    @property
    def has_worse(self) -> bool:
        """Whether something got slower by more than its tolerance."""
        return any(row.outcome == "worse" for row in self.rows)

    @property
    def is_settled(self) -> bool:
        """Whether every metric of both files is known to be worse, better, the same or not worse; or is a ratio."""
        return bool(self.rows) and not {row.outcome for row in self.rows} & {"undecided", "invalid", "not comparable"}


class Pair(Record, frozen=True, kw_only=True):
    """Tests to set side by side: those with `a` among their parameters in A, and with `b` in its place in B."""

    a: str
    b: str

    @classmethod
    def from_text(cls, text: str) -> "Pair":
        """Read `llama-3-8b=qwen2.5-7b`.

        Raises:
            UsageError: It is not two different texts with `=` between them.
        """
        a, _, b = (part.strip() for part in text.partition("="))
        if not a or not b or a == b:
            raise UsageError(f"--pair {text!r} is not a pair. Write what A has, =, and what B has in its place.")
        return cls(a=a, b=b)

    def renamed(self, test: str) -> str | None:
        """The name of the counterpart in B; `None` if `a` is not among the test's parameters."""
        return _substituted(test, self.a, self.b)


def _substituted(test: str, old: str, new: str) -> str | None:
    """The test with another parameter; as a whole, so that `llama-3-8b` is not in `llama-3-8b.2`."""
    function, _, parameters = test.partition("[")
    changed, count = re.subn(rf"(?<![\w.]){re.escape(old)}(?![\w.])", lambda _: new, parameters)
    return f"{function}[{changed}" if count else None


def compare(a: Results, b: Results, *, across: bool = False, pairs: Sequence[Pair] = ()) -> Comparison:
    """Compare two runs.

    Each interval is that of a verdict (see `judge.judge`) against a baseline of one session. It includes the noise
    between processes, between visits to a machine unless both runs are of one visit, and between physical GPUs unless
    both ran on the same ones. With one session, all of that is the usual noise of the metric's kind.

    Args:
        a: What to compare with. Of a test that is in it more than once, the last counts, as in B.
        b: What to compare.
        across: Say how much better B is, and nothing else, whatever the two ran on.
        pairs: Compare these tests alone, which may be of one run; a row has B's name.

    Raises:
        UsageError: Both are the same run, or nothing is to be paired.
    """
    if a.run.run_id == b.run.run_id and not pairs:
        raise UsageError(f"A and B are the same run, {a.run.run_id}. Keep the results of each run with --gpuperf-json.")
    a, b = _paired(a, b, pairs) if pairs else (a, b)
    ours, theirs = _by_name(a), _by_name(b)
    environments = [(a_one.environment, b_one.environment) for a_one, b_one in _pairs(a, b)]
    both = [(name, ours[name], found) for name, found in theirs.items() if name in ours]
    return Comparison(
        rows=tuple(_ratio(name, then, now) if across else _judged(name, then, now, (a, b)) for name, then, now in both),
        only_a=tuple(_own_name(name, pairs) for name in ours if name not in theirs),
        only_b=tuple(name for name in theirs if name not in ours),
        hardware=tuple(dict.fromkeys(text for then, now in environments for text in _hardware(then, now))),
        versions=tuple(
            dict.fromkeys(
                text for then, now in environments for text in version_differences(now.versions, then.versions)
            )
        ),
        configuration=tuple(dict.fromkeys(text for _, then, now in both for text in _configuration(then, now))),
    )


class _Found(Record, frozen=True, kw_only=True):
    record: TestRecord
    runs: tuple[Measurement, ...]

    @property
    def fresh(self) -> tuple[Measurement, ...]:
        """The runs that count: the first of several was repeated because it stood out."""
        return self.runs[1:] or self.runs

    @property
    def value(self) -> float:
        return geometric_mean(run.value for run in self.fresh)

    @property
    def points(self) -> dict[str, float]:
        """Of a curve: size -> value; empty for a single value."""
        curves = [run.curve for run in self.fresh if run.curve]
        sizes = sorted(curves[0].points, key=int) if curves else []
        return {size: geometric_mean(one.points[size] for one in curves if size in one.points) for size in sizes}

    @property
    def sizes(self) -> str | None:
        """Of a curve: what its sizes are of."""
        curve = self.fresh[0].curve
        return curve.x if curve else None

    @property
    def illness(self) -> str | None:
        """Why the device was unwell in one of the runs."""
        found = (health(run.telemetry) for run in self.fresh if run.telemetry)
        return next((text for text in found if text), None)


def _paired(a: Results, b: Results, pairs: Sequence[Pair]) -> tuple[Results, Results]:
    """A's tests under the names of their counterparts, and what B has of these or would have for others."""
    renamed = []
    for record in a.tests:
        names = [name for pair in pairs if (name := pair.renamed(record.key.test))]
        renamed += [replace(record, key=replace(record.key, test=name)) for name in names]
    for pair in pairs:
        if not any(pair.renamed(record.key.test) for record in a.tests):
            known = ", ".join(dict.fromkeys(record.key.test for record in a.tests)) or "none"
            raise UsageError(
                f"--pair {pair.a}={pair.b}: no test of A has {pair.a!r} as a parameter. Its tests: {known}."
            )
    counterparts = [one for one in b.tests if any(_substituted(one.key.test, pair.b, pair.a) for pair in pairs)]
    return replace(a, tests=tuple(renamed)), replace(b, tests=tuple(counterparts))


def _own_name(counterpart: str, pairs: Sequence[Pair]) -> str:
    """What a test of A is called in A."""
    return next((name for pair in pairs if (name := _substituted(counterpart, pair.b, pair.a))), counterpart)


def _configuration(a: _Found, b: _Found) -> list[str]:
    """`max_num_seqs 256 -> 1024`; what one side alone has is `-` on the other."""
    then, now = a.fresh[0].configuration or {}, b.fresh[0].configuration or {}
    if not then or not now:
        return []  # not known, rather than different
    names = sorted(then.keys() | now.keys())
    pairs = [(name, then.get(name, "-"), now.get(name, "-")) for name in names]
    return [f"{name} {before} -> {after}" for name, before, after in pairs if before != after]


def _by_name(results: Results) -> dict[str, _Found]:
    """Test and metric -> its runs."""
    return {
        f"{record.key} {m.metric}": _Found(record=record, runs=record.runs_of(m.metric))
        for record in results.tests
        for m in record.measurements
    }


def _pairs(a: Results, b: Results) -> list[tuple[TestRecord, TestRecord]]:
    ours = {str(record.key): record for record in a.tests}
    return [(ours[str(record.key)], record) for record in b.tests if str(record.key) in ours]


def _hardware(then: Environment, now: Environment) -> tuple[str, ...]:
    if not hardware_differences(now.hardware, then.hardware):
        return ()
    return (f"{_in_words(then.hardware)} -> {_in_words(now.hardware)}",)


def _in_words(hardware: Hardware) -> str:
    count = "" if hardware.count == 1 else f"{hardware.count} x "
    power = "" if hardware.power_limit_w is None else f", {hardware.power_limit_w:.0f} W"
    memory = "" if hardware.memory_bytes is None else f", {format_value(hardware.memory_bytes, 'B')}"
    return f"{count}{hardware.name}{memory}{power}{' (MIG)' if hardware.is_mig else ''}"


def _judged(name: str, a: _Found, b: _Found, results: tuple[Results, Results]) -> Compared:
    def judged(runs: Sequence[Measurement], baseline: MetricBaseline | None, share: float) -> Verdict:
        return judge(
            runs,
            baseline,
            environments={"a": a.record.environment},
            environment=b.record.environment,
            devices=b.record.devices,
            visit=results[1].run.visit,
            health=_unwell(a, b),
            look=min(len(b.runs), 2),
            alpha=ALPHA * share,
        )

    baseline = _as_baseline(a, results[0])
    verdict = judge_curve(b.runs, baseline, judged) if b.runs[0].curve else judged(b.runs, baseline, 1.0)
    verdict = limited(verdict, b.runs, baseline)
    return _compared(name, a, b, outcome=_outcome(verdict), verdict=verdict)


def _ratio(name: str, a: _Found, b: _Found) -> Compared:
    reason = None
    if (a.fresh[0].unit, a.fresh[0].better) != (b.fresh[0].unit, b.fresh[0].better):
        reason = (
            f"unit {b.fresh[0].unit} ({b.fresh[0].better} is better), "
            f"baseline {a.fresh[0].unit} ({a.fresh[0].better} is better)"
        )
    elif (a.points or b.points) and not a.points.keys() & b.points.keys():
        reason = f"no {b.sizes or a.sizes} is in both"
    if reason is None:
        return _compared(name, a, b, outcome="ratio", verdict=None)
    verdict = Verdict(
        status="INCOMPARABLE", metric=a.fresh[0].metric, reason=f"Not comparable: {reason}.", tolerance=0.0
    )
    return _compared(name, a, b, outcome="not comparable", verdict=verdict)


def _compared(name: str, a: _Found, b: _Found, *, outcome: Outcome, verdict: Verdict | None) -> Compared:
    common = [size for size in a.points if size in b.points]
    before = geometric_mean(a.points[size] for size in common) if common else a.value
    after = geometric_mean(b.points[size] for size in common) if common else b.value
    return Compared(
        name=name,
        unit=b.fresh[0].unit,
        a=before,
        b=after,
        outcome=outcome,
        verdict=verdict,
        ratio=_times_as_good(before, after, b),
        sizes=b.sizes,
        ratios={size: _times_as_good(a.points[size], b.points[size], b) for size in common},
    )


def _times_as_good(before: float, after: float, found: _Found) -> float:
    return before / after if found.fresh[0].better == "lower" else after / before


def _as_baseline(found: _Found, results: Results) -> MetricBaseline:
    first = found.fresh[0]
    session = Session(
        date=results.run.date,
        visit=results.run.visit,
        devices=found.record.devices,
        environment="a",
        runs=tuple(map(baseline_run, found.fresh)),
        commit=results.run.commit,
    )
    return MetricBaseline(
        unit=first.unit, better=first.better, kind=first.kind, method=first.method, sessions=(session,)
    )


def _unwell(a: _Found, b: _Found) -> str | None:
    illnesses = [f"{side}: {found.illness}" for side, found in (("A", a), ("B", b)) if found.illness]
    return "; ".join(illnesses) or None


def _outcome(verdict: Verdict) -> Outcome:
    match verdict.status:
        case "REGRESSED":
            return "worse"
        case "IMPROVED":
            return "better"
        case "INVALID":
            return "invalid"
        case "PASS" if not verdict.is_low_power:
            is_same = (verdict.change_low or 0.0) > 1 / (1 + verdict.tolerance) - 1
            return "same" if is_same else "not worse"
        case "PASS" | "INCONCLUSIVE":
            return "host" if verdict.is_host_limited else "undecided"
        case _:
            return "not comparable"


def compare_lines(found: Comparison, names: tuple[str, str], *, width: int = 80) -> list[Line]:
    """The comparison as lines: what differs besides, one row a metric, what is in one file alone.

    Args:
        found: The comparison.
        names: Of the two files.
        width: Of the terminal.
    """
    lines = [Line(text=f"A: {names[0]}"), Line(text=f"B: {names[1]}")]
    lines += [Line(text=f"Hardware: {text}", colour="yellow") for text in found.hardware]
    if found.versions:
        lines.append(Line(text=f"Versions: {'; '.join(found.versions)}", colour="yellow"))
    if found.configuration:
        lines.append(Line(text=f"Configuration: {'; '.join(found.configuration)}", colour="yellow"))
    for row in found.rows:
        lines += _row_lines(row, width)
    for side, only in (("A", found.only_a), ("B", found.only_b)):
        lines += [Line(text=f"only in {side}: {name}", colour="yellow") for name in only]
    if any(row.outcome == "undecided" for row in found.rows) and not found.configuration:
        lines.append(Line(text="Undecided: one run each says little. In pairs on one GPU:  gpuperf ab BASE HEAD"))
    if found.hardware and any(row.outcome == "not comparable" for row in found.rows):
        lines.append(Line(text="How many times as good B is, whatever each ran on:  gpuperf compare --across A B"))
    if not found.rows:
        lines.append(Line(text="No metric is in both files.", colour="yellow"))
    return lines


def _row_lines(row: Compared, width: int) -> list[Line]:
    """Name, then values and change; on one line where it fits."""
    text = f"{format_value(row.a, row.unit):>14} {format_value(row.b, row.unit):>14}  {_change(row)}"
    colour = _COLOURS.get(row.outcome)
    if len(row.name) + 1 + len(text) <= width:
        lines = [Line(text=f"{row.name} {text:>{width - len(row.name) - 1}}", colour=colour)]
    else:
        lines = [Line(text=row.name, colour=colour), Line(text=f"  {text}", colour=colour)]
    remark = row.verdict.remark if row.verdict else None
    return [*lines, *_size_lines(row, width), *_wrapped(remark or "", width)]


def _size_lines(row: Compared, width: int) -> list[Line]:
    """How many times as good B is at each size of a curve."""
    if not row.ratios:
        return []
    text = f"by {row.sizes}: " + ", ".join(f"{size}: {ratio:.3f} x" for size, ratio in row.ratios.items())
    return _wrapped(text, width)


def _wrapped(text: str, width: int) -> list[Line]:
    return [Line(text=part) for part in textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="      ")]


def _change(row: Compared) -> str:
    verdict = row.verdict
    if verdict is None:
        return f"{row.ratio:.3f} x"
    if verdict.change is None or verdict.change_low is None or verdict.change_high is None:
        return verdict.reason if row.outcome == "not comparable" else f"{row.outcome}: {verdict.reason}"
    change, low, high = (
        format_percent(part, signed=True) for part in (verdict.change, verdict.change_low, verdict.change_high)
    )
    return f"{change} ({low} to {high})  {_word(row, verdict)}"


def _word(row: Compared, verdict: Verdict) -> str:
    worse, better = worse_and_better(row.unit)
    tolerance = format_percent(verdict.tolerance)
    if row.outcome == "undecided" and verdict.minimum_detectable_effect is not None:
        return f"undecided, sees {format_percent(verdict.minimum_detectable_effect)}"
    words = {
        "worse": worse,
        "better": better,
        "same": f"same within {tolerance}",
        "not worse": f"not {worse}",
        "host": "limited by the host",
    }
    return words.get(row.outcome, row.outcome)
