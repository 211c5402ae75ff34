"""Pyro programs, data and guides drawn at random (hypothesis strategies): what the property tests are run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro.infer import autoguide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

import dgm
from dgm.guides import (
    coupling_affine_flow,
    diagonal_normal,
    full_normal,
    low_rank_normal,
    mixture,
    planar_flow,
    point,
    radial_normal,
    student_t,
)
from dgm.guides.auxiliary import Auxiliary
from dgm.guides.encoders import linear
from dgm.guides.ensemble import Ensemble
from dgm.guides.free import Free
from dgm.guides.hamiltonian import HamiltonianAnnealing
from dgm.guides.joint import Joint
from dgm.guides.laplace import Laplace
from dgm.guides.per_layer import PerLayer
from dgm.guides.semi_amortized import SemiAmortized
from dgm.guides.stein import Stein
from dgm.guides.swag import SWAG
from dgm.guides.top_down import TopDown

SUPPORTS = ("real", "positive", "unit", "simplex", "ordered", "sphere-like", "cholesky", "correlation", "flat")
OBSERVED = ("normal", "student", "bernoulli", "poisson", "gamma", "beta", "categorical", "dirichlet", "vector")
CONTAINERS = ("tensor", "numpy", "pandas", "list", "float64", "int")


@dataclass(frozen=True)
class Latent:
    """A latent: its support, the shape of its event, and whether it is one for each row, for each group."""

    name: str
    support: str = "real"
    shape: tuple[int, ...] = ()
    local: bool = False
    grouped: bool = False

    def prior(self, like: Tensor, at: Tensor) -> Any:
        """A distribution of batch shape () whose location moves with `at`, a number or one for each row."""
        zeros, ones = like.new_zeros(self.shape), like.new_ones(self.shape)
        last = self.shape[-1] if self.shape else 2
        match self.support:
            case "real":
                wide = at.reshape(at.shape + (1,) * len(self.shape)) + zeros
                return dist.Normal(wide, 1.0).to_event(len(self.shape))
            case "positive":
                return dist.LogNormal(zeros, 0.5).to_event(len(self.shape))
            case "unit":
                return dist.Beta(2 * ones, 3 * ones).to_event(len(self.shape))
            case "simplex":
                return dist.Dirichlet(2 * like.new_ones((*self.shape[:-1], max(2, last)))).to_event(
                    max(0, len(self.shape) - 1)
                )
            case "ordered":
                base = dist.Normal(like.new_zeros(max(2, last)), 1.0).to_event(1)
                return dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])
            case "sphere-like":
                return dist.Uniform(-1.5 * ones, 2.5 * ones).to_event(len(self.shape))
            case "cholesky":
                return dist.LKJCholesky(3, like.new_tensor(2.0))
            case "correlation":
                return dist.MultivariateNormal(like.new_zeros(max(2, last)), torch.eye(max(2, last)).to(like))
            case _:
                return dist.ImproperUniform(constraints.real, (), self.shape)


@dataclass(frozen=True)
class Observed:
    """An observed site: its distribution, and whether it stands in the groups, and in which stream."""

    name: str
    kind: str = "normal"
    width: int = 0  # 0: one number a row
    grouped: bool = False

    def likelihood(self, at: Tensor) -> Any:
        """Its distribution where the linear predictor is `at`."""
        at = at.clamp(-3.0, 3.0)
        wide = at.unsqueeze(-1).expand(*at.shape, self.width) if self.width else at
        match self.kind:
            case "normal":
                fn: Any = dist.Normal(wide, 1.0)
            case "student":
                fn = dist.StudentT(4.0, wide, 1.0)
            case "bernoulli":
                fn = dist.Bernoulli(logits=wide)
            case "poisson":
                fn = dist.Poisson(wide.exp())
            case "gamma":
                fn = dist.Gamma(2.0, wide.exp())
            case "beta":
                fn = dist.Beta(wide.exp(), 2.0)
            case "categorical":
                return dist.Categorical(logits=torch.stack([at, -at, 0 * at], -1))
            case "dirichlet":
                return dist.Dirichlet(torch.stack([at, -at, 0 * at], -1).exp())
            case _:
                two = torch.stack([at, -at], -1)
                return dist.MultivariateNormal(two, torch.eye(2).to(two))
        return fn.to_event(1) if self.width else fn

    def rows(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """Values that the likelihood may have made, `(N, [groups], [width])`."""
        shape = shape + ((self.width,) if self.width else ())
        match self.kind:
            case "normal" | "student":
                return rng.normal(size=shape)
            case "bernoulli":
                return (rng.uniform(size=shape) < 0.5).astype(float)
            case "poisson":
                return rng.poisson(2.0, size=shape).astype(float)
            case "gamma":
                return rng.gamma(2.0, size=shape) + 1e-2
            case "beta":
                return rng.uniform(0.05, 0.95, size=shape)
            case "categorical":
                return rng.integers(0, 3, size=shape)
            case "dirichlet":
                return rng.dirichlet([2.0, 2.0, 2.0], size=shape)
            case _:
                return rng.normal(size=(*shape, 2))


@dataclass(frozen=True)
class Spec:
    """A whole program; `Program(spec)` runs it."""

    latents: tuple[Latent, ...] = ()
    observed: tuple[Observed, ...] = (Observed("y"),)
    plate: str | None = "data"
    dim: int | None = None  # of the data plate
    groups: int = 0  # rows of the plate of groups; 0 for none
    streams: int = 1  # data plates one after the other: the last site stands in the second
    covariates: int = 0
    parameter: bool = False  # an `nn.Parameter` of the model
    asked: bool = False  # a parameter by `pyro.param`
    network: bool = False

    @property
    def group_dim(self) -> int:
        return -1 if self.dim in (-2, -3) else -2

    @property
    def plates(self) -> tuple[str, ...]:
        names = (self.plate, "second") if self.streams == 2 else (self.plate,)
        return tuple(name for name in names if name is not None)

    def data(self, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Arrays with rows first: covariates, then one for each observed site."""
        rng = np.random.default_rng(seed)
        arrays = [rng.normal(size=(rows, self.covariates))] if self.covariates else []
        return (*arrays, *(o.rows((rows, self.groups) if o.grouped else (rows,), rng) for o in self.observed))


class Program(PyroModule):
    """Every latent adds the tanh of its mean to the linear predictor of every observed site."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        if spec.parameter:
            self.weight = nn.Parameter(torch.tensor(0.3))
        if spec.network and spec.covariates:
            self.net = nn.Sequential(nn.Linear(spec.covariates, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, *batch: Tensor) -> None:
        spec = self.spec
        like = next((t for t in batch if t.is_floating_point()), torch.zeros(()))
        at = like.new_zeros(())
        if spec.parameter:
            at = at + self.weight
        if spec.asked:
            at = at + pyro.param("asked", like.new_tensor(0.5), constraint=constraints.positive).log()
        groups = pyro.plate("groups", spec.groups, dim=spec.group_dim) if spec.groups else None
        for latent in spec.latents:
            if not latent.local:
                at = at + self._summary(latent, like, at, groups)
        inputs, values = (batch[:1], batch[1:]) if spec.covariates else ((), batch)
        if spec.plate is None:
            return self._observe(spec.observed, values, at, like, None, groups)
        plate = pyro.plate(spec.plate, len(batch[0]), dim=spec.dim)
        first = len(spec.observed) - (spec.streams - 1)
        with plate:
            rowwise = at
            if inputs:
                seen = self.net(inputs[0]).squeeze(-1) if spec.network else inputs[0].sum(-1)
                rowwise = rowwise + seen.reshape(-1, *[1] * (-(plate.dim or -1) - 1)).tanh()
            for latent in spec.latents:
                if latent.local:
                    rowwise = rowwise + self._summary(latent, like, rowwise, groups)
            self._observe(spec.observed[:first], values[:first], rowwise, like, plate.dim, groups)
        if spec.streams == 2:
            with pyro.plate("second", len(batch[0]), dim=spec.dim):
                self._observe(spec.observed[first:], values[first:], at, like, plate.dim, groups)
        return None

    def _summary(self, latent: Latent, like: Tensor, at: Tensor, groups: Any) -> Tensor:
        fn = latent.prior(like, at if latent.support == "real" and at.dim() == 0 else like.new_zeros(()))
        if latent.grouped and groups is not None:
            with groups:
                value = pyro.sample(latent.name, fn)
        else:
            value = pyro.sample(latent.name, fn)
        for _ in range(fn.event_dim):
            value = value.mean(-1)
        if latent.grouped and groups is not None:
            value = value.mean(self.spec.group_dim, keepdim=True)
        return value.tanh()

    def _observe(self, sites: Any, values: Any, at: Tensor, like: Tensor, dim: int | None, groups: Any) -> None:
        for site, value in zip(sites, values, strict=True):
            value = value if site.kind == "categorical" else value.to(like.dtype)
            event = value.dim() - (2 if site.grouped else 1)
            if dim is None:
                fn = self._wide(site, at, value, event)
                pyro.sample(site.name, fn.to_event(len(fn.batch_shape)), obs=value)
                continue
            if site.grouped and groups is not None:
                with groups:
                    shaped = value if dim < self.spec.group_dim else value.transpose(0, 1)
                    while dim < self.spec.group_dim - 1 and shaped.dim() - event < -dim:
                        shaped = shaped.unsqueeze(1)
                    pyro.sample(site.name, self._wide(site, at, shaped, event), obs=shaped)
            else:
                shaped = value.reshape(len(value), *[1] * (-dim - 1), *value.shape[1:])
                pyro.sample(site.name, self._wide(site, at, shaped, event), obs=shaped)

    @staticmethod
    def _wide(site: Observed, at: Tensor, value: Tensor, event: int) -> Any:
        batch = value.shape[: value.dim() - event]
        while at.dim() > len(batch):  # ones that a plate of groups left in front
            at = at.squeeze(0)
        return site.likelihood(at.expand(batch))


# --- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def specs(draw: Any, plates: bool = True) -> Spec:
    """A program of up to three latents and two observed sites."""
    groups = draw(st.sampled_from([0, 0, 1, 2, 3]))
    plate = draw(st.sampled_from(["data", "data", "data", "rows", None])) if plates else "data"
    count = draw(st.integers(1, 3))
    latents = []
    for i in range(count):
        support = draw(st.sampled_from(SUPPORTS))
        shape = draw(st.sampled_from([(), (), (1,), (2,), (3,), (2, 3)]))
        if support in ("ordered", "cholesky", "correlation"):
            shape = shape[-1:]
        local = plate is not None and draw(st.booleans())
        latents.append(Latent(f"z{i}", support, shape, local, bool(groups) and draw(st.booleans())))
    observed = []
    for i in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(OBSERVED))
        width = draw(st.sampled_from([0, 0, 1, 2])) if kind not in ("categorical", "dirichlet", "vector") else 0
        observed.append(Observed(f"y{i}", kind, width, bool(groups) and draw(st.booleans())))
    covariates = draw(st.sampled_from([0, 1, 2]))
    if not covariates and all(o.kind == "categorical" for o in observed):
        covariates = 1  # something floating, that a row's numbers have a type
    streams = 2 if plate is not None and len(observed) == 2 and draw(st.integers(0, 3)) == 0 else 1
    return Spec(
        tuple(latents),
        tuple(observed),
        plate,
        draw(st.sampled_from([None, None, -1, -2, -3])),
        groups,
        streams,
        covariates,
        draw(st.booleans()),
        draw(st.integers(0, 3)) == 0,
        draw(st.booleans()),
    )


FAMILIES = (
    diagonal_normal.DiagonalNormal,
    full_normal.FullNormal,
    low_rank_normal.LowRankNormal,
    mixture.Mixture,
    point.Point,
    radial_normal.RadialNormal,
    student_t.StudentT,
    planar_flow.PlanarFlow,
    coupling_affine_flow.CouplingAffineFlow,
)
ATTACHED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "joint": lambda family: {},
    "free": lambda family: {"local": partial(Free, family=family)},
    "per-layer": lambda family: {"global_": partial(PerLayer, family=family)},
    "ensemble": lambda family: {"global_": partial(Ensemble, members=2, family=family)},
    "semi-amortized": lambda family: {"local": partial(SemiAmortized, encoder=linear(), steps=2)},
    "hamiltonian": lambda family: {"local": partial(HamiltonianAnnealing, encoder=linear(), steps=2)},
    "auxiliary": lambda family: {"local": partial(Auxiliary, family=family, encoder=linear())},
    "top-down": lambda family: {"local": partial(TopDown, encoder=linear())},
    "laplace": lambda family: {"global_": Laplace},
    "swag": lambda family: {"global_": partial(SWAG, rank=2, collect=3)},
    "stein": lambda family: {"global_": partial(Stein, members=3)},
}
PYRO = (
    autoguide.AutoNormal,
    autoguide.AutoDelta,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLaplaceApproximation,
)
GUIDES: tuple[Any, ...] = ("joint", "joint", *ATTACHED, *PYRO)
LOSSES: dict[str, Callable[[], Any] | None] = {
    "default": None,
    "particles": partial(dgm.ELBO, particles=2),
    "analytic": partial(dgm.ELBO, kl="analytic"),
    "importance": partial(dgm.ImportanceELBO, samples=2),
    "dreg": partial(dgm.ImportanceELBO, samples=2, estimator="dreg"),
    "renyi": partial(dgm.RenyiELBO, alpha=0.5, samples=2),
    "wake-sleep": partial(dgm.ReweightedWakeSleep, samples=2),
    "mean-field": pyro.infer.TraceMeanField_ELBO,
}


def guide_maker(kind: Any, family: Any, plates: tuple[str, ...]) -> Callable[..., Any]:
    """`(model, *batch) -> guide` of a kind in `GUIDES`."""

    def make(model: Any, *batch: Any) -> Any:
        if not isinstance(kind, str):
            return kind(model)
        return Joint(model, *batch, family=family, encoder=linear(), plates=plates, **ATTACHED[kind](family))

    return make


def contained(array: np.ndarray, kind: str) -> Any:
    """The same numbers in another container."""
    match kind:
        case "tensor":
            return torch.tensor(array, dtype=None if array.dtype.kind == "i" else torch.float32)
        case "float64":
            return torch.tensor(array)
        case "pandas" if array.ndim < 3:
            return pd.Series(array) if array.ndim == 1 else pd.DataFrame(array)
        case "list":
            return array.tolist()
        case "int":
            return array.astype(np.int64) if (array == array.round()).all() else array.astype(np.float32)
        case _:
            return array
