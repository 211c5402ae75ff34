"""Guide families side by side: the same model, data, seeds, data order and number of model density evaluations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .bench_executors import WorkerDied
from .cell_runs import SEARCH, Item, Runs, died, run_items, tell
from .cell_store import open_store, tidy
from .cells import BATCH_SIZE, Cell, Settings
from .data import as_tensors, split
from .files import Dataset
from .lock import locked
from .optim import adam
from .preflight import check_model, check_options, checked_seeds
from .programs import preserved_rng, program_name
from .provenance import provenance
from .psis import k_threshold
from .ranking import rank, statement
from .report import write_report
from .starting import maker
from .tables import format_table

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""Step sizes that `search_lr=True` tries."""


@dataclass
class Comparison:
    """Guides side by side.

    Attributes:
        rows: one tidy row for each guide and seed.
        table: one row for each guide, best first, with paired differences to the best and their standard errors.
        history: training curves. per_datum: held-out score `(seeds, N)` by guide. khat: by guide.
        k_threshold: k-hat above it is not to be trusted. pictures: arrays to draw. meta: protocol and provenance.
    """

    rows: pd.DataFrame
    history: pd.DataFrame
    per_datum: dict[str, np.ndarray]
    khat: dict[str, np.ndarray]
    k_threshold: float
    pictures: dict[str, dict[str, Any]]
    meta: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        return rank(self.rows, self.per_datum, str(self.meta["score"]))

    def __repr__(self) -> str:
        return format_table(self.table, self.meta, self.rows)

    def statement(self) -> str:
        """The order of the guides that chance does not explain, and what it rests on, in sentences."""
        return statement(self.rows, self.per_datum, str(self.meta["score"]))

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained HTML page."""
        return write_report(self, path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write rows (parquet and CSV), training curves, plots and the page into a folder."""
        from .store import save_comparison

        return save_comparison(self, Path(folder))


def compare(
    model: Any,
    guides: Mapping[str, Callable[..., Any]],
    data: Any,
    *,
    test: Any = None,
    seeds: int | Sequence[int] = 3,
    epochs: int = 100,
    batch_size: int | None = BATCH_SIZE,
    lr: float = 1e-3,
    search_lr: bool | Sequence[float] = False,
    num_samples: int = 1000,
    jobs: int = 1,
    title: str | None = None,
    progress: bool = False,
    folder: str | os.PathLike[str] | None = None,
    **fit_options: Any,
) -> Comparison:
    """Train and evaluate several guides on the same model, data, seeds and number of model density evaluations.

    Guides are ranked by the mean over seeds and held-out data of the K-sample bound on log p(x) (local latents), or of
    the log predictive density (global latents). Differences to the best are paired over seeds and data; their standard
    error counts both. A guide has the *ranks* that Holm's correction over all pairs leaves open at 5 %, and *ties*
    where the first is among them.

    Args:
        model: makes the model when called without arguments (`lambda: VAE(64)`), or is a module, copied for each run.
        guides: `{name: (model, *batch) -> guide}`, e.g. `dgm.guides.attached([...])` or `partial(Global, family=...)`.
        data: a `Dataset`, or arrays with rows first as the model takes them.
        test: held-out arrays; unless told a fifth of the rows, drawn once.
        seeds: how many (0, 1, ...), or which: of model start, guide start, data order and noise; the same for all.
        epochs, batch_size, lr: of training, the same for all.
        search_lr: True, or step sizes: each guide's is found on a validation part with the first seed; the cost is in
            the column search_evaluations.
        num_samples: K of the held-out bound.
        jobs: worker processes, one thread each.
        title: of the page; made of model and data unless told.
        progress: print a line when a run is done.
        folder: where each run is written when it is finished. The same call with the same folder makes only those that
            are missing or failed; the others are read, with the numbers that they had.
        fit_options: go to `dgm.fit`.

    Returns:
        a `Comparison`; a guide that failed is a row whose status is the error, also where its process was lost.

    Raises:
        DataError, ModelError, OptionError: bad data, model or options, or no guide that can be made, before anything is
            trained; or the folder holds another comparison, or is in use.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal, AutoDelta
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> guides = {"normal": lambda model, x: AutoNormal(model), "point": lambda model, x: AutoDelta(model)}
    >>> result = compare(model, guides, torch.arange(20.0) / 10, seeds=2, epochs=2, num_samples=100)
    >>> len(result.rows), list(result.rows.status.unique())
    (4, ['ok'])
    """
    make = maker(model)
    train, held_out, transform, info = _data(data, test)
    if batch_size == BATCH_SIZE:  # nobody asked for it: smaller data come in one batch
        batch_size = min(batch_size, len(train[0]))
    check_options(guides, train, epochs, batch_size, lr, num_samples, jobs, fit_options)
    settings = Settings(
        epochs,
        batch_size,
        lr,
        num_samples,
        _rates(search_lr),
        max(1, epochs // 5),
        {"transform": transform, **fit_options},
    )
    for rate in settings.search:
        adam(rate)  # refuses a bad step size now
    chosen = checked_seeds(seeds)
    supervised = check_model(make, guides, chosen[0], train, held_out, settings)
    rates: dict[str, tuple[float, int]] = {name: (lr, 0) for name in guides}
    started, cells, interrupted, kept = time.perf_counter(), dict[tuple[str, int | str], Cell](), False, 0
    about = provenance()  # of the start: the files may change while this runs
    with nullcontext() if folder is None else locked(folder):
        store = None if folder is None else open_store(Path(folder), settings, train, held_out)
        runs = Runs(make, train, held_out, info, settings, store)
        keys = runs.keys(guides, chosen)
        for name_seed, key in keys.items():
            if name_seed[1] != SEARCH and (found := runs.found(key)) is not None:
                cells[name_seed] = found
        kept = len(cells)
        parts = _parts(chosen, -(-jobs // len(guides)))
        work = [
            Item(name, guide, tuple(part), tuple(keys.get((name, seed), "") for seed in part))
            for part in parts
            for name, guide in guides.items()
            if any((name, seed) not in cells for seed in part)
        ]
        try:
            if settings.search:
                names = dict.fromkeys(item.name for item in work)
                wanted = [Item(name, guides[name], chosen[:1], (keys.get((name, SEARCH), ""),)) for name in names]
                for item, rate in run_items(wanted, runs.rates, jobs, store):
                    rates[item.name] = (lr, 0) if isinstance(rate, WorkerDied) else rate
            work = [replace(item, rate=rates[item.name]) for item in work]
            for item, cell in run_items(work, runs.cells, jobs, store):
                for one in died(item, cell) if isinstance(cell, WorkerDied) else [cell]:
                    cells.setdefault((item.name, int(one.row["seed"])), one)
                    if progress:
                        tell(one, len(cells), len(chosen) * len(guides))
        except KeyboardInterrupt:
            interrupted = True
            if not cells:
                raise
        finally:
            if store is not None:
                tidy(store)
    meta = _meta(make, info, train, held_out, chosen, settings, supervised, title, jobs, about)
    meta.update(interrupted=interrupted, elapsed_seconds=time.perf_counter() - started)
    if kept:
        meta["protocol"].append(f"{kept} of {len(cells)} runs were finished by an earlier call with this folder")
    ordered = [cells[n, seed] for part in parts for n in guides for seed in part if (n, seed) in cells]
    return _collect(ordered, list(guides), meta, num_samples)


def _parts(seeds: Sequence[int], parts: int) -> list[list[int]]:
    """Seeds in so many parts, for more workers than guides; otherwise all seeds of a guide are trained at once."""
    return [list(part) for part in np.array_split(np.array(seeds, dtype=object), min(parts, len(seeds)))]


def _rates(search_lr: bool | Sequence[float]) -> tuple[float, ...]:
    return (LEARNING_RATES if search_lr else ()) if isinstance(search_lr, bool) else tuple(search_lr)


def _data(data: Any, test: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Any, dict[str, Any]]:
    if isinstance(data, Dataset):
        info = {
            "name": data.name,
            "y_std": data.y_std,
            "image_shape": data.image_shape,
            "note": data.note,
            "source": data.source,
        }
        return data.train, data.test, data.transform, info
    train = as_tensors(data)
    if test is None:
        train, held_out = split(train, 0.2, torch.Generator().manual_seed(0))
    else:
        held_out = as_tensors(test)
    return train, held_out, None, {"name": "data", "y_std": 1.0, "image_shape": None, "note": "", "source": ""}


def _collect(cells: Sequence[Cell], guides: Sequence[str], meta: dict[str, Any], num_samples: int) -> Comparison:
    rows = pd.DataFrame([cell.row for cell in cells])
    histories = [cell.history for cell in cells if len(cell.history)]
    good = {g: [c for c in cells if c.row["guide"] == g and c.row["status"] == "ok"] for g in guides}
    per_datum = {g: np.stack([c.per_datum for c in part]) for g, part in good.items() if part}
    khat = {g: np.concatenate([c.khat for c in part]) for g, part in good.items() if part}
    if any(len(c.khat) > 1 for part in good.values() for c in part):  # latents are local, perhaps beside global ones
        meta = {**meta, "khat_of": "row"}
    return Comparison(
        rows,
        pd.concat(histories, ignore_index=True)
        if histories
        else pd.DataFrame(columns=["guide", "seed", "step", "epoch", "elbo"]),
        per_datum,
        {g: k for g, k in khat.items() if len(k)},
        k_threshold(min(num_samples, 1000)),
        {g: part[0].pictures for g, part in good.items() if part and part[0].pictures},
        meta,
    )


def _meta(
    make: Callable[[], Any],
    info: Mapping[str, Any],
    train: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    seeds: Sequence[int],
    settings: Settings,
    supervised: bool,
    title: str | None,
    jobs: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    with preserved_rng(seeds[0]):
        model = make()
    parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    fixed = isinstance(model, nn.Module) and not parameters
    mode = "fixed model" if fixed else "joint training"
    mode += ": compared by the " + (
        "log predictive density of held-out rows" if supervised else "held-out bound on log p(x)"
    )
    notes = [
        f"every guide: {settings.epochs} epochs of batches of {settings.batch_size or len(train[0])}, "
        "the same seeds, data order and noise",
        "step size "
        + (
            f"searched among {list(settings.search)} on a fifth of the training rows, "
            f"{settings.search_epochs} epochs each"
            if settings.search
            else f"{settings.lr:g} for all"
        ),
    ]
    if info["note"]:
        notes.append(str(info["note"]))
    return {
        "title": title or f"{program_name(model)} on {info['name']}",
        "mode": mode,
        "score": "log_likelihood" if supervised else "bound",
        "train_size": len(train[0]),
        "test_size": len(held_out[0]),
        "K": settings.num_samples,
        "seeds": ", ".join(map(str, seeds)),
        "protocol": notes,
        "jobs": jobs,
        "k_threshold": round(k_threshold(min(settings.num_samples, 1000)), 3),
        **about,
    } | ({"threads": f"1 in each of {jobs} workers"} if jobs > 1 else {})
