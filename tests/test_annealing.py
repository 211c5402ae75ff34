"""Annealed importance sampling and its reverse against evidence that is known, and against their own mutants."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dgm import annealing, hmc
from dgm.annealing import annealed_bound, reverse_annealed_bound
from dgm.annealing_walk import checked_schedule
from dgm.bounds import importance_bound
from dgm.errors import DataError, GuideError, ModelError, OptionError
from dgm.estimate import Estimate
from dgm.guides.amortized import Amortized
from dgm.guides.auxiliary import Auxiliary
from dgm.guides.free import Free
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.guides.point import Point
from dgm.log_joint import LogJoint
from dgm.models.bayesian_linear_regression import example as regression
from dgm.models.linear_vae import LinearVAE
from dgm.sandwich import sandwich
from dgm.weights import log_weights

FEW: dict[str, Any] = {"chains": 8, "steps": 40, "leapfrogs": 3}


def linear(rows: int, scale: float = 0.5, dtype: torch.dtype = torch.float64) -> tuple[LinearVAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model, x = LinearVAE.simulate(rows, features=4, latent=2, scale=scale, generator=generator, dtype=dtype)
    model.requires_grad_(False)
    return model, x


def normal(model: LinearVAE, diagonal: bool = False, full_size: int | None = None) -> Any:
    """The exact posterior as a hand-written guide, or the best diagonal normal."""

    def guide(x: Tensor) -> None:
        exact: Any = model.posterior(x)
        q = dist.Normal(exact.mean, model.precision().diagonal().rsqrt()).to_event(1) if diagonal else exact
        with pyro.plate("data", full_size or len(x), subsample_size=len(x)):
            pyro.sample("z", q)

    return guide


def declared(model: LinearVAE, rows: int) -> Any:
    """The same model, as a minibatch of so many rows: the scale that this has must not enter."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", rows, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(model.weight[0]), 1.0).to_event(1))
            pyro.sample("x", model.decode(z), obs=x)

    return program


def unbiased(estimate: Estimate, truth: Tensor) -> float:
    """z of E[w / p(x)] = 1, or E[p(x) / w] = 1 for the reverse, over independent data."""
    sign = 1 if estimate.side == "lower" else -1
    ratio = (sign * (estimate.values - truth)).exp()
    return float((ratio.mean() - 1) / (ratio.std() / len(ratio) ** 0.5))


def brackets(lower: Estimate, upper: Estimate, truth: Tensor) -> bool:
    """Within the stated errors: of the draws, once what is known of the logarithm's bias is put back."""
    low = (lower.mean - lower.bias.mean() - truth.mean()) / lower.mc_se
    high = (upper.mean - upper.bias.mean() - truth.mean()) / upper.mc_se
    return bool(low.abs() < 4.5) and bool(high.abs() < 4.5)


@pytest.mark.parametrize("rows, full_size", [(20, None), (20, 2000)])
def test_at_the_exact_posterior_every_weight_is_the_evidence(rows: int, full_size: int | None) -> None:
    model, x = linear(rows)
    program = declared(model, full_size) if full_size else model
    guide, truth = normal(model, full_size=full_size), model.log_evidence(x)
    lower = annealed_bound(program, guide, x, **FEW)
    upper = reverse_annealed_bound(program, guide, x, exact={"z": model.posterior(x).sample()}, mixing=3, **FEW)
    for found in (lower, upper):
        assert torch.allclose(found.values, truth, rtol=0, atol=1e-8) and float(found.errors.max()) < 1e-7
    assert 0.3 < lower.details["smallest acceptance"] <= lower.details["acceptance"] < 0.95


def test_the_scale_of_a_declared_plate_enters_no_log_weight() -> None:
    model, x = linear(20)
    program = declared(model, 2000)
    guide, attached = Amortized(model, x), Amortized(program, x)  # its plate carries the scale by a handler
    attached.load_state_dict(guide.state_dict())
    plain, scaled = (
        importance_bound(log_weights(p, g, x, num_samples=4000)) for p, g in ((model, guide), (program, attached))
    )
    truth = model.log_evidence(x)
    assert float((scaled - truth).abs().mean()) < 2 * float((plain - truth).abs().mean()) + 0.05


@pytest.mark.parametrize(
    "start, rows",
    [
        ("prior", 20),
        ("diagonal", 20),
        *(pytest.param(start, 2000, marks=pytest.mark.slow) for start in ("prior", "diagonal")),
    ],
)
def test_forward_and_reverse_bracket_the_evidence(start: str, rows: int) -> None:
    model, x = linear(rows)
    program, truth = declared(model, 100 * rows), model.log_evidence(x)
    guide = None if start == "prior" else normal(model, diagonal=True, full_size=100 * rows)
    options: dict[str, Any] = {"chains": 8, "steps": 100, "leapfrogs": 3}
    lower = annealed_bound(program, guide, x, **options)
    exact = {"z": model.posterior(x).sample((8,))}
    upper = reverse_annealed_bound(program, guide, x, exact=exact, mixing=0, **options)
    assert lower.mc_se < 0.1 and brackets(lower, upper, truth)
    assert abs(unbiased(lower, truth)) < 4.5 and abs(unbiased(upper, truth)) < 4.5
    assert upper.mean - lower.mean > -4.5 * math.hypot(lower.mc_se, upper.mc_se)


def test_a_walk_without_its_acceptance_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(1000)
    truth = model.log_evidence(x)
    honest = annealed_bound(model, None, x, **FEW)
    move = hmc.transition

    def careless(target: Any, state: hmc.State, step: Any, leapfrogs: int, scale: Any) -> Any:
        nearly_all = torch.full_like(state.log_density, 1e-9)
        return move(target, state, step, leapfrogs, scale, uniform=nearly_all)

    monkeypatch.setattr(hmc, "transition", careless)
    mutant = annealed_bound(model, None, x, strict=False, **FEW)
    assert abs(unbiased(honest, truth)) < 4.5 < abs(unbiased(mutant, truth))


def scales(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        t = pyro.sample("t", dist.LogNormal(0.0, 0.5))
        pyro.sample("x", dist.Normal(0.0, s * t), obs=x)


def scale_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("s", dist.Gamma(2.0, 2.0 / (0.5 + x.abs())))
        pyro.sample("t", dist.LogNormal(0.1, 0.4))


def scale_evidence(x: Tensor) -> Tensor:
    """By the rectangle rule in log s and log t, where the integrand is smooth and falls to nothing at both ends."""
    u = torch.linspace(-9, 5, 281, dtype=torch.float64)
    s, t = u.exp()[:, None], u.exp()[None, :]
    prior = dist.Gamma(2.0, 1.0).log_prob(s) + dist.LogNormal(0.0, 0.5).log_prob(t) + s.log() + t.log()
    joint = prior + dist.Normal(0.0, s * t).log_prob(x[:, None, None])
    return joint.flatten(1).logsumexp(1) + 2 * math.log(float(u[1] - u[0]))


@pytest.mark.parametrize("guide", [None, scale_guide])
def test_constrained_latents_against_quadrature(guide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = torch.linspace(-4, 4, 20, dtype=torch.float64)
    x, truth = few.repeat(25), scale_evidence(few).repeat(25)
    found = annealed_bound(scales, guide, x, **FEW)
    assert abs(unbiased(found, truth)) < 4.5 and abs(float((found.values - found.bias - truth).mean())) < 0.02
    monkeypatch.setattr(LogJoint, "log_jacobian", lambda self, u: u.new_zeros(self.leads[0][0]))
    mutant = annealed_bound(scales, guide, x, **FEW)
    assert abs(unbiased(mutant, truth)) > 4.5


def test_evidence_of_all_rows_where_the_latents_are_global() -> None:
    model, batch = regression()
    truth = model.log_evidence(*batch).reshape(1)
    exact = {"w": model.posterior(*batch).sample((64,))}
    for guide in (None, Global(model, *batch)):
        lower = annealed_bound(model, guide, *batch, chains=64, steps=200, leapfrogs=4)
        upper = reverse_annealed_bound(model, guide, *batch, exact=exact, chains=64, steps=200, leapfrogs=4)
        assert lower.values.shape == (1,) and brackets(lower, upper, truth) and lower.mc_se < 0.15

    def posterior(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", model.posterior(x, y))

    exactly = annealed_bound(model, posterior, *(t.double() for t in batch), **FEW)
    assert torch.allclose(exactly.values, model.log_evidence(*(t.double() for t in batch)), atol=1e-8)


def test_global_and_local_latents_together() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    covariance = 1.0 + 1.25 * torch.eye(4, dtype=torch.float64)
    truth = dist.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)
    for guide in (None, Joint(model, x)):
        found = annealed_bound(model, guide, x, chains=64, steps=100, leapfrogs=4)
        assert found.values.shape == (1,) and found.mc_se < 0.4
        assert abs(found.mean - float(found.bias) - float(truth)) < 4.5 * found.mc_se


def test_a_sandwich_holds_the_evidence_and_names_the_better_bound() -> None:
    model, x = linear(10)
    found = sandwich(model, normal(model, diagonal=True), x, rows=40, num_samples=4000, **FEW)
    prior = sandwich(model, None, x, rows=40, **FEW)
    assert found.importance is not None and prior.importance is None
    assert found.lower in (found.annealed, found.importance) and found.better == found.lower.method
    assert found.lower.mean == max(found.annealed.mean, found.importance.mean)
    assert len(found.lower.values) == len(prior.upper.values) == 40
    gap, error = found.gap
    assert -4.5 * error < gap < 0.1 and "gap of" in repr(found)


@pytest.mark.slow
def test_chunks_of_rows_give_each_row_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(25)
    monkeypatch.setattr(annealing, "VALUES_AT_ONCE", 8 * 4 * 10)
    found = annealed_bound(model, normal(model), x, **FEW)
    assert torch.allclose(found.values, model.log_evidence(x), rtol=0, atol=1e-8)
    guide = Free(model, x)  # it must be told which rows a chunk holds
    with torch.no_grad():
        guide.members["loc|bias"].copy_(model.posterior(x).mean)
        guide.members["log_scale|bias"].copy_(model.precision().diagonal().rsqrt().log().expand(25, -1))
    own = annealed_bound(model, guide, x, chains=8, steps=150, leapfrogs=3)
    z = (own.values - own.bias - model.log_evidence(x)).mean() / own.mc_se
    assert abs(float(z)) < 4.5 and own.mc_se < 0.03


def test_single_precision_seeds_and_the_random_stream() -> None:
    model, x = linear(5, dtype=torch.float32)
    guide = Amortized(model, x)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = annealed_bound(model, guide, x, seed=1, **FEW)
    assert torch.equal(before, torch.get_rng_state())
    same, other = (annealed_bound(model, guide, x, seed=seed, **FEW) for seed in (1, 2))
    assert torch.equal(first.values, same.values) and not torch.equal(first.values, other.values)
    assert bool(((first.values - model.log_evidence(x)).abs() < 1.5).all())


def test_one_step_is_importance_sampling() -> None:
    model, x = linear(500)
    found = annealed_bound(model, normal(model, diagonal=True), x, chains=50, steps=1)
    assert found.details == {} and abs(unbiased(found, model.log_evidence(x))) < 4.5


def test_schedules_rise_from_zero_to_one() -> None:
    for name in ("linear", "sigmoid"):
        b = checked_schedule(name, 10)
        assert b is not None and b[0] == 0 and b[-1] == 1 and bool((b.diff() > 0).all())
    model, x = linear(300)
    truth = model.log_evidence(x)
    for schedule in ("sigmoid", torch.linspace(0, 1, 41) ** 2):
        assert abs(unbiased(annealed_bound(model, None, x, schedule=schedule, **FEW), truth)) < 4.5


@pytest.mark.parametrize(
    "option, message",
    [
        ({"chains": 1}, "chains is 1, expected a whole number of at least 2"),
        ({"steps": 0}, "steps is 0"),
        ({"leapfrogs": 0}, "leapfrogs is 0"),
        ({"target": 1.5}, "target is 1.5"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"schedule": torch.tensor([0.0, 1.0])}, "41 numbers that rise from 0 to 1"),
    ],
)
def test_options_out_of_their_domain(option: dict[str, Any], message: str) -> None:
    model, x = linear(3)
    with pytest.raises(OptionError, match=message):
        annealed_bound(model, None, x, **{**FEW, **option})


def test_guides_without_a_density_elsewhere_are_named() -> None:
    model, x = linear(3)
    with pytest.raises(GuideError, match="guide=None"):
        annealed_bound(model, Amortized(model, x, family=Point), x)
    with pytest.raises(GuideError, match=r"'_data_auxiliary'.*guide=None"):
        annealed_bound(model, Auxiliary(model, x), x)


def test_models_without_a_path_are_named() -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def none(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def flat(x: Tensor) -> None:
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    for model, message in ((discrete, "'kind' is discrete"), (none, "no latent"), (flat, "prior of .*flat.*guide")):
        with pytest.raises(ModelError, match=message):
            annealed_bound(model, None, torch.zeros(3), **FEW)


def test_exact_draws_of_another_shape_or_support_are_refused() -> None:
    model, x = linear(3)
    for exact, message in (({}, "no draw of the latent 'z'"), ({"z": torch.zeros(5, 3, 2)}, "shape \\(5, 3, 2\\)")):
        with pytest.raises(DataError, match=message):
            reverse_annealed_bound(model, None, x, exact=exact, **FEW)
    draw = {"s": torch.ones(3), "t": -torch.ones(3)}
    with pytest.raises(DataError, match="'t' leaves the support"):
        reverse_annealed_bound(scales, None, torch.zeros(3), exact=draw, **FEW)


def test_chains_that_stand_still_are_not_hidden() -> None:
    def broken(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            # a finite value whose gradient is not, for the rows with x > 0
            pyro.sample("x", dist.Normal(z + torch.where(x > 0, z - z.detach(), 1.0).abs().sqrt(), 1.0), obs=x)

    x = torch.tensor([1.0, -1.0, 2.0])
    with pytest.raises(ModelError, match="chains of 2 of 3 data stand still"):
        annealed_bound(broken, None, x, **FEW)
    found = annealed_bound(broken, None, x, strict=False, **FEW)
    assert found.details["data that stand still"] == 2 and found.details["smallest acceptance"] < 0.01
