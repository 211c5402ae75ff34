"""Importance weights of the trained guide with tails so heavy that no estimate by them can be trusted.

Yao, Vehtari, Simpson and Gelman, "Yes, but did it work? Evaluating variational inference", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..case import Case, NotSeen
from ..evaluate import global_khat
from ..findings import Finding
from ..heldout import spaced
from ..pair import Pair, chunk_of
from ..posthoc import has_density
from ..psis import k_threshold, pareto_k
from ..weights import LogWeightSampler

ROWS = 200
DRAWS = 500
MANY = 0.25
"""Share of rows with a k-hat above its threshold from which `dgm.evaluate` calls the weights bad."""
FEW = 20
"""Global latents up to which a k-hat of their whole posterior is asked for: in hundreds of dimensions no variational
guide passes, however good its predictions are, and that is said in a note."""


def look(case: Case) -> Iterator[Finding]:
    if case.course.error:
        raise NotSeen("the training diverged")
    found = case.latents
    if any(site.discrete for site in found.values()) or not has_density(case.pair.guide):
        return
    yield from (_rows(case) if found.local and not found.global_ else _whole(case))


def _rows(case: Case) -> Iterator[Finding]:
    khat = _khat(case, case.pair)
    limit = k_threshold(DRAWS)
    if not len(khat) or float((khat > limit).float().mean()) <= MANY:
        return
    pair, course = case.levelled
    khat = _khat(case, pair)
    share = float((khat > limit).float().mean())
    if share <= MANY:
        return
    yield Finding(
        name="k-hat",
        part="posterior",
        harm=2,
        evidence=(
            f"after {course.steps} steps {100 * share:.0f} % of {len(khat)} rows have a k-hat above {limit:.2f} "
            f"(median {float(khat.median()):.2f}, {DRAWS} draws each)"
        ),
        consequence="q misses much of the posterior of these rows: bounds are loose there, and their errors too small",
        cure='a richer family (FullNormal, a flow) or a larger encoder; dgm.evaluate(thorough=["gaps"]) says which',
        size=share,
    )


def _khat(case: Any, pair: Pair) -> torch.Tensor:
    rows, places = (case.rows, case.places) if case.whole else spaced(case.rows, ROWS)
    with chunk_of(case.source.rows, places if case.whole else case.places[places]):
        sampler = LogWeightSampler(pair.model, pair.guide, *rows, plates=case.plates)
        if sampler.is_point:
            return torch.zeros(0)
        return pareto_k(torch.cat([chunk.local for chunk in sampler.chunks(DRAWS)]))


def _whole(case: Case) -> Iterator[Finding]:
    if not case.latents.global_ or case.latents.local:
        return
    count = sum(site.value.numel() for site in case.latents.global_ if site.value is not None)
    if len(case.rows[0]) < case.source.rows:
        raise NotSeen("it needs all rows at once, and there are too many")
    if count > FEW:
        case.notes.append(f"no k-hat of {count} global latents: no guide of so many passes; judge it by held-out rows")
        return
    limit = k_threshold(1000)
    khat = _global(case, case.pair)
    if not khat > limit:
        return
    pair, course = case.levelled
    khat = _global(case, pair)
    if not khat > limit:
        return
    yield Finding(
        name="k-hat",
        part="posterior",
        harm=2,
        evidence=f"k-hat of the {count} global latents is {khat:.2f} after {course.steps} steps, above {limit:.2f}",
        consequence="the guide's uncertainty is not the model's",
        cure="a richer family (FullNormal, a flow), NUTS for so few latents, or another parametrisation",
        size=khat,
    )


def _global(case: Any, pair: Pair) -> float:
    with chunk_of(case.source.rows, case.places):
        return global_khat(pair.model, pair.guide, *case.rows, seed=case.seed, plates=case.plates)
