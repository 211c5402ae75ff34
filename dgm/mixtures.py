"""Equal mixtures of Gaussians: quantiles, and absolute moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import DataError

ROUNDS = 200
VALUES = 2**17  # components times data that are looked at at once: they fit a cache


def check_normals(loc: Tensor, scale: Tensor, y: Tensor) -> None:
    """Refuse components or targets that are not finite, and scales that are not positive.

    Raises:
        DataError: the argument is named.
    """
    for name, value in (("loc", loc), ("scale", scale), ("y", y)):
        if not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise DataError(f"{name}: expected finite values, got {bad} of {value.numel()} NaN or infinite")
    if not (scale > 0).all():
        raise DataError(f"scale: expected standard deviations above 0, got a smallest of {scale.min().item():g}")


def absolute_moment(mean: Tensor, sd: Tensor) -> Tensor:
    r"""E|X| for X ~ N(mean, sd^2).

    >>> absolute_moment(torch.tensor(0.0), torch.tensor(1.0)).square().mul(math.pi / 2).allclose(torch.tensor(1.0))
    True
    """
    z = mean / sd
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 2 * sd * density + mean * torch.erf(z / math.sqrt(2))


def mixture_quantile(loc: Tensor, scale: Tensor, level: float) -> Tensor:
    r"""The quantile of each column of an equal mixture of Gaussians, by Newton's steps inside a shrinking bracket.

    .. math:: q_n: \quad \tfrac1S \sum_s \Phi\big((q_n - \mu_{sn}) / \sigma_{sn}\big) = \ell

    The bracket starts at the smallest and the largest of the components' own quantiles.

    Args:
        loc, scale: shape (S, N), float64, finite, scale > 0.
        level: in (0, 1).

    Returns:
        shape (N,).

    >>> mixture_quantile(torch.tensor([[-1.0], [1.0]]).double(), torch.ones(2, 1).double(), 0.5).abs().item() < 1e-9
    True
    """
    pieces = max(1, VALUES // len(loc))
    parts = [
        _quantile(m, sd, level) for m, sd in zip(loc.split(pieces, dim=1), scale.split(pieces, dim=1), strict=True)
    ]
    return torch.cat(parts)


def _quantile(loc: Tensor, scale: Tensor, level: float) -> Tensor:
    z = torch.special.ndtri(torch.tensor(level, dtype=loc.dtype, device=loc.device))
    own = loc + scale * z
    low, high = own.amin(dim=0), own.amax(dim=0)
    spread = (scale.square().mean(dim=0) + loc.var(dim=0, correction=0)).sqrt()
    found = (loc.mean(dim=0) + z * spread).clamp(low, high)  # of the normal density with the mixture's moments
    small, last = 1e-9 * scale.amin(dim=0), high - low  # the error after a last step that small is its square
    at = torch.arange(loc.shape[1], device=loc.device)
    for _ in range(ROUNDS):
        x, part = found[at], len(at) < loc.shape[1]
        m, sd = (loc[:, at], scale[:, at]) if part else (loc, scale)
        u = (x - m) / sd
        miss = torch.special.ndtr(u).mean(dim=0) - level
        density = (torch.exp(-0.5 * u.square()) / sd).mean(dim=0) / math.sqrt(2 * math.pi)
        low[at] = torch.where(miss < 0, x, low[at])
        high[at] = torch.where(miss >= 0, x, high[at])
        newton = x - miss / density
        inside = (newton > low[at]) & (newton < high[at]) & ((newton - x).abs() < last[at] / 2)
        new = torch.where(inside, newton, (low[at] + high[at]) / 2)
        found[at], last[at] = new, (new - x).abs()
        near = small[at] + 4e-16 * x.abs()
        at = at[(last[at] > near) & (high[at] - low[at] > near)]
        if not len(at):
            break
    return found
