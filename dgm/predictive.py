"""The posterior predictive of a supervised model, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro import poutine
from torch import Tensor

from .errors import GuideError, did_you_mean
from .metrics import CategoricalPrediction, GaussianPrediction, VectorPrediction
from .pair import Pair
from .programs import Program, evaluating, preserved_rng, program_name
from .runs import Runs
from .sites import read

Prediction = GaussianPrediction | CategoricalPrediction | VectorPrediction


def predict(
    model: Program, guide: Program, *batch: Any, num_samples: int = 1000, y_std: float = 1.0
) -> Prediction | None:
    """Posterior predictive of a supervised model, or None where it does not say what it predicts.

    The model's `forward(x, y)` returns {"loc", "scale"} (a normal target) or {"logits"} (classes); those are collected
    over draws of the guide. A model that returns anything else has no predictive scores but its log density.

    Raises:
        GuideError: a latent of the model is not among the guide's sites: it would be drawn from the prior.
    """
    pair = Pair(model, guide)
    check_served(pair, batch)
    keys: list[str] = []

    def run(data: Sequence[Any]) -> tuple[Tensor, ...]:
        guide_trace = poutine.trace(pair.run_guide).get_trace(*data)
        out = poutine.replay(pair.run_model, trace=guide_trace)(*data)
        keys[:] = sorted(k for k in out if isinstance(out[k], Tensor)) if isinstance(out, dict) else []
        return tuple(out[k] for k in keys)

    runs = Runs(pair, run, batch)
    if not ({"loc", "scale"} <= set(keys) or "logits" in keys):
        return None
    out, start = dict[str, Tensor](), 0
    for piece in runs.passes(num_samples):  # into one place: results kept between passes would break up the heap
        for key, part in zip(keys, piece, strict=True):
            whole = out.setdefault(key, part.new_empty(num_samples, *part.shape[1:]))
            whole[start : start + len(part)] = part
        start += len(piece[0])
    y = batch[-1]
    if "logits" in out:
        return CategoricalPrediction(out["logits"], y.long())
    scale = out["scale"]
    if out["loc"].dim() == 3:  # a target of several columns, with one scale for each draw, each column, or each value
        wide = scale if scale.dim() == 3 else scale.reshape(len(scale), 1, -1)
        return VectorPrediction(out["loc"], wide.expand_as(out["loc"]), y, y_std)
    return GaussianPrediction(out["loc"], scale if scale.dim() == 2 else scale[:, None], y, y_std)


def check_served(pair: Pair, batch: Sequence[Any]) -> None:
    """Every latent that the model draws is one of the guide's, for what the guide does not give comes from the prior.

    Raises:
        GuideError: one is not; discrete latents that are summed out need none.
    """
    with pair.running(), preserved_rng(0), evaluating(pair.model, pair.guide):
        guided = poutine.trace(pair.run_guide).get_trace(*batch)
        found = read(poutine.trace(poutine.replay(pair.run_model, trace=guided)).get_trace(*batch))
    given = [name for name, site in read(guided).items() if not site.auxiliary]
    for name, site in found.items():
        if name not in guided.nodes and not site.enumerated:
            raise GuideError(
                f"{program_name(pair.guide)} does not sample the latent {name!r} of {program_name(pair.model)}, so "
                f"that it would be drawn from the prior: of the guide's sites, {did_you_mean(name, given)}; "
                "predict with the model that the guide was trained with"
            )


def scores_of(prediction: Prediction) -> dict[str, float]:
    """The scores of one row of a comparison, by the names of its columns."""
    scores = prediction.summary()
    if isinstance(prediction, GaussianPrediction):
        return scores | {"coverage95": prediction.coverage(0.95)}
    return {("calibration_error" if k == "expected_calibration_error" else k): v for k, v in scores.items()}


__all__ = ["Prediction", "check_served", "predict", "scores_of"]
