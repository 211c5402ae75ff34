"""What the flows share: steps on standardised noise, then a location and a scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .family import LocationScale, Pushforward

# Importing zuko switches argument validation off for the whole process; importing this file must change no setting.
_validation = Distribution._validate_args
import zuko  # noqa: E402

Distribution.set_default_validate_args(_validation)

__all__ = ["Flow", "Step", "zuko"]


class Step(nn.Module):
    """One invertible map of the noise, steered by the context. The identity at the start."""

    def embed(self, context: Tensor | None) -> Tensor | None:
        """What the context says, mapped once for any number of draws."""
        raise NotImplementedError

    def forward(self, u: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The map of u, (..., d), and its log-determinant, (...)."""
        raise NotImplementedError

    def inverse(self, u: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The u that maps to this one, and the log-determinant of the map there."""
        raise NotImplementedError


class Flow(LocationScale):
    """A diagonal normal whose noise goes through steps first.

        z = loc(c) + exp(log_scale(c)) u_T,    u_t = step_t(u_{t-1}; c),    u_0 ~ N(0, I)

    The steps see standardised numbers whatever the model's units are, and start as the identity: the family starts as
    `DiagonalNormal`. Each step maps the context once, for all draws.

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
        steps = [(step, step.embed(context)) for step in cast(Iterable[Step], self.steps)]
        return Pushforward(partial(_push, loc, log_scale, steps), partial(_pull, loc, log_scale, steps), loc)


Embedded = list[tuple[Step, Tensor | None]]


def _push(loc: Tensor, log_scale: Tensor, steps: Embedded, eps: Tensor) -> tuple[Tensor, Tensor]:
    u, log_det = eps, log_scale.sum(-1)
    for step, embedded in steps:
        u, change = step(u, embedded)
        log_det = log_det + change
    return loc + log_scale.exp() * u, log_det


def _pull(loc: Tensor, log_scale: Tensor, steps: Embedded, x: Tensor) -> tuple[Tensor, Tensor]:
    u, log_det = (x - loc) * torch.exp(-log_scale), log_scale.sum(-1)
    for step, embedded in reversed(steps):
        u, change = step.inverse(u, embedded)
        log_det = log_det + change
    return u, log_det
