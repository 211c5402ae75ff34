"""Tests that ranks of the truth among posterior draws are uniform: what calibration comes to, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, bdtrc, betaincinv, chdtrc
from scipy.stats import kstwo

from .errors import DataError, OptionError

__all__ = ["Coverage", "coverage", "holm", "number_of_bins", "symmetry", "uniform_bins", "uniform_ks"]


def number_of_bins(count: int) -> int:
    """Bins of the chi-square test: at least ten expected in each, and at most 20.

    >>> number_of_bins(50), number_of_bins(1000)
    (5, 20)
    """
    return max(2, min(20, count // 10))


def uniform_bins(u: np.ndarray, bins: int | None = None) -> float:
    r"""p-value of Pearson's chi-square test that positions are uniform, on bins of equal width.

    .. math:: \sum_b (n_b - n / B)^2 / (n / B) \sim \chi^2_{B-1}

    Reference: Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian inference algorithms with
    simulation-based calibration", 2018.

    Args:
        u: positions in [0, 1], shape (N,). bins: B; default `number_of_bins`.

    Raises:
        DataError: positions outside [0, 1], or none. OptionError: fewer than two bins.

    >>> uniform_bins((np.arange(100) + 0.5) / 100)
    1.0
    """
    _check(u)
    bins = number_of_bins(len(u)) if bins is None else bins
    if bins < 2:
        raise OptionError(f"bins is {bins}, expected at least 2")
    counts, expected = histogram(u, bins), len(u) / bins
    return float(chdtrc(bins - 1, ((counts - expected) ** 2).sum() / expected))


def histogram(u: np.ndarray, bins: int) -> np.ndarray:
    """Positions in each of the bins of equal width, `(bins,)`."""
    return np.bincount(np.minimum((u * bins).astype(int), bins - 1), minlength=bins)


def uniform_ks(u: np.ndarray) -> float:
    r"""p-value of the Kolmogorov-Smirnov test that positions are uniform: exact, good at seeing shifts.

    .. math:: D = \max_t |\hat F(t) - t|

    Args:
        u: positions in [0, 1], shape (N,).

    Raises:
        DataError: as for :func:`uniform_bins`.

    >>> uniform_ks(np.full(50, 0.5)) < 1e-9
    True
    """
    _check(u)
    ordered, steps = np.sort(u), np.arange(len(u) + 1) / len(u)
    return float(kstwo.sf(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()), len(u)))


def symmetry(u: np.ndarray) -> float:
    r"""p-value of the test that positions are symmetric about 1/2: it sees bias, and never a wrong scale.

    .. math:: D = \max_t \big| \#\{u_i < \tfrac12 - t\} - \#\{u_i > \tfrac12 + t\} \big|, \qquad
              P(D < m) = \frac1m \sum_{j = 1, 3, \dots}^{2m - 1} (-1)^{(j-1)/2} \cos^N \frac{j \pi}{2 m}
              \cot \frac{j \pi}{4 m}

    D is the furthest that a walk of N fair steps goes, whatever the distances from 1/2, so that the p-value is exact;
    the two-sample test of u against 1 - u is not, for those are no two samples.

    Reference: Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational inference", 2018; Butler,
    "A test for symmetry using the sample distribution function", 1969.

    Args:
        u: positions in [0, 1] without ties, shape (N,).

    Raises:
        DataError: as for :func:`uniform_bins`.

    >>> symmetry(np.array([0.1, 0.9, 0.2, 0.8])), symmetry(np.full(100, 0.9) + 1e-4 * np.arange(100)) < 1e-9
    (1.0, True)
    """
    _check(u)
    order = np.argsort(-np.abs(u - 0.5), kind="stable")
    furthest = int(np.abs(np.cumsum(np.where(u[order] > 0.5, 1, -1))).max())
    return 1.0 - _stays_below(furthest, len(u))


def _stays_below(m: int, steps: int) -> float:
    """Probability that a walk of fair steps stays inside (-m, m)."""
    if m <= 1:
        return 0.0
    j = np.arange(1, 2 * m, 2)
    terms = (-1.0) ** ((j - 1) // 2) * np.cos(j * math.pi / (2 * m)) ** steps / np.tan(j * math.pi / (4 * m))
    return float(np.clip(terms.sum() / m, 0.0, 1.0))


@dataclass(frozen=True)
class Coverage:
    """How often central intervals hold the truth.

    Attributes:
        level: what they should hold. share: what they hold. low, high: its exact 95 % interval. p: of the two-sided
            binomial test that the share is the level.
    """

    level: float
    share: float
    low: float
    high: float
    p: float


def coverage(u: np.ndarray, level: float) -> Coverage:
    r"""Share of positions inside the central interval of a level, with its exact 95 % interval.

    .. math:: \#\{|u_i - \tfrac12| \le \mathrm{level} / 2\} \sim \mathrm{Binomial}(N, \mathrm{level})

    Reference: Clopper, Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    1934.

    Args:
        u: positions in [0, 1], shape (N,). level: in (0, 1).

    Raises:
        DataError: as for :func:`uniform_bins`. OptionError: level outside (0, 1).

    >>> found = coverage((np.arange(200) + 0.5) / 200, 0.9)
    >>> round(found.share, 3), found.low < 0.9 < found.high, found.p
    (0.9, True, 1.0)
    """
    _check(u)
    if not 0.0 < level < 1.0:
        raise OptionError(f"level is {level}, expected a number in (0, 1): 0.9 is usual")
    n, k = len(u), int((np.abs(u - 0.5) <= level / 2).sum())
    low = float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
    below, above = float(bdtr(k, n, level)), float(bdtrc(k - 1, n, level)) if k else 1.0
    return Coverage(level, k / n, low, high, min(1.0, 2 * min(below, above)))


def holm(p: np.ndarray) -> np.ndarray:
    r"""p-values for all statements together: the chance that any true one is refused at a level is at most the level.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\{1, (m - j + 1)\, p_{(j)}\}

    Reference: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Args:
        p: shape (m,), in [0, 1]; NaN is a statement that cannot be tested, and stays.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    out = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order])) if len(order) else []
    return out


def _check(u: np.ndarray) -> None:
    if u.ndim != 1 or len(u) == 0 or not (np.isfinite(u).all() and u.min() >= 0 and u.max() <= 1):
        raise DataError(f"u: expected positions in [0, 1], shape (N,), got shape {u.shape}: divide ranks by draws + 1")
