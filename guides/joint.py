"""A global and a local guide together: Bayesian weights with amortized latents, or whichever kinds a model has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.errors import GuideError
from dgm.sites import DATA_PLATE, latents

from .amortized import Amortized
from .diagonal_normal import DiagonalNormal
from .discrete import Discrete
from .global_ import Global

__all__ = ["Joint"]


class Joint(PyroModule):
    """q(w) prod_n q(z_n | x_n): Global for the latents of all rows, Amortized for those of each, as the model has them.

    It fits any model, so it is what `compare` and the command line use: a VAE gets the amortized part alone, a Bayesian
    network the global part alone. Discrete latents get parts of their own (`Discrete`), unless the model marks them to
    be enumerated: those are left out.

    Args:
        model: the model; only its sites are read.
        batch: data, as the model takes it.
        family: the family of both parts, unless they are given.
        encoder: the encoder of the amortized part, unless it is given.
        local: a guide `(model, *batch, sites=...) -> guide` for the local latents of one plate.
        global_: the same for the global latents.
        discrete: the same for the discrete latents, global ones and those of each plate.
        plates: names of the data plates.

    Raises:
        GuideError: the model has no latent at all.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, s), obs=x)
    >>> values = Joint(model, torch.zeros(5))(torch.zeros(5))
    >>> values["s"].shape, values["z"].shape
    (torch.Size([]), torch.Size([5]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = DiagonalNormal,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        local: Callable[..., nn.Module] | None = None,
        global_: Callable[..., nn.Module] | None = None,
        discrete: Callable[..., nn.Module] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        plates = tuple(plates)
        found = latents(model, *batch, plates=plates)
        served = [site for site in found.values() if not (site.discrete and site.enumerated)]
        if not served:
            raise GuideError("the model has no latent to sample: there is nothing for a guide to do")
        self.parts: list[str] = []
        outside = [site.name for site in served if site.plate is None and not site.discrete]
        if outside:
            make = global_ if global_ is not None else partial(Global, family=family)
            self._add("global_", make(model, *batch, sites=outside, plates=plates))
        for plate in dict.fromkeys(site.plate for site in served if site.plate is not None and not site.discrete):
            inside = [site.name for site in served if site.plate == plate and not site.discrete]
            make = local if local is not None else partial(Amortized, family=family, encoder=encoder)
            self._add(f"local_{plate}", make(model, *batch, sites=inside, plates=plates))
        for where in dict.fromkeys(site.plate for site in served if site.discrete):
            finite = [site.name for site in served if site.plate == where and site.discrete]
            make = discrete if discrete is not None else partial(Discrete, encoder=encoder)
            name = "discrete" if where is None else f"discrete_{where}"
            self._add(name, make(model, *batch, sites=finite, plates=plates))

    def _add(self, name: str, part: nn.Module) -> None:
        setattr(self, name, part)
        self.parts.append(name)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        values: dict[str, torch.Tensor] = {}
        for name in self.parts:
            part = getattr(self, name)
            told = {"given": dict(values)} if getattr(part, "conditional", False) else {}  # q(z | x, w)
            values.update(part(*batch, **told, **kwargs) or {})
        return values
