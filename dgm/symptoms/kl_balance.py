"""A KL term that counts more or less than the likelihood: by its weight, or by what is paid for what is gained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..baseline import marginals
from ..case import Case
from ..dataflow import Reading
from ..findings import Finding
from ..sites import latents

ALIKE = 1e-3
"""Relative difference of two weights from which they are two."""
TIMES = 5.0
"""KL over what the likelihood gained by it, from which it is too large."""
LEAST = 1.0
"""Nats a datum that it must have: below, little is lost."""


def look(case: Case) -> Iterator[Finding]:
    yield from latent_weights(case.after)
    yield from _paid(case)


def latent_weights(reading: Reading) -> Iterator[Finding]:
    """Latents whose log p and log q are scaled differently, or unlike the likelihood of their rows."""
    rows = _observed_weights(reading)
    for name, node in reading.model.nodes.items():
        if node["type"] != "sample" or node["is_observed"] or name not in reading.guide.nodes:
            continue
        if name not in reading.latents and not torch.as_tensor(node["value"]).numel():
            continue
        ours, theirs = _weight(node), _weight(reading.guide.nodes[name])
        if abs(ours - theirs) > ALIKE * max(ours, theirs):
            yield Finding(
                name="KL weight",
                part="guide",
                harm=3,
                evidence=f"site {name!r}: log p counts {ours:.4g} times and log q {theirs:.4g} times",
                consequence="their difference is no KL divergence, the loss is no bound, and q goes to the wrong width",
                cure=f"the same poutine.scale, plate and subsample size around {name!r} in model and guide",
                size=abs(ours / theirs - 1) if theirs else 1e9,
            )
            continue
        frame = next((f.name for f in node["cond_indep_stack"] if f.vectorized and f.name in rows), None)
        expected = rows.get(frame, 1.0) if frame is not None else 1.0
        if abs(ours - expected) > ALIKE * max(ours, expected):
            against = "the likelihood of its rows" if frame is not None else "a latent of all rows should"
            yield Finding(
                name="KL weight",
                part="model",
                harm=3,
                evidence=f"site {name!r}: its KL counts {ours:.4g} times, {against} {expected:.4g} times",
                consequence=(
                    f"the KL has the weight {ours / expected:.3g}: "
                    + ("q is drawn to the prior" if ours > expected else "q is narrower than the posterior")
                    + ", and the loss is no bound on log p(x)"
                ),
                cure="take the poutine.scale out; to weight the KL on purpose: dgm.fit(kl_weight=...)",
                size=max(ours, expected) / max(min(ours, expected), 1e-9),
            )


def _weight(node: Any) -> float:
    return float(torch.as_tensor(node["scale"]).double().mean())


def _observed_weights(reading: Reading) -> dict[str, float]:
    """How often the likelihood of a row counts, by plate."""
    found: dict[str, float] = {}
    for _, node, _, _ in reading.observed():
        for frame in node["cond_indep_stack"]:
            if frame.vectorized:
                found.setdefault(frame.name, _weight(node))
    return found


def _paid(case: Any) -> Iterator[Finding]:
    """Global latents that cost several times what they explain, once the bound has levelled off."""
    if not case.latents.global_ or case.latents.local or not case.course.curve["kl"].iloc[-1] > LEAST:
        return
    base = marginals(latents(case.pair.model, *case.rows, plates=case.plates).observed)
    if base is None:
        return
    if not _too_much(case.course, float(base.mean())):
        return
    _, course = case.levelled
    if not _too_much(course, float(base.mean())):
        return
    last = course.curve.iloc[-1]
    gained = float(last["log_likelihood"]) - float(base.mean())
    yield Finding(
        name="KL too large",
        part="posterior",
        harm=2,
        evidence=(
            f"the KL of the global latents is {last['kl']:.3g} nats a datum, the likelihood "
            f"{last['log_likelihood']:.3g}, {max(gained, 0.0):.2g} better than without any input"
        ),
        consequence="the prior is paid more than the data give back: the more the bound rises, the less is learnt",
        cure="fewer weights or more rows, a prior that fits their size, init_scale; is each row counted N/B times?",
        size=float(last["kl"]) - gained,
    )


def _too_much(course: Any, base: float) -> bool:
    last = course.curve.iloc[-1]
    return bool(last["kl"] > max(LEAST, TIMES * (last["log_likelihood"] - base)))
