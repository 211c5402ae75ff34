"""Stochastic variational inference: one step of stochastic backpropagation, without Pyro's global state.

Hoffman, Blei, Wang and Paisley, "Stochastic variational inference", 2013; Kingma and Welling, "Auto-Encoding
Variational Bayes", 2014; Rezende, Mohamed and Wierstra, "Stochastic backpropagation ...", 2014.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from .checks import check_autoguide_rows, check_observed, explain_draws
from .compiled import CompiledStep
from .errors import DataError, GuideError, ModelError, OptionError, TrainingError
from .flush import flushed
from .graph import Graph, Untraceable, scalars
from .noise import Recorded, recording
from .nonfinite import Guard, Policy, bad_gradients, explain_nonfinite, largest
from .optim import make_optimiser
from .pace import MODES, Compile, Kind, Pace, cost, steady
from .pair import NotReparameterised, Pair, batch_rows
from .programs import Program, preserved_buffers, preserved_rng, program_name
from .raised import is_numerical
from .rules import Counter
from .sites import DATA_PLATE, Latents
from .structure import check_coverage, check_scales
from .whole import CompilerFailed

log = logging.getLogger("dgm")

WARM = 10
"""Eager steps before `compile="auto"` thinks of a graph."""


class SVI(pyro.infer.SVI):
    """Stochastic variational inference with no global parameter store, minibatch scale and checks before the start.

    One step descends the gradient of the negative ELBO
    -E_q[sum_n (N/B) (log p(x_n, z_n | w) - log q(z_n | x_n)) + log p(w) - log q(w)].
    It gives the numbers of `pyro.infer.SVI`; where the pair allows, the step is a graph traced once for a batch shape.

    Args:
        model, guide: Pyro programs with the same call signature.
        optim: a torch optimiser factory (`partial(torch.optim.Adam, lr=1e-3)`), a ready torch optimiser over all
            parameters of the pair, or a `PyroOptim`.
        loss: a Pyro ELBO, or one of `dgm.ELBO`, `dgm.ImportanceELBO`, `dgm.RenyiELBO`, `dgm.ReweightedWakeSleep`;
            default what the guide asks for by `objective()`, else `Trace_ELBO()`.
        sizes: number of rows of the full data for each data plate, e.g. `{"data": 60_000}`.
        compile: False runs Pyro's step; "trace" a graph of loss and gradients, then the optimiser; "inductor" the whole
            step, update included, through torch's compiler; "auto" goes from one to the next where the run is long
            enough to pay for it (`dgm.pace.Pace`). The numbers are the same. A step that has no graph is eager,
            `fallback` says why; a graph that the compiler refuses is traced, `uncompiled` says why.
        clip: largest norm of the gradient; None for no clipping.
        warm: eager steps of a batch shape before a graph is made; default 10 for "auto", else none.
        horizon: how many steps the run will have, if that is known.
        nonfinite: "stop" raises at a step whose loss or gradient is not finite; "skip" leaves that step out.
        skips: how many steps "skip" may leave out; one more raises.

    Attributes:
        steps: steps that were run, the skipped ones among them.
        skipped: numbers of the steps that were skipped, counted from 1.

    Raises:
        GuideError: at the first step, before any update, where model and guide do not fit, or nothing can be trained.
        ModelError: a data plate is missing or declares another size.
        TrainingError: the loss or its gradient is not finite; parameters, buffers and the optimiser's state are left as
            they were.

    >>> import pyro.distributions as dist
    >>> from functools import partial
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> svi = SVI(model, AutoNormal(model), partial(torch.optim.Adam, lr=0.01), sizes={"data": 100})
    >>> isinstance(svi.step(torch.zeros(10)), float)
    True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Any,
        loss: Any = None,
        *,
        sizes: Mapping[str, int] | None = None,
        compile: Compile = "auto",
        clip: float | None = None,
        warm: int | None = None,
        horizon: int | None = None,
        nonfinite: Policy = "stop",
        skips: int = 10,
    ):
        if compile is not False and compile not in MODES[1:]:
            raise OptionError(f"compile is {compile!r}, expected False, 'trace', 'inductor' or 'auto'")
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
            raise OptionError(f"clip is {clip!r}, expected a positive gradient norm or None")
        for plate, size in (sizes or {}).items():
            if isinstance(size, bool) or not (isinstance(size, int) and size > 0):
                raise OptionError(f"sizes[{plate!r}] is {size!r}, expected the number of rows of the full data")
        self.guard = Guard(nonfinite, skips)
        self.pair = Pair(model, guide, loss)
        self.model, self.guide = self.pair.model, self.pair.guide  # functions now hold their parameters
        self.optim = optim
        self.sizes = dict(sizes or {})
        self.compile: Compile = compile
        self.clip = clip
        self.warm = warm if warm is not None else (WARM if compile == "auto" else 0)
        self.horizon = horizon
        self.steps = 0
        self.kind: Kind = "eager"
        self.latents: Latents | None = None
        self.optimiser: torch.optim.Optimizer | None = None
        self.parameters: dict[str, Tensor] = {}
        self.fallback: str | None = None  # why the step is not a graph, once that is known
        self.uncompiled: str | None = None  # why the graph is not compiled
        self._graphs: dict[Any, Graph] = {}
        self._draws: dict[Any, Recorded] = {}
        self._compiled: dict[Any, CompiledStep] = {}
        self._paces: dict[Any, Pace] = {}
        self._scalars: tuple[float, Tensor] | None = None
        self._counter: Counter | None = None
        self._state = torch.get_rng_state()  # before the step
        self._noise: list[Tensor] | None = None  # the step's draws, where it is a graph
        self._moving: list[str] = []  # buffers that change while the program runs (batch normalisation)
        self._start: dict[str, float] = {}
        super(pyro.infer.SVI, self).__init__()

    def prepare(self, *batch: Any, rows: Tensor | None = None) -> Latents:
        """Check model, guide and data against each other and build the optimiser; `step` does it by itself.

        Raises:
            GuideError, ModelError, DataError: see `dgm.Pair.check` and `dgm.checks.check_observed`.
        """
        plates = {DATA_PLATE, *self.sizes}
        with batch_rows(rows):
            check_observed(self.model, batch, plates)
            latents = self.pair.check(batch, plates)
            self._check_plates(latents)
            check_scales(self.model, batch, latents, self.sizes, rows)
            check_autoguide_rows(self.pair.owners, latents, self.sizes)
            self.parameters = self.pair.parameters()
            if not self.parameters:
                raise GuideError(f"nothing to train: guide {program_name(self.guide)} and its model have 0 parameters")
            self._check_reached(batch, rows)
        self.optimiser = make_optimiser(self.optim, self.parameters)
        self.latents, self._start = latents, largest(self.parameters)
        return latents

    @property
    def skipped(self) -> list[int]:
        """Numbers of the steps that were skipped, counted from 1."""
        return self.guard.skipped

    def _check_plates(self, latents: Latents) -> None:
        for plate in self.sizes:
            if plate not in latents.plates:
                known = ", ".join(map(repr, latents.plates)) or "none"
                raise ModelError(
                    f"sizes names the plate {plate!r}, which {program_name(self.model)} does not open (its plates: "
                    f'{known}): write `with pyro.plate("{plate}", len(x)):` around the rows, or name its plate in sizes'
                )

    def _check_reached(self, batch: Sequence[Any], rows: Tensor | None) -> None:
        """Walk the graph of one loss: whatever leaf it reaches must be a parameter that the optimiser knows."""
        with preserved_rng(0), preserved_buffers(self.model, self.guide):
            before = {name: buffer.clone() for name, buffer in self.pair.owners.named_buffers()}
            try:
                loss = self.pair.loss(None, batch, sizes=self.sizes, rows=rows, validate=True)
                self._moving = _moved(before, dict(self.pair.owners.named_buffers()))
            except NotReparameterised:
                return
            except ValueError as error:
                if "to satisfy the constraint" not in str(error):
                    raise
                raise ModelError(_out_of_domain(error)) from error
        known, reached = {id(p) for p in self.parameters.values()}, _leaves(loss)
        for leaf in reached:
            if id(leaf) not in known:
                raise ModelError(
                    f"a parameter of shape {tuple(leaf.shape)} takes part in the loss but belongs to neither program, "
                    f"so it would never be trained{_closure_name(leaf, self.model, self.guide)}: make model and guide "
                    'PyroModules that hold it, or register it with pyro.module("name", module) inside the program'
                )
        check_coverage(self.parameters, reached, self.guide)

    def step(self, *batch: Any, rows: Tensor | None = None, kl_weight: float = 1.0, **kwargs: Any) -> float:
        """One update; returns the loss (the negative ELBO, scaled to the full data) before it, NaN for a skipped step.

        Args:
            batch: as model and guide take it.
            rows: `(B,)`, indices of these rows in the full data, for guides with parameters for each datum.
            kl_weight: weight of the latents' terms.
        """
        if kwargs:
            raise OptionError(f"step takes data by position, got the keyword {sorted(kwargs)[0]!r}")
        if self.optimiser is None:
            self.prepare(*batch, rows=rows)
        self._state = torch.get_rng_state()  # a step that fails is run again with its own noise, to name the site
        start = time.perf_counter()
        key = _shapes(batch, rows)
        pace = self._paces.setdefault(key, Pace())
        with flushed():
            self.kind = self._kind(key, pace, batch, rows)
            if self.kind == "inductor":
                loss = self._compiled_step(key, batch, rows, kl_weight)
            else:
                loss = self._plain_step(key, batch, rows, kl_weight)
        self.steps += 1
        pace.add(self.kind, time.perf_counter() - start)
        return loss

    def _kind(self, key: Any, pace: Pace, batch: Sequence[Any], rows: Tensor | None) -> Kind:
        """How the next step of this shape runs; whatever is missing for it is made here, and said."""
        if key in self._compiled:
            return "inductor"
        if not self.compile or self.fallback is not None:
            return "eager"
        auto = self.compile == "auto"
        left = None if self.horizon is None else self.horizon - (0 if steady() else self.steps)
        if key not in self._graphs:
            if (pace.done < self.warm and not steady()) or (auto and not pace.pays("trace", left)):
                return "eager"
            if not self._make_graph(key, batch, rows):
                return "eager"
        if self.compile == "trace" or self.uncompiled is not None:
            return "trace"
        operations = len(self._graphs[key].module.graph.nodes)
        if auto and not pace.pays("inductor", left, operations):
            return "trace"
        return "inductor" if self._make_compiled(key, batch, rows, left) else "trace"

    def _make_graph(self, key: Any, batch: Sequence[Any], rows: Tensor | None) -> bool:
        try:
            if not self.pair.pathwise and self.pair.not_pathwise is not None:
                raise Untraceable(f"site {self.pair.not_pathwise!r} has no pathwise gradient (score function)")
            with preserved_rng(), preserved_buffers(self.model, self.guide):
                self.pair.learn_noise(batch, rows)
                with recording() as draws:
                    self.pair.loss(None, batch, sizes=self.sizes, rows=rows)
                if not draws.complete:
                    raise Untraceable(explain_draws(self.pair, batch, rows))
                self._draws[key] = draws
                self._graphs[key] = Graph(self.pair, self.parameters, batch, draws, self.sizes, rows)
        except (Untraceable, NotReparameterised) as error:
            self.fallback = str(error)
            log.warning("the step of %s stays eager: %s", program_name(self.guide), self.fallback)
            return False
        return True

    def _make_compiled(self, key: Any, batch: Sequence[Any], rows: Tensor | None, left: int | None) -> bool:
        graph, ends = self._graphs[key], "an open number of" if left is None else left
        seconds = cost("inductor", len(graph.module.graph.nodes))
        log.info("step %d: compiling (about %.0f s) for %s steps of this shape", self.steps + 1, seconds, ends)
        try:
            with preserved_rng():
                inputs = self._inputs(key, batch, rows, 1.0)
                optimiser = self._optimiser()
                if self._counter is None:
                    self._counter = Counter(optimiser, list(self.parameters.values()))
                self._compiled[key] = CompiledStep(graph, optimiser, self.parameters, self.clip, inputs, self._counter)
        except (CompilerFailed, Untraceable) as error:
            self.uncompiled = str(error)
            log.warning("the step of %s is traced, not compiled: %s", program_name(self.guide), error)
            return False
        return True

    def _inputs(
        self, key: Any, batch: Sequence[Any], rows: Tensor | None, kl_weight: float, noise: Any = None
    ) -> list[Tensor]:
        if self._scalars is None or self._scalars[0] != kl_weight:  # a tensor is dear to make beside a small step
            like = next(iter(self.parameters.values()))
            self._scalars = (kl_weight, scalars(self.sizes, kl_weight, like))
        noise = self._draws[key].sample() if noise is None else noise
        return self._graphs[key].inputs(self.parameters, batch, noise, self._scalars[1], rows)

    def _plain_step(self, key: Any, batch: Sequence[Any], rows: Tensor | None, kl_weight: float) -> float:
        gradients: Sequence[Tensor | None] = ()
        cause: BaseException | None = None
        if self.kind == "trace":
            inputs = self._inputs(key, batch, rows, kl_weight)
            self._noise = self._graphs[key].noise(inputs)
        else:
            self._noise = None
            buffers = self._buffers()
            kept = {name: buffers[name].clone() for name in self._moving}
        try:
            if self.kind == "trace":
                loss, gradients = self._graphs[key](inputs)
            else:
                loss, gradients = self._gradients(batch, rows, kl_weight)
            good = self._update(loss, gradients)
        except (ValueError, RuntimeError) as error:
            if not is_numerical(error):
                raise
            loss, good, cause = torch.tensor(math.nan), False, error
        if good:
            return float(loss)
        if self.kind == "eager":
            self._put_back(kept)
        return self._meet(loss, gradients, batch, rows, cause)

    def _gradients(
        self, batch: Sequence[Any], rows: Tensor | None, kl_weight: float
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        try:
            loss = self.pair.loss(None, batch, sizes=self.sizes, kl_weight=kl_weight, rows=rows)
        except NotReparameterised:
            value = self.pair.loss_and_grads(batch, self.sizes, kl_weight, rows)
            value = value[0] if isinstance(value, tuple) else value
            return torch.as_tensor(float(value)), [p.grad for p in self.parameters.values()]
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        return loss.detach(), gradients

    def _compiled_step(self, key: Any, batch: Sequence[Any], rows: Tensor | None, kl_weight: float) -> float:
        inputs = self._inputs(key, batch, rows, kl_weight)
        loss, norm = self._compiled[key](inputs)
        if math.isfinite(loss + norm):
            return loss
        self._noise = self._graphs[key].noise(inputs)
        found, gradients = self._graphs[key](inputs)  # nothing was changed: the same numbers again, to name them
        return self._meet(found, gradients, batch, rows)

    def _update(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
        """Move the parameters; False, and nothing is changed, where loss or gradient is not finite."""
        present = [g for g in gradients if g is not None]
        norm = _norm(present, exact=self.clip is not None)
        if not math.isfinite(float(loss) + float(norm)):
            return False
        graded = _graded(self.parameters, gradients)
        if self.clip is not None and present:
            torch.nn.utils.clip_grads_with_norm_(graded, self.clip, torch.as_tensor(norm))
        optimiser = self._optimiser()
        self.settle()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if self._counter is not None:
            self._counter.read()
        return True

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.pair.owners.named_buffers()) if self._moving else {}

    def _put_back(self, kept: Mapping[str, Tensor]) -> None:
        """What a step has left that was not finite: statistics in buffers, gradients of Pyro's own losses."""
        buffers = self._buffers()
        with torch.no_grad():
            for name, value in kept.items():
                buffers[name].copy_(value)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _meet(
        self,
        loss: Tensor,
        gradients: Sequence[Tensor | None],
        batch: Sequence[Any],
        rows: Tensor | None,
        cause: BaseException | None = None,
    ) -> float:
        """A step that is not finite: raises, or books it as skipped."""
        if cause is not None:
            what, names = f"the loss cannot be computed ({type(cause).__name__.lstrip('_')})", []
        else:
            names = bad_gradients(list(self.parameters), gradients)
            what = f"the loss is {float(loss)}" if not torch.isfinite(loss) else "the gradient is not finite"
        number = self.steps + 1

        def report() -> str:
            noise = self._state if self._noise is None else self._noise
            return explain_nonfinite(self.pair, number, what, names, batch, rows, noise, self._start)

        try:
            self.guard.meet(number, what, report)
        except TrainingError as error:
            raise error from cause
        return math.nan

    def settle(self) -> None:
        """Bring the optimiser's own step counters up to date; compiled steps leave them for later."""
        if self._counter is not None:
            self._counter.write()

    def _optimiser(self) -> torch.optim.Optimizer:
        if self.optimiser is None:
            raise TrainingError("no optimiser yet: call prepare or step first")
        return self.optimiser

    def evaluate_loss(self, *batch: Any, rows: Tensor | None = None, **kwargs: Any) -> float:
        """An estimate of the loss without gradients or update."""
        if self.latents is None:
            self.prepare(*batch, rows=rows)
        with torch.no_grad():
            return float(self.pair.loss(None, batch, sizes=self.sizes, rows=rows))


def _norm(gradients: Sequence[Tensor], exact: bool) -> Tensor | float:
    """The norm of all gradients; where only its finiteness matters, on a processor, by what costs least.

    It overflows where a graph's sum of squares does, so that all engines refuse the same steps.
    """
    if exact or any(g.device.type != "cpu" for g in gradients):
        return torch.nn.utils.get_total_norm(gradients) if gradients else 0.0
    squares = sum(float(n) ** 2 for n in torch._foreach_norm(list(gradients))) if gradients else 0.0
    return math.sqrt(squares) if squares <= torch.finfo(gradients[0].dtype).max else math.inf if squares else 0.0


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names of all buffers of those modules of which a run changed one."""
    changed = {n.rpartition(".")[0] for n, b in after.items() if n not in before or not torch.equal(b, before[n])}
    return [name for name in after if name.rpartition(".")[0] in changed]


def _graded(parameters: Mapping[str, Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    return [p for p in parameters.values() if p.grad is not None]


def _shapes(batch: Sequence[Any], rows: Tensor | None) -> Any:
    one: Callable[[Any], Any] = lambda t: (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t  # noqa: E731
    try:
        key = (tuple(one(t) for t in batch), None if rows is None else tuple(rows.shape))
        hash(key)
    except TypeError as error:
        raise DataError(f"a batch holds tensors and hashable values, got one that is neither: {error}") from error
    return key


def _out_of_domain(error: ValueError) -> str:
    """Torch's complaint about a distribution's parameter, with the cause that is likely and the cure."""
    first, *rest = str(error).splitlines()
    values = next((line for line in rest if line.startswith("tensor")), "")
    return (
        f"at the guide's start a distribution of model or guide gets a parameter outside of its domain: {first} "
        f"{values}; look for extreme values in the data or in a network's start, or start the guide where the model "
        "is defined (init=...)"
    )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on."""
    found, seen, stack = [], set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _closure_name(leaf: Tensor, *programs: Program) -> str:
    """Where a function got hold of an unregistered parameter, if that can be found."""
    for outer in programs:
        program = getattr(outer, "function", outer)
        code = getattr(program, "__code__", None)
        cells = dict(zip(code.co_freevars, program.__closure__ or (), strict=False)) if code is not None else {}
        reached = {name: cell.cell_contents for name, cell in cells.items()}
        scope = getattr(program, "__globals__", {})
        reached.update({name: scope[name] for name in (code.co_names if code is not None else ()) if name in scope})
        for name, value in reached.items():
            if value is leaf:
                return f" (it is {name!r})"
            if isinstance(value, torch.nn.Module):
                for inner, parameter in value.named_parameters():
                    if parameter is leaf:
                        return f" (it is {name}.{inner})"
    return ""
