"""Top-down inference for several stochastic layers: the model's own priors, corrected by a bottom-up network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from dgm.errors import GuideError
from dgm.inside import hidden, missing, refuse_unknown
from dgm.packing import Packing
from dgm.sites import DATA_PLATE, Site, latents, trace_once

from .amortized import DataPlate, encoded, local_sites
from .heads import Head

__all__ = ["TopDown"]


class TopDown(PyroModule):
    """q(z_1, ..., z_L | x) = prod_l N(z_l; m_l, s_l^2), each the model's prior times a normal seen from the data.

        1 / s_l^2 = 1 / sigma_l^2 + 1 / sigma^_l^2,    m_l = s_l^2 (mu_l / sigma_l^2 + mu^_l / sigma^_l^2)

    N(mu_l, sigma_l^2) is the prior that the model's program has at the site, given the latents drawn before it;
    (mu^_l, sigma^_l) are the heads of a deterministic network on the data, one layer of it for each site, the last
    site of the program (next to the data) first. The guide runs the program itself, so any number of sites in any order
    is served. Each log sigma^ starts near 0: a site of prior N(0, 1) near scale 0.7, one with a sharp prior near it.
    Being so near the prior it may stay there for good: train with a KL warm-up, as the paper does.
    (Sonderby, Raiko, Maaloe, Sonderby and Winther, "Ladder Variational Autoencoders", 2016.)

    Attaches to every model whose local latents have normal priors, of one data plate; in Joint beside a guide for the
    global ones, whose values it is given. A sample costs the encoder and one run of the model.

    Args:
        model: the model; the guide keeps a reference, its parameters stay the model's.
        batch: data, as the model takes it.
        encoder: a factory `in_features -> module`, or a ready module `(B, in_features) -> (B, c)`.
        sites: names of the latents to serve; must be all the local ones.
        inputs: which of the model's arguments the encoder sees, by name or place; default all that have the rows.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is global, or its prior is not normal, or it is left out.
        ModelError: a latent is discrete.

    >>> from dgm.models.hierarchical_vae import example
    >>> from .encoders import mlp
    >>> model, batch = example()
    >>> TopDown(model, *batch, encoder=mlp(16))(*batch)["z_2"].shape
    torch.Size([20, 2])
    """

    conditional = True

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        sites: Iterable[str] | None = None,
        inputs: Iterable[str | int] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        found = latents(model, *batch, plates=plates)
        chosen = local_sites(found, sites, type(self).__name__)
        refuse_unknown(found, chosen, type(self).__name__)
        priors = trace_once(model, *batch).nodes
        for site in chosen:
            _require_normal(site, priors[site.name]["fn"])
        self.__dict__["model"] = model  # a reference: its parameters are the model's, not the guide's
        self.packing = Packing(chosen)
        self.plate = DataPlate(chosen[0], batch)
        self.features, self.encoder, width = encoded(model, batch, self.plate.rows, encoder, inputs, self.packing.dtype)
        sizes = [block.stop - block.start for block in self.packing.blocks]
        self.up = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in sizes[1:])
        self.seen = nn.ModuleList(Head(size, width) for size in sizes)
        self.log_scale = nn.ModuleList(Head(size, width) for size in sizes)
        self.to(self.packing.dtype)

    def forward(self, *batch: Any, given: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        loc, log_scale = self.bottom_up(*batch)
        combine = _Combine(loc, log_scale, given or {}, self.model)
        plates = {frame.name for site in self.packing.sites for frame in site.frames}
        with hidden(self.model, {*loc, *plates}), combine:
            self.model(*batch, **kwargs)
        return combine.values

    def bottom_up(self, *batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """mu^ and log sigma^ by site name, each in the shape of its site."""
        layers = [self.encoder(self.features(batch))]  # (B, c); the site next to the data first
        for up in self.up:
            layers.append(up(layers[-1]))
        layers.reverse()  # the program begins at the top
        shape = (self.plate.count(batch), *[1] * (-self.plate.dim - 1))
        parts = [
            torch.cat([head(layer) for head, layer in zip(heads, layers, strict=True)], -1).reshape(*shape, -1)
            for heads in (self.seen, self.log_scale)
        ]
        return self.packing.unpack(parts[0])[0], self.packing.unpack(parts[1])[0]


def _require_normal(site: Site, prior: Any) -> None:
    if _normal(prior) is None:
        base = prior
        while isinstance(base, dist.Independent | torch.distributions.Independent):
            base = base.base_dist
        raise GuideError(
            f"TopDown multiplies normal densities, but the prior of {site.name!r} is {type(base).__name__} on "
            f"{site.support_name}: use Amortized for this model, or write the latent as a function of a normal one"
        )


def _normal(prior: Any) -> Any:
    """The normal inside a prior that only declares dimensions as its event, or None."""
    while isinstance(prior, torch.distributions.Independent):
        prior = prior.base_dist
    return prior if isinstance(prior, torch.distributions.Normal) else None


class _Combine(Messenger):
    """Puts the product of prior and likelihood potential in the place of each prior."""

    def __init__(
        self, loc: Mapping[str, Tensor], log_scale: Mapping[str, Tensor], given: Mapping[str, Tensor], model: Any
    ):
        super().__init__()
        self.loc, self.log_scale, self.given, self.model = loc, log_scale, given, model
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if name not in self.loc:
            if name in self.given:
                msg["value"], msg["done"] = self.given[name], True
            elif not msg["infer"].get("_deterministic"):
                raise missing(name, self.model)
            return
        prior = _normal(msg["fn"])
        # precisions by exp, so that an infinite scale of either side leaves the other as it is
        seen, own = (-2 * self.log_scale[name]).exp(), prior.scale.reciprocal().square()
        precision = seen + own
        loc = (seen * self.loc[name] + own * prior.loc) / precision
        msg["fn"] = dist.Normal(loc, precision.rsqrt(), validate_args=False).to_event(msg["fn"].event_dim)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.loc:
            self.values[msg["name"]] = msg["value"]
