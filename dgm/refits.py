"""One fit for each simulated data set, all in one computation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GuideError, ModelError, OptionError
from .pair import Pair
from .posterior_ranks import PosteriorRanks
from .posthoc import finishers
from .programs import Program, owner, preserved_rng, program_name, with_home
from .simulate import Simulation
from .weights import refuse_untrained

__all__ = ["fitted"]


def fitted(
    model: Program, guide: Any, data: Simulation, plates: set[str], seed: int, options: dict[str, Any]
) -> tuple[list[Pair], dict[int, str]]:
    """One fitted pair for each data set whose fit came to an end, and the errors of the others, by number.

    The model's parameters are held: the data came from it as it is.

    Args:
        model: what the data came from. guide: its maker, `(model, *batch) -> guide`. data: the sets.
        plates: names of the data plates. seed: of the first fit; the next ones count up. options: for `dgm.fit`.

    Raises:
        GuideError: an object in place of a maker, a point, or a guide that does not fit the model.
        OptionError: an option that is set here. ModelError: a method in place of a module.
    """
    from .fit import fit

    if isinstance(guide, nn.Module) or not callable(guide):
        raise GuideError(
            f"trained=False and the guide is a {type(guide).__name__}: give what makes it, `(model, *batch) -> guide`, "
            "e.g. partial(Global, family=DiagonalNormal), or trained=True to use it as it is"
        )
    own = sorted({"replicas", "seed", "model", "guide"} & set(options))
    if own:
        raise OptionError(f"fit option {own[0]!r} is set by the calibration itself: leave it out")
    frozen = _frozen(model)
    with preserved_rng(seed):
        trial = Pair(frozen(), guide(frozen(), *data.batch(0)))
    sites = list(trial.check(data.batch(0), plates).values())
    refuse_untrained(trial, model, trial.guide)  # of a function model: its parameters would move with each fit
    if not finishers(trial.guide):  # one that is finished after training may be a point until then
        PosteriorRanks([trial], data, [0], sites, plates, False).refuse_point()
    seeds = [seed + r for r in range(len(data))]
    together = _together(data)
    if together is not None:
        columns, rows = together
        fits = fit(frozen, guide, *columns, replicas={"rows": rows, "seed": seeds}, **options)
    else:
        fits = [
            fit(frozen, guide, *data.batch(r), replicas={"seed": seeds[r : r + 1]}, **options)[0]
            for r in range(len(data))
        ]
    failed = {r: one.error for r, one in enumerate(fits) if one.error is not None}
    return [Pair(one.model, one.guide) for one in fits if one.error is None], failed


def _frozen(model: Program) -> Callable[[], Program]:
    """Makes the model with its parameters held: the data came from it as it is."""
    if with_home(model)[1] is not owner(model):
        return lambda: model
    if not isinstance(model, nn.Module):
        raise ModelError(f"{program_name(model)} is a method of a module: give the module, or a function")
    held = copy.deepcopy(model).requires_grad_(False)
    return lambda: copy.deepcopy(held)


def _together(data: Simulation) -> tuple[list[Tensor], list[Tensor]] | None:
    """All sets as rows of one data set, and the row numbers of each; None where arguments have other lengths."""
    parts = [data.data.get(i, item) for i, item in enumerate(data.template)]
    lengths = {len(item) if isinstance(item, Tensor) and item.dim() else None for item in data.template}
    if None in lengths or len(lengths) != 1:
        return None
    count, sets = lengths.pop(), len(data)
    if count is None:
        return None
    columns = []
    for i, part in enumerate(parts):
        wide = part if i in data.data else part.expand(sets, *part.shape)
        columns.append(wide.reshape(sets * count, *wide.shape[2:]))
    return columns, [torch.arange(r * count, (r + 1) * count) for r in range(sets)]
