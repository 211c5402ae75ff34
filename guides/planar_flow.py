"""Planar flow: a diagonal normal bent along planes; each step moves along one direction."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .domains import check_size
from .family import Push
from .flow import Flow, Step
from .heads import Head
from .monotone import above_minus_one, solve

__all__ = ["PlanarFlow"]


class PlanarFlow(Flow):
    """A normal carried through steps that each stretch or squeeze space across one hyperplane.

        u_t = u_{t-1} + v tanh(w u_{t-1} + b),    log|det| = log(1 + (1 - tanh^2) w v)
        u_0 ~ N(0, I),    z = loc(c) + exp(log_scale(c)) u_T

    D. J. Rezende, S. Mohamed: Variational Inference with Normalizing Flows, 2015. The part of v along w is mapped so
    that w v > -1, which makes each step invertible, and v = 0 at the start: the family starts exactly as
    `DiagonalNormal`, with the hyperplanes w random. With a context w, v and b are linear in it.

    It has d (2 T + 2) + T parameters without a context, and a draw costs O(T d). The log-density of its own draw comes
    with the draw; that of any other value solves one scalar equation for each step, by bisection and Newton's method.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        transforms: number of steps T, at least 1. One step moves along one direction only, so a few are wanted for
            each feature that is not normal.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, or transforms < 1.

    >>> q = PlanarFlow(4, context=5)(torch.zeros(7, 5))
    >>> x, log_q = q.rsample_and_log_prob((3,))
    >>> x.shape, log_q.shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    def __init__(self, features: int, context: int = 0, transforms: int = 8, scale: float | None = None) -> None:
        check_size("PlanarFlow: transforms", transforms)
        super().__init__(features, context, [], scale)
        self.steps.extend(PlanarStep(features, context) for _ in range(transforms))


class PlanarStep(Step):
    """One planar map: u + v tanh(w u + b).

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.

    >>> push, pull = PlanarStep(3, 0)(None)
    >>> push(torch.zeros(5, 3))[1].shape
    torch.Size([5])
    """

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        self.normal = Head(features, context)
        self.direction = Head(features, context, gain=0.0)
        self.shift = Head(1, context)
        with torch.no_grad():
            self.normal.bias.normal_(0.0, 1 / math.sqrt(features))
            self.shift.bias.normal_(0.0, 1.0)

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        w, v, b = self.normal(context), self.direction(context), self.shift(context).squeeze(-1)
        along = (w * v).sum(-1)
        gain = above_minus_one(along)  # what w v becomes
        squared = w.square().sum(-1).clamp_min(torch.finfo(w.dtype).tiny)
        v = v + ((gain - along) / squared).unsqueeze(-1) * w
        return partial(_push, w, v, b, gain), partial(_pull, w, v, b, gain)


def _push(w: Tensor, v: Tensor, b: Tensor, gain: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh((w * u).sum(-1) + b)  # (*S, B)
    return u + t.unsqueeze(-1) * v, torch.log1p(gain * (1 - t.square()))


def _pull(w: Tensor, v: Tensor, b: Tensor, gain: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(solve((w * u).sum(-1), gain, torch.ones_like(b), b) + b)
    return u - t.unsqueeze(-1) * v, torch.log1p(gain * (1 - t.square()))
