"""Guides: one file for each way to attach a density to a model, one for each family of densities.

The folder is the registry: a new file with its callable in `__all__` is a new guide, and no other edit is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def attached(
    names: Iterable[str | Callable[..., Any]] = DEFAULT, attach: str = "joint", **options: Any
) -> dict[str, Callable[..., Any]]:
    """Guides ready for `dgm.compare`: `{name: (model, *batch) -> guide}`.

    Args:
        names: families as `dgm list` shows them; ways to attach, which are then guides by themselves ("laplace");
            "path/to/file.py:name" of either; or either itself, a family `(features, context=0)` or a callable
            `(model, *batch) -> guide`.
        attach: how families are attached: "joint" serves any model, global latents by one vector and local ones by an
            encoder.
        options: passed to the way to attach, e.g. `encoder=mlp(64)`; a guide by itself gets those that it takes.

    Raises:
        OptionError: an unknown name, a callable of another kind, or two of one name. ModelError: a file or name that
            cannot be imported.

    >>> list(attached(["diagonal-normal", "point"]))
    ['diagonal-normal', 'point']
    """
    from dgm.entries import guides_of

    return guides_of(names, attach, options)
