"""Several runs of model and guide at once, for objectives of several samples: a vmap over the noise of the guide.

The encoder does not depend on the noise and runs once for all particles; any program that vmap takes has particles,
whether or not it broadcasts, and the noise stays an input of the step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_map

from .errors import GuideError, OptionError
from .noise import Draw, NoiseExhausted, Recorded, recording, replaying
from .programs import preserved_rng

Draws = Literal["independent", "antithetic", "sobol", "stratified"]
DRAWS: tuple[Draws, ...] = ("independent", "antithetic", "sobol", "stratified")


@dataclass
class Programs:
    """A model and a guide on one batch, as an objective sees them.

    Attributes:
        model, guide: to be called on the batch, unscaled.
        home: a module that holds the parameters of both; None where they live in Pyro's store alone.
        batch: data. plates: full size of each data plate, None for the rows present.
        kl_weight: weight of the latents' terms, a number or a 0-d tensor.
        draws: the noise of one run; None where it depends on parameters, or the model draws too.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    home: nn.Module | None
    batch: Sequence[Any]
    plates: Mapping[str, Any]
    kl_weight: Any = 1.0
    draws: Recorded | None = None

    def record(self) -> Recorded | None:
        """The draws of one run of the guide, if they are all parameter-free and the model adds none of its own."""
        with preserved_rng(0), torch.no_grad():
            with recording() as draws:
                guide = self.trace_guide()
            with recording() as others:
                self.trace_model(guide)
        return draws if draws.complete and others.complete and not others else None

    def trace_guide(self) -> poutine.Trace:
        return poutine.trace(self.guide).get_trace(*self.batch)

    def trace_model(self, guide: poutine.Trace) -> poutine.Trace:
        """The model's trace at the guide's values."""
        return poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(*self.batch)

    def guide_at(self, values: Mapping[str, Tensor], detach: bool) -> poutine.Trace:
        """The guide's trace at given values of its stochastic sites; `detach` takes all parameters as constants.

        Raises:
            GuideError: the guide draws noise outside of its sites, which this second run would not share.
        """
        run = poutine.trace(_at(self.guide, values))
        with contextlib.ExitStack() as stack:
            inside = stack.enter_context(detached(self.home)) if detach else _plain
            try:
                with replaying([]):
                    return inside(lambda: run.get_trace(*self.batch))
            except NoiseExhausted as error:
                raise GuideError(
                    f"the guide draws noise outside of its sites ({error}), so its density cannot be evaluated apart "
                    'from its draw: use estimator="pathwise"'
                ) from error

    def noise(self, count: int, draws: Draws = "independent") -> list[Tensor] | None:
        """Noise of `count` particles, each tensor `(count, ...)`; None where particles run one by one."""
        return None if self.draws is None else [particle_noise(draw, count, draws) for draw in self.draws]

    def each(self, count: int, one: Callable[..., Any], noise: Sequence[Tensor] | None, *stacked: Any) -> Any:
        """What `one(*stacked)` gives for each particle, tensors with `(count,)` in front.

        Args:
            one: a run of the programs; its random draws are those of the noise.
            noise: of `noise`; None to run the particles one by one with draws of their own.
            stacked: trees of tensors with `(count,)` in front, one slice for each particle.
        """
        if noise is None:
            parts = [one(*(tree_map(lambda t, k=k: t[k], s) for s in stacked)) for k in range(count)]
            return tree_map(lambda *ts: torch.stack(ts), *parts)

        def run(eps: Sequence[Tensor], *given: Any) -> Any:
            with replaying(eps):
                return one(*given)

        if count == 1:  # without vmap: the values of the log densities are then those of a plain run, bit for bit
            only = run([e[0] for e in noise], *(tree_map(lambda t: t[0], s) for s in stacked))
            return tree_map(lambda t: t.unsqueeze(0), only)
        if not noise and not stacked:  # nothing to map over: the particles are one and the same
            return tree_map(lambda t: t.expand(count, *t.shape), run([]))
        return over_particles(run)(list(noise), *stacked)


def over_particles(run: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap without validation, which would branch on values; the recording run has validated."""

    def call(*args: Any) -> Any:
        with pyro.validation_enabled(False):
            return torch.func.vmap(run)(*args)

    return call


def _plain(run: Callable[[], Any]) -> Any:
    return run()


def _at(program: Callable[..., Any], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Values(values):
            return program(*args, **kwargs)

    return run


class _Values(Messenger):
    """Gives the stochastic sites of a guide their values."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _Detach(Messenger):
    """`pyro.param`s as constants."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


class _Holder(nn.Module):
    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


@contextlib.contextmanager
def detached(home: nn.Module | None) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Call functions with the parameters of a module as constants."""
    with _Detach():
        if home is None:
            yield _plain
            return
        holder = _Holder()
        holder.add_module("home", home)
        constants = {name: p.detach() for name, p in holder.named_parameters()}
        yield lambda run: torch.func.functional_call(holder, constants, (run,))


# --- noise -----------------------------------------------------------------------------------------------------------


def particle_noise(draw: Draw, count: int, draws: Draws = "independent") -> Tensor:
    """Noise `(count, *shape)` of one draw: each particle's is distributed as the draw, whatever they have in common.

    "independent": as the name says. "antithetic": the second half mirrors the first, eps and -eps. "sobol": for each
    row the particles are a Sobol sequence in the last dimension, shifted at random (Cranley and Patterson,
    "Randomization of number theoretic methods for multiple integration", 1976). "stratified": each number takes each of
    `count` strata of equal probability once, in a random order (McKay, Beckman and Conover, "A comparison of three
    methods for selecting values of input variables", 1979).

    Raises:
        OptionError: another name.

    >>> eps = particle_noise(Draw("normal", Size((3,)), torch.float32, torch.device("cpu")), 4, "antithetic")
    >>> torch.equal(eps[2:], -eps[:2])
    True
    """
    if draws not in DRAWS:
        raise OptionError(f"draws is {draws!r}, expected one of {', '.join(map(repr, DRAWS))}")

    def fresh(kind: str, lead: int) -> Tensor:
        return Draw(kind, Size((lead, *draw.shape)), draw.dtype, draw.device).sample()

    if draws == "independent" or count == 1:
        return fresh(draw.kind, count)
    if draws == "antithetic":
        half = fresh(draw.kind, (count + 1) // 2)
        return torch.cat([half, _mirrored(draw.kind, half)])[:count]
    if draws == "stratified":
        order = fresh("uniform", count).argsort(0).to(draw.dtype)
        return _from_uniform(draw.kind, (order + fresh("uniform", count)) / count)
    shift = fresh("uniform", 1)
    points = sobol(count, draw.shape[-1] if draw.shape else 1).to(draw.dtype).to(draw.device)
    points = points.reshape(count, *[1] * (len(draw.shape) - 1), -1) if draw.shape else points.reshape(count)
    return _from_uniform(draw.kind, (points + shift).frac())


@functools.lru_cache(maxsize=32)  # the generator is no tensor operation: made before a step is traced, then a constant
def sobol(count: int, dimension: int) -> Tensor:
    """The first points of the Sobol sequence, `(count, dimension)` in [0, 1); beyond 21201 dimensions they repeat."""
    engine = torch.quasirandom.SobolEngine(min(dimension, torch.quasirandom.SobolEngine.MAXDIM))
    points = engine.draw(count, dtype=torch.float64)
    return points.repeat(1, math.ceil(dimension / points.shape[1]))[:, :dimension]


def _mirrored(kind: str, eps: Tensor) -> Tensor:
    match kind:
        case "normal":
            return -eps
        case "uniform":
            return 1 - eps
        case _:
            return -torch.log1p(-torch.exp(-eps))


def _from_uniform(kind: str, u: Tensor) -> Tensor:
    tiny = torch.finfo(u.dtype).eps
    match kind:
        case "normal":
            return torch.special.ndtri(u.clamp(tiny, 1 - tiny))
        case "uniform":
            return u
        case _:
            return -torch.log1p(-u.clamp(max=1 - tiny))


__all__ = ["DRAWS", "Draws", "Programs", "detached", "over_particles", "particle_noise"]
