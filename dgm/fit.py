"""Training a pair: batches, schedules, KL warm-up, validation and early stopping around `SVI.step`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .checks import check_all_rows
from .data import as_tensors, batches, check_batch_size, split
from .errors import DataError, OptionError, TrainingError
from .heldout import HeldOut
from .optim import adam
from .programs import Program, owner, preserved_rng, program_name
from .sites import DATA_PLATE, latents
from .stopping import NoisyPlateau
from .svi import SVI, Compile

Batch = tuple[Tensor, ...]
Transform = Callable[[Batch, torch.Generator], Batch]


@dataclass
class Fit:
    """A trained pair and how it came about.

    Attributes:
        model, guide: the trained pair, in place.
        history: one row for each epoch (or step): epoch, step, evaluations, elbo (training, nats a datum), kl_weight,
            lr, valid_elbo and valid_se (nats a datum; NaN where not validated), seconds.
        steps, evaluations: optimiser steps; model density evaluations (rows times particles).
        seconds, cpu_seconds: wall-clock and process time of training, validation apart.
        stopped: why training ended.
    """

    model: Program
    guide: Program
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    steps: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    stopped: str = ""
    seed: int = 0

    def __repr__(self) -> str:
        last = f", elbo {self.history['elbo'].iloc[-1]:.4g} nats a datum" if len(self.history) else ""
        return f"Fit({self.steps} steps in {self.seconds:.1f} s{last}; {self.stopped})"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `fit`; `fit` is what was finished, and the pair holds its last parameters."""

    def __init__(self, fit: Fit):
        super().__init__(f"interrupted after {fit.steps} steps")
        self.fit = fit


@dataclass(frozen=True)
class Plan:
    """The options of one training that are numbers; checked once."""

    epochs: int | None
    steps: int | None
    kl_warmup: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} is {value!r}, expected a positive whole number")
        if (self.epochs is None) == (self.steps is None):
            raise OptionError("give epochs or steps, one of them")
        if not 0 <= self.kl_warmup < math.inf:
            raise OptionError(f"kl_warmup is {self.kl_warmup!r}, expected a number of {self.unit}s >= 0")

    @property
    def unit(self) -> str:
        return "epoch" if self.epochs is not None else "step"

    def total(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        length = self.kl_warmup * (1 if self.unit == "step" else steps_per_epoch)
        return 1.0 if length == 0 else min(1.0, (step + 1) / length)


def checked_seed(seed: Any) -> int:
    """A seed as torch takes it.

    Raises:
        OptionError: not a whole number in [0, 2**63).
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**63:
        raise OptionError(f"seed is {seed!r}, expected a whole number from 0 to 2**63 - 1")
    return int(seed)


def fit(
    model: Program,
    guide: Program,
    *data: Any,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    optim: Any = None,
    lr: float = 1e-3,
    loss: Any = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    kl_warmup: float = 0.0,
    validation: float | Any | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    transform: Transform | None = None,
    sizes: Mapping[str, int] | None = None,
    compile: Compile = "trace",
) -> Fit:
    """Train a model and a guide together by stochastic variational inference.

    maximise over theta, phi:  E_q[log p_theta(x, z) - kl_weight * ...]: the ELBO over minibatches, scaled to all rows.

    Args:
        model, guide: Pyro programs; their parameters are trained in place. Freeze one by `requires_grad_(False)`.
        data: arrays with rows first (tensor, numpy, pandas), as the model takes them; or one DataLoader.
        epochs, steps: how long, one of them; 100 epochs unless told.
        batch_size: rows in a step; None for all. The last smaller batch is used too.
        optim: a torch optimiser factory, a torch optimiser or a PyroOptim; default Adam with `lr`.
        lr: step size of the default optimiser.
        loss: a Pyro ELBO, default `Trace_ELBO()`.
        schedule: factory of a torch learning-rate scheduler; it moves once an epoch, or once a step if `steps` is
            given.
        clip: largest norm of the gradient.
        kl_warmup: epochs (or steps, if `steps` is given) over which the weight of log p(z) - log q(z) rises from 0 to 1
            (Bowman et al., "Generating sentences from a continuous space", 2016).
        validation: share of the rows held out, or held-out arrays; their bound stands in the history.
        validate_every: epochs between validations.
        patience: stop by `NoisyPlateau(patience)` on the held-out bound, and keep the best validated parameters.
        seed: of the noise and of the data order; the random stream outside is left as it was.
        device, dtype: where, and in which floating type, to train; default as model and data are.
        progress: show a progress bar.
        transform: `(batch, generator) -> batch`, applied to every training batch (stochastic binarization).
        sizes: rows of the full data for each data plate; default the number of rows for the plate "data".
        compile: "trace" or False, see `SVI`.

    Returns:
        a `Fit`: the trained pair and its history.

    Raises:
        DataError, ModelError, GuideError, OptionError: before the first step, see `SVI.prepare` and `as_tensors`.
        TrainingError: the loss or gradient is not finite; the parameters are those of the last good step, and the
            error's `fit` holds the history.
        Interrupted: Ctrl-C; its `fit` holds the history.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> result = fit(model, AutoNormal(model), torch.ones(20), epochs=5, batch_size=10)
    >>> len(result.history), result.steps
    (5, 10)
    """
    plan = Plan(100 if epochs is None and steps is None else epochs, steps, kl_warmup, checked_seed(seed))
    if patience is not None and validation is None:
        raise OptionError("patience needs held-out data: give validation=0.1, or arrays")
    if isinstance(validate_every, bool) or validate_every < 1:
        raise OptionError(f"validate_every is {validate_every!r}, expected a number of epochs >= 1")
    _move(model, guide, device, dtype)
    source, held_out = _sources(data, validation, batch_size, plan.seed, transform, device, dtype)
    full = dict(sizes) if sizes is not None else source.sizes(model)
    if isinstance(source, Memory):
        check_all_rows(
            model, source.tensors, {DATA_PLATE, *full}, whole=source.batch_size == source.rows, transform=transform
        )
    if held_out is not None:
        check_all_rows(model, held_out, {DATA_PLATE, *full})
    svi = SVI(model, guide, optim if optim is not None else adam(lr), loss, sizes=full, compile=compile, clip=clip)
    run = _Run(svi, plan, source, HeldOut(model, guide, held_out, sizes=full) if held_out is not None else None)
    run.validate_every = validate_every
    run.rule = NoisyPlateau(patience) if patience is not None else None
    with preserved_rng(plan.seed), tqdm(total=plan.total(source.steps), disable=not progress, unit="step") as bar:
        return run.go(schedule, bar)


class Memory:
    """Rows in memory, on the device where they are trained on: a batch is an index, not a loader's work."""

    def __init__(self, tensors: Batch, batch_size: int | None, seed: int, transform: Transform | None):
        self.tensors, self.transform = tensors, transform
        self.rows = len(tensors[0])
        self.batch_size = check_batch_size(self.rows, batch_size)
        order, noise = (np.random.SeedSequence([seed, use]).generate_state(1)[0] for use in (1, 2))
        self.order = torch.Generator().manual_seed(int(order))
        self.noise = torch.Generator(device=tensors[0].device).manual_seed(int(noise))
        self.steps = len(list(batches(self.rows, self.batch_size)))

    def sizes(self, model: Program) -> dict[str, int]:
        whole = self.batch_size == self.rows
        if whole and DATA_PLATE not in latents(model, *self.first()).plates:
            return {}  # all rows in each step: nothing to scale, whatever the model calls its plates
        return {DATA_PLATE: self.rows}

    def first(self) -> Batch:
        batch = tuple(t[: self.batch_size] for t in self.tensors)
        return (
            batch if self.transform is None else self.transform(batch, torch.Generator(batch[0].device).manual_seed(0))
        )

    def epoch(self) -> Iterator[tuple[Batch, Tensor | None]]:
        whole = self.batch_size == self.rows
        for index in batches(self.rows, self.batch_size, None if whole else self.order, self.tensors[0].device):
            batch = self.tensors if whole else tuple(t[index] for t in self.tensors)
            yield (batch if self.transform is None else self.transform(batch, self.noise)), index


class Loaded:
    """Rows from a torch DataLoader."""

    def __init__(self, loader: DataLoader[Any], device: Any, dtype: Any):
        self.loader, self.device, self.dtype = loader, device, dtype
        self.rows = len(loader.dataset)  # type: ignore[arg-type]
        self.steps = len(loader)
        self.batch_size = loader.batch_size or self.rows
        if self.steps == 0:
            raise DataError(
                f"the DataLoader gives 0 batches ({self.rows} rows, batch_size {self.batch_size}): drop_last?"
            )

    def sizes(self, model: Program) -> dict[str, int]:
        return {DATA_PLATE: self.rows}

    def epoch(self) -> Iterator[tuple[Batch, Tensor | None]]:
        for item in self.loader:
            yield (
                as_tensors(
                    tuple(item) if isinstance(item, (list, tuple)) else item, device=self.device, dtype=self.dtype
                ),
                None,
            )


class _Run:
    """One training in progress."""

    rule: NoisyPlateau | None = None
    validate_every: int = 1

    def __init__(self, svi: SVI, plan: Plan, source: Memory | Loaded, held_out: HeldOut | None):
        self.svi, self.plan, self.source, self.held_out = svi, plan, source, held_out
        self.rows: list[dict[str, float]] = []
        self.evaluations = 0
        self.seconds = self.cpu_seconds = 0.0
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def go(self, schedule: Callable[[torch.optim.Optimizer], Any] | None, bar: Any) -> Fit:
        try:
            return self.result(self._train(schedule, bar))
        except TrainingError as error:
            error.fit = self.result("a value was not finite")  # type: ignore[attr-defined]
            raise
        except KeyboardInterrupt as error:
            raise Interrupted(self.result("interrupted")) from error

    def _train(self, schedule: Callable[[torch.optim.Optimizer], Any] | None, bar: Any) -> str:
        total = self.plan.total(self.source.steps)
        scheduler: Any = None
        epoch = 0
        if self.held_out is not None and isinstance(self.source, Memory):
            first = self.source.first()
            self.svi.prepare(*first, rows=torch.arange(len(first[0]), device=first[0].device))
            self.held_out.samplers()  # a guide that cannot serve rows it was not trained on says so before the start
        while self.svi.steps < total:
            epoch += 1
            start, cpu = time.perf_counter(), time.process_time()
            losses, weight = [], 1.0
            for batch, rows in self.source.epoch():
                weight = self.plan.kl_weight(self.svi.steps, self.source.steps)
                losses.append(self.svi.step(*batch, rows=rows, kl_weight=weight))
                self.evaluations += len(batch[0]) * getattr(self.svi.pair.loss_fn, "num_particles", 1)
                if scheduler is None and schedule is not None:
                    scheduler = schedule(self.svi.optimiser)  # type: ignore[arg-type]
                    scheduler.optimizer._opt_called = True  # the step was before the scheduler was made, on purpose
                if scheduler is not None and self.plan.unit == "step":
                    scheduler.step()
                bar.update()
                if self.svi.steps >= total:
                    break
            if scheduler is not None and self.plan.unit == "epoch":
                scheduler.step()
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu
            self._record(epoch, losses, weight)
            bar.set_postfix_str(f"elbo {self.rows[-1]['elbo']:.4g}", refresh=False)
            if self._enough(epoch, self.svi.steps >= total):
                return self.rule.reason if self.rule is not None else ""
        return f"{epoch} epochs" if self.plan.unit == "epoch" else f"{total} steps"

    def _record(self, epoch: int, losses: Sequence[float], weight: float) -> None:
        optimiser = self.svi.optimiser
        self.rows.append(
            {
                "epoch": epoch,
                "step": self.svi.steps,
                "evaluations": self.evaluations,
                "elbo": -float(np.mean(losses)) / self.source.rows,
                "kl_weight": weight,
                "lr": optimiser.param_groups[0]["lr"] if optimiser is not None else math.nan,
                "valid_elbo": math.nan,
                "valid_se": math.nan,
                "seconds": self.seconds,
            }
        )

    def _enough(self, epoch: int, last: bool) -> bool:
        """Validate where it is time; whether the rule says that it is enough."""
        if self.held_out is None or (epoch % self.validate_every and not last):
            return False
        per_datum = self.held_out.bound(seed=self.plan.seed)
        value, error = float(per_datum.mean()), float(per_datum.std() / math.sqrt(len(per_datum)))
        self.rows[-1].update(valid_elbo=value, valid_se=error)
        if self.rule is None:
            return False
        if self.best is None or value > self.best[0]:
            self.best = (value, {n: p.detach().clone() for n, p in self.svi.parameters.items()})
        return self.rule.update(value, error, per_datum)

    def result(self, why: str) -> Fit:
        if self.best is not None:
            with torch.no_grad():
                for name, parameter in self.svi.parameters.items():
                    parameter.copy_(self.best[1][name])
            why += "; the best validated parameters are kept"
        return Fit(
            self.svi.model,
            self.svi.guide,
            pd.DataFrame(self.rows),
            self.svi.steps,
            self.evaluations,
            self.seconds,
            self.cpu_seconds,
            why,
            self.plan.seed,
        )


def _move(model: Program, guide: Program, device: Any, dtype: Any) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype is {dtype}, expected a floating one such as torch.float64; labels stay int64")
    for program in (model, guide):
        if isinstance(program, type):
            raise OptionError(f"{program_name(program)} is a class, expected an object: call it first")
        module = owner(program)
        if module is not None and (device is not None or dtype is not None):
            nn.Module.to(module, device=device, dtype=dtype)


def _sources(
    data: Sequence[Any],
    validation: Any,
    batch_size: int | None,
    seed: int,
    transform: Transform | None,
    device: Any,
    dtype: Any,
) -> tuple[Memory | Loaded, Batch | None]:
    if not data:
        raise DataError("no data: fit(model, guide, x, ...) takes it after the guide")
    if len(data) == 1 and isinstance(data[0], DataLoader):
        if batch_size is not None or transform is not None:
            raise OptionError("batch_size and transform belong to in-memory data: the DataLoader has its own")
        if isinstance(validation, float):
            raise OptionError("a DataLoader cannot be split: give the held-out arrays as validation")
        held_out = as_tensors(validation, device=device, dtype=dtype) if validation is not None else None
        return Loaded(data[0], device, dtype), held_out
    tensors = as_tensors(data[0] if len(data) == 1 else tuple(data), device=device, dtype=dtype)
    held_out = None
    if isinstance(validation, float):
        tensors, held_out = split(tensors, validation, torch.Generator().manual_seed(seed))
    elif validation is not None:
        held_out = as_tensors(validation, device=device, dtype=dtype)
    if held_out is not None and transform is not None and isinstance(validation, float):
        held_out = transform(held_out, torch.Generator(held_out[0].device).manual_seed(seed))
    return Memory(tensors, batch_size, seed, transform), held_out
