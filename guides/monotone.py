"""Monotone maps x -> x + gain tanh(slope x + shift): their constraint, and their inverse with its gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["above_minus_one", "solve"]

FLOOR = 1e-3  # the least slope that a map may have: an inverse in float32 needs one
BISECTIONS = 30
NEWTON = 4


def above_minus_one(x: Tensor) -> Tensor:
    """A smooth increasing map of R onto (-0.999, inf) that keeps 0: the product gain * slope of a monotone map.

        m(x) = 0.999 (softplus(x + log(e - 1)) - 1)

    Without the shift and the floor this is the constraint of D. J. Rezende, S. Mohamed: Variational Inference with
    Normalizing Flows, 2015; the shift makes 0 the identity map.

    >>> above_minus_one(torch.zeros(2)).abs().max() < 1e-6
    tensor(True)
    """
    return (1 - FLOOR) * (F.softplus(x + math.log(math.e - 1)) - 1)


def solve(value: Tensor, gain: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """The x with x + gain tanh(slope x + shift) = value, elementwise; first derivatives are right in all arguments.

    A fixed number of bisections of [value - |gain|, value + |gain|], then Newton steps that stay in the bracket: it
    traces. The last step alone carries gradients: dx = (dvalue - d(gain tanh)) / (1 + gain slope tanh').

    Args:
        value, gain, slope, shift: shapes that broadcast; gain * slope > -1.

    >>> x = solve(torch.ones(3), torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.5))
    >>> torch.allclose(x + 2 * torch.tanh(x + 0.5), torch.ones(3))
    True
    """
    target, c, k, b = value.detach(), gain.detach(), slope.detach(), shift.detach()
    low, high = target - c.abs(), target + c.abs()
    for _ in range(BISECTIONS):
        x = 0.5 * (low + high)
        above = x + c * torch.tanh(k * x + b) > target
        low, high = torch.where(above, low, x), torch.where(above, x, high)
    x = 0.5 * (low + high)
    for _ in range(NEWTON):
        t = torch.tanh(k * x + b)
        step = (x + c * t - target) / (1 + c * k * (1 - t.square()))
        x = torch.minimum(torch.maximum(x - step, low), high)
    t = torch.tanh(slope * x + shift)
    steepness = (1 + gain * slope * (1 - t.square())).detach()
    return x - (x + gain * t - value) / steepness
