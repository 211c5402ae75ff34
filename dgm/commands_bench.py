"""`dgm bench run`, `list` and `report`."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import joblib

from .bench import Stopped, run_suite
from .bench_compose import compose
from .bench_find import find_suite, suites
from .bench_plan import make_plan, told
from .bench_report import Report, make_report, write_report
from .bench_store import Store
from .commands import INTERRUPTED, OK, SOME_FAILED, plural
from .errors import OptionError
from .page import write_text

__all__ = ["run_bench", "run_bench_list", "run_bench_report"]

TERMINATED = 143
RESULTS = "RESULTS.md"


def run_bench(
    name: str,
    filters: Sequence[str],
    *,
    jobs: int,
    budget: str,
    out: Path | None,
    dry_run: bool = False,
    renew: bool = False,
    retry: bool = False,
) -> int:
    """Run a suite, tell its verdicts, write its report; 1 where a cell failed, was skipped, or misses its tolerance."""
    suite = find_suite(name)
    suite.workers(jobs)
    folder = out if out is not None else Path("dgm-runs") / f"bench-{suite.name}-{budget}"
    if jobs > joblib.cpu_count():
        logging.getLogger("dgm").info("%d workers on %d cores", jobs, joblib.cpu_count())
    if dry_run:
        plan = make_plan(suite, Store(folder), budget, filters, renew, retry)
        print(plan)
        if plan.seconds is not None and jobs > 1:
            print(f"with {jobs} workers about {told(plan.seconds / min(jobs, max(1, len(plan.waiting))))}")
        return OK
    asked = [False]
    try:
        with _terminable(asked):
            results = run_suite(name, folder, budget=budget, filters=filters, jobs=jobs, renew=renew, retry=retry)
    except Stopped:
        print(f"interrupted: what is finished is in {folder}; the same command goes on", file=sys.stderr)
        return TERMINATED if asked[0] else INTERRUPTED
    report = Report(results)
    page = write_report(report, folder)
    _tell(report)
    print(f"rows: {folder / 'rows.parquet'}    report: {page}")
    return SOME_FAILED if len(results.failed) or results.skipped or len(report.missed) else OK


def _tell(report: Report) -> None:
    for verdict in report.verdicts():
        print(f"{verdict['says'].rstrip('.')} ({verdict['rests']})")
    for row in report.missed.to_dict("records"):
        print("outside: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    for _, lost in report.results.failed.head(20).iterrows():
        print(f"failed: {lost['task']}, {lost['guide']}: {lost['status']}")


@contextmanager
def _terminable(asked: list[bool]) -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        asked[0] = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_bench_list() -> int:
    """One line for each suite."""
    found = suites()
    width = max(map(len, found), default=0)
    for name, (_, summary) in found.items():
        print(f"  {name.ljust(width)}  {summary}")
    return OK


def run_bench_report(source: str | None, *, out: Path | None, all_: bool) -> int:
    """Write a report from rows that are there; nothing is computed."""
    committed = Path(next(iter(importlib.import_module("dgm.benchmarks").__path__))) / "results"  # by name: not core
    if all_:
        path = write_text(compose(committed), out if out is not None else committed / RESULTS)
        print(f"report: {path}")
        return OK
    if source is None:
        raise OptionError("which results? Give a suite, a folder of results, or --all")
    folder = Path(source)
    if not folder.is_dir():
        if source not in suites():
            raise OptionError(f"{source!r} is no folder, and no suite: {', '.join(suites())}")
        folder = committed / source.replace("-", "_")
    report = make_report(folder)
    page = write_report(report, out if out is not None else folder)
    _tell(report)
    print(f"{plural(len(report.results.rows), 'row')}; report: {page}")
    return OK
