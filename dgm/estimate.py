"""An estimate of log p(x) for each datum: which side it errs to, and how far, by chance of draws and of data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd
import torch
from scipy.special import stdtrit
from torch import Tensor

from .bounds import LogWeightSummary, mean_and_standard_error
from .errors import DataError, OptionError

__all__ = ["Estimate"]

Side = Literal["lower", "upper"]

GROUPS = 20
"""Groups of draws whose means tell the Monte Carlo error where all data share their draws."""


@dataclass(frozen=True, eq=False)
class Estimate:
    r"""Bounds on log p(x_n), n = 1..N, in expectation over the draws, each with its Monte Carlo error.

    .. math:: \hat\ell_n = \log \tfrac1K \sum_k w_{nk}, \qquad
              \mathrm{se}_n^2 = \frac{K / \mathrm{ESS}_n - 1}{K - 1}

    The error is that of a logarithm of a mean by the delta method. The logarithm's own bias is near
    :math:`-\mathrm{se}_n^2 / 2` where the weights have a variance (:attr:`bias`), upwards for an upper bound.

    Reference: Kong, "A note on importance sampling using standardized weights", 1992; Grosse, Ghahramani, Adams,
    "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015, for the upper side.

    Args:
        method: name of the estimator, e.g. "importance bound".
        side: "lower" or "upper": where the expectation of an estimate lies.
        values: nats, shape (N,). errors: Monte Carlo standard errors, nats, (N,). ess: effective draws, (N,).
        draws: K for each datum.
        details: what else a reader must know, by name, e.g. {"acceptance": 0.7}.
        shared: Monte Carlo standard error of the mean where data share their draws (those of global latents), so that
            their errors do not average out.

    >>> estimate = Estimate.of(torch.zeros(10, 3), "importance bound")
    >>> estimate.mean, estimate.mc_se, estimate.ess.tolist()
    (0.0, 0.0, [10.0, 10.0, 10.0])
    """

    method: str
    side: Side
    values: Tensor
    errors: Tensor
    ess: Tensor
    draws: int
    details: dict[str, float] = field(default_factory=dict)
    shared: float | None = None

    def __post_init__(self) -> None:
        if self.side not in ("lower", "upper"):
            raise OptionError(f"side is {self.side!r}, expected 'lower' or 'upper'")
        shapes = {name: tuple(getattr(self, name).shape) for name in ("values", "errors", "ess")}
        if self.values.dim() != 1 or len(set(shapes.values())) != 1:
            raise DataError(f"an estimate has one value, error and ESS for each datum, (N,) each, got {shapes}")

    @classmethod
    def of(
        cls, log_weights: Tensor | LogWeightSummary, method: str, side: Side = "lower", **details: float
    ) -> Estimate:
        r"""From log weights `(K, N)`, or their summary.

        For the upper side the weights are those of the reverse, :math:`1 / w`, drawn from the exact posterior, and the
        estimate is :math:`-\log \frac1K \sum_k 1 / w_{nk}`.

        Raises:
            DataError: no draws, not (K, N), or a NaN; the message says how many data have one.
        """
        if isinstance(log_weights, LogWeightSummary):
            summary = log_weights
        else:
            if log_weights.dim() != 2:
                raise DataError(f"log_weights: expected shape (K, N), draws first, got {tuple(log_weights.shape)}")
            summary = LogWeightSummary().update(log_weights)
        sign = 1.0 if side == "lower" else -1.0
        values = sign * summary.importance_bound
        broken = int((values.isnan() | (values == math.inf)).sum())
        if broken:
            raise DataError(
                f"{method}: {broken} of {len(values)} data have a log weight that is NaN or +inf: the model's density "
                "overflows there; look at the data's scale and at the decoder's output, or use float64"
            )
        ess, draws = summary.ess, summary.count
        relative = (draws / ess.clamp(min=1e-300) - 1).clamp(min=0.0)
        errors = (relative / (draws - 1)).sqrt() if draws > 1 else torch.full_like(values, math.nan)
        return cls(method, side, values, errors, ess, draws, dict(details))

    @property
    def mean(self) -> float:
        """Mean over the data, nats."""
        return self.values.mean().item()

    @property
    def se(self) -> float:
        """Standard error of the mean for *new* data of the same kind; the chance of the draws is a part of it."""
        return mean_and_standard_error(self.values)[1]

    @property
    def mc_se(self) -> float:
        """Standard error of the mean for *these* data, by the chance of the draws alone."""
        if self.shared is not None:
            return self.shared
        return (self.errors.square().sum().sqrt() / len(self.errors)).item()

    @property
    def bias(self) -> Tensor:
        """What the logarithm of a mean of few draws is off by, about: `(N,)`, nats, towards the side of the bound."""
        half = self.errors.square() / 2
        return -half if self.side == "lower" else half

    def interval(self, level: float = 0.95, over: Literal["data", "draws"] = "data") -> tuple[float, float]:
        """Confidence interval of the mean, for new data or for these; by Student's t, as the errors are estimated.

        Raises:
            OptionError: level outside (0, 1), or another `over`.
        """
        if not 0.0 < level < 1.0:
            raise OptionError(f"level is {level}, expected a number in (0, 1): 0.95 is usual")
        if over not in ("data", "draws"):
            raise OptionError(f"over is {over!r}, expected 'data' or 'draws'")
        error, freedom = (self.se, len(self.values) - 1) if over == "data" else (self.mc_se, self._freedom())
        half = float(stdtrit(max(freedom, 1), 0.5 + level / 2)) * error
        return self.mean - half, self.mean + half

    def _freedom(self) -> float:
        """Degrees of freedom of a sum of N estimated variances with K - 1 each (Satterthwaite, 1946)."""
        if self.shared is not None:
            return GROUPS - 1
        variances = self.errors.square()
        total = variances.sum()
        return float((self.draws - 1) * total**2 / variances.square().sum()) if total > 0 else math.inf

    def replace(self, **fields: Any) -> Estimate:
        """The same estimate with other fields."""
        return replace(self, **fields)

    def rows(self, which: Tensor) -> Estimate:
        """The estimate of some of the data."""
        return replace(self, values=self.values[which], errors=self.errors[which], ess=self.ess[which])

    def frame(self) -> pd.DataFrame:
        """One row for each datum: value, error, ess."""
        return pd.DataFrame({name: getattr(self, key).cpu().numpy() for name, key in _COLUMNS.items()})

    def __repr__(self) -> str:
        kind = {"lower": "at least", "upper": "at most"}[self.side]
        rest = "".join(f", {name} {value:.4g}" for name, value in self.details.items())
        return (
            f"{self.method}: {kind} {self.mean:.4f} ± {self.se:.4f} (data) ± {self.mc_se:.4f} (draws) nats, "
            f"{len(self.values)} data, K = {self.draws}, ESS {self.ess.mean().item():.1f}{rest}"
        )


_COLUMNS = {"value": "values", "error": "errors", "ess": "ess"}
