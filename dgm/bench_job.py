"""One job of a suite, wherever it runs: its cells computed, each written when its row is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro

from .bench_cells import Cell, Job, Suite, plain
from .bench_find import find_suite
from .bench_store import CannotWrite, Record, Store, as_array
from .errors import OptionError, without_shapes
from .programs import preserved_rng
from .threads import one_thread

__all__ = ["Order", "failure", "rows_of", "run_job"]

COST = "seconds"
"""A column whose name ends so is a cost and no part of the row."""


@dataclass(frozen=True)
class Order:
    """A job for a worker: everything that it needs, as plain values.

    suite: a name, or the path of a file. about: provenance, kept beside each result.
    """

    suite: str
    folder: Path
    job: Job
    about: Mapping[str, Any]


def run_job(order: Order) -> dict[str, int]:
    """Compute a job and write its cells; good results that are there are left alone. Returns how many went how.

    Raises:
        CannotWrite: a full disk, say.
    """
    suite, store, job = find_suite(order.suite), Store(order.folder), order.job
    store.begin(job.key)
    for key in job.keys if suite.timed else ():  # times of two runs do not compare
        store.discard(key)
    done = {"ok": 0, "failed": 0}
    try:
        with one_thread(), pyro.get_param_store().scope(), preserved_rng(int(job.key[:8], 16) % 2**31):
            for key, record in _records(suite, job):
                done["ok" if record.good else "failed"] += 1
                there = store.read(key)
                if there is None or not there.good:
                    record.about = {**order.about, "key": key, "job": len(job.cells)}
                    store.write(key, record)
    except (CannotWrite, KeyboardInterrupt):
        store.forgive(job.key)
        raise
    if not done["failed"]:
        store.forgive(job.key, all_=True)
    return done


def _records(suite: Suite, job: Job) -> Iterator[tuple[str, Record]]:
    """A record for each cell of a job; whatever goes wrong in the suite's code becomes the status of its cells."""
    rows = rows_of(suite, job)
    clock, processor = time.perf_counter(), time.process_time()
    error: BaseException | None = None
    for cell, key in zip(job.cells, job.keys, strict=True):
        found: Any = error
        if error is None:
            try:
                found = next(rows)
            except StopIteration:
                error = found = OptionError(f"the suite gave fewer rows than the {len(job.cells)} cells of its job")
            except Exception as raised:
                error = found = raised
        now, used = time.perf_counter(), time.process_time()
        cost = {"job_seconds": now - clock, "job_cpu_seconds": used - processor}
        clock, processor = now, used
        try:
            record = failure(cell, suite, found) if isinstance(found, BaseException) else _record(cell, suite, found)
        except Exception as raised:
            record = failure(cell, suite, raised)
        record.cost = {**cost, "seconds": cost["job_seconds"], **record.cost}
        yield key, record


def rows_of(suite: Suite, job: Job) -> Iterator[Any]:
    """What the suite's `run` gives, one for each cell."""
    if suite.group_by:
        yield from suite.run(list(job.cells))
    else:
        for cell in job.cells:
            yield suite.run(cell)


def _record(cell: Cell, suite: Suite, found: Any) -> Record:
    if not isinstance(found, Mapping):
        raise OptionError(f"run of suite {suite.name!r} gave a {type(found).__name__}, expected a mapping of columns")
    own = cell.values(suite.repeats)
    row: dict[str, Any] = {**own, "status": "ok"}
    arrays: dict[str, np.ndarray] = {}
    cost: dict[str, Any] = {}
    for name, value in found.items():
        array = as_array(value)
        if name in own or name in ("key", "status"):
            taken = "a setting of the cell already" if name in own else "a column of the runner"
            raise OptionError(f"run of suite {suite.name!r}: the column {name!r} is {taken}")
        if array is not None:
            arrays[name] = array
        elif name.endswith(COST):
            cost[name] = value
        else:
            row[name] = value
    for name, value in {**row, **cost}.items():
        plain(value, f"run of suite {suite.name!r}: the column {name!r}")
    return Record(row, cost, {}, arrays)


def failure(cell: Cell, suite: Suite, error: BaseException | str) -> Record:
    """The row of a cell that failed."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {without_shapes(str(error))}"
    text = " ".join(text.encode(errors="replace").decode().split())[:500]
    return Record({**cell.values(suite.repeats), "status": text})
