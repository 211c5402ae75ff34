"""Mixture of diagonal normals: several modes, with equal or learned weights."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import _standard_normal

from dgm.errors import OptionError

from .domains import check_scale, check_size
from .family import Family, Shape
from .heads import Head

__all__ = ["Mixture"]

LIMIT = 32
"""Features that learned weights take at most: their gradient solves a (d, d) system for each draw."""

APART = 0.5  # standard deviation between the components at the start, in units of the whole


class Mixture(Family):
    """Mixture of diagonal normal distributions.

        q(z | c) = sum_k w_k(c) prod_i N(z_i; m_ki(c), s_ki(c)^2)

    A draw picks a component by a uniform number and then is m_k + s_k eps, so that gradients in m and s are pathwise.

    * weights="uniform": w_k = 1/K. The pick has no parameter: the gradient is that of a normal, in any dimension, at
      the cost of K densities. Unequal modes are told by the number and the widths of the components in them. The
      default, because it is right and cheap at 1000 features as at one.
    * weights="learned": w = softmax(logits). A draw moves with the logits so that its conditional distribution
      functions F_i(z_i | z_1..z_{i-1}) stay: dz = -(dF/dz)^-1 dF/dlogits, dF/dz triangular. (A. Graves: Stochastic
      Backpropagation through Mixture Density Distributions, 2016; M. Figurnov, S. Mohamed, A. Mnih: Implicit
      Reparameterization Gradients, 2018.) A draw costs d^2 K more, up to 32 features. Unbiased, but mass passes from
      mode to mode through what lies between: the farther the modes are apart, the rarer and larger the gradients
      that tell of it. One draw's has a standard deviation of 1.6 at two modes 4 of their standard deviations apart,
      of 50 at 8, about a mean of 1.

    The start has mean 0 and standard deviation `scale` in every coordinate, and equal weights. Its components have the
    standard deviation 0.87 `scale` and random means, 0.5 `scale` apart in standard deviation: equal ones would stay
    equal. With a context this holds for the biases, with torch's default weights. It has K (2 d + 1) parameters without
    a context, K less with equal weights.

    Args:
        features: the dimension d, at least 1; at most 32 for learned weights.
        context: features of the context; 0 for none.
        components: K, at least 1; one is `DiagonalNormal`. More fit better in the end and learn more slowly.
        weights: "uniform" or "learned".
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, components < 1, another name for weights, or more than 32
            features with learned ones.

    >>> q = Mixture(4, context=5)(torch.zeros(7, 5))
    >>> x = q.rsample((3,))
    >>> x.shape, q.log_prob(x).shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    draw_costs = "one pass, its density K"  # with weights="uniform", the default

    def __init__(
        self,
        features: int,
        context: int = 0,
        components: int = 4,
        weights: Literal["uniform", "learned"] = "uniform",
        scale: float | None = None,
    ) -> None:
        super().__init__(features, context)
        check_size("Mixture: components", components)
        if weights not in ("uniform", "learned"):
            raise OptionError(f"Mixture: weights must be 'uniform' or 'learned', got {weights!r}")
        if weights == "learned" and features > LIMIT:
            raise OptionError(
                f"Mixture: learned weights solve a (features, features) system for each draw and take at most {LIMIT} "
                f"features, got {features}: use weights='uniform', perhaps with more components"
            )
        if scale is None:
            scale = 1.0 if context else 0.1
        check_scale("Mixture: scale", scale)
        self.components, self.scale = components, scale
        self.loc = Head(components * features, context)
        self.log_scale = Head(components * features, context)
        if weights == "learned" and components > 1:
            self.logits = Head(components, context, gain=0.0)
        self.initialise(torch.zeros(features), scale)

    @torch.no_grad()
    def initialise(self, loc: Tensor, scale: float | Tensor | None = None) -> None:
        """Set the start: mean loc and standard deviation scale of the mixture, the components anew at random about it.

        Args:
            loc: (features,), finite.
            scale: one number or (features,), > 0; None for the one that the family was built with.
        """
        bias = self.loc.bias
        width = torch.as_tensor(self.scale if scale is None else scale, dtype=bias.dtype, device=bias.device)
        offsets = torch.randn(self.components, self.features, dtype=bias.dtype, device=bias.device)
        offsets = offsets - offsets.mean(0)
        within = 1.0
        if self.components > 1:
            offsets = APART * offsets / offsets.std(0, unbiased=False)
            within = math.sqrt(1 - APART**2)
        bias.copy_((loc + width * offsets).flatten())
        self.log_scale.bias.copy_((within * width).log().expand(self.components, self.features).flatten())

    def forward(self, context: Tensor | None = None) -> NormalMixture:
        self.check(context)
        loc, log_scale = (
            head(context).unflatten(-1, (self.components, self.features)) for head in (self.loc, self.log_scale)
        )
        return NormalMixture(loc, log_scale, self.logits(context) if hasattr(self, "logits") else None)


class NormalMixture(TorchDistribution):
    """A mixture of diagonal normals with a pathwise gradient in everything.

    Args:
        loc, log_scale: (*batch, K, d), of the components.
        logits: (*batch, K), unnormalised log weights; None for equal ones.

    >>> NormalMixture(torch.zeros(2, 3), torch.zeros(2, 3)).rsample((5,)).shape
    torch.Size([5, 3])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads it from the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, log_scale: Tensor, logits: Tensor | None = None) -> None:
        self.loc, self.log_scale = loc, log_scale
        self.log_weights = None if logits is None else logits.log_softmax(-1)
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> NormalMixture:
        # the parameters broadcast against the noise, so that only the shape of the noise changes
        new = self._get_checked_instance(NormalMixture, _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = Size(batch_shape)
        return new

    @property
    def mean(self) -> Tensor:
        return (self._weights() * self.loc).sum(-2).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        second = (2 * self.log_scale).exp() + self.loc.square()
        return (self._weights() * second).sum(-2) - self.mean.square()

    def _weights(self) -> Tensor:
        if self.log_weights is None:
            return torch.full_like(self.loc[..., :1], 1 / self.loc.shape[-2])
        return self.log_weights.exp().unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        y = (value.unsqueeze(-2) - self.loc) * torch.exp(-self.log_scale)  # (*S, *batch, K, d)
        each = -0.5 * y.square().sum(-1) - self.log_scale.sum(-1) - 0.5 * y.shape[-1] * math.log(2 * math.pi)
        if self.log_weights is None:
            return each.logsumexp(-1) - math.log(each.shape[-1])
        return (each + self.log_weights).logsumexp(-1)

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        uniform = torch.rand(shape[:-1], dtype=self.loc.dtype, device=self.loc.device)
        eps = _standard_normal(shape, self.loc.dtype, self.loc.device)
        count = self.loc.shape[-2]
        if count == 1:
            pick = torch.zeros_like(uniform, dtype=torch.long)
        elif self.log_weights is None:
            pick = (uniform * count).long().clamp(max=count - 1)
        else:
            below = self.log_weights.detach().exp().cumsum(-1)[..., :-1]
            pick = (uniform.unsqueeze(-1) >= below).sum(-1)
        wide = (*shape[:-1], count, shape[-1])
        place = pick[..., None, None].expand(*shape[:-1], 1, shape[-1])
        loc, scale = (p.expand(wide).gather(-2, place).squeeze(-2) for p in (self.loc, self.log_scale.exp()))
        z = loc + scale * eps
        if self.log_weights is None or not torch.is_grad_enabled():
            return z
        return z + implicit(z.detach(), self.loc.detach(), self.log_scale.detach(), self.log_weights)


def implicit(z: Tensor, loc: Tensor, log_scale: Tensor, log_weights: Tensor) -> Tensor:
    """Zeros whose gradient is that of a draw in the weights, -(dF/dz)^-1 F(z; weights): see `Mixture`.

    Args:
        z: (*S, *batch, d), a draw. loc, log_scale: (*batch, K, d). None of them needs a gradient.
        log_weights: (*batch, K), normalised.

    >>> q = NormalMixture(torch.randn(2, 3), torch.zeros(2, 3))
    >>> implicit(q.rsample((5,)), q.loc, q.log_scale, torch.tensor([0.3, 0.7]).log()).abs().max()
    tensor(0.)
    """
    y = (z.unsqueeze(-2) - loc) * torch.exp(-log_scale)  # (*S, *batch, K, d)
    each = -0.5 * y.square() - log_scale - 0.5 * math.log(2 * math.pi)
    before = each.cumsum(-1) - each  # log density of the features before each one
    seen = (log_weights.unsqueeze(-1) + before).softmax(-2)  # weights, given those
    below = torch.special.ndtr(y)
    f = (seen * below).sum(-2)  # F_i(z_i | z_1..z_{i-1})
    w = seen.detach()
    slope = (w * each.exp()).sum(-2)
    # dF_i/dz_j for j < i, through the weights: sum_k w_ki (below_ki - F_i) d log N(z_j; k)/dz_j
    across = (w * (below - f.detach().unsqueeze(-2))).mT @ (-y * torch.exp(-log_scale))
    jacobian = across.tril(-1) + torch.diag_embed(slope)
    rise = (f - f.detach()).unsqueeze(-1)
    return -torch.linalg.solve_triangular(jacobian, rise, upper=False).squeeze(-1)
