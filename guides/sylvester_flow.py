"""Sylvester flow: planar steps in several orthogonal directions at once, kept orthogonal by Householder reflections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm.errors import OptionError

from .domains import check_size
from .family import Push
from .flow import Flow, Step
from .heads import Head
from .monotone import above_minus_one, solve

__all__ = ["SylvesterFlow"]

WIDEST = 16  # columns by default at most: R and R' have columns (columns + 1) / 2 entries each


class SylvesterFlow(Flow):
    """A normal carried through steps that each bend space along `columns` orthogonal directions.

        u_t = u_{t-1} + Q R tanh(R' Q^T u_{t-1} + b),    log|det| = sum_i log(1 + (1 - tanh_i^2) R_ii R'_ii)
        Q: (d, columns), orthonormal,    R, R': (columns, columns), upper triangular
        u_0 ~ N(0, I),    z = loc(c) + exp(log_scale(c)) u_T

    R. van den Berg, L. Hasenclever, J. M. Tomczak, M. Welling: Sylvester Normalizing Flows for Variational Inference,
    2018; the Householder variant: Q is the first columns of a product of reflections. R'_ii > 0 and R_ii R'_ii > -1,
    which makes each step invertible and loses no map, as tanh is odd; R = 0 at the start: the family starts exactly as
    `DiagonalNormal`, with Q random. With a context R, R', b and the reflections are linear in it.

    A step has columns (columns + 2) + reflections d parameters without a context, and a draw costs O(columns^2 +
    reflections d) for each. The log-density of its own draw comes with the draw; that of any other value solves
    `columns` scalar equations for each step, one after another.

    Args:
        features: the dimension d, at least 1. With one feature Q is 1 and a step is a planar one.
        context: features of the context; 0 for none.
        transforms: number of steps, at least 1.
        columns: directions of a step, 1 <= columns <= features; by default features, at most 16.
        reflections: in each Q, at least 1.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, transforms < 1, columns < 1 or > features, or
            reflections < 1.

    >>> q = SylvesterFlow(4, context=5)(torch.zeros(7, 5))
    >>> x, log_q = q.rsample_and_log_prob((3,))
    >>> x.shape, log_q.shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 4,
        columns: int | None = None,
        reflections: int = 4,
        scale: float | None = None,
    ) -> None:
        check_size("SylvesterFlow: features", features)
        check_size("SylvesterFlow: transforms", transforms)
        check_size("SylvesterFlow: reflections", reflections)
        if columns is not None and (not isinstance(columns, int) or not 1 <= columns <= features):
            raise OptionError(
                f"SylvesterFlow: columns must be at least 1 and at most features = {features}, got {columns}: "
                "there are no more orthogonal directions"
            )
        super().__init__(features, context, [], scale)
        width = min(features, WIDEST) if columns is None else columns
        self.steps.extend(SylvesterStep(features, context, width, reflections) for _ in range(transforms))


class SylvesterStep(Step):
    """One Sylvester map: u + Q R tanh(R' Q^T u + b).

    Args:
        features: the dimension d, at least 1.
        context: features of the context; 0 for none.
        columns: of Q, at most d.
        reflections: of which Q is made, at least 1; none where d is 1.

    >>> push, pull = SylvesterStep(3, 0, 2, 2)(None)
    >>> push(torch.zeros(5, 3))[1].shape
    torch.Size([5])
    """

    index: Tensor

    def __init__(self, features: int, context: int, columns: int, reflections: int) -> None:
        super().__init__()
        self.features, self.columns = features, columns
        self.reflections = reflections if features > 1 else 0  # in one dimension a reflection turns the sign only
        self.outer = Head(columns * (columns + 1) // 2, context, gain=0.0)  # R
        self.inner = Head(columns * (columns + 1) // 2, context, gain=0.1)  # R'
        self.shift = Head(columns, context)
        with torch.no_grad():
            self.inner.bias[:columns] = math.log(math.e - 1)  # a diagonal of ones
            self.inner.bias[columns:].normal_(0.0, 0.1)
            self.shift.bias.normal_()
        if self.reflections:
            self.mirrors = Head(self.reflections * features, context)
            with torch.no_grad():
                self.mirrors.bias.normal_()
        # entry 0 is a zero, the diagonal comes next, then the rest: a gather builds the matrices
        row, column = torch.triu_indices(columns, columns, 1)
        index = torch.zeros(columns, columns, dtype=torch.long)
        index[row, column] = 1 + columns + torch.arange(len(row))
        index[torch.arange(columns), torch.arange(columns)] = 1 + torch.arange(columns)
        self.register_buffer("index", index.flatten(), persistent=False)

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        inner, outer = self.inner(context), self.outer(context)  # each: the diagonal, then the entries above it
        slope = F.softplus(inner[..., : self.columns])
        gain = above_minus_one(slope * outer[..., : self.columns])  # R_ii R'_ii
        mirrors: tuple[Tensor, ...] = ()
        if self.reflections:
            vectors = self.mirrors(context).unflatten(-1, (self.reflections, self.features))
            mirrors = F.normalize(vectors, dim=-1).unbind(-2)
        bend = _Bend(
            outer=self._matrix(gain / slope, outer[..., self.columns :]),
            inner=self._matrix(slope, inner[..., self.columns :]),
            shift=self.shift(context),
            gain=gain,
            mirrors=mirrors,
            features=self.features,
        )
        return bend.push, bend.pull

    def _matrix(self, diagonal: Tensor, above: Tensor) -> Tensor:
        entries = F.pad(torch.cat([diagonal, above], -1), (1, 0))
        return entries.index_select(-1, self.index).unflatten(-1, (self.columns, self.columns))


@dataclass(frozen=True)
class _Bend:
    """One step's numbers: R and R' (*B, M, M), b and diag(R R') (*B, M), the unit normals of the mirrors (*B, d)."""

    outer: Tensor
    inner: Tensor
    shift: Tensor
    gain: Tensor
    mirrors: tuple[Tensor, ...]
    features: int

    def push(self, u: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(_times(self.inner, self._down(u)) + self.shift)  # (*S, B, M)
        return u + self._up(_times(self.outer, t)), self._log_det(t)

    def pull(self, u: Tensor) -> tuple[Tensor, Tensor]:
        target = self._down(u).unbind(-1)
        outer, inner = ([row.unbind(-1) for row in m.unbind(-2)] for m in (self.outer, self.inner))
        gain, shift = self.outer.diagonal(dim1=-2, dim2=-1).unbind(-1), self.shift.unbind(-1)
        x: list[Tensor] = []  # the last directions first: Q^T u_{t-1}, and their tanh
        t: list[Tensor] = []
        for i in reversed(range(len(target))):
            rest, told = target[i], shift[i]
            for j, (x_j, t_j) in enumerate(zip(x, t, strict=True)):
                rest = rest - outer[i][len(target) - 1 - j] * t_j
                told = told + inner[i][len(target) - 1 - j] * x_j
            x.append(solve(rest, gain[i], inner[i][i], told))
            t.append(torch.tanh(inner[i][i] * x[-1] + told))
        bent = torch.stack(t[::-1], -1)
        return u - self._up(_times(self.outer, bent)), self._log_det(bent)

    def _log_det(self, t: Tensor) -> Tensor:
        return torch.log1p(self.gain * (1 - t.square())).sum(-1)

    def _down(self, u: Tensor) -> Tensor:
        """Q^T u: (..., d) -> (..., M)."""
        for mirror in self.mirrors:
            u = _reflect(u, mirror)
        return u[..., : self.shift.shape[-1]]

    def _up(self, v: Tensor) -> Tensor:
        """Q v: (..., M) -> (..., d)."""
        u = F.pad(v, (0, self.features - v.shape[-1]))
        for mirror in reversed(self.mirrors):
            u = _reflect(u, mirror)
        return u


def _reflect(u: Tensor, mirror: Tensor) -> Tensor:
    return u - 2 * (mirror * u).sum(-1, keepdim=True) * mirror


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ij,...j->...i", matrix, v)
