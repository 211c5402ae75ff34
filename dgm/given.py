"""Programs at given values of their sites, for many values at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .programs import Program, StartValues, isolated

__all__ = ["held", "mapped"]


def held(run: Program, values: Mapping[str, Tensor], batch: Sequence[Any]) -> Any:
    """The trace of a run with these sites held at these values, their log densities computed."""
    with poutine.block(), isolated(validate=False), StartValues(values):
        found = poutine.trace(run).get_trace(*batch)
        found.compute_log_prob()
    return found


ELEMENTS = 2**22
"""Entries of the largest tensor, data or latents, that the runs of one chunk hold together: 16 MB in float32."""


def mapped(
    one: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    values: Mapping[str, Tensor],
    batch: Sequence[Any],
    widest: int = 1,
) -> tuple[Tensor, ...]:
    """`one` of each of S values, results stacked: by a vmap in chunks, or one by one where vmap refuses the program.

    widest: entries of the largest tensor of one run, where the values and the batch do not show it.
    """
    given = dict(values)
    count = len(next(iter(given.values())))
    seen = [*(value[0] for value in given.values()), *(item for item in batch if isinstance(item, Tensor))]
    widest = max(widest, *(tensor.numel() for tensor in seen))
    try:
        return torch.func.vmap(one, chunk_size=max(1, ELEMENTS // widest))(given)
    except (RuntimeError, NotImplementedError, ValueError):
        runs = [one({name: value[s] for name, value in given.items()}) for s in range(count)]
        return tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
