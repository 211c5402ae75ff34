"""Coupling: one half of the features moves, elementwise and monotonically, as told by the half that stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .domains import check_size, check_widths
from .family import Push
from .flow import Step
from .heads import Conditioner, Head

__all__ = ["CouplingStep", "check_coupling"]


class CouplingStep(Step):
    """One coupling; a subclass says by `maps` what moves a half.

        u[b] <- map(u[b]; network(u[a], c)),    u[a] stays

    L. Dinh, J. Sohl-Dickstein, S. Bengio: Density estimation using Real NVP, 2017. The halves a and b are the even and
    odd features. The network starts at zero output.

    Args:
        features: the dimension d; with one feature, that one moves and the context alone tells how.
        context: features of the context; 0 for none.
        parity: 0 moves the odd features first, 1 the even ones.
        outputs: numbers that the network tells of each feature that moves.
        hidden: widths of the network's hidden layers.
    """

    kept: Tensor
    moved: Tensor
    back: Tensor

    def __init__(self, features: int, context: int, parity: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        kept = torch.arange(parity, features, 2) if features > 1 else torch.arange(0)
        moved = torch.arange(1 - parity, features, 2) if features > 1 else torch.arange(1)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("moved", moved, persistent=False)
        self.register_buffer("back", torch.argsort(torch.cat([kept, moved])), persistent=False)
        self.outputs = outputs
        total = len(moved) * outputs
        self.network: Conditioner | Head
        if features > 1:
            self.network = Conditioner([len(kept), *hidden, total], context)
        else:
            self.network = Head(total, context, gain=0.0)

    def maps(self, parameters: Tensor) -> tuple[Push, Push]:
        """The map of the half that moves, (..., moved), and its inverse, from (..., moved, outputs).

        Both give the other side and the logarithm of the map's slope, elementwise.
        """
        raise NotImplementedError

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        told = self.network(context)
        network = told if callable(told) else lambda _: told  # one feature: the context alone tells
        return partial(self._carry, network, 0), partial(self._carry, network, 1)

    def _carry(self, network: Callable[[Tensor], Tensor], way: int, u: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = u.index_select(-1, self.kept), u.index_select(-1, self.moved)
        moved, log_slope = self.maps(network(kept).unflatten(-1, (-1, self.outputs)))[way](moved)
        # a concatenation and a gather: writing into an empty tensor would not trace under vmap
        return torch.cat([kept, moved], -1).index_select(-1, self.back), log_slope.sum(-1)


def check_coupling(name: str, features: int, transforms: int, hidden: Sequence[int]) -> None:
    """Refuse what no coupling flow can be built of.

    Raises:
        OptionError: features < 1, transforms < 1, or hidden empty or with a width < 1.
    """
    check_size(f"{name}: features", features)
    check_size(f"{name}: transforms", transforms)
    check_widths(name, hidden)
