"""Checks of a program's structure: what its plates count, what is scaled to the full data, what it draws unseen."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .errors import DataError, DGMError, GuideError, ModelError, OptionError
from .programs import FunctionProgram, Program, evaluating, isolated, owner, program_name
from .sites import DATA_PLATE, Latents, trace_once

log = logging.getLogger("dgm")

FEW = 64
"""Rows that show whether a model draws outside of its sites."""
_NOISY: weakref.WeakSet[Any] = weakref.WeakSet()  # programs of which it was said once that they draw outside of sites


def check_plate_rows(model: Program, found: Latents, rows: int) -> None:
    """The data plate counts the rows of the batch: N/B is the scale of a minibatch, and of nothing else.

    Raises:
        ModelError: it counts something else, such as the features.
    """
    frame = found.plates.get(DATA_PLATE)
    if frame is not None and frame.full_size in (None, frame.size) and frame.size != rows:
        raise ModelError(
            f"the plate {DATA_PLATE!r} of {program_name(model)} counts {frame.size}, the batch has {rows} rows: write "
            f'pyro.plate("{DATA_PLATE}", len(x)) around the rows, and give other plates other names'
        )


def check_scales(
    model: Program, batch: Sequence[Any], found: Latents, sizes: Mapping[str, int], rows: Tensor | None = None
) -> None:
    """In minibatches: what has an entry for each row stands in a plate that is scaled by N/B, and is scaled once.

    Raises:
        ModelError: a site depends on the number of rows and is outside of every data plate, or is scaled by the model
            too; the message names it. OptionError: these are rows of a longer data set, of which no size is told.
    """
    plate = found.plates.get(DATA_PLATE)
    if rows is not None and rows.numel() and plate is not None and DATA_PLATE not in sizes:
        if plate.full_size in (None, plate.size) and int(rows.max()) >= plate.size:
            raise OptionError(
                f"the batch holds row {int(rows.max())} and the plate {DATA_PLATE!r} counts {plate.size}: minibatches "
                f"need the scale N/B, give SVI(..., sizes={{{DATA_PLATE!r}: number of all rows}})"
            )
    scales = {n: sizes[n] / found.plates[n].size for n in sizes if n in found.plates and found.plates[n].size}
    own = {n for n in scales if found.plates[n].full_size not in (None, found.plates[n].size)}  # Pyro scales these
    scales = {n: scale for n, scale in scales.items() if scale != 1 and n not in own}
    if scales:
        _scaled_twice(model, found, scales)
    if scales or own:
        _unscaled_rows(model, batch, found, set(sizes))


def _scaled_twice(model: Program, found: Latents, scales: Mapping[str, float]) -> None:
    for site, node in found.observed.items():
        given = node["scale"]
        value = float(given) if not isinstance(given, Tensor) or given.numel() == 1 else 1.0
        for frame in node["cond_indep_stack"]:
            if value != 1 and math.isclose(value, scales.get(frame.name, 1.0), rel_tol=1e-6):
                raise ModelError(
                    f"site {site!r} of {program_name(model)} is scaled by {value:g}, which is N/B of the plate "
                    f"{frame.name!r}: training scales the plate to all rows by itself; leave poutine.scale out"
                )


def _unscaled_rows(model: Program, batch: Sequence[Any], found: Latents, plates: set[str]) -> None:
    rows = next((len(item) for item in batch if isinstance(item, Tensor) and item.dim()), 0)
    outside = {name: site.batch_shape + site.event_shape for name, site in found.items()}
    outside |= {name: torch.as_tensor(node["value"]).shape for name, node in found.observed.items()}
    frames = {name: {f.name for f in site.frames} for name, site in found.items()}
    frames |= {name: {f.name for f in node["cond_indep_stack"]} for name, node in found.observed.items()}
    outside = {name: shape for name, shape in outside.items() if rows in shape and not frames[name] & plates}
    if not outside or rows < 2:
        return
    fewer = [t[:-1] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t for t in batch]
    try:
        other = trace_once(model, *fewer)
    except DGMError:
        return  # it takes this number of rows and no other
    for name, shape in outside.items():
        if name in other.nodes and torch.as_tensor(other.nodes[name]["value"]).shape != shape:
            raise ModelError(
                f"site {name!r} of {program_name(model)} has an entry for each row, {tuple(shape)}, and stands in "
                f"none of the plates {', '.join(map(repr, sorted(plates)))}: a minibatch would count as if it were all "
                f'rows. Sample it inside `with pyro.plate("{DATA_PLATE}", len(x)):`, or train on all rows at once'
            )


def warn_of_draws(model: Program, batch: Sequence[Any]) -> None:
    """Say once, in the log, that a model draws random numbers outside of its sites; dropout layers may.

    Two runs in evaluation mode, at the same values of all latents, must give every site the same density.
    """
    home = owner(model)
    inner = home.function if isinstance(home, FunctionProgram) else model
    key = type(home) if home is not None and not isinstance(home, FunctionProgram) else inner
    try:
        if key in _NOISY:
            return
        rows = len(batch[0]) if len(batch) and isinstance(batch[0], Tensor) and batch[0].dim() else 0
        some = [t[:FEW] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t for t in batch]
        try:
            site = _unsteady_site(model, some)
        except DGMError:  # it takes this number of rows and no other
            site = _unsteady_site(model, batch)
        if site is not None:
            _NOISY.add(key)
    except TypeError:  # a program that cannot be remembered
        return
    if site is not None:
        log.warning(
            "%s draws random numbers outside of its sites: the density of %r differs in two runs at the same latents. "
            "The ELBO is then an average over them, and no bound of one model's evidence: draw them by pyro.sample, or "
            "give them as data",
            program_name(model),
            site,
        )


def _unsteady_site(model: Program, batch: Sequence[Any]) -> str | None:
    with evaluating(model):
        first = trace_once(model, *batch, seed=0)
        nodes: dict[str, Any] = {n: node for n, node in first.nodes.items() if node["type"] == "sample"}
        values = {n: node["value"] for n, node in nodes.items() if not node["is_observed"]}
        again = trace_once(model, *batch, seed=1, values=values)
    for name, node in nodes.items():
        if site_is_subsample(node):
            continue
        if name not in again.nodes:
            return name
        other: Any = again.nodes[name]["fn"]
        with isolated(validate=False):
            try:
                here, there = node["fn"].log_prob(node["value"]), other.log_prob(node["value"])
            except (ValueError, RuntimeError, NotImplementedError):
                continue
        if here.shape != there.shape or not torch.allclose(here, there, rtol=1e-4, atol=1e-5, equal_nan=True):
            return name
    return None


def check_coverage(parameters: Mapping[str, Tensor], reached: Sequence[Tensor], guide: Program) -> None:
    """The loss depends on the parameters that the optimiser moves; the log names those on which it does not.

    Raises:
        GuideError: it depends on none.
    """
    held = {id(leaf) for leaf in reached}
    left = [name for name, p in parameters.items() if id(p) not in held]
    if len(left) == len(parameters):
        raise GuideError(
            f"nothing to train: none of the {len(left)} parameters of {program_name(guide)} and its model takes part "
            "in the loss: look for .detach(), .data, torch.no_grad() or torch.tensor(parameter) in the programs"
        )
    if left:
        some = ", ".join(map(repr, left[:3])) + (", ..." if len(left) > 3 else "")
        log.warning(
            "%d of %d parameters take no part in the loss and will not be trained: %s", len(left), len(parameters), some
        )


_BY_MODE = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


def check_modes(*programs: Program) -> None:
    """A program as a whole in evaluation mode would be trained without its dropout and with old batch statistics.

    Single layers in evaluation mode are frozen on purpose, and are left so.

    Raises:
        ModelError: a whole program is in evaluation mode and has layers for which that matters.
    """
    for program in programs:
        home = owner(program)
        if home is None or home.training:
            continue
        for name, part in home.named_modules():
            if isinstance(part, _BY_MODE) and not part.training and getattr(part, "track_running_stats", True):
                raise ModelError(
                    f"{program_name(program)} is in evaluation mode, where its layer {name!r} ({type(part).__name__}) "
                    "does not do what it does in training: call .train() on it before fit. To freeze single layers, "
                    "call .eval() on those alone"
                )


def check_last_batch(rows: int, batch_size: int | None, drop_last: bool, *programs: Program) -> None:
    """A loader whose last batch has one row, against batch normalisation, which cannot train on one.

    Raises:
        DataError: they meet.
    """
    if not batch_size or drop_last or rows % batch_size != 1:
        return
    for home in map(owner, programs):
        for name, part in home.named_modules() if home is not None else ():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                raise DataError(
                    f"the DataLoader's last batch has 1 row ({rows} rows by {batch_size}), and the layer {name!r} "
                    f"({type(part).__name__}) cannot train on one: give drop_last=True, or another batch_size"
                )


__all__ = ["check_coverage", "check_last_batch", "check_modes", "check_plate_rows", "check_scales", "warn_of_draws"]
