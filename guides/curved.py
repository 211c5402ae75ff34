"""Normal densities of a given curvature: independent, by the eigenbases of Kronecker factors, in some coordinates."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .family import Pushforward

__all__: list[str] = []  # nothing for the registry


def partial_normal(loc: Tensor, columns: Tensor, q: Any) -> Pushforward:
    """q in the coordinates `columns`, a point in all others: log q is that of these coordinates."""

    def whole(v: Tensor) -> Tensor:
        return torch.index_copy(loc.expand(*v.shape[:-1], len(loc)), -1, columns, v)

    def push(eps: Tensor) -> tuple[Tensor, Tensor]:
        v, log_det = q.push(torch.index_select(eps, -1, columns))
        return whole(v), log_det

    return Marginal(push, lambda x: q.pull(torch.index_select(x, -1, columns)), loc, columns)


class Marginal(Pushforward):
    """A pushforward of which only some coordinates of the noise are used, and counted."""

    def __init__(self, push: Any, pull: Any, loc: Tensor, columns: Tensor) -> None:
        self.columns = columns
        super().__init__(push, pull, loc)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Pushforward:
        return super().expand(batch_shape, self.__new__(type(self)) if _instance is None else _instance)

    def _log_normal(self, eps: Tensor) -> Tensor:  # type: ignore[override]
        used = eps if eps.shape[-1] == len(self.columns) else torch.index_select(eps, -1, self.columns)
        return Pushforward._log_normal(used)


class CurvedDiagonal(nn.Module):
    """Independent normals about a point."""

    log_scale: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros_like(like.detach()))

    def set(self, fisher: Tensor, prior: Tensor, factors: Any, slope: Tensor) -> tuple[float, float]:
        total = fisher + prior
        self.log_scale.copy_(-0.5 * total.log())
        return float(total.log().sum()), float((slope.square() / total).sum().sqrt())

    def forward(self, loc: Tensor) -> Any:
        return dist.Normal(loc, self.log_scale.exp(), validate_args=False).to_event(1)


class CurvedKronecker(nn.Module):
    """Normals of the layers in the eigenbases of their two factors, and independent ones for all other entries.

    Args:
        like: (d,). blocks: name of each layer and the entries of its matrix (out, in), among the d.
    """

    order: Tensor
    back: Tensor
    alone: Tensor
    log_scale: Tensor

    def __init__(self, like: Tensor, blocks: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        like = like.detach()
        self.names = [name for name, _ in blocks]
        self.shapes = [tuple(entries.shape) for _, entries in blocks]
        inside = torch.cat([entries.flatten() for _, entries in blocks])
        left = torch.ones(len(like), dtype=torch.bool, device=like.device).index_fill(0, inside, False)
        order = torch.cat([inside, left.nonzero().squeeze(1)])
        self.register_buffer("alone", order[len(inside) :], persistent=False)  # entries of no layer
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)
        self.register_buffer("log_scale", torch.zeros_like(like))  # in the eigenbases, in this order
        for i, (rows, columns) in enumerate(self.shapes):
            self.register_buffer(f"left_{i}", torch.eye(rows, dtype=like.dtype, device=like.device))
            self.register_buffer(f"right_{i}", torch.eye(columns, dtype=like.dtype, device=like.device))

    def set(self, fisher: Tensor, prior: Tensor, factors: Any, slope: Tensor) -> tuple[float, float]:
        prior = prior[self.order]
        total = fisher[self.order] + prior
        known = {name: (a, b, n) for name, _, a, b, n in factors}
        start = 0
        for i, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            stop = start + math.prod(shape)
            if name not in known:  # a layer that no prediction depends on keeps its prior
                start = stop
                continue
            a, b, n = known[name]
            (va, ra), (vb, lb) = torch.linalg.eigh(a), torch.linalg.eigh(b)
            curvature = n * torch.outer(vb.clamp_min(0), va.clamp_min(0))
            # the prior's diagonal as it stands in the eigenbasis
            weight = lb.square().mT @ prior[start:stop].reshape(shape) @ ra.square()
            total[start:stop] = (curvature + weight).flatten()
            getattr(self, f"left_{i}").copy_(lb)
            getattr(self, f"right_{i}").copy_(ra)
            start = stop
        self.log_scale.copy_(-0.5 * total.log())
        turned = self._turn(slope.to(self.log_scale.dtype)[self.order], inverse=True)
        return float(total.log().sum()), float((turned.double().square() / total).sum().sqrt())

    def _turn(self, v: Tensor, inverse: bool = False) -> Tensor:
        """From the eigenbases (*S, d) to the layers, or back."""
        sizes = [math.prod(shape) for shape in self.shapes]
        *parts, rest = v.split([*sizes, v.shape[-1] - sum(sizes)], -1)
        out = []
        for i, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            left, right = getattr(self, f"left_{i}"), getattr(self, f"right_{i}")
            matrix = part.unflatten(-1, shape)
            matrix = left.mT @ matrix @ right if inverse else left @ matrix @ right.mT
            out.append(matrix.flatten(-2))
        return torch.cat([*out, rest], -1)

    def forward(self, loc: Tensor) -> Pushforward:
        def push(eps: Tensor) -> tuple[Tensor, Tensor]:
            v = self._turn(self.log_scale.exp() * eps)
            return loc + torch.index_select(v, -1, self.back), self.log_scale.sum()

        def pull(x: Tensor) -> tuple[Tensor, Tensor]:
            v = torch.index_select(x - loc, -1, self.order)
            return (-self.log_scale).exp() * self._turn(v, inverse=True), self.log_scale.sum()

        return Pushforward(push, pull, loc)
