"""When to stop training on a held-out bound that is itself a noisy estimate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import DataError, OptionError, TrainingError

__all__ = ["NoisyPlateau"]


class NoisyPlateau:
    r"""Stop when the last p checks are not better than the p before them by more than z standard errors.

    With :math:`v_t` the bound at check t and m the means of the two latest windows of p checks,

    .. math:: \text{stop if}\quad m_\text{new} - m_\text{old} \le
        z\,\max(\mathrm{se}_\text{given}, \mathrm{se}_\text{seen}),
        \qquad \mathrm{se}_\text{seen}^2 = \frac2p \cdot \frac{\sum_t (v_t - v_{t-1})^2}{2(2p - 1)}

    * :math:`\mathrm{se}_\text{given}` is the error of that difference from the evaluation. With per-datum bounds
      :math:`v_{tn}` it is paired, :math:`\mathrm{sd}_n(m_{\text{new},n} - m_{\text{old},n}) / \sqrt N`, so that the
      spread of the data, which is in every check, cancels. Otherwise it is :math:`(\sum_t \mathrm{se}_t^2)^{1/2} / p`,
      the checks taken as independent: then give the Monte Carlo error of each check, *not* the spread over data, which
      would stop training far too early.
    * :math:`\mathrm{se}_\text{seen}` is the scatter from one check to the next (von Neumann's estimate, which a slow
      trend does not inflate). It holds what no evaluation knows of: the jitter of the parameters under stochastic
      gradients.

    A straight line without noise never stops (z < p sqrt p); a flat or falling curve stops at check 2p or soon after; a
    rise counts as long as its gain over p checks, p times the slope, stands out of the noise. One lucky check does not
    prolong training (for z >= 1 it adds more to the scatter than to the gain), and one unlucky check ends it only if it
    falls by more than about p^2 / (1 + z) times the gain of one check.

    Reference: Geweke, "Evaluating the accuracy of sampling-based approaches to the calculation of posterior moments",
    1992 (comparison of windows in standard errors); Prechelt, "Early stopping, but when?", 1998 (strips of held-out
    checks); von Neumann, "Distribution of the ratio of the mean square successive difference to the variance", 1941.

    Args:
        patience: p, checks in a window, at least 2; nothing stops before check 2p.
        z: how many standard errors a gain must exceed, in [0, patience ** 1.5).

    Attributes:
        best: the largest mean of ``patience`` successive checks so far (of all checks while there are fewer); ``-inf``
            before the first check. A mean, since the largest of many noisy checks is mostly luck.
        best_check: the number of the check that ended that window, from 1; 0 before the first.
        reason: one sentence: why it stops, or why not yet.

    Raises:
        OptionError: patience or z out of their domain.

    >>> rule = NoisyPlateau(patience=3)
    >>> [rule.update(value) for value in (-9.0, -8.0, -7.0, -6.0, -6.0, -6.0, -6.0)]
    [False, False, False, False, False, False, False]
    >>> rule.update(-6.0), rule.reason.startswith("stopped at check 8")
    (True, True)
    """

    def __init__(self, patience: int = 10, z: float = 2.0) -> None:
        if patience < 2:
            raise OptionError(f"patience: expected at least 2 checks in a window, got {patience}")
        if not 0.0 <= z < patience**1.5:
            raise OptionError(
                f"z: expected 0 <= z < patience ** 1.5 = {patience**1.5:.3g} standard errors, got {z}: "
                "beyond it even a steady rise would stop; 2 is usual"
            )
        self.patience = patience
        self.z = z
        self.best = -math.inf
        self.best_check = 0
        self.reason = "no check yet"
        self._checks = 0
        self._values: list[float] = []
        self._errors: list[float] = []
        self._per_datum: list[Tensor] = []

    def update(self, value: float, standard_error: float = 0.0, per_datum: Tensor | None = None) -> bool:
        """Take in one check of the held-out bound; True means stop.

        Args:
            value: the bound, nats a datum, higher is better.
            standard_error: its Monte Carlo error, nats, at least 0; ignored where ``per_datum`` is given; NaN (unknown,
                as from a single draw) counts as 0, which leaves the scatter of the checks.
            per_datum: the bound of each held-out datum, shape (N,), with mean ``value``; the same data, in the same
                order, at every check.

        Raises:
            TrainingError: a bound that is NaN or infinite.
            OptionError: a negative standard error.
            DataError: per-datum bounds at some checks only, of different N, or not a vector.
        """
        check = self._checks + 1
        if not math.isfinite(value) or (per_datum is not None and not bool(per_datum.isfinite().all())):
            raise TrainingError(
                f"the held-out bound is not finite at check {check}: got {value}; lower the step size, or look for "
                "held-out data outside the support of the likelihood"
            )
        if standard_error < 0:
            raise OptionError(f"standard_error: expected a number of at least 0, got {standard_error}")
        self._check_data(per_datum, check)
        self._checks = check
        self._values.append(float(value))
        self._errors.append(0.0 if math.isnan(standard_error) else float(standard_error))
        if per_datum is not None:
            self._per_datum.append(per_datum.detach().double().cpu())
        for history in (self._values, self._errors, self._per_datum):
            del history[: -2 * self.patience]

        window = self._values[-self.patience :]
        smooth = sum(window) / len(window)
        if check <= self.patience or smooth > self.best:
            self.best, self.best_check = smooth, check
        return self._decide()

    def _decide(self) -> bool:
        p = self.patience
        if len(self._values) < 2 * p:
            self.reason = f"check {self._checks}: too early to tell, two windows of {p} checks are needed"
            return False
        gain = (sum(self._values[p:]) - sum(self._values[:p])) / p
        error = max(self._given_error(), self._seen_error())
        stop = gain <= self.z * error
        verb, relation = ("stopped at", "no more than") if stop else ("going on at", "more than")
        self.reason = (
            f"{verb} check {self._checks}: the mean of the last {p} checks differs from that of the {p} before by "
            f"{gain:+.3g} nats, {relation} {self.z:g} standard errors of {error:.2g}"
        )
        return stop

    def _given_error(self) -> float:
        p = self.patience
        if self._per_datum:
            rows = torch.stack(self._per_datum)
            gain = rows[p:].mean(dim=0) - rows[:p].mean(dim=0)
            return (gain.var() / len(gain)).sqrt().item() if len(gain) > 1 else 0.0
        return math.sqrt(sum(e**2 for e in self._errors)) / p

    def _seen_error(self) -> float:
        steps = [after - before for before, after in zip(self._values, self._values[1:], strict=False)]
        variance = sum(step**2 for step in steps) / (2 * len(steps))
        return math.sqrt(2 * variance / self.patience)

    def _check_data(self, per_datum: Tensor | None, check: int) -> None:
        if (per_datum is not None) != bool(self._per_datum) and check > 1:
            was, now = ("absent", "present") if per_datum is not None else ("present", "absent")
            raise DataError(
                f"per_datum: {was} until check {check - 1}, {now} at check {check}: give it always or never"
            )
        if per_datum is None:
            return
        if per_datum.dim() != 1 or len(per_datum) == 0:
            raise DataError(f"per_datum: expected one bound for each datum, shape (N,), got {tuple(per_datum.shape)}")
        if self._per_datum and per_datum.shape != self._per_datum[0].shape:
            raise DataError(
                f"per_datum: expected the {len(self._per_datum[0])} data of the checks before, got {len(per_datum)} at "
                f"check {check}: evaluate the same held-out data each time"
            )
