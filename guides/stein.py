"""Stein variational gradient descent: an ensemble of points that keep apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from dgm.sites import DATA_PLATE
from dgm.stein import SteinObjective

from .ensemble import Ensemble
from .point import Point

__all__ = ["Stein"]


class Stein(Ensemble):
    """q(w) = 1/K sum_k delta(w - w_k), moved by the steepest descent of KL(q || p) in a kernel's space.

    Q. Liu and D. Wang, "Stein Variational Gradient Descent: A General Purpose Bayesian Inference Algorithm", 2016. See
    `dgm.stein.SteinObjective` for its step. It has no density: its objective is no bound. Parameters: K d. Cost of a
    draw: one pass. In high dimension the kernel's repulsion fades and the spread is too small. Attaches to global
    latents.

    Args:
        model, batch, sites, init, plates: see `Ensemble`.
        members: K, at least 2.
        bandwidth: of the kernel; None for the median rule.

    Raises:
        GuideError: a latent is local. OptionError: members < 2, or a bandwidth that is not positive.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> Stein(model, torch.ones(5), members=3).objective().num_particles
    3
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        members: int = 20,
        bandwidth: float | None = None,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__(model, *batch, family=Point, members=members, sites=sites, init=init, plates=plates)
        self._objective = partial(SteinObjective, members, bandwidth)
        self._objective()  # refuses a bad bandwidth now

    def objective(self) -> SteinObjective:
        return self._objective()
