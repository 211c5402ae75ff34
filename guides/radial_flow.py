"""Radial flow: a diagonal normal whose mass is drawn to, or pushed from, points; the inverse in closed form."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .domains import check_size
from .family import Push
from .flow import Flow, Step
from .heads import Head
from .monotone import above_minus_one

__all__ = ["RadialFlow"]


class RadialFlow(Flow):
    """A normal carried through steps that each contract or expand space around one point.

        u_t = u_{t-1} + beta (u_{t-1} - m) / (alpha + r),    r = |u_{t-1} - m|
        log|det| = (d - 1) log(1 + beta / (alpha + r)) + log(1 + alpha beta / (alpha + r)^2)
        u_0 ~ N(0, I),    z = loc(c) + exp(log_scale(c)) u_T

    D. J. Rezende, S. Mohamed: Variational Inference with Normalizing Flows, 2015. alpha > 0 and beta > -alpha, which
    makes each step invertible; beta = 0 at the start: the family starts exactly as `DiagonalNormal`, with the points m
    random and alpha = sqrt(d), the distance that noise has from the origin. With a context all are linear in it.

    It has d (T + 2) + 2 T parameters without a context; a draw, and the log-density of any value, cost O(T d).

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        transforms: number of steps T, at least 1.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, or transforms < 1.

    >>> q = RadialFlow(4, context=5)(torch.zeros(7, 5))
    >>> x, log_q = q.rsample_and_log_prob((3,))
    >>> x.shape, log_q.shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    def __init__(self, features: int, context: int = 0, transforms: int = 8, scale: float | None = None) -> None:
        check_size("RadialFlow: transforms", transforms)
        super().__init__(features, context, [], scale)
        self.steps.extend(RadialStep(features, context) for _ in range(transforms))


class RadialStep(Step):
    """One radial map: u + beta (u - m) / (alpha + |u - m|).

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.

    >>> push, pull = RadialStep(3, 0)(None)
    >>> push(torch.zeros(5, 3))[1].shape
    torch.Size([5])
    """

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        self.centre = Head(features, context)
        self.log_alpha = Head(1, context, start=0.5 * math.log(features), gain=0.1)
        self.strength = Head(1, context, gain=0.0)
        with torch.no_grad():
            self.centre.bias.normal_()

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        alpha = self.log_alpha(context).squeeze(-1).exp()
        beta = alpha * above_minus_one(self.strength(context).squeeze(-1))
        centre = self.centre(context)
        return partial(_push, centre, alpha, beta), partial(_pull, centre, alpha, beta)


def _log_det(alpha: Tensor, beta: Tensor, r: Tensor, features: int) -> Tensor:
    reach = alpha + r
    return (features - 1) * torch.log1p(beta / reach) + torch.log1p(alpha * beta / reach.square())


def _push(centre: Tensor, alpha: Tensor, beta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    away = u - centre
    r = torch.linalg.vector_norm(away, dim=-1)  # (*S, B)
    return u + (beta / (alpha + r)).unsqueeze(-1) * away, _log_det(alpha, beta, r, u.shape[-1])


def _pull(centre: Tensor, alpha: Tensor, beta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    away = u - centre
    far = torch.linalg.vector_norm(away, dim=-1)
    # r (1 + beta / (alpha + r)) = far, a quadratic in r; of its two forms the one without cancellation
    half = 0.5 * (alpha + beta - far)
    root = torch.sqrt(half.square() + alpha * far)
    r = torch.where(half > 0, alpha * far / (half.abs() + root), half.abs() + root)
    return centre + away / (1 + beta / (alpha + r)).unsqueeze(-1), _log_det(alpha, beta, r, u.shape[-1])
