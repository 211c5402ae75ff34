"""Telling foreign data from own ones by a score: areas under curves, with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import rankdata
from torch import Tensor

from .errors import DataError, OptionError

__all__ = ["Detection", "detection", "finite_values"]


@dataclass(frozen=True)
class Detection:
    """How well a score tells two sets of data apart; foreign data are the positives.

    Attributes:
        auroc: probability that a foreign datum scores above an own one (ties count half). auroc_se: DeLong's.
        aupr: average precision; base: the share of foreign data, which chance would reach.
        fpr95: share of the own data that is flagged where the threshold finds 95 % of the foreign.
        n_in, n_out: numbers of own and of foreign data.
    """

    auroc: float
    auroc_se: float
    aupr: float
    base: float
    fpr95: float
    n_in: int
    n_out: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Interval of the AUROC that stays inside [0, 1] and has a width at 0 and at 1, where DeLong's error is 0.

        .. math:: |\hat\theta - \theta| \le z \sqrt{V(\theta)}, \quad
            V = \frac{\theta (1 - \theta)}{m n} \Big(1 + r \tfrac{1 - \theta}{2 - \theta} + r \tfrac{\theta}{1 +
            \theta}\Big), \quad r = \tfrac{m + n}{2} - 1

        Reference: Hanley, McNeil, "The meaning and use of the area under a receiver operating characteristic curve",
        1982; Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", 2006.

        Raises:
            OptionError: level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise OptionError(f"level: expected a number in (0, 1), got {level}: 0.95 is usual")
        z, r = float(ndtri(0.5 + level / 2)), (self.n_in + self.n_out) / 2 - 1

        def miss(t: float) -> float:
            v = t * (1 - t) / (self.n_in * self.n_out) * (1 + r * (1 - t) / (2 - t) + r * t / (1 + t))
            return (self.auroc - t) ** 2 - z**2 * v

        at = self.auroc
        low = brentq(miss, 0.0, min(at, 1 - 1e-12)) if at > 0 else 0.0
        high = brentq(miss, max(at, 1e-12), 1.0) if at < 1 else 1.0
        return float(low), float(high)

    def __repr__(self) -> str:
        return (
            f"AUROC {self.auroc:.4f} ± {self.auroc_se:.4f}, AUPR {self.aupr:.4f} (chance {self.base:.3g}), "
            f"FPR at 95 % found {self.fpr95:.4f}, {self.n_in} own and {self.n_out} foreign data"
        )


def detection(own: Tensor, foreign: Tensor) -> Detection:
    r"""Area under the receiver operating characteristic of a score, its error, precision, and false alarms.

    .. math:: \mathrm{AUROC} = P(s_\mathrm{foreign} > s_\mathrm{own}) + \tfrac12 P(s_\mathrm{foreign} =
              s_\mathrm{own}), \qquad \mathrm{se}^2 = \frac{\mathrm{Var}_i[V_i]}{m} + \frac{\mathrm{Var}_j[V_j]}{n}

    with V the share of the other set that each datum is on the right side of.

    Reference: DeLong, DeLong, Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves", 1988; Hendrycks, Gimpel, "A baseline for detecting misclassified and out-of-distribution
    examples in neural networks", 2017.

    Args:
        own: scores of data like those of the training, shape (N,). foreign: of others, (M,). Larger: more foreign.

    Raises:
        DataError: one of the two is empty or not a vector, NaN or infinite values.

    >>> import torch
    >>> detection(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.5, 3.0])).auroc
    0.8333333333333334
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    for name, value in (("own", own), ("foreign", foreign)):
        if value.dim() != 1 or len(value) == 0:
            raise DataError(
                f"{name}: expected scores of shape (N,), N >= 1, got {tuple(value.shape)}: own and foreign data are "
                "both needed to tell them apart"
            )
    x, y = finite_values(foreign, "foreign"), finite_values(own, "own")
    both, is_foreign = np.concatenate([x, y]), np.concatenate([np.ones(len(x)), np.zeros(len(y))])
    ranks = rankdata(both)
    parts = [(ranks[: len(x)] - rankdata(x)) / len(y), (ranks[len(x) :] - rankdata(y)) / len(x)]
    variance = sum(v.var(ddof=1) / len(v) if len(v) > 1 else math.nan for v in parts)
    false, found, _ = roc_curve(is_foreign, both)
    return Detection(
        auroc=float(roc_auc_score(is_foreign, both)),
        auroc_se=math.sqrt(variance),
        aupr=float(average_precision_score(is_foreign, both)),
        base=len(x) / len(both),
        fpr95=float(false[found >= 0.95 - 1e-12].min()),
        n_in=len(y),
        n_out=len(x),
    )


def finite_values(values: Tensor, name: str) -> np.ndarray:
    """As float64 numbers, or a DataError that counts those that are none."""
    out = values.detach().double().cpu().numpy()
    bad = int((~np.isfinite(out)).sum())
    if bad:
        raise DataError(f"{name}: expected finite values, got {bad} of {len(out)} NaN or infinite")
    return out
