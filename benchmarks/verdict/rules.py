"""The rules by which other tools call a slowdown, as they publish them. True is an alarm.

Each works on many repetitions at once. Times are positive, more is slower; samples stand in the last axis.
"""

import math

import numpy as np
from scipy.stats import mannwhitneyu, norm, t

from benchmarks.verdict.noise import Noise

#: asv: largest p value of a difference (asv/_stats.py, is_different).
ASV_P = 0.002
#: asv: sizes up to which the p value is exact.
_ASV_EXACT = 20


def pytest_benchmark(before: np.ndarray, now: np.ndarray, *, percent: float) -> np.ndarray:
    """`--benchmark-compare-fail=FIELD:PERCENT%`: the field of this run against that of the last saved one.

    PercentageRegressionCheck of pytest-benchmark 5.3.1 (pytest_benchmark/utils.py).

    Args:
        before: The field, such as the smallest time, of the last saved run.
        now: The same of this run.
        percent: More than this is a failure.
    """
    return np.asarray(now / before * 100 - 100 > percent)


def github_action_benchmark(before: np.ndarray, now: np.ndarray, *, percent: float = 200.0) -> np.ndarray:
    """github-action-benchmark 1.22: the ratio to the previous point is above `alert-threshold`."""
    return np.asarray(now / before > percent / 100)


def asv(before: np.ndarray, now: np.ndarray, *, factor: float = 1.1) -> np.ndarray:
    """Asv's `compare` and `continuous`: Mann-Whitney p < 0.002, and the medians differ by more than the factor.

    asv 0.6 (asv/_stats.py and asv/commands/compare.py). Below the size at which so small a p value can be, asv turns
    to intervals that hold every sample; here that is an error.

    Args:
        before: Samples.
        now: Samples.
        factor: asv's `--factor`.

    Raises:
        ValueError: There are too few samples.
    """
    counts = before.shape[-1], now.shape[-1]
    if 1 / math.comb(sum(counts), min(counts)) >= ASV_P:
        raise ValueError(f"{counts[0]} and {counts[1]} samples: p can never be below {ASV_P}.")
    method = "exact" if max(counts) <= _ASV_EXACT else "asymptotic"
    p = mannwhitneyu(before, now, axis=-1, method=method, use_continuity=False).pvalue
    return np.asarray((p < ASV_P) & (np.median(before, axis=-1) < np.median(now, axis=-1) / factor))


def bencher_t(history: np.ndarray, now: np.ndarray, *, boundary: float = 0.99) -> np.ndarray:
    """Bencher's `t_test` threshold with an upper boundary, over the history of single results.

    Bencher 0.6.12 (lib/bencher_boundary): the limit is the quantile of Student t with n - 1 degrees of freedom, times
    the standard deviation (divided by n, not n - 1), above the mean.

    Args:
        history: Results: [..., results].
        now: The new result: [...].
        boundary: Bencher's `--threshold-upper-boundary`.
    """
    quantile = float(t.ppf(boundary, history.shape[-1] - 1))
    return np.asarray(now > history.mean(axis=-1) + quantile * history.std(axis=-1))


def nvbench_robust(before: np.ndarray, now: np.ndarray, *, gap: float = 0.005) -> np.ndarray:
    """`nvbench-compare-robust` says SLOW: the intervals from minimum to third quartile are this far apart.

    NVBench, August 2026 (compare_intervals_for_clear_gap, preset `default`). It asks for the same in clock cycles; a
    constant clock makes that the same question.

    Args:
        before: Samples of one process.
        now: Samples of one process.
        gap: Least distance, as a fraction of the nearer end.
    """
    rank = (75 * (before.shape[-1] - 1) + 50) // 100
    third_quartile = np.sort(before, axis=-1)[..., rank]
    smallest = now.min(axis=-1)
    return np.asarray((smallest > third_quartile) & ((smallest - third_quartile) / third_quartile >= gap))


def fixed_limit(before: np.ndarray, now: np.ndarray, *, percent: float) -> np.ndarray:
    """No tool's: the geometric mean of all runs against that of the whole baseline, with a fixed limit."""
    return np.asarray(np.exp(np.log(now).mean(axis=-1) - np.log(before).mean(axis=-1)) - 1 > percent / 100)


def oracle_power(noise: Noise, effect: float, *, sessions: int, runs: int, current: int, alpha: float) -> float:
    """Return the most that any rule can catch that compares the same runs with the same baseline.

    The likelihood-ratio test (Neyman & Pearson 1933) of one session's mean against the baseline's, on one device, every
    variance known. A rule that must learn the variances, or that grants a tolerance besides, catches less.

    Args:
        noise: Normal, one device.
        effect: Slowdown, as a fraction.
        sessions: Of the baseline.
        runs: Of each of them.
        current: Runs that are judged, of one further session.
        alpha: Chance of an alarm if nothing changed.
    """
    variance = noise.session**2 * (1 + 1 / sessions) + noise.run_variance * (1 / current + 1 / (sessions * runs))
    return float(norm.cdf(math.log1p(effect) / math.sqrt(variance) - norm.ppf(1 - alpha)))
