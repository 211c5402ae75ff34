"""A posterior in coordinates of its own scale: the mode, the curvature there, and the program on whitened latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.optimize import minimize
from torch import Tensor

from dgm.curvature import precision
from dgm.guides.mode import FixedNormal, positive
from dgm.log_joint import LogJoint
from dgm.packing import Packing
from dgm.sites import latents, start_values, trace_once

from .posteriordb_models import Model

SITE = "v"
FAR = 0.1
"""Newton step, in posterior standard deviations, above which the end of a search is no mode."""


@dataclass(frozen=True)
class Start:
    """Where guides start, in the unconstrained coordinates u of a program.

    loc: `(d,)`. covariance: `(d, d)`. found: whether loc is a mode, and the covariance that of its curvature.
    """

    packing: Packing
    loc: Tensor
    covariance: Tensor
    found: bool

    @property
    def scale(self) -> Tensor:
        """Marginal standard deviations, `(d,)`."""
        return self.covariance.diagonal().sqrt()

    def standard(self) -> FixedNormal:
        """The normal N(loc, covariance) in the coordinates (u - loc) / scale."""
        correlation = self.covariance / self.scale / self.scale[:, None]
        normal = FixedNormal(torch.zeros_like(self.loc))
        normal.set(torch.zeros_like(self.loc), torch.linalg.inv(correlation))
        return normal


def find_start(model: Model, tries: int = 4, iterations: int = 200) -> Start:
    """The highest mode of log p(x, u) that is found, and the inverse of the curvature there.

    Quasi-Newton searches from the prior's median and from draws of the prior; from the best of their ends Newton's
    method in a trust region (Nocedal and Wright, "Numerical optimization", 2006, chapters 4 and 6). A density without a
    mode (a funnel: it grows without bound towards its neck) starts at the prior's median, with the curvature there and
    variance 1 in directions that curve the wrong way.
    """
    sites = list(latents(model.program, *model.batch).values())
    packing = Packing(sites)
    joint = LogJoint(model.program, [packing])
    first = packing.pack(start_values(model.program, model.batch, sites)).reshape(-1).double()
    gradient = joint.traced(first, *model.batch)

    def both(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = gradient(torch.as_tensor(u), *model.batch)
        if not bool(slope.isfinite().all()):
            return np.inf, np.zeros_like(u)
        return -float(value.nan_to_num(-np.inf)), -slope.numpy()

    def hessian(u: np.ndarray) -> np.ndarray:
        return precision(joint, torch.as_tensor(u), model.batch).nan_to_num(0.0).numpy()

    starts = [first.numpy()]
    for seed in range(1, tries):
        run: Any = trace_once(model.program, *model.batch, seed=seed)
        starts.append(packing.pack({site.name: run.nodes[site.name]["value"] for site in sites}).reshape(-1).numpy())
    with np.errstate(all="ignore"):
        ends = [minimize(both, u, jac=True, method="BFGS", options={"maxiter": iterations}) for u in starts]
        best = min(ends, key=lambda end: end.fun if np.isfinite(end.fun) else np.inf)
        end = minimize(both, best.x, jac=True, hess=hessian, method="trust-exact", options={"maxiter": iterations})
    u = torch.as_tensor(end.x)
    slope, matrix = gradient(u, *model.batch)[1], precision(joint, u, model.batch)
    found = bool(matrix.isfinite().all()) and not int(torch.linalg.cholesky_ex(matrix)[1])
    if found:
        found = float((slope @ torch.linalg.solve(matrix, slope)).sqrt()) < FAR
    if not found:
        u = first
        matrix = positive(precision(joint, u, model.batch), torch.ones_like(u))[0]
    return Start(packing, u, torch.linalg.inv(matrix), found)


def whitened(model: Model, start: Start, full: bool = False) -> Callable[..., None]:
    """The same program with one latent v: u = loc + S v, w = w(u), with S diagonal, or a Cholesky factor.

        log p(x, v) = log p(x, w(u)) + log |dw/du| + log |S|

    v is flat, and drawn from N(0, I) by whom asks the prior for a start. Marginal scales keep what a mean-field guide
    is; a full factor is for samplers, which are indifferent to it but for their speed.
    """
    size, packing, loc = len(start.loc), start.packing, start.loc
    factor = torch.linalg.cholesky(start.covariance) if full else start.scale.diag()
    log_scale = factor.diagonal().log().sum()
    normal = dist.Normal(torch.zeros(size, dtype=loc.dtype), 1.0).to_event(1).mask(False)

    def program(*batch: Any) -> None:
        v = pyro.sample(SITE, normal)
        u = loc + (torch.mv(factor, v) if full else start.scale * v)
        values, log_jacobian = packing.unpack(u)
        pyro.factor("jacobian", log_scale + sum(term.sum() for term in log_jacobian.values()))
        with poutine.condition(data=values):
            model.program(*batch)

    return program


def coordinates(start: Start, v: Tensor, full: bool = False) -> Mapping[str, Tensor]:
    """Latents of the program, by name, from draws of v `(S, d)`."""
    scaled = v @ torch.linalg.cholesky(start.covariance).mT if full else v * start.scale
    return start.packing.unpack(start.loc + scaled)[0]
