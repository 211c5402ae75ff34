"""Inverse autoregressive flow: a diagonal normal, then gated masked steps; one pass to sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .domains import check_size, check_widths
from .family import Push
from .flow import Flow, Step
from .heads import Conditioner

__all__ = ["InverseAutoregressiveFlow"]

GATE = 1.5  # bias of the gate, sigmoid(1.5) = 0.82: near to keeping z, as its authors advise


class InverseAutoregressiveFlow(Flow):
    """A diagonal normal carried through gated autoregressive steps, sampled in one pass.

        u_0 = eps,    (m, s) = masked network(u_{t-1}, c),    g = sigmoid(s + 1.5)
        u_t = g / sigmoid(1.5) u_{t-1} + m,    z = loc(c) + exp(log_scale(c)) u_T

    D. P. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling: Improving Variational Inference with
    Inverse Autoregressive Flow, 2016. Three differences: the steps act before the location and scale, so that they see
    standardised numbers whatever the model's units are; the gate is divided by its start, so that the family starts
    exactly as `DiagonalNormal`; the shift m is added whole, not times 1 - g, which starts at 0.18 and learns slowly.
    The order of the features is reversed from step to step.

    The log-density of its own draw comes with the draw; that of any other value takes `features` passes.

    Args:
        features: the dimension d, at least 1. With one feature there is nothing to look back at: the diagonal normal.
        context: features of the context; 0 for none. Masked networks see the context whole.
        transforms: number of steps, at least 1.
        hidden: widths of the masked networks' hidden layers, one or more.
        scale: standard deviation at the start, > 0; by default 0.1 without a context, 1 with one.

    Raises:
        OptionError: features < 1, context < 0, scale <= 0, transforms < 1, or hidden empty or with a width < 1.

    >>> q = InverseAutoregressiveFlow(4, context=5)(torch.zeros(7, 5))
    >>> x, log_q = q.rsample_and_log_prob((3,))
    >>> x.shape, log_q.shape
    (torch.Size([3, 7, 4]), torch.Size([3, 7]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 2,
        hidden: Sequence[int] = (128,),
        scale: float | None = None,
    ) -> None:
        check_size("InverseAutoregressiveFlow: features", features)
        check_size("InverseAutoregressiveFlow: transforms", transforms)
        check_widths("InverseAutoregressiveFlow", hidden)
        order = torch.arange(1, features + 1)
        steps = [
            GatedStep(order.flip(0) if t % 2 else order, context, hidden)
            for t in range(transforms if features > 1 else 0)
        ]
        super().__init__(features, context, steps, scale)


class GatedStep(Step):
    """One gated autoregressive map: each feature is moved as told by those before it in the order.

        (m, s) = masked network(u, c),    g = sigmoid(s + 1.5),    u <- g / sigmoid(1.5) u + m

    Args:
        order: (d,), the place of each feature, a permutation of 1..d, d >= 2.
        context: features of the context; 0 for none.
        hidden: widths of the masked network's hidden layers.

    >>> push, pull = GatedStep(torch.tensor([1, 2, 3]), 0, (16,))(None)
    >>> push(torch.zeros(5, 3))[1].shape
    torch.Size([5])
    """

    def __init__(self, order: Tensor, context: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.network = masked_network(order, context, hidden)

    def forward(self, context: Tensor | None) -> tuple[Push, Push]:
        network = self.network(context)
        return partial(_push, network), partial(_pull, network)


def _gate(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the factor on u, zero at the start, and the shift."""
    m, s = parameters.chunk(2, -1)
    return F.logsigmoid(s + GATE) + math.log1p(math.exp(-GATE)), m


def _push(network: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    log_gain, shift = _gate(network(u))
    return log_gain.exp() * u + shift, log_gain.sum(-1)


def _pull(network: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    guess, log_gain = torch.zeros_like(u), torch.zeros_like(u)
    for _ in range(u.shape[-1]):  # each pass puts one more feature right
        log_gain, shift = _gate(network(guess))
        guess = (u - shift) * torch.exp(-log_gain)
    return guess, log_gain.sum(-1)


def masked_network(order: Tensor, context: int, hidden: Sequence[int]) -> Conditioner:
    """Network u -> (m, s), both (..., d), where outputs of feature i depend on the features before it in the order.

    M. Germain, K. Gregor, I. Murray, H. Larochelle: MADE: Masked Autoencoder for Distribution Estimation, 2015. A
    hidden unit of degree k sees the first k features; the degrees are spread evenly, so that a layer narrower than the
    features still reaches all of them. Degree 0 sees the context alone.

    Args:
        order: (d,), the place of each feature, a permutation of 1..d, d >= 2.
        context: features of the context; 0 for none.
        hidden: widths of the hidden layers.

    >>> masked_network(torch.tensor([1, 2, 3]), 0, (16,))(None)(torch.zeros(5, 3)).shape
    torch.Size([5, 6])
    """
    features, lowest = len(order), 0 if context else 1
    degrees = [order]
    for width in hidden:
        degrees.append(lowest + torch.arange(width) * (features - lowest) // width)
    masks = [after[:, None] >= before for before, after in pairwise(degrees)]
    masks.append((order[:, None] > degrees[-1]).repeat(2, 1))
    return Conditioner([features, *hidden, 2 * features], context, masks)
