"""Tables of a suite's report: guides ranked on each task, published numbers beside them, verdicts, provenance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .bench_cells import Metric
from .bench_registry import Published, means_of
from .bench_results import Results
from .pairs import rank_cells
from .ranking import rank
from .style import limit, share, shorten
from .tables import digits_of, with_errors

__all__ = ["LONG", "Table", "check_table", "failed_table", "frame_table", "markdown", "ranked", "tally", "task_table"]

LONG = 30
"""Rows of a table that is folded when it has more."""
WORDS = re.compile(r"\s*[^\W\d_]{2}")


@dataclass(frozen=True)
class Table:
    """A table as text: the same for Markdown and HTML."""

    title: str
    text: str
    heads: list[str]
    rows: list[list[str]]

    @property
    def words(self) -> list[int]:
        """Columns of words, which stand to the left: the first, and those where most cells begin with one."""
        counts = [sum(bool(WORDS.match(row[i])) for row in self.rows) for i in range(len(self.heads))]
        return [i for i, count in enumerate(counts) if i == 0 or 2 * count > len(self.rows)]


def markdown(table: Table) -> str:
    """As Markdown; long tables are folded.

    >>> print(markdown(Table("T", "", ["a", "b"], [["x|y", "1"]])))
    ### T
    <BLANKLINE>
    | a | b |
    |---|---|
    | x\\|y | 1 |
    """
    safe = [[cell.strip().replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in table.rows]
    lines = [f"### {table.title}", ""]
    lines += [table.text, ""] if table.text else []
    long = len(table.rows) > LONG
    lines += [f"<details><summary>{len(table.rows)} rows</summary>", ""] if long else []
    lines += ["| " + " | ".join(table.heads) + " |", "|" + "---|" * len(table.heads)]
    lines += ["| " + " | ".join(row) + " |" for row in safe]
    return "\n".join([*lines, "", "</details>"] if long else lines)


def ranked(results: Results, task: str) -> pd.DataFrame:
    """Guides of a task, best first by the first metric, with paired differences and the ranks that survive.

    Repeats are paired: the same seed or split of two guides; so are held-out data, where rows have the array
    `per_datum`. Scores that are better when low are turned for `dgm.ranking.rank`, and turned back.
    """
    suite, score = results.suite, results.suite.metrics[0]
    if results.ranks is not None:
        return results.ranks[results.ranks["task"] == task].drop(columns="task").set_index("guide")
    part = results.rows[results.rows["task"] == task]
    sign = -1.0 if score.better == "lower" else 1.0
    good = part[part["status"] == "ok"]
    values = pd.to_numeric(good.get(score.name, pd.Series(dtype=float)), errors="coerce").astype(float)
    values = values.reindex(good.index)
    rows = pd.DataFrame(
        {"guide": part["guide"].astype(str), "seed": part[suite.repeats], "status": part["status"]}
    ).assign(bound=sign * values)
    scores = {
        str(guide): sign * _scores(results, list(own["key"]), values[own.index])
        for guide, own in good.groupby("guide", sort=False)
    }
    if len({s.shape[1] for s in scores.values()}) > 1:  # data of some guides only: repeats alone are paired
        scores = {guide: s.mean(1, keepdims=True) for guide, s in scores.items()}
    table = rank(rows, scores, "bound")
    for name in ("bound", "difference"):
        if name in table:
            table[name] *= sign
    return table


def _scores(results: Results, keys: Sequence[str], values: pd.Series) -> np.ndarray:
    """(repeats, data), or (repeats, 1)."""
    found = [results.arrays(key).get("per_datum") for key in keys]
    if len(found) and all(f is not None and f.shape == found[0].shape for f in found):  # type: ignore[union-attr]
        return np.stack(found).astype(float)  # type: ignore[arg-type]
    return values.to_numpy()[:, None]


def task_table(results: Results, task: str, numbers: Sequence[Published]) -> Table:
    """One task: guides ranked, and below them what is published."""
    suite, first = results.suite, results.suite.metrics[0]
    table = ranked(results, task)
    order = [str(g) for g in table.index]
    part = results.rows[results.rows["task"] == task]
    means = means_of(part, [m.name for m in suite.metrics]).set_index(["metric", "guide"])
    heads, columns = ["guide"], [[shorten(g, 60) for g in order]]
    errors = bool((table.get("difference_se", pd.Series(dtype=float)).fillna(0) > 0).any())
    if errors and first.better is not None and len(order) > 1:
        heads.append("rank")
        columns.append(rank_cells(table))
    shown = [m for m in suite.metrics if m.name in set(means.index.get_level_values(0))]
    for metric in shown:
        own = means.loc[metric.name].reindex(order)
        heads.append(metric.title)
        columns.append(_cells(own["value"], own["se"], metric))
        if metric is first and errors and first.better is not None:
            heads.append("difference to best")
            columns.append(_differences(table))
    costs = _costs(results, part, order)
    if costs is not None:
        heads.append("CPU s")
        columns.append(costs)
    runs = table["runs"].to_numpy()
    if len(set(runs)) > 1:
        heads.append("runs")
        columns.append([f"{n:.0f}" for n in runs])
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows += _published_rows([p for p in numbers if p.task == task], shown, heads)
    return Table(task, "", heads, rows)


def _cells(values: pd.Series, errors: pd.Series, metric: Metric) -> list[str]:
    if metric.name.startswith(("coverage", "share")):
        return ["–" if pd.isna(v) else share(float(v)) for v in values]
    finite = values[np.isfinite(values)]
    digits = digits_of(errors)
    if not (errors > 0).any():
        typical = float(finite.abs().median()) if len(finite) else 1.0
        digits = int(np.clip(2 - np.floor(np.log10(max(typical, 1e-9))), 0, 5))
    return with_errors(values.astype(float), errors.astype(float), digits)


def _differences(table: pd.DataFrame) -> list[str]:
    value, error = table["difference"].astype(float), table["difference_se"].astype(float)
    texts = with_errors(value, error, digits_of(error[error > 0], 1.0))
    cells = [
        "·" if i == 0 else text.strip() + (" (tie)" if tie else "")
        for i, (text, tie) in enumerate(zip(texts, table["tie"], strict=True))
    ]
    return cells


def _costs(results: Results, part: pd.DataFrame, order: Sequence[str]) -> list[str] | None:
    costs = results.costs
    if not len(costs) or "job_cpu_seconds" not in costs:
        return None
    own = part[["key", "guide"]].merge(costs[["key", "job_cpu_seconds"]], on="key")
    mean = own.groupby("guide")["job_cpu_seconds"].mean().reindex(list(order))
    return ["–" if pd.isna(v) else limit(v) if v < 10 else f"{v:.0f}" for v in mean]


def _published_rows(numbers: Sequence[Published], shown: Sequence[Metric], heads: Sequence[str]) -> list[list[str]]:
    rows = []
    for method in dict.fromkeys(p.method for p in numbers):
        own = {p.metric: p for p in numbers if p.method == method}
        if not any(m.name in own for m in shown):
            continue
        row = [""] * len(heads)
        mark = next(iter(own.values())).tag
        row[0] = f"published: {method} [{mark}]"
        for metric in shown:
            if metric.name in own:
                row[heads.index(metric.title)] = str(own[metric.name])
        rows.append(row)
    return rows


def check_table(found: pd.DataFrame) -> Table:
    """Obtained beside published, where a guide has a published counterpart."""
    rows: list[list[str]] = []
    row: Any
    for row in found[found["counterpart"]].itertuples():
        digits = max(2, digits_of(pd.Series([row.obtained_se])))
        error = "" if np.isnan(row.obtained_se) else f" ± {row.obtained_se:.{digits}f}"
        rows.append(
            [
                str(row.task), str(row.guide), str(row.metric).replace("_", " "), f"{row.obtained:.{digits}f}{error}",
                f"{row.method} [{row.tag}]", str(row.published), f"{row.difference:+.{digits}f}",
                f"{row.tolerance:.{digits}f}", str(row.verdict),
            ]
        )  # fmt: skip
    heads = ["task", "guide", "metric", "obtained", "method", "published", "difference", "tolerance", "verdict"]
    text = (
        "Agree: the difference is within two standard errors of both and the rounding of the published number, or "
        "within the tolerance that the registry states. Beat, miss: better or worse by more. [V] read in the source, "
        "[S] second-hand. Protocols differ: see below."
    )
    return Table("Obtained and published", text, heads, rows)


def tally(found: pd.DataFrame) -> Table:
    """How often each guide beats, meets and misses each published method, over tasks and metrics."""
    methods = list(dict.fromkeys(found["method"]))
    rows = []
    for guide in dict.fromkeys(found["guide"]):
        row = [str(guide)]
        for method in methods:
            own = found[(found["guide"] == guide) & (found["method"] == method)]["verdict"]
            row.append("/".join(str(int((own == v).sum())) for v in ("beat", "agree", "miss")) if len(own) else "")
        rows.append(row)
    return Table(
        "Every guide against every published method",
        "Tasks and metrics with beat/agree/miss.",
        ["guide", *methods],
        rows,
    )


def frame_table(title: str, frame: pd.DataFrame, text: str = "") -> Table:
    """A frame as it stands, numbers in four digits."""
    return Table(
        title, text, [str(c).replace("_", " ") for c in frame], [[_text(v) for v in row] for row in frame.values]
    )


def failed_table(results: Results) -> Table:
    """Rows that failed, and what was skipped."""
    repeats = results.suite.repeats
    rows = [
        [str(r["task"]), str(r["guide"]), str(r[repeats]), shorten(r["status"], 300)]
        for _, r in results.failed.iterrows()
    ]
    rows += [[task, "all", "all", f"skipped: {shorten(why, 300)}"] for task, why in results.skipped.items()]
    return Table("Cells without a number", "", ["task", "guide", repeats, "why"], rows)


def _text(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return "–" if np.isnan(value) else f"{value:.4g}"
    return "yes" if value is True or value is np.True_ else "no" if value is False or value is np.False_ else str(value)
