"""Rank-one factors: a point for each weight, times random factors of its output and its input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import sample_sites
from dgm.errors import GuideError
from dgm.packing import Packing
from dgm.sites import DATA_PLATE

from .domains import check_scale, check_size
from .layers import global_sites, matrices_of, packed_start, spread

__all__ = ["RankOne"]


class RankOne(PyroModule):
    """W = W_0 * (r s'): a point W_0, and normal posteriors of r (outputs) and s (inputs) about 1.

        q(r) = N(mean, diag(exp(log_scale))^2),    p(r) = N(1, prior_scale^2),    and so for s
        objective = E_q[log p(y | w) + log p(w)] - KL(q(r, s) || p(r, s))

    M. W. Dusenberry, G. Jerfel, Y. Wen, Y. Ma, J. Snoek, K. Heller, B. Lakshminarayanan, D. Tran: Efficient and
    Scalable Bayesian Neural Nets with Rank-1 Factors, 2020. The model's own prior at the weights, log p(w), stands
    where the authors have weight decay. Weights are the real global latents with two axes or more, (outputs, inputs,
    ...); all others (biases, scales) are points. It starts at the network's own weights.

    It has no density over the weights (`has_density` is False): the objective is that of another model, one whose
    latents are r and s and whose weights are parameters, and no bound on the evidence of the model as written.

    With several components q(r, s) is a mixture with equal weights; each draw takes one component, the same in all
    layers, and the KL is the mean of the components' (no less than that of the mixture). The means of a single
    component start at 1, those of several at draws of the prior.

    It has 2 (outputs + inputs) parameters a layer and component beside the weights; a draw takes outputs + inputs
    normal numbers a layer.

    Args:
        model: the model; only its sites are read.
        batch: a batch of data, as the model takes it.
        components: number of components, at least 1.
        prior_scale: standard deviation of r and s a priori, > 0.
        init_scale: theirs at the start, relative to a weight, > 0.
        sites: names of the latents to serve; default all.
        init: constrained start values by site name; otherwise the model's `init_values()`, else the prior's median.
        plates: names of the data plates.

    Raises:
        OptionError: components < 1, or a scale that is not positive and finite.
        GuideError: a latent is local, a name is unknown, or none is a real matrix.
        ModelError: a latent is discrete.

    >>> from dgm.models.bnn import example
    >>> model, batch = example()
    >>> RankOne(model, *batch)(*batch)["network.2.weight"].shape
    torch.Size([1, 8])
    """

    has_density = False
    draw_costs = "outputs + inputs numbers a layer"

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        components: int = 1,
        prior_scale: float = 0.1,
        init_scale: float = 0.05,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ) -> None:
        super().__init__()
        check_size("RankOne: components", components)
        for name, scale in (("prior_scale", prior_scale), ("init_scale", init_scale)):
            check_scale(f"RankOne: {name}", scale)
        self.packing = Packing(global_sites(model, batch, sites, plates, "RankOne"))
        self.matrices = matrices_of(self.packing)
        if not self.matrices:
            raise GuideError(
                f"RankOne: none of the latents {[s.name for s in self.packing.sites]} is a real matrix, (outputs, "
                "inputs), that could have factors: use Global or PerLayer"
            )
        self.components, self.prior_scale = components, float(prior_scale)
        self.loc = nn.Parameter(packed_start(self.packing, model, batch, init).clone())  # (d,)
        spread_of_means = prior_scale if components > 1 else 0.0
        self.factors = nn.ModuleDict(
            {
                name.replace(".", "|"): Factors(components, m.outputs + m.inputs, spread_of_means, init_scale)
                for name, m in self.matrices.items()
            }
        ).to(self.loc.dtype)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        chosen = self._chosen()
        factors: dict[str, Tensor] = {}
        log_prior = self.loc.new_zeros(())
        for name, matrix in self.matrices.items():
            density = self.factors[name.replace(".", "|")](chosen)
            v = pyro.sample(f"_global_{name}", density, infer={"is_auxiliary": True})  # (*S, outputs + inputs)
            log_prior = log_prior + dist.Normal(1.0, self.prior_scale, validate_args=False).log_prob(v).sum(-1)
            r, s = v.split([matrix.outputs, matrix.inputs], -1)
            factors[name] = r.unsqueeze(-1) * s.unsqueeze(-2)
        u = self.loc * spread(self.packing, self.matrices, factors)  # (*S, d)
        return sample_sites(self.packing, u, has_density=False, extra=-log_prior)

    def _chosen(self) -> Tensor | None:
        """The component of this draw, (*S, components), one of them 1 and the others 0."""
        if self.components == 1:
            return None
        unit = dist.Uniform(self.loc.new_zeros(()), 1.0, validate_args=False)
        u = pyro.sample("_global_component", unit, infer={"is_auxiliary": True}).unsqueeze(-1)
        edges = torch.arange(1, self.components, dtype=u.dtype, device=u.device) / self.components
        above = (u >= edges).to(u.dtype)  # (*S, components - 1): 1 ... 1 0 ... 0
        one = torch.ones_like(u)
        return torch.cat([one, above], -1) - torch.cat([above, torch.zeros_like(u)], -1)


class Factors(nn.Module):
    """Normal densities of r and s together, one for each component.

    Args:
        components: how many.
        size: outputs + inputs.
        spread: standard deviation of the means about 1 at the start.
        scale: standard deviation at the start.
    """

    def __init__(self, components: int, size: int, spread: float, scale: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(1.0 + spread * torch.randn(components, size))
        self.log_scale = nn.Parameter(torch.full((components, size), math.log(scale)))

    def forward(self, chosen: Tensor | None) -> dist.Distribution:
        mean, log_scale = (
            p.squeeze(0) if chosen is None else chosen @ p  # (*S, size)
            for p in (self.mean, self.log_scale)
        )
        return dist.Normal(mean, log_scale.exp(), validate_args=False).to_event(1)
