"""The speed benchmark: rivals train, the same model has the same loss, figures become targets, tables, pictures."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dgm.bench import run_suite
from dgm.bench_cells import jobs_of
from dgm.bench_code import reached
from dgm.bench_report import Report
from dgm.bench_results import Results
from dgm.benchmarks import __main__ as suites
from dgm.benchmarks import speed, speed_dgm, speed_report, speed_torch, speed_worker
from dgm.benchmarks.speed_cases import CASES, SCALING, Case, find_case
from dgm.errors import OptionError, TrainingError

SMALL = {
    "vae": replace(CASES["vae20"], batch=4, rows=40, latent=3),
    "bnn": replace(CASES["bnn32x20"], replicas=2, batch=4, rows=40),
}
TRIED = {
    "vae": ("pyro", "by hand", "dgm trace"),
    "bnn": ("pyro, same pair", "by hand, vmapped", "dgm trace"),
}


def two_steps(case: Case, names: Collection[str]) -> None:
    """Two rounds of two steps of these candidates: all train, and their figures are of that many replicas."""
    chosen = {n: replace(c, chunk=2) for n, c in speed_worker.candidates(case).items() if n in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rivals
        result = speed_worker.measure(case, chosen, rounds=2, seconds=0.0, steps=2)
    assert not result["skipped"]
    assert set(result["candidates"]) == set(chosen) != set()
    for name, figures in result["candidates"].items():
        assert len(figures["cpu_ms"]["values"]) == 2, name
        assert 0 < figures["cpu_ms"]["min"] <= figures["cpu_ms"]["median"] <= figures["cpu_ms"]["max"], name
        assert figures["replicas"] == (case.replicas if chosen[name].stacked else 1), name
        assert math.isfinite(figures["last_loss"]), name


@pytest.mark.parametrize("kind", SMALL)
def test_two_steps_of_the_rivals(kind: str) -> None:
    two_steps(SMALL[kind], TRIED[kind])


@pytest.mark.slow  # a minute, nearly all of it XLA compiling
@pytest.mark.parametrize("kind", SMALL)
def test_two_steps_of_numpyro(kind: str) -> None:
    pytest.importorskip("numpyro")
    pytest.importorskip("optax")
    two_steps(SMALL[kind], ("numpyro jit", "numpyro scan"))


def hand_loss(case: Case, noise: list[torch.Tensor]) -> float:
    """The loss by hand of the parameters and noise of dgm's pair."""
    _, guide = case.pair()
    hand: Any = speed_torch.hand_module(case)
    family = guide.global_.family
    with torch.no_grad():
        hand.loc.copy_(family.loc.bias)
        hand.log_scale.copy_(family.log_scale.bias)
        return float(hand(*(t[: case.batch] for t in case.data), noise[0].reshape(-1)))


def test_the_bnn_by_hand_is_the_bnn_of_dgm() -> None:
    """Same parameters and noise, same loss: what is timed does the same work. Relative tolerance 1e-5, float32 sums."""
    from dgm.noise import recording

    case = replace(CASES["bnn32"], batch=8, rows=40)
    svi = speed_dgm.make_svi(case, False)
    batch = tuple(t[:8] for t in case.data)
    with recording() as draws:
        svi.pair.loss(None, batch, sizes={"data": case.rows})
    noise = draws.sample()
    ours = float(svi.pair.loss(None, batch, noise, sizes={"data": case.rows}).detach())
    assert hand_loss(case, noise) == pytest.approx(ours, rel=1e-5)


def test_a_figure_has_the_name_of_the_mode_that_ran() -> None:
    class Ran:
        fallback: str | None = "site 'z'"
        uncompiled: str | None = None

    with pytest.raises(TrainingError, match="not trace: site 'z'"):
        speed_dgm._check_mode(Ran(), "trace")
    speed_dgm._check_mode(Ran(), False)


def a_run(**change: Any) -> Results:
    """Rows as the suite gives them: two rounds of one case, what grows, a first step, and a comparison."""
    cells = [c for c in speed.cells("full") if c.repeat < 3 and c.task in TASKS]
    medians = {"pyro": 8.0, "by hand": 2.0, "numpyro scan": 2.0, "dgm inductor": 1.8, **change}
    rows: list[dict[str, Any]] = []
    for cell in cells:
        row: dict[str, Any] = {"key": str(len(rows)), **cell.values("round"), "threads_used": 2, "status": "ok"}
        row |= {"busy": 0.5, "rivals": "no numpyro"}
        if cell.settings["part"] in ("cases", "scaling"):
            if cell.guide not in medians:
                row["status"] = "OptionError: no"
            value = medians.get(cell.guide, math.nan) * (1.0, 9.0 if cell.guide == "pyro" else 3.0, 0.5)[cell.repeat]
            row |= {"cpu_ms": value, "wall_ms": value, "last_loss": 1.0}
        elif cell.settings["part"] == "first":
            row |= {"first_step_s": {"dgm inductor, second process": 7.0}.get(cell.guide, 0.5), "memory_peak_mib": 9.0}
        else:
            row |= {"wall_s": 1.0 if cell.guide == "dgm compare" else 30.0, "cells": 160, "steps_a_cell": 3000}
        rows.append(row)
    plan = {"suite": "speed", "budget": "short", "filter": [], "protocol": 1}
    return Results(speed.SUITE, pd.DataFrame(rows), pd.DataFrame(), plan)


TASKS = ("vae20, all threads", "replicas-5, all threads", "replicas-50, all threads", "vae20, first step",
         "compare, end to end")  # fmt: skip


def test_targets_are_ratios_of_medians_to_the_fastest_rival() -> None:
    found = speed.checks(a_run())
    rows = {(row["guide"], row["metric"].partition(" of ")[0]): row for row in found.to_dict("records")}
    hand = rows["dgm inductor", "CPU time against PyTorch by hand"]
    assert hand["value"] == pytest.approx(0.9) and hand["verdict"] == "miss" and hand["expected"] == "at most 0.80"
    best = rows["dgm inductor", "CPU time against NumPyro's best"]
    assert best["verdict"] == "agree" and best["fastest of them"] == "numpyro scan"
    assert rows["dgm trace", "first step, seconds"]["verdict"] == "agree"
    assert rows["dgm inductor, second process", "first step, seconds"]["verdict"] == "miss"
    assert rows["dgm compare", "wall time"]["value"] == pytest.approx(1 / 30) and len(rows) == len(found) == 6
    faster = speed.checks(a_run(**{"dgm inductor": 1.5}))
    assert faster["verdict"].tolist().count("miss") == found["verdict"].tolist().count("miss") - 1


def test_a_smoke_run_is_held_against_nothing() -> None:
    run = a_run()
    assert speed.checks(replace(run, plan={**run.plan, "budget": "smoke"})).empty


def test_the_report_of_measured_times() -> None:
    report = Report(a_run())
    text = report.markdown()
    assert "| vae20, all threads | 8 | 2 | 2 | 1.8 |" in text  # medians: the means of these rounds are others
    assert "| replicas: 50 |" in text
    assert "they vary from run to run" in text and "bit for bit" not in text and "OptionError: no" in text
    assert "other programs used up to 50%" in text
    assert [name for name, *_ in report.figures()] == ["speed"]


def test_budgets_reach_every_case_and_target() -> None:
    full, short, smoke = (speed.cells(budget) for budget in ("full", "short", "smoke"))
    assert {c.settings["case"] for c in full} == {*CASES, *SCALING, "compare"}
    wanted = {target.case for target in speed_report.TARGETS}
    assert wanted <= {c.settings["case"] for c in short if c.settings["part"] == "cases"}
    names = {c.guide for c in short if c.settings["part"] == "first"}
    assert {name for name, _ in speed_report.FIRST} <= names
    assert not any("inductor" in c.guide or "numpyro" in c.guide for c in smoke)
    assert all(speed.seconds(c) > 0 for c in full)
    assert len(jobs_of(speed.SUITE, "short", {})) == len({c.task for c in short})  # side by side
    with pytest.raises(OptionError, match="case 'vea20': expected one of vae20"):
        find_case("vea20")


def test_rows_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process for a case; what it could not have is the failure of those cells alone."""
    cells = [c for c in speed.cells("smoke") if c.task == "vae20, one thread"]
    asked: list[dict[str, Any]] = []

    def answer(job: dict[str, Any], cache: str | None = None) -> dict[str, Any]:
        asked.append(job)
        one = {"steps_a_turn": 3, "replicas": 1, "first_loss": 2.0, "last_loss": 1.0, "build_s": 0.1}
        one |= {"first_block_s": 0.1, "spent_wall_s": 4.0, "spent_cpu_s": 2.0}
        values = {name: {"values": [1.0, 2.0]} for name in ("cpu_ms", "wall_ms")}
        return {"candidates": dict.fromkeys(("pyro", "by hand"), one | values), "skipped": {"dgm trace": "no graph"}}

    monkeypatch.setattr(speed, "in_process", answer)
    monkeypatch.setattr(speed, "busy", lambda: None)
    rows = list(speed.run(cells))
    assert len(asked) == 1 and asked[0]["threads"] == 1 and asked[0]["only"] == ["pyro", "by hand", "dgm trace"]
    by = dict(zip([(c.guide, c.repeat) for c in cells], rows, strict=True))
    assert by["by hand", 1]["cpu_ms"] == 2.0 and by["by hand", 1]["job_cpu_seconds"] == 1.0
    assert "no graph" in str(by["dgm trace", 0]) and isinstance(by["dgm trace", 0], TrainingError)


def test_the_second_process_has_the_cache_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [c for c in speed.cells("short") if c.task == "bnn32x20, first step"]
    asked: list[tuple[str, str | None]] = []

    def answer(job: dict[str, Any], cache: str | None = None) -> dict[str, Any]:
        asked.append((job["candidate"], cache))
        if job["candidate"] == "dgm auto":
            raise TrainingError("killed")
        return dict.fromkeys(("import_s", "build_s", "first_step_s", "memory_before_mib", "memory_peak_mib"), 1.0) | {
            "process_cpu_s": 1.0
        }

    monkeypatch.setattr(speed, "in_process", answer)
    monkeypatch.setattr(speed, "busy", lambda: None)
    rows = dict(zip([c.guide for c in cells], speed.run(cells), strict=True))
    caches = [cache for name, cache in asked if name == "dgm inductor"]
    assert len(caches) == 2 and caches[0] == caches[1] and len({cache for _, cache in asked}) == 4
    assert str(rows["dgm auto"]) == "killed" and rows["dgm inductor, second process"]["first_step_s"] == 1.0


def test_without_numpyro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dgm.benchmarks.speed_numpyro", None)
    monkeypatch.delattr("dgm.benchmarks.speed_numpyro", raising=False)
    chosen = {n: c for n, c in speed_worker.candidates(SMALL["vae"]).items() if n in ("numpyro scan", "by hand")}
    found = speed_worker.measure(SMALL["vae"], chosen, rounds=1, seconds=0.0, steps=1)
    assert set(found["candidates"]) == {"by hand"}
    assert "pip install 'dgm[bench]'" in found["skipped"]["numpyro scan"]


def test_one_job_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="suite 'speed' measures times"):
        run_suite("speed", tmp_path / "out", budget="smoke", jobs=2)
    assert not (tmp_path / "out").exists()


def test_the_key_sees_the_process_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is started by name; its code is part of a cell's key all the same."""
    before, real = reached(speed.run), Path.read_text

    def changed(path: Path, *words: Any, **named: Any) -> str:
        text = real(path, *words, **named)
        return text.replace("optim.Adam(", "optim.AdamW(") if path.name == "speed_torch.py" else text

    monkeypatch.setattr(Path, "read_text", changed)
    assert reached(speed.run) != before


@pytest.mark.slow
def test_a_fresh_process_measures() -> None:
    cells = [c for c in speed.cells("smoke") if c.task == "vae20, first step"]
    rows = list(speed.run(cells))
    assert all(row["first_step_s"] > 0 and row["memory_peak_mib"] > 100 for row in rows) and len(rows) == 2


def test_the_folder_of_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert suites.main(["nothing"]) == 2
    assert suites.main([]) == 0
    assert "speed" in capsys.readouterr().out
