"""A likelihood whose scale is a constant far from what the data leave over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.distributions import Laplace, Normal, StudentT

from ..dataflow import Reading
from ..findings import Finding
from .likelihood_kind import levelled

WIDE = 3.0
"""Declared scale over residual sd. A short training leaves too much residual, not too little, so that the ratio is a
lower bound; at 3 the data have a ninth of their weight."""
NARROW = 10.0
"""Residual sd over declared scale; more than for WIDE, because a short training leaves some of it to learn."""
LEAST = 20
"""Values below which a residual sd says little."""


def look(case: Any) -> Iterator[Finding]:
    found = list(fixed_scales(case.after))
    yield from (f for f in found if f.size < 1)
    if any(f.size > 1 for f in found):  # a longer training may explain the residuals
        reading = levelled(case)
        yield from (f for f in fixed_scales(reading) if f.size > 1) if reading is not None else ()


def fixed_scales(reading: Reading) -> Iterator[Finding]:
    """Gaussian-like observed sites whose scale is neither learnt nor a latent, held against their residuals."""
    for name, _, base, value in reading.observed():
        if not isinstance(base, Normal | Laplace | StudentT) or value.numel() < LEAST:
            continue
        if reading.depends_on(base.scale):
            continue
        gap = (value - base.loc).detach()
        residual, relative = float(gap.square().mean().sqrt()), float((gap / base.scale).square().mean().sqrt())
        if not residual > 0 or 1 / WIDE <= relative <= NARROW:
            continue
        declared = residual / relative
        kind = type(base).__name__
        if relative < 1:
            consequence = (
                f"the data term has 1/{relative**-2:.0f} of the weight that these residuals call for: latents collapse "
                "to the prior and what is drawn from the model is mostly noise"
            )
        else:
            consequence = (
                f"the data term has {relative**2:.0f} times the weight that these residuals call for: the posterior "
                "is far too sure, and single rows pull the parameters"
            )
        yield Finding(
            name="likelihood scale",
            part="model",
            harm=3,
            evidence=(
                f"site {name!r}: {kind} with the fixed scale {declared:.3g}, and a residual sd of {residual:.3g} after "
                "the short training"
            ),
            consequence=consequence,
            size=relative,
            cure=f"learn the scale (a parameter log_scale, or a latent), or set it to about {residual:.2g}",
        )
