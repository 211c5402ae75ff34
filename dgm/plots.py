"""Pictures of a comparison as matplotlib figures: no pyplot, no backend, no settings left behind.

Colours follow the order of the guides, the same in every picture, and are legible on white and on black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .errors import DataError
from .style import COLOURS, DASHES, INK, MARKERS, count, limit, ordered, share, shorten, styled


def _look(i: int) -> tuple[str, Any, str]:
    turn = i // len(COLOURS) % len(DASHES)
    return COLOURS[i % len(COLOURS)], DASHES[turn], MARKERS[turn]


def _grid(axes: Axes, axis: Any = "y") -> None:
    axes.grid(True, axis=axis, color=INK, alpha=0.18, linewidth=0.6)
    axes.set_axisbelow(True)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as needed to lie within [0, 1] and at least a gap apart, in their order."""
    order = np.argsort(np.asarray(heights), kind="stable")
    gap = min(gap, 1.0 / max(len(heights) - 1, 1))
    blocks: list[
        tuple[float, int]
    ] = []  # (start of block, labels in it); blocks that touch are merged around their mean
    for i in order:
        start, size = float(np.clip(heights[i], 0.0, 1.0)), 1
        while blocks and start < blocks[-1][0] + gap * blocks[-1][1]:
            before, n = blocks.pop()
            start = (before * n + (start - gap * n) * size) / (n + size)
            size += n
            start = min(max(start, 0.0), 1.0 - gap * (size - 1))
        blocks.append((start, size))
    placed = [start + gap * k for start, size in blocks for k in range(size)]
    out = [0.0] * len(placed)
    for where, i in zip(placed, order, strict=True):
        out[i] = where
    return out


def _label_right(axes: Axes, ends: Sequence[tuple[str, float, float, str]], gap: float = 0.066) -> None:
    """Name each (name, x, y, colour) at the right of the axes, with a thin line that leads to it."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    heights = _spread([(y - low) / (high - low) for _, _, y, _ in ends], gap)
    log = axes.get_xscale() == "log"
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        at = np.log(x / left) / np.log(right / left) if log else (x - left) / (right - left)
        start = float(np.clip((y - low) / (high - low), 0.0, 1.0))
        line: dict[str, Any] = {"color": colour, "linewidth": 0.7, "clip_on": False, "transform": axes.transAxes}
        axes.plot([float(at), 1.0], [start, height], alpha=0.45, **line)
        axes.plot([1.0, 1.02], [height, height], **{**line, "linewidth": 2.0})
        axes.text(1.03, height, shorten(name), transform=axes.transAxes, va="center", fontsize=8, parse_math=False)


def _curves(history: pd.DataFrame, column: str, points: int = 240) -> dict[str, pd.DataFrame]:
    """For each guide a frame (cost × seed): neighbouring steps averaged, so that a page stays small."""
    frame = history[["guide", "seed", "evaluations", column]].replace([np.inf, -np.inf], np.nan).dropna()
    out = {}
    for guide, part in frame.groupby("guide", sort=False):
        width = max(float(part["evaluations"].max()) / points, 1e-9)
        part = part.assign(bin=np.ceil(part["evaluations"] / width).astype(int))
        table = part.pivot_table(index="bin", columns="seed", values=column, aggfunc="mean")
        table.index = pd.Index(part.groupby("bin")["evaluations"].mean().to_numpy(), name="evaluations")
        out[str(guide)] = table.interpolate(limit_area="inside")
    return out


def _curve_limits(panels: Sequence[dict[str, pd.DataFrame]]) -> tuple[float, float]:
    """Limits that show where the curves end; an early explosion or one lost guide leaves the frame instead."""
    tables = [table for panel in panels for table in panel.values()]
    values = np.concatenate([t.to_numpy().ravel() for t in tables])
    values = values[np.isfinite(values)]
    high = float(values.max())
    ends = np.array([t.ffill().iloc[-1].mean() for t in tables])
    typical = high - float(np.median(ends))
    low = float(np.percentile(values, 12))
    low = max(low, high - max(6.0 * (high - float(np.median(values))), 1e-3 * abs(high), 1e-6))
    near = ends[ends > high - 20.0 * max(typical, 1e-3 * abs(high))]  # a guide that merely lags stays in the frame
    low = min(low, float(near.min())) if len(near) else low
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


@styled
def training_curves(history: pd.DataFrame, order: Sequence[str] | None = None) -> Figure:
    """Training (and, where measured, validation) ELBO against model density evaluations; thin: a seed, thick: the mean.

    Args:
        history: columns guide, seed, evaluations, elbo and perhaps valid_elbo, in nats for each datum.
        order: names of guides in the order of their colours (default: as they come).

    Raises:
        DataError: nothing finite to draw.

    >>> frame = pd.DataFrame({"guide": "g", "seed": 0, "evaluations": [10, 20], "elbo": [-3.0, -2.0]})
    >>> len(training_curves(frame).axes)
    1
    """
    titles = {"elbo": "training data", "valid_elbo": "validation data"}
    panels = {c: _curves(history, c) for c in titles if c in history}
    panels = {c: panel for c, panel in panels.items() if panel}
    if not panels:
        raise DataError("history: expected at least one finite value in 'elbo', found none; was anything trained?")
    figure = Figure(figsize=(10.0, 3.5), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [name for panel in panels.values() for name in panel]
    limits = _curve_limits(list(panels.values()))
    for axes, (column, panel) in zip(grid, panels.items(), strict=True):
        ends = []
        for i, name in ordered(names, order):
            if name not in panel:
                continue
            colour, dash, _ = _look(i)
            table = panel[name]
            axes.plot(table.index, table, color=colour, linewidth=0.6, alpha=0.4, linestyle=dash)
            reached = table.columns[table.iloc[-max(len(table) // 20, 1) :].notna().any()]  # seeds that went to the end
            mean = table[reached].dropna().mean(axis=1)
            axes.plot(mean.index, mean, color=colour, linewidth=1.7, linestyle=dash)
            if len(mean):
                ends.append((name + (" ↓" if mean.iloc[-1] < limits[0] else ""), mean.index[-1], mean.iloc[-1], colour))
        axes.set_ylim(*limits)
        axes.set_xlim(0, 1.01 * max(float(t.index.max()) for t in panel.values()))
        axes.set_title(titles[column])
        axes.set_xlabel("model density evaluations")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        _grid(axes)
        if axes is grid[-1]:
            _label_right(axes, ends)
    grid[0].set_ylabel("ELBO, nats per datum")
    return figure


def _score_limits(score: pd.Series, error: pd.Series) -> tuple[float, float]:
    """Limits around the better half; a guide far behind is drawn on the lower edge with its value."""
    best, behind = float(score.max()), float(score.max() - score.median())
    far = best - max(6.0 * behind, 6.0 * float(error.median()), 1e-3 * abs(best), 1e-6)
    near = score >= far
    low, high = float((score - error)[near].min()), float((score + error)[near].max())
    margin = 0.08 * (high - low) or 0.01 * abs(best) or 1.0
    return low - margin, high + margin


@styled
def bound_against_cost(table: pd.DataFrame, score: str = "bound") -> Figure:
    """The held-out score against seconds of training (and evaluations, where they differ).

    Thin bars: standard error of the score over data and seeds. Thick bars: that of the difference to the best.

    Args:
        table: one row for each guide, best first, with columns `score`, score + "_se", difference_se, seconds.
        score: "bound" or "log_likelihood", in nats for each datum.

    Raises:
        DataError: no guide has a finite score and cost.

    >>> frame = pd.DataFrame({"bound": [-1.0], "bound_se": [0.1], "seconds": [2.0]}, index=["g"])
    >>> len(bound_against_cost(frame).axes)
    1
    """
    costs = {"seconds": "seconds of training", "evaluations": "model density evaluations"}
    rows = {c: table[np.isfinite(table[c].astype(float) * table[score])] for c in costs if c in table}
    spread = {c: float(r[c].max() / max(r[c].min(), 1e-9)) for c, r in rows.items() if len(r)}
    shown = [c for c in spread if c == "seconds" or spread[c] > 1.01 or "seconds" not in spread]
    if not shown:
        raise DataError(
            f"table: expected a guide with finite '{score}' and 'seconds', found none; did every guide fail?"
        )
    figure = Figure(figsize=(10.0 if len(shown) > 1 else 7.2, 3.4), layout="constrained")
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, cost in zip(grid, shown, strict=True):
        part = rows[cost]
        error = part.get(f"{score}_se", pd.Series(0.0, part.index)).fillna(0.0)
        paired = part.get("difference_se", pd.Series(0.0, part.index)).fillna(0.0)
        low, high = _score_limits(part[score], error)
        ends = []
        for i, name in ordered([str(g) for g in part.index], [str(g) for g in table.index]):
            at = [str(g) for g in part.index].index(name)
            x, y = float(part[cost].iloc[at]), float(part[score].iloc[at])
            colour, _, marker = _look(i)
            far = y < low
            height = low + 0.02 * (high - low) if far else y
            if not far:
                axes.errorbar(x, y, float(error.iloc[at]), color=colour, linewidth=0.9, capsize=0)
                axes.errorbar(x, y, float(paired.iloc[at]), color=colour, linewidth=3.2, capsize=0, alpha=0.55)
            axes.plot(x, height, "v" if far else marker, color=colour, markersize=6, clip_on=False)
            ends.append((f"{shorten(name, 22)} ↓ {f'{y:.4g}'.replace('-', '−')}" if far else name, x, height, colour))
        axes.set_ylim(low, high)
        smallest, largest = float(part[cost].min()), float(part[cost].max())
        if spread[cost] > 8 and smallest > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlim(smallest / 1.3, largest * 1.3)
        else:
            axes.set_xlim(0, 1.1 * largest or 1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if value >= 10 else f"{value:g}"))
        axes.set_xlabel(costs[cost])
        _grid(axes, "both")
        if axes is grid[-1]:
            _label_right(axes, ends)
    grid[0].set_ylabel(f"held-out {score.replace('_', '-')}, nats per datum")
    return figure


@styled
def khat_distribution(khat: Mapping[str, np.ndarray], threshold: float, order: Sequence[str] | None = None) -> Figure:
    """How k-hat spreads over the held-out data, a row for each guide; solid: above the threshold.

    Args:
        khat: guide -> one value for each datum (and seed). -inf: exact. +inf, NaN: counted as above.
        threshold: above it importance weights have too heavy a tail for their mean to be trusted.
        order: names of guides in the order of their colours (default: as they come).

    Raises:
        DataError: no values.

    >>> len(khat_distribution({"g": np.array([0.1, 0.9])}, 0.7).axes)
    1
    """
    names = [(i, name) for i, name in ordered(list(khat), order) if np.size(khat[name])]
    if not names:
        raise DataError("khat: expected values for at least one guide, found none")
    values = {name: np.nan_to_num(np.ravel(khat[name]).astype(float), nan=np.inf) for _, name in names}
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()] + [np.array([0.0, threshold])])
    low, high = max(float(finite.min()), -0.6), min(max(float(finite.max()), threshold + 0.3), 1.6)
    step = (high - low) / 48
    # a bin edge lies on the threshold, so that no bar is half good and half bad
    edges = threshold + step * np.arange(np.floor((low - threshold) / step), np.ceil((high - threshold) / step) + 1)
    figure = Figure(figsize=(7.2, 0.75 + 0.44 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, (i, name) in enumerate(names):
        colour = _look(i)[0]
        counts, _ = np.histogram(np.clip(values[name], edges[0], edges[-1]), edges)
        heights = 0.82 * counts / max(counts.max(), 1)
        for part, alpha in ((edges[:-1] < threshold - step / 2, 0.4), (edges[:-1] >= threshold - step / 2, 1.0)):
            left = edges[:-1][part]
            axes.bar(left, heights[part], step, bottom=-row, align="edge", color=colour, alpha=alpha, linewidth=0)
        axes.axhline(-row, color=INK, linewidth=0.5, alpha=0.5)
        bad = float(np.mean(values[name] > threshold))
        axes.text(1.015, -row + 0.1, share(bad), transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    axes.axvline(threshold, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.text(1.015, 1.0, f"above {limit(threshold)}", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    axes.set_ylim(-len(names) + 0.98, 1.0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks([0.35 - row for row in range(len(names))], [shorten(name) for _, name in names])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("k-hat (what lies outside is drawn in the outermost bar)")
    return figure


def _mosaic(pictures: np.ndarray, columns: int) -> np.ndarray:
    """(n, h, w) in [0, 1] -> one row (h, columns · (w + gap)) with transparent gaps, as RGBA bytes."""
    n, height, width = pictures.shape
    gap = max(1, round(width / 14))
    out = np.zeros((height, columns * (width + gap) - gap, 4), np.uint8)
    for i in range(min(n, columns)):
        grey = (255 * np.clip(np.nan_to_num(pictures[i]), 0, 1)).astype(np.uint8)
        out[:, i * (width + gap) : i * (width + gap) + width] = np.stack([grey] * 3 + [np.full_like(grey, 255)], -1)
    return out


@styled
def images(pictures: Mapping[str, Mapping[str, Any]], order: Sequence[str] | None = None, most: int = 10) -> Figure:
    """Held-out images above what each guide makes of them, and samples of the model trained with each guide.

    Args:
        pictures: guide -> {"data": (n, h, w), "reconstructions": (n, h, w), "samples": (m, h, w)}, grey in [0, 1].
        order: names of guides in the order wanted.
        most: pictures in a row, at most.

    Raises:
        DataError: no guide has images.

    >>> square = np.zeros((3, 8, 8))
    >>> len(images({"g": {"data": square, "reconstructions": square, "samples": square}}).axes)
    4
    """
    parts = {name: {k: np.asarray(v, float) for k, v in p.items()} for name, p in pictures.items()}
    names = [name for _, name in ordered([n for n, p in parts.items() if _is_image(p)], order)]
    if not names:
        raise DataError("pictures: expected arrays (n, h, w) under 'reconstructions' or 'samples', found none")
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    last: np.ndarray | None = None
    for name in names:
        data = parts[name].get("data")
        if data is not None and (last is None or not np.array_equal(data, last)):
            rows.append(("data", {"reconstructions": data}))  # once for guides that saw the same images
            last = data
        rows.append((name, parts[name]))
    blocks = [b for b in ("reconstructions", "samples") if any(b in row for _, row in rows)]
    widest = {b: min(most, max(len(row[b]) for _, row in rows if b in row)) for b in blocks}
    figure = Figure(figsize=(10.0, 0.35 + len(rows) * min(8.3 / sum(widest.values()), 0.9)), layout="constrained")
    grid = figure.subplots(len(rows), len(blocks), squeeze=False, width_ratios=[widest[b] for b in blocks])
    for line, (name, row) in zip(grid, rows, strict=True):
        for axes, block in zip(line, blocks, strict=True):
            axes.axis("off")
            axes.set_anchor("W")
            if block in row and row[block].ndim == 3:
                axes.imshow(_mosaic(row[block], widest[block]), interpolation="none")
        where = {"transform": line[0].transAxes, "va": "center", "ha": "right", "fontsize": 8}
        line[0].text(-0.02, 0.5, shorten(name, 28), parse_math=False, **where)
    for axes, block in zip(grid[0], blocks, strict=True):
        axes.set_title("held-out images and their reconstructions" if block == "reconstructions" else block)
    return figure


def _is_image(part: Mapping[str, np.ndarray]) -> bool:
    return any(part[k].ndim == 3 for k in ("reconstructions", "samples") if k in part)


@styled
def predictive_band(pictures: Mapping[str, Mapping[str, Any]], order: Sequence[str] | None = None) -> Figure:
    """What each guide predicts: mean and central interval over a line, or a class probability over a plane.

    Args:
        pictures: guide -> {"x": (n,) or (n, 2), "y": (n,), "grid": (g,) or (g, 2), "mean": (g,), "lower": (g,),
            "upper": (g,)}; over a plane mean is a probability, and lower and upper are not used.
        order: names of guides in the order of their colours.

    Raises:
        DataError: no guide has a grid.

    >>> line = np.linspace(0, 1, 5)
    >>> part = {"x": line, "y": line, "grid": line, "mean": line, "lower": line - 1, "upper": line + 1}
    >>> len(predictive_band({"g": part}).axes)
    1
    """
    names = ordered([name for name, part in pictures.items() if "grid" in part and "mean" in part], order)
    if not names:
        raise DataError("pictures: expected 'grid' and 'mean' for at least one guide, found none")
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(10.0, 0.3 + 2.3 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(names) :]:
        axes.axis("off")
    for axes, (i, name) in zip(grid.ravel(), names, strict=False):
        part = {k: np.asarray(v, float) for k, v in pictures[name].items()}
        where = part["grid"].squeeze()
        _plane(axes, part, where) if where.ndim == 2 else _line(axes, part, where, _look(i)[0])
        axes.set_title(shorten(name), parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def _line(axes: Axes, part: Mapping[str, np.ndarray], where: np.ndarray, colour: str) -> None:
    turn = np.argsort(where)
    where, mean = where[turn], part["mean"].ravel()[turn]
    if "lower" in part and "upper" in part:
        lower, upper = part["lower"].ravel()[turn], part["upper"].ravel()[turn]
        axes.fill_between(where, lower, upper, color=colour, alpha=0.22, linewidth=0)
    axes.plot(where, mean, color=colour, linewidth=1.6)
    if "x" in part and "y" in part:
        axes.plot(part["x"].ravel(), part["y"].ravel(), "o", color=INK, markersize=2.4, markeredgewidth=0, alpha=0.8)
        low, high = np.nanpercentile(part["y"], [0, 100])
        span = (high - low) or 1.0
        axes.set_ylim(max(axes.get_ylim()[0], low - span), min(axes.get_ylim()[1], high + span))
    _grid(axes)


def _plane(axes: Axes, part: Mapping[str, np.ndarray], where: np.ndarray) -> None:
    levels = np.linspace(0, 1, 11)
    axes.tricontourf(where[:, 0], where[:, 1], part["mean"].ravel(), levels=levels, cmap="cividis", alpha=0.85)
    if "x" in part and "y" in part:
        for label, marker in zip(np.unique(part["y"]), "ox^sDv", strict=False):
            points = part["x"][part["y"].ravel() == label]
            axes.plot(points[:, 0], points[:, 1], marker, color="white", markeredgecolor="black", markersize=3)
