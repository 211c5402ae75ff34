"""Curvature of a log joint density over all rows: exact Hessian, and the Fisher information of the predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import GuideError
from .linear_calls import Layer, LinearCalls, layers_of
from .log_joint import LogJoint, chunks
from .row_terms import by_row, data_frame

COLUMNS = 64
"""Columns of a Hessian in one backward pass."""

ROWS = 32
"""Rows whose gradients are taken in one backward pass."""

FACTOR_ROWS = 1000
"""Rows in one pass of Kronecker factors, which need no gradient of each row."""


def placed(u: Tensor, columns: Tensor | None, v: Tensor) -> Tensor:
    """u with the coordinates `columns` replaced by v; v itself where they are all."""
    return v if columns is None else torch.index_copy(u, 0, columns, v)


def precision(joint: LogJoint, u: Tensor, batch: Sequence[Any], columns: Tensor | None = None) -> Tensor:
    """-d^2 log p(x, u) / du du' over all rows, exact, `(k, k)` in double precision, at u `(d,)`.

    Args:
        joint: the log density. batch: all rows. columns: `(k,)` int64, of which coordinates; default all.
    """
    start = u if columns is None else u[columns]
    total = torch.zeros(len(start), len(start), dtype=torch.float64, device=u.device)
    for first, chunk in chunks(batch):
        part = lambda v, chunk=chunk, first=first: joint.part(placed(u, columns, v), chunk, first)  # noqa: E731
        # twice in reverse: forward mode lacks the derivatives of some backward passes
        total -= torch.func.jacrev(torch.func.grad(part), chunk_size=COLUMNS)(start).detach().double()
    return (total + total.mT) / 2


def prior_precision(joint: LogJoint, u: Tensor, batch: Sequence[Any]) -> Tensor:
    """`(d,)`: diagonal of -d^2/du du' of what belongs to no row: prior and Jacobian, exact, in double precision."""
    row = chunks(batch, 1)[0][1]

    def slope(v: Tensor) -> Tensor:
        return torch.func.grad(lambda w: joint.terms(w, *row)[1])(v)

    turn = torch.func.vjp(slope, u)[1]
    found = torch.empty(len(u), dtype=torch.float64, device=u.device)  # parts kept between blocks break up the heap
    for start in range(0, len(u), COLUMNS):
        index = torch.arange(start, min(start + COLUMNS, len(u)), device=u.device)
        units = torch.nn.functional.one_hot(index, len(u)).to(u.dtype)
        rows = torch.func.vmap(turn)(units)[0]
        found[index] = -rows.gather(1, index[:, None]).squeeze(1).detach().double()
    return found


def row_gradients(joint: LogJoint, u: Tensor, batch: Sequence[Any]) -> Iterator[Tensor]:
    """Gradients of each row's log density, `(B, d)` a chunk."""
    for _, chunk in chunks(batch, ROWS):
        v = u.detach().requires_grad_()
        with torch.enable_grad():
            rows = joint.terms(v, *chunk)[0]
        yield _jacobian(rows, v)


def fisher_draws(rows: int) -> int:
    """How many targets to draw for each row so that about two thousand gradients are averaged."""
    return max(1, math.ceil(2000 / max(1, rows)))


def fisher_diagonal(
    joint: LogJoint, u: Tensor, batch: Sequence[Any], draws: int, columns: Tensor | None = None
) -> Tensor:
    """`(k,)`: diagonal of sum_n E_y[g g'] with y drawn from the model's own prediction of row n and g = d log p(y)/du.

    Where the likelihood is an exponential family in its natural parameters this is the generalised Gauss-Newton matrix.
    """
    total: Any = 0.0
    for _, chunk in chunks(batch, ROWS):
        v = (u if columns is None else u[columns]).detach().clone().requires_grad_()
        with torch.enable_grad():
            found = joint.trace(placed(u, columns, v), *chunk)[0]
            for _ in range(draws):
                gradients = _jacobian(_sampled(found, joint), v)
                total = total + gradients.double().square().sum(0) / draws
    return total


def fisher_factors(
    joint: LogJoint, u: Tensor, batch: Sequence[Any], draws: int
) -> list[tuple[str, str | None, Tensor, Tensor, int]]:
    """Of every linear layer: weight site, bias site, A = mean of a a', B = mean of g g', and how many there were.

    a is the layer's input, with a one behind it where there is a bias; g the gradient of log p(y) in its output, with
    y drawn from the model's own prediction. The layer's Fisher information is about n A (x) B (Martens and Grosse,
    "Optimizing neural networks with Kronecker-factored approximate curvature", 2015).
    """
    sums: dict[str, list[Any]] = {}
    for _, chunk in chunks(batch, FACTOR_ROWS):
        with torch.enable_grad(), LinearCalls(probe=True) as seen:
            found, values, _ = joint.trace(u.detach(), *chunk)
            layers = layers_of(seen, values)
            probes = [layer.call.probe for layer in layers if layer.call.probe is not None]
            if not probes:
                return []
            for layer in layers:
                a = _inputs(layer)
                held = sums.setdefault(layer.weight, [layer.bias, 0.0, 0.0, 0])
                held[1], held[3] = held[1] + a.mT @ a, held[3] + len(a)
            for _ in range(draws):
                slopes = torch.autograd.grad(_sampled(found, joint).sum(), probes, retain_graph=True, allow_unused=True)
                for layer, slope in zip(layers, slopes, strict=True):
                    if slope is not None:
                        g = slope.detach().double().reshape(-1, slope.shape[-1])
                        sums[layer.weight][2] = sums[layer.weight][2] + g.mT @ g / draws
    return [(name, bias, a / n, b / n, n) for name, (bias, a, b, n) in sums.items() if isinstance(b, Tensor)]


def _inputs(layer: Layer) -> Tensor:
    a = layer.call.x.detach().double()
    a = a.reshape(-1, a.shape[-1])
    return a if layer.bias is None else torch.cat([a, torch.ones_like(a[:, :1])], 1)


def _jacobian(rows: Tensor, v: Tensor) -> Tensor:
    if not rows.requires_grad:
        raise GuideError(
            "the gradient of each row's log density is needed, and no row depends on the latents: put what is observed "
            'into the data plate, pyro.plate("data", len(x))'
        )
    units = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return torch.autograd.grad(rows, v, units, is_grads_batched=True, retain_graph=True)[0].detach()


def _sampled(found: Any, joint: LogJoint) -> Tensor:
    """`(B,)`: log density of targets that the model itself draws at this point."""
    rows: Any = 0.0
    for name, node in found.nodes.items():
        frame = data_frame(node, joint.plates) if node["type"] == "sample" else None
        if frame is None:
            continue
        try:
            target = node["fn"].sample().detach()
        except NotImplementedError:
            raise GuideError(
                f"site {name!r} observes a {type(node['fn']).__name__}, which cannot be sampled, and the Fisher "
                "information needs targets that the model draws: take the exact Hessian, structure='full'"
            ) from None
        rows = rows + by_row(node["fn"].log_prob(target), node, frame)
    return rows


__all__ = ["fisher_diagonal", "fisher_draws", "fisher_factors", "placed", "precision", "prior_precision"]
