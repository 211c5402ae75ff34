"""What the flows share: steps on standardised noise, then a location and a scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .family import LocationScale, Push, Pushforward

# Importing zuko switches argument validation off for the whole process; importing this file must change no setting.
_validation = Distribution._validate_args
import zuko  # noqa: E402

Distribution.set_default_validate_args(_validation)

__all__ = ["Flow", "Step", "zuko"]


class Step(nn.Module):
    """One invertible map of the noise, steered by the context, the identity at the start.

    `forward(context)` returns two functions, the map and its inverse. Both give the other side, (..., d), and the
    log-determinant of the map, (...), at the point they connect.
    """

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        raise NotImplementedError


class Flow(LocationScale):
    """A diagonal normal whose noise goes through steps first.

        z = loc(c) + exp(log_scale(c)) u_T,    u_t = step_t(u_{t-1}; c),    u_0 ~ N(0, I)

    The steps see standardised numbers whatever the model's units are, and start as the identity: the family starts as
    `DiagonalNormal`. Each step reads the context once, for all draws.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        steps: the maps, in the order of sampling.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    >>> Flow(3, 0, [])().rsample((5,)).shape
    torch.Size([5, 3])
    """

    def __init__(self, features: int, context: int, steps: Sequence[Step], scale: float | None = None) -> None:
        super().__init__(features, context, scale)
        self.steps = nn.ModuleList(steps)

    def forward(self, context: Tensor | None = None) -> Pushforward:
        loc, log_scale = self.loc_and_log_scale(context)
        steps = [step(context) for step in self.steps]
        return Pushforward(partial(_push, loc, log_scale, steps), partial(_pull, loc, log_scale, steps), loc)


def _push(loc: Tensor, log_scale: Tensor, steps: list[tuple[Push, Push]], eps: Tensor) -> tuple[Tensor, Tensor]:
    u, log_det = eps, log_scale.sum(-1)
    for push, _ in steps:
        u, change = push(u)
        log_det = log_det + change
    return loc + log_scale.exp() * u, log_det


def _pull(loc: Tensor, log_scale: Tensor, steps: list[tuple[Push, Push]], x: Tensor) -> tuple[Tensor, Tensor]:
    u, log_det = (x - loc) * torch.exp(-log_scale), log_scale.sum(-1)
    for _, pull in reversed(steps):
        u, change = pull(u)
        log_det = log_det + change
    return u, log_det
