"""Where the truth of simulated data ranks among a guide's draws: one position for each set and coordinate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from .errors import GuideError
from .pair import Pair
from .programs import evaluating, program_name
from .row_terms import by_row, data_frame
from .runs import Graphs, Runs
from .simulate import Simulation
from .sites import Site

__all__ = ["QUANTITIES", "PosteriorRanks"]

QUANTITIES = ("log likelihood", "log joint")
"""Ranked beside the latents: they see the data, which a guide that is the prior does not (Modrák et al., 2023)."""

BYTES_AT_ONCE = 32 * 2**20
"""Of the largest tensor of one pass over many data sets."""


class PosteriorRanks:
    """Draws of one guide for all data sets, or of one guide for each, ranked against the truth.

    Args:
        pairs: one, or one for each set that is used. found: the simulated sets. used: the numbers of those.
        sites: the latents. plates: names of the data plates.
        per_row: whether every row of a set is a case by itself (local latents under a guide that is not refitted);
            else a set is one case, its local latents are those of its first row, for the ranks of rows that share a
            fit depend on one another.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        found: Simulation,
        used: Sequence[int],
        sites: Sequence[Site],
        plates: set[str],
        per_row: bool,
    ):
        self.pairs, self.found, self.used = list(pairs), found, list(used)
        self.sites, self.plates, self.per_row = list(sites), plates, per_row

    def pair(self, i: int) -> Pair:
        """That of the i-th used set."""
        return self.pairs[i] if len(self.pairs) > 1 else self.pairs[0]

    def names(self) -> list[tuple[str, str]]:
        """(site, coordinate) of each column."""
        out = []
        for site in self.sites:
            count = math.prod(site.shape)
            places = np.ndindex(*site.shape) if site.shape else [()]
            labels = [f"{site.name}[{','.join(map(str, at))}]" if site.shape else site.name for at in places]
            out += [(site.name, label) for label in labels[:count]]
        return out + [(name, name) for name in QUANTITIES]

    def columns(self, pair: Pair, values: dict[str, Tensor], batch: Sequence[Any]) -> Tensor:
        """`(cases, coordinates)`: the latents, log p(x | z) and log p(x, z)."""
        trace = poutine.trace(poutine.condition(pair.run_model, values)).get_trace(*batch)
        trace.compute_log_prob()
        parts = [self._of(site, values[site.name]) for site in self.sites]
        likelihood: Any = 0.0
        joint: Any = 0.0
        node: Any
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or ((frame := data_frame(node, self.plates)) is None and self.per_row):
                continue
            term = node["log_prob"].sum() if frame is None else by_row(node["log_prob"], node, frame)
            term = term if self.per_row else term.sum()
            joint = joint + term
            if name in self.found.arguments:
                likelihood = likelihood + term
        both = [torch.as_tensor(part).reshape(-1, 1) for part in (likelihood, joint)]
        dtype = torch.promote_types(both[0].dtype, torch.get_default_dtype())
        return torch.cat([part.to(dtype) for part in (*parts, *both)], -1)

    def _of(self, site: Site, value: Tensor) -> Tensor:
        if site.plate is None:
            return value.reshape(1, -1)
        rows = value.movedim(site.plate_frame.dim - site.event_dim, 0)
        rows = rows.reshape(len(rows), -1)
        return rows if self.per_row else rows[:1]

    def draw(self, pair: Pair, batch: Sequence[Any]) -> tuple[Tensor]:
        """One draw of the guide."""
        nodes = poutine.trace(pair.run_guide).get_trace(*batch).nodes
        values: dict[str, Any] = {site.name: nodes[site.name]["value"] for site in self.sites}
        return (self.columns(pair, values, batch),)

    def truth(self, i: int) -> Tensor:
        """The same of what made the data."""
        pair, r = self.pair(i), self.used[i]
        with evaluating(pair.model, pair.guide), pair.running():
            return self.columns(pair, self.found.latent(r), self.found.batch(r))

    def ranks(self, draws: int, generator: np.random.Generator) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each used set: its place, ranks `(cases, coordinates)` in 0..draws, and z-scores of the truth.

        Ties, as discrete latents have, are broken at random: the rank is then uniform too. A set whose draws are not
        all finite has ranks of -1.
        """
        for i, many in self._draws(draws):
            truth = self.truth(i).double()
            values = many.double()
            less, equal = (values < truth).sum(0).cpu().numpy(), (values == truth).sum(0).cpu().numpy()
            rank = less + generator.integers(0, equal + 1)
            broken = ~values.isfinite().all(0).all(-1).cpu().numpy()
            rank[broken] = -1
            spread = values.std(0)
            z = torch.where(spread > 0, (truth - values.mean(0)) / spread, math.nan)
            yield i, rank, z.cpu().numpy()

    def refuse_point(self) -> Runs:
        """The runs of the first set.

        Raises:
            GuideError: its draws are all the same.
        """
        first = self._runs(0, Graphs())
        if first.deterministic:
            raise GuideError(
                f"{program_name(self.pair(0).guide)} is a point: its draws are all the same, and nothing can rank "
                "among them; calibrate a guide with a spread"
            )
        return first

    def _draws(self, draws: int) -> Iterator[tuple[int, Tensor]]:
        """`(draws, cases, coordinates)` for each set."""
        first = self.refuse_point()
        done = 0
        if first.draws is not None and len(self.used) > 1 and first.pair.movable:
            for i, many in self._together(first, draws):
                yield i, many
                done = i + 1
        graphs = Graphs()
        for i in range(done, len(self.used)):
            runs = self._runs(i, graphs if len(self.pairs) == 1 else Graphs())
            yield i, torch.cat([part for (part,) in runs.passes(draws)])

    def _runs(self, i: int, graphs: Graphs) -> Runs:
        pair = self.pair(i)
        return Runs(pair, lambda batch: self.draw(pair, batch), self.found.batch(self.used[i]), graphs)

    def _together(self, first: Runs, draws: int) -> Iterator[tuple[int, Tensor]]:
        """All sets as one computation, a vmap over their data and their guides' parameters; ends where it cannot.

        It is held against the programs on the last set of each pass: a guide may keep what it found in something that
        is no parameter and no buffer.
        """
        shared = len(self.pairs) == 1
        size = max(1, BYTES_AT_ONCE // max(1, first.bytes * draws))
        for start in range(0, len(self.used), size):
            places = range(start, min(start + size, len(self.used)))
            runs = first if shared else self._runs(places[-1], Graphs())
            if first.draws is None or runs.draws != first.draws:
                return
            noise = [
                eps.reshape(len(places), draws, *eps.shape[1:]) for eps in first.draws.sample_many(len(places) * draws)
            ]
            try:
                many = self._pass(first, places, noise)
                last = self._runs(places[-1], Graphs())
                (alone,) = last.eager([eps[-1] for eps in noise])
            except (RuntimeError, ValueError, TypeError, KeyError):
                return
            if many[-1].shape != alone.shape or not torch.allclose(
                many[-1], alone, rtol=1e-3, atol=1e-3, equal_nan=True
            ):
                return
            yield from zip(places, many, strict=True)

    def _pass(self, first: Runs, places: range, noise: Sequence[Tensor]) -> Tensor:
        pair, shared = first.pair, len(self.pairs) == 1
        state = first.state()
        if not shared:
            states = [_state(self.pair(i)) for i in places]
            state = {name: torch.stack([one[name] for one in states]) for name in state}
        numbers = list(self.found.data)
        data = [self.found.data[n][[self.used[i] for i in places]] for n in numbers]

        def one_set(own: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            batch = list(self.found.template)
            for n, value in zip(numbers, inputs, strict=False):
                batch[n] = value
            one = lambda *eps: pair.call(lambda: self.draw(pair, batch), own, eps)[0]  # noqa: E731
            return torch.func.vmap(one)(*inputs[len(numbers) :])

        with evaluating(pair.model, pair.guide), pair.running():
            return torch.func.vmap(one_set, in_dims=(None if shared else 0, *([0] * (len(data) + len(noise)))))(
                state, *data, *noise
            )


def _state(pair: Pair) -> dict[str, Tensor]:
    parts = (pair.owners.named_parameters(), pair.owners.named_buffers())
    return {name: tensor.detach() for part in parts for name, tensor in part}
