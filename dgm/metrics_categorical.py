"""How good predictions of a class are: categorical posterior predictives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from .errors import DataError
from .reliability import BINS, Kind, Reliability, reliability
from .score_means import score_means

__all__ = ["CategoricalPrediction"]


@dataclass(frozen=True, eq=False)
class CategoricalPrediction:
    r"""Predictive class probabilities, averaged over S posterior draws.

    .. math:: p_{nc} = \frac1S \sum_s \mathrm{softmax}(\mathrm{logits}_{sn})_c

    Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017; Lakshminarayanan,
    Pritzel, Blundell, "Simple and scalable predictive uncertainty estimation using deep ensembles", 2017.

    Args:
        logits: shape (S, N, C), or (S, N) for two classes with the logit of class 1; log-probabilities are logits too.
        y: class numbers 0 .. C-1, shape (N,), integers (or floats with integer values).

    Raises:
        DataError: shapes that do not fit, empty, NaN or +inf logits, classes outside 0 .. C-1.

    >>> prediction = CategoricalPrediction(logits=torch.zeros(5, 4, 3), y=torch.tensor([0, 1, 2, 0]))
    >>> prediction.probs.shape, prediction.accuracy()
    (torch.Size([4, 3]), 0.5)
    """

    logits: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        logits, y = self.logits.detach().double(), self.y.detach()
        if logits.dim() == 2:
            logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
        if logits.dim() != 3 or logits.numel() == 0 or logits.shape[2] < 2 or y.shape != logits.shape[1:2]:
            raise DataError(
                f"logits and y: expected shapes (S, N, C) or (S, N), and (N,), got {tuple(self.logits.shape)} and "
                f"{tuple(y.shape)}: put the posterior draws first, and give class numbers, not one-hot rows"
            )
        if logits.isnan().any() or (logits == math.inf).any() or (logits == -math.inf).all(dim=-1).any():
            raise DataError("logits: expected finite values (or -inf for impossible classes), got NaN or infinity")
        classes, whole = logits.shape[2], y.long()
        if (whole != y).any() or (whole < 0).any() or (whole >= classes).any():
            raise DataError(
                f"y: expected class numbers 0 to {classes - 1}, got values from {y.min().item()} to {y.max().item()}"
            )
        object.__setattr__(self, "logits", logits.log_softmax(dim=-1))
        object.__setattr__(self, "y", whole)

    @classmethod
    def from_probs(cls, probs: Tensor, y: Tensor) -> CategoricalPrediction:
        """From probabilities of shape (S, N, C) that sum to one over the classes.

        Raises:
            DataError: values outside [0, 1] or sums that are not 1 within 1e-3, and as for the class.

        >>> CategoricalPrediction.from_probs(torch.full((1, 2, 2), 0.5), torch.tensor([0, 1])).brier()
        0.5
        """
        valid = probs.dim() == 3 and bool((probs >= 0).all()) and bool(((probs.sum(-1) - 1).abs() <= 1e-3).all())
        if not valid:
            raise DataError(
                f"probs: expected shape (S, N, C), values from 0 to 1 that sum to 1 over the classes, got shape "
                f"{tuple(probs.shape)}: give logits to the class itself"
            )
        return cls(probs.double().log(), y)

    @property
    def probs(self) -> Tensor:
        """Predictive probabilities, shape (N, C)."""
        return self.logits.exp().mean(dim=0)

    def accuracy(self) -> float:
        """Share of the data whose most probable class is right; of equal probabilities the lowest class counts."""
        return (self.probs.argmax(dim=-1) == self.y).double().mean().item()

    def log_likelihoods(self) -> Tensor:
        r"""Log predictive probability of each datum's class, shape (N,), nats.

        .. math:: \log \frac1S \sum_s p(y_n \mid \mathrm{logits}_{sn})

        >>> CategoricalPrediction(torch.zeros(5, 4, 3), torch.tensor([0, 1, 2, 0])).log_likelihoods().shape
        torch.Size([4])
        """
        chosen = self.logits.gather(2, self.y.expand(len(self.logits), -1)[..., None])[..., 0]
        return torch.logsumexp(chosen, dim=0) - math.log(len(self.logits))

    def log_likelihood(self) -> float:
        """Mean of :meth:`log_likelihoods` over the data, nats a datum."""
        return self.log_likelihoods().mean().item()

    def brier(self) -> float:
        r"""Brier score summed over the classes, in [0, 2]; lower is better.

        .. math:: \frac1N \sum_n \sum_c (p_{nc} - 1[y_n = c])^2

        Reference: Brier, "Verification of forecasts expressed in terms of probability", 1950. (The binary score that
        counts one class only is half of it.)

        >>> CategoricalPrediction(torch.zeros(1, 2), torch.tensor([0, 1])).brier()
        0.5
        """
        return self._brier().mean().item()

    def _brier(self) -> Tensor:
        one_hot = torch.nn.functional.one_hot(self.y, self.logits.shape[2])
        return (self.probs - one_hot).square().sum(dim=-1)

    def reliability(self, bins: int = BINS, kind: Kind = "equal-width") -> Reliability:
        """Confidence against accuracy, bin by bin, with counts and Wilson's intervals: a reliability diagram.

        Args, raises: as for :func:`dgm.reliability.reliability`.

        >>> CategoricalPrediction(torch.zeros(1, 2), torch.tensor([0, 1])).reliability().name
        'ECE, 15 equal-width bins'
        """
        confidence, predicted = self.probs.max(dim=-1)
        return reliability(confidence, predicted == self.y, bins, kind)

    def expected_calibration_error(self, bins: int = BINS, kind: Kind = "equal-width") -> float:
        r"""Distance between confidence and accuracy over bins of the confidence, in [0, 1].

        .. math:: \sum_b \frac{|B_b|}{N} |\mathrm{acc}(B_b) - \mathrm{conf}(B_b)|, \qquad
                  B_b = \{n : \max_c p_{nc} \in ((b-1)/\mathrm{bins},\ b/\mathrm{bins}]\}

        Biased upwards, most of all for small bins: compare at equal N and bins only, and with the `chance` of
        :meth:`reliability`, which calibrated predictions of the same confidence would have.

        Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017.

        Args:
            bins: number of bins of [0, 1], at least 1.
            kind: "equal-width", or "equal-mass": each bin holds as many data, as far as ties allow.

        Raises:
            OptionError: bins below 1, or another kind.

        >>> round(CategoricalPrediction.from_probs(
        ...     torch.tensor([[[0.8, 0.2], [0.8, 0.2]]]), torch.tensor([0, 0])).expected_calibration_error(), 6)
        0.2
        """
        return self.reliability(bins, kind).ece

    def predictive_entropy(self) -> Tensor:
        r"""Entropy of the predictive distribution of each datum, shape (N,), nats, in [0, log C].

        .. math:: -\sum_c p_{nc} \log p_{nc}

        >>> CategoricalPrediction(torch.zeros(1, 2), torch.tensor([0, 1])).predictive_entropy().shape
        torch.Size([2])
        """
        return torch.special.entr(self.probs).sum(dim=-1)

    def mutual_information(self) -> Tensor:
        r"""What the class of each datum would tell about the weights, shape (N,), nats: disagreement of the draws.

        .. math:: H\Big[\tfrac1S \sum_s p_{sn}\Big] - \frac1S \sum_s H[p_{sn}] \ge 0

        Reference: Houlsby, Huszár, Ghahramani, Lengyel, "Bayesian active learning for classification and preference
        learning", 2011.

        >>> CategoricalPrediction(torch.zeros(3, 2), torch.tensor([0, 1])).mutual_information().sum().item()
        0.0
        """
        expected = torch.special.entr(self.logits.exp()).sum(dim=-1).mean(dim=0)
        return (self.predictive_entropy() - expected).clamp(min=0.0)  # concavity, lost to rounding only

    @cached_property
    def _frame(self) -> pd.DataFrame:
        confidence, predicted = self.probs.max(dim=-1)
        columns = {
            "log_likelihood": self.log_likelihoods(),
            "accuracy": (predicted == self.y).double(),
            "brier": self._brier(),
            "confidence": confidence,
            "entropy": self.predictive_entropy(),
            "mutual_information": self.mutual_information(),
        }
        return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})

    def scores(self) -> pd.DataFrame:
        """One row for each datum: what the means of :meth:`summary` are means of.

        Columns: log_likelihood (nats), accuracy (1 right, 0 wrong), brier, confidence (the largest probability),
        entropy and mutual_information (nats).

        >>> CategoricalPrediction(torch.zeros(3, 2), torch.tensor([0, 1])).scores().shape
        (2, 6)
        """
        return self._frame.copy()

    def summary(self, errors: bool = False) -> dict[str, float]:
        """The scores of one table row: means of :meth:`scores`, and the calibration error, 15 equal-width bins.

        Args:
            errors: with NAME_se, the standard error of each mean over the data (NaN for N = 1, or where the mean is
                infinite), and calibration_chance, the calibration error that calibrated predictions would have.

        >>> sorted(CategoricalPrediction(torch.zeros(3, 2), torch.tensor([0, 1])).summary())[:3]
        ['accuracy', 'brier', 'entropy']
        """
        names = ("accuracy", "log_likelihood", "brier", "entropy", "mutual_information")
        out = score_means(self._frame, names, errors)
        found = self.reliability()
        out["expected_calibration_error"] = found.ece
        if errors:
            out["calibration_chance"] = found.chance
        return out
