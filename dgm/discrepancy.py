"""How far draws of a posterior are from reference draws: by kernel, along directions, by classifier, in moments.

Every distance compares draws `(S, d)` with draws `(T, d)` of the reference, on the scale of the reference: centred by
its mean and divided by its standard deviations. Draws count as independent: thin a chain first. No distance between
finite sets of draws is zero in the mean, sliced Wasserstein above all: hold it against :func:`noise_floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import OptionError
from .paired_draws import checked_draws, paired_draws
from .programs import preserved_rng
from .two_sample import C2ST, MMD, c2st, mmd

__all__ = ["C2ST", "MMD", "MomentErrors", "NoiseFloor", "SlicedWasserstein"]
__all__ += ["c2st", "mmd", "moment_errors", "noise_floor", "sliced_wasserstein"]

# Differences of correlations are looked for in blocks of this many rows: 512 x 10,000 x 8 bytes = 41 MB.
BLOCK = 512


class NoiseFloor(NamedTuple):
    """What a distance is between two halves of the reference: mean, standard deviation and values over the splits."""

    mean: float
    sd: float
    values: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class SlicedWasserstein:
    """Sliced Wasserstein distance; see `sliced_wasserstein`.

    distance: over the directions. se: its error by the chance of the directions alone, not of the draws.
    slices: the distance along each direction, (projections,).
    """

    distance: float
    se: float
    slices: Tensor

    @property
    def largest(self) -> float:
        """The distance along the worst of the directions drawn."""
        return self.slices.max().item()


def sliced_wasserstein(
    a: Any, reference: Any, *, projections: int = 100, p: float = 2.0, standardise: bool = True, seed: int = 0
) -> SlicedWasserstein:
    r"""Wasserstein-p distance of the draws along random directions; exact along each, for any two sizes.

    .. math:: \mathrm{SW}_p^p = \frac1L \sum_{l=1}^L \int_0^1 |F^{-1}_{a, l}(t) - F^{-1}_{b, l}(t)|^p\, dt

    In one dimension there is a single direction and it is the Wasserstein distance itself.

    Reference: Bonneel, Rabin, Peyré, Pfister, "Sliced and Radon Wasserstein barycenters of measures", 2015.

    Args:
        a, reference: draws, (S, d) and (T, d), at least 2 each.
        projections: L, number of directions, uniform on the sphere. p: order, at least 1.
        standardise: by the reference's mean and standard deviations; the distance is then in units of these.
        seed: of the directions.

    Raises:
        DataError: draws that are too few, not finite, of different widths, or a constant coordinate of the reference.
        OptionError: projections < 1 or p < 1.

    >>> sliced_wasserstein(torch.eye(3) + 1.0, torch.eye(3)[:2], standardise=False, projections=5).slices.shape
    torch.Size([5])
    """
    if projections < 1 or not 1 <= p < math.inf:
        raise OptionError(f"sliced_wasserstein(projections={projections}, p={p}): expected at least 1, and p >= 1")
    x, y = paired_draws(a, reference, standardise, least=2)
    d = x.shape[1]
    with preserved_rng(seed):
        directions = torch.randn(d, projections, dtype=x.dtype) if d > 1 else torch.ones(1, 1, dtype=x.dtype)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    powers = torch.cat([_wasserstein_power(x @ part, y @ part, p) for part in directions.split(50, 1)])  # (L,)
    mean = powers.mean().item()
    count = len(powers)
    spread = (powers.std() / count**0.5).item() if count > 1 else 0.0 if d == 1 else math.nan
    slope = mean ** (1 / p - 1) / p if mean > 0 else 0.0
    return SlicedWasserstein(mean ** (1 / p), slope * spread, powers ** (1 / p))


def _wasserstein_power(x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p^p in one dimension for each column, (L,): both quantile functions are constant between merged levels."""
    s, t = len(x), len(y)
    x, y = x.sort(0).values, y.sort(0).values
    if s == t:
        return (x - y).abs().pow(p).mean(0)
    # In units of 1 / (s t) the levels are whole numbers, so that equal ones are equal.
    ends = torch.cat([torch.arange(1, s + 1) * t, torch.arange(1, t + 1) * s]).unique()  # sorted
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    widths = ((ends - starts).to(x) / (s * t))[:, None].to(x.device)
    gaps = x[(starts // t).to(x.device)] - y[(starts // s).to(x.device)]
    return (gaps.abs().pow(p) * widths).sum(0)


@dataclass(frozen=True, eq=False)
class MomentErrors:
    """Errors of the first two moments; see `moment_errors`.

    mean: (d,), in reference standard deviations; mean_se: (d,), its error by the chance of the draws of both.
    sd_ratio: (d,), 1 where right. correlation: the largest error of a correlation, and pair: its coordinates.
    """

    mean: Tensor
    mean_se: Tensor
    sd_ratio: Tensor
    correlation: float
    pair: tuple[int, int] | None

    @property
    def worst_mean(self) -> float:
        """The largest absolute error of a mean, in reference standard deviations."""
        return self.mean.abs().max().item()

    @property
    def worst_log_sd(self) -> float:
        """The largest absolute logarithm of a ratio of standard deviations."""
        return self.sd_ratio.log().abs().max().item()


def moment_errors(a: Any, reference: Any) -> MomentErrors:
    r"""Errors of means, standard deviations and correlations against reference draws.

    .. math:: (\bar a_i - \bar r_i) / s^r_i, \qquad s^a_i / s^r_i, \qquad \max_{i < j} |\rho^a_{ij} - \rho^r_{ij}|

    Reference: Magnusson, Bürkner, Vehtari, "posteriordb: a set of posteriors for Bayesian inference and probabilistic
    programming", 2022.

    Args:
        a, reference: draws, (S, d) and (T, d), at least 4 each.

    Raises:
        DataError: draws that are too few, not finite, of different widths, or a constant coordinate of the reference.

    >>> draws = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    >>> errors = moment_errors(2 * draws + 1, draws)
    >>> bool(torch.allclose(errors.sd_ratio, torch.tensor(2.0).double())), errors.correlation < 1e-5
    (True, True)
    """
    x, y = paired_draws(a, reference, standardise=True)  # the reference's mean is 0 and its sd 1 from here on
    sd = x.std(0)
    u, v = (x - x.mean(0)) / sd.clamp(min=1e-300) / (len(x) - 1) ** 0.5, y / (len(y) - 1) ** 0.5
    worst, pair = 0.0, None
    for start in range(0, x.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        gaps = (u[:, rows].mT @ u - v[:, rows].mT @ v).abs().triu(start + 1)
        place = int(gaps.argmax())
        i, j = divmod(place, gaps.shape[1])
        if gaps[i, j] > worst or (pair is None and x.shape[1] > 1):
            worst, pair = gaps[i, j].item(), (start + i, j)
    error = (sd.square() / len(x) + 1 / len(y)).sqrt()
    return MomentErrors(x.mean(0), error, sd, worst, pair)


def noise_floor(
    reference: Any, distance: Callable[[Tensor, Tensor], float], *, repeats: int = 5, seed: int = 0
) -> NoiseFloor:
    """What a distance gives between two random halves of the reference: smaller values say nothing.

    The halves have half the draws, so that this is a little more than the floor at full size.

    Args:
        reference: draws, (T, d), at least 8.
        distance: `(a, b) -> float`, e.g. `lambda a, b: sliced_wasserstein(a, b).distance`.
        repeats: number of splits. seed: of the splits.

    Raises:
        DataError: draws that are too few or not finite.
        OptionError: repeats < 1.

    >>> draws = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> 0 < noise_floor(draws, lambda a, b: sliced_wasserstein(a, b).distance).mean < 0.5
    True
    """
    if repeats < 1:
        raise OptionError(f"noise_floor(repeats={repeats}): expected at least 1")
    draws = checked_draws("reference", reference, 8)
    with preserved_rng(seed):
        orders = [torch.randperm(len(draws)).to(draws.device) for _ in range(repeats)]
    half = len(draws) // 2
    values = [float(distance(draws[order[:half]], draws[order[half:]])) for order in orders]
    spread = torch.tensor(values, dtype=torch.float64)
    return NoiseFloor(spread.mean().item(), spread.std(unbiased=False).item(), tuple(values))
