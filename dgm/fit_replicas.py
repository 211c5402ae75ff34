"""Many trainings as one: `fit(..., replicas=...)`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .data import as_tensors, split_rows
from .errors import DGMError
from .feeding import Memory
from .flush import flushed
from .graph import Untraceable
from .memory import SHARE, available, is_out_of_memory, step_bytes
from .programs import preserved_rng
from .replica_starts import Starts, Table
from .replicas import Replicas
from .starting import maker
from .training import Fit, Interrupted, Options, Run, floating_type

log = logging.getLogger("dgm")


def fit_replicas(
    model: Any,
    guide: Any,
    data: Sequence[Any],
    replicas: int | Mapping[str, Sequence[Any]],
    options: Options,
) -> list[Fit]:
    """See `dgm.fit`."""
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
                part = _Group(starts, group, tensors, options).train() if whole else one_by_one(starts, group, options)
            except Interrupted as error:
                done.update(error.fits)
                error.fits = dict(sorted(done.items()))
                raise
            except Exception as error:
                if not is_out_of_memory(error) or len(group) == 1:
                    raise
                half = len(group) // 2
                log.warning("out of memory with %d replicas at once: going on with %d", len(group), half)
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


def one_by_one(starts: Starts, members: Sequence[int], options: Options) -> dict[int, Fit]:
    """Where the pair does not allow replicas: the same trainings, one after another."""
    from .fit import fit

    fits: dict[int, Fit] = {}
    table = starts.table
    for k in members:
        model, guide = starts.pair(k)
        single = options.single(table.seeds[k], table.rates[k], table.kl[k])
        if any(one.engine.startswith("eager (") for one in fits.values()):
            single["compile"] = False  # the reason was said once
        try:
            fits[k] = fit(model, guide, starts.own(k), **single)
        except DGMError as error:
            result: Fit | None = getattr(error, "fit", None)
            if result is None:
                raise
            result.error = str(error)  # it diverged, or its `finish` refused: no reason to stop the others
            fits[k] = result
        except Interrupted as error:
            raise Interrupted(error.fit, {**fits, k: error.fit}) from error
        if k != members[0] and single["compile"] != options.compile:
            fits[k].engine = fits[members[0]].engine
    return fits


class _Group:
    """Replicas that fit memory, in one stack."""

    def __init__(self, starts: Starts, members: list[int], tensors: tuple[Tensor, ...], options: Options):
        self.starts, self.options, self.tensors = starts, options, tensors
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
            if len(self.members) == 1 and len(members) > 1:
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
        self.runs.append(options.run(model, guide, source, held_out, plan, table.rates[k], check=check))

    def train(self) -> dict[int, Fit]:
        """The fits by number of replica."""
        if self.untrained:  # no steps to make together: each guide makes its posterior by its `finish`
            return one_by_one(self.starts, self.members, self.options)
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
        )
        with preserved_rng(seeds[0]), flushed():
            try:
                self._go(engine, total)
            except Untraceable as error:
                log.warning("%d replicas run one after another: %s", len(self.members), error)
                return one_by_one(self.starts, self.members, self.options)
            except KeyboardInterrupt as error:
                engine.finish()
                fits = {k: run.result("interrupted") for k, run in zip(self.members, self.runs, strict=True)}
                raise Interrupted(fits[self.members[0]], fits) from error
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

    def _go(self, engine: Replicas, total: int) -> None:
        epoch, first = 0, self.runs[0]
        for run, source in zip(self.runs, self.sources, strict=True):
            if run.held_out is not None and run.svi.optimiser is None:
                batch = source.first()
                run.svi.prepare(*batch, rows=torch.arange(len(batch[0]), device=batch[0].device))
        schedulers: list[Any] = []
        while engine.steps < total and bool(engine.alive.any()):
            epoch += 1
            start, cpu, begun = time.perf_counter(), time.process_time(), engine.steps
            weights = [1.0] * len(self.runs)
            orders = [source.order() for source in self.sources]
            for parts in zip(*orders, strict=True):
                now = [run.plan.kl_weight(engine.steps, first.source.steps) for run in self.runs]
                weights = weights if now == weights else now
                self._step(engine, parts, weights)
                if not schedulers and self.options.schedule is not None:
                    schedulers = [self._scheduler(run) for run in self.runs]
                if first.plan.unit == "step":
                    for scheduler in schedulers:
                        scheduler.step()
                if engine.steps >= total:
                    break
            if first.plan.unit == "epoch":
                for scheduler in schedulers:
                    scheduler.step()
            spent = time.perf_counter() - start, time.process_time() - cpu
            self._book(engine, epoch, begun, orders, weights, spent, engine.steps >= total)
        for run in self.runs:
            run.why = run.why or (f"{epoch} epochs" if first.plan.unit == "epoch" else f"{total} steps")

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

    def _book(
        self,
        engine: Replicas,
        epoch: int,
        begun: int,
        orders: Sequence[Sequence[Tensor]],
        weights: Sequence[float],
        spent: tuple[float, float],
        last: bool,
    ) -> None:
        """Each replica's row of this epoch; who diverged is frozen and says so, who is done is frozen too."""
        losses = engine.losses()  # (steps, 2, K)
        share = len([run for run in self.runs if not run.why])
        rows = [len(index) for index in orders[0][: engine.steps - begun]]
        for k, run in enumerate(self.runs):
            if run.why:
                continue
            bad = np.flatnonzero(~np.isfinite(losses[:, :, k]).all(1))
            good = int(bad[0]) if len(bad) else len(losses)
            run.svi.steps = begun + good
            run.evaluations += sum(rows[:good]) * run.svi.pair.evaluations
            run.seconds += spent[0] / share
            run.cpu_seconds += spent[1] / share
            if good:
                run.record(epoch, list(losses[:good, 0, k]), weights[k])
            if len(bad):
                what = "loss" if not np.isfinite(losses[good, 0, k]) else "gradient"
                run.error = (
                    f"replica {self.members[k]} (seed {run.plan.seed}), step {begun + good + 1}: the {what} is not "
                    "finite; it is frozen with the parameters of its last good step. Train that seed alone to see the "
                    "site, or try a smaller learning rate or clip=10"
                )
                run.why = f"a value was not finite at step {begun + good + 1}"
                log.warning(run.error)
            elif run.enough(epoch, last):
                run.why = run.rule.reason if run.rule is not None else "enough"
                engine.alive[k] = False


__all__ = ["fit_replicas"]
