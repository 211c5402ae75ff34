"""The gaps of a pair: one row for each datum, means with their errors, and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from .bounds import mean_and_standard_error
from .gap_parts import Evidence, Part

__all__ = ["MODES", "Gaps", "Mode"]

Mode = Literal["fixed decoder", "joint training"]
MODES: tuple[Mode, ...] = ("fixed decoder", "joint training")

WHAT = {
    "log_evidence": "log p(x)",
    "elbo": "ELBO of q",
    "elbo_free": "ELBO of q*",
    "approximation": "approximation gap: family",
    "amortization": "amortization gap: encoder",
    "total": "log p(x) - ELBO of q",
}

PREFIXES = {"held-out": "", "train": "train_", "train - held-out": "generalisation_"}

MEANING: dict[Mode, str] = {
    "fixed decoder": "the model was not trained with this guide: gaps of several guides compare the guides",
    "joint training": "the model adapted to this guide: gaps of several guides are gaps of several models",
}


@dataclass
class Gaps:
    """What `gaps` found; nats.

    Attributes:
        per_datum: one row for each held-out datum: log_evidence, elbo, elbo_free, approximation, amortization, total,
            each with its Monte Carlo standard error (`..._error`); where its best member came from (start), and what
            the last round of optimisation gained it (last_gain).
        train: the same for the training rows, or None.
        summary: means by name, with `..._se` over data (for new rows) and `..._mc_se` over draws (for these rows);
            training rows as `train_...`; `generalisation_...` is training minus held-out rows.
        evidence: what log p(x) is. mode: "fixed decoder" or "joint training".
        family: of q*. converged, steps: of the local optimisation. notes: what a reader must know.
    """

    per_datum: pd.DataFrame
    train: pd.DataFrame | None
    summary: dict[str, float]
    evidence: str
    mode: Mode
    guide: str
    family: str
    num_samples: int
    converged: bool
    steps: int
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        parts: Mapping[str, Part],
        evidence: Evidence,
        mode: Mode,
        guide: str,
        family: str,
        num_samples: int,
        notes: list[str],
    ) -> Gaps:
        frames = {name: _frame(name, part, evidence) for name, part in parts.items()}
        shared = evidence.shared
        summary = _means(frames["held-out"], shared["held-out"])
        if "train" in frames:
            seen = _means(frames["train"], shared["train"])
            for what in WHAT:
                summary[f"generalisation_{what}"] = seen[what] - summary[what]
                for error in ("_se", "_mc_se"):
                    both = math.hypot(seen[what + error], summary[what + error])
                    summary[f"generalisation_{what}{error}"] = both
            summary.update({f"train_{name}": value for name, value in seen.items()})
        below = _below(summary, evidence.exact)
        return cls(
            frames["held-out"],
            frames.get("train"),
            summary,
            evidence.told,
            mode,
            guide,
            family,
            num_samples,
            all(part.converged for part in parts.values()),
            max(part.steps for part in parts.values()),
            [*notes, *evidence.notes, *below],
        )

    def table(self) -> pd.DataFrame:
        """Mean and both standard errors of each quantity; for training rows and their difference where there are any.

        Columns are (rows, "mean" | "se" | "mc_se"); it carries the mode and what log p(x) is in `attrs`.
        """
        found = {
            (name, label): [self.summary[f"{PREFIXES[name]}{what}{end}"] for what in WHAT]
            for name in self._sets()
            for label, end in (("mean", ""), ("se", "_se"), ("mc_se", "_mc_se"))
        }
        frame = pd.DataFrame(found, index=list(WHAT))
        frame.attrs = {"mode": self.mode, "evidence": self.evidence, "family": self.family}
        return frame

    def _sets(self) -> list[str]:
        return list(PREFIXES) if self.train is not None else ["held-out"]

    def __repr__(self) -> str:
        s, names = self.summary, self._sets()
        shown = f"{len(self.per_datum)} held-out" + (
            f" and {len(self.train)} training" if self.train is not None else ""
        )
        wide = max(map(len, WHAT.values()))
        lines = [f"{self.guide}, {self.mode}, {shown} rows; nats, ± over data (± over draws)"]
        lines.append(" " * wide + "".join(f"{name:>28}" for name in names))
        for what, told in WHAT.items():
            keys = [f"{PREFIXES[name]}{what}" for name in names]
            cells = [f"{s[key]:.3f} ± {s[f'{key}_se']:.3f} ({s[f'{key}_mc_se']:.3f})" for key in keys]
            lines.append(told.ljust(wide) + "".join(f"{cell:>28}" for cell in cells))
        state = f"converged in {self.steps} steps" if self.converged else "not converged"
        lines.append(f"log p(x): {self.evidence}; q*: {self.family}, {state}; ELBOs of {self.num_samples} draws")
        lines.append(f"{self.mode}: {MEANING[self.mode]}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _frame(name: str, part: Part, evidence: Evidence) -> pd.DataFrame:
    """Values and Monte Carlo errors; what an ELBO and a bound of the same draws share by chance is taken out."""
    log_p, error = evidence.values[name], evidence.errors[name]
    approximation, total = log_p - part.elbo_free, log_p - part.elbo

    def gap_error(own: Tensor, source: str) -> Tensor:
        variance = error.square() + own.square()
        if evidence.source == source:
            variance = variance - 2 * getattr(part, source).covariance
        return variance.clamp(min=0.0).sqrt()

    columns = {
        "log_evidence": log_p,
        "elbo": part.elbo,
        "elbo_free": part.elbo_free,
        "approximation": approximation,
        "amortization": part.amortization,
        "total": total,
        "log_evidence_error": error,
        "elbo_error": part.elbo_error,
        "elbo_free_error": part.elbo_free_error,
        "approximation_error": gap_error(part.elbo_free_error, "star"),
        "amortization_error": part.amortization_error,
        "total_error": gap_error(part.elbo_error, "q"),
        "last_gain": part.gain,
    }
    frame = pd.DataFrame({key: value.cpu().numpy() for key, value in columns.items()})
    return frame.assign(start=part.start)


def _means(frame: pd.DataFrame, shared: float | None) -> dict[str, float]:
    found = {}
    for what in WHAT:
        found[what], found[f"{what}_se"] = mean_and_standard_error(torch.tensor(frame[what].to_numpy()))
        error = float((frame[f"{what}_error"] ** 2).sum() ** 0.5) / len(frame)
        if shared is not None and what in ("log_evidence", "approximation", "total"):
            error = math.hypot(shared, error)
        found[f"{what}_mc_se"] = error
    return found


def _below(summary: Mapping[str, float], exact: bool) -> list[str]:
    """An evidence that lies below the ELBO beyond all chance."""
    mean, error = summary["approximation"], summary["approximation_mc_se"]
    if not mean < -4 * error - 1e-4:
        return []
    cause = "the exact values are not those of this model" if exact else "it is a poorer bound: draw more, or anneal"
    return [f"the evidence lies {-mean:.3g} nats below the ELBO of q*, which no evidence can: {cause}"]
