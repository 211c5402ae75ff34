"""Auxiliary latents: a guide that is a continuous mixture of a family, by a latent of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.runtime import InferDict
from torch import Tensor, nn

from dgm.distributions import as_pyro, auxiliary, sample_sites
from dgm.errors import GuideError
from dgm.packing import Packing
from dgm.sites import DATA_PLATE, latents

from .amortized import DataPlate, encoded, local_sites
from .diagonal_normal import DiagonalNormal
from .domains import check_size
from .family import make_family

__all__ = ["Auxiliary"]


class Auxiliary(PyroModule):
    """q(z_n | x_n) = integral of q(a | x_n) q(z_n | a, x_n) da, bounded by a reverse model r(a | x_n, z_n).

        ELBO = E_q(a, z | x) [log p(x, z) + log r(a | x, z) - log q(a | x) - log q(z | a, x)]

    It is below the ELBO of the marginal q(z | x) by E KL(q(a | x, z) || r(a | x, z)), and so below the evidence.
    (Maaloe, Sonderby, Sonderby and Winther, "Auxiliary Deep Generative Models", 2016; Ranganath, Tran and Blei,
    "Hierarchical Variational Models", 2016.) -log r enters at a site of the guide, so that every log weight is an
    importance weight on the space of (a, z). q(a | x) and r are diagonal normals; q(z | a, x) is any conditional
    density, its context a layer on the encoder's output and a.

    Starts: a standard normal in a, and q(z | a, x) as the family starts, location 0 and scale 1. Attaches as Amortized
    does, to continuous local latents of one data plate. A sample costs two small layers more than Amortized, and none
    of the model.

    Args:
        model: the model; only its sites are read.
        batch: data, as the model takes it.
        family: `family(features, context=c)` makes q(z | a, x), a density on R^d.
        encoder: a factory `in_features -> module`, or a ready module `(B, in_features) -> (B, c)`.
        features_aux: dimension of a, at least 1; default that of z.
        sites, inputs, plates: as of `Amortized`.

    Raises:
        GuideError: as of Amortized; or the family has no density (a point): r could then grow without bound.
        OptionError: features_aux < 1.

    >>> from dgm.models.vae import example
    >>> from .encoders import mlp
    >>> model, batch = example()
    >>> Auxiliary(model, *batch, encoder=mlp(16), features_aux=3)(*batch)["z"].shape
    torch.Size([20, 2])
    """

    reverse_density = True  # a part of its log q is learned for the bound's sake and may not be held fixed

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = DiagonalNormal,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        features_aux: int | None = None,
        sites: Iterable[str] | None = None,
        inputs: Iterable[str | int] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        chosen = local_sites(latents(model, *batch, plates=plates), sites, type(self).__name__)
        self.packing = Packing(chosen)
        self.plate = DataPlate(chosen[0], batch)
        self.features, self.encoder, width = encoded(model, batch, self.plate.rows, encoder, inputs, self.packing.dtype)
        size = self.packing.size
        self.family = make_family(family, size, width, dtype=self.packing.dtype)
        if not getattr(self.family, "has_density", True):
            raise GuideError(
                f"Auxiliary: {type(self.family).__name__} has no density, and where z is a function of a the reverse "
                "model's grows without bound: give a family with a density, as DiagonalNormal"
            )
        features = size if features_aux is None else features_aux
        check_size("Auxiliary: features_aux", features, why="; Amortized has none")
        self.start = DiagonalNormal(features, context=width)
        self.mix = nn.Sequential(nn.Linear(width + features, width), nn.ReLU())
        self.back = nn.Sequential(nn.Linear(width + size, width), nn.ReLU())
        self.reverse = DiagonalNormal(features, context=width)
        self.to(self.packing.dtype)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        context = self.encoder(self.features(batch))  # (B, c)
        name, own = f"_{self.packing.plate}", InferDict(is_auxiliary=True)
        with self.plate.open(batch) as shape:
            context = context.reshape(*shape, context.shape[-1])
            a = pyro.sample(f"{name}_auxiliary", self.start(context), infer=own)  # (*S, B, aux)
            density = self.family(self.mix(_beside(context, a)))
            u = pyro.sample(name, as_pyro(density), infer=auxiliary(self.packing))  # (*S, B, d)
            log_r = self.reverse(self.back(_beside(context, u))).log_prob(a)  # (*S, B)
            pyro.sample(f"{name}_reverse", dist.Delta(torch.zeros_like(log_r), -log_r), infer=own)
            return sample_sites(self.packing, u)


def _beside(context: Tensor, drawn: Tensor) -> Tensor:
    return torch.cat([context.expand(*drawn.shape[:-1], context.shape[-1]), drawn], -1)
