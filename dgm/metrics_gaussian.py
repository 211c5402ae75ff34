"""How good predictions of one number are: Gaussian posterior predictives, on the original scale of y."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from .errors import DataError, OptionError
from .mixtures import absolute_moment, check_normals, mixture_quantile
from .score_means import score_means

__all__ = ["GaussianPrediction"]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEVEL = 0.9  # of the interval whose coverage, width and score stand in every summary


@dataclass(frozen=True, eq=False)
class GaussianPrediction:
    r"""Predictive density of each datum as an equal mixture of S Gaussians, one for each posterior draw.

    .. math:: p(y_n) = \frac1S \sum_s \mathcal N(y_n;\ \mu_{sn}, \sigma_{sn}^2)

    The network's scale is the standardised one; ``y_std`` brings errors and densities back to the units of y.

    Reference: Hernández-Lobato and Adams, "Probabilistic backpropagation for scalable learning of Bayesian neural
    networks", 2015, for the scores and the return to the original scale.

    Args:
        loc: means, shape (S, N), standardised; S = 1 for a point estimate.
        scale: standard deviations > 0, shape (S, N), (S, 1), (1, N) or (), standardised.
        y: targets, shape (N,), standardised.
        y_std: the standard deviation that y was divided by, > 0, in the units of y.

    Raises:
        DataError: shapes that do not fit, empty or not finite values, a scale that is not positive.
        OptionError: y_std that is not positive.

    >>> prediction = GaussianPrediction(loc=torch.zeros(5, 3), scale=torch.ones(5, 1), y=torch.zeros(3), y_std=2.0)
    >>> prediction.rmse(), prediction.coverage(0.9)
    (0.0, 1.0)
    """

    loc: Tensor
    scale: Tensor
    y: Tensor
    y_std: float = 1.0

    def __post_init__(self) -> None:
        loc, scale, y = (t.detach().double() for t in (self.loc, torch.as_tensor(self.scale), self.y))
        if loc.dim() != 2 or loc.numel() == 0 or y.shape != loc.shape[1:]:
            raise DataError(
                f"loc and y: expected shapes (S, N) and (N,), got {tuple(loc.shape)} and {tuple(y.shape)}: "
                "put the posterior draws first and drop the trailing dimension of one-column targets"
            )
        if scale.dim() not in (0, 2) or any(k not in (1, n) for k, n in zip(scale.shape, loc.shape, strict=False)):
            raise DataError(
                f"scale: expected shape (S, N), (S, 1), (1, N) or () for loc of shape {tuple(loc.shape)}, "
                f"got {tuple(scale.shape)}: use scale[:, None] for one scale for each draw"
            )
        check_normals(loc, scale, y)
        if not (math.isfinite(self.y_std) and self.y_std > 0):
            raise OptionError(f"y_std: expected a positive number, the standard deviation of y, got {self.y_std}")
        # Stored in float64, so that scores of 1e5 draws do not depend on the order of summation.
        for name, value in (("loc", loc), ("scale", scale.expand(loc.shape)), ("y", y)):
            object.__setattr__(self, name, value)

    def rmse(self) -> float:
        r"""Root mean squared error of the predictive mean, in the units of y.

        .. math:: \mathrm{std}_y \Big(\tfrac1N \sum_n (\bar\mu_n - y_n)^2\Big)^{1/2}

        >>> GaussianPrediction(torch.ones(2, 4), torch.tensor(1.0), torch.zeros(4), y_std=3.0).rmse()
        3.0
        """
        return self.y_std * (self.loc.mean(dim=0) - self.y).square().mean().sqrt().item()

    def log_likelihoods(self) -> Tensor:
        r"""Log predictive density of each datum, shape (N,), nats, for y in its own units.

        .. math:: \log \frac1S \sum_s \mathcal N(y_n; \mu_{sn}, \sigma_{sn}^2) - \log \mathrm{std}_y

        >>> GaussianPrediction(torch.ones(2, 4), torch.tensor(1.0), torch.zeros(4)).log_likelihoods().shape
        torch.Size([4])
        """
        log_density = torch.distributions.Normal(self.loc, self.scale, validate_args=False).log_prob(self.y)
        return torch.logsumexp(log_density, dim=0) - math.log(len(self.loc)) - math.log(self.y_std)

    def log_likelihood(self) -> float:
        """Mean of :meth:`log_likelihoods` over the data, nats a datum."""
        return self.log_likelihoods().mean().item()

    def pit(self) -> Tensor:
        r"""Probability integral transform, shape (N,), in [0, 1]: uniform where predictions are calibrated.

        .. math:: u_n = \frac1S \sum_s \Phi\big((y_n - \mu_{sn}) / \sigma_{sn}\big)

        Reference: Dawid, "Statistical theory: the prequential approach", 1984.

        >>> GaussianPrediction(torch.zeros(1, 1), torch.tensor(1.0), torch.zeros(1)).pit().item()
        0.5
        """
        return torch.special.ndtr((self.y - self.loc) / self.scale).mean(dim=0)

    def coverage(self, level: float = 0.9) -> float:
        r"""Share of the data inside the central predictive interval of a level: as large as the level if calibrated.

        .. math:: \frac1N \sum_n 1\Big[\tfrac{1-\ell}{2} \le u_n \le \tfrac{1+\ell}{2}\Big]

        The interval is the mixture's own, between its exact quantiles: y lies between two quantiles where the mixture's
        distribution function at y, the PIT, lies between their levels, so that no quantile has to be found.

        Reference: Gneiting, Balabdaoui, Raftery, "Probabilistic forecasts, calibration and sharpness", 2007.

        Args:
            level: in (0, 1).

        Raises:
            OptionError: level outside (0, 1).

        >>> GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.tensor([0.0, 9.0])).coverage(0.5)
        0.5
        """
        _check_level(level)
        return ((self.pit() - 0.5).abs() <= level / 2).double().mean().item()

    def calibration_error(self, levels: Sequence[float] = LEVELS) -> float:
        r"""Mean distance between the coverage of central intervals and their level, in [0, 1].

        .. math:: \frac{1}{|L|} \sum_{\ell \in L} |\mathrm{coverage}(\ell) - \ell|

        Reference: Kuleshov, Fenner, Ermon, "Accurate uncertainties for deep learning using calibrated regression", 2018
        (there squared, and on one-sided intervals).

        Args:
            levels: each in (0, 1); by default 0.1, 0.2, ..., 0.9.

        Raises:
            OptionError: no levels, or one outside (0, 1).

        >>> GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2)).calibration_error([0.25, 0.75])
        0.5
        """
        if len(levels) == 0:
            raise OptionError("levels: expected at least one number in (0, 1), got none")
        return sum(abs(self.coverage(level) - level) for level in levels) / len(levels)

    def crps(self, max_draws: int = 200) -> float:
        r"""Mean continuous ranked probability score, in the units of y; lower is better, and |error| for a point.

        .. math:: \frac1S \sum_s A(y - \mu_s, \sigma_s^2) - \frac{1}{2S^2} \sum_{s,t} A(\mu_s - \mu_t, \sigma_s^2 +
                  \sigma_t^2), \qquad A(m, v) = 2\sqrt v\,\varphi(m/\sqrt v) + m\,(2\Phi(m/\sqrt v) - 1)

        exact for the mixture of the draws used; the double sum makes it quadratic in their number.

        Reference: Grimit, Gneiting, Berrocal, Johnson, "The continuous ranked probability score for circular variables
        and its application to mesoscale forecast ensemble verification", 2006.

        Args:
            max_draws: at most this many draws are used, evenly spaced among the S.

        Raises:
            OptionError: max_draws below 1.

        >>> GaussianPrediction(torch.zeros(9, 2), torch.tensor(1.0), torch.ones(2)).crps() > 0
        True
        """
        return self._crps(max_draws).mean().item()

    def _crps(self, max_draws: int = 200) -> Tensor:
        loc, scale = self._thinned(max_draws)
        first = absolute_moment(self.y - loc, scale).mean(dim=0)
        second = torch.zeros_like(first)
        for m, sd in zip(loc, scale, strict=True):  # one row of the double sum at a time bounds the memory
            second += absolute_moment(m - loc, (sd.square() + scale.square()).sqrt()).mean(dim=0) / len(loc)
        return self.y_std * (first - second / 2)

    def _thinned(self, max_draws: int) -> tuple[Tensor, Tensor]:
        """At most so many draws, evenly spaced among the S."""
        if max_draws < 1:
            raise OptionError(f"max_draws: expected at least 1, got {max_draws}")
        s = len(self.loc)
        keep = torch.linspace(0, s - 1, min(s, max_draws), device=self.loc.device).round().long()
        return self.loc[keep], self.scale[keep]

    def interval(self, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        r"""Ends of the central predictive interval of a level, each of shape (N,), standardised as `loc` is.

        .. math:: F_n^{-1}\big(\tfrac{1-\ell}{2}\big),\ F_n^{-1}\big(\tfrac{1+\ell}{2}\big)

        quantiles of the mixture itself, not of draws; of at most 1000 components, evenly spaced among the S.

        Raises:
            OptionError: level outside (0, 1).

        >>> low, high = GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2)).interval(0.95)
        >>> torch.allclose(high, torch.tensor(1.959964, dtype=torch.float64)), torch.allclose(low, -high)
        (True, True)
        """
        _check_level(level)
        low, high = (mixture_quantile(*self._thinned(1000), 0.5 + sign * level / 2) for sign in (-1, 1))
        return low, high

    def sharpness(self, level: float = LEVEL) -> float:
        r"""Mean width of the central predictive intervals of a level, in the units of y: small is good if calibrated.

        Reference: Gneiting, Balabdaoui, Raftery, "Probabilistic forecasts, calibration and sharpness", 2007.

        Raises:
            OptionError: level outside (0, 1).

        >>> round(GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2), y_std=2.0).sharpness(), 4)
        6.5794
        """
        low, high = self.interval(level)
        return self.y_std * (high - low).mean().item()

    def interval_score(self, level: float = LEVEL) -> float:
        r"""Mean interval score of the central predictive interval, in the units of y; lower is better.

        .. math:: (u - l) + \frac{2}{\alpha} (l - y)_+ + \frac{2}{\alpha} (y - u)_+, \qquad \alpha = 1 - \ell

        Reference: Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, section 6.2.

        Raises:
            OptionError: level outside (0, 1).

        >>> GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2)).interval_score(0.5) < 1.35
        True
        """
        return self._interval_scores(*self.interval(level), level).mean().item()

    def _interval_scores(self, low: Tensor, high: Tensor, level: float) -> Tensor:
        outside = (low - self.y).clamp(min=0.0) + (self.y - high).clamp(min=0.0)
        return self.y_std * (high - low + 2.0 / (1.0 - level) * outside)

    @cached_property
    def _frame(self) -> pd.DataFrame:
        low, high = self.interval(LEVEL)
        pit = self.pit()
        columns = {
            "log_likelihood": self.log_likelihoods(),
            "squared_error": (self.y_std * (self.loc.mean(dim=0) - self.y)).square(),
            "crps": self._crps(),
            "pit": pit,
            "coverage_90": ((pit - 0.5).abs() <= LEVEL / 2).double(),
            "sharpness_90": self.y_std * (high - low),
            "interval_score_90": self._interval_scores(low, high, LEVEL),
        }
        return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})

    def scores(self) -> pd.DataFrame:
        """One row for each datum, in the units of y: what the means of :meth:`summary` are means of.

        Columns: log_likelihood, squared_error, crps, pit, coverage_90 (1 inside the central 90 % interval, else 0),
        sharpness_90 (its width) and interval_score_90.

        >>> GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2)).scores().shape
        (2, 7)
        """
        return self._frame.copy()

    def summary(self, errors: bool = False) -> dict[str, float]:
        r"""The scores of one table row: means of :meth:`scores`, the root of the squared error, and the calibration.

        Args:
            errors: with NAME_se, the standard error over the data of each that has one; that of the rmse by the delta
                method, se(mse) / (2 rmse). NaN for N = 1.

        >>> sorted(GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2)).summary())[:4]
        ['calibration_error', 'coverage_90', 'crps', 'interval_score_90']
        """
        names = ("squared_error", "log_likelihood", "coverage_90", "crps", "sharpness_90", "interval_score_90")
        out = score_means(self._frame, names, errors)
        out["calibration_error"] = self.calibration_error()
        return out


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise OptionError(f"level: expected a number in (0, 1), got {level}: 0.9 means 90 %")
