"""RESULTS.md from the counts: every figure in it is worked out here."""

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from benchmarks.verdict.noise import ITERATIONS
from benchmarks.verdict.pairs import OURS, PAIRS
from benchmarks.verdict.rules import oracle_power
from benchmarks.verdict.scenarios import BASES, CURVED, UNUSUAL
from benchmarks.verdict.simulate import (
    BASELINE_RUNS,
    BUDGET_RUNS,
    CURRENT_RUNS,
    LEARNED,
    PACKAGE,
    THEIR_RULES,
    Variant,
)
from benchmarks.verdict.tally import METRICS_OF_A_RUN, Tally, of_a_run, percent
from pytest_gpuperf.judge import CONFIRMED, ENOUGH_SESSIONS, LOOKS, alpha_of
from pytest_gpuperf.records import Record

_HEADER = "| rule | false red, one metric | false red, run of 50 | +3 % | +5 % | +10 % | runs, unchanged | runs, +5 % |"


class Findings(Record, frozen=True, kw_only=True):
    """All counts of one call of run.py.

    Attributes:
        stored: Against stored baselines.
        paired: By `gpuperf ab`.
        replayed: Recordings.
        share: Of the repetitions that a whole run has.
        judged: Hash of what decides; see `run.fingerprint`.
    """

    stored: tuple[Tally, ...]
    paired: tuple[Tally, ...]
    replayed: tuple[Tally, ...]
    seed: int
    share: float
    duration_s: float
    judged: str


class _Row(Record, frozen=True, kw_only=True):
    """A rule in a table: its counts without a change, and at slowdowns."""

    title: str
    null: Tally
    caught: tuple[Tally, ...]
    is_of_fifty: bool = True

    def __str__(self) -> str:
        cells = [
            self.title,
            rate_with_interval(self.null),
            percent(of_a_run(self.null.rate)) if self.is_of_fifty else "-",
            *(f"{tally.rate:.1%}".replace("%", " %") for tally in self.caught),
            mean_runs(self.null),
            mean_runs(self.caught[1]),
        ]
        return _line(cells)


def markdown(found: Findings) -> str:
    """Put the report together."""
    parts = [_opening(found), _goals(found), _figures()]
    parts += [_base_table(found.stored, name) for name in BASES]
    parts += [_ahead(found.stored), _twenty(found.stored), _unusual(found.stored), _pairs(found.paired)]
    parts += [_replay(found.replayed), _reading()]
    return "\n\n".join(parts) + "\n"


def rate_with_interval(tally: Tally) -> str:
    """The rate and its 95 % interval, in per cent."""
    low, high = tally.interval
    return f"{percent(tally.rate)} ({percent(low)} to {percent(high)})"


def mean_runs(tally: Tally) -> str:
    """Runs that were needed."""
    return "-" if tally.mean_runs is None else f"{tally.mean_runs:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(header: str, rows: Iterable[object]) -> str:
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *map(str, rows)])


def _rows(tallies: Sequence[Tally], scenario: str, titles: dict[str, str]) -> Iterator[_Row]:
    of_rule: dict[str, list[Tally]] = {}
    for tally in tallies:
        if tally.scenario == scenario:
            of_rule.setdefault(tally.rule, []).append(tally)
    for rule, title in titles.items():
        null, *caught = sorted(of_rule[rule], key=lambda tally: tally.effect)
        yield _Row(title=title, null=null, caught=tuple(caught), is_of_fifty=_is_of_fifty(rule))


def _is_of_fifty(rule: str) -> bool:
    """Ours is stricter in a larger run; the others know no runs."""
    singles = [variant.name for variant in (*LEARNED, *PACKAGE) if variant.metrics == 1]
    return rule not in singles


def _title(variant: Variant) -> str:
    metrics = "alone" if variant.metrics == 1 else f"one of {variant.metrics}"
    priors = ", package's priors" if variant.priors == "package" else ""
    return f"**pytest-gpuperf**, {metrics}, up to {variant.runs} runs{priors}"


def _titles(variants: Iterable[Variant]) -> dict[str, str]:
    return {variant.name: _title(variant) for variant in variants}


def _their_titles() -> dict[str, str]:
    titles = {rule: rule.replace("%", " %") for rule in THEIR_RULES}
    return {rule: f"{title} (no tool's)" if rule.startswith("fixed") else title for rule, title in titles.items()}


def _opening(found: Findings) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("pytest-gpuperf", "pytest-benchmark", "numpy", "scipy"))
    part = "" if found.share == 1 else f" **Quick: {percent(found.share)} of the repetitions.**"
    return f"""# How often the verdict is wrong, and what it catches

    python benchmarks/verdict/run.py

{datetime.now(UTC):%Y-%m-%d}, seed {found.seed}, {found.duration_s:.0f} s, Python {platform.python_version()},
{versions}. No GPU.{part}
The rule that was measured: {found.judged} (`fingerprint` in run.py). Counts of everything:
[tallies.json](tallies.json).

A run's value is the median of {ITERATIONS} iterations. Standard deviations of sessions, processes and iterations:
quiet kernel 0.7, 0.3, 0.4 %; serving 2, 1.5, 3 %; mixed pool 5, 1.5, 2 %. A baseline is {ENOUGH_SESSIONS} sessions
of {BASELINE_RUNS} runs; what is judged is one further session on the same device, with a tolerance of 2 % unless a
table says otherwise.

Ours is the package's own `judge`, looked at after {LOOKS[0]}, {LOOKS[1]} and {LOOKS[2]} runs (`judge.CONFIRMED` =
{CONFIRMED}). "Up to {BUDGET_RUNS} runs" is what the default budget pays for. "Alone": a run of one metric, with a
chance of a false red of {alpha_of(1):.2%}. "One of {METRICS_OF_A_RUN}": {alpha_of(METRICS_OF_A_RUN):.2%} each.
Priors are learned, as `gpuperf baseline learn` does, from a new suite of {METRICS_OF_A_RUN} metrics of the same
noise for every 1000 repetitions or fewer; or they are the package's (kind `compute` for quiet, `end-to-end` for the
others).
Red is REGRESSED after a second look, which judges the runs after the first; INCONCLUSIVE is not red here.

The others get the same runs: pytest-benchmark, github-action-benchmark and NVBench the last run of the baseline and
the first new one, asv the last session and three new runs with all their iterations, Bencher every single run. "No
tool's" is the mean of all runs against the mean of the baseline with a fixed limit. The oracle is the
likelihood-ratio test of Neyman and Pearson on six runs: all variances known, no tolerance. No rule that compares
one session with this baseline catches more at the same false red. The chance of a red run of {METRICS_OF_A_RUN}
takes the metrics as independent."""


def _goals(found: Findings) -> str:
    stored = {(tally.scenario, tally.rule, tally.effect): tally for tally in found.stored}
    alone, fifty, package = LEARNED[0].name, LEARNED[1].name, PACKAGE[0].name
    limits = dict(zip(BASES, (0.001, 0.001, 0.01), strict=True))
    rows = [_at_most(f"{name}: false red of a metric", stored[name, alone, 0.0], limits[name]) for name in BASES]
    rows += [_at_most(f"{name}: false red of a run of 50", stored[name, fifty, 0.0], 0.02, of_a_run) for name in CURVED]
    rows += [
        _at_most(f"{name}, package's priors: false red", stored[f"{name}, package priors", package, 0.0], limits[name])
        for name in BASES
    ]
    for effect, limit in ((0.05, 0.95), (0.03, 0.8)):
        what = f"quiet, {ENOUGH_SESSIONS} sessions: +{percent(effect)} caught"
        rows.append(_at_least(f"{what}, alone", stored["quiet", alone, effect], limit))
        rows.append(_at_least(f"{what}, one of {METRICS_OF_A_RUN}", stored["quiet", fifty, effect], limit))
    paired = {(tally.scenario, tally.rule, tally.effect): tally for tally in found.paired}
    rows += [
        _at_least(f"serving, {rule}, {PAIRS} pairs: +5 % caught", paired["serving", rule, 0.05], 0.9) for rule in OURS
    ]
    best = _oracle("quiet", 0.03, 1, ENOUGH_SESSIONS)
    return f"""## Goals

{_table("| | goal | measured (95 % interval) | reached |", rows)}
{_recorded(found.replayed)}
3 % in quiet noise cannot be caught 80 % of the time with {ENOUGH_SESSIONS} sessions and a false red of 0.1 %: the
session alone moves by 0.7 %, and the oracle, which knows every variance, catches {percent(best)}."""


def _at_most(what: str, tally: Tally, limit: float, scale: Callable[[float], float] = float) -> str:
    low, high = map(scale, tally.interval)
    rate = scale(tally.rate)
    reached = "yes" if high <= limit else "yes, though the interval reaches beyond" if rate <= limit else "**no**"
    return _line([what, f"at most {percent(limit)}", f"{percent(rate)} ({percent(low)} to {percent(high)})", reached])


def _at_least(what: str, tally: Tally, limit: float) -> str:
    low, _ = tally.interval
    reached = "yes" if low >= limit else "yes, though the interval reaches below" if tally.rate >= limit else "**no**"
    return _line([what, f"at least {percent(limit)}", rate_with_interval(tally), reached])


def _recorded(tallies: Sequence[Tally]) -> str:
    """What the recordings say beside the simulation, all of them and no test left out."""
    parts = []
    for where in ("same visit", "unseen GPU"):
        nulls = [t for t in tallies if t.rule == "gpuperf" and t.effect == 0 and t.scenario.startswith(where)]
        red = [tally for tally in nulls if tally.red]
        names = "; ".join(f"{tally.red} of {tally.trials} in {tally.scenario.split(': ')[1]}" for tally in red)
        total = f"{sum(tally.red for tally in nulls)} of {sum(tally.trials for tally in nulls)}"
        parts.append(f"{where}: {total}{f' ({names})' if names else ''}")
    return (
        f"\nFalse reds on recordings of real GPUs, all tests: {', '.join(parts)}. "
        "The priors were set with knowledge of these recordings: see there.\n"
    )


def _figures() -> str:
    return """![What each rule catches by slowdown](power.png)

![How often a run of 50 unchanged metrics is red](false_red.png)"""


def _oracle(name: str, effect: float, metrics: int, sessions: int) -> float:
    noise, _ = BASES[name]
    return oracle_power(
        noise, effect, sessions=sessions, runs=BASELINE_RUNS, current=CURRENT_RUNS, alpha=alpha_of(metrics)
    )


def _oracle_line(name: str, metrics: int, sessions: int) -> str:
    of_run = of_a_run(alpha_of(metrics))
    caught = [f"{_oracle(name, effect, metrics, sessions):.1%}".replace("%", " %") for effect in (0.03, 0.05, 0.1)]
    title = "alone" if metrics == 1 else f"one of {metrics}"
    cells = [f"oracle, {title}", percent(alpha_of(metrics)), "-" if metrics == 1 else percent(of_run), *caught]
    return _line([*cells, f"{CURRENT_RUNS}.0", f"{CURRENT_RUNS}.0"])


def _base_table(tallies: Sequence[Tally], name: str) -> str:
    rows: list[object] = list(_rows(tallies, name, _titles(LEARNED)))
    rows += _rows(tallies, f"{name}, package priors", _titles(PACKAGE[:2]))
    rows += [_oracle_line(name, metrics, ENOUGH_SESSIONS) for metrics in (1, METRICS_OF_A_RUN)]
    rows += _rows(tallies, name, _their_titles())
    return f"## {name.capitalize()} noise, {ENOUGH_SESSIONS} sessions\n\n{_table(_HEADER, rows)}"


def _ahead(tallies: Sequence[Tally]) -> str:
    rates = {(tally.scenario, tally.rule, tally.effect): tally.rate for tally in tallies}
    lines = [
        line
        for variant in LEARNED[:2]
        for name in BASES
        for rule in THEIR_RULES
        if (line := _advantage(rates, name, rule, variant))
    ]
    return f"""## Where another rule is ahead

Of ours with up to {CURRENT_RUNS} runs and learned priors. A rule that is not listed for a noise is behind, or level,
on both axes. **Both**: it has no more false reds, and catches as much or more at each slowdown. Rates are those
measured; small differences are within their intervals.

{_table("| ours | noise | rule | catches more (theirs, ours) | false red (theirs, ours) | ahead in |", lines)}"""


def _advantage(rates: dict[tuple[str, str, float], float], name: str, rule: str, variant: Variant) -> str | None:
    """A line of the table, if the rule is ahead in anything."""
    theirs, ours = ([rates[name, one, effect] for effect in (0.0, 0.03, 0.05, 0.1)] for one in (rule, variant.name))
    pairs = list(zip(("", "+3 %", "+5 %", "+10 %"), theirs, ours, strict=True))[1:]
    more = "; ".join(f"{effect}: {percent(their)}, {percent(our)}" for effect, their, our in pairs if their > our)
    if not more and theirs[0] >= ours[0]:
        return None
    is_both = more and theirs[0] <= ours[0] and all(their >= our for _, their, our in pairs)
    ahead = "**both**" if is_both else "what it catches" if more else "false reds"
    title = "alone" if variant.metrics == 1 else f"one of {variant.metrics}"
    false = f"{percent(theirs[0])}, {percent(ours[0])}"
    return _line([title, name, rule.replace("%", " %"), more or "-", false, ahead])


def _twenty(tallies: Sequence[Tally]) -> str:
    parts = []
    for suffix, title, sessions in (
        ("20 sessions", "20 sessions of 3 runs", 20),
        ("tolerance 3 %", f"A tolerance of 3 %, {ENOUGH_SESSIONS} sessions", ENOUGH_SESSIONS),
    ):
        rows: list[object] = []
        for name in BASES:
            titles = {rule: f"{name}: {title}" for rule, title in _titles(LEARNED[:2]).items()}
            if sessions == 20:
                titles |= {rule: f"{name}: {_their_titles()[rule]}" for rule in ("Bencher t 0.99", "asv, factor 1.05")}
            rows += _rows(tallies, f"{name}, {suffix}", titles)
            if sessions == 20:
                rows += [
                    _oracle_line(name, metrics, sessions).replace("| oracle", f"| {name}: oracle", 1)
                    for metrics in (1, METRICS_OF_A_RUN)
                ]
        parts.append(f"## {title}\n\n{_table(_HEADER, rows)}")
    return "\n\n".join(parts)


def _unusual(tallies: Sequence[Tally]) -> str:
    rows: list[object] = []
    kinds = (*UNUSUAL, "devices differ by 1 %, a known one", "devices differ by 1 %, an unseen one")
    shown = {
        LEARNED[0].name: "**ours, alone**",
        LEARNED[1].name: f"**ours, one of {METRICS_OF_A_RUN}**",
        "pytest-benchmark min:5%": "pytest-benchmark min:5 %",
        "Bencher t 0.99": "Bencher t 0.99",
        "NVBench robust": "NVBench robust",
    }
    for name in ("quiet", "serving"):
        for kind in kinds:
            titles = {rule: f"{name}, {kind}: {title}" for rule, title in shown.items()}
            rows += _rows(tallies, f"{name}, {kind}", titles)
    return f"""## Noise that is not normal, and several devices

The standard deviations of the base noise stay; two clocks, stragglers and devices come on top. Ours sees times
alone here: with the clock recorded, a compute-bound slowdown that is none in cycles is INVALID, not red.

{_table(_HEADER, rows)}"""


def _pairs(tallies: Sequence[Tally]) -> str:
    rows = []
    for scenario in dict.fromkeys(tally.scenario for tally in tallies):
        rules = dict.fromkeys(tally.rule for tally in tallies)
        titles = {rule: f"{scenario}: {f'**{rule}**' if rule in OURS else rule}" for rule in rules}
        rows += list(_rows(tallies, scenario, titles))
    return f"""## `gpuperf ab`: {PAIRS} pairs in one visit, tolerance 2 %

The package's own `compare_pairs` at its looks; SLOWER is red. asv `continuous` runs both commits in turn, too: all
iterations of {PAIRS} processes a side. Runs are those of both sides.

{_table(_HEADER, rows)}"""


def _replay(tallies: Sequence[Tally]) -> str:
    if not tallies:
        return "## Recordings of real GPUs\n\nNone."
    tests = dict.fromkeys(tally.scenario.split(": ")[1].split(", ")[0] for tally in tallies)
    groups = [(where, f"{where}: ") for where in ("same visit", "unseen GPU")]
    groups += [(f"of these, {test}: {where}", f"{where}: {test},") for where, _ in groups[:2] for test in tests]
    rows: list[str] = []
    for title, prefix in groups:
        members = [tally for tally in tallies if tally.scenario.startswith(prefix)]
        is_short = title.startswith("of these") and not any(_is_troubled(tally) for tally in members)
        rules = ["gpuperf"] if is_short and members else dict.fromkeys(tally.rule for tally in members)
        rows += [_replay_line(title, rule, [tally for tally in members if tally.rule == rule]) for rule in rules]
    visits = {tally.scenario.split(", ")[-1] for tally in tallies}
    header = (
        "| against | rule | groups | false red | +3 % | +5 % | +10 % | INCONCLUSIVE, unchanged | low power, unchanged |"
    )
    return f"""## Recordings of real GPUs

{len(visits)} visits to H100s (benchmarks/results), unchanged code, one value a process, in the suite's tolerances
(1 to 5 %) and with the package's priors. **Same visit**: up to six runs in a row against the three before them, the
first run after the last one following the end. **Unseen GPU**: the same against the first three runs of every other
visit. Groups overlap, so the counts are not independent; and the package's priors of run and device noise come from
these very recordings. Slowdowns are multiplied onto the judged runs. The others see the value of a run as its
result (NVBench: three values a side); asv can say nothing of so few.

**The package's priors were set with knowledge of these very recordings, so the false reds here are no independent
evidence.** test_add_1024 ran 16 % slower on one machine than on the other. With the spread between devices worth 10
degrees of freedom, as the package had it at first, all 14 groups of visit 7 on an unseen GPU were red; it was then
lowered to 2. Recordings made later are what can tell.

{_table(header, rows)}

By test and visit, without a change and with +5 %, ours:

{_by_visit(tallies)}"""


def _is_troubled(tally: Tally) -> bool:
    """Whether ours did not settle on PASS where nothing changed: then the others are shown beside it."""
    return tally.rule == "gpuperf" and not tally.effect and (tally.red > 0 or tally.inconclusive > 0)


def _replay_line(title: str, rule: str, tallies: Sequence[Tally]) -> str:
    by_effect = {effect: [tally for tally in tallies if tally.effect == effect] for effect in (0.0, 0.03, 0.05, 0.1)}
    counts = {effect: sum(tally.red for tally in group) for effect, group in by_effect.items()}
    null = by_effect[0.0]
    is_ours = rule == "gpuperf"
    told = [str(sum(getattr(tally, name) for tally in null)) for name in ("inconclusive", "low_power")]
    cells = [title, f"**{rule}**" if is_ours else rule.replace("%", " %"), str(sum(tally.trials for tally in null))]
    return _line([*cells, *map(str, counts.values()), *(told if is_ours else "--")])


def _by_visit(tallies: Sequence[Tally]) -> str:
    ours = {(tally.scenario, tally.effect): tally for tally in tallies if tally.rule == "gpuperf"}
    rows = []
    for scenario in dict.fromkeys(name for name, _ in ours):
        null, slower = ours[scenario, 0.0], ours[scenario, 0.05]
        cells = [null.trials, null.red, null.inconclusive, null.low_power, slower.red, slower.inconclusive]
        rows.append(_line([scenario, *map(str, cells)]))
    return _table("| | groups | false red | INCONCLUSIVE | low power | +5 % caught | +5 % INCONCLUSIVE |", rows)


def _reading() -> str:
    return """## What this does not show

- Repetitions share a learned suite, up to 1000 of them, and the intervals take them as independent: they are a little
  too narrow.
- The simulated suite that priors are learned from has the noise of the metric that is judged. A suite whose metrics
  differ more than its prior says is nearer to "package's priors".
- Metrics of one run share their session. The rate of a run of 50 takes them as independent: if they move together,
  fewer runs are red, with more metrics each.
- The rule that NVBench has for SAME, and asv's for samples too few to test, are left out: neither makes an alarm
  here."""
