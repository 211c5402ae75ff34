"""Bayesian linear regression with known noise: evidence and posterior are known exactly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from dgm.errors import ModelError, OptionError

from .likelihoods import Distribution

__all__ = ["BayesianLinearRegression", "example"]


class BayesianLinearRegression(PyroModule):
    """w ~ N(0, prior_scale^2 I),  y_n | x_n, w ~ N(w' x_n, noise^2).

    Bishop, "Pattern Recognition and Machine Learning", 2006, section 3.3. Sites: "w", global; "y" (N,), observed in
    "data". The model has no parameters. Its numbers have the dtype of x.

    Args:
        features: number of columns of x.
        prior_scale: standard deviation of each weight a priori.
        noise: standard deviation of y about its mean, in units of y.
        intercept: add a column of ones: w has one more entry, the last, with the same prior.

    Raises:
        OptionError: features < 1, or a scale that is not a finite number > 0.
        ModelError: x or y of another shape.

    >>> model, (x, y) = example()
    >>> model.posterior(x, y).event_shape, model.log_evidence(x, y).shape
    (torch.Size([3]), torch.Size([]))
    """

    def __init__(self, features: int, prior_scale: float = 1.0, noise: float = 1.0, intercept: bool = False) -> None:
        super().__init__()
        if features < 1:
            raise OptionError(f"BayesianLinearRegression(features={features}): expected a positive number")
        for name, value in (("prior_scale", prior_scale), ("noise", noise)):
            if not 0 < value < float("inf"):
                raise OptionError(f"BayesianLinearRegression({name}={value!r}): expected a finite number > 0")
        self.features, self.prior_scale, self.noise, self.intercept = features, prior_scale, noise, intercept

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """The Pyro program, for x (N, features) and y (N,), or None to draw y. Returns "loc" (N,) and "scale" ()."""
        design = self._design(x, y)
        w = pyro.sample("w", dist.Normal(torch.zeros_like(design[0]), self.prior_scale).to_event(1))
        # a product and a sum, not a matrix product: particles on the left of w then broadcast
        parts = {"loc": (design * w).sum(-1), "scale": x.new_full((), self.noise)}
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(parts["loc"], parts["scale"]), obs=y)
        return parts

    def log_evidence(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x) = log N(y; 0, noise^2 I + prior_scale^2 X X'), exact, one number for the whole of y."""
        design = self._design(x, y)
        diagonal = x.new_full((len(x),), self.noise**2)
        return dist.LowRankMultivariateNormal(torch.zeros_like(diagonal), self.prior_scale * design, diagonal).log_prob(
            y
        )

    def posterior(self, x: Tensor, y: Tensor) -> Distribution:
        """p(w | x, y) = N(P^-1 X' y / noise^2, P^-1) with P = X' X / noise^2 + I / prior_scale^2, exact."""
        design = self._design(x, y)
        eye = torch.eye(design.shape[1], dtype=x.dtype, device=x.device)
        precision = design.mT @ design / self.noise**2 + eye / self.prior_scale**2
        mean = torch.linalg.solve(precision, design.mT @ y / self.noise**2)
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def _design(self, x: Tensor, y: Tensor | None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ModelError(
                f"BayesianLinearRegression: expected x of shape (N, {self.features}), got {tuple(x.shape)}"
            )
        if y is not None and y.shape != (len(x),):
            raise ModelError(
                f"BayesianLinearRegression, site 'y': expected targets of shape ({len(x)},), got {tuple(y.shape)}"
                + ("; use y.squeeze(-1)" if y.shape == (len(x), 1) else "")
            )
        return torch.cat([x, torch.ones_like(x[:, :1])], 1) if self.intercept else x


def example() -> tuple[BayesianLinearRegression, tuple[Tensor, ...]]:
    """A regression on two inputs and an intercept, and 20 rows drawn from it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator)
    y = x @ torch.tensor([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(20, generator=generator)
    return BayesianLinearRegression(2, noise=0.5, intercept=True), (x, y)
