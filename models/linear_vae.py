"""Linear VAE, that is probabilistic PCA: evidence, posterior and the diagonal guide's gap are known exactly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.errors import DataError, ModelError, OptionError

from .likelihoods import Distribution

__all__ = ["LinearVAE", "example"]


class LinearVAE(PyroModule):
    """z_n ~ N(0, I),  x_n | z_n ~ N(W z_n + mu, s^2 I),  so  x_n ~ N(mu, W W' + s^2 I).

    Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999. Sites: "z" (latent,), local in "data";
    "x" observed. Parameters: `weight` W (features, latent), `loc` mu (features,), `log_scale` log s ().

    Args:
        features: number of columns of x.
        latent: dimension of z.
        generator: draws the starting W, with entries N(0, 1 / latent); mu starts at 0 and s at 1.
        dtype: of the parameters.

    Raises:
        OptionError: a size below 1.
        ModelError: data of another width.

    >>> model, x = LinearVAE.simulate(50, features=4, latent=2)
    >>> model.log_evidence(x).shape
    torch.Size([50])
    """

    def __init__(
        self,
        features: int,
        latent: int = 2,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 1 or latent < 1:
            raise OptionError(f"LinearVAE(features={features}, latent={latent}): expected positive sizes")
        self.features, self.latent = features, latent
        weight = torch.randn(features, latent, generator=generator, dtype=dtype) / latent**0.5
        self.weight = nn.Parameter(weight)
        self.loc = nn.Parameter(torch.zeros(features, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros((), dtype=dtype))

    @classmethod
    def simulate(
        cls,
        n: int,
        features: int,
        latent: int = 2,
        scale: float = 0.5,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[LinearVAE, Tensor]:
        """A model with a drawn W, mu = 0 and s = `scale`, and n rows of x drawn from it.

        Raises:
            OptionError: a scale that is not positive.
        """
        if not 0 < scale < float("inf"):
            raise OptionError(f"LinearVAE.simulate(scale={scale!r}): expected a finite number > 0")
        model = cls(features, latent, generator, dtype)
        with torch.no_grad():
            model.log_scale.fill_(scale).log_()
        return model, model.sample(n, generator)

    def forward(self, x: Tensor) -> None:
        """The Pyro program, for x of shape (B, features)."""
        self._check(x)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros_like(self.weight[0]), 1.0).to_event(1)
            z = pyro.sample("z", prior)  # (B, latent)
            pyro.sample("x", self.decode(z), obs=x)

    def decode(self, z: Tensor) -> Distribution:
        """p(x | z), event shape (features,)."""
        return dist.Normal(self.reconstruct(z), self.log_scale.exp()).to_event(1)

    def reconstruct(self, z: Tensor) -> Tensor:
        """E[x | z] = W z + mu, (..., features)."""
        return z @ self.weight.mT + self.loc

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, mean: bool = False) -> Tensor:
        """n draws of x (n, features); with `mean`, E[x | z] of n draws of z.

        The generator lives on the model's device.
        """
        like = self.weight
        z = torch.randn(n, self.latent, generator=generator, dtype=like.dtype, device=like.device)
        if mean:
            return self.reconstruct(z)
        eps = torch.randn(n, self.features, generator=generator, dtype=like.dtype, device=like.device)
        return self.reconstruct(z) + self.log_scale.exp() * eps

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x_n) = log N(x_n; mu, W W' + s^2 I), exact, (N,)."""
        self._check(x)
        variance = (2 * self.log_scale).exp()
        return dist.LowRankMultivariateNormal(self.loc, self.weight, variance.expand(self.features)).log_prob(x)

    def posterior(self, x: Tensor) -> Distribution:
        """p(z_n | x_n) = N(P^-1 W' (x_n - mu) / s^2, P^-1) with P = I + W' W / s^2, exact, batch shape (N,)."""
        self._check(x)
        precision = self.precision()
        projected = (x - self.loc) @ self.weight * (-2 * self.log_scale).exp()  # (N, latent)
        mean = torch.linalg.solve(precision, projected.mT).mT
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def precision(self) -> Tensor:
        """P = I + W' W / s^2, the precision of the posterior of z, the same for every datum."""
        eye = torch.eye(self.latent, dtype=self.weight.dtype, device=self.weight.device)
        return eye + self.weight.mT @ self.weight * (-2 * self.log_scale).exp()

    def diagonal_gap(self) -> Tensor:
        """What the best diagonal normal q must lose: min KL(q || p(z | x)) = (sum_i log P_ii - log det P) / 2, nats.

        At the optimum q has the posterior's mean and the variances 1 / P_ii; the gap is the same for every datum.
        """
        precision = self.precision()
        return (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet) / 2

    @torch.no_grad()
    def fit_closed_form(self, x: Tensor) -> LinearVAE:
        """Maximum likelihood: mu the mean, s^2 the mean of the smaller eigenvalues, W = U (L - s^2 I)^(1/2).

        U and L are the `latent` leading eigenvectors and eigenvalues of the covariance of x, with divisor N
        (Tipping and Bishop, 1999, section 3.2). Returns the model itself.

        Raises:
            ModelError: latent >= features, or data of another width.
            DataError: no variance is left for s, as with constant columns or too few rows.
        """
        self._check(x)
        if self.latent >= self.features:
            raise ModelError(f"fit_closed_form: expected latent < features, got {self.latent} >= {self.features}")
        if len(x) < 2:
            raise DataError(f"fit_closed_form: expected at least 2 rows of x, got {len(x)}")
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).mT @ (x - mean) / len(x))  # ascending
        variance = values[: -self.latent].mean()
        if not variance > values[-1].abs() * torch.finfo(x.dtype).eps * self.features:
            raise DataError(
                f"fit_closed_form: x lies in {self.latent} dimensions or fewer, so that the noise scale would be 0; "
                "give more rows, drop constant columns, or use fewer latents"
            )
        self.loc.copy_(mean)
        self.log_scale.copy_(variance.log() / 2)
        self.weight.copy_(vectors[:, -self.latent :] * (values[-self.latent :] - variance).clamp_min(0).sqrt())
        return self

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ModelError(f"LinearVAE, site 'x': expected data of shape (N, {self.features}), got {tuple(x.shape)}")


def example() -> tuple[LinearVAE, tuple[Tensor, ...]]:
    """A tiny linear VAE at its true parameters and 20 rows of 5 features drawn from it."""
    model, x = LinearVAE.simulate(20, features=5, latent=2, generator=torch.Generator().manual_seed(0))
    return model, (x,)
