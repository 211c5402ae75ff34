"""The ladder of guides: start a richer one from a trained simpler one, exactly where it contains it.

Point, diagonal, low rank, full or flow: each rung starts where the last one ended, instead of at a fresh start.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoNormal
from torch import Tensor, nn

from .errors import GuideError
from .ladder_families import Start, shapes, start_family
from .packing import Packing, gather
from .programs import preserved_rng, program_name


def start_from(guide: nn.Module, trained: nn.Module) -> Start:
    """Give a guide the density of a trained one, or the nearest start that it has.

    Where the guide's family contains the trained one (`FullNormal` or a flow a `DiagonalNormal`; without a context
    `FullNormal` any normal, by its Cholesky factor) the start is the same density. Otherwise it takes over the marginal
    location and scale. Which of the two it is is not looked up: both log densities are compared at common draws, and so
    families of one's own count as well. `LowRankNormal` starts its factor at small random entries, and so is only near.

    Guides of one kind are meant, both Global, Amortized (the encoder is copied too), Free, or Joint of such parts; to a
    Global guide also Pyro's AutoNormal, AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal and
    AutoMultivariateNormal. (Asked for in Pyro's pull request 2113.)

    Args:
        guide: fresh; its parameters are written to.
        trained: of the same model; it is left as it is.

    Raises:
        GuideError: other latents or dimensions, another encoder, another kind of guide, or a family with a context
            that no start is known for; nothing is written then.

    >>> from functools import partial
    >>> from dgm.guides.full_normal import FullNormal
    >>> from dgm.guides.global_ import Global
    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> start_from(Global(model, *batch, family=FullNormal), Global(model, *batch)).exact
    True
    """
    backup = copy.deepcopy(guide.state_dict())
    try:
        with preserved_rng(0):
            return _start(guide, trained)
    except GuideError:
        guide.load_state_dict(backup)
        raise


def _start(guide: Any, trained: Any) -> Start:
    parts: Any = getattr(guide, "parts", None)
    if parts is not None:
        return _joint(guide, trained)
    if isinstance(trained, AutoNormal | AutoDelta | AutoContinuous):
        return _from_pyro(guide, trained)
    _same_latents(guide, trained)
    if hasattr(guide, "tables") and hasattr(trained, "tables"):  # discrete: logits are all there is
        _copy(guide, trained, "logits")
        return Start(True, f"exact: {program_name(guide)} copied", 0.0)
    if hasattr(guide, "members") or hasattr(trained, "members"):
        return _free(guide, trained)
    for name in ("encoder", "features"):
        if hasattr(guide, name) or hasattr(trained, name):
            _copy(guide, trained, name)
    if hasattr(trained, "features"):
        guide.features.plain = trained.features.plain
    for which in (guide, trained):
        if not isinstance(getattr(which, "family", None), nn.Module):
            raise GuideError(
                f"{program_name(which)} is not one density of a family: start_from serves Global, Amortized, Free and "
                "Joint"
            )
    return start_family(guide.family, trained.family)


# ------------------------------------------------------------------------------------------- kinds of guides


def _joint(guide: Any, trained: Any) -> Start:
    theirs = getattr(trained, "parts", None)
    if theirs != guide.parts:
        raise GuideError(
            f"the guide has the parts {guide.parts} and the trained one {theirs}: they serve other latents"
        )
    starts = {name: _start(getattr(guide, name), getattr(trained, name)) for name in guide.parts}
    kls = [start.kl for start in starts.values()]
    known = [kl for kl in kls if kl is not None]
    return Start(
        all(start.exact for start in starts.values()),
        "; ".join(f"{name}: {start.told}" for name, start in starts.items()),
        math.fsum(known) if len(known) == len(kls) else None,
    )


def _free(guide: Any, trained: Any) -> Start:
    """Row by row; both hold one family's parameters, stacked."""
    if not (hasattr(guide, "members") and hasattr(trained, "members")):
        raise GuideError(f"{program_name(guide)} cannot start from {program_name(trained)}: both must be Free")
    rows, theirs = (g.plate.rows for g in (guide, trained))
    if rows != theirs:
        raise GuideError(f"the guide has parameters for {rows} rows and the trained one for {theirs}")
    new, old = copy.deepcopy(guide.member), copy.deepcopy(trained.member)
    starts = []
    with torch.no_grad():
        for row in range(rows):
            for module, held in ((new, guide.members), (old, trained.members)):
                for name, p in module.named_parameters():
                    p.copy_(held[name.replace(".", "|")][row])
            starts.append(start_family(new, old))
            for name, p in new.named_parameters():
                guide.members[name.replace(".", "|")][row].copy_(p)
    kls = [start.kl for start in starts if start.kl is not None]
    kl = math.fsum(kls) if len(kls) == rows else None
    worst = next((start for start in starts if not start.exact), starts[0])
    return Start(all(start.exact for start in starts), worst.told, kl)


def _from_pyro(guide: Any, trained: Any) -> Start:
    """Pyro's own guides keep all global latents in unconstrained coordinates, as `Packing` does."""
    packing = getattr(guide, "packing", None)
    if not isinstance(packing, Packing) or packing.plate is not None or not hasattr(guide, "family"):
        raise GuideError(f"{program_name(guide)} cannot start from {program_name(trained)}: it must be a Global guide")
    if trained.prototype_trace is None:
        raise GuideError(f"{program_name(trained)} was never called: train it first")
    names = [name for name, _ in trained.prototype_trace.iter_stochastic_nodes()]
    if sorted(names) != sorted(block.site.name for block in packing.blocks):
        raise GuideError(f"the trained guide serves {names}, the guide {[b.site.name for b in packing.blocks]}")
    density = _pyro_density(packing, trained)
    if density.event_shape[0] != packing.size:
        raise GuideError(f"the trained guide has {density.event_shape[0]} dimensions, the guide {packing.size}")
    return start_family(guide.family, _Fixed(density, program_name(trained)))


@torch.no_grad()
def _pyro_density(packing: Packing, trained: Any) -> Any:
    if isinstance(trained, AutoDelta):
        return torch.distributions.Independent(_Delta(packing.pack(trained.median()).reshape(-1)), 1)
    if isinstance(trained, AutoNormal):
        loc, scale = (_packed(packing, _tree(held)) for held in (trained.locs, trained.scales))
        return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
    shapes: OrderedDict[str, Any] = trained._unconstrained_shapes
    place = torch.arange(trained.latent_dim)
    where: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        where[name], place = place[:size].reshape(shape), place[size:]
    order = _packed(packing, where).long()
    posterior = trained.get_posterior()
    mean, covariance = posterior.mean[order], getattr(posterior, "covariance_matrix", None)
    if covariance is None:
        return torch.distributions.Independent(torch.distributions.Normal(mean, posterior.stddev[order]), 1)
    return torch.distributions.MultivariateNormal(mean, covariance[order][:, order])


def _tree(held: Any) -> dict[str, Tensor]:
    """AutoNormal's values by site name; a dot in a name becomes a child module."""
    found: dict[str, Tensor] = {}
    for path, _ in held.named_parameters():
        name = path.removesuffix("_unconstrained")
        value: Any = held
        for step in name.split("."):
            value = getattr(value, step)
        found[name] = value.detach()
    return found


def _packed(packing: Packing, values: Mapping[str, Tensor]) -> Tensor:
    parts = [gather(values[b.site.name], b.rest, b.unconstrained_event).reshape(-1) for b in packing.blocks]
    return torch.cat(parts)


class _Delta(torch.distributions.Normal):
    """A value that has a mean and no scale."""

    def __init__(self, value: Tensor):
        super().__init__(value, torch.ones_like(value), validate_args=False)


class _Fixed(nn.Module):
    """A density as a family without parameters."""

    def __init__(self, density: Any, name: str):
        super().__init__()
        self.density = density
        self.has_density = not isinstance(getattr(density, "base_dist", None), _Delta)
        self.__class__ = type(name, (_Fixed,), {})

    def forward(self) -> Any:
        return self.density

    def double(self) -> _Fixed:
        return self


# ------------------------------------------------------------------------------------------------- checks


def _same_latents(guide: Any, trained: Any) -> None:
    mine, theirs = (_layout(which) for which in (guide, trained))
    if type(guide) is not type(trained):
        raise GuideError(
            f"{program_name(guide)} cannot start from {program_name(trained)}: attach both in the same way"
        )
    for name in [*theirs, *mine]:
        if mine.get(name) != theirs.get(name):
            raise GuideError(
                f"latent {name!r} has {mine.get(name, 'no')} dimensions in the guide and {theirs.get(name, 'no')} in "
                "the trained one: both must serve the same latents of the same model"
            )


def _layout(guide: Any) -> dict[str, int]:
    if hasattr(guide, "tables"):
        return {table.site.name: table.size for table in guide.tables}
    if not hasattr(guide, "packing"):
        raise GuideError(
            f"{program_name(guide)} is not one density of a family: start_from serves Global, Amortized, Free and Joint"
        )
    return {block.site.name: block.stop - block.start for block in guide.packing.blocks}


def _copy(guide: nn.Module, trained: nn.Module, name: str) -> None:
    mine, theirs = (getattr(which, name, None) for which in (guide, trained))
    if not isinstance(mine, nn.Module) or not isinstance(theirs, nn.Module) or shapes(mine) != shapes(theirs):
        raise GuideError(
            f"the guide's {name} {_described(mine)} is not that of the trained guide, {_described(theirs)}: give both "
            "the same"
        )
    mine.load_state_dict(theirs.state_dict())


def _described(module: Any) -> str:
    if not isinstance(module, nn.Module):
        return "(none)"
    return f"{type(module).__name__}({', '.join(f'{n} {s}' for n, s in shapes(module).items())})"


__all__ = ["Start", "start_family", "start_from"]
