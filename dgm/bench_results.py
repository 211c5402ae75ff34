"""Rows of a suite as frames, read from a folder of results or from rows that were committed."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import store as files
from .bench_cells import Job, Suite, canonical
from .bench_find import find_suite
from .bench_store import CannotWrite, Store
from .errors import DataError

__all__ = ["PLAN", "Results", "load_results", "save_plan", "save_rows", "sound"]

log = logging.getLogger("dgm")
PLAN = "plan.json"
ROWS, COSTS, RANKS = "rows.parquet", "costs.csv", "ranks.csv"


@dataclass
class Results:
    """What a suite has given.

    rows: one for each finished cell, failed ones too: key, task, guide, seed (or split), settings, status, numbers.
    They depend on the suite alone, bit for bit. costs: key, seconds, and where each number came from. plan: what was
    asked for. skipped: task -> why its data are missing. missing: cells that have no row yet. elsewhere: results in the
    folder that are of another budget, protocol or version. ranks: as they were committed, for rows whose arrays were
    not. folder: of the cells, None where only rows were kept. place: where the rows were read.
    """

    suite: Suite
    rows: pd.DataFrame
    costs: pd.DataFrame
    plan: Mapping[str, Any]
    missing: int = 0
    folder: Path | None = None
    elsewhere: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    ranks: pd.DataFrame | None = None
    place: Path | None = None

    @property
    def good(self) -> pd.DataFrame:
        """Rows without an error."""
        return self.rows[self.rows["status"] == "ok"] if len(self.rows) else self.rows

    @property
    def failed(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] != "ok"] if len(self.rows) else self.rows

    def arrays(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of a row, by its key; empty where it has none, or where only the rows were kept."""
        return Store(self.folder).arrays(key) if self.folder is not None else {}


def save_plan(
    folder: Path, reference: str, suite: Suite, budget: str, filters: Sequence[str], jobs: Sequence[Job],
    wanted: set[str], skipped: Mapping[str, str], about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write down which cells a folder is to hold, so that a report needs nothing else."""
    keys = [key for job in jobs for key in job.keys if key in wanted]
    plan = {
        "suite": reference, "protocol": suite.protocol, "budget": budget, "filter": list(filters),
        "keys": keys, "skipped": dict(skipped), "about": dict(about),
    }  # fmt: skip
    _write(folder / PLAN, json.dumps(plan, indent=1, ensure_ascii=False) + "\n")


def load_results(folder: str | os.PathLike[str]) -> Results:
    """Results of a folder that `dgm bench run` wrote, or of one that `dgm bench report --out` wrote.

    Raises:
        DataError: the folder holds neither, or its plan or rows cannot be read.
    """
    place = Path(folder)
    try:
        plan = json.loads((place / PLAN).read_text(encoding="utf-8"))
        reference, keys, skipped = str(plan["suite"]), [str(k) for k in plan["keys"]], dict(plan["skipped"])
    except OSError as error:
        raise DataError(f"{place} holds no results of a suite ({PLAN}): make them by dgm bench run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place / PLAN} is damaged ({type(error).__name__}): run the suite again") from error
    suite = find_suite(reference)
    if not (place / "cells").is_dir():
        return _committed(place, suite, plan, keys, skipped)
    store, rows, costs = Store(place), [], []
    for key in keys:
        record = store.read(key)
        if record is not None:
            rows.append({"key": key, **record.row})
            costs.append({"key": key, **record.cost, **{k: v for k, v in record.about.items() if k != "key"}})
    frame, cost = sound(pd.DataFrame(rows)), pd.DataFrame(costs)
    if frame.empty:
        frame = pd.DataFrame(columns=["key", "task", "guide", suite.repeats, "status"])
    others = len(store.keys() - set(keys))
    return Results(suite, frame, cost, plan, len(keys) - len(rows), place, others, skipped, None, place)


def sound(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that a parquet file can hold: one with values of several kinds, or with mappings, becomes text.

    >>> sound(pd.DataFrame({"a": [1, "x", None], "b": [True, None, None]}))["a"].tolist()
    ['1', 'x', None]
    """
    for name in [str(c) for c in frame if frame[c].dtype == object]:
        values = [None if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in frame[name]]
        if _holds(name, values):
            continue
        kinds = sorted({type(v).__name__ for v in values if v is not None})
        log.warning("column %r holds values of several kinds (%s): it is kept as text", name, ", ".join(kinds))
        frame[name] = pd.Series(
            [v if v is None or isinstance(v, str) else canonical(v) for v in values], frame.index, dtype=object
        )
    return frame


def _holds(name: str, values: Sequence[Any]) -> bool:
    if any(isinstance(v, Mapping) for v in values):
        return False
    try:
        pd.DataFrame({name: pd.Series(values, dtype=object)}).to_parquet(io.BytesIO(), index=False)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # pyarrow's errors are among them
        return False
    return True


def _committed(place: Path, suite: Suite, plan: Any, keys: Sequence[str], skipped: Mapping[str, str]) -> Results:
    try:
        rows = pd.read_parquet(place / ROWS)
        costs = pd.read_csv(place / COSTS)
        ranks = pd.read_csv(place / RANKS) if (place / RANKS).is_file() else None
    except (OSError, ValueError) as error:
        raise DataError(f"the rows of {place} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return Results(suite, rows, costs, plan, len(set(keys) - set(rows["key"])), None, 0, skipped, ranks, place)


def save_rows(results: Results, folder: Path, ranks: pd.DataFrame) -> None:
    """`rows.parquet`, `rows.csv`, `costs.csv`, `ranks.csv` and the plan, each whole."""
    files.writable(folder)
    part = partial(results.rows.to_parquet, index=False)
    try:
        files.write_whole(folder / ROWS, part)
    except OSError as error:
        raise CannotWrite(f"cannot write to {folder}: {error.strerror or error}") from error
    _write(folder / "rows.csv", results.rows.to_csv(index=False, lineterminator="\n"))
    _write(folder / COSTS, results.costs.to_csv(index=False, lineterminator="\n"))
    _write(folder / RANKS, ranks.to_csv(index=False, lineterminator="\n"))
    if folder != results.folder:
        _write(folder / PLAN, json.dumps(results.plan, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        files.write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}; what is finished is safe") from error
