"""The aggregate posterior q(z), the mean of q(z | x) over the data: mutual information and distance to the prior."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .bounds import mean_and_standard_error
from .given import held, mapped
from .guide_density import GuideDensity
from .pair import Pair
from .programs import evaluating, preserved_rng
from .row_terms import row_terms
from .sites import Site

__all__ = ["Aggregate", "aggregate"]


@dataclass(frozen=True)
class Aggregate:
    r"""Mutual information of data and latents under q, and what q(z) differs from the prior, in nats.

    With :math:`q(z) = \frac1M \sum_m q(z | x_m)` of M rows,

    .. math:: \underbrace{\tfrac1M \sum_m \mathrm{KL}(q(z | x_m) \,\|\, p(z))}_{\text{kl}}
        = \underbrace{I_q(m; z)}_{\text{information}} + \underbrace{\mathrm{KL}(q(z) \,\|\, p(z))}_{\text{marginal}}

    information: :math:`I_q(m; z)` of these M rows, at most log M; for new data of the same kind it is a lower bound.
    information_upper: with the row itself left out of q(z), an upper bound for new data; the two meet as M grows.
    marginal: KL(q(z) || p(z)) of these rows; marginal_lower is kl - information_upper. Both None where the prior
    depends on the data. Errors are those of a mean over rows.
    """

    kl: float
    kl_se: float
    information: float
    information_se: float
    information_upper: float
    marginal: float | None
    marginal_se: float
    marginal_lower: float | None
    rows: int

    @property
    def limit(self) -> float:
        """log M: no estimate of the information from M rows can be larger."""
        return math.log(self.rows)


def aggregate(
    pair: Pair, sites: Sequence[Site], batch: Sequence[Any], plates: Iterable[str], draws: int = 1, seed: int = 0
) -> Aggregate:
    """Some draws of each row against every row's density: `draws` M^2 densities, in chunks.

    Reference: Hoffman and Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound",
    2016, for the identity; Poole, Ozair, van den Oord, Alemi, Tucker, "On variational bounds of mutual information",
    2019, for the two bounds.

    Raises:
        GuideError: log q at a given z is not known.
    """
    plates = set(plates)
    density = GuideDensity(pair.guide, *batch, plates=plates)
    with evaluating(pair.model, pair.guide), pair.running(), preserved_rng(seed):
        parts = [_Draw(pair, sites, batch, density, plates).terms() for _ in range(draws)]
    own, mixed, without, prior = (torch.stack(terms).mean(0) for terms in zip(*(p[:4] for p in parts), strict=True))
    kl, kl_se = mean_and_standard_error(own - prior)
    information, information_se = mean_and_standard_error(own - mixed)
    upper = (own - without).mean().item()
    marginal, marginal_se = mean_and_standard_error(mixed - prior)
    fixed = parts[0][4]
    return Aggregate(
        kl,
        kl_se,
        information,
        information_se,
        upper,
        marginal if fixed else None,
        marginal_se,
        kl - upper if fixed else None,
        len(own),
    )


class _Draw:
    """One draw of every row: what each row's density says of it."""

    def __init__(
        self, pair: Pair, sites: Sequence[Site], batch: Sequence[Any], density: GuideDensity, plates: Iterable[str]
    ):
        self.pair, self.sites, self.batch, self.density, self.plates = pair, sites, batch, density, set(plates)
        guide = poutine.trace(pair.run_guide).get_trace(*batch)
        self.values: dict[str, Any] = {site.name: guide.nodes[site.name]["value"] for site in sites}
        self.rows = {s.name: self.values[s.name].movedim(self._dim(s), 0) for s in sites}  # (M, ...)
        self.count = len(next(iter(self.rows.values())))

    def _dim(self, site: Site) -> int:
        return int(self.values[site.name].dim()) - site.event_dim + site.plate_frame.dim

    def everywhere(self, one: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A row's value in the place of every row's."""
        return {
            s.name: one[s.name].unsqueeze(0).expand(self.count, *one[s.name].shape).movedim(0, self._dim(s))
            for s in self.sites
        }

    def log_prior(self, now: Mapping[str, Tensor]) -> Tensor:
        trace = held(self.pair.run_model, now, self.batch)
        for name in [name for name in trace.nodes if name not in self.values]:
            del trace.nodes[name]
        return row_terms(trace, self.plates, next(iter(now.values())))[0].double()

    def terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
        """log q(z | x), log q(z), that without the row itself, log p(z), (M,) each; whether p is the same for all."""

        def log_q(one: dict[str, Tensor]) -> tuple[Tensor]:
            return (self.density.rows(self.everywhere(one), *self.batch),)

        count = self.count
        widest = count * sum(row[0].numel() for row in self.rows.values())
        (table,) = mapped(log_q, self.rows, self.batch, widest)  # (M, M): the draw of a row under every row
        table = table.double()
        own = table.diagonal()
        mixed = torch.logsumexp(table, 1) - math.log(count)
        without = torch.logsumexp(table.clone().fill_diagonal_(-math.inf), 1) - math.log(count - 1)
        first = self.log_prior(self.everywhere({name: row[0] for name, row in self.rows.items()}))
        fixed = torch.allclose(first, first[:1].expand_as(first), rtol=1e-4, atol=1e-4)
        return own, mixed, without, self.log_prior(self.values), fixed
