"""Data of the density suite: training, validation and test rows of a task, and how pixels become zeros and ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dgm
from dgm.feeding import Transform
from dgm.files import Dataset
from dgm.heldout import spaced

BINARIZE = {
    "binarized-mnist": "none", "mnist": "batch", "omniglot": "batch", "fashion-mnist": "threshold",
}  # fmt: skip
"""How `dgm.load` is asked for pixels: "batch" draws training pixels anew for each batch, and the others once."""
HELD_OUT = 24
"""Where a data set has no validation part, every 24th training row is one."""


@dataclass(frozen=True)
class Parts:
    """Rows `(N, pixels)` of each part, and what makes a training batch of its rows."""

    train: Tensor
    valid: Tensor
    test: Tensor
    transform: Transform | None = None


def name_of(task: str) -> str:
    """The data set of a task.

    >>> name_of("mnist, short protocol")
    'mnist'
    """
    return task.partition(",")[0]


def load_task(task: str, seed: int) -> Dataset:
    """The data set of a task, pixels as its protocol has them.

    Held-out pixels are binarized with the seed 0 whatever the cell; of the frames of a video, which have no partition
    of their own, each seed has another random one.

    Raises:
        DataError: the file is missing.
    """
    name = name_of(task)
    if name == "frey-faces":
        return dgm.load(name, split="random", seed=seed)
    return dgm.load(name, binarize=BINARIZE[name])


def parts_of(task: str, seed: int, settings: Mapping[str, Any]) -> Parts:
    """The rows that a cell is about; of a larger part evenly spaced ones, for files are sorted.

    settings: train_rows, valid_rows and test_rows, the most that are used; 0 for all.
    """
    data = load_task(task, seed)
    train, valid = data.train[0], None if data.valid is None else data.valid[0]
    if valid is None:
        held = torch.arange(len(train)) % HELD_OUT == 0
        train, valid = train[~held], train[held]
        if data.transform is not None:
            valid = torch.bernoulli(valid, generator=torch.Generator().manual_seed(0))
    parts = {"train": train, "valid": valid, "test": data.test[0]}
    for name, rows in parts.items():
        most = settings[f"{name}_rows"]
        parts[name] = spaced((rows,), most)[0][0] if most and most < len(rows) else rows
    return Parts(**parts, transform=data.transform)
