"""A short training with instruments: terms of the bound, gradients and their noise, scales and movement over time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from .dataflow import base_of
from .errors import TrainingError
from .feeding import Loaded, Memory
from .optim import adam
from .pace import Compile
from .pair import batch_rows
from .programs import evaluating, preserved_buffers, preserved_rng
from .signal_to_noise import parts_of, signal_to_noise
from .sites import DATA_PLATE
from .svi import SVI
from .terms import LIKELIHOOD, POSTERIOR, PRIOR, factors_of, sample_sites_of, terms_of

__all__ = ["Course", "run_course"]

WATCHES = 20
"""How often the terms of the bound are looked at; each look costs `DRAWS` runs without gradients."""
DRAWS = 8
"""Draws of a look, with the same noise each time, so that a curve shows the training and not the draws."""
NOTHING = 0.005
"""Nats a datum that are no progress in a quarter of the steps."""


@dataclass
class Course:
    """What a short training looked like.

    lr, steps: as it was run; `steps` are those that were done. seconds: how long that took.
    losses: `(steps,)`, nats a datum, minus the bound of each step's batch.
    curve: one row for each look at the first batch: step, bound, log_likelihood, kl, in nats a datum and all with the
        same noise; kl is log q - log p of the latents.
    norms: one row for each step: norm of the gradient, "guide" and "model".
    gradients: "start" and "end" -> one row for each part: part, snr, norm.
    parameters: one row for each: name, part, elements, rms (at the end), moved (rms of end minus start), path (the sum
        of its movements between looks), graded (share of the steps with a gradient that was not zero).
    scales: one row for each look and each scale of an observed site or of the guide: step, part, site, low, middle,
        high.
    rows: `(B,)`, the bound of each row of the first batch at the end, without what all rows share.
    error: what the training died of, else "".
    """

    lr: float
    steps: int = 0
    seconds: float = 0.0
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    norms: pd.DataFrame = field(default_factory=pd.DataFrame)
    gradients: dict[str, pd.DataFrame] = field(default_factory=dict)
    parameters: pd.DataFrame = field(default_factory=pd.DataFrame)
    scales: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: Tensor = field(default_factory=lambda: torch.zeros(0))
    error: str = ""

    @property
    def gain(self) -> float:
        """Nats a datum by which the bound of the first batch rose; NaN where it could not be evaluated."""
        bound = self.curve["bound"]
        return float(bound.iloc[-1] - bound.iloc[0]) if len(bound) else math.nan

    @property
    def late(self) -> float:
        """Share of the gain after the first quarter that came in the last one.

        A straight line has 1/3, an exponential approach 0.16 after three of its times and 0.04 after seven; 0 where the
        last quarter brought less than `NOTHING`, or than the curve shakes. The first quarter is left out: there the
        outputs find their places.
        """
        bound = self.curve["bound"].to_numpy()
        if len(bound) < 8 or not np.isfinite(bound).all():
            return math.nan
        quarter = len(bound) // 4
        end, then, first = (float(bound[i - 3 : i or None].mean()) for i in (0, -quarter, quarter + 2))
        shaking = float(np.diff(bound[len(bound) // 2 :]).std())
        if abs(end - then) < max(NOTHING, shaking):
            return 0.0
        return (end - then) / max(end - first, NOTHING)


class _Instruments:
    """Reads an SVI while it trains."""

    def __init__(self, svi: SVI, batch: Sequence[Any], rows: Tensor, count: int, seed: int):
        self.svi, self.batch, self.rows, self.count, self.seed = svi, tuple(batch), rows, count, seed
        self.names, self.tensors = list(svi.parameters), list(svi.parameters.values())
        self.parts = parts_of(svi.pair)
        self.first = [p.detach().clone() for p in self.tensors]
        self.last = [p.clone() for p in self.first]
        self.path = np.zeros(len(self.tensors))
        self.graded = np.zeros(len(self.tensors))
        self.norms: list[list[float]] = []
        self.curve: list[dict[str, float]] = []
        self.scales: list[dict[str, Any]] = []
        self.row_bounds = torch.zeros(0)

    def before_update(self, *_: Any) -> None:
        """Norms of the gradients, as the optimiser is about to use them."""
        held = [i for i, p in enumerate(self.tensors) if p.grad is not None]
        squares = np.zeros(len(self.tensors))
        if held:
            found = torch._foreach_norm([g for p in self.tensors if (g := p.grad) is not None])
            squares[held] = torch.stack([n.to(found[0]) for n in found]).double().square().cpu().numpy()
        self.graded += squares > 0
        guide = np.array([part == "guide" for part in self.parts], dtype=bool)
        self.norms.append([float(np.sqrt(squares[guide].sum())), float(np.sqrt(squares[~guide].sum()))])

    def look(self, step: int) -> None:
        """Terms of the bound on the first batch, scales, and how far the parameters went since the last look."""
        pair, plates = self.svi.pair, {DATA_PLATE: None, **self.svi.sizes}
        totals = np.zeros(3)
        by_row: Any = 0.0
        programs = (pair.model, pair.guide)
        with (
            preserved_rng(self.seed),
            preserved_buffers(*programs),
            evaluating(*programs),
            pair.running(rows=self.rows),
        ):
            for _ in range(DRAWS):
                guide = poutine.trace(pair.run_guide).get_trace(*self.batch)
                model = poutine.trace(poutine.replay(pair.run_model, trace=guide)).get_trace(*self.batch)
                terms = terms_of(model, guide, plates)
                factors = factors_of(model, plates)
                whole = terms.shared.double().cpu().numpy().copy()
                for plate, values in terms.rows.items():
                    whole += float(factors.get(plate, 1.0)) * values.double().sum(-1).cpu().numpy()
                totals += whole / self.count / DRAWS
                first = next(iter(terms.rows.values()), torch.zeros(3, 0))
                by_row = by_row + (first[LIKELIHOOD] + first[PRIOR] - first[POSTERIOR]).double() / DRAWS
        self.row_bounds = torch.as_tensor(by_row)
        kl = totals[POSTERIOR] - totals[PRIOR]
        row = {"step": step, "bound": totals[LIKELIHOOD] - kl, "log_likelihood": totals[LIKELIHOOD], "kl": kl}
        self.curve.append(row)
        self.scales += [{"step": step, **row} for row in _scales(model, guide)]
        for i, p in enumerate(self.tensors):
            now = p.detach()
            self.path[i] += _rms(now - self.last[i])
            self.last[i].copy_(now)

    def table(self, steps: int) -> pd.DataFrame:
        """What became of each parameter."""
        return pd.DataFrame(
            {
                "name": [n.replace("pyro_parameters.", "").replace("|", ".") for n in self.names],
                "part": self.parts,
                "elements": [p.numel() for p in self.tensors],
                "rms": [_rms(p.detach()) for p in self.tensors],
                "moved": [_rms(p.detach() - a) for p, a in zip(self.tensors, self.first, strict=True)],
                "path": self.path,
                "graded": self.graded / max(1, steps),
            }
        )


def run_course(
    model: Any,
    guide: Any,
    source: Memory | Loaded,
    *,
    steps: int,
    lr: float,
    loss: Any = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    kl_weight: Callable[[int], float] = lambda step: 1.0,
    probe: bool = True,
    compile: Compile = False,
) -> Course:
    """Train a pair in place for some steps of Adam, and write down what happens.

    Args:
        model, guide: the pair; its parameters are trained. source: where the batches come from.
        kl_weight: weight of the latents' terms, by step from 0.
        probe: measure the gradients' signal-to-noise ratio as well. compile: see `SVI`; norms are of eager steps alone.

    Raises:
        DGMError: what `SVI.prepare` refuses. A value that is not finite ends the training and stands in `error`.
    """
    start = time.perf_counter()
    batch = source.first()
    rows = torch.arange(len(batch[0]), device=batch[0].device)
    svi = SVI(model, guide, adam(lr), loss, sizes=sizes, compile=compile)
    with preserved_rng(seed), batch_rows(rows):
        svi.prepare(*batch, rows=rows)
    course, seen = Course(lr), _Instruments(svi, batch, rows, source.rows, seed)
    if svi.optimiser is None:
        raise TrainingError("no optimiser")
    svi.optimiser.register_step_pre_hook(seen.before_update)
    if probe:
        course.gradients["start"] = signal_to_noise(svi.pair, batch, rows, svi.sizes, seed=seed)
    looks = set(np.linspace(0, steps, WATCHES + 1).round().astype(int).tolist())
    losses: list[float] = []
    with preserved_rng(seed):
        seen.look(0)
        try:
            for step, (now, which) in enumerate(_batches(source, steps)):
                losses.append(svi.step(*now, rows=which, kl_weight=kl_weight(step)) / source.rows)
                if step + 1 in looks:
                    seen.look(step + 1)
        except TrainingError as error:
            course.error = str(error)
    if probe and not course.error:
        course.gradients["end"] = signal_to_noise(svi.pair, batch, rows, svi.sizes, seed=seed)
    course.steps, course.losses = len(losses), np.array(losses)
    course.norms = pd.DataFrame(seen.norms, columns=["guide", "model"])
    course.curve, course.scales = pd.DataFrame(seen.curve), pd.DataFrame(seen.scales)
    course.parameters, course.rows = seen.table(course.steps), seen.row_bounds
    course.seconds = time.perf_counter() - start
    return course


def _batches(source: Memory | Loaded, steps: int) -> Iterator[tuple[Any, Tensor | None]]:
    done = 0
    while True:
        for item in source.epoch():
            yield item
            done += 1
            if done >= steps:
                return


def _scales(model: Any, guide: Any) -> Iterator[dict[str, Any]]:
    for part, trace in (("model", model), ("guide", guide)):
        for name, node in sample_sites_of(trace):
            scale = getattr(base_of(node["fn"]), "scale", None)
            if (part == "model" and not node["is_observed"]) or not isinstance(scale, Tensor) or not scale.numel():
                continue
            values = scale.detach().double()
            low, middle, high = (float(f(values)) for f in (torch.min, torch.median, torch.max))
            yield {"part": part, "site": name, "low": low, "middle": middle, "high": high}


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0
