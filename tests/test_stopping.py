"""Early stopping on a noisy bound: it must wait through noise, and must not wait for luck."""

from __future__ import annotations

import math

import pytest
import torch

from dgm.errors import DataError, OptionError, TrainingError
from dgm.stopping import NoisyPlateau


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first_stop(values: list[float], patience: int = 10, z: float = 2.0, error: float = 0.0) -> int | None:
    """The check, counted from 1, at which the rule says stop."""
    rule = NoisyPlateau(patience, z)
    return next((t for t, value in enumerate(values, start=1) if rule.update(value, error)), None)


def first_stop_of_the_mutant(values: list[float], patience: int = 10) -> int | None:
    """The usual rule on raw values: no new best for ``patience`` checks."""
    best, since = -math.inf, 0
    for t, value in enumerate(values, start=1):
        best, since = (value, 0) if value > best else (best, since + 1)
        if since >= patience:
            return t
    return None


# ---------------------------------------------------------------- without noise


@pytest.mark.parametrize("patience", [2, 3, 10])
@pytest.mark.parametrize("slope", [1e-6, 1.0, 1e6])
def test_a_straight_rise_never_stops(patience: int, slope: float) -> None:
    assert first_stop([slope * t for t in range(200)], patience) is None


@pytest.mark.parametrize("patience", [2, 3, 10])
def test_a_constant_stops_at_the_first_possible_check(patience: int) -> None:
    assert first_stop([-7.0] * 100, patience) == 2 * patience


def test_a_fall_stops_at_the_first_possible_check() -> None:
    assert first_stop([-0.1 * t for t in range(100)]) == 20


def test_a_rise_that_ends_stops_within_two_windows_of_its_end() -> None:
    values = [min(t, 50) * 0.1 for t in range(200)]
    stop = first_stop(values)
    assert stop is not None
    assert 51 < stop <= 51 + 20


# ---------------------------------------------------------------- with noise


@pytest.mark.parametrize("seed", range(20))
def test_a_steady_noisy_rise_never_stops(seed: int) -> None:
    """A gain of half a noise sd a check: ten checks gain 5 sd, the error of the difference is 0.45 sd."""
    values = 0.5 * torch.arange(300.0) + noise(300, seed=seed)
    assert first_stop(values.tolist(), error=1.0) is None


def test_a_flat_noisy_curve_stops_soon() -> None:
    """Under no gain each look stops with probability 97.7 %: nearly all runs at check 20, and all before 60."""
    stops = [first_stop(noise(100, seed=seed).tolist(), error=1.0) for seed in range(200)]
    assert all(stop is not None and 20 <= stop < 60 for stop in stops)
    at_once = sum(stop == 20 for stop in stops) / 200
    share = 0.9772
    assert at_once > share - 4 * math.sqrt(share * (1 - share) / 200) - 0.02


def test_scatter_is_seen_even_where_no_error_is_given() -> None:
    """Jitter of the parameters is in no standard error of the evaluation."""
    stops = [first_stop(noise(100, seed=seed).tolist()) for seed in range(50)]
    assert all(stop is not None and stop < 60 for stop in stops)


def test_raw_rule_stops_a_noisy_rise_too_early() -> None:
    values = (0.2 * torch.arange(300.0) + 2 * noise(300, seed=0)).tolist()
    early = first_stop_of_the_mutant(values)
    assert early is not None and early < 150
    ours = first_stop(values, patience=20)
    assert ours is None


def test_raw_rule_lets_luck_prolong_a_flat_curve() -> None:
    """Records of noise come for ever: the unluckiest of 100 flat runs waits twice as long, and none of ours does."""
    curves = [noise(300, seed=seed).tolist() for seed in range(100)]
    theirs = max(first_stop_of_the_mutant(curve, 20) or 300 for curve in curves)
    ours = max(first_stop(curve, 20) or 300 for curve in curves)
    assert theirs >= 80
    assert ours < 60


def test_one_lucky_or_unlucky_check_changes_nothing() -> None:
    rise = [0.1 * t for t in range(200)]
    rise[100] -= 2.5  # p^2 / (1 + z) = 33 times the gain of a check is allowed
    assert first_stop(rise) is None
    flat = noise(100, seed=3).tolist()
    flat[5] += 20.0
    stop = first_stop(flat, error=1.0)
    assert stop is not None and stop <= 40


# ---------------------------------------------------------------- pairing


def held_out(slope: float, checks: int, seed: int, data: int = 200) -> list[torch.Tensor]:
    """Bounds of the same hard and easy data at every check: spread 20 nats, Monte Carlo noise 1 nat a datum."""
    datum = 20 * noise(data, seed=seed)
    return [slope * t + datum + noise(data, seed=1000 * seed + t) for t in range(checks)]


def test_pairing_sees_a_gain_far_below_the_spread_of_the_data() -> None:
    """Ten checks gain 0.2 nats, where the data's own standard error is 1.4 and the paired one 0.03."""
    paired, unpaired = NoisyPlateau(), NoisyPlateau()
    unpaired_stopped = False
    for bounds in held_out(0.02, 80, seed=1):
        value, error = bounds.mean().item(), (bounds.std() / math.sqrt(len(bounds))).item()
        assert not paired.update(value, error, bounds)
        unpaired_stopped |= unpaired.update(value, error)
    assert unpaired_stopped  # the mutant: the spread of the data taken for noise


def test_pairing_stops_when_the_gain_ends() -> None:
    rule = NoisyPlateau()
    stops = [rule.update(bounds.mean().item(), per_datum=bounds) for bounds in held_out(0.0, 60, seed=2)]
    assert True in stops[19:40] and True not in stops[:19]


def test_paired_error_by_hand() -> None:
    rule = NoisyPlateau(patience=2, z=1.0)
    rows = [torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])]
    # gains 1 and 3: mean 2, standard error 1; steps 0, 2, 0: seen error sqrt(2/2 * 4 / 6)
    answers = [rule.update(row.mean().item(), per_datum=row) for row in rows]
    assert answers == [False] * 4
    assert "+2 nats, more than 1 standard errors of 1" in rule.reason


def test_given_error_by_hand() -> None:
    rule = NoisyPlateau(patience=2, z=2.0)
    for value in (0.0, 0.0, 2.0, 2.0):
        stop = rule.update(value, 3.0)
    assert stop  # error sqrt(4 * 9) / 2 = 3
    assert "no more than 2 standard errors of 3" in rule.reason


def test_unknown_error_leaves_the_scatter() -> None:
    assert first_stop([float(t) for t in range(50)], error=math.nan) is None
    assert first_stop(noise(100, seed=0).tolist(), error=math.nan) is not None


# ---------------------------------------------------------------- attributes and bad input


def test_best_is_a_mean_not_the_luckiest_check() -> None:
    rule = NoisyPlateau(patience=3)
    assert (rule.best, rule.best_check) == (-math.inf, 0)
    bests = []
    for value in (9.0, 0.0, 0.0, 3.0, 3.0, 6.0, 0.0, 0.0):
        rule.update(value)
        bests.append((rule.best, rule.best_check))
    assert bests == [(9, 1), (4.5, 2), (3, 3), (3, 3), (3, 3), (4, 6), (4, 6), (4, 6)]


def test_reason_says_what_goes_on() -> None:
    rule = NoisyPlateau(patience=2)
    assert rule.reason == "no check yet"
    rule.update(1.0)
    assert rule.reason.startswith("check 1: too early to tell")
    for value in (2.0, 3.0, 4.0):
        rule.update(value)
    assert rule.reason.startswith("going on at check 4: ")
    for value in (4.0, 4.0, 4.0):
        rule.update(value)
    assert rule.reason.startswith("stopped at check 7: ")


def test_memory_is_two_windows() -> None:
    rule = NoisyPlateau(patience=3)
    for t in range(50):
        rule.update(float(t), per_datum=torch.full((5,), float(t)))
    assert len(rule._values) == len(rule._per_datum) == 6


def test_refusals() -> None:
    with pytest.raises(OptionError, match="patience"):
        NoisyPlateau(patience=1)
    for z in (-1.0, math.nan, 3.0):
        with pytest.raises(OptionError, match="z: expected"):
            NoisyPlateau(patience=2, z=z)
    rule = NoisyPlateau()
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(TrainingError, match="not finite at check 1"):
            rule.update(value)
    with pytest.raises(TrainingError, match="not finite"):
        rule.update(0.0, per_datum=torch.tensor([0.0, math.nan]))
    with pytest.raises(OptionError, match="standard_error"):
        rule.update(0.0, -1.0)
    with pytest.raises(DataError, match=r"\(2, 1\)"):
        rule.update(0.0, per_datum=torch.zeros(2, 1))
    rule.update(0.0, per_datum=torch.zeros(2))
    with pytest.raises(DataError, match="expected the 2 data of the checks before, got 3 at check 2"):
        rule.update(0.0, per_datum=torch.zeros(3))
    with pytest.raises(DataError, match="present until check 1, absent at check 2"):
        rule.update(0.0)
    rule = NoisyPlateau()
    rule.update(0.0)
    with pytest.raises(DataError, match="absent until check 1, present at check 2"):
        rule.update(0.0, per_datum=torch.zeros(2))
