"""One step: unbiased under minibatches, equal to Pyro's, checked before it starts, safe where numbers are not finite"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from dgm import SVI
from dgm.errors import DataError, GuideError, ModelError, OptionError, TrainingError
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.joint import Joint
from dgm.models import vae
from dgm.pair import Pair
from dgm.programs import preserved_rng

ADAM = partial(torch.optim.Adam, lr=1e-2)
N, B = 20, 5


def normals(x: Tensor) -> None:
    """m ~ N(0, 1), x_n ~ N(m, 1)."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


class NormalGuide(PyroModule):
    def __init__(self, reparameterised: bool = True, site: str = "m") -> None:
        super().__init__()
        self.site = site
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(-0.3))
        self.reparameterised = reparameterised

    def forward(self, x: Tensor) -> None:
        q = dist.Normal(self.loc, self.log_scale.exp())
        pyro.sample(
            self.site, q if self.reparameterised else dist.testing.fakes.NonreparameterizedNormal(q.loc, q.scale)
        )


def data(n: int = N) -> Tensor:
    return 1.0 + torch.randn(n, generator=torch.Generator().manual_seed(0))


def closed_form(guide: NormalGuide, x: Tensor) -> tuple[float, Tensor]:
    """-ELBO of all rows and its gradient in (loc, log scale)."""
    loc, log_scale = (p.detach().clone().requires_grad_() for p in (guide.loc, guide.log_scale))
    second = loc**2 + (2 * log_scale).exp()
    log_p = -0.5 * (
        x.square().sum() - 2 * loc * x.sum() + len(x) * second + second + (len(x) + 1) * math.log(2 * math.pi)
    )
    loss = -log_p - (0.5 + 0.5 * math.log(2 * math.pi) + log_scale)
    return float(loss.detach()), torch.stack(torch.autograd.grad(loss, [loc, log_scale]))


# --- the minibatch gradient ------------------------------------------------------------------------------------------


def z_scores(draws: Tensor, exact: Tensor) -> Tensor:
    return (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))


def pathwise_draws(sizes: dict[str, int], draws: int = 4000) -> Tensor:
    """(draws, 3): loss and gradient of minibatches, many at once, because a step is a pure function."""
    guide, x = NormalGuide(), data()
    pair = Pair(normals, guide)
    names = list(pair.parameters())
    generator = torch.Generator().manual_seed(1)
    batches = x[torch.rand(draws, N, generator=generator).argsort(1)[:, :B]]
    eps = torch.randn(draws, generator=generator)

    def one(batch: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return torch.func.grad_and_value(lambda p: pair.loss(p, [batch], [noise], sizes=sizes))(pair.parameters())

    gradients, losses = torch.func.vmap(one)(batches, eps)
    return torch.stack([losses, *(gradients[name] for name in names)], 1).detach()


def test_minibatch_loss_and_gradient_are_unbiased() -> None:
    loss, gradient = closed_form(NormalGuide(), data())
    exact = torch.cat([torch.tensor([loss]), gradient])
    assert z_scores(pathwise_draws({"data": N}), exact).abs().max() < 4.5
    assert z_scores(pathwise_draws({}, 500), exact).abs().max() > 5, "a step without the scale must be seen"


@pytest.mark.parametrize(
    ("loss", "reparameterised"), [(Trace_ELBO(), False), (TraceMeanField_ELBO(), True), (TraceGraph_ELBO(), False)]
)
def test_other_estimators_are_unbiased_too(loss: Any, reparameterised: bool) -> None:
    guide, x = NormalGuide(reparameterised), data()
    pair = Pair(normals, guide, loss)
    parameters = list(pair.parameters().values())
    _, exact = closed_form(guide, x)
    draws = []
    with preserved_rng(2):
        for _ in range(300):
            batch = x[torch.randperm(N)[:B]]
            if hasattr(loss, "differentiable_loss"):
                draws.append(torch.stack(torch.autograd.grad(pair.loss(None, [batch], sizes={"data": N}), parameters)))
            else:
                for p in parameters:
                    p.grad = None
                pair.loss_and_grads([batch], {"data": N}, 1.0, None)
                draws.append(torch.stack([p.grad.clone() for p in parameters if p.grad is not None]))
    assert z_scores(torch.stack(draws), exact).abs().max() < 4.5


def point_loss(model: Callable[..., None], *batch: Tensor, sizes: dict[str, int]) -> float:
    """Without noise the loss is exact: minus the scaled log density at the point."""
    svi = SVI(model, AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_mean), ADAM, sizes=sizes)
    return svi.evaluate_loss(*batch)


def log_normal(x: Tensor, loc: float = 0.0) -> float:
    return float(dist.Normal(loc, 1.0).log_prob(x).sum())


def test_two_data_streams_have_their_own_plates_and_sizes() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)
        with pyro.plate("labelled", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    x, y = data(6), data(4) + 1
    loss = point_loss(model, x, y, sizes={"data": 60, "labelled": 8})
    assert loss == pytest.approx(-(10 * log_normal(x) + 2 * log_normal(y) + log_normal(torch.zeros(()))), rel=1e-5)


def test_a_declared_full_size_is_not_scaled_twice() -> None:
    def declares(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    x = data(10)
    once = -(10 * log_normal(x) + log_normal(torch.zeros(())))
    for sizes in ({"data": 100}, {}):
        assert point_loss(declares, x, sizes=sizes) == pytest.approx(once, rel=1e-5)
    assert point_loss(normals, x, sizes={"data": 100}) == pytest.approx(once, rel=1e-5)
    with pytest.raises(ModelError, match="declares the full size 100, sizes says 200"):
        SVI(declares, AutoDelta(declares), ADAM, sizes={"data": 200}).step(x)


def test_sizes_of_an_unknown_plate() -> None:
    with pytest.raises(ModelError, match=r"sizes names the plate 'rows', which normals does not open .*'data'"):
        SVI(normals, NormalGuide(), ADAM, sizes={"rows": 20}).step(data())


# --- the same numbers as Pyro ----------------------------------------------------------------------------------------


@config_enumerate
def mixture(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


def mixture_guide(x: Tensor) -> None:
    loc = pyro.param("loc_q", torch.tensor([-1.0, 1.0]))
    pyro.sample("loc", dist.Normal(loc, 0.1).to_event(1))


LOSSES = [
    (normals, NormalGuide, Trace_ELBO(num_particles=3)),
    (normals, NormalGuide, Trace_ELBO(num_particles=3, vectorize_particles=True)),
    (normals, partial(NormalGuide, False), Trace_ELBO()),
    (normals, NormalGuide, TraceMeanField_ELBO()),
    (normals, NormalGuide, TraceGraph_ELBO()),
    (normals, NormalGuide, RenyiELBO(alpha=0.0, num_particles=4)),
    (mixture, lambda: mixture_guide, TraceEnum_ELBO()),
]


@pytest.mark.parametrize(("model", "make", "loss"), LOSSES, ids=lambda v: type(v).__name__)
def test_every_loss_of_pyro_gives_pyro_s_numbers(model: Any, make: Any, loss: Any) -> None:
    x = data(12)
    mine, stock = make(), make()
    svi = SVI(model, mine, ADAM, loss, warm=3)
    svi.prepare(x)
    with preserved_rng(4):
        a = [svi.step(x) for _ in range(12)]
    with pyro.get_param_store().scope(), preserved_rng():
        reference = pyro.infer.SVI(model, stock, pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 1e-2}), loss)
        reference.evaluate_loss(x)  # some losses draw once to guess the plates
        torch.manual_seed(4)
        b = [reference.step(x) for _ in range(12)]
    assert a == pytest.approx(b, rel=1e-4)
    assert a[-1] != pytest.approx(a[0], rel=1e-6)


def test_a_vectorised_loss_can_be_reused_for_another_model() -> None:
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True)
    SVI(normals, NormalGuide(), ADAM, loss).step(data())
    model, batch = vae.example()
    deep = Trace_ELBO(num_particles=4, vectorize_particles=True)
    with preserved_rng(0):
        guide = Joint(model, *batch)
    a, b = (SVI(model, guide, ADAM, one) for one in (loss, deep))
    with preserved_rng(0):
        first = a.evaluate_loss(*batch)
    with preserved_rng(0):
        assert b.evaluate_loss(*batch) == pytest.approx(first, rel=1e-6)


def test_score_function_guide_trains() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2 * k, 2.0), obs=x)

    class Guess(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.p = PyroParam(torch.tensor(0.5), dist.constraints.unit_interval)

        def forward(self, x: Tensor) -> None:
            pyro.sample("k", dist.Bernoulli(self.p))

    guide, x = Guess(), torch.full((4,), 2.0)
    loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, partial(torch.optim.Adam, lr=0.1), loss, compile="trace", warm=5)
    with preserved_rng(0):
        for _ in range(60):
            svi.step(x)
    assert float(guide.p.detach()) == pytest.approx(1 / (1 + math.exp(-2.0)), abs=0.08)
    assert svi.fallback is not None


# --- traced and eager ------------------------------------------------------------------------------------------------


def run(compile: Any, steps: int = 30) -> tuple[SVI, list[float], list[Tensor]]:
    """Thirty steps over batches of 8, 8 and 4, with clipping, a schedule and KL warm-up."""
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, family=FullNormal)
    svi = SVI(model, guide, partial(torch.optim.Adam, lr=1e-2), sizes={"data": 20}, clip=20.0, compile=compile, warm=2)
    svi.prepare(x[:8])
    schedule = torch.optim.lr_scheduler.ExponentialLR(svi.optimiser, 0.9)
    losses = []
    with preserved_rng(7):
        for step in range(steps):
            part = slice(8 * (step % 3), 8 * (step % 3) + 8)
            losses.append(svi.step(x[part], rows=torch.arange(20)[part], kl_weight=min(1.0, (step + 1) / 10)))
            schedule.step()
    return svi, losses, [p.detach().clone() for p in svi.parameters.values()]


def test_traced_steps_are_the_eager_ones() -> None:
    svi, traced, parameters = run("trace")
    _, eager, expected = run(False)
    assert svi.fallback is None and len(svi._graphs) == 2, "one graph for each batch shape"
    assert traced == pytest.approx(eager, rel=1e-4)
    for a, b in zip(parameters, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_program_whose_control_flow_depends_on_values_stays_eager() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2 * m if m > 0 else m, 1.0), obs=x)

    x = data()
    a, b = (SVI(model, NormalGuide(), ADAM, compile=kind, warm=1) for kind in ("trace", False))
    for svi in (a, b):
        svi.prepare(x)
    with preserved_rng(0):
        first = [a.step(x) for _ in range(5)]
    with preserved_rng(0):
        assert first == pytest.approx([b.step(x) for _ in range(5)])
    assert a.fallback is not None


def test_batch_normalisation_moves_once_a_step() -> None:
    class Normalised(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.norm(x).sum(-1) + m, 1.0), obs=x.sum(-1))

    x = 3 + torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    moments = []
    for kind in ("trace", False):
        model = Normalised()
        svi = SVI(model, NormalGuide(), ADAM, compile=kind, warm=2)
        with preserved_rng(0):
            svi.prepare(x)
            model.norm.reset_running_stats()
            for _ in range(6):
                svi.step(x)
        moments.append((int(model.norm.num_batches_tracked), model.norm.running_mean.clone()))
    assert moments[0][0] == moments[1][0] == 6
    assert torch.allclose(moments[0][1], moments[1][1])


# --- everything that can be trained is -------------------------------------------------------------------------------


def test_every_parameter_of_a_lazy_guide_moves() -> None:
    class Weighted(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.net(x).squeeze(-1) + m, 1.0), obs=x.sum(-1))

    model = Weighted()
    svi = SVI(model, AutoNormal(model), ADAM)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    svi.prepare(x)
    before = {name: p.detach().clone() for name, p in svi.parameters.items()}
    assert len(before) == 4
    for _ in range(5):
        svi.step(x)
    for name, p in svi.parameters.items():
        assert not torch.equal(p, before[name]), f"{name} has not moved"


def test_a_fresh_guide_does_not_start_where_another_ended() -> None:
    x = data()
    first, second = AutoNormal(normals), AutoNormal(normals)
    svi = SVI(normals, first, partial(torch.optim.Adam, lr=0.1))
    start = svi.evaluate_loss(x)
    for _ in range(50):
        svi.step(x)
    with preserved_rng(0):
        end = svi.evaluate_loss(x)
        assert SVI(normals, second, ADAM).evaluate_loss(x) > end + 1
    assert start > end


def test_free_parameters_of_absent_rows_stay() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, rows = data(8), torch.tensor([1, 5])
    guide = Free(model, x)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    svi = SVI(model, guide, ADAM, sizes={"data": 8})
    svi.step(x[rows], rows=rows)
    for name, p in guide.named_parameters():
        moved = (p != before[name]).reshape(8, -1).any(1)
        assert moved.nonzero().flatten().tolist() == [1, 5], name
    with pytest.raises(GuideError, match="holds parameters for 8 rows and sees 2 without knowing which"):
        svi.step(x[rows])


def test_modules_that_a_function_calls_are_trained() -> None:
    first, second = NormalGuide(), NormalGuide(site="k")

    def model(x: Tensor, y: Tensor) -> None:
        normals(x)
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        with pyro.plate("more", len(y)):
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        first(x)
        second(y)

    svi = SVI(model, guide, ADAM)
    for _ in range(2):
        svi.step(data(5), data(5))
    assert len(svi.parameters) == 4
    for module in (first, second):
        assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), NormalGuide().parameters(), strict=True))


def local_normals(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_autoguides_with_parameters_for_each_row_are_refused_in_minibatches() -> None:
    """Batches of 8 and 8: Pyro trains the first 8 rows' parameters on all others too, and says nothing."""

    def declared(x: Tensor) -> None:
        with pyro.plate("data", 16, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    told = "'z' is one for each row .*AutoNormal holds parameters for 8 rows of 16"
    for model, sizes in ((local_normals, {"data": 16}), (declared, {}), (declared, {"data": 16})):
        with pytest.raises(GuideError, match=told):
            SVI(model, AutoNormal(model), ADAM, sizes=sizes).step(data(8))
    assert math.isfinite(SVI(local_normals, AutoNormal(local_normals), ADAM).step(data(8)))


def test_factors_need_no_value() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("x", -0.5 * (x - m) ** 2 - 0.5 * math.log(2 * math.pi))

    x = data(8)
    assert point_loss(model, x, sizes={"data": 80}) == pytest.approx(
        point_loss(normals, x, sizes={"data": 80}), rel=1e-5
    )


def test_a_parameter_shared_by_name() -> None:
    def model(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(2.0), constraint=dist.constraints.positive)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, s), obs=x)

    def guide(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), s))

    svi = SVI(model, guide, ADAM)
    svi.prepare(data())
    assert sorted(name.rsplit(".", 1)[1] for name in svi.parameters) == ["loc", "s"]


# --- misfits: an error before the first step, and no step ------------------------------------------------------------


def local_model(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("location", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x)


def local_guide(
    scale: Any = None, name: str = "location", size: int = 2, plate: bool = True, extra: str | None = None
) -> Callable[..., None]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("scale", scale(loc) if scale is not None else dist.LogNormal(loc, 1.0))
        if extra is not None:
            pyro.sample(extra, dist.Normal(loc, 1.0))
        if name and plate:
            with pyro.plate("data", len(x)):
                pyro.sample(name, dist.Normal(torch.zeros(size) + loc, 1.0).to_event(1))
        elif name:
            pyro.sample(name, dist.Normal(torch.zeros(len(x), size) + loc, 1.0).to_event(2))

    return guide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, r"does not sample the latent 'location' of local_model: add it"),
        ({"name": "locaton"}, r"does not sample the latent 'location' .*did you mean 'locaton'"),
        ({"extra": "locatio"}, r"samples 'locatio', which does not exist .*did you mean 'location'"),
        ({"extra": "x"}, r"samples 'x', which is observed"),
        ({"size": 3}, r"gives 'location' the shape \(5, 3\), the model \(5, 2\)"),
        ({"scale": lambda loc: dist.Normal(loc - 50, 1.0)}, r"'scale' values outside the model's support \(positive\)"),
        ({"scale": lambda loc: dist.Normal(loc + 50, 1.0)}, r"'scale' with support real, the model with positive"),
        ({"plate": False}, r"open pyro.plate\(\"data\", len\(x\)\)|gives 'location' the shape"),
    ],
)
def test_guides_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    svi = SVI(local_model, local_guide(**options), ADAM)
    with pytest.raises(GuideError, match=message):
        svi.step(data(5))
    assert svi.steps == 0 and svi.optimiser is None


def test_the_guide_that_fits() -> None:
    svi = SVI(local_model, local_guide(), ADAM)
    assert math.isfinite(svi.step(data(5))) and svi.steps == 1


def test_auxiliary_sites_are_the_guide_s_own_affair() -> None:
    def guide(x: Tensor) -> None:
        local_guide()(x)
        pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    assert math.isfinite(SVI(local_model, guide, ADAM).step(data(5)))


def test_discrete_latent_that_nobody_serves() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"latent 'k' of .* is discrete .*TraceEnum_ELBO"):
        SVI(model, NormalGuide(), ADAM).step(data())


def test_nothing_to_train() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(GuideError, match=r"nothing to train: guide .*guide and its model have 0 parameters"):
        SVI(normals, guide, ADAM).step(data())


def test_nothing_observed() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="observes nothing"):
        SVI(model, NormalGuide(), ADAM).step(data())


def test_column_targets_against_flat_ones() -> None:
    """(N, 1) against (N,): broadcast, it would be N x N terms."""

    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 1), pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * m, 1.0).to_event(0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    with pytest.raises((DataError, ValueError), match=r"(?i)shape"):
        SVI(model, guide, ADAM).step(data(5), data(5)[:, None])


def test_grey_pixels_in_a_bernoulli() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x)
    with pytest.raises(DataError, match="x"):
        SVI(model, guide, ADAM).step(x * 0.5)


def test_unregistered_parameter_is_named() -> None:
    weights = nn.Parameter(torch.zeros(2))
    network = nn.Linear(1, 1)

    def bare(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(weights[0] + pyro.param("a", torch.zeros(())), 1.0))

    def hidden(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(network(x[:1]).squeeze() + pyro.param("a", torch.zeros(())), 1.0))

    with pytest.raises(ModelError, match=r"shape \(2,\) .*never be trained \(it is 'weights'\)"):
        SVI(normals, bare, ADAM).step(data())
    with pytest.raises(ModelError, match=r"never be trained \(it is network.(weight|bias)\)"):
        SVI(normals, hidden, ADAM).step(data())


def test_optimisers() -> None:
    guide, x = NormalGuide(), data()
    partly = torch.optim.SGD([guide.loc], lr=0.1)
    with pytest.raises(GuideError, match=r"does not hold 'guide.log_scale'"):
        SVI(normals, guide, partly).step(x)
    ready = torch.optim.SGD(guide.parameters(), lr=1e-3)
    before = guide.loc.detach().clone()
    svi = SVI(normals, guide, ready)
    svi.step(x)
    assert svi.optimiser is ready and not torch.equal(before, guide.loc)
    pyros = SVI(normals, NormalGuide(), pyro.optim.PyroOptim(torch.optim.Adagrad, {"lr": 0.5}))
    pyros.step(x)
    assert isinstance(pyros.optimiser, torch.optim.Adagrad) and pyros.optimiser.param_groups[0]["lr"] == 0.5
    lr_of = lambda name: {"lr": 0.1 if name == "loc" else 0.2}  # noqa: E731
    each = SVI(normals, NormalGuide(), pyro.optim.PyroOptim(torch.optim.Adam, lr_of))
    each.step(x)
    assert sorted(g["lr"] for g in each.optimiser.param_groups) == [0.1, 0.2]
    with pytest.raises(OptionError, match="give clip="):
        SVI(normals, NormalGuide(), pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.1}, {"clip_norm": 1.0})).step(x)
    for wrong in ("adam", 3, lambda parameters: "no"):
        with pytest.raises(OptionError, match="expected a"):
            SVI(normals, NormalGuide(), wrong).step(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "jit"}, "compile is 'jit'"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": -1}, "clip is -1"),
        ({"clip": math.nan}, "clip is nan"),
        ({"sizes": {"data": 0}}, r"sizes\['data'\] is 0"),
        ({"sizes": {"data": 2.5}}, r"sizes\['data'\] is 2.5"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SVI(normals, NormalGuide(), ADAM, **options)


def test_classes_and_keywords() -> None:
    with pytest.raises(GuideError, match="guide is the class NormalGuide"):
        SVI(normals, NormalGuide, ADAM)
    with pytest.raises(OptionError, match="keyword 'x'"):
        SVI(normals, NormalGuide(), ADAM).step(x=data())
    with pytest.raises(DataError, match="tensors and hashable values"):
        guide = NormalGuide()
        SVI(lambda x, more: normals(x), lambda x, more: guide(x), ADAM).step(data(), {"a": []})


# --- values that are not finite --------------------------------------------------------------------------------------


class Fragile(PyroModule):
    """Its gradient, not its value, is NaN where the data are all zero: d sqrt(0)."""

    def forward(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((m * x.sum()).square().sqrt(), 1.0), obs=x)


@pytest.mark.parametrize("compile", [False, "trace"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_nan_stops_with_the_last_good_parameters(compile: Any, clip: float | None, fault: str) -> None:
    guide, x = NormalGuide(), data()
    svi = SVI(Fragile(), guide, ADAM, compile=compile, clip=clip, warm=2)
    for _ in range(6):
        svi.step(x)
    good = [p.detach().clone() for p in guide.parameters()]
    state = {key: value.clone() for key, value in svi.optimiser.state[guide.loc].items()}
    bad = x.clone() if fault == "loss" else torch.zeros_like(x)
    if fault == "loss":
        bad[[3, 7]] = math.nan
    with pytest.raises(TrainingError) as error:
        svi.step(bad, rows=100 + torch.arange(len(x)))
    message = str(error.value)
    assert message.startswith("step 7: ")
    if fault == "loss":
        assert ("the loss is nan" in message and "'x' of the model" in message and "rows [103, 107]" in message) or (
            "'x' of the model" in message
        )
    else:
        assert "the gradient is not finite" in message and "'guide.loc'" in message
    for was, now in zip(good, guide.parameters(), strict=True):
        assert torch.equal(was, now)
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(svi.optimiser.state[guide.loc][k])) for k, v in state.items()
    )
    assert svi.steps == 6 and math.isfinite(svi.step(x)), "and it can go on"


@pytest.mark.parametrize("compile", [False, "trace"])
def test_rows_of_a_site_that_is_not_finite_are_named(compile: Any) -> None:
    guide, x = NormalGuide(), data()
    svi = SVI(normals, guide, ADAM, compile=compile, warm=2)
    for _ in range(4):
        svi.step(x)
    bad = x.clone()
    bad[[3, 7]] = math.inf
    with pytest.raises(
        TrainingError, match=r"step 5: the loss is inf; first site .* 'x' of the model .*rows \[103, 107\]"
    ):
        svi.step(bad, rows=100 + torch.arange(len(x)))
