"""Pictures of one evaluation, in the style of `dgm.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .errors import DataError
from .metrics import GaussianPrediction
from .plots import _grid, _mosaic
from .style import COLOURS, INK, limit, shorten, styled

if TYPE_CHECKING:
    from .metrics import CategoricalPrediction

__all__ = ["bounds_histogram", "calibration_curve", "gap_bars", "kl_bars", "worst_images"]


@styled
def bounds_histogram(per_datum: pd.DataFrame) -> Figure:
    """How the bound, and the ELBO where there is one, spread over the data.

    Args:
        per_datum: columns bound and perhaps elbo, nats.

    Raises:
        DataError: nothing finite to draw.

    >>> len(bounds_histogram(pd.DataFrame({"bound": [-1.0, -2.0], "elbo": [-1.5, -2.5]})).axes)
    1
    """
    parts = {name: per_datum[name].to_numpy(float) for name in ("elbo", "bound") if name in per_datum}
    parts = {name: values[np.isfinite(values)] for name, values in parts.items()}
    parts = {name: values for name, values in parts.items() if len(values)}
    if not parts:
        raise DataError("per_datum: expected a finite bound for at least one datum, found none")
    both = np.concatenate(list(parts.values()))
    low, high = float(np.percentile(both, 0.5)), float(both.max())
    edges = (np.linspace(low, high, 41) if high > low else np.array([low - 1, low + 1])).tolist()
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    for name, colour, alpha in (("elbo", COLOURS[1], 0.45), ("bound", COLOURS[0], 0.7)):
        if name in parts and (name == "bound" or not np.allclose(parts["elbo"], parts.get("bound", np.nan))):
            label = {"elbo": "ELBO", "bound": "bound"}[name]
            axes.hist(
                np.clip(parts[name], edges[0], edges[-1]), edges, color=colour, alpha=alpha, linewidth=0, label=label
            )
    axes.set_xlabel("nats, one value for each datum (what lies outside is drawn in the outermost bar)")
    axes.set_ylabel("data")
    if len(parts) > 1:
        axes.legend(frameon=False, fontsize=8)
    _grid(axes)
    return figure


@styled
def gap_bars(bars: Sequence[tuple[str, float, float, float, float]]) -> Figure:
    """Approximation and amortization gap as stacked bars with their standard errors.

    Args:
        bars: (name, approximation, its error, amortization, its error) for each bar, nats.

    Raises:
        DataError: no bars.

    >>> len(gap_bars([("held-out rows", 0.5, 0.1, 0.2, 0.05)]).axes)
    1
    """
    if not bars:
        raise DataError("bars: expected at least one gap, found none")
    figure = Figure(figsize=(7.2, 0.9 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (_, family, family_error, encoder, encoder_error) in enumerate(bars):
        axes.barh(-row, family, 0.5, color=COLOURS[0], alpha=0.75, linewidth=0)
        axes.barh(-row, encoder, 0.5, left=max(family, 0.0), color=COLOURS[1], alpha=0.75, linewidth=0)
        axes.errorbar(family, -row + 0.08, xerr=2 * family_error, color=COLOURS[0], linewidth=1.2)
        axes.errorbar(max(family, 0.0) + encoder, -row - 0.08, xerr=2 * encoder_error, color=COLOURS[1], linewidth=1.2)
    axes.set_yticks([-row for row in range(len(bars))], [shorten(bar[0]) for bar in bars])
    axes.axvline(0.0, color=INK, linewidth=0.6)
    axes.plot([], [], color=COLOURS[0], linewidth=5, alpha=0.75, label="q's family (approximation gap)")
    axes.plot([], [], color=COLOURS[1], linewidth=5, alpha=0.75, label="its encoder (amortization gap)")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2)
    axes.set_xlabel("nats a datum (bars of two standard errors)")
    axes.tick_params(axis="y", length=0)
    _grid(axes, "x")
    return figure


@styled
def kl_bars(kl: Sequence[float], active: Sequence[bool], names: Sequence[str] | None = None) -> Figure:
    """KL(q || p) of each latent dimension, largest first; inactive ones pale.

    Raises:
        DataError: no dimensions.

    >>> len(kl_bars([1.0, 0.01], [True, False]).axes)
    1
    """
    if not len(kl):
        raise DataError("kl: expected at least one latent dimension, found none")
    order = np.argsort(-np.asarray(kl, float), kind="stable")
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.subplots()
    for place, i in enumerate(order):
        axes.bar(place, kl[i], 0.8, color=COLOURS[2], alpha=0.8 if active[i] else 0.25, linewidth=0)
    if len(order) <= 40:
        labels = [str(names[i]) if names is not None else str(i) for i in order]
        axes.set_xticks(range(len(order)), labels, rotation=90 if len(order) > 12 else 0)
    axes.set_xlabel("latent dimension (pale: inactive)")
    axes.set_ylabel("KL, nats")
    _grid(axes)
    return figure


@styled
def calibration_curve(prediction: GaussianPrediction | CategoricalPrediction) -> Figure:
    """Coverage against level of central intervals (a normal target), or accuracy against confidence (classes).

    >>> import torch
    >>> len(calibration_curve(GaussianPrediction(torch.zeros(1, 9), torch.tensor(1.0), torch.zeros(9))).axes)
    1
    """
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    if isinstance(prediction, GaussianPrediction):
        count, inside = len(prediction.y), 2 * np.sort(np.abs(prediction.pit().cpu().numpy() - 0.5))
        levels = np.linspace(0, 1, 101)
        band = 1.96 * np.sqrt(levels * (1 - levels) / count)
        axes.fill_between(levels, levels - band, levels + band, color=INK, alpha=0.15, linewidth=0)
        axes.plot(levels, np.searchsorted(inside, levels, side="right") / count, color=COLOURS[0], linewidth=1.6)
        axes.set_xlabel("level of the predictive interval")
        axes.set_ylabel("share of held-out rows inside")
    else:
        bins = prediction.reliability(10, "equal-mass").frame.dropna()
        ends = [bins["accuracy"] - bins["accuracy_low"], bins["accuracy_high"] - bins["accuracy"]]
        look: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1.0, "marker": "o", "markersize": 4}
        axes.errorbar(bins["confidence"], bins["accuracy"], np.clip(ends, 0, None), **look)
        axes.set_xlabel("confidence (ten groups of equal size)")
        axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _grid(axes, "both")
    return figure


@styled
def worst_images(images: np.ndarray, labels: Sequence[str], threshold: float) -> Figure:
    """The images whose weights are least to be trusted, each with its row and k-hat.

    Args:
        images: (n, h, w), grey in [0, 1]. labels: one for each. threshold: of k-hat, for the title.

    >>> len(worst_images(np.zeros((2, 8, 8)), ["row 0", "row 1"], 0.7).axes)
    2
    """
    figure = Figure(figsize=(10.0, 1.5), layout="constrained")
    grid = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, image, label in zip(grid, images, labels, strict=True):
        axes.axis("off")
        axes.imshow(_mosaic(image[None], 1), interpolation="none")
        axes.set_title(label, fontsize=7, loc="center")
    figure.suptitle(
        f"largest k-hat first; not to be trusted above {limit(threshold)}", fontsize=8, color=INK, x=0.01, ha="left"
    )
    return figure
