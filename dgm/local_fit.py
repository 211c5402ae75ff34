"""Local optimisation: the best member of a family for each datum, all rows in one stack, with a rule of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bounds import mean_and_standard_error
from .errors import TrainingError
from .objectives import ELBO
from .pace import Compile
from .pair import Pair
from .programs import Program, preserved_rng
from .svi import SVI
from .weights import LogWeightSampler

__all__ = ["LocalFit", "Rule", "compared", "frozen", "log_weights_of", "optimise"]

LEVELS = 4
"""Step sizes that are tried at least, each a third of the last one."""

EVERY = 5
"""Steps between two iterates that are averaged."""

GROWTH = 1.5
"""How much longer a round is at the next smaller step size."""

NEGLIGIBLE = 0.5
"""A gain of less than this share of the tolerance counts as none, however significant it is."""


@dataclass(frozen=True)
class Rule:
    """When the local optimisation stops.

    Adam goes on in rounds of steps; after each the ELBO of every row, at the mean of the later iterates, is evaluated
    with common random numbers. A row keeps its best parameters until others are better by more than one standard error
    of the paired difference: otherwise luck would choose among equals, and a row at its optimum would leave it. A round
    is idle where what was kept is less than `tolerance` a row, and the mean gain over all rows, losers included, is
    below two of its standard errors (or below half of `tolerance`). Rows that lost go back to their best parameters;
    after an idle round the others go on from their mean, the step size falls to a third, and rounds become half as long
    again. Two idle rounds in a row, at the fourth step size or a later one, are the end.

    Attributes:
        tolerance: nats. max_steps: at most so many. round_steps: steps of the first rounds. lr: the first step size.
        particles: draws of a step. samples: draws of an evaluation.
    """

    tolerance: float = 0.005
    max_steps: int = 5000
    round_steps: int = 100
    lr: float = 0.05
    particles: int = 4
    samples: int = 200


@dataclass
class LocalFit:
    """What was found for each row.

    Attributes:
        parameters: by name, `(B, ...)`, the best of all rounds, the start among them.
        gain: `(B,)`, of the last round over the best before it.
        steps, converged; failures: rounds that met a loss that is not finite.
        trail: mean ELBO of the best so far, by the draws that chose them, and the step size, after each round.
    """

    parameters: dict[str, Tensor]
    gain: Tensor
    steps: int = 0
    converged: bool = False
    failures: int = 0
    trail: list[tuple[float, float]] = field(default_factory=list)


@contextlib.contextmanager
def frozen(*pairs: Pair) -> Iterator[None]:
    """Evaluation mode and no trainable parameter, put back as they were."""
    modules = [part for pair in pairs for part in pair.owners.modules()]
    parameters = [p for pair in pairs for p in [*pair.owners.parameters(), *pair.closed_over().values()]]
    modes, needed = [part.training for part in modules], [p.requires_grad for p in parameters]
    try:
        for part in modules:
            part.training = False
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for part, mode in zip(modules, modes, strict=True):
            part.training = mode
        for p, need in zip(parameters, needed, strict=True):
            p.requires_grad_(need)


def optimise(
    model: Program,
    free: nn.Module,
    batch: Sequence[Any],
    rule: Rule,
    *,
    unit: float = 1.0,
    seed: int = 0,
    plates: Iterable[str],
    compile: Compile = "trace",
) -> LocalFit:
    """Maximise the ELBO of each row over its own parameters; the model is frozen by the caller (`frozen`).

    Args:
        free: a guide with one set of parameters for each row, at its start. batch: its rows, all of them.
        unit: the latents' own scale: step sizes of parameters that are locations are in it.
        seed: of the draws; those of the steps and those of the evaluations are others.
    """
    parameters: dict[str, Tensor] = dict(free.named_parameters())
    units = [_unit(name, p, unit) for name, p in parameters.items()]
    optimiser = torch.optim.Adam(
        [{"params": [p], "lr": rule.lr * u} for p, u in zip(parameters.values(), units, strict=True)],
        betas=(0.9, 0.99),
        fused=True,
    )
    draws: Any = "antithetic" if rule.particles % 2 == 0 else "independent"
    loss = ELBO(particles=rule.particles, draws=draws, estimator="stl" if _closed_form(free) else "pathwise")
    svi = SVI(model, free, optimiser, loss, compile=compile)
    sampler = LogWeightSampler(model, free, *batch, plates=plates)
    chunk = sampler.runs.chunk(rule.samples)
    best = {name: p.detach().clone() for name, p in parameters.items()}
    best_weights = log_weights_of(sampler, rule.samples, chunk, seed + 1)
    found = LocalFit(best, torch.zeros_like(best_weights[0]), trail=[(float(best_weights.mean()), math.nan)])
    level, idle, average = 0, 0, _Average()
    with preserved_rng(seed):
        while found.steps < rule.max_steps and not found.converged:
            try:
                steps = round(rule.round_steps * GROWTH**level)
                for step in range(min(steps, rule.max_steps - found.steps)):
                    svi.step(*batch)
                    found.steps += 1
                    if step >= steps // 2 and step % EVERY == 0:
                        average.add(parameters)
            except TrainingError:
                found.failures += 1
                if found.failures > LEVELS:
                    raise
            last = average.swap(parameters)
            now = log_weights_of(sampler, rule.samples, chunk, seed + 1)
            found.gain, error = compared(now, best_weights)
            better, worse = found.gain > error, ~(found.gain >= -error)  # NaN is worse
            best_weights = torch.where(better, now, best_weights)
            _copy(best, parameters, better)
            found.trail.append((float(best_weights.mean()), rule.lr / 3**level))
            if _moves(found.gain, better, rule.tolerance):
                idle = 0
                _copy(parameters, last, ~worse)  # goes on from where it was
                _copy(parameters, best, worse)
                continue
            idle, level = idle + 1, level + 1
            found.converged = idle >= 2 and level >= LEVELS
            _copy(parameters, best, worse)
            for group, u in zip(optimiser.param_groups, units, strict=True):
                group["lr"] = rule.lr * u / 3**level
    return found


def _unit(name: str, stacked: Tensor, unit: float) -> float:
    """What a step of size 1 is for a parameter: locations have the latents' scale, and a matrix adds up its columns.

    All entries of a row of a matrix that Adam moves together move its output by their number (Yang and Hu, "Feature
    learning in infinite-width neural networks", 2021).
    """
    if name.split(".")[-1].split("|")[0] == "loc":
        return unit
    return 1 / stacked.shape[-1] if stacked.dim() > 2 else 1.0


class _Average:
    """Mean of a round's later iterates: nearer to the optimum than the last of them, by what their noise is.

    Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, parameters: dict[str, Tensor]) -> None:
        self.count += 1
        for name, p in parameters.items():
            if self.count == 1:
                self.sums[name] = p.detach().clone()
            else:
                self.sums[name] += p

    @torch.no_grad()
    def swap(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the mean in the place of the last iterate, which is given back, and begin anew."""
        last = {name: p.detach().clone() for name, p in parameters.items()}
        if self.count:
            for name, p in parameters.items():
                p.copy_(self.sums[name] / self.count)
        self.count = 0
        return last


def log_weights_of(sampler: LogWeightSampler, samples: int, chunk: int, seed: int) -> Tensor:
    """`(samples, B)`, float64; the same seed and chunk give the same noise to every guide of a family."""
    with preserved_rng(seed):
        return torch.cat([part.local for part in sampler.chunks(samples, chunk)]).double()


def compared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a - b over common draws and its standard error, `(B,)`, from log weights `(S, B)`."""
    difference = a - b
    return difference.mean(0), difference.std(0) / len(difference) ** 0.5


def _closed_form(free: Any) -> bool:
    """Whether the members' density is cheap at any value: then the gradient without the score of log q has less noise.

    The density of a flow at a draw that is not its own needs the inverse of the flow; it has no mean in closed form.
    """
    try:
        with torch.no_grad():
            return bool(torch.as_tensor(free.member().mean).isfinite().all())
    except (NotImplementedError, AttributeError):
        return False


def _moves(gain: Tensor, better: Tensor, tolerance: float) -> bool:
    """Whether a round gained something: enough where it gained, or little and surely over all rows."""
    kept = float(torch.where(better, gain, 0.0).mean())
    mean, se = mean_and_standard_error(gain)
    return kept >= tolerance or (mean > NEGLIGIBLE * tolerance and not mean <= 2 * se)


@torch.no_grad()
def _copy(into: dict[str, Tensor], values: dict[str, Tensor], rows: Tensor) -> None:
    for name, value in values.items():
        into[name][rows] = value.detach()[rows]
