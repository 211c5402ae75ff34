"""What the figures of `speed` amount to: ratios against the targets, Markdown tables and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dgm.style import COLOURS, DASHES, INK, MARKERS, styled

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
    Target("VAE, batch 20, against PyTorch by hand", "vae20", HAND, 0.8),
    Target("VAE, batch 128, against PyTorch by hand", "vae128", HAND, 0.95),
    Target("VAE, batch 20, against NumPyro's best", "vae20", NUMPYRO, 1.0),
    Target("VAE, batch 128, against NumPyro's best", "vae128", NUMPYRO, 1.0),
    Target("VAE, batch 20, against stock Pyro", "vae20", PYRO, 0.3),
    Target("VAE, batch 128, against stock Pyro", "vae128", PYRO, 0.55),
    Target("BNN, 20 replicas, batch 32, against stock Pyro", "bnn32x20", PYRO, 1 / 200),
    Target("BNN, 20 replicas, batch 100, against stock Pyro", "bnn100x20", PYRO, 1 / 120),
    Target("BNN, 20 replicas, batch 32, against NumPyro's vmapped scan", "bnn32x20", NUMPYRO[:2], 0.6),
    Target("BNN, 20 replicas, batch 100, against NumPyro's vmapped scan", "bnn100x20", NUMPYRO[:2], 0.75),
    Target("BNN, 20 replicas traced, batch 32, against stock Pyro", "bnn32x20", PYRO, 1 / 25, "dgm trace"),
    Target("BNN, 20 replicas traced, batch 100, against stock Pyro", "bnn100x20", PYRO, 1 / 25, "dgm trace"),
)

FIRST = (
    ("dgm trace", "", 1.5),
    ("dgm inductor", "warm", 6.0),
)  # candidate, cache, seconds to the end of the first step
COMPARE = 1 / 20


def targets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each target that the run holds figures for: what, threads, target, obtained, met, against."""
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        for job in result["cases"]:
            medians = {n: f["cpu_ms"]["median"] for n, f in job["candidates"].items()}
            rivals = {n: medians[n] for n in target.rivals if n in medians}
            if job["case"] != target.case or target.ours not in medians or not rivals:
                continue
            best = min(rivals, key=lambda name: rivals[name])
            rows.append(_row(target.what, job["threads"], target.limit, medians[target.ours] / rivals[best], best))
    for name, cache, limit in FIRST:
        for job in result["first"]:
            if job["candidate"] == name and job["cache"] == cache:
                what = f"{name}{', second process' if cache else ''}, first step of {job['case']} (s)"
                rows.append(_row(what, job["threads"], limit, job["first_step_s"], "seconds"))
    for job in result["compare"]:
        what = f"compare, {job['cells']} cells of {job['steps_a_cell']} steps, wall time"
        rows.append(_row(what, job["threads"], COMPARE, job["ratio_wall"], "pyro, same pair"))
    return rows


def _row(what: str, threads: int, limit: float, obtained: float, against: str) -> dict[str, Any]:
    return {
        "what": what, "threads": threads, "target": limit, "obtained": obtained, "met": obtained <= limit,
        "against": against,
    }  # fmt: skip


def ratio(value: float) -> str:
    """A ratio as people say it.

    >>> ratio(0.8), ratio(1 / 200), ratio(1.5)
    ('0.80', '1/200', '1.50')
    """
    return f"1/{1 / value:.0f}" if 0 < value < 0.1 else f"{value:.2f}"


def target_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Targets as Markdown."""
    lines = ["| target | threads | at most | obtained | against | |", "|---|---|---|---|---|---|"]
    for row in rows:
        shown = ratio if row["against"] != "seconds" else "{:.1f} s".format
        lines.append(
            f"| {row['what']} | {row['threads']} | {shown(row['target'])} | {shown(row['obtained'])} | "
            f"{row['against']} | {'met' if row['met'] else '**missed**'} |"
        )
    return "\n".join(lines)


def case_table(jobs: Iterable[Mapping[str, Any]]) -> str:
    """CPU and wall milliseconds per replica and step, median (smallest to largest), as Markdown."""
    lines = ["| case | threads | candidate | CPU ms | wall ms | loss a datum |", "|---|---|---|---|---|---|"]
    for job in jobs:
        for name in _in_order(job["candidates"]):
            figures = job["candidates"][name]
            lines.append(
                f"| {job['case']} | {job['threads']} | {name} | {_spread(figures['cpu_ms'])} | "
                f"{_spread(figures['wall_ms'])} | {figures['first_loss']:.4g} to {figures['last_loss']:.4g} |"
            )
        for name, why in job["skipped"].items():
            lines.append(f"| {job['case']} | {job['threads']} | {name} | – | – | {why} |")
    return "\n".join(lines)


def first_table(jobs: Iterable[Mapping[str, Any]]) -> str:
    """First steps and peak memory as Markdown."""
    lines = [
        "| case | candidate | compiler's cache | import s | build s | first step s | peak MiB | of it before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in jobs:
        lines.append(
            f"| {job['case']} | {job['candidate']} | {job['cache'] or '–'} | {job['import_s']:.1f} | "
            f"{job['build_s']:.2f} | {job['first_step_s']:.2f} | {job['memory_peak_mib']:.0f} | "
            f"{job['memory_before_mib']:.0f} |"
        )
    return "\n".join(lines)


def markdown(result: Mapping[str, Any]) -> str:
    """The whole run as a page: provenance, targets, tables."""
    head = [f"{key}: {result[key]}" for key in ("command", "commit", "hardware", "versions", "date")]
    parts = ["\n".join(f"* {line}" for line in head), target_table(targets(result)), case_table(result["cases"])]
    parts += [case_table(result["scaling"])] if result["scaling"] else []
    parts += [first_table(result["first"])] if result["first"] else []
    parts += [compare_text(job) for job in result["compare"]]
    parts += [f"failed: {line}" for line in result["failed"]]
    return "\n\n".join(part for part in parts if part.count("\n") != 1) + "\n"


def compare_text(job: Mapping[str, Any]) -> str:
    """What the end-to-end comparison took, and how its rival's time came about."""
    ours, stock = job["dgm"], job["stock"]
    return (
        f"compare on {job['data']}: {job['cells']} cells of {job['steps_a_cell']} steps, {ours['wall_s']:.0f} s (CPU "
        f"{ours['cpu_s']:.0f} s), evaluation included; stock SVI, training alone, extrapolated from "
        f"{stock['timed_steps']} steps of each family: {stock['wall_s']:.0f} s (CPU {stock['cpu_s']:.0f} s). "
        f"Cells that failed: {job['failed'] or 'none'}."
    )


def _spread(figures: Mapping[str, float]) -> str:
    return f"{figures['median']:.3g} ({figures['min']:.3g} to {figures['max']:.3g})"


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
