"""What a family is: a module that returns a density on R^d, with or without a context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.utils import _standard_normal

from dgm.entries import checked, entry_name
from dgm.errors import GuideError

from .domains import check_scale, check_size
from .heads import Head

Push = Callable[[Tensor], tuple[Tensor, Tensor]]
Shape = torch.Size | list[int] | tuple[int, ...]


class Family(nn.Module):
    """Conditional density on R^d: `forward(context)` returns a distribution of event shape (features,).

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for a density without one.

    Attributes:
        has_density: False where log q has no meaning (a point). A module without the attribute counts as True.

    Raises:
        OptionError: features < 1 or context < 0.
    """

    has_density = True

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        check_size(f"{type(self).__name__}: features", features, why="; a density needs a space")
        check_size(f"{type(self).__name__}: context", context, 0, "; 0 is a density without one")
        self.features = features
        self.context = context

    def check(self, context: Tensor | None) -> None:
        """Refuse a context of the wrong size, by name, before a matrix product does so without one."""
        name = type(self).__name__
        if self.context == 0 and context is not None:
            raise GuideError(
                f"{name}: built without a context, called with one of shape {tuple(context.shape)}; "
                f"build it as {name}({self.features}, context={context.shape[-1]})"
            )
        if self.context > 0 and context is None:
            raise GuideError(
                f"{name}: built for a context of {self.context} features, called without one; pass context"
            )
        if context is not None and context.shape[-1] != self.context:
            raise GuideError(
                f"{name}: built for a context of {self.context} features, got shape {tuple(context.shape)}; "
                f"its last dimension must be {self.context}: does the encoder's out_features agree?"
            )


def make_family(
    make: Callable[..., nn.Module], features: int, context: int = 0, *, dtype: torch.dtype, **options: Any
) -> nn.Module:
    """A family for d features, checked by a run; its parameters have the floating type of the latents.

    Args:
        make: `(features, context=0) -> module`: a class of `dgm.guides`, one of zuko's, one of the caller's own.
        features: the dimension d. context: features of the context; 0 for none. options: for `make`.
        dtype: that of the latents.

    Raises:
        GuideError: it is no maker of families, or what it makes is no density on R^d with a pathwise gradient.

    >>> from .point import Point
    >>> make_family(Point, 3, dtype=torch.float64)().rsample().dtype
    torch.float64
    """
    if isinstance(make, nn.Module) or not callable(make):
        told = f"an object {type(make).__name__}(...)" if isinstance(make, nn.Module) else repr(make)
        raise GuideError(
            f"family is {told}, expected what makes one for the size of the latents: a class such as DiagonalNormal, "
            "or partial(LowRankNormal, rank=3); dgm.guides.attached takes names"
        )
    return checked(make, entry_name(make))(features, context=context, **options).to(dtype)


class LocationScale(Family):
    """A family whose start is a diagonal normal: it owns a location and a log scale, however they come about.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        scale: standard deviation at the start, > 0. Default: 0.1 without a context (weights of a network, parameters
            of a model: start sharp), 1 with one (latents of a datum under a standard normal prior: start at the
            prior's width). With a context both heads have torch's default weights, the location's bias is 0 and the
            log scale's is log(scale).

    Raises:
        OptionError: features < 1, context < 0, or scale <= 0.
    """

    def __init__(self, features: int, context: int = 0, scale: float | None = None) -> None:
        super().__init__(features, context)
        if scale is None:
            scale = 1.0 if context else 0.1
        check_scale(f"{type(self).__name__}: scale", scale)
        self.loc = Head(features, context)
        self.log_scale = Head(features, context, start=math.log(scale))

    def loc_and_log_scale(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Location and log scale, both (..., features), of a context that was checked."""
        self.check(context)
        return self.loc(context), self.log_scale(context)

    @torch.no_grad()
    def initialise(self, loc: Tensor, scale: float | Tensor | None = None) -> None:
        """Set the start: median loc and standard deviation scale. With a context these are the heads' biases.

        Args:
            loc: (features,), finite.
            scale: one number or (features,), > 0; None leaves it as it was built.
        """
        self.loc.bias.copy_(loc)
        if scale is not None:
            self.log_scale.bias.copy_(torch.as_tensor(scale, dtype=self.log_scale.bias.dtype).log())


class Pushforward(TorchDistribution):
    """Density of x = f(eps), eps ~ N(0, I): the sample's own log-density comes with it, at no inversion.

        log q(x) = log N(eps; 0, I) - log |det df/deps|,    eps = f^-1(x)

    The last draw is remembered, so that `log_prob` of the very tensor that `rsample` returned costs nothing; any other
    value is inverted.

    Args:
        push: eps (..., d) -> x (..., d) and log |det df/deps| (...).
        pull: x (..., d) -> eps (..., d) and log |det df/deps| at that eps (...).
        loc: (*batch, d), tells the batch shape, dtype and device.

    >>> double = Pushforward(lambda e: (2 * e, torch.tensor(2.0).log()), lambda x: (x / 2, torch.tensor(2.0).log()),
    ...     torch.zeros(1))
    >>> x, log_q = double.rsample_and_log_prob((5,))
    >>> torch.allclose(log_q, torch.distributions.Normal(0.0, 2.0).log_prob(x).squeeze(-1))
    True
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads it from the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, push: Push, pull: Push, loc: Tensor) -> None:
        self.push, self.pull, self.loc = push, pull, loc
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Pushforward:
        # the parameters broadcast against the noise, so that only the shape of the noise changes
        new: Pushforward = self.__new__(type(self)) if _instance is None else _instance
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_drawn"})
        new._drawn, new._batch_shape = None, torch.Size(batch_shape)
        return new

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws x, (*sample_shape, *batch, d), and log q(x), (*sample_shape, *batch), in one pass."""
        eps = _standard_normal(self._extended_shape(torch.Size(sample_shape)), self.loc.dtype, self.loc.device)
        x, log_det = self.push(eps)
        log_q = self._log_normal(eps) - log_det
        self._drawn = (x, log_q, torch.is_grad_enabled())
        return x, log_q

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and self._drawn[0] is value:
            # a draw made without gradients must not lend its log-density to a caller who wants them
            if self._drawn[2] or not torch.is_grad_enabled():
                return self._drawn[1]
        eps, log_det = self.pull(value)
        return self._log_normal(eps) - log_det

    @staticmethod
    def _log_normal(eps: Tensor) -> Tensor:
        return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * math.log(2 * math.pi))
