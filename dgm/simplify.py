"""A traced graph with fewer operations and the same numbers: a traced step costs what its operations' launches cost.

What programs, autograd and vmap leave in a trace is folded: constants, products with 1 and sums with 0, views that
change nothing, the same value computed twice, and sums of slices padded with zeros, which are one concatenation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten: Any = torch.ops.aten
Node = Any  # fx.Node, whose arguments have a type that says nothing

_FILLED = {
    aten.full.default: lambda args: args[1],
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
    aten.zeros.default: lambda args: 0.0,
    aten.zeros_like.default: lambda args: 0.0,
    aten.new_zeros.default: lambda args: 0.0,
    aten.ones.default: lambda args: 1.0,
    aten.ones_like.default: lambda args: 1.0,
    aten.new_ones.default: lambda args: 1.0,
    aten.scalar_tensor.default: lambda args: args[0],
}
_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
    aten.unbind.int,
    operator.getitem,
}
_LAYOUT = {aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default, aten.view_as_real.default}
_SHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_TURNS = {aten.transpose.int, aten.t.default}
_SCALED = {aten.mul.Tensor, aten.mul.Scalar}
_DIVIDED = {aten.div.Tensor, aten.div.Scalar}
_ELEMENTWISE = {
    *_SCALED,
    *_DIVIDED,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.log.default,
    aten.exp.default,
    aten.sqrt.default,
}


def simplified(module: fx.GraphModule) -> fx.GraphModule:
    """The graph module, its graph made smaller; left as it is where it changes a tensor in place, or reads its strides.

    Outputs stay tensors of their own: none is an input, a constant, or another output.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> module = make_fx(lambda x: (x * torch.ones(3)).pow(1.0) + torch.zeros(3) + x.exp() - x.exp())(torch.ones(3))
    >>> len(simplified(module).graph.nodes)
    5
    """
    graph = module.graph
    _drop_fresh(graph)
    if any(_mutates(node) or node.target in _LAYOUT for node in graph.nodes):
        return module
    _Pass(graph).run()
    graph.eliminate_dead_code()
    module.recompile()
    return module


class _Pass:
    """One way through a graph, in order: every node has its operands simplified before it is looked at."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.constants: dict[Node, float] = {}
        self.seen: dict[Any, Node] = {}

    def run(self) -> None:
        *nodes, output = self.graph.nodes
        for node in nodes:
            if node.op == "placeholder":
                continue
            new = self._simpler(node)
            if new is not node:
                node.replace_all_uses_with(new)
        self._fill(output)
        _own_outputs(self.graph, output)

    def _simpler(self, node: Node) -> Node:
        """The node that stands for this one from here on."""
        value = self._constant(node)
        if value is not None:
            self.constants[node] = value
            return node  # without a reader that needs it as a tensor it is dead
        new = self._folded(node)
        if new is not node:
            return new
        self._fill(node)
        if node.target in _SHAPES:
            node.target = aten.reshape.default  # which asks for no order in memory: copies may be left out before it
        if node.target is aten.add.Tensor:
            _join_slices(self.graph, node)
        return self.seen.setdefault(_key(node), node) if _repeatable(node) else node

    # --- constants ---------------------------------------------------------------------------------------------------

    def _constant(self, node: Node) -> float | None:
        """The one number that all elements of a floating tensor are known to be."""
        if not _is_floating(node):
            return None
        if node.target in _FILLED:
            return _number(_FILLED[node.target](node.args), node)
        if node.target is aten._to_copy.default and not _is_node(node.args[0]):
            return _number(node.args[0], node)
        if _is_delta(node):
            return 0.0
        inputs = [self.constants.get(a) if _is_node(a) else a for a in node.args]
        if not inputs or inputs[0] is None:
            return None
        if node.target in _VIEWS or node.target is aten.clone.default:
            return inputs[0]
        if node.target in (aten.sum.dim_IntList, aten.sum.default):
            return 0.0 if inputs[0] == 0.0 else None
        if node.target in _ELEMENTWISE and None not in inputs and not node.kwargs:
            dtype = node.meta["val"].dtype
            return _number(node.target(torch.tensor(inputs[0], dtype=dtype), *inputs[1:]), node)
        return None

    def _fill(self, node: Node) -> None:
        """Operands that are constants, as tensors again; one for each shape and number."""
        for operand in node.all_input_nodes:
            if operand not in self.constants or operand.target is aten.full.default:
                continue
            like = operand.meta["val"]
            key = ("full", tuple(like.shape), like.dtype, like.device, repr(self.constants[operand]))
            if key not in self.seen:
                first = next(n for n in self.graph.nodes if n.op != "placeholder")
                with self.graph.inserting_before(first):
                    made = self.graph.call_function(
                        aten.full.default,
                        (list(like.shape), self.constants[operand]),
                        {"dtype": like.dtype, "device": like.device},
                    )
                made.meta["val"] = torch.empty_like(like, memory_format=torch.contiguous_format)
                self.constants[made], self.seen[key] = self.constants[operand], made
            node.replace_input_with(operand, self.seen[key])

    # --- operations that do nothing ----------------------------------------------------------------------------------

    def _folded(self, node: Node) -> Node:
        if not node.args or not _is_node(node.args[0]) or not isinstance(node.meta.get("val"), Tensor):
            return node
        x = node.args[0]
        if node.target in _SHAPES or node.target is aten.expand.default:
            return self._view(node, x)
        if node.target is aten._to_copy.default and set(node.kwargs) <= {"dtype"}:
            return x if _alike(x, node) else node
        if node.target in _TURNS and x.target is node.target and x.args[1:] == node.args[1:]:
            before = x.args[0]
            return before if _is_node(before) and _alike(before, node) else node
        if node.target is aten.sum.dim_IntList:
            return self._sum_of_one(node, x)
        if node.target in _ELEMENTWISE and _is_floating(node):
            return self._arithmetic(node, x)
        return node

    def _view(self, node: Node, x: Node) -> Node:
        if _alike(x, node):
            return x
        kept = x.target in _SHAPES or x.target is aten.unsqueeze.default  # nothing but the shape is another
        before = x.args[0] if kept and node.target in _SHAPES else None
        if not _is_node(before):
            return node
        return self._insert(node, aten.reshape.default, before, list(node.meta["val"].shape))

    def _sum_of_one(self, node: Node, x: Node) -> Node:
        """A sum over axes of length 1 is a view."""
        if x.meta["val"].numel() != node.meta["val"].numel() or node.kwargs:
            return node
        return self._insert(node, aten.reshape.default, x, list(node.meta["val"].shape))

    def _arithmetic(self, node: Node, x: Node) -> Node:
        if node.target is aten.neg.default:
            before = x.args[0] if x.target is aten.neg.default else None
            return before if _is_node(before) and _alike(before, node) else node
        if len(node.args) != 2 or node.kwargs:
            return node
        y = node.args[1]
        number = self.constants.get(y) if _is_node(y) else y
        if number is None and x in self.constants and _is_node(y):
            if node.target not in (aten.mul.Tensor, aten.add.Tensor):
                return node
            x, number = y, self.constants[x]
        if number is None or not isinstance(number, (int, float)) or not _alike(x, node):
            return node
        return self._with_number(node, x, float(number))

    def _with_number(self, node: Node, x: Node, number: float) -> Node:
        """An operation of a tensor and a number, which is cheaper than one of two tensors and may be none at all."""
        scaled = node.target in _SCALED or node.target in _DIVIDED
        added = node.target in (aten.add.Tensor, aten.sub.Tensor)
        if (number == 1.0 and (scaled or node.target is aten.pow.Tensor_Scalar)) or (number == 0.0 and added):
            return x
        if (number == -1.0 and scaled) or (number == 0.0 and node.target is aten.rsub.Scalar):
            return self._insert(node, aten.neg.default, x)
        if (scaled or added) and _is_node(node.args[1]):
            return self._insert(node, node.target, x, number)
        return node

    def _insert(self, node: Node, target: Callable[..., Any], *args: Any) -> Node:
        """An operation in the place of `node`, with its shape; simplified itself."""
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args)
        made.meta["val"] = node.meta["val"]
        return self._simpler(made)


def _join_slices(graph: fx.Graph, node: Node) -> None:
    """`a + pad(s1) + pad(s2) + ...` as `a + cat(s1, s2, ...)`, for slices along one axis that do not overlap.

    The last sum of such a chain does it: those before it, which nobody else reads, die.
    """
    if any(user.target is aten.add.Tensor and node.users == {user: None} for user in node.users):
        return
    rest, parts, chain = [], [], [node]
    while chain:
        for term in chain.pop().args[:2]:
            if not _is_node(term) or term.meta["val"].shape != node.meta["val"].shape:
                return
            if len(term.users) == 1 and term.target is aten.add.Tensor and not term.kwargs:
                chain.append(term)
            elif term.target is aten.slice_backward.default and term.args[5] == 1:
                parts.append(term)
            else:
                rest.append(term)
    if len(parts) < 2 or len({part.args[2] for part in parts}) != 1 or node.kwargs:
        return
    shape, dim = list(node.meta["val"].shape), parts[0].args[2]
    pieces: list[Node] = []
    with graph.inserting_before(node):
        at = 0
        for part in sorted(parts, key=lambda part: part.args[3]):
            start, end = part.args[3], min(part.args[4], shape[dim])
            if start < at or end <= start:
                return
            pieces += [_zeros(graph, node, dim, start - at)] if start > at else []
            pieces.append(part.args[0])
            at = end
        pieces += [_zeros(graph, node, dim, shape[dim] - at)] if at < shape[dim] else []
        joined = graph.call_function(aten.cat.default, (pieces, dim))
        joined.meta["val"] = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
        for term in rest[1:]:
            joined = graph.call_function(aten.add.Tensor, (joined, term))
            joined.meta["val"] = node.meta["val"]
        if rest:
            node.args = (rest[0], joined)
        else:
            node.replace_all_uses_with(joined)


def _zeros(graph: fx.Graph, like: Node, dim: int, length: int) -> Node:
    shape, value = list(like.meta["val"].shape), like.meta["val"]
    shape[dim] = length
    made = graph.call_function(aten.full.default, (shape, 0.0), {"dtype": value.dtype, "device": value.device})
    made.meta["val"] = value.new_empty(shape)
    return made


def _own_outputs(graph: fx.Graph, output: Node) -> None:
    """Copies of outputs that are views of inputs, constants or one another: who gets them may change them in place."""
    results, taken = list(output.args[0]) if isinstance(output.args[0], (tuple, list)) else [output.args[0]], set()
    for i, node in enumerate(results):
        if not _is_node(node):
            continue
        base, spread = node, False
        while base.target in _VIEWS and _is_node(base.args[0]):
            base, spread = base.args[0], spread or base.target is aten.expand.default
        if base in taken or spread or base.op != "call_function":
            with graph.inserting_before(output):
                results[i] = graph.call_function(
                    aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            results[i].meta = dict(node.meta)
        taken.add(base)
    output.args = (type(output.args[0])(results),) if isinstance(output.args[0], (tuple, list)) else (results[0],)


def _drop_fresh(graph: fx.Graph) -> None:
    """`empty().fill_()` that nobody reads, and `empty().copy_(noise)`: how torch's distributions met their noise."""
    for node in reversed(list(graph.nodes)):
        target: Node = node.args[0] if _mutates(node) else None
        if not _is_node(target) or set(target.users) != {node}:
            continue
        if target.target not in (aten.empty.memory_format, aten.new_empty.default):
            continue
        if node.target is aten.copy_.default and _alike(node.args[1], node):
            source: Node = node.args[1]
            node.replace_all_uses_with(source)
        if not node.users:
            graph.erase_node(node)
            graph.erase_node(target)


def _is_delta(node: Node) -> bool:
    """`(x == x).float().log()`, the log-density of Pyro's Delta at its own value: -inf for NaN alone.

    That value has a density under the model too, so that a step with NaN is stopped by its loss all the same.
    """
    if node.target is not aten.log.default:
        return False
    cast = node.args[0]
    if not _is_node(cast) or cast.target is not aten._to_copy.default:
        return False
    same = cast.args[0]
    return _is_node(same) and same.target is aten.eq.Tensor and same.args[0] is same.args[1]


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _repeatable(node: Node) -> bool:
    """Whether the same operation of the same operands is the same value."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    tags = getattr(node.target, "tags", None)
    return node.op == "call_function" and tags is not None and torch.Tag.nondeterministic_seeded not in tags


def _key(node: Node) -> Any:
    return node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items()))


def _alike(a: Node, b: Node) -> bool:
    """Whether one tensor may stand for another: shape, type and device."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _number(value: Any, node: Node) -> float | None:
    """A number as the node's type holds it; None for what is not finite, or not known."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return None
    held = float(torch.as_tensor(value, dtype=node.meta["val"].dtype))
    return held if math.isfinite(held) else None


__all__ = ["simplified"]
