"""The study: its statistics."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest

from study import statistics

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sign_flips_by_brute_force():
    difference = np.array([0.4, -0.1, 0.3, 0.25, 0.6, 0.05, -0.2])
    flips = np.array(list(itertools.product((1, -1), repeat=len(difference))))
    as_large = np.abs((flips * difference).mean(1)) >= difference.mean() - 1e-12
    found = statistics.compare(difference + 1.0, np.ones(7))
    assert found.p == pytest.approx(as_large.mean(), abs=1e-12)
    assert found.mean == pytest.approx(difference.mean())
    assert found.seeds == 7


def test_sign_flips_of_accuracies_that_tie():
    """Accuracies are k / 300: sums that are equal must count as equal, whatever they were rounded to."""
    generator = np.random.default_rng(1)
    for _ in range(30):
        k, baseline = generator.integers(-6, 8, 8), generator.integers(200, 260, 8)
        flips = np.array(list(itertools.product((1, -1), repeat=8)))
        as_large = np.abs((flips * k).sum(1)) >= abs(k.sum())
        found = statistics.compare((baseline + k) / 300, baseline / 300)
        assert found.p == pytest.approx(as_large.mean(), abs=1e-12)


def test_the_interval_is_the_bias_corrected_and_accelerated_one():
    difference = np.array([0.02, 0.05, 0.1, 0.12, 0.2, 0.25, 0.4, 0.7, 1.3, 3.0])
    draws = np.random.default_rng(9).choice(difference, (200_000, 10)).mean(1)
    normal, mean = NormalDist(), difference.mean()
    bias = normal.inv_cdf(((draws < mean).mean() + (draws <= mean).mean()) / 2)
    left_out = mean - (difference.sum() - difference) / 9  # mean of the jackknife's means minus each
    acceleration = (left_out**3).sum() / (6 * (left_out**2).sum() ** 1.5)
    found = statistics.compare(difference, np.zeros(10))
    for end, tail in (found.low, 0.025), (found.high, 0.975):
        z = bias + normal.inv_cdf(tail)
        level = normal.cdf(bias + z / (1 - acceleration * z))
        # 10,000 draws there: a quantile has a standard error of sqrt(level (1 - level) / 10,000) in probability, and
        # as much comes from the share of draws below the mean. A plain percentile interval is farther off.
        error = 5 * (level * (1 - level) / 1e4) ** 0.5
        assert abs((draws < end).mean() - level) < error < abs(tail - level)


def test_differences_without_spread():
    assert statistics.compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])[:4] == (0.0, 0.0, 0.0, 1.0)
    assert statistics.compare([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])[:4] == (1.0, 1.0, 1.0, 0.25)  # 2 of 8 sign patterns
    with pytest.raises(ValueError, match=r"2 seeds.*at least 3"):
        statistics.compare([1.0, 2.0], [0.0, 0.0])


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_calibration_by_hand():
    """An edge belongs to the bin below it, and 1 to the last."""
    confidence, correct = np.array([0.5, 0.45, 1.0, 0.9, 0.93]), np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    error, bins = statistics.calibration(confidence, correct)
    assert bins == [[0, None, None]] * 4 + [[2, 0.475, 1.0]] + [[0, None, None]] * 3 + [[1, 0.9, 1.0], [2, 0.965, 0.5]]
    assert error == pytest.approx((abs(2 - 0.95) + abs(1 - 0.9) + abs(1 - 1.93)) / 5)


def test_calibration_of_a_run_that_diverged(recwarn):
    error, bins = statistics.calibration(np.full(3, np.nan), np.ones(3))
    assert np.isnan(error)
    assert [count for count, *_ in bins] == [3] + [0] * 9
    assert not recwarn
