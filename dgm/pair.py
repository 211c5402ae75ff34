"""A model and a guide together: their parameters, their checks, and the ELBO as a pure function.

`loss(parameters, batch, noise)` depends on nothing else, so that a step can be traced, replicated and replayed.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .errors import DGMError, GuideError, ModelError, OptionError, did_you_mean
from .hints import Lines, failure, misplaced, unwritten
from .noise import Recorded, replaying
from .objectives import Objective
from .particles import Programs
from .programs import (
    Program,
    StartValues,
    announce,
    bound,
    isolated,
    owner,
    preserved_buffers,
    preserved_rng,
    program_name,
    with_home,
)
from .sites import DATA_PLATE, Latents, Site, read, support_name
from .support import kind_of

_ROWS: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("rows", default=None)


def current_rows() -> Tensor | None:
    """Which rows of the data the present batch holds, `(B,)`; None where nobody said."""
    return _ROWS.get()


_ALL_ROWS: contextvars.ContextVar[int | None] = contextvars.ContextVar("all_rows", default=None)


def all_rows() -> int | None:
    """How many rows the data have of which the present batch is a chunk; None where nobody said."""
    return _ALL_ROWS.get()


@contextlib.contextmanager
def batch_rows(rows: Tensor | None) -> Iterator[None]:
    """Tell guides with parameters for each datum which rows they see."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


@contextlib.contextmanager
def chunk_of(total: int, rows: Tensor) -> Iterator[None]:
    """As `batch_rows`, for a chunk of data that may not be those of training: a guide may refuse another number."""
    token = _ALL_ROWS.set(total)
    try:
        with batch_rows(rows):
            yield
    finally:
        _ALL_ROWS.reset(token)


class Minibatch(Messenger):
    """Scales every site in a data plate to the full data, and the latents' terms by the KL weight.

    E[(N/B) sum_batch log p(x_n, z_n)] = sum_data log p(x_n, z_n). A plate that declares its own full size
    (`pyro.plate("data", N, subsample_size=B)`) is scaled by Pyro already and left alone.

    Args:
        sizes: full size of each data plate, numbers or 0-d tensors.
        kl_weight: weight of log p(z) - log q(z), 1 for the ELBO; a number or a 0-d tensor.

    Raises:
        ModelError: a plate declares a full size that is not the one given here.
    """

    def __init__(self, sizes: Mapping[str, Any], kl_weight: Any = 1.0):
        super().__init__()
        self.sizes = sizes
        self.kl_weight = kl_weight

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name not in self.sizes:
                continue
            size = self.sizes[frame.name]
            if frame.full_size is not None and frame.full_size != frame.size:
                if isinstance(size, int) and size != frame.full_size:
                    raise ModelError(
                        f"plate {frame.name!r} declares the full size {frame.full_size}, sizes says {size}: make them "
                        f'equal, or write pyro.plate("{frame.name}", len(x)) in the model'
                    )
                continue
            if not (isinstance(size, int) and size == frame.size):
                msg["scale"] = msg["scale"] * (size / frame.size)
        if not msg["is_observed"] and not (isinstance(self.kl_weight, float) and self.kl_weight == 1.0):
            msg["scale"] = msg["scale"] * self.kl_weight


class OwnRows(Messenger):
    """A model's plate keeps the rows that the model gives it (`subsample=rows`).

    In a replay Pyro would exchange them for those of the guide's plate, which counts the batch from 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.given:  # the innermost handler has the last word
            msg["value"] = self.given[msg["name"]]


def own_rows(model: Program) -> Program:
    """The model with `OwnRows` around it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with OwnRows():
            return model(*args, **kwargs)

    return run


class NotReparameterised(Exception):
    """A site of the guide has no pathwise gradient: the score-function estimator of Pyro is needed."""


def _proposed(guide: Program) -> Any:
    """The objective that a guide asks for (an ensemble: one particle for each member), or None."""
    propose = getattr(owner(guide), "objective", None)
    return propose() if callable(propose) else None


def checked_loss(loss: Any) -> Any:
    """A loss as a pair can use it.

    Raises:
        OptionError: a class, something that is no loss, or no particles.
    """
    if isinstance(loss, type):
        raise OptionError(f"loss is the class {loss.__name__}, expected an object of it: write {loss.__name__}()")
    if not (
        callable(loss) or any(hasattr(loss, name) for name in ("loss_and_grads", "differentiable_loss", "loss_of"))
    ):
        raise OptionError(f"loss is {loss!r}, expected a Pyro ELBO or one of dgm.ELBO(), dgm.ImportanceELBO(), ...")
    particles = getattr(loss, "num_particles", 1)
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise OptionError(
            f"num_particles of {type(loss).__name__} is {particles!r}, expected a whole number, at least 1"
        )
    return loss


class _Owners(nn.Module):
    """Holds the modules of both programs, so that one call can exchange all their parameters."""

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class Pair:
    """A model and its guide.

    Args:
        model, guide: Pyro programs with the same call signature.
        loss: a Pyro ELBO or a `dgm.Objective`; it is copied, so that no plate nesting is remembered from another model.
            Default: what the guide proposes by `objective()`, else `Trace_ELBO()`.

    Attributes:
        model, guide: the programs; a function stands in a module that holds its `pyro.param`s.
        run_model, run_guide: the same, to be called inside `running`.
    """

    def __init__(self, model: Program, guide: Program, loss: Any = None):
        for name, program in (("model", model), ("guide", guide)):
            if isinstance(program, type):
                raise GuideError(f"{name} is the class {program.__name__}, expected an object of it: call it first")
            if not callable(program):
                raise GuideError(
                    f"{name} is a {type(program).__name__}, expected a Pyro program: a module or a function"
                )
            if isinstance(program, functools.partial) and isinstance(program.func, type):
                raise GuideError(
                    f"{name} is a partial of the class {program.func.__name__}, which makes a {name}: call it "
                    + ("as guide(model, *batch)" if name == "guide" else "first")
                )
        self.model, model_home = with_home(model)
        self.guide, guide_home = with_home(guide)
        self.run_model = own_rows(bound(self.model, model_home, guide_home))
        self.run_guide = bound(self.guide, guide_home, model_home)
        loss = checked_loss(loss) if loss is not None else _proposed(self.guide)
        self.loss_fn: Any = copy.copy(loss) if loss is not None else Trace_ELBO()
        if getattr(self.loss_fn, "vectorize_particles", False):
            self.loss_fn.max_plate_nesting = math.inf  # guessed anew: another model may have been seen
        self.pathwise = type(self.loss_fn) is Trace_ELBO or isinstance(
            self.loss_fn, Objective
        )  # until a site without a pathwise gradient is met
        self.not_pathwise: str | None = None  # the name of that site
        self._noise: dict[Any, Recorded | None] = {}  # of one particle, by the shape of a batch
        self.owners = _Owners()
        self.owners.add_module("model", model_home)
        if guide_home is not model_home:
            self.owners.add_module("guide", guide_home)

    def parameters(self) -> dict[str, Tensor]:
        """Every trainable parameter of the pair by name, each once."""
        found: dict[str, Tensor] = {name: p for name, p in self.owners.named_parameters() if p.requires_grad}
        seen = {id(p) for p in found.values()}
        found.update({n: p for n, p in self.closed_over().items() if p.requires_grad and id(p) not in seen})
        return found

    @property
    def evaluations(self) -> int:
        """Evaluations of the model's density in a step, for each row: the particles', and those inside of the guide."""
        inside = sum(getattr(part, "evaluations_per_step", 1) - 1 for part in self.owners.modules())
        return int(getattr(self.loss_fn, "num_particles", 1)) * (1 + inside)

    def closed_over(self) -> dict[str, Tensor]:
        """Parameters of modules that a program names by `pyro.module` without being their home."""
        return {n: p for home in self.owners.children() for n, p in home.__dict__.get("pyro_modules", {}).items()}

    @property
    def movable(self) -> bool:
        """Whether all parameters can be exchanged from outside; not those of modules that a function closes over."""
        held = {id(p) for p in self.owners.parameters()}
        return all(id(p) in held for p in self.closed_over().values())

    @contextlib.contextmanager
    def running(self, *, rows: Tensor | None = None, validate: bool = False) -> Iterator[None]:
        """Everything that a run needs and that must not outlive it."""
        with isolated(validate=validate), batch_rows(rows if rows is not None else current_rows()):
            yield

    def call(
        self, run: Callable[[], Any], parameters: Mapping[str, Tensor] | None, noise: Sequence[Tensor] | None
    ) -> Any:
        """`run()` with the parameters and the noise given, or with the present parameters and fresh noise."""
        with contextlib.ExitStack() as stack:
            if noise is not None:
                stack.enter_context(replaying(noise))
            if parameters is None:
                return run()
            return torch.func.functional_call(self.owners, dict(parameters), (run,))

    def loss(
        self,
        parameters: Mapping[str, Tensor] | None,
        batch: Sequence[Any],
        noise: Sequence[Tensor] | None = None,
        *,
        sizes: Mapping[str, Any] | None = None,
        kl_weight: Any = 1.0,
        rows: Tensor | None = None,
        validate: bool = False,
    ) -> Tensor:
        """The negative ELBO, a pure function of its arguments where parameters and noise are given; differentiable.

        Args:
            parameters: by name as in `parameters()`; None for the present ones.
            batch: the data, as both programs take it.
            noise: the draws of one run (`dgm.noise`); None for fresh ones.
            sizes: full size of each data plate.
            kl_weight: weight of the latents' terms.
            rows: `(B,)`, which rows of the data these are.
        """
        with self.running(rows=rows, validate=validate):
            return self.call(lambda: self._loss(batch, sizes or {}, kl_weight), parameters, noise)

    def _scaled(self, program: Program, sizes: Mapping[str, Any], kl_weight: Any, speak: bool = False) -> Program:
        def run(*args: Any, **kwargs: Any) -> Any:
            if speak:
                announce(self.parameters())
            with Minibatch(sizes, kl_weight):
                return program(*args, **kwargs)

        return run

    def learn_noise(self, batch: Sequence[Any], rows: Tensor | None = None) -> None:
        """Find the noise of one particle on batches of this shape, before anybody records, traces or maps the loss."""
        if isinstance(self.loss_fn, Objective):
            with self.running(rows=rows):
                self.programs(batch, {}, 1.0)

    def programs(self, batch: Sequence[Any], sizes: Mapping[str, Any], kl_weight: Any) -> Programs:
        """Both programs on a batch, as an objective of several particles takes them."""
        programs = Programs(self.run_model, self.run_guide, self.owners, batch, {DATA_PLATE: None, **sizes}, kl_weight)
        rows = current_rows()
        key = (*(tuple(t.shape) if isinstance(t, Tensor) else None for t in batch), rows is None)
        if key not in self._noise:  # the first run of a shape is no trace and no vmap
            self._noise[key] = programs.record()
        programs.draws = self._noise[key]
        return programs

    def _loss(self, batch: Sequence[Any], sizes: Mapping[str, Any], kl_weight: Any) -> Tensor:
        if isinstance(self.loss_fn, Objective):
            return self.loss_fn.loss_of(self.programs(batch, sizes, kl_weight))
        model, guide = (self._scaled(program, sizes, kl_weight) for program in (self.run_model, self.run_guide))
        if self.pathwise:
            try:
                return _negative_elbo(self.loss_fn, model, guide, batch)
            except NotReparameterised as site:
                self.pathwise, self.not_pathwise = False, str(site)
        if hasattr(self.loss_fn, "differentiable_loss"):
            return self.loss_fn.differentiable_loss(model, guide, *batch)
        if callable(self.loss_fn) and not hasattr(self.loss_fn, "loss_and_grads"):
            return self.loss_fn(model, guide, *batch)
        raise NotReparameterised(f"{type(self.loss_fn).__name__} has no differentiable loss")

    def loss_and_grads(
        self, batch: Sequence[Any], sizes: Mapping[str, Any], kl_weight: Any, rows: Tensor | None
    ) -> float:
        """For the losses of Pyro that only know how to run backward themselves (Renyi, graph, wake-sleep)."""
        with self.running(rows=rows):
            model, guide = (self._scaled(p, sizes, kl_weight, speak=True) for p in (self.run_model, self.run_guide))
            return self.loss_fn.loss_and_grads(model, guide, *batch)

    def check(self, batch: Sequence[Any], plates: Iterable[str] = (DATA_PLATE,)) -> Latents:
        """Run both programs once, create every lazy parameter, and compare them site by site.

        Raises:
            GuideError: the guide misses a latent, has one too many, or disagrees in shape, support or plate; or there
                is nothing to train.
            ModelError: the model alone cannot be run, or a discrete latent stands where none can be served.
        """
        plates, lines = set(plates), Lines()
        for name, parameter in self.owners.named_parameters():
            if parameter.is_meta:
                raise GuideError(
                    f"parameter {name!r} is on the meta device, which holds no values: build the module on a real one, "
                    "or call .to_empty(device=...) and start its values"
                )
        with self.running(), preserved_rng(0), preserved_buffers(self.model, self.guide), torch.no_grad():
            with unwritten(program_name(self.guide), batch, GuideError), lines:
                guide_trace = self._run_guide(batch)
            with StartValues():  # by itself, not at the guide's values: those are what is to be checked
                model_trace = poutine.trace(self.run_model).get_trace(*batch)
        alone = misplaced(guide_trace.nodes, lines.at)
        if alone is not None:
            raise GuideError(f"{program_name(self.guide)}: {alone}")
        model_sites, guide_sites = read(model_trace, plates), read(guide_trace, plates)
        seen = {n for n, node in guide_sites.observed.items() if kind_of(node["fn"]) != "Unit"}  # but factors
        self._check_names(model_sites, {n: s for n, s in guide_sites.items() if not s.auxiliary}, seen)
        for name, site in model_sites.items():
            if name in guide_sites:
                self._check_site(site, guide_sites[name], guide_trace.nodes[name])
        return model_sites

    def _run_guide(self, batch: Sequence[Any]) -> poutine.Trace:
        try:
            return poutine.trace(self.run_guide).get_trace(*batch)
        except DGMError:
            raise
        except Exception as error:  # the user's own code may fail in any way
            told = f"{program_name(self.guide)} could not be run on these data: {failure(error, self.guide, batch)}"
            raise GuideError(told) from error

    def _check_names(self, model_sites: Latents, guide_sites: Mapping[str, Site], observed: Iterable[str]) -> None:
        model, guide = program_name(self.model), program_name(self.guide)
        extra = sorted(set(guide_sites) - set(model_sites))
        seen = sorted(set(observed) - set(model_sites))
        if seen:
            raise GuideError(
                f"{guide} observes {seen[0]!r} (obs=...): a guide samples latents and scores no data; leave it out "
                "of the guide" + (", or give another guide than the model itself" if guide == model else "")
            )
        for name, site in model_sites.items():
            if name in guide_sites or (site.discrete and isinstance(self.loss_fn, TraceEnum_ELBO)):
                continue
            if name in observed:
                raise GuideError(
                    f"{guide} observes {name!r} (obs=...), a latent of {model}: leave obs out, or give a Delta, for a "
                    "guide samples"
                )
            if site.discrete:
                raise ModelError(
                    f"latent {name!r} of {model} is discrete ({site.support_name}) and {guide} does not sample it: sum "
                    "it out with TraceEnum_ELBO and pyro.infer.config_enumerate, or sample it in the guide"
                )
            raise GuideError(
                f"{guide} does not sample the latent {name!r} of {model}: "
                + (f"of its other sites, {did_you_mean(name, extra)}" if extra else "add it, or observe it (obs=...)")
            )
        for name in extra:
            if name in model_sites.observed:
                raise GuideError(
                    f"{guide} samples {name!r}, which is observed in {model}: a guide set up by a call without "
                    "data takes observations for latents; make it again with a batch of the data"
                )
            raise GuideError(
                f"{guide} samples {name!r}, which does not exist in {model}: {did_you_mean(name, model_sites)} "
                'Mark it infer={"is_auxiliary": True} if the guide alone needs it'
            )

    def _check_site(self, site: Site, guided: Site, node: Any) -> None:
        name, guide = site.name, program_name(self.guide)
        value_shape = site.batch_shape + site.event_shape
        if tuple(node["value"].shape) != tuple(value_shape):
            plates = {f.name for f in node["cond_indep_stack"]}
            more, less = plates - {f.name for f in site.frames}, {f.name for f in site.frames} - plates
            cure = f"open pyro.plate({sorted(less)[0]!r}, ...) around it" if less else "make the guide for this model"
            given = node["value"].shape
            for f in site.frames:  # of the dimensions of its plates, one that counts other rows in the guide
                place = (f.dim or 0) - site.event_dim
                if len(given) >= -place and given[place] not in (1, f.size) and f.name not in less:
                    cure = (
                        f"it was made for {given[place]} rows of plate {f.name!r} and sees {f.size}: "
                        "train it on all rows at once, or serve each row by Amortized"
                    )
                    if f.name != site.plate:
                        cure += (
                            f", with the plate named as one of data (plates=[{f.name!r}] for the guide, "
                            f"sizes={{{f.name!r}: N}} in training)"
                        )
            if more:
                cure = f"sample it outside of the plate {sorted(more)[0]!r}, as the model does"
            raise GuideError(
                f"{guide} gives {name!r} the shape {tuple(node['value'].shape)}, the model {tuple(value_shape)}: {cure}"
            )
        if not bool(torch.as_tensor(site.support.check(node["value"])).all()):
            raise GuideError(
                f"{guide} gives {name!r} values outside the model's support ({_short(site.support_name)}); its own is "
                f"{_short(support_name(node['fn'].support))}: transform it onto the support (biject_to)"
            )
        if not isinstance(node["fn"], Delta) and guided.support_name != site.support_name:
            raise GuideError(
                f"{guide} samples {name!r} with support {_short(guided.support_name)}, the model with "
                f"{_short(site.support_name)}: "
                "use a distribution with that support (a TransformedDistribution, or a LogNormal for positive values)"
            )
        frames = {frame.name for frame in node["cond_indep_stack"]}
        if site.plate is not None and site.plate not in frames:
            raise GuideError(
                f"latent {name!r} is one for each row (plate {site.plate!r}), but {guide} samples it outside that "
                f'plate: open pyro.plate("{site.plate}", len(x)) in the guide around it'
            )


def _short(support: str) -> str:
    """A support in one line, without the numbers of bounds that are tensors."""
    return (
        support.partition("(")[0].lower() + " with bounds of its own"
        if "\n" in support or "tensor" in support
        else support
    )


def _negative_elbo(loss: Trace_ELBO, model: Program, guide: Program, batch: Sequence[Any]) -> Tensor:
    """-ELBO of fully reparameterised programs, without a call of `.item()` on the way: a graph can be made of it."""
    total: Any = 0.0
    for model_trace, guide_trace in loss._get_traces(model, guide, tuple(batch), {}):
        elbo: Any = 0.0
        for node in model_trace.nodes.values():
            if node["type"] == "sample":
                elbo = elbo + node["log_prob_sum"]
        for name, node in guide_trace.nodes.items():
            if node["type"] == "sample":
                score = node["score_parts"].score_function
                if not (isinstance(score, (int, float)) and score == 0):
                    raise NotReparameterised(name)
                elbo = elbo - node["log_prob_sum"]
        total = total + elbo / loss.num_particles
    return -total
