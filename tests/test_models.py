"""Models: exact evidences and posteriors, names and scopes of sites, likelihoods, and messages for wrong shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from dgm.errors import DataError, DGMError, ModelError, OptionError
from dgm.models import bayesian_linear_regression, bnn, deep_latent_gaussian, linear_vae, vae
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.bnn import BNN, fan_in_prior
from dgm.models.deep_latent_gaussian import DeepLatentGaussian
from dgm.models.likelihoods import Bernoulli, Categorical, Likelihood, Normal
from dgm.models.linear_vae import LinearVAE
from dgm.models.vae import VAE

DOUBLE = torch.float64
EXAMPLES: dict[str, Callable[[], tuple[Any, tuple[Tensor, ...]]]] = {
    "vae": vae.example,
    "deep_latent_gaussian": deep_latent_gaussian.example,
    "linear_vae": linear_vae.example,
    "bnn": bnn.example,
    "bnn classification": bnn.example_classification,
    "bayesian_linear_regression": bayesian_linear_regression.example,
}


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """A seeded random stream and an own parameter store, and both as before afterwards."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
        torch.default_generator.manual_seed(1)
        yield


def trace(model: Callable[..., Any], *batch: Tensor, **values: Tensor) -> Trace:
    return pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(*batch)


def log_joint(model: Callable[..., Any], *batch: Tensor, **values: Tensor) -> Tensor:
    """log p of everything, for each datum if the model has local latents only."""
    record = trace(model, *batch, **values)
    record.compute_log_prob()
    return torch.as_tensor(
        sum(site["log_prob"] for name, site in record.nodes.items() if name in (*values, "x", "y") and "fn" in site)
    )


def latents(model: Callable[..., Any], *batch: Tensor) -> dict[str, dict[str, Any]]:
    nodes = trace(model, *batch).iter_stochastic_nodes()
    return {name: site for name, site in nodes if not site_is_subsample(site)}


def linear_truth(features: int = 5, latent: int = 3) -> tuple[LinearVAE, Tensor]:
    generator = torch.Generator().manual_seed(2)
    model, x = LinearVAE.simulate(40, features, latent, scale=0.4, generator=generator, dtype=DOUBLE)
    with torch.no_grad():
        model.loc.copy_(torch.linspace(-1, 1, features))
    return model, x


def regression_truth(intercept: bool = True) -> tuple[BayesianLinearRegression, Tensor, Tensor]:
    x = torch.randn(30, 3, dtype=DOUBLE)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE) + 0.7 + 0.3 * torch.randn(30, dtype=DOUBLE)
    return BayesianLinearRegression(3, prior_scale=1.5, noise=0.3, intercept=intercept), x, y


# --- every model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_is_repeatable_and_leaves_the_random_stream(name: str) -> None:
    before = torch.get_rng_state()
    model, batch = EXAMPLES[name]()
    again, batch_again = EXAMPLES[name]()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(batch, batch_again, strict=True))
    state, state_again = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    record = trace(model, *batch)
    record.compute_log_prob()
    assert torch.isfinite(record.log_prob_sum())
    assert any(frame.name == "data" for frame in record.nodes["y" if len(batch) == 2 else "x"]["cond_indep_stack"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    model, batch = EXAMPLES[name]()
    if name in ("bnn", "bnn classification", "bayesian_linear_regression"):  # everything unknown is latent
        assert not list(model.parameters())
        return
    trace(model, *batch).log_prob_sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", EXAMPLES)
def test_log_joint_is_vmappable_and_traceable(name: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model, batch = EXAMPLES[name]()
    draws = [{site: node["value"].detach() for site, node in latents(model, *batch).items()} for _ in range(3)]

    def density(values: dict[str, Tensor]) -> Tensor:
        with pyro.validation_enabled(False):
            return trace(model, *batch, **values).log_prob_sum()

    one_by_one = torch.stack([density(draw) for draw in draws])
    stacked = {site: torch.stack([draw[site] for draw in draws]) for site in draws[0]}
    torch.testing.assert_close(torch.func.vmap(density)(stacked), one_by_one, rtol=1e-4, atol=1e-4)
    graph = make_fx(density)(draws[0])
    torch.testing.assert_close(graph(draws[1]), one_by_one[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_copies_and_double_precision(name: str) -> None:
    model, batch = EXAMPLES[name]()
    before = {site: node["value"].detach() for site, node in latents(model, *batch).items()}
    expected = log_joint(model, *batch, **before).sum()
    twin = copy.deepcopy(model)
    assert torch.equal(log_joint(twin, *batch, **before).sum(), expected)
    assert torch.equal(log_joint(model, *batch, **before).sum(), expected)  # and the original still works
    twin.double()
    batch64 = tuple(t.double() if t.is_floating_point() else t for t in batch)
    for site, node in latents(twin, *batch64).items():
        assert node["value"].dtype == DOUBLE, site
    exact = log_joint(twin, *batch64, **{site: value.double() for site, value in before.items()}).sum()
    torch.testing.assert_close(exact.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXAMPLES)
def test_stock_svi_trains(name: str) -> None:
    model, batch = EXAMPLES[name]()
    guide = AutoNormal(model, init_scale=0.1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = torch.tensor([svi.step(*batch) for _ in range(60)])
    assert torch.isfinite(losses).all()
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.parametrize("name", ["vae", "deep_latent_gaussian", "linear_vae", "bayesian_linear_regression"])
def test_particles_may_be_vectorised(name: str) -> None:
    model, batch = EXAMPLES[name]()
    guide = AutoNormal(model, init_scale=0.1)
    losses = []
    for vectorised in (False, True):
        loss = Trace_ELBO(num_particles=400, vectorize_particles=vectorised, max_plate_nesting=1)
        losses.append(loss.loss(model, guide, *batch))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_stock_predictive_and_mcmc() -> None:
    for name in ("bnn", "bnn classification", "bayesian_linear_regression"):
        model, (x, y) = EXAMPLES[name]()
        mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
        mcmc.run(x, y)
        draws = mcmc.get_samples()
        assert set(draws) == set(latents(model, x, y))
        assert all(len(value) == 5 and torch.isfinite(value).all() for value in draws.values())
        assert Predictive(model, draws)(x)["y"].shape == (5, 20)
    for name in ("vae", "deep_latent_gaussian", "linear_vae"):
        model, (x,) = EXAMPLES[name]()
        guide = AutoNormal(model)
        guide(x)
        sites = latents(model, x)
        draws = Predictive(model, guide=guide, num_samples=4)(x)
        assert {site: tuple(draws[site].shape[:2]) for site in sites} == dict.fromkeys(sites, (4, 20))


# --- linear VAE ------------------------------------------------------------------------------------------------------


def test_linear_vae_evidence_is_the_direct_marginal() -> None:
    model, x = linear_truth()
    covariance = model.weight @ model.weight.mT + (2 * model.log_scale).exp() * torch.eye(5, dtype=DOUBLE)
    direct = torch.distributions.MultivariateNormal(model.loc, covariance).log_prob(x)
    torch.testing.assert_close(model.log_evidence(x), direct, rtol=0, atol=1e-9)


def test_linear_vae_joint_over_posterior_is_the_evidence_for_any_z() -> None:
    model, x = linear_truth()
    for z in 3 * torch.randn(4, 40, 3, dtype=DOUBLE):
        log_weight = log_joint(model, x, z=z) - model.posterior(x).log_prob(z)
        torch.testing.assert_close(log_weight, model.log_evidence(x), rtol=0, atol=1e-8)
    # a mutant: another precision does not pass
    wrong = dist.MultivariateNormal(model.posterior(x).loc, torch.eye(3, dtype=DOUBLE))
    z = torch.randn(40, 3, dtype=DOUBLE)
    assert (log_joint(model, x, z=z) - wrong.log_prob(z) - model.log_evidence(x)).abs().max() > 0.1


def test_linear_vae_importance_sampling_from_a_widened_posterior() -> None:
    model, x = linear_truth()
    exact = model.posterior(x)
    q = dist.MultivariateNormal(exact.loc, covariance_matrix=1.3 * exact.covariance_matrix)
    with torch.no_grad():
        z = q.sample((4000,))
        log_weights = log_joint(model, x, z=z) - q.log_prob(z)  # (4000, 40)
        relative = (log_weights - model.log_evidence(x)).exp()  # mean 1
    error = relative.std(0) / 4000**0.5
    assert ((relative.mean(0) - 1).abs() < 4.5 * error).all()


def test_linear_vae_diagonal_gap_is_the_numerical_optimum() -> None:
    model, x = linear_truth()
    exact = model.posterior(x[:1])
    loc = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    log_scale = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    optimiser = torch.optim.LBFGS([loc, log_scale], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        q = torch.distributions.MultivariateNormal(loc, scale_tril=torch.diag(log_scale.exp()))
        p = torch.distributions.MultivariateNormal(exact.loc[0].detach(), exact.covariance_matrix[0].detach())
        return torch.distributions.kl_divergence(q, p)

    def closure() -> float:
        optimiser.zero_grad()
        value = divergence()
        value.backward()
        return value.item()

    optimiser.step(closure)
    assert divergence().item() == pytest.approx(model.diagonal_gap().item(), abs=1e-8)
    assert model.diagonal_gap() > 0.01  # the case is not trivial
    torch.testing.assert_close(
        (-2 * log_scale).exp().detach(), model.precision().diagonal().detach(), rtol=1e-4, atol=0
    )


def test_linear_vae_closed_form_is_a_stationary_maximum() -> None:
    truth, _ = linear_truth()
    x = truth.sample(300, torch.Generator().manual_seed(3))
    model = LinearVAE(5, 3, dtype=DOUBLE).fit_closed_form(x)
    best = model.log_evidence(x).mean()
    best.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-9, name
    assert best > truth.log_evidence(x).mean()


def test_linear_vae_closed_form_refuses_data_without_noise() -> None:
    x = torch.randn(50, 1, dtype=DOUBLE) @ torch.ones(1, 4, dtype=DOUBLE)
    with pytest.raises(DataError, match="noise scale would be 0"):
        LinearVAE(4, 2, dtype=DOUBLE).fit_closed_form(x)
    with pytest.raises(DataError, match="at least 2 rows"):
        LinearVAE(4, 2, dtype=DOUBLE).fit_closed_form(x[:1])
    with pytest.raises(ModelError, match="latent < features"):
        LinearVAE(4, 4, dtype=DOUBLE).fit_closed_form(x)


def test_linear_vae_samples_have_the_marginal_moments() -> None:
    model, _ = linear_truth()
    x = model.sample(20_000, torch.Generator().manual_seed(4))
    variance = (model.weight**2).sum(1) + (2 * model.log_scale).exp()
    assert ((x.mean(0) - model.loc).abs() < 4.5 * (variance / 20_000) ** 0.5).all()
    assert ((x.var(0) / variance - 1).abs() < 4.5 * (2 / 20_000) ** 0.5).all()


# --- Bayesian linear regression --------------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [False, True])
def test_regression_evidence_is_the_direct_marginal(intercept: bool) -> None:
    model, x, y = regression_truth(intercept)
    design = torch.cat([x, torch.ones(30, 1, dtype=DOUBLE)], 1) if intercept else x
    covariance = 1.5**2 * design @ design.mT + 0.3**2 * torch.eye(30, dtype=DOUBLE)
    direct = torch.distributions.MultivariateNormal(torch.zeros(30, dtype=DOUBLE), covariance).log_prob(y)
    torch.testing.assert_close(model.log_evidence(x, y), direct, rtol=0, atol=1e-8)


@pytest.mark.parametrize("intercept", [False, True])
def test_regression_joint_over_posterior_is_the_evidence_for_any_w(intercept: bool) -> None:
    model, x, y = regression_truth(intercept)
    posterior = model.posterior(x, y)
    for w in torch.randn(4, 3 + intercept, dtype=DOUBLE):
        log_weight = trace(model, x, y, w=w).log_prob_sum() - posterior.log_prob(w)
        torch.testing.assert_close(log_weight, model.log_evidence(x, y), rtol=0, atol=1e-8)


def test_regression_importance_sampling_from_a_widened_posterior() -> None:
    model, x, y = regression_truth()
    exact = model.posterior(x, y)
    q = dist.MultivariateNormal(exact.loc, covariance_matrix=1.3 * exact.covariance_matrix)
    w = q.sample((3000,))
    with pyro.validation_enabled(False):
        log_weights = torch.func.vmap(lambda row: trace(model, x, y, w=row).log_prob_sum())(w) - q.log_prob(w)
    relative = (log_weights - model.log_evidence(x, y)).exp()
    assert (relative.mean() - 1).abs() < 4.5 * relative.std() / 3000**0.5


# --- VAE, deep latent Gaussian, likelihoods --------------------------------------------------------------------------


def test_one_layer_deep_model_is_a_vae_with_a_linear_prior() -> None:
    deep = DeepLatentGaussian(6, latents=(3,), hidden=(8,))
    with torch.no_grad():
        deep.mixing[0].weight.copy_(torch.randn(3, 3))  # type: ignore[operator,union-attr]
    shallow = VAE(6, latent=3, hidden=(8,))
    shallow.decoder.load_state_dict(deep.decoder.state_dict())
    with torch.no_grad():
        shallow.decoder[0].weight.copy_(deep.decoder[0].weight @ deep.mixing[0].weight)  # type: ignore[operator,union-attr]
    x, z = torch.bernoulli(torch.full((7, 6), 0.5)), torch.randn(7, 3)
    torch.testing.assert_close(log_joint(deep, x, xi_1=z), log_joint(shallow, x, z=z))


def test_deep_model_follows_its_equations() -> None:
    model = DeepLatentGaussian(6, latents=(3, 2), hidden=(8,))
    for layer in model.mixing:
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    xi_1, xi_2 = torch.randn(7, 3), torch.randn(7, 2)
    h_2 = xi_2 @ model.mixing[1].weight.mT  # type: ignore[union-attr,operator]
    h_1 = model.transitions[0](h_2) + xi_1 @ model.mixing[0].weight.mT  # type: ignore[union-attr,operator]
    torch.testing.assert_close(model.reconstruct(xi_1=xi_1, xi_2=xi_2), model.decoder(h_1).sigmoid())
    sites = latents(model, torch.zeros(7, 6))
    assert {name: tuple(site["value"].shape) for name, site in sites.items()} == {"xi_2": (7, 2), "xi_1": (7, 3)}
    with pytest.raises(ModelError, match="xi_2"):
        model.decode(xi_1=xi_1)


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), Normal(), Normal(features=4), Normal(scale="predicted"), Normal(scale=0.3), Categorical(5)],
    ids=["Bernoulli", "learned", "learned per feature", "predicted", "known", "Categorical"],
)
def test_vae_with_every_likelihood(likelihood: Likelihood) -> None:
    model = VAE(4, latent=2, hidden=(8,), likelihood=likelihood)
    x = model.sample(9, torch.Generator().manual_seed(0))
    assert x.shape == model.sample(9, mean=True).shape == (9, 4)
    assert torch.equal(x, model.sample(9, torch.Generator().manual_seed(0)))
    density = model.decode(torch.zeros(9, 2))
    assert (density.batch_shape, density.event_shape) == ((9,), (4,))
    record = trace(model, x)
    record.compute_log_prob()
    assert record.nodes["x"]["log_prob"].shape == (9,)
    record.log_prob_sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert all(a is not b for a, b in zip(model.likelihood.parameters(), likelihood.parameters(), strict=True))


def test_categorical_pixels_sum_to_one_over_levels() -> None:
    model = VAE(2, latent=2, hidden=(8,), likelihood=Categorical(3))
    density = model.decode(torch.randn(7, 2))
    images = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    total = torch.stack([density.log_prob(image) for image in images]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(7), rtol=0, atol=1e-5)
    # pixel by pixel as well: outputs of different pixels do not mix
    single = density.base_dist.enumerate_support(expand=False).reshape(3, 1, 1)
    torch.testing.assert_close(density.base_dist.log_prob(single).logsumexp(0), torch.zeros(7, 2), rtol=0, atol=1e-5)


def test_draws_have_the_mean_that_the_likelihood_says() -> None:
    for likelihood in (Bernoulli(), Normal(scale=0.5), Normal(scale="predicted"), Categorical(4)):
        raw = torch.randn(3, likelihood.outputs or 1).expand(20_000, 3, -1)
        parts = likelihood.parts(raw)
        x = likelihood.draw(parts, torch.Generator().manual_seed(5)).double()
        error = x.std(0) / 20_000**0.5
        assert ((x.mean(0) - likelihood.mean(parts)[0]).abs() < 4.5 * error).all(), likelihood


def test_output_bias_gives_the_marginals() -> None:
    x = torch.bernoulli(torch.tensor([0.0, 0.3, 1.0]).expand(500, 3))
    model = VAE(3, latent=2, hidden=())
    model.initialise_output_bias(x)
    expected = x.mean(0).clamp(0.001, 0.999)
    torch.testing.assert_close(model.reconstruct(torch.zeros(3)[:2]), expected)

    y = torch.tensor([2.0, -1.0, 0.0]) + torch.tensor([0.5, 200.0, 1.0]) * torch.randn(500, 3)
    model = VAE(3, latent=2, hidden=(), likelihood=Normal(scale="predicted"))
    model.initialise_output_bias(y)
    density = model.decode(torch.zeros(2)).base_dist
    torch.testing.assert_close(density.loc, y.mean(0))
    torch.testing.assert_close(density.scale, y.std(0, correction=0), rtol=1e-4, atol=1e-4)

    levels = torch.randint(4, (500, 3))
    model = VAE(3, latent=2, hidden=(), likelihood=Categorical(4))
    model.initialise_output_bias(levels)
    frequency = (torch.nn.functional.one_hot(levels, 4).sum(0) + 1) / 504
    torch.testing.assert_close(model.decode(torch.zeros(2)).base_dist.probs, frequency)
    with pytest.raises(ModelError, match="at least one row"):
        model.initialise_output_bias(levels[:0])


def test_scales_keep_their_floor() -> None:
    predicted = Normal(scale="predicted", floor=0.01)
    assert predicted.parts(torch.tensor([[0.0, -200.0]]))["scale"].item() == pytest.approx(0.01)
    learned = Normal(floor=0.02)
    nn.init.constant_(learned.log_scale, -200.0)  # type: ignore[arg-type]
    assert learned.parts(torch.zeros(1, 1))["scale"].item() == pytest.approx(0.02)


# --- Bayesian neural networks ----------------------------------------------------------------------------------------


def test_bnn_sites_are_global_and_named_as_the_network() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    model = BNN(network, Normal())
    x, y = torch.randn(11, 3), torch.randn(11)
    sites = latents(model, x, y)
    wanted = {f"network.{name}": tuple(p.shape) for name, p in network.named_parameters()} | {"noise_scale": ()}
    assert {name: tuple(site["value"].shape) for name, site in sites.items()} == wanted
    assert all(site["cond_indep_stack"] == () for site in sites.values())
    assert not list(model.parameters())
    assert len(list(network.parameters())) == 4  # the user's network is as it was


def test_bnn_init_values_are_the_networks_own_weights() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    model = BNN(network, Normal())
    x = torch.randn(11, 3)
    values = model.init_values()
    assert set(values) == set(latents(model, x, torch.randn(11)))
    for name, parameter in network.named_parameters():
        assert torch.equal(values[f"network.{name}"], parameter)
    record = trace(model, x, **values)
    torch.testing.assert_close(record.nodes["_RETURN"]["value"]["loc"], network(x).squeeze(-1))
    assert values["noise_scale"] > 0
    values["network.0.weight"].zero_()
    assert model.init_values()["network.0.weight"].abs().sum() > 0  # the caller got copies


@pytest.mark.parametrize(
    ("likelihood", "outputs", "returns", "noise"),
    [
        (Normal(), 1, {"loc": (11,), "scale": ()}, True),
        (Normal(scale=dist.Gamma(6.0, 6.0)), 1, {"loc": (11,), "scale": ()}, True),
        (Normal(scale=dist.HalfCauchy(1.0)), 1, {"loc": (11,), "scale": ()}, True),
        (Normal(scale="predicted"), 2, {"loc": (11,), "scale": (11,)}, False),
        (Normal(scale=0.2), 1, {"loc": (11,), "scale": ()}, False),
        (Categorical(), 3, {"logits": (11, 3)}, False),
        (Categorical(3), 3, {"logits": (11, 3)}, False),
        (Bernoulli(), 1, {"logits": (11,)}, False),
    ],
    ids=["latent", "gamma", "cauchy", "predicted", "known", "classes", "3 classes", "binary"],
)
def test_bnn_likelihoods(
    likelihood: Likelihood, outputs: int, returns: dict[str, tuple[int, ...]], noise: bool
) -> None:
    model = BNN(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)), likelihood)
    x = torch.randn(11, 3)
    record = trace(model, x)  # draws y
    y, parts = record.nodes["y"]["value"], record.nodes["_RETURN"]["value"]
    assert y.shape == (11,)
    assert {name: tuple(value.shape) for name, value in parts.items()} == returns
    assert ("noise_scale" in record.nodes) == noise
    assert set(model.init_values()) == set(latents(model, x, y))
    assert all(torch.isfinite(value).all() for value in model.init_values().values())
    assert model.likelihood.distribution(parts).batch_shape == (11,)
    assert torch.isfinite(trace(model, x, y).log_prob_sum())


def test_bnn_density_by_hand() -> None:
    network = nn.Linear(2, 1)
    model = BNN(network, Normal(scale=0.5), prior=2.0).double()
    x, y = torch.randn(6, 2, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)
    values = {"network.weight": torch.randn(1, 2, dtype=DOUBLE), "network.bias": torch.randn(1, dtype=DOUBLE)}
    one = torch.ones((), dtype=DOUBLE)

    def log_normal(value: Tensor, loc: Tensor, scale: float) -> Tensor:
        return torch.distributions.Normal(loc, scale * one).log_prob(value).sum()

    mean = (x @ values["network.weight"].mT + values["network.bias"]).squeeze(-1)
    by_hand = log_normal(y, mean, 0.5) + sum(log_normal(v, 0 * v, 2.0) for v in values.values())
    torch.testing.assert_close(trace(model, x, y, **values).log_prob_sum(), by_hand, rtol=0, atol=1e-10)


def test_bnn_priors_by_weight() -> None:
    network = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 1))
    sites = latents(BNN(network, prior=fan_in_prior(2.0)), torch.randn(5, 16), torch.randn(5))
    assert sites["network.0.weight"]["fn"].base_dist.scale.unique().item() == pytest.approx(0.5)
    assert sites["network.2.bias"]["fn"].base_dist.scale.unique().item() == pytest.approx(2.0)
    seen: list[str] = []

    def laplace(name: str, weight: Tensor) -> Any:
        seen.append(name)
        return dist.Laplace(torch.zeros_like(weight), 1.0)

    BNN(network, prior=laplace)
    assert seen == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_bnn_takes_buffers_dropout_frozen_weights_and_convolutions() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(8, 3)
    )
    network[5].weight.requires_grad_(False)
    model = BNN(network, Categorical())
    x, y = torch.randn(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    sites = latents(model, x, y)
    assert set(sites) == {"network.0.weight", "network.1.weight", "network.1.bias", "network.5.bias"}
    assert torch.isfinite(trace(model, x, y).log_prob_sum())
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    assert torch.equal(model.network[5].weight, network[5].weight)


def test_bnn_starts_and_trains_from_init_values_under_stock_svi() -> None:
    model, batch = bnn.example()
    guide = AutoNormal(model, init_loc_fn=init_to_value(values=model.init_values()), init_scale=0.01)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = torch.tensor([svi.step(*batch) for _ in range(100)])
    assert torch.isfinite(losses).all() and losses[-10:].mean() < losses[:10].mean()


# --- messages --------------------------------------------------------------------------------------------------------


def two_linear(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, outputs))


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    return network


X, Y = torch.zeros(5, 3), torch.zeros(5)
WRONG: dict[str, tuple[Callable[[], Any], type[DGMError], str]] = {
    "vae width": (lambda: VAE(4)(X), ModelError, r"\(N, 4\), got \(5, 3\)"),
    "vae images": (lambda: VAE(9)(torch.zeros(5, 3, 3)), ModelError, "flatten"),
    "vae bias width": (lambda: VAE(4).initialise_output_bias(X), ModelError, r"\(N, 4\)"),
    "vae image shape": (lambda: VAE(9, image_shape=(2, 4)), OptionError, "9 pixels, got 8"),
    "vae size": (lambda: VAE(9, latent=0), OptionError, "positive"),
    "vae levels": (lambda: VAE(9, likelihood=Categorical()), ModelError, "Categorical.levels"),
    "vae prior": (lambda: VAE(9, likelihood=Normal(scale=dist.Gamma(1.0, 1.0))), ModelError, "belongs in a BNN"),
    "vae scales": (lambda: VAE(9, likelihood=Normal(features=3)), ModelError, "9 scales"),
    "deep width": (lambda: DeepLatentGaussian(4)(X), ModelError, r"\(N, 4\), got \(5, 3\)"),
    "deep layers": (lambda: DeepLatentGaussian(4, latents=()), OptionError, "at least one"),
    "linear width": (lambda: LinearVAE(4)(X), ModelError, r"\(N, 4\), got \(5, 3\)"),
    "linear evidence": (lambda: LinearVAE(4).log_evidence(X), ModelError, r"\(N, 4\)"),
    "linear size": (lambda: LinearVAE(4, 0), OptionError, "positive"),
    "linear scale": (lambda: LinearVAE.simulate(3, 4, scale=0.0), OptionError, "scale"),
    "bnn output": (lambda: BNN(two_linear(2))(X, Y), ModelError, r"\(N, 1\) for Normal.*got \(5, 2\)"),
    "bnn predicted": (lambda: BNN(two_linear(1), Normal(scale="predicted"))(X, Y), ModelError, r"\(N, 2\)"),
    "bnn classes": (lambda: BNN(two_linear(1), Categorical())(X, Y.long()), ModelError, "at least 2 classes"),
    "bnn rank": (lambda: BNN(nn.Sequential(two_linear(), nn.Flatten(0)))(X, Y), ModelError, r"got \(5,\)"),
    "bnn column": (lambda: BNN(two_linear())(X, Y[:, None]), ModelError, r"squeeze\(-1\)"),
    "bnn short y": (lambda: BNN(two_linear())(X, Y[:4]), ModelError, r"\(5,\), got \(4,\)"),
    "bnn empty": (lambda: BNN(nn.ReLU()), ModelError, "at least one trainable"),
    "bnn lazy": (lambda: BNN(nn.LazyLinear(1)), ModelError, "no shape yet"),
    "bnn tied": (lambda: BNN(tied()), ModelError, "same tensor as '0.weight'"),
    "bnn prior": (lambda: BNN(two_linear(), prior=0.0), OptionError, "prior scale 0.0"),
    "bnn prior shape": (
        lambda: BNN(two_linear(), prior=lambda name, w: dist.Normal(0.0, 1.0)),
        ModelError,
        "network.0.weight.*expand",
    ),
    "bnn prior type": (
        lambda: BNN(two_linear(), prior=lambda name, w: torch.distributions.Normal(w, 1.0)),
        ModelError,
        "expected a distribution of pyro.distributions",
    ),
    "bnn scales": (lambda: BNN(two_linear(), Normal(features=2)), ModelError, "one noise scale"),
    "regression width": (lambda: BayesianLinearRegression(4)(X, Y), ModelError, r"\(N, 4\), got \(5, 3\)"),
    "regression column": (lambda: BayesianLinearRegression(3)(X, Y[:, None]), ModelError, r"squeeze\(-1\)"),
    "regression noise": (lambda: BayesianLinearRegression(3, noise=-1.0), OptionError, "noise=-1.0"),
    "regression size": (lambda: BayesianLinearRegression(0), OptionError, "features=0"),
    "normal scale": (lambda: Normal(scale=-1.0), OptionError, "scale=-1.0"),
    "normal word": (lambda: Normal(scale="learnt"), OptionError, '"learned", "predicted"'),
    "normal floor": (lambda: Normal(floor=-1.0), OptionError, "floor"),
    "normal features": (lambda: Normal(features=0), OptionError, "features"),
    "normal prior": (lambda: Normal(scale=dist.Normal(0.0, 1.0)), OptionError, "positive numbers"),
    "categorical levels": (lambda: Categorical(1), OptionError, "at least 2"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_wrong_shapes_and_options_are_named(case: str) -> None:
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        make()
