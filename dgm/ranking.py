"""The ranked table of a comparison, the ranks that survive its errors, and the sentence that they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from .bounds import clustered_difference
from .pairs import LEVEL, pairwise, rank_intervals, scored
from .style import shorten

FEW = 5  # guides that a sentence names


def rank(rows: pd.DataFrame, per_datum: Mapping[str, np.ndarray], score: str) -> pd.DataFrame:
    """One row for each guide, best first, with paired differences to the best and the ranks that survive.

    The score is the mean over seeds and data; the error of a difference is that of crossed random effects of seed and
    datum (`dgm.bounds.clustered_difference`), over the seeds that both guides finished. rank_low and rank_high are the
    places that Holm's correction over all pairs leaves open at 5 % (`dgm.pairs`); *tie*: the first place is among them,
    for a guide that does not stand there. Guides without a finite score come last and have no rank.
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
    known = scored(per_datum)
    has_score = np.array([g in known for g in table.index])
    value = table["bound"].where(has_score) if "bound" in table else pd.Series(math.nan, table.index)
    table = table.loc[value.sort_values(ascending=False, na_position="last", kind="stable").index]
    if not value.notna().any():
        empty = dict.fromkeys(("difference", "difference_se", "rank_low", "rank_high"), math.nan)
        return table.assign(**empty, tie=False)
    order = [g for g in table.index if g in known]
    pairs = pairwise(rows, per_datum, order)
    table = table.join(rank_intervals(pairs, order))
    to_best = pairs[pairs["a"] == order[0]].set_index("b")
    table["difference"] = (-to_best["difference"]).reindex(table.index)
    table["difference_se"] = to_best["difference_se"].reindex(table.index)
    table.loc[order[0], ["difference", "difference_se"]] = 0.0
    table["tie"] = [g != order[0] and low == 1 for g, low in table["rank_low"].items()]
    table["bound_se"] = [_mean_error(known.get(name)) for name in table.index]
    if score == "log_likelihood":
        table["log_likelihood"], table["log_likelihood_se"] = table["bound"], table["bound_se"]
    return table


def _mean_error(values: np.ndarray | None) -> float:
    if values is None:
        return math.nan
    t = torch.as_tensor(values)
    return clustered_difference(t, torch.zeros_like(t))[1]


def tiers(table: pd.DataFrame) -> list[list[str]]:
    """Guides in groups, best first: every guide of a group is significantly better than every guide of the next.

    >>> table = pd.DataFrame({"rank_low": [1, 2, 2, None], "rank_high": [1, 3, 3, None]}, index=list("fghi"))
    >>> tiers(table)
    [['f'], ['g', 'h']]
    """
    known = table[table["rank_low"].notna()]
    out: list[list[str]] = [[]]
    for i, name in enumerate(known.index):
        if i and (known["rank_high"].iloc[:i] <= i).all() and (known["rank_low"].iloc[i:] > i).all():
            out.append([])
        out[-1].append(str(name))
    return [group for group in out if group]


def statement(rows: pd.DataFrame, per_datum: Mapping[str, np.ndarray], score: str = "bound") -> str:
    """What a comparison says of its guides and what that rests on, in sentences: no order that chance may have made.

    Args:
        rows, per_datum, score: as a `Comparison` has them (its meta["score"]).

    >>> rows = pd.DataFrame({"guide": ["f", "g"] * 2, "seed": [0, 0, 1, 1], "status": "ok", "bound": [2.0, 1.0] * 2})
    >>> statement(rows, {"f": np.array([[1.0, 2.0, 3.0]] * 2), "g": np.array([[0.0, 1.0, 2.0]] * 2)})
    "f is best; then g. This rests on 2 seeds and 3 held-out data, paired, and on Holm's correction at 5 %."
    """
    table = rank(rows, per_datum, score)
    known = table[table["rank_low"].notna()]
    names = {str(g): shorten(g, 80) for g in table.index}
    without = [names[str(g)] for g in table.index if g not in known.index]
    end = f" Without a finite score: {_listed(without)}." if without else ""
    if known.empty:
        return "No guide finished with a finite score."
    if len(known) == 1:
        return f"Only {names[str(known.index[0])]} finished with a score, so that there is nothing to compare.{end}"
    pairs = pairwise(rows, per_datum, [str(g) for g in known.index])
    values = [np.asarray(per_datum[str(g)]) for g in known.index]
    return " ".join([_order(tiers(table), pairs, names), *_grounds(values, pairs, bool(known["tie"].any()))]) + end


def _order(groups: Sequence[Sequence[str]], pairs: pd.DataFrame, names: Mapping[str, str]) -> str:
    parts = []
    for i, group in enumerate(groups):
        said, only = _listed([names[g] for g in group]), len(groups) == 1
        inside = pairs[pairs["a"].isin(group) & pairs["b"].isin(group) & (pairs["better"] != "")]
        if len(inside):  # f may lead h while both are level with g
            loser = inside["b"].where(inside["better"] == inside["a"], inside["a"])
            both = zip(inside["better"], loser, strict=True)
            beaten = _listed([f"{names[str(f)]} beats {names[str(g)]}" for f, g in both])
            said = f"of {said} {beaten}, and no other order survives" if i == 0 else f"{said}, of which {beaten}"
        elif i == 0 and len(group) > 1:
            said += " tie" if only else " tie for the first place"
        elif i == 0:
            said += " is best"
        elif len(group) > 1:
            said += ", which tie"
        parts.append(said if i == 0 else f"then {said}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "." if text.startswith("of ") else text + "."


def _grounds(values: Sequence[np.ndarray], pairs: pd.DataFrame, ties: bool) -> list[str]:
    seeds = sorted({len(v) for v in values})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    noun = "seed" if seeds[-1] == 1 else "seeds"
    over = f" over {len(pairs)} pairs" if len(pairs) > 1 else ""
    out = [
        f"This rests on {number} {noun} and {values[0].shape[1]} held-out data, paired, and on Holm's correction{over} "
        f"at {100 * LEVEL:g} %."
    ]
    if seeds[0] == 1:
        out.append("With one seed only the chance of the data is counted, not that of training.")
    elif seeds[0] < FEW and ties:
        out.append("Few seeds leave much open: more of them may part the ties.")
    return out


def _listed(parts: Sequence[str]) -> str:
    if len(parts) > FEW:
        parts = [*parts[: FEW - 1], f"{len(parts) - FEW + 1} others"]
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
