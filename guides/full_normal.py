"""Full normal: every covariance, by its Cholesky factor."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import LocationScale, Pushforward
from .heads import Head

__all__ = ["FullNormal"]


class FullNormal(LocationScale):
    """Normal distribution with any covariance, starting as the diagonal one.

        z = loc + S (I + U) eps,    S = diag(exp(log_scale)),    U strictly lower triangular

    M. K. Titsias, M. Lazaro-Gredilla: Doubly Stochastic Variational Bayes for non-Conjugate Inference, 2014.

    U is in units of the diagonal and starts at exactly zero, weights and biases: the family starts as `DiagonalNormal`
    with the same location and scale.

    Args:
        features: the dimension d, at least 1. It has d (d + 3) / 2 parameters without a context.
        context: features of the context; 0 for none.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, or scale <= 0.

    >>> q = FullNormal(3)()
    >>> q.covariance_matrix.shape, q.rsample((5,)).shape
    (torch.Size([3, 3]), torch.Size([5, 3]))
    """

    index: Tensor

    def __init__(self, features: int, context: int = 0, scale: float | None = None) -> None:
        super().__init__(features, context, scale)
        self.gain = 1.0 / math.sqrt(features) if context else 1.0
        if features > 1:
            self.lower = Head(features * (features - 1) // 2, context, gain=0.0)
        # entry 0 is a zero, entry k the k-th of the strictly lower triangle: a gather builds the matrix without
        # writing into one, which vmap and tracing would refuse
        row, column = torch.tril_indices(features, features, -1)
        index = torch.zeros(features, features, dtype=torch.long)
        index[row, column] = 1 + torch.arange(len(row))
        self.register_buffer("index", index.flatten(), persistent=False)

    @torch.no_grad()
    def initialise_covariance(self, loc: Tensor, covariance: Tensor) -> None:
        """Start as any normal distribution, by the Cholesky factor of its covariance; with a context, the biases.

        Args:
            loc: (features,), the mean.
            covariance: (features, features), positive definite.
        """
        tril = torch.linalg.cholesky(covariance.double())
        self.initialise(loc, tril.diagonal().to(loc))
        if self.features > 1:
            lower = (tril / tril.diagonal().unsqueeze(-1)).to(loc)  # S (I + U): each row in units of its diagonal
            row, column = torch.tril_indices(self.features, self.features, -1)
            self.lower.bias.copy_(lower[row, column] / self.gain)

    def forward(self, context: Tensor | None = None) -> TriangularNormal:
        loc, log_scale = self.loc_and_log_scale(context)
        if self.features == 1:
            return TriangularNormal(loc, log_scale, torch.zeros_like(loc).unsqueeze(-1))
        entries = F.pad(self.gain * self.lower(context), (1, 0))
        lower = torch.index_select(entries, -1, self.index).unflatten(-1, (self.features, self.features))
        return TriangularNormal(loc, log_scale, lower)


class TriangularNormal(Pushforward):
    """Normal distribution of loc + S (I + U) eps, with its moments in closed form.

    Args:
        loc: (*batch, d), the mean.
        log_scale: (*batch, d), the logarithm of S's diagonal.
        lower: (*batch, d, d), U, strictly lower triangular.

    >>> TriangularNormal(torch.zeros(2), torch.zeros(2), torch.zeros(2, 2)).variance
    tensor([1., 1.])
    """

    def __init__(self, loc: Tensor, log_scale: Tensor, lower: Tensor) -> None:
        self.log_scale, self.lower = log_scale, lower
        super().__init__(partial(_push, loc, log_scale, lower), partial(_pull, loc, log_scale, lower), loc)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of the covariance, (*batch, d, d)."""
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        tril = self.log_scale.exp().unsqueeze(-1) * (eye + self.lower)
        return tril.expand(self.batch_shape + tril.shape[-2:])

    @property
    def covariance_matrix(self) -> Tensor:
        return self.scale_tril @ self.scale_tril.mT

    @property
    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1)


def _push(loc: Tensor, log_scale: Tensor, lower: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    return loc + log_scale.exp() * (eps + torch.einsum("...ij,...j->...i", lower, eps)), log_scale.sum(-1)


def _pull(loc: Tensor, log_scale: Tensor, lower: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    u = (x - loc) * (-log_scale).exp()
    draws = u.dim() - log_scale.dim()
    if draws == 0:
        eps = torch.linalg.solve_triangular(lower, u.unsqueeze(-1), upper=False, unitriangular=True).squeeze(-1)
    else:  # all draws of one datum are columns of one system, and its matrix is not copied
        columns = u.flatten(0, draws - 1).movedim(0, -1)
        eps = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        eps = eps.movedim(-1, 0).unflatten(0, u.shape[:draws])
    return eps, log_scale.sum(-1)
