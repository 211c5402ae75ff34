"""The moons suite: the density of the points, its models, its rows at the smallest size, and its story."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from matplotlib.image import imread
from pyro import poutine
from scipy.stats import kstest, multivariate_normal
from torch.distributions import Normal

import dgm
from dgm.bench import run_suite
from dgm.bench_cells import BUDGETS, Cell
from dgm.bench_find import find_suite
from dgm.bench_plan import make_plan
from dgm.bench_report import make_report, write_report
from dgm.bench_results import Results
from dgm.bench_store import Store
from dgm.bench_story import Chapter, chapter_markdown
from dgm.benchmarks import moons, moons_bnn, moons_models, moons_story, moons_vae

TINY = {"steps": 20, "draws": 100, "doctor_steps": 0, "batch_size": 200, "lr": 5e-3}
NETWORK = {"rows": 100, "hidden": 20, "prior": 3.0, "lr": 1e-2, "steps": 20, "particles": 1, "draws": 20}


# ------------------------------------------------------------------------------------------------------- the truth


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points of an arc: still twelve within one standard deviation of the noise."""
    monkeypatch.setattr(moons_models, "POINTS", 401)


def test_the_density_of_a_moon_is_that_of_normals_along_its_arc() -> None:
    """Against scipy's normals about many points of the arc, at points on and near it."""
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.3, 0.2], [2.0, 0.6]], dtype=torch.float64)
    angle = (np.arange(20_000) + 0.5) * np.pi / 20_000
    arcs = (np.c_[np.cos(angle), np.sin(angle)], np.c_[1 - np.cos(angle), 0.5 - np.sin(angle)])
    for arc, found in zip(arcs, moons_models.log_densities(points), strict=True):
        kernel = multivariate_normal(mean=np.zeros(2), cov=0.01 * np.eye(2))
        expected = [np.log(kernel.pdf(point.numpy() - arc).mean()) for point in points]
        assert np.allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_truth_integrates_to_one_and_a_mutant_does_not(coarse: None) -> None:
    grid = torch.cartesian_prod(torch.linspace(-2, 3, 101), torch.linspace(-2, 2.5, 91)).double()
    area = 0.05**2
    assert abs(float(moons_models.log_truth(grid).exp().sum()) * area - 1) < 1e-3
    both = torch.logsumexp(moons_models.log_densities(grid), 0)  # without the half of each moon
    assert abs(float(both.exp().sum()) * area - 1) > 0.5


def test_points_come_from_that_density(coarse: None) -> None:
    """Mean log density of train and test points against its expectation by quadrature; noise of 0.12 must not fit."""

    def z_of(noise: float) -> float:
        points = torch.cat([dgm.load("moons-points").train[0], dgm.load("moons-points").test[0]])
        before, moons_models.NOISE = moons_models.NOISE, noise
        try:
            log_p = moons_models.log_truth(points)
            grid = torch.cartesian_prod(torch.linspace(-2, 3, 101), torch.linspace(-2, 2.5, 91)).double()
            log_grid = moons_models.log_truth(grid)
        finally:
            moons_models.NOISE = before
        expected = float((log_grid.exp() * log_grid).sum() * 0.05**2)
        return float((log_p.mean() - expected) / (log_p.std() / len(log_p) ** 0.5))

    assert abs(z_of(0.1)) < 4.5
    assert abs(z_of(0.12)) > 4.5


def test_classes_are_the_moons() -> None:
    x, y = dgm.load("moons").test
    upper, lower = moons_models.log_densities(x)
    assert float(((lower > upper).long() == y).double().mean()) > 0.999


def test_the_boundary_is_where_both_moons_are_alike() -> None:
    points = moons_bnn.boundary()
    upper, lower = moons_models.log_densities(points)
    sure = 1 / (1 + torch.exp(-(upper - lower).abs()))  # of the likelier moon
    assert len(points) > 50
    assert float(sure.median()) < 0.9
    moved = points + torch.tensor([0.0, 0.15])
    upper, lower = moons_models.log_densities(moved)
    assert float((1 / (1 + torch.exp(-(upper - lower).abs()))).median()) > 0.95


def test_far_is_far() -> None:
    x = dgm.load("moons").train[0]
    assert float(torch.cdist(moons_bnn.far(), x).amin()) > 2.0


# ---------------------------------------------------------------------------------------------------------- models


def test_the_strong_decoder_is_a_mixture_after_a_mixture() -> None:
    torch.manual_seed(0)
    model, x = moons_models.StrongDecoder(hidden=8, components=3), torch.randn(4, 2)
    with pyro.get_param_store().scope():
        trace = poutine.trace(model).get_trace(x)
    z = trace.nodes["z"]["value"]
    first, second = model.first(z), model.second(torch.cat([x[:, :1], z], -1))
    for site, out, column in (("x1", first, x[:, 0]), ("x2", second, x[:, 1])):
        loc, scale, logits = out.unflatten(-1, (3, 3)).unbind(-2)
        each = Normal(loc, 0.02 + torch.nn.functional.softplus(scale)).log_prob(column[:, None])
        expected = torch.logsumexp(each + logits.log_softmax(-1), -1)
        found = trace.nodes[site]["fn"].log_prob(column)
        assert torch.allclose(found, expected, atol=1e-5)


def test_samples_of_the_strong_decoder_are_its_density() -> None:
    """At their own codes both columns have uniform values of their distribution function; at other codes not."""
    torch.manual_seed(0)
    model, n = moons_models.StrongDecoder(hidden=8, components=3), 4000
    with torch.no_grad():
        for part in (*model.first, *model.second):
            if isinstance(part, torch.nn.Linear):
                part.weight.mul_(3.0)
        x = model.sample(n, torch.Generator().manual_seed(1))
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))  # the first numbers that `sample` draws
    assert min(uniform(model, x, z)) > 1e-4
    assert max(uniform(model, x, z.flip(0))) < 1e-4


def uniform(model: moons_models.StrongDecoder, x: torch.Tensor, z: torch.Tensor) -> list[float]:
    with torch.no_grad(), pyro.get_param_store().scope():
        nodes: Any = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x).nodes
        values = [nodes[f"x{i + 1}"]["fn"].cdf(x[:, i]) for i in range(2)]
    return [float(kstest(value.numpy(), "uniform").pvalue) for value in values]


def test_samples_leave_the_random_stream_alone() -> None:
    model = moons_models.StrongDecoder(hidden=8)
    before = torch.get_rng_state()
    one = model.sample(5, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, model.sample(5, torch.Generator().manual_seed(0)))


# ------------------------------------------------------------------------------------------------------------ cells


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_failure_has_its_cure_among_the_cells(budget: str) -> None:
    cells = moons.cells(budget)
    names = {(cell.task, cell.guide) for cell in cells}
    for task, named in moons_vae.SETTINGS.items():
        assert (task, moons_vae.CURES[task]) in names
        assert (task, moons_story.FIRST[task]) in names
        assert named[moons_story.FIRST[task]].fails
        assert not named[moons_vae.CURES[task]].fails
    assert (moons_bnn.TASK, moons_bnn.REFERENCE) in names


def test_short_holds_every_family() -> None:
    guides = {cell.guide for cell in moons.cells("short") if cell.task == moons_bnn.TASK}
    assert guides == set(moons_bnn.GUIDES)
    assert len(guides) == 11


def test_a_vae_row(tmp_path: Path) -> None:
    cells = [Cell(moons_vae.SCALE, "scale learned", seed, TINY) for seed in (0, 1)]
    before = torch.get_rng_state()
    rows = moons.run(cells)
    assert torch.equal(before, torch.get_rng_state())
    for row in rows:
        truth = moons_models.log_truth(dgm.load("moons-points").test[0])
        assert row["log_likelihood"] == pytest.approx(float(row["per_datum"].double().mean()), abs=1e-5)
        assert row["below_truth"] == pytest.approx(float(truth.mean()) - row["log_likelihood"], abs=1e-5)
        assert row["log_likelihood"] > row["elbo"]
        assert row["samples"].shape == row["codes"].shape == (1000, 2)
    assert not torch.equal(rows[0]["codes"], rows[1]["codes"])


@pytest.mark.slow
def test_a_classifier_row() -> None:
    rows = moons.run([Cell(moons_bnn.TASK, "diagonal normal", seed, NETWORK) for seed in (0, 1)])
    for row in rows:
        assert row["probability"].shape == row["entropy"].shape == moons_bnn.GRID
        assert bool((row["entropy"] <= math.log(2) + 1e-6).all())
        assert 0 <= row["far_epistemic"] <= row["far_entropy"] <= math.log(2) + 1e-9
        assert row["log_likelihood"] == pytest.approx(float(row["per_datum"].double().mean()), abs=2e-2)
    assert not torch.equal(rows[0]["probability"], rows[1]["probability"])  # other rows, another network


def test_a_point_has_no_epistemic_part() -> None:
    (row,) = moons.run([Cell(moons_bnn.TASK, "point", 0, NETWORK)])
    assert row["far_epistemic"] == pytest.approx(0.0, abs=1e-6)
    assert row["boundary_epistemic"] == pytest.approx(0.0, abs=1e-6)


def test_the_doctor_sees_a_decoder_that_needs_no_latent() -> None:
    """Marginals of a mixture's column are normals, so that a strong decoder is told from a weak one."""
    from dgm.baseline import marginals
    from dgm.sites import latents

    x = dgm.load("moons-points").train[0][:200]
    rows = marginals(latents(moons_models.StrongDecoder(hidden=8), x).observed)
    expected = Normal(x.mean(0), x.std(0, correction=0)).log_prob(x).sum(1)
    assert rows is not None
    assert torch.allclose(rows.float(), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ story


def made_up(folder: Path, seeds: int = 3, arrays: bool = True) -> Results:
    """Rows of every cell with numbers that are known."""
    suite = find_suite("moons")
    rows: list[dict[str, Any]] = []
    for cell in moons.cells("short"):
        if cell.repeat >= seeds:
            continue
        own = {
            **cell.values("seed"),
            "status": "ok",
            "key": f"{len(rows):032x}",
            "log_likelihood": -1.5 - 0.1 * cell.repeat,
        }
        if cell.task == moons_bnn.TASK:
            own |= {"accuracy": 0.9, "calibration_error": 0.1, "boundary_entropy": 0.5, "far_entropy": 0.2,
                    "far_epistemic": 0.1, "rhat": 1.01}  # fmt: skip
        else:
            cure = cell.guide == moons_vae.CURES[cell.task]
            own |= {"below_truth": 0.5, "below_truth_se": 0.01, "active_units": 2 * cure, "units": 2,
                    "information": 1.0 * cure, "khat_bad": 0.3, "scale": 0.2}  # fmt: skip
            own["log_likelihood"] += 0.25 * cure
            if cell.repeat == 0:
                own |= {"doctor": "<k-hat>", "evidence": "much", "consequence": "loose", "cure": "a flow"}
        rows.append(own)
    plan = {"budget": "short", "filter": [], "protocol": 1, "about": {}}
    return Results(suite, pd.DataFrame(rows), pd.DataFrame({"key": [r["key"] for r in rows]}), plan, folder=None)


def test_the_story_tells_paired_effects_with_their_errors(tmp_path: Path) -> None:
    found = moons_story.story(made_up(tmp_path))
    assert [c.title[:2] for c in found] == ["Tw", "1.", "2.", "3.", "4."]
    for chapter in found[1:4]:
        told = [name for name, _ in chapter.says]
        assert told[:5] == ["symptom", "evidence", "the doctor says", "cure", "effect"]
        said = dict(chapter.says)
        assert "+0.250 ± 0.000" in said["effect"]  # the seeds differ by 0.1, their pairs do not
        assert said["the doctor says"] == "<k-hat>: much. So: loose. Cure: a flow."
        assert chapter.figures == []  # the arrays were not kept


def test_one_seed_has_no_error(tmp_path: Path) -> None:
    said = dict(moons_story.story(made_up(tmp_path, seeds=1))[1].says)
    assert "+0.250 nats" in said["effect"]
    assert "nan" not in " ".join(said.values())


def test_nothing_of_the_doctor_is_markup(tmp_path: Path) -> None:
    text = chapter_markdown(moons_story.story(made_up(tmp_path))[1])
    assert "&lt;k-hat>" in text
    assert "<k-hat>" not in text
    assert chapter_markdown(Chapter("t", [("a", "x](http://y)")])).count("](") == 0


def test_a_bound_above_the_truth_is_a_miss(tmp_path: Path) -> None:
    good = made_up(tmp_path)
    assert set(moons.checks(good)["verdict"]) == {"agree"}
    rows = good.rows.assign(below_truth=good.rows["below_truth"].where(good.rows.index != 0, -0.05))
    assert list(moons.checks(replace(good, rows=rows))["verdict"]).count("miss") == 1


def test_a_plan_estimates_its_time(tmp_path: Path) -> None:
    plan = make_plan(find_suite("moons"), Store(tmp_path), "smoke")
    assert plan.seconds is not None
    assert 0 < plan.seconds < 60


@pytest.mark.slow
def test_smoke_runs_in_time_and_its_report_is_whole(tmp_path: Path) -> None:
    begin, used = time.monotonic(), time.process_time()
    results = run_suite("moons", tmp_path, budget="smoke", progress=False)
    report = make_report(tmp_path)
    page = write_report(report, tmp_path / "report")
    assert time.process_time() - used < 40, f"{time.monotonic() - begin:.0f} s of wall clock"
    assert not len(results.failed)
    assert not len(report.missed)
    text, html = (page.parent / "report.md").read_text(), page.read_text()
    for name in ("moons-1", "moons-2", "moons-3", "moons-entropy", "moons-epistemic"):
        assert f"]({name}.png)" in text
        assert imread(page.parent / f"{name}.png").shape[1] >= 600
    assert text.index("1. A likelihood") < text.index("2. A q") < text.index("3. Collapse") < text.index("4. The other")
    assert html.count("<svg") == 5 + len(report.figures())
    assert "http" not in html.replace("http-equiv", "")
