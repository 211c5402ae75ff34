"""Diagonal normal: independent normals, the mean-field family."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from .family import LocationScale

__all__ = ["DiagonalNormal"]


class DiagonalNormal(LocationScale):
    """Independent normal distributions.

        q(z | c) = prod_i N(z_i; loc_i(c), exp(log_scale_i(c))^2)

    D. P. Kingma, M. Welling: Auto-Encoding Variational Bayes, 2014.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, or scale <= 0.

    >>> import torch
    >>> DiagonalNormal(3, context=5)(torch.zeros(7, 5)).batch_shape
    torch.Size([7])
    """

    def forward(self, context: Tensor | None = None) -> dist.Independent:
        loc, log_scale = self.loc_and_log_scale(context)
        return dist.Independent(dist.Normal(loc, log_scale.exp(), validate_args=False), 1, validate_args=False)
