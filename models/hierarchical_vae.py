"""Hierarchical VAE: L stochastic layers, each a learned conditional normal given the one above."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm.errors import ModelError, OptionError

from .likelihoods import Distribution, Likelihood
from .vae import Activation, DecoderModel, network

__all__ = ["HierarchicalVAE", "example"]

_ONE = math.log(math.e - 1)  # softplus of it is 1


class HierarchicalVAE(DecoderModel):
    """z_L ~ N(0, I),  z_l | z_(l+1) ~ N(mu_l(z_(l+1)), sigma_l(z_(l+1))^2),  x | z_1 ~ likelihood(decoder(z_1)).

    The generative half of Sonderby, Raiko, Maaloe, Sonderby and Winther, "Ladder Variational Autoencoders", 2016. The
    latents are the layers themselves, so their posterior moves with the weights; DeepLatentGaussian has the noises for
    latents instead. sigma is a softplus that starts near 1. Without hidden layers, with constant sigma and a normal
    likelihood, x is normal and its evidence exact. Sites: "z_1" .. "z_L", local in "data", drawn from the top; "x"
    observed.

    Args:
        features: number of columns of x.
        latents: dimensions of z_1 .. z_L, the layer next to the data first.
        hidden: widths of the hidden layers of the decoder and of every conditional prior.
        likelihood: p(x | decoder output), copied; default Bernoulli() for x in {0, 1}.
        activation: makes the activation between layers.
        image_shape: how plots fold a row of x, as (8, 8).

    Raises:
        OptionError: no layer, a size below 1, or an image shape with another number of pixels.
        ModelError: a likelihood that needs a BNN, data of another width, or a latent missing from `decode`.

    >>> model = HierarchicalVAE(6, latents=(3, 2), hidden=(8,))
    >>> model.prior("z_1", torch.zeros(4, 2)).event_shape, model.sample(5).shape
    (torch.Size([3]), torch.Size([5, 6]))
    """

    def __init__(
        self,
        features: int,
        latents: Sequence[int] = (20, 10),
        hidden: Sequence[int] = (200,),
        likelihood: Likelihood | None = None,
        activation: Activation = nn.ReLU,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        if not latents:
            raise OptionError("HierarchicalVAE(latents=()): expected at least one stochastic layer, as (20, 10)")
        super().__init__(features, latents[0], hidden, likelihood, activation, image_shape)
        self.latents = tuple(latents)
        below_above = itertools.pairwise(latents)
        self.priors = nn.ModuleList(network([above, *hidden, 2 * below], activation) for below, above in below_above)

    @property
    def names(self) -> list[str]:
        """Site names in the order of the program, from the top: "z_L" .. "z_1"."""
        return [f"z_{layer}" for layer in range(len(self.latents), 0, -1)]

    def forward(self, x: Tensor) -> None:
        """The Pyro program, for x of shape (B, features)."""
        self._check(x)
        with pyro.plate("data", len(x)):
            z = None
            for name in self.names:
                z = pyro.sample(name, self.prior(name, z))  # (B, size)
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    def prior(self, name: str, above: Tensor | None = None) -> Distribution:
        """p(z_l | z_(l+1)) of the site of this name; `above` is z_(l+1) (..., size), None for the top layer."""
        layer = int(name.removeprefix("z_"))
        if layer == len(self.latents):
            return dist.Normal(self.zero.expand(self.latents[-1]), 1.0).to_event(1)
        loc, raw = self.priors[layer - 1](above).chunk(2, -1)
        return dist.Normal(loc, F.softplus(raw + _ONE)).to_event(1)

    def code(self, **latents: Tensor) -> Tensor:
        """z_1, whatever the layers above it are."""
        if set(latents) != set(self.names):
            raise ModelError(f"decode: expected the latents {self.names}, got {sorted(latents)}; give each by name")
        return latents["z_1"]

    def prior_code(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of z_1 from the prior."""
        z = self._normal(n, self.latents[-1], generator)
        for name, size in zip(self.names[1:], self.latents[-2::-1], strict=True):
            prior = self.prior(name, z)
            z = prior.mean + prior.stddev * self._normal(n, size, generator)
        return z


def example() -> tuple[HierarchicalVAE, tuple[Tensor, ...]]:
    """A tiny model of two stochastic layers and 20 rows of 12 binary features."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = HierarchicalVAE(12, latents=(3, 2), hidden=(16,), image_shape=(3, 4))
        return model, (model.sample(20),)
