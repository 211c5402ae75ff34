"""Posteriors that are known exactly: log evidence, moments, and the least gap of a normal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import betaln, gammaln
from torch import Tensor

from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.pair import Pair
from dgm.programs import preserved_rng
from dgm.runs import Runs


@dataclass(frozen=True)
class Truth:
    """A posterior of the latents `sites`, in their order: mean and sd of their entries, `(d,)`.

    mean_field_gap: what the best normal with independent entries loses, nats. normal: whether the posterior is one.
    """

    program: Any
    batch: tuple[Tensor, ...]
    sites: tuple[str, ...]
    log_evidence: float
    mean: Tensor
    sd: Tensor
    mean_field_gap: float
    normal: bool


def regression(rows: int = 20) -> Truth:
    """Four weights; every pair of columns has correlation 1/2."""
    generator = torch.Generator().manual_seed(0)
    model = BayesianLinearRegression(4, noise=0.7)
    noise = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    x = (noise[:, :4] + noise[:, 4:5]) / 2**0.5
    y = x @ torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=torch.float64) + 0.7 * noise[:, 5]
    exact = model.posterior(x, y)
    precision = exact.precision_matrix
    gap = float((precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet) / 2)
    evidence = float(model.log_evidence(x, y))
    return Truth(model, (x, y), ("w",), evidence, exact.mean, exact.variance.sqrt(), gap, True)


def pairs_program(x: Tensor, heads: Tensor, counts: Tensor) -> None:
    """m ~ N(0, 1), x_n ~ N(m, 1);  p ~ Beta(2, 3), heads_n ~ Bernoulli(p);  r ~ Gamma(3, 2), counts_n ~ Poisson(r)."""
    one = x.new_ones(())
    m = pyro.sample("m", dist.Normal(0 * one, one))
    p = pyro.sample("p", dist.Beta(2 * one, 3 * one))
    r = pyro.sample("r", dist.Gamma(3 * one, 2 * one))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, one), obs=x)
        pyro.sample("heads", dist.Bernoulli(p), obs=heads)
        pyro.sample("counts", dist.Poisson(r), obs=counts)


def conjugate(rows: int = 20) -> Truth:
    """Three conjugate pairs in one program."""
    n, generator = rows, torch.Generator().manual_seed(0)
    x = 0.5 + torch.randn(n, generator=generator, dtype=torch.float64)
    heads = (torch.rand(n, generator=generator, dtype=torch.float64) < 0.2).double()
    counts = torch.poisson(torch.full((n,), 1.5, dtype=torch.float64), generator=generator)
    k, total = float(heads.sum()), float(counts.sum())
    var = 1 / (n + 1)
    mean = float(x.sum()) * var
    evidence = -0.5 * (n * math.log(2 * math.pi) + math.log(n + 1) + float((x**2).sum()) - mean**2 / var)
    evidence += float(betaln(2 + k, 3 + n - k) - betaln(2, 3))
    shape, rate = 3 + total, 2 + n
    evidence += float(3 * math.log(2) - gammaln(3) + gammaln(shape) - shape * math.log(rate))
    evidence -= float(torch.lgamma(counts + 1).sum())
    a, b = 2 + k, 3 + n - k
    means = torch.tensor([mean, a / (a + b), shape / rate], dtype=torch.float64)
    sds = torch.tensor([var**0.5, (a * b / (a + b + 1)) ** 0.5 / (a + b), shape**0.5 / rate], dtype=torch.float64)
    # log densities of the logit of p and of the logarithm of r
    logit: Callable[[float], float] = lambda u: a * u - (a + b) * np.logaddexp(0, u) - betaln(a, b)  # noqa: E731
    log: Callable[[float], float] = lambda u: (  # noqa: E731
        shape * (u + math.log(rate)) - rate * math.exp(u) - gammaln(shape)
    )
    gap = normal_gap(logit, math.log(a / b), 0.5) + normal_gap(log, math.log(shape / rate), shape**-0.5)
    return Truth(pairs_program, (x, heads, counts), ("m", "p", "r"), float(evidence), means, sds, gap, False)


def normal_gap(log_density: Callable[[float], float], centre: float, scale: float) -> float:
    """min KL(N(m, s^2) || p) of a density on the line, by quadrature.

    >>> abs(normal_gap(lambda u: -0.5 * (u - 1) ** 2 - 0.5 * math.log(2 * math.pi), 0.0, 2.0)) < 1e-6
    True
    """

    def divergence(at: np.ndarray) -> float:
        m, s = at[0], math.exp(at[1])
        inside: Callable[[float], float] = lambda e: math.exp(-0.5 * e * e) * log_density(m + s * e)  # noqa: E731
        expected = quad(inside, -12, 12, limit=200)[0] / math.sqrt(2 * math.pi)
        return -0.5 * math.log(2 * math.pi * math.e) - at[1] - expected

    start = np.array([centre, math.log(scale)])
    return float(minimize(divergence, start, method="Nelder-Mead", options={"fatol": 1e-10}).fun)


def radial_excess(size: int) -> float:
    r"""KL of the best radial normal from a standard normal in d dimensions.

    With u = |r|, r ~ N(0, 1): :math:`\log 2 - \tfrac12 (1 + \log 2\pi) - \log A_d - (d-1) E \log u - \tfrac d2 \log d
    + \tfrac d2 \log 2\pi + \tfrac d2`, where the scale is :math:`\sqrt d` and :math:`E \log u = -(\gamma + \log 2)/2`.

    >>> abs(radial_excess(1)) < 1e-12
    True
    """
    d, log_u = size, -(np.euler_gamma + math.log(2)) / 2
    area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
    entropy = -(math.log(2) - 0.5 * (1 + math.log(2 * math.pi)) - area - (d - 1) * log_u - d / 2 * math.log(d))
    return -entropy + d / 2 * math.log(2 * math.pi) + d / 2


def moments(model: Any, guide: Any, truth: Truth, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of draws of the latents, `(d,)` each."""
    pair = Pair(model, guide)

    def one(data: Sequence[Any]) -> tuple[Tensor, ...]:
        nodes: Any = poutine.trace(pair.run_guide).get_trace(*data).nodes
        return (torch.cat([nodes[name]["value"].reshape(-1) for name in truth.sites]),)

    with preserved_rng(2):
        drawn = torch.cat([part[0] for part in Runs(pair, one, truth.batch).passes(count)])  # (S, d)
    return drawn.double().mean(0), drawn.double().std(0)
