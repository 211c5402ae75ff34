"""One call that says how good a posterior is: against exact predictive densities, and for what has no bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from dgm import evaluate
from dgm.errors import DataError, GuideError, OptionError
from dgm.evaluate import global_khat, predict
from dgm.guides.encoders import mlp
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.guides.point import Point
from dgm.heldout import HeldOut, row_chunks
from dgm.models import bnn, vae
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.linear_vae import LinearVAE
from dgm.programs import preserved_rng

DOUBLE = torch.float64


def test_grey_pixels_are_refused() -> None:
    model, (x,) = vae.example()
    with pytest.raises(DataError, match="grey pixels"):
        evaluate(model, Joint(model, x, encoder=mlp(8)), x * 0.5 + 0.1, num_samples=10)


def test_free_is_evaluated_on_its_own_rows_in_chunks() -> None:
    model, x = LinearVAE.simulate(1200, 4, 2, generator=torch.Generator().manual_seed(0))
    free = Free(model, x)
    assert len(evaluate(model, free, x, num_samples=10).per_datum) == 1200
    with pytest.raises(GuideError, match="1200 rows and sees 1100"):
        evaluate(model, free, x[:1100], num_samples=10)


def exact_pair(n: int = 40) -> tuple[Any, Any, Tensor]:
    model, x = LinearVAE.simulate(n, 4, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    return model, guide, x


def regression() -> tuple[Any, Any, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A regression, its exact posterior as a guide, training rows, and rows held out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator, dtype=DOUBLE)
    y = x @ x.new_tensor([1.0, -0.5]) + 0.5 * torch.randn(60, generator=generator, dtype=DOUBLE)
    model = BayesianLinearRegression(2, noise=0.5)
    posterior = model.posterior(x[:20], y[:20])
    return model, lambda *batch: pyro.sample("w", posterior), (x[:20], y[:20]), (x[20:], y[20:])


# --- local latents ---------------------------------------------------------------------------------------------------


def test_at_the_exact_posterior_everything_is_exact() -> None:
    model, guide, x = exact_pair()
    result = evaluate(model, guide, x, num_samples=200)
    exact = model.log_evidence(x).detach().numpy()
    assert np.allclose(result.per_datum["bound"], exact) and np.allclose(result.per_datum["elbo"], exact)
    assert np.allclose(result.per_datum["ess"], 200) and (result.per_datum["khat"] == -math.inf).all()
    assert result.summary["bound"] == pytest.approx(exact.mean()) and result.summary["khat_bad"] == 0
    assert result.summary["bound_se"] == pytest.approx(exact.std(ddof=1) / math.sqrt(len(x)))
    assert result.kind == "bound on log p(x)" and "exact posterior" in result.notes[0]
    assert repr(result).startswith("bound on log p(x), K = 200, 40 rows")


def test_rows_in_chunks_are_all_there_in_their_order() -> None:
    model, guide, x = exact_pair(2300)
    assert [len(chunk[0]) for chunk in row_chunks((x,))] == [1000, 1000, 300]
    result = evaluate(model, guide, x, num_samples=3)
    assert np.allclose(result.per_datum["bound"], model.log_evidence(x).detach().numpy())
    assert torch.allclose(HeldOut(model, guide, (x,)).bound(seed=0), model.log_evidence(x).detach())


def test_row_chunks_leave_what_has_no_rows() -> None:
    chunks = list(row_chunks((torch.zeros(5, 2), torch.zeros(5), torch.zeros(3), "mode", torch.tensor(1.0)), rows=2))
    assert [[len(a), len(b), len(c), d, e.dim()] for a, b, c, d, e in chunks] == [
        [2, 2, 3, "mode", 0],
        [2, 2, 3, "mode", 0],
        [1, 1, 3, "mode", 0],
    ]


def test_order_of_the_bounds_and_repeatability() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, encoder=mlp(8))
    state = torch.get_rng_state()
    a, b, c = (evaluate(model, guide, x, num_samples=500, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    pd.testing.assert_frame_equal(a.per_datum, b.per_datum)
    assert not a.per_datum.equals(c.per_datum)
    assert (a.per_datum["bound"] >= a.per_datum["elbo"]).all()
    assert ((a.per_datum["ess"] >= 1) & (a.per_datum["ess"] <= 500)).all()
    assert a.per_datum["khat"].notna().all() and 0 <= a.summary["khat_bad"] <= 1
    one = evaluate(model, guide, x, num_samples=1)
    assert np.allclose(one.per_datum["bound"], one.per_datum["elbo"])
    assert one.per_datum["khat"].isna().all() and "khat_bad" not in one.summary


def test_local_points_have_no_bound() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, family=Point)
    result = evaluate(model, guide, x, num_samples=200)
    assert result.per_datum.isna().all().all() and math.isnan(result.summary["bound"])
    assert any("points" in note for note in result.notes) and "note:" in repr(result)


# --- global latents: the log predictive density ----------------------------------------------------------------------


def test_log_predictive_density_of_a_regression() -> None:
    model, guide, train, (x, y) = regression()
    result = evaluate(model, guide, x, y, num_samples=20_000)
    posterior = model.posterior(*train)
    variance = torch.einsum("ni,ij,nj->n", x, posterior.covariance_matrix, x) + 0.25
    exact = dist.Normal(x @ posterior.mean, variance.sqrt()).log_prob(y).numpy()
    assert np.allclose(result.per_datum["bound"], exact, atol=0.03)
    assert result.kind == "log predictive density of held-out rows" and "elbo" not in result.summary
    assert result.summary["rmse"] == pytest.approx(float((y - x @ posterior.mean).square().mean().sqrt()), abs=0.01)
    inside = ((y - x @ posterior.mean).abs() < 1.96 * variance.sqrt()).double().mean()
    assert result.summary["coverage95"] == pytest.approx(float(inside), abs=0.03)


def test_the_original_scale_of_y() -> None:
    model, guide, _, (x, y) = regression()
    one, ten = (evaluate(model, guide, x, y, num_samples=300, y_std=scale) for scale in (1.0, 10.0))
    assert np.allclose(ten.per_datum["bound"], one.per_datum["bound"] - math.log(10))
    assert ten.summary["rmse"] == pytest.approx(10 * one.summary["rmse"])
    assert ten.summary["coverage95"] == one.summary["coverage95"]
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(OptionError, match="y_std is"):
            evaluate(model, guide, x, y, y_std=wrong)


def test_k_hat_of_the_whole_posterior() -> None:
    model, guide, (x, y), _ = regression()
    assert global_khat(model, guide, x, y) < 0.1
    mean, sd = model.posterior(x, y).mean, model.posterior(x, y).variance.sqrt()
    narrow = lambda *batch: pyro.sample("w", dist.Normal(mean, 0.4 * sd).to_event(1))  # noqa: E731
    assert global_khat(model, narrow, x, y) > 0.5
    assert math.isnan(global_khat(model, Global(model, x, y, family=Point), x, y))


def test_global_points_have_the_likelihood_at_the_point() -> None:
    model, _, (x, y), _ = regression()
    guide = AutoDelta(model)
    result = evaluate(model, guide, x.float(), y.float(), num_samples=7)
    expected = dist.Normal(x.float() @ guide.w.detach(), 0.5).log_prob(y.float()).numpy()
    assert np.allclose(result.per_datum["bound"], expected, atol=1e-4)


def test_classification() -> None:
    model, (x, y) = bnn.example_classification()
    with preserved_rng(0):
        guide = Global(model, x, y, family=FullNormal)
    result = evaluate(model, guide, x, y, num_samples=100)
    assert {"accuracy", "calibration_error", "bound"} <= set(result.summary)
    assert 0 <= result.summary["accuracy"] <= 1
    prediction = predict(model, guide, x, y, num_samples=30)
    assert prediction is not None and prediction.logits.shape == (30, 20, 3)


def test_regression_network() -> None:
    model, (x, y) = bnn.example()
    with preserved_rng(0):
        guide = Global(model, x, y)
    assert {"rmse", "coverage95"} <= set(evaluate(model, guide, x, y, num_samples=50).summary)


def test_models_that_do_not_say_what_they_predict() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    x = torch.linspace(0, 1, 6)
    assert predict(model, guide, x, x) is None
    assert set(evaluate(model, guide, x, x, num_samples=20).summary) == {"bound", "bound_se", "bound_mc_se"}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model, guide, x = exact_pair()
    with pytest.raises(DataError, match="x"):
        evaluate(model, guide, torch.full_like(x, math.nan))
    with pytest.raises(DataError, match="empty"):
        evaluate(model, guide, x[:0])
    with pytest.raises(OptionError, match="num_samples is 0"):
        evaluate(model, guide, x, num_samples=0)
    free = Free(model, x).double()
    with pytest.raises(GuideError, match="holds parameters for 40 rows and sees 7"):
        evaluate(model, free, x[:7])
    with pytest.raises(GuideError, match="does not sample the latent 'z'"):
        evaluate(model, lambda x: None, x)


def test_numpy_pandas_and_double_precision() -> None:
    model, guide, x = exact_pair()
    exact = evaluate(model, guide, x, num_samples=2).summary["bound"]
    assert abs(exact - float(model.log_evidence(x).detach().mean())) < 1e-10
    single = model.float()
    for data in (x.numpy(), pd.DataFrame(x.numpy())):
        assert evaluate(single, guide, data, num_samples=2).summary["bound"] == pytest.approx(exact, abs=1e-4)
