"""The report of a suite: tables, pictures, obtained beside published, and where each number came from."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from .bench_plots import cost_figure, score_figure
from .bench_registry import Published, check, published
from .bench_results import Results, load_results, save_rows
from .bench_store import MOST_ATTEMPTS
from .bench_story import Chapter, chapter_markdown, chapter_parts, kept, picture_links, save_pictures
from .bench_tables import LONG, Table, check_table, failed_table, frame_table, markdown, ranked, tally, task_table
from .page import Drawn, environment, shown, write_text
from .style import COLOURS

__all__ = ["Report", "make_report", "write_report"]

OUTSIDE = "Outside their tolerance"


class Report:
    """Everything that a report says, as text, tables and pictures.

    Attributes:
        found: our rows beside the registry's. checks: what the suite says must hold.
    """

    def __init__(self, results: Results):
        self.results, suite = results, results.suite
        self.tasks = [str(t) for t in dict.fromkeys(results.rows["task"])] if len(results.rows) else []
        self.numbers: list[Published] = published(suite.name)
        self.found = check(results.rows, suite.name, suite.metrics, self.numbers)
        self.checks = suite.checks(results) if suite.checks is not None and len(results.good) else pd.DataFrame()
        if len(self.checks):  # what does not hold comes first
            self.checks = self.checks.iloc[(self.checks["verdict"] == "agree").argsort(kind="stable")]
        self.kept = kept(results.place) if results.folder is None else {}

    @property
    def missed(self) -> pd.DataFrame:
        """Checks of the suite itself that do not hold."""
        return self.checks[self.checks["verdict"] != "agree"] if len(self.checks) else self.checks

    @property
    def counterparts(self) -> pd.DataFrame:
        """Our rows beside published methods of their own kind."""
        return self.found[self.found["counterpart"].astype(bool)]

    def verdicts(self) -> list[dict[str, str]]:
        """Sentences, the most important first."""
        results, out = self.results, []
        if len(self.checks):
            bad, all_ = len(self.missed), len(self.checks)
            said = f"{all_ - bad} of {all_} numbers that must hold are inside their tolerance."
            rests = f"{bad} outside" if bad else "the table 'What must hold' has all of them"
            out.append(_verdict("bad" if bad else "good", said, rests))
        own = self.counterparts
        if len(own):
            counts = {v: int((own["verdict"] == v).sum()) for v in ("beat", "agree", "miss")}
            said = (
                f"Against published methods of their own kind our guides beat {counts['beat']} numbers, agree with "
                f"{counts['agree']} and miss {counts['miss']}."
            )
            rests = "two standard errors of both sides; a longer training than theirs is no reproduction"
            out.append(_verdict("caution" if counts["miss"] else "good", said, rests))
        lacking, failed = results.missing, len(results.failed)
        if lacking or failed:
            done = len(results.rows)
            skipped = f"; for want of data skipped: {', '.join(results.skipped)}" if results.skipped else ""
            said = f"{done} of {done + lacking} cells are finished, {failed} of them failed{skipped}."
            rests = "the same command again computes what is missing"
            if failed:
                rests += f", and tries what failed up to {MOST_ATTEMPTS} times in all; with --retry, again"
            out.append(_verdict("caution", said, rests))
        return out

    @cached_property
    def tables(self) -> list[Table]:
        """All tables in the order of the report."""
        results, suite, out = self.results, self.results.suite, list[Table]()
        if len(results.good):
            out += [task_table(results, task, self.numbers) for task in self.tasks]
            for title, frame in (suite.tables(results) if suite.tables is not None else {}).items():
                out.append(frame_table(title, frame))
        if len(self.missed):
            out.append(frame_table(OUTSIDE, self.missed))
        if len(self.checks):
            out.append(frame_table("What must hold", self.checks))
        if self.found["counterpart"].any():
            out.append(check_table(self.found))
        if len(self.found):
            out += [tally(self.found), self._sources()]
        if len(results.failed) or results.skipped:
            out.append(failed_table(results))
        return out

    def _sources(self) -> Table:
        unique = self.found.drop_duplicates(["method", "source"])
        rows = [[str(r.method), str(r.tag), str(r.protocol), str(r.source)] for r in unique.itertuples()]
        return Table("Published: protocols and sources", "", ["method", "tag", "protocol", "source"], rows)

    def figures(self) -> list[Drawn]:
        """Pictures: the first metric by task, what it costs, and those of the suite."""
        results, first, out = self.results, self.results.suite.metrics[0], list[Drawn]()
        if len(results.good) and first.name in results.good and not results.suite.timed:
            text = f"Means over {results.suite.repeats}s with two standard errors; dotted: published. Arrows: far off."
            out.append(("scores", first.title, text, score_figure(results, first, self.tasks, self.numbers)))
            cost = cost_figure(results, first, self.tasks)
            if cost is not None:
                out.append(("cost", "What it costs", "Further up is better, further left cheaper.", cost))
        return out + self.own_figures

    @cached_property
    def own_figures(self) -> list[Drawn]:
        """Those of the suite, and where their arrays were not kept, as they were."""
        results = self.results
        drawn = list(results.suite.figures(results)) if results.suite.figures is not None and len(results.good) else []
        names = {name for name, *_ in drawn}
        return drawn + [one for one in self.kept.get("", []) if one[0] not in names]

    @cached_property
    def chapters(self) -> list[Chapter]:
        """The suite's story, told before the tables."""
        suite = self.results.suite
        told = list(suite.story(self.results)) if suite.story is not None and len(self.results.good) else []
        return [c if c.figures else replace(c, figures=self.kept.get(c.title, ())) for c in told]

    def notes(self) -> list[str]:
        """What a reader must know."""
        results, suite = self.results, self.results.suite
        out = [str(n) for n in suite.notes(results)] if suite.notes is not None and len(results.good) else []
        shared = ", which share training rows" if suite.repeats == "split" else ""
        if len(results.good) and results.good.groupby(["task", "guide"]).size().max() > 1:
            out.append(
                f"±: standard error over {suite.repeats}s{shared}; differences are paired; tie: first place is open "
                "after Holm's correction over all pairs at 5 %"
            )
        else:
            out.append(f"one {suite.repeats} for each guide: no standard errors, and so no ranks")
        if suite.timed:
            out.append("rows are measured times: they vary from run to run, and only those of one task compare")
            out.append("CPU s: processor time that it took to measure a cell, preparation included")
        else:
            out.append("rows are the same, bit for bit, for any number of workers and interruptions; costs vary")
            out.append("CPU s: processor time of a cell, training and evaluation")
        out += [f"{m.title}: {m.meaning}" for m in suite.metrics if m.meaning and m.name in results.rows]
        if results.elsewhere:
            out.append(
                f"{results.elsewhere} results of another budget, protocol or version are in the folder, not shown"
            )
        return out

    def facts(self) -> list[tuple[str, str]]:
        """Where the numbers came from; `costs.csv` has it for each of them."""
        plan, costs = self.results.plan, self.results.costs
        out = [("command", str(plan.get("about", {}).get("command", ""))), ("budget", str(plan["budget"]))]
        if plan["filter"]:
            out.append(("filter", "; ".join(plan["filter"])))
        out.append(("protocol", f"{self.results.suite.name}, number {plan['protocol']}"))
        for name in ("commit", "versions", "hardware", "threads", "library"):
            if name in costs and not (name == "threads" and self.results.suite.timed):
                out.append((name, "; ".join(map(str, dict.fromkeys(costs[name].dropna())))))
        if "date" in costs and len(costs):
            first, last = str(costs["date"].min()), str(costs["date"].max())
            out.append(("date", first if first == last else f"{first} to {last}"))
        if "job_cpu_seconds" in costs:
            out.append(("CPU seconds in all", f"{costs['job_cpu_seconds'].sum():.0f}"))
        out.append(("cells", f"{len(self.results.rows)}, by the hash of their protocol in rows.csv and costs.csv"))
        return out

    def title(self) -> str:
        return f"Benchmark suite {self.results.suite.name}, budget {self.results.plan['budget']}"

    def markdown(self, base: str = "") -> str:
        """As Markdown; pictures of chapters are links to files in the folder `base`."""
        parts = [f"## {self.title()}", self.results.suite.summary]
        parts.append("\n".join(f"* {v['says'].rstrip('.')} ({v['rests']})" for v in self.verdicts()))
        parts += [chapter_markdown(chapter, base) for chapter in self.chapters]
        parts += [f"### {one[1]}\n\n{picture_links([one], base)[0]}" for one in self.own_figures]
        parts += [markdown(table) for table in self.tables]
        parts.append("\n".join(f"* {note}" for note in self.notes()))
        parts.append("\n".join(f"* {name}: {f'`{v}`' if name == 'command' else v}" for name, v in self.facts()))
        return "\n\n".join(part for part in parts if part) + "\n"

    def brief(self, name: str) -> str:
        """What the page of all suites says of this one, whose folder there has this name."""
        parts = [f"## {self.results.suite.name}", f"{self.results.suite.summary}."]
        parts.append("\n".join(f"* {v['says'].rstrip('.')} ({v['rests']})" for v in self.verdicts()))
        if len(self.missed):
            parts.append(markdown(frame_table(OUTSIDE, self.missed)))
        own = self.counterparts[self.counterparts["verdict"] == "miss"]
        if len(own):
            parts.append(markdown(replace(check_table(own), title="Behind what is published", text="")))
        parts.append("\n".join(f"* {key}: {f'`{v}`' if key == 'command' else v}" for key, v in self.facts()))
        links = [f"[{file}]({name}/{file})" for file in ("report.md", "report.html", "rows.csv", "costs.csv")]
        return "\n\n".join([part for part in parts if part] + [f"Whole: {', '.join(links)}"])

    def html(self) -> str:
        page = environment().get_template("evaluation.html.j2")
        # the page sets every other hyphen as a minus sign
        tables = [
            {
                "title": t.title, "text": t.text, "heads": t.heads, "few": len(t.heads) < 4,
                "words": t.words, "long": len(t.rows) > LONG,
                "rows": [[re.sub(r"(?<=[A-Za-z])-|-(?=[A-Za-z])", "\u2010", cell) for cell in row] for row in t.rows],
            }
            for t in self.tables
        ]  # fmt: skip
        return page.render(
            title=self.title(), headline=self.results.suite.summary, verdicts=self.verdicts(), tables=tables,
            figures=shown(self.figures()), notes=self.notes(), colours=len(COLOURS), facts=self.facts(),
            chapters=[chapter_parts(chapter) for chapter in self.chapters],
        )  # fmt: skip


def _verdict(level: str, says: str, rests: str) -> dict[str, str]:
    return {"level": level, "says": says, "rests": rests}


def make_report(folder: str | os.PathLike[str]) -> Report:
    """The report of a folder of results.

    Raises:
        DataError: there are none.
    """
    return Report(load_results(folder))


def write_report(report: Report, out: str | os.PathLike[str]) -> Path:
    """Rows, costs, ranks, checks, pictures, `report.md` and `report.html`; gives the path of the page.

    Raises:
        OptionError: the folder cannot be written to.
    """
    place, results = Path(out), report.results
    parts = (
        [ranked(results, task).reset_index().assign(task=task) for task in report.tasks] if len(results.good) else []
    )
    names = [
        "task",
        "guide",
        "rank_low",
        "rank_high",
        "bound",
        "bound_se",
        "difference",
        "difference_se",
        "tie",
        "runs",
    ]
    ranks = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)
    save_rows(results, place, ranks.reindex(columns=names))
    write_text(report.found.to_csv(index=False, lineterminator="\n"), place / "published.csv")
    write_text(report.checks.to_csv(index=False, lineterminator="\n"), place / "checks.csv")
    save_pictures(report.chapters, report.own_figures, place)
    write_text(report.markdown(), place / "report.md")
    return write_text(report.html(), place / "report.html")
