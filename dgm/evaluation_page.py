"""An evaluation as one HTML page that stands alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import evaluation_plots as plots
from .metrics import CategoricalPrediction, GaussianPrediction
from .page import Drawn, environment, shown, write_text
from .plots import khat_distribution
from .provenance import provenance
from .style import COLOURS

if TYPE_CHECKING:
    from .evaluation import Evaluation

__all__ = ["render", "write_page"]

SHOWN = 10
"""Worst data that are shown."""

NAMES = {
    "bound": "bound, nats",
    "bound_error": "± by the draws",
    "elbo": "ELBO, nats",
    "ess": "effective draws",
    "khat": "k-hat",
}
MEANINGS = {
    "bound": "bound, or log predictive density, nats a row",
    "bound_se": "its standard error, for new rows",
    "bound_mc_se": "its standard error, by the chance of the draws alone",
    "elbo": "ELBO, nats a row",
    "ess": "effective draws, mean",
    "khat_bad": "share of rows with k-hat above its threshold",
    "khat_median": "k-hat, median",
    "khat_posterior": "k-hat of the posterior of the global latents",
    "active_units": "active latent units",
    "annealed_bound": "annealed bound, on its rows, nats a row",
    "annealed_bound_se": "its standard error, for new rows",
    "annealed_bound_mc_se": "its standard error, by the chance of the chains alone",
    "approximation_gap": "approximation gap (q's family), nats a row",
    "amortization_gap": "amortization gap (its encoder), nats a row",
    "log_likelihood": "log-likelihood of the predictive scores' draws, nats a row",
    "rmse": "root mean squared error, units of y",
    "crps": "continuous ranked probability score, units of y",
    "coverage_90": "share of rows in their 90 % intervals",
    "coverage95": "share of rows in their 95 % intervals",
    "sharpness_90": "mean width of the 90 % intervals, units of y",
    "interval_score_90": "interval score of the 90 % intervals, units of y",
    "calibration_error": "calibration error",
    "brier": "Brier score, summed over classes",
    "entropy": "entropy of the predictions, nats",
    "mutual_information": "their mutual information with the posterior, nats",
    "energy_score": "energy score, units of y",
}


def _tables(result: Evaluation) -> list[dict[str, Any]]:
    numbers = [[MEANINGS.get(name, name.replace("_", " ")), f"{value:.5g}"] for name, value in result.summary.items()]
    tables = [
        {"title": "Numbers", "text": "Means over the rows.", "heads": ["what", "value"], "rows": numbers, "few": True}
    ]
    if result.per_datum["khat"].notna().any():
        worst = result.worst(SHOWN)
        tables.append(
            {
                "title": "The rows to look at first",
                "text": "Largest k-hat first, then the fewest effective draws.",
                "heads": ["row", *(NAMES[c] for c in NAMES)],
                "rows": [[str(i), *(_cell(row[c]) for c in NAMES)] for i, row in worst.iterrows()],
                "few": False,
            }
        )
    return tables


def _cell(value: float) -> str:
    if np.isposinf(value):
        return "∞"
    return "-∞" if np.isneginf(value) else ("–" if pd.isna(value) else f"{value:.4g}")


def _bars(summary: Mapping[str, float]) -> list[tuple[str, float, float, float, float]]:
    """Both gaps with their errors, of held-out rows and, where they are known, of training rows."""
    found = []
    for name, prefix in (("held-out rows", ""), ("training rows", "train_")):
        if f"{prefix}approximation" in summary:
            family, encoder = f"{prefix}approximation", f"{prefix}amortization"
            found.append((name, summary[family], summary[f"{family}_se"], summary[encoder], summary[f"{encoder}_se"]))
    return found


def _figures(result: Evaluation) -> list[dict[str, Any]]:
    frame, drawn = result.per_datum, list[Drawn]()
    if result.gaps is not None:
        text = "log p(x) - ELBO in two parts: what the best member of q's family loses for each datum, and what the "
        text += f"encoder loses beside it. {result.gaps.mode.capitalize()}."
        drawn.append(("gap", "Where the gap is", text, plots.gap_bars(_bars(result.gaps.summary))))
    khat = frame["khat"].dropna().to_numpy()
    if len(khat):
        text = "One value for each row. Solid: above the threshold; their share stands at the right."
        figure = khat_distribution({"k-hat": khat}, result.k_threshold)
        drawn.append(("khat", "k-hat of each row", text, figure))
        images = result.meta.get("images")
        if images is not None:
            worst = result.worst(SHOWN)
            labels = [f"row {i}: {row['khat']:.2f}" for i, row in worst.iterrows()]
            figure = plots.worst_images(images[worst.index], labels, result.k_threshold)
            drawn.append(("worst", "The worst rows", "What the guide finds hard.", figure))
    if np.isfinite(frame["bound"]).any() and result.kind.startswith("bound"):
        text = "The further right the better; the distance between the two is what a better q would gain."
        drawn.append(("bounds", "Bound and ELBO of each row", text, plots.bounds_histogram(frame)))
    elif np.isfinite(frame["bound"]).any():
        text = "The further right the better; what lies far to the left was a surprise."
        figure = plots.bounds_histogram(frame[["bound"]])
        drawn.append(("bounds", "Log predictive density of each row", text, figure))
    if result.latents is not None:
        names, kl, active = result.latents.bars()
        text = "What each dimension tells about a datum, on average."
        drawn.append(("latents", "Latent dimensions", text, plots.kl_bars(kl, active, names)))
    if isinstance(result.prediction, GaussianPrediction | CategoricalPrediction):
        text = "On the broken line predictions are calibrated; the band, or bars, is what chance does to these rows."
        drawn.append(("calibration", "Calibration of predictions", text, plots.calibration_curve(result.prediction)))
    return shown(drawn)


def render(result: Evaluation) -> str:
    """The HTML page as text: nothing in it is loaded from elsewhere, and every name in it is escaped."""
    meta = result.meta
    told = [meta.get("data"), f"{len(result.per_datum)} rows", result.kind, f"K = {result.num_samples}"]
    facts = {k: v for k, v in meta.items() if k not in ("images", "title", "data")} | provenance()
    return (
        environment()
        .get_template("evaluation.html.j2")
        .render(
            title=meta.get("title", f"{meta.get('guide', 'guide')} for {meta.get('model', 'model')}"),
            headline=" · ".join(filter(None, told)),
            verdicts=result.verdicts,
            tables=_tables(result),
            figures=_figures(result),
            notes=result.notes,
            colours=len(COLOURS),
            facts=[(name.replace("_", " "), str(value)) for name, value in facts.items()],
        )
    )


def write_page(result: Evaluation, path: str | os.PathLike[str]) -> Path:
    """Write the evaluation as one HTML page; a reader never sees half of it.

    Raises:
        OptionError: the page cannot be written there.
    """
    return write_text(render(result), path)
