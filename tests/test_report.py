"""The report: what it says is what the comparison found, it loads nothing, and no name in it can do harm."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits

import dgm
from dgm import plots
from dgm.errors import DataError, OptionError
from dgm.guides import attached
from dgm.ranking import statement
from dgm.report import format_table, render, verdict, write_report
from dgm.style import COLOURS, svg

EVIL = "<script>alert('x')</script> & \"q\" $x$ _1"


def comparison(names: tuple[str, ...] = ("full normal", "flow", "diagonal"), **changes: Any) -> SimpleNamespace:
    """Three guides, two seeds: the second ties with the first, the third is behind."""
    rng = np.random.default_rng(0)
    bounds = [-20.31, -20.35, -20.92, -21.5, -22.0, -23.0, -24.0][: len(names)]
    steps = np.arange(1, 21)
    rows, history = [], []
    for name, bound in zip(names, bounds, strict=True):
        for seed in range(2):
            rows.append({"guide": name, "seed": seed, "bound": bound, "evaluations": 300_000, "seconds": 9.0})
            curve = bound - 30 * np.exp(-steps / 4) + rng.normal(0, 0.1, 20)
            part = {"guide": name, "seed": seed, "step": steps, "evaluations": 100 * steps, "elbo": curve}
            history.append(pd.DataFrame({**part, "valid_elbo": np.nan}))
    table = pd.DataFrame(
        {
            "bound": bounds,
            "bound_se": 0.12,
            "difference": np.array(bounds) - bounds[0],
            "difference_se": [0.0, 0.03, *[0.04] * 5][: len(names)],
            "tie": [True, True, *[False] * 5][: len(names)],
            "khat_bad": 0.04,
            "evaluations": 300_000,
            "seconds": [9.0, 21.0, 8.0, 7.0, 6.0, 5.0, 4.0][: len(names)],
        },
        index=pd.Index(names, name="guide"),
    )
    digits = load_digits().images[:12] / 16.0
    picture = {"data": digits, "reconstructions": digits, "samples": digits[::-1]}
    result = SimpleNamespace(
        rows=pd.DataFrame(rows).assign(status="ok"),
        table=table,
        history=pd.concat(history, ignore_index=True),
        khat={name: rng.normal(0.3, 0.2, 100) for name in names},
        k_threshold=0.7,
        pictures=dict.fromkeys(names, picture),
        meta={"title": "VAE on digits", "mode": "joint training", "train_size": 1437, "test_size": 360, "K": 1000},
    )

    def said() -> str:
        """The real sentences, of scores that lie about the rows' bounds."""
        rows = result.rows if "status" in result.rows else result.rows.assign(status="ok")
        done = rows[rows["status"] == "ok"]
        scores = {
            str(g): part["bound"].to_numpy()[:, None] + np.random.default_rng(1).normal(0, 1, (len(part), 100))
            for g, part in done.groupby("guide")
        }
        return statement(rows, scores)

    result.statement = said
    vars(result).update(changes)
    return result


def bare(**changes: Any) -> SimpleNamespace:
    """A comparison that has nothing to draw."""
    result = comparison(**{"pictures": {}, "khat": {}, "history": pd.DataFrame(), **changes})
    result.table = result.table.drop(columns="seconds")
    return result


class Reader(HTMLParser):
    """Collects tags and text, and checks that the elements are nested as they should be."""

    void = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def said(self) -> str:
        return " ".join("".join(self.text).split())


def test_text_table_has_the_promised_form() -> None:
    result = comparison()
    text = format_table(result.table, result.meta)
    assert text == (
        "VAE on digits · 1437 train, 360 test · joint training, K = 1000, nats\n"
        "guide             bound       difference to best   k-hat > 0.7   evaluations   seconds\n"
        "full normal   -20.31 ± 0.12        ·                   4 %          300 k         9\n"
        "flow          -20.35 ± 0.12   -0.04 ± 0.03 (tie)       4 %          300 k        21\n"
        "diagonal      -20.92 ± 0.12   -0.61 ± 0.04             4 %          300 k         8"
    )


def test_text_table_lets_no_name_command_the_terminal() -> None:
    names = ("a\x1b[2Jb\nc", "x" * 200)
    text = format_table(comparison(names).table, {})
    assert "\x1b" not in text and len(text.splitlines()) == 4
    assert max(map(len, text.splitlines())) < 140


def test_supervised_table() -> None:
    scores = {"log_likelihood": [-2.4, -2.5], "log_likelihood_se": 0.06, "difference": [0, -0.1], "difference_se": 0.02}
    frame = pd.DataFrame({**scores, "rmse": [2.9, 3.1], "rmse_se": 0.2, "coverage95": [0.93, 0.8]}, index=["a", "b"])
    lines = format_table(frame, {"score": "log_likelihood"}).splitlines()
    assert re.split(r"\s{2,}", lines[1]) == ["guide", "log-likelihood", "difference to best", "RMSE", "95 % covers"]
    assert re.split(r"\s{2,}", lines[3]) == ["b", "-2.50 ± 0.06", "-0.10 ± 0.02", "3.10 ± 0.20", "80.0 %"]


@pytest.mark.parametrize(
    "names, sentence",
    [
        (
            ("a", "b", "c"),
            "a is best; b ties with it (difference 0.04 ± 0.03 nats). Next comes c, 0.61 ± 0.04 nats behind.",
        ),
        (("a", "b"), "a is best; b ties with it (difference 0.04 ± 0.03 nats)."),
        (("a",), "a reaches -20.31 ± 0.12 nats; no other guide finished to be compared with it."),
    ],
)
def test_verdict(names: tuple[str, ...], sentence: str) -> None:
    assert " ".join(verdict(comparison(names).table, {}).striptags().split()) == sentence


def test_verdict_counts_ties_that_are_many() -> None:
    names = ["best", *(f"g{i}" for i in range(7))]
    gaps = [0.0, *(-0.01 * i for i in range(1, 8))]
    frame = pd.DataFrame({"bound": gaps, "difference": gaps, "difference_se": [0.0] + [0.1] * 7, "tie": True}, names)
    said = " ".join(verdict(frame, {}).striptags().split())
    assert said == "best is best; 7 others tie with it (differences up to 0.1 ± 0.1 nats)."


def test_verdict_without_ties_several_ties_and_nothing_finished() -> None:
    table = comparison().table

    def said(frame: pd.DataFrame) -> str:
        return " ".join(verdict(frame, {}).striptags().split())

    assert said(table.assign(tie=False)) == "full normal is best, ahead of flow by 0.04 ± 0.03 nats."
    assert "flow and diagonal tie with it (differences 0.04 ± 0.03 and 0.61 ± 0.04 nats)" in said(
        table.assign(tie=True)
    )
    assert "No guide finished" in said(table.assign(bound=np.nan))
    assert "No guide finished" in said(table.iloc[:0])


def test_page_loads_nothing_and_is_well_formed() -> None:
    page = render(comparison())
    reader = Reader(page)
    assert "://" not in page and "@import" not in page
    for tag, attributes in reader.tags:
        assert tag not in ("link", "script", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
        assert not any(name.startswith("on") for name in attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["href"] for _, a in reader.tags if (a.get("href") or "").startswith("#")}
    assert used <= {f"#{i}" for i in ids}


def test_every_name_and_error_is_escaped() -> None:
    result = comparison((EVIL, "b", "c"))
    result.rows.loc[5, "status"] = "TrainingError: <img src=x onerror=alert(1)>"
    result.meta |= {"title": EVIL, "command": EVIL, "protocol": [EVIL], "versions": {EVIL: EVIL}}
    page = render(result)
    reader = Reader(page)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    # title twice, verdict, statement, ranking, curves, cost, k-hat, images, two runs, command, protocol, versions twice
    assert reader.said().count("<script>alert('x')") == 15
    assert "<img src=x onerror=alert(1)>" in reader.said()


def test_failed_runs_are_named_and_a_guide_without_any_success_is_not_lost() -> None:
    result = comparison()
    result.rows.loc[result.rows["guide"] == "flow", ["status", "bound"]] = ["GuideError: no gradient", np.nan]
    result.table = result.table.drop(index="flow")
    said = Reader(render(result)).said()
    assert "2 of 6 runs failed" in said
    assert "flow 0, 1 GuideError: no gradient".replace(" ", "") in said.replace(" ", "")
    assert "failed: flow, seeds 0, 1: GuideError: no gradient" in format_table(result.table, result.meta, result.rows)
    assert "–" in format_table(comparison().table.assign(bound=[-1.0, -2.0, np.nan]), {})


def test_weaknesses_are_said() -> None:
    result = bare()
    result.table = result.table.assign(khat_bad=0.3, search_evaluations=[0, 40_000, 0])
    result.rows = result.rows.assign(notes=["", "", "a point has no density", "a point has no density", "", ""])
    result.meta |= {"interrupted": True}
    said = Reader(render(result)).said()
    assert "k-hat is above 0.7 for 30 % of held-out data" in said
    assert "It was interrupted" in said and "in search" in said
    assert said.count("flow: a point has no density.") == 1
    result.meta |= {"score": "log_likelihood"}
    result.table = result.table.rename(columns={"bound": "log_likelihood", "bound_se": "log_likelihood_se"})
    assert "In 30 % of its runs k-hat" in Reader(render(result)).said()
    result.rows = result.rows[result.rows["seed"] == 0]
    said = Reader(render(result)).said()
    assert "With one seed" in said and " ".join(result.statement().split()) in said


def test_everything_failed() -> None:
    result = bare()
    result.rows = result.rows.assign(status="TrainingError: NaN", bound=np.nan)
    result.table = result.table.iloc[:0]
    said = Reader(render(result)).said()
    assert "No guide finished" in said and "6 of 6 runs failed" in said


def test_optional_parts_may_be_missing() -> None:
    result = comparison(pictures={}, khat={}, history=pd.DataFrame(columns=["guide", "seed", "evaluations"]), meta={})
    result.table = result.table[["bound"]]
    result.rows = result.rows[["guide", "seed", "bound"]]
    page = render(result)
    Reader(page)
    assert "<svg" not in page and "k-hat" not in Reader(page).said()


def test_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(bare(), tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    path.write_text("old")

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dgm.report.os.replace", broken)
    with pytest.raises(OptionError, match="No space left"):
        write_report(bare(), path)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot write"):
        write_report(bare(), tmp_path / "file" / "report.html")
    with pytest.raises(OptionError, match="cannot write"):
        write_report(bare(), tmp_path)


def test_an_early_explosion_does_not_flatten_the_curves() -> None:
    history = comparison().history
    history.loc[history["step"] <= 2, "elbo"] = -1e9
    low, high = plots.training_curves(history).axes[0].get_ylim()
    assert -60 < low < -21 and -20.5 < high < -15


def test_a_lost_guide_does_not_flatten_the_others() -> None:
    table = comparison().table
    table.loc["diagonal", "bound"] = -1e6
    low, high = plots.bound_against_cost(table).axes[0].get_ylim()
    assert -25 < low < high < -20


def test_khat_that_is_infinite_or_missing_counts_as_bad() -> None:
    figure = plots.khat_distribution({"g": np.array([-np.inf, 0.1, np.inf, np.nan])}, 0.7)
    assert "50 %" in [text.get_text() for text in figure.axes[0].texts]
    assert sum(patch.get_height() > 0 for patch in figure.axes[0].patches) == 3


def test_labels_are_kept_apart_and_in_their_order() -> None:
    heights = [0.5, 0.51, 0.49, 0.99, 1.0, -3.0]
    placed = plots._spread(heights, 0.07)
    assert np.array_equal(np.argsort(placed), np.argsort(heights))
    assert np.diff(np.sort(placed)).min() > 0.07 - 1e-9
    assert min(placed) >= 0 and max(placed) <= 1 + 1e-9
    crowd = plots._spread([0.5] * 40, 0.07)
    assert min(crowd) >= -1e-9 and max(crowd) <= 1 + 1e-9


def test_predictions_over_a_line_and_over_a_plane() -> None:
    line = np.linspace(-1, 1, 9)
    band = {"x": line, "y": line, "grid": line, "mean": line, "lower": line - 1, "upper": line + 1}
    plane = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    moons = {"x": plane[:4], "y": np.array([0, 1, 0, 1]), "grid": plane, "mean": 1 / (1 + np.exp(-plane[:, 0]))}
    for part, caption in ((band, "central interval"), (moons, "Predicted probability")):
        result = bare(pictures={"flow": part, "full normal": part})
        assert caption in Reader(render(result)).said()


@pytest.mark.parametrize(
    "draw", ["training_curves", "bound_against_cost", "khat_distribution", "images", "predictive_band"]
)
def test_nothing_to_draw_is_an_error_that_says_so(draw: str) -> None:
    frame = pd.DataFrame({"guide": ["g"], "seed": [0], "evaluations": [1], "elbo": [np.nan], "bound": [np.nan]})
    arguments = {"training_curves": (frame,), "bound_against_cost": (frame,), "khat_distribution": ({}, 0.7)}
    with pytest.raises(DataError, match="expected"):
        getattr(plots, draw)(*arguments.get(draw, ({},)))


def test_same_comparison_same_page_however_matplotlib_is_set() -> None:
    page = render(comparison())
    with matplotlib.rc_context(
        {"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}
    ):
        before = dict(matplotlib.rcParams)
        assert render(comparison()) == page
        assert dict(matplotlib.rcParams) == before


def test_pictures_wear_the_colours_of_the_page() -> None:
    result = comparison()
    text = svg(plots.training_curves(result.history), "curves")
    assert "currentColor" in text and "var(--g0, #0072b2)" in text
    colours = set(re.findall(r"#[0-9a-f]{6}\b", text))
    assert colours <= set(COLOURS)  # no black text that would vanish on a dark page
    assert ">full normal<" in text  # letters, not outlines


def test_more_guides_than_colours_are_told_apart() -> None:
    names = tuple("abcdefg")
    axes = plots.bound_against_cost(comparison(names).table).axes[0]
    looks = {(str(line.get_color()), line.get_marker()) for line in axes.lines if line.get_marker() not in ("None", "")}
    assert len(looks) >= len(names)


def test_rows_of_a_model_with_both_kinds_of_latents_are_called_rows() -> None:
    def model(x: torch.Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = dgm.compare(model, attached(["diagonal-normal"]), torch.randn(20), seeds=1, epochs=1, num_samples=100)
    assert result.meta["khat_of"] == "row" and len(result.khat["diagonal-normal"]) == 4
    page = render(result)
    assert "k-hat of each held-out datum" in page and "k-hat of each run" not in page
