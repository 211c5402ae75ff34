"""What the density suite's rows must show, and differences of two methods in pairs of held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from dgm.bench_registry import Published, published
from dgm.bench_results import Results
from dgm.bounds import mean_and_standard_error

from .density_data import name_of
from .density_list import STATIC

RECIPE, RECIPE_NLL, RECIPE_TOLERANCE = "diagonal-normal", 89.8, 0.4
"""The row that repeats a published one by its protocol."""
WIDTH = 2.0
"""Standard errors that a difference must have to count as an order."""
ORDER: Sequence[tuple[str, str]] = (
    ("IWAE, 1 layer, K=5", "VAE, 1 layer, K=1"),
    ("IWAE, 1 layer, K=50", "IWAE, 1 layer, K=5"),
    ("IWAE, 2 layers, K=5", "VAE, 2 layers, K=1"),
    ("IWAE, 2 layers, K=50", "IWAE, 2 layers, K=5"),
    ("IWAE, 1 layer, K=5", "VAE, 1 layer, K=5"),
    ("VAE, 2 layers, K=1", "VAE, 1 layer, K=1"),
    ("IWAE, 2 layers, K=5", "IWAE, 1 layer, K=5"),
    ("IWAE, 2 layers, K=50", "IWAE, 1 layer, K=50"),
)
"""Better and worse of two methods, wherever a table has published both."""


@dataclass(frozen=True)
class Difference:
    """Mean of first - second, its standard error (NaN where it is unknown), and over how many repeats."""

    value: float
    error: float
    repeats: int


def difference(results: Results, task: str, first: str, second: str, column: str = "nll") -> Difference | None:
    """Of a column of two guides over the repeats that both have, None where they share none.

    The error is that over repeats; of a single one, that over the held-out rows in pairs, where the rows' arrays are
    kept.
    """
    rows = results.good
    part = rows[rows["task"] == task]
    both = [part[part["guide"] == guide].set_index("seed") for guide in (first, second)]
    common = [seed for seed in both[0].index if seed in both[1].index]
    if not common:
        return None
    values: Any = np.array([float(both[0].loc[s, column]) - float(both[1].loc[s, column]) for s in common])
    error = math.nan
    if len(common) > 1:
        error = float(values.std(ddof=1) / math.sqrt(len(common)))
    elif column == "nll":
        pairs = [results.arrays(str(own.loc[common[0], "key"])).get("per_datum") for own in both]
        if pairs[0] is not None and pairs[1] is not None and pairs[0].shape == pairs[1].shape:
            gains = torch.from_numpy(pairs[0]).double() - torch.from_numpy(pairs[1]).double()
            error = mean_and_standard_error(gains)[1]
    return Difference(float(values.mean()), error, len(common))


def known(task: str, method: str) -> Published | None:
    """The published NLL of a method on the data set of a task, whatever its protocol: for orders alone."""
    return _published().get((name_of(task), method))


@cache
def _published() -> dict[tuple[str, str], Published]:
    return {(one.task, one.method): one for one in published("density") if one.metric == "nll"}


def orders(results: Results) -> pd.DataFrame:
    """Every pair of `ORDER` that is published and was run: our difference beside theirs."""
    found = []
    for task in dict.fromkeys(results.good["task"]):
        for better, worse in ORDER:
            theirs = known(task, better), known(task, worse)
            ours = difference(results, task, better, worse)
            if ours is None or theirs[0] is None or theirs[1] is None:
                continue
            found.append(
                {
                    "task": task, "better": better, "worse": worse, "value": ours.value, "error": ours.error,
                    "published": theirs[0].value - theirs[1].value, "tag": theirs[0].tag,
                }
            )  # fmt: skip
    return pd.DataFrame(found, columns=["task", "better", "worse", "value", "error", "published", "tag"])


def checks(results: Results) -> pd.DataFrame:
    """The recipe within its tolerance, and orders as published beyond two standard errors; nothing at the smoke budget.

    Where the rows' arrays were not kept an order rests on its sign alone.
    """
    found: list[dict[str, Any]] = []
    rows = results.good
    if results.plan["budget"] == "smoke":
        return pd.DataFrame(found)
    own: Any = rows[(rows["task"] == STATIC) & (rows["guide"] == RECIPE)]["nll"]
    if len(own):
        value = float(own.mean())
        found.append(
            _check(STATIC, RECIPE, "nll", value, f"{RECIPE_NLL}", RECIPE_TOLERANCE,
                   abs(value - RECIPE_NLL) <= RECIPE_TOLERANCE)
        )  # fmt: skip
    row: Any
    for row in orders(results).to_dict("records"):
        tolerance = 0.0 if math.isnan(row["error"]) else WIDTH * row["error"]
        guide = f"{row['better']} - {row['worse']}"
        expected = f"below 0 by more than the tolerance (published {row['published']:+.2f})"
        agree = row["value"] < -tolerance
        found.append(_check(row["task"], guide, "difference of nll", row["value"], expected, tolerance, agree))
    return pd.DataFrame(found)


def _check(
    task: str, guide: str, metric: str, value: float, expected: str, tolerance: float, agree: bool
) -> dict[str, Any]:
    return {
        "task": task, "guide": guide, "metric": metric, "value": value, "expected": expected, "tolerance": tolerance,
        "verdict": "agree" if agree else "miss",
    }  # fmt: skip


def notes(results: Results) -> list[str]:
    """What a reader must know."""
    found = [
        "NLL is minus an importance bound on log p(x): above the negative log-likelihood, and compared at equal "
        "numbers of draws alone; every guide trains a decoder of its own, so that its row is of another model",
        "fixed binarized MNIST repeats a published recipe but for this: validation is every fifth epoch, not every "
        "one; training stops where its mean over 60 epochs is no better than over the 60 before, beyond two standard "
        "errors; q starts at location 0 and scale 1; one round of 200 draws for each test image, not five",
        "tasks called 'short protocol' have the models, guides, start and batches of Burda, Grosse and Salakhutdinov, "
        "2016, and a few epochs for their 3280: of the published numbers only the order of two methods is compared",
        "OMNIGLOT is a cut of our own, 15 drawers of each character to train on (every 24th of their images for "
        "validation) and 5 to test; it is not that of the published tables",
        "MNIST and OMNIGLOT: training pixels are drawn anew for each batch, held-out ones once; Fashion-MNIST: a pixel "
        "is 1 where its level is above 1/2, and no table of it is published",
        "Frey faces: grey levels k/255 under a normal density of one learned scale, not dequantized, in nats a frame; "
        "frames are partitioned at random, by seed, so that a held-out frame has neighbours in training",
    ]
    if results.plan["budget"] == "smoke":
        found.insert(0, "the smoke budget shows that everything runs, and is far too short for a conclusion")
    return found
