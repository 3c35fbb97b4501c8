"""A metric at several sizes: one curve, one verdict. Pure; the judge is handed in.

The values at the sizes that the runs and the baseline share are judged twice: their geometric mean, and each by itself.
Half of the chance of a false alarm goes to the mean, the other half in equal parts to the sizes (Bonferroni), so that a
curve as a whole is held to the rate of any other metric. It is REGRESSED if the mean is, or one size is, or if it ends
at a smaller size than every run of the baseline because something gave out. A single run is no PASS while one size is
slower by more than the tolerance and the noise leaves open whether it truly is: more runs decide.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean

from msgspec.structs import replace

from pytest_gpuperf.records import BaselineRun, Curve, Measurement, MetricBaseline, Status, Verdict
from pytest_gpuperf.units import Better, format_percent, format_value

#: Judges runs against a baseline with a share of the false-alarm rate.
Judge = Callable[[Sequence[Measurement], MetricBaseline | None, float], Verdict]
#: Doubling the size at the knee of a curve gains less than this.
KNEE_GAIN = 0.10


def optimum(points: Mapping[int, float], better: Better) -> int:
    """Name the size with the best value; the smallest of equals.

    >>> optimum({1: 590.0, 8: 4193.0, 32: 4193.0}, "higher")
    8
    """
    sign = 1 if better == "lower" else -1
    return min(points, key=lambda size: (sign * points[size], size))


def knee(points: Mapping[int, float]) -> int:
    """Find the smallest size from which on a doubling never gains `KNEE_GAIN`; the largest size if there is none.

    Between measured sizes a power law is assumed, so that 32 to 128 counts as two doublings.

    Args:
        points: Size -> a rate.

    >>> knee({1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0, 16: 321.0})
    4
    """
    sizes = sorted(points)
    least = math.log2(1 + KNEE_GAIN)
    found = sizes[-1]
    for small, large in reversed(list(itertools.pairwise(sizes))):
        if math.log2(points[large] / points[small]) / math.log2(large / small) >= least:
            break
        found = small
    return found


def judge_curve(runs: Sequence[Measurement], baseline: MetricBaseline | None, judge: Judge) -> Verdict:
    """Judge the runs of a curve as one metric.

    Args:
        runs: In order; each has a `curve`.
        baseline: What was accepted, `None` if nothing was.
        judge: Judges one value.

    Returns:
        The verdict on the geometric mean over the shared sizes, or on the size that regressed by itself, with a remark
        that names the best size, the knee and what happened to the shape.
    """
    before = baseline.runs if baseline else ()
    if baseline is None or not before or not all(run.points for run in before):
        return replace(judge(runs, baseline, 1.0), remark=_described(runs, None))
    shared = _shared(runs, before)
    if not shared:
        verdict = judge(runs, None, 1.0)
        names = ", ".join(map(str, _sizes(before[-1].points)))
        reason = f"Not comparable: no {_axis(runs)} of the baseline was measured ({names})."
        return replace(verdict, status="INCOMPARABLE", reason=reason)
    verdict = judge(*_at(runs, baseline, shared), 0.5)
    remark = _described(runs, means(before))
    if verdict.status in ("INVALID", "INCOMPARABLE"):
        return replace(verdict, remark=remark)
    points = {size: judge(*_at(runs, baseline, (size,)), 0.5 / len(shared)) for size in shared}
    return replace(_decided(verdict, points, runs, before), remark="; ".join([remark, *_shape(verdict, points, runs)]))


def _decided(
    verdict: Verdict, points: Mapping[int, Verdict], runs: Sequence[Measurement], before: Sequence[BaselineRun]
) -> Verdict:
    if verdict.status == "REGRESSED":
        return verdict
    worse = {size: one for size, one in points.items() if one.status == "REGRESSED"}
    if worse:
        return _because_of(worse, verdict, runs, "REGRESSED")
    if loss := lost_end(runs, before):
        words = f"{loss}. The sizes before it: {verdict.reason}"
        return replace(verdict, status="REGRESSED", reason=words, is_low_power=False)
    # No single metric beyond its tolerance passes either: it is measured again. Of many sizes one is often beyond it.
    open_ = {size: one for size, one in points.items() if one.status == "INCONCLUSIVE" and one.is_beyond_tolerance}
    if open_ and verdict.status == "PASS" and len(runs) == 1:
        return _because_of(open_, verdict, runs, "INCONCLUSIVE")
    return verdict


def _because_of(
    points: Mapping[int, Verdict], verdict: Verdict, runs: Sequence[Measurement], status: Status
) -> Verdict:
    """The verdict of the size that got worst, with what the curve as a whole did."""
    size = max(points, key=lambda size: points[size].change or 0.0)
    words = f"{_axis(runs)} {size}: {points[size].reason} The curve as a whole: {verdict.reason}"
    return replace(verdict, status=status, reason=words, is_low_power=False)


def lost_end(runs: Sequence[Measurement], before: Sequence[BaselineRun]) -> str | None:
    """Say that every run that counts gave out before any run of the baseline ended; `None` if not, or if no curve."""
    if not before or not all(run.curve for run in runs) or not all(run.points for run in before):
        return None
    counting = runs[1:] or runs
    ends = [(max(_sizes(run.curve.points)), run.curve.end) for run in counting if run.curve]
    then = min(max(_sizes(run.points)) for run in before)
    if not all(end and size < then for size, end in ends):
        return None
    size, end = max(ends)
    return f"the curve ends at {_axis(runs)} {size} ({end}), at {then} in the baseline"


def _shape(verdict: Verdict, points: Mapping[int, Verdict], runs: Sequence[Measurement]) -> list[str]:
    """Name the size that changed most against the others, where that is more than the tolerance."""
    mean = verdict.change
    changes = {size: one.change for size, one in points.items() if one.change is not None}
    if mean is None or len(changes) < 2:
        return []
    beyond = {size: (1 + change) / (1 + mean) - 1 for size, change in changes.items()}
    size = max(beyond, key=lambda one: abs(beyond[one]))
    if abs(beyond[size]) <= verdict.tolerance:
        return []
    change, together = format_percent(changes[size], signed=True), format_percent(mean, signed=True)
    return [f"the shape changed: {_axis(runs)} {size} {change}, all together {together}"]


def _described(runs: Sequence[Measurement], then: Mapping[int, float] | None) -> str:
    """Where the curve is best, where it bends, and where it ends; with what was so in the baseline, if it was not."""
    last, now = runs[-1], means([run.curve for run in (runs[1:] or runs) if run.curve])
    best = optimum(now, last.better)
    words = [f"best at {_axis(runs)} {best}: {format_value(now[best], last.unit)}"]
    if last.better == "higher" and len(now) > 2:
        bends, bent = _bend(now), _bend(then) if then and len(then) > 2 else None
        before = "" if bent is None or bent == bends else f", {bent or 'none'} in the baseline"
        words.append(f"{f'knee at {bends}' if bends else 'no knee'}{before}")
    if last.curve and last.curve.end:
        words.append(f"ends: {last.curve.end}")
    return "; ".join(words)


def _bend(points: Mapping[int, float]) -> int:
    """The knee; 0 where the largest size still gains."""
    found = knee(points)
    return 0 if found == max(points) else found


def means(curves: Sequence[Curve | BaselineRun]) -> dict[int, float]:
    """Size -> geometric mean of the curves that have it, the smallest size first; empty where none is a curve."""
    values: dict[int, list[float]] = {}
    for one in curves:
        for size, value in (one.points or {}).items():
            values.setdefault(int(size), []).append(value)
    return {size: geometric_mean(found) for size, found in sorted(values.items())}


def _shared(runs: Sequence[Measurement], before: Sequence[BaselineRun]) -> tuple[int, ...]:
    found = [set(_sizes(run.curve.points)) for run in runs if run.curve]
    found += [set(_sizes(run.points)) for run in before]
    return tuple(sorted(set.intersection(*found)))


def _at(
    runs: Sequence[Measurement], baseline: MetricBaseline, sizes: Sequence[int]
) -> tuple[list[Measurement], MetricBaseline]:
    """The same with the values at some sizes alone."""
    now = [replace(run, value=_mean(run.curve.points, sizes)) for run in runs if run.curve]
    sessions = tuple(
        replace(session, runs=tuple(replace(run, value=_mean(run.points, sizes)) for run in session.runs))
        for session in baseline.sessions
    )
    return now, replace(baseline, sessions=sessions)


def _mean(points: Mapping[str, float] | None, sizes: Sequence[int]) -> float:
    return math.exp(fmean(math.log((points or {})[str(size)]) for size in sizes))


def at_shared_sizes(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Give curves the values of the sizes that all of them have: where one ends early, the whole means differ by that.

    Args:
        measurements: Of one metric. They stay as they are where not all are curves, or where nothing is shared.
    """
    sizes = [set(_sizes(one.curve.points)) if one.curve else set() for one in measurements]
    shared = sorted(set.intersection(*sizes)) if sizes else []
    return [
        replace(one, value=_mean(one.curve.points, shared)) if one.curve and shared else one for one in measurements
    ]


def baseline_at_shared_sizes(baseline: MetricBaseline) -> MetricBaseline:
    """The same of a baseline: its values at the sizes that all of its runs have."""
    sizes = [set(_sizes(run.points)) for run in baseline.runs]
    shared = sorted(set.intersection(*sizes)) if sizes else []
    return _at([], baseline, shared)[1] if shared else baseline


def _sizes(points: Mapping[str, float] | None) -> list[int]:
    return sorted(map(int, points or {}))


def _axis(runs: Sequence[Measurement]) -> str:
    return runs[0].curve.x if runs[0].curve else ""
