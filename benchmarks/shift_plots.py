"""Pictures of the shift suite: the images, scores as corruptions grow, and how well foreign images are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dgm.style import COLOURS, DASHES, INK, MARKERS, shorten, styled

from .shift_images import SEVERITIES, SIDE, STEPS, TRAINED, corrupted, foreign, foreign_of, held_out

SHIFT = (0, *SEVERITIES)
SEEN = 6
"""Foreign images shown of each kind."""


def names_of(name: str, kind: str) -> list[str]:
    """Columns of a score at severities 0 to 5 of a corruption.

    >>> names_of("accuracy", "blur")[:2]
    ['accuracy_shift_0', 'accuracy_blur_1']
    """
    return [f"{name}_shift_0", *(f"{name}_{kind}_{severity}" for severity in SEVERITIES)]


def looks(guides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each guide, in their order."""
    return {
        guide: {"color": COLOURS[k % len(COLOURS)], "ls": DASHES[k // len(COLOURS) % len(DASHES)]}
        for k, guide in enumerate(guides)
    }


@styled
def curves_figure(rows: pd.DataFrame, scores: Mapping[str, str]) -> Figure:
    """A line for each guide over severities 0 to 5: a column of panels for each corruption, a row for each score.

    Args:
        rows: of one task. scores: column -> label.
    """
    groups = {str(guide): part for guide, part in rows.groupby("guide", sort=False)}
    style = looks(list(groups))
    figure = Figure(figsize=(9.6, 2.3 * len(scores) + 1.1), layout="constrained")
    grid = figure.subplots(len(scores), len(STEPS), squeeze=False, sharex="col", sharey="row")
    for line, (name, label) in enumerate(scores.items()):
        for column, kind in enumerate(STEPS):
            axes = grid[line, column]
            for guide, part in groups.items():
                values = part[names_of(name, kind)].mean().to_numpy(dtype=float)
                axes.plot(SHIFT, values, lw=1.2, label=shorten(guide), **style[guide])
            if line == 0:
                axes.set_title(kind)
            if line == len(scores) - 1:
                axes.set_xticks(SHIFT, ["none", *(f"{p:g}" for p in STEPS[kind])], fontsize=7)
        grid[line, 0].set_ylabel(label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return figure


@styled
def detection_figure(rows: pd.DataFrame, places: Mapping[str, str], scores: Mapping[str, str]) -> Figure:
    """AUROC of each guide with two standard errors over seeds: a panel for each foreign kind, a marker for each score.

    Args:
        rows: of one task. places: in columns -> what it is. scores: in columns -> label.
    """
    groups = {str(guide): part for guide, part in rows.groupby("guide", sort=False)}
    up = np.arange(len(groups))[::-1]
    figure = Figure(figsize=(9.6, 0.27 * len(groups) + 1.3), layout="constrained")
    grid = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    for axes, (place, title) in zip(grid, places.items(), strict=True):
        axes.axvline(0.5, color=INK, lw=0.7, ls=DASHES[2])
        for k, (score, label) in enumerate(scores.items()):
            own = [part[f"auroc_{score}_{place}"].astype(float) for part in groups.values()]
            reach = [2 * float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0 for values in own]
            axes.errorbar(
                [float(values.mean()) for values in own], up + 0.18 * (1 - k), xerr=reach, ls="none",
                marker=MARKERS[k % len(MARKERS)], ms=4, color=COLOURS[k], lw=0.9, label=label,
            )  # fmt: skip
        axes.set(title=title, xlabel="AUROC", xlim=(min(0.3, axes.get_xlim()[0]), 1.02))
    grid[0].set_yticks(up, [shorten(guide) for guide in groups])
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return figure


@styled
def images_figure() -> Figure:
    """The first test image of each set under every corruption, and foreign images.

    Raises:
        DataError: a data set is missing.
    """
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    parts: Any = figure.subfigures(1, len(TRAINED) + 1, width_ratios=[*([len(SHIFT)] * len(TRAINED)), SEEN])
    for part, task in zip(parts, TRAINED, strict=False):
        first = held_out(task, 1)[0]
        lines = {kind: [corrupted(first, kind, severity) for severity in SHIFT] for kind in STEPS}
        part.suptitle(f"{task}: severity 0 to 5", fontsize=9)
        _lines(part, {kind: torch.cat(images) for kind, images in lines.items()})
    kinds = dict.fromkeys(name for task in TRAINED for name in foreign_of(task))
    parts[-1].suptitle("foreign", fontsize=9)
    _lines(parts[-1], {name: foreign(name, SEEN) for name in kinds})
    return figure


def _lines(part: Any, lines: Mapping[str, torch.Tensor]) -> None:
    grid = part.subplots(len(lines), 1, squeeze=False)
    for axes, (name, images) in zip(grid[:, 0], lines.items(), strict=True):
        strip = images.unflatten(1, (SIDE, SIDE)).transpose(0, 1).flatten(1).numpy()  # (28, 28 images)
        axes.imshow(strip, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_title(name, fontsize=8)
        axes.axis("off")
