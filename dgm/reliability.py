"""Reliability diagrams: how often predictions of a confidence are right, and by how much that could be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtri
from torch import Tensor

from .errors import DataError, OptionError

__all__ = ["Reliability", "reliability", "wilson"]

Kind = Literal["equal-width", "equal-mass"]
BINS = 15


def wilson(successes: np.ndarray, trials: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    r"""Wilson's score interval of a probability; never empty and never outside [0, 1], also at 0 and at 1.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Reference: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Args:
        successes: counts, or sums of parts of ones. trials: n of the same shape; 0 gives NaN.
        level: coverage, in (0, 1).

    Raises:
        OptionError: level outside (0, 1).

    >>> low, high = wilson(np.array([0, 5]), np.array([10, 10]))
    >>> bool(low[0] == 0 < high[0]), bool(low[1] + high[1] == 1)
    (True, True)
    """
    if not 0.0 < level < 1.0:
        raise OptionError(f"level: expected a number in (0, 1), got {level}: 0.95 is usual")
    n = np.where(np.asarray(trials) > 0, trials, np.nan).astype(float)
    p, z = np.asarray(successes) / n, float(ndtri(0.5 + level / 2))
    half = z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    middle, width = p + z**2 / (2 * n), 1 + z**2 / n
    return np.clip((middle - half) / width, 0, 1), np.clip((middle + half) / width, 0, 1)


@dataclass(frozen=True, eq=False)
class Reliability:
    r"""Accuracy against confidence in bins, and the calibration error that they come to.

    Attributes:
        frame: one row for each bin: lower, upper (edges of the confidence), count, confidence and accuracy (means; NaN
            where empty), accuracy_low and accuracy_high (Wilson, 95 %).
        kind, bins: "equal-width" or "equal-mass", and the number of bins asked for.
        ece: expected calibration error, :math:`\sum_b (n_b/N) |\mathrm{acc}_b - \mathrm{conf}_b|`.
        chance: the expectation of ece were the predictions calibrated, with a normal approximation in each bin,
            :math:`\frac1N \sum_b \sqrt{\tfrac2\pi \sum_{n \in b} c_n (1 - c_n)}`, and chance_sd its deviation.
    """

    frame: pd.DataFrame
    kind: Kind
    bins: int
    ece: float
    chance: float
    chance_sd: float

    @property
    def name(self) -> str:
        return f"ECE, {self.bins} {self.kind} bins"

    def __repr__(self) -> str:
        return f"{self.name}: {self.ece:.4f} (calibrated: {self.chance:.4f} ± {self.chance_sd:.4f})"


def reliability(confidence: Tensor, correct: Tensor, bins: int = BINS, kind: Kind = "equal-width") -> Reliability:
    """A reliability diagram and its calibration error, from the stated probability of being right and the outcome.

    Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017; for bins of equal mass
    Nguyen, O'Connor, "Posterior calibration and exploratory analysis for natural language processing models", 2015.

    Args:
        confidence: in [0, 1], shape (N,).
        correct: bool, or 0 and 1, shape (N,).
        bins: at least 1. Equal width: of [0, 1]. Equal mass: as many data in each; equal confidences stay in one bin,
            so that the order of the data does not matter and there may be fewer bins.
        kind: "equal-width" or "equal-mass". A bin holds its upper edge.

    Raises:
        DataError: shapes that differ, no data, NaN, or values outside [0, 1].
        OptionError: bins below 1, or another kind.

    >>> found = reliability(torch.tensor([0.6, 0.6, 0.9]), torch.tensor([1, 0, 1]), bins=2)
    >>> found.frame["count"].tolist(), round(found.ece, 6)
    ([0, 3], 0.033333)
    """
    if bins < 1:
        raise OptionError(f"bins: expected at least 1, got {bins}")
    if kind not in get_args(Kind):
        raise OptionError(f"kind is {kind!r}, expected 'equal-width' or 'equal-mass'")
    if confidence.dim() != 1 or confidence.shape != correct.shape or len(confidence) == 0:
        raise DataError(
            f"confidence and correct: expected shape (N,) each, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}"
        )
    c, right = confidence.detach().double().cpu(), correct.detach().double().cpu()
    if not ((c >= 0) & (c <= 1)).all():
        raise DataError(f"confidence: expected probabilities in [0, 1], got {c.min():g} to {c.max():g}: not logits")
    if not ((right == 0) | (right == 1)).all():
        raise DataError("correct: expected True and False, or 1 and 0")
    n = len(c)
    if kind == "equal-width":
        inner = torch.arange(1, bins, dtype=torch.float64) / bins
    else:
        places = torch.arange(1, bins) * n // bins - 1
        inner = c.sort().values[places[places >= 0]].unique()
        inner = inner[inner < c.max()]  # the last bin is not empty
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.ones(1, dtype=torch.float64)])
    index = torch.bucketize(c, inner)  # right=False: an edge belongs to the bin below it
    size = len(inner) + 1

    def total(values: Tensor) -> np.ndarray:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, index, values).numpy()

    counts, hits, stated = total(torch.ones_like(c)), total(right), total(c)
    known = np.where(counts > 0, counts, np.nan)
    low, high = wilson(hits, counts)
    frame = pd.DataFrame(
        {
            "lower": edges[:-1].numpy(),
            "upper": edges[1:].numpy(),
            "count": counts.astype(int),
            "confidence": stated / known,
            "accuracy": hits / known,
            "accuracy_low": low,
            "accuracy_high": high,
        }
    )
    variance = total(c * (1 - c))
    chance = float(np.sqrt(2 / math.pi * variance).sum()) / n
    chance_sd = math.sqrt((1 - 2 / math.pi) * variance.sum()) / n
    return Reliability(frame, kind, bins, float(np.abs(total(right - c)).sum()) / n, chance, chance_sd)
