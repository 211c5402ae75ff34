"""How near an approximate predictive distribution comes to the exact one: agreement, total variation, Wasserstein-2.

Wilson, Izmailov, Hoffman, Gal, Li, Pradier, Vikram, Foong, Lotfi and Farquhar, "Evaluating approximate inference in
Bayesian deep learning", 2022: predictions of a method against those of long Hamiltonian Monte Carlo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import DataError, OptionError
from .metrics import CategoricalPrediction, GaussianPrediction

__all__ = ["agreement", "compare_to_reference", "mixture_distances", "total_variation", "wasserstein2"]

Prediction = GaussianPrediction | CategoricalPrediction

AT_ONCE = 4_000_000
"""Numbers in one chunk of distribution functions: 32 MB."""
REACH = 8.0
"""Standard deviations that a grid goes beyond the outermost components: 1e-15 of the mass lies further out."""


def agreement(probs_a: Tensor, probs_b: Tensor) -> float:
    r"""Share of the data to which both give the same most probable class, in [0, 1].

    .. math:: \frac1N \sum_n 1\big[\arg\max_c p_{nc} = \arg\max_c q_{nc}\big]

    Reference: Wilson et al., "Evaluating approximate inference in Bayesian deep learning", 2022.

    Args:
        probs_a, probs_b: class probabilities, shape (N, C); of equal ones the lowest class counts.

    Raises:
        DataError: not (N, C), values outside [0, 1], or rows that do not sum to 1 within 1e-3.

    >>> agreement(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
    0.5
    """
    a, b = _probabilities(probs_a, probs_b)
    return (a.argmax(-1) == b.argmax(-1)).double().mean().item()


def total_variation(probs_a: Tensor, probs_b: Tensor) -> float:
    r"""Total variation distance of the class probabilities, mean over the data, in [0, 1].

    .. math:: \frac1N \sum_n \tfrac12 \sum_c |p_{nc} - q_{nc}|

    Reference: Wilson et al., "Evaluating approximate inference in Bayesian deep learning", 2022.

    Args:
        probs_a, probs_b: class probabilities, shape (N, C).

    Raises:
        DataError: as for :func:`agreement`.

    >>> total_variation(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75]]))
    0.75
    """
    a, b = _probabilities(probs_a, probs_b)
    return (a - b).abs().sum(-1).div(2).mean().item()


def wasserstein2(draws_a: Tensor, draws_b: Tensor) -> Tensor:
    r"""Wasserstein-2 distance of two sets of draws of one number, for each datum: exact, by their order statistics.

    .. math:: W_2^2 = \int_0^1 \big(F_a^{-1}(t) - F_b^{-1}(t)\big)^2 dt

    Of finite samples it is above 0 even where both come from one distribution, by O(S^-1/2): hold it against the
    distance of two halves of one set. Predictive mixtures of normals need no draws: :func:`mixture_distances`.

    Reference: Villani, "Topics in optimal transportation", 2003, theorem 2.18.

    Args:
        draws_a, draws_b: shapes (S, N) and (T, N), draws first; S and T may differ.

    Returns:
        (N,), in the units of the draws; its mean over the data is the score of Wilson et al. 2022.

    Raises:
        DataError: other shapes, no draws, or values that are not finite.

    >>> wasserstein2(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [3.0], [4.0], [4.0]]) - 1.0).shape
    torch.Size([1])
    """
    for name, draws in (("draws_a", draws_a), ("draws_b", draws_b)):
        if draws.dim() != 2 or not len(draws) or draws.shape[1:] != draws_a.shape[1:]:
            raise DataError(
                f"{name}: expected shape (S, N), draws first, with the N of both sets equal, got "
                f"{tuple(draws_a.shape)} and {tuple(draws_b.shape)}"
            )
        if not bool(draws.isfinite().all()):
            raise DataError(f"{name}: expected finite values, got {int((~draws.isfinite()).sum())} NaN or infinite")
    a, b = (draws.detach().double().sort(0).values for draws in (draws_a, draws_b))
    # both quantile functions are constant between two neighbours of {i/S} and {j/T}; whole numbers of 1/(S T)
    s, t = len(a), len(b)
    ends = torch.cat([torch.arange(1, s + 1) * t, torch.arange(1, t + 1) * s]).unique()
    width = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (s * t)
    place = (ends - 1).to(a.device)
    return (width.to(a.device)[:, None] * (a[place // t] - b[place // s]).square()).sum(0).sqrt()


def mixture_distances(a: GaussianPrediction, b: GaussianPrediction, points: int = 1000) -> tuple[Tensor, Tensor]:
    r"""Wasserstein-2 distance and total variation of two predictive mixtures of normals, for each datum.

    .. math:: W_2^2 = \int_0^1 (F^{-1} - G^{-1})^2 dt, \qquad \mathrm{TV} = \tfrac12 \int |f - g|\,dy

    Both distribution functions are exact on a grid that is dense where the components are, and linear between: W2 is
    then exact for these, and TV is half the sum of the differences of the cells' probabilities. No predictive draws
    are made, so nothing but the draws of the parameters is random.

    Args:
        a, b: predictions of the same data, with any numbers of posterior draws.
        points: of the grid, at least 10; the errors fall with its square.

    Returns:
        W2 `(N,)` in the units of y, and TV `(N,)` in [0, 1].

    Raises:
        DataError: predictions of other data. OptionError: fewer than 10 points.

    >>> y = torch.zeros(1)
    >>> a, b = (GaussianPrediction(torch.full((1, 1), m), torch.tensor(1.0), y) for m in (0.0, 2.0))
    >>> w2, tv = mixture_distances(a, b)
    >>> abs(w2.item() - 2.0) < 1e-3, tv.shape
    (True, torch.Size([1]))
    """
    if points < 10:
        raise OptionError(f"points is {points}, expected at least 10")
    _same_data(a, b)
    wide = max(1, AT_ONCE // (points * max(len(a.loc), len(b.loc))))
    pieces = []
    for start in range(0, len(a.y), wide):
        rows = slice(start, start + wide)
        grid = _grid(torch.cat([_some(a.loc[:, rows]), _some(b.loc[:, rows])]),
                     torch.cat([_some(a.scale[:, rows]), _some(b.scale[:, rows])]), points)  # fmt: skip
        f, g = (_cdf(grid, p.loc[:, rows], p.scale[:, rows]) for p in (a, b))
        pieces.append((_w2(grid, f, g), (f.diff(dim=1) - g.diff(dim=1)).abs().sum(1) / 2))
    w2, tv = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return a.y_std * w2, tv.clamp(max=1.0)


def compare_to_reference(prediction: Prediction, reference: Prediction) -> dict[str, float]:
    """A method's predictions against the reference's, and the same between two halves of the reference: its noise.

    Regression: `wasserstein2` (units of y) and `total_variation` of the predictive densities, means over the data;
    classification: `agreement` and `total_variation` of the class probabilities. With `log_likelihood_difference` and
    `rmse_difference` (`accuracy_difference`), the method minus the reference. Each name with `_floor` is the value
    between the first and the second half of the reference's draws: with draws that lie chain after chain, as those of
    `Chains.predict` do, two independent runs of half the length. A method is told apart from the reference only where
    it lies well beyond it.

    Reference: Wilson et al., "Evaluating approximate inference in Bayesian deep learning", 2022.

    Args:
        prediction: of the method; any number of draws, one for a point.
        reference: of long chains, at least two draws, chain after chain.

    Raises:
        DataError: a regression against a classification, other data, or a reference of one draw.

    >>> y = torch.zeros(3)
    >>> reference = GaussianPrediction(torch.randn(8, 3), torch.tensor(1.0), y)
    >>> found = compare_to_reference(GaussianPrediction(torch.zeros(1, 3), torch.tensor(1.0), y), reference)
    >>> sorted(found)[-2:]
    ['wasserstein2', 'wasserstein2_floor']
    """
    first, second = halves(reference)
    found, floor = measures(prediction, reference), measures(first, second)
    return found | {f"{name}_floor": value for name, value in floor.items()}


def measures(a: Prediction, b: Prediction) -> dict[str, float]:
    """The distances of two predictions of the same data, and the differences of their scores, a minus b.

    Raises:
        DataError: a regression against a classification, or other data.
    """
    _same_data(a, b)
    scores = {"log_likelihood_difference": a.log_likelihood() - b.log_likelihood()}
    if isinstance(a, GaussianPrediction) and isinstance(b, GaussianPrediction):
        w2, tv = mixture_distances(a, b)
        own = {"wasserstein2": w2.mean().item(), "total_variation": tv.mean().item()}
        return own | scores | {"rmse_difference": a.rmse() - b.rmse()}
    if isinstance(a, CategoricalPrediction) and isinstance(b, CategoricalPrediction):
        own = {"agreement": agreement(a.probs, b.probs), "total_variation": total_variation(a.probs, b.probs)}
        return own | scores | {"accuracy_difference": a.accuracy() - b.accuracy()}
    raise DataError(
        f"one is a {type(a).__name__}, the other a {type(b).__name__}: both must be predictions of the same model"
    )


def halves(reference: Prediction) -> tuple[Prediction, Prediction]:
    """The first and the second half of a prediction's draws.

    Raises:
        DataError: fewer than two draws.
    """
    whole = reference.loc if isinstance(reference, GaussianPrediction) else reference.logits
    half = len(whole) // 2
    if half < 1:
        raise DataError("the reference has one draw: its noise needs at least two, and is told by many chains")
    if isinstance(reference, GaussianPrediction):
        loc, scale, y, y_std = reference.loc, reference.scale, reference.y, reference.y_std
        return (
            GaussianPrediction(loc[:half], scale[:half], y, y_std),
            GaussianPrediction(loc[half:], scale[half:], y, y_std),
        )
    return CategoricalPrediction(whole[:half], reference.y), CategoricalPrediction(whole[half:], reference.y)


def _same_data(a: Prediction, b: Prediction) -> None:
    scales = [getattr(p, "y_std", 1.0) for p in (a, b)]
    if a.y.shape != b.y.shape or not torch.equal(a.y.to(b.y), b.y) or scales[0] != scales[1]:
        raise DataError(
            f"the two predictions are of other data: {len(a.y)} and {len(b.y)} rows, y_std {scales[0]:g} and "
            f"{scales[1]:g}; predict the same test rows, on the same scale, with both"
        )


def _probabilities(a: Tensor, b: Tensor) -> list[Tensor]:
    if a.dim() != 2 or a.shape != b.shape or not a.numel():
        raise DataError(f"expected probabilities of one shape (N, C) twice, got {tuple(a.shape)} and {tuple(b.shape)}")
    for name, probs in (("probs_a", a), ("probs_b", b)):
        if not (bool((probs >= 0).all()) and bool(((probs.sum(-1) - 1).abs() <= 1e-3).all())):
            raise DataError(f"{name}: expected values from 0 to 1 that sum to 1 over the classes: normalise logits")
    return [probs.detach().double() for probs in (a, b)]


def _some(values: Tensor, most: int = 128) -> Tensor:
    """A few of the draws `(S, N)`, evenly spaced: enough to say where a grid must be dense."""
    keep = torch.linspace(0, len(values) - 1, min(len(values), most), device=values.device).round().long()
    return values[keep]


def _grid(loc: Tensor, scale: Tensor, points: int) -> Tensor:
    """`(N, points)`, increasing: a part of the components' own grids, dense where they crowd."""
    z = torch.linspace(-REACH, REACH, max(33, 2 * points // len(loc)), dtype=loc.dtype, device=loc.device)
    pooled = (loc + z[:, None, None] * scale).flatten(0, 1).sort(0).values  # (components * z, N)
    keep = torch.linspace(0, len(pooled) - 1, points, device=loc.device).round().long()
    return pooled[keep].T.contiguous()


def _cdf(grid: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The mixture's distribution function on the grid, `(N, points)`, closed to 0 and 1 at its ends."""
    value = torch.stack([
        torch.special.ndtr((x - mu[:, None]) / sd[:, None]).mean(0)
        for x, mu, sd in zip(grid, loc.T, scale.T, strict=True)
    ])  # fmt: skip
    value[:, 0], value[:, -1] = 0.0, 1.0
    return value


def _w2(grid: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """W2 of two distributions with these distribution functions, linear between the points of the grid, `(N,)`."""
    levels = torch.cat([f, g], 1).sort(1).values  # where either quantile function bends
    low, high = levels[:, :-1], levels[:, 1:]
    # inside of each piece both are linear: their values at its ends, each taken from within the piece
    middle = (low + high) / 2
    starts, ends = zip(*(_line(grid, cdf, middle, low, high) for cdf in (f, g)), strict=True)
    first, last = starts[0] - starts[1], ends[0] - ends[1]
    piece = (high - low) * (first.square() + first * last + last.square()) / 3
    return piece.sum(1).clamp(min=0.0).sqrt()


def _line(grid: Tensor, cdf: Tensor, middle: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The quantile function at `low` and `high`, on the cell of the grid in which `middle` lies."""
    cell = torch.searchsorted(cdf, middle, right=True).clamp(1, cdf.shape[1] - 1)
    x0, x1 = grid.gather(1, cell - 1), grid.gather(1, cell)
    p0, p1 = cdf.gather(1, cell - 1), cdf.gather(1, cell)
    slope = (x1 - x0) / (p1 - p0).clamp(min=1e-300)
    return (x0 + (low - p0) * slope).clamp(x0, x1), (x0 + (high - p0) * slope).clamp(x0, x1)
