"""The story of the density suite: a published recipe repeated, importance weights and layers, and other images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from dgm.bench_results import Results
from dgm.bench_story import Chapter

from .density_data import name_of
from .density_list import METHODS, STATIC
from .density_plots import curves_figure, differences_figure, pictures_figure
from .density_report import RECIPE, difference, orders

REFERENCE = "VAE, 1 layer, K=1"
SHAPES = {"frey-faces": (28, 20)}


def story(results: Results) -> list[Chapter]:
    """All chapters of which there are rows."""
    tasks = [str(t) for t in dict.fromkeys(results.good["task"])]
    found = [_recipe(results, task) for task in tasks if name_of(task) == STATIC]
    burda = [task for task in tasks if name_of(task) in ("mnist", "omniglot")]
    others = [task for task in tasks if name_of(task) in ("fashion-mnist", "frey-faces")]
    if burda:
        found.append(_weights(results, burda))
    if others:
        found.append(_others(results, others))
    return found


def mean(rows: pd.DataFrame, column: str) -> float:
    """Over repeats; NaN where no row has the column."""
    values: Any = pd.to_numeric(rows.get(column, pd.Series(dtype=float)), errors="coerce").dropna()
    return float(values.mean()) if len(values) else math.nan


def told(value: float, error: float = math.nan, sign: bool = False) -> str:
    """A number of nats, with its standard error where it is known.

    >>> told(-1.051, 0.0412, sign=True), told(89.781), told(float("nan"))
    ('-1.05 ± 0.04', '89.78', '–')
    """
    if math.isnan(value):
        return "–"
    return (f"{value:+.2f}" if sign else f"{value:.2f}") + ("" if math.isnan(error) else f" ± {error:.2f}")


def table_of(results: Results, task: str, reference: str) -> pd.DataFrame:
    """Guides of a task, best first: bound, difference to a reference in pairs, ELBO, gaps, active units."""
    rows = results.good
    part = rows[rows["task"] == task]
    guides = sorted(dict.fromkeys(part["guide"]), key=lambda g: mean(part[part["guide"] == g], "nll"))
    found = []
    for guide in guides:
        own = part[part["guide"] == guide]
        gap = difference(results, task, guide, reference) if guide != reference else None
        found.append(
            {
                "task": task, "guide": guide, "NLL": told(mean(own, "nll")),
                f"minus {reference}": told(gap.value, gap.error, sign=True) if gap is not None else "–",
                "NLL, 5000 draws": told(mean(own, "nll_tight"), mean(own, "nll_tight_gain_se")),
                "ELBO": told(mean(own, "elbo")), "gap": told(mean(own, "gap")),
                "approximation": told(mean(own, "approximation"), mean(own, "approximation_se")),
                "amortization": told(mean(own, "amortization"), mean(own, "amortization_se")),
                "active": ", ".join(dict.fromkeys(str(a) for a in own["active_by_layer"])),
                "epochs": f"{mean(own, 'epoch_kept'):.0f} of {mean(own, 'epochs_trained'):.0f}",
            }
        )  # fmt: skip
    frame = pd.DataFrame(found)
    return frame.loc[:, (frame != "–").any()]


def arrays_of(results: Results, task: str) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of the first seed by guide, where they are kept."""
    rows = results.good
    part = rows[(rows["task"] == task) & (rows["seed"] == 0)]
    found = {str(g): results.arrays(str(k)) for g, k in zip(part["guide"], part["key"], strict=True)}
    return {guide: arrays for guide, arrays in found.items() if arrays}


def _recipe(results: Results, task: str) -> Chapter:
    rows = results.good
    part = rows[rows["task"] == task]
    own = part[part["guide"] == RECIPE]
    says = [
        (
            "question",
            "Does a VAE with 784-400-40 units reach the published 89.78 nats on fixed binarized MNIST (pythae's row; "
            "89.9 of Rezende and Mohamed, 2015, is what it repeats), and what is a richer guide worth, by one recipe?",
        ),
        (
            "protocol",
            "50,000 training, 10,000 validation and test images of the fixed binarization; ReLU units; batches of 100; "
            "Adam 1e-4, times 10^(-1/5) after epochs 200 and 350; at most 500 epochs; the state of the best "
            "validation bound; 200 draws for each test image.",
        ),
    ]
    if len(own):
        says.append(
            (
                "obtained",
                f"{told(mean(own, 'nll'))} nats with the diagonal normal over {len(own)} "
                f"seed{'s' if len(own) > 1 else ''} ({told(mean(own, 'nll_se'))} over test images; published 89.78 and "
                f"89.9); by 5000 draws {told(mean(own, 'nll_tight'))}.",
            )
        )
    others = [str(g) for g in dict.fromkeys(part["guide"]) if g != RECIPE]
    compared = {g: difference(results, task, g, RECIPE) for g in others}
    if any(d is not None for d in compared.values()):
        said = "; ".join(f"{g} {told(d.value, d.error, sign=True)}" for g, d in compared.items() if d is not None)
        says.append(("families", f"{said} nats against the diagonal normal, ± over pairs of images or over seeds."))
    says.append(
        (
            "gaps",
            "gap: importance bound minus ELBO, what q loses at least. Where it is told, approximation is what the best "
            "q of the family loses on an image, amortization what the encoder loses of that, on 50 test images "
            f"(Cremer, Li and Duvenaud, 2018).{_short_of_best(part)}",
        )
    )
    return Chapter(
        "1. Fixed binarized MNIST by a published recipe", says, table_of(results, task, RECIPE),
        _pictures(results, [task], "density-recipe"),
    )  # fmt: skip


def _short_of_best(rows: pd.DataFrame) -> str:
    """Guides whose best q was still gaining when its steps were over: theirs is the larger approximation gap."""
    done: Any = rows.get("gap_converged", pd.Series(True, index=rows.index))
    short = ", ".join(dict.fromkeys(str(g) for g in rows["guide"][done.eq(False)]))
    said = f" Approximation is too large, and amortization too small, of {short}: its best q still gained."
    return said if short else ""


def _weights(results: Results, tasks: list[str]) -> Chapter:
    found = orders(results)
    says = [
        (
            "question",
            "Do importance weights in training and a second stochastic layer lower the bound, in the order that Burda, "
            "Grosse and Salakhutdinov, 2016, found after 3280 epochs?",
        ),
        (
            "reading",
            "A few epochs are compared with one another at equal numbers of epochs, and the differences alone stand "
            "beside published ones: after so few, that of 1 and 50 weights is mostly one of speed.",
        ),
    ]
    if len(found):
        sure = int((found["value"] < -2 * found["error"].fillna(0.0)).sum())
        says.append(
            ("order", f"{sure} of {len(found)} differences have the published sign beyond two standard errors.")
        )
    table = pd.DataFrame(
        [
            {
                "task": r["task"], "difference of": f"{r['better']} and {r['worse']}",
                "nats": told(r["value"], r["error"], sign=True), "published": f"{r['published']:+.2f} [{r['tag']}]",
            }
            for r in found.to_dict("records")
        ]
    )  # fmt: skip
    figures = []
    panels = {
        task: [(f"{r['better']} − {r['worse']}", r["value"], r["error"]) for r in part.to_dict("records")]
        for task, part in found.groupby("task", sort=False)
    }
    if panels:
        text = "In pairs of held-out images, with two standard errors; left of zero: as published."
        drawn = differences_figure({str(k): v for k, v in panels.items()}, "difference of NLL, nats")
        figures.append(("density-order", "Order of methods", text, drawn))
    return Chapter(
        "2. Importance weights and layers", says, table if len(table) else None,
        [*figures, *_pictures(results, tasks, "density-weights")],
    )  # fmt: skip


def _others(results: Results, tasks: list[str]) -> Chapter:
    says = [
        (
            "question",
            "The same methods where no table is published: thresholded Fashion-MNIST, and the frames of a face as "
            "densities of grey levels. Frames are few, 1565 to train on, and the seeds are other partitions of them.",
        )
    ]
    for task in tasks:
        rows = results.good[results.good["task"] == task]
        guides = [g for g in METHODS if g in set(rows["guide"]) and g != REFERENCE]
        pairs = [(g, difference(results, task, g, REFERENCE)) for g in guides]
        if said := "; ".join(f"{g} {told(d.value, d.error, sign=True)}" for g, d in pairs if d is not None):
            says.append((name_of(task), f"NLL against {REFERENCE}, nats: {said}."))
    table = pd.concat([table_of(results, task, REFERENCE) for task in tasks], ignore_index=True).fillna("–")
    return Chapter("3. Clothes and a face", says, table, _pictures(results, tasks, "density-others"))


def _pictures(results: Results, tasks: list[str], name: str) -> list[Any]:
    arrays = {task: found for task in tasks if (found := arrays_of(results, task))}
    if not arrays:
        return []
    curves = curves_figure(arrays)
    text = "ELBO of validation rows, whatever the objective of training; a dot: the best epoch."
    figures: list[Any] = [(f"{name}-curves", "Training", text, curves)]
    for task, own in arrays.items():
        short = {g: a["pictures"] for g, a in own.items() if "pictures" in a}
        some = dict(list(short.items())[:4])
        place = f"{name}-{name_of(task)}"
        said = "E[x | z] at draws of the prior; nothing was chosen."
        figures.append(
            (place, f"What the models draw: {name_of(task)}", said,
             pictures_figure(some, SHAPES.get(name_of(task), (28, 28)), ink=name_of(task) != "frey-faces"))
        )  # fmt: skip
    return figures
