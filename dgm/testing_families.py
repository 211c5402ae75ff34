"""The laws of a density, for any family: part of the contracts in `dgm.testing`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distributions import sample_and_log_prob
from .programs import preserved_rng

__all__ = ["SIGMAS", "ContractError", "check_family", "require"]

SIGMAS = 4.5
"""Standard errors that a statistic may be off: once in 150 000 for each comparison."""


class ContractError(AssertionError):
    """A law that every model, guide or family must obey is broken."""


def require(holds: Any, message: str) -> None:
    if not bool(holds):
        raise ContractError(message)


def check_family(family: Callable[..., nn.Module], *, features: Sequence[int] = (1, 2, 5), context: int = 3) -> None:
    r"""The laws of a conditional density on R^d.

    Shapes with and without a context; the density that comes with a draw is that of an equal value; it integrates to
    one and the draws follow it, \int q = E_q[r / q] = 1 for any density r, in one and two dimensions within 4.5
    standard errors; every parameter receives a gradient; the state dict makes another object the same density, and a
    deep copy shares nothing with its original.

    Args:
        family: `family(features, context=c)` makes the module.
        features: dimensions to try.
        context: width of the context to try, beside none.

    Raises:
        ContractError: a law is broken; the message names the family, the case and the parameter.

    >>> from dgm.guides.diagonal_normal import DiagonalNormal
    >>> check_family(DiagonalNormal)
    """
    name = getattr(getattr(family, "func", family), "__name__", type(family).__name__)
    for size in features:
        for width in (0, context):
            with preserved_rng(0):
                module = _stirred(family(size, context=width).double())
                where = f"{name}(features={size}, context={width})"
                _family_shapes(module, size, width, where)
                _family_copies(module, family(size, context=width).double(), size, width, where)
                _family_gradients(module, width, where)
                if getattr(module, "has_density", True):
                    _family_density(module, size, width, where)


def _stirred(module: nn.Module) -> nn.Module:
    """Away from the start, where much is zero by construction."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def _family_shapes(module: nn.Module, size: int, width: int, where: str) -> None:
    for batch in [(4,), (3, 4)] if width else [()]:
        q = module(torch.randn(*batch, width).double() if width else None)
        require(q.has_rsample, f"{where} gives a {type(q).__name__} that has no rsample: no pathwise gradient")
        for what, got, expected in (("batch", q.batch_shape, batch), ("event", q.event_shape, (size,))):
            require(tuple(got) == expected, f"{where} has {what} shape {tuple(got)}, expected {expected}")
        for draws in ((), (2, 5)):
            x, log_q = sample_and_log_prob(q, torch.Size(draws))
            for label, tensor, shape in (("rsample", x, (*draws, *batch, size)), ("log_prob", log_q, (*draws, *batch))):
                require(tensor.shape == shape, f"{where}: {label} has shape {tuple(tensor.shape)}, expected {shape}")
            if getattr(module, "has_density", True):
                again = q.log_prob(x.detach().clone())
                off = float((again - log_q).detach().abs().max())
                require(off < 1e-6, f"{where}: log_prob of an equal value is {off:.2g} off from that of the draw")


@torch.no_grad()
def _family_copies(module: nn.Module, other: nn.Module, size: int, width: int, where: str) -> None:
    context = torch.randn(3, width).double() if width else None
    x = torch.randn(3, size).double() if width else torch.randn(size).double()
    twin = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    dense = getattr(module, "has_density", True)
    for what, same in (("a deep copy", twin), ("an object with the same state dict", other)):
        for seed in (0, 1):
            with preserved_rng(seed):
                mine = module(context).log_prob(x) if dense else module(context).rsample()
            with preserved_rng(seed):
                theirs = same(context).log_prob(x) if dense else same(context).rsample()
            require(torch.equal(mine, theirs), f"{where}: {what} is another density")
    before = [p.clone() for p in module.parameters()]
    for parameter in twin.parameters():
        parameter.add_(1.0)
    kept = all(torch.equal(p, was) for p, was in zip(module.parameters(), before, strict=True))
    require(kept, f"{where}: a deep copy shares a parameter with its original")


def _family_gradients(module: nn.Module, width: int, where: str) -> None:
    q = module(torch.randn(7, width).double() if width else None)
    x, log_q = sample_and_log_prob(q, torch.Size((32,)))
    (x.square().sum(-1) + x.sum(-1).cos() + log_q).mean().backward()
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        require(gradient is not None, f"{where}: parameter {name!r} receives no gradient")
        require(gradient is not None and gradient.isfinite().all(), f"{where}: the gradient of {name!r} is not finite")
        # flows of one feature have networks that look at nothing
        moved = gradient is not None and gradient.abs().sum() > 0
        require(moved or q.event_shape[0] == 1, f"{where}: the gradient of {name!r} is zero")


@torch.no_grad()
def _family_density(module: nn.Module, size: int, width: int, where: str, draws: int = 20_000) -> None:
    if size > 2:
        return
    q = module(torch.randn(1, width).double() if width else None)
    x, log_q = sample_and_log_prob(q, torch.Size((draws,)))
    loc, scale = x.mean(0), x.std(0)
    wide = torch.distributions.StudentT(3.0, loc, 1.5 * scale)
    y = wide.sample((draws,))
    total = (q.log_prob(y) - wide.log_prob(y).sum(-1)).exp()
    _require_mean(total, 1.0, f"{where}: the density integrates to")
    near = torch.distributions.Normal(loc, 0.5 * scale)
    _require_mean(
        (near.log_prob(x).sum(-1) - log_q).exp(), 1.0, f"{where}: draws do not follow log_prob, E_q[r / q] is"
    )


def _require_mean(values: Tensor, expected: float, message: str) -> None:
    mean, error = float(values.mean()), float(values.std() / math.sqrt(values.numel()))
    told = f"{message} {mean:.5g} ± {error:.2g}, expected {expected:g}"
    require(abs(mean - expected) <= SIGMAS * error + 1e-6, told)
