"""A conditional density at given contexts, as members with their own parameters: where a free guide starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dgm.distributions import sample_and_log_prob
from dgm.noise import recording, replaying
from dgm.programs import preserved_rng

from .heads import Conditioner, Head

Members = tuple[nn.Module, dict[str, Tensor]]


def freed(family: nn.Module, context: Tensor) -> Members:
    """The densities F(u; c_n) of a family as a member without context and its parameters phi_n: F(u; phi_n).

    A head W c + b becomes the number that it gives, a conditioner's W c a part of its first bias; the rest is copied
    for each row. A family that reads its context in another way keeps it, as one more parameter of each row. Which of
    the two it is is not looked up: log densities of common draws are compared.

    Args:
        family: a conditional density. context: (N, c).

    Returns:
        the member, and its parameters by name, each (N, ...).

    >>> from .full_normal import FullNormal
    >>> member, values = freed(FullNormal(3, context=5), torch.randn(7, 5))
    >>> sorted(values), values["lower.bias"].shape
    (['loc.bias', 'log_scale.bias', 'lower.bias'], torch.Size([7, 3]))
    """
    context = context.detach()
    try:
        baked = _baked(family, context)
        if _same(family, context, *baked):
            return baked
    except Exception:  # a family of somebody's own may fail in any way without its context
        pass
    return _held(family, context)


def fresh(family: nn.Module, member: nn.Module, features: int) -> Callable[[], nn.Module] | None:
    """A maker of fresh members of a family's class, where it is built of the features alone; else None."""

    def make() -> nn.Module:
        return type(family)(features).to(next(member.parameters()))

    try:
        with preserved_rng(0):
            made = make()
    except Exception:  # a class of somebody's own may want anything
        return None
    return make if _shapes(made) == _shapes(member) else None


@torch.no_grad()
def _baked(family: nn.Module, context: Tensor) -> Members:
    member: Any = copy.deepcopy(family)
    told: dict[str, Tensor] = {}
    for name, part in member.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, Head) and part.weight is not None:
            told[f"{prefix}bias"] = part(context)
            part.register_parameter("weight", None)
        elif isinstance(part, Conditioner) and part.context is not None:
            told[f"{prefix}layers.0.bias"] = part.layers[0].bias + part.context(context)
            part.context = None
    if hasattr(member, "context"):
        member.context = 0
    return member, _stacked(member, told, len(context))


@torch.no_grad()
def _held(family: nn.Module, context: Tensor) -> Members:
    member = Held(copy.deepcopy(family), context.shape[-1]).to(context.dtype)
    return member, _stacked(member, {"held": context.clone()}, len(context))


class Held(nn.Module):
    """A family at a context of its own: q(u) = F(u; c), c a parameter."""

    def __init__(self, family: nn.Module, width: int) -> None:
        super().__init__()
        self.family = family
        self.held = nn.Parameter(torch.zeros(width))
        self.has_density = getattr(family, "has_density", True)

    def forward(self, context: Tensor | None = None) -> Any:
        return self.family(self.held)


def _stacked(member: nn.Module, told: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {n: told.get(n, p.detach().expand(rows, *p.shape)).clone() for n, p in member.named_parameters()}


@torch.no_grad()
def _same(family: nn.Module, context: Tensor, member: nn.Module, values: dict[str, Tensor]) -> bool:
    """Whether the members are the densities of the family at these contexts, for a few rows and common draws."""
    for row in range(min(len(context), 3)):
        own = {name: value[row] for name, value in values.items()}
        with preserved_rng(row):
            with recording() as draws:
                x, log_q = sample_and_log_prob(family(context[row]))
            with preserved_rng(row):
                noise = draws.sample()
            with replaying(noise):
                y, log_r = sample_and_log_prob(torch.func.functional_call(member, own, ()))
        if not (_close(x, y) and _close(log_q, log_r)):
            return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    rounding = 1e-8 if a.dtype == torch.float64 else 1e-3
    return a.shape == b.shape and torch.allclose(a, b, rtol=rounding, atol=rounding)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters()}
