"""Checks of data against model before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from torch import Tensor, nn

from .data import transformed
from .errors import DataError, DGMError, GuideError, ModelError
from .heldout import ROWS
from .hints import Lines, misplaced
from .mapped import MappedArray
from .noise import recording
from .pair import Pair
from .programs import Program, preserved_rng, program_name
from .sites import Latents, read, trace_once
from .structure import check_plate_rows, warn_of_draws
from .support import check_inside, check_support, kind_of, plain_support


def check_observed(model: Program, batch: Sequence[Any], plates: Iterable[str], rows: int | None = None) -> Latents:
    """Hold every observed value against its distribution: shape, support, and that there is one at all.

    rows: what the data plate must count, if that is known.

    Raises:
        DataError: an observed value has another shape than its distribution, or lies outside the support.
        ModelError: nothing is observed, a site's entries stand in no plate, or the model writes to its data.
    """
    lines, name = Lines(), program_name(model)
    trace = trace_once(model, *batch, lines=lines)
    found = read(trace, plates)
    if not found.observed:
        raise ModelError(
            f"{name} observes nothing: give the data to a site (obs=x), or its guide would learn the prior"
        )
    if rows is not None:
        check_plate_rows(model, found, rows)
    for site, node in found.observed.items():
        if not _is_factor(node["fn"]):
            check_support(node["value"], node["fn"], site)
    alone = misplaced(trace.nodes, lines.at)
    if alone is not None:
        raise ModelError(f"{name}: {alone}")
    return found


def check_all_rows(
    model: Program,
    data: Sequence[Tensor | MappedArray],
    plates: Iterable[str],
    *,
    whole: bool = False,
    transform: Any = None,
    name: str = "",
) -> Latents:
    """`check_observed` for every row of the data, in chunks of rows; `whole` for a model that takes all rows at once.

    The first chunk also shows whether the data plate counts the rows, and (in the log) draws outside of sample sites.
    `name` is what messages call the data, where there are others.

    Raises:
        DataError, ModelError: see `check_observed`; ModelError also where the data plate counts something else.
    """
    plates, found, count = set(plates), None, len(data[0])
    size = count if whole else ROWS
    for start in range(0, count, size):
        chunk = tuple(item[start : start + size] for item in data)  # of a memory-mapped array, this is all that is read
        seen = chunk if transform is None else transformed(chunk, transform)
        try:
            latents = check_observed(model, seen, plates, len(seen[0]))
        except DGMError as error:
            raise type(error)(f"{name}: {error}" if name else str(error)) from error.__cause__
        if found is None:
            found = latents
            warn_of_draws(model, seen)
    if found is None:
        raise DataError("the data has no rows")
    return found


class EachBatch:
    """Holds each batch of a stream against the model: the first by `check_observed`, the others by their supports.

    Only observed values that are an argument of the model, as it stands, are looked at again: that costs no run of it.
    """

    def __init__(self, model: Program, plates: Iterable[str]):
        self.model, self.plates = model, set(plates)
        self.direct: list[tuple[str, str, Any, int]] | None = None  # site, distribution, support, argument

    def __call__(self, batch: Sequence[Tensor]) -> None:
        """Raises: DataError, ModelError: see `check_observed`."""
        if self.direct is None:
            found = check_observed(self.model, batch, self.plates, len(batch[0]))
            warn_of_draws(self.model, batch)
            self.direct = [
                (site, kind_of(node["fn"]), support, place)
                for site, node in found.observed.items()
                if (support := plain_support(node["fn"])) is not None
                for place, item in enumerate(batch)
                if node["value"] is item
            ]
            return
        for site, kind, support, place in self.direct:
            check_inside(batch[place], support, site, kind)


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
