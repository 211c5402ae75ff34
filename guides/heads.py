"""Heads: where a family's parameters come from, free numbers or maps of the context."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """One vector of family parameters: learned as it stands, or linear in the context.

        theta = b  (context = 0),        theta(c) = W c + b  (context > 0)

    Args:
        size: length of the vector, at least 1.
        context: features of the context; 0 for none.
        start: every entry of b at the start.
        gain: W starts uniform on gain * [-1, 1] / sqrt(context), torch's default at gain 1; 0 starts at a constant,
            whatever the context is.

    >>> Head(3)(None).shape, Head(3, context=5)(torch.zeros(7, 5)).shape
    (torch.Size([3]), torch.Size([7, 3]))
    """

    def __init__(self, size: int, context: int = 0, start: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((size,), float(start)))
        if context > 0:
            bound = gain / math.sqrt(context)
            self.weight = nn.Parameter(torch.empty(size, context).uniform_(-bound, bound))
        else:
            self.register_parameter("weight", None)

    def forward(self, context: Tensor | None) -> Tensor:
        if self.weight is None or context is None:
            return self.bias
        return F.linear(context, self.weight, self.bias)


class Conditioner(nn.Module):
    """A network of (z, context) whose output is zero at the start, so that the flow step it steers is the identity.

        h = A z + C c + b,    theta = W_n relu(... W_1 relu(h))

    `embed` maps the context once; `forward` then serves any number of draws z of each datum at the price of z alone.

    Args:
        layers: linear maps (masked ones for autoregressive steps), at least two; the last is set to zero.
        context: features of the context; 0 for none.

    >>> net = Conditioner([nn.Linear(3, 8), nn.Linear(8, 2)], context=5)
    >>> net(torch.zeros(10, 7, 3), net.embed(torch.zeros(7, 5))).shape
    torch.Size([10, 7, 2])
    """

    def __init__(self, layers: Sequence[nn.Linear], context: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.context = nn.Linear(context, layers[0].out_features, bias=False) if context > 0 else None
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)

    def embed(self, context: Tensor | None) -> Tensor | None:
        """The context's share of the first hidden layer, shape (..., hidden)."""
        return None if self.context is None else self.context(context)

    def forward(self, z: Tensor, embedded: Tensor | None) -> Tensor:
        first, *rest = self.layers
        h = first(z)
        if embedded is not None:
            h = h + embedded
        for layer in rest:
            h = layer(F.relu(h))
        return h
