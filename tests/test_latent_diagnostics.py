"""Latent diagnostics against linear Gaussian models: KL, activity, information and collapse, all known exactly."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from dgm.errors import DataError, GuideError, ModelError, OptionError
from dgm.fit import fit
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import mlp
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from dgm.guides.point import Point
from dgm.guides.semi_amortized import SemiAmortized
from dgm.guides.top_down import TopDown
from dgm.latent_diagnostics import latent_diagnostics
from dgm.models import bayesian_linear_regression, hierarchical_vae, vae
from dgm.models.linear_vae import LinearVAE


class Exact(PyroModule):
    """The exact posterior of a linear VAE, or the best normal one of independent coordinates."""

    def __init__(self, model, diagonal=False):
        super().__init__()
        self.__dict__["model"] = model
        self.diagonal = diagonal

    def density(self, x):
        exact = self.model.posterior(x)
        if self.diagonal:
            return dist.Normal(exact.mean, self.model.precision().diagonal().rsqrt()).to_event(1)
        return exact

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.density(x))


def linear(rows=1500, latent=2, dead=0, scale=0.8):
    generator = torch.Generator().manual_seed(0)
    model = LinearVAE(5, latent, generator)
    with torch.no_grad():
        model.log_scale.fill_(math.log(scale))
        model.weight[:, latent - dead :] = 0.0
    return model, model.sample(rows, generator)


def kl_by_dimension(q):
    return 0.5 * (q.variance + q.mean.square() - 1 - q.variance.log())


# --- KL by dimension -------------------------------------------------------------------------------------------------


def test_the_kl_of_a_factorised_normal_is_the_closed_form_in_every_dimension():
    model, x = linear(300)
    guide = Exact(model, diagonal=True)
    found = latent_diagnostics(model, guide, x, num_samples=8, max_rows=0)
    with torch.no_grad():
        exact = kl_by_dimension(guide.density(x))
    assert list(found.units["how"]) == ["closed form"] * 2
    torch.testing.assert_close(torch.tensor(found.units["kl"].to_numpy()), exact.mean(0).double(), rtol=1e-5, atol=1e-6)
    assert found.kl == pytest.approx(exact.sum(1).mean().item(), rel=1e-5)
    assert found.kl_se == pytest.approx(exact.sum(1).std().item() / 300**0.5, rel=1e-4)
    assert found.aggregate is None


def test_the_kl_of_a_full_normal_is_its_closed_form_in_all_and_its_marginals_by_dimension():
    model, _ = linear(2)
    with torch.no_grad():
        model.weight[:, 1] += model.weight[:, 0]  # so that the two coordinates depend on each other
    x = model.sample(300, torch.Generator().manual_seed(1))
    found = latent_diagnostics(model, Exact(model), x, num_samples=200, max_rows=0)
    with torch.no_grad():
        q = model.posterior(x)
        whole = torch.distributions.kl_divergence(q, dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        marginal = kl_by_dimension(q).mean(0)
    assert list(found.units["how"]) == ["by moments"] * 2
    spread = (whole.mean() / (300 * 200) ** 0.5).item()  # of an average of log q - log p: about their mean
    assert abs(found.kl - whole.mean().item()) < 6 * spread
    for j in range(2):
        assert found.units["kl"][j] == pytest.approx(marginal[j].item(), abs=0.01)
    assert marginal.sum() < whole.mean() - 0.02  # what the coordinates share is in none of them: it would be noticed


def test_the_bound_by_moments_has_no_bias_of_few_draws():
    """The logarithm of a variance of 8 draws is 0.15 too low: without the correction every unit gains 0.07 nats."""
    model, x = linear(1500)
    found = latent_diagnostics(model, Exact(model), x, num_samples=8, max_rows=0)
    with torch.no_grad():
        marginal = kl_by_dimension(model.posterior(x)).mean(0)
    for j in range(2):
        assert abs(found.units["kl"][j] - marginal[j].item()) < 0.035


def two_layers(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        low = pyro.sample("low", dist.Normal(2.0 * top.unsqueeze(-1).expand(*top.shape, 2), 0.5).to_event(1))
        pyro.sample("x", dist.Normal(low.sum(-1), 1.0), obs=x)


def apart(x):
    """Independent normals for both layers; the lower one does not look at the data."""
    with pyro.plate("data", len(x)):
        pyro.sample("top", dist.Normal(0.5 * x, 0.7))
        pyro.sample(
            "low", dist.Normal(torch.tensor([0.3, -0.3]), torch.tensor([0.4, 0.6])).expand([len(x), 2]).to_event(1)
        )


def test_a_layers_prior_is_the_models_given_the_layer_above():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = latent_diagnostics(two_layers, apart, x, num_samples=500, max_rows=100)
    top = 0.5 * (0.49 + 0.25 * x.square() - 1 - math.log(0.49))
    loc, scale = torch.tensor([0.3, -0.3]), torch.tensor([0.4, 0.6])
    gap = scale.square() + (loc - x[:, None]).square() + 4 * 0.49  # E (low - 2 top)^2
    low = (0.5 / scale).log() + gap / 0.5 - 0.5
    exact = torch.cat([top[:, None], low], 1).mean(0)
    for j in range(3):
        spread = 8.0 / (200 * 500) ** 0.5  # (low - 2 top)^2 / 0.5 has a standard deviation of some 8
        assert abs(found.units["kl"][j] - exact[j].item()) < (1e-5 if j == 0 else 4.5 * spread)
    assert list(found.sites["site"]) == ["top", "low"] and list(found.sites["active"]) == [1, 0]
    assert "All units of 'low' are." in found.verdict and found.verdict.startswith("2 of 3")
    assert abs(found.aggregate.kl - found.kl) < 4.5 * found.aggregate.kl_se + found.kl_se
    standard = 0.5 * (scale.square() + loc.square() - 1 - scale.square().log())
    assert abs(found.sites["kl"][1] - standard.sum().item()) > 1.0  # the mutant: a standard normal prior for each layer


def test_every_guide_of_the_zoo_on_a_deep_model():
    model, batch = hierarchical_vae.example()
    for make in (TopDown, Free, lambda m, *b: Amortized(m, *b, family=InverseAutoregressiveFlow)):
        torch.manual_seed(0)
        found = latent_diagnostics(model, make(model, *batch), *batch, num_samples=16)
        assert list(found.sites["site"]) == ["z_2", "z_1"] and list(found.sites["units"]) == [2, 3]
        assert found.units["kl"].notna().all() and found.aggregate is not None
        assert abs(found.kl - found.aggregate.kl) < 4.5 * (found.aggregate.kl_se + found.kl_se)
        names, kl, active = found.bars()
        assert len(names) == len(kl) == len(active) == 5 and names[0] == "z_2[0]"
        assert found.verdict in repr(found) and found.rests in repr(found)


# --- activity --------------------------------------------------------------------------------------------------------


def test_activity_is_the_variance_of_the_posterior_mean_and_dead_columns_are_exactly_the_inactive_units():
    model, x = linear(1000, latent=4, dead=2)
    found = latent_diagnostics(model, Exact(model), x, num_samples=32, max_rows=0)
    with torch.no_grad():
        exact = model.posterior(x).mean.var(0)
    for j in range(4):
        assert abs(found.units["activity"][j] - exact[j].item()) < 4.5 * found.units["activity_se"][j] + 1e-6
    assert list(found.units["active"]) == [True, True, False, False]
    assert found.active == 2 and found.share == 0.5 and not found.collapsed
    assert found.verdict == "2 of 4 latent units are inactive: they carry nothing of the data."
    assert "0.01" in found.rests and "2016" in found.rests


def test_few_draws_do_not_wake_dead_units():
    """The mean of 8 draws of N(0, 1) has a variance of 1/8 by chance: without the correction every unit is active."""
    model, x = linear(3000, latent=4, dead=2)
    found = latent_diagnostics(model, Exact(model), x, num_samples=8, max_rows=0)
    assert list(found.units["active"]) == [True, True, False, False]
    assert (found.units["activity"][2:] - 0.0).abs().max() < 4.5 * found.units["activity_se"][2:].max()
    torch.manual_seed(0)
    with torch.no_grad():
        naive = model.posterior(x).sample((8,)).mean(0).var(0)  # the mutant
    assert bool((naive > 0.1).all())
    # where q says its mean there is no noise to correct
    told = latent_diagnostics(model, Exact(model, diagonal=True), x, num_samples=8, max_rows=0)
    assert told.units["activity"][2:].abs().max() < 1e-10


def test_the_error_of_an_activity_is_its_spread_over_data():
    model, _ = linear(2)
    generator = torch.Generator().manual_seed(0)
    runs = [
        latent_diagnostics(model, Exact(model), model.sample(100, generator), num_samples=8, max_rows=0, seed=i)
        for i in range(40)
    ]
    activity = torch.tensor([r.units["activity"][0] for r in runs])
    errors = torch.tensor([r.units["activity_se"][0] for r in runs])
    truth = (1 - torch.linalg.inv(model.precision()).diagonal()[0]).item()
    assert abs(activity.mean() - truth) < 4.5 * activity.std() / 40**0.5
    assert 0.7 < errors.mean() / activity.std() < 1.4


def test_a_decoder_that_ignores_its_latents_is_a_collapse_and_the_verdict_says_so():
    model, x = linear(400, latent=3, dead=3)
    found = latent_diagnostics(model, Exact(model), x, num_samples=16)
    assert found.collapsed and found.active == 0
    assert found.verdict == "The posterior has collapsed: none of the 3 latent units depends on the data."
    assert found.kl < 1e-5 and abs(found.aggregate.information) < 1e-5
    alive = latent_diagnostics(*(lambda m, v: (m, Exact(m), v))(*linear(400)), num_samples=16)
    assert alive.verdict == "No collapse: all 2 latent units depend on the data."


class Series(PyroModule):
    """x_t ~ N(a x_(t-1) + w_t z, 1.25^2): a decoder that sees the past of a series needs no latent for it."""

    def __init__(self, past):
        super().__init__()
        self.carry = nn.Parameter(torch.tensor(0.5), requires_grad=past)
        self.weight = nn.Parameter(0.3 * torch.ones(6, 2))
        self.past = past

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
            loc = (self.carry * before if self.past else 0.0) + z @ self.weight.mT
            pyro.sample("x", dist.Normal(loc, 1.25).to_event(1), obs=x)


@pytest.mark.parametrize("past", [True, False])
def test_training_with_a_strong_decoder_collapses_and_with_a_weak_one_does_not(past):
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(400, 7)
    for t in range(1, 7):
        x[:, t] = 0.95 * x[:, t - 1] + torch.randn(400, generator=generator)
    model = Series(past)
    torch.manual_seed(0)
    guide = Amortized(model, x[:, 1:], encoder=mlp(16))
    fit(model, guide, x[:, 1:], steps=500, batch_size=100, lr=2e-2)
    found = latent_diagnostics(model, guide, x[:, 1:], num_samples=16, max_rows=100)
    assert found.collapsed == past
    assert found.verdict.startswith("The posterior has collapsed") == past
    assert found.aggregate.information < 0.05 if past else found.aggregate.information > 0.5


# --- mutual information and the aggregate posterior ------------------------------------------------------------------


def test_the_two_bounds_on_the_information_hold_the_closed_form_between_them():
    """I(x; z) = log det(I + W' W / s^2) / 2 at the exact posterior, and q(z) is then the prior."""
    model, x = linear(600, scale=1.0)
    found = latent_diagnostics(model, Exact(model), x, num_samples=8, max_rows=600).aggregate
    truth = torch.linalg.slogdet(model.precision()).logabsdet.item() / 2
    slack = 4.5 * found.information_se
    assert found.rows == 600 and found.limit == pytest.approx(math.log(600))
    assert found.information - slack < truth < found.information_upper + slack
    assert found.information_upper - found.information < 0.1 and 0.5 < truth < found.limit - 2
    assert found.marginal_lower - 4.5 * found.marginal_se < 0 < found.marginal + 4.5 * found.marginal_se
    assert found.marginal < 0.1
    assert found.kl - found.information > 4 * found.kl_se or found.marginal < 0.1


def test_kl_is_information_and_marginal_kl_together():
    model, x = linear(250)
    guide = Exact(model, diagonal=True)
    with torch.no_grad():
        exact = kl_by_dimension(guide.density(x)).sum(1).mean().item()
    runs = [latent_diagnostics(model, guide, x, num_samples=64, max_rows=250, seed=i).aggregate for i in range(8)]
    parts = torch.tensor([r.information + r.marginal for r in runs])
    assert abs(parts.mean() - exact) < 4.5 * parts.std() / 8**0.5
    assert all(r.information + r.marginal == pytest.approx(r.kl, abs=1e-9) for r in runs)
    assert all(r.marginal_lower < r.marginal for r in runs)


def test_a_shifted_guide_has_a_marginal_kl_and_no_information():
    """q = N(1, 1) for every x: a KL of half a nat in each unit that says nothing of the data."""
    model, x = linear(200)

    def shifted(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.ones(len(x), 2), 1.0).to_event(1))

    found = latent_diagnostics(model, shifted, x, num_samples=16)
    assert found.kl == pytest.approx(1.0, abs=1e-5) and found.collapsed
    assert abs(found.aggregate.information) < 1e-5
    assert abs(found.aggregate.marginal - 1.0) < 4.5 * found.aggregate.marginal_se


def test_more_information_than_the_rows_can_show_is_said():
    model, x = linear(40, latent=4, scale=0.01)
    found = latent_diagnostics(model, Exact(model), x, num_samples=8)
    truth = torch.linalg.slogdet(model.precision()).logabsdet.item() / 2
    a = found.aggregate
    assert truth > 2 * a.limit and a.information <= a.limit + 1e-6 < a.information_upper
    assert "near the limit log 40" in found.rests


def test_a_prior_that_depends_on_the_data_has_no_marginal_kl():
    def conditional(c, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    c, x = torch.linspace(-1, 1, 50), torch.linspace(0, 2, 50)

    def guide(c, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((c + x) / 2, 0.5**0.5))

    found = latent_diagnostics(conditional, guide, c, x, num_samples=8)
    assert found.aggregate.marginal is None and found.aggregate.marginal_lower is None
    assert found.aggregate.information > 0.1 and "KL(q(z)" not in repr(found)


def test_a_guide_with_noise_of_its_own_has_its_kl_and_a_note():
    model, batch = vae.example()
    torch.manual_seed(0)
    found = latent_diagnostics(model, SemiAmortized(model, *batch, encoder=mlp(8), steps=1), *batch, num_samples=8)
    assert found.aggregate is None and found.notes[0].startswith("No mutual information: SemiAmortized draws noise")
    assert found.active >= 0 and found.verdict in repr(found)


def test_chunks_of_rows_and_guides_with_parameters_for_each_row(monkeypatch):
    model, x = linear(90)
    torch.manual_seed(0)
    guide = Free(model, x, family=FullNormal)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    whole = latent_diagnostics(model, guide, x, num_samples=400, max_rows=40)
    monkeypatch.setattr(sys.modules["dgm.latent_diagnostics"], "BLOCK", 25)
    parts = latent_diagnostics(model, guide, x, num_samples=400, max_rows=40)
    assert parts.kl == pytest.approx(whole.kl, rel=0.02) and whole.kl > 0.02
    for j in range(2):
        assert parts.units["activity"][j] == pytest.approx(whole.units["activity"][j], abs=0.02)
    before = torch.get_rng_state()
    again = latent_diagnostics(model, guide, x, num_samples=400, max_rows=40)
    assert again.kl == parts.kl and torch.equal(before, torch.get_rng_state())


def test_a_plate_that_declares_all_rows_changes_no_number():
    def declared(x):
        with pyro.plate("data", 300, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def plain(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (declared, plain):
        torch.manual_seed(0)
        found.append(latent_diagnostics(model, Amortized(model, x, family=FullNormal), x, num_samples=32))
    assert found[0].kl == pytest.approx(found[1].kl, rel=1e-4) and found[1].kl > 0.01
    assert found[0].aggregate.kl == pytest.approx(found[1].aggregate.kl, rel=1e-4)


# --- what must be refused --------------------------------------------------------------------------------------------


def discrete(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)


def test_what_has_no_local_continuous_latents_is_named():
    model, x = linear(20)
    with pytest.raises(OptionError, match="at least 8 draws"):
        latent_diagnostics(model, Exact(model), x, num_samples=2)
    with pytest.raises(OptionError, match="a positive threshold"):
        latent_diagnostics(model, Exact(model), x, threshold=0.0)
    with pytest.raises(DataError, match="at least 2 rows, got 1"):
        latent_diagnostics(model, Exact(model), x[:1])
    with pytest.raises(GuideError, match="as points"):
        latent_diagnostics(model, Amortized(model, x, family=Point), x)
    regression, batch = bayesian_linear_regression.example()
    with pytest.raises(ModelError, match="latent 'w' of BayesianLinearRegression is global"):
        latent_diagnostics(
            regression, lambda x, y: pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)), *batch
        )
    with pytest.raises(ModelError, match="latent 'k' of discrete is discrete"):
        latent_diagnostics(discrete, discrete_guide, torch.zeros(5))
    with pytest.raises(ModelError, match="no latent inside a data plate"):
        latent_diagnostics(lambda x: observed(x), lambda x: None, torch.zeros(5))


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(torch.ones(len(x), 2)))


def observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
