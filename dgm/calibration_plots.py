"""Pictures of calibration: rank histograms, and how far the distribution of ranks is from uniform."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binom

from .errors import OptionError
from .rank_tests import histogram
from .style import COLOURS, INK, shorten, styled

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ["calibration_plot", "ecdf_band"]

REPETITIONS = 2000


def ecdf_band(count: int, at: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    r"""Simultaneous band of the ECDF of N uniform positions, minus the identity.

    .. math:: N \hat F(t) \sim \mathrm{Binomial}(N, t), \qquad P\big(\forall t: l_\gamma(t) \le \hat F(t) \le
              u_\gamma(t)\big) = \mathrm{level}

    Pointwise binomial intervals of one level gamma, which is found by simulation.

    Reference: Säilynoja, Bürkner, Vehtari, "Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison", 2022.

    Args:
        count: N. at: points t in (0, 1), shape (K,). level: of the band. seed: of the simulation.

    Returns:
        lower and upper ends, shape (K,).

    >>> low, high = ecdf_band(100, np.array([0.25, 0.5, 0.75]))
    >>> bool((low < 0).all() and (high > 0).all())
    True
    """
    rng = np.random.default_rng(seed)
    tails = np.empty(REPETITIONS)
    for i in range(REPETITIONS):
        below = np.searchsorted(np.sort(rng.uniform(size=count)), at, side="right")
        tails[i] = np.minimum(binom.cdf(below, count, at), binom.sf(below - 1, count, at)).min()
    tail = np.quantile(tails, 1 - level)
    return binom.ppf(tail, count, at) / count - at, binom.isf(tail, count, at) / count - at


@styled
def calibration_plot(result: Calibration, most: int = 6) -> Figure:
    """Of the coordinates that fit worst: ranks in bins, and ECDF minus uniform, with 95 % bands where calibrated.

    Args:
        result: of `dgm.calibration.calibrate`. most: coordinates to show, at least 1.

    Raises:
        OptionError: most < 1.
    """
    if most < 1:
        raise OptionError(f"most is {most}, expected at least 1")
    shown = result.table.sort_values("p_holm", kind="stable").head(most)
    count, bins = result.cases, result.bins
    figure = Figure(figsize=(2.2 * len(shown) + 0.6, 3.6), layout="constrained")
    axes: Any = figure.subplots(2, len(shown), squeeze=False)
    t = np.linspace(0.01, 0.99, 99)
    low, high = ecdf_band(count, t)
    band = dict(color=INK, alpha=0.18, linewidth=0)
    few, many = (float(binom.ppf(p, count, 1 / bins)) for p in (0.025, 0.975))
    for k, (_, row) in enumerate(shown.iterrows()):
        colour = COLOURS[1] if row["p_holm"] < result.level else COLOURS[0]
        part = result.frame[result.frame["coordinate"] == row["coordinate"]]
        u = part.loc[part["site"] == row["site"], "u"].to_numpy()
        top, bottom = axes[0, k], axes[1, k]
        top.fill_between([0, 1], few, many, **band)
        top.bar((np.arange(bins) + 0.5) / bins, histogram(u, bins), width=0.86 / bins, color=colour, alpha=0.75)
        top.set_title(shorten(row["coordinate"], 24))
        top.set_xlim(0, 1)
        bottom.fill_between(t, low, high, **band)
        ecdf = np.searchsorted(np.sort(u), t, side="right") / count - t
        bottom.plot(t, ecdf, color=colour, linewidth=1.4)
        bottom.axhline(0.0, color=INK, linewidth=0.6)
        reach = 1.15 * max(float(np.abs(ecdf).max()), float(high.max()), math.ulp(1.0))
        bottom.set_ylim(-reach, reach)
        bottom.set_xlim(0, 1)
        bottom.set_xlabel("rank of the truth, as a share")
        if k:
            continue
        top.set_ylabel(f"cases in {bins} bins")
        bottom.set_ylabel("ECDF − uniform")
    return figure
