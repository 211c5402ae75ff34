"""One density over a vector of all unconstrained global latents (weights, scales, coefficients)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import Affine, as_pyro, auxiliary, sample_sites
from dgm.errors import GuideError
from dgm.packing import Packing
from dgm.sites import DATA_PLATE, Latents, latents, start_values

from .diagonal_normal import DiagonalNormal
from .domains import check_scale
from .family import make_family

__all__ = ["Global"]


class Global(PyroModule):
    """q(w) = F(u) |du/dw| with one density F of a family over the unconstrained vector u of all global latents.

    Args:
        model: the model; only its sites are read.
        batch: a batch of data, as the model takes it.
        family: `family(features)` makes a density on R^d: those of `dgm.guides`, or zuko's flows as they stand.
        sites: names of the latents to serve; default all.
        init: constrained start values by site name; otherwise the model's `init_values()`, else the prior's median.
        init_scale: standard deviation at the start, unconstrained; else the model's `init_scale`, else the family's.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is local (one for each row), a name is unknown, or there is no global latent.
        ModelError: a latent is discrete.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(0.0, s), obs=x)
    >>> guide = Global(model, torch.ones(5))
    >>> guide(torch.ones(5))["s"].shape
    torch.Size([])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = DiagonalNormal,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        found = latents(model, *batch, plates=plates)
        chosen = select(found, sites)
        for site in chosen:
            if site.plate is not None:
                raise GuideError(
                    f"latent {site.name!r} is one for each row (plate {site.plate!r}), Global has one vector for all: "
                    "use Amortized or Free for it, or Joint for a model that has both kinds"
                )
        if not chosen:
            raise GuideError("the model has no global latent: use Amortized or Free for local ones")
        self.packing = Packing(chosen)
        start = self.packing.pack(start_values(model, batch, chosen, init)).reshape(-1)  # (d,)
        scale = init_scale if init_scale is not None else getattr(model, "init_scale", None)
        self.family = placed(make_family(family, self.packing.size, dtype=start.dtype), start, scale)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        u = pyro.sample("_global", as_pyro(self.family()), infer=auxiliary(self.packing))  # (*S, d)
        return sample_sites(self.packing, u, getattr(self.family, "has_density", True))


def select(found: Latents, names: Iterable[str] | None) -> list[Any]:
    """The sites of these names, or all that are not enumerated.

    Raises:
        GuideError: an unknown name, or a single one that stands in no list.
    """
    if names is None:
        return [site for site in found.values() if not (site.discrete and site.enumerated)]
    if isinstance(names, str):
        raise GuideError(f"sites is {names!r}, expected a list of names: sites=[{names!r}]")
    chosen = []
    for name in names:
        try:
            chosen.append(found[name])
        except KeyError as error:
            raise GuideError(str(error.args[0])) from None
    return chosen


class Placed(nn.Module):
    """A family that cannot be told where to start (zuko's flows), behind a location and a scale that can.

    u = loc + exp(log_scale) v,    v ~ family
    """

    def __init__(self, family: nn.Module, start: Tensor, scale: float):
        super().__init__()
        self.family = family
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(torch.full_like(start, math.log(scale)))

    def forward(self) -> Affine:
        return Affine(self.family(), self.loc, self.log_scale.exp())


def placed(family: nn.Module, start: Tensor, scale: float | None = None) -> nn.Module:
    """The family with its start at a point; at `scale` about it, or at the family's own, 0.1 where it has none.

    Raises:
        OptionError: a scale that is not positive and finite.
    """
    if scale is not None:
        check_scale("init_scale", scale)
    family = family.to(start.dtype)
    initialise = getattr(family, "initialise", None)
    if initialise is None:
        return Placed(family, start, 0.1 if scale is None else scale)
    initialise(start, scale)
    return family
