"""Steps that stay in Python, because the program cannot be made a graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ..borrowed import copied, quietly
from ..findings import Finding
from ..optim import adam
from ..pair import NotReparameterised
from ..svi import SVI

CANNOT = ("no pathwise gradient", "has no differentiable loss", "depends on its parameters")
"""Reasons that lie in the latents themselves: there is nothing to mend."""


def look(case: Any) -> Iterator[Finding]:
    case.course  # noqa: B018  # NotSeen where the pair cannot be trained
    pair = copied(case.pair, case.loss)
    svi = SVI(pair.model, pair.guide, adam(case.lr), case.loss, sizes=case.sizes, compile="trace")
    try:
        with quietly():
            svi.step(*case.batch, rows=case.index)
    except NotReparameterised:
        return
    if svi.fallback is None or any(reason in svi.fallback for reason in CANNOT):
        return
    start = time.perf_counter()
    for _ in range(3):
        svi.step(*case.batch, rows=case.index)
    each = (time.perf_counter() - start) / 3
    yield Finding(
        name="steps in Python",
        part="training",
        harm=1,
        evidence=f"no graph can be made of a step, which takes {1000 * each:.1f} ms: {svi.fallback}",
        consequence="training runs at the speed of Python, several times slower than it could",
        cure="write the program without .item(), branches on values, and modules that only a closure holds",
        size=each,
    )
