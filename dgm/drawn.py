"""The draws of many chains: latents, predictions, and how far they can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .errors import ModelError
from .graph import REFUSALS
from .metrics import CategoricalPrediction, GaussianPrediction
from .mixing import diagnose
from .packing import Packing
from .programs import Program, bound, evaluating, isolated, preserved_rng, program_name, with_home

__all__ = ["Chains"]

ROWS_AT_ONCE = 20_000
"""Rows times draws in one pass of the predictions: 4 MB for each 50 hidden units."""
JUDGED = 100
"""Rows whose predictions are looked at for the verdict."""
MIXED = 1.05
"""R-hat up to which chains count as mixed; 1.01 is asked for means of single parameters (Vehtari et al., 2021)."""


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of a posterior by several chains, with what tells whether they have mixed.

    Weights of a network need not mix (its units may be renumbered): its predictions must. Izmailov, Vikram, Hoffman,
    Wilson, "What are Bayesian neural network posteriors really like?", 2021, section 4.

    Attributes:
        model: the model. packing: what a draw is made of.
        draws: (C, S, d), unconstrained. log_density: (C, S), log joint density of each, with the Jacobian.
        step: (C,), step sizes. acceptance: (C,), mean probability of acceptance.
        divergences: draws whose trajectory's end had probability 0 to rounding, all chains together.
        gradients: of each chain. seconds: wall clock, all of it.
        prediction_rhat, prediction_ess: (N,), of the predictions of at most 100 rows of the data, spread evenly; empty
            where the model does not say what it predicts.
    """

    model: Program
    packing: Packing
    draws: Tensor
    log_density: Tensor
    step: Tensor
    acceptance: Tensor
    divergences: int
    gradients: int
    seconds: float
    prediction_rhat: Tensor = field(default_factory=lambda: torch.zeros(0))
    prediction_ess: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def rhat(self) -> Tensor:
        """R-hat of each coordinate, `(d,)`."""
        return diagnose(self.draws)[0]

    @property
    def ess(self) -> Tensor:
        """Bulk effective sample size of each coordinate, `(d,)`."""
        return diagnose(self.draws)[1]

    @property
    def log_density_rhat(self) -> float:
        """R-hat of the log joint density, which does not care how the units of a network are numbered."""
        return float(diagnose(self.log_density.unsqueeze(-1))[0])

    def values(self) -> dict[str, Tensor]:
        """The latents by name, constrained, `(C, S, ...)`."""
        flat = self.packing.unpack(self.draws.flatten(0, 1))[0]
        return {name: value.unflatten(0, self.draws.shape[:2]) for name, value in flat.items()}

    def predict(self, *batch: Any, most: int = 1000, y_std: float = 1.0) -> GaussianPrediction | CategoricalPrediction:
        """The posterior predictive of rows, one mixture component for each draw; the draws lie chain after chain.

        Args:
            batch: rows as the model takes them, the targets last.
            most: draws used, at most, the same number of each chain, evenly spaced: memory is `most` times the rows.
            y_std: as in `GaussianPrediction`.

        Raises:
            ModelError: the model does not return {"loc", "scale"} or {"logits"}.
        """
        each = max(1, min(self.draws.shape[1], most // len(self.draws)))
        keep = torch.linspace(0, self.draws.shape[1] - 1, each).round().long()
        return self._predict(self.draws[:, keep].flatten(0, 1), batch, y_std)

    def prediction_mixing(self, *batch: Any) -> tuple[Tensor, Tensor]:
        """R-hat and bulk ESS of what each draw predicts for each row, `(N,)`: its mean, or every class probability.

        For more than two classes the worst of a row's stands.
        """
        chains, count = self.draws.shape[:2]
        found = self._predict(self.draws.flatten(0, 1), batch, 1.0)
        if isinstance(found, GaussianPrediction):
            return diagnose(found.loc.unflatten(0, (chains, count)))
        probs = found.logits.exp()[..., 1:]  # (C S, N, classes - 1)
        rhat, ess = diagnose(probs.flatten(1).unflatten(0, (chains, count)))
        rows = (len(found.y), probs.shape[-1])
        return rhat.nan_to_num(math.inf).reshape(rows).amax(1), ess.nan_to_num(0.0).reshape(rows).amin(1)

    def judged(self, *data: Any) -> Chains:
        """The same with R-hat and ESS of the predictions of some of these rows."""
        rows = next((len(t) for t in data if isinstance(t, Tensor) and t.dim()), 0)
        keep = torch.linspace(0, max(0, rows - 1), min(rows, JUDGED)).round().long()
        some = [t[keep] if isinstance(t, Tensor) and t.dim() and len(t) == rows else t for t in data]
        try:
            rhat, ess = self.prediction_mixing(*some)
        except ModelError:
            return self
        return replace(self, prediction_rhat=rhat, prediction_ess=ess)

    @property
    def verdict(self) -> str:
        """A sentence that says whether the chains have mixed, and what it rests on."""
        chains, count = self.draws.shape[:2]
        if len(self.prediction_rhat):
            rhat, ess = self.prediction_rhat, self.prediction_ess
            what = f"predictions of {len(rhat)} rows"
        else:
            (rhat, ess), what = diagnose(self.draws), f"{self.draws.shape[2]} latents"
        worst, least = float(rhat.nan_to_num(math.inf).max()), float(ess.nan_to_num(0.0).min())
        judgement = "mixed" if worst <= MIXED else "not mixed: longer trajectories or more warm-up are needed"
        return (
            f"{judgement} (by the {what}: R-hat at most {worst:.3f}, median {float(rhat.nanmedian()):.3f}, effective "
            f"sample size at least {least:.0f}; R-hat of log p {self.log_density_rhat:.3f}; {chains} chains of {count} "
            f"draws, {self.gradients} gradients each, mean acceptance {float(self.acceptance.mean()):.2f}, "
            f"{self.divergences} divergences)"
        )

    def __repr__(self) -> str:
        return f"Chains of {program_name(self.model)}: {self.verdict}"

    def _predict(self, u: Tensor, batch: Any, y_std: float) -> GaussianPrediction | CategoricalPrediction:
        """One component for each row of u `(S, d)`."""
        program, home = with_home(self.model)
        run = bound(program, home)

        def one(v: Tensor) -> dict[str, Tensor]:
            with poutine.block():
                out = poutine.condition(run, self.packing.unpack(v)[0])(*batch)
            out = out if isinstance(out, dict) else {}
            names = ("logits",) if "logits" in out else ("loc", "scale")
            return {name: out[name] for name in names if isinstance(out.get(name), Tensor)}

        rows = len(batch[-1]) if batch else 1
        parts = []
        with evaluating(self.model), isolated(validate=False), preserved_rng(0):
            for chunk in u.split(max(1, ROWS_AT_ONCE // max(1, rows))):
                try:
                    parts.append(torch.func.vmap(one)(chunk))
                except REFUSALS:
                    runs = [one(v) for v in chunk]
                    parts.append({name: torch.stack([r[name] for r in runs]) for name in runs[0]})
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "logits" in out:
            return CategoricalPrediction(out["logits"], batch[-1].long())
        if set(out) != {"loc", "scale"}:
            raise ModelError(
                f'{program_name(self.model)} does not say what it predicts: its forward should return {{"loc", '
                '"scale"} or {"logits"}, as BNN does'
            )
        scale = out["scale"]
        return GaussianPrediction(out["loc"], scale if scale.dim() == 2 else scale[:, None], batch[-1], y_std)
