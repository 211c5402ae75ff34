"""The way of many chains along a path of densities: a pilot that finds its pace, and the walk that is weighed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import hmc
from .annealing_path import Densities
from .errors import OptionError

__all__ = ["Pilot", "Schedule", "anneal", "checked_schedule", "pilot"]

Schedule = Literal["adaptive", "sigmoid", "linear"] | Tensor
"""b_0 = 0, ..., b_T = 1: by name, or the numbers themselves."""

PACE = 0.25
"""Standard deviation of what one step of a pilot adds to log w: the length of the path is measured with it."""

WARM_UP = 20
"""Transitions of a pilot at its first temperature, by which its step sizes find their order of magnitude."""


class _Chains:
    """Chains of every datum at one inverse temperature b, `(C, N, d)`."""

    def __init__(self, densities: Densities, u: Tensor, b: float, leapfrogs: int, scale: Tensor):
        self.densities, self.b, self.leapfrogs, self.scale = densities, b, leapfrogs, scale
        self.state = hmc.start(self.density, u)

    def density(self, u: Tensor) -> tuple[Tensor, ...]:
        base, rest, base_slope, slope = self.densities(u)
        return base + self.b * rest, base_slope + self.b * slope, base, rest, base_slope, slope

    @property
    def difference(self) -> Tensor:
        """log f_1 - log f_0 where the chains are, `(C, N)`."""
        return self.state.more[1]

    def cool(self, b: float) -> None:
        """Another b: the ends of the path are known here already."""
        self.b = b
        base, rest, base_slope, slope = self.state.more
        self.state = hmc.State(self.state.u, base + b * rest, base_slope + b * slope, self.state.more)

    def move(self, step: Tensor) -> Tensor:
        """One transition, with a step size for each datum `(N,)`; the acceptance of each, `(N,)`.

        Each chain takes 0.5 to 1.5 of it, by chance: paths of one length can return to the energy that they left (Neal,
        2011, section 3.2). On a linear VAE of three latents, 5 leapfrogs and 400 steps, the variance of log w falls
        from 1.3 to 0.47.
        """
        each = step * (0.5 + torch.rand_like(self.state.log_density))
        self.state, acceptance = hmc.transition(self.density, self.state, each, self.leapfrogs, self.scale)
        return acceptance.mean(0)


@dataclass(frozen=True)
class Pilot:
    """What a pilot found: at each of its inverse temperatures, `(P,)`, how far it is from the start, `(P,)`, in
    standard deviations of log w, and the step size and acceptance of each datum, `(P, N)`."""

    betas: Tensor
    length: Tensor
    steps: Tensor
    acceptance: Tensor

    def schedule(self, steps: int) -> Tensor:
        """T + 1 inverse temperatures at equal distances along the path."""
        b = _interpolated(self.betas.unsqueeze(-1), self.length, torch.linspace(0, 1, steps + 1) * self.length[-1])
        b = b.squeeze(-1)
        b[0], b[-1] = 0.0, 1.0
        return b

    def steps_at(self, betas: Tensor) -> Tensor:
        """Step sizes `(len(betas), N)` at other inverse temperatures."""
        return _interpolated(self.steps.log(), self.betas, betas).exp()


def pilot(
    densities: Densities, u: Tensor, leapfrogs: int, scale: Tensor, target: float = 0.65, most: int = 200
) -> Pilot:
    r"""Walk once to learn how fast to go and how far to step; its weights are no importance weights.

    .. math:: b_{t+1} - b_t = c \,/\, \mathrm{sd}_{b_t}(\log f_1 - \log f_0)

    with the variance averaged over data: steps of equal length (Gelman and Meng, "Simulating normalizing constants:
    from importance sampling to bridge sampling to path sampling", 1998). Step sizes follow the acceptance.

    Args:
        densities: the ends of the path. u: draws of f_0, `(C, N, d)`. scale: `(N, d)`, what a step size of 1 is.
        target: acceptance aimed at. most: about so many transitions; c is `PACE` and grows beyond half of them.
    """
    chains = _Chains(densities, u, 0.0, leapfrogs, scale)
    step = torch.full_like(u[0, :, 0], 0.5)
    betas, lengths, steps, acceptances, length, pace = [0.0], [0.0], [step], [torch.ones_like(step)], 0.0, PACE
    while chains.b < 1.0:
        speed = _speed(chains.difference)
        gain = min(pace / max(speed, 1e-12), 1.0 - chains.b) if len(betas) < 2 * most else 1.0 - chains.b
        length += gain * speed
        first, start = chains.b == 0.0, chains.state.u
        chains.cool(min(chains.b + gain, 1.0))
        if first:
            for _ in range(WARM_UP):
                step = hmc.adjusted(step, chains.move(step), target, 0.5)
            chains = _Chains(densities, start, chains.b, leapfrogs, scale)
            steps[0] = step
        acceptance = chains.move(step)
        betas.append(chains.b)
        lengths.append(length)
        step = hmc.adjusted(step, acceptance, target, 0.3)
        steps.append(step)
        acceptances.append(acceptance)
        pace *= 1.0 if len(betas) < most // 2 else 1.03
    tables = torch.stack(steps), torch.stack(acceptances)
    return Pilot(torch.tensor(betas).double(), torch.tensor(lengths).double(), *tables)


def _speed(difference: Tensor) -> float:
    """Root mean square, over data, of the standard deviation over chains of log f_1 - log f_0."""
    variance = difference.double().var(0)
    variance = variance[variance.isfinite()]
    return math.sqrt(float(variance.mean())) if len(variance) else 0.0


def _interpolated(table: Tensor, at: Tensor, places: Tensor) -> Tensor:
    """Rows of a table `(P, N)`, known at increasing places `(P,)`, at other places."""
    places = places.to(at)
    high = torch.searchsorted(at.contiguous(), places.contiguous()).clamp(1, len(at) - 1)
    low = high - 1
    share = ((places - at[low]) / (at[high] - at[low]).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(table[low], table[high], share.unsqueeze(-1).to(table.dtype))


def checked_schedule(schedule: Schedule, steps: int) -> Tensor | None:
    r"""b_0 = 0, ..., b_T = 1, `(T + 1,)`; None where a pilot is to choose them.

    "sigmoid": :math:`b_t \propto \sigma(8 t/T - 4) - \sigma(-4)`, dense at both ends (Grosse, Ghahramani, Adams, 2015);
    "linear": t / T; a tensor is taken as it is.

    Raises:
        OptionError: another name, or numbers that are not T + 1 and do not rise from 0 to 1.

    >>> checked_schedule("linear", 4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if isinstance(schedule, Tensor):
        b = schedule.detach().double().cpu()
        if b.shape != (steps + 1,) or b[0] != 0 or b[-1] != 1 or bool((b.diff() < 0).any()):
            raise OptionError(
                f"schedule: expected steps + 1 = {steps + 1} numbers that rise from 0 to 1, got shape {tuple(b.shape)}"
            )
        return b
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if schedule == "linear":
        return t
    if schedule == "sigmoid":
        raw = torch.sigmoid(8 * t - 4)
        b = (raw - raw[0]) / (raw[-1] - raw[0])
        b[-1] = 1.0
        return b
    if schedule != "adaptive":
        raise OptionError(f"schedule is {schedule!r}, expected 'adaptive', 'sigmoid', 'linear' or a tensor of numbers")
    return None


def anneal(
    densities: Densities,
    u: Tensor,
    betas: Tensor,
    steps: Tensor,
    leapfrogs: int,
    scale: Tensor,
    mixing: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Move chains along the path and collect :math:`\sum_t (b_t - b_{t-1}) (\log f_1 - \log f_0)(u_{t-1})`.

    Betas that rise give log w of annealed importance sampling (Neal, "Annealed importance sampling", 2001); betas that
    fall from 1, with u drawn from f_1, give -log w of its reverse.

    Args:
        densities: the ends of the path. u: draws of f at betas[0], `(C, N, d)`. betas: `(T + 1,)`.
        steps: `(T + 1, N)`, step sizes at the betas: of nothing that these chains did.
        scale: `(N, d)`, what a step size of 1 is in each coordinate.
        mixing: transitions at betas[0] before the first weight.

    Returns:
        log weights `(C, N)`, in double precision, and the mean acceptance of each datum, `(N,)`, NaN where T = 1.
    """
    b = betas.tolist()
    chains = _Chains(densities, u, b[0], leapfrogs, scale)
    for _ in range(mixing):
        chains.move(steps[0])
    log_weights = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
    accepted = torch.zeros(u.shape[1], dtype=torch.float64, device=u.device)
    for i in range(1, len(b)):
        log_weights += (b[i] - b[i - 1]) * chains.difference.double()
        if i < len(b) - 1:  # the last transition would change no weight
            chains.cool(b[i])
            accepted += chains.move(steps[i])
    return log_weights, accepted / (len(b) - 2) if len(b) > 2 else torch.full_like(accepted, math.nan)
