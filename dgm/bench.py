"""Running a benchmark suite: only what is missing, on any number of workers, with the same rows however often it ends.

plan -> jobs that miss a cell -> executor -> cells on disk -> rows, report
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from .bench_cells import Job
from .bench_code import library
from .bench_executors import Executor, Finished, Local, WorkerDied, Workers
from .bench_find import find_suite
from .bench_job import Order, failure, run_job
from .bench_plan import DIED, Plan, make_plan, say, told
from .bench_results import Results, load_results, save_plan
from .bench_store import MOST_ATTEMPTS, Store
from .lock import locked
from .provenance import provenance

__all__ = ["Stopped", "make_plan", "run_suite"]

log = logging.getLogger("dgm")


class Stopped(KeyboardInterrupt):
    """Interrupted; what was finished is written."""


def run_suite(
    name: str,
    folder: str | os.PathLike[str],
    *,
    budget: str = "short",
    filters: Sequence[str] = (),
    jobs: int = 1,
    executor: Executor | None = None,
    renew: bool = False,
    retry: bool = False,
    progress: bool = True,
) -> Results:
    """Compute the cells of a suite that a folder does not hold yet.

    Rows are the same, bit for bit, for any number of workers and after any number of interruptions: a cell's numbers
    depend on its job alone, jobs are formed without looking at what is there, and each result is written whole. A job
    that kills its process, or fails, is tried three times over all runs.

    Args:
        name: of a suite, or the path of a file that has one. folder: made if need be. budget: "smoke", "short", "full".
        filters: `name=value,...`; see `dgm.bench_cells.parsed`. jobs: worker processes with one thread each.
        executor: in place of `jobs`. renew: also cells that other code of the library computed. retry: also those that
        were given up. progress: show cells done, rate and time left.

    Raises:
        OptionError: unknown suite, budget or filter; several workers for a suite of measured times; a folder that
            another run holds; a full disk (`CannotWrite`).
        Stopped: Ctrl-C.
    """
    suite, about = find_suite(name), {**provenance(), "threads": "1", "library": library()}
    jobs, store = suite.workers(jobs), Store(folder)
    with locked(folder):
        store.prepare()
        plan = make_plan(suite, store, budget, filters, renew, retry)
        say(plan, store, retry)
        save_plan(store.folder, name, suite, budget, filters, plan.jobs, plan.wanted, plan.skipped, about)
        if retry:
            for job in plan.waiting:
                store.forgive(job.key, all_=True)
        orders = [Order(name, store.folder.resolve(), job, about) for job in plan.waiting]
        if renew:
            _clear(store, plan)
        runner = executor if executor is not None else Local() if jobs == 1 else Workers(min(jobs, max(1, len(orders))))
        try:
            _go(runner, orders, store, plan, progress)
        except KeyboardInterrupt as error:
            raise Stopped("interrupted") from error
        _give_up(store, plan, about)
        return load_results(store.folder)


def _clear(store: Store, plan: Plan) -> None:
    """Stale rows go, for a good row that is there is left alone."""
    for key in plan.stale & plan.wanted:
        store.discard(key)


def _go(runner: Executor, orders: Sequence[Order], store: Store, plan: Plan, progress: bool) -> None:
    waiting, total = list(orders), plan.cells
    started, done = time.monotonic(), 0
    lines = progress and not sys.stderr.isatty()
    with tqdm(total=total, unit="cell", disable=not progress or lines, smoothing=0.05) as bar:
        while waiting:
            again: list[Order] = []
            for finished in runner.map(run_job, waiting):
                order: Order = finished.item
                if _died(finished, store):
                    again.append(order)
                    continue
                size = len(order.job.cells)
                done += size
                bar.update(size)
                if lines:
                    _line(order.job, finished, done, total, time.monotonic() - started)
            waiting = again


def _died(finished: Finished, store: Store) -> bool:
    """Whether the job is to be tried again in this run; errors of the run itself are raised."""
    if finished.error is None:
        return False
    if not isinstance(finished.error, WorkerDied):
        raise finished.error
    key = finished.item.job.key
    tried = store.tried(key)
    name = f"{finished.item.job.cells[0].task}, {finished.item.job.cells[0].guide}"
    log.warning("%s: %s (attempt %d of %d)", name, finished.error, tried, MOST_ATTEMPTS)
    return tried < MOST_ATTEMPTS


def _line(job: Job, finished: Finished, done: int, total: int, seconds: float) -> None:
    first, count = job.cells[0], finished.value or {}
    what = "died" if finished.error is not None else f"{count.get('failed', 0)} failed" if count.get("failed") else "ok"
    rate, left = done / max(seconds, 1e-9), (total - done) * seconds / max(done, 1)
    pace = f"{rate:.2g} cells/s" if rate >= 1 else f"{60 * rate:.2g} cells/min"
    print(
        f"[{done}/{total}] {first.task}, {first.guide}: {what}; {pace}, {told(left)} left", file=sys.stderr, flush=True
    )


def _give_up(store: Store, plan: Plan, about: Mapping[str, Any]) -> None:
    """Cells without a row whose job died too often get one that says so."""
    for job in plan.jobs:
        if store.tried(job.key) < MOST_ATTEMPTS:
            continue
        for key, cell in zip(job.keys, job.cells, strict=True):
            if key in plan.wanted and store.read(key) is None:
                record = failure(cell, plan.suite, DIED)
                store.write(key, replace(record, about={**about, "key": key, "job": len(job.cells)}))
