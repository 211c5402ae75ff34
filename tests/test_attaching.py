"""Attaching a guide: its floating type is that of the latents, and what cannot be attached is refused by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import dgm
from dgm.errors import GuideError, OptionError
from dgm.guides.amortized import Amortized
from dgm.guides.coupling_spline_flow import CouplingSplineFlow
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.global_ import Global
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.programs import isolated
from dgm.registry import attachments


def doubles(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def weights(x: Tensor) -> None:
    w = pyro.sample("layer.weight", dist.Normal(x.new_zeros(3, 2), 1.0).to_event(2))
    v = pyro.sample("out.weight", dist.Normal(x.new_zeros(1, 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((torch.tanh(x @ w.mT) @ v.mT).squeeze(-1), 1.0), obs=x[:, 0])


def coin(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.5 * x.new_ones(())))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x[:, 0])


@pytest.mark.parametrize("name", sorted(attachments()))
def test_a_guide_has_the_floating_type_of_its_latents(name: str) -> None:
    make, x = attachments()[name].make, torch.randn(6, 2, dtype=torch.float64)
    local = name in ("amortized", "auxiliary", "discrete", "free", "hamiltonian", "joint", "semi-amortized", "top-down")
    model: Any = coin if name == "discrete" else doubles if local else weights
    if name in ("last-layer", "nuts"):
        pytest.skip("needs a network, or samples")
    guide = make(model, x)
    svi = dgm.SVI(model, guide, lambda ps: torch.optim.Adam(ps, lr=1e-3))
    assert torch.isfinite(torch.tensor(svi.step(x)))
    assert {p.dtype for p in svi.parameters.values()} == {torch.float64}


def test_data_of_another_floating_type_are_converted_for_the_encoder() -> None:
    """A float32 model on float64 data: what the guide draws is float32, as the model's networks need it."""

    def single(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2, dtype=torch.float64)
    guide = Amortized(single, x)
    with isolated():
        assert guide(x)["z"].dtype == torch.float32
        guide.double()
        assert guide(x)["z"].dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": nn.Linear(2, 3)}, "parameters of torch.float32, the latents .* torch.float64: convert it"),
        ({"encoder": nn.Linear}, "encoder Linear cannot be made for rows of 2 values"),
        ({"encoder": "mlp"}, "encoder is 'mlp', expected a factory"),
        ({"encoder": lambda width: 3}, "encoder made a int, expected a torch module"),
        ({"family": DiagonalNormal(2)}, r"family is an object DiagonalNormal\(...\), expected what makes one"),
        ({"family": "point"}, "family is 'point', expected what makes one .* dgm.guides.attached takes names"),
        ({"family": lambda n, context: dist.Normal(0.0, 1.0)}, "is a Normal, expected a torch module"),
        ({"sites": "z"}, r"sites is 'z', expected a list of names: sites=\['z'\]"),
        ({"inputs": "x"}, r"inputs is 'x', expected a list of names or places: inputs=\['x'\]"),
        ({"inputs": [0.5]}, "inputs holds 0.5, expected names or places"),
    ],
)
def test_what_is_no_encoder_or_family_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GuideError, match=message):
        Amortized(doubles, torch.zeros(5, 2, dtype=torch.float64), **options)


@pytest.mark.parametrize("scale", [-1.0, 0.0, math.nan, math.inf, "wide", True])
def test_a_start_of_no_scale_is_refused(scale: Any) -> None:
    for make, model in ((Amortized, doubles), (Global, weights)):
        with pytest.raises(OptionError, match="init_scale must be positive and finite"):
            make(model, torch.zeros(5, 2), init_scale=scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiagonalNormal("3"),  # type: ignore[arg-type]
        lambda: DiagonalNormal(2.5),  # type: ignore[arg-type]
        lambda: DiagonalNormal(True),
        lambda: CouplingSplineFlow("3"),  # type: ignore[arg-type]
        lambda: CouplingSplineFlow(3, hidden=64),  # type: ignore[arg-type]
        lambda: CouplingSplineFlow(3, hidden=(8.0,)),  # type: ignore[arg-type]
        lambda: LowRankNormal(3, rank=1.5),  # type: ignore[arg-type]
        lambda: DiagonalNormal(3, scale="wide"),  # type: ignore[arg-type]
    ],
)
def test_numbers_of_another_kind_are_refused(make: Any) -> None:
    with pytest.raises(OptionError, match=r"whole number|hidden needs|positive and finite|rank must be"):
        make()


@pytest.mark.parametrize("decoder", [None, nn.Linear(2, 2)])
def test_fit_trains_in_the_floating_type_of_the_programs(decoder: nn.Module | None) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = copy.deepcopy(decoder)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z if self.decoder is None else self.decoder(z), 1.0).to_event(1), obs=x)

    x = torch.randn(8, 2, dtype=torch.float64)
    model = Model().double()
    fit = dgm.fit(model, Amortized(model, x), x, epochs=1, batch_size=5)
    assert {p.dtype for p in fit.guide.parameters()} == {torch.float64}
    assert math.isfinite(fit.history["elbo"].iloc[-1])
