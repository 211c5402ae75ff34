"""Everything that is a function of the log weights: the ELBO, the importance bound, their errors and differences."""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor

from .errors import DataError, OptionError

__all__ = [
    "LogWeightSummary",
    "clustered_difference",
    "clustered_interval",
    "effective_sample_size",
    "elbo",
    "importance_bound",
    "mean_and_standard_error",
    "paired_difference",
]


def elbo(log_weights: Tensor) -> Tensor:
    r"""The evidence lower bound of each datum, estimated from S draws of the guide.

    .. math:: \frac{1}{S} \sum_s \log w_s, \qquad w_s = p(x, z_s) / q(z_s | x)

    Reference: Jordan, Ghahramani, Jaakkola, Saul, "An introduction to variational methods for graphical models", 1999.

    Args:
        log_weights: shape (S,) or (S, B), nats, draws first; ``-inf`` is a weight of zero.

    Returns:
        shape () or (B,), nats; ``-inf`` where any weight is zero.

    Raises:
        DataError: no draws, or not a floating-point tensor.

    >>> elbo(torch.zeros(10, 3)).shape
    torch.Size([3])
    """
    return _checked(log_weights).mean(dim=0)


def importance_bound(log_weights: Tensor) -> Tensor:
    r"""The S-sample importance-weighted bound on log p(x) of each datum; at S = 1 it is the ELBO.

    .. math:: \log \frac{1}{S} \sum_s w_s

    Compare it at equal S only: it rises with S towards log p(x).

    Reference: Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", 2016.

    Args:
        log_weights: shape (S,) or (S, B), nats, draws first; ``-inf`` is a weight of zero.

    Returns:
        shape () or (B,), nats; ``-inf`` where every weight is zero.

    Raises:
        DataError: no draws, or not a floating-point tensor.

    >>> importance_bound(torch.zeros(10)).item()
    0.0
    """
    return torch.logsumexp(_checked(log_weights), dim=0) - math.log(log_weights.shape[0])


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Kish's effective number of draws for each datum.

    .. math:: \Big(\sum_s w_s\Big)^2 \Big/ \sum_s w_s^2 \in [1, S]

    Reference: Kish, "Survey sampling", 1965; Kong, "A note on importance sampling using standardized weights", 1992.

    Args:
        log_weights: shape (S,) or (S, B), nats, draws first; ``-inf`` is a weight of zero.

    Returns:
        shape () or (B,), in draws; 0 where every weight is zero.

    Raises:
        DataError: no draws, or not a floating-point tensor.

    >>> effective_sample_size(torch.zeros(10)).item()
    10.0
    """
    # In float64: the exponent below is a difference of numbers as large as the log density of all the data.
    lw = _checked(log_weights).double()
    ess = _kish(torch.logsumexp(lw, dim=0), torch.logsumexp(2 * lw, dim=0), lw.shape[0])
    return ess.to(log_weights.dtype)


class LogWeightSummary:
    r"""Bounds and errors of log weights that arrive in chunks of draws, in memory that does not grow with S.

    .. math:: \ell_{n} = \log\sum_s w_s, \quad \ell^{(2)}_{n} = \log\sum_s w_s^2, \quad
              \bar\ell = \tfrac1S\sum_s \log w_s, \quad \textstyle\sum_s (\log w_s - \bar\ell)^2

    are kept for each datum in float64 and merged chunk by chunk; every property equals the function of the same name on
    the whole (S, B) tensor.

    Reference: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.

    >>> summary = LogWeightSummary().update(torch.zeros(3, 5)).update(torch.zeros(4, 5))
    >>> summary.count, summary.elbo.shape
    (7, torch.Size([5]))
    """

    def __init__(self) -> None:
        self.count = 0

    def update(self, log_weights: Tensor) -> LogWeightSummary:
        """Take in a chunk of shape (s,) or (s, B), draws first, and return self.

        Raises:
            DataError: no draws, not a floating-point tensor, or another number of data than before.
        """
        lw = _checked(log_weights.detach()).double()
        if self.count == 0:
            shape, device = lw.shape[1:], lw.device
            self._lse = torch.full(shape, -math.inf, dtype=torch.float64, device=device)
            self._lse2, self._max = self._lse.clone(), self._lse.clone()
            self._mean, self._squares = torch.zeros_like(self._lse), torch.zeros_like(self._lse)
        elif lw.shape[1:] != self._lse.shape:
            raise DataError(
                f"log_weights: chunks of one summary must share their data, expected draws of shape "
                f"{tuple(self._lse.shape)}, got {tuple(lw.shape[1:])}: begin a new summary for other data"
            )
        self._lse = torch.logaddexp(self._lse, torch.logsumexp(lw, dim=0))
        self._lse2 = torch.logaddexp(self._lse2, torch.logsumexp(2 * lw, dim=0))
        self._max = torch.maximum(self._max, lw.amax(dim=0))

        # An infinite log weight makes the mean infinite and the squares NaN for good, as it would in the whole tensor.
        old, new = self.count, lw.shape[0]
        mean = lw.mean(dim=0)
        settled = self._mean.isinf() & (mean.isfinite() | (mean == self._mean))
        shift = torch.where(settled, torch.zeros_like(mean), mean - self._mean)
        squares = (lw - mean).square().sum(dim=0)
        self.count = old + new
        self._squares = self._squares + squares + shift.square() * (old * new / self.count)
        self._mean = self._mean + shift * (new / self.count)
        return self

    @property
    def elbo(self) -> Tensor:
        """As :func:`elbo`, shape () or (B,), nats."""
        return self._known("_mean")

    @property
    def elbo_error(self) -> Tensor:
        """Monte Carlo standard deviation of the ELBO estimate, sd(log w) / sqrt(S); NaN for S = 1 or a zero weight."""
        squares = self._known("_squares")
        if self.count == 1:
            return torch.full_like(squares, math.nan)
        return (squares / (self.count - 1) / self.count).sqrt()

    @property
    def importance_bound(self) -> Tensor:
        """As :func:`importance_bound` with S = ``count``, shape () or (B,), nats."""
        return self._known("_lse") - math.log(self.count)

    @property
    def ess(self) -> Tensor:
        """As :func:`effective_sample_size`, shape () or (B,), draws."""
        return _kish(self._known("_lse"), self._lse2, self.count)

    @property
    def max_weight(self) -> Tensor:
        """The largest normalised weight, max w / sum w, in [1/S, 1]; NaN where every weight is zero."""
        return (self._known("_max") - self._lse).exp()

    def _known(self, name: str) -> Tensor:
        if self.count == 0:
            raise DataError("log_weights: the summary has seen no draws: call update(log_weights) first")
        value: Tensor = getattr(self, name)
        return value


def mean_and_standard_error(per_datum: Tensor) -> tuple[float, float]:
    r"""The mean over data and its standard error, computed in float64.

    .. math:: \bar v, \qquad \Big(\tfrac{1}{N(N-1)} \sum_n (v_n - \bar v)^2\Big)^{1/2}

    Reference: Cochran, "Sampling techniques", 1977, chapter 2.

    Args:
        per_datum: shape (N,), one value for each held-out datum.

    Returns:
        (mean, standard error) in the units of the values; the error is NaN for N = 1.

    Raises:
        DataError: not a vector, or empty.

    >>> mean_and_standard_error(torch.tensor([1.0, 3.0]))
    (2.0, 1.0)
    """
    if per_datum.dim() != 1 or len(per_datum) == 0:
        raise DataError(
            f"per_datum: expected a vector with one value for each datum, got shape {tuple(per_datum.shape)}: "
            "average over draws first"
        )
    values = per_datum.detach().double()
    n = len(values)
    error = (values.var() / n).sqrt().item() if n > 1 else math.nan
    return values.mean().item(), error


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    r"""Mean of a - b over the same data, and its standard error: what all data share cancels.

    .. math:: \bar d, \ \mathrm{sd}(d)/\sqrt N, \qquad d_n = a_n - b_n

    Reference: Student, "The probable error of a mean", 1908.

    Args:
        a, b: shape (N,), the values of two guides on the same N data in the same order.

    Returns:
        (mean, standard error); the error is NaN for N = 1.

    Raises:
        DataError: shapes differ, not vectors, or empty.

    >>> paired_difference(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 4.0]))
    (1.0, 0.0)
    """
    return mean_and_standard_error(_difference(a, b))


def clustered_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    r"""Mean of a - b over seeds and data, and a standard error for new seeds *and* new data.

    With the crossed model :math:`d_{rn} = \mu + s_r + t_n + e_{rn}` the mean has variance
    :math:`\sigma_s^2/R + \sigma_t^2/N + \sigma_e^2/(RN)`, of which

    .. math:: \mathrm{se}^2 = \frac{V_R}{R} + \frac{V_N}{N} - \frac{V_E}{RN}

    is an unbiased estimate: :math:`V_R` is the variance of the R seed means, :math:`V_N` that of the N datum means and
    :math:`V_E` the residual mean square, which is in both of them and must be counted once. se^2 is never less than the
    larger of the first two terms, each of which it contains. With one seed (or one datum) that variation
    is unknown and only the other is counted. For an interval with few seeds use :func:`clustered_interval`.

    Reference: Searle, Casella, McCulloch, "Variance components", 1992; Cameron, Gelbach, Miller, "Robust inference with
    multiway clustering", 2011.

    Args:
        a, b: shape (R, N): R paired seeds, N data, the same order in both.

    Returns:
        (mean, standard error); the error is NaN for R = N = 1.

    Raises:
        DataError: shapes differ, not matrices, or empty.

    >>> clustered_difference(torch.ones(3, 4), torch.zeros(3, 4))
    (1.0, 0.0)
    """
    d = _seeds_by_data(a, b)
    seeds, data, residual = _mean_squares(d)
    terms = [v for v in (seeds, data) if not math.isnan(v)]
    if not terms:
        return d.mean().item(), math.nan
    variance = seeds + data - residual if len(terms) == 2 else terms[0]
    return d.mean().item(), math.sqrt(max(variance, *terms, 0.0) / d.numel())


def clustered_interval(a: Tensor, b: Tensor, level: float = 0.95) -> tuple[float, float]:
    r"""Confidence interval for the mean of a - b that knows how few seeds there were.

    .. math:: \bar d \pm t_\nu \, \mathrm{se}, \qquad
        \nu = \frac{(M_R + M_N - M_E)^2}{M_R^2/(R-1) + M_N^2/(N-1) + M_E^2/((R-1)(N-1))}

    with the mean squares M of the two-way layout and se of :func:`clustered_difference`. Three seeds that differ are
    two degrees of freedom: the interval is then more than twice as wide as 2 se on either side.

    Reference: Satterthwaite, "An approximate distribution of estimates of variance components", 1946.

    Args:
        a, b: shape (R, N): R paired seeds, N data, the same order in both.
        level: coverage, in (0, 1).

    Returns:
        (low, high) in the units of the values.

    Raises:
        DataError: as for :func:`clustered_difference`.
        OptionError: level outside (0, 1).

    >>> clustered_interval(torch.ones(3, 4), torch.zeros(3, 4))
    (1.0, 1.0)
    """
    if not 0.0 < level < 1.0:
        raise OptionError(f"level: expected a number in (0, 1), got {level}: 0.95 is usual")
    mean, error = clustered_difference(a, b)
    d = _seeds_by_data(a, b)
    seeds, data, residual = _mean_squares(d)
    r, n = d.shape
    parts = [(seeds, r - 1), (data, n - 1), (residual, (r - 1) * (n - 1))]
    spread = sum(v**2 / df for v, df in parts if df > 0)
    # se^2 RN is the numerator, after its floor: a floor of one mean square has that mean square's degrees of freedom.
    freedom = (error**2 * d.numel()) ** 2 / spread if spread > 0 else math.inf
    freedom = max(freedom, 1.0)
    half = float(stdtrit(min(freedom, 1e9), 0.5 + level / 2)) * error
    return mean - half, mean + half


def _checked(log_weights: Tensor) -> Tensor:
    if not log_weights.is_floating_point() or log_weights.dim() == 0 or log_weights.shape[0] == 0:
        raise DataError(
            f"log_weights: expected a floating-point tensor with at least one draw in its first dimension, got "
            f"{log_weights.dtype} of shape {tuple(log_weights.shape)}"
        )
    return log_weights


def _kish(lse: Tensor, lse2: Tensor, draws: int) -> Tensor:
    none = lse == -math.inf
    ess = (2 * lse - lse2).exp().clamp(min=1.0, max=float(draws))  # rounding only: the value lies in [1, S]
    return torch.where(none, torch.zeros_like(ess), ess)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise DataError(
            f"a and b: a paired difference needs the same data, got shapes {tuple(a.shape)} and {tuple(b.shape)}: "
            "evaluate both on the same data in the same order"
        )
    return a.detach().double() - b.detach().double()


def _seeds_by_data(a: Tensor, b: Tensor) -> Tensor:
    d = _difference(a, b)
    if d.dim() != 2 or d.numel() == 0:
        raise DataError(
            f"a and b: expected shape (seeds, data), got {tuple(d.shape)}: stack the per-datum values of each seed; "
            "for one seed use paired_difference"
        )
    return d


def _mean_squares(d: Tensor) -> tuple[float, float, float]:
    """Mean squares for rows, columns and residual of an (R, N) layout; NaN where a size of one leaves it unknown."""
    r, n = d.shape
    rows, columns = d.mean(dim=1, keepdim=True), d.mean(dim=0, keepdim=True)
    seeds = n * rows.var().item() if r > 1 else math.nan
    data = r * columns.var().item() if n > 1 else math.nan
    residual = (d - rows - columns + d.mean()).square().sum().item() / ((r - 1) * (n - 1)) if r > 1 < n else math.nan
    return seeds, data, residual
