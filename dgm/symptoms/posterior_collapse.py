"""Posterior collapse: latents that do not depend on the data, though the data have something to tell them.

Bowman et al., "Generating sentences from a continuous space", 2016; He et al., "Lagging inference networks and
posterior collapse in variational autoencoders", 2019; active units by Burda, Grosse and Salakhutdinov, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..baseline import marginals
from ..case import NotSeen
from ..course import Course
from ..dataflow import Reading, by_row
from ..findings import Finding
from ..latent_diagnostics import LatentDiagnostics

WARMUP = 0.5
"""Share of the steps over which the KL weight rises in the training that is tried as a cure."""
GAINED = 0.05
"""Nats a datum by which the decoder alone must beat independent marginals to be called strong, and that latents must
carry to be called awake."""
EDGE = 1.5
"""Largest eigenvalue of the correlations, over the largest that independent columns would have by chance, from which
the data have something to tell (Marchenko and Pastur: (1 + sqrt(d / N))^2)."""
HALF = 0.5
"""Share of active units up to which it is asked whether a warm-up wakes more."""


def look(case: Any) -> Iterator[Finding]:
    if not case.latents.local:
        return
    course = case.course
    if course.error:
        raise NotSeen("the training diverged")
    found = case.units(case.pair)
    if _awake(found):
        return
    pair, longer = case.longer
    normal = case.units(pair)
    if longer.error or _awake(normal):
        return
    warm_pair, warm = case.trial(steps=longer.steps, warmup=WARMUP)
    woken = None if warm.error else case.units(warm_pair)
    helps = (
        woken is not None
        and woken.active >= max(normal.active + 1, 2 * normal.active)
        and _last(warm) > _last(longer) - 0.01 * abs(_last(longer))
        and woken.kl > max(2 * normal.kl, GAINED)
    )
    if helps and woken is not None:
        cure = f"kl_warmup over {100 * WARMUP:.0f} % of the epochs gives {woken.active} of {woken.total_units} here"
        cure += f" at a bound of {_last(warm):.4g} instead of {_last(longer):.4g}"
    else:
        cure = "kl_warmup alone does not help here: a weaker decoder, dgm.ELBO(free_bits=0.5), or a sharper likelihood"
    strong, edge = _without_latents(case.after, longer), _structure(case.after)
    if normal.kl > GAINED and not helps:
        return
    reasons = []
    if strong > GAINED:
        reasons.append(f"the decoder alone is {strong:.2g} nats a datum better than independent marginals")
    if edge > EDGE:
        reasons.append(f"the columns are correlated, {edge:.1f} times what chance would give")
    settled = longer.late < 0.1
    if not helps and not (reasons and settled):
        if not settled:
            raise NotSeen(f"no unit is active yet, and the bound still rises after {longer.steps} steps")
        return  # nothing in the data for a latent to tell
    why = f": {'; '.join(reasons)}" if reasons else ""
    yield Finding(
        name="posterior collapse",
        part="posterior",
        harm=2,
        evidence=(
            f"{normal.active} of {normal.total_units} latent units are active after {longer.steps} steps (KL "
            f"{normal.kl:.2g} nats a datum){why}"
        ),
        consequence="the decoder ignores them: no representation, and samples that differ by noise alone",
        cure=cure,
        size=float(normal.total_units - normal.active),
    )


def _awake(found: LatentDiagnostics) -> bool:
    return found.share > HALF and found.kl > GAINED


def _last(course: Course) -> float:
    return float(course.curve["bound"].iloc[-1])


def _without_latents(reading: Reading, course: Course) -> float:
    """Nats a datum by which the likelihood beats independent marginals; -inf where there are none."""
    rows = marginals({name: node for name, node, _, _ in reading.observed()})
    return -math.inf if rows is None else float(course.curve["log_likelihood"].iloc[-1]) - float(rows.mean())


def _structure(reading: Reading) -> float:
    """The largest eigenvalue of the columns' correlations over the largest that chance gives independent columns."""
    for _, node, _, value in reading.observed():
        x = by_row(node, value).detach().double()
        x = x[:, x.std(0) > 0]
        if x.shape[1] < 2 or len(x) < 10:
            continue
        largest = float(torch.linalg.eigvalsh(_correlations(x))[-1])
        return largest / (1 + math.sqrt(x.shape[1] / len(x))) ** 2
    return 0.0


def _correlations(x: Tensor) -> Tensor:
    z = (x - x.mean(0)) / x.std(0)
    return z.T @ z / (len(z) - 1)
