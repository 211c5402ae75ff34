"""Published numbers and the checker, ranked tables, reports that are composed anew from committed rows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dgm.bench import run_suite
from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_compose import compose
from dgm.bench_registry import TAGS, Published, check, means_of, published
from dgm.bench_report import Report, make_report, write_report
from dgm.bench_results import Results
from dgm.bench_tables import Table, markdown, ranked, task_table
from dgm.benchmarks import exact, exact_truth
from dgm.errors import DataError

RMSE = Metric("rmse", "lower", "RMSE", "of the mean")


def suite(metric: Metric = RMSE, name: str = "uci", **more: Any) -> Suite:
    return Suite(name, lambda budget: [Cell("uci-yacht", "g")], print, [metric], repeats="split", **more)


def results(scores: dict[str, list[float]], metric: Metric = RMSE, **more: Any) -> Results:
    rows = [
        {"key": f"{g}{k}", "task": "uci-yacht", "guide": g, "split": k, "status": "ok", metric.name: v}
        for g, values in scores.items()
        for k, v in enumerate(values)
    ]
    costs = pd.DataFrame({"key": [r["key"] for r in rows], "job_cpu_seconds": 1.0, "commit": "abc", "date": "today"})
    plan = {"suite": "uci", "budget": "smoke", "filter": [], "protocol": 1, "about": {"command": "dgm bench run"}}
    return Results(suite(metric, **more), pd.DataFrame(rows), costs, plan)


# ----------------------------------------------------------------------------------------------- published numbers


def test_the_registry_holds_numbers_that_may_be_printed() -> None:
    everything = published()
    assert len(everything) > 200 and {p.tag for p in everything} <= set(TAGS)
    for one in everything:
        assert one.source and one.protocol and one.unit and math.isfinite(one.value)
        assert (one.error is None) or one.kind in ("standard error", "standard deviation")
        assert one.better == ("higher" if one.metric == "log_likelihood" else "lower")
    places = [(p.suite, p.task, p.metric, p.method, p.source) for p in everything]
    assert len(set(places)) == len(places)


def test_spot_checks_of_transcription() -> None:
    """One number of each table, and what its error is."""
    found = {(p.task, p.metric, p.method): p for p in published()}
    assert str(found["uci-protein", "rmse", "deep ensemble"]) == "4.71 ± 0.06 (sd)"
    assert found["uci-protein", "rmse", "deep ensemble"].standard_error == pytest.approx(0.06 / 5**0.5)
    assert found["uci-boston", "rmse", "deep ensemble"].standard_error == pytest.approx(1.0 / 20**0.5)
    assert found["uci-energy", "rmse", "MC dropout, 10x epochs"].standard_error == 0.05
    assert found["uci-naval", "log_likelihood", "VMG"].tag == "S"
    assert found["mnist", "nll", "IWAE, 2 layers, K=50"].value == 82.90
    assert found["omniglot", "nll", "VAE, 1 layer, K=50"].value == 107.80
    assert found["binarized-mnist", "nll", "IWAE, 2 layers, K=50"].value == 85.32


def entry(**other: Any) -> dict[str, Any]:
    row = {
        "suite": "s", "metric": "rmse", "better": "lower", "unit": "u", "method": "m", "guides": ["g"], "source": "x",
        "protocol": "p", "tag": "V", "error_kind": "standard error", "repeats": 20, "decimals": 2,
        "values": {"t": [1.0, 0.1]},
    }  # fmt: skip
    return {**row, **other}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "U"}, "its tag is 'U'"),
        ({"error_kind": "spread"}, "of the kind 'spread'"),
        ({"error_kind": None}, "an error without its kind"),
        ({"values": {"t": ["much"]}}, "misshapen"),
        ({"source": None, "decimals": "x"}, "misshapen"),
    ],
)
def test_the_registry_refuses(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "published.json"
    file.write_text(json.dumps({"rows": [entry(**change)]}))
    with pytest.raises(DataError, match=message):
        published(path=file)
    file.write_text(json.dumps({"rows": [entry()]}))
    assert [str(p) for p in published("s", file)] == ["1.00 ± 0.10"] and published("other", file) == []
    file.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        published(path=file)


def one(value: float, better: str, **more: Any) -> Published:
    base = dict(suite="s", task="t", metric="m", method="theirs", unit="", source="x", protocol="p", tag="V")
    return Published(value=value, better=better, guides=("g",), **{**base, **more})  # type: ignore[arg-type]


def verdict(ours: list[float], number: Published) -> tuple[str, float]:
    rows = pd.DataFrame({"task": "t", "guide": "g", "status": "ok", "m": ours})
    row = check(rows, "s", [Metric("m")], [number]).iloc[0]
    return row["verdict"], row["tolerance"]


def test_the_checker_says_agree_beat_or_miss() -> None:
    ours = [0.9, 1.1]  # mean 1, standard error 0.1
    number = dict(error=0.3, kind="standard error")
    word, tolerance = verdict(ours, one(1.5, "lower", **number))
    assert word == "agree" and tolerance == pytest.approx(2 * math.hypot(0.1, 0.3) + 0.005)
    words = {(2.0, "lower"): "beat", (2.0, "higher"): "miss", (0.1, "lower"): "miss", (0.1, "higher"): "beat"}
    for (value, better), expected in words.items():
        assert verdict(ours, one(value, better, **number))[0] == expected
    deviation = one(1.5, "lower", error=0.3, kind="standard deviation", repeats=9)
    assert verdict(ours, deviation)[1] == pytest.approx(2 * math.hypot(0.1, 0.1) + 0.005)
    assert verdict(ours, deviation)[0] == "beat"  # a deviation taken for a standard error would hide it
    assert verdict(ours, one(1.5, "lower", tolerance=0.6))[0] == "agree"
    assert verdict([1.004], one(1.0, "lower"))[0] == "agree" and verdict([1.006], one(1.0, "lower"))[0] == "miss"


def test_means_leave_failed_rows_out() -> None:
    rows = pd.DataFrame({"task": "t", "guide": "g", "status": ["ok", "ok", "broken"], "rmse": [1.0, 2.0, np.nan]})
    assert means_of(rows, ["rmse", "other"])[["value", "se", "repeats"]].values.tolist() == [[1.5, 0.5, 2]]


# ------------------------------------------------------------------------------------------------------- tables


def test_ranks_pair_the_splits() -> None:
    """Splits differ by 3, guides by 0.1: paired, the order is certain; with the pairs broken it is not."""
    splits = [1.0, 4.0, 2.0, 7.0, 3.0, 5.0]
    better = [s + e for s, e in zip(splits, (0.0, 0.01, -0.01, 0.02, 0.0, 0.01), strict=True)]
    worse = [s + 0.1 for s in splits]
    table = ranked(results({"worse": worse, "better": better}), "uci-yacht")
    assert list(table.index) == ["better", "worse"] and list(table["rank_low"]) == [1, 2] and not table["tie"].any()
    assert table["difference"]["worse"] == pytest.approx(0.1 - 0.005)
    broken = ranked(results({"worse": worse[::-1], "better": better}), "uci-yacht")
    assert broken["tie"]["worse"]
    turned = ranked(results({"worse": worse, "better": better}, Metric("acc", "higher")), "uci-yacht")
    assert list(turned.index) == ["worse", "better"]


def test_a_table_has_published_rows_and_ties() -> None:
    numbers = [p for p in published("uci") if p.method in ("PBP", "MC dropout, 10x epochs")]
    table = task_table(results({"g": [0.5, 0.9, 0.6], "h": [0.7, 0.6, 0.8]}), "uci-yacht", numbers)
    assert table.heads == ["guide", "rank", "RMSE", "difference to best", "CPU s"]
    assert [row[0] for row in table.rows] == ["g", "h", "published: PBP [V]", "published: MC dropout, 10x epochs [V]"]
    assert table.rows[2][2] == "1.02 ± 0.05" and "(tie)" in table.rows[0][3] + table.rows[1][3]
    single = task_table(results({"g": [0.5], "h": [0.7]}), "uci-yacht", [])
    assert single.heads == ["guide", "RMSE", "CPU s"]  # one split has no errors, and no ranks
    assert "\\|" in markdown(Table("t", "", ["a"], [["x|y"]]))


DATA = '''
"""One seed, and the score of each datum."""
import torch
from dgm.bench_cells import Cell, Metric, Suite


def run(cell):
    shared = torch.arange(200.0)
    noise = 0.1 * torch.randn(200)
    each = -shared - (1.0 if cell.guide == "worse" else 0.0) + noise
    return {"score": float(each.mean()), "per_datum": each}


SUITE = Suite("single", lambda budget: [Cell("t", g) for g in ("worse", "<b>better")], run, [Metric("score", "higher")])
'''


def test_a_report_from_rows_alone_is_the_same(tmp_path: Path) -> None:
    """Ranks by pairs of data need arrays, which are not committed: the ranks are."""
    file = tmp_path / "single.py"
    file.write_text(DATA)
    run_suite(str(file), tmp_path / "run", budget="smoke", progress=False)
    report = make_report(tmp_path / "run")
    assert list(ranked(report.results, "t")["rank_low"]) == [1, 2]
    page = write_report(report, tmp_path / "results" / "single").read_text()
    assert "<b>better" not in page and "&lt;b&gt;better" in page and "http" not in page.replace("http-equiv", "")
    again = make_report(tmp_path / "results" / "single")
    assert again.results.folder is None and again.markdown() == report.markdown()
    assert (
        write_report(again, tmp_path / "third").parent.joinpath("rows.csv").read_bytes()
        == (tmp_path / "results" / "single" / "rows.csv").read_bytes()
    )
    with pytest.raises(DataError, match="holds no folder"):
        compose(tmp_path / "run")
    whole = compose(tmp_path / "results")
    assert whole.endswith("## Corrections\n\nNone so far.\n") and report.brief("single") in whole
    assert "| [single](single/report.md) | smoke | 2 of 2 | 0 | – | – |" in whole
    for name in re.findall(r"\]\((single/[^)]+)\)", whole):
        assert (tmp_path / "results" / name).is_file()
    assert "* command: `" in whole and "* hardware: " in whole and "* commit: " in whole
    (tmp_path / "results" / "CORRECTIONS.md").write_text("* 2026-01-01: a row.\n")
    assert "* 2026-01-01: a row." in compose(tmp_path / "results")


def test_a_report_says_what_is_outside() -> None:
    frame = pd.DataFrame([{"task": "t", "guide": "g", "metric": "m", "verdict": v} for v in ("agree", "miss")])
    report = Report(results({"dropout": [0.5, 0.6]}, checks=lambda found: frame))
    assert len(report.missed) == 1 and report.verdicts()[0]["says"].startswith("1 of 2 numbers")
    assert list(report.checks["verdict"]) == ["miss", "agree"]  # what does not hold comes first
    assert "### Outside their tolerance\n\n| task | guide | metric | verdict |" in report.brief("x")
    assert report.verdicts()[0]["level"] == "bad"
    text = report.markdown()
    assert "| uci-yacht | dropout | rmse | 0.55 ± 0.05 | MC dropout [V] | 1.11 ± 0.09 |" in text
    assert "`dgm bench run`" in text and "Gal and Ghahramani" in text and "commit: abc" in text
    assert [name for name, *_ in report.figures()] == ["scores"]


PICTURES = '''
"""A story with a picture that needs arrays."""
import torch
from matplotlib.figure import Figure
from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_story import Chapter


def run(cell):
    return {"score": 1.0, "curve": torch.arange(5.0)}


def drawn(results, name):
    arrays = [results.arrays(k).get("curve") for k in results.rows["key"]]
    figure = Figure(figsize=(3.0, 2.0))
    figure.subplots().plot(arrays[0] if arrays[0] is not None else [])
    return [(name, "A curve", "It <rises>.", figure)] if arrays[0] is not None else []


def story(results):
    return [Chapter("First", [("what", "a line")], None, drawn(results, "line"))]


SUITE = Suite("drawn", lambda budget: [Cell("t", "g")], run, [Metric("score")], story=story,
              figures=lambda results: drawn(results, "own"))
'''


def test_pictures_stay_where_arrays_are_not_kept(tmp_path: Path) -> None:
    """Written beside the rows that are committed, and found again there: reports made anew lose none."""
    file = tmp_path / "drawn.py"
    file.write_text(PICTURES)
    run_suite(str(file), tmp_path / "run", budget="smoke", progress=False)
    place = tmp_path / "results" / "drawn"
    report = make_report(tmp_path / "run")
    write_report(report, place)
    assert not list(place.glob("*.safetensors")) and not (place / "cells").exists()
    before = {p.name: p.read_bytes() for p in place.glob("*.png")}
    assert set(before) == {"line.png", "own.png"}
    again = make_report(place)
    assert again.markdown() == report.markdown() and "![A curve: It &lt;rises>.](line.png)" in again.markdown()
    page = write_report(again, place)  # over itself
    assert {p.name: p.read_bytes() for p in place.glob("*.png")} == before
    assert page.read_text().count("<svg") == report.html().count("<svg") == 3  # the scores as well
    third = write_report(again, tmp_path / "third").parent
    assert (third / "line.png").read_bytes() == before["line.png"]
    (place / "line.png").unlink()
    with pytest.raises(DataError, match=r"pictures of .* cannot be read \(pictures.json\)"):
        make_report(place)


def test_long_tables_are_folded_and_words_stand_to_the_left() -> None:
    table = Table("T", "", ["a", "n", "b"], [["x", "1.5 ± 0.1 (tie)", "full-normal"]] * 31)
    text = markdown(table)
    assert "### T\n\n<details><summary>31 rows</summary>\n\n| a |" in text and text.endswith("|\n\n</details>")
    assert table.words == [0, 2]
    assert "details" not in markdown(Table("T", "", ["a"], [["x"]] * 30))


# ---------------------------------------------------------------------------------------------------------- exact


def test_the_conjugate_evidence_by_quadrature() -> None:
    truth = exact_truth.conjugate()
    x, heads, counts = truth.batch

    def integral(log_density: Any, low: float, high: float) -> float:
        grid = torch.linspace(low, high, 200_001, dtype=torch.float64)[1:-1]
        return float(torch.logsumexp(log_density(grid), 0) + (grid[1] - grid[0]).log())

    def normal(m: torch.Tensor) -> torch.Tensor:
        d = torch.distributions.Normal
        return d(0.0, 1.0).log_prob(m) + d(m[:, None], 1.0).log_prob(x).sum(1)

    def beta(p: torch.Tensor) -> torch.Tensor:
        prior = torch.distributions.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
        return prior.log_prob(p) + heads.sum() * p.log() + (len(x) - heads.sum()) * (1 - p).log()

    def gamma(r: torch.Tensor) -> torch.Tensor:
        prior = torch.distributions.Gamma(torch.tensor(3.0).double(), torch.tensor(2.0).double())
        return prior.log_prob(r) + torch.distributions.Poisson(r[:, None]).log_prob(counts).sum(1)

    total = integral(normal, -6, 6) + integral(beta, 0, 1) + integral(gamma, 0, 12)
    assert total == pytest.approx(truth.log_evidence, abs=1e-5)


def test_the_radial_excess_by_draws() -> None:
    for d in (2, 4):
        generator = torch.Generator().manual_seed(0)
        eps = torch.randn(200_000, d, generator=generator, dtype=torch.float64)
        r = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
        z = d**0.5 * r * eps / eps.norm(dim=1, keepdim=True)
        u = (z / d**0.5).norm(dim=1)
        area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        log_q = (
            math.log(2) - 0.5 * math.log(2 * math.pi) - u.square() / 2 - area - (d - 1) * u.log() - d / 2 * math.log(d)
        )
        log_p = -0.5 * z.square().sum(1) - d / 2 * math.log(2 * math.pi)
        each = log_q - log_p
        z_score = (float(each.mean()) - exact_truth.radial_excess(d)) / float(each.std() / 200_000**0.5)
        assert abs(z_score) < 4.5


def test_a_cell_of_the_exact_suite_and_its_mutant() -> None:
    cells = [c for c in exact.cells("smoke") if c.task == "linear regression" and c.guide == "diagonal-normal"]
    row = exact.run(cells)[0]
    assert row["expected_low"] == row["expected_high"] > 0.1
    whole = {"key": "k", **cells[0].values("seed"), "status": "ok", **row}

    def missed(**change: float) -> list[str]:
        frame = pd.DataFrame([{**whole, **change}])
        found = exact.checks(Results(exact.SUITE, frame, pd.DataFrame(), {}))
        return list(found[found["verdict"] != "agree"]["metric"])

    assert missed() == []
    assert missed(expected_low=row["expected_low"] * 3, expected_high=row["expected_high"] * 3) == ["gap"]
    assert missed(bound_error=row["bound_error"] + 0.5, khat=0.0) == ["bound_error"]


def test_budgets_of_the_exact_suite() -> None:
    """Every family of the suite is in the smallest budget, and every budget can be planned."""
    smoke = {c.guide for c in exact.cells("smoke")}
    assert set(exact.FAMILIES) | set(exact.ESTIMATORS) <= smoke
    assert len(exact.cells("smoke")) < len(exact.cells("short")) < len(exact.cells("full"))


def test_budgets_of_uci_and_posteriordb() -> None:
    from dgm.benchmarks import posteriordb, uci

    short = uci.cells("short")
    assert {c.task.removeprefix("uci-") for c in short} == set(uci.EPOCHS) and len(set(uci.EPOCHS)) == 9
    splits = {name: len([c for c in short if c.task == f"uci-{name}" and c.guide == "point"]) for name in uci.EPOCHS}
    assert all(count == (5 if name in uci.LARGE else 20) for name, count in splits.items())
    assert len({c.guide for c in short}) >= 8 and all(uci.guide_of(name) is not None for name in uci.GUIDES)
    assert {p.task for p in published("uci")} == {c.task for c in short}
    assert all(uci.seconds(cell) > 0 for cell in short)
    wanted = {c.task for c in posteriordb.cells("short")}
    assert len(wanted) == 16 and len(posteriordb.cells("smoke")) == 6
