"""A training in progress: its options, its history, and what came of it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .checkpoint import Checkpoints
from .checks import EachBatch, check_all_rows, check_observed
from .errors import DGMError, GuideError, OptionError, TrainingError
from .feeding import Batch, Loaded, Memory, Transform
from .heldout import HeldOut
from .limits import check_limits
from .nonfinite import Guard, Policy
from .optim import adam
from .pace import Compile
from .pair import batch_rows
from .posthoc import finishers
from .programs import Program, owner, preserved_rng, program_name
from .resume import after_skipping, check_same, example_of, load_run_state, run_state
from .schedules import KLSchedule
from .signals import Asked, deferred
from .sites import DATA_PLATE
from .stopping import NoisyPlateau
from .structure import check_last_batch, check_modes
from .svi import SVI

Batches = Iterator[tuple[Batch, Tensor | None]]
HISTORY = "epoch step evaluations elbo kl_weight lr valid_elbo valid_se seconds".split()


@dataclass
class Fit:
    """A trained pair and how it came about.

    Attributes:
        model, guide: the trained pair, in place.
        history: one row for each epoch (or step): epoch, step, evaluations, elbo (training, nats a datum), kl_weight,
            lr, valid_elbo and valid_se (nats a datum; NaN where not validated), seconds. The last row's valid_elbo is
            that of the finished guide, where the guide has a `finish`.
        steps, evaluations: optimiser steps; model density evaluations (rows times particles), `finish` included.
        seconds, cpu_seconds: wall-clock and process time of training and of the guide's `finish`, validation apart; a
            replica's share of its group.
        stopped: why training ended.
        error: of a replica that met a value that is not finite; None for all others.
        engine: how the steps ran: "eager", "trace" or "inductor", and why not faster.
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
    error: str | None = None
    engine: str = ""

    def __repr__(self) -> str:
        last = f", elbo {self.history['elbo'].iloc[-1]:.4g} nats a datum" if len(self.history) else ""
        return f"Fit({self.steps} steps in {self.seconds:.1f} s{last}; {self.stopped})"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `fit`; `fit` is what was finished, and the pair holds the parameters of its last whole step.

    fits: the same of each replica, by its number.
    """

    def __init__(self, fit: Fit, fits: dict[int, Fit] | None = None):
        super().__init__(f"interrupted after {fit.steps} steps")
        self.fit, self.fits = fit, fits or {}


class Terminated(SystemExit):
    """SIGTERM during a `fit` with checkpoints: the step was finished and saved, and the process ends with code 143.

    fit, fits: as those of `Interrupted`.
    """

    def __init__(self, fit: Fit, fits: dict[int, Fit] | None = None):
        super().__init__(143)
        self.fit, self.fits = fit, fits or {}


class Stop(Exception):
    """A signal asked for the end, after this step."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def ended(self, fit: Fit, fits: dict[int, Fit] | None = None) -> BaseException:
        """What the caller of `fit` gets to see."""
        return Interrupted(fit, fits) if self.number == signal.SIGINT else Terminated(fit, fits)


@dataclass
class Position:
    """Where a training stands in its data.

    Attributes:
        epoch: number of the epoch, from 1; 0 before the first.
        done: batches of it that were trained on.
        order: where the data order stood before it.
        losses: of its steps. weight: the KL weight of the last.
    """

    epoch: int = 0
    done: int = 0
    order: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The options of one training that are numbers; checked once."""

    epochs: int | None
    steps: int | None
    kl_warmup: float
    seed: int
    kl: float = 1.0
    kl_schedule: KLSchedule | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} is {value!r}, expected a positive whole number")
        if (self.epochs is None) == (self.steps is None):
            raise OptionError("give epochs or steps, one of them")
        if not 0 <= self.kl_warmup < math.inf:
            raise OptionError(f"kl_warmup is {self.kl_warmup!r}, expected a number of {self.unit}s >= 0")
        if self.kl_schedule is not None and (self.kl_warmup or not callable(self.kl_schedule)):
            raise OptionError(
                "kl_schedule is a function of the time, such as dgm.schedules.cyclical(10), instead of kl_warmup"
            )
        if not 0 <= self.kl < math.inf:
            raise OptionError(f"kl_weight is {self.kl!r}, expected a number >= 0; 1 for the ELBO")

    @property
    def unit(self) -> str:
        return "epoch" if self.epochs is not None else "step"

    def total(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        if self.kl_schedule is not None:
            weight = float(self.kl_schedule((step + 1) / (1 if self.unit == "step" else steps_per_epoch)))
            if not 0 <= weight < math.inf:
                raise OptionError(f"kl_schedule gives {weight!r} at step {step + 1}, expected a weight >= 0")
            return self.kl * weight
        length = self.kl_warmup * (1 if self.unit == "step" else steps_per_epoch)
        return self.kl if length == 0 else self.kl * min(1.0, (step + 1) / length)


def checked_seed(seed: Any) -> int:
    """A seed as torch takes it.

    Raises:
        OptionError: not a whole number in [0, 2**63).
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**63:
        raise OptionError(f"seed is {seed!r}, expected a whole number from 0 to 2**63 - 1")
    return int(seed)


@dataclass(frozen=True)
class Options:
    """What `fit` was told, checked once; see there."""

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    optim: Any = None
    lr: float = 1e-3
    loss: Any = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    clip: float | None = None
    kl_warmup: float = 0.0
    kl_weight: float = 1.0
    kl_schedule: KLSchedule | None = None
    validation: float | Any | None = None
    validate_every: int = 1
    patience: int | None = None
    seed: int = 0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    progress: bool = False
    transform: Transform | None = None
    sizes: Mapping[str, int] | None = None
    compile: Compile = "auto"
    nonfinite: Policy = "stop"
    skips: int = 10

    def __post_init__(self) -> None:
        check_limits(self)
        Guard(self.nonfinite, self.skips)
        self.plan(self.seed, self.kl_weight)
        if self.patience is not None and self.validation is None:
            raise OptionError("patience needs held-out data: give validation=0.1, or arrays")
        if isinstance(self.validate_every, bool) or self.validate_every < 1:
            raise OptionError(f"validate_every is {self.validate_every!r}, expected a number of epochs >= 1")

    def plan(self, seed: int, kl_weight: float) -> Plan:
        """How long, with which seed and KL weight; 100 epochs unless told."""
        epochs = 100 if self.epochs is None and self.steps is None else self.epochs
        return Plan(epochs, self.steps, self.kl_warmup, checked_seed(seed), kl_weight, self.kl_schedule)

    def single(self, seed: int, lr: float, kl_weight: float) -> dict[str, Any]:
        """The arguments of `fit` for one replica."""
        own = {"seed": seed, "lr": lr, "kl_weight": kl_weight, "progress": False}
        return {f.name: getattr(self, f.name) for f in fields(self)} | own

    def run(
        self,
        model: Program,
        guide: Program,
        source: Memory | Loaded,
        held_out: Batch | None,
        plan: Plan,
        lr: float,
        check: bool = True,
    ) -> Run:
        """A training that is ready to go, its data checked against the model."""
        full = dict(self.sizes) if self.sizes is not None else source.sizes(model)
        plates = {DATA_PLATE, *full}
        if check:
            check_modes(model, guide)
        if check and isinstance(source, Loaded):
            check_last_batch(source.rows, source.batch_size, source.loader.drop_last, model, guide)
            source.each = EachBatch(model, plates)
        if check and isinstance(source, Memory):
            tensors = source.all_rows()
            check_all_rows(model, tensors, plates, whole=source.whole, transform=self.transform)
        if check and held_out is not None:
            check_all_rows(model, held_out, plates, name="held-out rows")
        for part in finishers(guide):  # not before: what is refused leaves a finished guide as it is
            getattr(part, "reopen", lambda: None)()
        optim = self.optim if self.optim is not None else adam(lr)
        horizon = plan.total(source.steps)
        steps: dict[str, Any] = {"compile": self.compile, "clip": self.clip, "horizon": horizon}
        steps |= {"nonfinite": self.nonfinite, "skips": self.skips}
        svi = SVI(model, guide, optim, self.loss, sizes=full, **steps)
        held = HeldOut(model, guide, held_out, sizes=full) if held_out is not None else None
        run = Run(svi, plan, source, held)
        run.validate_every = self.validate_every
        run.rule = NoisyPlateau(self.patience) if self.patience is not None else None
        return run


class Run:
    """One training in progress."""

    rule: NoisyPlateau | None = None
    validate_every: int = 1
    error: str | None = None
    why: str = ""  # why it ended, once it has
    early: bool = False  # whether the rule ended it
    engine: str = ""

    def __init__(self, svi: SVI, plan: Plan, source: Memory | Loaded, held_out: HeldOut | None):
        self.svi, self.plan, self.source, self.held_out = svi, plan, source, held_out
        self.rows: list[dict[str, float]] = []
        self.evaluations = 0
        self.seconds = self.cpu_seconds = 0.0
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.at = Position()
        self.scheduler: Any = None
        self.example: tuple[Tensor, ...] = ()  # a few rows, for making the guide again
        self.told: dict[str, Any] = {}  # what the training was asked for, as a checkpoint keeps it

    def go(
        self,
        schedule: Callable[[torch.optim.Optimizer], Any] | None,
        bar: Any,
        checkpoints: Checkpoints | None = None,
    ) -> Fit:
        """Train from the start, or from the newest checkpoint where there is one."""
        try:
            if self.untrained():
                return self.finished(f"nothing to train: {program_name(self.svi.guide)} was made by its finish")
            with deferred(terminate=checkpoints is not None) as asked:
                self._train(schedule, bar, checkpoints, asked)
            return self.finished(self.why)
        except TrainingError as error:
            if checkpoints is not None and self.svi.optimiser is not None:
                torch.set_rng_state(self.svi._state)  # before the step that failed
                self.save(checkpoints)
            error.fit = self.result("a value was not finite")  # type: ignore[attr-defined]
            raise
        except Stop as stop:
            raise stop.ended(self.result("interrupted")) from None
        except KeyboardInterrupt as error:
            raise Interrupted(self.result("interrupted")) from error

    def untrained(self) -> bool:
        """Whether there is nothing for SVI to do, because the guide makes its posterior by its `finish` alone."""
        if not finishers(self.svi.guide):
            return False
        batch = self.source.first()
        plates = {DATA_PLATE, *self.svi.sizes}
        with batch_rows(torch.arange(len(batch[0]), device=batch[0].device)):
            check_observed(self.svi.model, batch, plates)
            self.svi.pair.check(batch, plates)  # makes the parameters that Pyro makes lazily
        return not self.svi.pair.parameters()

    def finished(self, why: str) -> Fit:
        """The result, once the guide has made its posterior of all training rows, where it has a `finish`.

        Raises:
            DGMError: `finish` refuses, or fails (then a GuideError that names it); the error's `fit` is the training
                before it.
        """
        result, parts = self.result(why), finishers(self.svi.guide)
        if not parts:
            return result
        start, cpu = time.perf_counter(), time.process_time()
        rows = self.source.everything(self.plan.seed)
        for part in parts:
            try:
                with preserved_rng(self.plan.seed):
                    part.finish(self.svi.model, *rows, seed=self.plan.seed)
            except DGMError as error:
                error.fit = result  # type: ignore[attr-defined]
                raise
            except Exception as error:
                refusal = _failed(part, error)
                refusal.fit = result  # type: ignore[attr-defined]
                raise refusal from error
            self.evaluations += getattr(part, "evaluations", 0)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu
        self.best = None
        if self.held_out is not None:  # made anew: it remembers whether the guide drew noise
            held = self.held_out
            self.held_out = HeldOut(held.model, held.guide, held.batch, sizes=self.svi.sizes)
            if not self.rows:
                self.record(0, [], 1.0)
            self.validate()
        return self.result(result.stopped)

    def _train(
        self,
        schedule: Callable[[torch.optim.Optimizer], Any] | None,
        bar: Any,
        checkpoints: Checkpoints | None,
        asked: Asked,
    ) -> None:
        total = self.plan.total(self.source.steps)
        if self.held_out is not None and isinstance(self.source, Memory):
            self._prepare()
            self.held_out.samplers()  # a guide that cannot serve rows it was not trained on says so before the start
        epoch = self._resumed(schedule, bar, checkpoints)
        if self.svi.steps > total:
            raise OptionError(
                f"the checkpoint is of step {self.svi.steps}, and {total} steps are asked for: ask for more"
            )
        if self.why and (self.early or self.svi.steps == total):
            return
        self.why = ""
        while self.svi.steps < total or self.at.done:
            self._epoch(total, epoch or self._begin(), schedule, bar, checkpoints, asked)
            epoch = None
            if self.scheduler is not None and self.plan.unit == "epoch":
                self.scheduler.step()
            self.record(self.at.epoch, self.at.losses, self.at.weight)
            self.at.done = 0
            bar.set_postfix_str(f"elbo {self.rows[-1]['elbo']:.4g}", refresh=False)
            if self.enough(self.at.epoch, self.svi.steps >= total):
                self.why, self.early = self.rule.reason if self.rule is not None else "", True
                break
        self.why = self.why or (f"{self.at.epoch} epochs" if self.plan.unit == "epoch" else f"{total} steps")
        if checkpoints is not None:
            self.save(checkpoints)

    def _prepare(self) -> None:
        """Make whatever is made at a first step."""
        batch = self.source.first()
        self.svi.prepare(*batch, rows=torch.arange(len(batch[0]), device=batch[0].device))

    def _begin(self) -> Batches:
        """The next epoch's batches."""
        self.at = Position(self.at.epoch + 1, order=self.source.position())
        return self.source.epoch()

    def _epoch(
        self,
        total: int,
        epoch: Batches,
        schedule: Callable[[torch.optim.Optimizer], Any] | None,
        bar: Any,
        checkpoints: Checkpoints | None,
        asked: Asked,
    ) -> None:
        """The steps of an epoch, or of what is left of it."""
        start, cpu, before = time.perf_counter(), time.process_time(), (self.seconds, self.cpu_seconds)
        at = self.at
        if self.svi.steps < total:
            for batch, rows in epoch:
                at.weight = self.plan.kl_weight(self.svi.steps, self.source.steps)
                at.losses.append(self.svi.step(*batch, rows=rows, kl_weight=at.weight))
                at.done += 1
                self.example = self.example or example_of(batch)
                self.evaluations += len(batch[0]) * self.svi.pair.evaluations
                if self.scheduler is None and schedule is not None:
                    self._schedule(schedule)
                if self.scheduler is not None and self.plan.unit == "step":
                    self.scheduler.step()
                bar.update()
                stop = asked.signal
                if checkpoints is not None and (stop or checkpoints.due(self.svi.steps)):
                    self.seconds = before[0] + time.perf_counter() - start
                    self.cpu_seconds = before[1] + time.process_time() - cpu
                    self.save(checkpoints)
                if stop:
                    raise Stop(stop)
                if self.svi.steps >= total:
                    break
        self.seconds = before[0] + time.perf_counter() - start
        self.cpu_seconds = before[1] + time.process_time() - cpu

    def _schedule(self, schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
        self.scheduler = schedule(self.svi._optimiser())
        self.scheduler.optimizer._opt_called = True  # the step was before the scheduler was made, on purpose

    def save(self, checkpoints: Checkpoints) -> None:
        """Write the state after this step."""
        checkpoints.save(self.svi.steps, {**run_state(self), "at": dict(vars(self.at))})

    def _resumed(
        self,
        schedule: Callable[[torch.optim.Optimizer], Any] | None,
        bar: Any,
        checkpoints: Checkpoints | None,
    ) -> Batches | None:
        """What is left of the epoch that the newest checkpoint was made in; None where there is none."""
        saved = None if checkpoints is None else checkpoints.latest()
        if saved is None or checkpoints is None:
            return None
        state = saved.state
        check_same(state["told"], self.told, checkpoints.folder)
        if self.svi.optimiser is None:
            self._prepare()
        if schedule is not None:
            self._schedule(schedule)
        load_run_state(self, state)
        self.at = Position(**state["at"])
        bar.update(self.svi.steps)
        then = after_skipping(self, state)
        if not self.at.done:
            then()
            return None
        self.source.go_to(self.at.order)
        return self.source.epoch(self.at.done, then)

    def record(self, epoch: int, losses: Sequence[float], weight: float) -> None:
        optimiser = self.svi.optimiser
        losses = [loss for loss in losses if not math.isnan(loss)]  # those of skipped steps
        self.rows.append(
            {
                "epoch": epoch,
                "step": self.svi.steps,
                "evaluations": self.evaluations,
                "elbo": -float(np.mean(losses)) / self.source.rows if len(losses) else math.nan,
                "kl_weight": weight,
                "lr": optimiser.param_groups[0]["lr"] if optimiser is not None else math.nan,
                "valid_elbo": math.nan,
                "valid_se": math.nan,
                "seconds": self.seconds,
            }
        )

    def enough(self, epoch: int, last: bool) -> bool:
        """Validate where it is time; whether the rule says that it is enough."""
        if self.held_out is None or (epoch % self.validate_every and not last):
            return False
        value, error, per_datum = self.validate()
        if self.rule is None:
            return False
        if self.best is None or value > self.best[0]:
            self.best = (value, {n: p.detach().clone() for n, p in self.svi.parameters.items()})
        return self.rule.update(value, error, per_datum)

    def validate(self) -> tuple[float, float, Tensor]:
        """The bound of the held-out rows, now: mean, standard error, and of each row; it stands in the last row."""
        if self.held_out is None:
            raise OptionError("no held-out rows to validate on")
        per_datum = self.held_out.bound(seed=self.plan.seed)
        count = len(per_datum)  # of one row no standard error is known
        value, error = float(per_datum.mean()), float(per_datum.std() / math.sqrt(count)) if count > 1 else math.nan
        self.rows[-1].update(valid_elbo=value, valid_se=error)
        return value, error, per_datum

    def result(self, why: str) -> Fit:
        self.svi.settle()
        if self.best is not None:
            with torch.no_grad():
                for name, parameter in self.svi.parameters.items():
                    parameter.copy_(self.best[1][name])
            why += "; the best validated parameters are kept"
        return Fit(
            self.svi.model,
            self.svi.guide,
            pd.DataFrame(self.rows, columns=HISTORY),
            self.svi.steps,
            self.evaluations,
            self.seconds,
            self.cpu_seconds,
            why,
            self.plan.seed,
            self.error,
            self.engine or self._engine(),
        )

    def _engine(self) -> str:
        reason = self.svi.fallback or self.svi.uncompiled
        return self.svi.kind + (f" ({reason})" if reason else "")


def _failed(part: Any, error: Exception) -> GuideError:
    what = " ".join(str(error).split())
    return GuideError(
        f"{type(part).__name__}.finish failed after training with {type(error).__name__}: {what}; the trained guide is "
        "kept as it was before it: mend `finish`, or call it yourself as guide.finish(model, *data)"
    )


def move(*programs: Program, device: Any = None, dtype: Any = None) -> None:
    """Programs that are modules to a device and a floating type."""
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype is {dtype}, expected a floating one such as torch.float64; labels stay int64")
    for program in programs:
        if isinstance(program, type):
            raise OptionError(f"{program_name(program)} is a class, expected an object: call it first")
        module = owner(program)
        if module is not None and (device is not None or dtype is not None):
            nn.Module.to(module, device=device, dtype=dtype)


def floating_type(*programs: Program) -> torch.dtype | None:
    """That of the first parameter of the programs, in their order; None where there is none yet."""
    homes = [home for home in map(owner, programs) if home is not None]
    return next((p.dtype for home in homes for p in home.parameters() if p.is_floating_point()), None)
