"""Many Hamiltonian Monte Carlo chains at once over a model's global latents: the reference for everything else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .batched import COMPILE_FROM, batched_target
from .data import as_given
from .drawn import Chains
from .errors import ModelError, OptionError
from .hmc import DualAveraging, State, Target, check_target, first_step, start, transition
from .log_joint import LogJoint
from .options import checked_seed
from .packing import Packing
from .programs import Program, preserved_rng, program_name, with_home
from .sites import DATA_PLATE, latents, require_continuous, start_values, trace_once

__all__ = ["Chains", "sample_chains"]

Metric = Literal["diagonal", "identity"]


def sample_chains(
    model: Program,
    *data: Any,
    chains: int = 16,
    warmup: int = 300,
    draws: int = 200,
    leapfrogs: int = 100,
    thin: int = 1,
    seed: int = 0,
    init_scale: float = 0.5,
    metric: Metric = "diagonal",
    acceptance: float = 0.7,
    compiled: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Chains:
    r"""Draws of p(u | x), the posterior of all global latents, by Hamiltonian Monte Carlo on all rows.

    .. math:: u_c \sim p(u \mid x) \propto p(x, w(u))\,|dw/du|, \qquad c = 1..C

    All chains take one transition together: L leapfrog steps, the same number for all, drawn anew each time between L/2
    and 3L/2, with a step size for each chain that is jittered by a fifth. A gradient of all chains is one call of one
    graph. In warm-up the step sizes are adapted by dual averaging, trajectories grow to their full length over its
    first half, and a diagonal inverse mass is taken from the pooled variances in windows that double. Afterwards
    nothing adapts. Long trajectories are what mixes a Bayesian network.

    Reference: Neal, "MCMC using Hamiltonian dynamics", 2011; Hoffman and Gelman, "The No-U-Turn Sampler", 2014, for
    dual averaging; Izmailov, Vikram, Hoffman, Wilson, "What are Bayesian neural network posteriors really like?", 2021.

    Args:
        model: without trainable parameters; every latent global and continuous.
        data: all rows, as the model takes them.
        chains: C, at least 2. warmup: transitions before the draws, at least 20. draws: kept of each chain, at least 4.
        leapfrogs: L, mean number of steps in a trajectory, at least 1: the cost is about
            (0.75 warmup + draws * thin) L gradients of each chain. thin: transitions for each draw that is kept.
        seed: of starts and chains.
        init_scale: chains start at the model's start values plus normal noise of this standard deviation, >= 0, in
            unconstrained coordinates: wide, so that R-hat can see what is not mixed.
        metric: "diagonal", or "identity" for none.
        acceptance: that step sizes are adapted to, in (0, 1).
        compiled: whether the gradient is compiled; None compiles where there are 20,000 or more of them.
        progress: called with (transitions done, of how many).

    Returns:
        the draws with their diagnostics: `rhat`, `ess`, `predict`, `verdict`; see `Chains`.

    Raises:
        OptionError: an argument out of its domain.
        ModelError: a local or discrete latent, trainable parameters, or a density that is not finite at a start.
        DataError: bad data.

    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> found = sample_chains(model, *batch, chains=4, warmup=20, draws=10, leapfrogs=5)
    >>> found.draws.shape, found.values()["w"].shape
    (torch.Size([4, 10, 3]), torch.Size([4, 10, 3]))
    """
    _check(chains=(chains, 2), warmup=(warmup, 20), draws=(draws, 4), leapfrogs=(leapfrogs, 1), thin=(thin, 1))
    check_target(acceptance)
    seed = checked_seed(seed)
    if metric not in ("diagonal", "identity"):
        raise OptionError(f"metric is {metric!r}, expected 'diagonal' or 'identity'")
    if not (isinstance(init_scale, int | float) and 0 <= init_scale < math.inf):
        raise OptionError(f"init_scale is {init_scale!r}, expected a finite number >= 0")
    began = time.perf_counter()
    data = as_given(data)
    packing = global_packing(model, data)
    middle = packing.pack(start_values(model, data, packing.sites)).reshape(-1)
    joint = LogJoint(model, [packing])
    if compiled is None:
        compiled = (warmup + draws * thin) * leapfrogs >= COMPILE_FROM
    with preserved_rng(seed), torch.no_grad():
        u = middle + init_scale * torch.randn(chains, len(middle), dtype=middle.dtype, device=middle.device)
        target = _Counted(batched_target(joint, u, data, compiled))
        state, step, scale = _warm_up(target, u, warmup, leapfrogs, acceptance, metric, progress, warmup + draws * thin)
        kept, densities, accepted, rejected = [], [], torch.zeros_like(state.log_density), 0
        for i in range(draws * thin):
            state, taken = transition(target, state, step * _jitter(), _length(leapfrogs), scale)
            accepted += taken / (draws * thin)
            rejected += int((taken == 0).sum())
            if (i + 1) % thin == 0:
                kept.append(state.u)
                densities.append(state.log_density)
            if progress is not None:
                progress(warmup + i + 1, warmup + draws * thin)
    return Chains(
        model, packing, torch.stack(kept, 1), torch.stack(densities, 1), step, accepted, rejected, target.calls,
        time.perf_counter() - began,
    ).judged(*data)  # fmt: skip


def _warm_up(
    target: Target, u: Tensor, warmup: int, leapfrogs: int, aim: float, metric: Metric, progress: Any, total: int
) -> tuple[State, Tensor, Tensor | None]:
    """The state, step sizes and scale with which sampling begins."""
    state, scale = start(target, u), None
    rule = DualAveraging(first_step(target, state), aim)
    ends = windows(warmup) if metric == "diagonal" else []
    moments = _Moments(state.u)
    for i in range(warmup):
        most = max(1, round(leapfrogs * min(1.0, 2 * (i + 1) / warmup)))
        state, taken = transition(target, state, rule.step * _jitter(), _length(most), scale)
        rule.update(taken)
        if ends and i >= ends[0]:
            moments.add(state.u)
            if i + 1 in ends[1:]:
                scale, moments = moments.scale(), _Moments(state.u)
                rule = DualAveraging(first_step(target, state, scale), aim)
        if progress is not None:
            progress(i + 1, total)
    return state, rule.averaged, scale


def windows(warmup: int) -> list[int]:
    """Where the first window of the metric begins, and where each ends: they double, and a tenth is left behind them.

    >>> windows(300)
    [45, 60, 90, 150, 270]
    """
    first, last = round(0.15 * warmup), round(0.9 * warmup)
    ends, width = [first], max(1, round(0.05 * warmup))
    while ends[-1] < last:
        # the last one takes in what would be too short for one of its own
        ends.append(ends[-1] + width if ends[-1] + 3 * width <= last else last)
        width *= 2
    return ends


class _Moments:
    """Variances of each coordinate over transitions and chains: sums about the first states, in float64."""

    def __init__(self, u: Tensor) -> None:
        self.about, self.kind, self.count = u.double().mean(0), u.dtype, 0
        self.sum, self.squares = torch.zeros_like(self.about), torch.zeros_like(self.about)

    def add(self, u: Tensor) -> None:
        """Take in the states of all chains `(C, d)`."""
        delta = u.double() - self.about
        self.count += len(u)
        self.sum += delta.sum(0)
        self.squares += delta.square().sum(0)

    def scale(self) -> Tensor:
        """Standard deviations, drawn a little to 1e-3 (variance) where there were few states, as Stan does."""
        variance = (self.squares - self.sum.square() / self.count) / max(1, self.count - 1)
        share = self.count / (self.count + 5)
        return (share * variance.clamp(min=0.0) + (1 - share) * 1e-3).sqrt().to(self.kind)


class _Counted:
    def __init__(self, target: Target) -> None:
        self.target: Target = target
        self.calls = 0

    def __call__(self, u: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        return self.target(u)


def _jitter() -> float:
    return 0.8 + 0.4 * float(torch.rand(()))


def _length(leapfrogs: int) -> int:
    """L/2 to 3L/2: a fixed length may be a period of the target."""
    least = (leapfrogs + 1) // 2
    return least + int(torch.randint(2 * (leapfrogs - least) + 1, ()))


def global_packing(model: Program, data: tuple[Any, ...]) -> Packing:
    """All latents of a model as one vector.

    Raises:
        ModelError: a latent is local or discrete, there is none, or the model has trainable parameters.
    """
    trace_once(model, *data)  # makes the parameters of pyro.param
    home = with_home(model)[1]
    for name, parameter in home.named_parameters():
        if parameter.requires_grad:
            raise ModelError(
                f"{program_name(model)} has the trainable parameter {name!r}: chains draw from the posterior of one "
                "model, so train it first and freeze it (requires_grad_(False)), or give it a prior"
            )
    found = latents(model, *data, plates=(DATA_PLATE,))
    for site in found.local:
        raise ModelError(
            f"latent {site.name!r} is one for each row (plate {site.plate!r}): chains are over global latents alone; "
            "the NUTS guide draws both kinds"
        )
    if not found:
        raise ModelError(f"{program_name(model)} has no latent to draw")
    for site in found.values():
        require_continuous(site)
    return Packing(found.values())


def _check(**counts: tuple[Any, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} is {value!r}, expected a whole number of at least {least}")
