"""A hierarchy in centred form where the data say little of its members: a funnel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, StudentT

from ..dataflow import Reading, leaves_of
from ..findings import Finding

SIBLINGS = 3
"""Members under one scale: with fewer there is no neck for their scale to fall into."""
PRIOR_SHARE = 0.5
"""Share of the prior in the precision of a member's posterior from which the non-centred form is the better one
(Papaspiliopoulos, Roberts, Skold, "A general framework for the parametrization of hierarchical models", 2007)."""
LOOKED_AT = 16
"""Members whose curvature is taken, evenly spread: each costs one backward pass."""


def look(case: Any) -> Iterator[Finding]:
    yield from centred_hierarchies(case.after)


def centred_hierarchies(reading: Reading) -> Iterator[Finding]:
    """Latents whose prior's scale follows another latent that all of them share, and which the data leave wide."""
    for part, name, node, base in reading.sampled():
        leaf = reading.latents.get(name)
        if part != "model" or node["is_observed"] or leaf is None or not isinstance(base, Normal | Laplace | StudentT):
            continue
        parent = _parent(reading, base.scale, name)
        if parent is None or leaf.numel() < SIBLINGS * reading.latents[parent].numel():
            continue
        share = _prior_share(reading, name, leaf, base.scale)
        if share is None or share < PRIOR_SHARE:
            continue
        tau = reading.latents[parent].detach()
        yield Finding(
            name="centred hierarchy",
            part="model",
            harm=2,
            evidence=(
                f"site {name!r}: the scale of its {leaf.numel()} values follows the latent {parent!r} "
                f"({float(tau.mean()):.3g} now), and {100 * share:.0f} % of their posterior precision is the prior's"
            ),
            consequence=(
                f"the posterior is a funnel: {parent!r} and {name!r} depend on each other as no normal guide can "
                f"follow, and {parent!r} comes out too sure and too large"
            ),
            cure=(
                "the non-centred form: pyro.poutine.reparam(model, "
                f"{{{name!r}: pyro.infer.reparam.LocScaleReparam(0.0)}}), which also fits a guide made afterwards"
            ),
        )


def _parent(reading: Reading, scale: Any, name: str) -> str | None:
    """The latent outside of all plates of its own members' size that a scale is a function of, and moves with."""
    if not isinstance(scale, Tensor) or not scale.requires_grad or scale.grad_fn is None:
        return None
    behind = {id(leaf) for leaf in leaves_of(scale.grad_fn)}
    for other, leaf in reading.latents.items():
        if other == name or id(leaf) not in behind or leaf.numel() >= reading.latents[name].numel():
            continue
        if reading.model.nodes[other]["cond_indep_stack"] and _same_rows(reading, name, other):
            continue  # a latent of each row above another of the same row is a layer of a network, not a hierarchy
        (slope,) = torch.autograd.grad(scale.sum(), leaf, retain_graph=True, allow_unused=True)
        if slope is not None and bool((slope != 0).any()):
            return other
    return None


def _same_rows(reading: Reading, name: str, other: str) -> bool:
    mine, theirs = (
        {f.name for f in reading.model.nodes[site]["cond_indep_stack"] if f.vectorized} for site in (name, other)
    )
    return mine == theirs


def _prior_share(reading: Reading, name: str, leaf: Tensor, scale: Tensor) -> float | None:
    """The mean over members of tau^-2 / (tau^-2 + likelihood curvature), at the values of the run."""
    log_likelihood: Any = 0.0
    for site, node in reading.model.nodes.items():
        if node["type"] == "sample" and site != name:
            log_prob = node["fn"].log_prob(node["value"])
            log_likelihood = log_likelihood + log_prob.sum()
    if not isinstance(log_likelihood, Tensor) or not log_likelihood.requires_grad:
        return None
    (slope,) = torch.autograd.grad(log_likelihood, leaf, create_graph=True, allow_unused=True)
    if slope is None:
        return 1.0  # nothing but the prior knows of it
    flat = slope.flatten()
    places = torch.linspace(0, len(flat) - 1, min(len(flat), LOOKED_AT)).round().long().tolist()
    shares = []
    precisions = scale.detach().expand(leaf.shape).flatten() ** -2
    for place in places:
        curvature = 0.0
        if flat.requires_grad:
            (second,) = torch.autograd.grad(flat[place], leaf, retain_graph=True, allow_unused=True)
            curvature = 0.0 if second is None else max(0.0, -float(second.flatten()[place]))
        shares.append(float(precisions[place]) / (float(precisions[place]) + curvature))
    return sum(shares) / len(shares)
