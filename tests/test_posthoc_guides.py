"""Posteriors made after training: Laplace, SWAG, an exact last layer, NUTS; and the hook that `fit` calls them by."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import dgm
from dgm.curvature import precision, prior_precision, row_gradients
from dgm.errors import GuideError, ModelError, OptionError
from dgm.evaluate import global_khat
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.joint import Joint
from dgm.guides.laplace import Laplace
from dgm.guides.last_layer import LastLayer
from dgm.guides.nuts import NUTS
from dgm.guides.one_of import OneOf
from dgm.guides.swag import SWAG
from dgm.log_joint import LogJoint
from dgm.models import linear_vae
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Bernoulli, Normal
from dgm.packing import Packing
from dgm.posthoc import has_density, notes_of
from dgm.programs import isolated, preserved_rng
from dgm.sites import latents
from dgm.testing import SIGMAS, ContractError, check_exact
from dgm.weights import log_weight_terms

MADE = {
    "full": Laplace,
    "diagonal": partial(Laplace, structure="diagonal"),
    "kronecker": partial(Laplace, structure="kronecker"),
    "last-layer": partial(Laplace, structure="last-layer"),
    "swag": partial(SWAG, rank=3, collect=6),
    "last layer": LastLayer,
    "nuts": partial(NUTS, draws=8, warmup=8, depth=3),
}


def regression(n: int = 30) -> tuple[BayesianLinearRegression, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]]).double()
    y = x @ torch.tensor([1.0, -0.5]).double() + 0.3 + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)
    return BayesianLinearRegression(2, noise=0.5, intercept=True), x, y


def network(layers: int = 2, likelihood: Any = None, n: int = 24, **options: Any) -> tuple[BNN, tuple[Tensor, Tensor]]:
    with preserved_rng(0):
        parts = [nn.Linear(2, 3), nn.Tanh()] if layers == 2 else []
        x = torch.randn(n, 2)
        y = torch.sin(x[:, 0]) + 0.3 * torch.randn(n)
        net = nn.Sequential(*parts, nn.Linear(3 if parts else 2, 1))
        return BNN(net, likelihood or Normal(scale=0.3), **options), (x, y)


def values(guide: Any, *batch: Tensor) -> dict[str, Tensor]:
    """What a guide draws; Pyro's global store is left alone."""
    with isolated():
        return guide(*batch)


def at_mode(guide: Any, model: Any, *batch: Tensor) -> Any:
    """The guide with its point at the mode of a quadratic log joint: one Newton step."""
    joint, u = LogJoint(model, [guide.packing]), guide.loc.detach().clone()
    step = torch.linalg.solve(precision(joint, u, batch), joint.gradient(u, *batch)[1].double())
    with torch.no_grad():
        guide.loc.add_(step)
    return guide


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_full_laplace_is_the_posterior_of_linear_regression() -> None:
    model, x, y = regression()
    guide = at_mode(Laplace(model, x, y), model, x, y)
    evidence = model.log_evidence(x, y)
    with pytest.raises(ContractError):  # the mutant: a point is no posterior
        check_exact(model, guide, x, y, log_evidence=evidence)
    guide.finish(model, x, y)
    check_exact(model, guide, x, y, log_evidence=evidence, tolerance=1e-9)
    assert math.isclose(guide.log_evidence, float(evidence), abs_tol=1e-9)
    exact = model.posterior(x, y).covariance_matrix
    assert torch.allclose(guide.density().covariance_matrix, exact, rtol=1e-9)
    assert float(guide.gradient_norm) < 1e-9 and float(guide.newton_step) < 1e-9 and int(guide.negative) == 0


def test_a_posterior_narrower_than_the_exact_one_is_found_out() -> None:
    model, x, y = regression()
    guide = at_mode(Laplace(model, x, y), model, x, y)
    guide.finish(model, x, y)
    guide.normal.log_scale.sub_(0.01)
    with pytest.raises(ContractError):
        check_exact(model, guide, x, y, log_evidence=model.log_evidence(x, y))


def test_curvature_in_chunks_is_that_of_all_rows() -> None:
    model, x, y = regression(1203)
    guide = at_mode(Laplace(model, x, y), model, x, y)
    guide.finish(model, x, y)
    assert torch.allclose(guide.density().covariance_matrix, model.posterior(x, y).covariance_matrix, rtol=1e-9)
    assert float(guide.gradient_norm) < 1e-7


def test_a_positive_latent_has_its_mode_and_curvature_in_unconstrained_space() -> None:
    x = torch.tensor([0.5, 1.0, 2.5, 0.7], dtype=torch.float64)

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), x.new_tensor(2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    guide = Laplace(model, x, init={"rate": torch.tensor(1.0, dtype=torch.float64)})
    dgm.fit(model, guide, x, steps=300, optim=partial(torch.optim.Adam, lr=0.03))
    # in u = log rate the log density is (3 + 4) u - (2 + sum x) e^u: mode log(7 / 6.7), curvature 7
    assert math.isclose(float(guide.loc.detach()), math.log(7 / 6.7), abs_tol=1e-4)
    assert math.isclose(float(guide.density().variance.detach()), 1 / 7, rel_tol=1e-3)


def test_the_fisher_information_of_linear_regression_is_that_of_its_formula() -> None:
    model, (x, y) = network(layers=1, n=40)
    model, x, y = model.double(), x.double(), y.double()
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    exact = design.mT @ design / 0.3**2 + torch.eye(3).double()
    draws = 200
    error = SIGMAS * math.sqrt(2 / draws) * (design**4).sum(0).sqrt() / 0.3**2  # of a mean of chi-square variables
    diagonal, kronecker = (Laplace(model, x, y, structure=s, draws=draws) for s in ("diagonal", "kronecker"))  # type: ignore[arg-type]
    for guide in (diagonal, kronecker):
        guide.finish(model, x, y)
    found = 1 / diagonal.density().variance
    assert bool(((found - exact.diagonal()).abs() < error).all())
    # one output: B is a number, N A (x) B + prior the exact Hessian up to the mean of N * draws chi-square variables
    eps = torch.eye(3, dtype=torch.float64)
    tril = (kronecker.density().push(eps)[0] - kronecker.loc).detach()  # rows: the images of unit noise
    ratio = torch.linalg.inv(tril.mT @ tril) - torch.eye(3).double()
    ratio = ratio / (exact - torch.eye(3).double())
    assert float(ratio.std()) < 1e-6 and abs(float(ratio.mean()) - 1) < SIGMAS * math.sqrt(2 / (draws * len(x)))


def test_kronecker_density_of_its_own_draws_and_of_equal_values() -> None:
    model, batch = network(likelihood=Normal())
    for structure in ("kronecker", "last-layer"):
        guide = Laplace(model, *batch, structure=structure)  # type: ignore[arg-type]
        guide.finish(model, *batch)
        q = guide.density()
        with preserved_rng(0):
            x, log_q = q.rsample_and_log_prob((5,))
        assert torch.allclose(q.log_prob(x.clone()), log_q, atol=1e-4)
    blocked = Laplace(model, *batch, structure="kronecker")
    blocked.finish(model, *batch)
    cholesky = (blocked.density().push(torch.eye(14))[0] - blocked.loc).mT.detach()
    normal = torch.distributions.MultivariateNormal(blocked.loc.detach(), cholesky @ cholesky.mT)
    u = blocked.loc.detach() + 0.1
    assert math.isclose(float(normal.log_prob(u)), float(blocked.density().log_prob(u).detach()), rel_tol=1e-3)


def test_the_exact_last_layer_is_regression_on_the_features() -> None:
    model, (x, y) = network()
    model, x, y = model.double(), x.double(), y.double()
    guide = LastLayer(model, x, y, family=DiagonalNormal)
    guide.finish(model, x, y)
    w = values(guide, x, y)
    features = torch.tanh(x @ w["network.0.weight"].mT + w["network.0.bias"])
    twin = BayesianLinearRegression(3, noise=0.3, intercept=True)
    exact = twin.posterior(features, y)
    order = [b.site.name for b in guide.packing.blocks]
    assert order == ["network.2.weight", "network.2.bias"] == guide.last
    q = guide.posterior()
    assert torch.allclose(q.mean, exact.mean, atol=1e-9)
    assert torch.allclose(q.covariance_matrix, exact.covariance_matrix, rtol=1e-7, atol=1e-12)
    # with the points fixed the log weight is log p(points) + log p(y | features), whatever is drawn
    weights = log_weight_terms(model, guide, x, y, num_samples=5).total
    points = sum(dist.Normal(0.0, 1.0).log_prob(w[f"network.0.{n}"]).sum() for n in ("weight", "bias"))
    assert float((weights - points - twin.log_evidence(features, y)).detach().abs().max()) < 1e-8
    assert "exact" in guide.notes[0] and not has_density(guide)


def test_a_last_layer_without_a_closed_form_keeps_its_family() -> None:
    model, (x, y) = network(likelihood=Bernoulli())
    batch = (x, (y > 0).float())
    guide = LastLayer(model, *batch)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    guide.finish(model, *batch)
    assert not guide.done and "no closed form" in guide.notes[0]
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    with pytest.raises(GuideError, match=r"not quadratic in network\.2\.weight"):
        LastLayer(model, *batch, exact=True).finish(model, *batch)
    model, batch = network()
    never = LastLayer(model, *batch, exact=False)
    never.finish(model, *batch)
    assert not never.done and never.notes == []


def test_swag_on_a_quadratic_target_has_the_moments_of_sgd() -> None:
    model, x, y = regression(200)
    guide = at_mode(SWAG(model, x, y, rank=20, collect=400, every=30), model, x, y)
    mode, joint = guide.loc.detach().clone(), LogJoint(model, [guide.packing])
    guide.finish(model, x, y)
    # about the mode SGD is a linear recursion: its covariance S solves S = (1 - r A) S (1 - r A) + r^2 C / B
    curvature, rate, size = precision(joint, mode, (x, y)) / 200, float(guide.rate), 25
    noise = torch.cov(torch.cat(list(row_gradients(joint, mode, (x, y)))).mT, correction=0) / size
    keep = torch.eye(3).double() - rate * curvature
    law = torch.linalg.solve(torch.eye(9).double() - torch.kron(keep, keep), (rate**2 * noise).reshape(9)).reshape(3, 3)
    assert float(torch.linalg.matrix_power(keep, 30).norm()) < 0.2  # 400 iterates are all but independent
    z = (guide.loc.detach() - mode) / (law.diagonal() / 400).sqrt()
    assert float(z.abs().max()) < SIGMAS * 1.3
    assert float((2 * guide.variance / law.diagonal() - 1).abs().max()) < SIGMAS * 1.3 * math.sqrt(2 / 400)
    # Mandt's step size: about as wide as the posterior
    ratio = guide.density().stddev.detach() / model.posterior(x, y).stddev
    assert bool(((ratio > 0.5) & (ratio < 2)).all()) and guide.evaluations > 400 * 30 * 25


def test_nuts_has_the_moments_of_the_posterior() -> None:
    model, x, y = regression()
    guide = NUTS(model, x, y, draws=200, warmup=100)
    fit = dgm.fit(model, guide, x, y, seed=1)
    exact = model.posterior(x, y)
    z = (guide.samples.mean(0) - exact.mean) / (exact.stddev / guide.ess.sqrt())
    assert float(z.abs().max()) < SIGMAS
    second = (guide.samples - exact.mean).square() / exact.variance
    assert float(((second.mean(0) - 1) / (2 / guide.ess).sqrt()).abs().max()) < SIGMAS
    assert float(guide.rhat.max()) < 1.05 and 100 < float(guide.ess.min())
    assert (fit.steps, len(fit.history)) == (0, 0) and fit.evaluations == guide.evaluations > 300 * 30
    assert "nothing to train" in fit.stopped and "R-hat" in guide.notes[0]
    shifted = (guide.samples.mean(0) + 0.5 * exact.stddev - exact.mean) / (exact.stddev / guide.ess.sqrt())
    assert float(shifted.abs().min()) > SIGMAS  # the mutant


def test_nuts_serves_latents_of_each_row() -> None:
    x = torch.tensor([1.0, -2.0, 0.5])

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = NUTS(model, x, draws=200, warmup=100, chains=1)
    guide.finish(model, x)
    # z = (m + a, m + b): m, z_11, z_12, ... given x are normal; the mean of m by least squares
    design = torch.tensor([2.0, 2.0, 2.0])
    cov = torch.outer(design, design) + 3 * torch.eye(3)
    mean, variance = design @ torch.linalg.solve(cov, x), 1 - design @ torch.linalg.solve(cov, design)
    z = (guide.samples[:, 0].mean() - mean) / (variance / guide.ess[0]).sqrt()
    assert abs(float(z)) < SIGMAS
    assert guide.samples.shape == (200, 7) and values(guide, x)["z"].shape == (3, 2)
    scores = dgm.evaluate(model, guide, x, num_samples=20)
    assert math.isnan(scores.summary["bound"]) and "no density" in " ".join(scores.notes)
    with pytest.raises(GuideError, match="3 rows and sees 2"):
        values(guide, x[:2])


# --- the hook --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_fit_finishes_and_a_fresh_guide_takes_the_state(name: str) -> None:
    model, batch = network(likelihood=Normal())
    random = torch.get_rng_state()
    guide = MADE[name](model, *batch)
    fit = dgm.fit(model, guide, *batch, epochs=3, lr=1e-2, validation=0.25)
    assert torch.equal(random, torch.get_rng_state())
    assert guide.done is (name != "none") and bool(guide.finished) == guide.done
    assert fit.seconds > 0 and math.isfinite(fit.history["valid_elbo"].iloc[-1])
    twin, spare = MADE[name](model, *batch), copy.deepcopy(guide)
    twin.load_state_dict(guide.state_dict())
    draws = []
    for one in (guide, twin, spare):
        with preserved_rng(7):
            draws.append(torch.cat([v.flatten() for v in values(one, *batch).values()]))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    with preserved_rng(8):
        assert not torch.equal(draws[0], torch.cat([v.flatten() for v in values(guide, *batch).values()]))
    again = dgm.fit(model, spare, *batch, epochs=1)  # trains what was trained, and finishes anew
    assert spare.done and again.steps == fit.steps / 3
    scores = dgm.evaluate(model, guide, *batch, num_samples=100)
    assert math.isfinite(scores.summary["bound"]) and scores.notes == notes_of(guide) == guide.notes
    whole = name in ("full", "diagonal", "kronecker", "swag")
    assert has_density(guide) is whole and math.isnan(global_khat(model, guide, *batch, num_samples=100)) is not whole


@pytest.mark.slow
def test_the_same_seed_gives_the_same_posterior() -> None:
    model, batch = network(likelihood=Normal())
    for name in ("kronecker", "swag", "nuts"):
        states = []
        for seed in (3, 3, 4):
            guide = MADE[name](model, *batch)
            dgm.fit(model, guide, *batch, epochs=2, seed=seed)
            states.append(torch.cat([v.flatten().double() for v in guide.state_dict().values()]))
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2]), name


@pytest.mark.slow
def test_compare_and_replicas_finish_every_seed() -> None:
    model, batch = network(likelihood=Normal())
    guides = {name: MADE[name] for name in ("full", "kronecker", "swag", "last layer", "nuts")}
    guides["joint"] = partial(Joint, global_=Laplace)
    result = dgm.compare(model, guides, batch, seeds=2, epochs=2, num_samples=100, compile=False)
    assert list(result.rows["status"].unique()) == ["ok"] and len(result.rows) == 12
    notes = result.rows.set_index(["guide", "seed"])["notes"]
    for name, word in (("full", "gradient norm"), ("joint", "gradient norm"), ("swag", "step size"), ("nuts", "R-hat")):
        assert word in notes[name, 0] and word in notes[name, 1], name
    assert notes["swag", 0] != notes["swag", 1] and notes["nuts", 0] != notes["nuts", 1]
    assert set(result.khat) == {"full", "kronecker", "swag", "joint"}
    assert "nuts" in repr(result)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_laplace_at_a_point_that_is_no_mode_says_so() -> None:
    x = torch.zeros(3, dtype=torch.float64)

    def double_well(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(x.new_zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(u[0] ** 2 - 4, 1.0), obs=x)

    guide = Laplace(double_well, x, init={"u": torch.tensor([0.1, 3.0], dtype=torch.float64)})
    guide.finish(double_well, x)
    slope = torch.tensor([3 * 2 * 0.1 * (4 - 0.01) - 0.1 / 100, -3.0 / 100], dtype=torch.float64)
    assert math.isclose(float(guide.gradient_norm), float(slope.norm()), rel_tol=1e-9) and int(guide.negative) == 1
    assert "this is no mode: train longer" in guide.notes[0]
    assert "gradient norm is 2.39" in guide.notes[0] and "1 directions have negative curvature" in guide.notes[0]
    joint = LogJoint(double_well, [guide.packing])
    prior = prior_precision(joint, guide.loc.detach(), (x,))
    assert torch.allclose(prior, torch.full((2,), 0.01).double())
    assert torch.allclose(guide.density().variance, torch.full((2,), 100.0).double(), rtol=1e-6)  # the prior's


def test_bad_input_is_refused_with_what_would_work() -> None:
    model, batch = network(likelihood=Normal())
    vae, (x,) = linear_vae.example()
    plain, a, b = regression()

    def counts(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k.to(x.dtype), 1.0), obs=x[:, 0])

    def each(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    for make, error, message in (
        (lambda: Laplace(model, *batch, structure="block"), OptionError, "expected one of full"),  # type: ignore[arg-type]
        (lambda: Laplace(model, *batch, draws=0), OptionError, "draws is 0"),
        (lambda: Laplace(model, *batch, limit=5), GuideError, "structure='kronecker'"),
        (lambda: Laplace(plain, a, b, structure="last-layer"), GuideError, "take 'full'"),
        (lambda: Laplace(vae, x), GuideError, "latent 'z' is one for each row"),
        (lambda: Laplace(model, *batch, sites=["noise_scale"]), GuideError, "leaves out the latent 'network.0.bias'"),
        (lambda: SWAG(model, *batch, rank=1), OptionError, "rank is 1, expected a whole number of at least 2"),
        (lambda: SWAG(model, *batch, rank=5, collect=4), OptionError, "2 <= rank <= collect"),
        (lambda: SWAG(model, *batch, every=1.5), OptionError, "every is 1.5"),  # type: ignore[arg-type]
        (lambda: SWAG(model, *batch, lr=math.nan), OptionError, "lr is nan"),
        (lambda: Laplace(model, *batch, draws=True), OptionError, "draws is True"),
        (lambda: Laplace(counts, x), ModelError, "latent 'k' is discrete"),
        (lambda: NUTS(counts, x), ModelError, "'k' is discrete .*mixture distribution"),
        (lambda: NUTS(each, x), ModelError, "'k' is discrete"),
        (lambda: NUTS(model, *batch, warmup="10"), OptionError, "warmup is '10'"),  # type: ignore[arg-type]
        (lambda: SWAG(model, *batch, lr=-1.0), OptionError, "lr is -1.0"),
        (lambda: SWAG(model, *batch, batch_size=24).finish(model, *batch), GuideError, "24 of 24 rows"),
        (lambda: LastLayer(plain, a, b), GuideError, "no linear layer"),
        (lambda: LastLayer(model, *batch, exact="yes"), OptionError, "exact is 'yes'"),  # type: ignore[arg-type]
        (lambda: NUTS(model, *batch, draws=2), OptionError, "draws is 2"),
        (lambda: NUTS(vae, x), GuideError, "trainable parameter 'weight'"),
        (lambda: NUTS(model, *batch, limit=3), GuideError, "more than limit=3"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_swag_halves_a_step_size_that_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = regression(200)
    guide = at_mode(SWAG(model, x, y, rank=2, collect=200), model, x, y)
    guide.finish(model, x, y)
    stable = float(guide.rate)
    monkeypatch.setattr(SWAG, "_rate", lambda *_: 64 * stable)
    wild = at_mode(SWAG(model, x, y, rank=2, collect=400, every=10), model, x, y)
    wild.finish(model, x, y)
    assert float(wild.rate) < 64 * stable and bool(torch.isfinite(wild.density().stddev).all())
    told = at_mode(SWAG(model, x, y, rank=2, collect=400, every=10, lr=64 * stable), model, x, y)
    with pytest.raises(GuideError, match="diverged from the point: give a smaller lr"):
        told.finish(model, x, y)


def test_trajectories_that_were_cut_are_told() -> None:
    model, x, y = regression()
    short = NUTS(model, x, y, draws=20, warmup=5, depth=1, chains=1)
    short.finish(model, x, y)
    assert float(short.full) == 1.0 and "100% of the trajectories were cut at depth=1" in short.notes[0]
    assert short.log_density.shape == (2,) and float(short.log_density[1]) > 0
    assert short.evaluations <= 30 * (1 + 2 + 2 * 25 + 40)


def test_what_is_not_finite_is_refused() -> None:
    model, (x, y) = network()
    guide = Laplace(model, x, y)
    with torch.no_grad():
        guide.loc.fill_(math.inf)
    with pytest.raises(GuideError, match="not finite"):
        guide.finish(model, x, y)
    with pytest.raises(GuideError, match="not finite at the start"):
        NUTS(model, x, y).finish(model, x, y * math.inf)
    assert not guide.done


def test_one_of_its_rows_each_as_likely() -> None:
    with preserved_rng(0):
        drawn = OneOf(torch.arange(4.0)[:, None]).rsample(torch.Size((4000,)))
        counts = drawn.long().flatten().bincount(minlength=4).double()
        z = (counts - 1000) / math.sqrt(4000 * 0.25 * 0.75)
        wide = torch.func.vmap(lambda _: OneOf(torch.randn(3, 2)).rsample(), randomness="different")(torch.zeros(6))
    assert float(z.abs().max()) < SIGMAS and wide.shape == (6, 2)


def test_the_log_joint_is_that_of_pyro_and_its_graph_agrees() -> None:
    model, batch = network(likelihood=Normal())
    packing = Packing(latents(model, *batch).values())
    joint = LogJoint(model, [packing])
    u = torch.linspace(-1, 1, joint.size)
    latent, log_jacobian = packing.unpack(u)
    trace = pyro.poutine.trace(pyro.poutine.condition(model, latent)).get_trace(*batch)
    expected = trace.log_prob_sum() + sum(t.sum() for t in log_jacobian.values())
    assert math.isclose(float(joint.whole(u, *batch)), float(expected), rel_tol=1e-5)
    value, slope = joint.traced(u, *batch)(u + 0.1, *batch)
    again, there = joint.gradient(u + 0.1, *batch)
    assert math.isclose(float(value), float(again), rel_tol=1e-5) and torch.allclose(slope, there, rtol=1e-3, atol=1e-3)
    doubled, _ = joint.traced(u, *batch, weight=2.0)(u, *batch)
    rows, rest = joint.terms(u, *batch)
    assert math.isclose(float(doubled), float(2 * rows.sum() + rest), rel_tol=1e-5)
