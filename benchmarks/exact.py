"""Where the answer is known: linear VAE and Bayesian linear regression, error to the exact evidence and posterior.

Linear VAE (probabilistic PCA), data drawn from it, decoder fixed to the truth, guide amortized by a linear encoder: the
full normal must reach the mean exact evidence, the diagonal normal stop short by its analytic KL, and both bounds of
K = 5000 meet the evidence. Of the gap (`dgm.gaps`, 50 rows) the family's must be that KL, the encoder's nothing.
k-hat of q = N(0, s^2) under p = N(0, 1) must be near 1 - s^2 for each datum, whatever size the plate declares.
Bayesian linear regression: mean and covariance of a minibatched full normal guide; with N/B = 50 the minibatch noise of
20,000 one-sample gradients alone leaves 0.17 of a correlation, so B = 100 there.

    python -m dgm.benchmarks.exact
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import dgm
from dgm.guides.amortized import Amortized
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import linear
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.linear_vae import LinearVAE
from dgm.optim import adam
from dgm.programs import preserved_rng
from dgm.provenance import provenance
from dgm.psis import pareto_k

BATCH = 20
SCHEDULE = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.998)


def linear_vae(rows: int, steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """ELBO and K = 5000 bound of the full and the diagonal guide, minus the exact mean evidence, in nats a datum."""
    model, x = LinearVAE.simulate(
        rows, features=5, latent=3, scale=0.5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    model.requires_grad_(False)
    evidence, gap = float(model.log_evidence(x).mean()), float(model.diagonal_gap())
    out = []
    for family in (FullNormal, DiagonalNormal):
        with preserved_rng(seed):
            guide = Amortized(model, x, family=family, encoder=linear()).double()
        dgm.fit(
            model, guide, x, steps=steps, batch_size=BATCH, seed=seed, schedule=SCHEDULE, optim=adam(0.02), clip=1e4
        )
        scores = dgm.evaluate(model, guide, x, num_samples=5000).summary
        expected = gap if family is DiagonalNormal else 0.0
        some = x[:50]
        parts = dgm.gaps(model, guide, some, log_evidence=model.log_evidence(some), num_samples=4000).summary
        out.append(
            {
                "model": "linear VAE", "rows": rows, "batch": BATCH, "guide": family.__name__, "evidence": evidence,
                "elbo_minus_evidence": scores["elbo"] - evidence, "expected": -expected,
                "bound_minus_evidence": scores["bound"] - evidence, "bound_se_over_data": scores["bound_se"],
                "bound_mc_se": scores["bound_mc_se"],
                **{f"{part}_gap": parts[part] for part in ("approximation", "amortization")},
                **{f"{part}_gap_mc_se": parts[f"{part}_mc_se"] for part in ("approximation", "amortization")},
            }
        )  # fmt: skip
    return out


def khat(scale: float, rows: int, declared: int, draws: int = 4000) -> dict[str, Any]:
    """Mean and spread of k-hat over data; theory has 1 - s^2 for every datum, the declared size of the plate none."""

    def program(width: float, x: Tensor) -> None:
        with pyro.plate("data", declared * len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.0, width))

    def model(x: Tensor) -> None:
        program(1.0, x)
        pyro.factor("observed", torch.zeros(()))

    weights = dgm.log_weights(model, partial(program, scale), torch.zeros(rows), num_samples=draws)
    found = pareto_k(weights.double())
    return {
        "model": "normal", "rows": rows, "plate": declared * rows, "guide": f"normal of width {scale}",
        "khat": float(found.mean()), "khat_sd": float(found.std()) if rows > 1 else None, "expected": 1 - scale**2,
    }  # fmt: skip


def regression(rows: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Largest error of the guide's mean and covariance, in the standard errors that S = 1000 exact draws would have."""
    generator = torch.Generator().manual_seed(seed)
    model = BayesianLinearRegression(4, noise=0.7)
    noise = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    x = (noise[:, :4] + noise[:, 4:5]) / 2**0.5  # every pair of columns has correlation 1/2
    y = x @ torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64) + 0.7 * noise[:, 5]
    with torch.no_grad():
        exact = model.posterior(x, y)
    guide = Global(model, x, y, family=FullNormal).double()
    gamma = 10 ** (-2.5 / steps)  # the step size falls far enough that the last iterate is not its own noise
    dgm.fit(
        model, guide, x, y, steps=steps, batch_size=min(100, rows), optim=adam(0.02), seed=seed,
        schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=gamma),
    )  # fmt: skip
    with torch.no_grad():
        q = guide.family()
        mean, covariance = q.mean.detach(), q.covariance_matrix.detach()
    sd, cov = exact.variance.sqrt(), exact.covariance_matrix
    draws = 1000
    mean_error = ((mean - exact.mean) / (sd / draws**0.5)).abs().max()
    cov_se = ((cov.square() + sd[:, None].square() * sd[None, :].square()) / draws).sqrt()
    cov_error = ((covariance - cov) / cov_se).abs().max()
    return {
        "model": "Bayesian linear regression", "rows": rows, "batch": min(100, rows), "guide": "FullNormal",
        "mean_error_sd": float(((mean - exact.mean) / sd).abs().max()), "mean_error_mcse": float(mean_error),
        "cov_error_relative": float(((covariance - cov) / (sd[:, None] * sd[None, :])).abs().max()),
        "cov_error_mcse": float(cov_error),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    made_by = provenance()
    rows: list[dict[str, Any]] = []
    for count in (BATCH, 50 * BATCH):
        rows += linear_vae(count, options.steps)
    for count in (BATCH, 50 * BATCH):
        rows.append(regression(count, 5 * options.steps))
    rows += [khat(s, n, d) for s in (0.9, 0.8, 0.7, 0.5) for n, d in ((1, 1), (100, 1), (1000, 1), (10_000, 100))]
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"protocol": __doc__, **made_by, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
