"""What a number of a program was made of: latents as leaves, and the way back through autograd's graph.

A trace says that a scale is 0.3; the graph behind it says that it is exp(h), and that h comes from the layer "logvar".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .pair import Minibatch, Pair
from .programs import evaluating, preserved_buffers, preserved_rng

__all__ = ["Chain", "Reading", "base_of", "by_row", "chain_from", "chain_of", "layer_of", "read_pair"]

SHAPES = frozenset(
    "Expand View UnsafeView ReshapeAlias Reshape Select Slice Unsqueeze Squeeze Permute Transpose T Clone Alias Index "
    "IndexSelect Split SplitWithSizes Unbind Chunk ToCopy Contiguous Unflatten AsStrided Flatten".split()
)
"""Operations that move numbers and leave them as they are."""
LINEAR = frozenset("Addmm Mm Bmm Convolution Baddbmm Addbmm Mv Addmv Linear Mkldnn".split())
"""Operations at which a layer's output starts."""


@dataclass(frozen=True)
class Chain:
    """The operations that lead from a tensor back to the first that joins two inputs, or to a leaf.

    names: of the operations, the last one first ("Exp", "Softplus"), without those that only move numbers.
    nodes: of autograd's graph, as `names`. end: the name of the operation where it stops, "" at a leaf.
    leaf: the tensor where it stops. stop: the node where it stops.
    """

    names: tuple[str, ...] = ()
    nodes: tuple[Any, ...] = ()
    end: str = ""
    leaf: Tensor | None = None
    stop: Any = None


def operation(node: Any) -> str:
    """The name of a node of autograd's graph: "Exp" of ExpBackward0."""
    return str(node.name()).partition("Backward")[0].removeprefix("torch::autograd::")


def parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def chain_of(tensor: Any) -> Chain:
    """The operations behind a tensor; an empty chain where nothing was recorded.

    >>> h = torch.zeros(3, requires_grad=True)
    >>> chain_of((h / 2).exp().expand(2, 3)).names
    ('Exp', 'Div')
    """
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return Chain()
    return Chain(leaf=tensor) if tensor.grad_fn is None else chain_from(tensor.grad_fn)


def chain_from(node: Any) -> Chain:
    """As `chain_of`, from a node of the graph on."""
    names: list[str] = []
    nodes: list[Any] = []
    while not hasattr(node, "variable"):
        name, above = operation(node), parents(node)
        square = len(above) == 2 and above[0] is above[1] and name == "Mul"
        if (len(above) != 1 and not square) or name in LINEAR:
            return Chain(tuple(names), tuple(nodes), name, None, node)
        if name not in SHAPES:
            names.append("Square" if square else name)
            nodes.append(node)
        node = above[0]
    return Chain(tuple(names), tuple(nodes), "", node.variable, node)


def leaves_of(start: Any, most: int = 100_000) -> Iterator[Tensor]:
    """Every leaf that a node of the graph depends on."""
    seen: set[Any] = set()
    stack = [start]
    while stack and len(seen) < most:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parents(node))


def layer_of(node: Any) -> list[Tensor]:
    """Weight and bias of the layer that ends at a node; empty where the node is no layer."""
    name, above = operation(node), parents(node)
    if name == "Add":  # of inputs with more than two dimensions: the product first, the bias after it
        return [leaf for parent in above for leaf in _behind(parent)] if len(above) == 2 else []
    if name not in LINEAR:
        return []
    return [chain.leaf for chain in map(chain_from, above) if chain.leaf is not None and not chain.names]


def _behind(node: Any) -> list[Tensor]:
    chain = chain_from(node)
    if chain.names:
        return []
    return [chain.leaf] if chain.leaf is not None else layer_of(chain.stop) if chain.end in LINEAR else []


def base_of(fn: Any) -> Any:
    """The distribution of single numbers behind `.to_event`, `.mask`, `.expand`, and a transform."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def by_row(node: Any, tensor: Tensor) -> Tensor:
    """`(rows, columns)` of a tensor that broadcasts to a site's value; the rows are those of its largest plate."""
    value = node["value"]
    tensor = tensor.expand(value.shape)
    frames = [f for f in node["cond_indep_stack"] if f.vectorized]
    if not frames:
        return tensor.reshape(len(tensor) if tensor.dim() else 1, -1)
    frame = max(frames, key=lambda f: f.size)
    axis = value.dim() - node["fn"].event_dim + frame.dim
    return tensor.movedim(axis, 0).reshape(frame.size, -1)


class _Leaves(Messenger):
    """Cuts the graph at every latent: what follows sees its value as a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["is_observed"] or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if site_is_subsample(msg):
            return
        msg["value"] = self.found[msg["name"]] = value.detach().requires_grad_()


@dataclass
class Reading:
    """One run of a pair in evaluation mode, with the graph behind every number.

    model: the model's trace at the guide's draws, each latent a leaf. guide: the guide's trace.
    parameters: names of the pair's parameters, by identity. latents: the leaves, by site name.
    """

    model: Any
    guide: Any
    parameters: dict[int, str] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)

    def name_of(self, leaf: Tensor) -> str:
        """The site or parameter that a leaf is, "" where it is neither."""
        site = next((name for name, value in self.latents.items() if value is leaf), "")
        return site or self.parameters.get(id(leaf), "")

    def observed(self) -> Iterator[tuple[str, Any, Any, Tensor]]:
        """Name, node, distribution of single numbers and value of every observed site; no factors."""
        for name, node in self.model.nodes.items():
            if node["type"] != "sample" or not node["is_observed"] or site_is_subsample(node):
                continue
            base = base_of(node["fn"])
            if not isinstance(base, Unit) and isinstance(node["value"], Tensor) and node["value"].numel():
                yield name, node, base, node["value"]

    def sampled(self) -> Iterator[tuple[str, str, Any, Any]]:
        """ "model" or "guide", name, node and distribution of single numbers of every site, observed ones included."""
        for part, trace in (("model", self.model), ("guide", self.guide)):
            for name, node in trace.nodes.items():
                if node["type"] == "sample" and not site_is_subsample(node):
                    base = base_of(node["fn"])
                    if not isinstance(base, Unit) and not node["infer"].get("_deterministic"):
                        yield part, name, node, base

    def depends_on(self, tensor: Any) -> set[str]:
        """Names of the latents and parameters that a tensor is a function of."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return set()
        found = [tensor] if tensor.grad_fn is None else leaves_of(tensor.grad_fn)
        return {self.name_of(leaf) or "?" for leaf in found}


@contextlib.contextmanager
def _quietly(pair: Pair, seed: int) -> Iterator[None]:
    programs = (pair.model, pair.guide)
    with evaluating(*programs), torch.enable_grad(), preserved_buffers(*programs), preserved_rng(seed), pair.running():
        yield


def read_pair(pair: Pair, batch: Sequence[Any], seed: int = 0, sizes: Any = None) -> Reading:
    """Run a pair once with gradients on, and cut the graph at its latents.

    Args:
        pair: the pair. batch: rows as it takes them. seed: of its draws.
        sizes: full sizes of the data plates: the sites' scales are then those of a training step.
    """
    with _quietly(pair, seed), Minibatch(dict(sizes or {})):
        guide = poutine.trace(pair.run_guide).get_trace(*batch)
        with _Leaves() as leaves:
            model = poutine.trace(poutine.replay(pair.run_model, trace=guide)).get_trace(*batch)
    names = {id(p): name for name, p in _named(pair.parameters().items())}
    return Reading(model, guide, names, leaves.found)


def _named(items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in items:
        yield name.replace("pyro_parameters.", "").replace("|", "."), parameter
