"""Where the free guide of a gap starts: at the encoder's own solution, and at its location and scale."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from .errors import GuideError
from .packing import Packing
from .pair import Pair
from .programs import Program, evaluating, preserved_rng, program_name
from .runs import Runs

MOMENT_DRAWS = 200

WAYS = ("encoder", "moments")
"""Where q* may start: at the parameters that the encoder gives, or at the location and scale that its draws have."""

Values = dict[str, Tensor]


@dataclass
class Starts:
    """A member of the family, and for each way to start the parameters of every row, `(B, ...)` by name.

    Attributes:
        unit: the latents' scale: median standard deviation of the guide's draws. networks: a member holds matrices.
    """

    member: nn.Module
    values: dict[str, Values]
    unit: float
    networks: bool = False

    @property
    def numbers(self) -> int:
        """Parameters of a row, over all starts."""
        return sum(v[0].numel() for values in self.values.values() for v in values.values())

    def rows(self, count: int) -> Starts:
        """Those of the first rows."""
        return replace(self, values={way: {n: v[:count] for n, v in own.items()} for way, own in self.values.items()})

    def without(self, way: str) -> Starts:
        """All ways to start but one."""
        return replace(self, values={name: own for name, own in self.values.items() if name != way})

    def maker(self) -> Callable[..., nn.Module]:
        """What `Free` takes as a family."""
        return lambda features, context=0: copy.deepcopy(self.member)


def local_part(guide: Any) -> Any:
    """The part of a guide that serves the rows: itself, or the one local part of a Joint.

    Raises:
        GuideError: parameters for each row instead of an encoder.
    """
    if hasattr(guide, "parts"):
        local = [getattr(guide, name) for name in guide.parts if name.startswith("local_")]
        guide = local[0] if len(local) == 1 else guide
    if hasattr(guide, "members"):
        raise GuideError(
            f"{program_name(guide)} has parameters of its own for each row, so nothing is amortized: its ELBO is that "
            "of the best q, and its only gap log p(x) - ELBO; give gaps an amortized guide"
        )
    return guide


@torch.no_grad()
def starts(
    model: Program,
    guide: Any,
    batch: Sequence[Any],
    packing: Packing,
    family: Any,
    seed: int,
    ways: Sequence[str] | None = None,
) -> Starts:
    """The starts of q* for these rows.

    Args:
        family: `family(features)` makes a member; None for the guide's own.

    Raises:
        GuideError: the guide's family cannot be found.
    """
    files = importlib.import_module("dgm.guides.freed")
    part = local_part(guide)
    own = _encoder_start(files, part, batch)
    if family is None and own is None:
        raise GuideError(
            f"{program_name(guide)} is not one family whose parameters an encoder gives: say of which family the best "
            "q of each datum is, gaps(..., family=DiagonalNormal)"
        )
    make: Callable[[], nn.Module] | None
    member: nn.Module
    if family is not None:
        heads = importlib.import_module("dgm.guides.family")
        make = lambda: heads.make_family(family, packing.size, dtype=packing.dtype)  # noqa: E731
        with preserved_rng(0):
            member = make()
        if own is not None and not _alike(own[0], member):
            own = None
        member = own[0] if own is not None else member
    else:
        member = own[0] if own is not None else part.family
        make = files.fresh(part.family, member, packing.size)
    loc, scale = _moments(model, guide, batch, packing, seed)
    values: dict[str, Values] = {}
    networks = any(p.dim() > 1 for p in member.parameters())
    told = ways if ways is not None else ("encoder",) if networks and own is not None else WAYS
    if own is not None and ("encoder" in told or make is None):
        values["encoder"] = own[1]
    if make is not None and ("moments" in told or not values):
        moments = _moment_start(make, loc, scale)
        if moments is None and not values:
            with preserved_rng(0):
                values["as made"] = _repeated(make(), len(loc))
        elif moments is not None and not ("encoder" in values and _equal(moments, values["encoder"])):
            values["moments"] = moments
    return Starts(member, values, float(scale.median()), networks)


def _encoder_start(files: Any, part: Any, batch: Sequence[Any]) -> tuple[nn.Module, Values] | None:
    """The densities that the encoder gives, as members."""
    if not all(isinstance(getattr(part, name, None), nn.Module) for name in ("encoder", "features", "family")):
        return None
    with evaluating(part):
        context = part.encoder(part.features(batch))
        if not isinstance(context, Tensor) or getattr(part.family, "context", context.shape[-1]) != context.shape[-1]:
            return None  # something stands between the encoder and the family
        member, values = files.freed(part.family, context)
    return member, values


def _moments(model: Program, guide: Any, batch: Sequence[Any], packing: Packing, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row's draws, unconstrained, `(B, d)`."""
    pair = Pair(model, guide)

    def run(data: Sequence[Any]) -> tuple[Tensor, ...]:
        trace = poutine.trace(pair.run_guide).get_trace(*data)
        values: dict[str, Any] = {b.site.name: trace.nodes[b.site.name]["value"] for b in packing.blocks}
        return (packing.pack(values),)

    with preserved_rng(seed):
        draws = torch.cat([u for (u,) in Runs(pair, run, batch).passes(MOMENT_DRAWS)])
    draws = draws.reshape(MOMENT_DRAWS, -1, packing.size)
    scale = draws.std(0)
    return draws.mean(0), torch.where(scale.isfinite() & (scale > 1e-8), scale, torch.full_like(scale, 1e-8))


def _moment_start(make: Callable[[], nn.Module], loc: Tensor, scale: Tensor) -> Values | None:
    """Members that are told where to start; None where the family cannot be told."""
    with preserved_rng(0):
        member: Any = make()
        if not hasattr(member, "initialise"):
            return None
        rows: list[Values] = []
        for m, s in zip(loc, scale, strict=True):
            member.initialise(m, s)
            rows.append(_repeated(member, 1))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _repeated(member: nn.Module, rows: int) -> Values:
    parameters: dict[str, Tensor] = dict(member.named_parameters())
    return {name: p.detach().expand(rows, *p.shape).clone() for name, p in parameters.items()}


def _alike(mine: nn.Module, theirs: nn.Module) -> bool:
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in (mine, theirs)]
    return type(mine) is type(theirs) and shapes[0] == shapes[1]


def _equal(a: Values, b: Values) -> bool:
    """Equal to what moments of a few draws can tell: a diagonal normal's moments are its parameters."""
    return all(torch.allclose(a[name], b[name], atol=0.3, rtol=0.1) for name in a)
