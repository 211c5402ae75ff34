"""One page of the committed results of all suites: which hold, which do not, and what was corrected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .bench_report import Report, make_report
from .bench_results import PLAN
from .bench_tables import Table, markdown
from .errors import DataError

__all__ = ["compose"]

CORRECTIONS = "CORRECTIONS.md"


def compose(folder: str | os.PathLike[str]) -> str:
    """One page of all committed results: the reports of the folders in it, and its corrections.

    Raises:
        DataError: it holds no results.
    """
    root = Path(folder)
    places: Sequence[Path] = sorted(p.parent for p in root.glob(f"*/{PLAN}"))
    if not places:
        raise DataError(f"{root} holds no folder with results of a suite ({PLAN})")
    reports = {place.name: make_report(place) for place in places}
    parts = [
        "# Results of the benchmark suites",
        "Composed of the committed rows by `dgm bench report --all`. Each suite has a folder with its whole report, "
        "its rows (`rows.parquet`, `rows.csv`), and `costs.csv`, which says of each row where it came from.",
        markdown(_index(reports)).removeprefix("### \n\n"),
    ]
    parts += [report.brief(name) for name, report in reports.items()]
    corrections = root / CORRECTIONS
    text = corrections.read_text(encoding="utf-8").strip() if corrections.is_file() else "None so far."
    return "\n\n".join([*parts, "## Corrections", text]) + "\n"


def _index(reports: Mapping[str, Report]) -> Table:
    heads = [
        "suite",
        "budget",
        "cells",
        "failed",
        "must hold: agree/miss",
        "published: beat/agree/miss",
        "date",
        "commit",
    ]
    rows = []
    for name, report in reports.items():
        results, own = report.results, report.counterparts["verdict"]
        agree = f"{len(report.checks) - len(report.missed)}/{len(report.missed)}" if len(report.checks) else "–"
        published_ = "/".join(str(int((own == v).sum())) for v in ("beat", "agree", "miss")) if len(own) else "–"
        facts = dict(report.facts())
        days = " to ".join(dict.fromkeys(day[:10] for day in facts.get("date", "–").split(" to ")))
        rows.append(
            [
                f"[{results.suite.name}]({name}/report.md)", str(results.plan["budget"]),
                f"{len(results.rows)} of {len(results.rows) + results.missing}", str(len(results.failed)), agree,
                published_, days, facts.get("commit", "–"),
            ]
        )  # fmt: skip
    return Table("", "", heads, rows)
