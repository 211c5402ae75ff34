"""The noise as an input: what is recorded and replayed gives the same run, and other randomness is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

from dgm.noise import Draw, NoiseExhausted, recording, replaying
from dgm.programs import preserved_rng

PROGRAMS: dict[str, Callable[[], Any]] = {
    "normal": lambda: td.Normal(torch.tensor([1.0, -2.0]), 3.0).rsample((4,)),
    "normal in place": lambda: torch.empty(3).normal_(1.0, 2.0),
    "normal by name": lambda: torch.empty(3).normal_(mean=1.0, std=2.0),
    "torch.normal": lambda: torch.normal(torch.zeros(3), torch.full((3,), 2.0)),
    "torch.normal of a size": lambda: torch.normal(1.0, 2.0, size=(2, 3)),
    "torch.normal of a mean": lambda: torch.normal(torch.arange(3.0), 2.0),
    "randn": lambda: torch.randn(2, 3, dtype=torch.float64),
    "randn of a tuple": lambda: torch.randn((2, 3)),
    "randn_like": lambda: torch.randn_like(torch.zeros(5)),
    "uniform": lambda: td.Uniform(torch.tensor(1.0), torch.tensor(3.0)).rsample((4,)),
    "uniform in place": lambda: torch.empty(3).uniform_(-1.0, 2.0),
    "rand": lambda: torch.rand(3),
    "rand_like": lambda: torch.rand_like(torch.zeros(4)),
    "exponential": lambda: td.Exponential(torch.tensor([1.0, 2.0])).rsample(),
    "exponential in place": lambda: torch.empty(4).exponential_(2.0),
    "Laplace": lambda: td.Laplace(torch.zeros(3), torch.ones(3)).rsample(),
    "multivariate normal": lambda: td.MultivariateNormal(torch.zeros(3), torch.eye(3)).rsample((2,)),
    "low rank": lambda: td.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)).rsample(),
    "several": lambda: torch.randn(2).sum() + torch.rand(3).sum() + td.Normal(0.0, 1.0).rsample(),
    "nothing": lambda: torch.ones(3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_recording_changes_nothing_and_replaying_gives_the_same(name: str) -> None:
    program = PROGRAMS[name]
    with preserved_rng(5):
        plain = program()
        after = torch.get_rng_state()
    with preserved_rng(5), recording() as draws:
        recorded = program()
        assert torch.equal(after, torch.get_rng_state())
    assert draws.complete
    assert torch.allclose(plain, recorded, rtol=1e-6)  # loc + scale * eps, in one kernel or two
    with preserved_rng(5):
        noise = draws.sample()
    with preserved_rng(6), replaying(noise):
        replayed = program()
    assert torch.equal(recorded, replayed), "the recorded noise does not give the recorded run"


INCOMPLETE: dict[str, Callable[[], Any]] = {
    "dropout": lambda: nn.Dropout(0.5)(torch.ones(100)),
    "Gamma": lambda: td.Gamma(torch.tensor(2.0), torch.tensor(1.0)).rsample(),
    "Beta": lambda: td.Beta(torch.tensor(2.0), torch.tensor(1.0)).rsample(),
    "Categorical": lambda: td.Categorical(torch.ones(3)).sample(),
    "Bernoulli": lambda: td.Bernoulli(torch.tensor(0.5)).sample(),
    "permutation": lambda: torch.randperm(10),
    "integers": lambda: torch.randint(5, (3,)),
    "normal, then Gamma": lambda: (torch.randn(3), td.Gamma(torch.tensor(2.0), torch.tensor(1.0)).rsample()),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_randomness_that_is_no_input_is_noticed(name: str) -> None:
    with preserved_rng(0), recording() as draws:
        INCOMPLETE[name]()
    assert not draws.complete


def test_evaluated_dropout_is_complete() -> None:
    with preserved_rng(0), recording() as draws:
        nn.Dropout(0.5).eval()(torch.randn(3))
    assert draws.complete and len(draws) == 1


def test_a_generator_of_its_own_is_left_alone() -> None:
    with recording() as draws:
        torch.randn(3, generator=torch.Generator().manual_seed(1))
    assert draws.complete and len(draws) == 0


def test_gradients_go_through_replayed_noise() -> None:
    loc, scale = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 2.0], requires_grad=True)
    eps = torch.tensor([0.3, -0.7])
    with replaying([eps]):
        td.Normal(loc, scale).rsample().sum().backward()
    assert torch.equal(loc.grad, torch.ones(2)) and torch.allclose(scale.grad, eps)


def test_too_many_too_few_and_misshapen() -> None:
    with pytest.raises(NoiseExhausted, match=r"drew normal \(2,\) after all 1 given draws"), replaying([torch.ones(3)]):
        torch.randn(3), torch.randn(2)
    with pytest.raises(NoiseExhausted, match="used 1 of 2 given draws"), replaying([torch.ones(3)] * 2):
        torch.randn(3)
    with pytest.raises(NoiseExhausted, match=r"draw 1 asks for shape \(2,\), given \(3,\)"), replaying([torch.ones(3)]):
        torch.randn(2)


def test_noise_of_many_runs_has_samples_in_front() -> None:
    with preserved_rng(0), recording() as draws:
        torch.randn(3), torch.rand(2, 2)
    many = draws.sample_many(7, torch.Generator().manual_seed(0))
    assert [tuple(t.shape) for t in many] == [(7, 3), (7, 2, 2)]
    assert bool((many[1] >= 0).all() and (many[1] < 1).all())


def test_under_vmap_each_run_gets_its_own_noise() -> None:
    def run(eps: Tensor) -> Tensor:
        with replaying([eps]):
            return td.Normal(torch.zeros(3), 2.0).rsample()

    noise = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(torch.func.vmap(run)(noise), 2 * noise)


def test_same_generator_same_numbers() -> None:
    draw = Draw("normal", torch.Size((4,)), torch.float64, torch.device("cpu"))
    a, b = (draw.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float64
