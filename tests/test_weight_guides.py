"""Guides for network weights: exact cases, the objective of each, contracts, replicas, and bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import dgm
from dgm.bounds import importance_bound
from dgm.errors import GuideError, ModelError, OptionError
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.dropout import Dropout
from dgm.guides.full_normal import FullNormal
from dgm.guides.joint import Joint
from dgm.guides.layers import layers_of
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.guides.matrix_normal import MatrixNormal, nearest_to_square
from dgm.guides.multiplicative_flow import MultiplicativeFlow, Reverse
from dgm.guides.per_layer import PerLayer
from dgm.guides.point import Point
from dgm.guides.radial_normal import RadialNormal
from dgm.guides.rank_one import RankOne
from dgm.models import bayesian_linear_regression, bnn, linear_vae
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.bnn import BNN
from dgm.programs import isolated, preserved_rng
from dgm.sites import latents
from dgm.starting import start_pair
from dgm.testing import ContractError, check_exact, check_family, check_pair

Guide = Callable[..., Any]

ATTACH: dict[str, Guide] = {
    "per layer, full": PerLayer,
    "per site, diagonal": partial(PerLayer, family=DiagonalNormal, by="site"),
    "per layer, matrix": partial(PerLayer, family=MatrixNormal),
    "per layer, radial": partial(PerLayer, family=RadialNormal),
    "last layer": partial(PerLayer, family={"network.2": MatrixNormal, "*": Point}),
    "dropout": Dropout,
    "rank one": RankOne,
    "rank one, mixture": partial(RankOne, components=3),
    "multiplicative flow": partial(MultiplicativeFlow, hidden=(8,)),
}
BOUNDS = ["per layer, full", "per site, diagonal", "per layer, matrix", "per layer, radial", "multiplicative flow"]

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
Y = torch.sin(X[:, 0])


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network() -> BNN:
    return BNN(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)))


def run(guide: Any, batch: tuple[Any, ...], seed: int | None = None) -> poutine.Trace:
    with isolated(), preserved_rng(seed) if seed is not None else preserved_rng(None):
        return poutine.trace(guide).get_trace(*batch)


def draw(guide: Any, batch: tuple[Any, ...], seed: int) -> dict[str, Tensor]:
    with isolated(), preserved_rng(seed), torch.no_grad():
        return guide(*batch)


def log_q(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    return sum(n["log_prob_sum"] for n in trace.nodes.values() if n["type"] == "sample")  # type: ignore[misc]


# --- contracts -------------------------------------------------------------------------------------------------------


TRACED = ["per layer, matrix", "last layer", "dropout", "rank one, mixture", "multiplicative flow"]
"""One of each kind is traced by default, all of them in the slow tests."""


@pytest.mark.parametrize("name", ATTACH)
def test_pair(name: str) -> None:
    served_pair(name, bnn.example, "trace" if name in TRACED else False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTACH if name not in TRACED])
def test_traced_pair(name: str) -> None:
    served_pair(name, bnn.example)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACH)
def test_pair_of_a_classifier(name: str) -> None:
    served_pair(name, bnn.example_classification)


def served_pair(name: str, make: Callable[[], Any], compile: Literal[False, "trace"] = "trace") -> None:
    model, batch = make()
    guide = ATTACH[name](model, *batch)
    for site in latents(model, *batch).values():
        assert draw(guide, batch, 0)[site.name].shape == site.shape
    check_pair(model, guide, *batch, steps=8, compile=compile)


@pytest.mark.parametrize("name", BOUNDS)
def test_pair_with_known_evidence(name: str) -> None:
    model, batch = bayesian_linear_regression.example()
    guide = ATTACH[name](model, *batch)  # traced in test_pair and test_traced_pair
    check_pair(model, guide, *batch, steps=8, compile=False, log_evidence=model.log_evidence(*batch))


@pytest.mark.parametrize("family", [MatrixNormal, partial(MatrixNormal, full=0), RadialNormal])
def test_families(family: Guide) -> None:
    check_family(family, features=(1, 2, 4, 6))


@pytest.mark.parametrize("name", ATTACH)
def test_state_and_copies(name: str) -> None:
    model, batch = bnn.example()
    first = ATTACH[name](model, *batch)
    twin, second = copy.deepcopy(first), ATTACH[name](model, *batch)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second.load_state_dict(first.state_dict())
    a, b, c = (draw(guide, batch, 5) for guide in (first, second, twin))
    assert all(torch.equal(a[site], b[site]) for site in a)
    assert not torch.equal(a["network.0.bias"], c["network.0.bias"]), "the copy shares its parameters"


@pytest.mark.parametrize("name", ["per layer, matrix", "dropout"])
@pytest.mark.slow
def test_a_replica_is_the_single_run_with_its_seed(name: str) -> None:
    fits = dgm.fit(network, ATTACH[name], X, Y, steps=5, batch_size=16, replicas=2, compile="trace")
    assert all(fit.error is None for fit in fits)
    model, guide = start_pair(network, ATTACH[name], 1, (X, Y))
    single = dgm.fit(model, guide, X, Y, steps=5, batch_size=16, seed=1, compile=False)
    theirs = dict(single.guide.named_parameters())
    for parameter, value in fits[1].guide.named_parameters():
        assert torch.allclose(value, theirs[parameter], atol=2e-5, rtol=1e-4), parameter


# --- matrix normal and radial ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [256, 3, 0])
@pytest.mark.parametrize("context", [0, 3])
def test_matrix_normal_is_the_normal_of_a_kronecker_product(full: int, context: int) -> None:
    family = MatrixNormal(12, context, shape=(3, 4), full=full).double()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    q = family(torch.randn(5, 3).double() if context else None)
    exact = MultivariateNormal(q.mean, q.covariance_matrix)
    x = torch.randn(6, *q.batch_shape, 12).double()
    assert torch.allclose(q.log_prob(x), exact.log_prob(x))
    assert torch.allclose(q.variance, exact.variance)
    for b in range(5 if context else 0):
        assert torch.allclose(exact.covariance_matrix[b], torch.kron(q.row_covariance[b], q.column_covariance[b]))
    draws = q.rsample((20_000,))
    off = draws - q.mean
    sample = torch.einsum("s...i,s...j->...ij", off, off) / len(draws)
    scale = (exact.variance.unsqueeze(-1) * exact.variance.unsqueeze(-2)).sqrt()
    assert ((sample - exact.covariance_matrix) / scale).abs().max() < 4.5 * math.sqrt(2 / len(draws)) + 1e-9
    wrong = torch.kron(q.column_covariance.flatten(0, -3)[0], q.row_covariance.flatten(0, -3)[0]) if context else None
    assert wrong is None or not torch.allclose(wrong, exact.covariance_matrix[0], rtol=0.1)


@pytest.mark.parametrize("context", [0, 3])
def test_matrix_normal_starts_as_the_diagonal_normal(context: int) -> None:
    family, diagonal = MatrixNormal(12, context), DiagonalNormal(12)
    told = torch.zeros(1, context) if context else None
    for scale in (None, 0.3, torch.outer(torch.rand(3) + 0.1, torch.rand(4) + 0.1).flatten()):
        loc = torch.randn(12)
        family.initialise(loc, scale)
        diagonal.initialise(loc, (1.0 if context else 0.1) if scale is None else scale)
        x = diagonal().sample((7, 1) if context else (7,))
        assert torch.allclose(family(told).log_prob(x), diagonal().log_prob(x), atol=1e-3)
    assert family.shape == (3, 4) == nearest_to_square(12) and MatrixNormal(7).shape == (1, 7)


@pytest.mark.parametrize("features", [1, 2, 6])
def test_radial_moments_and_distances(features: int) -> None:
    family = RadialNormal(features).double()
    loc, scale = torch.randn(features).double(), torch.rand(features).double() + 0.5
    family.initialise(loc, scale)
    q, n = family(), 40_000
    x = q.sample((n,))
    assert torch.allclose(q.variance, scale.square()) and torch.allclose(q.mean, loc)
    z = (x - loc) / scale
    fourth = 3.0 * features / (features + 2) * 3  # E z^4 = d^2 E u^4 E r^4, E u^4 = 3 / (d (d + 2))
    assert (z.mean(0).abs() < 4.5 / math.sqrt(n)).all()
    assert ((z.square().mean(0) - 1).abs() < 4.5 * math.sqrt((fourth - 1) / n)).all()
    distance = (z.square().sum(-1) / features).sqrt()  # half normal, however many weights
    assert abs(float(distance.mean()) - math.sqrt(2 / math.pi)) < 4.5 * math.sqrt((1 - 2 / math.pi) / n)
    if features == 1:
        assert torch.allclose(q.log_prob(x), dist.Normal(loc, scale).log_prob(x).sum(-1))


# --- by layer --------------------------------------------------------------------------------------------------------


def two_sites(x: Tensor, y: Tensor) -> None:
    """The linear regression with its weights in one site and its intercept in another: a block for each is exact
    where the columns of the design are orthogonal."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1) + b, x.new_tensor(0.5)), obs=y)


def set_exactly(family: Any, posterior: Any, at: slice) -> None:
    tril = torch.linalg.cholesky(posterior.covariance_matrix[at, at])
    diagonal = tril.diagonal()
    with torch.no_grad():
        family.loc.bias.copy_(posterior.mean[at])
        family.log_scale.bias.copy_(diagonal.log())
        if len(diagonal) > 1:
            row, column = torch.tril_indices(len(diagonal), len(diagonal), -1)
            family.lower.bias.copy_((tril / diagonal[:, None])[row, column])


def test_blocks_reach_the_exact_posterior() -> None:
    regression, (x, y) = bayesian_linear_regression.example()
    x, y = x.double(), y.double()
    guide = PerLayer(regression, x, y, by="site").double()
    set_exactly(guide.families["w"], regression.posterior(x, y), slice(0, 3))
    check_exact(regression, guide, x, y, log_evidence=regression.log_evidence(x, y))
    with torch.no_grad():
        guide.families["w"].lower.bias.mul_(0.9)
    with pytest.raises(ContractError, match="the log weight is"):
        check_exact(regression, guide, x, y, log_evidence=regression.log_evidence(x, y))

    x = x - x.mean(0)  # the intercept is then independent of the weights, which depend on each other
    guide = PerLayer(two_sites, x, y, by="site").double()
    posterior = regression.posterior(x, y)
    set_exactly(guide.families["w"], posterior, slice(0, 2))
    set_exactly(guide.families["b"], posterior, slice(2, 3))
    assert abs(posterior.covariance_matrix[0, 1]) > 1e-4
    check_exact(two_sites, guide, x, y, log_evidence=regression.log_evidence(x, y))


def test_layers_and_their_matrices() -> None:
    model = BNN(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 1, bias=False)))
    batch = torch.randn(6, 2, 4, 4), torch.randn(6)
    layers = {layer.name: layer for layer in layers_of(latents(model, *batch).values(), "layer")}
    shapes = {name: layer.shape for name, layer in layers.items()}
    expected = {"network.0": (4, 19), "network.2": None, "network.3": (1, 16), "noise_scale": None}
    assert shapes == expected
    guide = PerLayer(model, *batch, family=MatrixNormal)
    assert guide.families["network|0"].shape == (4, 19) and guide.families["network|2"].shape == (4, 8)
    start = draw(PerLayer(model, *batch, family=MatrixNormal, init_scale=1e-6), batch, 0)
    for name, value in model.init_values().items():
        assert torch.allclose(start[name], value, atol=1e-4), name
    for other in (Dropout, RankOne, MultiplicativeFlow):
        values = draw(other(model, *batch), batch, 0)
        assert values["network.0.weight"].shape == (4, 2, 3, 3)


def test_rows_and_columns_of_a_layer_are_those_of_its_matrix() -> None:
    """Outputs and inputs have their own scale; the bias is the last column."""
    model, batch = bnn.example()
    guide = PerLayer(model, *batch, family=MatrixNormal, init_scale=1.0)
    family = guide.families["network|0"]
    rows, columns = torch.arange(1.0, 9), torch.tensor([1.0, 10.0, 100.0, 1000.0])
    family.initialise(torch.zeros(32), torch.outer(rows, columns).flatten())
    draws = [draw(guide, batch, seed) for seed in range(400)]
    weight = torch.stack([d["network.0.weight"] for d in draws]).std(0)
    bias = torch.stack([d["network.0.bias"] for d in draws]).std(0)
    tolerance = 4.5 / math.sqrt(800)
    assert ((weight / torch.outer(rows, columns[:3])).log().abs() < tolerance).all()
    assert ((bias / (1000.0 * rows)).log().abs() < tolerance).all()


def test_families_by_pattern() -> None:
    model, batch = bnn.example()
    guide = PerLayer(model, *batch, family={"network.2": FullNormal, "network.*": Point})
    kinds = {name: type(family) for name, family in guide.families.items()}
    assert kinds == {"network|0": Point, "network|2": FullNormal, "noise_scale": DiagonalNormal}
    assert not guide.has_density and PerLayer(model, *batch).has_density
    a, b = (draw(guide, batch, seed) for seed in (1, 2))
    assert torch.equal(a["network.0.weight"], b["network.0.weight"])
    assert not torch.equal(a["network.2.weight"], b["network.2.weight"])
    joint = Joint(model, *batch, global_=partial(PerLayer, family=LowRankNormal))
    assert set(draw(joint, batch, 0)) == set(latents(model, *batch))


# --- dropout and rank one --------------------------------------------------------------------------------------------


def test_dropout_masks_inputs_of_all_layers_but_the_first() -> None:
    model, batch = bnn.example()
    guide, n, rate = Dropout(model, *batch, rate=0.3), 400, 0.3
    draws = [draw(guide, batch, seed) for seed in range(n)]
    own = model.init_values()
    for name in ("network.0.weight", "network.0.bias", "network.2.bias", "noise_scale"):
        assert all(torch.allclose(d[name], own[name], atol=1e-6) for d in draws), f"{name} is not a point"
    ratio = torch.stack([d["network.2.weight"] for d in draws]) / own["network.2.weight"]  # (n, 1, 8)
    assert ((ratio == 0) | (ratio - 1 / (1 - rate)).abs().lt(1e-5)).all()
    error = math.sqrt(rate * (1 - rate) / n)
    assert ((ratio == 0).float().mean(0) - rate).abs().max() < 4.5 * error
    both = Dropout(model, *batch, rate=0.3, inputs=True)
    column = draw(both, batch, 3)["network.0.weight"] == 0
    assert (column.all(0) | ~column.any(0)).all(), "an input is off for all outputs or for none"
    off = torch.stack([draw(both, batch, seed)["network.0.weight"][0] == 0 for seed in range(n)]).float().mean(0)
    assert (off - rate).abs().max() < 4.5 * error


def test_dropout_objective_is_the_expected_joint() -> None:
    """By enumeration of the masks of two inputs: E_m[log p(y | w) + log p(w)]."""
    model = BNN(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)))
    guide, rate, n = Dropout(model, X, Y, rate=0.25), 0.25, 1500
    own, exact, second = model.init_values(), 0.0, 0.0
    for mask in torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0)):
        values = own | {"network.2.weight": own["network.2.weight"] * mask / (1 - rate)}
        with isolated(), torch.no_grad():
            joint = float(poutine.trace(poutine.condition(model, values)).get_trace(X, Y).log_prob_sum())
        weight = float(torch.where(mask > 0, 1 - rate, rate).prod())
        exact, second = exact + weight * joint, second + weight * joint**2
    bounds = dgm.log_weights(model, guide, X, Y, num_samples=n)
    assert abs(float(bounds.mean()) - exact) < 4.5 * math.sqrt((second - exact**2) / n)


@pytest.mark.parametrize("components", [1, 3])
def test_rank_one_counts_the_kl_of_its_factors(components: int) -> None:
    model, batch = bnn.example()
    guide = RankOne(model, *batch, components=components, prior_scale=0.2, init_scale=0.1)
    with torch.no_grad():
        for factors in guide.factors.values():
            factors.mean.add_(0.05 * torch.randn_like(factors.mean))
    with torch.no_grad():
        kl = sum(
            kl_divergence(dist.Normal(f.mean, f.log_scale.exp()), dist.Normal(1.0, 0.2)).sum() / components
            for f in guide.factors.values()
        )
        estimates = torch.stack([log_q(run(guide, batch, seed)) for seed in range(400)])
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean() - kl)) < 4.5 * error


def test_rank_one_multiplies_rows_and_columns() -> None:
    model, batch = bnn.example()
    guide = RankOne(model, *batch, components=4, init_scale=1e-6)
    own, seen = model.init_values(), set()
    for seed in range(60):
        trace = run(guide, batch, seed)
        ratio = trace.nodes["network.0.weight"]["value"] / own["network.0.weight"]  # (8, 3)
        singular = torch.linalg.svdvals(ratio.detach())
        assert singular[1] < 1e-4 * singular[0]
        means = [guide.factors[name] for name in ("network|0|weight", "network|2|weight")]
        values = [trace.nodes[f"_global_network.{i}.weight"]["value"] for i in (0, 2)]
        which = [int((f.mean - v).abs().sum(-1).argmin()) for f, v in zip(means, values, strict=True)]
        assert which[0] == which[1], "a draw is one component in all layers"
        seen.add(which[0])
    assert seen == {0, 1, 2, 3}


# --- multiplicative flow ---------------------------------------------------------------------------------------------


def trained_flow() -> tuple[BayesianLinearRegression, tuple[Tensor, ...], Any]:
    model, batch = bayesian_linear_regression.example()
    guide = MultiplicativeFlow(model, *batch, hidden=(8,))
    dgm.fit(model, guide, *batch, steps=500, lr=1e-2, seed=0, compile="trace")
    return model, batch, guide


def test_weights_of_the_extended_space_average_to_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, guide = trained_flow()
    evidence, n = float(model.log_evidence(*batch)), 4000
    lw = dgm.log_weights(model, guide, *batch, num_samples=n)
    ratio = (lw.double() - evidence).exp()
    error = float(ratio.std()) / math.sqrt(n)
    assert error < 0.1 and abs(float(ratio.mean()) - 1) < 4.5 * error
    elbo, spread = float(lw.mean()), float(lw.std()) / math.sqrt(n)
    assert evidence - 1.0 < elbo < evidence + 4.5 * spread
    assert float(importance_bound(lw[:, None])) > elbo

    whole = Reverse.forward  # the mutant: a determinant left out
    monkeypatch.setattr(Reverse, "forward", lambda self, z, w: whole(self, z, w) + self.log_scale.sum())
    lost = dgm.log_weights(model, guide, *batch, num_samples=200)
    assert abs(float((lost.double() - evidence).exp().mean()) - 1) > 0.5


def test_reverse_model_is_a_density_of_z() -> None:
    reverse = Reverse(2, 2, (8,), 1.0).double()
    with torch.no_grad():
        for parameter in reverse.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        axis = torch.linspace(-15, 15, 601).double()
        z = torch.cartesian_prod(axis, axis)
        total = reverse(z, torch.randn(4, 2, 1).double()).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=2e-3)


# --- bad input -------------------------------------------------------------------------------------------------------

EVERY = [PerLayer, Dropout, RankOne, MultiplicativeFlow]


@pytest.mark.parametrize("attach", EVERY)
def test_local_and_discrete_latents_and_unknown_names_are_refused(attach: Guide) -> None:
    with pytest.raises(GuideError, match=r"'z' is one for each row .* " + attach.__name__):
        attach(*_flat(linear_vae.example()))

    def choice(x: Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)

    with pytest.raises(ModelError, match="'k' is discrete"):
        attach(choice, torch.zeros(4))
    model, batch = bnn.example()
    with pytest.raises(GuideError, match=r"network.0.weights.*did you mean 'network.0.weight'"):
        attach(model, *batch, sites=["network.0.weights"])


def _flat(example: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    return example[0], *example[1]


@pytest.mark.parametrize("attach", [Dropout, RankOne])
def test_a_model_without_matrices_is_refused(attach: Guide) -> None:
    with pytest.raises(GuideError, match=r"none of the latents \['w'\] is a real matrix"):
        attach(*_flat(bayesian_linear_regression.example()))


def test_a_model_of_scalars_is_refused() -> None:
    model, batch = bnn.example()
    with pytest.raises(GuideError, match="real matrix, \\(outputs, inputs\\), or a vector"):
        MultiplicativeFlow(model, *batch, sites=["noise_scale"])
    with pytest.raises(GuideError, match="inputs=True"):
        Dropout(model, *batch, sites=["network.0.weight", "network.0.bias"])


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(OptionError, match=r"rate is .*, expected 0 <= rate < 1"):
        Dropout(*_flat(bnn.example()), rate=rate)


@pytest.mark.parametrize("shape", [(3, 3), (12,), (2, 3, 2), (0, 12)])
def test_shape_holds_the_features(shape: Any) -> None:
    with pytest.raises(OptionError, match=r"does not hold features = 12 .* leave it out for \(3, 4\)"):
        MatrixNormal(12, shape=shape)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (partial(MatrixNormal, 2, scale=0.0), "scale must be positive"),
        (partial(MatrixNormal, 2, full=-1), "full must be at least 0"),
        (partial(RadialNormal, 2, scale=math.inf), "scale must be positive"),
        (partial(RankOne, *_flat(bnn.example()), components=0), "components must be at least 1"),
        (partial(RankOne, *_flat(bnn.example()), prior_scale=0.0), "prior_scale must be positive"),
        (partial(MultiplicativeFlow, *_flat(bnn.example()), z_scale=-1.0), "z_scale must be positive"),
        (partial(MultiplicativeFlow, *_flat(bnn.example()), transforms=0), "transforms must be at least 1"),
        (partial(PerLayer, *_flat(bnn.example()), by="block"), "expected 'layer' or 'site'"),
    ],
)
def test_options(make: Guide, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        make()


def test_patterns_and_sizes_are_checked() -> None:
    model, batch = bnn.example()
    with pytest.raises(GuideError, match=r"'network.3' matches no layer: did you mean"):
        PerLayer(model, *batch, family={"network.3": FullNormal})
    wide = BNN(nn.Sequential(nn.Linear(100, 60), nn.ReLU(), nn.Linear(60, 1)))
    told = r"'network.0' has 6060 entries .* use LowRankNormal or MatrixNormal"
    with pytest.raises(GuideError, match=told):
        PerLayer(wide, torch.randn(5, 100), torch.randn(5))
    PerLayer(wide, torch.randn(5, 100), torch.randn(5), family=MatrixNormal)
