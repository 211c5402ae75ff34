"""What the rows of the suite `tricks` say: paired effects with errors, verdicts, the picture, and what to do first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtr, stdtrit

from dgm.bench_results import Results
from dgm.bench_story import Chapter
from dgm.page import Drawn
from dgm.pairs import LEVEL
from dgm.rank_tests import holm
from dgm.style import COLOURS, INK, limit, styled
from dgm.tables import digits_of

from .tricks_list import CONTROL, TRICKS, Trick, pair

SLOWER = 1.25
"""A time ratio from which a cost is named."""
TIMED = 5.0
"""Seconds of training from which a time ratio is shown: below, the first call of a process is most of it."""
FEW = 5
"""Pairs below which nothing is said: Student's test then rests on the normality of the differences alone."""
HELPS, HARMS, LEANS, OPEN, NONE = "helps", "harms", "not secured", "not seen", "too few pairs"
COST = "training_cpu_seconds"


def effects(results: Results, tricks: tuple[Trick, ...] = TRICKS) -> pd.DataFrame:
    r"""One row for each trick and model, best first: the paired difference on - off of the held-out score.

    .. math:: \bar d \pm s_d / \sqrt{n}, \qquad t = \bar d \sqrt{n} / s_d \sim t_{n - 1}

    over the n splits that both finished. p_holm: corrected for all rows together. verdict: "helps" or "harms" where
    p_holm <= 5 %, "not secured" where only the test by itself says so, "not seen" otherwise (the interval says how
    large an effect may yet be), "too few pairs" below five. Reference: Student, "The probable error of a mean", 1908;
    Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Returns:
        columns trick, model, off, on (mean scores), effect, se, low, high (95 %, not corrected), pairs, lost (splits
        that one of the two did not finish), p, p_holm, time (CPU time of training, on / off), verdict.
    """
    found = []
    scores, costs = _by_variant(results, "score"), _by_variant(results, COST)
    for trick in tricks:
        for task in trick.tasks:
            names = pair(trick, task, tricks)
            if not all((task, name) in scores for name in names):
                continue
            without, with_ = (scores[task, name] for name in names)
            both = without.index.intersection(with_.index)
            off, on = without[both].to_numpy(dtype=float), with_[both].to_numpy(dtype=float)
            row: dict[str, Any] = {"trick": trick.name, "model": task, "off": _mean(off), "on": _mean(on)}
            row |= paired(off, on)
            row["lost"] = _asked(results, task, names) - len(both)
            spent = [costs.get((task, name), pd.Series(dtype=float)) for name in names]
            row["time"] = _mean(spent[1]) / _mean(spent[0]) if spent[0].sum() >= TIMED else math.nan
            found.append(row)
    columns = ["trick", "model", "off", "on", "effect", "se", "low", "high", "pairs", "p", "lost", "time"]
    frame = pd.DataFrame(found, columns=columns)
    frame["p_holm"] = holm(frame["p"].to_numpy(dtype=float))
    frame["verdict"] = [_verdict(row) for row in frame.to_dict("records")]
    return frame.sort_values("effect", ascending=False, na_position="last", kind="stable").reset_index(drop=True)


def paired(off: np.ndarray, on: np.ndarray) -> dict[str, float]:
    """Mean of the differences, its standard error, 95 % interval and two-sided p-value.

    >>> found = paired(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    >>> found["effect"], found["se"], found["pairs"]
    (1.0, 0.0, 3)
    """
    d = on - off
    n = len(d)
    effect, se = _mean(d), float(d.std(ddof=1) / n**0.5) if n > 1 else math.nan
    reach = float(stdtrit(n - 1, 0.975)) * se if n > 1 else math.nan
    if n < 2:
        p = math.nan
    elif se == 0:
        p = 1.0 if effect == 0 else math.nan  # differences that are all equal are no sample of anything
    else:
        p = float(2 * stdtr(n - 1, -abs(effect) / se))
    return {"effect": effect, "se": se, "low": effect - reach, "high": effect + reach, "p": p, "pairs": n}


def _by_variant(results: Results, name: str) -> dict[tuple[str, str], pd.Series]:
    """A column by split, for each model and variant: finite values of rows that finished."""
    rows = results.good
    if name not in rows and name in results.costs:
        rows = rows.merge(results.costs[["key", name]], on="key")
    if name not in rows:
        return {}
    rows = rows[np.isfinite(pd.to_numeric(rows[name], errors="coerce").astype(float))]
    groups = rows.groupby(["task", "guide"], sort=False)
    return {(str(t), str(g)): part.set_index(results.suite.repeats)[name].astype(float) for (t, g), part in groups}


def _asked(results: Results, task: str, names: Sequence[str]) -> int:
    rows = results.rows[(results.rows["task"] == task) & results.rows["guide"].isin(names)]
    return int(rows.groupby("guide")[results.suite.repeats].nunique().max()) if len(rows) else 0


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _verdict(row: Mapping[Any, Any]) -> str:
    if not np.isfinite(row["effect"]) or row["pairs"] < FEW or np.isnan(row["p"]):
        return NONE
    if row["p_holm"] <= LEVEL:
        return HELPS if row["effect"] > 0 else HARMS
    return LEANS if row["p"] <= LEVEL else OPEN


def models() -> list[str]:
    """Names of the models, in the order of the report."""
    return list(dict.fromkeys(task for trick in TRICKS for task in trick.tasks))


# ------------------------------------------------------------------------------------------------------ words


def first(table: pd.DataFrame) -> list[tuple[str, str]]:
    """What to do first, of the numbers: a sentence for each model, what helps everywhere, and what chance does.

    >>> first(pd.DataFrame(columns=["trick", "model", "effect", "se", "p", "pairs", "time", "verdict"]))
    [('so far', 'no trick has five pairs that finished: there is nothing to say')]
    """
    if not (table["pairs"] >= FEW).any():
        return [("so far", "no trick has five pairs that finished: there is nothing to say")]
    real, control = table[table["trick"] != CONTROL], table[table["trick"] == CONTROL]
    known = [m for m in models() if (real["model"] == m).any()]
    out = [(model, _of_model(real[real["model"] == model])) for model in known]
    verdicts = {str(name): list(part["verdict"]) for name, part in real.groupby("trick", sort=False)}
    for title, verdict in (("helps on both of its models", HELPS), ("harms both of its models", HARMS)):
        names = [name for name, own in verdicts.items() if len(own) > 1 and set(own) == {verdict}]
        if names:
            out.append((title, _listed(names)))
    mixed = [name for name, own in verdicts.items() if {HELPS, HARMS} <= set(own)]
    if mixed:
        out.append(("helps one of its models and harms the other", _listed(mixed)))
    if len(control):
        out.append(("chance alone", _listed([f"{r['model']} {_number(r)}" for _, r in control.iterrows()])))
    return [*out, ("together", "each was tried alone on the plain model: effects need not add up")]


def _of_model(own: pd.DataFrame) -> str:
    good, bad = own[own["verdict"] == HELPS], own[own["verdict"] == HARMS].sort_values("effect")
    parts = ["nothing is secured to help" if good.empty else f"first {_said(good.iloc[0])}"]
    if len(good) > 1:
        parts[0] += f", then {_listed([_said(row) for _, row in good.iloc[1:].iterrows()])}"
    if len(bad):
        parts.append(f"leave out {_listed([_said(row) for _, row in bad.iterrows()])}")
    for title, kinds in (("not secured over all tests", [LEANS]), ("no effect seen", [OPEN, NONE])):
        names = own[own["verdict"].isin(kinds)]["trick"].astype(str)
        if len(names):
            parts.append(f"{title}: {_listed(list(names))}")
    return "; ".join(parts)


def _said(row: pd.Series) -> str:
    slower = f", {limit(row['time'])} times the CPU time" if row["time"] >= SLOWER else ""
    return f"{row['trick']} ({_number(row)}{slower})"


def _number(row: Any) -> str:
    digits = digits_of(pd.Series([row["se"]]), 1.0)
    return f"{row['effect']:+.{digits}f} ± {row['se']:.{digits}f}" if np.isfinite(row["se"]) else "–"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


# ------------------------------------------------------------------------------------------- tables and figure


def story(results: Results) -> list[Chapter]:
    """What to do first: in words, as a picture, and the effects, best first."""
    table = effects(results)
    return [Chapter("What to do first", first(table), _shown(table), figures(table))]


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The effects as text."""
    rows = []
    for row in table.to_dict("records"):
        digits = digits_of(pd.Series([row["se"]]), 1.0)
        between = f"{row['low']:.{digits}f} to {row['high']:.{digits}f}" if np.isfinite(row["low"]) else "–"
        lost = f", {row['lost']} lost" if row["lost"] else ""
        rows.append(
            {
                "trick": row["trick"], "model": row["model"], "off": f"{row['off']:.{digits}f}",
                "on": f"{row['on']:.{digits}f}", "effect, nats": _number(row), "95 %": between,
                "p (Holm)": "–" if np.isnan(row["p_holm"]) else _p(row["p_holm"]),
                "CPU time": "–" if np.isnan(row["time"]) else f"{limit(row['time'])}x",
                "pairs": f"{row['pairs']}{lost}", "verdict": row["verdict"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """What each trick is."""
    about = [{"trick": t.name, "what it is": t.says, "reference": t.reference} for t in TRICKS]
    return {"The tricks": pd.DataFrame(about)}


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def figures(table: pd.DataFrame) -> list[Drawn]:
    """Effects with two standard errors."""
    table = table[np.isfinite(table["effect"].to_numpy(dtype=float))]
    if table.empty:
        return []
    text = (
        "On minus off in nats a held-out row, with two standard errors over splits; right of the line is better. "
        f"Filled: secured at {100 * LEVEL:g} % over all tests. Arrows: beyond the axis, with the value."
    )
    return [("tricks", "What each trick does", text, effect_figure(table))]


@styled
def effect_figure(table: pd.DataFrame) -> Figure:
    """A panel for each model; its tricks by their effect."""
    known = [m for m in models() if (table["model"] == m).any()]
    sizes = [int((table["model"] == m).sum()) for m in known]
    figure = Figure(figsize=(7.2, 0.9 * len(known) + 0.24 * sum(sizes)), layout="constrained")
    grid = figure.subplots(len(known), 1, squeeze=False, height_ratios=[n + 1.5 for n in sizes])[:, 0]
    for axes, model in zip(grid, known, strict=True):
        _panel(axes, table[table["model"] == model].sort_values("effect", ascending=False))
        axes.set_title(model)
    grid[-1].set_xlabel("effect, nats a row")
    return figure


def _panel(axes: Axes, table: pd.DataFrame) -> None:
    effect, se = (table[name].fillna(0.0).to_numpy(dtype=float) for name in ("effect", "se"))
    reach = _reach(effect, se)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    for place, row in enumerate(table.to_dict("records")):
        axes.axhline(place, color=INK, linewidth=0.4, alpha=0.18)
        value, error = effect[place], 2 * se[place]
        secured = row["verdict"] in (HELPS, HARMS)
        colour = COLOURS[2] if row["verdict"] == HELPS else COLOURS[1] if row["verdict"] == HARMS else INK
        if abs(value) > reach:
            right = value > 0
            axes.plot(math.copysign(reach, value), place, ">" if right else "<", color=colour, markersize=5)
            axes.annotate(
                _number(row), (math.copysign(reach, value), place), (-8 if right else 8, 0), color=colour, fontsize=7,
                textcoords="offset points", ha="right" if right else "left", va="center",
            )  # fmt: skip
            continue
        face = colour if secured else "none"
        axes.errorbar(
            value, place, xerr=error, fmt="o", color=colour, markerfacecolor=face, markersize=4.5, linewidth=1.3
        )
    axes.set_yticks(range(len(table)), list(table["trick"]))
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlim(-1.06 * reach, 1.06 * reach)
    axes.tick_params(axis="y", length=0)


def _reach(effect: np.ndarray, se: np.ndarray) -> float:
    """Half of the axis: all that lies within twelve times the typical size, which one huge effect does not set."""
    ends = np.abs(effect) + 2 * se
    typical = float(np.median(ends)) or float(ends.max()) or 1.0
    near = ends[np.abs(effect) <= 12 * typical]
    return float(near.max()) if len(near) else float(ends.max())


def notes(results: Results) -> list[str]:
    """What a reader must know."""
    rows = results.rows
    sizes = {str(m): part.iloc[0] for m, part in rows.groupby("task", sort=False)} if "steps" in rows else {}
    unfinished = [f"{t}, {g}" for (t, g), part in rows.groupby(["task", "guide"]) if (part["status"] != "ok").any()]
    return [
        *(f"{m}: {r['steps']} steps of {r['batch_size']} rows, step size {r['lr']:g}" for m, r in sizes.items()),
        "trainings are short, with as many steps and the same step size on and off: what lets one train longer or "
        "faster gains nothing, and a decay that ends before the training would is at a disadvantage",
        "the step size was chosen for the plain models, which favours what is plain",
        "splits share training rows, and frames of the random splits of Frey faces have near twins in training: errors "
        "are those of this protocol, not of other data",
        "helps, harms: secured at 5 % by paired t tests with Holm's correction over all rows of the table, the control "
        "among them; not secured: by itself below 5 %; not seen: an effect inside the interval is still possible",
        "the time of batch normalisation holds the loss of the traced step: its running means change as it runs",
        *([f"with failed splits: {'; '.join(unfinished)}"] if unfinished else []),
    ]


__all__ = ["effect_figure", "effects", "figures", "first", "models", "notes", "paired", "story", "tables"]
