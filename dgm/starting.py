"""Making a model and its guide anew for each seed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import ModelError
from .programs import isolated, move, preserved_rng


def start_pair(
    make: Callable[..., Any],
    guide: Callable[..., Any],
    seed: int,
    whole: Sequence[Tensor],
    options: Mapping[str, Any] | None = None,
    device: Any = None,
    dtype: Any = None,
) -> tuple[Any, Any]:
    """A model and a guide whose starts depend on the seed alone: all guides meet the same model."""
    with preserved_rng(seed):
        model = make(**(options or {}))
    move(model, device=device, dtype=dtype)
    with preserved_rng(seed + 1_000_003):
        return model, guide(model, *whole)


def maker(model: Any) -> Callable[[], Any]:
    """A callable that makes the model anew: a maker itself, or one that copies a module.

    Raises:
        ModelError: a class that needs arguments.
    """
    if isinstance(model, nn.Module):
        return lambda: copy.deepcopy(model)
    try:
        needed = [
            p.name
            for p in inspect.signature(model).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError) as error:
        raise ModelError(f"model is {model!r}, expected a module, or a callable that makes one") from error
    if not needed and (isinstance(model, type) or not inspect.signature(model).parameters):
        return model
    if not needed:  # a maker with options, or a program whose data have a default: only a call can tell
        with isolated(), preserved_rng(0):
            try:
                made = model()
            except Exception:
                made = None
        return model if callable(made) else lambda: model
    if isinstance(model, type):
        raise ModelError(
            f"{model.__name__} needs {', '.join(needed)}: give an object, or a maker `lambda: {model.__name__}(...)`"
        )
    return lambda: model  # a program that takes the data: a plain function has no state to copy
