"""The whole step as one graph: loss, gradients, clipping, a guard against values that are not finite, and the update.

Parameters and the optimiser's state are changed in place. Compiled, the graph is a few fused kernels; nothing of Pyro
and nothing of Python stands between two of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .graph import Untraceable, one_line, trace
from .rules import Rule
from .threads import fewest_threads

log = logging.getLogger("dgm")

Step = Callable[..., Any]

OPTIONS = {"size_asserts": False}
"""Of the compiler: shapes and strides are those of the trace, which is kept by shape and fed contiguous tensors."""
TRUSTING = {**OPTIONS, "cpp.vec_isa_ok": True}
"""The same without trying out every vector instruction set that the processor names, which takes 1.6 s a process."""


class CompilerFailed(Exception):
    """The compiler is missing or failed; the message is its first line."""


def whole_step(
    gradients: Step,
    rule: Rule,
    groups: Sequence[int],
    forms: Sequence[tuple[Any, ...]],
    unused: Sequence[bool],
    clip: float | None,
    replicas: bool = False,
    freeze: bool = True,
    look: bool = False,
) -> Step:
    """`(*parameters, *states, numbers, [alive], *rest) -> (2,) or (2, K)`: the loss and the gradient's norm.

    Args:
        gradients: `(*parameters, *rest) -> (loss, *gradients)`.
        rule: the optimiser's update. groups: group of each parameter. forms: form of each group.
        unused: parameters without a gradient; they are left as they are.
        clip: largest norm of the gradient.
        replicas: whether loss, gradients, parameters and numbers carry a replica axis `(K, ...)` in front. `alive`,
            `(K,)` bool, says who takes part.
        look: whether the program may look at the result of the check, so that a step in which all is finite chooses
            nothing; a step that is to be compiled may not, and on a GPU it would wait.
        freeze: whether `alive` is changed in place: a replica whose loss or gradient is not finite is frozen for good.

    A step that is not finite changes nothing: the last good parameters stay.
    """
    count, slots = len(groups), len(rule.slots)

    def step(*inputs: Tensor) -> Tensor:
        values, rest = list(inputs[:count]), list(inputs[count:])
        states = [rest[i * slots : (i + 1) * slots] for i in range(count)]
        numbers, rest = rest[count * slots], rest[count * slots + 1 :]
        alive = rest.pop(0) if replicas else None
        loss, *found = gradients(*values, *rest)
        rows = len(loss) if replicas else 1
        squares = [_squares(g, rows) for g, idle in zip(found, unused, strict=True) if not idle]
        norm = torch.stack(squares).sum(0).sqrt().reshape(loss.shape) if squares else torch.zeros_like(loss)
        good = torch.isfinite(loss + norm)
        good = good if alive is None else good & alive
        free = look and bool(good.all())
        shrink = None if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
        for i, (p, g, state) in enumerate(zip(values, found, states, strict=True)):
            if unused[i]:
                continue
            shape = (-1,) + (1,) * (p.dim() - 1) if replicas else ()
            columns = [c.reshape(shape) for c in numbers[..., groups[i], :].unbind(-1)]
            keep = good.reshape(shape)
            g = g if shrink is None else g * shrink.reshape(shape)
            new, moved = rule.update(p, g, state, columns, forms[groups[i]])
            for old, fresh in zip([p, *state], [new, *moved], strict=True):
                if fresh is not old:
                    old.copy_(fresh if free else torch.where(keep, fresh, old))
        if alive is not None and freeze and not free:
            alive.copy_(good)
        return torch.stack([loss, norm])

    return step


def _squares(g: Tensor, rows: int) -> Tensor:
    """The sum of squares of each replica's gradient, `(rows,)`."""
    return g.square().reshape(rows, -1).sum(1)


def linear_in_gradients(rule: Rule, count: int) -> range:
    """Which inputs of a whole step hold something linear in the gradients afterwards: first moments, or parameters.

    Adam's parameters are not: a gradient that is zero but for rounding moves them by a whole step size.
    """
    slots = len(rule.slots)
    return range(count, count + count * slots, slots) if slots else range(count)


def compile_step(step: Step, inputs: Sequence[Tensor], watched: Sequence[int] = ()) -> Step:
    """The step through torch's compiler, without the interpreter's frame in front of it.

    The graph is given to the compiler as it is: nothing is guarded, nothing recompiles, and what is compiled once is
    found again on disk by a later process.

    Raises:
        CompilerFailed: there is no C++ compiler, or the compiler does not take the graph.
        Untraceable: the step has no graph.
    """
    try:
        # seconds to import, and not all of it public: only who compiles depends on it
        import torch._inductor as inductor
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in inputs]
        module = trace(step, fakes)
        constants = _lift_constants(module)
        examples: list[Any] = [*fakes, *(mode.from_tensor(t, static_shapes=True) for t in constants)]
        with tracing(TracingContext(mode)):  # without one the compiler neither reads nor writes its cache on disk
            try:
                compiled = inductor.compile(module, examples, options=TRUSTING)
            except Exception:  # a compiler older than the processor: let it find out what it knows
                from torch._inductor.cpu_vec_isa import valid_vec_isa_list

                valid_vec_isa_list.cache_clear()
                compiled = inductor.compile(module, examples, options=OPTIONS)
    except Untraceable:
        raise
    except Exception as error:  # of the compiler there is no list of what it raises
        raise CompilerFailed(_cause(error)) from error

    def run(*given: Tensor) -> Any:
        return compiled(*given, *constants)

    _verify(step, run, inputs, watched)
    return fewest_threads(run, inputs)


def _verify(step: Step, compiled: Step, inputs: Sequence[Tensor], watched: Sequence[int]) -> None:
    """Hold the compiled step against the step.

    Raises:
        CompilerFailed: they differ by more than rounding: compilers err too.
    """
    results = []
    with torch.no_grad():
        for function in (step, compiled):
            given = [t.detach().clone() for t in inputs]
            out = function(*given)
            results.append([*([out] if isinstance(out, Tensor) else out), *(given[i] for i in watched)])
    for mine, theirs in zip(*results, strict=True):
        finite = mine[torch.isfinite(mine)].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * scale + 1e-12, equal_nan=True):
            raise CompilerFailed("the compiler's code gives other numbers than the graph that it was given")


def _lift_constants(module: Any) -> list[Tensor]:
    """Make inputs of the tensors that a trace met outside of its inputs (buffers): they are read at each step."""
    graph = module.graph
    found: dict[str, tuple[Any, Tensor]] = {}
    after = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, node.target, None)
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue  # numbers are folded into the code
        if node.target not in found:
            with graph.inserting_after(after):
                after = graph.placeholder(f"constant_{len(found)}")
                after.meta = dict(node.meta)
            found[node.target] = (after, value)
        node.replace_all_uses_with(found[node.target][0])
        graph.erase_node(node)
    module.recompile()
    return [value for _, value in found.values()]


def _cause(error: BaseException) -> str:
    """What the compiler complains of, without its traceback of traces."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


__all__ = ["CompilerFailed", "Untraceable", "compile_step", "whole_step"]
