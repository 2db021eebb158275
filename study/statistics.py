"""Calibration of one run; paired comparisons over seeds."""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import stats

CALIBRATION_BINS = 10
CONFIDENCE = 0.95


def calibration(confidence, correct):
    """Expected calibration error, and [[count, mean confidence, accuracy]] of the bins (k / 10, (k + 1) / 10].

    `confidence`, `correct`: arrays (n,), float64, the latter of 0 and 1. The error is |accuracy - confidence| of the
    bins, averaged with their counts as weights; an empty bin has None for both.
    """
    place = np.ceil(np.nan_to_num(confidence) * CALIBRATION_BINS).astype(int).clip(1, CALIBRATION_BINS) - 1
    count, *sums = (np.bincount(place, weights, CALIBRATION_BINS) for weights in (None, confidence, correct))
    bins = [
        [int(n), *(round(float(total / n), 4) if n else None for total in totals)]
        for n, *totals in zip(count, *sums, strict=True)
    ]
    return float(np.abs(sums[1] - sums[0]).sum() / len(confidence)), bins


def overconfidence(bins):
    """Mean confidence minus accuracy of the examples in bins, as `calibration` has them."""
    filled = np.array([bin_ for bin_ in bins if bin_[0]])
    return float(np.average(filled[:, 1] - filled[:, 2], weights=filled[:, 0]))


class Comparison(NamedTuple):
    """Differences arm - baseline on the same seeds: mean, BCa interval, p of the sign-flip test (two-sided)."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def compare(arm, baseline):
    """A Comparison of two sequences of numbers, one a seed, in the same order; at least 3 seeds.

    The interval is the bias-corrected and accelerated bootstrap's (Efron 1987), the test that of all sign flips up to
    13 seeds, of 10,000 random ones beyond. Both are seeded. Means are compared to 12 decimals: accuracies are multiples
    of 1 / n, and sums that are equal must not differ by their rounding.
    """
    return _comparison(tuple(np.subtract(arm, baseline).tolist()))


@cache  # tables and pictures compare the same
def _comparison(differences):
    difference = np.array(differences, dtype=float)
    if len(difference) < 3:
        raise ValueError(f"{len(difference)} seeds, expected at least 3: fewer tell nothing of the spread.")
    if np.ptp(difference) == 0:
        same = float(difference[0])
        return Comparison(same, same, same, 1.0 if same == 0 else 2.0 ** (1 - len(difference)), len(difference))
    interval = stats.bootstrap(
        (difference,), np.mean, method="BCa", confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
    ).confidence_interval
    test = stats.permutation_test(
        (difference, np.zeros_like(difference)), lambda x, y, axis: np.mean(x - y, axis=axis).round(12),
        permutation_type="samples", vectorized=True, n_resamples=9999, rng=np.random.default_rng(0),
    )  # fmt: skip
    return Comparison(difference.mean(), interval.low, interval.high, float(test.pvalue), len(difference))


def holm(p_values):
    """Adjusted p-values in the order given (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order, adjusted = p.argsort(), np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()
