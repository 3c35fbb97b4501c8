"""The figures of RESULTS.md."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.verdict.noise import QUIET, SERVING, Noise
from benchmarks.verdict.rules import oracle_power
from benchmarks.verdict.scenarios import BASES, CURVE_EFFECTS, CURVED
from benchmarks.verdict.simulate import BASELINE_RUNS, CURRENT_RUNS, LEARNED, THEIR_RULES
from benchmarks.verdict.tally import Tally, of_a_run, percent
from pytest_gpuperf.judge import ALPHA, ENOUGH_SESSIONS

_OURS = LEARNED[0].name
#: Shown; the others lie on the axis or on one of these.
_CURVES = (
    "pytest-benchmark min:5%",
    "pytest-benchmark mean:10%",
    "asv, factor 1.05",
    "Bencher t 0.99",
    "NVBench robust",
)


def power_curves(tallies: Sequence[Tally], path: Path) -> None:
    """Draw what each rule catches by slowdown, with what it says of unchanged code at 0 %.

    Args:
        tallies: Of the curve scenarios and of the base scenarios.
        path: PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CURVED), figsize=(10, 4.8), sharey=True, dpi=110)
    for axis, name, noise in zip(axes, CURVED, (QUIET, SERVING), strict=True):
        percents = [0, *(100 * effect for effect in CURVE_EFFECTS)]
        axis.plot(percents, [100 * rate for rate in _oracle(noise)], color="0.6", dashes=(4, 2), label="oracle")
        for rule in _CURVES:
            axis.plot(percents, _curve(tallies, name, rule), linewidth=1, label=rule)
        axis.plot(percents, _curve(tallies, name, _OURS), color="black", linewidth=2.2, label="pytest-gpuperf")
        axis.set(title=f"{name} noise", xlabel="slowdown, %", xlim=(0, 12), ylim=(-1, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("called a regression, %")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path)
    plt.close(figure)


def false_red_bars(tallies: Sequence[Tally], path: Path) -> None:
    """Draw how often a run of 50 unchanged metrics is red, by rule and noise."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rules = (LEARNED[1].name, *(rule for rule in THEIR_RULES if not rule.startswith("fixed")))
    rates = {(tally.scenario, tally.rule): tally.rate for tally in tallies if tally.effect == 0}
    figure, axis = plt.subplots(figsize=(9, 4.8), dpi=110)
    for place, name in enumerate(BASES):
        shares = [100 * of_a_run(rates[name, rule]) for rule in rules]
        heights = [row + 0.26 * (1 - place) for row in range(len(rules))]
        bars = axis.barh(heights, shares, height=0.24, label=name, color=("#4c72b0", "#dd8452", "#937860")[place])
        axis.bar_label(bars, [percent(share / 100) for share in shares], fontsize=7, padding=2)
    axis.set_yticks(range(len(rules)), ["pytest-gpuperf", *rules[1:]])
    axis.invert_yaxis()
    axis.set(xlabel="runs of 50 unchanged metrics that are red, %", xlim=(0, 112))
    axis.legend(title="noise", loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _curve(tallies: Sequence[Tally], name: str, rule: str) -> list[float]:
    rates = {(tally.scenario, tally.effect): 100 * tally.rate for tally in tallies if tally.rule == rule}
    return [rates[name, 0.0], *(rates[f"{name}, curve", effect] for effect in CURVE_EFFECTS)]


def _oracle(noise: Noise) -> list[float]:
    return [
        oracle_power(noise, effect, sessions=ENOUGH_SESSIONS, runs=BASELINE_RUNS, current=CURRENT_RUNS, alpha=ALPHA)
        for effect in (0.0, *CURVE_EFFECTS)
    ]
