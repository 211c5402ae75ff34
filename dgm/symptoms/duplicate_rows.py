"""Rows that occur twice: in training and held-out data, or many times in training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..feeding import Mapped, Memory
from ..findings import Finding

SHARE = 0.05
"""Share of training rows that repeat an earlier one, from which it is told."""
LEAK = 0.01
"""Share of held-out rows that are training rows, from which it is told; above `SHARE` scores are wrong."""
CHANCE = 0.01
"""Repeated rows expected by chance, of all rows, up to which it means anything: columns of few values repeat."""
LEAST = 30
"""Rows below which nothing is said."""
ROWS, COLUMNS = 5000, 64
"""What chance is judged by, at most, evenly spaced: fewer make repetition look likelier, never the other way."""


def look(case: Any) -> Iterator[Finding]:
    source = case.source
    stored = isinstance(source, Memory) and not isinstance(source, Mapped)
    yield from duplicate_rows(source.all_rows() if stored else case.rows, case.held_out)


def duplicate_rows(data: Sequence[Any], held_out: Sequence[Any] | None = None) -> Iterator[Finding]:
    """Whole rows, over all arrays together, that occur again.

    Args:
        data: arrays with rows first. held_out: the same of the rows that are validated on, or None.
    """
    arrays = _arrays(data)
    rows = len(arrays[0]) if arrays else 0
    if rows < LEAST or _by_chance(arrays) > CHANCE:
        return
    keys = _keys(arrays)
    again = rows - len(torch.unique(keys))
    if again >= SHARE * rows:
        yield Finding(
            name="duplicate rows",
            part="data",
            harm=2,
            evidence=f"{again} of {rows} rows repeat an earlier one, in all columns",
            consequence=(
                "they count several times, so that the posterior is too sure; copies end up on both sides of a split, "
                "and the held-out score is that of rows seen in training"
            ),
            cure="drop them (pandas.DataFrame.drop_duplicates) before the split, unless each was measured by itself",
            size=again / rows,
        )
    other = _arrays(held_out) if held_out is not None else []
    if [a.shape[1:] for a in other] != [a.shape[1:] for a in arrays]:
        return
    leaked = int(torch.isin(_keys(other), keys).sum())
    share = leaked / len(other[0])
    if share >= LEAK:
        yield Finding(
            name="held-out rows in training",
            part="data",
            harm=3 if share >= SHARE else 2,
            evidence=f"{leaked} of {len(other[0])} held-out rows are rows of the training data, in all columns",
            consequence="the held-out score rewards memory: early stopping and comparisons choose the wrong model",
            cure="split by distinct rows",
            size=share,
        )


def _arrays(data: Sequence[Any]) -> list[Tensor]:
    tensors = [item.detach() for item in data if isinstance(item, Tensor) and item.dim()]
    return tensors if len({len(item) for item in tensors}) == 1 else []


def _keys(arrays: Sequence[Tensor]) -> Tensor:
    """`(N,)`, a number of 64 bits for each row: equal for equal rows, and for others by a chance of 2^-64."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.zeros(len(arrays[0]), dtype=torch.int64)
    for array in arrays:
        flat = array.reshape(len(array), -1)
        odd = 2 * torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=generator) + 1
        for start in range(0, len(flat), 4096):  # twice the memory of a chunk, not of the data
            bits = (flat[start : start + 4096].cpu().double() + 0.0).view(torch.int64)  # -0 is 0
            keys[start : start + 4096] += ((bits ^ (bits >> 32)) * odd).sum(1)
    return keys


def _by_chance(arrays: Sequence[Tensor]) -> float:
    """The share of rows expected to meet a copy if columns were independent: N prod_j sum_v p_jv^2.

    Columns hang together, so that binary rows repeat far more often than this says: data of two values in each column
    are taken to repeat by chance.
    """
    rows = len(arrays[0])
    some = torch.linspace(0, rows - 1, min(rows, ROWS)).round().long()
    meet, most = 0.0, 0
    for array in arrays:
        flat = array.reshape(rows, -1)
        for column in torch.linspace(0, flat.shape[1] - 1, min(flat.shape[1], COLUMNS)).round().long().tolist():
            counts = torch.unique(flat[:, column][some.to(flat.device)], return_counts=True)[1].double()
            most = max(most, len(counts))
            meet += math.log(float((counts / len(some)).square().sum()))
    return 1.0 if most <= 2 else rows * math.exp(meet)
