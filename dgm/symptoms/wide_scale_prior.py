"""A prior of a scale that spans hundreds of powers of ten: "uninformative" by name, improper in effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..dataflow import Reading
from ..findings import Finding
from ..programs import preserved_rng
from ..sites import support_name

LOG_SD = 8.0
"""Standard deviation of the log of a draw: e^8 is 3000, so that two thirds of the draws span seven powers of ten. A
half-Cauchy has 1.6, LogNormal(0, 2) has 2, InverseGamma(0.1, 0.1) has 10."""
DRAWS = 200
"""Draws of the prior; the sd of 200 logs is known to 5 %."""


def look(case: Any) -> Iterator[Finding]:
    yield from wide_scale_priors(case.after)


def wide_scale_priors(reading: Reading) -> Iterator[Finding]:
    """Positive latents outside of plates whose prior's draws differ by many powers of ten."""
    for part, name, node, _ in reading.sampled():
        if part != "model" or node["is_observed"] or name not in reading.latents:
            continue
        if support_name(node["fn"].support) not in ("positive", "nonnegative"):
            continue
        with torch.no_grad(), preserved_rng(0):
            try:
                draws = node["fn"].sample((DRAWS,)).double()
            except NotImplementedError:
                continue  # a flat prior, which cannot be drawn from, is meant as one
        least = torch.finfo(torch.float32).tiny
        logs = draws.clamp(least, torch.finfo(torch.float32).max).log().reshape(DRAWS, -1)
        spread = float(logs.std(0).mean())
        if spread < LOG_SD:
            continue
        low, high = (
            float(q) for q in torch.quantile(logs.flatten()[:10_000] / 2.302585, torch.tensor([0.05, 0.95]).double())
        )
        yield Finding(
            name="wide scale prior",
            part="model",
            harm=2,
            evidence=(
                f"site {name!r}: nine tenths of the draws of its prior lie between 1e{low:.0f} and 1e{high:.0f} (sd of "
                f"the log {spread:.0f})"
            ),
            consequence=(
                "it is no weak prior but a strong one on the edges: the posterior leans on 0 where groups are few, and "
                "draws of the prior overflow (Gelman, 2006)"
            ),
            cure=f"HalfNormal, HalfCauchy or LogNormal in the units of the data for {name!r}",
        )
