"""Distances to reference draws: closed forms of Gaussians, errors that mean what they say, and what must be refused."""

import math

import pytest
import torch
from scipy import stats

from dgm import discrepancy, two_sample
from dgm.discrepancy import c2st, mmd, moment_errors, noise_floor, sliced_wasserstein
from dgm.errors import DataError, OptionError


def normal(count, d=2, loc=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return loc + scale * torch.randn(count, d, generator=generator, dtype=torch.float64)


def gaussian_mmd(loc, scale, d, h):
    """MMD^2 of N(loc 1, scale^2 I) and N(0, I) under the Gaussian kernel, in closed form."""

    def mean_kernel(variance, gap):
        spread = h**2 + variance
        return (h**2 / spread) ** (d / 2) * math.exp(-d * gap**2 / (2 * spread))

    return mean_kernel(2 * scale**2, 0.0) + mean_kernel(2.0, 0.0) - 2 * mean_kernel(1 + scale**2, loc)


# --- maximum mean discrepancy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loc", "scale", "d"), [(0.3, 1.0, 2), (0.0, 1.5, 3), (1.0, 0.5, 1)])
def test_mmd_of_gaussians_is_the_closed_form(loc, scale, d):
    found = mmd(normal(1000, d, loc, scale, 1), normal(900, d, seed=2), bandwidth=1.3, standardise=False)
    assert abs(found.squared - gaussian_mmd(loc, scale, d, 1.3)) < 4.5 * found.se
    assert found.biased > found.squared and found.draws == (1000, 900)


def repeated(loc, count=150, **options):
    runs = [
        mmd(normal(40, loc=loc, seed=2 * i), normal(60, seed=2 * i + 1), bandwidth=1.0, standardise=False, **options)
        for i in range(count)
    ]
    return torch.tensor([r.squared for r in runs]), torch.tensor([r.se for r in runs]), runs


def test_mmd_is_unbiased_and_its_error_is_its_spread_where_the_sets_differ():
    values, errors, runs = repeated(0.5)
    truth = gaussian_mmd(0.5, 1.0, 2, 1.0)
    assert abs(values.mean() - truth) < 4.5 * values.std() / 150**0.5
    assert 0.8 < errors.square().mean().sqrt() / values.std() < 1.25
    biased = torch.tensor([r.biased for r in runs])
    assert biased.mean() - truth > 5 * biased.std() / 150**0.5  # the mutant: the diagonal counted in


def test_the_error_of_mmd_holds_where_the_sets_are_alike_and_the_first_order_vanishes():
    values, errors, _ = repeated(0.0)
    assert abs(values.mean()) < 4.5 * values.std() / 150**0.5
    assert 0.9 < errors.square().mean().sqrt() / values.std() < 1.8  # never too small


def test_permutation_p_values_are_uniform_where_the_sets_are_alike_and_small_where_not():
    p = [mmd(normal(30, seed=2 * i), normal(40, seed=2 * i + 1), permutations=39, seed=i).p_value for i in range(120)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert mmd(normal(100, loc=0.7), normal(100, seed=1), permutations=99).p_value == 0.01


def test_what_is_permuted_is_the_estimate_itself():
    pooled = torch.cat([normal(12, loc=1.0), normal(20, seed=1)])
    kernel = (-torch.cdist(pooled, pooled).square() / 2).exp()
    found = mmd(pooled[:12], pooled[12:], bandwidth=1.0, standardise=False)
    values = two_sample._permuted(kernel, 12, 50)
    assert values[0].item() == pytest.approx(found.squared) and values[1:].mean() < values[0]


def test_the_kernel_is_the_references_own_whatever_is_judged_by_it():
    reference = normal(200)
    near, far = mmd(normal(200, seed=1), reference), mmd(normal(200, loc=50.0, seed=1), reference)
    assert near.bandwidth == far.bandwidth
    scaled = mmd(normal(200, seed=1) * torch.tensor([1.0, 1e4]), reference * torch.tensor([1.0, 1e4]))
    assert scaled.squared == pytest.approx(near.squared, rel=1e-8)  # on the reference's scale
    several = mmd(normal(200, loc=1.0, seed=1), reference, multiples=(0.5, 1.0, 2.0))
    one_by_one = [mmd(normal(200, loc=1.0, seed=1), reference, multiples=(m,)).squared for m in (0.5, 1.0, 2.0)]
    assert several.squared == pytest.approx(sum(one_by_one) / 3)


def test_mmd_uses_no_more_draws_than_it_may_and_leaves_the_random_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = mmd(normal(500), normal(700, seed=1), max_draws=50, permutations=5)
    assert found.draws == (50, 50) and torch.equal(before, torch.get_rng_state())
    assert mmd(normal(500), normal(700, seed=1), max_draws=50, seed=3).squared != found.squared


# --- sliced Wasserstein ----------------------------------------------------------------------------------------------


def test_sliced_wasserstein_of_gaussians_is_the_closed_form():
    d, scale, loc = 4, 1.6, 0.9
    found = sliced_wasserstein(normal(20_000, d, loc, scale, 1), normal(20_000, d, seed=2), standardise=False)
    truth = math.sqrt(loc**2 + (scale - 1) ** 2)  # along theta: (theta' m)^2 + (s - 1)^2, E (theta' m)^2 = |m|^2 / d
    assert abs(found.distance - truth) < 4.5 * found.se + 0.02
    assert found.largest > found.distance


@pytest.mark.parametrize("sizes", [(7, 7), (6, 9), (5, 8), (1000, 3)])
def test_one_dimension_is_exact_for_any_two_sizes(sizes):
    a, b = normal(sizes[0], 1, seed=1), normal(sizes[1], 1, 1.0, 2.0, 2)
    common = math.lcm(*sizes)
    wide = [t.sort(0).values.repeat_interleave(common // len(t), 0) for t in (a, b)]
    for p in (1.0, 2.0, 3.0):
        found = sliced_wasserstein(a, b, p=p, standardise=False)
        assert found.distance == pytest.approx((wide[0] - wide[1]).abs().pow(p).mean().item() ** (1 / p), rel=1e-10)
        assert found.se == 0.0 and len(found.slices) == 1
    exact = stats.wasserstein_distance(a[:, 0], b[:, 0])
    assert sliced_wasserstein(a, b, p=1, standardise=False).distance == pytest.approx(exact)


def test_a_shift_is_its_own_length_and_the_error_shrinks_with_directions():
    x = normal(300, 3)
    shifted = sliced_wasserstein(x + torch.tensor([1.0, 2.0, 2.0]), x, standardise=False, projections=4000)
    assert abs(shifted.distance - 3 / math.sqrt(3)) < 4.5 * shifted.se < 0.1
    few = sliced_wasserstein(x + torch.tensor([1.0, 2.0, 2.0]), x, standardise=False, projections=40)
    assert few.se > 5 * shifted.se


def test_the_noise_floor_is_what_exact_draws_reach():
    reference = normal(800, 3)

    def distance(a, b):
        return sliced_wasserstein(a, b).distance

    floor = noise_floor(reference, distance, repeats=8)
    exact = distance(normal(400, 3, seed=5), reference[:400])
    assert abs(exact - floor.mean) < 6 * floor.sd
    assert distance(normal(400, 3, 0.5, seed=5), reference[:400]) > floor.mean + 10 * floor.sd
    assert noise_floor(reference[:80], distance).mean > 2 * floor.mean  # fewer draws, a higher floor


# --- classifiers -----------------------------------------------------------------------------------------------------


def test_a_linear_classifier_reaches_the_accuracy_of_bayes_rule():
    found = c2st(normal(1000, 2, 0.8, seed=1), normal(1000, seed=2), classifiers=["logistic"], standardise=False)
    best = stats.norm.cdf(0.8 * math.sqrt(2) / 2)  # two unit normals at that distance
    assert abs(found.accuracy - best) < 4.5 * found.se and found.p_value < 1e-6


def test_a_difference_of_scale_is_seen_by_the_network_alone():
    found = c2st(normal(500, 2, 0.0, 2.0, 1), normal(500, seed=2))
    assert abs(found.accuracies["logistic"] - 0.5) < 0.08
    assert found.accuracies["mlp"] > 0.65 and found.accuracy == found.accuracies["mlp"] and found.p_value < 1e-4
    assert c2st(normal(500, 2, 0.0, 2.0, 1), normal(500, seed=2), classifiers=["boosting"]).accuracy > 0.6


def test_equal_sets_are_told_apart_no_more_often_than_the_level_says():
    runs = [
        c2st(normal(60, seed=2 * i), normal(60, seed=2 * i + 1), classifiers=["logistic"], seed=i) for i in range(100)
    ]
    accuracies = torch.tensor([r.accuracy for r in runs])
    assert abs(accuracies.mean() - 0.5) < 0.02
    assert sum(r.p_value < 0.05 for r in runs) / 100 <= 0.08
    binomial = [stats.binom.sf(round(r.accuracy * 120) - 1, 120, 0.5) < 0.05 for r in runs]
    assert sum(binomial) > 1.5 * sum(r.p_value < 0.05 for r in runs)  # the mutant: folds taken as independent


# --- moments ---------------------------------------------------------------------------------------------------------


def test_moment_errors_are_in_the_references_units():
    reference = normal(500, 3, seed=1) * torch.tensor([1.0, 10.0, 0.1]) + 5.0
    sd = reference.std(0)
    found = moment_errors(reference * 2 - reference.mean(0) + sd * torch.tensor([0.5, -1.0, 0.0]), reference)
    torch.testing.assert_close(found.mean, torch.tensor([0.5, -1.0, 0.0]).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sd_ratio, torch.full((3,), 2.0).double())
    assert found.correlation < 1e-9 and found.worst_mean == pytest.approx(1.0)
    assert found.worst_log_sd == pytest.approx(math.log(2))


def test_the_largest_error_of_a_correlation_is_found_in_any_block(monkeypatch):
    a, b = normal(50, 7, seed=1), normal(60, 7, seed=2)
    gaps = (torch.corrcoef(a.T) - torch.corrcoef(b.T)).abs()
    place = divmod(int(gaps.argmax()), 7)
    for block in (2, 3, 512):
        monkeypatch.setattr(discrepancy, "BLOCK", block)
        found = moment_errors(a, b)
        assert found.correlation == pytest.approx(gaps.max().item()) and found.pair == tuple(sorted(place))
    assert moment_errors(a[:, :1], b[:, :1]).pair is None


def test_exact_draws_have_mean_errors_as_large_as_their_standard_errors():
    z = torch.cat(
        [
            (e := moment_errors(normal(200, 20, seed=i), normal(300, 20, seed=i + 50))).mean / e.mean_se
            for i in range(20)
        ]
    )
    assert abs(z.mean()) < 0.25 and 0.85 < z.std() < 1.15


# --- what must be refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [mmd, sliced_wasserstein, c2st, moment_errors])
def test_bad_draws_are_named(distance):
    good = normal(100)
    broken = good.clone()
    broken[7, 1] = math.nan
    for bad, words in (
        (good[:1], "expected at least .* draws, got 1"),
        (good[:, :1], "a has 1 coordinates and reference 2"),
        (broken, r"a: 1 of 100 draws are not finite \(the first: draw 7, coordinate 1\)"),
        (good[:, 0], r"write a\[:, None\]"),
        (good[:, :0], r"expected draws of shape \(S, d\)"),
    ):
        with pytest.raises(DataError, match=words):
            distance(bad, good)
    constant = good.clone()
    constant[:, 1] = 3.0
    with pytest.raises(DataError, match="reference: coordinate 1 is constant"):
        distance(good, constant)
    distance(constant, good)  # a collapsed guide is a bad guide, not a bad question


def test_options_out_of_their_domain():
    x = normal(100)
    for call in (
        lambda: mmd(x, x, max_draws=2),
        lambda: mmd(x, x, bandwidth=0.0),
        lambda: mmd(x, x, multiples=()),
        lambda: mmd(x, x, permutations=-1),
        lambda: sliced_wasserstein(x, x, projections=0),
        lambda: sliced_wasserstein(x, x, p=0.5),
        lambda: c2st(x, x, classifiers=["forest"]),
        lambda: c2st(x, x, folds=1),
        lambda: noise_floor(x, lambda a, b: 0.0, repeats=0),
    ):
        with pytest.raises(OptionError):
            call()
    with pytest.raises(DataError, match="more than half of its draws are equal"):
        mmd(x, torch.cat([x[:20], torch.zeros(80, 2).double()]))


def test_the_interaction_of_a_kernel_is_that_of_its_definition():
    """Without mean and projections, a U-centred matrix has rows that sum to zero."""
    points = normal(9)
    kernel = (-torch.cdist(points, points).square()).exp()
    additive = points[:, :1] + points[:, 0] + 3.0  # no interaction at all
    assert two_sample._interaction(additive) == pytest.approx(0.0, abs=1e-12)
    assert two_sample._interaction(kernel) > 0.01
