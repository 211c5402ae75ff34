"""The updates of Adam, AdamW and SGD as pure functions of tensors, so that they can be part of a step's graph.

The optimiser stays torch's own: its options are read anew at each step (schedules cost no new graph) and its state is
kept where it keeps it, so that a run may change between the optimiser itself and the rule at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Rule:
    """One step of an optimiser: `(p, g, state, numbers) -> (p', state')`, elementwise.

    Attributes:
        slots: names of the optimiser's state tensors that are shaped as their parameter.
    """

    slots: tuple[str, ...] = ()

    def numbers(self, group: dict[str, Any], step: int) -> list[float]:
        """What the update of step 1, 2, ... takes from the options of a parameter group, as float64 numbers."""
        raise NotImplementedError

    def form(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What of the options decides the formula itself: another form needs another graph."""
        raise NotImplementedError

    def update(
        self, p: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor], form: tuple[Any, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """The new parameter and the new state; numbers are those of `numbers`, each broadcast over p."""
        raise NotImplementedError


class AdamRule(Rule):
    """m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  p = p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    The two corrections are moved into the step size and eps: one division and one root for each parameter, and they
    are what an update costs. (Kingma and Ba, "Adam: a method for stochastic optimization", 2015; decoupled decay:
    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.)
    """

    slots = ("exp_avg", "exp_avg_sq")

    def __init__(self, decoupled: bool):
        self.decoupled = decoupled

    def numbers(self, group: dict[str, Any], step: int) -> list[float]:
        b1, b2 = (float(b) for b in group["betas"])
        lr, eps, decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        root = (1 - b2**step) ** 0.5
        decay = 1 - lr * decay if self.decoupled else decay
        return [lr * root / (1 - b1**step), eps * root, decay, 1 - b1, b2, 1 - b2]

    def form(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (bool(group["weight_decay"]),)

    def update(
        self, p: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor], form: tuple[Any, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        (m, v), (size, eps, decay, rate, keep, take) = state, numbers
        if form[0] and self.decoupled:
            p = p * decay
        elif form[0]:
            g = g + decay * p
        m = _normal(m + rate * (g - m))
        v = keep * v + take * g * g
        return p - size * m / (v.sqrt() + eps), [m, v]


class SGDRule(Rule):
    """b = mu b + g,  p = p - lr b;  Nesterov: p = p - lr (g + mu b)."""

    def __init__(self, moves: bool):
        self.slots = ("momentum_buffer",) if moves else ()

    def numbers(self, group: dict[str, Any], step: int) -> list[float]:
        return [float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])]

    def form(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (bool(group["weight_decay"]), bool(group["momentum"]), bool(group["nesterov"]))

    def update(
        self, p: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor], form: tuple[Any, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        (lr, decay, momentum), (decays, moves, nesterov) = numbers, form
        if decays:
            g = g + decay * p
        if not moves:
            return p - lr * g, list(state)
        b = _normal(momentum * state[0] + g)
        return p - lr * (g + momentum * b if nesterov else b), [b]


def _normal(moment: Tensor) -> Tensor:
    """A decaying moment that ends in zero, and not among the denormal numbers.

    The moment of a unit that is dead halves every few steps and would stay denormal for good; a processor then needs a
    hundred times as long for it, in every thread that does not flush such numbers (`dgm.flush`).
    """
    return torch.where(moment.abs() > 1e8 * torch.finfo(moment.dtype).tiny, moment, 0.0)


def rule_of(optimiser: torch.optim.Optimizer) -> Rule | None:
    """The rule of a torch optimiser; None for those that are only known as code.

    >>> rule_of(torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1, momentum=0.9)).slots
    ('momentum_buffer',)
    >>> rule_of(torch.optim.RMSprop([torch.zeros(2, requires_grad=True)])) is None
    True
    """
    groups = optimiser.param_groups
    if optimiser._optimizer_step_pre_hooks or optimiser._optimizer_step_post_hooks:
        return None  # somebody wants to see each of its steps
    if any(group.get("maximize") or group.get("differentiable") for group in groups):
        return None
    if type(optimiser) is torch.optim.SGD:
        moves = any(group["momentum"] for group in groups)
        return None if any(group["dampening"] for group in groups) else SGDRule(moves)
    if type(optimiser) in (torch.optim.Adam, torch.optim.AdamW):
        if any(group["amsgrad"] for group in groups):
            return None
        decoupled = {bool(g.get("decoupled_weight_decay", type(optimiser) is torch.optim.AdamW)) for g in groups}
        return AdamRule(decoupled.pop()) if len(decoupled) == 1 else None
    return None


def state_of(optimiser: torch.optim.Optimizer, rule: Rule, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """The optimiser's state tensors of each parameter, made as the optimiser makes them where it has none yet."""
    found = []
    for p in parameters:
        state = optimiser.state[p]
        if isinstance(rule, AdamRule) and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            if any(g.get("fused") or g.get("capturable") for g in optimiser.param_groups):
                state["step"] = state["step"].to(p.device)
        for slot in rule.slots:
            if state.get(slot) is None:
                state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
        found.append([state[slot] for slot in rule.slots])
    return found


class Counter:
    """The number of steps that an optimiser has made, without touching its counters at each of them.

    An optimiser keeps one counter for each parameter: to move them all costs more than a small model's step. They are
    written when somebody looks: before the optimiser's own step, its `state_dict`, and at the end of a run.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor]):
        self.optimiser, self.parameters = optimiser, parameters
        self.pending = 0
        self.base = self._read()
        optimiser.register_state_dict_pre_hook(lambda _: self.write())

    def _tensors(self) -> list[Tensor]:
        return [self.optimiser.state[p]["step"] for p in self.parameters if "step" in self.optimiser.state.get(p, {})]

    def _read(self) -> int:
        tensors = self._tensors()
        return int(tensors[0]) if tensors else 0

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return self.base + self.pending

    def write(self) -> None:
        """Bring the optimiser's own counters up to date."""
        tensors = self._tensors()
        if self.pending and tensors:
            torch._foreach_add_(tensors, self.pending)
        self.pending, self.base = 0, self._read() if tensors else self.base + self.pending

    def read(self) -> None:
        """The optimiser has made steps of its own."""
        self.base = self._read()


def groups_of(optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[int]:
    """Which parameter group each parameter belongs to."""
    where = {id(p): i for i, group in enumerate(optimiser.param_groups) for p in group["params"]}
    return [where[id(p)] for p in parameters]


def numbers_of(rule: Rule, optimiser: torch.optim.Optimizer, step: int) -> np.ndarray:
    """The rule's numbers of every parameter group, `(groups, numbers)`, float64."""
    return np.array([rule.numbers(group, step) for group in optimiser.param_groups])


class Numbers:
    """The rule's numbers of K optimisers side by side, made for some steps ahead while no option changes.

    Args:
        rule: of all of them.
        optimisers: K of one structure.
        like: a tensor of the dtype and device that the numbers are wanted in.

    """

    AHEAD = 64

    def __init__(self, rule: Rule, optimisers: Sequence[torch.optim.Optimizer], like: Tensor):
        self.rule, self.optimisers, self.like = rule, optimisers, like
        self._groups = [group for optimiser in optimisers for group in optimiser.param_groups]
        names = ("lr", "betas", "momentum", "weight_decay", "eps")
        self._look = itemgetter(*(name for name in names if name in self._groups[0]))
        self.behind = [0] * len(optimisers)
        self._seen: list[Any] = []
        self._first, self._block = 0, like.new_empty(0)

    def __call__(self, step: int) -> Tensor:
        """`(K, groups, numbers)` of step 1, 2, ...; they hold until the next call."""
        options = list(map(self._look, self._groups))
        if options != self._seen or not 0 <= step - self._first < len(self._block):
            fixed = options == self._seen and not any(isinstance(o, Tensor) for row in options for o in row)
            self._fill(step, self.AHEAD if fixed else 1)
            self._seen, self._first = options, step
        return self._block[step - self._first]

    def set_behind(self, k: int, steps: int) -> None:
        """Optimiser k has made so many steps fewer than those that are counted."""
        if self.behind[k] != steps:
            self.behind[k], self._seen = steps, []

    def _fill(self, step: int, count: int) -> None:
        made: dict[Any, np.ndarray] = {}
        found = []
        for optimiser, behind in zip(self.optimisers, self.behind, strict=True):
            key = (behind, *map(self._look, optimiser.param_groups))
            if key not in made:
                made[key] = np.stack([numbers_of(self.rule, optimiser, step + i - behind) for i in range(count)])
            found.append(made[key])
        self._block = torch.from_numpy(np.stack(found, 1)).to(self.like)  # (count, K, groups, numbers)
