"""The cells of a comparison: a guide trained with every seed at once, evaluated, and the search of its step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .errors import DGMError, TrainingError, without_shapes
from .evaluate import evaluate, global_khat
from .fit import Fit, fit
from .pictures import pictures_of
from .psis import k_threshold
from .starting import start_pair

BATCH_SIZE = 100
"""Rows in a step unless told; data with fewer come in one batch."""


@dataclass(frozen=True)
class Settings:
    """What every cell of a comparison shares."""

    epochs: int = 100
    batch_size: int | None = BATCH_SIZE
    lr: float = 1e-3
    num_samples: int = 1000
    search: tuple[float, ...] = ()
    search_epochs: int = 20
    fit_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Cell:
    """One guide trained with one seed, and what came of it."""

    row: dict[str, Any]
    history: pd.DataFrame
    per_datum: np.ndarray
    khat: np.ndarray
    pictures: dict[str, Any]


def start(
    make: Callable[[], Any], guide: Callable[..., Any], seed: int, train: tuple[Tensor, ...], settings: Settings
) -> tuple[Any, Any]:
    transform = settings.fit_options.get("transform")
    whole = transform(train, torch.Generator().manual_seed(seed)) if transform is not None else train
    return start_pair(make, guide, seed, whole)


def search(
    make: Callable[[], Any], guide: Callable[..., Any], seed: int, train: tuple[Tensor, ...], settings: Settings
) -> tuple[float, int]:
    """The step size with the best bound on a validation part, and what finding it cost; all are trained at once."""
    options = {**settings.fit_options, "validation": 0.2, "validate_every": settings.search_epochs}
    try:
        fits = fit(
            make,
            guide,
            train,
            epochs=settings.search_epochs,
            batch_size=_fitting(settings.batch_size, train),
            replicas={"seed": [seed] * len(settings.search), "lr": settings.search},
            **options,
        )
    except DGMError:
        return settings.lr, 0  # the pair is wrong, which the cell itself will say
    best = (-math.inf, settings.lr)
    for lr, result in zip(settings.search, fits, strict=True):
        if result.error is None:
            value = float(result.history["valid_elbo"].iloc[-1])
            best = max(best, (value, lr)) if math.isfinite(value) else best
    return best[1], sum(result.evaluations for result in fits)


def _fitting(batch_size: int | None, train: tuple[Tensor, ...]) -> int | None:
    """The batch size, where four fifths of the rows still fill a batch."""
    return None if batch_size is None else min(batch_size, max(1, int(0.8 * len(train[0]))))


def run_cells(
    make: Callable[[], Any],
    name: str,
    guide: Callable[..., Any],
    seeds: Sequence[int],
    train: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    info: Mapping[str, Any],
    settings: Settings,
    rate: tuple[float, int],
) -> Iterator[Cell]:
    """Train one guide with all seeds at once, and evaluate each; an error becomes the status of its rows."""
    fits: Sequence[Fit | Exception]
    try:
        fits = fit(
            make,
            guide,
            train,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            lr=rate[0],
            replicas={"seed": list(seeds)},
            **settings.fit_options,
        )
    except Exception as error:
        fits = [error] * len(seeds)
    for seed, result in zip(seeds, fits, strict=True):
        row = {"guide": name, "seed": seed, "status": "ok", "lr": rate[0], "search_evaluations": rate[1]}
        yield evaluated(row, result, train, held_out, info, settings)


def evaluated(
    row: dict[str, Any],
    result: Fit | Exception,
    train: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    info: Mapping[str, Any],
    settings: Settings,
) -> Cell:
    empty, seed = Cell(row, pd.DataFrame(), np.zeros(0), np.zeros(0), {}), int(row["seed"])
    try:
        if isinstance(result, Exception):
            raise result
        if result.error is not None:
            raise TrainingError(result.error)
        scores = evaluate(
            result.model, result.guide, held_out, num_samples=settings.num_samples, y_std=info["y_std"], seed=seed
        )
    except Exception as error:
        row["status"] = f"{type(error).__name__}: {without_shapes(str(error))}"
        return empty
    row.update(scores.summary)
    row.update(
        evaluations=result.evaluations,
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
        parameters=_count(result.guide),
        model_parameters=_count(result.model),
        notes="; ".join(scores.notes),
    )
    khat = scores.per_datum["khat"].to_numpy()
    if np.isnan(khat).all() and scores.kind.startswith("log predictive"):
        khat = np.array([global_khat(result.model, result.guide, *train, seed=seed)])
        if not np.isnan(khat).any():  # infinite: one weight dominates, or all are equal
            row.update(khat_bad=float(khat[0] > k_threshold(1000)), khat_median=float(khat[0]))
    history = result.history.assign(guide=row["guide"], seed=seed)
    drawn = pictures_of(result.model, result.guide, held_out, info, seed)
    return Cell(row, history, scores.per_datum["bound"].to_numpy(), khat[~np.isnan(khat)], drawn)


def _count(program: Any) -> int:
    return sum(p.numel() for p in program.parameters()) if isinstance(program, nn.Module) else 0
