"""The ranked table of a comparison: means over seeds and data, and paired differences to the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from .bounds import clustered_difference, clustered_interval


def rank(rows: pd.DataFrame, per_datum: Mapping[str, np.ndarray], score: str) -> pd.DataFrame:
    """One row for each guide, best first, with paired differences to the best.

    The score is the mean over seeds and data; the error of a difference is that of crossed random effects of seed and
    datum (`dgm.bounds.clustered_difference`), over the seeds that both guides finished.
    """
    done = rows[rows["status"] == "ok"]
    table = pd.DataFrame(index=pd.Index(rows["guide"].unique(), name="guide"))
    numeric = [c for c in done.columns if c != "seed" and pd.api.types.is_numeric_dtype(done[c])]
    means, errors = done.groupby("guide")[numeric].mean(), done.groupby("guide")[numeric].sem()
    table = table.join(means)
    table["runs"] = done.groupby("guide").size().reindex(table.index, fill_value=0)
    for name in ("rmse", "log_likelihood", "accuracy", "crps", "coverage95", "calibration_error", "brier"):
        if name in errors:
            table[f"{name}_se"] = errors[name]
    table["score_rank"] = table["bound"] if "bound" in table else math.nan
    table = table.sort_values("score_rank", ascending=False, na_position="last", kind="stable").drop(
        columns="score_rank"
    )
    if "bound" not in table or not table["bound"].notna().any():
        return table.assign(difference=math.nan, difference_se=math.nan, tie=False)
    best = table.index[0]
    differences = {name: _difference(rows, per_datum, name, best) for name in table.index}
    for column, place in (("difference", 0), ("difference_se", 1), ("tie", 2)):
        table[column] = [differences[name][place] for name in table.index]
    table["bound_se"] = [_mean_error(per_datum.get(name)) for name in table.index]
    if score == "log_likelihood":
        table["log_likelihood"], table["log_likelihood_se"] = table["bound"], table["bound_se"]
    return table


def _mean_error(values: np.ndarray | None) -> float:
    if values is None or np.isnan(values).all():
        return math.nan
    t = torch.as_tensor(values)
    return clustered_difference(t, torch.zeros_like(t))[1]


def _difference(
    rows: pd.DataFrame, per_datum: Mapping[str, np.ndarray], name: str, best: str
) -> tuple[float, float, bool]:
    if name == best:
        return 0.0, 0.0, False
    if name not in per_datum or np.isnan(per_datum[name]).all():
        return math.nan, math.nan, False
    done = rows[rows["status"] == "ok"]
    seeds = {g: list(done.loc[done["guide"] == g, "seed"]) for g in (name, best)}
    both = [s for s in seeds[name] if s in seeds[best]]
    if not both:
        return math.nan, math.nan, False
    a = torch.as_tensor(per_datum[name][[seeds[name].index(s) for s in both]])
    b = torch.as_tensor(per_datum[best][[seeds[best].index(s) for s in both]])
    mean, error = clustered_difference(a, b)
    low, high = clustered_interval(a, b)
    return mean, error, bool(low <= 0 <= high)
