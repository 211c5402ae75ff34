"""A comparison as one HTML page that stands alone: nothing in it is loaded, every name in it is escaped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from . import plots
from .page import Drawn, environment, shown, write_text
from .style import COLOURS, count, limit, share, shorten
from .tables import (
    best_place,
    columns,
    failures,
    format_table,
    headline,
    khat_by_row,
    numbers,
    remarks,
    score_name,
    texts_of,
    verdict,
)

__all__ = ["Comparison", "format_table", "render", "verdict", "write_report"]


class Comparison(Protocol):
    """What a report needs to know; the result of a comparison is one."""

    @property
    def rows(self) -> pd.DataFrame: ...
    @property
    def table(self) -> pd.DataFrame: ...
    @property
    def history(self) -> pd.DataFrame: ...
    @property
    def khat(self) -> Mapping[str, np.ndarray]: ...
    @property
    def k_threshold(self) -> float: ...
    @property
    def pictures(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...
    def statement(self) -> str: ...


def grounds(result: Comparison) -> list[str]:
    """Sentences that say which order survives, what it rests on, and where it is weak."""
    table, meta, out = result.table, result.meta, [result.statement()]
    best = best_place(table, score_name(meta))
    bad = float(numbers(table, "khat_bad").iloc[best]) if best is not None else np.nan
    if bad > 0.1 and khat_by_row(meta):
        out.append(
            f"Even for the best guide, k-hat is above {limit(result.k_threshold)} for {share(bad)} of held-out data: "
            "there the bound may be loose and its error understated."
        )
    elif bad > 0.1:
        out.append(f"In {share(bad)} of its runs k-hat says that even the best guide is far from the posterior.")
    if meta.get("interrupted"):
        out.append("It was interrupted: only the runs that had finished by then are here.")
    return out


def _figures(result: Comparison, order: list[str]) -> list[dict[str, Any]]:
    """The pictures that this result can show, with what they mean."""
    score, pictures = score_name(result.meta), getattr(result, "pictures", None) or {}
    history, table = result.history, result.table
    has_cost = (numbers(table, score) * numbers(table, "seconds")).notna().any()
    has_curve = "elbo" in history and np.isfinite(numbers(history, "elbo")).any()
    is_image = any(np.ndim(p.get(k)) == 3 for p in pictures.values() for k in ("reconstructions", "samples"))
    drawn: list[Drawn] = []
    if has_curve:
        text = "Thin: one seed. Thick: their mean. A curve below the frame is one that has not got there yet."
        drawn.append(("curves", "Training", text, plots.training_curves(history, order)))
    if has_cost:
        text = (
            "Thin bars: standard error of the score. Thick bars: that of the difference to the best, "
            "which is what ranks the guides."
        )
        drawn.append(("cost", "Score against cost", text, plots.bound_against_cost(table, score)))
    if any(np.size(k) for k in result.khat.values()):
        what = "held-out datum" if khat_by_row(result.meta) else "run"
        text = f"One value for each {what}. Solid: above the threshold; their share stands at the right."
        figure = plots.khat_distribution(result.khat, result.k_threshold, order)
        drawn.append(("khat", f"k-hat of each {what}", text, figure))
    if is_image:
        text = "The same held-out images for every guide; samples are of the model that was trained with the guide."
        drawn.append(("images", "Reconstructions and samples", text, plots.images(pictures, order)))
    if any("grid" in p and "mean" in p for p in pictures.values()):
        plane = any(np.ndim(p.get("grid")) == 2 and np.shape(p["grid"])[1] == 2 for p in pictures.values())
        text = "Line and band: predicted mean and central interval; dots: held-out data."
        text = "Predicted probability, from blue (0) to yellow (1); marks: held-out data by class." if plane else text
        drawn.append(("band", "Predictions", text, plots.predictive_band(pictures, order)))
    return shown(drawn)


def _runs(rows: pd.DataFrame, order: list[str], score: str) -> tuple[list[str], list[list[str]]]:
    """Header and texts of the table of single runs: columns that are known and not empty."""
    decimal = {
        "bound",
        "bound_se",
        "elbo",
        "log_likelihood",
        "rmse",
        "crps",
        "brier",
        "calibration_error",
        "khat_median",
    }
    forms: dict[str, Any] = dict.fromkeys(decimal, lambda v: f"{v:.3f}")
    forms |= dict.fromkeys(("khat_bad", "coverage95", "accuracy"), lambda v: f"{100 * v:.1f} %")
    forms |= dict.fromkeys(("evaluations", "search_evaluations", "parameters"), count)
    forms |= {"ess": lambda v: f"{v:.1f}", "seconds": lambda v: f"{v:.1f}", "cpu_seconds": lambda v: f"{v:.1f}"}
    forms |= {"lr": lambda v: f"{v:.3g}"}
    shown = [
        "bound",
        "log_likelihood",
        "bound_se",
        "elbo",
        "rmse",
        "accuracy",
        "brier",
        "coverage95",
        "calibration_error",
    ]
    shown += ["khat_bad", "khat_median", "ess", "evaluations", "search_evaluations", "seconds", "cpu_seconds", "lr"]
    if score == "log_likelihood":
        shown.remove("bound")  # there it is the same number
    if not numbers(rows, "search_evaluations").max() > 0:
        shown.remove("search_evaluations")
    shown = [name for name in [*shown, "parameters"] if numbers(rows, name).notna().any()]
    place = {name: i for i, name in enumerate(order)}
    ranked = rows.assign(_place=[place[str(g)] for g in rows["guide"]]).sort_values(["_place", "seed"], kind="stable")
    cells = {name: texts_of(ranked, name, forms[name]) for name in shown}
    body = [
        [str(place[str(guide)]), shorten(guide, 80), str(seed), *(cells[name][i].strip() for name in shown)]
        for i, (guide, seed) in enumerate(zip(ranked["guide"], ranked["seed"], strict=True))
    ]
    heads = {"khat_bad": "k-hat bad", "khat_median": "k-hat median", "coverage95": "95 % covers", "elbo": "ELBO"}
    heads |= {
        "bound_se": "± over data",
        "rmse": "RMSE",
        "crps": "CRPS",
        "ess": "ESS",
        "lr": "step size",
        "cpu_seconds": "CPU s",
    }
    heads |= {"search_evaluations": "in search"}
    return [heads.get(name, name.replace("_", " ")) for name in shown], body


def _provenance(meta: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, value) of all that meta says about how this came about, and the notes of the protocol."""
    notes = meta.get("protocol", meta.get("protocol_notes", []))
    out = []
    for name, value in meta.items():
        if name in ("title", "mode", "protocol", "protocol_notes", "score", "interrupted", "khat_of"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        out.append((name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)))
    return out, [notes] if isinstance(notes, str) else [str(n) for n in notes]


def render(result: Comparison) -> str:
    """The HTML page as text: nothing in it is loaded from elsewhere, and every name in it is escaped."""
    table, meta, rows = result.table, {**result.meta, "k_threshold": result.k_threshold}, result.rows
    order = list(dict.fromkeys([str(g) for g in table.index] + [str(g) for g in rows["guide"]]))
    heads, runs = _runs(rows, order, score_name(meta))
    facts, notes = _provenance(result.meta)
    shown = columns(table, meta)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=str(meta.get("title", "comparison")),
            headline=headline({k: v for k, v in meta.items() if k != "title"}).removeprefix("comparison · "),
            verdict=verdict(table, meta),
            grounds=grounds(result),
            columns=shown,
            guides=[
                (i, shorten(g, 80), [c.cells[i].strip().replace("-", "−") for c in shown])
                for i, g in enumerate(table.index)
            ],
            remarks=remarks(rows),
            failures=failures(rows),
            failed=int((rows["status"] != "ok").sum()) if "status" in rows else 0,
            total=len(rows),
            figures=_figures(result, order),
            heads=heads,
            runs=runs,
            facts=facts,
            notes=notes,
            colours=len(COLOURS),
        )
    )


def write_report(result: Comparison, path: str | os.PathLike[str]) -> Path:
    """Write the comparison as one HTML page; a reader never sees half of it.

    Args:
        result: a comparison (rows, table, history, khat, k_threshold, pictures, meta).
        path: of the page; folders are made, an old page is replaced once the new one is complete.

    Raises:
        OptionError: the page cannot be written there.
    """
    return write_text(render(result), path)
