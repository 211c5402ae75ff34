"""Gaussian mixture: a discrete latent for each row, with exact evidence and posterior."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.errors import ModelError, OptionError

from .likelihoods import Distribution

__all__ = ["GaussianMixture", "example"]


class GaussianMixture(PyroModule):
    """c_n ~ Categorical(pi),  x_n | c_n ~ N(mu_{c_n}, s^2 I),  so  p(x_n) = sum_k pi_k N(x_n; mu_k, s^2 I).

    Bishop, "Pattern Recognition and Machine Learning", 2006, section 9.2. Sites: "c" (), local in "data", discrete; "x"
    observed. Parameters: `loc` mu (components, features), `log_scale` log s (), `logits` log pi + constant
    (components,). The logits of the posterior of c are linear in x, so that a linear encoder finds it exactly.

    Args:
        features: number of columns of x.
        components: number of values of c.
        enumerate: mark c to be summed out by `TraceEnum_ELBO`, in parallel; a guide then leaves it out.
        generator: draws the starting mu, standard normal; s starts at 1 and pi uniform.

    Raises:
        OptionError: a size below 1.
        ModelError: data of another width.

    >>> model, (x,) = example()
    >>> model.log_evidence(x).shape, model.posterior(x).probs.shape
    (torch.Size([20]), torch.Size([20, 3]))
    """

    def __init__(
        self, features: int, components: int = 3, enumerate: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if features < 1 or components < 1:
            raise OptionError(f"GaussianMixture(features={features}, components={components}): expected positive sizes")
        self.features, self.components = features, components
        self.infer: Any = {"enumerate": "parallel"} if enumerate else {}
        self.loc = nn.Parameter(torch.randn(components, features, generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self, x: Tensor) -> None:
        """The Pyro program, for x of shape (B, features)."""
        self._check(x)
        with pyro.plate("data", len(x)):
            prior = dist.Categorical(logits=self.logits)
            infer: Any = dict(self.infer)  # Pyro writes into it
            c = pyro.sample("c", prior, infer=infer)  # (B,)
            pyro.sample("x", self.decode(c), obs=x)

    def decode(self, c: Tensor) -> Distribution:
        """p(x | c), event shape (features,)."""
        return dist.Normal(self.loc[c], self.log_scale.exp()).to_event(1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, mean: bool = False) -> Tensor:
        """n draws of x (n, features); with `mean`, mu_c of n draws of c. The generator lives on the model's device."""
        c = torch.multinomial(self.logits.softmax(-1), n, replacement=True, generator=generator)
        eps = torch.randn(n, self.features, generator=generator, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc[c] if mean else self.loc[c] + self.log_scale.exp() * eps

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x_n) = log sum_k pi_k N(x_n; mu_k, s^2 I), exact, (N,)."""
        return self._log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """p(c_n | x_n), exact, batch shape (N,)."""
        return dist.Categorical(logits=self._log_joint(x))

    def _log_joint(self, x: Tensor) -> Tensor:
        self._check(x)
        every = torch.arange(self.components, device=x.device)
        return self.logits.log_softmax(-1) + self.decode(every).log_prob(x.unsqueeze(-2))  # (N, components)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ModelError(
                f"GaussianMixture, site 'x': expected data of shape (N, {self.features}), got {tuple(x.shape)}"
            )


def example() -> tuple[GaussianMixture, tuple[Tensor, ...]]:
    """A tiny mixture of three components with different weights and 20 rows of 2 features drawn from it."""
    generator = torch.Generator().manual_seed(0)
    model = GaussianMixture(2, components=3, generator=generator)
    with torch.no_grad():
        model.logits.copy_(torch.tensor([0.0, 0.5, -0.5]))
    return model, (model.sample(20, generator),)
