"""A gradient that is mostly noise, of the guide's or of the model's parameters.

Rainforth et al., "Tighter variational bounds are not necessarily better", 2018: the guide's signal-to-noise ratio under
an importance weighted bound falls as the number of samples grows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..borrowed import copied
from ..case import Case
from ..findings import Finding
from ..pair import NotReparameterised, Pair
from ..signal_to_noise import signal_to_noise

SUSPECT = 0.3
"""A ratio that 16 draws cannot tell from 0: then it is measured again."""
NOISY = 0.1
"""Ratio at the start below which a step is noise: 1 / 0.1^2 = 100 steps of it make one of signal."""
DRAWS = 256
"""Draws of the second measurement: it sees ratios down to 1/16 of any gradient, and of large ones less."""
FEWER = 64
"""Draws of each estimator, where two are compared."""
TIMES = 3.0
"""The ratio by the doubly reparameterised estimator, in ratios of the pathwise one, from which the change pays."""


def look(case: Case) -> Iterator[Finding]:
    yield from _at_start(case)
    yield from _by_samples(case)


def _at_start(case: Case) -> Iterator[Finding]:
    first = case.course.gradients["start"]
    if not (first["snr"] < SUSPECT).any():
        return
    again = _measure(case, case.first)
    for row in again.to_dict("records"):
        snr = float(row["snr"])
        if not snr < NOISY:
            continue
        draws = math.ceil(1 / max(snr, 1 / math.sqrt(DRAWS)) ** 2 / 4)
        yield Finding(
            name="gradient noise",
            part=row["part"],
            harm=1,
            evidence=(
                f"at the start the gradient of the {row['part']} has a signal-to-noise ratio of {snr:.2g} "
                f"({DRAWS} draws on one batch)"
            ),
            consequence="most steps go nowhere, and the first hundreds of them average noise",
            cure=f"a narrower guide at the start (init_scale), dgm.ELBO(particles={min(draws, 64)}), or larger batches",
            size=1 / max(snr, 1e-3),
        )


def _by_samples(case: Case) -> Iterator[Finding]:
    loss = case.pair.loss_fn
    if (
        getattr(loss, "estimator", "") != "pathwise"
        or getattr(loss, "num_particles", 1) < 2
        or not hasattr(loss, "alpha")
    ):
        return
    other = copy.copy(loss)
    other.estimator = "dreg"
    pair = copied(case.pair, case.loss)
    try:
        now, then = (
            dict(_measure(case, Pair(pair.model, pair.guide, by), FEWER).to_numpy()[:, :2].tolist())
            for by in (loss, other)
        )
    except NotReparameterised:
        return
    here, there = now.get("guide", math.nan), then.get("guide", math.nan)
    if not (here < 1.0 and there > TIMES * max(here, 1 / math.sqrt(FEWER))):
        return
    yield Finding(
        name="gradient noise",
        part="guide",
        harm=2,
        evidence=(
            f"with {loss.num_particles} samples the gradient of the guide has a signal-to-noise ratio of {here:.2g} "
            f"after the short training (the model's {now.get('model', math.nan):.2g})"
        ),
        consequence="the tighter bound teaches the guide less: its signal falls as 1/sqrt(samples) against the noise",
        cure=f'{type(loss).__name__}({loss.num_particles}, estimator="dreg"): {there:.2g} here',
        size=there / max(here, 1e-3),
    )


def _measure(case: Any, pair: Pair, draws: int = DRAWS) -> pd.DataFrame:
    return signal_to_noise(pair, case.batch, case.index, case.sizes, draws=draws, seed=case.seed)
