"""The tips of the field as an ablation: each on and off on two models, with its effect, its error and its cost.

Thirteen tricks and a control on four small models: a Bernoulli VAE (digits, redrawn pixels), a Gaussian VAE (Frey
faces), and two regressions by a network of 50 ReLU units with normal priors (yacht, diabetes). A trick of one kind of
model is tried on both models of that kind, any other on one VAE and one BNN. On and off have the same number of steps,
the same step size, and for each split the same start, data order and noise where the trick leaves them the same; split
k of the data is trained with seed k. The step size was chosen for the plain models, with no trick at all, which favours
them. The score is held out: for VAEs the importance bound on log p(x) of 100 draws, for BNNs the log predictive
density. An effect is the mean of paired differences over splits.

    dgm bench run tricks --budget short --jobs 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dgm
from dgm.bench_cells import Cell, Metric, Suite

from .tricks_effects import notes, story, tables
from .tricks_list import variants
from .tricks_models import DIABETES, DIGITS, FREY, VAES, YACHT, data_of, trained

STEPS = {DIGITS: 2000, FREY: 2000, YACHT: 4000, DIABETES: 3000}
BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"splits": 2, "share": 0.005, "draws": 20},
    "short": {"splits": 8, "share": 1.0, "draws": 100},
    "full": {"splits": 10, "share": 10.0, "draws": 1000},
}


def cells(budget: str) -> list[Cell]:
    """Every variant of every model on every split."""
    size, found = BUDGET[budget], []
    for task, steps in STEPS.items():
        own = {"steps": max(2, round(size["share"] * steps)), "draws": size["draws"]}
        own["compile"] = False if budget == "smoke" else "trace"  # a graph takes longer than ten steps
        for name, settings in variants(task).items():
            found += [Cell(task, name, split, {**settings, **own}) for split in range(size["splits"])]
    return found


def run(cells: Sequence[Cell]) -> Sequence[Any]:
    """A row for each split of one variant; all are trained at once, where the engine allows it."""
    task, settings, splits = cells[0].task, dict(cells[0].settings), [cell.repeat for cell in cells]
    parts = [data_of(task, split) for split in splits]
    fits = trained(task, settings, parts, splits)
    rows: list[Any] = []
    for fit, part, split in zip(fits, parts, splits, strict=True):
        if fit.error is not None:
            rows.append(RuntimeError(fit.error))
            continue
        try:
            found = dgm.evaluate(
                fit.model, fit.guide, *part.test, num_samples=settings["draws"], y_std=part.y_std, seed=split
            )
        except Exception as error:  # of one split: the others have their rows
            rows.append(error)
            continue
        row = {"score": found.summary["bound"], "training_cpu_seconds": fit.cpu_seconds, "seconds": fit.seconds}
        rows.append(row if task in VAES else {**row, "rmse": found.summary["rmse"]})
    return rows


def ready(task: str) -> None:
    """Raises DataError where the file of a model's data is missing."""
    data_of(task, 0)


def seconds(cell: Cell) -> float:
    """A rough estimate: a step of a replica, its particles, and a graph shared by the splits."""
    step = 3e-3 if cell.task == FREY else 8e-4
    return 0.5 + step * cell.settings["steps"] * (1 + 0.5 * (cell.settings["particles"] - 1))


SUITE = Suite(
    "tricks",
    cells,
    run,
    [
        Metric("score", "higher", "score, nats", "of a held-out row: bound on log p(x), or log predictive density"),
        Metric("rmse", "lower", "RMSE", "of the predictive mean, units of y"),
    ],
    summary="The tips of the field as an ablation: each on and off on two models, with its effect, error and cost",
    repeats="split",
    group_by=("task", "guide"),
    ready=ready,
    seconds=seconds,
    tables=tables,
    notes=notes,
    story=story,
)
