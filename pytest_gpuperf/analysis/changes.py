"""Change points: where the level of a series steps and stays. Pure functions of logarithms.

A split is judged by Student's t on the difference of the means before and after it, each device compared with itself
only: GPUs of one model differ, so a change of device is not a step. To that end the model is `offset of the device +
step + noise`, and the step's estimate is the least-squares one (Frisch & Waugh 1933, doi 10.2307/1907330).

Splits are tried in the whole series and in half-overlapping windows of halving length, so that a level that lasted a
dozen runs in the middle of a thousand is seen too (seeded binary segmentation: Kovács et al. 2023, doi
10.1093/biomet/asac052). What is found best divides the series, and the parts are searched in turn.

A step is reported if it is significant after a Bonferroni correction for every split tried, at least twice the standard
deviation around it, and at least three runs long on both sides. One run, or two, that stand alone are no step: each
value is first brought to within 3 standard deviations of the running median of five. Where neighbouring runs are alike,
the standard error is enlarged as for an autoregression of order 1.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_gpuperf.records import Record
from pytest_gpuperf.stats import t_quantile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: Runs on each side of a step, at least: fewer are an outlier as likely as not.
MIN_SEGMENT = 3
#: Least step, in standard deviations of the runs around it.
MIN_MAGNITUDE = 2.0
#: Chance of any false step in an unchanged series of independent runs, as an upper bound: see docs/history.md for what
#: was measured.
FALSE_ALARM = 0.01

_SHORTEST_WINDOW = 8
_MEDIAN_OF = 5
_CLIP_SD = 3.0
#: Median of the absolute value of a standard normal variable, and of the difference of two of them.
_NORMAL_MEDIAN = 0.6744897501960817
_MOST_ALIKE = 0.9
#: A step changes as many differences as the lag is long: with fewer in all, their median would see it.
_DIFFERENCES_A_LAG = 8


class Step(Record, frozen=True, kw_only=True):
    """One change of level.

    Attributes:
        at: Index of the first value of the new level.
        before: Mean of the logarithms of the level before.
        change: Difference of the logarithms, after less before, of the same devices.
        low: Lower end of its 95 % interval. It takes the step's place as known, so it is a little narrow.
        high: Upper end of it.
        sd: Standard deviation of the values around the two levels.
    """

    at: int
    before: float
    change: float
    low: float
    high: float
    sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    at: int
    change: float
    sd: float
    standard_error: float
    degrees_of_freedom: int
    strength: float  # |t| as a multiple of what significance needs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Noise:
    sd: float
    inflation: float  # of the variance of a mean, by neighbours being alike


def steps(logs: Sequence[float], devices: Sequence[Hashable], *, floor: float) -> tuple[Step, ...]:
    """Find where the level of a series steps.

    Args:
        logs: Logarithms of the values, in order.
        devices: What each was measured on. A set with fewer than three values shares one offset with all such sets,
            and what these differ by counts as noise.
        floor: Least relative standard deviation that is believed.

    Returns:
        The steps, in order. None in a series of fewer than six values.
    """
    import numpy as np

    groups = _groups(devices)
    values = np.asarray(logs, dtype=float)
    if len(values) < 2 * MIN_SEGMENT:
        return ()
    noise = _noise(values, groups, floor)
    search = _Search(_without_outliers(values, groups, noise.sd), groups, noise, floor)
    found = search.refine(search.divide(0, len(values)))
    starts, ends = (0, *found), (*found[1:], len(values))
    measured = [search.step(start, at, end) for start, at, end in zip(starts, found, ends, strict=False)]
    return tuple(step for step in measured if step and not step.low <= 0 <= step.high)


def unlinked(devices: Sequence[Hashable]) -> tuple[int, ...]:
    """Find where all devices are replaced at once, so that a step there cannot be told from what they differ by.

    Returns:
        Indices of the first value on the new devices.
    """
    import numpy as np

    groups = _groups(devices)
    ends = np.maximum.accumulate([int(np.flatnonzero(groups == group)[-1]) for group in groups] or [0])
    return tuple(i + 1 for i, end in enumerate(ends) if end == i and MIN_SEGMENT <= i + 1 <= len(groups) - MIN_SEGMENT)


class _Search:
    """The search of one series.

    Args:
        values: Logarithms without outliers.
        groups: The device group of each, as small integers.
        noise: Of the whole series.
        floor: Least standard deviation.
    """

    def __init__(self, values: "Floats", groups: "NDArray[np.intp]", noise: _Noise, floor: float) -> None:
        self._values = values
        self._groups = groups
        self._noise = noise
        self._floor = floor
        windows = _windows(len(values))
        self._tests = sum(end - start - 2 * MIN_SEGMENT + 1 for start, end in windows)
        self._splits = [(start, end, split) for start, end in windows[1:] if (split := self._best_split(start, end))]

    def divide(self, start: int, end: int) -> list[int]:
        """Indices of all steps from start to end."""
        if end - start < 2 * MIN_SEGMENT:
            return []
        inside = [split for left, right, split in self._splits if start <= left and right <= end]
        whole = self._best_split(start, end)
        candidates = [*([whole] if whole else []), *inside]
        fitting = [split for split in candidates if start + MIN_SEGMENT <= split.at <= end - MIN_SEGMENT]
        if not fitting:
            return []
        at = max(fitting, key=lambda split: split.strength).at
        return [*self.divide(start, at), at, *self.divide(at, end)]

    def refine(self, found: list[int]) -> list[int]:
        """Place each step where it is best between its neighbours; where others hide it, it stays where it was seen."""
        placed: list[int] = []
        for at, end in zip(found, (*found[1:], len(self._values)), strict=False):
            split = self._best_split(placed[-1] if placed else 0, end)
            placed.append(split.at if split else at)
        return placed

    def step(self, start: int, at: int, end: int) -> Step | None:
        """The step at an index, measured between its neighbours; `None` where they leave too few values for that."""
        split = self._measure(start, at, end)
        if split is None:
            return None
        half = t_quantile(0.975, split.degrees_of_freedom) * split.standard_error
        return Step(
            at=at,
            before=float(self._values[start:at].mean()),
            change=split.change,
            low=split.change - half,
            high=split.change + half,
            sd=split.sd,
        )

    def _best_split(self, start: int, end: int) -> _Split | None:
        """The most significant split of a window that is a step."""
        import numpy as np

        if end - start < 2 * MIN_SEGMENT:
            return None
        splits = self._all_splits(start, end)
        if splits is None:
            return None
        changes, sds, weights, freedom = splits
        needed = t_quantile(1 - FALSE_ALARM / 2 / self._tests, freedom) * math.sqrt(self._noise.inflation)
        strengths = np.abs(changes) * np.sqrt(weights) / sds / needed
        strengths[np.abs(changes) < MIN_MAGNITUDE * sds] = 0.0
        best = int(np.argmax(strengths))
        if strengths[best] < 1:
            return None
        return self._split(start + MIN_SEGMENT + best, splits, best, float(strengths[best]))

    def _measure(self, start: int, at: int, end: int) -> _Split | None:
        splits = self._all_splits(start, end)
        return self._split(at, splits, at - start - MIN_SEGMENT, 1.0) if splits else None

    def _split(self, at: int, splits: "tuple[Floats, Floats, Floats, int]", index: int, strength: float) -> _Split:
        changes, sds, weights, freedom = splits
        sd = float(sds[index])
        return _Split(
            at=at,
            change=float(changes[index]),
            sd=sd,
            standard_error=sd * math.sqrt(self._noise.inflation / float(weights[index])),
            degrees_of_freedom=freedom,
            strength=strength,
        )

    def _all_splits(self, start: int, end: int) -> "tuple[Floats, Floats, Floats, int] | None":
        """Change, standard deviation and weight (n m / (n + m), summed over devices) of every split, and the freedom.

        `None` where there are too few values for the devices.
        """
        import numpy as np

        groups = self._groups[start:end]
        counts = np.bincount(groups)
        freedom = len(groups) - int(np.count_nonzero(counts)) - 1
        if freedom < 1:
            return None
        values = (
            self._values[start:end] - (np.bincount(groups, self._values[start:end]) / np.maximum(counts, 1))[groups]
        )
        # With c values of a device so far, of n in all, c (n - c) / n is its weight: each value adds (n - 2c - 1) / n.
        weights = np.cumsum((counts[groups] - 2 * _ranks(groups) - 1) / counts[groups])[MIN_SEGMENT - 1 : -MIN_SEGMENT]
        weights = np.where(weights > 1e-9, weights, 1.0)  # where no device is on both sides the sums below are 0
        sums = np.cumsum(values)[MIN_SEGMENT - 1 : -MIN_SEGMENT]
        left_over = np.maximum(values @ values - sums**2 / weights, 0.0)
        sds = np.maximum(np.sqrt(left_over / freedom), self._floor)
        return -sums / weights, sds, weights, freedom


def _groups(devices: Sequence[Hashable]) -> "NDArray[np.intp]":
    """A small integer for each set of devices; 0 for all with fewer than three values."""
    import numpy as np

    counts = Counter(devices)
    numbers: dict[Hashable, int] = {}
    return np.array(
        [0 if counts[each] < MIN_SEGMENT else numbers.setdefault(each, len(numbers) + 1) for each in devices],
        dtype=np.intp,
    )


def _windows(count: int) -> list[tuple[int, int]]:
    """The whole series, and half-overlapping windows of halving length."""
    windows, length = [(0, count)], count / 2
    while length >= _SHORTEST_WINDOW:
        pieces = max(math.ceil(2 * count / length) - 1, 1)
        starts = [round(i * (count - length) / max(pieces - 1, 1)) for i in range(pieces)]
        windows += [(start, min(start + math.ceil(length), count)) for start in starts]
        length /= 2
    return windows


def _ranks(groups: "NDArray[np.intp]") -> "NDArray[np.intp]":
    """How many values of the same group come before each."""
    import numpy as np

    order = np.argsort(groups, kind="stable")
    first = np.searchsorted(groups[order], groups[order])
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(groups)) - first
    return ranks


def _noise(values: "Floats", groups: "NDArray[np.intp]", floor: float) -> _Noise:
    """Standard deviation and likeness of neighbours, from the medians of differences: steps hardly touch them."""
    import numpy as np

    by_group = [values[groups == group] for group in np.unique(groups)]
    medians = []
    for lag in (1, 2, 3):
        differences = np.concatenate([np.abs(own[lag:] - own[:-lag]) for own in by_group])
        if lag == 1 or len(differences) >= _DIFFERENCES_A_LAG * lag:
            medians.append(float(np.median(differences)) if len(differences) else 0.0)
    largest = max(medians)
    sd = max(largest / _NORMAL_MEDIAN / math.sqrt(2), floor)
    # Of an autoregression, the differences of neighbours have 2 (1 - rho) of the variance, distant ones nearly 2.
    alike = 0.0 if largest == 0 else min(max(1 - (medians[0] / largest) ** 2, 0.0), _MOST_ALIKE)
    return _Noise(sd=sd, inflation=(1 + alike) / (1 - alike))


def _without_outliers(values: "Floats", groups: "NDArray[np.intp]", sd: float) -> "Floats":
    """Bring the outliers of each device, a tenth of its values at most, to three deviations from its running median."""
    import numpy as np

    cleaned = values.copy()
    for group in np.unique(groups):
        own = values[groups == group]
        if len(own) < _MEDIAN_OF:
            continue
        medians = np.median(np.lib.stride_tricks.sliding_window_view(own, _MEDIAN_OF), axis=1)
        centres = np.pad(medians, _MEDIAN_OF // 2, mode="edge")
        # What a tenth of the values does is no outlier.
        reach = max(_CLIP_SD * sd, float(np.quantile(np.abs(own - centres), 0.9, method="higher")))
        cleaned[groups == group] = np.clip(own, centres - reach, centres + reach)
    return cleaned
