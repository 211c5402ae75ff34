"""The public contracts over the whole zoo, Pyro's autoguides and guides written by hand; and mutants that must fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from dgm.errors import GuideError, ModelError, OptionError
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import linear, mlp
from dgm.guides.flow import zuko
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from dgm.guides.joint import Joint
from dgm.models import bayesian_linear_regression, bnn, linear_vae, vae
from dgm.posthoc import has_density
from dgm.programs import isolated, preserved_rng
from dgm.registry import attachments, broken, families, models
from dgm.sites import latents
from dgm.testing import ContractError, check_exact, check_family, check_model, check_pair
from dgm.weights import log_weights

MODELS, FAMILIES, ATTACHMENTS = models(), families(), attachments()
LOCAL = ["deep-latent-gaussian", "linear-vae", "vae"]


def example(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    return MODELS[name].module.example()


def takes_family(name: str) -> bool:
    """Whether a family has a part in the model's guide: one of discrete latents alone has the same guide for each."""
    model, batch = example(name)
    return any(not site.discrete for site in latents(model, *batch).values())


TAKES = [m for m in MODELS if takes_family(m)]
PAIRS = [(m, f) for m in MODELS for i, f in enumerate(FAMILIES) if i == 0 or m in TAKES]
PLACES = {(m, f): [*TAKES, m].index(m) + [*FAMILIES].index(f) for m, f in PAIRS}
COVERING = [pair for pair in PAIRS if PLACES[pair] % 2 == 0]
"""Families and models take turns: each meets half of the others by default, and all of them in the slow test."""
TRACED = [pair for pair in COVERING if PLACES[pair] % 4 == 0 and "flow" not in pair[1]]


def evidence(model: Any, batch: tuple[Tensor, ...]) -> Tensor | None:
    return model.log_evidence(*batch).detach() if hasattr(model, "log_evidence") else None


# --- the zoo ---------------------------------------------------------------------------------------------------------


def test_everything_in_the_zoo_can_be_imported() -> None:
    assert broken() == []
    assert set(LOCAL) <= set(MODELS) and "diagonal-normal" in FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    check_family(FAMILIES[name].make, features=(1, 2, 4))


CLOSE = {"low-rank-normal": 0.2, "student-t": 0.5, "mixture": 1.0, "radial-normal": 3.0}
"""Families whose start is near to, not equal to, a diagonal normal: standard deviation of their log weights there."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "point"])
def test_family_that_contains_the_posterior_has_log_weights_without_variance(name: str) -> None:
    """w_i ~ N(0, 1) with one datum each: the posterior is a diagonal normal, where flows and normals start."""
    y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
        with pyro.plate("data", 1):
            pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=y[None])

    with preserved_rng(0):
        torch.set_default_dtype(torch.float64)
        guide = Global(model, y, family=FAMILIES[name].make, init={"w": y / 1.25}, init_scale=0.2**0.5)
        torch.set_default_dtype(torch.float32)
    weights = log_weights(model, guide, y, num_samples=500)
    exact = dist.Normal(torch.zeros_like(y), 1.25**0.5).log_prob(y).sum()
    assert float(weights.std()) <= CLOSE.get(name, 1e-6), float(weights.std())
    if name not in CLOSE:
        assert torch.allclose(weights, exact.expand_as(weights), atol=1e-6)


class Shared(DiagonalNormal):
    """A deep copy that is no copy."""

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def test_family_contract_sees_a_copy_that_is_none() -> None:
    with pytest.raises(ContractError, match="a deep copy shares a parameter"):
        check_family(Shared)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    model, batch = example(name)
    assert len(check_model(model, *batch)) > 0


@pytest.mark.parametrize(("name", "family"), COVERING)
def test_pair(name: str, family: str) -> None:
    model, batch = example(name)
    with preserved_rng(0):
        guide = Joint(model, *batch, family=FAMILIES[family].make, encoder=mlp(16))
    traced = (name, family) in TRACED
    check_pair(model, guide, *batch, compile="trace" if traced else False, log_evidence=evidence(model, batch))


@pytest.mark.parametrize("family", [name for name in FAMILIES if "flow" in name])
def test_traced_flow(family: str) -> None:
    model, batch = example("linear-vae")
    with preserved_rng(0):
        guide = Joint(model, *batch, family=partial(FAMILIES[family].make, transforms=2), encoder=mlp(16))
    check_pair(model, guide, *batch, steps=8, log_evidence=evidence(model, batch))


def test_every_family_and_every_model_has_its_turns() -> None:
    for family in FAMILIES:
        assert sum(f == family for _, f in COVERING) >= 2, family
        assert "flow" in family or any(f == family for _, f in TRACED), family
    for name in TAKES:
        assert sum(m == name for m, _ in COVERING) >= 2 and any(m == name for m, _ in TRACED), name
    assert {m for m, _ in COVERING} == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [pair for pair in PAIRS if pair not in TRACED])
def test_traced_pair(name: str, family: str) -> None:
    model, batch = example(name)
    with preserved_rng(0):
        guide = Joint(model, *batch, family=FAMILIES[family].make, encoder=mlp(16))
    check_pair(model, guide, *batch, log_evidence=evidence(model, batch))


def attach(way: str, model: Any, batch: tuple[Tensor, ...]) -> Any:
    """The guide, or the reason why this way to attach does not serve the model."""
    try:
        with preserved_rng(0):
            return ATTACHMENTS[way].make(model, *batch)
    except (GuideError, ModelError, OptionError) as refusal:
        return str(refusal)


@pytest.mark.parametrize("way", ATTACHMENTS)
def test_way_to_attach(way: str) -> None:
    """Every model is served, or refused with a reason; one that is served obeys the laws of a pair."""
    checked = False
    for name in MODELS:
        model, batch = example(name)
        guide = attach(way, model, batch)
        if isinstance(guide, str):
            assert len(guide) > 30, f"{way} refuses {name} without a reason: {guide!r}"
        elif not checked and any(p.requires_grad for p in guide.parameters()):
            check_attached(model, guide, batch)
            checked = True
    assert checked or way == "nuts"  # which has nothing to train


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ATTACHMENTS)
def test_way_to_attach_on_every_model(way: str, name: str) -> None:
    model, batch = example(name)
    guide = attach(way, model, batch)
    if not isinstance(guide, str) and any(p.requires_grad for p in guide.parameters()):
        check_attached(model, guide, batch)


def check_attached(model: Any, guide: Any, batch: tuple[Tensor, ...]) -> None:
    exact = evidence(model, batch) if has_density(guide) else None
    check_pair(model, guide, *batch, steps=6, compile=False, log_evidence=exact)


@pytest.mark.parametrize("family", [DiagonalNormal, FullNormal, partial(InverseAutoregressiveFlow, hidden=(8,))])
@pytest.mark.parametrize("name", LOCAL)
def test_free_pair(name: str, family: Callable[..., nn.Module]) -> None:
    model, batch = example(name)
    with preserved_rng(0):
        guide = Free(model, *batch, family=family)
    check_pair(model, guide, *batch, compile=False, log_evidence=evidence(model, batch))


def test_free_pair_traced() -> None:
    model, batch = example("linear-vae")
    check_pair(model, Free(model, *batch, family=FullNormal), *batch, log_evidence=evidence(model, batch))


# --- Pyro's autoguides, and guides written by hand --------------------------------------------------------------------


@pytest.mark.parametrize("guide", [AutoNormal, AutoDiagonalNormal, AutoDelta])
@pytest.mark.parametrize("module", [bnn, bayesian_linear_regression])
def test_autoguide(module: Any, guide: Any) -> None:
    model, batch = module.example()
    check_pair(model, guide(model), *batch, log_evidence=evidence(model, batch))


def hand_written(encoder: nn.Module) -> Callable[..., None]:
    """A guide as Pyro's tutorials write it: a function, `pyro.module` and `pyro.param`."""

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.tensor([0.5, 0.7]), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return guide


def test_function_guide() -> None:
    model, (x,) = linear_vae.example()
    with preserved_rng(0):
        encoder = nn.Linear(5, 2)
    check_pair(model, hand_written(encoder), x, log_evidence=evidence(model, (x,)))


class Classic(nn.Module):
    """The VAE of Pyro's first tutorial: model and guide are methods of one plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_methods_of_one_module() -> None:
    with preserved_rng(0):
        both, x = Classic(), torch.randint(2, (20, 6)).float()
    check_pair(both.model, both.guide, x)


class PlainGuide(nn.Module):
    """A torch module that knows nothing of Pyro's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(x), self.log_scale.exp()).to_event(1))


def test_plain_torch_guide() -> None:
    model, (x,) = linear_vae.example()
    check_pair(model, PlainGuide(), x, log_evidence=evidence(model, (x,)))


class Coins(PyroModule):
    """PyroSample and PyroParam attributes, one positive and one interval latent, and a guide of Gamma draws."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = PyroSample(dist.Gamma(2.0, 1.0))

    def forward(self, x: Tensor) -> None:
        rate = self.rate
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)


class GammaGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.shape = PyroParam(torch.tensor(2.0), dist.constraints.positive)
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        pyro.sample("rate", dist.Gamma(self.shape, self.scale))


def test_draws_that_depend_on_parameters_stay_eager_and_equal() -> None:
    x = torch.tensor([1.0, 0.0, 3.0, 2.0])
    check_model(Coins(), x)
    n, total = torch.tensor(float(len(x))), x.sum()
    exact = torch.lgamma(2 + total) - (2 + total) * torch.log(1 + n) - torch.lgamma(x + 1).sum()
    check_pair(Coins(), GammaGuide(), x, log_evidence=exact)


# --- mutants: what a contract must see -------------------------------------------------------------------------------


class WrongDeterminant(DiagonalNormal):
    """Draws with twice the spread that log_prob says."""

    def forward(self, context: Tensor | None = None) -> Any:
        q = super().forward(context)

        class Wide(type(q)):  # type: ignore[misc]
            def rsample(self, *shape: Any) -> Tensor:
                return self.mean + 2 * (super().rsample(*shape) - self.mean)

        q.__class__ = Wide
        return q


class Halved(DiagonalNormal):
    """A density that integrates to one half."""

    def forward(self, context: Tensor | None = None) -> Any:
        q = super().forward(context)
        log_prob = q.log_prob
        q.log_prob = lambda value: log_prob(value) - 0.7
        return q


class Idle(DiagonalNormal):
    """Holds a parameter that does nothing."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__(features, context)
        self.spare = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("family", "message"),
    [(WrongDeterminant, "draws do not follow log_prob"), (Halved, "integrates to 0.49"), (Idle, "'spare' receives no")],
)
def test_family_contract_sees(family: Callable[..., nn.Module], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_family(family)


def test_model_contract_sees_data_outside_a_plate() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m, 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ContractError, match="observed site 'x' stands in no data plate"):
        check_model(model, torch.zeros(4))


def test_model_contract_sees_rows_that_depend_on_each_other() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + x.mean(), 1.0), obs=x)

    with pytest.raises(ContractError, match="mean over batches of the scaled log density"):
        check_model(model, torch.tensor([0.0, 1.0, 5.0, 7.0]))


def test_model_contract_sees_a_scale_applied_by_hand() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=4 / len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.raises(ContractError, match="mean over batches"):
        check_model(model, torch.tensor([0.0, 1.0, 5.0, 7.0]))


def test_pair_contract_names_the_parameter_without_gradient() -> None:
    model, (x,) = linear_vae.example()
    guide = PlainGuide()
    guide.forgotten = nn.Parameter(torch.zeros(2))
    with pytest.raises(ContractError, match=r"'guide.forgotten' takes no part"):
        check_pair(model, guide, x, compile=False)


def test_pair_contract_sees_a_bound_above_the_evidence() -> None:
    model, (x,) = linear_vae.example()
    with pytest.raises(ContractError, match="above the evidence"):
        check_pair(model, Joint(model, x), x, compile=False, log_evidence=evidence(model, (x,)) - 10)


def test_pair_contract_sees_control_flow_that_the_store_would_hide() -> None:
    calls: list[int] = []

    def guide(x: Tensor) -> None:
        calls.append(1)
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 0.01 * len(calls), 1.0).to_event(1))

    model, (x,) = linear_vae.example()
    with pytest.raises(ContractError, match=r"negative loss|dgm.SVI gives the loss"):
        check_pair(model, guide, x, compile=False)


def test_exact_contract_names_draw_and_row() -> None:
    model, x = linear_vae.LinearVAE.simulate(6, 4, 2, dtype=torch.float64)
    guide = Joint(model, x, encoder=linear()).double()
    with pytest.raises(ContractError, match=r"draw \d, row \d: the log weight is"):
        check_exact(model, guide, x, log_evidence=model.log_evidence(x))


def test_contracts_leave_the_pair_and_the_random_stream_as_they_came() -> None:
    model, batch = vae.example()
    guide = Joint(model, *batch)
    before = [p.detach().clone() for module in (model, guide) for p in module.parameters()]
    state = torch.get_rng_state()
    check_pair(model, guide, *batch, steps=3)
    assert torch.equal(state, torch.get_rng_state())
    for was, now in zip(before, [p for module in (model, guide) for p in module.parameters()], strict=True):
        assert torch.equal(was, now)


def test_misfit_is_the_core_s_own_error() -> None:
    model, batch = vae.example()
    with pytest.raises(GuideError, match="does not sample the latent 'z'"):
        check_pair(model, lambda x: None, *batch)


# --- zuko's flows as they stand --------------------------------------------------------------------------------------


def test_a_zuko_flow_starts_where_it_is_told() -> None:
    """A start at a standard normal draws scales near zero of a positive latent, and the gradient is infinite."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> None:
        s = pyro.sample("s", dist.Gamma(2.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s.sum()), obs=x)

    with preserved_rng(0):
        flow = partial(zuko.flows.NICE, transforms=2, hidden_features=(8,))
        guide = Global(model, x, family=flow, init={"s": torch.tensor([2.0, 0.5])}, init_scale=0.01)
    with isolated(), torch.no_grad():
        draws = torch.stack([guide(x)["s"] for _ in range(100)])  # (100, 2)
    assert torch.allclose(draws.mean(0), torch.tensor([2.0, 0.5]), rtol=0.1)
    assert 0 < float(draws.std(0).max()) < 0.2
    check_pair(model, guide, x, compile=False)
