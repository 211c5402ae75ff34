"""Data from a model's own prior and likelihood: right in distribution, at the right argument, or refused by name."""

from __future__ import annotations

import importlib

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dgm.errors import ModelError, OptionError
from dgm.models import bnn, gaussian_mixture
from dgm.models.bayesian_linear_regression import example as regression
from dgm.models.linear_vae import example as linear_vae
from dgm.simulate import simulate, simulate_sets

ZOO = ["bayesian_linear_regression", "bnn", "deep_latent_gaussian", "gaussian_mixture", "hierarchical_vae", "vae"]


@pytest.mark.parametrize("name", ZOO)
def test_shapes_over_the_zoo(name: str) -> None:
    model, template = importlib.import_module(f"dgm.models.{name}").example()
    state = torch.get_rng_state()
    found = simulate_sets(model, *template, sets=3, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert len(found) == 3
    for new, old in zip(found.batch(2), template, strict=True):
        assert new.shape == old.shape and new.dtype == old.dtype
    place = len(template) - 1
    assert not torch.equal(found.data[place][0], found.data[place][1])
    again = simulate_sets(model, *template, sets=3, seed=4)
    assert torch.equal(found.data[place], again.data[place])
    assert not torch.equal(found.data[place], simulate_sets(model, *template, sets=3, seed=5).data[place])


def covariance_is(y: Tensor, exact: Tensor) -> bool:
    """Within 4.5 standard errors of a normal sample, entry by entry."""
    variances = exact.diagonal()
    errors = ((exact**2 + torch.outer(variances, variances)) / len(y)).sqrt()
    mean = y.mean(0).abs() < 4.5 * (variances / len(y)).sqrt()
    return bool(mean.all()) and bool(((y.mT @ y / len(y) - exact).abs() < 4.5 * errors).all())


def test_moments_of_a_regression() -> None:
    """y ~ N(0, s^2 I + X X'), and jointly with the weights that made it: cov(w, y) = X'."""
    model, (x, y) = regression()
    found = simulate_sets(model, x, y, sets=20_000)
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    joint = torch.cat([design, torch.eye(3)])  # y and w as linear maps of w
    exact = joint @ joint.mT + torch.diag(torch.tensor([0.25] * 20 + [0.0] * 3))
    both = torch.cat([found.data[1], found.latents["w"]], 1)
    assert covariance_is(both, exact)
    shuffled = torch.cat([found.data[1], found.latents["w"].roll(1, 0)], 1)
    assert not covariance_is(shuffled, exact), "latents of other data sets pass"


def test_discrete_draws_one_by_one() -> None:
    model, (x,) = gaussian_mixture.example()
    found = simulate_sets(model, x, sets=50)
    assert found.latents["c"].dtype == torch.int64 and len(found.latents["c"].unique()) > 1
    assert not torch.equal(found.latents["c"][0], found.latents["c"][1])


def test_one_set() -> None:
    model, (x,) = linear_vae()
    (new,), latents = simulate(model, x, seed=3)
    assert new.shape == x.shape and latents["z"].shape == (20, 2)
    bayes, (x, y) = bnn.example()
    (same, new_y), latents = simulate(bayes, x, y)
    assert same is x and new_y.shape == y.shape and "network.0.weight" in latents


def test_numpy_and_pandas() -> None:
    model, (x, y) = regression()
    frame, series = pd.DataFrame(x.numpy()), y.numpy()
    (same, new), latents = simulate(model, frame, series)
    expected = simulate(model, x, y)
    assert torch.equal(same, x) and torch.equal(new, expected[0][1]) and torch.equal(latents["w"], expected[1]["w"])


def test_a_reshaped_argument_is_found() -> None:
    def model(x: Tensor) -> None:
        flat = x.reshape(len(x), -1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1e-4).to_event(1), obs=flat)

    (x,), latents = simulate(model, torch.zeros(5, 2, 2))
    assert x.shape == (5, 2, 2) and torch.allclose(x.reshape(5, 4), latents["z"], atol=1e-2)


def test_refusals() -> None:
    x = torch.zeros(6)

    def doubled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=2 * x)

    with pytest.raises(ModelError, match=r"'y' is none of the 1 arguments .*obs=y"):
        simulate(doubled, x)

    def flat(x: Tensor) -> None:
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(a, 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"'a' .*flat prior"):
        simulate(flat, x)

    def factor(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(a**2))
        pyro.sample("x", dist.Normal(a, 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ModelError, match=r"'penalty' .*factor"):
        simulate(factor, x)

    def looks(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 + x.abs()), obs=x)

    with pytest.raises(ModelError, match=r"'x' .*changes with the observed values"):
        simulate(looks, x)

    def prior_looks(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'z' .*changes with the observed values"):
        simulate(prior_looks, x)

    def nothing(x: Tensor) -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="observes nothing"):
        simulate(nothing, x)
    with pytest.raises(OptionError, match="sets is 0"):
        simulate_sets(doubled, x, sets=0)
