"""A guide that starts so wide that the first losses are dominated by the noise of its draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..case import Case
from ..findings import Finding
from ..packing import Packing
from ..pair import Minibatch, Pair, batch_rows
from ..programs import evaluating, preserved_buffers, preserved_rng
from ..sites import Latents

FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Widths that are tried, in widths of the guide; the centre stays."""
DRAWS = 16
WIDE = 0.3
"""The best of these widths up to which the guide is too wide."""
LEAST, SHARE = 1.0, 0.5
"""Nats a datum, and share of the bound, that the best width must gain over the guide's own."""


def look(case: Case) -> Iterator[Finding]:
    if any(site.discrete for site in case.latents.values()):
        return
    before = _bounds(case, case.first)
    if before is None or not _too_wide(before):
        return
    after = _bounds(case, case.pair)
    if after is None or not _too_wide(after):
        return  # the short training mended it
    best = max(before, key=lambda t: before[t])
    course = case.course
    yield Finding(
        name="wide start",
        part="guide",
        harm=1,
        evidence=(
            f"at the start the bound is {before[1.0]:.4g} nats a datum; with {best:g} times the width of q it would be "
            f"{before[best]:.4g}, and after {course.steps} steps at lr={case.lr:.3g} still {after[1.0]:.4g} against "
            f"{max(after.values()):.4g}"
        ),
        consequence="the first steps, hundreds of them, shrink q and learn nothing else; the loss is the draws' noise",
        cure=f"init_scale={best:g} times what it is now (Global and Amortized take it)",
        size=before[best] - before[1.0],
    )


def _too_wide(bounds: dict[float, float]) -> bool:
    best = max(bounds, key=lambda t: bounds[t])
    gain = bounds[best] - bounds[1.0]
    return best <= WIDE and gain > max(LEAST, SHARE * abs(bounds[1.0]))


def _bounds(case: Any, pair: Pair) -> dict[float, float] | None:
    """The bound of the first batch, nats a datum, had q another width about the same centre.

    E log p(x, c + t (u - c)) + H[q] + d log t in unconstrained coordinates u, up to the entropy of q at t = 1.
    """
    latents, programs = case.latents, (pair.model, pair.guide)
    packings = _packings(latents)
    with preserved_rng(case.seed), preserved_buffers(*programs), evaluating(*programs), batch_rows(case.index):
        with pair.running(rows=case.index), Minibatch(dict(case.sizes)):
            runs = [poutine.trace(pair.run_guide).get_trace(*case.batch) for _ in range(DRAWS)]
            for run in runs:
                run.compute_log_prob()
            entropy = -sum(float(n["log_prob_sum"]) for run in runs for n in _samples(run)) / DRAWS
            draws = [torch.stack([p.pack(_values(p, run)) for run in runs]) for p in packings]
            if not all(torch.isfinite(u).all() for u in draws) or all(bool((u == u[0]).all()) for u in draws):
                return None
            found = {}
            weights = [_weight(p, case.sizes) for p in packings]
            sizes = [u[0].numel() * w for u, w in zip(draws, weights, strict=True)]
            volume = [_log_volumes(p, u) * w for p, u, w in zip(packings, draws, weights, strict=True)]
            for t in FACTORS:
                scaled = [u.mean(0) + t * (u - u.mean(0)) for u in draws]
                now = [_log_volumes(p, u) * w for p, u, w in zip(packings, scaled, weights, strict=True)]
                density = sum(_log_joint(pair, case.batch, packings, [u[i] for u in scaled]) for i in range(DRAWS))
                jacobian = sum(float((a - b).mean()) for a, b in zip(now, volume, strict=True))
                total = density / DRAWS + jacobian + entropy + sum(sizes) * math.log(t)
                found[t] = total / case.source.rows
    return found if all(math.isfinite(v) for v in found.values()) else None


def _values(packing: Packing, run: Any) -> dict[str, Tensor]:
    return {site.name: run.nodes[site.name]["value"] for site in packing.sites}


def _packings(latents: Latents) -> list[Packing]:
    plates = dict.fromkeys(site.plate for site in latents.values())
    return [Packing([s for s in latents.values() if s.plate == plate]) for plate in plates]


def _weight(packing: Packing, sizes: Any) -> float:
    """N / B of the plate that a packing stands in."""
    if packing.plate is None or packing.frame is None:
        return 1.0
    frame = packing.frame
    return sizes.get(frame.name, frame.full_size or frame.size) / frame.size


def _log_volumes(packing: Packing, u: Tensor) -> Tensor:
    """`(draws,)`: log |dz/du|, summed over rows and sites."""
    total: Any = 0.0
    for part in packing.unpack(u)[1].values():
        total = total + part.reshape(len(u), -1).sum(1)
    return total


def _log_joint(pair: Pair, batch: Any, packings: list[Packing], at: list[Tensor]) -> float:
    values = {name: v for p, u in zip(packings, at, strict=True) for name, v in p.unpack(u)[0].items()}
    trace = poutine.trace(poutine.condition(pair.run_model, data=values)).get_trace(*batch)
    return float(trace.log_prob_sum())


def _samples(trace: Any) -> Iterator[Any]:
    return (n for n in trace.nodes.values() if n["type"] == "sample")
