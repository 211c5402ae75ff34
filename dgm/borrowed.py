"""Programs borrowed from a caller: copied, trained without a word, and given back as they were."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .pair import Pair
from .programs import Program, owner

__all__ = ["copied", "copied_programs", "quietly", "restored"]


def copied(pair: Pair, loss: Any = None) -> Pair:
    """The same pair anew, to be trained by itself."""
    return Pair(*copied_programs(pair.model, pair.guide), loss)


def copied_programs(model: Program, guide: Program) -> tuple[Program, Program]:
    """Modules copied together, so that what they share stays shared; functions as they are.

    A copy takes the model from Pyro's autoguides, the original ones among them: all are given theirs again.
    """
    home = owner(guide)
    parts = [part for part in (home.modules() if home is not None else ()) if isinstance(part, AutoGuide)]
    held = [(part, part._model, part.master) for part in parts]
    memo: dict[int, Any] = {}
    try:
        twins = copy.deepcopy((model, guide), memo)
    finally:
        for part, inner, master in held:
            part.__dict__.update(_model=inner, master=master)
    for part, inner, master in held:
        twin, leader = memo[id(part)], memo.get(id(master())) if master is not None else None
        twin.__dict__["_model"] = None if inner is None else (memo.get(id(inner[0]), inner[0]),)
        twin.__dict__["master"] = None if leader is None else weakref.ref(leader)
    for program in twins:
        copied_home = owner(program)
        if copied_home is not None:
            copied_home.__dict__.pop("pyro_modules", None)  # of what a function closes over, itself not copied
    return twins


@contextlib.contextmanager
def restored(*programs: Any) -> Iterator[None]:
    """Functions cannot be copied: modules that they close over are trained, and put back as they were."""
    modules = [m for program in programs for m in _closed_over(program)]
    before = [(t, t.detach().clone(), getattr(t, "grad", None)) for m in modules for t in _tensors(m)]
    modes = [(part, part.training) for m in modules for part in m.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value, grad in before:
                tensor.copy_(value)
                tensor.grad = grad
        for part, mode in modes:
            part.training = mode


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _closed_over(program: Any) -> list[nn.Module]:
    """Modules that a plain function reaches by its closure or by global names."""
    code = getattr(program, "__code__", None)
    if code is None:
        return []
    cells = [c.cell_contents for c in program.__closure__ or () if _filled(c)]
    names = [program.__globals__[n] for n in code.co_names if n in program.__globals__]
    return [value for value in (*cells, *names) if isinstance(value, nn.Module)]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the lines that a training logs: nobody asked for this one."""
    log = logging.getLogger("dgm")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before
