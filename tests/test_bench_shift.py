"""The shift suite: its images, what it makes of predictions, its rows at the smallest size, and its story."""

from __future__ import annotations

import doctest
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import dgm
from dgm.bench import run_suite
from dgm.bench_cells import BUDGETS, Cell
from dgm.bench_find import find_suite
from dgm.bench_report import make_report, write_report
from dgm.bench_results import Results
from dgm.bench_story import chapter_markdown
from dgm.benchmarks import shift, shift_bnn, shift_images, shift_plots, shift_story
from dgm.benchmarks.shift_images import NOISE, SEVERITIES, SIDE, STEPS, TRAINED, corrupted, foreign_of, halved
from dgm.errors import DataError
from dgm.metrics import CategoricalPrediction

TINY = {
    "halved": True, "hidden": [8], "rows": 40, "steps": 5, "draws": 4, "test": 30, "shifted": 10, "foreign": 20,
    "batch_size": 20, "lr": 3e-3, "prior": 4.0, "compile": "trace",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Blobs: smooth, off the middle, black at the edge."""
    at = torch.arange(SIDE, dtype=torch.float32)
    down, across = torch.meshgrid(at, at, indexing="ij")
    blobs = [torch.exp(-((down - i) ** 2 / 8 + (across - j) ** 2 / 18)) for i, j in ((10, 12), (14, 16), (17, 11))]
    return torch.stack(blobs).flatten(1)


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small sets in the place of the files: ten classes, each a bright row of its own; those of clothes columns."""

    def made(name: str, binarize: str | None = None) -> Any:
        assert binarize == "none", "training images are grey: those that are judged must be, too"
        generator = torch.Generator().manual_seed(len(name))
        count, labels = 400, torch.arange(400) // 2 % 10
        x = 0.1 * torch.rand(count, SIDE, SIDE, generator=generator)
        lines = x if name == "mnist" else x.transpose(1, 2)
        lines[torch.arange(count), 2 * labels + 4] += 0.9
        both = x.flatten(1), labels
        return SimpleNamespace(
            train=both[:1], test=both[:1], labels=None if name == "omniglot" else {"test": labels},
            supervised=lambda: SimpleNamespace(train=both),
        )  # fmt: skip

    for cached in (shift_images.training, shift_images.kept_images):
        cached.cache_clear()
    monkeypatch.setattr(dgm, "load", made)
    monkeypatch.setattr(shift_images.dgm, "load", made)
    yield
    for cached in (shift_images.training, shift_images.kept_images):
        cached.cache_clear()


@pytest.mark.parametrize("module", [shift_images, shift_plots, shift_story])
def test_doctests(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


# ----------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", STEPS)
def test_corruption_leaves_images_images(kind: str, pictures: Tensor) -> None:
    assert corrupted(pictures, kind, 0) is pictures
    before = torch.get_rng_state()
    away = []
    for severity in SEVERITIES:
        found = corrupted(pictures, kind, severity)
        assert found.shape == pictures.shape and found.dtype == pictures.dtype
        assert 0 <= float(found.min()) and float(found.max()) <= 1
        assert torch.equal(found, corrupted(pictures, kind, severity))
        away.append(float((found - pictures).square().mean()))
    assert away == sorted(away) and away[0] > 1e-5
    assert torch.equal(before, torch.get_rng_state())
    if kind != "blur":  # which has no chance in it
        assert not torch.equal(corrupted(pictures, kind, 3, seed=1), corrupted(pictures, kind, 3))


def test_a_quarter_turn_moves_pixels_exactly(pictures: Tensor) -> None:
    square = pictures.unflatten(1, (1, SIDE, SIDE))
    many = square.repeat(8, 1, 1, 1)
    found = shift_images.rotated(many, 90.0, torch.Generator().manual_seed(0))
    ways = set()
    for image, turned in zip(many, found, strict=True):
        near = [torch.allclose(turned, torch.rot90(image, k, (1, 2)), atol=1e-4) for k in (1, -1)]
        assert any(near)
        ways.add(near.index(True))
    assert ways == {0, 1}


def test_a_turn_keeps_the_mass_of_what_stays_inside(pictures: Tensor) -> None:
    found = corrupted(pictures, "rotation", 3)
    assert torch.allclose(found.sum(1), pictures.sum(1), rtol=0.02)
    edge = pictures.unflatten(1, (SIDE, SIDE)).roll((12, 12), (1, 2)).flatten(1)  # of these corners turn out of sight
    assert not torch.allclose(corrupted(edge, "rotation", 3).sum(1), edge.sum(1), rtol=0.02)


def test_moves_are_whole_pixels_in_four_directions(pictures: Tensor) -> None:
    many = pictures[:1].repeat(60, 1)
    found = corrupted(many, "translation", 2).unflatten(1, (SIDE, SIDE))
    by = int(STEPS["translation"][1])
    image = pictures[0].unflatten(0, (SIDE, SIDE))
    expected = []
    for axis, way in ((0, 1), (0, -1), (1, 1), (1, -1)):
        moved = torch.roll(image, way * by, axis)
        edge = moved.narrow(axis, 0 if way > 0 else SIDE - by, by)
        edge.zero_()
        expected.append(moved)
    seen = {next(k for k, one in enumerate(expected) if torch.equal(one, each)) for each in found}
    assert seen == {0, 1, 2, 3}


def test_blur_widens_by_its_variance_and_keeps_the_mass() -> None:
    """A Gaussian of variance v under a kernel of variance s^2 has variance v + s^2; twice the kernel would not fit."""
    at = torch.arange(SIDE, dtype=torch.float32)
    down, across = torch.meshgrid(at, at, indexing="ij")
    blob = torch.exp(-((down - 13.5) ** 2 + (across - 13.5) ** 2) / (2 * 2.0**2))

    def variance(image: Tensor) -> float:
        return float((image * (down - 13.5) ** 2).sum() / image.sum())

    scale = STEPS["blur"][0]
    found = corrupted(blob.flatten()[None], "blur", 1).unflatten(1, (SIDE, SIDE))[0]
    assert float(found.sum()) == pytest.approx(float(blob.sum()), rel=1e-3)
    gained = variance(found) - variance(blob)
    assert gained == pytest.approx(scale**2, rel=0.02)
    twice = shift_images.blurred(blob[None, None], 2 * scale, torch.Generator())[0, 0]
    assert variance(twice) - variance(blob) != pytest.approx(scale**2, rel=0.02)


def test_noise_has_its_scale_and_a_mutant_has_not() -> None:
    """Within 0.5 +- 5 standard deviations nothing is clipped: mean and variance, |z| < 4.5."""
    n = 40_000
    grey = torch.full((n // SIDE**2 + 1, SIDE**2), 0.5)
    found = (corrupted(grey, "noise", 1) - 0.5).flatten()[:n].double()

    def z(scale: float) -> tuple[float, float]:
        return (
            float(found.mean() / (scale / n**0.5)),
            float((found.square().mean() / scale**2 - 1) / (2 / n) ** 0.5),
        )

    assert all(abs(value) < 4.5 for value in z(STEPS["noise"][0]))
    assert abs(z(1.1 * STEPS["noise"][0])[1]) > 4.5


def test_bad_images_and_names_are_refused(pictures: Tensor) -> None:
    for images in (pictures[:, :100], pictures + 1.0, pictures - 0.5, pictures[0]):
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            corrupted(images, "blur", 1)
    with pytest.raises(DataError, match="rotation"):
        corrupted(pictures, "rotatoin", 1)
    for severity in (-1, 6, 1.5):
        with pytest.raises(DataError, match="severity 0 to 5"):
            corrupted(pictures, "blur", severity)


def test_halved_pixels_are_means_of_four(pictures: Tensor) -> None:
    one, whole = halved(pictures)[0].unflatten(0, (14, 14)), pictures[0].unflatten(0, (SIDE, SIDE))
    assert float(one[5, 6]) == pytest.approx(float(whole[10:12, 12:14].mean()), abs=1e-6)
    assert float(one.mean()) == pytest.approx(float(whole.mean()), abs=1e-6)


def test_foreign_images_are_of_another_kind(sets: None) -> None:
    for task in TRAINED:
        assert task not in foreign_of(task) and len(set(foreign_of(task))) == len(shift_bnn.PLACES)
    first = shift_images.foreign(shift_images.DRAWINGS, 80)
    whole = shift_images.kept_images("omniglot")[0]
    assert torch.equal(first[:3], whole[[0, 5, 10]])  # a character of each before the next drawer
    assert torch.equal(first[-1], whole[5 * 79])
    noise = shift_images.foreign(NOISE, 50)
    assert torch.equal(noise, shift_images.foreign(NOISE, 50)) and abs(float(noise.mean()) - 0.5) < 0.02


# --------------------------------------------------------------------------------------------------------- judging


def predictions(own: Tensor, foreign: Tensor, y: Tensor) -> dict[str, CategoricalPrediction]:
    """As `judged` gives them, for MNIST: one set of foreign logits for all kinds."""
    zeros = torch.zeros(foreign.shape[1], dtype=torch.long)
    return {"clean": CategoricalPrediction(own, y)} | {
        name: CategoricalPrediction(foreign, zeros) for name in foreign_of("MNIST")
    }


def brute(own: Tensor, foreign: Tensor) -> float:
    """Share of pairs in which the foreign one is higher, ties half."""
    pairs = foreign[:, None] - own
    return float(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean())


def test_areas_are_shares_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    own = 3 * torch.randn(4, 25, 10, generator=generator)
    other = torch.randn(4, 18, 10, generator=generator)
    other[:, :6] = own[:, :6]  # ties
    seen = predictions(own, other, torch.zeros(25, dtype=torch.long))
    row = shift_bnn.detections("MNIST", seen)
    clean, odd = seen["clean"], seen[foreign_of("MNIST")[0]]
    scores = {
        "entropy": (clean.predictive_entropy(), odd.predictive_entropy()),
        "epistemic": (clean.mutual_information(), odd.mutual_information()),
        "confidence": (-clean.probs.max(1).values, -odd.probs.max(1).values),
    }
    for name, (a, b) in scores.items():
        for place in shift_bnn.PLACES:
            assert row[f"auroc_{name}_{place}"] == pytest.approx(brute(a, b), abs=1e-12)
        assert row[f"auroc_{name}"] == pytest.approx(brute(a, b), abs=1e-12)
    entropy = clean.predictive_entropy()
    assert row["auroc_halves"] == pytest.approx(brute(entropy[::2], entropy[1::2]), abs=1e-12)


def test_areas_of_known_cases() -> None:
    y = torch.zeros(6, dtype=torch.long)
    sure, unsure = torch.zeros(1, 6, 10), torch.zeros(1, 5, 10)
    sure[..., 0] = 9.0
    for own, other, area, flagged in ((sure, unsure, 1.0, 0.0), (unsure.expand(1, 5, 10), sure[:, :5], 0.0, 1.0)):
        row = shift_bnn.detections("MNIST", predictions(own, other, y[: own.shape[1]]))
        assert row["auroc_entropy"] == row["auroc_confidence"] == area
        assert row["auroc_epistemic"] == 0.5  # one draw: nobody disagrees
        assert row["fpr95"] == flagged
    same = shift_bnn.detections("MNIST", predictions(sure, sure, y))
    assert same["auroc_entropy"] == 0.5 and same["auroc_halves"] == 0.5


def test_the_nearest_mean(sets: None) -> None:
    x, y = shift_images.training("MNIST")
    assert shift_bnn.nearest_mean(x, y, x, y) == 1.0
    assert shift_bnn.nearest_mean(x, y, x, (y + 1) % 10) == 0.0


# ------------------------------------------------------------------------------------------------------------ cells


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_guide_sees_both_sets(budget: str) -> None:
    cells = shift.cells(budget)
    guides = shift_bnn.SMOKE if budget == "smoke" else shift_bnn.GUIDES
    assert {(cell.task, cell.guide) for cell in cells} == {(task, guide) for task in TRAINED for guide in guides}
    assert len(shift_bnn.GUIDES) >= 12
    assert all(cell.settings["shifted"] <= cell.settings["test"] for cell in cells)
    assert all(shift.seconds(cell) > 0 for cell in cells)


def test_a_row_of_two_seeds(sets: None) -> None:
    cells = [Cell("MNIST", "diagonal normal", seed, TINY) for seed in (0, 1)]
    before = torch.get_rng_state()
    rows: list[Any] = list(shift.SUITE.run(cells))
    assert torch.equal(before, torch.get_rng_state())
    assert rows[0]["log_likelihood"] != rows[1]["log_likelihood"]
    for row in rows:
        assert row["log_likelihood"] == pytest.approx(float(row["per_datum"].double().mean()), abs=1e-5)
        assert row["log_likelihood"] >= row["single_log_likelihood"] - 1e-9
        assert 0 < row["epistemic"] <= row["entropy"] <= math.log(10)
        assert row["nearest_mean"] == 1.0
        accuracies = [row[f"accuracy_{kind}_{severity}"] for kind in STEPS for severity in SEVERITIES]
        assert row["accuracy_shifted"] == pytest.approx(np.mean(accuracies), abs=1e-12)
        assert row["parameters"] == 2 * (196 * 8 + 8 + 8 * 10 + 10)
        assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())
    again: list[Any] = list(shift.SUITE.run(cells))
    assert {k: v for k, v in again[1].items() if isinstance(v, float) and "seconds" not in k} == {
        k: v for k, v in rows[1].items() if isinstance(v, float) and "seconds" not in k
    }


def test_severity_zero_is_the_first_images_as_they_are(sets: None) -> None:
    row: Any = next(iter(shift.SUITE.run([Cell("Fashion-MNIST", "point", 0, {**TINY, "shifted": TINY["test"]})])))
    for name in ("accuracy", "log_likelihood", "entropy", "calibration_error"):
        assert row[f"{name}_shift_0"] == row[name]
    assert row["epistemic"] == 0.0 and row["auroc_epistemic"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("guide", shift_bnn.GUIDES)
def test_every_guide_gives_rows(guide: str, sets: None) -> None:
    settings = {**TINY, "rows": 200, "hidden": [8, 8]}
    rows: list[Any] = list(shift.SUITE.run([Cell("MNIST", guide, seed, settings) for seed in (0, 1)]))
    assert len(rows) == 2
    assert all(math.isfinite(row["log_likelihood"]) and 0 <= row["auroc_entropy"] <= 1 for row in rows)


def test_missing_images_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, **_: Any) -> Any:
        raise DataError(f"no file {name}/train-images-idx3-ubyte.gz")

    shift_images.kept_images.cache_clear()
    monkeypatch.setattr(shift_images.dgm, "load", none)
    with pytest.raises(DataError, match=r"mnist/train-images-idx3-ubyte\.gz"):
        shift.ready("MNIST")


def test_without_data_cells_are_skipped_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str, **_: Any) -> Any:
        raise DataError(f"no file {name}/train-images-idx3-ubyte.gz")

    shift_images.kept_images.cache_clear()
    monkeypatch.setattr(shift_images.dgm, "load", none)
    results = run_suite("shift", tmp_path / "run", budget="smoke", progress=False)
    assert set(results.skipped) == set(TRAINED) and not len(results.good)
    text = make_report(tmp_path / "run").markdown()
    assert "mnist/train-images-idx3-ubyte.gz" in text


# ----------------------------------------------------------------------------------------------------------- report


def made_up(seeds: int = 3, budget: str = "short") -> Results:
    """Rows of every cell with numbers that are known: later guides are worse, fall faster and doubt more."""
    rows: list[dict[str, Any]] = []
    for cell in shift.cells("short"):
        if cell.repeat >= seeds:
            continue
        k, wobble = shift_bnn.GUIDES.index(cell.guide), 0.001 * cell.repeat
        spread = k > 0
        own: dict[str, Any] = {
            **cell.values("seed"), "status": "ok", "key": f"{len(rows):032x}",
            "log_likelihood": -0.2 - 0.01 * k - wobble,
            "single_log_likelihood": -0.2 - 0.02 * k - wobble, "accuracy": 0.95 - 0.01 * k + wobble, "brier": 0.1,
            "calibration_error": 0.01 * (k + 1), "calibration_error_adaptive": 0.01, "calibration_chance": 0.008,
            "entropy": 0.3 + 0.01 * k, "epistemic": 0.01 * k, "nearest_mean": 0.8, "parameters": 100 * (k + 1),
            "auroc_halves": 0.5 + wobble, "auroc_halves_se": 0.006,
        }  # fmt: skip
        start = {"accuracy": own["accuracy"], "log_likelihood": own["log_likelihood"], "entropy": own["entropy"],
                 "calibration_error": own["calibration_error"]}  # fmt: skip
        step = {
            "accuracy": -0.1 - 0.002 * k,
            "log_likelihood": -0.5,
            "entropy": 0.1,
            "calibration_error": 0.05 - 0.003 * k,
        }
        for name, value in start.items():
            own[f"{name}_shift_0"] = value
            for kind in STEPS:
                own |= {f"{name}_{kind}_{severity}": value + severity * step[name] for severity in SEVERITIES}
            own[f"{name}_shifted"] = value + 3 * step[name]
        for score in ("entropy", "epistemic", "confidence"):
            for place in shift_bnn.PLACES:
                own[f"auroc_{score}_{place}"] = 0.5 if score == "epistemic" and not spread else 0.8 + 0.01 * k + wobble
            own[f"auroc_{score}"] = own[f"auroc_{score}_noise"]
        own |= {f"fpr95_{place}": 0.4 for place in shift_bnn.PLACES} | {"fpr95": 0.4}
        rows.append(own)
    costs = pd.DataFrame([
        {"key": r["key"], "seconds": 2.0 + r["parameters"] / 100, "predict_seconds": 1.0, "job_cpu_seconds": 5.0}
        for r in rows
    ])  # fmt: skip
    plan = {"budget": budget, "filter": [], "protocol": 1, "about": {}}
    return Results(find_suite("shift"), pd.DataFrame(rows), costs, plan)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds: they are drawn where they are looked at."""

    def missing() -> Any:
        raise DataError("no images")

    monkeypatch.setattr(shift_story, "images_figure", missing)
    for name in ("curves_figure", "detection_figure"):
        monkeypatch.setattr(shift_story, name, lambda *_: None)


def test_the_story_is_that_of_the_rows(undrawn: None) -> None:
    chapters = shift_story.story(made_up())
    assert [chapter.title[:2] for chapter in chapters] == ["1.", "2.", "3.", "4."]
    assert list(chapters[0].figures) == []  # without the data there is no picture of them
    grows = dict(chapters[1].says)["MNIST"]
    assert "most accurate is point, 0.951 ± 0.001" in grows
    assert "the accuracy of the point goes from 0.951 ± 0.001 to 0.451 ± 0.001" in grows
    assert "its calibration error from 0.010 ± 0.000 to 0.260 ± 0.000" in grows
    told = dict(chapters[2].says)["MNIST"]
    last = shift_bnn.GUIDES[-1]
    assert f"{last}, 0.911 ± 0.001 on average over the three kinds, tells foreign images best, point, 0.801" in told
    assert "flags 40 % of the known images" in told
    assert "in each of 3 seeds: " in told and f"{last} (+0.110 ± 0.000)" in told
    assert "Surer of what it has never seen" not in told
    cost = dict(chapters[3].says)["MNIST"]
    assert f"is {shift_bnn.GUIDES[1]}, 0.811 ± 0.001, for 1.3 of its training time" in cost
    assert chapters[1].table is not None and len(chapters[1].table) == 2 * len(shift_bnn.GUIDES)
    text = "\n".join(chapter_markdown(chapter) for chapter in chapters)
    assert "nan" not in text


def test_the_story_follows_other_rows(undrawn: None) -> None:
    """The same sentences with the order turned, and a guide below a coin."""
    found = made_up()
    turned = found.rows.copy()
    for name in ("auroc_entropy", *(f"auroc_entropy_{place}" for place in shift_bnn.PLACES)):
        turned[name] = 1.45 - turned[name]
    at = (turned["guide"] == "SWAG") & (turned["task"] == "MNIST")
    turned.loc[at, "auroc_entropy_noise"] = 0.3
    told = dict(shift_story.story(replace(found, rows=turned))[2].says)
    assert "By predictive entropy point, 0.649" in told["MNIST"]
    assert "Better by entropy than the point in each of 3 seeds: none." in told["MNIST"]
    assert "Surer of what it has never seen than of what it has learned: SWAG before noise (0.300" in told["MNIST"]
    assert "SWAG before noise" not in told["Fashion-MNIST"]


def test_a_guide_that_learned_nothing_is_not_compared(undrawn: None) -> None:
    """It doubts everything, which makes it look calibrated under shift."""
    found = made_up()
    rows = found.rows.copy()
    at = rows["guide"] == "Laplace, Kronecker"
    rows.loc[at, ["calibration_error_shifted", "auroc_entropy"]] = [0.0, 0.99]
    both = (rows, rows.assign(accuracy=rows["accuracy"].where(~at, 0.2)))
    text = [[dict(chapter.says)["MNIST"] for chapter in shift_story.story(replace(found, rows=r))[1:3]] for r in both]
    assert "best calibrated is Laplace, Kronecker, 0.000" in text[0][0]
    assert "By predictive entropy Laplace, Kronecker, 0.990" in text[0][1]
    for said in text[1]:
        assert said.count("Laplace") == 1
        assert said.endswith("the nearest mean image is more accurate: Laplace, Kronecker, 0.200 ± 0.000.")


def test_one_seed_and_some_rows_are_enough(undrawn: None) -> None:
    found = made_up(seeds=1)
    rows = found.rows[found.rows["guide"].isin(["SWAG", "dropout"])]
    for part in (found.rows, rows, rows[rows["task"] == "MNIST"]):
        text = "\n".join(chapter_markdown(chapter) for chapter in shift_story.story(replace(found, rows=part)))
        assert "nan" not in text
    assert set(shift.checks(found)["verdict"]) == {"agree"}


BROKEN = {
    "averaging gain": {"single_log_likelihood": 0.0},
    "entropy less its epistemic part": {"entropy": -0.1},
    "epistemic part of a point, negative": {"epistemic": 1e-3},
    "AUROC of halves, standard errors off 0.5, negative": {"auroc_halves": 0.5 - 5 * 0.006},
    "accuracy above nearest mean": {"accuracy": 0.79},
}


@pytest.mark.parametrize("metric", BROKEN)
def test_a_broken_cell_is_a_miss(metric: str) -> None:
    found = made_up()
    assert set(shift.checks(found)["verdict"]) == {"agree"} and len(shift.checks(found)) == 2 * len(BROKEN)
    rows = found.rows.copy()
    rows.loc[rows.index[0], list(BROKEN[metric])] = list(BROKEN[metric].values())
    table = shift.checks(replace(found, rows=rows))
    bad = table[table["verdict"] == "miss"]
    assert list(bad["metric"]) == [metric] and list(bad["task"]) == ["MNIST"] and list(bad["guide"]) == ["point"]


def test_the_floor_is_not_asked_of_laplace_nor_of_a_smoke_run() -> None:
    found = made_up()
    rows = found.rows.copy()
    rows.loc[rows["guide"] == "Laplace, Kronecker", "accuracy"] = 0.5
    assert set(shift.checks(replace(found, rows=rows))["verdict"]) == {"agree"}
    rows["accuracy"] = 0.5
    assert "miss" in set(shift.checks(replace(found, rows=rows))["verdict"])
    assert set(shift.checks(replace(found, rows=rows, plan={**found.plan, "budget": "smoke"}))["verdict"]) == {"agree"}


def test_tables_have_a_line_for_each_guide() -> None:
    for frame in shift.tables(made_up()).values():
        assert len(frame) == 2 * len(shift_bnn.GUIDES)
        assert not frame.astype(str).isin(["–", "nan"]).any().any()


@pytest.mark.slow
def test_pictures_show_every_guide_and_corruption(sets: None) -> None:
    rows = made_up().rows
    part = rows[rows["task"] == "MNIST"]
    curves = shift_plots.curves_figure(part, shift_story.FOLLOWED)
    assert len(curves.axes) == len(STEPS) * len(shift_story.FOLLOWED)
    assert all(len(axes.lines) == len(shift_bnn.GUIDES) for axes in curves.axes)
    marks = [[tick.get_text() for tick in axes.get_xticklabels()] for axes in curves.axes[-len(STEPS) :]]
    assert marks == [["none", *(f"{p:g}" for p in STEPS[kind])] for kind in STEPS]
    first = np.asarray(curves.axes[0].lines[0].get_ydata(), dtype=float)
    assert first == pytest.approx(0.951 - 0.1 * np.arange(6))
    places = dict(zip(shift_bnn.PLACES, foreign_of("MNIST"), strict=True))
    assert len(shift_plots.detection_figure(part, places, shift_story.SCORES).axes) == 3
    assert sum(len(axes.images) for axes in shift_plots.images_figure().get_axes()) == 2 * len(STEPS) + 4


@pytest.mark.slow
def test_smoke_runs_and_its_report_is_whole(tmp_path: Path, sets: None) -> None:
    results = run_suite("shift", tmp_path / "run", budget="smoke", progress=False)
    assert len(results.good) == 4 and not len(results.failed)
    report = make_report(tmp_path / "run")
    page = write_report(report, tmp_path / "report")
    assert not len(report.missed)
    text = (page.parent / "report.md").read_text()
    for name in ("shift-images", "shift-mnist-curves", "shift-fashion-mnist-foreign"):
        assert f"]({name}.png)" in text and (page.parent / f"{name}.png").is_file()
    assert "http" not in page.read_text().replace("http-equiv", "")
