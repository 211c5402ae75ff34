"""Last layer: a density for the last linear layer, exact where it is conjugate, and a point for all before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from dgm.curvature import precision
from dgm.distributions import as_pyro, sample_sites
from dgm.errors import GuideError, OptionError
from dgm.linear_calls import LinearCalls, layers_of
from dgm.log_joint import LogJoint
from dgm.packing import Packing
from dgm.sites import DATA_PLATE, start_values

from .full_normal import FullNormal
from .global_ import placed
from .mode import Finished, FixedNormal, global_sites
from .point import Point

__all__ = ["LastLayer"]

LIMIT = 2000
"""Largest last layer whose exact posterior is computed: it takes the inverse of a matrix of this size."""


class LastLayer(Finished):
    """q(w) = delta(w_before) F(w_last): Bayesian in the last linear layer only.

    Snoek et al., "Scalable Bayesian Optimization Using Deep Neural Networks", 2015; Kristiadi, Hein and Hennig, "Being
    Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU Networks", 2020.

    The last layer is that of the last call of `torch.nn.functional.linear` whose weight is a latent: its weight and
    bias get the family, all other latents (a noise scale too) are points, as in `Point`. Training moves both. Where
    log p is quadratic in the last layer given the points (a normal likelihood, a normal prior), `finish` replaces the
    family by the exact posterior given the features, Bayesian linear regression in closed form.

    Args:
        model: the model; global continuous latents, one of them the weight of a linear layer.
        batch: data, as the model takes it.
        family: `family(features)` makes the density of the last layer.
        exact: "auto" replaces it by the exact posterior where there is one; True refuses where there is none; False
            never does.
        sites: names of the latents to serve; all of the model's.
        init: constrained start values by site name, as in `Global`.
        init_scale: standard deviation of the last layer at the start; else the model's `init_scale`, else the family's.
        plates: names of the data plates.

    Attributes:
        has_density: False where latents are points, for log q is that of the last layer alone.
        last: names of the last layer's sites. notes: whether it is exact.
        evaluations: rows whose density `finish` evaluated, one for each column of the precision.

    Parameters: one for each point, and the family's. A sample costs one of the family, or k^2 where exact.

    Raises:
        OptionError: exact is none of these.
        GuideError: a local latent, or no linear layer with a latent weight. In `finish`: exact=True and no closed form.

    >>> from dgm.models.bnn import example
    >>> model, batch = example()
    >>> guide = LastLayer(model, *batch)
    >>> guide.last, len(guide(*batch))
    (['network.2.weight', 'network.2.bias'], 5)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = FullNormal,
        exact: Literal["auto"] | bool = "auto",
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        if exact not in ("auto", True, False):
            raise OptionError(f"LastLayer: exact is {exact!r}, expected 'auto', True or False")
        super().__init__()
        self.exact, self.plates = exact, tuple(plates)
        chosen = global_sites(model, batch, sites, self.plates, "LastLayer")
        start = start_values(model, batch, chosen, init)
        everything = Packing(chosen)
        with torch.no_grad(), LinearCalls() as seen:
            joint = LogJoint(model, [everything], self.plates)
            values = joint.trace(everything.pack(start).reshape(-1), *batch)[1]
        layers = layers_of(seen, values)
        if not layers:
            raise GuideError(
                "LastLayer: the model runs no linear layer (torch.nn.functional.linear) whose weight is a latent: use "
                "Global, whose family is a density of all latents"
            )
        self.last = [name for name in (layers[-1].weight, layers[-1].bias) if name is not None]
        self.before = Packing([site for site in chosen if site.name not in self.last])
        self.packing = Packing([site for site in chosen if site.name in self.last])
        self.point = Point(self.before.size) if self.before.size else None
        if self.point is not None:
            place = self.before.pack(start).reshape(-1)
            self.point.to(place)
            self.point.initialise(place)
        scale = init_scale if init_scale is not None else getattr(model, "init_scale", None)
        mean = self.packing.pack(start).reshape(-1)
        self.family = placed(family(self.packing.size), mean, scale)
        self.posterior = FixedNormal(mean) if self.packing.size <= LIMIT and exact is not False else None
        self.evaluations = 0
        self.open = False  # finish found no closed form

    @property
    def has_density(self) -> bool:
        return self.point is None

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self.point is not None:
            u = pyro.sample("_before", self.point(), infer={"is_auxiliary": True})
            values.update(sample_sites(self.before, u, False))
        q = self.posterior() if self.done and self.posterior is not None else self.family()
        v = pyro.sample("_last", as_pyro(q), infer={"is_auxiliary": True})  # (*S, k)
        values.update(sample_sites(self.packing, v, self.done or getattr(self.family, "has_density", True)))
        return values

    @property
    def notes(self) -> list[str]:
        if self.done:
            return ["LastLayer: the last layer's density is the exact posterior given the points before it"]
        return ["LastLayer: the last layer keeps its trained density, for it has no closed form"] if self.open else []

    def finish(self, model: Callable[..., Any], *data: Any, seed: int = 0) -> None:
        """Replace the last layer's density by its exact posterior given the points, where there is one.

        Args:
            model: the trained model. data: all rows. seed: unused.

        Raises:
            GuideError: exact=True and the log joint density is not quadratic in the last layer.
        """
        if self.exact is False:
            return
        found = None if self.posterior is None else self._conjugate(model, data)
        if found is not None and self.posterior is not None:
            self.posterior.set(*found)
            self.mark()
        elif self.exact is True:
            raise GuideError(
                f"LastLayer(exact=True): log p is not quadratic in {', '.join(self.last)} given the other latents (or "
                f"they have more than {LIMIT} entries), so there is no closed form: it needs a normal likelihood and a "
                "normal prior; take exact='auto'"
            )
        self.open = found is None

    def _conjugate(self, model: Callable[..., Any], data: Any) -> tuple[Tensor, Tensor] | None:
        """Mean and precision of the last layer given the points, where log p is quadratic in it."""
        size, rows = self.packing.size, next((len(x) for x in data if isinstance(x, Tensor) and x.dim()), 1)
        self.evaluations = 3 * rows
        joint = LogJoint(model, [p for p in (self.before, self.packing) if p.size], self.plates)
        like = next(self.parameters())
        zero = torch.zeros(size, dtype=like.dtype, device=like.device)
        start = zero if self.point is None else torch.cat([self.point.loc.bias.detach(), zero])
        columns = torch.arange(len(start) - size, len(start), device=start.device)

        def slope(v: Tensor) -> Tensor:
            return joint.gradient(torch.index_copy(start, 0, columns, v), *data)[1].double()[columns]

        v = torch.cos(torch.arange(size, dtype=zero.dtype, device=zero.device) ** 2)  # of no special direction
        g = [slope(step * v) for step in (0, 1, 2)]
        scale = max(float(one.abs().max()) for one in g)
        if not float((g[2] - 2 * g[1] + g[0]).abs().max()) <= 1e4 * torch.finfo(zero.dtype).eps * scale:
            return None  # the gradient is not linear, or not finite
        matrix = precision(joint, start, data, columns)
        self.evaluations += size * rows
        if int(torch.linalg.cholesky_ex(matrix)[1]):
            return None
        return torch.linalg.solve(matrix, g[0]), matrix
