"""What a benchmark suite is made of: cells, their identity, and the jobs that compute them.

A suite is one file of `benchmarks/` with an object `SUITE`; see `Suite`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import OptionError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from .bench_results import Results
    from .bench_story import Chapter
    from .page import Drawn

__all__ = ["BUDGETS", "Cell", "Job", "Metric", "Suite", "canonical", "chosen", "jobs_of", "parsed"]

BUDGETS = ("smoke", "short", "full")
FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One number's worth of work: a guide on a task, for one seed or split.

    task, guide: names, as tables show them. repeat: the seed or split. settings: every size and option that the numbers
    depend on, plain values; a budget acts through them alone.
    """

    task: str
    guide: str
    repeat: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def values(self, repeats: str) -> dict[str, Any]:
        """What filters and columns see; the repeat under its suite's name for it.

        >>> Cell("yacht", "point", 3, {"epochs": 5}).values("split")
        {'task': 'yacht', 'guide': 'point', 'split': 3, 'epochs': 5}
        """
        return {"task": self.task, "guide": self.guide, repeats: self.repeat, **self.settings}


@dataclass(frozen=True)
class Metric:
    """A column of a suite's rows that its tables show.

    better: which way is good; None where there is no such way. label, meaning: in tables and below them.
    """

    name: str
    better: Literal["higher", "lower"] | None = "lower"
    label: str = ""
    meaning: str = ""

    @property
    def title(self) -> str:
        return self.label or self.name.replace("_", " ")


@dataclass(frozen=True)
class Suite:
    """A benchmark suite.

    name: as the file is called. cells: `(budget) -> cells` of "smoke", "short" or "full"; the same call gives the same
    cells. run: `(cell) -> row`, or, where `group_by` is given, `(cells) -> rows` of one job in the order of its cells,
    as an iterable: each row is written when it comes. A row is a mapping of column names to numbers, text, booleans or
    None. Arrays and tensors in it are kept beside it (`Results.arrays`); one called per_datum, the first metric for
    each held-out datum, lets guides be ranked by pairs of data. Columns whose name ends in "seconds" are costs. An
    exception in place of a row is that cell's failure. The numbers may depend on the cells of the job and on nothing
    else, so train with `compile="trace"` (or "inductor"), not "auto", which looks at the clock. The random stream is
    seeded, and torch has one thread.

    metrics: columns that tables show; the first one ranks the guides. protocol: raise it when the numbers change their
    meaning. repeats: what a repeat is called, "seed" or "split". group_by: columns that the cells of one job share;
    jobs are formed of all cells of a budget, whatever a filter says. ready: `(task)`, raises DataError where the data
    of a task are missing. seconds: `(cell) -> estimate` until there are finished cells. checks: `(results) -> frame`
    of what must hold, with the columns task, guide, metric, value, expected, tolerance, verdict ("agree" or "miss").
    tables: more tables, `(results) -> {title: frame}`. figures: pictures of the report. notes: sentences of it. story:
    chapters that stand before the tables. timed: its numbers are measured times, which are comparable within a job and
    a run alone: jobs run one at a time, a job that runs again replaces all of its rows, and no row is reproducible.
    """

    name: str
    cells: Callable[[str], Sequence[Cell]]
    run: Callable[..., Any]
    metrics: Sequence[Metric]
    summary: str = ""
    protocol: int = 1
    repeats: str = "seed"
    group_by: tuple[str, ...] = ()
    ready: Callable[[str], None] | None = None
    seconds: Callable[[Cell], float] | None = None
    checks: Callable[[Results], pd.DataFrame] | None = None
    tables: Callable[[Results], Mapping[str, pd.DataFrame]] | None = None
    figures: Callable[[Results], Sequence[Drawn]] | None = None
    notes: Callable[[Results], Sequence[str]] | None = None
    story: Callable[[Results], Sequence[Chapter]] | None = None
    timed: bool = False

    def workers(self, count: int) -> int:
        """The number of workers, where it is one that the suite can have.

        Raises:
            OptionError: more than one for measured times.
        """
        if self.timed and count > 1:
            raise OptionError(
                f"jobs is {count}: suite {self.name!r} measures times, and its jobs must not share the cores; leave "
                "--jobs out"
            )
        return count


@dataclass(frozen=True)
class Job:
    """Cells that are computed together, and their keys; its composition never depends on what is there already."""

    cells: tuple[Cell, ...]
    keys: tuple[str, ...]

    @property
    def key(self) -> str:
        """Of the job: that of its first cell, which depends on all."""
        return self.keys[0]


def plain(value: Any, where: str) -> Any:
    """A value of settings or rows as JSON can hold it exactly: NaN and infinities are marked.

    Raises:
        OptionError: of another type.
    """
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, str) and not value.isascii() and value != value.encode(errors="replace").decode():
        raise OptionError(f"{where} holds text that is no Unicode: {ascii(value)[:80]}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, where) for key, item in value.items()}
    raise OptionError(
        f"{where} is of type {type(value).__name__}: expected numbers, text, booleans, None, or lists of them"
    )


def unplain(value: Any) -> Any:
    """The inverse of `plain`.

    >>> unplain(plain({"a": [1.5, float("inf")]}, "a"))
    {'a': [1.5, inf]}
    """
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: unplain(v) for k, v in value.items()}
    return [unplain(item) for item in value] if isinstance(value, list) else value


def canonical(value: Any) -> str:
    """The one text of a value: keys sorted, no spaces, floats to their last bit.

    >>> canonical({"b": 1, "a": 0.1})
    '{"a":0.1,"b":1}'
    """
    return json.dumps(plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def jobs_of(suite: Suite, budget: str, code: Mapping[str, str]) -> list[Job]:
    """All cells of a budget in jobs.

    A cell's key is the sha256 of: the suite's name and protocol number; the version of dgm and the fingerprint of what
    the suite's `run` reaches (`dgm.bench_code`); the cell with all its settings; and the cells that are computed with
    it. Not in it: comments, formatting, the budget's name, what the report does, time, machine.

    Raises:
        OptionError: an unknown budget, no cells, two equal cells, a setting that is text in one cell and a number in
            another, or an unknown name in `group_by`.
    """
    if budget not in BUDGETS:
        raise OptionError(f"budget is {budget!r}: {did_you_mean(budget, BUDGETS)}")
    cells = list(suite.cells(budget))
    if not cells:
        raise OptionError(f"suite {suite.name!r} has no cells at the budget {budget!r}")
    groups: dict[str, list[Cell]] = {}
    seen: set[str] = set()
    for cell in cells:
        values = cell.values(suite.repeats)
        text = canonical(values)
        if text in seen:
            raise OptionError(f"suite {suite.name!r} has two equal cells: {text}")
        seen.add(text)
        if unknown := [name for name in suite.group_by if name not in values]:
            raise OptionError(f"group_by of {suite.name!r}: {unknown[0]!r} is no column of {text}")
        group = canonical([values[name] for name in suite.group_by]) if suite.group_by else text
        groups.setdefault(group, []).append(cell)
    _one_kind(suite, cells)
    return [_job(suite, code, members) for members in groups.values()]


def _one_kind(suite: Suite, cells: Sequence[Cell]) -> None:
    """Settings are columns: each has values of one kind, or none."""
    kinds: dict[str, tuple[str, Any]] = {}
    for name, value in (item for cell in cells for item in cell.values(suite.repeats).items() if item[1] is not None):
        value = plain(value, f"setting {name!r}")
        kind = (
            "boolean" if isinstance(value, bool) else "text" if isinstance(value, str)
            else "list" if isinstance(value, list) else "mapping" if isinstance(value, dict) and set(value) != {"float"}
            else "number"
        )  # fmt: skip
        known, first = kinds.setdefault(name, (kind, value))
        if kind != known:
            raise OptionError(
                f"suite {suite.name!r}: the setting {name!r} is {first!r} in one cell and {value!r} in another: "
                f"expected one kind of value, not {known} and {kind}"
            )


def _job(suite: Suite, code: Mapping[str, str], members: Sequence[Cell]) -> Job:
    whole = {"format": FORMAT, "suite": suite.name, "protocol": suite.protocol, "code": dict(code)}
    whole["job"] = [cell.values(suite.repeats) for cell in members]
    keys = []
    for cell in members:
        text = canonical({**whole, "cell": cell.values(suite.repeats)})
        keys.append(hashlib.sha256(text.encode()).hexdigest()[:32])
    return Job(tuple(members), tuple(keys))


def parsed(filters: Sequence[str]) -> dict[str, set[str]]:
    """`["task=boston,guide=point", "task=yacht"]` as allowed values by column: values of one column are alternatives.

    Raises:
        OptionError: a part that is not `name=value`.

    >>> {k: sorted(v) for k, v in parsed(["task=a,guide=Stein, 50 points", "task=b"]).items()}
    {'task': ['a', 'b'], 'guide': ['Stein, 50 points']}
    """
    found: dict[str, set[str]] = {}
    for text in filters:
        for part in re.split(r",(?=\s*\w+=)", text):
            name, equals, value = part.partition("=")
            if not equals or not name.strip():
                raise OptionError(f"filter {text!r}: expected name=value, with commas between several")
            found.setdefault(name.strip(), set()).add(value.strip())
    return found


def chosen(suite: Suite, jobs: Sequence[Job], filters: Sequence[str]) -> set[str]:
    """Keys of the cells that all filters let through.

    Raises:
        OptionError: an unknown column or value (the nearest is offered), or a combination that no cell has.
    """
    wanted = parsed(filters)
    table = [(key, cell.values(suite.repeats)) for job in jobs for cell, key in zip(job.cells, job.keys, strict=True)]
    for name, allowed in wanted.items():
        columns = {column for _, values in table for column in values}
        if name not in columns:
            raise OptionError(
                f"filter {name}=...: {suite.name!r} has no column {name!r}: {did_you_mean(name, columns)}"
            )
        known = {_text(values[name]) for _, values in table if name in values}
        for value in allowed - known:
            raise OptionError(f"filter {name}={value} selects nothing: {did_you_mean(value, known)}")
    found = {
        key
        for key, values in table
        if all(n in values and _text(values[n]) in allowed for n, allowed in wanted.items())
    }
    if not found:
        raise OptionError(f"filter {', '.join(filters)} selects none of the {len(table)} cells of {suite.name!r}")
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
