"""Guides: one file for each way to attach a density to a model, one for each family of densities.

The folder is the registry: a new file with its callable in `__all__` is a new guide, and no other edit is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

DEFAULT = (
    "diagonal-normal",
    "low-rank-normal",
    "full-normal",
    "inverse-autoregressive-flow",
    "coupling-spline-flow",
    "point",
)
"""Families that `compare` puts side by side unless told otherwise."""


def attached(names: Iterable[str] = DEFAULT, attach: str = "joint", **options: Any) -> dict[str, Callable[..., Any]]:
    """Guide families ready for `dgm.compare`: `{name: (model, *batch) -> guide}`.

    Args:
        names: of families, as `dgm list` shows them.
        attach: how: "joint" serves any model, global latents by one vector and local ones by an encoder.
        options: passed to the way to attach, e.g. `encoder=mlp(64)`.

    Raises:
        OptionError: an unknown name.

    >>> list(attached(["diagonal-normal", "point"]))
    ['diagonal-normal', 'point']
    """
    from dgm.registry import attachments, families, find

    make = find(attach, attachments(), "way to attach").make
    known = families()
    return {name: partial(make, family=find(name, known, "guide family").make, **options) for name in names}
