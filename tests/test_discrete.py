"""Discrete latents: the guide at the exact posterior, the mixture's evidence, enumeration, and the score function."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

import dgm
from dgm.errors import GuideError, ModelError, OptionError
from dgm.guides.amortized import Amortized
from dgm.guides.discrete import Discrete
from dgm.guides.encoders import linear, mlp
from dgm.guides.full_normal import FullNormal
from dgm.guides.joint import Joint
from dgm.models.gaussian_mixture import GaussianMixture, example
from dgm.pair import Pair
from dgm.programs import isolated
from dgm.testing import ContractError, check_exact, check_pair

Adam = partial(torch.optim.Adam, lr=1e-2)
ENUM = partial(TraceEnum_ELBO, max_plate_nesting=1)


def at_the_posterior(model: GaussianMixture, guide: Discrete) -> Discrete:
    """log p(c = k | x) = log pi_k + (mu_k x - |mu_k|^2 / 2) / s^2 + constant: linear in x, as the encoder sees it."""
    with torch.no_grad():
        precision = (-2 * model.log_scale).exp()
        weight = model.loc * precision  # (K, D)
        guide.logits.weight.copy_(weight * guide.features.scale)  # type: ignore[operator]
        guide.logits.bias.copy_(
            model.logits - 0.5 * model.loc.square().sum(-1) * precision + weight @ guide.features.shift
        )
    return guide


# --- the model ---


def test_evidence_is_the_sum_over_components_and_the_posterior_follows() -> None:
    model, (x,) = example()
    pi = model.logits.softmax(-1)
    by_hand = sum(pi[k] * dist.Normal(model.loc[k], model.log_scale.exp()).log_prob(x).sum(-1).exp() for k in range(3))
    assert torch.allclose(model.log_evidence(x), by_hand.log(), atol=1e-5)  # type: ignore[union-attr]
    c = torch.zeros(len(x), dtype=torch.long)
    joint = pi[0].log() + model.decode(c).log_prob(x)
    assert torch.allclose(joint - model.posterior(x).log_prob(c), model.log_evidence(x), atol=1e-5)


def test_draws_follow_the_mixture() -> None:
    model, _ = example()
    x = model.sample(20_000, torch.Generator().manual_seed(1))
    pi = model.logits.softmax(-1)
    mean = pi @ model.loc
    assert ((x.mean(0) - mean) / x.std(0) * math.sqrt(len(x))).abs().max() < 4.5


def test_enumeration_gives_the_exact_evidence_and_trains() -> None:
    plain, (x,) = example()
    marked = GaussianMixture(2, enumerate=True)
    for model, program in ((plain, config_enumerate(plain)), (marked, marked)):
        svi = dgm.SVI(program, lambda x: None, Adam, loss=ENUM())
        for _ in range(5):
            before = -float(model.log_evidence(x).detach().sum())
            assert svi.step(x) == pytest.approx(before, rel=1e-5)
        assert -float(model.log_evidence(x).detach().sum()) < before


def test_enumeration_under_minibatches_is_scaled() -> None:
    model, (x,) = GaussianMixture(2, enumerate=True), example()[1]
    svi = dgm.SVI(model, lambda x: None, Adam, loss=ENUM(), sizes={"data": 60})
    expected = -float(model.log_evidence(x).detach().sum()) * 3
    assert svi.step(x) == pytest.approx(expected, rel=1e-5)


def test_the_mixture_refuses() -> None:
    with pytest.raises(OptionError, match="positive sizes"):
        GaussianMixture(2, components=0)
    with pytest.raises(ModelError, match=r"expected data of shape \(N, 2\), got \(5, 3\)"):
        GaussianMixture(2)(torch.zeros(5, 3))


# --- the guide ---


@pytest.mark.parametrize("attach", [Discrete, Joint])
def test_at_the_posterior_every_log_weight_is_the_evidence(attach: Callable[..., Any]) -> None:
    model, (x,) = example()
    model, x = model.double(), (3 * x + 1).double()  # so that columns are standardised
    guide = attach(model, x, encoder=linear()).double()
    part = guide if attach is Discrete else guide.discrete_data
    with pytest.raises(ContractError, match="the log weight is"):
        check_exact(model, guide, x, log_evidence=model.log_evidence(x).detach())
    at_the_posterior(model, part)
    check_exact(model, guide, x, log_evidence=model.log_evidence(x).detach(), num_samples=30)


@pytest.mark.parametrize("attach", [Discrete, Joint])
def test_contract(attach: Callable[..., Any]) -> None:
    model, (x,) = example()
    check_pair(model, attach(model, x, encoder=mlp(8)), x, log_evidence=model.log_evidence(x).detach())


def gradient(model: Any, guide: Any, x: Tensor, loss: Any) -> Tensor:
    pair = Pair(model, guide, loss)
    value = pair.loss(None, (x,))
    parameters = list(guide.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


def test_the_score_function_is_unbiased_and_a_mutant_is_not() -> None:
    torch.manual_seed(0)
    model, (x,) = example()
    guide = Discrete(model, x, encoder=linear())
    marked = Discrete(model, x, encoder=linear(), enumerate="parallel")
    marked.load_state_dict(guide.state_dict())
    exact = gradient(model, marked, x, ENUM())
    draws = torch.stack([gradient(model, guide, x, Trace_ELBO()) for _ in range(1000)])
    z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4.5

    class Missing(Trace_ELBO):  # type: ignore[misc]
        """Forgets the score function: only the direct gradient of -log q, whose mean is zero."""

        def differentiable_loss(self, model: Any, guide: Any, *args: Any) -> Any:
            for p, q in self._get_traces(model, guide, args, {}):
                return -(p.log_prob_sum() - q.log_prob_sum())

    draws = torch.stack([gradient(model, guide, x, Missing()) for _ in range(200)])
    z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() > 4.5


def test_expectation_over_q_is_exact_by_enumeration_and_trains() -> None:
    torch.manual_seed(0)
    model, (x,) = example()
    for p in model.parameters():
        p.requires_grad_(False)
    guide = Discrete(model, x, encoder=linear(), enumerate="parallel")
    posterior = model.posterior(x)
    with torch.no_grad():
        q = dist.Categorical(logits=guide.logits(guide.encoder(guide.features((x,)))))
        expected = -model.log_evidence(x).sum() + torch.distributions.kl_divergence(q, posterior).sum()
    svi = dgm.SVI(model, guide, partial(torch.optim.Adam, lr=0.1), loss=ENUM())
    assert svi.step(x) == pytest.approx(float(expected), rel=1e-5)
    for _ in range(100):
        loss = svi.step(x)
    evidence = float(model.log_evidence(x).detach().sum())
    assert 0 < loss + evidence < 0.5 * (float(expected) + evidence)
    at_the_posterior(model, guide)
    assert svi.step(x) == pytest.approx(-evidence, rel=1e-5)


def kinds(x: Tensor) -> None:
    """Every kind of finite support, an inner plate, events, and continuous latents beside them."""
    on = pyro.sample("on", dist.Bernoulli(0.3))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("topics", 4):
        pyro.sample("topic", dist.Categorical(torch.ones(3)))
    with pyro.plate("data", len(x)):
        bits = pyro.sample("bits", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
        hot = pyro.sample("hot", dist.OneHotCategorical(torch.ones(2)))
        words = pyro.sample("words", dist.Categorical(torch.ones(5, 6)).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = on + bits.sum(-1) + hot[..., 0] + words.sum(-1) + z
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def test_joint_serves_every_kind() -> None:
    x = torch.randn(8)
    guide = Joint(kinds, x, encoder=mlp(8), family=FullNormal)
    assert guide.parts == ["global_", "local_data", "discrete", "discrete_data"]
    with isolated():
        values = guide(x)
        shapes = {name: tuple(value.shape) for name, value in values.items()}
    assert shapes == {
        "on": (), "s": (), "topic": (4,), "bits": (8, 3), "hot": (8, 2), "words": (8, 5), "z": (8,),
    }  # fmt: skip
    assert guide.discrete.logits.bias.numel() == 1 + 4 * 3
    assert guide.discrete_data.logits.bias.numel() == 3 + 2 + 5 * 6
    check_pair(kinds, guide, x, steps=3, compile=False)
    with isolated():
        assert guide(x[:3])["words"].shape == (3, 5)


def test_global_latent_at_its_posterior() -> None:
    x = torch.tensor([0.3, 1.2, -0.4]).double()

    def model(x: Tensor) -> None:
        on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2 * on - 1, 1.0), obs=x)

    guide = Discrete(model, x).double()
    two = torch.tensor([-1.0, 1.0]).double()
    joint = torch.tensor([0.7, 0.3]).double().log() + dist.Normal(two[:, None], 1.0).log_prob(x).sum(-1)
    with torch.no_grad():
        guide.logits.bias.fill_(joint[1] - joint[0])
    check_exact(model, guide, x, log_evidence=joint.logsumexp(0))


def test_joint_leaves_enumerated_sites_out() -> None:
    model = GaussianMixture(2, enumerate=True)
    x = example()[1][0]
    with pytest.raises(GuideError, match="no latent to sample"):
        Joint(model, x)

    def both(x: Tensor) -> None:
        pyro.sample("s", dist.LogNormal(0.0, 1.0))
        model(x)

    assert Joint(both, x).parts == ["global_"]


def test_a_step_says_why_it_stays_eager(caplog: pytest.LogCaptureFixture) -> None:
    model, (x,) = example()
    svi = dgm.SVI(model, Discrete(model, x), Adam, compile="trace")
    svi.step(x)
    assert svi.kind == "eager" and "site 'c' has no pathwise gradient" in str(svi.fallback)


def test_replicas_of_a_discrete_guide_are_the_single_runs() -> None:
    _, (x,) = example()
    make, guide = partial(GaussianMixture, 2), partial(Discrete, encoder=linear())
    fits = dgm.fit(make, guide, x, epochs=2, batch_size=10, replicas={"seed": [0, 1]})
    for fit in fits:
        single = dgm.fit(make, guide, x, epochs=2, batch_size=10, replicas={"seed": [fit.seed]})[0]
        assert fit.history["elbo"].tolist() == pytest.approx(single.history["elbo"].tolist(), rel=1e-4)


def poisson(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Poisson(1.0))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def continuous(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def binomial(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Binomial(3, 0.5 * torch.ones(len(x))))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (binomial, {}, "latent 'n' has the support .*finitely many values"),
        (poisson, {}, "latent 'n' has the support .*finitely many values"),
        (continuous, {}, "latent 'z' is continuous .*use Joint"),
        (kinds, {}, "latent 's' is continuous"),
        (kinds, {"sites": ["on", "hot"]}, "different plates"),
        (kinds, {"sites": ["z"]}, "latent 'z' is continuous"),
        (kinds, {"sites": ["hat"]}, "no latent 'hat'"),
    ],
)
def test_what_discrete_refuses_by_name(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GuideError, match=message):
        Discrete(model, torch.zeros(5), **options)


def test_densities_still_refuse_discrete_latents() -> None:
    model, (x,) = example()
    with pytest.raises(ModelError, match="latent 'c' is discrete"):
        Amortized(model, x)
