"""Hamiltonian transitions of many chains at once, and the adaptation of their step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ModelError, OptionError

__all__ = ["DualAveraging", "State", "Target", "adjusted", "first_step", "start", "transition"]

Target = Callable[[Tensor], tuple[Tensor, ...]]
"""u (*C, d) -> log density (*C,), its gradient (*C, d), and whatever else is known there, (*C,) or (*C, k): a pure
function, every leading dimension a chain."""


@dataclass
class State:
    """Where the chains are: u `(*C, d)`, the log density there `(*C,)` and its gradient `(*C, d)`.

    `more`: what else the target gives there, carried along.
    """

    u: Tensor
    log_density: Tensor
    gradient: Tensor
    more: tuple[Tensor, ...] = ()


def start(target: Target, u: Tensor) -> State:
    """The state at u `(*C, d)`."""
    log_density, gradient, *more = target(u)
    return State(u, log_density, gradient, tuple(more))


def transition(
    target: Target,
    state: State,
    step: float | Tensor,
    leapfrogs: int,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    uniform: Tensor | None = None,
) -> tuple[State, Tensor]:
    r"""One Hamiltonian Monte Carlo transition of every chain; it leaves the target invariant.

    .. math:: r \sim N(0, I), \quad r \leftarrow r + \tfrac{\epsilon}{2} s \nabla\log p(u), \quad
              u \leftarrow u + \epsilon s r, \quad r \leftarrow r + \tfrac{\epsilon}{2} s \nabla\log p(u)

    L times, and the end is taken with probability
    :math:`\min(1, \exp(\log p(u') - |r'|^2/2 - \log p(u) + |r|^2/2))`; else the chain stays. An end where the density
    or its gradient is not finite is never taken.

    Reference: Duane, Kennedy, Pendleton, Roweth, "Hybrid Monte Carlo", 1987; Neal, "MCMC using Hamiltonian dynamics",
    2011.

    Args:
        target: the log density and its gradient.
        state: where the chains are, with the target's own density and gradient.
        step: step size, a number, or `(*C,)`: one for each chain.
        leapfrogs: L, at least 1; as many calls of the target.
        scale: s, square roots of the inverse mass, `(d,)` or `(*C, d)`: about the target's standard deviations.
        noise: r, standard normal `(*C, d)`; drawn from torch's stream where None.
        uniform: decides acceptance, on [0, 1), `(*C,)`; drawn where None.

    Returns:
        the new state, and the probability of acceptance `(*C,)`.

    Raises:
        OptionError: leapfrogs < 1.

    >>> normal = lambda u: (-u.square().sum(-1) / 2, -u)
    >>> state, acceptance = transition(normal, start(normal, torch.zeros(5, 2)), 0.1, 10)
    >>> state.u.shape, bool((acceptance > 0.9).all())
    (torch.Size([5, 2]), True)
    """
    if leapfrogs < 1:
        raise OptionError(f"leapfrogs is {leapfrogs}, expected at least 1")
    momentum = torch.randn_like(state.u) if noise is None else noise
    uniform = torch.rand_like(state.log_density) if uniform is None else uniform
    width = torch.as_tensor(step, dtype=state.u.dtype, device=state.u.device).unsqueeze(-1)  # (*C, 1)
    width = width if scale is None else width * scale
    u, log_density, gradient, more = state.u, state.log_density, state.gradient, list(state.more)
    r = torch.addcmul(momentum, width, gradient, value=0.5)
    for i in range(leapfrogs):
        u = torch.addcmul(u, width, r)
        log_density, gradient, *more = target(u)
        r = torch.addcmul(r, width, gradient, value=1.0 if i < leapfrogs - 1 else 0.5)
    kinetic = (momentum.square() - r.square()).sum(-1) / 2
    ratio = log_density - state.log_density + kinetic  # NaN where the path left all bounds, and then compares False
    ratio = torch.where(log_density < math.inf, ratio, -math.inf)
    taken = uniform.log() < ratio
    here = taken.unsqueeze(-1)
    moved = State(
        torch.where(here, u, state.u),
        torch.where(taken, log_density, state.log_density),
        torch.where(here, gradient, state.gradient),
        tuple(
            torch.where(here if new.dim() > taken.dim() else taken, new, old)
            for new, old in zip(more, state.more, strict=True)
        ),
    )
    return moved, ratio.nan_to_num(nan=-math.inf).clamp(max=0.0).exp()


def adjusted(step: Tensor, acceptance: Tensor, target: float = 0.65, rate: float = 0.05) -> Tensor:
    """A step size after a transition, for each chain or group alone: step * exp(rate * (acceptance - target)).

    A constant rate follows a target that changes, as in annealing; for one that stays take `DualAveraging`.
    (Andrieu and Thoms, "A tutorial on adaptive MCMC", 2008.)

    Args:
        step, acceptance: shapes that broadcast, e.g. `(N,)`. target: acceptance aimed at. rate: in (0, 1].

    >>> bool(adjusted(torch.tensor(0.1), torch.tensor(1.0)) > 0.1)
    True
    """
    return step * (rate * (acceptance - target)).exp()


class DualAveraging:
    r"""Step sizes that bring the acceptance to its target while chains warm up.

    .. math:: \log\epsilon_{t+1} = \mu - \frac{\sqrt t}{\gamma} \frac{1}{t + t_0} \sum_{i \le t} (\delta - \alpha_i),
              \qquad \log\bar\epsilon_t = t^{-\kappa} \log\epsilon_t + (1 - t^{-\kappa}) \log\bar\epsilon_{t-1}

    with :math:`\mu = \log 10\epsilon_1`. Reference: Hoffman and Gelman, "The No-U-Turn Sampler", 2014, section 3.2.

    Args:
        step: the first step size, a number or a tensor of any shape, e.g. `(C,)`: each entry adapts alone.
        target: acceptance aimed at, in (0, 1). gamma, t0, kappa: of the rule.

    Attributes:
        step: what the next transition takes. averaged: what to keep when the warm-up ends.

    Raises:
        OptionError: target outside (0, 1), or a step size that is not positive.

    >>> rule = DualAveraging(torch.full((4,), 0.1))
    >>> rule.update(torch.ones(4)).shape, rule.averaged.shape
    (torch.Size([4]), torch.Size([4]))
    """

    def __init__(
        self, step: float | Tensor, target: float = 0.8, gamma: float = 0.05, t0: float = 10.0, kappa: float = 0.75
    ):
        check_target(target)
        self.step = torch.as_tensor(step)
        if not bool((self.step > 0).all()):
            raise OptionError("step sizes must be positive")
        self.target, self.gamma, self.t0, self.kappa = target, gamma, t0, kappa
        self._centre = (10 * self.step).log()
        self._error, self._averaged, self._count = torch.zeros_like(self.step), torch.zeros_like(self.step), 0

    def update(self, acceptance: Tensor) -> Tensor:
        """Take in the acceptance of a transition, shaped as the step sizes, and give the next step sizes."""
        self._count += 1
        t = self._count
        self._error = self._error + (self.target - acceptance - self._error) / (t + self.t0)
        log_step = self._centre - t**0.5 / self.gamma * self._error
        self._averaged = self._averaged + (log_step - self._averaged) * t**-self.kappa
        self.step = log_step.exp()
        return self.step

    @property
    def averaged(self) -> Tensor:
        """The average over iterations, in logarithms; the first step size before any."""
        return self._averaged.exp() if self._count else self.step


def first_step(target: Target, state: State, scale: Tensor | None = None, tries: int = 40) -> Tensor:
    """A step size for each chain at which one leapfrog step is accepted with probability near 1/2, `(*C,)`.

    Doubled or halved from d^-1/4 until the acceptance crosses 1/2 (Hoffman and Gelman, 2014, algorithm 4).

    Args:
        target, state, scale: as of `transition`. tries: doublings or halvings, at most.

    Raises:
        ModelError: the density or its gradient is not finite at a chain's state.

    >>> wide = lambda u: (-(u / 100).square().sum(-1) / 2, -u / 100**2)
    >>> bool((first_step(wide, start(wide, torch.ones(3, 1))) > 10).all())
    True
    """
    bad = ~(state.log_density.isfinite() & state.gradient.isfinite().all(-1))
    if bool(bad.any()):
        raise ModelError(
            f"the log density or its gradient is not finite at the start of {int(bad.sum())} of {bad.numel()} chains: "
            "start elsewhere, or look at the model's scales"
        )
    step = torch.full_like(state.log_density, state.u.shape[-1] ** -0.25)
    noise, uniform = torch.randn_like(state.u), torch.ones_like(state.log_density)
    grow = transition(target, state, step, 1, scale, noise, uniform)[1] > 0.5
    going = torch.ones_like(grow)
    for _ in range(tries):
        step = torch.where(going, torch.where(grow, step * 2, step / 2), step)
        going = going & ((transition(target, state, step, 1, scale, noise, uniform)[1] > 0.5) == grow)
        if not bool(going.any()):
            break
    return step


def check_target(target: float) -> None:
    """Raise for an acceptance that no step size can be adapted to."""
    if not 0.0 < target < 1.0:
        raise OptionError(f"target is {target!r}, expected an acceptance in (0, 1): 0.65 to 0.9 is usual")
