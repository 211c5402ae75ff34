"""Coupling affine flow: shifts and scales of alternate halves; one cheap pass in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .coupling import CouplingStep, check_coupling
from .family import Push
from .flow import Flow

__all__ = ["CouplingAffineFlow"]


class CouplingAffineFlow(Flow):
    """A normal whose halves are shifted and scaled in turn, as told by the other half and the context.

        u_0 = eps,    u_t[b] = exp(s) u_{t-1}[b] + m,    u_t[a] = u_{t-1}[a]
        (s, m) = network(u_{t-1}[a], c),    z = loc(c) + exp(log_scale(c)) u_T

    L. Dinh, J. Sohl-Dickstein, S. Bengio: Density estimation using Real NVP, 2017. The halves a and b are the even and
    odd features and change places from step to step; no batch normalisation; |s| < 1, by a tanh: a step changes a
    scale by less than e. All networks start at zero output: the family starts exactly as `DiagonalNormal`.
    `CouplingSplineFlow` moves the halves by splines instead, at some five times the cost of a step.

    A draw, and the log-density of any value, take one pass through each network.

    Args:
        features: the dimension d, at least 1. With one feature there are no halves: the diagonal normal.
        context: features of the context; 0 for none.
        transforms: number of steps, at least 1; two let every feature move.
        hidden: widths of the networks' hidden layers, one or more.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, transforms < 1, or hidden empty or with a width < 1.

    >>> q = CouplingAffineFlow(4, context=5)(torch.zeros(7, 5))
    >>> x, log_q = q.rsample_and_log_prob((3,))
    >>> x.shape, log_q.shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 4,
        hidden: Sequence[int] = (64,),
        scale: float | None = None,
    ) -> None:
        check_coupling("CouplingAffineFlow", features, transforms, hidden)
        super().__init__(features, context, [], scale)
        if features > 1:
            self.steps.extend(AffineStep(features, context, t % 2, hidden) for t in range(transforms))


class AffineStep(CouplingStep):
    """One affine coupling: u[b] <- exp(s) u[b] + m.

    Args:
        features: the dimension d, at least 2.
        context: features of the context; 0 for none.
        parity: 0 moves the odd features first, 1 the even ones.
        hidden: widths of the network's hidden layers.

    >>> push, pull = AffineStep(3, 0, 0, (16,))(None)
    >>> push(torch.zeros(5, 3))[1].shape
    torch.Size([5])
    """

    def __init__(self, features: int, context: int, parity: int, hidden: Sequence[int]) -> None:
        super().__init__(features, context, parity, 2, hidden)

    def maps(self, parameters: Tensor) -> tuple[Push, Push]:
        s, m = parameters.unbind(-1)
        s = torch.tanh(0.5 * s)  # with |s| < 2, short fits of a banana or a funnel ended low, or in NaN
        return partial(_push, s, m), partial(_pull, s, m)


def _push(s: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.exp(s) * u + m, s.expand(u.shape)


def _pull(s: Tensor, m: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.exp(-s) * (u - m), s.expand(u.shape)
