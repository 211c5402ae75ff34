"""What the local latents carry: KL by dimension, active units, mutual information, and whether they have collapsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch

from .aggregate import Aggregate, aggregate
from .bounds import mean_and_standard_error
from .errors import DataError, GuideError, ModelError, OptionError
from .heldout import row_chunks, spaced
from .latent_terms import Moments, latent_terms
from .packing import Packing
from .pair import Pair, chunk_of
from .posthoc import has_density
from .programs import Program, preserved_rng, program_name
from .runs import Graphs, Runs
from .sites import DATA_PLATE, Latents, Site
from .weights import refuse_untrained

__all__ = ["LatentDiagnostics", "latent_diagnostics"]

CLOSED, BY_MOMENTS, UNKNOWN = "closed form", "by moments", "unknown"
BLOCK = 256
"""Rows at once: the terms of all draws of a pass are held together."""


@dataclass(frozen=True, eq=False)
class LatentDiagnostics:
    """What each unit, that is each unconstrained coordinate of a local latent, tells of a datum; see the function.

    units: one row for each unit: site, index, kl, kl_se, how ("closed form"; "by moments", a lower bound; "unknown"),
    activity, activity_se, active. kl, kl_se: KL(q(z | x) || p(z)) of a datum, nats, and its error for new data.
    aggregate: mutual information and marginal KL, None where log q is not known at any value; `notes` says why.
    """

    units: pd.DataFrame
    kl: float
    kl_se: float
    aggregate: Aggregate | None
    threshold: float
    data: int
    draws: int
    notes: list[str] = field(default_factory=list)

    @property
    def active(self) -> int:
        """Number of active units."""
        return int(self.units["active"].sum())

    @property
    def total_units(self) -> int:
        """Number of units."""
        return len(self.units)

    @property
    def share(self) -> float:
        """Share of the units that are active."""
        return self.active / self.total_units

    @property
    def collapsed(self) -> bool:
        """Whether no unit is active."""
        return self.active == 0

    @property
    def sites(self) -> pd.DataFrame:
        """One row for each site: units, active units, and KL, NaN where that of a unit is unknown."""
        groups = self.units.groupby("site", sort=False)
        return groups.agg(
            units=("index", "size"), active=("active", "sum"), kl=("kl", lambda kl: kl.sum(skipna=False))
        ).reset_index()

    @property
    def verdict(self) -> str:
        """A sentence: have the latents collapsed?"""
        total, dead = self.total_units, self.total_units - self.active
        if self.collapsed:
            return f"The posterior has collapsed: none of the {total} latent units depends on the data."
        if dead == 0:
            return f"No collapse: all {total} latent units depend on the data."
        per_site = self.sites
        gone = per_site.loc[per_site["active"] == 0, "site"].tolist()
        whole = f" All units of {', '.join(map(repr, gone))} are." if gone else ""
        return f"{dead} of {total} latent units are inactive: they carry nothing of the data.{whole}"

    @property
    def rests(self) -> str:
        """A sentence: what the verdict rests on."""
        near = (self.units["activity"] - self.threshold).abs() < 2 * self.units["activity_se"]
        text = (
            f"A unit is active where the variance of E_q[u | x] over the data exceeds {self.threshold:g} (Burda, "
            f"Grosse and Salakhutdinov, 2016), the noise of {self.draws} draws taken out; {self.data} data"
        )
        if near.any():
            text += f", {int(near.sum())} units within two standard errors of the threshold"
        found = self.aggregate
        if found is None:
            return f"{text}."
        text += f". Mutual information at least {max(found.information, 0.0):.2f} nats"
        if found.information > found.limit - 1.0:
            return f"{text}, near the limit log {found.rows} of what so many rows can show."
        return f"{text}, of {found.kl:.2f} nats of KL; {found.rows} rows can show at most {found.limit:.2f}."

    def bars(self) -> tuple[list[str], list[float], list[bool]]:
        """Names, KL and activity of the units for a plot; units of an unknown KL have 0 there and say so."""
        single = self.units["site"].nunique() == 1
        names = [
            (str(i) if single else f"{site}[{i}]") + (" (KL unknown)" if how == UNKNOWN else "")
            for site, i, how in zip(self.units["site"], self.units["index"], self.units["how"], strict=True)
        ]
        return names, self.units["kl"].fillna(0.0).tolist(), self.units["active"].tolist()

    def __repr__(self) -> str:
        lines = [f"{self.verdict} KL {self.kl:.3f} ± {self.kl_se:.3f} nats a datum."]
        if self.aggregate is not None:
            a = self.aggregate
            lines.append(
                f"mutual information {a.information:.3f} ± {a.information_se:.3f} to {a.information_upper:.3f} nats "
                f"(limit log {a.rows} = {a.limit:.2f})"
            )
            if a.marginal is not None and a.marginal_lower is not None:
                lines.append(f"KL(q(z) || p(z)) {a.marginal_lower:.3f} to {a.marginal:.3f} ± {a.marginal_se:.3f} nats")
        return "\n".join([*lines, self.rests, *self.notes])


def latent_diagnostics(
    model: Program,
    guide: Program,
    *data: Any,
    num_samples: int = 64,
    threshold: float = 0.01,
    max_rows: int = 500,
    seed: int = 0,
    plates: Iterable[str] = (DATA_PLATE,),
) -> LatentDiagnostics:
    r"""KL by dimension, active units, mutual information and aggregate-posterior mismatch of local latents.

    A unit is one unconstrained coordinate of a local latent. It is active where

    .. math:: A_j = \mathrm{Var}_x\big(E_{q(u|x)}[u_j]\big) > \text{threshold},

    with the variance that few draws lend to the mean subtracted. Its KL is a closed form where q and the prior are
    normal in independent coordinates, and else the lower bound :math:`E_q[-\log p(u_j)] - \frac12 \log 2\pi e v_j` of
    KL(q_j || p_j) by the variance :math:`v_j` of the draws. The prior is the model's at the values drawn, so that
    latents may depend on one another. The KL of a datum is the sum of the closed forms, or log q - log p of the draws.

    Reference: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016, for active units; Hoffman and
    Johnson, "ELBO surgery", 2016, for the mutual information.

    Args:
        model, guide: a pair whose latents are local, continuous and in one data plate. data: rows first.
        num_samples: draws for each datum, at least 8. threshold: of activity, > 0; 0.01 is the published one.
        max_rows: rows, evenly spaced, of which the aggregate posterior is made: its cost is their square. 0 leaves
            mutual information out.
        seed: of the draws. plates: names of the data plates.

    Raises:
        DataError: fewer than 2 rows. ModelError: no local latents, or global, discrete, or of several plates.
        GuideError: the guide does not fit, or is a point. OptionError: an argument out of its domain.

    >>> from dgm.guides.amortized import Amortized
    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> found = latent_diagnostics(model, Amortized(model, x), x, num_samples=8)
    >>> found.total_units, list(found.units["how"]), found.aggregate.rows
    (2, ['closed form', 'closed form'], 20)
    """
    if num_samples < 8 or not threshold > 0 or max_rows < 0:
        raise OptionError(
            f"latent_diagnostics(num_samples={num_samples}, threshold={threshold}, max_rows={max_rows}): expected at "
            "least 8 draws, a positive threshold and max_rows >= 0"
        )
    plates = tuple(plates)
    pair = Pair(model, guide)
    found = pair.check(data, plates)
    refuse_untrained(pair, model, guide)
    sites = _local(found, model)
    rows = sites[0].plate_frame.size
    if rows < 2:
        raise DataError(f"latent_diagnostics: expected at least 2 rows, got {rows}: activity is a variance over data")
    if not has_density(guide, local=True):
        raise GuideError(f"{program_name(guide)} gives local latents as points: a point has no KL and no information")
    moments = _moments(pair, sites, data, rows, num_samples, seed)
    units, closed = _units(sites, moments, threshold)
    notes: list[str] = []
    whole = torch.cat([m.kl.sum(1) for m in moments]) if closed else torch.cat([m.ratio for m in moments])
    kl, kl_se = mean_and_standard_error(whole)
    mixed = None
    if max_rows > 1:
        batch, places = spaced(data, max_rows)
        try:
            with chunk_of(rows, places):
                mixed = aggregate(pair, sites, batch, plates, max(1, min(num_samples, 1000 // len(places))), seed)
        except GuideError as problem:
            notes.append(f"No mutual information: {problem}.")
            notes.append("Where the guide draws variables that the model has not, its KL is an upper bound.")
    return LatentDiagnostics(units, kl, kl_se, mixed, threshold, rows, num_samples, notes)


def _local(found: Latents, model: Program) -> list[Site]:
    name = program_name(model)
    if found.global_:
        raise ModelError(
            f"latent {found.global_[0].name!r} of {name} is global: these diagnostics are of latents of each row, with "
            "all else fixed; condition the model on a value of it (poutine.condition)"
        )
    if not found.local:
        raise ModelError(f"{name} has no latent inside a data plate: there is nothing that could collapse")
    for site in found.local:
        if site.discrete:
            raise ModelError(f"latent {site.name!r} of {name} is discrete: units are coordinates of continuous latents")
    if len({site.plate for site in found.local}) > 1:
        raise ModelError(f"the latents of {name} stand in several data plates: evaluate a model of one")
    return found.local


def _moments(pair: Pair, sites: Sequence[Site], data: Sequence[Any], rows: int, draws: int, seed: int) -> list[Moments]:
    """The sums over draws of each chunk of rows."""
    parts, graphs = [], Graphs()
    graphs.batches = rows // BLOCK
    with preserved_rng(seed):
        for i, chunk in enumerate(row_chunks(data, BLOCK)):
            place = torch.arange(i * BLOCK, min(rows, (i + 1) * BLOCK))
            with chunk_of(rows, place):
                own = _at(pair, sites, chunk)
                runs = Runs(pair, partial(latent_terms, pair, own), chunk, graphs)
                part = Moments()
                for terms in runs.passes(draws):
                    part.update(terms)
            parts.append(part)
    return parts


def _at(pair: Pair, sites: Sequence[Site], chunk: Sequence[Any]) -> list[Site]:
    """The sites as they are in a chunk: with its number of rows."""
    found = pair.check(chunk, {str(sites[0].plate)})
    return [found[site.name] for site in sites]


def _units(sites: Sequence[Site], moments: Sequence[Moments], threshold: float) -> tuple[pd.DataFrame, bool]:
    mean = torch.cat([m.mean for m in moments])  # (N, D)
    noise = torch.cat([m.noise for m in moments]).mean(0)
    exact, bound = (torch.cat(parts) for parts in zip(*((m.kl, m.by_moments) for m in moments), strict=True))
    closed = ~exact.isnan().any(0)
    kl = torch.where(closed, exact, bound)  # (N, D)
    known = ~kl.isnan().any(0)
    centred = mean - mean.mean(0)
    variance, fourth = mean.var(0), centred.pow(4).mean(0)
    activity = variance - noise
    error = ((fourth - variance.square()).clamp(min=0.0) / len(mean)).sqrt()
    labels = [(b.site.name, i) for b in Packing(sites).blocks for i in range(b.stop - b.start)]
    hows = [CLOSED if c else BY_MOMENTS if k else UNKNOWN for c, k in zip(closed, known, strict=True)]
    frame = pd.DataFrame(
        {
            "site": [name for name, _ in labels],
            "index": [i for _, i in labels],
            "kl": kl.mean(0).cpu().numpy(),
            "kl_se": (kl.std(0) / len(kl) ** 0.5).cpu().numpy(),
            "how": hows,
            "activity": activity.cpu().numpy(),
            "activity_se": error.cpu().numpy(),
            "active": (activity > threshold).cpu().numpy(),
        }
    )
    return frame, bool(closed.all())
