"""Models of the moons suite: the density that the moons were drawn from, and a decoder that needs no latent."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.models.vae import network

NOISE = 0.1
"""Standard deviation of the points about their arcs, as `dgm.load` makes them."""
POINTS = 2001


def arcs() -> tuple[Tensor, Tensor]:
    """The two half circles, `(POINTS, 2)` each."""
    angle = torch.linspace(0.0, math.pi, POINTS, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    return upper, torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)


def log_densities(x: Tensor) -> Tensor:
    """log p(x | moon) of both moons, `(2, N)`, by the trapezoid rule over the arc.

    p(x | moon) = 1/pi int_0^pi N(x; arc(t), NOISE^2 I) dt

    >>> grid = torch.cartesian_prod(torch.linspace(-2, 3, 101), torch.linspace(-2, 2.5, 91))
    >>> [round(float(p.exp().sum()) * 0.05**2, 3) for p in log_densities(grid)]
    [1.0, 1.0]
    """
    weights = torch.full((POINTS,), 1.0 / (POINTS - 1), dtype=torch.float64)
    weights[[0, -1]] /= 2
    found = []
    for arc in arcs():
        squares = torch.cdist(x.double(), arc, compute_mode="donot_use_mm_for_euclid_dist").square()  # (N, POINTS)
        found.append(torch.logsumexp(-squares / (2 * NOISE**2) + weights.log(), 1))
    return torch.stack(found) - math.log(2 * math.pi * NOISE**2)


def log_truth(x: Tensor) -> Tensor:
    """log p(x) of the density that the points were drawn from, `(N,)`: what no model beats on average."""
    return torch.logsumexp(log_densities(x), 0) - math.log(2)


class StrongDecoder(PyroModule):
    """z_n ~ N(0, I),  x_n1 | z_n ~ mixture(f(z_n)),  x_n2 | x_n1, z_n ~ mixture(g(x_n1, z_n)).

    Each mixture has `components` normals, so that the decoder can be right about every density of the plane and let z
    alone: the case of Bowman et al., "Generating sentences from a continuous space", 2016, in two columns. Sites: "z"
    (latent,), local in "data"; "x" observed.
    """

    def __init__(self, latent: int = 2, hidden: int = 64, components: int = 8) -> None:
        super().__init__()
        self.latent, self.components = latent, components
        self.first = network([latent, hidden, hidden, 3 * components], nn.Tanh)
        self.second = network([1 + latent, hidden, hidden, 3 * components], nn.Tanh)

    def forward(self, x: Tensor) -> None:
        """The Pyro program, for x of shape (B, 2)."""
        prior = dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)  # (B, latent)
            pyro.sample("x1", self._mixture(self.first(z)), obs=x[:, 0])
            seen = torch.cat([x[:, :1].expand(*z.shape[:-1], 1), z], -1)
            pyro.sample("x2", self._mixture(self.second(seen)), obs=x[:, 1])

    def _mixture(self, output: Tensor) -> dist.MixtureSameFamily:
        loc, scale, logits = output.unflatten(-1, (3, self.components)).unbind(-2)
        normals = dist.Normal(loc, 0.02 + nn.functional.softplus(scale))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), normals)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of x from the model, `(n, 2)`."""
        z = torch.randn(n, self.latent, generator=generator)
        first = self._draw(self.first(z), generator)
        return torch.cat([first, self._draw(self.second(torch.cat([first, z], -1)), generator)], -1)

    def _draw(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        mixture = self._mixture(output)
        chosen = torch.multinomial(mixture.mixture_distribution.probs, 1, generator=generator)  # (n, 1)
        normals = mixture.component_distribution
        eps = torch.randn(chosen.shape, generator=generator)
        return normals.loc.gather(-1, chosen) + normals.scale.gather(-1, chosen) * eps
