"""Columns of the data in units far from 1, which a network has to unlearn before it can learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Laplace, Normal, StudentT

from ..data import array_names
from ..dataflow import Reading
from ..findings import Finding

LARGE = 100.0
"""Root mean square of a column from which a network's start, which expects 1, is lost: a unit's output is then that of
this column alone. Grey levels of 0 to 255 reach it."""
WIDTHS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
LISTED = 5
"""Columns named in one message."""


def look(case: Any) -> Iterator[Finding]:
    yield from unscaled_columns(
        dict(zip(array_names(len(case.rows)), case.rows, strict=True)), case.pair.owners, case.after
    )


def unscaled_columns(arrays: Mapping[str, Tensor], home: nn.Module, reading: Reading) -> Iterator[Finding]:
    """Columns of floating arrays with a root mean square above LARGE, where the pair has a network.

    Args:
        arrays: by the name that messages call them: `(N,)` or `(N, ...)`.
        home: holds the modules of the pair.
        reading: says which of the arrays are observed under a normal density.
    """
    if not any(isinstance(module, WIDTHS) for module in home.modules()):
        return
    normal = [value for _, _, base, value in reading.observed() if isinstance(base, Normal | Laplace | StudentT)]
    other = [value for _, _, base, value in reading.observed() if not isinstance(base, Normal | Laplace | StudentT)]
    for name, array in arrays.items():
        if not isinstance(array, Tensor) or not array.is_floating_point():
            continue
        if any(value.shape == array.shape and torch.equal(value, array) for value in other):
            continue  # counts and labels have their own units
        columns = array.detach().reshape(len(array), -1)
        size = columns.double().square().mean(0).sqrt()
        large = (size > LARGE).nonzero().flatten().tolist()
        if not large:
            continue
        shown = ", ".join(
            f"column {c} (mean {float(columns[:, c].mean()):.3g}, sd {float(columns[:, c].std()):.3g})"
            for c in large[:LISTED]
        )
        if array.dim() == 1:
            shown = f"mean {float(columns.mean()):.3g}, sd {float(columns.std()):.3g}"
        more = f" and {len(large) - LISTED} more" if len(large) > LISTED else ""
        rest = size[size <= LARGE]
        beside = f"; the other columns have a size of {float(rest.median()):.3g}" if len(rest) else ""
        target = any(value.shape == array.shape and torch.equal(value, array) for value in normal)
        yield Finding(
            name="columns not standardised",
            part="data",
            harm=2,
            evidence=f"{name}: {shown}{more}{beside}",
            consequence=(
                "a network starts at outputs of size 1 and has to travel there by steps of the learning rate; scales "
                "and priors stand in the wrong units"
                if target
                else "the first layer sees these columns alone: units saturate or die, and the step size fits no other"
            ),
            cure=f"standardise {name} by the training rows, (x - mean) / sd"
            + (", and scale predictions back (y_std=...)" if target else ""),
        )
