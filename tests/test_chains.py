"""Many chains at once: exact posteriors, the marks of chains that did not mix, and references on disk."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import dgm.reference as stored
from dgm.batched import batched_target
from dgm.chains import Chains, sample_chains, windows
from dgm.errors import DataError, ModelError, OptionError
from dgm.hmc import DualAveraging, start, transition
from dgm.log_joint import LogJoint
from dgm.metrics import CategoricalPrediction, GaussianPrediction
from dgm.mixing import diagnose
from dgm.models import bnn
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.packing import Packing
from dgm.reference import reference
from dgm.sites import latents

SIGMAS = 4.5
SHORT: dict[str, Any] = {"chains": 2, "warmup": 20, "draws": 5, "leapfrogs": 3}


def regression(rows: int = 40) -> tuple[BayesianLinearRegression, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, 4, generator=g, dtype=torch.float64)
    x = noise[:, :2] + 0.7 * noise[:, 2:3]
    y = x @ torch.tensor([1.0, -0.5]).double() + 0.3 + 0.5 * noise[:, 3]
    return BayesianLinearRegression(2, noise=0.5, intercept=True), x, y


@pytest.fixture(scope="module")
def exact() -> tuple[Any, Chains, tuple[Tensor, Tensor]]:
    model, x, y = regression()
    found = sample_chains(model, x, y, chains=8, warmup=150, draws=250, leapfrogs=8, seed=1)
    return model.posterior(x, y), found, (x, y)


def test_exact_posterior(exact: Any) -> None:
    posterior, found, _ = exact
    z = _scores(found.draws, posterior)
    assert z.abs().max() < SIGMAS, z
    assert found.divergences == 0 and 0.55 < float(found.acceptance.mean()) < 0.97
    assert bool((found.rhat < 1.03).all()) and found.verdict.startswith("mixed (by the predictions of 40 rows")
    assert found.draws.shape == (8, 250, 3) and found.draws.dtype == torch.float64
    torch.testing.assert_close(found.values()["w"], found.draws)


def test_mutants_fail(exact: Any) -> None:
    posterior, found, _ = exact
    shifted, wide = found.draws + 0.3 * posterior.stddev, posterior.mean + 1.2 * (found.draws - posterior.mean)
    assert _scores(shifted, posterior).abs().max() > 5
    assert _scores(wide, posterior).abs().max() > 5


def _scores(draws: Tensor, posterior: Any) -> Tensor:
    """Errors of means and of all second moments about the exact mean, in standard errors by their own ESS."""
    centred = draws - posterior.mean
    products = (centred.unsqueeze(-1) * centred.unsqueeze(-2)).flatten(-2)
    values = torch.cat([centred, products], -1)
    expected = torch.cat([torch.zeros_like(posterior.mean), posterior.covariance_matrix.flatten()])
    ess = diagnose(values)[1]
    return (values.mean((0, 1)) - expected) / (values.flatten(0, 1).std(0) / ess.sqrt())


def test_predictions_are_the_exact_ones(exact: Any) -> None:
    posterior, found, (x, y) = exact
    prediction = found.predict(x, y, most=400, y_std=2.0)
    assert isinstance(prediction, GaussianPrediction) and prediction.loc.shape == (400, 40) and prediction.y_std == 2.0
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    mean, sd = design @ posterior.mean, (design @ posterior.covariance_matrix * design).sum(1).sqrt()
    assert (((prediction.loc.mean(0) - mean) / (sd / 400**0.5)).abs() < SIGMAS).all()
    # chain after chain: the first fifty are those of the first chain
    keep = torch.linspace(0, 249, 50).round().long()
    torch.testing.assert_close(prediction.loc[:50], found.draws[0, keep] @ design.T)


def banana() -> Any:
    """a ~ N(0, 1), b ~ LogNormal, 0.5 observed about a + log b: two latents that depend on each other."""

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a * b, 0.5), obs=y)

    return model


def test_quadrature_in_two_dimensions() -> None:
    model, y = banana(), torch.tensor([0.8, 1.2, 0.6])
    found = sample_chains(model, y, chains=16, warmup=200, draws=300, leapfrogs=12, seed=0)
    a, v = torch.meshgrid(torch.linspace(-5, 5, 401).double(), torch.linspace(-7, 4, 401).double(), indexing="ij")
    b = v.exp()
    log_p = -a.square() / 2 + 2 * v - b + dist.Normal((a * b)[..., None], 0.5).log_prob(y.double()).sum(-1)
    weights = (log_p - log_p.max()).exp()
    weights = weights / weights.sum()
    values = found.values()
    for name, grid in (("a", a), ("b", b)):
        for power in (1, 2):
            draws = values[name].double().pow(power)
            error = draws.mean() - (weights * grid.pow(power)).sum()
            ess = diagnose(draws[..., None])[1]
            assert abs(error) / (draws.std() / ess.sqrt()) < SIGMAS, (name, power)
    assert not len(found.prediction_rhat)  # the model does not say what it predicts
    assert "by the 2 latents" in found.verdict


def test_chains_in_two_modes_are_found_out() -> None:
    def model(y: Tensor) -> dict[str, Tensor]:
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m.square(), 0.5), obs=y)
        return {"loc": m.expand(len(y)), "scale": torch.tensor(1.0)}

    y = torch.full((3,), 25.0)  # m is 5 or -5, and no chain goes from one to the other
    found = sample_chains(model, y, chains=6, warmup=60, draws=60, leapfrogs=5, init_scale=4.0, seed=0)
    modes = found.draws.mean(1).sign()
    assert modes.min() < 0 < modes.max()  # some here, some there
    assert float(found.rhat.max()) > 1.5 and float(found.prediction_rhat.max()) > 1.5
    assert found.verdict.startswith("not mixed") and found.log_density_rhat < 1.1  # which log p alone does not see
    alone = replace(found, draws=found.draws[:1].expand(6, -1, -1)).judged(y)
    assert float(alone.rhat.max()) < 1.4  # a copy of one chain knows nothing of the other mode


def test_networks_predict_by_class() -> None:
    model, (x, y) = bnn.example_classification()
    found = sample_chains(model, x, y, chains=4, warmup=40, draws=20, leapfrogs=5)
    prediction = found.predict(x, y)
    assert isinstance(prediction, CategoricalPrediction) and prediction.logits.shape == (80, 20, 3)
    w = {name: value[2, 7] for name, value in found.values().items()}
    hidden = torch.tanh(x @ w["network.0.weight"].T + w["network.0.bias"])
    expected = (hidden @ w["network.2.weight"].T + w["network.2.bias"]).log_softmax(-1)
    torch.testing.assert_close(prediction.logits[2 * 20 + 7], expected.double(), rtol=1e-4, atol=1e-5)
    rhat, ess = found.prediction_mixing(x, y)
    assert rhat.shape == ess.shape == (20,)


def test_all_chains_at_once_are_what_each_is_alone() -> None:
    model, batch = bnn.example()
    packing = Packing(latents(model, *batch).values())
    joint = LogJoint(model, [packing])
    u = 0.3 * torch.randn(5, packing.size, generator=torch.Generator().manual_seed(0))
    value, gradient = batched_target(joint, u, batch, compiled=False)(u)[:2]
    for i in range(5):
        v, g = joint.gradient(u[i], *batch)
        torch.testing.assert_close(value[i], v, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(gradient[i], g, rtol=1e-4, atol=1e-3)


def test_a_model_that_cannot_be_mapped_runs_chain_by_chain() -> None:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        scale = 1.0 if float(m.detach()) > -100 else 2.0  # a branch on a value
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, scale), obs=y)

    y = torch.tensor([1.0, 2.0])
    joint = LogJoint(model, [Packing(latents(model, y).values())])
    target = batched_target(joint, torch.zeros(3, 1), (y,), compiled=True)
    u = torch.tensor([[0.0], [1.0], [2.0]])
    torch.testing.assert_close(target(u)[1], 3.0 - 3 * u)  # d/dm of -m^2/2 - sum (y - m)^2/2


@pytest.mark.slow
def test_compiled_density_is_the_same() -> None:
    model, batch = bnn.example()
    joint = LogJoint(model, [Packing(latents(model, *batch).values())])
    u = 0.3 * torch.randn(5, joint.size, generator=torch.Generator().manual_seed(0))
    plain, fast = (batched_target(joint, u, batch, compiled=c)(1.1 * u) for c in (False, True))
    for a, b in zip(plain, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_seeds_and_the_random_stream() -> None:
    model, x, y = regression()
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    one, two = (sample_chains(model, x, y, **SHORT) for _ in range(2))
    assert torch.equal(torch.randn(2), expected)
    assert torch.equal(one.draws, two.draws)
    assert not torch.equal(one.draws, sample_chains(model, x, y, seed=1, **SHORT).draws)
    assert one.gradients > 25 * 2 and sample_chains(model, x, y, **{**SHORT, "thin": 3}).draws.shape == (2, 5, 3)


def test_the_metric_takes_up_scales() -> None:
    """Latents of scale 1 and 100 under a plate of nothing: the identity needs steps a hundred times smaller."""

    def model(y: Tensor) -> None:
        pyro.sample("m", dist.Normal(torch.zeros(2), torch.tensor([0.1, 10.0])).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(len(y)), 1.0), obs=y)

    least = {}
    for metric in ("diagonal", "identity"):
        found = sample_chains(
            model, torch.zeros(2), chains=8, warmup=200, draws=100, leapfrogs=6, metric=metric, seed=0
        )  # fmt: skip
        least[metric] = float(found.ess.min())
    assert least["diagonal"] > 4 * least["identity"]
    assert windows(20)[-1] == 18 and windows(1000)[-1] == 900


def test_bad_input_is_named() -> None:
    model, x, y = regression()
    for name, value in (("chains", 1), ("warmup", 5), ("draws", 3), ("leapfrogs", 0), ("thin", 0), ("chains", 2.0)):
        with pytest.raises(OptionError, match=name):
            sample_chains(model, x, y, **{**SHORT, name: value})
    with pytest.raises(OptionError, match="metric is 'dense'"):
        sample_chains(model, x, y, metric="dense")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="init_scale is -1"):
        sample_chains(model, x, y, init_scale=-1)
    with pytest.raises(OptionError, match=r"in \(0, 1\)"):
        sample_chains(model, x, y, acceptance=1.0)
    with pytest.raises(DataError, match="y has 40 NaN"):
        sample_chains(model, x, y.clone().fill_(math.nan), **SHORT)

    def local(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def discrete(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def trained(y: Tensor) -> None:
        s = pyro.param("s", torch.tensor(1.0))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.tensor(1.0))

        def forward(self, y: Tensor) -> None:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(m, self.s), obs=y)

    for program, words in ((local, "'z' is one for each row"), (discrete, "'k' is discrete"), (Trained(), "'s'")):
        with pytest.raises(ModelError, match=words):
            sample_chains(program, y, **SHORT)
    found = sample_chains(banana(), y[:3], **SHORT)
    with pytest.raises(ModelError, match="does not say what it predicts"):
        found.predict(y[:3])


# ------------------------------------------------------------------------------------------- references on disk


def test_a_reference_is_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = regression()
    one = reference(model, x, y, folder=tmp_path, **SHORT)
    monkeypatch.setattr(stored, "sample_chains", _never)
    two = reference(model, x, y, folder=tmp_path, **SHORT)
    for name in stored.TENSORS:
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert [getattr(one, n) for n in stored.NUMBERS] == [getattr(two, n) for n in stored.NUMBERS]
    content = json.loads((tmp_path / "reference.json").read_text())
    assert content["identity"]["protocol"]["draws"] == 5 and content["verdict"] == one.verdict
    assert {"commit", "versions", "seconds", "prediction_rhat_max"} <= set(content)
    assert len(list(tmp_path.iterdir())) == 2


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the reference was sampled again")


def test_another_protocol_model_or_data_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = regression()
    reference(model, x, y, folder=tmp_path, **SHORT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = BayesianLinearRegression(2, prior_scale=2.0, noise=0.5, intercept=True)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "sample_chains", _never)
        cases: list[tuple[Any, Any, dict[str, Any], str]] = [
            (model, y, {**SHORT, "seed": 1}, "seed is 0 there and 1 here"),
            (model, y, {**SHORT, "draws": 6, "thin": 2}, "draws is 5 there and 6 here; thin is 1 there and 2 here"),
            (model, y + 1e-9, SHORT, "the data differ"),
            (other, y, SHORT, "log density differs"),
            (BayesianLinearRegression(2, noise=0.5), y, SHORT, "the model's sites differ"),
        ]
        for program, target, options, words in cases:
            with pytest.raises(DataError, match=words):
                reference(program, x, target, folder=tmp_path, **options)
        with pytest.raises(OptionError, match="'leaps' is no setting"):
            reference(model, x, y, folder=tmp_path, leaps=3)
        with pytest.raises(OptionError, match="stale is 'ask'"):
            reference(model, x, y, folder=tmp_path, stale="ask", **SHORT)  # type: ignore[arg-type]
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = reference(model, x, y, folder=tmp_path, stale="recompute", **{**SHORT, "draws": 6})
    assert again.draws.shape[1] == 6 and len(list(tmp_path.iterdir())) == 2  # the old draws are gone


def test_initial_weights_are_no_part_of_a_model(tmp_path: Path) -> None:
    _, batch = bnn.example()

    def network(activation: type[nn.Module] = nn.Tanh) -> bnn.BNN:
        return bnn.BNN(nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 1)))

    one, two = (reference(network(), *batch, folder=tmp_path, **SHORT) for _ in range(2))
    assert torch.equal(one.draws, two.draws)
    with pytest.raises(DataError, match="log density differs"):
        reference(network(nn.ReLU), *batch, folder=tmp_path, **SHORT)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json", "field"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    model, x, y = regression()
    good = reference(model, x, y, folder=tmp_path, **SHORT)
    recipe = tmp_path / "reference.json"
    draws = next(tmp_path.glob("*.safetensors"))
    raw = bytearray(draws.read_bytes())
    if damage == "truncate":
        draws.write_bytes(raw[:-7])
    elif damage == "flip":
        raw[-9] ^= 1
        draws.write_bytes(raw)
    elif damage == "remove":
        draws.unlink()
    elif damage == "json":
        recipe.write_text(recipe.read_text()[:100])
    else:
        recipe.write_text(json.dumps({k: v for k, v in json.loads(recipe.read_text()).items() if k != "sha256"}))
    named = draws.name if damage in ("truncate", "flip", "remove") else recipe.name
    with pytest.raises(DataError, match=named.replace(".", r"\.") + ".*(damaged|missing)"):
        reference(model, x, y, folder=tmp_path, **SHORT)
    assert torch.equal(reference(model, x, y, folder=tmp_path, stale="recompute", **SHORT).draws, good.draws)


@pytest.mark.parametrize("place", ["draws", "recipe"])
def test_killed_while_it_writes_leaves_the_old_one(tmp_path: Path, place: str) -> None:
    model, x, y = regression()
    reference(model, x, y, folder=tmp_path, **SHORT)
    other = sample_chains(model, x, y, seed=1, **SHORT)
    last = {"draws": 1, "recipe": 2}[place]
    child = os.fork()
    if child == 0:  # the writer
        whole, calls = stored.write_whole, []

        def killed(path: Path, write: Any) -> Path:
            calls.append(path)
            if len(calls) == last:
                write(path.with_name(f".{path.name}.1.part"))
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(path, write)

        try:
            stored.write_whole, stored.sample_chains = killed, lambda *_, **__: other
            reference(model, x, y, folder=tmp_path, stale="recompute", **{**SHORT, "seed": 1})
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(stored, "sample_chains", _never)
        assert reference(model, x, y, folder=tmp_path, **SHORT).draws.shape == (2, 5, 3)


def test_a_stopped_adaptation_leaves_the_target() -> None:
    """What the chains rest on: many transitions from exact draws stay exact, at any step size."""
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def target(u: Tensor) -> tuple[Tensor, Tensor]:
        return -(u / scale).square().sum(-1) / 2, -u / scale.square()

    torch.manual_seed(0)
    state = start(target, scale * torch.randn(4000, 2, dtype=torch.float64))
    for _ in range(10):
        state, _ = transition(target, state, 1.2, 3)
    z = ((state.u / scale).square().mean(0) - 1) / (2 / 4000) ** 0.5
    assert z.abs().max() < SIGMAS
    assert DualAveraging(0.1).averaged == pytest.approx(0.1)
