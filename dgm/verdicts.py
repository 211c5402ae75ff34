"""What an evaluation comes to, in sentences, each with what it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import binom

from .bounds import mean_and_standard_error
from .metrics import GaussianPrediction, VectorPrediction
from .style import limit, share
from .uncertainty import selective

if TYPE_CHECKING:
    from .evaluation import Evaluation

__all__ = ["Verdict", "verdicts"]

Level = Literal["good", "caution", "bad", "unknown"]

FEW, MANY = 0.05, 0.25
"""Shares of data with a k-hat above its threshold: up to the first is good, above the second is bad."""

LOOSE = 0.1
"""Nats by which another bound must lie above ours for ours to be called loose."""


@dataclass(frozen=True)
class Verdict:
    """One sentence, how good the news is, and what it rests on."""

    about: str
    level: Level
    says: str
    rests: str

    def __repr__(self) -> str:
        return f"[{self.level}] {self.says} ({self.rests})"


def verdicts(result: Evaluation) -> list[Verdict]:
    """A verdict for each question that this evaluation can answer.

    >>> import torch, dgm
    >>> from dgm.models.linear_vae import example
    >>> from dgm.guides.amortized import Amortized
    >>> model, (x,) = example()
    >>> [v.about for v in dgm.evaluate(model, Amortized(model, x), x).verdicts]
    ['evidence', 'weights']
    """
    found = [_evidence(result), *_weights(result), *_posterior(result), *_gap(result), *_latents(result)]
    return [*found, *_predictions(result)]


def _evidence(result: Evaluation) -> Verdict:
    bound, rows = result.bound, len(result.per_datum)
    if bound is None:
        return Verdict(
            "evidence",
            "unknown",
            "There is no bound on log p(x): the guide has no density.",
            f"{rows} rows; what can be told of such a guide are its predictions",
        )
    predictive = result.kind.startswith("log predictive")
    what = "The log predictive density of held-out rows is" if predictive else "log p(x) is at least"
    says = f"{what} {_number(bound.mean, bound.se)} ± {_error(bound.se)} nats a datum."
    rests = f"{bound.method}, K = {result.num_samples}, {rows} rows; ± is the standard error over data"
    if math.isfinite(bound.mc_se):
        rests += f", by chance of the draws alone ± {_error(bound.mc_se)}"
    level: Level = "good"
    lost = int((bound.values == -math.inf).sum())
    if lost:
        level, says = "bad", says + f" For {lost} of {rows} rows no draw of the guide has any weight."
    if result.annealed is not None and result.annealed_rows is not None:
        annealed, own = result.annealed, bound.rows(result.annealed_rows.to(bound.values.device))
        gain, error = mean_and_standard_error(annealed.values.cpu().double() - own.values.cpu().double())
        better = annealed if annealed.mean > own.mean else own
        says += f" Of the two bounds on {len(own.values)} rows the {better.method} is the better"
        says += f", by {abs(gain):.3f} ± {error:.3f}" + ("." if abs(gain) > 2 * error else ": no clear difference.")
        if gain > max(LOOSE, 2 * error):
            level, says = "caution", says + " The importance bound is loose by at least that."
        rests += f"; {annealed.method} with {annealed.draws} chains"
    return Verdict("evidence", level, says, rests)


def _weights(result: Evaluation) -> Iterator[Verdict]:
    khat = result.per_datum["khat"].dropna()
    if not len(khat):
        return
    kept = min(result.num_samples, 1000)
    threshold = result.k_threshold
    bad = khat > threshold
    worst = [int(i) for i in result.worst(5).index if bad.get(i, False)]
    level: Level = "good" if bad.mean() <= FEW else ("caution" if bad.mean() <= MANY else "bad")
    if (khat == -math.inf).all():
        says = "All weights of a row are equal, as at the exact posterior."
    elif not len(worst):
        says = "The importance weights can be trusted for every row."
    else:
        says = f"The importance weights cannot be trusted for {share(float(bad.mean()))} of the rows"
        says += f": there the bound may be loose and its error too small. Look at rows {', '.join(map(str, worst))}."
    ess = result.per_datum["ess"] / result.num_samples
    yield Verdict(
        "weights",
        level,
        says,
        f"k-hat of {len(khat)} rows from {kept} draws each, threshold {limit(threshold)}; "
        f"effective share of the draws: median {share(float(ess.median()))}, least {share(float(ess.min()))}",
    )


def _posterior(result: Evaluation) -> Iterator[Verdict]:
    khat = result.summary.get("khat_posterior")
    if khat is None or math.isnan(khat):
        return
    good = khat <= result.k_threshold
    yield Verdict(
        "posterior",
        "good" if good else "bad",
        "The guide is close enough to the posterior of the global latents to be reweighted into it."
        if good
        else "The guide is far from the posterior of the global latents: its predictions may still be good, its "
        "uncertainty is not the model's.",
        f"k-hat {khat:.2f} of the log weights over all training rows, threshold {limit(result.k_threshold)}",
    )


def _gap(result: Evaluation) -> Iterator[Verdict]:
    if result.gaps is None:
        return
    found = result.gaps.summary
    total, family, encoder = (found[name] for name in ("total", "approximation", "amortization"))
    errors = {name: found[f"{name}_se"] for name in ("approximation", "amortization")}
    larger = "q's family" if family > encoder else "its encoder"
    settled = abs(family - encoder) > 2 * math.hypot(*errors.values())
    says = (
        f"Of a gap of {total:.2f} nats between log p(x) and the ELBO {family:.2f} ± {errors['approximation']:.2f} are "
        f"due to q's family and {encoder:.2f} ± {errors['amortization']:.2f} to its encoder"
    )
    says += f": the larger part is {larger}." if settled else "."
    level: Level = "good" if total < 1 else "caution"
    rests = f"{len(result.gaps.per_datum)} rows, q optimised for each by itself; {result.gaps.mode}"
    if not result.gaps.converged:
        level, rests = "caution", rests + "; that optimisation had not converged, so that the split is uncertain"
    yield Verdict("gap", level, says, rests)


def _latents(result: Evaluation) -> Iterator[Verdict]:
    if result.latents is None:
        return
    found = result.latents
    dead = found.total_units - found.active
    level: Level = "bad" if found.active == 0 else ("caution" if 2 * dead > found.total_units else "good")
    yield Verdict("latents", level, found.verdict, found.rests)


def _predictions(result: Evaluation) -> Iterator[Verdict]:
    prediction = result.prediction
    if prediction is None or isinstance(prediction, VectorPrediction):  # of several columns: no one interval to judge
        return
    count = len(result.per_datum)
    if isinstance(prediction, GaussianPrediction):
        inside = round(prediction.coverage(0.95) * count)
        low, high = (int(binom.ppf(p, count, 0.95)) for p in (0.005, 0.995))
        right = low <= inside <= high
        tone = "as they should" if right else ("too few: over-confident" if inside < low else "too many: too cautious")
        says = f"95 % predictive intervals cover {100 * inside / count:.1f} % of the held-out rows, {tone}."
        rests = f"{inside} of {count} rows; by chance {low} to {high} (99 %)"
        yield Verdict("calibration", "good" if right else "bad", says, rests)
        return
    confidence = float(prediction.probs.max(-1).values.mean())
    accuracy = prediction.accuracy()
    error = float(np.sqrt(max(accuracy * (1 - accuracy), 1 / count) / count))
    off = (confidence - accuracy) / error
    right = abs(off) < 2.6
    tone = "as large as its accuracy" if right else ("larger" if off > 0 else "smaller") + " than its accuracy"
    yield Verdict(
        "calibration",
        "good" if right else "bad",
        f"Mean confidence {100 * confidence:.1f} % is {tone}, {100 * accuracy:.1f} %.",
        f"{count} rows; difference {off:+.1f} standard errors; expected calibration error "
        f"{result.summary.get('calibration_error', math.nan):.3f} in 15 bins of equal width, where calibrated "
        f"predictions would have {prediction.reliability().chance:.3f}",
    )
    if 0 < accuracy < 1:
        kept, least, most = selective(prediction).accuracy_at(0.8)
        helps = least > accuracy
        yield Verdict(
            "abstaining",
            "good" if helps else "unknown",
            f"On the 80 % of the rows that it is most certain of its accuracy is {100 * kept:.1f} %"
            + (": it knows what it does not know." if helps else ", no clear gain."),
            f"95 % interval {100 * least:.1f} to {100 * most:.1f} %, {100 * accuracy:.1f} % of all {count}",
        )


def _error(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "unknown"


def _number(value: float, error: float) -> str:
    digits = 2 if not (math.isfinite(error) and error > 0) else max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{min(digits, 4)}f}".replace("-", "−")
