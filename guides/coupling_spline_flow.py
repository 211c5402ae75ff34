"""Coupling spline flow: monotonic rational-quadratic splines on alternate halves; one pass in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .coupling import CouplingStep, check_coupling
from .domains import check_size
from .family import Push
from .flow import Flow, zuko

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

    >>> import torch
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
        check_coupling("CouplingSplineFlow", features, transforms, hidden)
        check_size("CouplingSplineFlow: bins", bins, 2)
        steps = [SplineStep(features, context, t % 2, bins, hidden) for t in range(transforms if features > 1 else 1)]
        super().__init__(features, context, steps, scale)


class SplineStep(CouplingStep):
    """One coupling whose half moves by a spline, then by a shift and a gain.

    Args:
        features: the dimension d; with one feature, that one moves and the context alone tells how.
        context: features of the context; 0 for none.
        parity: 0 moves the odd features first, 1 the even ones.
        bins: pieces of each spline.
        hidden: widths of the network's hidden layers.

    >>> import torch
    >>> push, pull = SplineStep(3, 0, 0, 8, (16,))(None)
    >>> push(torch.zeros(5, 3))[0].shape
    torch.Size([5, 3])
    """

    def __init__(self, features: int, context: int, parity: int, bins: int, hidden: Sequence[int]) -> None:
        sizes = [bins, bins, bins - 1, 1, 1]
        super().__init__(features, context, parity, sum(sizes), hidden)
        self.sizes = sizes

    def maps(self, parameters: Tensor) -> tuple[Push, Push]:
        widths, heights, slopes, shift, gain = parameters.split(self.sizes, -1)
        moving = zuko.transforms.ComposedTransform(
            zuko.transforms.MonotonicRQSTransform(widths, heights, slopes),
            zuko.transforms.MonotonicAffineTransform(shift.squeeze(-1), gain.squeeze(-1)),
        )
        return moving.call_and_ladj, partial(_pull, moving.inv)


def _pull(back: Any, u: Tensor) -> tuple[Tensor, Tensor]:
    u, change = back.call_and_ladj(u)
    return u, -change
