"""The hook that makes a posterior after training: when `fit` calls it, with what; and guides without a density."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dgm
from dgm.errors import DataError, GuideError, TrainingError
from dgm.fitted import Interrupted
from dgm.guides.amortized import Amortized
from dgm.guides.free import Free
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.guides.laplace import Laplace
from dgm.guides.point import Point
from dgm.models import linear_vae
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Normal
from dgm.posthoc import finishers, has_density
from dgm.programs import preserved_rng


def network() -> tuple[BNN, tuple[Tensor, Tensor]]:
    with preserved_rng(0):
        x = torch.randn(24, 2)
        y = torch.sin(x[:, 0]) + 0.3 * torch.randn(24)
        return BNN(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), Normal(scale=0.3)), (x, y)


class Counting(Global):
    """Remembers what `finish` was given."""

    def finish(self, model: Any, *data: Tensor, seed: int = 0) -> None:
        self.__dict__.setdefault("seen", []).append((model, data, seed))
        self.notes = [f"seed {seed}"]
        self.evaluations = 11
        if self.refuse:
            raise GuideError("finish says no")

    refuse = False


@pytest.mark.parametrize("compile", [False, "trace"])
def test_finish_is_called_once_with_the_training_rows(compile: Any) -> None:
    model, (x, y) = network()
    fits = dgm.fit(
        lambda: network()[0], Counting, x, y, epochs=2, replicas=2, validation=0.25, batch_size=5, compile=compile
    )
    for seed, fit in enumerate(fits):
        ((given, data, told),) = fit.guide.seen  # type: ignore[attr-defined]
        assert given is fit.model and told == seed and [len(t) for t in data] == [18, 18]
        assert fit.evaluations == 2 * 18 + 11
    guide = Counting(model, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    dgm.fit(model, guide, loader, epochs=1)
    assert torch.equal(guide.seen[0][1][0], x)
    doubled = Counting(model, x, y)
    dgm.fit(model, doubled, x, y, epochs=1, batch_size=8, transform=lambda batch, _: (2 * batch[0], batch[1]))
    assert torch.equal(doubled.seen[0][1][0], 2 * x)


def test_no_finish_where_training_ended_early() -> None:
    model, (x, y) = network()
    guide = Counting(model, x, y)

    def stop(optimiser: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        dgm.fit(model, guide, x, y, epochs=1, schedule=stop)
    with pytest.raises(TrainingError):
        dgm.fit(model, guide, x, y, epochs=3, optim=partial(torch.optim.SGD, lr=1e30), compile=False)
    assert "seen" not in guide.__dict__


def test_a_finish_that_refuses_stops_no_other_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "refuse", True)
    model, (x, y) = network()
    for compile in (False, "trace"):
        fits = dgm.fit(lambda: network()[0], Counting, x, y, epochs=2, replicas=2, compile=compile)
        assert [fit.error for fit in fits] == ["finish says no"] * 2 and len(fits[0].history) == 2
    with pytest.raises(GuideError, match="finish says no"):
        dgm.fit(model, Counting(model, x, y), x, y, epochs=1)


def test_a_finish_that_fails_keeps_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *data: Any, seed: int = 0) -> None:
        raise ZeroDivisionError("half\nway")

    monkeypatch.setattr(Counting, "finish", fails)
    model, (x, y) = network()
    with pytest.raises(GuideError, match=r"Counting\.finish failed .* ZeroDivisionError: half way; ") as caught:
        dgm.fit(model, Counting(model, x, y), x, y, epochs=3)
    assert caught.value.fit.steps == 3  # type: ignore[attr-defined]
    for compile in (False, "trace"):
        fits = dgm.fit(lambda: network()[0], Counting, x, y, epochs=2, replicas=2, compile=compile)
        assert all("half way" in str(fit.error) and fit.steps == 2 for fit in fits)


def test_ctrl_c_while_finishing_keeps_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgm.guides.laplace.precision", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    model, (x, y) = network()
    guide = Laplace(model, x, y)
    with pytest.raises(Interrupted) as caught:
        dgm.fit(model, guide, x, y, epochs=3)
    assert caught.value.fit.steps == 3 and not guide.done and not bool(guide.finished)


def test_what_is_refused_leaves_a_finished_guide_as_it_is() -> None:
    model, (x, y) = network()
    guide = Laplace(model, x, y)
    dgm.fit(model, guide, x, y, epochs=1)
    with pytest.raises(DataError):
        dgm.fit(model, guide, x, torch.full_like(y, torch.nan), epochs=1)
    assert guide.done and has_density(guide)


def test_has_density_is_found_inside() -> None:
    model, (x,) = linear_vae.example()
    assert has_density(Amortized(model, x)) and not has_density(Amortized(model, x, family=Point))
    assert not has_density(Free(model, x, family=Point)) and has_density(lambda x: None)
    bayesian, batch = network()
    assert finishers(Joint(bayesian, *batch)) == [] and len(finishers(Joint(bayesian, *batch, global_=Laplace))) == 1

    def both(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    mixed = Joint(both, x[:, 0], global_=partial(Global, family=Point))
    assert not has_density(mixed) and has_density(mixed, local=True) and not has_density(mixed, local=False)


def test_a_noisy_guide_without_a_density_has_no_bound() -> None:
    model, (x,) = linear_vae.example()
    guide = Amortized(model, x)
    guide.has_density = False
    scores = dgm.evaluate(model, guide, x, num_samples=100)
    assert scores.per_datum.isna().all(axis=None) and "no density" in scores.notes[0]
    guide.has_density = True
    assert math.isfinite(dgm.evaluate(model, guide, x, num_samples=100).summary["bound"])
