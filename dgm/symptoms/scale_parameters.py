"""Scales of the likelihood or of the guide that run to 0 or to infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..dataflow import Reading, by_row
from ..findings import Finding

DEAD = 1e-3
"""Smallest scale of a likelihood over the smallest sd of its columns: data are rarely noise-free to a thousandth."""
WIDE = 100.0
"""Largest scale of a likelihood over the largest sd of its columns; 1 explains the data by nothing but noise."""
POINT = 1e-4
"""Smallest scale of a guide over that of the priors: a hundred million data would give so sharp a posterior."""
LOOSE = 100.0
"""Largest scale of a guide over that of the priors: no posterior is wider than its prior by so much."""


def look(case: Any) -> Iterator[Finding]:
    yield from likelihood_scales(case.course.scales, case.after)
    yield from guide_scales(case.course.scales, case.after)


def likelihood_scales(scales: pd.DataFrame, reading: Reading) -> Iterator[Finding]:
    """Observed sites whose learnt or latent scale left the units of the data."""
    for name, node, base, value in reading.observed():
        if not isinstance(getattr(base, "scale", None), Tensor) or not reading.depends_on(base.scale):
            continue
        x = by_row(node, value).detach().double()
        sd = x.std(0) if len(x) > 1 else torch.zeros(0)
        sd = sd[sd > 0]
        if not len(sd):
            continue
        first, before, last = _course(scales, "model", name)
        low, high = last["low"], last["high"]
        if low < DEAD * float(sd.min()):
            yield Finding(
                name="dead scale",
                part="model",
                harm=3,
                evidence=(
                    f"site {name!r}: the smallest scale went from {first['low']:.3g} to {low:.3g}"
                    f"{' and is falling' if low < before['low'] else ''}; the data's least sd is {float(sd.min()):.3g}"
                ),
                consequence=(
                    "the likelihood has no maximum: some value is hit exactly, its density goes to infinity, and the "
                    "bound with it"
                ),
                cure="bound the scale from below (floor + exp(log_scale)), share it over columns, or give it a prior",
                size=math.log(float(sd.min()) / max(low, 1e-300)),
            )
        if high > WIDE * float(sd.max()):
            yield Finding(
                name="exploding scale",
                part="model",
                harm=3,
                evidence=(
                    f"site {name!r}: the largest scale went from {first['high']:.3g} to {high:.3g}"
                    f"{' and is rising' if high > before['high'] else ''}; the data's sd is {float(sd.max()):.3g}"
                ),
                consequence="the data have no weight: what is learnt is the prior",
                cure="start the scale near the sd of the data, lower lr, or use softplus in place of exp",
                size=math.log(high / float(sd.max())),
            )


def guide_scales(scales: pd.DataFrame, reading: Reading) -> Iterator[Finding]:
    """Sites of the guide whose scale is far from what the priors' and any data could make of it."""
    priors = [
        node["fn"] for name, node in reading.model.nodes.items() if node["type"] == "sample" and not node["is_observed"]
    ]
    widths = [s for fn in priors if (s := _scale(fn)) is not None]
    low, high = min((w[0] for w in widths), default=1.0), max((w[1] for w in widths), default=1.0)
    for name in scales.loc[scales["part"] == "guide", "site"].unique() if len(scales) else ():
        first, before, last = _course(scales, "guide", name)
        if last["low"] < POINT * low:
            yield Finding(
                name="dead scale",
                part="guide",
                harm=2,
                evidence=(
                    f"site {name!r}: the guide's smallest scale went from {first['low']:.3g} to {last['low']:.3g}"
                    f"{' and is falling' if last['low'] < before['low'] else ''}; the priors' smallest is {low:.3g}"
                ),
                consequence="that coordinate is a point: no uncertainty, and log q grows without bound",
                cure="start wider (init_scale=), keep the KL weight above 0, or ask why the data fix it (a duplicate?)",
                size=math.log(low / max(last["low"], 1e-300)),
            )
        if last["high"] > LOOSE * high:
            yield Finding(
                name="exploding scale",
                part="guide",
                harm=2,
                evidence=(
                    f"site {name!r}: the guide's largest scale went from {first['high']:.3g} to {last['high']:.3g}"
                    f"{' and is rising' if last['high'] > before['high'] else ''}; the priors' largest is {high:.3g}"
                ),
                consequence="draws lie where the model was never meant to be evaluated, and the gradient is noise",
                cure="start narrower (init_scale=0.1), lower lr; look for a latent that nothing holds (a flat prior)",
                size=math.log(last["high"] / high),
            )


def _scale(fn: Any) -> tuple[float, float] | None:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    scale = getattr(fn, "scale", None)
    if not isinstance(scale, Tensor) or not scale.numel():
        return None
    return float(scale.detach().min()), float(scale.detach().max())


def _course(scales: pd.DataFrame, part: str, site: str) -> tuple[Any, Any, Any]:
    """The first, the last but one and the last look at a site's scale."""
    rows = scales[(scales["part"] == part) & (scales["site"] == site)]
    return rows.iloc[0], rows.iloc[max(0, len(rows) - 3)], rows.iloc[-1]
