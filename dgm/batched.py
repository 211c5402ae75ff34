"""The log joint density of many chains at once, and its gradient, as one function: a graph, or compiled code."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import REFUSALS, Untraceable, trace
from .hmc import Target
from .log_joint import LogJoint
from .whole import CompilerFailed, compile_step

log = logging.getLogger("dgm")

Function = Callable[..., Any]

COMPILE_FROM = 20_000
"""Gradients from which compiling is worth its 3 to 5 s: it saves 0.5 ms of each for 16 chains of a 6-50-1 network with
277 rows (0.85 ms by TorchScript's interpreter, 0.37 compiled), and 0.65 ms for 13-50-1 with 455 rows (1.34, 0.69)."""


def batched_target(joint: LogJoint, u: Tensor, batch: Sequence[Any], compiled: bool) -> Target:
    """`u (C, d) -> log p(x, u) (C,), gradient (C, d)`, for chains as many as there are in `u`.

    A model that can be neither mapped nor traced is run for one chain after another. Graph and compiled code are held
    against the program at another u.

    Args:
        joint: the density. u: (C, d), where the chains start. batch: all rows. compiled: whether to compile.
    """
    places = [i for i, item in enumerate(batch) if isinstance(item, Tensor)]
    given = [batch[i] for i in places]

    def density(v: Tensor, *tensors: Any) -> Tensor:
        whole = list(batch)
        for place, item in zip(places, tensors, strict=True):
            whole[place] = item
        return joint.whole(v, *whole)

    one: Any = torch.func.grad_and_value(density)
    program: Any = torch.func.vmap(one, in_dims=(0, *[None] * len(given)))
    with torch.no_grad():
        function = _fastest(program, u.detach(), given, compiled)
    if function is None:
        function = lambda v, *t: tuple(torch.stack(p) for p in zip(*(one(w, *t) for w in v), strict=True))  # noqa: E731

    def target(v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gradient, value = function(v, *given)
        return value.detach(), gradient.detach()

    return target


def _fastest(program: Function, u: Tensor, given: Sequence[Tensor], compiled: bool) -> Function | None:
    """The program without its Python, as far as that gives the same numbers; None where it cannot be mapped."""
    other = u + 0.01 * torch.cos(torch.arange(u.numel(), dtype=u.dtype, device=u.device)).reshape(u.shape)
    try:
        expected = program(other, *given)
    except REFUSALS:
        return None
    try:
        graph = trace(program, [u, *given])
        if not _same(graph(other, *given), expected):
            return program
    except Untraceable:
        return program
    if compiled:
        try:
            fast = compile_step(graph, [u, *given])
            if _same(fast(other, *given), expected):
                return fast
            log.warning("the compiled log density differs from the program's, so the graph is used")
        except (CompilerFailed, Untraceable) as error:
            log.info("not compiled: %s", error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it traces, which was done and held against the program
            script: Any = torch.jit.trace(graph, (u, *given), check_trace=False)
        return script if _same(script(other, *given), expected) else graph
    except (RuntimeError, AttributeError, TypeError):
        return graph


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal to what the order of a sum can change, in units of the largest number."""
    close = 1e-4 if expected[0].dtype == torch.float32 else 1e-8
    for a, b in zip(found, expected, strict=True):
        size = b.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0).max()
        if not torch.allclose(a, b, rtol=close, atol=float(close * size) + 1e-12, equal_nan=True):
            return False
    return True


__all__ = ["batched_target"]
