"""Fingerprints of data and parameters: what two runs must share to be compared or continued."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .programs import Program, owner

__all__ = ["digest", "digests"]


def digest(items: Iterable[Any]) -> str:
    """A fingerprint of tensors by their shapes and bytes, and of all else by what `repr` says.

    >>> digest([torch.zeros(2)]) == digest([torch.zeros(2)]), digest([torch.zeros(2)]) == digest([torch.zeros(1, 2)])
    (True, False)
    """
    found = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            plain = item.detach().cpu().contiguous()
            found.update(str(tuple(plain.shape)).encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        else:
            found.update(repr(item).encode())
    return found.hexdigest()


def digests(program: Program) -> dict[str, str]:
    """A fingerprint of each parameter and buffer of a program, by name; empty for a function without any."""
    module = owner(program)
    if not isinstance(module, nn.Module):
        return {}
    return {name: digest([value]) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
