"""How good predictions are: Gaussian and categorical posterior predictives, on the original scale of y."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import DataError, OptionError

__all__ = ["CategoricalPrediction", "GaussianPrediction"]

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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
        for name, value in (("loc", loc), ("scale", scale), ("y", y)):
            if not value.isfinite().all():
                bad = int((~value.isfinite()).sum())
                raise DataError(f"{name}: expected finite values, got {bad} of {value.numel()} NaN or infinite")
        if not (scale > 0).all():
            raise DataError(f"scale: expected standard deviations above 0, got a smallest of {scale.min().item():g}")
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
        if not 0.0 < level < 1.0:
            raise OptionError(f"level: expected a number in (0, 1), got {level}: 0.9 means 90 %")
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
        if max_draws < 1:
            raise OptionError(f"max_draws: expected at least 1, got {max_draws}")
        s = len(self.loc)
        keep = torch.linspace(0, s - 1, min(s, max_draws), device=self.loc.device).round().long()
        loc, scale = self.loc[keep], self.scale[keep]
        first = _absolute_moment(self.y - loc, scale).mean(dim=0)
        second = torch.zeros_like(first)
        for m, sd in zip(loc, scale, strict=True):  # one row of the double sum at a time bounds the memory
            second += _absolute_moment(m - loc, (sd.square() + scale.square()).sqrt()).mean(dim=0) / len(loc)
        return self.y_std * (first - second / 2).mean().item()

    def summary(self) -> dict[str, float]:
        """The scores of one table row: rmse, log_likelihood, coverage of 90 % intervals, calibration_error, crps.

        >>> sorted(GaussianPrediction(torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(2)).summary())
        ['calibration_error', 'coverage_90', 'crps', 'log_likelihood', 'rmse']
        """
        return {
            "rmse": self.rmse(),
            "log_likelihood": self.log_likelihood(),
            "coverage_90": self.coverage(0.9),
            "calibration_error": self.calibration_error(),
            "crps": self.crps(),
        }


def _absolute_moment(mean: Tensor, sd: Tensor) -> Tensor:
    """E|X| for X ~ N(mean, sd^2)."""
    z = mean / sd
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 2 * sd * density + mean * torch.erf(z / math.sqrt(2))


@dataclass(frozen=True, eq=False)
class CategoricalPrediction:
    r"""Predictive class probabilities, averaged over S posterior draws.

    .. math:: p_{nc} = \frac1S \sum_s \mathrm{softmax}(\mathrm{logits}_{sn})_c

    Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017; Lakshminarayanan,
    Pritzel, Blundell, "Simple and scalable predictive uncertainty estimation using deep ensembles", 2017.

    Args:
        logits: shape (S, N, C), or (S, N) for two classes with the logit of class 1; log-probabilities are logits too.
        y: class numbers 0 .. C-1, shape (N,), integers (or floats with integer values).

    Raises:
        DataError: shapes that do not fit, empty, NaN or +inf logits, classes outside 0 .. C-1.

    >>> prediction = CategoricalPrediction(logits=torch.zeros(5, 4, 3), y=torch.tensor([0, 1, 2, 0]))
    >>> prediction.probs.shape, prediction.accuracy()
    (torch.Size([4, 3]), 0.5)
    """

    logits: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        logits, y = self.logits.detach().double(), self.y.detach()
        if logits.dim() == 2:
            logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
        if logits.dim() != 3 or logits.numel() == 0 or logits.shape[2] < 2 or y.shape != logits.shape[1:2]:
            raise DataError(
                f"logits and y: expected shapes (S, N, C) or (S, N), and (N,), got {tuple(self.logits.shape)} and "
                f"{tuple(y.shape)}: put the posterior draws first, and give class numbers, not one-hot rows"
            )
        if logits.isnan().any() or (logits == math.inf).any() or (logits == -math.inf).all(dim=-1).any():
            raise DataError("logits: expected finite values (or -inf for impossible classes), got NaN or infinity")
        classes, whole = logits.shape[2], y.long()
        if (whole != y).any() or (whole < 0).any() or (whole >= classes).any():
            raise DataError(
                f"y: expected class numbers 0 to {classes - 1}, got values from {y.min().item()} to {y.max().item()}"
            )
        object.__setattr__(self, "logits", logits.log_softmax(dim=-1))
        object.__setattr__(self, "y", whole)

    @classmethod
    def from_probs(cls, probs: Tensor, y: Tensor) -> CategoricalPrediction:
        """From probabilities of shape (S, N, C) that sum to one over the classes.

        Raises:
            DataError: values outside [0, 1] or sums that are not 1 within 1e-3, and as for the class.

        >>> CategoricalPrediction.from_probs(torch.full((1, 2, 2), 0.5), torch.tensor([0, 1])).brier()
        0.5
        """
        valid = probs.dim() == 3 and bool((probs >= 0).all()) and bool(((probs.sum(-1) - 1).abs() <= 1e-3).all())
        if not valid:
            raise DataError(
                f"probs: expected shape (S, N, C), values from 0 to 1 that sum to 1 over the classes, got shape "
                f"{tuple(probs.shape)}: give logits to the class itself"
            )
        return cls(probs.double().log(), y)

    @property
    def probs(self) -> Tensor:
        """Predictive probabilities, shape (N, C)."""
        return self.logits.exp().mean(dim=0)

    def accuracy(self) -> float:
        """Share of the data whose most probable class is right; of equal probabilities the lowest class counts."""
        return (self.probs.argmax(dim=-1) == self.y).double().mean().item()

    def log_likelihoods(self) -> Tensor:
        r"""Log predictive probability of each datum's class, shape (N,), nats.

        .. math:: \log \frac1S \sum_s p(y_n \mid \mathrm{logits}_{sn})

        >>> CategoricalPrediction(torch.zeros(5, 4, 3), torch.tensor([0, 1, 2, 0])).log_likelihoods().shape
        torch.Size([4])
        """
        chosen = self.logits.gather(2, self.y.expand(len(self.logits), -1)[..., None])[..., 0]
        return torch.logsumexp(chosen, dim=0) - math.log(len(self.logits))

    def log_likelihood(self) -> float:
        """Mean of :meth:`log_likelihoods` over the data, nats a datum."""
        return self.log_likelihoods().mean().item()

    def brier(self) -> float:
        r"""Brier score summed over the classes, in [0, 2]; lower is better.

        .. math:: \frac1N \sum_n \sum_c (p_{nc} - 1[y_n = c])^2

        Reference: Brier, "Verification of forecasts expressed in terms of probability", 1950. (The binary score that
        counts one class only is half of it.)

        >>> CategoricalPrediction(torch.zeros(1, 2), torch.tensor([0, 1])).brier()
        0.5
        """
        one_hot = torch.nn.functional.one_hot(self.y, self.logits.shape[2])
        return (self.probs - one_hot).square().sum(dim=-1).mean().item()

    def expected_calibration_error(self, bins: int = 15) -> float:
        r"""Distance between confidence and accuracy over equal-width bins of the confidence, in [0, 1].

        .. math:: \sum_b \frac{|B_b|}{N} |\mathrm{acc}(B_b) - \mathrm{conf}(B_b)|, \qquad
                  B_b = \{n : \max_c p_{nc} \in ((b-1)/\mathrm{bins},\ b/\mathrm{bins}]\}

        Biased upwards for small bins: compare at equal N and bins only.

        Reference: Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017.

        Args:
            bins: number of bins of [0, 1], at least 1.

        Raises:
            OptionError: bins below 1.

        >>> round(CategoricalPrediction.from_probs(
        ...     torch.tensor([[[0.8, 0.2], [0.8, 0.2]]]), torch.tensor([0, 0])).expected_calibration_error(), 6)
        0.2
        """
        if bins < 1:
            raise OptionError(f"bins: expected at least 1, got {bins}")
        confidence, predicted = self.probs.max(dim=-1)
        right = (predicted == self.y).double()
        edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
        index = torch.bucketize(confidence, edges)  # right=False: an edge belongs to the bin below it
        gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add_(0, index, right - confidence)
        return (gaps.abs().sum() / len(confidence)).item()

    def predictive_entropy(self) -> Tensor:
        r"""Entropy of the predictive distribution of each datum, shape (N,), nats, in [0, log C].

        .. math:: -\sum_c p_{nc} \log p_{nc}

        >>> CategoricalPrediction(torch.zeros(1, 2), torch.tensor([0, 1])).predictive_entropy().shape
        torch.Size([2])
        """
        return torch.special.entr(self.probs).sum(dim=-1)

    def mutual_information(self) -> Tensor:
        r"""What the class of each datum would tell about the weights, shape (N,), nats: disagreement of the draws.

        .. math:: H\Big[\tfrac1S \sum_s p_{sn}\Big] - \frac1S \sum_s H[p_{sn}] \ge 0

        Reference: Houlsby, Huszár, Ghahramani, Lengyel, "Bayesian active learning for classification and preference
        learning", 2011.

        >>> CategoricalPrediction(torch.zeros(3, 2), torch.tensor([0, 1])).mutual_information().sum().item()
        0.0
        """
        expected = torch.special.entr(self.logits.exp()).sum(dim=-1).mean(dim=0)
        return (self.predictive_entropy() - expected).clamp(min=0.0)  # concavity, lost to rounding only

    def summary(self) -> dict[str, float]:
        """The scores of one table row: of the entropy and the mutual information, their means over the data.

        >>> sorted(CategoricalPrediction(torch.zeros(3, 2), torch.tensor([0, 1])).summary())[:3]
        ['accuracy', 'brier', 'entropy']
        """
        return {
            "accuracy": self.accuracy(),
            "log_likelihood": self.log_likelihood(),
            "brier": self.brier(),
            "expected_calibration_error": self.expected_calibration_error(),
            "entropy": self.predictive_entropy().mean().item(),
            "mutual_information": self.mutual_information().mean().item(),
        }
