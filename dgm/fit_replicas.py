"""Many trainings as one: `fit(..., replicas=...)`."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import Checkpoints
from .data import as_tensors, split_rows
from .errors import DGMError, OptionError
from .feeding import Memory
from .fitted import Fit, Interrupted, Stop, Terminated
from .flush import flushed
from .graph import Untraceable
from .memory import SHARE, available, is_out_of_memory, step_bytes
from .options import Options
from .pace import steady_choices
from .programs import floating_type, preserved_rng
from .replica_starts import Starts, Table
from .replicas import Replicas
from .resume import check_same, fingerprint, group_state, load_group_state, set_random_streams
from .signals import Asked, deferred
from .starting import maker
from .store_run import save_run
from .training import Position, Run

log = logging.getLogger("dgm")


def fit_replicas(
    model: Any,
    guide: Any,
    data: Sequence[Any],
    replicas: int | Mapping[str, Sequence[Any]],
    options: Options,
    kept: Checkpoints | None = None,
) -> list[Fit]:
    """See `dgm.fit`."""
    if kept is None:
        return _fit_replicas(model, guide, data, replicas, options, None)
    with kept.open(), steady_choices():
        fits = _fit_replicas(model, guide, data, replicas, options, kept)
        example = as_tensors(data[0] if len(data) == 1 else tuple(data), dtype=options.dtype)
        for k, one in enumerate(fits):
            save_run(kept.folder / _replica(k), {}, one, example=example)
        return fits


def _replica(k: int) -> str:
    return f"replica-{k:04d}"


def _fit_replicas(
    model: Any,
    guide: Any,
    data: Sequence[Any],
    replicas: int | Mapping[str, Sequence[Any]],
    options: Options,
    kept: Checkpoints | None,
) -> list[Fit]:
    table = Table(replicas, options.seed, options.lr, options.kl_weight)
    if options.dtype is None:
        options = replace(options, dtype=_floating_type(model, guide, table, data))
    tensors = as_tensors(data[0] if len(data) == 1 else tuple(data), device=options.device, dtype=options.dtype)
    starts = Starts(model, guide, table, tensors, options)
    groups: dict[int, list[int]] = {}
    for k in range(table.count):
        groups.setdefault(len(starts.own(k)[0]), []).append(k)  # splits of one length step side by side
    done: dict[int, Fit] = {}
    waiting = list(groups.values())
    with tqdm(total=table.count, disable=not options.progress, unit="replica") as bar:
        while waiting:
            group = waiting.pop(0)
            try:
                whole = options.compile is not False and len(group) > 1  # one alone starts without a graph
                part = (
                    _Group(starts, group, tensors, options, kept).train()
                    if whole
                    else one_by_one(starts, group, options, kept)
                )
            except (Interrupted, Terminated) as error:
                done.update(error.fits)
                error.fits = dict(sorted(done.items()))
                raise
            except Exception as error:
                if not is_out_of_memory(error) or len(group) == 1:
                    raise
                half = len(group) // 2
                log.warning("out of memory with %d replicas at once: going on with %d", len(group), half)
                if kept is not None:
                    kept.inside(_group(group)).clear()
                part = {}
                waiting = [group[:half], group[half:], *waiting]
            left = [k for k in group if k not in part]
            if part and left:
                waiting.insert(0, left)
            done.update(part)
            bar.update(len(part))
    return [done[k] for k in range(table.count)]


def _floating_type(model: Any, guide: Any, table: Table, data: Sequence[Any]) -> torch.dtype | None:
    """That of the first replica's programs, as a single run has it; without parameters that of the data's tensors."""
    if isinstance(model, (list, tuple)) or isinstance(guide, (list, tuple)):
        lists = [part for part in (model, guide) if isinstance(part, (list, tuple))]
        found = floating_type(*(program for part in lists for program in part[:1]))
    elif isinstance(model, nn.Module):
        found = floating_type(model)
    else:
        with preserved_rng(table.seeds[0]):
            found = floating_type((model if table.options[0] else maker(model))(**table.options[0]))
    flat = data[0] if len(data) == 1 and isinstance(data[0], (tuple, list)) else data
    return found or next((t.dtype for t in flat if isinstance(t, Tensor) and t.is_floating_point()), None)


def _group(members: Sequence[int]) -> str:
    return f"group-{members[0]:04d}"


def one_by_one(
    starts: Starts, members: Sequence[int], options: Options, kept: Checkpoints | None = None
) -> dict[int, Fit]:
    """Where the pair does not allow replicas: the same trainings, one after another."""
    from .fit import fit

    fits: dict[int, Fit] = {}
    table = starts.table
    for k in members:
        model, guide = starts.pair(k)
        single = options.single(table.seeds[k], table.rates[k], table.kl[k])
        if any(one.engine.startswith("eager (") for one in fits.values()):
            single["compile"] = False  # the reason was said once
        if kept is not None:
            single["checkpoint"] = kept.inside(_replica(k))
        try:
            fits[k] = fit(model, guide, starts.own(k), **single)
        except DGMError as error:
            result: Fit | None = getattr(error, "fit", None)
            if result is None:
                raise
            result.error = str(error)  # it diverged, or its `finish` refused: no reason to stop the others
            fits[k] = result
        except (Interrupted, Terminated) as error:
            error.fits = {**fits, k: error.fit}
            raise
        if k != members[0] and single["compile"] != options.compile:
            fits[k].engine = fits[members[0]].engine
    return fits


class _Group:
    """Replicas that fit memory, in one stack."""

    def __init__(
        self,
        starts: Starts,
        members: list[int],
        tensors: tuple[Tensor, ...],
        options: Options,
        kept: Checkpoints | None = None,
    ):
        self.starts, self.options, self.tensors = starts, options, tensors
        self.kept = None if kept is None else kept.inside(_group(members))
        self.saved = None if self.kept is None else self.kept.latest()
        if self.saved is not None:  # the same company: a graph of fewer replicas would round otherwise
            members = [k for k in members if k in self.saved.state["members"]]
        self.at = Position()
        self.losses: list[np.ndarray] = []  # of this epoch, each (steps, 2, K)
        self.schedulers: list[Any] = []
        self.marks: list[dict[str, Tensor]] = []  # where each data order stood before this epoch
        self.runs: list[Run] = []
        self.sources: list[Memory] = []
        self.members: list[int] = []
        self.untrained = False
        limit = len(members)
        for k in members[:]:
            if len(self.members) >= limit:
                break
            self.members.append(k)
            self._add(k)
            if len(self.members) == 1 and self.runs[0].untrained():
                self.untrained, self.members = True, list(members)
                break
            if len(self.members) == 1 and len(members) > 1 and self.saved is None:
                limit = self._limit(len(members))

    def _limit(self, wanted: int) -> int:
        """How many replicas fit into the memory that is free."""
        run = self.runs[0]
        batch = self.sources[0].first()
        rows = torch.arange(len(batch[0]), device=batch[0].device)
        run.svi.prepare(*batch, rows=rows)
        if run.svi.pair.pathwise is False:
            return wanted
        fits = int(SHARE * available(batch[0].device) / step_bytes(run.svi, batch, rows))
        if fits < wanted:
            log.info("%d replicas run %d at once: so many fit memory", wanted, max(1, fits))
        return max(1, min(wanted, fits))

    def _add(self, k: int) -> None:
        options, table = self.options, self.starts.table
        model, guide = self.starts.pair(k)
        own = self.starts.rows(k)
        check = own is not None or not self.runs  # rows of its own may be bad where those of the first were good
        held_out: tuple[Tensor, ...] | None = None
        if isinstance(options.validation, float):
            count = len(self.tensors[0]) if own is None else len(own)
            train, valid = split_rows(count, options.validation, torch.Generator().manual_seed(table.seeds[k]))
            train, valid = (train, valid) if own is None else (own[train], own[valid])
            held_out = tuple(t[valid.to(t.device)] for t in self.tensors)
            if options.transform is not None:
                held_out = options.transform(held_out, torch.Generator(held_out[0].device).manual_seed(table.seeds[k]))
            own = train
        elif options.validation is not None:
            held_out = as_tensors(options.validation, device=options.device, dtype=options.dtype)
        source = Memory(self.tensors, options.batch_size, table.seeds[k], options.transform, own)
        plan = options.plan(table.seeds[k], table.kl[k])
        self.sources.append(source)
        self.runs.append(Run.of(options, model, guide, source, held_out, plan, table.rates[k], check=check))

    def train(self) -> dict[int, Fit]:
        """The fits by number of replica."""
        if self.untrained:  # no steps to make together: each guide makes its posterior by its `finish`
            return one_by_one(self.starts, self.members, self.options, self._parent())
        seeds = [self.starts.table.seeds[k] for k in self.members]
        owns = [source.own for source in self.sources]
        own = None if owns[0] is None else torch.stack([o for o in owns if o is not None])
        total = self.runs[0].plan.total(self.runs[0].source.steps)
        engine = Replicas(
            [run.svi for run in self.runs],
            self.tensors,
            seeds=seeds,
            own=own,
            compile=self.options.compile,
            horizon=total,
            names=[f"replica {k} (seed {seed})" for k, seed in zip(self.members, seeds, strict=True)],
        )
        with preserved_rng(seeds[0]), flushed():
            try:
                with deferred(terminate=self.kept is not None) as asked, self._opened():
                    self._go(engine, total, asked)
            except Untraceable as error:
                log.warning("%d replicas run one after another: %s", len(self.members), error)
                return one_by_one(self.starts, self.members, self.options, self._parent())
            except (KeyboardInterrupt, Stop) as error:
                engine.finish()
                fits = {k: run.result("interrupted") for k, run in zip(self.members, self.runs, strict=True)}
                stop = error if isinstance(error, Stop) else Stop(signal.SIGINT)
                raise stop.ended(fits[self.members[0]], fits) from error
        engine.finish()
        for run in self.runs:
            run.engine = f"{engine.engine}, {len(self.runs)} replicas"
        fits = {}
        for k, run in zip(self.members, self.runs, strict=True):
            try:
                fits[k] = run.result(run.why) if run.error is not None else run.finished(run.why)
            except DGMError as error:
                run.error = str(error)
                fits[k] = run.result(run.why)
            except KeyboardInterrupt as error:
                rest = {j: r.result("interrupted") for j, r in zip(self.members, self.runs, strict=True)}
                raise Interrupted(rest[self.members[0]], {**rest, **fits}) from error
        return fits

    def _parent(self) -> Checkpoints | None:
        return None if self.kept is None else self.kept.outside()

    def _opened(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.kept is None else self.kept.open()

    def _go(self, engine: Replicas, total: int, asked: Asked) -> None:
        first = self.runs[0]
        for run, source in zip(self.runs, self.sources, strict=True):
            if (run.held_out is not None or self.saved is not None) and run.svi.optimiser is None:
                batch = source.first()
                run.svi.prepare(*batch, rows=torch.arange(len(batch[0]), device=batch[0].device))
        told = fingerprint(self.options, self._all(), replicas=vars(self.starts.table)) if self.kept is not None else {}
        orders = self._resumed(engine, total, told)
        while (engine.steps < total or self.at.done) and bool(engine.alive.any()):
            if orders is None:
                self.at = Position(self.at.epoch + 1)
                self.marks = [source.position() for source in self.sources]
                orders = [source.order() for source in self.sources]
            self._epoch(engine, total, orders, told, asked)
            if first.plan.unit == "epoch":
                for scheduler in self.schedulers:
                    scheduler.step()
            self._book(engine, orders, engine.steps >= total)
            self.at.done, orders = 0, None
        for run in self.runs:
            run.why = run.why or (f"{self.at.epoch} epochs" if first.plan.unit == "epoch" else f"{total} steps")
        self._save(engine, told)

    def _epoch(
        self, engine: Replicas, total: int, orders: Sequence[Sequence[Tensor]], told: dict[str, Any], asked: Asked
    ) -> None:
        """The steps of an epoch, or of what is left of it."""
        start, cpu, first = time.perf_counter(), time.process_time(), self.runs[0]
        weights = [run.at.weight for run in self.runs]
        for parts in list(zip(*orders, strict=True))[self.at.done :]:
            if engine.steps >= total:
                break
            now = [run.plan.kl_weight(engine.steps, first.source.steps) for run in self.runs]
            weights = weights if now == weights else now
            self._step(engine, parts, weights)
            self.at.done += 1
            if not self.schedulers and self.options.schedule is not None:
                self.schedulers = [self._scheduler(run) for run in self.runs]
            if first.plan.unit == "step":
                for scheduler in self.schedulers:
                    scheduler.step()
            stop = asked.signal
            if stop or (self.kept is not None and self.kept.due(engine.steps)):
                self._spend(start, cpu, weights)
                start, cpu = time.perf_counter(), time.process_time()
                self._save(engine, told)
                if stop:
                    raise Stop(stop)
        self._spend(start, cpu, weights)

    def _spend(self, start: float, cpu: float, weights: Sequence[float]) -> None:
        """Each replica's share of the time, and its KL weight of now."""
        active = [run for run in self.runs if not run.why]
        for run in active:
            run.seconds += (time.perf_counter() - start) / len(active)
            run.cpu_seconds += (time.process_time() - cpu) / len(active)
        for run, weight in zip(self.runs, weights, strict=True):
            run.at.weight = weight

    def _all(self) -> Memory:
        return Memory(self.tensors, None, 0, None)

    def _save(self, engine: Replicas, told: dict[str, Any]) -> None:
        """Write the state of all replicas after this step."""
        if self.kept is None:
            return
        self.losses.append(engine.losses())
        state = {"told": told, "members": self.members, "at": dict(vars(self.at)), "marks": self.marks}
        state["losses"] = np.concatenate(self.losses)
        self.kept.save(engine.steps, state | group_state(engine, self.runs, self.sources, self.schedulers))

    def _resumed(self, engine: Replicas, total: int, told: dict[str, Any]) -> list[list[Tensor]] | None:
        """The data order of the epoch that the newest checkpoint was made in; None where there is none."""
        if self.saved is None or self.kept is None:
            return None
        state = self.saved.state
        check_same(state["told"], told, self.kept.folder)
        if self.saved.step > total:
            raise OptionError(
                f"the checkpoint in {self.kept.folder} is of step {self.saved.step}, and {total} steps are asked for: "
                "ask for more"
            )
        if self.options.schedule is not None:
            self.schedulers = [self._scheduler(run) for run in self.runs]
        load_group_state(engine, self.runs, self.schedulers, state)
        for run in self.runs:  # who was not stopped for a reason of its own may go on where more is asked for
            run.why = run.why if run.early or run.error is not None else ""
        self.at, self.marks, self.losses = Position(**state["at"]), state["marks"], [state["losses"]]
        orders = None
        if self.at.done:
            for source, mark in zip(self.sources, self.marks, strict=True):
                source.go_to(mark)
            orders = [source.order() for source in self.sources]
        for source, streams in zip(self.sources, state["sources"], strict=True):
            source.restore(streams)
        set_random_streams(state["random"])
        return orders

    def _step(self, engine: Replicas, parts: Sequence[Tensor], weights: Sequence[float]) -> None:
        transform = self.options.transform
        if transform is not None:
            made = [
                transform(tuple(t[source.numbers(index)] for t in self.tensors), source.noise)
                for source, index in zip(self.sources, parts, strict=True)
            ]
            batch = [torch.stack(items) for items in zip(*made, strict=True)]
            engine.step(torch.stack(list(parts)), batch=batch, kl_weight=weights)
        else:
            engine.step(None if self.sources[0].whole else torch.stack(list(parts)), kl_weight=weights)

    def _scheduler(self, run: Run) -> Any:
        scheduler = self.options.schedule(run.svi.optimiser)  # type: ignore[misc,arg-type]
        scheduler.optimizer._opt_called = True  # the step was made, by a graph
        return scheduler

    def _book(self, engine: Replicas, orders: Sequence[Sequence[Tensor]], last: bool) -> None:
        """Each replica's row of this epoch; who diverged is frozen and says so, who is done is frozen too."""
        losses = np.concatenate([*self.losses, engine.losses()])  # (steps, 2, K)
        self.losses = []
        begun, epoch = engine.steps - len(losses), self.at.epoch
        rows = [len(index) for index in orders[0][: engine.steps - begun]]
        for k, run in enumerate(self.runs):
            if run.why:
                continue
            frozen = engine.errors.get(k)
            good = len(losses) if frozen is None else run.svi.steps - begun
            run.svi.steps = begun + good
            run.evaluations += sum(rows[:good]) * run.svi.pair.evaluations
            if good:
                taken = np.isfinite(losses[:good, :, k]).all(1)  # the others were skipped
                run.record(epoch, list(losses[:good, 0, k][taken]), run.at.weight)
            if frozen is not None:
                run.error, run.why = frozen, f"a value was not finite at step {begun + good + 1}"
            elif run.enough(epoch, last):
                run.why, run.early = run.rule.reason if run.rule is not None else "enough", True
                engine.alive[k] = False


__all__ = ["fit_replicas"]
