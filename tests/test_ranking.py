"""Ranks: simulated comparisons of known truth, where no statement may be wrong more often than it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import stdtr
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from dgm.bounds import clustered_interval
from dgm.pairs import LEVEL, _satterthwaite, pair_p_values, pairwise, rank_intervals
from dgm.rank_tests import holm
from dgm.ranking import rank, statement, tiers
from dgm.tables import format_table, verdict

Squares = tuple[np.ndarray, ...]


def scores(
    rng: np.random.Generator, means: Any, seeds: int, data: int, sd: Any = (0.3, 0.5, 0.5), times: int = 1
) -> np.ndarray:
    """Crossed random effects: (times, K, R, N) = mean + seed + datum + rest, and a datum shared by all."""
    k, (a, b, c) = len(means), (np.asarray(s, dtype=float).reshape(-1, 1, 1) for s in sd)
    x = np.asarray(means, dtype=float)[:, None, None] + 3.0 * rng.normal(size=(times, 1, 1, data))
    x = x + a * rng.normal(size=(times, k, seeds, 1)) + b * rng.normal(size=(times, k, 1, data))
    return x + c * rng.normal(size=(times, k, seeds, data))


def squares(x: np.ndarray) -> Squares:
    """Mean squares of all pairs, (times, P) each, as `pair_p_values` takes them."""
    _, k, r, n = x.shape
    i, j = np.triu_indices(k, 1)
    d = x[:, i] - x[:, j]
    rows, columns = d.mean(3), d.mean(2)
    mean = rows.mean(2)
    rest = d - rows[..., None] - columns[:, :, None] + mean[..., None, None]
    size = np.ones_like(mean)
    residual = (rest**2).sum((2, 3)) / max((r - 1) * (n - 1), 1)
    seeds = n * rows.var(2, ddof=1) if r > 1 else np.nan * mean
    return mean, seeds, r * columns.var(2, ddof=1), residual, r * size, n * size


def error_rate(x: np.ndarray, p_values: Callable[..., np.ndarray] = pair_p_values, corrected: bool = True) -> float:
    """How often any of equal guides is said to be better than another."""
    wrong = [
        (holm(p) if corrected else p).min() <= LEVEL
        for p in (p_values(*parts) for parts in zip(*squares(x), strict=True))
    ]
    return float(np.mean(wrong))


def rows_of(per_datum: dict[str, np.ndarray], failed: dict[str, str] | None = None) -> pd.DataFrame:
    rows = [
        {"guide": g, "seed": r, "status": "ok", "bound": v[r].mean()}
        for g, v in per_datum.items()
        for r in range(len(v))
    ]
    rows += [{"guide": g, "seed": 0, "status": s, "bound": math.nan} for g, s in (failed or {}).items()]
    return pd.DataFrame(rows)


def named(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"fghijk"[i]: v for i, v in enumerate(x)}


# ---------------------------------------------------------------- no statement without ground

SD = {
    "seeds": (1.0, 0.3, 1.0),
    "moderate": (0.3, 0.3, 1.0),
    "data": (0.05, 1.0, 1.0),
    "rest": (0.0, 0.0, 1.0),
    "one unstable": ([1.5, 0.3, 0.3, 0.3], 0.3, 1.0),
    "half unstable": ([1.5, 1.5, 0.3, 0.3], 0.3, 1.0),
}
LIMIT = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 400)


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("case", SD)
def test_equal_guides_are_told_apart_in_five_percent_of_comparisons_at_most(case: str, seeds: int) -> None:
    x = scores(np.random.default_rng(seeds), [0.0] * 4, seeds, 40, SD[case], times=400)
    assert error_rate(x) <= LIMIT


def test_two_equal_guides() -> None:
    x = scores(np.random.default_rng(0), [0.0] * 2, 3, 40, SD["moderate"], times=400)
    assert error_rate(x) <= LIMIT


def test_partly_equal_guides_keep_their_error_rate() -> None:
    """Two groups far apart: only the statements within a group can be wrong."""
    x = scores(np.random.default_rng(0), [9.0, 9.0, 0.0, 0.0], 4, 40, SD["moderate"], times=400)
    within = [0, 5]  # of the pairs 01 02 03 12 13 23
    wrong = [holm(pair_p_values(*parts))[within].min() <= LEVEL for parts in zip(*squares(x), strict=True)]
    assert np.mean(wrong) <= LIMIT


def only_data(
    mean: np.ndarray, seeds: np.ndarray, data: np.ndarray, _: Any, r: np.ndarray, n: np.ndarray
) -> np.ndarray:
    return 2 * stdtr(n - 1, -np.abs(mean) / np.sqrt(data / (r * n)))


@pytest.mark.parametrize(("p_values", "corrected"), [(pair_p_values, False), (_satterthwaite, True), (only_data, True)])
def test_mutants_tell_equal_guides_apart(p_values: Callable[..., np.ndarray], corrected: bool) -> None:
    """Uncorrected; with seeds that agree by chance taken at their word; blind to the chance of training."""
    x = scores(np.random.default_rng(0), [0.0] * 6, 2, 40, SD["moderate" if corrected else "data"], times=400)
    assert error_rate(x, p_values, corrected) > LIMIT + 0.03


def test_differences_that_are_there_are_found() -> None:
    """0.5 nats, with a standard error of 0.12 from 10 seeds and 300 data: nearly always; with 2 seeds hardly ever."""
    means, sd = [0.5, 0.0, 0.0], (0.2, 0.5, 0.5)
    found = {}
    for seeds in (2, 5, 10):
        x = scores(np.random.default_rng(0), means, seeds, 300, sd, times=60)
        found[seeds] = np.mean([holm(pair_p_values(*p))[0] <= LEVEL for p in zip(*squares(x), strict=True)])
    assert found[10] > 0.9 and found[2] < found[5] < found[10]


@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_of_differences_cover_the_truth(seeds: int) -> None:
    x = scores(np.random.default_rng(seeds), [1.0, 0.0], seeds, 50, (0.3, 0.5, 0.5), times=200)
    inside = narrow = 0
    for both in x:
        pair = pairwise(rows_of(named(both)), named(both)).iloc[0]
        inside += pair["low"] <= 1.0 <= pair["high"]
        narrow += abs(pair["difference"] - 1.0) < (pair["high"] - pair["low"]) / 6
    assert 0.90 <= inside / 200 <= 0.99
    assert narrow / 200 < 0.85  # the mutant: a third of the width


def test_rank_intervals_hold_the_true_ranks() -> None:
    x = scores(np.random.default_rng(0), [0.6, 0.5, 0.1, 0.0], 4, 100, (0.1, 0.5, 0.5), times=80)
    right, width = 0, 0
    for one in x:
        per_datum = named(one)
        table = rank_intervals(pairwise(rows_of(per_datum), per_datum), list("fghi"))
        right += bool(((table["rank_low"] <= [1, 2, 3, 4]) & (table["rank_high"] >= [1, 2, 3, 4])).all())
        width += (table["rank_high"] - table["rank_low"]).sum()
    assert right / 80 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 80)
    assert width / (80 * 4) < 2.5  # they say something: all ranks would be 3


# ---------------------------------------------------------------- exact cases


def test_one_seed_is_students_test_of_the_data() -> None:
    x = scores(np.random.default_rng(0), [0.2, 0.0, 0.1], 1, 30)[0]
    pairs = pairwise(rows_of(named(x)), named(x))
    theirs = [ttest_1samp((named(x)[a] - named(x)[b])[0], 0.0).pvalue for a, b in zip(pairs.a, pairs.b, strict=True)]
    assert pairs["p"].tolist() == pytest.approx(theirs)
    one = pair_p_values(*(np.array([v]) for v in (1.0, math.nan, math.nan, math.nan, 1.0, 1.0)))
    assert math.isnan(one[0])


def test_holm_refuses_step_by_step_and_leaves_out_what_cannot_be_tested() -> None:
    p = np.random.default_rng(0).random(9) ** 3
    for level in (0.001, 0.01, 0.05, 0.2):
        refused, left = set(), list(np.argsort(p))
        while left and p[left[0]] <= level / len(left):
            refused.add(left.pop(0))
        assert set(np.flatnonzero(holm(p) <= level)) == refused
    assert holm(np.array([0.02, 0.02, 0.5])).tolist() == pytest.approx([0.06, 0.06, 0.5])
    assert holm(np.array([0.01, math.nan, 0.02])).tolist()[::2] == pytest.approx([0.02, 0.02])
    assert len(holm(np.zeros(0))) == 0


def test_p_values_and_intervals_by_hand() -> None:
    x = scores(np.random.default_rng(0), [0.3, 0.0], 3, 20)[0]
    pair = pairwise(rows_of(named(x)), named(x)).iloc[0]
    assert (pair["low"], pair["high"]) == clustered_interval(*(torch.as_tensor(v) for v in x))
    mean, seeds, data, *_ = (v[0, 0] for v in squares(x[None]))
    t = student.ppf(pair["p"] / 2, [2, 19])
    assert mean**2 * 60 == pytest.approx(t[0] ** 2 * seeds + t[1] ** 2 * data, rel=1e-6)


def test_guides_that_are_the_same_tie_with_certainty() -> None:
    for seeds in (1, 2, 5):
        v = scores(np.random.default_rng(seeds), [0.0], seeds, 10)[0, 0]
        table = rank(rows_of({"f": v, "g": v.copy()}), {"f": v, "g": v.copy()}, "bound")
        assert table["tie"].tolist() == [False, True] and table["rank_high"].tolist() == [2, 2]
        pairs = pairwise(rows_of({"f": v, "g": v}), {"f": v, "g": v})
        assert pairs["p"].tolist() == [1.0] and pairs["difference_se"].tolist() == [0.0]
        assert statement(rows_of({"f": v, "g": v}), {"f": v, "g": v}).startswith("f and g tie. ")


def test_a_difference_without_any_chance_is_certain() -> None:
    v = np.arange(12.0).reshape(3, 4)
    pairs = pairwise(rows_of({"f": v, "g": v - 1e-6}), {"f": v, "g": v - 1e-6})
    assert pairs["better"].tolist() == ["f"] and pairs["p"].iloc[0] < 1e-6


def test_ties_and_ranks_say_the_same() -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        per_datum = named(scores(rng, rng.normal(0, 0.5, 4), 3, 50)[0])
        rows = rows_of(per_datum)
        table = rank(rows, per_datum, "bound")
        pairs = pairwise(rows, per_datum)
        for place, (g, row) in enumerate(table.iterrows()):
            assert row["tie"] == (place > 0 and row["rank_low"] == 1)
            assert row["rank_low"] <= place + 1 <= row["rank_high"]
            beaten = ((pairs["better"] != "") & (pairs["better"] != g) & ((pairs["a"] == g) | (pairs["b"] == g))).sum()
            assert row["rank_low"] == 1 + beaten
        groups = tiers(table)
        assert [g for group in groups for g in group] == list(table.index)


# ---------------------------------------------------------------- what is missing


def test_guides_without_a_score_come_last_and_have_no_rank() -> None:
    good = named(scores(np.random.default_rng(0), [0.0, -9.0], 3, 40)[0])
    nothing, zero = np.full((3, 40), math.nan), good["f"].copy()
    zero[1, 7] = -math.inf  # one datum that the guide gives no weight
    per_datum = {"nan": nothing, "inf": -zero, "zero": zero, **good}
    rows = rows_of(per_datum, {"broken": "TrainingError: NaN"})
    table = rank(rows, per_datum, "bound")
    assert list(table.index[:2]) == ["f", "g"] and table["rank_low"].tolist()[:2] == [1, 2]
    assert table.iloc[2:][["rank_low", "rank_high", "difference", "difference_se", "bound_se"]].isna().all().all()
    assert not table["tie"].any() and set(table.index) == {"f", "g", "nan", "inf", "zero", "broken"}
    said = statement(rows, per_datum)
    assert said.startswith("f is best; then g. ") and "Without a finite score: " in said and "broken" in said
    text = format_table(table, {}, rows)
    assert "rank" in text.splitlines()[1] and "–" in text.splitlines()[-2]


def test_nothing_and_one() -> None:
    v = np.zeros((2, 3))
    broken = rows_of({}, {"f": "NaN", "g": "NaN"})
    assert statement(broken, {}) == "No guide finished with a finite score."
    assert rank(broken, {}, "bound")["rank_low"].isna().all()
    rows = rows_of({"f": v}, {"g": "NaN"})
    table = rank(rows, {"f": v}, "bound")
    assert table.loc["f", ["rank_low", "rank_high", "difference"]].tolist() == [1, 1, 0]
    assert statement(rows, {"f": v}).startswith("Only f finished")


def test_only_seeds_that_both_finished_are_compared() -> None:
    v = scores(np.random.default_rng(0), [0.0, -1.0], 4, 30)[0]
    rows = rows_of(named(v))
    lost = (rows["guide"] == "f") & rows["seed"].isin([1, 3])
    rows.loc[lost, ["status", "bound"]] = ["TrainingError: NaN", math.nan]
    pairs = pairwise(rows, {"f": v[0][[0, 2]], "g": v[1]})
    whole = pairwise(rows_of(named(v[:, [0, 2]])), named(v[:, [0, 2]]))
    assert pairs.drop(columns="seeds").equals(whole.drop(columns="seeds")) and pairs["seeds"].tolist() == [2]
    rows.loc[(rows["guide"] == "g") & rows["seed"].isin([0, 2]), "status"] = "TrainingError: NaN"
    per_datum = {"f": v[0][[0, 2]], "g": v[1][[1, 3]]}
    assert len(pairwise(rows, per_datum)) == 0  # no seed in common: nothing can be said
    assert rank(rows, per_datum, "bound")["rank_high"].tolist() == [2, 2]


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("means", "sentence"),
    [
        ([9, 0, 0, 0], "f is best; then g, h and i, which tie."),
        ([0, 0, -9, -20], "f and g tie for the first place; then h; then i."),
        ([0, 0, 0, 0], "f, g, h and i tie."),
        ([20, 9, 0, -9], "f is best; then g; then h; then i."),
    ],
)
def test_sentences(means: list[float], sentence: str) -> None:
    rng = np.random.default_rng(0)
    v = scores(rng, means, 3, 40)[0]
    per_datum = dict(zip("fghi", v, strict=True))
    for i in range(1, 4):  # ties that are certain
        if means[i] == means[i - 1]:
            per_datum["fghi"[i]] = per_datum["fghi"[i - 1]].copy()
    said = statement(rows_of(per_datum), per_datum)
    assert said.startswith(
        f"{sentence} This rests on 3 seeds and 40 held-out data, paired, and on Holm's correction over 6"
    )
    one = {g: v[:1] for g, v in per_datum.items()}
    assert "With one seed only the chance of the data is counted" in statement(rows_of(one), one)


def test_an_order_that_is_no_chain_is_said() -> None:
    """f beats h, and g lies between them: neither tie is an equality."""
    rng = np.random.default_rng(0)
    e = 0.4 * rng.normal(size=(3, 6, 100))
    v = np.stack([0.05 + e[0], 0.0 + 4 * e[1], -0.05 + e[2]])
    v = v - v.mean((1, 2), keepdims=True) + np.array([0.15, 0.0, -0.15])[:, None, None]
    per_datum = named(v)
    table = rank(rows_of(per_datum), per_datum, "bound")
    assert table["rank_low"].tolist() == [1, 1, 2] and table["rank_high"].tolist() == [2, 3, 3]
    said = statement(rows_of(per_datum), per_datum)
    assert said.startswith("Of f, g and h f beats h, and no other order survives.")
    assert "g ties with it" in verdict(table, {}).striptags()


def test_long_lists_are_cut() -> None:
    v = scores(np.random.default_rng(0), [0.0], 2, 10)[0, 0]
    per_datum = {f"guide {i}": v for i in range(9)}
    said = statement(rows_of(per_datum), per_datum)
    assert said.startswith("guide 0, guide 1, guide 2, guide 3 and 5 others tie.") and "over 36 pairs" in said


def test_no_pairs() -> None:
    pairs = pairwise(pd.DataFrame({"guide": [], "seed": [], "status": []}), {})
    assert list(pairs.columns[-3:]) == ["p", "p_holm", "better"] and len(pairs) == 0
    assert rank_intervals(pairs, ["f", "g"]).to_numpy().tolist() == [[1, 2], [1, 2]]
