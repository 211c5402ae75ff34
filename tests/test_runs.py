"""Passes as graphs: the same numbers as the program's, with the parameters and data of now, where they pay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from dgm import evaluate, runs
from dgm.evaluate import predict
from dgm.guides.encoders import mlp
from dgm.guides.free import Free
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.heldout import HeldOut
from dgm.models import bnn, vae
from dgm.models.linear_vae import LinearVAE
from dgm.programs import preserved_rng
from dgm.registry import families, models
from dgm.runs import Graphs
from dgm.sites import latents
from dgm.weights import LogWeightSampler

NEVER = 10**9


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the traces; graphs as soon as one pass is done."""
    count: list[int] = []
    trace = runs.trace
    monkeypatch.setattr(runs, "trace", lambda *args: count.append(1) or trace(*args))
    monkeypatch.setattr(runs, "PASSES", 0)
    yield count


def draw(sampler: LogWeightSampler, samples: int = 7, chunk: int = 3, seed: int = 5) -> Tensor:
    """All terms of the log weights, `(S, B + 1)`."""
    with preserved_rng(seed):
        parts = list(sampler.chunks(samples, chunk))
    return torch.cat([torch.cat([part.local, part.global_.expand(len(part.local))[:, None]], 1) for part in parts])


def eager(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Tensor:
    """The same by the programs themselves, from a new sampler."""
    with monkeypatch.context() as patch:
        patch.setattr(runs, "PASSES", NEVER)
        return draw(LogWeightSampler(*args), **kwargs)


def vae_pair() -> tuple[Any, Any, Tensor]:
    model, (x,) = vae.example()
    with preserved_rng(0):
        return model, Joint(model, x, encoder=mlp(8)), x


# --- the same numbers ------------------------------------------------------------------------------------------------


def drawn_by_noise(name: str) -> bool:
    """Whether the draws are a function of standard noise; those of discrete latents are not, and have no graph."""
    model, batch = models()[name].module.example()
    return not any(site.discrete for site in latents(model, *batch).values())


QUICK = {(model, "diagonal-normal") for model in models()} | {("vae", "inverse-autoregressive-flow")}
ZOO = [
    pytest.param(model, family, marks=() if (model, family) in QUICK else pytest.mark.slow)
    for model in filter(drawn_by_noise, models())
    for family in families()
    if family != "point"
]


@pytest.mark.parametrize(("model_name", "family"), ZOO)
def test_a_graph_gives_what_the_program_gives(
    model_name: str, family: str, traces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the zoo: one pass by the program, one by the graph, and a smaller last one by the same graph."""
    model, batch = models()[model_name].module.example()  # type: ignore[attr-defined]
    with preserved_rng(0):
        guide = Joint(model, *batch, family=families()[family].make)
    sampler = LogWeightSampler(model, guide, *batch)
    mine, truth = draw(sampler), eager(monkeypatch, model, guide, *batch)
    assert sampler.runs.fallback is None and sampler.runs.graphs.traced == len(traces) == 1
    assert torch.allclose(mine, truth, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(mine[:3], mine[3:6], atol=1e-3), "each pass has its own noise"


def test_rows_of_guides_with_parameters_for_each_datum(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows a chunk holds is an input: two chunks share a graph, and each has its own parameters."""
    model, x = LinearVAE.simulate(2300, 4, 2, generator=torch.Generator().manual_seed(0))
    free = Free(model, x)
    with torch.no_grad():
        for p in free.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(runs, "BYTES_AT_ONCE", 200_000)
    mine = evaluate(model, free, x, num_samples=100)
    assert len(traces) == 2, "one for the chunks of 1000 rows, one for the last of 300"
    monkeypatch.setattr(runs, "PASSES", NEVER)
    assert np.allclose(mine.per_datum, evaluate(model, free, x, num_samples=100).per_datum, rtol=1e-3, atol=1e-4)
    assert len(traces) == 2


def test_predictive_draws(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = bnn.example()
    with preserved_rng(0):
        guide = Global(model, x, y)
    out = []
    for passes in (0, NEVER):
        monkeypatch.setattr(runs, "PASSES", passes)
        monkeypatch.setattr(runs, "BYTES_AT_ONCE", 4000)
        with preserved_rng(1):
            out.append(predict(model, guide, x, y, num_samples=50))
    assert len(traces) == 1 and out[0] is not None and out[1] is not None
    assert torch.allclose(out[0].loc, out[1].loc, atol=1e-5) and torch.allclose(out[0].scale, out[1].scale, atol=1e-5)


# --- what a kept graph must not have kept ----------------------------------------------------------------------------


def test_a_kept_sampler_sees_the_present_parameters_and_buffers(
    traces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide, x = vae_pair()
    sampler = LogWeightSampler(model, guide, x)
    before = draw(sampler)
    with torch.no_grad():
        for tensor in [*model.parameters(), *guide.parameters(), *model.buffers()]:
            tensor.add_(0.1)
    after = draw(sampler)
    assert len(traces) == 1 and not torch.allclose(before, after, atol=0.01)
    assert torch.allclose(after, eager(monkeypatch, model, guide, x), rtol=1e-5, atol=1e-4)


class Tempered(nn.Module):
    """A number that training may change, and that a graph would hold as a constant."""

    temperature = 1.0

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.temperature), obs=x)


def normal_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5))


def test_numbers_of_a_module_that_change(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Tempered(), torch.linspace(-1, 1, 5)
    sampler = LogWeightSampler(model, normal_guide, x)
    draw(sampler)
    for temperature in (2.0, 3.0):
        model.temperature = temperature
        assert torch.allclose(draw(sampler), eager(monkeypatch, model, normal_guide, x), atol=1e-5)
    assert len(traces) == 3


# --- where it pays ---------------------------------------------------------------------------------------------------


def test_a_graph_is_made_where_enough_passes_are_done_or_to_come(
    traces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guide, x = vae_pair()
    monkeypatch.setattr(runs, "PASSES", 5)
    sampler = LogWeightSampler(model, guide, x)
    draw(sampler, samples=10, chunk=2)
    assert not traces, "five passes"
    draw(sampler, samples=2, chunk=2)
    assert len(traces) == 1, "the sixth"
    draw(LogWeightSampler(model, guide, x), samples=12, chunk=2)
    assert len(traces) == 2, "six to come"
    shared = Graphs()
    shared.batches = 5
    draw(LogWeightSampler(model, guide, x, graphs=shared), samples=2, chunk=2)
    draw(LogWeightSampler(model, guide, x + 0, graphs=shared), samples=2, chunk=2)
    assert len(traces) == 3 and shared.traced == 1, "one here and five in batches to come"


def test_validations_keep_their_graph(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x = vae_pair()
    monkeypatch.setattr(runs, "PASSES", 2)
    held_out = HeldOut(model, guide, (x,))
    values = [held_out.bound(seed=0) for _ in range(5)]
    assert len(traces) == 1 and all(torch.allclose(v, values[0], rtol=1e-5, atol=1e-4) for v in values)


# --- what cannot be a graph ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """What it gives depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> None:
        self.calls.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, float(len(self.calls))), obs=x)


def test_a_graph_that_differs_is_not_used(traces: list[int]) -> None:
    model = Counting()
    sampler = LogWeightSampler(model, normal_guide, torch.zeros(3))
    done = len(model.calls)
    draw(sampler, samples=8, chunk=2)
    assert "does not give the program's numbers" in str(sampler.runs.fallback)
    assert sampler.runs.graphs.traced == 0 and len(traces) == 1
    assert len(model.calls) == done + 4 + 1, "four passes by the program, and one trace"


def test_parameters_that_nobody_holds(traces: list[int]) -> None:
    """A function that closes over a module: a graph would keep the values of now."""
    layer = nn.Linear(1, 1)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(layer(x[:, None])[:, 0], 0.5))

    sampler = LogWeightSampler(Tempered(), guide, torch.zeros(3))
    before = draw(sampler)
    assert "a parameter that neither of them holds" in str(sampler.runs.fallback)
    with torch.no_grad():
        layer.bias.add_(1.0)
    assert not torch.allclose(before, draw(sampler), atol=1e-3)


class Marking(Tempered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        self.seen.add_(1.0)
        super().forward(x)


def test_buffers_that_change_in_a_run(traces: list[int]) -> None:
    model = Marking()
    sampler = LogWeightSampler(model, normal_guide, torch.zeros(3))
    draw(sampler, samples=4, chunk=2)
    assert "in place" in str(sampler.runs.fallback)
    seen = float(model.seen)
    draw(sampler, samples=4, chunk=2)
    assert float(model.seen) == seen + 2


def test_a_graph_that_fails_later(traces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide, x = vae_pair()
    sampler = LogWeightSampler(model, guide, x)
    draw(sampler)

    def fail(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runs._Graph, "__call__", fail)
    assert torch.allclose(draw(sampler), eager(monkeypatch, model, guide, x), rtol=1e-5, atol=1e-4)
    assert sampler.runs.fallback == "RuntimeError: out of memory" and sampler.runs.graphs.traced == 0


def test_batches_that_hold_more_than_tensors(traces: list[int]) -> None:
    """What is inside a container is no input of a graph."""

    def model(x: Tensor, more: dict[str, Tensor]) -> None:
        Tempered().forward(x + more["shift"])

    def guide(x: Tensor, more: dict[str, Tensor]) -> None:
        normal_guide(x)

    draw(LogWeightSampler(model, guide, torch.zeros(3), {"shift": torch.ones(3)}))
    assert not traces


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import resource
import torch
from dgm import evaluate
from dgm.guides.joint import Joint
from dgm.models.linear_vae import LinearVAE
torch.set_num_threads(1)
model, x = LinearVAE.simulate(200, 20, 2, generator=torch.Generator().manual_seed(0))
guide = Joint(model, x)
evaluate(model, guide, x, num_samples=2000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate(model, guide, x, num_samples={samples})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_memory_does_not_grow_with_the_samples() -> None:
    """50,000 samples of 200 rows are 40 MB for each number of a row, 800 MB for its features: less than 100 MB more."""
    out = subprocess.run(
        [sys.executable, "-c", PEAK.format(samples=50_000)], capture_output=True, text=True, check=True
    )
    assert float(out.stdout) < 100
