"""What replicas do where a value is not finite: freeze or skip one of them, and say of it what a single run says."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import OptionError, TrainingError
from .nonfinite import bad_gradients, explain_nonfinite
from .raised import is_numerical

if TYPE_CHECKING:
    from .replica_graph import ReplicaGraph
    from .replicas import Replicas

log = logging.getLogger("dgm")


class ReplicaGuard:
    """Looks at the loss and the gradient's norm of every replica, each by the `Guard` of its own pair.

    A step freezes who is not finite by itself: nothing has to wait for it. The report is made when the losses are read,
    with the noise drawn again from where the generators stood the last time. Where steps are skipped the parameters
    would have moved on by then, and batches that are no mere choice of rows are not kept: these are looked at at once.

    Attributes:
        errors: the report of each replica that is frozen, by its place in the stack.
        at_once: whether every step is looked at at once; None to decide as said.
    """

    def __init__(self, owner: Replicas, names: Sequence[str] | None):
        policies = {svi.guard.policy for svi in owner.svis}
        if len(policies) > 1:
            raise OptionError("replicas must have one policy: some stop at a value that is not finite, and some skip")
        self.owner = owner
        self.freeze = policies == {"stop"}
        self.names = [f"replica {k}" for k in range(owner.count)] if names is None else list(names)
        self.at_once: bool | None = None if self.freeze else True
        self.errors: dict[int, str] = {}
        self._past: list[tuple[ReplicaGraph, Tensor | None, bool]] = []
        self._states: list[Tensor] = []
        self._alive: Any = None

    def before(self) -> None:
        """Before the noise of a step is drawn."""
        if self._alive is None:
            self._alive = self.owner.alive.clone()
            self._states = [generator.get_state() for generator in self.owner.generators]

    def after(self, shape: ReplicaGraph, made: Tensor, index: Tensor | None, batch: Sequence[Tensor] | None) -> None:
        """Look at the losses and norms of a step, `(2, K)`."""
        self._past.append((shape, index, batch is None))
        at_once = batch is not None and self.owner.device.type == "cpu" if self.at_once is None else self.at_once
        if not at_once or math.isfinite(float(made.sum())):
            return
        for k in self._bad(np.isfinite(made.cpu().numpy()).all(0)):
            noise = [eps[k] for eps in shape.noise]
            self._meet(k, self.owner.steps, float(made[0, k]), index, batch, noise)

    def read(self, made: np.ndarray) -> None:
        """Look at the losses and norms of all steps since the last time, `(steps, 2, K)`."""
        past, self._past = self._past, []
        if not past:
            return
        finite = np.isfinite(made[-len(past) :]).all(1)  # (steps, K)
        for k in self._bad(finite.all(0)) if self.freeze else []:
            first = int(np.flatnonzero(~finite[:, k])[0])
            _, index, kept = past[first]
            noise = self._redrawn(k, [shape for shape, _, _ in past[: first + 1]]) if kept else None
            number = self.owner.steps - len(past) + first + 1
            self._meet(k, number, float(made[-len(past) + first, 0, k]), index, None, noise)
        self._alive = None

    def _bad(self, finite: np.ndarray) -> list[int]:
        """Who of the replicas that took part is not finite."""
        took = self._alive.cpu().numpy()
        return [k for k in np.flatnonzero(took & ~finite).tolist() if k not in self.errors]

    def _redrawn(self, k: int, shapes: Sequence[ReplicaGraph]) -> list[Tensor]:
        generator = torch.Generator(self.owner.device)
        generator.set_state(self._states[k])
        noise: list[Tensor] = []
        for shape in shapes:
            noise = shape.draws.sample(generator)
        return noise

    def _meet(
        self,
        k: int,
        number: int,
        loss: float,
        index: Tensor | None,
        batch: Sequence[Tensor] | None,
        noise: Sequence[Tensor] | None,
    ) -> None:
        svi, owner = self.owner.svis[k], self.owner
        what = f"the loss is {loss}" if not np.isfinite(loss) else "the gradient is not finite"
        rows = None if index is None else index[k]

        def report() -> str:
            if noise is None:
                return (
                    f"step {number}: {what}; the transformed batch is not kept: train this seed alone to see the site"
                )
            items = owner._batch(k, index, batch)
            names = self._gradients(k, items, noise, rows)
            return explain_nonfinite(svi.pair, number, what, names, items, rows, noise, svi._start)

        try:
            svi.guard.meet(number, what, report, f"{self.names[k]}, ")
        except TrainingError as error:
            self.errors[k] = f"{error}; it is frozen"
            owner.alive[k] = False
            svi.steps = number - 1
            log.warning(self.errors[k])

    def _gradients(self, k: int, batch: Sequence[Any], noise: Sequence[Tensor], rows: Tensor | None) -> list[str]:
        """Names of the parameters of a replica whose gradient was not finite."""
        svi = self.owner.svis[k]
        with torch.enable_grad():
            try:
                loss = svi.pair.loss(None, batch, list(noise), sizes=svi.sizes, rows=rows)
                found = torch.autograd.grad(loss, list(svi.parameters.values()), allow_unused=True)
            except (ValueError, RuntimeError) as error:
                if not is_numerical(error):
                    raise
                return []
        return bad_gradients(list(svi.parameters), found)


__all__ = ["ReplicaGuard"]
