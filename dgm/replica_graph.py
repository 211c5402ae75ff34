"""The step of many replicas as one graph: a vmap of one replica's over everything that is its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import explain_draws
from .errors import ModelError
from .graph import Layout, Untraceable, agrees, scalars, trace
from .noise import Recorded, recording
from .pace import SAVED_BY_REPLICAS, Kind, Pace, cost, steady
from .programs import preserved_buffers, preserved_rng, program_name
from .whole import CompilerFailed, compile_step, linear_in_gradients, whole_step

if TYPE_CHECKING:
    from .replicas import Replicas

log = logging.getLogger("dgm")

UPDATE = 20
"""Operations of the update of one parameter, about."""


class ReplicaGraph:
    """What belongs to one shape of minibatches: its graph, its noise, its compiled step."""

    def __init__(
        self,
        owner: Replicas,
        batches: list[tuple[Tensor, ...]],
        rows: list[Tensor | None],
        gathered: bool,
        given: bool,
    ):
        self.pace, self.gathered, self.given = Pace(saved=SAVED_BY_REPLICAS), gathered, given
        self.shared = not given and owner.own is None and not gathered
        self.draws = self._record(owner, batches, rows)
        self.constants = owner._constants()
        first = owner.svis[0]
        if not first.pair.movable:
            raise Untraceable("a function program closes over a module; make it a PyroModule that holds the module")
        names = list(self.constants)
        self.layout = Layout.of(first.parameters, batches[0], self.draws, first.sizes, gathered, names)
        if len(self.layout.places) != len(batches[0]):
            raise Untraceable("a batch of replicas holds tensors only")
        if self.shared:
            self.whole = batches[0]
        elif not given and not gathered:
            self.whole = tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
        device = owner.device
        self.noise = [torch.empty(owner.count, *d.shape, dtype=d.dtype, device=device) for d in self.draws]
        self.views = [[eps[k] for eps in self.noise] for k in range(owner.count)]
        self.fills = [
            (draw.method(view), generator)
            for views, generator in zip(self.views, owner.generators, strict=True)
            for view, draw in zip(views, self.draws, strict=True)
        ]
        self.unused = [False] * len(owner.parameters)
        self.compiled: Any = None
        self._trace(owner, batches, rows)

    def _record(self, owner: Replicas, batches: Sequence[Any], rows: Sequence[Any]) -> Recorded:
        """The draws of a step; all replicas must agree in them."""
        found: list[Recorded] = []
        for svi, batch, chosen in zip(owner.svis, batches, rows, strict=True):
            svi.pair.learn_noise(batch, chosen)
            with preserved_rng(), preserved_buffers(svi.model, svi.guide), recording() as draws:
                svi.pair.loss(None, batch, sizes=svi.sizes, rows=chosen)
            if not svi.pair.pathwise and svi.pair.not_pathwise is not None:
                raise Untraceable(f"site {svi.pair.not_pathwise!r} has no pathwise gradient (score function)")
            if not draws.complete:
                raise Untraceable(explain_draws(svi.pair, batch, chosen))
            if found and list(draws) != list(found[0]):
                raise ModelError(f"replicas must have one structure: {program_name(svi.guide)} draws other noise")
            found.append(draws)
        return found[0]

    def data(self, owner: Replicas, index: Tensor | None, batch: Sequence[Tensor] | None) -> list[Tensor]:
        if batch is not None:
            return list(batch)
        if index is None:
            return list(self.whole)
        chosen = index if owner.own is None else owner.own.gather(1, index)
        return [*owner.data, chosen]

    def _gradients(self, owner: Replicas) -> Any:
        """`(*parameters, *constants, *data, *noise, scalars, [rows])`, each stacked, to stacked loss and gradients."""
        one = self.layout.gradients(owner.svis[0].pair)
        count, tensors = len(owner.parameters) + len(self.constants), len(self.layout.places)
        picked = self.gathered and not self.given
        axes: tuple[int | None, ...] = (0,) * count + (None if self.shared else 0,) * tensors
        many = torch.func.vmap(one, in_dims=axes + (0,) * (len(self.draws) + 1 + self.gathered))

        def compute(*inputs: Tensor) -> Any:
            head, data, tail = inputs[:count], inputs[count : count + tensors], inputs[count + tensors :]
            if picked:
                chosen, tail = tail[0], tail[1:]
                data = tuple(t[chosen] for t in data)  # (K, B, ...)
            return many(*head, *data, *tail)

        return compute

    def _trace(self, owner: Replicas, batches: Sequence[Any], rows: Sequence[Any]) -> None:
        index = torch.stack(list(rows)) if self.gathered else None
        batch = [torch.stack(parts) for parts in zip(*batches, strict=True)] if self.given else None
        for k, views in enumerate(self.views):
            for view, draw in zip(views, self.draws, strict=True):
                draw.fill(view, torch.Generator(owner.device).manual_seed(k))
        like = owner.parameters[0]
        numbers = torch.stack([scalars(svi.sizes, 0.5, like) for svi in owner.svis])
        rest = [*self.constants.values(), *self.data(owner, index, batch), *self.noise, numbers]
        rest += [index] if index is not None else []
        gradients = self._gradients(owner)
        with torch.no_grad():
            self.gradients = trace(gradients, [*owner.parameters, *rest])
            loss, *found = self.gradients.forward(*owner.parameters, *rest)
        for k, svi in enumerate(owner.svis):
            eager = svi.pair.loss(
                None, batches[k], [e[k] for e in self.noise], sizes=svi.sizes, kl_weight=0.5, rows=rows[k]
            )
            expected = torch.autograd.grad(eager, list(svi.parameters.values()), allow_unused=True)
            try:
                agrees(loss[k], [g[k] for g in found], eager.detach(), expected, list(svi.parameters))
            except Untraceable as error:
                raise Untraceable(
                    f"replica {k}: {error}; what differs between replicas must be a tensor of the module (a buffer)"
                ) from error
            self.unused = [g is None for g in expected]
        if owner.rule is not None:
            optimiser: Any = owner.svis[0].optimiser
            forms = [owner.rule.form(group) for group in optimiser.param_groups]
            whole = partial(whole_step, self.gradients.forward, owner.rule, owner.groups, forms, self.unused)
            options: dict[str, Any] = {"clip": owner.svis[0].clip, "replicas": True, "freeze": owner.guard.freeze}
            self.step = whole(**options, look=owner.device.type == "cpu")
            self.whole_step = whole(**options)  # as the compiler takes it

    def _all(self, owner: Replicas, rest: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the whole step."""
        states = [s for state in owner.states for s in state]
        return [*owner.parameters, *states, owner.numbers(), owner.alive, *rest]

    def kind(self, owner: Replicas, rest: Sequence[Tensor]) -> Kind:
        """How the next step runs; compiles it where that is asked for, or pays."""
        if self.compiled is not None:
            return "inductor"
        if owner.compile == "trace" or owner.uncompiled is not None or owner.rule is None:
            return "trace"
        left = None if owner.horizon is None else owner.horizon - (0 if steady() else owner.steps - 1)
        operations = len(self.gradients.graph.nodes) + UPDATE * len(owner.parameters)
        if owner.compile == "auto" and not self.pace.pays("inductor", left, operations):
            return "trace"
        log.info(
            "step %d: compiling %d replicas (about %.0f s)", owner.steps, owner.count, cost("inductor", operations)
        )
        try:
            watched = linear_in_gradients(owner._rule(), len(owner.parameters))
            self.compiled = compile_step(self.whole_step, self._all(owner, rest), watched)
        except (CompilerFailed, Untraceable) as error:
            owner.uncompiled = str(error)
            log.warning("the step of %d replicas is traced, not compiled: %s", owner.count, error)
            return "trace"
        return "inductor"

    def run(self, owner: Replicas, rest: Sequence[Tensor]) -> Tensor:
        if owner.rule is None:
            return self._foreign(owner, rest)
        return (self.compiled or self.step)(*self._all(owner, rest))

    def _foreign(self, owner: Replicas, rest: Sequence[Tensor]) -> Tensor:
        """An optimiser that is only known as code, one after another on the gradients of the graph."""
        loss, *found = self.gradients.forward(*owner.parameters, *rest)
        used = [
            g.square().reshape(owner.count, -1).sum(1) for g, idle in zip(found, self.unused, strict=True) if not idle
        ]
        norm = torch.stack(used).sum(0).sqrt()
        good = owner.alive & torch.isfinite(loss + norm)
        if owner.guard.freeze:
            owner.alive.copy_(good)
        for k, svi in enumerate(owner.svis):
            if not good[k]:
                continue
            shrink = 1.0 if svi.clip is None else min(1.0, svi.clip / (float(norm[k]) + 1e-6))
            for p, g, idle in zip(svi.parameters.values(), found, self.unused, strict=True):
                p.grad = None if idle else g[k] * shrink
            optimiser = svi._optimiser()
            with torch.enable_grad():
                optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return torch.stack([loss, norm])
