"""Two evaluations are compared only where their difference means something; and numbers that cannot be are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dgm import evaluate
from dgm.errors import DataError, ModelError, OptionError
from dgm.estimate import Estimate
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.linear_vae import LinearVAE

DOUBLE = torch.float64


def pair(rows: int = 40, scale: float = 1.0) -> tuple[LinearVAE, Any, Tensor]:
    """A linear VAE and its exact posterior, or one whose width is off by a factor."""
    model, x = LinearVAE.simulate(rows, 4, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    with torch.no_grad():
        model.posterior(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)), torch.no_grad():
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.mean, exact.covariance_matrix * scale**2))

    return model, guide, x


# --- estimates -------------------------------------------------------------------------------------------------------


def test_monte_carlo_error_is_the_spread_over_repetitions() -> None:
    repetitions, draws = 4000, 200
    log_weights = 0.6 * torch.randn(draws, repetitions, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    estimate = Estimate.of(log_weights, "importance bound")
    spread = estimate.values.std()
    assert float(estimate.errors.mean() / spread) == pytest.approx(1, abs=4.5 / math.sqrt(2 * repetitions) + 0.02)
    bias = estimate.values.mean() - 0.18  # E[w] = exp(0.6^2 / 2)
    assert float((bias - estimate.bias.mean()).abs()) < 4.5 * float(spread) / math.sqrt(repetitions)
    assert estimate.mc_se == pytest.approx(float(spread) / math.sqrt(repetitions), rel=0.1)
    wrong = (
        estimate.draws / estimate.ess / (draws - 1)
    ).sqrt()  # a mutant that forgets that equal weights have no error
    assert float(wrong.mean() / spread) > 1.5


def test_upper_side_is_the_reverse_of_the_lower() -> None:
    log_weights = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    lower, upper = Estimate.of(-log_weights, "reverse"), Estimate.of(-log_weights, "reverse", "upper")
    assert torch.equal(upper.values, -lower.values) and torch.equal(upper.errors, lower.errors)
    assert (upper.bias > 0).all() and (lower.bias < 0).all()
    low, high = lower.interval(over="draws")
    assert low < lower.mean < high and "at most" in repr(upper) and "at least" in repr(lower)


def test_estimates_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(DataError, match=r"2 of 3 data have a log weight that is NaN or \+inf"):
        Estimate.of(torch.tensor([[0.0, math.nan, math.inf], [0.0, 0.0, 0.0]]), "importance bound")
    with pytest.raises(DataError, match=r"shape \(K, N\)"):
        Estimate.of(torch.zeros(3), "importance bound")
    with pytest.raises(OptionError, match="'lower' or 'upper'"):
        Estimate("bound", "both", *torch.zeros(3, 2), 4)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="one value, error and ESS"):
        Estimate("bound", "lower", torch.zeros(2), torch.zeros(3), torch.zeros(2), 4)
    with pytest.raises(OptionError, match="level is 95"):
        Estimate.of(torch.zeros(3, 2), "bound").interval(95)
    with pytest.raises(OptionError, match="'data' or 'draws'"):
        Estimate.of(torch.zeros(3, 2), "bound").interval(over="seeds")  # type: ignore[arg-type]
    zero = Estimate.of(torch.full((5, 2), -math.inf), "bound")
    assert (zero.values == -math.inf).all()
    assert math.isnan(Estimate.of(torch.zeros(1, 2), "bound").mc_se)


@pytest.mark.slow
def test_error_of_a_predictive_density_counts_that_rows_share_their_draws() -> None:
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y = x[:, 0] + 0.5 * torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    model = BayesianLinearRegression(2, noise=0.5)
    posterior = model.posterior(x[:5], y[:5])

    def guide(*batch: Tensor) -> None:
        pyro.sample("w", posterior)

    runs = [evaluate(model, guide, x[5:], y[5:], num_samples=200, seed=seed) for seed in range(60)]
    spread = np.std([run.summary["bound"] for run in runs], ddof=1)
    stated = np.mean([run.summary["bound_mc_se"] for run in runs])
    assert stated == pytest.approx(spread, rel=0.35)
    alone = np.mean([run.bound.replace(shared=None).mc_se for run in runs if run.bound is not None])
    assert abs(math.log(alone / spread)) > math.log(1.5)  # as if each row had its own draws


# --- differences -----------------------------------------------------------------------------------------------------


def test_difference_is_paired_and_says_its_mode() -> None:
    model, exact, x = pair()
    narrow = pair(scale=0.5)[1]
    a, b = (evaluate(model, guide, x, num_samples=200) for guide in (exact, narrow))
    found = a.difference(b, "elbo")
    expected = 2 * (math.log(2) - 0.5 + 0.125)  # KL of the narrow normal, two dimensions
    assert found.mode == "fixed model" and abs(found.mean - expected) < 4.5 * found.se
    assert a.difference(a).mean == 0 and "fixed model" in repr(found)


def test_models_that_moved_are_not_compared() -> None:
    model, guide, x = pair()
    before = evaluate(model, guide, x, num_samples=100)
    with torch.no_grad():
        model.loc += 0.01
    after = evaluate(model, guide, x, num_samples=100)
    with pytest.raises(ModelError, match="'loc' differs"):
        before.difference(after)
    with pytest.raises(ModelError, match="an ELBO then mixes"):
        before.difference(after, "elbo", joint=True)
    assert before.difference(after, joint=True).mode == "joint training"


def test_other_data_other_k_and_other_scores_are_not_compared() -> None:
    model, guide, x = pair()
    a = evaluate(model, guide, x, num_samples=100)
    with pytest.raises(DataError, match="other data"):
        a.difference(evaluate(model, guide, x.flip(0), num_samples=100))
    with pytest.raises(OptionError, match="K is 100 and 200"):
        a.difference(evaluate(model, guide, x, num_samples=200))
    assert a.difference(evaluate(model, guide, x, num_samples=200), "elbo").mean == pytest.approx(0, abs=1e-9)
    with pytest.raises(OptionError, match="'bound' or 'elbo'"):
        a.difference(a, "khat")


# --- numbers that cannot be ------------------------------------------------------------------------------------------


class TooLikely(dist.Bernoulli):
    """A mass function that is none: every value has e times its probability."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + 1.0


def coin(x: Tensor, kind: Any = dist.Bernoulli, logit: float = 0.0) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", kind(logits=logit + 0.1 * z), obs=x)


def prior(x: Tensor, *_: Any) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_bound_above_zero_for_discrete_data_is_refused() -> None:
    x = torch.ones(50)
    assert evaluate(coin, prior, x, num_samples=100).summary["bound"] < 0
    with pytest.raises(ModelError, match="discrete data, whose log-probability is at most 0"):
        evaluate(lambda x: coin(x, TooLikely), prior, x, num_samples=100)
    with pytest.raises(ModelError, match="for row 0, for discrete"):  # one row is too few for the sum, and enough here
        evaluate(lambda x: coin(x, lambda logits: TooLikely(logits=logits).expand([50]).to_event(1)), prior_of_one,
                 torch.ones(1, 50), num_samples=100)  # fmt: skip


def prior_of_one(x: Tensor) -> None:
    with pyro.plate("data", 1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_chance_of_weights_is_not_called_a_wrong_likelihood() -> None:
    """Weights above one are chance where latents are local; a predictive probability has none."""

    def model(x: Tensor, kind: Any = dist.Bernoulli) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", kind(logits=8.0 + 0.1 * z), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.6))

    result = evaluate(model, guide, torch.ones(20), num_samples=20)
    assert (result.per_datum["bound"] > 0.1).any()  # such chance there is
    with pytest.raises(ModelError, match="at most 0"):
        evaluate(lambda x: model(x, TooLikely), guide, torch.ones(20), num_samples=2000)

    def alone(x: Tensor, y: Tensor, kind: Any = dist.Bernoulli) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", kind(logits=8.0 + 0.0 * w + x), obs=y)

    only = lambda *batch: pyro.sample("w", dist.Normal(0.0, 1.0))  # noqa: E731
    evaluate(alone, only, torch.zeros(1), torch.ones(1), num_samples=20)
    with pytest.raises(ModelError, match="at most 0"):
        evaluate(lambda x, y: alone(x, y, TooLikely), only, torch.zeros(1), torch.ones(1), num_samples=20)


def test_certain_data_are_not_refused_for_rounding() -> None:
    result = evaluate(lambda x: coin(x, logit=40.0), prior, torch.ones(2000), num_samples=20)
    assert result.summary["bound"] == pytest.approx(0, abs=1e-5)


def test_bound_of_densities_may_be_positive() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.001 * z, 0.01), obs=x)

    assert evaluate(model, prior, torch.zeros(5), num_samples=100).summary["bound"] > 0


def test_overflow_is_named() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)
            pyro.factor("f", torch.full((len(x),), 1e30).exp() + 0 * z)

    with pytest.raises(DataError, match=r"5 of 5 data have a log weight that is NaN or \+inf"):
        evaluate(model, prior, torch.zeros(5), num_samples=100)


def test_too_few_draws_and_lost_rows_are_said() -> None:
    model, guide, x = pair()
    assert "Monte Carlo error" in evaluate(model, guide, x, num_samples=1).notes[0]
    few = evaluate(model, guide, x, num_samples=50)
    assert few.notes[0].startswith("no k-hat: it needs at least 100 draws for each row, got 50")
    assert few.per_datum["khat"].isna().all()

    def impossible(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)
            pyro.factor("f", -math.inf * torch.ones(len(x)))

    lost = evaluate(impossible, prior, torch.zeros(3), num_samples=100)
    assert "every weight is zero for 3 rows (first: 0, 1, 2)" in lost.notes[0]


def test_thorough_parts_are_named() -> None:
    model, guide, x = pair()
    with pytest.raises(OptionError, match="expected some of latents, annealed, gaps; did you mean 'gaps'"):
        evaluate(model, guide, x, num_samples=100, thorough=["gap"])
