"""Which linear layers a program runs, with which latents as weights: seen from outside, whatever its modules are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class Call:
    """One call of `torch.nn.functional.linear`.

    Attributes:
        x: its input `(..., in)`. weight: `(out, in)`. bias: `(out,)` or None.
        probe: zeros that were added to the output `(..., out)`: a gradient in them is the output's. None where not
            asked for.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    probe: Tensor | None


class LinearCalls(TorchFunctionMode):
    """Records the calls of `torch.nn.functional.linear` in the order of the program.

    >>> with LinearCalls() as seen:
    ...     _ = torch.nn.Linear(3, 2)(torch.zeros(5, 3))
    >>> [tuple(call.weight.shape) for call in seen.calls]
    [(2, 3)]
    """

    def __init__(self, probe: bool = False) -> None:
        super().__init__()
        self.probe = probe
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is not F.linear:
            return out
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        probe = torch.zeros_like(out, requires_grad=True) if self.probe else None
        self.calls.append(Call(given["input"], given["weight"], given.get("bias"), probe))
        return out if probe is None else out + probe


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer whose weight is a latent: names of the sites of weight and bias, None where it is no latent."""

    weight: str
    bias: str | None
    call: Call


def layers_of(seen: LinearCalls, values: Mapping[str, Tensor]) -> list[Layer]:
    """The calls whose weight is one of these latents, unchanged, in the order of the program."""
    names = {id(value): name for name, value in values.items()}
    return [Layer(names[id(c.weight)], names.get(id(c.bias)), c) for c in seen.calls if id(c.weight) in names]


__all__ = ["LinearCalls", "layers_of"]
