"""Pictures of a suite's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .bench_cells import Metric
from .bench_registry import Published, means_of
from .bench_results import Results
from .style import COLOURS, INK, shorten, styled

__all__ = ["cost_figure", "score_figure"]

PANELS = 18
SPREAD = 6.0


@styled
def score_figure(results: Results, metric: Metric, tasks: Sequence[str], numbers: Sequence[Published]) -> Figure:
    """A panel for each task: guides by their mean with two standard errors; grey lines are published values.

    A guide far behind the others stands at the edge, with an arrow.
    """
    means = means_of(results.rows, [metric.name])
    guides = {t: list(dict.fromkeys(means[means["task"] == t]["guide"])) for t in tasks}
    groups = _together({t: guides[t] for t in [t for t in tasks if guides[t]][:PANELS]})
    shape = [(min(3, len(own)), math.ceil(len(own) / 3), list(dict.fromkeys(g for t in own for g in guides[t])))
             for own in groups]  # fmt: skip
    heights = [lines * (0.7 + 0.2 * len(names)) for _, lines, names in shape]
    wide = max((columns for columns, *_ in shape), default=1) > 1
    figure = Figure(figsize=(10.0 if wide else 7.2, sum(heights) or 1.0), layout="constrained")
    parts = figure.subfigures(max(1, len(groups)), 1, height_ratios=heights or [1.0], squeeze=False)[:, 0]
    for part, own, (columns, lines, names) in zip(parts, groups, shape, strict=False):
        grid = part.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in grid.ravel()[len(own) :]:
            axes.axis("off")
        for axes, task in zip(grid.ravel(), own, strict=False):
            known = [p for p in numbers if p.task == task and p.metric == metric.name]
            _panel(axes, means[means["task"] == task].set_index("guide"), names, metric, known)
            axes.set_title(shorten(task, 34), parse_math=False)
        grid[0, 0].set_yticks(range(len(names)), [shorten(g, 28) for g in names])
        grid[0, 0].invert_yaxis()
    return figure


def _together(guides: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Tasks in groups: those that share half of their guides with the first of a group stand side by side.

    >>> _together({"a": ["x", "y"], "b": ["u"], "c": ["x"]})
    [['a', 'c'], ['b']]
    """
    groups: list[list[str]] = []
    for task, own in guides.items():
        for group in groups:
            if 2 * len(set(own) & set(guides[group[0]])) >= len(own):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def _panel(
    axes: Axes, means: pd.DataFrame, guides: Sequence[str], metric: Metric, numbers: Sequence[Published]
) -> None:
    values = means["value"].astype(float)
    low, high = _limits(values, [p.value for p in numbers], metric)
    for one in numbers:
        if low <= one.value <= high:
            axes.axvline(one.value, color=INK, linewidth=0.8, alpha=0.5, linestyle=(0, (1, 1.5)))
    for place, guide in enumerate(guides):
        axes.axhline(place, color=INK, linewidth=0.4, alpha=0.18)
        if guide not in means.index or not np.isfinite(values[guide]):
            continue
        colour, value = COLOURS[place % len(COLOURS)], float(values[guide])
        if not low <= value <= high:
            axes.plot(high if value > high else low, place, ">" if value > high else "<", color=colour, markersize=5)
            continue
        error = 2 * float(means["se"].fillna(0.0)[guide])
        axes.errorbar(value, place, xerr=error, fmt="o", color=colour, markersize=4, linewidth=1.4)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(metric.title)
    axes.tick_params(axis="y", length=0)


def _limits(values: pd.Series, published: Sequence[float], metric: Metric) -> tuple[float, float]:
    finite = values[np.isfinite(values)].to_numpy()
    if not len(finite):
        return 0.0, 1.0
    middle, spread = float(np.median(finite)), float(np.median(np.abs(finite - np.median(finite))))
    reach = SPREAD * max(spread, 1e-3 * abs(middle), 1e-12) if len(finite) > 4 else math.inf
    near = finite[np.abs(finite - middle) <= reach]
    inside = [p for p in published if abs(p - middle) <= SPREAD * max(spread, 1e-3 * abs(middle), 1e-12)]
    return float(min([*near, *inside])), float(max([*near, *inside]))


def cost_figure(results: Results, metric: Metric, tasks: Sequence[str]) -> Figure | None:
    """What a guide costs against its mean place, over the tasks that all guides have; None where nothing is to see."""
    if not len(results.costs) or "job_cpu_seconds" not in results.costs:
        return None
    rows = results.good.merge(results.costs[["key", "job_cpu_seconds"]], on="key")
    rows = rows[rows["task"].isin(tasks) & np.isfinite(pd.to_numeric(rows[metric.name], errors="coerce"))]
    means = rows.pivot_table(index="guide", columns="task", values=metric.name, aggfunc="mean", sort=False)
    means = means.dropna(axis=1)
    if means.empty or len(means) < 2:
        return None
    places = means.rank(ascending=metric.better != "higher").mean(axis=1)
    cost = rows.groupby("guide")["job_cpu_seconds"].mean().reindex(means.index)
    return _cost(cost, places, f"mean place in {metric.title}, {means.shape[1]} tasks")


@styled
def _cost(cost: pd.Series, places: pd.Series, label: str) -> Figure:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for place, guide in enumerate(cost.index):
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(cost[guide], places[guide], "o", color=colour, markersize=5)
        axes.annotate(
            shorten(guide, 26), (cost[guide], places[guide]), (5, 3), textcoords="offset points", fontsize=7,
            parse_math=False,
        )  # fmt: skip
    if cost.min() > 0 and cost.max() > 8 * cost.min():
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds of a cell")
    axes.set_ylabel(label)
    return figure
