"""What predictive uncertainty is worth: its parts, what abstaining buys, and whether it knows foreign data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .detection import Detection, detection, finite_values
from .errors import DataError, OptionError
from .metrics_categorical import CategoricalPrediction
from .metrics_gaussian import GaussianPrediction
from .reliability import wilson

__all__ = ["Detection", "RiskCoverage", "decompose", "detection", "ood", "risk_coverage", "selective"]

Prediction = GaussianPrediction | CategoricalPrediction
Measure = Literal["confidence", "total", "epistemic"]
RESAMPLES = 200


def decompose(prediction: Prediction) -> pd.DataFrame:
    r"""Predictive uncertainty of each datum and its two parts: columns total = aleatoric + epistemic.

    .. math:: H\big[\bar p_n\big] = \tfrac1S \sum_s H[p_{sn}] + I_n, \qquad
              \mathrm{Var}[y_n] = \tfrac1S \sum_s \sigma_{sn}^2 + \tfrac1S \sum_s (\mu_{sn} - \bar\mu_n)^2

    For classes entropies in nats (the epistemic part is the mutual information of class and weights), for a normal
    target variances in squared units of y, by the law of total variance.

    Reference: Houlsby, Huszár, Ghahramani, Lengyel, "Bayesian active learning for classification and preference
    learning", 2011; Depeweg, Hernández-Lobato, Doshi-Velez, Udluft, "Decomposition of uncertainty in Bayesian deep
    learning for efficient and risk-sensitive learning", 2018.

    Raises:
        DataError: the prediction is neither Gaussian nor categorical.

    >>> parts = decompose(GaussianPrediction(torch.tensor([[-1.0], [1.0]]), torch.tensor(2.0), torch.zeros(1)))
    >>> parts.iloc[0].tolist()
    [5.0, 4.0, 1.0]
    """
    if isinstance(prediction, CategoricalPrediction):
        total, epistemic = prediction.predictive_entropy(), prediction.mutual_information()
        aleatoric = total - epistemic
    elif isinstance(prediction, GaussianPrediction):
        units = prediction.y_std**2
        aleatoric = units * prediction.scale.square().mean(dim=0)
        epistemic = units * prediction.loc.var(dim=0, correction=0)
        total = aleatoric + epistemic
    else:
        raise DataError(
            f"prediction is a {type(prediction).__name__}, expected a GaussianPrediction or a CategoricalPrediction"
        )
    epistemic = torch.where(epistemic < 1e-12 * total, 0.0, epistemic)  # draws that agree differ by rounding alone
    parts = {"total": total, "aleatoric": aleatoric, "epistemic": epistemic}
    return pd.DataFrame({name: value.cpu().numpy() for name, value in parts.items()})


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    r"""Risk of the most certain part of the data, for every size of that part.

    Attributes:
        frame: one row for each k = 1..N: coverage k/N, risk (mean loss of the k most certain data), threshold (the
            uncertainty of the k-th).
        aurc: area under the curve, :math:`\frac1N \sum_k \mathrm{risk}_k`. aurc_se: by the bootstrap over data.
        excess: aurc above that of the oracle that orders by the loss itself; 0 is best. excess_se: as aurc_se.
    """

    frame: pd.DataFrame
    aurc: float
    aurc_se: float
    excess: float
    excess_se: float

    def at(self, coverage: float) -> float:
        """Risk of the ceil(coverage N) most certain data.

        Raises:
            OptionError: coverage outside (0, 1].
        """
        return float(self.frame["risk"].iloc[self._kept(coverage) - 1])

    def accuracy_at(self, coverage: float) -> tuple[float, float, float]:
        """Accuracy of those that are kept and its 95 % interval (Wilson, given the threshold): for losses 0 and 1.

        Raises:
            OptionError: coverage outside (0, 1]. DataError: the losses are not those of a classification.
        """
        kept, right = self._kept(coverage), 1.0 - self.at(coverage)
        if not 0.0 <= right <= 1.0:
            raise DataError("an accuracy needs losses of 0 and 1: for other losses ask at(coverage)")
        low, high = wilson(np.array([right * kept]), np.array([kept]))
        return right, float(low[0]), float(high[0])

    def _kept(self, coverage: float) -> int:
        if not 0.0 < coverage <= 1.0:
            raise OptionError(f"coverage: expected a number in (0, 1], got {coverage}: 0.8 answers 80 % of the data")
        return max(1, math.ceil(coverage * len(self.frame) - 1e-9))

    def __repr__(self) -> str:
        return f"AURC {self.aurc:.4f} ± {self.aurc_se:.4f}, {self.excess:.4f} ± {self.excess_se:.4f} above the oracle"


def risk_coverage(uncertainty: Tensor, loss: Tensor, seed: int = 0) -> RiskCoverage:
    r"""What abstaining on the most uncertain data buys.

    .. math:: \mathrm{risk}_k = \tfrac1k \sum_{i \le k} \ell_{(i)}, \qquad u_{(1)} \le \dots \le u_{(N)}

    Data of equal uncertainty stand in every order at once: each counts with the mean loss of its group, so that the
    order of the data does not matter.

    Reference: Geifman, El-Yaniv, "Selective classification for deep neural networks", 2017; Geifman, Uziel, El-Yaniv,
    "Bias-reduced uncertainty estimation for deep neural classifiers", 2019, for the excess.

    Args:
        uncertainty: larger is less certain, shape (N,).
        loss: >= 0, e.g. 0 and 1, or squared errors, shape (N,).
        seed: of the bootstrap.

    Raises:
        DataError: shapes that differ, no data, NaN or infinite values.

    >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.0, 0.0, 1.0]))
    >>> curve.at(2 / 3), curve.excess
    (0.0, 0.0)
    """
    if uncertainty.dim() != 1 or uncertainty.shape != loss.shape or len(loss) == 0:
        raise DataError(
            f"uncertainty and loss: expected shape (N,) each, got {tuple(uncertainty.shape)} and {tuple(loss.shape)}"
        )
    u, v = finite_values(uncertainty, "uncertainty"), finite_values(loss, "loss")
    risk, threshold = _curve(u, v)
    rng, n = np.random.default_rng(seed), len(u)
    again = np.array([_areas(u[k], v[k]) for k in (rng.integers(n, size=n) for _ in range(RESAMPLES if n > 1 else 0))])
    errors = again.std(axis=0, ddof=1) if n > 1 else np.full(2, math.nan)
    aurc, excess = _areas(u, v)
    frame = pd.DataFrame({"coverage": np.arange(1, n + 1) / n, "risk": risk, "threshold": threshold})
    return RiskCoverage(frame, aurc, float(errors[0]), excess, float(errors[1]))


def selective(prediction: Prediction, by: Measure | None = None, seed: int = 0) -> RiskCoverage:
    """Risk and coverage of a prediction: errors (0, 1) of classes, squared errors in units of y of a normal target.

    Args:
        prediction: categorical or Gaussian.
        by: what it abstains by: "confidence" (1 - the largest probability; classes only, and their default), "total"
            or "epistemic", as :func:`decompose` has them (the default for a normal target is "total").
        seed: of the bootstrap.

    Raises:
        OptionError: another measure, or confidence of a normal target.

    >>> prediction = CategoricalPrediction(torch.tensor([[3.0, -2.0, 0.1]]), torch.tensor([1, 0, 0]))
    >>> selective(prediction).accuracy_at(0.6)[0]
    1.0
    """
    if by is not None and by not in get_args(Measure):
        raise OptionError(f"by is {by!r}, expected one of {list(get_args(Measure))}")
    scores = prediction.scores()
    classes = isinstance(prediction, CategoricalPrediction)
    by = by or ("confidence" if classes else "total")
    if by == "confidence" and not classes:
        raise OptionError("by is 'confidence', which only classes have: take 'total' or 'epistemic'")
    uncertainty = 1.0 - scores["confidence"] if by == "confidence" else decompose(prediction)[by]
    loss = 1.0 - scores["accuracy"] if classes else scores["squared_error"]
    return risk_coverage(torch.tensor(uncertainty.tolist()), torch.tensor(loss.tolist()), seed)


def ood(own: Prediction, foreign: Prediction) -> dict[str, Detection]:
    """Does the uncertainty of a prediction know foreign data? By the total and by the epistemic part.

    Args:
        own: predictions for held-out data of the training's kind. foreign: for data of another kind, by the same pair;
            their targets are not looked at, so any will do.

    Returns:
        {"predictive_entropy", "mutual_information"} for classes, {"total_variance", "epistemic_variance"} for a normal
        target: a :class:`Detection` each.

    Raises:
        DataError: predictions of two kinds, or with other classes or units.

    >>> y = torch.zeros(3, dtype=torch.long)
    >>> sure, unsure = CategoricalPrediction(torch.full((1, 3), 9.0), y), CategoricalPrediction(torch.zeros(1, 3), y)
    >>> ood(sure, unsure)["predictive_entropy"].auroc
    1.0
    """
    if type(own) is not type(foreign):
        raise DataError(f"own and foreign: expected one kind, got {type(own).__name__} and {type(foreign).__name__}")
    names = ("total_variance", "epistemic_variance")
    if isinstance(own, CategoricalPrediction) and isinstance(foreign, CategoricalPrediction):
        names, (k, other) = ("predictive_entropy", "mutual_information"), (own.logits.shape[2], foreign.logits.shape[2])
        if k != other:
            raise DataError(f"own and foreign: expected predictions of one model, got {k} and {other} classes")
    elif isinstance(own, GaussianPrediction) and isinstance(foreign, GaussianPrediction) and own.y_std != foreign.y_std:
        raise DataError(f"own and foreign: expected the same units, got y_std {own.y_std:g} and {foreign.y_std:g}")
    parts = decompose(own), decompose(foreign)
    return {
        name: detection(*(torch.tensor(part[column].tolist()) for part in parts))
        for name, column in zip(names, ("total", "epistemic"), strict=True)
    }


def _curve(u: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Risk and threshold of the k most certain data; equal uncertainties share the mean of their losses."""
    order = np.argsort(u, kind="stable")
    _, group, size = np.unique(u, return_inverse=True, return_counts=True)
    shared = np.bincount(group, loss)[group] / size[group]
    return np.cumsum(shared[order]) / np.arange(1, len(u) + 1), u[order]


def _areas(u: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    area = float(_curve(u, loss)[0].mean())
    return area, area - float(_curve(loss, loss)[0].mean())
