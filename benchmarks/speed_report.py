"""What the rows of `speed` amount to: ratios of medians against the targets, tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dgm.bench_results import Results
from dgm.style import COLOURS, DASHES, INK, MARKERS, styled

from .speed_cases import find_case
from .speed_worker import spread

HAND, PYRO = ("by hand",), ("pyro", "pyro, same pair")
NUMPYRO = ("numpyro scan", "numpyro scan, optax", "numpyro jit")
ORDER = (
    "pyro", "pyro, validation off", "pyro, same pair", "by hand", "by hand, compiled", "by hand, vmapped",
    "numpyro jit", "numpyro scan", "numpyro scan, optax", "dgm eager", "dgm trace", "dgm inductor", "dgm auto",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A ratio of medians of CPU time that must not be exceeded; of several rivals the fastest counts."""

    what: str
    case: str
    rivals: tuple[str, ...]
    limit: float
    ours: str = "dgm inductor"


TARGETS = (
    *(Target("CPU time against PyTorch by hand", c, HAND, limit) for c, limit in (("vae20", 0.8), ("vae128", 0.95))),
    *(Target("CPU time against NumPyro's best", c, NUMPYRO, 1.0) for c in ("vae20", "vae128")),
    *(Target("CPU time against stock Pyro", c, PYRO, limit) for c, limit in (("vae20", 0.3), ("vae128", 0.55))),
    Target("CPU time against stock Pyro", "bnn32x20", PYRO, 1 / 200),
    Target("CPU time against stock Pyro", "bnn100x20", PYRO, 1 / 120),
    Target("CPU time against NumPyro's vmapped scan", "bnn32x20", NUMPYRO[:2], 0.6),
    Target("CPU time against NumPyro's vmapped scan", "bnn100x20", NUMPYRO[:2], 0.75),
    *(Target("CPU time against stock Pyro", c, PYRO, 1 / 25, "dgm trace") for c in ("bnn32x20", "bnn100x20")),
)

FIRST = (("dgm trace", 1.5), ("dgm inductor, second process", 6.0))  # seconds to the end of the first step
COMPARE = 1 / 20


def measured(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Rows by part and job: figures of a candidate are spreads over its rounds."""
    found: dict[str, list[dict[str, Any]]] = {"cases": [], "scaling": [], "first": [], "compare": []}
    for (part, task), rows in results.good.groupby(["part", "task"], sort=False):
        head = rows.iloc[0]
        job: dict[str, Any] = {"task": task, "case": head["case"], "threads": int(head["threads_used"])}
        if part == "compare":
            sides = {name: one.iloc[0].to_dict() for name, one in rows.groupby("guide")}
            if len(sides) == 2:
                job |= {"cells": int(head["cells"]), "steps_a_cell": int(head["steps_a_cell"]), "sides": sides}
                found["compare"].append(job)
        elif part == "first":
            found["first"] += [
                {**job, "candidate": str(name), "first_step_s": float(seconds)}
                for name, seconds in zip(rows["guide"], rows["first_step_s"], strict=True)
            ]
        else:
            case = find_case(str(head["case"]))
            figures = {
                str(name): {unit: spread([float(v) for v in one[unit]]) for unit in ("cpu_ms", "wall_ms")}
                for name, one in rows.groupby("guide", sort=False)
            }
            found[str(part)].append({**job, "axis": case.axis, "value": case.value, "candidates": figures})
    return found


def targets(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each target that the run holds figures for: task, what, ours, target, obtained, met, against."""
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        for job in found["cases"]:
            medians = {n: f["cpu_ms"]["median"] for n, f in job["candidates"].items()}
            rivals = {n: medians[n] for n in target.rivals if n in medians}
            if job["case"] != target.case or target.ours not in medians or not rivals:
                continue
            best = min(rivals, key=lambda name: rivals[name])
            rows.append(_row(job, target.ours, target.what, target.limit, medians[target.ours] / rivals[best], best))
    for name, limit in FIRST:
        for job in found["first"]:
            if job["candidate"] == name:
                rows.append(_row(job, name, "first step, seconds", limit, job["first_step_s"], ""))
    for job in found["compare"]:
        ours, stock = (job["sides"][name]["wall_s"] for name in ("dgm compare", "pyro, same pair"))
        what = f"wall time of {job['cells']} cells of {job['steps_a_cell']} steps, against stock Pyro"
        rows.append(_row(job, "dgm compare", what, COMPARE, ours / stock, "pyro, same pair"))
    return rows


def _row(job: Mapping[str, Any], ours: str, what: str, limit: float, obtained: float, against: str) -> dict[str, Any]:
    return {
        "task": job["task"], "what": what, "ours": ours, "target": limit, "obtained": obtained,
        "met": obtained <= limit, "against": against,
    }  # fmt: skip


def check_frame(found: Mapping[str, Any]) -> pd.DataFrame:
    """Targets as the report's checks."""
    return pd.DataFrame(
        {
            "task": row["task"], "guide": row["ours"], "metric": row["what"], "value": row["obtained"],
            "expected": f"at most {ratio(row['target'])}", "tolerance": math.nan,
            "fastest of them": row["against"] or "–", "verdict": "agree" if row["met"] else "miss",
        }
        for row in targets(found)
    )  # fmt: skip


def ratio(value: float) -> str:
    """A ratio as people say it.

    >>> ratio(0.8), ratio(1 / 200), ratio(1.5)
    ('0.80', '1/200', '1.50')
    """
    return f"1/{1 / value:.0f}" if 0 < value < 0.1 else f"{value:.2f}"


def step_table(jobs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Cases down, candidates across."""
    names = _in_order({name for job in jobs for name in job["candidates"]})
    rows = [[job["task"], *(_median(job, name) for name in names)] for job in jobs]
    return pd.DataFrame(rows, columns=["case", *names])


def growth_table(jobs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What grows and how far down, candidates across."""
    names = _in_order({name for job in jobs for name in job["candidates"]})
    rows = [[f"{job['axis']}: {job['value']}", *(_median(job, name) for name in names)] for job in jobs]
    return pd.DataFrame(rows, columns=["what grows", *names])


def _median(job: Mapping[str, Any], name: str) -> float:
    return float(job["candidates"][name]["cpu_ms"]["median"]) if name in job["candidates"] else math.nan


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=ORDER.index)


# --------------------------------------------------------------------------------------------------- picture


@styled
def picture(result: Mapping[str, Any]) -> Figure:
    """CPU time per replica and step: the cases above, what grows below; the largest number of threads of the run."""
    threads = max((job["threads"] for job in [*result["cases"], *result["scaling"]]), default=1)
    jobs = [job for job in result["cases"] if job["threads"] == threads]
    scaled = [job for job in result["scaling"] if job["threads"] == threads]
    axes_names = list(dict.fromkeys(job["axis"] for job in scaled))
    heights = ([max(2.0, 0.42 * len(jobs))] if jobs else []) + ([2.4] if axes_names else [])
    figure = Figure(figsize=(8.0, sum(heights) + 1.0), layout="constrained")
    if not heights:
        return figure
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    looks = _looks([*jobs, *scaled])
    if jobs:
        _cases(parts[0].subplots(), jobs, looks)
    if axes_names:
        below = parts[-1].subplots(1, len(axes_names), squeeze=False)[0]
        for axes, axis in zip(below, axes_names, strict=True):
            _growth(axes, axis, [job for job in scaled if job["axis"] == axis], looks)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_legend_handles_labels()[0]}
    names = [name for name in ORDER if name in handles]
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK
    )
    return figure


def _looks(jobs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Any, str]]:
    """Colour by who, marker and dash by how."""
    names = _in_order({name for job in jobs for name in job["candidates"]})
    makers = list(dict.fromkeys(name.split(",")[0].split()[0] for name in ORDER))
    seen: dict[str, int] = {}
    looks = {}
    for name in names:
        maker = name.split(",")[0].split()[0]
        turn = seen[maker] = seen.get(maker, -1) + 1
        colour = COLOURS[makers.index(maker) % len(COLOURS)]
        looks[name] = (colour, DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)])
    return looks


def _cases(axes: Axes, jobs: Sequence[Mapping[str, Any]], looks: Mapping[str, tuple[str, Any, str]]) -> None:
    for name, (colour, _, marker) in looks.items():
        here = [(i, job["candidates"][name]["cpu_ms"]) for i, job in enumerate(jobs) if name in job["candidates"]]
        if not here:
            continue
        rows, figures = [i for i, _ in here], [f for _, f in here]
        axes.plot([f["median"] for f in figures], rows, linestyle="", marker=marker, color=colour, ms=5, label=name)
        axes.hlines(rows, [f["min"] for f in figures], [f["max"] for f in figures], color=colour, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(jobs)), [str(job["case"]) for job in jobs])
    axes.set_ylim(len(jobs) - 0.5, -0.5)
    axes.grid(True, axis="both", color=INK, alpha=0.18, linewidth=0.6)
    axes.set_title(f"CPU time of a step and replica (ms), threads: {jobs[0]['threads']}; median, smallest to largest")


def _growth(
    axes: Axes, axis: str, jobs: Sequence[Mapping[str, Any]], looks: Mapping[str, tuple[str, Any, str]]
) -> None:
    for name, (colour, dash, marker) in looks.items():
        here = [(job["value"], job["candidates"][name]["cpu_ms"]) for job in jobs if name in job["candidates"]]
        if here:
            axes.plot(
                [x for x, _ in here], [f["median"] for _, f in here], linestyle=dash, marker=marker, color=colour,
                ms=3.5, linewidth=1.2, label=name,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, axis="both", color=INK, alpha=0.18, linewidth=0.6)
    axes.set_title(axis)
