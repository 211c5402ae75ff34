"""Coupling spline flow: monotonic rational-quadratic splines on alternate halves; one pass in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dgm.errors import OptionError

from .family import Push
from .flow import Flow, Step, zuko
from .heads import Conditioner, Head

__all__ = ["CouplingSplineFlow"]


class CouplingSplineFlow(Flow):
    """A normal carried through splines of one half of the features, steered by the other half and the context.

        u_0 = eps,    u_t[b] = shift + gain * spline(u_{t-1}[b]),    u_t[a] = u_{t-1}[a]
        (spline, gain, shift) = network(u_{t-1}[a], c),    z = loc(c) + exp(log_scale(c)) u_T

    C. Durkan, A. Bekasov, I. Murray, G. Papamakarios: Neural Spline Flows, 2019. The halves a and b are the even and
    odd features and change places from step to step. The splines act on [-5, 5] and are the identity outside, in
    standardised coordinates because location and scale come last; the affine part lets a half follow the other beyond
    that box. All networks start at zero output: the family starts as `DiagonalNormal`, up to rounding.

    Args:
        features: the dimension d, at least 1. With one feature there are no halves: one spline, steered by the
            context alone.
        context: features of the context; 0 for none.
        transforms: number of steps, at least 1; two let every feature move.
        bins: pieces of each spline, at least 2.
        hidden: widths of the networks' hidden layers, one or more.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, transforms < 1, bins < 2, or hidden empty or with a
            width < 1.

    >>> q = CouplingSplineFlow(4, context=5)(torch.zeros(7, 5))
    >>> x, log_q = q.rsample_and_log_prob((3,))
    >>> x.shape, log_q.shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 2,
        bins: int = 8,
        hidden: Sequence[int] = (64,),
        scale: float | None = None,
    ) -> None:
        if transforms < 1 or bins < 2:
            raise OptionError(
                f"CouplingSplineFlow: transforms must be at least 1 and bins at least 2, got {transforms} and {bins}"
            )
        if not hidden or min(hidden) < 1:
            raise OptionError(f"CouplingSplineFlow: hidden needs one width or more, each >= 1, got {hidden}")
        steps = [CouplingStep(features, context, t % 2, bins, hidden) for t in range(transforms if features > 1 else 1)]
        super().__init__(features, context, steps, scale)


class CouplingStep(Step):
    """One coupling: half of the features moves, monotonically, as told by the half that stays.

    Args:
        features: the dimension d; with one feature, that one moves and the context alone tells how.
        context: features of the context; 0 for none.
        parity: 0 moves the odd features first, 1 the even ones.
        bins: pieces of each spline.
        hidden: widths of the network's hidden layers.

    >>> push, pull = CouplingStep(3, 0, 0, 8, (16,))(None)
    >>> push(torch.zeros(5, 3))[0].shape
    torch.Size([5, 3])
    """

    kept: Tensor
    moved: Tensor
    back: Tensor

    def __init__(self, features: int, context: int, parity: int, bins: int, hidden: Sequence[int]) -> None:
        super().__init__()
        kept = torch.arange(parity, features, 2) if features > 1 else torch.arange(0)
        moved = torch.arange(1 - parity, features, 2) if features > 1 else torch.arange(1)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("moved", moved, persistent=False)
        self.register_buffer("back", torch.argsort(torch.cat([kept, moved])), persistent=False)
        self.sizes = [bins, bins, bins - 1, 1, 1]
        total = len(moved) * sum(self.sizes)
        self.network: Conditioner | Head
        if features > 1:
            self.network = Conditioner([len(kept), *hidden, total], context)
        else:
            self.network = Head(total, context, gain=0.0)

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        told = self.network(context)
        network = told if callable(told) else lambda _: told  # one feature: the context alone tells
        return partial(self._push, network), partial(self._pull, network)

    def _push(self, network: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = u.index_select(-1, self.kept), u.index_select(-1, self.moved)
        moved, change = self._spline(network(kept)).call_and_ladj(moved)
        return self._merge(kept, moved), change.sum(-1)

    def _pull(self, network: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = u.index_select(-1, self.kept), u.index_select(-1, self.moved)
        moved, change = self._spline(network(kept)).inv.call_and_ladj(moved)
        return self._merge(kept, moved), -change.sum(-1)

    def _spline(self, parameters: Tensor) -> Any:
        widths, heights, slopes, shift, gain = parameters.unflatten(-1, (-1, sum(self.sizes))).split(self.sizes, -1)
        return zuko.transforms.ComposedTransform(
            zuko.transforms.MonotonicRQSTransform(widths, heights, slopes),
            zuko.transforms.MonotonicAffineTransform(shift.squeeze(-1), gain.squeeze(-1)),
        )

    def _merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        # a concatenation and a gather: writing into an empty tensor would not trace under vmap
        return torch.cat([kept, moved], -1).index_select(-1, self.back)
