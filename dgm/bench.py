"""Running a benchmark suite: only what is missing, on any number of workers, with the same rows however often it ends.

plan -> jobs that miss a cell -> executor -> cells on disk -> rows, report
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from . import __version__
from .bench_cells import Cell, Job, Suite, chosen, jobs_of
from .bench_code import library, reached
from .bench_executors import Executor, Finished, Local, WorkerDied, Workers
from .bench_find import find_suite
from .bench_job import Order, failure, run_job
from .bench_results import Results, load_results, save_plan
from .bench_store import MOST_ATTEMPTS, Record, Store
from .errors import DataError
from .lock import locked
from .provenance import provenance

__all__ = ["Plan", "Stopped", "make_plan", "run_suite"]

log = logging.getLogger("dgm")


class Stopped(KeyboardInterrupt):
    """Interrupted; what was finished is written."""


@dataclass
class Plan:
    """What a run would do.

    jobs: all of the budget. wanted: keys that the filter lets through. done, failed, poisoned: those of them that have
    a good row, a failed one that is tried again, one that has failed too often. skipped: task -> why. stale: good rows
    by other code of the library. seconds: of the work that is left, on one core; None where nothing is known of it.
    """

    suite: Suite
    jobs: list[Job]
    wanted: set[str]
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    poisoned: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    others: int = 0
    seconds: float | None = None

    @property
    def waiting(self) -> list[Job]:
        """Jobs that have a cell to compute."""
        closed = self.done | self.poisoned
        return [
            job
            for job in self.jobs
            if job.cells[0].task not in self.skipped and any(k in self.wanted and k not in closed for k in job.keys)
        ]

    @property
    def cells(self) -> int:
        """Cells that would be computed; a job is computed whole."""
        return sum(len(job.cells) for job in self.waiting)

    def __repr__(self) -> str:
        parts = [f"{self.suite.name}: {len(self.wanted)} cells, {len(self.done)} finished"]
        for what, found in (("failed, to be tried again", self.failed), ("given up", self.poisoned)):
            parts += [f"{len(found)} {what}"] if found else []
        lost = sum(1 for _, c in self._wanted() if c.task in self.skipped)
        parts += [f"{lost} skipped for want of data"] if lost else []
        time_ = "time unknown" if self.seconds is None else f"about {told(self.seconds)} on one core"
        return ", ".join(parts) + f"; to do: {self.cells} in {len(self.waiting)} jobs, {time_}"

    def _wanted(self) -> Iterator[tuple[str, Cell]]:
        pairs = ((k, c) for job in self.jobs for k, c in zip(job.keys, job.cells, strict=True))
        return ((k, c) for k, c in pairs if k in self.wanted)


def told(seconds: float) -> str:
    """A duration as people say it.

    >>> told(50), told(200), told(9000)
    ('50 s', '3.3 min', '2.5 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def make_plan(
    suite: Suite,
    store: Store,
    budget: str,
    filters: Sequence[str] = (),
    renew: bool = False,
    retry: bool = False,
) -> Plan:
    """What is there, and what is to do.

    Args:
        renew: compute cells again that were computed by other code of the library. retry: also those given up.

    Raises:
        OptionError: an unknown budget, or a filter that selects nothing.
    """
    jobs = jobs_of(suite, budget, {"dgm": __version__, "suite": reached(suite.run)})
    plan = Plan(suite, jobs, chosen(suite, jobs, filters) if filters else {k for job in jobs for k in job.keys})
    spent: dict[tuple[str, str], list[float]] = {}
    for job in jobs:
        tried = store.tried(job.key)
        for key, cell in zip(job.keys, job.cells, strict=True):
            record = store.read(key)
            if record is not None and "job_seconds" in record.cost:
                spent.setdefault((cell.task, cell.guide), []).append(float(record.cost["job_seconds"]))
            if key in plan.wanted:
                _sort(plan, key, record, tried, renew, retry)
    plan.others = len(store.keys() - {k for job in jobs for k in job.keys})
    for task in dict.fromkeys(cell.task for key, cell in plan._wanted() if key not in plan.done):
        try:
            if suite.ready is not None:
                suite.ready(task)
        except DataError as error:
            plan.skipped[task] = str(error)
    plan.seconds = _estimate(plan, spent)
    return plan


def _sort(plan: Plan, key: str, record: Record | None, tried: int, renew: bool, retry: bool) -> None:
    if record is not None and record.good:
        if record.about.get("library") != library():
            plan.stale.add(key)
        if key not in plan.stale or not renew:
            plan.done.add(key)
    elif tried >= MOST_ATTEMPTS and not retry:
        plan.poisoned.add(key)
    elif record is not None:
        plan.failed.add(key)


def _estimate(plan: Plan, spent: Mapping[tuple[str, str], list[float]]) -> float | None:
    mean = {key: sum(found) / len(found) for key, found in spent.items()}
    total = 0.0
    for cell in (cell for job in plan.waiting for cell in job.cells):
        near = [v for (_, guide), v in mean.items() if guide == cell.guide] or list(mean.values())
        if (cell.task, cell.guide) in mean:
            total += mean[cell.task, cell.guide]
        elif plan.suite.seconds is not None:
            total += plan.suite.seconds(cell)
        elif near:
            total += sum(near) / len(near)
        else:
            return None
    return total


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
        _say(plan, retry)
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
                record = failure(cell, plan.suite, f"given up: its process died in {MOST_ATTEMPTS} attempts")
                store.write(key, replace(record, about={**about, "key": key, "job": len(job.cells)}))


def _say(plan: Plan, retry: bool) -> None:
    log.info("%r", plan)
    for task, why in plan.skipped.items():
        log.warning("%s is skipped: %s", task, why)
    if plan.others:
        log.info(
            "%d other results are in the folder, of another budget, protocol or version: they are kept, and not shown",
            plan.others,
        )
    if plan.stale & plan.done:
        log.info(
            "%d finished cells were computed by other code of the library: they are kept; --renew computes them again",
            len(plan.stale & plan.done),
        )
    if plan.poisoned and not retry:
        log.warning(
            "%d cells have failed %d times and are given up: --retry tries them again",
            len(plan.poisoned),
            MOST_ATTEMPTS,
        )
