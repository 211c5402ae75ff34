"""A step as a graph: loss and gradients traced once for a batch shape; it holds no Python and no Pyro."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .noise import NoiseExhausted, Recorded
from .pair import NotReparameterised, Pair


class Untraceable(Exception):
    """The pair's step cannot be a graph; the message says which operation or site is the cause."""


class Graph:
    """The negative ELBO and its gradients as one graph of tensor operations.

    Parameters, batch, noise, plate sizes and the KL weight are inputs: schedules cost no new trace. The graph is held
    against the eager loss and gradients once; where they differ the pair has control flow that depends on values.

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
        self.names = list(parameters)
        self.places = [i for i, item in enumerate(batch) if isinstance(item, Tensor)]
        self.plates = list(sizes)
        rest = list(batch)

        def compute(
            values: list[Tensor],
            data: list[Tensor],
            noise: list[Tensor],
            full: list[Tensor],
            kl: Tensor,
            rows: Tensor | None,
        ) -> Any:
            given = dict(zip(self.names, values, strict=True))
            whole = list(rest)
            for place, item in zip(self.places, data, strict=True):
                whole[place] = item
            scales = dict(zip(self.plates, full, strict=True))
            return torch.func.grad_and_value(
                lambda p: pair.loss(p, whole, noise, sizes=scales, kl_weight=kl, rows=rows)
            )(given)

        buffers = {name: value.clone() for name, value in pair.owners.named_buffers()}
        noise = draws.sample()
        inputs = self._inputs(parameters, batch, noise, sizes, 1.0, rows)
        try:
            self.graph = make_fx(lambda *args: compute(*args))(*inputs)
        except (RuntimeError, NotImplementedError, NoiseExhausted, NotReparameterised, TypeError, ValueError) as error:
            raise Untraceable(_one_line(error)) from error
        _prune(self.graph)  # before it is held against the program, so that what runs is what was verified
        self._verify(pair, parameters, batch, noise, sizes, rows, buffers)

    def _inputs(
        self,
        parameters: Mapping[str, Tensor],
        batch: Sequence[Any],
        noise: Sequence[Tensor],
        sizes: Mapping[str, int],
        kl_weight: float,
        rows: Tensor | None,
    ) -> list[Any]:
        values = [p.detach() for p in parameters.values()]
        like = values[0]
        key = (tuple(sizes.values()), kl_weight, like.device)
        if getattr(self, "_scalars_key", None) != key:
            self._scalars_key = key
            self._scalars = (
                [torch.tensor(float(n), dtype=like.dtype, device=like.device) for n in sizes.values()],
                torch.tensor(float(kl_weight), dtype=like.dtype, device=like.device),
            )
        return [values, [batch[i] for i in self.places], list(noise), *self._scalars, rows]

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
        loss, gradients = self(parameters, batch, fresh, sizes, 0.5, rows)
        eager = pair.loss(None, batch, fresh, sizes=sizes, kl_weight=0.5, rows=rows)
        expected = torch.autograd.grad(eager, list(parameters.values()), allow_unused=True)
        for name, value in pair.owners.named_buffers():
            if not torch.equal(value, buffers[name]):
                with torch.no_grad():
                    dict(pair.owners.named_buffers())[name].copy_(buffers[name])
                raise Untraceable(f"buffer {name!r} changes while the program runs (batch normalisation)")
        if not torch.allclose(loss, eager.detach(), rtol=1e-4, atol=1e-4, equal_nan=True):
            raise Untraceable(
                f"the graph gives {float(loss):.6g} where the program gives {float(eager):.6g}: its control flow "
                "depends on values"
            )
        scale = max((float(g.abs().max()) for g in expected if g is not None), default=0.0)
        for name, mine, theirs in zip(parameters, gradients, expected, strict=True):
            theirs = torch.zeros_like(mine) if theirs is None else theirs
            if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * scale + 1e-12, equal_nan=True):
                raise Untraceable(f"the graph's gradient of {name!r} is not the program's")

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        batch: Sequence[Any],
        noise: Sequence[Tensor],
        sizes: Mapping[str, int],
        kl_weight: float,
        rows: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients in the order of the parameters."""
        with torch.no_grad():
            gradients, loss = self.graph(*self._inputs(parameters, batch, noise, sizes, kl_weight, rows))
        return loss, [gradients[name] for name in self.names]


def _prune(graph: Any) -> None:
    """Drop what the trace computed and nobody reads."""
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
