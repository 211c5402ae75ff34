"""k-hat against its theory, through whole Pyro pairs: one for each datum, however many, at any scale of the plate."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dgm import evaluate, log_weights
from dgm.psis import pareto_k

SCALES = (0.9, 0.8, 0.7, 0.5)
Program = Callable[[Tensor], None]


def pair(scale: float, ratio: int = 1) -> tuple[Program, Program]:
    """p(z | x) = N(0, 1), for x says nothing of z, and q = N(0, s^2): k = 1 - s^2 for every datum.

    ratio: rows of the full data for each row that is here; 1 is a plate without a scale.
    """

    def plate(x: Tensor) -> pyro.plate:
        return pyro.plate("data", ratio * len(x), subsample=torch.arange(len(x)))

    def model(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", dist.Normal(x.new_zeros(()), scale))

    return model, guide


def weights(scale: float, rows: int, draws: int, ratio: int = 1, seed: int = 0) -> Tensor:
    return log_weights(*pair(scale, ratio), torch.zeros(rows), num_samples=draws, seed=seed)


def follows(estimates: list[float]) -> bool:
    near = all(abs(k - (1 - s**2)) < 0.15 for k, s in zip(estimates, SCALES, strict=True))
    return near and estimates == sorted(estimates)


@pytest.mark.parametrize("ratio", [1, 100])
@pytest.mark.parametrize("rows", [1, 10, 100, 1000])
def test_theory_on_any_number_of_data_at_any_scale(rows: int, ratio: int) -> None:
    """The mean k-hat of 4000 draws, over the data or over ten seeds where there are fewer."""
    kept = min(rows, 50)
    seeds = range(max(1, 10 // rows))
    estimates = []
    for scale in SCALES:
        parts = [weights(scale, rows, 4000, ratio, seed)[:, :kept] for seed in seeds]
        assert parts[0].shape == (4000, kept)
        estimates.append(float(torch.cat([pareto_k(part) for part in parts]).mean()))
    assert follows(estimates), estimates


def test_the_scale_of_a_plate_does_not_enter() -> None:
    scaled, plain = weights(0.7, 20, 1000, ratio=100), weights(0.7, 20, 1000)
    assert torch.allclose(scaled, plain, atol=1e-5)  # multiplied and divided by 100
    torch.testing.assert_close(pareto_k(scaled), pareto_k(plain), atol=1e-3, rtol=0)


def test_a_scale_that_is_left_in_fails() -> None:
    assert not follows([float(pareto_k(100 * weights(s, 10, 4000)).mean()) for s in SCALES])


def test_the_wrong_sign_fails() -> None:
    assert not follows([float(pareto_k(-weights(s, 10, 4000)).mean()) for s in SCALES])


def test_one_khat_for_a_whole_plate_fails() -> None:
    """What is refused here: the log weights of a thousand equal data in one sum look hopeless, each of them is fine."""
    lw = weights(0.9, 1000, 1000)
    assert pareto_k(lw.sum(1)) > 0.7
    assert pareto_k(lw).mean() < 0.4


@pytest.mark.parametrize(("rows", "ratio"), [(1, 1), (1, 100), (10, 1), (100, 100), (1000, 1), (10_000, 100)])
def test_evaluate_gives_one_khat_for_each_datum(rows: int, ratio: int) -> None:
    """1000 draws: a k-hat scatters by 0.1; the mean of many data, and single ones, are as far from theory as theirs."""
    frame = evaluate(*pair(0.7, ratio), torch.zeros(rows), num_samples=1000).per_datum
    khat = frame["khat"]
    assert len(khat) == rows and bool(khat.notna().all())
    theory = 1 - 0.7**2
    assert abs(khat.mean() - theory) < (0.15 if rows >= 10 else 0.4)
    assert (khat - theory).abs().max() < 0.7
    if rows > 1:
        assert khat.std() > 0.03  # one number for all of them would not scatter


@pytest.mark.slow
def test_every_scale_on_ten_thousand_data() -> None:
    estimates = []
    for scale in SCALES:
        frame = evaluate(*pair(scale), torch.zeros(10_000), num_samples=1000).per_datum
        assert len(frame) == 10_000
        estimates.append(float(frame["khat"].mean()))
    assert follows(estimates), estimates
