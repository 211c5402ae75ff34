"""Programs at given values of their sites: their log density by rows, for many values at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .log_joint import by_row, data_frame, rows_of
from .programs import Program, StartValues, isolated

__all__ = ["held", "log_terms", "mapped"]


def held(run: Program, values: Mapping[str, Tensor], batch: Sequence[Any]) -> Any:
    """The trace of a run with these sites held at these values, their log densities computed."""
    with poutine.block(), isolated(validate=False), StartValues(values):
        found = poutine.trace(run).get_trace(*batch)
        found.compute_log_prob()
    return found


def log_terms(trace: Any, plates: Iterable[str], like: Tensor, guide: bool = False) -> tuple[Tensor, Tensor]:
    """What stands inside the data plates, `(B,)`, with every plate's scale taken out, and the rest, `()`.

    guide: take out every scale there is; a guide's plate may carry its own by a handler, of which no frame tells.
    """
    names = set(plates)
    rows: Any = 0.0
    rest: Any = like.new_zeros(())
    for node in trace.nodes.values():
        if node["type"] != "sample" or node["infer"].get("_deterministic"):
            continue
        frame, log_prob = data_frame(node, names), torch.as_tensor(node["log_prob"])
        log_prob = log_prob / node["scale"] if guide else log_prob
        if frame is None:
            rest = rest + log_prob.sum()
        else:
            rows = rows + (rows_of(log_prob, frame) if guide else by_row(log_prob, node, frame))
    return (rows if isinstance(rows, Tensor) else like.new_zeros(1)), rest


ELEMENTS = 2**22
"""Entries of the largest tensor, data or latents, that the runs of one chunk hold together: 16 MB in float32."""


def mapped(
    one: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    values: Mapping[str, Tensor],
    batch: Sequence[Any],
    widest: int = 1,
) -> tuple[Tensor, ...]:
    """`one` of each of S values, results stacked: by a vmap in chunks, or one by one where vmap refuses the program.

    widest: entries of the largest tensor of one run, where the values and the batch do not show it.
    """
    given = dict(values)
    count = len(next(iter(given.values())))
    seen = [*(value[0] for value in given.values()), *(item for item in batch if isinstance(item, Tensor))]
    widest = max(widest, *(tensor.numel() for tensor in seen))
    try:
        return torch.func.vmap(one, chunk_size=max(1, ELEMENTS // widest))(given)
    except (RuntimeError, NotImplementedError, ValueError):
        runs = [one({name: value[s] for name, value in given.items()}) for s in range(count)]
        return tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
