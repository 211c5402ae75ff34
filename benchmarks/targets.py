"""Families on three posteriors that are known: a correlated normal, a banana, and a network with two modes.

Evidence and moments are exact (closed form, or quadrature on a grid of two dimensions). For each family: the ELBO, the
error of the importance weighted log evidence, and the errors of the posterior's means and standard deviations in the
reference's. Theory orders them: full above low rank above diagonal on the normal, flows first on the banana, mixtures
and ensembles alone on both modes.

    python -m dgm.benchmarks.targets
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import dgm
from dgm.bounds import importance_bound
from dgm.errors import did_you_mean
from dgm.guides.global_ import Global
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Normal
from dgm.packing import Packing
from dgm.posthoc import has_density
from dgm.programs import isolated, preserved_rng
from dgm.provenance import provenance
from dgm.registry import attachments, families
from dgm.sites import latents

ATTACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "ensemble of 5 points": ("ensemble", {"members": 5}),
    "ensemble of 5 normals": ("ensemble", {"members": 5, "family": "diagonal-normal"}),
    "Stein, 50 points": ("stein", {"members": 50}),
    "Laplace, full": ("laplace", {"structure": "full"}),
    "Laplace, diagonal": ("laplace", {"structure": "diagonal"}),
    "SWAG": ("swag", {}),
    "multiplicative flow": ("multiplicative-flow", {}),
    "mixture, wide start": ("global", {"family": "mixture", "init_scale": 1.5}),
    "NUTS": ("nuts", {"chains": 4, "scale": 2.0}),
}


@dataclass
class Target:
    """A posterior that is known: log evidence, mean and standard deviation of the packed vector, `(d,)`."""

    name: str
    make: Callable[[], Any]
    batch: tuple[Tensor, ...]
    log_evidence: float
    mean: Tensor
    sd: Tensor


def normal(features: int = 10) -> Target:
    """Regression on correlated columns: the posterior is a normal with correlations up to 0.9."""
    with preserved_rng(0):
        common = torch.randn(40, 1)
        x = 0.3 * torch.randn(40, features) + common
        y = x @ torch.linspace(-1, 1, features) + 0.5 * torch.randn(40)
    model = BayesianLinearRegression(features, noise=0.5)
    posterior = model.posterior(x.double(), y.double())
    return Target(
        "correlated normal",
        partial(BayesianLinearRegression, features, noise=0.5),
        (x, y),
        float(model.log_evidence(x.double(), y.double())),
        posterior.mean.float(),
        posterior.variance.sqrt().float(),
    )


def banana_program(y: Tensor) -> None:
    """w ~ N(0, I),  y_n ~ N(w_2 + w_1^2, 1)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w[..., 1] + w[..., 0].square(), 0.5), obs=y)


def banana() -> Target:
    y = torch.full((5,), 0.5)
    return Target("banana", lambda: banana_program, (y,), *quadrature(banana_program, (y,), 5.0, 8.0))


def two_mode_network() -> BNN:
    """y = w_2 tanh(w_1 x): (w_1, w_2) and (-w_1, -w_2) are one function."""
    with preserved_rng(0):
        network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    return BNN(network, Normal(scale=0.2), prior=1.0)


def two_modes() -> Target:
    x = torch.linspace(-2, 2, 12)[:, None]
    y = 1.2 * torch.tanh(1.1 * x[:, 0]) + 0.1 * torch.cos(9 * x[:, 0])
    return Target("two-mode network", two_mode_network, (x, y), *quadrature(two_mode_network(), (x, y), 5.0, 4.0))


def quadrature(model: Any, batch: tuple[Tensor, ...], first: float, second: float, nodes: int = 801) -> Any:
    """Log evidence, mean and sd of a posterior of two real latents, on a grid of +- first by +- second."""
    sites = list(latents(model, *batch).values())
    packing = Packing(sites)
    a, b = torch.linspace(-first, first, nodes).double(), torch.linspace(-second, second, nodes).double()
    grid = torch.stack(torch.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
    model = model.double() if isinstance(model, nn.Module) else model
    batch = tuple(t.double() for t in batch)

    def density(u: Tensor) -> Tensor:
        values, _ = packing.unpack(u)
        return poutine.trace(poutine.condition(model, values)).get_trace(*batch).log_prob_sum()  # type: ignore[return-value]

    with isolated(validate=False), torch.no_grad():
        log_joint = torch.cat([torch.func.vmap(density)(part) for part in grid.split(20_000)])
    cell = (a[1] - a[0]) * (b[1] - b[0])
    log_evidence = torch.logsumexp(log_joint, 0) + cell.log()
    weights = torch.softmax(log_joint, 0)
    mean = weights @ grid
    sd = (weights @ (grid - mean).square()).sqrt()
    return float(log_evidence), mean.float(), sd.float()


def guides() -> dict[str, Callable[..., Any]]:
    """Every family over one vector, and the ways to attach that have no family."""
    found: dict[str, Callable[..., Any]] = {
        name: partial(Global, family=entry.make) for name, entry in families().items()
    }
    known, dense = attachments(), families()
    for label, (name, options) in ATTACHED.items():
        if name in known:
            told: dict[str, Any] = dict(options)
            if "family" in told:
                told["family"] = dense[str(told["family"])].make
            found[label] = partial(known[name].make, **told)
    return found


def cell(target: Target, name: str, guide: Callable[..., Any], seeds: int, steps: int) -> list[dict[str, Any]]:
    """One family on one target, all seeds at once; families by sixteen draws a step, others by what they ask for."""
    began = time.perf_counter()
    loss = dgm.ELBO(16) if ATTACHED.get(name, ("global",))[0] in ("global", "multiplicative-flow") else None
    try:
        fits = dgm.fit(
            target.make, guide, *target.batch, steps=steps, lr=0.05, clip=100.0, replicas=seeds, loss=loss,
            compile="trace", schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        )  # fmt: skip
    except Exception as error:  # a guide that cannot attach is a row that says so
        return [{"target": target.name, "guide": name, "status": f"{type(error).__name__}: {error}"}]
    seconds = (time.perf_counter() - began) / seeds
    rows = []
    for fit in fits:
        row: dict[str, Any] = {"target": target.name, "guide": name, "seed": fit.seed, "seconds": seconds}
        rows.append(row | (scores(target, fit) if fit.error is None else {"status": fit.error}))
    return rows


@torch.no_grad()
def scores(target: Target, fit: dgm.Fit, draws: int = 20_000) -> dict[str, Any]:
    """ELBO and importance weighted evidence against the truth, and moments of the draws."""
    out: dict[str, Any] = {"status": "ok"}
    if has_density(fit.guide):
        weights = dgm.log_weights(fit.model, fit.guide, *target.batch, num_samples=draws, seed=1).double()
        out["elbo"] = float(weights.mean())
        out["gap"] = target.log_evidence - out["elbo"]
        out["evidence_error"] = float(importance_bound(weights[:, None])[0]) - target.log_evidence
    packing = Packing(latents(fit.model, *target.batch).values())
    with isolated(validate=False), preserved_rng(2):
        u = torch.stack(
            [packing.pack(_sites(poutine.trace(fit.guide).get_trace(*target.batch), packing)) for _ in range(2000)]
        )
    out["mean_error"] = float(((u.mean(0) - target.mean) / target.sd).abs().max())
    out["sd_error"] = float((u.std(0) / target.sd).log().abs().max())
    out["parameters"] = sum(p.numel() for p in fit.guide.parameters()) if isinstance(fit.guide, nn.Module) else 0
    return out


def _sites(trace: Any, packing: Packing) -> dict[str, Tensor]:
    return {site.name: trace.nodes[site.name]["value"] for site in packing.sites}


def ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, best first: by the gap to the evidence, those without a density after them by their moments."""
    good = rows[rows.status == "ok"]
    columns = [
        c for c in ("elbo", "gap", "evidence_error", "mean_error", "sd_error", "parameters", "seconds") if c in good
    ]
    table = good.groupby(["target", "guide"])[columns].mean()
    table["gap_se"] = good.groupby(["target", "guide"])["gap"].sem()
    return table.sort_values(["target", "gap", "mean_error"], na_position="last")


def checks(table: pd.DataFrame) -> dict[str, bool]:
    """What theory says."""
    gap = table["gap"]

    def of(target: str, guide: str) -> float:
        return float(gap.get((target, guide), math.nan))

    n, b, t = "correlated normal", "banana", "two-mode network"
    flows = ["inverse-autoregressive-flow", "coupling-affine-flow", "coupling-spline-flow"]
    return {
        "normal: full above low rank above diagonal": of(n, "full-normal")
        < of(n, "low-rank-normal")
        < of(n, "diagonal-normal"),
        "normal: full is exact within 0.05 nats": of(n, "full-normal") < 0.05,
        "banana: every flow above the full normal": max(of(b, f) for f in flows) < of(b, "full-normal"),
        "two modes: a mixture that starts wide above every normal and flow by nearly log 2": of(
            t, "mixture, wide start"
        )
        + 0.35
        < min(of(t, g) for g in ("full-normal", *flows)),
        "two modes: an ensemble of normals too": of(t, "ensemble of 5 normals") + 0.4 < of(t, "full-normal"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", default=None, help="first words of their names, comma-separated; default all")
    parser.add_argument("--guides", default=None, help="names with ; between them; default all")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = provenance()
    chosen = guides()
    if options.guides is not None:
        wanted = [name.strip() for name in options.guides.split(";")]
        unknown = [name for name in wanted if name not in chosen]
        if unknown:
            parser.error(f"no guide {unknown[0]!r}: {did_you_mean(unknown[0], chosen)}")
        chosen = {name: chosen[name] for name in wanted}
    rows = []
    for target in (normal(), banana(), two_modes()):
        if options.targets is not None and not target.name.startswith(tuple(options.targets.split(","))):
            continue
        print(f"{target.name}: log evidence {target.log_evidence:.4f}", flush=True)
        for name, guide in chosen.items():
            rows += cell(target, name, guide, options.seeds, options.steps)
            last = rows[-1]
            told = f"gap {last['gap']:.3f}" if "gap" in last else ""
            moments = f"mean {last['mean_error']:.2f} sd {last['sd_error']:.2f}" if "mean_error" in last else ""
            print(f"  {name:30s} {last['status'][:70]:10s} {told:12s} {moments}", flush=True)
    frame = pd.DataFrame(rows)
    table = ranked(frame)
    print(table.round(3).to_string())
    found = checks(table) if options.guides is None and options.targets is None else {}  # which need all of them
    for text, holds in found.items():
        print(f"{'yes' if holds else 'NO '}  {text}")
    if options.out is not None:
        record = {"rows": frame.to_dict("records"), "checks": found, "provenance": about}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
