"""The runner of benchmark suites: identity of cells, resuming, failures, workers, and what goes wrong with folders."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dgm import store as files
from dgm.bench import run_suite
from dgm.bench_cells import Cell, Metric, Suite, canonical, chosen, jobs_of, parsed, plain, unplain
from dgm.bench_code import reached
from dgm.bench_executors import Local, Workers
from dgm.bench_find import find_suite, suites
from dgm.bench_plan import make_plan
from dgm.bench_report import make_report, write_report
from dgm.bench_results import Results, load_results
from dgm.bench_store import MOST_ATTEMPTS, CannotWrite, Record, Store
from dgm.cli import app
from dgm.errors import DataError, ModelError, OptionError
from dgm.lock import locked

TOY = '''
"""A toy: sums of random numbers."""

import os
import signal
import time

import torch

from dgm.bench_cells import Cell, Metric, Suite
from dgm.errors import DataError


def cells(budget):
    count = {"smoke": 3, "short": 4, "full": 5}[budget]
    return [Cell(t, g, k, {"n": 50}) for t in ("a", "b") for g in ("x", "y") for k in range(count)]


def run(cells):
    first = cells[0]
    with open(os.environ["TOY"] + "/begun", "a") as log:
        log.write(first.task + first.guide + "\\n")
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    if os.environ.get("TOY_DIES") == first.task + first.guide:
        mark = os.environ["TOY"] + "/died"
        if not os.path.exists(mark) or os.environ.get("TOY_ALWAYS"):
            open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    shared = torch.randn(())
    for cell in cells:
        noise = torch.randn(cell.settings["n"])
        if os.environ.get("TOY_FAILS") == first.task + first.guide + str(cell.repeat):
            yield ValueError("no number <today>")
            continue
        score = float(noise.sum() + shared * len(cells))
        yield {"score": score, "odd": float("nan"), "curve": noise[:3], "seconds": 1.0}


def ready(task):
    if os.environ.get("TOY_LACKS") == task:
        raise DataError("put numbers.csv in <folder>")


SUITE = Suite("toy", cells, run, [Metric("score", "higher")], group_by=("task", "guide"), ready=ready)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a suite of twelve cells in four jobs."""
    monkeypatch.setenv("TOY", str(tmp_path))
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    return str(file)


def run(toy: str, folder: Path, **options: Any) -> Results:
    return run_suite(toy, folder, budget="smoke", progress=False, **options)


def begun(tmp_path: Path) -> list[str]:
    return (tmp_path / "begun").read_text().split()


def contents(folder: Path) -> dict[str, Any]:
    """Row and digest of arrays of every cell, as text: what must be the same, bit for bit."""
    found = {}
    for path in sorted((folder / "cells").glob("*.json")):
        whole = json.loads(path.read_text())
        found[path.stem] = json.dumps([whole["row"], whole["arrays"]])
    return found


# --------------------------------------------------------------------------------------------------- identity


def suite_of(code: str, folder: Path, name: str) -> Any:
    file = folder / f"{name}.py"
    file.write_text(code)
    space: dict[str, Any] = {"__name__": name, "__file__": str(file)}
    exec(compile(code, str(file), "exec"), space)
    return space["run"]


def test_a_fingerprint_sees_code_and_no_comments(tmp_path: Path) -> None:
    base = "SIZE = 3\n\ndef helper():\n    return SIZE\n\ndef run(cell):\n    return helper()\n"
    base += "\ndef caption():\n    return 'a'\n"
    same = base.replace("def run(cell):\n", "# why\ndef run(cell):\n    '''Says what it does.'''\n\n")
    prints = {
        name: reached(suite_of(code, tmp_path / name_dir(tmp_path, name), "suite"))
        for name, code in {
            "base": base,
            "comment": same,
            "caption": base.replace("'a'", "'b'"),
            "constant": base.replace("SIZE = 3", "SIZE = 4"),
            "code": base.replace("return helper()", "return helper() + 1"),
            "command": base + "\nif __name__ == '__main__':\n    caption()\n",
            "elsewhere": base.replace("SIZE = 3\n", "SIZE = 3\nMORE = 1\n"),
            "statement": base + "\nhelper()\n",
        }.items()
    }
    assert prints["base"] == prints["comment"] == prints["caption"] == prints["command"] == prints["elsewhere"]
    assert len({prints["base"], prints["constant"], prints["code"], prints["statement"]}) == 4


def test_a_fingerprint_knows_names_that_are_local(tmp_path: Path) -> None:
    base = "def cells(budget):\n    return 1\n\nlow = 1\n\ndef run(cells):\n"
    bodies = {
        "argument": "    return [cells]\n",
        "assigned": "    low = 2\n    return low\n",
        "comprehension": "    return [low for low in cells]\n",
        "reached": "    return [low for high in cells]\n",
        "default": "    return (lambda low=low: low)(cells)\n",
        "global": "    global low\n    low = 2\n    return low\n",
    }
    changed = {}
    for name, body in bodies.items():
        pair = [
            reached(suite_of(code + body, tmp_path / name_dir(tmp_path, f"{name}{k}"), "suite"))
            for k, code in enumerate((base, base.replace("return 1", "return 2").replace("low = 1", "low = 3")))
        ]
        changed[name] = pair[0] != pair[1]
    assert changed == {
        "argument": False, "assigned": False, "comprehension": False, "reached": True, "default": True, "global": True,
    }  # fmt: skip


def name_dir(tmp_path: Path, name: str) -> str:
    (tmp_path / name).mkdir(exist_ok=True)
    return name


def test_a_fingerprint_follows_imports_of_its_folder(tmp_path: Path) -> None:
    code = "from .other import number\n\ndef run(cell):\n    return number()\n"
    prints = []
    for value in ("1", "2"):
        (tmp_path / "other.py").write_text(f"def number():\n    return {value}\n\nUNUSED = {value}\n")
        file = tmp_path / "first.py"
        file.write_text(code)
        space: dict[str, Any] = {"__name__": "first", "number": None}
        exec(compile("def run(cell):\n    return number()\n", str(file), "exec"), space)
        prints.append(reached(space["run"]))
    assert prints[0] != prints[1]


def two(settings: dict[str, Any], protocol: int = 1, group: tuple[str, ...] = ("task",), more: int = 2) -> list[str]:
    cells = [Cell("t", "g", k, settings) for k in range(more)]
    suite = Suite("s", lambda budget: cells, lambda cells: [], [Metric("m")], protocol=protocol, group_by=group)
    return [key for job in jobs_of(suite, "smoke", {"dgm": "1"}) for key in job.keys]


def test_a_key_is_its_protocol() -> None:
    base = two({"epochs": 5, "lr": 0.1})
    assert base == two({"lr": 0.1, "epochs": 5}) and len(set(base)) == 2
    for other in (two({"epochs": 6, "lr": 0.1}), two({"epochs": 5, "lr": math.nextafter(0.1, 1)})):
        assert not set(other) & set(base)
    assert not set(two({"epochs": 5, "lr": 0.1}, more=3)) & set(base)  # the job's composition is part of it
    assert not set(two({"epochs": 5, "lr": 0.1}, protocol=2)) & set(base)


def test_jobs_refuse_what_is_no_suite() -> None:
    with pytest.raises(OptionError, match="two equal cells"):
        jobs_of(Suite("s", lambda b: [Cell("t", "g")] * 2, print, [Metric("m")]), "smoke", {})
    with pytest.raises(OptionError, match="no cells"):
        jobs_of(Suite("s", lambda b: [], print, [Metric("m")]), "smoke", {})
    with pytest.raises(OptionError, match="'short'"):
        jobs_of(Suite("s", lambda b: [Cell("t", "g")], print, [Metric("m")]), "shrt", {})
    with pytest.raises(OptionError, match="type Tensor"):
        jobs_of(Suite("s", lambda b: [Cell("t", "g", 0, {"x": torch.ones(2)})], print, [Metric("m")]), "smoke", {})


@pytest.mark.parametrize("pair", [(5, "many"), (True, 1.5), ([1], 1), ("x", [1])])
def test_a_setting_has_one_kind(pair: tuple[Any, Any]) -> None:
    def cells(budget: str) -> list[Cell]:
        return [Cell("t", "g", k, {"n": value}) for k, value in enumerate(pair)]

    with pytest.raises(OptionError, match="the setting 'n' is"):
        jobs_of(Suite("s", cells, print, [Metric("m")]), "smoke", {})
    fine = [Cell("t", "g", k, {"n": v, **more}) for k, (v, more) in enumerate([(1, {"o": "x"}), (2.5, {}), (None, {})])]
    assert len(jobs_of(Suite("s", lambda b: fine, print, [Metric("m")]), "smoke", {})) == 3


ODD = """
from dgm.bench_cells import Cell, Metric, Suite

ROWS = [
    {"score": 1.5, "some": 1.25, "kinds": [1, "x"], "map": {"a": 1}, "flag": True, "few": [1], "none": None},
    {"score": 2.5, "some": "text", "kinds": [2], "map": {}, "flag": 3, "large": 2**80, "empty": []},
    {"score": float("nan"), "some": None, "large": 1.0},
    {"score": {1, 2}},
    {"score": 1.0, "status": "fine"},
    {"score": 1.0, "text": "\\ud800"},
]


def run(cell):
    return ROWS[cell.repeat]


SUITE = Suite("odd", lambda budget: [Cell("t", "g", k) for k in range(6)], run, [Metric("score")])
"""


def test_columns_of_several_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Values of any kind give a column that can be kept, or a row with an error; never a traceback."""
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    results = run(str(file), tmp_path / "out")
    assert results.rows["some"].tolist() == ["1.25", "text", None, None, None, None]
    assert results.rows["map"].tolist()[:2] == ['{"a":1}', "{}"] and results.rows["flag"].tolist()[:2] == ["true", "3"]
    assert results.rows["kinds"][0] == '[1,"x"]' and results.rows["large"][1] == str(2**80)
    assert "column 'some' holds values of several kinds (float, str): it is kept as text" in caplog.text
    failed = dict(zip(results.failed["seed"], results.failed["status"], strict=True))
    assert "column 'score' is of type set" in failed[3] and "'status' is a column of the runner" in failed[4]
    assert "no Unicode" in failed[5] and len(failed) == 3
    write_report(make_report(tmp_path / "out"), tmp_path / "committed")
    again = load_results(tmp_path / "committed").rows
    assert again["some"].tolist()[:2] == ["1.25", "text"] and again["map"].tolist()[:2] == ['{"a":1}', "{}"]
    assert call("run", str(file), "--budget", "smoke", "--out", str(tmp_path / "out")).exit_code == 1


def test_values_keep_their_bits() -> None:
    value = {"a": [0.1 + 0.2, math.inf, -math.inf, 1, True, None, "x"], "b": {"c": 1e-320}}
    back = unplain(json.loads(canonical(value)))
    assert back == value and type(back["a"][3]) is int and math.isnan(unplain(plain(math.nan, "x")))


# --------------------------------------------------------------------------------------------------- running


def test_rows_and_arrays(toy: str, tmp_path: Path) -> None:
    results = run(toy, tmp_path / "out")
    assert len(results.rows) == 12 and (results.rows["status"] == "ok").all() and results.missing == 0
    assert (
        results.rows["odd"].isna().all() and "seconds" not in results.rows and (results.costs["seconds"] == 1.0).all()
    )
    assert results.arrays(results.rows["key"][0])["curve"].shape == (3,)
    assert {"commit", "versions", "hardware", "command", "date", "library"} <= set(results.costs)
    before = torch.random.get_rng_state()
    again = run(toy, tmp_path / "out")
    assert len(begun(tmp_path)) == 4 and again.rows.equals(results.rows)  # nothing was computed anew
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "arrays"])
def test_a_damaged_result_is_computed_again(
    toy: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    run(toy, out)
    whole = contents(out)
    path = out / "cells" / f"{sorted(whole)[0]}.json"
    text = path.read_text()
    if damage == "arrays":
        path.with_suffix(".safetensors").write_bytes(b"nothing")
    else:
        bad = {"truncated": text[:100], "flipped": text.replace("50", "51", 1), "empty": "", "foreign": "[1, 2]"}[
            damage
        ]
        path.write_text(bad)
    stamps = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    run(toy, out)
    assert "is damaged" in caplog.text and contents(out) == whole
    assert len(begun(tmp_path)) == 5  # that job alone, and whole
    moved = [p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp]
    assert moved == [path]  # the other cells of the job were left alone


def test_a_failed_cell_is_a_row_and_given_up_after_three_runs(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOY_FAILS", "ax1")
    out = tmp_path / "out"
    for attempt in range(1, MOST_ATTEMPTS + 2):
        results = run(toy, out)
        assert list(results.failed["status"]) == ["ValueError: no number <today>"] and len(results.good) == 11
        assert len(begun(tmp_path)) == 4 + min(attempt, MOST_ATTEMPTS) - 1
    assert "--retry tries them:\n  a, x (1 of 3 cells): ValueError: no number <today>" in caplog.text
    monkeypatch.delenv("TOY_FAILS")
    assert len(run(toy, out).failed) == 1
    mended = run(toy, out, retry=True)
    assert len(mended.failed) == 0 and not list((out / "attempts").iterdir())
    assert contents(out) == contents(Path(run(toy, tmp_path / "other").folder or ""))


def test_other_protocols_are_kept_apart(toy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, file = tmp_path / "out", Path(toy)
    run(toy, out)
    changed = file.with_name("toy2.py")
    changed.write_text(TOY.replace("ready=ready)", "ready=ready, protocol=2)"))
    caplog.set_level(logging.INFO, "dgm")
    results = run(str(changed), out)
    assert "12 other results are in the folder" in caplog.text and len(contents(out)) == 24
    assert len(results.rows) == 12 and results.elsewhere == 12
    again = file.with_name("toy3.py")
    again.write_text(TOY.replace("def run(cells):", "# a comment\ndef run(cells):\n    'And a docstring.'"))
    assert len(run(str(again), out).rows) == 12 and len(begun(tmp_path)) == 8  # nothing was computed anew


def test_code_of_the_library_is_told_and_renewed(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    first = run(toy, out)
    monkeypatch.setattr("dgm.bench_plan.library", lambda: "another")
    caplog.set_level(logging.INFO, "dgm")
    run(toy, out)
    assert "12 finished cells were computed by other code" in caplog.text and len(begun(tmp_path)) == 4
    assert run(toy, out, renew=True).rows.equals(first.rows) and len(begun(tmp_path)) == 8


def test_data_that_are_missing(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_LACKS", "b")
    results = run(toy, tmp_path / "out")
    assert len(results.rows) == 6 and results.missing == 6
    assert dict(results.skipped) == {"b": "put numbers.csv in <folder>"}
    told = call("run", toy, "--budget", "smoke", "--out", str(tmp_path / "out"))
    assert told.exit_code == 1 and "for want of data skipped: b" in told.stdout
    assert "put numbers.csv in &lt;folder>" in (tmp_path / "out" / "report.md").read_text()
    monkeypatch.delenv("TOY_LACKS")
    assert run(toy, tmp_path / "out").missing == 0


def test_filters(toy: str, tmp_path: Path) -> None:
    results = run(toy, tmp_path / "out", filters=["task=a,seed=1"])
    assert len(results.rows) == 2 and set(results.rows["seed"]) == {1}
    assert len(contents(tmp_path / "out")) == 6  # its jobs were computed whole: their rows do not depend on filters
    full = run(toy, tmp_path / "all")
    assert contents(tmp_path / "out").items() <= contents(tmp_path / "all").items() and len(full.rows) == 12
    suite = find_suite(toy)
    jobs = jobs_of(suite, "smoke", {})
    for words, message in (
        (["taks=a"], "did you mean 'task'"),
        (["guide=z"], "selects nothing: known: x, y"),
        (["a"], "expected name=value"),
    ):
        with pytest.raises(OptionError, match=message):
            chosen(suite, jobs, words)
    with pytest.raises(OptionError, match="selects none of the 2 cells"):
        pair = Suite("s", lambda b: [Cell("a", "x"), Cell("b", "y")], print, [Metric("m")])
        chosen(pair, jobs_of(pair, "smoke", {}), ["task=a,guide=y"])
    assert parsed(["n=1"]) == {"n": {"1"}}


def test_unknown_suites(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'exact'"):
        find_suite("exatc")
    with pytest.raises(OptionError, match="no file"):
        find_suite(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ModelError, match="has no SUITE"):
        find_suite(str(tmp_path / "empty.py"))
    assert "exact" in suites()
    with pytest.raises(OptionError):
        run_suite("exatc", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_measured_times_are_of_one_run(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that runs again measures all of its cells again, and no two jobs share the cores."""
    file = Path(toy).with_name("toy4.py")
    file.write_text(TOY.replace("ready=ready)", "ready=ready, timed=True)"))
    monkeypatch.setenv("TOY_FAILS", "ax1")
    out = tmp_path / "out"
    run(str(file), out)
    stamps = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    monkeypatch.delenv("TOY_FAILS")
    mended = run(str(file), out)
    moved = [p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp]
    assert len(mended.good) == 12 and len(moved) == 3 and begun(tmp_path) == ["ax", "ay", "bx", "by", "ax"]
    with pytest.raises(OptionError, match="must not share the cores; leave --jobs out"):
        run(str(file), out, jobs=2)
    assert call("run", str(file), "--jobs", "2", "--dry-run").exit_code == 2


def test_one_run_at_a_time(toy: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out), ThreadPoolExecutor(1) as other:
        refused = other.submit(run, toy, out).exception()
    assert isinstance(refused, OptionError) and "is in use by" in str(refused) and not (tmp_path / "begun").exists()
    assert len(run(toy, out).rows) == 12


def test_a_disk_that_is_full(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, count = tmp_path / "out", files.write_whole, [0]

    def full(path: Path, write: Any) -> Path:
        count[0] += path.parent.name == "cells"
        if count[0] > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, write)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(CannotWrite, match="No space left on device; what is finished is safe"):
        run(toy, out)
    monkeypatch.setattr(files, "write_whole", real)
    assert len(contents(out)) == 4 and not list((out / "attempts").iterdir())  # no attempt is counted for it
    run(toy, out)
    run(toy, tmp_path / "other")
    assert contents(out) == contents(tmp_path / "other")


def test_ctrl_c_counts_no_attempt(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.write

    def stop(self: Store, key: str, record: Record) -> None:
        if len(self.keys()) == 4:
            raise KeyboardInterrupt
        real(self, key, record)

    monkeypatch.setattr(Store, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path / "out")
    assert not list((tmp_path / "out" / "attempts").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("TOY", str(tmp_path))
    assert len(run(toy, tmp_path / "out").rows) == 12


def test_an_estimate_of_time(toy: str, tmp_path: Path) -> None:
    suite, store = find_suite(toy), Store(tmp_path / "out")
    assert make_plan(suite, store, "smoke").seconds is None and "12 in 4 jobs, time unknown" in repr(
        make_plan(suite, store, "smoke")
    )
    run(toy, store.folder, filters=["task=a"])
    plan = make_plan(suite, store, "smoke")
    assert plan.cells == 6 and plan.seconds is not None and plan.seconds > 0 and len(plan.done) == 6
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("rows")]


# --------------------------------------------------------------------------------------------- killed processes


def driver(toy: str, out: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    code = f"from dgm.bench import run_suite; run_suite({toy!r}, {str(out)!r}, budget='smoke', progress=False)"
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TOY_SLEEP": "0.5"}, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_kills_of_driver_and_worker_change_no_bit(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is killed twice; then two workers go on, one of which dies: rows are those of one quiet process."""
    out = tmp_path / "out"
    for _ in range(2):
        before = len(list((out / "cells").glob("*.json"))) if out.exists() else 0
        process = driver(toy, out, tmp_path)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if out.exists() and len(list((out / "cells").glob("*.json"))) > before:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    some = contents(out)
    assert 0 < len(some) < 12
    monkeypatch.setenv("TOY_DIES", "by")
    results = run(toy, out, jobs=2)
    assert (tmp_path / "died").exists()
    monkeypatch.delenv("TOY_DIES")
    quiet = run(toy, tmp_path / "quiet")
    assert contents(out) == contents(tmp_path / "quiet") and results.rows.equals(quiet.rows)
    assert some.items() <= contents(out).items() and not list((out / "attempts").iterdir())


@pytest.mark.slow
def test_a_cell_that_always_kills_its_process(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TOY_DIES", "ay")
    monkeypatch.setenv("TOY_ALWAYS", "1")
    results = run(toy, tmp_path / "out", jobs=2)
    assert len(results.good) == 9 and set(results.failed["status"].str[:52]) == {
        "given up: its process died in each of 3 attempts, ki"
    }
    assert begun(tmp_path).count("ay") == 3 and set(begun(tmp_path)) == {"ax", "ay", "bx", "by"}
    assert begun(tmp_path).count("bx") == 1  # the others lost nothing
    caplog.clear()
    run(toy, tmp_path / "out")
    assert "the same command with --retry tries them:\n  a, y (3 of 3 cells): given up: its process" in caplog.text


class Backwards:
    """An executor of one's own, which ends jobs in another order."""

    def map(self, work: Any, items: Sequence[Any]) -> Any:
        yield from Local().map(work, list(reversed(items)))


def test_any_executor_gives_the_same_rows(toy: str, tmp_path: Path) -> None:
    one = run(toy, tmp_path / "one")
    other = run(toy, tmp_path / "two", executor=Backwards())
    assert one.rows.equals(other.rows) and contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(OptionError, match="jobs is 0"):
        Workers(0)


# ------------------------------------------------------------------------------------------------ command line


def call(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


def test_the_command_line(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    told = call("run", toy, "--budget", "smoke", "--out", str(out), "--dry-run")
    assert told.exit_code == 0 and "to do: 12 in 4 jobs" in told.stdout and not out.exists()
    assert call("run", toy, "--budget", "smoke", "--out", str(out)).exit_code == 0
    made = {p.name for p in out.iterdir()}
    assert {"rows.parquet", "rows.csv", "costs.csv", "report.md", "report.html", "plan.json", "cells"} <= made
    rows = (out / "rows.csv").read_bytes(), (out / "rows.parquet").read_bytes()
    assert call("run", toy, "--budget", "smoke", "--out", str(out)).exit_code == 0
    assert rows == ((out / "rows.csv").read_bytes(), (out / "rows.parquet").read_bytes())
    monkeypatch.setenv("TOY_FAILS", "ax1")
    assert call("run", toy, "--budget", "smoke", "--out", str(tmp_path / "bad")).exit_code == 1
    assert "&lt;today&gt;" in (tmp_path / "bad" / "report.html").read_text()
    assert call("run", "exatc").exit_code == 2 and call("run", toy, "--filter", "a=b").exit_code == 2
    assert call("run", toy, "--jobs", "0").exit_code == 2
    assert call("report", str(tmp_path / "nowhere")).exit_code == 2 and call("report").exit_code == 2
    assert "exact" in call("list").stdout


def test_results_that_cannot_be_read(toy: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results"):
        load_results(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        load_results(tmp_path)
