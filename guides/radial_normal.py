"""Radial normal: a direction uniform on the sphere, and a normal distance from the mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import _standard_normal

from .family import LocationScale, Shape

__all__ = ["RadialNormal"]


class RadialNormal(LocationScale):
    """Weights at a normal distance from their mean, in a direction uniform on the scaled sphere.

        w = loc + S r eps / |eps|,    eps ~ N(0, I_d),    r ~ N(0, 1),    S = diag(exp(log_scale))
        log q(w) = log 2 N(|v|; 0, 1) - log A_d - (d - 1) log |v| - sum_i log_scale_i,    v = S^-1 (w - loc)

    S. Farquhar, M. A. Osborne, Y. Gal: Radial Bayesian Neural Networks, 2020. A_d = 2 pi^(d/2) / Gamma(d / 2) is the
    area of the sphere. A normal of many dimensions has its mass in a thin shell at sqrt(d) scales from the mean; here
    it lies near the mean however many weights there are. The density is infinite at the mean where d > 1. One feature
    gives the normal distribution.

    The standard deviation of a weight is exp(log_scale_i) / sqrt(d). log_scale starts at log(scale sqrt(d)), so that
    `scale` is the standard deviation here as in every family. 2 d parameters and d + 1 normal numbers a draw. It
    attaches like every family; by `PerLayer` each layer has its own distance, as the authors have it, by `Global` all
    weights share one.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, or scale <= 0.

    >>> q = RadialNormal(3)()
    >>> q.rsample((5,)).shape, bool(torch.allclose(q.variance.sqrt(), torch.tensor(0.1)))
    (torch.Size([5, 3]), True)
    """

    def __init__(self, features: int, context: int = 0, scale: float | None = None) -> None:
        super().__init__(features, context, scale)
        with torch.no_grad():
            self.log_scale.bias.add_(0.5 * math.log(features))

    def forward(self, context: Tensor | None = None) -> Radial:
        return Radial(*self.loc_and_log_scale(context))

    def initialise(self, loc: Tensor, scale: float | Tensor | None = None) -> None:
        """Set the start: mean loc and standard deviation scale. With a context these are the heads' biases.

        Args:
            loc: (features,), finite.
            scale: one number or (features,), > 0; None leaves it as it was built.
        """
        super().initialise(loc, None if scale is None else torch.as_tensor(scale) * math.sqrt(self.features))


class Radial(TorchDistribution):
    """Density of loc + S r eps / |eps|, with its moments in closed form.

    Args:
        loc: (*batch, d), the mean.
        log_scale: (*batch, d), the logarithm of S's diagonal.

    >>> Radial(torch.zeros(4), torch.zeros(4)).variance
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads it from the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        self.loc, self.log_axes = loc, log_scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Radial:
        # the parameters broadcast against the noise, so that only the shape of the noise changes
        new = self._get_checked_instance(Radial, _instance)
        new.loc, new.log_axes = self.loc, self.log_axes
        super(Radial, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws w, (*sample_shape, *batch, d), and log q(w), (*sample_shape, *batch)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = _standard_normal((*shape[:-1], shape[-1] + 1), self.loc.dtype, self.loc.device)
        eps, r = noise[..., :-1], noise[..., -1:]
        tiny = torch.finfo(eps.dtype).tiny  # a zero is drawn once in some ten million times
        direction = eps * eps.square().sum(-1, keepdim=True).clamp_min(tiny).rsqrt()
        return self.loc + self.log_axes.exp() * r * direction, self._log_density(r.square().squeeze(-1))

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_density(((value - self.loc) * (-self.log_axes).exp()).square().sum(-1))

    def _log_density(self, square: Tensor) -> Tensor:
        """log q at squared distances |v|^2, (...)."""
        d = self.event_shape[0]
        log_area = math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)
        log_distance = 0.5 * square.clamp_min(torch.finfo(square.dtype).tiny).log()
        log_half_normal = math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 * square
        return log_half_normal - log_area - (d - 1) * log_distance - self.log_axes.sum(-1)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        spread = (2 * self.log_axes).exp() / self.event_shape[0]
        return spread.expand(self.batch_shape + self.event_shape)
