"""Estimates of log p(x) where it is known: their errors against what they state, and how often their intervals cover.

Linear VAE (probabilistic PCA) at its true parameters; guides in closed form, none is trained. First 20 rows, and 2000
as a minibatch of 200,000, whose scale must not enter: importance bounds, annealed importance sampling from the best
diagonal normal and from the prior, and their reverse from exact posterior draws. z is (estimate - bias - exact) / error
over draws. Then coverage of 95 % intervals over repetitions, each with data and draws of its own; the repetitions are
rows of one batch, which share nothing but the pilot's schedule.

The diagonal normal of the largest ELBO is narrower than the posterior: w^2 has a mean only where 2 P - diag(P) is
positive definite, which it is not here. Its importance bound has no error by the delta method, and k-hat says so; an
interval that may be trusted takes the `wide` guide, with 1.2 times the posterior's marginal standard deviations.

    python -m dgm.benchmarks.evidence
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from scipy.special import stdtrit
from torch import Tensor

from dgm.annealing import annealed_bound, reverse_annealed_bound
from dgm.bounds import LogWeightSummary, mean_and_standard_error, paired_difference
from dgm.estimate import Estimate
from dgm.models.linear_vae import LinearVAE
from dgm.programs import preserved_rng
from dgm.provenance import provenance
from dgm.psis import k_threshold, pareto_k
from dgm.simulate import simulate
from dgm.weights import LogWeightSampler, log_weights

Guide = Callable[[Tensor], None]
DTYPE = torch.float64


def best_diagonal(model: LinearVAE, full_size: int | None = None, shrink: float = 1.0) -> Guide:
    """q(z | x) = N(shrink * E[z | x], diag(1 / P_ii)): at shrink = 1 the diagonal normal of the largest ELBO."""

    def guide(x: Tensor) -> None:
        mean = shrink * model.posterior(x).mean
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(mean, model.precision().diagonal().rsqrt()).to_event(1))

    return guide


def wide(model: LinearVAE, full_size: int | None = None) -> Guide:
    """q(z | x) = N(E[z | x], 1.2^2 diag(P^-1)): weights with a variance."""

    def guide(x: Tensor) -> None:
        exact: Any = model.posterior(x)
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(exact.mean, 1.2 * exact.variance.sqrt()).to_event(1))

    return guide


def khat(model: Any, guide: Guide, x: Tensor, seed: int) -> dict[str, float]:
    """Median k-hat of 1000 draws over the first rows, and the share that is not to be trusted."""
    k = pareto_k(log_weights(model, guide, x[:100], num_samples=1000, seed=seed))
    return {"khat_median": float(k.median()), "khat_bad": float((k > k_threshold(1000)).double().mean())}


def minibatch(model: LinearVAE, full_size: int) -> Guide:
    """The model of `full_size` rows of which the batch is a part."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", full_size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(model.weight[0]), 1.0).to_event(1))
            pyro.sample("x", model.decode(z), obs=x)

    return program


def weighed(model: Any, guide: Guide, x: Tensor, draws: int, seed: int) -> LogWeightSummary:
    """Log weights of every row, summarised."""
    summary = LogWeightSummary()
    with preserved_rng(seed):
        for chunk in LogWeightSampler(model, guide, x).chunks(draws):
            summary.update(chunk.local)
    return summary


def simulated(rows: int, seed: int) -> tuple[LinearVAE, Tensor, Tensor]:
    """The model, x drawn from it, and the z that made x."""
    generator = torch.Generator().manual_seed(0)
    model, template = LinearVAE.simulate(rows, features=5, latent=3, scale=0.5, generator=generator, dtype=DTYPE)
    model.requires_grad_(False)
    (x,), latents = simulate(model, template, seed=seed)
    return model, x, latents["z"]


def known(rows: int, steps: int, draws: int = 5000, chains: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Each estimator against the exact evidence of these rows, as a minibatch of 100 times as many."""
    model, x, _ = simulated(rows, seed)
    exact, program = model.log_evidence(x), minibatch(model, 100 * rows)
    guide = best_diagonal(model, 100 * rows)
    with preserved_rng(seed):
        posterior = {"z": model.posterior(x).sample((chains,))}
    options: dict[str, Any] = {"chains": chains, "steps": steps, "leapfrogs": 4}
    found = {}
    for name, start in (("wide", wide(model, 100 * rows)), ("best diagonal", guide)):
        one = Estimate.of(weighed(program, start, x, draws, seed), "importance bound")
        found[f"importance bound, {name}"] = one.replace(details=khat(model, start, x, seed))
    starts: dict[str, Guide | None] = {"the best diagonal": guide, "the prior": None}
    for name, begin in starts.items():
        found[f"annealed from {name}"] = annealed_bound(program, begin, x, seed=seed, **options)
        back = reverse_annealed_bound(program, begin, x, exact=posterior, seed=seed + 1, mixing=0, **options)
        found[f"reverse to {name}"] = back
    return [
        {
            "rows": rows, "estimator": name, "side": e.side, "draws": e.draws, "exact": float(exact.mean()),
            "error": float((e.values - exact).mean()), "stated_error": e.mc_se, "stated_bias": float(e.bias.mean()),
            "z": (e.mean - float(e.bias.mean()) - float(exact.mean())) / e.mc_se, "ess": float(e.ess.mean()),
            **{k.replace(" ", "_"): v for k, v in e.details.items()},
        }
        for name, e in found.items()
    ]  # fmt: skip


def coverage(repetitions: int, rows: int, steps: int, seed: int = 1) -> list[dict[str, Any]]:
    """Share of the repetitions whose 95 % interval holds the exact value."""
    model, x, z = simulated(repetitions * rows, seed)
    exact = model.log_evidence(x).reshape(repetitions, rows).mean(1).tolist()
    spectrum = torch.linalg.slogdet(model.weight @ model.weight.mT + (2 * model.log_scale).exp() * torch.eye(5).to(x))
    population = float(-(spectrum.logabsdet + 5 * (1 + math.log(2 * math.pi))) / 2)  # minus the entropy of p(x)
    gap, loss = float(model.diagonal_gap()), float((model.precision().trace() - 3) * 0.005)
    best, worse = best_diagonal(model), best_diagonal(model, shrink=0.9)  # E KL of the second is larger by `loss`

    elbo = weighed(model, best, x, 20, seed)
    other = weighed(model, worse, x, 20, seed + 1)
    bound = Estimate.of(weighed(model, wide(model), x, 2000, seed + 2), "importance bound")
    narrow = Estimate.of(weighed(model, best, x, 2000, seed + 6), "importance bound")
    options: dict[str, Any] = {"chains": 16, "steps": steps, "leapfrogs": 4}
    forward = annealed_bound(model, best, x, seed=seed + 3, **options)
    with preserved_rng(seed):
        draws = {"z": model.posterior(x).sample((16,))}
    reverse = reverse_annealed_bound(model, best, x, exact=draws, seed=seed + 4, mixing=0, **options)
    shared = reverse_annealed_bound(model, best, x, exact={"z": z}, seed=seed + 5, mixing=20, **options)

    inside: dict[str, list[bool]] = {}

    def count(name: str, interval: tuple[float, float], truth: float) -> None:
        inside.setdefault(name, []).append(interval[0] <= truth <= interval[1])

    for r in range(repetitions):
        which = torch.arange(r * rows, (r + 1) * rows)
        a, b = elbo.elbo[which], other.elbo[which]
        count("ELBO, over data", _t(*mean_and_standard_error(a), rows), population - gap)
        count("paired difference of two ELBOs, over data", _t(*paired_difference(a, b), rows), loss)
        count("approximation gap, over data", _t(*paired_difference(bound.values[which], a), rows), gap)
        count("importance bound of the best diagonal, over draws", narrow.rows(which).interval(over="draws"), exact[r])
        for name, e in (("importance bound", bound), ("annealed", forward), ("reverse, posterior draws", reverse)):
            count(f"{name}, over draws", e.rows(which).interval(over="draws"), exact[r])
            count(f"{name}, over data", e.rows(which).interval(over="data"), population)
        count("reverse, one draw for all chains, over draws", shared.rows(which).interval(over="draws"), exact[r])
        count("reverse, one draw for all chains, over data", shared.rows(which).interval(over="data"), population)
    return [
        {"interval": name, "level": 0.95, "repetitions": len(hits), "rows": rows, "covers": sum(hits) / len(hits)}
        for name, hits in inside.items()
    ]


def _t(mean: float, error: float, rows: int) -> tuple[float, float]:
    half = float(stdtrit(rows - 1, 0.975)) * error
    return mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--rows", type=int, default=20, help="data of one repetition")
    parser.add_argument("--steps", type=int, default=300, help="of an annealing")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    made_by = provenance()
    rows: list[dict[str, Any]] = []
    for size in (20, 2000):
        rows += known(size, options.steps)
    rows += coverage(options.repetitions, options.rows, options.steps)
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"protocol": __doc__, **made_by, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
