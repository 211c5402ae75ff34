"""Where the gap is: exact cases of the linear VAE, flows, errors over data and draws, and mutants that must fail."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

import dgm
from dgm.errors import DataError, GuideError, ModelError, OptionError
from dgm.estimate import Estimate
from dgm.gap_parts import Stream
from dgm.gap_table import Gaps
from dgm.gaps import choose, gaps
from dgm.guides.amortized import Amortized
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import mlp
from dgm.guides.free import Free
from dgm.guides.freed import Held, freed
from dgm.guides.full_normal import FullNormal
from dgm.guides.joint import Joint
from dgm.guides.planar_flow import PlanarFlow
from dgm.guides.point import Point
from dgm.guides.semi_amortized import SemiAmortized
from dgm.local_fit import LocalFit
from dgm.models.linear_vae import LinearVAE
from dgm.registry import families
from dgm.weights import LogWeights, LogWeightSampler

MODULE: Any = importlib.import_module("dgm.gaps")
ROWS, SHIFT = 24, 0.5
BRIEF: dict[str, Any] = {"compile": False, "max_steps": 20, "round_steps": 10}


def linear_vae() -> tuple[LinearVAE, Tensor]:
    model, x = LinearVAE.simulate(ROWS, features=6, latent=3, generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False), x


@torch.no_grad()
def best_guide(model: LinearVAE, x: Tensor, family: Any, shift: float = 0.0) -> Amortized:
    """The optimum of a linear encoder, written down; its locations then moved by `shift`."""
    precision, d = model.precision(), model.latent
    encoder = nn.Linear(model.features, d)
    encoder.weight.copy_(torch.linalg.solve(precision, model.weight.mT) * (-2 * model.log_scale).exp())
    encoder.bias.copy_(-encoder.weight @ model.loc)
    guide = Amortized(model, x, family=family, encoder=encoder)
    guide.features.plain = True
    q: Any = guide.family
    for name, p in q.named_parameters():
        if name.endswith("weight"):
            p.zero_()
    q.loc.weight.copy_(torch.eye(d))
    if family is FullNormal:
        q.initialise_covariance(torch.zeros(d), torch.linalg.inv(precision))
    else:
        q.initialise(torch.zeros(d), precision.diagonal() ** -0.5)
    q.loc.bias += shift
    return guide


def kl_of_shift(model: LinearVAE) -> float:
    """E_q[(z - m)' P (z - m)] / 2 grows by shift' P shift / 2, whatever the covariance of q is."""
    shift = torch.full((model.latent,), SHIFT)
    return float((shift @ model.precision() @ shift / 2).detach())


def spoilt(**options: Any) -> tuple[Gaps, LinearVAE]:
    model, x = linear_vae()
    guide = best_guide(model, x, FullNormal, SHIFT)
    return gaps(model, guide, x, log_evidence=model.log_evidence(x), num_samples=300, **options), model


# ------------------------------------------------------------------------------------------------- exact cases


def test_a_full_normal_with_a_linear_encoder_loses_nothing() -> None:
    model, x = linear_vae()
    guide = best_guide(model, x, FullNormal)
    found = gaps(model, guide, x, log_evidence=model.log_evidence(x), num_samples=300)
    assert found.converged
    assert abs(found.summary["amortization"]) < 0.005
    assert abs(found.summary["approximation"]) < 0.005
    assert found.summary["log_evidence_mc_se"] == 0.0
    assert found.summary["total"] == pytest.approx(0.0, abs=1e-4)


@pytest.fixture(scope="module")
def diagonal() -> Gaps:
    model, x = linear_vae()
    return gaps(model, best_guide(model, x, DiagonalNormal), x, num_samples=2000, log_evidence=model.log_evidence(x))


def test_the_gap_of_a_diagonal_normal_is_the_analytic_one(diagonal: Gaps) -> None:
    model, _ = linear_vae()
    exact = float(model.diagonal_gap())
    s = diagonal.summary
    assert exact > 0.1
    assert s["approximation"] == pytest.approx(exact, abs=0.01)
    assert abs(s["approximation"] - exact) < 4.5 * s["approximation_mc_se"]
    assert abs(s["total"] - exact) < 4.5 * s["total_mc_se"]
    assert abs(s["amortization"]) < 0.005
    assert s["total"] == pytest.approx(s["approximation"] + s["amortization"], abs=1e-6)
    assert diagonal.per_datum["total"].to_numpy() == pytest.approx(
        (diagonal.per_datum["log_evidence"] - diagonal.per_datum["elbo"]).to_numpy()
    )


def test_a_spoilt_encoder_shows_as_amortization_gap() -> None:
    found, model = spoilt()
    assert abs(found.summary["amortization"] - kl_of_shift(model)) < 4.5 * found.summary["amortization_mc_se"] + 0.005
    assert abs(found.summary["approximation"]) < 0.005


def test_an_untrained_free_guide_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(model: Any, free: Any, batch: Any, rule: Any, **rest: Any) -> LocalFit:
        return LocalFit({n: p.detach().clone() for n, p in free.named_parameters()}, torch.zeros(len(batch[0])))

    monkeypatch.setattr(MODULE, "optimise", untrained)
    found, model = spoilt()
    assert abs(found.summary["amortization"] - kl_of_shift(model)) > 1.0
    assert found.summary["approximation"] > 1.0


class Subsampled(PyroModule):
    """The linear VAE as 100 times as many data as there are rows, the plate saying so."""

    def __init__(self, inner: LinearVAE) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", 100 * len(x), subsample_size=len(x)):
            prior = dist.Normal(torch.zeros_like(self.inner.weight[0]), 1.0).to_event(1)
            pyro.sample("x", self.inner.decode(pyro.sample("z", prior)), obs=x)


def subsampled() -> tuple[Gaps, LinearVAE]:
    inner, x = linear_vae()
    model = Subsampled(inner)
    guide = best_guide(inner, x[:8], FullNormal, SHIFT)
    with torch.no_grad():
        other = Amortized(model, x[:8], family=FullNormal, encoder=guide.encoder)
        other.features.plain = True
        other.family.load_state_dict(guide.family.state_dict())
    return gaps(model, other, x[:8], log_evidence=inner.log_evidence(x[:8]), num_samples=300), inner


def test_the_scale_of_the_plate_does_not_enter() -> None:
    found, model = subsampled()
    assert abs(found.summary["amortization"] - kl_of_shift(model)) < 4.5 * found.summary["amortization_mc_se"] + 0.005
    assert abs(found.summary["approximation"]) < 0.005


def test_a_subset_of_rows_has_the_gaps_of_those_rows(diagonal: Gaps) -> None:
    model, x = linear_vae()
    guide = best_guide(model, x, DiagonalNormal)
    few = gaps(model, guide, x[:6], log_evidence=model.log_evidence(x[:6]), num_samples=1000)
    whole = diagonal.per_datum.iloc[:6]
    for name in ("elbo", "elbo_free", "approximation"):
        error = torch.tensor((few.per_datum[f"{name}_error"] ** 2 + whole[f"{name}_error"] ** 2).to_numpy()).sqrt()
        assert bool((torch.tensor((few.per_datum[name] - whole[name]).to_numpy()).abs() < 4.5 * error + 0.02).all())


def test_a_plate_scale_that_is_left_in_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(LogWeightSampler):
        def chunks(self, num_samples: int, chunk: int | None = None) -> Any:
            for part in super().chunks(num_samples, chunk):
                yield LogWeights(100 * part.local, part.global_, part.has_local, part.has_global)

    monkeypatch.setattr(MODULE, "LogWeightSampler", Scaled)
    found, model = spoilt(**BRIEF)
    assert abs(found.summary["amortization"] - kl_of_shift(model)) > 10.0


# --------------------------------------------------------------------------------------- chance and what it may do


def test_members_are_chosen_and_reported_by_different_draws() -> None:
    """Six members of each row with one and the same ELBO: the best by ten draws is no better by ten others."""
    model, x = LinearVAE.simulate(100, features=6, latent=3, generator=torch.Generator().manual_seed(1))
    precision, offset = model.precision().detach(), 0.7
    free = Free(model, x)
    posterior = model.posterior(x).mean.detach()
    found = []
    for i in range(3):
        for sign in (-1.0, 1.0):
            loc = posterior.clone()
            loc[:, i] += sign * offset / precision[i, i] ** 0.5
            log_scale = (-precision.diagonal().log() / 2).expand(len(x), 3).clone()
            found.append({"loc|bias": loc, "log_scale|bias": log_scale})
    exact = (model.log_evidence(x) - model.diagonal_gap() - offset**2 / 2).detach()
    sampler = LogWeightSampler(model, free, x)
    way = choose(free, sampler, found, 10, seed=3)
    assert set(way.tolist()) == set(range(6))

    def z(seed: int) -> float:
        error = MODULE.log_weights_of(sampler, 10, 10, seed).mean(0) - exact
        return float(error.mean() / error.std() * len(x) ** 0.5)

    assert abs(z(4)) < 4.5
    assert z(3) > 5  # the mutant: reported by the draws that chose


def test_no_draw_that_is_reported_was_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {"before": set(), "reported": set()}
    local_fit: Any = importlib.import_module("dgm.local_fit")
    draw, report = local_fit.log_weights_of, MODULE._reported
    now = "before"

    def spy(sampler: Any, samples: int, chunk: int, seed: int) -> Tensor:
        seen[now].add(seed)
        return draw(sampler, samples, chunk, seed)

    def reported(*args: Any) -> Any:
        nonlocal now
        now = "reported"
        return report(*args)

    for module in (MODULE, local_fit):
        monkeypatch.setattr(module, "log_weights_of", spy)
    monkeypatch.setattr(MODULE, "_reported", reported)
    spoilt(**BRIEF)
    assert seen["before"] and seen["reported"] and not seen["before"] & seen["reported"]
    monkeypatch.setattr(MODULE, "CHOOSE", MODULE.REPORT)  # the mutant
    now, seen["before"], seen["reported"] = "before", set(), set()
    spoilt(**BRIEF)
    assert seen["before"] & seen["reported"]


def test_the_error_of_a_gap_knows_that_both_come_of_the_same_draws() -> None:
    """sd of bound - ELBO over repetitions, against the stated error; without the covariance it is off."""
    generator = torch.Generator().manual_seed(0)
    draws = 0.8 * torch.randn(400, 2000, generator=generator, dtype=torch.float64)  # (S, repetitions)
    stream = Stream()
    for chunk in draws.split(150):
        stream.update(chunk)
    bound, own = stream.bound("importance bound"), stream.summary.elbo_error
    truth = (bound.estimate.values - stream.summary.elbo).std()
    apart = (bound.estimate.errors.square() + own.square()).mean().sqrt()
    stated = (bound.estimate.errors.square() + own.square() - 2 * bound.covariance).clamp(min=0).mean().sqrt()
    assert float(stated / truth) == pytest.approx(1.0, abs=0.08)
    assert float(apart / truth) > 1.5  # the mutant
    whole = torch.softmax(draws, 0).mul(draws).sum(0) - draws.mean(0)
    assert torch.allclose(bound.covariance, whole / 399)


def test_what_has_not_converged_is_said() -> None:
    found, _ = spoilt(max_steps=30, round_steps=15, compile=False)
    assert not found.converged
    assert any("not converged: after 30 steps the last round gained" in note for note in found.notes)
    assert "not converged" in repr(found)
    assert found.summary["amortization"] > 0.0
    assert bool((found.per_datum["last_gain"] > 0).any())


# -------------------------------------------------------------------------------------------------- any family


class Banana(PyroModule):
    """z ~ N(0, I), x ~ N((z_0, z_1 + z_0^2), s): the posterior of z bends."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            bent = torch.stack([0.3 * z[..., 0], z[..., 1] + z[..., 0] ** 2], -1)
            pyro.sample("x", dist.Normal(bent, 0.5).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        line = torch.linspace(-6.0, 6.0, 401, dtype=torch.float64)
        z = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
        bent = torch.stack([0.3 * z[:, 0], z[:, 1] + z[:, 0] ** 2], -1)
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        terms = [torch.logsumexp(log_p + dist.Normal(bent, 0.5).log_prob(row).sum(-1), 0) for row in x.double()]
        return torch.stack(terms) + 2 * math.log(12 / 400)


def banana(rows: int) -> tuple[Banana, Tensor]:
    return Banana(), torch.randn(rows, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0])


def test_a_flow_is_optimised_for_each_datum() -> None:
    model, x = banana(6)
    torch.manual_seed(0)
    guide = Amortized(model, x, family=partial(PlanarFlow, transforms=2), encoder=mlp(8))
    found = gaps(model, guide, x, log_evidence=model.log_evidence(x), num_samples=300, max_steps=100, round_steps=50)
    s = found.summary
    assert found.family == "PlanarFlow" and set(found.per_datum["start"]) <= {"encoder", "moments"}
    assert s["amortization"] > 0.5  # the encoder is not trained
    assert s["approximation"] > -3 * s["approximation_mc_se"]


@pytest.mark.slow
def test_a_bent_family_loses_less_on_a_bent_posterior() -> None:
    model, x = banana(16)
    torch.manual_seed(0)
    guide = Amortized(model, x, family=partial(PlanarFlow, transforms=4), encoder=mlp(8))
    dgm.fit(model, guide, x, steps=300, lr=1e-2, compile="trace")
    run: Callable[..., Gaps] = partial(gaps, model, guide, x, log_evidence=model.log_evidence(x))
    found, normal = run(), run(family=DiagonalNormal)
    for s in (found.summary, normal.summary):
        assert s["approximation"] > -3 * s["approximation_mc_se"]
    assert found.converged and normal.converged
    assert found.summary["amortization"] > -3 * found.summary["amortization_mc_se"]
    assert found.summary["approximation"] < normal.summary["approximation"] - 0.02
    assert normal.family == "DiagonalNormal" and set(normal.per_datum["start"]) == {"moments"}


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_starts_exactly_at_the_encoders_solution(name: str) -> None:
    make: Any = families()[name].make
    torch.manual_seed(0)
    family = make(4, context=3)
    with torch.no_grad():
        for p in family.parameters():
            p += 0.1 * torch.randn_like(p)
    member, values = freed(family, torch.randn(5, 3))
    assert not isinstance(member, Held)
    assert all(len(value) == 5 for value in values.values())


def test_a_family_of_another_library_keeps_its_context() -> None:
    model, x = linear_vae()
    torch.manual_seed(0)
    guide = Amortized(model, x[:6], family=partial(zuko.flows.MAF, transforms=1, hidden_features=(8,)), encoder=mlp(4))
    found = gaps(model, guide, x[:6], num_samples=20, **BRIEF)
    assert set(found.per_datum["start"]) == {"encoder"} and found.family == "MAF"
    assert found.summary["amortization"] > 0.1


def test_rows_may_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "ROWS", 11)  # 11 + 11 + 2 rows
    model, x = linear_vae()
    exact = model.log_evidence(x)
    guide = best_guide(model, x, DiagonalNormal)
    found = gaps(model, guide, x[:23], log_evidence=exact[:23], num_samples=300, **BRIEF)
    assert len(found.per_datum) == 23 and abs(found.summary["amortization"]) < 0.01
    assert (
        abs(found.summary["approximation"] - float(model.diagonal_gap())) < 4.5 * found.summary["approximation_mc_se"]
    )


# --------------------------------------------------------------------------------- evidence, rows, modes, tables


@pytest.fixture(scope="module")
def two_sets() -> Gaps:
    model, x = linear_vae()
    guide = best_guide(model, x, DiagonalNormal)
    return gaps(model, guide, x[:10], train=x[10:], num_samples=400, seed=5, **BRIEF)


def test_training_rows_show_the_generalisation_part(two_sets: Gaps) -> None:
    s = two_sets.summary
    assert two_sets.train is not None and (len(two_sets.per_datum), len(two_sets.train)) == (10, ROWS - 10)
    for what in ("elbo", "amortization", "approximation"):
        assert s[f"generalisation_{what}"] == pytest.approx(s[f"train_{what}"] - s[what])
        assert s[f"generalisation_{what}_se"] == pytest.approx(math.hypot(s[f"train_{what}_se"], s[f"{what}_se"]))
    table = two_sets.table()
    assert table.attrs["mode"] == "fixed decoder" and "train - held-out" in table.columns.get_level_values(0)
    assert "train - held-out" in repr(two_sets)


def test_the_evidence_is_one_bound_and_says_which(two_sets: Gaps) -> None:
    assert two_sets.evidence in {
        f"importance bound by the {whose} draws, K = 400: a lower bound" for whose in ("guide's", "free guide's")
    }
    s, (model, x) = two_sets.summary, linear_vae()
    exact = model.log_evidence(x[:10]).double().mean()
    assert abs(s["log_evidence"] - float(exact)) < 4.5 * s["log_evidence_mc_se"] + 0.005


def test_a_given_bound_serves_where_it_is_the_best() -> None:
    model, x = linear_vae()
    x = x[:6]
    guide, exact = best_guide(model, x, DiagonalNormal), model.log_evidence(x).double()
    options: Any = {"num_samples": 20, **BRIEF}

    def bound(values: Tensor, name: str) -> Estimate:
        return Estimate(name, "lower", values, torch.full_like(values, 0.01), torch.full_like(values, 50.0), 64)

    good, poor = bound(exact + 0.5, "annealed"), bound(exact - 9.0, "poor")
    assert gaps(model, guide, x, log_evidence=[poor, good], **options).evidence == "annealed, K = 64: a lower bound"
    assert gaps(model, guide, x, log_evidence=poor, **options).evidence.startswith("importance bound")
    low = gaps(model, guide, x, log_evidence=exact - 9.0, **options)
    assert any("nats below the ELBO of q*" in note for note in low.notes) and low.summary["approximation"] < -8


def test_the_mode_is_said_everywhere() -> None:
    model, x = linear_vae()
    guide = best_guide(model, x, DiagonalNormal)
    run: Callable[..., Gaps] = partial(gaps, num_samples=10, **BRIEF)
    assert run(model, guide, x[:4]).mode == "fixed decoder"
    model.requires_grad_(True)
    joint = run(model, guide, x[:4])
    assert joint.mode == "joint training" and "gaps of several models" in repr(joint)
    assert run(model, guide, x[:4], mode="fixed decoder").table().attrs["mode"] == "fixed decoder"


def test_nothing_of_the_pair_moves() -> None:
    model, x = linear_vae()
    model.requires_grad_(True)
    guide = best_guide(model, x, FullNormal, SHIFT)
    model.weight.requires_grad_(False)
    model.train()
    guide.eval()

    def state() -> list[Any]:
        tensors = [t for home in (model, guide) for t in home.state_dict().values()]
        flags = [p.requires_grad for home in (model, guide) for p in home.parameters()]
        modes = [part.training for home in (model, guide) for part in home.modules()]
        return [[t.numpy().tobytes() for t in tensors], flags, modes, torch.get_rng_state().numpy().tobytes()]

    before = state()
    found = [gaps(model, guide, x[:6], num_samples=30, seed=seed, **BRIEF) for seed in (0, 0, 1)]
    assert state() == before
    assert found[0].summary == found[1].summary != found[2].summary

    class Broken(nn.Module):
        def __init__(self, features: int, context: int = 0) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(features))

        def forward(self, context: Tensor | None = None) -> Any:
            return dist.Normal(self.loc, torch.full_like(self.loc, math.nan), validate_args=False).to_event(1)

    with pytest.raises(GuideError, match=r"outside the model's support"):  # of its first draw, the model frozen
        gaps(model, guide, x[:6], num_samples=30, family=Broken)
    assert state() == before


def test_a_guide_by_hand_is_served_where_the_family_is_named() -> None:
    model, x = linear_vae()
    precision = model.precision().detach()

    def by_hand(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = dist.Normal(model.posterior(x).mean.detach() + SHIFT, precision.diagonal() ** -0.5)
            pyro.sample("z", q.to_event(1))

    with pytest.raises(GuideError, match=r"family=DiagonalNormal"):
        gaps(model, by_hand, x)
    found = gaps(model, by_hand, x, family=DiagonalNormal, num_samples=300, log_evidence=model.log_evidence(x))
    assert abs(found.summary["amortization"] - kl_of_shift(model)) < 4.5 * found.summary["amortization_mc_se"] + 0.005
    assert found.summary["approximation"] == pytest.approx(float(model.diagonal_gap()), abs=0.03)


# --------------------------------------------------------------------------------------------------- bad input


def with_global(x: Tensor) -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, s).to_event(1), obs=x)


def with_discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).expand([len(x), 6]).to_event(1), obs=x)


def test_pairs_without_gaps_are_refused_by_name() -> None:
    model, x = linear_vae()
    guide = best_guide(model, x, DiagonalNormal)
    with pytest.raises(ModelError, match=r"'s'.* is global.*poutine.condition"):
        gaps(with_global, Joint(with_global, x), x)
    with pytest.raises(ModelError, match=r"'k' is discrete.*sum it out"):
        gaps(with_discrete, Joint(with_discrete, x), x)
    with pytest.raises(GuideError, match=r"no density.*DiagonalNormal"):
        gaps(model, Amortized(model, x, family=Point), x)
    with pytest.raises(GuideError, match=r"nothing is amortized"):
        gaps(model, Free(model, x), x)
    with pytest.raises(GuideError, match=r"not the density that its family has at the encoder's output.*family="):
        gaps(model, SemiAmortized(model, x[:4]), x[:4])
    conditioned = poutine.condition(with_global, {"s": torch.tensor(1.0)})
    joint = Joint(conditioned, x[:4])
    assert len(gaps(conditioned, joint, x[:4], num_samples=5, **BRIEF).per_datum) == 4
    with pytest.raises(DataError, match=r"1 row"):
        gaps(model, guide, x[:1])
    with pytest.raises(DataError, match=r"train has 2 arrays"):
        gaps(model, guide, x, train=(x, x))


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"num_samples": 1}, OptionError, "num_samples is 1"),
        ({"tolerance": 0.0}, OptionError, "tolerance is 0.0"),
        ({"lr": -1.0}, OptionError, "lr is -1.0"),
        ({"max_steps": 0}, OptionError, "max_steps is 0"),
        ({"round_steps": 2.5}, OptionError, "round_steps is 2.5"),
        ({"free_samples": True}, OptionError, "free_samples is True"),
        ({"begin": ("prior",)}, OptionError, "begin is"),
        ({"mode": "frozen"}, OptionError, "'fixed decoder', 'joint training'"),
        ({"train_log_evidence": torch.zeros(4)}, OptionError, "without train"),
        ({"log_evidence": torch.zeros(3)}, DataError, "each of 4 rows"),
        ({"log_evidence": [0.5]}, OptionError, "expected a tensor of exact values"),
        ({"log_evidence": Estimate.of(torch.zeros(5, 4), "reverse", "upper")}, OptionError, "upper bound"),
        ({"log_evidence": Estimate.of(torch.zeros(5, 3), "other rows")}, DataError, "of 3 rows"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], told: str) -> None:
    model, x = linear_vae()
    guide = best_guide(model, x, DiagonalNormal)
    few: dict[str, Any] = {"num_samples": 5, **BRIEF}
    with pytest.raises(error, match=told):
        gaps(model, guide, x[:4], **{**few, **options})
