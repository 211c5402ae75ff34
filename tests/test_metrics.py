"""Predictive metrics: hand-made cases, calibrated simulations, and the usual mistakes as mutants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pyro.ops.stats import crps_empirical
from scipy.stats import binomtest, norm

from dgm.errors import DataError, OptionError
from dgm.metrics import CategoricalPrediction, GaussianPrediction, VectorPrediction, energy_score
from dgm.mixtures import mixture_quantile
from dgm.reliability import reliability, wilson


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def calibrated_mixture(draws: int, data: int, seed: int = 0) -> GaussianPrediction:
    """y is drawn from its own predictive mixture: a component at random, then its Gaussian."""
    rng = generator(seed)
    loc = 2 * normal(draws, data, rng=rng)
    scale = 0.3 + torch.rand(draws, data, generator=rng, dtype=torch.float64)
    pick = torch.randint(draws, (1, data), generator=rng)
    y = loc.gather(0, pick)[0] + scale.gather(0, pick)[0] * normal(data, rng=rng)
    return GaussianPrediction(loc, scale, y, y_std=3.0)


# ---------------------------------------------------------------- regression, exact cases


def test_point_prediction_by_hand() -> None:
    p = GaussianPrediction(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0]]), torch.tensor([1.0, -1.0]), y_std=10.0)
    assert p.rmse() == pytest.approx(10 * math.sqrt((1 + 4) / 2))
    by_hand = [-0.5 * (e / 2) ** 2 - math.log(2 * math.sqrt(2 * math.pi)) - math.log(10) for e in (1, 2)]
    assert p.log_likelihoods().tolist() == pytest.approx(by_hand)
    assert p.log_likelihood() == pytest.approx(sum(by_hand) / 2)


def test_scores_are_those_of_the_original_scale() -> None:
    """Standardising y and undoing it in the metrics is the same as never having standardised."""
    mean, std = 40.0, 9.0
    p = calibrated_mixture(7, 30)
    there = GaussianPrediction(p.loc, p.scale, p.y, y_std=std)
    here = GaussianPrediction(mean + std * p.loc, std * p.scale, mean + std * p.y)
    assert there.summary() == pytest.approx(here.summary())


def test_log_likelihood_is_the_log_of_the_mean_density() -> None:
    p = GaussianPrediction(torch.tensor([[0.0], [4.0]]), torch.tensor(1.0), torch.tensor([0.0]))
    density = (1 + math.exp(-8)) / 2 / math.sqrt(2 * math.pi)
    assert p.log_likelihood() == pytest.approx(math.log(density))
    mean_of_logs = torch.distributions.Normal(p.loc, p.scale).log_prob(p.y).mean().item()
    assert p.log_likelihood() - mean_of_logs > 3  # the mutant: averages the logs


def test_log_likelihood_of_far_targets_is_finite() -> None:
    p = GaussianPrediction(torch.zeros(3, 1), torch.tensor(1e-3), torch.tensor([100.0]))
    assert math.isfinite(p.log_likelihood())


def test_pit_and_coverage_of_a_two_part_mixture() -> None:
    """Parts far apart: the median lies between them, and the central 40 % interval runs from one into the other."""
    p = GaussianPrediction(
        torch.tensor([[-10.0] * 4, [10.0] * 4]), torch.ones(2, 1), torch.tensor([-10.0, 0.0, 10.0, 13.0])
    )
    assert p.pit().tolist() == pytest.approx([0.25, 0.5, 0.75, (1 + 0.99865) / 2], abs=1e-5)
    assert [p.coverage(level) for level in (0.4, 0.6, 0.9986, 0.9987)] == [0.25, 0.75, 0.75, 1.0]


def test_crps_of_one_gaussian_at_its_mean() -> None:
    p = GaussianPrediction(torch.zeros(1, 1), torch.tensor(2.0), torch.zeros(1), y_std=5.0)
    assert p.crps() == pytest.approx(5 * 2 * (math.sqrt(2) - 1) / math.sqrt(math.pi))


def test_crps_of_a_sharp_prediction_is_the_absolute_error() -> None:
    p = GaussianPrediction(torch.tensor([[1.0, -2.0]]), torch.tensor(1e-9), torch.zeros(2))
    assert p.crps() == pytest.approx(1.5, abs=1e-8)


def test_crps_is_the_integral_of_the_squared_distance_of_distribution_functions() -> None:
    p = calibrated_mixture(3, 4)
    grid = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    total = 0.0
    for n in range(4):
        cdf = torch.special.ndtr((grid[:, None] - p.loc[:, n]) / p.scale[:, n]).mean(1)
        total += torch.trapezoid((cdf - (grid >= p.y[n]).double()).square(), grid).item()
    assert p.crps() == pytest.approx(3.0 * total / 4, rel=1e-3)


def test_crps_of_a_part_of_the_draws() -> None:
    p = GaussianPrediction(torch.zeros(1000, 5), torch.ones(1000, 1), torch.zeros(5))
    assert p.crps(10) == pytest.approx(p.crps(1))


# ---------------------------------------------------------------- regression, calibration


def test_calibrated_predictions_are_found_calibrated() -> None:
    n = 4000
    p = calibrated_mixture(20, n)
    for level in (0.1, 0.5, 0.9, 0.95):
        assert abs(p.coverage(level) - level) < 4 * math.sqrt(level * (1 - level) / n)
    u = p.pit().sort().values
    distance = (u - torch.arange(1, n + 1) / n).abs().max().item()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov's 0.1 % point
    assert p.calibration_error() < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_wrong_scale_is_found(factor: float) -> None:
    p = calibrated_mixture(1, 2000)
    wrong = GaussianPrediction(p.loc, factor * p.scale, p.y, p.y_std)
    assert (wrong.coverage(0.9) < 0.9 - 0.1) if factor < 1 else (wrong.coverage(0.9) > 0.9 + 0.05)
    assert wrong.calibration_error() > 5 * p.calibration_error()
    assert wrong.log_likelihood() < p.log_likelihood()
    assert wrong.crps() > p.crps()


def test_forgetting_the_spread_of_the_draws_is_found() -> None:
    """The mutant: mean of the locations and of the scales instead of the mixture."""
    p = calibrated_mixture(20, 2000)
    mutant = GaussianPrediction(p.loc.mean(0, keepdim=True), p.scale.mean(0, keepdim=True), p.y, p.y_std)
    assert mutant.rmse() == pytest.approx(p.rmse())
    assert mutant.coverage(0.9) < 0.7


@pytest.mark.parametrize("shape", [(6, 5), (6, 1), (1, 5), ()])
def test_shapes_of_scale(shape: tuple[int, ...]) -> None:
    full = GaussianPrediction(torch.zeros(6, 5), torch.full((6, 5), 0.7), torch.arange(5.0))
    p = GaussianPrediction(torch.zeros(6, 5), torch.full(shape, 0.7), torch.arange(5.0))
    assert p.summary() == full.summary()


def test_regression_refusals() -> None:
    loc, scale, y = torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(3)
    with pytest.raises(DataError, match=r"\(4, 3\) and \(3, 1\).*one-column"):
        GaussianPrediction(loc, scale, y[:, None])
    with pytest.raises(DataError, match=r"got \(4,\).*scale\[:, None\]"):
        GaussianPrediction(loc, torch.ones(4), y)
    with pytest.raises(DataError, match=r"got \(3, 4\)"):
        GaussianPrediction(loc, torch.ones(3, 4), y)
    with pytest.raises(DataError, match="smallest of 0"):
        GaussianPrediction(loc, 0 * scale, y)
    with pytest.raises(DataError, match="y: expected finite values, got 1 of 3"):
        GaussianPrediction(loc, scale, torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(DataError, match="loc and y"):
        GaussianPrediction(loc[:, :0], scale, y[:0])
    for y_std in (0.0, -1.0, math.nan):
        with pytest.raises(OptionError, match="y_std"):
            GaussianPrediction(loc, scale, y, y_std)
    p = GaussianPrediction(loc, scale, y)
    with pytest.raises(OptionError, match="90"):
        p.coverage(90)
    with pytest.raises(OptionError, match="got none"):
        p.calibration_error([])
    with pytest.raises(OptionError, match="max_draws"):
        p.crps(0)


# ---------------------------------------------------------------- classification


def test_classification_by_hand() -> None:
    probs = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.3, 0.6, 0.1], [0.1, 0.3, 0.6]]])
    p = CategoricalPrediction.from_probs(probs, torch.tensor([0, 1]))  # means (.5 .4 .1), (.1 .2 .7)
    assert p.accuracy() == 0.5
    assert p.log_likelihoods().exp().tolist() == pytest.approx([0.5, 0.2])
    assert p.brier() == pytest.approx(((0.25 + 0.16 + 0.01) + (0.01 + 0.64 + 0.49)) / 2)
    assert p.expected_calibration_error() == pytest.approx((0.5 + 0.7) / 2)
    assert p.expected_calibration_error(bins=1) == pytest.approx(abs(0.5 - 0.6))


def test_constant_predictions() -> None:
    p = CategoricalPrediction(torch.zeros(5, 30, 3), torch.arange(30) % 3)
    assert p.accuracy() == pytest.approx(1 / 3)
    assert p.log_likelihood() == pytest.approx(-math.log(3))
    assert p.brier() == pytest.approx(2 / 3)
    assert p.expected_calibration_error() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(p.predictive_entropy(), torch.full((30,), math.log(3), dtype=torch.float64))
    assert p.mutual_information().abs().max() < 1e-12


def test_perfect_and_perfectly_wrong() -> None:
    one_hot = torch.eye(3)[None]
    right = CategoricalPrediction.from_probs(one_hot, torch.arange(3))
    assert right.summary() == pytest.approx(
        dict(accuracy=1, log_likelihood=0, brier=0, expected_calibration_error=0, entropy=0, mutual_information=0)
    )
    wrong = CategoricalPrediction.from_probs(one_hot, torch.tensor([1, 2, 0]))
    assert wrong.accuracy() == 0
    assert wrong.log_likelihood() == -math.inf
    assert wrong.brier() == 2
    assert wrong.expected_calibration_error() == 1


def test_disagreement_is_information_and_noise_is_not() -> None:
    certain = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws, each sure, of opposite opinion
    noisy = torch.full((2, 1, 2), 0.5)  # two draws that agree on a coin
    y = torch.tensor([0])
    for probs, information in ((certain, math.log(2)), (noisy, 0.0)):
        p = CategoricalPrediction.from_probs(probs, y)
        assert p.predictive_entropy().item() == pytest.approx(math.log(2))
        assert p.mutual_information().item() == pytest.approx(information, abs=1e-12)


def test_log_likelihood_averages_probabilities_not_logits() -> None:
    logits = torch.tensor([[[6.0, 0.0]], [[-6.0, 0.0]]])
    p = CategoricalPrediction(logits, torch.tensor([0]))
    assert p.log_likelihood() == pytest.approx(math.log(0.5))
    mean_of_logs = logits.log_softmax(-1)[:, 0, 0].mean().item()
    assert p.log_likelihood() - mean_of_logs > 2  # the mutant


def test_two_class_logits_and_log_probabilities() -> None:
    rng = generator()
    logits, y = normal(4, 20, rng=rng), torch.randint(2, (20,), generator=rng)
    p = CategoricalPrediction(logits, y)
    torch.testing.assert_close(p.probs[:, 1], logits.sigmoid().mean(0))
    same = CategoricalPrediction(torch.stack([-logits / 2, logits / 2], -1) + 3.0, y.float())
    assert same.summary() == pytest.approx(p.summary())
    again = CategoricalPrediction(p.logits, y)
    assert again.summary() == pytest.approx(p.summary())


def test_calibrated_classes_are_found_calibrated_and_sharpened_ones_not() -> None:
    """y drawn from the predictive itself. Each bin's gap has a standard error of at most sqrt(n_b)/2N."""
    rng, n, bins = generator(), 5000, 15
    logits = 1.5 * normal(1, n, 4, rng=rng)
    y = torch.distributions.Categorical(logits=logits[0]).probs.multinomial(1, generator=rng)[:, 0]
    right = CategoricalPrediction(logits, y)
    assert right.expected_calibration_error(bins) < 4 * 0.5 * math.sqrt(bins / n)
    confidence = right.probs.max(-1).values
    deviation = (confidence * (1 - confidence)).sum().sqrt() / n
    assert abs(right.accuracy() - confidence.mean()) < 4 * deviation
    mutant = CategoricalPrediction(3 * logits, y)
    assert mutant.accuracy() == right.accuracy()
    assert mutant.expected_calibration_error(bins) > 0.15
    assert mutant.log_likelihood() < right.log_likelihood()
    assert mutant.brier() > right.brier()


def test_ece_bins_are_closed_above() -> None:
    probs = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]]])
    p = CategoricalPrediction(probs.log(), torch.tensor([0, 1, 1]))
    # with two bins 0.5 belongs to the lower one: gaps |1 - 1| and |0 - 0.75|
    assert p.expected_calibration_error(2) == pytest.approx(0.25)


def test_classification_refusals() -> None:
    logits, y = torch.zeros(5, 4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(DataError, match="0 to 2, got values from 1 to 3"):
        CategoricalPrediction(logits, y + 1)
    with pytest.raises(DataError, match="one-hot"):
        CategoricalPrediction(logits, torch.zeros(4, 3))
    with pytest.raises(DataError, match="class numbers"):
        CategoricalPrediction(logits, torch.tensor([0.0, 0.5, 1.0, 2.0]))
    with pytest.raises(DataError, match="NaN or infinity"):
        CategoricalPrediction(logits * math.nan, y)
    with pytest.raises(DataError, match="sum to 1"):
        CategoricalPrediction.from_probs(logits, y)
    with pytest.raises(DataError, match="logits and y"):
        CategoricalPrediction(logits[:0], y)
    with pytest.raises(OptionError, match="bins"):
        CategoricalPrediction(logits, y).expected_calibration_error(0)


def test_inputs_are_left_alone() -> None:
    logits = torch.zeros(2, 3, 2, requires_grad=True)
    p = CategoricalPrediction(logits, torch.tensor([0, 1, 1]))
    assert not p.probs.requires_grad
    assert logits.dtype == torch.float32


# ---------------------------------------------------------------- intervals, widths, errors of means


def test_quantiles_invert_the_distribution_function() -> None:
    """Overlapping parts, parts so far apart that the density between them is 0, one that is very narrow."""
    rng = generator()
    loc = torch.cat([5 * normal(7, 40, rng=rng), torch.tensor([[-1e6] * 40, [1e6] * 40]).double()])
    scale = torch.rand(9, 40, generator=rng, dtype=torch.float64) + 0.01
    scale[0] = 1e-8
    for level in (1e-4, 0.05, 0.5, 0.8, 0.95, 0.9999):
        q = mixture_quantile(loc, scale, level)
        cdf = torch.special.ndtr((q - loc) / scale).mean(0)
        near = torch.special.ndtr((q * (1 + 1e-12) + 1e-9 - loc) / scale).mean(0)  # a narrow part is a step
        assert ((cdf - level).abs().lt(1e-8) | ((cdf <= level) & (near >= level))).all()


def test_interval_of_one_gaussian_in_closed_form() -> None:
    p = GaussianPrediction(
        torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 2.0]]), torch.tensor([1.0, 10.0]), y_std=3.0
    )
    z = norm.ppf(0.95)
    low, _ = p.interval()
    assert low.tolist() == pytest.approx([1 - 0.5 * z, -2 - 2 * z])
    assert p.sharpness() == pytest.approx(3 * z * 2.5)
    outside = 20 * (12 - 2 * z)  # 2 / alpha times the distance to the upper end
    assert p.interval_score() == pytest.approx(3 * (z + 4 * z + outside) / 2)
    assert p.scores()["interval_score_90"].mean() == pytest.approx(p.interval_score())


def test_coverage_by_the_quantiles_is_coverage_by_the_pit() -> None:
    p = calibrated_mixture(15, 400)
    low, high = p.interval(0.8)
    assert ((low <= p.y) & (p.y <= high)).double().mean().item() == p.coverage(0.8)


def test_the_interval_score_is_lowest_where_the_scale_is_right() -> None:
    p = calibrated_mixture(1, 3000)
    for factor in (0.5, 2.0):
        wrong = GaussianPrediction(p.loc, factor * p.scale, p.y, p.y_std)
        assert wrong.interval_score() > 1.1 * p.interval_score()
        assert wrong.sharpness() == pytest.approx(factor * p.sharpness())


def test_summary_is_the_mean_of_the_scores_with_its_error() -> None:
    p = calibrated_mixture(5, 300)
    frame, summary = p.scores(), p.summary(errors=True)
    assert summary["rmse"] == pytest.approx(p.rmse()) and summary["crps"] == pytest.approx(p.crps())
    assert summary["coverage_90"] == p.coverage(0.9)
    assert summary["crps_se"] == pytest.approx(frame["crps"].std() / math.sqrt(300))
    assert summary["rmse_se"] == pytest.approx(frame["squared_error"].std() / math.sqrt(300) / (2 * p.rmse()))
    frame[:] = 0.0  # a copy: the prediction is not changed by it
    assert p.summary()["crps"] == summary["crps"]
    one = GaussianPrediction(torch.zeros(2, 1), torch.tensor(1.0), torch.ones(1)).summary(errors=True)
    assert math.isnan(one["crps_se"]) and one["rmse"] == 1.0


def test_errors_of_means_cover_the_truth() -> None:
    """y ~ N(0, 1) predicted as such: E log p = -(log 2 pi + 1) / 2, rmse 1, CRPS 1 / sqrt(pi)."""
    rng, n, times = generator(1), 150, 200
    exact = {"log_likelihood": -(math.log(2 * math.pi) + 1) / 2, "rmse": 1.0, "crps": 1 / math.sqrt(math.pi)}
    inside = dict.fromkeys(exact, 0)
    halved = 0
    for _ in range(times):
        found = GaussianPrediction(torch.zeros(1, n), torch.tensor(1.0), normal(n, rng=rng)).summary(errors=True)
        for name, truth in exact.items():
            inside[name] += abs(found[name] - truth) < 1.976 * found[f"{name}_se"]
        halved += abs(found["crps"] - exact["crps"]) < 0.5 * 1.976 * found["crps_se"]
    assert all(0.90 <= count / times <= 0.99 for count in inside.values()), inside
    assert halved / times < 0.85  # the mutant


# ---------------------------------------------------------------- several numbers


def test_energy_score_of_one_dimension_is_the_crps() -> None:
    rng = generator()
    x, y = normal(30, 20, 1, rng=rng), normal(20, 1, rng=rng)
    torch.testing.assert_close(energy_score(x, y, fair=False), crps_empirical(x[..., 0], y[:, 0]))


def test_the_fair_energy_score_is_that_of_the_density() -> None:
    """Few draws of the predictive density: unbiased for its exact CRPS; as they stand they are not."""
    p = calibrated_mixture(1, 20_000)
    x = (p.loc + p.scale * normal(5, 20_000, rng=generator(1)))[..., None]
    exact, y = p.scores()["crps"].to_numpy() / p.y_std, p.y[:, None]
    for fair, holds in ((True, True), (False, False)):
        gap = energy_score(x, y, fair).numpy() - exact
        assert (abs(gap.mean()) < 4.5 * gap.std() / math.sqrt(len(gap))) == holds


def test_energy_score_by_hand_is_blind_to_no_dependence() -> None:
    x = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
    y = torch.tensor([[0.0, 0.0]])
    assert energy_score(x, y, fair=False).item() == pytest.approx(2.5 - 0.25 * 5)
    assert energy_score(x, y).item() == pytest.approx(2.5 - 0.5 * 5)
    rng, rho, n = generator(), 0.95, 3000
    z = normal(2, n, rng=rng)
    y = torch.stack([z[0], rho * z[0] + math.sqrt(1 - rho**2) * z[1]], -1)
    e = normal(40, n, 2, rng=rng)
    right = torch.stack([e[..., 0], rho * e[..., 0] + math.sqrt(1 - rho**2) * e[..., 1]], -1)
    gap = energy_score(e, y) - energy_score(right, y)  # the same margins, without the dependence
    assert gap.mean() > 4.5 * gap.std() / math.sqrt(n)


def test_vectors_of_one_number_are_numbers() -> None:
    p = calibrated_mixture(50, 200)
    v = VectorPrediction(p.loc[..., None], p.scale[..., None], p.y[:, None], y_std=torch.tensor([3.0]))
    torch.testing.assert_close(v.log_likelihoods(), p.log_likelihoods())
    ours, theirs = v.summary(errors=True), p.summary(errors=True)
    assert ours["rmse"] == pytest.approx(theirs["rmse"]) and ours["rmse_se"] == pytest.approx(theirs["rmse_se"])
    gap = v.scores()["energy_score"] - p.scores()["crps"]
    assert abs(gap.mean()) < 4.5 * gap.std() / math.sqrt(200)
    assert torch.equal(v.draws(7, seed=3), v.draws(7, seed=3)) and v.draws(7).shape == (7, 200, 1)


def test_vectors_in_their_own_units() -> None:
    rng = generator()
    loc, y, units = normal(4, 6, 3, rng=rng), normal(6, 3, rng=rng), torch.tensor([1.0, 10.0, 100.0])
    there = VectorPrediction(loc, torch.tensor(0.5), y, units)
    here = VectorPrediction(units * loc, 0.5 * units, units * y)
    assert there.summary() == pytest.approx(here.summary())


def test_vector_refusals() -> None:
    loc, y = torch.zeros(4, 3, 2), torch.zeros(3, 2)
    with pytest.raises(DataError, match=r"got \(4, 3, 2\) and \(3,\)"):
        energy_score(loc, y[:, 0])
    with pytest.raises(DataError, match="at least 2 for a fair score"):
        energy_score(loc[:1], y)
    with pytest.raises(DataError, match="y: expected finite values, got 6 of 6"):
        energy_score(loc, y * math.nan)
    with pytest.raises(DataError, match="loc and y"):
        VectorPrediction(loc[..., 0], torch.tensor(1.0), y[:, 0])
    with pytest.raises(DataError, match="broadcasts"):
        VectorPrediction(loc, torch.ones(5), y)
    with pytest.raises(DataError, match="smallest of 0"):
        VectorPrediction(loc, torch.zeros(()), y)
    with pytest.raises(DataError, match="loc: expected finite"):
        VectorPrediction(loc * math.nan, torch.ones(()), y)
    with pytest.raises(OptionError, match="or 2 of them"):
        VectorPrediction(loc, torch.ones(()), y, torch.ones(3))
    with pytest.raises(OptionError, match="num"):
        VectorPrediction(loc, torch.ones(()), y).draws(0)


# ---------------------------------------------------------------- reliability


def test_wilson_is_scipys() -> None:
    hits, trials = np.array([0, 3, 10, 50]), np.array([10, 10, 10, 80])
    low, high = wilson(hits, trials, 0.9)
    theirs = [binomtest(int(k), int(n)).proportion_ci(0.9, method="wilson") for k, n in zip(hits, trials, strict=True)]
    assert low.tolist() == pytest.approx([ci.low for ci in theirs], abs=1e-12)
    assert high.tolist() == pytest.approx([ci.high for ci in theirs])
    assert np.isnan(wilson(np.array([0]), np.array([0]))[0]).all()


def test_bins_of_equal_width_and_of_equal_mass() -> None:
    rng = generator()
    c = 0.9 + 0.1 * torch.rand(1000, generator=rng, dtype=torch.float64)  # all in two of fifteen bins
    right = torch.rand(1000, generator=rng, dtype=torch.float64) < c
    wide, even = reliability(c, right, 10), reliability(c, right, 10, "equal-mass")
    assert (wide.frame["count"] > 0).sum() == 1 and wide.frame["accuracy"].isna().sum() == 9
    assert even.frame["count"].tolist() == [100] * 10 and even.name == "ECE, 10 equal-mass bins"
    assert wide.ece == pytest.approx(abs(c.mean() - right.double().mean()).item())
    for found in (wide, even):
        known = found.frame.dropna()
        assert found.frame["count"].sum() == 1000
        weighted = (known["count"] * (known["accuracy"] - known["confidence"]).abs()).sum() / 1000
        assert found.ece == pytest.approx(weighted)
        assert ((known["accuracy_low"] <= known["accuracy"]) & (known["accuracy"] <= known["accuracy_high"])).all()
        assert ((known["lower"] < known["confidence"]) & (known["confidence"] <= known["upper"])).all()


def test_equal_mass_keeps_ties_together_and_knows_no_order() -> None:
    c = torch.tensor([0.5] * 90 + [0.9] * 10)
    right = torch.tensor([True, False] * 50)
    found, turned = (reliability(c.flip(d), right.flip(d), 10, "equal-mass") for d in ([], [0]))
    assert found.frame["count"].tolist() == [90, 10] and found.ece == turned.ece
    assert reliability(torch.full((5,), 0.7), torch.ones(5), 3, "equal-mass").frame["count"].tolist() == [5]
    assert reliability(torch.tensor([0.7]), torch.ones(1), 3, "equal-mass").ece == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["equal-width", "equal-mass"])
def test_calibrated_predictions_have_the_error_of_chance_which_falls_to_zero(kind: Any) -> None:
    rng, z = generator(), []
    for n in (500, 50_000):
        logits = 1.5 * normal(1, n, 4, rng=rng)
        y = logits[0].softmax(-1).multinomial(1, generator=rng)[:, 0]
        found = CategoricalPrediction(logits, y).reliability(15, kind)
        z.append((found.ece - found.chance) / found.chance_sd)
        mutant = CategoricalPrediction(2 * logits, y).reliability(15, kind)
        assert mutant.ece > mutant.chance + 4.5 * mutant.chance_sd
    assert max(map(abs, z)) < 4.5 and found.ece < 0.02


def test_the_chance_of_calibration_is_its_expectation() -> None:
    rng, times = generator(), 400
    c = 0.5 + 0.5 * torch.rand(300, generator=rng, dtype=torch.float64)
    founds = [reliability(c, torch.rand(300, generator=rng, dtype=torch.float64) < c) for _ in range(times)]
    eces = np.array([found.ece for found in founds])
    assert abs(eces.mean() - founds[0].chance) < 4.5 * eces.std() / math.sqrt(times) + 0.02 * founds[0].chance
    assert eces.std() == pytest.approx(founds[0].chance_sd, rel=0.2)


def test_errors_of_class_scores() -> None:
    logits, y = normal(3, 200, 4, rng=generator()), torch.arange(200) % 4
    p = CategoricalPrediction(logits, y)
    frame, summary = p.scores(), p.summary(errors=True)
    for name in ("accuracy", "log_likelihood", "brier", "entropy", "mutual_information"):
        assert summary[name] == pytest.approx(frame[name].mean())
        assert summary[f"{name}_se"] == pytest.approx(frame[name].std() / math.sqrt(200))
    assert summary["calibration_chance"] == p.reliability().chance


def test_reliability_refusals() -> None:
    c, right = torch.tensor([0.5, 0.9]), torch.tensor([True, False])
    with pytest.raises(OptionError, match="kind is 'adaptive'"):
        reliability(c, right, kind="adaptive")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not logits"):
        reliability(c * 9, right)
    with pytest.raises(DataError, match="probabilities in"):
        reliability(c * math.nan, right)
    with pytest.raises(DataError, match="True and False"):
        reliability(c, c)
    with pytest.raises(DataError, match="shape"):
        reliability(c[:0], right[:0])
    with pytest.raises(OptionError, match="level"):
        wilson(np.ones(1), np.ones(1), 95)
