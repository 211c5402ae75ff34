"""Two moons from both sides: VAEs whose usual settings fail, with diagnosis and cure, and classifiers that doubt.

The points of `dgm.load("moons-points")`, whose density is known, under a VAE with a latent plane: a likelihood of the
wrong scale, a q too simple for the shape, a decoder so strong that it needs no latent. For each, what `dgm.doctor` says
and what its cure is worth: held-out importance bound, active units, mutual information, k-hat, over seeds. Then the
classes of `dgm.load("moons")` from 100 rows, others for each seed, under one Bayesian network with many guides, NUTS
among them: log-likelihood, calibration, entropy on the true boundary and far from all data. The report tells it in
order, with pictures.

    dgm bench run moons --budget short --jobs 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

import dgm
from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_results import Results

from .moons_bnn import REFERENCE, TASK, bnn_cells, run_bnn
from .moons_story import story
from .moons_vae import run_vae, vae_cells

BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": 1, "steps": 40, "draws": 100, "doctor_steps": 20, "bnn_steps": 60, "particles": 1,
              "bnn_draws": 50, "chain": 4},
    "short": {"seeds": 3, "steps": 2000, "draws": 500, "doctor_steps": 1000, "bnn_steps": 4000, "particles": 4,
              "bnn_draws": 400, "chain": 150},
    "full": {"seeds": 10, "steps": 10_000, "draws": 5000, "doctor_steps": 1000, "bnn_steps": 10_000, "particles": 8,
             "bnn_draws": 2000, "chain": 1000},
}  # fmt: skip


def cells(budget: str) -> list[Cell]:
    """Settings of VAEs, then guides of the classifier."""
    size, smoke = BUDGET[budget], budget == "smoke"
    return vae_cells(size, smoke) + bnn_cells(size, smoke)


def run(cells: Sequence[Cell]) -> Sequence[Any]:
    """All seeds of a cell at once."""
    return run_bnn(cells) if cells[0].task == TASK else run_vae(cells)


def checks(results: Results) -> pd.DataFrame:
    """No bound is above the truth, but for the chance of the held-out points."""
    found = []
    row: Any
    for row in results.good.to_dict("records"):
        if row["task"] == TASK:
            continue
        value, tolerance = row["below_truth"], 4 * row["below_truth_se"]
        found.append(
            {
                "task": row["task"], "guide": row["guide"], "seed": row["seed"], "metric": "below_truth",
                "value": value, "expected": "0 or more", "tolerance": tolerance,
                "verdict": "agree" if value >= -tolerance else "miss",
            }
        )  # fmt: skip
    return pd.DataFrame(found)


def notes(results: Results) -> list[str]:
    """What a reader must know."""
    weighted = results.good[results.good["guide"].str.endswith("weights")]
    alarm = weighted.get("doctor", pd.Series(dtype=str)).astype(str).str.contains("trivial").any()
    said = "the doctor judges a pair trained by importance weights by its ELBO, and calls it worse than it is"
    return [
        *([said] if alarm else []),
        "bounds of VAEs are held-out importance bounds: decoders adapt to their guides, so ELBOs are not compared",
        "the doctor trains for itself, at the step size and batch of the setting, and sees the first seed only",
        f"every seed of the classifier has 100 training rows of its own; 1000 rows are held out; {REFERENCE} runs two "
        "short chains, and is a reference as far as its R-hat says",
    ]


def ready(task: str) -> None:
    """Raises DataError where the data are missing."""
    dgm.load("moons" if task == TASK else "moons-points")


def seconds(cell: Cell) -> float:
    """A rough estimate."""
    settings = cell.settings
    if cell.guide == REFERENCE:
        return 2.0 + 0.06 * 2 * settings["chains"] * settings["chain"] / 2
    return 2.0 + 3e-3 * settings["steps"] + 0.01 * settings.get("doctor_steps", 0)


SUITE = Suite(
    "moons",
    cells,
    run,
    [
        Metric(
            "log_likelihood", "higher", "log-likelihood",
            "held-out, nats: of points the importance bound, of classes the log predictive probability",
        ),
        Metric("below_truth", "lower", "below the truth", "log density of the truth minus the bound, nats"),
        Metric("active_units", None, "active units"),
        Metric("information", None, "information", "mutual information of point and code, at least, nats"),
        Metric("khat_bad", "lower", "k-hat too high", "share of held-out points whose k-hat is above its threshold"),
        Metric("accuracy", "higher"),
        Metric("calibration_error", "lower", "calibration error", "mean distance of confidence and accuracy, 15 bins"),
        Metric("boundary_entropy", None, "entropy, boundary", "of the predictive class on the true boundary, nats"),
        Metric("far_entropy", None, "entropy, far away", "at 4 units from the middle of the data"),
        Metric("far_epistemic", None, "epistemic, far away", "mutual information of class and weights there"),
    ],
    summary="Two moons from both sides: VAEs that fail, with diagnosis and cure, and classifiers that doubt",
    group_by=("task", "guide"),
    ready=ready,
    seconds=seconds,
    checks=checks,
    notes=notes,
    story=story,
)  # fmt: skip
