"""Encoders: shapes, the width they announce, and refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from dgm.errors import OptionError
from dgm.guides.encoders import Encoder, conv, linear, mlp
from dgm.guides.full_normal import FullNormal

ENCODERS: dict[str, Encoder] = {
    "mlp": mlp(32, 16),
    "tanh": mlp(16, activation=nn.Tanh),
    "linear": linear(),
    "conv": conv((8, 6), channels=(4, 8), out_features=24),
    "colour": conv((3, 4, 4), out_features=10),
}


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=list(ENCODERS))
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 5)])
def test_shapes_and_announced_width(encoder: Encoder, batch: tuple[int, ...]) -> None:
    net = encoder(48)
    out = net(torch.rand(*batch, 48))
    assert out.shape == (*batch, net.out_features)
    assert FullNormal(3, context=net.out_features)(out).batch_shape == batch


def test_mlp_ends_with_its_activation() -> None:
    net = mlp(8, activation=nn.ReLU)(3)
    assert [type(m) for m in net] == [nn.Linear, nn.ReLU]
    assert (net(torch.linspace(-3, 3, 30).reshape(10, 3)) >= 0).all()
    assert [type(m) for m in mlp(8, 4, activation=nn.Tanh)(3)] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh]


def test_linear_is_the_identity_without_parameters() -> None:
    net, x = linear()(4), torch.arange(8.0).reshape(2, 4)
    assert torch.equal(net(x), x) and not list(net.parameters())


def test_conv_treats_each_image_alone() -> None:
    net = conv((8, 8))(64)
    x = torch.linspace(0, 1, 6 * 64).reshape(2, 3, 64)
    together = net(x)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(together[i, j], net(x[i, j]), atol=1e-6)


def test_factories_make_fresh_networks() -> None:
    encoder = mlp(5)
    first, second = encoder(3), encoder(3)
    for a, b in pairwise([*first.parameters(), *second.parameters()]):
        assert a is not b


def test_every_parameter_receives_a_gradient() -> None:
    for encoder in (e for name, e in ENCODERS.items() if name != "linear"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = encoder(48)
            net(torch.rand(16, 48)).square().sum().backward()
        for name, p in net.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("hidden", [(), (0,), (8, -1)])
def test_mlp_needs_widths(hidden: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="one width or more"):
        mlp(*hidden)


def test_conv_refusals() -> None:
    with pytest.raises(OptionError, match=r"an image of shape \(1, 8, 8\) has 64 values, the datum has 60"):
        conv((8, 8))(60)
    for shape in [(8,), (1, 1, 8, 8), (0, 8)]:
        with pytest.raises(OptionError, match="image_shape must be"):
            conv(shape)
    with pytest.raises(OptionError, match="must be at least 1"):
        conv((8, 8), channels=())
