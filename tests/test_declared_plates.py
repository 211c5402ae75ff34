"""A plate that declares its full size, and one whose size training is told: the same losses and log weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor

import dgm
from dgm.guides import amortized
from dgm.guides.amortized import Amortized
from dgm.guides.free import Free
from dgm.models.linear_vae import LinearVAE
from dgm.programs import preserved_rng

TOTAL, ROWS = 800, 8


def programs() -> tuple[LinearVAE, Callable[[Tensor], None], Tensor]:
    plain, x = LinearVAE.simulate(ROWS, 5, 2, generator=torch.Generator().manual_seed(0))
    plain.requires_grad_(False)

    def declared(x: Tensor) -> None:
        with pyro.plate("data", TOTAL, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", plain.decode(z), obs=x)

    return plain, declared, x


def loss_of(model: Any, guide: Any, x: Tensor, loss: Any, **options: Any) -> float:
    with preserved_rng(0):
        svi = dgm.SVI(model, guide, partial(torch.optim.SGD, lr=0.0), loss, compile=False, **options)
        return svi.step(x, rows=torch.arange(ROWS)) if isinstance(guide, Free) else svi.step(x)


LOSSES = {
    "ELBO": lambda: dgm.ELBO(particles=4),
    "stl": lambda: dgm.ELBO(particles=4, estimator="stl"),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=4),
    "importance": lambda: dgm.ImportanceELBO(samples=4),
    "dreg": lambda: dgm.ImportanceELBO(samples=4, estimator="dreg"),
    "analytic": lambda: dgm.ELBO(kl="analytic", particles=4),
    "Renyi": lambda: dgm.RenyiELBO(alpha=0.5, samples=4),
}


@pytest.mark.parametrize("attach", [Amortized, Free])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_depend_on_who_says_the_full_size(attach: Any, name: str) -> None:
    plain, declared, x = programs()
    one, two = attach(declared, x), attach(plain, x)
    two.load_state_dict(one.state_dict())
    told = loss_of(plain, two, x, LOSSES[name](), sizes={"data": TOTAL})
    assert loss_of(declared, one, x, LOSSES[name]()) == pytest.approx(told, rel=1e-5)
    a, b = (dgm.log_weights(m, g, x, num_samples=8) for m, g in ((declared, one), (plain, two)))
    assert torch.allclose(a, b, atol=1e-4)


def test_a_scale_of_which_the_frame_knows_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self: Any, msg: Any) -> None:
        if self.full_size is not None:
            msg["scale"] = msg["scale"] * (self.full_size / ROWS)

    _, declared, x = programs()
    guide = Amortized(declared, x)
    right = loss_of(declared, guide, x, dgm.ELBO(particles=4))
    monkeypatch.setattr(amortized._Declared, "_pyro_sample", scaled)
    assert abs(loss_of(declared, guide, x, dgm.ELBO(particles=4)) - right) > 1000


def test_the_guide_draws_no_subsample() -> None:
    _, declared, x = programs()
    guide = Amortized(declared, x)
    with pyro.get_param_store().scope():
        trace = pyro.poutine.trace(guide).get_trace(x)
        with IndepMessenger("other", 3, dim=-2):
            inside = pyro.poutine.trace(guide).get_trace(x).nodes["z"]["cond_indep_stack"]
    assert all(f.full_size == TOTAL for f in trace.nodes["z"]["cond_indep_stack"])
    assert float(trace.nodes["z"]["scale"]) == TOTAL / ROWS
    assert {f.name: f.full_size for f in inside} == {"data": TOTAL, "other": None}
