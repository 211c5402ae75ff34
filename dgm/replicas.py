"""Many trainings of one kind as one computation: seeds, splits, step sizes, prior scales side by side.

Parameters, optimiser state, noise and numbers carry a replica axis (K, ...) in front; one vmap over it is the step of
all. Replica k is the single run with its seed: its noise comes from its own generator, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError, OptionError
from .flush import flushed
from .graph import scalars
from .pace import Compile, Kind
from .replica_graph import ReplicaGraph
from .replica_guard import ReplicaGuard
from .rules import Counter, Numbers, Rule, groups_of, rule_of, state_of
from .svi import SVI


class Replicas:
    """K pairs of one structure, trained as one.

    Args:
        svis: one for each replica, prepared by itself where it is not; their parameters become slices of one stack.
        data: tensors with rows first, shared by all.
        seeds: `(K,)` of each replica's noise; default 0 to K - 1.
        own: rows of the data that replica k may use, `(K, N_k)`; None for all.
        compile: "trace", "inductor" or "auto", see `SVI`.
        horizon: how many steps the run will have, if that is known.
        names: what messages call each replica; default "replica 0", ...

    Attributes:
        alive: `(K,)`; False for a replica that met a value that is not finite, or was stopped. It does not change any
            more, and changes no other.
        errors: the report of each replica that is frozen, by its number: step, rows, site and parameter. What a replica
            does at a value that is not finite is the `nonfinite` of its `SVI`: "stop" freezes it at the first such
            step, "skip" leaves it as it is for that step, until its budget of `skips` is used up.

    Raises:
        ModelError: the replicas differ in the names or shapes of their parameters.
        Untraceable: at the first step of a shape, where the pair has no graph or no vmap.
    """

    def __init__(
        self,
        svis: Sequence[SVI],
        data: Sequence[Tensor],
        *,
        seeds: Sequence[int] | None = None,
        own: Tensor | None = None,
        compile: Compile = "auto",
        horizon: int | None = None,
        names: Sequence[str] | None = None,
    ):
        if not svis:
            raise OptionError("no replicas: give at least one")
        if compile is False:
            raise OptionError("replicas run as a graph: compile is 'trace', 'inductor' or 'auto'")
        self.svis, self.data, self.own = list(svis), tuple(data), own
        self.count, self.device = len(self.svis), self.data[0].device
        chosen = range(self.count) if seeds is None else seeds
        self.generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in chosen]
        self.compile, self.horizon = compile, horizon
        self.alive = torch.ones(self.count, dtype=torch.bool, device=self.device)
        self.steps = 0
        self.guard = ReplicaGuard(self, names)
        self.uncompiled: str | None = None
        self.kind: Kind = "trace"
        self._trail: list[Tensor] = []
        self._shapes: dict[Any, ReplicaGraph] = {}
        self._kl: Any = None
        self.parameters: list[Tensor] = []

    # --- the stack -------------------------------------------------------------------------------------------------

    def stack(self) -> None:
        """Make one stack of every parameter and state; those of each replica become slices of it."""
        first = self.svis[0].parameters
        for k, svi in enumerate(self.svis[1:], 1):
            theirs = {name: tuple(p.shape) for name, p in svi.parameters.items()}
            for name, p in first.items():
                if theirs.get(name) != tuple(p.shape):
                    raise ModelError(
                        f"replicas must have one structure: parameter {name!r} is {tuple(p.shape)} in replica 0 and "
                        f"{theirs.get(name, 'missing')} in replica {k}; train them one by one"
                    )
            if len(theirs) != len(first):
                extra = sorted(set(theirs) - set(first))[0]
                raise ModelError(f"replicas must have one structure: replica {k} alone has the parameter {extra!r}")
        optimisers = [svi._optimiser() for svi in self.svis]
        each = [list(svi.parameters.values()) for svi in self.svis]  # (K, P)
        self.parameters = [_joined([ps[i] for ps in each]) for i in range(len(first))]
        rules = [rule_of(optimiser) for optimiser in optimisers]
        self.rule = rules[0] if all(type(rule) is type(rules[0]) for rule in rules) else None
        self.states: list[list[Tensor]] = []
        if self.rule is None:
            return
        self.groups = groups_of(optimisers[0], each[0])
        found = [state_of(o, self.rule, ps) for o, ps in zip(optimisers, each, strict=True)]  # (K, P, slots)
        for i in range(len(first)):
            self.states.append([])
            for j, slot in enumerate(self.rule.slots):
                stack = torch.stack([found[k][i][j] for k in range(self.count)])
                self.states[i].append(stack)
                for k, optimiser in enumerate(optimisers):
                    optimiser.state[each[k][i]][slot] = stack[k]
        self._counters = [Counter(o, ps) for o, ps in zip(optimisers, each, strict=True)]
        begun = [self.steps - counter.steps for counter in self._counters]
        self._lag = [lag - len(svi.skipped) for lag, svi in zip(begun, self.svis, strict=True)]
        self._numbers = Numbers(self.rule, optimisers, self.parameters[0])
        self._count()

    def _count(self) -> None:
        """Tell the optimisers' numbers who skipped how many steps: those are none of its own."""
        for k, (lag, svi) in enumerate(zip(self._lag, self.svis, strict=True)):
            self._numbers.set_behind(k, lag + len(svi.skipped))

    def _constants(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters in which the replicas differ, stacked; the others are read where they are."""

        def fixed(svi: SVI) -> dict[str, Tensor]:
            held = dict(svi.pair.owners.named_buffers())
            held.update({n: p for n, p in svi.pair.owners.named_parameters() if not p.requires_grad})
            return held

        every = [fixed(svi) for svi in self.svis]
        names = [n for n, v in every[0].items() if any(not _same(v, other.get(n)) for other in every[1:])]
        for name in names:
            for k, other in enumerate(every):
                if name not in other or other[name].shape != every[0][name].shape:
                    raise ModelError(f"replicas must have one structure: buffer {name!r} of replica {k} differs")
        return {name: torch.stack([other[name].detach() for other in every]) for name in names}

    # --- a step ----------------------------------------------------------------------------------------------------

    def step(
        self,
        index: Tensor | None = None,
        *,
        batch: Sequence[Tensor] | None = None,
        kl_weight: float | Sequence[float] = 1.0,
    ) -> None:
        """One step of every replica that is alive.

        Args:
            index: `(K, B)`, rows of each replica's minibatch, among its own; None for all rows of the data.
            batch: the minibatches themselves, `(K, B, ...)`, where they are no mere choice of rows.
            kl_weight: weight of the latents' terms, one or one for each replica.
        """
        with torch.no_grad(), flushed():
            start = time.perf_counter()
            shape = self._shape(index, batch)
            if kl_weight is not self._kl:  # nearly always the same object
                self._kl = kl_weight
                weights = [kl_weight] * self.count if isinstance(kl_weight, (int, float)) else list(kl_weight)
                parts = [scalars(s.sizes, w, self.parameters[0]) for s, w in zip(self.svis, weights, strict=True)]
                self._scalars = torch.stack(parts)
            self.guard.before()
            for fill, generator in shape.fills:
                fill(generator=generator)
            rest = [*shape.constants.values(), *shape.data(self, index, batch), *shape.noise, self._scalars]
            if index is not None:
                rest.append(index)
            self.steps += 1
            self.kind = shape.kind(self, rest)
            made = shape.run(self, rest)
            self._trail.append(made)
            self.guard.after(shape, made, index, batch)
            shape.pace.add(self.kind, time.perf_counter() - start)

    def _shape(self, index: Tensor | None, batch: Sequence[Tensor] | None) -> ReplicaGraph:
        parts = (index, *(batch or ()))
        key = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in parts)
        if key not in self._shapes:
            batches = [self._batch(k, index, batch) for k in range(self.count)]
            rows = [None if index is None else index[k] for k in range(self.count)]
            with torch.enable_grad():
                if not self.parameters:
                    for svi, items, chosen in zip(self.svis, batches, rows, strict=True):
                        if svi.optimiser is None:
                            svi.prepare(*items, rows=chosen)
                    self.stack()
                self._shapes[key] = ReplicaGraph(self, batches, rows, index is not None, batch is not None)
        return self._shapes[key]

    def _batch(self, k: int, index: Tensor | None, batch: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        if batch is not None:
            return tuple(t[k] for t in batch)
        if index is None:
            return self.data if self.own is None else tuple(t[self.own[k]] for t in self.data)
        chosen = index[k] if self.own is None else self.own[k][index[k]]
        return tuple(t[chosen] for t in self.data)

    def numbers(self) -> Tensor:
        """The optimisers' numbers of this step, `(K, groups, numbers)`."""
        if not self.guard.freeze:
            self._count()
        return self._numbers(self.steps)

    def _rule(self) -> Rule:
        if self.rule is None:
            raise OptionError("this optimiser has no rule")
        return self.rule

    # --- what came of it -------------------------------------------------------------------------------------------

    @property
    def engine(self) -> str:
        """How the last step ran, and why not faster."""
        return self.kind + (f" ({self.uncompiled})" if self.uncompiled is not None else "")

    def losses(self) -> np.ndarray:
        """Losses and gradient norms of the steps since the last call, `(steps, 2, K)`."""
        made = self._look()
        self._trail = []
        return made

    def _look(self) -> np.ndarray:
        """The losses that nobody has read yet; who is not finite among them is reported."""
        made = torch.stack(self._trail).double().cpu().numpy() if self._trail else np.zeros((0, 2, self.count))
        self.guard.read(made)
        return made

    @property
    def errors(self) -> dict[int, str]:
        """The report of each replica that is frozen, by its number."""
        return self.guard.errors

    def finish(self) -> None:
        """Give every replica its parameters and moments as tensors of its own, and the number of steps made."""
        if not self.parameters:
            return  # nothing was begun
        self._look()
        for svi, alive in zip(self.svis, self.alive.tolist(), strict=True):
            for p in svi.parameters.values():
                p.data = p.data.clone()
                state = svi._optimiser().state.get(p, {})
                state.update({n: v.clone() for n, v in state.items() if isinstance(v, Tensor) and v.dim()})
            svi.steps = self.steps if alive else svi.steps
        if self.rule is None:
            return
        for counter, svi, lag in zip(self._counters, self.svis, self._lag, strict=True):
            counter.pending = svi.steps - lag - len(svi.skipped) - counter.base
            counter.write()


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One stack `(K, ...)` of parameters, which become its slices."""
    stack = torch.stack([p.detach() for p in parameters])
    for k, p in enumerate(parameters):
        p.data = stack[k]
    return stack


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


__all__ = ["Replicas"]
