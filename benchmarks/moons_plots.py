"""Pictures of the moons suite: samples and codes of the VAEs, and what each classifier is unsure of."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dgm
from dgm.style import COLOURS, INK, shorten, styled

from .moons_bnn import EDGES, ROWS

Arrays = Mapping[str, Mapping[str, np.ndarray]]
X, Y = (-1.9, 2.9), (-1.6, 2.1)
CODE = (-3.6, 3.6)
MOONS = (COLOURS[0], COLOURS[1])
COLUMNS = 4
SHOWN = 600
"""Points of a panel."""


def _bare(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[])
    axes.set_aspect("equal")
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _points(axes: Axes, points: np.ndarray, colours: Any) -> None:
    axes.scatter(points[:SHOWN, 0], points[:SHOWN, 1], s=3.5, c=colours, alpha=0.7, linewidths=0, rasterized=True)


@styled
def samples_figure(arrays: Arrays, marks: Mapping[str, str]) -> Figure:
    """Data against samples, and the prior against the codes of held-out data, coloured by moon.

    Args:
        arrays: `samples` and `codes` by setting. marks: what is said of a setting in its title ("fails", "cure").
    """
    data, moon = dgm.load("moons").test
    colours = np.array(MOONS)[moon[:SHOWN].numpy()]
    prior = torch.randn(SHOWN, 2, generator=torch.Generator().manual_seed(0)).numpy()
    columns = min(COLUMNS, 1 + len(arrays))
    blocks = math.ceil((1 + len(arrays)) / columns)
    figure = Figure(figsize=(2.1 * columns, 4.15 * blocks), layout="constrained")
    heights = [(Y[1] - Y[0]) / (X[1] - X[0]), 1.0] * blocks
    grid = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=heights)
    above, below = grid[::2].ravel(), grid[1::2].ravel()
    _points(above[0], data.numpy(), colours)
    _points(below[0], prior, INK)
    above[0].set_title("held-out data", fontsize=8)
    below[0].set_title("prior", fontsize=8)
    above[0].set_ylabel("x: samples")
    below[0].set_ylabel("z: codes of the data")
    for place, (name, own) in enumerate(arrays.items(), 1):
        _points(above[place], own["samples"], COLOURS[2])
        _points(below[place], own["codes"], colours)
        mark = marks.get(name, "")
        title = textwrap.wrap(shorten(name, 48), 27) + ([mark] if mark else [])
        above[place].set_title("\n".join(title), fontsize=8)
    for place in range(len(above)):
        if place > len(arrays):
            above[place].axis("off")
            below[place].axis("off")
        else:
            _bare(above[place], X, Y)
            _bare(below[place], CODE, CODE)
    return figure


@styled
def planes_figure(arrays: Arrays, what: str, top: float, label: str, titles: Mapping[str, str]) -> Figure:
    """One panel for each guide on a shared scale: an array of the plane, the boundary p = 1/2, and the training rows.

    Args:
        arrays: `probability` and the array `what` by guide. top: of the colour scale. titles: by guide, below its name.
    """
    names, columns = list(arrays), 4
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(8.6, 2.25 * lines + 0.55), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    x, y = (part[:ROWS].numpy() for part in dgm.load("moons").train)
    sides = [
        np.linspace(*edge, count) for edge, count in zip(EDGES, next(iter(arrays.values()))[what].shape, strict=True)
    ]
    image: Any = None
    for axes, name in zip(grid.ravel(), names, strict=False):
        extent = (*EDGES[0], *EDGES[1])
        image = axes.imshow(
            arrays[name][what].T, origin="lower", extent=extent, cmap="cividis", vmin=0.0, vmax=top,
            interpolation="bilinear",
        )  # fmt: skip
        p = arrays[name]["probability"].T
        if p.min() < 0.5 < p.max():
            for colour, thick in (("black", 2.2), ("white", 1.1)):  # legible on dark and on bright
                axes.contour(*sides, p, levels=[0.5], colors=colour, linewidths=thick)
        for moon, colour in enumerate(("#ffffff", "#ff8c5a")):
            axes.scatter(*x[y == moon].T, s=5, c=colour, edgecolors="black", linewidths=0.3, rasterized=True)
        axes.set_title(shorten(name, 28) + (f"\n{titles[name]}" if name in titles else ""), fontsize=8)
        _bare(axes, *EDGES)
    for axes in grid.ravel()[len(names) :]:
        axes.axis("off")
    bar: Any = figure.colorbar(image, ax=list(grid.ravel()), location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label(label)
    bar.outline.set_linewidth(0.4)
    return figure
