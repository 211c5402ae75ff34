"""The weight of the data in a training step: N/B once, and neither twice nor not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ..dataflow import read_pair
from ..findings import Finding
from ..pair import Pair, batch_rows

BATCH = 100
"""Rows of the batch that is looked at, at most; and at most half of the data."""


def look(case: Any) -> Iterator[Finding]:
    yield from plate_scales(case.first, case.rows, case.sizes, case.source.rows)


def plate_scales(
    pair: Pair, data: Sequence[Any], sizes: Mapping[str, int], total: int | None = None
) -> Iterator[Finding]:
    """Observed sites that a minibatch does not count N/B times.

    Args:
        pair: the pair. data: the rows, or some of them.
        sizes: full sizes of the data plates as training has them; none where each step takes all rows.
        total: N, how many rows there are; as many as in `data` unless told.
    """
    rows = next((len(item) for item in data if isinstance(item, Tensor) and item.dim()), 0)
    size = min(rows // 2, BATCH) if sizes else rows
    if size < 2:
        return
    batch = [item[:size] if isinstance(item, Tensor) and item.dim() and len(item) == rows else item for item in data]
    with batch_rows(torch.arange(size)):
        try:
            reading = read_pair(pair, batch, sizes=sizes)
        except Exception:  # a program or guide for all rows at once: it is never given a part of them
            return
    for name, node, _, value in reading.observed():
        yield from _site(name, node, value, size, (total or rows) if sizes else rows, sizes)


def _site(name: str, node: Any, value: Tensor, size: int, rows: int, sizes: Mapping[str, int]) -> Iterator[Finding]:
    frames: list[CondIndepStackFrame] = [f for f in node["cond_indep_stack"] if f.vectorized]
    weight, right = float(torch.as_tensor(node["scale"]).mean()), rows / size
    inside = next((f for f in frames if f.size == size), None)
    if (inside is None and size not in value.shape) or math.isclose(weight, right, rel_tol=1e-3):
        return
    if math.isclose(weight, 1.0, rel_tol=1e-3):
        known = ", ".join(map(repr, sizes)) or "none"
        if inside is not None:
            cure = f"sizes={{{inside.name!r}: {rows}}} (sizes names {known}), or call that plate 'data'"
        else:
            cure = 'stand it in `with pyro.plate("data", len(x)):`'
        consequence = "in minibatches the data count B/N times: the posterior is that of one batch, far too wide"
    elif math.isclose(weight, right**2, rel_tol=1e-3):
        cure = "leave pyro.poutine.scale out, or do not name this plate in sizes: one of them is enough"
        consequence = "the data count N/B times too often: the posterior is far too sure"
    else:
        cure = "leave pyro.poutine.scale out; to weigh the KL term use kl_weight or kl_warmup"
        consequence = "the objective is no bound on the evidence, and the posterior is tempered"
    where = f"plate {inside.name!r}" if inside is not None else "no plate"
    yield Finding(
        name="scale of the data",
        part="model",
        harm=3,
        evidence=(
            f"site {name!r} in {where}: {size} of {rows} rows count {weight:.3g} times, where "
            f"N/B = {right:.3g} is right"
        ),
        consequence=consequence,
        cure=cure,
    )
