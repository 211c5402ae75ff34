"""Discrete: independent probabilities for latents with finitely many values, by an encoder or free."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor, nn
from torch.distributions import constraints

from dgm.errors import GuideError
from dgm.packing import inner_shape, spread
from dgm.sites import DATA_PLATE, Site, latents

from .amortized import DataPlate, encoded
from .global_ import select
from .heads import Head

__all__ = ["Discrete"]


class Discrete(PyroModule):
    """q(c | x) = prod_i Categorical(c_i; softmax(theta_i(x))): every discrete latent by itself, given the data.

    Local latents have logits linear in the encoder's context, global ones free logits; all start uniform in the mean.
    Each site keeps its kind: Bernoulli, Categorical, OneHotCategorical. A. Mnih, K. Gregor: Neural Variational
    Inference and Learning in Belief Networks, 2014.

    There is no pathwise gradient: `Trace_ELBO` takes the score function, and the step stays eager. With `enumerate`,
    `TraceEnum_ELBO` takes the expectation over q exactly instead. Where the model marks a site to be enumerated, it is
    summed out of the model and needs no guide. The number of parameters is K (or 1 for Bernoulli) for each value of a
    site without an encoder, and that times c + 1 for a context of c features; a sample costs one pass.

    Args:
        model: the model; only its sites are read.
        batch: data, as the model takes it.
        encoder: for local latents, as `Amortized` takes it.
        sites: names of the latents to serve, all global or all in one data plate; default all discrete ones.
        inputs: for local latents, as `Amortized` takes it.
        enumerate: "parallel" or "sequential" marks the guide's sites for `TraceEnum_ELBO`.
        plates: names of the data plates.

    Raises:
        GuideError: a site is continuous or has infinitely many values, sites stand in different plates, or there is
            none.

    >>> from dgm.models.gaussian_mixture import example
    >>> model, (x,) = example()
    >>> Discrete(model, x)(x)["c"].shape
    torch.Size([20])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        sites: Iterable[str] | None = None,
        inputs: Iterable[str | int] | None = None,
        enumerate: Literal["parallel", "sequential"] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        found = latents(model, *batch, plates=plates)
        chosen = select(found, sites)
        if sites is None:
            _refuse_continuous([site for site in chosen if not site.discrete])
        if not chosen:
            raise GuideError("the model has no discrete latent to sample: use Global, Amortized or Joint")
        if len({site.plate for site in chosen}) > 1:
            where = sorted({str(site.plate) for site in chosen})
            raise GuideError(f"the discrete latents stand in different plates ({', '.join(where)}): Joint serves each")
        self.enumerate = enumerate
        self.tables = [_Table(site) for site in chosen]
        sizes = [table.size for table in self.tables]
        self.plate: DataPlate | None = None
        width = 0
        floats = (site.value.dtype for site in chosen if site.value is not None and site.value.is_floating_point())
        dtype = next(floats, None)  # a Categorical has none: then that of the data
        if chosen[0].plate is not None:
            self.plate = DataPlate(chosen[0], batch)
            self.features, self.encoder, width = encoded(model, batch, self.plate.rows, encoder, inputs, dtype)
        self.sizes = sizes
        self.logits = Head(sum(sizes), width)
        self.logits.to(self.features.shift.dtype if self.plate is not None else dtype)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.plate is None:
            return self._sample(self.logits(None))
        theta = self.logits(self.encoder(self.features(batch)))  # (B, total)
        with self.plate.open(batch, site=False) as shape:  # beside another guide of the same rows, in Joint
            return self._sample(theta.reshape(*shape, theta.shape[-1]))

    def _sample(self, theta: Tensor) -> dict[str, Tensor]:
        values = {}
        for table, part in zip(self.tables, theta.split(self.sizes, -1), strict=True):
            with contextlib.ExitStack() as stack:
                for frame in table.site.frames:
                    if frame.name != table.site.plate:
                        stack.enter_context(IndepMessenger(frame.name, frame.size, frame.dim))
                infer: Any = {"enumerate": self.enumerate} if self.enumerate else {}
                values[table.site.name] = pyro.sample(table.site.name, table.density(part), infer=infer)
        return values


class _Table:
    """The logits of one site: how many there are, and the distribution that they make."""

    def __init__(self, site: Site):
        self.site = site
        if not site.discrete:
            _refuse_continuous([site])
        support = site.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        event = tuple(site.event_shape)
        if support is constraints.boolean:
            self.make, self.shape, self.dims = dist.Bernoulli, event, len(event)
        elif support is constraints.one_hot:
            self.make, self.shape, self.dims = dist.OneHotCategorical, event, len(event) - 1
        elif _is_categorical(support):
            self.make, self.shape, self.dims = dist.Categorical, (*event, support.upper_bound + 1), len(event)
        else:
            raise GuideError(
                f"latent {site.name!r} has the support {site.support_name}: Discrete serves finitely many values "
                "of a Bernoulli, Categorical or OneHotCategorical; write it as one of these, or sum the latent out of "
                "the model by hand"
            )
        self.rest = inner_shape(site)
        self.size = math.prod(self.rest) * math.prod(self.shape)

    def density(self, theta: Tensor) -> Any:
        """The site's distribution, from (*batch, size)."""
        density = self.make(logits=spread(theta, self.rest, torch.Size(self.shape)), validate_args=False)
        return density.to_event(self.dims) if self.dims else density


def _is_categorical(support: Any) -> bool:
    """Integers 0..K-1, one K for all rows; a Binomial's bound is a tensor with one entry for each."""
    interval = isinstance(support, type(constraints.integer_interval(0, 1)))
    return interval and support.lower_bound == 0 and isinstance(support.upper_bound, int)


def _refuse_continuous(sites: list[Site]) -> None:
    if sites:
        raise GuideError(
            f"latent {sites[0].name!r} is continuous ({sites[0].support_name}), Discrete serves discrete ones: use "
            "Joint, which serves each kind, or name the discrete ones by sites=[...]"
        )
