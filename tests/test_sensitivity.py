"""Sensitivity to step size and budget: grids whose truth is known, interruption, and a real one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from dgm.errors import DataError, DGMError, OptionError
from dgm.ranking import rank
from dgm.sensitivity import Sensitivity, sensitivity
from dgm.style import svg

MODULE = sys.modules["dgm.sensitivity"]  # dgm.sensitivity itself is the function
GUIDES = {"f": AutoNormal, "g": AutoNormal}


class Fake:
    """What `compare` gives, from scores that are drawn: crossed effects of seed and datum around given means."""

    def __init__(self, means: dict[str, float], rng: np.random.Generator, seeds: int = 3, lost: tuple[str, ...] = ()):
        base = 3 * rng.normal(size=60)
        self.per_datum = {
            g: m + base + 0.1 * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(seeds, 60))
            for g, m in means.items()
            if g not in lost
        }
        rows = [
            {"guide": g, "seed": r, "status": "NaN" if g in lost else "ok", "seconds": 1.0}
            | {"bound": math.nan if g in lost else self.per_datum[g][r].mean()}
            for g in means
            for r in range(seeds)
        ]
        self.rows, self.meta = pd.DataFrame(rows), {"interrupted": False, "score": "bound"}

    @property
    def table(self) -> pd.DataFrame:
        return rank(self.rows, self.per_datum, "bound")


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sensitivity]:
    """A sensitivity whose comparison at (lr, epochs) has the means that `truth` says."""

    def make(truth: Callable[[float, int], dict[str, float]], **options: Any) -> Sensitivity:
        rng = np.random.default_rng(0)
        lost = options.pop("lost", {})
        seeds = options.pop("seeds", 3)

        def fake(*_: Any, lr: float, epochs: int, **__: Any) -> Fake:
            return Fake(truth(lr, epochs), rng, seeds, lost.get((lr, epochs), ()))

        monkeypatch.setattr(MODULE, "compare", fake)
        return sensitivity(None, GUIDES, None, **options)

    return make


def test_a_ranking_that_holds_everywhere(grid: Callable[..., Sensitivity]) -> None:
    found = grid(lambda lr, epochs: {"f": -20.0 - 9 * (lr < 1e-3), "g": -25.0}, lrs=[1e-4, 1e-3], epochs=[5, 10])
    frame = found.frame
    assert len(frame) == 8 and list(frame.columns[:4]) == ["lr", "epochs", "guide", "score"]
    tuned = frame[frame["lr"] == 1e-3]
    assert (tuned[tuned["guide"] == "f"]["rank_high"] == 1).all() and (
        tuned[tuned["guide"] == "g"]["rank_low"] == 2
    ).all()
    assert "f beats g at lr 0.001, 5 epochs, and g beats f at lr 0.0001, 5 epochs." in found.statement()
    same = grid(lambda lr, epochs: {"f": -20.0 - lr, "g": -25.0}, lrs=[1e-4, 1e-3], epochs=[5, 10])
    assert same.statement().startswith("No two guides change places")
    assert (
        "Holm's correction over 4 differences at 5 %" in same.statement()
        and "3 seeds and 60 held-out" in same.statement()
    )


def test_a_change_that_is_chance_is_not_said(grid: Callable[..., Sensitivity]) -> None:
    found = grid(lambda lr, epochs: {"f": 0.0, "g": 0.0}, lrs=[1e-4, 1e-3, 1e-2], epochs=[5, 10, 20])
    signs = np.sign(found.pairs["difference"])
    assert len(set(signs)) == 2  # the order does change, by chance
    assert found.statement().startswith("No two guides change places")


def test_guides_that_meet_do_not_change_places_and_those_that_cross_do(grid: Callable[..., Sensitivity]) -> None:
    means = {5: {"f": 9.0, "g": 0.0, "h": -9.0}, 10: {"f": 9.0, "g": 9.0, "h": 9.0}}
    found = grid(lambda lr, epochs: means[epochs], lrs=[1e-3], epochs=[5, 10])
    assert found.statement().startswith("No two guides change places")
    apart = grid(
        lambda lr, epochs: {"f": 9.0, "g": 0.0} | ({"h": 18.0} if epochs == 10 else {"h": -9.0}),
        lrs=[1e-3],
        epochs=[5, 10],
    )
    assert "f beats h at 5 epochs, and h beats f at 10 epochs" in apart.statement()


def test_the_table_says_what_a_bad_setting_costs(grid: Callable[..., Sensitivity]) -> None:
    found = grid(lambda lr, epochs: {"f": -20.0, "g": -22.0 - 3 * (lr > 1e-3)}, lrs=[1e-3, 1e-2], epochs=[5])
    table = found.table
    assert table.index.tolist() == ["f", "g"] and table.loc["g", ["best", "worst"]].tolist() == ["lr 0.001", "lr 0.01"]
    exact = np.mean(found.results[1e-3, 5].per_datum["g"]) - np.mean(found.results[1e-2, 5].per_datum["g"])
    assert table.loc["g", "lost"] == pytest.approx(exact) and 0 < table.loc["g", "lost_se"] < 1
    assert found.statement().count("g has most to lose") == 1
    lines = repr(found).splitlines()
    assert lines[0].split() == ["guide", "lr", "0.001", "lr", "0.01", "lost"] and lines[1].split()[:2] == [
        "5",
        "epochs",
    ]
    assert [line.count("*") for line in lines[:5]] == [0, 0, 1, 1, 1]


def test_guides_that_failed_somewhere(grid: Callable[..., Sensitivity]) -> None:
    found = grid(lambda lr, epochs: {"f": -20.0, "g": -22.0}, lrs=[1e-3, 1e-2], epochs=[5], lost={(1e-2, 5): ("g",)})
    frame = found.frame.set_index(["lr", "guide"])
    assert math.isnan(frame.loc[(1e-2, "g"), "score"]) and math.isnan(frame.loc[(1e-2, "g"), "rank_low"])
    assert found.table.loc["g", "lost"] == 0.0 and "–" in repr(found)
    assert len(found.figure().axes) == 1
    nothing = grid(lambda lr, epochs: {"f": 0.0}, lrs=[1e-3], lost={(1e-3, 100): ("f",)})
    assert nothing.statement() == "No guide finished with a finite score at any setting."
    with pytest.raises(DataError, match="did every run fail"):
        nothing.figure()


def test_one_seed_and_one_setting(grid: Callable[..., Sensitivity]) -> None:
    found = grid(lambda lr, epochs: {"f": 0.0, "g": -5.0}, lrs=[1e-3], seeds=1)
    said = found.statement()
    assert said.startswith("This rests on 1 seed and 60 held-out data at 1 setting,") and "With one seed" in said
    assert found.label((1e-3, 100)) == "lr 0.001"


def test_what_had_finished_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, calls = np.random.default_rng(0), []

    def stopped(*_: Any, lr: float, epochs: int, **__: Any) -> Fake:
        calls.append((lr, epochs))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Fake({"f": 0.0, "g": -5.0}, rng)

    monkeypatch.setattr(MODULE, "compare", stopped)
    found = sensitivity(None, GUIDES, None, lrs=[1e-2, 1e-3], epochs=[20, 5])
    assert list(found.results) == calls[:3] == [(1e-3, 5), (1e-2, 5), (1e-3, 20)]  # short budgets first
    assert found.meta["interrupted"] and "interrupted: 3 of 4 settings" in found.statement()

    def half(*_: Any, **__: Any) -> Fake:
        result = stopped(lr=1.0, epochs=1)
        result.meta["interrupted"] = len(calls) == 3
        return result

    calls.clear()
    monkeypatch.setattr(MODULE, "compare", half)
    found = sensitivity(None, GUIDES, None, lrs=[1e-2, 1e-3], epochs=[20, 5])
    assert len(found.results) == 2 and found.partial is not None and len(found.frame) == 4
    calls[:] = [(0.0, 0)] * 3
    with pytest.raises(KeyboardInterrupt):
        sensitivity(None, GUIDES, None, lrs=[1e-2])


@pytest.mark.parametrize(
    ("lrs", "epochs", "panels", "label"), [(2, 2, 2, "step size"), (1, 3, 1, "epochs"), (3, 1, 1, "step size")]
)
def test_figures(grid: Callable[..., Sensitivity], lrs: int, epochs: int, panels: int, label: str) -> None:
    found = grid(
        lambda lr, epochs: {"f": -20.0, "g": -21.0, "far": -1e6}, lrs=[10.0**-i for i in range(1, lrs + 1)],
        epochs=[10 * i for i in range(1, epochs + 1)],
    )  # fmt: skip
    figure = found.figure()
    assert len(figure.axes) == panels and figure.axes[0].get_xlabel() == label
    low, high = figure.axes[0].get_ylim()
    assert -40 < low < high < -10
    text = svg(figure, "sensitivity")
    assert "far ↓" in text and ">f<" in text


BAD: list[tuple[dict[str, Any], type[DGMError], str]] = [
    ({"lrs": []}, OptionError, "lrs is .*at least one"),
    ({"lrs": 1e-3}, OptionError, "lrs is 0.001"),
    ({"lrs": [1e-3, 1e-3]}, OptionError, "each value once"),
    ({"lrs": [1e-3, -1.0]}, OptionError, "lr is -1"),
    ({"lrs": [1e-3, math.nan]}, OptionError, "lr is nan"),
    ({"epochs": [1, 0]}, OptionError, "epochs has 0"),
    ({"epochs": [1.5]}, OptionError, "epochs has 1.5"),
    ({"epochs": 10}, OptionError, "epochs is 10"),
    ({"search_lr": True}, OptionError, "those of lrs"),
    ({"lr": 1e-3}, OptionError, "those of lrs"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_refusals_before_training(
    options: dict[str, Any], kind: type[DGMError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "compare", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(kind, match=message):
        sensitivity(None, GUIDES, None, **options)


def test_a_step_size_that_does_not_learn_loses() -> None:
    def model(x: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    x = 5 + torch.randn(60, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    found = sensitivity(
        model, {"normal": lambda model, x: AutoNormal(model)}, x, lrs=[1e-6, 0.1], epochs=[40], seeds=2, num_samples=100
    )
    assert torch.equal(before, torch.get_rng_state())
    row = found.table.iloc[0]
    assert row["best"] == "lr 0.1" and row["lost"] > 1.0
    assert found.meta["elapsed_seconds"] > 0 and not found.meta["interrupted"]
