"""The ranked table of a comparison as text, and the sentence that it comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from .pairs import rank_cells
from .style import count, limit, share, shorten

FEW = 5  # ties that the verdict names
WIDTH = 40  # of a guide's name in the text table, in characters


@dataclass(frozen=True)
class Column:
    """One column of the ranked table: its header, a text for each guide, and what it means in plain words."""

    header: str
    cells: list[str]
    meaning: str


def score_name(meta: Mapping[str, Any]) -> str:
    return "log_likelihood" if str(meta.get("score", "bound")).replace("-", "_") == "log_likelihood" else "bound"


def khat_by_row(meta: Mapping[str, Any]) -> bool:
    """Whether a k-hat is that of a held-out row, as where latents are local, or that of a run's whole posterior."""
    return str(meta.get("khat_of", "row" if score_name(meta) == "bound" else "run")) == "row"


def digits_of(errors: pd.Series, least: float = 3.55) -> int:
    """Decimals that a typical standard error deserves: 0.12 and 0.06 have two, 0.4 has one, 0.03 has three.

    With least = 1 the error shows one significant digit, whichever it is.
    """
    known = errors[np.isfinite(errors) & (errors > 0)]
    return 2 if known.empty else int(np.clip(-np.floor(np.log10(known.median() / least) + 1e-9), 0, 5))


def numbers(table: pd.DataFrame, name: str) -> pd.Series:
    """A column as floats, NaN where it is missing or not finite."""
    if name not in table:
        return pd.Series(np.nan, table.index, dtype=float)
    return pd.to_numeric(table[name], errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)


def with_errors(values: pd.Series, errors: pd.Series, digits: int) -> list[str]:
    """Texts such as '-20.31 ± 0.12', of one width, so that the signs ± stand below one another."""
    left = ["–" if np.isnan(v) else f"{v:.{digits}f}" for v in values]
    right = ["" if np.isnan(v) or np.isnan(e) else f" ± {e:.{digits}f}" for v, e in zip(values, errors, strict=True)]
    wide, far = max(map(len, left), default=0), max(map(len, right), default=0)
    return [f"{v:>{wide}}{e:<{far}}" for v, e in zip(left, right, strict=True)]


def _differences(table: pd.DataFrame, score: str, digits: int) -> list[str]:
    value, error = numbers(table, "difference"), numbers(table, "difference_se")
    digits = max(digits, digits_of(error[value != 0], 1.0))
    first = best_place(table, score)
    rest = np.arange(len(table)) != first
    texts = iter(with_errors(value[rest], error[rest], digits))
    ties = table["tie"].fillna(False).astype(bool) if "tie" in table else pd.Series(False, table.index)
    cells = ["" if not r else next(texts) + (" (tie)" if tie else "") for r, tie in zip(rest, ties, strict=True)]
    wide = max(map(len, cells), default=1)
    core = max((len(c.removesuffix(" (tie)")) for c in cells), default=1)
    return [f"{c:<{wide}}" if r else f"{'·':^{core or 1}}".ljust(wide) for c, r in zip(cells, rest, strict=True)]


def best_place(table: pd.DataFrame, score: str) -> int | None:
    """Place of the first guide that has a score (the table is ranked)."""
    done = np.flatnonzero(np.isfinite(numbers(table, score)))
    return int(done[0]) if len(done) else None


def columns(table: pd.DataFrame, meta: Mapping[str, Any]) -> list[Column]:
    """The columns of the ranked table that this comparison has, as text.

    Args:
        table: one row for each guide, best first; columns that are missing or empty are left out.
        meta: score ("bound" or "log_likelihood"), K, k_threshold, as far as known.

    >>> [c.header for c in columns(pd.DataFrame({"bound": [-1.0], "seconds": [3.0]}, index=["g"]), {})]
    ['bound', 'difference to best', 'seconds']
    """
    score = score_name(meta)
    samples = f" of K = {meta['K']} samples" if "K" in meta else ""
    meanings = {
        "bound": f"importance-weighted bound{samples} on log p(x) for a held-out datum, mean over seeds, in nats; "
        "higher is better. ±: standard error over data and seeds, most of it common to all guides",
        "log_likelihood": "log predictive density (or probability) of a held-out target, in nats; higher is better. "
        "±: standard error over data and seeds, most of it common to all guides",
    }
    values, errors = numbers(table, score), numbers(table, f"{score}_se")
    digits = digits_of(errors)
    ranks = "places that survive Holm's correction over all pairs of guides: all hold together with 95 %"
    out = [Column("rank", rank_cells(table), ranks)] if numbers(table, "rank_low").notna().any() else []
    out += [
        Column(score.replace("_", "-"), with_errors(values, errors, digits), meanings[score]),
        Column(
            "difference to best",
            _differences(table, score, digits),
            "taken datum by datum and seed by seed, so its error is smaller than that of the scores themselves; "
            "tie: no guide is better at 5 % after Holm's correction over all pairs, so that it may be the best",
        ),
    ]
    if score == "log_likelihood":
        out += _predictive(table)
    threshold = float(meta.get("k_threshold", 0.7))
    which = "held-out data" if khat_by_row(meta) else "runs"
    shares = {
        "khat_bad": (
            f"k-hat > {limit(threshold)}",
            f"{which} for which the importance weights have so heavy a tail that their mean cannot be trusted; "
            "a measure of how far q is from the posterior",
        )
    }
    for name, (header, meaning) in shares.items():
        if numbers(table, name).notna().any():
            out.append(Column(header, texts_of(table, name, share), meaning))
    costs = {
        "evaluations": (
            "evaluations",
            count,
            "evaluations of log p(x, z) in training",
        ),
        "search_evaluations": ("in search", count, "evaluations spent before that on finding a step size"),
        "seconds": ("seconds", _seconds, "wall-clock time of the training of one seed"),
    }
    for name, (header, form, meaning) in costs.items():
        known = numbers(table, name)
        if known.notna().any() and (name != "search_evaluations" or known.max() > 0):
            out.append(Column(header, texts_of(table, name, form), meaning))
    return out


def _predictive(table: pd.DataFrame) -> list[Column]:
    """Columns of a supervised comparison: those that fit a terminal; the page has the others run by run."""
    kinds = {
        "rmse": ("RMSE", "root mean squared error of the predictive mean, in units of the target; lower is better"),
        "accuracy": ("accuracy", "share of held-out data whose most probable class is the right one"),
        "coverage95": ("95 % covers", "share of targets inside the central 95 % predictive interval; 95 % is right"),
        "calibration_error": ("calibration", "mean gap between stated and observed probability; 0 is right"),
    }
    out: list[Column] = []
    for name, (header, meaning) in kinds.items():
        values, errors = numbers(table, name), numbers(table, f"{name}_se")
        if not values.notna().any() or (name == "calibration_error" and any(c.header == "95 % covers" for c in out)):
            continue
        if name in ("accuracy", "coverage95"):
            cells = texts_of(table, name, lambda v: f"{100 * v:.1f} %")
        else:
            cells = with_errors(values, errors, max(digits_of(errors), 3) if values.max() < 1 else digits_of(errors))
        out.append(Column(header, cells, meaning))
    return out


def texts_of(table: pd.DataFrame, name: str, form: Callable[[float], str]) -> list[str]:
    cells = ["–" if np.isnan(v) else form(v) for v in numbers(table, name)]
    wide = max(map(len, cells), default=0)
    return [f"{c:>{wide}}" for c in cells]


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1.95 else f"{value:.1f}"


def headline(meta: Mapping[str, Any]) -> str:
    """One line that says what was compared, on what, and how.

    >>> headline({"title": "VAE on digits", "train_size": 9, "test_size": 3, "mode": "fixed model", "K": 100})
    'VAE on digits · 9 train, 3 test · fixed model, K = 100, nats'
    """
    sizes = [f"{meta[k]} {k.removesuffix('_size')}" for k in ("train_size", "test_size") if k in meta]
    how = [str(meta[k]) if k == "mode" else f"K = {meta[k]}" for k in ("mode", "K") if k in meta]
    return " · ".join(
        p for p in (str(meta.get("title", "comparison")), ", ".join(sizes), ", ".join([*how, "nats"])) if p
    )


def format_table(table: pd.DataFrame, meta: Mapping[str, Any], rows: pd.DataFrame | None = None) -> str:
    """The ranked table for a terminal; runs that failed, and notes, are listed below it if rows are given.

    Args:
        table: one row for each guide, best first.
        meta: title, mode, train_size, test_size, K, score, k_threshold, as far as known.
        rows: one row for each guide and seed, with status.

    >>> frame = pd.DataFrame({"bound": [-1.0], "bound_se": [0.12], "seconds": [3.0]}, index=["full normal"])
    >>> print(format_table(frame, {"title": "toy"}))
    toy · nats
    guide            bound       difference to best   seconds
    full normal   -1.00 ± 0.12           ·               3
    """
    names = [shorten(name, WIDTH) for name in table.index]
    width = max([len("guide"), *map(len, names)])
    parts = [[f"{text:<{width}}" for text in ("guide", *names)]]
    for column in columns(table, meta):
        wide = max(len(column.header), *map(len, column.cells), 0)
        parts.append([f"{text:^{wide}}" for text in (column.header, *column.cells)])
    lines = ["   ".join(line).rstrip() for line in zip(*parts, strict=True)]
    failed = (
        []
        if rows is None
        else [
            f"failed: {f['guide']}, seed{'s' * (',' in f['seeds'])} {f['seeds']}: {f['status']}" for f in failures(rows)
        ]
    )
    noted = [] if rows is None else [f"note: {remark}" for remark in remarks(rows, brief=True)]
    return "\n".join([headline(meta), *lines, *failed, *noted])


def failures(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Guide, seeds and error of the runs whose status is not "ok"; seeds that failed alike stand together.

    >>> failures(pd.DataFrame({"guide": ["g", "g"], "seed": [1, 2], "status": ["ok", "NaN at step 3"]}))
    [{'guide': 'g', 'seeds': '2', 'status': 'NaN at step 3'}]
    """
    if "status" not in rows:
        return []
    groups = rows[rows["status"] != "ok"].groupby(["guide", "status"], sort=False)["seed"]
    return [
        {"guide": shorten(guide, 80), "seeds": ", ".join(map(str, seeds)), "status": shorten(status, 400)}
        for (guide, status), seeds in groups
    ]


def remarks(rows: pd.DataFrame, brief: bool = False) -> list[str]:
    """What the evaluation had to note, each once, with the guides and seeds that it is about.

    Args:
        rows: one row for each guide and seed, with notes.
        brief: of notes that differ between the seeds of a guide those of its first seed only.

    >>> frame = pd.DataFrame({"guide": ["g", "g", "h"], "seed": [0, 1, 0], "notes": ["far", "near", "far"]})
    >>> remarks(frame)
    ['g, seed 0; h: far.', 'g, seed 1: near.']
    >>> remarks(frame, brief=True)
    ['g, seed 0 of 2; h: far.']
    """
    if "notes" not in rows:
        return []
    noted = rows[rows["notes"].fillna("").astype(str) != ""]
    found: dict[str, list[str]] = {}
    for guide, own in noted.groupby("guide", sort=False):
        seeds, several = int((rows["guide"] == guide).sum()), own["notes"].nunique() > 1 and brief
        for note, part in own.groupby("notes", sort=False):
            which = "" if len(part) == seeds else f", seed{'s' * (len(part) > 1)} " + ", ".join(map(str, part["seed"]))
            which += f" of {seeds}" if several else ""
            found.setdefault(str(note), []).append(shorten(guide, WIDTH if brief else 80) + which)
            if several:
                break
    return [f"{'; '.join(guides)}: {note.rstrip('.')}." for note, guides in found.items()]


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup(", ").join(parts[:-1]) + Markup(" and ") + parts[-1] if len(parts) > 1 else parts[0]


def verdict(table: pd.DataFrame, meta: Mapping[str, Any]) -> Markup:
    """Which guide is best, which tie with it, and how far the next is behind: a sentence or two of escaped HTML.

    >>> frame = pd.DataFrame({"bound": [-1.0, -1.1], "difference": [0, -0.1], "difference_se": [0, 0.2],
    ...                       "tie": [True, True]}, index=["flow", "diagonal"])
    >>> " ".join(verdict(frame, {}).striptags().split())
    'flow is best; diagonal ties with it (difference 0.1 ± 0.2 nats).'
    """
    score = score_name(meta)
    done = table[np.isfinite(numbers(table, score))]
    if done.empty:
        return Markup("No guide finished with a finite score: see the failures below.")
    names = [Markup("<strong>{}</strong>").format(shorten(name, 80)) for name in done.index]
    if len(done) == 1:
        value = with_errors(numbers(done, score), numbers(done, f"{score}_se"), digits_of(numbers(done, f"{score}_se")))
        return names[0] + Markup(" reaches {} nats; no other guide finished to be compared with it.").format(value[0])
    gaps, errors = -numbers(done, "difference"), numbers(done, "difference_se")
    digits = digits_of(errors.iloc[1:], 1.0)
    texts = [t.strip().replace(" ", "\N{NO-BREAK SPACE}") for t in with_errors(gaps, errors, digits)]
    tie = [bool(t) for t in done["tie"].fillna(False)] if "tie" in done else [False] * len(done)
    tied = [i for i in range(1, len(done)) if tie[i]]
    behind = [i for i in range(1, len(done)) if not tie[i]]
    out = names[0] + " is best"
    if len(tied) > FEW:  # a list would be no sentence; the table has them
        out += f"; {len(tied)} others tie with it" + Markup(" (differences up to {}&nbsp;nats)").format(
            Markup(texts[tied[-1]])
        )
    elif tied:
        verb = "ties" if len(tied) == 1 else "tie"
        noun = "difference" if len(tied) == 1 else "differences"
        gap = Markup(" ({} {}&nbsp;nats)").format(noun, _join([Markup(texts[i]) for i in tied]))
        out += "; " + _join([names[i] for i in tied]) + f" {verb} with it" + gap
    if behind and tied:
        out += "."
        out += Markup(" Next comes {}, {}&nbsp;nats behind").format(names[behind[0]], texts[behind[0]])
    elif behind:
        out += Markup(", ahead of {} by {}&nbsp;nats").format(names[behind[0]], texts[behind[0]])
    return out + "."
