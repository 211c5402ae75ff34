"""A prior of weights whose predictions are far wider, or far narrower, than the data; weights far outside of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Laplace, Normal, StudentT

from ..dataflow import Reading, base_of
from ..findings import Finding
from ..pair import Pair
from ..programs import StartValues, evaluating, preserved_buffers, preserved_rng

WIDE = 50.0
"""Prior predictive sd over the sd of the data. A network of 50 units with N(0, 1) weights on ten standardised inputs,
the usual one of the UCI benchmarks, has 15 to 20; 1000 inputs give 150."""
NARROW = 0.05
"""The same, from below: data at twenty prior sds are out of reach."""
SATURATED = 50.0
"""Sd of the logits under the prior: 9 of 10 predictions are then certain to 1 in 500 before any data."""
OUTSIDE = 5.0
"""Root mean square of weights over their prior's sd after the short training."""
DRAWS = 20
"""Draws of the prior: the sd over draws and rows is known to about 20 %, against thresholds that are far off."""


def look(case: Any) -> Iterator[Finding]:
    yield from prior_predictive(case.pair, case.rows, case.after)
    yield from outside_of_prior(case.after)


def prior_predictive(pair: Pair, batch: Sequence[Any], reading: Reading) -> Iterator[Finding]:
    """Observed sites that global latents move, with the sd of their mean under the prior beside that of the data."""
    weights = _weights(reading)
    if not weights:
        return
    draws = _prior_means(pair, batch)
    for name, _, base, value in reading.observed():
        if name not in draws or not (set(reading.depends_on(_location(base))) & set(weights)):
            continue
        spread = _spread(draws[name])
        fan_in = max((w[0].numel() for w in weights.values() if w.dim() > 1), default=1)
        cure = "a narrower prior of the weights, or standardised inputs"
        if fan_in > 1:
            cure = (
                f"a prior of the weights with sd 1/sqrt(inputs of a unit), here up to {fan_in}: "
                "dgm.models.bnn.fan_in_prior() does it"
            )
        if isinstance(base, Bernoulli | Categorical):
            if spread > SATURATED:
                yield Finding(
                    name="prior scale",
                    part="model",
                    harm=2,
                    evidence=f"site {name!r}: the logits have an sd of {spread:.3g} under the prior",
                    consequence="before any data the model is certain of every label, and training starts saturated",
                    cure=cure,
                )
            continue
        sd = float(value.detach().float().std())
        if not sd > 0 or NARROW * sd <= spread <= WIDE * sd:
            continue
        wide = spread > sd
        yield Finding(
            name="prior scale",
            part="model",
            harm=2,
            evidence=(
                f"site {name!r}: its mean has an sd of {spread:.3g} under the prior, the data have {sd:.3g} "
                f"({spread / sd:.2g} times)"
            ),
            consequence=(
                "the prior allows functions that nobody believes in, the KL term is large, and a guide near the prior "
                "predicts noise"
                if wide
                else "the data lie far outside of what the prior can produce: it wins, and the fit is flat"
            ),
            cure=cure if wide else "standardise the targets, or widen the prior",
        )


def outside_of_prior(reading: Reading) -> Iterator[Finding]:
    """Weight tensors whose values after training lie many prior sds away from its mean."""
    for name, value in _weights(reading).items():
        base = base_of(reading.model.nodes[name]["fn"])
        if not isinstance(base, Normal) or reading.depends_on(base.scale):
            continue
        size = float(((value - base.loc) / base.scale).detach().square().mean().sqrt())
        if size < OUTSIDE:
            continue
        yield Finding(
            name="weights outside of their prior",
            part="model",
            harm=2,
            evidence=(
                f"site {name!r}: after the short training its {value.numel()} values lie {size:.3g} prior sds from the "
                f"prior's mean (root mean square; sd {float(base.scale.detach().mean()):.3g})"
            ),
            consequence="the data and the prior contradict each other: predictions shrink, and the KL term is large",
            cure=f"a wider prior for {name!r}, or data in units in which this one is sensible",
        )


def _spread(draws: Tensor) -> float:
    """The sd of a normal with the middle two thirds of these: a prior with Cauchy tails is not judged by them."""
    away = (draws - draws.median(0).values).abs().flatten()
    return float(away[torch.linspace(0, len(away) - 1, min(len(away), 100_000)).long()].quantile(0.683))


def _weights(reading: Reading) -> dict[str, Tensor]:
    """Continuous latents of several numbers outside of every plate, as the weights of a network are."""
    return {
        name: value
        for name, value in reading.latents.items()
        if value.numel() > 1 and not any(f.vectorized for f in reading.model.nodes[name]["cond_indep_stack"])
    }


def _location(base: Any) -> Any:
    return base.logits if isinstance(base, Bernoulli | Categorical) else getattr(base, "loc", None)


def _prior_means(pair: Pair, batch: Sequence[Any]) -> dict[str, Tensor]:
    """The location or logits of each observed site in some runs from the prior, `(DRAWS, ...)`."""
    runs: dict[str, list[Tensor]] = {}
    with evaluating(pair.model), preserved_buffers(pair.model), preserved_rng(0), pair.running(), StartValues():
        for _ in range(DRAWS):
            trace = poutine.trace(pair.run_model).get_trace(*batch)
            for name, node in trace.nodes.items():
                base = base_of(node["fn"]) if node["type"] == "sample" else None
                if base is None or not node["is_observed"]:
                    continue
                if isinstance(base, Normal | Laplace | StudentT | Bernoulli | Categorical):
                    found = _location(base)
                    if isinstance(base, Categorical):
                        found = found - found.mean(-1, keepdim=True)
                    runs.setdefault(name, []).append(found.detach().float())
    stacks = {name: torch.stack(values) for name, values in runs.items() if len(values) == DRAWS}
    return {name: stack for name, stack in stacks.items() if math.isfinite(float(stack.sum()))}
