"""Data of another kind than the likelihood: labels or counts under a normal density, counts that a Poisson is too
narrow for, residuals with heavy tails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, Poisson

from ..case import NotSeen
from ..dataflow import Reading, by_row, read_pair
from ..findings import Finding
from ..pair import chunk_of

LEAST = 50
"""Values below which the kind of the data is not told from them."""
SMALL_MEAN = 10.0
"""Mean up to which counts are visibly no normal numbers: a Poisson of mean 10 has a skewness of 0.3."""
ZEROS = 0.05
"""Share of zeros that whole numbers need to be taken for counts, and not for ages or years."""
DISPERSION = 3.0
"""Pearson dispersion, 1 for a Poisson: at 3 its intervals are 1.7 times too short."""
KURTOSIS = 10.0
"""Excess kurtosis of residuals, median over columns: 0 for a normal, 3 for a Laplace, 6 for a Student t of 5 degrees
of freedom. For 200 values its standard error under a normal is 0.35."""
TAIL_ROWS = 200
"""Rows that a kurtosis needs."""


KIND = "likelihood of another kind"


def look(case: Any) -> Iterator[Finding]:
    found = list(likelihood_kinds(case.after))
    yield from (f for f in found if f.name == KIND)
    if any(f.name != KIND for f in found):  # told by residuals, which a longer training may explain
        reading = levelled(case)
        yield from (f for f in likelihood_kinds(reading) if f.name != KIND) if reading is not None else ()


def levelled(case: Any) -> Reading | None:
    """The pair once its bound has levelled off, on the same rows; None where it does not."""
    try:
        pair, _ = case.levelled
    except NotSeen:
        return None
    if pair is case.pair:
        return case.after
    with chunk_of(case.source.rows, case.places):
        return read_pair(pair, case.rows, case.seed, case.sizes)


def likelihood_kinds(reading: Reading) -> Iterator[Finding]:
    """Every observed site whose values are plainly of another kind than its distribution."""
    for name, node, base, value in reading.observed():
        if value.numel() < LEAST:
            continue
        if isinstance(base, Normal):
            found = _not_normal(name, value)
            yield from [found] if found is not None else _heavy_tails(name, node, base, value)
        elif isinstance(base, Poisson):
            yield from _overdispersed(name, base, value.detach())


def _finding(evidence: str, consequence: str, cure: str, name: str = KIND) -> Finding:
    return Finding(
        name=name,
        part="model",
        harm=2,
        evidence=evidence,
        consequence=consequence,
        cure=cure,
    )


def _not_normal(name: str, value: Tensor) -> Finding | None:
    whole = bool((value == value.round()).all())
    low, high = float(value.min()), float(value.max())
    if not whole or low < 0 or low == high:
        return None
    if high == 1:
        return _finding(
            f"site {name!r}: all {value.numel()} values are 0 or 1 (mean {float(value.float().mean()):.3g}), under a "
            "Normal",
            "a density on the line is given to two points: the bound is no probability of the data and grows without "
            "bound where the scale is learnt",
            "Bernoulli(logits=...)",
        )
    zeros, mean = float((value == 0).float().mean()), float(value.float().mean())
    if zeros < ZEROS or mean > SMALL_MEAN:
        return None
    return _finding(
        f"site {name!r}: all {value.numel()} values are whole numbers from 0 to {high:.0f}, {100 * zeros:.0f} % of "
        f"them 0, mean {mean:.3g}, under a Normal",
        "the density reaches below 0 and is symmetric where counts are not; its scale cannot follow their mean",
        "Poisson or NegativeBinomial for counts, Categorical for levels",
    )


def _overdispersed(name: str, base: Any, value: Tensor) -> Iterator[Finding]:
    """Pearson's dispersion about the fitted rate, after the rate's own scale and exponent are fitted to the data.

    mu = exp(a + b log rate) by iterated least squares: a rate that a short training left too flat or too low is no
    reason to call the data overdispersed.
    """
    rate = base.rate.detach().double().flatten().clamp_min(1e-6)
    y = value.double().flatten()
    design = torch.stack([torch.ones_like(rate), rate.log()], 1)
    if float(design[:, 1].std()) < 1e-6:
        design = design[:, :1]
    mu = y.mean().expand_as(y) if design.shape[1] == 1 else (y + y.mean()) / 2
    for _ in range(20):
        eta = mu.log()
        weighted = design * mu[:, None]
        beta = torch.linalg.lstsq(weighted.mT @ design, weighted.mT @ (eta + (y - mu) / mu)).solution
        mu = (design @ beta).clamp(-20, 20).exp()
    dispersion = float(((y - mu).square() / mu).sum() / (len(y) - design.shape[1]))
    if not dispersion > DISPERSION:
        return
    yield _finding(
        f"site {name!r}: the Pearson dispersion of {len(y)} counts under Poisson is {dispersion:.3g}, where 1 is right",
        f"intervals are {dispersion**0.5:.1f} times too short, and the posterior is too sure",
        "NegativeBinomial, or a latent for each row in the log rate",
        "overdispersed counts",
    )


def _heavy_tails(name: str, node: Any, base: Any, value: Tensor) -> Iterator[Finding]:
    rows = by_row(node, ((value - base.loc) / base.scale).detach()).double()
    if len(rows) < TAIL_ROWS:
        return
    centred = rows - rows.mean(0)
    variance = centred.square().mean(0)
    kept = variance > 1e-12 * float(variance.max())
    if not bool(kept.any()):
        return
    excess = (centred[:, kept].pow(4).mean(0) / variance[kept].square() - 3).median()
    if not float(excess) > KURTOSIS:
        return
    beyond = float((centred[:, kept].abs() > 5 * variance[kept].sqrt()).double().mean())
    yield _finding(
        f"site {name!r}: the residuals have an excess kurtosis of {float(excess):.3g} under Normal, and "
        f"{100 * beyond:.2g} % of them lie beyond 5 sd",
        "few rows rule the fit, and the scale stands for neither the many nor the few",
        "StudentT, or look at these rows first",
        "heavy tails",
    )
