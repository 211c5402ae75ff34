"""Classifiers of images under shift: accuracy and calibration as images are corrupted, and foreign images told or not.

One Bayesian network, 196-100-100-10 with ReLU at the short budget, trained on MNIST or on Fashion-MNIST under many
guides; each seed has 10,000 training images of its own, from the 55,000 that `dgm.load` calls training. Judged on the
same held-out images: the first 5000 test images as they are; the first 1000 of them rotated, noisy, blurred or moved,
in five severities; and 2000 of each of three foreign kinds, the other data set, OMNIGLOT and uniform noise. The network
is shown means of 2 x 2 pixels (at the full budget every pixel); corruptions act on the images before. The protocol is
our own. Prior scale (2, 4, 8) and step size (0.003, 0.01) were chosen by 2000 validation images of MNIST, one seed, for
a point and a diagonal normal, and are the same for all guides and both sets.

    dgm bench run shift --budget short --jobs 2
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_results import Results

from .moons_story import means, told
from .shift_bnn import GUIDES, PLACES, SMOKE, run_task
from .shift_images import NEEDED, TRAINED, kept_images
from .shift_story import SHORT, groups_of, story

BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": 1, "halved": True, "hidden": [32], "rows": 2000, "steps": 60, "draws": 10, "test": 400,
              "shifted": 100, "foreign": 200},
    "short": {"seeds": 3, "halved": True, "hidden": [100, 100], "rows": 10_000, "steps": 2500, "draws": 32,
              "test": 5000, "shifted": 1000, "foreign": 2000},
    "full": {"seeds": 10, "halved": False, "hidden": [400, 400], "rows": 55_000, "steps": 20_000, "draws": 100,
             "test": 10_000, "shifted": 2000, "foreign": 5000},
}  # fmt: skip
SLOW = {"low-rank normal": 4.0, "matrix normal per layer": 1.5, "multiplicative flow": 4.0,
        "ensemble of 5 points": 3.0, "SWAG": 1.5, "Laplace, Kronecker": 2.0}  # fmt: skip
"""Cost of a step in that of a diagonal normal, roughly."""
ROUNDING = 1e-9
ERRORS = 4.5
"""Standard errors that the AUROC of two halves of the same images may be off a half."""
LABELS = {
    "calibration_error": "ECE, equal width", "calibration_error_adaptive": "ECE, equal mass",
    "calibration_chance": "if calibrated", "brier": "Brier score", "entropy": "entropy, nats",
}  # fmt: skip


def cells(budget: str) -> list[Cell]:
    """Every guide for each seed on both sets."""
    size = dict(BUDGET[budget])
    seeds = size.pop("seeds")
    settings = {**size, "batch_size": 100, "lr": 1e-2, "prior": 8.0, "compile": "trace"}
    guides = SMOKE if budget == "smoke" else GUIDES
    return [Cell(task, guide, seed, settings) for task in TRAINED for guide in guides for seed in range(seeds)]


def ready(task: str) -> None:
    """Raises DataError where a data set is missing."""
    for name in NEEDED:
        kept_images(name)


def seconds(cell: Cell) -> float:
    """A rough estimate."""
    step = 2.5e-3 * (1.0 if cell.settings["halved"] else 15.0) * SLOW.get(cell.guide, 1.0)
    return 4.0 * len(cell.settings["hidden"]) / 2 + step * cell.settings["steps"]


def checks(results: Results) -> pd.DataFrame:
    """What must hold, by the worst cell of each task: identities, a coin where nothing is to tell, and a floor.

    A mean of probabilities has the larger log-likelihood (Jensen), a mutual information is no larger than the entropy,
    and a point has none. Entropy cannot tell one half of the held-out images from the other. A network is better than
    taking the class of the nearest mean image.
    """
    found = []
    for task, rows in results.good.groupby("task", sort=False):
        points = rows[rows["guide"] == "point"]
        trained = rows[~rows["guide"].str.startswith("Laplace")]  # its draws were never trained: see the notes
        off = (rows["auroc_halves"] - 0.5).abs() / rows["auroc_halves_se"]
        limits: list[tuple[str, pd.DataFrame, Any, float]] = [
            ("averaging gain", rows, rows["log_likelihood"] - rows["single_log_likelihood"], -ROUNDING),
            ("entropy less its epistemic part", rows, rows["entropy"] - rows["epistemic"], -ROUNDING),
            ("epistemic part of a point, negative", points, 0.0 - points["epistemic"], -ROUNDING),
            ("AUROC of halves, standard errors off 0.5, negative", rows, -off, -ERRORS),
        ]
        if results.plan["budget"] != "smoke":  # which is too short to be better
            limits.append(("accuracy above nearest mean", trained, trained["accuracy"] - trained["nearest_mean"], 0.0))
        found += [_worst(str(task), *limit) for limit in limits if len(limit[1])]
    return pd.DataFrame(found)


def _worst(task: str, metric: str, rows: pd.DataFrame, values: Any, least: float) -> dict[str, Any]:
    """The cell with the smallest value, which must not be below `least`; NaN is a miss."""
    at = values.fillna(-math.inf).idxmin()
    return {
        "task": task, "guide": rows["guide"].loc[at], "seed": rows["seed"].loc[at], "cells": len(rows),
        "metric": metric, "value": float(values.loc[at]), "expected": f"{least:g} or more", "tolerance": 0.0,
        "verdict": "agree" if values.loc[at] >= least else "miss",
    }  # fmt: skip


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Calibration of images as they are, and foreign images by the largest probability."""
    clean, flags = [], []
    for task, groups in groups_of(results.good).items():
        for guide, part in groups.items():
            names = ("calibration_error", "calibration_error_adaptive", "calibration_chance", "brier", "entropy")
            own = {"trained on": task, "guide": guide}
            clean.append(own | {LABELS.get(name, name): told(*means(part, name), 4) for name in names})
            places = zip(PLACES, SHORT, strict=True)
            flags.append(
                own
                | {f"AUROC, {name}": told(*means(part, f"auroc_confidence_{place}")) for place, name in places}
                | {"flagged, 95 % found": told(*means(part, "fpr95"))}
            )
    return {
        "Images as they are: calibration": pd.DataFrame(clean),
        "Foreign images, by the largest probability": pd.DataFrame(flags),
    }


def notes(results: Results) -> list[str]:
    """What a reader must know."""
    first = results.good.iloc[0]
    return [
        "the protocol is our own, and no published row is comparable: none is shown",
        f"held out are the first {first['test']} test images, corrupted the first {first['shifted']} of them, foreign "
        f"{first['foreign']} of each kind; {first['draws']} draws of the weights, the same for all images of a cell",
        "seeds differ in training images, start and noise; the test images are the same: ± does not cover their choice",
        "corruptions are ours, by torch, with a fixed seed; the same image is corrupted alike for every guide",
        "an ensemble's draws fall on its members by chance, so some count more than others",
        "Laplace draws all weights about the mode and runs the network itself on them, not its linearisation: such "
        "draws were never trained, and the floor of accuracy is not asked of them (Immer, Korzepa and Bauer, "
        "Improving predictions of Bayesian neural nets via local linearization, 2021)",
    ]


SUITE = Suite(
    "shift",
    cells,
    run_task,
    [
        Metric("log_likelihood", "higher", "log-likelihood", "log predictive probability of the class, nats"),
        Metric("accuracy", "higher"),
        Metric("calibration_error", "lower", "calibration error", "mean distance of confidence and accuracy, 15 bins"),
        Metric("accuracy_shifted", "higher", "accuracy, shifted", "mean over four corruptions and five severities"),
        Metric("log_likelihood_shifted", "higher", "log-likelihood, shifted", "the same mean"),
        Metric("calibration_error_shifted", "lower", "calibration error, shifted", "the same mean"),
        Metric("auroc_entropy", "higher", "AUROC, entropy", "foreign images told by predictive entropy, three kinds"),
        Metric("auroc_epistemic", "higher", "AUROC, epistemic", "by the mutual information of class and weights"),
    ],
    summary="Classifiers of images under corruption, and foreign images told or not, by family",
    group_by=("task", "guide"),
    ready=ready,
    seconds=seconds,
    checks=checks,
    tables=tables,
    notes=notes,
    story=story,
)
