"""What ranks come to: one row of tests for each coordinate, and one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .posterior_ranks import QUANTITIES
from .rank_tests import coverage, holm, symmetry, uniform_bins, uniform_ks
from .verdicts import Level, Verdict

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ["LEVELS", "table_of", "verdict_of"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
TESTS = 3
LOST = 0.05
"""Share of data sets without ranks from which on nothing is called calibrated: the lost ones are not any ones."""


def table_of(frame: pd.DataFrame) -> pd.DataFrame:
    """See `Calibration.table`."""
    rows = []
    for (site, coordinate), part in frame.groupby(["site", "coordinate"], sort=False):
        u, z = part["u"].to_numpy(), part["z"].dropna().to_numpy()
        found = {"site": site, "coordinate": coordinate, "p_bins": uniform_bins(u), "p_ks": uniform_ks(u)}
        found["p_symmetry"] = symmetry(u)
        for level in LEVELS:
            cover, name = coverage(u, level), f"cover_{100 * level:.0f}"
            found |= {name: cover.share, f"{name}_low": cover.low, f"{name}_high": cover.high}
            if level == 0.9:
                found["p_cover"] = cover.p
        enough = len(z) > 1
        found["bias"] = z.mean() if enough else np.nan
        found["bias_se"] = z.std(ddof=1) / len(z) ** 0.5 if enough else np.nan
        found["spread"] = z.std(ddof=1) if enough else np.nan
        rows.append(found)
    table = pd.DataFrame(rows)
    smallest = table[["p_bins", "p_ks", "p_cover"]].min(axis=1)
    table["p_holm"] = holm(np.minimum(TESTS * smallest.to_numpy(), 1.0))
    return table


def verdict_of(result: Calibration) -> Verdict:
    """One sentence, and what it rests on."""
    table, cases = result.table, result.cases
    bad = table[table["p_holm"] < result.level].sort_values("p_holm")
    lost = len(result.failed)
    sets = result.frame["set"].nunique() + sum(r not in set(result.frame["set"]) for r in result.failed)
    kind = "data sets" if result.refitted or cases == result.frame["set"].nunique() else "data"
    rests = (
        f"{cases} {kind} simulated from the model, {result.draws} draws for each"
        + (", the guide fitted to each" if result.refitted else ", the guide as it is")
        + f"; chi-square on {result.bins} bins, Kolmogorov-Smirnov and 90 % coverage of {len(table)} coordinates, Holm "
        f"at {100 * result.level:g} %"
    )
    if lost:
        why = next(iter(result.failed.items()))
        rests += f"; {lost} of {sets} data sets left out (set {why[0]}: {why[1]})"
    rests += "".join(f"; {note}" for note in result.notes)
    level: Level
    if len(bad):
        worst = ", ".join(_fault(row) for _, row in bad.head(3).iterrows())
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        level, says = "bad", f"The posterior is not calibrated: {worst}{more}."
    elif lost > LOST * sets:
        level = "bad"
        says = f"Calibration cannot be told: {lost} of {sets} data sets have no ranks, and those are not any ones."
    else:
        low, high = table["cover_90_low"].min(), table["cover_90_high"].max()
        level = "caution" if lost else "good"
        says = (
            f"Nothing speaks against calibration; 90 % intervals cover somewhere from {100 * low:.0f} to "
            f"{100 * high:.0f} % of the time."
        )
    return Verdict("posterior calibration", level, says, rests)


def _fault(row: pd.Series) -> str:
    """What is wrong with a coordinate, in a few words."""
    name, bias = row["coordinate"], row["bias"]
    shifted = abs(bias) > 3 * row["bias_se"]
    if row["site"] in QUANTITIES:
        side = "the truth fits better than the draws" if bias > 0 else "the draws fit better than the truth"
        return f"{name}: {side}" if shifted else f"{name} is off (p = {row['p_holm']:.1g})"
    covers = f"its 90 % intervals cover {100 * row['cover_90']:.0f} %"
    interval = f" ({100 * row['cover_90_low']:.0f} to {100 * row['cover_90_high']:.0f} %)"
    faults = []
    if row["cover_90_high"] < 0.9:
        faults.append(f"too narrow, {covers}{interval}")
    elif row["cover_90_low"] > 0.9:
        faults.append(f"too wide, {covers}{interval}")
    if shifted:
        faults.append(f"the truth lies {bias:+.2f} ± {row['bias_se']:.2f} sd from its mean")
    return f"{name}: " + (" and ".join(faults) if faults else f"ranks are not uniform (p = {row['p_holm']:.1g})")
