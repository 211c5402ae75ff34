"""A training in progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .checkpoint import Checkpoints
from .checks import EachBatch, check_all_rows, check_observed
from .errors import DGMError, GuideError, OptionError, TrainingError
from .feeding import Batch, Loaded, Memory
from .fitted import HISTORY, Fit, Interrupted, Stop
from .heldout import HeldOut
from .optim import adam
from .options import Options, Plan
from .pair import batch_rows
from .posthoc import finishers
from .programs import Program, preserved_rng, program_name
from .resume import after_skipping, check_same, example_of, load_run_state, run_state
from .signals import Asked, deferred
from .sites import DATA_PLATE
from .stopping import NoisyPlateau
from .structure import check_last_batch, check_modes
from .svi import SVI

Batches = Iterator[tuple[Batch, Tensor | None]]


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

    @classmethod
    def of(
        cls,
        options: Options,
        model: Program,
        guide: Program,
        source: Memory | Loaded,
        held_out: Batch | None,
        plan: Plan,
        lr: float,
        check: bool = True,
    ) -> Run:
        """A training that is ready to go, its data checked against the model."""
        full = dict(options.sizes) if options.sizes is not None else source.sizes(model)
        plates = {DATA_PLATE, *full}
        if check:
            check_modes(model, guide)
        if check and isinstance(source, Loaded):
            check_last_batch(source.rows, source.batch_size, source.loader.drop_last, model, guide)
            source.each = EachBatch(model, plates)
        if check and isinstance(source, Memory):
            tensors = source.all_rows()
            check_all_rows(model, tensors, plates, whole=source.whole, transform=options.transform)
        if check and held_out is not None:
            check_all_rows(model, held_out, plates, name="held-out rows")
        for part in finishers(guide):  # not before: what is refused leaves a finished guide as it is
            getattr(part, "reopen", lambda: None)()
        optim = options.optim if options.optim is not None else adam(lr)
        horizon = plan.total(source.steps)
        steps: dict[str, Any] = {"compile": options.compile, "clip": options.clip, "horizon": horizon}
        steps |= {"nonfinite": options.nonfinite, "skips": options.skips}
        svi = SVI(model, guide, optim, options.loss, sizes=full, **steps)
        held = HeldOut(model, guide, held_out, sizes=full) if held_out is not None else None
        run = cls(svi, plan, source, held)
        run.validate_every = options.validate_every
        run.rule = NoisyPlateau(options.patience) if options.patience is not None else None
        return run

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
