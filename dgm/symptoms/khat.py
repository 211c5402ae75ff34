"""Importance weights of the trained guide with tails so heavy that no estimate by them can be trusted.

Yao, Vehtari, Simpson and Gelman, "Yes, but did it work? Evaluating variational inference", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..case import Case, NotSeen
from ..evaluate import KHAT_SAMPLES, global_khat
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
    if found.local and not found.global_:
        yield from _rows(case)
    else:
        _whole(case)


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


def _whole(case: Case) -> None:
    """A note, not a finding: a guide that still jitters by the learning rate has a k-hat of 1 in the right family too.

    Linear regression of diabetes on 10 columns, 300 to 2700 steps at lr=1e-2: 1.3 to 1.0 with full normals, of which
    one is the exact posterior.
    """
    found = case.latents
    if not found.global_ or found.local or len(case.rows[0]) < case.source.rows:
        return
    count = sum(site.value.numel() for site in found.global_ if site.value is not None)
    if count > FEW:
        case.notes.append(f"no k-hat of {count} global latents: no guide of so many passes; judge it by held-out rows")
        return
    with chunk_of(case.source.rows, case.places):
        khat = global_khat(case.pair.model, case.pair.guide, *case.rows, seed=case.seed, plates=case.plates)
    case.notes.append(
        f"k-hat of the {count} global latents is {khat:.2f} after the short training ({k_threshold(KHAT_SAMPLES):.2f} "
        "would do); to judge the guide train it out, with a falling learning rate, and see dgm.evaluate(train=...)"
    )
