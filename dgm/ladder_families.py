"""A family that starts from a trained one: as the same density where it contains it, else near it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .distributions import sample_and_log_prob
from .errors import GuideError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}
"""Largest difference of log densities, relative to 1 + |log q|, at which two densities with such parameters count as
equal; both are computed in float64."""

DRAWS = 256


@dataclass(frozen=True)
class Start:
    """What a guide starts from.

    Attributes:
        exact: the guide now is the same density as the trained one.
        told: what was done, in one sentence.
        kl: KL(start || trained) in nats where both have a density, by 256 draws; for amortized guides at standard
            normal contexts.
    """

    exact: bool
    told: str
    kl: float | None = None

    def __str__(self) -> str:
        return self.told


def start_family(family: nn.Module, trained: nn.Module) -> Start:
    """Give a family the density of a trained one; see `start_from`.

    >>> from dgm.guides.diagonal_normal import DiagonalNormal
    >>> from dgm.guides.low_rank_normal import LowRankNormal
    >>> start_family(LowRankNormal(5), DiagonalNormal(5)).exact
    False
    """
    new, old = type(family).__name__, type(trained).__name__
    width, trained_width = (int(getattr(f, "context", 0) or 0) for f in (family, trained))
    if width != trained_width:
        raise GuideError(f"{new} has a context of {width} features and the trained {old} one of {trained_width}")
    if shapes(family) == shapes(trained) and type(family) is type(trained):
        family.load_state_dict(trained.state_dict())
        return Start(True, f"exact: {new} copied", 0.0)
    if not getattr(trained, "has_density", True):
        return _from_point(family, trained, new, old)
    shared = _copy_heads(family, trained)
    if shared and (found := _compared(family, trained, width)) is not None and found[0]:
        return Start(True, f"exact: {new} contains {old}", found[1])
    if width and not shared:
        raise GuideError(
            f"no start of {new} from {old} with a context is known: they share no heads `loc` and `log_scale`"
        )
    module = _detached(trained)
    density = module(next(module.parameters()).new_zeros(1, width)) if width else module()
    if not width and hasattr(family, "initialise_covariance") and hasattr(density, "covariance_matrix"):
        family.initialise_covariance(density.mean, density.covariance_matrix)  # type: ignore[operator]
        how = "the Cholesky factor of its covariance"
    else:  # with a context these are biases: the weights of both heads are there already
        mean, scale = _moments(density)
        _initialise(family, mean.reshape(-1), scale.reshape(-1), new)
        how = "its marginal location and scale" + (", right at the zero context" if width else "")
    exact, kl = _compared(family, trained, width) or (False, None)
    if exact:
        return Start(True, f"exact: {new} contains {old}, by {how}", kl)
    said = "" if kl is None else f"; KL from it is {kl:.2g} nats"
    return Start(False, f"nearest: {new} does not start as {old}; it takes {how}{said}", kl)


def _from_point(family: nn.Module, trained: nn.Module, new: str, old: str) -> Start:
    heads = {name: p for name, p in trained.state_dict().items() if name in family.state_dict()}
    if all(family.state_dict()[name].shape == p.shape for name, p in heads.items()) and heads:
        family.load_state_dict({**family.state_dict(), **heads})
    else:
        _initialise(family, trained.forward().mean.detach(), None, new)
    return Start(False, f"nearest: {old} has no scale; {new} takes its location and starts at its own scale")


def _initialise(family: Any, loc: Tensor, scale: Tensor | None, name: str) -> None:
    if hasattr(family, "initialise"):
        family.initialise(loc, scale)
    elif isinstance(getattr(family, "log_scale", None), nn.Parameter) and isinstance(family.loc, nn.Parameter):
        with torch.no_grad():  # a flow that Global placed behind a location and a scale
            family.loc.copy_(loc)
            if scale is not None:
                family.log_scale.copy_(scale.log())
    else:
        raise GuideError(f"{name} cannot be told where to start: give it a method initialise(loc, scale)")


def _copy_heads(family: nn.Module, trained: nn.Module) -> bool:
    """Take over location and log scale as they stand, where both have them alike."""
    mine, theirs = shapes(family), shapes(trained)
    names = [name for name in theirs if name.split(".")[0] in ("loc", "log_scale")]
    if len({name.split(".")[0] for name in names}) < 2 or any(mine.get(name) != theirs[name] for name in names):
        return False
    state = trained.state_dict()
    family.load_state_dict({**family.state_dict(), **{name: state[name] for name in names}})
    return True


@torch.no_grad()
def _compared(family: nn.Module, trained: nn.Module, width: int) -> tuple[bool, float] | None:
    """Whether both are one density, and KL(family || trained), in float64; None where the start has no density."""
    if not getattr(family, "has_density", True):
        return None
    tolerance = TOLERANCE.get(next((p.dtype for p in family.parameters()), torch.float32), 1e-5)
    mine, theirs = (_detached(module).double() for module in (family, trained))
    context = torch.randn(DRAWS, width, dtype=torch.float64) if width else None
    args = () if context is None else (context,)
    x, log_q = sample_and_log_prob(mine(*args), torch.Size(() if width else (DRAWS,)))
    difference = log_q - theirs(*args).log_prob(x)
    exact = bool((difference.abs() <= tolerance * (1 + log_q.abs())).all())
    # E_q[p / q] = 1 added to each draw of log q / p: the same mean, less noise, and no draw below zero
    return exact, float((difference + torch.expm1(-difference)).mean())


def _detached(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def _moments(density: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in closed form or by 4096 draws."""
    try:
        mean, scale = density.mean, density.variance.sqrt()
        if bool((mean.isfinite() & scale.isfinite()).all()):
            return mean, scale
    except (NotImplementedError, AttributeError):
        pass
    draws = density.rsample(torch.Size((4096,)))
    low, high = (draws.quantile(q, 0) for q in (0.158655, 0.841345))  # heavy tails may have no deviation
    return draws.median(0).values, (high - low) / 2


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of everything that a module keeps, by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


__all__ = ["Start", "shapes", "start_family"]
