"""One call that says how good a posterior is: bounds with errors, k-hat, effective samples, predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from .bounds import LogWeightSummary, mean_and_standard_error
from .checks import check_observed
from .data import as_tensors
from .errors import OptionError
from .heldout import row_chunks
from .metrics import CategoricalPrediction, GaussianPrediction
from .pair import Pair, chunk_of
from .posthoc import has_density, notes_of
from .programs import Program, preserved_rng
from .psis import k_threshold, pareto_k
from .runs import Graphs, Runs
from .sites import DATA_PLATE
from .weights import LogWeightSampler

KHAT_SAMPLES = 1000
"""Log weights kept for each datum to fit the tail; the bounds use all K without keeping them."""

PREDICTIVE_VALUES = 2**24
"""Rows times draws of which predictive scores are made, at most, beyond `KHAT_SAMPLES` draws: they are all kept."""


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        per_datum: one row for each datum: bound, elbo (nats), ess, khat; NaN where a guide has no density.
        summary: the means with their standard errors, shares and predictive metrics, by name.
        k_threshold: k-hat above it is not to be trusted at this number of samples.
        kind: what `bound` is: "log p(x)" for local latents, "log p(y | x, data)" (predictive) for global ones.
        notes: what a reader must know.
    """

    per_datum: pd.DataFrame
    summary: dict[str, float]
    k_threshold: float
    kind: str
    num_samples: int
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        width = max((len(name) for name in self.summary), default=0)
        lines = [f"{self.kind}, K = {self.num_samples}, {len(self.per_datum)} rows"]
        lines += [f"  {name.ljust(width)}  {value:.5g}" for name, value in self.summary.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def evaluate(
    model: Program,
    guide: Program,
    *data: Any,
    num_samples: int = 1000,
    y_std: float = 1.0,
    seed: int = 0,
    plates: Iterable[str] = (DATA_PLATE,),
) -> Evaluation:
    """Bounds, k-hat, effective sample sizes and predictive scores of a pair on (held-out) data, in bounded memory.

    bound_n = log (1/K) sum_k w_nk (Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016), where
    the latents are local. Where some are global, q(w) is the prior of new rows and the same formula bounds the log
    predictive density of each row; without local latents it is the log-mean-exp of the likelihood.

    Args:
        model, guide: the trained pair, `fit.model` and `fit.guide`.
        data: arrays with rows first, as the model takes them.
        num_samples: K, draws for each row; compare bounds at equal K only.
        y_std: what one unit of y is on the original scale: predictive scores are given there.
        seed: of the draws; the random stream outside is left as it was.
        plates: names of the data plates.

    Raises:
        DataError: the data is damaged, or outside the support of its likelihood.
        GuideError: the guide does not fit, or holds parameters for other rows.
        OptionError: num_samples < 1, or y_std not positive.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
    >>> result = evaluate(model, guide, torch.zeros(10), num_samples=200)
    >>> len(result.per_datum), result.summary["bound"] >= result.summary["elbo"]
    (10, True)
    """
    if not y_std > 0:
        raise OptionError(f"y_std is {y_std!r}, expected the positive standard deviation of y on its original scale")
    plates = set(plates)
    batch = as_tensors(data[0] if len(data) == 1 else tuple(data), dtype=_dtype(data))
    with preserved_rng(seed):
        parts, start, total = [], 0, len(batch[0])
        graphs, chunks = Graphs(), list(row_chunks(batch))
        for i, chunk in enumerate(chunks):
            graphs.batches = sum(len(later[0]) == len(chunk[0]) for later in chunks[i + 1 :])
            rows = torch.arange(start, start + len(chunk[0]), device=chunk[0].device)
            with chunk_of(total, rows):
                check_observed(model, chunk, plates)
                parts.append(_weights(model, guide, chunk, num_samples, plates, graphs))
            start += len(rows)
    frame = pd.concat([part[0] for part in parts], ignore_index=True)
    has_global, is_point = parts[0][1], parts[0][2]
    notes = notes_of(guide)
    if is_point:
        notes.append(
            "the guide's latents are points, or it has no density: there is no bound on log p(x), and the training "
            "curve is none either"
        )
    if has_global:
        frame["bound"] -= math.log(y_std) if len(batch) > 1 and batch[-1].is_floating_point() else 0.0
    summary = _summary(frame, num_samples, has_global)
    if has_global and len(batch) > 1:
        draws = min(num_samples, max(KHAT_SAMPLES, PREDICTIVE_VALUES // total))
        with preserved_rng(seed + 1):
            prediction = predict(model, guide, *batch, num_samples=draws, y_std=y_std)
        if prediction is not None:
            summary.update(_scores(prediction))
            if draws < num_samples:
                notes.append(f"predictive scores are of {draws} draws, so that they fit memory; the bound is of all")
    kind = "log predictive density of held-out rows" if has_global else "bound on log p(x)"
    return Evaluation(frame, summary, k_threshold(max(num_samples, 100)), kind, num_samples, notes)


def _dtype(data: Sequence[Any]) -> torch.dtype | None:
    """Tensors keep their floating type."""
    flat = data[0] if len(data) == 1 and isinstance(data[0], (tuple, list)) else data
    return next((d.dtype for d in flat if isinstance(d, Tensor) and d.is_floating_point()), None)


def _weights(
    model: Program, guide: Program, batch: Sequence[Any], num_samples: int, plates: Iterable[str], graphs: Graphs
) -> tuple[pd.DataFrame, bool, bool]:
    sampler = LogWeightSampler(model, guide, *batch, plates=plates, graphs=graphs)
    summary, kept, count = LogWeightSummary(), [], 0
    for chunk in sampler.chunks(num_samples):
        summary.update(chunk.local)
        if count < KHAT_SAMPLES:
            kept.append(chunk.local)
            count += len(chunk.local)
    columns = {"bound": summary.importance_bound, "elbo": summary.elbo, "ess": summary.ess}
    is_point = sampler.has_local and (sampler.runs.deterministic or not has_density(guide, local=True))
    if num_samples >= 100 and sampler.has_local and not is_point:
        columns["khat"] = pareto_k(torch.cat(kept)[:KHAT_SAMPLES])
    else:
        columns["khat"] = torch.full_like(summary.elbo, math.nan)
    frame = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
    if is_point:
        frame[:] = math.nan
    return frame, sampler.has_global, is_point


def _summary(frame: pd.DataFrame, num_samples: int, has_global: bool) -> dict[str, float]:
    bound, error = mean_and_standard_error(torch.tensor(frame["bound"].to_numpy()))
    summary = {"bound": bound, "bound_se": error}
    if not has_global:
        summary["elbo"] = float(frame["elbo"].mean())
        summary["ess"] = float(frame["ess"].mean())
    khat = frame["khat"].dropna()
    if len(khat):
        kept = min(num_samples, KHAT_SAMPLES)
        summary["khat_bad"] = float((khat > k_threshold(kept)).mean())
        summary["khat_median"] = float(khat.median())
    return summary


def _scores(prediction: GaussianPrediction | CategoricalPrediction) -> dict[str, float]:
    scores = prediction.summary()
    if isinstance(prediction, GaussianPrediction):
        return scores | {"coverage95": prediction.coverage(0.95)}
    return {("calibration_error" if k == "expected_calibration_error" else k): v for k, v in scores.items()}


def predict(
    model: Program, guide: Program, *batch: Any, num_samples: int = 1000, y_std: float = 1.0
) -> GaussianPrediction | CategoricalPrediction | None:
    """Posterior predictive of a supervised model, or None where it does not say what it predicts.

    The model's `forward(x, y)` returns {"loc", "scale"} (a normal target) or {"logits"} (classes); those are collected
    over draws of the guide. A model that returns anything else has no predictive scores but its log density.
    """
    pair = Pair(model, guide)
    keys: list[str] = []

    def run(data: Sequence[Any]) -> tuple[Tensor, ...]:
        guide_trace = poutine.trace(pair.run_guide).get_trace(*data)
        out = poutine.replay(pair.run_model, trace=guide_trace)(*data)
        keys[:] = sorted(k for k in out if isinstance(out[k], Tensor)) if isinstance(out, dict) else []
        return tuple(out[k] for k in keys)

    runs = Runs(pair, run, batch)
    if not ({"loc", "scale"} <= set(keys) or "logits" in keys):
        return None
    pieces = list(runs.passes(num_samples))
    out = {key: torch.cat([piece[i] for piece in pieces]) for i, key in enumerate(keys)}
    y = batch[-1]
    if "logits" in out:
        return CategoricalPrediction(out["logits"], y.long())
    scale = out["scale"]
    return GaussianPrediction(out["loc"], scale if scale.dim() == 2 else scale[:, None], y, y_std)


def global_khat(
    model: Program,
    guide: Program,
    *batch: Any,
    num_samples: int = KHAT_SAMPLES,
    seed: int = 0,
    plates: Iterable[str] = (DATA_PLATE,),
) -> float:
    """k-hat of the whole posterior of the global latents, from log weights over all training rows.

    NaN where the guide is a point, or has no density.
    """
    if not has_density(guide):
        return math.nan
    with preserved_rng(seed):
        sampler = LogWeightSampler(model, guide, *batch, plates=plates)
        if sampler.runs.deterministic:
            return math.nan
        totals = torch.cat([chunk.total for chunk in sampler.chunks(num_samples)])
    return float(pareto_k(totals.double()))


__all__ = ["Evaluation", "evaluate", "global_khat", "predict"]
