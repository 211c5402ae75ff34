"""A column of the observed data that never varies, under a normal scale that is learnt: the density has no bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, StudentT

from ..dataflow import Reading, by_row, chain_of, leaves_of
from ..feeding import Mapped, Memory
from ..findings import Finding

SHARED = 0.2
"""Share of constant columns from which a scale that all columns share counts as pulled down: it then stands for the
others' noise times sqrt(1 - 0.2) = 0.9 or less."""
LEAST = 10
"""Rows below which a column may be constant by chance."""


def look(case: Any) -> Iterator[Finding]:
    source = case.source
    stored = isinstance(source, Memory) and not isinstance(source, Mapped)
    yield from constant_columns(case.before, case.after, source.all_rows() if stored else ())


def constant_columns(before: Reading, after: Reading, whole: Sequence[Any] = ()) -> Iterator[Finding]:
    """Columns without variance under a learnt scale, with the scale before and after the short training.

    Args:
        before, after: the pair before and after it, on some rows.
        whole: arrays of all rows: a column that is constant in some of them may vary in others.
    """
    earlier = {name: (node, base) for name, node, base, _ in before.observed()}
    for name, node, base, value in after.observed():
        if not isinstance(base, Normal | Laplace | StudentT) or not after.depends_on(base.scale):
            continue
        columns = by_row(node, value)
        if len(columns) < LEAST:
            continue
        constant = (columns == columns[0]).all(0)
        for array in whole:
            if isinstance(array, Tensor) and array.dim() and array[0].numel() == len(constant):
                flat = array.reshape(len(array), -1)
                constant = constant & (flat == flat[0]).all(0)
        held = constant.nonzero().flatten().tolist()
        if not held or name not in earlier:
            continue
        scale = by_row(node, base.scale)
        own = len(held) == len(constant) or _own_scale(scale, held[0], int((~constant).nonzero()[0]))
        if not own and len(held) < SHARED * len(constant):
            continue
        start = float(by_row(earlier[name][0], earlier[name][1].scale)[:, held].detach().mean())
        now = float(scale[:, held].detach().mean())
        listed = ", ".join(map(str, held[:5])) + (", ..." if len(held) > 5 else "")
        which = f"column{'s' * (len(held) > 1)} {listed}"
        moving = " and falling" if now < start else ""
        floored = chain_of(base.scale).names[:1] in (("Add",), ("Clamp",), ("ClampMin",))
        cure = f"drop {which}" + ("" if floored else ", or bound the scale from below (floor + exp(log_scale))")
        if own and floored:
            consequence = (
                "the scale goes to its floor and stays there: the bound gains log(1 / floor) nats a datum for each of "
                "these columns, which says nothing of the model and drowns what does"
            )
        elif own:
            consequence = (
                "the density there has no bound: the scale goes to 0, the bound to infinity, and the gradients of all "
                "else are drowned"
            )
        else:
            pulls = "pull" if len(held) > 1 else "pulls"
            consequence = (
                f"{len(held)} of {len(constant)} columns {pulls} the scale that all share below the noise of the others"
            )
        verb = "are" if len(held) > 1 else "is"
        yield Finding(
            name="constant column",
            part="data",
            harm=3 if own and not floored else 2,
            evidence=(
                f"site {name!r}: {which} {verb} constant ({float(columns[0, held[0]]):.3g}), the scale went from "
                f"{start:.3g} to {now:.3g} in the short training{moving}"
            ),
            consequence=consequence,
            cure=cure,
        )


def _own_scale(scale: Tensor, constant: int, other: int) -> bool:
    """Whether the scale of one column can move without that of another: their gradients differ."""
    leaves = _leaves(scale)
    first, second = (
        torch.autograd.grad(scale[:, column].sum(), leaves, retain_graph=True, allow_unused=True)
        for column in (constant, other)
    )
    same = (
        a is b if a is None or b is None else bool(torch.allclose(a, b)) for a, b in zip(first, second, strict=True)
    )
    return not all(same)


def _leaves(tensor: Tensor) -> list[Tensor]:
    return list({id(leaf): leaf for leaf in leaves_of(tensor.grad_fn)}.values())
