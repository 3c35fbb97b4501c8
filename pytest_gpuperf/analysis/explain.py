"""Why a test got slower: two summaries of what the GPU did, and how it was, compared part by part. Pure.

The loss is the difference of the two spans, from the first kernel's begin to the last one's end. It is made of kernels
that are new, gone, replaced, called more often or slower, of time in which they no longer run side by side, and of gaps
in which the GPU had nothing to do. A part may be more than the whole, where another one became faster.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Literal

from msgspec.structs import replace

from pytest_gpuperf.analysis.kernel_names import family, is_product, short_name, trait
from pytest_gpuperf.records import KernelSummary, KernelUse, Record
from pytest_gpuperf.units import counted, format_percent, format_value

CauseKind = Literal[
    "replaced",
    "added",
    "often",
    "slower",
    "interrupted",
    "pieces",
    "rest",
    "overlap",
    "gaps",
    "graph",
    "clock",
    "unseen",
]

#: A profile that shows less than this part of the measured loss did not catch it.
SEEN_SHARE = 0.3
#: Kernels of a whole summary take at least this part of the busy time; more, where several run at a time.
WHOLE = 0.95
#: Parts below this share of the loss are noise, or not worth a line.
LEAST_SHARE = 0.15
#: What explains less than this part of a loss is not its first cause.
MAIN_SHARE = 0.5
#: Counts and clocks that differ by less are the same.
SAME = 0.02
#: From this many times as many launches of nearly everything, the work comes in smaller pieces.
PIECES = 1.5
#: A piece takes less than this part of the time of the whole, or has fewer blocks.
PIECE_TIME = 0.8
#: A kernel whose mean is this many times its median, where it was not before, was interrupted: two processes on one GPU
#: take turns of about 2 ms (an H200: a GEMM of 192 us in the median, 357 us in the mean, 204 us alone).
INTERRUPTED = 1.2
#: Where a kernel with this part of the time takes no longer, nobody else takes the GPU away.
SPARED = 0.1
#: Lines that a message has room for.
MOST = 3


class Condition(Record, frozen=True, kw_only=True):
    """How the GPU was while a side was measured.

    Attributes:
        sm_clock_mhz: Mean SM clock.
    """

    sm_clock_mhz: float | None = None


class Cause(Record, frozen=True, kw_only=True):
    """One reason.

    Attributes:
        text: For people, without the share.
        share: Of the loss; `None` where it cannot be told.
    """

    kind: CauseKind
    text: str
    share: float | None = None

    def __str__(self) -> str:
        return self.text if self.share is None else f"{self.text}, {format_percent(self.share)} of the loss"


class _Part(Record, frozen=True, kw_only=True):
    """What a call lost by one thing.

    Attributes:
        most_s: What it can be at most, whatever it seems: kernels that are new may do the work of some that are gone.
    """

    kind: CauseKind
    text: str
    seconds: float
    most_s: float = math.inf

    @property
    def sure_s(self) -> float:
        """What is certain of it."""
        return min(self.seconds, self.most_s)


class _Change(Record, frozen=True, kw_only=True):
    """A kernel of then and the one of now that does its work; one of them may be missing."""

    then: KernelUse | None
    now: KernelUse | None

    @property
    def seconds(self) -> float:
        return _time(self.now) - _time(self.then)

    @property
    def is_sure(self) -> bool:
        """Whether the names say that both do the same work."""
        return self.then is not None and self.now is not None and family(self.then.name) == family(self.now.name)

    @property
    def count_ratio(self) -> float | None:
        return self.now.count / self.then.count if self.now and self.then and self.then.count else None


def explain(
    now: KernelSummary | None,
    then: KernelSummary | None,
    *,
    slower: float,
    condition: Condition,
    usual: Condition,
) -> tuple[Cause, ...]:
    """Name what made a call slower, the most important first, at most three.

    Args:
        now: Profile of the slower side; `None`: there is none.
        then: Profile that was stored with the baseline.
        slower: Measured, as a fraction: 0.12 is 12 % more time a call.
        condition: How the GPU was now.
        usual: How it was in the baseline.

    Returns:
        Nothing where nothing is known.
    """
    by_clock = _from_clock(slower, condition, usual)
    if now is None or then is None or then.span_s <= 0 or not (_is_whole(now) and _is_whole(then)):
        return by_clock
    lost_s = now.span_s - then.span_s
    if lost_s <= 0 or lost_s < SEEN_SHARE * slower * then.span_s:
        is_clock = any((cause.share or 1.0) >= MAIN_SHARE for cause in by_clock)
        return by_clock if is_clock else (_unseen(lost_s, then, slower), *by_clock)
    parts = _of_kernels(now, then, condition, usual) + _of_overlap(now, then) + _of_gaps(now, then)
    parts.sort(key=lambda part: (-part.sure_s, -part.seconds))
    found = [part for part in parts if part.sure_s >= LEAST_SHARE * lost_s]
    small = _together([part for part in parts if part.sure_s < LEAST_SHARE * lost_s])
    if small and (not found or small.seconds > found[0].sure_s):
        found = [small, *found]
    return tuple(Cause(kind=part.kind, text=part.text, share=part.seconds / lost_s) for part in found[:MOST])


def _is_whole(side: KernelSummary) -> bool:
    """Whether the kernels make up the time in which something ran; what of a list that lost some would be new?"""
    return side.busy_s > 0 and _all_s(side) >= WHOLE * side.busy_s


def _together(parts: Sequence[_Part]) -> _Part | None:
    """As one what matters only in sum; the largest first."""
    small = [part for part in parts if part.sure_s > 0]
    if len(small) < 2:
        return None
    text = f"{len(small)} causes of less than {format_percent(LEAST_SHARE)} each, the largest: {small[0].text}"
    return _Part(kind=small[0].kind, text=text, seconds=sum(part.sure_s for part in small))


def _from_clock(slower: float, condition: Condition, usual: Condition) -> tuple[Cause, ...]:
    """What the clock alone explains, without a profile."""
    drop = _clock_drop(condition, usual)
    if drop <= SAME:
        return ()
    share = min(drop / slower, 1.0) if slower > 0 else None
    if share is not None and share < LEAST_SHARE:
        return ()
    return (Cause(kind="clock", text=_clock_text(condition, usual), share=share),)


def _unseen(lost_s: float, then: KernelSummary, slower: float) -> Cause:
    return Cause(
        kind="unseen",
        text=f"a profile taken afterwards shows {format_percent(lost_s / then.span_s, signed=True)} a call where "
        f"{format_percent(slower, signed=True)} was measured: what slowed it down comes and goes, or lies on the host",
    )


def _of_kernels(now: KernelSummary, then: KernelSummary, condition: Condition, usual: Condition) -> list[_Part]:
    changes = _changes(now, then)
    if _comes_in_pieces(changes):
        return [_pieces(changes)]
    net_s = sum(change.seconds for change in changes if not change.is_sure)
    parts = [replace(_added(change.now, then), most_s=net_s) for change in changes if change.now and not change.then]
    parts += [
        replace(_replaced(change), most_s=math.inf if change.is_sure else net_s)
        for change in changes
        if change.now and change.then and change.now.name != change.then.name
    ]
    same = [change for change in changes if change.now and change.then and change.now.name == change.then.name]
    return parts + _more_often(same) + _slower(same, condition, usual) + _of_rest(now, then, changes)


def _changes(now: KernelSummary, then: KernelSummary) -> list[_Change]:
    """Pair kernels by name; those that are gone with those that are new, of one family first, the longest first.

    One that is not longer than all that the other side leaves out of its list may be among these.
    """
    ours, theirs = ({use.name: use for use in side.kernels if use.count > 0} for side in (now, then))
    pairs = [_Change(then=theirs[name], now=ours[name]) for name in ours if name in theirs]
    new = _longest_first(use for use in ours.values() if use.name not in theirs and use.time_s > _left_out_s(then))
    gone = _longest_first(use for use in theirs.values() if use.name not in ours and use.time_s > _left_out_s(now))
    for before in tuple(gone):
        akin = [use for use in new if family(use.name) == family(before.name)]
        after = next((use for use in akin if abs(use.count / before.count - 1) <= SAME), next(iter(akin), None))
        if after is not None:
            pairs.append(_Change(then=before, now=after))
            gone.remove(before)
            new.remove(after)
    if any(is_product(use.name) for use in gone):  # no product is left to take its place, so anything may
        return pairs + [_Change(then=before, now=after) for before, after in zip_longest(gone, new)]
    for is_of_kind in (is_product, lambda name: not is_product(name)):
        left = ([use for use in side if is_of_kind(use.name)] for side in (gone, new))
        pairs += [_Change(then=before, now=after) for before, after in zip_longest(*left)]
    return pairs


def _longest_first(uses: Iterable[KernelUse]) -> list[KernelUse]:
    return sorted(uses, key=lambda use: (-use.time_s, use.name))


def _left_out_s(side: KernelSummary) -> float:
    """The longest that a kernel can be which is not listed."""
    return min((use.time_s for use in side.kernels), default=0.0) if side.rest else 0.0


def _of_rest(now: KernelSummary, then: KernelSummary, changes: Sequence[_Change]) -> list[_Part]:
    """What all kernels together took longer of which no list says anything."""
    now_s = _all_s(now) - sum(_time(change.now) for change in changes)
    then_s = _all_s(then) - sum(_time(change.then) for change in changes)
    if not (now.rest or then.rest):
        return []
    times = [format_value(max(seconds, 0.0), "s", digits=3) for seconds in (now_s, then_s)]
    text = f"kernels too short to be listed take {times[0]} a call instead of {times[1]}"
    return [_Part(kind="rest", text=text, seconds=now_s - then_s)]


def _of_overlap(now: KernelSummary, then: KernelSummary) -> list[_Part]:
    """What kernels of several streams took less together than one after the other, and no longer do."""
    now_s, then_s = (max(_all_s(side) - side.busy_s, 0.0) for side in (now, then))
    times = [format_value(seconds, "s", digits=3) for seconds in (now_s, then_s)]
    streams = f" ({counted(now.streams, 'stream')} instead of {then.streams})" if now.streams != then.streams else ""
    text = f"kernels run side by side for {times[0]} a call, {times[1]} then{streams}"
    return [_Part(kind="overlap", text=text, seconds=then_s - now_s)]


def _all_s(side: KernelSummary) -> float:
    return sum(use.time_s for use in side.kernels) + _time(side.rest)


def _comes_in_pieces(changes: Sequence[_Change]) -> bool:
    """Whether most of the time is in kernels that are launched more often, on fewer blocks where that is known."""
    pieces = [one for one in changes if (one.count_ratio or 0.0) >= PIECES and _is_smaller(one)]
    return sum(_time(one.now) for one in pieces) > 0.5 * sum(_time(one.now) for one in changes)


def _is_smaller(change: _Change) -> bool:
    """Whether each launch has less to do: it takes less time, or has fewer blocks and may take as long with them."""
    now, then = change.now, change.then
    if now is None or then is None:
        return False
    has_fewer_blocks = now.blocks is not None and then.blocks is not None and now.blocks < then.blocks
    return has_fewer_blocks or now.time_s / now.count < PIECE_TIME * then.time_s / then.count


def _pieces(changes: Sequence[_Change]) -> _Part:
    now, then = (
        sum(use.count for use in side if use) for side in zip(*((one.now, one.then) for one in changes), strict=True)
    )
    text = f"the work comes in {now / then:.3g} times as many, smaller launches: a smaller batch?"
    return _Part(kind="pieces", text=text, seconds=sum(change.seconds for change in changes))


def _added(use: KernelUse, then: KernelSummary) -> _Part:
    text = f"an added kernel, {short_name(use.name)}{_times(use)} of {_mean(use)}"
    if meaning := trait(use.name):
        text += f" ({meaning})"
    if then.rest:
        text = (
            f"kernel {short_name(use.name)}{_times(use)} of {_mean(use)}, none of the {len(then.kernels)} longest then"
        )
    return _Part(kind="added", text=text, seconds=use.time_s)


def _replaced(change: _Change) -> _Part:
    assert change.then, "both sides are there"
    assert change.now, "both sides are there"
    before, after = short_name(change.then.name), short_name(change.now.name)
    text = f"kernel {before} replaced by {after}"
    if before == after:
        text = f"another variant of kernel {after} takes {_mean(change.now)} instead of {_mean(change.then)}"
    return _Part(kind="replaced", text=text + _trait_text(change.then, change.now), seconds=change.seconds)


def _trait_text(then: KernelUse, now: KernelUse) -> str:
    """What the two names give away: ` (tf32 tensor cores, now fp32 without tensor cores)`."""
    before, after = trait(then.name), trait(now.name)
    if before == after:
        return ""
    return f" ({before}, now {after})" if before and after else f" ({after})" if after else f" (no longer {before})"


def _more_often(changes: Sequence[_Change]) -> list[_Part]:
    parts = []
    for change in changes:
        then, now = change.then, change.now
        if then and now and abs(now.count / then.count - 1) > SAME:
            text = f"kernel {short_name(now.name)} runs {now.count:.3g} times a call instead of {then.count:.3g}"
            parts.append(_Part(kind="often", text=text, seconds=(now.count - then.count) * then.time_s / then.count))
    return parts


def _slower(changes: Sequence[_Change], condition: Condition, usual: Condition) -> list[_Part]:
    """What the same launches take longer for; the clock's part of it first, of all kernels together."""
    slowed = [(change.now, _longer_s(change)) for change in changes if change.now and _longer_s(change) > 0]
    names = {change.now.name for change in changes if change.now and _is_interrupted(change)}
    if _is_spared(changes, names):
        names = set()
    parts = _interrupted([(use, longer_s) for use, longer_s in slowed if use.name in names])
    slowed = [(use, longer_s) for use, longer_s in slowed if use.name not in names]
    drop = _clock_drop(condition, usual)
    if drop > SAME and slowed:
        by_clock = sum(min(longer_s, (use.time_s - longer_s) * drop) for use, longer_s in slowed)
        parts.append(_Part(kind="clock", text=_clock_text(condition, usual), seconds=by_clock))
        slowed = [(use, max(longer_s - (use.time_s - longer_s) * drop, 0.0)) for use, longer_s in slowed]
    return parts + [_slowed(use, longer_s) for use, longer_s in slowed]


def _is_spared(changes: Sequence[_Change], names: set[str]) -> bool:
    """Whether one kernel with a good part of the time takes no longer: who takes the GPU away takes it from all."""
    all_s = sum(_time(change.now) for change in changes)
    interrupted_s = sum(_time(change.now) for change in changes if change.now and change.now.name in names)
    same = [one for one in changes if one.now and one.then and _longer_s(one) < SAME * one.now.time_s]
    return interrupted_s <= MAIN_SHARE * all_s or any(_time(one.now) >= SPARED * all_s for one in same)


def _is_interrupted(change: _Change) -> bool:
    """Whether the launches are as many and most of them as quick as ever, and a few take many times as long.

    A kernel that was uneven before works on several sizes, of which one may have grown.
    """
    ours, theirs = _mean_over_median(change.now), _mean_over_median(change.then)
    is_uneven = ours is not None and ours > INTERRUPTED
    was_even = theirs is None or (theirs <= INTERRUPTED and theirs < (ours or 0.0) - (INTERRUPTED - 1) / 2)
    return is_uneven and was_even and abs((change.count_ratio or 0.0) - 1) <= SAME


def _mean_over_median(use: KernelUse | None) -> float | None:
    return use.time_s / use.count / use.median_s if use and use.median_s else None


def _interrupted(slowed: Sequence[tuple[KernelUse, float]]) -> list[_Part]:
    if not slowed:
        return []
    use = max(slowed, key=lambda one: one[1])[0]
    text = (
        f"kernels are interrupted: {short_name(use.name)} takes {_mean(use)} on average and "
        f"{format_value(use.median_s or 0.0, 's', digits=3)} in the median: another process shares the GPU"
    )
    return [_Part(kind="interrupted", text=text, seconds=sum(longer_s for _, longer_s in slowed))]


def _slowed(use: KernelUse, longer_s: float) -> _Part:
    then_s = (use.time_s - longer_s) / use.count
    text = f"kernel {short_name(use.name)} takes {_mean(use)} instead of {format_value(then_s, 's', digits=3)}"
    return _Part(kind="slower", text=text, seconds=longer_s)


def _longer_s(change: _Change) -> float:
    assert change.then, "both sides are there"
    assert change.now, "both sides are there"
    return change.now.time_s - change.now.count * change.then.time_s / change.then.count


def _of_gaps(now: KernelSummary, then: KernelSummary) -> list[_Part]:
    seconds = now.gap_s - then.gap_s
    if seconds <= 0:
        return []
    now_s, then_s = format_value(now.gap_s, "s", digits=3), format_value(then.gap_s, "s", digits=3)
    idle = f"the GPU waits {now_s} a call for the host, {then_s} then"
    if then.graph_launches > 0 and now.graph_launches < then.graph_launches / 2:
        text = (
            f"a CUDA graph is no longer used: {now.launches:.3g} launches a call instead of {then.launches:.3g}; {idle}"
        )
        return [_Part(kind="graph", text=text, seconds=seconds)]
    return [_Part(kind="gaps", text=f"{idle} ({_why_idle(now, then)})", seconds=seconds)]


def _why_idle(now: KernelSummary, then: KernelSummary) -> str:
    if now.launches > then.launches * (1 + SAME):
        return f"{now.launches:.3g} launches instead of {then.launches:.3g}"
    if now.sync_s - then.sync_s > 0.5 * (now.gap_s - then.gap_s):
        return "the host synchronises with it in between"
    return "host time between launches"


def _clock_drop(condition: Condition, usual: Condition) -> float:
    """How much longer a call takes that depends on the clock alone."""
    ours, theirs = condition.sm_clock_mhz, usual.sm_clock_mhz
    return theirs / ours - 1 if ours and theirs else 0.0


def _clock_text(condition: Condition, usual: Condition) -> str:
    return f"SM clock {condition.sm_clock_mhz:.0f} against {usual.sm_clock_mhz:.0f} MHz"


def _time(use: KernelUse | None) -> float:
    return use.time_s if use else 0.0


def _mean(use: KernelUse) -> str:
    return format_value(use.time_s / use.count, "s", digits=3)


def _times(use: KernelUse) -> str:
    return "" if abs(use.count - 1) < SAME else f", {use.count:.3g} times"
