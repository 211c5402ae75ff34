"""Guides that look at the model: exact posteriors, weights whose mean is the evidence, bounds, tracing, refusals."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dgm
from dgm.errors import GuideError, OptionError
from dgm.guides.amortized import Amortized
from dgm.guides.auxiliary import Auxiliary
from dgm.guides.encoders import linear, mlp
from dgm.guides.full_normal import FullNormal
from dgm.guides.hamiltonian import HamiltonianAnnealing
from dgm.guides.joint import Joint
from dgm.guides.point import Point
from dgm.guides.semi_amortized import SemiAmortized
from dgm.guides.top_down import TopDown
from dgm.inside import log_joint
from dgm.models import deep_latent_gaussian, hierarchical_vae, linear_vae, vae
from dgm.models.hierarchical_vae import HierarchicalVAE
from dgm.models.likelihoods import Normal
from dgm.models.linear_vae import LinearVAE
from dgm.models.vae import VAE
from dgm.pair import Minibatch, Pair
from dgm.programs import isolated, owner, preserved_rng
from dgm.starting import start_pair
from dgm.testing import ContractError, check_exact, check_model, check_pair

GUIDES: dict[str, Callable[..., Any]] = {
    "top-down": TopDown,
    "auxiliary": partial(Auxiliary, features_aux=2),
    "semi-amortized": partial(SemiAmortized, steps=1),
    "hamiltonian": partial(HamiltonianAnnealing, steps=2, step_size=0.3),
}
EXAMPLES = {m.__name__.rsplit(".", 1)[-1]: m.example for m in (vae, linear_vae, deep_latent_gaussian, hierarchical_vae)}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def linear_truth(scale: float = 0.8) -> tuple[LinearVAE, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return LinearVAE.simulate(8, 4, 2, scale=scale, generator=generator, dtype=torch.float64)


def stirred(guide: nn.Module, size: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(size * torch.randn_like(p))
    return guide


def relative_weight(model: Any, guide: Any, x: Tensor, draws: int = 4000) -> tuple[float, float]:
    """E[w] / p(x) - 1, and the ELBO's distance from the evidence, both in standard errors."""
    lw = (dgm.log_weights(model, guide, x, num_samples=draws, seed=1) - model.log_evidence(x)).detach()  # (S, B)
    return in_errors(lw.exp().mean(1) - 1), in_errors(lw.mean(1))


def in_errors(values: Tensor) -> float:
    return float(values.mean() / values.std()) * math.sqrt(len(values))


# --- the model inside a guide ----------------------------------------------------------------------------------------


def test_log_joint_is_the_rows_density_and_nobody_sees_it(double: None) -> None:
    model, x = linear_truth()
    z = torch.randn(8, 2, dtype=torch.float64)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + model.decode(z).log_prob(x)
    with isolated(validate=False), Minibatch({"data": 800}, 0.5), poutine.trace() as seen:
        rows = log_joint(model, [x], {"z": z}, "data")
    assert torch.allclose(rows, expected) and not [n for n, s in seen.trace.nodes.items() if s["type"] == "sample"]

    def declared(x: Tensor) -> None:
        with pyro.plate("data", 80, subsample=torch.arange(len(x))):
            model_z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", model.decode(model_z), obs=x)

    with isolated(validate=False):
        assert torch.allclose(log_joint(declared, [x], {"z": z}, "data"), expected)
    with isolated(), pytest.raises(GuideError, match="latent 'z' of LinearVAE has no value"):
        log_joint(model, [x], {}, "data")


def test_log_joint_under_nested_gradients_vmap_and_tracing() -> None:
    model, x = linear_truth()
    z = torch.randn(3, 8, 2, dtype=torch.float64)

    def loss(p: dict[str, Tensor], z: Tensor) -> Tensor:
        slope = torch.func.grad(lambda v: log_joint(holder.model, [x], {"z": v}, "data").sum())  # type: ignore[arg-type]
        return torch.func.functional_call(holder, p, (lambda: slope(z).square().sum(),))

    holder = Pair(model, lambda x: None).owners
    step = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0))
    with isolated(validate=False):
        parameters = {n: p.detach() for n, p in holder.named_parameters()}
        gradients, values = step(parameters, z)
        _, traced = make_fx(step)(parameters, z)(parameters, z)
    residual = (x - model.loc - z @ model.weight.mT) / (2 * model.log_scale).exp()
    exact = (residual @ model.weight - z).square().sum((1, 2))
    assert torch.allclose(values, exact) and torch.allclose(traced, exact)
    expected = torch.autograd.grad(exact.sum(), model.weight)[0]
    assert torch.allclose(gradients["model.weight"].sum(0), expected)


def parametric(x: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor([1.0, -1.0]))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * slope, scale).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["top-down", "semi-amortized", "hamiltonian"])
def test_a_function_model_keeps_its_parameters(name: str) -> None:
    x = torch.randn(6, 2)
    guide = GUIDES[name](parametric, x, encoder=mlp(4))
    check_pair(parametric, guide, x, steps=3, compile=False if name == "hamiltonian" else "trace")
    pair = Pair(parametric, guide)
    pair.check([x])
    held = [n for n in pair.parameters() if "pyro_parameters" in n]
    assert held == ["model.pyro_parameters.slope", "model.pyro_parameters.scale"]


# --- every guide, every model ----------------------------------------------------------------------------------------


SLOW = list(itertools.product(["deep_latent_gaussian", "hierarchical_vae"], ["semi-amortized", "hamiltonian"]))
PAIRS = [
    pytest.param(m, g, marks=[pytest.mark.slow] if (m, g) in SLOW else [])
    for m, g in itertools.product(EXAMPLES, GUIDES)
]


@pytest.mark.parametrize(("model", "guide"), PAIRS)
def test_pair(model: str, guide: str, caplog: pytest.LogCaptureFixture) -> None:
    program, batch = EXAMPLES[model]()
    q = GUIDES[guide](program, *batch, encoder=mlp(8))
    evidence = program.log_evidence(*batch).detach() if hasattr(program, "log_evidence") else None
    check_pair(program, q, *batch, steps=3, log_evidence=evidence)
    assert "stays eager" not in caplog.text


def mixed(x: Tensor) -> None:
    """A global scale, and local latents on the reals and on the positive numbers."""
    s = pyro.sample("s", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), s).to_event(1))
        r = pyro.sample("r", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * r.unsqueeze(-1), s).to_event(1), obs=x)


def shared_scale(x: Tensor) -> None:
    s = pyro.sample("s", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0 + s).to_event(1))
        pyro.sample("x", dist.Normal(z, s).to_event(1), obs=x)


@pytest.mark.parametrize("name", GUIDES)
def test_beside_a_guide_for_the_global_latents(name: str) -> None:
    model = shared_scale if name == "top-down" else mixed
    x = torch.randn(6, 2)
    guide = Joint(model, x, local=partial(GUIDES[name], encoder=mlp(4)))
    check_pair(model, guide, x, steps=3, compile=False if name in ("auxiliary", "hamiltonian") else "trace")


@pytest.mark.parametrize("name", ["hamiltonian", "top-down"])
def test_replicas_are_single_runs(name: str) -> None:
    bits = (torch.rand(20, 6) < 0.4).float()
    told = {"encoder": mlp(8)} | ({"steps": 1} if name == "hamiltonian" else {})  # a short graph
    make, guide = lambda: VAE(6, latent=2, hidden=(8,)), lambda m, *b: GUIDES[name](m, *b, **told)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 10}
    fits = dgm.fit(make, guide, bits, replicas=2, compile="trace", **options)
    assert fits[1].engine.startswith("trace")
    single = dgm.fit(*start_pair(make, guide, 1, (bits,)), bits, seed=1, compile=False, **options)
    assert fits[1].history["elbo"].to_numpy() == pytest.approx(single.history["elbo"].to_numpy(), rel=2e-5)
    mine, theirs = (dict(owner(fit.guide).named_parameters()) for fit in (fits[1], single))  # type: ignore[union-attr]
    assert all(torch.allclose(value, theirs[parameter], atol=2e-5) for parameter, value in mine.items())


@pytest.mark.parametrize("name", GUIDES)
def test_particles_of_a_plate_are_draws_of_their_own(name: str, double: None) -> None:
    model, x = linear_truth()
    guide = GUIDES[name](model, x, encoder=mlp(4))
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    with isolated():
        (trace,) = [guide_trace for _, guide_trace in loss._get_traces(model, guide, (x,), {})]
        z = trace.nodes["z"]["value"]  # (64, B, 2)
        assert z.shape == (64, 8, 2) and len(z.detach()[:, 0, 0].unique()) == 64
        bound = -float(loss.loss(model, guide, x)) / 8
    lw = dgm.log_weights(model, guide, x, num_samples=400).detach().mean(1)
    assert abs(bound - float(lw.mean())) < 4.5 * float(lw.std()) * math.sqrt(1 / 64 + 1 / 400)


@pytest.mark.parametrize("name", GUIDES)
def test_state_and_copies(name: str) -> None:
    model, (x,) = vae.example()
    guide = stirred(GUIDES[name](model, x, encoder=mlp(8)))
    assert not [n for n in guide.state_dict() if "decoder" in n or n.startswith("model")]
    other = GUIDES[name](model, x, encoder=mlp(8))
    assert not torch.equal(dgm.log_weights(model, guide, x), dgm.log_weights(model, other, x))
    other.load_state_dict(guide.state_dict())
    before = dgm.log_weights(model, guide, x)
    assert torch.equal(before, dgm.log_weights(model, other, x))
    twin_model, twin = copy.deepcopy((model, guide))
    assert torch.equal(before, dgm.log_weights(twin_model, twin, x))
    dgm.SVI(twin_model, twin, partial(torch.optim.Adam, lr=0.1), compile=False).step(x)
    assert not torch.equal(before, dgm.log_weights(twin_model, twin, x))
    assert torch.equal(before, dgm.log_weights(model, guide, x))


def test_evaluations_are_what_the_model_is_run() -> None:
    x, calls = torch.randn(6, 2), []

    def counted(x: Tensor) -> None:
        calls.append(1)
        parametric(x)

    for make in (partial(SemiAmortized, steps=3), partial(HamiltonianAnnealing, steps=3)):
        guide = make(counted, x, encoder=mlp(4))
        calls.clear()
        Pair(counted, guide).loss(None, [x])
        assert len(calls) == guide.evaluations_per_step


# --- top-down --------------------------------------------------------------------------------------------------------


def orthogonal(features: int, latent: int) -> Tensor:
    return torch.linalg.qr(torch.randn(features, latent, dtype=torch.float64))[0] * torch.tensor(
        [2.0, 0.7], dtype=torch.float64
    )


def tell(guide: TopDown, place: int, matrix: Tensor, shift: Tensor, scale: Tensor, raised: float = 0.0) -> None:
    """Set the heads of a site: mu^ = matrix (x - shift), sigma^ = scale, through standardised (and raised) features."""
    with torch.no_grad():
        seen, log_scale = guide.seen[place], guide.log_scale[place]
        features = guide.features
        weight = matrix * features.scale
        seen.weight.copy_(weight)
        seen.bias.copy_(matrix @ (features.shift - shift) - raised * weight.sum(-1))
        log_scale.weight.zero_()
        log_scale.bias.copy_(scale.log())


def test_top_down_at_the_likelihood_is_the_posterior(double: None) -> None:
    model, x = linear_truth()
    with torch.no_grad():
        model.weight.copy_(orthogonal(4, 2))
        model.loc.add_(0.5)
    guide = TopDown(model, x, encoder=linear())
    norms = model.weight.detach().square().sum(0).sqrt()
    tell(guide, 0, model.weight.detach().mT / norms[:, None] ** 2, model.loc.detach(), model.log_scale.exp() / norms)
    check_exact(model, guide, x, log_evidence=model.log_evidence(x), tolerance=1e-9)
    with torch.no_grad():
        guide.log_scale[0].bias.add_(0.01)
    with pytest.raises(ContractError, match="the log weight is"):
        check_exact(model, guide, x, log_evidence=model.log_evidence(x), tolerance=1e-4)


def test_top_down_of_two_layers_is_the_posterior_of_the_chain(double: None) -> None:
    """z_2 ~ N(0, I), z_1 ~ N(a z_2 + c, 1), x ~ N(W z_1 + b, s^2): normal, with both factors diagonal."""
    s = torch.tensor(0.6)
    model = HierarchicalVAE(4, latents=(2, 2), hidden=(), likelihood=Normal(0.6))
    a, c = torch.tensor([1.5, -0.4]).double(), torch.tensor([0.3, -0.2])
    with torch.no_grad():
        prior, decoder = model.priors[0][0], model.decoder[0]
        prior.weight.zero_()
        prior.weight[:2] = a.diag()
        prior.bias.copy_(torch.cat([c, torch.zeros(2)]))
        decoder.weight.copy_(orthogonal(4, 2))
    w, b = decoder.weight.detach(), decoder.bias.detach()
    x = model.sample(30)
    noise = s.square() * torch.eye(4)
    covariance = w @ (a.square() + 1).diag() @ w.mT + noise
    evidence = dist.MultivariateNormal(b + w @ c, covariance).log_prob(x)
    guide = TopDown(model, x, encoder=linear())
    norms = w.square().sum(0).sqrt()
    inverse = w.mT / norms[:, None] ** 2  # z_1 as the data see it
    with torch.no_grad():
        guide.up[0][0].weight.copy_(torch.eye(4))
        guide.up[0][0].bias.fill_(100.0)  # high above the kink
    tell(guide, 1, inverse, b, s / norms)
    wide = (1 + (s / norms).square()).sqrt() / a.abs()
    tell(guide, 0, inverse / a[:, None], b + w @ c, wide, raised=100.0)
    check_exact(model, guide, x, log_evidence=evidence, tolerance=1e-9)


def test_top_down_that_sees_nothing_is_the_prior() -> None:
    model, (x,) = hierarchical_vae.example()
    guide = TopDown(model, x, encoder=mlp(8))
    with torch.no_grad():
        for head in guide.log_scale:
            head.bias.fill_(math.inf)
    with isolated():
        trace = poutine.trace(guide).get_trace(x)
    z_2, z_1 = trace.nodes["z_2"], trace.nodes["z_1"]
    assert [n for n in trace.stochastic_nodes if n != "data"] == ["z_2", "z_1"]
    prior = model.prior("z_1", z_2["value"])
    assert torch.equal(z_2["fn"].base_dist.loc, torch.zeros(20, 2)) and torch.allclose(z_2["fn"].stddev, torch.ones(2))
    assert torch.allclose(z_1["fn"].mean, prior.mean) and torch.allclose(z_1["fn"].stddev, prior.stddev)


# --- weights whose mean is the evidence ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_the_mean_weight_is_the_evidence(name: str, double: None) -> None:
    model, x = linear_truth()
    guide = stirred(GUIDES[name](model, x, encoder=mlp(8)).double())
    off, gap = relative_weight(model, guide, x)
    assert abs(off) < 4.5
    assert gap < -4.5, "no exact posterior: the ELBO lies below the evidence"


class NoRatio(HamiltonianAnnealing):
    """Forgets the momenta."""

    def anneal(self, *args: Any) -> tuple[Tensor, Tensor]:
        v, ratio = super().anneal(*args)
        return v, torch.zeros_like(ratio)


class Unit:
    """A reverse density that is one everywhere."""

    def log_prob(self, a: Tensor) -> Tensor:
        return torch.zeros_like(a[..., 0])


def no_reverse(model: Any, x: Tensor) -> Auxiliary:
    guide = Auxiliary(model, x, encoder=mlp(8))
    guide.reverse.forward = lambda context: Unit()
    return guide


@pytest.mark.parametrize("mutant", [partial(NoRatio, steps=4, step_size=0.4, encoder=mlp(8)), no_reverse])
def test_the_mean_weight_sees_a_term_that_is_missing(mutant: Callable[..., Any], double: None) -> None:
    model, x = linear_truth()
    assert abs(relative_weight(model, mutant(model, x), x)[0]) > 4.5


# --- semi-amortized --------------------------------------------------------------------------------------------------


def test_a_step_is_the_gradient_of_the_local_elbo(double: None) -> None:
    model, x = linear_truth()
    guide = SemiAmortized(model, x, encoder=mlp(4), steps=1, step_size=0.2, clip=1e6)
    with torch.no_grad():
        guide.log_step[1] = math.log(0.1)
    loc, log_scale = torch.randn(8, 2).double(), 0.1 * torch.randn(8, 2)
    with preserved_rng(3):
        eps = torch.randn(1, 8, 2, dtype=torch.float64)[0]
    with preserved_rng(3), isolated():
        new_loc, new_log_scale = guide.refine(loc, log_scale, (x,))
    u = loc + log_scale.exp() * eps
    slope = (x - model.loc) @ model.weight / (2 * model.log_scale).exp() - u @ model.precision()
    assert torch.allclose(new_loc, loc + 0.2 * slope)
    assert torch.allclose(new_log_scale, log_scale + 0.1 * (slope * log_scale.exp() * eps + 1))
    guide.clip = 0.5
    with torch.no_grad():
        guide.log_step.zero_()
    with isolated():
        moved = torch.cat(guide.refine(loc + 100, log_scale, (x,)), -1) - torch.cat([loc + 100, log_scale], -1)
    assert torch.allclose(moved.norm(dim=-1), torch.tensor(0.5).double())


def test_refinement_beats_its_own_encoder(double: None) -> None:
    model, x = linear_truth()
    guide = SemiAmortized(model, x, encoder=mlp(8), steps=20, step_size=0.05)
    plain = Amortized(model, x, encoder=mlp(8))
    with torch.no_grad():
        guide.family.loc.bias.add_(2.0)
    plain.load_state_dict({n: v for n, v in guide.state_dict().items() if n != "log_step"})
    bounds = [dgm.log_weights(model, q, x, num_samples=200).detach().mean(1) for q in (guide, plain)]
    gain = bounds[0] - bounds[1]
    assert float(gain.mean()) > 1.0 and in_errors(gain) > 4.5


def test_first_order_steps_have_the_value_and_another_gradient() -> None:
    model, (x,) = vae.example()
    guide = SemiAmortized(model, x, encoder=mlp(8), steps=2)
    found = []
    for second_order in (True, False):
        guide.second_order = second_order
        pair = Pair(model, guide)
        with preserved_rng(0):
            loss = pair.loss(None, [x])
        found.append((loss, torch.autograd.grad(loss, guide.family.loc.weight)[0]))
    assert torch.equal(found[0][0], found[1][0]) and not torch.allclose(found[0][1], found[1][1], rtol=1e-2)


# --- Hamiltonian annealing -------------------------------------------------------------------------------------------


def test_without_steps_to_speak_of_it_is_the_encoder(double: None) -> None:
    model, x = linear_truth()
    guide = HamiltonianAnnealing(model, x, encoder=mlp(8), steps=3, step_size=1e-12, damping=1 - 1e-12)
    plain = Amortized(model, x, encoder=mlp(8))
    plain.load_state_dict({n: v for n, v in guide.state_dict().items() if n.startswith(("encoder", "family", "feat"))})
    mine, theirs = (dgm.log_weights(model, q, x, num_samples=5) for q in (guide, plain))
    assert torch.allclose(mine, theirs, atol=1e-8)


def test_the_bound_rises_with_the_steps(double: None) -> None:
    model, x = linear_truth()
    bounds = []
    for steps in (1, 4, 16):
        with preserved_rng(0):
            guide = HamiltonianAnnealing(model, x, encoder=mlp(8), steps=steps, step_size=0.3)
        bounds.append(dgm.log_weights(model, guide, x, num_samples=500).detach().mean(1))
    for less, more in itertools.pairwise(bounds):
        assert in_errors(more - less) > 4.5


# --- bad input -------------------------------------------------------------------------------------------------------


def two(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)


X = torch.randn(6, 2)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    *((lambda g=g: g(mixed, X), GuideError, "latent 's' is global.*use Joint") for g in GUIDES.values()),
    (lambda: TopDown(mixed, X, sites=["z", "r"]), GuideError, "prior of 'r' is LogNormal on positive: use Amortized"),
    (lambda: TopDown(mixed, X, sites=["z"]), GuideError, "does not serve 'r'.*plate 'data'"),
    (lambda: SemiAmortized(two, X[:, 0], sites=["z"]), GuideError, "does not serve 'k'.*discrete"),
    (lambda: HamiltonianAnnealing(mixed, X, sites=["z", "r"])(X), GuideError, "latent 's'.*has no value.*Joint"),
    (lambda: TopDown(shared_scale, X, sites=["z"])(X), GuideError, "latent 's'.*has no value.*Joint"),
    (lambda: SemiAmortized(parametric, X, steps=0), OptionError, "steps must be at least 1, got 0"),
    (
        lambda: SemiAmortized(parametric, X, step_size=-1.0),
        OptionError,
        "step_size must be positive and finite, got -1.0",
    ),
    (lambda: HamiltonianAnnealing(parametric, X, steps=0), OptionError, "steps must be at least 1, got 0"),
    (lambda: HamiltonianAnnealing(parametric, X, damping=1.0), OptionError, "damping is 1.0"),
    (lambda: Auxiliary(parametric, X, features_aux=0), OptionError, "features_aux must be at least 1, got 0"),
    (lambda: Auxiliary(parametric, X, family=Point), GuideError, "Point has no density"),
    (lambda: HierarchicalVAE(4, latents=()), OptionError, "at least one stochastic layer"),
    *(
        (lambda g=g: g(parametric, X, encoder=nn.Flatten(0)), GuideError, "expected .*one vector for each row")
        for g in GUIDES.values()
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_refused_by_name(case: int) -> None:
    make, error, message = BAD[case]
    with isolated(), pytest.raises(error, match=message):
        make()


def test_the_hierarchical_model_and_richer_families() -> None:
    model, batch = hierarchical_vae.example()
    assert list(check_model(model, *batch)) == ["z_2", "z_1"]
    check_pair(model, Auxiliary(model, *batch, family=FullNormal, encoder=mlp(8)), *batch, steps=3)
