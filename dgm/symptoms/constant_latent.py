"""A latent dimension that stands away from its prior, at the same place for every row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..findings import Finding
from ..latent_diagnostics import LatentDiagnostics

PAID = 0.25
"""Nats a datum from which a dimension that says nothing of the rows costs something; a collapsed one costs 0.01."""
SURE = 5.0
"""Standard errors that the KL must lie above it."""


def look(case: Any) -> Iterator[Finding]:
    if not case.latents.local:
        return
    found = case.units(case.pair)
    if len(_wasted(found)):
        pair, _ = case.levelled
        yield from constant_latents(case.units(pair))


def _wasted(found: LatentDiagnostics) -> Any:
    units = found.units
    return units[~units["active"] & (units["kl"] - SURE * units["kl_se"] > PAID)]


def constant_latents(found: LatentDiagnostics) -> Iterator[Finding]:
    """Units without activity whose KL is not 0: the guide moved away from the prior, for all rows alike."""
    wasted = _wasted(found)
    if not len(wasted):
        return
    names = ", ".join(f"{site}[{i}]" for site, i in zip(wasted["site"], wasted["index"], strict=True))
    cost = float(wasted["kl"].sum())
    yield Finding(
        name="constant latent",
        part="posterior",
        harm=2,
        evidence=(
            f"{names}: E_q is the same for all rows (variance {float(wasted['activity'].max()):.2g}), and its KL "
            f"is {cost:.2g} nats a datum"
        ),
        consequence="each row pays these nats and learns nothing: the latent acts as a bias of the decoder",
        cure="give the encoder what the rows differ in (inputs=), look for dead units in it, or drop the latent",
        size=cost,
    )
