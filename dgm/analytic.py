"""KL divergences in closed form where guide and prior have one, and free bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributions as td
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from .errors import ModelError
from .packing import Packing
from .terms import by_row, data_frame, sample_sites_of


@dataclass
class ClosedForm:
    """KL divergences of one run that need no sample, or less of one.

    by_site: what stands for log q - log p of each latent, in the shape of its log density; an auxiliary site whose
        latents are all in it is a key too. elements: before the sum over the event, by latent, where that is known.
    sampled: latents without a closed form.
    """

    by_site: dict[str, Tensor] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    sampled: list[str] = field(default_factory=list)


def closed_form(model: poutine.Trace, guide: poutine.Trace) -> ClosedForm:
    """KL(q || p) of each latent, exactly where the two have a closed form and q factorises over the latents.

    The prior of a latent may depend on other latents: its KL is then exact given those of this draw. A joint density
    with correlations has a closed form where it fills a single latent.
    """
    found = ClosedForm()
    for name, node in sample_sites_of(guide):
        fn = node["fn"]
        if node["is_observed"] or isinstance(fn, Delta) or node["mask"] is not None:
            continue
        packing = node["infer"].get("packing")
        if packing is not None:
            _packed(found, name, node, packing, model)
        elif name in model.nodes:
            _keep(found, name, fn, model.nodes[name])
    return found


def _keep(found: ClosedForm, name: str, q: Any, node: Any) -> bool:
    """The KL of one latent, where there is a closed form."""
    p = node["fn"]
    if node["mask"] is not None:
        found.sampled.append(name)
        return False
    try:
        inner_q, inner_p, event = _bases(q, p)
        elements = td.kl_divergence(inner_q, inner_p)
    except NotImplementedError:
        found.sampled.append(name)
        return False
    found.elements[name] = elements
    found.by_site[name] = elements.reshape(*elements.shape[: elements.dim() - event], -1).sum(-1) if event else elements
    return True


def _bases(q: Any, p: Any) -> tuple[Any, Any, int]:
    """Both densities without the event dimensions that they share as independent ones, and how many those are."""
    events: list[int] = []
    inner = []
    for d in (q, p):
        event = 0
        while isinstance(d, td.Independent):
            event += d.reinterpreted_batch_ndims
            d = d.base_dist
        inner.append(d)
        events.append(event)
    if events[0] != events[1]:
        raise NotImplementedError
    return inner[0], inner[1], events[0]


def _packed(found: ClosedForm, name: str, node: Any, packing: Packing, model: poutine.Trace) -> None:
    """The latents that one density over their packed vector fills."""
    density = getattr(node["fn"], "base", node["fn"])
    latents = [block.site.name for block in packing.blocks]
    if isinstance(density, td.Independent) and isinstance(density.base_dist, td.Normal):
        mean, scale, u = density.base_dist.loc, density.base_dist.scale, node["value"]
        means, scales, values = (packing.parts(t) for t in (mean.expand_as(u), scale.expand_as(u), u))
        for block in packing.blocks:
            site = block.site.name
            prior: Any = model.nodes[site]
            q = td.Normal(means[site], scales[site], validate_args=False)
            event = block.site.event_dim
            real = block.transform(values[site]) is values[site] or block.site.support_name == "real"
            if real and _keep(found, site, td.Independent(q, event) if event else q, prior):
                continue
            value, jacobian = packing.unpack(u)
            log_q = q.log_prob(values[site])
            log_q = log_q.reshape(*log_q.shape[: jacobian[site].dim()], -1).sum(-1) - jacobian[site]
            found.by_site[site] = log_q - prior["fn"].log_prob(value[site])
            if site not in found.sampled:
                found.sampled.append(site)
        found.by_site[name] = torch.zeros(())
        return
    if len(latents) == 1 and _gaussian(found, latents[0], density, packing, node, model):
        found.by_site[name] = torch.zeros(())
        return
    found.sampled.extend(latents)


def _gaussian(found: ClosedForm, site: str, density: Any, packing: Packing, node: Any, model: poutine.Trace) -> bool:
    """A correlated normal over one real latent with independent normal priors: -H(q) - E_q[log p]."""
    if packing.blocks[0].site.support_name != "real" or model.nodes[site]["mask"] is not None:
        return False
    prior = model.nodes[site]["fn"]
    while isinstance(prior, td.Independent):
        prior = prior.base_dist
    # TriangularNormal, whose class the core does not know: a normal by its Cholesky factor and log-determinant
    log_det = density.log_scale if hasattr(density, "scale_tril") and hasattr(density, "log_scale") else None
    if not isinstance(prior, td.Normal) or (log_det is None and not isinstance(density, td.LowRankMultivariateNormal)):
        return False
    u = node["value"]
    d = u.shape[-1]
    half = 0.5 * d * (1 + torch.log(torch.tensor(2 * torch.pi, dtype=u.dtype, device=u.device)))
    entropy = density.entropy() if log_det is None else log_det.sum(-1) + half
    mean = packing.parts(density.mean.expand_as(u))[site]
    variance = packing.parts(density.variance.expand_as(u))[site]
    cross = prior.log_prob(mean) - 0.5 * variance / prior.scale.square()
    event = packing.blocks[0].site.event_dim
    cross = cross.reshape(*cross.shape[: cross.dim() - event], -1).sum(-1) if event else cross
    found.by_site[site] = (
        -entropy.reshape(cross.shape) - cross if entropy.numel() == cross.numel() else -entropy - cross
    )
    return True


# --- free bits -------------------------------------------------------------------------------------------------------


def group_means(
    model: poutine.Trace,
    guide: poutine.Trace,
    exact: ClosedForm | None,
    plates: Mapping[str, Any],
    groups: str,
) -> dict[str, Tensor]:
    """Means over the minibatch of the KL of each local group, `(groups,)`, by data plate: what free bits look at.

    Raises:
        ModelError: groups of one dimension are asked for, and a latent has no closed form of each.
    """
    found: dict[str, list[Tensor]] = {}
    for name, node in sample_sites_of(guide):
        frame = data_frame(node, plates)
        if frame is None or node["is_observed"] or isinstance(node["fn"], Delta):
            continue
        packing = node["infer"].get("packing")
        latents = [block.site.name for block in packing.blocks] if packing is not None else [name]
        if groups == "dimension":
            kl = torch.cat([_dimensions(site, model.nodes[site], exact, plates) for site in latents], -1)  # (B, D)
        elif exact is not None and all(site in exact.by_site for site in latents):
            kl = _sum(by_row(model.nodes[s], exact.by_site[s], plates)[1] for s in latents)[:, None]  # (B, 1)
        else:
            terms = [by_row(node, node["log_prob"], plates)[1]]
            for site in latents:
                if packing is not None:
                    terms.append(by_row(guide.nodes[site], torch.as_tensor(guide.nodes[site]["log_prob"]), plates)[1])
                terms.append(-by_row(model.nodes[site], model.nodes[site]["log_prob"], plates)[1])
            kl = _sum(iter(terms))[:, None]
        found.setdefault(frame.name, []).append(kl.mean(0))
    return {plate: torch.cat(parts) for plate, parts in found.items()}


def _sum(parts: Any) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _dimensions(site: str, node: Any, exact: ClosedForm | None, plates: Mapping[str, Any]) -> Tensor:
    elements = exact.elements.get(site) if exact is not None else None
    if elements is None:
        raise ModelError(f"latent {site!r} has no KL for each dimension in closed form: use groups='site'")
    frame = data_frame(node, plates)
    axis = elements.dim() - node["fn"].event_dim + frame.dim
    rows = elements.movedim(axis, 0)
    return rows.reshape(rows.shape[0], -1)  # (B, D)


__all__ = ["ClosedForm", "closed_form", "group_means"]
