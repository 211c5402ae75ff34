"""Ours: `dgm.SVI` in every mode, and replicas. Factories are as in `speed_torch`: `train(block) -> loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import dgm
from dgm.errors import TrainingError
from dgm.feeding import taken
from dgm.optim import adam

from .speed_cases import LR, Case

Train = Callable[[Tensor], float]
MODES: dict[str, Any] = {"dgm eager": False, "dgm trace": "trace", "dgm inductor": "inductor"}
"""Modes of the table by the candidate's name; "auto" becomes one of these, and is looked at for its first step only."""


def make_svi(case: Case, mode: Any, seed: int = 0) -> Any:
    """A pair under `dgm.SVI`; a mode that this version has not raises OptionError."""
    model, guide = case.pair(seed)
    return dgm.SVI(
        model, guide, adam(LR), case.objective, sizes={"data": case.rows}, compile=mode, warm=0
    )  # fmt: skip


def single(case: Case, mode: Any) -> Train:
    """One training: the rows of a batch are taken by their numbers, and the loss is a float at every step."""
    svi, data = make_svi(case, mode), case.data

    def train(block: Tensor) -> float:
        value = 0.0
        for index in block:
            value = svi.step(*(taken(t, index) for t in data))  # as `dgm.fit` takes rows
        _check_mode(svi, mode)
        return value

    return train


def replicated(case: Case, mode: Any) -> Train:
    """All replicas at once; losses are read once a block, and every step checks its own."""
    from dgm.replicas import Replicas

    together = Replicas([make_svi(case, mode, seed) for seed in range(case.replicas)], case.data, compile=mode)

    def train(block: Tensor) -> float:
        for index in block:
            together.step(index)
        _check_mode(together, mode)
        if not bool(together.alive.all()):
            raise TrainingError("a replica diverged: its figure would be that of a frozen one")
        return float(together.losses().mean())

    return train


def _check_mode(trained: Any, mode: Any) -> None:
    """Refuse a figure under the name of a mode that was not the one that ran."""
    why = getattr(trained, "fallback", None) or (getattr(trained, "uncompiled", None) if mode == "inductor" else None)
    if mode in ("trace", "inductor") and why:
        raise TrainingError(f"not {mode}: {why}")
