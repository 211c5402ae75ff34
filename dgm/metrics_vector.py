"""How good predictions of several numbers are: the energy score, and Gaussian posterior predictives of vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from pyro.ops.stats import energy_score_empirical
from torch import Tensor

from .errors import DataError, OptionError
from .mixtures import check_normals
from .score_means import score_means

__all__ = ["VectorPrediction", "energy_score"]

VALUES = 2**22  # distances between draws that are held at once

# By differences: the quicker product form loses the small distances to rounding.
_distance: Any = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


def energy_score(draws: Tensor, y: Tensor, fair: bool = True) -> Tensor:
    r"""Energy score of each datum, shape (N,), in the units of y; lower is better, and the CRPS where D = 1.

    .. math:: \frac1S \sum_s \|x_s - y\| - \frac{1}{2 S (S - 1)} \sum_{s,t} \|x_s - x_t\|

    an unbiased estimate, for draws x of a predictive density, of that density's own score. The score of the S draws as
    they stand (``fair=False``) has S^2 for S (S - 1) and is larger: it punishes few draws.

    Reference: Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, equation 22; Ferro,
    "Fair scores for ensemble forecasts", 2014.

    Args:
        draws: predictive draws, noise included, shape (S, N, D).
        y: targets, shape (N, D).
        fair: whether to estimate the density's score; needs S >= 2.

    Raises:
        DataError: shapes that do not fit, no data, NaN or infinite values, or one draw for a fair score.

    >>> energy_score(torch.zeros(4, 3, 2), torch.tensor([[3.0, 4.0]]).expand(3, 2)).tolist()
    [5.0, 5.0, 5.0]
    """
    if draws.dim() != 3 or draws.numel() == 0 or draws.shape[1:] != y.shape:
        raise DataError(
            f"draws and y: expected shapes (S, N, D) and (N, D), got {tuple(draws.shape)} and {tuple(y.shape)}: "
            "put the draws first"
        )
    for name, value in (("draws", draws), ("y", y)):
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise DataError(f"{name}: expected finite values, got {bad} of {value.numel()} NaN or infinite")
    s = len(draws)
    if fair and s < 2:
        raise DataError("draws: expected at least 2 for a fair score, got 1: give more, or fair=False")
    parts = []
    rows = max(1, VALUES // s**2)
    for x, target in zip(draws.detach().double().split(rows, dim=1), y.detach().double().split(rows), strict=True):
        score = energy_score_empirical(x.transpose(0, 1), target, cdist=_distance)
        if fair:  # the second term, which the score holds with S^2 for S (S - 1)
            first = (x - target).norm(dim=-1).mean(dim=0)
            score = score - (first - score) / (s - 1)
        parts.append(score)
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class VectorPrediction:
    r"""Predictive density of each datum as an equal mixture of S diagonal Gaussians on R^D, one for each draw.

    .. math:: p(y_n) = \frac1S \sum_s \prod_d \mathcal N(y_{nd};\ \mu_{snd}, \sigma_{snd}^2)

    Args:
        loc: means, shape (S, N, D), standardised; S = 1 for a point estimate.
        scale: standard deviations > 0, of a shape that broadcasts to (S, N, D), standardised.
        y: targets, shape (N, D), standardised.
        y_std: what y was divided by: one number > 0, or one for each dimension, (D,).

    Raises:
        DataError: shapes that do not fit, empty or not finite values, a scale that is not positive.
        OptionError: y_std that is not positive, or of another length.

    >>> VectorPrediction(torch.zeros(5, 3, 2), torch.tensor(1.0), torch.zeros(3, 2)).log_likelihoods().shape
    torch.Size([3])
    """

    loc: Tensor
    scale: Tensor
    y: Tensor
    y_std: float | Tensor = 1.0

    def __post_init__(self) -> None:
        loc, scale, y = (t.detach().double() for t in (self.loc, torch.as_tensor(self.scale), self.y))
        if loc.dim() != 3 or loc.numel() == 0 or y.shape != loc.shape[1:]:
            raise DataError(
                f"loc and y: expected shapes (S, N, D) and (N, D), got {tuple(loc.shape)} and {tuple(y.shape)}: "
                "put the posterior draws first"
            )
        try:
            scale = scale.expand(loc.shape)
        except RuntimeError as error:
            raise DataError(
                f"scale: expected a shape that broadcasts to {tuple(loc.shape)}, got {tuple(scale.shape)}"
            ) from error
        check_normals(loc, scale, y)
        y_std = torch.as_tensor(self.y_std, dtype=torch.float64, device=loc.device)
        if y_std.shape not in ((), (loc.shape[2],)) or not ((y_std > 0) & y_std.isfinite()).all():
            raise OptionError(f"y_std: expected a positive number, or {loc.shape[2]} of them, got {self.y_std}")
        for name, value in (("loc", loc), ("scale", scale), ("y", y), ("y_std", y_std.expand(loc.shape[2]))):
            object.__setattr__(self, name, value)

    def log_likelihoods(self) -> Tensor:
        """Log predictive density of each datum, all dimensions jointly, shape (N,), nats, for y in its own units."""
        log_density = torch.distributions.Normal(self.loc, self.scale, validate_args=False).log_prob(self.y).sum(-1)
        units = torch.as_tensor(self.y_std).log().sum()
        return torch.logsumexp(log_density, dim=0) - math.log(len(self.loc)) - units

    def draws(self, num: int = 200, seed: int = 0) -> Tensor:
        """Predictive draws in the units of y, noise included, shape (num, N, D): evenly from the S components.

        Raises:
            OptionError: num below 1.
        """
        if num < 1:
            raise OptionError(f"num: expected at least 1 draw, got {num}")
        s = len(self.loc)
        keep = torch.linspace(0, s - 1, num, dtype=torch.float64).round().long()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num, *self.y.shape, generator=generator, dtype=torch.float64).to(self.loc.device)
        return self.y_std * (self.loc[keep] + self.scale[keep] * noise)

    @cached_property
    def _frame(self) -> pd.DataFrame:
        error = torch.as_tensor(self.y_std) * (self.loc.mean(dim=0) - self.y)
        columns = {
            "log_likelihood": self.log_likelihoods(),
            "squared_error": error.square().mean(dim=-1),
            "energy_score": energy_score(self.draws(), self.y_std * self.y),
        }
        return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})

    def scores(self) -> pd.DataFrame:
        """One row for each datum, in the units of y: log_likelihood, squared_error (mean over d), energy_score.

        >>> VectorPrediction(torch.zeros(5, 3, 2), torch.tensor(1.0), torch.zeros(3, 2)).scores().shape
        (3, 3)
        """
        return self._frame.copy()

    def summary(self, errors: bool = False) -> dict[str, float]:
        """The scores of one table row: rmse (over data and dimensions), log_likelihood, energy_score.

        Args:
            errors: with NAME_se, the standard error over the data; that of the rmse by the delta method.

        >>> sorted(VectorPrediction(torch.zeros(5, 3, 2), torch.tensor(1.0), torch.zeros(3, 2)).summary())
        ['energy_score', 'log_likelihood', 'rmse']
        """
        return score_means(self._frame, ["squared_error", "log_likelihood", "energy_score"], errors)
