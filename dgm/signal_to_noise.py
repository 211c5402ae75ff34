"""How much of a gradient is signal: its mean over the draws of a step against their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .pair import NotReparameterised, Pair
from .programs import preserved_buffers, preserved_rng

__all__ = ["parts_of", "signal_to_noise"]

NOISE = 16
"""Draws of the gradient on one batch: the squared signal-to-noise ratio is then known to about 1/16."""


def parts_of(pair: Pair) -> list[str]:
    """For each parameter of a pair whether it is the "guide"'s alone, or the "model"'s."""
    homes = dict(pair.owners.named_children())
    held = {
        name: {id(p) for p in (*home.parameters(), *home.__dict__.get("pyro_modules", {}).values())}
        for name, home in homes.items()
    }
    alone = held.get("guide", set()) - held["model"]
    return ["guide" if id(p) in alone else "model" for p in pair.parameters().values()]


def signal_to_noise(
    pair: Pair,
    batch: Sequence[Any],
    rows: Tensor | None = None,
    sizes: Mapping[str, int] | None = None,
    *,
    draws: int = NOISE,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Signal-to-noise ratio of the gradient of one step by its draws, for the guide's and the model's parameters.

    .. math:: \mathrm{snr} = |E g| / \sqrt{\mathrm{tr\,Cov}\, g}

    the squared mean without the share that so few draws lend to it (Rainforth et al., "Tighter variational bounds are
    not necessarily better", 2018, where it is that of single parameters).

    Returns:
        one row for each part: part, snr, norm (of the mean).
    """
    tensors, parts = list(pair.parameters().values()), parts_of(pair)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in tensors]
    squares = np.zeros(len(tensors))
    with preserved_rng(seed), preserved_buffers(pair.model, pair.guide):
        for _ in range(draws):
            for i, g in enumerate(_gradient(pair, tensors, batch, rows, dict(sizes or {}))):
                if g is not None:
                    sums[i] += g.double()
                    squares[i] += float(g.double().square().sum())
    found = []
    for part in ("guide", "model"):
        mine = [i for i, p in enumerate(parts) if p == part]
        if not mine:
            continue
        mean = sum(float((sums[i] / draws).square().sum()) for i in mine)
        variance = max(sum(squares[i] for i in mine) / draws - mean, 0.0) * draws / (draws - 1)
        signal = max(mean - variance / draws, 0.0)
        snr = math.sqrt(signal / variance) if variance > 0 else (math.inf if signal > 0 else math.nan)
        found.append({"part": part, "snr": snr, "norm": math.sqrt(mean)})
    return pd.DataFrame(found, columns=["part", "snr", "norm"])


def _gradient(
    pair: Pair, tensors: Sequence[Tensor], batch: Sequence[Any], rows: Tensor | None, sizes: Mapping[str, int]
) -> Sequence[Tensor | None]:
    try:
        loss = pair.loss(None, batch, sizes=sizes, rows=rows)
    except NotReparameterised:
        pair.loss_and_grads(batch, sizes, 1.0, rows)
        found = [None if p.grad is None else p.grad.detach().clone() for p in tensors]
        for p in tensors:
            p.grad = None
        return found
    return torch.autograd.grad(loss, list(tensors), allow_unused=True)
