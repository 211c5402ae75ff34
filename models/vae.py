"""Variational autoencoder: a Gaussian latent, a decoder network, any likelihood."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.errors import ModelError, OptionError

from .likelihoods import Bernoulli, Distribution, Likelihood

__all__ = ["VAE", "example"]

Activation = Callable[[], nn.Module]


def network(sizes: Sequence[int], activation: Activation = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes, input first and output last, with the activation between them.

    Raises:
        OptionError: a size below 1.

    >>> len(network([2, 8, 3]))
    3
    """
    if any(size < 1 for size in sizes):
        raise OptionError(f"layer sizes {tuple(sizes)}: expected positive numbers of units")
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


class DecoderModel(PyroModule):
    """The part that latent variable models share: p(x_n | code_n) = likelihood(decoder(code_n)) at site "x".

    A subclass draws codes (B, latent): `code` from its latents by name, `prior_code` from its prior.
    """

    def __init__(
        self,
        features: int,
        latent: int,
        hidden: Sequence[int],
        likelihood: Likelihood | None,
        activation: Activation,
        image_shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        if image_shape is not None and math.prod(image_shape) != features:
            raise OptionError(f"image_shape={image_shape}: expected {features} pixels, got {math.prod(image_shape)}")
        self.features = features
        self.image_shape = image_shape
        self.likelihood = (Bernoulli() if likelihood is None else likelihood).for_decoder()
        outputs = features * cast(int, self.likelihood.outputs)
        self.decoder = network([latent, *hidden, outputs], activation)
        scales = getattr(self.likelihood, "log_scale", None)
        if scales is not None and scales.ndim and len(scales) != features:
            raise ModelError(f"Normal(features={len(scales)}): expected {features} scales, one for each feature of x")
        # a buffer, so that draws of the prior follow the model's dtype and device
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def code(self, **latents: Tensor) -> Tensor:
        """The decoder's input (..., latent), from the latents by site name."""
        raise NotImplementedError

    def prior_code(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n codes drawn from the prior."""
        raise NotImplementedError

    def decode(self, *args: Tensor, **latents: Tensor) -> Distribution:
        """p(x | latents), event shape (features,)."""
        return self.likelihood(self.decoder(self.code(*args, **latents)))

    def reconstruct(self, *args: Tensor, **latents: Tensor) -> Tensor:
        """E[x | latents], (..., features), in the units of x (for pixel levels, the expected level)."""
        return self.likelihood.mean(self._parts(self.code(*args, **latents)))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, mean: bool = False) -> Tensor:
        """n draws of x (n, features) from the model; with `mean`, E[x | z] of n draws of z, the usual picture.

        The generator lives on the model's device.
        """
        parts = self._parts(self.prior_code(n, generator))
        return self.likelihood.mean(parts) if mean else self.likelihood.draw(parts, generator)

    @torch.no_grad()
    def initialise_output_bias(self, x: Tensor) -> None:
        """Start the decoder at the marginal density of each feature, whatever the latents.

        For binary x the bias is logit(clip(mean(x), 0.001, 0.999)) (Burda, Grosse, Salakhutdinov, "Importance
        Weighted Autoencoders", 2016); other likelihoods do what corresponds.

        Args:
            x: training data (N, features).

        Raises:
            ModelError: x of another width, or without rows.
        """
        self._check(x)
        if len(x) == 0:
            raise ModelError("initialise_output_bias: expected at least one row of x, got none")
        bias = cast(nn.Linear, self.decoder[-1]).bias
        bias.copy_(self.likelihood.output_bias(x).flatten())

    def _normal(self, n: int, size: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(n, size, generator=generator, dtype=self.zero.dtype, device=self.zero.device)

    def _parts(self, code: Tensor) -> dict[str, Tensor]:
        return self.likelihood.parts(self.likelihood.split(self.decoder(code)))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ModelError(
                f"{type(self).__name__}, site 'x': expected data of shape (N, {self.features}), got {tuple(x.shape)}; "
                "flatten images with x.flatten(1), or give the model another number of features"
            )


class VAE(DecoderModel):
    """z_n ~ N(0, I),  x_n | z_n ~ likelihood(decoder(z_n)).

    Kingma and Welling, "Auto-Encoding Variational Bayes", 2014. Sites: "z" (latent,), local in "data"; "x" observed.

    Args:
        features: number of columns of x.
        latent: dimension of z.
        hidden: widths of the decoder's hidden layers, from z to x.
        likelihood: p(x | decoder output), copied; default Bernoulli() for x in {0, 1}.
        activation: makes the activation between layers.
        image_shape: how plots fold a row of x, as (8, 8).

    Raises:
        OptionError: a size below 1, or an image shape with another number of pixels.
        ModelError: a likelihood that needs a BNN, or data of another width.

    >>> model = VAE(6, latent=2, hidden=(8,))
    >>> model.sample(3).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        features: int,
        latent: int = 20,
        hidden: Sequence[int] = (400,),
        likelihood: Likelihood | None = None,
        activation: Activation = nn.ReLU,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(features, latent, hidden, likelihood, activation, image_shape)
        self.latent = latent

    def forward(self, x: Tensor) -> None:
        """The Pyro program, for x of shape (B, features)."""
        self._check(x)
        prior = dist.Normal(self.zero.expand(self.latent), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)  # (B, latent)
            pyro.sample("x", self.decode(z), obs=x)

    def code(self, z: Tensor) -> Tensor:  # type: ignore[override]
        """z itself."""
        return z

    def prior_code(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of z from N(0, I)."""
        return self._normal(n, self.latent, generator)


def example() -> tuple[VAE, tuple[Tensor, ...]]:
    """A tiny VAE and 20 rows of 12 binary features."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = VAE(12, latent=2, hidden=(16,), image_shape=(3, 4))
        return model, (model.sample(20),)
