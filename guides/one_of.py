"""Draws of a sampler: one of them at random as a distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

__all__: list[str] = []  # nothing for the registry


class OneOf(TorchDistribution):
    """One of the rows of a matrix, each as likely as the other; log q is 0, for there is no density.

    Args:
        rows: (S, d).

    >>> OneOf(torch.zeros(4, 2)).rsample((5,)).shape
    torch.Size([5, 2])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, rows: Tensor, batch_shape: Size = Size()) -> None:
        self.rows = rows
        super().__init__(Size(batch_shape), rows.shape[1:], validate_args=False)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        if len(self.rows) == 1:  # a point, which draws nothing
            return self.rows[0].expand(*shape, *self.event_shape)
        # float32 has 2^24 uniforms: enough for that many rows
        place = (torch.rand(shape, device=self.rows.device) * len(self.rows)).long().clamp(max=len(self.rows) - 1)
        return torch.index_select(self.rows, 0, place.reshape(-1)).reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneOf:
        return OneOf(self.rows, Size(batch_shape))
