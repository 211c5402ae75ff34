"""The report of a value that is not finite: step, rows, first bad site and first bad parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .pair import Pair
from .programs import preserved_rng


def explain_nonfinite(
    pair: Pair,
    step: int,
    what: str,
    gradients: Sequence[str],
    batch: Sequence[Any],
    rows: Tensor | None,
    state: Tensor,
) -> str:
    """The message of training that met a value that is not finite: step, site, rows and parameter."""
    parts = [f"step {step}: {what}"]
    bad = [name for name, p in pair.parameters().items() if not bool(torch.isfinite(p).all())]
    if bad:
        parts.append(f"parameter {bad[0]!r} was not finite before the step")
    site = _first_bad_site(pair, batch, rows, state)
    if site is not None:
        parts.append(site)
    if gradients:
        parts.append(f"first parameter whose gradient is not finite: {gradients[0]!r}")
    parts.append(
        "the parameters are those of the last good step; try a smaller learning rate, clip=10, or look at that site's "
        "scale"
    )
    return "; ".join(parts)


def _first_bad_site(pair: Pair, batch: Sequence[Any], rows: Tensor | None, state: Tensor) -> str | None:
    with pair.running(rows=rows), preserved_rng(), torch.no_grad():
        torch.set_rng_state(state)  # the same noise as in the step
        try:
            guide = poutine.trace(pair.run_guide).get_trace(*batch)
            model = poutine.trace(poutine.replay(pair.run_model, trace=guide)).get_trace(*batch)
            guide.compute_log_prob()
            model.compute_log_prob()
        except (ValueError, RuntimeError) as error:
            return f"and the program raises {type(error).__name__}: {str(error).splitlines()[0]}"
    largest = (0.0, "")
    for where, trace in (("guide", guide), ("model", model)):
        for name, node in trace.nodes.items():
            if node["type"] != "sample":
                continue
            size = float(torch.as_tensor(node["log_prob"]).abs().sum())
            largest = max(largest, (size, f"{name!r} of the {where} ({size:.3g} nats)"))
            values: list[tuple[str, Any]] = [("value", node["value"]), ("log-probability", node["log_prob"])]
            for kind, value in values:
                finite = torch.isfinite(value) if value.is_floating_point() else torch.ones((), dtype=torch.bool)
                if not bool(finite.all()):
                    which = _which_rows(finite, node, rows)
                    return f"first site that is not finite: {name!r} of the {where} ({kind}{which})"
    return f"every site is finite, the largest is {largest[1]}" if largest[1] else None


def _which_rows(finite: Tensor, node: Any, rows: Tensor | None) -> str:
    frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
    if not frames or finite.dim() == 0:
        return ""
    size = frames[0].size
    axis = next((i for i, n in enumerate(finite.shape) if n == size), None)
    if axis is None:
        return ""
    bad = (~finite).movedim(axis, 0).reshape(size, -1).any(1).nonzero().flatten()
    names = rows[bad] if rows is not None and len(rows) == size else bad
    return f", rows {names[:5].tolist()}" + (" ..." if len(bad) > 5 else "")
