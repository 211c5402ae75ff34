"""Matrix normal: covariances of rows and of columns, for the weights of a layer."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm.errors import OptionError

from .domains import check_scale, check_size
from .family import Family, Pushforward
from .heads import Head

__all__ = ["MatrixNormal"]

Side = tuple[Tensor, Tensor | None]
"""One factor D (I + L): log of the diagonal D, (*batch, n), and L strictly lower triangular, or None for zero."""


class MatrixNormal(Family):
    """Normal distribution of a matrix whose rows share one covariance and whose columns share another.

        Z = M + A E B',    E_ij ~ N(0, 1),    Cov(vec Z) = U kron V,    U = A A',    V = B B'

    C. Louizos, M. Welling: Structured and Efficient Variational Deep Learning with Matrix Gaussian Posteriors, 2016.
    vec stacks the rows, as `Tensor.flatten` does. A and B are lower triangular, D (I + L) with a positive diagonal D
    each; the authors' are diagonal, which is `full=0`. It has r (r + 1) / 2 + c (c + 1) / 2 parameters of covariance
    beside its r c means, one of them without effect (A may grow as B shrinks); a draw costs r c (r + c) products.

    L starts at exactly zero: the family starts as the diagonal normal. It attaches like every family; `PerLayer` gives
    it each layer's shape, (outputs, inputs) or, with the bias as the last column, (outputs, inputs + 1).

    Args:
        features: the dimension d = r c, at least 1.
        context: features of the context; 0 for none.
        shape: (r, c) with r c = features; by default the nearest to a square.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.
        full: a side of at most this many rows or columns has a full triangular factor, a larger one a diagonal factor.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, full < 0, or a shape of another number of entries.

    >>> q = MatrixNormal(12, shape=(3, 4))()
    >>> q.rsample((5,)).shape, q.covariance_matrix.shape
    (torch.Size([5, 12]), torch.Size([12, 12]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        shape: tuple[int, int] | None = None,
        scale: float | None = None,
        full: int = 256,
    ) -> None:
        super().__init__(features, context)
        shape = nearest_to_square(features) if shape is None else shape
        if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] != features:
            raise OptionError(
                f"MatrixNormal: shape {tuple(shape)} does not hold features = {features} entries; give (rows, columns) "
                f"with rows x columns = {features}, or leave it out for {nearest_to_square(features)}"
            )
        if scale is None:
            scale = 1.0 if context else 0.1
        check_scale("MatrixNormal: scale", scale)
        check_size("MatrixNormal: full", full, 0, "; 0 has diagonal factors")
        self.shape = rows, columns = int(shape[0]), int(shape[1])
        self.loc = Head(features, context)
        self.rows = Factor(rows, context, math.log(scale), rows <= full)
        self.columns = Factor(columns, context, 0.0, columns <= full)

    def forward(self, context: Tensor | None = None) -> KroneckerNormal:
        self.check(context)
        return KroneckerNormal(self.loc(context), self.rows(context), self.columns(context))

    @torch.no_grad()
    def initialise(self, loc: Tensor, scale: float | Tensor | None = None) -> None:
        """Set the start: mean loc and standard deviation scale. With a context these are the heads' biases.

        Args:
            loc: (features,), finite.
            scale: one number or (features,), > 0; None leaves it as it was built. Scales that are no product of a
                row's and a column's are met as nearly as can be, least squares of their logarithms.
        """
        self.loc.bias.copy_(loc)
        if scale is not None:
            target = torch.as_tensor(scale, dtype=self.loc.bias.dtype).log().expand(self.features).reshape(self.shape)
            self.rows.log_diagonal.bias.copy_(target.mean(1))
            self.columns.log_diagonal.bias.copy_(target.mean(0) - target.mean())


def nearest_to_square(features: int) -> tuple[int, int]:
    """The factorisation of a number whose factors are nearest, the smaller first.

    >>> nearest_to_square(12), nearest_to_square(7)
    ((3, 4), (1, 7))
    """
    rows = next(r for r in range(math.isqrt(features), 0, -1) if features % r == 0)
    return rows, features // rows


class Factor(nn.Module):
    """Parameters of one triangular factor exp(log_diagonal) (I + L), with L zero at the start.

    Args:
        size: number of rows, at least 1.
        context: features of the context; 0 for none.
        start: log_diagonal at the start.
        full: whether there is an L.
    """

    index: Tensor

    def __init__(self, size: int, context: int, start: float, full: bool) -> None:
        super().__init__()
        self.size, self.full = size, full and size > 1
        self.log_diagonal = Head(size, context, start=start)
        if self.full:
            self.gain = 1.0 / math.sqrt(size) if context else 1.0
            self.lower = Head(size * (size - 1) // 2, context, gain=0.0)
            # entry 0 is a zero, entry k the k-th below the diagonal; gathered, since vmap refuses writes into a matrix
            row, column = torch.tril_indices(size, size, -1)
            index = torch.zeros(size, size, dtype=torch.long)
            index[row, column] = 1 + torch.arange(len(row))
            self.register_buffer("index", index.flatten(), persistent=False)

    def forward(self, context: Tensor | None) -> Side:
        if not self.full:
            return self.log_diagonal(context), None
        entries = F.pad(self.gain * self.lower(context), (1, 0))
        lower = torch.index_select(entries, -1, self.index).unflatten(-1, (self.size, self.size))
        return self.log_diagonal(context), lower


class KroneckerNormal(Pushforward):
    """Matrix normal distribution over flattened matrices, with its moments in closed form.

    Args:
        loc: (*batch, r c), the mean, row after row.
        rows: log diagonal (*batch, r) and L (*batch, r, r), or None, of A.
        columns: the same of B, with c.

    >>> KroneckerNormal(torch.zeros(6), (torch.zeros(2), None), (torch.zeros(3), None)).variance.shape
    torch.Size([6])
    """

    def __init__(self, loc: Tensor, rows: Side, columns: Side) -> None:
        self.rows, self.columns = rows, columns
        super().__init__(partial(_push, loc, rows, columns), partial(_pull, loc, rows, columns), loc)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def row_covariance(self) -> Tensor:
        """U, (*batch, r, r)."""
        factor = _matrix(self.rows)
        return factor @ factor.mT

    @property
    def column_covariance(self) -> Tensor:
        """V, (*batch, c, c)."""
        factor = _matrix(self.columns)
        return factor @ factor.mT

    @property
    def covariance_matrix(self) -> Tensor:
        """U kron V, (*batch, r c, r c)."""
        u, v = self.row_covariance, self.column_covariance
        product = torch.einsum("...ij,...kl->...ikjl", u, v).flatten(-2, -1).flatten(-3, -2)
        return product.expand(self.batch_shape + product.shape[-2:])

    @property
    def variance(self) -> Tensor:
        u, v = (c.diagonal(dim1=-2, dim2=-1) for c in (self.row_covariance, self.column_covariance))
        return (u.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2).expand(self.batch_shape + self.event_shape)


def _matrix(side: Side) -> Tensor:
    log_diagonal, lower = side
    diagonal = torch.diag_embed(log_diagonal.exp())
    return diagonal if lower is None else diagonal + log_diagonal.exp().unsqueeze(-1) * lower


def _log_det(rows: Side, columns: Side) -> Tensor:
    return rows[0].sum(-1) * columns[0].shape[-1] + columns[0].sum(-1) * rows[0].shape[-1]


def _apply(side: Side, e: Tensor) -> Tensor:
    """D (I + L) e for the columns of e, (..., n, m)."""
    log_diagonal, lower = side
    return log_diagonal.exp().unsqueeze(-1) * (e if lower is None else e + lower @ e)


def _solve(side: Side, z: Tensor) -> Tensor:
    """The inverse of `_apply`."""
    log_diagonal, lower = side
    e = z * (-log_diagonal).exp().unsqueeze(-1)
    return e if lower is None else torch.linalg.solve_triangular(lower, e, upper=False, unitriangular=True)


def _push(loc: Tensor, rows: Side, columns: Side, eps: Tensor) -> tuple[Tensor, Tensor]:
    e = eps.unflatten(-1, (rows[0].shape[-1], columns[0].shape[-1]))
    return loc + _apply(columns, _apply(rows, e).mT).mT.flatten(-2), _log_det(rows, columns)


def _pull(loc: Tensor, rows: Side, columns: Side, x: Tensor) -> tuple[Tensor, Tensor]:
    z = (x - loc).unflatten(-1, (rows[0].shape[-1], columns[0].shape[-1]))
    return _solve(rows, _solve(columns, z.mT).mT).flatten(-2), _log_det(rows, columns)
