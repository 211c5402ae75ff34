"""Noise of the layers instead of the weights: local reparameterisation and flipout, as effect handlers.

One draw of the weights for all rows makes their errors equal, and the gradient of a minibatch as noisy as that of one
row. Both handlers work on any program that multiplies by weights through `torch.nn.functional.linear` (nn.Linear), with
any guide that gives these weights independent normals, whoever wrote it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributions as td
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import GuideError

LayerNoise = Literal["shared", "local", "flipout"]
LAYER_NOISE: tuple[LayerNoise, ...] = ("shared", "local", "flipout")

TINY = 1e-16  # under the square root, whose slope at zero is infinite


class _Layers(TorchFunctionMode):
    """Answers linear layers whose weights are known to be normal."""

    def __init__(self, normals: _Normals, kind: LayerNoise):
        super().__init__()
        self.normals, self.kind, self.used = normals, kind, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if id(weight) in self.normals.known:
                self.used += 1
                return (local if self.kind == "local" else flipout)(x, weight, bias, self.normals)
        return func(*args, **kwargs)


class _Normals(Messenger):
    """Remembers location and scale of every value that a guide drew from independent normals."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept: list[Tensor] = []  # alive, so that no other tensor can have the same id
        self.packed: dict[str, tuple[Tensor, Tensor]] = {}
        self.seen: set[str] = set()
        self.names: set[str] = set()  # of the latents that are known

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.seen:
            return  # the model's turn: what was drawn is the guide's, not the prior's
        self.seen.add(msg["name"])
        fn, value = msg["fn"], msg["value"]
        while isinstance(fn, td.Independent):
            fn = fn.base_dist
        packing = msg["infer"].get("packing")
        if isinstance(fn, td.Normal) and not msg["is_observed"]:
            loc, scale = fn.loc.expand_as(value), fn.scale.expand_as(value)
            if packing is None:
                self._remember(msg["name"], value, loc, scale)
            else:
                locs, scales = packing.parts(loc), packing.parts(scale)
                self.packed.update({n: (locs[n], scales[n]) for n in locs if _is_real(packing, n)})
        elif msg["name"] in self.packed:
            self._remember(msg["name"], value, *self.packed.pop(msg["name"]))

    def _remember(self, name: str, value: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.names.add(name)
        self.known[id(value)] = (loc, scale)
        self.kept.append(value)


def _is_real(packing: Any, name: str) -> bool:
    return any(b.site.name == name and b.site.support_name == "real" for b in packing.blocks)


def local(x: Tensor, weight: Tensor, bias: Tensor | None, normals: _Normals) -> Tensor:
    """x W' + b with its own noise for each row: N(x M' + m, x^2 (S^2)' + s^2)."""
    loc, scale = normals.known[id(weight)]
    mean, variance = F.linear(x, loc), F.linear(x.square(), scale.square())
    if bias is not None:
        told = normals.known.get(id(bias))
        mean = mean + (bias if told is None else told[0])
        variance = variance if told is None else variance + told[1].square()
    return mean + (variance + TINY).sqrt() * torch.randn_like(mean)


def flipout(x: Tensor, weight: Tensor, bias: Tensor | None, normals: _Normals) -> Tensor:
    """x M' + ((x * r) (W - M)') * s + b with random signs r, s of each row: decorrelated, at one draw of W."""
    loc, _ = normals.known[id(weight)]
    mean = F.linear(x, loc, bias)
    r, s = _signs(x), _signs(mean)
    return mean + F.linear(x * r, weight - loc) * s


def _signs(like: Tensor) -> Tensor:
    return torch.where(torch.rand_like(like) < 0.5, -torch.ones_like(like), torch.ones_like(like))


@contextlib.contextmanager
def layer_noise(kind: LayerNoise) -> Iterator[None]:
    """Run guide and model inside: linear layers then answer with noise of their own for each row.

    "local": the local reparameterisation (Kingma, Salimans and Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015). "flipout": random signs (Wen, Vicol, Ba, Tran and Grosse, "Flipout", 2018).
    "shared": as it is. The terms log p(w) - log q(w) stay those of the one draw of the weights; each of the two
    expectations of the ELBO is unbiased by itself. The densities of a run inside are of no use as log weights.

    Raises:
        GuideError: no linear layer got a weight from an independent normal: nothing would change.

    >>> import pyro, pyro.distributions as dist
    >>> with layer_noise("local"):
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    ...     y = F.linear(torch.ones(5, 2), w)
    >>> bool((y[0] == y[1]).any())
    False
    """
    if kind == "shared":
        yield
        return
    normals = _Normals()
    mode = _Layers(normals, kind)
    with normals, mode:
        yield
    if not mode.used:
        if not normals.known:
            raise GuideError(
                f'layer_noise="{kind}": the guide draws no latent from independent normals: use a diagonal-normal '
                'guide, or layer_noise="shared"'
            )
        raise GuideError(
            f'layer_noise="{kind}": no nn.Linear of the model (torch.nn.functional.linear) has one of the latents '
            f'{sorted(normals.names)} as its weight, as it was drawn: use layer_noise="shared"'
        )


__all__ = ["LAYER_NOISE", "LayerNoise", "flipout", "layer_noise", "local"]
