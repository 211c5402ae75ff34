"""Where the answer is known: evidence, posterior and gap of linear and conjugate models, for each family and estimator.

Every number is held against what theory says of that family, and a number outside its tolerance fails the run.

linear VAE (probabilistic PCA), data drawn from it, decoder fixed to the truth, guide amortized by a linear encoder; and
Bayesian linear regression with correlated columns, one posterior of four weights. Both posteriors are normal. A family
that holds every normal loses nothing; the mean field's gap is (sum_i log P_ii - log det P) / 2 with the posterior's
precision P; the radial normal adds the divergence of its distance; families that hold the mean field lose no more.
conjugate pairs: normal mean, Bernoulli rate, Poisson rate. The best normal in unconstrained coordinates is found by
quadrature: normals reach it, richer families get below. Means and standard deviations of draws are held against the
closed forms.
k-hat of q = N(0, s^2) under p = N(0, 1) is 1 - s^2 for each datum, whatever size the plate declares.
Estimators of the gradient are put side by side on the linear VAE with a full normal, whose optimum is exact for all.

    dgm bench run exact --budget smoke
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import dgm
from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_results import Results
from dgm.bounds import importance_bound
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import linear
from dgm.guides.global_ import Global
from dgm.models.linear_vae import LinearVAE
from dgm.psis import pareto_k
from dgm.registry import families

from .exact_truth import Truth, conjugate, moments, radial_excess, regression

FAMILIES = (
    "diagonal-normal", "full-normal", "low-rank-normal", "student-t", "radial-normal", "mixture",
    "inverse-autoregressive-flow", "coupling-affine-flow", "coupling-spline-flow", "planar-flow", "radial-flow",
    "sylvester-flow",
)  # fmt: skip
SOME = ("diagonal-normal", "mixture", "inverse-autoregressive-flow")
ALL_NORMALS = ("full-normal", "inverse-autoregressive-flow")
MEAN_FIELD = ("diagonal-normal", "student-t")
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "pathwise": dgm.ELBO,
    "sticking the landing": partial(dgm.ELBO, estimator="stl"),
    "analytic KL": partial(dgm.ELBO, kl="analytic"),
    "score function 16": partial(dgm.ELBO, 16, estimator="score"),
    "antithetic 8": partial(dgm.ELBO, 8, draws="antithetic"),
    "Sobol 8": partial(dgm.ELBO, 8, draws="sobol"),
    "importance weighted 8": partial(dgm.ImportanceELBO, 8),
    "doubly reparameterised 8": partial(dgm.ImportanceELBO, 8, estimator="dreg"),
    "Renyi half 8": partial(dgm.RenyiELBO, 0.5, 8),
    "wake-sleep 8": partial(dgm.ReweightedWakeSleep, 8),
}
IMPORTANCE = ("importance weighted 8", "doubly reparameterised 8")
"""Estimators whose objective hardly sees q once its bound is near the evidence: that bound is checked, not the gap."""
SAMPLES = 8
BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"steps": 300, "rows": (20,), "seeds": 1, "draws": 2000, "local": FAMILIES[:8], "pairs": SOME},
    "short": {"steps": 2000, "rows": (20, 1000), "seeds": 3, "draws": 5000, "local": FAMILIES, "pairs": FAMILIES},
    "full": {"steps": 6000, "rows": (20, 1000), "seeds": 5, "draws": 20_000, "local": FAMILIES, "pairs": FAMILIES},
}
TOLERANCE = {"smoke": (0.1, 0.05, 0.02), "short": (0.05, 0.02, 0.01), "full": (0.03, 0.02, 0.01)}
"""Nats that training may leave beside 4 standard errors of the draws: linear VAE, regression, conjugate pairs."""
BATCH = 20
WIDTHS = (0.9, 0.8, 0.7, 0.5)


def cells(budget: str) -> list[Cell]:
    """Families on the three models, estimators on one, and k-hat."""
    size = BUDGET[budget]
    base = {"steps": size["steps"], "draws": size["draws"]}
    found = []
    for seed in range(size["seeds"]):
        for rows in size["rows"]:
            own = {**base, "rows": rows, "tolerance": TOLERANCE[budget][0]}
            found += [Cell(f"linear VAE, {rows} rows", name, seed, {**own, "particles": 8}) for name in size["local"]]
        for task, names, tolerance in (
            ("linear regression", FAMILIES, TOLERANCE[budget][1]),
            ("conjugate pairs", size["pairs"], TOLERANCE[budget][2]),
        ):
            own = {**base, "rows": BATCH, "tolerance": tolerance, "particles": 16}
            found += [Cell(task, name, seed, own) for name in names]
        own = {**base, "rows": BATCH, "tolerance": TOLERANCE[budget][0]}
        found += [Cell(f"estimators, {BATCH} rows", name, seed, own) for name in ESTIMATORS]
        for width in WIDTHS:
            for declared in (1, 10 if budget == "smoke" else 100):
                task = f"k-hat, 100 data in a plate of {100 * declared}"
                settings = {
                    "draws": 1000 if declared == 10 else 4000,
                    "rows": 100,
                    "declared": declared,
                    "width": width,
                    "tolerance": 0.15,
                }
                if declared == 1 or budget != "smoke" or width == WIDTHS[2]:
                    found.append(Cell(task, f"normal of width {width}", seed, settings))
    return found


def run(cells: Sequence[Cell]) -> Sequence[Any]:
    """All seeds of a cell at once."""
    task = cells[0].task
    if task.startswith("k-hat"):
        return [khat(cell) for cell in cells]
    if task.startswith(("linear VAE", "estimators")):
        return linear_vae(cells)
    return known_posterior(cells, regression() if task == "linear regression" else conjugate())


def linear_vae(cells: Sequence[Cell]) -> list[Any]:
    """Gap and K-sample bound of an amortized guide, in nats a datum."""
    first, settings = cells[0], cells[0].settings
    model, x = LinearVAE.simulate(
        settings["rows"], features=5, latent=3, scale=0.5, generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )  # fmt: skip
    model.requires_grad_(False)
    evidence, mean_field = float(model.log_evidence(x).mean()), float(model.diagonal_gap())
    family = "full-normal" if first.task.startswith("estimators") else first.guide
    made = families()[family].make
    make: Callable[..., Any] = lambda model, x: Amortized(model, x, family=made, encoder=linear()).double()  # noqa: E731
    loss = dgm.ELBO(settings["particles"], draws="sobol") if first.guide == family else ESTIMATORS[first.guide]()
    fits = _fitted(lambda: model, make, (x,), cells, 0.05, loss, min(BATCH, len(x)))
    low, high = expected(family, mean_field, model.latent)
    rows = []
    for fit, cell in zip(fits, cells, strict=True):
        rows.append(fit if isinstance(fit, Exception) else _scores(fit, (x,), cell, evidence, low, high))
    return rows


def known_posterior(cells: Sequence[Cell], truth: Truth) -> list[Any]:
    """Gap, bound and moments of a global guide, in nats, and in posterior standard deviations."""
    name = cells[0].guide
    make = partial(Global, family=families()[name].make)
    loss = dgm.ELBO(cells[0].settings["particles"], draws="sobol")
    fits = _fitted(lambda: truth.program, lambda *a: make(*a).double(), truth.batch, cells, 0.05, loss, None)
    low, high = expected(name, truth.mean_field_gap, len(truth.mean)) if truth.normal else _best_normal(name, truth)
    rows: list[Any] = []
    for fit, cell in zip(fits, cells, strict=True):
        if isinstance(fit, Exception):
            rows.append(fit)
            continue
        row = _scores(fit, truth.batch, cell, truth.log_evidence, low, high)
        mean, sd = moments(fit.model, fit.guide, truth, cell.settings["draws"])
        row["mean_error"] = float(((mean - truth.mean) / truth.sd).abs().max())
        row["sd_error"] = float((sd / truth.sd).log().abs().max())
        row["holds_posterior"] = bool(truth.normal and name in ALL_NORMALS)
        rows.append(row)
    return rows


def expected(family: str, mean_field: float, size: int) -> tuple[float, float]:
    """Least and largest gap of a family at its optimum, where the posterior is normal."""
    if family in ALL_NORMALS:
        return 0.0, 0.0
    if family in MEAN_FIELD:
        return mean_field, mean_field
    if family == "radial-normal":
        return (mean_field + radial_excess(size),) * 2
    return 0.0, mean_field


def _best_normal(family: str, truth: Truth) -> tuple[float, float]:
    if family in ("diagonal-normal", "full-normal", "low-rank-normal"):
        return truth.mean_field_gap, truth.mean_field_gap
    return 0.0, math.inf if family == "radial-normal" else truth.mean_field_gap


def _fitted(
    model: Any, guide: Any, data: tuple[Tensor, ...], cells: Sequence[Cell], lr: float, loss: Any, batch: int | None
) -> list[Any]:
    steps = cells[0].settings["steps"]
    fits = dgm.fit(
        model, guide, *data, steps=steps, batch_size=batch, lr=lr, loss=loss, clip=1e3, compile="trace",
        replicas={"seed": [cell.repeat for cell in cells]},
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )  # fmt: skip
    return [fit if fit.error is None else RuntimeError(fit.error) for fit in fits]


def _scores(fit: Any, data: tuple[Tensor, ...], cell: Cell, evidence: float, low: float, high: float) -> dict[str, Any]:
    weights = dgm.log_weights(fit.model, fit.guide, *data, num_samples=cell.settings["draws"], seed=1).double()
    each = weights.mean(1) if weights.dim() == 2 else weights  # (S,): nats a datum, or nats
    bound = importance_bound(weights).mean()
    error = (weights - weights.amax(0)).exp()
    spread = float((error.std(0) / error.mean(0)).mean() / (len(weights) * (error[0].numel())) ** 0.5)
    few = importance_bound(weights[: len(weights) // SAMPLES * SAMPLES].unflatten(0, (SAMPLES, -1)).flatten(1)).mean()
    return {
        "gap": evidence - float(each.mean()), "gap_error": float(each.std() / len(each) ** 0.5),
        "expected_low": low, "expected_high": high, "bound_error": float(bound) - evidence,
        "bound_mc_error": spread, "bound8_error": float(few) - evidence,
        "khat": float(pareto_k(weights).median()), "seconds": fit.seconds,
    }  # fmt: skip


def khat(cell: Cell) -> dict[str, Any]:
    """Mean and spread of k-hat over data."""
    rows, declared = cell.settings["rows"], cell.settings["declared"]

    def program(width: float, x: Tensor) -> None:
        with pyro.plate("data", declared * len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, width))

    def model(x: Tensor) -> None:
        program(1.0, x)
        pyro.factor("observed", torch.zeros(()))

    guide = partial(program, cell.settings["width"])
    weights = dgm.log_weights(model, guide, torch.zeros(rows), num_samples=cell.settings["draws"], seed=cell.repeat)
    found = pareto_k(weights.double())
    theory = 1 - cell.settings["width"] ** 2
    return {"khat": float(found.mean()), "khat_sd": float(found.std()), "expected_low": theory, "expected_high": theory}


def checks(results: Results) -> pd.DataFrame:
    """What theory says of each row."""
    found = []
    row: Any
    for row in results.good.to_dict("records"):
        tolerance = float(row["tolerance"])
        if str(row["task"]).startswith("k-hat"):
            found.append(_check(row, "khat", row["khat"], row["expected_low"], row["expected_high"], tolerance))
            continue
        slack = tolerance + 4 * row["gap_error"]
        if row["guide"] in IMPORTANCE:
            found.append(_check(row, "bound8_error", row["bound8_error"], 0.0, 0.0, slack))
            continue
        found.append(_check(row, "gap", row["gap"], row["expected_low"], row["expected_high"], slack))
        if row["khat"] < 0.7:  # else the bound is too uncertain to be held against anything
            found.append(
                _check(row, "bound_error", row["bound_error"], 0.0, 0.0, tolerance + 4 * row["bound_mc_error"])
            )
        if row.get("holds_posterior") is True:
            found.append(_check(row, "mean_error", row["mean_error"], 0.0, 0.0, tolerance + 4 / row["draws"] ** 0.5))
            found.append(_check(row, "sd_error", row["sd_error"], 0.0, 0.0, tolerance + 3 / row["draws"] ** 0.5))
    return pd.DataFrame(found)


def _check(row: dict[str, Any], metric: str, value: float, low: float, high: float, tolerance: float) -> dict[str, Any]:
    inside = low - tolerance <= value <= high + tolerance
    said = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}" if math.isfinite(high) else f"{low:.3f} or more"
    return {
        "task": row["task"], "guide": row["guide"], "seed": row["seed"], "metric": metric, "value": value,
        "expected": said, "tolerance": tolerance, "verdict": "agree" if inside else "miss",
    }  # fmt: skip


SUITE = Suite(
    "exact",
    cells,
    run,
    [
        Metric("gap", "lower", "gap, nats", "log evidence minus ELBO: a datum of the linear VAE, else in all"),
        Metric("bound_error", None, "bound - evidence", "the bound of all draws minus the log evidence, nats"),
        Metric("mean_error", "lower", "mean", "largest error of a posterior mean, in posterior standard deviations"),
        Metric("sd_error", "lower", "sd", "largest |log| of a ratio of standard deviations"),
        Metric("khat", None, "k-hat"),
    ],
    summary="Evidence, posterior and gap where they are known, for each family and estimator",
    group_by=("task", "guide"),
    checks=checks,
)
