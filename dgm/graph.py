"""A step as a graph: loss and gradients traced once for a batch shape; it holds no Python and no Pyro."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .noise import NoiseExhausted, Recorded
from .pair import NotReparameterised, Pair
from .simplify import simplified

REFUSALS = (RuntimeError, NotImplementedError, NoiseExhausted, NotReparameterised, TypeError, ValueError, KeyError)
"""What a trace raises where a program cannot be a graph."""


class Untraceable(Exception):
    """The pair's step cannot be a graph; the message says which operation or site is the cause."""


@dataclass(frozen=True)
class Layout:
    """The order of a step's inputs: parameters, constants, data, noise, scalars, rows.

    Everything that differs from step to step, or from replica to replica, is an input, so that schedules cost no new
    trace and a step is a pure function of them. Scalars are `(1 + plates,)`: the KL weight and the plates' full sizes.

    Attributes:
        parameters: names of what is differentiated. constants: names of buffers and frozen parameters given as inputs.
        batch: the batch with None for its tensors. plates: names of the scaled plates. draws: number of noise tensors.
    """

    parameters: tuple[str, ...]
    constants: tuple[str, ...]
    batch: tuple[Any, ...]
    places: tuple[int, ...]
    plates: tuple[str, ...]
    draws: int
    rows: bool

    @staticmethod
    def of(
        parameters: Mapping[str, Tensor],
        batch: Sequence[Any],
        draws: Sequence[Any],
        sizes: Mapping[str, int],
        rows: bool,
        constants: Sequence[str] = (),
    ) -> Layout:
        places = tuple(i for i, item in enumerate(batch) if isinstance(item, Tensor))
        rest = tuple(None if isinstance(item, Tensor) else item for item in batch)
        return Layout(tuple(parameters), tuple(constants), rest, places, tuple(sizes), len(draws), rows)

    def gradients(self, pair: Pair) -> Callable[..., tuple[Tensor, ...]]:
        """`(*inputs) -> (loss, *gradients)` of the pair, a pure function."""

        def compute(*inputs: Any) -> tuple[Tensor, ...]:
            left = list(inputs)

            def take(count: int) -> list[Any]:
                taken, left[:] = left[:count], left[count:]
                return taken

            values = dict(zip(self.parameters, take(len(self.parameters)), strict=True))
            fixed = dict(zip(self.constants, take(len(self.constants)), strict=True))
            whole = list(self.batch)
            for place, item in zip(self.places, take(len(self.places)), strict=True):
                whole[place] = item
            noise = take(self.draws)
            kl, *full = take(1)[0].unbind(0)
            rows = take(1)[0] if self.rows else None
            sizes = dict(zip(self.plates, full, strict=True))
            gradients, loss = torch.func.grad_and_value(
                lambda p: pair.loss({**p, **fixed}, whole, noise, sizes=sizes, kl_weight=kl, rows=rows)
            )(values)
            return loss, *(gradients[name] for name in self.parameters)

        return compute


def scalars(sizes: Mapping[str, int], kl_weight: float, like: Tensor) -> Tensor:
    """The KL weight and the plates' full sizes as a step takes them, `(1 + plates,)`."""
    return torch.tensor([float(kl_weight), *map(float, sizes.values())], dtype=like.dtype, device=like.device)


def trace(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """A function of tensors as a graph module, without what nobody reads.

    Raises:
        Untraceable: it branches on values, or uses an operation that has no graph; the message names it.
    """
    try:
        module = make_fx(lambda *args: function(*args))(*inputs)
    except REFUSALS as error:
        raise Untraceable(one_line(error)) from error
    _failures_as_nan(module)
    module.graph.eliminate_dead_code()  # before it is held against the program: what runs is what was verified
    module.recompile()
    return simplified(module)


def _failures_as_nan(module: Any) -> None:
    """A factorisation that fails gives NaN instead of raising: the step's guard meets it, and one replica's alone.

    What an operation of linear algebra leaves behind where it fails is finite; its info says that it is worth nothing.
    """
    graph, aten = module.graph, torch.ops.aten
    for check in graph.find_nodes(op="call_function", target=aten._linalg_check_errors.default):
        info = check.args[0]
        if info.op != "call_function" or info.target is not operator.getitem:
            continue
        for out in [node for node in info.args[0].users if node is not info and node.target is operator.getitem]:
            value = out.meta["val"]
            if not value.is_floating_point():
                continue
            with graph.inserting_before(check):
                failed = graph.call_function(aten.ne.Scalar, (info, 0))
                for _ in range(value.dim() - info.meta["val"].dim()):
                    failed = graph.call_function(aten.unsqueeze.default, (failed, -1))
                safe = graph.call_function(aten.masked_fill.Scalar, (out, failed, math.nan))
            safe.meta = dict(out.meta)
            out.replace_all_uses_with(safe, delete_user_cb=lambda user, safe=safe: user is not safe)
        graph.erase_node(check)


class Graph:
    """The negative ELBO and its gradients as one graph of tensor operations.

    The graph is held against the eager loss and gradients once, on noise and scalars that it was not traced with.

    Attributes:
        unused: whether each parameter takes no part in the loss; its gradient is None, as autograd has it.

    Raises:
        Untraceable: tracing failed, or the graph does not give the eager numbers.
    """

    def __init__(
        self,
        pair: Pair,
        parameters: Mapping[str, Tensor],
        batch: Sequence[Any],
        draws: Recorded,
        sizes: Mapping[str, int],
        rows: Tensor | None,
    ):
        if not pair.movable:
            raise Untraceable("a function program closes over a module; make it a PyroModule that holds the module")
        self.layout = Layout.of(parameters, batch, draws, sizes, rows is not None)
        noise = draws.sample()
        like = next(iter(parameters.values()))
        inputs = self.inputs(parameters, batch, noise, scalars(sizes, 1.0, like), rows)
        buffers = {name: value.clone() for name, value in pair.owners.named_buffers()}
        self.module = trace(self.layout.gradients(pair), [t.detach() for t in inputs])
        self.unused = [False] * len(parameters)
        self._verify(pair, parameters, batch, noise, sizes, rows, buffers)

    def inputs(
        self,
        parameters: Mapping[str, Tensor],
        batch: Sequence[Any],
        noise: Sequence[Tensor],
        numbers: Tensor,
        rows: Tensor | None,
    ) -> list[Tensor]:
        """The inputs in the order of the layout."""
        flat = [*parameters.values(), *(batch[i].contiguous() for i in self.layout.places), *noise, numbers]
        return [*flat, rows] if rows is not None else flat

    def noise(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The draws among the inputs."""
        start = len(self.layout.parameters) + len(self.layout.places)
        return list(inputs[start : start + self.layout.draws])

    def _verify(
        self,
        pair: Pair,
        parameters: Mapping[str, Tensor],
        batch: Sequence[Any],
        noise: list[Tensor],
        sizes: Mapping[str, int],
        rows: Tensor | None,
        buffers: Mapping[str, Tensor],
    ) -> None:
        fresh = [torch.randn_like(eps) if eps.is_floating_point() and bool((eps < 0).any()) else eps for eps in noise]
        numbers = scalars(sizes, 0.5, next(iter(parameters.values())))
        loss, gradients = self(self.inputs(parameters, batch, fresh, numbers, rows))
        eager = pair.loss(None, batch, fresh, sizes=sizes, kl_weight=0.5, rows=rows)
        expected = torch.autograd.grad(eager, list(parameters.values()), allow_unused=True)
        for name, value in pair.owners.named_buffers():
            if not torch.equal(value, buffers[name]):
                with torch.no_grad():
                    dict(pair.owners.named_buffers())[name].copy_(buffers[name])
                raise Untraceable(f"buffer {name!r} changes while the program runs (batch normalisation)")
        agrees(loss, list(gradients), eager.detach(), expected, list(parameters))
        self.unused = [g is None for g in expected]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and the gradients in the order of the parameters."""
        with torch.no_grad():
            loss, *gradients = self.module.forward(*inputs)
        return loss, [None if idle else g for g, idle in zip(gradients, self.unused, strict=True)]


def agrees(
    loss: Tensor,
    gradients: Sequence[Tensor | None],
    eager: Tensor,
    expected: Sequence[Tensor | None],
    names: Sequence[str],
) -> None:
    """Hold a graph's numbers against the program's.

    Raises:
        Untraceable: they differ by more than rounding.
    """
    if not torch.allclose(loss, eager, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise Untraceable(
            f"the graph gives {float(loss):.6g} where the program gives {float(eager):.6g}: its control flow "
            "depends on values"
        )
    sizes = (float(g.abs().max()) for g in expected if g is not None and g.numel())
    scale = max((size for size in sizes if math.isfinite(size)), default=0.0)
    for name, mine, theirs in zip(names, gradients, expected, strict=True):
        if mine is None:
            continue
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * scale + 1e-12, equal_nan=True):
            raise Untraceable(f"the graph's gradient of {name!r} is not the program's")


_KNOWN = (
    ("data-dependent control flow", "control flow that depends on values (if, float() or .item() of a tensor)"),
    ("mutate a captured Tensor", "a tensor is changed in place while the program runs (batch normalisation)"),
)


def one_line(error: BaseException) -> str:
    """What an error says, in one line: in our words where torch needs a paragraph."""
    text = str(error).strip()
    for part, words in _KNOWN:
        if part in text:
            return words
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"
