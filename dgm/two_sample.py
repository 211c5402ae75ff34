"""Two-sample tests of draws against reference draws: by a kernel, and by a classifier."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import norm
from torch import Tensor

from .errors import DataError, OptionError
from .paired_draws import paired_draws, subsample
from .programs import preserved_rng

__all__ = ["C2ST", "MMD", "c2st", "mmd"]


@dataclass(frozen=True)
class MMD:
    """Squared maximum mean discrepancy; see `mmd`.

    squared: unbiased, may be negative. se: its standard error. biased: the V-statistic, never negative.
    bandwidth: of the kernel, in the coordinates compared. p_value: of the permutation test, None where none was made.
    """

    squared: float
    se: float
    biased: float
    bandwidth: float
    p_value: float | None
    draws: tuple[int, int]


def mmd(
    a: Any,
    reference: Any,
    *,
    bandwidth: float | None = None,
    multiples: Sequence[float] = (1.0,),
    permutations: int = 0,
    max_draws: int = 1000,
    standardise: bool = True,
    seed: int = 0,
) -> MMD:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, or a mean of such kernels.

    .. math:: \mathrm{MMD}^2 = E\,k(x, x') + E\,k(y, y') - 2 E\,k(x, y), \qquad k(x, y) = e^{-|x - y|^2 / 2 h^2}

    The bandwidth h is the median distance of the reference's own draws, so that every set of draws is judged by the
    same kernel. The standard error has both orders of the U-statistic's variance: it also holds where a is exact.

    Reference: Gretton, Borgwardt, Rasch, Schölkopf, Smola, "A kernel two-sample test", 2012; Hoeffding, "A class of
    statistics with asymptotically normal distribution", 1948, for the error.

    Args:
        a, reference: draws, (S, d) and (T, d), at least 4 each.
        bandwidth: h > 0; default the median of the distances. multiples: of h, one kernel each; their mean is used.
        permutations: of the labels for the p-value; 0 makes none. The smallest p-value is 1 / (permutations + 1).
        max_draws: draws used of each, at random; memory grows with its square.
        standardise: by the reference's mean and standard deviations.
        seed: of the subsample and the permutations.

    Raises:
        DataError: draws that are too few, not finite, of different widths, or a constant coordinate of the reference.
        OptionError: an option out of its domain.

    >>> draws = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> result = mmd(draws[:150], draws[150:])
    >>> abs(result.squared) < 4 * result.se, result.biased >= 0
    (True, True)
    """
    if max_draws < 4 or permutations < 0 or not multiples or not all(0 < m < math.inf for m in multiples):
        raise OptionError(
            f"mmd(max_draws={max_draws}, permutations={permutations}, multiples={tuple(multiples)}): expected at least "
            "4 draws, permutations >= 0 and positive multiples"
        )
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise OptionError(f"mmd(bandwidth={bandwidth}): expected a positive number, or None for the median distance")
    with preserved_rng(seed):
        x, y = (subsample(draws, max_draws) for draws in paired_draws(a, reference, standardise))
        m, n = len(x), len(y)
        squared = _squared_distances(torch.cat([x, y]))  # (m + n, m + n)
        h = bandwidth if bandwidth is not None else _median_distance(squared[m:, m:])
        kernel = torch.stack([(squared / (-2 * (f * h) ** 2)).exp() for f in multiples]).mean(0)
        p_value = None
        if permutations:
            values = _permuted(kernel, m, permutations)
            p_value = (1 + int((values[1:] >= values[0] - 1e-12).sum())) / (1 + permutations)
    kxx, kyy, kxy = kernel[:m, :m], kernel[m:, m:], kernel[:m, m:]
    unbiased = _off_diagonal(kxx) + _off_diagonal(kyy) - 2 * kxy.mean()
    biased = kxx.mean() + kyy.mean() - 2 * kxy.mean()
    error = _mmd_variance(kxx, kyy, kxy) ** 0.5
    return MMD(unbiased.item(), error, max(biased.item(), 0.0), float(h), p_value, (m, n))


def _mmd_variance(kxx: Tensor, kyy: Tensor, kxy: Tensor) -> float:
    """Variance of the unbiased estimate by Hoeffding's decomposition; the noise of the projections is taken out."""
    m, n = kxy.shape
    within_x, within_y = (_interaction(k) / (len(k) * (len(k) - 1)) for k in (kxx, kyy))
    centred = kxy - kxy.mean(0) - kxy.mean(1, keepdim=True) + kxy.mean()
    across = centred.square().sum().item() / ((m - 1) * (n - 1)) / (m * n)
    first_x = (_row_means(kxx) - kxy.mean(1)).var().item() / m - within_x - across
    first_y = (_row_means(kyy) - kxy.mean(0)).var().item() / n - within_y - across
    return 4 * max(first_x, 0.0) + 4 * max(first_y, 0.0) + 2 * within_x + 2 * within_y + 4 * across


def _interaction(kernel: Tensor) -> float:
    """Variance of what is left of k(x, x') when the mean and the two projections are taken out."""
    s = len(kernel)
    rows = _row_means(kernel) * (s - 1) / (s - 2)
    mean = _off_diagonal(kernel) * s / (s - 2)
    rest = kernel - rows - rows[:, None] + mean
    return ((rest.square().sum() - rest.diagonal().square().sum()) / (s * (s - 3))).item()


def _row_means(kernel: Tensor) -> Tensor:
    return (kernel.sum(1) - kernel.diagonal()) / (len(kernel) - 1)


def _off_diagonal(kernel: Tensor) -> Tensor:
    return _row_means(kernel).mean()


def _permuted(kernel: Tensor, m: int, permutations: int) -> Tensor:
    """The unbiased estimate for the labels as they are, and for permutations of them, (1 + P,)."""
    total = len(kernel)
    n = total - m
    labels = torch.stack([torch.randperm(total, device=kernel.device) for _ in range(permutations)]) < m
    labels = torch.cat([(torch.arange(total, device=kernel.device) < m)[None], labels]).to(kernel)
    rows = kernel.sum(1)
    xx = ((labels @ kernel) * labels).sum(1)  # the diagonal's m ones included
    with_all = labels @ rows
    xy, yy = with_all - xx, rows.sum() - 2 * with_all + xx
    return (xx - m) / (m * (m - 1)) + (yy - n) / (n * (n - 1)) - 2 * xy / (m * n)


def _squared_distances(draws: Tensor) -> Tensor:
    norms = draws.square().sum(1)
    squared = (norms + norms[:, None] - 2 * draws @ draws.mT).clamp(min=0.0)
    return squared.fill_diagonal_(0.0)


def _median_distance(squared: Tensor) -> float:
    upper = squared[torch.ones_like(squared, dtype=torch.bool).triu(1)]
    median = upper.median().item() ** 0.5
    if median == 0.0:
        raise DataError("reference: more than half of its draws are equal, the median distance is 0: give a bandwidth")
    return median


@dataclass(frozen=True)
class C2ST:
    """Accuracy of classifiers that tell draws from reference draws; see `c2st`.

    accuracy: of the best of them, 0.5 where the draws cannot be told apart. se: its error, widened for the folds.
    p_value: one-sided against 0.5, times the number of classifiers. accuracies: by classifier. draws: of each set.
    """

    accuracy: float
    se: float
    p_value: float
    accuracies: dict[str, float]
    draws: int


def c2st(
    a: Any,
    reference: Any,
    *,
    classifiers: Sequence[str] = ("logistic", "mlp"),
    folds: int = 5,
    max_draws: int = 1000,
    standardise: bool = True,
    seed: int = 0,
) -> C2ST:
    r"""Classifier two-sample test: how often can a classifier say which set a draw is from?

    .. math:: \mathrm{acc} = \tfrac1{2n} \sum_i 1\{\hat f_{-i}(x_i) = y_i\}, \qquad
              \mathrm{se}^2 = \frac{\mathrm{acc}\,(1 - \mathrm{acc})}{2n} \Big(1 + \frac{F}{F - 1}\Big)

    Accuracy is cross-validated on as many draws of each set. It is a lower bound on what a perfect classifier could do:
    0.5 says that these classifiers see no difference at this number of draws. Logistic regression sees means alone.
    The error is the binomial one widened for F folds that share their training draws: with the plain one, equal sets
    are told apart at the 5 % level 8 % of the time.

    Reference: Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", 2017; Nadeau and Bengio, "Inference for
    the generalization error", 2003, for the factor.

    Args:
        a, reference: draws, (S, d) and (T, d), at least 10 for each fold.
        classifiers: of "logistic", "mlp" (two layers of 32), "boosting" (trees).
        folds: of the cross-validation, at least 2. max_draws: draws used of each set, at random.
        standardise: by the reference's mean and standard deviations.
        seed: of the subsample, the folds and the classifiers.

    Raises:
        DataError: draws that are too few, not finite, of different widths, or a constant coordinate of the reference.
        OptionError: an unknown classifier, fewer than 2 folds, or fewer max_draws than the folds need.

    >>> draws = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> c2st(draws[:200] + 3.0, draws[200:], classifiers=["logistic"]).accuracy > 0.9
    True
    """
    unknown = [name for name in classifiers if name not in ("logistic", "mlp", "boosting")]
    if unknown or not classifiers or folds < 2 or max_draws < 10 * folds:
        raise OptionError(
            f"c2st(classifiers={list(classifiers)}, folds={folds}, max_draws={max_draws}): expected some of "
            "'logistic', 'mlp', 'boosting', at least 2 folds and 10 draws for each"
        )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    x, y = paired_draws(a, reference, standardise, least=10 * folds)
    draws = min(len(x), len(y), max_draws)
    with preserved_rng(seed):
        x, y = subsample(x, draws), subsample(y, draws)
    inputs = torch.cat([x, y]).cpu().numpy()
    labels = torch.cat([torch.ones(draws), torch.zeros(draws)]).numpy()
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    correct: dict[str, int] = {}
    for name in classifiers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged classifier is a classifier
            correct[name] = int((cross_val_predict(_classifier(name, seed), inputs, labels, cv=split) == labels).sum())
    total = 2 * draws
    accuracies = {name: count / total for name, count in correct.items()}
    accuracy, wider = max(accuracies.values()), 1 + folds / (folds - 1)
    p_value = min(1.0, len(correct) * float(norm.sf((accuracy - 0.5) / math.sqrt(0.25 / total * wider))))
    error = math.sqrt(accuracy * (1 - accuracy) / total * wider)
    return C2ST(accuracy, error, p_value, accuracies, draws)


def _classifier(name: str, seed: int) -> Any:
    if name == "logistic":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression()
    if name == "boosting":
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(max_iter=50, random_state=seed)
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((32, 32), alpha=1e-3, learning_rate_init=1e-2, max_iter=40, random_state=seed)
