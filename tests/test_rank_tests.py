"""Tests of uniform ranks: their p-values mean what they say, and each sees what it is there for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom, binomtest, chisquare, ks_2samp, kstest

from dgm.errors import DataError, OptionError
from dgm.rank_tests import coverage, histogram, holm, number_of_bins, symmetry, uniform_bins, uniform_ks


def rejections(test: object, repetitions: int = 800, count: int = 120) -> tuple[float, float]:
    """Shares of p-values below 0.05 and 0.5 where positions are uniform."""
    rng = np.random.default_rng(1)
    p = np.array([test(u) for u in rng.uniform(size=(repetitions, count))])  # type: ignore[operator]
    return float((p <= 0.05).mean()), float((p <= 0.5).mean())


def is_right(shares: tuple[float, float], repetitions: int = 800) -> bool:
    """A p-value below t has probability t; for a discrete statistic, a little less."""
    errors = [4.5 * (t * (1 - t) / repetitions) ** 0.5 for t in (0.05, 0.5)]
    return all(t - 0.09 - e < share < t + e for share, t, e in zip(shares, (0.05, 0.5), errors, strict=True))


@pytest.mark.parametrize("test", [uniform_bins, uniform_ks, symmetry, lambda u: coverage(u, 0.9).p])
def test_p_values_are_uniform(test: object) -> None:
    shares = rejections(test)
    assert is_right(shares), shares
    assert shares[0] > 0.015  # and not so because they never reject


def test_two_samples_that_are_one_are_no_test_of_symmetry() -> None:
    assert not is_right(rejections(lambda u: ks_2samp(u, 1 - u).pvalue))


def test_walk_formula_by_enumeration() -> None:
    """All 2^9 sign patterns: the p-value of each is its exact tail probability."""
    distances = np.linspace(0.45, 0.05, 9)
    walks = [np.array(signs) for signs in itertools.product((-1, 1), repeat=9)]
    furthest = np.array([np.abs(np.cumsum(signs)).max() for signs in walks])
    for signs, reach in zip(walks, furthest, strict=True):
        assert symmetry(0.5 + signs * distances) == pytest.approx((furthest >= reach).mean(), abs=1e-12)


def test_closed_forms() -> None:
    u = np.random.default_rng(0).beta(1.2, 1.0, size=230)
    assert uniform_bins(u, 10) == pytest.approx(chisquare(histogram(u, 10)).pvalue, rel=1e-9)
    assert uniform_ks(u) == pytest.approx(kstest(u, "uniform", method="exact").pvalue, rel=1e-9)
    for level in (0.5, 0.8, 0.9, 0.95):
        found = coverage(u, level)
        k = round(found.share * 230)
        exact = binomtest(k, 230).proportion_ci(0.95, method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=1e-9)
        assert found.p == pytest.approx(min(1, 2 * min(binom.cdf(k, 230, level), binom.sf(k - 1, 230, level))))
    assert coverage(np.full(60, 0.5), 0.9).high == 1.0 and coverage(np.full(60, 0.5), 0.9).low > 0.9
    assert coverage(np.full(60, 0.01), 0.9).low == 0.0 and coverage(np.full(60, 0.01), 0.9).high < 0.1
    assert holm(np.array([0.04, 0.01, 0.9])).tolist() == pytest.approx([0.08, 0.03, 0.9])
    assert number_of_bins(10_000) == 20


def test_what_each_sees() -> None:
    """A shift shows in all; a wrong scale in all but the symmetry test, which is why it never stands alone."""
    grid = (np.arange(300) + 0.5) / 300
    shifted, narrow = grid**1.6, 0.5 + np.sign(grid - 0.5) * np.abs(2 * grid - 1) ** 0.4 / 2
    assert max(uniform_bins(shifted), uniform_ks(shifted), symmetry(shifted)) < 1e-3
    assert max(uniform_bins(narrow), uniform_ks(narrow), coverage(narrow, 0.9).p) < 1e-3
    assert symmetry(narrow) > 0.5


def test_refusals() -> None:
    for u in (np.array([]), np.array([0.1, 1.2]), np.array([np.nan]), np.zeros((2, 2))):
        with pytest.raises(DataError, match="divide ranks by draws"):
            uniform_ks(u)
    with pytest.raises(OptionError, match="level is 1"):
        coverage(np.array([0.5]), 1.0)
    with pytest.raises(OptionError, match="bins is 1"):
        uniform_bins(np.array([0.5]), 1)
