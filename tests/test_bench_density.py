"""The density suite: its protocols, models and data, one row on made-up images, and what the report concludes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import Bernoulli, Normal

import dgm
from dgm.bench import make_plan, run_suite
from dgm.bench_cells import BUDGETS, Cell
from dgm.bench_find import find_suite
from dgm.bench_registry import published
from dgm.bench_report import make_report, write_report
from dgm.bench_results import Results
from dgm.bench_store import Store
from dgm.benchmarks import density_data, density_list, density_models, density_report, density_run, density_story
from dgm.errors import DataError
from dgm.files import images
from dgm.heldout import HeldOut

PIXELS = 12
TINY = {
    **density_list.SHORT, **density_list.SMOKE, "latents": [3], "hidden": [8], "epochs": 2, "batch_size": 20,
    "train_rows": 0, "valid_rows": 0, "test_rows": 0, "draws": 100,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "vae": {},
    "two layers": {"model": "two layers", "latents": [3, 2], "family": "bottom-up"},
    "dlgm": {"model": "dlgm", "latents": [3, 2]},
}


def made_up_images(binarize: str = "batch", valid: bool = True) -> dgm.Dataset:
    """Rows of grey pixels with two ways to vary; 80 to train on, 30 for validation, 25 to test."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(2, PIXELS))
    counts = {"train": 80, "test": 25, **({"valid": 30} if valid else {})}
    parts = {k: 1 / (1 + np.exp(-2 * generator.normal(size=(n, 2)) @ directions)) for k, n in counts.items()}
    return images("made up", {k: v.reshape(-1, 3, 4) for k, v in parts.items()}, binarize=binarize)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The same images under every name, whatever files there are."""

    def give(**options: Any) -> None:
        monkeypatch.setattr(density_data, "load_task", lambda task, seed: made_up_images(**options))

    give()
    return give


# -------------------------------------------------------------------------------------------------------- protocols


def test_the_schedule_of_burda_is_three_to_the_i_epochs() -> None:
    settings = density_list.BURDA
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings["lr"])
    schedule = density_models.schedule_of(settings)(optimiser)
    rates = []
    for _ in range(150):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    expected = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert np.allclose(rates, expected[:150], rtol=1e-9)
    changes = np.flatnonzero(np.diff(expected)) + 1
    assert (len(expected), changes.tolist()) == (settings["epochs"], settings["milestones"])


@pytest.mark.parametrize("budget", ["short", "full"])
def test_the_recipe_is_that_of_the_published_row(budget: str) -> None:
    cells = [c for c in density_list.cells(budget) if (c.task, c.guide) == ("binarized-mnist", density_report.RECIPE)]
    assert len(cells) == {"short": 1, "full": 5}[budget]
    told = {"latents": [40], "hidden": [400], "activation": "relu", "start": "torch", "epochs": 500, "lr": 1e-4}
    told |= {"batch_size": 100, "samples": 1, "objective": "ELBO", "draws": 200, "test_rows": 0, "train_rows": 0}
    for cell in cells:
        assert {k: cell.settings[k] for k in told} == told
        assert cell.settings["milestones"] == [200, 350]
        assert cell.settings["decay"] == pytest.approx(10 ** (-1 / 5))
    others = {c.guide: dict(c.settings) for c in density_list.cells(budget) if c.task == "binarized-mnist"}
    for family in density_list.FAMILIES:  # one recipe, another q
        assert others[family] == {**others[density_report.RECIPE], "family": family}


def test_only_published_protocols_have_the_names_of_published_tasks() -> None:
    known = {p.task for p in published("density")}
    for budget in BUDGETS:
        for cell in density_list.cells(budget):
            same = cell.settings["epochs"] in (500, 3280) and not cell.settings["test_rows"]
            assert (cell.task in known) == same


def test_methods_are_called_as_they_are_published() -> None:
    methods = {p.method for p in published("density")}
    for better, worse in density_report.ORDER:
        assert {better, worse} <= methods
        assert {better, worse} <= set(density_list.METHODS)
    short = {c.guide for c in density_list.cells("short") if c.task == "mnist, short protocol"}
    assert {name for pair in density_report.ORDER for name in pair} <= short


def test_published_numbers_have_the_order_that_is_asked_for() -> None:
    for task in ("mnist", "omniglot"):
        for better, worse in density_report.ORDER:
            first, second = density_report.known(task, better), density_report.known(task, worse)
            assert first is not None
            assert second is not None
            assert first.value < second.value


def test_long_cells_come_first() -> None:
    cells = density_list.cells("short")
    estimates = [density_list.seconds(cell) for cell in cells]
    assert max(estimates) in estimates[:2]
    tasks = [cell.task for cell in cells]
    weights = [e for e, task in zip(estimates, tasks, strict=True) if task == "mnist, short protocol"]
    assert weights[:2] == sorted(weights, reverse=True)[:2]
    assert sum(estimates) < 2.5 * 3600


# -------------------------------------------------------------------------------------------------------------- data


def test_rows_for_validation_are_no_training_rows(made_up: Callable[..., None]) -> None:
    made_up(valid=False, binarize="none")
    parts = density_data.parts_of("omniglot, short protocol", 0, {"train_rows": 0, "valid_rows": 0, "test_rows": 0})
    assert (len(parts.train), len(parts.valid), len(parts.test)) == (76, 4, 25)
    together = torch.cat([parts.train, parts.valid])
    assert torch.allclose(together.sum(0), made_up_images("none", False).train[0].sum(0))
    assert not (torch.cdist(parts.train, parts.valid) == 0).any()


def test_held_out_pixels_are_drawn_once_and_training_pixels_anew(made_up: Callable[..., None]) -> None:
    made_up(valid=False)
    settings = {"train_rows": 10, "valid_rows": 2, "test_rows": 5}
    first, second = (density_data.parts_of("omniglot", seed, settings) for seed in (0, 1))
    assert (len(first.train), len(first.valid), len(first.test)) == (10, 2, 5)
    for part in ("valid", "test"):
        one = getattr(first, part)
        assert torch.equal(one, getattr(second, part))
        assert set(one.unique().tolist()) <= {0.0, 1.0}
    assert len(first.train.unique()) > 2
    assert first.transform is not None
    drawn = [first.transform((first.train,), torch.Generator().manual_seed(s))[0] for s in (0, 1)]
    assert not torch.equal(*drawn)


def test_a_task_is_loaded_by_its_own_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(dgm, "load", lambda name, **options: asked.append((name, options)))
    for task in ("mnist, smoke", "fashion-mnist, short protocol", "frey-faces", "binarized-mnist"):
        density_data.load_task(task, 3)
    assert asked == [
        ("mnist", {"binarize": "batch"}), ("fashion-mnist", {"binarize": "threshold"}),
        ("frey-faces", {"split": "random", "seed": 3}), ("binarized-mnist", {"binarize": "none"}),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ models


def pair_of(name: str, **settings: Any) -> tuple[Any, Any, torch.Tensor]:
    own = {**TINY, **MODELS[name], **settings}
    x = torch.bernoulli(made_up_images().train[0], generator=torch.Generator().manual_seed(0))
    with dgm.programs.preserved_rng(1):
        model = density_models.model_of(own, x)
        return model, density_models.guide_of(own, model, x), x


def test_bottom_up_is_q_of_z_1_times_q_of_z_2_given_z_1() -> None:
    _, guide, x = pair_of("two layers")
    with torch.no_grad(), pyro.get_param_store().scope():
        nodes: Any = poutine.trace(guide).get_trace(x).nodes
        found = {n: nodes[n]["fn"].log_prob(nodes[n]["value"]) for n in ("z_1", "z_2")}
        z_1, z_2 = (nodes[n]["value"] for n in ("z_1", "z_2"))
        for name, value, output in (("z_1", z_1, guide.first(x)), ("z_2", z_2, guide.second(z_1))):
            loc, log_scale = output.chunk(2, -1)
            expected = Normal(loc, log_scale.exp()).log_prob(value).sum(-1)
            assert torch.allclose(found[name], expected, atol=1e-5)
        loc, log_scale = guide.second(z_1.flip(0)).chunk(2, -1)
        assert not torch.allclose(found["z_2"], Normal(loc, log_scale.exp()).log_prob(z_2).sum(-1), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_glorot_starts_at_the_marginal_and_leaves_mixing_alone(name: str) -> None:
    model, _, x = pair_of(name)
    expected = x.mean(0).clamp(0.001, 0.999).logit()
    assert torch.allclose(model.decoder[-1].bias, expected)
    assert not model.decoder[0].bias.any()
    bound = math.sqrt(6 / sum(model.decoder[0].weight.shape))
    assert float(model.decoder[0].weight.detach().abs().max()) <= bound
    for layer in getattr(model, "mixing", []):
        assert torch.equal(layer.weight, torch.eye(len(layer.weight)))
    if name == "two layers":
        widths = [layer.in_features for layer in model.priors[0] if isinstance(layer, nn.Linear)]
        assert widths == [2, 100, 100]


def test_a_learned_scale_starts_at_that_of_the_pixels() -> None:
    x = made_up_images("none").train[0]
    model = density_models.model_of({**TINY, "likelihood": "normal"}, x)
    residuals = x - x.mean(0)
    expected = math.sqrt(float(residuals.square().sum()) / (len(x) - 1) / PIXELS)
    scale: Any = model.likelihood.log_scale
    assert float(scale.detach().exp()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_bounds_are_exact_where_a_decoder_sees_no_latent(name: str) -> None:
    """Then log p(x) is the marginal's, and q at the prior has weights of that value; q elsewhere has a gap."""
    model, guide, x = pair_of(name)
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        for parameter in [*guide.parameters(), *getattr(model, "priors", nn.Module()).parameters()]:
            parameter.zero_()
    fit: Any = dgm.Fit(model, guide)
    expected = -Bernoulli(logits=model.decoder[-1].bias).log_prob(x).sum(1).detach()
    cell = Cell("mnist", name, 0, {**TINY, "tight_rows": 9, "tight_draws": 150})
    row = density_run.bounds(fit, x, cell)
    assert torch.allclose(row["per_datum"], expected, atol=1e-4)
    assert row["nll"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert row["gap"] == pytest.approx(0.0, abs=1e-4)
    assert row["nll_tight_gain"] == pytest.approx(0.0, abs=1e-4)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2)
    assert density_run.bounds(fit, x, cell)["gap"] > 0.1


@pytest.mark.parametrize(("objective", "kind"), [("ELBO", "ELBO"), ("IWAE", "pathwise"), ("DReG", "dreg")])
def test_objectives(objective: str, kind: str) -> None:
    loss = density_models.loss_of({"objective": objective, "samples": 7})
    assert loss.num_particles == 7
    assert kind == ("ELBO" if isinstance(loss, dgm.ELBO) else loss.estimator)


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", MODELS)
def test_a_row(made_up: Callable[..., None], name: str) -> None:
    cell = Cell("mnist, smoke", name, 0, {**TINY, **MODELS[name], "objective": "IWAE", "samples": 2})
    before = torch.get_rng_state()
    row, again = density_run.run(cell), density_run.run(cell)
    assert torch.equal(before, torch.get_rng_state())
    for key, value in row.items():
        if "seconds" not in key:
            assert np.array_equal(np.asarray(value), np.asarray(again[key])), key
    assert row["nll"] == pytest.approx(float(row["per_datum"].double().mean()), abs=1e-4)
    assert row["gap"] == pytest.approx(-row["nll"] - row["elbo"], abs=1e-4)
    assert row["gap"] > 0
    assert row["per_datum"].shape == (25,)
    assert row["pictures"].shape == (density_run.PICTURES, PIXELS)
    assert row["units"] == sum(cell.settings["latents"])
    assert sum(int(n) for n in row["active_by_layer"].split(" + ")) == row["active_units"]
    other = density_run.run(replace(cell, repeat=1))
    assert not torch.equal(row["per_datum"], other["per_datum"])


def test_what_is_kept_is_the_best_validated_state(made_up: Callable[..., None]) -> None:
    made_up(binarize="once")
    settings = {**TINY, "train_rows": 10, "batch_size": 10, "epochs": 60, "lr": 0.1, "milestones": [], "patience": 5}

    def trained(**own: Any) -> tuple[float, Any]:
        cell = Cell("binarized-mnist, smoke", "diagonal-normal", 0, {**settings, **own})
        parts = density_data.parts_of(cell.task, 0, cell.settings)
        fit = density_run.trained(cell, parts)
        held = HeldOut(fit.model, fit.guide, (parts.valid,), sizes={"data": len(parts.train)})
        return float(held.bound(seed=0).mean()), density_run._training(fit, cell.settings)

    bound, row = trained()
    assert row["epochs_trained"] < 60
    assert row["epoch_kept"] < row["epochs_trained"]
    assert row["elbo_valid"] == pytest.approx(float(row["valid_elbo"].max()), abs=1e-9)
    assert bound == pytest.approx(row["elbo_valid"], abs=1e-4)
    last, all_ = trained(patience=0, epochs=row["epochs_trained"])
    assert all_["epoch_kept"] == row["epochs_trained"]
    assert last < bound - 0.5  # the last state is another


def test_the_training_objective_is_the_one_that_is_evaluated(made_up: Callable[..., None]) -> None:
    """Over an epoch of tiny steps the mean ELBO of training rows is the evaluated one, within its chance."""
    made_up(binarize="once")
    cell = Cell("x", "y", 0, {**TINY, "epochs": 20, "lr": 1e-7, "validate_every": 20})
    parts = density_data.parts_of(cell.task, 0, cell.settings)
    fit = density_run.trained(cell, parts)
    elbos = fit.history["elbo"]
    found = dgm.evaluate(fit.model, fit.guide, parts.train, num_samples=1000)
    error = math.hypot(elbos.std() / len(elbos) ** 0.5, 1e-3)
    assert abs(elbos.mean() - found.summary["elbo"]) / error < 4.5
    assert abs(elbos.mean() - found.summary["bound"]) / error > 4.5  # the importance bound is another number


def test_gaps_of_a_few_images(made_up: Callable[..., None]) -> None:
    cell = Cell("x", "y", 0, {**TINY, "gap_rows": 3, "gap_steps": 100})
    parts = density_data.parts_of(cell.task, 0, cell.settings)
    found = density_run.free_gaps(density_run.trained(cell, parts), parts.test, cell)
    assert set(found) == {"approximation", "approximation_se", "amortization", "amortization_se", "gap_converged"}
    nothing: Any = None
    assert density_run.free_gaps(nothing, parts.test, replace(cell, settings=TINY)) == {}


# ------------------------------------------------------------------------------------------------------------ report


@dataclass
class Kept(Results):
    """Results whose arrays are at hand."""

    kept: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def arrays(self, key: str) -> dict[str, np.ndarray]:
        return self.kept.get(key, {})


def results_of(arrays: bool = True, budget: str = "short", recipe: float = 89.7, gain: float = 1.0) -> Kept:
    """Every short cell: methods are `gain` nats better than what stands below them in the list, in pairs +- 0.1."""
    suite = find_suite("density")
    generator = np.random.default_rng(0)
    hard = 20 * generator.normal(size=400)  # images differ by far more than methods
    order = ["IWAE, 2 layers, K=50", "IWAE, 1 layer, K=50", "IWAE, 2 layers, K=5", "IWAE, 1 layer, K=5",
             "VAE, 1 layer, K=5", "VAE, 2 layers, K=1", "VAE, 1 layer, K=1"]  # fmt: skip
    rows: list[dict[str, Any]] = []
    kept = {}
    for cell in density_list.cells("short"):
        static = cell.task == "binarized-mnist"
        level = recipe if static else 90.0 + gain * (order.index(cell.guide) if cell.guide in order else 3)
        level += cell.repeat
        datum = (level + hard - hard.mean() + 0.1 * generator.normal(size=400)).astype(np.float32)
        key = f"{len(rows):032x}"
        row = {**cell.values("seed"), "key": key, "status": "ok", "nll": float(datum.astype(float).mean())}
        row |= {"nll_se": 1.0, "elbo": -level - 3, "gap": 3.0, "active_units": 20, "active_by_layer": "20"}
        row |= {"epoch_kept": 5, "epochs_trained": 8, "khat_bad": 0.1}
        if static:
            row |= {"nll_tight": level - 0.1, "nll_tight_gain_se": 0.01, "approximation": 1.0, "amortization": 2.0}
            row |= {"approximation_se": 0.1, "amortization_se": 0.1, "gap_converged": cell.guide != "full-normal"}
        rows.append(row)
        shape = (28, 20) if "frey" in cell.task else (28, 28)
        kept[key] = {
            "per_datum": datum, "valid_epoch": np.arange(1, 9), "valid_elbo": -100 + np.arange(8.0),
            "pictures": np.zeros((12, math.prod(shape)), np.float32),
        }  # fmt: skip
    plan = {"budget": budget, "filter": [], "protocol": 1, "about": {}}
    costs = pd.DataFrame({"key": [r["key"] for r in rows]})
    return Kept(suite, pd.DataFrame(rows), costs, plan, kept=kept if arrays else {})


def test_a_difference_is_taken_in_pairs() -> None:
    task = "mnist, short protocol"
    found = density_report.difference(results_of(), task, "IWAE, 1 layer, K=5", "VAE, 1 layer, K=1")
    assert found is not None
    assert found.value == pytest.approx(-3.0, abs=0.05)
    assert found.error == pytest.approx(0.1 * math.sqrt(2) / 20, rel=0.2)  # the spread of images, 20, has cancelled
    bare = density_report.difference(results_of(arrays=False), task, "IWAE, 1 layer, K=5", "VAE, 1 layer, K=1")
    assert bare is not None
    assert math.isnan(bare.error)
    assert bare.value == found.value
    seeds = density_report.difference(
        results_of(), "frey-faces, short protocol", "IWAE, 1 layer, K=5", "VAE, 1 layer, K=1"
    )
    assert seeds is not None
    assert seeds.repeats == 3
    assert seeds.error < 0.05  # seeds differ by a nat, their pairs do not
    assert density_report.difference(results_of(), task, "IWAE, 1 layer, K=5", "nothing") is None


def test_what_must_hold() -> None:
    checks = density_report.checks(results_of())
    assert set(checks["verdict"]) == {"agree"}
    assert len(checks) == 1 + 8 + 4  # the recipe, and the orders of two tasks
    assert "frey" not in " ".join(checks["task"])
    wrong = density_report.checks(results_of(recipe=90.3))
    assert list(wrong["verdict"]).count("miss") == 1
    assert wrong["verdict"].iloc[0] == "miss"
    assert set(density_report.checks(results_of(gain=-1.0))["verdict"].iloc[1:]) == {"miss"}
    assert "miss" in set(density_report.checks(results_of(gain=0.0))["verdict"].iloc[1:])  # a tie is no order
    assert density_report.checks(results_of(budget="smoke")).empty
    assert set(density_report.checks(results_of(arrays=False))["verdict"]) == {"agree"}


def test_the_story_is_told_without_gaps_in_its_numbers() -> None:
    chapters = density_story.story(results_of())
    assert [c.title[:2] for c in chapters] == ["1.", "2.", "3."]
    said = " ".join(text for c in chapters for _, text in c.says)
    assert "nan" not in said
    assert re.search(r"89\.(69|70|71) nats with the diagonal normal over 1 seed", said)
    assert "12 of 12 differences have the published sign" in said
    assert "too small, of full-normal: its best q still gained" in said
    names = [name for c in chapters for name, *_ in c.figures]
    assert len(names) == len(set(names)) == 1 + 1 + 1 + 3 + 3
    for chapter in chapters:
        assert chapter.table is not None
        assert "nan" not in chapter.table.to_string()
    first: Any = chapters[0].table
    assert {"approximation", "amortization", "NLL, 5000 draws"} <= set(first.columns)
    assert all(not c.figures or c.title[:2] == "2." for c in density_story.story(results_of(arrays=False)))


def test_missing_data_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise DataError("put the file there")

    monkeypatch.setattr(dgm, "load", missing)
    ready = find_suite("density").ready
    assert ready is not None
    with pytest.raises(DataError, match="put the file"):
        ready("mnist, short protocol")


def test_a_plan_estimates_its_time(tmp_path: Path) -> None:
    plan = make_plan(replace(find_suite("density"), ready=None), Store(tmp_path), "smoke")
    assert plan.seconds is not None
    assert 0 < plan.seconds < 60


@pytest.mark.slow
def test_smoke_runs_in_time_and_its_report_is_whole(tmp_path: Path) -> None:
    try:
        for task in dict.fromkeys(cell.task for cell in density_list.cells("smoke")):
            density_data.load_task(task, 0)
    except DataError as error:
        pytest.skip(str(error))
    used = time.process_time()
    results = run_suite("density", tmp_path, budget="smoke", progress=False)
    assert time.process_time() - used < 40
    assert not len(results.failed)
    page = write_report(make_report(tmp_path), tmp_path / "report")
    text = (page.parent / "report.md").read_text()
    for name in ("density-recipe-curves", "density-order", "density-weights-mnist", "density-others-frey-faces"):
        assert f"]({name}.png)" in text
    assert text.index("1. Fixed") < text.index("2. Importance") < text.index("3. Clothes")
