"""Running the cells of a comparison: here or in workers, where the death of one is a row and not the end of all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from .bench_executors import WorkerDied, Workers
from .bench_store import MOST_ATTEMPTS
from .cell_store import Store, key_of, to_cell, to_record
from .cells import Cell, Settings, run_cells, search
from .errors import DataError

__all__ = ["SEARCH", "Item", "Runs", "died", "run_items", "tell"]

SEARCH = "search"
"""In place of a seed: the search of a guide's step size."""


@dataclass(frozen=True)
class Item:
    """A guide with the seeds that are trained at once; the keys of their cells on disk, if they are kept."""

    name: str
    guide: Callable[..., Any]
    seeds: tuple[int, ...]
    keys: tuple[str, ...]
    rate: tuple[float, int] = (0.0, 0)


@dataclass(frozen=True)
class Runs:
    """What every cell needs; workers are sent it."""

    make: Callable[[], Any]
    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    info: Mapping[str, Any]
    settings: Settings
    store: Store | None = None

    def keys(self, guides: Mapping[str, Callable[..., Any]], seeds: Sequence[int]) -> dict[tuple[str, int | str], str]:
        """By guide and seed, and of each guide's search; none where nothing is kept."""
        if self.store is None:
            return {}
        which: list[int | str] = [*seeds, SEARCH]
        return {
            (name, seed): key_of(self.make, name, guide, seed, seeds[0], self.train, self.settings)
            for name, guide in guides.items()
            for seed in which
        }

    def found(self, key: str) -> Cell | None:
        """A cell that an earlier run finished well."""
        if self.store is None or (record := self.store.read(key)) is None or not record.good:
            return None
        try:
            record.arrays = self.store.arrays(key)
            return to_cell(record)
        except DataError:
            return None  # it is made again

    def cells(self, item: Item) -> Iterator[Cell]:
        """Train and evaluate; each cell is written when it is there."""
        made = run_cells(
            self.make,
            item.name,
            item.guide,
            item.seeds,
            self.train,
            self.held_out,
            self.info,
            self.settings,
            item.rate,
        )
        for key, cell in zip(item.keys, made, strict=True):
            if self.store is not None and self.found(key) is None:
                self.store.write(key, to_record(cell))
            yield cell

    def rates(self, item: Item) -> Iterator[tuple[float, int]]:
        """The step size of a guide, and what finding it cost."""
        yield search(self.make, item.guide, item.seeds[0], self.train, self.settings)


def died(item: Item, error: WorkerDied) -> list[Cell]:
    """The rows of cells whose process was lost."""
    status = f"WorkerDied: {error} ({MOST_ATTEMPTS} attempts)"
    rows = [
        {"guide": item.name, "seed": seed, "status": status, "lr": item.rate[0], "search_evaluations": item.rate[1]}
        for seed in item.seeds
    ]
    return [Cell(row, pd.DataFrame(), np.zeros(0), np.zeros(0), {}) for row in rows]


def tell(cell: Cell, done: int, total: int) -> None:
    """Print a line about a run that is done."""
    row = cell.row
    what = row["status"]
    if what == "ok":
        score = f"{row['bound']:.3f} nats" if math.isfinite(row["bound"]) else "no bound"
        what = f"{score} in {row['seconds']:.0f} s"
    print(f"[{done}/{total}] {row['guide']}, seed {row['seed']}: {what}", flush=True)


def run_items(
    items: Sequence[Item], work: Callable[[Item], Iterable[Any]], jobs: int, store: Store | None = None
) -> Iterator[tuple[Item, Any]]:
    """What `work` gives for each item, as it comes; `WorkerDied` for one that ended its process three times.

    With one job items run in this process, but for those that took an earlier one with it. An item whose worker died is
    tried again when the others are done, alone: perhaps there was no memory for several.

    Args:
        store: where deaths are counted, so that they count in the next run as well.
    """
    lost: Counter[str] = Counter()

    def deaths(item: Item) -> int:
        return store.tried(item.keys[0]) if store is not None else lost[_name(item)]

    waiting: list[Item] = []
    for item in items:
        if deaths(item) >= MOST_ATTEMPTS:
            yield item, WorkerDied("its process was killed, or ran out of memory")
        elif jobs > 1 or (store is not None and store.tried(_here(item))):
            waiting.append(item)
        else:
            yield from ((item, value) for value in _in_this_process(item, work, store))
    while waiting:
        again: list[Item] = []
        for finished in Workers(min(jobs, len(waiting))).map(partial(_listed, work), waiting):
            item = finished.item
            if isinstance(finished.error, WorkerDied):
                lost[_name(item)] += 1
                if store is not None:
                    store.begin(item.keys[0])
                if deaths(item) < MOST_ATTEMPTS:
                    again.append(item)
                else:
                    yield item, finished.error
                continue
            if finished.error is not None:
                raise finished.error
            if store is not None:
                store.forgive(item.keys[0], all_=True)
                store.forgive(_here(item), all_=True)
            yield from ((item, value) for value in finished.value)
        waiting, jobs = again, 1


def _in_this_process(item: Item, work: Callable[[Item], Iterable[Any]], store: Store | None) -> Iterator[Any]:
    """With a mark on disk, which only the death of this process leaves there."""
    if store is None:
        yield from work(item)
        return
    store.begin(_here(item))
    try:
        yield from work(item)
    finally:
        store.forgive(_here(item), all_=True)


def _here(item: Item) -> str:
    return f"{item.keys[0]}-here"


def _name(item: Item) -> str:
    return f"{item.name} {item.seeds}"


def _listed(work: Callable[[Item], Iterable[Any]], item: Item) -> list[Any]:
    return list(work(item))
