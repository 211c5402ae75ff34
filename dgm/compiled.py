"""A compiled step of one pair: the whole step with the state of torch's own optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .graph import Graph
from .rules import Counter, Rule, groups_of, numbers_of, rule_of, state_of
from .whole import compile_step, linear_in_gradients, whole_step


class CompiledStep:
    """One step, update included, as compiled code that changes parameters and optimiser state in place.

    An optimiser without a rule (`dgm.rules`) runs by itself, on the gradients of the compiled graph.

    Raises:
        CompilerFailed, Untraceable: see `compile_step`.
    """

    def __init__(
        self,
        graph: Graph,
        optimiser: torch.optim.Optimizer,
        parameters: Mapping[str, Tensor],
        clip: float | None,
        inputs: Sequence[Tensor],
        counter: Counter,
    ):
        self.graph, self.optimiser, self.clip, self.counter = graph, optimiser, clip, counter
        self.parameters = list(parameters.values())
        self.rule = rule_of(optimiser)
        self.forms: list[tuple[object, ...]] = []
        self.states: list[Tensor] = []
        if self.rule is None:
            self.run = compile_step(graph.module.forward, inputs)
        else:
            self._compile(self.rule, inputs)

    def _compile(self, rule: Rule, inputs: Sequence[Tensor]) -> None:
        self.forms = [rule.form(group) for group in self.optimiser.param_groups]
        groups = groups_of(self.optimiser, self.parameters)
        step = whole_step(self.graph.module.forward, rule, groups, self.forms, self.graph.unused, self.clip)
        self.run = compile_step(step, self._inputs(rule, inputs), linear_in_gradients(rule, len(self.parameters)))

    def _inputs(self, rule: Rule, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of a step with the optimiser's state and this step's numbers behind the parameters."""
        kept = self.optimiser.state.get(self.parameters[0], {}).get(rule.slots[0]) if rule.slots else None
        if rule.slots and (not self.states or kept is not self.states[0]):  # a state that was loaded is another one
            self.states = [s for state in state_of(self.optimiser, rule, self.parameters) for s in state]
            self.counter.read()
        numbers = torch.from_numpy(numbers_of(rule, self.optimiser, self.counter.steps + 1))
        like, count = self.parameters[0], len(self.parameters)
        return [*inputs[:count], *self.states, numbers.to(like.device, like.dtype), *inputs[count:]]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[float, float]:
        """One step; the loss before it and the norm of its gradient. Where one is not finite nothing was changed."""
        if self.rule is None:
            return self._foreign(inputs)
        if self.forms != [self.rule.form(group) for group in self.optimiser.param_groups]:
            self._compile(self.rule, inputs)  # somebody changed the formula, e.g. gave it a weight decay
        with torch.no_grad():
            loss, norm = self.run(*self._inputs(self.rule, inputs)).tolist()
        if loss - loss == 0 and norm - norm == 0:
            self.counter.pending += 1
        self.optimiser._opt_called = True  # type: ignore[attr-defined]  # what a scheduler asks for
        return loss, norm

    def _foreign(self, inputs: Sequence[Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            loss, *found = self.run(*inputs)
        gradients = [None if idle else g for g, idle in zip(found, self.graph.unused, strict=True)]
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        value, length = float(loss), float(norm)
        if value - value == 0 and length - length == 0:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        return value, length
