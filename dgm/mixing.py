"""How well the chains of a sampler were mixed."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

__all__ = ["diagnose"]


def diagnose(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """R-hat (rank-normalised, split) and bulk effective sample size of each coordinate, `(d,)`.

    Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding, and localization: an improved R-hat",
    2021. Both are NaN for a coordinate that never moved.

    Args:
        drawn: (chains, draws, d), at least 4 draws.

    >>> rhat, ess = diagnose(torch.randn(4, 100, 2))
    >>> rhat.shape, ess.shape
    (torch.Size([2]), torch.Size([2]))
    """
    from arviz_stats.base import array_stats  # a second to import, and only here

    values = np.moveaxis(drawn.double().cpu().numpy(), -1, 0)  # (d, chains, draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a coordinate that never moved
        found = [
            array_stats.rhat(values, chain_axis=1, draw_axis=2),
            array_stats.ess(values, chain_axis=1, draw_axis=2),
        ]
    rhat, ess = (torch.as_tensor(np.asarray(item, dtype=float)) for item in found)
    return rhat, ess
