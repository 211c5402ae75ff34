"""Stein variational gradient descent as an objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .errors import ModelError, OptionError
from .objectives import Objective, with_value
from .particles import Programs, over_particles
from .terms import LIKELIHOOD, PRIOR, factors_of, sample_sites_of, terms_of


class SteinObjective(Objective):
    """Particles move along phi(u_i) = 1/K sum_j [k(u_j, u_i) grad log p(x, u_j) + grad_j k(u_j, u_i)].

    The kernel is exp(-|u - v|^2 / h), h the median squared distance over log K. u are unconstrained coordinates, and
    log p their density there, with the Jacobian. Q. Liu and D. Wang, "Stein Variational Gradient Descent", 2016. The
    value of the loss is minus the mean log joint density of the particles, which is no bound.

    Args:
        particles: K, one for each member of the guide (an `Ensemble` of points), at least 2.
        bandwidth: h, > 0; None for the median rule.

    Raises:
        OptionError: particles < 2, or a bandwidth that is not positive.
        ModelError: in a step, where the guide packs no vector of global latents.

    >>> SteinObjective(10).num_particles
    10
    """

    def __init__(self, particles: int = 20, bandwidth: float | None = None):
        super().__init__(particles, "stratified")
        if particles < 2:
            raise OptionError(f"particles is {particles}, expected at least 2: one alone is the mode")
        if bandwidth is not None and not 0 < bandwidth < math.inf:
            raise OptionError(f"bandwidth is {bandwidth!r}, expected a positive number or None")
        self.bandwidth = bandwidth

    def loss_of(self, programs: Programs) -> Tensor:
        count = self.num_particles
        packings: dict[str, Any] = {}

        def draw() -> dict[str, Tensor]:
            trace = programs.trace_guide()
            packings.update({n: p for n, s in sample_sites_of(trace) if (p := s["infer"].get("packing")) is not None})
            return {name: trace.nodes[name]["value"] for name in packings}  # type: ignore[misc]

        u = programs.each(count, draw, programs.noise(count, self.draws))
        if not u or any(packing.plate is not None for packing in packings.values()):
            raise ModelError("Stein needs a guide of points over global latents: use dgm.guides.stein.Stein")

        def log_joint(u: Mapping[str, Tensor]) -> Tensor:
            def one(u: Mapping[str, Tensor]) -> Tensor:
                guide = programs.guide_at(u, detach=True)
                model = programs.trace_model(guide)
                terms, factors = terms_of(model, guide, programs.plates), factors_of(model, programs.plates)
                total = terms.shared[LIKELIHOOD] + programs.kl_weight * terms.shared[PRIOR]
                for plate, three in terms.rows.items():
                    total = total + factors[plate] * (three[LIKELIHOOD] + programs.kl_weight * three[PRIOR]).sum()
                return total + sum(j.sum() for name, v in u.items() for j in packings[name].unpack(v)[1].values())

            return over_particles(one)(u) if programs.draws is not None else programs.each(count, one, None, u)

        fixed = tree_map(lambda t: t.detach(), u)
        value, back = torch.func.vjp(log_joint, fixed)  # type: ignore[misc]
        (score,) = back(torch.ones_like(value))
        move = torch.zeros_like(value[0])
        for name, particles in u.items():
            move = move + (self._direction(fixed[name], score[name].detach()) * particles).sum()
        return -with_value(value.mean(), value.mean() + move)  # what the model's own parameters learn from, and phi

    def _direction(self, u: Tensor, score: Tensor) -> Tensor:
        """phi of every particle, `(K, d)`, over K."""
        difference = u[:, None] - u[None]  # (K, K, d)
        square = difference.square().sum(-1)
        count = len(u)
        h = self.bandwidth if self.bandwidth is not None else square.median() / math.log(count + 1) + 1e-12
        kernel = torch.exp(-square / h)
        repulsion = (kernel[..., None] * difference).sum(1) * 2 / h  # sum_j grad_j k(u_j, u_i)
        return (kernel @ score + repulsion) / count / count


__all__ = ["SteinObjective"]
