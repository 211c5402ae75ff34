"""The bound of rows that training did not see, for each row, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bounds import LogWeightSummary
from .pace import steady
from .programs import Program, preserved_rng
from .runs import Graphs
from .sites import DATA_PLATE
from .weights import LogWeightSampler

ROWS = 1000
"""Rows in one chunk: with K samples of each, the log weights of a chunk fit anywhere."""


def row_chunks(batch: Sequence[Any], rows: int = ROWS) -> Iterator[tuple[Any, ...]]:
    """A batch in chunks of rows; whatever is no tensor, or has no rows, goes along unchanged."""
    count = next((len(item) for item in batch if isinstance(item, Tensor) and item.dim()), 1)
    for start in range(0, count, rows):
        yield tuple(
            item[start : start + rows] if isinstance(item, Tensor) and item.dim() and len(item) == count else item
            for item in batch
        )


def spaced(batch: Sequence[Any], most: int) -> tuple[tuple[Any, ...], Tensor]:
    """At most so many rows of a batch, evenly spaced, and their numbers."""
    count = len(batch[0])
    rows = torch.linspace(0, count - 1, min(most, count)).round().long().unique()
    return tuple(item[rows] if isinstance(item, Tensor) and len(item) == count else item for item in batch), rows


class HeldOut:
    """Log p of rows that were not trained on, bounded from below for each row.

    Local latents: ELBO or importance bound of log p(x_n). Global latents w (the weights of a network), alone or
    beside local ones: the posterior is the prior of new data, and what is bounded is the log predictive density
    log E_q(w)[p(x_n | w)] by a log-mean-exp over draws of w.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: Sequence[Tensor],
        *,
        sizes: Mapping[str, int] | None = None,
        samples: int = 8,
    ):
        self.model, self.guide, self.batch, self.samples = model, guide, tuple(batch), samples
        self.plates: Iterable[str] = {DATA_PLATE, *(sizes or {})}
        self._samplers: list[LogWeightSampler] = []
        self._begun = False

    def samplers(self) -> list[LogWeightSampler]:
        if not self._samplers:  # made late: a lazy guide must have seen the training data first
            graphs = Graphs()  # kept over the validations of a training, and shared by chunks of equal shape
            self._samplers = [
                LogWeightSampler(self.model, self.guide, *chunk, plates=self.plates, graphs=graphs)
                for chunk in row_chunks(self.batch)
            ]
            for sampler in self._samplers:
                sampler.require_rows()
        return self._samplers

    def bound(self, seed: int, samples: int | None = None, *, importance: bool = False) -> Tensor:
        """`(N,)`: the ELBO (local latents) or log predictive density (global ones) of each row, in nats.

        `importance`: the tighter importance bound for local latents as well. The same seed gives the same noise, so
        that successive checks of one training differ by its progress alone.
        """
        parts = []
        if steady() and not self._begun:  # the first pass makes the graphs, which differ from it by rounding
            self._begun = True
            self.bound(seed, samples, importance=importance)
        with preserved_rng(seed):
            for sampler in self.samplers():
                summary = LogWeightSummary()
                for chunk in sampler.chunks(samples or self.samples):
                    summary.update(chunk.local)
                parts.append(summary.importance_bound if importance or sampler.has_global else summary.elbo)
        return torch.cat(parts)
