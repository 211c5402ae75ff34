"""The terms of one run: log-likelihood, log-prior and log q, of each row and of what all rows share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from .errors import ModelError

LIKELIHOOD, PRIOR, POSTERIOR = 0, 1, 2
"""Places of a term: log p(x | z), log p(z), log q(z | x)."""


class Terms(NamedTuple):
    """Log densities of one run, with the scale of the data plates taken out.

    rows: by data plate, `(3, B)`: the three terms of each row.
    shared: `(3,)`: those of the sites outside of every data plate.
    """

    rows: dict[str, Tensor]
    shared: Tensor


def sample_sites_of(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    """The sample statements of a trace, plates' own subsamples left out."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample":
            yield name, node


def data_frame(node: Any, plates: Mapping[str, Any]) -> Any:
    """The data plate's frame that a site stands in, or None."""
    return next((f for f in node["cond_indep_stack"] if f.vectorized and f.name in plates), None)


def own_factor(frame: Any) -> float:
    """N / B of a plate that declares its full size; Pyro scales its sites by it."""
    return 1.0 if frame.full_size in (None, frame.size) else frame.full_size / frame.size


def row_factor(frame: Any, plates: Mapping[str, Any]) -> Any:
    """N / B of a data plate: what the plate declares, else what `plates` knows of its full size.

    Raises:
        ModelError: the two disagree.
    """
    declared, size = own_factor(frame), plates.get(frame.name)
    if declared == 1.0:
        return 1.0 if size is None else size / frame.size
    if isinstance(size, int) and size != frame.full_size:
        raise ModelError(
            f"plate {frame.name!r} declares the full size {frame.full_size}, sizes says {size}: make them equal, or "
            f'write pyro.plate("{frame.name}", len(x)) in the model'
        )
    return declared


def by_row(node: Any, values: Tensor, plates: Mapping[str, Any]) -> tuple[str | None, Tensor]:
    """A site's scaled log density `values` as (data plate, `(B,)`), or (None, `()`) outside of all of them.

    The scale of the row's own plate is taken out; that of a second data plate, in which the rows' terms are nested,
    is put in.
    """
    frame = data_frame(node, plates)
    for other in node["cond_indep_stack"]:
        if not other.vectorized or other.name not in plates:
            continue
        if other is frame:
            values = values / own_factor(other)
        elif own_factor(other) == 1.0:
            values = values * row_factor(other, plates)
    if frame is None:
        return None, values.sum()
    if values.dim() < -frame.dim:
        values = values.expand(frame.size, *[1] * (-frame.dim - 1))
    rows = values.movedim(frame.dim, 0)
    return frame.name, rows.reshape(rows.shape[0], -1).sum(-1).expand(frame.size)


def terms_of(
    model: poutine.Trace, guide: poutine.Trace, plates: Mapping[str, Any], exact: Mapping[str, Tensor] | None = None
) -> Terms:
    """The terms of two traces of one run.

    Args:
        model, guide: traces of the two programs, the model's replayed on the guide's.
        plates: full size of each data plate, a number, a 0-d tensor, or None for the rows present.
        exact: by latent, a KL divergence in the shape of its log density: it stands for -log p(z) where the sampled
            log p(z) - log q(z) would; the auxiliary sites of such latents are named with a None.
    """
    model.compute_log_prob()
    guide.compute_log_prob()
    exact = exact or {}
    rows: dict[str, list[Any]] = {}
    shared: list[Any] = [0.0, 0.0, 0.0]
    like = None
    for trace in (model, guide):
        for name, node in sample_sites_of(trace):
            place = POSTERIOR if trace is guide else LIKELIHOOD if node["is_observed"] else PRIOR
            log_prob: Any = node["log_prob"]
            if name in exact and place != LIKELIHOOD:
                if place == POSTERIOR:
                    continue
                log_prob = -exact[name] * node["scale"]
            plate, values = by_row(node, torch.as_tensor(log_prob), plates)
            like = values
            kept = shared if plate is None else rows.setdefault(plate, [0.0, 0.0, 0.0])
            kept[place] = kept[place] + values
    if like is None:
        return Terms({}, torch.zeros(3))
    zero = like.new_zeros(())
    return Terms(
        {name: torch.stack([v if isinstance(v, Tensor) else _zeros(t) for v in t]) for name, t in rows.items()},
        torch.stack([v if isinstance(v, Tensor) else zero for v in shared]),
    )


def _zeros(three: list[Any]) -> Tensor:
    return torch.zeros_like(next(v for v in three if isinstance(v, Tensor)))


def frames_of(trace: poutine.Trace, plates: Mapping[str, Any]) -> list[Any]:
    """The frames of the data plates that a trace opens, one for each."""
    frames = (data_frame(node, plates) for _, node in sample_sites_of(trace))
    return list({frame.name: frame for frame in frames if frame is not None}.values())


def factors_of(trace: poutine.Trace, plates: Mapping[str, Any]) -> dict[str, Any]:
    """N / B of each data plate that a trace opens."""
    return {frame.name: row_factor(frame, plates) for frame in frames_of(trace, plates)}


__all__ = [
    "LIKELIHOOD",
    "POSTERIOR",
    "PRIOR",
    "Terms",
    "by_row",
    "factors_of",
    "frames_of",
    "sample_sites_of",
    "terms_of",
]
