"""Encoders: factories of networks that map a datum to the context of a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dgm.errors import OptionError

Encoder = Callable[[int], nn.Module]


class Network(nn.Sequential):
    """Layers in a row that say how wide their output is.

    Args:
        out_features: features of the output.
        layers: modules, applied in order.

    >>> Network(3, nn.Linear(2, 3)).out_features
    3
    """

    def __init__(self, out_features: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.out_features = out_features


def mlp(*hidden: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Encoder:
    """Fully connected layers, each followed by the activation; the family's own head is the linear layer on top.

        c = a(W_n ... a(W_1 x + b_1) ... + b_n)

    Args:
        hidden: widths of the layers, one or more, each at least 1; the last is the width of the context.
        activation: makes the module that follows each layer.

    Raises:
        OptionError: no width, or a width < 1.

    >>> encoder = mlp(64, 32)(784)
    >>> encoder(torch.zeros(5, 784)).shape, encoder.out_features
    (torch.Size([5, 32]), 32)
    """
    if not hidden or min(hidden) < 1:
        raise OptionError(
            f"mlp: needs one width or more, each at least 1, got {hidden}; linear() is the encoder without"
        )

    def build(in_features: int) -> Network:
        widths = (in_features, *hidden)
        layers: list[nn.Module] = []
        for m, n in pairwise(widths):
            layers += [nn.Linear(m, n), activation()]
        return Network(hidden[-1], *layers)

    return build


def linear() -> Encoder:
    """The datum itself is the context, and the family's head is the whole, linear, encoder.

        c = x

    >>> linear()(7)(torch.zeros(5, 7)).shape
    torch.Size([5, 7])
    """

    def build(in_features: int) -> Network:
        return Network(in_features, nn.Identity())

    return build


def conv(
    image_shape: Sequence[int],
    channels: Sequence[int] = (16, 32),
    out_features: int = 128,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Encoder:
    """A small convolutional network for images that come as flat vectors, row by row.

        c = a(W flatten(a(conv_n ... a(conv_1 image))) + b)

    Each convolution is 3 x 3 with stride 2: it halves height and width, rounded up.

    Args:
        image_shape: (height, width) or (channels, height, width) of an image, pixels.
        channels: channels after each convolution, one or more, each at least 1.
        out_features: width of the context, at least 1.
        activation: makes the module that follows each layer.

    Raises:
        OptionError: a shape that is no image's, a width < 1, or a datum whose size is not the image's.

    >>> encoder = conv((8, 8))(64)
    >>> encoder(torch.zeros(5, 64)).shape, encoder.out_features
    (torch.Size([5, 128]), 128)
    """
    shape = tuple(image_shape) if len(image_shape) == 3 else (1, *image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise OptionError(f"conv: image_shape must be (height, width) or (channels, height, width), got {image_shape}")
    if not channels or min(channels) < 1 or out_features < 1:
        raise OptionError(f"conv: channels and out_features must be at least 1, got {channels} and {out_features}")

    def build(in_features: int) -> Network:
        depth, height, width = shape
        if in_features != depth * height * width:
            raise OptionError(
                f"conv: an image of shape {shape} has {depth * height * width} values, the datum has {in_features}; "
                "give image_shape the data's"
            )
        layers: list[nn.Module] = [_Unflatten(shape)]
        for m, n in pairwise((depth, *channels)):
            layers += [nn.Conv2d(m, n, kernel_size=3, stride=2, padding=1), activation()]
            height, width = (height + 1) // 2, (width + 1) // 2
        layers += [nn.Flatten(-3), nn.Linear(channels[-1] * height * width, out_features), activation()]
        return _Batched(out_features, *layers)

    return build


class _Unflatten(nn.Module):
    """(..., channels * height * width) -> (..., channels, height, width)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.shape)


class _Batched(Network):
    """Layers that want exactly one batch dimension, for any number of them."""

    def forward(self, input: Tensor) -> Tensor:
        flat = torch.atleast_2d(input).flatten(0, -2)
        return super().forward(flat).unflatten(0, input.shape[:-1]) if input.dim() > 1 else super().forward(flat)[0]
