"""Nested plain values and tensors as JSON text and named tensors, and back: nothing in a file can be code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, OptionError

__all__ = ["flatten", "unflatten"]

TAG = "~"
"""Marks what JSON has no word for; a user's own key of that name is refused."""


def flatten(value: Any, where: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A value as `(plain, tensors)`: what JSON can hold, and the tensors by the place where they stood.

    Args:
        value: None, bool, int, float, str, tensors, numpy arrays and numbers, and lists, tuples and mappings of them.
        where: name of the value, for messages and for the names of tensors.

    Raises:
        OptionError: anything else (a function, an object); the message names its place.

    >>> plain, tensors = flatten({"lr": 0.1, "betas": (0.9, 0.999), "m": torch.zeros(2)})
    >>> list(tensors), unflatten(plain, tensors)["betas"]
    (['m'], (0.9, 0.999))
    """
    tensors: dict[str, Tensor] = {}
    return _flat(value, where, tensors), tensors


def _flat(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(value.copy())
        return {TAG: "array", "name": where}
    if isinstance(value, Tensor):
        tensors[where] = value.detach().cpu().contiguous().clone()
        return {TAG: "tensor", "name": where}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {TAG: "float", "text": str(value)}
    inside = f"{where}." if where else ""
    if isinstance(value, Mapping):
        items = [[key, _flat(item, f"{inside}{key}", tensors)] for key, item in value.items()]
        if all(isinstance(key, str) and key != TAG for key in value):
            return dict(items)
        if all(isinstance(key, int) for key in value):
            return {TAG: "numbered", "items": items}
        raise OptionError(f"{where or 'the state'} has keys {list(value)[:3]!r}, expected all strings or all numbers")
    if isinstance(value, (list, tuple)):
        items = [_flat(item, f"{inside}{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {TAG: "tuple", "items": items}
    raise OptionError(
        f"{where or 'the state'} is {type(value).__name__}, which no file that is only read can hold: expected "
        "numbers, strings, tensors, and lists or mappings of them"
    )


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` took apart.

    Raises:
        DataError: a tensor is missing, or a mark that this version does not know.
    """
    if isinstance(plain, list):
        return [unflatten(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    kind = plain.get(TAG)
    if kind is None:
        return {key: unflatten(item, tensors) for key, item in plain.items()}
    if kind == "float":
        return float(plain["text"])
    if kind == "tuple":
        return tuple(unflatten(item, tensors) for item in plain["items"])
    if kind == "numbered":
        return {int(key): unflatten(item, tensors) for key, item in plain["items"]}
    if kind in ("tensor", "array"):
        if plain["name"] not in tensors:
            raise DataError(f"the tensor {plain['name']!r} is missing")
        found = tensors[plain["name"]]
        return found.numpy() if kind == "array" else found
    raise DataError(f"unknown mark {kind!r}: written by a newer dgm")
