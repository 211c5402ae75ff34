"""Every estimator against closed forms and quadrature on conjugate models, in minibatches, with mutants that fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import dgm
import dgm.schedules
from dgm import importance, objectives
from dgm.errors import GuideError, ModelError, OptionError
from dgm.guides.encoders import mlp
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.models import bnn, linear_vae
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Normal
from dgm.noise import recording
from dgm.pair import Pair
from dgm.programs import preserved_rng

SIGMAS = 4.5
X = torch.tensor([-1.2, 0.1, 0.4, 2.0], dtype=torch.float64)
SIZES = {"data": 12}
LOG_2PI = math.log(2 * math.pi)


class Shifted(PyroModule):
    """z ~ N(0, 1),  x ~ N(z + theta, 1): evidence N(x; theta, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.theta, 1.0), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        return dist.Normal(self.theta, 2.0**0.5).log_prob(x)


class Line(PyroModule):
    """q(z | x) = N(a x + b, exp(s)^2), away from the posterior N((x - theta) / 2, 1 / 2)."""

    def __init__(self, a: float = 0.2, b: float = 0.3, s: float = -0.1) -> None:
        super().__init__()
        self.a, self.b, self.s = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b, s))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x + self.b, self.s.exp()))


def log_weight(p: dict[str, Tensor], z: Tensor, fixed_q: bool = False) -> Tensor:
    """log p(x, z) - log q(z | x) by hand, z of shape (..., B)."""
    a, b, s = (p[f"guide.{n}"].detach() if fixed_q else p[f"guide.{n}"] for n in "abs")
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + p["model.theta"], 1.0).log_prob(X)
    return joint - dist.Normal(a * X + b, s.exp()).log_prob(z)


def hermite(nodes: int = 60) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(e)], e ~ N(0, 1)."""
    e, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(e), torch.tensor(w / w.sum())


def exact(p: dict[str, Tensor], alpha: float = 0.0, kl_weight: float = 1.0) -> Tensor:
    """-(N/B) sum_n of the bound, by quadrature: one sample's ELBO, or (alpha < 1) two samples' Renyi bound."""
    e, w = hermite()
    z = (p["guide.a"] * X + p["guide.b"]) + p["guide.s"].exp() * e[:, None]  # (J, B)
    if alpha == 1.0:
        like = dist.Normal(z + p["model.theta"], 1.0).log_prob(X)
        bound = (w[:, None] * (like + kl_weight * (log_weight(p, z) - like))).sum(0)
    else:
        lw = log_weight(p, z)
        two = torch.logsumexp((1 - alpha) * torch.stack(torch.broadcast_tensors(lw[:, None], lw[None])), 0)
        bound = ((w[:, None, None] * w[None, :, None]) * (two - math.log(2)) / (1 - alpha)).sum((0, 1))
    return -SIZES["data"] / len(X) * bound.sum()


def wake_phi(p: dict[str, Tensor]) -> Tensor:
    """The guide's loss of reweighted wake-sleep with two samples: E[-sum_k v_k log q(z_k)], the draws held fixed."""
    e, w = hermite()
    z = ((p["guide.a"] * X + p["guide.b"]) + p["guide.s"].exp() * e[:, None]).detach()
    lw = log_weight(p, z).detach()
    log_q = dist.Normal(p["guide.a"] * X + p["guide.b"], p["guide.s"].exp()).log_prob(z)
    pairs = torch.stack(torch.broadcast_tensors(lw[:, None], lw[None]))  # (2, J, J, B)
    v = torch.softmax(pairs, 0)
    both = v[0] * log_q[:, None] + v[1] * log_q[None]
    return -SIZES["data"] / len(X) * ((w[:, None, None] * w[None, :, None]) * both).sum()


def gradients(pair: Pair, batch: tuple[Tensor, ...], count: int, sizes: dict[str, int], kl: float = 1.0) -> Any:
    """`count` independent estimates of the loss and of every gradient, each `(count, ...)`, by one vmap over noise."""
    with preserved_rng(0):
        pair.loss(None, batch, sizes=sizes)  # the first run of a shape records
        with recording() as draws:
            pair.loss(None, batch, sizes=sizes)
        assert draws.complete
        noise = draws.sample_many(count)
    parameters = {name: p.detach() for name, p in pair.parameters().items()}
    one = lambda *eps: torch.func.grad_and_value(  # noqa: E731
        lambda p: pair.loss(p, batch, eps, sizes=sizes, kl_weight=kl)
    )(parameters)
    return torch.func.vmap(one)(*noise)


def worst_z(estimates: Tensor, truth: Tensor) -> float:
    """The largest distance of a mean from the truth, in its standard errors."""
    flat, exact = estimates.reshape(len(estimates), -1), truth.reshape(-1)
    error = flat.std(0) / math.sqrt(len(flat))
    return float(((flat.mean(0) - exact).abs() / (error + 1e-12)).max())


def z_of(loss: Any, truth: Callable[..., Tensor], *, sizes: dict[str, int] = SIZES, kl: float = 1.0) -> float:
    pair = Pair(Shifted(), Line(), loss)
    p = {name: v.detach().requires_grad_() for name, v in pair.parameters().items()}
    expected = torch.autograd.grad(truth(p), list(p.values()))
    found, _ = gradients(pair, (X,), 4000, sizes, kl)
    return max(worst_z(found[name], e) for name, e in zip(p, expected, strict=True))


elbo = partial(exact, alpha=1.0)
CASES: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "pathwise": (dgm.ELBO(2), elbo),
    "stl": (dgm.ELBO(2, estimator="stl"), elbo),
    "score": (dgm.ELBO(3, estimator="score"), elbo),
    "score of one": (dgm.ELBO(1, estimator="score"), elbo),
    "mixed": (dgm.ELBO(2, estimator="mixed"), elbo),
    "analytic": (dgm.ELBO(2, kl="analytic"), elbo),
    "antithetic": (dgm.ELBO(3, draws="antithetic"), elbo),
    "sobol": (dgm.ELBO(4, draws="sobol"), elbo),
    "stratified": (dgm.ELBO(3, draws="stratified"), elbo),
    "importance": (dgm.ImportanceELBO(2), exact),
    "dreg": (dgm.ImportanceELBO(2, estimator="dreg"), exact),
    "renyi": (dgm.RenyiELBO(0.5, 2), partial(exact, alpha=0.5)),
    "renyi dreg": (dgm.RenyiELBO(0.5, 2, estimator="dreg"), partial(exact, alpha=0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    loss, truth = CASES[name]
    assert z_of(loss, truth) < SIGMAS


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    loss, truth = CASES[name]
    pair = Pair(Shifted(), Line(), loss)
    _, values = gradients(pair, (X,), 4000, SIZES)
    assert worst_z(values, truth({n: v.detach() for n, v in pair.parameters().items()})) < SIGMAS


@pytest.mark.parametrize("name", ["pathwise", "stl", "score", "analytic"])
def test_gradient_with_a_kl_weight(name: str) -> None:
    loss, _ = CASES[name]
    assert z_of(loss, partial(exact, alpha=1.0, kl_weight=0.3), kl=0.3) < SIGMAS


def test_gradient_of_reweighted_wake_sleep() -> None:
    pair = Pair(Shifted(), Line(), dgm.ReweightedWakeSleep(2))
    p = {name: v.detach().requires_grad_() for name, v in pair.parameters().items()}
    found, values = gradients(pair, (X,), 4000, SIZES)
    (theta,) = torch.autograd.grad(exact(p), [p["model.theta"]])
    guide = torch.autograd.grad(wake_phi(p), [p[f"guide.{n}"] for n in "abs"])
    assert worst_z(found["model.theta"], theta) < SIGMAS
    assert max(worst_z(found[f"guide.{n}"], g) for n, g in zip("abs", guide, strict=True)) < SIGMAS
    assert worst_z(values, exact({n: v.detach() for n, v in p.items()})) < SIGMAS


def test_sleep_is_maximum_likelihood_on_dreams() -> None:
    """With sleep = 1 the guide's gradient is that of -(N/B) sum E_p(x, z)[log q(z | x)], which is a quadratic form."""
    pair = Pair(Shifted(), Line(), dgm.ReweightedWakeSleep(2, sleep=1.0))
    p = {name: v.detach().requires_grad_() for name, v in pair.parameters().items()}
    a, b, s, theta = (p[n] for n in ("guide.a", "guide.b", "guide.s", "model.theta"))
    theta = theta.detach()  # x = z + theta + e: z - a x - b has mean -a theta - b and variance (1 - a)^2 + a^2
    square = (a * theta + b) ** 2 + (1 - a) ** 2 + a**2
    loss = SIZES["data"] * (0.5 * square * (-2 * s).exp() + s)
    expected = torch.autograd.grad(loss, [a, b, s])
    found, _ = gradients(pair, (X,), 4000, SIZES)
    assert max(worst_z(found[f"guide.{n}"], g) for n, g in zip("abs", expected, strict=True)) < SIGMAS


# --- mutants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pathwise", "stl", "score", "importance", "dreg"])
def test_a_dropped_scale_is_seen(name: str) -> None:
    loss, truth = CASES[name]
    assert z_of(loss, truth, sizes={}) > 5


def test_a_missing_detach_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, truth = CASES["dreg"]
    monkeypatch.setattr(importance, "_constant", lambda tree: tree)
    assert z_of(loss, truth) > 5
    loss, truth = CASES["score"]
    monkeypatch.setattr(objectives, "_centred", lambda f: (f - f.detach().mean(0)) * (len(f) / (len(f) - 1)))
    assert z_of(loss, truth) > 5


# --- identities at the exact posterior -------------------------------------------------------------------------------

EVERY = {name: loss for name, (loss, _) in CASES.items()} | {"rws": dgm.ReweightedWakeSleep(3)}


@pytest.mark.parametrize("name", EVERY)
def test_at_the_exact_posterior_the_value_is_the_evidence(name: str) -> None:
    if name == "analytic":
        pytest.skip("its KL is exact, its likelihood term sampled: the sum has variance")
    model = Shifted()
    guide = Line(0.5, -0.15, -0.5 * math.log(2))
    evidence = float(SIZES["data"] / len(X) * model.log_evidence(X).detach().sum())
    loss = Pair(model, guide, EVERY[name]).loss(None, (X,), sizes=SIZES).detach()
    assert math.isclose(-float(loss), evidence, rel_tol=1e-12)


@pytest.mark.parametrize("name", ["stl", "dreg", "renyi dreg"])
def test_at_the_exact_posterior_the_guide_has_no_gradient_noise(name: str) -> None:
    pair = Pair(Shifted(), Line(0.5, -0.15, -0.5 * math.log(2)), EVERY[name])
    found, _ = gradients(pair, (X,), 50, SIZES)
    assert max(float(found[f"guide.{n}"].abs().max()) for n in "abs") < 1e-10
    plain, _ = gradients(Pair(Shifted(), Line(0.5, -0.15, -0.5 * math.log(2)), EVERY["pathwise"]), (X,), 50, SIZES)
    assert float(plain["guide.b"].std()) > 0.1


def test_dreg_has_a_better_signal_than_the_pathwise_gradient() -> None:
    """At K = 64 the guide's pathwise signal drowns (Rainforth et al., 2018), dreg's does not (Tucker et al., 2019)."""
    ratio = {}
    for estimator in ("pathwise", "dreg"):
        pair = Pair(Shifted(), Line(), dgm.ImportanceELBO(64, estimator=estimator))  # type: ignore[arg-type]
        found, _ = gradients(pair, (X,), 500, SIZES)
        ratio[estimator] = float(found["guide.a"].mean().abs() / found["guide.a"].std())
    assert ratio["dreg"] > 3 * ratio["pathwise"]


# --- minibatches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [dgm.ImportanceELBO(50), dgm.RenyiELBO(0.5, 50)])
def test_bound_of_a_minibatch_is_that_of_all_rows(loss: Any) -> None:
    """N = 1000, B = 10: the mean over the batches of an epoch is the bound of the full batch, in nats a datum."""
    with preserved_rng(0):
        x = math.sqrt(2.0) * torch.randn(1000, dtype=torch.float64)
        pair = Pair(Shifted(), Line(0.3, 0.1, 0.0), loss)
        whole = torch.stack([-pair.loss(None, (x,), sizes={"data": 1000}) / 1000 for _ in range(4)]).detach()
        parts = torch.stack([-pair.loss(None, (b,), sizes={"data": 1000}) / 1000 for b in x.split(10)]).detach()
    per_row = float(whole.std() + 1e-3)
    assert abs(float(parts.mean() - whole.mean())) < SIGMAS * per_row
    evidence = float(Shifted().log_evidence(x).detach().mean())
    assert float(parts.mean()) <= evidence + 1e-3


@pytest.mark.slow
def test_pyro_s_renyi_bound_lies_above_the_evidence_in_minibatches() -> None:
    """The mutant that the market ships: the plate's N/B scale inside of the logarithm."""
    with preserved_rng(0), pyro.get_param_store().scope():
        x = math.sqrt(2.0) * torch.randn(1000, dtype=torch.float64)
        evidence = float(Shifted().log_evidence(x).detach().mean())
        model, guide = Shifted(), Line(0.3, 0.1, 0.0)
        scaled = lambda program: pyro.poutine.scale(program, scale=100.0)  # noqa: E731
        theirs = pyro.infer.RenyiELBO(alpha=0.0, num_particles=50)
        value = np.mean([-theirs.loss(scaled(model), scaled(guide), b) / 1000 for b in x.split(10)])
    assert value > evidence + 0.05


# --- free bits -------------------------------------------------------------------------------------------------------


def test_free_bits_take_the_gradient_of_a_small_kl_and_leave_the_value() -> None:
    options: Any = {"kl": "analytic", "draws": "independent"}
    plain, freed = (Pair(Shifted(), Line(), dgm.ELBO(1, free_bits=b, **options)) for b in (0.0, 5.0))
    found, values = gradients(freed, (X,), 100, SIZES)
    likelihood, _ = gradients(plain, (X,), 100, SIZES, kl=0.0)
    _, bound = gradients(plain, (X,), 100, SIZES)
    assert torch.allclose(values, bound)
    for name in found:
        assert torch.allclose(found[name], likelihood[name]), name


def test_free_bits_below_the_kl_change_nothing() -> None:
    for sampled in ("sampled", "analytic"):
        kl: Any = sampled
        plain, freed = (Pair(Shifted(), Line(b=5.0), dgm.ELBO(2, kl=kl, free_bits=b)) for b in (0.0, 0.1))
        (a, _), (b, _) = (gradients(p, (X,), 20, SIZES) for p in (plain, freed))
        assert all(torch.allclose(a[name], b[name]) for name in a)


def test_free_bits_of_each_dimension() -> None:
    model, (x,) = linear_vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, encoder=mlp(8))
    sites, dims = (Pair(model, guide, dgm.ELBO(kl="analytic", free_bits=0.2, groups=g)) for g in ("site", "dimension"))
    with preserved_rng(1):
        a = sites.loss(None, (x,))
    with preserved_rng(1):
        b = dims.loss(None, (x,))
    assert torch.allclose(a, b)  # the value is without them
    with pytest.raises(ModelError, match="latent 'z' has no KL for each dimension"):
        full = Joint(model, x, family=FullNormal, encoder=mlp(8))
        Pair(model, full, dgm.ELBO(kl="analytic", free_bits=0.2, groups="dimension")).loss(None, (x,))


# --- global latents, closed forms and the noise of layers ------------------------------------------------------------


def regression() -> tuple[BNN, tuple[Tensor, Tensor]]:
    """A linear layer as a Bayesian network with known noise: the ELBO of a diagonal guide is known exactly."""
    with preserved_rng(0):
        model = BNN(nn.Linear(2, 1), likelihood=Normal(scale=0.5)).double()
        x = torch.randn(6, 2, dtype=torch.float64)
        return model, (x, x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.2)


def exact_regression(p: dict[str, Tensor], batch: tuple[Tensor, Tensor], size: int) -> Tensor:
    x, y = batch
    loc, scale = p["guide.family.loc.bias"], p["guide.family.log_scale.bias"].exp()
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    square = (y - design @ loc).square() + design.square() @ scale.square()
    like = -0.5 * square / 0.25 - math.log(0.5) - 0.5 * LOG_2PI
    kl = 0.5 * (loc.square() + scale.square() - 1).sum() - scale.log().sum()
    return -(size / len(x) * like.sum() - kl)


LAYERS = {
    "shared": dgm.ELBO(2),
    "local": dgm.ELBO(2, layer_noise="local"),
    "flipout": dgm.ELBO(1, layer_noise="flipout"),
    "stl": dgm.ELBO(2, estimator="stl"),
    "score": dgm.ELBO(4, estimator="score"),
    "analytic": dgm.ELBO(1, kl="analytic"),
    "local analytic": dgm.ELBO(1, layer_noise="local", kl="analytic"),
}


def regression_gradients(loss: Any, count: int = 3000) -> tuple[Any, dict[str, Tensor], tuple[Tensor, ...]]:
    model, batch = regression()
    with preserved_rng(0):
        guide = Global(model, *batch, init_scale=0.3).double()
    pair = Pair(model, guide, loss)
    p = {name: v.detach().requires_grad_() for name, v in pair.parameters().items()}
    expected = torch.autograd.grad(exact_regression(p, batch, 30), list(p.values()))  # type: ignore[arg-type]
    found, _ = gradients(pair, batch, count, {"data": 30})
    return found, p, expected


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_of_weights(name: str) -> None:
    found, p, expected = regression_gradients(LAYERS[name])
    assert max(worst_z(found[n], e) for n, e in zip(p, expected, strict=True)) < SIGMAS


def test_local_noise_has_less_variance() -> None:
    one, many = (regression_gradients(dgm.ELBO(layer_noise=kind), 1000)[0] for kind in ("shared", "local"))  # type: ignore[arg-type]
    assert float(many["guide.family.loc.bias"].std()) < 0.8 * float(one["guide.family.loc.bias"].std())


def test_layer_noise_needs_a_linear_layer_with_normal_weights() -> None:
    model, batch = regression()
    guide = Global(model, *batch, family=FullNormal).double()
    with pytest.raises(GuideError, match=r"the guide draws no latent from independent normals: use a diagonal"):
        Pair(model, guide, dgm.ELBO(layer_noise="local")).loss(None, batch)

    def location(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    pair = Pair(location, Global(location, torch.ones(3)), dgm.ELBO(layer_noise="flipout"))
    with pytest.raises(GuideError, match=r"no nn\.Linear of the model .* has one of the latents \['m'\] as its weight"):
        pair.loss(None, (torch.ones(3),))


def test_a_correlated_normal_over_one_latent_has_a_closed_form() -> None:
    model, x = linear_vae.LinearVAE.simulate(6, 4, 2, dtype=torch.float64)
    with preserved_rng(0):
        torch.set_default_dtype(torch.float64)
        guide = Joint(model, x, family=FullNormal, encoder=mlp(8))
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(0.2 * torch.randn_like(p))
    sampled, analytic = (gradients(Pair(model, guide, dgm.ELBO(kl=k)), (x,), 2000, {}) for k in ("sampled", "analytic"))  # type: ignore[arg-type]
    for name, estimates in sampled[0].items():
        assert worst_z(estimates - analytic[0][name], torch.zeros_like(estimates[0])) < SIGMAS, name
    apart = sampled[1] - analytic[1]  # of the same draws: no law says which of the two varies less
    assert float(apart.std()) > 1e-3
    assert worst_z(apart, torch.zeros(())) < SIGMAS


# --- modes, replicas, stock Pyro -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("score of one", "renyi")])
def test_traced_step_gives_the_losses_of_the_eager_one(name: str) -> None:
    losses = []
    for mode in (False, "trace"):
        model, guide = Shifted(), Line()
        svi = dgm.SVI(model, guide, partial(torch.optim.Adam, lr=0.05), EVERY[name], sizes=SIZES, compile=mode)  # type: ignore[arg-type]
        with preserved_rng(2):
            losses.append([svi.step(X) for _ in range(5)])
        assert svi.kind == (mode or "eager"), svi.fallback
    assert np.allclose(*losses, rtol=1e-9)


@pytest.mark.parametrize("name", ["stl", "analytic", "dreg", "rws", "score", "sobol"])
@pytest.mark.slow
def test_replicas_equal_single_runs(name: str) -> None:
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    make, guide = (lambda: Shifted()), (lambda model, x: Line())
    options: Any = {"epochs": 2, "batch_size": 10, "loss": EVERY[name], "lr": 0.05}
    many = dgm.fit(make, guide, x, replicas=2, compile="trace", **options)
    for seed, one in enumerate(many):
        alone = dgm.fit(Shifted(), Line(), x, seed=seed, compile=False, **options)
        assert one.engine.startswith("trace, 2 replicas")
        assert np.allclose(one.history["elbo"], alone.history["elbo"], rtol=1e-6)


@pytest.mark.parametrize("name", ["pathwise", "stl", "score", "importance", "dreg", "rws"])
def test_stock_pyro_takes_the_same_losses(name: str) -> None:
    """The same seed gives the same losses under pyro.infer.SVI, which has no minibatch scale of its own."""
    with preserved_rng(3):
        svi = dgm.SVI(Shifted(), Line(), partial(torch.optim.Adam, lr=0.05), EVERY[name], compile=False)
        svi.prepare(X)
        torch.manual_seed(0)
        mine = [svi.step(X) for _ in range(5)]
        with pyro.get_param_store().scope(), pyro.settings.context(module_local_params=False):
            stock = pyro.infer.SVI(Shifted(), Line(), pyro.optim.Adam({"lr": 0.05}), EVERY[name])
            torch.manual_seed(0)
            theirs = [stock.step(X) for _ in range(5)]
    assert np.allclose(mine, theirs, rtol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dgm.ELBO(0), "number of particles is 0"),
        (lambda: dgm.ELBO(estimator="slt"), "estimator is 'slt', expected one of 'pathwise'"),
        (lambda: dgm.ELBO(kl="exact"), "kl is 'exact'"),
        (lambda: dgm.ELBO(free_bits=-1.0), "free_bits is -1.0"),
        (lambda: dgm.ELBO(estimator="stl", kl="analytic"), "is for a sampled KL"),
        (lambda: dgm.ELBO(free_bits=1.0, groups="dimension"), 'give kl="analytic"'),
        (lambda: dgm.ELBO(draws="qmc"), "draws is 'qmc'"),
        (lambda: dgm.ELBO(2, draws="sobol", layer_noise="local"), "draws must be 'independent'"),
        (lambda: dgm.RenyiELBO(1.0), "at 1 the bound is ELBO"),
        (lambda: dgm.ReweightedWakeSleep(1), "expected at least 2"),
        (lambda: dgm.ReweightedWakeSleep(4, sleep=2.0), "expected a share"),
    ],
)
def test_bad_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize("loss", [dgm.ImportanceELBO(4), dgm.RenyiELBO(0.5, 4), dgm.ReweightedWakeSleep(4)])
def test_bounds_of_several_samples_refuse_global_latents(loss: Any) -> None:
    model, batch = bnn.example()
    svi = dgm.SVI(model, Joint(model, *batch), partial(torch.optim.Adam, lr=1e-3), loss, sizes={"data": 100})
    with pytest.raises(ModelError, match=r"latent '.*' is global, and .* needs its weight over all rows at once"):
        svi.step(*batch)


# --- schedules of the KL weight --------------------------------------------------------------------------------------


def test_a_schedule_gives_the_weight_of_each_step() -> None:
    fit = dgm.fit(Shifted(), Line(), X, epochs=8, batch_size=2, kl_schedule=dgm.schedules.cyclical(4, ramp=0.5))
    assert fit.history["kl_weight"].tolist() == [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    warm, linear = (
        dgm.fit(Shifted(), Line(), X, epochs=6, **options).history
        for options in ({"kl_warmup": 3}, {"kl_schedule": dgm.schedules.linear(3)})
    )
    assert warm["elbo"].equals(linear["elbo"]) and warm["kl_weight"].tolist()[:3] == [1 / 3, 2 / 3, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_schedule": 0.5}, "kl_schedule is a function of the time"),
        ({"kl_schedule": dgm.schedules.linear(2), "kl_warmup": 2}, "instead of kl_warmup"),
        ({"kl_schedule": lambda t: -t}, "kl_schedule gives -1.0 at step 1"),
    ],
)
def test_bad_schedules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dgm.fit(Shifted(), Line(), X, epochs=2, **options)
    with pytest.raises(OptionError, match="length is 0"):
        dgm.schedules.linear(0)
    with pytest.raises(OptionError, match="ramp is 2"):
        dgm.schedules.cyclical(10, ramp=2)
