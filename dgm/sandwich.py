"""Bidirectional Monte Carlo: on data that the model itself has made, log p(x) between two bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .annealing import annealed_bound, reverse_annealed_bound
from .annealing_walk import Schedule
from .bounds import LogWeightSummary, paired_difference
from .errors import OptionError
from .estimate import Estimate
from .programs import Program, preserved_rng
from .simulate import simulate
from .sites import DATA_PLATE
from .weights import LogWeightSampler

__all__ = ["Sandwich", "sandwich"]


@dataclass(frozen=True, eq=False)
class Sandwich:
    """log p(x) of simulated data from both sides.

    Attributes:
        annealed: annealed importance sampling, from below. upper: its reverse, from above.
        importance: the guide's importance bound on the same data, from below; None for the prior.
    """

    annealed: Estimate
    upper: Estimate
    importance: Estimate | None = None

    @property
    def lower(self) -> Estimate:
        """The better of the lower bounds, that with the larger mean: one of them, never a mixture."""
        others = [e for e in (self.importance,) if e is not None]
        return max([self.annealed, *others], key=lambda e: e.mean)

    @property
    def better(self) -> str:
        """The name of the better lower bound."""
        return self.lower.method

    @property
    def gap(self) -> tuple[float, float]:
        """Mean of upper minus lower over the data, nats, and its standard error over data; NaN for one datum."""
        return paired_difference(self.upper.values, self.lower.values)

    def __repr__(self) -> str:
        gap, error = self.gap
        kept = [e for e in (self.annealed, self.importance, self.upper) if e is not None]
        return "\n".join(
            [*map(repr, kept), f"gap of {self.upper.method} and {self.better}: {gap:.4f} ± {error:.4f} nats"]
        )


def sandwich(
    model: Program,
    guide: Program | None,
    *template: Any,
    rows: int | None = None,
    chains: int = 16,
    steps: int = 1000,
    leapfrogs: int = 10,
    target: float = 0.65,
    schedule: Schedule = "adaptive",
    num_samples: int = 5000,
    seed: int = 0,
    strict: bool = True,
    plates: Iterable[str] = (DATA_PLATE,),
) -> Sandwich:
    r"""How far estimates of log p(x) can be off, on data drawn from the model, whose latents are exact posterior draws.

    .. math:: z \sim p(z), \; x \sim p(x | z): \qquad E\,\hat\ell_{\text{forward}} \le \log p(x) \le
              E\,\hat\ell_{\text{reverse}}

    The gap bounds the error of both, on such data; it tells of real data as far as these are like the model's.

    Reference: Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015;
    Wu, Burda, Salakhutdinov, Grosse, "On the quantitative analysis of decoder-based generative models", 2017.

    Args:
        model, guide: the trained pair; None for the prior as the start.
        template: a batch: its inputs are kept, what the model observes is drawn anew.
        rows: how many data; the rows of the template, repeated where they are fewer. Default: as many as it has.
        num_samples: draws of the guide's importance bound, at least 2.
        chains, steps, leapfrogs, target, schedule, seed, strict, plates: as of `dgm.annealing.annealed_bound`.

    Raises:
        OptionError: rows < 1, num_samples < 2. ModelError: the model cannot be simulated from. Others as of
            `annealed_bound`.

    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> found = sandwich(model, None, x, rows=5, chains=4, steps=20, leapfrogs=3)
    >>> found.lower.values.shape, found.upper.side, found.better
    (torch.Size([5]), 'upper', 'annealed importance sampling')
    """
    if num_samples < 2:
        raise OptionError(f"num_samples is {num_samples}, expected at least 2: one draw has no Monte Carlo error")
    plates = set(plates)
    batch, latents = simulate(model, *_rows(template, rows), seed=seed)
    options: dict[str, Any] = {
        "chains": chains, "steps": steps, "leapfrogs": leapfrogs, "target": target, "schedule": schedule,
        "strict": strict, "plates": plates,
    }  # fmt: skip
    lower = annealed_bound(model, guide, *batch, seed=seed + 1, **options)
    upper = reverse_annealed_bound(model, guide, *batch, exact=latents, seed=seed + 2, **options)
    other = None if guide is None else _importance(model, guide, batch, num_samples, seed + 3, plates)
    return Sandwich(lower, upper, other)


def _rows(template: tuple[Any, ...], rows: int | None) -> tuple[Any, ...]:
    if rows is None:
        return template
    if rows < 1:
        raise OptionError(f"rows is {rows}, expected at least 1")
    count = next((len(item) for item in template if isinstance(item, Tensor) and item.dim()), 1)
    taken = torch.arange(rows) % count
    return tuple(
        item[taken.to(item.device)] if isinstance(item, Tensor) and item.dim() and len(item) == count else item
        for item in template
    )


def _importance(
    model: Program, guide: Program, batch: tuple[Any, ...], num_samples: int, seed: int, plates: set[str]
) -> Estimate:
    """The importance bound, of each row where the latents are local, of all rows where one is global."""
    summary = LogWeightSummary()
    with preserved_rng(seed):
        sampler = LogWeightSampler(model, guide, *batch, plates=plates)
        for chunk in sampler.chunks(num_samples):
            summary.update(chunk.total.unsqueeze(-1) if sampler.has_global else chunk.local)
    return Estimate.of(summary, "importance bound")
