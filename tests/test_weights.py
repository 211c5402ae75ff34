"""Log weights: at the exact posterior they are the evidence; free of plate scales; the same in chunks as at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from dgm import evaluate, fit, log_weight_terms, log_weights
from dgm.errors import GuideError, ModelError, OptionError
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import linear
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.guides.point import Point
from dgm.models import vae
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.linear_vae import LinearVAE
from dgm.programs import preserved_rng
from dgm.runs import BYTES_AT_ONCE
from dgm.testing import ContractError, check_exact
from dgm.weights import LogWeightSampler

DOUBLE = torch.float64


def linear_vae(n: int = 30, dtype: torch.dtype = DOUBLE, seed: int = 0) -> tuple[LinearVAE, Tensor]:
    return LinearVAE.simulate(n, 5, 2, scale=0.6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def regression(n: int = 20, dtype: torch.dtype = DOUBLE) -> tuple[BayesianLinearRegression, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator, dtype=dtype)
    y = x @ x.new_tensor([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(n, generator=generator, dtype=dtype)
    return BayesianLinearRegression(2, noise=0.5, intercept=True), x, y


def exact_local(model: LinearVAE, full: int | None = None) -> Callable[..., None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", full or len(x), subsample_size=len(x)):
            pyro.sample("z", model.posterior(x))

    return guide


def exact_global(model: BayesianLinearRegression, x: Tensor, y: Tensor) -> Callable[..., None]:
    posterior = model.posterior(x, y)
    return lambda *batch: pyro.sample("w", posterior)


# --- the exact posterior ---------------------------------------------------------------------------------------------


def test_linear_vae() -> None:
    model, x = linear_vae()
    check_exact(model, exact_local(model), x, log_evidence=model.log_evidence(x))


def test_bayesian_linear_regression() -> None:
    model, x, y = regression()
    check_exact(model, exact_global(model, x, y), x, y, log_evidence=model.log_evidence(x, y))


def test_plates_that_subsample_are_taken_at_scale_one() -> None:
    """The declared size of the data, 1000 rows, must not enter the weights of the 30 rows that are here."""
    inner, x = linear_vae()

    def local(x: Tensor) -> None:
        with pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
            pyro.sample("x", inner.decode(z), obs=x)

    check_exact(local, exact_local(inner, 1000), x, log_evidence=inner.log_evidence(x))
    blr, x, y = regression()

    def global_(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=DOUBLE), 1.0).to_event(1))
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(torch.cat([x, torch.ones_like(x[:, :1])], 1) @ w, 0.5), obs=y)

    check_exact(global_, exact_global(blr, x, y), x, y, log_evidence=blr.log_evidence(x, y))


def test_a_wrong_posterior_is_seen() -> None:
    model, x = linear_vae()
    other = LinearVAE.simulate(1, 5, 2, scale=0.61, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)[0]
    with pytest.raises(ContractError, match="the log weight is"):
        check_exact(model, exact_local(other), x, log_evidence=model.log_evidence(x))


def both_kinds(x: Tensor) -> None:
    """m ~ N(0, 1), z_n ~ N(m, 1), x_n ~ N(z_n, 1)."""
    m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_global_and_local_latents_together() -> None:
    x = torch.linspace(-1, 2, 7, dtype=DOUBLE)
    n = len(x)

    def guide(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.sum() / (n + 2), (1 / (1 + n / 2)) ** 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((m + x) / 2, 0.5**0.5))

    covariance = 2 * torch.eye(n, dtype=DOUBLE) + 1
    evidence = dist.MultivariateNormal(torch.zeros(n, dtype=DOUBLE), covariance).log_prob(x)
    check_exact(both_kinds, guide, x, log_evidence=evidence)
    terms = log_weight_terms(both_kinds, guide, x, num_samples=5)
    assert terms.local.shape == (5, 7) and terms.global_.shape == (5,) and terms.has_local and terms.has_global
    assert log_weights(both_kinds, guide, x, num_samples=5).shape == (5,)


# --- shapes, chunks, and programs that vmap refuses ------------------------------------------------------------------


def test_shapes() -> None:
    model, x = linear_vae()
    assert log_weights(model, exact_local(model), x, num_samples=4).shape == (4, 30)
    blr, x, y = regression()
    assert log_weights(blr, exact_global(blr, x, y), x, y, num_samples=4).shape == (4,)


def test_chunks_are_the_whole() -> None:
    model, x = linear_vae(20, torch.float32)
    with preserved_rng(0):
        guide = Joint(model, x)
    sampler = LogWeightSampler(model, guide, x)
    with preserved_rng(1):
        whole = torch.cat([part.local for part in sampler.chunks(32, chunk=32)])
    with preserved_rng(1):
        parts = [part.local for part in sampler.chunks(32, chunk=8)]
    assert [len(part) for part in parts] == [8] * 4
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    most = BYTES_AT_ONCE // sampler.runs.bytes
    sizes = [len(c.local) for c in sampler.chunks(2 * most + 2)]
    assert sum(sizes) == 2 * most + 2 and len(sizes) == 3 and max(sizes) - min(sizes) <= 2 and max(sizes) <= most


def test_one_program_run_serves_many_samples_and_gives_what_single_runs_give() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, family=FullNormal)
    sampler = LogWeightSampler(model, guide, x)
    with preserved_rng(3):
        noise = sampler.runs.draws.sample_many(6)
    with preserved_rng(3):
        together = next(sampler.chunks(6)).local
    for k in range(6):
        with torch.no_grad(), sampler.pair.running():
            alone = sampler.pair.call(lambda: sampler.runs.run((x,)), None, [eps[k] for eps in noise])[0]
        assert torch.allclose(together[k], alone, atol=1e-4)


def gamma_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_draws_that_are_no_input() -> None:
    """Gamma draws depend on their parameters: one run for each sample, and the same truth."""
    x = torch.tensor([0.0, 3.0, 1.0], dtype=DOUBLE)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2 + x, x.new_tensor(2.0)))

    evidence = torch.lgamma(2 + x) - torch.lgamma(x + 1) - (2 + x) * math.log(2)
    check_exact(gamma_model, guide, x, log_evidence=evidence)
    assert LogWeightSampler(gamma_model, guide, x).runs.draws is None


def test_control_flow_that_depends_on_a_latent() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z if z.sum() > 0 else -z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    lw = log_weights(model, guide, torch.ones(3), num_samples=50)
    assert lw.shape == (50, 3) and bool(lw.isfinite().all())


# --- what evaluation must leave alone, and refuse --------------------------------------------------------------------


def test_seeds_and_the_stream_outside() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x)
    state = torch.get_rng_state()
    a, b, c = (log_weights(model, guide, x, num_samples=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


class Normed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_batch_norm_statistics_and_modes_are_left_alone() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, encoder=Normed)
        fit(model, guide, x, epochs=3)
    before = {name: value.clone() for name, value in guide.named_buffers()}
    modes = [part.training for part in guide.modules()]
    assert int(before["local_data.encoder.layers.1.num_batches_tracked"]) >= 3
    a, b = (log_weights(model, guide, x, num_samples=3, seed=0) for _ in range(2))
    evaluate(model, guide, x, num_samples=5)
    assert torch.equal(a, b), "dropout is on"
    for name, value in guide.named_buffers():
        assert torch.equal(value, before[name]), name
    assert modes == [part.training for part in guide.modules()] and any(modes)


def test_a_function_guide_is_taken_only_where_it_was_trained() -> None:
    model, x = linear_vae()

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2, dtype=DOUBLE))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(GuideError, match=r"guide .*guide is a function with pyro.param .*fit.guide or svi.guide"):
        log_weights(model, guide, x)
    result = fit(model, guide, x, steps=3, dtype=DOUBLE)
    assert log_weights(result.model, result.guide, x).shape == (1, 30)


def test_num_samples() -> None:
    model, x = linear_vae()
    with pytest.raises(OptionError, match="num_samples is 0"):
        log_weights(model, exact_local(model), x, num_samples=0)


def test_points_are_known_as_such() -> None:
    model, (x,) = vae.example()
    with preserved_rng(0):
        guide = Joint(model, x, family=Point)
    sampler = LogWeightSampler(model, guide, x)
    assert sampler.is_point and next(sampler.chunks(4)).local.shape == (4, 20)


# --- trained to the exact numbers ------------------------------------------------------------------------------------


def train_linear(family: Any, steps: int, rows: int, batch: int | None) -> tuple[LinearVAE, Any, Tensor]:
    model, x = linear_vae(rows, torch.float32, seed=7)
    model.requires_grad_(False)
    with preserved_rng(0):
        guide = Joint(model, x, family=family, encoder=linear())
    fit(
        model,
        guide,
        x,
        steps=steps,
        batch_size=batch,
        lr=0.03,
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )
    return model, guide, x


@pytest.mark.parametrize(("rows", "batch"), [(100, None), (1000, 20)], ids=["all rows", "fifty batches"])
@pytest.mark.parametrize("family", [FullNormal, DiagonalNormal])
def test_linear_vae_reaches_the_exact_evidence(family: Any, rows: int, batch: int | None) -> None:
    """Full covariance: the evidence. Diagonal: short of it by the analytic KL. K = 5000: the evidence for both."""
    model, guide, x = train_linear(family, 1500, rows, batch)
    exact = float(model.log_evidence(x).mean())
    gap = float(model.diagonal_gap()) if family is DiagonalNormal else 0.0
    elbo = float(log_weights(model, guide, x, num_samples=200).mean())
    assert elbo == pytest.approx(exact - gap, abs=0.05 if gap else 0.02)
    if gap:
        assert gap > 0.1
    some = x[:100]
    result = evaluate(model, guide, some, num_samples=5000)
    assert result.summary["bound"] == pytest.approx(float(model.log_evidence(some).mean()), abs=0.02)


@pytest.mark.parametrize(
    ("rows", "batch", "steps"),
    [(20, None, 1200), (200, 20, 3000), pytest.param(200, 4, 20_000, marks=pytest.mark.slow)],
)
def test_regression_reaches_the_exact_posterior(rows: int, batch: int | None, steps: int) -> None:
    """Mean and covariance, in units of the posterior, within three standard errors of 500 draws."""
    model, x, y = regression(rows, torch.float32)
    with preserved_rng(0):
        guide = Global(model, x, y, family=FullNormal)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    fit(model, guide, x, y, steps=steps, batch_size=batch, lr=0.01 if batch else 0.02, schedule=schedule)
    with torch.no_grad():
        exact, q = model.posterior(x, y), guide.family()
        sd = exact.variance.sqrt()
        assert ((q.mean - exact.mean) / sd).abs().max() < 3 / math.sqrt(500)
        error = (q.covariance_matrix - exact.covariance_matrix) / torch.outer(sd, sd)
        assert error.abs().max() < 3 * math.sqrt(2 / 500)


def test_streams_of_different_length_have_no_log_weights_for_each_row() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        for name, value in (("data", x), ("labelled", y)):
            with pyro.plate(name, len(value)):
                z = pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=value)

    plates = ("data", "labelled")
    x, y = torch.zeros(6), torch.zeros(3)
    guide = Joint(model, x, y, plates=plates, encoder=linear())
    with pytest.raises(ModelError, match="'data': 6, 'labelled': 3"):
        log_weights(model, guide, x, y, num_samples=2, plates=plates)


def test_without_a_data_plate_there_are_no_rows() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.3, 0.4))

    terms = log_weight_terms(model, guide, torch.ones(5), num_samples=7)
    assert terms.local.shape == (7, 0) and terms.global_.shape == (7,)
    assert torch.equal(terms.total, log_weights(model, guide, torch.ones(5), num_samples=7))


def test_a_site_that_the_inner_plate_alone_shapes_counts_for_each_row() -> None:
    def model(x: Tensor) -> None:  # (B, 3)
        with pyro.plate("columns", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("columns", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.arange(12.0).reshape(4, 3) / 10
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    assert torch.allclose(log_weights(model, guide, x, num_samples=3), exact.expand(3, 4), atol=1e-5)
