"""A row of `posteriordb`: one guide on one posterior, trained, drawn from, and held against the reference draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

import dgm
from dgm.discrepancy import mmd, moment_errors
from dgm.graph import one_line
from dgm.guides.ensemble import Ensemble
from dgm.guides.global_ import Global
from dgm.guides.laplace import Laplace
from dgm.guides.nuts import NUTS
from dgm.guides.stein import Stein
from dgm.ladder_families import start_family
from dgm.mixing import diagnose
from dgm.pair import Pair
from dgm.posthoc import has_density
from dgm.programs import preserved_rng
from dgm.psis import pareto_k
from dgm.registry import families
from dgm.runs import Runs

from .posteriordb_data import Posterior
from .posteriordb_start import SITE, Start, coordinates, whitened

LEFT_OUT = ("point", "matrix-normal")
"""Families that have no spread, and one for vectors that are matrices."""

MEMBERS = ("ensemble of 5 normals", "Stein, 50 points")
OTHERS = ("Laplace", *MEMBERS, "NUTS")
LARGEST_Z = 3.0


@dataclass(frozen=True)
class Settings:
    """Budget of every row.

    draws: of each guide, for its moments; mmd_draws: for the discrepancy. chains, samples, warmup, depth: of NUTS.
    """

    steps: int = 1000
    lr: float = 0.03
    particles: int = 16
    seeds: int = 1
    draws: int = 10_000
    khat_draws: int = 4000
    mmd_draws: int = 2000
    chains: int = 4
    samples: int = 500
    warmup: int = 300
    depth: int = 8


def guide_names() -> list[str]:
    """What --guides takes."""
    return [name for name in families() if name not in LEFT_OUT] + list(OTHERS)


def maker(name: str, start: Start) -> Callable[..., Any]:
    """`(model, *batch) -> guide` of one row, at its start."""
    zero = {SITE: torch.zeros_like(start.loc)}
    if name == "Stein, 50 points":
        return partial(Stein, members=50)
    if name == "ensemble of 5 normals":
        return partial(Ensemble, members=5, family=families()["diagonal-normal"].make, init_scale=0.5)

    def make(model: Any, *batch: Any) -> Global:
        guide = Global(model, *batch, family=families()[name].make, init=zero)
        start_family(guide.family, start.standard())
        return guide

    return make


def rows_of(posterior: Posterior, start: Start, name: str, settings: Settings) -> list[dict[str, Any]]:
    """One guide on one posterior, a row for each seed; one that fails is a row that says so."""
    row: dict[str, Any] = {"posterior": posterior.name, "guide": name, "mode": start.found}
    if name == "NUTS":
        try:
            return [row | nuts_row(posterior, start, settings)]
        except Exception as error:  # hours of other rows are not to be lost for one
            return [row | {"status": one_line(error)}]
    program, batch, began = whitened(posterior.model, start), posterior.model.batch, time.process_time()
    try:
        if name == "Laplace":
            guide = Laplace(program, *batch, init={SITE: torch.zeros_like(start.loc)})
            guide.finish(program, *batch)
            row |= {"seconds": time.process_time() - began, "seed": 0}
            return [row | scores(posterior, start, program, guide, settings)]
        fits = dgm.fit(
            lambda: program, maker(name, start), *batch, steps=settings.steps, lr=settings.lr, clip=100.0,
            compile="trace", replicas=settings.seeds,
            loss=None if name in MEMBERS else dgm.ELBO(settings.particles, draws="sobol"),  # these have their own
            schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=settings.steps),
        )  # fmt: skip
    except Exception as error:
        return [row | {"status": one_line(error)}]
    row["seconds"] = (time.process_time() - began) / settings.seeds
    rows = []
    for fit in fits:
        good = fit.error is None
        told = scores(posterior, start, fit.model, fit.guide, settings) if good else {"status": fit.error}
        rows.append(row | {"seed": fit.seed} | told)
    return rows


def scores(posterior: Posterior, start: Start, model: Any, guide: Any, settings: Settings) -> dict[str, Any]:
    """Bound, k-hat and discrepancy of a trained guide."""
    batch = posterior.model.batch
    v = guide_draws(model, guide, batch, settings.draws, seed=2)
    parameters = posterior.matrix(dict(coordinates(start, v)))
    out: dict[str, Any] = {"status": "ok", "elbo": math.nan, "khat": math.nan}
    bad = ~parameters.isfinite().all(1)
    if bool(bad.any()):
        out["status"] = f"{int(bad.sum())} of {len(bad)} draws are not finite"
        return out
    if has_density(guide):
        weights = dgm.log_weights(model, guide, *batch, num_samples=settings.khat_draws, seed=1).double()
        out |= {"elbo": float(weights.mean()), "khat": float(pareto_k(weights))}
    trained = guide.parameters() if isinstance(guide, nn.Module) else ()
    return out | {"parameters": sum(p.numel() for p in trained)} | compared(posterior, parameters, settings)


def guide_draws(model: Any, guide: Any, batch: Sequence[Tensor], count: int, seed: int) -> Tensor:
    """Draws of v, `(count, d)`."""
    pair = Pair(model, guide)

    def one(data: Sequence[Any]) -> tuple[Tensor, ...]:
        node: Any = poutine.trace(pair.run_guide).get_trace(*data).nodes[SITE]
        return (node["value"],)

    with preserved_rng(seed):
        runs = Runs(pair, one, batch)
        return torch.cat([part[0] for part in runs.passes(count)])


def compared(posterior: Posterior, parameters: Tensor, settings: Settings) -> dict[str, float]:
    """Errors of moments in reference standard deviations, and the squared maximum mean discrepancy."""
    errors = moment_errors(parameters, posterior.reference)
    return {
        "mean_error": errors.worst_mean,
        "mean_error_average": float(errors.mean.abs().mean()),
        "sd_error": errors.worst_log_sd,
        "sd_ratio_least": float(errors.sd_ratio.min()),
        "sd_ratio_most": float(errors.sd_ratio.max()),
        "mmd2": mmd(parameters, posterior.reference, max_draws=settings.mmd_draws).squared,
    }


def nuts_row(posterior: Posterior, start: Start, settings: Settings, seed: int = 1) -> dict[str, Any]:
    """NUTS, and the largest difference of a mean from the reference's in standard errors of both.

    z_i = (m_i - r_i) / sqrt(sd_i^2 / ESS_i + sd_ref,i^2 / ESS_ref,i)
    """
    began = time.process_time()
    program, batch = whitened(posterior.model, start, full=True), posterior.model.batch
    guide = NUTS(
        program, *batch, draws=settings.samples, warmup=settings.warmup, chains=settings.chains,
        depth=settings.depth, init={SITE: torch.zeros_like(start.loc)}, scale=1.0,
    )  # fmt: skip
    guide.finish(program, *batch, seed=seed)
    parameters = posterior.matrix(dict(coordinates(start, guide.samples, full=True)))
    z, rhat, ess = agreement(parameters.unflatten(0, (settings.chains, -1)), posterior.draws)
    worst = int(z.abs().argmax())
    out: dict[str, Any] = {
        "status": "ok", "parameters": 0, "seconds": time.process_time() - began, "seed": seed,
        "worst_z": float(z.abs()[worst]), "worst_z_of": posterior.names[worst], "count_z": len(z),
        "beyond_z": int((z.abs() > LARGEST_Z).sum()), "rhat": float(rhat.max()), "ess": float(ess.min()),
        "divergences": int(guide.divergences), "cut": float(guide.full),
    }  # fmt: skip
    return out | compared(posterior, parameters, settings)


def agreement(drawn: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z of each mean, R-hat and effective sample size, `(D,)`, of chains `(chains, draws, D)` against the reference's.

    >>> drawn = torch.randn(4, 200, 3, generator=torch.Generator().manual_seed(0))
    >>> z, rhat, ess = agreement(drawn + 1, drawn)
    >>> bool((z > 10).all()), rhat.shape
    (True, torch.Size([3]))
    """
    rhat, ess = diagnose(drawn)
    ess_reference = diagnose(reference)[1].clamp(max=reference[..., 0].numel())
    ess = ess.clamp(max=drawn[..., 0].numel())  # above the number of draws the estimate itself is too uncertain
    one, two = drawn.flatten(0, 1).double(), reference.flatten(0, 1).double()
    error = (one.var(0) / ess + two.var(0) / ess_reference).sqrt()
    return (one.mean(0) - two.mean(0)) / error, rhat, ess
