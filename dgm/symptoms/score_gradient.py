"""Discrete latents trained by the score function without a baseline: a gradient that is mostly noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from ..dataflow import Reading
from ..findings import Finding
from ..objectives import ELBO
from ..pair import Pair
from ..programs import preserved_rng

RUNS = 20
"""Gradients at the same parameters, by each estimator: the ratio of their variances is then known to a third."""
PARTICLES = 2
"""Draws in each: the least with which the mixed estimator has the other draw for a baseline."""
TIMES = 10.0
"""Variance of the gradient over that with a baseline, from which it is told: that many times the draws are needed."""


def look(case: Any) -> Iterator[Finding]:
    yield from score_gradients(case.pair, case.rows, case.sizes, case.after)


def score_gradients(pair: Pair, batch: Sequence[Any], sizes: Mapping[str, int], reading: Reading) -> Iterator[Finding]:
    """Sites of the guide without a pathwise gradient under a plain `Trace_ELBO`, and the noise of their gradient."""
    if type(pair.loss_fn) is not Trace_ELBO:
        return
    sites = [
        name
        for part, name, node, _ in reading.sampled()
        if part == "guide"
        and node["fn"].support.is_discrete
        and not node["infer"].get("enumerate")
        and not node["infer"].get("baseline")
    ]
    parameters = [p for p in pair.owners.parameters() if p.requires_grad]
    if not sites or not parameters:
        return
    plain, mixed = (
        _noise(Pair(pair.model, pair.guide, loss), batch, sizes, parameters)
        for loss in (Trace_ELBO(num_particles=PARTICLES), ELBO(particles=PARTICLES, estimator="mixed"))
    )
    if not plain > TIMES * mixed:
        return
    yield Finding(
        name="score-function gradient",
        part="guide",
        harm=2,
        evidence=(
            f"site {sites[0]!r} is discrete and has no baseline: its gradient has {plain / mixed:.0f} times the "
            "variance that it has with one"
        ),
        consequence="most of each step is noise: training needs as many times the steps, or stays where it is",
        cure=(
            'loss=dgm.ELBO(particles=4, estimator="mixed"), which has a baseline; or sum the site out: '
            'Discrete(..., enumerate="parallel") with pyro.infer.TraceEnum_ELBO()'
        ),
    )


def _noise(pair: Pair, batch: Sequence[Any], sizes: Mapping[str, int], parameters: Sequence[Tensor]) -> float:
    """The variance of the gradient of one step, summed over the parameters."""
    runs = []
    with preserved_rng(0):
        for _ in range(RUNS):
            loss = pair.loss(None, batch, sizes=sizes)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            runs.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    return float(torch.stack(runs).var(0).sum())
