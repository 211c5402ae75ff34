"""Hamiltonian transitions: the map is reversible and of second order, the target stays, bad proposals do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm.errors import ModelError, OptionError
from dgm.hmc import DualAveraging, State, adjusted, first_step, start, transition


def logistic(u: Tensor) -> tuple[Tensor, Tensor]:
    """Independent standard logistic variables: draws are exact, the variance is pi^2 / 3."""
    return (-u - 2 * torch.nn.functional.softplus(-u)).sum(-1), 2 * torch.sigmoid(-u) - 1


def draws(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).logit()


def leapfrog(u: Tensor, r: Tensor, step: float, count: int) -> tuple[Tensor, Tensor]:
    for _ in range(count):
        r = r + step / 2 * logistic(u)[1]
        u = u + step * r
        r = r + step / 2 * logistic(u)[1]
    return u, r


def test_the_path_is_the_leapfrog_map_and_reversible() -> None:
    torch.manual_seed(0)
    u, r, always = draws(50, 3), torch.randn(50, 3, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    moved, _ = transition(logistic, start(logistic, u), 0.4, 7, noise=r, uniform=always)
    end, momentum = leapfrog(u, r, 0.4, 7)
    assert torch.allclose(moved.u, end, rtol=0, atol=1e-12)
    back, _ = transition(logistic, moved, 0.4, 7, noise=-momentum, uniform=always)
    assert torch.allclose(back.u, u, rtol=0, atol=1e-10)
    assert torch.allclose(moved.log_density, logistic(end)[0]) and torch.allclose(moved.gradient, logistic(end)[1])


def test_the_energy_error_is_of_second_order() -> None:
    torch.manual_seed(0)
    u, r = draws(4000, 3), torch.randn(4000, 3, dtype=torch.float64)
    errors = []
    for step, count in ((0.4, 5), (0.2, 10), (0.1, 20)):
        _, acceptance = transition(logistic, start(logistic, u), step, count, noise=r)
        errors.append(float(-acceptance.log().mean()))
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.8 < errors[1] / errors[2] < 4.2


def z_scores(u: Tensor) -> Tensor:
    """Of the first moments of logistic variables, over independent chains."""
    moments = torch.stack([u, u.square() - math.pi**2 / 3, (u.abs() < 1).double() - math.tanh(0.5)])
    return moments.mean(1) / (moments.std(1) / u.shape[0] ** 0.5)


@pytest.mark.parametrize("step", [0.9, 1.8])
def test_the_target_stays_and_without_the_acceptance_it_does_not(step: float) -> None:
    torch.manual_seed(0)
    kept = mutant = start(logistic, draws(20_000, 2))
    always, accepted = torch.zeros(20_000, dtype=torch.float64), []
    for _ in range(10):
        kept, acceptance = transition(logistic, kept, step, 3)
        mutant, _ = transition(logistic, mutant, step, 3, uniform=always)
        accepted.append(float(acceptance.mean()))
    assert 0.4 < accepted[-1] < 0.97  # rejections are what is tested
    assert float(z_scores(kept.u).abs().max()) < 4.5
    assert float(z_scores(mutant.u).abs().max()) > 4.5


def test_a_scale_is_another_choice_of_coordinates() -> None:
    torch.manual_seed(0)
    scale, u = torch.tensor([0.1, 3.0], dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    noise, uniform = torch.randn(30, 2, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    step = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)

    def wide(v: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = logistic(v / scale)
        return value, slope / scale

    mine, a = transition(wide, start(wide, u * scale), step, 4, scale, noise, uniform)
    plain, b = transition(logistic, start(logistic, u), step, 4, None, noise, uniform)
    assert torch.allclose(mine.u / scale, plain.u, rtol=0, atol=1e-12) and torch.allclose(a, b)
    assert len(set(b.tolist())) > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_taken(value: float) -> None:
    def walled(u: Tensor) -> tuple[Tensor, Tensor]:
        outside = (u.abs() > 1).any(-1)
        return torch.where(outside, torch.full_like(u[:, 0], value), torch.zeros_like(u[:, 0])), torch.zeros_like(u)

    torch.manual_seed(0)
    state, refused = start(walled, torch.zeros(500, 2)), 0
    for _ in range(20):
        before = state.u
        state, acceptance = transition(walled, state, 0.3, 3)
        stays = (acceptance == 0).unsqueeze(-1)
        refused += int(stays.sum())
        assert torch.equal(torch.where(stays, state.u, before), before)
        assert bool((state.u.abs() <= 1).all()) and bool(state.log_density.isfinite().all())
        assert bool(((acceptance >= 0) & (acceptance <= 1)).all())
    assert refused > 1000


def test_a_gradient_that_is_not_finite_refuses_the_end() -> None:
    def broken(u: Tensor) -> tuple[Tensor, Tensor]:
        return -u.square().sum(-1) / 2, torch.where(u > 0, torch.full_like(u, math.nan), -u)

    state, acceptance = transition(broken, start(broken, torch.full((9, 1), -0.1)), 0.5, 2, noise=torch.ones(9, 1))
    assert bool((acceptance == 0).all()) and bool((state.u == -0.1).all())


def test_what_else_the_target_gives_is_carried_along() -> None:
    def more(u: Tensor) -> tuple[Tensor, ...]:
        return (*logistic(u), u.sum(-1), 2 * u)

    torch.manual_seed(0)
    state = start(more, draws(200, 2))
    state, acceptance = transition(more, state, 2.5, 2)
    assert 0.1 < float(acceptance.mean()) < 0.9
    assert torch.equal(state.more[0], state.u.sum(-1)) and torch.equal(state.more[1], 2 * state.u)


def test_dual_averaging_reaches_its_target() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64).repeat_interleave(50)[:, None]

    def target(u: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = logistic(u / scale)
        return value, slope / scale

    state = start(target, draws(150, 5) * scale)
    first = first_step(target, state)
    rule = DualAveraging(first.reshape(3, 50).median(1).values, target=0.7)  # one step size for 50 chains
    for _ in range(200):
        state, acceptance = transition(target, state, rule.step.repeat_interleave(50), 4)
        rule.update(acceptance.reshape(3, 50).mean(1))
    step = rule.averaged.repeat_interleave(50)
    kept = torch.stack([transition(target, state, step, 4)[1] for _ in range(30)]).reshape(30, 3, 50)
    assert bool(((kept.mean((0, 2)) - 0.7).abs() < 0.05).all())
    assert 80 < rule.averaged[1] / rule.averaged[0] < 125 and 80 < rule.averaged[2] / rule.averaged[1] < 125
    assert 50 < first[60] / first[10] < 200


def test_the_multiplicative_rule_follows_the_acceptance_of_each_group() -> None:
    step = adjusted(torch.tensor([0.1, 0.1, 0.1]), torch.tensor([1.0, 0.65, 0.0]), target=0.65)
    assert step[0] > step[1] == 0.1 > step[2]


def test_errors_name_what_was_given() -> None:
    state = start(logistic, torch.zeros(3, 2))
    with pytest.raises(OptionError, match="leapfrogs is 0"):
        transition(logistic, state, 0.1, 0)
    with pytest.raises(OptionError, match="target is 1"):
        DualAveraging(0.1, target=1.0)
    with pytest.raises(OptionError, match="positive"):
        DualAveraging(0.0)
    with pytest.raises(ModelError, match="start of 1 of 3 chains"):
        first_step(logistic, State(state.u, torch.tensor([0.0, -math.inf, 0.0]), state.gradient))
