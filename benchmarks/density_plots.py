"""Pictures of the density suite: how training went, differences to a reference, and what the models draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgm.style import COLOURS, INK, shorten, styled

Arrays = Mapping[str, Mapping[str, np.ndarray]]
STYLES = ("-", "--", ":")


@styled
def curves_figure(panels: Mapping[str, Arrays], skip: float = 0.15) -> Figure:
    """Validation ELBO by epoch: a panel for each task, a line for each guide, a dot where it is best.

    Args:
        panels: task -> guide -> arrays `valid_epoch` and `valid_elbo`. skip: share of the range at the bottom that is
            left out, where training begins.
    """
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns if columns > 1 else 7.2, 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (task, arrays) in zip(grid.ravel(), panels.items(), strict=False):
        lowest, highest = math.inf, -math.inf
        for place, (name, own) in enumerate(arrays.items()):
            x, y = own["valid_epoch"], own["valid_elbo"]
            colour = COLOURS[place % len(COLOURS)]
            style = STYLES[place // len(COLOURS) % len(STYLES)]
            axes.plot(x, y, style, color=colour, linewidth=1.2, label=shorten(name, 34))
            axes.plot(x[y.argmax()], y.max(), "o", color=colour, markersize=4)
            lowest, highest = min(lowest, float(np.quantile(y, skip))), max(highest, float(y.max()))
        if highest > lowest:
            axes.set_ylim(lowest, highest + 0.05 * (highest - lowest))
        axes.set_title(shorten(task, 48), parse_math=False)
        axes.set(xlabel="epoch", ylabel="validation ELBO, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=6.5, loc="lower right")
    for axes in grid.ravel()[len(panels) :]:
        axes.axis("off")
    return figure


@styled
def differences_figure(panels: Mapping[str, Sequence[tuple[str, float, float]]], label: str) -> Figure:
    """Differences with two standard errors: a panel for each task, a line of it for each pair of methods."""
    heights = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(7.2, 0.6 + sum(0.45 + 0.24 * h for h in heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[0.6 + h for h in heights])
    for axes, (task, rows) in zip(grid.ravel(), panels.items(), strict=True):
        axes.axvline(0.0, color=INK, linewidth=0.8, alpha=0.6)
        for place, (_, value, error) in enumerate(rows):
            wide = 0.0 if math.isnan(error) else 2 * error
            axes.errorbar(value, place, xerr=wide, fmt="o", color=COLOURS[0], markersize=4, linewidth=1.1)
        axes.set_yticks(range(len(rows)), [shorten(name, 60) for name, _, _ in rows], fontsize=7)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(shorten(task, 60), parse_math=False)
    grid[-1, 0].set_xlabel(label)
    return figure


@styled
def pictures_figure(
    rows: Mapping[str, np.ndarray], shape: tuple[int, int], ink: bool = True, columns: int = 12
) -> Figure:
    """E[x | z] at draws of the prior, a line for each model.

    Args:
        rows: title -> images `(n, pixels)`, in [0, 1] or near it. shape: height and width of an image. ink: 1 is dark.
    """
    height, width = shape
    size = 0.62
    figure = Figure(figsize=(8.6, len(rows) * (size * height / width + 0.3)), layout="constrained")
    grid = figure.subplots(len(rows), 1, squeeze=False)
    for axes, (name, images) in zip(grid.ravel(), rows.items(), strict=True):
        _line(axes, images[:columns].reshape(-1, height, width), "gray_r" if ink else "gray")
        axes.set_title(shorten(name, 60), fontsize=8, loc="left", parse_math=False)
    return figure


def _line(axes: Axes, images: np.ndarray, colours: str) -> None:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
    axes.imshow(np.concatenate(list(padded), 1), cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.axis("off")
