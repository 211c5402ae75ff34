"""Encoders of rows with a structure: sets of elements, and sequences of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dgm.errors import OptionError

from .encoders import Encoder, Network


def set_encoder(
    element_features: int,
    hidden: Sequence[int] = (64,),
    pooled: Sequence[int] = (64,),
    pool: Literal["mean", "sum"] = "mean",
    mask: bool = False,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Encoder:
    """For rows that are sets: the order of the elements changes nothing.

        c = rho(pool_i phi(x_i)),    phi, rho fully connected networks

    M. Zaheer, S. Kottur, S. Ravanbakhsh, B. Poczos, R. Salakhutdinov, A. Smola: Deep Sets, 2017. The sum tells how many
    elements there are, the mean does not. All elements are standardised by one mean and one scale for each feature.

    Args:
        element_features: features of an element, at least 1; a row is its elements one after another.
        hidden: widths of phi's layers, one or more, each at least 1.
        pooled: widths of rho's layers; the last is the width of the context.
        pool: "mean" or "sum" over the elements.
        mask: whether the last feature of each element is 1 where there is one and 0 where the row is filled up; what
            is filled in then changes nothing, and a row without elements has the pooled value 0.
        activation: makes the module that follows each layer.

    Raises:
        OptionError: a size < 1, no width, another pool, a mask without further features, or rows that are no whole
            number of elements.

    >>> encoder = set_encoder(3)(12)
    >>> x = torch.randn(5, 4, 3)
    >>> torch.allclose(encoder(x.flatten(1)), encoder(x.flip(1).flatten(1)), atol=1e-6), encoder.out_features
    (True, 64)
    """
    _checked("set_encoder", element_features, mask, *hidden, *pooled)
    if not hidden or not pooled:
        raise OptionError(f"set_encoder: hidden and pooled need one width or more, got {hidden} and {pooled}")
    if pool not in ("mean", "sum"):
        raise OptionError(f"set_encoder: pool must be 'mean' or 'sum', got {pool!r}")

    def build(in_features: int) -> Network:
        _whole("set_encoder", "elements", in_features, element_features)
        first = element_features - mask
        phi, rho = _layers((first, *hidden), activation), _layers((hidden[-1], *pooled), activation)
        return _Set(element_features, phi, rho, pooled[-1], pool, mask)

    return build


class _Set(Network):
    """phi on each element, a pool, rho on the pool."""

    def __init__(self, period: int, phi: nn.Module, rho: nn.Module, out: int, pool: str, mask: bool) -> None:
        super().__init__(out)
        self.phi, self.rho, self.pool, self.mask = phi, rho, pool, mask
        self.period = period  # columns of equal place in an element are standardised alike

    def forward(self, input: Tensor) -> Tensor:
        x = input.unflatten(-1, (-1, self.period))  # (..., n, element_features)
        if not self.mask:
            h = self.phi(x)
            return self.rho(h.mean(-2) if self.pool == "mean" else h.sum(-2))
        there = x[..., -1:]
        h = (self.phi(x[..., :-1]) * there).sum(-2)
        return self.rho(h / there.sum(-2).clamp(min=1.0) if self.pool == "mean" else h)


def recurrent(
    step_features: int, hidden: int = 64, cell: Literal["gru", "lstm"] = "gru", mask: bool = False
) -> Encoder:
    """For rows that are sequences: the context is the state of a recurrent network after the last step.

        gru:   r, g = sigmoid(.), sigmoid(.),   n = tanh(W x_t + b + r (V h + d)),   h <- (1 - g) n + g h
        lstm:  i, f, o = sigmoid(.),   n = tanh(.),   s <- f s + i n,   h <- o tanh(s)

    K. Cho et al.: Learning Phrase Representations using RNN Encoder-Decoder, 2014; S. Hochreiter, J. Schmidhuber: Long
    Short-Term Memory, 1997. The numbers are those of `torch.nn.GRU` and `torch.nn.LSTM`; it is written step by step
    because those cannot be stacked (no batching rule under vmap). All steps are standardised by one mean and one scale
    for each feature.

    Args:
        step_features: features of a step, at least 1; a row is its steps one after another.
        hidden: width of the state and of the context, at least 1.
        cell: "gru" or "lstm".
        mask: whether the last feature of each step is 1 where there is one and 0 where the row is filled up; the state
            does not change there.

    Raises:
        OptionError: a size < 1, another cell, a mask without further features, or rows that are no whole number of
            steps.

    >>> encoder = recurrent(3, hidden=16)(30)
    >>> encoder(torch.randn(5, 30)).shape, encoder.out_features
    (torch.Size([5, 16]), 16)
    """
    _checked("recurrent", step_features, mask, hidden)
    if cell not in ("gru", "lstm"):
        raise OptionError(f"recurrent: cell must be 'gru' or 'lstm', got {cell!r}")

    def build(in_features: int) -> Network:
        _whole("recurrent", "steps", in_features, step_features)
        return _Recurrent(step_features, hidden, cell, mask)

    return build


class _Recurrent(Network):
    """A cell carried over the steps; the maps of all inputs are one product."""

    def __init__(self, period: int, hidden: int, cell: str, mask: bool) -> None:
        super().__init__(hidden)
        self.period, self.mask = period, mask  # columns of equal place in a step are standardised alike
        self.cell = _gru if cell == "gru" else _lstm
        gates = 3 if cell == "gru" else 4
        self.input = nn.Linear(period - mask, gates * hidden)
        self.state = nn.Linear(hidden, gates * hidden)
        for p in self.parameters():
            nn.init.uniform_(p, -(hidden**-0.5), hidden**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        x = input.unflatten(-1, (-1, self.period))  # (..., T, step_features)
        told = self.input(x[..., :-1] if self.mask else x)  # (..., T, gates * hidden)
        h = s = torch.zeros_like(told[..., 0, : self.out_features])
        for t in range(x.shape[-2]):
            new_h, new_s = self.cell(told[..., t, :], self.state(h), h, s)
            if self.mask:
                there = x[..., t, -1:]
                new_h, new_s = h + there * (new_h - h), s + there * (new_s - s)
            h, s = new_h, new_s
        return h


def _gru(told: Tensor, kept: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    (r, g, n), (hr, hg, hn) = told.chunk(3, -1), kept.chunk(3, -1)
    new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    new = new + torch.sigmoid(g + hg) * (h - new)
    return new, new


def _lstm(told: Tensor, kept: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    i, f, n, o = (told + kept).chunk(4, -1)
    s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(n)
    return torch.sigmoid(o) * torch.tanh(s), s


def _layers(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(layer for m, n in pairwise(widths) for layer in (nn.Linear(m, n), activation())))


def _checked(name: str, features: int, mask: bool, *widths: int) -> None:
    if min(features, *widths) < 1:
        raise OptionError(f"{name}: sizes must be at least 1, got {features} features and widths {widths}")
    if mask and features < 2:
        raise OptionError(
            f"{name}: mask takes the last of the {features} features for the mask, and none is left: count it in"
        )


def _whole(name: str, parts: str, width: int, size: int) -> None:
    if width % size:
        raise OptionError(
            f"{name}: a row has {width} values, no whole number of {parts} of {size}; where the model takes several "
            "arrays, tell Amortized which one the encoder sees by inputs=[...]"
        )
