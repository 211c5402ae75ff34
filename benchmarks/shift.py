"""Classifiers of images under shift: accuracy and calibration as images are corrupted, and foreign images told or not.

One Bayesian network, 784-100-100-10 with ReLU, trained on MNIST or on Fashion-MNIST under many guides; each seed has
10,000 training images of its own, from the 55,000 that `dgm.load` calls training. Judged on the same held-out images:
the first 5000 test images as they are; the first 1000 of them rotated, noisy, blurred or moved, in five severities; and
2000 of each of three foreign kinds, the other data set, OMNIGLOT and uniform noise. The protocol is our own. Prior
scale, step size and number of steps were chosen by validation images of MNIST for a point and a diagonal normal, and
are the same for all guides and both sets.

    dgm bench run shift --budget short --jobs 2
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dgm.bench_cells import Cell, Metric, Suite

from .shift_bnn import GUIDES, SMOKE, run_task
from .shift_images import NEEDED, TRAINED, tests

BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": 1, "halved": True, "hidden": [32], "rows": 2000, "steps": 60, "draws": 10, "test": 400,
              "shifted": 100, "foreign": 200},
    "short": {"seeds": 3, "halved": True, "hidden": [100, 100], "rows": 10_000, "steps": 2500, "draws": 32,
              "test": 5000, "shifted": 1000, "foreign": 2000},
    "full": {"seeds": 10, "halved": False, "hidden": [400, 400], "rows": 55_000, "steps": 50_000, "draws": 100,
             "test": 10_000, "shifted": 2000, "foreign": 5000},
}  # fmt: skip
SLOW = {"low-rank normal": 4.0, "matrix normal per layer": 2.0, "multiplicative flow": 4.0, "ensemble of 5 points": 4.0}
"""Cost of a step in that of a point, roughly."""


def cells(budget: str) -> list[Cell]:
    """Every guide for each seed on both sets."""
    size = dict(BUDGET[budget])
    seeds = size.pop("seeds")
    settings = {**size, "batch_size": 100, "lr": 3e-3, "prior": 4.0, "compile": "trace"}
    guides = SMOKE if budget == "smoke" else GUIDES
    return [Cell(task, guide, seed, settings) for task in TRAINED for guide in guides for seed in range(seeds)]


def run(cells: Sequence[Cell]) -> Iterator[Any]:
    """All seeds of a guide on a task at once."""
    return run_task(cells)


def ready(task: str) -> None:
    """Raises DataError where a data set is missing."""
    for name in NEEDED:
        tests(name)


def seconds(cell: Cell) -> float:
    """A rough estimate, of three seeds at once."""
    step = 1.5e-3 * (1.0 if cell.settings["halved"] else 12.0) * SLOW.get(cell.guide, 1.0)
    return 4.0 + step * cell.settings["steps"]


SUITE = Suite(
    "shift",
    cells,
    run,
    [
        Metric("log_likelihood", "higher", "log-likelihood", "log predictive probability of a clean test image, nats"),
    ],
    summary="Classifiers of images under corruption, and foreign images told or not, by family",
    group_by=("task", "guide"),
    ready=ready,
    seconds=seconds,
)


if __name__ == "__main__":
    from .__main__ import main

    main(["shift", *sys.argv[1:]])
