"""What `dgm.evaluate` found: tables, the difference between two of them, and one page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from .bounds import mean_and_standard_error
from .errors import DataError, ModelError, OptionError
from .estimate import Estimate

if TYPE_CHECKING:
    from .gaps import Gaps
    from .latent_diagnostics import LatentDiagnostics
    from .predictive import Prediction
    from .verdicts import Verdict

__all__ = ["Difference", "Evaluation"]


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over the same data, its standard error over data, and what it is a difference of."""

    mean: float
    se: float
    score: str
    mode: str

    def __repr__(self) -> str:
        return f"{self.score}: {self.mean:+.4f} ± {self.se:.4f} nats ({self.mode})"


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        per_datum: one row for each datum: bound, bound_error (Monte Carlo), elbo (nats), ess, khat; NaN where a guide
            has no density.
        summary: the means with their standard errors, shares and predictive metrics, by name.
        k_threshold: k-hat above it is not to be trusted, with as many draws as it was fitted to (1000 at most).
        kind: what `bound` is: "bound on log p(x)" for local latents, "log predictive density ..." for global ones.
        notes: what a reader must know.
        bound: the importance bound, or log predictive density, with its errors; None where there is none.
        annealed: the annealed bound on the rows `annealed_rows`. gaps, latents, prediction: where they were asked for.
        model, data: digests of the model's parameters by name, and of the data.
    """

    per_datum: pd.DataFrame
    summary: dict[str, float]
    k_threshold: float
    kind: str
    num_samples: int
    notes: list[str] = field(default_factory=list)
    bound: Estimate | None = None
    annealed: Estimate | None = None
    annealed_rows: Tensor | None = None
    gaps: Gaps | None = None
    latents: LatentDiagnostics | None = None
    prediction: Prediction | None = None
    model: dict[str, str] = field(default_factory=dict)
    data: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        width = max((len(name) for name in self.summary), default=0)
        lines = [f"{self.kind}, K = {self.num_samples}, {len(self.per_datum)} rows"]
        lines += [f"  {name.ljust(width)}  {value:.5g}" for name, value in self.summary.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    @property
    def verdicts(self) -> list[Verdict]:
        """A sentence for each question, and what it rests on."""
        from .verdicts import verdicts

        return verdicts(self)

    @property
    def best(self) -> Estimate | None:
        """The better of the bounds on the rows that both were made for: one of them, never a mixture."""
        if self.annealed is None or self.bound is None or self.annealed_rows is None:
            return self.bound
        same = self.bound.rows(self.annealed_rows)
        return self.annealed if self.annealed.mean > same.mean else self.bound

    def worst(self, count: int = 10) -> pd.DataFrame:
        """The data to look at first: those with the largest k-hat, then the smallest share of effective draws."""
        frame = self.per_datum.assign(ess_share=self.per_datum["ess"] / self.num_samples)
        return frame.sort_values(["khat", "ess_share"], ascending=[False, True], kind="stable").head(count)

    def difference(self, other: Evaluation, score: str = "bound", *, joint: bool = False) -> Difference:
        """Paired difference self - other on the same data, refused where it would not mean what it seems to.

        Args:
            other: of the same data at the same K.
            score: "bound" or "elbo", a column of `per_datum`.
            joint: the model was trained with each guide: bounds on log p(x) then compare two models. ELBOs never do.

        Raises:
            DataError: other data.
            ModelError: the model's parameters are not the same in both; the message names the first that differs.
            OptionError: another K or another kind of score.

        >>> import pyro, pyro.distributions as dist
        >>> from dgm import evaluate
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x, scale=0.5 ** 0.5):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, scale))
        >>> a, b = (evaluate(model, g, torch.zeros(9)) for g in (guide, lambda x: guide(x, 0.5)))
        >>> a.difference(b, "elbo").mean > 0
        True
        """
        if score not in ("bound", "elbo"):
            raise OptionError(f"score is {score!r}, expected 'bound' or 'elbo'")
        if self.data != other.data or len(self.per_datum) != len(other.per_datum):
            raise DataError("the two evaluations are of other data: evaluate both on the same rows in the same order")
        if self.kind != other.kind:
            raise OptionError(f"one is a {self.kind}, the other a {other.kind}: they are no two values of one thing")
        if score == "bound" and self.num_samples != other.num_samples:
            raise OptionError(
                f"K is {self.num_samples} and {other.num_samples}: importance bounds rise with K, compare them at "
                "equal num_samples"
            )
        moved = _first_difference(self.model, other.model)
        if moved is not None and (score == "elbo" or not joint):
            raise ModelError(
                f"the model is not the same in the two evaluations ({moved}): "
                + (
                    "an ELBO then mixes what the model and what the guide changed; compare score='bound'"
                    if score == "elbo"
                    else "say joint=True if it was trained with each guide, and the bounds compare two models; for a "
                    "comparison of guides freeze it (requires_grad_(False)) before training them"
                )
            )
        a, b = (torch.tensor(e.per_datum[score].to_numpy()) for e in (self, other))
        mean, se = mean_and_standard_error(a - b)
        return Difference(mean, se, score, "fixed model" if moved is None else "joint training")

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained HTML page."""
        from .evaluation_page import write_page

        return write_page(self, path)


def _first_difference(a: Mapping[str, str], b: Mapping[str, str]) -> str | None:
    for name in [*a, *(n for n in b if n not in a)]:
        if a.get(name) != b.get(name):
            return f"{name!r} differs" if name in a and name in b else f"only one of them has {name!r}"
    return None
