"""Student t: independent coordinates with heavy tails, the degrees of freedom learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from dgm.errors import OptionError

from .family import LocationScale, Shape
from .heads import Head

__all__ = ["StudentT"]


class StudentT(LocationScale):
    """Independent Student t distributions with learned degrees of freedom.

        q(z | c) = prod_i t(z_i; nu_i(c), loc_i(c), exp(log_scale_i(c))),    nu = 1 + exp(a(c))
        z = loc + exp(log_scale) sqrt(nu (U^(-2 / nu) - 1)) cos(2 pi V),    U, V ~ uniform(0, 1)

    R. W. Bailey: Polar generation of random variates with the t-distribution, 1994. U and V are free of parameters, so
    that the gradient is pathwise in nu too. At nu <= 2 the variance is infinite, and with it that of a gradient whose
    integrand grows faster than |z|^(nu / 2).

    It starts at nu = 10 with the standard deviation that other families start with, nearly a normal. It has 3 d
    parameters without a context; a draw costs two uniforms for each feature.

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        df: degrees of freedom nu at the start, > 2, so that the start has a standard deviation.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, or df <= 2.

    >>> StudentT(3, context=5)(torch.zeros(7, 5)).rsample((2,)).shape
    torch.Size([2, 7, 3])
    """

    def __init__(self, features: int, context: int = 0, df: float = 10.0, scale: float | None = None) -> None:
        super().__init__(features, context, scale)
        if not 2 < df < math.inf:
            raise OptionError(
                f"StudentT: df at the start must be above 2 (a standard deviation) and finite, got {df}; "
                "DiagonalNormal is the limit of many degrees of freedom"
            )
        self.log_df = Head(features, context, start=math.log(df - 1), gain=0.1)  # of nu - 1
        with torch.no_grad():
            self.log_scale.bias.add_(self._log_narrower())

    def _log_narrower(self) -> Tensor:
        """Log of scale over standard deviation, sqrt(1 - 2 / nu), at the bias of nu; 1 where there is no deviation."""
        df = 1 + self.log_df.bias.detach().exp()
        return torch.where(df > 2, 0.5 * torch.log1p(-2 / df.clamp_min(2.001)), torch.zeros_like(df))

    @torch.no_grad()
    def initialise(self, loc: Tensor, scale: float | Tensor | None = None) -> None:
        """Set the start: median loc, (features,), and standard deviation scale, one number or (features,)."""
        super().initialise(loc, scale)
        if scale is not None:
            self.log_scale.bias.add_(self._log_narrower())

    def forward(self, context: Tensor | None = None) -> PolarStudentT:
        loc, log_scale = self.loc_and_log_scale(context)
        return PolarStudentT(1 + self.log_df(context).exp(), loc, log_scale.exp())


class PolarStudentT(TorchDistribution):
    """Independent Student t distributions drawn by Bailey's method from two uniforms, with gradients in all parameters.

    Args:
        df, loc, scale: (*batch, d); df > 1 and scale > 0.

    >>> df = torch.full((3,), 2.5, requires_grad=True)
    >>> PolarStudentT(df, torch.zeros(3), torch.ones(3)).rsample((5,)).requires_grad
    True
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch reads it from the class
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> PolarStudentT:
        # the parameters broadcast against the noise, so that only the shape of the noise changes
        new = self._get_checked_instance(PolarStudentT, _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = Size(batch_shape)
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Infinite where df is 2 or less."""
        finite = self.scale.square() * self.df / (self.df - 2)
        return torch.where(self.df > 2, finite, torch.inf).expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        shape, dtype, device = self._extended_shape(Size(sample_shape)), self.loc.dtype, self.loc.device
        # Both ends are cut by half a step of the generator: log 0 is infinite, and so is the slope of sqrt at 0.
        eps = torch.finfo(dtype).eps
        u = torch.rand(shape, dtype=dtype, device=device).clamp(eps / 4, 1 - eps / 2)
        v = torch.rand(shape, dtype=dtype, device=device)
        radius = torch.sqrt(self.df * torch.expm1(-2 * u.log() / self.df))
        return self.loc + self.scale * radius * torch.cos(2 * math.pi * v)

    def log_prob(self, value: Tensor) -> Tensor:
        y = (value - self.loc) / self.scale
        normaliser = _log_gamma_step(0.5 * self.df) - 0.5 * torch.log(math.pi * self.df) - self.scale.log()
        return (normaliser - 0.5 * (self.df + 1) * torch.log1p(y.square() / self.df)).sum(-1)


def _log_gamma_step(x: Tensor) -> Tensor:
    """log Gamma(x + 1/2) - log Gamma(x) for x >= 1/2, to 1e-12.

    The difference of two lgammas loses all digits of float32 at a million degrees of freedom. Eight steps of the
    recursion of Gamma, then Stirling's series for the difference.
    """
    k = torch.arange(8, dtype=x.dtype, device=x.device)
    steps = torch.log1p(-0.5 / (x.unsqueeze(-1) + k + 0.5)).sum(-1)
    y = x + 8
    series = 0.5 * y.log() - 1 / (8 * y) + 1 / (192 * y**3) - 1 / (640 * y**5) + 17 / (14336 * y**7)
    return steps + series
