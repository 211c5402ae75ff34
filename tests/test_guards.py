"""Values that are not finite: the last good state stays, the report names its cause, every engine does the same"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import dgm.replica_graph
import dgm.svi
from dgm import ELBO, SVI, fit
from dgm.errors import DataError, OptionError, TrainingError
from dgm.replicas import Replicas
from dgm.whole import whole_step

ADAM = partial(torch.optim.Adam, lr=0.05)
ROWS = 8
make = partial(SVI, sizes={"data": 108})
"""The rows of a batch are 100 to 107 of the data."""
IDS = torch.arange(ROWS) + 100
Batch = tuple[Tensor, Tensor]
Engine = Any
ENGINES = [False, "trace", pytest.param("inductor", marks=pytest.mark.slow)]


class Model(PyroModule):
    """x ~ N(m + |w g|, 1): its gradient, not its value, is NaN where g is zero: d sqrt(0)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, g: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + (self.w * g).square().sqrt(), 1.0), obs=x)


class Guide(PyroModule):
    def __init__(self, loc: float = 0.3) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor, g: Tensor) -> None:
        pyro.sample("m", dist.Normal(self.loc, self.scale.exp()))


def good(seed: int = 0) -> Batch:
    x = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
    return x, torch.ones(ROWS)


def faulty(fault: str, rows: Sequence[int] = (2, 5)) -> Batch:
    x, g = good()
    if fault == "gradient":
        g[list(rows)] = 0.0
    else:
        x[list(rows)] = math.nan if fault == "nan" else math.inf
    return x, g


FAULTS = ["nan", "inf", "gradient"]


def state_of(svi: SVI) -> list[Tensor]:
    """Everything that a step may change: parameters, buffers, moments and counters of the optimiser."""
    svi.settle()
    assert svi.optimiser is not None
    held = [*svi.parameters.values(), *svi.pair.owners.buffers()]
    held += [torch.as_tensor(v) for p in svi.parameters.values() for v in svi.optimiser.state.get(p, {}).values()]
    return [t.detach().clone() for t in held]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def unharmed(svi: SVI, batch: Batch) -> bool:
    """Whether a step that is not finite leaves everything as it was, bit for bit, and the next step works."""
    for _ in range(3):
        svi.step(*good(), rows=IDS)
    before = state_of(svi)
    try:
        value = svi.step(*batch, rows=IDS)
    except TrainingError:
        assert svi.guard.policy == "stop"
    else:
        assert svi.guard.policy == "skip" and math.isnan(value) and svi.skipped == [4]
    return same(before, state_of(svi)) and math.isfinite(svi.step(*good(), rows=IDS))


# --- nothing changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("compile", ENGINES)
def test_a_step_that_is_not_finite_changes_nothing_at_all(compile: Engine, fault: str, policy: Any) -> None:
    svi = make(Model(), Guide(), ADAM, compile=compile, nonfinite=policy)
    assert unharmed(svi, faulty(fault))
    assert svi.steps == (4 if policy == "stop" else 5), "a skipped step is one of the run's"


@pytest.mark.parametrize("optim", [partial(torch.optim.SGD, lr=0.01, momentum=0.9), partial(torch.optim.RMSprop)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_other_optimisers_and_clipping(optim: Any, clip: float | None) -> None:
    for compile in (False, "trace"):
        assert unharmed(make(Model(), Guide(), optim, compile=compile, clip=clip, nonfinite="skip"), faulty("gradient"))


def test_batch_statistics_are_those_of_the_last_good_step() -> None:
    class Normed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor, g: Tensor) -> None:
            super().forward(x, self.norm(g.unsqueeze(1)).squeeze(1) + 3.0)

    x, g = good()
    g = g + torch.arange(ROWS)
    svi = make(Normed(), Guide(), ADAM, compile=False, nonfinite="skip")
    svi.step(x, g)
    before = state_of(svi)
    bad = g.clone()
    bad[1] = math.nan
    assert math.isnan(svi.step(x, bad)) and same(before, state_of(svi))
    svi.step(x, g)
    assert not torch.equal(before[-1], state_of(svi)[-1]), "good steps move them"


def test_gradients_of_pyro_s_own_losses_do_not_linger() -> None:
    svi = make(Model(), Guide(), ADAM, RenyiELBO(num_particles=2), nonfinite="skip")
    assert unharmed(svi, faulty("gradient"))


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_a_guard_that_looks_after_the_update_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SVI._update

    def late(self: SVI, loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
        with monkeypatch.context() as blind:
            blind.setattr(dgm.svi.math, "isfinite", lambda value: True)
            right(self, loss, gradients)
        return math.isfinite(float(loss))

    monkeypatch.setattr(SVI, "_update", late)
    assert not unharmed(make(Model(), Guide(), ADAM, compile=False), faulty("nan"))


def test_a_guard_that_looks_at_the_loss_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dgm.svi, "_norm", lambda gradients, exact: 0.0)
    for compile in (False, "trace"):
        assert unharmed(make(Model(), Guide(), ADAM, compile=compile), faulty("nan"))
        assert not unharmed_or_raised(make(Model(), Guide(), ADAM, compile=compile), faulty("gradient"))


def unharmed_or_raised(svi: SVI, batch: Batch) -> bool:
    try:
        return unharmed(svi, batch)
    except AssertionError:  # it took the bad step for a good one
        return False


@pytest.mark.parametrize("mutant", ["late", "loss"])
def test_mutants_of_the_replicated_step_are_caught(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    def wrong(gradients: Any, *args: Any, **kwargs: Any) -> Any:
        def blind(*inputs: Tensor) -> Any:
            loss, *found = gradients(*inputs)
            return (loss, *(torch.nan_to_num(g, 1e3) for g in found)) if mutant == "loss" else (loss * 0.0, *found)

        return whole_step(blind, *args, **kwargs)

    assert replica_unharmed(faulty("gradient"))
    monkeypatch.setattr(dgm.replica_graph, "whole_step", wrong)
    if mutant == "loss":
        assert not replica_unharmed(faulty("gradient"))
    else:  # a guard that lets everything through
        monkeypatch.setattr(torch, "isfinite", lambda t: torch.ones_like(t, dtype=torch.bool))
        assert not replica_unharmed(faulty("gradient"))


def replica_unharmed(batch: Batch) -> bool:
    engine = replicas(2, "stop")
    for _ in range(3):
        engine.step(*step_of([good(), good()]))
    before = state_of(engine.svis[1])
    engine.step(*step_of([good(), batch]))
    kept = same(before, state_of(engine.svis[1]))
    engine.step(*step_of([good(), good()]))
    return kept and same(before, state_of(engine.svis[1]))


# --- the engines agree -----------------------------------------------------------------------------------------------


def replicas(count: int, policy: Any, skips: int = 10, compile: Engine = "trace", optim: Any = ADAM) -> Replicas:
    svis = [make(Model(), Guide(0.1 * k), optim, nonfinite=policy, skips=skips) for k in range(count)]
    return _Stepping(svis, good(), compile=compile)


class _Stepping(Replicas):
    def step(self, index: Any = None, *batch: Tensor, **kwargs: Any) -> None:
        super().step(index, batch=batch or None, **kwargs)


def step_of(batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    return IDS.expand(len(batches), -1), torch.stack([b[0] for b in batches]), torch.stack([b[1] for b in batches])


PLAN = ["", "", "nan", "", "gradient", "inf", "", "", ""]


def course(compile: Engine, seed: int, skips: int, optim: Any = ADAM, schedule: Any = None) -> tuple[SVI, list[float]]:
    """A single run over good and bad steps until it ends or gives up."""
    svi = make(Model(), Guide(0.1 * seed), optim, compile=compile, nonfinite="skip", skips=skips)
    torch.manual_seed(seed)
    losses: list[float] = []
    scheduler: Any = None
    for fault in PLAN:
        try:
            losses.append(svi.step(*(faulty(fault) if fault else good()), rows=IDS))
        except TrainingError:
            break
        if schedule is not None:
            scheduler = scheduler or schedule(svi.optimiser)
            scheduler.step()
    return svi, losses


def halving(optimiser: Any) -> Any:
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 2, 0.5)
    scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]  # the step was before the scheduler was made
    return scheduler


@pytest.mark.parametrize("skips", [1, 10])
@pytest.mark.parametrize("compile", ["trace", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optim", [ADAM, partial(torch.optim.SGD, lr=0.01, momentum=0.9), torch.optim.RMSprop])
def test_eager_traced_compiled_and_replicated_steps_skip_alike(compile: Engine, skips: int, optim: Any) -> None:
    engine = replicas(2, "skip", skips, compile, optim)
    schedulers: list[Any] = []
    for fault in PLAN:  # replica 1 alone meets the faults
        engine.step(*step_of([good(), faulty(fault) if fault else good()]))
        schedulers = schedulers or [halving(svi.optimiser) for svi in engine.svis]
        for scheduler in schedulers:
            scheduler.step()
    made = engine.losses()
    engine.finish()
    for single in (False, compile):
        svi, losses = course(single, 1, skips, optim, halving)
        other = engine.svis[1]
        assert svi.skipped == other.skipped == ([3, 5, 6] if skips == 10 else [3])
        assert svi.steps == other.steps == (9 if skips == 10 else 4)
        assert bool(engine.alive[1]) == (skips == 10)
        theirs = [x if math.isfinite(n + x) else math.nan for x, n in made[: len(losses), :, 1]]
        assert losses == pytest.approx(theirs, rel=1e-4, nan_ok=True)
        for mine, its in zip(state_of(svi), state_of(other), strict=True):
            assert torch.allclose(mine, its, rtol=1e-4, atol=1e-6), "counters of the optimiser are among these"
    assert engine.svis[0].skipped == [] and bool(engine.alive[0]), "the other replica goes on"


def test_a_replica_that_skipped_keeps_the_step_of_its_own_optimiser() -> None:
    engine = replicas(2, "skip")
    for fault in PLAN:
        engine.step(*step_of([good(), faulty(fault) if fault else good()]))
    engine.finish()
    counts = [int(next(iter(svi.optimiser.state.values()))["step"]) for svi in engine.svis]  # type: ignore[union-attr]
    assert counts == [9, 6]


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", ENGINES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_report_names_step_rows_site_and_parameter(compile: Engine, fault: str) -> None:
    with pytest.raises(TrainingError) as error:
        svi = make(Model(), Guide(), ADAM, compile=compile)
        for batch in (good(), good(), faulty(fault)):
            svi.step(*batch, rows=IDS)
    text = str(error.value)
    assert text.startswith("step 3: the " + ("gradient is not finite" if fault == "gradient" else f"loss is {fault}"))
    assert "'x' of the model" in text and "rows [102, 105]" in text and "'model.w'" in text
    assert ("first site whose gradient is not finite" in text and "Sqrt" in text) == (fault == "gradient")
    assert ("argument 0 of the batch holds" in text) == (fault != "gradient")


@pytest.mark.parametrize("at_once", [None, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_replica_reports_what_a_single_run_reports(fault: str, at_once: bool | None) -> None:
    engine = replicas(2, "stop")
    engine.guard.at_once = at_once  # False: as on a GPU, where transformed batches are not kept
    engine.step(*step_of([good(), good()]))
    engine.losses()
    single = make(Model(), Guide(0.1), ADAM, compile="trace")
    torch.manual_seed(1)
    single.step(*good(), rows=IDS)
    if at_once is None:
        engine.step(*step_of([good(), faulty(fault)]))
        engine.step(*step_of([good(), good()]))
        with pytest.raises(TrainingError) as error:
            single.step(*faulty(fault), rows=IDS)
        assert f"replica 1, {error.value}; it is frozen" == engine.errors[1]
    else:
        engine.step(*step_of([good(), faulty(fault)]))
        engine.losses()
        assert engine.errors[1].startswith("replica 1, step 2: the ") and "not kept" in engine.errors[1]
    assert list(engine.errors) == [1] and engine.svis[1].steps == 1


class Noisy(PyroModule):
    """Its log-density overflows only for draws above a threshold: the report needs the very noise of the step."""

    def forward(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((60 * (m - 1.0)).exp() + m, 1.0), obs=x)


class NoisyGuide(Guide):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        pyro.sample("m", dist.Normal(self.loc, self.scale.exp() + 0.5))


def test_the_noise_of_the_step_is_drawn_again() -> None:
    texts = []
    x = good()[0]
    for compile in (False, "trace"):
        svi = make(Noisy(), NoisyGuide(), partial(torch.optim.SGD, lr=0.0), compile=compile)
        torch.manual_seed(3)
        with pytest.raises(TrainingError) as error:
            for _ in range(200):
                svi.step(x)
        texts.append((svi.steps + 1, str(error.value).partition("; ")[2]))
    for at_once in (True, None):
        engine = Replicas(
            [make(Noisy(), NoisyGuide(), partial(torch.optim.SGD, lr=0.0))], (x,), seeds=[3], compile="trace"
        )
        engine.guard.at_once = at_once
        for i in range(200):
            engine.step()
            if i % 7 == 0:
                engine.losses()
        engine.losses()
        step, _, text = engine.errors[0].removeprefix("replica 0, step ").removesuffix("; it is frozen").partition(": ")
        texts.append((int(step), text.partition("; ")[2]))
    assert len(set(texts)) == 1 and texts[0][0] > 2 and "'x' of the model" in texts[0][1], texts


@pytest.mark.parametrize("compile", [False, "trace"])
def test_one_of_several_particles_is_found(compile: Engine) -> None:
    svi = make(Noisy(), NoisyGuide(), partial(torch.optim.SGD, lr=0.0), ELBO(4), compile=compile)
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="'x' of the model"):
        for _ in range(200):
            svi.step(good()[0])


def test_skipped_steps_are_logged_in_full_once_and_then_shortly(caplog: pytest.LogCaptureFixture) -> None:
    svi = make(Model(), Guide(), ADAM, compile=False, nonfinite="skip", skips=2)
    with caplog.at_level(logging.WARNING, "dgm"):
        for batch in (good(), faulty("nan"), faulty("gradient")):
            svi.step(*batch, rows=IDS)
    first, second = (record.getMessage() for record in caplog.records)
    assert "'x' of the model" in first and "rows [102, 105]" in first and first.endswith("skipped, 1 of at most 2")
    assert second == "step 3: the gradient is not finite; skipped, 2 of at most 2"
    with pytest.raises(TrainingError, match=r"step 4: .*'x' of the model.*skipped before it: 2 of at most 2.*2, 3"):
        svi.step(*faulty("nan"), rows=IDS)


# --- causes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, "trace"])
def test_a_learning_rate_that_is_too_large_is_named(compile: Engine) -> None:
    svi = make(Model(), Guide(), partial(torch.optim.Adam, lr=100.0), compile=compile)
    with pytest.raises(TrainingError) as error:
        for _ in range(200):
            svi.step(*good(), rows=IDS)
    assert f"step {svi.steps + 1}: " in str(error.value) and "'m' of the guide" in str(error.value)
    assert "the parameters blew up: '" in str(error.value) and "try a smaller learning rate" in str(error.value)
    assert "batch holds" not in str(error.value)
    assert all(bool(p.isfinite().all()) for p in svi.parameters.values())


class Validated(Guide):
    def forward(self, x: Tensor, g: Tensor) -> None:
        loc = self.loc * g.prod()
        pyro.sample(
            "m",
            dist.Normal(loc, self.scale.exp(), validate_args=True),
        )


class ValidatedModel(Model):
    def forward(self, x: Tensor, g: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + self.w * g, 1.0, validate_args=True), obs=x)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("where", ["guide", "model"])
def test_torch_s_complaint_in_the_middle_of_training_is_translated(
    where: str, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, guide = (ValidatedModel(), Guide()) if where == "model" else (Model(), Validated())
    x, g = good()
    g[[2, 5]] = math.nan
    svi = make(model, guide, ADAM, nonfinite=policy)
    if policy == "stop":
        with pytest.raises(TrainingError) as error:
            unharmed_step(svi, (x, g))
        text = str(error.value)
        assert isinstance(error.value.__cause__, ValueError)
    else:
        with caplog.at_level(logging.WARNING, "dgm"):
            assert math.isnan(unharmed_step(svi, (x, g)))
        text = caplog.records[-1].getMessage()
    assert "step 4: the loss cannot be computed" in text and "to satisfy the constraint" in text
    assert f"at site {'x' if where == 'model' else 'm'!r} of the {where} (test_guards.py, line" in text
    assert "rows [102, 105]" in text and "argument 1 of the batch holds NaN" in text


def unharmed_step(svi: SVI, batch: Batch) -> float:
    for _ in range(3):
        svi.step(*good(), rows=IDS)
    before = state_of(svi)
    try:
        return svi.step(*batch, rows=IDS)
    finally:
        assert same(before, state_of(svi))


def test_an_error_that_is_the_program_s_own_stays_one() -> None:
    class Own(Model):
        def forward(self, x: Tensor, g: Tensor) -> None:
            super().forward(x, g)
            if float(g[0]) == 2.0:
                raise ValueError("my own")

    svi = make(Own(), Guide(), ADAM, compile=False)
    svi.step(*good())
    with pytest.raises(ValueError, match="my own") as error:
        svi.step(good()[0], torch.full((ROWS,), 2.0))
    assert not isinstance(error.value, TrainingError)


class Factorised(Model):
    """A covariance that is not positive where g is negative."""

    def forward(self, x: Tensor, g: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        root = torch.linalg.cholesky(torch.eye(2) * g.mean() + 0.01 * self.w)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + root.sum(), 1.0), obs=x)


@pytest.mark.parametrize("compile", ENGINES)
def test_a_matrix_that_cannot_be_factorised_is_a_step_that_is_not_finite(compile: Engine) -> None:
    svi = make(Factorised(), Guide(), ADAM, compile=compile, nonfinite="skip")
    assert unharmed(svi, (good()[0], -good()[1]))
    svi = make(Factorised(), Guide(), ADAM, compile=compile)
    with pytest.raises(TrainingError, match=r"in the model after site 'm' .*cholesky"):
        unharmed_step(svi, (good()[0], -good()[1]))


def test_a_factorisation_that_fails_in_one_replica_leaves_the_others_alone() -> None:
    svis = [make(Factorised(), Guide(), ADAM) for _ in range(3)]
    engine = _Stepping(svis, good(), compile="trace")
    bad = (good()[0], -good()[1])
    for batches in ([good()] * 3, [good(), bad, good()], [good()] * 3):
        engine.step(*step_of(batches))
    assert engine.alive.tolist() == [True, False, True] and "cholesky" in engine.errors[1]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'"),
        ({"nonfinite": "skip", "skips": -1}, "skips is -1"),
        ({"nonfinite": "skip", "skips": True}, "skips is True"),
        ({"nonfinite": "skip", "skips": 1.5}, "skips is 1.5"),
    ],
)
def test_options_out_of_their_domain_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        make(Model(), Guide(), ADAM, **options)


def test_replicas_have_one_policy() -> None:
    with pytest.raises(OptionError, match="one policy"):
        Replicas([make(Model(), Guide(), ADAM, nonfinite=p) for p in ("stop", "skip")], good())


# --- through fit -----------------------------------------------------------------------------------------------------


def touchy(x: Tensor) -> None:
    """Its loss overflows for draws of m above a threshold."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((60 * (m - 1.0)).exp() + m, 1.0), obs=x)


def touchy_guide(*_: Any) -> NoisyGuide:
    return NoisyGuide(0.5)


def test_fit_skips_in_all_modes_alike_and_keeps_skipped_steps_out_of_the_history() -> None:
    options: dict[str, Any] = {"epochs": 4, "batch_size": 2, "lr": 1e-3, "nonfinite": "skip", "skips": 20}
    x = good()[0]
    seeds = {"seed": [0, 3]}
    many = fit(lambda: touchy, touchy_guide, x, replicas=seeds, compile="trace", **options)
    for compile in (False, "trace"):
        for seed, other in zip(seeds["seed"], many, strict=True):
            one = fit(touchy, touchy_guide(), x, seed=seed, compile=compile, **options)
            assert one.steps == other.steps == 16 and one.error is None is other.error
            assert one.history["elbo"].tolist() == pytest.approx(other.history["elbo"].tolist(), rel=1e-3)
            assert one.history["elbo"].notna().all()
            for mine, its in zip(one.guide.parameters(), other.guide.parameters(), strict=True):  # type: ignore[attr-defined]
                assert torch.allclose(mine, its, atol=1e-5)
    options["skips"] = 1
    with pytest.raises(TrainingError, match="skipped before it: 1 of at most 1") as error:
        fit(touchy, touchy_guide(), x, seed=3, compile="trace", **options)
    frozen = fit(lambda: touchy, touchy_guide, x, replicas=seeds, compile="trace", **options)[1]
    assert frozen.error == f"replica 1 (seed 3), {error.value}; it is frozen"
    assert frozen.steps == error.value.fit.steps == 9  # type: ignore[attr-defined]
    assert frozen.stopped == "a value was not finite at step 10"


@pytest.mark.parametrize("replicas", [None, 2])
def test_a_run_that_skips_resumes_to_the_same_numbers(replicas: int | None, tmp_path: Any) -> None:
    options: dict[str, Any] = {"batch_size": 2, "lr": 1e-3, "nonfinite": "skip", "skips": 20, "compile": "trace"}
    x = good()[0]

    def run(epochs: int, **more: Any) -> list[Any]:
        model: Any = touchy if replicas is None else lambda: touchy
        guide: Any = touchy_guide() if replicas is None else touchy_guide
        found: Any = fit(model, guide, x, epochs=epochs, seed=3, replicas=replicas, **options, **more)
        return [found] if replicas is None else found

    whole = run(8)
    run(4, checkpoint=tmp_path)
    for one, other in zip(whole, run(8, checkpoint=tmp_path), strict=True):
        assert one.steps == other.steps == 32
        assert one.history["elbo"].tolist() == other.history["elbo"].tolist()
        assert all(torch.equal(a, b) for a, b in zip(one.guide.parameters(), other.guide.parameters(), strict=True))


def test_three_causes_have_three_messages() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(20)
    texts = []
    for value in (math.nan, math.inf):
        bad = x.clone()
        bad[3, 1] = value
        with pytest.raises(DataError) as refused:
            fit(model, AutoNormal(model), bad, y, epochs=1)
        texts.append(str(refused.value))
    with pytest.raises(TrainingError) as stopped:
        fit(model, AutoNormal(model), x, y, epochs=300, lr=200.0)
    texts.append(str(stopped.value))
    assert "NaN" in texts[0] and "row" in texts[0] and "inf" in texts[1] and "row" in texts[1]
    assert "step " in texts[2] and "the parameters blew up" in texts[2] and "smaller learning rate" in texts[2]
    assert len(set(texts)) == 3
