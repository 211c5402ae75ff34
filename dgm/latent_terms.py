"""What one run of a pair says of each local latent coordinate: its value, and its share of KL(q || p)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.distributions.transforms import biject_to
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Normal as TorchNormal

from .distributions import FamilyDistribution
from .pair import Pair
from .row_terms import by_row
from .sites import Site

__all__ = ["Moments", "latent_terms"]


def latent_terms(pair: Pair, sites: Sequence[Site], batch: Sequence[Any]) -> tuple[Tensor, ...]:
    r"""One run: `(u, mean, kl, cross, log_ratio)`, `(B, D)` for the D unconstrained coordinates, the last `(B,)`.

    u: a draw. mean: that of q where q is a normal density of independent coordinates, else the draw. cross: -log p(u_j)
    where the prior's coordinates are independent, else NaN. log_ratio: log q(z) - log p(z). kl: the closed form where
    the prior is normal as well, else NaN,

    .. math:: \log \frac{s_p}{s_q} + \frac{s_q^2 + (m_q - m_p)^2}{2 s_p^2} - \frac12
    """
    guide = poutine.trace(pair.run_guide).get_trace(*batch)
    model = poutine.trace(poutine.replay(pair.run_model, trace=guide)).get_trace(*batch)
    guide.compute_log_prob()
    model.compute_log_prob()
    names = {site.name for site in sites}
    normals = _normals(guide)
    columns: list[tuple[Tensor, ...]] = []
    ratio: Any = 0.0
    for sign, trace in ((1.0, guide), (-1.0, model)):
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or node["is_observed"] or not (name in names or trace is guide):
                continue
            frame = next((f for f in node["cond_indep_stack"] if f.name == sites[0].plate), None)
            if frame is not None:
                ratio = ratio + sign * by_row(torch.as_tensor(node["log_prob"]), node, frame)
    for site in sites:
        raw, q, kl, cross = _coordinates(model.nodes[site.name], normals.get(site.name))
        columns.append(tuple(_rows(t, raw, site) for t in (raw, raw if q is None else q[0], kl, cross)))
    return *(torch.cat(parts, -1) for parts in zip(*columns, strict=True)), ratio


def _coordinates(node: Any, q: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
    """The unconstrained value of a site, location and scale of q there, and the terms of each coordinate."""
    value, prior = node["value"], _base(node["fn"])
    transform = biject_to(node["fn"].support)
    raw = transform.inv(value)
    unknown = torch.full_like(raw, math.nan)
    if q is not None and q[0].shape[-raw.dim() :] != raw.shape:
        q = tuple(t.expand(raw.shape) for t in q)  # type: ignore[assignment]
    kl = cross = unknown
    if raw.shape == value.shape and not prior.event_shape:
        own = biject_to(prior.support)
        cross = -(prior.log_prob(value) + own.log_abs_det_jacobian(own.inv(value), value)).expand(raw.shape)
    if q is not None and isinstance(prior, TorchNormal):
        loc, scale = q
        gap = (scale.square() + (loc - prior.loc).square()) / (2 * prior.scale.square())
        kl = (prior.scale.log() - scale.log() + gap - 0.5).expand(raw.shape)
    return raw, q, kl, cross


def _normals(guide: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Location and scale, unconstrained, of the latents that a guide gives independent normal coordinates."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, node in guide.nodes.items():
        if node["type"] != "sample" or node["is_observed"]:
            continue
        fn = _base(node["fn"])
        if not isinstance(fn, Normal | TorchNormal):
            continue
        packing = node["infer"].get("packing")
        shape = node["value"].shape
        loc, scale = fn.loc.expand(shape), fn.scale.expand(shape)
        if packing is None:
            found[name.removesuffix("_unconstrained")] = (loc, scale)  # the suffix is that of Pyro's AutoNormal
        else:
            scales = packing.parts(scale)
            found.update((site, (part, scales[site])) for site, part in packing.parts(loc).items())
    return found


def _base(fn: Any) -> Distribution:
    """The distribution of the coordinates, where only dimensions were declared as an event."""
    while isinstance(fn, Independent | FamilyDistribution):
        fn = fn.base if isinstance(fn, FamilyDistribution) else fn.base_dist
    return fn


def _rows(tensor: Tensor, raw: Tensor, site: Site) -> Tensor:
    """`(B, coordinates)` of a site's unconstrained tensor."""
    events = len(biject_to(site.support).inverse_shape(site.batch_shape + site.event_shape)) - len(site.batch_shape)
    rows = tensor.expand(raw.shape).movedim(raw.dim() - events + site.plate_frame.dim, 0)
    return rows.reshape(rows.shape[0], -1)


@dataclass
class Moments:
    """Sums over draws of the terms of a chunk of rows, in float64."""

    count: int = 0

    def update(self, parts: Sequence[Tensor]) -> Moments:
        """Take in the terms of s runs, `(s, B, D)` each and `(s, B)`."""
        u, mean, kl, cross, ratio = (part.double() for part in parts)
        if self.count == 0:
            self.shift = u[0].clone()  # near the mean, so that squares lose no digits
            self.sums = [torch.zeros_like(t[0]) for t in (u, u, mean, mean, kl, cross, ratio)]
        a, b = u - self.shift, mean - self.shift
        for total, term in zip(self.sums, (a, a * a, b, b * b, kl, cross, ratio), strict=True):
            total += term.sum(0)
        self.count += len(u)
        return self

    @property
    def variance(self) -> Tensor:
        """(B, D): variance of the draws of each coordinate."""
        return self._variance(self.sums[0], self.sums[1])

    @property
    def mean(self) -> Tensor:
        """(B, D): E_q[u | x]."""
        return self.shift + self.sums[2] / self.count

    @property
    def noise(self) -> Tensor:
        """(B, D): the variance that `mean` has by the chance of the draws."""
        return self._variance(self.sums[2], self.sums[3]) / self.count

    @property
    def kl(self) -> Tensor:
        """(B, D): the closed form of each coordinate, NaN where there is none."""
        return self.sums[4] / self.count

    @property
    def by_moments(self) -> Tensor:
        r"""(B, D): :math:`E_q[-\log p(u_j)] - \frac12 \log 2 \pi e v_j`, at most KL(q_j || p_j); NaN where unknown.

        Of all densities with variance v the normal one has the largest entropy. The logarithm's own bias is taken out.
        """
        half = torch.tensor((self.count - 1) / 2, dtype=torch.float64)
        log_variance = self.variance.clamp(min=1e-300).log() - (torch.digamma(half) - half.log())
        return self.sums[5] / self.count - 0.5 * (log_variance + math.log(2 * math.pi * math.e))

    @property
    def ratio(self) -> Tensor:
        """(B,): KL(q || p) of a row by its draws."""
        return self.sums[6] / self.count

    def _variance(self, total: Tensor, squares: Tensor) -> Tensor:
        return ((squares - total * total / self.count) / (self.count - 1)).clamp(min=0.0)
