"""Log densities of a trace by rows: what stands inside the data plates, for each row, and the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_row", "data_frame", "row_terms"]


def data_frame(node: Any, plates: Iterable[str]) -> Any:
    """The data plate that a site stands in, or None."""
    names = set(plates)
    return next((f for f in node["cond_indep_stack"] if f.vectorized and f.name in names), None)


def by_row(log_prob: Tensor, node: Any, frame: Any) -> Tensor:
    """`(B,)`: a site's log density summed for each row, with the scale of every plate taken out."""
    for f in node["cond_indep_stack"]:
        if f.vectorized and f.full_size is not None and f.full_size != f.size:
            log_prob = log_prob * (f.size / f.full_size)
    whole = torch.broadcast_shapes(log_prob.shape, (frame.size, *[1] * (-frame.dim - 1)))
    return log_prob.expand(whole).movedim(frame.dim, 0).reshape(frame.size, -1).sum(-1)


def row_terms(trace: Any, plates: Iterable[str], like: Tensor) -> tuple[Tensor, Tensor]:
    """What stands inside the data plates, `(B,)`, with every plate's scale taken out, and the rest, `()`.

    Args:
        trace: its log densities are computed. like: a tensor of the type and device of a trace without any term.
    """
    names = set(plates)
    rows: Any = like.new_zeros(1)
    rest: Any = like.new_zeros(())
    for node in trace.nodes.values():
        if node["type"] != "sample":
            continue
        frame, log_prob = data_frame(node, names), torch.as_tensor(node["log_prob"])
        if frame is None:
            rest = rest + log_prob.sum()
        else:
            rows = rows + by_row(log_prob, node, frame)
    return rows, rest
