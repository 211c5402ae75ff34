"""A model that is no better than independent marginals of what it observes: the mean, or the majority."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..baseline import marginals
from ..case import ROWS, Case, NotSeen
from ..findings import Finding
from ..heldout import HeldOut, spaced
from ..pair import Pair, chunk_of
from ..sites import latents

SURE = 3.0
"""Standard errors of the mean difference over rows by which the model must be worse."""
LEAST = 0.02
"""Nats a datum that the difference must have: a model that has found nothing is as good as the marginals, and the KL of
latents that are nearly idle costs it about this."""
PATIENCE = 5.0
"""Times the steps after which the bound would be as good, at the pace of its last quarter: then it is only slow."""
SAMPLES = 16


def look(case: Case) -> Iterator[Finding]:
    if case.course.error:
        raise NotSeen("the training diverged")
    kind, rows = _bound(case, case.pair)
    base = _baseline(case)
    if base is None or not _worse(rows - base):
        return
    pair, course = case.levelled
    kind, rows = _bound(case, pair)
    gap = rows - base
    if not _worse(gap):
        return
    bound = course.curve["bound"]
    rate = float(bound.iloc[-1] - bound.iloc[-1 - len(bound) // 4])
    if rate * 4 * PATIENCE > -float(gap.mean()):
        raise NotSeen(f"after {course.steps} steps it is worse, but rises by {rate:.2g} nats in a quarter of them")
    worse, error = -float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    yield Finding(
        name="worse than trivial",
        part="model",
        harm=2,
        evidence=(
            f"the {kind} is {float(rows.mean()):.4g} nats a datum after {course.steps} steps, that of independent "
            f"marginals (means and spreads, or frequencies) is "
            f"{float(base.mean()):.4g}: worse by {worse:.2g} ± {error:.1g}"
        ),
        consequence="what was learnt is less than the mean and the spread of each column say",
        cure=(
            "start the last layer at the marginals (initialise_output_bias), and look at what it cannot express: the "
            "sign or range of its output, a fixed scale, inputs that it does not see"
        ),
        size=worse,
    )


def _worse(gap: torch.Tensor) -> bool:
    error = float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else math.inf
    return bool(torch.isfinite(gap).all()) and float(gap.mean()) < -max(LEAST, SURE * error)


def _judged(case: Case) -> tuple[tuple[Any, ...], torch.Tensor]:
    """The rows to be judged by, and their numbers; all of them where the programs take no fewer."""
    if case.whole:
        return case.rows, case.places
    rows, places = spaced(case.rows, ROWS)
    return rows, case.places[places]


def _bound(case: Case, pair: Pair) -> tuple[str, torch.Tensor]:
    rows, places = _judged(case)
    held = HeldOut(pair.model, pair.guide, rows, sizes=case.sizes, samples=SAMPLES)
    with chunk_of(case.source.rows, places):
        bound = held.bound(case.seed, importance=True)  # of log p(x): a loose q is no worse model
    kind = "log predictive density of the training rows" if case.latents.global_ else "bound"
    return kind, bound.double()


def _baseline(case: Case) -> torch.Tensor | None:
    """Marginals of all rows that are looked at, for those that are judged by."""
    if case.whole:
        return marginals(case.latents.observed)
    whole = marginals(latents(case.pair.model, *case.rows, plates=case.plates).observed)
    return None if whole is None else whole[spaced(case.rows, ROWS)[1]]
