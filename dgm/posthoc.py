"""Posteriors that are made after training, or instead of it: what a guide may say of itself beside its sites.

A guide may have `finish(model, *data, seed=0)`, which `dgm.fit` calls once after training with all its rows (Laplace,
stochastic weight averaging, an exact last layer, NUTS), and `reopen()`, which it calls before; `notes`, a list of what
a reader of its numbers must know; and `evaluations`, the rows whose density `finish` evaluated. It says by
`has_density = False` that log q has no meaning.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .packing import Packing
from .programs import Program, owner


def has_density(guide: Program, local: bool | None = None) -> bool:
    """Whether log q of a guide means something: False where it, or a family inside of it, says `has_density = False`.

    Args:
        guide: a guide. A function counts as one with a density.
        local: only what serves local (True) or global (False) latents; None for all of it.

    >>> from dgm.guides.global_ import Global
    >>> from dgm.guides.point import Point
    >>> from dgm.models.bnn import example
    >>> model, batch = example()
    >>> has_density(Global(model, *batch)), has_density(Global(model, *batch, family=Point))
    (True, False)
    """
    module = owner(guide)
    return module is None or _has_density(module, local)


def _has_density(module: nn.Module, local: bool | None) -> bool:
    packing = getattr(module, "packing", None)
    if local is not None and isinstance(packing, Packing) and (packing.plate is not None) != local:
        return True
    own = getattr(module, "has_density", None)  # who says it speaks for all of its parts
    if own is not None:
        return bool(own)
    parts: list[Any] = [*module.children(), module.__dict__.get("member")]  # Free keeps its family beside its parts
    return all(_has_density(part, local) for part in parts if isinstance(part, nn.Module))


def finishers(guide: Program) -> list[Any]:
    """The parts of a guide that have a `finish`: itself, or the guides that it is made of."""
    module = owner(guide)
    return [] if module is None else _with(module, "finish")


def notes_of(guide: Program) -> list[str]:
    """What a guide and its parts say of themselves."""
    module = owner(guide)
    found = [] if module is None else _with(module, "notes")
    return [str(note) for part in found for note in part.notes]


def _with(module: nn.Module, name: str) -> list[Any]:
    if hasattr(module, name):
        return [module]
    return [part for child in module.children() for part in _with(child, name)]


__all__ = ["finishers", "has_density", "notes_of"]
