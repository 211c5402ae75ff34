"""The story of the moons suite: symptom, evidence, what the doctor says, the cure and its effect, for each failure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import dgm
from dgm.bench_results import Results
from dgm.bench_story import Chapter

from .moons_bnn import REFERENCE, TASK
from .moons_models import log_truth
from .moons_plots import planes_figure, samples_figure
from .moons_vae import COLLAPSE, CURES, FAMILY, SCALE, SETTINGS

SYMPTOMS = {
    SCALE: (
        "Squared error is a normal likelihood of scale 1, and many a VAE is trained by it; others set a scale of 0.01, "
        "for sharp pictures. Samples are a fog about the data, or lie where no data are."
    ),
    FAMILY: (
        "The scale is learned now, and ends far above the noise of the data, 0.1: samples are too wide, and a gap "
        "opens between data and model that an ELBO does not explain."
    ),
    COLLAPSE: (
        "A decoder of mixtures, x2 after x1, draws good samples from the start, and its bound is good. Yet no code "
        "knows which moon its point came from: z is not used."
    ),
}
FIRST = {SCALE: "scale 1 (squared error)", FAMILY: "diagonal normal", COLLAPSE: "KL from the start"}
TITLES = {
    SCALE: "1. A likelihood of the wrong scale", FAMILY: "2. A q too simple for the shape", COLLAPSE: "3. Collapse",
}  # fmt: skip
ALSO = ("diagonal normal, 16 weights",)
"""Settings that are a cure as well."""
WORDS = {
    SCALE: "learn the scale, one parameter: Normal() instead of Normal(1.0).",
    FAMILY: (
        "a family that bends, Amortized(model, x, family=InverseAutoregressiveFlow), or importance weights that make "
        "up for one that does not, loss=dgm.ImportanceELBO(16)."
    ),
    COLLAPSE: (
        "loss=dgm.ELBO(kl='analytic', free_bits=0.5): the first half nat of each unit costs nothing. Or a weaker "
        "decoder: that of part 2."
    ),
}


BENT = 0.92


def means(rows: pd.DataFrame, column: str) -> tuple[float, float]:
    """Mean over seeds and its standard error, NaN where there is one seed."""
    values: Any = pd.to_numeric(rows.get(column, pd.Series(dtype=float)), errors="coerce").dropna()
    return float(values.mean()), float(values.sem()) if len(values) > 1 else math.nan


def told(value: float, error: float, digits: int = 3, sign: bool = False) -> str:
    """A mean with its standard error.

    >>> told(-1.05, 0.012), told(1.0, math.nan)
    ('-1.050 ± 0.012', '1.000')
    """
    if math.isnan(value):
        return "–"
    number = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return number + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def story(results: Results) -> list[Chapter]:
    """All chapters of which there are rows."""
    rows = results.good
    found = [_start(results)]
    found += [_failure(results, rows[rows["task"] == task], task) for task in SETTINGS if (rows["task"] == task).any()]
    if (rows["task"] == TASK).any():
        found.append(_classifiers(results, rows[rows["task"] == TASK]))
    return found


def _start(results: Results) -> Chapter:
    truth = log_truth(dgm.load("moons-points").test[0])
    says = [
        ("data", "Two half circles of radius 1 with normal noise of 0.1: 1000 points to train on, 1000 held out."),
        (
            "ceiling",
            f"Their density is known: {float(truth.mean()):.3f} nats a held-out point, which no model beats but by "
            "chance. What a VAE lacks of it is its error and its bound's, together.",
        ),
        ("reading", "±: standard error over seeds. Pictures are of the first seed; nothing in them was chosen."),
    ]
    if results.plan["budget"] == "smoke":
        says.append(("smoke", "This budget shows that everything runs. It is far too short for a conclusion."))
    return Chapter("Two moons from both sides", says)


def _failure(results: Results, rows: pd.DataFrame, task: str) -> Chapter:
    by = {str(name): part for name, part in rows.groupby("guide", sort=False)}
    bad, good = by.get(FIRST[task]), by.get(CURES[task])
    says = [("symptom", SYMPTOMS[task])]
    if bad is not None:
        says += [("evidence", _evidence(bad)), ("the doctor says", _diagnosis(bad))]
    says.append(("cure", WORDS[task]))
    if bad is not None and good is not None:
        says += [("effect", _effect(bad, good)), ("the doctor, afterwards", _diagnosis(good))]
    others = [(n, p) for n, p in by.items() if n not in (FIRST[task], CURES[task])]
    if bad is not None and others:
        gains = "; ".join(f"{n}: bound {told(*paired(bad, p, 'log_likelihood'), sign=True)}" for n, p in others)
        says.append(("what else was tried", f"{gains} nats, against {FIRST[task]!r}."))
    table = pd.DataFrame([_line(name, part) for name, part in by.items()])
    table = table.loc[:, (table != "–").any()]  # a scale that no setting learns
    arrays = arrays_of(results, task)
    marks = {
        n: "fails" if s.fails else "cure" if n == CURES[task] or n in ALSO else "" for n, s in SETTINGS[task].items()
    }
    text = "Above: draws of each model beside the data. Below: codes of held-out points, by moon, beside the prior."
    name = f"moons-{TITLES[task][0]}"
    figures = [(name, TITLES[task], text, samples_figure(arrays, marks))] if arrays else []
    return Chapter(TITLES[task], says, table, figures)


def _line(name: str, rows: pd.DataFrame) -> dict[str, str]:
    units = means(rows, "units")[0]
    doctor = next((str(d) for d in rows.get("doctor", pd.Series(dtype=str)).dropna()), "–")
    return {
        "setting": name,
        "bound, nats": told(*means(rows, "log_likelihood")),
        "active": f"{means(rows, 'active_units')[0]:.1f} of {units:.0f}",
        "information": told(*means(rows, "information"), 2),
        "k-hat high": f"{100 * means(rows, 'khat_bad')[0]:.0f} %",
        "learned scale": told(*means(rows, "scale")),
        "doctor": doctor,
    }


def _evidence(rows: pd.DataFrame) -> str:
    lacks, error = means(rows, "below_truth")
    said = (
        f"The held-out bound is {told(lacks, error)} nats below the truth; {means(rows, 'active_units')[0]:.1f} of "
        f"{means(rows, 'units')[0]:.0f} units are active and tell {told(*means(rows, 'information'), 2)} nats of a "
        f"point; {100 * means(rows, 'khat_bad')[0]:.0f} % of the points have a k-hat above its threshold"
    )
    scale = means(rows, "scale")
    return said + ("." if math.isnan(scale[0]) else f"; the learned scale is {told(*scale)}.")


def _diagnosis(rows: pd.DataFrame) -> str:
    part = rows.dropna(subset=["doctor"]) if "doctor" in rows else rows.iloc[:0]
    if not len(part):
        return "it was not asked."
    row = part.iloc[0]
    lacking = f" (not told: {row['doctor_skipped']})" if row.get("doctor_skipped") else ""
    if pd.isna(row.get("evidence")):
        return f"{row['doctor']}{lacking}."
    return f"{row['doctor']}: {row['evidence']}. So: {row['consequence']}. Cure: {row['cure']}{lacking}."


def paired(first: pd.DataFrame, second: pd.DataFrame, column: str) -> tuple[float, float]:
    """Mean of second - first over the seeds that both have, and its standard error."""
    both = first.set_index("seed")[[column]].join(second.set_index("seed")[[column]], rsuffix="_2", how="inner")
    difference: Any = (pd.to_numeric(both[f"{column}_2"]) - pd.to_numeric(both[column])).dropna()
    return float(difference.mean()), float(difference.sem()) if len(difference) > 1 else math.nan


def _effect(bad: pd.DataFrame, good: pd.DataFrame) -> str:
    gain, error = paired(bad, good, "log_likelihood")
    more = paired(bad, good, "information")
    units = paired(bad, good, "active_units")[0]
    return (
        f"Bound {told(gain, error, sign=True)} nats a point, information {told(*more, 2, sign=True)}, active units "
        f"{units:+.1f}; {told(*means(good, 'below_truth'))} nats are left to the truth."
    )


def arrays_of(results: Results, task: str) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of the first seed by guide, where they are kept."""
    rows = results.good
    part = rows[(rows["task"] == task) & (rows["seed"] == 0)]
    found = {str(g): results.arrays(k) for g, k in zip(part["guide"], part["key"], strict=True)}
    return {guide: arrays for guide, arrays in found.items() if arrays}


def to_reference(results: Results) -> dict[str, tuple[float, float]]:
    """Mean over the plane of |p - p of NUTS|, the same rows, by guide: mean over seeds and its standard error."""
    rows = results.good
    part = rows[rows["task"] == TASK]
    planes: dict[tuple[str, int], np.ndarray] = {}
    for guide, seed, key in zip(part["guide"], part["seed"], part["key"], strict=True):
        plane = results.arrays(str(key)).get("probability")
        if plane is not None:
            planes[str(guide), int(seed)] = plane
    found: dict[str, list[float]] = {}
    for (guide, seed), plane in planes.items():
        if guide != REFERENCE and (REFERENCE, seed) in planes:
            found.setdefault(guide, []).append(float(np.abs(plane - planes[REFERENCE, seed]).mean()))
    return {g: (float(np.mean(v)), float(np.std(v, ddof=1) / len(v) ** 0.5) if len(v) > 1 else math.nan)
            for g, v in found.items()}  # fmt: skip


def _classifiers(results: Results, rows: pd.DataFrame) -> Chapter:
    by: Mapping[str, pd.DataFrame] = {str(name): part for name, part in rows.groupby("guide", sort=False)}
    near = to_reference(results)
    table = pd.DataFrame(
        [
            {
                "guide": name,
                "log-likelihood": told(*means(part, "log_likelihood")),
                "accuracy": told(*means(part, "accuracy")),
                "calibration error": told(*means(part, "calibration_error")),
                "entropy, boundary": told(*means(part, "boundary_entropy"), 2),
                "entropy, far away": told(*means(part, "far_entropy"), 2),
                "epistemic, far away": told(*means(part, "far_epistemic"), 2),
                "from NUTS": told(*near[name]) if name in near else "–",
            }
            for name, part in sorted(by.items(), key=lambda item: -means(item[1], "log_likelihood")[0])
        ]
    )
    says = [
        (
            "question",
            "One network, one prior, 100 rows: which posterior knows that it does not know? Entropy is highest at "
            "log 2 = 0.69. On the true boundary it should be high, for nobody can tell the moons apart there; far "
            "from all data it is the prior's business, and NUTS shows what the model itself says.",
        ),
        ("reference", _reference(by)),
        ("families", _spread(by)),
    ]
    if near:
        order = sorted(near, key=lambda g: near[g][0])
        says.append(
            (
                "nearest to it",
                f"{order[0]}, {told(*near[order[0]])} in probability; farthest: {order[-1]}, {told(*near[order[-1]])}.",
            )
        )
    return Chapter("4. The other side: a Bayesian classifier", says, table, _planes(results, by))


def _spread(by: Mapping[str, pd.DataFrame]) -> str:
    own = {g: means(p, "log_likelihood") for g, p in by.items() if g != REFERENCE}
    if not own:
        return "no rows of other guides."
    order: Sequence[str] = sorted(own, key=lambda g: -own[g][0])
    sure = min(own, key=lambda g: means(by[g], "far_entropy")[0])
    return (
        f"Held-out log-likelihood goes from {told(*own[order[0]])} ({order[0]}) to {told(*own[order[-1]])} "
        f"({order[-1]}). "
        f"Surest far away: {sure}, entropy {told(*means(by[sure], 'far_entropy'), 2)}.{_straight(by)}"
    )


def _straight(by: Mapping[str, pd.DataFrame]) -> str:
    """Guides that miss the bend of the moons in some seed: a straight boundary is right for 88 % of the points."""
    counts = {name: (int((part["accuracy"] < BENT).sum()), len(part)) for name, part in by.items()}
    told_ = ", ".join(f"{name} {few} of {all_}" for name, (few, all_) in counts.items() if few)
    return f" Seeds whose boundary is nearly straight, accuracy below {BENT}: {told_}." if told_ else ""


def _reference(by: Mapping[str, pd.DataFrame]) -> str:
    part = by.get(REFERENCE)
    if part is None:
        return "no rows of NUTS."
    return (
        f"NUTS has {told(*means(part, 'log_likelihood'))}, accuracy {told(*means(part, 'accuracy'))}, entropy "
        f"{told(*means(part, 'far_entropy'), 2)} far away; R-hat of log p at most {float(part['rhat'].max()):.2f}."
    )


def _planes(results: Results, by: Mapping[str, pd.DataFrame]) -> list[Any]:
    arrays = arrays_of(results, TASK)
    if not arrays:
        return []
    first = {g: float(p[p["seed"] == 0]["log_likelihood"].iloc[0]) for g, p in by.items() if g in arrays}
    titles = {g: f"{v:.3f} nats" for g, v in first.items()}
    text = "White line: where both classes are equally likely. Dots: the 100 training rows of the first seed, by class."
    return [
        ("moons-entropy", "Predictive entropy", f"{text} Bright: unsure of the class, for whatever reason.",
         planes_figure(arrays, "entropy", math.log(2), "predictive entropy, nats", titles)),
        ("moons-epistemic", "Epistemic part", f"{text} Bright: the networks of the posterior disagree.",
         planes_figure(arrays, "epistemic", 0.5, "mutual information of class and weights, nats", titles)),
    ]  # fmt: skip
