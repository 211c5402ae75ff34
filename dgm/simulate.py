"""Data and latents from a model's own prior and likelihood: cases where the truth is known, for any program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, Unit
from torch import Tensor

from .data import as_tensors
from .errors import ModelError, OptionError
from .noise import recording, replaying
from .programs import Program, bound, evaluating, isolated, preserved_rng, program_name, with_home
from .sites import read, trace_once

__all__ = ["Simulation", "simulate", "simulate_sets"]

Values = dict[str, Tensor]

VALUES_AT_ONCE = 4_000_000
"""Numbers that one vmapped pass makes at most: 16 MB in single precision for each tensor of the program."""


@dataclass(frozen=True, eq=False)
class Simulation:
    """R data sets from one model, each with the latents that made it.

    Attributes:
        data: by the number of the argument, `(R, *shape)`: what takes the place of the template's arguments.
        latents: by site name, `(R, *shape)`, on the sites' supports.
        template: the batch whose inputs and shapes all sets share.
        arguments: number of the argument that holds each observed site.
    """

    data: dict[int, Tensor]
    latents: Values
    template: tuple[Any, ...]
    arguments: dict[str, int]

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def batch(self, r: int) -> tuple[Any, ...]:
        """Data set r as the model takes it."""
        return tuple(self.data[i][r] if i in self.data else item for i, item in enumerate(self.template))

    def latent(self, r: int) -> Values:
        """The latents of data set r, by site."""
        return {name: value[r] for name, value in self.latents.items()}


def simulate(model: Program, *template: Any, seed: int = 0) -> tuple[tuple[Any, ...], Values]:
    r"""One data set from the model, with the latents that made it: an exact draw of their posterior.

    .. math:: z \sim p(z), \qquad x \sim p(x \mid z) \quad\Longrightarrow\quad z \sim p(z \mid x)

    Reference: Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015.

    Args:
        model: a Pyro program whose observed sites are arguments of its batch, whole or reshaped.
        template: a batch, rows first: its inputs stay as they are, its observed values are replaced.
        seed: of the draws; the random stream outside is left as it was.

    Returns:
        the batch, and the latents by site name, with the model's shapes and supports.

    Raises:
        ModelError: an observed site's value is no argument, or changes its own distribution; a flat prior; a factor.

    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> (new,), latents = simulate(model, x)
    >>> new.shape, latents["z"].shape
    (torch.Size([20, 5]), torch.Size([20, 2]))
    """
    sets = simulate_sets(model, *template, sets=1, seed=seed)
    return sets.batch(0), sets.latent(0)


def simulate_sets(model: Program, *template: Any, sets: int, seed: int = 0) -> Simulation:
    """R independent data sets, as `simulate` makes one; all at once where the program's noise is an input.

    Args:
        model, template, seed: as for `simulate`. sets: R, at least 1.

    Raises:
        OptionError: sets < 1. ModelError: as for `simulate`.

    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, (x, y) = example()
    >>> found = simulate_sets(model, x, y, sets=7)
    >>> found.data[1].shape, found.latents["w"].shape, found.batch(3)[0] is x
    (torch.Size([7, 20]), torch.Size([7, 3]), True)
    """
    if isinstance(sets, bool) or not isinstance(sets, int) or sets < 1:
        raise OptionError(f"sets is {sets!r}, expected a whole number of data sets, at least 1")
    template = as_template(template)
    arguments, latents = _read(model, template)
    home, run = with_home(model)[1], _runner(model)
    with preserved_rng(seed), evaluating(model, home), isolated(validate=False):
        values = _many(lambda: run(template), sets, [*latents, *arguments])
    data: dict[int, Tensor] = {}
    for name, place in arguments.items():
        like: Tensor = template[place]
        value = values.pop(name)
        if value[0].numel() != like.numel():
            raise ModelError(
                f"{program_name(model)} draws {tuple(value.shape[1:])} at {name!r}, where the template's argument "
                f"{place} has shape {tuple(like.shape)}: give the site the shape of its data"
            )
        data[place] = value.reshape(sets, *like.shape).to(like)
    found = Simulation(data, values, tuple(template), arguments)
    _check_free(model, found)
    return found


def as_template(template: Sequence[Any]) -> tuple[Any, ...]:
    """A batch with numpy and pandas as tensors; all else as it is."""
    return tuple(
        as_tensors(item)[0] if hasattr(item, "__array__") and not isinstance(item, Tensor) else item
        for item in template
    )


def _runner(model: Program) -> Callable[..., Any]:
    program, home = with_home(model)
    free = poutine.uncondition(bound(program, home))
    return lambda batch: poutine.trace(free).get_trace(*batch)


def _many(run: Callable[[], Any], sets: int, names: Sequence[str]) -> Values:
    """The values of some sites in R runs: a vmap over the noise, or one run after another."""

    def one() -> tuple[Tensor, ...]:
        nodes = run().nodes
        return tuple(nodes[name]["value"] for name in names)

    with preserved_rng(), recording() as draws:
        first = one()
    if draws.complete and draws:
        size = max(1, VALUES_AT_ONCE // max(1, sum(value.numel() for value in first)))
        parts = []
        try:
            for start in range(0, sets, size):

                def wide(*noise: Tensor) -> tuple[Tensor, ...]:
                    with replaying(noise):
                        return one()

                parts.append(torch.func.vmap(wide)(*draws.sample_many(min(size, sets - start))))
            return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(names)}
        except (RuntimeError, ValueError, TypeError):
            pass  # vmap refuses something in this program: it runs set by set
    runs = [one() for _ in range(sets)]
    return {name: torch.stack([values[i] for values in runs]) for i, name in enumerate(names)}


def _read(model: Program, template: Sequence[Any]) -> tuple[dict[str, int], list[str]]:
    """The argument that each observed site's value is, and the names of the latents."""
    trace = trace_once(model, *template)
    latents = read(trace)
    name_of = program_name(model)
    for name in latents:
        base: Any = trace.nodes[name]["fn"]
        while hasattr(base, "base_dist") and not isinstance(base, ImproperUniform):
            base = base.base_dist
        if isinstance(base, ImproperUniform):
            raise ModelError(
                f"latent {name!r} of {name_of} has a flat prior, which nothing can be drawn from: give it one"
            )
    if not latents.observed:
        raise ModelError(f"{name_of} observes nothing on this template: hand its data in, as for training")
    arguments: dict[str, int] = {}
    for name, node in latents.observed.items():
        value: Any = node["value"]
        base = node["fn"]
        while hasattr(base, "base_dist"):
            base = base.base_dist
        if isinstance(base, Unit):
            raise ModelError(
                f"{name!r} of {name_of} is a factor, which is no distribution: it cannot be simulated from"
            )
        place = next((i for i, item in enumerate(template) if item is value or _is_view(value, item)), None)
        if place is None:
            raise ModelError(
                f"the value that {name_of} observes at {name!r} is none of the {len(template)} arguments of the batch, "
                "and so it is not known where simulated data go: let the model take it as an argument, obs=y"
            )
        if place in arguments.values():
            raise ModelError(
                f"two sites of {name_of} observe argument {place}, {name!r} is the second: simulated values differ"
            )
        arguments[name] = place
    return arguments, list(latents)


def _is_view(value: Any, item: Any) -> bool:
    """Whether a value is a whole argument, reshaped."""
    return (
        isinstance(value, Tensor)
        and isinstance(item, Tensor)
        and value.numel() == item.numel() > 0
        and value.dtype == item.dtype
        and value.data_ptr() == item.data_ptr()
        and value.is_contiguous()
        and item.is_contiguous()
    )


def _check_free(model: Program, found: Simulation) -> None:
    """A model that computes with what it observes would have been run on the template's values: say so."""
    program, home = with_home(model)
    fixed = poutine.condition(bound(program, home), found.latent(0))
    known: Values = {**found.latent(0), **{name: found.data[place][0] for name, place in found.arguments.items()}}
    densities: list[Values] = []
    for batch in (found.batch(0), found.template):
        with isolated(validate=False), preserved_rng(0), evaluating(model, home):
            nodes: Any = poutine.trace(fixed).get_trace(*batch).nodes
            densities.append({n: nodes[n]["fn"].log_prob(v.reshape(nodes[n]["value"].shape)) for n, v in known.items()})
    for name, density in densities[0].items():
        other = densities[1][name]
        if density.shape != other.shape or not torch.allclose(density, other, rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ModelError(
                f"the distribution of {name!r} in {program_name(model)} changes with the observed values themselves: "
                "data cannot be simulated from it at one stroke; write the model so that its inputs and what it "
                "observes are different arguments"
            )
