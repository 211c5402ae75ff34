"""Low-rank normal: a diagonal plus a few directions of correlation."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from dgm.errors import OptionError

from .family import LocationScale
from .heads import Head

__all__ = ["LowRankNormal"]


class LowRankNormal(LocationScale):
    """Normal distribution whose covariance is a diagonal plus a matrix of low rank.

        q(z | c) = N(loc, S (I + W W^T) S),    S = diag(exp(log_scale)),    W of shape (d, rank)

    V. M.-H. Ong, D. J. Nott, M. S. Smith: Gaussian variational approximation with a factor covariance structure, 2018.

    W starts at random entries of standard deviation 0.1 / sqrt(rank), about one per cent of the variance: at W = 0 its
    gradient is zero in the mean and the family would stay diagonal. With a context these are the biases, and the
    weights start at a tenth of torch's default.

    Args:
        features: the dimension d, at least 1. With one feature there is nothing to correlate: the diagonal normal.
        context: features of the context; 0 for none.
        rank: columns of W, 1 <= rank < features; by default the rounded square root of features.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, rank < 1, or rank >= features.

    >>> LowRankNormal(5, rank=2)().rsample((4,)).shape
    torch.Size([4, 5])
    """

    def __init__(self, features: int, context: int = 0, rank: int | None = None, scale: float | None = None) -> None:
        super().__init__(features, context, scale)
        if rank is not None and (not isinstance(rank, int) or not 1 <= rank < features):
            raise OptionError(
                f"LowRankNormal: rank must be at least 1 and less than features = {features}, got {rank}; "
                f"FullNormal({features}) is the family of every covariance, DiagonalNormal({features}) that of rank 0"
            )
        self.rank = min(max(1, round(math.sqrt(features))), features - 1) if rank is None else rank
        if self.rank > 0:
            self.factor = Head(features * self.rank, context, gain=0.1)
            with torch.no_grad():
                self.factor.bias.normal_(0.0, 0.1 / math.sqrt(self.rank))

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        loc, log_scale = self.loc_and_log_scale(context)
        scale = log_scale.exp()
        if self.rank == 0:
            return dist.Independent(dist.Normal(loc, scale, validate_args=False), 1, validate_args=False)
        factor = self.factor(context).unflatten(-1, (self.features, self.rank))
        return dist.LowRankMultivariateNormal(loc, scale.unsqueeze(-1) * factor, scale.square(), validate_args=False)
