"""Published numbers, and which of our rows agree with them: value, error and its kind, source, protocol, certainty.

The file is `benchmarks/published.json`. A row of it is one method of one source with a value for each task; only
numbers that were read in the source (tag "V") or that a named second source quotes ("S") may stand there.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .bench_cells import Metric
from .errors import DataError

__all__ = ["TAGS", "Published", "check", "means_of", "published"]

TAGS = {"V": "read in the source", "S": "second-hand"}
KINDS = ("standard error", "standard deviation", None)
WIDTH = 2.0
"""Standard errors of a difference that count as agreement."""


@dataclass(frozen=True)
class Published:
    """One published number.

    error, kind: as printed, "standard error" or "standard deviation" over `repeats`. decimals: it is rounded to.
    guides: ours that it is the counterpart of. tolerance: in place of the one that follows from the errors. tag: "V" or
    "S".
    """

    suite: str
    task: str
    metric: str
    method: str
    value: float
    better: str
    unit: str
    source: str
    protocol: str
    tag: str
    error: float | None = None
    kind: str | None = None
    repeats: int | None = None
    decimals: int = 2
    guides: tuple[str, ...] = ()
    tolerance: float | None = None

    @property
    def standard_error(self) -> float:
        """Of the value: a deviation is divided by the root of the number of repeats, where that is known."""
        if self.error is None:
            return 0.0
        if self.kind == "standard deviation" and self.repeats:
            return self.error / math.sqrt(self.repeats)
        return self.error

    def __str__(self) -> str:
        text = f"{self.value:.{self.decimals}f}"
        if self.error is None:
            return text
        return f"{text} ± {self.error:.{self.decimals}f}" + (" (sd)" if self.kind == "standard deviation" else "")


def published(suite: str | None = None, path: Path | None = None) -> list[Published]:
    """The registry, or its part of one suite.

    Raises:
        DataError: a row is incomplete, has a tag other than "V" and "S", or an error of no known kind.

    >>> boston = [p for p in published("uci") if p.task == "uci-boston" and p.method == "PBP"]
    >>> [str(p) for p in boston]
    ['3.01 ± 0.18', '-2.57 ± 0.09']
    """
    if path is None:
        path = Path(next(iter(importlib.import_module("dgm.benchmarks").__path__))) / "published.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the registry of published numbers {path} cannot be read: {error}") from error
    return [one for row in rows for one in _entries(row) if suite is None or one.suite == suite]


def _entries(row: Mapping[str, Any]) -> Iterable[Published]:
    name = f"published number of {row.get('method')!r} ({row.get('metric')!r})"
    if row.get("tag") not in TAGS:
        raise DataError(f"{name}: its tag is {row.get('tag')!r}; only {' and '.join(map(repr, TAGS))} may be printed")
    if row.get("error_kind") not in KINDS:
        raise DataError(f"{name}: its error is of the kind {row.get('error_kind')!r}, expected one of {KINDS}")
    try:
        for task, (value, *error) in row["values"].items():
            if error and row["error_kind"] is None:
                raise DataError(f"{name}, {task}: an error without its kind")
            repeats = row["repeats"]
            yield Published(
                row["suite"], task, row["metric"], row["method"], float(value), row["better"], row["unit"],
                row["source"], row["protocol"], row["tag"], float(error[0]) if error else None, row["error_kind"],
                repeats.get(task, repeats.get("*")) if isinstance(repeats, Mapping) else repeats,
                int(row["decimals"]), tuple(row["guides"]), row.get("tolerance"),
            )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} is incomplete or misshapen: {type(error).__name__}: {error}") from error


def means_of(rows: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Mean and standard error over repeats of each metric: columns task, guide, metric, value, se, repeats.

    >>> rows = pd.DataFrame({"task": "t", "guide": "g", "status": "ok", "rmse": [1.0, 3.0]})
    >>> means_of(rows, ["rmse"]).values.tolist()
    [['t', 'g', 'rmse', 2.0, 1.0, 2]]
    """
    columns = ["task", "guide", "metric", "value", "se", "repeats"]
    found = []
    good = rows[rows["status"] == "ok"] if len(rows) else rows
    for (task, guide), part in good.groupby(["task", "guide"], sort=False):
        for name in metrics:
            if name not in part:
                continue
            values: Any = pd.to_numeric(part[name], errors="coerce").astype(float).dropna()
            if len(values):
                found.append((task, guide, name, float(values.mean()), float(values.sem()), len(values)))
    return pd.DataFrame(found, columns=columns)


def check(
    rows: pd.DataFrame, suite: str, metrics: Iterable[Metric], known: Iterable[Published] | None = None
) -> pd.DataFrame:
    r"""Each of our means beside each published number of its task and metric: agree, beat or miss.

    .. math:: |d| \le 2 \sqrt{\mathrm{se}_{ours}^2 + \mathrm{se}_{theirs}^2} + \tfrac12 10^{-\text{decimals}}

    is agreement, where the registry gives no tolerance of its own; better by more is a beat, worse by more a miss. A
    single repeat of ours has no standard error and counts as if it were exact, which the column `repeats` tells.

    Returns:
        columns task, guide, metric, obtained, obtained_se, repeats, method, counterpart (whether the method is of the
        guide's kind), published, published_se, difference (ours - theirs), tolerance, verdict, tag, source, protocol.

    >>> rows = pd.DataFrame({"task": "uci-yacht", "guide": "dropout", "status": "ok", "rmse": [0.5, 0.6, 0.7]})
    >>> found = check(rows, "uci", [Metric("rmse")])
    >>> found[found.counterpart].set_index("method").verdict["MC dropout"]
    'beat'
    """
    ours = means_of(rows, [metric.name for metric in metrics])
    numbers = list(published(suite) if known is None else known)
    found = []
    row: Any
    for row in ours.itertuples():
        for one in numbers:
            if (one.task, one.metric) != (row.task, row.metric):
                continue
            se = 0.0 if math.isnan(row.se) else row.se
            tolerance = one.tolerance
            if tolerance is None:
                tolerance = WIDTH * math.hypot(se, one.standard_error) + 0.5 * 10.0**-one.decimals
            difference = row.value - one.value
            ahead = difference if one.better == "higher" else -difference
            verdict = "agree" if abs(difference) <= tolerance else "beat" if ahead > 0 else "miss"
            found.append(
                {
                    "task": row.task, "guide": row.guide, "metric": row.metric, "obtained": row.value,
                    "obtained_se": row.se, "repeats": row.repeats, "method": one.method,
                    "counterpart": row.guide in one.guides, "published": str(one),
                    "published_se": one.standard_error, "difference": difference, "tolerance": tolerance,
                    "verdict": verdict, "tag": one.tag, "source": one.source, "protocol": one.protocol,
                }
            )  # fmt: skip
    columns = [
        "task", "guide", "metric", "obtained", "obtained_se", "repeats", "method", "counterpart", "published",
        "published_se", "difference", "tolerance", "verdict", "tag", "source", "protocol",
    ]  # fmt: skip
    return pd.DataFrame(found, columns=columns)
