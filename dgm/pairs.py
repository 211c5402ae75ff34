"""Every guide against every other: paired differences, and which of them survive the correction for their number."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtr, stdtrit

from .bounds import _mean_squares, clustered_difference, clustered_interval
from .rank_tests import holm

__all__ = ["LEVEL", "decide", "pair_p_values", "pairwise", "rank_cells", "rank_intervals", "scored"]

LEVEL = 0.05
"""Chance that any of the statements "A is better than B" of a comparison is wrong, at most."""


def scored(per_datum: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The guides whose held-out scores `(seeds, N)` are all finite: the others have no rank."""
    return {g: v for g, v in per_datum.items() if np.size(v) and np.isfinite(v).all()}


def pairwise(rows: pd.DataFrame, per_datum: Mapping[str, np.ndarray], order: list[str] | None = None) -> pd.DataFrame:
    """All pairs of guides that have a score, over the seeds that both finished.

    Args:
        rows: one row for each guide and seed, with guide, seed, status.
        per_datum: held-out score `(seeds, N)` by guide, its seeds in the order of the rows.
        order: of the guides; of a pair the first stands before the second. As they come unless told.

    Returns:
        columns a, b, difference (a - b), difference_se, low, high (its own 95 % interval, not corrected), seeds (in
        common), p (:func:`pair_p_values`), p_holm, and better: the guide that is better at the level of 5 % for all
        pairs together, or "".

    >>> rows = pd.DataFrame({"guide": ["f", "g"] * 2, "seed": [0, 0, 1, 1], "status": "ok"})
    >>> scores = {"f": np.array([[1.0, 2.0, 3.0]] * 2), "g": np.array([[0.0, 1.0, 2.0]] * 2)}
    >>> pairwise(rows, scores)[["a", "b", "difference", "better"]].values.tolist()
    [['f', 'g', 1.0, 'f']]
    """
    done = rows[rows["status"] == "ok"] if "status" in rows else rows
    seeds = {str(g): list(part) for g, part in done.groupby("guide")["seed"]}
    known = scored(per_datum)
    names = [g for g in (order or list(known)) if g in known]
    found: list[tuple[str, str, float, float, float, float, int]] = []
    squares: list[tuple[float, ...]] = []
    for a, b in combinations(names, 2):
        both = [s for s in seeds[a] if s in seeds[b]]
        if not both:
            continue
        x, y = (torch.as_tensor(known[g][[seeds[g].index(s) for s in both]]) for g in (a, b))
        mean, error = clustered_difference(x, y)
        low, high = clustered_interval(x, y)
        found.append((a, b, mean, error, low, high, len(both)))
        squares.append((mean, *_mean_squares(x.double() - y.double()), *x.shape))
    table = pd.DataFrame(found, columns=["a", "b", "difference", "difference_se", "low", "high", "seeds"])
    columns = np.array(squares, dtype=float).reshape(-1, 6).T
    table["p"] = pair_p_values(*columns)
    return decide(table)


def decide(pairs: pd.DataFrame) -> pd.DataFrame:
    """The columns p_holm and better, for all rows of the frame together: rows of several comparisons may stand in it.

    >>> pairs = pd.DataFrame({"a": ["f", "f"], "b": ["g", "h"], "difference": [1.0, -1.0], "p": [0.01, 0.04]})
    >>> decide(pairs)["better"].tolist()
    ['f', 'h']
    """
    adjusted = holm(pairs["p"].to_numpy(dtype=float))
    ahead = np.where(pairs["difference"] > 0, pairs["a"], pairs["b"])
    better = pd.Series(np.where(adjusted <= LEVEL, ahead, ""), pairs.index, dtype=object)
    return pairs.assign(p_holm=adjusted, better=better)


def pair_p_values(
    mean: np.ndarray, seeds: np.ndarray, data: np.ndarray, residual: np.ndarray, r: np.ndarray, n: np.ndarray
) -> np.ndarray:
    r"""Two-sided p-values of equal scores of P pairs, that hold in the far tails which a correction asks for.

    With the mean squares of the two-way layout, M_R of seeds, M_N of data and M_E of the residual, the smaller of

    * Banerjee's, the p at which :math:`\bar d^2 R N = t_{R-1}(p)^2 M_R + t_{N-1}(p)^2 M_N`: valid for any variances,
      and blunt where seeds are few;
    * Satterthwaite's, as in `dgm.bounds.clustered_interval`, but with M_R not below the median of the pairs. By itself
      it takes seeds that happen to agree for seeds that do not matter: of six equal guides it declares some to be
      different in 17 % of comparisons with three seeds, and in 54 % with two. For a single pair it is left out.

    With one seed (or one datum) Student's on what there is.

    Reference: Banerjee, "Approximate confidence interval for linear functions of means of k populations when the
    population variances are not equal", 1960; Satterthwaite, "An approximate distribution of estimates of variance
    components", 1946.

    Args:
        mean: of the differences, shape (P,). seeds, data, residual: mean squares (P,), NaN where a size is 1.
        r, n: numbers of seeds and data, (P,).

    Returns:
        shape (P,), in [0, 1]; NaN where r = n = 1.

    >>> two, one = np.full(1, 2.0), np.ones(1)
    >>> pair_p_values(0 * one, one, one, one, two, two)
    array([1.])
    """
    p = _banerjee(mean, seeds, data, r, n)
    several = (r > 1) & (n > 1)
    if several.sum() > 1:
        floor = np.maximum(seeds, np.median(seeds[several]))
        p = np.where(several, np.minimum(p, _satterthwaite(mean, floor, data, residual, r, n)), p)
    return np.where((r > 1) | (n > 1), p, np.nan)


def _banerjee(mean: np.ndarray, seeds: np.ndarray, data: np.ndarray, r: np.ndarray, n: np.ndarray) -> np.ndarray:
    low, high = np.full(len(mean), np.log(1e-30)), np.zeros(len(mean))  # of log p
    squares = np.stack([np.nan_to_num(seeds), np.nan_to_num(data)])
    freedom = np.maximum(np.stack([r, n]) - 1, 1)
    for _ in range(50):
        middle = (low + high) / 2
        beyond = mean**2 * r * n > (stdtrit(freedom, np.exp(middle) / 2) ** 2 * squares).sum(axis=0)
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.exp(high)


def _satterthwaite(
    mean: np.ndarray, seeds: np.ndarray, data: np.ndarray, residual: np.ndarray, r: np.ndarray, n: np.ndarray
) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):  # squares that are all zero, and sizes of one
        whole = np.maximum(seeds + data - residual, np.maximum(seeds, data))
        spread = seeds**2 / (r - 1) + data**2 / (n - 1) + residual**2 / ((r - 1) * (n - 1))
        p = 2 * stdtr(np.maximum(whole**2 / spread, 1.0), -np.abs(mean) / np.sqrt(whole / (r * n)))
    return np.where(whole > 0, p, (mean == 0).astype(float))


def rank_intervals(pairs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Best and worst rank of each guide that the corrected differences leave open.

    rank_low = 1 + the number of guides that are significantly better, rank_high = K - the number that are significantly
    worse. All intervals hold the true ranks together with 95 %.

    Reference: Mogstad, Romano, Shaikh, Wilhelm, "Inference for ranks with applications to mobility across
    neighbourhoods and academic achievement across countries", 2024; Al Mohamad, Goeman, van Zwet, "Simultaneous
    confidence intervals for ranks with application to ranking institutions", 2022.

    Args:
        pairs: as :func:`pairwise` gives them. names: the K guides that have a score.

    >>> pairs = pd.DataFrame({"a": ["f", "f", "g"], "b": ["g", "h", "h"], "better": ["", "f", ""]})
    >>> rank_intervals(pairs, ["f", "g", "h"]).values.tolist()
    [[1, 2], [1, 3], [2, 3]]
    """
    won = pairs[pairs["better"] != ""]
    loser = won["b"].where(won["better"] == won["a"], won["a"])
    low = [1 + int((loser == g).sum()) for g in names]
    high = [len(names) - int((won["better"] == g).sum()) for g in names]
    return pd.DataFrame({"rank_low": low, "rank_high": high}, index=pd.Index(names, name="guide"))


def rank_cells(table: pd.DataFrame) -> list[str]:
    """Rank intervals as texts of one width: "1", "2–3", "–" without a rank.

    >>> rank_cells(pd.DataFrame({"rank_low": [1, 2, np.nan], "rank_high": [1, 3, np.nan]}))
    ['1  ', '2–3', '–  ']
    """
    both = [(float(a), float(b)) for a, b in zip(table["rank_low"], table["rank_high"], strict=True)]
    cells = ["–" if np.isnan(a) else f"{a:.0f}" if a == b else f"{a:.0f}–{b:.0f}" for a, b in both]
    return [f"{c:<{max(map(len, cells))}}" for c in cells]
