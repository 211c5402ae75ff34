"""posteriordb's models as Pyro programs: regressions, eight schools, a mixture. Others in `posteriordb_series`.

Sites have posteriordb's names where its parameters are the latents. A flat prior is a masked density; a prior
that Pyro has no distribution for is a flat one and a `pyro.factor`. All in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor

Values = dict[str, Tensor]
"""Values by name, draws first: `(S,)` for a number, `(S, n)` for a vector."""


def _same(values: Values) -> Values:
    return values


@dataclass(frozen=True)
class Model:
    """A posterior's program and data.

    program: `program(*batch)`. batch: arrays, rows first.
    to_parameters: draws of the program's latents -> draws of posteriordb's parameters. to_latents: its inverse.
    """

    program: Callable[..., Any]
    batch: tuple[Tensor, ...]
    to_parameters: Callable[[Values], Values] = _same
    to_latents: Callable[[Values], Values] = _same


Data = Mapping[str, Any]
Support = Literal["real", "positive", "ordered"]


def array(data: Data, name: str) -> Tensor:
    return torch.as_tensor(np.asarray(data[name], dtype=float))


def columns(data: Data, *names: str) -> list[Tensor]:
    return [array(data, name) for name in names]


def number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def flat(name: str, support: Support = "real", size: int | None = None) -> Tensor:
    """A latent with a constant density on its support: a number, or a vector of `size`.

    A masked distribution has the log density 0 and can yet be drawn from, so that any guide finds a start; Pyro's
    `ImproperUniform` cannot, and has no floating type.
    """
    base: Any = dist.Normal(number(0), number(1))
    if support == "positive":
        base = dist.LogNormal(number(0), number(1))
    if size is not None:
        base = base.expand([size]).to_event(1)
    if support == "ordered":
        base = dist.TransformedDistribution(base, [OrderedTransform()])
    return pyro.sample(name, base.mask(False))


def half_cauchy(name: str, scale: float) -> Tensor:
    return pyro.sample(name, dist.HalfCauchy(number(scale)))


def normals(name: str, size: int, scale: float) -> Tensor:
    return pyro.sample(name, dist.Normal(number(0), number(scale)).expand([size]).to_event(1))


# ------------------------------------------------------------------------------------------------- regressions


def linear(x: list[Tensor], y: Tensor, prior: Callable[[], tuple[Tensor, Tensor]]) -> Model:
    """y_n ~ N(x_n' beta, sigma), with (beta, sigma) of the prior."""

    def program(x: Tensor, y: Tensor) -> None:
        beta, sigma = prior()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    return Model(program, (torch.stack(x, 1), y))


def flat_prior(size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (flat("beta", size=size), flat("sigma", "positive"))


def cauchy_prior(size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (flat("beta", size=size), half_cauchy("sigma", 2.5))


def kidscore_momiq(data: Data) -> Model:
    score, iq = columns(data, "kid_score", "mom_iq")
    return linear([torch.ones_like(iq), iq], score, cauchy_prior(2))


def kidscore_interaction(data: Data) -> Model:
    score, hs, iq = columns(data, "kid_score", "mom_hs", "mom_iq")
    return linear([torch.ones_like(iq), hs, iq, hs * iq], score, cauchy_prior(4))


def logearn_interaction(data: Data) -> Model:
    earn, height, male = columns(data, "earn", "height", "male")
    return linear([torch.ones_like(height), height, male, height * male], earn.log(), flat_prior(4))


def logmesquite_logvas(data: Data) -> Model:
    weight, one, two, canopy = columns(data, "weight", "diam1", "diam2", "canopy_height")
    height, density, group = columns(data, "total_height", "density", "group")
    logs = [(one * two * canopy).log(), (one * two).log(), (one / two).log(), height.log(), density.log()]
    return linear([torch.ones_like(one), *logs, group], weight.log(), flat_prior(7))


def nes(data: Data) -> Model:
    party, ideology, race, age = columns(data, "partyid7", "real_ideo", "race_adj", "age_discrete")
    ages = [(age == k).double() for k in (2, 3, 4)]
    rest = columns(data, "educ1", "gender", "income")
    return linear([torch.ones_like(party), ideology, race, *ages, *rest], party, flat_prior(9))


def blr(data: Data) -> Model:
    def prior() -> tuple[Tensor, Tensor]:
        return normals("beta", data["D"], 10.0), pyro.sample("sigma", dist.HalfNormal(number(10)))

    return linear(list(array(data, "X").unbind(1)), array(data, "y"), prior)


def kilpisjarvi(data: Data) -> Model:
    mean_alpha, sd_alpha, mean_beta, sd_beta = (number(data[k]) for k in ("pmualpha", "psalpha", "pmubeta", "psbeta"))

    def program(x: Tensor, y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Normal(mean_alpha, sd_alpha))
        beta = pyro.sample("beta", dist.Normal(mean_beta, sd_beta))
        sigma = flat("sigma", "positive")
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)

    return Model(program, tuple(columns(data, "x", "y")))


# ----------------------------------------------------------------------------------------------- eight schools


def eight_schools_centered(data: Data) -> Model:
    def program(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(number(0), number(5)))
        tau = half_cauchy("tau", 5.0)
        theta = pyro.sample("theta", dist.Normal(mu, tau).expand([len(y)]).to_event(1))
        # no plate of data: a school's effect is a part of the global vector, so that rows cannot be taken apart
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    return Model(program, tuple(columns(data, "y", "sigma")))


def eight_schools_noncentered(data: Data) -> Model:
    """theta_j = mu + tau z_j."""

    def program(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(number(0), number(5)))
        tau = half_cauchy("tau", 5.0)
        z = normals("z", len(y), 1.0)
        pyro.sample("y", dist.Normal(mu + tau * z, sigma).to_event(1), obs=y)

    def to_parameters(v: Values) -> Values:
        return {"theta": v["mu"][:, None] + v["tau"][:, None] * v["z"], "mu": v["mu"], "tau": v["tau"]}

    def to_latents(v: Values) -> Values:
        return {"z": (v["theta"] - v["mu"][:, None]) / v["tau"][:, None], "mu": v["mu"], "tau": v["tau"]}

    return Model(program, tuple(columns(data, "y", "sigma")), to_parameters, to_latents)


# ----------------------------------------------------------------------------------------------------- mixture


def low_dim_gauss_mix(data: Data) -> Model:
    """y_n ~ theta N(mu_1, sigma_1) + (1 - theta) N(mu_2, sigma_2), mu_1 < mu_2."""

    def program(y: Tensor) -> None:
        mu = flat("mu", "ordered", 2)
        pyro.factor("mu_prior", dist.Normal(number(0), number(2)).log_prob(mu).sum(-1))
        sigma = pyro.sample("sigma", dist.HalfNormal(number(2)).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(number(5), number(5)))
        shares = torch.stack([theta.log(), torch.log1p(-theta)], -1)
        with pyro.plate("data", len(y)):
            parts = dist.Normal(mu, sigma).log_prob(y[:, None]) + shares
            pyro.factor("y", torch.logsumexp(parts, -1))

    return Model(program, (array(data, "y"),))


def models() -> dict[str, Callable[[Data], Model]]:
    """The programs by posteriordb's model name: each makes a `Model` of the posterior's data."""
    from . import posteriordb_series as series

    own = (
        kidscore_momiq, kidscore_interaction, logearn_interaction, logmesquite_logvas, nes, blr, kilpisjarvi,
        eight_schools_centered, eight_schools_noncentered, low_dim_gauss_mix,
    )  # fmt: skip
    others = (
        series.arK, series.arma11, series.garch11, series.hmm_drive_0, series.gp_pois_regr, series.lotka_volterra,
    )  # fmt: skip
    return {make.__name__: make for make in (*own, *others)}
