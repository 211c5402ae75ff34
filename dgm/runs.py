"""Many runs of a pair at once: a vmap over its noise, and a graph of that where there are enough passes to pay for it.

The noise is an input (`dgm.noise`), so S runs are one call on `(S, ...)` noise. What does not depend on the noise, such
as an amortized guide's encoder, is a part of the graph by itself and runs once for all passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .graph import Untraceable, one_line, trace
from .noise import Recorded, recording
from .pace import steady
from .pair import Pair, all_rows, current_rows
from .programs import evaluating, preserved_rng

Run = Callable[[Sequence[Any]], tuple[Tensor, ...]]
"""`(batch) -> tensors`: one run of the two programs on a batch."""

BYTES_AT_ONCE = 8 * 2**20
"""The largest tensor of one pass, at most, unless one sample has a larger one: small enough for the cache, large enough
that Python costs little. Milliseconds for each sample on one core, as a graph (and by the program): network 13-50-1 on
100 rows at 2, 4, 8 and 15 MB 0.028 (0.064), 0.024 (0.044), 0.023 (0.033), 0.039 (0.050); VAE 784-400-20 on 1000 rows at
3, 6, 12, 24 and 48 MB 8.4 (17.7), 8.1 (14.1), 8.4 (13.4), 8.4 (15.8), 11.0 (15.6). A number of rows is no measure of
this: the best was 40,000 for the first and 2,000 for the second."""

PASSES = 64
"""A trace costs what a graph saves in so many passes (25 to 150 over the zoo): 0.2 to 1.5 s, 3 to 20 ms for each."""

_PLAIN = (type(None), bool, int, float, str)


class Runs:
    """Runs of a pair on one batch, each giving the same tensors, as many at once as fit the cache.

    A pass is first an ordinary Pyro run under vmap. It becomes a graph where the passes done with this shape and those
    known to come are more than `PASSES`. Both the cost of a trace and what it saves are Python's, and grow with the
    number of operations, so the rule is a number of passes and needs no clock: the same calls always take the same
    way. Where the future is unknown, as in the validations of a training, no more than twice the time of the better
    way is spent (the ski-rental rule). The graph is held against the program on the noise of a pass, and serves only
    where the two agree. Programs that vmap refuses, or whose draws depend on parameters, run once for each sample.

    Args:
        pair: the programs. run: what one run gives. batch: its data.
        graphs: graphs shared with the runs of other batches; those of equal shapes share one.

    Attributes:
        deterministic: the programs draw nothing.
        draws: the noise of one run; None where it is not an input.
        bytes: the largest tensor of one run.
    """

    def __init__(self, pair: Pair, run: Run, batch: Sequence[Any], graphs: Graphs | None = None):
        self.pair, self.run, self.batch = pair, run, batch
        self.graphs = Graphs() if graphs is None else graphs
        with preserved_rng(), recording() as draws, _Largest() as largest:
            self._one()
        self.bytes = largest.bytes
        self.deterministic = draws.complete and not draws
        self.draws: Recorded | None = draws if draws.complete else None

    @property
    def fallback(self) -> str | None:
        """Why there will be no graph; None where nothing stands against one."""
        return self.graphs.fallback

    def chunk(self, samples: int) -> int:
        """Samples in one pass: chunks as equal as can be, so that one graph serves all of them."""
        most = max(1, BYTES_AT_ONCE // max(1, self.bytes))
        return math.ceil(samples / math.ceil(samples / most))

    def many(self, samples: int) -> tuple[Tensor, ...]:
        """Each tensor of a run with `(samples,)` in front, in one pass."""
        return next(self.passes(samples, samples))

    def passes(self, samples: int, chunk: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of `samples` runs, in passes of `chunk` samples; parameters must stay as they are meanwhile."""
        chunk = chunk or self.chunk(samples)
        once = self._one() if self.deterministic else None
        series = None if self.deterministic or self.draws is None else _Series(self, chunk, math.ceil(samples / chunk))
        for start in range(0, samples, chunk):
            size = min(chunk, samples - start)
            if once is not None:
                yield tuple(t.expand(size, *t.shape) for t in once)
                continue
            if series is not None and self.draws is not None:
                noise = self.draws.sample_many(size)
                try:
                    yield series(noise, size)
                    continue
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    # vmap refuses this program: one run for each sample from here on
                    self.draws, self.graphs.fallback = None, one_line(error)
            runs = [self._one() for _ in range(size)]
            yield tuple(torch.stack(parts) for parts in zip(*runs, strict=True))

    def _one(self) -> tuple[Tensor, ...]:
        with evaluating(self.pair.model, self.pair.guide), self.pair.running():
            return self.run(self.batch)

    def eager(self, noise: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One pass by the programs themselves."""
        with evaluating(self.pair.model, self.pair.guide), self.pair.running():
            one = lambda *eps: self.pair.call(lambda: self.run(self.batch), None, eps)  # noqa: E731
            return torch.func.vmap(one)(*noise)

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer as it is now, by name: inputs of a graph, which holds none of them."""
        owners = self.pair.owners
        return {n: t.detach() for part in (owners.named_parameters(), owners.named_buffers()) for n, t in part}

    def steady(self, state: dict[str, Tensor]) -> list[Tensor]:
        """The inputs of a graph that are the same for all passes: state, data, and which rows these are."""
        rows = current_rows()
        data = [item for item in self.batch if isinstance(item, Tensor)]
        return [*state.values(), *data, *([] if rows is None else [rows])]

    def pure(self, names: Sequence[str]) -> Callable[..., tuple[Tensor, ...]]:
        """`(*steady, *noise) -> tensors`, of its inputs alone."""
        batch, given = list(self.batch), current_rows() is not None

        def compute(*inputs: Any) -> tuple[Tensor, ...]:
            left = iter(inputs)
            state = {name: next(left) for name in names}
            data = [next(left) if isinstance(item, Tensor) else item for item in batch]
            rows = next(left) if given else None
            with self.pair.running(rows=rows):
                one = lambda *eps: self.pair.call(lambda: self.run(data), state, eps)  # noqa: E731
                return torch.func.vmap(one)(*left)

        return compute


class Graphs:
    """The graphs of a pair's runs by shape, to be shared by the runs of many batches and kept between them.

    Attributes:
        batches: batches of equal shape that are known to come after the present one.
        traced: graphs that there are.
        fallback: why there will be none, or no more.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.fallback: str | None = None
        self._graphs: dict[Any, _Graph] = {}
        self._done: dict[Any, int] = {}

    @property
    def traced(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def get(self, key: Any) -> _Graph | None:
        return self._graphs.get(key)

    def drop(self, key: Any, reason: str) -> None:
        """This graph failed: no graphs from here on."""
        self._graphs.pop(key, None)
        self.fallback = reason

    def pays(self, key: Any, to_come: int) -> bool:
        """Count an eager pass, and say whether a graph would now be worth its trace."""
        self._done[key] = self._done.get(key, 0) + 1
        return self.fallback is None and (steady() or self._done[key] + to_come > PASSES)

    def add(self, key: Any, runs: Runs, state: dict[str, Tensor], noise: Sequence[Tensor], truth: Any) -> None:
        """Trace a pass, and keep the graph if it gives what the program gave on this noise."""
        try:
            with preserved_rng(0):
                other = runs.draws.sample_many(len(noise[0])) if runs.draws is not None else []
            graph = _Graph(runs, state, other)
            mine = graph(graph.prepare(runs.steady(state)), noise)
            if not all(_same(a, b) for a, b in zip(mine, truth, strict=True)):
                raise Untraceable("the graph does not give the program's numbers: its control flow depends on values")
        except Exception as error:  # a program may fail in any way where it is traced; it has just run without
            self.fallback = str(error) if isinstance(error, Untraceable) else one_line(error)
        else:
            self._graphs[key] = graph


class _Series:
    """The passes of one call: what they share is computed once."""

    def __init__(self, runs: Runs, chunk: int, passes: int):
        _keep_freed_memory()
        self.runs, self.chunk, self.passes = runs, chunk, passes
        self.left = passes
        self.state = runs.state()
        self.key = _key(runs, chunk, self.state)
        self.prepared: list[Tensor] | None = None

    def __call__(self, noise: list[Tensor], size: int) -> tuple[Tensor, ...]:
        self.left -= 1
        graphs = self.runs.graphs
        graph = graphs.get(self.key)
        if graph is not None:
            try:
                if self.prepared is None:
                    self.prepared = graph.prepare(self.runs.steady(self.state))
                if size == self.chunk:
                    return graph(self.prepared, noise)
                padded = [torch.cat([e, e[:1].expand(self.chunk - size, *e.shape[1:])]) for e in noise]
                return tuple(t[:size] for t in graph(self.prepared, padded))
            except (RuntimeError, TypeError) as error:
                graphs.drop(self.key, one_line(error))
        out = self.runs.eager(noise)
        if self.key is not None and size == self.chunk:
            if graphs.pays(self.key, self.left + graphs.batches * self.passes):
                graphs.add(self.key, self.runs, self.state, noise, out)
        return out


class _Graph:
    """A pass in two graphs of tensor operations: what depends on the noise, and what does not.

    Raises:
        Untraceable: a pass cannot be a graph; the message says why.
    """

    def __init__(self, runs: Runs, state: dict[str, Tensor], noise: Sequence[Tensor]):
        if not runs.pair.movable:
            raise Untraceable("a function program closes over a module; make it a PyroModule that holds the module")
        steady = runs.steady(state)
        pure = torch.func.functionalize(runs.pure(list(state)))  # no operation in place: order is free
        with evaluating(runs.pair.model, runs.pair.guide), _Foreign() as foreign:
            module = trace(pure, [*steady, *noise])
        if foreign.found:
            raise Untraceable("the programs read a parameter that neither of them holds; make it a part of one")
        for node in module.graph.nodes:
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                raise Untraceable(f"the programs change a parameter, a buffer or data in place ({node.target})")
        self.fixed, self.each = split(module, len(steady))

    def prepare(self, steady: Sequence[Tensor]) -> list[Tensor]:
        """What all passes share."""
        with torch.no_grad():
            return list(self.fixed.forward(*steady))

    def __call__(self, prepared: Sequence[Tensor], noise: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(self.each.forward(*prepared, *noise))


def split(module: fx.GraphModule, steady: int) -> tuple[Any, Any]:
    """A graph as two: of its first `steady` inputs alone, and of what that gives and the remaining inputs."""
    nodes = list(module.graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    varies = set(given[steady:])
    for node in nodes:
        if node.op == "output" or any(arg in varies for arg in node.all_input_nodes):
            varies.add(node)
    shared = [n for n in nodes if n not in varies and n.op != "get_attr" and any(user in varies for user in n.users)]
    fixed, each = fx.Graph(), fx.Graph()
    first: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in varies:
            first[node] = fixed.node_copy(node, first.__getitem__)
    fixed.output(tuple(first[node] for node in shared))
    second = {node: each.placeholder(f"shared_{i}") for i, node in enumerate(shared)}
    for node in nodes:
        if node in varies or node.op == "get_attr":
            second[node] = each.node_copy(node, second.__getitem__)
    for graph in (fixed, each):
        graph.eliminate_dead_code()
    return fx.GraphModule(module, fixed), fx.GraphModule(module, each)


def _key(runs: Runs, chunk: int, state: dict[str, Tensor]) -> Any:
    """What a graph has fixed: shapes, and every plain value of the batch and of the modules. None: not to be traced."""
    rest = [item for item in runs.batch if not isinstance(item, Tensor)]
    if not all(isinstance(item, _PLAIN) for item in rest):
        return None  # a container may hold tensors, and those of another batch would be others
    rows = current_rows()
    tensors = [*state.values(), *(item for item in runs.batch if isinstance(item, Tensor))]
    shapes = tuple((t.shape, t.dtype, t.device) for t in (tensors if rows is None else [*tensors, rows]))
    plain = tuple(
        (part, name, value)
        for part, module in runs.pair.owners.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name != "training"
    )
    return chunk, tuple(rest), rows is None, all_rows(), shapes, tuple(runs.draws or ()), plain


def _same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal to what the order of a sum can change."""
    rounding = 1e-9 if theirs.dtype == torch.float64 else 1e-4
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=rounding, atol=rounding, equal_nan=True)


def _keep_freed_memory() -> None:
    """Let the C library keep what a pass frees for the next one, instead of giving it back to the system.

    glibc moves its limits up to the largest block that was ever freed (mallopt(3), M_MMAP_THRESHOLD, at most 32 MB);
    nothing is touched here. Page faults took up to a third of the time of a wide model's passes without it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class _Largest(TorchFunctionMode):
    """The size of the largest tensor that a program makes, in bytes."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor) and item.is_contiguous():  # an expanded one takes no memory
                self.bytes = max(self.bytes, item.numel() * item.element_size())
        return out


class _Foreign(TorchFunctionMode):
    """Sees whether a program computes with a trainable tensor that did not come in as an input."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.found |= any(isinstance(a, Tensor) and a.is_leaf and a.requires_grad for a in leaves)
        return func(*args, **(kwargs or {}))
