"""One call that says how good a posterior is: bounds with errors, k-hat, effective samples, predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from .bounds import LogWeightSummary, mean_and_standard_error
from .checks import check_observed
from .data import as_given
from .digest import digest, digests
from .errors import ModelError, OptionError
from .estimate import GROUPS, Estimate
from .evaluation import Evaluation
from .heldout import row_chunks
from .pair import chunk_of
from .posthoc import has_density, notes_of
from .predictive import Prediction, predict, scores_of
from .programs import Program, preserved_rng, program_name
from .psis import SMALLEST_SAMPLE, k_threshold, pareto_k
from .runs import Graphs
from .sites import DATA_PLATE, Latents
from .thorough import Thorough, add_parts, parts_of
from .weights import LogWeightSampler

KHAT_SAMPLES = 1000
"""Log weights kept for each datum to fit the tail; the bounds use all K without keeping them."""

PREDICTIVE_VALUES = 2**24
"""Rows times draws of which predictive scores are made, at most, beyond `KHAT_SAMPLES` draws: they are all kept."""

FALSE_ALARM = 1e-4
"""How often a right discrete likelihood may be called wrong because its bound came out above zero by chance."""


def evaluate(
    model: Program,
    guide: Program,
    *data: Any,
    num_samples: int = 1000,
    y_std: float = 1.0,
    seed: int = 0,
    plates: Iterable[str] = (DATA_PLATE,),
    thorough: Thorough = False,
    train: Any = None,
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
        thorough: True, or some of "latents" (`dgm.latent_diagnostics`), "annealed" (`dgm.annealed_bound` on at most
            100 rows) and "gaps" (`dgm.gaps` on at most 100 rows): minutes instead of seconds, for local latents. With
            options: {"annealed": {"steps": 200}, "gaps": {"max_steps": 500}}.
        train: the training rows: for the generalisation part of the gaps, and, where latents are global, for the k-hat
            of their posterior.

    Returns:
        an `Evaluation`: per-datum frame, summary, verdicts, and `.report("page.html")`.

    Raises:
        DataError: the data is damaged, or outside the support of its likelihood, or a log weight is NaN or +inf.
        GuideError: the guide does not fit, or holds parameters for other rows.
        ModelError: the bound of discrete data lies above zero, where no log-probability can.
        OptionError: num_samples < 1, y_std not positive, or an unknown part in `thorough`.

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
    parts = parts_of(thorough)
    plates = set(plates)
    batch = as_given(data)
    with preserved_rng(seed):
        found, discrete = _all_weights(model, guide, batch, num_samples, plates)
    frame = pd.concat([part.frame for part in found], ignore_index=True)
    has_global, notes = found[0].has_global, notes_of(guide)
    bound = None
    if found[0].is_point:
        notes.append(
            "the guide's latents are points, or it has no density: there is no bound on log p(x), and the training "
            "curve is none either"
        )
    else:
        scale = math.log(y_std) if has_global and len(batch) > 1 and batch[-1].is_floating_point() else 0.0
        bound = _joined([part.bound for part in found if part.bound is not None], scale)
        frame["bound"] = bound.values.cpu().numpy()
        if discrete:
            _refuse_positive(model, bound, found[0].has_local)
        notes += _notes(frame, num_samples, has_global)
    summary = _summary(frame, bound, num_samples, has_global)
    prediction = None
    if has_global and len(batch) > 1:
        prediction, few = _predicted(model, guide, batch, num_samples, y_std, seed)
        summary.update({} if prediction is None else scores_of(prediction))
        notes += few
    if has_global and train is not None and has_density(guide) and num_samples >= SMALLEST_SAMPLE:
        summary["khat_posterior"] = global_khat(model, guide, *as_given([train]), seed=seed, plates=plates)
    kind = "log predictive density of held-out rows" if has_global else "bound on log p(x)"
    result = Evaluation(
        frame,
        summary,
        k_threshold(min(max(num_samples, SMALLEST_SAMPLE), KHAT_SAMPLES)),
        kind,
        num_samples,
        notes,
        bound,
        prediction=prediction,
        model=digests(model),
        data=digest(batch),
        meta={"model": program_name(model), "guide": program_name(guide), "seed": seed},
    )
    add_parts(result, parts, model, guide, batch, train, plates, seed)
    return result


def _all_weights(
    model: Program, guide: Program, batch: Sequence[Any], num_samples: int, plates: set[str]
) -> tuple[list[_Part], bool]:
    """The weights of all rows, chunk by chunk, and whether what is observed is discrete."""
    found, discrete, start, total = [], False, 0, len(batch[0])
    graphs, chunks = Graphs(), list(row_chunks(batch))
    for i, chunk in enumerate(chunks):
        graphs.batches = sum(len(later[0]) == len(chunk[0]) for later in chunks[i + 1 :])
        rows = torch.arange(start, start + len(chunk[0]), device=chunk[0].device)
        with chunk_of(total, rows):
            discrete = _is_discrete(check_observed(model, chunk, plates))
            found.append(_weights(model, guide, chunk, num_samples, plates, graphs))
        start += len(rows)
    return found, discrete


def _predicted(
    model: Program, guide: Program, batch: Sequence[Any], num_samples: int, y_std: float, seed: int
) -> tuple[Prediction | None, list[str]]:
    """The predictive of as many draws as fit memory, if the model has one, and a note if they are fewer than K."""
    draws = min(num_samples, max(KHAT_SAMPLES, PREDICTIVE_VALUES // len(batch[0])))
    with preserved_rng(seed + 1):
        prediction = predict(model, guide, *batch, num_samples=draws, y_std=y_std)
    if prediction is None or draws == num_samples:
        return prediction, []
    return prediction, [f"predictive scores are of {draws} draws, so that they fit memory; the bound is of all"]


@dataclass
class _Part:
    """A chunk of rows: its frame, its bound, and what kind of pair it is of."""

    frame: pd.DataFrame
    bound: Estimate | None
    has_global: bool
    has_local: bool
    is_point: bool


def _weights(
    model: Program, guide: Program, batch: Sequence[Any], num_samples: int, plates: Iterable[str], graphs: Graphs
) -> _Part:
    sampler = LogWeightSampler(model, guide, *batch, plates=plates, graphs=graphs)
    sampler.require_rows()
    summary, kept, count, groups = LogWeightSummary(), [], 0, _Groups()
    for chunk in sampler.chunks(num_samples):
        summary.update(chunk.local)
        if sampler.has_global:
            groups.update(chunk.local)
        if count < KHAT_SAMPLES:
            kept.append(chunk.local)
            count += len(chunk.local)
    is_point = sampler.has_local and (sampler.runs.deterministic or not has_density(guide, local=True))
    columns = {"bound": summary.importance_bound, "bound_error": torch.full_like(summary.elbo, math.nan)}
    columns |= {"elbo": summary.elbo, "ess": summary.ess, "khat": torch.full_like(summary.elbo, math.nan)}
    bound = None
    if not is_point:
        bound = Estimate.of(summary, "log predictive density" if sampler.has_global else "importance bound")
        if sampler.has_global:
            bound = bound.replace(shared=groups.error(), method="log predictive density")
        columns["bound_error"] = bound.errors
        if num_samples >= SMALLEST_SAMPLE and sampler.has_local:
            columns["khat"] = pareto_k(torch.cat(kept)[:KHAT_SAMPLES])
    frame = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
    if is_point:
        frame[:] = math.nan
    return _Part(frame, bound, sampler.has_global, sampler.has_local, is_point)


class _Groups:
    """Monte Carlo error of the mean of logs of means where all rows share their draws, from means of groups of draws.

    With group means w_gn and their mean w_n, the mean over n of log w_n moves by mean_n(w_gn / w_n) - 1.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.counts = torch.zeros(GROUPS)
        self.seen = 0

    def update(self, log_weights: Tensor) -> None:
        place = (torch.arange(len(log_weights)) + self.seen) % GROUPS
        self.seen += len(log_weights)
        if self.sums is None:
            self.sums = log_weights.new_full((GROUPS, *log_weights.shape[1:]), -math.inf, dtype=torch.float64)
        for group in place.unique().tolist():
            own = log_weights[place == group].double()
            self.sums[group] = torch.logaddexp(self.sums[group], torch.logsumexp(own, 0))
            self.counts[group] += len(own)

    def error(self) -> float:
        if self.sums is None or self.seen < 2 * GROUPS or self.sums.shape[1] == 0:
            return math.nan
        means = self.sums - self.counts.double().log().to(self.sums)[:, None]
        whole = torch.logsumexp(self.sums, 0) - math.log(self.seen)
        influence = (means - whole).exp().mean(1)
        return float((influence.var() / GROUPS).sqrt())


def _joined(parts: Sequence[Estimate], log_scale: float) -> Estimate:
    """Chunks of rows as one estimate, in units of y where it was standardised."""
    whole = parts[0]
    values, errors, ess = (torch.cat([getattr(p, name) for p in parts]) for name in ("values", "errors", "ess"))
    shared = None
    if whole.shared is not None:
        weights = [len(p.values) / len(values) for p in parts]
        shared = math.sqrt(sum((w * (p.shared or 0.0)) ** 2 for w, p in zip(weights, parts, strict=True)))
    return whole.replace(values=values - log_scale, errors=errors, ess=ess, shared=shared)


def _is_discrete(latents: Latents) -> bool:
    """Whether everything observed is discrete, so that log p(x) is a log-probability and no density."""
    supports = [getattr(node["fn"], "support", None) for node in latents.observed.values()]
    return all(getattr(support, "is_discrete", False) for support in supports)


def _refuse_positive(model: Program, bound: Estimate, has_local: bool) -> None:
    """A log-probability is at most 0, and E[w] = p(x): Markov says how far above 0 chance may take a bound.

    P(log w_n > t) <= exp(-t) for one datum, and the same for the sum over data, whose weights are independent. Without
    local latents a weight is a probability, and there is no chance in it.

    Raises:
        ModelError: no chance explains the bound.
    """
    values = bound.values[bound.values.isfinite()]
    if not len(values):
        return
    rounding = 1e-4 * len(values)
    most = -math.log(FALSE_ALARM) if has_local else 0.0
    worst = int(bound.values.nan_to_num(-math.inf).argmax())
    largest = float(bound.values[worst])
    if largest > 1e-4 + (most + math.log(len(values)) if has_local else 0.0) or float(values.sum()) > most + rounding:
        raise ModelError(
            f"the bound on log p(x) is {bound.mean:.3g} nats a datum, and {largest:.3g} for row {worst}, for discrete "
            f"data, whose log-probability is at most 0: {program_name(model)}'s likelihood is no probability. Look for "
            "a density in place of a mass function, values outside the support (grey pixels), or a factor that adds "
            "log-probability"
        )


def _notes(frame: pd.DataFrame, num_samples: int, has_global: bool) -> list[str]:
    notes = []
    lost = frame["bound"] == -math.inf
    if lost.any():
        first = ", ".join(map(str, list(frame.index[lost][:5])))
        notes.append(
            f"every weight is zero for {int(lost.sum())} rows (first: {first}): the guide puts no draw where their "
            "density is above zero, and their bound is -inf"
        )
    if num_samples == 1:
        notes.append("one draw for each row: the bound is the ELBO, and nothing tells its Monte Carlo error")
    elif num_samples < SMALLEST_SAMPLE and not has_global:
        notes.append(f"no k-hat: it needs at least {SMALLEST_SAMPLE} draws for each row, got {num_samples}")
    elif len(frame) and (frame["khat"] == -math.inf).all():
        notes.append(
            "all weights of a row are equal: the guide is the exact posterior of this model (or does not depend on its "
            "latents at all)"
        )
    return notes


def _summary(frame: pd.DataFrame, estimate: Estimate | None, num_samples: int, has_global: bool) -> dict[str, float]:
    bound, error = mean_and_standard_error(torch.tensor(frame["bound"].to_numpy()))
    summary = {"bound": bound, "bound_se": error}
    if estimate is not None and num_samples > 1:
        summary["bound_mc_se"] = estimate.mc_se
    if not has_global:
        summary["elbo"] = float(frame["elbo"].mean())
        summary["ess"] = float(frame["ess"].mean())
    khat = frame["khat"].dropna()
    if len(khat):
        kept = min(num_samples, KHAT_SAMPLES)
        summary["khat_bad"] = float((khat > k_threshold(kept)).mean())
        summary["khat_median"] = float(khat.median())
    return summary


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
