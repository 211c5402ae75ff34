"""k-hat: its theory, the sign trap, and every edge that a library gets wrong without a word."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from dgm.errors import DataError, OptionError
from dgm.psis import k_reasons, k_threshold, pareto_k

SCALES = (0.9, 0.8, 0.7, 0.5)


def normal_log_weights(scale: float, draws: int, data: int, seed: int = 0) -> torch.Tensor:
    """log N(z; 0, 1) - log N(z; 0, s^2) for z from the latter: the ratio's tail index is k = 1 - s^2."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, data, generator=generator, dtype=torch.float64)
    return -0.5 * (scale * noise) ** 2 + math.log(scale) + 0.5 * noise**2


def follows_theory(sign: float) -> bool:
    estimates = [pareto_k(sign * normal_log_weights(s, 4000, 10)).mean().item() for s in SCALES]
    near = all(abs(k - (1 - s**2)) < 0.15 for k, s in zip(estimates, SCALES, strict=True))
    return near and estimates == sorted(estimates)


def test_theory_and_the_wrong_sign() -> None:
    assert follows_theory(1.0)
    assert not follows_theory(-1.0)


@pytest.mark.parametrize("draws", [100, 225, 226, 1000])
def test_is_the_k_of_the_log_weight_route(draws: int) -> None:
    lw = normal_log_weights(0.7, draws, 5)
    through_logs = array_stats.psislw(-lw.T.numpy())[1]  # psislw wants log-likelihoods: minus the log weights
    np.testing.assert_allclose(pareto_k(lw).numpy(), through_logs, rtol=1e-6)


def test_is_free_of_the_evidence_and_of_the_order_of_draws() -> None:
    lw = normal_log_weights(0.6, 500, 4)
    shuffled = lw[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(pareto_k(lw - 12345.0), pareto_k(lw), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pareto_k(shuffled), pareto_k(lw), rtol=1e-9, atol=1e-9)


def test_columns_do_not_touch_one_another() -> None:
    lw = normal_log_weights(0.6, 200, 300)  # more than one block of columns
    k = pareto_k(lw)
    assert k.shape == (300,)
    assert pareto_k(lw[:, 270]).shape == ()
    torch.testing.assert_close(k[270], pareto_k(lw[:, 270]))
    assert pareto_k(lw[:, :0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_guide(dtype: torch.dtype) -> None:
    """Constant up to rounding: rounding noise is no tail."""
    generator = torch.Generator().manual_seed(0)
    constant = torch.full((1000, 3), -93.7, dtype=dtype)
    ulps = torch.randint(-8, 9, constant.shape, generator=generator)
    noisy = constant * (1 + ulps * torch.finfo(dtype).eps)
    for lw in (constant, noisy):
        assert (pareto_k(lw) == -math.inf).all()
        assert k_reasons(lw) == ["exact"] * 3
    assert pareto_k(constant).dtype == dtype


def test_rounding_of_any_size_is_never_a_bad_guide() -> None:
    """float32 log weights that take few distinct values must not be called bad for their ties."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float32).eps
    for ulps in (1, 2, 4, 8, 16, 32, 64, 128):
        lw = -93.7 * (1 + eps * ulps * torch.randn(1000, 20, generator=generator))
        assert (pareto_k(lw) < 0.4).all(), ulps


def test_large_numbers_are_not_taken_for_rounding() -> None:
    """Log weights of a whole data set in float32: 64 units in the last place would be 7 nats."""
    lw = (5.0 * normal_log_weights(0.5, 1000, 5) - 1e6).float()
    assert (pareto_k(lw) > 0.7).all()


def test_one_bad_column_does_not_spoil_the_others() -> None:
    good = normal_log_weights(0.9, 400, 1)[:, 0]
    columns = [good] + [good.clone() for _ in range(3)]
    columns[1][7] = math.nan
    columns[2][7] = math.inf
    columns[3][7] = -math.inf  # q puts mass where p has none: the ELBO itself is -inf
    lw = torch.stack(columns, dim=1)
    k = pareto_k(lw)
    assert k[0] == pareto_k(good)
    assert (k[1:] == math.inf).all()
    assert k_reasons(lw) == ["fitted"] + ["not finite"] * 3


@pytest.mark.parametrize("sd", [30.0, 300.0, 1e3, 1e4, 1e6])
def test_huge_log_ratios_are_bad_not_good(sd: float) -> None:
    """0.8 answers 0.025, a perfect guide, at sd 1e3 and above: its prior, since every weight but one underflows."""
    generator = torch.Generator().manual_seed(0)
    lw = sd * torch.randn(4000, 5, generator=generator)
    assert (pareto_k(lw) > 5).all()
    if sd >= 1e3:
        assert k_reasons(lw) == ["one weight dominates"] * 5


def test_plateaus_and_ties() -> None:
    lw = torch.zeros(1000)
    lw[:300] = 1.0  # more equal largest weights than the tail holds: bounded, no tail
    assert pareto_k(lw) == -math.inf
    assert k_reasons(lw) == ["no tail"]
    lw = torch.zeros(1000)
    lw[:10] = torch.arange(1.0, 11.0)  # the tail is ten values and many equal ones
    assert pareto_k(lw) == math.inf
    assert k_reasons(lw) == ["ties"]


def test_threshold() -> None:
    assert k_threshold(100) == 0.5
    assert k_threshold(1000) == pytest.approx(2 / 3)
    assert k_threshold(2200) == 0.7
    assert k_threshold(10**6) == 0.7


def test_refusals() -> None:
    with pytest.raises(OptionError, match="at least 100 draws for each datum, got 99"):
        pareto_k(torch.randn(99))
    with pytest.raises(OptionError, match="got 4"):
        k_threshold(4)
    with pytest.raises(DataError, match=r"\(200, 2, 2\)"):
        pareto_k(torch.randn(200, 2, 2))
    with pytest.raises(DataError, match="int64"):
        pareto_k(torch.ones(200, dtype=torch.long))


def test_gradients_and_input_are_left_alone() -> None:
    lw = normal_log_weights(0.7, 200, 2).requires_grad_()
    before = lw.detach().clone()
    k = pareto_k(lw)
    assert not k.requires_grad
    assert torch.equal(lw.detach(), before)


def test_speed() -> None:
    """A test set of 360 images at 1000 draws must cost no more than a blink (about 0.2 s here, 3 s allowed)."""
    lw = normal_log_weights(0.7, 1000, 360)
    start = time.perf_counter()
    pareto_k(lw)
    assert time.perf_counter() - start < 3
