"""CPU and wall time of a training step: stock Pyro, PyTorch by hand, NumPyro and dgm in every mode, in turns.

Protocol. A job is one case with one number of threads, in a process of its own that holds all candidates. In a round
every candidate has a turn of some tenths of a second; from round to round another begins. A cell is a candidate's turn
in one round, per step and replica; targets are ratios of medians over rounds, and only of one job. CPU time is that of
all threads of the process. In the timing: drawing the row numbers of fresh minibatches with replacement, taking these
rows of data held in memory, noise, loss, gradients and Adam (1e-3). Where the library gives the loss at each step
(Pyro, dgm.SVI) or one reads it (by hand), it becomes a float at each step; NumPyro and replicas hand it over once a
turn, a scanned NumPyro takes its row numbers in blocks. Not in the timing: import, start, compilation, the first steps.
"One thread" binds the process to one core, so that XLA's pools share it. Stock Pyro is written as in its tutorials, and
runs dgm's own pair ("same pair"); both validate, as shipped. First steps have a fresh process each: import, data and
construction are apart; the compiler's cache on disk is empty, or ("second process") has what the first process left.
Peak memory is the resident memory of that process. `compare` is timed once, end to end.

    dgm bench run speed --budget short
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_results import Results
from dgm.errors import TrainingError
from dgm.page import Drawn

from .speed_cases import CASES, SCALING, find_case
from .speed_report import check_frame, growth_table, measured, picture, step_table
from .speed_worker import TABLE, candidates
from .speed_worker import main as worker

SCALED = ("pyro", "by hand", "by hand, vmapped", "numpyro scan", "dgm trace", "dgm inductor")
FIRST = {
    "vae20": ("pyro", "by hand", "by hand, compiled", "numpyro jit", "numpyro scan", "dgm eager", "dgm trace",
              "dgm inductor", "dgm auto"),
    "bnn32x20": ("numpyro scan", "dgm trace", "dgm inductor", "dgm auto"),
}  # fmt: skip
THREADS = {"one": "one thread", "all": "all threads"}
COMPILED = ("by hand, compiled", "dgm inductor")
SECOND = ", second process"
BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {
        "cases": ("vae20", "bnn32x20"), "threads": ("one",), "only": ("pyro", "by hand", "dgm trace"),
        "turn": {"rounds": 2, "steps": 3}, "scaling": (), "first": {"vae20": ("by hand", "dgm trace")}, "compare": {},
    },
    "short": {
        "cases": ("vae20", "vae128", "bnn32x20", "bnn100x20"), "threads": ("one", "all"), "only": TABLE,
        "turn": {"rounds": 5, "turn_s": 0.4}, "scaling": (), "first": FIRST,
        "compare": {"epochs": 1000, "seeds": 20, "stock_steps": 300},
    },
    "full": {
        "cases": tuple(CASES), "threads": ("one", "all"), "only": TABLE,
        "turn": {"rounds": 7, "turn_s": 0.4}, "scaling": tuple(SCALING), "first": FIRST,
        "compare": {"epochs": 1000, "seeds": 20, "stock_steps": 300},
    },
}  # fmt: skip
TIMEOUT = 3600.0
PACKAGES = ("numpyro", "jax", "optax")


def cells(budget: str) -> list[Cell]:
    """Every candidate of every case and number of threads in each round; first steps; `compare` beside stock SVI."""
    size, found = BUDGET[budget], list[Cell]()
    timed = [("cases", case, threads, size["only"]) for case in size["cases"] for threads in size["threads"]]
    timed += [("scaling", case, "all", SCALED) for case in size["scaling"]]
    for part, case, threads, only in timed:
        settings = {"part": part, "case": case, "threads": threads, **size["turn"]}
        for name in candidates(find_case(case)):
            if name in only:
                found += [Cell(f"{case}, {THREADS[threads]}", name, k, settings) for k in range(settings["rounds"])]
    for case, names in size["first"].items():
        for name in names:
            for after in ("", SECOND) if name in COMPILED else ("",):
                settings = {"part": "first", "case": case, "threads": "all"}
                found.append(Cell(f"{case}, first step", name + after, 0, settings))
    if size["compare"]:
        settings = {"part": "compare", "case": "compare", "threads": "all", **size["compare"]}
        found += [Cell("compare, end to end", name, 0, settings) for name in ("dgm compare", "pyro, same pair")]
    return found


def run(cells: Sequence[Cell]) -> Iterator[Any]:
    """Rows of one task; an error in place of a row where a candidate cannot be had."""
    settings = cells[0].settings
    count = 1 if settings["threads"] == "one" else os.cpu_count() or 1
    about = {"threads_used": count, "busy": busy(), "rivals": rivals()}
    job = {"case": settings["case"], "threads": count}
    kinds = {"first": first_steps, "compare": end_to_end}
    for row in kinds.get(settings["part"], turns)(cells, job):
        yield row if isinstance(row, Exception) else {**row, **about}


def busy(wait: float = 1.0) -> float | None:
    """Share of the processor's time that other programs use, all cores together; None where it cannot be known."""

    def spent() -> tuple[int, int]:
        ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]  # idle, and waiting for a disk

    try:
        all_, idle = spent()
        time.sleep(wait)
        later, later_idle = spent()
    except (OSError, ValueError, IndexError):
        return None
    return 1.0 - (later_idle - idle) / max(later - all_, 1)


def turns(cells: Sequence[Cell], job: dict[str, Any]) -> Iterator[Any]:
    """A row for each candidate and round."""
    settings = cells[0].settings
    names = list(dict.fromkeys(cell.guide for cell in cells))
    timing = {"rounds": settings["rounds"], "seconds": settings.get("turn_s", 0.0), "steps": settings.get("steps")}
    found = in_process({"job": "time", **job, **timing, "only": names})
    for cell in cells:
        if cell.guide not in found["candidates"]:
            yield TrainingError(found["skipped"].get(cell.guide, "the case has no such candidate"))
            continue
        figures = found["candidates"][cell.guide]
        yield {
            "cpu_ms": figures["cpu_ms"]["values"][cell.repeat], "wall_ms": figures["wall_ms"]["values"][cell.repeat],
            "steps_a_turn": figures["steps_a_turn"], "replicas": figures["replicas"],
            "first_loss": figures["first_loss"], "last_loss": figures["last_loss"],
            "build_s": figures["build_s"], "first_block_s": figures["first_block_s"],
            "job_seconds": figures["spent_wall_s"] / settings["rounds"],
            "job_cpu_seconds": figures["spent_cpu_s"] / settings["rounds"],
        }  # fmt: skip


def first_steps(cells: Sequence[Cell], job: dict[str, Any]) -> Iterator[Any]:
    """A fresh process for each candidate: with an empty cache, or with that of the candidate's process before."""
    failed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            name = cell.guide.removesuffix(SECOND)
            try:
                if name in failed:
                    raise TrainingError("the first process failed")
                found = in_process({"job": "first", **job, "candidate": name}, str(Path(folder) / name))
            except TrainingError as error:
                failed.add(name)
                yield error
                continue
            kept = ("import_s", "build_s", "first_step_s", "memory_before_mib", "memory_peak_mib")
            yield {**{key: found[key] for key in kept}, "job_cpu_seconds": found["process_cpu_s"]}


def end_to_end(cells: Sequence[Cell], job: dict[str, Any]) -> Iterator[Any]:
    """`dgm.compare`, and the same cells one after another through stock SVI."""
    settings = cells[0].settings
    found = in_process({"job": "compare", **job, **{k: settings[k] for k in ("epochs", "seeds", "stock_steps")}})
    about = {"data": found["data"], "steps_a_cell": found["steps_a_cell"], "cells": found["cells"]}
    if found["failed"]:
        raise TrainingError(f"cells of the comparison failed: {found['failed']}")
    for cell in cells:
        side = found["dgm" if cell.guide.startswith("dgm") else "stock"]
        yield {**about, "wall_s": side["wall_s"], "cpu_s": side["cpu_s"], "job_cpu_seconds": found["process_cpu_s"] / 2}


def in_process(job: dict[str, Any], cache: str | None = None) -> dict[str, Any]:
    """Run a job of `speed_worker` in a fresh process whose thread pools have the job's size.

    Raises:
        TrainingError: the process failed; the message is its last line.
    """
    threads = str(job["threads"])
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    if cache is not None:
        env["TORCHINDUCTOR_CACHE_DIR"] = cache
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        text = json.dumps(job | {"launched": time.time(), "parent": os.getpid()})
        command = [sys.executable, "-m", worker.__module__, text, str(out)]
        try:
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise TrainingError(f"not done after {TIMEOUT:.0f} s") from None
        if run.returncode or not out.exists():
            raise TrainingError((run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1])
        return dict(json.loads(out.read_text(encoding="utf-8")))


def rivals() -> str:
    """Versions of what is timed beside ours."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def seconds(cell: Cell) -> float:
    """A rough estimate."""
    settings = cell.settings
    compiled = cell.guide.startswith(("dgm inductor", "by hand, compiled", "numpyro"))
    if settings["part"] == "compare":
        return 150.0
    if settings["part"] == "first":
        return 15.0 if compiled else 5.0
    return (15.0 if compiled else 2.0) / settings["rounds"] + settings.get("turn_s", 0.1)


def checks(results: Results) -> pd.DataFrame:
    """The targets; a smoke run measures nothing that could be held against them."""
    return pd.DataFrame() if results.plan["budget"] == "smoke" else check_frame(measured(results))


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Medians by case and candidate, and what grows."""
    found = measured(results)
    out = {"Median CPU milliseconds of a step and replica": step_table(found["cases"])}
    if found["scaling"]:
        out["What grows: median CPU milliseconds of a step and replica"] = growth_table(found["scaling"])
    return out


def figures(results: Results) -> list[Drawn]:
    """CPU time by case, and as sizes grow."""
    text = "Logarithmic: a decade to the left is ten times as fast. Lines from the smallest to the largest round."
    return [("speed", "CPU time of a step and replica", text, picture(measured(results)))]


def notes(results: Results) -> list[str]:
    """What a reader must know."""
    rows = results.good
    others = float(pd.to_numeric(rows["busy"]).max())
    out = ["a row holds one turn; the checks hold ratios of medians over the turns of one job against the targets"]
    if results.plan["budget"] == "smoke":
        out.append("smoke: turns of three steps show that everything runs; these are no measurements")
    if others > 0.1:
        out.append(f"the machine was not quiet: just before a job, other programs used up to {others:.0%} of its cores")
    return [*out, f"rivals: {'; '.join(dict.fromkeys(rows['rivals']))}; pip install 'dgm[bench]' installs NumPyro"]


SUITE = Suite(
    "speed",
    cells,
    run,
    [
        Metric("cpu_ms", "lower", "CPU ms", "processor time of a step and replica, milliseconds, of all threads"),
        Metric("wall_ms", "lower", "wall ms", "the same by the clock"),
        Metric("first_step_s", "lower", "first step, s", "of a fresh process, without import and construction"),
        Metric("import_s", None, "import, s"),
        Metric("memory_peak_mib", "lower", "peak MiB", "largest resident memory of that process"),
        Metric("wall_s", "lower", "wall s", "of all cells of the comparison; of stock SVI training alone"),
        Metric("cpu_s", "lower", "CPU s, all"),
        Metric("last_loss", None, "last loss", "of a datum, nats: what was timed has trained"),
    ],
    summary="Time of a training step: stock Pyro, PyTorch by hand, NumPyro and dgm in every mode, in turns",
    repeats="round",
    group_by=("task",),
    timed=True,
    seconds=seconds,
    checks=checks,
    tables=tables,
    figures=figures,
    notes=notes,
)  # fmt: skip
