"""log q of a guide at any values of its latents, not only at its own draws; differentiable, by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.transforms import biject_to
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .coordinates import Coordinates
from .errors import DataError, GuideError, did_you_mean
from .given import held, mapped
from .noise import recording
from .packing import Packing
from .posthoc import has_density
from .programs import Program, bound, evaluating, isolated, preserved_rng, program_name, with_home
from .row_terms import row_terms
from .sites import DATA_PLATE, Latents, Site, read
from .weights import LogWeights

__all__ = ["GuideDensity", "log_q"]

Values = Mapping[str, Tensor]


class GuideDensity:
    r"""log q(z | x) at given z: the guide runs with its sites held at what would have made these values.

    .. math:: \log q(z) = \log q(u) - \log |dz / du|, \qquad \log q(u) = \log q(z(u)) + \log |dz / du|

    A guide that fills the latents from one unconstrained vector is held at the vector that gives z; a guide that
    samples them itself is held at z. Which it is, is read off a draw of the guide, and the density at that draw must
    come out as the guide itself counts it. Which values go where is learned for the rows of `batch`: make another one
    for batches of another size.

    Args:
        guide: a trained guide. batch: data, rows first.
        packings: what a vector u is made of, for `terms`; as in `dgm.log_joint.LogJoint`.
        plates: names of the data plates.

    Raises:
        GuideError: the guide has no density, is a point, draws auxiliary variables (its log q is an integral), or has
            a flow that runs in one direction only. The message names the site.

    >>> from dgm.guides.amortized import Amortized
    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> density = GuideDensity(Amortized(model, x), x)
    >>> density.at({"z": torch.zeros(3, 20, 2)}, x).local.shape
    torch.Size([3, 20])
    """

    def __init__(
        self, guide: Program, *batch: Any, packings: Sequence[Packing] = (), plates: Iterable[str] = (DATA_PLATE,)
    ):
        self.guide, self.plates, self.coordinates = guide, set(plates), Coordinates(packings)
        self.name = program_name(guide)
        if not has_density(guide):
            raise GuideError(f"{self.name} has no density (its has_density is False): log q means nothing for it")
        program, home = with_home(guide)
        self.run = bound(program, home)
        with evaluating(guide), isolated(), preserved_rng(0):
            trace = poutine.trace(self.run).get_trace(*batch)
            trace.compute_log_prob()
        if program is not guide and hasattr(home, "pyro_parameters"):
            raise GuideError(
                f"{self.name} is a function with pyro.param statements: here they would have their initial values; "
                "give the trained program, fit.guide or svi.guide"
            )
        found = read(trace, self.plates)
        supports = _supports(home, trace)
        own = [replace(s, support=supports.get(n, s.support)) for n, s in found.items() if not s.auxiliary]
        self.latents = Latents(own, found.observed, found.plates)
        self.filled = {name for name in self.latents if isinstance(_base(trace.nodes[name]["fn"]), Delta)}
        self.sources = self._sources(found, trace)
        # which rows a declared plate says it draws: held, for it is no noise of the density
        self.subsamples: dict[str, Any] = {
            n: node["value"] for n, node in trace.nodes.items() if site_is_subsample(node)
        }
        self._verify(trace, batch)

    def _sources(self, found: Latents, trace: Any) -> dict[str, Callable[[Values], Tensor]]:
        """For each auxiliary site, how its value is made of the unconstrained latents."""
        raw = {n: _unconstrain(s, trace.nodes[n]["value"]) for n, s in self.latents.items() if n in self.filled}
        sources: dict[str, Callable[[Values], Tensor]] = {}
        covered: set[str] = set()
        for name in (n for n, s in found.items() if s.auxiliary):
            node = trace.nodes[name]
            packing = node["infer"].get("packing")
            if packing is not None:
                names = [site.name for site in packing.sites]
                sources[name] = packing.join
            else:
                index = _matched(node["value"], raw)
                if index is None:
                    raise GuideError(
                        f"{self.name} draws the auxiliary variable {name!r}, which its latents do not determine: log q "
                        "is an integral over it and is not known; its log weights are (dgm.log_weights)"
                    )
                names = _touched(index, raw)
                sources[name] = partial(_picked, index=index, names=tuple(raw), shape=node["value"].shape)
            covered.update(names)
        for name in raw:
            if name not in covered:
                raise GuideError(
                    f"{self.name} gives the latent {name!r} as a point (Delta): it has no density there; use a family "
                    "with one"
                )
        return sources

    def _verify(self, trace: Any, batch: Sequence[Any]) -> None:
        """At its own draw the density must be the guide's own."""
        values = {name: trace.nodes[name]["value"] for name in self.latents}
        try:
            with evaluating(self.guide), preserved_rng(1), recording() as draws:
                rows, rest = self._terms(values, self._raw(values), batch)
        except (NotImplementedError, RuntimeError, AttributeError) as error:
            raise GuideError(
                f"{self.name}: log q at given values cannot be computed ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:120]}): the density of a flow that is only known in the direction of "
                "its draws is known at its own draws alone"
            ) from error
        if draws or not draws.complete:
            raise GuideError(
                f"{self.name} draws noise that stands in no site: log q is an integral over it and is not known"
            )
        own_rows, own_rest = row_terms(trace, self.plates, rows)
        pairs = ((rows, own_rows), (rest, own_rest))
        tolerance = 1e-8 if rows.dtype == torch.float64 else 1e-3
        if not all(torch.allclose(a, b, rtol=tolerance, atol=10 * tolerance) for a, b in pairs):
            raise GuideError(
                f"{self.name}: log q of its own draw is {float(own_rows.sum() + own_rest):.6g} when drawn and "
                f"{float(rows.sum() + rest):.6g} when computed from the values: its sites do not say how it draws"
            )

    def terms(self, u: Tensor, *batch: Any) -> tuple[Tensor, Tensor]:
        """log q in the coordinates u, `(d,)`, of the packings: `(B,)` for the rows, and the rest, `()`.

        A pure function of u, to be differentiated, mapped and traced, with the shapes of `LogJoint.terms`. Keep the
        guide in evaluation mode (`dgm.programs.evaluating`; `torch.func.grad` works inside of it).
        """
        values, log_jacobian = self.coordinates.unpack(u)
        self._require(values)
        rows, rest = self._terms(values, self.coordinates.raw(u), batch)
        for name, term in log_jacobian.items():
            frame = self.latents[name].plate_frame if self.latents[name].plate is not None else None
            if frame is None:
                rest = rest + term.sum()
            else:
                own = term.movedim(frame.dim, 0)
                rows = rows + own.reshape(own.shape[0], -1).sum(-1)
        return rows, rest

    def at(self, values: Values, *batch: Any) -> LogWeights:
        """log q at S given values of every latent, each `(S, *its shape)` on its support.

        Returns:
            `local` (S, B), the terms of each row, and `global_` (S,), those outside of the data plates.

        Raises:
            DataError: a latent is missing, misshapen, or outside of its support.
        """
        self._require(values)
        given = {name: torch.as_tensor(values[name]) for name in self.latents}
        count = len(next(iter(given.values()))) if given and next(iter(given.values())).dim() else 0
        if count < 1:
            raise DataError("values: expected at least one of each latent, (S, *shape), got none")
        for name, site in self.latents.items():
            expected = (count, *site.batch_shape, *site.event_shape)
            if tuple(given[name].shape) != expected:
                raise DataError(f"values of {name!r}: expected shape {expected}, got {tuple(given[name].shape)}")
            inside = torch.as_tensor(site.support.check(given[name]))
            if not bool(inside.all()):
                raise DataError(
                    f"values of {name!r}: {int((~inside).sum())} lie outside of {site.support_name}, or are NaN"
                )

        def one(now: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self._terms(now, self._raw(now), batch)

        with evaluating(self.guide):
            rows, rest = mapped(one, given, batch)
        local = any(site.plate is not None for site in self.latents.values())
        outside = any(site.plate is None for site in self.latents.values())
        return LogWeights(rows, rest, local, outside)

    def rows(self, values: Values, *batch: Any) -> Tensor:
        """log q of the rows, `(B,)`, at one value of every latent; a pure function, as `terms`."""
        return self._terms(values, self._raw(values), batch)[0]

    def _raw(self, values: Values) -> dict[str, Tensor]:
        names = [name for name, site in self.latents.items() if not site.discrete]
        return {name: _unconstrain(self.latents[name], values[name]) for name in names}

    def _terms(self, values: Values, raw: Values, batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        # Latents that are filled from a vector follow it: held at their own values they would differ by a rounding.
        sites = {name: source(raw) for name, source in self.sources.items()}
        sites.update((name, values[name]) for name in self.latents if name not in self.filled)
        like = next(iter(sites.values()))
        sites.update(self.subsamples)
        return row_terms(held(self.run, sites, batch), self.plates, like)

    def _require(self, values: Values) -> None:
        missing = [name for name in self.latents if name not in values]
        if missing:
            raise DataError(f"values of the latent {missing[0]!r} are missing: {did_you_mean(missing[0], values)}")


def log_q(
    guide: Program,
    batch: Sequence[Any],
    values: Values,
    *,
    plates: Iterable[str] = (DATA_PLATE,),
) -> Tensor:
    """log q(z | x) of a guide at given values of its latents.

    Args:
        guide: a trained guide. batch: data, as the guide takes it.
        values: `(S, *shape)` of every latent by name, on its support.
        plates: names of the data plates.

    Returns:
        `(S, B)` in nats where every latent is local; `(S,)`, for all rows together, where one is global.

    Raises:
        GuideError: the guide's density is not known; see `GuideDensity`. DataError: values that do not fit.

    >>> from dgm.guides.global_ import Global
    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> log_q(Global(model, *batch), batch, {"w": torch.zeros(5, 3)}).shape
    torch.Size([5])
    """
    found = GuideDensity(guide, *batch, plates=plates).at(values, *batch)
    return found.total if found.has_global else found.local


def _base(fn: Any) -> Any:
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _supports(home: nn.Module, trace: Any) -> dict[str, Any]:
    """The supports of latents that a guide fills by a Delta, whose own says nothing: of packings and Pyro's guides."""
    packings = [node["infer"].get("packing") for node in trace.nodes.values() if node["type"] == "sample"]
    packings += [part for part in home.modules() if isinstance(part, Packing)]
    known = {site.name: site.support for packing in packings if packing is not None for site in packing.sites}
    for part in home.modules():
        prototype = getattr(part, "prototype_trace", None)
        for name, node in prototype.nodes.items() if prototype is not None else ():
            if node["type"] == "sample" and not node["is_observed"]:
                known.setdefault(name, node["fn"].support)
    return known


def _unconstrain(site: Site, value: Tensor) -> Tensor:
    return value if site.discrete else biject_to(site.support).inv(value)


def _picked(raw: Values, index: Tensor, names: Sequence[str], shape: torch.Size) -> Tensor:
    return torch.cat([raw[name].reshape(-1) for name in names])[index].reshape(shape)


def _matched(value: Tensor, raw: Values) -> Tensor | None:
    """Which of the unconstrained latents each entry of an auxiliary value is, or None where one of them is none.

    Draws of a continuous density are distinct, so that equal numbers are the same number.
    """
    if not raw or not value.is_floating_point():
        return None
    flat, pool = value.reshape(-1).detach(), torch.cat([part.reshape(-1) for part in raw.values()])
    order = pool.argsort()
    place = torch.searchsorted(pool[order].contiguous(), flat.contiguous())
    near = torch.stack([order[(place + shift).clamp(0, len(pool) - 1)] for shift in (-1, 0)])  # (2, n)
    best = (pool[near] - flat).abs().argmin(0)
    index = near.gather(0, best[None])[0]
    close = torch.allclose(pool[index], flat, rtol=1e-4, atol=1e-5) and len(index.unique()) == len(flat)
    return index if close else None


def _touched(index: Tensor, raw: Values) -> list[str]:
    """The sites whose every entry is among those of the index."""
    seen, names, start = set(index.tolist()), [], 0
    for name, part in raw.items():
        if seen.issuperset(range(start, start + part.numel())):
            names.append(name)
        start += part.numel()
    return names
