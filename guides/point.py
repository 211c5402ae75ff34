"""Point: a single value and no density, maximum a posteriori (or amortized MAP)."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from .family import Family
from .heads import Head

__all__ = ["Point"]


class Point(Family):
    """All mass at one value: training it maximises log p(x, z).

        q(z | c) = delta(z - loc(c))

    It has no density on R^d (`has_density` is False): log q is 0 at the value, and its objective is no bound on the
    evidence.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.

    Raises:
        OptionError: features < 1 or context < 0.

    >>> Point(3)().rsample((5,)).shape
    torch.Size([5, 3])
    """

    has_density = False

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__(features, context)
        self.loc = Head(features, context)

    @torch.no_grad()
    def initialise(self, loc: Tensor, scale: float | Tensor | None = None) -> None:
        """Start at loc, (features,); a point has no scale, the argument is there to be ignored."""
        self.loc.bias.copy_(loc)

    def forward(self, context: Tensor | None = None) -> dist.Delta:
        self.check(context)
        return dist.Delta(self.loc(context), event_dim=1, validate_args=False)
