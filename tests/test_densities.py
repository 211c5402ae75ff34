"""Student t, mixtures, planar, radial, Sylvester and affine coupling flows: their own laws, and where they win."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import Normal, StudentT
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import dgm
from dgm.distributions import sample_and_log_prob
from dgm.errors import OptionError
from dgm.guides import mixture, student_t
from dgm.guides.coupling_affine_flow import CouplingAffineFlow
from dgm.guides.coupling_spline_flow import CouplingSplineFlow
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import mlp
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.guides.mixture import Mixture, NormalMixture
from dgm.guides.monotone import above_minus_one, solve
from dgm.guides.planar_flow import PlanarFlow
from dgm.guides.radial_flow import RadialFlow
from dgm.guides.student_t import PolarStudentT
from dgm.guides.student_t import StudentT as StudentFamily
from dgm.guides.sylvester_flow import SylvesterFlow
from dgm.models import bayesian_linear_regression, linear_vae
from dgm.noise import recording, replaying
from dgm.starting import start_pair
from dgm.testing import check_family, check_pair

Make = Callable[..., nn.Module]

FLOWS: dict[str, Make] = {
    "planar": partial(PlanarFlow, transforms=3),
    "radial": partial(RadialFlow, transforms=3),
    "sylvester": partial(SylvesterFlow, transforms=2, reflections=2),
    "affine": partial(CouplingAffineFlow, hidden=(8,)),
}
OURS: dict[str, Make] = FLOWS | {
    "student": StudentFamily,
    "mixture": Mixture,
    "learned": partial(Mixture, components=3, weights="learned"),
}
SIGMAS = 4.5


def pytest_generate_tests(metafunc: Any) -> None:
    for argument, makers in {"flow": FLOWS, "ours": OURS}.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, makers.values(), ids=list(makers))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def perturbed(family: nn.Module, size: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for p in family.parameters():
            p.add_(size * torch.randn_like(p))
    return family


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        partial(Mixture, weights="learned"),
        partial(Mixture, components=1, weights="learned"),
        partial(SylvesterFlow, columns=1, reflections=1),
        partial(PlanarFlow, transforms=1),
    ],
)
def test_variants_that_the_registry_does_not_run(variant: Make) -> None:
    check_family(variant, features=(1, 2, 4))


def test_learned_weights_in_a_pair() -> None:
    model, batch = linear_vae.example()
    guide = Joint(model, *batch, family=partial(Mixture, weights="learned"), encoder=mlp(16))
    check_pair(model, guide, *batch, log_evidence=model.log_evidence(*batch).detach())


@pytest.mark.parametrize("features", [1, 2])
def test_density_integrates_to_one(ours: Make, features: int) -> None:
    family = perturbed(ours(features, scale=1.0)).double()
    axis = torch.linspace(-12, 12, 161 if features == 2 else 4001).double()
    x = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    with torch.no_grad():
        total = float(family().log_prob(x).exp().sum() * (axis[1] - axis[0]) ** features)
    assert total == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("context", [0, 3])
def test_traced_and_stacked_gradients_are_the_eager_ones(ours: Make, context: int) -> None:
    family = perturbed(ours(3, context)).double()
    condition = (torch.randn(5, 3).double(),) if context else ()

    def loss(parameters: dict[str, Tensor], noise: list[Tensor]) -> Tensor:
        with replaying(noise):
            x, log_q = sample_and_log_prob(functional_call(family, parameters, condition))
        return (log_q + 0.5 * (x - 1).square().sum(-1)).mean()

    with recording() as draws:
        sample_and_log_prob(family(*condition))
    assert draws.complete and {draw.kind for draw in draws} <= {"normal", "uniform"}
    first, second = values(family), values(perturbed(copy.deepcopy(family), 0.1))
    noise = draws.sample_many(2)
    traced = make_fx(grad(loss))(first, [eps[0] for eps in noise])
    stacked = vmap(grad(loss))({k: torch.stack([first[k], second[k]]) for k in first}, noise)
    for k, parameters in enumerate([first, second]):
        own = [eps[k] for eps in noise]
        eager = grad(loss)(parameters, own)
        for name, g in traced(parameters, own).items():
            assert torch.allclose(g, eager[name], rtol=1e-8, atol=1e-8), name
            assert torch.allclose(stacked[name][k], eager[name], rtol=1e-8, atol=1e-8), name


@pytest.mark.slow
def test_a_replica_is_the_single_run_with_its_seed(ours: Make, caplog: pytest.LogCaptureFixture) -> None:
    _, batch = bayesian_linear_regression.example()
    guide = partial(Global, family=ours)

    def make() -> nn.Module:
        return bayesian_linear_regression.example()[0]

    fits = dgm.fit(make, guide, *batch, epochs=2, batch_size=10, lr=1e-2, replicas=2, compile="trace")
    assert "one after another" not in caplog.text
    for k, fit in enumerate(fits):
        single = dgm.fit(
            *start_pair(make, guide, k, batch), *batch, epochs=2, batch_size=10, lr=1e-2, seed=k, compile=False
        )
        assert fit.history["elbo"].to_numpy() == pytest.approx(single.history["elbo"].to_numpy(), rel=2e-5)


def test_state_dict_and_copies(ours: Make) -> None:
    family, other = perturbed(ours(4, 3)), ours(4, 3)
    c, x = torch.randn(5, 3), torch.randn(6, 5, 4)
    before = family(c).log_prob(x)
    other.load_state_dict(family.state_dict())
    assert torch.equal(other(c).log_prob(x), before)
    twin = perturbed(copy.deepcopy(family), 1.0)
    assert torch.equal(family(c).log_prob(x), before) and not torch.allclose(twin(c).log_prob(x), before)


def test_draws_expand_over_plates(ours: Make) -> None:
    family = perturbed(ours(4, 3))
    q = family(torch.randn(5, 3)).expand((6, 5))
    x, log_q = sample_and_log_prob(q, torch.Size((2,)))
    assert x.shape == (2, 6, 5, 4) and log_q.shape == (2, 6, 5)
    assert (x[:, 1:] != x[:, :1]).any(), "the draws of a wider batch are its own"


# --- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("context", [0, 3])
def test_flows_start_as_the_diagonal_normal_and_leave_it(flow: Make, context: int, features: int) -> None:
    family, diagonal = flow(features, context), DiagonalNormal(features, context)
    diagonal.load_state_dict({k: v for k, v in family.state_dict().items() if k in diagonal.state_dict()})
    c = torch.randn(7, 3) if context else None
    x = diagonal(c).sample((4,))
    assert torch.allclose(family(c).log_prob(x), diagonal(c).log_prob(x), atol=1e-4)
    optimiser = torch.optim.Adam(family.parameters(), lr=1e-2)
    for _ in range(4):
        optimiser.zero_grad()
        x, log_q = sample_and_log_prob(family(c), torch.Size((32,)))
        (log_q + x.square().sum(-1) + x.sum(-1).cos()).mean().backward()
        optimiser.step()
    for name, p in family.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("scale", [0.25, torch.tensor([1e3, 0.5, 2.0])])
def test_initialise(ours: Make, scale: Any) -> None:
    family, loc = ours(3), torch.tensor([20_000.0, 0.0, -3.0])
    family.initialise(loc, scale)  # type: ignore[operator]
    x = family().sample((4000,))
    assert ((x.mean(0) - loc).abs() < SIGMAS * torch.as_tensor(scale) / math.sqrt(4000)).all()
    assert (x.std(0) / scale - 1).abs().max() < SIGMAS / math.sqrt(4000)


def test_components_start_apart_with_the_moments_of_the_diagonal_start() -> None:
    for components in (1, 2, 7):
        q = Mixture(5, components=components, scale=0.3)()
        assert torch.allclose(q.mean, torch.zeros(5), atol=1e-6)
        assert torch.allclose(q.variance, torch.full((5,), 0.09), atol=1e-6)
        assert components == 1 or q.loc.std(0).min() > 0.1


# --- inverses --------------------------------------------------------------------------------------------------------


def test_solve_is_the_inverse_with_its_gradients() -> None:
    shift, slope = torch.randn(200).double(), torch.rand(200).double() * 3
    gain = above_minus_one(20 * torch.randn(200).double()) / slope
    x = 5 * torch.randn(200).double()
    value = x + gain * torch.tanh(slope * x + shift)
    found = solve(value, gain, slope, shift)
    assert torch.allclose(found + gain * torch.tanh(slope * found + shift), value, atol=1e-10)
    assert torch.allclose(found, x, atol=1e-6)
    arguments = [t[:4].clone().requires_grad_() for t in (value, gain.clamp(-0.2, 3), slope, shift)]
    assert gradcheck(solve, arguments)


def test_constraint_keeps_zero_and_a_slope() -> None:
    m = above_minus_one(torch.tensor([-1e6, 0.0, 3.0]))
    assert m[0] > -1 and m[1].abs() < 1e-6 and m[2] > 0


def test_log_determinants_are_those_of_the_jacobian(flow: Make) -> None:
    family = perturbed(flow(4)).double()
    q, u = family(), torch.randn(4).double()
    jacobian = jacrev(lambda e: q.push(e)[0])(u)
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], q.push(u)[1])
    assert torch.allclose(q.pull(q.push(u)[0])[0], u)


@pytest.mark.parametrize("size", [3.0, 30.0])
def test_steps_stay_invertible_at_wild_parameters(flow: Make, size: float) -> None:
    family = flow(3).double()
    for step in family.steps:  # type: ignore[union-attr]
        push, pull = perturbed(step, size if flow is not FLOWS["affine"] else 3.0)(None)
        u = torch.randn(500, 3).double()
        x, log_det = push(u)
        back, again = pull(x)
        assert log_det.isfinite().all()
        assert torch.allclose(push(back)[0], x, rtol=1e-6, atol=1e-6)
        assert torch.allclose(back, u, atol=1e-4) and torch.allclose(again, log_det, atol=1e-3)


def test_log_prob_has_the_right_gradient_in_value_and_parameters(ours: Make) -> None:
    if ours is FLOWS["affine"]:
        ours = partial(CouplingAffineFlow, transforms=2, hidden=(2,))
    family = perturbed(ours(2, scale=1.0)).double()
    names, held = zip(*family.named_parameters(), strict=True)

    def log_prob(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(family, dict(zip(names, parameters, strict=True)), ()).log_prob(x)

    assert gradcheck(log_prob, (torch.randn(2, 2).double().requires_grad_(), *held))


# --- pathwise gradients against quadrature ---------------------------------------------------------------------------


def z_scores(make: Callable[[dict[str, Tensor]], Any], at: dict[str, Tensor], f: Any, exact: dict[str, Tensor]) -> Any:
    """Standard errors between the mean of 100 gradients of 400 draws and the exact one, for each parameter."""
    theta = {k: v.clone().requires_grad_() for k, v in at.items()}
    found: dict[str, list[Tensor]] = {k: [] for k in theta}
    for _ in range(100):
        q = make(theta)
        x = q.rsample((400,))
        gradients = torch.autograd.grad(f(q, x).mean(), list(theta.values()), allow_unused=True)
        for (k, v), g in zip(theta.items(), gradients, strict=True):
            found[k].append(torch.zeros_like(v) if g is None else g)
    scores = {}
    for k, gs in found.items():
        g = torch.stack(gs)
        scores[k] = float(((g.mean(0) - exact[k]).abs() / (g.std(0) / 10 + 1e-9)).max())
    return scores


def by_quadrature(make: Callable[[dict[str, Tensor]], Any], at: dict[str, Tensor], f: Any, x: Tensor, w: Any) -> Any:
    """Gradient of sum_i w_i q(x_i) f(q, x_i)."""

    def mean(theta: dict[str, Tensor]) -> Tensor:
        q = make(theta)
        return (w * q.log_prob(x).exp() * f(q, x)).sum()

    return grad(mean)(at)


def free_energy(q: Any, x: Tensor) -> Tensor:
    """log q - log p with a target whose coordinates depend on each other."""
    return q.log_prob(x) + 0.5 * (x - 0.5).square().sum(-1) + (2 * x.sum(-1)).sin()


@pytest.mark.parametrize("weights", ["uniform", "learned", "no implicit term"])
@pytest.mark.parametrize("features", [1, 2])
def test_mixture_gradients(features: int, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {
        "loc": torch.tensor([[-1.2, 0.4], [0.8, -0.9], [0.1, 1.5]]).double()[:, :features],
        "log_scale": torch.tensor([[-0.4, 0.1], [0.2, -0.3], [-0.7, -0.2]]).double()[:, :features],
    }
    if weights != "uniform":
        at["logits"] = torch.tensor([0.3, -0.5, 0.0]).double()
    axis = torch.linspace(-9, 9, 241).double()
    grid = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    exact = by_quadrature(lambda t: NormalMixture(**t), at, free_energy, grid, float(axis[1] - axis[0]) ** features)
    if weights == "no implicit term":
        monkeypatch.setattr(mixture, "implicit", lambda z, *_: torch.zeros_like(z))
    scores = z_scores(lambda t: NormalMixture(**t), at, free_energy, exact)
    wrong = {"logits"} if weights == "no implicit term" else set()
    assert {name for name, score in scores.items() if not score < SIGMAS} == wrong, scores


@pytest.mark.parametrize("mutant", [False, True])
@pytest.mark.parametrize("df", [1.5, 4.0])
def test_student_gradients(df: float, mutant: bool) -> None:
    at = {"df": torch.tensor([df]), "loc": torch.tensor([0.5]), "scale": torch.tensor([0.7])}
    at = {k: v.double() for k, v in at.items()}
    s = torch.linspace(-30, 30, 20_001).double()  # x = sinh(s): tails of power laws end where exponentials do

    def f(q: Any, x: Tensor) -> Tensor:
        return (torch.log1p(x.square()) + x.cos()).squeeze(-1)

    def make(theta: dict[str, Tensor], detach: bool = False) -> PolarStudentT:
        return PolarStudentT(theta["df"].detach() if detach else theta["df"], theta["loc"], theta["scale"])

    exact = by_quadrature(make, at, f, s.sinh()[:, None], s.cosh() * 0.003)
    scores = z_scores(partial(make, detach=mutant), at, f, exact)
    wrong = {"df"} if mutant else set()
    assert {name for name, score in scores.items() if not score < SIGMAS} == wrong, scores


# --- Student t -------------------------------------------------------------------------------------------------------


def test_student_density_is_torchs_and_the_normal_limit_is_kept_in_float32() -> None:
    def mine(df: float, loc: float, scale: float, x: Tensor) -> Tensor:
        return PolarStudentT(*(torch.tensor([v], dtype=x.dtype) for v in (df, loc, scale))).log_prob(x[:, None])

    x = torch.linspace(-30, 30, 61).double()
    for df in (1.01, 2.5, 10.0, 300.0):
        assert torch.allclose(mine(df, 0.5, 2.0, x), StudentT(torch.tensor(df).double(), 0.5, 2.0).log_prob(x))
    x = torch.linspace(-3, 3, 7)
    exact = Normal(0.0, 1.0).log_prob(x)
    assert (mine(1e6, 0.0, 1.0, x) - exact).abs().max() < 1e-4
    assert (StudentT(torch.tensor(1e6), 0.0, 1.0).log_prob(x) - exact).abs().max() > 1e-2, "what the series is for"


@pytest.mark.parametrize("df", [1.0001, 10.0, 1e7])
def test_student_draws_are_finite_at_the_ends_of_the_generator(df: float) -> None:
    ends = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    q = PolarStudentT(torch.full((4,), df, requires_grad=True), torch.zeros(4), torch.ones(4))
    with replaying([ends, torch.zeros(4)]):
        x = q.rsample()
    (g,) = torch.autograd.grad(x.log1p().sum(), q.df)
    assert x.isfinite().all() and g.isfinite().all()


def test_student_reaches_a_heavy_tailed_target() -> None:
    target = StudentT(3.0, 1.0, 2.0)

    def log_p(x: Tensor) -> Tensor:
        return target.log_prob(x).sum(-1)

    family = StudentFamily(2)
    with torch.no_grad():
        family.log_df.bias.fill_(math.log(2.0))
        family.loc.bias.fill_(1.0)
        family.log_scale.bias.fill_(math.log(2.0))
    x, log_q = sample_and_log_prob(family(), torch.Size((1000,)))
    assert (log_p(x) - log_q).abs().max() < 1e-4
    (heavy, heavy_spread), (light, light_spread) = (
        fitted(f, log_p, 800) for f in (StudentFamily(2), DiagonalNormal(2))
    )
    assert heavy > -0.03 and heavy - light > 0.03
    assert heavy_spread < 0.5 * light_spread, "log weights are nearly constant"


# --- where they win --------------------------------------------------------------------------------------------------


def fitted(family: nn.Module, log_p: Callable[[Tensor], Tensor], steps: int = 200) -> tuple[float, float]:
    """The bound after a short training, and the standard deviation of its log weights."""
    optimiser = torch.optim.Adam(family.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x, log_q = sample_and_log_prob(family(), torch.Size((64,)))
        optimiser.zero_grad()
        (log_q - log_p(x)).mean().backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x, log_q = sample_and_log_prob(family(), torch.Size((8000,)))
        weights = log_p(x) - log_q
    return float(weights.mean()), float(weights.std())


def banana(x: Tensor) -> Tensor:
    """A normal, and a ridge along its square; normalised, so that the bound is at most zero."""
    a, b = x.unbind(-1)
    return -0.5 * a.square() - 0.5 * ((b - a.square()) / 0.5).square() - math.log(2 * math.pi * 0.5)


def two_modes(x: Tensor) -> Tensor:
    left, right = (Normal(m, 0.5).log_prob(x) + math.log(w) for m, w in ((-2.0, 0.3), (2.0, 0.7)))
    return torch.logaddexp(left, right).sum(-1)


@pytest.mark.parametrize("make", [PlanarFlow, partial(SylvesterFlow, transforms=2), CouplingAffineFlow, Mixture])
def test_a_banana_is_closer_than_to_a_diagonal_normal(make: Make) -> None:
    rich, diagonal = (fitted(family, banana)[0] for family in (make(2), DiagonalNormal(2)))
    assert rich < 0.05, "a bound above the evidence"
    assert rich > diagonal + 0.1


@pytest.mark.parametrize("weights", ["uniform", "learned"])
def test_a_mixture_has_two_modes(weights: Any) -> None:
    family = Mixture(1, components=2, weights=weights, scale=1.0)
    mixed, diagonal = (fitted(f, two_modes, 300)[0] for f in (family, DiagonalNormal(1, scale=1.0)))
    # equal weights pay KL((1/2, 1/2) || (0.3, 0.7)) = 0.087; a normal that keeps to one mode pays log 0.7 or log 0.3
    assert diagonal < math.log(0.7) + 0.02
    assert mixed > (-0.15 if weights == "uniform" else -0.08)


# --- sizes and bad input ---------------------------------------------------------------------------------------------


def test_one_feature_has_no_halves_and_no_reflections() -> None:
    assert len(CouplingAffineFlow(1).steps) == 0
    assert not any("mirrors" in name for name, _ in SylvesterFlow(1).named_parameters())
    assert SylvesterFlow(40).steps[0].columns == 16


@pytest.mark.parametrize("make", [Mixture, StudentFamily, PlanarFlow, RadialFlow, SylvesterFlow, CouplingAffineFlow])
def test_a_thousand_features(make: Make) -> None:
    x, log_q = sample_and_log_prob(make(1000)(), torch.Size((2,)))
    assert x.shape == (2, 1000) and log_q.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Mixture, 33, weights="learned"), "at most 32 features, got 33: use weights='uniform'"),
        (partial(Mixture, 3, weights="equal"), "must be 'uniform' or 'learned', got 'equal'"),
        (partial(Mixture, 3, components=0), "components must be at least 1, got 0"),
        (partial(Mixture, 3, scale=-1.0), "scale must be positive and finite"),
        (partial(StudentFamily, 3, df=2.0), "df at the start must be above 2"),
        (partial(PlanarFlow, 3, transforms=0), "transforms must be at least 1, got 0"),
        (partial(RadialFlow, 3, transforms=0), "transforms must be at least 1, got 0"),
        (partial(SylvesterFlow, 3, reflections=0), "reflections must be at least 1"),
        (partial(SylvesterFlow, 3, columns=4), "at most features = 3, got 4"),
        (partial(CouplingAffineFlow, 3, transforms=0), "transforms must be at least 1, got 0"),
        (partial(CouplingAffineFlow, 3, hidden=()), "hidden needs one width or more"),
        (partial(CouplingSplineFlow, 3, hidden=(8, 0)), "hidden needs one width or more"),
        *[(partial(make, 0), "features must be at least 1, got 0") for make in OURS.values()],
        *[(partial(make, 3, -1), "context must be at least 0") for make in OURS.values()],
    ],
)
def test_bad_input_is_refused_by_name(make: Make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_series_of_the_gamma_function() -> None:
    x = torch.logspace(math.log10(0.5), 4, 200).double()
    assert torch.allclose(student_t._log_gamma_step(x), torch.lgamma(x + 0.5) - torch.lgamma(x), atol=1e-10)
