"""Laws of every family: shapes, densities, starts, gradients, tracing and stacking; then what each can fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from dgm.errors import GuideError, OptionError
from dgm.guides.coupling_spline_flow import CouplingSplineFlow
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.family import Family, Pushforward
from dgm.guides.full_normal import FullNormal
from dgm.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.guides.point import Point

Make = Callable[..., nn.Module]

OURS: dict[str, Make] = {
    "diagonal": DiagonalNormal,
    "low rank": LowRankNormal,
    "full": FullNormal,
    "iaf": partial(InverseAutoregressiveFlow, hidden=(16,)),
    "iaf deep": partial(InverseAutoregressiveFlow, hidden=(12, 9), transforms=3),
    "spline": partial(CouplingSplineFlow, hidden=(16,)),
}
ZUKO: dict[str, Make] = {
    "zuko NICE": partial(zuko.flows.NICE, hidden_features=(16,)),
    "zuko MAF": partial(zuko.flows.MAF, hidden_features=(16,)),
}
DENSITIES = OURS | ZUKO
ALL = DENSITIES | {"point": Point}
FLOWS = ["iaf", "iaf deep", "spline"]


def pytest_generate_tests(metafunc: Any) -> None:
    for argument, makers in {"ours": OURS, "density": DENSITIES, "any_family": ALL}.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, makers.values(), ids=list(makers))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def perturbed(family: nn.Module, size: float = 0.3) -> nn.Module:
    """The family away from its start, where nothing is zero by construction."""
    with torch.no_grad():
        for p in family.parameters():
            p.add_(size * torch.randn_like(p))
    return family


def draw(q: Any, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    if hasattr(q, "rsample_and_log_prob"):
        return q.rsample_and_log_prob(torch.Size(shape))
    x = q.rsample(torch.Size(shape))
    return x, q.log_prob(x)


# --- laws of all ---


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_shapes(any_family: Make, features: int, context: int, shape: tuple[int, ...]) -> None:
    family = any_family(features, context)
    for batch in [(7,), (6, 7)] if context else [()]:
        q = family(torch.randn(*batch, context)) if context else family()
        assert q.event_shape == (features,)
        x = q.rsample(torch.Size(shape))
        assert x.shape == (*shape, *batch, features)
        assert q.log_prob(x).shape == q.log_prob(x.clone()).shape == (*shape, *batch)
        assert tuple(q.batch_shape) == batch


@pytest.mark.parametrize("context", [0, 3])
def test_log_prob_of_a_draw_is_that_of_an_equal_value(density: Make, context: int) -> None:
    family = perturbed(density(5, context)).double()
    q = family(torch.randn(7, 3).double() if context else None)
    x, log_q = draw(q, (4,))
    assert torch.allclose(q.log_prob(x), log_q, atol=1e-8)
    assert torch.allclose(q.log_prob(x.clone()), log_q, atol=1e-8), "the inverse disagrees with the draw"


def integral(log_density: Callable[[Tensor], Tensor], features: int) -> float:
    axis = torch.linspace(-14, 14, 561 if features == 2 else 5601).double()
    x = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    with torch.no_grad():
        return float(log_density(x).exp().sum() * (axis[1] - axis[0]) ** features)


@pytest.mark.parametrize("features", [1, 2])
def test_density_integrates_to_one(density: Make, features: int) -> None:
    family = perturbed(density(features), 0.1).double()  # farther from the start, splines throw mass out of the box
    if isinstance(family, Family):
        family.initialise(torch.zeros(features), 1.0)  # type: ignore[operator]
    assert integral(family().log_prob, features) == pytest.approx(1.0, abs=2e-3)


def test_integral_sees_a_wrong_determinant() -> None:
    wrong = Pushforward(lambda e: (2 * e, torch.tensor(0.0)), lambda x: (x / 2, torch.tensor(0.0)), torch.zeros(1))
    assert abs(integral(wrong.log_prob, 1) - 1) > 0.5


@pytest.mark.parametrize("features", [1, 5])
@pytest.mark.parametrize("context", [0, 3])
def test_every_parameter_receives_a_gradient(any_family: Make, features: int, context: int) -> None:
    family = perturbed(any_family(features, context))
    x, log_q = draw(family(torch.randn(7, 3) if context else None), (64,))
    ((x.square().sum(-1) + x.sum(-1).cos()) + log_q).mean().backward()
    for name, p in family.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), f"{name}: no finite gradient"
        # zuko's flows of one feature draw parameters that a later one makes redundant
        assert p.grad.abs().sum() > 0 or features == 1, f"{name}: gradient is zero"


class LogProb(nn.Module):
    """Evaluates where the parameters are handed in: zuko's densities read their networks when they are evaluated."""

    def __init__(self, family: nn.Module) -> None:
        super().__init__()
        self.family = family

    def forward(self, x: Tensor) -> Tensor:
        return self.family().log_prob(x)


def test_stacked_parameters(any_family: Make) -> None:
    if any_family is ZUKO["zuko NICE"]:
        pytest.skip("writes a stacked half into a tensor that is not stacked")
    copies = [LogProb(perturbed(any_family(4), 0.1)) for _ in range(3)]
    stacked, buffers = stack_module_state(copies)
    x = 0.1 * torch.randn(5, 4)
    together = vmap(lambda p, b: functional_call(copies[0], (p, b), (x,)))(stacked, buffers)
    for k, copy in enumerate(copies):
        assert torch.allclose(together[k], copy(x), atol=1e-4)


def test_a_density_keeps_the_parameters_that_were_handed_in(ours: Make) -> None:
    copies = [perturbed(ours(4), 0.1) for _ in range(3)]
    stacked, _ = stack_module_state(copies)
    x = 0.1 * torch.randn(3, 5, 4)
    together = vmap(lambda p, e: functional_call(copies[0], p, ()).log_prob(e))(stacked, x)
    for k, family in enumerate(copies):
        assert torch.allclose(together[k], family().log_prob(x[k]), atol=1e-4)


class Noise(TorchFunctionMode):
    """Answers every standard normal draw from a vector handed in."""

    def __init__(self, eps: Tensor) -> None:
        super().__init__()
        self.eps, self.used = eps, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.normal_:
            n = args[0].numel()
            self.used += n
            return self.eps[self.used - n : self.used].view(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [0, 3])
def test_traced_and_stacked_gradients_are_the_eager_ones(ours: Make, context: int) -> None:
    family = perturbed(ours(4, context)).double()
    condition = (torch.randn(7, 3).double(),) if context else ()

    def loss(parameters: dict[str, Tensor], eps: Tensor) -> Tensor:
        with Noise(eps):
            x, log_q = draw(functional_call(family, parameters, condition))
        return (log_q + 0.5 * (x - 1).square().sum(-1)).mean()

    parameters = {k: v.detach() for k, v in family.named_parameters()}
    others = {k: v + 0.1 * torch.randn_like(v) for k, v in parameters.items()}
    eps = torch.randn(2, 100).double()
    traced = make_fx(grad(loss))(parameters, eps[0])
    stacked = vmap(grad(loss))({k: torch.stack([parameters[k], others[k]]) for k in parameters}, eps)
    for k, p in enumerate([parameters, others]):
        eager = grad(loss)(p, eps[k])
        for name, g in traced(p, eps[k]).items():
            assert torch.allclose(g, eager[name], rtol=1e-8, atol=1e-8), name
            assert torch.allclose(stacked[name][k], eager[name], rtol=1e-8, atol=1e-8), name
    traced_stack = make_fx(vmap(grad(loss)))({k: torch.stack([v, v]) for k, v in parameters.items()}, eps)
    assert len(list(traced_stack.graph.nodes)) > 0


# --- starts ---


@pytest.mark.parametrize("name", ["full", *FLOWS])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("features", [1, 5])
def test_starts_as_the_diagonal_family(name: str, context: int, features: int) -> None:
    family, diagonal = OURS[name](features, context), DiagonalNormal(features, context)
    diagonal.load_state_dict({k: v for k, v in family.state_dict().items() if k in diagonal.state_dict()})
    c = torch.randn(7, 3) if context else None
    x = diagonal(c).sample((4,))
    assert torch.allclose(family(c).log_prob(x), diagonal(c).log_prob(x), atol=1e-4)
    if c is None:
        assert torch.allclose(x.std(), torch.tensor(0.1), atol=0.06)


def test_initialise(ours: Make) -> None:
    loc, scale = torch.tensor([20_000.0, 0.0, -3.0]), torch.tensor([1e3, 0.5, 2.0])
    family = ours(3)
    family.initialise(loc, scale)  # type: ignore[operator]
    x = family().sample((4000,))
    assert ((x.mean(0) - loc) / (scale / math.sqrt(4000))).abs().max() < 4.5
    error = 0.02 if ours is LowRankNormal else 0.0
    assert (x.std(0) / scale - 1).abs().max() < 4.5 / math.sqrt(8000) + error
    family.initialise(loc, 0.25)  # type: ignore[operator]
    assert family().sample((500,)).std(0).sub(0.25).abs().max() < 0.05


def test_initialised_point_is_its_location() -> None:
    point = Point(2)
    point.initialise(torch.tensor([1.0, 2.0]), 0.1)
    assert torch.equal(point().sample(), torch.tensor([1.0, 2.0])) and not point.has_density
    assert DiagonalNormal.has_density and float(point().log_prob(point().rsample())) == 0.0


# --- one contains the other ---


def test_low_rank_contains_the_diagonal() -> None:
    low, diagonal = LowRankNormal(5, rank=2), DiagonalNormal(5)
    with torch.no_grad():
        low.factor.bias.zero_()
    x = torch.randn(9, 5) * 0.1
    assert torch.allclose(low().log_prob(x), diagonal().log_prob(x), atol=1e-4)


def test_full_contains_low_rank() -> None:
    low, full = perturbed(LowRankNormal(5, rank=2)).double(), FullNormal(5).double()
    tril = torch.linalg.cholesky(low().covariance_matrix.detach())
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    with torch.no_grad():
        full.loc.bias.copy_(low().mean)
        full.log_scale.bias.copy_(diagonal.log())
        row, column = torch.tril_indices(5, 5, -1)
        full.lower.bias.copy_((tril / diagonal[:, None])[row, column])
    q = full()
    x = torch.randn(9, 5).double()
    assert torch.allclose(q.log_prob(x), low().log_prob(x))
    assert torch.allclose(q.covariance_matrix, low().covariance_matrix)
    assert torch.allclose(q.variance, low().variance)


def test_full_normal_is_torchs_multivariate_normal() -> None:
    family = perturbed(FullNormal(4, context=3)).double()
    q = family(torch.randn(7, 3).double())
    torchs = MultivariateNormal(q.mean, scale_tril=q.scale_tril)
    x = torch.randn(2, 6, 7, 4).double()
    assert torch.allclose(q.log_prob(x), torchs.log_prob(x))
    assert torch.allclose(q.expand((6, 7)).log_prob(x), torchs.log_prob(x))
    assert q.expand((6, 7)).covariance_matrix.shape == (6, 7, 4, 4)
    assert torch.allclose(
        q.rsample((20_000,)).mean(0), q.mean, atol=4.5 * float(q.variance.detach().max()) ** 0.5 / 140
    )


# --- the draw's own density ---


def test_iaf_samples_in_one_pass_and_is_autoregressive() -> None:
    family = perturbed(InverseAutoregressiveFlow(4, transforms=1, hidden=(12,)))
    passes = []
    q = family()
    q.push = lambda eps, push=q.push: passes.append(1) or push(eps)
    q.pull = None
    q.log_prob(q.rsample((3,)))
    assert len(passes) == 1
    push, _ = family.steps[0](None)
    jacobian = torch.func.jacrev(lambda e: push(e)[0])(torch.randn(4))
    assert torch.equal(jacobian.triu(1), torch.zeros(4, 4))
    assert (jacobian[torch.tril_indices(4, 4).unbind()] != 0).all(), "a feature does not see one before it"


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("hidden", [(2,), (5, 3), (64,)])
def test_narrow_masked_networks_reach_the_first_and_the_last_feature(context: int, hidden: tuple[int, ...]) -> None:
    family = perturbed(InverseAutoregressiveFlow(8, context, transforms=1, hidden=hidden))
    push, _ = family.steps[0](torch.randn(64, context) if context else None)
    u = torch.randn(64, 8, requires_grad=True)
    (g,) = torch.autograd.grad(push(u)[0][:, -1].sum(), u)
    assert (g[:, 0] != 0).any()


def test_a_draw_without_gradients_lends_no_density_to_one_who_wants_them() -> None:
    q = perturbed(FullNormal(3))()
    x = q.sample()
    assert q.log_prob(x).requires_grad
    with torch.no_grad():
        y = q.rsample()
        assert not q.log_prob(y).requires_grad
    assert q.log_prob(y).requires_grad


def test_pyro_scores_a_draw_without_inverting_it() -> None:
    family = perturbed(InverseAutoregressiveFlow(3, context=2))
    c = torch.randn(5, 2)

    def guide() -> Tensor:
        q = family(c)
        q.pull = None
        with pyro.plate("particles", 4, dim=-2), pyro.plate("data", 5, dim=-1):
            return pyro.sample("z", q)

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (4, 5, 3)
    assert trace.nodes["z"]["log_prob"].shape == (4, 5)


def test_families_leave_argument_validation_as_it_was() -> None:
    import subprocess
    import sys

    code = (
        "import torch.distributions as d; before = d.Distribution._validate_args; "
        "import dgm.guides.inverse_autoregressive_flow, dgm.guides.coupling_spline_flow; "
        "assert before and d.Distribution._validate_args"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what they fit ---


def target() -> MultivariateNormal:
    tril = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-1.5, 0.4, 0.3]]).double()
    return MultivariateNormal(torch.tensor([1.0, -2.0, 0.5]).double(), scale_tril=tril)


def fit_exactly(family: nn.Module, p: MultivariateNormal) -> float:
    """Smallest KL(q || p), by its closed form."""

    def normal() -> MultivariateNormal:
        q = family()
        covariance = torch.diag_embed(q.variance) if not hasattr(q, "covariance_matrix") else q.covariance_matrix
        return MultivariateNormal(q.mean, covariance)

    optimiser = torch.optim.LBFGS(family.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = kl_divergence(normal(), p)
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(kl_divergence(normal(), p).detach())


def test_full_normal_reaches_any_normal() -> None:
    assert fit_exactly(FullNormal(3).double(), target()) < 1e-6


def test_low_rank_normal_reaches_a_low_rank_target() -> None:
    covariance = torch.diag(torch.tensor([0.5, 1.0, 2.0, 0.3]).double())
    direction = torch.tensor([[1.0], [2.0], [-1.0], [0.5]]).double()
    p = MultivariateNormal(torch.zeros(4).double(), covariance + direction @ direction.T)
    assert fit_exactly(LowRankNormal(4, rank=1).double(), p) < 1e-6


def test_diagonal_normal_stops_at_its_analytic_gap() -> None:
    p = target()
    gap = 0.5 * (p.precision_matrix.diagonal().log().sum() + torch.logdet(p.covariance_matrix))
    assert fit_exactly(DiagonalNormal(3).double(), p) == pytest.approx(float(gap), abs=1e-6)
    assert gap > 0.5


def elbo_of_fit(family: nn.Module, log_p: Callable[[Tensor], Tensor], steps: int = 250) -> tuple[float, float]:
    """Mean and standard error of the bound after a short training."""
    optimiser = torch.optim.Adam(family.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x, log_q = draw(family(), (64,))
        optimiser.zero_grad()
        (log_q - log_p(x)).mean().backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        x, log_q = draw(family(), (8000,))
        weights = log_p(x) - log_q
    return float(weights.mean()), float(weights.std() / math.sqrt(8000))


def banana(x: Tensor) -> Tensor:
    """N(0, 1) and a ridge along its square: the log-density is normalised, so that the bound is at most zero."""
    a, b = x.unbind(-1)
    return -0.5 * a.square() - 0.5 * ((b - a.square()) / 0.5).square() - math.log(2 * math.pi * 0.5)


def correlated(x: Tensor) -> Tensor:
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    return MultivariateNormal(torch.zeros(2), covariance).log_prob(x)


@pytest.mark.parametrize("log_p", [banana, correlated])
@pytest.mark.parametrize("name", ["iaf", "spline"])
@pytest.mark.slow
def test_flows_beat_the_diagonal(name: str, log_p: Callable[[Tensor], Tensor]) -> None:
    flow, flow_error = elbo_of_fit(OURS[name](2), log_p)
    diagonal, error = elbo_of_fit(DiagonalNormal(2), log_p)
    assert flow <= 4.5 * flow_error, "a bound above the evidence"
    assert flow - diagonal > 4.5 * math.hypot(flow_error, error)
    assert flow > 0.5 * diagonal, "less than half of the gap is closed"


# --- errors ---


@pytest.mark.parametrize("make", [*OURS.values(), Point])
def test_domains(make: Make) -> None:
    with pytest.raises(OptionError, match="features must be at least 1, got 0"):
        make(0)
    with pytest.raises(OptionError, match="context must be at least 0"):
        make(3, -1)
    with pytest.raises(GuideError, match=r"built for a context of 3 features, got shape \(7, 4\)"):
        make(2, 3)(torch.zeros(7, 4))
    with pytest.raises(GuideError, match="called without one"):
        make(2, 3)()
    with pytest.raises(GuideError, match="built without a context"):
        make(2)(torch.zeros(7, 4))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_is_positive(ours: Make, scale: float) -> None:
    with pytest.raises(OptionError, match="scale must be positive and finite"):
        ours(2, scale=scale)


@pytest.mark.parametrize("rank", [-1, 0, 3, 4])
def test_rank_is_between_one_and_features(rank: int) -> None:
    with pytest.raises(OptionError, match=rf"less than features = 3, got {rank}"):
        LowRankNormal(3, rank=rank)


@pytest.mark.parametrize("options", [{"transforms": 0}, {"hidden": ()}, {"hidden": (8, 0)}])
@pytest.mark.parametrize("flow", [InverseAutoregressiveFlow, CouplingSplineFlow])
def test_flow_options(flow: Make, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}.* at least 1|{next(iter(options))} needs"):
        flow(3, **options)


def test_splines_need_two_bins() -> None:
    with pytest.raises(OptionError, match="bins must be at least 2, got 1"):
        CouplingSplineFlow(3, bins=1)
