"""The speed benchmark: rivals train, the same model has the same loss, figures become targets, tables, pictures."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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


def figures(**cpu: float) -> dict[str, Any]:
    one = {"replicas": 1, "first_loss": 2.0, "last_loss": 1.0}
    spread = {n.replace("_", " "): speed_worker.spread([0.9 * v, v, 1.2 * v]) for n, v in cpu.items()}
    return {name: {**one, "cpu_ms": s, "wall_ms": s} for name, s in spread.items()}


def a_run() -> dict[str, Any]:
    job = {"case": "vae20", "threads": 1, "skipped": {"dgm eager": "OptionError: no"}, "axis": "", "value": 0}
    growth = {"case": "replicas-5", "threads": 1, "skipped": {}, "axis": "replicas", "value": 5}
    return {
        "command": "c", "commit": "c", "hardware": "h", "versions": "v", "date": "d", "failed": [],
        "cases": [{**job, "candidates": figures(pyro=8.0, by_hand=2.0, numpyro_scan=2.0, dgm_inductor=1.8)}],
        "scaling": [{**growth, "candidates": figures(pyro=8.0, dgm_inductor=0.1)}],
        "first": [{"case": "vae20", "candidate": "dgm trace", "cache": "", "threads": 1, "import_s": 1.0,
                   "build_s": 0.1, "first_step_s": 0.5, "memory_peak_mib": 500.0, "memory_before_mib": 400.0}],
        "compare": [],
    }  # fmt: skip


def test_targets_are_ratios_of_medians_to_the_fastest_rival() -> None:
    rows = {row["what"]: row for row in speed_report.targets(a_run())}
    hand = rows["VAE, batch 20, against PyTorch by hand"]
    assert hand["obtained"] == pytest.approx(0.9) and not hand["met"]
    assert rows["VAE, batch 20, against NumPyro's best"]["met"]
    assert rows["dgm trace, first step of vae20 (s)"]["obtained"] == 0.5
    assert len(rows) == 4
    assert "**missed**" in speed_report.markdown(a_run())


def test_what_is_written(tmp_path: Path) -> None:
    speed.write(a_run(), tmp_path / "speed.json")
    assert len(json.loads((tmp_path / "speed.json").read_text())["targets"]) == 4
    assert "| vae20 | 1 | dgm eager | – | – | OptionError: no |" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.svg").stat().st_size > 1000


def test_jobs_and_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = list(speed.jobs_of(speed.parse(["--cases", "all", "--threads", "1,2"])))
    timed = [job["case"] for part, job in jobs if part == "cases"]
    assert timed == [name for name in CASES for _ in range(2)]
    assert [job["case"] for part, job in jobs if part == "scaling"] == list(SCALING)
    assert jobs[-1][0] == "compare"
    with pytest.raises(OptionError, match="case 'vea20': expected one of vae20"):
        find_case("vea20")
    assert suites.main(["nothing"]) == 2
    assert suites.main([]) == 0
    assert "speed" in capsys.readouterr().out
