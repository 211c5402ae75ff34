"""Bounds of log weights: identities, streaming equal to the whole, and standard errors that cover."""

from __future__ import annotations

import math

import pytest
import torch

from dgm.bounds import (
    LogWeightSummary,
    clustered_difference,
    clustered_interval,
    effective_sample_size,
    elbo,
    importance_bound,
    mean_and_standard_error,
    paired_difference,
)
from dgm.errors import DataError, OptionError

INF = math.inf


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("samples", [1, 7, 100])
def test_at_the_exact_posterior_every_bound_is_the_evidence(samples: int) -> None:
    lw = torch.full((samples, 4), -20.3, dtype=torch.float64)
    for bound in (elbo, importance_bound):
        torch.testing.assert_close(bound(lw), lw[0])
    torch.testing.assert_close(effective_sample_size(lw), torch.full((4,), float(samples), dtype=torch.float64))


def test_one_draw() -> None:
    lw = draws(1, 5)
    torch.testing.assert_close(elbo(lw), lw[0])
    torch.testing.assert_close(importance_bound(lw), lw[0])
    assert (effective_sample_size(lw) == 1).all()


def test_hand_made_weights() -> None:
    lw = torch.tensor([1.0, 3.0]).log()
    assert importance_bound(lw).item() == pytest.approx(math.log(2))
    assert elbo(lw).item() == pytest.approx(math.log(3) / 2)
    assert effective_sample_size(lw).item() == pytest.approx(16 / 10)


def test_order_of_the_bounds() -> None:
    """ELBO <= bound of pairs, averaged <= bound of all (Burda et al. 2016, theorem 1, holds for these averages)."""
    lw = 2 * draws(200, 50)
    pairs = importance_bound(lw.reshape(2, 100, 50).flatten(1)).reshape(100, 50).mean(0)
    assert (elbo(lw) <= pairs).all()
    assert (pairs <= importance_bound(lw)).all()


def test_importance_bound_is_unbiased_for_the_evidence_on_the_weight_scale() -> None:
    """log w ~ N(-s^2/2, s^2) has mean weight 1: the mean of exp(bound) is 1 within four standard errors."""
    s = 0.5
    z = importance_bound(s * draws(10, 20_000) - s**2 / 2).exp()
    mean, error = mean_and_standard_error(z)
    assert abs(mean - 1) < 4 * error
    assert abs(elbo(s * draws(10, 20_000) - s**2 / 2).mean().item() + s**2 / 2) < 4 * s / math.sqrt(200_000)


def test_zero_weights() -> None:
    lw = torch.tensor([[-INF, -INF, 0.0], [0.0, -INF, 0.0]])
    assert elbo(lw).tolist() == [-INF, -INF, 0.0]
    assert importance_bound(lw).tolist() == pytest.approx([-math.log(2), -INF, 0.0])
    assert effective_sample_size(lw).tolist() == pytest.approx([1.0, 0.0, 2.0])


def test_ess_of_large_numbers_in_float32() -> None:
    """The log density of a whole data set: float32 loses the exponent, the function must not."""
    lw = torch.randint(-3, 3, (50, 2), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(effective_sample_size(lw - 2.0**20), effective_sample_size(lw))


def test_bound_has_a_gradient() -> None:
    lw = draws(5, 3).requires_grad_()
    importance_bound(lw).sum().backward()
    assert lw.grad is not None
    torch.testing.assert_close(lw.grad, lw.detach().softmax(0))


# ---------------------------------------------------------------- streaming


def whole(lw: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "elbo": elbo(lw),
        "elbo_error": lw.std(dim=0) / math.sqrt(len(lw)) if len(lw) > 1 else torch.full(lw.shape[1:], math.nan),
        "importance_bound": importance_bound(lw),
        "ess": effective_sample_size(lw),
        "max_weight": lw.softmax(dim=0).amax(dim=0),
    }


def assert_equals_whole(chunks: list[torch.Tensor], lw: torch.Tensor) -> None:
    summary = LogWeightSummary()
    for chunk in chunks:
        summary.update(chunk)
    assert summary.count == len(lw)
    for name, expected in whole(lw.double()).items():
        value = getattr(summary, name)
        assert torch.allclose(value, expected.double(), rtol=1e-9, atol=1e-9, equal_nan=True), name


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 50, 3], [59, 1]])
@pytest.mark.parametrize("offset", [0.0, -1e5, 700.0])
def test_streaming_equals_the_whole(sizes: list[int], offset: float) -> None:
    lw = 3 * draws(60, 11) + offset
    chunks = list(lw.split(sizes))
    assert_equals_whole(chunks, lw)
    assert_equals_whole(chunks[::-1], lw)
    assert_equals_whole([c[:, 0] for c in chunks], lw[:, 0])
    assert_equals_whole([c.float() for c in chunks], lw.float())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
def test_streaming_with_zero_weights(order: list[int]) -> None:
    """One zero weight, a chunk of zero weights, nothing but zero weights, and two chunks with one each."""
    lw = draws(12, 5)
    lw[4, 0] = -INF
    lw[3:6, 1] = -INF
    lw[:, 2] = -INF
    lw[[0, 11], 3] = -INF
    chunks = list(lw.split(3))
    assert_equals_whole([chunks[i] for i in order], lw)


def test_streaming_one_draw() -> None:
    assert_equals_whole([draws(1, 4)], draws(1, 4))


def test_a_nan_stays_a_nan() -> None:
    lw = draws(6, 2)
    lw[2, 0] = math.nan
    summary = LogWeightSummary().update(lw[:3]).update(lw[3:])
    for name in ("elbo", "elbo_error", "importance_bound", "ess", "max_weight"):
        value = getattr(summary, name)
        assert value[0].isnan() and value[1].isfinite(), name


def test_summary_keeps_no_graph() -> None:
    assert not LogWeightSummary().update(draws(3, 2).requires_grad_()).elbo.requires_grad


# ---------------------------------------------------------------- standard errors


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_standard_error(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3 / 4))
    assert math.isnan(mean_and_standard_error(torch.tensor([1.0]))[1])


def test_pairing_removes_what_the_data_share() -> None:
    shared, a, b = 100 * draws(500), draws(500, seed=1), draws(500, seed=2)
    mean, error = paired_difference(shared + a + 1, shared + b)
    assert abs(mean - 1) < 4 * error
    assert error == pytest.approx(math.sqrt(2 / 500), rel=0.15)


def crossed(rng: torch.Generator, seeds: int, data: int, sd: tuple[float, float, float]) -> torch.Tensor:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return sd[0] * normal(seeds, 1) + sd[1] * normal(1, data) + sd[2] * normal(seeds, data)


CASES = {
    "seeds": (1.0, 0.1, 0.5),
    "data": (0.0, 1.0, 0.5),
    "both": (0.3, 1.0, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_clustered_variance_is_unbiased(case: str) -> None:
    """Mean of se^2 over replications is the true variance of the mean, up to the floor's small upward push."""
    rng, (r, n), sd = torch.Generator().manual_seed(0), (6, 40), CASES[case]
    zero = torch.zeros(r, n)
    squares = torch.tensor([clustered_difference(crossed(rng, r, n, sd), zero)[1] ** 2 for _ in range(1000)])
    truth = sd[0] ** 2 / r + sd[1] ** 2 / n + sd[2] ** 2 / (r * n)
    mean, error = mean_and_standard_error(squares)
    assert -4 * error < mean - truth < 4 * error + 0.05 * truth


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seeds", [3, 8])
def test_clustered_intervals_cover(case: str, seeds: int) -> None:
    rng, n, replications = torch.Generator().manual_seed(1), 40, 1500
    zero = torch.zeros(seeds, n)
    hits = 0
    for _ in range(replications):
        low, high = clustered_interval(crossed(rng, seeds, n, CASES[case]), zero)
        hits += low <= 0 <= high
    error = math.sqrt(0.95 * 0.05 / replications)
    # Satterthwaite's degrees of freedom are an approximation, and err on the side of width where seeds differ little.
    assert 0.95 - 4 * error - 0.01 < hits / replications < (0.95 + 4 * error if case == "seeds" else 1.0)


def test_two_standard_errors_cover_with_many_seeds_and_data() -> None:
    rng, r, n, replications = torch.Generator().manual_seed(2), 40, 60, 1000
    zero, right, mutant = torch.zeros(r, n), 0, 0
    for _ in range(replications):
        d = crossed(rng, r, n, (0.5, 1.0, 1.0))
        mean, error = clustered_difference(d, zero)
        right += abs(mean) < 1.96 * error
        mutant += abs(mean) < 1.96 * mean_and_standard_error(d.flatten())[1]  # 2400 rows taken as independent
    slack = 4 * math.sqrt(0.95 * 0.05 / replications)
    assert abs(right / replications - 0.95) < slack
    assert mutant / replications < 0.5


def test_clustered_by_hand() -> None:
    d = torch.tensor([[0.0, 2.0], [2.0, 8.0]])
    # row means 1, 5 (variance 8); column means 1, 5 (8); residual 4 x 1 / 1: 8/2 + 8/2 - 4/4
    assert clustered_difference(d, torch.zeros(2, 2)) == pytest.approx((3.0, math.sqrt(7.0)))


def test_pure_interaction_is_floored_not_negative() -> None:
    d = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert clustered_difference(d, torch.zeros(2, 2)) == (0.0, 0.0)
    d = d + torch.tensor([[0.1], [0.0]])
    assert clustered_difference(d, torch.zeros(2, 2))[1] == pytest.approx(0.05)


def test_one_seed_is_the_paired_difference() -> None:
    a, b = draws(1, 30), draws(1, 30, seed=1)
    assert clustered_difference(a, b) == pytest.approx(paired_difference(a[0], b[0]))
    assert clustered_difference(a.T, b.T) == pytest.approx(paired_difference(a[0], b[0]))
    assert math.isnan(clustered_difference(a[:, :1], b[:, :1])[1])
    low, high = clustered_interval(a, b)
    mean, error = paired_difference(a[0], b[0])
    assert (high - mean) / error == pytest.approx(2.04523, abs=1e-4)  # t with 29 degrees of freedom
    assert mean - low == pytest.approx(high - mean)


# ---------------------------------------------------------------- bad input


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"\(0, 3\)"):
        importance_bound(torch.empty(0, 3))
    with pytest.raises(DataError, match="int64"):
        elbo(torch.ones(3, dtype=torch.long))
    with pytest.raises(DataError, match="no draws"):
        _ = LogWeightSummary().elbo
    with pytest.raises(DataError, match=r"expected draws of shape \(4,\), got \(5,\)"):
        LogWeightSummary().update(torch.zeros(2, 4)).update(torch.zeros(2, 5))
    with pytest.raises(DataError, match=r"\(3, 1\)"):
        mean_and_standard_error(torch.zeros(3, 1))
    with pytest.raises(DataError, match=r"\(3,\) and \(3, 1\)"):
        paired_difference(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(DataError, match="paired_difference"):
        clustered_difference(torch.zeros(3), torch.zeros(3))
    with pytest.raises(OptionError, match="95"):
        clustered_interval(torch.zeros(3, 3), torch.zeros(3, 3), level=95)
