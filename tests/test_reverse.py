"""Exact posterior draws as judges: closed forms of Gaussians, exact guides, and a mode that the ELBO does not miss."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from dgm.errors import DataError, GuideError, OptionError
from dgm.guides.auxiliary import Auxiliary
from dgm.guides.global_ import Global
from dgm.models import bayesian_linear_regression
from dgm.models.linear_vae import LinearVAE
from dgm.models.vae import example as vae_example
from dgm.reverse import mode_coverage, reverse_diagnostics


class Posterior(PyroModule):
    """The exact posterior of a linear VAE, its standard deviations times `factor`; diagonal on demand."""

    def __init__(self, model, factor=1.0, diagonal=False):
        super().__init__()
        self.__dict__["model"] = model
        self.factor, self.diagonal = factor, diagonal

    def density(self, x):
        exact = self.model.posterior(x)
        if self.diagonal:
            return dist.Normal(exact.mean, self.factor * self.model.precision().diagonal().rsqrt()).to_event(1)
        return dist.MultivariateNormal(exact.mean, self.factor**2 * exact.covariance_matrix)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.density(x))


def linear(rows=12):
    generator = torch.Generator().manual_seed(0)
    model, x = LinearVAE.simulate(rows, features=5, latent=2, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    return model, x, model.posterior(x).sample((4000,)).detach()


def test_at_the_exact_posterior_both_bounds_are_the_evidence_and_every_draw_counts():
    model, x, z = linear()
    found = reverse_diagnostics(model, Posterior(model), x, exact={"z": z[:50]}, log_evidence=model.log_evidence(x))
    truth = model.log_evidence(x).detach()
    for values in (found.eubo.values, found.forward.values, found.elbo.values):
        torch.testing.assert_close(values, truth)
    torch.testing.assert_close(found.forward_ess, torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(found.reverse_ess, torch.ones(12, dtype=torch.float64))
    assert found.forward_kl.abs().max() < 1e-9 and found.reverse_kl.abs().max() < 1e-9
    assert found.eubo.mc_se < 1e-9 and found.eubo.side == "upper" and found.elbo.side == "lower"


@pytest.mark.parametrize("options", [{"factor": 1.5}, {"factor": 0.7}, {"diagonal": True}])
def test_the_upper_bound_is_the_evidence_plus_the_forward_kl_of_gaussians(options):
    model, x, z = linear()
    guide, truth = Posterior(model, **options), model.log_evidence(x).detach()
    found = reverse_diagnostics(model, guide, x, exact={"z": z}, log_evidence=truth)
    exact = model.posterior(x)
    q = guide.density(x)
    q = q if isinstance(q, dist.MultivariateNormal) else dist.MultivariateNormal(q.mean, q.variance.diag_embed())
    forward, reverse = (torch.distributions.kl_divergence(*pair).detach() for pair in ((exact, q), (q, exact)))
    assert ((found.eubo.values - truth - forward) / found.eubo.errors).abs().max() < 4.5
    assert ((found.elbo.values - truth + reverse) / found.elbo.errors).abs().max() < 4.5
    assert (found.forward_kl.mean() - forward.mean()).abs() < 4.5 * found.eubo.mc_se
    torch.testing.assert_close(found.symmetric_kl, found.forward_kl + found.reverse_kl)
    # the mutant: the two directions are not one number, and neither may stand for the other
    assert (found.forward_kl.mean() - reverse.mean()).abs() > 20 * found.eubo.mc_se or options.get("diagonal")


def test_both_shares_of_effective_draws_are_the_closed_form():
    """q = N(0, s^2 P) wider than p = N(0, P): E_q[(p/q)^2] = (s^4 / (2 s^2 - 1))^(d / 2)."""
    model, x, z = linear()
    truth = model.log_evidence(x).detach()
    share = ((2 * 1.3**2 - 1) / 1.3**4) ** (2 / 2)
    known = reverse_diagnostics(model, Posterior(model, 1.3), x, exact={"z": z}, log_evidence=truth)
    found = reverse_diagnostics(model, Posterior(model, 1.3), x, exact={"z": z})
    for ess in (known.forward_ess, found.forward_ess, known.reverse_ess):
        assert abs(ess.mean().item() - share) < 0.01 and ess.std() < 0.02
    assert share < 0.85  # so that a share of 1 fails


def test_global_latents_and_unconstrained_vectors():
    model, batch = bayesian_linear_regression.example()
    torch.manual_seed(0)
    guide = Global(model, *batch)
    exact = model.posterior(*batch)
    w = exact.sample((2000,))
    truth = model.log_evidence(*batch)
    found = reverse_diagnostics(model, guide, *batch, exact={"w": w}, log_evidence=truth)
    q = guide.family()
    q = dist.MultivariateNormal(q.mean, q.variance.diag_embed())
    kl = torch.distributions.kl_divergence(exact, q).item()
    assert found.eubo.values.shape == (1,)
    assert abs(found.forward_kl.item() - kl) < 4.5 * found.eubo.mc_se
    same = reverse_diagnostics(model, guide, *batch, exact=w, log_evidence=truth)
    torch.testing.assert_close(same.eubo.values, found.eubo.values)


def test_a_positive_latent_by_value_and_by_vector():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0 + x, 2.0))

    x = torch.tensor([0.0, 1.0, 5.0])
    z = dist.Gamma(2.0 + x, torch.tensor(2.0)).sample((20,))
    found = reverse_diagnostics(model, exact, x, exact={"z": z})
    assert found.symmetric_kl.abs().max() < 1e-4
    by_vector = reverse_diagnostics(model, exact, x, exact=z.log()[..., None])
    torch.testing.assert_close(by_vector.eubo.values, found.eubo.values, rtol=1e-4, atol=1e-4)


# --- a mode that is missed -------------------------------------------------------------------------------------------

MODES = torch.tensor([[-4.0], [4.0]])


def two_modes(x):
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(MODES[:, 0], 0.5))
    pyro.sample("z", mixture.mask(True))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def one_mode(x):
    pyro.sample("z", dist.Normal(4.0, 0.5))


def test_a_guide_that_misses_a_mode_has_a_good_elbo_and_is_found_out_from_the_other_side():
    x = torch.zeros(3)
    torch.manual_seed(0)
    z = MODES[torch.randint(2, (500,)), 0] + 0.5 * torch.randn(500)
    truth = dist.Normal(0.0, 1.0).log_prob(x).sum()
    found = reverse_diagnostics(two_modes, one_mode, x, exact={"z": z}, log_evidence=truth)
    assert found.reverse_kl.item() == pytest.approx(math.log(2), abs=1e-3)  # the ELBO misses 0.7 nats
    assert found.reverse_ess.item() > 0.999  # and by its own draws the guide is perfect
    assert found.forward_kl.item() > 50 and found.forward_ess.item() < 1e-6
    draws = 4.0 + 0.5 * torch.randn(500, 1)
    missed = mode_coverage(draws, MODES)
    assert missed.emc == 0.0 and missed.missing == (0,)
    assert missed.divergence == pytest.approx(0.75 * math.log2(4 / 3), abs=1e-6)  # of (0, 1) and (1/2, 1/2)
    covered = mode_coverage(z[:, None], MODES)
    assert covered.emc > 0.99 and covered.missing == () and covered.divergence < 0.01


def test_coverage_of_unequal_modes_is_the_entropy_and_the_divergence_says_that_it_is_right():
    labels = torch.tensor([0] * 90 + [1] * 10 + [2] * 0)
    centres = torch.tensor([[0.0], [10.0], [20.0]])
    found = mode_coverage(centres[labels] + 0.1, centres, weights=torch.tensor([0.9, 0.1, 1e-9]))
    assert found.emc == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(3))
    assert found.divergence < 1e-6 and found.missing == (2,)
    # by a function, labels or probabilities, and by reference draws
    by_label = mode_coverage(
        centres[labels], lambda z: (z[:, 0] / 10).round().long(), reference=centres[labels.flip(0)]
    )
    assert by_label.occupancy.tolist() == pytest.approx([0.9, 0.1])
    soft = mode_coverage(centres[labels], lambda z: torch.full((len(z), 4), 0.25))
    assert soft.emc == 1.0


def test_the_error_of_the_coverage_is_its_spread():
    generator = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(200):
        labels = (torch.rand(200, generator=generator) < 0.2).long()
        runs.append(mode_coverage(labels[:, None].double(), torch.tensor([[0.0], [1.0]])))
    emc, errors = (torch.tensor([getattr(r, n) for r in runs]) for n in ("emc", "se"))
    assert 0.8 < errors.mean() / emc.std() < 1.25


# --- what must be refused --------------------------------------------------------------------------------------------


def test_bad_draws_and_guides_are_named():
    model, x, z = linear()
    guide = Posterior(model)
    broken = z[:5].clone()
    broken[1, 2, 0] = math.nan
    for exact, words in (
        ({"z": z[:1]}, "expected at least 2 draws, got 1"),
        ({}, "latent 'z' are missing"),
        ({"z": z[:5, :3]}, r"values of 'z': expected shape \(5, 12, 2\)"),
        ({"z": broken}, "values of 'z': 1 lie outside of real, or are NaN"),
        (z[:5, :, :1], r"expected unconstrained vectors \(S, 12, 2\)"),
    ):
        with pytest.raises(DataError, match=words):
            reverse_diagnostics(model, guide, x, exact=exact)
    with pytest.raises(DataError, match="log_evidence: expected 12 values, got 3"):
        reverse_diagnostics(model, guide, x, exact={"z": z[:5]}, log_evidence=torch.zeros(3))
    with pytest.raises(OptionError, match=r"log p\(x\) is not known"):
        _ = reverse_diagnostics(model, guide, x, exact={"z": z[:5]}).forward_kl
    network, batch = vae_example()
    with pytest.raises(GuideError, match="draws the auxiliary variable"):
        reverse_diagnostics(network, Auxiliary(network, *batch), *batch, exact={"z": torch.zeros(3, 20, 2)})


def test_bad_modes_are_named():
    z = torch.randn(20, 2)
    for modes, options, error in (
        (torch.zeros(3, 1), {}, OptionError),
        (torch.zeros(1, 2), {}, OptionError),
        (torch.zeros(2, 2), {"weights": torch.tensor([1.0, 0.0])}, OptionError),
        (torch.zeros(2, 2), {"weights": torch.ones(3)}, OptionError),
        (torch.zeros(2, 2), {"weights": torch.ones(2), "reference": z}, OptionError),
        (lambda v: torch.zeros(3).long(), {}, DataError),
        (lambda v: torch.full((20,), 5), {"weights": torch.ones(2)}, DataError),
    ):
        with pytest.raises(error):
            mode_coverage(z, modes, **options)
    with pytest.raises(DataError, match="at least 10 draws"):
        mode_coverage(z[:3], torch.zeros(2, 2))
    with pytest.raises(DataError, match="not finite"):
        mode_coverage(z / 0.0, torch.zeros(2, 2))
