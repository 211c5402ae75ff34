"""From data to interval: truths and data from the prior, through `fit` as users call it, to what `predict` reports.

A data set is a case: y is divided by its own standard deviation, a share of its rows is held out, training is by
minibatches with a decaying step size, and stops early where `patience` asks for it. The ranks of the truths among
the posterior's draws must be uniform and the 90 % predictive interval of a new row must hold it in 90 % of the cases,
both on the original scale of y.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

import dgm
from dgm.data import as_tensors
from dgm.fitted import Fit
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.pair import Pair
from dgm.predictive import predict
from dgm.programs import preserved_rng
from dgm.rank_tests import uniform_bins
from dgm.runs import Runs

ROWS, GROUPS, DRAWS, NOISE = 40, 3, 99, 0.7
BATCH = 8


class Scaled(PyroModule):
    """What differs between replicas is a buffer."""

    prior_scale: Tensor
    noise: Tensor

    def __init__(self, prior_scale: float = 1.0, noise: float = 1.0):
        super().__init__()
        self.register_buffer("prior_scale", torch.tensor(prior_scale))
        self.register_buffer("noise", torch.tensor(noise))

    def observe(self, loc: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        with pyro.plate("data", len(loc)):
            pyro.sample("y", dist.Normal(loc, self.noise), obs=y)
        return {"loc": loc, "scale": self.noise}


class Regression(Scaled):
    """w ~ N(0, s^2 I_2), y_n ~ N(w'x_n, noise^2)."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), self.prior_scale).to_event(1))
        return self.observe((x * w).sum(-1), y)


class Groups(Scaled):
    """m ~ N(0, s^2), a_g ~ N(m, s^2) for each group g, y_n ~ N(a_{g(n)}, noise^2)."""

    def forward(self, g: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        m = pyro.sample("m", dist.Normal(torch.zeros(()), self.prior_scale))
        with pyro.plate("groups", GROUPS):
            a = pyro.sample("a", dist.Normal(m, self.prior_scale))
        return self.observe(a[g], y)


@dataclass(frozen=True)
class Simulated:
    """R data sets from the prior, rows one set after the other; `truth` (R, coordinates), and one new row of each."""

    inputs: np.ndarray
    y: np.ndarray
    truth: np.ndarray
    new_inputs: np.ndarray
    new_y: np.ndarray


def regression(sets: int, rng: np.random.Generator) -> Simulated:
    """y = w'x + noise, w ~ N(0, I_2)."""
    w, x = rng.normal(size=(sets, 2)), rng.normal(size=(sets, ROWS + 1, 2))
    y = np.einsum("rnf,rf->rn", x, w) + NOISE * rng.normal(size=(sets, ROWS + 1))
    return Simulated(x[:, :-1], y[:, :-1], w, x[:, -1:], y[:, -1:])


def groups(sets: int, rng: np.random.Generator) -> Simulated:
    m = rng.normal(size=sets)
    a = m[:, None] + rng.normal(size=(sets, GROUPS))
    g = rng.integers(0, GROUPS, size=(sets, ROWS + 1))
    y = np.take_along_axis(a, g, 1) + NOISE * rng.normal(size=g.shape)
    return Simulated(g[:, :-1], y[:, :-1], np.column_stack([m, a]), g[:, -1:], y[:, -1:])


PIPELINES: dict[str, Any] = {
    "regression": (regression, Regression),
    "groups": (groups, Groups),
}


@dataclass(frozen=True)
class Outcome:
    """`u` (R, coordinates): the place of each truth among draws, in (0, 1); `held` (R,): the interval held the row."""

    u: np.ndarray
    half: np.ndarray  # `u` of a posterior of half the scale
    held: np.ndarray
    stops: list[str]

    @property
    def p_values(self) -> list[float]:
        """Of the chi-square test that ranks are uniform, by coordinate."""
        return [uniform_bins(u) for u in self.u.T]

    def coverage_z(self) -> float:
        """Standard errors between the coverage of the 90 % intervals and 0.9."""
        return float((self.held.mean() - 0.9) / (0.9 * 0.1 / len(self.held)) ** 0.5)

    def posterior_z(self) -> float:
        """The same of the posterior's own central 90 % intervals, the coordinate that is farthest off."""
        inside = (np.abs(self.u - 0.5) < 0.45).mean(0)
        return float(np.abs(inside - 0.9).max() / (0.9 * 0.1 / len(self.u)) ** 0.5)


def halved(outcome: Outcome) -> Outcome:
    return replace(outcome, u=outcome.half)


def places(draws: np.ndarray, truth: np.ndarray, seed: int) -> np.ndarray:
    """Where the truth stands among draws, in (0, 1)."""
    rank = (draws < truth).sum(0)
    return (rank + np.random.default_rng(seed).uniform(size=rank.shape)) / (len(draws) + 1)


def run(
    name: str, sets: int, *, epochs: int, mutant: str | None = None, patience: int | None = None, seed: int = 0
) -> Outcome:
    """The whole chain, all data sets in one computation."""
    simulate, make = PIPELINES[name]
    data = simulate(sets, np.random.default_rng(seed))
    y_std = data.y.std(1)  # of each data set: the network's scale of y
    wrong = 0.25 if mutant == "prior" else 1.0
    columns: Mapping[str, Sequence[Any]] = {
        "rows": [np.arange(r * ROWS, (r + 1) * ROWS) for r in range(sets)],
        "seed": list(range(sets)),
        "prior_scale": [float(wrong / s) for s in y_std],
        "noise": [float(NOISE / s) for s in y_std],
    }
    fits: list[Fit] = dgm.fit(
        make,
        partial(Global, family=FullNormal),
        data.inputs.reshape(sets * ROWS, *data.inputs.shape[2:]),
        (data.y / y_std[:, None]).reshape(-1),
        replicas=columns,
        epochs=epochs,
        batch_size=BATCH,
        lr=3e-2,
        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
        validation=0.2,
        validate_every=max(1, epochs // (30 if patience else 5)),
        patience=patience,
        sizes={"data": BATCH} if mutant == "scale" else None,
        compile="trace",
    )
    assert all(fit.error is None for fit in fits)
    u, half, held = [], [], []
    for r, fit in enumerate(fits):
        new = as_tensors((data.new_inputs[r], data.new_y[r] / y_std[r]))
        found = draws_of(fit, new, r) * y_std[r]  # (S, coordinates), on the original scale
        u.append(places(found, data.truth[r], r))
        half.append(places(found.mean(0) + 0.5 * (found - found.mean(0)), data.truth[r], r))
        with preserved_rng(r):
            prediction = predict(fit.model, fit.guide, *new, num_samples=500, y_std=float(y_std[r]))
        assert prediction is not None
        low, high = (float(bound) * y_std[r] for bound in prediction.interval(0.9))  # type: ignore[union-attr]
        held.append(low <= float(data.new_y[r, 0]) <= high)
    return Outcome(np.array(u), np.array(half), np.array(held), [fit.stopped for fit in fits])


def draws_of(fit: Fit, batch: tuple[Tensor, ...], seed: int) -> np.ndarray:
    """DRAWS draws of the global latents side by side, `(S, coordinates)`."""
    pair = Pair(fit.model, fit.guide)

    def one(data: Sequence[Any]) -> tuple[Tensor, ...]:
        nodes: Any = poutine.trace(pair.run_guide).get_trace(*data).nodes
        return (torch.cat([nodes[name]["value"].reshape(-1) for name in ("w", "m", "a") if name in nodes]),)

    with preserved_rng(seed):
        return Runs(pair, one, batch).many(DRAWS)[0].numpy()


def test_the_pipeline_of_a_regression_is_calibrated_and_half_its_scale_is_not() -> None:
    outcome = run("regression", 40, epochs=40)
    assert min(outcome.p_values) > 1e-3, outcome.p_values
    assert abs(outcome.coverage_z()) < 3 and outcome.posterior_z() < 3, (outcome.held.mean(), outcome.posterior_z())
    wrong = halved(outcome)
    assert wrong.posterior_z() > 4, wrong.posterior_z()  # forty ranks are too few for the chi-square to see it


@pytest.mark.slow
@pytest.mark.parametrize(("name", "patience"), [("regression", None), ("regression", 15), ("groups", None)])
def test_pipelines_are_calibrated(name: str, patience: int | None) -> None:
    """To convergence: at 60 epochs the means of the groups are 0.2 standard deviations off, and cover 80 %.

    Early stopping is no part of "groups": judged by eight held-out rows it stops too early (a[2]: 80 %).
    """
    outcome = run(name, 150, epochs=200, patience=patience, seed=1)
    assert min(outcome.p_values) > 1e-3, outcome.p_values
    assert abs(outcome.coverage_z()) < 3, outcome.held.mean()
    assert outcome.posterior_z() < 3, outcome.posterior_z()
    assert halved(outcome).posterior_z() > 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutant"), [("regression", "scale"), ("groups", "scale"), ("regression", "prior")])
def test_a_dropped_scale_and_another_prior_are_seen(name: str, mutant: str) -> None:
    outcome = run(name, 150, epochs=60, mutant=mutant, seed=1)
    assert min(outcome.p_values) < 1e-4, outcome.p_values
