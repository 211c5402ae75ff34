"""A model that draws noise outside of its sample sites: its density is another one at each run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..findings import Finding
from ..pair import Pair
from ..programs import evaluating, preserved_buffers, preserved_rng

RELATIVE = 1e-4
"""Relative difference of a site's log density between two runs at the same latents; rounding makes 1e-6."""


def look(case: Any) -> Iterator[Finding]:
    yield from noise_outside_sites(case.pair, case.rows)


def noise_outside_sites(pair: Pair, batch: Sequence[Any]) -> Iterator[Finding]:
    """Sites of the model whose log density changes from run to run, in evaluation mode, at fixed latents."""
    programs = (pair.model, pair.guide)
    with evaluating(*programs), preserved_buffers(*programs), preserved_rng(0), pair.running():
        guide = poutine.trace(pair.run_guide).get_trace(*batch)
        start = torch.get_rng_state()
        first = poutine.trace(poutine.replay(pair.run_model, trace=guide)).get_trace(*batch)
        latents: dict[str, Any] = {
            name: node["value"]
            for name, node in first.nodes.items()
            if node["type"] == "sample" and not node["is_observed"]
        }
        runs = []
        for seed in (1, 2):
            torch.set_rng_state(start)
            torch.manual_seed(seed)
            trace = poutine.trace(poutine.condition(pair.run_model, data=latents)).get_trace(*batch)
            runs.append({name: _log_prob(node) for name, node in trace.nodes.items() if node["type"] == "sample"})
    for name, value in runs[0].items():
        other = runs[1].get(name)
        if other is None or abs(value - other) <= RELATIVE * (1 + abs(value)):
            continue
        yield Finding(
            name="noise outside of sites",
            part="model",
            harm=3,
            evidence=f"site {name!r}: log p is {value:.6g} in one run and {other:.6g} in the next, at the same latents",
            consequence=(
                "the model has a latent that no guide knows of: the bound is that of its mean log density, and log "
                "weights, k-hat and evaluation are noise"
            ),
            cure="draw it by pyro.sample, or hand it in as data",
        )
        return  # the first of them: those below follow from it


def _log_prob(node: Any) -> float:
    value = node["fn"].log_prob(node["value"])
    return float(value.sum()) if isinstance(value, Tensor) else 0.0
