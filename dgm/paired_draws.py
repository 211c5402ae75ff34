"""Two sets of draws, checked and on one scale: what every distance between them starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import DataError

__all__ = ["checked_draws", "paired_draws", "subsample"]


def paired_draws(a: Any, reference: Any, standardise: bool = True, least: int = 4) -> tuple[Tensor, Tensor]:
    """Both sets of draws in float64, checked, and on the reference's scale if so asked.

    Raises:
        DataError: fewer than `least` draws, not (S, d), not finite, other widths, or a constant reference coordinate.
    """
    x, y = checked_draws("a", a, least), checked_draws("reference", reference, least)
    if x.shape[1] != y.shape[1]:
        raise DataError(
            f"a has {x.shape[1]} coordinates and reference {y.shape[1]}: give the same quantities in the same order"
        )
    x = x.to(y.device)
    if not standardise:
        return x, y
    mean, sd = y.mean(0), y.std(0)
    constant = (sd <= 1e-12 * y.abs().amax(0)).nonzero().flatten().tolist()
    if constant:
        raise DataError(
            f"reference: coordinate {constant[0]} is constant ({y[0, constant[0]].item():g})"
            + (f", as are {len(constant) - 1} others" if len(constant) > 1 else "")
            + ": nothing can be measured in its standard deviation; drop it"
        )
    return (x - mean) / sd, (y - mean) / sd


def checked_draws(name: str, draws: Any, least: int) -> Tensor:
    values = torch.as_tensor(draws).detach().double()
    if values.dim() != 2 or values.shape[1] == 0:
        raise DataError(
            f"{name}: expected draws of shape (S, d), got {tuple(values.shape)}"
            + (f": write {name}[:, None] for one coordinate" if values.dim() == 1 else "")
        )
    if len(values) < least:
        raise DataError(f"{name}: expected at least {least} draws, got {len(values)}")
    broken = ~values.isfinite()
    if broken.any():
        row, column = broken.nonzero()[0].tolist()
        raise DataError(
            f"{name}: {int(broken.any(1).sum())} of {len(values)} draws are not finite (the first: draw {row}, "
            f"coordinate {column}): the sampler failed there; a distance that leaves them out would hide it"
        )
    return values


def subsample(draws: Tensor, most: int) -> Tensor:
    return draws if len(draws) <= most else draws[torch.randperm(len(draws))[:most].to(draws.device)]
