"""Ensembles, mixtures of them, and Stein's particles: identities with single members, exact cases, bad input."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import dgm
from dgm.errors import GuideError, OptionError
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.ensemble import Ensemble
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.point import Point
from dgm.guides.stein import Stein
from dgm.models import bayesian_linear_regression, bnn, linear_vae
from dgm.pair import Pair
from dgm.particles import particle_noise
from dgm.programs import preserved_rng
from dgm.stein import SteinObjective
from dgm.testing import check_exact, check_pair


@pytest.mark.parametrize("guide", [Ensemble, partial(Ensemble, family=DiagonalNormal, members=3), Stein])
@pytest.mark.parametrize("module", [bnn, bayesian_linear_regression])
def test_pair(module: Any, guide: Any) -> None:
    model, batch = module.example()
    with preserved_rng(0):
        made = guide(model, *batch)
    evidence = (
        model.log_evidence(*batch).detach() if hasattr(model, "log_evidence") and not isinstance(made, Stein) else None
    )
    check_pair(model, made, *batch, log_evidence=evidence if made.has_density else None, steps=8)


def test_each_member_gets_its_own_gradient_over_k() -> None:
    """One step of the ensemble is one step of each member: the gradients are those of K single points, over K."""
    model, batch = bnn.example()
    with preserved_rng(0):
        guide = Ensemble(model, *batch, members=4)
        loss = Pair(model, guide, guide.objective()).loss(None, batch)
        (found,) = torch.autograd.grad(loss, [guide.members["loc|bias"]])  # (K, d)
        single = Global(model, *batch, family=Point)
        for k in range(4):
            with torch.no_grad():
                single.family.loc.bias.copy_(guide.members["loc|bias"][k])
            alone = Pair(model, single).loss(None, batch)
            (expected,) = torch.autograd.grad(alone, [single.family.loc.bias])
            assert torch.allclose(found[k], expected / 4, rtol=1e-4, atol=1e-5)


def test_members_start_apart() -> None:
    model, batch = bnn.example()
    starts = Ensemble(model, *batch, members=3).members["loc|bias"].detach()
    assert torch.equal(starts[0], Global(model, *batch, family=Point).family.loc.bias)
    assert all(float((starts[i] - starts[j]).abs().mean()) > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_mixture_of_equal_exact_posteriors_is_the_posterior() -> None:
    model, (x, y) = bayesian_linear_regression.example()
    batch = (x.double(), y.double())
    guide = Ensemble(model, *batch, family=FullNormal, members=3).double()
    posterior = model.posterior(*batch)
    tril = torch.linalg.cholesky(posterior.covariance_matrix)
    scale = tril.diagonal()
    lower = (tril / scale[:, None])[tuple(torch.tril_indices(3, 3, -1))]
    with torch.no_grad():
        for name, value in (("loc|bias", posterior.mean), ("log_scale|bias", scale.log()), ("lower|bias", lower)):
            guide.members[name].copy_(value.expand_as(guide.members[name]))
    check_exact(model, guide, *batch, log_evidence=model.log_evidence(*batch), tolerance=1e-8)


def two_modes(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(1), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.abs(), 0.3), obs=x)


def test_a_mixture_finds_both_modes_and_gains_log_two() -> None:
    x = torch.full((10,), 1.5)
    fits = {}
    for name, make in {"one": Global, "two": partial(Ensemble, family=DiagonalNormal, members=4)}.items():
        with preserved_rng(0):
            guide = make(two_modes, x, init={"w": torch.tensor([1.0])})
        dgm.fit(two_modes, guide, x, steps=400, lr=0.05)
        fits[name] = float(dgm.log_weights(two_modes, guide, x, num_samples=2000).mean())
        if name == "two":
            modes = guide.members["loc|bias"].detach().flatten()
            # both members may have found one mode: then the signs of the start are to blame, not the mixture
            assert float(modes.min()) < -1.0 < 1.0 < float(modes.max())
    assert abs(fits["two"] - fits["one"] - torch.log(torch.tensor(2.0))) < 0.05


def test_stratified_draws_pick_every_member_once() -> None:
    with dgm.noise.recording() as draws:
        torch.rand(())
    with preserved_rng(0):
        for _ in range(20):
            u = particle_noise(draws[0], 7, "stratified")
            assert sorted((u * 7).long().tolist()) == list(range(7))


def test_stein_direction_is_the_sum_by_hand() -> None:
    with preserved_rng(0):
        u, score = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = SteinObjective(5, bandwidth=1.3)._direction(u, score)
    for i in range(5):
        by_hand = torch.zeros(3, dtype=torch.float64)
        for j in range(5):
            v = u[j].clone().requires_grad_()
            kernel = torch.exp(-(v - u[i]).square().sum() / 1.3)
            by_hand += kernel.detach() * score[j] + torch.autograd.grad(kernel, v)[0]
        assert torch.allclose(found[i] * 5, by_hand / 5)


def test_stein_reaches_a_normal_posterior() -> None:
    model, batch = bayesian_linear_regression.example()
    with preserved_rng(0):
        guide = Stein(model, *batch, members=30)
    dgm.fit(model, guide, *batch, steps=800, lr=5e-2)
    particles, posterior = guide.members["loc|bias"].detach(), model.posterior(*batch)
    sd = posterior.variance.sqrt()
    assert float(((particles.mean(0) - posterior.mean) / sd).abs().max()) < 0.1
    ratio = particles.std(0) / sd  # 30 particles under a median kernel stay a little narrow
    assert 0.75 < float(ratio.min()) and float(ratio.max()) < 1.1


def test_stein_moves_in_unconstrained_coordinates_with_the_jacobian() -> None:
    """A positive latent with a LogNormal posterior: the particles' logarithms have its moments."""

    def model(x: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(s.log(), 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, 3.0])
    with preserved_rng(0):
        guide = Stein(model, x, members=30)
    dgm.fit(model, guide, x, steps=600, lr=5e-2)
    u = guide.members["loc|bias"].detach()
    assert abs(float(u.mean()) - 1.5) < 0.05 and 0.4 < float(u.std()) < 0.55  # N(6 / 4, 1 / 4)


def test_replicas_of_ensembles() -> None:
    _, batch = bnn.example()
    many = dgm.fit(
        lambda: bnn.example()[0], partial(Ensemble, members=2), *batch, epochs=3, replicas=2, compile="trace"
    )
    assert many[0].engine.startswith("trace, 2 replicas")
    from dgm.starting import start_pair

    for seed, one in enumerate(many):
        alone = dgm.fit(
            *start_pair(lambda: bnn.example()[0], partial(Ensemble, members=2), seed, batch),
            *batch,
            epochs=3,
            seed=seed,
            compile=False,
        )
        assert torch.allclose(torch.tensor(one.history["elbo"]), torch.tensor(alone.history["elbo"]), rtol=1e-5)
    assert one.evaluations == 3 * 20 * 2  # each member's evaluation is counted


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Ensemble(*_bnn(), members=1), OptionError, "members is 1, expected a whole number, at least 2"),
        (lambda: Ensemble(*_vae()), GuideError, "latent 'z' is one for each row: Ensemble serves latents of all rows"),
        (lambda: Stein(*_vae()), GuideError, "latent 'z' is one for each row: Stein serves latents of all rows"),
        (lambda: Stein(*_bnn(), bandwidth=0.0), OptionError, "bandwidth is 0.0"),
        (lambda: SteinObjective(1), OptionError, "one alone is the mode"),
    ],
)
def test_bad_input(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def _bnn() -> tuple[Any, ...]:
    model, batch = bnn.example()
    return model, *batch


def _vae() -> tuple[Any, ...]:
    model, batch = linear_vae.example()
    return model, *batch
