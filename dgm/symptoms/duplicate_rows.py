"""Rows that occur twice: in training and held-out data, or many times in training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..findings import Finding

SHARE = 0.05
"""Share of rows that repeat an earlier one, from which it is told; of held-out rows one in a hundred is enough."""
LEAK = 0.01
CHANCE = 0.01
"""Repeated rows expected by chance, of all rows, up to which it means anything: columns of few values repeat."""
LEAST = 30
"""Rows below which nothing is said."""


def look(case: Any) -> Iterator[Finding]:
    yield from duplicate_rows(case.rows, case.held_out)


def duplicate_rows(data: Sequence[Any], held_out: Sequence[Any] | None = None) -> Iterator[Finding]:
    """Whole rows, over all arrays together, that occur again.

    Args:
        data: arrays with rows first. held_out: the same of the rows that are validated on, or None.
    """
    rows = _rows(data)
    if rows is None or len(rows) < LEAST or _by_chance(rows) > CHANCE:
        return
    distinct = len(torch.unique(rows, dim=0))
    again = len(rows) - distinct
    if again >= SHARE * len(rows):
        yield Finding(
            name="duplicate rows",
            part="data",
            harm=2,
            evidence=f"{again} of {len(rows)} rows repeat an earlier one, in all columns",
            consequence=(
                "they count several times, so that the posterior is too sure; copies end up on both sides of a split, "
                "and the held-out score is that of rows seen in training"
            ),
            cure="drop them (pandas.DataFrame.drop_duplicates) before the split",
        )
    other = _rows(held_out) if held_out is not None else None
    if other is None or other.shape[1:] != rows.shape[1:]:
        return
    known = {tuple(row) for row in rows.tolist()}
    leaked = sum(tuple(row) in known for row in other.tolist())
    if leaked >= max(1.0, LEAK * len(other)):
        yield Finding(
            name="held-out rows in training",
            part="data",
            harm=3,
            evidence=f"{leaked} of {len(other)} held-out rows are rows of the training data, in all columns",
            consequence="the held-out score rewards memory: early stopping and comparisons choose the wrong model",
            cure="split by distinct rows",
        )


def _rows(data: Sequence[Any]) -> Tensor | None:
    tensors = [item for item in data if isinstance(item, Tensor) and item.dim()]
    if not tensors or len({len(item) for item in tensors}) > 1:
        return None
    return torch.cat([item.detach().reshape(len(item), -1).double().cpu() for item in tensors], 1)


def _by_chance(rows: Tensor) -> float:
    """The share of rows expected to meet a copy if columns were independent, N prod_j sum_v p_jv^2, and few kinds.

    Columns hang together, so that binary rows repeat far more often than this says: data of two values in each column
    are taken to repeat by chance.
    """
    meet, most = 0.0, 0
    for column in rows.T:
        counts = torch.unique(column, return_counts=True)[1].double()
        most = max(most, len(counts))
        meet += math.log(float((counts / len(rows)).square().sum()))
    return 1.0 if most <= 2 else len(rows) * math.exp(meet)
