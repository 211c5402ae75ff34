"""Reading a program: its latents, their shapes, supports and plates, found by running it once.

A site is *local* when it stands inside a data plate (`pyro.plate("data", len(x))`), otherwise *global*.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.transforms import biject_to
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from .errors import DGMError, ModelError, did_you_mean
from .hints import Lines, failure, unwritten
from .programs import (
    Program,
    StartValues,
    bound,
    isolated,
    owner,
    preserved_buffers,
    preserved_rng,
    program_name,
    with_home,
)

DATA_PLATE = "data"


@dataclass(frozen=True, eq=False)
class Site:
    """One latent of a program.

    `batch_shape` and `event_shape` are those of its value; `plate` is the data plate that it stands in, or None.
    """

    name: str
    support: Any
    batch_shape: Size
    event_shape: Size
    frames: tuple[CondIndepStackFrame, ...]
    plate: str | None
    enumerated: bool = False
    auxiliary: bool = False  # a guide's own site, which the model does not have
    value: Tensor | None = None  # the value of the run that found it: a feasible point

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    @property
    def shape(self) -> Size:
        """Shape of one datum's value: the data plate is taken out."""
        batch = list(self.batch_shape)
        if self.plate is not None:
            del batch[self.plate_frame.dim]
            while batch and batch[0] == 1:
                del batch[0]
        return Size(batch) + self.event_shape

    @property
    def plate_frame(self) -> Any:
        """The data plate's frame: its `dim`, `size` (rows present) and `full_size`."""
        for frame in self.frames:
            if frame.name == self.plate:
                return frame
        raise ModelError(f"site {self.name!r} stands in no data plate")

    @property
    def discrete(self) -> bool:
        return bool(self.support.is_discrete)

    @property
    def support_name(self) -> str:
        return support_name(self.support)


def support_name(support: Any) -> str:
    """The short name of a constraint, e.g. `real`, `positive`, `simplex`."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    text = str(support)
    for long, short in (
        ("GreaterThan(lower_bound=0.0)", "positive"),
        ("GreaterThanEq(lower_bound=0.0)", "nonnegative"),
        ("Interval(lower_bound=0.0, upper_bound=1.0)", "unit_interval"),
    ):
        text = text.replace(long, short)
    return text.removesuffix("()").lower() if text.endswith("()") else text


class Latents(Mapping[str, Site]):
    """The latents of a program by name, and its observed sites; prints as a table."""

    def __init__(self, sites: Iterable[Site], observed: Mapping[str, Mapping[str, Any]], plates: Mapping[str, Any]):
        self._sites = {site.name: site for site in sites}
        self.observed = dict(observed)
        self.plates = dict(plates)

    def __getitem__(self, name: str) -> Site:
        if name not in self._sites:
            raise KeyError(f"no latent {name!r}: {did_you_mean(name, self._sites)}")
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def global_(self) -> list[Site]:
        return [site for site in self._sites.values() if site.plate is None]

    @property
    def local(self) -> list[Site]:
        return [site for site in self._sites.values() if site.plate is not None]

    def __repr__(self) -> str:
        rows = [
            (
                site.name,
                str(tuple(site.shape)),
                site.support_name,
                "global" if site.plate is None else f'local in "{site.plate}"',
            )
            for site in self._sites.values()
        ]
        if not rows:
            return "no latents"
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def init_values(model: Program) -> dict[str, Tensor]:
    """What the model itself proposes as a start, by site name (its `init_values()`, if it has one)."""
    module = owner(model)
    propose = getattr(module, "init_values", None) if module is not None else None
    return dict(propose()) if callable(propose) else {}


def trace_once(
    model: Program,
    *batch: Any,
    values: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    lines: Lines | None = None,
) -> poutine.Trace:
    """The trace of one run from the prior, with everything global left as it was; `lines` learns where sites are."""
    if isinstance(model, type):
        raise ModelError(f"model is the class {model.__name__}, expected an object of it: write {model.__name__}(...)")
    if not callable(model):
        raise ModelError(f"model is a {type(model).__name__}, expected a Pyro program: a module or a function")
    program, home = with_home(model)
    # A draw from a wide prior may overflow where the posterior never goes: the structure is read without validation.
    with isolated(validate=False), preserved_rng(seed), preserved_buffers(model), torch.no_grad(), StartValues(values):
        try:
            held = lines if lines is not None else contextlib.nullcontext()
            with unwritten(program_name(model), batch, ModelError), held:
                return poutine.trace(bound(program, home)).get_trace(*batch)
        except DGMError:
            raise
        except Exception as error:  # the user's own code may fail in any way
            told = f"{program_name(model)} could not be run on these data: {failure(error, model, batch)}"
            raise ModelError(told) from error


def latents(model: Program, *batch: Any, plates: Iterable[str] = (DATA_PLATE,)) -> Latents:
    """The latents of a model with their names, shapes, supports and plates, found by running it once.

    Args:
        model: a Pyro program: a module or a function called as `model(*batch)`.
        batch: a real batch of data, as the model takes it; rows first.
        plates: names of the data plates; a latent inside one is local.

    Raises:
        ModelError: the model is a class instead of an object, or a site is sampled twice with different plates.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z.sum(-1), s), obs=x)
    >>> latents(model, torch.zeros(5))
    s  ()    positive  global
    z  (2,)  real      local in "data"
    """
    return read(trace_once(model, *batch), plates)


def read(trace: poutine.Trace, plates: Iterable[str] = (DATA_PLATE,)) -> Latents:
    """The latents of a trace; see `latents`."""
    names = set(plates)
    found: list[Site] = []
    observed: dict[str, Mapping[str, Any]] = {}
    frames: dict[str, Any] = {}
    node: Any  # Pyro's Message leaves every field optional
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
            continue
        stack = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
        frames.update({frame.name: frame for frame in stack})
        if node["is_observed"]:
            observed[name] = node
            continue
        fn, value = node["fn"], node["value"]
        event_shape = value.shape[value.dim() - fn.event_dim :]
        plate = next((frame.name for frame in stack if frame.name in names), None)
        found.append(
            Site(
                name=name,
                support=fn.support,
                batch_shape=value.shape[: value.dim() - fn.event_dim],
                event_shape=event_shape,
                frames=stack,
                plate=plate,
                enumerated=bool(node["infer"].get("enumerate")),
                auxiliary=bool(node["infer"].get("is_auxiliary")),
                value=value.detach(),
            )
        )
    return Latents(found, observed, frames)


def require_continuous(site: Site) -> None:
    """Raise for a latent that no reparameterised density can serve."""
    if site.discrete:
        raise ModelError(
            f"latent {site.name!r} is discrete ({site.support_name}): no density on R^d can be its guide. Sum it out "
            "(mark it with pyro.infer.config_enumerate and train with TraceEnum_ELBO; the guide then leaves it out), "
            "let Joint serve it by probabilities of its values, or write the model with a mixture distribution instead"
        )


def start_values(
    model: Program, batch: Sequence[Any], sites: Sequence[Site], given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A feasible start for each site: given, else the model's own `init_values()`, else the prior's median.

    The median is taken over nine runs; a flat prior starts at the image of zero.

    Raises:
        ModelError: a start value has another shape than its site, or is not in its support.
    """
    proposals = {**init_values(model), **(given or {})}
    names = [site.name for site in sites if site.name not in proposals]
    runs = [trace_once(model, *batch, seed=seed) for seed in range(9)] if names else []
    values: dict[str, Tensor] = {}
    for site in sites:
        if site.name in proposals:
            value = torch.as_tensor(proposals[site.name]).detach()
            if value.shape != site.batch_shape + site.event_shape or not bool(
                torch.as_tensor(site.support.check(value)).all()
            ):
                raise ModelError(
                    f"the start value of {site.name!r} has shape {tuple(value.shape)}, expected "
                    f"{tuple(site.batch_shape + site.event_shape)} inside {site.support_name}"
                )
            values[site.name] = value
            continue
        transform = biject_to(site.support)
        draws = torch.stack([transform.inv(run.nodes[site.name]["value"]) for run in runs])
        values[site.name] = transform(draws.median(0).values)
    return values
