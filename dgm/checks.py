"""Checks of data against model before the first step, and the report of a value that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import Tensor, nn

from .data import check_support
from .errors import DataError, GuideError, ModelError
from .heldout import ROWS
from .mapped import MappedArray
from .noise import recording
from .pair import Pair
from .programs import Program, preserved_rng, program_name
from .sites import Latents, read, trace_once


def check_observed(model: Program, batch: Sequence[Any], plates: Iterable[str]) -> Latents:
    """Hold every observed value against its distribution: shape, support, and that there is one at all.

    Raises:
        DataError: an observed value has another shape than its distribution, or lies outside the support.
        ModelError: nothing is observed.
    """
    trace = trace_once(model, *batch)
    found = read(trace, plates)
    if not found.observed:
        raise ModelError(
            f"{program_name(model)} observes nothing: give the data to a site (obs=x), or its guide would learn the "
            "prior"
        )
    for name, node in found.observed.items():
        if not _is_factor(node["fn"]):
            check_support(node["value"], node["fn"], name)
    return found


def check_all_rows(
    model: Program,
    data: Sequence[Tensor | MappedArray],
    plates: Iterable[str],
    *,
    whole: bool = False,
    transform: Any = None,
) -> Latents:
    """`check_observed` for every row of the data, in chunks of rows; `whole` for a model that takes all rows at once.

    Raises:
        DataError, ModelError: see `check_observed`.
    """
    plates, found, count = set(plates), None, len(data[0])
    size = count if whole else ROWS
    for start in range(0, count, size):
        chunk = tuple(item[start : start + size] for item in data)  # of a memory-mapped array, this is all that is read
        seen = chunk if transform is None else transform(chunk, torch.Generator(chunk[0].device).manual_seed(0))
        latents = check_observed(model, seen, plates)
        found = found or latents
    if found is None:
        raise DataError("the data has no rows")
    return found


def _is_factor(fn: Any) -> bool:
    """`pyro.factor` observes nothing: a value without entries, under a distribution that only carries the factor."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Unit)


def check_autoguide_rows(guide: nn.Module, latents: Latents, sizes: Mapping[str, int]) -> None:
    """Pyro's autoguides hold parameters for each row of the batch that they saw first, and would reuse them for others.

    Raises:
        GuideError: such a guide serves a local latent and the data come in minibatches.
    """
    for part in guide.modules():
        trace = getattr(part, "prototype_trace", None)
        if not isinstance(part, AutoGuide) or isinstance(part, AutoGuideList) or trace is None or part.create_plates:
            continue
        for site in latents.local:
            frame = site.plate_frame
            full = sizes.get(frame.name, frame.full_size or frame.size)
            if site.name in trace.nodes and full != frame.size:
                raise GuideError(
                    f"latent {site.name!r} is one for each row (plate {frame.name!r}), and {type(part).__name__} holds "
                    f"parameters for {frame.size} rows of {full}: in minibatches it would reuse them for other rows. "
                    "Use Amortized or Free for it, or train on all rows at once"
                )


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


def explain_draws(pair: Pair, batch: Sequence[Any], rows: Tensor | None) -> str:
    """Why a program's noise cannot be an input of its step: the first site, or whatever stands between the sites."""
    with pair.running(rows=rows), preserved_rng(), torch.no_grad():
        guide = poutine.trace(pair.run_guide).get_trace(*batch)
        model = poutine.trace(poutine.replay(pair.run_model, trace=guide)).get_trace(*batch)
        for where, trace in (("guide", guide), ("model", model)):
            for name, node in trace.nodes.items():
                if node["type"] != "sample" or node["is_observed"] or (where == "model" and name in guide.nodes):
                    continue
                with recording() as draws:
                    node["fn"]()
                if not draws.complete:
                    kind = type(getattr(node["fn"], "base_dist", node["fn"])).__name__
                    return f"site {name!r} of the {where} ({kind}) draws noise that depends on its parameters"
    return "the program draws noise outside of its sites that depends on values (dropout)"
