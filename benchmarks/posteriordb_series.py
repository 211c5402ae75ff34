"""posteriordb's models whose data are in an order: time series, a hidden Markov model, a Gaussian process, an ODE.

They have no data plate: no row is independent of the others. Recursions are written without a loop over the rows where
they can be.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .posteriordb_models import Data, Model, Values, array, columns, flat, half_cauchy, normals, number


def recursion(r: Tensor, c: Tensor) -> Tensor:
    """x_t = r_t + c x_{t-1}, x_0 = r_0, of r `(T,)`, in log2 T steps.

    Each step doubles how far back a sum of c^k r_{t-k} reaches.

    >>> recursion(torch.ones(4), torch.tensor(0.5))
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    reach = 1
    while reach < len(r):
        r = r + c * torch.cat([torch.zeros_like(r[:reach]), r[:-reach]])
        c, reach = c * c, 2 * reach
    return r


def arK(data: Data) -> Model:
    """y_t ~ N(alpha + sum_k beta_k y_{t-k}, sigma), t = K + 1, ..., T."""
    order = int(data["K"])

    def program(y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Normal(number(0), number(10)))
        beta = normals("beta", order, 10.0)
        sigma = half_cauchy("sigma", 2.5)
        past = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)  # (T - K, K)
        pyro.sample("y", dist.Normal(alpha + past @ beta, sigma).to_event(1), obs=y[order:])

    return Model(program, (array(data, "y"),))


def arma11(data: Data) -> Model:
    """e_t = y_t - mu - phi y_{t-1} - theta e_{t-1} ~ N(0, sigma), e_1 = y_1 - mu - phi mu."""

    def program(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(number(0), number(10)))
        phi = pyro.sample("phi", dist.Normal(number(0), number(2)))
        theta = pyro.sample("theta", dist.Normal(number(0), number(2)))
        sigma = half_cauchy("sigma", 2.5)
        before = torch.cat([mu.reshape(1), y[:-1]])
        e = recursion(y - mu - phi * before, -theta)
        pyro.factor("y", dist.Normal(number(0), sigma).log_prob(e).sum(-1))

    return Model(program, (array(data, "y"),))


def garch11(data: Data) -> Model:
    """s_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 s_{t-1}^2,  y_t ~ N(mu, s_t), s_1 known.

    (alpha1, beta1, 1 - alpha1 - beta1) is a point of the simplex with a constant density: flat on the triangle.
    """
    first = number(data["sigma1"]) ** 2

    def program(y: Tensor) -> None:
        mu, alpha0 = flat("mu"), flat("alpha0", "positive")
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=y.dtype)))
        driven = alpha0 + share[..., 0] * (y[:-1] - mu).square()
        variance = recursion(torch.cat([first.reshape(1), driven]), share[..., 1])
        pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)

    def to_parameters(v: Values) -> Values:
        return {"mu": v["mu"], "alpha0": v["alpha0"], "alpha1": v["share"][:, 0], "beta1": v["share"][:, 1]}

    def to_latents(v: Values) -> Values:
        share = torch.stack([v["alpha1"], v["beta1"], 1 - v["alpha1"] - v["beta1"]], -1)
        return {"mu": v["mu"], "alpha0": v["alpha0"], "share": share}

    return Model(program, (array(data, "y"),), to_parameters, to_latents)


def hmm_drive_0(data: Data) -> Model:
    """Two hidden states, transitions (theta1; theta2), u_t ~ Exp(phi_k), v_t ~ Exp(lambda_k); states summed out."""
    alpha, prior_mean = array(data, "alpha"), torch.tensor([0.0, 3.0], dtype=torch.float64)

    def rates(name: str) -> Tensor:
        log_rate = flat(f"log_{name}", "ordered", 2)
        rate = log_rate.exp()
        log_prior = dist.Normal(prior_mean, number(1)).log_prob(rate) + log_rate  # + log |d rate / d log rate|
        pyro.factor(f"{name}_prior", log_prior.sum(-1))
        return rate

    def program(u: Tensor, v: Tensor) -> None:
        rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(alpha[k])) for k in range(2)]
        phi, lam = rates("phi"), rates("lambda")
        emission = dist.Exponential(phi).log_prob(u[:, None]) + dist.Exponential(lam).log_prob(v[:, None])  # (T, 2)
        steps = torch.stack(rows).log() + emission[1:, None, :]  # (T - 1, 2, 2): log p(state j, data_t | state i)
        total = torch.logsumexp(emission[0][:, None] + log_product(steps), (-2, -1))
        pyro.factor("data", total)

    def to_parameters(v: Values) -> Values:
        return {
            "theta1": v["theta1"], "theta2": v["theta2"], "phi": v["log_phi"].exp(), "lambda": v["log_lambda"].exp()
        }  # fmt: skip

    def to_latents(v: Values) -> Values:
        return {
            "theta1": v["theta1"], "theta2": v["theta2"], "log_phi": v["phi"].log(), "log_lambda": v["lambda"].log()
        }  # fmt: skip

    return Model(program, tuple(columns(data, "u", "v")), to_parameters, to_latents)


def log_product(steps: Tensor) -> Tensor:
    """log(M_1 M_2 ... M_T) of matrices given by the logarithm of their entries, `(T, K, K)` -> `(K, K)`, in log2 T.

    >>> m = torch.rand(5, 2, 2)
    >>> bool(torch.allclose(log_product(m.log()).exp(), torch.linalg.multi_dot(list(m)), rtol=1e-4))
    True
    """
    while len(steps) > 1:
        even = len(steps) // 2 * 2
        left, right = steps[0:even:2], steps[1:even:2]
        product = torch.logsumexp(left[..., :, :, None] + right[..., None, :, :], -2)
        steps = torch.cat([product, steps[even:]])
    return steps[0]


def gp_pois_regr(data: Data) -> Model:
    """k_n ~ Poisson(exp f_n), f = L z, L L' = alpha^2 exp(-(x - x')^2 / (2 rho^2)) + 1e-10 I."""
    x = array(data, "x")
    squared = (x[:, None] - x[None, :]).square()
    jitter = 1e-10 * torch.eye(len(x), dtype=x.dtype)

    def factor(rho: Tensor, alpha: Tensor) -> Tensor:
        rho, alpha = rho[..., None, None], alpha[..., None, None]
        return torch.linalg.cholesky(alpha.square() * torch.exp(-squared / (2 * rho.square())) + jitter)

    def program(k: Tensor) -> None:
        rho = pyro.sample("rho", dist.Gamma(number(25), number(4)))
        alpha = pyro.sample("alpha", dist.HalfNormal(number(2)))
        f = factor(rho, alpha) @ normals("z", len(x), 1.0)
        pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)

    def to_parameters(v: Values) -> Values:
        f = (factor(v["rho"], v["alpha"]) @ v["z"][..., None]).squeeze(-1)
        return {"rho": v["rho"], "alpha": v["alpha"], "f": f}

    def to_latents(v: Values) -> Values:
        z = torch.linalg.solve_triangular(factor(v["rho"], v["alpha"]), v["f"][..., None], upper=False).squeeze(-1)
        return {"rho": v["rho"], "alpha": v["alpha"], "z": z}

    return Model(program, (array(data, "k"),), to_parameters, to_latents)


SUBSTEPS = 4
"""Runge-Kutta steps a year."""


def lotka_volterra(data: Data, substeps: int = SUBSTEPS) -> Model:
    """u' = (a - b v) u,  v' = (d u - g) v,  log-normal noise about the solution at the years t_0 = 0, t_1, ..."""
    times = [0.0, *(float(t) for t in data["ts"])]
    mean, sd = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]))

    def program(y: Tensor) -> None:
        theta = flat("theta", "positive", 4)
        pyro.factor("theta_prior", dist.Normal(mean, sd).log_prob(theta).sum(-1))
        sigma = pyro.sample("sigma", dist.LogNormal(number(-1), number(1)).expand([2]).to_event(1))
        start = dist.LogNormal(number(math.log(10)), number(1)).expand([2]).to_event(1)
        z_init = pyro.sample("z_init", start)
        path = log_path(theta, z_init.log(), times, substeps)  # (T + 1, 2)
        pyro.sample("y", dist.LogNormal(path, sigma).to_event(2), obs=y)

    return Model(program, (torch.cat([array(data, "y_init")[None], array(data, "y")]),))


def log_path(theta: Tensor, start: Tensor, times: list[float], substeps: int) -> Tensor:
    """w = (log u, log v) at the times, `(T, 2)`: w' = (a, -g) + (-b, d) exp(w swapped), by fourth-order Runge-Kutta."""
    own = torch.stack([theta[0], -theta[2]])
    other = torch.stack([-theta[1], theta[3]])
    swap = torch.tensor([1, 0])

    def slope(w: Tensor) -> Tensor:
        return torch.addcmul(own, other, torch.index_select(w, 0, swap).exp())

    w, path = start, [start]
    for before, after in itertools.pairwise(times):
        h = (after - before) / substeps
        for _ in range(substeps):
            a = slope(w)
            b = slope(torch.add(w, a, alpha=h / 2))
            c = slope(torch.add(w, b, alpha=h / 2))
            e = slope(torch.add(w, c, alpha=h))
            w = torch.add(w, torch.add(a + e, b + c, alpha=2), alpha=h / 6)
        path.append(w)
    return torch.stack(path)
