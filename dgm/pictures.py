"""Arrays to draw of a trained pair: reconstructions and samples of images, predictive bands over a line or a plane."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .metrics import CategoricalPrediction, VectorPrediction
from .pair import Pair
from .predictive import predict
from .programs import Program, evaluating, preserved_rng, program_name

log = logging.getLogger("dgm")

SHOWN = 10


def pictures_of(
    model: Program, guide: Program, held_out: Sequence[Tensor], info: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What can be drawn of this pair on these data; empty where nothing can, for no picture is worth a lost run."""
    try:
        with preserved_rng(seed):
            shape = info.get("image_shape")
            if shape is not None and hasattr(model, "reconstruct") and hasattr(model, "sample"):
                return _images(model, guide, held_out, shape, seed)
            if len(held_out) == 2 and held_out[0].dim() == 2 and held_out[0].shape[1] <= 2:
                return _band(model, guide, held_out, float(info.get("y_std", 1.0)))
    except Exception as error:
        log.warning("no pictures of %s: %s: %s", program_name(guide), type(error).__name__, error)
    return {}


def _images(
    model: Any, guide: Program, held_out: Sequence[Tensor], shape: tuple[int, int], seed: int
) -> dict[str, Any]:
    pair = Pair(model, guide)
    step = max(1, len(held_out[0]) // SHOWN)
    batch = tuple(t[::step][:SHOWN] for t in held_out)
    with evaluating(model, guide), pair.running():
        trace = poutine.trace(pair.run_guide).get_trace(*batch)
        latents = {
            name: node["value"]
            for name, node in trace.nodes.items()
            if node["type"] == "sample"
            and not (node["infer"] or {}).get("is_auxiliary")
            and not site_is_subsample(node)
        }
        images = model.reconstruct(**latents)
        generator = torch.Generator(device=batch[0].device).manual_seed(seed)
        samples = model.sample(SHOWN, generator=generator, mean=True)
    parts = {"data": batch[0], "reconstructions": images, "samples": samples}
    return {name: part.detach().float().cpu().numpy().reshape(-1, *shape) for name, part in parts.items()}


def _band(model: Program, guide: Program, held_out: Sequence[Tensor], y_std: float) -> dict[str, Any]:
    x, y = held_out
    low, high = x.min(0).values, x.max(0).values
    pad = 0.25 * (high - low)
    axes = [
        torch.linspace(float(a), float(b), 120 if x.shape[1] == 1 else 40)
        for a, b in zip(low - pad, high + pad, strict=True)
    ]
    grid = torch.cartesian_prod(*axes).reshape(-1, x.shape[1]).to(x.dtype)
    prediction = predict(model, guide, grid, torch.zeros(len(grid), dtype=y.dtype), num_samples=300)
    if prediction is None or isinstance(prediction, VectorPrediction):
        return {}
    out: dict[str, Any] = {"x": x.squeeze(-1).numpy(), "y": y.numpy(), "grid": grid.squeeze(-1).numpy()}
    if isinstance(prediction, CategoricalPrediction):
        return out | {"mean": prediction.probs[:, -1].numpy()} if x.shape[1] == 2 else {}
    if x.shape[1] != 1:
        return {}
    noise = torch.randn(prediction.loc.shape, dtype=prediction.loc.dtype)
    draws = (prediction.loc + prediction.scale * noise).numpy()
    lower, upper = np.quantile(draws, [0.025, 0.975], axis=0)
    return out | {"mean": prediction.loc.mean(0).numpy(), "lower": lower, "upper": upper}
