"""Densities of a family as Pyro distributions, and the sites that they fill."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from .packing import Packing


def sample_and_log_prob(density: Distribution, shape: Size = Size()) -> tuple[Tensor, Tensor]:
    """A reparameterised sample and its log density, in one pass where the density knows how.

    >>> x, log_q = sample_and_log_prob(dist.Normal(torch.zeros(3), 1.0).to_event(1), Size((5,)))
    >>> x.shape, log_q.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """
    both = getattr(density, "rsample_and_log_prob", None)
    if both is not None:
        return both(shape)
    x = density.rsample(shape)
    return x, density.log_prob(x)


class Affine(Distribution):
    """loc + scale v with v from another density on R^d: log q(x) = log q(v) - sum_i log scale_i.

    Args:
        base: a density on R^d.
        loc, scale: `(d,)`, scale > 0.

    >>> density = Affine(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.ones(2), torch.full((2,), 3.0))
    >>> x, log_q = density.rsample_and_log_prob(Size((5,)))
    >>> torch.allclose(log_q, dist.Normal(torch.ones(2), 3.0).to_event(1).log_prob(x), atol=1e-5)
    True
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Distribution, loc: Tensor, scale: Tensor):
        self.base, self.loc, self.scale = base, loc, scale
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample_and_log_prob(self, shape: Any = Size()) -> tuple[Tensor, Tensor]:
        v, log_prob = sample_and_log_prob(self.base, Size(shape))
        return self.loc + self.scale * v, log_prob - self.scale.log().sum(-1)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob((value - self.loc) / self.scale) - self.scale.log().sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Affine:
        return Affine(self.base.expand(batch_shape), self.loc, self.scale)


class FamilyDistribution(TorchDistribution):
    """A torch distribution on R^d (zuko's flows among them) as a Pyro distribution.

    The log density of its own last sample is kept: flows that are slow in one direction never go that way in training.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base: Distribution, sample_shape: Size = Size()):
        self.base = base
        self.extra = Size(sample_shape)
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(self.extra + base.batch_shape, base.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return bool(self.base.has_rsample)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        return constraints.real_vector

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        x, log_prob = sample_and_log_prob(self.base, Size(sample_shape) + self.extra)
        self._last = (x, log_prob)
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is value:
            return self._last[1]
        return self.base.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FamilyDistribution:
        own = self.base.batch_shape
        wide = Size(batch_shape)
        if wide[len(wide) - len(own) :] != own:
            return FamilyDistribution(self.base.expand(wide))
        return FamilyDistribution(self.base, wide[: len(wide) - len(own)])


def as_pyro(density: Distribution) -> Any:
    """What `pyro.sample` takes: Pyro's own distributions as they are, others wrapped."""
    if isinstance(density, TorchDistributionMixin) and not hasattr(density, "rsample_and_log_prob"):
        return density
    return FamilyDistribution(density)


def auxiliary(packing: Packing) -> Any:
    """`infer` of the site of a packed vector: the guide's own, and which latents it fills (objectives read that)."""
    return {"is_auxiliary": True, "packing": packing}


def sample_sites(
    packing: Packing, u: Tensor, has_density: bool = True, extra: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """Fill the sites of a packing from one unconstrained vector, inside whatever plate the caller opened.

    log q(z) = log q(u) - log |dz/du|: the auxiliary site of u carries the first term, each latent site its Jacobian.
    Without a density (a point) the Jacobian is left out, so that the point is the mode of the posterior as written.
    `extra`, (*S), is what else the guide counts as log q, such as -log r of an auxiliary variable given the latents:
    the first site carries it.
    """
    values, log_jacobian = packing.unpack(u)
    for block in packing.blocks:
        site = block.site
        log_density: Any = -log_jacobian[site.name] if has_density else 0.0
        if block is packing.blocks[0]:
            log_density = log_density + extra / math.prod(block.rest)  # once for each entry of inner plates
        with contextlib.ExitStack() as stack:
            for frame in site.frames:
                if frame.name != packing.plate:
                    # a plate without a site of its own: several latents, of several guides, may stand in it
                    stack.enter_context(IndepMessenger(frame.name, frame.size, frame.dim))
            value = values[site.name]
            pyro.sample(site.name, dist.Delta(value, torch.as_tensor(log_density), event_dim=site.event_dim))
    return values
