"""Calibration passes what is exact and catches bias, a wrong scale, a wrong prior, the prior itself, correlation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from scipy.stats import binom
from torch import Tensor

import dgm
from dgm.calibration import Calibration, calibrate
from dgm.calibration_plots import ecdf_band
from dgm.calibration_verdict import table_of
from dgm.errors import GuideError, ModelError, OptionError, TrainingError
from dgm.guides.amortized import Amortized
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.discrete import Discrete
from dgm.guides.encoders import linear
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.point import Point
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.linear_vae import LinearVAE
from dgm.pair import Pair
from dgm.posterior_ranks import PosteriorRanks
from dgm.runs import Runs
from dgm.simulate import simulate_sets

Program = Callable[..., Any]
ROWS = 15
EXACT = 1 / (ROWS + 1) ** 0.5  # posterior standard deviation of the mean: 0.25


def normal(x: Tensor) -> None:
    """m ~ N(0, 1), x_n ~ N(m, 1)."""
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def posterior(shift: float = 0.0, scale: float = 1.0, prior: float = 1.0) -> Program:
    """q(m | x) = N(sum(x) / (n + 1) + shift, scale^2 / (n + 1)), or that of the prior N(0, prior^2)."""

    def guide(x: Tensor) -> None:
        precision = len(x) + prior**-2
        pyro.sample("m", dist.Normal(x.sum() / precision + shift, scale * precision**-0.5))

    return guide


def of_normal(guide: Program, sets: int = 300, **options: Any) -> Calibration:
    return calibrate(normal, guide, torch.zeros(ROWS), trained=True, sets=sets, **options)


def row(result: Calibration, coordinate: str) -> dict[str, float]:
    found = result.table[result.table["coordinate"] == coordinate].drop(columns=["site", "coordinate"])
    assert len(found) == 1
    return {str(name): float(column.iloc[0]) for name, column in found.items()}


# --- one latent for a whole data set, by formulas ---------------------------------------------------------------------


def test_the_exact_posterior_passes() -> None:
    result = of_normal(posterior())
    assert result.calibrated and result.verdict.level == "good" and result.cases == 300
    m = row(result, "m")
    assert m["cover_90_low"] < 0.9 < m["cover_90_high"]
    assert abs(m["bias"]) < 3 * m["bias_se"] and m["spread"] == pytest.approx(1, abs=4.5 / 600**0.5)
    assert "300 data sets" in repr(result) and "chi-square on 20 bins" in repr(result) and "Holm at 5 %" in repr(result)


def test_bias() -> None:
    """+0.15, that is 0.6 posterior standard deviations: seen by everything, and said with its sign."""
    result = of_normal(posterior(shift=0.15))
    m = row(result, "m")
    assert not result.calibrated and m["p_symmetry"] < 1e-6 and m["p_ks"] < 1e-6
    assert m["bias"] == pytest.approx(-0.15 / EXACT, abs=4.5 * m["bias_se"])
    u = result.frame.loc[result.frame["coordinate"] == "m", "u"]
    assert u.mean() < 0.4, "a truth below the draws has a low rank"
    assert "m: " in result.verdict.says and "the truth lies -0." in result.verdict.says


def test_half_the_scale_is_missed_by_symmetry_alone() -> None:
    """Over-confidence, the usual fault of variational inference: coverage and ranks see it, symmetry does not."""
    result = of_normal(posterior(scale=0.5))
    m = row(result, "m")
    assert not result.calibrated and m["p_symmetry"] > 0.05
    assert m["p_bins"] < 1e-9 and m["p_cover"] < 1e-9 and m["p_ks"] < 1e-3
    assert m["cover_90_low"] < 0.59 < m["cover_90_high"]  # P(|N(0, 1)| < 0.5 * 1.645) = 0.589
    assert m["spread"] == pytest.approx(2, abs=0.4) and "too narrow" in result.verdict.says


def test_twice_the_scale() -> None:
    result = of_normal(posterior(scale=2.0))
    assert not result.calibrated and row(result, "m")["spread"] == pytest.approx(0.5, abs=0.1)
    assert "too wide" in result.verdict.says and row(result, "m")["p_symmetry"] > 0.05


def test_the_wrong_prior_is_missed_by_symmetry_alone() -> None:
    """A posterior that believes m ~ N(0, 0.1^2): too narrow and drawn to 0, on both sides alike."""
    result = of_normal(posterior(prior=0.1))
    m = row(result, "m")
    assert not result.calibrated and m["p_symmetry"] > 0.05
    assert m["p_bins"] < 1e-9 and m["cover_90_high"] < 0.6


def hierarchy(x: Tensor) -> None:
    """m ~ N(0, 1), z_n ~ N(m, 1), x_n ~ N(z_n, 1)."""
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(("local", "caught"), [(1.0, False), (0.4, True)])
def test_global_and_local_latents_together(local: float, caught: bool) -> None:
    """A set is one case, and the first row stands for its latents: those of one set depend on one another."""

    def guide(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.sum() / (len(x) + 2), (1 / (1 + len(x) / 2)) ** 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((m + x) / 2, local * 0.5**0.5))

    result = calibrate(hierarchy, guide, torch.zeros(8), trained=True, sets=300)
    assert list(result.table["coordinate"]) == ["m", "z", "log likelihood", "log joint"] and result.cases == 300
    assert result.calibrated is not caught
    assert (row(result, "z")["p_holm"] < 1e-6) is caught and row(result, "m")["p_holm"] > 0.05


def test_what_is_ranked() -> None:
    """The latents of the first row, log p(x | z) and log p(x, z) of a set; or those of each row."""
    x = torch.zeros(8)
    found = simulate_sets(hierarchy, x, sets=3)
    sites = list(dgm.latents(hierarchy, x).values())
    whole = PosteriorRanks([Pair(hierarchy, hierarchy)], found, [0, 1, 2], sites, {"data"}, per_row=False)
    m, z, data = found.latents["m"][2], found.latents["z"][2], found.data[0][2]
    likelihood = dist.Normal(z, 1.0).log_prob(data).sum()
    joint = likelihood + dist.Normal(m, 1.0).log_prob(z).sum() + dist.Normal(0.0, 1.0).log_prob(m)
    torch.testing.assert_close(whole.truth(2), torch.stack([m, z[0], likelihood, joint])[None])
    model, rows = linear_vae()
    many = simulate_sets(model, rows, sets=2)
    each = PosteriorRanks(
        [Pair(model, of_rows(model))], many, [0, 1], list(dgm.latents(model, rows).values()), {"data"}, True
    )
    z, data = many.latents["z"][1], many.data[0][1]
    with torch.no_grad():
        likelihood = model.decode(z).log_prob(data)
    joint = likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(each.truth(1), torch.cat([z, likelihood[:, None], joint[:, None]], 1))


# --- latents of each datum, under a guide that is not fitted again ----------------------------------------------------


def linear_vae() -> tuple[LinearVAE, Tensor]:
    return LinearVAE.simulate(100, 5, 2, scale=0.6, generator=torch.Generator().manual_seed(0))


def of_rows(model: LinearVAE, scale: float = 1.0) -> Program:
    def guide(x: Tensor) -> None:
        exact: Any = model.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(exact.mean, scale_tril=scale * exact.scale_tril))

    return guide


def test_every_row_is_a_case() -> None:
    model, x = linear_vae()
    result = calibrate(model, of_rows(model), x, trained=True, sets=350)
    assert result.calibrated and result.cases == 350 and len(result.frame) == 350 * 4
    assert list(result.table["coordinate"]) == ["z[0]", "z[1]", "log likelihood", "log joint"]
    assert result.frame["row"].max() == 99 and set(result.frame["set"]) == {0, 1, 2, 3}
    assert result.frame["rank"].between(0, 199).all() and not result.refitted
    narrow = calibrate(model, of_rows(model, 0.5), x, trained=True, sets=350)
    assert not narrow.calibrated and row(narrow, "z[0]")["p_symmetry"] > 0.05
    assert row(narrow, "z[0]")["cover_90_high"] < 0.7


def test_a_guide_that_is_the_prior_is_caught_by_the_likelihood_alone() -> None:
    model, x = linear_vae()

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    result = calibrate(model, prior, x, trained=True, sets=200)
    assert row(result, "z[0]")["p_holm"] > 0.05 and row(result, "z[1]")["p_holm"] > 0.05
    assert not result.calibrated and row(result, "log likelihood")["p_holm"] < 1e-9
    assert "log likelihood: the truth fits better than the draws" in result.verdict.says
    assert "does not look at the data" in result.verdict.rests


def mixture(x: Tensor) -> None:
    """c_n ~ Bernoulli(0.3), x_n ~ N(2 c_n, 1)."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
        pyro.sample("x", dist.Normal(2 * c, 1.0), obs=x)


@pytest.mark.parametrize(("tempered", "right"), [(1.0, True), (0.2, False)])
def test_discrete_latents_by_randomised_ranks(tempered: float, right: bool) -> None:
    def guide(x: Tensor) -> None:
        logits = tempered * (2 * x - 2 + torch.tensor(0.3).logit())
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=logits))

    result = calibrate(mixture, guide, torch.zeros(400), trained=True, sets=400, draws=50)
    assert result.calibrated is right
    if right:
        assert row(result, "c")["p_bins"] > 0.01


@pytest.mark.slow
def test_trained_encoders() -> None:
    """Linear encoders of a linear VAE: full covariance is exact, a diagonal one too narrow where latents correlate."""
    model = LinearVAE(5, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.1]]).expand(5, 2) + 0.3 * torch.randn(5, 2))
        model.log_scale.fill_(-0.5)
    model.requires_grad_(False)
    x = model.sample(1000, torch.Generator().manual_seed(0))
    verdicts = []
    for family in (FullNormal, DiagonalNormal):
        guide = Amortized(model, x, family=family, encoder=linear())
        schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3000)
        dgm.fit(model, guide, x, steps=3000, lr=0.02, schedule=schedule, loss=dgm.ELBO(estimator="stl"))
        verdicts.append(calibrate(model, guide, x[:200], trained=True, sets=400))
    assert verdicts[0].calibrated, verdicts[0]
    assert not verdicts[1].calibrated and row(verdicts[1], "z[0]")["cover_90_high"] < 0.85


# --- one fit for each data set, all in one computation ----------------------------------------------------------------


def fitting(steps: int = 120) -> dict[str, Any]:
    """No variance at the exact posterior, and a step that goes to 0: what is left is the family's own error."""
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    return {"steps": steps, "lr": 0.1, "schedule": schedule, "loss": dgm.ELBO(estimator="stl"), "compile": "trace"}


def test_global_latents_of_the_exact_family(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    passes = PosteriorRanks._pass

    def counted(self: PosteriorRanks, first: Runs, places: range, noise: Any) -> Tensor:
        seen.extend(places)
        return passes(self, first, places, noise)

    monkeypatch.setattr(PosteriorRanks, "_pass", counted)
    monkeypatch.setattr(Runs, "passes", lambda *a: pytest.fail("sets were drawn from one by one"))
    before = torch.get_rng_state()
    make = partial(Global, family=DiagonalNormal)
    result = calibrate(normal, make, torch.zeros(ROWS), trained=False, sets=60, **fitting())
    assert seen == list(range(60)) and torch.equal(before, torch.get_rng_state())
    assert result.calibrated and result.refitted and result.cases == 60 and not result.failed
    assert row(result, "m")["spread"] == pytest.approx(1, abs=4.5 / 120**0.5)
    assert "the guide fitted to each" in result.verdict.rests


def correlated() -> tuple[BayesianLinearRegression, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 1, generator=generator) + 0.6 * torch.randn(20, 2, generator=generator)
    return BayesianLinearRegression(2, noise=0.5), x, torch.zeros(20)


@pytest.mark.slow
def test_a_diagonal_guide_of_correlated_weights_fails_in_coverage() -> None:
    """Its scales are (1 - r^2)^(1/2) of the posterior's: z-scores spread by the inverse of that."""
    model, x, y = correlated()
    covariance = model.posterior(x, y).covariance_matrix
    ratio = float((covariance.inverse().diagonal() * covariance.diagonal()).sqrt()[0])
    assert ratio > 2
    result = calibrate(model, partial(Global, family=DiagonalNormal), x, y, trained=False, sets=50, **fitting(300))
    w = row(result, "w[0]")
    assert not result.calibrated and w["cover_90_high"] < 0.9 and w["p_cover"] < 1e-6
    assert w["p_symmetry"] > 1e-3 and w["spread"] == pytest.approx(ratio, rel=4.5 / 100**0.5)
    assert "too narrow" in result.verdict.says


@pytest.mark.slow
def test_a_full_covariance_passes_where_the_diagonal_fails() -> None:
    model, x, y = correlated()
    result = calibrate(model, partial(Global, family=FullNormal), x, y, trained=False, sets=200, **fitting(1000))
    assert result.calibrated, result


@pytest.mark.slow
def test_a_model_with_parameters_stays_as_it_is() -> None:
    """A fit would otherwise move the likelihood towards each data set: here its scale."""

    class Noisy(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(m, self.log_scale.exp()), obs=x)

    model = Noisy()
    result = calibrate(model, Global, torch.zeros(4), trained=False, sets=50, **fitting(100))
    assert result.calibrated and float(model.log_scale.detach()) == 0.0 and model.log_scale.requires_grad


def sometimes(limit: float) -> Program:
    """A maker whose guide starts at infinity for data sets with a mean above the limit."""

    def make(model: Program, x: Tensor) -> Global:
        guide = Global(model, x, family=DiagonalNormal)
        if float(x.mean()) > limit:
            with torch.no_grad():
                next(guide.parameters()).fill_(torch.inf)
        return guide

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_fits_that_diverge_are_counted() -> None:
    result = calibrate(normal, sometimes(1.2), torch.zeros(ROWS), trained=False, sets=70, **fitting(20))
    assert 4 < len(result.failed) < 20 and result.cases == 70 - len(result.failed)
    assert not set(result.failed) & set(result.frame["set"])
    assert f"{len(result.failed)} of 70 data sets left out" in result.verdict.rests
    assert not result.calibrated, "data sets are lost, and not by chance"
    with pytest.raises(TrainingError, match=r"data sets have no ranks .*mend the fit"):
        calibrate(normal, sometimes(-0.5), torch.zeros(ROWS), trained=False, sets=50, **fitting(5))


# --- what the numbers are worth ---------------------------------------------------------------------------------------


def test_the_verdict_rejects_an_exact_guide_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(150):
        frame = pd.DataFrame({"site": "z", "coordinate": np.repeat(["a", "b", "c"], 60), "u": rng.uniform(size=180)})
        frame["z"] = rng.normal(size=180)
        rejected += int(table_of(frame)["p_holm"].min() < 0.05)
    assert 1 <= rejected <= int(binom.ppf(0.999, 150, 0.05))


@pytest.mark.slow
def test_whole_calibrations_reject_an_exact_guide_as_often_as_they_say() -> None:
    rejected = sum(not of_normal(posterior(), sets=60, draws=50, seed=seed).calibrated for seed in range(100))
    assert rejected <= int(binom.ppf(0.999, 100, 0.05))
    assert sum(not of_normal(posterior(scale=0.5), sets=60, draws=50, seed=seed).calibrated for seed in range(20)) >= 19


def test_bands_hold_whole_curves() -> None:
    rng, at = np.random.default_rng(1), np.linspace(0.01, 0.99, 99)
    low, high = ecdf_band(100, at)
    pointwise = [binom.ppf(p, 100, at) / 100 - at for p in (0.025, 0.975)]
    inside = []
    for _ in range(800):
        ecdf = np.searchsorted(np.sort(rng.uniform(size=100)), at, side="right") / 100 - at
        inside.append([((ecdf >= a) & (ecdf <= b)).all() for a, b in ((low, high), pointwise)])
    whole, single = np.mean(inside, axis=0)
    assert 0.92 < whole < 0.98 and single < 0.8


def test_seeds_and_pictures() -> None:
    a, b, c = (of_normal(posterior(), sets=60, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(a.frame, b.frame)
    assert not a.frame["rank"].equals(c.frame["rank"])
    figure = a.plot(most=2)
    assert len(figure.axes) == 4
    with pytest.raises(OptionError, match="most is 0"):
        a.plot(most=0)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_numbers() -> None:
    for options, message in (
        ({"sets": 49}, "sets is 49, expected a whole number, at least 50"),
        ({"sets": True}, "sets is True"),
        ({"draws": 10}, "draws is 10"),
        ({"level": 1.0}, "level is 1.0"),
    ):
        with pytest.raises(OptionError, match=message):
            of_normal(posterior(), **{"sets": 60, **options})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"trained=True and fit options \['lr'\]"):
        of_normal(posterior(), sets=60, lr=0.1)
    with pytest.raises(OptionError, match="'replicas' is set by the calibration"):
        calibrate(normal, Global, torch.zeros(ROWS), trained=False, sets=60, replicas=3)


def test_points_have_no_ranks() -> None:
    x = torch.zeros(ROWS)
    with pytest.raises(GuideError, match="Global is a point: its draws are all the same"):
        calibrate(normal, partial(Global, family=Point), x, trained=False, sets=60)
    model, data = linear_vae()
    with pytest.raises(GuideError, match="Amortized is a point"):
        calibrate(model, Amortized(model, data, family=Point), data, trained=True, sets=60)


def test_guides_and_makers_are_told_apart() -> None:
    x = torch.zeros(ROWS)
    with pytest.raises(GuideError, match="trained=True and the guide is what makes one"):
        of_normal(partial(Global, family=DiagonalNormal), sets=60)
    with pytest.raises(GuideError, match="the guide is a Global: give what makes it"):
        calibrate(normal, Global(normal, x), x, trained=False, sets=60)


def test_a_guide_of_one_data_set_is_refused() -> None:
    with pytest.raises(GuideError, match=r"Global gives the same draws whatever the data .*trained=False"):
        of_normal(Global(normal, torch.zeros(ROWS)), sets=60)
    model, x = linear_vae()
    with pytest.raises(GuideError, match="Free gives the same draws whatever the data"):
        calibrate(model, Free(model, x), x, trained=True, sets=60)


def test_models_that_cannot_be_simulated_from() -> None:
    def doubled(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=2 * x)

    with pytest.raises(ModelError, match="'y' is none of the 1 arguments"):
        calibrate(doubled, Global, torch.zeros(ROWS), trained=False, sets=60)

    def none(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ModelError, match="no latent"):
        calibrate(none, none, torch.zeros(ROWS), trained=True, sets=60)

    def own(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, scale), obs=x)

    with pytest.raises(GuideError, match=r"the model .*own is a function with pyro.param"):
        calibrate(own, Global, torch.zeros(ROWS), trained=False, sets=60)


def test_a_discrete_latent_without_a_guide() -> None:
    def nothing(x: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"latent 'c' .*discrete"):
        calibrate(mixture, nothing, torch.zeros(60), trained=True, sets=60)
    guide = Discrete(mixture, torch.randn(60))
    assert calibrate(mixture, guide, torch.zeros(60), trained=True, sets=60, draws=50).cases == 60
