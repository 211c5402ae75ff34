"""The modes of a step: the same numbers eager, traced and compiled; honest fallbacks; when each of them pays."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import dgm
from dgm.errors import OptionError, TrainingError
from dgm.flush import flushed
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.joint import Joint
from dgm.models import vae
from dgm.models.bayesian_linear_regression import example as regression
from dgm.pace import COMPILE_SECONDS, SAMPLES, SAVED, TRACE_SECONDS, Pace
from dgm.programs import preserved_rng
from dgm.registry import families, models
from dgm.rules import Counter, Numbers, groups_of, numbers_of, rule_of, state_of
from dgm.testing import check_pair
from dgm.whole import whole_step

OPTIMISERS: dict[str, Any] = {
    "Adam": partial(torch.optim.Adam, lr=0.1),
    "Adam, fused": partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.99), eps=1e-3, fused=True),
    "Adam, decay": partial(torch.optim.Adam, lr=0.1, weight_decay=0.3),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3),
    "SGD": partial(torch.optim.SGD, lr=1e-3),
    "SGD, momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "SGD, Nesterov": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, nesterov=True),
}


def slopes() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([1.0, -2.0, 0.5])), nn.Parameter(torch.tensor(0.3))]


def squares(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss = sum (a x)^2 + b^4, with its gradients."""
    return ((a * x) ** 2).sum() + b**4, 2 * a * x * x, 4 * b**3


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_whole_step_is_the_optimiser_s(name: str, clip: float | None) -> None:
    mine, theirs = slopes(), slopes()
    a, b = OPTIMISERS[name](mine), OPTIMISERS[name](theirs)
    rule = rule_of(a)
    assert rule is not None
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (a, b)]
    forms = [rule.form(group) for group in a.param_groups]
    step = whole_step(squares, rule, groups_of(a, mine), forms, [False, False], clip)
    counter = Counter(a, mine)
    for t in range(8):
        x = torch.tensor([1.0, 0.5 + t, 2.0])
        with torch.no_grad():
            states = [s for state in state_of(a, rule, mine) for s in state]
            loss, norm = step(*mine, *states, torch.from_numpy(numbers_of(rule, a, t + 1)).float(), x)
            counter.pending += 1
        expected, *gradients = squares(*theirs, x)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.detach()
        length = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(theirs, clip, length)
        b.step()
        a._opt_called = True  # type: ignore[attr-defined]
        for schedule in schedules:
            schedule.step()
        assert float(loss) == pytest.approx(float(expected.detach())) and float(norm) == pytest.approx(float(length))
        for p, q in zip(mine, theirs, strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    if not rule.slots:
        return  # SGD without momentum remembers nothing
    for state, other in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
        for key in other:
            if other[key] is not None:
                assert torch.allclose(state[key], other[key], rtol=1e-5), f"{key}: a saved run goes on as the other"


def test_numbers_ahead_are_those_of_the_step() -> None:
    rates = (0.1, 0.2)
    optimisers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate) for rate in rates]
    rule = rule_of(optimisers[0])
    assert rule is not None
    numbers = Numbers(rule, optimisers, torch.zeros(()))
    for step in range(1, 2 * Numbers.AHEAD + 10):
        if step == 40:
            optimisers[1].param_groups[0]["betas"] = (0.5, 0.6)
        if step > 80:  # a schedule
            optimisers[0].param_groups[0]["lr"] = 0.1 / step
        expected = np.stack([numbers_of(rule, optimiser, step) for optimiser in optimisers])
        assert torch.equal(numbers(step), torch.from_numpy(expected).float())


def test_a_step_size_that_is_a_tensor_is_read_at_each_step() -> None:
    optimiser = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=torch.tensor(0.1), foreach=False)
    rule = rule_of(optimiser)
    assert rule is not None
    numbers = Numbers(rule, [optimiser], torch.zeros(()))
    for step in (1, 2, 3):
        numbers(step)
    optimiser.param_groups[0]["lr"].mul_(2)
    assert torch.equal(numbers(4)[0], torch.from_numpy(numbers_of(rule, optimiser, 4)).float())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    mine = slopes()
    optimiser = OPTIMISERS["Adam"](mine)
    rule = rule_of(optimiser)
    assert rule is not None
    step = whole_step(squares, rule, [0, 0], [rule.form(optimiser.param_groups[0])], [False, False], None)
    with torch.no_grad():
        states = [s for state in state_of(optimiser, rule, mine) for s in state]
        before = [t.clone() for t in [*mine, *states]]
        numbers = torch.from_numpy(numbers_of(rule, optimiser, 1)).float()
        loss, _ = step(*mine, *states, numbers, torch.tensor([1.0, float("inf"), 1.0]))
    assert not torch.isfinite(loss)
    assert all(torch.equal(a, b) for a, b in zip(before, [*mine, *states], strict=True))


def test_optimisers_without_a_rule() -> None:
    p = [torch.zeros(2, requires_grad=True)]
    assert rule_of(torch.optim.Adam(p, amsgrad=True)) is None
    assert rule_of(torch.optim.SGD(p, lr=1.0, momentum=0.5, dampening=0.1)) is None
    assert rule_of(torch.optim.Adam(p, maximize=True)) is None
    hooked = torch.optim.Adam(p)
    hooked.register_step_post_hook(lambda *_: None)
    assert rule_of(hooked) is None, "somebody wants to see each step"


# --- the compiler ----------------------------------------------------------------------------------------------------


def trained(compile: Any, optim: Any = None, clip: float | None = None, steps: int = 12) -> tuple[Any, list[float]]:
    model, batch = regression()
    with preserved_rng(0):
        guide = Joint(model, *batch, family=DiagonalNormal)
    svi = dgm.SVI(model, guide, optim or partial(torch.optim.Adam, lr=0.05), compile=compile, clip=clip)
    svi.prepare(*batch)
    with preserved_rng(3):
        return svi, [svi.step(*batch) for _ in range(steps)]


def test_compiled_steps_are_the_eager_ones(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    svi, compiled = trained("inductor")
    assert svi.kind == "inductor" and svi.fallback is None and svi.uncompiled is None
    assert caplog.text.count("compiling") == 1
    other, eager = trained(False)
    assert compiled == pytest.approx(eager, rel=1e-5)
    for a, b in zip(svi.parameters.values(), other.parameters.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIMISERS, "RMSprop"])
def test_compiled_steps_with_every_optimiser(name: str) -> None:
    optim = OPTIMISERS.get(name, partial(torch.optim.RMSprop, lr=0.01))
    svi, compiled = trained("inductor", optim, clip=5.0)
    assert svi.kind == "inductor"
    assert compiled == pytest.approx(trained(False, optim, clip=5.0)[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("model", models())
def test_compiled_steps_over_the_zoo(model: str, family: str) -> None:
    program, batch = models()[model].module.example()
    with preserved_rng(1):
        guide = Joint(program, *batch, family=families()[family].make)
    check_pair(program, guide, *batch, compile="inductor", steps=12)


@pytest.mark.slow
def test_going_on_from_compiled_to_eager_and_back() -> None:
    """The optimiser's state is torch's own: a smaller batch in between runs another way, on the same moments."""
    model, (x,) = vae.example()
    losses: dict[Any, list[float]] = {}
    for mode in ("inductor", False):
        with preserved_rng(0):
            guide = Joint(model, x, family=DiagonalNormal)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        svi = dgm.SVI(model, guide, partial(torch.optim.Adam, lr=0.02), sizes={"data": 20}, compile=mode)
        svi.prepare(x[:8])
        with preserved_rng(3):
            losses[mode] = []
            for step in range(12):
                svi.compile = False if step % 4 == 3 else mode
                svi._compiled, held = ({}, svi._compiled) if step % 4 == 3 else (svi._compiled, None)
                losses[mode].append(svi.step(x[:8]))
                svi._compiled = svi._compiled if held is None else held
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
    assert losses["inductor"] == pytest.approx(losses[False], rel=1e-5)


def test_a_compiler_that_fails_is_said_once_and_the_graph_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    svi, losses = trained("inductor")
    assert svi.kind == "trace" and svi.uncompiled is not None and "No working C++ compiler" in svi.uncompiled
    assert caplog.text.count("traced, not compiled") == 1 and "more" not in svi.uncompiled
    assert losses == pytest.approx(trained(False)[1], rel=1e-5)
    _, (x, y) = regression()
    fits = dgm.fit(lambda: regression()[0], partial(Joint), x, y, steps=4, replicas=2, compile="inductor")
    assert all("No working C++ compiler" in fit.engine for fit in fits)


def test_a_compiler_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(module: Any, *_: Any, **__: Any) -> Any:
        return lambda *inputs: module(*inputs) * 1.01

    monkeypatch.setattr(torch._inductor, "compile", wrong)
    svi, losses = trained("inductor")
    assert svi.kind == "trace" and caplog.text.count("other numbers than the graph") == 1
    assert losses == pytest.approx(trained(False)[1], rel=1e-5)


@pytest.mark.slow
def test_a_machine_without_a_compiler() -> None:
    code = "import tests.test_compile as t\nsvi, losses = t.trained('inductor')\nprint(svi.kind, svi.uncompiled)\n"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        capture_output=True,
        text=True,
    )
    assert out.stdout.startswith("trace ") and "compiler" in out.stdout.lower(), out.stdout + out.stderr


@pytest.mark.slow
def test_a_compiled_step_that_is_not_finite_names_the_site() -> None:
    class Fragile(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, self.scale), obs=x)

    model, x = Fragile(), torch.zeros(4)
    guide = Joint(model, x, family=DiagonalNormal)
    svi = dgm.SVI(model, guide, partial(torch.optim.Adam, lr=0.01), compile="inductor")
    svi.step(x)
    with torch.no_grad():
        model.scale.fill_(0.0)
    before = [p.detach().clone() for p in svi.parameters.values()]
    with pytest.raises(TrainingError, match=r"step 2: .*'x' of the model"):
        svi.step(x)
    assert all(torch.equal(a, b) for a, b in zip(before, svi.parameters.values(), strict=True))


# --- fallbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["speed", 0, None, True, "Trace"])
def test_unknown_modes(mode: Any) -> None:
    model, batch = regression()
    with pytest.raises(OptionError, match="expected False, 'trace', 'inductor' or 'auto'"):
        dgm.SVI(model, Joint(model, *batch), partial(torch.optim.Adam, lr=0.1), compile=mode)


def test_the_site_or_the_operation_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def gamma_guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("s", dist.Gamma(a, 1.0))

    def model(x: Tensor) -> None:
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    def branching(x: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(1.0 if s > 1 else 0.0, s), obs=x)

    x = torch.ones(4)
    for program, guide, words in (
        (model, gamma_guide, "site 's' of the guide (Gamma)"),
        (branching, Joint(branching, x), "control flow that depends on values (if, float() or .item() of a tensor)"),
    ):
        caplog.clear()
        svi = dgm.SVI(program, guide, partial(torch.optim.Adam, lr=0.01), compile="trace")
        for _ in range(3):
            svi.step(x)
        assert svi.kind == "eager" and svi.fallback is not None and words in svi.fallback
        assert caplog.text.count("stays eager") == 1 and words in caplog.text


# --- what pays -------------------------------------------------------------------------------------------------------


def test_the_rule() -> None:
    pace = Pace()
    assert not pace.pays("trace", 10**9), "nothing is known yet"
    for _ in range(SAMPLES + 1):
        pace.add("eager", 0.01)
    enough = TRACE_SECONDS / (0.01 * SAVED)
    assert pace.pays("trace", int(enough * 1.01)) and not pace.pays("trace", int(enough * 0.99))
    assert not pace.pays("trace", None), "an open run is expected to last as long again, and few steps were made"
    pace.done = int(enough * 1.01)
    assert pace.pays("trace", None)
    for _ in range(SAMPLES + 1):
        pace.add("trace", 0.005)
    fixed, each = COMPILE_SECONDS
    enough = (fixed + 100 * each) / (0.005 * SAVED)
    assert pace.pays("inductor", int(enough * 1.01), 100) and not pace.pays("inductor", int(enough * 0.99), 100)


def test_auto_goes_on_to_a_graph_and_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgm.pace.TRACE_SECONDS", 0.02)
    model, batch = regression()
    long = dgm.fit(model, Joint(model, *batch), *batch, steps=400)
    assert long.engine == "trace"
    short = dgm.fit(model, Joint(model, *batch), *batch, steps=20)
    assert short.engine == "eager", "a graph does not pay for twenty steps"


def test_denormals_are_zeros_inside_only() -> None:
    tiny = torch.full((4,), 1e-40)
    with flushed():
        with flushed():
            assert bool((tiny * 1.0 == 0).all())
        assert bool((tiny * 1.0 == 0).all()), "the inner one ends nothing"
    assert bool((tiny * 1.0 > 0).all())
