"""Comparisons that are killed, wholly or in part: what was finished stays, and the rest is made or told."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from dgm import Comparison, cell_runs, compare
from dgm.bench_executors import Finished, WorkerDied
from dgm.bench_store import MOST_ATTEMPTS
from dgm.cell_store import SHARED, to_cell, to_record
from dgm.cells import Cell
from dgm.errors import DataError, OptionError
from dgm.guides import attached
from dgm.guides.global_ import Global
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.store import save_comparison

pytestmark = pytest.mark.usefixtures("blank_pictures")
cells = importlib.import_module("dgm.cells")
X = torch.linspace(-1.0, 1.0, 20).reshape(10, 2)
Y = X.sum(1)
SHORT: dict[str, Any] = {"epochs": 2, "num_samples": 100, "batch_size": 4, "compile": False}
GUIDES = attached(["diagonal-normal", "point"])
COSTS = ["seconds", "cpu_seconds"]


def make() -> BayesianLinearRegression:
    return BayesianLinearRegression(2)


def short(folder: Path | None = None, guides: Any = GUIDES, **options: Any) -> Comparison:
    return compare(make, guides, (X, Y), **{**SHORT, "seeds": 2, "folder": folder, **options})


class Deadly:
    """A guide that ends its process, as often as its file has bytes left."""

    def __init__(self, file: Path):
        self.file, self.parent = file, os.getpid()

    def __call__(self, model: Any, *batch: Tensor) -> Any:
        lives = self.file.read_bytes()
        if lives and os.getpid() != self.parent:  # the parent only looks at the start of a guide
            self.file.write_bytes(lives[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        return Global(model, *batch)


def same(a: Comparison, b: Comparison) -> None:
    """Bit for bit, but for time."""
    key = ["guide", "seed"]
    left, right = (c.rows.sort_values(key, ignore_index=True).drop(columns=COSTS) for c in (a, b))
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    assert list(a.per_datum) == list(b.per_datum) and list(a.khat) == list(b.khat)
    for name, values in a.per_datum.items():
        np.testing.assert_array_equal(values, b.per_datum[name])
    for name, values in a.khat.items():
        np.testing.assert_array_equal(values, b.khat[name])
    unclocked = [c.history.drop(columns=[n for n in c.history if "second" in str(n)]) for c in (a, b)]
    pd.testing.assert_frame_equal(*unclocked, check_exact=True)
    assert repr(a.table.drop(columns=COSTS, errors="ignore")) == repr(b.table.drop(columns=COSTS, errors="ignore"))


def test_a_cell_comes_back_bit_for_bit() -> None:
    history = pd.DataFrame({"epoch": [1, 2], "elbo": [np.nan, 0.1 + 0.2], "why": ["", "lr"], "guide": "g"})
    pictures = {"x": np.arange(4.0, dtype=np.float32).reshape(2, 2), "n": 3}
    row = {"guide": "g", "seed": 1, "status": "ok", "bound": float("-inf"), "khat": float("nan"), "notes": "a; b"}
    cell = Cell(row, history, np.array([0.1, np.inf]), np.zeros(0), pictures)
    back = to_cell(to_record(cell))
    pd.testing.assert_frame_equal(back.history, history, check_exact=True)
    assert repr(back.row) == repr(row) and back.pictures["n"] == 3
    np.testing.assert_array_equal(back.pictures["x"], pictures["x"])
    np.testing.assert_array_equal(back.per_datum, cell.per_datum)


def test_a_second_call_makes_nothing_again_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = short(tmp_path / "a")
    monkeypatch.setattr(cells, "fit", lambda *_, **__: pytest.fail("a finished run is made again"))
    second = short(tmp_path / "a")
    same(first, second)
    pd.testing.assert_frame_equal(first.rows, second.rows)  # costs too: they are those of the run
    assert "4 of 4 runs were finished by an earlier call" in " ".join(second.meta["protocol"])
    save_comparison(second, tmp_path / "a")
    assert (tmp_path / "a" / "report.html").exists()


def test_what_fails_is_made_again_and_what_was_finished_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real, calls = short(), cells.fit, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("for once")
        return real(*args, **options)

    monkeypatch.setattr(cells, "fit", failing)
    first = short(tmp_path)
    assert list(first.rows["status"]) == ["ok", "ok", "MemoryError: for once", "MemoryError: for once"]
    second = short(tmp_path)
    assert len(calls) == 3
    same(whole, second)


def test_a_damaged_cell_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = short(tmp_path)
    files = sorted((tmp_path / "cells").iterdir())
    for file, content in zip(files[:3], (b"", b"{}", b"cos\nsystem\n(S'touch x'\ntR."), strict=True):
        file.write_bytes(content)
    (tmp_path / "cells" / ".half.part").write_bytes(b"half")
    same(first, short(tmp_path))
    assert "damaged" in caplog.text and not list((tmp_path / "cells").glob(".*"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 3}, "epochs is 2 there and 3 here"),
        ({"lr": 0.5}, "lr is 0.001 there and 0.5 here"),
        ({"kl_weight": 0.5}, "kl_weight is None there and 0.5 here"),
        ({"test": (X, Y)}, "the held-out rows are others"),
    ],
)
def test_another_comparison_is_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    short(tmp_path, seeds=1)
    with pytest.raises(OptionError, match=f"does not continue: .*{told}"):
        short(tmp_path, **options)


def test_another_model_is_trained_anew(tmp_path: Path) -> None:
    short(tmp_path, seeds=1)
    other = compare(lambda: BayesianLinearRegression(2, noise=3.0), GUIDES, (X, Y), seeds=1, folder=tmp_path, **SHORT)
    assert "finished by an earlier call" not in " ".join(other.meta["protocol"])


def test_a_folder_of_a_newer_version_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    short(tmp_path, seeds=1)
    content = json.loads((tmp_path / SHARED).read_text())
    (tmp_path / SHARED).write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(DataError, match="newer dgm"):
        short(tmp_path, seeds=1)
    for text in ("", "[]", "{", '{"format": "x", "shared": {}}', "[" * 100_000):
        (tmp_path / SHARED).write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            short(tmp_path, seeds=1)


class Losing:
    """Workers in this process that lose one guide's run as often as told."""

    left = 0

    def __init__(self, count: int):
        self.count = count

    def map(self, work: Any, items: Any) -> Any:
        for item in reversed(items):  # in any order
            if item.name == "point" and Losing.left:
                Losing.left -= 1
                yield Finished(item, error=WorkerDied("its process was killed, or ran out of memory"))
            else:
                yield Finished(item, work(item))


@pytest.mark.parametrize("losses", [0, 1, MOST_ATTEMPTS, 10])
@pytest.mark.parametrize("kept", [True, False])
def test_a_lost_worker_is_tried_again_a_bounded_number_of_times(
    losses: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_runs, "Workers", Losing)
    monkeypatch.setattr(Losing, "left", losses)
    folder = tmp_path if kept else None
    result = short(folder, jobs=2, seeds=1)
    assert list(result.rows["guide"]) == list(GUIDES)  # in their order, whoever came first
    status = result.rows.set_index("guide")["status"]
    assert status["diagonal-normal"] == "ok"
    lost = "WorkerDied: its process was killed, or ran out of memory (3 attempts)"
    assert status["point"] == ("ok" if losses < MOST_ATTEMPTS else lost)
    assert Losing.left == max(0, losses - MOST_ATTEMPTS)
    if kept and losses == 10:  # counted on disk: the next call does not try for ever
        assert short(folder, jobs=2, seeds=1).rows.set_index("guide")["status"]["point"] == lost
        assert Losing.left == 10 - MOST_ATTEMPTS


@pytest.mark.slow
def test_workers_start_after_threads_have_run(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.isfinite(torch.randn(400, 400) @ torch.randn(400, 400)).all()  # a fork would now hang
    finally:
        torch.set_num_threads(before)
    here, there = short(seeds=1), short(tmp_path, seeds=1, jobs=2)
    same(here, there)


@pytest.mark.slow
def test_one_killed_worker_loses_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "lives").write_bytes(b"x")
    result = short(guides={"deadly": Deadly(tmp_path / "lives"), **GUIDES}, jobs=2, seeds=1)
    assert list(result.rows["guide"]) == ["deadly", *GUIDES] and (result.rows["status"] == "ok").all()


@pytest.mark.slow
def test_a_run_that_always_dies_is_a_row_after_three_attempts(tmp_path: Path) -> None:
    (tmp_path / "lives").write_bytes(b"x" * 10)
    guides = {"deadly": Deadly(tmp_path / "lives"), "point": GUIDES["point"]}
    result = short(tmp_path / "out", guides, jobs=2, seeds=1)
    status = result.rows.set_index("guide")["status"]
    assert status["point"] == "ok"
    assert status["deadly"] == "WorkerDied: its process was killed, or ran out of memory (3 attempts)"
    assert len((tmp_path / "lives").read_bytes()) == 10 - MOST_ATTEMPTS
    again = short(tmp_path / "out", guides, jobs=2, seeds=1)  # counted on disk: it is not tried for ever
    assert again.rows.set_index("guide")["status"]["deadly"] == status["deadly"]
    assert len((tmp_path / "lives").read_bytes()) == 10 - MOST_ATTEMPTS


@pytest.mark.slow
def test_what_took_the_whole_process_with_it_gets_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = cell_runs._in_this_process, []

    def watched(item: Any, *rest: Any) -> Any:
        seen.append(item.name)
        return real(item, *rest)

    monkeypatch.setattr(cell_runs, "_in_this_process", watched)
    short(tmp_path, seeds=1)
    (key,) = [p.stem for p in (tmp_path / "cells").glob("*.json") if '"point"' in p.read_text()]
    (tmp_path / "cells" / f"{key}.json").unlink()
    (tmp_path / "attempts" / f"{key}-here.1").touch()  # as a killed process leaves it
    assert (short(tmp_path, seeds=1).rows["status"] == "ok").all()
    assert seen == list(GUIDES) and not list((tmp_path / "attempts").iterdir())


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    from dgm.lock import locked

    with locked(tmp_path), pytest.raises(OptionError, match="another thread of this process"):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            pool.submit(short, tmp_path, seeds=1).result()


@pytest.mark.slow
def test_a_comparison_killed_again_and_again_ends_with_the_same_rows(tmp_path: Path) -> None:
    words = ["compare", "--model", "bnn", "--data", "gap", "--guides", "point,diagonal-normal,full-normal,student-t"]
    words += ["--seeds", "2", "--epochs", "5", "--samples", "100", "--jobs", "1", "--compile", "eager"]
    command = [sys.executable, "-m", "dgm.cli", *words]
    with subprocess.Popen([*command, "--out", str(tmp_path / "whole")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        began = time.monotonic()
        process.communicate()
        took = time.monotonic() - began
    assert process.returncode == 0
    rng, kills = np.random.default_rng(0), 0
    for _ in range(30):
        resume = ["--resume"] if (tmp_path / "killed" / SHARED).exists() else []
        process = subprocess.Popen(
            [*command, *resume, "--out", str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        first = process.stdout.readline()  # imports are over: from here on something can be lost
        try:
            output, _ = process.communicate(timeout=took * float(rng.uniform(0.2, 0.7)))
            assert process.returncode == 0, (first + output).decode()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills >= 2
    whole, killed = (pd.read_parquet(tmp_path / n / "rows.parquet").drop(columns=COSTS) for n in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole, killed, check_exact=True)
