"""Deep latent Gaussian model: L stochastic layers, each a network of the one above plus Gaussian noise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dgm.errors import ModelError, OptionError

from .likelihoods import Likelihood
from .vae import Activation, DecoderModel, network

__all__ = ["DeepLatentGaussian", "example"]


class DeepLatentGaussian(DecoderModel):
    """h_L = G_L xi_L,  h_l = T_l(h_{l+1}) + G_l xi_l,  xi_l ~ N(0, I),  x | h_1 ~ likelihood(T_0(h_1)).

    Rezende, Mohamed, Wierstra, "Stochastic Backpropagation and Approximate Inference in Deep Generative Models", 2014.
    The noises xi are the latents, so that their prior is standard whatever the weights; T_l are networks and G_l
    square matrices that start at the identity. The paper's Gaussian prior on the weights is left to weight decay.
    Sites: "xi_1" .. "xi_L", local in "data", drawn from the top; "x" observed.

    Args:
        features: number of columns of x.
        latents: dimensions of h_1 .. h_L, the layer next to the data first.
        hidden: widths of the hidden layers of every T_l.
        likelihood: p(x | decoder output), copied; default Bernoulli() for x in {0, 1}.
        activation: makes the activation between layers.
        image_shape: how plots fold a row of x, as (8, 8).

    Raises:
        OptionError: no layer, a size below 1, or an image shape with another number of pixels.
        ModelError: a likelihood that needs a BNN, data of another width, or a latent missing from `decode`.

    >>> model = DeepLatentGaussian(6, latents=(3, 2), hidden=(8,))
    >>> model.decode(xi_1=torch.zeros(4, 3), xi_2=torch.zeros(4, 2)).event_shape
    torch.Size([6])
    """

    def __init__(
        self,
        features: int,
        latents: Sequence[int] = (20, 20),
        hidden: Sequence[int] = (200,),
        likelihood: Likelihood | None = None,
        activation: Activation = nn.ReLU,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        if not latents:
            raise OptionError("DeepLatentGaussian(latents=()): expected at least one stochastic layer, as (20, 20)")
        super().__init__(features, latents[0], hidden, likelihood, activation, image_shape)
        self.latents = tuple(latents)
        below_above = itertools.pairwise(latents)
        self.transitions = nn.ModuleList(network([above, *hidden, below], activation) for below, above in below_above)
        self.mixing = nn.ModuleList(_identity(size) for size in latents)

    @property
    def names(self) -> list[str]:
        """Site names in the order of the program, from the top: "xi_L" .. "xi_1"."""
        return [f"xi_{layer}" for layer in range(len(self.latents), 0, -1)]

    def forward(self, x: Tensor) -> None:
        """The Pyro program, for x of shape (B, features)."""
        self._check(x)
        with pyro.plate("data", len(x)):
            xi = {}
            for name, size in zip(self.names, reversed(self.latents), strict=True):
                prior = dist.Normal(self.zero.expand(size), 1.0).to_event(1)
                xi[name] = pyro.sample(name, prior)  # (B, size)
            pyro.sample("x", self.decode(**xi), obs=x)

    def code(self, **latents: Tensor) -> Tensor:
        """h_1, from the noises xi_1 .. xi_L by name."""
        if set(latents) != set(self.names):
            raise ModelError(f"decode: expected the latents {self.names}, got {sorted(latents)}; give each by name")
        top = len(self.latents)
        h = self.mixing[top - 1](latents[f"xi_{top}"])
        for layer in range(top - 1, 0, -1):
            h = self.transitions[layer - 1](h) + self.mixing[layer - 1](latents[f"xi_{layer}"])
        return h

    def prior_code(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of h_1 from the prior."""
        xi = {
            name: self._normal(n, size, generator)
            for name, size in zip(self.names, reversed(self.latents), strict=True)
        }
        return self.code(**xi)


def _identity(size: int) -> nn.Linear:
    layer = nn.Linear(size, size, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def example() -> tuple[DeepLatentGaussian, tuple[Tensor, ...]]:
    """A tiny model of two stochastic layers and 20 rows of 12 binary features."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = DeepLatentGaussian(12, latents=(3, 2), hidden=(16,), image_shape=(3, 4))
        return model, (model.sample(20),)
