"""Distances of predictive distributions against closed forms, and the noise that stands beside them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm.agreement import agreement, compare_to_reference, halves, mixture_distances, total_variation, wasserstein2
from dgm.errors import DataError, OptionError
from dgm.metrics import CategoricalPrediction, GaussianPrediction

DOUBLE = torch.float64


def normal(loc: float, scale: float, rows: int = 2, y_std: float = 1.0) -> GaussianPrediction:
    return GaussianPrediction(torch.full((1, rows), loc), torch.tensor(scale), torch.zeros(rows), y_std)


def mixture(seed: int, draws: int = 40, rows: int = 3) -> GaussianPrediction:
    g = torch.Generator().manual_seed(seed)
    loc = torch.randn(draws, rows, generator=g)
    return GaussianPrediction(loc, 0.1 + torch.rand(draws, rows, generator=g), torch.zeros(rows))


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("loc", [0.0, 0.3, 2.0, 50.0])
def test_wasserstein_of_two_normals(loc: float, scale: float) -> None:
    w2, _ = mixture_distances(normal(0.0, 1.0), normal(loc, scale))
    exact = math.hypot(loc, 1.0 - scale)
    torch.testing.assert_close(w2, torch.full_like(w2, exact), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loc", [0.0, 0.01, 1.0, 4.0, 100.0])
def test_total_variation_of_two_normals_of_one_scale(loc: float) -> None:
    _, tv = mixture_distances(normal(0.0, 0.5), normal(loc, 0.5))
    exact = math.erf(loc / 0.5 / 2 / math.sqrt(2))
    torch.testing.assert_close(tv, torch.full_like(tv, exact), rtol=1e-3, atol=1e-6)


def test_mixtures_against_dense_quadrature() -> None:
    a, b = mixture(0), mixture(1, draws=25)
    y = torch.linspace(-12, 12, 40_001, dtype=DOUBLE)
    w2, tv = mixture_distances(a, b)
    levels = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    for n in range(3):
        parts = [torch.distributions.Normal(p.loc[:, n], p.scale[:, n]) for p in (a, b)]
        f, g = (_density(p, y) for p in parts)
        exact = (f - g).abs().sum() * (y[1] - y[0]) / 2
        assert abs(tv[n] - exact) < 1e-3 * exact
        quantiles = [_quantiles(density, y, levels) for density in (f, g)]
        exact = (quantiles[0] - quantiles[1]).square().mean().sqrt()
        assert abs(w2[n] - exact) < 2e-3 * exact


def _density(p: torch.distributions.Normal, y: Tensor) -> Tensor:
    return torch.cat([p.log_prob(part[:, None]).exp().mean(1) for part in y.split(5_000)])


def _quantiles(density: Tensor, y: Tensor, levels: Tensor) -> Tensor:
    cdf = torch.cumulative_trapezoid(density, y)
    return y[1:][torch.searchsorted(cdf / cdf[-1], levels).clamp(max=len(cdf) - 1)]


def test_identity_symmetry_and_units() -> None:
    a, b = mixture(0), mixture(1)
    w2, tv = mixture_distances(a, a)
    assert w2.abs().max() < 1e-9 and tv.abs().max() == 0
    for one, other in zip(mixture_distances(a, b), mixture_distances(b, a), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    shuffled = GaussianPrediction(a.loc.flip(0), a.scale.flip(0), a.y)
    assert mixture_distances(a, shuffled)[0].max() < 1e-6
    metres = mixture_distances(normal(0.0, 1.0, y_std=10.0), normal(1.0, 1.0, y_std=10.0))
    torch.testing.assert_close(metres[0], torch.full((2,), 10.0, dtype=DOUBLE), rtol=1e-4, atol=0.0)


def test_far_draw_does_not_spoil_the_grid() -> None:
    loc = torch.zeros(100, 1)
    loc[-1] = 1e4
    spoiled = GaussianPrediction(loc, torch.tensor(1.0), torch.zeros(1))
    w2, tv = mixture_distances(spoiled, normal(0.0, 1.0, rows=1))
    assert abs(tv.item() - 0.01) < 1e-4  # a hundredth of the mass lies elsewhere
    assert abs(w2.item() / 1e3 - 1) < 1e-2  # and was carried 1e4 away: sqrt(0.01 * 1e8)


def test_wasserstein_of_draws() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 3, generator=g, dtype=DOUBLE)
    assert wasserstein2(a, a.flip(0)).max() == 0
    torch.testing.assert_close(wasserstein2(a, 2 * a + 1), (a + 1).square().mean(0).sqrt())
    torch.testing.assert_close(wasserstein2(a, a.repeat(3, 1)), torch.zeros(3, dtype=DOUBLE))  # other numbers of draws
    pair = wasserstein2(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]]))
    # quantiles 0 | 0, 1 | 1 | 1, 2: over [0, 1/3] 0, [1/3, 1/2] 1, [1/2, 2/3] 0, [2/3, 1] 1
    torch.testing.assert_close(pair, torch.tensor([(1 / 6 + 1 / 3) ** 0.5], dtype=DOUBLE))
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20_000, dtype=DOUBLE) + 0.5) / 20_000)[:, None]
    assert abs(wasserstein2(z, 0.5 * z + 2).item() - math.hypot(2.0, 0.5)) < 1e-3
    unsorted = (a - a.flip(0)).square().mean(0).sqrt()  # a mutant that pairs draws as they come
    assert bool((unsorted > 0.5).all())


def test_class_probabilities() -> None:
    a = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    b = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.4, 0.2, 0.4]])
    assert agreement(a, a) == 1.0 and total_variation(a, a) == 0.0
    assert agreement(a, b) == pytest.approx(1 / 3)  # the last row's tie goes to class 0 in b
    assert total_variation(a, b) == pytest.approx((0.5 + 0.0 + 0.1) / 3, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert total_variation(*opposite) == 1.0 and agreement(*opposite) == 0.0


def test_against_a_reference_and_its_floor() -> None:
    reference = mixture(0, draws=400)
    near, far = mixture(5, draws=400), GaussianPrediction(torch.full((1, 3), 3.0), torch.tensor(1.0), torch.zeros(3))
    close, wide = compare_to_reference(near, reference), compare_to_reference(far, reference)
    assert close["wasserstein2"] < 3 * close["wasserstein2_floor"] < wide["wasserstein2"]
    assert close["total_variation_floor"] == wide["total_variation_floor"] < 0.1 < wide["total_variation"]
    assert wide["rmse_difference"] == pytest.approx(far.rmse() - reference.rmse())
    assert compare_to_reference(reference, reference)["log_likelihood_difference"] == 0.0
    first, second = halves(reference)
    assert isinstance(first, GaussianPrediction) and isinstance(second, GaussianPrediction)
    assert torch.equal(torch.cat([first.loc, second.loc]), reference.loc)


def test_classes_against_a_reference() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (20,), generator=g)
    truth = 3.0 * torch.nn.functional.one_hot(y, 3)
    reference = CategoricalPrediction(truth + torch.randn(50, 20, 3, generator=g), y)
    found = compare_to_reference(CategoricalPrediction(10 * torch.randn(1, 20, 3, generator=g), y), reference)
    assert found["agreement"] < found["agreement_floor"] and found["total_variation"] > found["total_variation_floor"]
    assert compare_to_reference(reference, reference)["agreement"] == 1.0


def test_bad_input_is_named() -> None:
    a, probs = mixture(0), torch.full((2, 2), 0.5)
    with pytest.raises(DataError, match=r"\(N, C\) twice, got \(2, 2\) and \(3, 2\)"):
        agreement(probs, torch.full((3, 2), 0.5))
    with pytest.raises(DataError, match="probs_b: expected values from 0 to 1"):
        total_variation(probs, 3 * probs)
    with pytest.raises(DataError, match="draws_b: expected shape"):
        wasserstein2(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(DataError, match="draws_a: expected finite values, got 1"):
        wasserstein2(torch.tensor([[math.nan]]), torch.zeros(1, 1))
    with pytest.raises(DataError, match="of other data: 3 and 2 rows"):
        mixture_distances(a, normal(0.0, 1.0))
    with pytest.raises(DataError, match="y_std 2 and 1"):
        mixture_distances(normal(0.0, 1.0, y_std=2.0), normal(0.0, 1.0))
    with pytest.raises(OptionError, match="points is 3"):
        mixture_distances(a, a, points=3)
    with pytest.raises(DataError, match="reference has one draw"):
        compare_to_reference(a, normal(0.0, 1.0, rows=3))
    with pytest.raises(DataError, match="one is a CategoricalPrediction"):
        compare_to_reference(CategoricalPrediction(torch.zeros(4, 3), torch.zeros(3)), a)
