"""What a run of a suite would do: which cells are there, which are missing, and how long those take."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from . import __version__
from .bench_cells import Cell, Job, Suite, chosen, jobs_of
from .bench_code import library, reached
from .bench_store import MOST_ATTEMPTS, Record, Store
from .errors import DataError

__all__ = ["DIED", "Plan", "make_plan", "say", "told"]

log = logging.getLogger("dgm")
DIED = (
    f"given up: its process died in each of {MOST_ATTEMPTS} attempts, killed or out of memory (fewer --jobs need less "
    "of it); --retry tries again"
)
SHOWN = 8


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


def _given_up(plan: Plan, store: Store) -> Iterator[str]:
    """A line for each job that has cells given up: which, how many, why."""
    for job in plan.jobs:
        lost = [key for key in job.keys if key in plan.poisoned]
        if lost:
            record, first = store.read(lost[0]), job.cells[job.keys.index(lost[0])]
            why = str(record.row["status"]) if record is not None else DIED
            yield f"{first.task}, {first.guide} ({len(lost)} of {len(job.keys)} cells): {why}"


def say(plan: Plan, store: Store, retry: bool) -> None:
    """Tell what a run is about to do, and what it will not."""
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
        lines = list(_given_up(plan, store))
        more = [f"and {len(lines) - SHOWN} jobs more"] if len(lines) > SHOWN else []
        log.warning(
            "%d cells failed in %d attempts and are not tried again; the same command with --retry tries them:\n%s",
            len(plan.poisoned),
            MOST_ATTEMPTS,
            "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more]),
        )
