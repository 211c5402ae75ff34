"""Pareto k-hat of importance weights: how far can these log weights be trusted?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import DataError, OptionError

__all__ = ["k_reasons", "k_threshold", "pareto_k"]

# Below this the tail holds fewer than 20 draws and the fitted shape is mostly its prior.
SMALLEST_SAMPLE = 100
# Columns handled at once: bounds the float64 copies at 5000 draws x 256 data x 8 bytes = 10 MB each.
COLUMNS = 256
# A spread of this many units in the last place is what rounding does to a sum of log densities, not a tail.
ROUNDING = 64
# ... and beyond half a nat a spread is not called rounding, however large the numbers: weights that differ by less than
# a factor of 1.65 are harmless, those that differ by more are to be judged by the fit.
WIDEST_ROUNDING = 0.5
# Points of the fit's grid with less posterior weight are left out, as the library does.
NEGLIGIBLE = 10 * torch.finfo(torch.float64).eps
# Exceedances below this, where the largest weight is 1, cannot be inverted inside the fit.
UNDERFLOW = 1e-290


def k_threshold(num_samples: int) -> float:
    r"""The k-hat above which an importance estimate from S draws should not be trusted.

    .. math:: \min(1 - 1/\log_{10} S,\ 0.7)

    Reference: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024.

    Args:
        num_samples: S, the number of draws, at least 100.

    Raises:
        OptionError: fewer than 100 draws.

    >>> k_threshold(100), k_threshold(5000)
    (0.5, 0.7)
    """
    _check_sample_size(num_samples)
    return min(1.0 - 1.0 / math.log10(num_samples), 0.7)


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Shape k of the generalised Pareto distribution fitted to the largest weights of each datum.

    .. math:: w_s = p(x, z_s) / q(z_s | x), \qquad P(w > u + t \mid w > u) \approx (1 + k t / \sigma)^{-1/k}

    The weights have finite moments up to order 1/k; compare k with :func:`k_threshold`. Two values are answers, not
    estimates: ``-inf`` where the weights are constant (the guide is the exact posterior, or the largest weights are
    all equal, so that there is no tail), and ``inf`` where no fit can be believed; :func:`k_reasons` says which.

    Reference: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024; Yao, Vehtari, Simpson,
    Gelman, "Yes, but did it work? Evaluating variational inference", 2018.

    Args:
        log_weights: ``log p(x, z) - log q(z | x)``, shape (S,) or (S, B), nats; the S >= 100 draws are
            independent draws from the guide.

    Returns:
        k-hat, shape () or (B,), in the dtype and on the device of ``log_weights``.

    Raises:
        OptionError: fewer than 100 draws.
        DataError: not a floating-point tensor of one or two dimensions.

    >>> pareto_k(torch.zeros(200, 3))
    tensor([-inf, -inf, -inf])
    >>> pareto_k(torch.randn(200)).isfinite().item()
    True
    """
    columns = _columns(log_weights)
    parts = [_fit(block)[0] for block in columns.split(COLUMNS, dim=1)]
    k = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    return k.to(log_weights).reshape(log_weights.shape[1:])


def k_reasons(log_weights: Tensor) -> list[str]:
    """Why each datum's k-hat is what it is, in words: one entry for each column of ``log_weights``.

    ``"exact"`` (constant weights, k = -inf), ``"no tail"`` (the largest weights are all equal, k = -inf),
    ``"not finite"`` (a log weight is NaN or infinite, k = inf), ``"one weight dominates"`` (nearly all others are zero
    in double precision, k = inf), ``"ties"`` (too many equal weights in the tail to fit, k = inf), else ``"fitted"``.

    Reference: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", 2024.

    Args:
        log_weights: as for :func:`pareto_k`.

    Raises:
        OptionError, DataError: as for :func:`pareto_k`.

    >>> k_reasons(torch.zeros(200, 2))
    ['exact', 'exact']
    """
    columns = _columns(log_weights)
    return [reason for block in columns.split(COLUMNS, dim=1) for reason in _fit(block)[1]]


def _check_sample_size(num_samples: int) -> None:
    if num_samples < SMALLEST_SAMPLE:
        raise OptionError(
            f"k-hat needs at least {SMALLEST_SAMPLE} draws for each datum, got {num_samples}: "
            "draw more samples from the guide"
        )


def _columns(log_weights: Tensor) -> Tensor:
    if not log_weights.is_floating_point() or log_weights.dim() not in (1, 2):
        raise DataError(
            f"log_weights: expected a floating-point tensor of shape (S,) or (S, B), got {log_weights.dtype} of shape "
            f"{tuple(log_weights.shape)}: put the draws first and flatten the data to one dimension"
        )
    _check_sample_size(log_weights.shape[0])
    return log_weights.detach().cpu().reshape(log_weights.shape[0], -1)


def _tail_size(num_samples: int) -> int:
    """How many draws the fit uses: the rule of the 2024 paper, as arviz-stats applies it to independent draws."""
    return int(3 * math.sqrt(num_samples)) if num_samples > 225 else num_samples // 5


def _fit(log_weights: Tensor) -> tuple[Tensor, list[str]]:
    """k-hat and reason of each column of an (S, b) block, b >= 0."""
    finite = log_weights.isfinite().all(dim=0)
    safe = torch.where(finite, log_weights, torch.zeros_like(log_weights))
    rounding = ROUNDING * torch.finfo(safe.dtype).eps * safe.abs().amax(dim=0).clamp(min=1.0)
    rounding = rounding.clamp(max=WIDEST_ROUNDING).double()
    exact = safe.amax(dim=0) - safe.amin(dim=0) <= rounding

    # With the largest weight at 1, a weight that underflows to 0 is truly negligible.
    shifted = safe.double() - safe.double().amax(dim=0)
    size = _tail_size(len(shifted))
    log_tail = shifted.topk(size + 1, dim=0).values  # descending; its last row is the cutoff
    plateau = log_tail[0] - log_tail[size - 1] <= rounding
    tail = log_tail.exp()
    # The fit divides by the lower quartile of the exceedances. Where that is 0 the library's answer is worthless: 0.8
    # returns its prior, 0.025, which reads as a perfect guide; 1.3 returns NaN. It is 0 because nearly all weights
    # underflow, which takes log-ratios hundreds of nats apart and hence a true k far above 1, or because of ties: then
    # nothing is known of the tail, and a warning for nothing is better than a bad guide that passes.
    quartile = tail[size - int(size / 4 + 0.5)] - tail[size]
    degenerate = quartile < UNDERFLOW
    dominated = tail[size] < UNDERFLOW

    k = torch.full(finite.shape, math.inf, dtype=torch.float64)
    k[finite & (exact | plateau)] = -math.inf
    fitted = finite & ~exact & ~plateau & ~degenerate
    if fitted.any():
        k[fitted] = _shape((tail[:size] - tail[size])[:, fitted].flip(0))
    names = [
        (~finite, "not finite"),
        (exact, "exact"),
        (plateau, "no tail"),
        (degenerate & dominated, "one weight dominates"),
        (degenerate, "ties"),
    ]
    reasons = [next((name for mask, name in names if mask[i]), "fitted") for i in range(len(k))]
    return k, reasons


def _shape(exceedances: Tensor) -> Tensor:
    """Shape of a generalised Pareto distribution for each column of (n, b) exceedances in rising order.

    The profile likelihood's posterior mean on a grid of m points, drawn towards 1/2 as by ten more exceedances (Zhang
    and Stephens, "A new and efficient estimation method for the generalized Pareto distribution", 2009; Vehtari et
    al., 2024, appendix C). What the library's `pareto_khat` gives, for all columns at once: column by column, as the
    library has it, it takes a millisecond for each datum.
    """
    n = len(exceedances)
    grid = 30 + int(n**0.5)
    at = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    theta = (1 - (grid / at).sqrt())[:, None] / (3 * exceedances[int(n / 4 + 0.5) - 1]) + 1 / exceedances[-1]
    k = torch.log1p(-theta[:, None] * exceedances).mean(dim=1)  # (grid, b)
    weights = torch.softmax(n * ((-theta / k).log() - k - 1), dim=0)
    weights = torch.where(weights >= NEGLIGIBLE, weights, torch.zeros_like(weights))
    theta = (theta * weights).sum(dim=0) / weights.sum(dim=0)
    k = torch.log1p(-theta * exceedances).mean(dim=0)
    return ((n * k + 5.0) / (n + 10)).nan_to_num(math.inf, math.inf, math.inf)
