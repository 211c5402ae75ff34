"""Bayesian classifiers of the moons suite: one network under many families, and where each of them is unsure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dgm
from dgm.bench_cells import Cell
from dgm.guides.dropout import Dropout
from dgm.guides.ensemble import Ensemble
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.laplace import Laplace
from dgm.guides.matrix_normal import MatrixNormal
from dgm.guides.nuts import NUTS
from dgm.guides.per_layer import PerLayer
from dgm.guides.stein import Stein
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Bernoulli
from dgm.predictive import predict
from dgm.registry import families

from .moons_models import log_densities

TASK = "BNN: two moons, 100 rows"
REFERENCE = "NUTS"
NAMED = {
    "diagonal normal": "diagonal-normal", "low-rank normal": "low-rank-normal", "full normal": "full-normal",
    "autoregressive flow": "inverse-autoregressive-flow",
}  # fmt: skip
OTHERS: dict[str, Callable[..., Any]] = {
    "matrix normal per layer": partial(PerLayer, family={"network*": MatrixNormal, "*": FullNormal}),
    "Laplace": Laplace,
    "dropout": partial(Dropout, rate=0.1),
    "ensemble of 5 points": partial(Ensemble, members=5),
    "Stein, 20 points": Stein,
}
GUIDES = ("point", *NAMED, *OTHERS, REFERENCE)
SMOKE = ("point", "diagonal normal", "Laplace", REFERENCE)
OWN = ("ensemble of 5 points", "Stein, 20 points")
"""Guides that bring their own objective."""
ROWS = 100
RADIUS = 4.0
CENTRE = (0.5, 0.25)
EDGES = ((-3.5, 4.5), (-3.25, 3.75))
GRID = (65, 57)
"""Points of the picture in both directions, an eighth apart."""


def bnn_cells(size: dict[str, Any], smoke: bool) -> list[Cell]:
    """Every guide for each seed; a seed has rows of its own."""
    settings = {"rows": ROWS, "hidden": 20, "prior": 3.0, "lr": 1e-2}
    found = []
    for guide in SMOKE if smoke else GUIDES:
        own = (
            {"chain": size["chain"], "chains": 2} if guide == REFERENCE
            else {"steps": size["bnn_steps"], "particles": size["particles"]}
        )  # fmt: skip
        found += [
            Cell(TASK, guide, seed, {**settings, **own, "draws": size["bnn_draws"]}) for seed in range(size["seeds"])
        ]
    return found


def classifier(hidden: int, prior: float) -> BNN:
    """One layer of tanh units, the log-odds of class 1, and the prior N(0, prior^2) on every weight."""
    network = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return BNN(network, likelihood=Bernoulli(), prior=prior)


def guide_of(name: str, settings: Any) -> Callable[..., Any]:
    """`(model, *batch) -> guide`."""
    if name == REFERENCE:
        return partial(NUTS, draws=settings["chain"], warmup=settings["chain"], chains=settings["chains"], depth=6)
    if name in OTHERS:
        return OTHERS[name]
    return partial(Global, family=families()[NAMED.get(name, name)].make)


def run_bnn(cells: Sequence[Cell]) -> list[Any]:
    """A row for each seed of one guide; all are trained at once, on rows of their own."""
    first, settings = cells[0], cells[0].settings
    data = dgm.load("moons")
    x, y = data.train[0], data.train[1].to(data.train[0].dtype)
    parts = [torch.arange(settings["rows"]) + settings["rows"] * cell.repeat for cell in cells]
    steps = settings.get("steps", 1)
    loss = None if first.guide in OWN or steps == 1 else dgm.ELBO(settings["particles"])
    fits = dgm.fit(
        partial(classifier, settings["hidden"], settings["prior"]), guide_of(first.guide, settings), x, y,
        steps=steps, lr=settings["lr"], loss=loss, clip=1e3, compile="trace",
        replicas={"seed": [cell.repeat for cell in cells], "rows": parts},
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )  # fmt: skip
    held_out = data.test[0], data.test[1].to(x.dtype)
    return [_row(fit, held_out, cell) for fit, cell in zip(fits, cells, strict=True)]


def _row(fit: Any, held_out: tuple[Tensor, Tensor], cell: Cell) -> Any:
    if fit.error is not None:
        return RuntimeError(fit.error)
    draws, seed = cell.settings["draws"], cell.repeat
    found: Any = dgm.evaluate(fit.model, fit.guide, *held_out, num_samples=draws, seed=seed)
    row: dict[str, Any] = {k: found.summary[k] for k in ("log_likelihood", "accuracy", "calibration_error")}
    row["per_datum"] = found.prediction.log_likelihoods().float()
    for name, points in (("boundary", boundary()), ("far", far())):
        seen = _seen(fit, points, draws)
        row[f"{name}_entropy"] = float(seen.predictive_entropy().mean())
        row[f"{name}_epistemic"] = float(seen.mutual_information().mean())
    seen = _seen(fit, grid(), draws)
    row["probability"] = seen.probs[:, 1].float().reshape(GRID)
    row["entropy"] = seen.predictive_entropy().float().reshape(GRID)
    row["epistemic"] = seen.mutual_information().float().reshape(GRID)
    if cell.guide == REFERENCE:
        row |= {"rhat": float(fit.guide.log_density[0]), "ess": float(fit.guide.log_density[1])}
    return {**row, "seconds": fit.seconds}


def _seen(fit: Any, points: Tensor, draws: int) -> Any:
    with dgm.programs.preserved_rng(0):
        return predict(fit.model, fit.guide, points, torch.zeros(len(points)), num_samples=draws)


def grid() -> Tensor:
    """The picture's points, `(65 * 57, 2)`, first column slow."""
    return torch.cartesian_prod(*(torch.linspace(*edge, count) for edge, count in zip(EDGES, GRID, strict=True)))


def far() -> Tensor:
    """64 points on a circle about the data, 2.5 from the nearest of them or more."""
    angle = torch.arange(64) * (2 * torch.pi / 64)
    return torch.stack([CENTRE[0] + RADIUS * angle.cos(), CENTRE[1] + RADIUS * angle.sin()], -1)


def boundary() -> Tensor:
    """Points between the moons where both are equally likely by the density that they were drawn from, `(N, 2)`."""
    sides = torch.linspace(-0.75, 1.75, 101), torch.linspace(-0.6, 1.1, 69)
    points = torch.cartesian_prod(*sides)
    upper, lower = log_densities(points)
    sign = (upper > lower).reshape(101, 69)
    here = sign[:, 1:] != sign[:, :-1]
    return torch.stack([points.reshape(101, 69, 2)[:, 1:][here], points.reshape(101, 69, 2)[:, :-1][here]]).mean(0)
