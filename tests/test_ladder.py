"""The ladder: exact where the richer family contains the simpler one, near elsewhere, and honest about which."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor, nn

from dgm import log_weights
from dgm.errors import GuideError
from dgm.guides.amortized import Amortized
from dgm.guides.coupling_spline_flow import CouplingSplineFlow
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.discrete import Discrete
from dgm.guides.encoders import linear, mlp
from dgm.guides.flow import zuko
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from dgm.guides.joint import Joint
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.guides.point import Point
from dgm.ladder import Start, start_family, start_from
from dgm.models import bayesian_linear_regression, bnn, gaussian_mixture, linear_vae
from dgm.programs import isolated
from dgm.sites import latents

FLOW = partial(InverseAutoregressiveFlow, hidden=(8,))
SPLINE = partial(CouplingSplineFlow, hidden=(8,))
CONTAIN = {"full": FullNormal, "flow": FLOW, "spline": SPLINE}


def trained(module: Any) -> Any:
    """Away from every start, as training leaves it, in float64."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return module.double()


def everything(x: Tensor) -> None:
    """Global and local latents, one of them positive."""
    s = pyro.sample("s", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3).to(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + w.sum(), s).to_event(1), obs=x)


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
ATTACH: dict[str, Callable[..., Any]] = {
    "global": partial(Global, sites=["s", "w"]),
    "amortized": partial(Amortized, sites=["z"], encoder=mlp(4)),
    "free": partial(Free, sites=["z"]),
    "joint": partial(Joint, encoder=mlp(4)),
}


@pytest.mark.parametrize("attach", ATTACH.values(), ids=list(ATTACH))
@pytest.mark.parametrize("family", CONTAIN.values(), ids=list(CONTAIN))
def test_a_family_that_contains_the_trained_one_starts_as_it(attach: Callable[..., Any], family: Any) -> None:
    old = trained(attach(everything, X))
    new = attach(everything, X, family=family).double()
    start = start_from(new, old)
    assert start.exact and "exact" in str(start) and abs(start.kl or 0) < 1e-5
    draws = []
    with isolated(), torch.no_grad():
        for guide in (old, new):
            torch.manual_seed(0)
            draws.append(guide(X.double()))
        for name, value in draws[0].items():
            assert torch.allclose(value, draws[1][name], atol=1e-6), name


@pytest.mark.parametrize("family", CONTAIN.values(), ids=list(CONTAIN))
def test_the_elbo_on_common_noise_is_the_same(family: Any) -> None:
    old = trained(Joint(everything, X, encoder=mlp(4)))
    new = Joint(everything, X, encoder=mlp(4), family=family).double()
    before = log_weights(everything, new, X.double(), num_samples=20, seed=3)
    assert start_from(new, old).exact
    theirs, mine = (log_weights(everything, guide, X.double(), num_samples=20, seed=3) for guide in (old, new))
    assert torch.allclose(mine, theirs, atol=1e-6 * float(theirs.abs().max()))
    assert not torch.allclose(before, theirs, atol=0.1)


@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize("family", CONTAIN.values(), ids=list(CONTAIN))
def test_log_densities_are_equal(family: Any, context: int) -> None:
    old, new = trained(DiagonalNormal(5, context)), family(5, context).double()
    assert start_family(new, old).exact
    c = (torch.randn(7, context).double(),) if context else ()
    x = old(*c).sample((10,))
    assert torch.allclose(new(*c).log_prob(x), old(*c).log_prob(x), atol=1e-6)


def test_full_from_low_rank_by_cholesky() -> None:
    old, new = trained(LowRankNormal(6, rank=2)), FullNormal(6).double()
    start = start_family(new, old)
    assert start.exact and "Cholesky" in start.told
    assert torch.allclose(new().covariance_matrix, old().covariance_matrix, atol=1e-10)
    x = old().sample((50,))
    assert torch.allclose(new().log_prob(x), old().log_prob(x), atol=1e-8)


def test_float32_starts_are_exact_too() -> None:
    old, new = trained(LowRankNormal(30, rank=3)).float(), FullNormal(30)
    assert start_family(new, old).exact
    assert start_family(FLOW(30), trained(DiagonalNormal(30)).float()).exact


@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize(
    ("new", "old"), [(LowRankNormal, DiagonalNormal), (FLOW, FullNormal), (FLOW, LowRankNormal), (SPLINE, FullNormal)]
)
def test_near_starts_have_the_marginal_location_and_scale_and_say_so(new: Any, old: Any, context: int) -> None:
    before, after = trained(old(5, context)), new(5, context).double()
    fresh = new(5, context).double()
    start = start_family(after, before)
    assert not start.exact and start.told.startswith("nearest") and start.kl is not None and start.kl > 1e-6
    c = (torch.zeros(1, context).double(),) if context else ()
    with torch.no_grad():
        x = after(*c).rsample((20_000,)).reshape(-1, 5)
        mean, scale = before(*c).mean.reshape(-1), before(*c).variance.sqrt().reshape(-1)
        z = (x.mean(0) - mean) / (scale / len(x) ** 0.5)
        assert z.abs().max() < 4.5
        assert (x.std(0) / scale - 1).abs().max() < 4.5 / (2 * len(x)) ** 0.5 + 0.01 * (new is LowRankNormal)
        y = before(*c).sample((200,))
        gain = (after(*c).log_prob(y) - fresh(*c).log_prob(y)).mean()
    assert gain > 0, "nearer to the trained guide than a fresh start"


def test_full_with_a_context_from_low_rank_is_only_near() -> None:
    start = start_family(FullNormal(5, 4).double(), trained(LowRankNormal(5, 4)))
    assert not start.exact and "right at the zero context" in start.told


def test_from_a_point() -> None:
    for context in (0, 4):
        old, new = trained(Point(5, context)), FullNormal(5, context).double()
        start = start_family(new, old)
        c = torch.randn(7, context).double() if context else None
        assert not start.exact and "no scale" in start.told and start.kl is None
        assert torch.allclose(new(c).mean, old(c).mean)
        scale = new(c).variance.sqrt()
        assert context or torch.allclose(scale, torch.tensor(0.1).double())


def test_a_family_of_the_same_kind_is_copied() -> None:
    old, new = trained(SPLINE(5, 4)), SPLINE(5, 4).double()
    assert start_family(new, old).exact
    for a, b in zip(old.parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_flow_that_was_trained_already_is_no_exact_start() -> None:
    new = trained(FLOW(5))
    assert not start_family(new, trained(DiagonalNormal(5))).exact


def test_a_zuko_flow_takes_location_and_scale() -> None:
    model, batch = bayesian_linear_regression.example()
    old = trained(Global(model, *batch)).float()
    new = Global(model, *batch, family=partial(zuko.flows.NICE, hidden_features=(8,)))
    start = start_from(new, old)
    assert not start.exact
    assert torch.allclose(new.family.loc, old.family.loc.bias) and "nearest" in start.told


def test_discrete_guides_are_copied() -> None:
    model, (x,) = gaussian_mixture.example()
    old, new = trained(Discrete(model, x, encoder=linear())), Discrete(model, x, encoder=linear()).double()
    assert start_from(new, old) == Start(True, "exact: Discrete copied", 0.0)
    assert torch.equal(new.logits.weight, old.logits.weight)


# --- guides of Pyro ---


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (AutoNormal, DiagonalNormal),
        (AutoDiagonalNormal, DiagonalNormal),
        (AutoDiagonalNormal, FullNormal),
        (AutoNormal, FLOW),
        (AutoMultivariateNormal, FullNormal),
        (AutoLowRankMultivariateNormal, FullNormal),
    ],
)
def test_from_guides_of_pyro(make: Any, family: Any) -> None:
    model, batch = bnn.example()
    with isolated():
        torch.manual_seed(0)
        old = make(model)
        old(*batch)
        with torch.no_grad():
            for p in old.parameters():
                p.add_(0.3 * torch.randn(p.shape))
        new = Global(model, *batch, family=family)
        start = start_from(new, old)
        assert start.exact == (family is not FLOW or make is AutoNormal), start
        mean = {name: value.detach() for name, value in old.median(*batch).items()}
        u = new.packing.pack(mean).reshape(-1)
        with torch.no_grad():
            x = new.family().rsample((20_000,))
        z = (x.mean(0) - u) / (x.std(0) / len(x) ** 0.5)
        assert z.abs().max() < 4.5
    weights = [log_weights(model, guide, *batch, num_samples=4000).mean() for guide in (old, new)]
    spread = log_weights(model, old, *batch, num_samples=4000).std() / 4000**0.5
    assert abs(float(weights[0] - weights[1])) < 4.5 * 2**0.5 * float(spread)


def test_from_a_point_of_pyro() -> None:
    model, batch = bnn.example()
    with isolated():
        old = AutoDelta(model)
        old(*batch)
        new = Global(model, *batch, family=FullNormal)
        start = start_from(new, old)
        assert not start.exact and "AutoDelta has no scale" in start.told
        new_values, _ = new.packing.unpack(new.family.loc.bias)
        for name, value in old.median().items():
            assert torch.allclose(new_values[name], value, atol=1e-5)


# --- refusals ---


def small(x: Tensor) -> None:
    s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, s.sum()).expand([3]).to_event(1), obs=x)


class Odd(nn.Module):
    """A family with a context and names of its own."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.context, self.net = context, nn.Linear(context, features)

    def forward(self, context: Tensor) -> Any:
        return dist.Normal(self.net(context), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [
        (lambda: Global(everything, X, sites=["s"]), lambda: Global(everything, X, sites=["s", "w"]), "'w' has no"),
        (lambda: Global(everything, X, sites=["s"]), lambda: Global(small, X), "'s' has 3 dimensions .* and 2 in"),
        (lambda: Global(everything, X, sites=["s"]), lambda: Free(everything, X, sites=["z"]), "in the same way"),
        (
            lambda: Amortized(everything, X, sites=["z"], encoder=mlp(8)),
            lambda: Amortized(everything, X, sites=["z"], encoder=mlp(4)),
            r"guide's encoder Network\(0.weight \(8, 3\).* is not that of the trained guide, Network\(0.weight",
        ),
        (lambda: Joint(small, X), lambda: Joint(everything, X), "parts .*global_.* they serve other latents"),
        (lambda: Free(everything, X, sites=["z"]), lambda: Free(everything, X[:4], sites=["z"]), "6 rows .* for 4"),
        (
            lambda: Amortized(everything, X, sites=["z"], encoder=linear()),
            lambda: Amortized(everything, X, sites=["z"], encoder=linear(), family=Odd),
            "no start of DiagonalNormal from Odd with a context",
        ),
        (lambda: Global(everything, X, sites=["s"]), lambda: AutoNormal(small), "never called"),
        (lambda: lambda x: None, lambda: Global(small, X), "is not one density of a family"),
    ],
)  # fmt: skip
def test_refusals_name_what_differs_and_leave_the_guide(new: Any, old: Any, message: str) -> None:
    guide = new() if isinstance(new(), nn.Module) else nn.Identity()
    before = copy.deepcopy(guide.state_dict())
    with pytest.raises(GuideError, match=message):
        start_from(guide, old())
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_random_stream_and_the_trained_guide_are_left_alone() -> None:
    model, (x,) = linear_vae.example()
    old, new = Amortized(model, x), Amortized(model, x, family=FullNormal)
    state, before = torch.get_rng_state(), copy.deepcopy(old.state_dict())
    start_from(new, old)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in old.state_dict().items():
        assert torch.equal(value, before[name])
    new.encoder[0].weight.data.add_(1.0)
    assert torch.equal(old.encoder[0].weight, before["encoder.0.weight"]), "copies, not references"
    assert list(latents(model, x)) == ["z"]
