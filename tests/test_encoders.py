"""Encoders: shapes, the width they announce, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import dgm
from dgm.errors import GuideError, OptionError
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import Encoder, conv, linear, mlp
from dgm.guides.encoders_structured import recurrent, set_encoder
from dgm.guides.flow import zuko
from dgm.guides.full_normal import FullNormal
from dgm.guides.point import Point
from dgm.models import linear_vae
from dgm.programs import isolated

ENCODERS: dict[str, Encoder] = {
    "mlp": mlp(32, 16),
    "tanh": mlp(16, activation=nn.Tanh),
    "linear": linear(),
    "conv": conv((8, 6), channels=(4, 8), out_features=24),
    "colour": conv((3, 4, 4), out_features=10),
    "set": set_encoder(6, hidden=(8,), pooled=(7,)),
    "masked set": set_encoder(6, hidden=(8,), pooled=(9, 5), pool="sum", mask=True),
    "gru": recurrent(4, hidden=5),
    "masked lstm": recurrent(4, hidden=5, cell="lstm", mask=True),
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


# --- sets and sequences ---


def masked(x: Tensor, lengths: Tensor) -> Tensor:
    """Elements (B, n, f) with the mask that keeps the first `lengths` of each row, flattened."""
    mask = (torch.arange(x.shape[1]) < lengths[:, None]).to(x)
    return torch.cat([x, mask[..., None]], -1).flatten(1)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_the_order_of_a_set_changes_nothing(pool: Any) -> None:
    net = set_encoder(3, pool=pool)(15).double()
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    shuffled = x[:, torch.tensor([3, 0, 4, 1, 2])]
    assert torch.allclose(net(x.flatten(1)), net(shuffled.flatten(1)), atol=1e-12)
    assert not torch.allclose(mlp(8)(15).double()(x.flatten(1)), mlp(8)(15).double()(shuffled.flatten(1)))


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_a_masked_set_is_the_set_without_its_filling(pool: Any) -> None:
    net, short = set_encoder(3, pool=pool, mask=True)(15).double(), set_encoder(2, pool=pool)(6).double()
    short.load_state_dict(net.state_dict())
    x = torch.randn(7, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    told = net(masked(x, torch.full((7,), 3)))
    assert torch.allclose(told, short(x[:, :3].flatten(1)), atol=1e-12)
    other = torch.cat([x[:, :3], 100 * x[:, 3:]], 1)
    assert torch.allclose(told, net(masked(other, torch.full((7,), 3))), atol=1e-12)
    assert net(masked(x, torch.zeros(7))).isfinite().all()


@pytest.mark.parametrize(("cell", "make"), [("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_recurrent_gives_the_numbers_of_torch(cell: Any, make: Any) -> None:
    net, theirs = recurrent(3, 6, cell)(15), make(3, 6, batch_first=True)
    with torch.no_grad():
        for mine, name in ((net.input, "ih"), (net.state, "hh")):
            getattr(theirs, f"weight_{name}_l0").copy_(mine.weight)
            getattr(theirs, f"bias_{name}_l0").copy_(mine.bias)
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(net(x.flatten(1)), theirs(x)[0][:, -1], atol=1e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_masked_sequence_is_the_sequence_without_its_filling(cell: Any) -> None:
    whole, plain = recurrent(3, 6, cell, mask=True)(15).double(), recurrent(2, 6, cell)(10).double()
    plain.load_state_dict(whole.state_dict())
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0)).double()
    told = whole(masked(x, torch.tensor([5, 3, 1, 0])))
    for row, length in enumerate([5, 3, 1]):
        assert torch.allclose(told[row], plain(x[row, :length].flatten()), atol=1e-12)
    assert torch.equal(told[3], torch.zeros(6).double())
    assert not torch.allclose(told[0], plain(x[0].flip(0).flatten()))


def bags(x: Tensor) -> None:
    """x_n is a set of elements around z_n."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([*x.shape]).to_event(2), obs=x)


def test_a_guide_with_a_set_encoder_does_not_see_the_order_of_raw_data() -> None:
    x = 50 + 20 * torch.randn(30, 4, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)  # each place differs
    guide = Amortized(bags, x, encoder=set_encoder(2), family=Point)
    with isolated(), torch.no_grad():
        assert torch.allclose(guide(x)["z"], guide(x.flip(1))["z"], atol=1e-5)
        plain = Amortized(bags, x, encoder=mlp(8), family=Point)
        assert not torch.allclose(plain(x)["z"], plain(x.flip(1))["z"], atol=1e-2)


@pytest.mark.parametrize(
    "encoder", [set_encoder(2), recurrent(2, 8), recurrent(2, 8, "lstm"), set_encoder(2, mask=True)]
)
def test_structured_encoders_trace_and_give_the_eager_losses(encoder: Encoder) -> None:
    x = torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(0))
    losses = []
    for how in (False, "trace"):
        torch.manual_seed(0)
        guide = Amortized(bags, x, encoder=encoder)
        svi = dgm.SVI(bags, guide, partial(torch.optim.Adam, lr=1e-2), compile=how)  # type: ignore[arg-type]
        torch.manual_seed(1)
        losses.append([svi.step(x) for _ in range(4)])
    assert svi.kind == "trace" and svi.fallback is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("encoder", [set_encoder(2, hidden=(4,)), recurrent(2, 3), recurrent(2, 3, "lstm", mask=True)])
def test_structured_encoders_stack(encoder: Encoder) -> None:
    nets = [encoder(6) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)
    x = torch.rand(4, 6)
    together = torch.func.vmap(lambda p: torch.func.functional_call(nets[0], p, (x,)))(stacked)
    for k, net in enumerate(nets):
        assert torch.allclose(together[k], net(x), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: set_encoder(3)(10), "a row has 10 values, no whole number of elements of 3"),
        (lambda: recurrent(3)(10), "a row has 10 values, no whole number of steps of 3"),
        (lambda: set_encoder(1, mask=True), "none is left"),
        (lambda: set_encoder(0), "at least 1"),
        (lambda: set_encoder(2, pooled=()), "one width or more"),
        (lambda: set_encoder(2, pool="max"), "'mean' or 'sum', got 'max'"),  # type: ignore[arg-type]
        (lambda: recurrent(2, cell="rnn"), "'gru' or 'lstm', got 'rnn'"),  # type: ignore[arg-type]
    ],
)
def test_structured_encoders_refuse(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


# --- what an encoder sees, and what it must give ---


def two_arrays(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x * z).sum(-1), 1.0), obs=y)


def test_inputs_choose_what_the_encoder_sees() -> None:
    x, y = torch.randn(9, 2), torch.randn(9)
    for inputs, width in ((None, 3), (["x"], 2), ([1], 1), (["y", "x"], 3)):
        guide = Amortized(two_arrays, x, y, inputs=inputs, encoder=linear())  # type: ignore[arg-type]
        assert guide.family.loc.weight.shape == (2, width)
        with isolated():
            assert guide(x, y)["z"].shape == (9, 2)
    only = Amortized(two_arrays, x, y, inputs=["x"], encoder=linear(), family=Point)
    with isolated():
        assert torch.equal(only(x, y)["z"], only(x, 10 * y)["z"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["labels"], "no argument 'labels'"),
        ([2], "no argument 2, the batch has 2"),
        ([-1], "no argument -1"),
        ([], "names no argument"),
    ],
)
def test_unknown_inputs_are_refused(inputs: list[Any], message: str) -> None:
    with pytest.raises(GuideError, match=message):
        Amortized(two_arrays, torch.zeros(9, 2), torch.zeros(9), inputs=inputs)


def test_an_input_without_rows_is_refused() -> None:
    def model(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    with pytest.raises(GuideError, match=r"argument 'scale' \(\(\)\) does not have the 5 rows"):
        Amortized(model, torch.zeros(5), torch.ones(()), inputs=["scale"])


class Wrong(nn.Module):
    """An encoder whose output is made by a function."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.mean(0), r"encoder Wrong gives shape \(5,\) for 2 rows, expected \(2, c\)"),
        (lambda x: x.sum(), r"shape \(\) for 2 rows"),
        (lambda x: x[:, None], r"shape \(2, 1, 5\) for 2 rows"),
        (lambda x: x @ x.mT, "gives 2 values for each of 2 rows and 3 for each of 3"),
        (lambda x: (x, x), "gives a tuple, expected a tensor"),
        (lambda x: x @ torch.zeros(7, 2), "cannot read rows of 5 values: mat1 and mat2"),
    ],
)
def test_encoders_that_give_something_else_are_refused_by_name(make: Callable[[Tensor], Any], message: str) -> None:
    model, batch = linear_vae.example()
    with pytest.raises(GuideError, match=message):
        Amortized(model, *batch, encoder=Wrong(make))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_start_near_the_prior_or_near_a_point(scale: float) -> None:
    model, (x,) = linear_vae.example()
    guide = Amortized(model, x, init_scale=scale, encoder=Wrong(torch.zeros_like))
    with isolated(), torch.no_grad():
        draws = torch.stack([guide(x)["z"] for _ in range(400)])
    n = draws.numel()
    assert abs(float(draws.std()) / scale - 1) < 4.5 / (2 * n) ** 0.5
    assert abs(float(draws.mean())) < 4.5 * scale / n**0.5


def test_a_start_that_cannot_be_told_is_refused() -> None:
    model, (x,) = linear_vae.example()
    with pytest.raises(GuideError, match="cannot be told where to start"):
        Amortized(model, x, init_scale=0.1, family=partial(zuko.flows.NICE, hidden_features=(8,)))
    with pytest.raises(OptionError, match="init_scale must be positive and finite, got -1"):
        Amortized(model, x, init_scale=-1.0)
