"""The densities between a start and a posterior, for many chains of every datum at once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .errors import GuideError, ModelError
from .graph import Untraceable, one_line, trace
from .guide_density import GuideDensity
from .log_joint import LogJoint
from .packing import Packing
from .pair import Pair
from .programs import Program, evaluating, program_name
from .runs import split
from .sites import read, trace_once
from .weights import refuse_untrained

__all__ = ["Densities", "Path"]

Densities = Callable[[Tensor], tuple[Tensor, ...]]
"""u (C, N, d) -> log f_0 and log f_1 - log f_0, (C, N) each, and their gradients, (C, N, d) each."""


class Path:
    r"""The geometric path from a guide, or from the prior, to the posterior.

    .. math:: \log f_b(u) = \log q(u | x) + b\, (\log p(x, u) - \log q(u | x))

    Where all latents are local there is one path for each row; otherwise one for all rows and latents together.

    Args:
        model: the model. guide: any guide whose density is known at any value; None for the prior.
        batch: data, rows first. plates: names of the data plates.

    Raises:
        ModelError: no latents, or a discrete one; the message names it. GuideError: as of `GuideDensity`.
    """

    def __init__(self, model: Program, guide: Program | None, batch: Sequence[Any], plates: Iterable[str]):
        plates = set(plates)
        seen = trace_once(model, *batch)
        found = read(seen, plates)
        if not found:
            raise ModelError(f"{program_name(model)} has no latent: its log p(x) is the likelihood, nothing to anneal")
        homes = dict.fromkeys(site.plate for site in found.values())
        packings = [Packing([s for s in found.values() if s.plate == plate]) for plate in homes]
        self.joint, self.model, self.batch = LogJoint(model, packings, plates), model, tuple(batch)
        self.pair = Pair(model, guide if guide is not None else _nothing)
        self.q: GuideDensity | None = None
        if guide is not None:
            self.pair.check(batch, plates)
            refuse_untrained(self.pair, model, guide)
            with _or_prior():
                self.q = GuideDensity(self.pair.guide, *batch, packings=packings, plates=plates)
        self.data = packings[0].frame.size if self.joint.by_datum and packings[0].frame is not None else 1
        values = [node["value"] for node in seen.nodes.values() if node["type"] == "sample"]
        self.widest = max(v.numel() for v in values if isinstance(v, Tensor))
        self.dtype = torch.promote_types(packings[0].dtype, packings[-1].dtype)

    def draw(self, chains: int) -> Tensor:
        """u ~ f_0, `(C, N, d)`.

        Raises:
            ModelError: the prior cannot be drawn from.
        """
        with evaluating(self.pair.model, self.pair.guide), self.pair.running():
            return torch.stack([self._draw() for _ in range(chains)])

    def _draw(self) -> Tensor:
        try:
            run = self.pair.run_model if self.q is None else self.pair.run_guide
            nodes: Any = poutine.trace(run).get_trace(*self.batch).nodes
        except NotImplementedError as error:
            raise ModelError(
                f"the prior of {program_name(self.model)} cannot be drawn from ({one_line(error)}): give a guide to "
                "start from"
            ) from error
        return self.joint.pack({name: nodes[name]["value"] for name in self.joint.names})

    def densities(self, chains: int) -> Densities:
        """The two ends of the path and their gradients: one graph, where the programs have one."""
        places = [i for i, item in enumerate(self.batch) if isinstance(item, Tensor)]
        given = [self.batch[i] for i in places]

        def compute(*inputs: Any) -> tuple[Tensor, ...]:
            batch = list(self.batch)
            for place, item in zip(places, inputs[:-1], strict=True):
                batch[place] = item
            with self.pair.running():
                # which rows a declared plate says it draws is a draw, but no noise of the density
                return torch.func.vmap(lambda u: self._ends(u, batch), randomness="same")(inputs[-1])

        def one_by_one(*inputs: Any) -> tuple[Tensor, ...]:
            with self.pair.running():
                runs = [self._ends(u, list(self.batch)) for u in inputs[-1]]
            return tuple(torch.stack(parts) for parts in zip(*runs, strict=True))

        u = self.draw(chains)
        with evaluating(self.pair.model, self.pair.guide):
            return _fastest([compute, one_by_one], [*given, u])

    def _ends(self, u: Tensor, batch: Sequence[Any]) -> tuple[Tensor, ...]:
        q = self.q
        if q is None:
            base, base_slope = _with_slope(lambda v: self.joint.parts(v.reshape(-1), *batch)[0], u)
            return base, *_reorder(base_slope, *_with_slope(lambda v: self.joint.parts(v.reshape(-1), *batch)[1], u))
        base, base_slope = _with_slope(lambda v: self._of_datum(*q.terms(v.reshape(-1), *batch)), u)
        value, slope = _with_slope(lambda v: sum(self.joint.parts(v.reshape(-1), *batch)), u)
        return base, value - base, base_slope, slope - base_slope

    def _of_datum(self, rows: Tensor, rest: Tensor) -> Tensor:
        return rows if self.joint.by_datum else (rows.sum() + rest).reshape(1)


@contextlib.contextmanager
def _or_prior() -> Iterator[None]:
    """Say what else there is where a guide cannot be a start."""
    try:
        yield
    except GuideError as error:
        raise GuideError(f"{error}; start from the prior with guide=None, or from Amortized, Free or Global") from error


def _nothing(*_: Any) -> None:
    """The guide of nothing: the prior serves in its place."""


def _reorder(base_slope: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value, base_slope, slope


def _with_slope(function: Callable[[Tensor], Any], u: Tensor) -> tuple[Tensor, Tensor]:
    """Values `(N,)` that do not depend on each other's u `(N, d)`, and the gradient of each."""

    def total(v: Tensor) -> tuple[Tensor, Tensor]:
        values = function(v)
        return values.sum(), values

    slope, (_, values) = torch.func.grad_and_value(total, has_aux=True)(u)
    return values.detach(), slope.detach()


def _fastest(ways: Sequence[Callable[..., Any]], inputs: Sequence[Tensor]) -> Densities:
    """The first way that runs, as a script or a graph where that gives the same numbers at another u."""
    *given, u = inputs
    other = u + 0.01 * torch.cos(torch.arange(u.numel(), dtype=u.dtype, device=u.device)).reshape(u.shape)
    for i, way in enumerate(ways):
        try:
            expected = way(*given, other)
            break
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            if i == len(ways) - 1:
                raise
    if not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(way(*given, other), expected, strict=True)):
        raise ModelError(
            "the log density is another at each call (dropout, noise that stands in no site): fix it first"
        )
    if i > 0:
        return lambda v: way(*given, v)
    rounding = 1e-9 if u.dtype == torch.float64 else 1e-4

    def same(function: Callable[..., Any]) -> bool:
        pairs = zip(function(other), expected, strict=True)
        return all(torch.allclose(a, b, rtol=rounding, atol=rounding, equal_nan=True) for a, b in pairs)

    try:
        fixed, each = split(trace(torch.func.functionalize(way), [*given, u]), len(given))
        shared = list(fixed(*given))  # an encoder runs once
    except (Untraceable, RuntimeError):
        return lambda v: way(*given, v)
    graph = lambda v: each(*shared, v)  # noqa: E731
    if not same(graph):
        return lambda v: way(*given, v)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it traces, which was done and held against the program
            script = torch.jit.trace(each, (*shared, u), check_trace=False)
        quick = lambda v: script(*shared, v)  # noqa: E731
        return quick if same(quick) else graph
    except (RuntimeError, AttributeError, TypeError):
        return graph
