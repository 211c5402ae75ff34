"""What the rows of the shift suite say: as images are corrupted, before foreign images, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from dgm.bench_results import Results
from dgm.bench_story import Chapter
from dgm.errors import DataError
from dgm.page import Drawn

from .moons_story import means, paired, told
from .shift_bnn import PLACES
from .shift_images import STEPS, UNITS, foreign_of
from .shift_plots import SHIFT, curves_figure, detection_figure, images_figure, names_of

POINT = "point"
SHORT = ("other set", "OMNIGLOT", "noise")
"""Foreign kinds in heads of tables."""
SCORES = {"entropy": "predictive entropy", "epistemic": "its epistemic part", "confidence": "1 - largest probability"}
FOLLOWED = {"accuracy": "accuracy", "calibration_error": "calibration error", "entropy": "entropy, nats"}

Groups = Mapping[str, pd.DataFrame]
"""Rows by guide."""


def groups_of(rows: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Rows of every seed by task and guide."""
    return {
        str(task): {str(guide): own for guide, own in part.groupby("guide", sort=False)}
        for task, part in rows.groupby("task", sort=False)
    }


def over_corruptions(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Mean over the corruptions at severities 0 to 5, a row for each seed.

    >>> one = {c: 0.5 for kind in STEPS for c in names_of("accuracy", kind)}
    >>> over_corruptions(pd.DataFrame([one]), "accuracy").values.tolist()
    [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]
    """
    parts = [rows[names_of(name, kind)].astype(float).set_axis(list(SHIFT), axis=1) for kind in STEPS]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)


def best(groups: Groups, column: str, most: bool = True) -> str:
    """The guide with the largest, or smallest, mean."""
    return max(groups, key=lambda guide: (1 if most else -1) * means(groups[guide], column)[0])


def learned(groups: Groups) -> Groups:
    """Guides that are more accurate than the nearest mean image: only they are compared, if there are any."""
    found = {g: part for g, part in groups.items() if means(part, "accuracy")[0] > means(part, "nearest_mean")[0]}
    return found or groups


def left_out(groups: Groups) -> str:
    """Those that are not compared: doubting everything is no knowledge."""
    names = [said_of(groups, guide, "accuracy") for guide in groups if guide not in learned(groups)]
    return f" Not compared, for the nearest mean image is more accurate: {'; '.join(names)}." if names else ""


def said_of(groups: Groups, guide: str, column: str) -> str:
    return f"{guide}, {told(*means(groups[guide], column))}"


def story(results: Results) -> list[Chapter]:
    """All chapters of which there are rows."""
    rows = results.good
    by = groups_of(rows)
    return [_start(results), _grows(rows, by), _foreign(rows, by), _cost(results, by)]


def _start(results: Results) -> Chapter:
    first = results.good.iloc[0]
    widths = [196 if first["halved"] else 784, *first["hidden"], 10]
    small = " by means of 2 x 2 pixels" if first["halved"] else ""
    listed = "; ".join(f"{kind} by {', '.join(f'{p:g}' for p in STEPS[kind])} ({UNITS[kind]})" for kind in STEPS)
    says = [
        (
            "question",
            "A network learns digits, or clothes. Then it is shown what it has not learned: the same images ever more "
            "corrupted, and images of other kinds. Which approximate posterior notices?",
        ),
        (
            "network",
            f"{'-'.join(map(str, widths))}, ReLU{small}; {first['rows']} training images, others for each seed; "
            f"{first['steps']} steps of {first['batch_size']}. One prior and one recipe for all guides.",
        ),
        ("corruptions", f"severities 1 to 5: {listed}."),
        (
            "reading",
            "Accuracy falls under shift for everybody. What a posterior can do is lose confidence with it: its "
            "calibration error stays low, and its entropy tells what it does not know. AUROC: how often a foreign "
            "image has the higher uncertainty of a pair; 0.5 is a coin, and below it the network is surer of what it "
            "has never seen. ±: standard error over seeds.",
        ),
    ]
    if results.plan["budget"] == "smoke":
        says.append(("smoke", "This budget shows that everything runs. It is far too short for a conclusion."))
    text = "The first test image of each set under every corruption, and what is shown as foreign."
    try:
        figures: list[Drawn] = [("shift-images", "What is shown", text, images_figure())]
    except DataError:  # the rows were brought without the images
        figures = []
    return Chapter("1. What is asked", says, None, figures)


def _grows(rows: pd.DataFrame, by: Mapping[str, Groups]) -> Chapter:
    says, lines, figures = [], [], []
    for task, groups in by.items():
        says.append((task, _shifted(learned(groups)) + left_out(groups)))
        for guide, part in groups.items():
            accuracy, error = (over_corruptions(part, name) for name in ("accuracy", "calibration_error"))
            lines.append(
                {"trained on": task, "guide": guide}
                | {f"accuracy, {s}": told(*_mean(accuracy[s])) for s in (0, 3, 5)}
                | {f"calibration error, {s}": told(*_mean(error[s])) for s in (0, 1, 3, 5)}
            )
        text = (
            "Means over seeds; from left to right the corruption grows, by the numbers below. Calibration error: mean "
            "distance of confidence and accuracy over 15 bins of equal width."
        )
        picture = curves_figure(rows[rows["task"] == task], FOLLOWED)
        figures.append((f"shift-{task.lower()}-curves", f"{task}: as the shift grows", text, picture))
    return Chapter("2. What happens as the shift grows", says, pd.DataFrame(lines), figures)


def _mean(values: Any) -> tuple[float, float]:
    return means(pd.DataFrame({"x": values}), "x")


def _shifted(groups: Groups) -> str:
    clean, calm = best(groups, "accuracy"), best(groups, "calibration_error", False)
    shifted = "calibration_error_shifted"
    firm, worst = best(groups, shifted, False), best(groups, shifted)
    text = (
        f"On images as they are the most accurate is {said_of(groups, clean, 'accuracy')}, the best calibrated "
        f"{said_of(groups, calm, 'calibration_error')}. Over all corruptions and severities the best calibrated is "
        f"{said_of(groups, firm, shifted)}, at accuracy {told(*means(groups[firm], 'accuracy_shifted'))}; the worst "
        f"{said_of(groups, worst, shifted)}."
    )
    if len(groups) > 2:
        both = pd.DataFrame(
            {name: [means(p, name)[0] for p in groups.values()] for name in ("calibration_error", shifted)}
        )
        order = both.rank().corr().to_numpy(dtype=float)[0, 1]
        text += (
            f" Calibration on images as they are {_foretells(order)} calibration under shift: rank correlation over "
            f"guides {order:+.2f}."
        )
    if POINT in groups:
        right, off = (over_corruptions(groups[POINT], name) for name in ("accuracy", "calibration_error"))
        text += (
            f" From severity 0 to 5 the accuracy of the point goes from {told(*_mean(right[0]))} to "
            f"{told(*_mean(right[5]))}, its calibration error from {told(*_mean(off[0]))} to {told(*_mean(off[5]))}."
        )
        text += better_text(groups, shifted, False, "Better calibrated under shift")
    return text


def _foretells(order: float) -> str:
    return "foretells" if order > 0.6 else "foretells the contrary of" if order < -0.3 else "says little of"


def better_text(groups: Groups, column: str, most: bool, said: str) -> str:
    """Which guides beat the point in every seed, with paired differences."""
    found, point = {}, groups[POINT].set_index("seed")[column]
    for guide, part in groups.items():
        ahead = (part.set_index("seed")[column] - point).dropna() * (1 if most else -1)
        if guide != POINT and len(ahead) and bool((ahead > 0).all()):
            found[guide] = paired(groups[POINT], part, column)
    seeds = groups[POINT]["seed"].nunique()
    text = f" {said} than the point in {'the one seed' if seeds == 1 else f'each of {seeds} seeds'}: "
    order = sorted(found, key=lambda guide: (-1 if most else 1) * found[guide][0])
    return text + (", ".join(f"{guide} ({told(*found[guide], sign=True)})" for guide in order) or "none") + "."


def _foreign(rows: pd.DataFrame, by: Mapping[str, Groups]) -> Chapter:
    says, figures, lines = [], [], []
    for task, groups in by.items():
        says.append((task, _told_apart(task, learned(groups)) + left_out(groups)))
        places = dict(zip(PLACES, foreign_of(task), strict=True))
        for guide, part in groups.items():
            line = {"trained on": task, "guide": guide}
            for place, name in zip(PLACES, SHORT, strict=True):
                line[f"{name}, entropy"] = told(*means(part, f"auroc_entropy_{place}"))
                line[f"{name}, epistemic"] = told(*means(part, f"auroc_epistemic_{place}"))
            lines.append(line)
        picture = detection_figure(rows[rows["task"] == task], places, SCORES)
        text = "Means and two standard errors over seeds. Dotted: a coin. A point has no epistemic part: 0.5."
        figures.append((f"shift-{task.lower()}-foreign", f"{task}: foreign images", text, picture))
    return Chapter("3. Who knows that it does not know", says, pd.DataFrame(lines), figures)


def _told_apart(task: str, groups: Groups) -> str:
    top, low = best(groups, "auroc_entropy"), best(groups, "auroc_entropy", False)
    text = (
        f"By predictive entropy {said_of(groups, top, 'auroc_entropy')} on average over the three kinds, tells foreign "
        f"images best, {said_of(groups, low, 'auroc_entropy')}, worst; at the threshold that finds 95 % of them "
        f"{top} flags {100 * means(groups[top], 'fpr95')[0]:.0f} % of the known images too."
    )
    if POINT in groups:
        text += better_text(groups, "auroc_entropy", True, "Better by entropy")
    own = {guide: part for guide, part in groups.items() if means(part, "epistemic")[0] > 0}
    if own:
        gains = {guide: means(p, "auroc_epistemic")[0] - means(p, "auroc_entropy")[0] for guide, p in own.items()}
        more = sum(gain > 0 for gain in gains.values())
        text += (
            f" The epistemic part alone, the disagreement of the draws, is better than the whole entropy for {more} of "
            f"{len(own)} guides with a spread; its best is "
            f"{said_of(own, best(own, 'auroc_epistemic'), 'auroc_epistemic')}."
        )
    lost = [
        f"{guide} before {name} ({told(*means(part, f'auroc_entropy_{place}'))})"
        for guide, part in groups.items()
        for place, name in zip(PLACES, foreign_of(task), strict=True)
        if means(part, f"auroc_entropy_{place}")[0] < 0.5
    ]
    return text + (f" Surer of what it has never seen than of what it has learned: {', '.join(lost)}." if lost else "")


def _cost(results: Results, by: Mapping[str, Groups]) -> Chapter:
    costs = results.costs.set_index("key") if "key" in results.costs else pd.DataFrame()
    lines, says = [], []
    for task, groups in by.items():
        spent = {guide: _spent(costs, part, "seconds") for guide, part in groups.items()}
        shown = {guide: _spent(costs, part, "predict_seconds") for guide, part in groups.items()}
        base = spent.get(POINT, math.nan)
        for guide, part in groups.items():
            lines.append(
                {
                    "trained on": task, "guide": guide, "parameters": int(part["parameters"].iloc[0]),
                    "training, s": _number(spent[guide]), "of the point's": _number(spent[guide] / base),
                    "prediction, s": _number(shown[guide]), "log-likelihood": told(*means(part, "log_likelihood")),
                    "AUROC, entropy": told(*means(part, "auroc_entropy")),
                    "averaging gains": told(*_mean(part["log_likelihood"] - part["single_log_likelihood"])),
                }
            )  # fmt: skip
        if not math.isnan(base) and len(groups) > 1:
            says.append((task, _worth(learned(groups), spent, base)))
    says.append(
        (
            "reading",
            "training: wall time for one seed, of three trained at once where there are three, on a machine that did "
            "other work; prediction: all images under all draws. averaging gains: log-likelihood of the mean of all "
            "draws less the mean of theirs, nats; Jensen's inequality makes it 0 or more.",
        )
    )
    return Chapter("4. At what cost", says, pd.DataFrame(lines))


def _worth(groups: Groups, spent: Mapping[str, float], base: float) -> str:
    if POINT not in groups:
        return "no rows of a point to compare with."
    good = means(groups[POINT], "auroc_entropy")[0]
    ahead = [g for g in groups if g != POINT and means(groups[g], "auroc_entropy")[0] > good and spent[g] > 0]
    if not ahead:
        return "no guide tells foreign images better than the point, whatever it costs."
    cheap, top = min(ahead, key=lambda g: spent[g]), best(groups, "auroc_entropy")
    return (
        f"the cheapest that tells foreign images better than the point ({told(*means(groups[POINT], 'auroc_entropy'))})"
        f" is {said_of(groups, cheap, 'auroc_entropy')}, for {spent[cheap] / base:.1f} of its training time; the best "
        f"is {said_of(groups, top, 'auroc_entropy')}, for {spent[top] / base:.1f}."
    )


def _spent(costs: pd.DataFrame, part: pd.DataFrame, column: str) -> float:
    known = costs.reindex(part["key"])[column] if column in costs else pd.Series(dtype=float)
    return float(pd.to_numeric(known, errors="coerce").mean()) if len(known) else math.nan


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
