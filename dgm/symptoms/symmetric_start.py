"""Components that start equal and have equal gradients: they stay equal, and count as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..findings import Finding

ALIKE = 1e-5
"""Largest difference between rows, relative to how far they moved: rounding."""
MOVED = 1e-4
"""Movement of a parameter, relative to 1, from which its rows had occasion to part."""


def look(case: Any) -> Iterator[Finding]:
    yield from symmetric_starts(case.first.parameters(), case.pair.parameters())


def symmetric_starts(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Parameters of several rows that were equal before the short training, moved, and are equal after it.

    Args:
        start, end: parameters by name, before and after.
    """
    found = []
    for name, before in start.items():
        after = end.get(name)
        if after is None or before.dim() < 1 or len(before) < 2 or after.shape != before.shape:
            continue
        moved = float((after - before).detach().abs().max())
        if moved < MOVED or bool((before != before[:1]).any()):
            continue
        apart = float((after - after[:1]).detach().abs().max())
        if apart <= ALIKE * moved:
            found.append((name, len(before), moved))
    for name, rows, moved in found[:1]:
        others = f"; so are {', '.join(repr(n) for n, _, _ in found[1:4])}" if len(found) > 1 else ""
        yield Finding(
            name="components start equal",
            part="model",
            harm=3,
            evidence=(
                f"parameter {name!r}: its {rows} rows started equal, moved by {moved:.3g} in the short training, and "
                f"are equal still{others}"
            ),
            consequence=f"their gradients are identical: {rows} components or units do the work of one, for ever",
            cure=f"start {name!r} at random values, or at rows of the data",
        )
