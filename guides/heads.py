"""Heads: where a family's parameters come from, free numbers or maps of the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

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

        h = A z + C c + b,    theta = W_n relu(... W_1 relu(h) + b_1 ...) + b_n

    `forward(context)` returns the function z -> theta. It maps the context once, for any number of draws z of each
    datum, and holds the parameters it was made with: a density keeps them also where they are handed in from outside
    (`torch.func.functional_call`) and it is evaluated later.

    Args:
        widths: features of z, one or more hidden layers, and the output.
        context: features of the context; 0 for none.
        masks: for each layer which input (column) an output (row) may see; by default all.

    >>> net = Conditioner([3, 8, 2], context=5)
    >>> net(torch.zeros(7, 5))(torch.zeros(10, 7, 3)).shape
    torch.Size([10, 7, 2])
    """

    def __init__(self, widths: Sequence[int], context: int = 0, masks: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(widths))
        self.context = nn.Linear(context, widths[1], bias=False) if context > 0 else None
        for i, mask in enumerate(masks or []):
            self.register_buffer(f"mask_{i}", mask, persistent=False)
        self.masked = masks is not None
        for p in self.layers[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, context: Tensor | None) -> Callable[[Tensor], Tensor]:
        layers = cast(Iterable[nn.Linear], self.layers)
        weights: list[Tensor] = [layer.weight for layer in layers]
        if self.masked:
            weights = [w * getattr(self, f"mask_{i}") for i, w in enumerate(weights)]
        told = self.context(context) if self.context is not None else None
        return partial(_network, weights, [layer.bias for layer in layers], told)


def _network(weights: list[Tensor], biases: list[Tensor], told: Tensor | None, z: Tensor) -> Tensor:
    h = F.linear(z, weights[0], biases[0])
    if told is not None:
        h = h + told
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        h = F.linear(F.relu(h), weight, bias)
    return h
