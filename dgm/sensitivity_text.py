"""A sensitivity in words and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .errors import DataError
from .pairs import LEVEL
from .plots import _grid, _label_right, _look, _score_limits
from .style import shorten, styled
from .tables import digits_of

if TYPE_CHECKING:
    from .sensitivity import Sensitivity

FEW = 3  # changes of order that the statement names


def statement(result: Sensitivity) -> str:
    """Whether the ranking changes between settings by more than chance, who is hurt most, and what that rests on."""
    frame, pairs = result.frame, result.pairs
    if frame["score"].isna().all():
        return "No guide finished with a finite score at any setting."
    several = len(result.results) > 1
    out = [*([_changes(result, pairs)] if several else []), *([_worst(result)] if several else [])]
    values = [v for r in result.results.values() for v in r.per_datum.values()]
    seeds = sorted({len(v) for v in values})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    out.append(
        f"This rests on {number} seed{'s' * (seeds[-1] > 1)} and {values[0].shape[1]} held-out data at "
        f"{len(result.results)} setting{'s' * several}, and on Holm's correction over {len(pairs)} "
        f"difference{'s' * (len(pairs) != 1)} at {100 * LEVEL:g} %."
    )
    if seeds[0] == 1:
        out.append("With one seed only the chance of the data is counted, not that of training.")
    if several:
        out.append("Best settings were picked on the same held-out data: their scores are a little too good.")
    if result.meta.get("interrupted"):
        out.append(f"It was interrupted: {len(result.results)} of {result.meta['settings']} settings had finished.")
    return " ".join(out)


def _changes(result: Sensitivity, pairs: pd.DataFrame) -> str:
    """Pairs whose order turns. Where none does, and no guide fails, the rank intervals of all settings overlap: a guide
    that g beats here and one that beats g there, K together, would have one guide in common."""
    turned = []
    decided = pairs[pairs["better"] != ""]
    for (a, b), part in decided.groupby(["a", "b"], sort=False):
        where = {g: result.label((own["lr"].iloc[0], int(own["epochs"].iloc[0]))) for g, own in part.groupby("better")}
        if len(where) == 2:
            f, g = shorten(a), shorten(b)
            turned.append(f"{f} beats {g} at {where[str(a)]}, and {g} beats {f} at {where[str(b)]}")
    if turned:
        more = f"; and {len(turned) - FEW} more" if len(turned) > FEW else ""
        return "The ranking depends on the setting: " + "; ".join(turned[:FEW]) + more + "."
    return "No two guides change places between the settings by more than chance."


def _worst(result: Sensitivity) -> str:
    table = result.table
    lost = table["lost"].dropna()
    if lost.empty:
        return ""
    name = str(lost.idxmax())
    row = table.loc[name]
    digits = digits_of(table["lost_se"], 1.0)
    error = "" if np.isnan(row["lost_se"]) else f" ± {row['lost_se']:.{digits}f}"
    return (
        f"{shorten(name)} has most to lose: {row['lost']:.{digits}f}{error} nats from {row['best']} to {row['worst']}."
    )


@styled
def draw(result: Sensitivity) -> Figure:
    """Score against step size, a panel for each budget; against the budget where there is one step size.

    Bars: standard error of the paired difference to the best guide at the same setting.

    Raises:
        DataError: no guide has a finite score at any setting.
    """
    frame = result.frame
    known = frame[frame["score"].notna()]
    if known.empty:
        raise DataError("sensitivity: expected a finite score at one setting at least, found none; did every run fail?")
    along = "lr" if frame["lr"].nunique() > 1 or frame["epochs"].nunique() == 1 else "epochs"
    other = "epochs" if along == "lr" else "lr"
    panels = list(known.groupby(other))
    figure = Figure(figsize=(10.0 if len(panels) > 1 else 7.2, 3.5), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    low, high = _score_limits(known["score"], known["difference_se"].fillna(0.0))
    for axes, (value, panel) in zip(grid, panels, strict=True):
        ends = []
        places = sorted(panel[along].unique())
        axes.set_xscale("log")
        axes.set_ylim(low, high)
        for i, name in enumerate(result.guides):
            own = panel[panel["guide"] == name].sort_values(along)
            if own.empty:
                continue
            colour, dash, marker = _look(i)
            height = own["score"].clip(lower=low)
            axes.plot(own[along], height, color=colour, linestyle=dash, marker=marker, markersize=4, linewidth=1.6)
            near = own["score"] >= low
            axes.errorbar(
                own[along][near], height[near], own["difference_se"][near].fillna(0.0), color=colour, linestyle="none",
                linewidth=2.6, alpha=0.55,
            )  # fmt: skip
            far = own["score"].iloc[-1] < low
            ends.append((f"{name} ↓" if far else name, own[along].iloc[-1], height.iloc[-1], colour))
        span = 1.15 if len(places) > 1 else 2.0
        axes.set_xlim(places[0] / span, places[-1] * span)
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_xlabel("step size" if along == "lr" else "epochs")
        axes.set_title(f"{value} epochs" if other == "epochs" else f"step size {value:g}")
        _grid(axes, "both")
        if axes is grid[-1]:
            _label_right(axes, ends)
    grid[0].set_ylabel("held-out score, nats per datum")
    return figure
