"""The suite of tricks: its cells, its pairs, what its errors allow to say, and its report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_rel

import dgm
from dgm.bench import run_suite
from dgm.bench_cells import BUDGETS, Cell
from dgm.bench_report import make_report, write_report
from dgm.bench_results import Results
from dgm.benchmarks import tricks, tricks_effects
from dgm.benchmarks.tricks_effects import FEW, HARMS, HELPS, LEANS, NONE, OPEN, effects, figures, first
from dgm.benchmarks.tricks_list import CONTROL, SIMPLE, TRICKS, Trick, pair, variants
from dgm.benchmarks.tricks_models import (
    BNNS,
    DIABETES,
    DIGITS,
    FREY,
    OWN,
    PLAIN,
    VAES,
    YACHT,
    data_of,
    guide_of,
    maker_of,
    trained,
)
from dgm.errors import DataError
from dgm.pairs import LEVEL
from dgm.programs import preserved_rng
from dgm.starting import start_pair


def results_of(rows: list[dict[str, Any]], costs: list[dict[str, Any]] | None = None) -> Results:
    frame = pd.DataFrame(rows).assign(status="ok")
    frame["key"] = [f"k{i}" for i in range(len(frame))]
    cost = pd.DataFrame(costs) if costs is not None else pd.DataFrame({"key": frame["key"]})
    return Results(tricks.SUITE, frame, cost, {"budget": "short", "filter": [], "protocol": 1})


def rows_of(task: str, guide: str, scores: Any) -> list[dict[str, Any]]:
    return [{"task": task, "guide": guide, "split": k, "score": float(v)} for k, v in enumerate(scores)]


# ------------------------------------------------------------------------------------------------------ cells


def test_every_trick_is_on_and_off_on_two_models() -> None:
    assert len({t.name for t in TRICKS}) == len(TRICKS) == 14
    for trick in TRICKS:
        assert len(set(trick.tasks)) == 2 and set(trick.tasks) <= {*VAES, *BNNS}
        assert trick.name == CONTROL or re.search(r", (19|20)\d\d$", trick.reference)
        for task in trick.tasks:
            off, on = pair(trick, task)
            known = variants(task)
            changed = {name for name in known[off] if known[off][name] != known[on][name]}
            told = {*trick.on, *trick.off, *trick.own.get(task, {})}
            assert off != on and changed and changed <= told  # nothing but the trick differs
            for name in ("lr", "batch_size", "steps"):
                assert known[off].get(name) == known[on].get(name)


@pytest.mark.parametrize("budget", BUDGETS)
def test_cells_are_pairs(budget: str) -> None:
    cells = tricks.cells(budget)
    assert cells == tricks.cells(budget)
    for task in tricks.STEPS:
        own = [c for c in cells if c.task == task]
        splits = {name: {c.repeat for c in own if c.guide == name} for name in variants(task)}
        assert {c.guide for c in own} == set(splits) and len({tuple(sorted(s)) for s in splits.values()}) == 1
        assert len({(c.settings["steps"], c.settings["draws"], c.settings["compile"]) for c in own}) == 1
    kinds: dict[str, set[type]] = {}
    for cell in cells:  # a column of the rows has one type
        for name, value in cell.settings.items():
            kinds.setdefault(name, set()).add(type(value))
    assert all(len(found) == 1 for found in kinds.values()), kinds


def test_equal_settings_are_one_variant() -> None:
    for task in tricks.STEPS:
        known = list(variants(task).values())
        assert all(a != b for i, a in enumerate(known) for b in known[:i])
        assert variants(task)[SIMPLE] == {**PLAIN, **OWN[task]}


# ------------------------------------------------------------------------------------------------------- pairs


def start(task: str, settings: dict[str, Any], seed: int = 3) -> dict[str, torch.Tensor]:
    batch = data_of(task, 0).train
    with preserved_rng(0):
        model, guide = start_pair(maker_of(task, settings, batch[0].shape[1]), guide_of(task, settings), seed, batch)
    return {**{f"model.{n}": p for n, p in model.named_parameters()}, **dict(guide.named_parameters())}


@pytest.mark.parametrize("task", [DIGITS, DIABETES])
def test_pairs_start_alike(task: str) -> None:
    """Bit for bit, but for what the trick itself moves."""
    moved = {"narrow start of q": {"family.log_scale.bias"}, "output bias from data": {"model.decoder.2.bias"}}
    for trick in TRICKS:
        if task not in trick.tasks or trick.name in ("batch normalisation", CONTROL):
            continue
        known = variants(task)
        off, on = (start(task, known[name]) for name in pair(trick, task))
        assert list(off) == list(on)
        differ = {name for name in off if not torch.equal(off[name], on[name])}
        assert differ == moved.get(trick.name, set()), trick.name
    plain = start(task, variants(task)[SIMPLE])
    assert any(not torch.equal(plain[name], other) for name, other in start(task, variants(task)[SIMPLE], 4).items())


def losses(task: str, settings: dict[str, Any]) -> list[float]:
    small = {**settings, "steps": 1, "compile": False}
    parts = [data_of(task, k) for k in range(2)]
    return [float(fit.history["elbo"].iloc[0]) for fit in trained(task, small, parts, range(2))]


def test_pairs_see_the_same_data_and_noise() -> None:
    """The loss of the first step is the same number where the trick changes only what follows from it."""
    known = variants(DIGITS)
    plain = losses(DIGITS, known[SIMPLE])
    for name in ("sticking the landing", "learning-rate decay", "gradient clipping"):
        assert losses(DIGITS, known[name]) == plain
    assert losses(DIGITS, known["DReG"]) == pytest.approx(losses(DIGITS, known["DReG: off"]), rel=1e-5)
    assert losses(DIGITS, known["free bits"]) == losses(DIGITS, known["free bits: off"])
    other = losses(DIGITS, known[CONTROL])
    assert all(abs(a - b) > 1e-6 for a, b in zip(other, plain, strict=True)) and plain[0] != plain[1]


def test_the_control_has_the_same_test_rows() -> None:
    row, shifted = (
        tricks.run([Cell(DIABETES, "x", 1, {**PLAIN, **OWN[DIABETES], **SMALL, "seed_shift": shift})])[0]
        for shift in (0, 1000)
    )
    assert row["score"] != shifted["score"]
    assert [len(p) for p in data_of(DIABETES, 1).test] == [89, 89]


# ------------------------------------------------------------------------------------------------------ effects

PAIR = (
    Trick("good", "", "", {"clip": 1.0}, tasks=(DIABETES,)),
    Trick("idle", "", "", {"warmup": 0.5}, tasks=(DIABETES,)),
)


def toy(seed: int = 0, gain: float = 0.5, n: int = 8) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Splits of very different difficulty, and two variants beside plain."""
    random = np.random.default_rng(seed)
    level, noise = 10 * random.standard_normal(n), 0.1 * random.standard_normal((3, n))
    scores = level + noise + np.array([[0.0], [gain], [0.0]])
    names = (SIMPLE, "good", "idle")
    return [row for name, own in zip(names, scores, strict=True) for row in rows_of(DIABETES, name, own)], scores


def test_effects_are_paired_differences() -> None:
    rows, scores = toy()
    table = effects(results_of(rows), PAIR).set_index("trick")
    for place, name in ((1, "good"), (2, "idle")):
        d = scores[place] - scores[0]
        assert table["effect"][name] == pytest.approx(d.mean())
        assert table["se"][name] == pytest.approx(d.std(ddof=1) / 8**0.5)
        assert table["p"][name] == pytest.approx(ttest_rel(scores[place], scores[0]).pvalue)
    assert table["p_holm"]["good"] == pytest.approx(2 * table["p"]["good"])
    assert list(table.index) == ["good", "idle"] and list(table["verdict"]) == [HELPS, OPEN]
    mixed = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    again = effects(results_of(mixed), PAIR).set_index("trick")
    assert again["effect"].to_numpy() == pytest.approx(table["effect"].to_numpy())
    assert again["se"].to_numpy() == pytest.approx(table["se"].to_numpy())
    wrong = [{**r, "split": (r["split"] + 1) % 8} if r["guide"] == "good" else r for r in rows]  # the mutant
    assert effects(results_of(wrong), PAIR).set_index("trick")["se"]["good"] > 20 * table["se"]["good"]


def test_lost_splits_are_left_out_of_both_and_told() -> None:
    rows, scores = toy()
    results = results_of(rows)
    results.rows.loc[(results.rows["guide"] == "good") & (results.rows["split"] == 3), "status"] = "RuntimeError: nan"
    table = effects(results, PAIR).set_index("trick")
    d = np.delete(scores[1] - scores[0], 3)
    assert table["effect"]["good"] == pytest.approx(d.mean())
    assert (table["pairs"]["good"], table["lost"]["good"], table["lost"]["idle"]) == (7, 1, 0)
    assert any("good" in note for note in tricks_effects.notes(results))


def test_few_pairs_say_nothing() -> None:
    for n in (1, 2, FEW - 1):
        table = effects(results_of(toy(n=n)[0]), PAIR)
        assert set(table["verdict"]) == {NONE}
        assert "nothing to say" in first(table)[0][1]
    assert HELPS in set(effects(results_of(toy(n=FEW)[0]), PAIR)["verdict"])


def many(seed: int, count: int = 10, n: int = 6) -> tuple[Results, tuple[Trick, ...]]:
    """Tricks that do nothing."""
    random = np.random.default_rng(seed)
    null = tuple(Trick(f"t{i}", "", "", {"clip": float(i + 1)}, tasks=(DIABETES,)) for i in range(count))
    scores = random.standard_normal((count + 1, n))
    rows = [r for own, name in zip(scores, (SIMPLE, *(t.name for t in null)), strict=True)
            for r in rows_of(DIABETES, name, own)]  # fmt: skip
    return results_of(rows), null


@pytest.mark.slow
def test_chance_is_called_an_effect_rarely() -> None:
    """In at most 5 % of the suites whose tricks all do nothing; without the correction it would be far more."""
    wrong, plain, runs = 0, 0, 100
    for seed in range(runs):
        table = effects(*many(seed))
        wrong += bool(table["verdict"].isin([HELPS, HARMS]).any())
        plain += bool((table["p"] <= LEVEL).any())
    error = (LEVEL * (1 - LEVEL) / runs) ** 0.5
    assert wrong / runs < LEVEL + 4.5 * error
    assert plain / runs > LEVEL + 4.5 * error  # the mutant


def test_time_ratios_are_those_of_training() -> None:
    rows, _ = toy()
    spent = [4.0 if row["guide"] == "good" else 2.0 for row in rows]
    costs = [{"key": f"k{i}", "training_cpu_seconds": value} for i, value in enumerate(spent)]
    table = effects(results_of(rows, costs), PAIR).set_index("trick")
    assert table["time"]["good"] == pytest.approx(2.0) and table["time"]["idle"] == pytest.approx(1.0)
    short = [{"key": f"k{i}", "training_cpu_seconds": value / 100} for i, value in enumerate(spent)]
    assert effects(results_of(rows, short), PAIR)["time"].isna().all()  # the first call of a process would be in it
    assert "2 times the CPU time" in dict(first(effects(results_of(rows, costs), PAIR)))[DIABETES]


# ------------------------------------------------------------------------------------------ known effects, trained

SMALL = {"steps": 30, "draws": 20, "compile": False}
KNOWN = (
    Trick("steps a hundred times smaller", "", "", {"lr": 2e-5}, tasks=(DIGITS,)),
    Trick("idle", "", "", {"clip": 1e6}, tasks=(DIGITS,)),
    Trick(CONTROL, "", "", {"seed_shift": 1000}, tasks=(DIGITS,)),
)


@pytest.mark.slow
def test_a_known_effect_is_found_and_none_is_not() -> None:
    rows = []
    for name, settings in variants(DIGITS, KNOWN).items():
        cells = [Cell(DIGITS, name, k, {**settings, **SMALL}) for k in range(FEW)]
        found = tricks.run(cells)
        rows += [{"task": DIGITS, "guide": name, "split": k, "score": r["score"]} for k, r in enumerate(found)]
    table = effects(results_of(rows), KNOWN).set_index("trick")
    slow = table.loc["steps a hundred times smaller"]
    assert slow["verdict"] == HARMS and slow["effect"] < -3
    assert table["effect"]["idle"] == 0.0 and table["se"]["idle"] == 0.0  # the pairs are pairs: the same numbers
    assert table["verdict"]["idle"] == OPEN
    assert table["verdict"][CONTROL] in (OPEN, LEANS) and table["se"][CONTROL] > 0


# ------------------------------------------------------------------------------------------------------- words


def said(**options: Any) -> dict[str, str]:
    return dict(first(effects(results_of(toy(**options)[0]), PAIR)))


def test_what_to_do_first_follows_the_numbers() -> None:
    good = said()[DIABETES]
    assert re.match(r"first good \(\+0\.\d+ ± 0\.\d+\); no effect seen: idle$", good)
    assert re.match(r"nothing is secured to help; leave out good \(-0\.\d+", said(gain=-0.5)[DIABETES])
    assert said(seed=1, gain=0.0)[DIABETES] == "nothing is secured to help; no effect seen: good and idle"
    both = Trick("twice", "", "", {"clip": 1.0}, tasks=(DIGITS, DIABETES))
    for signs, title in (((1, 1), "helps on both"), ((-1, -1), "harms both"), ((1, -1), "helps one")):
        rows, _ = toy()
        rows = [r for sign, task in zip(signs, both.tasks, strict=True) for name, gain in ((SIMPLE, 0), ("twice", sign))
                for r in rows_of(task, name, [r["score"] + gain for r in rows if r["guide"] == SIMPLE])]  # fmt: skip
        rows = [{**r, "score": r["score"] + 0.01 * (r["split"] if r["guide"] == "twice" else 0)} for r in rows]
        told = dict(first(effects(results_of(rows), (both,))))
        assert (
            [name for name, text in told.items() if text == "twice"] == [n for n in told if n.startswith(title)] != []
        )


def full(budget: str = "short") -> Results:
    """Numbers for every cell of a budget: one huge effect, one that harms, the rest chance."""
    random, rows = np.random.default_rng(0), []
    for task in tricks.STEPS:
        for name in variants(task):
            gain = {"output bias from data": 1.0, "learning-rate decay": -0.8, "noise scale learned: off": -300.0}
            rows += rows_of(task, name, -20 + gain.get(name, 0.0) + 0.1 * random.standard_normal(8))
    return results_of(rows)


def test_the_figure_has_every_trick_and_keeps_its_axis() -> None:
    table = effects(full())
    ((name, _, text, figure),) = figures(table)
    assert name == "tricks" and "standard errors" in text and len(figure.axes) == 4
    labels = [t.get_text() for axes in figure.axes for t in axes.get_yticklabels()]
    assert len(labels) == len(table) == 28
    frey = next(a for a in figure.axes if a.get_title(loc="left") == FREY)
    assert frey.get_xlim()[1] < 10 and any(re.search("299|300", t.get_text()) for t in frey.texts)


def test_tables_are_ordered_by_effect() -> None:
    (chapter,) = tricks_effects.story(full())
    assert chapter.table is not None and len(chapter.table) == 28
    values = [float(cell.split(" ")[0]) for cell in chapter.table["effect, nats"]]
    assert values == sorted(values, reverse=True) and values[0] > 200
    told = dict(chapter.says)
    assert told[FREY].startswith("first noise scale learned (+") and "leave out learning-rate decay" in told[YACHT]
    assert "another seed" not in told[YACHT] and YACHT in told["chance alone"]
    assert list(tricks_effects.tables(full())["The tricks"]["trick"]) == [t.name for t in TRICKS]


# ------------------------------------------------------------------------------------------------- with the runner


def run(folder: Path, *filters: str) -> Results:
    return run_suite("tricks", folder, budget="smoke", filters=filters, progress=False)


def test_one_model_through_the_runner(tmp_path: Path) -> None:
    results = run(tmp_path / "out", f"task={DIABETES}")
    assert len(results.good) == 2 * len(variants(DIABETES)) and results.rows["score"].notna().all()
    table = effects(results)
    assert set(zip(table["trick"], table["model"], strict=True)) == {
        (t.name, DIABETES) for t in TRICKS if DIABETES in t.tasks
    }
    page = write_report(make_report(tmp_path / "out"), tmp_path / "report")
    for text in (page.read_text(), (page.with_suffix(".md")).read_text()):
        place = text.index("What to do first")
        assert "nothing to say" in text and "Neal, Bayesian Learning" in text
        assert place < text.index("difference to best")  # before the tables of the models
    again = make_report(tmp_path / "report")  # committed rows: no cells
    assert again.markdown() == make_report(tmp_path / "out").markdown()


def test_models_without_data_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise DataError("put the file there")

    monkeypatch.setattr(dgm, "load", missing)
    with pytest.raises(DataError, match="put the file"):
        tricks.ready(YACHT)


@pytest.mark.slow
def test_smoke_runs_everything(tmp_path: Path) -> None:
    try:
        for task in tricks.STEPS:
            tricks.ready(task)
    except DataError as error:
        pytest.skip(str(error))
    results = run(tmp_path / "out")
    assert len(results.failed) == 0 and results.missing == 0
    assert results.costs["job_cpu_seconds"].sum() < 40
    assert len(effects(results)) == sum(len(t.tasks) for t in TRICKS)
